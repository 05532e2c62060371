# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Checkpoints of the research code: read into ours, and written back exactly."""

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..configuration_yan import YanConfig
from ..data.files import check_output_folder, whole_file
from ..modeling_yan import YanForAutoEncoding, YanForConditionalGeneration
from ..saving import staged_save
from .export import load_model
from .research_layout import Weight, read_config, read_loss_weights, weights_of, write_config


logger = logging.get_logger(__name__)

# What a research file holds beside weights and configuration, kept for the way back.
METADATA_FILE = "research_metadata.json"


def convert_research_checkpoint(
    path: str | Path,
    output_dir: str | Path,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    overwrite: bool = False,
) -> PreTrainedModel:
    """
    Converts a checkpoint of the research code to a folder for `from_pretrained`. The research model has no length
    head: the converted one's is new, and `generate` asks for `target_lengths` until it has been trained.

    Args:
        path: The file, read with `weights_only=True`.
        output_dir: Folder to write, new or empty.
        tokenizer: The tokenizer, its folder or its name on the Hub, saved beside the model.
        dtype: Of the saved weights, by default the file's.
        overwrite: Whether files of a checkpoint in `output_dir` that are written again are replaced.

    Returns:
        The model in eval mode: [`YanForConditionalGeneration`], or [`YanForAutoEncoding`] for a file without a flow.

    Raises:
        FileNotFoundError: where there is no such file.
        FileExistsError: for an `output_dir` that holds anything, but for a checkpoint with `overwrite`.
        ValueError: for a file that is no research checkpoint or whose pickle would need code, for tensors that do not
            fit (all of them in one message), an unknown `dtype`, and a tokenizer that does not fit.
    """
    path, dtype = Path(path), _dtype(dtype)
    check_output_folder(output_dir, overwrite)
    checkpoint = _load(path)
    state = {key.removeprefix("module."): value for key, value in checkpoint["model"].items()}
    auto_encoder = not any(key.startswith("flow.") for key in state)
    weights, unknown = read_loss_weights(checkpoint.get("loss_config") or {})
    try:
        config, ignored = read_config(checkpoint["model_config"], auto_encoder)
        if weights:
            config.loss_weights = {**config.loss_weights, **weights}
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ValueError(f"{path} has a configuration that cannot be used: {error}") from error
    if unknown := ", ".join([*ignored, *unknown]):
        logger.warning(f"{path}: these entries have no meaning here and are only kept for the way back: {unknown}.")
    with torch.device("meta"):
        model = (YanForAutoEncoding if auto_encoder else YanForConditionalGeneration)(config)
    layout = weights_of(model)
    _check_keys(path, state, layout)
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    if tokenizer is not None:
        _check_tokenizer(tokenizer, config)

    # Tensors that are not stacked stay views of the mapped file: nothing is read twice.
    converted = {weight.name: _tensor(state, weight, dtype) for weight in layout}
    dtypes = {value.dtype for value in converted.values()}
    config.dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    if not auto_encoder:
        model.length_head.to_empty(device="cpu").to(config.dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for name, weight in model.length_head.named_parameters():
                torch.nn.init.normal_(weight, std=0.02) if name.endswith("weight") else torch.nn.init.zeros_(weight)
        converted.update({f"length_head.{name}": value for name, value in model.length_head.state_dict().items()})
        logger.warning(f"{path} has no length head. Pass `target_lengths` to `generate`, or train the model first.")
    model.load_state_dict(converted, assign=True)
    model.tie_weights()
    model.eval()
    entries = {key: value for key, value in checkpoint.items() if key not in ("model", "model_config")}
    metadata = {
        "entries": entries,
        "model_config": checkpoint["model_config"],
        "module_prefix": any(key.startswith("module.") for key in checkpoint["model"]),
    }

    def plain(value: Any) -> Any:  # of the metrics, say
        return value.tolist() if isinstance(value, torch.Tensor) else str(value)

    with staged_save(output_dir) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / METADATA_FILE).write_text(json.dumps(metadata, indent=2, default=plain) + "\n")
    return model


def export_research_checkpoint(model_dir: str | Path, path: str | Path, overwrite: bool = False):
    """
    Writes a checkpoint of ours in the research layout: the inverse of [`convert_research_checkpoint`]. What the
    research model has no place for is left out: the length head.

    Args:
        model_dir: Folder of the checkpoint, or its name on the Hub.
        path: File to write; it appears when it is complete.
        overwrite: Whether a research checkpoint that is there is replaced.

    Raises:
        FileExistsError: for a `path` that is there, but for a research checkpoint with `overwrite`.
        ValueError: for a model that the research layout cannot hold, such as one with tied tables or with a flow that
            starts at the source's tokens.
    """
    path = Path(path)
    _check_output_file(path, overwrite)
    model = load_model(model_dir)
    _check_exportable(model.config)
    metadata_file = Path(model_dir) / METADATA_FILE
    metadata = json.loads(metadata_file.read_text()) if metadata_file.is_file() else {}
    prefix = "module." if metadata.get("module_prefix") else ""
    state, tensors = {}, model.state_dict()
    for weight in weights_of(model):
        value = tensors[weight.name]
        for index, key in enumerate(weight.keys):
            state[prefix + key] = value[index].clone() if weight.stacked else value
    model_config = write_config(model.config)
    kept = metadata.get("model_config")
    if kept is not None:
        # What the file had and how it spelled it, updated by what has changed since.
        before = write_config(read_config(kept, isinstance(model, YanForAutoEncoding))[0])
        model_config = {**kept, **{name: value for name, value in model_config.items() if value != before[name]}}
    with whole_file(path) as partial:
        torch.save({"model": state, "model_config": model_config, **metadata.get("entries", {})}, partial)


def _check_output_file(path: Path, overwrite: bool):
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{path} is there already: name another file, or use `overwrite=True` (--overwrite).")
    try:
        _load(path)
    except ValueError as error:
        raise FileExistsError(f"{path} is no research checkpoint, so it is not replaced: name another.") from error


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        mapped = zipfile.is_zipfile(path)  # the format since torch 1.6
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise ValueError(
            f"{path} cannot be read with `weights_only=True`: it is no checkpoint, or holds more than plain values: "
            "code from the file would run. It is refused; save it again with tensors and plain values only."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), Mapping):
        raise ValueError(f"{path} is no research checkpoint: it has no state dict under `model`.")
    if not isinstance(checkpoint.get("model_config"), dict):
        raise ValueError(f"{path} is no research checkpoint: it has no `model_config`.")
    loss_config = checkpoint.get("loss_config") or {}
    if not isinstance(loss_config, dict):
        raise ValueError(f"{path} holds no dictionary under `loss_config`, but {str(loss_config)[:80]}.")
    for part in (checkpoint, checkpoint["model"], checkpoint["model_config"], loss_config):
        if wrong := [key for key in part if not isinstance(key, str)]:
            raise ValueError(f"{path} is no research checkpoint: {wrong[0]!r} is a key where a name should be.")
    return checkpoint


def _check_keys(path: Path, state: dict[str, torch.Tensor], layout: list[Weight]):
    """Raises one error for everything that does not fit."""
    expected = {key: weight.shape for weight in layout for key in weight.keys}
    problems = [f"missing: {key} {shape}" for key, shape in expected.items() if key not in state]
    problems += [f"unexpected: {key}" for key in state if key not in expected]
    for key, shape in expected.items():
        value = state.get(key)
        if key in state and not isinstance(value, torch.Tensor):
            problems.append(f"no tensor: {key}")
        elif value is not None and not (value.is_floating_point() and value.layout == torch.strided):
            problems.append(f"no dense floating-point numbers: {key}")
        elif value is not None and value.shape != shape:
            problems.append(f"misshapen: {key} is {tuple(value.shape)}, should be {shape}")
    if not problems:
        copies = [(key, w.keys[0]) for w in layout if not w.stacked for key in w.keys[1:]]
        differing = [(key, first) for key, first in copies if not torch.equal(state[key], state[first])]
        problems = [f"differs from {first}, of which it should be a copy: {key}" for key, first in differing]
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(f"{path} does not hold the weights of its `model_config`:\n  {listed}")


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: YanConfig):
    if len(tokenizer) > (size := config.vocab_size):
        raise ValueError(f"The tokenizer has {len(tokenizer)} tokens, but the checkpoint's `vocab_size` is {size}.")
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id"):
        ours, theirs = getattr(tokenizer, name), getattr(config, name)
        if ours is not None and theirs is not None and ours != theirs:
            remedy = "Give the tokenizer that the checkpoint was trained with."
            raise ValueError(f"`{name}` is {ours} in the tokenizer but {theirs} in the checkpoint. {remedy}")


def _check_exportable(config: YanConfig):
    needed = {
        "encoder_config": None,
        "tie_word_embeddings": False,
        "num_extra_positions": 1,
        "feed_forward_multiplier": 4,
    }
    for name, value in {**needed, "hidden_act": "gelu", "start_state": "noise"}.items():
        if (found := getattr(config, name)) != value:
            found = getattr(found, "model_type", found)
            raise ValueError(f"The research layout has `{name}={value}`, this checkpoint {found!r}: no export.")


def _tensor(state: dict[str, torch.Tensor], weight: Weight, dtype: torch.dtype | None) -> torch.Tensor:
    values = [state[key].to(dtype or state[key].dtype) for key in weight.keys]
    return torch.stack(values) if weight.stacked else values[0]


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"`dtype` must be float32, float16 or bfloat16, but is {dtype}.")
    return dtype
