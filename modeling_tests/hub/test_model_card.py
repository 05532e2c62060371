# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Model cards: valid metadata, and figures that are the run's own."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from testing_utils import small_config, small_model
from transformers import Seq2SeqTrainingArguments

from yan_hf import (
    CardFacts,
    ModelCardCallback,
    YanDataCollator,
    YanForConditionalGeneration,
    YanTrainer,
    create_model_card,
    train_tokenizer,
)
from yan_hf.evaluation.evaluate import evaluate_model
from yan_hf.hub.model_card import TEMPLATE, parameter_counts, save_card


FACTS = CardFacts(
    model_name="yan-words",
    task="one word in, one word out",
    dataset_name="Words",
    dataset_id="words",
    split="test",
    license="apache-2.0",
    tokenizer="byte pairs trained on the training rows",
    tokenizer_license="Apache-2.0",
    example_source='say "hi"',
    limits=["It knows five words."],
)
WORDS = ["one", "two", "three", "four", "five"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(WORDS)] * 20, vocab_size=300, model_type="bpe")


def rows(tokenizer):
    return [{"input_ids": tokenizer(word)["input_ids"], "labels": tokenizer(word)["input_ids"]} for word in WORDS]


def results(**changes):
    row = {"lengths": "predicted", "steps": 3, "exact_match": 0.75, "exact_match_spread": 0.01, "f1": 0.8}
    return [{**row, "f1_spread": 0.02, "tokens_per_second": 1234.5, **changes}]


def test_sizes_are_split_into_tables_and_core():
    model = small_model()
    counts = parameter_counts(model)
    tables = 60 * 32 + 24 * 32 + (60 * 32 + 60)  # tokens, positions, vocabulary head with its bias
    assert counts["embedding"] == tables
    assert counts["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert counts["core"] == counts["total"] - tables
    tied = parameter_counts(small_model(tie_word_embeddings=True))
    assert tied["embedding"] == tables - 60 * 32 and tied["core"] == counts["core"]


def test_a_card_states_what_the_issue_of_a_model_is(tmp_path):
    model = small_model(num_experts=3, solver_steps=5)
    card = create_model_card(model, FACTS, results(), 3, "Ten steps.", "a processor", batch_size=8)
    counts = parameter_counts(model)
    text = card.text
    for fact in (
        f"{counts['total']:,}", f"{counts['embedding']:,}", f"{counts['core']:,}", "transformer, blocks: 3", "K = 3",
        "5 steps", "predicted by the length head", "0.7500 ± 0.0100", "0.8000 ± 0.0200", "| 3 |", "1,234",
        "a processor", "batches of 8", "licence: Apache-2.0", "no zero-shot", "No exact likelihood",
        "It knows five words.", "Intended use", "Ten steps.", r'"say \"hi\""',
    ):  # fmt: skip
        assert fact in text, fact
    assert "{{" not in text and "None" not in text
    path = save_card(card, tmp_path)
    assert path.name == "README.md"
    loaded = ModelCard.load(path)  # refuses a `model-index` that is not one
    assert loaded.data.license == "apache-2.0" and loaded.data.library_name == "transformers"
    found = {(result.metric_type, result.metric_value) for result in loaded.data.eval_results}
    assert found == {("exact_match", 0.75), ("f1", 0.8)}
    assert loaded.data.eval_results[0].dataset_split == "test"


def test_true_lengths_are_shown_but_no_result_of_the_index():
    card = create_model_card(small_model(), FACTS, results(lengths="true"), 3, hardware="a processor")
    assert "true lengths" in card.text and card.data.eval_results is None


def test_a_card_says_what_the_sampler_follows():
    assert "one chosen for each token at t = 0 (token routing)" in create_model_card(small_model(), FACTS).text
    text = create_model_card(small_model(expert_scope="target", reselect_experts=True), FACTS).text
    assert "one chosen for each target at every solver step (token routing)" in text


def test_a_card_without_figures_says_so():
    text = create_model_card(small_model(length_head_trained=False), FACTS).text
    assert "None were measured." in text and "Speed: not measured." in text
    assert "user must give it" in text and "It does not predict lengths." in text


def test_the_template_in_model_cards_is_the_packages():
    public = Path(__file__).resolve().parents[2] / "model_cards" / "template.md"
    assert public.read_text(encoding="utf-8") == TEMPLATE.read_text(encoding="utf-8")


def trainer(tmp_path, tokenizer, callback, **changes):
    torch.manual_seed(0)
    options = {"ema_decay": changes.pop("ema_decay")} if "ema_decay" in changes else {}
    arguments = {
        "output_dir": str(tmp_path),
        "max_steps": 4,
        "per_device_train_batch_size": 5,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-3,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    return YanTrainer(
        model=YanForConditionalGeneration(small_config(vocab_size=len(tokenizer))),
        args=Seq2SeqTrainingArguments(**arguments),
        train_dataset=rows(tokenizer),
        eval_dataset=rows(tokenizer),
        data_collator=YanDataCollator(tokenizer),
        processing_class=tokenizer,
        callbacks=[callback],
        **options,
    )


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_the_callback_measures_what_training_leaves(tmp_path, tokenizer, ema_decay):
    """Averaged weights too: the card's figures are those of the model that is there afterwards."""
    callback = ModelCardCallback(FACTS, seeds=2)
    run = trainer(tmp_path, tokenizer, callback, ema_decay=ema_decay)
    run.train()
    again = evaluate_model(
        run.model.eval(), tokenizer, rows(tokenizer), YanDataCollator(tokenizer), seeds=2, batch_size=2
    )
    for found, expected in zip(callback.results, again):
        assert {key: found[key] for key in ("lengths", "steps", "exact_match", "f1", "f1_spread")} == {
            key: expected[key] for key in ("lengths", "steps", "exact_match", "f1", "f1_spread")
        }
    card = ModelCard.load(tmp_path / "README.md")
    assert {result.metric_type for result in card.data.eval_results} == {"exact_match", "f1"}
    assert "4 optimiser steps" in card.text and "batches of 5" in card.text and "learning rate 0.001" in card.text
    assert f"{callback.results[0]['f1']:.4f}" in card.text


def test_pushing_from_the_trainer_keeps_the_card(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer, ModelCardCallback(FACTS, seeds=1, max_rows=2))
    run.train()
    before = (tmp_path / "README.md").read_text()
    run.create_model_card(model_name="other")  # what `push_to_hub` does first
    assert (tmp_path / "README.md").read_text() == before
    plain = trainer(tmp_path / "plain", tokenizer, callback=_Nothing())
    plain.create_model_card(model_name="other")
    assert "other" in (tmp_path / "plain" / "README.md").read_text()


class _Nothing(ModelCardCallback.__mro__[1]):
    """A callback that does nothing."""


def test_a_trainer_that_never_evaluates_gets_a_card_without_figures(tmp_path, tokenizer):
    trainer(tmp_path, tokenizer, ModelCardCallback(FACTS), eval_strategy="no").train()
    assert "None were measured." in (tmp_path / "README.md").read_text()


def test_seeds_are_checked():
    with pytest.raises(ValueError, match="seeds.*0"):
        ModelCardCallback(FACTS, seeds=0)
