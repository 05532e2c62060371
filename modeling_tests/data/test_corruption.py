# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The restoration task: what is spoiled and what survives, errors that are fresh but repeat, and packed paragraphs."""

import re
from collections import Counter
from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from yan_hf import RestorationCorruption, TaskEncoder, YanDataCollator, pack_sentences, train_tokenizer
from yan_hf.data.corruption import _ERRORS, _NEIGHBOURS
from yan_hf.data.tasks import encode_split, split_sentences, whole_sentences


CLEAN = {"error_rate": 0, "strip_case": False, "strip_punctuation": False}
WORDS = ["Anna", "went", "home,", "quickly.", "(the", "well-known", "don't!", "a", "§", "straße"]
KEPT = ["3.5", "1,000", "10:30", "-5", "B2B", "½", "`Foo.Bar(x, y)`", "``a ` B``"]
TEXTS = [f"Row {row}: the Dog saw Mr. Smith, who said: “No!” It was late. Was it?" for row in range(40)]


def edits(word: str, wrong: str) -> set[str]:
    """The kinds of error that make one word of the other."""
    one_out = {wrong[:i] + wrong[i + 1 :] for i in range(len(wrong))}
    swapped = {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}
    near = {word[:i] + key + word[i + 1 :] for i, letter in enumerate(word) for key in _NEIGHBOURS[letter]}
    shorter = {word[:i] + word[i + 1 :] for i in range(len(word))}
    found = {"insertion": word in one_out, "deletion": wrong in shorter, "swap": wrong in swapped - {word}}
    return {name for name, is_it in (found | {"neighbour": wrong in near}).items() if is_it}


@settings(max_examples=200, deadline=None)
@given(st.text(), st.lists(st.sampled_from(WORDS + KEPT)), st.integers(0, 9))
def test_nothing_changes_with_all_off_and_numbers_and_code_never_do(text, words, seed):
    assert RestorationCorruption(**CLEAN)(text, seed) == text
    assert RestorationCorruption(1, clean_rate=1)(text, seed) == text
    spoiled = RestorationCorruption(1)(" ".join(words), seed, 3)
    kept = re.compile(r"(``?)[^`].*?\1|\S*\d\S*|½")
    wanted = [word if "`" in word else word.lower() for word in words if word in KEPT]
    assert [found.group() for found in kept.finditer(spoiled)] == wanted


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(WORDS + KEPT), min_size=1), st.integers(0, 9), st.integers(0, 9))
def test_errors_are_a_function_of_seed_epoch_and_text(words, seed, epoch):
    text, corruption = " ".join(words), RestorationCorruption(0.5)
    expected = corruption(text, seed, epoch)
    corruption("another text in between", seed, epoch)
    assert corruption(text, seed, epoch) == expected
    assert len({corruption("seven words that are long enough here", seed, e) for e in range(20)}) > 10


@pytest.mark.parametrize("kind", _ERRORS)
def test_each_kind_does_what_it_is_called(kind):
    corruption = RestorationCorruption(1, [kind])
    for epoch in range(50):
        wrong = corruption("garden", 0, epoch)
        assert wrong == "garden garden" if kind == "doubling" else kind in edits("garden", wrong)
    # A word that is too short for it gets another error, or stays.
    assert RestorationCorruption(1, ["deletion", "doubling"])("a") == "a a"
    assert RestorationCorruption(1, ["deletion"])("a 12 §") == "a 12 §"
    assert RestorationCorruption(1, ["neighbour"], strip_case=False)("A") in {"Q", "W", "S", "Z"}


def test_kinds_are_drawn_evenly_at_the_rate():
    words = ["garden"] * 20_000
    wrong = RestorationCorruption(0.2, ["insertion", "deletion", "neighbour"])(" ".join(words)).split()
    counts = Counter(min(edits("garden", word), default="right") for word in wrong)
    assert counts.pop("right") / len(words) == pytest.approx(0.8, abs=0.01)
    assert all(count / 4_000 == pytest.approx(1 / 3, abs=0.03) for count in counts.values()) and len(counts) == 3


@pytest.mark.parametrize(
    "text, stripped",
    [
        ("He's 3.5 m tall, she said.", "he's 3.5 m tall she said"),
        ("“Well-known” (dogs' names): a—b; c – d - e … f?!", "well-known dogs names a b c d e f"),
        ("It is -5, .5 or 3–5; e.g. at example.com!", "it is -5 .5 or 3–5 e.g at example.com"),
        ("See `X.Y` , `Z`.", "see `X.Y` `Z`"),
        ("a\n lone ` quote.", "a lone ` quote"),
        ("...", "..."),
    ],
)
def test_what_is_stripped(text, stripped):
    assert RestorationCorruption(0)(text) == stripped
    unmarked = RestorationCorruption(0, strip_case=False)(text)
    assert re.sub(r"`[^`]*`", "", unmarked).lower() == re.sub(r"`[^`]*`", "", stripped)
    assert RestorationCorruption(0, strip_punctuation=False)("Is It `So`?") == "is it `So`?"


@pytest.mark.parametrize(
    "options",
    [{"error_rate": 1.5}, {"error_rate": "0.1"}, {"clean_rate": -1}, {"errors": []}, {"errors": ["typo"]},
     {"errors": "swap"}, {"strip_case": "no"}, {"strip_punctuation": 1}],
)  # fmt: skip
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        RestorationCorruption(**options)


# The task


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=400, model_type="bpe")


@pytest.fixture(scope="module")
def examples(tokenizer):
    return encode_split(Dataset.from_dict({"text": TEXTS}), TaskEncoder("restoration", tokenizer))[0]


def batches(tokenizer, examples, epoch=0, num_workers=0, batch_size=7, **options):
    collator = YanDataCollator(tokenizer, corruption=RestorationCorruption(0.3), **options)
    collator.set_epoch(epoch)
    return list(DataLoader(list(examples), batch_size, collate_fn=collator, num_workers=num_workers))


def sources(tokenizer, batches):
    return [text for batch in batches for text in tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)]


def test_sources_are_fresh_every_epoch_and_the_same_in_any_worker_and_batch(tokenizer, examples):
    first = batches(tokenizer, examples, canvas_slack=0.5)
    for left, right in zip(first, batches(tokenizer, examples, num_workers=2, canvas_slack=0.5)):
        assert all(torch.equal(left[name], right[name]) for name in left)
    found = sources(tokenizer, first)
    assert found == [RestorationCorruption(0.3)(text) for text in TEXTS]
    assert found == sources(tokenizer, batches(tokenizer, examples, batch_size=40))
    assert found != sources(tokenizer, batches(tokenizer, examples, epoch=1))
    assert found != sources(tokenizer, batches(tokenizer, examples, seed=1))
    for batch, row in zip(batches(tokenizer, examples, batch_size=1), examples):
        assert batch["labels"].tolist() == [row["labels"]]
        assert batch["input_ids"].tolist() == [tokenizer(tokenizer.decode(batch["input_ids"][0][:-1]))["input_ids"]]
    assert max(batch["input_ids"].shape[1] for batch in batches(tokenizer, examples, max_length=9)) == 9


def test_rows_for_evaluation_have_the_errors_of_the_first_epoch(tokenizer):
    options = {"error_rate": 0.5, "errors": ["doubling"]}
    reader = TaskEncoder("restoration", tokenizer, corruption=options)
    rows, _ = encode_split(Dataset.from_dict({"text": TEXTS}), reader)
    collator = YanDataCollator(tokenizer, corruption=reader.corruption)
    collator.set_epoch(3)
    for collate in (YanDataCollator(tokenizer), collator.at_epoch(0)):
        assert sources(tokenizer, [collate(list(rows))]) == [RestorationCorruption(**options)(text) for text in TEXTS]
    assert tokenizer.batch_decode(list(rows["labels"]), skip_special_tokens=True) == TEXTS


def test_options_that_do_not_suit_are_named(tokenizer):
    with pytest.raises(ValueError, match="`corruption`.*restoration.*pairs"):
        TaskEncoder("pairs", tokenizer, corruption={})
    with pytest.raises(ValueError, match="`corruption`.*'rate'"):
        TaskEncoder("restoration", tokenizer, corruption={"rate": 1})
    with pytest.raises(ValueError, match="add_mask"):
        TaskEncoder("restoration", tokenizer, add_mask=True)
    with pytest.raises(ValueError, match="`corruption`.*span_infilling"):
        YanDataCollator(tokenizer, "span_infilling", corruption=RestorationCorruption())
    with pytest.raises(ValueError, match="Example 0 has no column `labels`"):
        YanDataCollator(tokenizer, corruption=RestorationCorruption())([{"input_ids": [5]}])


# Paragraphs


def test_sentences_are_whole():
    text = 'Dr. J. Smith (e.g. him) came. "Stop!" said Ann. He did\nA line without a stop\nlower case here'
    whole = [
        "Dr. J. Smith (e.g. him) came.",
        '"Stop!" said Ann.',
        "He did",
        "A line without a stop",
        "lower case here",
    ]
    assert whole_sentences(text) == whole and len(split_sentences(text)) > len(whole)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=12), st.integers(2, 60))
def test_paragraphs_are_full_of_whole_sentences(tokenizer, lengths, limit):
    sentences = [f"No{index}" + " dog saw" * length + "." for index, length in enumerate(lengths)]
    paragraphs = pack_sentences(tokenizer, " ".join(sentences), limit)

    def size(paragraph):
        return len(tokenizer(paragraph)["input_ids"])  # with the end token

    assert all(size(paragraph) <= limit for paragraph in paragraphs)
    short = [sentence for sentence in sentences if size(sentence) <= limit]
    assert [sentence for paragraph in paragraphs for sentence in split_sentences(paragraph)] == short
    # One more sentence would not have fitted, and no paragraph spans a sentence that was left out.
    for left, right in pairwise(paragraphs):
        follower = sentences.index(split_sentences(left)[-1]) + 1
        assert size(f"{left} {sentences[follower]}") > limit
        assert sentences[follower] not in short or right.startswith(sentences[follower])
    assert all(paragraph in " ".join(sentences) for paragraph in paragraphs)


def test_a_limit_without_room_is_refused(tokenizer):
    with pytest.raises(ValueError, match="`max_tokens`.*1"):
        pack_sentences(tokenizer, "One.", 1)
