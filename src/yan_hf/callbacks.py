# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Callbacks for Transformers' `Trainer`."""

from transformers import TrainerCallback

from .data import YanDataCollator


class EpochCallback(TrainerCallback):
    """Tells the collator which epoch it is, so that every epoch sees other masked spans.

    Args:
        collator: The collator that the trainer uses.
    """

    def __init__(self, collator: YanDataCollator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.set_epoch(int(state.epoch or 0))


__all__ = ["EpochCallback"]
