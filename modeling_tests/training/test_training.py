# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Training with Transformers' trainers, and the curriculum."""

import copy

import numpy as np
import pytest
import torch
from curriculum import Curriculum, CurriculumStream, CurriculumTrainer, StopWhenSolved, as_masked_answer
from testing_utils import small_config
from transformers import AutoModelForSeq2SeqLM, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from yan_hf import (
    YanDataCollator,
    YanForAutoEncoding,
    YanForConditionalGeneration,
    encode_pairs,
    exact_match,
    train_tokenizer,
)
from yan_hf.data.tasks import TextPair
from yan_hf.data.tokenization import MASK_MARKER
from yan_hf.evaluation.metrics import normalize_answer
from yan_hf.training.callbacks import EpochCallback


PAIRS = [
    ("one plus one", "two"),
    ("two plus one", "three"),
    ("the colour of snow", "it is white"),
    ("the colour of coal", "it is black as night"),
    ("a cat says", "meow"),
    ("a dog says", "woof woof"),
]


@pytest.fixture(scope="module")
def tokenizer():
    texts = [text for _ in range(20) for pair in PAIRS for text in pair]
    return train_tokenizer(texts, vocab_size=330, model_type="bpe")


def examples(tokenizer):
    encoded = encode_pairs(tokenizer, *zip(*PAIRS))
    return [dict(zip(encoded, row)) for row in zip(*encoded.values())]


def trainable_model(tokenizer, **changes):
    torch.manual_seed(0)
    weights = {"flow": 0.01, "latent": 0.01, "mmd": 0.0, "length": 1.0}
    fields = {"vocab_size": len(tokenizer), "max_position_embeddings": 48, "loss_weights": weights}
    return YanForConditionalGeneration(small_config(**{**fields, "detach_length_head": False, **changes}))


def arguments(cls, folder, **changes):
    fields = {
        "output_dir": str(folder),
        "max_steps": 150,
        "per_device_train_batch_size": 6,
        "learning_rate": 3e-3,
        "warmup_steps": 10,
        "logging_steps": 50,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return cls(**{**fields, **changes})


@pytest.mark.slow
def test_seq2seq_trainer_learns_pairs_by_heart_and_generates_them(tokenizer, tmp_path):
    """Trained, evaluated with generated answers of predicted length, saved, and loaded through the Auto class."""
    rows = examples(tokenizer)
    seen = {}

    def compute_metrics(prediction):
        labels = np.where(prediction.label_ids == -100, tokenizer.pad_token_id, prediction.label_ids)
        tokens = np.where(prediction.predictions == -100, tokenizer.pad_token_id, prediction.predictions)
        decode = tokenizer.batch_decode
        seen["texts"] = decode(tokens, skip_special_tokens=True)
        return {"exact_match": exact_match(seen["texts"], decode(labels, skip_special_tokens=True))}

    trainer = Seq2SeqTrainer(
        model=trainable_model(tokenizer),
        args=arguments(
            Seq2SeqTrainingArguments, tmp_path, max_steps=800, predict_with_generate=True, per_device_eval_batch_size=4
        ),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=YanDataCollator(tokenizer),
        compute_metrics=compute_metrics,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_exact_match"] < 0.5 and after["eval_exact_match"] == 1.0
    assert sorted(seen["texts"]) == sorted(target for _, target in PAIRS)
    assert after["eval_loss"] < before["eval_loss"]
    options = {"solver": "heun", "num_inference_steps": 2, "num_length_candidates": 2, "rerank": "joint"}
    assert trainer.evaluate(max_length=20, num_beams=1, num_candidates=2, **options)["eval_exact_match"] == 1.0
    with pytest.raises(ValueError, match="num_beams"):
        trainer.evaluate(num_beams=4)
    trainer.save_model(tmp_path / "model")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model").eval()
    batch = tokenizer([source for source, _ in PAIRS], return_tensors="pt", padding=True)
    answers = tokenizer.batch_decode(loaded.generate(**batch, seeds=range(6)), skip_special_tokens=True)
    assert answers == [target for _, target in PAIRS]


class RepeatingModel(YanForConditionalGeneration):
    """A model whose loss draws the same noise in every call, so that two ways of summing can be compared."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        kwargs["generator"] = torch.Generator().manual_seed(0)
        return super().forward(input_ids, attention_mask, labels, **kwargs)


def test_gradient_accumulation_is_the_mean_over_the_batches(tokenizer, tmp_path):
    """The loss is a mean, so one step on two accumulated batches is half of the sum of their gradients."""
    rows, collator = examples(tokenizer), YanDataCollator(tokenizer)
    model = RepeatingModel(trainable_model(tokenizer).config)
    reference = copy.deepcopy(model).train()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = Trainer(
        model=model,
        args=arguments(
            TrainingArguments,
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
            optim="sgd",
            learning_rate=1.0,
            warmup_steps=0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
        ),
        train_dataset=rows,
        data_collator=collator,
    )
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    trainer.train()
    for half in (rows[:3], rows[3:]):
        (reference(**collator(half)).loss / 2).backward()
    for name, parameter in model.named_parameters():
        expected = dict(reference.named_parameters())[name].grad
        torch.testing.assert_close(start[name] - parameter.detach(), expected, rtol=1e-3, atol=1e-5)


def test_epoch_callback_changes_the_masked_spans_with_the_epoch(tokenizer, tmp_path):
    collator = YanDataCollator(tokenizer, objective="span_infilling", mask_rate=0.3)
    rows = [{"input_ids": tokenizer("the colour of coal is black as night, a dog says woof woof")["input_ids"]}]
    seen = []

    class Recorder(YanForConditionalGeneration):
        def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
            seen.append(input_ids.tolist())
            return super().forward(input_ids, attention_mask, labels, **kwargs)

    Trainer(
        model=Recorder(trainable_model(tokenizer).config),
        args=arguments(TrainingArguments, tmp_path, max_steps=4),
        train_dataset=rows,
        data_collator=collator,
        callbacks=[EpochCallback(collator)],
    ).train()
    expected = []
    for epoch in range(4):
        collator.set_epoch(epoch)
        expected.append(collator(rows)["input_ids"].tolist())
    assert seen == expected and any(ids != seen[0] for ids in seen)


# Curriculum


def test_level_rises_only_after_the_running_share_does():
    curriculum = Curriculum(num_levels=3, goal=0.9, threshold=0.8)
    levels = []
    for _ in range(60):
        curriculum.update(1.0)
        levels.append(curriculum.level)
    assert levels[0] == 1 and levels[-1] == 3 and levels == sorted(levels)
    assert levels.index(3) - levels.index(2) > 3  # a new level has to be learned first
    assert curriculum.finished
    stuck = Curriculum(num_levels=3, goal=0.9, threshold=0.8)
    for _ in range(100):
        stuck.update(0.7)
    assert stuck.level == 1 and not stuck.finished
    with pytest.raises(ValueError, match="level"):
        Curriculum(num_levels=3, goal=0.9, level=4)


def test_stream_follows_the_level_and_repeats_by_seed(tokenizer):
    def make(rng, level):
        return TextPair(f"level {level} {rng.integers(1000)} {MASK_MARKER}", "two")

    def take(seed, view=None, change=None):
        curriculum, rows = Curriculum(3, goal=1.0), []
        for row in CurriculumStream(make, tokenizer, curriculum, view, batch_size=4, seed=seed):
            rows.append(row)
            if len(rows) == 4 and change:
                curriculum.level = change
            if len(rows) == 8:
                return rows

    assert take(0) == take(0) != take(1)
    texts = [tokenizer.decode(row["input_ids"]) for row in take(0, change=3)]
    assert all("level 1" in text for text in texts[:4]) and all("level 3" in text for text in texts[4:])
    for row in take(0, view=as_masked_answer):
        assert len(row["input_ids"]) == len(row["labels"])


def test_the_auto_encoders_view_aligns_answer_and_mask(tokenizer):
    mask, pad, eos = tokenizer.mask_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id
    short = as_masked_answer([7, 8, mask, eos], [9, eos], tokenizer)
    assert short == {"input_ids": [7, 8, mask, eos], "labels": [-100, -100, 9, eos]}
    longer = as_masked_answer([7, 8, mask, eos], [9, 10, 11, eos], tokenizer)
    assert longer == {"input_ids": [7, 8, mask, eos, pad, pad], "labels": [-100, -100, 9, 10, 11, eos]}
    with pytest.raises(ValueError, match="mask token"):
        as_masked_answer([7, 8], [9, eos], tokenizer)


def test_curriculum_trainer_counts_right_rows_and_stops(tokenizer, tmp_path):
    """An auto-encoder that learns a constant answer solves the single level within a few hundred steps."""
    torch.manual_seed(0)
    model = YanForAutoEncoding(trainable_model(tokenizer).config)
    curriculum = Curriculum(1, goal=0.95)
    stream = CurriculumStream(
        lambda rng, level: TextPair(f"{rng.integers(10)} {MASK_MARKER}", "two"),
        tokenizer,
        curriculum,
        as_masked_answer,
        8,
    )
    trainer = CurriculumTrainer(
        model=model,
        args=arguments(TrainingArguments, tmp_path, max_steps=500, per_device_train_batch_size=8),
        train_dataset=stream,
        data_collator=YanDataCollator(tokenizer),
        callbacks=[StopWhenSolved(curriculum, seconds=120)],
        curriculum=curriculum,
    )
    trainer.train()
    assert curriculum.finished and trainer.state.global_step < 500


def test_exact_match_normalises_answers():
    assert normalize_answer(" The  Kitchen. ") == "kitchen"
    assert exact_match(["The kitchen.", "garden"], ["kitchen", "office"]) == 0.5
    for left, right in (([], []), (["a"], ["a", "b"])):
        with pytest.raises(ValueError, match="predictions"):
            exact_match(left, right)
