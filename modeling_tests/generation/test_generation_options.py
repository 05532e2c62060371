# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Drawn sets of `generate` options: a row's result depends on itself alone, and keeps what the options promise."""

import copy
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from testing_utils import batch_of_rows, small_model
from transformers.generation.logits_process import LogitsProcessorList, SuppressTokensLogitsProcessor

from yan_hf.solver import SOLVERS


TABLE = 24  # positions of the small models


@cache
def model_with(num_experts: int, backbone: str = "transformer"):
    model = small_model(num_experts=num_experts, encoder_backbone=backbone, flow_backbone=backbone)
    with torch.no_grad():
        model.lm_head.bias[model.config.eos_token_id] += 1.5  # writes end tokens now and then
    return model


@st.composite
def schedules(draw):
    kind = draw(st.sampled_from(["uniform", "cosine", "shifted", "list"]))
    if kind == "list":
        inner = sorted(set(draw(st.lists(st.integers(1, 99), max_size=3))))
        return {"time_schedule": [0.0, *(time / 100 for time in inner), 1.0]}
    schedule = {"time_schedule": kind, "num_inference_steps": draw(st.integers(1, 4))}
    if kind == "shifted":
        schedule["time_shift"] = draw(st.sampled_from([0.5, 3.0]))
    return schedule


@st.composite
def length_options(draw):
    kind = draw(st.sampled_from(["default", "limits", "candidates", "slack", "given", "one", "longest"]))
    if kind == "limits":
        longest = draw(st.integers(1, TABLE))
        return {"max_new_tokens": longest, "min_new_tokens": draw(st.integers(1, longest))}
    if kind == "candidates":
        longest = draw(st.sampled_from([2, 9, TABLE]))
        return {"num_length_candidates": draw(st.integers(2, 3)), "max_new_tokens": longest}
    return {
        "default": {},
        "slack": {"length_slack": 3},
        "given": {"target_lengths": "drawn"},
        "one": {"target_lengths": 1},
        "longest": {"target_lengths": TABLE},
    }[kind]


@st.composite
def reading_options(draw):
    options = {}
    if draw(st.booleans()):
        options = {"do_sample": True}
        options.update(draw(st.sampled_from([{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 0}])))
    if draw(st.booleans()):
        options["suppress_tokens"] = [3, 4, 7]
    return options


@st.composite
def option_sets(draw):
    return {
        **draw(schedules()),
        **draw(length_options()),
        **draw(reading_options()),
        "solver": draw(st.sampled_from(sorted(SOLVERS))),
        "num_return_sequences": draw(st.integers(1, 2)),
        "num_candidates": draw(st.integers(1, 2)),
        "rerank": draw(st.sampled_from(["score", "joint", "cycle", "mbr"])),
        "expert_selection": draw(st.sampled_from(["sample", "greedy"])),
        "expert_temperature": draw(st.sampled_from([0.5, 1.0, 2.0])),
        "init_noise": draw(st.sampled_from([0.0, 0.7, 1.0])),
    }


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    options=option_sets(),
    kind=st.sampled_from([(1, "transformer"), (4, "transformer"), (4, "mamba")]),
    source_lengths=st.lists(st.sampled_from([1, 2, 5, 11, TABLE]), min_size=1, max_size=3),
    side=st.sampled_from(["left", "right"]),
    extra=st.integers(0, 3),
    seed=st.integers(0, 2**40),
)
def test_a_row_does_not_depend_on_padding_neighbours_or_batch_size(options, kind, source_lengths, side, extra, seed):
    model = model_with(*kind)
    rows, ids, mask = batch_of_rows(source_lengths, side, extra, seed=seed % 1000)
    n = options["num_return_sequences"]
    seeds = [seed + index for index in range(len(rows) * n)]
    options = dict(options)
    lengths = None
    if options.get("target_lengths") == "drawn":
        lengths = [1 + (seed // (row + 1)) % TABLE for row in range(len(rows))]
        options["target_lengths"] = lengths
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_trajectory": True}
    asked["output_expert_indices"] = True
    batched = model.generate(ids, mask, seeds=seeds, **options, **asked)

    num_steps = options.get("num_inference_steps", len(options["time_schedule"]) - 1)
    assert batched.num_field_evaluations == num_steps * len(SOLVERS[options["solver"]].nodes)
    assert batched.trajectory.shape == (num_steps + 1, *batched.latents.shape)
    assert batched.sequences.shape == batched.latents.shape[:2] == batched.logits.shape[:2]
    assert (
        batched.lengths >= (1 if lengths or "target_lengths" in options else options.get("min_new_tokens", 1))
    ).all()
    assert (batched.lengths <= options.get("max_new_tokens", TABLE)).all()
    for row, source in enumerate(rows):
        single_options = dict(options)
        if lengths:
            single_options["target_lengths"] = lengths[row]
        single = model.generate(source[None], seeds=seeds[row * n : (row + 1) * n], **single_options, **asked)
        assert single.length_mode == batched.length_mode
        for sample in range(n):
            index, length = row * n + sample, int(single.lengths[sample])
            assert int(batched.lengths[index]) == length
            assert torch.equal(batched.sequences[index, :length], single.sequences[sample, :length])
            assert (batched.sequences[index, length:] == 0).all()
            assert torch.equal(batched.expert_indices[index, :length], single.expert_indices[sample, :length])
            if "suppress_tokens" in options:
                assert not set(options["suppress_tokens"]) & set(batched.sequences[index, :length].tolist())
            for name in ("latents", "logits"):
                torch.testing.assert_close(
                    getattr(batched, name)[index, :length],
                    getattr(single, name)[sample, :length],
                    rtol=1e-4,
                    atol=1e-5,
                )
            torch.testing.assert_close(
                batched.trajectory[:, index, :length], single.trajectory[:, sample, :length], rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(
                batched.sequence_scores[index], single.sequence_scores[sample], rtol=1e-4, atol=1e-5
            )


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
