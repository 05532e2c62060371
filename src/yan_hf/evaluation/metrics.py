# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Metrics of generated texts, with the answer normalisation of SQuAD (Rajpurkar et al. 2016)."""

import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..sampling import token_f1


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _check_lists(predictions: Sequence[Any], references: Sequence[Any]):
    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            f"A metric needs as many predictions as references and at least one, but got {len(predictions)} and "
            f"{len(references)}."
        )


def _answers(reference: str | Sequence[str]) -> list[str]:
    answers = [reference] if isinstance(reference, str) else list(reference)
    if not answers:
        raise ValueError("A reference has no answer: give a text, or a list of at least one.")
    return answers


def exact_match(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> float:
    """
    Share of predictions that equal their reference, or one of several, after normalisation.

    Raises:
        ValueError: for lists of different lengths, or empty ones.
    """
    _check_lists(predictions, references)
    hits = 0
    for text, reference in zip(predictions, references):
        hits += normalize_answer(text) in {normalize_answer(answer) for answer in _answers(reference)}
    return hits / len(predictions)


def text_f1(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> float:
    """
    Mean F1 of the words of a prediction and its reference (the best of several), after normalisation.

    Raises:
        ValueError: for lists of different lengths, or empty ones.
    """
    _check_lists(predictions, references)
    total = 0.0
    for text, reference in zip(predictions, references):
        words = normalize_answer(text).split()
        total += max(token_f1(words, normalize_answer(answer).split()) for answer in _answers(reference))
    return total / len(predictions)


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """
    Mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L, with stemming, by the package `rouge-score`.

    Raises:
        ImportError: without that package.
        ValueError: for lists of different lengths, or empty ones.
    """
    _check_lists(predictions, references)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE needs the package `rouge-score`: pip install rouge-score") from error
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, use_stemmer=True)
    scores = [scorer.score(reference, text) for text, reference in zip(predictions, references)]
    return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in names}


METRICS: dict[str, Callable[..., float | dict[str, float]]] = {
    "exact_match": exact_match,
    "f1": text_f1,
    "rouge": rouge,
}


def score_texts(texts: Sequence[str], references: Sequence[str], metrics: Sequence[str]) -> dict[str, float]:
    """The figures of `metrics`, names of `METRICS`, by name; ROUGE gives three."""
    figures: dict[str, float] = {}
    for name in metrics:
        value = METRICS[name](texts, references)
        figures.update(value if isinstance(value, dict) else {name: value})
    return figures


def compute_metrics(
    tokenizer: PreTrainedTokenizerBase, metrics: Sequence[str] = ("exact_match", "f1")
) -> Callable[[Any], dict[str, float]]:
    """
    A function for `Seq2SeqTrainer(compute_metrics=...)` with `predict_with_generate=True`.

    Args:
        tokenizer: Decodes predictions and labels; special tokens are left out.
        metrics: Of `"exact_match"`, `"f1"` and `"rouge"`.

    Returns:
        A function of an `EvalPrediction` whose predictions and label ids are token ids, `(N, L)`, with -100 as
        padding.

    Raises:
        ValueError: for an unknown metric.
    """
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"There is no metric {name!r}; the metrics are {', '.join(METRICS)}.")

    def decode(ids: np.ndarray) -> list[str]:
        ids = np.where(ids < 0, tokenizer.pad_token_id, ids)
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    def compute(prediction: Any) -> dict[str, float]:
        ids = prediction.predictions
        ids = ids[0] if isinstance(ids, tuple) else ids
        if np.asarray(ids).ndim != 2:
            raise ValueError(
                f"`compute_metrics` needs generated token ids, (N, L), but the predictions have shape "
                f"{np.asarray(ids).shape}. Set `predict_with_generate=True` and use `Seq2SeqTrainer` or `YanTrainer`."
            )
        texts, references = decode(np.asarray(ids)), decode(np.asarray(prediction.label_ids))
        return score_texts(texts, references, metrics)

    return compute


__all__ = ["METRICS", "compute_metrics", "exact_match", "normalize_answer", "rouge", "score_texts", "text_f1"]
