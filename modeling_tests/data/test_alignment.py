# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""How many target tokens each source token stands for."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from testing_utils import small_model

from yan_hf import RestorationCorruption, YanDataCollator, train_tokenizer
from yan_hf.data.alignment import align_tokens, fill_masks, match_tokens
from yan_hf.data.tasks import TaskEncoder
from yan_hf.data.tokenization import MASK_MARKER, encode_text


TEXTS = [
    "Mary went to the garden, and John stayed home.",
    'One day, the big red dog said: "I want to play!" Then he ran away.',
    "She saw a cat; it was black. Was it hers? Nobody knew it.",
]
WORDS = " ".join(TEXTS).split()


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def tokenizer(request):
    return train_tokenizer([*TEXTS, *map(str.lower, TEXTS)] * 3, vocab_size=400, model_type=request.param)


def both(tokenizer, source, target):
    (ids,), (labels,) = encode_text(tokenizer, [source]), encode_text(tokenizer, [target])
    return ids, labels


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=8), st.lists(st.sampled_from(WORDS), min_size=1, max_size=8)
)
def test_every_target_token_belongs_to_a_source_token(tokenizer, source, target):
    ids, labels = both(tokenizer, " ".join(source), " ".join(target))
    lengths = align_tokens(tokenizer, ids, labels)
    assert len(lengths) == len(ids) and sum(lengths) == len(labels) and min(lengths) >= 0


def test_equal_texts_are_aligned_token_by_token(tokenizer):
    for text in TEXTS:
        ids, labels = both(tokenizer, text, text)
        assert align_tokens(tokenizer, ids, labels) == [1] * len(ids)


def test_words_stand_for_the_words_that_they_become(tokenizer):
    """Case and marks come and go, words are misspelt and left out."""
    ids, labels = both(
        tokenizer, "one day the bgi red dog said i want to play", "One day, the big red dog said: play!"
    )
    lengths, rest, words = align_tokens(tokenizer, ids, labels), iter(labels), []
    for token, length in zip(ids, lengths):
        piece, text = tokenizer.decode([token]), tokenizer.decode([next(rest) for _ in range(length)])
        if piece.startswith(" ") or not words or token == tokenizer.eos_token_id:
            words.append(("", ""))
        words[-1] = (words[-1][0] + piece, words[-1][1] + text)
    found = {word.strip(): text.strip() for word, text in words}
    assert found["day"] == "day," and found["bgi"] == "big" and found["said"] == "said:"
    assert found["i"] == found["want"] == "" and found["play"] == "play!"


@pytest.mark.parametrize("is_spoilt", [False, True])
@pytest.mark.parametrize("before, behind", [(1, 6), (6, 0), (1, 1), (3, 2)])
def test_of_a_doubled_word_the_first_one_stays(tokenizer, before, behind, is_spoilt):
    """Wherever it stands in the text: which of the two it is must be known to be predicted."""
    left, right = (
        ["one", "two", "big", "red", "dog", "day"][:before],
        ["say", "play", "the", "red", "i", "two"][:behind],
    )
    spoilt = " ".join([*left[:-1], left[-1][::-1] if is_spoilt else left[-1], "want", "want", *right, "end"])
    ids, labels = both(tokenizer, spoilt, " ".join([*left, "want", *right, "end"]))
    lengths = align_tokens(tokenizer, ids, labels)
    (doubled,) = [list(token) for token in encode_text(tokenizer, [" want"], add_special_tokens=False)]
    size = len(doubled)
    (place,) = [i for i in range(len(ids) - 2 * size + 1) if ids[i : i + 2 * size] == 2 * doubled]
    assert lengths[place : place + 2 * size] == [1] * size + [0] * size
    assert sum(lengths) == len(labels)


def test_tokens_that_stay_stand_for_themselves():
    found = {
        # New ones in front, behind and between; another one; more and fewer of them; one that goes.
        ((1, 2, 3), (9, 1, 2, 3)): [2, 1, 1],
        ((1, 2, 3), (1, 2, 3, 9)): [1, 1, 2],
        ((1, 2, 3), (9, 1, 2, 3, 8)): [2, 1, 2],
        ((1, 2, 3), (1, 9, 2, 3)): [2, 1, 1],
        ((1, 2, 3), (9, 1, 7, 3, 8)): [2, 1, 2],
        ((1, 2, 3), (1, 7, 8, 3)): [1, 2, 1],
        ((1, 2, 3), (1, 3)): [1, 0, 1],
        ((1, 2, 3), (7, 8, 9, 6)): [2, 1, 1],
    }
    assert {pair: match_tokens(*pair) for pair in found} == found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*WORDS, None, None]), min_size=1, max_size=9), st.data())
def test_filled_masks_keep_the_tokens_of_the_source(tokenizer, words, data):
    fillings = [" ".join(data.draw(st.lists(st.sampled_from(WORDS), max_size=3))) for word in words if word is None]
    rest = iter(fillings)
    source = " ".join(MASK_MARKER if word is None else word for word in words)
    target = " ".join(next(rest) if word is None else word for word in words)
    (ids,) = encode_text(tokenizer, [source], MASK_MARKER)
    filled = fill_masks(tokenizer, ids, source, target)
    assert (filled is None) == (MASK_MARKER not in source)
    if filled:
        labels, lengths = filled
        assert tokenizer.decode(labels, skip_special_tokens=True) == target and sum(lengths) == len(labels)
        laid = iter(labels)
        for token, length in zip(ids, lengths):
            part = [next(laid) for _ in range(length)]
            assert token == tokenizer.mask_token_id or part == [token]


def test_a_target_of_another_kind_is_no_filling(tokenizer):
    source = f"She saw a {MASK_MARKER}."
    (ids,) = encode_text(tokenizer, [source], MASK_MARKER)
    assert fill_masks(tokenizer, ids, source, "cat") is None
    assert fill_masks(tokenizer, ids[:3], source, "She saw a cat.") is None  # its mask was cut away


def test_a_source_that_loses_one_of_its_masks_is_a_bad_row(tokenizer):
    rows = {
        "source": ["<mask> went to the garden and John <mask>."],
        "target": ["Mary went to the garden and John ran."],
    }
    size = {"max_source_length": 6, "mask_marker": "<mask>"}
    assert TaskEncoder("pairs", tokenizer, **size)(rows)["input_ids"]
    with pytest.raises(ValueError, match="a mask lies where it is cut"):
        TaskEncoder("pairs", tokenizer, align=True, **size)(rows)


def test_examples_and_batches_carry_the_lengths(tokenizer):
    encoder = TaskEncoder("pairs", tokenizer, align=True, mask_marker="<mask>")
    rows = {
        "source": ["she saw a cat it was black", "Mary went to the <mask>, and John <mask> home."],
        "target": ["She saw a cat; it was black.", "Mary went to the garden, and John stayed home."],
    }
    examples = encoder(rows)
    features = [dict(zip(examples, row)) for row in zip(*examples.values())]
    for side in ("right", "left"):
        tokenizer.padding_side = side
        batch = YanDataCollator(tokenizer)(features)
        assert batch["token_lengths"].shape == batch["input_ids"].shape
        assert batch["token_lengths"].sum(-1).tolist() == [len(row["labels"]) for row in features]
        assert not batch["token_lengths"][batch["attention_mask"] == 0].any()
        size = {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
        assert small_model(start_state="fertility", **size)(**batch).loss.isfinite()
    tokenizer.padding_side = "right"
    with pytest.raises(ValueError, match="token_lengths"):
        YanDataCollator(tokenizer)([{**features[0], "token_lengths": [1]}])


def test_fresh_errors_get_fresh_lengths(tokenizer):
    encoder = TaskEncoder("restoration", tokenizer, align=True)
    examples = encoder({"text": TEXTS})
    features = [dict(zip(examples, row)) for row in zip(*examples.values())]
    corruption = {"corruption": RestorationCorruption(error_rate=0.5), "seed": 3}
    collator = YanDataCollator(tokenizer, **corruption)
    found = YanDataCollator(tokenizer, align=True, **corruption)
    unaligned = [{name: row[name] for name in ("input_ids", "labels")} for row in features]
    for epoch in range(3):
        collator.set_epoch(epoch)
        batch = collator(features)
        for ids, mask, lengths, labels in zip(
            *(batch[name] for name in ("input_ids", "attention_mask", "token_lengths", "labels"))
        ):
            expected = align_tokens(tokenizer, ids[mask == 1].tolist(), labels[labels != -100].tolist())
            assert lengths[mask == 1].tolist() == expected
        found.set_epoch(epoch)
        assert torch.equal(found(unaligned)["token_lengths"], batch["token_lengths"])
    with pytest.raises(ValueError, match="`align`"):
        YanDataCollator(tokenizer, align=True)
    for kind in (np.array, torch.tensor):  # formats of a data set
        made = collator([{name: kind(values) for name, values in row.items()} for row in features])
        assert torch.equal(made["token_lengths"], batch["token_lengths"])
