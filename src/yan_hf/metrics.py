# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Exact match of generated texts, with the answer normalisation of SQuAD (Rajpurkar et al. 2016)."""

import re
import string
from collections.abc import Sequence


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """
    Share of predictions that equal their reference after normalisation.

    Raises:
        ValueError: for lists of different lengths, or empty ones.
    """
    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            f"Exact match needs as many predictions as references and at least one, but got {len(predictions)} and "
            f"{len(references)}."
        )
    hits = sum(normalize_answer(left) == normalize_answer(right) for left, right in zip(predictions, references))
    return hits / len(predictions)


__all__ = ["exact_match", "normalize_answer"]
