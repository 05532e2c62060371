# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`yan-hf benchmark`: measure a checkpoint's speed.

Latency and tokens per second of generate on random sources, with the target's length given; the median of several
rounds after a warm-up.
"""

import argparse
import time
from statistics import median
from typing import Any

import torch

from ..hub.model_card import describe_hardware
from .common import add_loading, load_model, positive, print_rows, progress


def add_arguments(parser: argparse.ArgumentParser):
    add_loading(parser)
    parser.add_argument("--source-length", type=positive, help="tokens (default: 64, or all that fit)")
    parser.add_argument("--lengths", type=positive, nargs="+", default=[16, 64], help="target tokens")
    parser.add_argument("--batch-sizes", type=positive, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--compile", action="store_true", help="the compiled fast path")
    parser.add_argument("--steps", type=positive, help="solver steps (default: the checkpoint's)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    model = load_model(options)
    limit = model.config.max_position_embeddings
    source_length = options.source_length or min(64, limit)
    for name, longest in (("source-length", source_length), ("lengths", max(options.lengths))):
        if longest > limit:
            raise ValueError(f"--{name} is {longest}, but the model's position table ends at {limit}.")
    steps = options.steps or model.generation_config.num_inference_steps or model.config.solver_steps
    generator = torch.Generator().manual_seed(0)
    shapes = [(length, batch) for length in options.lengths for batch in options.batch_sizes]
    seconds: dict[tuple[int, int], list[float]] = {shape: [] for shape in shapes}
    # A warm-up of two calls, since the first of a compiled program compiles; then all shapes in turns.
    for number in progress(range(options.rounds + 2), options, "rounds"):
        for length, batch in shapes:
            ids = torch.randint(0, model.config.vocab_size, (batch, source_length), generator=generator)
            choices = {"target_lengths": length, "max_new_tokens": length, "num_inference_steps": steps}
            ids = ids.to(model.device)
            began = time.perf_counter()
            model.generate(ids, compile=options.compile, **choices).sum().item()  # waits for the device
            if number >= 2:
                seconds[length, batch].append(time.perf_counter() - began)
    results = []
    for (length, batch), times in seconds.items():
        speed = {"milliseconds": 1000 * median(times), "tokens_per_second": batch * length / median(times)}
        results.append({"target_length": length, "batch_size": batch, **speed})
    conditions = {"hardware": describe_hardware(), "dtype": str(model.dtype), "steps": steps, "rounds": options.rounds}
    if options.json:
        return {**conditions, "results": results}
    print_rows(results)
    return conditions
