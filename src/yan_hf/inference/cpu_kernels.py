# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Faster products for inference in float32 on x86 processors, put under a model's layers from outside."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..layers import Kernels
from .int8 import counted_version, exact_argmax, has_onednn, has_vnni, keep_packed, weight_version


# Multiply-adds below which the time to look up oneDNN's kernel is more than it saves.
_SMALLEST_PRODUCT = 2**21


def is_available() -> bool:
    """Whether this machine and this PyTorch have oneDNN's products."""
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and has_onednn()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # also what torch.compile calls
    )


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
    outer = kernels.linear, kernels.argmax
    kernels.linear, kernels.argmax = partial(onednn_linear, {}), vocabulary_argmax
    try:
        yield
    finally:
        kernels.linear, kernels.argmax = outer


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


def onednn_linear(
    found: dict[tuple[int, int], Tensor | None],
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
) -> Tensor | None:
    """
    `activation(linear(states))` with `activation` `"none"` or `"gelu"`, applied as the product is written; `None`
    where it is not for oneDNN. States `(..., d)`, weight `(n, d)`. `found` keeps each weight in oneDNN's layout for
    one call of `generate`, where nothing but operations in place changes it.
    """
    if states.numel() * weight.shape[0] < _SMALLEST_PRODUCT or not _is_usable(states, weight, bias):
        return None
    if states.numel() > states.shape[-1]:
        key = counted_version(weight)
        if key not in found:
            found[key] = _packed(weight)
        weight = weight if found[key] is None else found[key]
    algorithm = "" if activation == "none" else "none"  # oneDNN's name of the exact GELU
    return torch.ops.mkldnn._linear_pointwise.default(states, weight, bias, activation, [], algorithm)
