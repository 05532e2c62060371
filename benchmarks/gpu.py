# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Everything that needs a GPU, most telling first: one command on a machine with CUDA.

    python benchmarks/gpu.py                         # or `make gpu`: about 25 minutes
    python benchmarks/gpu.py --minutes 5 --steps tests profile
    python benchmarks/gpu.py --dry-run --output FOLDER   # the same steps on a CPU, tiny, without results to keep

Every step writes `STEP.json` into the output folder, beside the conditions it was measured under. Steps whose file is
there are left out, so that a run that was cut short goes on; `--again` measures them anew. No step starts after
`--minutes`, training gets what is left of them, and a step that fails is reported and does not stop the others.

- `tests`: our tests that need a GPU;
- `checkpoints`: the models in `checkpoints/`, in float32 and bfloat16, beside the same on the CPU;
- `speed`: `speed.py` at the base size, in bfloat16, at batch 1, from 16 to 1,024 tokens; `batches`: at 8 and 64;
- `profile`: one `generate`: kernels, gaps between them, time by part of the model, and what the host does longest,
  plain and compiled;
- `attention`: eager, SDPA, flash and flex attention: latency, and the largest difference of states from eager's;
- `offload`: `offload.py` with experts of a size that matters, copied over the real bus;
- `scans`: `mamba.py`, with mamba-ssm's kernels where they are installed;
- `training`: about 180 M parameters on packed text for ten minutes: loss curve (plotted where matplotlib is),
  tokens per second and utilisation.

It needs nothing but PyTorch, Transformers, pytest, and a file of texts for training (`--text`; without one it trains
on simulated stories). accelerate, matplotlib, flash-attn and mamba-ssm are used where they are installed.
"""

import argparse
import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from decoders import SIZES
from report import save, timed
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import is_accelerate_available, is_flash_attn_2_available, is_torch_flex_attn_available

from yan_hf import YanConfig, YanForConditionalGeneration


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
SOURCE_LENGTH, TARGET_LENGTH = 64, 64


class Run:
    """What the steps share: where they run, at which size, and where their files go."""

    def __init__(self, options: argparse.Namespace):
        self.dry, self.output = options.dry_run, options.output
        self.device = torch.device("cuda" if torch.cuda.is_available() and not options.dry_run else "cpu")
        self.size, self.dtype = ("tiny", torch.float32) if self.dry else ("base", torch.bfloat16)
        self.text, self.training_seconds = options.text, 2.0 if self.dry else 60 * options.training_minutes
        self.end = time.monotonic() + 60 * options.minutes

    def script(self, name: str, step: str, full: list[str], tiny: list[str]):
        """Runs another benchmark, which writes the step's file."""
        command = [sys.executable, f"benchmarks/{name}.py", *(tiny if self.dry else full)]
        subprocess.run([*command, "--output", str(self.output / f"{step}.json")], cwd=ROOT, check=True)

    def model(self, **fields: object) -> YanForConditionalGeneration:
        torch.manual_seed(0)
        config = YanConfig(max_position_embeddings=1024, **{**SIZES[self.size], **fields})
        return YanForConditionalGeneration(config).to(self.device, self.dtype).eval()

    def source(self, model: torch.nn.Module, batch_size: int = 1) -> torch.Tensor:
        return torch.randint(5, model.config.vocab_size, (batch_size, SOURCE_LENGTH), device=self.device)


# Steps: each returns what its file holds, or nothing where another script has written it.


def tests(run: Run) -> dict:
    """Counts of our tests that are marked `gpu`, and the names of those that failed."""
    with TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        marked = ["-m", "gpu and not slow" if run.dry else "gpu"]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *marked, f"--junitxml={report}"]
        subprocess.run([*command, "modeling_tests"], cwd=ROOT, check=False)
        suite = ElementTree.parse(report).getroot().find("testsuite")
    failed = [f"{case.get('classname')}::{case.get('name')}" for case in suite if case.find("failure") is not None]
    return {**{name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}, "failed": failed}


@torch.no_grad()
def checkpoints(run: Run) -> dict:
    """The share of tokens that are the CPU's, for every checkpoint in the repository and either dtype."""
    rows = []
    for folder in sorted(path.parent for path in (ROOT / "checkpoints").glob("*/modeling_yan.py")):
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
        texts = ["the little girl found a red ball in the garden", "he said <mask> and went home"]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        expected = (
            AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval().generate(**batch, seeds=[1, 2])
        )
        for dtype in (torch.float32, torch.bfloat16):
            placed = {"device_map": str(run.device)} if is_accelerate_available() else {}
            model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=dtype, **placed).to(run.device).eval()
            found = model.generate(**batch.to(run.device), seeds=[1, 2]).cpu()
            same = found.shape == expected.shape and (found == expected).float().mean().item()
            rows.append(
                {"checkpoint": folder.name, "dtype": str(dtype).removeprefix("torch."), "same_tokens": float(same)}
            )
            print(f"{folder.name} in {dtype}: {float(same):.1%} of the tokens are the CPU's", flush=True)
    return {"rows": rows}


BASE = ["--size", "base", "--dtype", "bfloat16", "--rounds", "3", "--patience", "1"]
TINY = ["--size", "tiny", "--lengths", "4", "--rounds", "1", "--systems", "yan", "ar-gpt2"]


def speed(run: Run) -> None:
    # Static caches are compiled anew for every length.
    longest = ["--longest", "masked-diffusion=1024", "ar-gpt2-static=256", "ar-bart-static=256"]
    systems = ["yan", "yan-compiled", "yan-naive", "ar-gpt2", "ar-gpt2-static", "ar-bart", "ar-bart-static"]
    systems += ["cmlm-3", "ctc", "masked-diffusion", "masked-diffusion-32"]
    run.script(
        "speed", "speed", [*BASE, "--lengths", "64", "256", "1024", "16", "--systems", *systems, *longest], TINY
    )


def batches(run: Run) -> None:
    full = [*BASE, "--lengths", "64", "256", "--batch-sizes", "64", "8"]
    run.script("speed", "batches", [*full, "--systems", "yan", "yan-compiled", "ar-gpt2", "ar-bart"], TINY)


def _parts(model: torch.nn.Module) -> list:
    """Hooks that record the model's parts under their names."""
    named = {"encoder": model.model.encoder, "flow": model.model.flow, "decoder": model.model.decoder}
    handles = []
    for name, module in named.items():
        open_ranges = []

        def enter(*_, name=name, open_ranges=open_ranges):
            open_ranges.append(record_function(f"part: {name}"))
            open_ranges[-1].__enter__()

        def leave(*_, open_ranges=open_ranges):
            open_ranges.pop().__exit__(None, None, None)

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    return handles


def _profiled(run: Run, call: Callable[[], object]) -> dict:
    """Kernels of one call, the time they take, and that between them."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if run.device.type == "cuda" else [])]
    with profile(activities=activities) as recorded:
        timed(call, run.device)
    wanted = torch.autograd.DeviceType.CUDA if run.device.type == "cuda" else torch.autograd.DeviceType.CPU
    spans, by_name = [], defaultdict(float)
    for event in recorded.events():
        if event.device_type == wanted and not event.name.startswith("part: "):
            spans.append((event.time_range.start, event.time_range.end))
            by_name[event.name] += event.time_range.end - event.time_range.start
    busy, end = 0.0, 0.0
    for start, stop in sorted(spans):  # those inside others count once
        busy, end = busy + max(0.0, stop - max(start, end)), max(end, stop)
    parts = {
        event.key.removeprefix("part: "): 1e-6 * (event.device_time_total or event.cpu_time_total)
        for event in recorded.key_averages()
        if event.key.startswith("part: ")
    }
    longest = sorted(by_name.items(), key=lambda item: -item[1])[:12]
    on_host = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)[:12]
    return {
        "kernels": len(spans),
        "busy_seconds": 1e-6 * busy,
        "gap_seconds": 1e-6 * (max(stop for _, stop in spans) - min(start for start, _ in spans) - busy),
        "seconds_by_part": parts,
        "longest": {name[:80]: 1e-6 * seconds for name, seconds in longest},
        "longest_on_host": {event.key[:80]: 1e-6 * event.self_cpu_time_total for event in on_host},
    }


@torch.no_grad()
def profiled(run: Run) -> dict:
    """Plain and compiled `generate` at two batch sizes: latency, and what one call is made of."""
    model, rows = run.model(), []
    for batch_size in (1, 2) if run.dry else (1, 64):
        ids = run.source(model, batch_size)
        for name, choice in (("plain", {}), ("compiled", {"compile": True})):
            call = lambda: model.generate(ids, target_lengths=TARGET_LENGTH, num_inference_steps=3, **choice)  # noqa: B023, E731
            timed(call, run.device), timed(call, run.device)
            seconds = median(timed(call, run.device) for _ in range(5))
            handles = _parts(model) if name == "plain" else []
            row = {"path": name, "batch_size": batch_size, "latency_seconds": seconds, **_profiled(run, call)}
            for handle in handles:
                handle.remove()
            rows.append(row)
            print(
                f"{name:9} batch {batch_size:3}: {1000 * seconds:7.2f} ms, {row['kernels']} kernels, busy "
                f"{1000 * row['busy_seconds']:.2f} ms, gaps {1000 * row['gap_seconds']:.2f} ms",
                flush=True,
            )
    return {"source_length": SOURCE_LENGTH, "target_length": TARGET_LENGTH, "solver_steps": 3, "rows": rows}


@torch.no_grad()
def attention(run: Run) -> dict:
    """Latency of a forward pass with each attention, and its largest difference from eager attention."""
    available = {
        "eager": True,
        "sdpa": True,
        "flash_attention_2": is_flash_attn_2_available() and run.device.type == "cuda",
        "flex_attention": is_torch_flex_attn_available() and run.device.type == "cuda",
    }
    model = run.model()
    ids = run.source(model, 2 if run.dry else 64)
    mask = torch.ones_like(ids)
    mask[::2, -SOURCE_LENGTH // 4 :] = 0
    rows, expected = [], None
    for name, there in available.items():
        row = {"attention": name, "available": there}
        rows.append(row)
        if not there:
            continue
        model.set_attn_implementation(name)
        call = lambda: model.model.encode(ids, mask).last_hidden_state  # noqa: E731
        states = call()[mask > 0].float()
        expected = states if expected is None else expected
        seconds = [timed(call, run.device) for _ in range(7)]
        row |= {"latency_seconds": median(seconds), "latency_range": [min(seconds), max(seconds)]}
        row["largest_difference"] = (states - expected).abs().max().item()
        print(
            f"{name:18} {1000 * row['latency_seconds']:7.2f} ms, differs by {row['largest_difference']:.1e}",
            flush=True,
        )
    return {"rows": rows}


def offload(run: Run) -> None:
    full = ["--experts", "32", "--hidden-size", "1024", "--dtype", "bfloat16", "--rounds", "5"]
    tiny = ["--experts", "4", "--hidden-size", "32", "--layers", "2", "--vocab-size", "50", "--length", "8"]
    run.script("offload", "offload", full, [*tiny, "--source-length", "8", "--rounds", "1"])


def scans(run: Run) -> None:
    tiny = ["--lengths", "8", "--hidden-size", "32", "--layers", "1", "--rounds", "1", "--no-memory"]
    run.script(
        "mamba",
        "scans",
        ["--tables", "scans", "generate", "--lengths", "64", "512", "4096"],
        ["--tables", "scans", *tiny],
    )


def _training_rows(run: Run, length: int, vocab_size: int) -> torch.Tensor:
    """Token rows `(N, L)`: the bytes of a text, or words drawn as often as words are, each one from the last."""
    if run.text is not None:
        ids = torch.frombuffer(bytearray(run.text.read_bytes()), dtype=torch.uint8).long() + 5
    else:
        generator = torch.Generator().manual_seed(0)
        draws = torch.multinomial(1 / torch.arange(1.0, 65.0), 2**20, replacement=True, generator=generator)
        ids = 5 + torch.cumsum(draws, dim=0) % (vocab_size - 5)
    return ids[: len(ids) // length * length].view(-1, length)


def training(run: Run) -> dict:
    """Restores spans that were replaced by other tokens: loss curve, tokens per second, share of the peak rate."""
    shape = {"hidden_size": 64, "flow_layers": 1} if run.dry else {"hidden_size": 768, "num_attention_heads": 12}
    vocab_size, length, batch_size = 32_000, 128, 4 if run.dry else 128
    model = run.model(vocab_size=vocab_size, tie_word_embeddings=True, loss_weights={"mmd": 0.0}, **shape).train()
    model = model.float()
    rows = _training_rows(run, length, vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.98), fused=run.device.type == "cuda")
    generator = torch.Generator().manual_seed(1)
    curve, tokens, began = [], 0, time.perf_counter()
    seconds = min(run.training_seconds, max(60.0, run.end - time.monotonic()))
    while (elapsed := time.perf_counter() - began) < seconds:
        labels = rows[torch.randint(len(rows), (batch_size,), generator=generator)]
        noise = labels.roll(1, dims=0)
        spoilt = torch.where(torch.rand(labels.shape, generator=generator) < 0.15, noise, labels)
        with torch.autocast(run.device.type, torch.bfloat16):
            loss = model(input_ids=spoilt.to(run.device), labels=labels.to(run.device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += labels.numel()
        if len(curve) < 10 or elapsed - curve[-1][0] > seconds / 100:
            curve.append((round(elapsed, 2), loss.item()))
    elapsed = time.perf_counter() - began
    busy = torch.cuda.utilization() if run.device.type == "cuda" and _has_nvml() else None
    print(f"{tokens / elapsed:,.0f} tokens per second, loss {curve[0][1]:.2f} to {curve[-1][1]:.2f}", flush=True)
    plot_loss(curve, run.output / "training.png")
    return {
        "parameters": model.num_parameters(),
        "batch": [batch_size, length],
        "seconds": elapsed,
        "tokens_per_second": tokens / elapsed,
        "utilisation_percent": busy,
        "peak_bytes": torch.cuda.max_memory_allocated() if run.device.type == "cuda" else None,
        "curve": curve,
    }


def plot_loss(curve: list[tuple[float, float]], file: Path):
    """The loss over the seconds of the training, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), constrained_layout=True)
    axes.plot(*zip(*curve))
    axes.set_xlabel("seconds")
    axes.set_ylabel("loss, sum of its terms")
    axes.grid(True, alpha=0.3)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _has_nvml() -> bool:
    try:
        import pynvml  # noqa: F401
    except ImportError:
        return False
    return True


STEPS: dict[str, Callable[[Run], dict | None]] = {
    "tests": tests,
    "checkpoints": checkpoints,
    "speed": speed,
    "batches": batches,
    "profile": profiled,
    "attention": attention,
    "offload": offload,
    "scans": scans,
    "training": training,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--minutes", type=float, default=25.0, help="after which no step starts")
    parser.add_argument("--training-minutes", type=float, default=10.0)
    parser.add_argument("--text", type=Path, help="file to train on")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--again", action="store_true", help="measure what is there already")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.dry_run:
        steps = ", ".join(options.steps)
        print(f"There is no CUDA device; on one this runs {steps}. Try it with --dry-run --output FOLDER.")
        return 0
    if options.dry_run and options.output == RESULTS:
        parser.error("--dry-run measures nothing worth keeping: give another --output")
    began, run, failed = time.monotonic(), Run(options), []
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.steps:
        file = options.output / f"{name}.json"
        if file.is_file() and not options.again:
            print(f"== {name}: {file} is there", flush=True)
            continue
        if time.monotonic() > run.end:
            print(f"== {name}: left out, {options.minutes:g} minutes are over; call again to go on", flush=True)
            continue
        print(f"== {name}: {STEPS[name].__doc__ or ''}".rstrip(), flush=True)
        try:
            if (report := STEPS[name](run)) is not None:
                save(file, report)
        except Exception as error:  # the other steps are worth having
            failed.append(name)
            print(f"== {name} failed: {type(error).__name__}: {error}", flush=True)
    print(json.dumps({"failed": failed, "minutes": round((time.monotonic() - began) / 60, 1)}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
