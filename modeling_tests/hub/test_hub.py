# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Pushing to a Hub and loading from it, over HTTP; a dropped connection leaves the previous revision loadable."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import Hub
from testing_utils import small_config
from transformers import AutoTokenizer

from yan_hf import YanForConditionalGeneration, train_tokenizer
from yan_hf.cli.main import main


HERE = Path(__file__).resolve().parents[1]
REPO = "tester/yan-tiny"

# What users write, in a process whose Hub is the one on the loopback interface.
PRELUDE = """
import json, sys, time
import yan_hf
from yan_hf import YanForConditionalGeneration
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
folder, repo = sys.argv[1:]
"""
LOAD = """
def load(**options):
    model = AutoModelForSeq2SeqLM.from_pretrained(repo, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(repo, **options)
    ids = model.generate(**tokenizer("one two three", return_tensors="pt"), seeds=[3])
    return {
        "ids": ids.tolist(), "mean": float(model.lm_head.weight.detach().mean()), "module": type(model).__module__,
        "max_new_tokens": model.generation_config.max_new_tokens, "tokenizer": tokenizer("two")["input_ids"],
    }
"""
PUSH = """
def push(folder):
    AutoModelForSeq2SeqLM.from_pretrained(folder).push_to_hub(repo, tags=["pushed"])
    AutoTokenizer.from_pretrained(folder).push_to_hub(repo)
"""
# The package cannot be imported, as where it is not installed.
WITHOUT_PACKAGE = PRELUDE.replace("import yan_hf\nfrom yan_hf import YanForConditionalGeneration\n", "").replace(
    "import json, sys, time",
    """
import json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "yan_hf":
            raise ImportError("hidden")
sys.meta_path.insert(0, Refuse())
""",
)


@pytest.fixture
def hub():
    with Hub() as server:
        yield server


@pytest.fixture
def folder(tmp_path):
    return checkpoint(tmp_path / "model", seed=0)


def checkpoint(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(["one two three four five"] * 20, vocab_size=300, model_type="bpe")
    model = YanForConditionalGeneration(small_config(vocab_size=len(tokenizer))).eval()
    model.generation_config.max_new_tokens = 11
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(hub: Hub, home: Path, script: str, *arguments: object) -> str:
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": "hf_test",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", script, *map(str, arguments)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def loaded(hub: Hub, home: Path, options: str = "", prelude: str = PRELUDE) -> dict:
    """What a new process loads, with a home of its own: nothing comes from a cache."""
    home.mkdir()
    return json.loads(run(hub, home, f"{prelude}{LOAD}print(json.dumps(load({options})))", "-", REPO).splitlines()[-1])


def generated(folder: Path) -> list[list[int]]:
    model = YanForConditionalGeneration.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return model.generate(**tokenizer("one two three", return_tensors="pt"), seeds=[3]).tolist()


@pytest.mark.slow
def test_pushed_model_and_tokenizer_load_by_their_name(hub, folder, tmp_path):
    run(hub, tmp_path, f"{PRELUDE}{PUSH}push(folder)", folder, REPO)
    files = hub.files(REPO, "main")[1]
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"} <= set(files)
    assert any(path.startswith("/storage/") for _, path in hub.requests)  # weights went through LFS
    result = loaded(hub, tmp_path / "home")
    assert result["ids"] == generated(folder)
    assert result["max_new_tokens"] == 11
    assert result["tokenizer"] == AutoTokenizer.from_pretrained(folder)("two")["input_ids"]


@pytest.mark.slow
def test_a_folder_with_its_code_and_card_goes_up_in_one_commit_and_loads_without_the_package(hub, folder, tmp_path):
    assert main(["export", str(folder), "--with-code", "--output", str(tmp_path / "coded")]) == 0
    card = """
from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder
from yan_hf import create_model_card
from yan_hf.hub.model_card import save_card
row = {"lengths": "predicted", "steps": 3, "exact_match": 0.5, "exact_match_spread": 0.0, "tokens_per_second": 9.0}
data = ModelCardData(model_name="tiny", datasets=["words"], license="apache-2.0")
model = YanForConditionalGeneration.from_pretrained(folder)
card = create_model_card(model, data, [row], hardware="a test", task="words in, words out", repository=repo)
card.validate()  # the Hub is asked
save_card(card, folder)
create_repo(repo)
upload_folder(repo_id=repo, folder_path=folder)
assert ModelCard.load(repo).data.eval_results[0].metric_value == 0.5
"""
    run(hub, tmp_path, PRELUDE + card, tmp_path / "coded", REPO)
    assert ("POST", "/api/validate-yaml") in hub.requests
    assert len(hub.repos[REPO]["main"]) == 2  # the repository's first, and ours
    with_code = loaded(hub, tmp_path / "home", "trust_remote_code=True", WITHOUT_PACKAGE)
    assert with_code["module"].startswith("transformers_modules")
    assert with_code["ids"] == generated(folder)
    # Loaded with the package and pushed again, the code comes along.
    again = (
        "AutoModelForSeq2SeqLM.from_pretrained(folder).save_pretrained(folder + '_2', push_to_hub=True, repo_id=repo)"
    )
    config = "YanForConditionalGeneration.config_class.from_pretrained(folder).save_pretrained(folder + '_3', {})"
    config = config.format("push_to_hub=True, repo_id=repo + '-config'")
    run(hub, tmp_path, f"{PRELUDE}{again}\n{config}", tmp_path / "coded", f"{REPO}-2")
    assert {"modeling_yan.py", "saving.py", "model.safetensors"} <= set(hub.files(f"{REPO}-2", "main")[1])
    assert {"modeling_yan.py", "saving.py", "config.json"} <= set(hub.files(f"{REPO}-2-config", "main")[1])


@pytest.mark.slow
def test_registered_classes_push_their_code(hub, folder, tmp_path):
    script = """
from yan_hf import YanConfig
YanConfig.register_for_auto_class()
YanForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")
push(folder)
"""
    run(hub, tmp_path, PRELUDE + PUSH + script, folder, REPO)
    files = hub.files(REPO, "main")[1]
    assert {"modeling_yan.py", "configuration_yan.py", "generation_yan.py"} <= set(files)
    assert set(json.loads(files["config.json"])["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForSeq2SeqLM"}
    result = loaded(hub, tmp_path / "home", "trust_remote_code=True", WITHOUT_PACKAGE)
    assert result["module"].startswith("transformers_modules")


@pytest.mark.slow
def test_a_dropped_connection_leaves_the_previous_revision_and_a_retry_succeeds(hub, folder, tmp_path):
    """Cut in the middle of an upload, and before the commit is made; older revisions stay loadable too."""
    other = checkpoint(tmp_path / "other", seed=1)
    script = """
import os, pathlib, urllib.request
from huggingface_hub import HfApi
folders = folder.split(os.pathsep)
time.sleep = lambda seconds: None  # between the tries of huggingface_hub
def fail(what):
    urllib.request.urlopen(urllib.request.Request(f"{os.environ['HF_ENDPOINT']}/fail/{what}", method="POST")).read()
def fresh(name, **options):
    return load(cache_dir=str(pathlib.Path.home() / name), **options)
push(folders[0])
first = HfApi().model_info(repo).sha
found = {"before": fresh("before"), "first": first}
for number, moment in enumerate(("upload", "commit")):
    fail(moment)
    try:
        push(folders[1])
        found[f"{moment} error"] = None
    except Exception as error:
        found[f"{moment} error"] = type(error).__name__
    found[f"{moment} sha"] = HfApi().model_info(repo).sha
    found[moment] = fresh(moment)
fail("nothing")
push(folders[1])
found["after"] = fresh("after")
found["revision"] = fresh("revision", revision=first)
print(json.dumps(found))
"""
    output = run(hub, tmp_path, PRELUDE + PUSH + LOAD + script, f"{folder}{os.pathsep}{other}", REPO)
    found = json.loads(output.splitlines()[-1])
    for moment in ("upload", "commit"):
        assert found[f"{moment} error"] is not None
        assert found[f"{moment} sha"] == found["first"]
        assert found[moment] == found["before"]
    assert found["before"]["ids"] == generated(folder)
    assert found["after"]["ids"] == generated(other) and found["after"]["mean"] != found["before"]["mean"]
    assert found["revision"] == found["before"]
