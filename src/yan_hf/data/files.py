# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Reading local text and JSON Lines files, gzip-compressed or not."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO


def open_text(path: Path) -> TextIO:
    """Opens a UTF-8 file for reading, through gzip where its name ends in `.gz`."""
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def is_json_lines(path: Path) -> bool:
    """Whether the file's name says that it holds JSON Lines."""
    return path.name.removesuffix(".gz").endswith((".jsonl", ".json"))


def iterate_rows(path: Path) -> Iterator[dict[str, Any]]:
    """
    The objects of a JSON Lines file.

    Raises:
        ValueError: for a line that is no JSON object, with its number.
    """
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}, is not a JSON object: {line[:80].strip()}")
            yield row


def iterate_column(path: Path, column: str | None) -> Iterator[str]:
    """
    The texts of a file: one column of JSON Lines (a list of texts counts as several), or the lines of a text file.

    Raises:
        ValueError: where the column is missing, or not named for JSON Lines.
    """
    if not is_json_lines(path):
        with open_text(path) as file:
            yield from file
        return
    if column is None:
        raise ValueError(f"{path} holds JSON Lines: name the column that holds the text.")
    for number, row in enumerate(iterate_rows(path), start=1):
        yield from texts_of(row, column, f"{path}, row {number},")


def texts_of(row: dict[str, Any], column: str, where: str) -> list[str]:
    """
    The texts in a column of a row: a string, or a list of strings.

    Raises:
        ValueError: where the column is missing or holds anything else, with the place named by `where`.
    """
    if column not in row:
        raise ValueError(f"{where} has no column `{column}`, but {', '.join(row)}.")
    texts = row[column] if isinstance(row[column], list) else [row[column]]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{where} holds no text in column `{column}`, but {text!r}.")
    return texts


__all__ = ["is_json_lines", "iterate_column", "iterate_rows", "open_text", "texts_of"]
