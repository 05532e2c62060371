# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The command for everything that needs a GPU, on a machine without one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).resolve().parents[2]


def run(*options):
    command = [sys.executable, "benchmarks/gpu.py", *map(str, options)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.slow
def test_without_a_gpu_it_says_what_it_would_do(tmp_path):
    found = run("--steps", "speed", "profile", "--output", tmp_path)
    assert found.returncode == 0 and found.stdout.count("\n") == 1
    assert "no CUDA device" in found.stdout and "speed, profile" in found.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_dry_run_goes_through_every_step_and_goes_on(tmp_path):
    first = run("--dry-run", "--output", tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    reports = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    steps = {"tests", "checkpoints", "speed", "batches", "profile", "attention", "offload", "scans", "training"}
    assert set(reports) == steps and all("commit" in report for report in reports.values())
    assert reports["tests"]["failures"] == reports["tests"]["errors"] == 0 < reports["tests"]["skipped"]
    assert {row["path"] for row in reports["profile"]["rows"]} == {"plain", "compiled"}
    assert all(row["kernels"] > 0 and row["busy_seconds"] > 0 for row in reports["profile"]["rows"])
    assert reports["training"]["curve"] and reports["training"]["tokens_per_second"] > 0
    (tmp_path / "attention.json").unlink()
    again = run("--dry-run", "--output", tmp_path)
    assert again.returncode == 0 and again.stdout.count("is there") == len(steps) - 1
    assert (tmp_path / "attention.json").is_file()


@pytest.mark.slow
def test_its_scripts_need_nothing_beyond_pytorch_and_transformers():
    absent = ["accelerate", "ctranslate2", "datasets", "matplotlib", "onnxruntime", "peft", "sentencepiece"]
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import gpu, mamba, offload, speed"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "benchmarks", capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_a_step_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    monkeypatch.setattr(gpu, "STEPS", {"training": lambda run: 1 / 0, "tests": lambda run: {"tests": 3}})
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", "--dry-run", "--steps", "training", "tests", "--output", str(tmp_path)]
    )
    assert gpu.main() == 1
    assert [file.name for file in tmp_path.iterdir()] == ["tests.json"]
