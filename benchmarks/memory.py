# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The memory that a process needs to load a checkpoint and to write a text with it, beside other models of the size.

    python benchmarks/memory.py --size base --output benchmarks/results/memory_cpu_base.json

Every system is saved once and loaded in a process of its own. Peaks are the operating system's (all resident
pages, mapped files among them), beyond what the process had after its imports: after `from_pretrained`, and
after `generate` has written `--length` tokens for a source of 64, greedily, once and three times. Linux and the CPU;
random weights.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from decoders import SIZES, matching_model
from report import save
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from yan_hf import YanConfig, YanForConditionalGeneration, YanInt8Config


LOADERS = {
    "yan": AutoModelForSeq2SeqLM,
    "yan-bfloat16": AutoModelForSeq2SeqLM,
    "yan-int8": AutoModelForSeq2SeqLM,
    "ar-gpt2": AutoModelForCausalLM,
    "ar-bart": AutoModelForSeq2SeqLM,
}


def save_systems(folder: Path, size: str, length: int):
    """A checkpoint of random weights for each system."""
    torch.manual_seed(0)
    config = YanConfig(max_position_embeddings=max(1024, length), **SIZES[size])
    yan = YanForConditionalGeneration(config)
    yan.save_pretrained(folder / "yan")
    for name in ("ar-gpt2", "ar-bart"):
        matching_model(name, config, yan.num_parameters(), 2 * config.max_position_embeddings).save_pretrained(
            folder / name
        )
    quantised = type(yan).from_pretrained(folder / "yan", quantization_config=YanInt8Config())
    quantised.save_pretrained(folder / "yan-int8")
    yan.to(torch.bfloat16).save_pretrained(folder / "yan-bfloat16")


def peak() -> int:
    """Most bytes that this process has had resident. (`ru_maxrss` would be no less than the parent's.)"""
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()).group(1))


def measure(system: str, folder: Path, length: int) -> dict[str, object]:
    """Loads and generates, in this process."""
    before = peak()
    model = LOADERS[system].from_pretrained(folder / system).eval()
    loaded = peak()
    ids = torch.randint(5, model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    if system.startswith("yan"):
        choices = {"target_lengths": length, "expert_selection": "greedy"}
    else:
        new = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
        choices = {"attention_mask": torch.ones_like(ids), **new}
    model.generate(ids, **choices)
    once = peak()
    for _ in range(2):  # the second call of YAN in float32 keeps weights in the layout of its products
        model.generate(ids, **choices)
    return {
        "system": system,
        "parameters": model.num_parameters(),
        "file_bytes": sum(file.stat().st_size for file in (folder / system).glob("*.safetensors")),
        "loading_bytes": loaded - before,
        "generate_bytes": once - before,
        "three_texts_bytes": peak() - before,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--length", type=int, default=64, help="target tokens")
    parser.add_argument("--system", choices=LOADERS, help="measure this one in this process and print it as JSON")
    parser.add_argument("--folder", type=Path, help="with --system: the saved systems")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.system:
        print(json.dumps(measure(options.system, options.folder, options.length)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        # Apart, so that nothing of it is in a measured process.
        save_systems(Path(folder), options.size, options.length)
        for system in LOADERS:
            arguments = ["--system", system, "--folder", folder, "--length", str(options.length)]
            command = [sys.executable, __file__, *arguments]
            lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
            rows.append(row := json.loads(lines[-1]))
            sizes = {name: f"{row[name] / 2**20:.0f} MiB" for name in row if name.endswith("bytes")}
            print(f"{system:14} {sizes}", flush=True)
    if options.output:
        save(options.output, {"settings": {"size": options.size, "length": options.length}, "rows": rows})


if __name__ == "__main__":
    main()
