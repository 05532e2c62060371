# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The expert vector fields, as stacked weights behind Transformers' experts interface."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from .configuration_yan import YanConfig
from .cpu_linear import OneDnnLinear, linear, linear_gelu


@use_experts_implementation(is_concatenated=True, is_transposed=False, has_bias=True, has_gate=False)
class YanRoutedExperts(nn.Module):
    """`K` feed-forward networks with their weights stacked: 3-D parameters that Transformers' MoE kernels take."""

    def __init__(self, config: YanConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.intermediate_size
        self.up_proj = nn.Parameter(torch.empty(self.num_experts, self.intermediate_dim, self.hidden_dim))
        self.up_proj_bias = nn.Parameter(torch.empty(self.num_experts, self.intermediate_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.down_proj_bias = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of the chosen experts: `(T, d)`, `(T, k)`, `(T, k)` → `(T, d)`. The eager implementation."""
        output = torch.zeros_like(hidden_states)
        expert_of_slot = top_k_index.flatten()
        slots = expert_of_slot.argsort(stable=True)
        # Under expert parallelism, indices past the last expert are another rank's.
        counts = torch.bincount(expert_of_slot, minlength=self.num_experts).tolist()[: self.num_experts]
        tokens = slots // top_k_index.shape[-1]
        weights = top_k_weights.flatten()[slots, None]
        start = 0
        for expert, count in enumerate(counts):
            if count == 0:
                continue
            group = slice(start, start := start + count)
            states = hidden_states[tokens[group]]
            inner = linear_gelu(states, self.up_proj[expert], self.up_proj_bias[expert], self.act_fn)
            field = linear(inner, self.down_proj[expert], self.down_proj_bias[expert])
            output.index_add_(0, tokens[group], (field * weights[group]).to(output.dtype))
        return output


# Under the decorator; looked up once, since a compiler does not look into bound methods.
_EAGER_FORWARD = YanRoutedExperts.forward.__wrapped__


class YanExperts(YanRoutedExperts):
    """The expert vector fields: one chosen expert per token, or all of them where the mixture's density is needed."""

    # Computes in the experts' place while their weights are in CPU memory ([`~yan_hf.offload.ExpertOffload`]).
    offload: Any = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`(T, d)` with indices and weights `(T, k)` → `(T, d)`; without them, every expert's field, `(T, K, d)`."""
        if self.offload is not None:
            return self.offload.compute(hidden_states, top_k_index, top_k_weights)
        if top_k_index is None:
            return self.all_fields(hidden_states)
        own = {"eager": _EAGER_FORWARD, "blocks": YanExperts.by_blocks}
        routed = own.get(self.implementation(hidden_states), YanRoutedExperts.forward)
        output = routed(self, hidden_states, top_k_index, top_k_weights)
        share = self.down_proj.shape[-1] / self.intermediate_dim
        if share < 1:
            # Tensor parallelism: the ranks' outputs are summed, each with the whole bias. All but this rank's share is
            # taken off the value; the bias's gradient is whole on each rank, as that of every replicated weight.
            biases = (top_k_weights[..., None] * self.down_proj_bias[top_k_index]).sum(dim=1)
            output = output - ((1 - share) * biases).detach()
        return output

    def implementation(self, hidden_states: torch.Tensor) -> str:
        """Transformers' name of what computes `hidden_states`, or `"blocks"` for [`~YanExperts.by_blocks`]."""
        chosen = self.config._experts_implementation
        if hidden_states.dtype == torch.float64:
            return "eager"  # gradient checks run in it, and no grouped kernel does
        if chosen == "grouped_mm" and OneDnnLinear.is_active():
            return "eager"  # the grouped product on the CPU is the same loop, over slower kernels
        if chosen == "grouped_mm" and hidden_states.device.type == "cuda" and self.up_proj.dtype != torch.bfloat16:
            return "blocks"  # the grouped product of other types is a loop that waits for the counts on the host
        return chosen

    def by_blocks(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """
        As the eager implementation, in shapes that do not depend on the choice: nothing waits for the device.

        An expert's tokens fill blocks of one size, the last one with zeros. Whatever the choice, `T·k / size + K`
        blocks are enough; each is multiplied by its expert's weights.
        """
        num_tokens, k = top_k_index.shape
        # Of all experts, also where this module holds a part of them: the same shapes give the same bits.
        all_experts = self.config.num_experts
        size = 8 * max(1, -(-num_tokens * k // (8 * all_experts)))
        num_blocks = num_tokens * k // size + all_experts
        # Under expert parallelism, indices past the last expert are another rank's.
        top_k_weights = top_k_weights * (top_k_index < self.num_experts)
        experts, order = top_k_index.flatten().clamp(max=self.num_experts - 1).sort(stable=True)
        places = torch.arange(len(experts), device=experts.device)
        counts = (experts[:, None] == torch.arange(self.num_experts, device=experts.device)).sum(dim=0)
        padded = (counts + size - 1) // size * size
        ends = padded.cumsum(0)
        places = places + ((ends - padded) - (counts.cumsum(0) - counts))[experts]  # of the sorted in the blocks
        blocks = hidden_states.new_zeros(num_blocks * size, hidden_states.shape[-1])
        blocks = blocks.index_copy(0, places, hidden_states[order // k]).view(num_blocks, size, -1)
        starts = torch.arange(num_blocks, device=ends.device) * size
        expert = torch.searchsorted(ends, starts, right=True).clamp(max=self.num_experts - 1)  # of each block
        inner = self.act_fn(torch.bmm(blocks, self.up_proj[expert].mT) + self.up_proj_bias[expert, None])
        fields = torch.bmm(inner, self.down_proj[expert].mT) + self.down_proj_bias[expert, None]
        fields = fields.flatten(0, 1)[places[order.argsort()]].view(num_tokens, k, -1)
        return (fields * top_k_weights[..., None]).sum(dim=1).to(hidden_states.dtype)

    def all_fields(self, hidden_states: torch.Tensor, only: int | None = None) -> torch.Tensor:
        """The fields of every expert, `(T, d)` → `(T, K, d)`, or of `only` one, `(T, 1, d)`."""
        num_experts = self.num_experts if only is None else 1
        if self.implementation(hidden_states) not in ("eager", "blocks"):
            return _all_by_index(partial(YanRoutedExperts.forward, self), hidden_states, num_experts, only or 0)
        part = slice(None) if only is None else slice(only, only + 1)
        up_proj, down_proj = self.up_proj[part].transpose(1, 2), self.down_proj[part].transpose(1, 2)
        states = hidden_states.expand(len(up_proj), *hidden_states.shape)  # (K, T, d), no copy
        inner = torch.bmm(states, up_proj) + self.up_proj_bias[part, None]
        fields = torch.bmm(self.act_fn(inner), down_proj) + self.down_proj_bias[part, None]
        return fields.transpose(0, 1)


def _all_by_index(routed: Callable, hidden_states: torch.Tensor, num_experts: int, first: int = 0) -> torch.Tensor:
    # Each token once for each expert: the kernels of routed tokens, already sorted by expert.
    num_tokens = hidden_states.shape[0]
    experts = torch.arange(first, first + num_experts, device=hidden_states.device)
    index = experts.repeat_interleave(num_tokens)[:, None]
    weights = torch.ones_like(index, dtype=hidden_states.dtype)
    fields = routed(hidden_states.repeat(num_experts, 1), index, weights)
    return fields.view(num_experts, num_tokens, -1).transpose(0, 1)


def expert_fields(experts: nn.Module, routed: Callable, hidden_states: torch.Tensor, num_experts: int) -> torch.Tensor:
    """
    Every expert's field, `(T, d)` → `(T, K, d)`, by a call of the module, where adapters and parallelism hook in.

    Where weights are spread over ranks, `routed` is called instead: it takes indices, which is all that those hooks
    know.
    """
    if any(isinstance(parameter, DTensor) for parameter in experts.parameters()):
        return _all_by_index(routed, hidden_states, num_experts)
    return experts(hidden_states)


__all__ = ["YanExperts", "YanRoutedExperts", "expert_fields"]
