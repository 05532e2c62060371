# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Stands in for a file that Transformers' source distribution leaves out: ranks as processes on the CPU, over gloo."""

import functools
import os

import torch
import torch.distributed as dist


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_distributed_backend() -> str:
    return "gloo"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int):
    """Nothing to choose on the CPU."""


def _start_rank_processes(function, args: tuple, nprocs: int):
    """Runs `function(rank, *args)` in `nprocs` processes; raises if one of them does."""
    torch.multiprocessing.start_processes(function, args=args, nprocs=nprocs, start_method="forkserver")


def _run_rank(rank: int, function, args: tuple, world_size: int, port: int):
    os.environ.update(WORLD_SIZE=str(world_size), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    store = dist.TCPStore("localhost", port, world_size=None, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()


def run_distributed(world_size: int):
    """`run_distributed(2)(function)(*args)` runs `function(rank, *args)` in two ranks of one group."""

    def decorate(function):
        @functools.wraps(function)
        def run(*args):
            # The parent keeps the port for the whole test.
            store = dist.TCPStore("localhost", 0, world_size=None, is_master=True, wait_for_workers=False)
            _start_rank_processes(_run_rank, (function, args, world_size, store.port), world_size)

        return run

    return decorate
