# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Converted checkpoints compute what `research_reference.py`, written from the paper, computes: in float32 to 1e-5."""

from unittest.mock import patch

import pytest
import torch
from research_reference import Reference, random_checkpoint

from yan_hf import YanForConditionalGeneration, convert_research_checkpoint
from yan_hf.experts import choose_experts


SHAPES = {
    "plain": {},
    "biases, one expert, no decoder blocks": {"qkv_bias": True, "moe_n_experts": 1, "decoder_n_resi_blocks": 0},
    "no cross-attention in the middle, four heads": {"cross_att_idx": [1], "attention_heads": 4, "d_model": 24},
    "no cross-attention, one step": {"cross_att_idx": [], "ode_steps": 2, "moe_n_experts": 5},
    "all cross-attention, deep": {"cross_att_idx": [0, 1, 2, 3], "n_trf_blocks": 4, "encoder_n_trf_blocks": 3},
    "mamba": {"encoder_use_mamba": True, "flow_use_mamba": True},
    "mamba encoder": {"encoder_use_mamba": True, "mamba_d_conv": 4, "mamba_d_state": 7, "d_model": 32},
    "mamba flow": {"flow_use_mamba": True, "mamba_expand": 1, "mamba_ff_mult": 2, "qkv_bias": True},
}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory):
    """The reference and the converted model of one checkpoint."""
    folder = tmp_path_factory.mktemp("research")
    checkpoint = random_checkpoint(seed=len(request.param), **SHAPES[request.param])
    torch.save(checkpoint, folder / "research.pt")
    convert_research_checkpoint(folder / "research.pt", folder / "model")
    return Reference(checkpoint), YanForConditionalGeneration.from_pretrained(folder / "model")


def tokens(length, seed=0):
    return torch.randint(5, 40, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [1, 2, 7, 20])
def test_encoder(pair, length):
    reference, model = pair
    ids = tokens(length)
    torch.testing.assert_close(
        model.model.encode(ids[None]).last_hidden_state[0], reference.encode(ids).float(), **CLOSE
    )


@pytest.mark.parametrize("time", [0.0, 0.37, 1.0])
def test_gate_and_every_experts_field(pair, time):
    reference, model = pair
    source, z = tokens(6), torch.randn(9, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    fields, gate = reference.flow(z.double(), time, reference.encode(source))
    output = model(source[None], latents=z[None], timesteps=torch.tensor([time]))
    # Of fields over 8 the small entries are sums of large ones, which other processors round otherwise.
    close = {**CLOSE, "atol": CLOSE["atol"] * max(1.0, float(fields.abs().max()) / 8)}
    torch.testing.assert_close(output.expert_fields[0].transpose(0, 1), fields.float(), **close)
    torch.testing.assert_close(output.gate_logits[0].softmax(-1), gate.float(), **CLOSE)


def test_decoder(pair):
    reference, model = pair
    z = torch.randn(5, model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model.decode(z[None])[0], reference.decode(z.double()).float(), **CLOSE)


@pytest.mark.parametrize("length", [1, 8])
def test_trajectory_and_tokens_of_generate(pair, length):
    """The same start and experts; the number of steps comes from the checkpoint: its grid points minus one."""
    reference, model = pair
    source = tokens(7, seed=3)
    generator = torch.Generator().manual_seed(4)
    z0 = torch.randn(length, model.config.hidden_size, generator=generator)
    experts = torch.randint(model.config.num_experts, (length,), generator=generator)
    expected = reference.sample(reference.encode(source), z0.double(), experts)
    output = model.generate(
        source[None],
        target_lengths=length,
        initial_latents=z0[None],
        expert_indices=experts[None],
        return_dict_in_generate=True,
        output_trajectory=True,
        output_scores=True,
    )
    assert output.num_field_evaluations == reference.config["ode_steps"] - 1
    torch.testing.assert_close(output.trajectory[:, 0], expected.float(), **CLOSE)
    logits = reference.decode(expected[-1])
    torch.testing.assert_close(output.logits[0], logits.float(), rtol=1e-5, atol=2e-5)
    kept = int(output.lengths[0])
    assert output.sequences[0, :kept].tolist() == logits.argmax(-1)[:kept].tolist()


def test_all_seven_loss_terms(pair):
    """The draws of the model's loss are recorded and given to the reference; rows have different lengths."""
    reference, model = pair
    sources, targets = [tokens(6, 5), tokens(4, 6)], [tokens(5, 7), tokens(3, 8)]
    ids, mask = torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long)
    labels = torch.full((2, 5), -100)
    for row, (source, target) in enumerate(zip(sources, targets)):
        ids[row, : len(source)], mask[row, : len(source)] = source, 1
        labels[row, : len(target)] = target
    # The reference has no padding, so neither must Mamba scan it.
    model = YanForConditionalGeneration.from_pretrained(model.config._name_or_path, mamba_padding="exact")
    drawn = []

    def recorded(function):
        def draw(*arguments, **keywords):
            drawn.append(function(*arguments, **keywords))
            return drawn[-1]

        return draw

    model.config.loss_weights = dict.fromkeys(model.config.loss_weights, 1.0) | {"reconstruction": 0.0}
    with patch("torch.rand", recorded(torch.rand)), patch("torch.randn", recorded(torch.randn)):
        terms = model.eval()(ids, mask, labels=labels).loss_terms
    times, noise, uniform = drawn
    noise = [noise[row, : len(target)].double() for row, target in enumerate(targets)]
    experts = []
    for row, (source, target) in enumerate(zip(sources, targets)):
        start = reference.config["init_noise"] * noise[row]
        gate = reference.flow(start, 0.0, reference.encode(source))[1]
        experts.append(choose_experts(gate.log()[None].float(), uniform[row : row + 1, : len(target)])[0])
    expected = reference.losses(sources, targets, times.double(), noise, experts)
    assert set(expected) == set(terms) - {"length"}
    for name, value in expected.items():
        torch.testing.assert_close(
            terms[name],
            value.to(terms[name].dtype),
            rtol=1e-5,
            atol=1e-5,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_auto_encoder_logits(tmp_path):
    checkpoint = random_checkpoint(auto_encoder=True)
    torch.save(checkpoint, tmp_path / "research.pt")
    model, reference = convert_research_checkpoint(tmp_path / "research.pt", tmp_path / "model"), Reference(checkpoint)
    ids = tokens(9)
    torch.testing.assert_close(model(ids[None]).logits[0], reference.decode(reference.encode(ids)).float(), **CLOSE)
