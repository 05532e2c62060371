# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Local text and JSON Lines files, gzip-compressed or not, and outputs that take nothing away unasked."""

import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def _iterate_lines(path: Path | None) -> Iterator[str]:
    """
    The lines of a file (unpacked where the name ends in `.gz`), or of standard input for `None`, without a byte order
    mark. Own code, since `datasets` names no line in its errors, and has no standard input.
    """
    try:
        opener = gzip.open if path and path.suffix == ".gz" else io.open
        with opener(path, "rb") if path else sys.stdin.buffer as file:
            yield from io.TextIOWrapper(file, encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{_name(path)} is not UTF-8 text: {error}.") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{_name(path)} is damaged or cut short: {error}.") from error


def _name(path: Path | None) -> str:
    return str(path or "Standard input")


def iterate_rows(path: Path | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """
    The objects of a JSON Lines file, or of standard input for `None`, with the numbers of their lines. Raises
    `ValueError` for a line that is no JSON object, with its number.
    """
    for number, line in enumerate(_iterate_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also a number too long, or too many brackets
            raise ValueError(f"{_name(path)}, line {number}, is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{_name(path)}, line {number}, is not a JSON object: {line[:80].strip()}")
        yield number, row


def iterate_column(path: Path | None, column: str | None) -> Iterator[str]:
    """
    The texts of a file, or of standard input for `None`: one column of JSON Lines, see [`texts_of`], or without a
    column the lines of a text file. Raises `ValueError` for what cannot be read, and JSON Lines without a column.
    """
    if column is None:
        if path is not None and path.name.removesuffix(".gz").endswith((".jsonl", ".json")):
            raise ValueError(f"{path} holds JSON Lines: name the column that holds the text with --column.")
        yield from _iterate_lines(path)
        return
    for number, row in iterate_rows(path):
        yield from texts_of(row, column, f"{_name(path)}, line {number},")


def texts_of(row: dict[str, Any], column: str, where: str) -> list[str]:
    """The texts in a column, a string or a list of them. Raises `ValueError` for any other, naming it by `where`."""
    if column not in row:
        raise ValueError(f"{where} has no column `{column}`, but {', '.join(row)}.")
    texts = row[column] if isinstance(row[column], list) else [row[column]]
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"{where} holds no text in column `{column}`, but {wrong[0]!r}.")
    return texts


def check_not_input(output: str | os.PathLike, *inputs: str | os.PathLike | int | None):
    """Raises `ValueError` where an output is one of the inputs by any name, a link to it too; `None` is no input."""
    is_device = not (os.path.isfile(output) or os.path.isdir(output))  # a terminal, say, which may be both
    for given in () if is_device else inputs:
        if given is not None and os.path.exists(given) and os.path.samefile(output, given):
            name = "standard input" if isinstance(given, int) else given
            raise ValueError(f"The output {output} is the input {name}, which would be lost: name another output.")


def check_writable(path: Path):
    """Raises `PermissionError` for a file that is protected from writing, which a renamed one could replace."""
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"{path} is protected from writing: name another file.")


def check_output_folder(folder: str | os.PathLike, overwrite: bool = False):
    """
    Checks that nothing is lost where a checkpoint or a tokenizer is to be written.

    Raises:
        NotADirectoryError: for a file.
        FileExistsError: for a folder with a checkpoint or a tokenizer, unless `overwrite`, or with anything else.
    """
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; the output must be a folder.")
    # What a save that was killed has left is no one's.
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith(".saving-"))
    if not names:
        return
    listed = ", ".join(names[:50]) + (f" and {len(names) - 50} more" if len(names) > 50 else "")
    config = folder / "config.json"
    has_model = config.is_file() and b'"model_type"' in config.read_bytes()
    if not (has_model or (folder / "tokenizer_config.json").is_file()):
        found = f"{folder} is not empty, and what it holds is no checkpoint that could be replaced, but {listed}"
        raise FileExistsError(f"{found}. Name a new or empty folder.")
    if not overwrite:
        remedy = "Name a new folder, or replace the files that are written again with `overwrite=True` (--overwrite)."
        raise FileExistsError(f"{folder} holds a checkpoint already: {listed}. {remedy}")


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place when the block ends without an error."""
    path = Path(path).resolve()  # the file that a link names
    check_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
