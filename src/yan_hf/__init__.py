# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""YAN for Transformers: a non-autoregressive language model that generates a whole text in a few solver steps.

Importing the package registers its configuration and models with Transformers' Auto classes, the pipeline
"text2text-generation", and its default adapter targets with PEFT. What it exports is imported on first use.
"""

import sys
from importlib import import_module

from transformers.utils.import_utils import _LazyModule


__version__ = "0.1.0"

_IMPORT_STRUCTURE = {
    "configuration_yan": ["YanConfig"],
    "data.collator": ["YanDataCollator", "corrupt_spans", "encode_pairs"],
    "data.corruption": ["RestorationCorruption"],
    "data.states": ["encode_dataset"],
    "data.tasks": ["TaskEncoder", "pack_sentences"],
    "data.tokenization": ["encode_text", "prepare_tokenizer", "train_tokenizer"],
    "evaluation.evaluate": ["evaluate_model", "generate_texts"],
    "evaluation.metrics": ["compute_metrics", "exact_match"],
    "generation_config_yan": ["YanGenerationConfig"],
    "generation_yan": ["YanGenerateOutput"],
    "hub.export": ["export_to_onnx", "export_with_code"],
    "hub.model_card": ["create_model_card"],
    "hub.research": ["convert_research_checkpoint", "export_research_checkpoint"],
    "inference.int8": ["YanInt8Config"],
    "inference.offload": ["OffloadStats", "OffloadedExperts"],
    "inference.onnx": ["OnnxYan"],
    "inference.weight_only": ["YanInt8WeightOnlyConfig"],
    "modeling_yan": [
        "YanAutoEncodingOutput",
        "YanForAutoEncoding",
        "YanForConditionalGeneration",
        "YanModel",
        "YanModelOutput",
        "YanOutput",
        "YanPreTrainedModel",
    ],
    "serving.pipeline": ["Text2TextGenerationPipeline"],
    "training.callbacks": ["EmaCallback", "EpochCallback", "ExpertUsageCallback", "LossTermsCallback"],
    "training.trainer": ["YanTrainer"],
}

sys.modules[__name__] = _LazyModule(
    __name__, __file__, _IMPORT_STRUCTURE, module_spec=__spec__, extra_objects={"__version__": __version__}
)
# Under the lazy module, which then has what is imported as attributes.
import_module(f"{__name__}.auto").register()
import_module(f"{__name__}.serving.pipeline").register()
for name in ("int8", "weight_only"):
    import_module(f"{__name__}.inference.{name}")  # registers its quantisation
