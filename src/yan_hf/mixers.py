# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The backbones beside attention, in the table [`MIXERS`]. Mamba: Mamba-1 in one direction (Gu and Dao 2023,
section 3.4), and two of those as a bidirectional one.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.integrations import use_kernel_forward_from_hub

from .configuration_yan import YanConfig
from .selective_scan import causal_conv, resolve_implementation, selective_scan, tell_once


# The range that the initial step sizes are drawn from, and their floor, as in mamba-ssm.
STEP_RANGE = (1e-3, 1e-1)
STEP_FLOOR = 1e-4


class YanTimeStepProjection(nn.Linear):
    """The linear layer of the step sizes. A class of its own, so that it can be initialised apart."""

    @torch.no_grad()
    def reset(self):
        """Weights uniform in ±rank^-0.5; the bias such that the step sizes start log-uniform in `STEP_RANGE`."""
        bound = self.in_features**-0.5
        init.uniform_(self.weight, -bound, bound)
        low, high = (math.log(limit) for limit in STEP_RANGE)
        uniform = torch.rand(self.out_features, device=self.bias.device, dtype=torch.float32)
        steps = torch.exp(uniform * (high - low) + low).clamp(min=STEP_FLOOR)
        init.copy_(self.bias, steps + torch.log(-torch.expm1(-steps)))  # the softplus's inverse


class YanKernelFunction(nn.Module):
    """
    A function that `from_pretrained(..., use_kernels=True)` may replace by a kernel of the Hub, where Transformers'
    mapping or a `KernelConfig` has one for the model's device. A module for each use, so that models do not share it.

    Args:
        implementation: `config.mamba_implementation`; with `"torch"` no kernel is taken.
    """

    def __init__(self, implementation: str):
        super().__init__()
        self.is_open = implementation != "torch"

    def takes_kernel(self, states: torch.Tensor) -> bool:
        """Whether a kernel stands here. Kernels are opaque to the compiler, and do not know float64."""
        has_kernel = getattr(self.forward, "__func__", type(self).forward) is not type(self).forward
        suits = states.dtype != torch.float64 and not torch.compiler.is_compiling()
        return self.is_open and has_kernel and suits


@use_kernel_forward_from_hub("selective_scan_fn")
class YanSelectiveScan(YanKernelFunction):
    """[`selective_scan`] in the form in which kernels of the Hub have it."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        delta_bias: torch.Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        use_mambapy: bool = False,
        use_associative_scan: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        return selective_scan(hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, **kwargs)


@use_kernel_forward_from_hub("causal_conv1d_fn")
class YanCausalConvFunction(YanKernelFunction):
    """[`causal_conv`] in the form in which kernels of the Hub have it, for weights `(D, K)`."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        return causal_conv(hidden_states, weight[:, None], bias, **kwargs)


class YanCausalConv(nn.Conv1d):
    """
    The depthwise convolution with its SiLU, `(B, D, L)` → `(B, D, L)`. A layer of its own, so that what hooks into a
    layer's call (as FSDP, which gathers its weights then) finds this one too.
    """

    def __init__(self, config: YanConfig, size: int, implementation: str):
        super().__init__(size, size, config.mamba_conv_kernel, groups=size)
        self.implementation = implementation
        self.function = YanCausalConvFunction(config.mamba_implementation)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if 2 <= self.weight.shape[-1] <= 4 and self.function.takes_kernel(states):
            weight, bias = self.weight[:, 0].to(states.dtype), self.bias.to(states.dtype)
            return self.function(states.contiguous(), weight, bias, activation="silu")
        return causal_conv(states, self.weight, self.bias, self.implementation)


class YanMambaMixer(nn.Module):
    """
    A Mamba-1 layer from left to right: `(B, L, d)` → `(B, L, d)`. Parameters have mamba-ssm's names and shapes. Every
    layer is called as a module, never by its weight, so that adapters in its place are used.

    Raises:
        ImportError: where `config.mamba_implementation` demands CUDA kernels that are not installed.
    """

    def __init__(self, config: YanConfig):
        super().__init__()
        size, inner_size = config.hidden_size, config.mamba_expand * config.hidden_size
        self.state_size = config.mamba_state_size
        self.step_rank = math.ceil(size / 16)
        self.implementation = resolve_implementation(config.mamba_implementation, "mamba_implementation")
        self.in_proj = nn.Linear(size, 2 * inner_size, bias=False)
        self.conv1d = YanCausalConv(config, inner_size, self.implementation)
        self.x_proj = nn.Linear(inner_size, self.step_rank + 2 * self.state_size, bias=False)
        self.dt_proj = YanTimeStepProjection(self.step_rank, inner_size)
        self.A_log = nn.Parameter(torch.empty(inner_size, self.state_size, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(inner_size, dtype=torch.float32))
        self.out_proj = nn.Linear(inner_size, size, bias=False)
        self.out_proj.ends_residual = True
        self.scan = YanSelectiveScan(config.mamba_implementation)
        self.mark_undecayed()

    def mark_undecayed(self):
        """Marks `A_log` and `D` as mamba-ssm does, for optimisers that look for it."""
        self.A_log._no_weight_decay = True
        self.D._no_weight_decay = True

    @torch.no_grad()
    def reset(self):
        """`A = -1 … -N` in each channel, and `D = 1`."""
        rates = torch.arange(1, self.state_size + 1, dtype=torch.float32, device=self.A_log.device)
        init.copy_(self.A_log, rates.log().expand_as(self.A_log))
        init.ones_(self.D)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        states, gate = self.in_proj(hidden_states).mT.chunk(2, dim=1)  # (B, D, L) each
        states = self.conv1d(states)
        steps, b, c = self.x_proj(states.mT).split([self.step_rank, self.state_size, self.state_size], dim=-1)
        rates = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        inputs = (states, self.dt_proj(steps).mT, rates, b.mT, c.mT, self.D.to(rates.dtype), gate)
        if self.scan.takes_kernel(states):
            tell_once(states, "a kernel that `use_kernels` has put there")
            output = self.scan(*inputs, delta_softplus=True)
        else:
            output = selective_scan(*inputs, delta_softplus=True, implementation=self.implementation)
        return self.out_proj(output.mT)


def scan_orders(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Where each position of a padded batch stands in the forward and in the backward scan, `(B, L)` each. Real tokens,
    where `mask` `(B, L)` is true, come first: in their order in the one, in the opposite order in the other. Padding,
    wherever it stands, comes after them, where nothing that is real can see it.
    """
    rank = mask.long().cumsum(dim=-1)
    lengths = rank[:, -1:]
    places = torch.arange(mask.shape[1], device=mask.device)
    behind = lengths + places - rank  # of padding, in its own order
    return torch.where(mask, rank - 1, behind), torch.where(mask, lengths - rank, behind)


def _gather(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


class YanBidirectionalMamba(nn.Module):
    """
    A Mamba layer over the sequence and another, with its own weights, over the reversed sequence; both outputs are
    concatenated and projected: `(B, L, d)` → `(B, L, d)`.

    Each row is scanned within its own real tokens, so that padding, on either side or in between, changes nothing.
    With `config.mamba_padding="research"` the whole padded row is scanned as it stands, and reversed by a plain flip,
    as the research code does it: the same for rows without padding.
    """

    def __init__(self, config: YanConfig):
        super().__init__()
        self.feed_forward_multiplier = config.mamba_ff_multiplier
        self.exact_padding = config.mamba_padding == "exact"
        self.fwd = YanMambaMixer(config)
        self.bwd = YanMambaMixer(config)
        self.proj = nn.Linear(2 * config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """From `(B, L, d)` and the mask `(B, L)`, 1 on real tokens, or `None` without padding."""
        if padding_mask is None or not self.exact_padding:
            forward, backward = self.fwd(hidden_states), self.bwd(hidden_states.flip(1)).flip(1)
        else:
            mask = padding_mask.bool()
            # What stands in the padding could otherwise still reach gradients, as 0 · NaN.
            hidden_states = hidden_states.masked_fill(~mask[..., None], 0.0)
            forward, backward = (
                _gather(mixer(_gather(hidden_states, place.argsort(dim=-1))), place)
                for mixer, place in zip((self.fwd, self.bwd), scan_orders(mask))
            )
        return self.proj(torch.cat([forward, backward], dim=-1))


# Backbone → what mixes the positions of its blocks in the place of self-attention, which `"transformer"` has. Each is
# built from the configuration and called with states `(B, L, d)` and padding mask `(B, L)` or `None`. Its
# `feed_forward_multiplier` is the inner width of the feed-forward network behind it, in units of `hidden_size`; a part
# that does not start as linear layers and norms do has a `reset`. Names and fields stand in `configuration_yan`.
MIXERS: dict[str, type[nn.Module]] = {"mamba": YanBidirectionalMamba}
