# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Checkpoint folders hold one whole version at every moment, and damaged weights are refused by name."""

import errno
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from testing_utils import small_model
from tqdm import tqdm
from transformers import AutoModelForSeq2SeqLM
from transformers.utils.logging import disable_progress_bar

from yan_hf import YanConfig, YanForConditionalGeneration
from yan_hf.checkpoint_files import CHECKSUMS_FILE, finish_save


def version_of(folder) -> int:
    """The version of a loaded checkpoint, which weights and configuration must agree on."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    weights = {
        float(parameter.detach().mean()) for parameter in (model.lm_head.weight, model.model.embed_tokens.weight)
    }
    assert weights == {model.config.version}
    return int(model.config.version)


def set_version(model, version: int):
    model.config.version = float(version)
    with torch.no_grad():
        model.lm_head.weight.fill_(version)
        model.model.embed_tokens.weight.fill_(version)


def save_for_ever(folder: str, first: int, sharded: bool):
    """Saves version after version, in one file and in shards, until killed."""
    # A lock of tqdm's is shared with the process that forks: killed with it, this one would take it along for ever.
    disable_progress_bar()
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(1)
    model = small_model()
    for version in range(first, 10**6):
        set_version(model, version)
        sizes = {"max_shard_size": "60KB"} if sharded and version % 2 else {}
        model.save_pretrained(folder, **sizes)


@pytest.mark.slow
def test_killed_fifty_times_it_always_loads_one_version(tmp_path):
    folder, draw = tmp_path / "model", random.Random(0)
    model = small_model()
    set_version(model, 0)
    model.save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    context = multiprocessing.get_context("fork")
    version, seen = 0, set()
    for attempt in range(50):
        process = context.Process(target=save_for_ever, args=(str(folder), version + 1, attempt % 2 == 1))
        process.start()
        time.sleep(draw.uniform(0.05, 0.4))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found = version_of(folder)
        assert found >= version
        version = found
        seen.add(version)
    assert len(seen) > 10  # the processes came as far as saving
    assert (folder / "notes.txt").read_text() == "mine"
    set_version(model, version + 1)
    model.save_pretrained(folder)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def interrupted_moves(folder, moved: int):
    """A save killed after it was complete, with so many files moved."""
    model = small_model()
    set_version(model, 1)
    model.save_pretrained(folder, max_shard_size="60KB")
    set_version(model, 2)
    count = 0
    original = os.replace

    def replace(source, target):
        nonlocal count
        if count == moved:
            raise KeyboardInterrupt
        count += 1
        original(source, target)

    with patch("yan_hf.checkpoint_files.os.replace", replace), pytest.raises(KeyboardInterrupt):
        model.save_pretrained(folder)


@pytest.mark.parametrize("moved", range(4))
def test_a_save_killed_among_its_moves_is_finished_by_the_next_load(tmp_path, moved):
    interrupted_moves(tmp_path, moved)
    assert version_of(tmp_path) == 2
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", CHECKSUMS_FILE,
    }  # fmt: skip


def test_a_configuration_alone_finishes_it_too(tmp_path):
    interrupted_moves(tmp_path, 1)
    assert YanConfig.from_pretrained(tmp_path).version == 2.0


def test_stale_shards_go_and_other_variants_stay(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path, variant="other")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    shards = len(list(tmp_path.glob("model-*")))
    assert shards > 3 and (tmp_path / "model.other.safetensors").is_file()
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert 1 < len(list(tmp_path.glob("model-*"))) < shards
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("model-*")) and not (tmp_path / "model.safetensors.index.json").exists()
    YanForConditionalGeneration.from_pretrained(tmp_path, variant="other")
    sums = json.loads((tmp_path / CHECKSUMS_FILE).read_text())["sha256"]
    assert set(sums) == {"model.safetensors", "model.other.safetensors"}


def test_given_state_dict_and_other_processes(tmp_path):
    model = small_model()
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "a", state_dict=dict(state))
    assert not load_file(tmp_path / "a" / "model.safetensors")["lm_head.weight"].any()
    model.save_pretrained(tmp_path / "b", is_main_process=False)
    assert not list((tmp_path / "b").glob("*.safetensors"))


@pytest.mark.parametrize("sums", [True, False])
def test_cut_short_weights_are_named(tmp_path, sums):
    small_model().save_pretrained(tmp_path)
    if not sums:
        (tmp_path / CHECKSUMS_FILE).unlink()
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match=r"model\.safetensors is damaged or cut short"):
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("place", [0.2, 0.7, 0.999])
def test_one_flipped_bit_is_named(tmp_path, place):
    small_model().save_pretrained(tmp_path, max_shard_size="60KB")
    path = sorted(tmp_path.glob("model-*.safetensors"))[1]
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + int(place * (len(data) - start))] ^= 4
    path.write_bytes(data)
    with pytest.raises(OSError, match=f"{path.name} is not the file that was saved.*{CHECKSUMS_FILE}"):
        YanForConditionalGeneration.from_pretrained(tmp_path)
    with patch.dict(os.environ, {"YAN_HF_SKIP_CHECKSUMS": "1"}):
        YanForConditionalGeneration.from_pretrained(tmp_path)


def test_weights_changed_on_purpose_load_without_their_checksums(tmp_path):
    small_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({name: value * 2 for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(OSError, match="on purpose, delete"):
        YanForConditionalGeneration.from_pretrained(tmp_path)
    (tmp_path / CHECKSUMS_FILE).unlink()
    YanForConditionalGeneration.from_pretrained(tmp_path)
    (tmp_path / CHECKSUMS_FILE).write_text("{")
    with pytest.raises(OSError, match=f"{CHECKSUMS_FILE} is damaged"):
        YanForConditionalGeneration.from_pretrained(tmp_path)


def test_full_disk_leaves_the_old_version_and_says_so(tmp_path):
    model = small_model()
    set_version(model, 1)
    model.save_pretrained(tmp_path)
    set_version(model, 2)
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        patch("transformers.modeling_utils.safe_save_file", side_effect=full),
        pytest.raises(OSError, match="no space left to save a checkpoint.*untouched") as error,
    ):
        model.save_pretrained(tmp_path)
    assert error.value.errno == errno.ENOSPC
    assert version_of(tmp_path) == 1 and not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_really_full_disk(tmp_path):
    """A limit on the size of files, which the system enforces."""
    resource = pytest.importorskip("resource")
    model = small_model()
    set_version(model, 1)
    model.save_pretrained(tmp_path)
    set_version(model, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises((OSError, Exception), match="(?i)untouched"):
            model.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert version_of(tmp_path) == 1


def test_a_file_in_the_folders_place(tmp_path):
    (tmp_path / "model").write_text("x")
    with pytest.raises((NotADirectoryError, FileExistsError, AssertionError)):
        small_model().save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "x"


def test_abandoned_halves_are_removed(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    dead = tmp_path / ".saving-999999999-abc"
    dead.mkdir()
    (dead / "model.safetensors").write_bytes(b"half")
    model.save_pretrained(tmp_path)
    assert not dead.exists()
    shutil.rmtree(tmp_path)
    finish_save(tmp_path)  # nothing there: nothing happens


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
