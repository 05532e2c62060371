# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The loss of a batch that is spread over several processes, and `generate` where they share the weights.

Data-parallel engines average gradients over the processes. An average of each process's own loss is not the loss of
the joined batch: token means have different denominators, and load balance and MMD are not means over tokens at all.
Here sums and points are exchanged, so that averaged gradients are those of the joined batch.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class LossGroup:
    """The processes of a group, by default all, that share a batch and compute its loss at the same time."""

    def __init__(self, group: "dist.ProcessGroup | None" = None):
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the processes, a constant for autograd."""
        values = values.detach().clone()
        dist.all_reduce(values, group=self.group)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the processes, through which gradients flow back to each."""
        from torch.distributed.nn.functional import all_reduce

        return all_reduce(values, group=self.group or dist.group.WORLD)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Rows of all processes, as many of each, in order, `(n, ...)` → `(size · n, ...)`, with gradients to each."""
        # A sum of rows that only one process fills: backends without a reduce-scatter have its gradient too.
        slots = values.new_zeros(self.size, *values.shape)
        slots[self.rank] = values
        return self.sum(slots).flatten(0, 1)

    def union(self, tokens: torch.Tensor) -> torch.Tensor:
        """The distinct tokens of all processes, sorted, from each one's own, `(n,)`."""
        padded = tokens[:1].repeat(self.largest(len(tokens), tokens.device))
        padded[: len(tokens)] = tokens
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat(parts).unique()

    def largest(self, count: int, device: torch.device) -> int:
        """The largest of the processes' counts."""
        value = torch.tensor(count, device=device)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group)
        return int(value)


def loss_group(model: nn.Module) -> LossGroup | None:
    """
    The group over which a model's training loss is joined, `None` where each process stands for itself: in evaluation,
    which may run on one process, and under tensor parallelism, where the processes hold the same rows.
    """
    is_joined = model.config.loss_reduction == "global" and model.training and torch.is_grad_enabled()
    if not is_joined or (getattr(model, "_tp_size", None) or 1) > 1:
        return None
    is_spread = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return LossGroup() if is_spread else None


def run_whole(model: nn.Module, name: str) -> None:
    """
    Lets a method of a model that FSDP2 shards run with whole weights: as the model's forward, its layers gathered too,
    since `generate` does not use all layers through their forward. All processes have to call the method together.
    """
    if name in vars(model) or not (dist.is_available() and dist.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    if not isinstance(model, FSDPModule):
        return
    method = getattr(model, name)

    def gathered(*arguments: Any, **keywords: Any) -> Any:
        layers = [module for module in model.modules() if isinstance(module, FSDPModule) and module is not model]
        for layer in layers:
            layer.unshard()
        try:
            return method(*arguments, **keywords)
        finally:
            for layer in layers:
                layer.reshard()

    setattr(model, name, gathered)
    # The model's own weights are gathered by FSDP2, as for its forward. That leaves them whole, for a backward pass.
    register_fsdp_forward_method(model, name)
    as_forward = getattr(model, name)

    @functools.wraps(method)
    def whole(*arguments: Any, **keywords: Any) -> Any:
        try:
            return as_forward(*arguments, **keywords)
        finally:
            model.reshard()

    setattr(model, name, whole)
