# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A faster `linear` for inference in float32 on x86 processors."""

import platform
import threading
from typing import Any

import torch
from torch import nn
from transformers.activations import GELUActivation


# Multiply-adds below which the time to look up oneDNN's kernel is more than it saves.
_SMALLEST_PRODUCT = 2**21
_ACTIVE = threading.local()


class OneDnnLinear:
    """
    A context in which the model's float32 products on the CPU go through oneDNN instead of MKL.

    PyTorch's float32 products on x86 call MKL, which picks its kernels by the processor's maker and is slower than
    oneDNN on AMD's (`benchmarks/linear_rates.py`). The context holds for the thread that entered it. It has no
    gradient, and changes nothing where one is recorded, under autocast, and for other dtypes and devices.
    """

    @staticmethod
    def is_available() -> bool:
        return (
            platform.machine().lower() in ("x86_64", "amd64")
            and torch.backends.mkldnn.is_available()
            and torch.backends.mkldnn.enabled
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # also what torch.compile calls
        )

    @staticmethod
    def is_active() -> bool:
        return getattr(_ACTIVE, "depth", 0) > 0

    def __enter__(self):
        _ACTIVE.depth = getattr(_ACTIVE, "depth", 0) + 1
        return self

    def __exit__(self, *exception: Any):
        _ACTIVE.depth -= 1


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a layer's weight may be used without calling the layer: no adapter, hook or parametrization is there."""
    return (
        type(module) is nn.Linear
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "_hf_hook" not in module.__dict__
        and type(module._parameters.get("weight")) is nn.Parameter
    )


def _can_use(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """For states `(..., d)`, weight `(n, d)` and bias."""
    return (
        states.numel() * weight.shape[0] >= _SMALLEST_PRODUCT
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and all(
            type(tensor) in (torch.Tensor, nn.Parameter)
            and tensor.dtype == torch.float32
            and tensor.device.type == "cpu"
            for tensor in ((states, weight) if bias is None else (states, weight, bias))
        )
    )


def linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`nn.functional.linear`, within [`OneDnnLinear`] by oneDNN."""
    if OneDnnLinear.is_active() and _can_use(states, weight, bias):
        return torch.ops.mkldnn._linear_pointwise.default(states, weight, bias, "none", [], "")
    return nn.functional.linear(states, weight, bias)


def apply_linear(layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """`layer(states)`; within [`OneDnnLinear`] a plain linear layer's product goes through oneDNN."""
    if OneDnnLinear.is_active() and is_plain_linear(layer):
        return linear(states, layer.weight, layer.bias)
    return layer(states)


def linear_gelu(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, act_fn: nn.Module
) -> torch.Tensor:
    """`act_fn(linear(states))`; within [`OneDnnLinear`] the exact GELU is applied as the product is written."""
    if OneDnnLinear.is_active() and type(act_fn) is GELUActivation and _can_use(states, weight, bias):
        return torch.ops.mkldnn._linear_pointwise.default(states, weight, bias, "gelu", [], "none")
    return act_fn(linear(states, weight, bias))


__all__ = ["OneDnnLinear", "apply_linear", "is_plain_linear", "linear", "linear_gelu"]
