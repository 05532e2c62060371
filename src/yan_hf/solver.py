# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The ODE solvers that carry noise at t = 0 to a target latent at t = 1, and the time grids they run on."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass(frozen=True)
class Tableau:
    """
    Butcher tableau of an explicit Runge-Kutta method: stage `i` evaluates the field at `t + nodes[i]·Δt` and the state
    `z + Δt Σ_j matrix[i][j] k_j`; the step ends at `z + Δt Σ_i weights[i] k_i`.
    """

    nodes: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


# Hairer, Nørsett and Wanner, "Solving Ordinary Differential Equations I", section II.1.
SOLVERS = {
    "euler": Tableau((0.0,), ((),), (1.0,)),
    "midpoint": Tableau((0.0, 0.5), ((), (0.5,)), (0.0, 1.0)),
    "heun": Tableau((0.0, 1.0), ((), (1.0,)), (0.5, 0.5)),
    "rk4": Tableau((0.0, 0.5, 0.5, 1.0), ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}
TIME_SCHEDULES = ("uniform", "cosine", "shifted")
DEFAULT_TIME_SHIFT = 3.0


def time_grid(num_steps: int, schedule: str = "uniform", shift: float = DEFAULT_TIME_SHIFT) -> list[float]:
    """
    Times of `num_steps` solver steps: `num_steps + 1` increasing points from 0 to 1. With `u = i / num_steps`:

    - `"uniform"`: `u`;
    - `"cosine"`: `1 - cos(π u / 2)`, short steps near the noise;
    - `"shifted"`: `u / (1 + (shift - 1)(1 - u))` (Esser et al. 2024, section 5.3.2, with time running from noise to
      data), short steps near the noise for a shift above 1, near the text below.

    Raises:
        ValueError: for fewer steps than one, an unknown schedule, or a shift that is not positive.
    """
    if num_steps < 1:
        raise ValueError(f"`num_inference_steps` must be at least 1, but is {num_steps}.")
    fractions = [step / num_steps for step in range(num_steps + 1)]
    if schedule == "uniform":
        return fractions
    if schedule == "cosine":
        inner = [1 - math.cos(math.pi * fraction / 2) for fraction in fractions[1:-1]]
    elif schedule == "shifted":
        if not shift > 0:
            raise ValueError(f"`time_shift` must be positive, but is {shift}.")
        inner = [fraction / (1 + (shift - 1) * (1 - fraction)) for fraction in fractions[1:-1]]
    else:
        raise ValueError(f"`time_schedule` must be one of {', '.join(TIME_SCHEDULES)}, but is {schedule!r}.")
    return [0.0, *inner, 1.0]


def evaluation_times(times: list[float], solver: str = "euler") -> list[float]:
    """The time of every evaluation of the field, in order: as many as passes of the flow trunk."""
    return [start + node * (end - start) for start, end in pairwise(times) for node in SOLVERS[solver].nodes]


def integrate(
    velocity: Callable[[torch.Tensor, float], torch.Tensor],
    initial_state: torch.Tensor,
    times: list[float],
    solver: str = "euler",
    on_step: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """
    Solves `z' = u(z, t)` by an explicit Runge-Kutta method; for Euler a step is `z ← z + Δt · u(z, t)`.

    Args:
        velocity: The field `u(state, time)`, a function of `(B, Ly, d)` and a float.
        initial_state: State at `times[0]`, `(B, Ly, d)`.
        times: Increasing grid, one point more than solver steps.
        solver: A name in `SOLVERS`.
        on_step: Called with every new state.

    Returns:
        The state at `times[-1]`, differentiable through every step.
    """

    def advance(state: torch.Tensor, factors: tuple[float, ...], slopes: list[torch.Tensor]) -> torch.Tensor:
        for factor, slope in zip(factors, slopes):
            if factor:
                state = state + (factor * size) * slope
        return state

    tableau = SOLVERS[solver]
    state = initial_state
    for start, end in pairwise(times):
        size = end - start
        slopes: list[torch.Tensor] = []
        for node, factors in zip(tableau.nodes, tableau.matrix):
            slopes.append(velocity(advance(state, factors, slopes), start + node * size))
        state = advance(state, tableau.weights, slopes)
        if on_step is not None:
            on_step(state)
    return state
