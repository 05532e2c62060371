# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What a training step costs with a shared choice of experts, against an expert for each token; or with a frozen encoder
of `--pretrained-layers`, against the same one's states encoded before.

    python benchmarks/training_step.py --output benchmarks/results/training_step.json
    python benchmarks/training_step.py --pretrained-layers 12 --hidden-size 384 --source-length 128 --output \
        benchmarks/results/training_step_encoder.json

Forward, backward and AdamW, interleaved in one run, in seconds of the processor's time (on CUDA of the clock's), on
random tokens with the frequencies of words. The variants differ in nothing but the fields that are named.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import torch
from report import save
from transformers import BertConfig

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


class Step:
    """A model with its optimiser and one batch."""

    def __init__(self, fields: dict, options: argparse.Namespace, device: torch.device):
        is_cached, fields = fields.get("cached", False), {name: fields[name] for name in fields if name != "cached"}
        if options.pretrained_layers:
            fields["encoder_config"] = BertConfig(
                vocab_size=options.vocab_size,
                hidden_size=options.hidden_size,
                num_hidden_layers=options.pretrained_layers,
                num_attention_heads=4,
                intermediate_size=4 * options.hidden_size,
            )
            fields["encoder_layers"] = options.pretrained_layers
        config = YanConfig(
            **{
                "vocab_size": options.vocab_size,
                "hidden_size": options.hidden_size,
                "num_attention_heads": 4,
                "encoder_layers": 3,
                "flow_layers": 2,
                "decoder_layers": 1,
                "num_experts": options.experts,
                "max_position_embeddings": max(32, options.length, options.source_length or 0),
                "loss_weights": {"mmd": 0.0},
                **fields,
            }
        )
        torch.manual_seed(0)
        self.model = YanForConditionalGeneration(config).to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        # As often as words are: the n-th token with a frequency of 1 / n.
        frequencies = 1 / torch.arange(1.0, options.vocab_size - 4)
        self.batch = {}
        for name, length in (("input_ids", options.source_length or options.length), ("labels", options.length)):
            ids = torch.multinomial(frequencies, options.batch_size * length, replacement=True) + 5
            self.batch[name] = ids.view(-1, length).to(device)
        if is_cached:
            with torch.no_grad():
                states = self.model.model.encoder.encode_batch(self.batch)
                names = ("encoder_states", "target_states")
                self.batch |= dict(zip(names, (values for values, _ in states)))
        self.device, self.seconds = device, []

    def run(self):
        clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        began = clock()
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(clock() - began)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=8_000)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--source-length", type=int, help="where it is another than the target's")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--pretrained-layers", type=int, default=0, help="of an encoder as wide as the flow (BERT)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    variants = ENCODER_VARIANTS if options.pretrained_layers else VARIANTS
    steps = {name: Step(fields, options, device) for name, fields in variants.items()}
    for round_number in range(options.rounds + 1):
        for step in steps.values():
            step.run()
            if round_number == 0:
                step.seconds.clear()  # a warm-up
    reference = median(steps[next(iter(variants))].seconds)
    rows = []
    for name, step in steps.items():
        seconds = median(step.seconds)
        rows.append({"variant": name, "seconds": seconds, "times": seconds / reference})
        print(f"{name:42} {1000 * seconds:8.1f} ms {seconds / reference:5.2f}x", flush=True)
    if options.output:
        settings = {name: value for name, value in vars(options).items() if name != "output"}
        save(options.output, {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
