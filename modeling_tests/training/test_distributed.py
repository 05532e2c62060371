# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Two processes (gloo) compute what one process computes on the joined batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_case import (
    ANEW,
    CASES,
    PRETRAINED,
    draws_by_row,
    joined_batch,
    loss_and_gradients,
    make_model,
    rows_of,
    train_sharded,
)

from yan_hf import YanForConditionalGeneration


HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What two processes found, and the folder into which they wrote."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = subprocess.run(
        [*command, str(HERE / "distributed_case.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return torch.load(folder / "results.pt"), folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one_on_the_joined_batch(results, case):
    """Loss, all of its terms and all gradients; MMD and load balance are no means over rows."""
    single = loss_and_gradients(*CASES[case], rank=0, size=1)
    double = results[0][case]
    assert double["terms"].keys() == single["terms"].keys()
    for name, value in single["terms"].items():
        torch.testing.assert_close(double["terms"][name], value, rtol=1e-5, atol=1e-5, msg=f"{case}: {name}")
    assert double["gradients"].keys() == single["gradients"].keys()
    for name, value in single["gradients"].items():
        torch.testing.assert_close(double["gradients"][name], value, rtol=1e-5, atol=1e-5, msg=f"{case}: {name}")


@pytest.mark.parametrize(
    ("name", "folder_name", "fields"),
    [
        ("sharded", "drawn", {}),
        ("sharded, winners", "winners", ANEW),
        ("sharded, pretrained", "pretrained", PRETRAINED),
    ],
)
def test_fsdp_trains_and_saves_what_one_process_does(results, name, folder_name, fields):
    """Three steps sharded by FSDP2 and saved load on one process, with the weights of three steps on one process.
    Sharded models also write what whole ones do, before the first step and after the last."""
    states, folder = results[0], results[1] / folder_name
    single, texts = train_sharded(folder, rank=0, size=1, **fields)
    state, sharded_texts = states[name]
    for when, ids in texts.items():
        assert torch.equal(sharded_texts[when], ids), when
    loaded = YanForConditionalGeneration.from_pretrained(folder / "sharded").state_dict()
    assert loaded.keys() == single.keys()
    for name, value in single.items():
        assert torch.equal(loaded[name], state[name]), name
        torch.testing.assert_close(loaded[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_a_local_loss_differs(results):
    """The comparison can fail: means of each process's own losses are not the joined batch's."""
    single = loss_and_gradients(*CASES["full"], rank=0, size=1)["terms"]
    halves = []
    for rank in range(2):
        with draws_by_row(rank, 2):
            halves.append(make_model()(**rows_of(joined_batch(), rank, 2)).loss_terms)
    for name in ("token", "load_balance", "mmd"):
        assert abs(float(halves[0][name] + halves[1][name]) / 2 - float(single[name])) > 1e-4, name
