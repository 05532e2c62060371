# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Compares how `generate` gets the target's length: predicted, several candidates, canvas slack, or given.

    python benchmarks/length_modes.py --task topic --data ag_news --output benchmarks/results/lengths_topic.json
    python benchmarks/length_modes.py --task last-word --data tinystories --output ...

`--data` is a folder with `train.jsonl.gz` and `test.jsonl.gz`; without it the set is loaded from the Hub. Tasks:
`topic` writes the label's text for a news description (labels of one to several tokens, so that a wrong length is a
wrong label); `last-word` writes the masked last word of a story's sentence, of one to several tokens. For each task
two small models are trained from scratch with the same rows, steps and seed: one on canvases of the target's length,
one with canvas slack (half of the canvases up to four end tokens longer). Both are then asked in every mode, with the
same noise.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from report import save
from transformers import Trainer, TrainingArguments, set_seed

from yan_hf import (
    YanConfig,
    YanDataCollator,
    YanForConditionalGeneration,
    encode_pairs,
    exact_match,
    train_tokenizer,
)
from yan_hf.reranking import token_f1
from yan_hf.tasks import classification, last_word, split_sentences


HUB_NAMES = {"topic": "fancyzhx/ag_news", "last-word": "roneneldan/TinyStories"}
TOPICS = ("World", "Sports", "Business", "Sci/Tech")
MAX_SLACK = 4
MODES = {
    "predicted": {},
    "3 candidates, score": {"num_length_candidates": 3},
    "3 candidates, joint": {"num_length_candidates": 3, "rerank": "joint"},
    "predicted + slack": {"length_slack": MAX_SLACK},
    "true length": {"target_lengths": True},
}


def read_rows(options: argparse.Namespace, split: str) -> list[dict]:
    if options.data is None:
        hub_split = "validation" if options.task == "last-word" and split == "test" else split
        return list(load_dataset(HUB_NAMES[options.task], split=hub_split))
    file = options.data / f"{split}.jsonl.gz"
    return list(load_dataset("json", data_files=str(file), split="train"))


def sentences(rows: list[dict]) -> list[str]:
    """Sentences of 5 to 14 words, in order."""
    found = [sentence for row in rows for sentence in split_sentences(row["text"].replace("\n", " "))]
    return [sentence for sentence in found if 5 <= len(sentence.split()) <= 14]


def make_examples(options: argparse.Namespace) -> tuple[object, list[dict], list[dict]]:
    """Tokenizer, training examples, test examples."""
    rows = {split: read_rows(options, split) for split in ("train", "test")}
    pairs = {}
    for split in rows:
        if options.task == "topic":
            pairs[split] = [classification(row["text"].lower(), row["label"], TOPICS) for row in rows[split]]
        else:
            pairs[split] = [last_word(text, "<mask>") for text in sentences(rows[split])]
    # A small vocabulary for words, so that their lengths differ.
    vocab_size = 2000 if options.task == "topic" else 1000
    texts = [f"{pair.source.replace('<mask>', '')} {pair.target}" for pair in pairs["train"]]
    tokenizer = train_tokenizer(texts, vocab_size=vocab_size)
    examples = {}
    for split, split_pairs in pairs.items():
        encoded = encode_pairs(tokenizer, *zip(*split_pairs), max_source_length=64)
        examples[split] = [dict(zip(encoded, row)) for row in zip(*encoded.values())]
    return tokenizer, examples["train"], examples["test"][: options.test_rows]


def train(options: argparse.Namespace, tokenizer, examples: list[dict], slack: float) -> YanForConditionalGeneration:
    set_seed(options.seed)
    config = YanConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        num_attention_heads=4,
        encoder_layers=3,
        flow_layers=2,
        decoder_layers=1,
        max_position_embeddings=128,
        initializer_range=0.1,
        loss_weights={"mmd": 0.0},
        experts_implementation=None if torch.cuda.is_available() else "eager",
    )
    model = YanForConditionalGeneration(config)
    collator = YanDataCollator(
        tokenizer,
        canvas_slack=slack,
        max_slack=MAX_SLACK,
        seed=options.seed,
    )
    arguments = TrainingArguments(
        output_dir=str(options.work / f"slack-{slack}"),
        max_steps=options.steps,
        per_device_train_batch_size=64,
        learning_rate=options.learning_rate,
        adam_beta2=0.98,
        warmup_steps=50,
        lr_scheduler_type="linear",
        logging_steps=200,
        disable_tqdm=not sys.stderr.isatty(),
        save_strategy="no",
        report_to=[],
        seed=options.seed,
        remove_unused_columns=False,
    )
    Trainer(model=model, args=arguments, train_dataset=Dataset.from_list(examples), data_collator=collator).train()
    return model.eval()


@torch.no_grad()
def evaluate(model, tokenizer, examples: list[dict], mode: dict, seed: int) -> dict[str, float]:
    """Exact match, token F1 and right lengths, with one seed for each row: all modes share their noise."""
    collator = YanDataCollator(tokenizer)
    predictions, references, overlap, right, seconds = [], [], 0.0, 0, 0.0
    for start in range(0, len(examples), 100):
        batch = collator(examples[start : start + 100])
        labels = batch.pop("labels")
        lengths = (labels != -100).sum(-1)
        arguments = {**mode, "seeds": [seed * 1_000_003 + start + row for row in range(len(labels))]}
        if "target_lengths" in arguments:
            arguments["target_lengths"] = lengths
        began = time.perf_counter()
        output = model.generate(
            **{name: value.to(model.device) for name, value in batch.items()},
            return_dict_in_generate=True,
            **arguments,
        )
        seconds += time.perf_counter() - began
        written, wanted = output.sequences.tolist(), labels.masked_fill(labels == -100, 0).tolist()
        for row, (left, right_ids) in enumerate(zip(written, wanted)):
            left, right_ids = left[: output.lengths[row]], right_ids[: lengths[row]]
            overlap += token_f1(left, right_ids)
            right += len(left) == len(right_ids)
        predictions += tokenizer.batch_decode(written, skip_special_tokens=True)
        references += tokenizer.batch_decode(wanted, skip_special_tokens=True)
    return {
        "exact_match": exact_match(predictions, references),
        "token_f1": overlap / len(examples),
        "right_length": right / len(examples),
        "seconds": seconds,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=HUB_NAMES, required=True)
    parser.add_argument("--data", type=Path, help="folder with train.jsonl.gz and test.jsonl.gz")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--test-rows", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/length_modes"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    tokenizer, train_examples, test_examples = make_examples(options)
    rows = []
    for slack in (0.0, 0.5):
        began = time.monotonic()
        model = train(options, tokenizer, train_examples, slack)
        minutes = (time.monotonic() - began) / 60
        for name, mode in MODES.items():
            runs = [evaluate(model, tokenizer, test_examples, mode, seed) for seed in range(3)]
            row = {"canvas_slack": slack, "mode": name, "training_minutes": round(minutes, 1)}
            for metric in runs[0]:
                values = [run[metric] for run in runs]
                row[metric] = sum(values) / len(values)
                row[f"{metric}_by_sampling_seed"] = values
            rows.append(row)
            print(
                f"trained with slack {slack}: {name:20} exact match {row['exact_match']:.3f}  token F1 "
                f"{row['token_f1']:.3f}  right length {row['right_length']:.3f}",
                flush=True,
            )
    if options.output:
        save(
            options.output,
            {
                "options": {
                    name: value.name if isinstance(value, Path) else value
                    for name, value in vars(options).items()
                    if name != "work"
                },
                "data": HUB_NAMES[options.task] if options.data is None else f"local copy, {options.data.name}",
                "train_rows": len(train_examples),
                "test_rows": len(test_examples),
                "parameters": model.num_parameters(),
                "rows": rows,
            },
        )


if __name__ == "__main__":
    main()
