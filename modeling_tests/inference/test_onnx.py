# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""ONNX Runtime gives the tokens of `generate`, for all batch sizes and lengths; what it cannot run is refused."""

import sys

import pytest
import torch
from testing_utils import SHALLOW, batch_of_rows, small_model
from transformers import BertConfig

from yan_hf import OnnxYan, YanForAutoEncoding, export_to_onnx
from yan_hf.cli.main import main
from yan_hf.inference import onnx
from yan_hf.inference.onnx import export_programs, write_onnx


MASK = 4


@pytest.fixture(scope="module", params=["noise", "aligned", "mamba"])
def models(request, tmp_path_factory):
    """A model, and the same one in ONNX Runtime; one chooses experts anew in both solver steps, for whole targets."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    options = {}
    if request.param == "aligned":
        options = {"expert_scope": "target", "reselect_experts": True, "repeat_window": 3}
    start_state = "aligned" if request.param == "aligned" else "noise"
    if request.param == "mamba":
        options = {"encoder_backbone": "mamba", "flow_backbone": "mamba"}
    model = small_model(**SHALLOW, start_state=start_state, mask_token_id=MASK, **options)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder / "model")
    steps = ["--num-inference-steps", "2"]
    assert main(["export", str(folder / "model"), "--onnx", "--output", str(folder / "onnx"), *steps]) == 0
    return model, OnnxYan(folder / "onnx")


def drawn_call(index: int, has_masks: bool) -> dict:
    """Arguments of `generate`: one to five rows of 1 to 24 tokens, with lengths and options that change."""
    generator = torch.Generator().manual_seed(index)
    draw = torch.randint(1, 25, (2, int(torch.randint(1, 6, (), generator=generator))), generator=generator)
    rows = draw.shape[1]
    _, input_ids, mask = batch_of_rows(draw[0].tolist(), side=("left", "right")[index % 2], seed=index)
    call = {"input_ids": input_ids, "attention_mask": mask, "seeds": list(range(index, index + rows))}
    if has_masks and index % 3:
        input_ids[torch.arange(rows), mask.argmax(dim=1)] = MASK
        call["keep_known"] = index % 3 == 1
    elif index % 2:
        call["target_lengths"] = draw[1]
    if index % 5 == 0:
        call["expert_selection"] = "greedy"
    if index % 7 == 0:
        call |= {"num_candidates": 2, "num_return_sequences": 2}
        call["seeds"] = list(range(index, index + 2 * rows))
    if index % 11 == 0:
        call |= {"do_sample": True, "top_k": 5, "min_new_tokens": 1}
    return {**call, "num_inference_steps": 2, "max_new_tokens": 24}


@pytest.mark.slow
def test_the_tokens_are_those_of_generate(models):
    model, runtime = models
    for index in range(200):
        call = drawn_call(index, model.config.start_state == "aligned")
        assert torch.equal(runtime.generate(**call), model.generate(**call)), call


@pytest.mark.slow
def test_other_outputs_are_those_of_generate(models):
    model, runtime = models
    call = drawn_call(1, False) | {"output_scores": True, "output_expert_indices": True}
    outputs = [each.generate(**call, return_dict_in_generate=True) for each in (model, runtime)]
    for name in ("sequence_scores", "latents", "logits", "expert_indices"):
        torch.testing.assert_close(*(output[name] for output in outputs), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_what_the_programs_do_not_have_is_refused(models):
    _, runtime = models
    ids = torch.full((1, 3), 7)
    for name, value in {"num_inference_steps": 3, "expert_temperature": 0.5, "solver": "heun"}.items():
        with pytest.raises(ValueError, match="export it again"):
            runtime.generate(ids, **{name: value})
    with pytest.raises(ValueError, match="stratified=0.*export it again"):
        runtime.generate(ids, expert_scope="target", expert_selection="stratified")
    refused = {"output_trajectory": True, "compile": True, "expert_indices": torch.zeros(1, 3, dtype=torch.long)}
    for name, value in refused.items():
        with pytest.raises(ValueError, match=name):
            runtime.generate(ids, target_lengths=3, **{name: value})


def test_models_that_cannot_be_exported_are_refused(tmp_path):
    for name in ("routing", "expert_scope"):
        with pytest.raises(ValueError, match=f"`{name}='block'`"):
            export_programs(small_model(**SHALLOW), **{name: "block"}, routing_block_size=3)
    with pytest.raises(ValueError, match="stratified.*cannot be exported"):
        export_programs(small_model(**SHALLOW, expert_scope="target"), expert_selection="stratified")
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    with pytest.raises(ValueError, match="pretrained encoder"):
        export_programs(small_model(**SHALLOW, encoder_config=BertConfig(**sizes)))
    with pytest.raises(ValueError, match="float32 on the CPU"):
        export_programs(small_model(**SHALLOW).bfloat16())
    YanForAutoEncoding(small_model().config).save_pretrained(tmp_path / "auto")
    with pytest.raises(ValueError, match="auto-encoder"):
        export_to_onnx(tmp_path / "auto", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
    assert main(["export", str(tmp_path / "auto"), "--with-code", "--output", "x", "--num-inference-steps", "2"]) == 1


def test_missing_packages_and_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"onnx and onnxscript.*yan-hf\[onnx\]"):
        write_onnx(small_model(**SHALLOW), tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"yan-hf\[onnx\]"):
        OnnxYan(tmp_path)
