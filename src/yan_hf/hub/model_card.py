# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Model cards: what a checkpoint is and how well it does, from its configuration and measured figures."""

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..data.files import whole_file
from ..serving.pipeline import TASK
from .info import encoder_name, is_table, length_mode


TEMPLATE = Path(__file__).with_name("model_card_template.md")
CARD_FILE = "README.md"

# How metrics are called in a card, and on the Hub.
METRIC_NAMES = {
    "exact_match": ("Exact match", "exact_match"),
    "f1": ("Token F1", "f1"),
    "rouge1": ("ROUGE-1", "rouge"),
    "rouge2": ("ROUGE-2", "rouge"),
    "rougeL": ("ROUGE-L", "rouge"),
    "word_error_rate": ("Word error rate", "wer"),
    "punctuation_f1": ("Punctuation F1", "f1"),
    "capitalization_f1": ("Capitalization F1", "f1"),
    "sentence_accuracy": ("Sentences exactly right", "accuracy"),
    "wrong_edit_rate": ("Wrong edits", "wrong_edit_rate"),
    "unchanged_rate": ("Unchanged where nothing was wrong", "unchanged_rate"),
}

# What stands in a card where nothing is said; `None` is made from the rest.
TEXTS: dict[str, Any] = {
    "summary": "A YAN model: it generates a whole text at once, by integrating an ODE in latent space.",
    "task": "Not stated.",
    "data": None,
    "tokenizer": "trained with it; licence: not stated",
    "recipe": "Not recorded.",
    "intended_use": "The task that it was trained for, on texts like those of its data set.",
    "limits": (),
    "example_source": "...",
    "repository": None,
}


def parameter_counts(model: PreTrainedModel) -> dict[str, int]:
    """Parameters in all, in the tables (token and position tables, vocabulary head), and in the core, the rest."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}  # a tied table counts once
    tables = sum(size for name, size in sizes.items() if is_table(name))
    return {"total": sum(sizes.values()), "embedding": tables, "core": sum(sizes.values()) - tables}


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


def create_model_card(
    model: PreTrainedModel,
    card_data: ModelCardData,
    results: Sequence[dict[str, Any]] = (),
    split: str = "validation",
    seeds: int = 1,
    hardware: str | None = None,
    **texts: Any,
) -> ModelCard:
    """
    Fills the template `model_card_template.md` for a model.

    Args:
        model: The model; sizes, backbones, experts, steps and dtype are read off it.
        card_data: The card's metadata, to which the library, tags and results are added.
        results: Rows of [`evaluate_model`], or likewise with `lengths`, `steps` and metrics. Those with predicted
            lengths make the card's `model-index`.
        split: The split that they are of.
        seeds: Sampling seeds that they are means over.
        hardware: What `tokens_per_second` in the rows was measured on, see [`describe_hardware`].
        texts: What else the card says: `summary`, `task` (in words: what is the source, what is the target), `data`
            (which rows trained the model and chose the checkpoint), `tokenizer` (where it comes from, its licence),
            `recipe`, `intended_use`, `limits` (a list), `example_source`, `repository`.

    Returns:
        A card with valid metadata. [`save_card`] writes it.

    Raises:
        ValueError: for a text of another name, and without a `model_name` or `datasets` in the metadata.
        ImportError: without jinja2.
    """
    check_fields(card_data, texts)
    config, generation = model.config, getattr(model, "generation_config", None)
    name, (dataset, *_) = card_data.model_name, card_data.datasets
    texts = {**TEXTS, **texts}
    # What `pipeline(model=...)` reads, and the text in the Hub's field to try the model.
    fields = {"library_name": "transformers", "pipeline_tag": TASK, "widget": [{"text": texts["example_source"]}]}
    data = ModelCardData(**{**card_data.to_dict(), **fields})
    data.tags = ["yan", "flow-matching", "non-autoregressive", "mixture-of-experts", *(card_data.tags or [])]
    metrics, evaluations = [], []
    for row, key in ((row, key) for row in results for key in METRIC_NAMES if key in row):
        title, hub_name = METRIC_NAMES[key]
        spread = f" ± {row[f'{key}_spread']:.4f}" if seeds > 1 else ""
        where = f"{split}, {row['lengths']} lengths, {row['steps']} steps"
        metrics.append({"name": title, "split": where, "value": f"{row[key]:.4f}{spread}", "seeds": seeds})
        if row["lengths"] == "predicted":
            result = EvalResult(TASK, dataset, dataset, hub_name, round(row[key], 6), texts["task"])
            result.dataset_split, result.metric_name = split, f"{title}, {row['steps']} solver steps"
            evaluations.append(result)
    data.eval_results, data.model_name = evaluations or None, name if evaluations else None
    data.metrics = sorted({result.metric_type for result in evaluations}) or None
    rates = ", ".join(
        f"{row['tokens_per_second']:,.0f} ({row['lengths']} lengths, {row['steps']} steps)"
        for row in results
        if "tokens_per_second" in row
    )
    slack = getattr(generation, "length_slack", 0) if config.length_head_trained else 0
    limits = list(texts["limits"])
    if not config.length_head_trained:
        limits.append("It does not predict lengths.")
    made = {
        "title": name,
        "data": texts["data"] or f"{dataset}; metrics on the split `{split}`",
        "repository": texts["repository"] or name,
        "example_source": json.dumps(texts["example_source"], ensure_ascii=False),
        "limits": limits,
        "config": config,
        "encoder": encoder_name(config),
        "parameters": parameter_counts(model),
        "solver": getattr(generation, "solver", None) or "euler",
        "steps": getattr(generation, "num_inference_steps", None) or config.solver_steps,
        "length_mode": length_mode(config) + (f", with {slack} positions of slack" if slack else ""),
        "dtype": str(model.dtype).removeprefix("torch."),
        "metrics": metrics,
        "speed": f"{rates} new tokens per second, on {hardware}." if rates and hardware else "not measured.",
        "licence": card_data.license or "Not stated.",
        "version": _version(),
    }
    return ModelCard.from_template(data, template_str=TEMPLATE.read_text(encoding="utf-8"), **{**texts, **made})


def _version() -> str:
    try:
        return version("yan-hf")
    except PackageNotFoundError:
        return "(not installed)"


def check_fields(card_data: ModelCardData, texts: dict[str, Any]):
    """Raises `ValueError` for a text that no card has, and for metadata without what every card needs."""
    if unknown := sorted(texts.keys() - TEXTS.keys()):
        raise ValueError(f"A card has no {', '.join(unknown)}; its texts are {', '.join(TEXTS)}.")
    if not card_data.model_name or not card_data.datasets:
        raise ValueError("A card needs `ModelCardData` with a `model_name` and a list `datasets`.")


def check_card_file(path: Path):
    """Raises `FileExistsError` for a text that neither this package nor Transformers' trainer has made."""
    if path.exists():
        tags = ModelCard.load(path, ignore_metadata_errors=True).data.tags or []
        if not {"yan", "generated_from_trainer"} & set(tags):
            raise FileExistsError(f"{path} is no card of a model, so it is not replaced: move it, or write elsewhere.")


def save_card(card: ModelCard, folder: str | os.PathLike) -> Path:
    """Writes a folder's `README.md` and returns its path. Raises `FileExistsError` for one that is no card."""
    path = Path(folder, CARD_FILE)
    check_card_file(path)
    with whole_file(path) as partial:
        card.save(partial)
    return path
