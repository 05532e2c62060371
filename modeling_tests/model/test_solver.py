# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The solver against a plain rendering of the sampler, and its count of trunk passes."""

import math
from itertools import pairwise

import pytest
import torch
from testing_utils import batch_of_rows

from yan_hf.experts import gate_log_probs
from yan_hf.sampling import solve_flow
from yan_hf.solver import SOLVERS, evaluation_times, integrate, time_grid


def test_times_have_one_point_more_than_steps():
    assert time_grid(1) == [0.0, 1.0]
    assert time_grid(3) == pytest.approx([0.0, 1 / 3, 2 / 3, 1.0])
    with pytest.raises(ValueError, match="num_inference_steps"):
        time_grid(0)


def test_euler_on_a_known_equation():
    """`z' = z` from 1: `(1 + 1/S)^S` after S steps."""
    states = []
    end = integrate(lambda state, time: state, torch.ones(1, dtype=torch.float64), time_grid(4), on_step=states.append)
    assert float(end) == pytest.approx(1.25**4)
    assert len(states) == 4 and torch.equal(states[-1], end)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_solvers_have_their_order(solver, order):
    """On `z' = t z`, the error of a method of order p falls by 2^p when the steps are halved."""

    def error(steps):
        start = torch.ones(1, dtype=torch.float64)
        end = integrate(lambda state, time: time * state, start, time_grid(steps), solver)
        return abs(float(end) - math.exp(0.5))

    assert math.log2(error(32) / error(64)) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("schedule", ["uniform", "cosine", "shifted"])
def test_evaluations_are_known_in_advance(solver, schedule):
    """The field is called at exactly these times, in order: time embeddings are looked up by them."""
    times, seen = time_grid(4, schedule), []

    def field(state, time):
        seen.append(time)
        return state

    integrate(field, torch.ones(1), times, solver)
    assert seen == evaluation_times(times, solver)
    assert len(seen) == 4 * {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}[solver]


def test_stages_of_midpoint_and_heun_by_hand():
    """One step of `z' = t + z` from 1, `Δt = 1`."""
    start = torch.ones(1, dtype=torch.float64)

    def field(state, time):
        return time + state

    assert float(integrate(field, start, [0.0, 1.0], "midpoint")) == pytest.approx(1 + (0.5 + 1.5))
    assert float(integrate(field, start, [0.0, 1.0], "heun")) == pytest.approx(1 + (1 + 3) / 2)


def test_schedules():
    assert time_grid(2, "cosine") == pytest.approx([0, 1 - math.cos(math.pi / 4), 1])
    assert time_grid(2, "shifted", 3.0) == pytest.approx([0, 0.25, 1])
    assert time_grid(4, "shifted", 1.0) == pytest.approx(time_grid(4))
    for schedule in ("cosine", "shifted"):
        for steps in (1, 2, 7):
            times = time_grid(steps, schedule)
            assert len(times) == steps + 1 and times[0] == 0 and times[-1] == 1
            assert all(start < end for start, end in pairwise(times))
            gaps = [end - start for start, end in pairwise(times)]
            assert gaps == sorted(gaps)  # short steps near the noise
    for wrong in ({"schedule": "linear"}, {"schedule": "shifted", "shift": 0.0}):
        with pytest.raises(ValueError, match="time_sch|time_shift"):
            time_grid(3, **wrong)


def test_euler_passes_the_step_s_start():
    seen = []

    def field(state, time):
        seen.append(time)
        return state

    integrate(field, torch.ones(1), [0.0, 0.1, 0.7, 1.0])
    assert seen == [0.0, 0.1, 0.7]


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_s_steps_are_s_passes_and_equal_the_plain_sampler(model, steps):
    """The plain sampler: a pass for the gate, then S passes with every expert computed, one held per token."""
    _, ids, mask = batch_of_rows([4, 8])
    canvas = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    flow = model.model.flow
    calls = []
    handle = flow.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        source = model.model.encode(ids, mask).last_hidden_state
        context = model.model.prepare_context(source, mask, canvas)
        cached = model.model.prepare_context(source, mask, canvas)
        cached.source_key_values = flow.cache_cross_attention(source)
        cached.modulations = flow.embed_times(time_grid(steps), source.device)
        start = torch.randn(2, 5, 32)
        end, experts = solve_flow(flow, start, cached, time_grid(steps), lambda log_probs, _: log_probs.argmax(-1))
        experts = experts[..., 0]
        assert len(calls) == steps
        handle.remove()

        gate = gate_log_probs(flow(start, torch.zeros(2), context).gate_logits, canvas)
        assert torch.equal(experts, gate.argmax(-1))
        state = start
        for step in range(steps):
            fields = flow(state, torch.full((2,), step / steps), context).expert_fields
            state = state + fields.gather(2, experts[..., None, None].expand(-1, -1, 1, 32))[:, :, 0] / steps
    torch.testing.assert_close(end, state, rtol=1e-5, atol=1e-5)


def test_only_the_chosen_expert_is_computed(model):
    """An expert that nobody chooses may hold anything."""
    _, ids, mask = batch_of_rows([4, 8])
    indices = torch.tensor([[0, 1, 3, 3], [1, 0, 0, 3]])
    arguments = {"target_lengths": 4, "expert_indices": indices, "initial_latents": torch.randn(2, 4, 32)}
    expected = model.generate(ids, mask, return_dict_in_generate=True, **arguments).latents
    with torch.no_grad():
        model.model.flow.experts.down_proj[2] = float("nan")
    result = model.generate(ids, mask, return_dict_in_generate=True, **arguments).latents
    torch.testing.assert_close(result, expected)
