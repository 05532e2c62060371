# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Rows of a service, generated in batches: what a row gets does not depend on the others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class Row:
    """One text to generate."""

    input_ids: tuple[int, ...]
    seed: int
    options: tuple[tuple[str, Any], ...] = ()  # of `generate`; rows with the same ones share a call
    known: tuple[int, int] = (0, 0)  # tokens before and behind a filling, which are not told again
    stop: tuple[str, ...] = ()  # the text ends before the first of them
    with_drafts: bool = False  # whether the draft after every solver step is told too


def _limit(default: int, help: str) -> int:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Limits:
    """What a service accepts."""

    max_batch_tokens: int = _limit(4096, "source tokens of a batch with its padding, for each candidate")
    max_batch_rows: int = _limit(256, "texts of a batch")
    max_queued_rows: int = _limit(256, "texts that wait or are being generated; over it the answer is 429")
    max_n: int = _limit(16, "texts for each prompt of a request")
    max_prompts: int = _limit(64, "prompts of a request")
    max_steps: int = _limit(64, "solver steps that a request may ask for")
    max_candidates: int = _limit(16, "candidates, of samples and of lengths, that a request may ask for")
    max_body_bytes: int = _limit(1_000_000, "size of a request")


def padded_tokens(rows: Sequence[Row]) -> int:
    """Source tokens of a batch of rows with its padding, for each candidate: what a batch costs."""
    candidates = sum(
        dict(row.options).get("num_candidates", 1) * dict(row.options).get("num_length_candidates", 1) for row in rows
    )
    return candidates * max(len(row.input_ids) for row in rows)


class DraftStreamer(BaseStreamer):
    """Hands on every step's draft, `(B, L)`."""

    def __init__(self, put_draft: Callable[[torch.Tensor], None]):
        self.put_draft = put_draft

    def put(self, value: torch.Tensor):
        """The final tokens are in the output."""

    def end(self):
        """Nothing is left to do."""


def generate_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    put_draft: Callable[[int, str], None] | None = None,
) -> list[dict[str, Any]]:
    """
    Generates every row.

    Args:
        model: A [`YanForConditionalGeneration`] in eval mode.
        tokenizer: Its tokenizer.
        rows: The rows.
        put_draft: Gets a row's number and its draft after every solver step, for rows `with_drafts`.

    Returns:
        For each row `text`, `num_tokens` and `finish_reason` (`"stop"` or `"length"`), or, where `generate` refuses
        its options, `error` alone.
    """
    results: list[dict[str, Any]] = [{}] * len(rows)
    groups: dict[tuple, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault((row.options, row.with_drafts), []).append(index)
    end_ids = set(model.generation_config.end_token_ids())
    # A row does not know which of its source's texts it is, so that its choice of experts cannot be stratified.
    drawn = {"expert_selection": "sample"} if model.generation_config.expert_selection == "stratified" else {}

    def unpadded(ids: list[int]) -> list[int]:
        while ids and ids[-1] == tokenizer.pad_token_id:
            ids.pop()
        return ids

    for (options, with_drafts), group in groups.items():

        def told(row: Row, ids: list[int]) -> str:
            before, behind = row.known
            text = tokenizer.decode(ids[before : len(ids) - behind], skip_special_tokens=True)
            return text[: min((text.find(stop) for stop in row.stop if stop in text), default=len(text))]

        def show(drafts: torch.Tensor, group: list[int] = group):
            for index, ids in zip(group, map(unpadded, drafts.tolist())):
                put_draft(index, told(rows[index], ids))

        batch = tokenizer.pad({"input_ids": [list(rows[index].input_ids) for index in group]}, return_tensors="pt")
        batch = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        seeds = [rows[index].seed for index in group]
        streamer = DraftStreamer(show) if with_drafts and put_draft is not None else None
        try:
            # Without the scores that a dictionary of results holds: they take a fifth of the time.
            found = model.generate(**batch, seeds=seeds, streamer=streamer, **{**drawn, **dict(options)})
        except ValueError as error:
            for index in group:
                results[index] = {"error": str(error)}
            continue
        longest = dict(options).get("max_new_tokens")
        for index, ids in zip(group, map(unpadded, found.tolist())):
            row = rows[index]
            is_cut = len(ids) == longest and ids[-1] not in end_ids and not any(row.known)
            results[index] = {
                "text": told(row, ids),
                "num_tokens": max(0, len(ids) - sum(row.known)),
                "finish_reason": "length" if is_cut else "stop",
            }
    return results
