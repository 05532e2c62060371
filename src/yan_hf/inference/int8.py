# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Products of 8-bit integers on the CPU: models whose weights are quantised, and a vocabulary head that is read in 8 bits
and decides in float32.

A weight has one scale for each output, states have one for each token: sums of integers are exact, so a token's result
depends neither on its neighbours nor on the batch. The product is PyTorch's own, oneDNN's where the processor has it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers.activations import GELUActivation
from transformers.core_model_loading import ConversionOps
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..experts import EAGER_FORWARD, YanExperts, YanGate, _all_by_index
from ..layers import YanLengthHead, YanTimeEmbedding, YanTokenLengthHead


METHOD = "yan_int8"


def quantize_rows(values: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Float32 `(..., n)` as integers from -127 to 127 `(..., n)`, and the scales that give it back, `(...)`."""
    # Rather than a maximum of absolute values, for which a copy of all would be made.
    largest = torch.maximum(values.amax(dim=-1, keepdim=True), -values.amin(dim=-1, keepdim=True))
    largest = largest.clamp(min=torch.finfo(torch.float32).tiny)
    return (values * (127 / largest)).round_().to(dtype), largest[..., 0] / 127


def weight_version(weight: Tensor) -> tuple[int, int, float]:
    """What differs where the values of a weight `(n, d)` have changed since."""
    # A change of `weight.data` counts as no new version; it shows in a sixty-fourth of the rows, if it is of them all.
    return (*counted_version(weight), weight[::64].sum().item())


def counted_version(weight: Tensor) -> tuple[int, int]:
    """The same for changes by operations in place and by another memory alone, at no cost."""
    return 0 if weight.is_inference() else weight._version, weight.data_ptr()


# Of a parameter, by a part's place and rows: the version of its values, how often it was asked for, and the values in
# oneDNN's layout.
_PACKED = WeakIdKeyDictionary()


def keep_packed(weight: Tensor, version: tuple[Any, ...], pack: Callable[[], Any], times: int = 1) -> Any:
    """
    What `pack` makes of a parameter or a part of it, `(n, d)`, kept as long as the parameter is there and `version`
    the same. `None` for other tensors, and before it is asked for so many `times`.
    """
    owner = weight if weight._base is None else weight._base
    if type(owner) is not nn.Parameter:
        return None
    parts, place = _PACKED.setdefault(owner, {}), (weight.storage_offset(), len(weight))
    last, count, packed = parts.get(place, (version, 0, None))
    count, packed = (count, packed) if last == version else (0, None)
    packed = pack() if packed is None and count + 1 >= times else packed
    parts[place] = version, count + 1, packed
    return packed


def has_onednn() -> bool:
    """Whether PyTorch has oneDNN and may use it."""
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled


@torch.compiler.assume_constant_result
def _multiplies_packed() -> bool:
    """Whether oneDNN's product with packed weights is there and exact: without VNNI its sums can overflow."""
    return has_vnni() and has_onednn()


@cache
def has_vnni() -> bool:
    """Whether the processor has instructions for sums of products of 8-bit integers."""
    return torch.cpu.get_capabilities().get("avx512_vnni", False)


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.onednn.qlinear_prepack(weight.detach(), [64, weight.shape[1]])


# Entries of a weight below which oneDNN's product with a packed one takes longer than the plain one.
_SMALLEST_PACKED = 2**18


def _is_packed(weight: Tensor) -> bool:
    return weight.numel() >= _SMALLEST_PACKED and _multiplies_packed()


def _prepared(weight: Tensor) -> Tensor:
    """An int8 weight as [`_product`] takes it: packed, where that multiplies faster."""
    if not _is_packed(weight):
        return weight
    packed = keep_packed(weight, counted_version(weight), lambda: _pack(weight))
    return weight if packed is None else packed


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
    the product of what 8 bits leave out of the states is added.
    """
    return int8_linears(states, [(weight, scale, bias)], precise)[0]


def int8_linears(
    states: Tensor, layers: Sequence[tuple[Tensor, Tensor, Tensor | None]], precise: bool = False
) -> list[Tensor]:
    """[`int8_linear`] of the same states with each weight, scale and bias: one product, where weights are packed."""
    _check(states)
    rows, (weights, scales, biases) = states.float().reshape(-1, states.shape[-1]), zip(*layers)
    is_joint = all(map(_is_packed, weights))
    added = (None,) * len(layers) if precise else biases
    if torch.compiler.is_compiling():
        products = _compiled_products(rows, weights, scales, added, precise, is_joint)
    else:
        quantised = _QuantisedRows(*_with_rest(rows, precise))
        if is_joint:
            joint = _packed_product(quantised.as_unsigned(), *_packed_together(weights, scales))
            parts = zip(joint.split([len(weight) for weight in weights], dim=1), added)
            products = [_scale(part, quantised.scales, bias) for part, bias in parts]
        else:
            products = [_product(quantised, *layer) for layer in zip(weights, scales, added)]
    if precise:
        products = [product[: len(rows)] + product[len(rows) :] for product in products]
        products = [product if bias is None else product + bias for product, bias in zip(products, biases)]
    return [product.unflatten(0, states.shape[:-1]).to(states.dtype) for product in products]


@dataclass
class _QuantisedRows:
    """States as the products take them."""

    integers: Tensor  # (T, d), int8
    scales: Tensor  # (T,)
    unsigned: Tensor | None = None  # the integers with 128 for zero, uint8, once they were needed

    def as_unsigned(self) -> Tensor:
        if self.unsigned is None:
            self.unsigned = self.integers.view(torch.uint8).bitwise_xor(128)
        return self.unsigned


def _with_rest(rows: Tensor, precise: bool, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """[`quantize_rows`] of rows `(T, d)` and, if `precise`, behind them of what the integers leave out of them."""
    integers, scales = quantize_rows(rows, dtype)
    if not precise:
        return integers, scales
    rest, rest_scales = quantize_rows(rows - integers * scales[:, None], dtype)
    return torch.cat([integers, rest]), torch.cat([scales, rest_scales])


def _product(
    rows: _QuantisedRows,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    buffers: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`weight` as [`_prepared`] gives it. A result in `buffers` is gone with the next one."""
    # In place, and in the `buffers` of a loop: memory that is new to the process costs more than the arithmetic.
    if weight.is_mkldnn:
        product = _packed_product(rows.as_unsigned(), weight, scale)
    elif buffers is None:
        product = torch._int_mm(rows.integers, weight.t()).float().mul_(scale)
    else:
        counts, product = (buffer[: len(weight)].view(len(rows.integers), -1) for buffer in buffers)
        product.copy_(torch._int_mm(rows.integers, weight.t(), out=counts)).mul_(scale)
    return _scale(product, rows.scales, bias)


def _scale(product: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Rows `(T, n)` times their scales `(T,)`, and a bias, in their place."""
    scales = scales[:, None]
    return product.mul_(scales) if bias is None else torch.addcmul(bias, product, scales, out=product)


def _grouped_product(
    states: Tensor, counts: list[int], weights: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor]
) -> Tensor:
    """[`int8_linear`] of the first so many of the states `(T, d)` with the first weight, scale and bias, and so on."""
    _check(states)
    integers, row_scales = (values.split(counts) for values in quantize_rows(states.float()))
    groups = zip(map(_QuantisedRows, integers, row_scales), map(_prepared, weights), scales, biases)
    return torch.cat([_product(*group) for group in groups if len(group[0].integers)]).to(states.dtype)


_zero_points = cache(partial(torch.zeros, dtype=torch.int64))


def _packed_product(rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    # oneDNN's fast kernels take unsigned states, for which 128 is zero.
    return torch.ops.onednn.qlinear_pointwise(
        rows, 1.0, 128, weight, scale, _zero_points(len(scale)), None, 1.0, 0, torch.float32, "none", [], ""
    )


def _packed_together(weights: Sequence[Tensor], scales: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Weights `(n, d)` packed as one, and their scales."""

    def pack() -> tuple[Tensor, Tensor]:
        return (_pack(weights[0]), scales[0]) if len(weights) == 1 else (_pack(torch.cat(weights)), torch.cat(scales))

    version = tuple(map(counted_version, (*weights, *scales)))
    return keep_packed(weights[0], version, pack) or pack()


# What a compiler does not look into; what is around it, it makes one loop of.
torch.library.define("yan_hf::int8_product", "(Tensor rows, Tensor[] weights, Tensor[] scales) -> Tensor")


@torch.library.impl("yan_hf::int8_product", "CPU")
def _int8_product(rows: Tensor, weights: list[Tensor], scales: list[Tensor]) -> Tensor:
    """Integers `(T, d)`, uint8 with 128 for zero, and weights `(n, d)`, int8, that [`_is_packed`] → `(T, Σn)`."""
    return _packed_product(rows, *_packed_together(weights, scales))


@torch.library.register_fake("yan_hf::int8_product")
def _(rows: Tensor, weights: list[Tensor], scales: list[Tensor]) -> Tensor:
    return rows.new_empty(rows.shape[0], sum(weight.shape[0] for weight in weights), dtype=torch.float32)


def _compiled_products(
    rows: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    precise: bool,
    is_joint: bool,
) -> list[Tensor]:
    """The products of [`int8_linears`] for a compiler, with their biases."""
    integers, row_scales = _with_rest(rows, precise, torch.float32)
    if is_joint:
        joint = torch.ops.yan_hf.int8_product((integers + 128).to(torch.uint8), list(weights), list(scales))
        products = joint.split([len(weight) for weight in weights], dim=1)
    else:
        integers = integers.to(torch.int8)
        products = [torch._int_mm(integers, weight.t()).float() * scale for weight, scale in zip(weights, scales)]
    products = [product * row_scales[:, None] for product in products]
    return [product if bias is None else product + bias for product, bias in zip(products, biases)]


torch.library.define("yan_hf::gelu", "(Tensor states) -> Tensor")
torch.library.impl("yan_hf::gelu", "CPU", nn.functional.gelu)
torch.library.register_fake("yan_hf::gelu", torch.empty_like)


class _Gelu(nn.Module):
    """The exact GELU before a quantised product."""

    def forward(self, states: Tensor) -> Tensor:
        # A compiler would compute it twice, for the largest of a row and for its integers, and slower than oneDNN.
        return torch.ops.yan_hf.gelu(states) if torch.compiler.is_compiling() else nn.functional.gelu(states)


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

    @staticmethod
    def joint(layers: Sequence["Int8Linear"], states: Tensor) -> list[Tensor]:
        """The results of several layers, as precise as each other, for the same states."""
        parts = [(layer.weight, layer.weight_scale, layer.bias) for layer in layers]
        return int8_linears(states, parts, layers[0].precise)

    def by_part(self, states: Tensor) -> Callable[[slice], Tensor]:
        """
        What gives the layer's result for states `(T, d)` at some of its outputs, `(T, n)`, no more than at first;
        quantises them once. A result is gone with the next call.
        """
        _check(states)
        rows = _QuantisedRows(*quantize_rows(states.float()))
        bias = torch.zeros(()).expand(self.out_features) if self.bias is None else self.bias
        buffers: tuple[Tensor, Tensor] | None = None

        def outputs(part: slice) -> Tensor:
            nonlocal buffers
            weight, scale = _prepared(self.weight[part]), self.weight_scale[part]
            if not weight.is_mkldnn:
                buffers = buffers or _product_buffers(len(states), len(weight))
            return _product(rows, weight, scale, bias[part], buffers)

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
        return _all_by_index(lambda *given: EAGER_FORWARD(self, *given), hidden_states, number, only or 0)


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

    def fields(self, states: Tensor, counts: list[int]) -> Tensor:
        # What is not a product, of all states at once.
        parts = [getattr(self, name).unbind() for name in self.parts]
        return _grouped_product(self.act_fn(_grouped_product(states, counts, *parts[:3])), counts, *parts[3:])

    def field(self, states: Tensor, *parts: Tensor) -> Tensor:
        return int8_linear(self.act_fn(int8_linear(states, *parts[:3])), *parts[3:])


# Small, computed once for each text, and an error in them would change it all: lengths, times, the choice of experts.
_FLOAT_PARTS = (YanLengthHead, YanTokenLengthHead, YanTimeEmbedding, YanGate)


def _replacements(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """The modules that are quantised, by name, each with what takes its place, still without weights."""
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
            yield name, Int8Embedding(module)
        elif isinstance(module, YanExperts):
            yield name, Int8Experts(module)
        elif type(module) is GELUActivation:
            yield name, _Gelu()
        elif isinstance(module, nn.Linear) and id(module) not in float_layers:
            yield name, Int8Linear(module, precise=id(module) in encoder_layers)


@torch.no_grad()
def round_to_int8(model: PreTrainedModel):
    """
    Rounds the weights of a float model to those that [`YanInt8Config`] keeps of them, in place. A checkpoint that is
    published so, in bfloat16 too, differs in 8 bits by the rounding of the states alone: lengths, which move all that
    comes behind, rarely change.
    """
    for name, quantised in list(_replacements(model)):
        for parameter, value in quantised.named_parameters():
            if value.dtype == torch.int8:
                weight = model.get_parameter(f"{name}.{parameter}")
                integers, scale = quantize_rows(weight.float())
                weight.copy_(integers * scale[..., None])


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
        for name, quantised in list(_replacements(model)):
            model.set_submodule(name, quantised)
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

    version: tuple[float, ...]
    parts: list[Tensor]  # int8 weights (part_size, d), the last one shorter, as `_product` takes them
    scale: Tensor  # (V,)
    norms: Tensor  # of the weight's rows, (V,)
    errors: Tensor  # norms of what the integers leave out of them, (V,)


_HEADS = WeakIdKeyDictionary()
# Products below it are not worth the copy of the weight.
_SMALLEST_HEAD = 2**22
# Entries of the vocabulary that are looked at together once the best of them may be the best of all.
_GROUP = 4


def _readable(weight: nn.Parameter, part_size: int) -> _ReadableHead:
    version, head = (*weight_version(weight), part_size), _HEADS.get(weight)
    if head is None or head.version != version:
        parts, scale, is_packed = [], weight.new_empty(len(weight)), _multiplies_packed()
        norms, errors = torch.empty_like(scale), torch.empty_like(scale)
        for start in range(0, len(weight), part_size):
            part = slice(start, start + part_size)
            integers, scale[part] = quantize_rows(weight[part])
            norms[part] = weight[part].norm(dim=-1)
            errors[part] = (weight[part] - integers * scale[part, None]).norm(dim=-1)
            parts.append(_pack(integers) if is_packed else integers)
        head = _HEADS[weight] = _ReadableHead(version, parts, scale, norms, errors)
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
    head, quantised = _readable(weight, part_size), _QuantisedRows(*quantize_rows(states))
    read = quantised.integers * quantised.scales[:, None]
    rounding = 2 * (states.shape[1] + 8) * torch.finfo(torch.float32).eps
    by_norm = (states - read).norm(dim=-1) + rounding * states.norm(dim=-1)  # (T,), for each unit of ‖w‖
    by_error = read.norm(dim=-1)
    parts = []
    buffers = None if head.parts[0].is_mkldnn else _product_buffers(len(states), part_size)
    for number, part_weight in enumerate(head.parts):
        start = number * part_size
        part = slice(start, start + part_size)
        part_bias = None if bias is None else bias[part]
        logits = _product(quantised, part_weight, head.scale[part], part_bias, buffers)
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
    candidates = weight.new_empty(min(256, len(tokens)), _GROUP, weight.shape[1])
    for start in range(0, len(tokens), len(candidates)):
        part = slice(start, start + len(candidates))
        chosen = candidates[: len(tokens[part])]
        torch.index_select(weight, 0, tokens[part].flatten(), out=chosen.view(-1, weight.shape[1]))
        torch.sum(chosen.mul_(states[rows[part], None]), dim=-1, out=logits[part])  # faster than so many products
    if bias is not None:
        logits = logits + bias[tokens]
    best = torch.full((len(states),), -torch.inf).scatter_reduce(0, rows, logits.amax(dim=1), "amax")
    # The first of equal ones, as one maximum over the vocabulary gives it.
    tokens = tokens.masked_fill(logits < best[rows, None], len(weight)).amin(dim=1)
    return torch.full((len(states),), len(weight)).scatter_reduce(0, rows, tokens, "amin"), best
