# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Texts for many sources by several workers, on one machine or many: those of Ray Data or of `accelerate launch`."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils.logging import tqdm

from ..data.files import whole_file
from ..data.sources import encode_source
from ..evaluation.evaluate import generate_texts


class Worker:
    """
    A process with a model, which generates one part of the sources at a time.

    Args:
        checkpoint: Its folder, or its name on the Hub.
        device, dtype: Where it runs, and the dtype of its weights.
        num_threads: CPU threads.
        choices: Further arguments of [`generate_texts`].
    """

    def __init__(self, checkpoint: str, device: str, dtype: str, num_threads: int, choices: dict[str, Any]):
        torch.set_num_threads(num_threads)
        self.model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint, dtype=dtype).eval().to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.choices = choices
        self.copies = choices.get("num_return_sequences") or self.model.generation_config.num_return_sequences or 1

    def __call__(self, parts: dict[str, Any]) -> dict[str, Any]:
        """The rows of each part as JSON Lines, in the order of their sources."""
        return {"number": parts["number"], "rows": [self._generate(json.loads(part)) for part in parts["part"]]}

    def _generate(self, part: dict[str, Any]) -> str:
        # Sources of one length together, so that a batch has little padding.
        order = sorted(range(len(part["sources"])), key=lambda index: len(part["sources"][index]))
        sources, numbers = zip(*((part["sources"][index], part["first"] + index) for index in order))
        found = list(generate_texts(self.model, self.tokenizer, sources, numbers=numbers, **self.choices))
        rows: list[list[dict[str, Any]]] = [[]] * len(order)
        for place, index in enumerate(order):
            rows[index] = found[place * self.copies : (place + 1) * self.copies]
        return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for group in rows for row in group)


def generate_file(
    checkpoint: str,
    sources: Sequence[str],
    output: str | os.PathLike,
    engine: str = "ray",
    workers: int = 1,
    device: str = "cpu",
    dtype: str = "auto",
    num_threads: int = 1,
    part_size: int = 256,
    resume: bool = False,
    progress: bool = False,
    **choices: Any,
):
    """
    Generates texts for all sources and writes the rows of [`generate_texts`], each once, in the order of the sources.
    The texts depend neither on the number of workers nor on the batch size, and are those of `yan-hf generate`.

    Finished parts are kept in a folder beside the output until all are there: a worker that fails is started again
    and its part repeated, and a job that was interrupted goes on with `resume`.

    Args:
        checkpoint: Its folder, or its name on the Hub; every machine must have it.
        sources: The sources.
        output: JSON Lines, or Parquet for a name that ends in `.parquet`.
        engine: `"ray"` starts the workers; with `"accelerate"` they are the processes that `accelerate launch` has
            started, each of which calls this, and which see the same files.
        workers: Copies of the model, of Ray. On CUDA each has a device of its own.
        device, dtype: Where they run, and the dtype of the weights.
        num_threads: CPU threads of each worker.
        part_size: Sources of a part, which is generated, repeated and kept as a whole.
        resume: Whether to go on with parts of an interrupted job.
        progress: Whether to show a progress bar.
        choices: Further arguments of [`generate_texts`].

    Raises:
        FileExistsError: for parts of an interrupted job without `resume`.
        ValueError: for parts of another job, no sources, and a source that the model cannot take.
    """
    output = Path(output)
    processes = PartialState(cpu=device == "cpu") if engine == "accelerate" else None
    if not sources:
        raise ValueError("There are no sources.")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    longest = AutoConfig.from_pretrained(checkpoint).max_position_embeddings
    marks = {name: choices[name] for name in ("mask_marker", "split_special_tokens") if name in choices}
    for number, source in enumerate(sources, start=1):  # before any is generated
        encode_source(tokenizer, source, longest, f"{choices.get('where', 'Source')} {number}", **marks)
    # Everything that the texts depend on but the weights.
    job = json.dumps([checkpoint, dtype, part_size, {**choices, "batch_size": None}, list(sources)], sort_keys=True)
    parts = output.with_name(f"{output.name}.parts")
    mark, job = parts / "job", hashlib.sha256(job.encode()).hexdigest()
    if processes is None or processes.is_main_process:
        _start_job(parts, mark, job, resume)
    if processes is not None:
        processes.wait_for_everyone()
    files = [parts / f"{start:09}.jsonl" for start in range(0, len(sources), part_size)]
    mine = range(len(files))
    if processes is not None:  # whatever the others have finished by now
        mine = mine[processes.process_index :: processes.num_processes]
    starts = {number: part_size * number for number in mine if not files[number].exists()}
    missing = [
        {"number": number, "part": json.dumps({"first": start + 1, "sources": sources[start : start + part_size]})}
        for number, start in starts.items()
    ]
    done = len(mine) - len(missing)
    is_silent = not progress or (processes is not None and not processes.is_main_process)
    bar = tqdm(total=len(mine), initial=done, desc="generating", unit=" parts", disable=is_silent)
    if processes is not None and device == "cuda":
        device = str(processes.device)
    worker = (checkpoint, device, dtype, num_threads, choices)
    for row in _by_ray(missing, worker, workers) if processes is None else _by_itself(missing, worker):
        with whole_file(files[row["number"]]) as partial:
            Path(partial).write_text(row["rows"], encoding="utf-8")
        bar.update()
    bar.close()
    if processes is not None:
        processes.wait_for_everyone()
    if processes is None or processes.is_main_process:
        _join(files, output)
        shutil.rmtree(parts)


def _start_job(parts: Path, mark: Path, job: str, resume: bool):
    """Makes the folder of parts with the mark of the job, or finds that it is this job's."""
    if parts.exists() and not resume:
        raise FileExistsError(f"{parts} holds the parts of an unfinished job: go on with --resume, or delete it.")
    if mark.exists() and mark.read_text() != job:
        raise ValueError(f"{parts} was not written for these sources and options: resume with those of the first run.")
    parts.mkdir(parents=True, exist_ok=True)
    mark.write_text(job)


def _by_ray(missing: list[dict[str, Any]], worker: tuple[Any, ...], workers: int) -> Iterator[dict[str, Any]]:
    if not missing:
        return
    from .cluster import ray, start_ray

    _, device, _, num_threads, _ = worker
    start_ray(workers * num_threads)
    found = ray.data.from_items(missing, override_num_blocks=len(missing)).map_batches(
        Worker,
        fn_constructor_args=worker,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=num_threads,
        num_gpus=int(device.startswith("cuda")),
    )
    yield from found.iter_rows()


def _by_itself(missing: list[dict[str, Any]], worker: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    generate = Worker(*worker) if missing else None
    for part in missing:
        (rows,) = generate({"number": [part["number"]], "part": [part["part"]]})["rows"]
        yield {"number": part["number"], "rows": rows}


def _join(files: list[Path], output: Path):
    with whole_file(output) as partial:
        if output.suffix == ".parquet":
            from datasets import Dataset

            Dataset.from_json([str(file) for file in files], keep_in_memory=True).to_parquet(partial)
        else:
            with open(partial, "wb") as whole:
                for file in files:
                    whole.write(file.read_bytes())
