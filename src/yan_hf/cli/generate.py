# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`yan-hf generate`: generate a text for each source.

Reads sources, one a line, or one column of JSON Lines, and writes a JSON line for each text: source, text, length,
length_mode, score. A text does not depend on --batch-size. Rows for --output FILE are gathered in FILE.partial, which
replaces FILE when all are written; until then FILE is untouched. If something fails, --resume goes on behind the last
whole row of FILE.partial, or of FILE where there is none.

With --engine ray, workers share the sources, on the cluster that RAY_ADDRESS names or on this machine, and write the
same texts; with --engine accelerate these are the processes of `accelerate launch -m yan_hf.cli.main generate ...`.
Finished parts are kept in FILE.parts until all are there, which --resume goes on with; a FILE that ends in .parquet is
written as such.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from ..data.files import check_not_input, check_writable, iterate_column
from ..evaluation.evaluate import generate_texts
from .arguments import add_generation_arguments, generation_options
from .common import add_loading, load_with_tokenizer, positive, progress
from .show_experts import expert_lines, is_coloured


def add_arguments(parser: argparse.ArgumentParser):
    add_loading(parser)
    parser.add_argument("--input", default="-", help="text or .jsonl file, .gz or not; - is standard input (default)")
    parser.add_argument("--column", help="the column that holds the sources (JSON Lines)")
    parser.add_argument("--output", default="-", help="file to write; - is standard output (default)")
    parser.add_argument("--resume", action="store_true", help="keep the rows of an earlier run, and add the others")
    parser.add_argument("--mask-marker", help="what stands for a mask, such as '<mask>' (default: nothing)")
    parser.add_argument("--special-tokens", action="store_true", help="special tokens in a source act as such")
    parser.add_argument("--batch-size", type=positive, default=32, help="rows at once (default: %(default)s)")
    parser.add_argument(
        "--show-experts",
        action="store_true",
        help="print every solver step's draft with a colour for each expert instead of JSON; with --output, rows hold "
        "them as `steps`: for each step, tokens and their experts",
    )
    parser.add_argument(
        "--engine", choices=["local", "ray", "accelerate"], default="local", help="default: %(default)s"
    )
    parser.add_argument("--workers", type=positive, default=1, help="of ray, models (default: %(default)s)")
    parser.add_argument(
        "--part-size", type=positive, default=256, help="of ray and accelerate, sources (default: %(default)s)"
    )
    add_generation_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="another one draws other texts (default: %(default)s)")


def run(options: argparse.Namespace):
    if options.engine != "local":
        return _run_by_parts(options)
    partial, sources = _check_output(options), _sources(options)
    model, tokenizer = load_with_tokenizer(options)
    copies = options.num_return_sequences or model.generation_config.num_return_sequences or 1
    done = _resume(partial, sources, copies) if options.resume else 0
    name, choices = _input_name(options), _choices(options)
    rows = generate_texts(model, tokenizer, sources, first=done + 1, **choices)
    shown = options.show_experts and options.output == "-"
    with _output(options.output, partial) as file:
        # What is written stays if a later source is refused.
        has_rows = done > 0
        for row in progress(rows, options, "generating", " texts"):
            lines = expert_lines(row, is_coloured()) if shown else [json.dumps(row, ensure_ascii=False)]
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            has_rows = True
        if not has_rows:
            raise ValueError(f"{name} holds no sources.")  # as of a command that failed before a pipe


def _run_by_parts(options: argparse.Namespace):
    if options.output == "-" or options.show_experts:
        options.error(f"--engine {options.engine} needs --output with a file, and has no --show-experts")
    if options.engine == "accelerate" and options.input == "-":
        options.error("--engine accelerate needs --input with a file, which every process reads")
    from ..serving.batch import generate_file

    check_not_input(Path(options.output), options.input)
    model, _ = load_with_tokenizer(options)  # so that what is wrong with a checkpoint is said here
    device = model.device.type
    del model
    places = {name: getattr(options, name) for name in ("engine", "workers", "dtype", "part_size", "resume")}
    places |= {"device": device, "progress": not options.json}
    generate_file(options.checkpoint, list(_sources(options)), options.output, **places, **_choices(options))


def _input_name(options: argparse.Namespace) -> str:
    return "Standard input" if options.input == "-" else options.input


def _choices(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `generate_texts`."""
    choices = {name: getattr(options, name) for name in ("batch_size", "seed", "mask_marker")}
    choices["split_special_tokens"] = not options.special_tokens
    choices["where"] = f"{_input_name(options)}, source"
    choices["with_steps"] = options.show_experts
    return {**choices, **generation_options(options)}


def _sources(options: argparse.Namespace) -> Iterator[str]:
    """Sources, lazily; an empty line of a text is an error later, which names its number."""
    path = None if options.input == "-" else Path(options.input)
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    return (text.rstrip("\r\n") for text in iterate_column(path, options.column))


def _check_output(options: argparse.Namespace) -> Path | None:
    """The file that rows are gathered in; `None` where they are written as they come."""
    path = Path(options.output)
    if options.output == "-" or (path.exists() and not path.is_file() and not path.is_dir()):
        if options.resume:
            options.error("--resume needs --output with the file of the earlier run")
        return None  # standard output, a pipe or a device
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; --output names a file.")
    path = path.resolve()  # the file that a link names
    partial = path.with_name(f"{path.name}.partial")
    inputs = [*Path(options.checkpoint).glob("*"), None if options.input == "-" else options.input]
    if options.input == "-":
        with contextlib.suppress(OSError, ValueError):  # what stands in for standard input may be no file
            inputs[-1] = sys.stdin.fileno()
    for output in (path, partial):
        check_not_input(output, *inputs)
        check_writable(output)
    if partial.exists() and not options.resume:
        raise FileExistsError(f"{partial} holds the rows of an unfinished run: go on with --resume, or delete it.")
    return partial


def _resume(partial: Path, sources: Iterator[str], copies: int) -> int:
    """
    Cuts a file of rows behind the last source whose rows are whole, and takes their sources off the others. Returns
    their number. Raises `ValueError` for rows that were not written for these sources.
    """
    written, ends = [], [0]
    earlier = partial if partial.exists() else partial.with_suffix("")
    with earlier.open("rb") if earlier.exists() else contextlib.nullcontext([]) as file:
        for line in file:
            if not line.endswith(b"\n"):
                break  # the last one, cut short
            try:
                source = json.loads(line)["source"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{earlier}, row {len(ends)}, is no row of this command: --resume stops.") from error
            written.append(source)
            ends.append(ends[-1] + len(line))
    done = len(written) // copies
    for number in range(done):
        source = next(sources, None)
        if written[number * copies : (number + 1) * copies] != [source] * copies:
            raise ValueError(
                f"{earlier} was not written for these sources: at source {number + 1} it has "
                f"{written[number * copies]!r:.80}, the input {source!r:.80}. --resume needs the input, and the "
                "number of texts for each source, of the first run."
            )
    if earlier != partial and earlier.exists():
        shutil.copyfile(earlier, partial)
    if partial.exists():
        os.truncate(partial, ends[done * copies])
    return done


@contextlib.contextmanager
def _output(name: str, partial: Path | None) -> Iterator[TextIO]:
    """Standard output, a device, or the partial file, which becomes the output if the block ends without an error."""
    if partial is None:
        with contextlib.nullcontext(sys.stdout) if name == "-" else open(name, "w", encoding="utf-8") as file:
            yield file
        return
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("a", encoding="utf-8") as file:
            yield file
    except BaseException as error:
        if partial.stat().st_size == 0:
            partial.unlink()
        elif isinstance(error, Exception):
            raise ValueError(f"{error} The rows before it are in {partial}; --resume goes on behind them.") from error
        raise
    os.replace(partial, partial.with_suffix(""))
