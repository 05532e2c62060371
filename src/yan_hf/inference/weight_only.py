# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Weights in 8 bits by torchao, activations as they are: on the CPU and on CUDA, in the dtype that a model is loaded in.

torchao's own default leaves out a mixture's stacked experts, the embeddings and the vocabulary head, which are most of
a model of this package.
"""

from collections import OrderedDict
from typing import Any

from torch import Tensor
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer
from transformers.utils.quantization_config import TorchAoConfig

from ..experts import YanExperts
from .int8 import IndexedExperts


METHOD = "yan_int8_weight_only"

# Linear layers of the stacks, experts, and the token table, which is the head's too. What is computed once for a text
# (lengths, times, the choice of experts) keeps its floats: an error there would change it all.
_QUANTISED = (
    r"re:.*\.layers\..*(proj|adaptive_norm)\.weight",
    r"re:.*experts\.(up|down)_proj",
    r"re:(.*embed_tokens|lm_head)\.weight",
)


@register_quantization_config(METHOD)
class YanInt8WeightOnlyConfig(TorchAoConfig):
    """
    `from_pretrained(..., quantization_config=YanInt8WeightOnlyConfig())`: torchao's weights in 8 bits with a scale for
    each output, for the linear layers, the experts, the embeddings and the vocabulary head.

    Raises:
        ImportError: without torchao.
        ValueError: for any field; it has none.
    """

    def __init__(self, **kwargs: Any):
        if unknown := sorted(set(kwargs) - {"quant_method"}):
            raise ValueError(f"`{type(self).__name__}` has no field {unknown[0]!r}; it has none.")
        try:
            from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
        except ImportError as error:
            raise ImportError(
                f"`{type(self).__name__}` needs torchao ({error}): install it with `pip install yan-hf[torchao]`."
            ) from error
        # Without the settings of the compiler that torchao would change for the whole process.
        types = OrderedDict.fromkeys(_QUANTISED, Int8WeightOnlyConfig(set_inductor_config=False))
        super().__init__(FqnToConfig(types), include_input_output_embeddings=True)
        self.quant_method = METHOD

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config


@register_quantizer(METHOD)
class YanInt8WeightOnlyQuantizer(TorchAoHfQuantizer):
    """Transformers' quantizer for torchao, which saves a table that is tied to the head once instead of twice."""

    is_trainable = False

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        # Transformers asks for linear layers and embeddings that no pattern names, too.
        from torchao.quantization import fqn_matches_fqn_config

        return fqn_matches_fqn_config(param_name, self.quantization_config.quant_type)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any):
        super()._process_model_before_weight_loading(model, **kwargs)
        for module in model.modules():
            if type(module) is YanExperts:
                module.__class__ = IndexedExperts

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        values, tied = model.state_dict(), model.all_tied_weights_keys
        return flatten_tensor_state_dict({name: values[name] for name in values if name not in tied})
