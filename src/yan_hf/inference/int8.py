# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Products of 8-bit integers on the CPU: models whose weights are quantised, and a vocabulary head that is read in 8 bits
and decides in float32.

A weight has one scale for each output, states have one for each token: sums of integers are exact, so a token's result
depends neither on its neighbours nor on the batch. The product is PyTorch's own, oneDNN's where the processor has it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers.core_model_loading import ConversionOps
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..experts import _EAGER_FORWARD, YanExperts, YanGate, _all_by_index
from ..layers import YanLengthHead, YanTimeEmbedding, YanTokenLengthHead


METHOD = "yan_int8"


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 `(..., n)` as integers from -127 to 127 `(..., n)`, int8, and the scales that give it back, `(...)`."""
    # Rather than a maximum of absolute values, for which a copy of all would be made.
    largest = torch.maximum(values.amax(dim=-1, keepdim=True), -values.amin(dim=-1, keepdim=True))
    largest = largest.clamp(min=torch.finfo(torch.float32).tiny)
    return (values * (127 / largest)).round_().to(torch.int8), largest[..., 0] / 127


def _check(states: Tensor):
    if states.device.type != "cpu":
        raise RuntimeError(
            f"A model in {METHOD} computes on the CPU alone, and its input is on {states.device}. Load the float "
            'checkpoint there, with dtype="bfloat16".'
        )
    if torch.is_grad_enabled() and states.requires_grad:
        raise RuntimeError(f"A model in {METHOD} has no gradients: train the float checkpoint, and quantise that.")


def int8_linear(
    states: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, precise: bool = False
) -> Tensor:
    """
    `linear` of states `(..., d)` and an int8 weight `(n, d)` with scales `(n,)`, in the states' dtype. With `precise`
    a second product adds what 8 bits leave out of the states.
    """
    _check(states)
    rows = states.float().view(-1, states.shape[-1])
    integers, scales = quantize_rows(rows)
    product = _product(integers, scales, weight, scale, bias)
    if precise:
        product += _product(*quantize_rows(rows - integers * scales[:, None]), weight, scale, None)
    return product.view(*states.shape[:-1], -1).to(states.dtype)


def _product(
    integers: Tensor,
    scales: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    buffers: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    # In place, and in the `buffers` of a loop: memory that is new to the process costs more than the arithmetic.
    if buffers is None:
        product = torch._int_mm(integers, weight.t()).float()
    else:
        counts, product = (buffer[: len(weight)].view(len(integers), -1) for buffer in buffers)
        product.copy_(torch._int_mm(integers, weight.t(), out=counts))
    product = product.mul_(scale).mul_(scales[:, None])
    return product if bias is None else product.add_(bias)


def _product_buffers(rows: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Memory for products of `rows` states and at most so many outputs."""
    return torch.empty(outputs, rows, dtype=torch.int32), torch.empty(outputs, rows)


def _int8_parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.int8), requires_grad=False)


def _scale_parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)


class Int8Linear(nn.Module):
    """A linear layer with a quantised weight; see [`int8_linear`]."""

    def __init__(self, layer: nn.Linear, precise: bool = False):
        super().__init__()
        self.precise = precise
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = _int8_parameter(layer.out_features, layer.in_features)
        self.weight_scale = _scale_parameter(layer.out_features)
        self.bias = layer.bias

    def forward(self, states: Tensor) -> Tensor:
        return int8_linear(states, self.weight, self.weight_scale, self.bias, self.precise)

    def by_part(self, states: Tensor) -> Callable[[slice], Tensor]:
        """
        What gives the layer's result for states `(T, d)` at some of its outputs, `(T, n)`, no more than at first;
        quantises them once. A result is gone with the next call.
        """
        _check(states)
        integers, scales = quantize_rows(states.float())
        bias = torch.zeros(()).expand(self.out_features) if self.bias is None else self.bias
        buffers: tuple[Tensor, Tensor] | None = None

        def outputs(part: slice) -> Tensor:
            nonlocal buffers
            weight, scale = self.weight[part], self.weight_scale[part]
            buffers = buffers or _product_buffers(len(states), len(weight))
            return _product(integers, scales, weight, scale, bias[part], buffers)

        return outputs


class Int8Embedding(nn.Module):
    """A table of tokens with quantised rows."""

    def __init__(self, table: nn.Embedding):
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self.weight = _int8_parameter(table.num_embeddings, table.embedding_dim)
        self.weight_scale = _scale_parameter(table.num_embeddings)

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids] * self.weight_scale[ids][..., None]


class IndexedExperts(YanExperts):
    """Experts that are computed one after the other: their weights know no product of several."""

    def implementation(self, hidden_states: Tensor) -> str:
        return "eager"

    def parts_by_expert(self) -> Iterable[tuple[Tensor, ...]]:
        parts = [getattr(self, name) for name in self.parts]
        return (tuple(part[expert] for part in parts) for expert in range(self.num_experts))

    def all_fields(self, hidden_states: Tensor, only: int | None = None) -> Tensor:
        number = self.num_experts if only is None else 1
        return _all_by_index(lambda *given: _EAGER_FORWARD(self, *given), hidden_states, number, only or 0)


class Int8Experts(IndexedExperts):
    """The experts with quantised weights."""

    parts = ("up_proj", "up_proj_scale", "up_proj_bias", "down_proj", "down_proj_scale", "down_proj_bias")

    def __init__(self, experts: YanExperts):
        nn.Module.__init__(self)
        self.config, self.act_fn = experts.config, experts.act_fn
        self.num_experts, self.hidden_dim = experts.num_experts, experts.hidden_dim
        self.intermediate_dim = experts.intermediate_dim
        for name in ("up_proj", "down_proj"):
            shape = getattr(experts, name).shape
            self.register_parameter(name, _int8_parameter(*shape))
            self.register_parameter(f"{name}_scale", _scale_parameter(*shape[:2]))
            self.register_parameter(f"{name}_bias", getattr(experts, f"{name}_bias"))

    def field(self, states: Tensor, *parts: Tensor) -> Tensor:
        return int8_linear(self.act_fn(int8_linear(states, *parts[:3])), *parts[3:])


# Small, computed once for each text, and an error in them would change it all: lengths, times, the choice of experts.
_FLOAT_PARTS = (YanLengthHead, YanTokenLengthHead, YanTimeEmbedding, YanGate)


def _replace_modules(model: PreTrainedModel):
    float_layers = {
        id(layer) for part in model.modules() if isinstance(part, _FLOAT_PARTS) for layer in part.modules()
    }
    if start := getattr(getattr(model, model.base_model_prefix, model), "start_proj", None):
        float_layers.add(id(start))
    # The lengths that the encoder's latents tell move all that comes behind, so that its states keep 16 bits.
    encoder = getattr(getattr(model, model.base_model_prefix, model), "encoder", None)
    encoder_layers = set(map(id, encoder.modules())) if encoder is not None else set()
    table = model.get_input_embeddings()
    for name, module in list(model.named_modules()):
        if module is table:
            model.set_submodule(name, Int8Embedding(module))
        elif isinstance(module, YanExperts):
            model.set_submodule(name, Int8Experts(module))
        elif isinstance(module, nn.Linear) and id(module) not in float_layers:
            model.set_submodule(name, Int8Linear(module, precise=id(module) in encoder_layers))


@register_quantization_config(METHOD)
class YanInt8Config(QuantizationConfigMixin):
    """
    `from_pretrained(..., quantization_config=YanInt8Config())`: weights in 8 bits, for `generate` on the CPU. What is
    not quantised, and all that lies between the products, is float32.
    """

    def __init__(self, **kwargs: Any):
        self.quant_method = METHOD
        if unknown := sorted(set(kwargs) - {"quant_method"}):
            raise ValueError(f"`YanInt8Config` has no field {unknown[0]!r}; it has none.")


class _Quantize(ConversionOps):
    def convert(self, input_dict: dict[str, Any], full_layer_name: str, **kwargs: Any) -> dict[str, Tensor]:
        (weight,) = input_dict.values()
        integers, scale = quantize_rows((weight[0] if isinstance(weight, list) else weight).float())
        if not scale.isfinite().all():
            raise ValueError(f"`{full_layer_name}` has values that are not finite numbers: it cannot be quantised.")
        return {full_layer_name: integers, f"{full_layer_name}_scale": scale}


@register_quantizer(METHOD)
class YanInt8Quantizer(HfQuantizer):
    """Quantises a model of this package as it is loaded, and loads what has been saved so."""

    is_trainable = False

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any):
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        for place in map(str, places):
            if place not in ("None", "auto", "cpu", "cpu:0"):
                raise ValueError(
                    f"{METHOD} is for the CPU, but `device_map` has {place}. Leave `quantization_config` out and load "
                    'with dtype="bfloat16" there; a checkpoint that was saved in it needs device_map="cpu".'
                )

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        return torch.float32

    def update_device_map(self, device_map: Any) -> Any:
        return {"": "cpu"} if device_map == "auto" else device_map

    def is_serializable(self) -> bool:
        return True

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.quantized_names

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize()

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        _replace_modules(model)
        parameters = model.named_parameters(remove_duplicate=False)
        self.quantized_names = {name for name, value in parameters if value.dtype == torch.int8}
        if not self.pre_quantized:
            # Transformers 5.17 casts what it loads to the dtype that stands here, before it is quantised.
            for name in self.quantized_names:
                module, _, leaf = name.rpartition(".")
                parameters = model.get_submodule(module)._parameters
                parameters[leaf] = nn.Parameter(parameters[leaf].float(), requires_grad=False)
        tied = model.all_tied_weights_keys
        model.all_tied_weights_keys = tied | {f"{new}_scale": f"{old}_scale" for new, old in tied.items()}
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        return model.requires_grad_(False)


@dataclass
class _ReadableHead:
    """A vocabulary head's weight in 8 bits, and how far these are from it."""

    version: tuple[int, int, float]
    integers: Tensor  # (V, d), int8
    scale: Tensor  # (V,)
    norms: Tensor  # of the weight's rows, (V,)
    errors: Tensor  # norms of what the integers leave out of them, (V,)


_HEADS = WeakIdKeyDictionary()
# Products below it are not worth the copy of the weight.
_SMALLEST_HEAD = 2**22
# Entries of the vocabulary that are looked at together once the best of them may be the best of all.
_GROUP = 4


def _readable(weight: nn.Parameter) -> _ReadableHead:
    # A change of `weight.data` counts as no new version; it shows in a sixty-fourth of the rows, if it is of them all.
    count, head = 0 if weight.is_inference() else weight._version, _HEADS.get(weight)
    version = (count, weight.data_ptr(), weight[::64].sum().item())
    if head is None or head.version != version:
        integers, scale = torch.empty(weight.shape, dtype=torch.int8), weight.new_empty(len(weight))
        norms, errors = torch.empty_like(scale), torch.empty_like(scale)
        for start in range(0, len(weight), 8192):
            part = slice(start, start + 8192)
            integers[part], scale[part] = quantize_rows(weight[part])
            norms[part] = weight[part].norm(dim=-1)
            errors[part] = (weight[part] - integers[part] * scale[part, None]).norm(dim=-1)
        head = _HEADS[weight] = _ReadableHead(version, integers, scale, norms, errors)
    return head


def exact_argmax(states: Tensor, weight: nn.Parameter, bias: Tensor | None, part_size: int) -> tuple | None:
    """
    The argmax over the vocabulary of `linear(states, weight, bias)` and its logit, `(T,)` each, as float32 finds them.
    The logits are computed in 8 bits, and in float32 for those alone that could be the largest. `None` where the
    weight is small or a state no finite number, or where so many could be the largest that nothing is saved.

    With `x = x̂ + e` and `w = ŵ + f`, hats of what 8 bits hold, `|x·w - x̂·ŵ| = |e·w + x̂·f| ≤ ‖e‖‖w‖ + ‖x̂‖‖f‖`;
    float32 adds at most `d` roundings of `‖x‖‖w‖` to either product. A token whose logit in 8 bits plus its bound is
    below another's minus that one's cannot be the argmax.

    Args:
        states: `(T, d)`, float32.
        weight, bias: The head's, `(V, d)` and `(V,)`.
        part_size: Entries of the vocabulary whose logits are computed together.
    """
    if weight.numel() < _SMALLEST_HEAD or not states.isfinite().all():
        return None
    head, (integers, scales) = _readable(weight), quantize_rows(states)
    read = integers * scales[:, None]
    rounding = 2 * (states.shape[1] + 8) * torch.finfo(torch.float32).eps
    by_norm = (states - read).norm(dim=-1) + rounding * states.norm(dim=-1)  # (T,), for each unit of ‖w‖
    by_error = read.norm(dim=-1)
    parts, buffers = [], _product_buffers(len(states), part_size)
    for start in range(0, len(weight), part_size):
        part = slice(start, start + part_size)
        part_bias = None if bias is None else bias[part]
        logits = _product(integers, scales, head.integers[part], head.scale[part], part_bias, buffers)
        if surplus := -logits.shape[1] % _GROUP:
            logits = nn.functional.pad(logits, (0, surplus), value=-torch.inf)
        highest = logits.view(len(states), _GROUP, -1).amax(dim=1)  # a group is every so many-th entry
        parts.append((start, highest, by_norm * head.norms[part].max() + by_error * head.errors[part].max()))
    least = torch.stack([highest.amax(dim=1) - bound for _, highest, bound in parts]).amax(dim=0)
    rows, tokens = [], []
    for start, highest, bound in parts:
        row, group = (highest >= (least - bound)[:, None]).nonzero(as_tuple=True)
        rows.append(row)
        tokens.append(start + group[:, None] + highest.shape[1] * torch.arange(_GROUP))
    # What fills the last group up stands for tokens that are there.
    rows, tokens = torch.cat(rows), torch.cat(tokens).clamp(max=len(weight) - 1)
    if tokens.numel() > len(weight):
        return None
    logits = weight.new_empty(tokens.shape)  # (groups found, group)
    candidates = weight.new_empty(min(1024, len(tokens)), _GROUP, weight.shape[1])
    for start in range(0, len(tokens), 1024):
        part = slice(start, start + 1024)
        chosen = candidates[: len(tokens[part])]
        torch.index_select(weight, 0, tokens[part].flatten(), out=chosen.view(-1, weight.shape[1]))
        torch.matmul(chosen, states[rows[part], :, None], out=logits[part, :, None])
    if bias is not None:
        logits = logits + bias[tokens]
    best = torch.full((len(states),), -torch.inf).scatter_reduce(0, rows, logits.amax(dim=1), "amax")
    # The first of equal ones, as one maximum over the vocabulary gives it.
    tokens = tokens.masked_fill(logits < best[rows, None], len(weight)).amin(dim=1)
    return torch.full((len(states),), len(weight)).scatter_reduce(0, rows, tokens, "amin"), best
