# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Sources from users: checked, and encoded as nothing but text."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from .tokenization import encode_text


def encode_source(
    tokenizer: PreTrainedTokenizerBase, text: str, longest: int, where: str = "The source", **marks: Any
) -> list[int]:
    """
    Token ids of one source.

    Args:
        tokenizer: The tokenizer.
        text: The source.
        longest: How many tokens the model takes, its `max_position_embeddings`.
        where: What the source is called in an error.
        marks: `mask_marker` and `split_special_tokens` of [`encode_text`].

    Raises:
        TypeError: for what is no text.
        ValueError: for one that is empty, too long, or holds half a surrogate pair.
    """
    if not isinstance(text, str):
        raise TypeError(f"{where} must be a text, but is {text!r:.80}.")
    if not text.strip():
        raise ValueError(f"{where} is empty: give it a text or leave it out.")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{where} holds half a surrogate pair, which is no character: {text[:80]!r}.")
    (ids,) = encode_text(tokenizer, [text], **marks)
    if len(ids) > longest:
        raise ValueError(f"{where} has {len(ids)} tokens, but the model takes {longest} at most: shorten it.")
    return ids
