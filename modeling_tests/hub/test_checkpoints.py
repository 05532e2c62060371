# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The trained checkpoints in the repository: small, complete, and the same text however they are loaded and asked."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from yan_hf import RestorationCorruption
from yan_hf.evaluation.metrics import score_texts


ROOT = Path(__file__).resolve().parents[2]
TEXTS = [
    "The city was founded in 1850 by German settlers. It is now the capital of the state.",
    "She was born in London, England, and died in 1912. Her father was a doctor.",
]
CORRUPTION = RestorationCorruption(error_rate=0.0)
SOURCES = {
    "restoration": [CORRUPTION(text) for text in TEXTS],
    "infilling": [
        "Tim and Mia went to the <mask> to play.",
        "One day, a <mask> saw a <mask> in the garden and was happy.",
    ],
}

CHECKPOINTS = [ROOT / "checkpoints" / name for name in SOURCES]


@pytest.fixture(scope="module", params=CHECKPOINTS, ids=lambda path: path.name)
def checkpoint(request):
    folder = request.param
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return folder, tokenizer, AutoModelForSeq2SeqLM.from_pretrained(folder).eval()


def only(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("checkpoint", [ROOT / "checkpoints" / name], ids=[name], indirect=True)


def texts_of(checkpoint, sources, **options):
    _, tokenizer, model = checkpoint
    batch = tokenizer(sources, return_tensors="pt", padding=True)
    ids = model.generate(**batch, seeds=list(range(len(sources))), **options)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def test_each_one_is_tested():
    assert {path.parent.name for path in (ROOT / "checkpoints").glob("*/config.json")} == {*SOURCES, "rival"}


def test_the_rival_is_a_plain_model_of_the_size():
    """Autoregressive, with the tokenizer of the restoration, and learned."""
    folder, other = (ROOT / "checkpoints" / name for name in ("rival", "restoration"))
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 20e6 and not list(folder.glob("*.py"))
    tokenizer, rival = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(other).get_vocab()
    size = AutoModelForSeq2SeqLM.from_pretrained(other).num_parameters()
    assert abs(rival.num_parameters() / size - 1) < 0.05 and rival.dtype == torch.float32
    batch = tokenizer(SOURCES["restoration"], return_tensors="pt", padding=True)
    found = tokenizer.batch_decode(rival.generate(**batch), skip_special_tokens=True)
    assert score_texts(found, TEXTS, ("word_error_rate",))["word_error_rate"] < 0.2


def test_a_checkpoint_is_small_and_complete(checkpoint):
    folder, _, model = checkpoint
    assert sum(path.stat().st_size for path in folder.iterdir() if not path.is_symlink()) <= 20e6
    names = {path.name for path in folder.iterdir()}
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert model.dtype == torch.float32 and model.config.length_head_trained


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_any_number_of_steps_gives_the_same_text_alone_and_in_a_batch(checkpoint, steps):
    sources = SOURCES[checkpoint[0].name]
    together = texts_of(checkpoint, sources, num_inference_steps=steps)
    alone = [texts_of(checkpoint, [source], num_inference_steps=steps)[0] for source in sources[:1]]
    assert together[:1] == alone and all(together)


@only("restoration")
def test_restored_text_is_nearer_to_the_clean_one(checkpoint):
    sources = SOURCES["restoration"]
    restored = texts_of(checkpoint, sources)
    metrics = ["word_error_rate", "punctuation_f1"]
    before, after = score_texts(sources, TEXTS, metrics), score_texts(restored, TEXTS, metrics)
    assert after["word_error_rate"] < before["word_error_rate"] and after["punctuation_f1"] > 0.3


@pytest.mark.parametrize("steps", [1, 3])
@only("infilling")
def test_what_stands_around_a_mask_stays(checkpoint, steps):
    for source, text in zip(
        SOURCES["infilling"], texts_of(checkpoint, SOURCES["infilling"], num_inference_steps=steps)
    ):
        known = [re.escape(part.strip()) for part in source.split("<mask>")]
        assert re.fullmatch(r"\s+\S.*?".join(known[:-1]) + r"\s+\S.*" + known[-1], text), text


@pytest.mark.slow
def test_its_code_loads_it_without_the_package(checkpoint, tmp_path):
    script = """
import json, sys
sys.modules["yan_hf"] = None  # cannot be imported
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
folder, source = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True).eval()
ids = model.generate(**tokenizer([source], return_tensors="pt"), seeds=[0])
print(json.dumps([type(model).__module__, tokenizer.batch_decode(ids, skip_special_tokens=True)]))
"""
    folder, source = checkpoint[0], SOURCES[checkpoint[0].name][0]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, str(folder), source]
    found = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    module, texts = json.loads(found.stdout.splitlines()[-1])
    assert module.startswith("transformers_modules") and texts == texts_of(checkpoint, [source])
