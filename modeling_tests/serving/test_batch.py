# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Batches by several workers: each row once, with the texts of `yan-hf generate`, also where they die or jobs stop."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from testing_utils import small_model

from yan_hf import train_tokenizer
from yan_hf.cli.main import main


WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def kill_a_worker(parts, killed: list[int]):
    """Ends one worker of this process's own cluster when the first part is there."""
    import psutil

    while not list(parts.glob("*.jsonl")):
        time.sleep(0.02)
    for process in psutil.Process().children(recursive=True):
        if "MapWorker" in " ".join(process.cmdline()) and not killed:
            killed.append(process.pid)
            process.kill()


def assert_same(found: str, expected: str):
    """The same rows, whose scores are rounded by the batch that they were in."""
    found, expected = ([json.loads(line) for line in text.splitlines()] for text in (found, expected))
    assert [row.pop("score") for row in found] == pytest.approx([row.pop("score") for row in expected], abs=1e-4)
    assert found == expected


@pytest.fixture
def job(tmp_path):
    """The start of a command line for 300 sources, and what it writes without several workers."""
    tokenizer = train_tokenizer([" ".join(WORDS)] * 20, vocab_size=300)
    small_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    sources = tmp_path / "sources.txt"
    sources.write_text("".join(" ".join(WORDS[: 1 + index % 4]) + "\n" for index in range(300)))
    command = ["generate", str(tmp_path / "model"), "--input", str(sources), "--num-return-sequences", "2", "--json"]
    assert main([*command, "--output", str(tmp_path / "local.jsonl")]) == 0
    return command, (tmp_path / "local.jsonl").read_text()


@pytest.mark.slow
def test_the_processes_of_accelerate_share_the_sources(job, tmp_path):
    command, expected = job
    output, parts = tmp_path / "shared.jsonl", tmp_path / "shared.jsonl.parts"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m"]
    command = [*launch, "yan_hf.cli.main", *command, "--output", str(output), "--engine", "accelerate"]
    command += ["--part-size", "10", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*more):
        return subprocess.run([*command, *more], env=environment, capture_output=True, text=True, timeout=300)

    # A run that was interrupted, of which the second process had made nothing.
    parts.mkdir()
    first = run()
    assert first.returncode != 0 and "go on with --resume" in first.stderr
    done = run("--resume", "--batch-size", "7")
    assert done.returncode == 0, done.stderr
    assert_same(output.read_text(), expected)
    assert not parts.exists()


@pytest.mark.slow
def test_a_job_with_a_killed_worker_and_one_that_was_interrupted(job, tmp_path, monkeypatch, capsys):
    pytest.importorskip("ray.data", reason="needs Ray: pip install -e .[serve]")
    import ray

    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "40")  # a busy machine starts Ray slowly
    from yan_hf.serving.cluster import start_ray

    common, expected = job
    output, killed = tmp_path / "ray.jsonl", []
    parts = tmp_path / "ray.jsonl.parts"
    common += ["--output", str(output), "--engine", "ray", "--part-size", "10"]
    try:
        start_ray(2)
    except Exception as error:  # its parts give one another a few seconds to start
        pytest.skip(f"Ray does not start on this machine now: {error}")
    killer = threading.Thread(target=kill_a_worker, args=(parts, killed), daemon=True)
    killer.start()
    try:
        assert main([*common, "--workers", "2", "--batch-size", "7"]) == 0
        killer.join()
        assert killed and not parts.exists()
        assert_same(output.read_text(), expected)

        from yan_hf.serving import batch

        def stop(files, output):
            for file in files[5:]:
                file.unlink()
            files[0].write_text("kept\n")
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(batch, "_join", stop)
            assert main([*common]) == 1
        assert main([*common]) == 1 and "--resume" in capsys.readouterr().err
        assert main([*common, "--resume", "--seed", "1"]) == 1 and "these sources" in capsys.readouterr().err
        assert main([*common, "--resume"]) == 0
        kept, others = output.read_text().split("\n", 1)
        assert kept == "kept"  # what was there was not made again
        assert_same(others, "".join(expected.splitlines(keepends=True)[20:]))
    finally:
        ray.shutdown()


def test_a_table_and_what_is_refused_before_anything_is_started(tmp_path, capsys):
    from datasets import Dataset

    from yan_hf.serving.batch import _join

    (tmp_path / "0.jsonl").write_text(json.dumps({"source": "one", "score": -1.0}) + "\n")
    (tmp_path / "1.jsonl").write_text(json.dumps({"source": "two", "score": -2.0}) + "\n")
    _join([tmp_path / "0.jsonl", tmp_path / "1.jsonl"], tmp_path / "rows.parquet")
    assert Dataset.from_parquet(str(tmp_path / "rows.parquet"))["source"][:] == ["one", "two"]
    with pytest.raises(SystemExit):
        main(["generate", str(tmp_path), "--engine", "ray"])
    assert "--output" in capsys.readouterr().err
