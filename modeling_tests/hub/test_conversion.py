# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Research checkpoints in and out: exactly, and with every fault named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from research_reference import random_checkpoint
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from yan_hf import (
    YanConfig,
    YanForAutoEncoding,
    YanForConditionalGeneration,
    YanGenerationConfig,
    convert_research_checkpoint,
    export_research_checkpoint,
    train_tokenizer,
)
from yan_hf.cli.main import main


def saved(folder: Path, checkpoint: dict | None = None, **changes) -> Path:
    torch.save(checkpoint or random_checkpoint(**changes), folder / "research.pt")
    return folder / "research.pt"


KINDS = {
    "transformer": {},
    "mamba": {"encoder_use_mamba": True, "flow_use_mamba": True, "qkv_bias": True},
    "auto-encoder": {"auto_encoder": True},
    "mamba auto-encoder": {"auto_encoder": True, "encoder_use_mamba": True},
}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_exact(tmp_path, kind, prefix):
    checkpoint = random_checkpoint(**KINDS[kind])
    checkpoint["model"] = {prefix + key: value for key, value in checkpoint["model"].items()}
    checkpoint.update(loss_config={"lambda_flow": 0.3, "lambda_mmd": 2.0}, last_val_metrics={"loss": 1.5})
    convert_research_checkpoint(saved(tmp_path, checkpoint), tmp_path / "model")
    export_research_checkpoint(tmp_path / "model", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back["model"].keys() == checkpoint["model"].keys()
    for key, value in checkpoint["model"].items():
        assert torch.equal(back["model"][key], value) and back["model"][key].dtype == value.dtype, key
    assert {key: value for key, value in back.items() if key != "model"} == {
        key: value for key, value in checkpoint.items() if key != "model"
    }


def test_configuration_and_generation_configuration(tmp_path):
    model = convert_research_checkpoint(
        saved(tmp_path, {**random_checkpoint(), "loss_config": {"lambda_flow": 0.3}}), tmp_path / "model"
    )
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
    assert type(model) is type(loaded) is YanForConditionalGeneration
    config = loaded.config
    assert config.solver_steps == 3 and config.frozen_parts == ["decoder"] and config.loss_weights["flow"] == 0.3
    assert config.num_extra_positions == 1 and config.max_position_embeddings == 20 and config.gate_temperature == 0.7
    assert config.expert_sigma == 1.3 and not config.tie_word_embeddings and config.mamba_padding == "exact"
    generation = YanGenerationConfig.from_pretrained(tmp_path / "model")
    assert generation.eos_token_id == 2 and generation.pad_token_id == 0
    mamba = convert_research_checkpoint(saved(tmp_path, encoder_use_mamba=True), tmp_path / "mamba")
    assert mamba.config.mamba_padding == "research" and mamba.config.flow_backbone == "transformer"


def test_optional_fields_have_the_research_defaults(tmp_path):
    checkpoint = random_checkpoint(moe_gate_dim_multiplier=1)
    optional = ("moe_gate_temperature", "moe_gate_dim_multiplier", "moe_sigma", "beta_a", "beta_b", "flow_use_mamba")
    for name in (*optional, "freeze_dec"):
        del checkpoint["model_config"][name]
    config = convert_research_checkpoint(saved(tmp_path, checkpoint), tmp_path / "model").config
    assert config.gate_temperature == config.expert_sigma == 1.0 and config.time_beta == [1.0, 1.0]
    assert config.frozen_parts == [] and config.flow_backbone == "transformer"


def test_auto_encoder_becomes_one_and_starts_a_full_model(tmp_path):
    model = convert_research_checkpoint(saved(tmp_path, auto_encoder=True), tmp_path / "model")
    assert type(model) is YanForAutoEncoding
    full = YanForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert torch.equal(full.model.encoder.norm.weight, model.model.encoder.norm.weight)


def test_lengths_are_asked_for_until_the_head_is_trained(tmp_path):
    model = convert_research_checkpoint(saved(tmp_path), tmp_path / "model")
    model = YanForConditionalGeneration.from_pretrained(tmp_path / "model")
    ids = torch.tensor([[7, 8, 9]])
    with pytest.raises(ValueError, match="target_lengths"):
        model.generate(ids)
    assert model.generate(ids, target_lengths=4).shape == (1, 4)
    model.train()(ids, labels=torch.tensor([[7, 2]])).loss.backward()
    with pytest.raises(ValueError, match="target_lengths"):
        model.eval().generate(ids)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert model.eval().generate(ids).shape[0] == 1


def test_dtype(tmp_path):
    convert_research_checkpoint(saved(tmp_path), tmp_path / "model", dtype="bfloat16")
    assert YanForConditionalGeneration.from_pretrained(tmp_path / "model", dtype="auto").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype.*int8"):
        convert_research_checkpoint(saved(tmp_path), tmp_path / "model", dtype=torch.int8)


def test_tokenizer_is_saved_or_refused(tmp_path):
    tokenizer = train_tokenizer(["one two three four"] * 20, vocab_size=300, model_type="bpe")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=rf"{len(tokenizer)} tokens.*40"):
        convert_research_checkpoint(saved(tmp_path), tmp_path / "model", tokenizer)
    assert not (tmp_path / "model").exists()
    path = saved(tmp_path, vocab_size=len(tokenizer))
    convert_research_checkpoint(path, tmp_path / "model", tmp_path / "tokenizer")
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "model")("one two")["input_ids"] == tokenizer("one two")["input_ids"]
    )
    with pytest.raises(ValueError, match="`eos_token_id` is 2 in the tokenizer but 3"):
        convert_research_checkpoint(
            saved(tmp_path, vocab_size=len(tokenizer), eos_token_id=3), tmp_path / "other", tokenizer
        )


def test_every_fault_of_the_weights_is_in_one_error(tmp_path):
    checkpoint = random_checkpoint()
    state = checkpoint["model"]
    del state["encoder.final_norm.scale"], state["flow.expert_out_proj.1.layers.0.bias"]
    state["flow.gate.0.weight"] = state["flow.gate.0.weight"][:3]
    state["optimizer.thing"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        convert_research_checkpoint(saved(tmp_path, checkpoint), tmp_path / "model")
    message = str(error.value)
    for part in (
        "missing: encoder.final_norm.scale",
        "missing: flow.expert_out_proj.1.layers.0.bias",
        "misshapen: flow.gate.0.weight is (3, 48), should be (32, 48)",
        "unexpected: optimizer.thing",
    ):
        assert part in message
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("key", ["encoder.shared_tok_emb.weight", "flow.shared_pos_emb.weight"])
def test_copies_of_a_table_must_agree(tmp_path, key):
    checkpoint = random_checkpoint()
    checkpoint["model"][key] = checkpoint["model"][key].clone()
    checkpoint["model"][key][3, 1] += 1e-6
    with pytest.raises(ValueError, match=f"copy: {key}"):
        convert_research_checkpoint(saved(tmp_path, checkpoint), tmp_path / "model")


class Evil:
    def __reduce__(self):
        return (print, ("code from the file ran",))


def test_a_pickle_that_needs_code_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="refused"):
        convert_research_checkpoint(saved(tmp_path, {**random_checkpoint(), "x": Evil()}), tmp_path / "model")
    assert "code from the file" not in capsys.readouterr().out


def test_other_files_and_fields_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.pt"):
        convert_research_checkpoint(tmp_path / "nothing.pt", tmp_path / "model")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match="text.pt"):
        convert_research_checkpoint(tmp_path / "text.pt", tmp_path / "model")
    for broken in ({"model_config": {}}, {"model": {}}, [1]):
        with pytest.raises(ValueError, match="no research checkpoint"):
            convert_research_checkpoint(saved(tmp_path, broken), tmp_path / "model")
    checkpoint = random_checkpoint()
    del checkpoint["model_config"]["d_model"], checkpoint["model_config"]["ode_steps"]
    with pytest.raises(ValueError, match="d_model, ode_steps"):
        convert_research_checkpoint(saved(tmp_path, checkpoint), tmp_path / "model")
    with pytest.raises(ValueError, match="ode_steps.*1"):
        convert_research_checkpoint(saved(tmp_path, ode_steps=1), tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({3: 1}, "3 is a key"),
        ({"loss_config": [1]}, "loss_config"),
        ({"loss_config": {"lambda_flow": "much"}}, "much"),
        ({"model_config": {5: 1}}, "5 is a key"),
        ({"model_config": {"ode_steps": [2]}}, "'<' not supported|ode_steps"),
        ({"model_config": {"d_model": [32]}}, "hidden_size"),
        ({"model_config": {"beta_a": {}}}, "time_beta"),
        ({"model": {7: torch.zeros(1)}}, "7 is a key"),
        ({"model": {"decoder.lm_head.bias": [0.0]}}, "no tensor: decoder.lm_head.bias"),
        ({"model": {"decoder.lm_head.bias": None}}, "no tensor: decoder.lm_head.bias"),
        ({"model": {"decoder.lm_head.bias": torch.zeros(40).long()}}, "no dense .*: decoder.lm_head.bias"),
        ({"model": {"decoder.lm_head.bias": torch.zeros(40).to_sparse()}}, "no dense .*: decoder.lm_head.bias"),
    ],
)
def test_odd_contents_are_named(tmp_path, change, message):
    checkpoint = random_checkpoint()
    for name, value in change.items():
        old = checkpoint.get(name)
        checkpoint[name] = {**old, **value} if isinstance(value, dict) and old else value
    path = saved(tmp_path, checkpoint)
    with pytest.raises(ValueError, match=f"research.pt .*(?s:.)*({message})"):
        convert_research_checkpoint(path, tmp_path / "model")


def test_a_failed_conversion_leaves_the_old_output_and_nothing_else(tmp_path):
    path = saved(tmp_path)
    convert_research_checkpoint(path, tmp_path / "out" / "model")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out" / "model").iterdir()}
    checkpoint = random_checkpoint()
    del checkpoint["model"]["decoder.lm_head.bias"]
    with pytest.raises(ValueError, match="lm_head"):
        convert_research_checkpoint(saved(tmp_path, checkpoint), tmp_path / "out" / "model", overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out" / "model").iterdir()} == before
    convert_research_checkpoint(saved(tmp_path, seed=5), tmp_path / "out" / "model", overwrite=True)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model"]


def test_what_the_research_layout_cannot_hold_is_refused(tmp_path):
    model = convert_research_checkpoint(saved(tmp_path), tmp_path / "model")
    model.config.hidden_act = "relu"
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="hidden_act"):
        export_research_checkpoint(tmp_path / "other", tmp_path / "back.pt")
    fields = {**model.config.to_dict(), "hidden_act": "gelu", "start_state": "aligned"}
    YanForConditionalGeneration(YanConfig(**fields)).save_pretrained(tmp_path / "aligned")
    with pytest.raises(ValueError, match="start_state"):
        export_research_checkpoint(tmp_path / "aligned", tmp_path / "back.pt")
    assert not list(tmp_path.glob("back*"))


def test_command_line(tmp_path, capsys):
    path = saved(tmp_path)
    assert main(["convert", "--checkpoint", str(path), "--output", str(tmp_path / "model"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "YanForConditionalGeneration"
    assert main(["export", str(tmp_path / "model"), "--to-research", "--output", str(tmp_path / "back.pt")]) == 0
    assert torch.load(tmp_path / "back.pt", weights_only=True)["step"] == 17
    assert main(["convert", "--checkpoint", str(tmp_path / "no.pt"), "--output", str(tmp_path / "x")]) == 1
    assert "no.pt" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["convert", "--output", "x"])
    assert stop.value.code == 2


@pytest.mark.slow
def test_export_with_code_loads_without_the_package(tmp_path):
    tokenizer = train_tokenizer(["one two three four"] * 20, vocab_size=300, model_type="bpe")
    path = saved(tmp_path, vocab_size=len(tokenizer))
    convert_research_checkpoint(path, tmp_path / "model", tokenizer)
    assert main(["export", str(tmp_path / "model"), "--with-code", "--output", str(tmp_path / "coded")]) == 0
    script = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "yan_hf":
            raise ImportError("hidden")
sys.meta_path.insert(0, Refuse())
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer
options = {"trust_remote_code": True}
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], **options)
assert AutoConfig.from_pretrained(sys.argv[1], **options).model_type == "yan"
assert type(AutoModel.from_pretrained(sys.argv[1], **options)).__name__ == "YanModel"
model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1], **options)
assert type(model).__module__.startswith("transformers_modules")
print(model.generate(**tokenizer("one two", return_tensors="pt"), target_lengths=6, seeds=[3]).tolist())
"""
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "coded")],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
    expected = model.generate(**tokenizer("one two", return_tensors="pt"), target_lengths=6, seeds=[3])
    assert json.loads(found.stdout) == expected.tolist()


@pytest.mark.slow
def test_memory_stays_near_the_files_size(tmp_path):
    """Peak growth of the process while 30 million parameters are converted: at most 2.2 times the file."""
    path = saved(tmp_path, vocab_size=40_000, d_model=256, max_length=128, moe_n_experts=8)
    script = """
import resource, sys
import yan_hf
from yan_hf.hub.research import convert_research_checkpoint
from yan_hf import YanForConditionalGeneration
import transformers.modeling_utils, safetensors.torch, torch
open("/proc/self/clear_refs", "w").write("5")
def read(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
before = read("VmRSS")
convert_research_checkpoint(sys.argv[1], sys.argv[2])
print(read("VmHWM") - before)
"""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux")
    found = subprocess.run(
        [sys.executable, "-c", script, str(path), str(tmp_path / "model")], capture_output=True, text=True, check=True
    )
    size = path.stat().st_size
    assert size > 80e6
    assert int(found.stdout) <= 2.2 * size
