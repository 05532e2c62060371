# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Registers YAN with Transformers' Auto classes, and with PEFT where that is installed."""

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.utils import is_peft_available

from .configuration_yan import YanConfig
from .modeling_yan import YanForConditionalGeneration, YanModel


# What PEFT's methods adapt where nothing is said: the layers that they adapt in BART, by their names here; beside the
# attention's queries and values also the Mamba mixers' projections. A backbone has the ones or the others.
PEFT_TARGET_MODULES = ["q_proj", "v_proj", "in_proj", "out_proj"]
_BART_LAYERS = {
    "q_proj": ["q_proj"],
    "k_proj": ["k_proj"],
    "v_proj": ["v_proj"],
    "out_proj": ["o_proj"],
    "fc1": ["feed_forward.up_proj"],
    "fc2": ["feed_forward.down_proj"],
    "self_attn_layer_norm": ["self_attn_norm", "mixer_norm"],
    "final_layer_norm": ["feed_forward_norm"],
}


class NoCausalModel:
    """What `AutoModelForCausalLM` and the pipeline "text-generation" find for YAN: where to go instead."""

    config_class = YanConfig

    @classmethod
    def from_pretrained(cls, *arguments: Any, **keywords: Any):
        """Raises `ValueError`."""
        raise ValueError(
            "YAN generates a target for a source; it does not continue a prompt, as causal models and the pipeline "
            '"text-generation" do. Load it by `AutoModelForSeq2SeqLM.from_pretrained(...)` and call '
            '`model.generate(**tokenizer(texts, padding=True, return_tensors="pt"))`.'
        )

    _from_config = from_pretrained


def register():
    """Called by `import yan_hf`."""
    AutoConfig.register(YanConfig.model_type, YanConfig, exist_ok=True)
    AutoModel.register(YanConfig, YanModel, exist_ok=True)
    AutoModelForSeq2SeqLM.register(YanConfig, YanForConditionalGeneration, exist_ok=True)
    AutoModelForCausalLM.register(YanConfig, NoCausalModel, exist_ok=True)
    if is_peft_available():
        _register_peft()


def _register_peft():
    from peft.utils import constants

    for name, mapping in vars(constants).items():
        if not (name.endswith("_MODULES_MAPPING") and isinstance(mapping, dict)):
            continue
        layers = mapping.get("bart", ["q_proj", "v_proj"])
        targets = [target for layer in layers for target in _BART_LAYERS.get(layer, ())]
        if set(PEFT_TARGET_MODULES[:2]) <= set(targets):
            targets += PEFT_TARGET_MODULES[2:]
        if targets:
            mapping.setdefault(YanConfig.model_type, targets)
