# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""YAN for Transformers: a non-autoregressive language model that writes a whole text in a few solver steps.

Importing the package registers its configuration and models with Transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

from .configuration_yan import YanConfig
from .data import YanDataCollator, corrupt_spans, encode_pairs
from .generation_config_yan import YanGenerationConfig
from .generation_yan import YanGenerateOutput
from .metrics import exact_match
from .modeling_yan import YanForAutoEncoding, YanForConditionalGeneration, YanModel, YanPreTrainedModel
from .outputs import YanAutoEncodingOutput, YanModelOutput, YanOutput
from .tokenization import prepare_tokenizer, train_tokenizer


__version__ = "0.1.0"

AutoConfig.register(YanConfig.model_type, YanConfig)
AutoModel.register(YanConfig, YanModel)
AutoModelForSeq2SeqLM.register(YanConfig, YanForConditionalGeneration)

__all__ = [
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
    "corrupt_spans",
    "encode_pairs",
    "exact_match",
    "prepare_tokenizer",
    "train_tokenizer",
]
