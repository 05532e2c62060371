# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
How often a row's tokens depend on its batch, with `seeds`, in each precision.

A seed fixes a row's noise, but not the rounding of matrix products, which differs with their shapes. Each row is
generated alone and in batches with other rows and padding, by models with random weights; counted are the rows whose
tokens are the same. Trained models have clearer choices, and fewer differences.

    python benchmarks/seeds_half_precision.py --output benchmarks/results/seeds_half_precision.json
"""

import argparse
import json
from pathlib import Path

import torch
from report import save
from tqdm import tqdm

from yan_hf import YanConfig, YanForConditionalGeneration


def random_model(seed: int, hidden_size: int, vocab_size: int) -> YanForConditionalGeneration:
    torch.manual_seed(seed)
    config = YanConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_attention_heads=hidden_size // 32,
        encoder_layers=4,
        flow_layers=4,
        decoder_layers=2,
        num_experts=4,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    return YanForConditionalGeneration(config).eval()


def same_rows(model: YanForConditionalGeneration, batch_size: int, target_length: int, seed: int) -> list[float]:
    """The share of equal tokens of each row of one batch: alone, and with the other rows and padding on the left."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 33, (batch_size,), generator=generator).tolist()
    ids = torch.zeros(batch_size, 40, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(5, model.config.vocab_size, (length,), generator=generator)
        mask[row, -length:] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    seeds = list(range(batch_size))
    batched = model.generate(ids, mask, target_lengths=target_length, seeds=seeds)
    shares = []
    for row, length in enumerate(lengths):
        single = model.generate(ids[row : row + 1, -length:], target_lengths=target_length, seeds=seeds[row : row + 1])
        shares.append(float((single[0] == batched[row]).float().mean()))
    return shares


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=8_000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--target-length", type=int, default=32)
    parser.add_argument("--models", type=int, default=5, help="random models, each with one batch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    results = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        shares = []
        for seed in tqdm(range(options.models), desc=str(dtype)):
            model = random_model(seed, options.hidden_size, options.vocab_size).to(options.device, dtype)
            shares += same_rows(model, options.batch_size, options.target_length, seed)
        results[str(dtype).removeprefix("torch.")] = {
            "rows": len(shares),
            "rows_with_identical_tokens": sum(share == 1 for share in shares) / len(shares),
            "identical_tokens": sum(shares) / len(shares),
        }
    print(json.dumps(results, indent=2))
    if options.output:
        settings = {name: value for name, value in vars(options).items() if name != "output"}
        save(options.output, {"settings": settings, "results": results})


if __name__ == "__main__":
    main()
