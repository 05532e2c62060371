# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Forward and training on the meta device, where a value read back to the host and a tensor made elsewhere are errors:
what runs there issues its work on a CUDA device without a stop.
"""

import re
from pathlib import Path

import pytest
import torch
from testing_utils import ENCODER, ENCODER_READS, NoHost, small_config

from yan_hf import YanForAutoEncoding, YanForConditionalGeneration
from yan_hf.losses import MMD_MAX_POINTS, fused_token_loss, mmd_loss
from yan_hf.selective_scan import _scan_backward, _scan_forward


BLOCKS = {"routing": "block", "routing_block_size": 3, "core_threshold": 0.6}
MODELS = {
    "paper": {},
    "eager attention": {"attn_implementation": "eager"},
    "dropout": {"hidden_dropout": 0.1, "attention_dropout": 0.1, "embedding_dropout": 0.1, "latent_noise": 0.1},
    "beta times": {"time_beta": (2.0, 1.0), "solver_steps_range": (1, 3)},
    "one pass": {"loss_weights": {"latent": 0.0, "token": 0.0}},
    "every term": {"loss_weights": {"mmd": 1.0, "l2": 1.0, "reconstruction": 1.0}, "label_smoothing": 0.1},
    "block routing": BLOCKS,
    "mamba": {"encoder_backbone": "mamba", "flow_backbone": "mamba"},
    "stretched": {"start_state": "stretched"},
    "aligned": {"start_state": "aligned", "mask_token_id": 4},
    "fertility": {"start_state": "fertility"},
    "block scope": {"expert_scope": "block", "routing_block_size": 3},
    "target scope": {"expert_scope": "target", "loss_weights": {"gate": 1.0}},
    "reselected": {"expert_scope": "target", "reselect_experts": True},
    "keep known": {"start_state": "aligned", "mask_token_id": 4, "keep_known": True, "eos_token_id": None},
    "pretrained encoder": {"encoder_config": ENCODER},
}
# What training reads by design: the distinct tokens of a batch, among which winners are sought instead of in the whole
# vocabulary, and, with `keep_known`, how many tokens are fillings.
READS = {
    "_winner_tokens": lambda labels: labels.flatten()[:5],
    "_decode_counted": lambda values, mask: values.flatten(0, 1)[:5],
    "_token": lambda values, mask: values.flatten(0, 1)[:5],
}
# How often: a few tokens twice, alone and with others.
READERS = {name: {"_winner_tokens": 2} for name in ("block scope", "target scope", "reselected")}
READERS["keep known"] = {"_decode_counted": 1, "_token": 4}
READERS["pretrained encoder"] = dict.fromkeys(ENCODER_READS, 2)


# All in bfloat16, and what has parts in other precisions in the others too.
CASES = [(name, torch.bfloat16) for name in MODELS]
CASES += [(name, dtype) for name in ("paper", "target scope", "mamba") for dtype in (torch.float32, torch.float16)]


def meta_model(fields, dtype=torch.float32):
    fields = dict(fields)
    attention = fields.pop("attn_implementation", "sdpa")
    with torch.device("meta"):
        model = YanForConditionalGeneration(small_config(**fields)).to(dtype).eval()
    model.set_attn_implementation(attention)
    return model


def batch(start_state="noise"):
    ids = torch.zeros(2, 7, dtype=torch.long, device="meta")
    labels = {"token_lengths": torch.ones_like(ids)} if start_state in ("aligned", "fertility") else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {"labels": ids, **labels}


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_forward(name, dtype):
    model, (source, _) = meta_model(MODELS[name], dtype), batch()
    with NoHost(ENCODER_READS if name == "pretrained encoder" else {}):
        outputs = [model(**source), model(source["input_ids"])]
        state = torch.zeros(2, 5, 32, device="meta", dtype=dtype)
        outputs.append(model(**source, latents=state, timesteps=torch.zeros(2, device="meta", dtype=torch.float32)))
    for output in outputs:
        values = (output.logits, output.velocity, output.gate_logits, output.encoder_last_hidden_state)
        assert {(value.device.type, value.dtype) for value in values} == {("meta", dtype)}


# A step of training takes a second: the daily run has one for each way of choosing experts and each backbone.
DAILY = ("paper", "block scope", "target scope", "mamba", "pretrained encoder")
STEPS = [
    case if case[0] in DAILY and case[1] == torch.bfloat16 else pytest.param(*case, marks=pytest.mark.slow)
    for case in CASES
]


@pytest.mark.parametrize(("name", "dtype"), STEPS)
def test_training_step(name, dtype):
    model = meta_model(MODELS[name], dtype).train()
    source, target = batch(model.config.start_state)
    with NoHost({**READS, **ENCODER_READS}) as mode:
        output = model(**source, **target)
        output.loss.backward()
    assert mode.seen == READERS.get(name, {})
    assert output.loss.dtype == torch.float32 and output.logits.dtype == dtype
    gradients = {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None}
    assert gradients == {parameter.dtype for parameter in model.parameters()}


@pytest.mark.parametrize("sparse_prediction", [False, True])
def test_auto_encoding(sparse_prediction):
    with torch.device("meta"):
        model = YanForAutoEncoding(small_config())
    source, target = batch()
    reads = {"forward": lambda values, mask: values.flatten(0, 1)} if sparse_prediction else {}
    with NoHost(reads) as mode:
        model(**source, **target, sparse_prediction=sparse_prediction).loss.backward()
    assert set(mode.seen) == set(reads)


def test_the_mmd_of_more_points_than_it_takes():
    latents = torch.zeros(3, MMD_MAX_POINTS, 4, device="meta", requires_grad=True)
    with NoHost():
        mmd_loss(latents, torch.ones(latents.shape[:2], device="meta")).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_loss(dtype):
    head = torch.nn.Linear(8, 60, device="meta", dtype=dtype)
    states = torch.zeros(5, 8, device="meta", dtype=dtype, requires_grad=True)
    labels, mask = torch.zeros(5, dtype=torch.long, device="meta"), torch.ones(5, device="meta")
    for has_weights in (False, True):
        with NoHost():
            fused_token_loss(states, head, labels, mask, has_weights).backward()


def test_the_scan_in_chunks():
    """What an operator hides from the model's own forward; off the CPU it runs by doubling."""
    values = {"u": (2, 70, 4), "delta": (2, 70, 4), "A": (4, 3), "B": (2, 70, 3), "C": (2, 70, 3)}
    inputs = [torch.zeros(shape, device="meta") for shape in values.values()]
    with NoHost():
        output, borders = _scan_forward(*inputs, True)
        gradients = _scan_backward(output, *inputs, borders)
    assert output.is_meta and all(gradient.is_meta for gradient in gradients)


def test_every_gpu_test_names_its_twin():
    for path in Path(__file__).parents[1].rglob("test_*.py"):
        for before in re.findall(r"(.*)\n@pytest\.mark\.gpu\n", path.read_text()):
            assert before.startswith("# On the meta device: "), path
