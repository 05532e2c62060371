# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Evaluates a checkpoint on a task's rows: predicted and true lengths, several seeds, and a sweep of solver steps.

    python examples/evaluate.py examples/configs/sst2.yaml --model runs/sst2 --test_file test.jsonl.gz --steps 1 3 32

Options of training in the configuration file are accepted and ignored.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

import torch
from common import DataArguments, ModelArguments, encode_splits, make_tokenizer, parse, prepare, read_splits
from transformers import AutoModelForSeq2SeqLM, Seq2SeqTrainingArguments
from transformers.utils.logging import tqdm

from yan_hf import YanDataCollator
from yan_hf.metrics import METRICS


@dataclass
class EvaluationArguments:
    """What is measured."""

    steps: list[int] = field(default_factory=lambda: [3], metadata={"help": "numbers of solver steps"})
    seeds: int = field(default=3, metadata={"help": "sampling seeds"})
    metrics: list[str] = field(default_factory=lambda: ["exact_match", "f1"], metadata={"help": f"of {list(METRICS)}"})
    batch_size: int = field(default=64, metadata={"help": "rows at once"})
    json_file: str | None = field(default=None, metadata={"help": "file for the result"})


@torch.no_grad()
def generate_all(model, tokenizer, examples, collator, steps: int, true_lengths: bool, seed: int, batch_size: int):
    """The generated texts, the targets' texts, and new tokens per second."""
    texts, references, tokens, seconds = [], [], 0, 0.0
    for start in tqdm(range(0, len(examples), batch_size), desc=f"{steps} steps", leave=False):
        batch = collator([examples[row] for row in range(start, min(start + batch_size, len(examples)))])
        labels = batch.pop("labels")
        counted = labels != -100
        batch = {name: value.to(model.device) for name, value in batch.items()}
        began = time.perf_counter()
        output = model.generate(
            **batch,
            num_inference_steps=steps,
            target_lengths=counted.sum(-1).to(model.device) if true_lengths else None,
            seeds=[seed * 1_000_003 + start + row for row in range(len(labels))],
            max_new_tokens=model.config.max_position_embeddings,
            return_dict_in_generate=True,
        )
        seconds += time.perf_counter() - began
        tokens += int(output.lengths.sum())
        texts += tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
        labels = labels.masked_fill(~counted, tokenizer.pad_token_id)
        references += tokenizer.batch_decode(labels, skip_special_tokens=True)
    return texts, references, tokens / seconds


def main():
    data, arguments, evaluation, training = parse(
        DataArguments, ModelArguments, EvaluationArguments, Seq2SeqTrainingArguments
    )
    if not arguments.model:
        raise SystemExit("evaluate.py: give --model, the checkpoint to evaluate.")
    prepare(training)
    splits = read_splits(data)
    if "test" not in splits:
        raise SystemExit("evaluate.py: give --test_file, or a --dataset with the split that --test_split names.")
    tokenizer = make_tokenizer(splits, data, arguments)
    model = AutoModelForSeq2SeqLM.from_pretrained(arguments.model).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    examples = encode_splits({"test": splits["test"]}, tokenizer, data)["test"]
    objective = "span_infilling" if data.task == "span_infilling" else "pairs"
    collator = YanDataCollator(tokenizer, objective, mask_rate=data.mask_rate)
    rows = []
    for true_lengths in (False, True):
        for steps in evaluation.steps:
            runs = []
            for seed in range(evaluation.seeds):
                texts, references, speed = generate_all(
                    model, tokenizer, examples, collator, steps, true_lengths, seed, evaluation.batch_size
                )
                run = {"tokens_per_second": speed}
                for name in evaluation.metrics:
                    value = METRICS[name](texts, references)
                    run.update(value if isinstance(value, dict) else {name: value})
                runs.append(run)
            row = {"steps": steps, "lengths": "true" if true_lengths else "predicted"}
            for name in runs[0]:
                values = [run[name] for run in runs]
                row[name] = mean(values)
                row[f"{name}_spread"] = stdev(values) if len(values) > 1 else 0.0
            rows.append(row)
            print(json.dumps(row), flush=True)
    if evaluation.json_file:
        result = {"rows": len(examples), "seeds": evaluation.seeds, "results": rows}
        Path(evaluation.json_file).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
