# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The commands of `yan-hf` that look at a trained checkpoint: info, generate, evaluate, benchmark."""

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, TextIO

from ..data.files import check_not_input, iterate_column


Result = dict[str, Any] | None
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_commands(commands: Any, positive: Callable[[str], int]):
    """Adds the parsers to the command line's; `positive` is its type for counts."""
    parser = commands.add_parser(
        "info",
        help="what a checkpoint is",
        description="Prints a checkpoint's sizes, configuration, solver steps, routing, dtype and licence. Reads no "
        "weights, only their headers.",
    )
    _checkpoint(parser)
    parser.set_defaults(run=_info)

    parser = commands.add_parser(
        "generate",
        help="write a text for each source",
        description="Reads sources, one a line, or one column of JSON Lines, and writes a JSON line for each text: "
        "source, text, length, length_mode, score. A text does not depend on --batch-size. Rows for --output FILE are "
        "gathered in FILE.partial, which replaces FILE when all are written; until then FILE is untouched. If "
        "something fails, --resume goes on behind the last whole row of FILE.partial, or of FILE where there is none.",
    )
    _checkpoint(parser, "no progress bar; the output is JSON Lines in any case")
    parser.add_argument("--input", default="-", help="text or .jsonl file, .gz or not; - is standard input (default)")
    parser.add_argument("--column", help="the column that holds the sources (JSON Lines)")
    parser.add_argument("--output", default="-", help="file to write; - is standard output (default)")
    parser.add_argument("--resume", action="store_true", help="keep the rows of an earlier run, and write the others")
    parser.add_argument(
        "--mask-marker", help="what stands for a mask in the sources, such as '<mask>'; default: nothing"
    )
    parser.add_argument(
        "--special-tokens", action="store_true", help="special tokens that a source spells out act as such"
    )
    _sampling(parser, positive, batch_size=32)
    parser.add_argument("--num-return-sequences", type=positive, help="texts for each source")
    parser.add_argument("--num-candidates", type=positive, help="samples of which the best is kept")
    parser.add_argument("--seed", type=int, default=0, help="another one draws other texts (default: %(default)s)")
    parser.set_defaults(run=_generate, error=parser.error)

    parser = commands.add_parser(
        "evaluate",
        help="measure a checkpoint on a task's rows",
        description="Metrics with predicted and with true lengths, means over sampling seeds, one row for each number "
        "of solver steps.",
    )
    _checkpoint(parser)
    parser.add_argument("--file", help="JSON Lines (.gz or not), CSV or Parquet file")
    parser.add_argument("--dataset", help="name for datasets.load_dataset, instead of a file")
    parser.add_argument("--dataset-config", help="its configuration")
    parser.add_argument("--split", default="test", help="its split (default: %(default)s)")
    parser.add_argument("--task", default="pairs", help="the task's name (default: %(default)s: source and target)")
    parser.add_argument("--columns", type=_mapping, help='where they differ, as JSON: {"text": "sentence"}')
    parser.add_argument("--class-names", nargs="+", help="names of the classes, in order")
    parser.add_argument("--mask-marker", help="what stands for a mask in the rows, such as '<mask>'; default: nothing")
    parser.add_argument("--add-mask", action="store_true", help="put a mask token behind sources that have none")
    parser.add_argument("--mask-first", action="store_true", help="with --add-mask: in front of them instead")
    parser.add_argument("--space-in-target", action="store_true", help="the space before a mask belongs to the target")
    parser.add_argument("--max-sentences", type=positive, help="only the first sentences of a story")
    parser.add_argument("--max-source-length", type=positive, help="longer sources are cut")
    parser.add_argument("--max-rows", type=positive, help="use only the first rows")
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave unusable rows out instead of stopping")
    parser.add_argument("--metrics", nargs="+", default=["exact_match", "f1"], help="of exact_match, f1, rouge")
    parser.add_argument("--seeds", type=positive, default=3, help="sampling seeds (default: %(default)s)")
    parser.add_argument("--length-modes", nargs="+", default=["predicted", "true"], choices=("predicted", "true"))
    _sampling(parser, positive, batch_size=64, several_steps=True)
    parser.set_defaults(run=_evaluate)

    parser = commands.add_parser(
        "benchmark",
        help="measure a checkpoint's speed",
        description="Latency and tokens per second of generate on random sources, with the target's length given; "
        "the median of several rounds after a warm-up.",
    )
    _checkpoint(parser)
    parser.add_argument("--source-length", type=positive, help="tokens (default: 64, or all that fit)")
    parser.add_argument("--lengths", type=positive, nargs="+", default=[16, 64], help="target tokens")
    parser.add_argument("--batch-sizes", type=positive, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--compile", action="store_true", help="the compiled fast path")
    parser.add_argument("--steps", type=positive, help="solver steps (default: the checkpoint's)")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of the weights (default: the checkpoint's)")
    parser.set_defaults(run=_benchmark)


def _checkpoint(parser: argparse.ArgumentParser, json_help: str = "print the result as JSON"):
    parser.add_argument("checkpoint", help="its folder, or for commands that load it, its name on the Hub")
    parser.add_argument("--json", action="store_true", help=json_help)


def _sampling(parser: argparse.ArgumentParser, positive: Callable[[str], int], batch_size: int, several_steps=False):
    many = {"nargs": "+"} if several_steps else {}
    parser.add_argument("--steps", type=positive, help="solver steps (default: the checkpoint's)", **many)
    parser.add_argument("--batch-size", type=positive, default=batch_size, help="rows at once (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=positive, help="longest target (default: the checkpoint's)")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of the weights (default: the checkpoint's)")


def _mapping(text: str) -> dict[str, str]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, but is {text}")
    return value


@contextlib.contextmanager
def naming(name: str | Path) -> Iterator[None]:
    """Makes errors in the block begin with what they are about; those of the system name their file themselves."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or str(error).startswith(str(name)):
            raise
        raise ValueError(f"{name}: {str(error) or type(error).__name__}") from error


def load_checkpoint(options: argparse.Namespace) -> tuple[Any, Any]:
    """Model in eval mode on its device, and tokenizer (`None` where the checkpoint has none)."""
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
    from transformers.utils import cached_file, logging

    logging.disable_progress_bar()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"--device {device} cannot be used here: {str(error).splitlines()[0]}. Name another one, such as cpu."
        ) from error
    with naming(options.checkpoint):
        model = AutoModelForSeq2SeqLM.from_pretrained(options.checkpoint, dtype=options.dtype).eval().to(device)
        logging.enable_progress_bar()
        found = cached_file(options.checkpoint, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False)
        return model, AutoTokenizer.from_pretrained(options.checkpoint) if found else None


def _with_tokenizer(options: argparse.Namespace) -> tuple[Any, Any]:
    model, tokenizer = load_checkpoint(options)
    if tokenizer is None:
        raise FileNotFoundError(
            f"{options.checkpoint} has no tokenizer: save one there with tokenizer.save_pretrained(...)."
        )
    return model, tokenizer


def _info(options: argparse.Namespace) -> Result:
    from ..hub.info import checkpoint_info

    with naming(options.checkpoint):
        return checkpoint_info(options.checkpoint)


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
    if partial.exists() and not options.resume:
        raise FileExistsError(
            f"{partial} holds the rows of a run that was not finished: go on with --resume, or delete it."
        )
    return partial


def _resume(partial: Path, sources: Iterator[str], copies: int) -> int:
    """
    Cuts a file of rows behind the last source whose rows are whole, and takes their sources off the others.

    Returns:
        Their number.

    Raises:
        ValueError: for rows that were not written for these sources.
    """
    written, ends = [], [0]
    if not partial.exists() and partial.with_suffix("").exists():
        shutil.copyfile(partial.with_suffix(""), partial)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("a+b") as file:
        file.seek(0)
        for line in file:
            try:
                source = json.loads(line)["source"]
            except (ValueError, KeyError, TypeError) as error:
                if line.endswith(b"\n"):
                    raise ValueError(
                        f"{partial}, row {len(ends)}, is no row of this command: --resume stops."
                    ) from error
                break  # the last one, cut short
            if not line.endswith(b"\n"):
                break
            written.append(source)
            ends.append(ends[-1] + len(line))
        done = len(written) // copies
        for number in range(done):
            source = next(sources, None)
            if written[number * copies : (number + 1) * copies] != [source] * copies:
                raise ValueError(
                    f"{partial} was not written for these sources: at source {number + 1} it has "
                    f"{written[number * copies][:80]!r}, the input {source!r:.80}. --resume needs the input, and the "
                    "number of texts for each source, of the first run."
                )
        file.truncate(ends[done * copies])
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


def _generate(options: argparse.Namespace) -> Result:
    from transformers.utils.logging import tqdm

    from ..evaluation.evaluate import generate_texts

    partial, sources = _check_output(options), _sources(options)
    model, tokenizer = _with_tokenizer(options)
    names = ("max_new_tokens", "num_return_sequences", "num_candidates")
    choices = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.steps is not None:
        choices["num_inference_steps"] = options.steps
    copies = options.num_return_sequences or model.generation_config.num_return_sequences or 1
    done = _resume(partial, sources, copies) if options.resume else 0
    rows = generate_texts(
        model,
        tokenizer,
        sources,
        options.batch_size,
        options.seed,
        options.mask_marker,
        not options.special_tokens,
        done + 1,
        "Standard input, source" if options.input == "-" else f"{options.input}, source",
        **choices,
    )
    with _output(options.output, partial) as file:
        # Quiet where standard error is no terminal; what is written stays if a later source is refused.
        for row in tqdm(rows, desc="writing", unit=" texts", file=sys.stderr, disable=options.json or None):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
    return None


def _evaluate(options: argparse.Namespace) -> Result:
    from ..data.checks import check_vocabulary
    from ..data.collator import YanDataCollator
    from ..data.tasks import TaskEncoder, encode_split, load_splits
    from ..evaluation.evaluate import evaluate_model

    model, tokenizer = _with_tokenizer(options)
    check_vocabulary(tokenizer, model)
    splits = load_splits({options.split: options.file}, options.dataset, options.dataset_config)
    if options.split not in splits:
        raise ValueError(f"{options.dataset} has no split `{options.split}`, but {', '.join(splits)}.")
    rows = splits[options.split]
    if options.max_rows is not None:
        rows = rows.take(min(options.max_rows, len(rows)))
    limit = model.config.max_position_embeddings
    if options.max_source_length is not None and options.max_source_length > limit:
        raise ValueError(f"--max-source-length is {options.max_source_length}, but the model reads {limit} at most.")
    encoder = TaskEncoder(
        options.task,
        tokenizer,
        options.columns,
        options.class_names,
        options.max_source_length or limit,
        limit,
        options.skip_bad_rows,
        options.add_mask,
        options.space_in_target,
        options.mask_first,
        options.max_sentences,
        options.mask_marker,
    )
    examples, skipped = encode_split(rows, encoder, "The data")
    objective = "span_infilling" if options.task == "span_infilling" else "pairs"
    default = model.generation_config.num_inference_steps or model.config.solver_steps
    choices = {} if options.max_new_tokens is None else {"max_new_tokens": options.max_new_tokens}
    results = []
    for row in evaluate_model(
        model,
        tokenizer,
        examples,
        YanDataCollator(tokenizer, objective),
        options.steps or [default],
        options.seeds,
        options.metrics,
        options.batch_size,
        options.length_modes,
        progress=not options.json,
        **choices,
    ):
        results.append(row)
        if not options.json:
            print(", ".join(f"{name} {_figure(value)}" for name, value in row.items()), flush=True)
    report = {"checkpoint": options.checkpoint, "rows": len(examples), "skipped_rows": skipped, "seeds": options.seeds}
    return {**report, "results": results} if options.json else report


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _benchmark(options: argparse.Namespace) -> Result:
    import torch
    from transformers.utils.logging import tqdm

    from ..hub.model_card import describe_hardware

    model, _ = load_checkpoint(options)
    limit = model.config.max_position_embeddings
    source_length = options.source_length or min(64, limit)
    for name, longest in (("source-length", source_length), ("lengths", max(options.lengths))):
        if longest > limit:
            raise ValueError(f"--{name} is {longest}, but the model's position table ends at {limit}.")
    steps = options.steps or model.generation_config.num_inference_steps or model.config.solver_steps
    generator = torch.Generator().manual_seed(0)
    shapes = [(length, batch) for length in options.lengths for batch in options.batch_sizes]
    seconds: dict[tuple[int, int], list[float]] = {shape: [] for shape in shapes}
    # A warm-up of two calls, since the first of a compiled program compiles; then all shapes in turns.
    for number in tqdm(range(options.rounds + 2), desc="rounds", file=sys.stderr, disable=options.json or None):
        for length, batch in shapes:
            ids = torch.randint(0, model.config.vocab_size, (batch, source_length), generator=generator)
            ids = ids.to(model.device)
            began = time.perf_counter()
            sequences = model.generate(
                ids,
                target_lengths=length,
                max_new_tokens=length,
                num_inference_steps=steps,
                compile=options.compile,
            )
            sequences.sum().item()  # waits for the device
            if number >= 2:
                seconds[length, batch].append(time.perf_counter() - began)
    results = [
        {
            "target_length": length,
            "batch_size": batch,
            "milliseconds": 1000 * median(times),
            "tokens_per_second": batch * length / median(times),
        }
        for (length, batch), times in seconds.items()
    ]
    conditions = {"hardware": describe_hardware(), "dtype": str(model.dtype), "steps": steps, "rounds": options.rounds}
    if options.json:
        return {**conditions, "results": results}
    for row in results:
        print(", ".join(f"{name} {_figure(value)}" for name, value in row.items()))
    return conditions


__all__ = ["add_commands", "load_checkpoint"]
