# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What the commands share: arguments, loading a checkpoint, progress."""

import argparse
import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import cached_file, logging

from ..hub.info import check_model_type


# What the commands that write a folder do to what is there.
FOLDER_HELP = (
    "The folder must be new or empty; with --overwrite the files of a checkpoint or tokenizer in it that are written "
    "again are replaced, when all is done, and the others stay. Any other folder is refused, untouched."
)


def positive(text: str) -> int:
    """The type of counts."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but is {value}")
    return value


def add_json(parser: argparse.ArgumentParser, help: str = "print the result as JSON"):
    """The option of every command."""
    parser.add_argument("--json", action="store_true", help=help)


def add_output_folder(parser: argparse.ArgumentParser, help: str = "folder to write"):
    """The options of commands that write a folder."""
    parser.add_argument("--output", type=Path, required=True, help=help)
    parser.add_argument("--overwrite", action="store_true", help="replace what is there, as said above")


def add_checkpoint(parser: argparse.ArgumentParser):
    """The checkpoint, for commands that look at it."""
    parser.add_argument("checkpoint", help="its folder, or for commands that load it, its name on the Hub")


def add_loading(parser: argparse.ArgumentParser):
    """Where and how a model is loaded."""
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the weights (default: the checkpoint's)",
    )


@contextlib.contextmanager
def naming(name: str | Path) -> Iterator[None]:
    """Makes errors in the block begin with what they are about; those of the system name their file themselves."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or str(error).startswith(str(name)):
            raise
        raise ValueError(f"{name}: {str(error) or type(error).__name__}") from error


def load_checkpoint(options: argparse.Namespace) -> tuple[Any, Any]:
    """Model in eval mode on its device, and tokenizer (`None` where the checkpoint has none)."""
    logging.disable_progress_bar()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"--device {device} cannot be used here: {str(error).splitlines()[0]}. Name another one, such as cpu."
        ) from error
    with naming(options.checkpoint):
        check_model_type(options.checkpoint, AutoConfig.from_pretrained(options.checkpoint).model_type)
        model = AutoModelForSeq2SeqLM.from_pretrained(options.checkpoint, dtype=options.dtype).eval().to(device)
        logging.enable_progress_bar()
        found = cached_file(options.checkpoint, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False)
    with naming(f"{options.checkpoint}, tokenizer"):
        return model, AutoTokenizer.from_pretrained(options.checkpoint) if found else None


def load_with_tokenizer(options: argparse.Namespace) -> tuple[Any, Any]:
    """The same for commands that need the tokenizer."""
    model, tokenizer = load_checkpoint(options)
    if tokenizer is None:
        raise FileNotFoundError(
            f"{options.checkpoint} has no tokenizer: save one there with tokenizer.save_pretrained(...)."
        )
    return model, tokenizer


def progress(items: Iterable, options: argparse.Namespace, description: str, unit: str = "it") -> Iterable:
    """The items behind a progress bar, which is quiet with --json and where standard error is no terminal."""
    return logging.tqdm(items, desc=description, unit=unit, file=sys.stderr, disable=options.json or None)


def print_rows(rows: Iterable[dict[str, Any]]):
    """Prints a line for each row."""
    for row in rows:
        cells = (
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
        )
        print(", ".join(cells), flush=True)
