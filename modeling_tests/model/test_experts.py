# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The expert vector fields in blocks of tokens, which need no look at the choice on the host."""

import pytest
import torch
from testing_utils import SHALLOW, batch_of_rows, small_model
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from transformers.generation import CompileConfig

from yan_hf.experts import EAGER_FORWARD, YanExperts


def test_blocks_of_tokens_equal_the_loop_over_experts():
    """Every choice fits, unused experts and another rank's indices too; values and gradients are the loop's."""
    generator = torch.Generator().manual_seed(0)
    for num_experts, num_tokens, k in [(1, 5, 1), (2, 1, 1), (5, 8, 2), (5, 40, 1), (16, 333, 2)]:
        experts = small_model(num_experts=num_experts).model.flow.experts.double()
        states = torch.randn(num_tokens, 32, dtype=torch.double, generator=generator, requires_grad=True)
        index = torch.randint(num_experts, (num_tokens, k), generator=generator)
        weights = torch.rand(num_tokens, k, dtype=torch.double, generator=generator)
        for chosen in (index, torch.full_like(index, num_experts - 1), index.masked_fill(index == 0, num_experts)):
            kept = weights.masked_fill(chosen == num_experts, 0.0)
            expected = experts(states, chosen, kept)
            blocks = experts.by_blocks(states, chosen, weights)
            torch.testing.assert_close(blocks, expected)
            if not expected.requires_grad:
                continue  # all of it is another rank's
            leaves = [states, *experts.parameters()]
            for ours, theirs in zip(*(torch.autograd.grad(out.square().sum(), leaves) for out in (blocks, expected))):
                torch.testing.assert_close(ours, theirs)


def test_no_value_is_read_on_the_host_in_blocks():
    experts = small_model().model.flow.experts
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # in which reading a value is an error
        states, index = mode.from_tensor(torch.randn(9, 32)), mode.from_tensor(torch.zeros(9, 1, dtype=torch.long))
        assert experts.by_blocks(states, index, torch.ones(9, 1)).shape == (9, 32)
        with pytest.raises(DynamicOutputShapeException):
            EAGER_FORWARD(experts, states, index, torch.ones(9, 1))


@pytest.mark.parametrize("options", [{}, {"compile": True, "compile_config": CompileConfig(backend="aot_eager")}])
@pytest.mark.slow
def test_generate_and_training_in_blocks_of_tokens(monkeypatch, options):
    """As on CUDA in float32, where the grouped product waits for the device; the offloaded experts give the bits."""
    _, ids, mask = batch_of_rows([4, 9, 6])
    model = small_model(num_experts=6, **SHALLOW)
    expected, loss = model.generate(ids, mask, seeds=[1, 2, 3]), model(ids, mask, labels=ids).loss
    monkeypatch.setattr(YanExperts, "implementation", lambda self, states: "blocks")
    assert torch.equal(model.generate(ids, mask, seeds=[1, 2, 3], **options), expected)
    torch.testing.assert_close(model(ids, mask, labels=ids).loss, loss, rtol=1e-5, atol=1e-5)
    if not options:
        asked = {"seeds": [1, 2, 3], "return_dict_in_generate": True}
        resident = model.generate(ids, mask, **asked).latents
        model.enable_expert_offload(2, mode="on_demand")
        assert torch.equal(model.generate(ids, mask, **asked).latents, resident)
