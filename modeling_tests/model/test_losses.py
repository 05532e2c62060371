# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The objective against independent renderings of its formulas, and its limits."""

import math

import pytest
import torch
from testing_utils import mmd_by_loops
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from yan_hf import losses


@pytest.fixture
def mixture():
    torch.manual_seed(0)
    fields = torch.randn(3, 5, 4, 6, dtype=torch.float64)  # (B, Ly, K, d)
    log_gate = torch.randn(3, 5, 4, dtype=torch.float64).log_softmax(-1)
    velocity = torch.randn(3, 5, 6, dtype=torch.float64)
    return fields, log_gate, velocity


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.5])
def test_nll_equals_the_mixture_density(mixture, sigma):
    fields, log_gate, velocity = mixture
    expected = -MixtureSameFamily(
        Categorical(logits=log_gate), Independent(Normal(fields, torch.full_like(fields, sigma)), 1)
    ).log_prob(velocity)
    torch.testing.assert_close(losses.flow_matching_nll(fields, log_gate, velocity, sigma), expected)


def test_small_sigma_gives_everything_to_the_nearest_expert(mixture):
    fields, log_gate, velocity = mixture
    nearest = (fields - velocity[..., None, :]).norm(dim=-1).argmin(-1)
    gamma = losses.responsibilities(fields, log_gate, velocity, sigma=1e-2)
    torch.testing.assert_close(gamma, torch.nn.functional.one_hot(nearest, 4).to(gamma.dtype))


def test_large_sigma_makes_responsibilities_the_gate(mixture):
    fields, log_gate, velocity = mixture
    gamma = losses.responsibilities(fields, log_gate, velocity, sigma=1e4)
    torch.testing.assert_close(gamma, log_gate.exp(), rtol=1e-6, atol=1e-6)


def test_large_sigma_pulls_every_expert_to_the_plain_mean(mixture):
    """At the optimum `u_k = E[γ_k u*] / E[γ_k]`; with γ = π, whatever u*, that is the mean of u* for each expert."""
    _, log_gate, _ = mixture
    targets = torch.randn(200, 6, dtype=torch.float64) + 2
    fields = torch.randn(4, 6, dtype=torch.float64).expand(200, 4, 6)
    gamma = losses.responsibilities(fields, log_gate[0, 0].expand(200, 4), targets, sigma=1e4)
    optimum = (gamma[..., None] * targets[:, None]).sum(0) / gamma.sum(0)[:, None]
    torch.testing.assert_close(optimum, targets.mean(0).expand(4, 6), rtol=1e-5, atol=1e-5)


def test_one_expert_is_plain_flow_matching_up_to_a_constant(mixture):
    fields, _, velocity = mixture
    sigma, size = 0.7, 6
    nll = losses.flow_matching_nll(fields[..., :1, :], torch.zeros(3, 5, 1), velocity, sigma)
    squared = (fields[..., 0, :] - velocity).square().sum(-1)
    torch.testing.assert_close(nll, squared / (2 * sigma**2) + size / 2 * math.log(2 * math.pi * sigma**2))


def test_nll_gradients_by_finite_differences():
    torch.manual_seed(1)
    fields = torch.randn(2, 3, 4, requires_grad=True, dtype=torch.float64)
    gate = torch.randn(2, 3, requires_grad=True, dtype=torch.float64)
    velocity = torch.randn(2, 4, requires_grad=True, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda u, g, v: losses.flow_matching_nll(u, g.log_softmax(-1), v, 0.8), (fields, gate, velocity)
    )


def test_gradients_of_the_other_terms_by_finite_differences():
    torch.manual_seed(2)
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    latents = torch.randn(2, 3, 4, requires_grad=True, dtype=torch.float64)
    target = torch.randn(2, 3, 4, requires_grad=True, dtype=torch.float64)
    gate = torch.randn(2, 3, 3, requires_grad=True, dtype=torch.float64)
    labels = torch.tensor([[1, 0, 2], [3, 1, 1]])
    check = torch.autograd.gradcheck
    assert check(lambda z, y: losses.latent_loss(z, y, mask), (latents, target))
    assert check(lambda z: losses.l2_loss(z, mask), (latents,))
    assert check(lambda z: losses.token_loss(z, labels, mask, 0.1), (latents,))
    assert check(lambda g: losses.gate_entropy_loss(g.log_softmax(-1), mask), (gate,))
    assert check(lambda g: losses.load_balance_loss(g.log_softmax(-1), mask), (gate,))

    def mmd(z):
        return losses.mmd_loss(z, mask, torch.Generator().manual_seed(0))

    assert check(mmd, (latents,))


def test_log_sum_exp_stays_in_float32_under_autocast(mixture):
    """In bfloat16 a squared distance of some hundreds is off by whole units."""
    fields, log_gate, velocity = (value.float() * 10 for value in mixture)
    expected = losses.flow_matching_nll(fields, log_gate, velocity, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = losses.flow_matching_nll(fields, log_gate, velocity, 1.0)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected)
    half = losses.flow_matching_nll(fields.bfloat16(), log_gate.bfloat16(), velocity.bfloat16(), 1.0)
    assert half.dtype == torch.float32


def test_mmd_by_loops():
    torch.manual_seed(3)
    latents = torch.randn(2, 4, 3, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    expected = mmd_by_loops(latents.flatten(0, 1)[mask.flatten().bool()])
    assert float(losses.mmd_loss(latents, mask)) == pytest.approx(expected, rel=1e-9)


def test_mmd_is_about_zero_for_equal_distributions_and_positive_otherwise():
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(20, 100)
    normal = torch.randn(20, 100, 8, generator=generator)
    equal = torch.tensor(
        [losses.mmd_loss(torch.randn(5, 40, 8, generator=generator), mask[:5, :40], generator) for _ in range(40)]
    )
    # Unbiased: on both sides of zero, which an estimate with each point's kernel with itself never is.
    assert equal.min() < 0 < equal.max() and abs(equal.mean()) < 3 * equal.std() / 40**0.5
    for other in (normal + 1, normal * 2, normal * 0.3):
        assert float(losses.mmd_loss(other, mask, generator)) > 0.05


def test_mmd_looks_at_real_tokens_only_when_it_subsamples():
    """Padding far away would raise the estimate if it were ever chosen."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(40, 100, 8, generator=generator)
    mask = torch.zeros(40, 100)
    mask[:, :20] = 1  # 800 of 4,000 tokens
    latents[mask == 0] = 100.0
    assert abs(float(losses.mmd_loss(latents, mask, generator))) < 0.02
    assert float(losses.mmd_loss(latents, torch.zeros(40, 100), generator)) == 0.0


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="needs PyTorch 2.13")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"])
@pytest.mark.parametrize("has_weights", [False, True])
def test_the_fused_token_loss_is_the_plain_one(monkeypatch, dtype, has_weights):
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", 7 * 50)  # chunks of seven tokens
    torch.manual_seed(5)
    head, states = torch.nn.Linear(8, 50), torch.randn(30, 8)
    labels, mask = torch.randint(50, (30,)), (torch.rand(30) > 0.3).float()
    mask = mask * torch.rand(30) if has_weights else mask
    if dtype == torch.bfloat16:
        head, states = head.to(dtype), states.to(dtype)
    found = []
    for fused in (True, False):
        head.zero_grad()
        leaf = states.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            assert losses.can_fuse(head, leaf, 0.0)
            if fused:
                loss = losses.fused_token_loss(leaf, head, labels, mask, has_weights)
            else:
                loss = losses.token_loss(head(leaf)[None], labels[None], mask[None])
        assert loss.dtype == torch.float32
        loss.backward(retain_graph=True)
        loss.backward()
        found.append([loss.detach(), leaf.grad.float(), head.weight.grad.float(), head.bias.grad.float()])
    close = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 2e-3}
    torch.testing.assert_close(found[0], found[1], **close)


def test_masked_positions_change_no_term():
    torch.manual_seed(4)
    mask = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    latents, target = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    gate = torch.randn(2, 4, 3).log_softmax(-1)
    labels = torch.randint(0, 5, (2, 4))

    def terms(latents, target, gate, labels):
        return torch.stack(
            [
                losses.latent_loss(latents, target, mask),
                losses.token_loss(latents, labels, mask, 0.1),
                losses.gate_entropy_loss(gate, mask),
                losses.load_balance_loss(gate, mask),
                losses.mmd_loss(latents, mask, torch.Generator().manual_seed(0)),
                losses.l2_loss(latents, mask),
                losses.token_mean(target.sum(-1), mask),
            ]
        )

    before = terms(latents, target, gate, labels)
    hidden = mask == 0
    latents[hidden], target[hidden] = float("nan"), float("inf")
    latents[hidden] = 1e4
    gate[hidden] = torch.tensor([0.0, -50.0, -50.0])
    labels[hidden] = 0
    torch.testing.assert_close(terms(latents, target, gate, labels), before)


def test_means_are_over_tokens_not_rows():
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    values = torch.tensor([[1.0, 2.0, 3.0], [10.0, 99.0, 99.0]])
    assert float(losses.token_mean(values, mask)) == pytest.approx(4.0)


def test_weights_scale_tokens():
    values = torch.tensor([[1.0, 5.0]])
    assert float(losses.token_mean(values, torch.tensor([[1.0, 3.0]]))) == pytest.approx(4.0)


def test_load_balance_is_zero_when_balanced_and_log_k_when_collapsed():
    mask = torch.ones(2, 4)
    balanced = torch.eye(4).repeat(2, 1, 1).clamp(min=1e-30).log()  # every expert wins once a row
    assert float(losses.load_balance_loss(balanced, mask)) == pytest.approx(0.0, abs=1e-6)
    collapsed = torch.full((2, 4, 4), -1e4)
    collapsed[..., 2] = 0.0
    collapsed.requires_grad_()
    loss = losses.load_balance_loss(collapsed, mask)
    assert float(loss.detach()) == pytest.approx(math.log(4))
    loss.backward()
    assert torch.isfinite(collapsed.grad).all()


def test_gate_entropy_is_minus_the_entropy():
    gate = torch.randn(2, 3, 4).log_softmax(-1)
    expected = -Categorical(logits=gate).entropy().mean()
    torch.testing.assert_close(losses.gate_entropy_loss(gate, torch.ones(2, 3)), expected)


def test_length_loss_counts_from_one_and_skips_empty_rows():
    logits = torch.randn(3, 6)
    expected = torch.nn.functional.cross_entropy(logits[:2], torch.tensor([0, 5]))
    torch.testing.assert_close(losses.length_loss(logits, torch.tensor([1, 6, 0])), expected)


@pytest.mark.parametrize("beta", [(1.0, 1.0), (2.0, 5.0), (0.5, 0.5)])
def test_times_follow_the_beta_distribution_and_repeat(beta, monkeypatch):
    device = torch.device("cpu")
    before = torch.random.get_rng_state()
    monkeypatch.setattr(torch, "manual_seed", None)  # it would reseed every device
    first = losses.sample_times(20_000, beta, device, torch.Generator().manual_seed(3))
    second = losses.sample_times(20_000, beta, device, torch.Generator().manual_seed(3))
    assert torch.equal(first, second)
    assert torch.equal(torch.random.get_rng_state(), before)  # a generator leaves the global state alone
    expected = torch.distributions.Beta(*map(torch.tensor, beta))
    assert float(first.mean()) == pytest.approx(float(expected.mean), abs=0.01)
    assert float(first.var()) == pytest.approx(float(expected.variance), abs=0.01)
    assert not torch.equal(losses.sample_times(5, beta, device, None), losses.sample_times(5, beta, device, None))
