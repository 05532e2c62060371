# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Faster products for inference in float32 on x86 processors, put under a model's layers from outside.

A compiled program calls the same products as operators of their own, `torch.ops.yan_hf`: what lies between them
becomes a few loops, and they find their weights laid out as without a compiler.
"""

import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..experts import EAGER_FORWARD, YanExperts
from ..layers import Kernels
from .int8 import counted_version, exact_argmax, has_onednn, has_vnni, keep_packed, weight_version


# Multiply-adds below which the time to look up oneDNN's kernel is more than it saves.
_SMALLEST_PRODUCT = 2**21
# The same for a compiler's own product, which has nothing to look up and takes what is around it into it.
_SMALLEST_COMPILED = 2**25


def is_available() -> bool:
    """Whether this machine and this PyTorch have oneDNN's products."""
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and has_onednn()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # also what torch.compile calls
    )


class _Call(threading.local):
    """A thread's call of `generate`."""

    # Weights in oneDNN's layout, by their version: nothing but operations in place changes one within a call.
    packed: dict[tuple[int, int], Tensor | None] | None = None


_CALL = _Call()


@contextmanager
def use_onednn(kernels: Kernels) -> Iterator[None]:
    """
    A context in which float32 products on the CPU go through oneDNN instead of MKL, for the thread that entered it.
    MKL picks its kernels by the processor's maker and is slower than oneDNN on AMD's. Nothing changes where a gradient
    is recorded, under autocast, and for other dtypes and devices.

    oneDNN copies a weight into a layout of its own before each product, which takes up to a third of the time. The
    second context that sees a weight keeps the copy, as large as the weight, until that changes or is gone: of layers
    and of the experts of a stack, not of a vocabulary. No result changes.

    Args:
        kernels: Those of the module that the model's layers come from, `layers.KERNELS`.
    """
    outer, outer_packed = vars(kernels).copy(), _CALL.packed
    kernels.linear, kernels.argmax, kernels.experts = onednn_linear, vocabulary_argmax, compiled_experts
    _CALL.packed = {}
    try:
        yield
    finally:
        vars(kernels).clear()
        vars(kernels).update(outer)
        _CALL.packed = outer_packed


def _is_usable(*tensors: Tensor | None) -> bool:
    return (
        not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors if tensor is not None)
        and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors if t is not None)
    )


def vocabulary_argmax(
    states: Tensor, weight: nn.Parameter, bias: Tensor | None, part_size: int
) -> tuple[Tensor, Tensor] | None:
    """[`~int8.exact_argmax`] where the processor multiplies 8-bit integers faster than floats; `None` elsewhere."""
    is_usable = has_vnni() and _is_usable(states, weight, bias)
    return exact_argmax(states, weight, bias, part_size) if is_usable else None


def _packed(weight: Tensor) -> Tensor | None:
    """A weight in oneDNN's layout, if it is one to keep and was seen before."""
    if weight._base is not None and weight._base.dim() != 3:
        return None
    # Laid out for many tokens; by the kernels for it a single one gives other last bits.
    return keep_packed(
        weight, weight_version(weight), lambda: torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 64), 2
    )


def onednn_linear(states: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor | None:
    """
    `activation(linear(states))` with `activation` `"none"` or `"gelu"`, applied as the product is written; `None`
    where it is not for oneDNN. States `(..., d)`, weight `(n, d)`. In a context of [`use_onednn`].
    """
    is_compiling = torch.compiler.is_compiling()
    smallest = _SMALLEST_COMPILED if is_compiling else _SMALLEST_PRODUCT
    if states.numel() * weight.shape[0] < smallest or not _is_usable(states, weight, bias):
        return None
    if is_compiling:
        return torch.ops.yan_hf.linear(states, weight, bias, activation)
    if states.numel() > states.shape[-1]:
        key, found = counted_version(weight), _CALL.packed
        if key not in found:
            found[key] = _packed(weight)
        weight = weight if found[key] is None else found[key]
    algorithm = "" if activation == "none" else "none"  # oneDNN's name of the exact GELU
    return torch.ops.mkldnn._linear_pointwise.default(states, weight, bias, activation, [], algorithm)


torch.library.define("yan_hf::linear", "(Tensor states, Tensor weight, Tensor? bias, str activation) -> Tensor")
torch.library.define("yan_hf::experts", "(Tensor states, Tensor index, Tensor weights, int experts) -> Tensor")

# The experts of compiled programs by number, which no weight holds alive.
_EXPERTS: WeakValueDictionary[int, YanExperts] = WeakValueDictionary()


def keep_experts(experts: YanExperts):
    """Gives experts the number by which a compiled program calls them."""
    if _EXPERTS.get(getattr(experts, "number", None)) is not experts:  # a copy has that of its original
        experts.number = id(experts)
        _EXPERTS[experts.number] = experts


@torch.library.impl("yan_hf::linear", "CPU")
def _linear(states: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return onednn_linear(states, weight, bias, activation)


@torch.library.register_fake("yan_hf::linear")
def _(states: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return states.new_empty(*states.shape[:-1], weight.shape[0])


@torch.library.impl("yan_hf::experts", "CPU")
def _experts(states: Tensor, index: Tensor, weights: Tensor, experts: int) -> Tensor:
    return EAGER_FORWARD(_EXPERTS[experts], states, index, weights)


@torch.library.register_fake("yan_hf::experts")
def _(states: Tensor, index: Tensor, weights: Tensor, experts: int) -> Tensor:
    return torch.empty_like(states)


def compiled_experts(experts: YanExperts, states: Tensor, index: Tensor, weights: Tensor) -> Tensor | None:
    """
    The eager forward of experts as an operator of a compiled program, in which the number of tokens of each one is not
    known; `None` where the program's own product of all of them is faster, and outside of programs.
    """
    if not torch.compiler.is_compiling():
        return None
    is_small = states.numel() * experts.intermediate_dim < _SMALLEST_COMPILED
    implementation = experts.implementation(states)
    if implementation != "eager" and (implementation != "grouped_mm" or is_small):
        return None
    return torch.ops.yan_hf.experts(states, index, weights, experts.number)
