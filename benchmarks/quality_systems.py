# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The systems that `quality.py` compares: how each is built, fed, and evaluated."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from quality_tasks import Task
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from yan_hf import YanConfig, YanForConditionalGeneration
from yan_hf.data.tasks import TextPair
from yan_hf.evaluation.evaluate import generate_examples
from yan_hf.evaluation.metrics import score_texts


sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

from curriculum import Curriculum, CurriculumStream, CurriculumTrainer, train_by_curriculum


AR_SYSTEMS = ("ar-gpt2", "ar-bart", "ar-encoder-decoder")
SYSTEMS = ("yan", "yan-mamba", *AR_SYSTEMS)


def new_config(task: Task, tokenizer: PreTrainedTokenizerBase, system: str = "yan", **fields: Any) -> YanConfig:
    """YAN's configuration for a task; `fields` replace the task's."""
    backbone = "mamba" if system == "yan-mamba" else "transformer"
    return YanConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": task.hidden_size,
            "num_attention_heads": 4,
            "encoder_layers": task.encoder_layers,
            "flow_layers": task.flow_layers,
            "decoder_layers": 1,
            "encoder_backbone": backbone,
            "flow_backbone": backbone,
            "max_position_embeddings": task.max_source_length,
            "initializer_range": 0.1,
            "loss_weights": {"mmd": 0.0},
            "experts_implementation": "eager",
            **task.config,
            **fields,
        }
    )


def start_flow(autoencoder: Path, config: YanConfig) -> YanForConditionalGeneration:
    """An auto-encoder with a flow that starts anew, in the run's own configuration."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the flow's keys are missing, as they should
    try:
        return YanForConditionalGeneration.from_pretrained(autoencoder, config=config, experts_implementation="eager")
    finally:
        logging.set_verbosity(verbosity)


def fit(
    model: PreTrainedModel,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    draw: Callable[[np.random.Generator, int], TextPair],
    folder: Path,
    steps: int,
    rate: float,
    autoencoder: bool,
    trainer_class: type[CurriculumTrainer] = CurriculumTrainer,
    level: int = 1,
    batch_size: int = 64,
    seed: int = 0,
    **arguments: Any,
) -> float:
    """Trains a model for a number of steps, and gives the mean loss of the last of them."""
    # No goal: everybody uses all steps.
    curriculum = Curriculum(task.num_levels, goal=2.0, threshold=0.94, level=level)
    stream = CurriculumStream(
        draw, tokenizer, curriculum, task.view if autoencoder else None, batch_size, seed, task.max_source_length
    )
    trainer = train_by_curriculum(
        model,
        stream,
        folder,
        None,
        rate,
        trainer_class=trainer_class,
        max_steps=steps,
        logging_steps=min(250, max(1, steps // 4)),
        **arguments,
    )
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]


class CausalCurriculumTrainer(CurriculumTrainer):
    """Computes a causal model's logits where the target stands, and nowhere else: sources are padded on the left."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        output = model(**inputs, logits_to_keep=labels.shape[1] + 1)
        logits = output.logits[:, :-1]
        self.curriculum.update(self.share_right(logits, labels))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return (loss, output) if return_outputs else loss


class AutoencoderTrainer(CurriculumTrainer):
    """Decodes the auto-encoder's positions that count, and no others: most of a source does not count."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        counted = inputs["labels"] != -100
        output = model(**inputs, sparse_prediction=True)
        right = torch.ones_like(counted)
        right[counted] = output.logits.argmax(-1) == inputs["labels"][counted]
        self.curriculum.update(right.all(dim=-1).float().mean().item())
        return (output.loss, output) if return_outputs else output.loss


def pad(rows: Sequence[list[int]], value: int, left: bool = False) -> torch.Tensor:
    width = max(map(len, rows))
    padding = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, padding)])


def pad_pairs(rows: Sequence[dict[str, Any]], pad_token_id: int, left: bool = False) -> dict[str, torch.Tensor]:
    """Sources, padded on either side, and labels of tokenized examples."""
    sources = [list(row["input_ids"]) for row in rows]
    return {
        "input_ids": pad(sources, pad_token_id, left),
        "attention_mask": pad([[1] * len(source) for source in sources], 0, left),
        "labels": pad([list(row["labels"]) for row in rows], -100),
    }


class AutoregressiveCollator:
    """Batches for GPT-2 (source and target in one sequence, which meet at the same place in all rows) or BART."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str):
        self.pad, self.causal = tokenizer.pad_token_id, system == "ar-gpt2"

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = pad_pairs(features, self.pad, self.causal)
        if self.causal:
            counted = (batch["labels"] != -100).long()
            ids = batch["labels"].masked_fill(counted == 0, self.pad)
            batch["input_ids"] = torch.cat([batch["input_ids"], ids], dim=1)
            batch["attention_mask"] = torch.cat([batch["attention_mask"], counted], dim=1)
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return batch


class Greedy:
    """An autoregressive model that generates as YAN does; it has no seeds and is told no lengths."""

    def __init__(self, model: PreTrainedModel, causal: bool):
        self.model, self.causal, self.config, self.device = model, causal, model.config, model.device

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, max_new_tokens: int, **_: Any):
        ids = self.model.generate(
            input_ids, attention_mask=attention_mask, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1
        )
        ids = ids[:, input_ids.shape[1] :] if self.causal else ids[:, 1:]
        return SimpleNamespace(sequences=ids, lengths=(ids != self.config.pad_token_id).sum(-1))


def generate_texts(
    model: PreTrainedModel,
    system: str,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict[str, Any]],
    max_new_tokens: int,
    batch_size: int = 100,
    **options: Any,
) -> tuple[list[str], list[int]]:
    """The texts that a system generates for tokenized sources, and how many new tokens each consists of."""
    # GPT-2 continues its source, so that the source has to end where the target begins.
    causal = system == "ar-gpt2"
    collator = partial(pad_pairs, pad_token_id=tokenizer.pad_token_id, left=causal)
    generator = Greedy(model, causal) if system in AR_SYSTEMS else model
    texts, _, figures = generate_examples(
        generator, tokenizer, examples, collator, batch_size=batch_size, max_new_tokens=max_new_tokens, **options
    )
    return texts, figures["lengths"]


def evaluate_by_seed(
    model: PreTrainedModel,
    system: str,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[dict[str, Any]],
    references: Sequence[str],
    seeds: int,
    **mode: Any,
) -> tuple[dict[str, list[float]], list[list[int]]]:
    """The task's metrics by sampling seed, and the new tokens of every text, a list for each seed."""
    found: dict[str, list[float]] = {}
    lengths = []
    for seed in range(seeds):
        texts, counts = generate_texts(model, system, tokenizer, examples, task.max_new_tokens, seed=seed, **mode)
        lengths.append(counts)
        for name, figure in score_texts(texts, references, task.metrics).items():
            found.setdefault(name, []).append(figure)
    return found, lengths
