# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A `Seq2SeqTrainer` that knows YAN's loss terms, epochs and averages."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import Seq2SeqTrainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import is_peft_available

from .callbacks import EmaCallback, EpochCallback, LossTermsCallback
from .model_card import CARD_FILE, ModelCardCallback
from .modeling_yan import YanForAutoEncoding


if is_peft_available():
    from peft import PeftModel


class YanTrainer(Seq2SeqTrainer):
    """
    `Seq2SeqTrainer` that logs each loss term, tells the collator the epoch, and can average the weights.

    An auto-encoder is trained with `sparse_prediction`: only the positions that count are decoded.

    Everything else is the base class's: `predict_with_generate`, `compute_metrics`, the best checkpoint, resuming.
    `train(resume_from_checkpoint=True)` takes the last checkpoint that was written to its end: a run that was killed
    while it saved leaves half of one.

    Args:
        ema_decay: Decay of an exponential moving average of the weights; see [`EmaCallback`]. None by default.
        arguments: Those of `Seq2SeqTrainer`.
    """

    def __init__(self, *arguments: Any, ema_decay: float | None = None, **keywords: Any):
        super().__init__(*arguments, **keywords)
        if hasattr(self.data_collator, "set_epoch"):
            self.add_callback(EpochCallback(self.data_collator))
        self._needed_files = ["trainer_state.json"]
        if ema_decay is not None:
            self.add_callback(EmaCallback(ema_decay))
            self._needed_files.append(EmaCallback.FILE)
        callbacks = self.callback_handler.callbacks
        # Last, so that a card's figures are those of the weights that training leaves, averaged or not.
        callbacks.sort(key=lambda callback: isinstance(callback, ModelCardCallback))
        # First, so that TensorBoard and the others see what it adds.
        callbacks.insert(0, LossTermsCallback())

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **keywords: Any):
        """As in the base class; an auto-encoder in training predicts where labels count, and nowhere else."""
        base = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if is_peft_available() and isinstance(base, PeftModel):
            base = base.get_base_model()
        if model.training and isinstance(base, YanForAutoEncoding) and "labels" in inputs:
            inputs = {**inputs, "sparse_prediction": True}
        return super().compute_loss(model, inputs, *arguments, **keywords)

    def create_model_card(self, *arguments: Any, **keywords: Any):
        """As in the base class, which `push_to_hub` calls, unless a [`ModelCardCallback`] has written a card."""
        written = any(isinstance(callback, ModelCardCallback) for callback in self.callback_handler.callbacks)
        if not (written and Path(self.args.output_dir, CARD_FILE).is_file()):
            super().create_model_card(*arguments, **keywords)

    def train(self, resume_from_checkpoint: str | bool | None = None, **keywords: Any):
        """
        Trains, from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: A folder, or `True` for the last complete checkpoint in `output_dir`. Without one
                `True` starts from the beginning.
            keywords: Those of `Trainer.train`.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir, self._needed_files)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **keywords)


def last_complete_checkpoint(folder: str | Path, needed_files: list[str]) -> str | None:
    """The newest `checkpoint-N` in a trainer's output folder that holds the files which are written last."""
    found = []
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.rpartition("-")[2]
        if step.isdigit() and all((path / name).is_file() for name in needed_files):
            found.append((int(step), str(path)))
    return max(found)[1] if found else None


__all__ = ["YanTrainer", "last_complete_checkpoint"]
