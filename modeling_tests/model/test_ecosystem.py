# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What Transformers' and PEFT's own tests let through: kernels that are really called, offloaded weights, whole graphs,
exported programs, refused caches. `conformance/mutations.py` shows each of them failing.
"""

import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload
from testing_utils import SHALLOW, batch_of_rows, small_config, small_model
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from yan_hf import YanConfig, YanForConditionalGeneration, YanModel


BACKBONES = ("transformer", "mamba")


def model_with(backbone, **changes):
    return small_model(encoder_backbone=backbone, flow_backbone=backbone, **changes)


def batch(side="left"):
    _, ids, mask = batch_of_rows([4, 9, 6], side)
    labels = torch.tensor([[7, 8, 9, 2], [8, 2, -100, -100], [6, 7, 2, -100]])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def written(model):
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    return model.generate(**inputs, target_lengths=[5, 7, 2], seeds=range(3), return_dict_in_generate=True).latents


# Masks. One mask at a time, since a model that ignores both is caught by either.


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_encoder_keeps_to_its_padding_mask(implementation):
    model = small_model().model
    model.set_attn_implementation(implementation)
    rows, ids, mask = batch_of_rows([4, 9])
    latents = model.encode(ids, mask).last_hidden_state
    torch.testing.assert_close(latents[0, :4], model.encode(rows[0][None]).last_hidden_state[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_cross_attention_keeps_to_the_source_s_padding_mask(implementation, backbone):
    """The source's latents are given, so that the encoder has no part in it, and pooled alike."""
    model = model_with(backbone).model
    model.set_attn_implementation(implementation)
    source = torch.randn(1, 6, 32)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    state, times, canvas = torch.randn(1, 5, 32), torch.tensor([0.3]), torch.ones(1, 5, dtype=torch.long)
    padded = model.flow(state, times, model.prepare_context(source, mask, canvas)).last_hidden_state
    plain = model.flow(state, times, model.prepare_context(source[:, :4], None, canvas)).last_hidden_state
    torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-5)


# Experts


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_the_chosen_kernel_of_the_experts_is_called(implementation, monkeypatch):
    """Through the model, so that a choice that never reaches the experts shows."""
    calls = []
    for name in ("batched_mm", "grouped_mm"):
        kernel = ALL_EXPERTS_FUNCTIONS[name]

        def spied(*args, name=name, kernel=kernel, **kwargs):
            calls.append(name)
            return kernel(*args, **kwargs)

        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, name, spied)
    model = small_model()
    model.set_experts_implementation("eager")
    model(**batch())
    assert not calls
    model.set_experts_implementation(implementation)
    model(**batch())
    assert set(calls) == {implementation}


def test_intermediate_size_sets_the_multiplier():
    """As of FSDP's and other tools that shrink a configuration by this name."""
    config = small_config()
    config.intermediate_size = 96
    assert (
        config.feed_forward_multiplier == 3
        and YanConfig(hidden_size=64, intermediate_size=128).intermediate_size == 128
    )
    with pytest.raises(ValueError, match="intermediate_size"):
        config.intermediate_size = 100


# Weights elsewhere


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.slow
def test_disk_offload_by_device_map(backbone, tmp_path):
    model = model_with(backbone)
    model.save_pretrained(tmp_path / "model")
    device_map = {
        "model.embed_tokens": "cpu",
        "model.embed_positions": "disk",
        "model.encoder": "disk",
        "model.flow": "disk",
        "model.decoder": "disk",
        "lm_head": "disk",
        "length_head": "cpu",
    }
    loaded = YanForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    assert loaded.model.flow.experts.up_proj.is_meta and loaded.lm_head.weight.is_meta
    torch.testing.assert_close(written(loaded), written(model), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded(**batch()).loss, model(**batch()).loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_offloaded_layers_are_loaded_when_they_are_called(backbone):
    """With weights on the CPU and nothing on the device but what is being computed; here the device is the CPU too."""
    model = model_with(backbone)
    expected = written(model), model(**batch()).loss
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close((written(model), model(**batch()).loss), expected, rtol=1e-5, atol=1e-5)


# On the meta device: no twin, since accelerate leaves offloaded weights there; the test above has its hooks.
@pytest.mark.gpu
@pytest.mark.parametrize("backbone", BACKBONES)
def test_cpu_offload_by_device_map(backbone, tmp_path):
    model = model_with(backbone)
    model.save_pretrained(tmp_path)
    # No part lies in another: accelerate does not take a device map in which one does.
    on_cpu = ("embed_tokens", "embed_positions", "flow", "decoder")
    device_map = {**{f"model.{part}": "cpu" for part in on_cpu}, "model.encoder": 0, "lm_head": 0, "length_head": 0}
    loaded = YanForConditionalGeneration.from_pretrained(tmp_path, device_map=device_map)
    torch.testing.assert_close(written(loaded).cpu(), written(model), rtol=1e-3, atol=1e-3)


def test_no_block_is_split_over_devices(tmp_path):
    """Each block adds to what came into it, so that its parts must be on one device."""
    model = YanModel(small_config())
    layers = {type(module).__name__ for module in model.modules() if type(module).__name__.endswith("Layer")}
    assert layers | {"YanExperts"} <= set(model._no_split_modules)


def test_sharded_saves_hold_every_weight_once(tmp_path):
    model = small_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded, info = YanForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


# Whole graphs


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.slow
def test_forward_is_one_graph(backbone):
    model = model_with(backbone, **SHALLOW)
    inputs = {**batch(), "latents": torch.randn(3, 5, 32), "timesteps": torch.tensor([0.0, 0.4, 0.9])}
    inputs.pop("labels")
    with torch.no_grad():
        expected, result = model(**inputs), compiled(model)(**inputs)
    for name in ("logits", "expert_fields", "gate_logits", "length_logits"):
        torch.testing.assert_close(result[name], expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_training_step_is_one_graph():
    """With a deterministic start and one expert the terms that count here draw nothing."""
    quiet = {"init_noise": 0.0, "num_experts": 1, "loss_weights": dict.fromkeys(("flow", "mmd"), 0.0)}
    model = small_model(**SHALLOW, **quiet, solver_steps=2).train()
    gradients = []
    for function in (model, compiled(model)):
        model.zero_grad()
        function(**batch()).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_generate_is_one_graph():
    model = small_model(**SHALLOW)
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    options = {"target_lengths": [5, 7, 2], "seeds": range(3)}
    config = {"fullgraph": True, "backend": "aot_eager", "mode": None}
    result = model.generate(**inputs, **options, compile=True, compile_config=config)
    assert torch.equal(result, model.generate(**inputs, **options))


# Exported programs


class EncoderProgram(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model.encode(input_ids, attention_mask).last_hidden_state


class FlowStepProgram(nn.Module):
    """One Euler step with given experts."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, state, time, step, source, source_mask, canvas, experts):
        context = self.model.prepare_context(source, source_mask, canvas)
        return state + step * self.model.flow(state, time, context, expert_indices=experts).velocity


class DecoderProgram(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, latents):
        return self.model.decode(latents)


def check_export(program, inputs, others):
    """The exported program computes what the module does, also for other values of the same shapes."""
    with torch.no_grad():
        exported = torch.export.export(program.eval(), inputs).module()
        for values in (inputs, others):
            torch.testing.assert_close(exported(*values), program(*values), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(program(*inputs), program(*others), atol=1e-2)


def source(lengths, seed):
    _, ids, mask = batch_of_rows(lengths, "left", seed=seed)
    return ids, mask


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_encoder_is_exported(backbone):
    check_export(EncoderProgram(model_with(backbone, **SHALLOW).model), source([4, 9], 1), source([9, 3], 2))


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.slow
def test_a_flow_step_is_exported(backbone, implementation):
    model = model_with(backbone, **SHALLOW)
    model.set_experts_implementation(implementation)

    def inputs(seed):
        generator = torch.Generator().manual_seed(seed)
        state, latents = (torch.randn(2, length, 32, generator=generator) for length in (5, 9))
        mask = source([4, 9] if seed else [9, 2], seed)[1]
        canvas = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
        experts = torch.randint(0, 4, (2, 5), generator=generator)
        return state, torch.tensor([0.2, 0.2]) * seed, torch.tensor(0.3), latents, mask, canvas, experts

    check_export(FlowStepProgram(model.model), inputs(1), inputs(0))


def test_the_decoder_is_exported():
    check_export(DecoderProgram(small_model()), (torch.randn(2, 5, 32),), (torch.randn(2, 5, 32),))


# Refused


def test_a_key_value_cache_is_refused():
    """Prefix tuning hands one in; ignored, its prefix would have no effect and no gradient."""
    with pytest.raises(ValueError, match="past_key_values"):
        small_model()(**batch(), past_key_values=((torch.zeros(1),),))


# Parallel plans


def test_plans_name_what_the_models_have():
    """A pattern that matches nothing shards nothing, and no other test sees it."""
    for backbone in BACKBONES:
        model = model_with(backbone).bfloat16()
        names = {name for name, _ in [*model.named_modules(), *model.named_parameters()]}
        for plan in (model._tp_plan, model._ep_plan, model._fsdp_plan):
            assert plan and not [pattern for pattern in plan if pattern.replace("*", "0") not in names]


# Imports


def test_importing_registers_the_classes_and_brings_nothing_heavy_nor_a_finder():
    # PEFT is imported, where it is installed, for its table of default targets.
    code = (
        "import sys; from transformers import AutoConfig; finders = list(sys.meta_path); import yan_hf;"
        "heavy = [name for name in ('datasets', 'sklearn', 'matplotlib') if name in sys.modules];"
        "print(sys.meta_path == finders, AutoConfig.for_model('yan').model_type, heavy)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.split() == ["True", "yan", "[]"]
