# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Evaluates a checkpoint on a task's rows: predicted and true lengths, several seeds, and a sweep of solver steps.

    python examples/evaluate.py examples/configs/sst2.yaml --model runs/sst2 --test_file test.jsonl.gz --steps 1 3 32

Options of training in the configuration file are accepted and ignored.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    encode_splits,
    make_tokenizer,
    parse,
    prepare,
    read_splits,
    task_encoder,
)
from transformers import AutoModelForSeq2SeqLM, Seq2SeqTrainingArguments

from yan_hf import YanDataCollator, evaluate_model
from yan_hf.data.files import check_not_input
from yan_hf.evaluation.metrics import METRICS


@dataclass
class EvaluationArguments:
    """What is measured."""

    steps: list[int] = field(default_factory=lambda: [3], metadata={"help": "numbers of solver steps"})
    seeds: int = field(default=3, metadata={"help": "sampling seeds"})
    metrics: list[str] = field(default_factory=lambda: ["exact_match", "f1"], metadata={"help": f"of {list(METRICS)}"})
    batch_size: int = field(default=64, metadata={"help": "rows at once"})
    json_file: str | None = field(
        default=None, metadata={"help": "file for the result; one that is there is replaced"}
    )


def main():
    data, arguments, evaluation, training = parse(
        DataArguments, ModelArguments, EvaluationArguments, Seq2SeqTrainingArguments, ignored=(LoraArguments,)
    )
    if not arguments.model:
        raise SystemExit("evaluate.py: give --model, the checkpoint to evaluate.")
    prepare(training)
    if evaluation.json_file:
        check_not_input(evaluation.json_file, data.test_file)
    data.streaming = False  # the rows are needed several times
    splits = read_splits(data, needed="test")
    tokenizer = make_tokenizer(splits, data, arguments)
    model = AutoModelForSeq2SeqLM.from_pretrained(arguments.model).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    examples = encode_splits({"test": splits["test"]}, tokenizer, data)["test"]
    objective = task_encoder(data, tokenizer).objective
    collator = YanDataCollator(tokenizer, objective, mask_rate=data.mask_rate)
    rows = []
    for row in evaluate_model(
        model,
        tokenizer,
        examples,
        collator,
        evaluation.steps,
        evaluation.seeds,
        evaluation.metrics,
        evaluation.batch_size,
        progress=True,
    ):
        rows.append(row)
        print(json.dumps(row), flush=True)
    if evaluation.json_file:
        result = {"rows": len(examples), "seeds": evaluation.seeds, "results": rows}
        Path(evaluation.json_file).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
