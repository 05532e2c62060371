# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The benchmark of rewriting: every system learns and rewrites, and a run goes from documents to a table."""

import gzip
import json
import sys

import distil
import pytest
import rewriting
import torch
from decoders import matching_model
from rewriting_report import NO_SYSTEM, table
from rewriting_systems import (
    LOSSES,
    MODELS,
    BaselineCollator,
    TimeBudget,
    architecture,
    fill,
    rewriters,
)
from transformers import TrainerControl, TrainerState

from yan_hf import YanConfig, YanDataCollator, YanForConditionalGeneration, train_tokenizer
from yan_hf.data.alignment import fillings_of
from yan_hf.inference import compiled


STORY = "Once there was a small dog named Max. He liked to run in the big park. One day, he saw 2 red balls! "
MASK, EOS = 4, 2


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([STORY, STORY.lower()] * 20, vocab_size=330, model_type="bpe")


@pytest.fixture(scope="module")
def config(tokenizer):
    fields = {"hidden_size": 32, "num_attention_heads": 4, "encoder_layers": 1, "flow_layers": 1, "decoder_layers": 1}
    fields |= {"max_position_embeddings": 192, "mask_token_id": MASK, "initializer_range": 0.1}
    return YanConfig(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=EOS, **fields)


def new_model(system, config, positions=80):
    with torch.device("meta"):
        parameters = YanForConditionalGeneration(config).num_parameters()
    torch.manual_seed(0)
    model = matching_model(architecture(system), config, parameters, positions, vary="width")
    assert abs(model.num_parameters() - parameters) <= 0.05 * parameters
    model.config.mask_token_id, model.config.upsample = MASK, 2
    if system == "ar-bart":
        model.__class__ = MODELS[system]
    return model


ROWS = [
    ([50, MASK, 52, EOS], [50, 60, 61, 52, EOS]),
    ([53, 54, 55, MASK, EOS], [53, 54, 55, 62, EOS]),
    ([MASK, 56, MASK, EOS], [63, 56, 64, 64, EOS]),
    ([57, MASK, 58, EOS], [57, 58, EOS]),
]


def learn(system, model, tokenizer, rows):
    """The model in eval mode, after it has seen the rows 150 times."""
    collator = BaselineCollator(YanDataCollator(tokenizer), system)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        batch = collator([{"input_ids": source, "labels": target} for source, target in rows])
        LOSSES[architecture(system)](model.train(), batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("system", MODELS)
@pytest.mark.slow
def test_every_system_learns_rows_by_heart(system, config, tokenizer):
    """What the losses train is what the rewriters give back: in batches, alone, and with prompt lookup."""
    model = learn(system, new_model(system, config), tokenizer, ROWS)
    sources, targets = ([list(row) for row in rows] for rows in zip(*ROWS))
    for name, rewrite in rewriters(system, model, 12).items():
        assert [rewrite([source])[0] for source in sources] == [target[:-1] for target in targets], name
        if not name.endswith("-lookup"):
            assert rewrite(sources) == [target[:-1] for target in targets], name


@pytest.mark.slow
def test_lookup_in_the_source_saves_passes_of_bart(config, tokenizer):
    """A text that is in the source, and only there, takes a few passes."""
    row = [*range(60, 90), EOS]
    model = learn("ar-bart", new_model("ar-bart", config), tokenizer, [(row, row)])
    passes, texts = [], []
    for rewrite in rewriters("ar-bart", model, 40).values():
        calls = []
        hook = model.model.decoder.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        texts += rewrite([row])
        hook.remove()
        passes.append(len(calls))
    greedy, lookup = passes
    assert texts == [row[:-1]] * 2 and greedy == len(row) and lookup <= 6


def test_fillings_are_taken_out_and_put_in():
    for source, target in ROWS:
        fillings = fillings_of(source, target, MASK, EOS)
        assert len(fillings) == source.count(MASK) and fill(source, fillings, MASK) == target
    assert fillings_of([50, MASK, EOS], [51, 60, EOS], MASK, EOS) is None
    assert fill([50, MASK, 51, MASK], [[60]], MASK) == [50, 60, 51]
    assert fill([50, MASK], [[60], [61]], MASK) == [50, 60]


def test_what_survives_is_counted():
    reference = 'I met Ann on 5 May. It cost 3.50, and "ok" was `x = 1`.'
    text = "I met ann on 5 May. It cost 3.5, and ok was `x = 1`."
    found = {"_numbers": [1 + 1, 3], "_names": [1, 2], "_code": [1, 1]}
    for find, counts in found.items():
        assert rewriting.survivors(getattr(rewriting, find), [text], [reference]) == counts, find


def test_a_budget_goes_on_from_the_minutes_of_its_checkpoint():
    budget = TimeBudget(2.0)
    state, control = TrainerState(log_history=[{"minutes": 1.5, "loss": 1.0}, {"loss": 0.9}]), TrainerControl()
    budget.on_train_begin(None, state, control)
    budget.on_step_end(None, state, control)
    assert 0.75 <= budget.share() < 0.8 and not control.should_training_stop
    budget._began -= 60
    budget.on_step_end(None, state, control)
    assert budget.share() == 1.0 and control.should_training_stop


@pytest.mark.parametrize("task, start", [("restoration", "fertility"), ("infilling", "aligned")])
def test_every_expert_writes_all_rows(task, start, config, tokenizer, tmp_path, monkeypatch):
    """What the gate writes, where it always takes the second one, is what that one writes."""
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": f"{STORY} Number {i}."}) + "\n" for i in range(3)))
    torch.manual_seed(0)
    for scope in ("target", "token"):
        fields = {"start_state": start, "expert_scope": scope, "reselect_experts": scope == "target", "num_experts": 3}
        fields |= {"residual_init_scale": 0.0, "tie_word_embeddings": True}  # what copies its source
        model = YanForConditionalGeneration(YanConfig(**{**config.to_dict(), **fields}))
        model.model.flow.gate.down_proj.bias.data[1] = 50.0
        torch.nn.init.normal_(model.model.flow.experts.down_proj.data[0], std=9.0)  # but for one expert
        model.save_pretrained(tmp_path / scope)
        tokenizer.save_pretrained(tmp_path / scope)
    options = ["--task", task, "--test-file", str(documents), "--size", "60", "--output", str(tmp_path / "out.json")]
    options += ["--max-source-length", "120", "--max-target-length", "60"]
    monkeypatch.setattr(sys, "argv", ["rewriting.py", "experts", *options, "--yan", str(tmp_path / "target")])
    rewriting.main()
    kinds = json.loads((tmp_path / "out.json").read_text())["kinds"]
    assert list(kinds) == (["masked"] if task == "infilling" else ["spoilt", "clean"])
    for found in kinds.values():
        assert found["gate_chose"] == [0, 1, 0] and found["rows"] == 3
        assert found["gate"] == found["expert 1"] != found["expert 0"]
        assert {"expert 0", "expert 2", "best by the reference"} < set(found)
    sys.argv[-1] = str(tmp_path / "token")
    with pytest.raises(SystemExit, match="no experts that whole targets choose"):
        rewriting.main()


@pytest.mark.slow
@pytest.mark.parametrize("task", rewriting.TASKS)
def test_from_documents_to_the_table(task, config, tokenizer, tmp_path, monkeypatch, capsys):
    """Every system trains, is taken up again, and stands in the table with figures for every size."""
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": STORY * 4 + f"Number {i}."}) + "\n" for i in range(6)))
    start = {"start_state": "aligned", "keep_known": True} if task == "infilling" else {"start_state": "fertility"}
    YanForConditionalGeneration(YanConfig(**{**config.to_dict(), **start})).save_pretrained(tmp_path / "yan")
    tokenizer.save_pretrained(tmp_path / "yan")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["rewriting.py", *map(str, arguments)])
        rewriting.main()

    systems = [system for system in MODELS if task == "infilling" or system != "ar-gpt2-fillings"]
    common = ["--task", task, "--pack-tokens", 40, "--max-source-length", 120, "--max-target-length", 60]
    for system in systems:
        options = [*common, "--system", system, "--checkpoint", tmp_path / "yan", "--train-file", documents]
        options += ["--encoded", tmp_path / "rows"]
        options += ["--output", tmp_path / system, "--per-device-train-batch-size", 4, "--save-steps", 2]
        call("train", *options, "--max-steps", 2)
        (tmp_path / system / "training.json").unlink()
        call("train", *options, "--minutes", 0.002)
        trained = json.loads((tmp_path / system / "training.json").read_text())
        assert trained["steps"] >= 3 and trained["minutes"] >= 0.002, system
        with pytest.raises(SystemExit, match="holds a trained system"):
            call("train", *options)
    output = tmp_path / "out" / f"{task}.json"
    named = [f"{system}={tmp_path / system}" for system in systems]
    sizes = ["--sizes", 30, 60, "--rows", 3, "--timed-rows", 1, "--probe-rows", 2]
    options = [*common, "--test-file", documents, *sizes, "--threads", torch.get_num_threads(), "--output", output]
    if task == "restoration":
        monkeypatch.setattr(compiled, "_compiled", lambda function, *_: function)  # takes minutes
        options.append("--fast")
    call("compare", *options, "--yan", tmp_path / "yan", "--systems", *named)
    report = json.loads(output.read_text())
    assert output.with_suffix(".png").is_file() and table(report) in capsys.readouterr().out
    rows = {(row["system"], row["size"]): row for row in report["rows"]}
    names = {name for name, _ in rows}
    assert names > {NO_SYSTEM, "yan-1", "yan-4", "ar-bart", "ar-bart-lookup", "cmlm-1", "cmlm-10", "ctc"}
    assert len(rows) == 2 * len(names) == len(report["rows"])
    fast = [row for (name, _), row in rows.items() if "-lookup" in name or "-compiled" in name]
    assert all(row["same_text"] == 1 and "tokens_per_second" not in row for row in fast)
    assert ({"yan-int8-1", "yan-compiled-3", "yan-int8-compiled-3"} <= names) == (task == "restoration")
    if task == "infilling":
        for name in (NO_SYSTEM, "yan-1", "yan-3", "ar-gpt2-fillings"):
            assert rows[name, 60]["known_kept"] == 1
    else:
        unchanged = rows[NO_SYSTEM, 60]
        assert unchanged["unchanged_rate"] == unchanged["unchanged_sentences"] == 1 and unchanged["code"] == [2, 2]
        assert unchanged["numbers"][0] > 0 and unchanged["names"][0] < unchanged["names"][1]


# Distillation


def test_the_teacher_decides_marks_and_capitals_and_no_letters():
    reference = 'In "Rome," Mary said it was a well-known 3.5 m high.'
    written = "In Rome mary said, it wass a well-known, 3.5 m high!"
    assert distil.follow(reference, written) == "In Rome mary said, it was a well-known, 3.5 m high!"
    assert distil.follow("The end.", "") == "The end." and distil.follow("", "More.") == ""
    assert distil.follow("A b c.", "A c. b") == "A b c."


def test_pairs_of_a_teacher(config, tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("ctranslate2")
    documents, pairs = tmp_path / "documents.jsonl", tmp_path / "new" / "pairs.jsonl.gz"
    documents.write_text("".join(json.dumps({"text": STORY * 2 + f"Number {i}."}) + "\n" for i in range(4)))
    new_model("ar-bart", config, 200).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    arguments = ["--teacher", tmp_path / "teacher", "--train-file", documents, "--output", pairs, "--rows", 5]
    arguments += ["--pack-tokens", 40, "--max-source-length", 80, "--max-target-length", 60]
    monkeypatch.setattr(sys, "argv", ["distil.py", *map(str, arguments)])
    distil.main()
    with gzip.open(pairs, "rt") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 5 and all(row["source"] for row in rows)
    letters = ["".join(filter(str.isalnum, text)).lower() for text in (STORY * 4, *(row["target"] for row in rows))]
    assert all(text.split("number")[0] in letters[0] for text in letters[1:])
