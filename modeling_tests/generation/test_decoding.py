# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Tokens read off latents in blocks: against one plain product, drawn tokens, processors, the cut."""

import pytest
import torch
from testing_utils import small_config
from torch import nn
from transformers.activations import ACT2FN
from transformers.generation.logits_process import LogitsProcessorList, SuppressTokensLogitsProcessor

from yan_hf import YanGenerationConfig, sampling
from yan_hf.generation_config_yan import make_processors
from yan_hf.inference import cpu_kernels
from yan_hf.inference.cpu_kernels import use_onednn
from yan_hf.layers import KERNELS, apply_linear, linear, linear_gelu
from yan_hf.sampling import decode_tokens, truncate_at_eos


def head_and_states(vocab_size=60, width=16, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(width, vocab_size).to(dtype), torch.randn(3, 7, width, dtype=dtype)


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
    if request.param == "many blocks":
        monkeypatch.setattr(sampling, "_BLOCK_ELEMENTS", 5 * 2500)
        monkeypatch.setattr(sampling, "_CPU_TOKENS", 4)
        monkeypatch.setattr(sampling, "_CPU_VOCABULARY", 1024)


@pytest.mark.parametrize("by_vocabulary", [True, False])
@torch.no_grad()
def test_argmax_and_log_probabilities_equal_the_plain_ones(blocks, by_vocabulary):
    head, states = head_and_states(vocab_size=2500)
    if not by_vocabulary:
        head.register_forward_hook(lambda *_: None)
    logits = head(states)
    read = decode_tokens(head, states, with_scores=True)
    assert torch.equal(read.tokens, logits.argmax(-1)) and bool(read.is_finite) and read.logits is None
    torch.testing.assert_close(read.log_probs, logits.log_softmax(-1).amax(-1))
    read = decode_tokens(head, states, with_scores=False, with_logits=True)
    torch.testing.assert_close(read.logits, logits)
    assert read.log_probs is None and torch.equal(read.tokens, logits.argmax(-1))


@pytest.mark.parametrize("part_size", [2496, 7])  # whole rows of 16 bytes and a rest, as on a GPU; many parts
@torch.no_grad()
def test_parts_of_the_vocabulary_without_waiting_equal_one_product(part_size):
    head, states = head_and_states(vocab_size=2500)
    head.weight[-4:] *= 4
    states = torch.cat([states.flatten(0, 1), head.weight[-4:], torch.full_like(head.weight[:1], torch.nan)])
    logits = head(states)
    tokens, best, partition = sampling._argmax_by_vocabulary(head, states, True, part_size, False)
    assert torch.equal(tokens[:-1], logits[:-1].argmax(-1)) and {2496, 2497, 2498, 2499} <= set(tokens.tolist())
    torch.testing.assert_close(best, logits.amax(-1), equal_nan=True)
    torch.testing.assert_close(partition, logits.logsumexp(-1), equal_nan=True)


@torch.no_grad()
def test_the_first_of_equal_logits_is_taken(blocks):
    head, states = head_and_states(vocab_size=2500)
    head.weight.zero_()
    head.bias.zero_()
    assert (decode_tokens(head, states).tokens == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("entry", [0, 2499])
@torch.no_grad()
def test_values_that_are_not_finite_are_reported(blocks, value, entry):
    head, states = head_and_states(vocab_size=2500)
    head.bias[entry] = value
    assert not bool(decode_tokens(head, states).is_finite)


@torch.no_grad()
def test_a_head_with_a_hook_is_called(blocks):
    """What PEFT or Accelerate put before a layer must not be gone around."""
    head, states = head_and_states(vocab_size=2500)
    head.register_forward_hook(lambda module, args, output: output.neg())
    assert torch.equal(decode_tokens(head, states).tokens, (states @ head.weight.T + head.bias).argmin(-1))


@torch.no_grad()
def test_draws_have_the_distribution_s_frequencies():
    head, _ = head_and_states(vocab_size=5)
    states = torch.randn(1, 1, 16).expand(1, 40_000, 16)
    uniform = torch.rand(1, 40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    read = decode_tokens(head, states, uniform=uniform, with_scores=True)
    frequencies = torch.bincount(read.tokens[0], minlength=5) / 40_000
    probs = head(states[0, 0]).softmax(-1)
    torch.testing.assert_close(frequencies, probs, rtol=0, atol=0.01)
    torch.testing.assert_close(read.log_probs[0].exp(), probs[read.tokens[0]])


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2**-53])
@torch.no_grad()
def test_extreme_uniform_numbers_give_tokens_with_probability(uniform):
    head, states = head_and_states()
    processors = LogitsProcessorList([SuppressTokensLogitsProcessor([0, 1, 58, 59])])
    read = decode_tokens(head, states, processors=processors, uniform=torch.full((3, 7), uniform, dtype=torch.float64))
    assert (read.tokens == (2 if uniform == 0 else 57)).all()


@pytest.mark.parametrize(
    "fields",
    [{"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.3}, {"min_p": 0.5}, {"typical_p": 0.3}, {"suppress_tokens": [7]}],
)
@torch.no_grad()
def test_processors_are_transformers_own(fields):
    """The tokens that can be drawn, and how often, are those of the processed distribution."""
    config = YanGenerationConfig(do_sample=True, **{"top_k": 0, **fields}).resolve(small_config())
    processors = make_processors(config)
    assert [type(processor).__module__ for processor in processors] == ["transformers.generation.logits_process"]
    head, _ = head_and_states(vocab_size=8)
    states = torch.randn(1, 1, 16).expand(1, 20_000, 16)
    expected = processors(None, head(states[0, :1]).clone()).softmax(-1)[0]
    uniform = torch.rand(1, 20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = decode_tokens(head, states, processors=processors, uniform=uniform).tokens
    torch.testing.assert_close(torch.bincount(tokens[0], minlength=8) / 20_000, expected, rtol=0, atol=0.015)
    assert set(tokens.unique().tolist()) <= set(expected.nonzero().flatten().tolist())


@torch.no_grad()
def test_log_probabilities_are_the_head_s_whatever_the_processors():
    head, states = head_and_states()
    config = YanGenerationConfig(do_sample=True, temperature=0.2).resolve(small_config())
    uniform = torch.rand(3, 7, dtype=torch.float64)
    read = decode_tokens(head, states, processors=make_processors(config), uniform=uniform, with_scores=True)
    expected = head(states).log_softmax(-1).gather(2, read.tokens[..., None])[..., 0]
    torch.testing.assert_close(read.log_probs, expected)


def test_top_k_is_fifty_by_default_as_in_transformers():
    config = YanGenerationConfig(do_sample=True).resolve(small_config())
    assert [processor.top_k for processor in make_processors(config)] == [50]
    assert not make_processors(YanGenerationConfig(do_sample=True, top_k=0).resolve(small_config()))
    assert not make_processors(YanGenerationConfig().resolve(small_config()))


@torch.no_grad()
def test_processors_get_the_source_and_every_position(blocks):
    head, states = head_and_states(vocab_size=2500)
    seen = []

    def processor(input_ids, scores):
        seen.append(input_ids)
        return scores.masked_fill(torch.arange(2500) != input_ids[:, :1] + 10, -torch.inf)

    context = torch.tensor([[5, 6], [7, 8], [9, 10]])
    tokens = decode_tokens(head, states, processors=LogitsProcessorList([processor]), context_ids=context).tokens
    assert torch.equal(torch.cat(seen), context.repeat_interleave(7, dim=0))
    assert torch.equal(tokens, (context[:, :1] + 10).expand(3, 7))


@torch.no_grad()
def test_no_end_token_before_the_shortest_length(blocks):
    head, states = head_and_states(vocab_size=2500)
    head.bias[2] = 100.0
    tokens = decode_tokens(head, states, end_token_ids=[2], min_length=4).tokens
    assert (tokens[:, :3] != 2).all() and (tokens[:, 3:] == 2).all()
    assert (decode_tokens(head, states, end_token_ids=[2], min_length=1).tokens == 2).all()


def test_cut_after_the_first_end_token_within_the_canvas():
    tokens = torch.tensor([[5, 2, 6, 2], [5, 6, 7, 2], [3, 5, 5, 5], [5, 5, 5, 5]])
    cut, lengths, kept = truncate_at_eos(tokens, torch.tensor([4, 3, 4, 4]), [2, 3], pad_token_id=0)
    assert cut.tolist() == [[5, 2, 0, 0], [5, 6, 7, 0], [3, 0, 0, 0], [5, 5, 5, 5]]
    assert lengths.tolist() == [2, 3, 1, 4] and torch.equal(kept.sum(-1), lengths)


@pytest.mark.skipif(not cpu_kernels.is_available(), reason="needs oneDNN on x86")
def test_onednn_equals_the_plain_product_and_leaves_the_rest_alone(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "_SMALLEST_PRODUCT", 1)
    torch.manual_seed(0)
    layer, states = nn.Linear(64, 96), torch.randn(2, 5, 64)
    gelu = ACT2FN["gelu"]
    with torch.no_grad():
        expected = layer(states)
        with use_onednn(KERNELS):
            assert KERNELS.linear
            torch.testing.assert_close(apply_linear(layer, states), expected)
            torch.testing.assert_close(linear(states, layer.weight), expected - layer.bias)
            fused = linear_gelu(states, layer.weight, layer.bias, gelu)
            torch.testing.assert_close(fused, nn.functional.gelu(expected))
            assert apply_linear(layer.double(), states.double()).dtype == torch.float64
            layer.float()
            with torch.autocast("cpu", torch.bfloat16):
                assert apply_linear(layer, states).dtype == torch.bfloat16
            assert apply_linear(layer, states[:0]).shape == (0, 5, 96)
            handle = layer.register_forward_hook(lambda module, args, output: output + 1)
            torch.testing.assert_close(apply_linear(layer, states), expected + 1)
            handle.remove()
    assert not KERNELS.linear
    with use_onednn(KERNELS):  # a gradient is recorded
        apply_linear(layer, states).sum().backward()
    assert layer.weight.grad.abs().sum() > 0
