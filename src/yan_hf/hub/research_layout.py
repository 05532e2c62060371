# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The research code's names for configuration fields and weights, and ours: a table in two directions."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from ..configuration_yan import DEFAULT_LOSS_WEIGHTS, YanConfig


# Research name → ours, where a value is taken as it is.
CONFIG_FIELDS = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "max_length": "max_position_embeddings",
    "attention_heads": "num_attention_heads",
    "qkv_bias": "attention_bias",
    "dropout": "hidden_dropout",
    "encoder_n_trf_blocks": "encoder_layers",
    "n_trf_blocks": "flow_layers",
    "cross_att_idx": "cross_attention_layers",
    "decoder_n_resi_blocks": "decoder_layers",
    "latent_noise": "latent_noise",
    "init_noise": "init_noise",
    "moe_n_experts": "num_experts",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "mask_token_id": "mask_token_id",
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
    """
    One of our tensors and where it stands in a research state dict.

    Attributes:
        name: Our name, without the `model.` prefix of the whole model's parts.
        keys: Research keys. All hold the same values, unless `stacked`.
        shape: Shape of one of them.
        stacked: Whether the keys are the rows of our tensor, one for each expert.
    """

    name: str
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    stacked: bool = False


def read_config(model_config: dict[str, Any], auto_encoder: bool) -> tuple[YanConfig, list[str]]:
    """
    Our configuration for a research one.

    Returns:
        The configuration, and the names of the entries that have no meaning here.

    Raises:
        ValueError: for missing entries, all named, and for values that are not valid, under their name here.
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
    model_config = {name: getattr(config, ours) for name, ours in CONFIG_FIELDS.items()}
    model_config.update({name: getattr(config, ours) for name, (ours, _) in OPTIONAL_FIELDS.items()})
    model_config.update({name: getattr(config, ours) == "mamba" for name, ours in BACKBONE_FIELDS.items()})
    model_config.update({name: part in config.frozen_parts for name, part in FREEZE_FIELDS.items()})
    model_config["ode_steps"] = config.solver_steps + 1
    model_config["beta_a"], model_config["beta_b"] = config.time_beta
    return model_config


def read_loss_weights(loss_config: dict[str, Any]) -> tuple[dict[str, float], list[str]]:
    """Weights of the terms, from the entries `lambda_*`; and the names of the entries that have no meaning here."""
    weights = {name: loss_config[f"lambda_{name}"] for name in DEFAULT_LOSS_WEIGHTS if f"lambda_{name}" in loss_config}
    return weights, sorted(loss_config.keys() - {f"lambda_{name}" for name in weights})


def weights_of(config: YanConfig, auto_encoder: bool) -> Iterator[Weight]:
    """Every tensor of a research checkpoint, in its order."""
    d, inner = config.hidden_size, config.intermediate_size
    owners = ["", "encoder."] if auto_encoder else ["", "encoder.", "flow."]
    positions = config.max_position_embeddings + config.num_extra_positions
    tokens = tuple(f"{owner}shared_tok_emb.weight" for owner in ("", "encoder."))
    yield Weight("model.embed_tokens.weight", tokens, (config.vocab_size, d))
    table = tuple(f"{owner}shared_pos_emb.weight" for owner in owners)
    yield Weight("model.embed_positions.weight", table, (positions, d))
    for index in range(config.encoder_layers):
        yield from _block(config, "encoder", index, config.encoder_backbone, cross_attention=False)
    yield from _norm("model.encoder.norm", "encoder.final_norm", d)
    if not auto_encoder:
        yield from _linear("model.flow.time_embedding.proj", "flow.time_emb.1", d, d)
        for index in range(config.flow_layers):
            yield from _block(config, "flow", index, config.flow_backbone, index in config.cross_attention_layers)
        yield from _norm("model.flow.norm", "flow.final_norm", d)
        for ours, layer, rows, columns in (("up_proj", 0, inner, d), ("down_proj", 2, d, inner)):
            for suffix, kind, shape in (("", "weight", (rows, columns)), ("_bias", "bias", (rows,))):
                keys = tuple(f"flow.expert_out_proj.{k}.layers.{layer}.{kind}" for k in range(config.num_experts))
                yield Weight(f"model.flow.experts.{ours}{suffix}", keys, shape, stacked=True)
        gate = config.gate_dim_multiplier * d
        yield from _linear("model.flow.gate.up_proj", "flow.gate.0", gate, 3 * d)
        yield from _linear("model.flow.gate.down_proj", "flow.gate.2", config.num_experts, gate)
    for index in range(config.decoder_layers):
        ours, theirs = f"model.decoder.layers.{index}", f"decoder.resi_blocks.{index}"
        yield from _norm(f"{ours}.norm", f"{theirs}.norm", d)
        yield from _feed_forward(f"{ours}.feed_forward", f"{theirs}.ff", d, inner)
    yield from _linear("lm_head", "decoder.lm_head", config.vocab_size, d)


def _linear(ours: str, theirs: str, rows: int, columns: int, bias: bool = True) -> Iterator[Weight]:
    yield Weight(f"{ours}.weight", (f"{theirs}.weight",), (rows, columns))
    if bias:
        yield Weight(f"{ours}.bias", (f"{theirs}.bias",), (rows,))


def _norm(ours: str, theirs: str, size: int) -> Iterator[Weight]:
    yield Weight(f"{ours}.weight", (f"{theirs}.scale",), (size,))
    yield Weight(f"{ours}.bias", (f"{theirs}.shift",), (size,))


def _feed_forward(ours: str, theirs: str, size: int, inner: int, last: int = 2) -> Iterator[Weight]:
    yield from _linear(f"{ours}.up_proj", f"{theirs}.layers.0", inner, size)
    yield from _linear(f"{ours}.down_proj", f"{theirs}.layers.{last}", size, inner)


def _attention(config: YanConfig, ours: str, theirs: str) -> Iterator[Weight]:
    d = config.hidden_size
    for name, research in (("q_proj", "W_q"), ("k_proj", "W_k"), ("v_proj", "W_v")):
        yield from _linear(f"{ours}.{name}", f"{theirs}.{research}", d, d, config.attention_bias)
    yield from _linear(f"{ours}.o_proj", f"{theirs}.out_proj", d, d)


def _mixer(config: YanConfig, ours: str, theirs: str) -> Iterator[Weight]:
    d, state = config.hidden_size, config.mamba_state_size
    inner, rank = config.mamba_expand * d, -(-d // 16)
    shapes = {
        "A_log": (inner, state),
        "D": (inner,),
        "in_proj.weight": (2 * inner, d),
        "conv1d.weight": (inner, 1, config.mamba_conv_kernel),
        "conv1d.bias": (inner,),
        "x_proj.weight": (rank + 2 * state, inner),
        "dt_proj.weight": (inner, rank),
        "dt_proj.bias": (inner,),
        "out_proj.weight": (d, inner),
    }
    for direction in ("fwd", "bwd"):
        for name, shape in shapes.items():
            yield Weight(f"{ours}.{direction}.{name}", (f"{theirs}.{direction}.{name}",), shape)
    yield from _linear(f"{ours}.proj", f"{theirs}.proj", d, 2 * d)


def _block(config: YanConfig, part: str, index: int, backbone: str, cross_attention: bool) -> Iterator[Weight]:
    d, mamba = config.hidden_size, backbone == "mamba"
    ours, theirs = f"model.{part}.layers.{index}", f"{part}.{'mamba' if mamba else 'trf'}_blocks.{index}"
    if part == "encoder":
        name, research = ("mixer_norm", "norm_self") if mamba else ("self_attn_norm", "norm_self_att")
        yield from _norm(f"{ours}.{name}", f"{theirs}.{research}", d)
        yield from _norm(f"{ours}.feed_forward_norm", f"{theirs}.norm_ff", d)
    if mamba:
        yield from _mixer(config, f"{ours}.mixer", f"{theirs}.self_mixer")
    else:
        yield from _attention(config, f"{ours}.self_attn", f"{theirs}.self_att")
    if cross_attention:
        yield from _attention(config, f"{ours}.cross_attn", f"{theirs}.cross_att")
    inner = config.mamba_ff_multiplier * d if mamba else config.intermediate_size
    # A dropout stands between the two layers of a Mamba block's feed-forward network.
    yield from _feed_forward(f"{ours}.feed_forward", f"{theirs}.ff", d, inner, last=3 if mamba else 2)
    if part == "flow":
        # In the flow the norms have no parameters: scale and shift come from the time embedding.
        rows = (6 if cross_attention else 4) * d
        yield from _linear(f"{ours}.adaptive_norm", f"{theirs}.adaLN.1", rows, d)


__all__ = ["Weight", "read_config", "read_loss_weights", "weights_of", "write_config"]
