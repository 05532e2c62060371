# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Wrong input raises, with the argument's name; it never gives a wrong answer silently."""

import pytest
import torch
from testing_utils import batch_of_rows, small_config

from yan_hf import YanForAutoEncoding


CALLS = ["forward", "generate", "loss", "base"]


def call(model, how, input_ids=None, attention_mask=None, **kwargs):
    if how == "generate":
        return model.generate(input_ids, attention_mask, **kwargs)
    if how == "base":
        return model.model(input_ids, attention_mask, **kwargs)
    if how == "loss":
        rows = len(input_ids) if input_ids is not None and input_ids.dim() == 2 else 1
        kwargs["labels"] = torch.full((rows, 3), 7)
    return model(input_ids, attention_mask, **kwargs)


@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("bad", [60, -1])
def test_ids_out_of_range(model, how, bad):
    with pytest.raises(ValueError, match=f"input_ids.*{bad}.*60"):
        call(model, how, torch.tensor([[5, bad]]))


@pytest.mark.parametrize("how", CALLS)
def test_ids_of_another_type(model, how):
    with pytest.raises(TypeError, match="input_ids"):
        call(model, how, torch.tensor([[5.0, 6.0]]))


@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("shape", [(1, 0), (0, 4)])
def test_empty_source(model, how, shape):
    with pytest.raises(ValueError, match="empty"):
        call(model, how, torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("how", CALLS)
def test_missing_source(model, how):
    with pytest.raises(ValueError, match="input_ids"):
        call(model, how)


@pytest.mark.parametrize("how", CALLS)
def test_one_dimension_too_few(model, how):
    with pytest.raises(ValueError, match="batch dimension"):
        call(model, how, torch.tensor([5, 6]))


@pytest.mark.parametrize("how", ["forward", "generate", "loss"])
def test_all_padding_row(model, how):
    _, ids, mask = batch_of_rows([3, 4])
    mask[1] = 0
    with pytest.raises(ValueError, match="Row 1"):
        call(model, how, ids, mask)


@pytest.mark.parametrize("how", CALLS)
def test_mask_of_another_shape(model, how):
    _, ids, mask = batch_of_rows([3, 4])
    with pytest.raises(ValueError, match="attention_mask"):
        call(model, how, ids, mask[:, :3])


@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("shape", [(4,), (2,), (2, 1), (1, 2, 4), (2, 1, 4, 4)])
def test_mask_with_other_dimensions(model, how, shape):
    _, ids, _ = batch_of_rows([3, 4])
    with pytest.raises(ValueError, match="attention_mask"):
        call(model, how, ids, torch.ones(shape, dtype=torch.long))


@pytest.mark.parametrize("how", CALLS)
def test_source_longer_than_the_position_table(model, how):
    ids = torch.full((1, 25), 7)
    with pytest.raises(ValueError, match="25.*max_position_embeddings=24"):
        call(model, how, ids)
    mask = torch.ones_like(ids)
    with pytest.raises(ValueError, match="25.*max_position_embeddings=24"):
        call(model, how, ids, mask)
    # Padding is no part of the length.
    mask[:, 0] = 0
    call(model, how, ids, mask)


def test_labels(model):
    ids = torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match="labels.*25"):
        model(ids, labels=torch.full((1, 25), 7))
    with pytest.raises(ValueError, match="labels.*60"):
        model(ids, labels=torch.tensor([[5, 60]]))
    with pytest.raises(ValueError, match="labels.*-3"):
        model(ids, labels=torch.tensor([[5, -3]]))
    with pytest.raises(ValueError, match="labels"):
        model(ids, labels=torch.full((2, 3), 7))
    with pytest.raises(ValueError, match="decoder_attention_mask"):
        model(ids, labels=torch.full((1, 3), 7), decoder_attention_mask=torch.ones(1, 4))
    model(ids, labels=torch.nn.functional.pad(torch.full((1, 24), 7), (0, 5), value=-100))


def test_token_weights(model):
    ids = torch.tensor([[5, 6]])
    for weights in (torch.ones(2), torch.ones(1, 3), torch.tensor([[1.0, -1.0]])):
        with pytest.raises(ValueError, match="token_weights"):
            model(ids, labels=ids, token_weights=weights)


def test_label_types(model):
    ids = torch.tensor([[5, 6]])
    assert model(ids, labels=ids.int()).loss == model(ids, labels=ids).loss


def test_state_of_another_shape(model):
    ids = torch.tensor([[5, 6], [7, 8]])
    state, times = torch.randn(2, 4, 32), torch.zeros(2)
    for name, inputs in {
        "latents": {"latents": state[:1], "timesteps": times},
        "timesteps": {"latents": state, "timesteps": times[:1]},
        "decoder_attention_mask": {"latents": state, "decoder_attention_mask": torch.ones(2, 3)},
        "timesteps. must be in": {"latents": state, "timesteps": torch.tensor([0.5, 1.5])},
    }.items():
        with pytest.raises(ValueError, match=name):
            model(ids, **inputs)
    with pytest.raises(ValueError, match="labels"):
        model(ids, labels=ids, latents=state)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "parameter",
    [
        "lm_head.bias",
        "model.embed_positions.weight",
        "model.flow.norm.weight",
        "model.flow.gate.down_proj.weight",
        "length_head.down_proj.bias",
        "length_head.up_proj.weight",
        "model.encoder.layers.0.self_attn.v_proj.weight",
    ],
)
def test_non_finite_weights_are_found_at_generation(model, parameter, value):
    with torch.no_grad():
        model.get_parameter(parameter).fill_(value)
    with pytest.raises(ValueError, match="not finite"):
        model.generate(torch.tensor([[5, 6]]))


def test_auto_encoder_checks_too():
    model = YanForAutoEncoding(small_config())
    ids = torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match="input_ids"):
        model(torch.tensor([[5, 60]]))
    with pytest.raises(ValueError, match="labels"):
        model(ids, labels=torch.full((1, 3), 7))
    with pytest.raises(ValueError, match="25"):
        model(torch.full((1, 25), 7))
