# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Turns the results of `quality.py` into the tables of the README and plots of the sweeps.

    python benchmarks/quality_report.py benchmarks/results/quality

Writes `summary.md`, `steps.png` (exact match against solver steps) and, where there are several numbers of experts,
`experts.png` into the folder.
"""

import argparse
import json
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
from matplotlib import pyplot


def load(folder: Path) -> list[dict]:
    """The runs, in the order of their tasks."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def label(run: dict) -> str:
    system, experts = run["options"]["system"], run["options"]["experts"]
    return system if system.startswith("ar-") else f"{system}, K = {experts}"


def at(run: dict, steps: int, true_lengths: bool = False, candidates: int = 1, metric: str = "exact_match"):
    """A metric in a mode, or `None`; an autoregressive system has one mode, greedy decoding."""
    if label(run).startswith("ar-"):
        return run["rows"][0].get(metric) if (steps, true_lengths, candidates) == (3, False, 1) else None
    for row in run["rows"]:
        mode = row["num_inference_steps"], row["true_lengths"], row.get("num_length_candidates", 1)
        if mode == (steps, true_lengths, candidates):
            return row.get(metric)
    return None


# Heading → what stands below it.
COLUMNS = {
    "task": lambda run: run["options"]["task"],
    "system": label,
    "parameters": lambda run: f"{run['parameters']:,}",
    "steps": lambda run: f"{run['steps']:,}",
    "minutes": lambda run: f"{run['training_minutes']:.0f}",
    "exact match": lambda run: at(run, 3),
    "best of 3 lengths": lambda run: at(run, 3, candidates=3),
    "true length": lambda run: at(run, 3, True),
    "1 step": lambda run: at(run, 1),
    "32 steps": lambda run: at(run, 32),
    "F1": lambda run: at(run, 3, metric="f1"),
    "F1, 32 steps": lambda run: at(run, 32, metric="f1"),
}


def table(runs: list[dict]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    for run in runs:
        cells = [column(run) for column in COLUMNS.values()]
        cells = ["" if cell is None else f"{cell:.3f}" if isinstance(cell, float) else cell for cell in cells]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot_steps(runs: list[dict], path: Path):
    """Exact match against solver steps, predicted lengths, a panel for each task."""
    runs = [run for run in runs if not label(run).startswith("ar-")]
    tasks = list(dict.fromkeys(run["options"]["task"] for run in runs))
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(3.6 * len(tasks), 3.2), squeeze=False)
    for axis, task in zip(axes[0], tasks):
        for run in runs:
            if run["options"]["task"] != task:
                continue
            rows = [row for row in run["rows"] if not row["true_lengths"] and "num_length_candidates" not in row]
            steps = [row["num_inference_steps"] for row in rows]
            spread = [row["exact_match_by_sampling_seed"] for row in rows]
            middle = [row["exact_match"] for row in rows]
            (line,) = axis.plot(steps, middle, marker="o", markersize=3, label=label(run))
            axis.fill_between(steps, list(map(min, spread)), list(map(max, spread)), alpha=0.2, color=line.get_color())
        axis.set(title=task, xlabel="solver steps", xscale="log")
        axis.set_xticks(steps, [str(step) for step in steps])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    axes[0][0].set_ylabel("exact match")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def plot_experts(runs: list[dict], path: Path):
    """Exact match at three steps against the number of experts, a line for each task."""
    runs = [run for run in runs if run["options"]["system"] == "yan"]
    figure, axis = pyplot.subplots(figsize=(4.5, 3.2))
    for task in dict.fromkeys(run["options"]["task"] for run in runs):
        points = sorted((run["options"]["experts"], at(run, 3)) for run in runs if run["options"]["task"] == task)
        if len(points) > 1:
            axis.plot(*zip(*points), marker="o", label=task)
    if not axis.lines:
        return
    counts = sorted({run["options"]["experts"] for run in runs})
    axis.set(xlabel="experts", ylabel="exact match, 3 steps", xscale="log")
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    runs = load(options.folder)
    if not runs:
        raise SystemExit(f"quality_report.py: {options.folder} holds no results of quality.py.")
    summary = table(runs)
    (options.folder / "summary.md").write_text(summary)
    print(summary)
    plot_steps(runs, options.folder / "steps.png")
    plot_experts(runs, options.folder / "experts.png")


if __name__ == "__main__":
    main()
