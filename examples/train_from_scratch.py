# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Trains YAN for question answering on a local JSON Lines file or a data set of the Hub, and evaluates it.

    python examples/train_from_scratch.py --train babi_qa1/train.jsonl.gz --validation babi_qa1/validation.jsonl.gz \\
        --test babi_qa1/test.jsonl.gz --output runs/babi

    python examples/train_from_scratch.py --dataset OWNER/NAME --context passage --output runs/mine

Rows hold a context (a text or a list of statements), a question and an answer. Without `--model`, tokenizer and model
are made from the training rows in two stages: encoder and decoder as an auto-encoder whose masked span is the answer,
then the flow, which learns to generate it. With `--model` only the second stage runs. Both go from short contexts to
long ones. Where rows name the statements that their answer rests on (`--support`), training rows are thinned at
random to the level's number of statements, the supporting ones kept. The checkpoint with the best exact match on
validation rows is kept; the test rows are used once, at the end, with predicted lengths and with the true ones.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from curriculum import Curriculum, CurriculumStream, as_masked_answer, thinned, train_by_curriculum
from datasets import Dataset, DatasetDict, load_dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    HfArgumentParser,
    TrainerCallback,
    set_seed,
)
from transformers.utils.logging import tqdm

from yan_hf import (
    YanConfig,
    YanDataCollator,
    YanForAutoEncoding,
    YanForConditionalGeneration,
    encode_pairs,
    exact_match,
    prepare_tokenizer,
    train_tokenizer,
)
from yan_hf.data.files import check_not_input
from yan_hf.data.tasks import TextPair, question_answering
from yan_hf.data.tokenization import MASK_MARKER
from yan_hf.evaluation.evaluate import generate_examples


@dataclass
class Options:
    """What to train on, and how long."""

    output: Path = field(
        metadata={"help": "folder for the trained checkpoint; files of an earlier run there are replaced"}
    )
    train: str | None = field(default=None, metadata={"help": "JSON Lines file, .gz or not"})
    validation: str | None = field(default=None, metadata={"help": "JSON Lines file"})
    test: str | None = field(default=None, metadata={"help": "JSON Lines file"})
    dataset: str | None = field(default=None, metadata={"help": "name for datasets.load_dataset, instead of files"})
    dataset_config: str | None = field(default=None, metadata={"help": "its configuration"})
    context: str = field(default="context", metadata={"help": "column of the context: a text or a list of texts"})
    question: str = field(default="question", metadata={"help": "column of the question"})
    answer: str = field(default="answer", metadata={"help": "column of the answer"})
    support: str = field(default="support", metadata={"help": "column of the supporting statements, if there is one"})
    model: str | None = field(
        default=None, metadata={"help": "checkpoint to start from; by default a new small model"}
    )
    autoencoder_steps: int = field(default=9000, metadata={"help": "optimiser steps of the first stage"})
    flow_steps: int = field(default=3000, metadata={"help": "optimiser steps of the second stage"})
    batch_size: int = 64
    learning_rate: float = 1e-3
    hidden_size: int = 64
    encoder_layers: int = 3
    vocab_size: int = 600
    eval_steps: int = field(default=100, metadata={"help": "steps between evaluations in the second stage"})
    seed: int = 0


def read_rows(options: Options) -> DatasetDict:
    """The splits, checked for the columns."""
    if (options.train is None) == (options.dataset is None):
        raise SystemExit(
            "train_from_scratch.py: give --train (with --validation and --test) or --dataset, one of the two."
        )
    if options.train is not None:
        files = {split: getattr(options, split) for split in ("train", "validation", "test")}
        splits = load_dataset("json", data_files={split: name for split, name in files.items() if name})
    else:
        splits = load_dataset(options.dataset, options.dataset_config)
    for split in ("train", "validation"):
        if split not in splits:
            raise SystemExit(f"train_from_scratch.py: there is no {split} split, but {', '.join(splits)}.")
    for split, rows in splits.items():
        for column in (options.context, options.question, options.answer):
            if column not in rows.column_names:
                raise SystemExit(
                    f"train_from_scratch.py: {split} has no column `{column}`, but {', '.join(rows.column_names)}."
                )
    return splits


class Questions:
    """The rows of a split as source and target texts, thinned to a number of statements where that is possible."""

    def __init__(self, rows: Any, options: Options):
        self.rows = []
        for row in rows:
            context = row[options.context]
            statements = [context] if isinstance(context, str) else list(context)
            support = row.get(options.support) if len(statements) > 1 else None
            self.rows.append((statements, row[options.question], row[options.answer], support))
        self.rows.sort(key=lambda row: sum(map(len, row[0])))
        self.thinnable = all(support for _, _, _, support in self.rows)
        self.num_levels = max(len(statements) for statements, *_ in self.rows) if self.thinnable else 5

    def pair(self, statements: list[str], question: str, answer: str) -> TextPair:
        return question_answering(" ".join(statements), question, answer)

    def pairs(self) -> list[TextPair]:
        return [self.pair(statements, question, answer) for statements, question, answer, _ in self.rows]

    def draw(self, rng: np.random.Generator, level: int) -> TextPair:
        """A random row with up to `level` statements, or of the shortest `level` fifths of the rows."""
        if not self.thinnable:
            statements, question, answer, _ = self.rows[rng.integers(max(1, len(self.rows) * level // 5))]
            return self.pair(statements, question, answer)
        count = int(rng.integers(1, level + 1))
        while True:
            statements, question, answer, support = self.rows[rng.integers(len(self.rows))]
            if len(support) <= count <= len(statements) or level < len(support):
                break
        return self.pair(thinned(statements, support, count, rng), question, answer)


def evaluate_pairs(model, tokenizer, pairs: list[TextPair], true_lengths: bool = False, seed: int = 0):
    """Exact match and speed on all pairs, in batches of 250, three solver steps."""
    examples, training = Dataset.from_dict(encode_pairs(tokenizer, *zip(*pairs))), model.training
    predictions, _, figures = generate_examples(
        model.eval(), tokenizer, examples, YanDataCollator(tokenizer), true_lengths, seed, 250, num_inference_steps=3
    )
    model.train(training)
    match = exact_match(predictions, [pair.target for pair in pairs])
    return {"exact_match": match, "tokens_per_second": figures["tokens_per_second"]}


class KeepBest(TrainerCallback):
    """Generates answers for validation rows now and then, and saves the best checkpoint so far."""

    def __init__(self, tokenizer, pairs: list[TextPair], folder: Path, every: int):
        self.tokenizer, self.pairs, self.folder, self.every = tokenizer, pairs, folder, every
        self.best = -1.0

    def evaluate(self, model):
        match = evaluate_pairs(model, self.tokenizer, self.pairs)["exact_match"]
        if match > self.best:
            self.best = match
            model.save_pretrained(self.folder)
            self.tokenizer.save_pretrained(self.folder)
        return match

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            match = self.evaluate(model)
            tqdm.write(f"step {state.global_step}: validation exact match {match:.3f}, best {self.best:.3f}")


def train_stage(model, tokenizer, questions: Questions, autoencoder: bool, options: Options, callbacks: list):
    """One stage, from short contexts to long ones."""
    levels = questions.num_levels
    # No goal: the falling rate of the last third of the steps is worth more than the minutes saved.
    curriculum = Curriculum(levels, goal=2.0, threshold=0.94, level=1 if autoencoder else max(1, levels // 2))
    steps = options.autoencoder_steps if autoencoder else options.flow_steps
    view = as_masked_answer if autoencoder else None
    stream = CurriculumStream(questions.draw, tokenizer, curriculum, view, options.batch_size, options.seed)
    train_by_curriculum(
        model,
        stream,
        options.output / "trainer",
        None,
        options.learning_rate,
        callbacks,
        max_steps=steps,
        logging_steps=500,
    )


def main():
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    started = time.monotonic()
    set_seed(options.seed)
    for name in ("checkpoint", "autoencoder"):
        check_not_input(options.output / name, options.model)
    splits = read_rows(options)
    if options.model is None:
        questions = Questions(splits["train"], options)
        texts = [f"{source.replace(MASK_MARKER, '')}\n{target}" for source, target in questions.pairs()]
        tokenizer = train_tokenizer(texts, vocab_size=options.vocab_size, model_type="bpe")
        longest = max(map(len, encode_pairs(tokenizer, *zip(*questions.pairs()))["input_ids"]))
        config = YanConfig(
            vocab_size=len(tokenizer),
            hidden_size=options.hidden_size,
            num_attention_heads=4,
            encoder_layers=options.encoder_layers,
            flow_layers=2,
            decoder_layers=1,
            max_position_embeddings=2 * longest,
            initializer_range=0.1,
            loss_weights={"mmd": 0.0},  # the slowest term, and of no use for answers of a word
            experts_implementation=None if torch.cuda.is_available() else "eager",
        )
        autoencoder = YanForAutoEncoding(config)
        train_stage(autoencoder, tokenizer, questions, True, options, [])
        autoencoder.save_pretrained(options.output / "autoencoder")
        model = YanForConditionalGeneration.from_pretrained(options.output / "autoencoder")
    else:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForSeq2SeqLM.from_pretrained(options.model)
        prepare_tokenizer(tokenizer, model)
        questions = Questions(splits["train"], options)
    if not torch.cuda.is_available():
        model.set_experts_implementation("eager")
    validation = Questions(splits["validation"], options).pairs()
    checkpoint = options.output / "checkpoint"
    keeper = KeepBest(tokenizer, validation, checkpoint, options.eval_steps)
    train_stage(model, tokenizer, questions, False, options, [keeper])
    keeper.evaluate(model)
    result = {
        "validation_exact_match": keeper.best,
        "training_minutes": round((time.monotonic() - started) / 60, 1),
        "parameters": model.num_parameters(),
        "seed": options.seed,
        # File names without their folders, which say nothing elsewhere.
        "options": {
            name: Path(value).name if isinstance(value, (str, Path)) else value
            for name, value in vars(options).items()
        },
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if "test" in splits:
        model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint).eval()
        pairs = Questions(splits["test"], options).pairs()
        for name, true_lengths in (("predicted_length", False), ("true_length", True)):
            runs = [evaluate_pairs(model, tokenizer, pairs, true_lengths, seed) for seed in range(3)]
            matches = [run["exact_match"] for run in runs]
            result[f"test_{name}"] = {
                "exact_match_mean": sum(matches) / 3,
                "exact_match_by_sampling_seed": matches,
                "tokens_per_second": sorted(run["tokens_per_second"] for run in runs)[1],
            }
    (options.output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
