# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Rows become examples of a task; bad data is named before training starts."""

import json

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from testing_utils import small_model

from yan_hf import TaskEncoder, YanForConditionalGeneration, prepare_tokenizer, train_tokenizer
from yan_hf.data.checks import check_vocabulary
from yan_hf.data.tasks import TextPair, encode_split, load_splits
from yan_hf.data.tokenization import MASK_MARKER


QUESTION = {"context": "Mary went to the kitchen.", "question": "Where is Mary?", "answer": "kitchen"}
STORY = "A cat sat. It saw a dog. The dog ran. The cat slept. All was well."
ROWS = {
    "question_answering": (QUESTION, "kitchen"),
    "classification": ({"text": "a fine film", "label": 1}, "1 good"),
    "last_word": ({"text": STORY}, "well"),
    "middle_sentence": ({"text": STORY}, STORY),
    "summarization": ({"document": "a long story", "summary": "a story"}, "a story"),
    "pairs": ({"source": "one", "target": "two"}, "two"),
    "restoration": ({"text": STORY}, STORY),
}


@pytest.fixture(scope="module")
def tokenizer():
    texts = [str(value) for row, _ in ROWS.values() for value in row.values()]
    return train_tokenizer(texts * 20, vocab_size=340, model_type="bpe")


def encoder(tokenizer, task, **options):
    names = {"label_names": ["bad", "good"]} if task == "classification" else {}
    return TaskEncoder(task, tokenizer, **{**names, **options})


@pytest.mark.parametrize("task", ROWS)
def test_targets_are_the_tasks(tokenizer, task):
    row, target = ROWS[task]
    examples, skipped = encode_split(Dataset.from_list([row, row]), encoder(tokenizer, task))
    assert len(examples) == 2 and skipped == 0 and set(examples.column_names) == {"input_ids", "labels"}
    assert tokenizer.decode(examples[0]["labels"], skip_special_tokens=True) == target
    assert examples[0]["labels"][-1] == tokenizer.eos_token_id
    masked = task in ("question_answering", "last_word", "middle_sentence")
    assert (tokenizer.mask_token_id in examples[0]["input_ids"]) == masked


def test_span_infilling_needs_the_text_only(tokenizer):
    examples, _ = encode_split(Dataset.from_list([{"text": STORY}]), encoder(tokenizer, "span_infilling"))
    assert examples.column_names == ["input_ids"]


def test_streams_give_the_same_examples(tokenizer):
    rows = Dataset.from_list([QUESTION] * 5)
    direct, _ = encode_split(rows, encoder(tokenizer, "question_answering"))
    stream, _ = encode_split(rows.to_iterable_dataset(), encoder(tokenizer, "question_answering"))
    assert list(stream) == list(direct)


def test_nested_and_published_question_formats(tokenizer):
    nested = {"context": QUESTION["context"], "qas": [{"question": "Where?", "answer": "kitchen"}] * 3}
    assert len(encode_split(Dataset.from_list([nested]), encoder(tokenizer, "question_answering"))[0]) == 3
    hub = {**QUESTION, "answers": {"text": ["kitchen"], "answer_start": [17]}}
    del hub["answer"]
    reader = encoder(tokenizer, "question_answering", columns={"answer": "answers"})
    assert tokenizer.decode(encode_split(Dataset.from_list([hub]), reader)[0][0]["labels"][:-1]) == "kitchen"


def test_class_names_come_from_the_data_or_are_asked_for(tokenizer):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    rows = Dataset.from_list([{"text": "fine", "label": 1}], features=features)
    reader = TaskEncoder("classification", tokenizer)
    assert tokenizer.decode(encode_split(rows, reader)[0][0]["labels"][:-1]) == "1 good"
    with pytest.raises(ValueError, match="label_names"):
        encode_split(Dataset.from_list([{"text": "fine", "label": 1}]), TaskEncoder("classification", tokenizer))
    named = encoder(tokenizer, "classification")
    assert tokenizer.decode(named.encode(named.pairs({"text": "fine", "label": "bad"})[0])["labels"][:-1]) == "0 bad"
    with pytest.raises(ValueError, match="so so"):
        named.pairs({"text": "fine", "label": "so so"})


@pytest.mark.parametrize("task", ROWS)
def test_missing_column_is_named(tokenizer, task):
    row = dict(ROWS[task][0])
    column = next(iter(row))
    row["other"] = row.pop(column)
    with pytest.raises(ValueError, match=f"the train split has no column `{column}`.*other"):
        encode_split(Dataset.from_list([row]), encoder(tokenizer, task), "the train split")


BAD = {
    "empty text": ("pairs", {"source": "one", "target": "  "}, "target"),
    "no text": ("pairs", {"source": "one", "target": None}, "target"),
    "empty source": ("pairs", {"source": "", "target": "two"}, "source"),
    "no word": ("last_word", {"text": "... 12"}, "word"),
    "short story": ("middle_sentence", {"text": "One. Two."}, "2 sentences"),
    "unknown class": ("classification", {"text": "fine", "label": 7}, "7"),
    "long target": ("pairs", {"source": "one", "target": "two " * 30}, "max_target_length=12"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_stop_or_are_counted_when_asked(tokenizer, case):
    task, row, message = BAD[case]
    good = {**ROWS[task][0]}
    limit = {} if task == "middle_sentence" else {"max_target_length": 12}
    rows = Dataset.from_list([good, row, good], features=Dataset.from_list([good]).features)
    with pytest.raises(ValueError, match=rf"Row 1: .*{message}.*skip_bad_rows"):
        encode_split(rows, encoder(tokenizer, task, **limit))
    reader = encoder(tokenizer, task, skip_bad_rows=True, **limit)
    examples, skipped = encode_split(rows, reader)
    assert len(examples) == 2 and skipped == 1
    with pytest.raises(ValueError, match="no row that can be used"):
        encode_split(rows.select([1]), encoder(tokenizer, task, skip_bad_rows=True, **limit))


def test_long_sources_lose_neither_question_nor_mask(tokenizer):
    long = {**QUESTION, "context": "Mary went to the kitchen. " * 40}
    reader = encoder(tokenizer, "question_answering", max_source_length=40)
    ids = reader.encode(reader.pairs(long)[0])["input_ids"]
    assert len(ids) == 40
    text = tokenizer.decode(ids)
    assert text.startswith("Mary went") and "Where is Mary? Answer:" in text and tokenizer.mask_token_id in ids
    reader = encoder(tokenizer, "last_word", max_source_length=20)
    ids = reader.encode(reader.pairs({"text": STORY * 10})[0])["input_ids"]
    assert len(ids) == 20 and tokenizer.mask_token_id in ids
    reader = encoder(tokenizer, "classification", max_source_length=20, add_mask=True)
    ids = reader.encode(reader.pairs({"text": "a fine film " * 40, "label": 0})[0])["input_ids"]
    assert len(ids) == 20 and ids[-2:] == [tokenizer.mask_token_id, tokenizer.eos_token_id]
    reader = encoder(tokenizer, "classification", max_source_length=20, add_mask=True, mask_first=True)
    (pair,) = reader.pairs({"text": "a fine film " * 40, "label": 0})
    ids = reader.encode(pair)["input_ids"]
    assert pair.source.startswith(f"{MASK_MARKER} a fine")
    assert len(ids) == 20 and [ids[0], ids[-1]] == [tokenizer.mask_token_id, tokenizer.eos_token_id]
    with pytest.raises(ValueError, match="add_mask"):
        encoder(tokenizer, "classification", mask_first=True)
    reader = encoder(tokenizer, "question_answering", max_source_length=5)
    with pytest.raises(ValueError, match="max_source_length"):
        reader.encode(reader.pairs(long)[0])


def test_space_before_the_mask_goes_to_the_target(tokenizer):
    plain, spaced = encoder(tokenizer, "last_word"), encoder(tokenizer, "last_word", space_in_target=True)
    row = {"text": "It saw a dog."}
    for reader, source, target in (
        (plain, f"It saw a {MASK_MARKER}.", "dog"),
        (spaced, f"It saw a{MASK_MARKER}.", " dog"),
    ):
        (pair,) = reader.pairs(row)
        assert pair == (source, target)
    # The same tokens as in the text itself, which is the sense of it.
    whole = tokenizer("It saw a dog", add_special_tokens=False)["input_ids"]
    labels = spaced.encode(spaced.pairs(row)[0])["labels"][:-1]
    assert whole[-len(labels) :] == labels
    # Without a space before the mask nothing changes.
    assert spaced.pairs({"text": "dog"}) == plain.pairs({"text": "dog"})


def test_unknown_task_and_column(tokenizer):
    with pytest.raises(ValueError, match="`task`.*'poetry'"):
        TaskEncoder("poetry", tokenizer)
    with pytest.raises(ValueError, match="no column `txt`"):
        TaskEncoder("last_word", tokenizer, columns={"txt": "body"})


def test_tokenizer_of_another_model_is_refused(tokenizer):
    small = small_model()
    with pytest.raises(ValueError, match=rf"{len(tokenizer)} tokens.*`vocab_size` is 60"):
        check_vocabulary(tokenizer, small)
    prepare_tokenizer(tokenizer, small)
    check_vocabulary(tokenizer, small)
    large = small_model(vocab_size=len(tokenizer) + 3)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id"):
        setattr(large.config, name, getattr(tokenizer, name))
    with pytest.raises(ValueError, match=rf"{len(tokenizer)} tokens.*`vocab_size` is {len(tokenizer) + 3}"):
        check_vocabulary(tokenizer, large)
    large.config.vocab_size = -(-len(tokenizer) // 64) * 64  # rounded up, as tables often are
    check_vocabulary(tokenizer, large)
    small.config.mask_token_id = 9
    with pytest.raises(ValueError, match="mask_token_id"):
        check_vocabulary(tokenizer, small)


def test_another_vocabulary_of_the_same_size_is_refused(tokenizer, tmp_path):
    model = small_model(vocab_size=len(tokenizer))
    prepare_tokenizer(tokenizer, model)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = YanForConditionalGeneration.from_pretrained(tmp_path)
    check_vocabulary(tokenizer, model)
    other = train_tokenizer(["Every zebra quivers, and jumping foxes vex wizards."] * 9, vocab_size=len(tokenizer))
    if len(other) < len(tokenizer):
        other.add_tokens([f"word{index}" for index in range(len(tokenizer) - len(other))])
    assert len(other) == len(tokenizer)
    with pytest.raises(ValueError, match="not the model's"):
        check_vocabulary(other, model)
    prepare_tokenizer(other, model)
    check_vocabulary(other, model)


def test_questions_of_several_sentences_stay_whole(tokenizer):
    question = "What is this? Tell me. Where did Mr. Smith go?"
    row = {**QUESTION, "context": "Mary went to the kitchen. " * 40, "question": question}
    reader = encoder(tokenizer, "question_answering", max_source_length=60)
    ids = reader({name: [value] for name, value in row.items()})["input_ids"][0]
    assert len(ids) == 60 and f"{question} Answer:" in tokenizer.decode(ids)


def test_a_mask_is_never_cut_off(tokenizer):
    reader = encoder(tokenizer, "pairs", max_source_length=30)
    with pytest.raises(ValueError, match="mask"):
        reader.encode(TextPair("a fine film " * 20 + f"{MASK_MARKER} " + "and so on " * 20, "end"))
    with pytest.raises(ValueError, match="stands for a mask"):
        encoder(tokenizer, "last_word").pairs({"text": f"The end is {MASK_MARKER}."})


def test_special_tokens_in_rows_are_text_unless_a_marker_names_the_mask(tokenizer):
    eos, mask = tokenizer.eos_token_id, tokenizer.mask_token_id
    spelled = "it </s> saw <mask> a dog"
    for task, (row, _) in ROWS.items():
        row = {name: f"{spelled} {value}" if isinstance(value, str) else value for name, value in row.items()}
        reader = encoder(tokenizer, task)
        for pair in reader.pairs(row):
            ids = reader.encode(pair)
            masks = 1 if task in ("question_answering", "last_word", "middle_sentence") else 0
            assert ids["labels"].count(eos) == ids["input_ids"].count(eos) == 1 and mask not in ids["labels"]
            assert ids["input_ids"].count(mask) == masks
            assert tokenizer.decode(ids["labels"][:-1]) == pair.target
    reader = encoder(tokenizer, "pairs", mask_marker="___")
    ids = reader.encode(*reader.pairs({"source": "a ___ <mask>", "target": "___"}))
    assert ids["input_ids"].count(mask) == 1 and mask not in ids["labels"]
    with pytest.raises(ValueError, match="mask_marker.*last_word"):
        encoder(tokenizer, "last_word", mask_marker="___")


def test_rows_that_a_cached_result_left_out_are_counted(tokenizer):
    rows = Dataset.from_list([{"source": "a", "target": "b"}, {"source": "", "target": "b"}] * 3)
    for _ in range(2):
        reader = encoder(tokenizer, "pairs", skip_bad_rows=True)
        assert len(rows.map(reader, batched=True, with_indices=True, remove_columns=rows.column_names)) == 3
        assert sum(reader.skipped.values()) == 3


def test_files_that_cannot_be_read_are_named(tmp_path):
    for name, text, message in (
        ("rows.txt", "a\n", "rows.txt is none of the files.*jsonl.*csv.*parquet"),
        ("broken.jsonl", '{"source": \n', "broken.jsonl cannot be read as json"),
        ("empty.jsonl", "", "empty.jsonl .*holds no rows"),
        ("empty.csv", "source,target\n", "empty.csv .*holds no rows"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            load_splits({"train": str(tmp_path / name)})
    (tmp_path / "a.jsonl").write_text('{"source": "a", "target": "b"}\n')
    (tmp_path / "b.csv").write_text("source,target\na,b\n")
    both = load_splits({"train": str(tmp_path / "a.jsonl"), "validation": str(tmp_path / "b.csv")})
    assert both["train"][0] == both["validation"][0]


def test_files_are_found_or_named(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(QUESTION) + "\n")
    assert load_splits({"train": str(path), "test": None})["train"][0] == QUESTION
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        load_splits({"train": str(tmp_path / "nowhere.jsonl")})
    for arguments in ({}, {"files": {"train": str(path)}, "dataset": "a/b"}):
        with pytest.raises(ValueError, match="one of the two"):
            load_splits(**arguments)


def test_parts_are_splits_or_slices_of_a_data_set(tmp_path):
    """The rows that choose a checkpoint need not be those that are reported."""
    for split, rows in {"train": range(10), "test": range(10, 13)}.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"number": row}) + "\n" for row in rows))
    parts = {"train": "train[:-3]", "validation": "train[-3:]", "test": "test", "extra": "dev"}
    found = load_splits(dataset=str(tmp_path), parts=parts)
    assert {name: rows["number"] for name, rows in found.items()} == {
        "train": list(range(7)),
        "validation": [7, 8, 9],
        "test": [10, 11, 12],
    }
    assert list(load_splits(dataset=str(tmp_path))) == ["train", "test"]
    with pytest.raises(ValueError, match="stream"):
        load_splits(dataset=str(tmp_path), parts=parts, streaming=True)


def test_only_the_first_sentences_of_a_story(tokenizer):
    reader = encoder(tokenizer, "middle_sentence", max_sentences=3)
    (pair,) = reader.pairs({"text": "One dog. Two dogs. Three dogs. Four dogs."})
    assert pair == (f"One dog. Two dogs. {MASK_MARKER}", "One dog. Two dogs. Three dogs.")
    reader = encoder(tokenizer, "last_word", max_sentences=1)
    assert reader.pairs({"text": "One dog. Two cats."}) == [(f"One {MASK_MARKER}.", "dog")]
    reader = encoder(tokenizer, "span_infilling", max_sentences=2)
    assert reader.pairs({"text": "One. Two. Three."})[0].source == "One. Two."
    with pytest.raises(ValueError, match="classification"):
        encoder(tokenizer, "classification", max_sentences=2)
    with pytest.raises(ValueError, match="at least 1"):
        encoder(tokenizer, "last_word", max_sentences=0)
