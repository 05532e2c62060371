# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Runs Transformers' own model tests, unmodified, against YAN.

The tests come from the source distribution of the installed version, which pip fetches into a cache outside the
repository; a few files that it leaves out stand in `shims/`. Without the archive this fails: it never passes silently.

    python modeling_tests/conformance/run.py [pytest arguments]
"""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import transformers


HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("YAN_HF_CACHE", Path.home() / ".cache" / "yan_hf"))


def fetch_sources(package: str, version: str) -> Path:
    """Unpacked source distribution of a package, from the cache or through pip. Raises `RuntimeError` without it."""
    folder = CACHE / "sdists" / f"{package}-{version}"
    if (folder / "tests").is_dir():
        return folder
    downloads = CACHE / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    finished = subprocess.run([*command, "--dest", str(downloads), f"{package}=={version}"], check=False)
    archives = sorted(downloads.glob(f"{package}-{version}.tar.gz"))
    if finished.returncode or not archives:
        raise RuntimeError(
            f"pip could not fetch the source distribution of {package} {version}, which holds its tests. Connect to a "
            f"package index once, or put {package}-{version}.tar.gz into {downloads}."
        )
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(archives[0]) as archive:
        archive.extractall(partial, filter="data")
    shutil.rmtree(folder, ignore_errors=True)
    (partial / f"{package}-{version}").rename(folder)
    shutil.rmtree(partial)
    return folder


def main(arguments: list[str]) -> int:
    try:
        sources = fetch_sources("transformers", transformers.__version__)
    except RuntimeError as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 1
    # Only the archive's gaps are filled; a file it has is never replaced.
    for shim in HERE.glob("shims/tests/**/*.py"):
        target = sources / shim.relative_to(HERE / "shims")
        if not target.exists() or target.read_text().startswith("# Copyright 2026 The yan_hf"):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(shim, target)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(sources), str(HERE), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
    }
    options = [
        "-q",
        "-rf",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::pytest.PytestUnknownMarkWarning",
        "--rootdir",
        str(HERE),
        "-c",
        os.devnull,
    ]
    suites = [str(HERE / "model_suite.py")]
    return subprocess.call([sys.executable, "-m", "pytest", *options, *suites, *arguments], env=environment, cwd=HERE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
