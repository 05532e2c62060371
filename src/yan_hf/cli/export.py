# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`yan-hf export`: write a checkpoint for the research code, with its code, or for ONNX Runtime.

Writes a checkpoint in the research layout (a file), or with the code that it needs to be loaded without this package,
or as ONNX (folders). A file that is there is replaced with --overwrite only, and only if it is a research checkpoint.
"""

import argparse
from typing import Any

from ..hub.export import export_to_onnx, export_with_code
from ..hub.research import export_research_checkpoint
from .common import add_output_folder, naming, positive


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("directory", help="the checkpoint")
    add_output_folder(parser, "file or folder to write")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--to-research", action="store_true", help="in the research layout")
    kind.add_argument("--with-code", action="store_true", help="as a folder with its code, for trust_remote_code=True")

    kind.add_argument("--onnx", action="store_true", help="as ONNX programs, for yan_hf.inference.onnx.OnnxYan")
    help = "of --onnx, which fixes them (default: the checkpoint's)"
    parser.add_argument("--num-inference-steps", type=positive, help=help)


def run(options: argparse.Namespace) -> dict[str, Any]:
    arguments, steps = (options.directory, options.output, options.overwrite), options.num_inference_steps
    if steps is not None and not options.onnx:
        raise ValueError("--num-inference-steps belongs to --onnx: other exports leave the number of steps open.")
    with naming(options.directory):
        if options.onnx:
            export_to_onnx(*arguments, num_inference_steps=steps)
        else:
            (export_research_checkpoint if options.to_research else export_with_code)(*arguments)
    return {"output": str(options.output)}
