# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The tasks of `quality.py`: what each is made of, and how a model of it is shaped and trained."""

import gzip
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import load_dataset

from yan_hf.tasks import TextPair, classification, last_word, question_answering, split_sentences


MASK = "<mask>"
TOPICS = ("World", "Sports", "Business", "Sci/Tech")
SENTIMENTS = ("negative", "positive")


@dataclass(frozen=True)
class Task:
    """A data set as source and target texts, and the sizes that suit it."""

    hub_name: str
    pairs: Callable[[Iterable[dict[str, Any]]], list[TextPair]]
    vocab_size: int
    max_source_length: int
    max_new_tokens: int
    hidden_size: int = 64
    encoder_layers: int = 2
    reading_steps: int = 1500
    writing_steps: int = 800
    train_file: str = "train"
    hub_config: str | None = None
    # Training examples by level of difficulty, from the rows, where a task has levels.
    draw: Callable[["Task", list[dict[str, Any]]], Callable[[np.random.Generator, int], TextPair]] | None = None
    num_levels: int = 1
    config: dict[str, Any] = field(default_factory=dict)


def _questions(rows: Iterable[dict[str, Any]]) -> list[TextPair]:
    return [question_answering(" ".join(row["context"]), row["question"], row["answer"], MASK) for row in rows]


def _thinned(task: Task, rows: list[dict[str, Any]]) -> Callable[[np.random.Generator, int], TextPair]:
    """bAbI stories with up to `level` statements: those that the answer does not rest on can go."""

    def draw(rng: np.random.Generator, level: int) -> TextPair:
        count = int(rng.integers(1, level + 1))
        while True:
            row = rows[rng.integers(len(rows))]
            statements, support = row["context"], row["support"]
            if len(support) <= count <= len(statements):
                break
        others = np.setdiff1d(np.arange(len(statements)), support)
        kept = rng.choice(others, size=min(count - len(support), len(others)), replace=False)
        context = [statements[index] for index in sorted([*support, *kept])]
        return _questions([{**row, "context": context}])[0]

    return draw


def _labelled(names: tuple[str, ...]) -> Callable[[Iterable[dict[str, Any]]], list[TextPair]]:
    def pairs(rows: Iterable[dict[str, Any]]) -> list[TextPair]:
        found = [classification(row.get("text", row.get("sentence")).lower(), row["label"], names) for row in rows]
        # The mask is where the answer belongs: what the first stage reads off.
        return [TextPair(f"{MASK} {pair.source}", pair.target) for pair in found]

    return pairs


def _last_words(rows: Iterable[dict[str, Any]]) -> list[TextPair]:
    """The last word of every sentence of 4 to 20 words, with the sentence before it."""
    pairs = []
    for row in rows:
        sentences = split_sentences(row["text"].replace("\n", " "))
        for before, sentence in zip(["", *sentences], sentences):
            if 4 <= len(sentence.split()) <= 20:
                masked, target = last_word(sentence, MASK)
                pairs.append(TextPair(f"{before} {masked}".strip(), target))
    return pairs


TASKS = {
    "babi": Task(
        hub_name="facebook/babi_qa",
        hub_config="en-valid-10k-qa1",
        pairs=_questions,
        vocab_size=600,
        max_source_length=128,
        max_new_tokens=8,
        hidden_size=64,
        encoder_layers=3,
        reading_steps=9_000,
        writing_steps=3_000,
        draw=_thinned,
        num_levels=10,
    ),
    "sst2": Task(
        hub_name="stanfordnlp/sst2",
        pairs=_labelled(SENTIMENTS),
        vocab_size=2_000,
        max_source_length=48,
        max_new_tokens=8,
        train_file="train_phrases",
    ),
    "ag_news": Task(
        hub_name="fancyzhx/ag_news",
        pairs=_labelled(TOPICS),
        vocab_size=2_000,
        max_source_length=48,
        max_new_tokens=8,
    ),
    "last_word": Task(
        hub_name="roneneldan/TinyStories",
        pairs=_last_words,
        vocab_size=2_000,
        max_source_length=48,
        max_new_tokens=8,
        reading_steps=2_000,
        writing_steps=1_000,
    ),
}


def read_rows(task: Task, folder: Path | None, split: str) -> list[dict[str, Any]]:
    """The rows of a split, from local `.jsonl.gz` files or the Hub."""
    if folder is None:
        return list(load_dataset(task.hub_name, task.hub_config, split=split))
    name = task.train_file if split == "train" else split
    with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def examples_of(task: Task, rows: list[dict[str, Any]]) -> Callable[[np.random.Generator, int], TextPair]:
    """Draws training examples: by level where the task has levels, otherwise evenly."""
    if task.draw is not None:
        return task.draw(task, rows)
    pairs = task.pairs(rows)
    return lambda rng, level: pairs[rng.integers(len(pairs))]
