# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`yan-hf info`: what a checkpoint is.

Prints a checkpoint's sizes, configuration, solver steps, routing, dtype and licence. Reads no weights, only their
headers.
"""

import argparse
from typing import Any

from ..hub.info import checkpoint_info
from .common import naming


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("checkpoint", help="its folder")


def run(options: argparse.Namespace) -> dict[str, Any]:
    with naming(options.checkpoint):
        return checkpoint_info(options.checkpoint)
