# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The systems that `rewriting.py` compares: how each is trained, and how it rewrites."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from decoders import LOOKUP_TOKENS, BidirectionalBart, LookupMBart, MaskPredictBart, ctc_logits, lowest, mask_predict
from quality_systems import AutoregressiveCollator, pad
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)

from yan_hf import YanDataCollator, YanInt8Config
from yan_hf.data.alignment import fillings_of
from yan_hf.training.trainer import LengthGrouping, YanTrainer


Rows = list[list[int]]
Rewriter = Callable[[Rows], Rows]

MODELS: dict[str, type[PreTrainedModel]] = {
    "ar-bart": LookupMBart,
    "ar-gpt2": GPT2LMHeadModel,
    "ar-gpt2-fillings": GPT2LMHeadModel,
    "cmlm": MaskPredictBart,
    "ctc": BidirectionalBart,
}


def architecture(system: str) -> str:
    """The name that [`decoders.matching_model`] knows a system by."""
    # With norms before its layers, BART learns to copy in fewer steps.
    return "ar-mbart" if system == "ar-bart" else system.removesuffix("-fillings")


def num_positions(system: str, max_source_length: int, max_target_length: int, upsample: int) -> int:
    """Positions that a system needs, with room for what prompt lookup proposes beyond the end."""
    if architecture(system) == "ar-gpt2":
        return max_source_length + max_target_length + LOOKUP_TOKENS
    if system == "ctc":
        return upsample * max_source_length
    return max(max_source_length, max_target_length) + LOOKUP_TOKENS + 1  # the token in front that tells the length


# Fillings


def fill(source: list[int], fillings: Rows, mask_token_id: int) -> list[int]:
    """The source with its masks filled in order; masks without a filling are left out, fillings without one too."""
    first, *parts = _split(source, mask_token_id)
    filled = list(first)
    for filling, part in zip_longest(fillings[: len(parts)], parts, fillvalue=[]):
        filled += [*filling, *part]
    return filled


def _split(ids: list[int], token: int) -> Rows:
    """What stands before, between and behind the places of a token."""
    parts: Rows = [[]]
    for other in ids:
        if other == token:
            parts.append([])
        else:
            parts[-1].append(other)
    return parts


# Training


class BaselineCollator:
    """The batches of a [`YanDataCollator`], as the system takes them; its sources are padded on the right."""

    def __init__(self, collator: YanDataCollator, system: str):
        self.collator, self.system = collator, system
        self.causal = AutoregressiveCollator(collator.tokenizer, "ar-gpt2")

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.collator(features)
        if architecture(self.system) != "ar-gpt2":
            return batch
        rows = []
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"]):
            source, target = ids[mask > 0].tolist(), labels[labels != -100].tolist()
            rows.append({"input_ids": source, "labels": target})
            if self.system == "ar-gpt2-fillings":
                rows[-1]["labels"] = self._joined_fillings(source, target)
        return self.causal(rows)

    def _joined_fillings(self, source: list[int], target: list[int]) -> list[int]:
        mask, eos = self.collator.tokenizer.mask_token_id, self.collator.tokenizer.eos_token_id
        fillings = fillings_of(source, target, mask, eos)
        if fillings is None:
            raise ValueError("A target is not its source with the masks filled: take `ar-gpt2` for this task.")
        return [token for i, filling in enumerate(fillings) for token in [*([mask] if i else []), *filling]] + [eos]


def _bart_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).loss


def _gpt2_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the target's tokens, whose logits alone are computed."""
    labels = batch.pop("labels")
    logits = model(**batch, logits_to_keep=labels.shape[1] + 1).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _with_length_token(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sources with a begin token in front, whose state tells the target's length."""
    first = torch.full_like(input_ids[:, :1], model.config.bos_token_id)
    return torch.cat([first, input_ids], dim=1), nn.functional.pad(attention_mask, (1, 0), value=1)


def _mask_predict_loss(model: MaskPredictBart, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of masked target tokens, from one to all of a row's, and a tenth of that of the length."""
    labels = batch["labels"]
    canvas = labels != -100
    lengths = canvas.sum(-1)
    counts = (torch.rand(len(labels), device=labels.device) * lengths).long() + 1
    masked = lowest(torch.rand(labels.shape, device=labels.device), canvas, counts)
    ids = labels.masked_fill(~canvas, model.config.pad_token_id).masked_fill(masked, model.config.mask_token_id)
    source_ids, source_mask = _with_length_token(model, batch["input_ids"], batch["attention_mask"])
    source = model.model.encoder(source_ids, attention_mask=source_mask).last_hidden_state
    logits = model.decode(source, source_mask, canvas, input_ids=ids)
    longest = model.longest_offset
    offsets = (lengths - batch["attention_mask"].sum(-1)).clamp(-longest, longest) + longest
    length_loss = nn.functional.cross_entropy(model.length_head(source[:, 0]), offsets)
    return nn.functional.cross_entropy(logits[masked], labels[masked]) + 0.1 * length_loss


def _ctc_loss(model: BidirectionalBart, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The padding token is the blank; the end token is not written. Targets longer than the canvas do not count."""
    logits, widths = ctc_logits(model, batch["input_ids"], batch["attention_mask"])
    labels = batch["labels"]
    lengths = (labels != -100).sum(-1) - 1
    return nn.functional.ctc_loss(
        logits.log_softmax(dim=-1).transpose(0, 1),
        labels.clamp(min=0),
        widths,
        lengths,
        blank=model.config.pad_token_id,
        zero_infinity=True,
    )


LOSSES: dict[str, Callable[[Any, dict[str, torch.Tensor]], torch.Tensor]] = {
    "ar-mbart": _bart_loss,
    "ar-gpt2": _gpt2_loss,
    "cmlm": _mask_predict_loss,
    "ctc": _ctc_loss,
}


class TimeBudget(TrainerCallback):
    """
    Ends training after some minutes, those of the runs that it goes on from included.

    Args:
        minutes: Without any it only counts.
    """

    def __init__(self, minutes: float | None = None):
        self.minutes, self._before, self._began = minutes, 0.0, time.monotonic()

    def elapsed(self) -> float:
        """Minutes of training."""
        return self._before + (time.monotonic() - self._began) / 60

    def share(self) -> float:
        """Of the budget that is used, at most 1."""
        return min(1.0, self.elapsed() / self.minutes) if self.minutes else 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._before = max((entry.get("minutes", 0.0) for entry in state.log_history), default=0.0)
        self._began = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save  # so that a checkpoint knows its minutes
        control.should_training_stop |= self.share() == 1.0

    def on_log(self, args, state, control, logs=None, **kwargs):
        state.log_history[-1]["minutes"] = logs["minutes"] = round(self.elapsed(), 3)


class TimedSchedule:
    """Of a trainer: the learning rate falls with the time that is left, where that is limited."""

    def __init__(self, *arguments: Any, budget: TimeBudget, **keywords: Any):
        super().__init__(*arguments, callbacks=[budget], **keywords)
        self.budget = budget

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Half a cosine over the minutes, after the usual warm-up."""
        if not self.budget.minutes:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = max(1, self.args.get_warmup_steps(num_training_steps))

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * self.budget.share())) / 2

        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler


class TimedYanTrainer(TimedSchedule, YanTrainer):
    """YAN's."""


class BaselineTrainer(TimedSchedule, LengthGrouping, Trainer):
    """That of one of the other systems, with its own loss."""

    def __init__(self, *arguments: Any, system: str, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self.loss = LOSSES[architecture(system)]

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss = self.loss(model, inputs)
        return (loss, None) if return_outputs else loss


# Rewriting


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """A checkpoint's tokenizer, which pads sources on the right."""
    return AutoTokenizer.from_pretrained(folder, padding_side="right")


def padded_batch(rows: Rows, pad_token_id: int, left: bool = False) -> dict[str, torch.Tensor]:
    return {
        "input_ids": pad(rows, pad_token_id, left),
        "attention_mask": pad([[1] * len(row) for row in rows], 0, left),
    }


def texts_of(ids: torch.Tensor, config: Any) -> Rows:
    """Every row's tokens before its end token, without padding."""
    rows = []
    for row in ids.tolist():
        end = row.index(config.eos_token_id) if config.eos_token_id in row else len(row)
        rows.append([token for token in row[:end] if token != config.pad_token_id])
    return rows


def _yan(model: PreTrainedModel, max_new_tokens: int, steps: int, rows: Rows, **options: Any) -> Rows:
    batch = padded_batch(rows, model.config.pad_token_id)
    options |= {"seeds": list(range(len(rows))), "num_inference_steps": steps, "max_new_tokens": max_new_tokens}
    return texts_of(model.generate(**batch, **options), model.config)


def _autoregressive(model: PreTrainedModel, max_new_tokens: int, lookup: int | None, rows: Rows) -> Rows:
    causal = not model.config.is_encoder_decoder
    batch = padded_batch(rows, model.config.pad_token_id, left=causal)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "prompt_lookup_num_tokens": lookup}
    ids = model.generate(**batch, **options)
    return texts_of(ids[:, batch["input_ids"].shape[1] if causal else 1 :], model.config)


def _fillings(model: PreTrainedModel, max_new_tokens: int, lookup: int | None, rows: Rows) -> Rows:
    mask, eos = model.config.mask_token_id, model.config.eos_token_id
    written = _autoregressive(model, max_new_tokens, lookup, rows)
    filled = [fill(row, _split(ids, mask), mask) for row, ids in zip(rows, written)]
    return [row[:-1] if row[-1:] == [eos] else row for row in filled]


@torch.no_grad()
def _mask_predict(model: MaskPredictBart, max_new_tokens: int, iterations: int, rows: Rows) -> Rows:
    """[`mask_predict`] with the likeliest length."""
    batch = padded_batch(rows, model.config.pad_token_id)
    source_ids, source_mask = _with_length_token(model, **batch)
    source = model.model.encoder(source_ids, attention_mask=source_mask).last_hidden_state
    offsets = model.length_head(source[:, 0]).argmax(-1) - model.longest_offset
    lengths = (batch["attention_mask"].sum(-1) + offsets).clamp(1, max_new_tokens)
    return texts_of(mask_predict(model, source, source_mask, lengths, iterations), model.config)


@torch.no_grad()
def _ctc(model: BidirectionalBart, rows: Rows) -> Rows:
    """The likeliest token of every position, repeated ones once, without blanks."""
    logits, widths = ctc_logits(model, **padded_batch(rows, model.config.pad_token_id))
    best = [row[:width].unique_consecutive() for row, width in zip(logits.argmax(-1), widths.tolist())]
    return [texts_of(row[None], model.config)[0] for row in best]


def rewriters(system: str, model: PreTrainedModel, max_new_tokens: int) -> dict[str, Rewriter]:
    """
    What a system offers, by name: functions from sources, lists of tokens, to targets without their end token. Those
    with prompt lookup take one source at a time.
    """
    if system == "yan":
        return {f"yan-{steps}": partial(_yan, model, max_new_tokens, steps) for steps in (1, 2, 3, 4)}
    if system == "cmlm":
        return {f"cmlm-{count}": partial(_mask_predict, model, max_new_tokens, count) for count in (1, 3, 10)}
    if system == "ctc":
        return {"ctc": partial(_ctc, model)}
    run = partial(_fillings if system == "ar-gpt2-fillings" else _autoregressive, model, max_new_tokens)
    found = {system: partial(run, None)}
    return found if system == "ar-gpt2-fillings" else {**found, f"{system}-lookup": partial(run, LOOKUP_TOKENS)}


def fast_rewriters(model: PreTrainedModel, folder: Path, max_new_tokens: int) -> dict[str, Rewriter]:
    """A YAN from `folder` compiled, in 8 bits, and both, in one step and in three."""
    integers = AutoModelForSeq2SeqLM.from_pretrained(folder, quantization_config=YanInt8Config())
    found = {}
    for steps in (1, 3):
        found[f"yan-int8-{steps}"] = partial(_yan, integers, max_new_tokens, steps)
        found[f"yan-compiled-{steps}"] = partial(_yan, model, max_new_tokens, steps, compile=True)
        found[f"yan-int8-compiled-{steps}"] = partial(_yan, integers, max_new_tokens, steps, compile=True)
    return found


def load_model(system: str, folder: Path | str) -> PreTrainedModel:
    """A trained system in eval mode."""
    model = MODELS.get(system, AutoModelForSeq2SeqLM).from_pretrained(folder).eval()
    # Some versions of `Trainer` save that it was off in training.
    model.config.use_cache = model.generation_config.use_cache = True
    return model
