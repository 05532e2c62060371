# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The states of a frozen pretrained encoder, computed once for a data set and kept on disk."""

import hashlib
from typing import Any

import numpy as np
import torch
from datasets import Array2D, Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel


def encode_dataset(model: PreTrainedModel, examples: Dataset, batch_size: int = 64, dtype: str = "float32") -> Dataset:
    """
    Tokenized examples with a frozen encoder's states of their sources and targets, `encoder_states` `(Lx, D)` and
    `target_states` `(Ly, D)`: batches of them train without running the encoder again. A token takes `D` numbers. Of
    examples that are themselves on disk, the result stands in the cache of `datasets` beside them, and is found again
    for the same weights.

    Args:
        model: A model with an `encoder_config`, on the device to encode on.
        examples: Pairs, with `input_ids` and `labels`, as they will be trained on.
        batch_size: Rows at once.
        dtype: Of the states, `"float32"` or `"float16"`, which takes half of the room.

    Returns:
        The examples as NumPy arrays.

    Raises:
        ValueError: for a model without a pretrained encoder, examples without both columns, and another `dtype`.
    """
    if getattr(model.config, "encoder_config", None) is None:
        raise ValueError("The model has no `encoder_config`: only the states of a pretrained encoder stay the same.")
    if missing := {"input_ids", "labels"} - {*examples.column_names}:
        raise ValueError(f"The examples have no column {', '.join(sorted(missing))}: tokenize pairs first.")
    if dtype not in ("float32", "float16"):
        raise ValueError(f'`dtype` must be "float32" or "float16", but is {dtype!r}.')
    encoder = model.base_model.encoder

    def encode(rows: dict[str, list]) -> dict[str, list]:
        mask = rows.get("attention_mask") or [np.ones_like(ids) for ids in rows["input_ids"]]
        given = {"input_ids": (rows["input_ids"], 0), "attention_mask": (mask, 0), "labels": (rows["labels"], -100)}
        batch = {name: _pad(*values).to(model.device) for name, values in given.items()}
        found = {}
        for name, (states, _) in zip(("encoder_states", "target_states"), encoder.encode_batch(batch)):
            lengths = [len(row) for row in rows["input_ids" if name == "encoder_states" else "labels"]]
            states = states.float().cpu().numpy().astype(dtype)
            found[name] = [row[:length] for row, length in zip(states, lengths)]
        return found

    feature = Array2D((None, model.config.encoder_config.hidden_size), dtype)
    features = examples.features.copy()
    features.update(encoder_states=feature, target_states=feature)
    options: dict[str, Any] = {"batched": True, "batch_size": batch_size, "features": features, "desc": "encoding"}
    fingerprint = _fingerprint(encoder.model, examples, dtype)
    was_training = encoder.model.training
    encoder.model.eval()
    try:
        with torch.no_grad():
            encoded = examples.with_format("numpy").map(encode, new_fingerprint=fingerprint, **options)
    finally:
        encoder.model.train(was_training)
    return encoded.with_format("numpy")


def _pad(rows: list, value: int) -> torch.Tensor:
    rows = [torch.from_numpy(np.array(row, dtype=np.int64)) for row in rows]
    return pad_sequence(rows, batch_first=True, padding_value=value)


def _fingerprint(encoder: PreTrainedModel, examples: Dataset, dtype: str) -> str:
    """Names the result in the cache: of the examples, the encoder's weights and the dtype."""
    digest = hashlib.blake2b(f"{examples._fingerprint} {dtype} {encoder.config.to_json_string()}".encode())
    for name, weight in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
