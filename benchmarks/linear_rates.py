# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Compares PyTorch's float32 `linear` on the CPU with the one that `generate` uses there (`yan_hf.cpu_linear`).

    python benchmarks/linear_rates.py --output benchmarks/results/linear_rates_cpu.json

For the matrix shapes of the `base` size of `speed.py`, at batch 1: the attention's projections, the feed-forward
network, the vocabulary head. Both are run in turns; the median of the rounds counts.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import torch
from report import save

from yan_hf.inference.cpu_kernels import OneDnnLinear, apply_linear


SHAPES = {"projection": (512, 512), "up_proj": (512, 2048), "down_proj": (2048, 512), "head": (512, 128_258)}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if not OneDnnLinear.is_available():
        raise SystemExit("linear_rates.py: oneDNN is not available here, so `generate` uses PyTorch's own product.")

    torch.manual_seed(0)
    rows = []
    for tokens in options.tokens:
        for name, (inputs, outputs) in SHAPES.items():
            layer, states = torch.nn.Linear(inputs, outputs), torch.randn(tokens, inputs)
            seconds: dict[str, list[float]] = {"pytorch": [], "onednn": []}
            for index in range(options.rounds + 1):
                began = time.perf_counter()
                layer(states)
                between = time.perf_counter()
                with OneDnnLinear():
                    middle = time.perf_counter()
                    apply_linear(layer, states)
                    ended = time.perf_counter()
                if index:
                    seconds["pytorch"].append(between - began)
                    seconds["onednn"].append(ended - middle)
            work = 2 * tokens * inputs * outputs
            row = {"tokens": tokens, "layer": name, "shape": [inputs, outputs]}
            row.update({f"{system}_gflops": work / median(values) / 1e9 for system, values in seconds.items()})
            row["speedup"] = median(seconds["pytorch"]) / median(seconds["onednn"])
            rows.append(row)
            print(
                f"{tokens:5} tokens, {name:10}: {row['pytorch_gflops']:6.0f} -> {row['onednn_gflops']:6.0f} GFLOP/s, "
                f"{row['speedup']:.2f}x"
            )
    if options.output:
        save(options.output, {"rows": rows})


if __name__ == "__main__":
    main()
