# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Arguments that commands share: the options of `generate`, made from their table, and a task's rows."""

import argparse
import ast
import json
from functools import partial
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..generation_config_yan import BOOLEAN, OPTIONS, Option
from .common import positive


def add_generation_arguments(parser: argparse.ArgumentParser, *left_out: str):
    """Adds `--num-inference-steps` and so on, for every option that makes sense on a command line."""
    about = "Options left out are the checkpoint's. A list is written '[0, 0.2, 1]'."
    group = parser.add_argument_group("generation", about)
    for name, option in OPTIONS.items():
        if not option.command_line or name in left_out:
            continue
        flags = [f"--{name.replace('_', '-')}", *(["--steps"] if name == "num_inference_steps" else [])]
        text = option.help.replace("%", "%%")
        if option.check is BOOLEAN:
            group.add_argument(*flags, action=argparse.BooleanOptionalAction, help=text)
            continue
        text += f" ({option.check.accepts})" if option.check else ""
        group.add_argument(*flags, type=partial(_parse, option), metavar="VALUE", help=text)


def _parse(option: Option, text: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):  # a name
        value = text
    if value is None or (option.check and not option.check.holds(value)):
        raise argparse.ArgumentTypeError(f"must be {option.check.accepts if option.check else 'set'}, but is {text}")
    return value


def generation_options(options: argparse.Namespace) -> dict[str, Any]:
    """Those that were given, as keyword arguments of `generate`."""
    return {name: value for name in OPTIONS if (value := getattr(options, name, None)) is not None}


def add_task_arguments(parser: argparse.ArgumentParser, split: str):
    """The rows of a data set, and the task that makes pairs of them."""
    parser.add_argument("--file", help="JSON Lines (.gz or not), CSV or Parquet file")
    parser.add_argument("--dataset", help="name for datasets.load_dataset, instead of a file")
    parser.add_argument("--dataset-config", help="its configuration")
    parser.add_argument("--split", default=split, help="its split (default: %(default)s)")
    parser.add_argument("--task", default="pairs", help="the task's name (default: %(default)s: source and target)")
    parser.add_argument("--columns", type=_mapping, help='where they differ, as JSON: {"text": "sentence"}')
    parser.add_argument("--class-names", nargs="+", help="names of the classes, in order")
    parser.add_argument("--mask-marker", help="what stands for a mask in the rows, such as '<mask>'; default: nothing")
    parser.add_argument("--add-mask", action="store_true", help="put a mask token behind sources that have none")
    parser.add_argument("--mask-first", action="store_true", help="with --add-mask: in front of them instead")
    parser.add_argument("--space-in-target", action="store_true", help="the space before a mask belongs to the target")
    parser.add_argument("--max-sentences", type=positive, help="only the first sentences of a story")
    parser.add_argument("--corruption", type=_mapping, help='of restoration\'s sources, as JSON: {"error_rate": 0.2}')
    parser.add_argument("--max-source-length", type=positive, help="longer sources are cut")
    parser.add_argument("--max-rows", type=positive, help="use only the first rows")
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave unusable rows out instead of stopping")


def _mapping(text: str) -> dict[str, str]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, but is {text}")
    return value


def task_examples(
    options: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[Any, int, Any]:
    """The tokenized rows, how many were left out, and the [`TaskEncoder`] that made them."""
    from ..data.tasks import TaskEncoder, encode_split, load_splits  # slow to import

    splits = load_splits({options.split: options.file}, options.dataset, options.dataset_config)
    if options.split not in splits:
        raise ValueError(f"{options.dataset} has no split `{options.split}`, but {', '.join(splits)}.")
    rows = splits[options.split]
    if options.max_rows is not None:
        rows = rows.take(min(options.max_rows, len(rows)))
    limit = model.config.max_position_embeddings
    longest = options.max_source_length or limit
    if longest > limit:
        raise ValueError(f"--max-source-length is {longest}, but the model takes {limit} at most.")
    lengths = {"max_source_length": longest, "max_target_length": limit}
    encoder = TaskEncoder.from_options(options, tokenizer=tokenizer, label_names=options.class_names, **lengths)
    examples, skipped = encode_split(rows, encoder, options.file or f"{options.dataset}, {options.split}")
    return examples, skipped, encoder
