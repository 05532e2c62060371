# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""No command takes anything away unasked, and what cannot be read is one line that names it."""

import argparse
import io
import json
import os
import re

import pytest
import torch
from research_reference import random_checkpoint
from testing_utils import small_config
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, BartConfig, BartForConditionalGeneration

from yan_hf import YanForConditionalGeneration, convert_research_checkpoint, export_with_code, train_tokenizer
from yan_hf.cli.main import main
from yan_hf.data.files import whole_file
from yan_hf.hub.model_card import save_card


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    tokenizer = train_tokenizer(["one two three four five"] * 20, vocab_size=300, model_type="bpe")
    torch.manual_seed(0)
    YanForConditionalGeneration(small_config(vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def files(tmp_path, checkpoint):
    """What the commands read: a research file, a text for a tokenizer, sources."""
    torch.save(random_checkpoint(), tmp_path / "research.pt")
    (tmp_path / "text.txt").write_text("one two three\n" * 20)
    (tmp_path / "sources.txt").write_text("one\ntwo\nthree\n")
    return tmp_path


def run(capsys, *arguments) -> tuple[int, str]:
    status = main([str(argument) for argument in arguments])
    return status, capsys.readouterr().err


def snapshot(folder) -> dict:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


COMMANDS = {
    "convert": lambda files, model: ["convert", "--checkpoint", files / "research.pt"],
    "export": lambda files, model: ["export", model, "--with-code"],
    "train-tokenizer": lambda files, model: ["train-tokenizer", files / "text.txt", "--vocab-size", 280],
}


# Folders


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_with_anything_in_it_is_refused_untouched(files, checkpoint, capsys, command, monkeypatch):
    arguments = COMMANDS[command](files, checkpoint)
    mine = files / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    (files / "link").symlink_to(mine)
    monkeypatch.chdir(mine)
    before = snapshot(files)
    for output in (mine, files / "link", "."):
        for overwrite in ([], ["--overwrite"]):
            status, error = run(capsys, *arguments, "--output", output, *overwrite)
            assert status == 1 and "thesis.txt" in error
    status, error = run(capsys, *arguments, "--output", files / "text.txt", "--overwrite")
    assert status == 1 and "is a file" in error
    assert snapshot(files) == before
    assert not [path for path in [*files.iterdir(), *mine.iterdir()] if path.name.startswith(".")]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_checkpoint_is_replaced_file_by_file_when_asked(files, checkpoint, capsys, command):
    arguments = [*COMMANDS[command](files, checkpoint), "--output", files / "new"]
    (files / "new").mkdir()  # empty
    assert run(capsys, *arguments)[0] == 0
    (files / "new" / "notes.txt").write_text("mine")
    (files / "link").symlink_to(files / "new")
    before = snapshot(files)
    status, error = run(capsys, *arguments)
    assert status == 1 and "notes.txt" in error and "--overwrite" in error and snapshot(files) == before
    arguments[-1] = files / "link"
    assert run(capsys, *arguments, "--overwrite")[0] == 0
    assert snapshot(files).keys() == before.keys() and (files / "new" / "notes.txt").read_text() == "mine"
    assert (files / "link").is_symlink()


def test_a_checkpoint_may_be_exported_over_itself(checkpoint, tmp_path, capsys):
    export_with_code(checkpoint, tmp_path / "model")
    old = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model").state_dict()
    assert run(capsys, "export", tmp_path / "model", "--with-code", "--output", tmp_path / "model")[0] == 1
    export_with_code(tmp_path / "model", tmp_path / "model", overwrite=True)
    new = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(old[name], value) for name, value in new.items())
    assert (tmp_path / "model" / "modeling_yan.py").is_file()


def test_export_to_research_replaces_research_files_only(files, capsys):
    convert_research_checkpoint(files / "research.pt", files / "model")
    arguments = ["export", files / "model", "--to-research", "--output"]
    before = snapshot(files)
    for output in ("text.txt", "model/model.safetensors", "research.pt"):
        assert run(capsys, *arguments, files / output)[0] == 1
    assert run(capsys, *arguments, files / "text.txt", "--overwrite")[0] == 1
    assert run(capsys, *arguments, files / "model" / "model.safetensors", "--overwrite")[0] == 1
    assert snapshot(files) == before
    assert run(capsys, *arguments, files / "research.pt", "--overwrite")[0] == 0
    assert snapshot(files).keys() == before.keys()


def test_a_card_replaces_cards_only(tmp_path):
    from huggingface_hub import ModelCard

    card = ModelCard("---\ntags:\n- yan\n---\n# Mine\n")
    for _ in range(2):
        save_card(card, tmp_path)
    (tmp_path / "README.md").write_text("# My project\n")
    with pytest.raises(FileExistsError, match="README.md"):
        save_card(card, tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My project\n"


# generate


def texts(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_generate_never_writes_over_what_it_reads(files, checkpoint, capsys, monkeypatch):
    source = files / "sources.txt"
    (files / "hard").hardlink_to(source)
    (files / "soft").symlink_to(source)
    (files / "sub").mkdir()
    before = snapshot(files) | snapshot(checkpoint)
    for output in (source, files / "hard", files / "soft", files / "sub" / ".." / "sources.txt"):
        status, error = run(capsys, "generate", checkpoint, "--input", source, "--output", output)
        assert status == 1 and "is the input" in error
    with source.open() as redirected:
        monkeypatch.setattr("sys.stdin", redirected)
        assert "is the input" in run(capsys, "generate", checkpoint, "--output", source)[1]
    weights = checkpoint / "model.safetensors"
    assert "is the input" in run(capsys, "generate", checkpoint, "--input", source, "--output", weights)[1]
    source.rename(files / "x.partial")
    arguments = ["--input", files / "x.partial", "--output", files / "x"]
    assert "is the input" in run(capsys, "generate", checkpoint, *arguments)[1]
    (files / "x.partial").rename(source)
    assert snapshot(files) | snapshot(checkpoint) == before


def test_an_output_is_replaced_when_all_is_written(files, checkpoint, capsys):
    output, real = files / "link.jsonl", files / "real.jsonl"
    real.write_text("old")
    output.symlink_to(real)
    arguments = ["generate", checkpoint, "--input", files / "sources.txt", "--output", output]
    (files / "sources.txt").write_text("\n")
    assert run(capsys, *arguments)[0] == 1 and real.read_text() == "old"
    assert not (files / "real.jsonl.partial").exists()
    (files / "sources.txt").write_text("one\n")
    assert run(capsys, *arguments)[0] == 0
    assert texts(real)[0]["source"] == "one" and output.is_symlink()
    assert run(capsys, *arguments[:-1], "/dev/null")[0] == 0 and not os.path.isfile("/dev/null")


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("cut", [0, 1, 3, 5])
def test_resume_gives_what_one_run_gives(files, checkpoint, capsys, copies, cut):
    output = files / "texts.jsonl"
    arguments = ["generate", checkpoint, "--input", files / "sources.txt", "--num-return-sequences", copies]
    arguments += ["--output", output, "--batch-size", 2]
    assert run(capsys, *arguments)[0] == 0
    lines = output.read_bytes().splitlines(keepends=True)
    for partial in (output, files / "texts.jsonl.partial"):  # of an earlier run with other sources, or of this one
        output.unlink(missing_ok=True)
        partial.write_bytes(b"".join(lines[:cut]) + (lines[cut][:10] if cut < len(lines) else b""))
        assert run(capsys, *arguments, "--resume")[0] == 0
        # Scores are the same up to rounding, which depends on the batch.
        for row, expected in zip(texts(output), map(json.loads, lines), strict=True):
            assert row == {**expected, "score": pytest.approx(expected["score"], abs=1e-5)}
        assert not (files / "texts.jsonl.partial").exists()


def test_resume_needs_the_same_sources(files, checkpoint, capsys):
    partial = files / "texts.jsonl.partial"
    arguments = ["generate", checkpoint, "--input", files / "sources.txt", "--output", files / "texts.jsonl"]
    for content, message in (
        ('{"source": "two"}\n', "not written for these sources"),
        ('{"source": "one"}\n{"source": "one"}\n', "not written for these sources"),
        ("".join(f'{{"source": "{word}"}}\n' for word in ("one", "two", "three", "four")), "not written for these"),
        ('{"source": "one"}\nmy notes\n', "row 2"),
    ):
        partial.write_text(content)
        assert "--resume" in run(capsys, *arguments)[1]
        status, error = run(capsys, *arguments, "--resume")
        assert status == 1 and message in error and partial.read_text() == content
    with pytest.raises(SystemExit):
        main(["generate", str(checkpoint), "--resume"])


def test_an_output_that_cannot_be_made_stays(files, checkpoint, capsys, monkeypatch):
    """No sources, as of a command that failed before a pipe; rows of something else; a file that is protected."""
    output = files / "out.jsonl"
    output.write_text("mine\n")
    before = snapshot(files)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert "Standard input holds no sources" in one_line(capsys, "generate", checkpoint, "--output", output)
    arguments = ["generate", checkpoint, "--input", files / "sources.txt", "--output", output]
    assert "out.jsonl, row 1" in one_line(capsys, *arguments, "--resume")
    monkeypatch.setattr("os.access", lambda path, mode: not str(path).endswith("out.jsonl"))
    assert "out.jsonl is protected" in one_line(capsys, *arguments)
    with pytest.raises(PermissionError), whole_file(output) as file:
        file.write_text("others'")
    assert snapshot(files) == before


def test_special_tokens_of_a_source_are_text_and_the_marker_masks(checkpoint, files, capsys, monkeypatch):
    tokenizer, asked = AutoTokenizer.from_pretrained(checkpoint), []
    generate = YanForConditionalGeneration.generate

    def spy(self, input_ids, *args, **kwargs):
        asked.append(input_ids[0].tolist())
        return generate(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(YanForConditionalGeneration, "generate", spy)
    (files / "sources.txt").write_text("one <mask>\n")
    arguments = ["generate", checkpoint, "--input", files / "sources.txt"]
    for options in ([], ["--mask-marker", "<mask>"], ["--special-tokens"], ["--mask-marker", "one"]):
        assert run(capsys, *arguments, *options)[0] == 0
    masked, text = (
        tokenizer("one <mask>")["input_ids"],
        tokenizer("one <mask>", split_special_tokens=True)["input_ids"],
    )
    assert asked[:3] == [text, masked, masked]
    assert asked[3].count(tokenizer.mask_token_id) == 1 and asked[3][0] == tokenizer.mask_token_id


# One line


def one_line(capsys, *arguments) -> str:
    capsys.readouterr()
    status, error = run(capsys, *arguments)
    line = error.strip().splitlines()[-1]
    assert status == 1 and line.startswith(f"yan-hf {arguments[0]}: ") and "Traceback" not in error
    return line


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "tpu", "cuda:9"])
def test_a_device_that_is_not_there(checkpoint, files, capsys, device):
    for command in (["generate", checkpoint, "--input", files / "sources.txt"], ["benchmark", checkpoint]):
        assert f"--device {device}" in one_line(capsys, *command, "--device", device)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "content", ["{", "[1]", "null", "\xff", '{"model_type": "yan", "hidden_size": "big", "solver": 3}']
)
def test_broken_files_of_a_checkpoint(checkpoint, files, capsys, name, content):
    for path in checkpoint.iterdir():
        (files / "broken").mkdir(exist_ok=True)
        (files / "broken" / path.name).write_bytes(path.read_bytes())
    (files / "broken" / name).write_bytes(content.encode("latin-1"))
    named = "broken, tokenizer" if name == "tokenizer.json" else "broken"
    assert named in one_line(capsys, "generate", files / "broken", "--input", files / "sources.txt")
    if name != "tokenizer.json":
        assert "broken" in one_line(capsys, "info", files / "broken")
    if name == "generation_config.json":
        with pytest.raises((OSError, ValueError), match="generation_config.json"):
            AutoModelForSeq2SeqLM.from_pretrained(files / "broken")


def test_a_model_of_another_type_is_refused(files, capsys):
    """Its weights would be left aside, and random ones taken."""
    sizes = {"vocab_size": 60, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    BartForConditionalGeneration(BartConfig(**sizes)).save_pretrained(files / "bart")
    for command in (
        ["info", files / "bart"],
        ["generate", files / "bart", "--input", files / "sources.txt"],
        ["benchmark", files / "bart"],
        ["export", files / "bart", "--with-code", "--output", files / "new"],
        ["export", files / "bart", "--to-research", "--output", files / "new"],
    ):
        assert "'bart'" in one_line(capsys, *command)
    assert not (files / "new").exists()


@pytest.mark.parametrize("line", ["[" * 100_000, f'{{"q": {"1" * 5000}}}'])
def test_a_line_that_json_gives_up_on_is_named(checkpoint, files, capsys, line):
    (files / "rows.jsonl").write_text(f'{{"q": "one"}}\n{line}\n')
    arguments = ["--input", files / "rows.jsonl", "--column", "q", "--output", files / "out"]
    assert "rows.jsonl, line 2" in one_line(capsys, "generate", checkpoint, *arguments)


def test_a_row_that_cannot_be_evaluated_is_named_with_its_file(checkpoint, files, capsys):
    (files / "rows.jsonl").write_text('{"source": "one", "target": ""}\n')
    assert "rows.jsonl: Row 0" in one_line(capsys, "evaluate", checkpoint, "--file", files / "rows.jsonl")


def test_files_that_are_no_text(checkpoint, files, capsys, monkeypatch):
    bad = files / "bad.txt"
    bad.write_bytes(b"one\n\xff\n")
    assert "bad.txt is not UTF-8" in one_line(capsys, "generate", checkpoint, "--input", bad)
    assert "bad.txt is not UTF-8" in one_line(capsys, "train-tokenizer", bad, "--output", files / "t")
    stdin = io.TextIOWrapper(io.BytesIO(b"\xff\n"), errors="surrogateescape")
    monkeypatch.setattr("sys.stdin", stdin)
    assert "Standard input is not UTF-8" in one_line(capsys, "generate", checkpoint)
    (files / "half.jsonl").write_text('{"text": "\\ud800"}\n')
    arguments = ["--input", files / "half.jsonl", "--column", "text"]
    assert "half.jsonl, source 1 holds half" in one_line(capsys, "generate", checkpoint, *arguments)
    (files / "empty.jsonl").write_text("")
    assert "empty.jsonl" in one_line(capsys, "evaluate", checkpoint, "--file", files / "empty.jsonl")
    assert "empty" in one_line(
        capsys, "train-tokenizer", files / "empty.jsonl", "--column", "text", "--output", files / "t"
    )


def test_byte_order_marks_and_blank_lines_are_no_text(checkpoint, files, capsys, monkeypatch):
    rows = files / "rows.jsonl"
    rows.write_bytes('\ufeff{"q": "one"}\n\n{"q": "two"}\n'.encode())
    (files / "sources.txt").write_bytes("\ufeffone\ntwo\n".encode())
    for arguments in (["--input", rows, "--column", "q"], ["--input", files / "sources.txt"], ["--column", "q"]):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(rows.read_bytes())))
        assert run(capsys, "generate", checkpoint, *arguments, "--output", files / "out.jsonl")[0] == 0
        assert [row["source"] for row in texts(files / "out.jsonl")] == ["one", "two"]


# Help


def test_help_says_what_becomes_of_what_is_there(capsys, monkeypatch):
    """Of every command that takes an output."""
    added = {}
    original = argparse._SubParsersAction.add_parser

    def add_parser(self, name, **options):
        added[name] = original(self, name, **options)
        return added[name]

    monkeypatch.setattr(argparse._SubParsersAction, "add_parser", add_parser)
    with pytest.raises(SystemExit):
        main(["--help"])
    writing = {name for name, parser in added.items() if "--output" in parser._option_string_actions}
    assert writing == {"convert", "encode-dataset", "export", "generate", "train-tokenizer"}
    for name in writing:
        assert re.search("replace", added[name].description), name
