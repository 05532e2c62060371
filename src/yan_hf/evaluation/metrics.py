# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Metrics of generated texts, with the answer normalisation of SQuAD (Rajpurkar et al. 2016)."""

import operator
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


def _check_lists(predictions: Sequence[str], references: Sequence[Any]):
    """Raises `ValueError` for lists of different lengths, or empty ones."""
    if len(predictions) != len(references) or not predictions:
        found = f"{len(predictions)} and {len(references)}"
        raise ValueError(f"A metric needs as many predictions as references and at least one, but got {found}.")


def _mean_of_best(
    score: Callable[[str, str], float], predictions: Sequence[str], references: Sequence[str | Sequence[str]]
) -> float:
    """The mean over predictions of the score with the reference, or the best of several; all normalised."""
    _check_lists(predictions, references)
    total = 0.0
    for text, reference in zip(predictions, references):
        answers = [reference] if isinstance(reference, str) else reference
        if not answers:
            raise ValueError("A reference has no answer: give a text, or a list of at least one.")
        total += max(score(normalize_answer(text), normalize_answer(answer)) for answer in answers)
    return total / len(predictions)


def exact_match(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> float:
    """
    Share of predictions that equal their reference, or one of several, after normalisation.

    Raises:
        ValueError: for lists of different lengths, or empty ones.
    """
    return _mean_of_best(operator.eq, predictions, references)


def text_f1(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> float:
    """As [`exact_match`], with the mean F1 of the words of a prediction and its reference (the best of several)."""
    return _mean_of_best(lambda text, answer: token_f1(text.split(), answer.split()), predictions, references)


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L, with stemming, by `rouge-score` (`ImportError` without it)."""
    _check_lists(predictions, references)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE needs the package `rouge-score`: pip install rouge-score") from error
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, use_stemmer=True)
    scores = [scorer.score(reference, text) for text, reference in zip(predictions, references)]
    return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in names}


METRICS = {"exact_match": exact_match, "f1": text_f1, "rouge": rouge}


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
    if unknown := [name for name in metrics if name not in METRICS]:
        raise ValueError(f"There is no metric {unknown[0]!r}; the metrics are {', '.join(METRICS)}.")

    def decode(ids: np.ndarray) -> list[str]:
        return tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids), skip_special_tokens=True)

    def compute(prediction: Any) -> dict[str, float]:
        ids = prediction.predictions
        ids = np.asarray(ids[0] if isinstance(ids, tuple) else ids)
        if ids.ndim != 2:
            remedy = "Set `predict_with_generate=True` and use `Seq2SeqTrainer` or `YanTrainer`."
            raise ValueError(f"`compute_metrics` needs generated token ids, (N, L), not shape {ids.shape}. {remedy}")
        return score_texts(decode(ids), decode(np.asarray(prediction.label_ids)), metrics)

    return compute
