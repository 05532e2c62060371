# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Compares how `generate` gets the target's length: predicted, several candidates, canvas slack, or given.

    python benchmarks/length_modes.py --task ag_news --data ag_news \
        --autoencoder runs/quality/ag_news_yan/autoencoder --output benchmarks/results/lengths_ag_news.json

From an auto-encoder that `quality.py` left in its `--work` folder, two models learn the task with the same rows,
steps and seed: one on canvases of the target's length, one with canvas slack (half of the canvases up to four end
tokens longer). Both are then evaluated on the test rows in every mode, in three Euler steps and with the same noise.
Beside the output file lies a plot of it.
"""

import argparse
import json
import operator
from pathlib import Path
from typing import Any

import matplotlib
from quality_systems import evaluate_by_seed, fit, new_config, start_flow
from quality_tasks import TASKS, encoded_examples, examples_of, fitting_pairs, read_rows, tokenizer_of
from report import save
from transformers import set_seed

from yan_hf import YanDataCollator


matplotlib.use("Agg")
from matplotlib import pyplot


MAX_SLACK = 4
MODES: dict[str, dict[str, Any]] = {
    "predicted": {},
    "3 candidates, score": {"num_length_candidates": 3},
    "3 candidates, joint": {"num_length_candidates": 3, "rerank": "joint"},
    "predicted + slack": {"length_slack": MAX_SLACK},
    "true length": {"true_lengths": True},
}


def plot(rows: list[dict], metric: str, path: Path):
    """Bars of the metric and of the share of right lengths, a panel for each way of training."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, slack in zip(axes, (0.0, 0.5)):
        shown = [row for row in rows if row["canvas_slack"] == slack]
        for offset, name in ((-0.2, metric), (0.2, "right_length")):
            places = [place + offset for place in range(len(shown))]
            axis.bar(places, [row[name] for row in shown], width=0.38, label=name.replace("_", " "))
        axis.set_xticks(range(len(shown)), [row["mode"].replace(" ", "\n") for row in shown], fontsize="x-small")
        axis.set(title="canvases with slack" if slack else "canvases of the true length", ylim=(0, 1.2))
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend(fontsize="small", loc="upper center", ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--data", type=Path, help="folder with train and test .jsonl.gz files; without it, the Hub's")
    parser.add_argument("--autoencoder", type=Path, required=True, help="what the flow starts from")
    parser.add_argument("--steps", type=int, help="optimiser steps of the flow (default: the task's)")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--max-rows", type=int, help="use only the first rows")
    parser.add_argument("--sampling-seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/length_modes"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    task = TASKS[options.task]
    train_rows = read_rows(task, options.data, "train")
    tokenizer = tokenizer_of(task, train_rows)
    draw = examples_of(task, tokenizer, train_rows)
    pairs = fitting_pairs(task, tokenizer, read_rows(task, options.data, "test"))[: options.max_rows]
    examples, references = encoded_examples(task, tokenizer, pairs), [pair.target for pair in pairs]
    wanted = [len(example["labels"]) for example in examples]
    config = new_config(task, tokenizer)

    rows = []
    for slack in (0.0, 0.5):
        set_seed(options.seed)
        model = start_flow(options.autoencoder, config)
        fit(
            model,
            task,
            tokenizer,
            draw,
            options.work / f"{options.task}_{slack:g}",
            options.steps or task.flow_steps,
            options.learning_rate,
            False,
            level=max(1, task.num_levels // 2),
            seed=options.seed,
            data_collator=YanDataCollator(tokenizer, canvas_slack=slack, max_slack=MAX_SLACK, seed=options.seed),
            disable_tqdm=True,
        )
        model.eval()
        for name, mode in MODES.items():
            settings = (task, examples, references, options.sampling_seeds)
            found, lengths = evaluate_by_seed(model, "yan", tokenizer, *settings, num_inference_steps=3, **mode)
            found["right_length"] = [sum(map(operator.eq, counts, wanted)) / len(wanted) for counts in lengths]
            row = {"canvas_slack": slack, "mode": name, **{key: sum(x) / len(x) for key, x in found.items()}}
            rows.append({**row, **{f"{key}_by_sampling_seed": values for key, values in found.items()}})
            print(f"slack {slack:g}, {name:20}", {key: round(row[key], 4) for key in found}, flush=True)
    if options.output:
        first = json.loads((options.autoencoder / "training.json").read_text())
        result = {
            "task": options.task,
            "data": task.hub_name if options.data is None else f"local copy, {options.data.name}",
            "autoencoder_steps": first["steps"],
            "flow_steps": options.steps or task.flow_steps,
            "train_rows": len(train_rows),
            "asked_rows": len(pairs),
            "parameters": model.num_parameters(),
            "seed": options.seed,
            "rows": rows,
        }
        save(options.output, result)
        plot(rows, "f1" if "f1" in task.metrics else "exact_match", options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
