# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The router: the gate over the expert vector fields, and the choice of one expert per target token."""

import torch
from torch import nn

from .configuration_yan import YanConfig
from .cpu_linear import apply_linear


class YanGate(nn.Module):
    """
    Gate over the experts, per target token.

    `[r ; pooled source ; time embedding]`, width `3d` → `Linear(3d, m·d) → GELU → Linear(m·d, K)`, divided by the
    gate's temperature.
    """

    def __init__(self, config: YanConfig):
        super().__init__()
        inner_size = config.gate_dim_multiplier * config.hidden_size
        self.up_proj = nn.Linear(3 * config.hidden_size, inner_size)
        self.down_proj = nn.Linear(inner_size, config.num_experts)
        self.temperature = config.gate_temperature

    def forward(
        self, hidden_states: torch.Tensor, pooled_source: torch.Tensor, time_embedding: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: The trunk's result `r`, `(B, Ly, d)`.
            pooled_source: Masked mean of the source's latents, `(B, d)`.
            time_embedding: `(B or 1, d)`.

        Returns:
            Logits `(B, Ly, K)`, already divided by the temperature.
        """
        shape = hidden_states.shape
        features = torch.cat(
            [hidden_states, pooled_source[:, None].expand(shape), time_embedding[:, None].expand(shape)], dim=-1
        )
        return self.down_proj(nn.functional.gelu(apply_linear(self.up_proj, features))) / self.temperature


class YanExpertRoutes(nn.Module):
    """
    Hands on each token's experts `(T, k)` and their weights, as `(logits, weights, experts)`.

    A module, without parameters, so that the expert parallelism of Transformers before 5.21 can hook into it and leave
    each rank its own experts; later versions hook into the experts.
    """

    def __init__(self, config: YanConfig):
        super().__init__()
        self.num_experts = config.num_experts

    def forward(self, experts: torch.Tensor, weights: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        return None, weights, experts


def gate_log_probs(gate_logits: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """
    Log-probabilities of the experts, at least float32.

    Args:
        gate_logits: `(B, Ly, K)`.
        attention_mask: `(B, Ly)`, 1 on real target tokens; padding gets the uniform distribution.
    """
    logits = gate_logits.to(torch.promote_types(gate_logits.dtype, torch.float32))
    # Equal logits are the uniform distribution.
    return logits.masked_fill(~attention_mask.bool()[..., None], 0.0).log_softmax(dim=-1)


def choose_experts(
    log_probs: torch.Tensor, uniform: torch.Tensor | None = None, temperature: float = 1.0
) -> torch.Tensor:
    """
    One expert per target token.

    Args:
        log_probs: Log-probabilities of the experts, `(B, Ly, K)`.
        uniform: Uniform noise of the same shape, for a draw from the categorical distribution by the Gumbel-max
            trick; `None` takes the most probable expert.
        temperature: Divides the log-probabilities before the draw; below 1 sharpens the gate.

    Returns:
        Expert indices `(B, Ly)`, int64.
    """
    if uniform is None:
        return log_probs.argmax(dim=-1)
    tiny = torch.finfo(log_probs.dtype).tiny
    exponential = uniform.to(log_probs.dtype).clamp(min=tiny).log().neg().clamp(min=tiny)
    return (log_probs / temperature - exponential.log()).argmax(dim=-1)


__all__ = ["YanExpertRoutes", "YanGate", "choose_experts", "gate_log_probs"]
