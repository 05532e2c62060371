# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Trains a small YAN from scratch on simulated bAbI stories, saves it, reloads it in a new process and asks it.

    python examples/demo.py [--output runs/demo] [--seed 0]

Stage 1 teaches the encoder to read: an auto-encoder whose masked span is the answer. Stage 2 trains the flow to write
the answer. Both see fresh stories at every step, short ones first; a story grows by one statement each time the running
exact match passes 95 %. Held-out questions come from a seed that training never uses.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import IterableDataset
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from yan_hf import YanConfig, YanDataCollator, YanForAutoEncoding, YanForConditionalGeneration, exact_match, train_tokenizer
from yan_hf.babi import BabiExample, simulate, simulate_many


MAX_STATEMENTS = 4
HELD_OUT_SEED = 2**31 - 1


def question(example: BabiExample, mask_token: str) -> str:
    """Story, question and the mask token where the answer belongs."""
    return f"{' '.join(example.context)} {example.question} {mask_token}"


def answer(example: BabiExample) -> str:
    """The whole sentence that YAN writes."""
    return f"{example.question.split()[-1][:-1]} is in the {example.answer}."


class Curriculum:
    """How long stories are now, raised when the running exact match passes 95 %."""

    def __init__(self, start: int, goal: float):
        self.num_statements = start
        self.goal = goal
        self.running = 0.0
        self.finished = False

    def update(self, accuracy: float):
        self.running += 0.1 * (accuracy - self.running)
        if self.num_statements < MAX_STATEMENTS:
            if self.running > 0.95:
                self.num_statements += 1
                self.running = 0.5
        else:
            self.finished = self.running > self.goal


class FreshStories(IterableDataset):
    """An endless stream of new stories, each with 1 statement up to as many as the curriculum allows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, curriculum: Curriculum, stage: int, seed: int):
        self.tokenizer, self.curriculum, self.stage, self.seed = tokenizer, curriculum, stage, seed

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        rng = np.random.default_rng([self.seed, self.stage])
        while True:
            example = simulate(int(rng.integers(1, self.curriculum.num_statements + 1)), rng)
            source = self.tokenizer(question(example, self.tokenizer.mask_token))["input_ids"]
            if self.stage == 1:
                # One token for the place: its label stands where the mask is, and nothing else counts.
                (place,) = self.tokenizer(f" {example.answer}", add_special_tokens=False)["input_ids"]
                labels = [place if token == self.tokenizer.mask_token_id else -100 for token in source]
            else:
                labels = self.tokenizer(answer(example))["input_ids"]
            yield {"input_ids": source, "labels": labels}


class CurriculumTrainer(Trainer):
    """A `Trainer` that tells the curriculum how many rows of each batch came out right."""

    curriculum: Curriculum

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        labels = inputs["labels"]
        right = (outputs.logits.argmax(-1) == labels) | (labels == -100)
        self.curriculum.update(right.all(dim=-1).float().mean().item())
        return (loss, outputs) if return_outputs else loss


class StopWhenSolved(TrainerCallback):
    """Ends the stage when the longest stories are solved, and shows the curriculum in the progress bar's log."""

    def __init__(self, curriculum: Curriculum, seconds: float):
        self.curriculum, self.deadline = curriculum, time.monotonic() + seconds

    def on_step_end(self, args, state, control, **kwargs):
        if self.curriculum.finished or time.monotonic() > self.deadline:
            control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is not None and "loss" in logs:
            logs["statements"] = self.curriculum.num_statements
            logs["exact_match"] = round(self.curriculum.running, 3)


def train_stage(model, tokenizer, stage: int, start: int, options: argparse.Namespace, seconds: float) -> Curriculum:
    """One training stage, at most `seconds` long."""
    curriculum = Curriculum(start, goal=0.985 if stage == 1 else 0.995)
    arguments = TrainingArguments(
        output_dir=str(options.output / f"stage{stage}"),
        max_steps=options.max_steps,
        per_device_train_batch_size=64,
        learning_rate=2e-3 if stage == 1 else 1e-3,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=50,
        adam_beta2=0.98,
        weight_decay=0.01,
        logging_steps=200,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        seed=options.seed,
    )
    trainer = CurriculumTrainer(
        model=model,
        args=arguments,
        train_dataset=FreshStories(tokenizer, curriculum, stage, options.seed),
        data_collator=YanDataCollator(tokenizer),
        callbacks=[StopWhenSolved(curriculum, seconds)],
    )
    trainer.curriculum = curriculum
    trainer.train()
    return curriculum


def train(options: argparse.Namespace) -> Path:
    """Both stages; returns the checkpoint's folder."""
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
        num_experts=4,
        max_position_embeddings=128,
        initializer_range=0.1,
        loss_weights=json.loads(options.weights),
        experts_implementation="eager",
    )
    reader = YanForAutoEncoding(config)
    print(f"Stage 1: the encoder learns to read ({reader.num_parameters():,} parameters).", flush=True)
    reading = train_stage(reader, tokenizer, 1, 1, options, seconds=options.seconds * 0.6)
    folder = options.output / "reader"
    reader.save_pretrained(folder)
    print(f"Read stories of {reading.num_statements} statements after {time.monotonic() - started:.0f} s.", flush=True)

    logging.set_verbosity_error()  # the new flow's missing keys are expected
    model = YanForConditionalGeneration.from_pretrained(folder, experts_implementation="eager")
    print(f"Stage 2: the flow learns to write the answer ({model.num_parameters():,} parameters).", flush=True)
    left = options.seconds - (time.monotonic() - started)
    writing = train_stage(model, tokenizer, 2, options.start2, options, seconds=left)
    folder = options.output / "checkpoint"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(
        f"Trained in {time.monotonic() - started:.0f} s, stories of {writing.num_statements} statements, running exact "
        f"match {writing.running:.3f}; saved to {folder}.",
        flush=True,
    )
    return folder


def ask(folder: Path, count: int) -> dict[str, float]:
    """Loads a checkpoint through the Auto classes and asks held-out questions, with predicted lengths."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    examples = simulate_many(count, (1, MAX_STATEMENTS), seed=HELD_OUT_SEED)
    sources = [question(example, tokenizer.mask_token) for example in examples]
    predictions, tokens, passes, seconds = [], 0, 0, 0.0
    set_seed(0)
    for start in range(0, count, 100):
        batch = tokenizer(sources[start : start + 100], return_tensors="pt", padding=True)
        began = time.perf_counter()
        output = model.generate(**batch, num_inference_steps=3, return_dict_in_generate=True)
        seconds += time.perf_counter() - began
        tokens += int(output.lengths.sum())
        passes = output.num_field_evaluations
        predictions += tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
    quality = exact_match(predictions, [answer(example) for example in examples])
    for example, prediction in list(zip(examples, predictions))[:4]:
        print(f"\n  {' '.join(example.context)}\n  {example.question}  ->  {prediction}")
    print(f"\nExact match on {count} held-out questions, predicted lengths: {quality:.1%}")
    print(f"Tokens per second in batches of 100: {tokens / seconds:,.0f}; trunk passes per answer: {passes}")
    return {"exact_match": quality, "tokens_per_second": tokens / seconds, "trunk_passes": passes}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=290, help="training stops then at the latest")
    parser.add_argument("--max-steps", type=int, default=20_000, help="most steps of a stage")
    parser.add_argument("--ask", type=Path, help="only ask the checkpoint in this folder")
    parser.add_argument("--questions", type=int, default=1000, help="number of held-out questions")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--weights", default='{"flow":0.01,"latent":0.01,"token":1.0,"mmd":0,"l2":0.01,"load_balance":0.1,"length":0.1}')
    parser.add_argument("--start2", type=int, default=3)
    options = parser.parse_args()
    if options.ask is None:
        folder = train(options)
        print("Reloading in a new process.", flush=True)
        command = [sys.executable, __file__, "--ask", str(folder), "--questions", str(options.questions)]
        if options.json:
            command += ["--json", str(options.json)]
        sys.exit(subprocess.call(command))
    result = ask(options.ask, options.questions)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
