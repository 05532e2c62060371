# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Trains a small YAN from scratch on simulated bAbI stories, saves it, reloads it in a new process and evaluates it.

    python examples/demo.py [--output runs/demo] [--seed 0] [--backbone mamba]

Stage 1 trains encoder and decoder: an auto-encoder whose masked span is the answer. Stage 2 trains the flow to
generate the answer. Both see fresh stories at every step, short ones first; stories grow by one statement when the
running exact match passes 95 %. Held-out questions come from a seed that training never uses.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from babi import BabiExample, simulate, simulate_many
from curriculum import Curriculum, CurriculumStream, as_masked_answer, train_by_curriculum
from datasets import Dataset
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, set_seed
from transformers.utils import logging

from yan_hf import (
    YanConfig,
    YanDataCollator,
    YanForAutoEncoding,
    YanForConditionalGeneration,
    encode_pairs,
    exact_match,
    train_tokenizer,
)
from yan_hf.configuration_yan import BACKBONES
from yan_hf.data.tasks import TextPair
from yan_hf.data.tokenization import MASK_MARKER
from yan_hf.evaluation.evaluate import generate_examples


MAX_STATEMENTS = 3
BATCH_SIZE = 64
HELD_OUT_SEED = 2**31 - 1


def question(example: BabiExample, mask: str = MASK_MARKER) -> str:
    """Story, question and the mask where the answer belongs."""
    return f"{' '.join(example.context)} {example.question} {mask}"


def answer(example: BabiExample) -> str:
    """The whole sentence that YAN generates."""
    return f"{example.question.split()[-1][:-1]} is in the {example.answer}."


def train_stage(model, tokenizer, autoencoder: bool, options: argparse.Namespace, seconds: float) -> Curriculum:
    """One training stage, at most `seconds` long."""
    # The auto-encoder learns the place, one token; the flow, whose encoder knows it by then, the whole sentence.
    curriculum = Curriculum(MAX_STATEMENTS, goal=0.985 if autoencoder else 0.998, level=1 if autoencoder else 2)

    def make(rng: np.random.Generator, level: int) -> TextPair:
        example = simulate(int(rng.integers(1, level + 1)), rng)
        return TextPair(question(example), f" {example.answer}" if autoencoder else answer(example))

    view = as_masked_answer if autoencoder else None
    stream = CurriculumStream(make, tokenizer, curriculum, view, BATCH_SIZE, options.seed)
    rate = 2e-3 if autoencoder else 1e-3
    train_by_curriculum(model, stream, options.output / "trainer", seconds, rate, logging_steps=200)
    return curriculum


def train(options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Both stages; returns the checkpoint's folder, and what there is to report about training."""
    started = time.monotonic()
    set_seed(options.seed)
    examples = simulate_many(500, MAX_STATEMENTS, seed=options.seed)
    texts = [f"{question(example, '')}{answer(example)}" for example in examples]
    # Byte pairs of a small world merge into whole words.
    tokenizer = train_tokenizer(texts, vocab_size=450, model_type="bpe")
    config = YanConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_attention_heads=4,
        encoder_layers=3,
        flow_layers=2,
        decoder_layers=1,
        encoder_backbone=options.backbone,
        flow_backbone=options.backbone,
        max_position_embeddings=128,
        initializer_range=0.1,
        # On the CPU the plain loop over experts is faster than the grouped kernel.
        experts_implementation="eager",
        # Two thousand latents against as many normal ones (mmd) cost more than the encoder.
        **{"num_experts": 4, "loss_weights": {"mmd": 0.0}, **options.config},
    )
    autoencoder = YanForAutoEncoding(config)
    print(f"Stage 1: the auto-encoder ({autoencoder.num_parameters():,} parameters).", flush=True)
    first = train_stage(autoencoder, tokenizer, True, options, seconds=options.seconds * 0.6)
    autoencoder.save_pretrained(options.output / "autoencoder")
    seconds = time.monotonic() - started
    print(f"Knows the answers of stories of {first.level} statements after {seconds:.0f} s.", flush=True)

    logging.set_verbosity_error()  # the flow's keys are missing, as they should
    model = YanForConditionalGeneration.from_pretrained(options.output / "autoencoder", experts_implementation="eager")
    logging.set_verbosity_warning()
    print(f"Stage 2: the flow learns to generate the answer ({model.num_parameters():,} parameters).", flush=True)
    second = train_stage(model, tokenizer, False, options, seconds=options.seconds - seconds)
    if config.expert_scope != "token":
        model.generation_config.expert_selection = "greedy"  # one answer is right, not one drawn from the gate
    folder = options.output / "checkpoint"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(
        f"Trained in {time.monotonic() - started:.0f} s, stories of {second.level} statements, running exact match "
        f"{second.running:.3f}; saved to {folder}.",
        flush=True,
    )
    training = {
        "training_seconds": round(time.monotonic() - started),
        "parameters": model.num_parameters(),
        "statements": MAX_STATEMENTS,
        "backbone": options.backbone,
        "config": options.config,
        "seed": options.seed,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return folder, training


def evaluate(folder: Path, count: int) -> dict[str, Any]:
    """Loads a checkpoint through the Auto classes and answers held-out questions, with predicted lengths."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    examples = simulate_many(count, (1, MAX_STATEMENTS), seed=HELD_OUT_SEED)
    pairs = encode_pairs(tokenizer, list(map(question, examples)), list(map(answer, examples)))
    predictions, answers, figures = generate_examples(
        model, tokenizer, Dataset.from_dict(pairs), YanDataCollator(tokenizer), batch_size=100, num_inference_steps=3
    )
    quality = exact_match(predictions, answers)
    for example, prediction in list(zip(examples, predictions))[:4]:
        print(f"\n  {' '.join(example.context)}\n  {example.question}  ->  {prediction}")
    print(f"\nExact match on {count} held-out questions, predicted lengths: {quality:.1%}")
    by_statements = {}
    for size in range(1, MAX_STATEMENTS + 1):
        rows = [row for row, example in enumerate(examples) if len(example.context) == size]
        if rows:
            texts = [predictions[row] for row in rows], [answers[row] for row in rows]
            by_statements[size] = exact_match(*texts)
    print("By number of statements: " + ", ".join(f"{size}: {match:.1%}" for size, match in by_statements.items()))
    rate, passes = figures["tokens_per_second"], figures["num_field_evaluations"]
    print(f"Tokens per second in batches of 100: {rate:,.0f}; passes of the flow per answer: {passes}")
    return {
        "questions": count,
        "exact_match": quality,
        "exact_match_by_statements": by_statements,
        "tokens_per_second": rate,
        "trunk_passes": passes,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="files of an earlier run are replaced")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backbone", choices=BACKBONES, default="transformer", help="of encoder and flow")
    parser.add_argument("--config", type=json.loads, default={}, help="fields of YanConfig, as JSON")
    parser.add_argument("--seconds", type=float, default=290, help="training stops then at the latest")
    parser.add_argument("--evaluate", type=Path, help="only evaluate the checkpoint in this folder")
    parser.add_argument("--questions", type=int, default=1000, help="number of held-out questions")
    parser.add_argument("--json", type=Path, help="file for the result (default: result.json in --output)")
    options = parser.parse_args()
    report = options.json or options.output / "result.json"
    if options.evaluate is not None:
        result = evaluate(options.evaluate, options.questions)
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps(result, indent=2) + "\n")
        return
    folder, training = train(options)
    print("Reloading in a new process.", flush=True)
    command = [sys.executable, __file__, "--evaluate", str(folder), "--questions", str(options.questions)]
    if status := subprocess.call([*command, "--json", str(report)]):
        sys.exit(status)
    result = {**json.loads(report.read_text()), **training}
    report.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
