# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A faster `linear` for inference in float32 on x86 processors."""

import platform
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.activations import GELUActivation


# Multiply-adds below which the time to look up oneDNN's kernel is more than it saves.
_SMALLEST_PRODUCT = 2**21
_ACTIVE = threading.local()


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a layer's weight may be used without calling the layer: no adapter, hook or parametrization is there."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not hasattr(module, "_hf_hook")
    )


class OneDnnLinear(TorchFunctionMode):
    """
    Within it, `nn.functional.linear` of float32 tensors on the CPU goes through oneDNN instead of MKL.

    PyTorch's float32 products on x86 call MKL, which picks its kernels by the processor's maker and is slower than
    oneDNN on AMD's (`benchmarks/linear_rates.py`). As a mode it reaches every linear layer, also those that PEFT or
    Accelerate have wrapped. It has no gradient, and does nothing where one is recorded.
    """

    @staticmethod
    def is_available() -> bool:
        return (
            platform.machine().lower() in ("x86_64", "amd64")
            and torch.backends.mkldnn.is_available()
            and torch.backends.mkldnn.enabled
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # also what torch.compile calls
        )

    @classmethod
    def is_active(cls) -> bool:
        return getattr(_ACTIVE, "depth", 0) > 0

    def __enter__(self):
        _ACTIVE.depth = getattr(_ACTIVE, "depth", 0) + 1
        return super().__enter__()

    def __exit__(self, *exception: Any):
        _ACTIVE.depth -= 1
        return super().__exit__(*exception)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is nn.functional.linear and not kwargs:
            states, weight, bias = args if len(args) == 3 else (*args, None)
            if _can_use(states, weight, bias):
                return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
        return func(*args, **(kwargs or {}))


def _can_use(*tensors: torch.Tensor | None) -> bool:
    """For states `(..., d)`, weight `(n, d)` and bias."""
    return (
        not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and tensors[0].numel() * tensors[1].shape[0] >= _SMALLEST_PRODUCT
        and all(
            type(tensor) in (torch.Tensor, nn.Parameter)
            and tensor.dtype == torch.float32
            and tensor.device.type == "cpu"
            for tensor in tensors
            if tensor is not None
        )
    )


def linear_gelu(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, act_fn: nn.Module
) -> torch.Tensor:
    """`act_fn(linear(states))`; within [`OneDnnLinear`] the exact GELU is applied as the product is written."""
    if OneDnnLinear.is_active() and type(act_fn) is GELUActivation and _can_use(states, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "gelu", [], "none")
    return act_fn(nn.functional.linear(states, weight, bias))


__all__ = ["OneDnnLinear", "is_plain_linear", "linear_gelu"]
