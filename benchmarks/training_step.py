# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What a training step costs: with a shared choice of experts, against an expert for each token; or with `--size`, in
this package, in that of an earlier checkout (`--before`) and for autoregressive models of the size; or with a frozen
encoder of `--pretrained-layers`, against the same one's states encoded before. With `--copy` the models learn to copy
their sources, new ones at every step, and their token losses are written, as means over a tenth of the rounds.

    python benchmarks/training_step.py --output benchmarks/results/training_step.json
    git worktree add ../before COMMIT
    python benchmarks/training_step.py --size 5m --before ../before --output benchmarks/results/training_step_5m.json
    python benchmarks/training_step.py --pretrained-layers 12 --hidden-size 384 --source-length 128 --output \
        benchmarks/results/training_step_encoder.json

Forward, backward and AdamW (fused, as the Trainer's), interleaved in one run, in seconds of the processor's time (on
CUDA of the clock's), on random tokens with the frequencies of words. YAN's variants differ in nothing but the fields
that are named. Memory is the most bytes of tensors alive at once during a step, beyond parameters and optimiser.
"""

import argparse
import multiprocessing
import subprocess
import sys
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from decoders import matching_model
from report import peak_memory, save
from transformers import BertConfig, PreTrainedModel

from yan_hf import YanConfig, YanForConditionalGeneration


TOKEN = {"expert_scope": "token"}
VARIANTS = {
    "an expert for each token": TOKEN,
    "an expert for each token, no flow term": {**TOKEN, "loss_weights": {"mmd": 0.0, "flow": 0.0}},
    "target, held": {"expert_scope": "target", "loss_weights": {"mmd": 0.0, "flow": 0.0}},
    "target, anew": {"expert_scope": "target", "reselect_experts": True, "loss_weights": {"mmd": 0.0, "flow": 0.0}},
    "target, anew, with the flow term": {"expert_scope": "target", "reselect_experts": True},
}
# The first is what the others are compared with.
ENCODER_VARIANTS = {
    "frozen encoder, states encoded before": {"frozen_parts": ["encoder"], "cached": True},
    "frozen encoder": {"frozen_parts": ["encoder"]},
    "trained encoder": {},
}
# The first has every term that is on by default.
SIZE_VARIANTS = {
    "an expert for each token": {**TOKEN, "loss_weights": {}},
    "an expert for each token, no flow term": {**TOKEN, "loss_weights": {"flow": 0.0}},
    "target, anew": VARIANTS["target, anew"],
}
BASELINES = ("ar-gpt2", "ar-bart")
SIZES = {
    "5m": {"hidden_size": 160, "vocab_size": 8_000, "encoder_layers": 6, "length": 64, "batch_size": 32},
    "50m": {"hidden_size": 512, "vocab_size": 32_000, "encoder_layers": 4, "length": 64, "batch_size": 8},
}


def make_yan(fields: dict, options: argparse.Namespace) -> PreTrainedModel:
    """A YAN in training mode."""
    if options.pretrained_layers:
        encoder = BertConfig(
            vocab_size=options.vocab_size,
            hidden_size=options.hidden_size,
            num_hidden_layers=options.pretrained_layers,
            num_attention_heads=4,
            intermediate_size=4 * options.hidden_size,
        )
        fields = {**fields, "encoder_config": encoder, "encoder_layers": options.pretrained_layers}
    config = YanConfig(
        **{
            "vocab_size": options.vocab_size,
            "hidden_size": options.hidden_size,
            "num_attention_heads": 4,
            "encoder_layers": options.encoder_layers,
            "flow_layers": 2,
            "decoder_layers": 1,
            "num_experts": options.experts,
            "tie_word_embeddings": options.size is not None,
            "max_position_embeddings": max(32, options.length, options.source_length or 0),
            "loss_weights": {"mmd": 0.0},
            **fields,
        }
    )
    torch.manual_seed(0)
    return YanForConditionalGeneration(config).train()


class Step:
    """A model with its optimiser and one batch."""

    def __init__(
        self, model: PreTrainedModel, options: argparse.Namespace, device: torch.device, is_cached: bool = False
    ):
        self.model, self.device, self.dtype = model.to(device), device, getattr(torch, options.dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.options, self.losses, self.seconds = options, [], []
        batch = self.draw_batch()
        if model.config.model_type == "gpt2":  # one sequence, of which the target counts
            source, target = batch["input_ids"], batch["labels"]
            batch["input_ids"] = torch.cat([source, target], dim=1)
            batch["labels"] = torch.cat([torch.full_like(source, -100), target], dim=1)
        if is_cached:
            with torch.no_grad():
                names = ("encoder_states", "target_states")
                batch |= dict(zip(names, (values for values, _ in model.model.encoder.encode_batch(batch))))
        self.batch = batch

    def draw_batch(self) -> dict[str, torch.Tensor]:
        """Tokens as often as words are: the n-th with a frequency of 1 / n. Another batch for every step."""
        options, generator = self.options, torch.Generator().manual_seed(len(self.seconds))
        frequencies, batch = 1 / torch.arange(1.0, options.vocab_size - 4), {}
        for name, length in (("input_ids", options.source_length or options.length), ("labels", options.length)):
            count = options.batch_size * length
            ids = torch.multinomial(frequencies, count, replacement=True, generator=generator) + 5
            batch[name] = ids.view(-1, length).to(self.device)
        return batch

    def run(self):
        if self.options.copy:
            ids = self.draw_batch()["input_ids"]
            self.batch = {"input_ids": ids, "labels": ids}
        clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        began = clock()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self.model(**self.batch)
        output.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(clock() - began)
        if self.options.copy:
            self.losses.append(float(output.loss_terms["token"]))

    def report(self) -> dict[str, object]:
        """Parameters, and the losses or the memory of one more step."""
        report: dict[str, object] = {"parameters": self.model.num_parameters()}
        if self.options.copy:
            tenth = -(-len(self.losses) // 10)
            parts = [self.losses[start : start + tenth] for start in range(0, len(self.losses), tenth)]
            return report | {"token_losses": [fmean(part) for part in parts]}
        return report | {"peak_memory_bytes": peak_memory(self.run, self.device)}


class StepBefore:
    """A step of the package in another checkout, in a process of its own, since two packages cannot share one."""

    def __init__(self, fields: dict, options: argparse.Namespace, device: torch.device):
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        sys.path.insert(0, str(options.before / "src"))  # which a new process takes over
        context.Process(target=serve_step, args=(other, fields, options, device), daemon=True).start()
        sys.path.pop(0)
        self.seconds: list[float] = []

    def run(self):
        self.connection.send("run")
        self.seconds.append(self.connection.recv())

    def report(self) -> dict[str, object]:
        self.connection.send("report")
        return self.connection.recv()


def serve_step(connection: Connection, fields: dict, options: argparse.Namespace, device: torch.device):
    """Runs a step whenever asked."""
    step = Step(make_yan(fields, options), options, device)
    try:
        while True:
            if connection.recv() == "run":
                step.run()
                connection.send(step.seconds[-1])
            else:
                connection.send(step.report())
    except EOFError:  # the script has ended
        pass


def make_steps(options: argparse.Namespace, device: torch.device) -> dict[str, Step | StepBefore]:
    """The steps that are compared, by name."""
    if options.size is None:
        variants: dict[str, dict[str, Any]] = ENCODER_VARIANTS if options.pretrained_layers else VARIANTS
        steps = {}
        for name, fields in variants.items():
            fields = dict(fields)
            is_cached = fields.pop("cached", False)
            steps[name] = Step(make_yan(fields, options), options, device, is_cached)
        return steps
    make = partial(Step, options=options, device=device)
    steps: dict[str, Any] = {name: make(make_yan(fields, options)) for name, fields in SIZE_VARIANTS.items()}
    yan = steps[next(iter(steps))].model
    if options.before:
        steps |= {f"{name}, before": StepBefore(SIZE_VARIANTS[name], options, device) for name in SIZE_VARIANTS}
    for name in () if options.copy else BASELINES:
        model = matching_model(name, yan.config, yan.num_parameters(), 2 * options.length, vary="width")
        steps[name] = make(model.train())
    return steps


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, help="parameters, and with them width, vocabulary, lengths and batch")
    parser.add_argument("--before", type=Path, help="a checkout of an earlier commit, with --size")
    parser.add_argument("--copy", action="store_true", help="learn, instead of repeating a step; with --size")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of autocast")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=8_000)
    parser.add_argument("--encoder-layers", type=int, default=3)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--source-length", type=int, help="where it is another than the target's")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--pretrained-layers", type=int, default=0, help="of an encoder as wide as the flow (BERT)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.size:
        parser.set_defaults(**SIZES[options.size])
        options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = make_steps(options, device)
    for round_number in range(options.rounds + 1):
        for step in steps.values():
            step.run()
            if round_number == 0 and not options.copy:
                step.seconds.clear()  # a warm-up
    reference = median(steps[next(iter(steps))].seconds)
    rows = []
    for name, step in steps.items():
        seconds = median(step.seconds)
        row = {"variant": name, "seconds": seconds, "times": seconds / reference}
        row["tokens_per_second"] = options.batch_size * options.length / seconds
        row |= step.report()
        rows.append(row)
        print(f"{name:42} {1000 * seconds:8.1f} ms {seconds / reference:5.2f}x", flush=True)
    if options.output:
        settings = {name: value for name, value in vars(options).items() if name not in ("output", "before")}
        if options.before:
            command = ["git", "-C", options.before, "rev-parse", "HEAD"]
            settings["before"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        save(options.output, {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
