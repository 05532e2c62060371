# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Models in int8: what is saved and loaded, rows that do not depend on their neighbours, what they refuse; and the
vocabulary's argmax, which is float32's."""

import json
import subprocess
import sys

import pytest
import torch
from testing_utils import batch_of_rows, small_model
from transformers import AutoModelForSeq2SeqLM
from transformers.quantizers import auto

from yan_hf import YanForConditionalGeneration, YanInt8Config
from yan_hf.inference import cpu_kernels, int8
from yan_hf.layers import KERNELS
from yan_hf.sampling import decode_tokens


# Wide enough that what stays in float32 is the small part that it is in real models.
WIDE = {"hidden_size": 128, "vocab_size": 2000, "initializer_range": 0.05}


def quantized(tmp_path, dtype: str = "float32", **changes):
    """A float32 model and the same one in int8."""
    model = small_model(**changes)
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "float")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "float", quantization_config=YanInt8Config(), dtype="auto"
    )
    return model, loaded


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"flow_backbone": "mamba"}], ids=str)
@pytest.mark.slow
def test_saved_small_and_loaded_in_a_new_process(tmp_path, changes):
    _, model = quantized(tmp_path, **WIDE, **changes)
    model.save_pretrained(tmp_path / "int8")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("int8", "float")]
    assert sizes[0] < 0.3 * sizes[1] or "flow_backbone" in changes  # a mixer's recurrence stays in float32
    call = {"target_lengths": 9, "seeds": [3], "input_ids": [[7, 8, 9]]}
    code = (
        "import sys, json, torch, yan_hf; from transformers import AutoModelForSeq2SeqLM\n"
        "model, call = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1]), json.loads(sys.argv[2])\n"
        "model.generate(torch.tensor(call.pop('input_ids')), **call).tolist()\n"
        "print(model.generate(torch.tensor([[7, 8, 9]]), **call).tolist())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "int8"), json.dumps(call)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ids = torch.tensor(call.pop("input_ids"))
    assert json.loads(printed) == model.generate(ids, **call).tolist()
    if changes.get("tie_word_embeddings"):
        reloaded = YanForConditionalGeneration.from_pretrained(tmp_path / "int8")
        assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
        assert reloaded.lm_head.weight_scale is reloaded.model.embed_tokens.weight_scale


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_close_to_the_float_model(tmp_path, dtype):
    model, loaded = quantized(tmp_path, dtype, **WIDE)
    ids = torch.randint(5, 2000, (3, 11), generator=torch.Generator().manual_seed(0))
    latents = torch.randn(3, 9, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.float()(ids, latents=latents)
        found = loaded(ids, latents=latents)
    assert loaded.dtype == torch.float32
    for name in ("logits", "expert_fields", "encoder_last_hidden_state"):
        difference = getattr(found, name) - getattr(expected, name)
        assert difference.norm() < 0.05 * getattr(expected, name).norm(), name


def test_every_large_weight_is_quantised(tmp_path):
    _, model = quantized(tmp_path)
    floats = {name for name, value in model.named_parameters() if value.dim() > 1 and value.is_floating_point()}
    kept = ("embed_positions", "length_head", "time_embedding", "gate.", "_proj_bias", "_proj_scale", "start_proj")
    assert not [name for name in floats if not any(part in name for part in kept)]


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"flow_backbone": "mamba"}], ids=str)
def test_a_model_that_is_rounded_before_keeps_its_weights(tmp_path, changes):
    model = small_model(**changes)
    before = {name: value.clone() for name, value in model.named_parameters()}
    int8.round_to_int8(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, quantization_config=YanInt8Config())
    kept = dict(loaded.named_parameters())
    for name, weight in model.named_parameters():
        if kept[name].dtype == torch.int8:
            assert not torch.equal(weight, before[name]), name
            scale = kept.get(f"{name}_scale")
            torch.testing.assert_close(kept[name] * scale[..., None], weight, rtol=1e-5, atol=1e-7, msg=name)
        else:
            assert torch.equal(weight, before[name]) and torch.equal(kept[name], weight), name


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_depends_neither_on_padding_nor_on_the_batch(tmp_path, side):
    _, model = quantized(tmp_path)
    rows, ids, mask = batch_of_rows([5, 12, 9], side, extra=3)
    # A neighbour with far larger states would change a scale that were shared.
    together = model.generate(ids, attention_mask=mask, target_lengths=torch.tensor([7, 15, 10]), seeds=[1, 2, 3])
    for row, length, seed, expected in zip(rows, (7, 15, 10), (1, 2, 3), together):
        alone = model.generate(row[None], target_lengths=length, seeds=[seed])
        assert alone[0].tolist() == expected[: alone.shape[1]].tolist()
    states = torch.randn(4, 32)
    layer = model.model.decoder.layers[0].feed_forward.up_proj
    with torch.no_grad():
        scaled = layer(torch.cat([states, 1000 * states]))
        assert torch.equal(scaled[:4], layer(states))
        assert torch.equal(scaled[2:3], layer(states[2:3]))


def test_it_refuses_what_it_cannot_do(tmp_path, monkeypatch):
    model, loaded = quantized(tmp_path)
    ids = torch.tensor([[7, 8, 9]])
    with pytest.raises(RuntimeError, match="no gradients"):
        loaded(ids, latents=torch.randn(1, 5, 32, requires_grad=True))
    with pytest.raises(RuntimeError, match="quantised"):
        loaded.enable_expert_offload(2)
    with pytest.raises(RuntimeError, match="on the CPU alone"), torch.no_grad():
        int8.int8_linear(torch.ones(1, 4, device="meta"), torch.ones(2, 4, dtype=torch.int8), torch.ones(2))
    with pytest.raises(ValueError, match="`device_map` has cuda"):
        YanForConditionalGeneration.from_pretrained(
            tmp_path / "float", quantization_config=YanInt8Config(), device_map="cuda"
        )
    with pytest.raises(ValueError, match="no field 'bits'"):
        YanInt8Config(bits=4)
    loaded.save_pretrained(tmp_path / "int8")
    with torch.no_grad():
        model.lm_head.weight[3, 4] = torch.nan
    model.save_pretrained(tmp_path / "float")
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        YanForConditionalGeneration.from_pretrained(tmp_path / "float", quantization_config=YanInt8Config())
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, int8.METHOD)
    with pytest.raises(ImportError, match="pip install yan-hf"):
        YanForConditionalGeneration.from_pretrained(tmp_path / "int8")


def confusing_head(vocab_size: int, spread: float) -> tuple[torch.nn.Linear, torch.Tensor]:
    """A head with two good tokens for every state, which differ by `spread`: in 8 bits they change places."""
    torch.manual_seed(0)
    head, states = torch.nn.Linear(128, vocab_size), torch.randn(40, 128)
    with torch.no_grad():
        head.weight.normal_(std=0.05).mul_(torch.rand(vocab_size, 1) + 0.5)
        head.weight[-40:] = 0.05 * states
        head.weight[:40] = head.weight[-40:] + 0.05 * spread * torch.randn(40, 128)
        head.bias.normal_(std=0.05)
        head.bias[:40] = head.bias[-40:]
    return head, states


@pytest.mark.parametrize("vocab_size", [40_000, 40_003])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 1e-2])
def test_the_argmax_in_int8_is_that_in_float32(monkeypatch, vocab_size, spread):
    head, states = confusing_head(vocab_size, spread)
    found = []
    with torch.no_grad(), cpu_kernels.use_onednn(KERNELS):
        monkeypatch.setattr(KERNELS, "argmax", lambda *given: found.append(int8.exact_argmax(*given)) or found[-1])
        tokens = decode_tokens(head, states[None]).tokens[0]
        logits, expected = head(states).max(dim=-1)
        (integers, _), (weight, scale) = int8.quantize_rows(states), int8.quantize_rows(head.weight)
    assert torch.equal(tokens, expected)  # of equal ones the first
    assert torch.equal(tokens, found[0][0])
    assert torch.allclose(found[0][1], logits, atol=1e-4)
    unchecked = torch._int_mm(integers, weight.T) * scale
    assert spread != 1e-3 or not torch.equal(unchecked.argmax(dim=-1), tokens)  # what the check is for


def test_the_argmax_sees_changed_weights_and_leaves_what_is_not_for_it():
    head, states = confusing_head(40_000, 1e-2)
    with torch.no_grad():
        for _ in range(2):
            tokens, _ = int8.exact_argmax(states, head.weight, None, 8192)
            assert torch.equal(tokens, (states @ head.weight.T).argmax(dim=-1))
            head.weight[: len(states)] *= -1
        head.weight.data.copy_(torch.randn_like(head.weight))  # counts as no new version
        tokens, _ = int8.exact_argmax(states, head.weight, None, 8192)
        assert torch.equal(tokens, (states @ head.weight.T).argmax(dim=-1))
        assert int8.exact_argmax(states.index_fill(0, torch.tensor(2), torch.nan), head.weight, None, 8192) is None
        assert int8.exact_argmax(states, torch.nn.Parameter(head.weight[:100]), None, 8192) is None
        assert int8.exact_argmax(torch.zeros_like(states), head.weight, None, 8192) is None  # all are equal
    with cpu_kernels.use_onednn(KERNELS):
        assert KERNELS.argmax(states, head.weight, head.bias, 8192) is None  # a gradient is recorded
    with torch.inference_mode():  # whose tensors have no version
        weight = torch.nn.Parameter(head.weight.clone())
        tokens, _ = int8.exact_argmax(states, weight, None, 8192)
    assert torch.equal(tokens, (states @ weight.T).argmax(dim=-1))
