# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Measures the latency of `generate` against other decoders of the same size, interleaved in one run, random weights.

    python benchmarks/speed.py --size tiny --lengths 16 64 --output benchmarks/results/speed_cpu_tiny.json
    python benchmarks/speed.py --size base --dtype bfloat16 --lengths 16 64 256 1024 --batch-sizes 1 8 64   # on CUDA

Systems, all with the same vocabulary, width, dtype, source and target lengths, and parameters within 5 % of YAN's:

- `yan`: this package, three Euler steps; `yan-compiled`: the same with `compile=True`; `yan-bfloat16` and, on the
  CPU, `yan-int8` and `yan-int8-compiled`, in these; `yan-onnx`: exported, by ONNX Runtime on the CPU;
- `yan-naive`: the research schedule (one pass more than steps, every expert computed for every token, nothing of the
  source kept between steps), in plain PyTorch;
- `ar-gpt2`, `ar-bart`: Transformers' models, `generate` with their cache, greedy, forced to the same target length;
- `ar-gpt2-static`, `ar-bart-static`: with a static cache and a compiled step (CUDA graphs on a GPU);
  `ar-bart-lookup`: with prompt lookup, one row at a time. Random weights repeat themselves, so that nearly all that is
  looked up is right: the best that it can be;
- `ct2-gpt2`, `ct2-bart`, and the same with `-int8`: these models in CTranslate2 (on the CPU, float32 and int8);
- `cmlm-3`: Mask-Predict in three iterations; `ctc`: one pass over a canvas of twice the target's length;
- `masked-diffusion`: a bidirectional Transformer decoded as LLaDA does, a step for each token, and
  `masked-diffusion-32` in 32 steps.

Every round runs each system for `--turn` seconds or once, in which its median call counts; the median of the rounds
after a warm-up is given. A system that takes longer than `--patience` seconds takes part in two rounds only, which its
row says. Where others use the processor too, the process's own time on it (`processor_seconds`) tells what latency
cannot. The floor is the larger of the bytes of weights over the memory's bandwidth and of the multiply-adds over the
rate of a large matrix product, measured here. With several threads CTranslate2's systems need a run of their own:
after them PyTorch's threads are woken late.
"""

import argparse
import copy
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from ctranslate import translator
from decoders import (
    LOOKUP_TOKENS,
    SIZES,
    LookupBart,
    ctc_logits,
    floor_costs,
    mask_predict,
    masked_diffusion_generate,
    matching_model,
    naive_generate,
)
from report import onnx_session_options, peak_memory, save, timed
from torch.utils.flop_counter import FlopCounterMode
from transformers.generation import CompileConfig

from yan_hf import YanConfig, YanForConditionalGeneration, YanInt8Config
from yan_hf.inference import cpu_kernels
from yan_hf.inference.onnx import OnnxYan, write_onnx
from yan_hf.layers import KERNELS, linear


# System → the model that [`decoders.matching_model`] builds for it.
OTHERS = {
    "ar-gpt2": "ar-gpt2",
    "ar-gpt2-static": "ar-gpt2",
    "ct2-gpt2": "ar-gpt2",
    "ct2-gpt2-int8": "ar-gpt2",
    "ar-bart": "ar-bart",
    "ar-bart-static": "ar-bart",
    "ar-bart-lookup": "ar-bart",
    "ct2-bart": "ar-bart",
    "ct2-bart-int8": "ar-bart",
    "cmlm-3": "cmlm",
    "ctc": "ctc",
    "masked-diffusion": "masked-diffusion",
    "masked-diffusion-32": "masked-diffusion",
}
SYSTEMS = (
    "yan",
    "yan-bfloat16",
    "yan-int8",
    "yan-int8-compiled",
    "yan-onnx",
    "yan-compiled",
    "yan-naive",
    *OTHERS,
)
# What the start of a system's name asks for, beside the CPU.
CPU_PACKAGES = {"ct2": ("ctranslate2",), "yan-int8": (), "yan-onnx": ("onnxscript", "onnxruntime")}
STEPS = 3


@torch.no_grad()
def machine_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes per second of a large copy, read and written, and multiply-adds per second of a large matrix product."""
    source = torch.zeros(2**26, device=device)
    target = torch.empty_like(source)
    copy = min(timed(lambda: target.copy_(source), device) for _ in range(7))
    size = 2048 if device.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = min(timed(lambda: torch.nn.functional.linear(left, right), device) for _ in range(7))
    if device.type == "cpu" and cpu_kernels.is_available():
        with cpu_kernels.use_onednn(KERNELS):
            product = min(product, *(timed(lambda: linear(left, right), device) for _ in range(7)))
    return 2 * source.numel() * source.element_size() / copy, size**3 / product


def is_missing(name: str, device: torch.device) -> bool:
    """Whether a system wants another device, or packages that are not there."""
    packages = next((needed for start, needed in CPU_PACKAGES.items() if name.startswith(start)), None)
    return packages is not None and not (device.type == "cpu" and all(map(importlib.util.find_spec, packages)))


def build_models(systems: Iterable[str], config: YanConfig, device: torch.device, dtype: torch.dtype) -> dict:
    """The models of the named systems, and what CTranslate2 makes of some."""
    yan = YanForConditionalGeneration(config)
    models: dict[str, Any] = {"yan": yan}
    for name in dict.fromkeys(OTHERS[system] for system in systems if system in OTHERS):
        models[name] = matching_model(name, config, yan.num_parameters(), 2 * config.max_position_embeddings)
    models = {name: model.to(device, dtype).eval() for name, model in models.items()}
    if "cmlm" in models:
        models["cmlm"].config.mask_token_id = config.mask_token_id
    for name in systems:
        if name.startswith("ct2"):
            models[name] = translator(models[OTHERS[name]], "int8" if name.endswith("int8") else "float32")
    if "yan-bfloat16" in systems:
        models["yan-bfloat16"] = copy.deepcopy(yan).to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        if "yan-int8" in systems or "yan-int8-compiled" in systems:
            yan.save_pretrained(folder)
            models["yan-int8"] = type(yan).from_pretrained(folder, quantization_config=YanInt8Config())
        if "yan-onnx" in systems:
            write_onnx(yan, folder)
            models["yan-onnx"] = OnnxYan(folder, sess_options=onnx_session_options())
    if "ar-bart-lookup" in systems:
        models["ar-bart-lookup"] = LookupBart(models["ar-bart"].config).to(device, dtype).eval()
    return models


def make_systems(
    names: list[str], models: dict[str, Any], ids: torch.Tensor, length: int
) -> dict[str, tuple[Callable[[], object], Callable[[], object], int]]:
    """For each system a call, a cheaper call that warms it up, and its passes through a trunk."""
    yan, mask = models["yan"], torch.ones_like(ids)
    mask_token_id = yan.config.mask_token_id

    def diffuse(steps: int, warm_up: bool = False) -> Callable[[], object]:
        used = min(steps, 2) if warm_up else steps
        return lambda: masked_diffusion_generate(models["masked-diffusion"], ids, length, used, mask_token_id)

    def generate(name: str, **extra: object) -> Callable[[], object]:
        return lambda: models[name].generate(ids, target_lengths=length, num_inference_steps=STEPS, **extra)

    def autoregressive(name: str, size: int, **extra: object) -> Callable[[], object]:
        forced = {"attention_mask": mask, "max_new_tokens": size, "min_new_tokens": size, "do_sample": False}
        return lambda: models[name].generate(ids, **forced, **extra)

    @torch.no_grad()
    def mask_predicted():
        source = models["cmlm"].model.encoder(ids).last_hidden_state
        return mask_predict(models["cmlm"], source, mask, torch.full((len(ids),), length, device=ids.device), 3)

    @torch.no_grad()
    def one_pass():
        models["ctc"].config.upsample = max(1, 2 * length // ids.shape[1])
        return ctc_logits(models["ctc"], ids, mask)[0].argmax(dim=-1)

    static = {
        "cache_implementation": "static",
        "compile_config": CompileConfig(
            fullgraph=False, mode="default" if ids.device.type == "cpu" else "reduce-overhead", dynamic=False
        ),
    }
    static["compile_config"]._compile_all_devices = True  # also on the CPU
    lookup = {"prompt_lookup_num_tokens": LOOKUP_TOKENS}
    systems = {
        "yan-compiled": (*2 * [generate("yan", compile=True)], STEPS),
        "yan-int8-compiled": (*2 * [generate("yan-int8", compile=True)], STEPS),
        "yan-naive": (*2 * [lambda: naive_generate(yan, ids, length, STEPS)], STEPS + 1),
        "masked-diffusion": (diffuse(length), diffuse(length, True), length),
        "masked-diffusion-32": (diffuse(min(32, length)), diffuse(min(32, length), True), min(32, length)),
        # The cache has the size of the target, and the program that of the cache.
        "ar-gpt2-static": (*2 * [autoregressive("ar-gpt2", length, **static)], length),
        "ar-bart-static": (*2 * [autoregressive("ar-bart", length, **static)], length),
        "ar-bart-lookup": (*2 * [autoregressive("ar-bart-lookup", length, **lookup)], length),
        "cmlm-3": (mask_predicted, mask_predicted, 3),
        "ctc": (one_pass, one_pass, 1),
    }
    for name in ("yan", "yan-bfloat16", "yan-int8", "yan-onnx"):
        systems[name] = (generate(name), generate(name), STEPS)
    for name in ("ar-gpt2", "ar-bart"):
        systems[name] = (autoregressive(name, length), autoregressive(name, 4), length)
    for name in filter(lambda name: name.startswith("ct2"), names):
        run = models[name]
        systems[name] = (partial(run, ids, length), partial(run, ids, 4), length)
    return {name: systems[name] for name in names}


def measure(
    systems: dict[str, tuple[Callable[[], object], Callable[[], object], int]],
    rounds: int,
    patience: float,
    turn: float,
    device: torch.device,
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, float]]:
    """Seconds and processor seconds of every system in each round, in turns, and of its first call."""
    warm_up = {name: timed(first, device) for name, (_, first, _) in systems.items()}
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    processor: dict[str, list[float]] = {name: [] for name in systems}
    for index in range(rounds):
        for name, (run, _, _) in systems.items():
            if index < 2 or seconds[name][0] <= patience:
                # What others leave behind in the caches slows the first call, not the ones that a service makes.
                calls: list[tuple[float, float]] = []
                while not calls or sum(call for call, _ in calls) < turn:
                    began = time.process_time()
                    calls.append((timed(run, device), time.process_time() - began))
                for found, times in zip((seconds, processor), zip(*calls)):
                    found[name].append(median(times))
    return seconds, processor, warm_up


# Parts of the names of PyTorch's operators, for what they are.
OPERATORS = {
    "matrix products": ("mm", "linear"),
    "attention": ("scaled_dot_product",),
    "activations, norms, softmax": ("gelu", "norm", "softmax", "max"),
    "copies, gathers, concatenations": ("copy", "index", "gather", "cat", "fill", "nonzero", "clone"),
}


def profile_of(run: Callable[[], object]) -> dict[str, Any]:
    """Seconds of one call on the CPU by kind of operator, and the multiply-adds that PyTorch counts in another one."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        run()
    shares = dict.fromkeys([*OPERATORS, "other"], 0.0)
    for event in recorded.key_averages():
        named = (kind for kind, parts in OPERATORS.items() if any(part in event.key for part in parts))
        shares[next(named, "other")] += 1e-6 * event.self_cpu_time_total
    # It does not know oneDNN's products, nor those of 8-bit integers in the vocabulary head.
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        run()
    return {"seconds": shares, "multiply_adds": counter.get_total_flops() / 2}


def plot(rows: list[dict], title: str, file: Path):
    """Latency against target length, both logarithmic, at the smallest batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    batch_size = min(row["batch_size"] for row in rows)
    figure, axes = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    axes.set_prop_cycle(color=plt.get_cmap("tab20").colors[::2] + plt.get_cmap("tab20").colors[1::2])
    for name, marker in zip(SYSTEMS, "ospPv^<>DdhHxX*+123"):
        points = [row for row in rows if row["system"] == name and row["batch_size"] == batch_size]
        if points:
            points.sort(key=lambda row: row["target_length"])
            axes.plot(
                [row["target_length"] for row in points],
                [row["latency_seconds"] for row in points],
                marker=marker,
                label=name,
            )
    lengths = sorted({row["target_length"] for row in rows if row["batch_size"] == batch_size})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_xlabel("target tokens")
    axes.set_ylabel("latency in seconds")
    axes.set_title(title, fontsize=10)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))  # beside the lines
    figure.savefig(file, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--systems", choices=SYSTEMS, nargs="+", default=SYSTEMS)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64], help="target lengths")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--experts", type=int, help="number of experts instead of the size's")
    parser.add_argument("--source-length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="CPU threads; by default PyTorch's")
    parser.add_argument("--turn", type=float, default=0.5, help="seconds of a turn in a round, if a call is shorter")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds of a call that gets two rounds only")
    parser.add_argument(
        "--longest",
        type=lambda text: (text.split("=")[0], int(text.split("=")[1])),
        nargs="+",
        default=[("masked-diffusion", 256)],
        help="SYSTEM=LENGTH: longest target that systems whose name starts so take part in",
    )
    parser.add_argument("--profile", action="store_true", help="what a call's time goes into, of PyTorch's systems")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--output", type=Path, help="JSON file to write; the plot goes next to it")
    options = parser.parse_args()

    torch.manual_seed(0)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype)
    fields = {**SIZES[options.size], **({"num_experts": options.experts} if options.experts else {})}
    config = YanConfig(max_position_embeddings=max(1024, *options.lengths), **fields)
    missing = [name for name in options.systems if is_missing(name, device)]
    if missing:
        print(f"Left out: {', '.join(missing)}, which need the CPU, and ctranslate2 or `yan-hf[onnx]`.")
    asked = [name for name in options.systems if name not in missing]
    models = build_models(asked, config, device, dtype)
    bandwidth, rate = machine_rates(device, dtype)

    rows = []
    for batch_size in options.batch_sizes:
        for length in options.lengths:
            ids = torch.randint(5, config.vocab_size, (batch_size, options.source_length), device=device)
            names = [
                name
                for name in asked
                if not any(name.startswith(slow) and length > longest for slow, longest in options.longest)
                and not (name == "masked-diffusion-32" and length <= 32)
                and not (name == "ar-bart-lookup" and batch_size > 1)
            ]
            systems = make_systems(names, models, ids, length)
            seconds, processor, warm_up = measure(systems, options.rounds, options.patience, options.turn, device)
            reads, multiply_adds = floor_costs(config, batch_size, options.source_length, length, STEPS)
            floor = max(reads * dtype.itemsize / bandwidth, multiply_adds / rate)
            for name in names:
                latency = median(seconds[name])
                row = {
                    "system": name,
                    "batch_size": batch_size,
                    "target_length": length,
                    "latency_seconds": latency,
                    "latency_range": [min(seconds[name]), max(seconds[name])],
                    "processor_seconds": median(processor[name]),
                    "rounds": len(seconds[name]),
                    "tokens_per_second": batch_size * length / latency,
                    "trunk_passes": systems[name][2],
                    "times_slower_than_yan": latency / median(seconds["yan"]) if "yan" in seconds else None,
                    "first_call_seconds": warm_up[name],
                }
                if name in ("yan", "yan-compiled", "yan-naive"):  # in the dtype of the rates
                    row["floor_seconds"] = floor
                    row["share_of_floor"] = floor / latency
                    row["peak_memory_bytes"] = peak_memory(systems[name][0], device)
                if options.profile and not name.startswith("ct2") and name != "yan-onnx":
                    row["profile"] = profile_of(systems[name][0])
                rows.append(row)
                ratio = f"{row['times_slower_than_yan']:7.2f}x" if row["times_slower_than_yan"] else ""
                floor_share = f"floor {row['share_of_floor']:4.0%}" if "share_of_floor" in row else ""
                print(
                    f"{name:20} batch {batch_size:3} length {length:5}: {latency * 1000:10.1f} ms "
                    f"{row['processor_seconds'] * 1000:10.1f} on the processor "
                    f"{row['tokens_per_second']:10.0f} tokens/s {ratio} {floor_share}",
                    flush=True,
                )
            if options.output:  # after every length, so that a run that is cut short loses nothing
                save(
                    options.output,
                    {
                        "dtype": options.dtype,
                        "seed": 0,
                        "source_length": options.source_length,
                        "solver_steps": STEPS,
                        "left_out": missing,
                        "load_average": os.getloadavg(),
                        "parameters": {
                            name: model.num_parameters()
                            for name, model in models.items()
                            if hasattr(model, "num_parameters")
                        },
                        "copy_bytes_per_second": bandwidth,
                        "multiply_adds_per_second": rate,
                        "rows": rows,
                    },
                )
    if options.output and importlib.util.find_spec("matplotlib"):
        name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
        title = f"{options.size} size, batch {min(options.batch_sizes)}, {options.dtype}, {name}, random weights"
        plot(rows, title, options.output.with_suffix(".png"))


if __name__ == "__main__":
    # What else is in the process decides whether glibc hands freed tensors back to the system, whose pages cost more
    # than a product when they are asked for again. It keeps them here, for all systems.
    kept = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
    if not kept.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**kept, **os.environ})
    main()
