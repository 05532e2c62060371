# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The online service on Ray Serve: replicas that generate in dynamic batches, and a front that speaks HTTP."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from .cluster import start_ray
from .engine import Limits, Row, generate_rows, padded_tokens
from .front import Front


try:
    from ray import serve
except ImportError as error:
    raise ImportError(f"Ray Serve cannot be used ({error}). Install it: pip install yan-hf[serve]") from error


_BATCH_WAIT_SECONDS = 0.005  # for others to come, once a row is there and no batch is running


class Writer:
    """
    A replica: one model, which generates the rows that came while it was busy as a batch.

    Args:
        checkpoint: Its folder, or its name on the Hub.
        device: Where it runs.
        dtype: Of the weights; `"auto"` is the checkpoint's.
        max_batch_tokens: Source tokens of a batch with its padding, at most.
        num_threads: CPU threads of this replica.
    """

    def __init__(self, checkpoint: str, device: str, dtype: str, max_batch_tokens: int, num_threads: int):
        torch.set_num_threads(num_threads)
        self.model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint, dtype=dtype).eval().to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self._batches.set_max_batch_size(max_batch_tokens)
        self._idle = asyncio.Event()
        self._idle.set()

    async def write(self, row: Row) -> AsyncIterator[dict[str, Any]]:
        """A row's events, as [`Front`] wants them."""
        # Ray makes a batch of what comes within the wait below, also while another one runs: small ones would queue.
        await self._idle.wait()
        async for event in self._batches(row):
            if event is not None:
                yield event

    async def ready(self) -> bool:
        """Whether it answers at all."""
        return True

    @serve.batch(batch_wait_timeout_s=_BATCH_WAIT_SECONDS, batch_size_fn=padded_tokens)
    async def _batches(self, rows: list[Row]) -> AsyncIterator[list[dict[str, Any] | None]]:
        """One event for each row at a time, or `None`."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()

        def put_draft(index: int, text: str):
            loop.call_soon_threadsafe(queue.put_nowait, (index, text))

        def generate():
            try:
                return generate_rows(self.model, self.tokenizer, rows, put_draft)
            finally:
                loop.call_soon_threadsafe(queue.put_nowait, None)

        self._idle.clear()
        try:
            task = loop.run_in_executor(None, generate)
            while (draft := await queue.get()) is not None:
                events = [None] * len(rows)
                events[draft[0]] = {"draft": draft[1]}
                yield events
            results = await task
            yield [{"result": result, "batch_rows": len(rows)} for result in results]
        finally:
            self._idle.set()


class RayFront(Front):
    """[`Front`] before replicas of [`Writer`]."""

    def __init__(self, writer: Any, checkpoint: str, model_name: str, limits: Limits):
        stream, config = writer.options(stream=True), AutoConfig.from_pretrained(checkpoint)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)

        async def check_ready():
            return await writer.ready.remote()

        super().__init__(stream.write.remote, check_ready, model_name, config, tokenizer, limits)


def build_application(
    checkpoint: str,
    model_name: str | None = None,
    replicas: int = 1,
    device: str = "cpu",
    dtype: str = "auto",
    num_threads: int = 1,
    limits: Limits | None = None,
) -> Any:
    """
    The application that `ray.serve.run` takes.

    Args:
        checkpoint: Its folder, or its name on the Hub.
        model_name: What clients call the model; the checkpoint's last name by default.
        replicas: Copies of the model. On CUDA each has a device of its own.
        device: `"cpu"` or `"cuda"`.
        dtype: Of the weights.
        num_threads: CPU threads of each replica.
        limits: What is accepted.

    Raises:
        ValueError: for a batch that does not hold the longest source.
    """
    limits = limits or Limits()
    longest = AutoConfig.from_pretrained(checkpoint).max_position_embeddings
    if limits.max_batch_tokens < longest:
        raise ValueError(f"`max_batch_tokens` is {limits.max_batch_tokens}, but one source may have {longest}.")
    resources = {"num_cpus": num_threads, "num_gpus": int(device.startswith("cuda"))}
    rows = limits.max_queued_rows
    writer = serve.deployment(Writer).options(
        num_replicas=replicas, max_ongoing_requests=rows, ray_actor_options=resources
    )
    front = serve.deployment(RayFront).options(max_ongoing_requests=4 * rows, ray_actor_options={"num_cpus": 0})
    bound = writer.bind(checkpoint, device, dtype, limits.max_batch_tokens, num_threads)
    name = model_name or checkpoint.rstrip("/").rpartition("/")[2]
    return front.bind(bound, checkpoint, name, limits)


def run_service(application: Any, host: str, port: int, replicas: int, num_threads: int):
    """
    Starts the application, on the Ray cluster that the environment names or on one of this machine, and returns when
    it answers.
    """
    start_ray(replicas * num_threads)
    serve.start(http_options={"host": host, "port": port})
    serve.run(application, name="yan", route_prefix="/")
