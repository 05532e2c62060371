# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Small models with weights large enough that a wrong path shows, and batches of rows."""

import torch

from yan_hf import YanConfig, YanForConditionalGeneration


# One block of each kind, for tests whose time is that of a compiler.
SHALLOW = {"encoder_layers": 1, "flow_layers": 1, "cross_attention_layers": [0]}


def small_config(**changes) -> YanConfig:
    """A configuration of a few ten thousand parameters; some blocks have no cross-attention."""
    fields = {
        "vocab_size": 60,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "encoder_layers": 2,
        "flow_layers": 3,
        "decoder_layers": 1,
        "cross_attention_layers": [0, 2],
        "num_experts": 4,
        "max_position_embeddings": 24,
        "initializer_range": 0.15,
    }
    return YanConfig(**{**fields, **changes})


def small_model(seed: int = 0, **changes) -> YanForConditionalGeneration:
    """A model in eval mode, the same for the same seed; no bias, norm or query is left at its neutral start."""
    torch.manual_seed(seed)
    model = YanForConditionalGeneration(small_config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name or "query" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def batch_of_rows(lengths: list[int], side: str = "right", extra: int = 0, seed: int = 1, vocab_size: int = 60):
    """Rows of random tokens: a list of `(length,)` tensors, and the same rows padded into one batch."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(5, vocab_size, (length,), generator=generator) for length in lengths]
    width = max(lengths) + extra
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(len(row))
        input_ids[index, place] = row
        attention_mask[index, place] = 1
    return rows, input_ids, attention_mask
