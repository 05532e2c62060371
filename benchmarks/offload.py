# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Measures expert offloading: latency of `generate`, device memory, bytes copied and waits, interleaved in one run.

    python benchmarks/offload.py --output benchmarks/results/offload_cpu.json
    python benchmarks/offload.py --hidden-size 2048 --dtype bfloat16 --output ...   # on CUDA

Systems, each with token and with block routing, on random weights:

- `resident`: all experts on the device;
- `prefetch everything`: every expert is copied at the start of every call, and all of them fit;
- `on demand`: a bounded set, an expert is copied when it is needed;
- `speculative`: chosen experts are predicted from a trunk layer, and what was missed is loaded (exact);
- `speculative, execute`: only predicted experts run (approximate).

Calls start with nothing on the device, as if the experts of every request were others. The bound is `--resident-share`
of the experts. Block routing has core sets of `--core-share` of the experts, as in `benchmarks/routing.py`.

On CUDA latency, peak memory and waits are measured. On a CPU copies are plain ones into the bounded set, so that
latencies say what the bookkeeping costs and nothing about a bus; `bus_seconds` is then the model: the bytes that a
call waits for in each system, at `--bus-rate`. It leaves out that copies made ahead may not be over in time.

Recall is the share of the chosen experts that was predicted, for each layer; with `--checkpoint` that of a
trained model is measured too, on random sources.
"""

import argparse
from functools import partial
from pathlib import Path
from statistics import median

import torch
from report import save, timed
from routing import STEPS, random_model

from yan_hf import YanForConditionalGeneration


SYSTEMS = {
    "resident": None,
    "prefetch everything": {"mode": "on_demand"},
    "on demand": {"mode": "on_demand"},
    "speculative": {"mode": "speculative"},
    "speculative, execute": {"mode": "speculative", "speculation": "execute"},
}


class System:
    """A model of its own, so that switching between systems moves no weights."""

    def __init__(self, name: str, options: argparse.Namespace, device: torch.device, dtype: torch.dtype):
        self.name, self.options, self.device = name, options, device
        model = random_model(options, options.experts).to(dtype).eval()
        self.offload = None
        if device.type == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
        if SYSTEMS[name] is None:
            model = model.to(device)
        else:
            everything = name == "prefetch everything"
            bound = options.experts if everything else max(1, round(options.resident_share * options.experts))
            self.offload = model.enable_expert_offload(bound, device=device, **SYSTEMS[name])
        self.model = model
        self.device_bytes = torch.cuda.memory_allocated() - before if device.type == "cuda" else None
        generator = torch.Generator().manual_seed(1)
        shape = (options.batch_size, options.source_length)
        self.ids = torch.randint(5, model.config.vocab_size, shape, generator=generator).to(device)

    def call(self, seed: int, **routing: object) -> torch.Tensor:
        if self.offload is not None:
            self.offload.clear()
        if self.name == "prefetch everything":
            self.offload.prefetch(torch.arange(self.options.experts))
        return self.model.generate(
            self.ids,
            target_lengths=self.options.length,
            num_inference_steps=STEPS,
            seeds=list(range(seed, seed + self.options.batch_size)),
            eos_token_id=[],
            **routing,
        )


def recall_by_layer(model: torch.nn.Module, options: argparse.Namespace, device: torch.device, **routing: object):
    """Recall of every trunk layer over a few calls, with room for all predictions."""
    config, found = model.config, {}
    length = min(options.length, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, config.vocab_size, (8, length), generator=generator).to(device)
    for layer in range(config.flow_layers):
        offload = model.enable_expert_offload(config.num_experts, device=device, prediction_layer=layer)
        for seed in range(8):
            model.generate(ids[seed : seed + 1], target_lengths=length, seeds=[seed], eos_token_id=[], **routing)
        found[layer] = offload.stats.recall
        print(f"recall of a prediction after {layer} of {config.flow_layers} blocks: {found[layer]:.3f}", flush=True)
    model.disable_expert_offload()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--multiplier", type=int, default=4)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=8_000)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--source-length", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--resident-share", type=float, default=0.25)
    parser.add_argument("--core-share", type=float, default=0.125)
    parser.add_argument("--bus-rate", type=float, default=25e9, help="bytes per second of the modelled bus")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checkpoint", type=Path, help="a trained model, for its recall")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()

    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    core = max(1, round(options.core_share * options.experts))
    routings = {
        "token": {"routing": "token"},
        "block": {"routing": "block", "core_threshold": 0.0, "min_experts": core},
    }
    systems = {name: System(name, options, device, dtype) for name in options.systems}
    rows = []
    for routing, fields in routings.items():
        expected = systems["resident"].call(0, **fields) if "resident" in systems else None
        for name, system in systems.items():
            output = system.call(0, **fields)  # also the warm-up
            if expected is not None and name != "speculative, execute" and not torch.equal(output, expected):
                raise RuntimeError(f"{name} wrote other tokens than the resident model.")
            if system.offload is not None:
                system.offload.reset_stats()
        seconds: dict[str, list[float]] = {name: [] for name in systems}
        for index in range(options.rounds):
            for name, system in systems.items():
                seconds[name].append(timed(partial(system.call, index, **fields), device))
        for name, system in systems.items():
            row = {
                "system": name,
                "routing": routing,
                "latency_seconds": median(seconds[name]),
                "latency_range": [min(seconds[name]), max(seconds[name])],
            }
            if system.offload is None:
                experts = system.model.model.flow.experts
                row["device_expert_bytes"] = sum(weight.nbytes for weight in experts.parameters())
            else:
                stats, calls = system.offload.stats, options.rounds
                waited = stats.misses * system.offload.expert_bytes
                if name == "prefetch everything":
                    waited = stats.bytes_copied  # nothing runs beside the copies before the first step's experts
                row |= {
                    "max_resident_experts": system.offload.max_resident_experts,
                    "device_expert_bytes": system.offload.slot_bytes,
                    "peak_resident_bytes": stats.peak_resident_experts * system.offload.expert_bytes,
                    "hits": stats.hits / calls,
                    "misses": stats.misses / calls,
                    "prefetched": stats.prefetched / calls,
                    "bytes_copied": stats.bytes_copied / calls,
                    "bytes_waited_for": waited / calls,
                    "waits": stats.waits / calls,
                    "wait_seconds": stats.wait_seconds / calls,
                    "recall": stats.recall,
                }
                if device.type == "cpu":
                    row["bus_seconds"] = waited / calls / options.bus_rate
            if device.type == "cuda":
                row["device_bytes"] = system.device_bytes
            rows.append(row)
            if "on demand" in seconds:
                row["times_faster_than_on_demand"] = median(seconds["on demand"]) / row["latency_seconds"]
            print(
                f"{routing:6} {name:21} {row['latency_seconds'] * 1000:8.1f} ms  experts on the device "
                f"{row['device_expert_bytes'] / 2**20:7.1f} MiB  copied {row.get('bytes_copied', 0) / 2**20:7.1f}, "
                f"waited for {row.get('bytes_waited_for', 0) / 2**20:7.1f}  waits {row.get('waits', 0):.1f}  recall "
                f"{'-' if row.get('recall') is None else format(row['recall'], '.2f')}",
                flush=True,
            )
    model = random_model(options, options.experts).to(dtype).eval()
    recall = {"random": {name: recall_by_layer(model, options, device, **routings[name]) for name in routings}}
    if options.checkpoint is not None:
        model = YanForConditionalGeneration.from_pretrained(options.checkpoint, dtype=dtype).eval()
        trained = {"token": {"routing": "token"}, "block": {"routing": "block"}}
        recall["trained"] = {name: recall_by_layer(model, options, device, **trained[name]) for name in trained}
    if options.output:
        names = ("experts", "hidden_size", "multiplier", "layers", "length", "source_length", "batch_size", "bus_rate")
        save(
            options.output,
            {
                "dtype": options.dtype,
                "solver_steps": STEPS,
                "rounds": options.rounds,
                **{name: getattr(options, name) for name in names},
                "rows": rows,
                "recall_by_layer": recall,
            },
        )


if __name__ == "__main__":
    main()
