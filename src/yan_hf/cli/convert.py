# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`yan-hf convert`: read a checkpoint of the research code.

Converts a checkpoint of the research code to a folder for from_pretrained.
"""

import argparse
from pathlib import Path
from typing import Any

from ..hub.research import convert_research_checkpoint
from .common import add_output_folder, naming


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--checkpoint", type=Path, required=True, help="the research file")
    add_output_folder(parser)
    parser.add_argument("--tokenizer", help="the tokenizer's folder, saved beside the model")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: the file's")


def run(options: argparse.Namespace) -> dict[str, Any]:
    with naming(options.checkpoint):
        model = convert_research_checkpoint(
            options.checkpoint, options.output, options.tokenizer, options.dtype, options.overwrite
        )
    sizes = {"parameters": model.num_parameters(), "dtype": str(model.dtype).removeprefix("torch.")}
    return {"output": str(options.output), "model": type(model).__name__, **sizes}
