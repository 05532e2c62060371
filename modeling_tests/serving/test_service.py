# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The online service: what each client gets is what `generate` gives with its seed, and bad requests are 4xx."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from testing_utils import small_model
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from yan_hf import encode_text, train_tokenizer


pytest.importorskip("starlette", reason="needs what the service does: pip install -e .[serve]")
pytest.importorskip("prometheus_client", reason="needs what the service does: pip install -e .[serve]")

from yan_hf.serving.engine import Limits, Row, generate_rows, padded_tokens
from yan_hf.serving.front import Front


WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
LIMITS = Limits(max_queued_rows=12, max_batch_tokens=400, max_body_bytes=5000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    tokenizer = train_tokenizer([" ".join(WORDS)] * 20, vocab_size=300)
    model = small_model(vocab_size=len(tokenizer), start_state="aligned", max_position_embeddings=48)
    torch.nn.init.constant_(model.length_head.down_proj.bias[2:], 9.0)  # as long as a limit of 3 allows, and longer
    model.generation_config.update(do_sample=True, suppress_tokens=list(range(261)))
    model.config.mask_token_id = tokenizer.mask_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def expected(loaded, prompt: str, seed: int, **options) -> str:
    model, tokenizer = loaded
    ids = torch.tensor(encode_text(tokenizer, [prompt]))
    found = model.generate(ids, seeds=[seed], **{"max_new_tokens": 48, **options})
    return tokenizer.batch_decode(found, skip_special_tokens=True)[0]


class Direct:
    """The front before a model in this process, called without a network."""

    def __init__(self, loaded, limits: Limits = LIMITS):
        self.model, self.tokenizer = loaded
        self.hold = asyncio.Event()
        self.hold.set()
        self.front = Front(self.write, self.check_ready, "words", self.model.config, self.tokenizer, limits)

    async def write(self, row):
        await self.hold.wait()
        drafts = []
        (result,) = generate_rows(self.model, self.tokenizer, [row], lambda index, text: drafts.append(text))
        for draft in drafts:
            yield {"draft": draft}
        yield {"result": result, "batch_rows": 1}

    async def check_ready(self):
        return True

    async def request(self, method: str, path: str, body: bytes = b""):
        from starlette.requests import Request

        async def receive():
            return {"type": "http.request", "body": body, "more_body": False}

        scope = {"type": "http", "method": method, "path": path, "headers": [], "query_string": b""}
        response = await self.front(Request(scope, receive))
        if hasattr(response, "body_iterator"):
            return response.status_code, [event async for event in response.body_iterator]
        return response.status_code, response.body.decode()

    async def complete(self, **fields):
        status, body = await self.request("POST", "/v1/completions", json.dumps(fields).encode())
        return status, body if isinstance(body, list) else json.loads(body)


def test_texts_are_those_of_generate(loaded):
    async def ask():
        direct = Direct(loaded)
        status, answer = await direct.complete(prompt=["one two", "three </s>"], n=2, seed=7, num_inference_steps=2)
        assert status == 200 and answer["model"] == "words" and answer["usage"]["prompt_tokens"] > 4
        texts = [choice["text"] for choice in answer["choices"]]
        options = {"num_inference_steps": 2}
        prompts = [("one two", 7), ("one two", 8), ("three </s>", 7), ("three </s>", 8)]
        assert texts == [expected(loaded, prompt, seed, **options) for prompt, seed in prompts]
        _, answer = await direct.complete(prompt="one two", seed=7, stop=texts[0][2:3], num_inference_steps=2)
        assert answer["choices"][0]["text"] == texts[0].split(texts[0][2:3])[0]
        _, answer = await direct.complete(prompt="one two three four", seed=7, max_tokens=3)
        assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 3
        _, marked = await direct.complete(prompt="one <mask> three", mask_marker="<mask>", keep_known=True, seed=7)
        filled = marked["choices"][0]["text"]
        _, answer = await direct.complete(prompt="one ", suffix=" three", seed=7)
        assert f"one {answer['choices'][0]['text']} three" == filled
        assert "yan_generated_tokens_total" in (await direct.request("GET", "/metrics"))[1]
        for path in ("/health", "/ready", "/v1/models"):
            assert (await direct.request("GET", path))[0] == 200

    asyncio.run(ask())


def test_a_stream_has_drafts_and_then_the_text(loaded):
    async def ask():
        fields = {"prompt": "one two three", "seed": 3, "n": 2, "num_inference_steps": 4}
        _, whole = await Direct(loaded).complete(**fields)
        status, events = await Direct(loaded).complete(**fields, stream=True, stream_options={"include_usage": True})
        assert status == 200 and events[0].startswith(":") and events[-1] == "data: [DONE]\n\n"
        chunks = [json.loads(event.removeprefix("data: ")) for event in events[1:-1]]
        assert chunks.pop()["usage"] == whole["usage"]
        for index in range(2):
            choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
            assert [choice.get("step") for choice in choices] == [1, 2, 3, 4, None]
            assert choices[3]["draft"] and "".join(choice["text"] for choice in choices) == choices[-1]["text"]
            assert choices[-1] == whole["choices"][index]

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({}, 400, "prompt"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": "one " * 99}, 400, "prompt"),
        ({"prompt": "x" * 6000}, 413, None),
        ({"prompt": [1, 2]}, 400, "prompt"),
        ({"prompt": "one", "n": 99}, 400, "n"),
        ({"prompt": "one", "model": "gpt"}, 404, "model"),
        ({"prompt": "one", "logprobs": 3}, 400, "logprobs"),
        ({"prompt": "one", "presence_penalty": 1}, 400, "presence_penalty"),
        ({"prompt": "one", "temperature": 3}, 400, "temperature"),
        ({"prompt": "one", "stop": [""]}, 400, "stop"),
        ({"prompt": "one", "motto": 1}, 400, "motto"),
        ({"prompt": "one", "seed": -1}, 400, "seed"),
        ({"prompt": "one", "suffix": "", "mask_marker": "_"}, 400, "suffix"),
        ({"prompt": "one two", "num_candidates": 16, "num_length_candidates": 16}, 400, "num_candidates"),
        ({"prompt": ["one"] * 13}, 429, None),
    ],
)
def test_bad_requests_are_refused_with_the_field(loaded, fields, status, param):
    found, answer = asyncio.run(Direct(loaded).complete(**fields))
    assert (found, answer["error"]["param"]) == (status, param) and answer["error"]["message"]


def test_other_paths_and_what_harnesses_send(loaded):
    async def ask():
        direct = Direct(loaded)
        assert (await direct.request("GET", "/v1/completions"))[0] == 405
        assert (await direct.request("GET", "/v2"))[0] == 404
        assert (await direct.request("POST", "/v1/completions", b"{"))[0] == 400
        neutral = {"temperature": 0, "top_p": 1, "best_of": 1, "echo": False, "logprobs": None, "frequency_penalty": 0}
        assert (await direct.complete(prompt="one", user="me", **neutral))[0] == 200

    asyncio.run(ask())


def test_places_in_the_queue_are_free_again_when_a_client_hangs_up(loaded):
    async def ask():
        direct = Direct(loaded)
        direct.hold.clear()
        waiting = asyncio.ensure_future(direct.complete(prompt=["one"] * 10))
        await asyncio.sleep(0)
        while direct.front.queued_rows < 10:
            await asyncio.sleep(0.01)
        assert (await direct.complete(prompt=["one"] * 3))[0] == 429
        assert (await direct.complete(prompt=["one"] * 3, stream=True))[0] == 429
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert direct.front.queued_rows == 0
        direct.hold.set()
        assert (await direct.complete(prompt=["one"] * 3))[0] == 200

    asyncio.run(ask())


def test_a_failed_replica_is_a_503_that_clients_retry(loaded):
    async def ask():
        direct = Direct(loaded)

        async def fail(row):
            raise RuntimeError("gone")
            yield

        direct.front.write = fail
        assert (await direct.complete(prompt="one"))[0] == 503
        events = (await direct.complete(prompt="one", stream=True))[1]
        assert '"server_error"' in events[1] and direct.front.queued_rows == 0

    asyncio.run(ask())


def test_choices_that_a_checkpoint_stratifies_are_drawn(loaded):
    """A row is a text by itself, the first of its source: stratified, all would be the same."""
    _, tokenizer = loaded
    model = small_model(vocab_size=len(tokenizer), expert_scope="target", max_position_embeddings=48)
    model.config.length_head_trained = True
    ids = encode_text(tokenizer, ["one two"])[0]
    expected = [model.generate(torch.tensor([ids]), seeds=[seed], init_noise=0.0) for seed in range(6)]
    model.generation_config.update(expert_selection="stratified", init_noise=0.0)
    found = generate_rows(model, tokenizer, [Row(tuple(ids), seed) for seed in range(6)])
    texts = tokenizer.batch_decode([row[0] for row in expected], skip_special_tokens=True)
    assert [row["text"] for row in found] == texts and len(set(texts)) > 1


def test_a_batch_costs_its_padding():
    rows = [Row((5,) * 3, 0), Row((5,) * 7, 0), Row((5,) * 2, 0, (("num_candidates", 4),))]
    assert padded_tokens(rows) == 6 * 7


@pytest.mark.parametrize(
    ("limits", "sizes"),
    [
        ({"max_batch_tokens": 4 * 3}, [1, 2, 2, 4, 4, 4, 4]),
        ({"max_batch_tokens": 4 * 3, "max_batch_rows": 3}, [1, 3, 3, 3, 3, 3, 3]),
        ({"max_batch_tokens": 5 * 3, "max_batch_rows": 1}, [1] * 7),
    ],
)
def test_rows_that_come_while_a_replica_is_busy_are_one_batch(limits, sizes, folder, monkeypatch):
    pytest.importorskip("ray.serve", reason="needs Ray Serve: pip install -e .[serve]")
    from yan_hf.serving import service

    started, release = threading.Event(), threading.Event()

    def generate(model, tokenizer, rows, put_draft):
        started.set()
        release.wait(timeout=20)
        return [row.seed for row in rows]

    async def ask():
        writer = service.Writer(str(folder), "cpu", "auto", Limits(**limits), num_threads=1)

        async def write(seed: int):
            if seed % 2:
                return [event async for event in writer.stream(Row((5,) * 3, seed))]
            return [await writer.generate(Row((5,) * 3, seed))]

        tasks = [asyncio.ensure_future(write(0))]
        await asyncio.to_thread(started.wait, 20)
        for seed in range(1, 8):
            tasks.append(asyncio.ensure_future(write(seed)))
            await asyncio.sleep(4 * service._BATCH_WAIT_SECONDS)
        tasks.pop(1).cancel()  # its client has hung up
        release.set()
        return await asyncio.gather(*tasks)

    deployment = SimpleNamespace(max_ongoing_requests=64)  # which Ray compares with the size of batches
    monkeypatch.setattr(service.serve, "get_replica_context", lambda: SimpleNamespace(_deployment_config=deployment))
    monkeypatch.setattr(service, "generate_rows", generate)
    found = [event for (event,) in asyncio.run(ask())]
    assert [event["result"] for event in found] == [0, 2, 3, 4, 5, 6, 7]
    assert sorted(event["batch_rows"] for event in found) == sizes


@pytest.fixture
def address(folder):
    """A service of two replicas, started by the command."""
    pytest.importorskip("ray.serve", reason="needs Ray Serve: pip install -e .[serve]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "yan_hf.cli.main", "serve", str(folder), "--port", str(port), "--device", "cpu"]
    command += ["--replicas", "2", "--model-name", "words", "--max-queued-rows", "64"]
    # A busy machine starts Ray slowly.
    environment = {**os.environ, "RAY_raylet_start_wait_time_s": "120"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    for line in process.stdout:
        if line.startswith("Answering at"):
            break
    else:
        pytest.fail(process.stderr.read()[-3000:])
    for pipe in (process.stdout, process.stderr):  # what comes later must not fill them
        threading.Thread(target=pipe.read, daemon=True).start()
    yield f"http://127.0.0.1:{port}"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 1


@pytest.mark.slow
def test_the_official_client_against_two_replicas(address, loaded):
    openai = pytest.importorskip("openai", reason="needs OpenAI's client: pip install openai")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["words"]

    def ask(index: int) -> str:
        prompt = " ".join(WORDS[: 1 + index % 7])
        return client.completions.create(model="words", prompt=prompt, seed=index).choices[0].text

    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(ask, range(48)))
    assert texts == [expected(loaded, " ".join(WORDS[: 1 + index % 7]), index) for index in range(48)]

    whole = client.completions.create(model="words", prompt="one ", suffix=" three", seed=5)
    stream = client.completions.create(model="words", prompt="one ", suffix=" three", seed=5, stream=True)
    choices = [event.choices[0] for event in stream]
    assert len(choices) == 4 and all(choice.draft for choice in choices[:3])
    assert "".join(choice.text for choice in choices) == whole.choices[0].text
    with pytest.raises(openai.RateLimitError, match="queue is full"):
        client.completions.create(model="words", prompt=["one"] * 64, n=2)
    with pytest.raises(openai.BadRequestError, match="`prompt`"):
        client.completions.create(model="words", prompt="")
    with urllib.request.urlopen(f"{address}/metrics") as metrics:
        sizes = dict(
            line.split(" ")
            for line in metrics.read().decode().splitlines()
            if "yan_batch_rows_" in line and line[0] != "#"
        )
    assert float(sizes["yan_batch_rows_sum"]) > float(sizes["yan_batch_rows_count"])  # batches there were
