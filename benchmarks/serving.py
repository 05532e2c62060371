# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What the online service and batches of several workers hold under load, when a process is killed, when the queue is
full and when clients hang up. On a Ray cluster of this script's own, on the CPU.

    python benchmarks/serving.py service --sources documents.jsonl.gz --output benchmarks/results/serving_service.json
    python benchmarks/serving.py batch --sources documents.jsonl.gz --output benchmarks/results/serving_batch.json

`service` starts `yan-hf serve` with two replicas, and clients that send one request after the other through OpenAI's
client. Every text is compared with that of a single call of `generate`. Tokens are drawn (`--temperature`), so that a
text tells its seed: the checkpoint alone may write the same for all seeds.

- `drawn`, `drawn_unbatched`: the clients for `--seconds`, and again before a service with `--max-batch-rows 1`.
- `likeliest`, `likeliest_unbatched`: the same with the service's default, the likeliest tokens, which are cheaper.
- `killed`: one replica is killed under load. `lost` requests are those that the client gave up after its own retries;
  `answered_twice` are answers of the service that no client counted.
- `full_queue`: a service with places for a quarter of the clients, which do not retry; `refused` are answers of 429.
- `hung_up`: the queue is filled with slow requests, which are then cancelled. `accepted_seconds` and
  `answered_seconds` pass from there to the headers and to the text of a new request, `slow_seconds` is what the slow
  ones take if nobody cancels them.

`rows_in_batch` is the mean over rows of the size of their batch, as `/metrics` counts it.

`batch` generates texts for `--rows` distinct sources with one worker, and again with two of which one is killed when
half of the parts are there, and compares the rows.

Sources are the lines of a text file, or paragraphs cut from the column `--column` of JSON Lines, as
`RestorationCorruption` makes them. It needs `pip install -e .[serve] openai`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

import torch
from report import save
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerBase

from yan_hf import encode_text
from yan_hf.data.corruption import RestorationCorruption
from yan_hf.data.files import iterate_column
from yan_hf.data.tasks import pack_sentences
from yan_hf.serving.batch import generate_file


try:
    import openai
    import psutil
    import ray
    from prometheus_client.parser import text_string_to_metric_families
    from ray import serve

    from yan_hf.serving.cluster import start_ray
except ImportError:  # for `--help`
    openai = None

REPLICAS = 2
SEEDS = 4  # of each source in the pool
SLOW = {"num_inference_steps": 64, "num_candidates": 16}


class Pair(NamedTuple):
    """A request, and the texts that one call of `generate` gives, of drawn and of the likeliest tokens."""

    source: str
    seed: int
    drawn: str
    likeliest: str


def read_sources(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Distinct sources of up to `--tokens` tokens."""
    is_json = options.sources.name.removesuffix(".gz").endswith((".jsonl", ".json"))
    texts = (text.rstrip("\r\n") for text in iterate_column(options.sources, options.column if is_json else None))
    if is_json:
        corrupt, pack = RestorationCorruption(), partial(pack_sentences, tokenizer, max_tokens=3 * options.tokens // 4)
        texts = (corrupt(paragraph) for text in texts for paragraph in pack(text))
    seen = set()
    for text in texts:
        if text not in seen and 0 < len(encode_text(tokenizer, [text])[0]) <= options.tokens:
            seen.add(text)
            yield text


def make_pool(options: argparse.Namespace) -> list[Pair]:
    """Requests with their texts."""
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    model = AutoModelForSeq2SeqLM.from_pretrained(options.checkpoint).eval()
    longest, pool = model.config.max_position_embeddings, []  # the service's texts may be as long as they can
    for source in islice(read_sources(options, tokenizer), options.pool // SEEDS):
        ids = torch.tensor(encode_text(tokenizer, [source]))
        for seed in range(len(pool), len(pool) + SEEDS):
            texts = []
            for choices in ({"do_sample": True, "temperature": options.temperature}, {}):
                found = model.generate(ids, seeds=[seed], max_new_tokens=longest, **choices)
                texts += tokenizer.batch_decode(found, skip_special_tokens=True)
            pool.append(Pair(source, seed, *texts))
    return pool


# The service


@contextmanager
def service(checkpoint: str, *limits: str) -> Iterator[str]:
    """The address of `yan-hf serve`, in a process of its own on this script's Ray cluster, once all replicas run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "yan_hf.cli.main", "serve", checkpoint, "--port", str(port), "--device", "cpu"]
    command += ["--model-name", "yan", "--replicas", str(REPLICAS), *limits]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            address = f"http://127.0.0.1:{port}"
            while not _is_ready(address):
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"The service did not start: {log.read()[-3000:]}")
                time.sleep(0.5)
            yield address
        finally:
            serve.shutdown()
            process.terminate()
            process.wait()


def _is_ready(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/ready").close()
    except OSError:
        return False
    return _running_replicas() == REPLICAS


def _running_replicas() -> int:
    states = serve.status().applications["yan"].deployments["Writer"].replica_states
    return states.get("RUNNING", 0) if len(states) == 1 else 0


def measures(address: str) -> Counter:
    """What `/metrics` counts."""
    with urllib.request.urlopen(f"{address}/metrics") as answer:
        families = text_string_to_metric_families(answer.read().decode())
    samples = [sample for family in families for sample in family.samples if "le" not in sample.labels]
    return Counter({" ".join([sample.name, *sample.labels.values()]): sample.value for sample in samples})


def openai_client(address: str, retries: int = 2) -> openai.AsyncOpenAI:
    """OpenAI's client, whose own default are two retries."""
    return openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=retries)


async def load(
    options: argparse.Namespace,
    pool: list[Pair],
    address: str,
    course: Coroutine,
    drawn: bool = True,
    **client: int,
) -> dict[str, Any]:
    """Clients that ask until `course` is over: what they got, and what `course` returns."""
    before = measures(address)
    outcomes, latencies = Counter(right=0, wrong=0, lost=0, refused=0), []
    running = asyncio.ensure_future(course)

    async def ask(number: int):
        draw, temperature = random.Random(number), options.temperature if drawn else 0
        while not running.done():
            pair, began = draw.choice(pool), time.perf_counter()
            fields = {"prompt": pair.source, "seed": pair.seed, "temperature": temperature}
            try:
                answer = await api.completions.create(model="yan", **fields)
            except openai.RateLimitError:
                outcomes["refused"] += 1
                await asyncio.sleep(0.1)
            except openai.APIError as error:
                outcomes["lost"] += 1
                print(f"lost: {type(error).__name__}: {error}", flush=True)
            else:
                text = pair.drawn if drawn else pair.likeliest
                outcomes["right" if answer.choices[0].text == text else "wrong"] += 1
                latencies.append(time.perf_counter() - began)

    began = time.perf_counter()
    async with openai_client(address, **client) as api:
        await asyncio.gather(*(ask(number) for number in range(options.clients)))
    seconds, found = time.perf_counter() - began, measures(address)
    found.subtract(before)
    answered = outcomes["right"] + outcomes["wrong"]
    cuts = quantiles(latencies, n=20)
    return {
        "clients": options.clients,
        "seconds": seconds,
        "answered": answered,
        **outcomes,
        "answered_twice": int(found["yan_requests_total 200"]) - answered,
        "failed_tries": int(found["yan_requests_total 503"]),
        "requests_per_second": answered / seconds,
        "latency_p50": cuts[9],
        "latency_p95": cuts[18],
        "rows_in_batch": found["yan_batch_rows_sum"] / found["yan_batch_rows_count"],
        **(await running or {}),
    }


def own_processes(name: str) -> set[psutil.Process]:
    """Workers of this script's Ray cluster with a name."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                found.add(process)
        except psutil.NoSuchProcess:
            pass
    return found


async def kill_a_replica(seconds: float) -> dict[str, Any]:
    """Kills a replica after `seconds` and ends as long after both run again: how long that took."""
    await asyncio.sleep(seconds)
    first, *others = own_processes("ServeReplica:yan:Writer")
    assert len(others) == REPLICAS - 1, others
    first.kill()
    began = time.perf_counter()
    while len(own_processes("ServeReplica:yan:Writer") - {first}) < REPLICAS:
        await asyncio.sleep(0.1)
    while await asyncio.to_thread(_running_replicas) < REPLICAS:
        await asyncio.sleep(0.1)
    again = time.perf_counter() - began
    await asyncio.sleep(seconds)
    return {"seconds_until_ready_again": again}


async def hang_up(address: str, pair: Pair, places: int, temperature: float) -> dict[str, Any]:
    """Slow requests on all places of the queue: what they take, and a new request after they were cancelled."""
    async with openai_client(address, retries=0) as api:
        ask = partial(api.completions.create, model="yan", prompt=pair.source, temperature=temperature)

        def ask_slowly() -> asyncio.Future:
            return asyncio.gather(*(ask(seed=seed, extra_body=SLOW) for seed in range(places)))

        began = time.perf_counter()
        await ask_slowly()
        seconds, refused, stream = [time.perf_counter() - began], 0, None
        slow = ask_slowly()
        while measures(address)["yan_queued_rows"] < places:
            await asyncio.sleep(0.02)
        slow.cancel()
        began = time.perf_counter()
        while stream is None:
            try:
                stream = await ask(seed=pair.seed, stream=True)
            except openai.RateLimitError:
                refused += 1
                await asyncio.sleep(0.01)
        seconds.append(time.perf_counter() - began)
        text = "".join([event.choices[0].text async for event in stream])
        seconds.append(time.perf_counter() - began)
    names = ("slow_seconds", "accepted_seconds", "answered_seconds")
    return {"places": places, **dict(zip(names, seconds)), "refused": refused, "right": text == pair.drawn}


def measure_service(options: argparse.Namespace) -> dict[str, Any]:
    """All parts of `service`."""
    pool = make_pool(options)
    report: dict[str, Any] = {"pool": len(pool), "distinct_texts": len({pair.drawn for pair in pool})}

    def run(name: str, address: str, course: Coroutine, **choices: int):
        report[name] = asyncio.run(load(options, pool, address, course, **choices))
        print(name, json.dumps(report[name], indent=2), flush=True)

    start_ray(REPLICAS)
    with service(options.checkpoint) as address:
        run("drawn", address, asyncio.sleep(options.seconds))
        run("likeliest", address, asyncio.sleep(options.seconds), drawn=False)
        run("killed", address, asyncio.wait_for(kill_a_replica(options.seconds / 4), 900))
    with service(options.checkpoint, "--max-batch-rows", "1") as address:
        for name in ("drawn", "likeliest"):
            run(f"{name}_unbatched", address, asyncio.sleep(options.seconds / 2), drawn=name == "drawn")
            rates = [report[key]["requests_per_second"] for key in (name, f"{name}_unbatched")]
            report[f"times_faster_batched_{name}"] = rates[0] / rates[1]
    places = max(1, options.clients // 4)
    with service(options.checkpoint, "--max-queued-rows", str(places)) as address:
        run("full_queue", address, asyncio.sleep(options.seconds / 4), retries=0)
        report["hung_up"] = asyncio.run(hang_up(address, pool[0], places, options.temperature))
    return report


# Batches


def kill_a_worker(parts: Path, count: int, killed: list[int]):
    """Kills a worker when `count` parts are there."""
    while len(list(parts.glob("*.jsonl"))) < count:
        time.sleep(0.1)
    for worker in list(own_processes("MapWorker"))[:1]:
        worker.kill()
        killed.append(worker.pid)


def measure_batch(options: argparse.Namespace) -> dict[str, Any]:
    """The rows of one worker beside those of two of which one is killed."""
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    sources = list(islice(read_sources(options, tokenizer), options.rows))
    choices = {"do_sample": True, "temperature": options.temperature, "part_size": options.part_size}
    start_ray(REPLICAS)
    seconds, rows, killed = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for workers in (1, 2):
            output = Path(folder) / f"{workers}.jsonl"
            if workers == 2:
                half = len(sources) // options.part_size // 2
                arguments = (output.with_name(f"{output.name}.parts"), half, killed)
                threading.Thread(target=kill_a_worker, args=arguments, daemon=True).start()
            began = time.perf_counter()
            generate_file(options.checkpoint, sources, output, workers=workers, **choices)
            seconds.append(time.perf_counter() - began)
            rows.append([json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()])
    assert killed, "The job was over before a worker could be killed: ask for more rows."
    expected, found = ({row["source"]: row["text"] for row in part} for part in rows)
    return {
        "rows": len(sources),
        "part_size": options.part_size,
        "killed_workers": len(killed),
        "missing": len(set(sources) - set(found)),
        "doubled": len(rows[1]) - len(found),
        "differing_texts": sum(found.get(source, text) != text for source, text in expected.items()),
        "in_order": [row["source"] for row in rows[1]] == sources == [row["source"] for row in rows[0]],
        "seconds_one_worker": seconds[0],
        "seconds_two_workers_one_killed": seconds[1],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("service", "batch"))
    parser.add_argument("--checkpoint", default="checkpoints/restoration", help="default: %(default)s")
    parser.add_argument("--sources", type=Path, required=True, help="text or JSON Lines, .gz or not")
    parser.add_argument("--column", default="text", help="of JSON Lines (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="of a source, at most (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.5, help="of drawn tokens (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=64, help="of the service (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=120, help="of the service (default: %(default)s)")
    parser.add_argument("--pool", type=int, default=200, help="distinct requests (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=20_000, help="of the batch (default: %(default)s)")
    parser.add_argument("--part-size", type=int, default=256, help="of the batch (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    options = parser.parse_args()
    if openai is None:
        raise SystemExit("serving.py needs more packages: pip install -e .[serve] openai")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # a busy machine starts Ray slowly
    torch.set_num_threads(1)
    report = {"cores": os.cpu_count(), "tokens": options.tokens, "temperature": options.temperature}
    try:
        report |= measure_service(options) if options.what == "service" else measure_batch(options)
    finally:
        ray.shutdown()
    print(json.dumps(report, indent=2))
    if options.output:
        save(options.output, report)


if __name__ == "__main__":
    main()
