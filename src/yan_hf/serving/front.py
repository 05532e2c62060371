# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The online service's front: HTTP in, rows out to whatever generates them."""

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from .engine import Limits, Row


try:
    import prometheus_client
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response, StreamingResponse

    from .completions import Answer, RequestError, parse_request
except ImportError as error:
    raise ImportError(
        f"The service cannot be used ({error}). Install what it needs: pip install yan-hf[serve]"
    ) from error


logger = logging.get_logger(__name__)


class Front:
    """
    Answers HTTP requests: `POST /v1/completions`, and `GET` of `/v1/models`, `/health`, `/ready` and `/metrics`.

    Args:
        write: Generates a row: yields `{"draft": text}` after every solver step, if asked for, and `{"result": ...}`.
        check_ready: Raises or takes long unless a row could be generated now.
        model_name: What the model is called.
        config: The model's configuration.
        tokenizer: The model's tokenizer.
        limits: What is accepted.
    """

    def __init__(
        self,
        write: Callable[[Row], AsyncIterator[dict[str, Any]]],
        check_ready: Callable[[], Awaitable[Any]],
        model_name: str,
        config: PreTrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
    ):
        self.write, self.check_ready, self.model_name = write, check_ready, model_name
        self.config, self.tokenizer, self.limits = config, tokenizer, limits
        self.queued_rows = 0
        self.registry = registry = prometheus_client.CollectorRegistry()
        self.statuses = prometheus_client.Counter("yan_requests", "Answers by status", ["status"], registry=registry)
        self.seconds = prometheus_client.Histogram("yan_request_seconds", "Time to the last byte", registry=registry)
        self.tokens = prometheus_client.Counter("yan_generated_tokens", "Tokens of texts", registry=registry)
        sizes = {"buckets": [2**power for power in range(10)], "registry": registry}
        self.batch_rows = prometheus_client.Histogram("yan_batch_rows", "Rows of a row's batch", **sizes)
        queued = prometheus_client.Gauge("yan_queued_rows", "Rows that wait or are being generated", registry=registry)
        queued.set_function(lambda: self.queued_rows)

    async def __call__(self, request: Request) -> Response:
        """The answer to one request, whatever happens."""
        path, began = request.url.path.rstrip("/"), time.perf_counter()
        try:
            method, handler = {
                "/v1/completions": ("POST", self._completions),
                "/v1/models": ("GET", self._models),
                "/health": ("GET", self._health),
                "/ready": ("GET", self._ready),
                "/metrics": ("GET", self._metrics),
            }.get(path, (None, None))
            if handler is None:
                raise RequestError(404, f"There is nothing at {path or '/'}: see /v1/completions.")
            if request.method != method:
                raise RequestError(405, f"{path} is asked by {method}, not {request.method}.")
            response = await handler(request)
        except RequestError as error:
            headers = {"Retry-After": "1"} if error.status in (429, 503) else None
            response = JSONResponse(error.body, error.status, headers)
        if path == "/v1/completions":
            self.statuses.labels(response.status_code).inc()
            if not isinstance(response, StreamingResponse):
                self.seconds.observe(time.perf_counter() - began)
        return response

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        try:
            await asyncio.wait_for(self.check_ready(), timeout=5)
        except Exception as error:
            raise RequestError(503, f"No replica answers: {type(error).__name__}.") from error
        return JSONResponse({"status": "ready"})

    async def _metrics(self, request: Request) -> Response:
        return Response(prometheus_client.generate_latest(self.registry), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        model = {"id": self.model_name, "object": "model", "created": 0, "owned_by": "yan_hf"}
        return JSONResponse({"object": "list", "data": [model]})

    async def _completions(self, request: Request) -> Response:
        body = b""
        with contextlib.suppress(ClientDisconnect):
            async for part in request.stream():
                body += part
                if len(body) > self.limits.max_body_bytes:
                    break  # refused below
        completion, rows = parse_request(body, self.model_name, self.config, self.tokenizer, self.limits)
        answer = Answer(completion, rows, self.model_name)
        if completion.stream:
            events = self._events(answer)
            first = await anext(events)  # takes the places in the queue, or refuses
            return StreamingResponse(_chain(first, events), media_type="text/event-stream")
        with self._places(len(rows)):
            tasks = [asyncio.ensure_future(self._result(row)) for row in rows]
            try:
                results = await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
        return JSONResponse(answer.whole(results))

    @contextlib.contextmanager
    def _places(self, count: int):
        """Places in the queue, which are free again at the end, also if the client has gone."""
        if self.queued_rows + count > self.limits.max_queued_rows:
            message = (
                f"The queue is full: {self.queued_rows} of {self.limits.max_queued_rows} rows wait. Try again later."
            )
            raise RequestError(429, message, code="queue_full")
        self.queued_rows += count
        try:
            yield
        finally:
            self.queued_rows -= count

    async def _result(self, row: Row, put: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
        """A row's result; `put` gets its drafts."""
        try:
            async for event in self.write(row):
                if "result" in event:
                    self.tokens.inc(event["result"].get("num_tokens", 0))
                    self.batch_rows.observe(event["batch_rows"])
                    return event["result"]
                if put is not None:
                    put(event)
        except Exception as error:
            logger.warning(f"A row failed: {type(error).__name__}: {error}")
            raise RequestError(503, "The replica that generated this failed: try again.") from error
        raise RequestError(503, "The replica that generated this gave no result: try again.")

    async def _events(self, answer: Answer) -> AsyncIterator[str]:
        """Server-sent events of a stream: drafts as they come, each row's text when it is finished, and `[DONE]`."""
        queue: asyncio.Queue = asyncio.Queue()
        results: list[dict[str, Any]] = []

        async def follow(index: int, row: Row):
            steps = Counter()

            def put(event: dict[str, Any]):
                steps["draft"] += 1
                queue.put_nowait(answer.draft(index, event["draft"], steps["draft"]))

            try:
                result = await self._result(row, put)
                results.append(result)
                queue.put_nowait({**answer.head, "choices": [answer.choice(index, result)]})
            except RequestError as error:
                queue.put_nowait(error.body)
            queue.put_nowait(None)

        with self._places(len(answer.rows)), self.seconds.time():
            yield ": accepted\n\n"
            tasks = [asyncio.ensure_future(follow(index, row)) for index, row in enumerate(answer.rows)]
            try:
                running = len(tasks)
                while running:
                    event = await queue.get()
                    running -= event is None
                    if event is not None:
                        yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
                options = answer.request.stream_options
                if options is not None and options.include_usage:
                    usage = {**answer.head, "choices": [], "usage": answer.count(results)}
                    yield f"data: {json.dumps(usage)}\n\n"
                yield "data: [DONE]\n\n"
            finally:
                for task in tasks:
                    task.cancel()


async def _chain(first: str, others: AsyncIterator[str]) -> AsyncIterator[str]:
    async with contextlib.aclosing(others):
        yield first
        async for event in others:
            yield event
