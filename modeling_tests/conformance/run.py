# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Runs Transformers' and PEFT's own tests, unmodified, against YAN.

The tests come from the source distributions of the installed versions, which pip fetches into a cache outside the
repository; a few files that they leave out stand in `shims/`. Without an archive this fails: it never passes silently.

Every test that skips or fails, and every override, must be in the table of README.md, and everything in that table
must occur: anything else makes this fail, as do other numbers of failures than in `results.json`, where it has these
versions. Failures of the table are shown as expected ones (xfail).

    python modeling_tests/conformance/run.py [--suites model peft ...] [--write] [-- pytest arguments]
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from table import check, check_counts, counts_table, expected_failure, numbers, read_table, summary_table


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = Path(os.environ.get("YAN_HF_CACHE", Path.home() / ".cache" / "yan_hf"))
RESULTS = HERE / "results.json"
SUITES = ("model", "training", "parallel", "tokenizer", "peft")
# Of ModelTesterMixin's tests, for each backbone; older versions have fewer.
FEWEST_MODEL_TESTS = {"5.21": 110, "5.17": 106}


def fetch_sources(package: str) -> Path:
    """
    Unpacked source distribution of an installed package, from the cache or through pip.

    Raises:
        RuntimeError: where there is neither.
    """
    release = f"{package}-{version(package)}"
    folder = CACHE / "sdists" / release
    if (folder / "tests").is_dir():
        return folder
    downloads = CACHE / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    archive = downloads / f"{release}.tar.gz"
    if not archive.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        requirement = f"{package}=={version(package)}"
        finished = subprocess.run([*command, "--dest", str(downloads), requirement], check=False)
        if finished.returncode or not archive.is_file():
            raise RuntimeError(
                f"pip could not fetch the source distribution of {package} {version(package)}, which holds its tests. "
                f"Connect to a package index once, or put {archive.name} into {downloads}."
            )
    with tempfile.TemporaryDirectory(dir=CACHE) as partial:
        with tarfile.open(archive) as file:
            # The patch releases before 3.10.12 and 3.11.4 have no filters.
            file.extractall(partial, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(exist_ok=True)
        os.replace(Path(partial, release), folder)
    return folder


def lay_out(folder: Path):
    """The libraries' tests and our shims, side by side as packages: `tests` of Transformers, `peft_tests` of PEFT."""
    shutil.copytree(fetch_sources("transformers") / "tests", folder / "tests")
    peft = fetch_sources("peft") / "tests"
    (folder / "peft_tests").mkdir()
    for name in ("__init__.py", "testing_common.py", "testing_utils.py", "test_encoder_decoder_models.py"):
        if (peft / name).is_file():
            shutil.copyfile(peft / name, folder / "peft_tests" / name)
    for shim in HERE.glob("shims/**/*"):
        target = folder / shim.relative_to(HERE / "shims")
        # Only gaps are filled: a file of theirs is never replaced, nor a package that is installed.
        if shim.is_dir() or target.exists() or "__pycache__" in shim.parts:
            continue
        if "diffusers" in shim.parts and importlib.util.find_spec("diffusers"):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(shim, target)


def run_suites(folder: Path, suites: list[str], arguments: list[str]) -> dict:
    """The recorder's report of a run in `folder`."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), str(HERE), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "RUN_SLOW": "1",  # or Transformers skips what compiles
        "TOKENIZERS_PARALLELISM": "false",
        "YAN_CONFORMANCE_REPORT": str(folder / "report.json"),
    }
    subprocess.run([sys.executable, HERE / "make_models.py", folder], env=environment, cwd=folder, check=True)
    options = [
        "-q",
        "--tb=short",
        "-p",
        "recorder",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--rootdir",
        str(HERE),
    ]
    options += ["-o", "enable_assertion_pass_hook=true", "-W", "ignore", "-n", "2"]
    files = [str(HERE / f"{suite}_suite.py") for suite in suites]
    subprocess.run([sys.executable, "-m", "pytest", *options, *files, *arguments], env=environment, cwd=folder)
    if not (folder / "report.json").is_file():
        raise RuntimeError("pytest stopped before it had run the tests; see above.")
    return json.loads((folder / "report.json").read_text())


def count(report: dict) -> dict[str, dict[str, int]]:
    """For each test class: tests that passed, passed without checking anything, skipped and failed."""
    counts: dict[str, Counter] = {}
    for name, test in sorted(report["tests"].items()):
        suite, owner, _ = name.split("::", 2)
        key = f"{suite.removesuffix('.py')}::{owner}"
        outcome = test["outcome"]
        if outcome == "passed" and not test["checks"]:
            outcome = "empty"
        counts.setdefault(key, Counter(passed=0, empty=0, skipped=0, failed=0))[outcome] += 1
    return {key: dict(counter) for key, counter in counts.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES), help="which to run")
    parser.add_argument(
        "--write", action="store_true", help="write the counts to results.json and the pages that show them"
    )
    parser.add_argument("arguments", nargs="*", help="arguments for pytest, after --")
    options = parser.parse_args()
    if options.write and options.arguments:
        parser.error("--write needs whole suites, without arguments for pytest")
    rows = read_table(HERE / "README.md", version("transformers"))
    CACHE.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="yan_conformance_") as folder:
            lay_out(Path(folder))
            report = run_suites(Path(folder), options.suites, options.arguments)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 1
    problems = check(report, rows, options.suites if not options.arguments else [])
    counts = count(report)
    if not report["tests"]:
        problems.append("no test ran")
    fewest = next(
        fewest for first, fewest in FEWEST_MODEL_TESTS.items() if numbers(version("transformers")) >= numbers(first)
    )
    for owner in ("model_suite::YanModelTest", "model_suite::YanMambaModelTest"):
        passed = sum(counts.get(owner, {}).get(outcome, 0) for outcome in ("passed", "empty"))
        passed -= 1  # the configuration's
        if "model" in options.suites and not options.arguments and passed < fewest:
            problems.append(f"{owner}: only {passed} tests pass, {fewest} must")
    versions = {name: version(name) for name in ("transformers", "peft", "torch")}
    print(f"\nconformance: {', '.join(f'{name} {number}' for name, number in versions.items())}")
    for owner, found in counts.items():
        print(f"  {owner:50}" + ", ".join(f"{number} {outcome}" for outcome, number in found.items()))
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    recorded = results.get(versions["transformers"], {"counts": {}, "versions": {}})
    if not options.arguments and not options.write and recorded["versions"].get("peft") == versions["peft"]:
        problems += check_counts(counts, recorded["counts"])
    failed = [(name, test["message"]) for name, test in report["tests"].items() if test["outcome"] == "failed"]
    expected = sum(expected_failure(*test, rows) is not None for test in failed)
    table = (HERE / "README.md").relative_to(HERE.parents[1])
    print(f"conformance: {expected} tests fail as listed in {table}; other failures: {len(failed) - expected}")
    for problem in problems:
        print(f"conformance: {problem}", file=sys.stderr)
    if options.write and not problems:
        result = results.setdefault(versions["transformers"], {"counts": {}})
        result["versions"] = versions
        result["counts"] = dict(sorted((result["counts"] | counts).items()))
        results = dict(sorted(results.items(), key=lambda item: numbers(item[0])))
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        sys.path.insert(0, str(ROOT / "benchmarks"))
        from report import write_between_markers

        write_between_markers(HERE / "README.md", "counts", counts_table(results).strip())
        write_between_markers(ROOT / "docs" / "compatibility.md", "conformance", summary_table(results).strip())
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
