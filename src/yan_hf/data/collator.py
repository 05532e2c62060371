# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Tokenized examples, span corruption and the data collator."""

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .alignment import align_tokens
from .tokenization import MASK_MARKER, encode_text


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    targets: Sequence[str],
    max_source_length: int | None = None,
    max_target_length: int | None = None,
    truncate_targets: bool = False,
    mask_marker: str | None = MASK_MARKER,
) -> dict[str, list[list[int]]]:
    """
    Tokenizes source-target pairs, for `datasets.Dataset.map(..., batched=True)`.

    Args:
        tokenizer: A tokenizer with the special tokens YAN needs; see [`prepare_tokenizer`].
        sources: Source texts.
        targets: Target texts, one for each source.
        max_source_length: Longer sources are cut there.
        max_target_length: Longest target, the end token included.
        truncate_targets: Whether to cut longer targets, keeping the end token, instead of raising.
        mask_marker: What stands for the mask token in a source. Special tokens that a text spells out are text.

    Returns:
        `input_ids` and `labels`; every target ends with exactly one end token and has no begin token.

    Raises:
        ValueError: for lists of different lengths, an empty source, and a target over `max_target_length`.
    """
    if len(sources) != len(targets):
        raise ValueError(f"There are {len(sources)} sources but {len(targets)} targets.")
    input_ids = encode_text(tokenizer, sources, mask_marker, max_source_length)
    labels = []
    for row, ids in enumerate(encode_text(tokenizer, targets, add_special_tokens=False)):
        ids = [*ids, tokenizer.eos_token_id]
        if max_target_length is not None and len(ids) > max_target_length:
            if not truncate_targets:
                found = f"Target {row} has {len(ids)} tokens with its end token, more than `max_target_length="
                remedy = "Raise the limit, or pass `truncate_targets=True`."
                raise ValueError(f"{found}{max_target_length}`: {targets[row][:80]!r}. {remedy}")
            ids = [*ids[: max_target_length - 1], tokenizer.eos_token_id]
        labels.append(ids)
    if [] in input_ids:
        row = input_ids.index([])
        raise ValueError(f"Source {row} has no tokens: {sources[row]!r}. Leave the row out.")
    return {"input_ids": input_ids, "labels": labels}


def corrupt_spans(
    ids: np.ndarray, mask_token_id: int, rng: np.random.Generator, rate: float = 0.08, max_span: int = 3
) -> np.ndarray:
    """
    Collapses random spans to one mask token each.

    Args:
        ids: Tokens of one text, `(L,)`.
        mask_token_id: The mask token.
        rng: Source of the randomness.
        rate: Share of the tokens that is masked: at least one, and at most what spans that do not touch can cover.
        max_span: Spans are 1 to `max_span` tokens long, evenly drawn; the last one is cut to meet the rate.

    Returns:
        The shorter text, where every mask token stands for one span.
    """
    starts, ends = _draw_spans(len(ids), rng, rate, max_span)
    return _collapse(ids, starts, ends, mask_token_id)[0]


def _draw_spans(length: int, rng: np.random.Generator, rate: float, max_span: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the spans of [`corrupt_spans`] start and end."""
    if length == 0:
        return np.zeros(0, dtype=int), np.zeros(0, dtype=int)
    num_masked = min(max(1, round(rate * length)), max(1, length - 1))
    # Spans of at most `max_span` need kept tokens between them.
    while -(-num_masked // max_span) > length - num_masked + 1:
        num_masked -= 1
    spans = rng.integers(1, max_span + 1, size=num_masked)
    spans = spans[: int(np.searchsorted(np.cumsum(spans), num_masked)) + 1]
    spans[-1] -= spans.sum() - num_masked
    # `k` spans that do not touch lie in the `n - masked + 1` gaps between kept tokens, at most one in each.
    num_gaps = length - num_masked + 1
    if len(spans) > num_gaps:
        # Too many short ones: as few as possible instead, in random order.
        spans = np.full(-(-num_masked // max_span), max_span)
        spans[-1] -= spans.sum() - num_masked
        rng.shuffle(spans)
    gaps = np.sort(rng.choice(num_gaps, size=len(spans), replace=False))
    ends = gaps + np.cumsum(spans)
    return ends - spans, ends


def _collapse(
    ids: np.ndarray, starts: np.ndarray, ends: np.ndarray, mask_token_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens with a mask for each span, and how many tokens each one of them stands for."""
    kept, corrupted = np.ones(len(ids), dtype=bool), ids.copy()
    for start, end in zip(starts, ends):
        corrupted[start], kept[start + 1 : end] = mask_token_id, False
    return corrupted[kept], np.diff(np.flatnonzero(np.append(kept, True)))


@dataclass
class YanDataCollator:
    """
    Makes padded batches out of tokenized examples. Every random choice is a function of `seed`, the epoch and the
    example's tokens alone, whatever the number of loader workers.

    Args:
        tokenizer: Gives the pad, mask and end tokens and the padding side of sources.
        objective: `"pairs"`: examples hold `input_ids` and `labels`. `"span_infilling"`: they hold the clean text as
            `input_ids`; the source is the text with spans collapsed, the target the whole text. `"auto_encoding"`:
            the same at the target's length, for [`YanForAutoEncoding`].
        mask_rate: Share of the tokens masked by span corruption.
        max_span: Longest masked span.
        max_length: Clean texts are cut there, the end token included.
        canvas_slack: Probability that a target's canvas is longer than the target, the rest end tokens that count in
            the loss, so that a wrong length at inference is harmless.
        max_slack: Most end tokens added.
        max_target_length: Canvases are not made longer than that; set it to the model's position table.
        pad_to_multiple_of: Rounds the padded lengths up.
        seed: Seed of the corruption and the slack.
        corruption: Makes the sources of pairs anew, of the target's text, the seed and the epoch, such as a
            [`RestorationCorruption`]. Those that get longer than `max_length` are cut. By default sources stay.
        align: Whether sources that are made here, of pairs or for span infilling, get `token_lengths`, see
            [`TaskEncoder`]; those of pairs do too where examples have some.
    """

    tokenizer: PreTrainedTokenizerBase
    objective: Literal["pairs", "span_infilling", "auto_encoding"] = "pairs"
    mask_rate: float = 0.08
    max_span: int = 3
    max_length: int | None = None
    canvas_slack: float = 0.0
    max_slack: int = 8
    max_target_length: int | None = None
    pad_to_multiple_of: int | None = None
    seed: int = 0
    corruption: Callable[[str, int, int], str] | None = None
    align: bool = False
    # In shared memory, so that loader workers that run already see `set_epoch`.
    _epoch: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.long).share_memory_(), repr=False)

    def __post_init__(self):
        objectives = ("pairs", "span_infilling", "auto_encoding")
        if self.objective not in objectives:
            raise ValueError(f"`objective` must be one of {', '.join(objectives)}, but is {self.objective!r}.")
        if self.corruption is not None and self.objective != "pairs":
            raise ValueError(f'`corruption` needs `objective="pairs"`, but that is {self.objective!r}.')
        if self.align and self.corruption is None and self.objective != "span_infilling":
            raise ValueError("`align` is for sources that are made here, by a `corruption` or for span infilling.")
        for name, value in (("mask_rate", self.mask_rate), ("canvas_slack", self.canvas_slack)):
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], but is {value}.")
        for name, value in (("max_span", self.max_span), ("max_slack", self.max_slack)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {value}.")
        for name in ("pad_token_id", "eos_token_id", "mask_token_id"):
            if getattr(self.tokenizer, name) is None:
                raise ValueError(f"The tokenizer has no `{name}`; call `yan_hf.prepare_tokenizer(tokenizer, model)`.")

    def set_epoch(self, epoch: int):
        """Changes the random choices; call it at the start of each epoch ([`callbacks.EpochCallback`] does)."""
        self._epoch.fill_(epoch)

    def at_epoch(self, epoch: int) -> "YanDataCollator":
        """A collator like this one that stays at an epoch, so that every evaluation sees the same masked spans."""
        return replace(self, _epoch=torch.full((1,), epoch).share_memory_())

    def __call__(self, features: Iterable[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        A batch: `input_ids` and `attention_mask` `(B, Lx)` and `labels` `(B, Ly)`, int64, labels padded with -100; and
        `token_weights` `(B, Ly)`, float32, where the examples of pairs have them, one for each label; and likewise
        `token_lengths` `(B, Lx)`, int64, one for each source token, and `encoder_states` `(B, Lx, D)` and
        `target_states` `(B, Ly, D)`, float32, of [`encode_dataset`].

        Raises:
            ValueError: for an example without the columns or the tokens that the objective needs.
        """
        features = list(features)
        if not features:
            raise ValueError("There are no examples to make a batch of.")
        for row, feature in enumerate(features):
            self._check(row, feature)
        if self.corruption is not None:
            features = self._corrupted(features)
        built = (self._build(row, feature) for row, feature in enumerate(features))
        sources, masks, labels, token_lengths = zip(*built)
        side = self.tokenizer.padding_side
        batch = {
            "input_ids": self._pad(sources, self.tokenizer.pad_token_id, side),
            "attention_mask": self._pad(masks, 0, side),
            # Targets start at their first position, whatever side sources are padded on, except where source and
            # label stand for the same position.
            "labels": self._pad(labels, -100, side if self.objective == "auto_encoding" else "right"),
        }
        if self.objective == "pairs" and all("token_weights" in feature for feature in features):
            # The end tokens of a longer canvas count in full.
            weights = [
                np.append(feature["token_weights"], np.ones(len(target) - len(feature["labels"]))).astype(np.float32)
                for feature, target in zip(features, labels)
            ]
            batch["token_weights"] = self._pad(weights, 0, "right")
        if all(lengths is not None for lengths in token_lengths):
            batch["token_lengths"] = self._pad(token_lengths, 0, side)
        if all("encoder_states" in feature and "target_states" in feature for feature in features):
            batch |= self._cached_states(features, sources, labels)
        return batch

    def _cached_states(
        self, features: list[dict[str, Any]], sources: Sequence[np.ndarray], labels: Sequence[np.ndarray]
    ) -> dict[str, torch.Tensor]:
        batch = {}
        sides = (("encoder_states", sources, self.tokenizer.padding_side), ("target_states", labels, "right"))
        for name, tokens, side in sides:
            rows = [np.asarray(feature[name], dtype=np.float32) for feature in features]
            if self.corruption is not None or any(len(row) != len(ids) for row, ids in zip(rows, tokens)):
                raise ValueError(
                    f"`{name}` were encoded of other tokens than the batch has: cached states are of pairs as they "
                    "stand, without `corruption`, `canvas_slack` and span corruption. Leave these or the states out."
                )
            batch[name] = self._pad(rows, 0, side)
        return batch

    def _check(self, row: int, feature: dict[str, Any]):
        for name in ("input_ids", "labels") if self.objective == "pairs" else ("input_ids",):
            if name not in feature:
                found = f"Example {row} has no column `{name}`, but {sorted(feature)}"
                raise ValueError(f"{found}; tokenize the data first.")
            if feature[name] is None or len(feature[name]) == 0:
                raise ValueError(f"Example {row} has an empty `{name}`. Leave such rows out.")

    def _corrupted(self, features: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The examples with sources made of their targets."""
        targets = [_token_ids(feature, "labels", row) for row, feature in enumerate(features)]
        texts = self.tokenizer.batch_decode(targets, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        sources = [self.corruption(text, self.seed, int(self._epoch)) for text in texts]
        kept = [{name: feature[name] for name in feature if name != "attention_mask"} for feature in features]
        encoded = encode_text(self.tokenizer, sources, max_length=self.max_length)
        made = [{**feature, "input_ids": ids} for feature, ids in zip(kept, encoded)]
        for feature, labels in zip(made, targets):
            if self.align or "token_lengths" in feature:
                feature["token_lengths"] = align_tokens(self.tokenizer, feature["input_ids"], labels.tolist())
        return made

    def _build(
        self, row: int, feature: dict[str, Any]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """Source, mask, target, and the token lengths, if there are some."""
        token_lengths = None
        ids = _token_ids(feature, "input_ids", row)
        eos = self.tokenizer.eos_token_id
        rng = np.random.default_rng([self.seed, int(self._epoch), zlib.crc32(ids.tobytes())])
        if self.objective == "pairs":
            source, target = ids, _token_ids(feature, "labels", row)
            mask = np.asarray(feature.get("attention_mask", np.ones_like(ids)), dtype=np.int64)
            if mask.shape != ids.shape:
                raise ValueError(f"Example {row}: `attention_mask` is {mask.shape}, but `input_ids` {ids.shape}.")
            if "token_lengths" in feature:
                token_lengths = _token_ids(feature, "token_lengths", row)
                if token_lengths.shape != ids.shape:
                    raise ValueError("`token_lengths` must have one length for each of an example's `input_ids`.")
        else:
            text = ids[:-1] if ids[-1] == eos else ids
            if self.max_length is not None:
                text = text[: self.max_length - 1]
            starts, ends = _draw_spans(len(text), rng, self.mask_rate, self.max_span)
            source, lengths = _collapse(text, starts, ends, self.tokenizer.mask_token_id)
            source, target = np.append(source, eos), np.append(text, eos)
            if self.align:
                token_lengths = np.append(lengths, 1)
            if self.objective == "auto_encoding":
                source = np.pad(source, (0, len(target) - len(source)), constant_values=self.tokenizer.pad_token_id)
            mask = np.ones_like(source)
        if self.canvas_slack > 0 and self.objective != "auto_encoding" and rng.random() < self.canvas_slack:
            slack = int(rng.integers(1, self.max_slack + 1))
            if self.max_target_length is not None:
                slack = max(0, min(slack, self.max_target_length - len(target)))
            target = np.pad(target, (0, slack), constant_values=eos)
        return source, mask, target, token_lengths

    def _pad(self, rows: Sequence[np.ndarray], value: int, side: str) -> torch.Tensor:
        width = max(len(row) for row in rows)
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        padded = np.full((len(rows), width, *rows[0].shape[1:]), value, dtype=rows[0].dtype)
        for index, row in enumerate(rows):
            padded[index, slice(width - len(row), None) if side == "left" else slice(len(row))] = row
        return torch.from_numpy(padded)


def _token_ids(feature: dict[str, Any], name: str, row: int) -> np.ndarray:
    values = np.asarray(feature[name])
    if values.ndim != 1 or values.dtype.kind not in "iu":
        found = str(feature[name])[:80]
        raise ValueError(f"Example {row} must hold a list of whole numbers in `{name}`, but has {found}.")
    return values.astype(np.int64)
