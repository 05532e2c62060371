# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The scripts of README and documentation run as printed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from babi import simulate_many
from testing_utils import small_config
from transformers import AutoModelForSeq2SeqLM

from yan_hf import YanForConditionalGeneration, train_tokenizer


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path):
    """The checkpoints of the repository, what `make demo` leaves, untrained, and a file of questions."""
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    examples = simulate_many(60, (1, 2), seed=0)
    rows = [
        {"context": " ".join(example.context), "question": example.question, "answer": example.answer}
        for example in examples
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [f"{row['context']} {row['question']} Answer: {row['answer']}" for row in rows]
    tokenizer = train_tokenizer(texts * 5, vocab_size=350, model_type="bpe")
    model = YanForConditionalGeneration(small_config(vocab_size=len(tokenizer), max_position_embeddings=96))
    model.save_pretrained(tmp_path / "runs/demo/checkpoint")
    tokenizer.save_pretrained(tmp_path / "runs/demo/checkpoint")
    return tmp_path


def run(folder: Path, page: str, heading: str, most_lines: int) -> str:
    """What the first block of Python under a page's heading prints."""
    section = (ROOT / page).read_text(encoding="utf-8").split(f"\n## {heading}\n")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith("#")]) <= most_lines
    (folder / "script.py").write_text(code)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, "script.py"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


@pytest.mark.parametrize(
    "page, heading",
    [
        ("README.md", "Load and generate"),
        pytest.param("docs/quick_start.md", "Ask it", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_is_asked(folder, page, heading):
    printed = re.search(r"^\['.*'\]$", run(folder, page, heading, 12), re.MULTILINE).group()
    if page == "README.md":
        assert f"# {printed}\n" in (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "page, heading, most_lines",
    [
        pytest.param("README.md", "Fine-tune", 22, marks=pytest.mark.slow),
        pytest.param("docs/training.md", "Fine-tuning", 36, marks=pytest.mark.slow),
    ],
)
def test_fine_tuning(folder, page, heading, most_lines):
    """From a checkpoint and a file of questions to a new checkpoint; on the longer page with figures and an answer."""
    printed = run(folder, page, heading, most_lines)
    if page != "README.md":
        assert re.search(r"^\['.*'\]$", printed, re.MULTILINE) and "eval_exact_match" in printed
    before, after = (
        AutoModelForSeq2SeqLM.from_pretrained(folder / "runs" / name).state_dict()
        for name in ("demo/checkpoint", "mine/final")
    )
    assert any(not before[name].equal(value) for name, value in after.items())
