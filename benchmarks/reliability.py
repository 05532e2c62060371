# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What is left of a checkpoint when saves are killed, when two processes save and a third loads, and whether threads that
share a model get what one alone gets. A small model with random weights, on the CPU.

    python benchmarks/reliability.py --output benchmarks/results/reliability.json --page docs/reliability.md
"""

import argparse
import logging
import multiprocessing
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import torch
from report import save, write_between_markers
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from yan_hf import YanConfig, YanForConditionalGeneration


# What changes from one version to the next: the configuration too, or the weights alone; in one file or in shards.
KINDS = {
    "weights in one file": {},
    "weights in shards": {"max_shard_size": "60KB"},
    "configuration and weights": {},
    "configuration and weights, one file and shards in turn": {"max_shard_size": "60KB"},
}
_processes = multiprocessing.get_context("fork")


def small_model(seed: int = 0, **fields) -> YanForConditionalGeneration:
    """A model of a few ten thousand parameters if no sizes are given, in eval mode, the same for the same seed."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 24}
    layers = {"encoder_layers": 2, "flow_layers": 2, "decoder_layers": 1, "num_experts": 4}
    return YanForConditionalGeneration(YanConfig(**{**sizes, **layers, "initializer_range": 0.15, **fields})).eval()


def save_version(model: YanForConditionalGeneration, folder: Path, version: int, kind: str):
    """Saves with the version in the weights, in the first and the last of several shards, and in the configuration."""
    with torch.no_grad():
        model.lm_head.weight.fill_(version)
        model.model.embed_tokens.weight.fill_(version)
    if kind.startswith("configuration"):
        model.config.version = version
    options = KINDS[kind] if version % 2 or "in turn" not in kind else {}
    model.save_pretrained(folder, **options)


def load_version(folder: Path, kind: str) -> int | None:
    """The version of a checkpoint, `None` for parts of several."""
    model = YanForConditionalGeneration.from_pretrained(folder)
    versions = {float(weight.detach().mean()) for weight in (model.lm_head.weight, model.model.embed_tokens.weight)}
    if kind.startswith("configuration"):
        versions.add(float(model.config.version))
    return int(versions.pop()) if len(versions) == 1 else None


def _outcome(folder: Path, kind: str, oldest: int) -> tuple[str, int]:
    try:
        version = load_version(folder, kind)
    except Exception as error:  # whatever a reader may get is counted
        return f"error: {type(error).__name__}", oldest
    if version is None:
        return "mixture", oldest
    return ("one version", version) if version >= oldest else ("an older version", version)


def _save_for_ever(folder: Path, first: int, step: int, kind: str, stop=None):
    # A lock of tqdm's is shared with the process that forks: killed with it, this one would take it along for ever.
    disable_progress_bar()
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(1)
    model = small_model()
    version = first
    while stop is None or not stop.is_set():
        save_version(model, folder, version, kind)
        version += step


def killed_saves(kind: str, count: int) -> dict[str, object]:
    """Kills a saving process at a random moment, `count` times, and looks at the folder after each."""
    draw, outcomes, version = random.Random(0), Counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        save_version(small_model(), folder, version, kind)
        (folder / "notes.txt").write_text("mine")
        seen = set()
        for _ in range(count):
            process = _processes.Process(target=_save_for_ever, args=(folder, version + 1, 1, kind))
            began, untouched = time.monotonic(), folder.stat().st_mtime_ns
            process.start()
            # From its first file on: on a busy machine it takes its time to start.
            while folder.stat().st_mtime_ns == untouched and time.monotonic() - began < 10:
                time.sleep(0.001)
            time.sleep(draw.uniform(0.0, 0.25))
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            outcome, version = _outcome(folder, kind, version)
            outcomes[outcome] += 1
            seen.add(version)
        save_version(small_model(), folder, version + 1, kind)
        left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
        assert (folder / "notes.txt").read_text() == "mine" and not left, left
    return {"kills": count, "versions_seen": len(seen), **outcomes}


def renames(kind: str) -> dict[str, float]:
    """How long a save takes, and the part of it, from the first rename to the last, in which a kill can do harm."""
    whole, part, times = [], [], []

    def replace(source: Path, target: Path, original=os.replace):
        times.append(time.perf_counter())
        original(source, target)
        times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder, patch("yan_hf.saving.os.replace", replace):
        model = small_model()
        for version in range(20):
            times.clear()
            began = time.perf_counter()
            save_version(model, Path(folder), version, kind)
            whole.append(time.perf_counter() - began)
            part.append(times[-1] - times[0])
    return {"save_ms": 1e3 * statistics.median(whole), "renames_ms": 1e3 * statistics.median(part)}


def concurrent_saves(kind: str, seconds: float) -> dict[str, object]:
    """Two processes save different versions into one folder without a pause, while this one loads."""
    outcomes, loads = Counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        folder, stop = Path(folder), _processes.Event()
        save_version(small_model(), folder, 0, kind)
        savers = [_processes.Process(target=_save_for_ever, args=(folder, first, 2, kind, stop)) for first in (1, 2)]
        for process in savers:
            process.start()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            outcomes[_outcome(folder, kind, 0)[0]] += 1
            loads += 1
        stop.set()
        for process in savers:
            process.join()
        failed = sum(process.exitcode != 0 for process in savers)
        return {"loads": loads, **outcomes, "failed_savers": failed, "at_the_end": _outcome(folder, kind, 0)[0]}


def threads_sharing_a_model(training: bool, threads: int = 8, rounds: int = 10) -> dict[str, int]:
    """
    Seeded calls of `generate` from several threads at once, compared with the same calls one after the other, while
    one thread more computes losses and gradients if the model is in training mode.
    """
    model = small_model(hidden_dropout=0.3)
    ids = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(0))

    def generate(seed: int) -> torch.Tensor:
        return model.generate(ids, seeds=[seed, seed + 1, seed + 2], target_lengths=8)

    seeds = range(threads * rounds)
    expected = [generate(seed) for seed in seeds]
    model.train(training)
    steps = wrong_steps = 0
    with ThreadPoolExecutor(threads) as pool:
        calls = [pool.submit(generate, seed) for seed in seeds]
        while not all(call.done() for call in calls):
            if training:
                before = all(module.training for module in model.modules())
                model(ids, labels=ids).loss.backward()
                steps += 1
                wrong_steps += not (before and all(module.training for module in model.modules()))
            else:
                time.sleep(0.01)
    different = sum(not torch.equal(call.result(), result) for call, result in zip(calls, expected))
    wrong_modules = sum(module.training != training for module in model.modules())
    return {
        "threads": threads,
        "calls": len(calls),
        "different": different,
        "training_steps": steps,
        "training_steps_in_eval_mode": wrong_steps,
        "modules_left_in_another_mode": wrong_modules,
    }


def seeded_rows(dtype: torch.dtype, models: int = 5, device: str = "cpu") -> dict[str, float]:
    """
    Texts of 32 tokens, alone and in a batch of 16 with padding on the left, from the same seeds: rows that are equal,
    and the share of equal tokens. Models of random weights with 8,000 tokens, where near ties are many: a trained one
    has clearer choices. A seed fixes a row's noise, but not the rounding of products, which differs with their shapes.
    """
    sizes = {"vocab_size": 8_000, "hidden_size": 128, "max_position_embeddings": 64, "initializer_range": 0.1}
    layers = {"encoder_layers": 4, "flow_layers": 4, "decoder_layers": 2}
    shares = []
    for seed in range(models):
        model = small_model(seed, **sizes, **layers).to(device, dtype)
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(4, 33, (16,), generator=generator).tolist()
        sources = [torch.randint(5, 8_000, (length,), generator=generator).to(device) for length in lengths]
        ids = torch.nn.utils.rnn.pad_sequence(sources, batch_first=True, padding_side="left")
        mask = (ids != model.config.pad_token_id).long()
        together = model.generate(ids, mask, target_lengths=32, seeds=range(16))
        for row, source in enumerate(sources):
            alone = model.generate(source[None], target_lengths=32, seeds=[row])
            shares.append(float((alone[0] == together[row]).float().mean()))
    same = sum(share == 1 for share in shares)
    return {"rows": len(shares), "same": same, "equal_tokens": statistics.mean(shares)}


def table(report: dict[str, dict]) -> str:
    """The figures as a table in Markdown."""
    lines = ["| what | times | outcome |", "| --- | --- | --- |"]
    for kind, result in report["killed_saves"].items():
        outcomes = _listed(result, ("kills", "versions_seen"))
        lines.append(f"| process killed while it saves: {kind} | {result['kills']} kills | {outcomes} |")
    for kind, result in report["renames"].items():
        text = f"{result['renames_ms']:.2f} ms of renames in {result['save_ms']:.0f} ms"
        lines.append(f"| length of a save: {kind} | median of 20 | {text} |")
    for kind, result in report["concurrent_saves"].items():
        outcomes = _listed(result, ("loads", "failed_savers", "at_the_end"))
        end = f"savers that failed: {result['failed_savers']}; left at the end: {result['at_the_end']}"
        lines.append(f"| two savers and a loader: {kind} | {result['loads']} loads | {outcomes}; {end} |")
    for mode, result in report["threads"].items():
        text = f"{result['different']} differ from the same calls one after the other"
        if result["training_steps"]:
            text += (
                f"; {result['training_steps_in_eval_mode']} of {result['training_steps']} training steps beside them "
                "saw a module in eval mode"
            )
        lines.append(f"| {result['threads']} threads, one model in {mode} mode | {result['calls']} calls | {text} |")
    for dtype, result in report["seeds"].items():
        tokens = f"{100 * result['equal_tokens']:.1f} % of the tokens"
        text = f"{result['same']} have the same text alone and in a padded batch, and {tokens} are the same"
        lines.append(f"| the same seeds in {dtype} | {result['rows']} rows | {text} |")
    return "\n".join(lines)


def _listed(result: dict, others: tuple[str, ...]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in result.items() if name not in others)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=150, help="over all kinds of saves")
    parser.add_argument("--seconds", type=float, default=10, help="of two savers and a loader, for each kind")
    parser.add_argument("--modes", nargs="+", default=["eval", "training"], help="of the model that threads share")
    parser.add_argument("--seed-device", default="cpu", help="where seeds are compared (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    parser.add_argument("--page", type=Path, help="the page that gets the table")
    options = parser.parse_args()
    disable_progress_bar()
    set_verbosity_error()
    logging.getLogger("yan_hf").setLevel(logging.ERROR)  # the configuration has a field that it does not know
    torch.set_num_threads(1)
    counts = [len(range(index, options.kills, len(KINDS))) for index in range(len(KINDS))]
    report = {
        "killed_saves": {kind: killed_saves(kind, count) for kind, count in zip(KINDS, counts)},
        "renames": {kind: renames(kind) for kind in list(KINDS)[1:3]},
        "concurrent_saves": {kind: concurrent_saves(kind, options.seconds) for kind in KINDS},
        "threads": {mode: threads_sharing_a_model(mode == "training") for mode in options.modes},
        "seeds": {
            name: seeded_rows(getattr(torch, name), device=options.seed_device)
            for name in ("float32", "bfloat16", "float16")
        },
    }
    print(table(report))
    if options.output:
        save(options.output, report)
    if options.page:
        write_between_markers(options.page, "reliability", table(report))


if __name__ == "__main__":
    main()
