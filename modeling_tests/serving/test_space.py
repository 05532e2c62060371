# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The web page: what it shows is what `generate` makes, and in a browser it shows it."""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from testing_utils import small_model
from transformers import BartConfig, BartForConditionalGeneration
from writing import MAX_CHARACTERS, Writer, choose_writer, follow

from yan_hf import train_tokenizer


ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
TEXT = "one two three four"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of a model for each task, and of an autoregressive one."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tokenizer = train_tokenizer(["one two three four five six seven eight nine ten"] * 20, vocab_size=300)
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
        decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=48,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    models = {"rival": BartForConditionalGeneration(config)}
    for task, start_state in (("restoration", "fertility"), ("infilling", "aligned")):
        models[task] = small_model(vocab_size=len(tokenizer), start_state=start_state, max_position_embeddings=48)
    for task, model in models.items():
        model.generation_config.suppress_tokens = list(range(261))  # words only
        model.save_pretrained(folder / task)
        tokenizer.save_pretrained(folder / task)
    return folder


@pytest.fixture(scope="module")
def writers(checkpoints):
    return {task: Writer.load(str(checkpoints / task)) for task in ("restoration", "infilling", "rival")}


@pytest.mark.parametrize(("task", "text"), [("restoration", TEXT), ("infilling", "one <mask> three <mask>")])
def test_drafts_come_after_every_step_and_end_as_the_text_of_generate(writers, task, text):
    writer = choose_writer(writers, text)
    assert writer is writers[task]
    *drafts, last = list(writer.write(text, 3, 2, 5))
    assert [len(event.steps) for event in drafts] == [1, 2, 3] and [event.passes for event in drafts] == [None] * 3

    def texts(step):
        return ["".join(piece for piece, _ in pieces) for pieces in step]

    assert [texts(step) for step in last.steps] == [texts(step) for step in drafts[-1].steps]
    options = {"num_inference_steps": 3, "num_return_sequences": 2, "seeds": [5, 6], "max_new_tokens": 48}
    options |= {"keep_known": task == "infilling", "return_dict_in_generate": True, "output_expert_indices": True}
    output = writer.model.generate(**writer.encode(text), **options)
    assert texts(last.steps[-1]) == writer.tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
    for step in last.steps:
        for pieces, experts in zip(step, output.expert_indices.tolist()):
            assert pieces and [expert for _, expert in pieces] == experts[: len(pieces)]
    assert last.passes == 3 and all(expert is None for _, expert in drafts[0].steps[0][0])


def test_bytes_of_one_character_are_one_piece(writers):
    writer, text = writers["restoration"], "one é€🙂 two"
    (ids,) = writer.encode(text)["input_ids"].tolist()
    (pieces,) = writer._pieces(torch.tensor([ids]), torch.zeros(1, len(ids), dtype=torch.long))
    assert [piece for piece, _ in pieces if piece in "é€🙂"] == list("é€🙂")
    assert "".join(piece for piece, _ in pieces) == text
    start, bad = ids.index(writer.tokenizer.convert_tokens_to_ids("<0xF0>")), "\ufffd"
    for cut, whole in ((ids[:start] + ids[start + 1 :], "one é€ two"), (ids[: start + 2], "one é€")):
        (broken,) = writer._pieces(torch.tensor([cut]))
        found = "".join(piece for piece, _ in broken)
        assert bad in found and found.replace(bad, "") == whole


def test_what_a_job_puts_comes_before_its_end_and_its_error_after():
    seen = threading.Event()

    def job(put):
        put("draft")
        assert seen.wait(10)
        raise ValueError("too late")

    events = follow(job)
    assert next(events)[0] == "draft"
    seen.set()
    with pytest.raises(ValueError, match="too late"):
        assert [event for event, _ in events if event is not None] == []


def test_a_race_ends_with_both_texts(writers):
    writer, rival = writers["restoration"], writers["rival"]
    for ours, theirs in writer.race(rival, TEXT, 2, 7):
        assert theirs.seconds == 0 or ours.passes == 2  # one after the other
    assert ours.text == "".join(piece for piece, _ in [*writer.write(TEXT, 2, 1, 7)][-1].steps[-1][0])
    ids = rival.model.generate(**rival.encode(TEXT), max_new_tokens=47, do_sample=False)[0]
    assert theirs.text == rival.tokenizer.decode(ids, skip_special_tokens=True)
    assert theirs.passes == len(ids) - 1 == 47 and min(ours.seconds, theirs.seconds) > 0


@pytest.mark.parametrize(
    ("text", "choices", "message"),
    [
        (None, (3, 1, 0), "There is no text"),
        (" \n", (3, 1, 0), "There is no text"),
        ("a" * (MAX_CHARACTERS + 1), (3, 1, 0), "2001 characters"),
        ("one " * 60, (3, 1, 0), "the model takes 48 at most"),
        ("one <mask>", (3, 1, 0), "no model here that fills holes"),
        (TEXT, (5, 1, 0), "number of steps must be from 1 to 4, but is 5"),
        (TEXT, (3, 0, 0), "number of alternatives"),
        (TEXT, (3, 1, None), "seed"),
    ],
)
def test_what_cannot_be_written_is_refused_with_a_sentence(writers, text, choices, message):
    with pytest.raises(ValueError, match=message):
        list(choose_writer({"restoration": writers["restoration"]}, text).write(text, *choices))


def test_the_space_installs_what_the_package_and_the_page_need():
    project = (ROOT / "pyproject.toml").read_text()
    needed = project.split("dependencies = [")[1].split("]")[0] + project.split("\nspace = [")[1].split("]")[0]
    lines = (ROOT / "spaces/yan/requirements.txt").read_text().splitlines()
    assert {line for line in lines if line[0] not in "#-"} == set(needed.replace('"', "").replace(",\n", "\n").split())


@pytest.fixture
def address(checkpoints):
    """Of the page, without a model that fills holes."""
    for package in ("gradio", "playwright"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not here")
    if not Path(CHROMIUM).exists():
        pytest.skip("there is no Chromium here (Debian's package chromium)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    names = {"YAN_RESTORATION": "restoration", "YAN_RIVAL": "rival"}
    places = {name: str(checkpoints / task) for name, task in names.items()}
    places |= {"GRADIO_SERVER_PORT": port, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    app = subprocess.Popen([sys.executable, ROOT / "spaces/yan/app.py"], cwd=checkpoints, env=os.environ | places)
    try:
        for _ in range(300):
            assert app.poll() is None, "the page did not start"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}").close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        app.terminate()
        app.wait()


@pytest.mark.slow
def test_in_a_browser(address):
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=30_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        foreign, errors = [], []
        page.on("request", lambda request: foreign.append(request.url) if "//127.0.0.1" not in request.url else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        drafts, message = page.locator(".draft:visible"), page.locator("#message textarea")
        text, write = page.locator("#text textarea"), page.locator("#write")

        text.fill(TEXT, timeout=60_000)
        write.click()
        expect(drafts).to_have_count(3)
        for draft in drafts.all():
            expect(draft.locator(".token.highlighted")).not_to_have_count(0)
        expect(page.locator("#figures")).to_contain_text("3 steps, 3 passes")

        page.locator("#steps input[type=number]").fill("2")
        page.locator("#steps input[type=number]").press("Enter")
        expect(drafts).to_have_count(2)
        page.locator("#copies input[type=number]").fill("3")
        page.locator("#copies input[type=number]").press("Enter")
        expect(drafts).to_have_count(6)
        expect(page.locator("#figures")).to_contain_text("2 steps, 2 passes")

        page.locator("#race").click()
        clocks, lanes = page.locator(".prose.clock"), page.locator(".lane textarea")
        expect(clocks.nth(0)).to_contain_text("ms · 2 passes")
        expect(clocks.nth(1)).to_contain_text("ms · 47 passes")
        expect(lanes.nth(0)).not_to_have_value("")
        expect(message).not_to_be_visible()

        for wrong, sentence in (
            ("one <mask> three", "There is no model here that fills holes: leave out <mask>."),
            ("one " * 60, re.compile(r"The text has \d+ tokens, but the model takes 48 at most: shorten it\.")),
            ("", "There is no text: write one first."),
        ):
            text.fill(wrong)
            write.click()
            expect(message).to_have_value(sentence)
            expect(drafts).to_have_count(0)
        text.fill(TEXT)
        write.click()
        expect(message).not_to_be_visible()
        expect(drafts).to_have_count(6)
        browser.close()
    assert not errors and not [url for url in foreign if not url.startswith(("data:", "blob:"))]
