# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What helps YAN to generate: the options of the configuration, one change at a time.

    python benchmarks/ablations.py --task last_word --data tinystories --output benchmarks/results/ablations.json

One auto-encoder is trained on the task. From it the flow of every variant is trained, with the same rows, seed and
number of steps, and evaluated on the validation rows with the same noise, in three Euler steps, or as its name says.
Beside exact match it records what the gate does: its entropy at t = 0 (log K is uniform) and the share of the tokens
that the most and the least chosen expert get. Training seeds (`--seeds`) differ in the rows' order, the flow's start
and the noise. A run adds to the output file what it lacks, so that it can be stopped and taken up.
"""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from quality_systems import AutoencoderTrainer, fit, generate_texts, new_config, start_flow
from quality_tasks import TASKS, encoded_examples, examples_of, fitting_pairs, read_rows, tokenizer_of
from report import save
from transformers import set_seed

from yan_hf import YanDataCollator, YanForAutoEncoding, YanForConditionalGeneration, exact_match


PLAIN = "default"
ENCODER = ["encoder", "token_embeddings", "position_embeddings"]


@dataclass(frozen=True)
class Variant:
    """
    One change.

    Args:
        config: Fields of the configuration; its loss weights replace single ones.
        collator: Arguments of the collator.
        sampling: Options of `generate`.
        continued_for: Share of the flow's steps by which the plain variant's model is trained on, instead of the
            auto-encoder.
    """

    config: dict[str, Any] = field(default_factory=dict)
    collator: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    continued_for: float | None = None


def _weights(**weights: float) -> Variant:
    return Variant({"loss_weights": weights})


VARIANTS: dict[str, Variant] = {
    PLAIN: Variant(),
    **{f"{count} experts": Variant({"num_experts": count}) for count in (1, 2, 8)},
    "one step asked": Variant(sampling={"num_inference_steps": 1}, continued_for=0.0),
    "written on, one step asked": Variant(sampling={"num_inference_steps": 1}, continued_for=0.5),
    "one unrolled step, written on, one step asked": Variant(
        {"solver_steps": 1}, sampling={"num_inference_steps": 1}, continued_for=0.5
    ),
    "frozen auto-encoder": Variant({"frozen_parts": [*ENCODER, "decoder"]}),
    "no flow term": _weights(flow=0.0),
    "flow term 1": _weights(flow=1.0),
    "no latent term": _weights(latent=0.0),
    "latent term 1": _weights(latent=1.0),
    "no token term": _weights(token=0.0),
    "flow term alone": _weights(latent=0.0, token=0.0, flow=1.0),
    "no load balance": _weights(load_balance=0.0),
    "gate entropy 0.1": _weights(gate_entropy=0.1),
    "MMD 0.01": _weights(mmd=0.01),
    "MMD 1": _weights(mmd=1.0),
    "no L2": _weights(l2=0.0),
    "L2 1": _weights(l2=1.0),
    "paper's weights": _weights(flow=1.0, latent=1.0, token=1.0, gate_entropy=1.0, load_balance=1.0, mmd=1.0, l2=1.0),
    "sigma 0.3": Variant({"expert_sigma": 0.3}),
    "sigma 3": Variant({"expert_sigma": 3.0}),
    "times Beta(2, 1)": Variant({"time_beta": [2.0, 1.0]}),
    "times Beta(1, 2)": Variant({"time_beta": [1.0, 2.0]}),
    "1 unrolled step": Variant({"solver_steps": 1}),
    "6 unrolled steps": Variant({"solver_steps": 6}),
    "no initial noise": Variant({"init_noise": 0.0}),
    "initial noise 0.5": Variant({"init_noise": 0.5}),
    "initial noise 1": Variant({"init_noise": 1.0}),
    "latent noise 0.3": Variant({"latent_noise": 0.3}),
    "label smoothing 0.1": Variant({"label_smoothing": 0.1}),
    "dropout 0.1": Variant({"hidden_dropout": 0.1}),
    "embedding dropout 0.2": Variant({"embedding_dropout": 0.2}),
    "canvas slack": Variant(collator={"canvas_slack": 0.5, "max_slack": 4}),
}


@torch.no_grad()
def gate_use(model: YanForConditionalGeneration, tokenizer, examples: list[dict]) -> dict[str, float]:
    """The gate's mean entropy at t = 0, and the most and least chosen experts' shares of the tokens."""
    batch = YanDataCollator(tokenizer)(examples)
    canvas = (batch["labels"] != -100).long()
    noise = torch.randn(*canvas.shape, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    output = model(
        batch["input_ids"],
        batch["attention_mask"],
        latents=model.config.init_noise * noise,
        decoder_attention_mask=canvas,
    )
    probs = output.gate_logits[canvas.bool()].softmax(dim=-1)
    load = probs.mean(dim=0)
    entropy = -(probs * probs.clamp(min=1e-30).log()).sum(dim=-1).mean()
    return {"gate_entropy": float(entropy), "largest_load": float(load.max()), "smallest_load": float(load.min())}


def train_variant(options, task, tokenizer, draw, folder: Path, name: str, seed: int) -> YanForConditionalGeneration:
    """Trains a variant, from the auto-encoder or from the plain variant's model, which is kept for that."""
    variant, steps, start = VARIANTS[name], options.flow_steps, folder / "autoencoder"
    if variant.continued_for is not None:
        steps, start = int(variant.continued_for * steps), folder / f"flow_{seed}"
        if not start.exists():
            train_variant(options, task, tokenizer, draw, folder, PLAIN, seed)
    weights = {"mmd": 0.0, **variant.config.get("loss_weights", {})}
    set_seed(seed)
    model = start_flow(start, new_config(task, tokenizer, **{**variant.config, "loss_weights": weights}))
    if steps > 0:
        fit(
            model,
            task,
            tokenizer,
            draw,
            folder / "trainer",
            steps,
            options.flow_rate,
            False,
            level=task.num_levels,
            seed=seed,
            data_collator=YanDataCollator(tokenizer, **variant.collator),
            disable_tqdm=True,
        )
    if name == PLAIN:
        model.save_pretrained(folder / f"flow_{seed}")
    return model.eval()


def measure(options, task, tokenizer, draw, folder: Path, examples, references, name: str, seed: int) -> dict:
    """Trains a variant, and evaluates it."""
    model = train_variant(options, task, tokenizer, draw, folder, name, seed)
    result = gate_use(model, tokenizer, examples[:500])
    sampling = {"num_inference_steps": 3, **VARIANTS[name].sampling}
    for mode, true_lengths in (("exact_match", False), ("exact_match_true_lengths", True)):
        texts, _ = generate_texts(
            model, "yan", tokenizer, examples, task.max_new_tokens, true_lengths=true_lengths, **sampling
        )
        result[mode] = exact_match(texts, references)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="last_word")
    parser.add_argument("--data", type=Path, help="folder with train and validation .jsonl.gz files")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--autoencoder-steps", type=int, help="(default: the task's)")
    parser.add_argument("--autoencoder-rate", type=float, default=2e-3)
    parser.add_argument("--flow-steps", type=int, default=800)
    parser.add_argument("--flow-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--max-rows", type=int, default=3000, help="validation rows to use")
    parser.add_argument("--work", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()

    task = TASKS[options.task]
    rows = read_rows(task, options.data, "train")
    tokenizer = tokenizer_of(task, rows)
    draw = examples_of(task, tokenizer, rows)
    folder = options.work / options.task
    autoencoder_steps = options.autoencoder_steps or task.autoencoder_steps
    if not (folder / "autoencoder").exists():
        set_seed(0)
        autoencoder = YanForAutoEncoding(new_config(task, tokenizer))
        fit(
            autoencoder,
            task,
            tokenizer,
            draw,
            folder / "trainer",
            autoencoder_steps,
            options.autoencoder_rate,
            True,
            AutoencoderTrainer,
        )
        autoencoder.save_pretrained(folder / "autoencoder")
    pairs = fitting_pairs(task, tokenizer, read_rows(task, options.data, "validation"))[: options.max_rows]
    examples = encoded_examples(task, tokenizer, pairs)
    references = [pair.target for pair in pairs]

    runs = json.loads(options.output.read_text())["runs"] if options.output.exists() else []
    for seed in options.seeds:
        for name in options.variants:
            if any((run["variant"], run["seed"]) == (name, seed) for run in runs):
                continue
            result = measure(options, task, tokenizer, draw, folder, examples, references, name, seed)
            runs.append({"variant": name, "seed": seed, **result})
            print(name, seed, {key: round(value, 4) for key, value in result.items()}, flush=True)
            save(
                options.output,
                {
                    "task": options.task,
                    "split": "validation",
                    "asked_rows": len(pairs),
                    "autoencoder_steps": autoencoder_steps,
                    "flow_steps": options.flow_steps,
                    "runs": runs,
                },
            )
    print("\n| variant | exact match | seeds |\n| --- | --- | --- |")
    for name in dict.fromkeys(run["variant"] for run in runs):
        values = [run["exact_match"] for run in runs if run["variant"] == name]
        print(f"| {name} | {mean(values):.3f} | {len(values)} |")


if __name__ == "__main__":
    main()
