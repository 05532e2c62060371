# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a checkpoint folder holds, read from its configuration and the headers of its weights."""

import json
import math
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open

from ..configuration_yan import YanConfig
from ..generation_config_yan import YanGenerationConfig


_TABLES = ("embed_tokens", "embed_positions", "lm_head")
# In pretrained encoders, beside these.
_TABLES += ("word_embeddings", "tok_embeddings", "position_embeddings")


def length_mode(config: YanConfig) -> str:
    """Where the lengths of texts come from, in words."""
    if not config.length_head_trained:
        return "the user must give it: the length head is not trained"
    by_token = {
        "aligned": "predicted for every mask, and for the whole of a text without masks",
        "fertility": "predicted for every source token",
    }
    return by_token.get(config.start_state, "predicted by the length head")


def encoder_name(config: YanConfig) -> str:
    """The encoder's backbone, or the type of model that a pretrained one is of."""
    if config.encoder_config is None:
        return config.encoder_backbone
    return f"pretrained {config.encoder_config.model_type}"


def is_table(name: str) -> bool:
    """Whether a parameter belongs to the token or position table or the vocabulary head, by its name."""
    return any(part in _TABLES for part in name.split("."))


def checkpoint_info(folder: str | Path) -> dict[str, Any]:
    """
    Sizes, configuration, solver steps, routing, dtype and licence of a local checkpoint. No weight is read.

    Returns:
        A flat dictionary of plain values, `None` where the checkpoint does not tell. `parameters` counts those in the
        weight files: `embedding_parameters` in the tables and the vocabulary head, `core_parameters` elsewhere.

    Raises:
        FileNotFoundError: without the folder, a configuration or weights.
        ValueError: for a configuration of another model type.
        OSError: for damaged weights, with the file's name.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no checkpoint: there is no config.json. Name a local folder.")
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is not JSON: {error}") from error
    check_model_type(folder, fields.get("model_type") if isinstance(fields, dict) else fields)
    config = YanConfig.from_pretrained(folder)
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no weights: there is no model*.safetensors.")
    sizes, dtypes = _read_headers(files)
    tables = sum(size for name, size in sizes.items() if is_table(name))
    if (folder / "generation_config.json").is_file():
        generation = YanGenerationConfig.from_pretrained(folder)
    else:
        generation = YanGenerationConfig.from_model_config(config)

    def settings(*names: str) -> dict[str, Any]:
        return {name: getattr(config, name) for name in names}

    return {
        "folder": str(folder),
        "architecture": (config.architectures or [None])[0],
        "parameters": sum(sizes.values()),
        "embedding_parameters": tables,
        "core_parameters": sum(sizes.values()) - tables,
        "weight_bytes": sum(path.stat().st_size for path in files),
        "weight_files": len(files),
        "dtype": ", ".join(sorted(dtypes)),
        **settings("vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings"),
        "encoder": f"{encoder_name(config)}, {config.encoder_layers} blocks",
        "flow": f"{config.flow_backbone}, {config.flow_layers} blocks, cross-attention in "
        f"{', '.join(map(str, config.cross_attention_layers)) or 'none'}",
        "decoder": f"{config.decoder_layers} blocks",
        **settings("num_experts", "expert_scope", "reselect_experts", "start_state", "keep_known", "routing"),
        "solver": generation.solver or "euler",
        "num_inference_steps": generation.num_inference_steps or config.solver_steps,
        "length_mode": length_mode(config),
        "max_new_tokens": generation.max_new_tokens,
        "frozen_parts": ", ".join(config.frozen_parts) or None,
        "tokenizer": (folder / "tokenizer_config.json").is_file(),
        "saved_with_code": bool(getattr(config, "auto_map", None)),
        "training_steps": _training_steps(folder),
        "license": _license(folder),
    }


def check_model_type(folder: str | Path, kind: Any):
    """Raises `ValueError` for a model of another type, which would be a YAN of random weights."""
    if kind != YanConfig.model_type:
        raise ValueError(f"{folder} holds a model of the type {kind!r}; this command reads {YanConfig.model_type!r}.")


def _read_headers(files: list[Path]) -> tuple[dict[str, int], set[str]]:
    """Sizes of the tensors by name, and their dtypes."""
    sizes: dict[str, int] = {}
    dtypes: set[str] = set()
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                    tensor = file.get_slice(name)
                    sizes[name] = math.prod(tensor.get_shape())
                    dtypes.add(tensor.get_dtype())
        except SafetensorError as error:
            remedy = "Copy or download the checkpoint again."
            raise OSError(f"{path} is damaged or cut short ({error}). {remedy}") from error
    return sizes, dtypes


def _training_steps(folder: Path) -> int | None:
    """Optimiser steps, where a trainer or the research code has left their number."""
    for path in (folder / "trainer_state.json", folder / "research_metadata.json"):
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            return found.get("global_step", found.get("entries", {}).get("step"))
    return None


def _license(folder: Path) -> str | None:
    card = folder / "README.md"
    return ModelCard.load(card, ignore_metadata_errors=True).data.license if card.is_file() else None
