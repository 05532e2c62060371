# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What the commands share: arguments, loading a checkpoint, progress."""

import argparse
import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file, logging

from ..hub.info import check_model_type


def positive(text: str) -> int:
    """The type of counts."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but is {value}")
    return value


def add_output_folder(parser: argparse.ArgumentParser, help: str = "folder to write"):
    """The options of commands that write a folder."""
    parser.description += (
        " The folder must be new or empty; with --overwrite the files of a checkpoint or tokenizer in it that are "
        "written again are replaced, when all is done, and the others stay. Any other folder is refused, untouched."
    )
    parser.add_argument("--output", type=Path, required=True, help=help)
    parser.add_argument("--overwrite", action="store_true", help="replace what is there, as said above")


def add_loading(parser: argparse.ArgumentParser):
    """The checkpoint, and how it is loaded."""
    parser.add_argument("checkpoint", help="its folder, or its name on the Hub")
    parser.add_argument("--device", help="default: cuda where there is one")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", default="auto", choices=dtypes, help="of the weights (default: the checkpoint's)")


@contextlib.contextmanager
def naming(name: str | Path) -> Iterator[None]:
    """Makes errors in the block begin with what they are about; those of the system name their file themselves."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or str(error).startswith(str(name)):
            raise
        raise ValueError(f"{name}: {str(error) or type(error).__name__}") from error


def load_model(options: argparse.Namespace) -> PreTrainedModel:
    """The model in eval mode on its device."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used here: {reason}. Name another one, such as cpu.") from error
    logging.disable_progress_bar()
    with naming(options.checkpoint):
        check_model_type(options.checkpoint, AutoConfig.from_pretrained(options.checkpoint).model_type)
        model = AutoModelForSeq2SeqLM.from_pretrained(options.checkpoint, dtype=options.dtype).eval().to(device)
    logging.enable_progress_bar()
    return model


def load_with_tokenizer(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The same with the tokenizer, for commands that need it."""
    model, name = load_model(options), options.checkpoint
    if cached_file(name, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False) is None:
        raise FileNotFoundError(f"{name} has no tokenizer: save one there with tokenizer.save_pretrained(...).")
    with naming(f"{name}, tokenizer"):
        return model, AutoTokenizer.from_pretrained(name)


def progress(items: Iterable, options: argparse.Namespace, description: str, unit: str = "it") -> Iterable:
    """The items behind a progress bar, which is quiet with --json and where standard error is no terminal."""
    return logging.tqdm(items, desc=description, unit=unit, file=sys.stderr, disable=options.json or None)


def print_rows(rows: Iterable[dict[str, Any]]):
    """Prints a line for each row."""
    for row in rows:
        cells = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
        print(", ".join(f"{name} {value}" for name, value in cells.items()), flush=True)
