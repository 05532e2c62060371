# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`yan-hf export`: a checkpoint for the research code, or with its code."""

import argparse
from typing import Any

from ..hub.export import export_with_code
from ..hub.research import export_research_checkpoint
from .common import FOLDER_HELP, add_json, add_output_folder, naming


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command to the command line's."""
    parser = commands.add_parser(
        "export",
        help="write a checkpoint for the research code, or with its code",
        description="Writes a checkpoint in the research layout (a file), or with the code that it needs to be loaded "
        f"without this package (a folder). {FOLDER_HELP} A file that is there is replaced with --overwrite only, and "
        "only if it is a research checkpoint.",
    )
    parser.add_argument("directory", help="the checkpoint")
    add_output_folder(parser, "file or folder to write")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--to-research", action="store_true", help="in the research layout")
    kind.add_argument("--with-code", action="store_true", help="as a folder with its code, for trust_remote_code=True")
    add_json(parser)
    return parser


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the command."""
    export = export_research_checkpoint if options.to_research else export_with_code
    with naming(options.directory):
        export(options.directory, options.output, options.overwrite)
    return {"output": str(options.output)}
