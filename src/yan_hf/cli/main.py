# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The command line, `yan-hf`."""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..data.files import check_output_folder, iterate_column, texts_of
from ..saving import staged_save
from .commands import add_commands, naming


# What the commands that write a folder do to what is there.
_FOLDER_HELP = (
    "The folder must be new or empty; with --overwrite the files of a checkpoint or tokenizer in it that are written "
    "again are replaced, when all is done, and the others stay. Any other folder is refused, untouched."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Returns 0, or 1 if it failed, with one line on standard error; bad arguments exit with 2."""
    parser = argparse.ArgumentParser(
        prog="yan-hf",
        description="Tools for YAN checkpoints.",
        epilog="A failure is one line; with YAN_HF_TRACEBACK=1 in the environment its traceback follows.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train_tokenizer(commands)
    _add_convert(commands)
    _add_export(commands)
    add_commands(commands, _positive)
    options = parser.parse_args(arguments)
    try:
        result = options.run(options)
    except BrokenPipeError:
        # Whoever read the output has seen enough; nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        # Errors that are foreseen explain themselves; of others the type says more than the message.
        foreseen = isinstance(error, (OSError, ValueError, RuntimeError, ImportError)) and str(error)
        message = str(error) if foreseen else f"{type(error).__name__} {error}"
        print(f"yan-hf {options.command}: {' '.join(message.split())}", file=sys.stderr)
        if os.environ.get("YAN_HF_TRACEBACK"):
            raise
        return 1
    except KeyboardInterrupt:
        print(f"yan-hf {options.command}: interrupted", file=sys.stderr)
        return 1
    if result is None:
        return 0  # the command's output is what it wrote
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name}: {value}")
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but is {value}")
    return value


def _overwrite(parser: argparse.ArgumentParser):
    parser.add_argument("--overwrite", action="store_true", help="replace what is there, as said above")


def _add_train_tokenizer(commands: Any):
    parser = commands.add_parser(
        "train-tokenizer",
        help="train a sentencepiece tokenizer",
        description="Trains a sentencepiece tokenizer with byte fallback and the special tokens <pad> <s> </s> <unk> "
        "<mask>, from text files or from a column of a data set. " + _FOLDER_HELP,
    )
    parser.add_argument("files", nargs="*", type=Path, help="text files, or .jsonl / .jsonl.gz files with --column")
    parser.add_argument("--dataset", help="a data set's name for datasets.load_dataset, instead of files")
    parser.add_argument("--config", help="its configuration")
    parser.add_argument("--split", default="train", help="its split (default: %(default)s)")
    parser.add_argument("--column", help="the column that holds the text (needed for data sets and JSON Lines)")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the tokenizer to")
    _overwrite(parser)
    parser.add_argument("--vocab-size", type=_positive, default=8_000, help="number of tokens (default: %(default)s)")
    parser.add_argument("--model-type", choices=("unigram", "bpe"), default="unigram", help="default: %(default)s")
    parser.add_argument("--max-length", type=_positive, help="longest sequence that the tokenizer takes silently")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=_train_tokenizer, error=parser.error)


def _train_tokenizer(options: argparse.Namespace) -> dict[str, Any]:
    if bool(options.files) == bool(options.dataset):
        options.error("give text files or --dataset, one of the two")
    if options.dataset and not options.column:
        options.error("--dataset needs --column, the column that holds the text")
    check_output_folder(options.output, options.overwrite)
    from ..data.tokenization import train_tokenizer

    texts = _with_progress(_texts(options), options.json)
    tokenizer = train_tokenizer(
        texts, vocab_size=options.vocab_size, model_type=options.model_type, model_max_length=options.max_length
    )
    with staged_save(options.output) as folder:
        tokenizer.save_pretrained(folder)
    return {"output": str(options.output), "model_type": options.model_type, "vocab_size": len(tokenizer)}


def _add_convert(commands: Any):
    parser = commands.add_parser(
        "convert",
        help="read a checkpoint of the research code",
        description="Converts a checkpoint of the research code to a folder for from_pretrained. " + _FOLDER_HELP,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="the research file")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    _overwrite(parser)
    parser.add_argument("--tokenizer", help="the tokenizer's folder, saved beside the model")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: the file's")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> dict[str, Any]:
    from ..hub.research import convert_research_checkpoint

    with naming(options.checkpoint):
        model = convert_research_checkpoint(
            options.checkpoint, options.output, options.tokenizer, options.dtype, options.overwrite
        )
    return {
        "output": str(options.output),
        "model": type(model).__name__,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _add_export(commands: Any):
    parser = commands.add_parser(
        "export",
        help="write a checkpoint for the research code, or with its code",
        description="Writes a checkpoint in the research layout (a file), or with the code that it needs to be loaded "
        "without this package (a folder). "
        + _FOLDER_HELP
        + " A file that is there is replaced with --overwrite only, "
        "and only if it is a research checkpoint.",
    )
    parser.add_argument("directory", help="the checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="file or folder to write")
    _overwrite(parser)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--to-research", action="store_true", help="in the research layout")
    kind.add_argument("--with-code", action="store_true", help="as a folder with its code, for trust_remote_code=True")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> dict[str, Any]:
    from ..hub.research import export_research_checkpoint, export_with_code

    export = export_research_checkpoint if options.to_research else export_with_code
    with naming(options.directory):
        export(options.directory, options.output, options.overwrite)
    return {"output": str(options.output)}


def _texts(options: argparse.Namespace) -> Iterator[str]:
    if options.dataset:
        from datasets import load_dataset

        rows = load_dataset(options.dataset, options.config, split=options.split, streaming=True)
        if rows.column_names is not None and options.column not in rows.column_names:
            raise ValueError(
                f"{options.dataset} has no column `{options.column}`, but {', '.join(rows.column_names)}."
            )
        for number, row in enumerate(rows, start=1):
            yield from texts_of(row, options.column, f"{options.dataset}, row {number},")
        return
    for path in options.files:
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}.")
    for path in options.files:
        yield from iterate_column(path, options.column)


def _with_progress(texts: Iterator[str], quiet: bool) -> Iterator[str]:
    from transformers.utils.logging import tqdm

    return tqdm(texts, desc="reading", unit=" texts", file=sys.stderr, disable=quiet or None)


if __name__ == "__main__":
    sys.exit(main())


__all__ = []
