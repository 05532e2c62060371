# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Bidirectional attention, through Transformers' attention interface (eager, sdpa, flash, flex)."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_yan import YanConfig
from .cpu_linear import apply_linear


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with its weights, from `(B, heads, L, d/heads)` to `(B, Lq, heads, d/heads)`."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    if attention_mask is not None:
        # A query without any key attends to nothing, as in the fused kernels, rather than evenly to the padding.
        weights = weights.masked_fill(attention_mask <= torch.finfo(attention_mask.dtype).min, 0.0)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class YanAttention(nn.Module):
    """Bidirectional multi-head attention, over the sequence itself or over the source's latents."""

    def __init__(self, config: YanConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = False
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def project_key_value(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of `states` `(B, L, d)`, each `(B, heads, L, d/heads)`."""
        return self._split_heads(apply_linear(self.k_proj, states)), self._split_heads(
            apply_linear(self.v_proj, states)
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        key_value: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query = self._split_heads(apply_linear(self.q_proj, hidden_states))
        key, value = self.project_key_value(hidden_states) if key_value is None else key_value
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if key_value is not None and isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            # Flash attention takes padding as a 2-D mask, and unpads the queries by it too: right for a sequence's
            # own keys, wrong for those of another. A padded source goes through sdpa instead.
            attention_interface = ALL_ATTENTION_FUNCTIONS["sdpa"]
            attention_mask = attention_mask.bool()[:, None, None, :]
        kwargs.pop("is_causal", None)
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            is_causal=False,
            **kwargs,
        )
        return apply_linear(self.o_proj, output.reshape(*hidden_states.shape[:-1], -1)), weights


class YanCrossAttention(YanAttention):
    """Attention over the source. A class of its own so that its weights are recorded as `cross_attentions`."""


__all__ = ["YanAttention", "YanCrossAttention", "eager_attention_forward"]
