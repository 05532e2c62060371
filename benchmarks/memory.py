# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Most memory that a process holds while it loads a model and while it generates, beside other systems of the size.

    python benchmarks/memory.py --size base --output benchmarks/results/memory_cpu_base.json

Each system runs in a process of its own, on Linux: the peak of its resident memory (which the kernel counts anew for
each phase) less what it held before the model. Random weights, source and target of 64 tokens, batch 1; the vocabulary
head's copy in 8 bits, which the float32 model makes at its first call, is part of the peak.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from ctranslate import convert, load
from decoders import SIZES, matching_model
from report import save
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from yan_hf import YanConfig, YanForConditionalGeneration, YanInt8Config


SYSTEMS = ("yan", "yan-bfloat16", "yan-int8", "ar-gpt2", "ar-bart", "ct2-gpt2", "ct2-bart")
LENGTH = 64


def memory(name: str) -> int:
    """Bytes of `VmRSS` or `VmHWM`, what is held and its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


def measure(system: str, folder: str) -> dict[str, int]:
    """Loads and generates, in this process."""
    torch.set_num_threads(1)
    ids = torch.randint(5, 1000, (1, LENGTH))
    forget_peak()
    before = memory("VmRSS")
    if system.startswith("ct2"):
        model = load(folder, system == "ct2-bart", "float32")
    else:
        auto = AutoModelForCausalLM if system == "ar-gpt2" else AutoModelForSeq2SeqLM
        model = auto.from_pretrained(folder, dtype="auto").eval()
    found = {"loading_bytes": memory("VmHWM") - before, "loaded_bytes": memory("VmRSS") - before}
    forget_peak()
    if system.startswith("ct2"):
        model(ids, LENGTH)
    elif system.startswith("yan"):
        model.generate(ids, target_lengths=LENGTH)
    else:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, min_new_tokens=LENGTH)
    return {**found, "generating_bytes": memory("VmHWM") - before}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("SYSTEM", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return

    torch.manual_seed(0)
    config, rows = YanConfig(**SIZES[options.size]), []
    for system in options.systems:
        with tempfile.TemporaryDirectory() as folder:
            model = YanForConditionalGeneration(config)
            if system in ("ar-gpt2", "ar-bart", "ct2-gpt2", "ct2-bart"):
                model = matching_model(f"ar-{system[-4:]}", config, model.num_parameters(), 2048)
            if system == "yan-bfloat16":
                model.to(torch.bfloat16)
            if system.startswith("ct2"):
                convert(model, folder, "float32")
            else:
                model.save_pretrained(folder)
            if system == "yan-int8":
                model = type(model).from_pretrained(folder, quantization_config=YanInt8Config())
                model.save_pretrained(folder)
            del model
            command = [sys.executable, __file__, "--one", system, folder]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            weights = sum(
                file.stat().st_size for file in Path(folder).iterdir() if file.suffix in (".safetensors", ".bin")
            )
        rows.append({"system": system, "file_bytes": weights, **json.loads(printed.splitlines()[-1])})
        print(rows[-1], flush=True)
    if options.output:
        save(options.output, {"size": options.size, "length": LENGTH, "rows": rows})


if __name__ == "__main__":
    main()
