# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The randomness of `generate`: from a generator, or from one seed for each returned sequence."""

from collections.abc import Callable, Sequence

import numpy as np
import torch


class NoiseSource:
    """
    Draws noise for the positions of a batch of canvases.

    With `seeds`, what a row gets depends on its own seed and length and on nothing else: each row is drawn by itself,
    as long as itself, on the CPU, so that a seed means the same on every device and in every batch.

    Args:
        lengths: Lengths of the canvases, `(R,)`, for returned sequences times their candidates, which lie next to each
            other, times the lengths tried for each of these, which share their seed.
        width: Positions of the widest canvas, `L`.
        generator: Source of the randomness; the global one by default.
        seeds: One seed for each returned sequence. Its first candidate uses the seed itself.
        num_candidates: Candidates for each returned sequence.
        num_lengths: Lengths tried for each candidate.

    Raises:
        ValueError: for seeds that are no integers from 0 to 2⁶³ - 1, or not one for each returned sequence.
    """

    def __init__(
        self,
        lengths: torch.Tensor,
        width: int,
        generator: torch.Generator | None = None,
        seeds: torch.Tensor | list[int] | None = None,
        num_candidates: int = 1,
        num_lengths: int = 1,
    ):
        self.shape = (len(lengths), width)
        self.device = lengths.device
        self.generator = generator
        self.row_generators: list[torch.Generator] | None = None
        if seeds is None:
            return
        if isinstance(seeds, (torch.Tensor, np.ndarray)):
            seeds = seeds.flatten().tolist()
        seeds = list(seeds) if isinstance(seeds, Sequence) else [seeds]
        if not all(isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**63 for seed in seeds):
            raise ValueError(f"`seeds` must be integers from 0 to 2**63 - 1, but are {seeds}.")
        num_sequences = len(lengths) // (num_candidates * num_lengths)
        if len(seeds) != num_sequences:
            raise ValueError(f"`seeds` holds {len(seeds)} seeds for {num_sequences} returned sequences.")
        self.row_lengths = lengths.tolist()
        self.row_generators = [
            torch.Generator().manual_seed(self._candidate_seed(seed, candidate))
            for seed in seeds
            for candidate in range(num_candidates)
            for _ in range(num_lengths)
        ]

    @staticmethod
    def _candidate_seed(seed: int, candidate: int) -> int:
        if candidate == 0:
            return seed
        # Far apart, also for neighbouring seeds.
        return int(np.random.SeedSequence([seed, candidate]).generate_state(1, np.uint64)[0] >> np.uint64(1))

    def draw(
        self, sample: Callable[..., torch.Tensor], *size: int, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """`sample`, `torch.randn` or `torch.rand`, for every position: `(R, L, *size)`, 0 behind a row's canvas."""
        if self.row_generators is None:
            device = self.device if self.generator is None else self.generator.device
            return sample(*self.shape, *size, generator=self.generator, device=device, dtype=dtype).to(self.device)
        noise = torch.zeros(*self.shape, *size, dtype=dtype)
        for row, (length, row_generator) in enumerate(zip(self.row_lengths, self.row_generators)):
            noise[row, :length] = sample(length, *size, generator=row_generator, dtype=dtype)
        return noise.to(self.device)


__all__ = ["NoiseSource"]
