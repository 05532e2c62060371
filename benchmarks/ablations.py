# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What helps YAN to write, one change at a time: the options of the configuration, and ideas beyond it.

    python benchmarks/ablations.py --task last_word --data tinystories --output benchmarks/results/ablations.json

One auto-encoder is trained to read the task. From it every variant learns to write, with the same rows, seed and
number of steps, and is asked the validation rows with the same noise, in three Euler steps: the trunk's passes are the
same for all. Beside exact match it records what the gate does: its entropy at t = 0 (log K is uniform) and the share
of the tokens that the most and the least chosen expert get. Training seeds (`--seeds`) differ in the rows' order, the
flow's start and the noise. A run adds to the output file what it lacks, so that it can be stopped and taken up.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import torch
from quality_systems import ReadingTrainer, ask, fit, new_config, start_writer
from quality_tasks import TASKS, encoded_examples, examples_of, fitting_pairs, read_rows, tokenizer_of
from report import save
from torch import nn
from transformers import set_seed

import yan_hf.modeling_yan
from yan_hf import (
    YanDataCollator,
    YanForAutoEncoding,
    YanForConditionalGeneration,
    exact_match,
)


def condition_on_estimate(model: YanForConditionalGeneration):
    """Self-conditioning (Chen et al. 2022): each pass sees where the last one pointed; in training half the time."""
    flow = model.model.flow
    flow.estimate_proj = nn.Linear(model.config.hidden_size, model.config.hidden_size)
    nn.init.zeros_(flow.estimate_proj.weight)
    nn.init.zeros_(flow.estimate_proj.bias)
    plain, estimate = flow.forward, None

    def forward(latents, timesteps, context, experts=None, conditioning=None, **keywords):
        nonlocal estimate
        time = timesteps if timesteps is not None else latents.new_tensor([_time_of(context, conditioning)])
        if experts is None:
            # The flow term's pass, at a random time: an estimate of its own.
            estimate = None
            if flow.training and torch.rand(()) < 0.5:
                with torch.no_grad():
                    velocity = plain(latents, timesteps, context, None, conditioning).velocity
                    estimate = latents + (1 - time)[:, None, None] * velocity
        elif time.numel() == 1 and float(time) == 0:
            estimate = None
        # A zero estimate costs nothing, and keeps the projection in every graph.
        shown = torch.zeros_like(latents) if estimate is None else estimate
        output = plain(latents + flow.estimate_proj(shown), timesteps, context, experts, conditioning, **keywords)
        estimate = (latents + (1 - time)[:, None, None] * output.velocity).detach()
        return output

    flow.forward = forward


def predict_clean_latent(model: YanForConditionalGeneration):
    """Experts give the end point; the velocity is what leads there in the time that is left, at least a twentieth."""
    experts, flow = model.model.flow.experts, model.model.flow
    plain_flow, plain_experts = flow.forward, experts.forward
    now = {}

    def fields(hidden_states, index=None, weights=None):
        points = plain_experts(hidden_states, index, weights)
        state, left = now["state"], now["left"]
        return (points - (state[:, None] if points.dim() == 3 else state)) / (
            left[:, None] if points.dim() == 3 else left
        )

    def forward(latents, timesteps, context, experts=None, conditioning=None, **keywords):
        time = timesteps if timesteps is not None else latents.new_tensor([_time_of(context, conditioning)])
        left = (1 - time).clamp(min=0.05).expand(len(latents))[:, None, None].expand(*latents.shape[:2], 1)
        now.update(state=latents.flatten(0, 1), left=left.flatten(0, 1))
        return plain_flow(latents, timesteps, context, experts, conditioning, **keywords)

    experts.forward, flow.forward = fields, forward


def _time_of(context, conditioning) -> float:
    return next(time for time, known in context.conditioning.items() if known is conditioning)


def noise_for_the_decoder(model: YanForConditionalGeneration):
    """The decoder's input is disturbed in training, so that it learns to read latents that are a little off."""

    def disturb(module, arguments):
        (latents,) = arguments
        return (latents + 0.1 * torch.randn_like(latents),) if module.training else None

    model.model.decoder.register_forward_pre_hook(disturb)


def learn_sigma(model: YanForConditionalGeneration):
    """The experts' standard deviation is a parameter, which the flow term's whole density determines."""
    model.log_sigma = nn.Parameter(torch.zeros(()))

    def flow_matching_nll(expert_fields, gate_log_probs, velocity, sigma):
        squared = (expert_fields.float() - velocity.float()[..., None, :]).square().sum(dim=-1)
        size = velocity.shape[-1]
        log_densities = -0.5 * squared * torch.exp(-2 * model.log_sigma) - size * (
            model.log_sigma + 0.5 * math.log(2 * math.pi)
        )
        return -torch.logsumexp(gate_log_probs.float() + log_densities, dim=-1)

    yan_hf.modeling_yan.flow_matching_nll = flow_matching_nll


# Name → fields of the configuration, what else is changed, and arguments of the collator. Weights are the loss's.
VARIANTS: dict[str, tuple[dict, Callable | None, dict]] = {
    "default": ({}, None, {}),
    **{f"{count} experts": ({"num_experts": count}, None, {}) for count in (1, 2, 8)},
    "mixture's mean": ({"velocity_field": "mixture"}, None, {}),
    "self-conditioning": ({}, condition_on_estimate, {}),
    "clean latent predicted": ({}, predict_clean_latent, {}),
    "learned sigma": ({}, learn_sigma, {}),
    "noise before the decoder": ({}, noise_for_the_decoder, {}),
    "frozen auto-encoder": (
        {"frozen_parts": ["encoder", "decoder", "token_embeddings", "position_embeddings"]},
        None,
        {},
    ),
    "targets' latents detached": ({"detach_target_latents": True}, None, {}),
    "no flow term": ({"loss_weights": {"flow": 0.0}}, None, {}),
    "flow term 1": ({"loss_weights": {"flow": 1.0}}, None, {}),
    "no latent term": ({"loss_weights": {"latent": 0.0}}, None, {}),
    "latent term 1": ({"loss_weights": {"latent": 1.0}}, None, {}),
    "no token term": ({"loss_weights": {"token": 0.0}}, None, {}),
    "flow term alone": ({"loss_weights": {"latent": 0.0, "token": 0.0, "flow": 1.0}}, None, {}),
    "no load balance": ({"loss_weights": {"load_balance": 0.0}}, None, {}),
    "gate entropy 0.1": ({"loss_weights": {"gate_entropy": 0.1}}, None, {}),
    "MMD 0.01": ({"loss_weights": {"mmd": 0.01}}, None, {}),
    "MMD 1": ({"loss_weights": {"mmd": 1.0}}, None, {}),
    "no L2": ({"loss_weights": {"l2": 0.0}}, None, {}),
    "L2 1": ({"loss_weights": {"l2": 1.0}}, None, {}),
    "paper's weights": (
        {"loss_weights": dict.fromkeys(["flow", "latent", "token", "gate_entropy", "load_balance", "mmd", "l2"], 1.0)},
        None,
        {},
    ),
    "sigma 0.3": ({"expert_sigma": 0.3}, None, {}),
    "sigma 3": ({"expert_sigma": 3.0}, None, {}),
    "times Beta(2, 1)": ({"time_beta": [2.0, 1.0]}, None, {}),
    "times Beta(1, 2)": ({"time_beta": [1.0, 2.0]}, None, {}),
    "1 unrolled step": ({"solver_steps": 1}, None, {}),
    "6 unrolled steps": ({"solver_steps": 6}, None, {}),
    "no initial noise": ({"init_noise": 0.0}, None, {}),
    "initial noise 0.5": ({"init_noise": 0.5}, None, {}),
    "initial noise 1": ({"init_noise": 1.0}, None, {}),
    "latent noise 0.3": ({"latent_noise": 0.3}, None, {}),
    "label smoothing 0.1": ({"label_smoothing": 0.1}, None, {}),
    "dropout 0.1": ({"hidden_dropout": 0.1}, None, {}),
    "embedding dropout 0.2": ({"embedding_dropout": 0.2}, None, {}),
    "canvas slack": ({}, None, {"canvas_slack": 0.5, "max_slack": 4}),
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


def measure(options, task, tokenizer, draw, folder: Path, examples, references, name: str, seed: int) -> dict:
    """Trains a variant from the reader, and asks it."""
    fields, change, collator = VARIANTS[name]
    weights = {"mmd": 0.0, **fields.get("loss_weights", {})}
    set_seed(seed)
    model = start_writer(folder / "reader", new_config(task, tokenizer, **{**fields, "loss_weights": weights}))
    objective = yan_hf.modeling_yan.flow_matching_nll
    try:
        if change is not None:
            change(model)
        fit(
            model,
            task,
            tokenizer,
            draw,
            folder / "trainer",
            options.writing_steps,
            options.writing_rate,
            False,
            level=task.num_levels,
            seed=seed,
            data_collator=YanDataCollator(tokenizer, **collator),
            disable_tqdm=True,
        )
        model.eval()
        result = gate_use(model, tokenizer, examples[:500])
        for mode, true_lengths in (("exact_match", False), ("exact_match_true_lengths", True)):
            texts, _ = ask(model, "yan", tokenizer, examples, task.max_new_tokens, true_lengths, num_inference_steps=3)
            result[mode] = exact_match(texts, references)
    finally:
        yan_hf.modeling_yan.flow_matching_nll = objective
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="last_word")
    parser.add_argument("--data", type=Path, help="folder with train and validation .jsonl.gz files")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--reading-steps", type=int, help="(default: the task's)")
    parser.add_argument("--reading-rate", type=float, default=2e-3)
    parser.add_argument("--writing-steps", type=int, default=800)
    parser.add_argument("--writing-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--max-rows", type=int, default=3000, help="validation rows to ask")
    parser.add_argument("--work", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()

    task = TASKS[options.task]
    rows = read_rows(task, options.data, "train")
    tokenizer = tokenizer_of(task, rows)
    draw = examples_of(task, tokenizer, rows)
    folder = options.work / options.task
    reading_steps = options.reading_steps or task.reading_steps
    if not (folder / "reader").exists():
        set_seed(0)
        reader = YanForAutoEncoding(new_config(task, tokenizer))
        fit(
            reader,
            task,
            tokenizer,
            draw,
            folder / "trainer",
            reading_steps,
            options.reading_rate,
            True,
            ReadingTrainer,
        )
        reader.save_pretrained(folder / "reader")
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
                    "reading_steps": reading_steps,
                    "writing_steps": options.writing_steps,
                    "runs": runs,
                },
            )
    print("\n| variant | exact match | seeds |\n| --- | --- | --- |")
    for name in dict.fromkeys(run["variant"] for run in runs):
        values = [run["exact_match"] for run in runs if run["variant"] == name]
        print(f"| {name} | {mean(values):.3f} | {len(values)} |")


if __name__ == "__main__":
    main()
