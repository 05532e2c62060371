# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The router: gate, its mask, and the draw of experts."""

import torch
from testing_utils import small_config

from yan_hf.experts import YanGate, choose_experts, gate_log_probs


def test_padding_gets_the_uniform_distribution():
    logits = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    probs = gate_log_probs(logits, mask).exp()
    torch.testing.assert_close(probs[mask == 0], torch.full((3, 4), 0.25))
    torch.testing.assert_close(probs[mask == 1], logits[mask == 1].softmax(-1))


def test_probabilities_are_float32_in_half_precision():
    assert gate_log_probs(torch.randn(1, 2, 3).bfloat16(), torch.ones(1, 2)).dtype == torch.float32


def test_temperature_divides_the_logits():
    torch.manual_seed(0)
    inputs = torch.randn(2, 3, 32), torch.randn(2, 32), torch.randn(1, 32)
    gate = YanGate(small_config())
    gate.temperature = 0.5
    sharp = gate(*inputs)
    gate.temperature = 1.0
    torch.testing.assert_close(sharp, 2 * gate(*inputs))


def test_gate_reads_state_source_and_time():
    torch.manual_seed(0)
    gate = YanGate(small_config())
    inputs = [torch.randn(2, 3, 32), torch.randn(2, 32), torch.randn(2, 32)]
    expected = gate.down_proj(
        torch.nn.functional.gelu(
            gate.up_proj(torch.cat([inputs[0], *(x[:, None].expand(-1, 3, -1) for x in inputs[1:])], -1))
        )
    )
    torch.testing.assert_close(gate(*inputs), expected)


def test_greedy_choice_is_the_mode():
    log_probs = torch.randn(2, 5, 4).log_softmax(-1)
    assert torch.equal(choose_experts(log_probs), log_probs.argmax(-1))


def test_draws_have_the_gate_s_frequencies():
    probs = torch.tensor([0.1, 0.6, 0.05, 0.25])
    log_probs = probs.log().expand(1, 40_000, 4)
    uniform = torch.rand(1, 40_000, 4, generator=torch.Generator().manual_seed(0))

    def frequencies(temperature):
        return torch.bincount(choose_experts(log_probs, uniform, temperature).flatten(), minlength=4) / 40_000

    torch.testing.assert_close(frequencies(1.0), probs, rtol=0, atol=0.01)
    torch.testing.assert_close(frequencies(0.5), probs.square() / probs.square().sum(), rtol=0, atol=0.01)


def test_extreme_uniform_numbers_are_safe():
    log_probs = torch.tensor([[[0.0, -100.0]]])
    for uniform in (torch.zeros(1, 1, 2), torch.ones(1, 1, 2)):
        assert choose_experts(log_probs, uniform).item() == 0
