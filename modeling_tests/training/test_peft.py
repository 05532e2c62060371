# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""PEFT: adapters on every part train, save, load, merge, and generate through the wrapper."""

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from peft.utils import TaskType
from testing_utils import batch_of_rows, small_model


EXPERTS = ["flow.experts.up_proj", "flow.experts.down_proj"]
# One adapter for each part of the model, by name.
PARTS = {
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "feed-forward": {"target_modules": r".*feed_forward\.(up|down)_proj"},
    "encoder": {"target_modules": r".*encoder\.layers.*_proj"},
    "flow": {"target_modules": r".*flow\.layers.*(_proj|adaptive_norm)"},
    "decoder": {"target_modules": r".*decoder\.layers.*_proj"},
    "gate": {"target_modules": r".*flow\.gate\..*_proj"},
    "time embedding": {"target_modules": r".*time_embedding\.proj"},
    "heads": {"target_modules": ["lm_head", "length_head.up_proj", "length_head.down_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "experts": {"target_modules": [], "target_parameters": EXPERTS},
    "all-linear and experts": {"target_modules": "all-linear", "target_parameters": EXPERTS},
    "default": {},
}
BACKBONES = ("transformer", "mamba")


def adapted(backbone="transformer", checkpointing=False, start=False, **fields):
    model = small_model(encoder_backbone=backbone, flow_backbone=backbone, detach_length_head=False)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(r=2, init_lora_weights=start, **fields))


def batch():
    _, ids, mask = batch_of_rows([9, 6, 4], "left")
    labels = torch.tensor([[7, 8, 9, 2], [8, 2, -100, -100], [6, 7, 2, -100]])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_adapter_gets_a_gradient(backbone, part, checkpointing):
    model = adapted(backbone, checkpointing, **PARTS[part]).train()
    torch.manual_seed(0)
    model(**batch()).loss.backward()
    adapters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert adapters
    silent = [name for name, weight in adapters.items() if weight.grad is None or not weight.grad.abs().max() > 0]
    assert not silent


@pytest.mark.parametrize("part", ["all-linear", "experts", "all-linear and experts", "default"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_save_load_and_merge_write_the_same(backbone, part, tmp_path):
    """The adapter changes the text; reloaded and merged it writes the same; a merged checkpoint needs no PEFT."""
    model = adapted(backbone, **PARTS[part]).eval()
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    # Layer norms blow up a quiet start, and with it the rounding of merged weights.
    options = {"target_lengths": 6, "seeds": range(3), "init_noise": 1.0, "return_dict_in_generate": True}
    written = model.generate(**inputs, **options)
    with model.disable_adapter():
        plain = model.generate(**inputs, **options)
    assert not torch.allclose(plain.latents, written.latents, atol=1e-2)
    model.save_pretrained(tmp_path / "adapter")
    base = small_model(encoder_backbone=backbone, flow_backbone=backbone, detach_length_head=False)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    again = loaded.generate(**inputs, **options)
    assert torch.equal(again.sequences, written.sequences)
    torch.testing.assert_close(again.latents, written.latents, rtol=1e-5, atol=1e-5)
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    from yan_hf import YanForConditionalGeneration

    final = YanForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    for candidate in (merged, final):
        output = candidate.generate(**inputs, **options)
        # The scan raises what merging rounds in its own projections to powers: 2e-4 on a processor with AMX.
        close = 5e-4 if backbone == "mamba" and part.startswith("all-linear") else 1e-4
        torch.testing.assert_close(output.latents, written.latents, rtol=close, atol=close)
        assert torch.equal(output.sequences, written.sequences)


def test_adapters_start_as_nothing():
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    options = {"target_lengths": 6, "seeds": range(3), "return_dict_in_generate": True}
    expected = small_model(detach_length_head=False).generate(**inputs, **options)
    found = adapted(start=True, **PARTS["all-linear and experts"]).eval().generate(**inputs, **options)
    torch.testing.assert_close(found.latents, expected.latents, rtol=1e-5, atol=1e-5)


def test_wrapped_as_a_sequence_to_sequence_model():
    model = adapted(target_modules="all-linear", task_type=TaskType.SEQ_2_SEQ_LM)
    assert model(**batch()).loss.requires_grad
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    assert model.eval().generate(**inputs, target_lengths=5).shape == (3, 5)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["import yan_hf, peft", "import peft, yan_hf"])
def test_default_targets_are_registered(order):
    code = (
        f"import sys; {order}; from peft.utils import constants;"
        "print(constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING['yan'])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "['q_proj', 'v_proj', 'in_proj', 'out_proj']"


def test_adapters_of_frozen_parts_train():
    """A part that a checkpoint says is frozen keeps its own weights; adapters in it learn, with their dropout."""
    base = small_model()
    base.freeze("encoder", "decoder")
    config = LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear")
    model = get_peft_model(base, config).train()
    ours = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert any(".encoder." in name for name in ours) and any(".decoder." in name for name in ours)
    assert not any("base_layer" in name for name in ours)
    layer = base.model.encoder.layers[0].self_attn.q_proj
    assert layer.lora_dropout["default"].training and not layer.base_layer.training
    assert not base.model.encoder.norm.training
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.SGD(ours.values(), lr=1.0)
    for _ in range(2):
        model.train()
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in model.named_parameters():
        if "lora_B" in name and (".encoder." in name or ".decoder." in name):
            assert not torch.equal(weight, before[name]), name
        elif "lora" not in name:
            assert torch.equal(weight, before[name]), name


def test_prefix_tuning_is_refused_instead_of_ignored():
    config = PrefixTuningConfig(
        task_type=TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=4, num_layers=1, num_attention_heads=2, token_dim=16
    )
    model = get_peft_model(small_model(), config).eval()
    ids = batch()["input_ids"]
    with pytest.raises(ValueError, match="PrefixTuningConfig.*LoRA"):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
    # Without the adapter the model writes, also after the refusal.
    with model.disable_adapter():
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
