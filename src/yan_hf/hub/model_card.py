# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Model cards: what a checkpoint is and how well it does, from its configuration and a run's own figures."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from ..data.files import whole_file
from ..evaluation.evaluate import evaluate_model
from .info import is_table


TEMPLATE = Path(__file__).with_name("model_card_template.md")
CARD_FILE = "README.md"
LIBRARY_NAME = "transformers"

# How metrics are called in a card, and on the Hub.
_METRIC_NAMES = {
    "exact_match": ("Exact match", "exact_match"),
    "f1": ("Token F1", "f1"),
    "rouge1": ("ROUGE-1", "rouge"),
    "rouge2": ("ROUGE-2", "rouge"),
    "rougeL": ("ROUGE-L", "rouge"),
}


@dataclass
class CardFacts:
    """
    What a training run cannot know of itself.

    Args:
        model_name: Title of the card and of its `model-index`.
        task: In words: what is the source, what is the target.
        dataset_name: The data set's name, for people.
        dataset_id: Its id on the Hub, or another short id for the metadata.
        dataset_config: Its configuration.
        split: The split that the metrics are of.
        data: Which rows trained the model and which chose the checkpoint; by default the name and the split.
        license: An SPDX id that the Hub knows, such as `"apache-2.0"`.
        tokenizer: Where the tokenizer comes from.
        tokenizer_license: Its licence.
        language: Of the texts.
        summary: What the model does.
        intended_use: What it is for.
        limits: More limits than those that every card has.
        example_source: A source of the kind that the model was trained on.
        repository: Id on the Hub.
        tags: More tags.
    """

    model_name: str
    task: str
    dataset_name: str
    dataset_id: str
    dataset_config: str | None = None
    split: str = "validation"
    data: str | None = None
    license: str | None = None
    tokenizer: str = "trained with it"
    tokenizer_license: str | None = None
    language: str | None = "en"
    summary: str = "A YAN model: it writes a whole text at once, by integrating an ODE in latent space."
    intended_use: str = "The task that it was trained for, on texts like those of its data set."
    limits: Sequence[str] = ()
    example_source: str | None = None
    repository: str | None = None
    tags: Sequence[str] = ()


def parameter_counts(model: PreTrainedModel) -> dict[str, int]:
    """Parameters in all, in the tables (token and position tables, vocabulary head), and in the core, the rest."""
    total = tables = 0
    # A tied table is one parameter, and counts once.
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        if is_table(name):
            tables += parameter.numel()
    return {"total": total, "embedding": tables, "core": total - tables}


def describe_hardware() -> str:
    """The accelerator's name, or the processor's with the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor_name()}, {torch.get_num_threads()} threads"


def processor_name() -> str:
    """The processor's name as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe_recipe(arguments: TrainingArguments, state: Any = None) -> str:
    """Optimiser, rates, batch, steps and precision of a run, in a sentence or two."""
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    precision = "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else "float32"
    steps = f"{state.global_step:,} optimiser steps" if state is not None else f"{arguments.max_steps:,} steps"
    if state is not None and state.epoch:
        steps += f" ({state.epoch:.2f} epochs)"
    text = (
        f"{steps} of {arguments.optim.value} (betas {arguments.adam_beta1}, {arguments.adam_beta2}; weight decay "
        f"{arguments.weight_decay}), learning rate {arguments.learning_rate:g}, schedule "
        f"{getattr(arguments.lr_scheduler_type, 'value', arguments.lr_scheduler_type)}, batches of {batch} "
        f"({arguments.world_size} process{'es' if arguments.world_size > 1 else ''}, "
        f"{arguments.gradient_accumulation_steps} accumulation steps), {precision}, seed {arguments.seed}."
    )
    best = getattr(state, "best_metric", None)
    if best is not None and arguments.load_best_model_at_end:
        text += f" The checkpoint with the best {arguments.metric_for_best_model} ({best:.4g}) was kept."
    return text


def create_model_card(
    model: PreTrainedModel,
    facts: CardFacts,
    results: Sequence[dict[str, Any]] = (),
    seeds: int | None = None,
    recipe: str = "Not recorded.",
    hardware: str | None = None,
    batch_size: int | None = None,
) -> ModelCard:
    """
    Fills the template `model_card_template.md` for a model.

    Args:
        model: The model; sizes, backbones, experts, steps and dtype are read off it.
        facts: What it does not know.
        results: Rows of [`evaluate_model`].
        seeds: Sampling seeds that the rows are means over.
        recipe: How it was trained, see [`describe_recipe`].
        hardware: What `tokens_per_second` in the rows was measured on.
        batch_size: Rows at once in that measurement.

    Returns:
        A card with valid metadata; the rows with predicted lengths make its `model-index`.

    Raises:
        ImportError: without jinja2.
    """
    config = model.config
    generation = getattr(model, "generation_config", None)
    counts = parameter_counts(model)
    metrics, evaluations = [], []
    for row in results:
        how = f"{facts.split}, {row['lengths']} lengths, {row['steps']} steps"
        for name, (title, hub_name) in _METRIC_NAMES.items():
            if name not in row:
                continue
            spread = f" ± {row[f'{name}_spread']:.4f}" if (seeds or 1) > 1 else ""
            metrics.append({"name": title, "split": how, "value": f"{row[name]:.4f}{spread}", "seeds": seeds or 1})
            if row["lengths"] == "predicted":
                evaluations.append(
                    EvalResult(
                        task_type="text-generation",
                        task_name=facts.task,
                        dataset_type=facts.dataset_id,
                        dataset_name=facts.dataset_name,
                        dataset_config=facts.dataset_config,
                        dataset_split=facts.split,
                        metric_type=hub_name,
                        metric_name=f"{title}, {row['steps']} solver steps",
                        metric_value=round(row[name], 6),
                    )
                )
    speed = "not measured."
    rates = [f"{row['tokens_per_second']:,.0f} ({row['lengths']} lengths, {row['steps']} steps)" for row in results]
    if rates and hardware:
        batch = f" in batches of {batch_size}" if batch_size else ""
        speed = f"{', '.join(rates)} new tokens per second{batch}, on {hardware}."
    data = ModelCardData(
        language=facts.language,
        license=facts.license,
        library_name=LIBRARY_NAME,
        pipeline_tag="text-generation",
        tags=["yan", "flow-matching", "non-autoregressive", "mixture-of-experts", *facts.tags],
        datasets=[facts.dataset_id],
        metrics=sorted({result.metric_type for result in evaluations}) or None,
        model_name=facts.model_name if evaluations else None,
        eval_results=evaluations or None,
    )
    slack = getattr(generation, "length_slack", 0)
    when = "at every solver step" if config.reselect_experts else "at t = 0"
    routing = f"one chosen for each {config.expert_scope} {when} ({config.routing} routing)"
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        title=facts.model_name,
        summary=facts.summary,
        task=facts.task,
        data=facts.data or f"{facts.dataset_name}; metrics on the split `{facts.split}`",
        parameters=f"{counts['total']:,}",
        embedding_parameters=f"{counts['embedding']:,}",
        core_parameters=f"{counts['core']:,}",
        encoder_backbone=config.encoder_backbone,
        encoder_layers=config.encoder_layers,
        flow_backbone=config.flow_backbone,
        flow_layers=config.flow_layers,
        decoder_layers=config.decoder_layers,
        hidden_size=config.hidden_size,
        num_experts=config.num_experts,
        routing=routing,
        solver=getattr(generation, "solver", None) or "euler",
        steps=getattr(generation, "num_inference_steps", None) or config.solver_steps,
        length_mode="the user must give it: the length head is not trained"
        if not config.length_head_trained
        else f"predicted, with {slack} positions of slack"
        if slack
        else "predicted by the length head",
        dtype=str(model.dtype).removeprefix("torch."),
        tokenizer=f"{facts.tokenizer}; licence: {facts.tokenizer_license or 'not stated'}",
        repository=facts.repository or facts.model_name,
        example_source=json.dumps(facts.example_source or "...", ensure_ascii=False),
        recipe=recipe,
        metrics=metrics,
        speed=speed,
        intended_use=facts.intended_use,
        limits=[*facts.limits, *([] if config.length_head_trained else ["It does not predict lengths."])],
        licence=facts.license or "Not stated.",
        version=_version(),
    )


def _version() -> str:
    try:
        return version("yan-hf")
    except PackageNotFoundError:
        return "(not installed)"


class ModelCardCallback(TrainerCallback):
    """
    Writes a model card into the trainer's output folder when training ends, with figures measured then; an earlier
    card there is replaced.

    The model that training leaves is asked the evaluation set, with predicted and with true lengths. A trainer that
    never evaluates has no evaluation set at hand: then the card has no metrics. Weights that FSDP shards cannot be
    asked by one process; the card says so.

    Args:
        facts: What the run cannot know.
        seeds: Sampling seeds.
        metrics: Of `"exact_match"`, `"f1"` and `"rouge"`.
        max_rows: Ask only the first rows.

    Raises:
        ValueError: for less than one seed.
    """

    def __init__(
        self,
        facts: CardFacts,
        seeds: int = 3,
        metrics: Sequence[str] = ("exact_match", "f1"),
        max_rows: int | None = None,
    ):
        if seeds < 1:
            raise ValueError(f"`seeds` must be at least 1, but is {seeds}.")
        self.facts, self.seeds, self.metrics, self.max_rows = facts, seeds, tuple(metrics), max_rows
        self.results: list[dict[str, Any]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        _check_card(Path(args.output_dir, CARD_FILE))  # now, and not after hours

    def on_train_end(self, args, state, control, model=None, processing_class=None, eval_dataloader=None, **kwargs):
        if not state.is_world_process_zero or model is None:
            return
        model = getattr(model, "module", model)
        sharded = any(hasattr(weight, "device_mesh") for weight in model.parameters())
        if eval_dataloader is not None and processing_class is not None and not sharded:
            was_training = model.training
            self.results = list(
                evaluate_model(
                    model.eval(),
                    processing_class,
                    _first(eval_dataloader.dataset, self.max_rows),
                    eval_dataloader.collate_fn,
                    steps=(model.generation_config.num_inference_steps or model.config.solver_steps,),
                    seeds=self.seeds,
                    metrics=self.metrics,
                    batch_size=args.per_device_eval_batch_size,
                    length_modes=("predicted", "true") if model.config.length_head_trained else ("true",),
                )
            )
            model.train(was_training)
        card = create_model_card(
            model,
            self.facts,
            self.results,
            self.seeds,
            describe_recipe(args, state),
            describe_hardware(),
            args.per_device_eval_batch_size,
        )
        save_card(card, args.output_dir)


def _first(dataset: Any, count: int | None) -> list[dict[str, Any]]:
    rows = iter(dataset)
    return [row for row, _ in zip(rows, range(count))] if count is not None else list(rows)


def _check_card(path: Path):
    """Raises where a card would replace a text that neither this package nor Transformers' trainer has made."""
    if path.exists():
        tags = ModelCard.load(path, ignore_metadata_errors=True).data.tags or []
        if not {"yan", "generated_from_trainer"} & set(tags):
            raise FileExistsError(f"{path} is no card of a model, so it is not replaced: move it, or write elsewhere.")


def save_card(card: ModelCard, folder: str | os.PathLike) -> Path:
    """
    Writes a card as the folder's `README.md`, whole or not at all; replaces an earlier card. Returns its path.

    Raises:
        FileExistsError: for a `README.md` that is something else.
    """
    path = Path(folder, CARD_FILE)
    _check_card(path)
    with whole_file(path) as partial:
        card.save(partial)
    return path


__all__ = [
    "CardFacts",
    "ModelCardCallback",
    "create_model_card",
    "describe_hardware",
    "describe_recipe",
    "parameter_counts",
    "processor_name",
    "save_card",
]
