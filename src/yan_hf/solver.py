# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The ODE solver that carries noise at t = 0 to a target latent at t = 1."""

from collections.abc import Callable
from itertools import pairwise

import torch

from .outputs import YanFlowContext, YanFlowOutput


def uniform_times(num_steps: int) -> list[float]:
    """Times of the uniform grid: `num_steps` solver steps have `num_steps + 1` points, from 0 to 1."""
    if num_steps < 1:
        raise ValueError(f"`num_inference_steps` must be at least 1, but is {num_steps}.")
    return [step / num_steps for step in range(num_steps + 1)]


def euler(
    velocity: Callable[[torch.Tensor, float], torch.Tensor],
    initial_state: torch.Tensor,
    times: list[float],
    on_step: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """
    Explicit Euler: `z ← z + Δt · u(z, t)`, one evaluation of `u` a step.

    Args:
        velocity: The field `u(state, time)`, a function of `(B, Ly, d)` and a float.
        initial_state: State at `times[0]`, `(B, Ly, d)`.
        times: Increasing grid, one point more than solver steps.
        on_step: Called with every new state.

    Returns:
        The state at `times[-1]`, differentiable through every step.
    """
    state = initial_state
    for start, end in pairwise(times):
        state = state + (end - start) * velocity(state, start)
        if on_step is not None:
            on_step(state)
    return state


def solve_flow(
    flow: Callable[..., YanFlowOutput],
    initial_state: torch.Tensor,
    context: YanFlowContext,
    times: list[float],
    select: Callable[[torch.Tensor], torch.Tensor] | torch.Tensor,
    on_step: Callable[[torch.Tensor], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Solves the ODE with one expert held for each target token (section 5 of the model's paper).

    The first evaluation gives both the gate, from which the experts are chosen, and the first velocity, so that `S`
    steps cost `S` passes of the trunk.

    Args:
        flow: The vector field, [`YanFlow`].
        initial_state: `z0`, `(B, Ly, d)`.
        context: What all evaluations share.
        times: Increasing grid from 0 to 1.
        select: Expert indices `(B, Ly)`, or a function from the gate's log-probabilities `(B, Ly, K)` to them.
        on_step: Called with every new state.

    Returns:
        The state at the last time, `(B, Ly, d)`, and the experts, `(B, Ly)`.
    """
    experts = select

    def velocity(state: torch.Tensor, time: float) -> torch.Tensor:
        nonlocal experts
        # One time for the whole batch, so that embedding and adaptive scales are computed for a single row.
        dtype = torch.promote_types(state.dtype, torch.float32)
        timesteps = torch.full((1,), time, device=state.device, dtype=dtype)
        output = flow(state, timesteps, context, experts=experts)
        experts = output.expert_indices
        return output.velocity

    return euler(velocity, initial_state, times, on_step), experts


__all__ = ["euler", "solve_flow", "uniform_times"]
