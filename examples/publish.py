# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Makes a small folder to publish of a trained checkpoint: weights in bfloat16, tokenizer, card, and the code.

    python examples/publish.py --model runs/restoration --output checkpoints/restoration \\
        --card examples/configs/restoration_card.yaml --results benchmarks/results/rewriting/restoration.json

The weights are rounded to bfloat16 and load as float32. `--int8_grid` first rounds them to what `YanInt8Config` keeps,
so that the checkpoint writes nearly the same texts in 8 bits; measure its quality again. `--link_code` links the code
to this repository's, as in `checkpoints/`; by default it is copied, as the Hub wants it.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import mapping
from huggingface_hub import ModelCardData
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, HfArgumentParser

import yan_hf
from yan_hf import YanConfig, YanGenerationConfig
from yan_hf.configuration_yan import AUTO_MAP
from yan_hf.data.files import check_output_folder
from yan_hf.hub.model_card import create_model_card, save_card
from yan_hf.inference.int8 import round_to_int8


@dataclass
class Options:
    """What to publish."""

    model: Path = field(metadata={"help": "the trained checkpoint"})
    output: Path = field(metadata={"help": "the folder to write"})
    card: Path = field(metadata={"help": "YAML file with the texts of the card and its `card_data`"})
    results: Path | None = field(
        default=None, metadata={"help": "result file of benchmarks/rewriting.py, for the card"}
    )
    size: int = field(default=64, metadata={"help": "paragraphs of which size the card's metrics are of"})
    generation: str | None = field(default=None, metadata={"help": "generation options to save, as JSON"})
    overwrite: bool = field(default=False, metadata={"help": "replace the files of a checkpoint that is there"})
    int8_grid: bool = field(default=False, metadata={"help": "round the weights to those that 8 bits hold"})
    link_code: bool = field(default=False, metadata={"help": "link the code instead of copying it"})


def card_rows(results: Path, size: int) -> list[dict]:
    """YAN's rows of a result file as a card has them."""
    rows = json.loads(results.read_text())["rows"]
    steps = ((row, row["system"].removeprefix("yan-")) for row in rows if row["size"] == size)
    return [{**row, "lengths": "predicted", "steps": int(number)} for row, number in steps if number.isdigit()]


def main():
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    check_output_folder(options.output, options.overwrite)
    model = AutoModelForSeq2SeqLM.from_pretrained(options.model).eval()
    changed = {**model.generation_config.to_dict(), **mapping(options.generation)}
    model.generation_config = YanGenerationConfig.from_dict(changed)  # refuses what is no option
    model.config.auto_map = dict(AUTO_MAP)
    if options.int8_grid:
        round_to_int8(model)
    model.to(torch.bfloat16).save_pretrained(options.output)
    # Rounded weights, but arithmetic in float32, in which a text does not change with its batch.
    config = YanConfig.from_pretrained(options.output)
    config.dtype = torch.float32
    config.save_pretrained(options.output)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.output)
    if options.link_code:
        source = Path(yan_hf.__file__).parent
        for path in options.output.glob("*.py"):
            path.unlink()
            path.symlink_to(os.path.relpath(source / path.name, options.output))
    texts = mapping(options.card.read_text())
    card_data = ModelCardData(**texts.pop("card_data"))
    results = card_rows(options.results, options.size) if options.results else []
    save_card(create_model_card(model, card_data, results, split="test", **texts), options.output)
    size = sum(path.stat().st_size for path in options.output.iterdir() if not path.is_symlink())
    print(f"{options.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
