# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Checkpoints: safetensors, sharded, through the Auto classes, in a new process, with and without the package."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from testing_utils import batch_of_rows, small_config, small_model
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, Trainer, TrainingArguments

from yan_hf import YanConfig, YanForAutoEncoding, YanForConditionalGeneration, YanModel
from yan_hf.configuration_yan import AUTO_MAP, DEFAULT_LOSS_WEIGHTS
from yan_hf.hub.export import export_with_code


SOURCE = Path(__file__).resolve().parents[2] / "src"

# Loads a checkpoint and writes the logits for fixed latents and experts.
LOAD = """
import sys, torch
{imports}
from transformers import AutoModelForSeq2SeqLM
folder, inputs, output = sys.argv[1:]
torch.set_num_threads({threads})  # another number sums in another order
options = {options}
model = AutoModelForSeq2SeqLM.from_pretrained(folder, **options).eval()
inputs = torch.load(inputs)
result = model.generate(**inputs, return_dict_in_generate=True, output_scores=True)
torch.save({{"logits": result.logits, "sequences": result.sequences, "module": type(model).__module__}}, output)
"""

# A finder that refuses the package, since an installed one would win over the checkpoint's code.
HIDE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "yan_hf":
            raise ImportError("yan_hf is hidden")
sys.meta_path.insert(0, Refuse())
"""
# Loads what folders hold without the package, saves it again in every way, and loads that.
SAVE_AGAIN = """
import json, os, sys, torch
from pathlib import Path
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module
def load(folder):
    names = json.loads((folder / "config.json").read_text())["auto_map"]
    assert all((folder / name.replace(".", ".py.")).with_suffix("").is_file() for name in names.values()), folder
    if not (folder / "model.safetensors").is_file():
        return AutoConfig.from_pretrained(folder, trust_remote_code=True)
    auto = AutoModel if "base" in folder.name else AutoModelForSeq2SeqLM
    return auto.from_pretrained(folder, trust_remote_code=True)
def means(folder):
    loaded = load(folder)
    return [float(weight.detach().mean()) for weight in getattr(loaded, "parameters", list)()]
for folder in map(Path, sys.argv[1:]):
    again = folder.with_name(folder.name + "_again")
    loaded = load(folder)
    assert type(loaded).__module__.startswith("transformers_modules")
    loaded.save_pretrained(again)
    assert means(folder) == means(again), folder
    if hasattr(loaded, "parameters"):
        loaded.config.save_pretrained(folder.with_name("again_config"))
        assert load(folder.with_name("again_config")).hidden_size == 32
cls = get_class_from_dynamic_module("modeling_yan.YanForConditionalGeneration", sys.argv[1])
cls.from_pretrained(sys.argv[1]).save_pretrained(folder.with_name("direct"))  # past the Auto classes
load(folder.with_name("direct"))
"""


def fixed_inputs():
    _, ids, mask = batch_of_rows([4, 9, 6], "left")
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "target_lengths": torch.tensor([5, 7, 2]),
        "initial_latents": torch.randn(3, 7, 32, generator=generator),
        "expert_indices": torch.randint(0, 4, (3, 7), generator=generator),
    }


def run_python(tmp_path, script, *arguments, path=""):
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "HOME": str(tmp_path)}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert finished.returncode == 0, finished.stderr


def run_in_new_process(tmp_path, folder, imports, options, path):
    torch.save(fixed_inputs(), tmp_path / "inputs.pt")
    script = LOAD.format(imports=imports, options=options, threads=torch.get_num_threads())
    run_python(tmp_path, script, folder, tmp_path / "inputs.pt", tmp_path / "output.pt", path=path)
    return torch.load(tmp_path / "output.pt")


def expected_output(model):
    return model.generate(**fixed_inputs(), return_dict_in_generate=True, output_scores=True)


def assert_same_logits(found, expected):
    """
    Up to rounding: loaded weights are views of the mapped file, at any offset, and matrix kernels may sum in another
    order where an address does not fill a cache line.
    """
    tolerance = 1e-2 if found.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_new_process_computes_the_same_logits(tmp_path, dtype):
    model = small_model().to(dtype)
    expected = expected_output(model)
    model.save_pretrained(tmp_path / "model")
    options = f"{{'dtype': {dtype}}}"
    result = run_in_new_process(tmp_path, tmp_path / "model", "import yan_hf", options, str(SOURCE))
    assert result["logits"].dtype == dtype
    assert_same_logits(result["logits"], expected.logits)
    assert torch.equal(result["sequences"], expected.sequences)


def test_only_safetensors_are_written_and_dtype_is_kept(tmp_path):
    small_model().bfloat16().save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["model_type"] == "yan"
    assert YanForConditionalGeneration.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


def test_sharded_saves_load(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = YanForConditionalGeneration.from_pretrained(tmp_path)
    assert_same_logits(expected_output(loaded).logits, expected_output(model).logits)


def test_auto_classes_give_the_three_classes(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is YanConfig
    assert type(AutoModelForSeq2SeqLM.from_pretrained(tmp_path)) is YanForConditionalGeneration
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is YanModel
    for name, parameter in model.model.named_parameters():
        assert torch.equal(base.get_parameter(name), parameter), name
    # And back: a base model's checkpoint fills the body of a full one.
    base.save_pretrained(tmp_path / "base")
    full, info = YanForConditionalGeneration.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert {key.split(".")[0] for key in info["missing_keys"]} == {"lm_head", "length_head"}
    assert torch.equal(full.model.flow.norm.weight, model.model.flow.norm.weight)


def test_some_loss_weights_can_be_overridden_on_loading(tmp_path):
    small_model().save_pretrained(tmp_path)
    model = YanForConditionalGeneration.from_pretrained(tmp_path, loss_weights={"flow": 0.5})
    assert model.config.loss_weights == {**DEFAULT_LOSS_WEIGHTS, "flow": 0.5}
    _, ids, mask = batch_of_rows([4, 9])
    assert model(ids, mask, labels=ids[:, :3]).loss.isfinite()


def test_auto_encoder_round_trip(tmp_path):
    torch.manual_seed(0)
    model = YanForAutoEncoding(small_config()).eval()
    model.save_pretrained(tmp_path)
    loaded = YanForAutoEncoding.from_pretrained(tmp_path)
    _, ids, mask = batch_of_rows([4, 9])
    assert_same_logits(loaded(ids, mask).logits, model(ids, mask).logits)


def test_a_checkpoint_with_its_code_loads_without_the_package(tmp_path, monkeypatch):
    """In a process that cannot import `yan_hf`, through `trust_remote_code`."""
    for cls, auto_class in ((YanConfig, "AutoConfig"), (YanForConditionalGeneration, "AutoModelForSeq2SeqLM")):
        monkeypatch.setattr(cls, "_auto_class", None)  # undone behind the test, what is registered too
        cls.register_for_auto_class(auto_class)
    folder = tmp_path / "model"
    small_model().save_pretrained(folder)
    assert (folder / "modeling_yan.py").is_file() and (folder / "experts.py").is_file()
    result = run_in_new_process(tmp_path, folder, HIDE, "{'trust_remote_code': True}", "")
    assert result["module"].startswith("transformers_modules")
    expected = expected_output(small_model())
    assert torch.equal(result["sequences"], expected.sequences)
    assert_same_logits(result["logits"], expected.logits)


@pytest.mark.slow
def test_what_is_loaded_from_a_folder_with_code_is_saved_with_it(tmp_path):
    """In every way of saving, with the package and without it."""
    small_model().save_pretrained(tmp_path / "plain")
    export_with_code(tmp_path / "plain", tmp_path / "code")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "code", trust_remote_code=True)
    assert type(model) is YanForConditionalGeneration  # the package wins
    AutoConfig.from_pretrained(tmp_path / "code").save_pretrained(tmp_path / "config")
    AutoModel.from_pretrained(tmp_path / "code").save_pretrained(tmp_path / "base")
    YanForConditionalGeneration.from_pretrained(tmp_path / "code").save_pretrained(tmp_path / "class")
    Trainer(model, TrainingArguments(tmp_path, report_to=[], use_cpu=True)).save_model(tmp_path / "trainer")
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    export_with_code(tmp_path / "merged", tmp_path / "exported")
    assert not list((tmp_path / "adapter").glob("*.py")) and not list((tmp_path / "plain").glob("*.py"))
    names = ["code", "config", "base", "class", "trainer", "merged", "exported"]
    run_python(tmp_path, HIDE + SAVE_AGAIN, *(tmp_path / name for name in names))


def test_code_that_is_not_at_hand_is_not_named(tmp_path):
    config = small_config()
    elsewhere, missing = "someone/model--modeling_yan.YanModel", "modeling_other.Model"
    config.auto_map = {"AutoConfig": AUTO_MAP["AutoConfig"], "AutoModel": elsewhere, "AutoModelForCausalLM": missing}
    before = dict(config.auto_map)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert saved == {"AutoConfig": AUTO_MAP["AutoConfig"], "AutoModel": elsewhere} and config.auto_map == before
