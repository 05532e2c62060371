# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Measures the Mamba backbone: time and peak memory, interleaved in one run, random weights.

    python benchmarks/mamba.py --lengths 64 512 4096 --output benchmarks/results/mamba_cpu.json

Four tables, each for a forward pass and a training step (forward and backward):

- `backbones`: the flow trunk of a YAN with a Transformer and with a Mamba backbone, cross-attention to a short source;
- `generate`: `generate` with either flow backbone, three steps, the target's length given (forward only);
- `scans`: the fast torch path of the selective scan against the sequential one, and mamba-ssm's kernels where they are
  installed and there is a GPU;
- `mixers`: one direction of this package's mixer against Transformers' `MambaMixer` on its path without kernels, with
  the same weights.

Peak memory is most bytes of tensors alive at once during a run, beyond those alive before it.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from report import peak_memory, save, timed
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from yan_hf import YanConfig, YanForConditionalGeneration
from yan_hf.mixers import YanMambaMixer
from yan_hf.modeling_yan import YanModel
from yan_hf.selective_scan import resolve_implementation, selective_scan, selective_scan_sequential


TABLES = ("backbones", "generate", "scans", "mixers")
MODES = ("forward", "training")
STATE_SIZE = 16
SOURCE_LENGTH = 64


def repeat_backward(function: Callable[[], torch.Tensor], leaves: list[torch.Tensor], training: bool) -> Callable:
    """`function`, with the gradients of a sum of its output where `training`."""

    def run():
        if not training:
            with torch.no_grad():
                return function()
        return torch.autograd.grad(function().sum(), leaves)

    return run


def backbone_systems(options: argparse.Namespace, length: int, training: bool, device: torch.device) -> dict:
    """The flow trunk with either backbone, at one state and time."""
    systems = {}
    for backbone in ("transformer", "mamba"):
        config = YanConfig(
            vocab_size=100,
            hidden_size=options.hidden_size,
            num_attention_heads=max(1, options.hidden_size // 64),
            encoder_layers=1,
            flow_layers=options.layers,
            flow_backbone=backbone,
            max_position_embeddings=length,
        )
        model = YanModel(config).to(device)
        source = torch.randn(options.batch_size, SOURCE_LENGTH, options.hidden_size, device=device)
        state = torch.randn(options.batch_size, length, options.hidden_size, device=device)
        times = torch.full((options.batch_size,), 0.5, device=device)
        canvas = torch.ones(options.batch_size, length, dtype=torch.long, device=device)

        def run(model=model, source=source, state=state, times=times, canvas=canvas) -> torch.Tensor:
            context = model.prepare_context(source, None, canvas)
            return model.flow(state, times, context, torch.zeros_like(canvas)).velocity

        leaves = [parameter for name, parameter in model.flow.layers.named_parameters() if "adaptive" not in name]
        systems[backbone] = repeat_backward(run, leaves, training)
    return systems


def generate_systems(options: argparse.Namespace, length: int, training: bool, device: torch.device) -> dict:
    """`generate` for targets of a given length, from a short source."""
    systems = {}
    for backbone in ("transformer", "mamba"):
        config = YanConfig(
            vocab_size=1000,
            hidden_size=options.hidden_size,
            num_attention_heads=max(1, options.hidden_size // 64),
            encoder_layers=1,
            flow_layers=options.layers,
            flow_backbone=backbone,
            max_position_embeddings=length,
        )
        model = YanForConditionalGeneration(config).to(device).eval()
        source = torch.randint(5, 1000, (options.batch_size, min(SOURCE_LENGTH, length)), device=device)
        systems[backbone] = lambda model=model, source=source: model.generate(
            source, target_lengths=length, max_new_tokens=length
        )
    return systems


def scan_systems(options: argparse.Namespace, length: int, training: bool, device: torch.device) -> dict:
    """The scan alone, in the width that a mixer of this hidden size has."""
    width, sizes = 2 * options.hidden_size, (options.batch_size, length)
    u, delta, z = (torch.randn(*sizes, width, device=device).mT.requires_grad_() for _ in range(3))
    b, c = (torch.randn(*sizes, STATE_SIZE, device=device).mT.requires_grad_() for _ in range(2))
    rates = -torch.arange(1.0, STATE_SIZE + 1, device=device).repeat(width, 1)
    skip, bias = torch.ones(width, device=device), torch.full((width,), -4.0, device=device)
    leaves = [u, delta, rates.requires_grad_(), b, c, skip.requires_grad_(), z, bias.requires_grad_()]
    systems = {"sequential": lambda: selective_scan_sequential(*leaves, delta_softplus=True)}
    implementations = ["torch"]
    if device.type == "cuda" and resolve_implementation("auto") == "auto":
        implementations.append("cuda")
    for implementation in implementations:
        systems[implementation] = lambda implementation=implementation: selective_scan(
            *leaves, delta_softplus=True, implementation=implementation
        )
    return {name: repeat_backward(run, leaves, training) for name, run in systems.items()}


def mixer_systems(options: argparse.Namespace, length: int, training: bool, device: torch.device) -> dict:
    """One direction: the same weights here and in Transformers, whose path without kernels is its slow one."""
    fields = {"hidden_size": options.hidden_size, "vocab_size": 100}
    yan = YanMambaMixer(YanConfig(num_attention_heads=1, **fields)).to(device)
    yan.reset()
    yan.dt_proj.reset()
    other = MambaMixer(MambaConfig(state_size=STATE_SIZE, expand=2, num_hidden_layers=1, **fields), 0).to(device)
    other.load_state_dict(yan.state_dict())
    states = torch.randn(options.batch_size, length, options.hidden_size, device=device)
    slow = getattr(other, "slow_forward", other)  # the name it had before Transformers 5
    return {
        "yan": repeat_backward(lambda: yan(states), list(yan.parameters()), training),
        "transformers": repeat_backward(lambda: slow(states), list(other.parameters()), training),
    }


BUILDERS = {
    "backbones": backbone_systems,
    "generate": generate_systems,
    "scans": scan_systems,
    "mixers": mixer_systems,
}


def measure(systems: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every system, one after the other in each round, after a round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for index in range(rounds + 1):
        for name, run in systems.items():
            elapsed = timed(run, device)
            if index:
                seconds[name].append(elapsed)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--longest-slow", type=int, default=1024, help="longest for Transformers' path, in training")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2, help="blocks of the flow trunk")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device(options.device)
    rows = []
    for table in options.tables:
        for mode in options.modes:
            for length in options.lengths:
                training = mode == "training"
                if table == "generate" and training:
                    continue
                if table == "mixers" and training and length > options.longest_slow:
                    continue  # its backward pass copies the whole sequence's states at every position
                systems = BUILDERS[table](options, length, training, device)
                seconds = measure(systems, options.rounds, device)
                first = next(iter(systems))
                for name, values in seconds.items():
                    memory = None
                    if not options.no_memory:
                        memory = peak_memory(systems[name], device)
                    row = {
                        "table": table,
                        "mode": mode,
                        "length": length,
                        "system": name,
                        "seconds": median(values),
                        "seconds_range": [min(values), max(values)],
                        "peak_bytes": memory,
                        f"times_faster_than_{first}": median(seconds[first]) / median(values),
                    }
                    rows.append(row)
                    print(
                        f"{table:9} {mode:8} length {length:5} {name:12} {row['seconds'] * 1000:10.2f} ms "
                        f"{'' if memory is None else f'{memory / 2**20:9.1f} MiB'} "
                        f"{median(seconds[first]) / median(values):7.2f}x {first}",
                        flush=True,
                    )
    if options.output:
        save(options.output, {"dtype": "float32", "rows": rows})


if __name__ == "__main__":
    main()
