# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""torchao's weights in 8 bits: what is quantised, saved and loaded; and the error without torchao."""

import importlib
import json
import subprocess
import sys

import pytest
import torch
from testing_utils import batch_of_rows, small_model
from transformers import AutoModelForSeq2SeqLM
from transformers.utils import is_torchao_available

from yan_hf import YanForConditionalGeneration, YanInt8WeightOnlyConfig


WIDE = {"hidden_size": 128, "vocab_size": 2000, "initializer_range": 0.05}
needs_torchao = pytest.mark.skipif(not is_torchao_available(), reason="needs torchao: pip install -e .[torchao]")


def quantized(folder, dtype=torch.float32, **changes):
    """A float model, and the same one quantised."""
    model = small_model(**WIDE, **changes).to(dtype)
    model.save_pretrained(folder)
    config = YanInt8WeightOnlyConfig()
    return model, AutoModelForSeq2SeqLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def kinds(model):
    """Which parameters are quantised, and which are floats, without numbers of layers."""
    names = [{}, {}]
    for name, parameter in model.named_parameters():
        key = ".".join("#" if part.isdigit() else part for part in name.split("."))
        names["Int8" in type(parameter).__name__][key] = parameter.dim()
    return names


@needs_torchao
@pytest.mark.parametrize("changes", [{}, {"flow_backbone": "mamba"}], ids=str)
def test_experts_head_and_embeddings_are_quantised(tmp_path, changes):
    floats, integers = kinds(quantized(tmp_path, **changes)[1])
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.flow.experts.up_proj"} <= set(integers)
    assert {"model.flow.experts.down_proj", "model.encoder.layers.#.self_attn.q_proj.weight"} <= set(integers)
    large = {name for name, dim in floats.items() if dim > 1}
    once = ("length_head.", "gate.", "time_embedding.", "embed_positions.", "A_log", "conv1d", "up_proj_bias")
    assert all(any(part in name for part in (*once, "down_proj_bias")) for name in large), large


@needs_torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_close_to_the_float_model(tmp_path, dtype):
    model, other = quantized(tmp_path, dtype)
    _, ids, mask = batch_of_rows([3, 6])
    results = []
    for each in (model, other):
        torch.manual_seed(0)
        results.append(each.eval()(input_ids=ids, attention_mask=mask, labels=ids).logits.float())
    assert not torch.equal(*results)
    error = (results[1] - results[0]).norm() / results[0].norm()
    assert error < 0.05


@needs_torchao
@torch.no_grad()
def test_rows_do_not_depend_on_their_neighbours(tmp_path):
    _, model = quantized(tmp_path)
    rows, ids, mask = batch_of_rows([3, 6, 9])
    together = model.generate(ids, attention_mask=mask, seeds=[1, 2, 3], target_lengths=5)
    for row, seed, expected in zip(rows, (1, 2, 3), together):
        alone = model.generate(row[None], seeds=[seed], target_lengths=5)[0]
        assert torch.equal(alone, expected[: len(alone)])


@needs_torchao
@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=str)
def test_saved_small_and_loaded_in_a_new_process(tmp_path, changes):
    _, model = quantized(tmp_path / "float", **changes)
    model.save_pretrained(tmp_path / "int8")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("int8", "float")]
    assert sizes[0] < 0.35 * sizes[1]
    assert json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"] == {
        "quant_method": "yan_int8_weight_only"
    }
    code = (
        "import sys, torch, yan_hf; from transformers import AutoModelForSeq2SeqLM\n"
        "model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1])\n"
        "print(model.generate(torch.tensor([[7, 8, 9]]), target_lengths=9, seeds=[3]).tolist())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "int8")], capture_output=True, text=True, check=True
    ).stdout
    expected = model.generate(torch.tensor([[7, 8, 9]]), target_lengths=9, seeds=[3])
    assert json.loads(printed.splitlines()[-1]) == expected.tolist()
    reloaded = YanForConditionalGeneration.from_pretrained(tmp_path / "int8")
    is_tied = reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    assert is_tied == changes.get("tie_word_embeddings", False)


def test_without_torchao_the_error_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match=r"pip install yan-hf\[torchao\]"):
        YanInt8WeightOnlyConfig()
    with pytest.raises(ValueError, match="has no field 'bits'"):
        YanInt8WeightOnlyConfig(bits=4)


def test_its_registration_needs_no_torchao():
    module = importlib.import_module("transformers.quantizers.auto")
    assert "yan_int8_weight_only" in module.AUTO_QUANTIZER_MAPPING


@needs_torchao
def test_it_is_not_compiled(tmp_path):
    with pytest.raises(ValueError, match="leave it out for yan_int8_weight_only"):
        quantized(tmp_path)[1].generate(torch.tensor([[7, 8, 9]]), target_lengths=4, compile=True)
