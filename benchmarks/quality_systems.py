# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The systems that `quality.py` compares: how each is built, fed, and evaluated."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from curriculum import Curriculum, CurriculumStream, CurriculumTrainer, train_by_curriculum
from quality_tasks import Task
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from yan_hf import YanConfig, YanForConditionalGeneration
from yan_hf.data.tasks import TextPair
from yan_hf.evaluation.metrics import score_texts


AR_SYSTEMS = ("ar-gpt2", "ar-bart")
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


def matching_autoregressive(system: str, config: YanConfig, parameters: int, length: int) -> PreTrainedModel:
    """
    A GPT-2 or BART of YAN's width and depth, whose feed-forward width brings it to YAN's number of parameters.

    Raises:
        RuntimeError: where no width comes within 5 %.
    """
    common = {
        "vocab_size": config.vocab_size,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }

    def gpt2(width: int) -> PreTrainedModel:
        return GPT2LMHeadModel(
            GPT2Config(
                n_embd=config.hidden_size,
                n_head=config.num_attention_heads,
                n_layer=config.encoder_layers + config.flow_layers,
                n_inner=width,
                n_positions=length,
                initializer_range=config.initializer_range,
                resid_pdrop=0.0,
                embd_pdrop=config.embedding_dropout,
                attn_pdrop=0.0,
                tie_word_embeddings=False,
                **common,
            )
        )

    def bart(width: int) -> PreTrainedModel:
        model = BartForConditionalGeneration(
            BartConfig(
                d_model=config.hidden_size,
                encoder_layers=config.encoder_layers,
                decoder_layers=config.flow_layers,
                encoder_attention_heads=config.num_attention_heads,
                decoder_attention_heads=config.num_attention_heads,
                encoder_ffn_dim=width,
                decoder_ffn_dim=width,
                max_position_embeddings=length,
                init_std=config.initializer_range,
                dropout=0.0,
                decoder_start_token_id=config.eos_token_id,
                forced_eos_token_id=None,
                **common,
            )
        )
        # The stacks' own dropout is that of their embeddings; `BartConfig` has one value for everything.
        model.model.encoder.dropout = model.model.decoder.dropout = config.embedding_dropout
        return model

    build: Callable[[int], PreTrainedModel] = {"ar-gpt2": gpt2, "ar-bart": bart}[system]
    with torch.device("meta"):
        sizes = {width: build(width).num_parameters() for width in range(16, 64 * config.hidden_size, 16)}
    width = min(sizes, key=lambda key: abs(sizes[key] - parameters))
    if abs(sizes[width] - parameters) > 0.05 * parameters:
        raise RuntimeError(f"No {system} of this width and depth is within 5 % of {parameters:,} parameters.")
    return build(width)


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


class AutoregressiveCollator:
    """Batches for GPT-2 (source and target in one sequence, which meet at the same place in all rows) or BART."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str):
        self.pad, self.causal = tokenizer.pad_token_id, system == "ar-gpt2"

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sources = [list(feature["input_ids"]) for feature in features]
        targets = [list(feature["labels"]) for feature in features]
        batch = {
            "input_ids": _pad(sources, self.pad, self.causal),
            "attention_mask": _pad([[1] * len(source) for source in sources], 0, self.causal),
            "labels": _pad(targets, -100),
        }
        if self.causal:
            ids, counted = _pad(targets, self.pad), _pad([[1] * len(target) for target in targets], 0)
            batch["input_ids"] = torch.cat([batch["input_ids"], ids], dim=1)
            batch["attention_mask"] = torch.cat([batch["attention_mask"], counted], dim=1)
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return batch


def _pad(rows: Sequence[list[int]], value: int, left: bool = False) -> torch.Tensor:
    width = max(map(len, rows))
    padding = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, padding)])


@torch.no_grad()
def generate_texts(
    model: PreTrainedModel,
    system: str,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict[str, Any]],
    max_new_tokens: int,
    true_lengths: bool = False,
    seed: int = 0,
    batch_size: int = 100,
    **options: Any,
) -> tuple[list[str], list[int]]:
    """The texts that a system generates for tokenized sources, and how many new tokens each consists of."""
    # GPT-2 continues its source, so that the source has to end where the target begins.
    left = system == "ar-gpt2"
    texts, lengths = [], []
    for start in range(0, len(examples), batch_size):
        rows = examples[start : start + batch_size]
        sources = [list(row["input_ids"]) for row in rows]
        batch = {
            "input_ids": _pad(sources, tokenizer.pad_token_id, left),
            "attention_mask": _pad([[1] * len(source) for source in sources], 0, left),
        }
        if system in AR_SYSTEMS:
            ids = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
            ids = ids[:, batch["input_ids"].shape[1] :] if left else ids[:, 1:]
        else:
            wanted = [len(row["labels"]) for row in rows]
            ids = model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                target_lengths=torch.tensor(wanted) if true_lengths else None,
                seeds=[seed * 1_000_003 + start + row for row in range(len(rows))],
                **options,
            )
        lengths += (ids != tokenizer.pad_token_id).sum(dim=-1).tolist()
        texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts, lengths


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
