# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`yan-hf info`: what a checkpoint is."""

import argparse
from typing import Any

from ..hub.info import checkpoint_info
from .common import add_checkpoint, add_json, naming


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command to the command line's."""
    parser = commands.add_parser(
        "info",
        help="what a checkpoint is",
        description="Prints a checkpoint's sizes, configuration, solver steps, routing, dtype and licence. Reads no "
        "weights, only their headers.",
    )
    add_checkpoint(parser)
    add_json(parser)
    return parser


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the command."""
    with naming(options.checkpoint):
        return checkpoint_info(options.checkpoint)
