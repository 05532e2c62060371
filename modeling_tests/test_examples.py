# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The examples run as documented: from the command line, on files, to a checkpoint that answers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from yan_hf.babi import simulate_many


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(script, *arguments):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_demo_trains_saves_reloads_and_answers(tmp_path):
    """A few seconds of training: every part runs, and the figures it prints are those it writes."""
    finished = run(
        "demo.py", "--output", tmp_path, "--seconds", 8, "--questions", 20, "--json", tmp_path / "result.json"
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["trunk_passes"] == 3 and 0 <= result["exact_match"] <= 1 and result["tokens_per_second"] > 0
    assert f"{result['exact_match']:.1%}" in finished.stdout and "->" in finished.stdout
    assert "it/s" in finished.stderr  # the progress bar


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("babi")
    for seed, (split, count) in enumerate({"train": 300, "validation": 20, "test": 20}.items()):
        with (folder / f"{split}.jsonl").open("w") as file:
            for example in simulate_many(count, (1, 3), seed=seed):
                row = {
                    "context": list(example.context),
                    "question": example.question,
                    "answer": example.answer,
                    "support": [example.support],
                }
                file.write(json.dumps(row) + "\n")
    return folder


@pytest.mark.slow
def test_train_reader_from_scratch_and_then_from_its_checkpoint(data, tmp_path):
    files = [f"--{split}={data / split}.jsonl" for split in ("train", "validation", "test")]
    first = run(
        "train_reader.py", *files, "--output", tmp_path / "a", "--reading_minutes", 0.05, "--writing_minutes", 0.05
    )
    assert first.returncode == 0, first.stderr[-2000:]
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    for name in ("test_predicted_length", "test_true_length"):
        assert len(result[name]["exact_match_by_sampling_seed"]) == 3
    checkpoint = tmp_path / "a" / "checkpoint"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint)
    model.generate(**tokenizer(["Where is Mary? <mask>"], return_tensors="pt"))
    second = run(
        "train_reader.py", *files, "--output", tmp_path / "b", "--model", checkpoint, "--writing_minutes", 0.05
    )
    assert second.returncode == 0, second.stderr[-2000:]
    assert (tmp_path / "b" / "checkpoint" / "model.safetensors").is_file()


def test_train_reader_names_what_is_missing(data, tmp_path):
    train, validation = f"--train={data / 'train'}.jsonl", f"--validation={data / 'validation'}.jsonl"
    for arguments, message in (
        ([], "--train"),
        ([train], "validation"),
        ([train, validation, "--question", "query"], "query"),
    ):
        finished = run("train_reader.py", *arguments, "--output", tmp_path)
        assert finished.returncode == 1
        assert finished.stderr.strip().splitlines()[-1].startswith("train_reader.py:") and message in finished.stderr
