# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`yan-hf export`: write a checkpoint for the research code, or with its code.

Writes a checkpoint in the research layout (a file), or with the code that it needs to be loaded without this package
(a folder). A file that is there is replaced with --overwrite only, and only if it is a research checkpoint.
"""

import argparse
from typing import Any

from ..hub.export import export_with_code
from ..hub.research import export_research_checkpoint
from .common import add_output_folder, naming


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("directory", help="the checkpoint")
    add_output_folder(parser, "file or folder to write")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--to-research", action="store_true", help="in the research layout")
    kind.add_argument("--with-code", action="store_true", help="as a folder with its code, for trust_remote_code=True")


def run(options: argparse.Namespace) -> dict[str, Any]:
    export = export_research_checkpoint if options.to_research else export_with_code
    with naming(options.directory):
        export(options.directory, options.output, options.overwrite)
    return {"output": str(options.output)}
