# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The protocol of OpenAI's `/v1/completions`: a request's rows, and the answers made of their results."""

import secrets
import time
import uuid
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..data.sources import encode_source
from ..data.tokenization import MASK_MARKER
from .engine import Limits, Row, padded_tokens


class RequestError(Exception):
    """A request that cannot be answered: an HTTP status, and the error's body as OpenAI's clients read it."""

    def __init__(self, status: int, message: str, field: str | None = None, code: str | None = None):
        super().__init__(message)
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": field, "code": code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Strict):
    """What a stream tells."""

    include_usage: bool = False
    include_obfuscation: bool = False


class CompletionRequest(_Strict):
    """The fields of OpenAI's request, and YAN's own at the end. What YAN does not have must be neutral."""

    model: str | None = None
    prompt: str | list[str]
    suffix: str | None = None
    n: int = Field(1, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**62)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    stop: str | list[str] | None = None
    user: str | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    best_of: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    mask_marker: str | None = Field(None, min_length=1, max_length=32)
    num_inference_steps: int | None = Field(None, ge=1)
    num_candidates: int | None = Field(None, ge=1)
    num_length_candidates: int | None = Field(None, ge=1)
    keep_known: bool | None = None


def parse_request(
    body: bytes, model_name: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, limits: Limits
) -> tuple[CompletionRequest, list[Row]]:
    """
    A request and its rows: `n` for each prompt, in order.

    Args:
        body: JSON.
        model_name: What the service's model is called.
        config: The model's configuration.
        tokenizer: The model's tokenizer.
        limits: What is accepted.

    Raises:
        RequestError: with a status of the 400s and the field that is wrong.
    """
    if len(body) > limits.max_body_bytes:
        raise RequestError(413, f"The request has {len(body)} bytes, over {limits.max_body_bytes}.")
    try:
        request = CompletionRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = str(first["loc"][0]) if first["loc"] else None
        raise RequestError(400, f"`{field}`: {first['msg']}" if field else first["msg"], field) from error
    if request.model not in (None, model_name):
        message = f"There is no model {request.model!r} here, but {model_name!r}."
        raise RequestError(404, message, "model", "model_not_found")
    prompts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    highest = {"n": limits.max_n, "num_inference_steps": limits.max_steps}
    highest |= dict.fromkeys(("num_candidates", "num_length_candidates"), limits.max_candidates)
    for field, limit in highest.items():
        if (value := getattr(request, field)) is not None and value > limit:
            raise RequestError(400, f"`{field}` is {value}, but may be {limit} at most.", field)
    if not 1 <= len(prompts) <= limits.max_prompts:
        raise RequestError(
            400, f"`prompt` holds {len(prompts)} texts, but may hold 1 to {limits.max_prompts}.", "prompt"
        )
    if len(stops) > 4 or not all(stops):
        raise RequestError(400, "`stop` may hold up to 4 texts, none of them empty.", "stop")
    if request.suffix is not None and (request.mask_marker or config.start_state != "aligned"):
        reason = "stands for a mask itself: leave out `mask_marker`"
        if config.start_state != "aligned":
            reason = f"needs a model that fills masks, with start_state 'aligned', not {config.start_state!r}"
        raise RequestError(400, f"`suffix` {reason}.", "suffix")
    seed = secrets.randbelow(2**62) if request.seed is None else request.seed
    rows = []
    for prompt in prompts:
        ids, known = _encode(prompt, request, config, tokenizer)
        options = _options(request, config, sum(known))
        fields = {"options": options, "known": known, "stop": tuple(stops), "with_drafts": request.stream}
        if (cost := padded_tokens([Row(ids, seed, options)])) > limits.max_batch_tokens:
            message = f"Source tokens times candidates are {cost}, over {limits.max_batch_tokens}: ask for fewer."
            raise RequestError(400, message, "num_candidates")
        rows += [Row(ids, seed + copy, **fields) for copy in range(request.n)]
    return request, rows


def _encode(
    prompt: str, request: CompletionRequest, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[int, ...], tuple[int, int]]:
    """A prompt's tokens, and how many are known before and behind the filling that `suffix` asks for."""
    marker, source, name = request.mask_marker, prompt, "`prompt`"
    if request.suffix is not None:
        if MASK_MARKER in prompt + request.suffix:
            raise RequestError(
                400, f"`prompt` holds {MASK_MARKER!r}, which Unicode sets aside: leave it out.", "prompt"
            )
        marker, source, name = MASK_MARKER, prompt + MASK_MARKER + request.suffix, "`prompt` with `suffix`"
    try:
        ids = encode_source(tokenizer, source, config.max_position_embeddings, name, mask_marker=marker)
    except ValueError as error:
        code = "context_length_exceeded" if "tokens" in str(error) else None
        raise RequestError(400, str(error), "prompt", code) from error
    place = ids.index(tokenizer.mask_token_id) if request.suffix is not None else None
    return tuple(ids), (0, 0) if place is None else (place, len(ids) - place - 1)


def _options(request: CompletionRequest, config: PreTrainedConfig, num_known: int) -> tuple[tuple[str, Any], ...]:
    """
    The options of `generate`. Temperature 0 and 1 and `top_p` 1 are what clients send who mean none: tokens are then
    read off as the checkpoint says. Other values draw each token by itself.
    """
    options: dict[str, Any] = {"max_new_tokens": config.max_position_embeddings}
    if request.max_tokens is not None:
        options["max_new_tokens"] = min(request.max_tokens + num_known, config.max_position_embeddings)
    if request.temperature not in (0, 1):
        options |= {"do_sample": True, "temperature": request.temperature}
    if request.top_p < 1:
        options |= {"do_sample": True, "top_p": request.top_p}
    if request.suffix is not None:
        options["keep_known"] = True
    for name in ("num_inference_steps", "num_candidates", "num_length_candidates", "keep_known"):
        if (value := getattr(request, name)) is not None:
            options[name] = value
    return tuple(sorted(options.items()))


class Answer:
    """What is answered to one request."""

    def __init__(self, request: CompletionRequest, rows: list[Row], model_name: str):
        self.request, self.rows = request, rows
        now, key = int(time.time()), uuid.uuid4().hex
        self.head = {"id": f"cmpl-{key}", "object": "text_completion", "created": now, "model": model_name}

    def choice(self, index: int, result: dict[str, Any]) -> dict[str, Any]:
        """One row's result. Raises `RequestError` where it is an error."""
        if "error" in result:
            raise RequestError(400, result["error"])
        reason = result["finish_reason"]
        return {"index": index, "text": result["text"], "finish_reason": reason, "logprobs": None}

    def draft(self, index: int, text: str, step: int) -> dict[str, Any]:
        """An event with a row's draft, which the next one replaces: clients who add up texts see none."""
        choice = {"index": index, "text": "", "finish_reason": None, "logprobs": None, "draft": text, "step": step}
        return {**self.head, "choices": [choice]}

    def count(self, results: list[dict[str, Any]]) -> dict[str, int]:
        """Tokens of prompts, each once, and of texts."""
        prompts = sum(len(row.input_ids) for row in self.rows[:: self.request.n])
        texts = sum(result.get("num_tokens", 0) for result in results)
        return {"prompt_tokens": prompts, "completion_tokens": texts, "total_tokens": prompts + texts}

    def whole(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        """The answer without a stream."""
        choices = [self.choice(index, result) for index, result in enumerate(results)]
        return {**self.head, "choices": choices, "usage": self.count(results)}
