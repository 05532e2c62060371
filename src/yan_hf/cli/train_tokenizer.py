# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`yan-hf train-tokenizer`: train a sentencepiece tokenizer.

Trains a sentencepiece tokenizer with byte fallback and the special tokens <pad> <s> </s> <unk> <mask>, from text files
or from a column of a data set.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..data.files import check_output_folder, iterate_column, texts_of
from ..data.tokenization import train_tokenizer
from ..saving import staged_save
from .common import add_output_folder, positive, progress


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("files", nargs="*", type=Path, help="text files, or .jsonl / .jsonl.gz files with --column")
    parser.add_argument("--dataset", help="a data set's name for datasets.load_dataset, instead of files")
    parser.add_argument("--config", help="its configuration")
    parser.add_argument("--split", default="train", help="its split (default: %(default)s)")
    parser.add_argument("--column", help="the column that holds the text (needed for data sets and JSON Lines)")
    add_output_folder(parser, "folder to write the tokenizer to")
    parser.add_argument("--vocab-size", type=positive, default=8_000, help="number of tokens (default: %(default)s)")
    parser.add_argument("--model-type", choices=("unigram", "bpe"), default="unigram", help="default: %(default)s")
    parser.add_argument("--max-length", type=positive, help="longest sequence that the tokenizer takes silently")


def run(options: argparse.Namespace) -> dict[str, Any]:
    if bool(options.files) == bool(options.dataset):
        options.error("give text files or --dataset, one of the two")
    if options.dataset and not options.column:
        options.error("--dataset needs --column, the column that holds the text")
    check_output_folder(options.output, options.overwrite)
    texts = progress(_texts(options), options, "reading", " texts")
    tokenizer = train_tokenizer(texts, options.vocab_size, options.model_type, options.max_length)
    with staged_save(options.output) as folder:
        tokenizer.save_pretrained(folder)
    return {"output": str(options.output), "model_type": options.model_type, "vocab_size": len(tokenizer)}


def _texts(options: argparse.Namespace) -> Iterator[str]:
    if options.dataset:
        from datasets import load_dataset  # slow to import, and seldom needed

        rows = load_dataset(options.dataset, options.config, split=options.split, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield from texts_of(row, options.column, f"{options.dataset}, row {number},")
        return
    if missing := [path for path in options.files if not path.is_file()]:
        raise FileNotFoundError(f"There is no file {missing[0]}.")
    for path in options.files:
        yield from iterate_column(path, options.column)
