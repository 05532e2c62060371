# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Configuration: every invalid value is refused by name, and a configuration survives JSON."""

import json

import pytest
from transformers import AutoConfig

from yan_hf import YanConfig, YanModel
from yan_hf.configuration_yan import DEFAULT_LOSS_WEIGHTS


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_attention_heads", 7),
        ("hidden_size", 0),
        ("hidden_size", 2),
        ("cross_attention_layers", [6]),
        ("cross_attention_layers", [-1]),
        ("cross_attention_layers", [1, 1]),
        ("num_experts", 0),
        ("expert_sigma", 0),
        ("expert_sigma", -1.0),
        ("expert_sigma", float("nan")),
        ("gate_temperature", 0.0),
        ("loss_weights", {"flow": -0.1}),
        ("loss_weights", {"token": float("inf")}),
        ("loss_weights", {"flwo": 1.0}),
        ("encoder_backbone", "rnn"),
        ("flow_backbone", "Transformer"),
        ("time_beta", [1.0, 0.0]),
        ("time_beta", [1.0]),
        ("init_noise", -1.0),
        ("latent_noise", -0.1),
        ("label_smoothing", 1.0),
        ("hidden_dropout", -0.1),
        ("attention_dropout", 1.5),
        ("encoder_layers", 0),
        ("decoder_layers", -1),
        ("solver_steps", 0),
        ("max_position_embeddings", 0),
        ("hidden_act", "glue"),
        ("frozen_parts", ["enc"]),
        ("mask_token_id", 32_000),
        ("pad_token_id", -1),
        ("layer_norm_eps", 0.0),
        ("layer_norm_eps", float("inf")),
        ("expert_scope", "batch"),
        ("start_state", "zero"),
        ("core_threshold", 1.5),
        ("min_experts", 5),
        ("routing_top_k", 0),
        ("routing_block_size", 0),
    ],
)
def test_invalid_value_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        YanConfig(**{field: value})


@pytest.mark.parametrize("field, value", [("hidden_size", "512"), ("num_experts", 2.5), ("attention_bias", "yes")])
def test_wrong_type_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        YanConfig(**{field: value})


def test_an_invalid_assignment_is_refused_at_once_under_every_name():
    config = YanConfig()
    for name in ("num_experts", "num_local_experts"):
        with pytest.raises(ValueError, match=f"`{name}` cannot be 0: .*greater or equal to 1"):
            setattr(config, name, 0)
    assert config.num_experts == 4


def spoil_heads(config):
    config.num_attention_heads = 7


def spoil_weights(config):
    config.loss_weights["flow"] = -1.0


def spoil_parts(config):
    config.frozen_parts.append("enc")


@pytest.mark.parametrize(
    "spoil, field", [(spoil_heads, "num_attention_heads"), (spoil_weights, "flow"), (spoil_parts, "enc")]
)
def test_fields_that_contradict_each_other_are_found_before_saving_and_when_a_model_is_built(tmp_path, spoil, field):
    config = YanConfig(hidden_size=32, num_attention_heads=4)
    spoil(config)
    with pytest.raises(Exception, match=field):
        config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=field):
        YanModel(config)


def test_json_round_trip_keeps_every_field(tmp_path):
    config = YanConfig(
        hidden_size=48,
        num_attention_heads=3,
        cross_attention_layers=[1, 3],
        num_experts=5,
        time_beta=(2.0, 1.0),
        loss_weights={"flow": 0.5, "mmd": 0},
        frozen_parts=["encoder"],
        gate_temperature=0.7,
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is YanConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert YanConfig.from_dict(json.loads(config.to_json_string())).to_dict() == config.to_dict()


def test_defaults_fill_missing_loss_weights_and_cross_attention():
    config = YanConfig(flow_layers=3, loss_weights={"mmd": 0.25})
    assert config.loss_weights == {**DEFAULT_LOSS_WEIGHTS, "mmd": 0.25}
    assert config.cross_attention_layers == [0, 1, 2]
    assert YanConfig().loss_weights == DEFAULT_LOSS_WEIGHTS  # no state shared between instances


def test_common_names_reach_the_fields():
    assert YanConfig(num_hidden_layers=2).cross_attention_layers == [0, 1]
    assert YanConfig(num_hidden_layers=8).cross_attention_layers == list(range(8))
    config = YanConfig(hidden_size=64, flow_layers=5)
    assert (config.d_model, config.num_hidden_layers) == (64, 5)
    config.d_model = 128
    assert config.hidden_size == 128


def test_presets():
    default, paper = YanConfig.from_preset("default"), YanConfig.from_preset("paper", num_experts=8)
    assert default.to_dict() == YanConfig().to_dict()
    assert paper.vocab_size == 128_258 and paper.num_experts == 8 and paper.hidden_size == 512
    assert paper.init_noise == 1 and default.init_noise == 0.2
    assert paper.loss_weights["flow"] == paper.loss_weights["mmd"] == 1 and paper.loss_weights["length"] == 0
    with pytest.raises(ValueError, match="'papr'"):
        YanConfig.from_preset("papr")
