# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A data set encoded once by a frozen encoder: the same states and loss as on the fly, and no encoder in training."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, PreTrainedTokenizerFast, Seq2SeqTrainingArguments

from yan_hf import (
    TaskEncoder,
    YanDataCollator,
    YanForConditionalGeneration,
    YanTrainer,
    encode_dataset,
    encode_pairs,
    prepare_tokenizer,
)
from yan_hf.cli.main import main
from yan_hf.data.checks import check_vocabulary


SOURCES = ["one two three", "two", "three one one two", "two two", "one three"]
TARGETS = ["three", "two two one", "one", "three three", "two one"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """As BERT's: words, and begin and end tokens around a text."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: index for index, token in enumerate([*names, "one", "two", "three"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    keywords = {f"{name[1:-1].lower()}_token": name for name in names}
    return prepare_tokenizer(PreTrainedTokenizerFast(tokenizer_object=core, **keywords))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model around a pretrained encoder, with its tokenizer."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 9, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    encoder, folder = tmp_path_factory.mktemp("encoder"), tmp_path_factory.mktemp("checkpoint")
    AutoModel.from_config(BertConfig(**sizes, max_position_embeddings=24)).save_pretrained(encoder)
    tokenizer = make_tokenizer()
    fields = {"flow_layers": 1, "decoder_layers": 1, "frozen_parts": ["encoder"], "latent_noise": 0.1}
    model = YanForConditionalGeneration.from_encoder_pretrained(encoder, tokenizer, **fields)
    check_vocabulary(tokenizer, model)  # though the encoder's table is larger
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id"):
        assert getattr(model.config, name) == getattr(tokenizer, name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(checkpoint):
    return YanForConditionalGeneration.from_pretrained(checkpoint)


@pytest.fixture
def examples():
    return Dataset.from_dict(encode_pairs(make_tokenizer(), SOURCES, TARGETS))


def count_runs(model) -> list[int]:
    runs: list[int] = []
    model.model.encoder.model.register_forward_hook(lambda *_: runs.append(1))
    return runs


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_cached_states_has_the_loss_of_its_tokens(side, model, examples):
    tokenizer = make_tokenizer()
    tokenizer.padding_side = side
    encoded = encode_dataset(model.train(), examples, batch_size=2)
    assert model.model.encoder.training and encoded[0]["encoder_states"].shape == (5, 32)
    collator, runs = YanDataCollator(tokenizer), count_runs(model)
    batch, plain = collator([*encoded]), collator([*examples])
    assert {name: value.shape[:2] for name, value in batch.items() if "states" in name} == {
        "encoder_states": plain["input_ids"].shape,
        "target_states": plain["labels"].shape,
    }
    losses = [model(**inputs, generator=torch.Generator().manual_seed(0)).loss for inputs in (batch, plain)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    assert len(runs) == 2
    before = model.model.encoder.latent_mean.clone()
    model.fit_latent_statistics([batch])
    assert len(runs) == 2 and not torch.equal(model.model.encoder.latent_mean, before)


def test_the_same_rows_and_weights_are_encoded_once(model, examples, tmp_path):
    examples.save_to_disk(tmp_path / "examples")
    examples = load_from_disk(tmp_path / "examples")
    runs = count_runs(model)
    first = encode_dataset(model, examples)
    done = len(runs)
    again = encode_dataset(model, examples)
    assert len(runs) == done and np.array_equal(first[0]["target_states"], again[0]["target_states"])
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()
    other = encode_dataset(model, examples, dtype="float16")
    assert len(runs) == 2 * done and other.features["target_states"].dtype == "float16"
    assert not np.allclose(other[0]["target_states"], first[0]["target_states"], atol=1e-2)


def test_a_trainer_on_cached_states_never_runs_the_encoder(model, examples, tmp_path):
    encoded = encode_dataset(model, examples)
    model.fit_latent_statistics([YanDataCollator(make_tokenizer())([*encoded])])
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    runs = count_runs(model)
    options = {"max_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "report_to": "none"}
    arguments = Seq2SeqTrainingArguments(str(tmp_path / "runs"), use_cpu=True, save_strategy="no", **options)
    data = {"train_dataset": encoded, "eval_dataset": encoded, "data_collator": YanDataCollator(make_tokenizer())}
    trainer = YanTrainer(model=model, args=arguments, processing_class=make_tokenizer(), **data)
    trainer.train()
    assert "eval_loss" in trainer.evaluate() and not runs
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert any(".flow." in name for name in changed) and not any(".encoder." in name for name in changed)
    trainer.args.predict_with_generate = True
    assert trainer.predict(encoded).predictions.shape[0] == len(encoded) and runs


def test_states_of_other_tokens_are_refused(model, examples):
    encoded = encode_dataset(model, examples)
    for options in ({"canvas_slack": 1.0}, {"objective": "span_infilling"}, {"corruption": lambda text, *_: text}):
        with pytest.raises(ValueError, match="_states` were encoded of other tokens"):
            YanDataCollator(make_tokenizer(), **options)([*encoded])


def test_bad_arguments(model, examples):
    with pytest.raises(ValueError, match="no column labels"):
        encode_dataset(model, examples.remove_columns("labels"))
    with pytest.raises(ValueError, match="`dtype`.*bfloat16"):
        encode_dataset(model, examples, dtype="bfloat16")
    model.config.encoder_config = None
    with pytest.raises(ValueError, match="encoder_config"):
        encode_dataset(model, examples)


def test_the_command_writes_what_load_from_disk_reads(checkpoint, examples, tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"source": s, "target": t}) + "\n" for s, t in zip(SOURCES, TARGETS)))
    command = ["encode-dataset", str(checkpoint), "--file", str(file), "--output", str(tmp_path / "states"), "--json"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] == 5 and report["bytes"] > 5 * 4 * 32
    found = load_from_disk(report["output"])
    expected = encode_dataset(YanForConditionalGeneration.from_pretrained(checkpoint), examples)
    assert found.format["type"] == "numpy"
    for row, other in zip(found, expected):
        assert np.array_equal(row["labels"], other["labels"])
        np.testing.assert_allclose(row["target_states"], other["target_states"], rtol=1e-5, atol=1e-5)
    assert main(command) == 1
    assert "not empty" in capsys.readouterr().err


def test_rows_of_a_task_are_encoded_too(model, tmp_path):
    rows = Dataset.from_dict({"source": SOURCES, "target": TARGETS})
    examples = rows.map(
        TaskEncoder("pairs", make_tokenizer()), batched=True, with_indices=True, remove_columns=rows.column_names
    )
    assert encode_dataset(model, examples)[1]["encoder_states"].shape == (3, 32)


def test_other_commands_know_a_pretrained_encoder(checkpoint, tmp_path, capsys):
    assert main(["info", str(checkpoint), "--json"]) == 0
    report, model = json.loads(capsys.readouterr().out), YanForConditionalGeneration.from_pretrained(checkpoint)
    embeddings = model.model.encoder.model.embeddings
    tables = [model.lm_head, model.model.embed_positions, embeddings.word_embeddings, embeddings.position_embeddings]
    assert report["encoder"] == "pretrained bert, 2 blocks"
    assert report["embedding_parameters"] == sum(weight.numel() for table in tables for weight in table.parameters())
    assert main(["export", str(checkpoint), "--to-research", "--output", str(tmp_path / "research.pt")]) == 1
    assert "`encoder_config=None`, this checkpoint 'bert'" in capsys.readouterr().err
    assert main(["export", str(checkpoint), "--with-code", "--output", str(tmp_path / "code")]) == 0
    assert (tmp_path / "code" / "modeling_yan.py").is_file()
