# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The options of `generate` as arguments of the command line, made from their table."""

import argparse
import ast
from functools import partial
from typing import Any

from ..generation_config_yan import BOOLEAN, OPTIONS, Option


def add_generation_arguments(parser: argparse.ArgumentParser, *left_out: str):
    """Adds `--num-inference-steps` and so on, for every option that makes sense on a command line."""
    about = "Options left out are the checkpoint's. A list is written '[0, 0.2, 1]'."
    group = parser.add_argument_group("generation", about)
    for name, option in OPTIONS.items():
        if not option.command_line or name in left_out:
            continue
        flags = [f"--{name.replace('_', '-')}", *(["--steps"] if name == "num_inference_steps" else [])]
        text = option.help.replace("%", "%%")
        if option.check is BOOLEAN:
            group.add_argument(*flags, action=argparse.BooleanOptionalAction, help=text)
            continue
        text += f" ({option.check.accepts})" if option.check else ""
        group.add_argument(*flags, type=partial(_parse, option), metavar="VALUE", help=text)


def _parse(option: Option, text: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):  # a name
        value = text
    if value is None or (option.check and not option.check.holds(value)):
        raise argparse.ArgumentTypeError(f"must be {option.check.accepts if option.check else 'set'}, but is {text}")
    return value


def generation_options(options: argparse.Namespace) -> dict[str, Any]:
    """Those that were given, as keyword arguments of `generate`."""
    return {name: value for name in OPTIONS if (value := getattr(options, name, None)) is not None}
