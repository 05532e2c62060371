# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The command line, `yan-hf`: one module a command."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module


# Modules of this room, each with `add_arguments` and `run`; their docstrings are the help.
COMMANDS = (
    "train_tokenizer",
    "convert",
    "export",
    "info",
    "encode_dataset",
    "generate",
    "evaluate",
    "benchmark",
    "serve",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Returns 0, or 1 if it failed, with one line on standard error; bad arguments exit with 2."""
    # Not Transformers' HfArgumentParser, as in the examples: behind `--json` it takes positional arguments for values.
    parser = argparse.ArgumentParser(
        prog="yan-hf",
        description="Tools for YAN checkpoints.",
        epilog="A failure is one line; with YAN_HF_TRACEBACK=1 in the environment its traceback follows.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = import_module(f".{name}", __package__)
        summary, _, text = (module.__doc__ or "").partition("\n\n")
        help = summary.partition(": ")[2].rstrip(".")
        command = commands.add_parser(name.replace("_", "-"), help=help, description=text)
        command.add_argument("--json", action="store_true", help="print results as JSON, and no progress bar")
        module.add_arguments(command)
        command.set_defaults(run=module.run, error=command.error)
    options = parser.parse_args(arguments)
    try:
        result = options.run(options)
    except BrokenPipeError:  # whatever took the output has seen enough; nothing may be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"yan-hf {options.command}: interrupted", file=sys.stderr)
        return 1
    except Exception as error:
        # Errors that are foreseen explain themselves; of others the type says more than the message.
        foreseen = isinstance(error, (OSError, ValueError, RuntimeError, ImportError)) and str(error)
        message = str(error) if foreseen else f"{type(error).__name__} {error}"
        print(f"yan-hf {options.command}: {' '.join(message.split())}", file=sys.stderr)
        if os.environ.get("YAN_HF_TRACEBACK"):
            raise
        return 1
    if result is not None:  # otherwise the command's output is what it wrote
        print(json.dumps(result) if options.json else "\n".join(f"{name}: {result[name]}" for name in result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
