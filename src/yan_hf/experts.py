# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The expert vector fields, as stacked weights behind Transformers' experts interface."""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from .configuration_yan import YanConfig


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
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:  # under expert parallelism: another rank's expert
                continue
            tokens, slots = torch.where(top_k_index == expert)
            inner = nn.functional.linear(hidden_states[tokens], self.up_proj[expert], self.up_proj_bias[expert])
            field = nn.functional.linear(self.act_fn(inner), self.down_proj[expert], self.down_proj_bias[expert])
            field = field * top_k_weights[tokens, slots, None]
            output.index_add_(0, tokens, field.to(output.dtype))
        return output


class YanExperts(YanRoutedExperts):
    """The expert vector fields: one chosen expert per token, or all of them where the mixture's density is needed."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`(T, d)` with indices and weights `(T, k)` → `(T, d)`; without them, every expert's field, `(T, K, d)`."""
        # Gradient checks run in float64, and no grouped kernel does.
        eager = self.config._experts_implementation == "eager" or hidden_states.dtype == torch.float64
        if top_k_index is not None:
            routed = super().forward.__wrapped__ if eager else super().forward.__func__
            return routed(self, hidden_states, top_k_index, top_k_weights)
        if eager:
            states = hidden_states.expand(self.num_experts, *hidden_states.shape)  # (K, T, d), no copy
            inner = torch.bmm(states, self.up_proj.transpose(1, 2)) + self.up_proj_bias[:, None]
            fields = torch.bmm(self.act_fn(inner), self.down_proj.transpose(1, 2)) + self.down_proj_bias[:, None]
            return fields.transpose(0, 1)
        # Each token once for each expert: the same kernels, already sorted by expert.
        num_tokens, num_experts = hidden_states.shape[0], self.config.num_experts
        index = torch.arange(num_experts, device=hidden_states.device).repeat_interleave(num_tokens)[:, None]
        weights = torch.ones_like(index, dtype=hidden_states.dtype)
        fields = super().forward(hidden_states.repeat(num_experts, 1), index, weights)
        return fields.view(num_experts, num_tokens, -1).transpose(0, 1)


__all__ = ["YanExperts", "YanRoutedExperts"]
