# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Metrics of restored text: each counts what it is called, over the whole corpus."""

import builtins
import math
from types import SimpleNamespace

import numpy as np
import pytest

from yan_hf import RestorationCorruption, compute_metrics, train_tokenizer
from yan_hf.evaluation import metrics
from yan_hf.evaluation.metrics import METRICS, NEED_SOURCES, score_texts


REFERENCE = 'Anna said, "Go home!" Was it 3.5 m? The well-known dog - a big one; it ran: (fast).'
WORDS = ("word_error_rate", "punctuation_f1", "capitalization_f1", "sentence_accuracy", *NEED_SOURCES)


def test_a_right_text_is_right_and_its_source_is_not():
    source = RestorationCorruption(0)(REFERENCE)
    right = score_texts([REFERENCE], [REFERENCE], WORDS, [source])
    assert right.pop("word_error_rate") == right.pop("wrong_edit_rate") == 0 and math.isnan(
        right.pop("unchanged_rate")
    )
    assert set(right.values()) == {1.0} and len(right) == 3 + len(metrics._MARKS)
    wrong = score_texts([source], [REFERENCE], WORDS, [source])
    assert wrong["punctuation_f1"] == wrong["capitalization_f1"] == wrong["sentence_accuracy"] == 0
    assert wrong["word_error_rate"] > 0.5 and wrong["wrong_edit_rate"] == 0


def test_word_error_rate_is_of_the_corpus():
    assert metrics.word_error_rate(["a b c d", "x"], ["a b c d", "y"]) == 1 / 5
    assert metrics.word_error_rate(["A b,  c c d"], ["a b c d"]) == 3 / 4
    with pytest.raises(ValueError, match="no word"):
        metrics.word_error_rate(["a"], [""])


@pytest.mark.parametrize(
    "text, reference, mark, figures",
    [
        # hits, found, wanted → F1 = 2 hits / (found + wanted)
        ("a, b c.", "a, b, c.", "comma", 2 / 3),
        ("a b, c", "a, b c", "comma", 0.0),
        ("one twoo, three", "one two, three", "comma", 1.0),  # a wrong word's mark is still after that word
        ("zero one two, three", "one two, three", "comma", 1.0),
        ("one three", "one two, three", "comma", 0.0),  # the mark of a word that is missing
        ("Yes...", "Yes.", "period", 1.0),
        ("3,5 or 3.5", "3.5 or 3.5.", "period", 0.0),  # marks inside numbers are no punctuation
        ("“a” b", '"a" b', "quote", 1.0),
        ("a — b", "a - b", "dash", 1.0),
        ("(a) b", "(a) b", "bracket", 1.0),
    ],
)
def test_punctuation_goes_by_the_word_before_it(text, reference, mark, figures):
    assert metrics.punctuation_f1([text], [reference])[f"punctuation_f1_{mark}"] == pytest.approx(figures)


def test_punctuation_is_summed_over_marks_and_texts():
    figures = metrics.punctuation_f1(["a, b.", "c? d"], ["a, b.", "c! d,"])
    assert figures["punctuation_f1"] == pytest.approx(2 * 2 / (3 + 4))
    assert figures["punctuation_f1_comma"] == pytest.approx(2 / 3) and figures["punctuation_f1_exclamation"] == 0
    assert "punctuation_f1_question" not in figures  # it does not occur in the references
    assert metrics.punctuation_f1(["a b"], ["a b"]) == {"punctuation_f1": 1.0}


def test_capitals_go_by_the_aligned_word():
    assert metrics.capitalization_f1(["the Anna went To rome"], ["Anna went to Rome"]) == pytest.approx(2 / 4)
    assert metrics.capitalization_f1(["mcdonald"], ["McDonald"]) == 0
    assert metrics.capitalization_f1(["a"], ["a"]) == 1


@pytest.mark.parametrize(
    "text, right",
    [
        ("One dog ran. Mr. Smith sat. It rained.", 3),
        ("One dog ran. Mr. Smith sad. It rained.", 2),
        ("One dog ran Mr. Smith sat. It rained.", 2),
        ("One dog ran. Mr. Smith sat there. It rained.", 2),
        ("So One dog ran. Mr. Smith sat. It rained.", 2),
        ("One dog. It rained.", 1),
        ("", 0),
    ],
)
def test_sentences_are_the_reference_s(text, right):
    reference = "One dog ran. Mr. Smith sat. It rained."
    assert metrics.sentence_accuracy([text], [reference]) == pytest.approx(right / 3)


@pytest.mark.parametrize(
    "text, rate",
    [
        ("the the cta sat", 0),  # no edit
        ("The cat sat.", 0),  # four right ones: a word taken away, and three changed
        ("The cat sat!", 1 / 4),
        ("the The cat sat.", 1 / 3),  # the doubled word is left, once wrong
        ("The cat sat. Down.", 1 / 4),
        ("the the cta", 1),  # a word taken away that the reference has
    ],
)
def test_edits_that_were_wrong(text, rate):
    found = metrics.wrong_edit_rate([text], ["The cat sat."], ["the the cta sat"])
    assert found == pytest.approx(rate)


def test_unchanged_counts_texts_that_need_no_change():
    texts = ["Good.", "Bad", "Other."]
    assert metrics.unchanged_rate(texts, ["Good.", "Bad.", "Fine."], ["Good.", "bad", "Fine."]) == 1 / 2


def test_a_trainer_s_inputs_are_the_sources():
    tokenizer = train_tokenizer(["a good text"] * 20, vocab_size=300, model_type="bpe")
    ids = np.array(tokenizer(["good text", "good text"])["input_ids"])
    prediction = SimpleNamespace(predictions=ids, label_ids=ids, inputs=ids)
    compute = compute_metrics(tokenizer, ["unchanged_rate"])
    assert compute(prediction) == {"unchanged_rate": 1.0}
    prediction.inputs = None
    with pytest.raises(ValueError, match="unchanged_rate.*sources.*include_for_metrics"):
        compute(prediction)


def test_texts_for_references_without_a_sentence_count_in_none():
    assert metrics.sentence_accuracy(["too much", "Fine."], ["", "Fine."]) == 1


def test_logits_are_no_token_ids():
    """Also those of a model with known tokens, which have two dimensions."""
    tokenizer = train_tokenizer(["a good text"] * 20, vocab_size=300, model_type="bpe")
    prediction = SimpleNamespace(predictions=np.zeros((7, 300), "f"), label_ids=np.zeros((2, 5), int), inputs=None)
    with pytest.raises(ValueError, match="predict_with_generate"):
        compute_metrics(tokenizer)(prediction)


@pytest.mark.parametrize("name", [name for name in WORDS if name != "unchanged_rate"])
def test_what_is_missing_is_named(name, monkeypatch):
    arguments = [["a"], ["a"], ["a"]][: 3 if name in NEED_SOURCES else 2]
    with pytest.raises(ValueError, match="as many"):
        METRICS[name](["a", "b"], *arguments[1:])
    real = builtins.__import__

    def without_jiwer(module, *rest, **options):
        if module == "jiwer":
            raise ImportError
        return real(module, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_jiwer)
    with pytest.raises(ImportError, match="pip install jiwer"):
        METRICS[name](*arguments)
