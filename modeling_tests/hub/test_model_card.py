# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Model cards: valid metadata, and figures that are the run's own."""

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from testing_utils import small_config, small_model
from transformers import Seq2SeqTrainingArguments

from yan_hf import (
    YanDataCollator,
    YanForConditionalGeneration,
    YanTrainer,
    compute_metrics,
    create_model_card,
    train_tokenizer,
)
from yan_hf.hub.model_card import parameter_counts, save_card


DATA = ModelCardData(model_name="yan-words", datasets=["words"], license="apache-2.0", language="en")
TEXTS = {
    "task": "one word in, one word out",
    "tokenizer": "byte pairs trained on the training rows; licence: Apache-2.0",
    "example_source": 'say "hi"',
    "limits": ["It knows five words."],
}
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


def test_a_card_says_what_lengths_are_predicted_for():
    for start, words in (("aligned", "for every mask"), ("fertility", "for every source token")):
        model = small_model(start_state=start)
        model.generation_config.length_slack = 2
        text = create_model_card(model, DATA, **TEXTS).text
        assert words in text and "2 positions of slack" in text


def test_a_card_states_what_the_issue_of_a_model_is(tmp_path):
    model = small_model(num_experts=3, solver_steps=5)
    card = create_model_card(model, DATA, results(), "test", 3, "a processor", recipe="Ten steps.", **TEXTS)
    counts = parameter_counts(model)
    text = card.text
    for fact in (
        f"{counts['total']:,}", f"{counts['embedding']:,}", f"{counts['core']:,}", "transformer, blocks: 3", "K = 3",
        "5 steps", "predicted by the length head", "0.7500 ± 0.0100", "0.8000 ± 0.0200", "| 3 |", "1,234",
        "a processor", "licence: Apache-2.0", "no zero-shot", "No exact likelihood",
        "It knows five words.", "Intended use", "Ten steps.", r'"say \"hi\""',
    ):  # fmt: skip
        assert fact in text, fact
    assert "{{" not in text and "None" not in text
    path = save_card(card, tmp_path)
    assert path.name == "README.md"
    loaded = ModelCard.load(path)  # refuses a `model-index` that is not one
    assert loaded.data.license == "apache-2.0" and loaded.data.library_name == "transformers"
    assert loaded.data.pipeline_tag == "text2text-generation" and loaded.data.widget == [{"text": 'say "hi"'}]
    found = {(result.metric_type, result.metric_value) for result in loaded.data.eval_results}
    assert found == {("exact_match", 0.75), ("f1", 0.8)}
    assert loaded.data.eval_results[0].dataset_split == "test"


def test_true_lengths_are_shown_but_no_result_of_the_index():
    card = create_model_card(small_model(), DATA, results(lengths="true"), hardware="a processor")
    assert "true lengths" in card.text and card.data.eval_results is None


def test_a_card_says_what_the_sampler_follows():
    assert "one chosen for each token at t = 0 (token routing)" in create_model_card(small_model(), DATA).text
    text = create_model_card(small_model(expert_scope="target", reselect_experts=True), DATA).text
    assert "one chosen for each target at every solver step (token routing)" in text


def test_a_card_without_figures_says_so():
    text = create_model_card(small_model(length_head_trained=False), DATA).text
    assert "None were measured." in text and "Speed: not measured." in text
    assert "user must give it" in text and "It does not predict lengths." in text


def test_what_no_card_has_is_named():
    with pytest.raises(ValueError, match="no motto; its texts are summary, task"):
        create_model_card(small_model(), DATA, motto="faster")
    with pytest.raises(ValueError, match="`model_name`"):
        create_model_card(small_model(), ModelCardData())


def trainer(tmp_path, tokenizer):
    torch.manual_seed(0)
    return YanTrainer(
        model=YanForConditionalGeneration(small_config(vocab_size=len(tokenizer))),
        args=Seq2SeqTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=5,
            learning_rate=1e-3,
            predict_with_generate=True,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=rows(tokenizer),
        eval_dataset=rows(tokenizer),
        data_collator=YanDataCollator(tokenizer),
        processing_class=tokenizer,
        compute_metrics=compute_metrics(tokenizer),
    )


def test_the_trainers_card_has_its_own_evaluation_and_recipe_and_is_kept_by_a_push(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer)
    run.train()
    metrics = run.evaluate(metric_key_prefix="test")
    run.create_model_card(card_data=DATA, metrics=metrics, split="test", **TEXTS)
    card = ModelCard.load(tmp_path / "README.md")
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {name: round(metrics[f"test_{name}"], 6) for name in ("exact_match", "f1")}
    for fact in ("4 optimiser steps", "train_batch_size: 5", "learning_rate: 0.001"):
        assert fact in card.text
    assert f"{metrics['test_f1']:.4f}" in card.text
    run.create_model_card(model_name="other")  # what `push_to_hub` does first
    assert ModelCard.load(tmp_path / "README.md").text == card.text
    plain = trainer(tmp_path / "plain", tokenizer)
    plain.create_model_card(model_name="other")
    assert "other" in (tmp_path / "plain" / "README.md").read_text()


def test_a_card_takes_a_metric_by_its_whole_name(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer)
    metrics = {"test_f1": 0.25, "test_punctuation_f1": 0.5, "test_punctuation_f1_comma": 0.75}
    run.create_model_card(card_data=DATA, metrics=metrics, split="test", **TEXTS)
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert [result.metric_value for result in results] == [0.25, 0.5]
