# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The quality benchmarks: what is compared is comparable, and every system runs from rows to figures."""

import argparse
import dataclasses
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from decoders import matching_model
from length_modes import MODES
from quality import best_rate
from quality_encoders import MODES as ENCODER_MODES
from quality_encoders import new_yan, train_with_encoder
from quality_report import at, load, spread, table
from quality_systems import AutoregressiveCollator, generate_texts, new_config
from quality_tasks import MASK, TASKS, fitting_pairs
from transformers import AutoModel, ModernBertConfig, ModernBertModel

from yan_hf import YanForConditionalGeneration, encode_text, train_tokenizer


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# What the scripts import.
PARTS = [f"{name}.py" for name in ("ctranslate", "decoders", "quality_encoders", "quality_systems", "quality_tasks")]
PARTS += ["report.py", "rewriting_report.py", "rewriting_systems.py"]
STORY = "Once there was a small dog named Max. He liked to run in the big park. One day he saw a red ball. "


def run(script, *arguments):
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stories")
    for split in ("train", "validation", "test"):
        with gzip.open(folder / f"{split}.jsonl.gz", "wt") as file:
            for row in range(30):
                file.write(json.dumps({"text": STORY * 2 + f"The number {row} was on the wall."}) + "\n")
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([STORY] * 20, vocab_size=400, model_type="bpe")


@pytest.mark.parametrize("system", ("ar-gpt2", "ar-bart"))
@pytest.mark.parametrize("task", TASKS)
def test_systems_have_the_same_size_and_dropout(task, system, tokenizer):
    config = new_config(TASKS[task], tokenizer, vocab_size=TASKS[task].vocab_size, embedding_dropout=0.25)
    with torch.device("meta"):
        parameters = YanForConditionalGeneration(config).num_parameters()
    other = matching_model(system, config, parameters, 64, vary="width")
    assert abs(other.num_parameters() - parameters) <= 0.05 * parameters
    dropouts = [layer.p for layer in other.modules() if isinstance(layer, torch.nn.Dropout)]
    if system == "ar-gpt2":
        assert other.transformer.drop.p == 0.25 and sorted(set(dropouts)) == [0.0, 0.25]
    else:
        assert other.model.encoder.dropout == other.model.decoder.dropout == 0.25
        assert all(layer.dropout == 0 for layer in [*other.model.encoder.layers, *other.model.decoder.layers])


def test_targets_are_what_is_masked():
    story = {"text": "A dog ran. It saw the red ball here."}
    (last,) = TASKS["last_word"].pairs([story])
    assert last == (f"A dog ran. It saw the red ball{MASK}.", " here")
    (span,) = TASKS["infilling"].pairs([story])
    assert span.target == "It saw the red ball here." and span.source.count(MASK) == 1
    paragraph = {"context": "It rained. Mary has a red hat.", "qas": [{"question": "Who?", "answer": "Mary"}]}
    (answer,) = TASKS["squad"].pairs([paragraph])
    assert answer == (f"Mary has a red hat. Who? Answer:{MASK}", " Mary")
    (label,) = TASKS["sst2"].pairs([{"text": "So Good", "label": 1}])
    assert label == (f"{MASK} so good", "1 positive")


def test_pairs_without_room_for_their_answer_are_left_out(tokenizer, capsys):
    paragraph = {"context": "Max has a big park.", "qas": [{"question": "Who?", "answer": "Max"}]}
    ((source, target),) = pairs = TASKS["squad"].pairs([paragraph])
    start = encode_text(tokenizer, [source], MASK)[0].index(tokenizer.mask_token_id)
    room = start + len(tokenizer(target, add_special_tokens=False)["input_ids"]) + 1
    fits = dataclasses.replace(TASKS["squad"], max_source_length=room)
    assert fitting_pairs(fits, tokenizer, [paragraph]) == pairs and not capsys.readouterr().out
    for length in (room - 1, start):
        assert fitting_pairs(dataclasses.replace(fits, max_source_length=length), tokenizer, [paragraph]) == []
        assert "left out: 1 of 1 pairs" in capsys.readouterr().out


def test_the_rate_with_the_lowest_pilot_loss_is_taken():
    losses = {1e-3: 2.0, 2e-3: 1.5, 4e-3: 9.0}
    assert best_rate(list(losses), losses.get) == (2e-3, {"0.001": 2.0, "0.002": 1.5, "0.004": 9.0})
    assert best_rate([3e-4], None) == (3e-4, {})


def test_a_causal_batch_joins_source_and_target_without_a_gap(tokenizer):
    collator = AutoregressiveCollator(tokenizer, "ar-gpt2")
    batch = collator([{"input_ids": [5, 6, 7], "labels": [8, 2]}, {"input_ids": [9], "labels": [10, 11, 2]}])
    pad = tokenizer.pad_token_id
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 2, pad], [pad, pad, 9, 10, 11, 2]]
    assert batch["position_ids"][1].tolist() == [0, 0, 0, 1, 2, 3]
    assert batch["labels"].tolist() == [[8, 2, -100], [10, 11, 2]]


def test_true_lengths_and_seeds_reach_generate(tokenizer):
    torch.manual_seed(0)
    model = YanForConditionalGeneration(new_config(TASKS["last_word"], tokenizer)).eval()
    examples = [{"input_ids": [5, 6, 2], "labels": [7] * length} for length in (2, 5, 3)]
    _, lengths = generate_texts(model, "yan", tokenizer, examples, 8, true_lengths=True)
    assert all(length <= wanted for length, wanted in zip(lengths, (2, 5, 3), strict=True))
    first = generate_texts(model, "yan", tokenizer, examples, 8, seed=1, init_noise=3.0)
    assert (
        generate_texts(model, "yan", tokenizer, examples, 8, seed=1, init_noise=3.0, batch_size=1)[0][0] == first[0][0]
    )


def test_the_report_takes_training_seeds_together(tmp_path):
    """Two seeds of one run among another task's and another recipe's, which stay apart."""
    options = {"task": "sst2", "system": "ar-gpt2", "experts": 4, "split": "test"}
    run = {"options": options, "steps": 100, "parameters": 5, "training_minutes": 1.0}

    def write(name, value, steps=100, **other):
        row = {"exact_match": value, "exact_match_by_sampling_seed": [value]}
        found = {**run, "options": {**options, **other}, "steps": steps, "rows": [row]}
        (tmp_path / name).write_text(json.dumps(found))

    write("a.json", 0.5, seed=0)
    write("b.json", 0.9, seed=0, task="babi")
    write("c.json", 0.7, seed=1)
    write("d.json", 0.8, seed=0, steps=200)
    both, other, longer = load(tmp_path)
    assert both["seeds"] == [0, 1] and at(both, 3) == pytest.approx(0.6)
    assert both["rows"][0]["exact_match_by_sampling_seed"] == [0.5, 0.7]
    assert spread(both) == pytest.approx(0.02**0.5) and spread(other) is None
    assert (at(other, 3), at(longer, 3)) == (0.9, 0.8)
    write("e.json", 0.1, seed=1)
    with pytest.raises(ValueError, match="same training seed"):
        load(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("system", ("yan", "ar-gpt2", "ar-bart"))
def test_a_run_writes_figures_that_the_report_reads(system, stories, tmp_path):
    options = ["--task", "infilling", "--data", stories, "--autoencoder-steps", 20, "--flow-steps", 10]
    options += ["--system", system, "--max-rows", 20, "--sweep", 1, 3, "--work", tmp_path / "work"]
    finished = run(
        "quality.py", *options, "--learning-rate", 1e-3, 2e-3, "--output", tmp_path / "results" / f"{system}.json",
        "--card", tmp_path / "card.md",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    (found,) = load(tmp_path / "results")
    assert found["asked_rows"] == 20 and found["steps"] == 30 and set(found["pilot_losses"]) == {"0.001", "0.002"}
    assert found["learning_rate"] == min((0.001, 0.002), key=lambda rate: found["pilot_losses"][f"{rate:g}"])
    assert at(found, 3) is not None and at(found, 3, metric="f1") is not None
    assert f"| infilling | {'yan, K = 4' if system == 'yan' else system} |" in table([found])
    if system == "yan":
        modes = [(row["num_inference_steps"], row["true_lengths"]) for row in found["rows"]]
        assert modes == [(1, False), (3, False), (3, False), (3, True)]
        assert at(found, 3, candidates=3) is not None and at(found, 3, True) is not None
        card = (tmp_path / "card.md").read_text()
        assert "20 steps at" in card and "10 steps at 0.001" in card
    again = run("quality.py", *options, "--again", "--output", tmp_path / "again.json")
    assert again.returncode == 0, again.stderr[-3000:]
    same = json.loads((tmp_path / "again.json").read_text())
    assert [row["f1"] for row in same["rows"]] == [row["f1"] for row in found["rows"]]
    assert same["training_minutes"] == found["training_minutes"]
    if system == "yan":
        reaches = run("quality.py", *options, "--generation", '{"min_new_tokens": 99}', "--again")
        assert reaches.returncode == 1 and "`min_new_tokens=99`" in reaches.stderr, reaches.stderr[-3000:]
        refused = run("quality.py", *options, "--generation", '{"expert_selektion": "greedy"}')
        assert refused.returncode == 2 and "expert_selektion" in refused.stderr


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, tokenizer):
    """A pretrained encoder's folder, with random weights."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    ends = {"cls_token_id": tokenizer.bos_token_id, "sep_token_id": tokenizer.eos_token_id}
    folder = tmp_path_factory.mktemp("encoder")
    ModernBertModel(ModernBertConfig(vocab_size=len(tokenizer), **sizes, **special, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mode", ENCODER_MODES)
@pytest.mark.parametrize("system", ("yan", "ar-encoder-decoder"))
@pytest.mark.slow
def test_what_learns_around_a_pretrained_encoder(system, mode, encoder, tokenizer, tmp_path):
    """The pretrained weights stay or learn as the mode says; the rest always learns; sizes are alike."""
    options = argparse.Namespace(
        system=system, encoder=str(encoder), encoder_mode=mode, experts=2, config_fields={}, seed=0, batch_size=4,
        learning_rate=[1e-3], flow_steps=3, progress=False,
    )  # fmt: skip
    pairs = TASKS["last_word"].pairs([{"text": STORY}])
    model, trained = train_with_encoder(options, TASKS["last_word"], tokenizer, pairs, tmp_path)
    assert trained["flow_steps"] == 3
    inner = model.encoder if system == "ar-encoder-decoder" else model.model.encoder.model
    before = AutoModel.from_pretrained(encoder).state_dict()
    now = {name.replace(".base_layer", ""): value for name, value in inner.state_dict().items() if "lora" not in name}
    is_kept = all(torch.equal(now[name], value) for name, value in before.items())
    assert is_kept == (mode in ("frozen", "lora"))
    adapters = {name: value for name, value in inner.state_dict().items() if "lora_B" in name}
    assert bool(adapters) == (mode == "lora") and all(value.any() for value in adapters.values())
    if system == "yan":
        assert model.model.encoder.latent_mean.any() == (mode != "scratch")
    else:
        yan = new_yan(options, TASKS["last_word"], tokenizer)
        assert abs(model.num_parameters() / yan.num_parameters() - 1) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("system", ("yan", "ar-encoder-decoder"))
def test_a_run_with_an_encoder(system, encoder, stories, tmp_path):
    options = ["--task", "last_word", "--data", stories, "--train-rows", 20, "--flow-steps", 4, "--sweep", 3]
    options += ["--system", system, "--encoder", encoder, "--max-rows", 10, "--work", tmp_path, "--batch-size", 8]
    finished = run("quality.py", *options, "--encoder-mode", "frozen", "--output", tmp_path / "found.json")
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["train_rows"] == 20 and found["options"]["encoder_mode"] == "frozen"
    assert all(row["latency_seconds"] > 0 for row in found["rows"])
    assert found["trainable_parameters"] < found["parameters"]


@pytest.mark.slow
@pytest.mark.parametrize("script", [path.name for path in sorted(BENCHMARKS.glob("*.py")) if path.name not in PARTS])
def test_every_script_says_how_it_is_called(script):
    """From the command line alone: nothing that a test puts on Python's path is needed."""
    finished = run(script, "--help")
    assert finished.returncode == 0 and f"benchmarks/{script}" in finished.stdout, finished.stderr[-2000:]


@pytest.mark.slow
def test_ablations_run_and_are_taken_up(stories, tmp_path):
    """A second run measures only what is missing; what the gate does is that of the variant's own model."""
    options = ["--data", stories, "--autoencoder-steps", 4, "--flow-steps", 4, "--max-rows", 30]
    options += ["--work", tmp_path / "work", "--output", tmp_path / "out.json", "--variants", "default"]
    others = ["1 experts", "one step asked", "canvas slack"]
    first = run("ablations.py", *options)
    assert first.returncode == 0, first.stderr[-3000:]
    second = run("ablations.py", *options, *others)
    assert second.returncode == 0, second.stderr[-3000:]
    assert "default 0" not in second.stdout
    runs = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert [entry["variant"] for entry in runs] == ["default", *others]
    plain, one_expert, one_step, slack = runs
    assert one_expert["gate_entropy"] == 0 and one_expert["smallest_load"] == one_expert["largest_load"] == 1
    for name in ("gate_entropy", "smallest_load", "largest_load"):  # asked otherwise, but the same model
        assert one_step[name] == plain[name] != slack[name]


@pytest.mark.slow
def test_length_modes_run(stories, tmp_path):
    options = ["--task", "infilling", "--data", stories, "--max-rows", 20]
    first = run(
        "quality.py", *options, "--system", "yan", "--autoencoder-steps", 20, "--flow-steps", 1, "--sweep", 3,
        "--work", tmp_path / "work",
    )  # fmt: skip
    assert first.returncode == 0, first.stderr[-3000:]
    finished = run(
        "length_modes.py", *options, "--autoencoder", tmp_path / "work" / "infilling_yan" / "autoencoder",
        "--steps", 10, "--sampling-seeds", 1, "--work", tmp_path / "modes", "--output", tmp_path / "modes.json",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    rows = json.loads((tmp_path / "modes.json").read_text())["rows"]
    assert [(row["canvas_slack"], row["mode"]) for row in rows] == [(s, mode) for s in (0.0, 0.5) for mode in MODES]
    assert all(len(row["right_length_by_sampling_seed"]) == 1 for row in rows)
    assert (tmp_path / "modes.png").is_file()
