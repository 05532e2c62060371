# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Text builders of the tasks, and the bAbI simulator."""

import numpy as np
import pytest
from babi import ACTORS, MOVES, PLACES, simulate, simulate_many

from yan_hf.data import tasks
from yan_hf.data.tokenization import MASK_MARKER


def test_middle_sentence():
    assert tasks.middle_sentence("One. Two. Three. Four. Five.") == (
        f"One. Two. {MASK_MARKER} Four. Five.",
        "One. Two. Three. Four. Five.",
    )
    with pytest.raises(ValueError, match="2 sentences"):
        tasks.middle_sentence("One. Two.")


@pytest.mark.parametrize(
    "text, source, word",
    [
        ("He ran home.", "He ran <mask>.", "home"),
        ('She said "Stop!"', 'She said "<mask>!"', "Stop"),
        ("It was the dog's", "It was the <mask>", "dog's"),
        ("a well-known fact...", "a well-known <mask>...", "fact"),
        ("He is well-known!", "He is <mask>!", "well-known"),
        ("They counted to 42.", "They counted <mask> 42.", "to"),
        ("Ein schönes Café.", "Ein schönes <mask>.", "Café"),
        ("word", "<mask>", "word"),
    ],
)
def test_last_word(text, source, word):
    assert tasks.last_word(text) == (source.replace("<mask>", MASK_MARKER), word)


def test_last_word_needs_a_word():
    with pytest.raises(ValueError, match="no alphabetic word"):
        tasks.last_word("12, 34!")


def test_question_answering():
    assert tasks.question_answering("Ann sat.", "Who sat?", "Ann") == (
        f"Ann sat. Who sat? Answer: {MASK_MARKER}",
        "Ann",
    )


def test_classification():
    for label in (1, "positive"):
        assert tasks.classification("good film", label, ["negative", "positive"]) == ("good film", "1 positive")
    for label in (2, -1, True, 1.0, "so so"):
        with pytest.raises(ValueError, match="label"):
            tasks.classification("good film", label, ["negative", "positive"])


def test_split_sentences():
    text = 'Tim ran. "Stop!" said Ann. Did he?  Yes... no'
    assert tasks.split_sentences(text) == ["Tim ran.", '"Stop!"', "said Ann.", "Did he?", "Yes...", "no"]
    assert tasks.split_sentences("") == []


def test_simulated_answers_follow_from_the_story():
    for example in simulate_many(300, (1, 8), seed=0):
        asked = example.question.removeprefix("Where is ").removesuffix("?")
        moves = [(i, s) for i, s in enumerate(example.context) if s.startswith(asked)]
        assert moves[-1][0] == example.support
        assert moves[-1][1].endswith(f" the {example.answer}.") and example.answer in PLACES
        for statement in example.context:
            actor, _, rest = statement.partition(" ")
            assert actor in ACTORS and rest.split(" the ")[0] in MOVES


def test_simulation_depends_on_seed_and_row_alone():
    assert simulate_many(20, 5, seed=3) == simulate_many(40, 5, seed=3)[:20]
    assert simulate_many(20, 5, seed=3) != simulate_many(20, 5, seed=4)
    lengths = {len(example.context) for example in simulate_many(200, (2, 4), seed=0)}
    assert lengths == {2, 3, 4}
    with pytest.raises(ValueError, match="num_statements"):
        simulate(0, np.random.default_rng(0))
