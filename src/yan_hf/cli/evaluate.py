# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`yan-hf evaluate`: measure a checkpoint on a task's rows.

Metrics with predicted and with true lengths, means over sampling seeds, one row for each number of solver steps.
"""

import argparse
import json
from typing import Any

from ..data.checks import check_vocabulary
from ..data.collator import YanDataCollator
from ..evaluation.evaluate import LENGTH_MODES, evaluate_model
from ..evaluation.metrics import METRICS
from .arguments import add_generation_arguments, generation_options
from .common import add_loading, load_with_tokenizer, positive, print_rows


def add_arguments(parser: argparse.ArgumentParser):
    add_loading(parser)
    parser.add_argument("--file", help="JSON Lines (.gz or not), CSV or Parquet file")
    parser.add_argument("--dataset", help="name for datasets.load_dataset, instead of a file")
    parser.add_argument("--dataset-config", help="its configuration")
    parser.add_argument("--split", default="test", help="its split (default: %(default)s)")
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
    parser.add_argument("--metrics", nargs="+", default=["exact_match", "f1"], help=f"of {', '.join(METRICS)}")
    parser.add_argument("--seeds", type=positive, default=3, help="sampling seeds (default: %(default)s)")
    parser.add_argument("--length-modes", nargs="+", default=list(LENGTH_MODES), choices=LENGTH_MODES)
    steps = {"type": positive, "nargs": "+", "help": "solver steps, one row each (default: the checkpoint's)"}
    parser.add_argument("--steps", "--num-inference-steps", **steps)
    parser.add_argument("--batch-size", type=positive, default=64, help="rows at once (default: %(default)s)")
    add_generation_arguments(parser, "num_inference_steps", "num_return_sequences")


def _mapping(text: str) -> dict[str, str]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, but is {text}")
    return value


def run(options: argparse.Namespace) -> dict[str, Any]:
    from ..data.tasks import TaskEncoder, encode_split, load_splits  # slow to import

    model, tokenizer = load_with_tokenizer(options)
    check_vocabulary(tokenizer, model)
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
    choices = generation_options(options)
    default = model.generation_config.num_inference_steps or model.config.solver_steps
    if isinstance(schedule := choices.get("time_schedule", model.generation_config.time_schedule), list):
        default = len(schedule) - 1
    choices |= {name: getattr(options, name) for name in ("seeds", "metrics", "batch_size", "length_modes")}
    choices |= {"steps": options.steps or [default], "progress": not options.json}
    results = []
    for row in evaluate_model(model, tokenizer, examples, YanDataCollator(tokenizer, encoder.objective), **choices):
        results.append(row)
        if not options.json:
            print_rows([row])
    report = {"checkpoint": options.checkpoint, "rows": len(examples), "skipped_rows": skipped, "seeds": options.seeds}
    return {**report, "results": results} if options.json else report
