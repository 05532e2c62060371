# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Whether a tokenizer and tokenized examples suit a model: checked before training starts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.configuration_utils import PreTrainedConfig


# Embedding tables are often rounded up to one of these, for the sake of the hardware.
_ROUNDED = (8, 16, 32, 64, 128)
_BATCH = 10_000


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """
    Raises `ValueError` where a tokenizer does not belong to a model: another number of tokens (the model's may be
    rounded up), special tokens other than the configuration's, or, for a model from a local folder with a tokenizer,
    other ids than that one's. [`prepare_tokenizer`] makes a tokenizer the model's own.
    """
    size = model.config.vocab_size
    remedy = (
        "Use the checkpoint's own tokenizer, or call `yan_hf.prepare_tokenizer(tokenizer, model)`, which resizes the "
        "model where it has to, before training on the new vocabulary."
    )
    sizes = f"The tokenizer has {len(tokenizer)} tokens, but the model's `vocab_size` is {size}. {remedy}"
    if len(tokenizer) > size:
        raise ValueError(sizes)
    for name in ("pad_token_id", "eos_token_id", "mask_token_id"):
        ours, theirs = getattr(tokenizer, name), getattr(model.config, name)
        if ours is None or ours != theirs:
            raise ValueError(f"`{name}` is {ours} in the tokenizer but {theirs} in the configuration. {remedy}")
    if getattr(model, "_tokenizer_prepared", False):
        return
    file = Path(model.config.name_or_path or ".", "tokenizer.json")
    if model.config.name_or_path and file.is_file():
        given = tokenizer.get_vocab()
        for token, index in Tokenizer.from_file(str(file)).get_vocab().items():
            if given.get(token) != index:
                found = f"{token!r} has the id {given.get(token)}, but {index} in the tokenizer of {file.parent}"
                raise ValueError(f"The tokenizer is not the model's: {found}. {remedy}")
    elif len(tokenizer) < size and all(-(-len(tokenizer) // unit) * unit != size for unit in _ROUNDED):
        raise ValueError(sizes)


def check_examples(
    examples: Any, config: PreTrainedConfig, where: str = "The data set", cut_inputs: bool = False
) -> None:
    """
    Raises `ValueError` for the first tokenized example that a model cannot take, with its number.

    Args:
        examples: A `datasets.Dataset` or a list of dictionaries with `input_ids` and, where they are there, `labels`.
            Anything else is left to the model, which sees it batch by batch.
        config: The model's configuration: its position table and vocabulary are what must hold the examples.
        where: What the examples are, for the message.
        cut_inputs: Whether the collator cuts `input_ids`, so that they may be of any length.
    """
    for start, name, lengths, ids in _columns(examples):
        limit = np.inf if cut_inputs and name == "input_ids" else config.max_position_embeddings
        for row in np.flatnonzero((lengths < 1) | (lengths > limit))[:1]:
            found = f"{where}, row {start + row}, has {lengths[row]} tokens in `{name}`"
            if lengths[row] < 1:
                raise ValueError(f"{found}. Leave such rows out.")
            raise ValueError(
                f"{found}, but the model's `max_position_embeddings` is {limit}. Cut such rows or leave them out, as "
                "`TaskEncoder` does with `max_source_length` and `max_target_length`."
            )
        wrong = (ids >= config.vocab_size) | (ids < 0) & ((ids != -100) | (name != "labels"))
        for place in np.flatnonzero(wrong)[:1]:
            row = start + int(np.searchsorted(np.cumsum(lengths), place, side="right"))
            found = f"{where}, row {row}, has the token id {ids[place]} in `{name}`"
            limit = f"the model's `vocab_size` is {config.vocab_size}"
            raise ValueError(f"{found}, but {limit}. Tokenize the data with the model's own tokenizer.")


def _columns(examples: Any) -> Iterator[tuple[int, str, np.ndarray, np.ndarray]]:
    """The first row's number, the column's name, the rows' lengths and all their ids, batch by batch."""
    if isinstance(examples, (list, tuple)):
        for start in range(0, len(examples), _BATCH):
            rows = examples[start : start + _BATCH]
            for name in ("input_ids", "labels"):
                if all(isinstance(row, dict) and row.get(name) is not None for row in rows):
                    values = [np.asarray(row[name]).reshape(-1) for row in rows]
                    yield start, name, np.array([len(value) for value in values]), np.concatenate(values)
    elif hasattr(examples, "with_format") and hasattr(examples, "__len__") and len(examples) > 0:
        import pyarrow.compute as compute  # comes with datasets, which made the columns

        names = [name for name in ("input_ids", "labels") if name in examples.column_names]
        for number, table in enumerate(examples.select_columns(names).with_format("arrow").iter(_BATCH)):
            for name in names:
                lengths = compute.fill_null(compute.list_value_length(table[name]), 0).to_numpy()
                yield number * _BATCH, name, lengths, compute.list_flatten(table[name]).to_numpy()
