# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The two halves of `generate` that touch the network, as functions of tensors and static options: encode the source,
then solve and decode. Nothing in them waits for a value on the host, so that each can be one graph.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import MethodType

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from .decoding import ReadTokens, read_tokens
from .routing import RoutingOptions, choose_experts, restrict_to_core
from .solver import evaluation_times, solve_flow


@dataclass(frozen=True)
class SamplingOptions:
    """
    What is fixed for a whole batch.

    Args:
        times: The solver's grid.
        solver: Its name.
        expert_temperature: Divides the gate's log-probabilities.
        repeats: Targets for each source.
        keep_states: Whether to keep the state after every step.
        read_argmax: Whether to read the tokens too, as the argmax.
        with_scores: Whether to give their log-probabilities.
        routing: How experts are routed.
        keep_core: Whether to keep the core sets.
    """

    times: tuple[float, ...]
    solver: str = "euler"
    expert_temperature: float = 1.0
    repeats: int = 1
    keep_states: bool = False
    read_argmax: bool = True
    with_scores: bool = False
    routing: RoutingOptions = field(default_factory=RoutingOptions)
    keep_core: bool = False


@dataclass
class Written:
    """
    What solving and decoding gives.

    Args:
        latents: The ODE's end, `(R, L, d)`.
        decoded: What the vocabulary head reads, `(R, L, d)`.
        experts: `(R, L)`.
        states: The initial state and that after every step, `(S + 1, R, L, d)`, if asked for.
        tokens: With `read_argmax`.
        is_finite: Whether the gate's log-probabilities are finite numbers, a tensor `()`.
        core: The core sets of experts, `(R, N, K)`, with block routing, if asked for.
    """

    latents: torch.Tensor
    decoded: torch.Tensor
    experts: torch.Tensor | None
    states: torch.Tensor | None
    tokens: ReadTokens | None
    is_finite: torch.Tensor
    core: torch.Tensor | None = None


def eval_view(module: nn.Module) -> nn.Module:
    """
    A view of a model in eval mode: copies of its modules that share all parameters, buffers and hooks with it.

    Calling `eval()` instead would change the model under another thread, which may be training it.
    """
    module = module._modules.get("_orig_mod", module)  # of a compiled part, whose program is that of its own mode
    view = object.__new__(type(module))
    children = {name: None if child is None else eval_view(child) for name, child in module._modules.items()}
    view.__dict__.update(module.__dict__, training=False, _modules=children, _compiled_call_impl=None)
    for name, value in module.__dict__.items():
        # What was put in a method's place, as accelerate's hooks are, calls the module that it was made for.
        if isinstance(value, MethodType) and value.__self__ is module:
            view.__dict__[name] = MethodType(value.__func__, view)
        elif isinstance(value, partial) and value.args and value.args[0] is module:
            view.__dict__[name] = partial(value.func, view, *value.args[1:], **value.keywords)
    return view


def encode(
    model: PreTrainedModel,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The source's latents, `(B, Lx, d)`, and the logits of the target's length, `(B, max_position_embeddings)`."""
    source = model.model.encode(input_ids, attention_mask, inputs_embeds).last_hidden_state
    return source, model.predict_lengths(source, attention_mask)


def write(
    model: PreTrainedModel,
    options: SamplingOptions,
    source: torch.Tensor,
    source_mask: torch.Tensor | None,
    lengths: torch.Tensor,
    initial_state: torch.Tensor,
    uniform: torch.Tensor | None,
    experts: torch.Tensor | None,
    on_step: Callable[[torch.Tensor], None] | None = None,
) -> Written:
    """
    Solves the ODE and decodes its end.

    Args:
        model: A [`YanForConditionalGeneration`].
        options: Static options.
        source, source_mask: The source's latents, `(B, Lx, d)`, and mask, `(B, Lx)`.
        lengths: Lengths of the canvases, `(R,)`, `R = B · options.repeats`.
        initial_state: `z0`, `(R, L, d)`.
        uniform: Noise for the draw of experts, `(R, L, K)`; `None` takes the gate's mode.
        experts: Experts `(R, L)` instead of a choice by the gate.
        on_step: Called with the state after every step.
    """
    state = initial_state.to(source.dtype)
    canvas = (torch.arange(state.shape[1], device=source.device) < lengths[:, None]).long()
    is_finite = torch.ones((), dtype=torch.bool, device=source.device)
    states, core = [state], None

    def held(experts: torch.Tensor) -> torch.Tensor:
        # Positions behind a row's canvas follow its first token, so that they need no expert of their own.
        return torch.where(canvas.bool(), experts, experts[:, :1])

    def select(log_probs: torch.Tensor) -> torch.Tensor:
        nonlocal is_finite, core
        is_finite = torch.isfinite(log_probs).all()
        log_probs, core = restrict_to_core(log_probs, canvas, options.routing)
        return held(choose_experts(log_probs, uniform, options.expert_temperature))

    def after_step(state: torch.Tensor):
        if options.keep_states:
            states.append(state)
        if on_step is not None:
            on_step(state)

    chosen = None
    if model.config.velocity_field == "expert":
        chosen = select if experts is None else held(experts)
    times = list(options.times)
    context = model.model.prepare_context(
        source, source_mask, canvas, times=evaluation_times(times, options.solver), repeats=options.repeats
    )
    latents, experts = solve_flow(
        model.model.flow,
        state,
        context,
        times,
        chosen,
        options.solver,
        after_step if options.keep_states or on_step is not None else None,
    )
    decoded = model.model.decoder(latents)
    return Written(
        latents=latents,
        decoded=decoded,
        experts=experts,
        states=torch.stack(states) if options.keep_states else None,
        tokens=read_tokens(model.lm_head, decoded, with_scores=options.with_scores) if options.read_argmax else None,
        is_finite=is_finite,
        core=core if options.keep_core else None,
    )


def encode_and_write(
    model: PreTrainedModel,
    options: SamplingOptions,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    lengths: torch.Tensor,
    initial_state: torch.Tensor,
    uniform: torch.Tensor | None,
    experts: torch.Tensor | None,
) -> Written:
    """Both halves at once, where the lengths do not wait for the encoder."""
    source = model.model.encode(input_ids, attention_mask, inputs_embeds).last_hidden_state
    return write(model, options, source, attention_mask, lengths, initial_state, uniform, experts)


__all__ = ["SamplingOptions", "Written", "encode", "encode_and_write", "eval_view", "write"]
