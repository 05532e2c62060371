# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The solver against a plain rendering of the sampler, and its count of trunk passes."""

import pytest
import torch
from conftest import batch_of_rows

from yan_hf.routing import gate_log_probs
from yan_hf.solver import euler, solve_flow, uniform_times


def test_times_have_one_point_more_than_steps():
    assert uniform_times(1) == [0.0, 1.0]
    assert uniform_times(3) == pytest.approx([0.0, 1 / 3, 2 / 3, 1.0])
    with pytest.raises(ValueError, match="num_inference_steps"):
        uniform_times(0)


def test_euler_on_a_known_equation():
    """`z' = z` from 1: `(1 + 1/S)^S` after S steps."""
    states = []
    end = euler(lambda state, time: state, torch.ones(1, dtype=torch.float64), uniform_times(4), states.append)
    assert float(end) == pytest.approx(1.25**4)
    assert len(states) == 4 and torch.equal(states[-1], end)


def test_euler_passes_the_step_s_start():
    seen = []

    def field(state, time):
        seen.append(time)
        return state

    euler(field, torch.ones(1), [0.0, 0.1, 0.7, 1.0])
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
        cached = model.model.prepare_context(source, mask, canvas, cache_source=True)
        start = torch.randn(2, 5, 32)
        end, experts = solve_flow(flow, start, cached, uniform_times(steps), lambda log_probs: log_probs.argmax(-1))
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
