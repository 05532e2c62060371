# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Training from easy to hard: a stream of examples whose level rises as they are answered right.

Meant for question answering from scratch, where mixed difficulties tend to stay on a plateau.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.utils.logging import tqdm

from yan_hf.data.collator import YanDataCollator, encode_pairs
from yan_hf.data.tasks import TextPair


class Curriculum:
    """
    The level of difficulty, raised by one when the running share of right rows passes a threshold.

    Args:
        num_levels: The highest level; the first is 1.
        goal: Running share on the highest level at which training has done its work.
        threshold: Running share at which the level rises.
        level: The level to start with.
    """

    def __init__(self, num_levels: int, goal: float, threshold: float = 0.95, level: int = 1):
        if not 1 <= level <= num_levels:
            raise ValueError(f"`level` must be in 1 to {num_levels}, but is {level}.")
        self.num_levels, self.goal, self.threshold, self.level = num_levels, goal, threshold, level
        self.running = 0.0
        self.finished = False

    @property
    def next_goal(self) -> float:
        """The running share at which the level rises, or training ends; over 1 where it never does."""
        return self.threshold if self.level < self.num_levels else self.goal

    def update(self, share: float):
        """Takes the share of right rows in a batch."""
        self.running += 0.1 * (share - self.running)
        if self.running <= self.next_goal:
            return
        if self.level < self.num_levels:
            self.level += 1
            self.running = 0.5  # so that the new level has to be learned before the next one comes
        else:
            self.finished = True


class CurriculumStream(IterableDataset):
    """
    An endless stream of tokenized examples at the curriculum's level.

    Args:
        make: `(rng, level) -> TextPair`, with `MASK_MARKER` of [`tokenization`] where the source is masked.
        tokenizer: The tokenizer.
        curriculum: Read before every batch; use no loader workers, which would not see it change.
        view: Gives what the auto-encoder learns from instead of source and target: [`as_masked_answer`], or
            [`as_masked_text`] where targets are whole texts. None for the flow.
        batch_size: Examples tokenized together.
        seed: Seed of the stream.
        max_source_length: Longer sources are cut there.
    """

    def __init__(
        self,
        make: Callable[[np.random.Generator, int], TextPair],
        tokenizer: PreTrainedTokenizerBase,
        curriculum: Curriculum,
        view: Callable[..., dict[str, list[int]]] | None = None,
        batch_size: int = 64,
        seed: int = 0,
        max_source_length: int | None = None,
    ):
        self.make, self.tokenizer, self.curriculum, self.view = make, tokenizer, curriculum, view
        self.batch_size, self.seed = batch_size, seed
        self.max_source_length = max_source_length

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        rng = np.random.default_rng([self.seed, int(self.view is not None)])
        while True:
            # A batch at a time: a call of the tokenizer costs more than the text does.
            pairs = [self.make(rng, self.curriculum.level) for _ in range(self.batch_size)]
            encoded = encode_pairs(self.tokenizer, *zip(*pairs), max_source_length=self.max_source_length)
            for source, target in zip(encoded["input_ids"], encoded["labels"]):
                plain = {"input_ids": source, "labels": target}
                yield self.view(source, target, self.tokenizer) if self.view else plain


def as_masked_answer(source: list[int], target: list[int], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """
    The auto-encoder's view of a question: what stands behind the mask token is the answer, and only it counts.

    Args:
        source: Tokens with one mask token, after which nothing but the end token comes.
        target: The answer's tokens, the end token included.
        tokenizer: Gives the mask and pad tokens.

    Returns:
        `input_ids`, padded to the clean text's length, and `labels` for it, token for token.

    Raises:
        ValueError: for a source without a mask token.
    """
    if tokenizer.mask_token_id not in source:
        raise ValueError("The source has no mask token: put `MASK_MARKER` where the answer belongs.")
    start = source.index(tokenizer.mask_token_id)
    labels = [-100] * start + target
    length = max(len(source), len(labels))
    return {
        "input_ids": source + [tokenizer.pad_token_id] * (length - len(source)),
        "labels": labels + [-100] * (length - len(labels)),
    }


def as_masked_text(source: list[int], target: list[int], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """
    The auto-encoder's view of a text with masked spans: the masked text at the target's length; every token counts.

    Args:
        source: Tokens of the text with spans collapsed to one mask token each; no longer than `target`.
        target: Tokens of the text, the end token included.
        tokenizer: Gives the pad token.

    Raises:
        ValueError: for a source longer than its target.
    """
    if len(source) > len(target):
        raise ValueError(f"The masked text has {len(source)} tokens, more than the {len(target)} of the text.")
    return {"input_ids": source + [tokenizer.pad_token_id] * (len(target) - len(source)), "labels": target}


def thinned(statements: Sequence[str], support: Sequence[int], count: int, rng: np.random.Generator) -> list[str]:
    """`count` statements of a context at random, in order: those that the answer does not rest on can go."""
    others = np.setdiff1d(np.arange(len(statements)), support)
    kept = rng.choice(others, size=max(0, min(count - len(support), len(others))), replace=False)
    return [statements[index] for index in sorted([*support, *kept])]


class CurriculumTrainer(Trainer):
    """A `Trainer` that tells a curriculum how many rows of each batch came out right."""

    def __init__(self, *args: Any, curriculum: Curriculum, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.curriculum = curriculum

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        self.curriculum.update(self.share_right(outputs.logits, inputs["labels"]))
        return (loss, outputs) if return_outputs else loss

    def share_right(self, logits: torch.Tensor, labels: torch.Tensor) -> float:
        """Share of rows whose counted tokens all have the highest logit; a causal model's would be shifted here."""
        right = (logits.argmax(-1) == labels) | (labels == -100)
        return right.all(dim=-1).float().mean().item()


class StopWhenSolved(TrainerCallback):
    """Ends training when the curriculum is solved or the time is over, and adds its state to the log."""

    def __init__(self, curriculum: Curriculum, seconds: float | None = None):
        self.curriculum = curriculum
        self.deadline = float("inf") if seconds is None else time.monotonic() + seconds

    def on_step_end(self, args, state, control, **kwargs):
        if self.curriculum.finished or time.monotonic() > self.deadline:
            control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is not None and "loss" in logs:
            logs["level"], logs["right"] = self.curriculum.level, round(self.curriculum.running, 3)


class ProgressBar(TrainerCallback):
    """
    Shows the level reached, the running share of right rows with the share that is aimed at, and what is left of the
    budget, seconds or steps.
    """

    def __init__(self, curriculum: Curriculum, seconds: float | None = None):
        self.curriculum, self.seconds = curriculum, seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = time.monotonic()
        total = state.max_steps if self.seconds is None else round(self.seconds)
        left = "{remaining} left" if self.seconds is None else ""
        self.bar = tqdm(total=total, bar_format=f"{{desc}} |{{bar:20}}| {left}")

    def on_step_end(self, args, state, control, **kwargs):
        rows, total = self.curriculum, self.bar.total
        done = min(total, state.global_step if self.seconds is None else int(time.monotonic() - self.began))
        goal = f" (goal {rows.next_goal:.1%})" if rows.next_goal <= 1 else ""
        budget = f"step {done:,} of {total:,}" if self.seconds is None else f"{total - done} s left of {total} s"
        self.bar.set_description_str(
            f"level {rows.level} of {rows.num_levels}, right {rows.running:.1%}{goal}, {budget}", refresh=False
        )
        self.bar.update(done - self.bar.n)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def train_by_curriculum(
    model: PreTrainedModel,
    stream: CurriculumStream,
    folder: Path,
    seconds: float | None,
    learning_rate: float,
    callbacks: Sequence[TrainerCallback] = (),
    trainer_class: type[CurriculumTrainer] = CurriculumTrainer,
    data_collator: Callable | None = None,
    max_steps: int | None = None,
    **arguments: Any,
) -> CurriculumTrainer:
    """
    Trains until the stream's curriculum is solved, or the time or the steps are over.

    The rate is constant after 50 warm-up steps; where the steps are given, it falls to zero over the last third.

    Args:
        model: The model, trained in place.
        stream: Gives the examples, the batch size and the seed.
        folder: The trainer's output folder; no checkpoint is written there.
        seconds: Training stops then at the latest.
        learning_rate: AdamW's learning rate.
        callbacks: More callbacks for the trainer.
        trainer_class: The trainer.
        data_collator: By default a [`YanDataCollator`].
        max_steps: Optimiser steps.
        arguments: More `TrainingArguments`.

    Returns:
        The trainer, with its log.
    """
    if seconds is None and max_steps is None:
        raise ValueError("Give `seconds` or `max_steps`, or training would never end.")
    warmup_steps = 50
    schedule = {"lr_scheduler_type": "constant_with_warmup"}
    if max_steps is not None:
        decay = max_steps // 3
        schedule = {
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {
                "num_decay_steps": decay,
                "num_stable_steps": max(0, max_steps - warmup_steps - decay),
                "decay_type": "linear",
            },
        }
    trainer = trainer_class(
        model=model,
        args=TrainingArguments(
            **{
                "output_dir": str(folder),
                "max_steps": max_steps or 1_000_000,
                "per_device_train_batch_size": stream.batch_size,
                "learning_rate": learning_rate,
                "warmup_steps": warmup_steps,
                "adam_beta2": 0.98,
                "weight_decay": 0.01,
                "save_strategy": "no",
                "report_to": "none",
                "use_cpu": not torch.cuda.is_available(),
                "seed": stream.seed,
                **schedule,
                **arguments,
            }
        ),
        train_dataset=stream,
        data_collator=data_collator or YanDataCollator(stream.tokenizer),
        callbacks=[StopWhenSolved(stream.curriculum, seconds), *callbacks],
        curriculum=stream.curriculum,
    )
    if not trainer.args.disable_tqdm:
        # The usual bar would count to the largest number of steps, which training hardly ever reaches.
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ProgressBar(stream.curriculum, seconds))
    trainer.train()
    return trainer


__all__ = [
    "Curriculum",
    "CurriculumStream",
    "CurriculumTrainer",
    "ProgressBar",
    "StopWhenSolved",
    "as_masked_text",
    "as_masked_answer",
    "thinned",
    "train_by_curriculum",
]
