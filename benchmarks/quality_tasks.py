# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The tasks of `quality.py`: what each is made of, and how a model of it is shaped and trained."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import load_dataset
from transformers import PreTrainedTokenizerBase

from yan_hf import encode_pairs, train_tokenizer
from yan_hf.data.files import iterate_rows
from yan_hf.data.tasks import (
    TextPair,
    classification,
    last_word,
    question_answering,
    space_with_answer,
    split_sentences,
)
from yan_hf.data.tokenization import MASK_MARKER


sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

from curriculum import as_masked_answer, as_masked_text, thinned


MASK = MASK_MARKER
TOPICS = ("World", "Sports", "Business", "Sci/Tech")
SENTIMENTS = ("negative", "positive")


# Free text: words matter more than places. On SST-2, after 1,000 steps of the auto-encoder 85 % of the training rows
# were right with this scale, 82 % with the default of 1.
TEXT_CONFIG = {"embedding_scale": 0.2, "detach_length_head": False}
# Few rows, read more than once: on SST-2's validation rows 79.4 % were right with this dropout, 78.1 % without.
CLASSIFICATION_CONFIG = {**TEXT_CONFIG, "embedding_dropout": 0.3}


@dataclass(frozen=True)
class Task:
    """A data set as source and target texts, and the sizes that suit it."""

    hub_name: str
    pairs: Callable[[Iterable[dict[str, Any]]], list[TextPair]]
    vocab_size: int
    max_source_length: int
    max_new_tokens: int
    hidden_size: int = 64
    encoder_layers: int = 3
    flow_layers: int = 1
    autoencoder_steps: int = 1500
    flow_steps: int = 800
    train_file: str = "train"
    hub_config: str | None = None
    # Training examples by level of difficulty, from the rows, where a task has levels.
    draw: Callable[["Task", list[dict[str, Any]]], Callable[[np.random.Generator, int], TextPair]] | None = None
    num_levels: int = 1
    config: dict[str, Any] = field(default_factory=dict)
    metrics: tuple[str, ...] = ("exact_match",)
    # The auto-encoder's view of a row in the first stage.
    view: Callable[..., dict[str, list[int]]] = as_masked_answer


def _questions(rows: Iterable[dict[str, Any]]) -> list[TextPair]:
    return [question_answering(" ".join(row["context"]), row["question"], row["answer"]) for row in rows]


def _thinned(task: Task, rows: list[dict[str, Any]]) -> Callable[[np.random.Generator, int], TextPair]:
    """bAbI stories with up to `level` statements: those that the answer does not rest on can go."""

    def draw(rng: np.random.Generator, level: int) -> TextPair:
        count = int(rng.integers(1, level + 1))
        while True:
            row = rows[rng.integers(len(rows))]
            if len(row["support"]) <= count <= len(row["context"]):
                break
        return _questions([{**row, "context": thinned(row["context"], row["support"], count, rng)}])[0]

    return draw


def _labelled(names: tuple[str, ...]) -> Callable[[Iterable[dict[str, Any]]], list[TextPair]]:
    def pairs(rows: Iterable[dict[str, Any]]) -> list[TextPair]:
        found = [classification(row.get("text", row.get("sentence")).lower(), row["label"], names) for row in rows]
        # The mask is where the answer belongs: what the first stage predicts.
        return [TextPair(f"{MASK} {pair.source}", pair.target) for pair in found]

    return pairs


def _last_words(rows: Iterable[dict[str, Any]]) -> list[TextPair]:
    """The last word of every sentence of 4 to 20 words, with the sentence before it where that has at most 16."""
    pairs = []
    for row in rows:
        sentences = split_sentences(row["text"].replace("\n", " "))
        for before, sentence in zip(["", *sentences], sentences):
            if 4 <= len(sentence.split()) <= 20:
                masked, target = last_word(sentence)
                before = before if len(before.split()) <= 16 else ""
                pairs.append(space_with_answer(TextPair(f"{before} {masked}".strip(), target)))
    return pairs


def _masked_spans(rows: Iterable[dict[str, Any]]) -> list[TextPair]:
    """Sentences of 6 to 16 words with a span of 1 to 3 words masked, the same whenever they are made."""
    pairs = []
    for row in rows:
        for sentence in split_sentences(row["text"].replace("\n", " ")):
            words = sentence.split()
            if 6 <= len(words) <= 16:
                rng = np.random.default_rng(len(pairs))
                width = int(rng.integers(1, 4))
                start = int(rng.integers(0, len(words) - width + 1))
                masked = " ".join([*words[:start], MASK, *words[start + width :]])
                # The whole sentence is the target: only the source's space goes.
                pairs.append(TextPair(space_with_answer(TextPair(masked, "")).source, sentence))
    return pairs


def _asked(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The questions of a row, a paragraph's or its own, each with its `answer`."""
    return row.get("qas") or [{**row, "answer": row.get("answer") or row["answers"]["text"][0]}]


def _answer_sentences(rows: Iterable[dict[str, Any]]) -> list[TextPair]:
    """Questions with the sentence of the paragraph that holds the answer, where it is no longer than 40 words."""
    pairs = []
    for row in rows:
        sentences = split_sentences(row["context"].replace("\n", " "))
        for item in _asked(row):
            context = next((sentence for sentence in sentences if item["answer"] in sentence), None)
            if context is not None and len(context.split()) <= 40 and len(item["answer"].split()) <= 8:
                pairs.append(space_with_answer(question_answering(context, item["question"], item["answer"])))
    return pairs


def _paragraph_questions(rows: Iterable[dict[str, Any]]) -> list[TextPair]:
    """Questions with the paragraph that holds the answer, which has at most 8 words; in small letters."""
    pairs = []
    for row in rows:
        context = (row.get("context") or row["content"]).replace("\n", " ").lower()
        for item in _asked(row):
            answer = item["answer"].lower()
            if len(answer.split()) <= 8:
                pairs.append(space_with_answer(question_answering(context, item["question"].lower(), answer)))
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
        flow_layers=2,
        autoencoder_steps=9_000,
        flow_steps=5_000,
        draw=_thinned,
        num_levels=10,
    ),
    "sst2": Task(
        hub_name="stanfordnlp/sst2",
        pairs=_labelled(SENTIMENTS),
        vocab_size=8_000,
        max_source_length=48,
        max_new_tokens=8,
        train_file="train_phrases",
        config=CLASSIFICATION_CONFIG,
    ),
    "ag_news": Task(
        hub_name="fancyzhx/ag_news",
        pairs=_labelled(TOPICS),
        vocab_size=8_000,
        max_source_length=64,
        max_new_tokens=8,
        config=CLASSIFICATION_CONFIG,
    ),
    "last_word": Task(
        hub_name="roneneldan/TinyStories",
        pairs=_last_words,
        vocab_size=8_000,
        max_source_length=64,
        max_new_tokens=8,
        autoencoder_steps=6_000,
        flow_steps=3_000,
        config={**TEXT_CONFIG, "embedding_dropout": 0.1},
    ),
    "infilling": Task(
        hub_name="roneneldan/TinyStories",
        pairs=_masked_spans,
        vocab_size=8_000,
        max_source_length=48,
        max_new_tokens=40,
        autoencoder_steps=2_000,
        flow_steps=3_000,
        metrics=("exact_match", "f1", "rouge"),
        view=as_masked_text,
        config=TEXT_CONFIG,
    ),
    "squad": Task(
        hub_name="rajpurkar/squad",
        pairs=_answer_sentences,
        vocab_size=8_000,
        max_source_length=160,
        max_new_tokens=24,
        autoencoder_steps=2_000,
        flow_steps=1_000,
        metrics=("exact_match", "f1"),
        config=TEXT_CONFIG,
    ),
}
TASKS["squad_paragraph"] = replace(
    TASKS["squad"], pairs=_paragraph_questions, max_source_length=224, autoencoder_steps=1_000
)
TASKS["fairytaleqa"] = replace(TASKS["squad_paragraph"], hub_name="GEM/FairytaleQA")


def read_rows(task: Task, folder: Path | None, split: str) -> list[dict[str, Any]]:
    """The rows of a split, from local `.jsonl.gz` files or the Hub."""
    if folder is None:
        return list(load_dataset(task.hub_name, task.hub_config, split=split))
    name = task.train_file if split == "train" else split
    return [row for _, row in iterate_rows(folder / f"{name}.jsonl.gz")]


def tokenizer_of(task: Task, rows: list[dict[str, Any]]) -> PreTrainedTokenizerBase:
    """Byte pairs trained on the sources and targets of the training rows, masks left out."""
    texts = [f"{pair.source.replace(MASK, '')} {pair.target.strip()}" for pair in task.pairs(rows)]
    return train_tokenizer(texts, vocab_size=task.vocab_size, model_type="bpe")


def encoded_examples(task: Task, tokenizer: PreTrainedTokenizerBase, pairs: list[TextPair]) -> list[dict[str, Any]]:
    """Tokens of pairs, a dictionary for each."""
    encoded = encode_pairs(tokenizer, *zip(*pairs), max_source_length=task.max_source_length)
    return [dict(zip(encoded, row)) for row in zip(*encoded.values())]


def fitting_pairs(task: Task, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> list[TextPair]:
    """Pairs whose source keeps its mask when it is cut, and has room for the answer there; tells what it drops."""
    pairs = task.pairs(rows)
    kept = []
    for pair, example in zip(pairs, encoded_examples(task, tokenizer, pairs)):
        ids, labels = example["input_ids"], example["labels"]
        if tokenizer.mask_token_id in ids:
            start = ids.index(tokenizer.mask_token_id) if task.view is as_masked_answer else 0
            if start + len(labels) <= task.max_source_length:
                kept.append(pair)
    if len(kept) < len(pairs):
        print(f"left out: {len(pairs) - len(kept)} of {len(pairs)} pairs, over {task.max_source_length} tokens")
    return kept


def examples_of(
    task: Task, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]
) -> Callable[[np.random.Generator, int], TextPair]:
    """Draws training examples: by level where the task has levels, otherwise evenly."""
    if task.draw is not None:
        return task.draw(task, rows)
    pairs = fitting_pairs(task, tokenizer, rows)
    return lambda rng, level: pairs[rng.integers(len(pairs))]
