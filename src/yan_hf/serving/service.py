# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The online service on Ray Serve: replicas that generate in dynamic batches, and a front that speaks HTTP."""

import asyncio
from collections.abc import AsyncIterator, Callable
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


_LOGGING = {"enable_access_log": False}  # lines for every request cost time; `/metrics` counts them
_BATCH_WAIT_SECONDS = 0.005  # for others to come, once a row is there and no batch is running


_Item = tuple[Row, Callable[[str], None] | None]  # what gets the drafts


class Writer:
    """
    A replica: one model, which generates the rows that came while it was busy as a batch.

    Args:
        checkpoint: Its folder, or its name on the Hub.
        device: Where it runs.
        dtype: Of the weights; `"auto"` is the checkpoint's.
        limits: What a batch may hold.
        num_threads: CPU threads of this replica.
    """

    def __init__(self, checkpoint: str, device: str, dtype: str, limits: Limits, num_threads: int):
        def size_of(items: list[_Item]) -> int:
            # Where the rows are what limits a batch, each counts as much as so many could.
            rows = len(items) * limits.max_batch_tokens // limits.max_batch_rows
            return max(padded_tokens([row for row, _ in items]), rows)

        torch.set_num_threads(num_threads)
        self.model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint, dtype=dtype).eval().to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        options = {"max_batch_size": limits.max_batch_tokens, "batch_size_fn": size_of}
        self._batch = serve.batch(self._generate_batch, batch_wait_timeout_s=_BATCH_WAIT_SECONDS, **options)
        self._idle = asyncio.Event()
        self._idle.set()

    async def generate(self, row: Row, put_draft: Callable[[str], None] | None = None) -> dict[str, Any]:
        """A row's `result`, and how many rows its batch had; `put_draft` gets the text after every solver step."""
        # Ray makes a batch of what comes within the wait below, also while another one runs: small ones would queue.
        await self._idle.wait()
        return await self._batch((row, put_draft))

    async def stream(self, row: Row) -> AsyncIterator[dict[str, Any]]:
        """A row's events, as [`Front`] wants them."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def put_draft(text: str):
            loop.call_soon_threadsafe(events.put_nowait, {"draft": text})

        task = asyncio.ensure_future(self.generate(row, put_draft))
        task.add_done_callback(lambda task: events.put_nowait(None))  # behind the drafts
        try:
            while (event := await events.get()) is not None:
                yield event
            yield await task
        finally:
            task.cancel()

    async def ready(self) -> bool:
        """Whether it answers at all."""
        return True

    async def _generate_batch(self, items: list[_Item]) -> list[dict[str, Any]]:
        rows, put_drafts = zip(*items)

        def generate() -> list[dict[str, Any]]:
            return generate_rows(self.model, self.tokenizer, rows, lambda index, text: put_drafts[index](text))

        self._idle.clear()
        try:
            results = await asyncio.get_running_loop().run_in_executor(None, generate)
        finally:
            self._idle.set()
        return [{"result": result, "batch_rows": len(rows)} for result in results]


class RayFront(Front):
    """[`Front`] before replicas of [`Writer`]."""

    def __init__(self, writer: Any, checkpoint: str, model_name: str, limits: Limits):
        config, tokenizer = AutoConfig.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
        streaming = writer.options(stream=True)

        async def write(row: Row) -> AsyncIterator[dict[str, Any]]:
            if row.with_drafts:
                async for event in streaming.stream.remote(row):
                    yield event
            else:  # one answer is several times cheaper than a stream of one
                response = writer.generate.remote(row)
                try:
                    yield await response
                except asyncio.CancelledError:
                    response.cancel()
                    raise

        async def check_ready():
            return await writer.ready.remote()

        super().__init__(write, check_ready, model_name, config, tokenizer, limits)


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
    bound = writer.bind(checkpoint, device, dtype, limits, num_threads)
    name = model_name or checkpoint.rstrip("/").rpartition("/")[2]
    return front.bind(bound, checkpoint, name, limits)


def run_service(application: Any, host: str, port: int, replicas: int, num_threads: int):
    """
    Starts the application, on the Ray cluster that the environment names or on one of this machine, and returns when
    it answers.
    """
    start_ray(replicas * num_threads)
    serve.start(http_options={"host": host, "port": port}, logging_config=_LOGGING)
    serve.run(application, name="yan", route_prefix="/", logging_config=_LOGGING)
