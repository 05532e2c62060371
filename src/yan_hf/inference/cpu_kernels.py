# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Faster products for inference in float32 on x86 processors, put under a model's layers from outside."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..layers import Kernels


# Multiply-adds below which the time to look up oneDNN's kernel is more than it saves.
_SMALLEST_PRODUCT = 2**21


def is_available() -> bool:
    """Whether this machine and this PyTorch have oneDNN's products."""
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # also what torch.compile calls
    )


@contextmanager
def use_onednn(kernels: Kernels) -> Iterator[None]:
    """
    A context in which float32 products on the CPU go through oneDNN instead of MKL, for the thread that entered it.
    MKL picks its kernels by the processor's maker and is slower than oneDNN on AMD's. Nothing changes where a gradient
    is recorded, under autocast, and for other dtypes and devices.

    Args:
        kernels: Those of the module that the model's layers come from, `layers.KERNELS`.
    """
    outer, kernels.linear = kernels.linear, onednn_linear
    try:
        yield
    finally:
        kernels.linear = outer


def onednn_linear(states: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor | None:
    """
    `activation(linear(states))` with `activation` `"none"` or `"gelu"`, applied as the product is written; `None`
    where it is not for oneDNN. States `(..., d)`, weight `(n, d)`.
    """
    tensors = (states, weight) if bias is None else (states, weight, bias)
    usable = (
        states.numel() * weight.shape[0] >= _SMALLEST_PRODUCT
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
        and all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
    )
    if not usable:
        return None
    algorithm = "" if activation == "none" else "none"  # oneDNN's name of the exact GELU
    return torch.ops.mkldnn._linear_pointwise.default(states, weight, bias, activation, [], algorithm)
