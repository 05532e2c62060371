# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
How much longer `import yan_hf` takes than `import transformers, torch`, each in a process of its own.

    python benchmarks/import_time.py --output benchmarks/results/import_time.json
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from report import save


PROGRAMS = {
    "transformers, torch": "import transformers, torch",
    "and yan_hf": "import transformers, torch, yan_hf",
}
TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def seconds(program: str) -> float:
    command = [sys.executable, "-c", TIMED.format(program)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="how often each is imported, in turns")
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for name in PROGRAMS:  # a first time, so that everything is in the file cache
        seconds(PROGRAMS[name])
    for _ in range(options.rounds):
        for name, program in PROGRAMS.items():
            times[name].append(seconds(program))
    base, ours = times.values()
    result = {
        "median_s": {name: round(statistics.median(values), 4) for name, values in times.items()},
        "median_difference_s": round(statistics.median(b - a for a, b in zip(base, ours)), 4),
        "rounds": options.rounds,
    }
    print(json.dumps(result, indent=2))
    if options.output:
        save(options.output, result)


if __name__ == "__main__":
    main()
