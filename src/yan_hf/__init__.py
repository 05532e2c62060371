# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""YAN for Transformers: a non-autoregressive language model that writes a whole text in a few solver steps.

Importing the package registers its configuration and models with Transformers' Auto classes, and its default adapter
targets with PEFT. What it exports is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .auto import register


__version__ = "0.1.0"

# Where each exported name lives.
_EXPORTS = {
    "callbacks": ("EmaCallback", "EpochCallback", "LossTermsCallback"),
    "configuration_yan": ("YanConfig",),
    "conversion": ("convert_research_checkpoint", "export_research_checkpoint", "export_with_code"),
    "evaluation": ("evaluate_model", "generate_texts"),
    "data": ("YanDataCollator", "corrupt_spans", "encode_pairs"),
    "generation_config_yan": ("YanGenerationConfig",),
    "generation_yan": ("YanGenerateOutput",),
    "metrics": ("compute_metrics", "exact_match"),
    "model_card": ("CardFacts", "ModelCardCallback", "create_model_card"),
    "modeling_yan": ("YanForAutoEncoding", "YanForConditionalGeneration", "YanModel", "YanPreTrainedModel"),
    "offload": ("ExpertOffload", "OffloadStats"),
    "outputs": ("YanAutoEncodingOutput", "YanModelOutput", "YanOutput"),
    "task_data": ("TaskEncoder",),
    "tokenization": ("encode_text", "prepare_tokenizer", "train_tokenizer"),
    "trainer": ("YanTrainer",),
}
_HOMES = {name: module for module, names in _EXPORTS.items() for name in names}

if TYPE_CHECKING:
    from .configuration_yan import YanConfig
    from .data.collator import YanDataCollator, corrupt_spans, encode_pairs
    from .data.tasks import TaskEncoder
    from .data.tokenization import encode_text, prepare_tokenizer, train_tokenizer
    from .evaluation.evaluate import evaluate_model, generate_texts
    from .evaluation.metrics import compute_metrics, exact_match
    from .generation_config_yan import YanGenerationConfig
    from .generation_yan import YanGenerateOutput
    from .hub.model_card import CardFacts, ModelCardCallback, create_model_card
    from .hub.research import convert_research_checkpoint, export_research_checkpoint, export_with_code
    from .inference.offload import ExpertOffload, OffloadStats
    from .modeling_yan import (
        YanAutoEncodingOutput,
        YanForAutoEncoding,
        YanForConditionalGeneration,
        YanModel,
        YanModelOutput,
        YanOutput,
        YanPreTrainedModel,
    )
    from .training.callbacks import EmaCallback, EpochCallback, LossTermsCallback
    from .training.trainer import YanTrainer

register()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


__all__ = [
    "CardFacts",
    "EmaCallback",
    "EpochCallback",
    "ExpertOffload",
    "LossTermsCallback",
    "ModelCardCallback",
    "OffloadStats",
    "TaskEncoder",
    "YanAutoEncodingOutput",
    "YanConfig",
    "YanDataCollator",
    "YanForAutoEncoding",
    "YanForConditionalGeneration",
    "YanGenerateOutput",
    "YanGenerationConfig",
    "YanModel",
    "YanModelOutput",
    "YanOutput",
    "YanPreTrainedModel",
    "YanTrainer",
    "compute_metrics",
    "convert_research_checkpoint",
    "corrupt_spans",
    "create_model_card",
    "encode_pairs",
    "encode_text",
    "evaluate_model",
    "exact_match",
    "export_research_checkpoint",
    "export_with_code",
    "generate_texts",
    "prepare_tokenizer",
    "train_tokenizer",
]
