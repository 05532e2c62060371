# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Turns the results of `quality.py` into a table and plots of the sweeps; `docs/write_tables.py` fills the pages.

    python benchmarks/quality_report.py benchmarks/results/quality

Runs that differ in their training seed alone become one, with the mean of their figures and the standard deviation
over them. Writes `summary.md`, `steps.png` (exact match against solver steps) and, where there are several numbers of
experts, `experts.png` into the folder.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

import matplotlib


matplotlib.use("Agg")
from matplotlib import pyplot


def load(folder: Path) -> list[dict]:
    """The runs, in the order of their files' names, those of several training seeds as one."""
    groups: dict[tuple, list[dict]] = {}
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text())
        groups.setdefault(_without_seed(run), []).append(run)
    return [merged(group) for group in groups.values()]


def _without_seed(run: dict) -> tuple:
    options = run["options"]
    return options["task"], label(run), run["steps"], options["split"], options.get("max_rows")


def merged(runs: list[dict]) -> dict:
    """One run of several that differ in their training seed: figures are means, sampling seeds stand in a row."""
    seeds = [run["options"].get("seed", 0) for run in runs]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"Two results of {_without_seed(runs[0])} have the same training seed: {seeds}.")
    rows = []
    for same in zip(*(run["rows"] for run in runs), strict=True):
        row = dict(same[0])
        for name, value in same[0].items():
            found = [other[name] for other in same]
            if isinstance(value, list):
                row[name] = [figure for figures in found for figure in figures]
            elif isinstance(value, float):
                row[name] = mean(found)
                row[f"{name}_by_training_seed"] = found
        rows.append(row)
    return {**runs[0], "rows": rows, "seeds": seeds, "training_minutes": mean(run["training_minutes"] for run in runs)}


def label(run: dict) -> str:
    system, experts = run["options"]["system"], run["options"]["experts"]
    if system.startswith("ar-"):
        return system
    return f"{system}, K = {experts}"


def at(run: dict, steps: int, true_lengths: bool = False, candidates: int = 1, metric: str = "exact_match"):
    """A metric in a mode, or `None`; an autoregressive system has one mode, greedy decoding."""
    if label(run).startswith("ar-"):
        return run["rows"][0].get(metric) if (steps, true_lengths, candidates) == (3, False, 1) else None
    for row in run["rows"]:
        mode = row["num_inference_steps"], row["true_lengths"], row.get("num_length_candidates", 1)
        if mode == (steps, true_lengths, candidates):
            return row.get(metric)
    return None


# What the plot of the steps shows where exact match says little: a whole sentence is hardly ever right.
PLOTTED = {"infilling": "f1"}


def spread(run: dict) -> float | None:
    """Standard deviation over training seeds of exact match at three steps, where there are several."""
    values = at(run, 3, metric="exact_match_by_training_seed")
    return stdev(values) if values and len(values) > 1 else None


# Heading → what stands below it.
COLUMNS = {
    "task": lambda run: run["options"]["task"],
    "system": label,
    "parameters": lambda run: f"{run['parameters']:,}",
    "steps": lambda run: f"{run['steps']:,}",
    "seeds": lambda run: str(len(run["seeds"])),
    "minutes": lambda run: f"{run['training_minutes']:.0f}",
    "exact match": lambda run: at(run, 3),
    "± over seeds": spread,
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
    """Quality against solver steps, predicted lengths, a panel for each task; dashed: autoregressive systems."""
    tasks = list(dict.fromkeys(run["options"]["task"] for run in runs))
    labels = sorted({label(run) for run in runs if not label(run).startswith("ar-")})
    colors = {name: f"C{number}" for number, name in enumerate(labels)}  # the same in every panel
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.2 * columns, 3.3 * rows), squeeze=False)
    for axis in axes.flat[len(tasks) :]:
        axis.remove()
    for axis, task in zip(axes.flat, tasks):
        counts, metric = [], PLOTTED.get(task, "exact_match")
        for run in runs:
            if run["options"]["task"] != task or run["options"]["experts"] not in (1, 4):
                continue  # `experts.png` shows the others
            if label(run).startswith("ar-"):
                style = {"ar-gpt2": ("dimgray", "--"), "ar-bart": ("darkgray", ":")}[label(run)]
                axis.axhline(at(run, 3, metric=metric), color=style[0], linestyle=style[1], label=label(run))
                continue
            shown = [row for row in run["rows"] if not row["true_lengths"] and "num_length_candidates" not in row]
            counts = [row["num_inference_steps"] for row in shown]
            bounds = [row[f"{metric}_by_sampling_seed"] for row in shown]
            middle = [row[metric] for row in shown]
            axis.plot(counts, middle, marker="o", markersize=3, color=colors[label(run)], label=label(run))
            low, high = list(map(min, bounds)), list(map(max, bounds))
            axis.fill_between(counts, low, high, alpha=0.2, color=colors[label(run)])
        axis.set(title=task, xlabel="solver steps", ylabel=metric.replace("_", " "), xscale="log")
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def plot_experts(runs: list[dict], path: Path):
    """Exact match at one and at three steps against the number of held experts, a panel for each task."""
    runs = [run for run in runs if label(run) == f"yan, K = {run['options']['experts']}"]
    tasks = [run["options"]["task"] for run in runs]
    tasks = [task for task in dict.fromkeys(tasks) if tasks.count(task) > 1]
    if not tasks:
        return
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(3.6 * len(tasks), 3.2), squeeze=False)
    for axis, task in zip(axes[0], tasks):
        found = sorted(
            (run for run in runs if run["options"]["task"] == task), key=lambda run: run["options"]["experts"]
        )
        counts = [run["options"]["experts"] for run in found]
        for steps in (1, 3):
            axis.plot(counts, [at(run, steps) for run in found], marker="o", label=f"{steps} step{'s' * (steps > 1)}")
        axis.set(title=task, xlabel="experts", ylabel="exact match", xscale="log")
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
