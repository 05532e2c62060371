# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
How much longer `import transformers, torch, yan_hf` takes than without the last, each time in a new process.

    python benchmarks/import_time.py --output benchmarks/results/import_time.json
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from report import save


PROGRAM = """
import time
start = time.perf_counter()
import transformers, torch
between = time.perf_counter()
import yan_hf
print(between - start, time.perf_counter() - between)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="processes that import them")
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    options = parser.parse_args()
    rounds = []
    for index in range(options.rounds + 1):
        command = [sys.executable, "-c", PROGRAM]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        if index:  # the first one fills the file cache
            rounds.append([float(word) for word in printed.split()])
    base, ours = (statistics.median(times) for times in zip(*rounds))
    result = {"transformers_and_torch_s": base, "yan_hf_more_s": ours, "most_s": max(b for _, b in rounds)}
    print(", ".join(f"{name} {value:.4f}" for name, value in result.items()))
    if options.output:
        save(options.output, {"rounds": options.rounds, **result})


if __name__ == "__main__":
    main()
