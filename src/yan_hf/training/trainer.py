# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A `Seq2SeqTrainer` that knows YAN's loss terms, epochs and averages."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.compute as compute
import torch
from datasets import Dataset
from huggingface_hub import ModelCardData
from torch import nn
from torch.utils.data import IterableDataset, Sampler
from transformers import PreTrainedTokenizerBase, Seq2SeqTrainer, TrainerState
from transformers.modelcard import extract_hyperparameters_from_trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..configuration_yan import YanConfig
from ..data.checks import check_examples, check_vocabulary
from ..hub.model_card import METRIC_NAMES, create_model_card, save_card
from ..modeling_yan import YanForAutoEncoding
from .callbacks import EmaCallback, EpochCallback, LengthHeadCallback, LossTermsCallback


class BatchShuffledSampler(LengthGroupedSampler):
    """
    Batches of like lengths in random order, the longest example's first. The base class gives fifty in a row from the
    longest to the shortest, so that a model that predicts lengths follows them instead of learning.

    Args:
        batch_size: Of all processes together.
        lengths: Of the examples.
        seed: Of the order, which is a function of it and the epoch: for all processes, and in a run that goes on.
        epoch: Tells the epoch whenever examples are asked for.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int, epoch: Callable[[], int]):
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch())
        indices, size = list(super().__iter__()), self.batch_size
        batches = [indices[start : start + size] for start in range(0, len(indices), size)]
        full = max(1, len(indices) // size)  # a smaller one stays at the end
        middle = (1 + torch.randperm(full - 1, generator=self.generator)).tolist()
        return chain.from_iterable(batches[i] for i in (0, *middle, *range(full, len(batches))))


class LengthGrouping:
    """Of a trainer: `train_sampling_strategy="group_by_length"` gives its batches in random order."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        rows, name = self.train_dataset if train_dataset is None else train_dataset, self.args.length_column_name
        columns = rows.column_names if isinstance(rows, Dataset) else []
        is_grouped = self.args.train_sampling_strategy == "group_by_length"
        if is_grouped and "input_ids" in columns and name not in columns:
            # The base class would read the rows one by one, for minutes where there are many.
            tables = rows.select_columns(["input_ids"]).with_format("arrow").iter(10_000)
            lengths = [compute.list_value_length(table["input_ids"]).to_pylist() for table in tables]
            rows = Dataset.from_dict({name: list(chain.from_iterable(lengths))})
        sampler = super()._get_train_sampler(rows)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        size = sampler.batch_size * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return BatchShuffledSampler(size, list(sampler.lengths), seed, lambda: int(self.state.epoch or 0))


class YanTrainer(LengthGrouping, Seq2SeqTrainer):
    """
    `Seq2SeqTrainer` that logs each loss term, tells the collator the epoch, and can average the weights.

    An auto-encoder is trained with `sparse_prediction`: only the positions that count are decoded. Evaluations see the
    same masked spans, whatever the epoch, streams work with several processes, and
    `train_sampling_strategy="group_by_length"` gives its batches in random order. Everything else is the base
    class's: `predict_with_generate`, `compute_metrics`, the best checkpoint, resuming.

    Before anything is trained, tokenizer and examples are compared with the model: [`check_vocabulary`],
    [`check_examples`].

    Args:
        ema_decay: Decay of an exponential moving average of the weights; see [`EmaCallback`]. None by default.
        arguments: Those of `Seq2SeqTrainer`.

    Raises:
        ValueError: for a tokenizer with another vocabulary, examples that the model cannot take,
            `label_smoothing_factor`, and `generation_*` arguments that `generate` refuses.
    """

    def __init__(self, *arguments: Any, ema_decay: float | None = None, **keywords: Any):
        super().__init__(*arguments, **keywords)
        evaluations = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"evaluation": self.eval_dataset}
        datasets = [("training", self.train_dataset), *evaluations.items()]
        datasets = [(name, rows) for name, rows in datasets if rows is not None]
        config = getattr(self.model, "config", None)
        if isinstance(config, YanConfig):
            if isinstance(self.processing_class, PreTrainedTokenizerBase):
                check_vocabulary(self.processing_class, self.model)
            # Span corruption cuts the clean text by itself.
            cut = getattr(self.data_collator, "objective", "pairs") != "pairs" and bool(self.data_collator.max_length)
            for name, examples in datasets:
                check_examples(examples, config, f"The {name} data set", cut)
        loader = self.accelerator.dataloader_config
        if loader.dispatch_batches is None and any(isinstance(rows, IterableDataset) for _, rows in datasets):
            # Batches of a stream are as wide as their longest row, so that one process cannot cut them up for all.
            loader.dispatch_batches = False
        collator = self.data_collator
        if hasattr(collator, "set_epoch"):
            self.add_callback(EpochCallback(collator))
        self._eval_collator = collator.at_epoch(0) if hasattr(collator, "at_epoch") else collator
        self.add_callback(LengthHeadCallback())
        self._needed_files, self._ema = ["trainer_state.json"], None
        if ema_decay is not None:
            self._ema = EmaCallback(ema_decay)
            self.add_callback(self._ema)
            self._needed_files.append(EmaCallback.FILE)
        # First, so that TensorBoard and the others see what it adds.
        terms = LossTermsCallback()
        terms.watch(self.model)
        self.callback_handler.callbacks.insert(0, terms)
        self._has_card = False

    def get_eval_dataloader(self, *arguments: Any, **keywords: Any):
        """As in the base class; every evaluation sees the same masked spans, whatever the epoch."""
        return self._for_evaluation(super().get_eval_dataloader, *arguments, **keywords)

    def get_test_dataloader(self, *arguments: Any, **keywords: Any):
        """As [`~YanTrainer.get_eval_dataloader`]."""
        return self._for_evaluation(super().get_test_dataloader, *arguments, **keywords)

    def _for_evaluation(self, make_loader: Callable, *arguments: Any, **keywords: Any):
        collator, self.data_collator = self.data_collator, self._eval_collator
        try:
            return make_loader(*arguments, **keywords)
        finally:
            self.data_collator = collator

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **keywords: Any):
        """As in the base class; an auto-encoder in training predicts where labels count, and nowhere else."""
        base = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if hasattr(base, "get_base_model"):  # PEFT's wrapper
            base = base.get_base_model()
        if model.training and isinstance(base, YanForAutoEncoding) and "labels" in inputs:
            inputs = {**inputs, "sparse_prediction": True}
        return super().compute_loss(model, inputs, *arguments, **keywords)

    def create_model_card(
        self,
        *arguments: Any,
        card_data: ModelCardData | None = None,
        metrics: dict[str, float] | None = None,
        split: str = "validation",
        **keywords: Any,
    ):
        """
        With `card_data` writes YAN's card into the output folder, see [`yan_hf.create_model_card`], and `push_to_hub`
        keeps it. Otherwise as in the base class.

        Args:
            card_data: The card's metadata.
            metrics: What `evaluate` or `predict` returned, of the `split`; lengths are predicted.
            keywords: The card's texts, or arguments of the base class.
        """
        if card_data is None:
            if not self._has_card:
                super().create_model_card(*arguments, **keywords)
            return
        self._has_card = True
        if not self.is_world_process_zero():
            return
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        steps = model.generation_config.num_inference_steps or model.config.solver_steps
        # By the longest name: `eval_punctuation_f1` is no `f1`.
        names = {key: [name for name in METRIC_NAMES if key.endswith(f"_{name}")] for key in metrics or {}}
        figures = {max(found, key=len): metrics[key] for key, found in names.items() if found}
        options = "; ".join(f"{name}: {value}" for name, value in extract_hyperparameters_from_trainer(self).items())
        recipe = f"{self.state.global_step:,} optimiser steps ({self.state.epoch or 0:.2f} epochs). {options}."
        results = [{"lengths": "predicted", "steps": steps, **figures}] if figures else []
        card = create_model_card(model, card_data, results, split, **{"recipe": recipe, **keywords})
        save_card(card, self.args.output_dir)

    def train(self, resume_from_checkpoint: str | bool | None = None, **keywords: Any):
        """
        As in the base class; `resume_from_checkpoint=True` takes the last checkpoint in `output_dir` that was written
        to its end, since a run that was killed while it saved leaves half of one, and without any starts anew.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir, self._needed_files)
        if self._ema is not None:
            self._ema.resumed_from = resume_from_checkpoint or None
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **keywords)


def last_complete_checkpoint(folder: str | Path, needed_files: list[str]) -> str | None:
    """The newest `checkpoint-N` in a trainer's output folder that holds the files which are written last."""
    found = []
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.rpartition("-")[2]
        if step.isdigit() and all((path / name).is_file() for name in needed_files):
            with suppress(OSError, ValueError, TypeError):  # where the state's file was cut
                TrainerState.load_from_json(str(path / "trainer_state.json"))
                found.append((int(step), str(path)))
    return max(found)[1] if found else None
