# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Span corruption, tokenized pairs and the collator: what they make, and that they repeat in any worker."""

import numpy as np
import pytest
import torch
from babi import simulate_many
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from yan_hf import YanDataCollator, corrupt_spans, encode_pairs, train_tokenizer
from yan_hf.data.tokenization import MASK_MARKER


TEXTS = [" ".join(example.context) for example in simulate_many(60, (1, 6), seed=0)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=400, model_type="bpe")


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 200), st.floats(0, 1), st.integers(1, 5), st.integers(0, 10_000))
def test_spans_are_collapsed_to_one_mask_each(length, rate, max_span, seed):
    ids = np.arange(10, 10 + length)
    result = corrupt_spans(ids, 4, np.random.default_rng(seed), rate, max_span)
    kept = result[result != 4]
    masked = np.setdiff1d(ids, kept)
    # Kept tokens keep their order, the right number is masked, and one mask stands for each run of them, not too long.
    assert (np.diff(kept) > 0).all()
    feasible = [m for m in range(1, length + 1) if -(-m // max_span) <= length - m + 1]
    wanted = min(max(1, round(rate * length)), max(1, length - 1))
    assert len(masked) == max(m for m in feasible if m <= wanted)
    runs = np.split(masked, np.flatnonzero(np.diff(masked) > 1) + 1)
    assert (result == 4).sum() == len(runs) and max(map(len, runs)) <= max_span
    position = {token: index for index, token in enumerate(result.tolist())}
    for left, right in zip(kept[:-1].tolist(), kept[1:].tolist()):
        assert position[right] - position[left] == (1 if right == left + 1 else 2)


def test_corruption_s_rate_and_span_lengths():
    rng = np.random.default_rng(0)
    ids, lengths = np.arange(10, 1010), []
    for _ in range(200):
        kept = corrupt_spans(ids, 4, rng)
        kept = np.concatenate([[9], kept[kept != 4], [1010]])
        gaps = np.diff(kept) - 1
        lengths += gaps[gaps > 0].tolist()
    assert sum(lengths) == 200 * 80
    shares = np.bincount(lengths, minlength=4)[1:4] / len(lengths)
    assert max(lengths) == 3 and np.abs(shares - 1 / 3).max() < 0.03


def test_corruption_covers_every_position():
    rng = np.random.default_rng(0)
    masked = np.zeros(20)
    for _ in range(2000):
        result = corrupt_spans(np.arange(10, 30), 4, rng, rate=0.1)
        masked[np.setdiff1d(np.arange(20), result[result != 4] - 10)] += 1
    assert masked.min() > 0.3 * masked.mean()


def test_pairs_are_padded_and_labelled(tokenizer):
    encoded = encode_pairs(
        tokenizer, ["Mary went", f"Daniel went to the garden. {MASK_MARKER}"], ["the garden", "Mary"]
    )
    assert all(labels[-1] == 2 and labels.count(2) == 1 for labels in encoded["labels"])
    features = [dict(zip(encoded, row)) for row in zip(*encoded.values())]
    batch = YanDataCollator(tokenizer)(features)
    assert {name: value.dtype for name, value in batch.items()} == dict.fromkeys(batch, torch.int64)
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    lengths = [len(ids) for ids in encoded["input_ids"]]
    assert batch["attention_mask"].sum(-1).tolist() == lengths
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()
    for row, labels in enumerate(encoded["labels"]):
        assert batch["labels"][row].tolist() == labels + [-100] * (batch["labels"].shape[1] - len(labels))


def test_sources_are_padded_on_the_tokenizer_s_side(tokenizer):
    features = [{"input_ids": [7, 8], "labels": [9, 2]}, {"input_ids": [7, 8, 9, 10], "labels": [9, 10, 2]}]
    tokenizer.padding_side = "left"
    try:
        batch = YanDataCollator(tokenizer, pad_to_multiple_of=8)(features)
    finally:
        tokenizer.padding_side = "right"
    assert batch["input_ids"][0].tolist() == [0] * 6 + [7, 8]
    assert batch["labels"][0].tolist() == [9, 2] + [-100] * 6


def test_span_infilling_rebuilds_the_text(tokenizer):
    features = [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS]
    batch = YanDataCollator(tokenizer, objective="span_infilling", mask_rate=0.2)(features)
    for row, feature in enumerate(features):
        labels = batch["labels"][row][batch["labels"][row] != -100].tolist()
        source = batch["input_ids"][row][batch["attention_mask"][row] == 1].tolist()
        assert labels == feature["input_ids"]
        assert source[-1] == 2 and 4 in source and len(source) <= len(labels)


def test_auto_encoding_has_the_target_s_length(tokenizer):
    features = [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS]
    batch = YanDataCollator(tokenizer, objective="auto_encoding", max_length=20)(features)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["labels"].shape[1] <= 20
    assert torch.equal(batch["attention_mask"] == 1, batch["labels"] != -100)
    assert (batch["input_ids"] == 4).any(dim=-1).all()
    assert (batch["labels"].max(dim=-1).values > 4).all()


def test_canvas_slack_adds_end_tokens_that_count(tokenizer):
    features = [{"input_ids": [7, 8, index], "labels": [9, 10, 2]} for index in range(5, 205)]
    batch = YanDataCollator(tokenizer, canvas_slack=0.5, max_slack=4)(features)
    lengths = (batch["labels"] != -100).sum(-1)
    longer = lengths > 3
    assert 0.35 < longer.float().mean() < 0.65 and set(lengths[longer].tolist()) == {4, 5, 6, 7}
    for labels, length in zip(batch["labels"], lengths):
        assert labels[:length].tolist() == [9, 10] + [2] * (int(length) - 2)


def test_canvas_slack_stays_within_the_longest_target(tokenizer):
    features = [{"input_ids": [7, index], "labels": [9, 10, 2]} for index in range(5, 105)]
    batch = YanDataCollator(tokenizer, canvas_slack=1.0, max_slack=9, max_target_length=5)(features)
    assert batch["labels"].shape == (100, 5)


def test_token_weights_are_padded_with_their_labels(tokenizer):
    features = [
        {"input_ids": [7], "labels": [9, 2], "token_weights": [5.0, 1.0]},
        {"input_ids": [7], "labels": [9, 9, 2], "token_weights": [1.0, 2.0, 0.5]},
    ]
    batch = YanDataCollator(tokenizer)(features)
    assert batch["token_weights"].tolist() == [[5.0, 1.0, 0.0], [1.0, 2.0, 0.5]]
    assert batch["token_weights"].dtype == torch.float32


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_batches_do_not_depend_on_the_number_of_workers(tokenizer, workers):
    features = [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS]

    def batches(num_workers, epoch=0):
        collator = YanDataCollator(tokenizer, objective="span_infilling", canvas_slack=0.3)
        collator.set_epoch(epoch)
        torch.manual_seed(num_workers)
        np.random.seed(num_workers)
        return list(DataLoader(features, batch_size=7, collate_fn=collator, num_workers=num_workers))

    expected = batches(0)
    for left, right in zip(batches(workers), expected):
        assert all(torch.equal(left[name], right[name]) for name in left)
    other = batches(0, epoch=1)
    assert any(not torch.equal(left["input_ids"], right["input_ids"]) for left, right in zip(other, expected))


def test_running_workers_see_the_epoch(tokenizer):
    features = [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS]
    collator = YanDataCollator(tokenizer, objective="span_infilling")
    loader = DataLoader(features, batch_size=60, collate_fn=collator, num_workers=1, persistent_workers=True)
    first = next(iter(loader))
    collator.set_epoch(1)
    second = next(iter(loader))
    collator.set_epoch(0)
    third = next(iter(loader))
    assert not torch.equal(first["input_ids"][:, :20], second["input_ids"][:, :20])
    assert torch.equal(first["input_ids"], third["input_ids"])


def test_bad_data_is_refused_with_the_row(tokenizer):
    collator = YanDataCollator(tokenizer)
    with pytest.raises(ValueError, match="Example 1 has no column `labels`"):
        collator([{"input_ids": [5], "labels": [2]}, {"input_ids": [5]}])
    with pytest.raises(ValueError, match="Example 0 has an empty `input_ids`"):
        collator([{"input_ids": [], "labels": [2]}])
    with pytest.raises(ValueError, match="objective"):
        YanDataCollator(tokenizer, objective="pair")
    with pytest.raises(ValueError, match="mask_rate"):
        YanDataCollator(tokenizer, mask_rate=1.5)
    with pytest.raises(ValueError, match="2 sources but 1 target"):
        encode_pairs(tokenizer, ["a", "b"], ["c"])
    with pytest.raises(ValueError, match="max_target_length=3"):
        encode_pairs(tokenizer, ["a"], ["Mary went to the garden"], max_target_length=3)
    cut = encode_pairs(tokenizer, ["a"], ["Mary went to the garden"], max_target_length=3, truncate_targets=True)
    assert len(cut["labels"][0]) == 3 and cut["labels"][0][-1] == 2
    assert len(encode_pairs(tokenizer, ["Mary went to the garden"], ["a"], max_source_length=4)["input_ids"][0]) == 4


def test_a_tokenizer_without_a_mask_is_refused(tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.mask_token = None
    with pytest.raises(ValueError, match="mask_token_id.*prepare_tokenizer"):
        YanDataCollator(bare)
