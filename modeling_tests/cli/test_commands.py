# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`yan-hf info`, `generate`, `evaluate` and `benchmark`."""

import gzip
import io
import json
import re
import subprocess
import sys

import pytest
import torch
from testing_utils import small_config
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from yan_hf import YanForConditionalGeneration, train_tokenizer
from yan_hf.cli.main import main


WORDS = ["one", "two", "three", "four", "five"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    tokenizer = train_tokenizer([" ".join(WORDS)] * 20, vocab_size=300, model_type="bpe")
    YanForConditionalGeneration(small_config(vocab_size=len(tokenizer))).save_pretrained(
        folder, max_shard_size="100KB"
    )
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Words\n")
    return folder


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


# info


def test_info(checkpoint, capsys):
    status, output, _ = run(capsys, "info", checkpoint, "--json")
    assert status == 0
    found = json.loads(output)
    model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint)
    assert found["parameters"] == model.num_parameters()
    tables = [model.model.embed_tokens, model.model.embed_positions, model.lm_head]
    assert found["embedding_parameters"] == sum(p.numel() for table in tables for p in table.parameters())
    assert found["core_parameters"] == found["parameters"] - found["embedding_parameters"]
    assert found["weight_files"] > 2 and found["dtype"] == "F32" and found["license"] == "mit"
    assert found["num_inference_steps"] == 3 and found["routing"] == "token" and found["num_experts"] == 4
    assert found["tokenizer"] is True and found["saved_with_code"] is False and found["training_steps"] is None
    status, output, _ = run(capsys, "info", checkpoint)
    assert status == 0 and f"parameters: {found['parameters']}\n" in output


def test_info_of_a_trainers_checkpoint(checkpoint, tmp_path, capsys):
    AutoModelForSeq2SeqLM.from_pretrained(checkpoint, dtype=torch.bfloat16).save_pretrained(tmp_path)
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 70}))
    found = json.loads(run(capsys, "info", tmp_path, "--json")[1])
    assert found["training_steps"] == 70 and found["dtype"] == "BF16" and found["license"] is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "'bert'"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"12345678 nothing"),
            "model.safetensors is damaged",
        ),
    ],
)
def test_info_of_something_else_is_one_line_and_status_1(checkpoint, tmp_path, capsys, spoil, message):
    AutoModelForSeq2SeqLM.from_pretrained(checkpoint).save_pretrained(tmp_path)
    spoil(tmp_path)
    capsys.readouterr()
    status, output, error = run(capsys, "info", tmp_path)
    assert status == 1 and output == "" and message in error and len(error.splitlines()) == 1


# generate


def test_generate_from_a_file(checkpoint, tmp_path, capsys):
    source = tmp_path / "sources.txt"
    source.write_text("\n".join(WORDS) + "\n")
    output = tmp_path / "new" / "texts.jsonl"
    status, printed, _ = run(capsys, "generate", checkpoint, "--input", source, "--output", output)
    assert status == 0 and printed == ""
    found = lines(output.read_text())
    assert [row["source"] for row in found] == WORDS
    assert all(set(row) == {"source", "text", "length", "length_mode", "score"} for row in found)
    assert {row["length_mode"] for row in found} == {"predicted"}
    assert all(row["score"] < 0 and row["length"] >= 1 for row in found)


def test_texts_do_not_depend_on_the_batch_size_but_on_the_seed(checkpoint, tmp_path, capsys):
    source = tmp_path / "sources.txt"
    source.write_text("\n".join(WORDS) + "\n")
    texts = []
    for options in (["--batch-size", 1], ["--batch-size", 2], ["--batch-size", 5], ["--seed", 1]):
        printed = run(capsys, "generate", checkpoint, "--input", source, *options)[1]
        texts.append([row["text"] for row in lines(printed)])
    assert texts[0] == texts[1] == texts[2] != texts[3]


def test_generate_from_a_column_several_texts_for_each_source(checkpoint, tmp_path, capsys):
    source = tmp_path / "sources.jsonl.gz"
    with gzip.open(source, "wt") as file:
        file.writelines(json.dumps({"question": word}) + "\n" for word in WORDS)
    arguments = ["--input", source, "--column", "question", "--num-return-sequences", 2, "--steps", 2]
    found = lines(run(capsys, "generate", checkpoint, *arguments, "--max-new-tokens", 4)[1])
    assert [row["source"] for row in found] == [word for word in WORDS for _ in range(2)]
    assert max(row["length"] for row in found) <= 4


def test_generate_from_standard_input(checkpoint, capsys, monkeypatch):
    def stdin(text: str):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    stdin("one two\nthree\n")
    assert [row["source"] for row in lines(run(capsys, "generate", checkpoint)[1])] == ["one two", "three"]
    stdin('{"q": "four"}\n')
    assert [row["source"] for row in lines(run(capsys, "generate", checkpoint, "--column", "q")[1])] == ["four"]
    stdin('{"q": 4}\n')
    status, _, error = run(capsys, "generate", checkpoint, "--column", "q")
    assert status == 1 and "line 1" in error and "`q`" in error


@pytest.mark.parametrize(
    ("bad", "message"), [("", "sources.txt, source 2 is empty"), ("one " * 60, "source 2 has .* at most")]
)
def test_a_bad_source_is_named_and_what_comes_before_it_is_written(checkpoint, tmp_path, capsys, bad, message):
    source, output = tmp_path / "sources.txt", tmp_path / "texts.jsonl"
    source.write_text(f"one\n{bad}\n")
    arguments = ["--input", source, "--output", output]
    status, _, error = run(capsys, "generate", checkpoint, *arguments)
    assert status == 1 and re.search(message, error) and "--resume" in error
    assert [row["source"] for row in lines((tmp_path / "texts.jsonl.partial").read_text())] == ["one"]
    assert not output.exists()


def test_what_cannot_be_generated_from(checkpoint, tmp_path, capsys):
    assert "no file" in run(capsys, "generate", checkpoint, "--input", tmp_path / "absent.txt")[2]
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert "--column" in run(capsys, "generate", checkpoint, "--input", tmp_path / "rows.jsonl")[2]
    AutoModelForSeq2SeqLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "bare")
    capsys.readouterr()
    assert "no tokenizer" in run(capsys, "generate", tmp_path / "bare", "--input", tmp_path / "rows.jsonl")[2]
    for arguments in (["--batch-size", "0"], ["--dtype", "int8"]):
        with pytest.raises(SystemExit) as stopped:
            main(["generate", str(checkpoint), *arguments])
        assert stopped.value.code == 2


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_gets_no_traceback(checkpoint, tmp_path):
    source = tmp_path / "sources.txt"
    source.write_text("one\n" * 200)
    command = f"{sys.executable} -m yan_hf.cli.main generate {checkpoint} --input {source} --batch-size 1 | head -n 1"
    finished = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert len(finished.stdout.splitlines()) == 1 and "Traceback" not in finished.stderr


# evaluate


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"source": word, "target": word}) + "\n" for word in WORDS))
    return path


def test_the_choices_of_experts_are_shown_step_by_step(checkpoint, tmp_path, capsys, monkeypatch):
    source, output = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("one two\n")
    options = ["--input", source, "--show-experts", "--expert-scope", "target", "--reselect-experts"]
    assert run(capsys, "generate", checkpoint, *options, "--output", output)[0] == 0
    (row,) = map(json.loads, output.read_text().splitlines())
    assert len(row["steps"]) == 3 and all(len(step) == row["length"] for step in row["steps"])
    for step in row["steps"]:
        assert len({expert for _, expert in step}) == 1  # the target shares its choice
    monkeypatch.setenv("FORCE_COLOR", "1")
    status, shown, _ = run(capsys, "generate", checkpoint, *options)
    lines = shown.splitlines()
    assert status == 0 and lines[0] == "one two" and len(lines) == 4
    assert all(line.startswith("  step ") and "\x1b[38;5;" in line for line in lines[1:])
    monkeypatch.setenv("NO_COLOR", "1")
    plain = run(capsys, "generate", checkpoint, *options)[1].splitlines()
    assert plain[1].startswith(f"  step 1: [{row['steps'][0][0][1]}]") and "\x1b" not in plain[1]


def test_evaluate(checkpoint, pairs, capsys):
    arguments = ["--file", pairs, "--seeds", 2, "--steps", 1, 3, "--metrics", "exact_match", "rouge", "--json"]
    status, output, _ = run(capsys, "evaluate", checkpoint, *arguments)
    assert status == 0
    found = json.loads(output)
    assert found["rows"] == 5 and found["skipped_rows"] == 0 and found["seeds"] == 2
    assert [(row["lengths"], row["steps"]) for row in found["results"]] == [
        ("predicted", 1), ("predicted", 3), ("true", 1), ("true", 3),
    ]  # fmt: skip
    assert all({"exact_match", "exact_match_spread", "rougeL_spread"} <= set(row) for row in found["results"])


def test_evaluate_restoration(checkpoint, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"One, two {word}."}) + "\n" for word in WORDS))
    metrics = ["word_error_rate", "punctuation_f1", "wrong_edit_rate", "unchanged_rate"]
    arguments = ["--file", tmp_path / "rows.jsonl", "--task", "restoration", "--corruption", '{"clean_rate": 1}']
    arguments += ["--seeds", 1, "--steps", 1, "--length-modes", "true", "--json", "--metrics", *metrics]
    status, output, _ = run(capsys, "evaluate", checkpoint, *arguments)
    (row,) = json.loads(output)["results"]
    assert status == 0 and {*metrics, "punctuation_f1_comma"} <= set(row) and row["unchanged_rate"] == 0
    arguments[arguments.index('{"clean_rate": 1}')] = '{"rate": 1}'
    status, _, error = run(capsys, "evaluate", checkpoint, *arguments)
    assert status == 1 and "`corruption`" in error and "'rate'" in error


def test_options_of_generate_reach_it(checkpoint, pairs, capsys, monkeypatch):
    """For both commands; a list of times says how many steps an evaluation has."""
    asked = []

    def note(self, input_ids, **options):
        from yan_hf import YanGenerateOutput

        asked.append(options)
        scores = torch.zeros(len(input_ids))
        return YanGenerateOutput(
            sequences=input_ids, lengths=(input_ids != 0).sum(-1), length_mode="predicted", sequence_scores=scores
        )

    monkeypatch.setattr(YanForConditionalGeneration, "generate", note)
    options = ["--time-schedule", "[0, .2, 1]", "--expert-scope", "target", "--reselect-experts"]
    (pairs.parent / "sources.txt").write_text("one\n")
    assert run(capsys, "generate", checkpoint, "--input", pairs.parent / "sources.txt", *options)[0] == 0
    assert run(capsys, "evaluate", checkpoint, "--file", pairs, "--seeds", 1, *options)[0] == 0
    expected = {"time_schedule": [0, 0.2, 1], "expert_scope": "target", "reselect_experts": True}
    assert all(expected.items() <= found.items() for found in asked)
    assert asked[-1]["num_inference_steps"] == 2 and "num_inference_steps" not in asked[0]


def test_evaluate_is_right_about_a_model_that_copies(checkpoint, pairs, capsys, monkeypatch):
    """Texts that equal their targets have an exact match of one; others of zero."""

    def copy(self, input_ids, **options):
        from yan_hf import YanGenerateOutput

        ids = input_ids if copy.right else torch.full_like(input_ids, 2)
        return YanGenerateOutput(sequences=ids, lengths=(ids != 0).sum(-1), length_mode="predicted")

    monkeypatch.setattr(YanForConditionalGeneration, "generate", copy)
    arguments = ["--file", pairs, "--seeds", 1, "--length-modes", "predicted", "--json"]
    for copy.right, expected in ((True, 1.0), (False, 0.0)):
        found = json.loads(run(capsys, "evaluate", checkpoint, *arguments)[1])
        assert [row["exact_match"] for row in found["results"]] == [expected]


def test_evaluate_asks_as_the_model_was_trained(checkpoint, tmp_path, capsys, monkeypatch):
    """The options that say where the mask stands reach the sources."""
    asked = []

    def note(self, input_ids, **options):
        from yan_hf import YanGenerateOutput

        asked.extend(input_ids.tolist())
        return YanGenerateOutput(sequences=input_ids, lengths=(input_ids != 0).sum(-1), length_mode="predicted")

    monkeypatch.setattr(YanForConditionalGeneration, "generate", note)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "A dog. A cat.", "label": 0}) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    common = ["--file", path, "--seeds", 1, "--length-modes", "predicted"]
    classes = ["--task", "classification", "--class-names", "no", "yes", "--add-mask", "--mask-first"]
    story = ["--task", "last_word", "--max-sentences", 1, "--space-in-target"]
    for arguments, source in ((classes, "<mask> A dog. A cat."), (story, "A<mask>.")):
        asked.clear()
        assert run(capsys, "evaluate", checkpoint, *common, *arguments)[0] == 0
        assert asked == [tokenizer(source)["input_ids"]]


def test_evaluate_prints_a_row_for_each_mode(checkpoint, pairs, capsys):
    status, output, _ = run(capsys, "evaluate", checkpoint, "--file", pairs, "--seeds", 1, "--max-rows", 2)
    assert status == 0
    assert "lengths predicted, steps 3" in output and "lengths true, steps 3" in output and "rows: 2" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics", "bleurt"], "`metrics`.*bleurt"),
        (["--task", "dancing"], "`task`.*dancing"),
        (["--task", "classification"], "no column `text`"),
        (["--max-source-length", 400], "400"),
        (["--mask-first"], "`add_mask=True`"),
        (["--max-sentences", 2], "`max_sentences`.*pairs"),
    ],
)
def test_what_cannot_be_evaluated(checkpoint, pairs, capsys, arguments, message):
    status, _, error = run(capsys, "evaluate", checkpoint, "--file", pairs, *arguments)
    assert status == 1 and re.search(message, error), error


def test_evaluate_wants_rows(checkpoint, capsys):
    assert run(capsys, "evaluate", checkpoint)[0] == 1


# benchmark


def test_benchmark(checkpoint, capsys):
    arguments = ["--lengths", 4, 8, "--batch-sizes", 1, 2, "--rounds", 2, "--source-length", 6, "--json"]
    status, output, _ = run(capsys, "benchmark", checkpoint, *arguments)
    assert status == 0
    found = json.loads(output)
    assert [(row["target_length"], row["batch_size"]) for row in found["results"]] == [(4, 1), (4, 2), (8, 1), (8, 2)]
    for row in found["results"]:
        rate = 1000 * row["target_length"] * row["batch_size"] / row["milliseconds"]
        assert row["tokens_per_second"] == pytest.approx(rate)
    status, _, error = run(capsys, "benchmark", checkpoint, "--lengths", 400)
    assert status == 1 and "400" in error
