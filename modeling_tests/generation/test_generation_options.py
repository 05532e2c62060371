# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`generate` with its options in other precisions, on other devices, and what memory it takes."""

import copy
from functools import cache

import pytest
import torch
from testing_utils import batch_of_rows, small_model
from transformers.generation.logits_process import LogitsProcessorList, SuppressTokensLogitsProcessor


@cache
def model_with(num_experts: int, backbone: str = "transformer"):
    model = small_model(num_experts=num_experts, encoder_backbone=backbone, flow_backbone=backbone)
    with torch.no_grad():
        model.lm_head.bias[model.config.eos_token_id] += 1.5  # writes end tokens now and then
    return model


OPTIONS = [
    {"solver": "midpoint"},
    {"solver": "heun", "time_schedule": "cosine"},
    {"solver": "rk4", "num_inference_steps": 1},
    {"time_schedule": [0.0, 0.2, 1.0]},
    {"num_candidates": 3, "rerank": "mbr"},
    {"do_sample": True, "top_k": 5},
    {"logits_processor": LogitsProcessorList([SuppressTokensLogitsProcessor([5, 6])])},
    {"num_return_sequences": 2},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_bfloat16_is_float32_within_its_precision(options):
    """The latents of the same noise and experts; tokens are left out, since near ties may fall either way."""
    model = model_with(4)
    half = copy.deepcopy(model).bfloat16()
    _, ids, mask = batch_of_rows([4, 9])
    count = options.get("num_return_sequences", 1)
    generator = torch.Generator().manual_seed(0)
    fixed = {
        "target_lengths": 8,
        "initial_latents": torch.randn(2 * count, 8, 32, generator=generator),
        "expert_indices": torch.randint(0, 4, (2 * count, 8), generator=generator),
        "seeds": list(range(2 * count)),
        "return_dict_in_generate": True,
    }
    expected = model.generate(ids, mask, **fixed, **options)
    result = half.generate(ids, mask, **fixed, **options)
    assert result.latents.dtype == torch.bfloat16 and result.sequence_scores.dtype == torch.float32
    difference = (result.latents.float() - expected.latents).abs().mean() / expected.latents.abs().mean()
    assert float(difference) < 0.05


# On the meta device: `test_generate_on_meta.py`, with seeds; values cannot be compared there.
@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"num_length_candidates": 2}, *OPTIONS])
def test_a_seed_means_the_same_on_another_device(options):
    model = model_with(4)
    _, ids, mask = batch_of_rows([4, 9])
    arguments = {"seeds": list(range(2 * options.get("num_return_sequences", 1))), "return_dict_in_generate": True}
    expected = model.generate(ids, mask, **arguments, **options)
    result = copy.deepcopy(model).cuda().generate(ids.cuda(), mask.cuda(), **arguments, **options)
    assert torch.equal(result.sequences.cpu(), expected.sequences)
    torch.testing.assert_close(result.latents.cpu(), expected.latents, rtol=1e-3, atol=1e-3)


def test_a_moved_model_gives_the_same(model):
    """To another dtype and back, and through the meta device's counterpart, a state dict: nothing is left behind."""
    _, ids, mask = batch_of_rows([4, 9])
    expected = model.generate(ids, mask, seeds=[1, 2])
    moved = copy.deepcopy(model).double().float()
    assert torch.equal(moved.generate(ids, mask, seeds=[1, 2]), expected)
    double = copy.deepcopy(model).double().generate(ids, mask, seeds=[1, 2], return_dict_in_generate=True)
    assert double.latents.dtype == torch.float64 and torch.equal(double.sequences, expected)
    with torch.device("meta"):
        empty = type(model)(copy.deepcopy(model.config)).eval()
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty.generate(ids, mask, seeds=[1, 2]), expected)


def peak_bytes(run) -> int:
    """Most bytes of tensors alive at once, beyond those before the call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    alive = highest = 0
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        highest = max(highest, alive)
    return highest


def test_memory_does_not_grow_with_the_steps_unless_a_trajectory_is_asked_for():
    model = small_model(max_position_embeddings=256)
    _, ids, mask = batch_of_rows([4, 9])

    def peak(steps, **options):
        return peak_bytes(
            lambda: model.generate(ids, mask, num_inference_steps=steps, target_lengths=256, seeds=[0, 1], **options)
        )

    peak(2)
    short, long = peak(2), peak(32)
    state_bytes = 2 * 256 * 32 * 4
    assert long - short < state_bytes  # time embeddings of the steps, but no state
    kept = peak(32, output_trajectory=True, return_dict_in_generate=True)
    assert kept - peak(2, output_trajectory=True, return_dict_in_generate=True) > 25 * state_bytes


def test_logits_of_a_batch_are_not_held_at_once():
    """Without `output_scores` only a block of logits is alive, however many tokens there are."""
    model = small_model(vocab_size=5000, max_position_embeddings=512)
    _, ids, mask = batch_of_rows([4] * 8)
    whole = 8 * 512 * 5000 * 4
    assert peak_bytes(lambda: model.generate(ids, mask, target_lengths=512)) < whole / 2
    assert peak_bytes(lambda: model.generate(ids, mask, target_lengths=512, output_scores=True)) > whole
