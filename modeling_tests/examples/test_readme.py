# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The README's scripts run as printed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from babi import simulate_many
from testing_utils import small_config
from transformers import AutoModelForSeq2SeqLM

from yan_hf import YanForConditionalGeneration, train_tokenizer


README = Path(__file__).resolve().parents[2] / "README.md"


def script(heading: str) -> str:
    """The first block of Python under a heading."""
    section = README.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)


def test_fine_tuning_script_runs_as_printed(tmp_path):
    """From a checkpoint and a file of questions to a new checkpoint and an answer; about 30 lines."""
    code = script("Train")
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 32
    examples = simulate_many(60, (1, 2), seed=0)
    rows = [
        {"context": " ".join(example.context), "question": example.question, "answer": example.answer}
        for example in examples
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [f"{row['context']} {row['question']} Answer: {row['answer']}" for row in rows]
    tokenizer = train_tokenizer(texts * 5, vocab_size=350, model_type="bpe")
    checkpoint = tmp_path / "runs" / "demo" / "checkpoint"
    model = YanForConditionalGeneration(small_config(vocab_size=len(tokenizer), max_position_embeddings=96))
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    (tmp_path / "script.py").write_text(code)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert re.search(r"^\['.*'\]$", finished.stdout, re.MULTILINE)  # the answer
    assert "eval_exact_match" in finished.stdout
    before = model.state_dict()
    after = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "runs" / "mine" / "final").state_dict()
    assert any(not before[name].equal(value) for name, value in after.items())
