# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""How the best of several candidates for one returned sequence is chosen."""

from collections import Counter

import torch


RERANKERS = ("score", "joint", "cycle", "mbr")


def cycle_distance(latents: torch.Tensor, encoded: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """
    How far the latents that were written are from those of the text that was read off them.

    Args:
        latents: The ODE's end, `(R, L, d)`.
        encoded: The encoder's latents of the tokens, `(R, L, d)`.
        kept: Positions of the text, `(R, L)`.

    Returns:
        Mean over the text's positions of the mean squared difference, `(R,)`, float32.
    """
    difference = (latents.float() - encoded.float()).square().mean(dim=-1) * kept
    return difference.sum(dim=-1) / kept.sum(dim=-1).clamp(min=1)


def token_f1(first: list[int], second: list[int]) -> float:
    """F1 of two texts as bags of tokens; 1 for two empty texts."""
    if not first or not second:
        return float(first == second)
    common = sum((Counter(first) & Counter(second)).values())
    return 2 * common / (len(first) + len(second))


def consensus(texts: list[list[int]]) -> list[float]:
    """Mean token F1 of each candidate with the others: the utility of minimum Bayes risk decoding."""
    if len(texts) == 1:
        return [1.0]
    similarity = [[0.0] * len(texts) for _ in texts]
    for row, first in enumerate(texts):
        for column in range(row):
            similarity[row][column] = similarity[column][row] = token_f1(first, texts[column])
    return [sum(row) / (len(texts) - 1) for row in similarity]


def best_candidates(utility: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """
    The row of the best candidate of each returned sequence.

    Args:
        utility: Higher is better, `(B, c)`. Among equal ones the higher score wins, then the first.
        scores: Mean log-probabilities, `(B, c)`.

    Returns:
        Indices into the `B · c` rows, `(B,)`.
    """
    is_best = utility == utility.amax(dim=-1, keepdim=True)
    choice = scores.masked_fill(~is_best, -torch.inf).argmax(dim=-1)
    return choice + utility.shape[1] * torch.arange(len(choice), device=choice.device)


__all__ = ["RERANKERS", "best_candidates", "consensus", "cycle_distance", "token_f1"]
