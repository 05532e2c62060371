# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The research code's names for configuration fields and weights, and ours: a table in two directions."""

import re
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from ..configuration_yan import DEFAULT_LOSS_WEIGHTS, YanConfig


# Research name → ours, where a value is taken as it is.
_SAME = ("vocab_size", "latent_noise", "init_noise", "pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id")
CONFIG_FIELDS = {
    **dict(zip(_SAME, _SAME)),
    "d_model": "hidden_size",
    "max_length": "max_position_embeddings",
    "attention_heads": "num_attention_heads",
    "qkv_bias": "attention_bias",
    "dropout": "hidden_dropout",
    "encoder_n_trf_blocks": "encoder_layers",
    "n_trf_blocks": "flow_layers",
    "cross_att_idx": "cross_attention_layers",
    "decoder_n_resi_blocks": "decoder_layers",
    "moe_n_experts": "num_experts",
}
# The same for fields that a research checkpoint may leave out, with the value that they then have.
OPTIONAL_FIELDS = {
    "moe_gate_temperature": ("gate_temperature", 1.0),
    "moe_gate_dim_multiplier": ("gate_dim_multiplier", 1),
    "moe_sigma": ("expert_sigma", 1.0),
    "mamba_d_state": ("mamba_state_size", 16),
    "mamba_d_conv": ("mamba_conv_kernel", 4),
    "mamba_expand": ("mamba_expand", 2),
    "mamba_ff_mult": ("mamba_ff_multiplier", 4),
}
_BLOCKS = {"transformer": "trf_blocks", "mamba": "mamba_blocks"}
BACKBONE_FIELDS = {"encoder_use_mamba": "encoder_backbone", "flow_use_mamba": "flow_backbone"}
FREEZE_FIELDS = {
    "freeze_enc": "encoder",
    "freeze_flow": "flow",
    "freeze_dec": "decoder",
    "freeze_tok_emb": "token_embeddings",
    "freeze_pos_emb": "position_embeddings",
}
# Fields of the flow, which an auto-encoder's configuration may leave out.
FLOW_FIELDS = ("n_trf_blocks", "cross_att_idx", "moe_n_experts", "init_noise", "ode_steps")


class Weight(NamedTuple):
    """One of our tensors and where it stands in a research state dict."""

    name: str  # ours
    keys: tuple[str, ...]  # the research code's, which all hold the same values, unless `stacked`
    shape: tuple[int, ...]  # of one of them
    stacked: bool = False  # whether the keys are the rows of our tensor, one for each expert


def read_config(model_config: dict[str, Any], auto_encoder: bool) -> tuple[YanConfig, list[str]]:
    """
    Our configuration for a research one, and the names of its entries that have no meaning here. Raises `ValueError`
    for missing entries, all named, and for values that are not valid, under their name here.
    """
    needed = {*CONFIG_FIELDS, "ode_steps"} - ({*FLOW_FIELDS} if auto_encoder else set())
    if missing := sorted(needed - model_config.keys()):
        raise ValueError(f"The checkpoint's `model_config` has no {', '.join(missing)}.")
    fields: dict[str, Any] = {ours: model_config[name] for name, ours in CONFIG_FIELDS.items() if name in model_config}
    for name, (ours, default) in OPTIONAL_FIELDS.items():
        fields[ours] = model_config.get(name, default)
    for name, ours in BACKBONE_FIELDS.items():
        fields[ours] = "mamba" if model_config.get(name, False) else "transformer"
    fields["attention_dropout"] = fields["hidden_dropout"]
    fields["time_beta"] = [model_config.get("beta_a", 1.0), model_config.get("beta_b", 1.0)]
    if "ode_steps" in model_config:
        # The research code counts grid points.
        if model_config["ode_steps"] < 2:
            raise ValueError(f"`ode_steps` counts grid points, at least 2, but is {model_config['ode_steps']}.")
        fields["solver_steps"] = model_config["ode_steps"] - 1
    fields["frozen_parts"] = [part for name, part in FREEZE_FIELDS.items() if model_config.get(name, False)]
    if "mamba" in (fields["encoder_backbone"], fields["flow_backbone"]):
        fields["mamba_padding"] = "research"
    # The research table has one row more, which is never read.
    config = YanConfig(**fields, num_extra_positions=1, tie_word_embeddings=False, length_head_trained=False)
    known = {*CONFIG_FIELDS, *OPTIONAL_FIELDS, *BACKBONE_FIELDS, *FREEZE_FIELDS, "ode_steps", "beta_a", "beta_b"}
    return config, sorted(model_config.keys() - known)


def write_config(config: YanConfig) -> dict[str, Any]:
    """The research configuration of ours."""
    return {
        **{name: getattr(config, ours) for name, ours in CONFIG_FIELDS.items()},
        **{name: getattr(config, ours) for name, (ours, _) in OPTIONAL_FIELDS.items()},
        **{name: getattr(config, ours) == "mamba" for name, ours in BACKBONE_FIELDS.items()},
        **{name: part in config.frozen_parts for name, part in FREEZE_FIELDS.items()},
        "ode_steps": config.solver_steps + 1,
        **dict(zip(("beta_a", "beta_b"), config.time_beta)),
    }


def read_loss_weights(loss_config: dict[str, Any]) -> tuple[dict[str, float], list[str]]:
    """Weights of the terms, from the entries `lambda_*`; and the names of the entries that have no meaning here."""
    weights = {name: loss_config[f"lambda_{name}"] for name in DEFAULT_LOSS_WEIGHTS if f"lambda_{name}" in loss_config}
    return weights, sorted(loss_config.keys() - {f"lambda_{name}" for name in weights})


# Our names → the research code's, applied to a name in this order; all rules that match.
_RENAMED = [
    (r"^model\.", ""),
    (r"^lm_head", "decoder.lm_head"),
    (r"\.time_embedding\.proj\.", ".time_emb.1."),
    (r"\.gate\.up_proj\.", ".gate.0."),
    (r"\.gate\.down_proj\.", ".gate.2."),
    (r"\.experts\.(up|down)_proj$", r".experts.\1_proj.weight"),
    (r"\.experts\.(up|down)_proj_bias$", r".experts.\1_proj.bias"),
    (r"\.experts\.", ".expert_out_proj.{expert}."),
    (r"^decoder\.layers\.", "decoder.resi_blocks."),
    # A dropout stands between the two layers of a Mamba block's feed-forward network.
    (r"\.mamba_blocks\.(.+)\.down_proj\.", r".mamba_blocks.\1.layers.3."),
    (r"\.up_proj\.", ".layers.0."),
    (r"\.down_proj\.", ".layers.2."),
    (r"\.feed_forward\.", ".ff."),
    (r"\.adaptive_norm\.", ".adaLN.1."),
    (r"norm\.weight$", "norm.scale"),
    (r"norm\.bias$", "norm.shift"),
    (r"^(encoder|flow)\.norm\.", r"\1.final_norm."),
    (r"\.self_attn_norm\.", ".norm_self_att."),
    (r"\.mixer_norm\.", ".norm_self."),
    (r"\.feed_forward_norm\.", ".norm_ff."),
    (r"_attn\.([qkv])_proj\.", r"_attn.W_\1."),
    (r"_attn\.o_proj\.", "_attn.out_proj."),
    (r"\.(self|cross)_attn\.", r".\1_att."),
    (r"\.mixer\.", ".self_mixer."),
]


def weights_of(model: PreTrainedModel) -> list[Weight]:
    """Every tensor of a research checkpoint like a model of ours, which may be on the meta device."""
    config = model.config
    owners = ["", "encoder."] if model.model.flow is None else ["", "encoder.", "flow."]
    blocks = {part: f"{part}.{_BLOCKS[getattr(config, f'{part}_backbone')]}." for part in ("encoder", "flow")}
    found = []
    for name, tensor in model.state_dict().items():
        shape, key = tuple(tensor.shape), name
        for part, prefix in blocks.items():
            key = key.replace(f"model.{part}.layers.", prefix)
        for pattern, replacement in _RENAMED:
            key = re.sub(pattern, replacement, key)
        if name == "model.embed_tokens.weight":
            found.append(Weight(name, tuple(f"{owner}shared_tok_emb.weight" for owner in owners[:2]), shape))
        elif name == "model.embed_positions.weight":
            found.append(Weight(name, tuple(f"{owner}shared_pos_emb.weight" for owner in owners), shape))
        elif "{expert}" in key:
            keys = tuple(key.format(expert=index) for index in range(config.num_experts))
            found.append(Weight(name, keys, shape[1:], stacked=True))
        elif not name.startswith("length_head."):  # the research model has none
            found.append(Weight(name, (key,), shape))
    return found
