# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The table and the figure of what `rewriting.py compare` has measured."""

from pathlib import Path
from typing import Any


# The source as it is, a row of every table.
NO_SYSTEM = "no system"

# Task → the metric of the figure, and whether less of it is better.
_PLOTTED = {"restoration": ("word_error_rate", True), "infilling": ("fillings_right", False)}

# Heading → what stands below it, by task.
_PERCENT = {
    "restoration": {
        "word error rate": "word_error_rate",
        "punctuation F1": "punctuation_f1",
        "capitalisation F1": "capitalization_f1",
        "sentences right": "sentence_accuracy",
        "edits wrong": "wrong_edit_rate",
        "clean sentences unchanged": "unchanged_sentences",
    },
    "infilling": {
        "fillings right": "fillings_right",
        "exact match": "exact_match",
        "F1": "f1",
        "known tokens kept": "known_kept",
    },
}
_COUNTED = {"restoration": ("numbers", "names", "code"), "infilling": ()}


def table(report: dict[str, Any]) -> str:
    """The figures as Markdown, a line for every system and size of paragraphs."""
    percent, counted = _PERCENT[report["task"]], _COUNTED[report["task"]]
    counts = [f"{name} kept" for name in counted]
    heading = ["tokens", "system", *percent, *counts, "latency, batch 1", "× `ar-bart`", "tokens/s, batch 32"]
    lines = [heading, ["---"] * len(heading)]
    reference = {row["size"]: row["latency_seconds"] for row in report["rows"] if row["system"] == "ar-bart"}
    for row in report["rows"]:
        name = row["system"] if row["system"] == NO_SYSTEM else f"`{row['system']}`"
        cells = [str(row["size"]), name, *(f"{100 * row[metric]:.1f} %" for metric in percent.values())]
        cells += [f"{row[kind][0]} of {row[kind][1]}" for kind in counted]
        latency, throughput = row.get("latency_seconds"), row.get("tokens_per_second")
        factor = reference[row["size"]] / latency if latency and row["size"] in reference else None
        cells.append(f"{1000 * latency:.1f} ms" if latency else "")
        cells.append(f"{factor:.1f}" if factor else "")
        cells.append(f"{throughput:,.0f}" if throughput else "")
        lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def plot(report: dict[str, Any], file: Path):
    """
    Quality against latency at batch 1, above, and throughput at batch 32; a column for every size. A line joins the
    points of a system with several numbers of steps.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    metric, less_is_better = _PLOTTED[report["task"]]
    sizes = list(dict.fromkeys(row["size"] for row in report["rows"]))
    families: dict[str, list[str]] = {}  # the points of one line
    for row in report["rows"]:
        if row["system"] == NO_SYSTEM:
            continue
        family, _, number = row["system"].rpartition("-")
        family = family if number.isdigit() else row["system"]
        families[family] = list(dict.fromkeys([*families.get(family, []), row["system"]]))
    axis_labels = {"latency_seconds": "ms for one text", "tokens_per_second": "tokens per second, 32 texts at once"}
    figure, axes = plt.subplots(
        2, len(sizes), figsize=(4.2 * len(sizes), 7), sharey="col", squeeze=False, constrained_layout=True
    )
    for column, size in enumerate(sizes):
        rows = {row["system"]: row for row in report["rows"] if row["size"] == size}
        for axis, (speed, label) in zip(axes[:, column], axis_labels.items()):
            scale = 1000 if speed == "latency_seconds" else 1
            for index, (family, names) in enumerate(families.items()):
                shown = [name for name in names if rows[name].get(speed)]
                xs, ys = [scale * rows[name][speed] for name in shown], [100 * rows[name][metric] for name in shown]
                axis.plot(xs, ys, color=f"C{index}", marker="osv^D<>*XP"[index], label=family)
                for name, x, y in zip(shown, xs, ys) if len(names) > 1 else ():
                    axis.annotate(name.rpartition("-")[2], (x, y), (4, 4), textcoords="offset points", fontsize=7)
            axis.set(xscale="log", xlabel=label, ylabel=f"{metric.replace('_', ' ')} in %")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.tick_params(axis="x", labelsize=7)  # of a narrow range there are many
            axis.grid(alpha=0.3)
        axes[0, column].set_title(f"{report['task']}, {size} tokens", fontsize=10)
        if less_is_better:
            axes[0, column].invert_yaxis()  # shared: better is higher everywhere
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(file, dpi=120)
