# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Writes pairs of texts for restoration, spoilt and clean, whose marks and capitals are an autoregressive model's choice.

    python benchmarks/distil.py --teacher checkpoints/rival --train-file documents.jsonl.gz --output pairs.jsonl.gz
    python examples/finetune.py examples/configs/restoration_distilled.yaml --model checkpoints/restoration \\
        --train_file pairs.jsonl.gz

Distillation at the level of sequences (Kim and Rush 2016, arXiv 1606.07947): where a comma may stand or not, a model
that writes all at once learns one way to do it rather than a mean of several. Words that the teacher spells as the
document does are the teacher's, all others the document's: its mistakes are not handed on. It writes greedily, in
CTranslate2 (`pip install ctranslate2`): some 120 paragraphs of 64 tokens a second on one core.
"""

import argparse
import gzip
import json
import re
import sys
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path

import torch
from ctranslate import rewriter
from rewriting import data_arguments
from rewriting_systems import load_model, load_tokenizer

from yan_hf.data.tokenization import encode_text


sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

from common import encode_splits, read_splits, task_encoder


_MARKS = re.compile(r"\W+")


def follow(reference: str, written: str) -> str:
    """The reference with the other text's form of the words that both spell alike, but for case and marks."""
    words = [text.split(" ") for text in (reference, written)]
    keys = [[_MARKS.sub("", word).casefold() for word in each] for each in words]
    found = []
    for name, start, end, first, last in SequenceMatcher(None, *keys, autojunk=False).get_opcodes():
        found += words[1][first:last] if name == "equal" else words[0][start:end]
    return " ".join(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="an `ar-bart` of benchmarks/rewriting.py")
    parser.add_argument("--train-file", required=True, help="documents, in the column `text`")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, compressed: `source` and `target`")
    parser.add_argument("--rows", type=int, default=100_000, help="paragraphs")
    parser.add_argument("--max-tokens", type=int, default=88, help="longer paragraphs are left out")
    parser.add_argument("--seed", type=int, default=0)
    options, rest = parser.parse_known_args()
    data = data_arguments("restoration", ["--train_file", options.train_file, *rest])
    tokenizer = load_tokenizer(options.teacher)
    corruption = task_encoder(data, tokenizer).corruption
    rows = encode_splits({"train": read_splits(data)["train"]}, tokenizer, data)["train"].shuffle(seed=options.seed)
    rows = rows.filter(lambda row: len(row["labels"]) <= options.max_tokens)
    rows = rows.take(min(options.rows, len(rows)))
    torch.set_num_threads(1)
    decode = partial(tokenizer.batch_decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write = rewriter(load_model("ar-bart", options.teacher), "float32")
    with gzip.open(options.output, "wt") as file:
        for batch in rows.iter(512):
            texts = decode(batch["labels"])
            sources = [corruption(text, options.seed) for text in texts]
            written = write(encode_text(tokenizer, sources, max_length=data.max_source_length), 2 * options.max_tokens)
            for source, text, other in zip(sources, texts, decode(written)):
                file.write(json.dumps({"source": source, "target": follow(text, other)}) + "\n")
    print(f"{len(rows)} pairs in {options.output}")


if __name__ == "__main__":
    main()
