# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Saves that appear in a checkpoint's folder when they are complete, with the code that they need."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_import_files


try:
    import fcntl
except ImportError:  # Windows, where savers of one folder do not wait for each other
    fcntl = None

_STAGE = ".saving-"
# Weights in one file or in shards, and the index of shards; a variant such as fp16 is a set of its own.
_WEIGHTS = re.compile(
    r"model(?:\.([\w-]+?))??(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index(?:\.([\w-]+))?\.json"
)


@contextmanager
def staged_save(folder: str | os.PathLike) -> Iterator[Path]:
    """
    A folder inside `folder` to write into, whose files are renamed into `folder` when the block ends without an
    exception. Files of `folder` that are not written again stay, except weights that the new ones replace. Raises
    `NotADirectoryError` where `folder` is a file, `OSError` where nothing can be written; the old version stays.
    """
    folder = Path(folder)
    if folder.name.startswith(_STAGE):  # part of another save, as a configuration is of its model's
        yield folder
        return
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; a checkpoint needs a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            with _locked(folder):
                for abandoned in folder.glob(f"{_STAGE}*"):
                    # A living saver holds the lock of its own.
                    with suppress(OSError), _locked(abandoned, wait=False):
                        shutil.rmtree(abandoned)
                stage = Path(tempfile.mkdtemp(prefix=_STAGE, dir=folder))
                held.callback(shutil.rmtree, stage, ignore_errors=True)
                held.enter_context(_locked(stage))
            yield stage
            for path in filter(Path.is_file, stage.iterdir()):
                with path.open("r+b") as file:
                    os.fsync(file.fileno())
        except (OSError, SafetensorError) as error:
            message = (
                f"Could not save in {folder}, where the version before is untouched: {error}. A save needs the room "
                "of a second copy until it is done."
            )
            number = getattr(error, "errno", None)
            raise (OSError(number, message) if number else OSError(message)) from error
        with _locked(folder):
            _move(stage, folder)


def _move(stage: Path, folder: Path):
    """
    Renames the files of a save to their places, and removes the weights that they replace. What decides which version
    a loader takes comes last and close together: the index of shards, the configuration, a single file of weights.
    """
    found = {path.name: _WEIGHTS.fullmatch(path.name) for path in stage.iterdir()}
    variants = {match[1] or match[3] for match in found.values() if match}
    stale = []
    for path in sorted(folder.iterdir(), reverse=True):
        match = _WEIGHTS.fullmatch(path.name)
        if path.name in found or (match and (match[1] or match[3]) in variants):
            # A second name: renaming over a file, or removing it, does not have to wait until its space is free.
            with suppress(OSError):
                os.link(path, stage / f"{path.name}.old")
            if path.name not in found:
                stale.append(path)

    def order(name: str) -> int:
        if name == "config.json":
            return 2
        match = found[name]
        return 0 if not match or match[2] else 1 if name.endswith(".json") else 3

    for name in sorted(found, key=order):
        os.replace(stage / name, folder / name)
    for path in stale:
        path.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Locks a folder for other savers, where the system can; the lock ends with the process at the latest."""
    if fcntl is None:
        if not wait:
            raise BlockingIOError(f"{folder} may be in use.")
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError) if wait else nullcontext():  # some network file systems have none
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def write_code(auto_map: dict[str, str], source: Path, target: Path) -> dict[str, str]:
    """
    Copies the modules that `auto_map` names, with all that they import, from one folder to another. Gives the entries
    whose module is in the target now, or in another repository.
    """
    files = {name: f"{r.partition('.')[0]}.py" for name, r in auto_map.items() if isinstance(r, str)}
    for module in (source / file for file in files.values()):
        for path in [module, *get_relative_import_files(module)] if module.is_file() else ():
            shutil.copyfile(path, target / Path(path).name)
    return {name: auto_map[name] for name, f in files.items() if "--" in auto_map[name] or (target / f).is_file()}


def unreadable_weights(folder: Path) -> list[Path]:
    """Those safetensors files in a folder whose header does not fit their size."""
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            safe_open(path, framework="pt")
        except SafetensorError:
            found.append(path)
    return found
