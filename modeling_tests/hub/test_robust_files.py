# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Saves into a folder that holds a checkpoint: killed, without room, at once with others; and damaged weights."""

import errno
import json
import logging
import os
import shutil
import signal
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from testing_utils import small_model
from transformers import AutoModelForSeq2SeqLM

from yan_hf import YanConfig, YanForConditionalGeneration
from yan_hf.saving import staged_save


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from reliability import (
    KINDS,
    concurrent_saves,
    killed_saves,
    load_version,
    save_version,
    seeded_rows,
    table,
    threads_sharing_a_model,
)


BOTH = "configuration and weights"
IN_TURN = "configuration and weights, one file and shards in turn"


def hidden_files(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_killed_ten_times_it_always_loads_one_version():
    result = killed_saves("weights in one file", 10)
    assert result["one version"] == 10 and result["versions_seen"] > 2


@pytest.mark.parametrize("step", range(5))
@pytest.mark.parametrize(("kind", "first"), [("weights in one file", 1), (BOTH, 1), (IN_TURN, 1), (IN_TURN, 2)])
def test_killed_among_its_renames_it_loads(tmp_path, kind, first, step):
    """Killed before each rename; only between configuration and weights are there parts of two versions."""
    save_version(small_model(), tmp_path, first, kind)
    left = step

    def replace(source, target, original=os.replace):
        nonlocal left
        final = Path(target).name in ("generation_config.json", "config.json", "model.safetensors")
        if (final or Path(target).name.endswith("index.json")) and (left := left - 1) < 0:
            raise KeyboardInterrupt
        original(source, target)

    with patch("yan_hf.saving.os.replace", replace):
        try:
            save_version(small_model(), tmp_path, first + 1, kind)
        except KeyboardInterrupt:
            assert step < 3
        else:
            assert step >= 3
    found = load_version(tmp_path, kind)
    if step == 2 and kind != "weights in one file" and first == 1:
        assert found is None
    else:
        assert found == (first if step < 3 else first + 1)
    save_version(small_model(), tmp_path, first + 2, kind)
    assert load_version(tmp_path, kind) == first + 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_savers_leave_one_version_and_do_not_fail(kind):
    result = concurrent_saves(kind, 3)
    assert result["failed_savers"] == 0 and result["at_the_end"] == "one version"
    if kind == "weights in one file":
        assert result["one version"] == result["loads"] > 0


def test_a_save_in_progress_survives_others(tmp_path):
    with staged_save(tmp_path) as stage:
        (stage / "mine.txt").write_text("mine")
        small_model().save_pretrained(tmp_path)
        assert stage.is_dir()
    assert (tmp_path / "mine.txt").read_text() == "mine" and not hidden_files(tmp_path)


def test_what_killed_saves_leave_is_removed(tmp_path):
    dead = tmp_path / ".saving-dead"
    dead.mkdir()
    (dead / "model.safetensors").write_bytes(b"half")
    small_model().save_pretrained(tmp_path)
    assert not hidden_files(tmp_path)


def test_a_configuration_alone_is_staged_too(tmp_path):
    YanConfig(vocab_size=50).save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with patch("json.dumps", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        YanConfig(vocab_size=60).save_pretrained(tmp_path)
    assert YanConfig.from_pretrained(tmp_path).vocab_size == 50
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "notes.txt"}


@pytest.mark.slow
def test_stale_weights_go_and_other_files_stay(tmp_path):
    """As many shards, fewer, one file and back: a loader gets what was saved last."""
    mine = ["notes.txt", "model_card.png", "model.onnx", "pytorch_model.bin", "adapter_model.safetensors"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    small_model().save_pretrained(tmp_path, variant="other")
    mine.append("model.other.safetensors")
    for version, size in enumerate(["60KB", "60KB", "200KB", "5MB", "60KB", "5MB"]):
        model = small_model()
        model.lm_head.weight.data.fill_(version)
        model.save_pretrained(tmp_path, max_shard_size=size)
        assert YanForConditionalGeneration.from_pretrained(tmp_path).lm_head.weight.eq(version).all()
        shards = len(list(tmp_path.glob("model-*")))
        assert shards == (0 if size == "5MB" else int(next(tmp_path.glob("model-*")).stem[-5:]))
        assert (tmp_path / "model.safetensors.index.json").exists() == (shards > 0)
    assert all((tmp_path / name).is_file() for name in mine)
    YanForConditionalGeneration.from_pretrained(tmp_path, variant="other")


def test_given_state_dict_and_other_processes(tmp_path):
    model = small_model()
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "a", state_dict=dict(state))
    assert not load_file(tmp_path / "a" / "model.safetensors")["lm_head.weight"].any()
    model.save_pretrained(tmp_path / "b", is_main_process=False)
    assert not list((tmp_path / "b").glob("*.safetensors"))


def rewrite_in_half_precision(folder):
    path = folder / "model.safetensors"
    save_file({name: value.half() for name, value in load_file(path).items()}, path, metadata={"format": "pt"})


def save_with_accelerate(folder):
    Accelerator().save_model(small_model(1), folder)


def copy_other_weights(folder):
    small_model(1).save_pretrained(folder / "other")
    shutil.copy(folder / "other" / "model.safetensors", folder)


@pytest.mark.parametrize("change", [rewrite_in_half_precision, save_with_accelerate, copy_other_weights])
def test_weights_that_other_tools_have_written_load(tmp_path, change):
    small_model().save_pretrained(tmp_path)
    # What earlier versions wrote beside the weights is ignored.
    (tmp_path / "checksums.json").write_text('{"sha256": {"model.safetensors": "0"}, "files": []}')
    change(tmp_path)
    loaded = YanForConditionalGeneration.from_pretrained(tmp_path)
    seed = 0 if change is rewrite_in_half_precision else 1
    torch.testing.assert_close(loaded.lm_head.weight, small_model(seed).lm_head.weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "60KB"}])
def test_cut_short_weights_are_named(tmp_path, options):
    small_model().save_pretrained(tmp_path / "model", **options)
    path = sorted(tmp_path.glob("model/*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match=f"{path}: damaged or cut short"):
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
    with pytest.raises(OSError, match=f"{path}: damaged or cut short"):
        YanForConditionalGeneration.from_pretrained(tmp_path, subfolder="model")


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("transformers.modeling_utils.safe_save_file", OSError(errno.ENOSPC, "No space left on device")),
        ("yan_hf.saving.tempfile.mkdtemp", PermissionError(errno.EACCES, "Permission denied")),
        ("yan_hf.saving.tempfile.mkdtemp", OSError(errno.EROFS, "Read-only file system")),
    ],
)
def test_what_cannot_be_written_leaves_the_old_version_and_says_so(tmp_path, place, error):
    save_version(small_model(), tmp_path, 1, BOTH)
    with (
        patch(place, side_effect=error),
        pytest.raises(type(error), match=f"Could not save in {tmp_path}.*untouched.*{error.strerror}") as found,
    ):
        save_version(small_model(), tmp_path, 2, BOTH)
    assert found.value.errno == error.errno
    assert load_version(tmp_path, BOTH) == 1 and not hidden_files(tmp_path)


def test_a_really_full_disk(tmp_path):
    """A limit on the size of files, which the system enforces."""
    resource = pytest.importorskip("resource")
    save_version(small_model(), tmp_path, 1, BOTH)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match="untouched.*too large"):
            save_version(small_model(), tmp_path, 2, BOTH)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert load_version(tmp_path, BOTH) == 1


def test_a_file_in_the_folders_place(tmp_path):
    (tmp_path / "model").write_text("x")
    for thing in (small_model(), small_model().config):
        with pytest.raises(NotADirectoryError, match="model is a file"):
            thing.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "x"


def test_a_loaded_model_can_be_saved_where_it_came_from(tmp_path):
    """Its weights are views of the file that is replaced."""
    small_model().save_pretrained(tmp_path)
    for _ in range(3):
        model = YanForConditionalGeneration.from_pretrained(tmp_path)
        model.save_pretrained(tmp_path)
        assert torch.equal(model.lm_head.weight, small_model().lm_head.weight)


@pytest.mark.parametrize("training", [False, True])
def test_threads_that_share_a_model_get_what_one_alone_gets(training):
    result = threads_sharing_a_model(training, rounds=4)
    assert result["calls"] == 32 and (result["training_steps"] > 0) == training
    assert {name: result[name] for name in result if name not in ("threads", "calls", "training_steps")} == {
        "different": 0, "training_steps_in_eval_mode": 0, "modules_left_in_another_mode": 0,
    }  # fmt: skip


def test_the_table_of_a_report():
    counts = {"threads": 8, "calls": 9, "different": 1, "training_steps": 0}
    report = {
        "killed_saves": {"x": {"kills": 2, "versions_seen": 1, "one version": 2}},
        "renames": {"x": {"save_ms": 30.0, "renames_ms": 0.1}},
        "concurrent_saves": {"x": {"loads": 3, "mixture": 3, "failed_savers": 0, "at_the_end": "one version"}},
        "threads": {"eval": counts},
        "seeds": {"float32": seeded_rows(torch.float32, models=1)},
    }
    lines = table(report).splitlines()
    assert len(lines) == 7 and all(line.count("|") == 4 for line in lines)
    assert "| 2 kills | one version: 2 |" in lines[2] and "16 have the same text" in lines[-1]


def test_fields_of_a_newer_version_are_listed(tmp_path, caplog):
    small_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "warp_factor": 9, "hyper": {"a": 1}}))
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").propagate = True
        loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert "hyper, warp_factor" in caplog.text
    assert loaded.config.warp_factor == 9
    caplog.clear()
    loaded.save_pretrained(tmp_path / "again")
    small_model().save_pretrained(tmp_path / "plain")
    with caplog.at_level(logging.WARNING):
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16, attn_implementation="eager")
    assert "does not know" not in caplog.text
