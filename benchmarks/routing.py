# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Measures token against block routing: latency of `generate`, distinct experts, and bytes of expert weights read.

    python benchmarks/routing.py --output benchmarks/results/routing_cpu.json
    python benchmarks/routing.py --checkpoint runs/routing_quality/block --output ...

Models have random weights. Their gate is nearly uniform, so a core threshold means nothing to them: block routing gets
core sets of `--core-share` of the experts instead, which is what a model fine-tuned for it agrees on
(`benchmarks/routing_quality.py`). With `--checkpoint` a trained model is measured too, with its own threshold and
blocks, on random sources of its length.

Systems take turns with the same noise; the median of the rounds after a warm-up counts. Bytes
are those of the experts that the batch's tokens chose, each read once at every solver step.
"""

import argparse
from pathlib import Path
from statistics import median

import torch
from report import save, timed

from yan_hf import YanConfig, YanForConditionalGeneration


STEPS = 3


def random_model(options: argparse.Namespace, num_experts: int) -> YanForConditionalGeneration:
    config = YanConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        num_attention_heads=max(1, options.hidden_size // 64),
        feed_forward_multiplier=options.multiplier,
        encoder_layers=options.layers,
        flow_layers=options.layers,
        decoder_layers=2,
        num_experts=num_experts,
        max_position_embeddings=max(options.length, options.source_length),
    )
    torch.manual_seed(0)
    return YanForConditionalGeneration(config)


def measure(model, routings: dict[str, dict], options: argparse.Namespace, device: torch.device) -> list[dict]:
    """A row for each routing, interleaved."""
    config = model.config
    length = min(options.length, config.max_position_embeddings)
    source_length = min(options.source_length, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, config.vocab_size, (options.batch_size, source_length), generator=generator).to(device)
    experts = model.model.flow.experts
    expert_bytes = sum(weight.nbytes for weight in experts.parameters()) // config.num_experts

    def run(seed: int, **fields: object):
        return model.generate(
            ids,
            target_lengths=length,
            num_inference_steps=STEPS,
            seeds=list(range(seed, seed + options.batch_size)),
            eos_token_id=[],
            return_dict_in_generate=True,
            output_routing=True,
            output_expert_indices=True,
            **fields,
        )

    for fields in routings.values():
        run(0, **fields)
    seconds = {name: [] for name in routings}
    distinct, union = {name: [] for name in routings}, {name: [] for name in routings}
    for index in range(options.rounds):
        for name, fields in routings.items():
            outputs = []
            seconds[name].append(
                timed(lambda seed=index, fields=fields, outputs=outputs: outputs.append(run(seed, **fields)), device)
            )
            counts = outputs[0].distinct_experts
            distinct[name].append(float(counts[counts > 0].float().mean()))
            union[name].append(len(outputs[0].expert_indices.unique()))
    rows = []
    for name in routings:
        bytes_read = STEPS * expert_bytes * sum(union[name]) / options.rounds
        rows.append(
            {
                "routing": name,
                "num_experts": config.num_experts,
                "hidden_size": config.hidden_size,
                "expert_bytes": expert_bytes,
                "target_length": length,
                "batch_size": options.batch_size,
                "latency_seconds": median(seconds[name]),
                "latency_range": [min(seconds[name]), max(seconds[name])],
                "distinct_experts_per_block": sum(distinct[name]) / options.rounds,
                "distinct_experts_per_call": sum(union[name]) / options.rounds,
                "expert_bytes_read": bytes_read,
                **{key: value for key, value in routings[name].items() if key != "routing"},
            }
        )
    for row in rows:
        row["times_faster_than_token"] = rows[0]["latency_seconds"] / row["latency_seconds"]
        row["fewer_bytes_than_token"] = 1 - row["expert_bytes_read"] / rows[0]["expert_bytes_read"]
        print(
            f"K {row['num_experts']:4} width {row['hidden_size']:4} {row['routing']:6} "
            f"{row['latency_seconds'] * 1000:8.1f} ms ({row['times_faster_than_token']:.2f}x)  distinct experts "
            f"{row['distinct_experts_per_call']:6.1f}  expert bytes {row['expert_bytes_read'] / 2**20:8.1f} MiB "
            f"({-row['fewer_bytes_than_token']:+.0%})",
            flush=True,
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="*", default=[4, 16, 64, 128, 256])
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=[512])
    parser.add_argument("--multiplier", type=int, default=4, help="inner width of feed-forwards and experts")
    parser.add_argument("--layers", type=int, default=6, help="blocks of the encoder and of the flow")
    parser.add_argument("--vocab-size", type=int, default=8_000)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--source-length", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--core-share", type=float, default=0.125)
    parser.add_argument("--block-size", type=int, help="by default the whole target")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checkpoint", type=Path, help="a trained model with block routing in its configuration")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()

    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    rows = []
    if options.checkpoint is not None:
        model = YanForConditionalGeneration.from_pretrained(options.checkpoint, dtype=dtype).to(device).eval()
        block = {"routing": "block", "core_threshold": model.config.core_threshold}
        rows += [
            {"trained": True, **row}
            for row in measure(model, {"token": {"routing": "token"}, "block": block}, options, device)
        ]
    for hidden_size in options.hidden_sizes:
        options.hidden_size = hidden_size
        for num_experts in options.experts:
            model = random_model(options, num_experts).to(device, dtype).eval()
            core = max(1, round(options.core_share * num_experts))
            block = {"routing": "block", "core_threshold": 0.0, "min_experts": core}
            if options.block_size:
                block["routing_block_size"] = options.block_size
            found = measure(model, {"token": {"routing": "token"}, "block": block}, options, device)
            rows += [{"trained": False, **row} for row in found]
            del model
    if options.output:
        save(options.output, {"dtype": options.dtype, "solver_steps": STEPS, "rounds": options.rounds, "rows": rows})


if __name__ == "__main__":
    main()
