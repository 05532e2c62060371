# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Metrics of generated texts, with the answer normalisation of SQuAD (Rajpurkar et al. 2016)."""

import operator
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..data.corruption import WORD
from ..data.tasks import whole_sentences
from ..sampling import token_f1


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)

_MARKS = {
    "period": ".…",
    "comma": ",",
    "question": "?",
    "exclamation": "!",
    "semicolon": ";",
    "colon": ":",
    "quote": "\"'“”„‟‘’«»‹›",
    "dash": "-–—―",
    "bracket": "()[]{}",
}
_MARK_OF = {character: name for name, characters in _MARKS.items() for character in characters}


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


def _jiwer() -> Any:
    try:
        import jiwer
    except ImportError as error:
        raise ImportError("Metrics of words need the package `jiwer`: pip install jiwer") from error
    return jiwer


def _align(
    left: Iterable[Sequence[str]], right: Iterable[Sequence[str]]
) -> Iterator[list[tuple[int | None, int | None]]]:
    """
    For each two lists of words, the pairs of places of a least-edits alignment, in order; `None` where a word has no
    partner. Words without white space.
    """
    texts = [[" ".join(words) for words in rows] for rows in (left, right)]
    for chunks in _jiwer().process_words(*texts).alignments:
        pairs: list[tuple[int | None, int | None]] = []
        for chunk in chunks:
            a, b = range(chunk.ref_start_idx, chunk.ref_end_idx), range(chunk.hyp_start_idx, chunk.hyp_end_idx)
            pairs += zip(a or [None] * len(b), b or [None] * len(a))
        yield pairs


def _folded(words: Iterable[str]) -> list[str]:
    """Words without case and punctuation, as partners are found by; a mark that stands alone stays."""
    return ["".join(WORD.findall(word)).casefold() or word for word in words]


def word_error_rate(predictions: Sequence[str], references: Sequence[str]) -> float:
    """
    Edits (substitutions, deletions and insertions of words) over all texts, by the references' words, with case and
    punctuation, by `jiwer` (`ImportError` without it). Raises `ValueError` for references without a word.
    """
    _check_lists(predictions, references)
    if not any(text.split() for text in references):
        raise ValueError("The references have no word.")
    return _jiwer().wer([" ".join(text.split()) for text in references], [" ".join(t.split()) for t in predictions])


def _f1(hits: int, found: int, wanted: int) -> float:
    """1 where there is nothing to find and nothing was found."""
    return 2 * hits / (found + wanted) if found + wanted else 1.0


def _words_and_marks(text: str) -> tuple[list[str], list[set[str]]]:
    """The words, and the kinds of marks before the first one and after each."""
    words = list(WORD.finditer(text))
    starts, ends = [word.start() for word in words], [word.end() for word in words]
    gaps = [text[end:start] for end, start in zip([0, *ends], [*starts, len(text)])]
    return [word.group() for word in words], [{_MARK_OF[c] for c in gap if c in _MARK_OF} for gap in gaps]


def punctuation_f1(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """
    F1 of the punctuation marks, by the word that they follow, after an alignment of the words without case (`jiwer`).
    A kind of mark counts once after a word; marks inside words (3.5, don't) are part of them.

    Returns:
        `punctuation_f1`, over all marks, and `punctuation_f1_period`, `_comma`, `_question`, `_exclamation`,
        `_semicolon`, `_colon`, `_quote`, `_dash` and `_bracket`, those that occur in the references.
    """
    _check_lists(predictions, references)
    rows = [[_words_and_marks(text) for text in texts] for texts in (predictions, references)]
    pairs = _align(*([_folded(words) for words, _ in row] for row in rows))
    hits, found, wanted = Counter(), Counter(), Counter()
    for (_, ours), (_, theirs), aligned in zip(*rows, pairs):
        for marks, counter in ((ours, found), (theirs, wanted)):
            counter.update(mark for gap in marks for mark in gap)
        hits.update(ours[0] & theirs[0])
        hits.update(m for a, b in aligned if None not in (a, b) for m in ours[a + 1] & theirs[b + 1])
    figures = {f"punctuation_f1_{mark}": _f1(hits[mark], found[mark], wanted[mark]) for mark in _MARKS if wanted[mark]}
    return {"punctuation_f1": _f1(hits.total(), found.total(), wanted.total()), **figures}


def capitalization_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """F1 of the words with a capital letter, after an alignment of the words without case (`jiwer`)."""
    _check_lists(predictions, references)
    rows = [[WORD.findall(text) for text in texts] for texts in (predictions, references)]
    capital = [[[word != word.lower() for word in words] for words in row] for row in rows]
    pairs = _align(*([_folded(words) for words in row] for row in rows))
    hits = sum(
        ours[a] and theirs[b]
        for ours, theirs, aligned in zip(*capital, pairs)
        for a, b in aligned
        if None not in (a, b)
    )
    return _f1(hits, *(sum(map(sum, row)) for row in capital))


def sentence_accuracy(predictions: Sequence[str], references: Sequence[str]) -> float:
    """
    Share of the references' sentences (of [`whole_sentences`]) whose words all come back exactly and in place, with
    case and punctuation, after an alignment of the words (`jiwer`). A word too many counts against the sentence of
    the word before it.
    """
    _check_lists(predictions, references)
    words = [text.split() for text in predictions], [text.split() for text in references]
    right = total = 0
    for text, ours, theirs, aligned in zip(references, *words, _align(*words)):
        sizes = [len(sentence.split()) for sentence in whole_sentences(text)]
        if not sizes:
            continue  # what is written for no sentence is wrong in none
        sentence_of = np.repeat(np.arange(len(sizes)), sizes)
        wrong, last = set(), 0
        for a, b in aligned:
            last = last if b is None else b
            if a is None or b is None or ours[a] != theirs[b]:
                wrong.add(sentence_of[last])
        total += len(sizes)
        right += len(sizes) - len(wrong)
    return right / total if total else 1.0


def wrong_edit_rate(predictions: Sequence[str], references: Sequence[str], sources: Sequence[str]) -> float:
    """
    Of the words that the predictions change in, add to or take from the sources, case and punctuation counted, the
    share that is not as in the references, after alignments of the words without case (`jiwer`); 0 without a change.
    """
    _check_lists(predictions, references)
    _check_lists(predictions, sources)
    rows = [[text.split() for text in texts] for texts in (predictions, references, sources)]
    ours, theirs, given = ([_folded(words) for words in row] for row in rows)
    edits = wrong = 0
    alignments = zip(_align(given, ours), _align(ours, theirs), _align(given, theirs))
    for prediction, reference, source, (changes, check, truth) in zip(*rows, alignments):
        right = {a for a, b in check if None not in (a, b) and prediction[a] == reference[b]}
        dropped = {s for s, b in truth if b is None}
        for s, a in changes:
            if s is None or a is None or source[s] != prediction[a]:
                edits += 1
                wrong += s not in dropped if a is None else a not in right
    return wrong / edits if edits else 0.0


def unchanged_rate(predictions: Sequence[str], references: Sequence[str], sources: Sequence[str]) -> float:
    """Share of the sources that equal their reference, up to white space, that come back unchanged; else NaN."""
    _check_lists(predictions, references)
    _check_lists(predictions, sources)
    rows = zip(*([text.split() for text in texts] for texts in (predictions, references, sources)))
    kept = [prediction == source for prediction, reference, source in rows if reference == source]
    return sum(kept) / len(kept) if kept else float("nan")


METRICS = {
    "exact_match": exact_match,
    "f1": text_f1,
    "rouge": rouge,
    "word_error_rate": word_error_rate,
    "punctuation_f1": punctuation_f1,
    "capitalization_f1": capitalization_f1,
    "sentence_accuracy": sentence_accuracy,
    "wrong_edit_rate": wrong_edit_rate,
    "unchanged_rate": unchanged_rate,
}
NEED_SOURCES = ("wrong_edit_rate", "unchanged_rate")


def score_texts(
    texts: Sequence[str], references: Sequence[str], metrics: Sequence[str], sources: Sequence[str] | None = None
) -> dict[str, float]:
    """
    The figures of `metrics`, names of `METRICS`, by name; ROUGE and punctuation give several. Raises `ValueError` for
    a metric of `NEED_SOURCES` without sources.
    """
    figures: dict[str, float] = {}
    for name in metrics:
        if name in NEED_SOURCES and sources is None:
            remedy = 'Pass `sources`; a trainer does with `include_for_metrics=["inputs"]`.'
            raise ValueError(f"The metric {name!r} needs the sources. {remedy}")
        value = METRICS[name](texts, references, *([sources] if name in NEED_SOURCES else []))
        figures.update(value if isinstance(value, dict) else {name: value})
    return figures


def compute_metrics(
    tokenizer: PreTrainedTokenizerBase, metrics: Sequence[str] = ("exact_match", "f1")
) -> Callable[[Any], dict[str, float]]:
    """
    A function for `Seq2SeqTrainer(compute_metrics=...)` with `predict_with_generate=True`.

    Args:
        tokenizer: Decodes predictions and labels; special tokens are left out.
        metrics: Keys of `METRICS`. Those of `NEED_SOURCES` need training arguments with
            `include_for_metrics=["inputs"]`.

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
        if ids.ndim != 2 or ids.dtype.kind not in "iu":
            remedy = "Set `predict_with_generate=True` and use `Seq2SeqTrainer` or `YanTrainer`."
            raise ValueError(
                f"`compute_metrics` needs generated token ids, (N, L), not {ids.dtype} of shape {ids.shape}. {remedy}"
            )
        sources = None if prediction.inputs is None else decode(np.asarray(prediction.inputs))
        return score_texts(decode(ids), decode(np.asarray(prediction.label_ids)), metrics, sources)

    return compute
