# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`yan-hf evaluate`: measure a checkpoint on a task's rows.

Metrics with predicted and with true lengths, means over sampling seeds, one row for each number of solver steps.
"""

import argparse
from typing import Any

from ..data.checks import check_vocabulary
from ..data.collator import YanDataCollator
from ..evaluation.evaluate import LENGTH_MODES, evaluate_model
from ..evaluation.metrics import METRICS
from .arguments import add_generation_arguments, add_task_arguments, generation_options, task_examples
from .common import add_loading, load_with_tokenizer, positive, print_rows


def add_arguments(parser: argparse.ArgumentParser):
    add_loading(parser)
    add_task_arguments(parser, split="test")
    parser.add_argument("--metrics", nargs="+", default=["exact_match", "f1"], help=f"of {', '.join(METRICS)}")
    parser.add_argument("--seeds", type=positive, default=3, help="sampling seeds (default: %(default)s)")
    parser.add_argument("--length-modes", nargs="+", default=list(LENGTH_MODES), choices=LENGTH_MODES)
    steps = {"type": positive, "nargs": "+", "help": "solver steps, one row each (default: the checkpoint's)"}
    parser.add_argument("--steps", "--num-inference-steps", **steps)
    parser.add_argument("--batch-size", type=positive, default=64, help="rows at once (default: %(default)s)")
    add_generation_arguments(parser, "num_inference_steps", "num_return_sequences")


def run(options: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = load_with_tokenizer(options)
    check_vocabulary(tokenizer, model)
    examples, skipped, encoder = task_examples(options, model, tokenizer)
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
