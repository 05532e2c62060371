# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`velocity_field="mixture"`: the sampler follows the mean of all experts, and refuses what chooses among them."""

import pytest
import torch
from testing_utils import batch_of_rows, small_config, small_model

from yan_hf import YanForConditionalGeneration


BACKBONES = ("transformer", "mamba")


def mixture_model(**changes):
    return small_model(**{"velocity_field": "mixture", **changes})


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_euler_steps_follow_the_mean_of_all_experts(backbone):
    model = mixture_model(encoder_backbone=backbone, flow_backbone=backbone)
    _, ids, mask = batch_of_rows([6, 4], "left")
    state = torch.randn(2, 5, 32)
    canvas = (torch.arange(5) < torch.tensor([[5], [3]])).long()
    latents = state
    for step in range(4):
        times = torch.full((2,), step / 4)
        output = model(ids, mask, latents=latents, timesteps=times, decoder_attention_mask=canvas)
        gate = output.gate_logits.softmax(dim=-1)
        mean = (gate[..., None] * output.expert_fields).sum(dim=2)
        latents = torch.where(canvas[..., None].bool(), latents + mean / 4, latents)
    found = model.generate(
        ids, mask, initial_latents=state, target_lengths=[5, 3], num_inference_steps=4, return_dict_in_generate=True
    )
    for row, length in enumerate((5, 3)):
        torch.testing.assert_close(found.latents[row, :length], latents[row, :length], rtol=1e-4, atol=1e-4)
    assert found.num_field_evaluations == 4


@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_row_does_not_depend_on_its_batch(backbone, side):
    model = mixture_model(encoder_backbone=backbone, flow_backbone=backbone)
    rows, ids, mask = batch_of_rows([3, 9, 6], side, extra=2)
    options = {"num_length_candidates": 2, "num_candidates": 2, "rerank": "mbr", "return_dict_in_generate": True}
    batched = model.generate(ids, mask, seeds=[4, 5, 6], **options)
    for index, row in enumerate(rows):
        single = model.generate(row[None], seeds=[4 + index], **options)
        length = int(single.lengths[0])
        assert batched.sequences[index, :length].tolist() == single.sequences[0, :length].tolist()
        torch.testing.assert_close(batched.sequence_scores[index], single.sequence_scores[0], rtol=1e-4, atol=1e-5)


def test_one_expert_is_its_own_mean():
    _, ids, mask = batch_of_rows([5, 7])
    found = [
        small_model(num_experts=1, velocity_field=field).generate(
            ids, mask, seeds=[0, 1], return_dict_in_generate=True
        )
        for field in ("expert", "mixture")
    ]
    torch.testing.assert_close(found[0].latents, found[1].latents)


def test_training_unrolls_the_mean_and_the_tokens_teach_the_gate():
    """A held expert passes the gate no gradient from the tokens; the mean does."""
    weights = dict.fromkeys(["flow", "latent", "gate_entropy", "load_balance", "mmd", "l2", "length"], 0)
    _, ids, mask = batch_of_rows([5, 3])
    labels = torch.tensor([[7, 8, 2], [9, 2, -100]])
    for field in ("expert", "mixture"):
        model = small_model(velocity_field=field, loss_weights=weights)
        model(ids, mask, labels=labels).loss.backward()
        gradient = model.model.flow.gate.down_proj.weight.grad
        assert (gradient is not None and bool(gradient.any())) == (field == "mixture")


def test_what_chooses_experts_is_refused():
    model = mixture_model()
    _, ids, mask = batch_of_rows([5, 3])
    for option in (
        {"expert_indices": torch.zeros(2, 4, dtype=torch.long)},
        {"expert_selection": "greedy"},
        {"expert_temperature": 0.5},
        {"routing": "block"},
        {"output_expert_indices": True, "return_dict_in_generate": True},
        {"output_routing": True, "return_dict_in_generate": True},
    ):
        name = next(iter(option))
        with pytest.raises(ValueError, match=f"`{name}`.*velocity_field"):
            model.generate(ids, mask, **option)
    with pytest.raises(ValueError, match="velocity_field"):
        model.enable_expert_offload(2)
    with pytest.raises(ValueError, match="`routing=.*velocity_field"):
        small_config(velocity_field="mixture", routing="block")
    with pytest.raises(ValueError, match="`velocity_field`.*'mean'"):
        small_config(velocity_field="mean")


def test_save_and_load_keep_the_field(tmp_path):
    model = mixture_model()
    _, ids, mask = batch_of_rows([5, 3])
    expected = model.generate(ids, mask, seeds=[0, 1])
    model.save_pretrained(tmp_path)
    loaded = YanForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.velocity_field == "mixture"
    assert torch.equal(loaded.generate(ids, mask, seeds=[0, 1]), expected)


def test_compiled_sampler_follows_it_too():
    model = mixture_model()
    _, ids, mask = batch_of_rows([5, 3])
    options = {"seeds": [0, 1], "target_lengths": [4, 3], "return_dict_in_generate": True}
    plain = model.generate(ids, mask, **options)
    compiled = model.generate(ids, mask, compile=True, compile_config={"backend": "eager"}, **options)
    torch.testing.assert_close(compiled.latents, plain.latents, rtol=1e-4, atol=1e-5)
