# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The controlled test of coherence: several right answers for every source, and a text is right only as a whole.

    python benchmarks/multimodal.py --modes 8 --length 8 --experts 4 --steps 3 --scope target --reselect \
        --output benchmarks/results/multimodal/shift_m8_l8_k4_s3_target_anew.json
    python benchmarks/multimodal.py --plot

Languages, over `--vocab` symbols:

- `shift`: the target is the source with all tokens moved on by the same `m`, drawn for each row from `--modes` values;
  with `--skew R` the first is `R` times as likely as each of the others;
- `halves`: each half of the target has an `m` of its own, for blocks of half the length;
- `source`: which half of the values `m` is drawn from depends on the source's first token.

A generated row is valid when one `m` (one for each half) explains all of its tokens. Tokens that are each right by
themselves, drawn independently, are valid in `M · M^-L` of the rows.

Objectives: `winner`, the coherent one; `paper`, an expert for each token drawn from the gate; `flow`, plain flow
matching with one field, nothing solved in training, and noise of scale 1. `--seconds` are of the processor's time, so
that a busy machine changes nothing but the wait.
"""

import argparse
import json
import time
from itertools import count
from pathlib import Path

import torch
from report import save

from yan_hf import ExpertUsageCallback, YanConfig, YanForConditionalGeneration


RESULTS = Path(__file__).with_name("results") / "multimodal"
EVALUATED_STEPS = (1, 2, 3, 4, 8)
NUM_SPECIAL = 5  # ids below it are special tokens
LANGUAGES = ("shift", "halves", "source")
OBJECTIVES = ("winner", "paper", "flow")
# The weights that count; the length is known and the latents are free.
LOSS_WEIGHTS = {
    "winner": {"token": 1.0, "latent": 0.01, "gate": 0.1, "reconstruction": 0.5},
    "paper": {"token": 1.0, "latent": 0.01, "flow": 0.01, "load_balance": 0.1, "reconstruction": 0.5},
    "flow": {"flow": 0.1, "reconstruction": 1.0, "l2": 0.01},
}


class Language:
    """Draws pairs of source and target, and tells which values of `m` a generated text shows."""

    def __init__(self, options: argparse.Namespace):
        self.name, self.length, self.modes, self.vocab = (
            options.language,
            options.length,
            options.modes,
            options.vocab,
        )
        self.parts = 2 if self.name == "halves" else 1
        weights = torch.ones(self.modes)
        weights[0] = options.skew
        self.truth = weights / weights.sum()

    def draw(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sources and targets, `(rows, L)` each."""
        source = torch.randint(self.vocab, (rows, self.length))
        shift = torch.multinomial(self.truth, rows * self.parts, replacement=True).view(rows, self.parts)
        if self.name == "source":
            shift = shift // 2 + (source[:, :1] >= self.vocab // 2) * (self.modes // 2)
        shift = shift.repeat_interleave(self.length // self.parts, dim=1)
        return source + NUM_SPECIAL, (source + shift) % self.vocab + NUM_SPECIAL

    def read(self, source: torch.Tensor, generated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which rows are valid, `(rows,)`, and the `m` of each part of the valid ones, flat."""
        shift = ((generated - source) % self.vocab).unflatten(1, (self.parts, -1))
        found = shift[..., 0]
        valid = (shift == shift[..., :1]).all(-1) & (found < self.modes) & (generated >= NUM_SPECIAL).all(-1)[:, None]
        if self.name == "source":
            is_high = source[:, :1] - NUM_SPECIAL >= self.vocab // 2
            valid &= (found >= self.modes // 2) == is_high
        valid = valid.all(-1)
        return valid, found[valid].flatten()


def make_model(options: argparse.Namespace) -> YanForConditionalGeneration:
    """A model of width 64: 2 + 2 + 1 blocks."""
    is_winner = options.objective == "winner"
    weights = dict.fromkeys(YanConfig(num_experts=1).loss_weights, 0.0) | LOSS_WEIGHTS[options.objective]
    return YanForConditionalGeneration(
        YanConfig(
            vocab_size=options.vocab + NUM_SPECIAL,
            hidden_size=64,
            num_attention_heads=4,
            encoder_layers=2,
            flow_layers=2,
            decoder_layers=1,
            num_experts=1 if options.objective == "flow" else options.experts,
            max_position_embeddings=options.length,
            solver_steps=options.steps,
            expert_scope=options.scope if is_winner else "token",
            reselect_experts=options.reselect and is_winner,
            routing_block_size=options.length // 2 if options.scope == "block" else None,
            start_state=options.start_state,
            init_noise=1.0 if options.objective == "flow" else 0.2,
            loss_weights=weights,
        )
    )


def train(model: YanForConditionalGeneration, language: Language, options: argparse.Namespace) -> tuple[int, float]:
    """AdamW with a short warm-up and a decay over the last 30 % of the time. Optimiser steps, and seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.01)
    usage = ExpertUsageCallback()
    model.train()
    began = time.process_time()
    for step in count(1):
        share = (time.process_time() - began) / options.seconds
        if share >= 1:
            return step - 1, time.process_time() - began
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * min(1.0, step / 50) * min(1.0, max(0.02, (1 - share) / 0.3))
        source, target = language.draw(options.batch_size)
        output = model(source, labels=target)
        usage.collect(model, (), output)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if share < usage.until:
            usage.revive(model, optimizer, step)
    raise AssertionError("unreachable")


@torch.no_grad()
def evaluate(
    model: YanForConditionalGeneration, language: Language, steps: int, rows: int = 4_000
) -> tuple[float, list[float]]:
    """Share of valid rows, and of each mode among the valid ones."""
    model.eval()
    source, _ = language.draw(rows)
    options = {"target_lengths": language.length, "num_inference_steps": steps, "eos_token_id": None}
    generated = torch.cat([model.generate(part, **options) for part in source.split(500)])
    valid, found = language.read(source, generated)
    shares = torch.bincount(found, minlength=language.modes) / max(1, len(found))
    return float(valid.float().mean()), [round(share, 4) for share in shares.tolist()]


def run(options: argparse.Namespace) -> dict[str, object]:
    torch.manual_seed(options.seed)
    language, model = Language(options), make_model(options)
    num_steps, seconds = train(model, language, options)
    results = {steps: evaluate(model, language, steps) for steps in sorted({*EVALUATED_STEPS, options.steps})}
    valid = {str(steps): round(share, 4) for steps, (share, _) in results.items()}
    print(f"{num_steps} optimiser steps; valid by solver steps: {valid}; shares: {results[options.steps][1]}")
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "plot")}
    return {
        "settings": settings,
        "parameters": model.num_parameters(),
        "optimizer_steps": num_steps,
        "processor_seconds": round(seconds, 1),
        "valid": valid,
        "shares": results[options.steps][1],
        "true_shares": [round(share, 4) for share in language.truth.tolist()],
    }


def _label(settings: dict) -> str:
    if settings["objective"] == "flow":
        return "plain flow matching, K = 1"
    if settings["objective"] == "paper":
        return f"an expert for each token, K = {settings['experts']}"
    choice = "anew at every step" if settings["reselect"] else "held"
    return f"{settings['scope']}, {choice}, K = {settings['experts']}"


def read_results() -> dict[tuple, list[dict]]:
    """The committed results, those that differ by the seed alone together."""
    groups: dict[tuple, list[dict]] = {}
    for file in sorted(RESULTS.glob("*.json")):
        result = json.loads(file.read_text())
        key = tuple((name, value) for name, value in result["settings"].items() if name not in ("seed", "seconds"))
        groups.setdefault(key, []).append(result)
    return groups


def table() -> str:
    """Means and, over several seeds, extremes of all results, as Markdown."""
    lines = []
    for key, results in read_results().items():
        settings = dict(key)
        cells = []
        for steps in EVALUATED_STEPS:
            values = [100 * result["valid"][str(steps)] for result in results]
            spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
            text = f"{sum(values) / len(values):.1f}{spread}"
            cells.append(f"**{text}**" if steps == settings["steps"] else text)
        name = settings["language"] + (f", {settings['skew']:g} : 1" if settings["skew"] != 1 else "")
        start = "" if settings["start_state"] == "stretched" else ", from noise"
        lines.append(
            [name, settings["modes"], settings["length"], _label(settings) + start, settings["steps"], *cells]
        )
    lines.sort(key=lambda line: (LANGUAGES.index(line[0].split(",")[0]), *line[:4]))
    head = ["language", "M", "L", "model", "S in training", *(f"S = {steps}" for steps in EVALUATED_STEPS)]
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def plot(file: Path):
    """Share of valid rows against solver steps, a line for each kind of model, for 8 modes and 8 tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.2), constrained_layout=True)
    lines: dict[str, list[dict]] = {}
    for result in [result for group in read_results().values() for result in group]:
        settings = result["settings"]
        is_shown = settings["language"] == "shift" and settings["modes"] == settings["length"] == 8
        if is_shown and settings["skew"] == 1 and settings["start_state"] == "stretched":
            lines.setdefault(f"{_label(settings)}, trained with S = {settings['steps']}", []).append(result)
    for (label, group), marker in zip(sorted(lines.items()), "osv^D<>pP*X" * 2):
        values = [sum(100 * result["valid"][str(steps)] for result in group) / len(group) for steps in EVALUATED_STEPS]
        axes.plot(EVALUATED_STEPS, values, marker=marker, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(EVALUATED_STEPS, list(map(str, EVALUATED_STEPS)))
    axes.set_xlabel("solver steps")
    axes.set_ylabel("valid rows, %")
    axes.set_title("8 right answers of 8 tokens each", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language", choices=LANGUAGES, default="shift")
    parser.add_argument("--modes", type=int, default=8, help="values of m")
    parser.add_argument("--length", type=int, default=8, help="tokens of source and target")
    parser.add_argument("--vocab", type=int, default=20, help="symbols")
    parser.add_argument("--skew", type=float, default=1.0, help="how much likelier the first mode is")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="solver steps in training")
    parser.add_argument("--scope", choices=("token", "block", "target"), default="target")
    parser.add_argument("--reselect", action="store_true", help="choose anew at every step")
    parser.add_argument(
        "--objective", choices=OBJECTIVES, help="by default `winner`, and `paper` with `--scope token`"
    )
    parser.add_argument("--start-state", choices=("noise", "stretched"), default="stretched")
    parser.add_argument("--seconds", type=float, default=300.0, help="of training, the processor's")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--plot", action="store_true", help="only draw all results that are there")
    options = parser.parse_args()
    if options.plot:
        return plot(RESULTS / "valid.png")
    if not 1 <= options.modes <= options.vocab:
        parser.error(f"--modes must be in 1 to --vocab {options.vocab}, but is {options.modes}")
    if (options.language == "halves" or options.scope == "block") and options.length % 2:
        parser.error(f"halves need an even --length, but it is {options.length}")
    if options.language == "source" and options.modes % 2:
        parser.error(f"--language source needs an even number of --modes, but it is {options.modes}")
    if options.objective is None:
        options.objective = "paper" if options.scope == "token" else "winner"
    result = run(options)
    if options.output:
        save(options.output, result)


if __name__ == "__main__":
    main()
