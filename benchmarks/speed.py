# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Measures the latency of `generate` against other decoders of the same size, interleaved in one run, random weights.

    python benchmarks/speed.py --size tiny --lengths 16 64 --output benchmarks/results/speed-cpu-tiny.json

Systems: `yan`, this package; `yan-naive`, the research schedule (one pass more than steps, every expert computed for
every token, nothing of the source kept between steps); `ar-gpt2`, Transformers' `GPT2LMHeadModel` with its cache,
greedy, forced to the same number of new tokens. All have the same vocabulary, and parameters within 5 % of YAN's.
"""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from yan_hf import YanConfig, YanForConditionalGeneration
from yan_hf.routing import choose_experts, gate_log_probs


SIZES = {
    "tiny": {
        "vocab_size": 2_000,
        "hidden_size": 192,
        "num_attention_heads": 4,
        "encoder_layers": 2,
        "flow_layers": 2,
        "decoder_layers": 1,
        "num_experts": 2,
    },
    "base": {
        "vocab_size": 128_258,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "encoder_layers": 6,
        "flow_layers": 6,
        "decoder_layers": 2,
        "num_experts": 4,
    },
}


@torch.no_grad()
def naive_generate(
    model: YanForConditionalGeneration, input_ids: torch.Tensor, length: int, steps: int
) -> torch.Tensor:
    """The research schedule: the gate's pass is thrown away, all experts and the source are computed at every step."""
    base = model.model
    source = base.encode(input_ids).last_hidden_state
    batch_size = input_ids.shape[0]
    canvas = torch.ones(batch_size, length, dtype=torch.long, device=source.device)
    state = torch.randn(batch_size, length, model.config.hidden_size, device=source.device, dtype=source.dtype)
    times = torch.zeros(batch_size, device=source.device)
    gate = base.flow(state, times, base.prepare_context(source, None, canvas)).gate_logits
    log_probs = gate_log_probs(gate, canvas)
    experts = choose_experts(log_probs, torch.rand_like(log_probs))
    index = experts[..., None, None].expand(-1, -1, 1, state.shape[-1])
    for step in range(steps):
        context = base.prepare_context(source, None, canvas)
        fields = base.flow(state, torch.full_like(times, step / steps), context).expert_fields
        state = state + fields.gather(2, index)[:, :, 0] / steps
    return model.decode(state).argmax(-1)


def matching_gpt2(config: YanConfig, parameters: int) -> PreTrainedModel:
    """A GPT-2 of the same width with an untied head, as many layers as come closest to the number of parameters."""

    def build(layers: int) -> PreTrainedModel:
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=config.vocab_size,
                n_embd=config.hidden_size,
                n_head=config.num_attention_heads,
                n_layer=layers,
                n_positions=2 * config.max_position_embeddings,
                tie_word_embeddings=False,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
            )
        )

    with torch.device("meta"):
        sizes = {layers: build(layers).num_parameters() for layers in range(1, 49)}
    layers = min(sizes, key=lambda count: abs(sizes[count] - parameters))
    if abs(sizes[layers] - parameters) > 0.05 * parameters:
        raise RuntimeError(f"No GPT-2 of width {config.hidden_size} is within 5 % of {parameters:,} parameters.")
    return build(layers).eval()


def measure(systems: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every system, one after the other in each round, after a round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for index in range(rounds + 1):
        for name, run in systems.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if index:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64], help="target lengths")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--experts", type=int, help="number of experts instead of the size's")
    parser.add_argument("--source-length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype)
    fields = {**SIZES[options.size], **({"num_experts": options.experts} if options.experts else {})}
    config = YanConfig(max_position_embeddings=max(1024, *options.lengths), **fields)
    yan = YanForConditionalGeneration(config).to(device, dtype).eval()
    gpt2 = matching_gpt2(config, yan.num_parameters()).to(device, dtype)
    rows = []
    for batch_size in options.batch_sizes:
        for length in options.lengths:
            ids = torch.randint(5, config.vocab_size, (batch_size, options.source_length), device=device)
            forced = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
            systems = {
                "yan": lambda: yan.generate(ids, target_lengths=length, num_inference_steps=3),  # noqa: B023
                "yan-naive": lambda: naive_generate(yan, ids, length, 3),  # noqa: B023
                "ar-gpt2": lambda: gpt2.generate(ids, attention_mask=torch.ones_like(ids), **forced),  # noqa: B023
            }
            seconds = measure(systems, options.rounds, device)
            latency = {name: median(values) for name, values in seconds.items()}
            for name, value in latency.items():
                row = {
                    "system": name,
                    "batch_size": batch_size,
                    "target_length": length,
                    "latency_seconds": value,
                    "latency_range": [min(seconds[name]), max(seconds[name])],
                    "tokens_per_second": batch_size * length / value,
                    "times_slower_than_yan": value / latency["yan"],
                }
                rows.append(row)
                print(
                    f"{name:10} batch {batch_size:3} length {length:5}: {value * 1000:10.1f} ms "
                    f"{row['tokens_per_second']:10.0f} tokens/s {row['times_slower_than_yan']:7.2f}x",
                    flush=True,
                )
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    report = {
        "command": {name: str(value) for name, value in vars(options).items()},
        "commit": commit,
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "parameters": {"yan": yan.num_parameters(), "ar-gpt2": gpt2.num_parameters()},
        "solver_steps": 3,
        "rows": rows,
    }
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
