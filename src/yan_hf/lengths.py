# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The lengths of the canvases that `generate` writes on: predicted by the length head, or given."""

import torch
from transformers.configuration_utils import PreTrainedConfig

from .validation import check_finite


def predicted_lengths(
    logits: torch.Tensor, config: PreTrainedConfig, num_sequences: int, given_width: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The likeliest lengths within the limits.

    Args:
        logits: Of the length head, `(B, max_position_embeddings)`; entry `i` stands for `i + 1` tokens.
        config: A resolved [`YanGenerationConfig`].
        num_sequences: Rows that each source gets before its length candidates: samples times candidates.
        given_width: Positions that fixed latents or experts hold.

    Returns:
        Lengths `(B · num_sequences, m)`, the likeliest first, and their log-probabilities among the allowed ones; `m`
        is `num_length_candidates`, or as many as the limits allow.

    Raises:
        ValueError: for limits that leave no length, and logits that are not finite.
    """
    longest = config.max_new_tokens if given_width is None else min(config.max_new_tokens, given_width)
    if config.min_new_tokens > longest:
        raise ValueError(
            f"`min_new_tokens={config.min_new_tokens}` is more than the {longest} positions that `initial_latents` or "
            "`expert_indices` hold."
        )
    logits = logits.float()
    check_finite("length_logits", logits)
    allowed = logits[:, config.min_new_tokens - 1 : longest]
    order = allowed.argsort(dim=-1, descending=True, stable=True)
    order = order[:, : config.num_length_candidates]
    log_probs = allowed.log_softmax(dim=-1).gather(1, order)
    lengths = (order + config.min_new_tokens + config.length_slack).clamp(max=longest)
    return lengths.repeat_interleave(num_sequences, dim=0), log_probs.repeat_interleave(num_sequences, dim=0)


def given_lengths(
    target_lengths: int | list[int] | torch.Tensor,
    config: PreTrainedConfig,
    table_size: int,
    batch_size: int,
    device: torch.device,
    num_sequences: int,
    given_width: int | None = None,
) -> torch.Tensor:
    """
    Checks the lengths that the caller knows: an integer, or one for each source.

    Returns:
        Lengths `(B · num_sequences, 1)`.

    Raises:
        ValueError: for lengths that are no integers, not one for each row, outside the position table or the fixed
            latents, or together with options that choose among predicted lengths.
    """
    for name, neutral in (("num_length_candidates", 1), ("length_slack", 0)):
        if getattr(config, name) != neutral:
            raise ValueError(
                f"`{name}={getattr(config, name)}` chooses among predicted lengths, but `target_lengths` gives them."
            )
    try:
        lengths = torch.as_tensor(target_lengths, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"`target_lengths` must be integers, but are {target_lengths!r}.") from error
    if lengths.is_floating_point() or lengths.dtype == torch.bool or lengths.dim() > 1:
        raise ValueError("`target_lengths` must be an integer or a 1-D integer tensor, one length for each row.")
    if lengths.dim() == 1 and len(lengths) != batch_size:
        raise ValueError(f"`target_lengths` holds {len(lengths)} lengths for a batch of {batch_size} rows.")
    lengths = lengths.long().expand(batch_size)
    shortest, width = torch.stack([lengths.min(), lengths.max()]).tolist()
    if shortest < 1 or width > table_size:
        raise ValueError(
            f"`target_lengths` must be in 1 to `max_position_embeddings={table_size}`, but reach from {shortest} to "
            f"{width}."
        )
    if given_width is not None and width > given_width:
        raise ValueError(
            f"`target_lengths` reach {width}, but `initial_latents` or `expert_indices` hold {given_width} positions."
        )
    return lengths.repeat_interleave(num_sequences, dim=0)[:, None]


__all__ = ["given_lengths", "predicted_lengths"]
