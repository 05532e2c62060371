# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Trains YAN or an autoregressive model of its size on a task from scratch, and evaluates it on the official test rows.

    python benchmarks/quality.py --task babi --system yan --data babi_qa1 --output quality/babi_yan.json
    python benchmarks/quality.py --task babi --system ar-bart --data babi_qa1 --output ...
    python benchmarks/quality.py --task sst2 --train-rows 1000 --system yan --encoder runs/encoder --encoder-mode lora

All systems of a task get the same rows, tokenizer, width, depth, parameters (within 5 %) and batch size. YAN trains in
two stages, the auto-encoder with the answer masked and the flow; the others on source and target
throughout, for as many optimiser steps as both stages together. Where several values of `--learning-rate` are given,
each trains for a tenth of the steps first, and the one with the lowest loss at the end of it is taken. Without
`--data`, a folder of `.jsonl.gz` files, rows come from the Hub.

With `--encoder` a pretrained encoder (`examples/pretrain_encoder.py`, or one of the Hub) stands in YAN and in
`ar-encoder-decoder`, Transformers' `EncoderDecoderModel`, and is trained, kept or adapted (`--encoder-mode`); YAN then
trains in one stage of `--flow-steps`. `scratch` has the encoder's shape with random weights.

YAN is evaluated with predicted lengths and every number of solver steps in `--sweep`; and in three steps with the best
of three predicted lengths, and with the true lengths.
"""

import argparse
import dataclasses
import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
import yaml
from decoders import matching_model
from huggingface_hub import ModelCardData
from quality_encoders import MODES, train_with_encoder
from quality_systems import (
    AR_SYSTEMS,
    SYSTEMS,
    AutoencoderTrainer,
    AutoregressiveCollator,
    CausalCurriculumTrainer,
    CurriculumTrainer,
    evaluate_by_seed,
    fit,
    generate_texts,
    new_config,
    start_flow,
)
from quality_tasks import TASKS, encoded_examples, examples_of, fitting_pairs, read_rows, tokenizer_of
from report import conditions, save
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, set_seed

from yan_hf import (
    YanForAutoEncoding,
    YanForConditionalGeneration,
    create_model_card,
    prepare_tokenizer,
)
from yan_hf.generation_config_yan import OPTIONS
from yan_hf.hub.model_card import describe_hardware


_NOT_RECORDED = ("work", "progress", "card", "again", "config_fields")

TIMED_ROWS = 20  # at batch 1

# Options of `generate` besides the sweep of solver steps with predicted lengths.
THREE_LENGTHS = {"num_length_candidates": 3, "rerank": "joint"}


def best_rate(rates: list[float], pilot: Callable[[float], float]) -> tuple[float, dict[str, float]]:
    """The rate whose `pilot` run ends with the lowest loss, and all losses; a single rate is taken as it is."""
    if len(rates) == 1:
        return rates[0], {}
    losses = {f"{rate:g}": pilot(rate) for rate in rates}
    print("pilot losses by learning rate:", {rate: round(loss, 4) for rate, loss in losses.items()}, flush=True)
    return min(rates, key=lambda rate: losses[f"{rate:g}"]), losses


def train(options, task, system: str, tokenizer, draw, folder: Path) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A trained model; and the minutes that its training took, the learning rate, and the pilot's losses."""
    set_seed(options.seed)
    # On one thread what others do on the machine does not count.
    on_one_thread = not torch.cuda.is_available() and torch.get_num_threads() == 1
    clock = time.process_time if on_one_thread else time.monotonic
    config = new_config(task, tokenizer, system, num_experts=options.experts, **options.config_fields)
    autoencoder_steps = options.autoencoder_steps or task.autoencoder_steps
    flow_steps = options.flow_steps or task.flow_steps
    settings = {
        "batch_size": options.batch_size,
        "seed": options.seed,
        "disable_tqdm": not options.progress,
    }

    def fit_all(model, *arguments, **keywords) -> float:
        return fit(model, task, tokenizer, draw, folder / "trainer", *arguments, **settings, **keywords)

    if system in AR_SYSTEMS:
        parameters = YanForConditionalGeneration(config).num_parameters()
        length = task.max_source_length + task.max_new_tokens + 8
        trainer_class = CausalCurriculumTrainer if system == "ar-gpt2" else CurriculumTrainer
        collator, steps = AutoregressiveCollator(tokenizer, system), autoencoder_steps + flow_steps

        def autoregressive(rate: float, steps: int) -> tuple[torch.nn.Module, float]:
            set_seed(options.seed)
            model = matching_model(system, config, parameters, length, vary="width")
            return model, fit_all(model, steps, rate, False, trainer_class, data_collator=collator)

        rate, losses = best_rate(options.learning_rate, lambda rate: autoregressive(rate, steps // 10)[1])
        began = clock()
        model, _ = autoregressive(rate, steps)
    else:

        def autoencoder(rate: float, steps: int) -> tuple[torch.nn.Module, float]:
            set_seed(options.seed)
            model = YanForAutoEncoding(config)
            return model, fit_all(model, steps, rate, True, AutoencoderTrainer)

        start = options.autoencoder or folder / "autoencoder"
        if options.autoencoder is None:
            rate, losses = best_rate(options.learning_rate, lambda rate: autoencoder(rate, autoencoder_steps // 10)[1])
            began = clock()
            autoencoder(rate, autoencoder_steps)[0].save_pretrained(start)
            minutes = (clock() - began) / 60
            found = {"steps": autoencoder_steps, "minutes": minutes, "learning_rate": rate, "pilot_losses": losses}
            (start / "training.json").write_text(json.dumps(found))
        found = json.loads((start / "training.json").read_text())
        rate, losses, autoencoder_steps = found["learning_rate"], found["pilot_losses"], found["steps"]
        began = clock() - 60 * found["minutes"]
        model = start_flow(start, config)
        level = max(1, task.num_levels // 2)
        fit_all(model, flow_steps, options.flow_rate, False, level=level)
    minutes = round((clock() - began) / 60, 2)
    return model.eval(), {
        "autoencoder_steps": autoencoder_steps,
        "flow_steps": flow_steps,
        "training_minutes": minutes,
        "learning_rate": rate,
        "pilot_losses": losses,
    }


def evaluate(options, task, system: str, model, tokenizer, pairs) -> list[dict]:
    """The task's metrics in every mode; an autoregressive system has one, greedy decoding."""
    examples = encoded_examples(task, tokenizer, pairs)
    references = [pair.target for pair in pairs]
    few = examples[:TIMED_ROWS]
    modes = [{}]
    if system not in AR_SYSTEMS:
        # True lengths with the default number of steps alone: what they change does not hang on the steps.
        modes = [{"num_inference_steps": steps, "true_lengths": False} for steps in options.sweep]
        modes.append({"num_inference_steps": 3, "true_lengths": False, **THREE_LENGTHS})
        modes.append({"num_inference_steps": 3, "true_lengths": True})
    rows = []
    for mode in modes:
        began = time.monotonic()
        # Several seeds where the result is reported, one for the other points of the sweep.
        seeds = options.sampling_seeds if mode.get("num_inference_steps") in (3, 32) else 1
        found, lengths = evaluate_by_seed(model, system, tokenizer, task, examples, references, seeds, **mode)
        rows.append(
            {
                **mode,
                **{name: sum(values) / len(values) for name, values in found.items()},
                **{f"{name}_by_sampling_seed": values for name, values in found.items()},
                "tokens_per_second": sum(map(sum, lengths)) / (time.monotonic() - began),
                "latency_seconds": median(latencies(model, system, tokenizer, task, few, **mode)),
            }
        )
        print(system, mode, {name: round(rows[-1][name], 4) for name in found}, flush=True)
    return rows


def latencies(model, system: str, tokenizer, task, examples, **mode) -> list[float]:
    """Seconds of each example by itself, after one to warm up."""
    seconds = []
    for example in examples[:1] + examples:
        began = time.perf_counter()
        generate_texts(model, system, tokenizer, [example], task.max_new_tokens, seed=0, **mode)
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def write_card(path: Path, options, task, model, trained: dict[str, Any], rows: list[dict]):
    """A model card with the run's own figures, at three steps."""
    results = []
    for row in rows:
        if row["num_inference_steps"] != 3 or "num_length_candidates" in row:
            continue
        result = {"lengths": "true" if row["true_lengths"] else "predicted", "steps": 3}
        for name, values in row.items():
            if name.endswith("_by_sampling_seed"):
                metric = name.removesuffix("_by_sampling_seed")
                result |= {metric: mean(values), f"{metric}_spread": stdev(values) if len(values) > 1 else 0.0}
        results.append({**result, "tokens_per_second": row["tokens_per_second"]})
    name = f"yan-{options.task.replace('_', '-')}"
    texts = yaml.safe_load(Path(__file__).with_name("quality_cards.yaml").read_text())[options.task]
    data = ModelCardData(model_name=name, datasets=[task.hub_name], language="en", license=texts.pop("license", None))
    limits = [
        "A small model trained from scratch in minutes, to compare methods: of no use beyond its task.",
        "The weights are not published; the command under Recipe makes them.",
    ]
    first, second, rate = trained["autoencoder_steps"], trained["flow_steps"], trained["learning_rate"]
    # A model that is evaluated again, or whose auto-encoder was made before, is made anew without these.
    command = re.sub(r" --again| --autoencoder \S+", "", conditions()["command"])
    recipe = f"""`{command}`

Stage 1, {first:,} steps at {rate:g}: the auto-encoder predicts what is masked. Stage 2,
{second:,} steps at {options.flow_rate:g}: the flow learns to generate it, all parts training. AdamW (0.9, 0.98),
50 warm-up steps, the rate falling to zero over the last third of each stage, batches of {options.batch_size},
training seed {options.seed}. The spread is over sampling seeds of this one training run."""
    texts = {**texts, "recipe": recipe, "limits": limits}
    seeds, hardware = options.sampling_seeds, f"{describe_hardware()}, in batches of 100"
    card = create_model_card(model, data, results, options.split, seeds, hardware, **texts)
    path.parent.mkdir(parents=True, exist_ok=True)
    card.save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--system", choices=SYSTEMS, required=True)
    parser.add_argument("--data", type=Path, help="folder with train, validation and test .jsonl.gz files")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--autoencoder-steps", type=int, help="of the first stage (default: the task's)")
    parser.add_argument("--autoencoder", type=Path, help="an earlier run's auto-encoder, instead of a new one")
    parser.add_argument("--flow-steps", type=int, help="of the second stage (default: the task's)")
    parser.add_argument(
        "--learning-rate", type=float, nargs="+", default=[2e-3], help="of the auto-encoder, and of the other systems"
    )
    parser.add_argument("--flow-rate", type=float, default=1e-3)
    parser.add_argument("--config", default="{}", help="fields of YanConfig that replace the task's, as JSON")
    parser.add_argument("--generation", default="{}", help="further options of YAN's generate, to evaluate, as JSON")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--sweep", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8, 32])
    parser.add_argument("--sampling-seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="test", help="rows to evaluate on (use validation to tune)")
    parser.add_argument("--max-rows", type=int, help="use only the first rows")
    parser.add_argument("--train-rows", type=int, help="train on so many rows, drawn by a fixed seed")
    parser.add_argument("--encoder", type=Path, help="a pretrained encoder, with its tokenizer")
    parser.add_argument("--encoder-mode", choices=MODES, default="trained", help="(default: %(default)s)")
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"))
    parser.add_argument("--again", action="store_true", help="evaluate the model that an earlier run left in --work")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--card", type=Path, help="file for YAN's model card")
    options = parser.parse_args()

    if options.system == "ar-encoder-decoder" and not options.encoder:
        parser.error("ar-encoder-decoder needs --encoder")
    options.config_fields, generation = json.loads(options.config), json.loads(options.generation)
    if unknown := generation.keys() - OPTIONS.keys():
        parser.error(f"--generation: {', '.join(sorted(unknown))}: no such option of generate")
    task = TASKS[options.task]
    if options.train_rows:
        task = dataclasses.replace(task, train_file="train")  # of SST-2 sentences, not their phrases
    rows = read_rows(task, options.data, "train")
    if options.train_rows:
        rows = random.Random(0).sample(rows, options.train_rows)
    if options.encoder:
        tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(options.encoder))
    else:
        tokenizer = tokenizer_of(task, rows)
    folder = options.work / f"{options.task}_{options.system}"
    if options.again:
        trained = json.loads((folder / "trained.json").read_text())
        kind = AutoModelForCausalLM if options.system == "ar-gpt2" else AutoModelForSeq2SeqLM
        model = kind.from_pretrained(folder / "checkpoint").eval()
        tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint")
    else:
        if options.encoder:
            pairs = fitting_pairs(task, tokenizer, rows)
            model, trained = train_with_encoder(options, task, tokenizer, pairs, folder)
        else:
            draw = examples_of(task, tokenizer, rows)
            model, trained = train(options, task, options.system, tokenizer, draw, folder)
        if not (options.encoder and options.encoder_mode == "lora"):  # adapters inside an encoder have no files
            model.save_pretrained(folder / "checkpoint")
        tokenizer.save_pretrained(folder / "checkpoint")
        (folder / "trained.json").write_text(json.dumps(trained))
    if options.system not in AR_SYSTEMS:
        model.generation_config.update(**generation)
    pairs = fitting_pairs(task, tokenizer, read_rows(task, options.data, options.split))[: options.max_rows]
    results = evaluate(options, task, options.system, model, tokenizer, pairs)
    if options.card and options.system not in AR_SYSTEMS:
        write_card(options.card, options, task, model, trained, results)
    if options.output:
        named = {key: value.name if isinstance(value, Path) else value for key, value in vars(options).items()}
        result = {
            "options": {key: value for key, value in named.items() if key not in _NOT_RECORDED},
            "steps": trained["autoencoder_steps"] + trained["flow_steps"],
            "parameters": model.num_parameters(),
            "train_rows": len(rows),
            "asked_rows": len(pairs),
            **trained,
            "rows": results,
        }
        save(options.output, result)


if __name__ == "__main__":
    main()
