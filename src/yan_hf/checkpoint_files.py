# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Checkpoint folders that are always whole, and weights that are what was saved.

A save writes all files into a folder of its own inside the checkpoint's, then renames that folder, which is the one
moment in which the new version takes the place of the old, then moves the files out. A process killed before that
moment leaves the old version, one killed after it leaves moves to be done, which the next load or save does.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


CHECKSUMS_FILE = "checksums.json"
# Set to skip the checksums when loading, which are read at the speed of SHA-256.
SKIP_VARIABLE = "YAN_HF_SKIP_CHECKSUMS"
_PARTIAL, _READY = ".saving-", ".saved-"
# Weights, in one file or in shards, and the index of shards; a variant such as fp16 is a set of its own.
_WEIGHTS = re.compile(r"model(?:\.([\w-]+?))??(?:-\d{5}-of-\d{5})?\.safetensors")
_INDEX = re.compile(r"model\.safetensors\.index(?:\.([\w-]+))?\.json")


@contextmanager
def whole_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """
    A folder to write a checkpoint into, which becomes `folder`'s new version when the block ends without an exception.

    Files of `folder` that are not written again stay, except weights of the old version.

    Raises:
        NotADirectoryError: where `folder` is a file.
        OSError: for a full disk, with the old version untouched.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; a checkpoint needs a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    finish_save(folder)
    _remove_abandoned(folder)
    partial = Path(tempfile.mkdtemp(prefix=f"{_PARTIAL}{os.getpid()}-", dir=folder))
    try:
        yield partial
        sums = {path.name: file_checksum(path) for path in sorted(partial.glob("*.safetensors"))}
        stems = {_stem(name) for name in sums}
        kept = {name: value for name, value in _read_sums(folder).items() if _stem(name) not in stems}
        files = sorted(path.name for path in partial.iterdir())
        record = {"sha256": {**kept, **sums}, "files": files}
        (partial / CHECKSUMS_FILE).write_text(json.dumps(record, indent=2) + "\n")
        for path in partial.iterdir():
            _flush(path)
        _flush(partial)
        os.rename(partial, folder / f"{_READY}{partial.name.removeprefix(_PARTIAL)}")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        # safetensors gives the system's number in its text.
        number = getattr(error, "errno", None) or int((re.findall(r"os error (\d+)", str(error)) or [0])[0])
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                errno.ENOSPC,
                f"There is no space left to save a checkpoint in {folder}. What was there before is untouched; a save "
                f"needs the room of a second copy until it is done. Free some, or save elsewhere ({error})",
            ) from error
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finish_save(folder)


def finish_save(folder: str | os.PathLike) -> dict[str, tuple[Any, Any]]:
    """
    Does the moves that a killed save has left to do. A folder without any is not touched.

    Returns:
        The fields of the configuration that this has changed: old and new values.
    """
    folder = Path(folder)
    if not folder.is_dir() or not any(folder.glob(f"{_READY}*")):
        return {}
    before = _read_config(folder)
    for ready in sorted(folder.glob(f"{_READY}*"), key=lambda path: path.stat().st_mtime):
        # Another process may do the same at the same time: what is gone has been moved.
        with suppress(FileNotFoundError):
            sums = ready / CHECKSUMS_FILE
            # The list of new weights stays until the end; without it the moves were done.
            if sums.exists():
                new = set(json.loads(sums.read_text())["files"])
                stems = {_stem(name) for name in new} - {None}
                # Old weights go first: a loader would take a single file before an index of shards.
                for path in folder.glob("model*"):
                    if _stem(path.name) in stems and path.name not in new:
                        path.unlink(missing_ok=True)
                for path in sorted(ready.iterdir()):
                    if path.name != CHECKSUMS_FILE:
                        with suppress(FileNotFoundError):
                            os.replace(path, folder / path.name)
                os.replace(sums, folder / CHECKSUMS_FILE)
            _flush(folder)
            shutil.rmtree(ready, ignore_errors=True)
    after = _read_config(folder)
    names = before.keys() | after.keys()
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


def update_config(config: Any, changes: dict[str, tuple[Any, Any]]):
    """
    Brings a configuration, read before [`finish_save`] changed the file, to the new version. An Auto class reads the
    configuration before it knows the model's class. Fields that were overridden meanwhile stay.
    """
    for name, (old, new) in changes.items():
        if config is not None and getattr(config, name, None) == old:
            setattr(config, name, new)


def _read_config(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return dict(json.loads((folder / "config.json").read_text()))
    return {}


def file_checksum(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def check_weights(folder: str | os.PathLike):
    """
    Checks the safetensors files of a local checkpoint: against the checksums saved with them, where there are any, and
    that they can be opened.

    Raises:
        OSError: naming the file that is damaged.
    """
    folder = Path(folder)
    sums_file = folder / CHECKSUMS_FILE
    sums = {} if os.environ.get(SKIP_VARIABLE) else _read_sums(folder)
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except SafetensorError as error:
            raise OSError(
                f"{path} is damaged or cut short ({error}). Copy or download the checkpoint again."
            ) from error
        if path.name in sums and file_checksum(path) != sums[path.name]:
            raise OSError(
                f"{path} is not the file that was saved: its SHA-256 differs from {sums_file.name}. Copy or download "
                f"the checkpoint again; if another tool has changed the weights on purpose, delete {sums_file}."
            )


def _read_sums(folder: Path) -> dict[str, str]:
    path = folder / CHECKSUMS_FILE
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text())["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{path} is damaged. Delete it if the weights beside it are known to be good.") from error


def _stem(name: str) -> str | None:
    """The variant that a file of weights belongs to, `""` for none; `None` for other files."""
    match = _WEIGHTS.fullmatch(name) or _INDEX.fullmatch(name)
    return None if match is None else match.group(1) or ""


def _flush(path: Path):
    """Asks for the file or folder to be on the disk, where the system can do that."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_abandoned(folder: Path):
    """Removes what killed saves have left half-written."""
    for path in folder.glob(f"{_PARTIAL}*"):
        number = path.name.removeprefix(_PARTIAL).partition("-")[0]
        if number.isdigit() and _is_alive(int(number)):
            continue  # another process is saving here, or another thread
        shutil.rmtree(path, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


__all__ = [
    "CHECKSUMS_FILE",
    "SKIP_VARIABLE",
    "check_weights",
    "file_checksum",
    "finish_save",
    "update_config",
    "whole_folder",
]
