# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The compiled fast path of `generate`: static shapes, so that a GPU replays one graph.

A program is compiled for each combination of batch bucket, source bucket, target bucket and options, the first time
that it occurs. Lengths are rounded up to `length_buckets`, the batch to a power of two; what is added is masked or
thrown away, so the results are those of the plain path. On CUDA the default mode (`"reduce-overhead"`) records each
program as a CUDA graph: one replay where the target's lengths are given, and two where they are predicted, since the
predicted length chooses the second's bucket.
"""

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.generation import CompileConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from ..lengths import EncodedSource, SourceInputs
from ..sampling import (
    DecodedTokens,
    SampleOutput,
    SamplingOptions,
    encode,
    encode_and_sample,
    sample,
)
from .cpu_kernels import is_available, keep_experts
from .int8 import METHOD


logger = logging.get_logger(__name__)

# Programs of one model; each costs a compilation, and on CUDA a memory pool. A call beyond that runs uncompiled.
MAX_PROGRAMS = 64


def length_buckets(longest: int) -> list[int]:
    """Lengths that programs are compiled for: 16, 24, 32, 48, 64, 96, ... up to `longest`: beyond 16 less than a third
    of a bucket is padding."""
    buckets = [part << power for power in range(longest.bit_length()) for part in (16, 24)]
    return [*(bucket for bucket in buckets if bucket < longest), longest]


@lru_cache(maxsize=32)
def _compiled(function: Callable, fullgraph: bool, backend: Any, mode: str | None, options: tuple | None) -> Callable:
    choice = {"options": dict(options)} if options else {"mode": mode}
    return torch.compile(function, fullgraph=fullgraph, dynamic=False, backend=backend, **choice)


def _pad(values: Tensor | None, *sizes: int) -> Tensor | None:
    """Zeros at the end of the leading dimensions, up to `sizes`; contiguous: other strides are another program."""
    if values is None or tuple(values.shape[: len(sizes)]) == sizes:
        return None if values is None else values.contiguous()
    padded = values.new_zeros(*sizes, *values.shape[len(sizes) :])
    padded[tuple(slice(size) for size in values.shape[: len(sizes)])] = values
    return padded


def _pad_rows(values: Tensor | None, size: int) -> Tensor | None:
    """The last row again and again, up to `size` rows: added rows have to be valid ones."""
    if values is None or len(values) == size:
        return values
    return values[torch.arange(size, device=values.device).clamp(max=len(values) - 1)]


class CompiledSampler:
    """
    Runs the two halves of `generate` as compiled programs.

    Args:
        model: A [`YanForConditionalGeneration`]; `ValueError` where it is spread over devices, or quantised by another
            method than [`YanInt8Config`]'s.
        compile_config: Transformers' compiler settings; by default inductor, on CUDA with CUDA graphs. Shapes are
            static whatever it says.
    """

    def __init__(self, model: PreTrainedModel, compile_config: CompileConfig | dict | None = None):
        placed = set((getattr(model, "hf_device_map", None) or {}).values())
        if len(placed) > 1:
            raise ValueError(
                f"`compile=True` needs the whole model on one device, but `device_map` spread it over {placed}."
            )
        method = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
        if method is not None and method.quant_method != METHOD:
            raise ValueError(
                f"`compile=True` compiles float models and those in {METHOD}: leave it out for {method.quant_method}."
            )
        if compile_config is None:
            mode = "reduce-overhead" if model.device.type == "cuda" else "default"
            # Without the kernels a quantised mixture's loop over its experts breaks the graph.
            compile_config = {"fullgraph": method is None or is_available(), "mode": mode}
        experts = model.model.flow.experts
        while hasattr(experts, "base_layer"):  # adapters stand around it
            experts = experts.base_layer
        keep_experts(experts)
        self.model, self.programs = model, model.compiled_programs
        self.compile_config = CompileConfig(**compile_config) if isinstance(compile_config, dict) else compile_config
        self.buckets = length_buckets(model.config.max_position_embeddings)

    def encode(self, source: SourceInputs) -> EncodedSource:
        """As [`sampling.encode`]; everything has the length and the batch of the source."""
        batch_size, length = source.given.shape[:2]
        latents, length_logits, by_token = self._run(encode, *self._pad_source(source))
        by_token = None if by_token is None else by_token[:batch_size, :length].clone()
        return EncodedSource(latents[:batch_size, :length].clone(), length_logits[:batch_size].clone(), by_token)

    def sample(
        self,
        options: SamplingOptions,
        source: SourceInputs,
        encoded: Tensor | None,
        *start: Tensor | None,
        callback_on_step_end: Callable[[Tensor], None] | None = None,
    ) -> SampleOutput:
        """
        As [`sampling.sample`]; both halves are one program where the source has not been encoded yet. What it returns
        holds until the next call: on CUDA that writes into the same memory.
        """
        if encoded is None:
            program, inputs = encode_and_sample, self._pad_source(source)
        else:
            _, source_mask, encoded = self._pad_source(SourceInputs(None, source.attention_mask, encoded))
            program, inputs = sample, (encoded, source_mask)
        target = self._pad_target(len(inputs[1]) * options.repeats, *start)
        return self._cut(self._run(program, options, *inputs, *target), *start[1].shape[:2])

    def _pad_source(self, source: SourceInputs) -> tuple[Tensor | None, Tensor, Tensor | None]:
        batch_size, length = source.given.shape[:2]
        if source.attention_mask is None:
            mask = torch.ones(batch_size, length, dtype=torch.long, device=source.given.device)
            source = source._replace(attention_mask=mask)
        width, rows = self._width(length), 1 << (batch_size - 1).bit_length()
        return tuple(_pad_rows(_pad(values, batch_size, width), rows) for values in source)

    def _pad_target(self, num_rows: int, lengths: Tensor, *values: Tensor | None) -> list:
        batch_size, length = values[0].shape[:2]
        padded = (_pad(value, batch_size, self._width(length)) for value in values)
        return [_pad_rows(value, num_rows) for value in (lengths, *padded)]

    def _width(self, length: int) -> int:
        return next((bucket for bucket in self.buckets if bucket >= length), length)

    def _run(self, function: Callable, *arguments: Any) -> Any:
        key = (function.__name__, *(tuple(value.shape) if isinstance(value, Tensor) else value for value in arguments))
        if key not in self.programs and len(self.programs) >= MAX_PROGRAMS:
            logger.warning_once(
                f"`generate(compile=True)` has met more than {MAX_PROGRAMS} combinations of batch size, lengths and "
                "options; this and further new ones run uncompiled. Batch rows of similar lengths, keep the options."
            )
            return function(self.model, *arguments)
        self.programs.add(key)
        config = self.compile_config
        options = tuple(config.options.items()) if config.options else None
        program = _compiled(function, config.fullgraph, config.backend, config.mode, options)
        if self.model.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        # All programs are versions of one function in the compiler's eyes, which allows eight by default.
        with torch._dynamo.config.patch(recompile_limit=10_000, accumulated_recompile_limit=10_000):
            return program(self.model, *arguments)

    @staticmethod
    def _cut(sampled: SampleOutput, num_rows: int, width: int) -> SampleOutput:
        """The rows and positions that were asked for, still in memory that the next replay overwrites."""

        def cut(values: Tensor | None, *sizes: int | None) -> Tensor | None:
            return None if values is None else values[tuple(map(slice, sizes))]

        tokens, area = sampled.tokens, (num_rows, width)
        if tokens is not None:
            log_probs = cut(tokens.log_probs, *area)
            tokens = DecodedTokens(cut(tokens.tokens, *area), log_probs, None, tokens.is_finite)
        return dataclasses.replace(
            sampled,
            **{name: cut(getattr(sampled, name), *area) for name in ("latents", "decoded", "experts")},
            states=cut(sampled.states, None, *area),
            tokens=tokens,
            core=cut(sampled.core, num_rows),
            path_log_probs=cut(sampled.path_log_probs, num_rows),
        )
