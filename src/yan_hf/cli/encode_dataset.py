# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`yan-hf encode-dataset`: run a frozen pretrained encoder over a task's rows, once.

Writes the tokenized rows with the encoder's states to a folder that `datasets.load_from_disk` reads. Training on them
does not run the encoder. Only for checkpoints made by `from_encoder_pretrained`. The folder must be new or empty:
nothing is replaced.
"""

import argparse
from pathlib import Path
from typing import Any

from ..data.checks import check_vocabulary
from ..data.files import check_output_folder
from ..saving import staged_save
from .arguments import add_task_arguments, task_examples
from .common import add_loading, load_with_tokenizer, positive


def add_arguments(parser: argparse.ArgumentParser):
    add_loading(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder to write, new or empty")
    add_task_arguments(parser, split="train")
    parser.add_argument("--batch-size", type=positive, default=64, help="rows at once (default: %(default)s)")
    kinds = ("float32", "float16")
    parser.add_argument("--state-dtype", choices=kinds, default="float32", help="of the states (default: %(default)s)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from ..data.states import encode_dataset  # slow to import

    check_output_folder(options.output)
    model, tokenizer = load_with_tokenizer(options)
    check_vocabulary(tokenizer, model)
    examples, skipped, _ = task_examples(options, model, tokenizer)
    encoded = encode_dataset(model, examples, options.batch_size, options.state_dtype)
    with staged_save(options.output) as folder:
        encoded.save_to_disk(str(folder))
    size = sum(path.stat().st_size for path in options.output.iterdir())
    return {"output": str(options.output), "rows": len(encoded), "skipped_rows": skipped, "bytes": size}
