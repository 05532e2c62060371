# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The model classes that the training and parallelism tests run, importable by the processes that they start.

Those tests compare two runs of one loss, so the loss has to draw the same numbers in both.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from yan_hf import YanConfig, YanForAutoEncoding, YanForConditionalGeneration


class Seeded:
    """Draws what a training loss draws (times, noise, experts, the MMD's points) from a fixed seed."""

    def forward(self, *args: Any, **kwargs: Any):
        if self.training:
            kwargs.setdefault("generator", torch.Generator(self.device).manual_seed(0))
        return super().forward(*args, **kwargs)


class SeededYan(Seeded, YanForConditionalGeneration):
    def generate(self, input_ids: torch.Tensor, max_new_tokens: int, **kwargs: Any):
        """The length is given, the draws are seeded, and there is no cache to be used."""
        kwargs.pop("use_cache")
        return super().generate(input_ids, target_lengths=max_new_tokens, seeds=range(len(input_ids)), **kwargs)


class SeededAutoEncoding(Seeded, YanForAutoEncoding):
    pass


class TrainableYan(SeededYan):
    """Without `generate`, which the overfitting test would ask to continue a prompt."""

    generate = property()


class RankConfig:
    """Makes the configuration in a rank; unpickling it imports this module, and so registers the classes there."""

    model_class = SeededYan

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> YanConfig:
        AutoModelForCausalLM.register(YanConfig, cls.model_class, exist_ok=True)
        return YanConfig.from_dict(fields)


class AutoEncodingRankConfig(RankConfig):
    model_class = SeededAutoEncoding
