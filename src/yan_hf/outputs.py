# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What the models return, and what the solver steps of one target share."""

from dataclasses import dataclass, field

import torch
from transformers.modeling_outputs import ModelOutput


@dataclass
class YanFlowConditioning:
    """What one time contributes to an evaluation of the flow, for any state.

    Args:
        time_embedding: `(1, d)`.
        adaptive_norms: For each flow block the scales and shifts of its norms, `(1, 2·n·d)`.
    """

    time_embedding: torch.Tensor
    adaptive_norms: list[torch.Tensor]


@dataclass
class YanFlowContext:
    """What every solver step of one target shares, so that it is computed once.

    Args:
        source: For each flow block the source's keys and values, or its latents `(B, Lx, d)`, or `None`.
        source_mask, target_mask: Attention masks as the attention implementation wants them; no `target_mask` with the
            Mamba backbone.
        pooled_source: Masked mean of the source's latents, `(B, d)`.
        attention_mask: The target's canvas, `(B, Ly)`, 1 on real positions.
        positions: Position embeddings of the canvas, `(B, Ly, d)`.
        conditioning: For each time that is known in advance, from [`YanFlow.condition`].
    """

    source: list[torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None]
    source_mask: torch.Tensor | None
    target_mask: torch.Tensor | None
    pooled_source: torch.Tensor
    attention_mask: torch.Tensor
    positions: torch.Tensor
    conditioning: dict[float, YanFlowConditioning] = field(default_factory=dict)


@dataclass
class YanFlowOutput(ModelOutput):
    """
    Output of [`YanFlow`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, Ly, d)`): The trunk's result `r`.
        velocity (`torch.FloatTensor` of shape `(B, Ly, d)`): The chosen experts' field, or the mixture's mean
            `Σ_k π_k u_k` where every expert was computed.
        expert_fields (`torch.FloatTensor` of shape `(B, Ly, K, d)`, *optional*): All fields `u_k`.
        gate_logits (`torch.FloatTensor` of shape `(B, Ly, K)`, *optional*): Logits of the gate; absent where the
            choice of experts was given.
        expert_indices (`torch.LongTensor` of shape `(B, Ly)`, *optional*): The chosen experts.
    """

    last_hidden_state: torch.FloatTensor | None = None
    velocity: torch.FloatTensor | None = None
    expert_fields: torch.FloatTensor | None = None
    gate_logits: torch.FloatTensor | None = None
    expert_indices: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class YanModelOutput(ModelOutput):
    """
    Output of [`YanModel`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, Ly, d)`): The decoder body's result for the estimated end
            point `z_t + (1 - t) Σ_k π_k u_k`.
        encoder_last_hidden_state (`torch.FloatTensor` of shape `(B, Lx, d)`): The source's latents `h`.
        velocity (`torch.FloatTensor` of shape `(B, Ly, d)`): The mixture's mean field.
        expert_fields (`torch.FloatTensor` of shape `(B, Ly, K, d)`): The experts' fields `u_k(z_t, t)`.
        gate_logits (`torch.FloatTensor` of shape `(B, Ly, K)`): The gate's logits.
        hidden_states, attentions, cross_attentions: Of the flow trunk, when asked for.
        encoder_hidden_states, encoder_attentions: Of the encoder, when asked for.
    """

    last_hidden_state: torch.FloatTensor | None = None
    encoder_last_hidden_state: torch.FloatTensor | None = None
    velocity: torch.FloatTensor | None = None
    expert_fields: torch.FloatTensor | None = None
    gate_logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    encoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    encoder_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class YanOutput(ModelOutput):
    """
    Output of [`YanForConditionalGeneration`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): The weighted sum of the terms, with `labels`.
        loss_terms (`dict[str, torch.FloatTensor]`, *optional*): The terms before weighting, detached, by the names of
            `LOSS_TERMS`. Without a weight `mmd` is left out, and without one on either, `latent` and `token` are.
        logits (`torch.FloatTensor` of shape `(B, Ly, V)`): Decoded from the end of the solved ODE with `labels`, and
            from the estimated end point without. (With `labels` and no weight on the latent and token terms nothing
            is solved, and the logits come from the estimate too.)
        latents (`torch.FloatTensor` of shape `(B, Ly, d)`, *optional*): With `labels`, the latents that were decoded.
        target_latents (`torch.FloatTensor` of shape `(B, Ly, d)`, *optional*): With `labels`, the targets' latents.
        length_logits (`torch.FloatTensor` of shape `(B, max_position_embeddings)`): Of the target's length; entry `i`
            stands for `i + 1` tokens.
        velocity, expert_fields, gate_logits, encoder_last_hidden_state, hidden_states, attentions, cross_attentions,
            encoder_hidden_states, encoder_attentions: As in [`YanModelOutput`]; with `labels`, at the training time.
    """

    loss: torch.FloatTensor | None = None
    loss_terms: dict[str, torch.FloatTensor] | None = None
    logits: torch.FloatTensor | None = None
    latents: torch.FloatTensor | None = None
    target_latents: torch.FloatTensor | None = None
    length_logits: torch.FloatTensor | None = None
    velocity: torch.FloatTensor | None = None
    expert_fields: torch.FloatTensor | None = None
    gate_logits: torch.FloatTensor | None = None
    encoder_last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    encoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    encoder_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class YanAutoEncodingOutput(ModelOutput):
    """
    Output of [`YanForAutoEncoding`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): The weighted sum of the terms, with `labels`.
        loss_terms (`dict[str, torch.FloatTensor]`, *optional*): The `token`, `mmd` and `l2` terms, detached.
        logits (`torch.FloatTensor` of shape `(B, L, V)`): Token for token; `(N, V)`, those of the `N` labels that
            count, with `sparse_prediction`.
        last_hidden_state (`torch.FloatTensor` of shape `(B, L, d)`): The latents.
        hidden_states, attentions: Of the encoder, when asked for.
    """

    loss: torch.FloatTensor | None = None
    loss_terms: dict[str, torch.FloatTensor] | None = None
    logits: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


__all__ = [
    "YanAutoEncodingOutput",
    "YanFlowConditioning",
    "YanFlowContext",
    "YanFlowOutput",
    "YanModelOutput",
    "YanOutput",
]
