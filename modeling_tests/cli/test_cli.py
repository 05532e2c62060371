# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The command line: results, files, exit status and one-line errors."""

import gzip
import json

import pytest
from babi import simulate_many
from transformers import AutoTokenizer

from yan_hf.cli.main import main


@pytest.fixture
def stories(tmp_path):
    lines = [" ".join(example.context) for example in simulate_many(300, 4, seed=0)]
    text = tmp_path / "stories.txt"
    text.write_text("\n".join(lines), encoding="utf-8")
    rows = tmp_path / "stories.jsonl.gz"
    with gzip.open(rows, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": line, "parts": line.split(". ")}) + "\n" for line in lines)
    return text, rows


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_train_tokenizer_from_text(stories, tmp_path, capsys, model_type):
    output = tmp_path / "tokenizer"
    arguments = ["--output", str(output), "--vocab-size", "350", "--model-type", model_type, "--json"]
    assert main(["train-tokenizer", str(stories[0]), *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert result == {"output": str(output), "model_type": model_type, "vocab_size": len(tokenizer)}
    assert (
        tokenizer.decode(tokenizer("Mary  went – ça va?")["input_ids"], skip_special_tokens=True)
        == "Mary  went – ça va?"
    )


@pytest.mark.parametrize("column", ["text", "parts"])
def test_train_tokenizer_from_a_column(stories, tmp_path, column, capsys):
    output = tmp_path / "tokenizer"
    assert (
        main(["train-tokenizer", str(stories[1]), "--column", column, "--vocab-size", "350", "--output", str(output)])
        == 0
    )
    assert f"output: {output}" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(output).mask_token_id == 4


def test_train_tokenizer_from_a_data_set(stories, tmp_path):
    """A data set by name goes through `datasets.load_dataset`; a local folder is one, without a hub."""
    folder = tmp_path / "set"
    folder.mkdir()
    stories[1].rename(folder / "train.jsonl.gz")
    output = tmp_path / "tokenizer"
    arguments = ["--dataset", str(folder), "--column", "text", "--vocab-size", "350", "--output", str(output)]
    assert main(["train-tokenizer", *arguments]) == 0
    assert (output / "tokenizer.json").is_file()


def test_failures_are_one_line_and_status_1(stories, tmp_path, capsys):
    output = ["--output", str(tmp_path / "tokenizer")]
    for arguments, message in (
        ([str(tmp_path / "missing.txt")], "missing.txt"),
        ([str(stories[1])], "column"),
        ([str(stories[1]), "--column", "story"], "story"),
        ([str(stories[0]), "--vocab-size", "100"], "vocab_size"),
    ):
        assert main(["train-tokenizer", *arguments, *output]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("yan-hf train-tokenizer: ") and message in error
    assert not (tmp_path / "tokenizer").exists()


def test_broken_files_are_named(stories, tmp_path, capsys):
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(stories[1].read_bytes()[:200])
    null = tmp_path / "null.jsonl"
    null.write_text('{"text": "a"}\n{"text": null}\n')
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"text"\n')
    for path, message in ((cut, "end-of-stream"), (null, "line 2"), (bad, "line 2")):
        assert main(["train-tokenizer", str(path), "--column", "text", "--output", str(tmp_path / "x")]) == 1
        assert message in capsys.readouterr().err
    occupied = tmp_path / "file"
    occupied.write_text("mine")
    assert main(["train-tokenizer", str(stories[0]), "--vocab-size", "350", "--output", str(occupied)]) == 1
    assert "is a file" in capsys.readouterr().err and occupied.read_text() == "mine"


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "fly",
        "train-tokenizer",
        "train-tokenizer --output x",
        "train-tokenizer a --dataset b --output x",
        "train-tokenizer --dataset b --output x",
        "train-tokenizer a --output x --vocab-size 0",
    ],
)
def test_bad_arguments_exit_with_2(arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train-tokenizer", "--help"])
    assert stop.value.code == 0 and "--model-type" in capsys.readouterr().out
