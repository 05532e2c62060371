# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""lm-evaluation-harness: its command runs a local task, and its figures are those of `yan-hf evaluate`."""

import json
import subprocess
import sys

import pytest
import torch
from testing_utils import small_model

from yan_hf import encode_text, train_tokenizer
from yan_hf.cli.main import main


WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
TASK = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{source}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs: {{until: ["\\n"], do_sample: false, temperature: 0.0, max_gen_toks: 256, num_beams: 1}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, and rows of which it gets every other one right."""
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install -e .[harness]")
    folder = tmp_path_factory.mktemp("harness")
    tokenizer = train_tokenizer([" ".join(WORDS)] * 20, vocab_size=300)
    model = small_model(vocab_size=len(tokenizer))
    model.generation_config.update(suppress_tokens=list(range(261)))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    sources = [" ".join(WORDS[index : index + 1 + index % 4]) + "</s>" * (index == 2) for index in range(10)]
    batch = tokenizer.pad({"input_ids": encode_text(tokenizer, sources)}, return_tensors="pt")
    texts = tokenizer.batch_decode(model.generate(**batch, seeds=range(10), max_new_tokens=24))
    rows = [{"source": source, "target": texts[i] if i % 2 else "ten"} for i, source in enumerate(sources)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for kind in ("generate_until", "loglikelihood"):
        (folder / kind).mkdir()
        (folder / kind / "words.yaml").write_text(TASK.format(file=folder / "rows.jsonl", kind=kind))
    return folder


def run(folder, kind: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "yan_hf.evaluation.harness", "run", "--model", "yan", "--tasks", "words"]
    command += ["--model_args", f"pretrained={folder / 'model'}", "--include_path", str(folder / kind)]
    command += ["--output_path", str(folder / "results"), "--device", "cpu", "--batch_size", "3"]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_a_local_task_end_to_end_has_the_figures_of_evaluate(folder, capsys):
    result = run(folder, "generate_until")
    assert result.returncode == 0, result.stderr[-2000:]
    (report,) = (folder / "results").rglob("results*.json")
    figure = json.loads(report.read_text())["results"]["words"]["exact_match,none"]
    options = ["--seeds", "1", "--length-modes", "predicted", "--metrics", "exact_match", "--json"]
    assert main(["evaluate", str(folder / "model"), "--file", str(folder / "rows.jsonl"), *options]) == 0
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert figure == row["exact_match"] == 0.5


@pytest.mark.slow
def test_likelihoods_are_refused_with_the_reason(folder):
    result = run(folder, "loglikelihood")
    assert result.returncode != 0 and "generate_until" in result.stderr and "no exact likelihood" in result.stderr


def test_requests_keep_their_order_and_texts_end_before_a_stop_string(folder):
    from lm_eval.api.instance import Instance

    from yan_hf.evaluation.harness import YanLM

    def requests(**options):
        kinds = [{"until": ["#"], **options}, {"until": ["#", "~"], **options}]
        rows = [(f"{word} " * (1 + index), kinds[index % 2]) for index, word in enumerate(WORDS)]
        return [Instance("generate_until", {}, row, 0, ("words", index, 1)) for index, row in enumerate(rows)]

    def model(**options):
        return YanLM(str(folder / "model"), device="cpu", **options)

    whole = model(batch_size=4).generate_until(requests())
    assert whole == model(batch_size="auto").generate_until(requests()) != model(seed=1).generate_until(requests())
    cut = model(batch_size=1).generate_until([*requests(until=" "), *requests(until=" ")])  # twice: another sample
    assert cut[:10] == [text.split(" ")[0] for text in whole] != cut[10:]
    # Cut on the left; a special token that is spelt out is text.
    writer, text = model(), "</s> one " + "two three " * 30
    assert writer._encode(text) == encode_text(writer.tokenizer, [text])[0][-24:]
    assert writer._encode("</s> one").count(writer.tokenizer.eos_token_id) == 1


def test_what_a_harness_passes_to_a_model_of_transformers(folder):
    """Among it Transformers' own model of the harness, whose criteria see the finished text."""
    from lm_eval.models.huggingface import HFLM

    import yan_hf

    model = HFLM(str(folder / "model"), backend="seq2seq", device="cpu")
    assert isinstance(model.model, yan_hf.YanForConditionalGeneration)
    ids = torch.tensor(encode_text(model.tokenizer, WORDS[:1]))
    options = {"attention_mask": torch.ones_like(ids), "max_length": 24, "temperature": 1.0, "num_beams": 1}
    whole, cut = (model._model_generate(ids, stop=[stop], seeds=[0], **options) for stop in ("#", " "))
    whole, cut = model.tokenizer.batch_decode([whole[0], cut[0]], skip_special_tokens=True)
    assert whole.startswith(cut) and len(cut) < len(whole)
