# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Writes the tables of README.md and of the documentation from the committed results.

    python docs/write_tables.py

A table stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`. Run this after any benchmark whose result file is
committed; a test compares the pages with what it writes.
"""

import json
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import mean, stdev


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "modeling_tests" / "conformance")]

import coherence  # noqa: E402
import multimodal  # noqa: E402
import quality_report  # noqa: E402
import reliability  # noqa: E402
import rewriting_report  # noqa: E402
from report import write_between_markers  # noqa: E402
from table import summary_table  # noqa: E402

from yan_hf.generation_config_yan import OPTIONS  # noqa: E402


# Task → what it asks for, as the tables say it, and its metric at three steps.
TASKS = {
    "babi": ("bAbI task 1, official test split", "exact_match"),
    "sst2": ("SST-2, sentences of the original test set", "exact_match"),
    "ag_news": ("AG News, description only, a third of the training rows", "exact_match"),
    "last_word": ("last word of a story's sentence", "exact_match"),
    "infilling": ("infilling a story's sentence, token F1", "f1"),
    "squad": ("SQuAD, the answer's sentence given", "exact_match"),
}
METRICS = {"exact_match": "exact match", "f1": "F1"}
CARDS = {"babi": "babi_qa1", "sst2": "sst2", "ag_news": "ag_news", "last_word": "last_word", "infilling": "infilling"}
YAN, GPT2, BART = "yan, K = 4", "ar-gpt2", "ar-bart"


def grid(heading: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown."""
    lines = [list(heading), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _runs(folder: str = "quality") -> dict[tuple[str, str], dict]:
    runs = quality_report.load(RESULTS / folder)
    return {(run["options"]["task"], quality_report.label(run)): run for run in runs}


def quality() -> str:
    """Every task and system at three steps: the metric, its deviation over training seeds, minutes of training."""
    runs, rows = _runs(), []
    for task, (name, metric) in TASKS.items():
        cells = [f"{name} ([card](../model_cards/{CARDS[task]}.md))" if task in CARDS else name]
        for system in (YAN, "yan, K = 1", GPT2, BART):
            run = runs.get((task, system))
            if run is None:
                cells.append("")
                continue
            value, deviation = quality_report.at(run, 3, metric=metric), quality_report.spread(run)
            text = percent(value) if metric == "exact_match" else f"{value:.2f}"
            if deviation is not None and metric == "exact_match":
                text = f"{100 * value:.1f} ± {100 * deviation:.1f} %"
            cells.append(f"{text} ({run['training_minutes']:.0f})")
        rows.append(cells)
    return grid(["task", "YAN, K = 4", "YAN, K = 1", f"`{GPT2}`", f"`{BART}`"], rows)


def _verdict(points: float) -> str:
    """Of YAN's lead over the better of the others, in percentage points; below half a point is level."""
    if abs(points) < 0.5:
        return "level"
    return f"ahead by {points:.1f} points" if points > 0 else f"**behind by {-points:.1f} points**"


def results() -> str:
    """The README's table: YAN against the autoregressive models, with what it loses."""
    runs, rows = _runs(), []
    asked = [(task, *TASKS[task]) for task in TASKS if task != "infilling"]
    asked.insert(4, ("infilling", "infilling a story's sentence, the whole sentence right", "exact_match"))
    for task, name, metric in asked:
        values = [quality_report.at(runs[task, system], 3, metric=metric) for system in (YAN, GPT2, BART)]
        yan, *others = points = [round(100 * value, 1) for value in values]
        rows.append([name, *(f"{value} %" for value in points), _verdict(yan - max(others))])
    for length in (64, 256):
        found = {
            row["system"]: row["latency_seconds"]
            for row in result("speed_cpu_base")["rows"]
            if row["target_length"] == length
        }
        factors = sorted(found[system] / found["yan"] for system in (GPT2, BART))
        cells = [_seconds(found[system]) for system in ("yan", GPT2, BART)]
        rows.append([f"latency, {length} tokens", *cells, f"{factors[0]:.0f} to {factors[1]:.0f} times faster"])
    return grid(["", "YAN", "GPT-2", "BART", "against the better of the two, YAN is"], rows)


def ablations() -> str:
    """Each change with its exact match and the share of the tokens that the most used expert gets."""
    return grid(
        ["change", "exact match", "tokens of the most used expert"],
        (
            [run["variant"], percent(run["exact_match"]), f"{100 * run['largest_load']:.0f} %"]
            for run in result("ablations_last_word")["runs"]
        ),
    )


def lengths() -> str:
    modes: dict[str, list[str]] = {}
    for row in result("lengths_ag_news")["rows"]:
        modes.setdefault(row["mode"], []).extend([f"{row['exact_match']:.3f}", f"{row['right_length']:.3f}"])
    heading = ["asked with", "trained on canvases of the true length: exact match", "right length"]
    heading += ["trained with slack: exact match", "right length"]
    return grid(heading, ([mode, *cells] for mode, cells in modes.items()))


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def _mebibytes(value: float) -> str:
    return f"{value / 2**20:,.0f} MiB"


def _factor(value: float) -> str:
    return f"{value:.1f}×" if value < 100 else f"{value:.0f}×"


def speed() -> str:
    rows = result("speed_cpu_base")["rows"]
    counts = sorted({row["target_length"] for row in rows})
    systems: dict[str, dict[int, str]] = {}
    for row in rows:
        slower = "" if row["system"] == "yan" else f" ({_factor(row['times_slower_than_yan'])})"
        systems.setdefault(row["system"], {})[row["target_length"]] = _seconds(row["latency_seconds"]) + slower
    return grid(
        ["system", *(f"{count} tokens" for count in counts)],
        ([f"`{name}`", *(cells.get(count, "") for count in counts)] for name, cells in systems.items()),
    )


def speed_engines(*names: str, clock: str = "latency_seconds") -> str:
    """Times of a call and, behind them, how many times that of `yan`, from results that are one table."""
    rows = [{**row, "file": name} for name in names for row in result(name)["rows"]]
    found = {(row["system"], row["batch_size"], row["target_length"]): row for row in rows}
    yan = {(row["file"], row["batch_size"], row["target_length"]): row for row in rows if row["system"] == "yan"}
    columns = sorted({key[1:] for key in found})
    lines = []
    for system in dict.fromkeys(row["system"] for row in rows):
        cells = []
        for column in columns:
            row = found.get((system, *column))
            if row is None or system == "yan":
                cells.append("" if row is None else f"{1000 * row[clock]:.0f} ms")
                continue
            beside = yan.get((row["file"], *column)) or found[("yan", *column)]  # in its own run, where YAN was there
            cells.append(f"{1000 * row[clock]:.0f} ms ({_factor(row[clock] / beside[clock])})")
        lines.append([f"`{system}`", *cells])
    return grid(["system", *(f"batch {batch}, {length} tokens" for batch, length in columns)], lines)


def speed_profile() -> str:
    """What the time of a call in batches of 64 goes into at the `tiny` size, and its arithmetic."""
    found = result("speed_cpu_tiny_profile")
    rows = []
    for row in found["rows"]:
        seconds, total = row["profile"]["seconds"], sum(row["profile"]["seconds"].values())
        adds = row["profile"]["multiply_adds"]
        rate = f"{adds / row['latency_seconds'] / found['multiply_adds_per_second']:.0%}"
        shares = (f"{value / total:.0%}" for value in seconds.values())
        rows.append(
            [f"`{row['system']}`", f"{1000 * row['latency_seconds']:.0f} ms", f"{adds / 1e9:.1f} G", rate, *shares]
        )
    kinds = found["rows"][0]["profile"]["seconds"]
    return grid(["system", "a batch", "multiply-adds", "at a large product's rate", *kinds], rows)


def int8_products() -> str:
    """Times faster than float32."""
    rows, lines = result("int8_products")["rows"], []
    systems = [name for name in dict.fromkeys(row["system"] for row in rows) if name != "float32"]
    for shape in dict.fromkeys((row["tokens"], row["inputs"], row["outputs"]) for row in rows):
        found = {
            row["system"]: row["processor_seconds"]
            for row in rows
            if (row["tokens"], row["inputs"], row["outputs"]) == shape
        }
        cells = [f"{found['float32'] / found[name]:.1f}×" if name in found else "" for name in systems]
        lines.append([f"{shape[0]} × {shape[1]} → {shape[2]}", f"{1000 * found['float32']:.2f} ms", *cells])
    return grid(["tokens × inputs → outputs", "float32", *(f"`{name}`" for name in systems)], lines)


def int8_checkpoints() -> str:
    """What each kind of weights loses and gains, by checkpoint."""
    shown = {
        "restoration": {"word error rate": "word_error_rate", "punctuation F1": "punctuation_f1"},
        "infilling": {"fillings right": "fillings_right", "exact match": "exact_match"},
    }
    lines = []
    for task, metrics in shown.items():
        for kind, row in result(f"int8_{task}")["systems"].items():
            figures = ", ".join(f"{name} {percent(row['metrics'][key])}" for name, key in metrics.items())
            same = f"{percent(row['same_positions'])}, {percent(row['same_texts'])}"
            size, time = f"{row['file_bytes'] / 1e6:.1f} MB", f"{1000 * row['processor_seconds']:.1f} ms"
            lines.append([task, f"`{kind}`", size, time, figures, same])
    return grid(["checkpoint", "weights", "files", "a text", "quality", "positions and texts as in float32"], lines)


def cuda_code() -> str:
    """Operations and kernels of each program, both halves apart and together."""
    lines = []
    for name, programs in result("cuda_code")["programs"].items():
        cells = [f"{found['operations']} / {found['kernels']} / {found['binaries']}" for found in programs]
        lines.append([name, *cells])
    heading = ("the source", "the sampler", "both, lengths given")
    return grid(["model", *(f"{part}: operations / kernels / binaries" for part in heading)], lines)


def speed_cuda() -> str:
    """Lowest and highest beside the median: rounds on a GPU spread far."""
    lines = []
    rows = [row for name in ("gpu/speed", "gpu/speed_1024", "speed_cuda_base_batches") for row in result(name)["rows"]]
    places = {(row["batch_size"], row["target_length"]): row for row in rows if row["system"] == "yan-compiled"}
    for row in rows:
        low, median, high = (
            f"{1000 * value:.1f}" for value in sorted((*row["latency_range"], row["latency_seconds"]))
        )
        spread = f"{median} ms ({low} to {high}, {row['rounds']} rounds)"
        compiled = places[row["batch_size"], row["target_length"]]["latency_seconds"]
        slower = [_factor(row["times_slower_than_yan"]), _factor(row["latency_seconds"] / compiled)]
        lines.append([str(row["batch_size"]), str(row["target_length"]), f"`{row['system']}`", spread, *slower])
    heading = ["batch", "tokens", "system", "latency", "times slower than `yan`", "than `yan-compiled`"]
    return grid(heading, lines)


def speed_batches() -> str:
    rows = [row for row in result("speed_cpu_tiny")["rows"] if row["target_length"] == 64]
    batches = sorted({row["batch_size"] for row in rows})
    systems: dict[str, list[str]] = {}
    for row in rows:
        systems.setdefault(row["system"], []).append(_factor(row["times_slower_than_yan"]))
    systems.pop("yan")
    return grid(
        ["times slower than `yan`", *(f"batch {batch}" for batch in batches)],
        ([f"`{name}`", *cells] for name, cells in systems.items()),
    )


def routing_quality() -> str:
    """Distinct experts of a block, and the share of the quality kept, of the model that was fine-tuned for blocks."""
    rows = result("routing_quality")["rows"]
    reference, tuned = rows[0]["model"], rows[-1]["model"]
    thresholds, lines = (0.4, 0.6, 0.8, 1.0), []
    for size in dict.fromkeys(row["block_size"] for row in rows):
        (token,) = (row for row in rows if (row["model"], row["routing"]) == (reference, "token")
                    and row["block_size"] == size)  # fmt: skip
        found = {
            row["core_threshold"]: f"{row['distinct_experts']:.1f} ({percent(row['quality_kept'])})"
            for row in rows
            if (row["model"], row["routing"], row["block_size"]) == (tuned, "block", size)
        }
        name = "whole target" if size == "whole" else size
        lines.append([name, f"{token['distinct_experts']:.1f}", *(found[threshold] for threshold in thresholds)])
    return grid(["blocks of", "token routing", *(f"threshold {threshold}" for threshold in thresholds)], lines)


def routing() -> str:
    lines = []
    for name in ("routing_trained_cpu", "routing_cpu"):
        rows = result(name)["rows"]
        for token, block in zip(rows[::2], rows[1::2], strict=True):
            model = f"trained, width {token['hidden_size']}, threshold {block['core_threshold']}"
            if not token["trained"]:
                model = f"random weights, width {token['hidden_size']}"
            before, after = (1000 * row["latency_seconds"] for row in (token, block))
            digits = 1 if before < 100 else 0
            lines.append([
                model,
                str(token["num_experts"]),
                f"{token['distinct_experts_per_call']:.1f} → {block['distinct_experts_per_call']:.1f}",
                f"-{100 * block['fewer_bytes_than_token']:.0f} %",
                f"{before:.{digits}f} → {after:.{digits}f} ms ({block['times_faster_than_token']:.2f}×)",
            ])  # fmt: skip
    return grid(["model", "K", "experts touched, token → block", "expert bytes read", "latency"], lines)


def offload() -> str:
    systems: dict[str, list[str]] = {}
    for row in result("offload_cpu")["rows"]:
        if row["system"] == "resident":
            continue
        cells = systems.setdefault(row["system"], [_mebibytes(row["device_expert_bytes"])])
        copied, waited = (_mebibytes(row[name]) for name in ("bytes_copied", "bytes_waited_for"))
        cells += [copied, f"{waited} ({1000 * row['bus_seconds']:.1f} ms)" if row["bytes_waited_for"] else "0"]
    heading = ["system", "slots on the device", "token routing: copied", "waited for"]
    heading += ["block routing: copied", "waited for"]
    return grid(heading, ([name, *cells] for name, cells in systems.items()))


def mamba() -> str:
    """Seconds of `generate` by target length."""
    rows = [row for row in result("mamba_cpu")["rows"] if row["table"] == "generate"]
    counts = sorted({row["length"] for row in rows})
    systems: dict[str, list[str]] = {}
    for row in rows:
        systems.setdefault(row["system"], []).append(_seconds(row["seconds"]))
    heading = ["backbone", *(f"{count} tokens" for count in counts)]
    return grid(heading, ([f"`{name}`", *cells] for name, cells in systems.items()))


def examples() -> str:
    """What the examples' commands reach on the test rows, with predicted lengths in three steps."""
    rows = []
    for name in ("demo", "demo_mamba"):
        found = result(name)
        rows.append([name, percent(found["exact_match"]), "", f"{found['questions']:,}"])
    rows.append(["babi_qa1", percent(result("babi_qa1")["test_predicted_length"]["exact_match_mean"]), "", "1,000"])
    for name in ("sst2", "sst2_lora", "ag_news", "last_word", "squad", "stories_infilling"):
        found = result(f"example_{name}")
        (row,) = (row for row in found["results"] if (row["lengths"], row["steps"]) == ("predicted", 3))
        rows.append([f"example_{name}", percent(row["exact_match"]), f"{row['f1']:.2f}", f"{found['rows']:,}"])
    links = [[f"[{name}.json](../benchmarks/results/{name}.json)", *cells] for name, *cells in rows]
    return grid(["result", "exact match", "token F1", "test rows"], links)


def conformance() -> str:
    return summary_table(json.loads((ROOT / "modeling_tests/conformance/results.json").read_text()))


# Page → name of the table → what writes it.
def generation_options() -> str:
    """The options of `generate`, from their declarations."""
    lines = ["| option | meaning | values | default |", "| --- | --- | --- | --- |"]
    for name, option in OPTIONS.items():
        values = option.check.accepts if option.check else "as in Transformers"
        lines.append(f"| `{name}` | {option.help} | {values} | {option.default_text} |")
    return "\n".join(lines)


def gpu_profile() -> str:
    rows = [
        [
            f"{row['path']}, batch {row['batch_size']}",
            *(f"{1000 * row[name]:.1f} ms" for name in ("latency_seconds", "busy_seconds")),
            str(row["kernels"]),
            max(row["longest"], key=row["longest"].get).split("<")[0].split("(")[0].removeprefix("void "),
        ]
        for row in result("gpu/profile")["rows"]
    ]
    return grid(["path", "latency", "of it the device is busy", "kernels", "the longest, of all calls of it"], rows)


def gpu_attention() -> str:
    rows = [
        [row["attention"], f"{1000 * row['latency_seconds']:.1f} ms", f"{row['largest_difference']:.3f}"]
        for row in result("gpu/attention")["rows"]
        if row["available"]
    ]
    return grid(["attention", "encoder, batch 64", "largest difference of a state from eager's"], rows)


def gpu_offload() -> str:
    rows = [
        [
            row["routing"],
            row["system"],
            f"{1000 * row['latency_seconds']:.0f} ms",
            f"{row['device_bytes'] / 2**20:,.0f} MiB",
            *(f"{row.get(name, 0) / 2**20:,.0f} MiB" for name in ("bytes_copied", "bytes_waited_for")),
        ]
        for row in result("gpu/offload")["rows"]
    ]
    return grid(["routing", "system", "latency", "model on the device", "copied", "of it waited for"], rows)


def gpu_scans() -> str:
    """Rows of the two tables that `mamba.py` writes there: a scan by itself, and `generate` with either backbone."""
    found = result("gpu/scans")["rows"]
    lengths = sorted({row["length"] for row in found})
    rows: dict[str, list[str]] = {}
    for row in sorted(found, key=lambda row: row["length"]):
        name = f"{row['table']}, {row['mode']}: {row['system']}"
        rows.setdefault(name, []).append(f"{1000 * row['seconds']:.1f} ms")
    return grid(["", *(f"{length:,} tokens" for length in lengths)], ([name, *cells] for name, cells in rows.items()))


def gpu_tests() -> str:
    found = result("gpu/tests")
    passed = found["tests"] - found["failures"] - found["errors"] - found["skipped"]
    failed = str(found["failures"] + found["errors"] or "none")
    names = "".join(f" `{name.rpartition('::')[2]}`" for name in found["failed"])
    return f"Of the tests marked `gpu` {passed} passed, {found['skipped']} were skipped and {failed} failed.{names}"


def expert_table() -> str:
    rows = []
    for task, metrics in (
        ("restoration", ("word_error_rate", "punctuation_f1", "capitalization_f1")),
        ("infilling", ("fillings_right", "exact_match", "f1")),
    ):
        for kind, found in result(f"rewriting/{task}_experts")["kinds"].items():
            writers = [name for name, figures in found.items() if isinstance(figures, dict)]
            for name in writers:
                expert = name.removeprefix("expert ")
                share = f"{100 * found['gate_chose'][int(expert)]:.0f} %" if expert.isdigit() else ""
                figures = ", ".join(f"{metric} {100 * found[name][metric]:.1f} %" for metric in metrics)
                rows.append([f"{task}, {kind}", name, share, figures.replace("_", " ")])
    return grid(["paragraphs", "who writes", "the gate's choice", "result"], rows)


ENCODER_TASKS = {
    "sst2": ("SST-2, 1,000 rows", ("exact_match",)),
    "ag_news": ("AG News, 1,000 rows", ("exact_match",)),
    "squad_paragraph": ("SQuAD, the answer's paragraph", ("exact_match", "f1")),
    "fairytaleqa": ("FairytaleQA", ("exact_match", "f1")),
}


def encoder_quality() -> str:
    """Runs of a task, system and mode as one, with the mean over training seeds and their standard deviation."""
    groups: dict[tuple, list[dict]] = {}
    for path in sorted((RESULTS / "quality" / "encoders").glob("*.json")):
        run = json.loads(path.read_text())
        options = run["options"]
        mode = f"{options['encoder']}, {options['encoder_mode']}" if options["encoder"] else "its own"
        groups.setdefault((options["task"], options["system"], mode), []).append(run)
    order = {name: place for place, name in enumerate(ENCODER_TASKS)}
    rows = []
    for (task, system, mode), runs in sorted(groups.items(), key=lambda item: (order[item[0][0]], *item[0][1:])):
        chosen = [next(row for row in run["rows"] if row.get("num_inference_steps", 3) == 3) for run in runs]
        cells = []
        for metric in ENCODER_TASKS[task][1]:
            values = [row[metric] for row in chosen]
            spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{METRICS[metric]} {100 * mean(values):.1f}{spread} %")
        latency = f"{1000 * mean(row['latency_seconds'] for row in chosen):.0f} ms"
        sizes = f"{runs[0]['parameters'] / 1e6:.1f} M"
        minutes = f"{mean(run['training_minutes'] for run in runs):.1f}"
        rows.append([ENCODER_TASKS[task][0], f"`{system}`", mode, sizes, minutes, ", ".join(cells), latency])
    return grid(["task", "system", "encoder", "parameters", "minutes", "test rows", "latency, batch 1"], rows)


def training_steps() -> str:
    """A step of every system in both types, beside YAN's before, and the memory it takes."""
    rows = []
    for size in ("5m", "50m"):
        for dtype in ("float32", "bfloat16"):
            found = {row["variant"]: row for row in result(f"training_step_{size}_{dtype}")["rows"]}
            for name, row in found.items():
                if name.endswith(", before"):
                    continue
                before = found.get(f"{name}, before")
                cells = [f"{row['parameters'] / 1e6:.0f} M", f"`{dtype}`", name, f"{row['seconds']:.2f} s"]
                cells.append("" if before is None else f"{before['seconds'] / row['seconds']:.2f}×")
                cells += [f"{row['tokens_per_second']:,.0f}", _mebibytes(row["peak_memory_bytes"])]
                cells.append("" if before is None else _mebibytes(before["peak_memory_bytes"]))
                rows.append(cells)
    heading = ["parameters", "type", "system", "a step", "faster than before", "target tokens a second", "memory"]
    return grid([*heading, "before"], rows)


def training_copy() -> str:
    """Token losses of models that learn to copy, before and now."""
    rows = [
        [row["variant"], *(f"{loss:.2f}" for loss in row["token_losses"])]
        for row in result("training_copy_5m")["rows"]
    ]
    return grid(["system", *(f"tenth {number}" for number in range(1, len(rows[0])))], rows)


def training_time() -> str:
    """What runs of several lengths reach, and the processor minutes that they took."""
    runs = quality_report.load(RESULTS / "quality" / "time_to_quality")
    found = {(run["options"]["system"], run["steps"]): run for run in runs}
    steps = sorted({number for _, number in found})
    rows = []
    for system in ("yan", "ar-bart", "ar-gpt2"):
        of_system = [found[system, number] for number in steps]
        cells = (f"{percent(quality_report.at(run, 3))} after {run['training_minutes']:.1f} min" for run in of_system)
        rows.append([f"`{system}`", *cells])
    return grid(["system", *(f"{number:,} steps" for number in steps)], rows)


def memory() -> str:
    """What loading and writing texts take, beside other systems."""
    names = ("file", "loading", "generate", "three_texts")
    return grid(
        ["system", "file", "loading", "loading and a text of 64 tokens", "and three of them"],
        (
            [f"`{row['system']}`", *(_mebibytes(row[f"{name}_bytes"]) for name in names)]
            for row in result("memory_cpu_base")["rows"]
        ),
    )


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"results": results},
    "examples/README.md": {"examples": examples},
    "docs/quality.md": {
        "quality": quality,
        "runs": lambda: quality_report.table(list(_runs().values())),
        "runs-width-128": lambda: quality_report.table(list(_runs("quality/hidden_size_128").values())),
        "lengths": lengths,
        "ablations": ablations,
    },
    "docs/generation.md": {"generation-options": generation_options},
    "docs/speed.md": {
        "engines": partial(speed_engines, "speed_cpu_engines"),
        "engines-intel": partial(speed_engines, "speed_cpu_engines_intel"),
        "engines-tiny-intel": partial(speed_engines, "speed_cpu_engines_tiny_intel"),
        "engines-others": partial(speed_engines, "speed_cpu_engines_static", "speed_cpu_engines_others"),
        "engines-two-threads": partial(
            speed_engines, "speed_cpu_engines_two_threads", "speed_cpu_engines_two_threads_ct2"
        ),
        "engines-batches": partial(speed_engines, "speed_cpu_engines_batches", "speed_cpu_engines_batches_ct2"),
        # Others used the processor, so that its own time counts.
        "tiny-profile": speed_profile,
        "engines-tiny": partial(speed_engines, "speed_cpu_engines_tiny", clock="processor_seconds"),
        "int8-checkpoints": int8_checkpoints,
        "int8-products": int8_products,
        "speed": speed,
        "speed-cuda": speed_cuda,
        "cuda-code": cuda_code,
        "training-steps": training_steps,
        "training-copy": training_copy,
        "training-time": training_time,
        "memory": memory,
        "batches": speed_batches,
    },
    "docs/experts.md": {
        "multimodal": multimodal.table,
        "coherence": coherence.table,
        "coherence-steps": partial(coherence.table, coherence.BY_STEPS),
        "routing-quality": routing_quality,
        "routing": routing,
        "offload": offload,
    },
    "docs/encoders.md": {"encoder-quality": encoder_quality},
    "docs/gpu.md": {
        "gpu-profile": gpu_profile,
        "gpu-tests": gpu_tests,
        "gpu-attention": gpu_attention,
        "gpu-offload": gpu_offload,
        "gpu-scans": gpu_scans,
    },
    "docs/mamba.md": {"mamba": mamba},
    "docs/rewriting.md": {
        "rewriting": lambda: rewriting_report.table(result("rewriting/restoration")),
        "rewriting-fast": lambda: rewriting_report.table(result("rewriting/restoration_fast")),
        "rewriting-all": lambda: rewriting_report.table(result("rewriting/restoration_all_systems")),
        "rewriting-experts": expert_table,
        "infilling": lambda: rewriting_report.table(result("rewriting/infilling")),
    },
    "docs/reliability.md": {"reliability": lambda: reliability.table(result("reliability"))},
    "docs/compatibility.md": {"conformance": conformance},
}


def write_tables(root: Path = ROOT):
    """Writes every table into the pages below `root`."""
    for page, tables in TABLES.items():
        for name, make in tables.items():
            write_between_markers(root / page, name, make().strip())


if __name__ == "__main__":
    write_tables()
