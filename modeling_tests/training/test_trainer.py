# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`YanTrainer`: logged loss terms, averaged weights, and runs that are killed and resumed."""

import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from resume_case import train
from safetensors.torch import load_file
from testing_utils import small_config, small_model
from transformers import (
    GenerationConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from yan_hf import (
    EmaCallback,
    LossTermsCallback,
    YanDataCollator,
    YanForAutoEncoding,
    YanForConditionalGeneration,
    YanTrainer,
)
from yan_hf.training.trainer import last_complete_checkpoint


class _Tokenizer:
    pad_token_id, eos_token_id, mask_token_id, padding_side = 0, 2, 4, "right"

    def save_pretrained(self, folder):
        pass


ROWS = [{"input_ids": [5 + row, 6, 7, 2], "labels": [8, 9 + row, 2]} for row in range(8)]


def trainer(folder, model=None, cls=YanTrainer, **changes):
    names = ("ema_decay", "callbacks", "train_dataset", "eval_dataset", "data_collator")
    keywords = {name: changes.pop(name) for name in names if name in changes}
    keywords = {
        "train_dataset": ROWS,
        "eval_dataset": ROWS[:4],
        "data_collator": YanDataCollator(_Tokenizer()),
        **keywords,
    }
    arguments = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    return cls(
        model=model or small_model(),
        args=Seq2SeqTrainingArguments(**arguments),
        **keywords,
    )


NOT_COMPUTED = ("gate", "reconstruction")


def test_each_loss_term_is_logged_and_their_weighted_sum_is_the_loss(tmp_path):
    found = trainer(tmp_path, eval_strategy="steps", eval_steps=3)
    found.train()
    # With experts for single tokens, and without weight, these two are not computed.
    weights = {name: weight for name, weight in found.model.config.loss_weights.items() if name not in NOT_COMPUTED}
    training = [entry for entry in found.state.log_history if "loss" in entry]
    evaluation = [entry for entry in found.state.log_history if "eval_loss" in entry]
    assert len(training) == 3 and len(evaluation) == 2
    for entries, prefix in ((training, "loss"), (evaluation, "eval_loss")):
        for entry in entries:
            total = sum(weights[name] * entry[f"{prefix}_{name}"] for name in weights)
            assert not any(f"{prefix}_{name}" in entry for name in NOT_COMPUTED)
            assert float(entry[prefix]) == pytest.approx(total, rel=1e-3)


def test_terms_of_every_evaluation_are_its_own(tmp_path):
    """Outside training, under another prefix, after a prediction, and with a last batch that is smaller."""
    found = trainer(tmp_path, per_device_eval_batch_size=3)
    weights = {name: weight for name, weight in found.model.config.loss_weights.items() if name not in NOT_COMPUTED}
    found.predict(ROWS[4:])
    for rows, prefix in ((ROWS, "eval"), (ROWS[:2], "test"), (ROWS[2:7], "eval")):
        metrics = found.evaluate(rows, metric_key_prefix=prefix)
        entry = found.state.log_history[-1]
        total = sum(weights[name] * entry[f"{prefix}_loss_{name}"] for name in weights)
        assert metrics[f"{prefix}_loss"] == pytest.approx(total, rel=1e-4)


def test_reporting_integrations_see_the_terms(tmp_path):
    """TensorBoard's callback stands among the trainer's own, before any of the user's."""
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    found = trainer(tmp_path)
    found.callback_handler.callbacks.insert(1, Reporter())
    found.train()
    assert "loss_flow" in seen[0] and "loss_token" in seen[0]


def test_tensorboard_gets_the_terms(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(tmp_path / "logs")
    try:
        trainer(tmp_path, report_to="tensorboard").train()
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]
    events = accumulator.EventAccumulator(str(tmp_path / "logs")).Reload()
    assert {"train/loss", "train/loss_flow", "train/loss_token"} <= set(events.Tags()["scalars"])


def test_plain_trainer_and_auto_encoder_log_terms_through_the_callback(tmp_path):
    model = YanForAutoEncoding(small_model().config)
    rows = [{"input_ids": [5, 6, 4, 2], "labels": [5, 6, 7, 2]}] * 4
    found = Trainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=str(tmp_path), max_steps=2, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True
        ),
        train_dataset=rows,
        data_collator=YanDataCollator(_Tokenizer()),
        callbacks=[LossTermsCallback()],
    )
    found.train()
    assert {"loss_token", "loss_mmd", "loss_l2"} <= set(found.state.log_history[0])


@pytest.mark.slow
def test_auto_encoder_trains_sparsely_and_is_evaluated_densely(tmp_path):
    rows = [{"input_ids": [5, 6, 4, 2], "labels": [-100, -100, 7, -100]}] * 4
    for adapted in (False, True):
        model, seen = YanForAutoEncoding(small_model().config), []
        model.lm_head.register_forward_hook(lambda layer, inputs, output, seen=seen: seen.append(output.shape))
        if adapted:
            model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
        found = YanTrainer(
            model=model,
            args=Seq2SeqTrainingArguments(
                output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
                per_device_train_batch_size=4, per_device_eval_batch_size=4,
            ),
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=YanDataCollator(_Tokenizer()),
        )  # fmt: skip
        found.train()
        assert seen == [(1, 4, 60)]
        found.evaluate()
        assert seen[1:] == [(4, 4, 60)]


@pytest.mark.slow
def test_average_is_evaluated_saved_and_left_in_the_model(tmp_path):
    """Against averages computed from the weights after every step; training goes on with the plain weights."""
    weights, evaluated = [], []

    class Recorder(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            weights.append(model.lm_head.weight.detach().clone())

        def on_evaluate(self, args, state, control, model=None, **kwargs):
            evaluated.append(model.lm_head.weight.detach().clone())

    model = small_model()
    start = model.lm_head.weight.detach().clone()
    options = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
    found = trainer(tmp_path, model, callbacks=[Recorder()], ema_decay=0.9, **options)
    found.train()
    average, averages = start.clone(), []
    for step, weight in enumerate(weights, start=1):
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
        averages.append(average.clone())
    torch.testing.assert_close(evaluated[0], averages[2])
    torch.testing.assert_close(model.lm_head.weight.detach(), averages[-1])
    assert not torch.allclose(averages[-1], weights[-1])
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    torch.testing.assert_close(saved["lm_head.weight"], averages[2])
    plain = load_file(tmp_path / "checkpoint-3" / EmaCallback.FILE)
    torch.testing.assert_close(plain["lm_head.weight"], weights[2])
    alone = small_model()
    trainer(tmp_path / "alone", alone, **options).train()
    torch.testing.assert_close(alone.lm_head.weight.detach(), weights[-1], msg="averaging changed the training")


@pytest.mark.slow
def test_averages_go_on_from_a_checkpoint_in_another_folder(tmp_path):
    options = {"ema_decay": 0.9, "save_strategy": "steps", "save_steps": 3}
    whole, resumed = small_model(), small_model()
    trainer(tmp_path / "a", whole, **options).train()
    trainer(tmp_path / "b", resumed, **options).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for name, weight in whole.named_parameters():
        assert torch.equal(weight, dict(resumed.named_parameters())[name]), name


def test_what_the_model_cannot_take_stops_before_training(tmp_path):
    config = small_model().config
    long = config.max_position_embeddings + 1
    cases = [
        ({"input_ids": [5, 2], "labels": [6] * long}, rf"row 3, has {long} tokens in `labels`"),
        ({"input_ids": [5] * long, "labels": [6, 2]}, rf"row 3, has {long} tokens in `input_ids`"),
        ({"input_ids": [5, config.vocab_size], "labels": [6, 2]}, rf"row 3, .* {config.vocab_size} in `input_ids`"),
        ({"input_ids": [5, 2], "labels": [-3, 2]}, "row 3, .* -3 in `labels`"),
        ({"input_ids": [], "labels": [6, 2]}, "row 3, has 0 tokens in `input_ids`"),
    ]
    for bad, message in cases:
        rows = [*ROWS[:3], bad, *ROWS[3:]]
        for examples in (rows, Dataset.from_list(rows), Dataset.from_list([*rows, *ROWS]).select(range(len(rows)))):
            with pytest.raises(ValueError, match=message):
                trainer(tmp_path, train_dataset=examples)
    trainer(tmp_path, train_dataset=[{"input_ids": [5, 2], "labels": [-100, 2]}, *ROWS])


@pytest.mark.parametrize("cls", [YanTrainer, Seq2SeqTrainer])
@pytest.mark.parametrize("adapted", [False, True])
def test_arguments_that_would_fail_after_hours_are_refused_at_construction(tmp_path, cls, adapted):
    refused = {
        "label_smoothing_factor": 0.1,
        "generation_num_beams": 4,
        "generation_max_length": 25,
        "generation_config": GenerationConfig(num_beams=2),
    }
    for name, value in refused.items():
        model = get_peft_model(small_model(), LoraConfig(target_modules="all-linear")) if adapted else small_model()
        with pytest.raises(ValueError, match="num_beams" if name == "generation_config" else name):
            trainer(tmp_path, model, cls, predict_with_generate=True, **{name: value})
    trainer(tmp_path, cls=cls, predict_with_generate=True, generation_num_beams=1, generation_max_length=24)
    trainer(tmp_path, YanForAutoEncoding(small_model().config), cls, generation_max_length=500)


@pytest.mark.parametrize("cls", [YanForAutoEncoding, YanForConditionalGeneration])
def test_smoothing_by_a_plain_trainer_is_refused_at_construction(tmp_path, cls):
    """It keeps the labels from the model: something else than YAN's loss would be trained, and evaluated."""
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1"):
        Trainer(cls(small_model().config), arguments)
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1"):
        Trainer(args=arguments, model_init=lambda: cls(small_model().config))


@pytest.mark.parametrize("target", ["all-linear", ["q_proj"]])
@pytest.mark.slow
def test_a_length_head_whose_adapters_are_trained_predicts_lengths(tmp_path, target):
    base = small_config(length_head_trained=False)
    model = get_peft_model(YanForConditionalGeneration(base), LoraConfig(target_modules=target))
    trainer(tmp_path, model, max_steps=1).train()
    assert base.length_head_trained == (target == "all-linear")


def test_evaluation_masks_the_same_spans_in_every_epoch(tmp_path):
    rows = [{"input_ids": [*range(5, 25), 2]} for _ in range(4)]
    found = trainer(
        tmp_path, train_dataset=rows, eval_dataset=rows, data_collator=YanDataCollator(_Tokenizer(), "span_infilling"),
        eval_strategy="steps", eval_steps=1, max_steps=3, learning_rate=0.0,
    )  # fmt: skip
    found.train()
    losses = [entry["eval_loss"] for entry in found.state.log_history if "eval_loss" in entry]
    assert len(losses) == 3 and len(set(losses)) == 1
    assert int(found.data_collator._epoch) == 2 and found.get_train_dataloader().collate_fn is not None


def test_decay_is_checked():
    with pytest.raises(ValueError, match="decay.*1.5"):
        EmaCallback(1.5)


def test_half_a_checkpoint_is_passed_over(tmp_path):
    for step in (5, 9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (5, 9):
        TrainerState().save_to_json(str(tmp_path / f"checkpoint-{step}" / "trainer_state.json"))
    (tmp_path / "checkpoint-10" / "model.safetensors").touch()
    (tmp_path / "checkpoint-11" / "trainer_state.json").write_text('{"epoch": 1.0, ')
    assert last_complete_checkpoint(tmp_path, ["trainer_state.json"]) == str(tmp_path / "checkpoint-9")
    assert last_complete_checkpoint(tmp_path / "none", ["trainer_state.json"]) is None


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_weights_of_one_left_alone(tmp_path):
    """SIGKILL after step 7 of 10, with a checkpoint at step 4, half of one at step 6; weights equal bit for bit."""
    command = [sys.executable, str(Path(__file__).with_name("resume_case.py")), str(tmp_path / "killed")]
    path = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]  # of `testing_utils`
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
    process = subprocess.Popen([*command, "--wait"], env=environment, stderr=subprocess.PIPE, text=True)
    marker, deadline = tmp_path / "killed" / "in the middle", time.monotonic() + 120
    while not marker.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert process.poll() is None, process.stderr.read()[-2000:]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "final").exists()
    (tmp_path / "killed" / "checkpoint-6").mkdir()
    (tmp_path / "killed" / "checkpoint-6" / "model.safetensors").write_bytes(b"half")
    subprocess.run(command, env=environment, check=True, capture_output=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = train(tmp_path / "alone").state_dict()
    finally:
        torch.set_num_threads(threads)
    resumed = load_file(tmp_path / "killed" / "final" / "model.safetensors")
    for name, value in resumed.items():
        assert torch.equal(alone[name], value), name


@pytest.mark.parametrize("kind", ["dataset", "column", "list"])
def test_batches_of_like_lengths_come_in_random_order(tmp_path, kind):
    draws = torch.randint(2, 24, (2, 163), generator=torch.Generator().manual_seed(0)).tolist()
    lengths = draws[kind == "column"]
    rows = [{"input_ids": [5] * length, "labels": [8, 2]} for length in draws[0]]
    if kind == "column":  # which need not tell the truth
        rows = [{**row, "length": length} for row, length in zip(rows, lengths)]
    made = trainer(
        tmp_path,
        train_dataset=rows if kind == "list" else Dataset.from_list(rows),
        train_sampling_strategy="group_by_length",
        per_device_train_batch_size=4,
    )
    sampler = made._get_train_sampler()
    orders = []
    for made.state.epoch in (0.0, 1.0, 1.5, 0.2):
        torch.manual_seed(len(orders))  # which it does not depend on
        orders.append(list(sampler))
    assert orders[0] == orders[3] != orders[1] == orders[2]
    for order in orders[:2]:
        assert sorted(order) == list(range(163))
        batches = [[lengths[row] for row in order[start : start + 4]] for start in range(0, 163, 4)]
        assert batches[0][0] == max(lengths)
        # Within a batch lengths are alike, from one to the next they are not in order.
        assert sum(max(batch) - min(batch) for batch in batches[1:-1]) < 2 * len(batches)
        falls = sum(a >= b for a, b in pairwise(max(batch) for batch in batches))
        assert falls < 0.75 * len(batches)
