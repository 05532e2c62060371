# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The examples run as documented: from the command line, on files, to a checkpoint that answers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from babi import simulate_many
from datasets import Dataset
from demo import evaluate
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = pytest.mark.slow


def run(script, *arguments):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def run_on_two(script, *arguments):
    """The script under torchrun."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += map(str, (EXAMPLES / script, *arguments))
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("config", "selection"),
    [({}, None), pytest.param({"expert_scope": "target", "num_experts": 2}, "greedy", marks=pytest.mark.slow)],
)
def test_demo_trains_saves_reloads_and_answers(config, selection, tmp_path):
    """A few seconds of training: every part runs, and the figures it prints are those it writes."""
    options = ["--seconds", 8, "--questions", 20, "--config", json.dumps(config)]
    finished = run("demo.py", "--output", tmp_path, *options, "--json", tmp_path / "result.json")
    assert finished.returncode == 0, finished.stderr[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    saved = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert result["config"] == config == {name: saved[name] for name in config}
    assert (
        json.loads((tmp_path / "checkpoint" / "generation_config.json").read_text())["expert_selection"] == selection
    )
    assert (
        result["trunk_passes"] == 3 and evaluate(tmp_path / "checkpoint", 20)["exact_match"] == result["exact_match"]
    )
    assert f"{result['exact_match']:.1%}" in finished.stdout and "->" in finished.stdout
    assert re.search(r"level \d of 3, right [\d.]+% \(goal 9[\d.]+%\), \d+ s left of \d+ s", finished.stderr)
    assert "1000000" not in finished.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("babi")
    for seed, (split, count) in enumerate({"train": 300, "validation": 20, "test": 20}.items()):
        with (folder / f"{split}.jsonl").open("w") as file:
            for example in simulate_many(count, (1, 3), seed=seed):
                row = {
                    "context": list(example.context),
                    "question": example.question,
                    "answer": example.answer,
                    "support": [example.support],
                }
                file.write(json.dumps(row) + "\n")
    return folder


def test_train_from_scratch_and_then_from_its_checkpoint(data, tmp_path):
    files = [f"--{split}={data / split}.jsonl" for split in ("train", "validation", "test")]
    first = run(
        "train_from_scratch.py", *files, "--output", tmp_path / "a", "--autoencoder_steps", 20, "--flow_steps", 10
    )
    assert first.returncode == 0, first.stderr[-2000:]
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    for name in ("test_predicted_length", "test_true_length"):
        assert len(result[name]["exact_match_by_sampling_seed"]) == 3
    checkpoint = tmp_path / "a" / "checkpoint"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint)
    model.generate(**tokenizer(["Where is Mary? <mask>"], return_tensors="pt"))
    second = run(
        "train_from_scratch.py", *files, "--output", tmp_path / "b", "--model", checkpoint, "--flow_steps", 10
    )
    assert second.returncode == 0, second.stderr[-2000:]
    assert (tmp_path / "b" / "checkpoint" / "model.safetensors").is_file()


def test_train_from_scratch_names_what_is_missing(data, tmp_path):
    train, validation = f"--train={data / 'train'}.jsonl", f"--validation={data / 'validation'}.jsonl"
    for arguments, message in (
        ([], "--train"),
        ([train], "validation"),
        ([train, validation, "--question", "query"], "query"),
    ):
        finished = run("train_from_scratch.py", *arguments, "--output", tmp_path)
        assert finished.returncode == 1
        assert (
            finished.stderr.strip().splitlines()[-1].startswith("train_from_scratch.py:")
            and message in finished.stderr
        )


# Scripts on `Trainer` with their configurations.


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A task that a small model can learn: the first word tells the class."""
    folder = tmp_path_factory.mktemp("labelled")
    for split, count in {"train": 120, "validation": 20, "test": 20}.items():
        rows = [
            {"text": f"{('awful', 'lovely')[row % 2]} film number {row}", "label": row % 2} for row in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def files(folder, splits=("train", "validation", "test")):
    return [item for split in splits for item in (f"--{split}_file", folder / f"{split}.jsonl")]


SHORT = ["--max_steps", 4, "--eval_steps", 2, "--save_steps", 2, "--logging_steps", 2, "--columns", "{}"]


def test_stages_lora_and_evaluation_follow_each_other(labelled, tmp_path):
    """Auto-encoder, flow, adapter, evaluation: each script takes up what the one before it saved."""
    configs = EXAMPLES / "configs"
    options = [*SHORT, "--vocab_size", 350]
    steps = [
        (
            "pretrain_autoencoder.py",
            "sst2_autoencoder.yaml",
            "autoencoder",
            ["--ema_decay", 0.9],
            ("train", "validation"),
        ),
        ("finetune.py", "sst2.yaml", "flow", ["--model", tmp_path / "autoencoder"], ("train", "validation", "test")),
        ("finetune_lora.py", "sst2_lora.yaml", "adapter", ["--model", tmp_path / "flow"], ("train", "validation")),
    ]
    for script, config, output, extra, splits in steps:
        finished = run(
            script, configs / config, *files(labelled, splits), *options, *extra, "--output_dir", tmp_path / output
        )
        assert finished.returncode == 0, finished.stderr[-3000:]
        assert "it/s" in finished.stderr  # the progress bar
    history = json.loads((tmp_path / "flow" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert any("loss_flow" in entry for entry in history) and any("eval_exact_match" in entry for entry in history)
    assert list((tmp_path / "flow").rglob("events.out.tfevents*"))
    right = 20 * json.loads((tmp_path / "flow" / "test_results.json").read_text())["test_exact_match"]
    assert right == pytest.approx(round(right))  # of 20 rows
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    finished = run(
        "evaluate.py", configs / "sst2.yaml", "--model", tmp_path / "adapter" / "merged", "--columns", "{}",
        "--test_file", labelled / "test.jsonl", "--steps", 1, 3, "--seeds", 2, "--json_file", tmp_path / "result.json",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    rows = json.loads((tmp_path / "result.json").read_text())["results"]
    assert [(row["lengths"], row["steps"]) for row in rows] == [
        ("predicted", 1), ("predicted", 3), ("true", 1), ("true", 3)
    ]  # fmt: skip


def test_flow_pretraining_on_plain_text_with_a_frozen_encoder(labelled, tmp_path):
    configs = EXAMPLES / "configs"
    options = [*SHORT, *files(labelled, ("train", "validation")), "--max_source_length", 32, "--max_target_length", 32]
    first = run(
        "pretrain_autoencoder.py", configs / "stories_autoencoder.yaml", *options, "--vocab_size", 350,
        "--output_dir", tmp_path / "autoencoder",
    )  # fmt: skip
    assert first.returncode == 0, first.stderr[-3000:]
    second = run(
        "pretrain_flow.py", configs / "stories_flow.yaml", *options, "--model", tmp_path / "autoencoder",
        "--output_dir", tmp_path / "flow", "--freeze", "encoder", "token_embeddings",
    )  # fmt: skip
    assert second.returncode == 0, second.stderr[-3000:]
    before = load_file(tmp_path / "autoencoder" / "model.safetensors")
    after = load_file(tmp_path / "flow" / "model.safetensors")
    encoder = [name for name in before if ".encoder." in name]
    assert encoder and all(before[name].equal(after[name]) for name in encoder)
    assert any(not before[name].equal(after[name]) for name in before if ".decoder." in name)


def test_two_processes_train_one_model(labelled, tmp_path):
    """The script under torchrun, DDP over gloo."""
    arguments = [
        EXAMPLES / "configs" / "sst2.yaml",
        *files(labelled, ("train", "validation")), *SHORT,
        "--model", "", "--vocab_size", 350, "--config", '{"hidden_size": 32, "num_attention_heads": 2}',
        "--output_dir", tmp_path / "out", "--use_cpu", "--ddp_find_unused_parameters", "false",
    ]  # fmt: skip
    finished = run_on_two("finetune.py", *arguments)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_scripts_name_bad_data_before_training(labelled, tmp_path):
    config = EXAMPLES / "configs" / "sst2.yaml"
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine", "label": 1}\n{"text": "", "label": 0}\n')
    cases = [
        (["--train_file", bad], "Row 1"),
        (["--train_file", tmp_path / "none.jsonl"], "none.jsonl"),
        (["--train_file", labelled / "train.jsonl", "--columns", '{"text": "body"}'], "no column `body`"),
    ]
    for extra, message in cases:
        options = ["--columns", "{}", "--skip_bad_rows", "false", "--model", "", "--vocab_size", 350, *extra]
        finished = run("finetune.py", config, *options, "--output_dir", tmp_path / "out")
        assert finished.returncode != 0 and message in finished.stderr.splitlines()[-1], finished.stderr[-2000:]


def test_runs_go_on_by_the_command_line_and_frozen_parts_are_told(labelled, tmp_path):
    """`--resume_from_checkpoint true` on a first and on a second run; a checkpoint remembers what is frozen."""
    options = [
        EXAMPLES / "configs" / "sst2.yaml", *files(labelled, ("train", "validation")), *SHORT, "--report_to", "none",
        "--vocab_size", 350, "--config", '{"hidden_size": 32, "num_attention_heads": 2}',
        "--output_dir", tmp_path / "out", "--resume_from_checkpoint", "true",
    ]  # fmt: skip
    first = run("finetune.py", *options, "--model", "", "--freeze", "encoder")
    assert first.returncode == 0 and "Frozen: encoder" in first.stdout, first.stderr[-3000:]
    again = run("finetune.py", *options, "--model", tmp_path / "out", "--max_steps", 6)
    assert again.returncode == 0 and "Frozen: encoder" in again.stdout, again.stderr[-3000:]
    anew = run("finetune.py", *options, "--model", tmp_path / "out", "--resume_from_checkpoint", "false")
    assert anew.returncode != 0 and "is the input" in anew.stderr
    history = json.loads((tmp_path / "out" / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [2, 4, 6]
    other = [
        "--model",
        tmp_path / "out",
        "--unfreeze",
        "encoder",
        "--max_steps",
        2,
        "--output_dir",
        tmp_path / "other",
    ]
    last = run("finetune.py", *options, *other)
    assert last.returncode == 0 and "Frozen" not in last.stdout, last.stderr[-3000:]


def test_two_processes_read_a_stream(labelled, tmp_path):
    """Rows of different lengths, so that no process could cut up a batch for the others."""
    rows = [json.loads(line) for line in (labelled / "train.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["text"] += " and more" * (number % 5)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        EXAMPLES / "configs" / "sst2.yaml", "--train_file", tmp_path / "train.jsonl",
        *files(labelled, ("validation",)), *SHORT, "--streaming", "true", "--report_to", "none",
        "--model", "", "--vocab_size", 350, "--config", '{"hidden_size": 32, "num_attention_heads": 2}',
        "--per_device_train_batch_size", 8, "--output_dir", tmp_path / "out", "--use_cpu",
        "--ddp_find_unused_parameters", "false",
    ]  # fmt: skip
    finished = run_on_two("finetune.py", *arguments)
    assert finished.returncode == 0, finished.stderr[-3000:]


def test_tokenized_rows_are_kept_for_the_same_options(labelled, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import common

    from yan_hf import train_tokenizer

    tokenizer = train_tokenizer(["good fine bad poor film"] * 20, vocab_size=300)
    options = {"task": "classification", "class_names": ["no", "yes"], "encoded": str(tmp_path / "rows")}
    options["train_file"] = str(labelled / "train.jsonl")
    splits = common.read_splits(common.DataArguments(**options))
    first = common.encode_splits(splits, tokenizer, common.DataArguments(**options))
    again = common.encode_splits({}, tokenizer, common.DataArguments(**options, align=True))
    assert again["train"]["input_ids"][:] == first["train"]["input_ids"][:]
    for change in ({"max_source_length": 7}, {"streaming": True}):
        with pytest.raises(ValueError, match=next(iter(change)) if "streaming" not in change else "streamed"):
            common.encode_splits({}, tokenizer, common.DataArguments(**{**options, **change}))
    other = train_tokenizer(["good fine bad poor films"] * 20, vocab_size=290)
    with pytest.raises(ValueError, match="`tokenizer` was"):
        common.encode_splits({}, other, common.DataArguments(**options))


def test_a_share_of_the_paragraphs_gets_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import common

    from yan_hf import train_tokenizer

    tokenizer = train_tokenizer(["the old man went to the sea and saw a red boat"] * 20, vocab_size=300)
    rows = [{"text": f"the old man went to the sea {'and saw a boat ' * (row % 7)}."} for row in range(7)] * 20
    rows += [{"text": f"man {row} saw the `red boat` ."} for row in range(3)]
    options = {"task": "restoration", "pack_tokens": [60], "max_source_length": 90, "max_target_length": 90}
    texts = {}
    for rate in (0.0, 1.0):
        data = common.DataArguments(**options, code_rate=rate)
        found = common.encode_splits(dict.fromkeys(("train", "test"), Dataset.from_list(rows)), tokenizer, data)
        texts[rate] = tokenizer.batch_decode(found["train"]["labels"][:], skip_special_tokens=True)
        assert sum("`" in text for text in tokenizer.batch_decode(found["test"]["labels"][:])) == 3
    assert [text.replace("`", "") for text in texts[1.0]] == [text.replace("`", "") for text in texts[0.0]]
    assert all(text.count("`") == 2 for text in texts[1.0]) and sum("`" in text for text in texts[0.0]) == 3
    for change in ({"code_rate": 3.0}, {"code_rate": 0.1, "pack_tokens": None}):
        with pytest.raises(ValueError, match="`code_rate` must be a share"):
            common.encode_splits({}, tokenizer, common.DataArguments(**{**options, **change}))


def test_configurations_are_read_with_care(tmp_path):
    for text, message in (
        ("class_names: [no, yes]\n", "quote them"),
        ("train_file: rows.txt\n", "none of the files"),
        ("validation_file: rows.jsonl\n", "train_file"),
    ):
        (tmp_path / "bad.yaml").write_text(f"task: classification\n{text}")
        for name in ("rows.txt", "rows.jsonl"):
            (tmp_path / name).write_text('{"text": "fine", "label": 1}\n')
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        command = [sys.executable, EXAMPLES / "finetune.py", "bad.yaml", "--output_dir", "out"]
        finished = subprocess.run(
            [*map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert finished.returncode != 0 and message in finished.stderr.splitlines()[-1], finished.stderr[-2000:]
    conflict = run(
        "finetune_lora.py", EXAMPLES / "configs" / "sst2_lora.yaml", "--adapt_experts", "--output_dir", tmp_path
    )
    assert conflict.returncode != 0 and "adapt_experts" in conflict.stderr


def test_unknown_option_in_a_configuration_is_refused(tmp_path):
    (tmp_path / "bad.yaml").write_text("task: pairs\nlerning_rate: 1\n")
    finished = run("finetune.py", tmp_path / "bad.yaml", "--output_dir", tmp_path)
    assert finished.returncode == 2 and "lerning_rate" in finished.stderr


def test_an_encoder_is_pretrained_and_a_task_learned_around_it(data, tmp_path):
    """Frozen, with the training rows encoded once; and trained, as an auto-encoder whose checkpoint goes on."""
    sizes = ("--hidden_size", 32, "--num_hidden_layers", 2, "--vocab_size", 350, "--block_size", 32)
    steps = ("--max_steps", 2, "--use_cpu", "true", "--report_to", "none")
    encoder = tmp_path / "encoder"
    texts = ("--train_files", data / "train.jsonl", "--column", "question", "--output_dir", encoder)
    finished = run("pretrain_encoder.py", *texts, *sizes, *steps)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert not AutoModel.from_pretrained(encoder, output_loading_info=True)[1]["missing_keys"]
    task = ("--task", "question_answering", "--train_file", data / "train.jsonl", "--max_source_length", 64, *steps)
    task += ("--test_file", data / "test.jsonl", "--config", "{flow_layers: 1, decoder_layers: 1}")
    frozen = ("--freeze", "encoder", "--encoder", encoder, "--max_target_length", 16, "--output_dir", tmp_path / "a")
    finished = run("finetune.py", *task, *frozen)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "encoding" in finished.stderr
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "a")
    kept, before = model.model.encoder.model.state_dict(), AutoModel.from_pretrained(encoder).state_dict()
    assert all(torch.equal(kept[name], before[name]) for name in before) and model.model.encoder.latent_mean.any()
    stage = (
        "--encoder",
        encoder,
        "--max_target_length",
        64,
        "--masked_answers",
        "true",
        "--output_dir",
        tmp_path / "b",
    )
    finished = run("pretrain_autoencoder.py", *task, *stage, "--output_dir", tmp_path / "b")
    assert finished.returncode == 0, finished.stderr[-2000:]
    goes_on = ("--model", tmp_path / "b", "--max_target_length", 16, "--output_dir", tmp_path / "c")
    finished = run("finetune.py", *task, *goes_on)
    assert finished.returncode == 0, finished.stderr[-2000:]
