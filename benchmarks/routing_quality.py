# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What block routing costs in quality: a token-routed model of many small experts, fine-tuned with block routing.

    python benchmarks/routing_quality.py --data tinystories --output benchmarks/results/routing_quality.json

The task is span infilling on stories: the source is a passage of up to `--length` tokens with random spans collapsed
to one mask token each (of one token by default), the target the whole passage. `--data` is a folder with
`train.jsonl.gz` and `test.jsonl.gz`; without it the set is loaded from the Hub. Four trainings, the last two from the
second's end and equally long:

1. `autoencoder`: encoder and decoder, as an auto-encoder, and frozen from then on;
2. `token`: the flow, with token routing, on short passages first: copying is learned sooner from few positions;
3. `token, longer`: token routing goes on, so that more steps are no advantage of block routing;
4. `block`: block routing with `--block-size`, `--threshold` and `--top-k`.

Models 3 and 4 are then evaluated on the same test rows with the same noise and the true lengths, with token routing
and with block routing at every threshold and block length. Distinct experts are means over the blocks of a canvas,
counted for token routing in blocks of the same length. Quality is the share of target tokens that are right.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from report import save
from transformers import Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from yan_hf import YanConfig, YanDataCollator, YanForAutoEncoding, YanForConditionalGeneration, train_tokenizer
from yan_hf.training.callbacks import EpochCallback


HUB_NAME = "roneneldan/TinyStories"


def read_texts(folder: Path | None, split: str) -> list[str]:
    if folder is None:
        rows = load_dataset(HUB_NAME, split="validation" if split == "test" else "train[:20000]")
    else:
        rows = load_dataset("json", data_files=str(folder / f"{split}.jsonl.gz"), split="train")
    return [text.replace("\n", " ") for text in rows["text"]]


def passages(tokenizer, texts: list[str], length: int) -> list[dict[str, list[int]]]:
    """Stories cut into pieces of `length - 1` tokens; rests shorter than half of that are left out."""
    found = []
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        pieces = [ids[start : start + length - 1] for start in range(0, len(ids), length - 1)]
        found += [{"input_ids": piece} for piece in pieces if len(piece) >= length // 2]
    return found


def make_collator(options, tokenizer, objective: str, seed: int) -> YanDataCollator:
    return YanDataCollator(
        tokenizer, objective=objective, mask_rate=options.mask_rate, max_span=options.max_span, seed=seed
    )


def fit(
    options, model, tokenizer, rows, objective: str, steps: int, rate: float, batch_size: int | None = None
) -> float:
    """Trains in place; the seconds that it took."""
    collator = make_collator(options, tokenizer, objective, options.seed)
    arguments = TrainingArguments(
        output_dir=str(options.work),
        max_steps=steps,
        per_device_train_batch_size=batch_size or options.batch_size,
        learning_rate=rate,
        warmup_steps=30,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": steps // 3, "num_stable_steps": steps - 30 - steps // 3},
        adam_beta2=0.98,
        weight_decay=0.01,
        save_strategy="no",
        report_to="none",
        logging_steps=100,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        seed=options.seed,
    )
    began = time.monotonic()
    Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=collator,
        callbacks=[EpochCallback(collator)],
    ).train()
    return time.monotonic() - began


@torch.no_grad()
def measure(model, batches: list[dict[str, torch.Tensor]], **options: object) -> tuple[float, float]:
    """Share of right tokens, and mean number of distinct experts in a block."""
    right = total = distinct = blocks = row = 0
    for batch in batches:
        labels = batch["labels"]
        lengths = (labels != -100).sum(-1)
        output = model.generate(
            batch["input_ids"],
            batch["attention_mask"],
            target_lengths=lengths,
            seeds=list(range(row, row + len(labels))),
            # Every position counts, also behind an end token that came too early.
            suppress_tokens=None,
            eos_token_id=[],
            return_dict_in_generate=True,
            output_routing=True,
            **options,
        )
        row += len(labels)
        counted = labels != -100
        right += int((output.sequences == labels)[counted].sum())
        total += int(counted.sum())
        distinct += int(output.distinct_experts.sum())
        blocks += int((output.distinct_experts > 0).sum())
    return right / total, distinct / blocks


def evaluate(options, models: dict[str, torch.nn.Module], batches: list) -> list[dict[str, object]]:
    sizes = {str(size): size for size in options.block_sizes} | {"whole": options.length}
    rows = []
    for name, model in models.items():
        for label, size in sizes.items():
            settings = [("token", 1.0), *(("block", threshold) for threshold in options.thresholds)]
            for routing, threshold in settings:
                accuracy, distinct = measure(
                    model,
                    batches,
                    routing=routing,
                    routing_block_size=size,
                    routing_top_k=options.top_k or options.experts,
                    core_threshold=threshold,
                )
                rows.append(
                    {
                        "model": name,
                        "routing": routing,
                        "block_size": label,
                        "core_threshold": threshold,
                        "token_accuracy": accuracy,
                        "distinct_experts": distinct,
                    }
                )
    base = {row["block_size"]: row for row in rows if row["model"] == "token, longer" and row["routing"] == "token"}
    for row in rows:
        reference = base[row["block_size"]]
        row["quality_kept"] = row["token_accuracy"] / reference["token_accuracy"]
        row["fewer_experts"] = 1 - row["distinct_experts"] / reference["distinct_experts"]
        print(
            f"{row['model']:14} {row['routing']:6} block {row['block_size']:>5} threshold {row['core_threshold']:.1f} "
            f"tokens right {row['token_accuracy']:.4f} ({row['quality_kept']:.1%})  distinct experts "
            f"{row['distinct_experts']:5.1f} ({-row['fewer_experts']:+.0%})",
            flush=True,
        )
    return rows


def plot(rows: list[dict], trained: str, file: Path):
    """Quality kept against distinct experts, one line for each block length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True, sharex=True, sharey=True)
    for axis, model in zip(axes, ("block", "token, longer")):
        for size, marker in zip(dict.fromkeys(row["block_size"] for row in rows), "osv^D"):
            points = [row for row in rows if (row["model"], row["block_size"]) == (model, size)]
            points = [row for row in points if row["routing"] == "block"]
            axis.plot(
                [100 * row["fewer_experts"] for row in points],
                [100 * row["quality_kept"] for row in points],
                marker=marker,
                label="whole target" if size == "whole" else f"block of {size}",
            )
        axis.axhline(99, color="grey", linewidth=0.8, linestyle="--")
        axis.axvline(70, color="grey", linewidth=0.8, linestyle="--")
        axis.set_title(f"fine-tuned ({trained})" if model == "block" else "not fine-tuned for blocks", fontsize=10)
        axis.set_xlabel("fewer distinct experts in a block, %")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("tokens right, % of token routing")
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train.jsonl.gz and test.jsonl.gz")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--length", type=int, default=64, help="longest target, in tokens")
    parser.add_argument("--vocab-size", type=int, default=1000)
    parser.add_argument("--mask-rate", type=float, default=0.08)
    parser.add_argument("--max-span", type=int, default=1, help="longest masked span, in tokens")
    parser.add_argument("--autoencoder-steps", type=int, default=400)
    parser.add_argument("--short-length", type=int, default=16)
    parser.add_argument("--short-steps", type=int, default=700)
    parser.add_argument("--flow-steps", type=int, default=400)
    parser.add_argument("--tuning-steps", type=int, default=250)
    parser.add_argument("--autoencoder-rate", type=float, default=2e-3)
    parser.add_argument("--flow-rate", type=float, default=3e-3)
    parser.add_argument("--tuning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--block-size", type=int, default=32, help="of the block-routed training")
    parser.add_argument("--threshold", type=float, default=0.6, help="of the block-routed training")
    parser.add_argument("--top-k", type=int, default=8, help="experts a token votes for; 0: all")
    parser.add_argument("--load-balance", type=float, default=0.01, help="weight, in the block-routed training")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    parser.add_argument("--test-rows", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/routing_quality"))
    parser.add_argument("--start", type=Path, help="folder of an earlier run's token-routed model, instead of 1 and 2")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    set_seed(options.seed)
    texts = read_texts(options.data, "train")
    tokenizer = train_tokenizer(texts, vocab_size=options.vocab_size, model_type="bpe")
    train_rows = passages(tokenizer, texts, options.length)
    test_rows = passages(tokenizer, read_texts(options.data, "test"), options.length)
    order = np.random.default_rng(options.seed).permutation(len(test_rows))[: options.test_rows]
    test_rows = [test_rows[index] for index in order]
    collator = make_collator(options, tokenizer, "span_infilling", seed=1)
    batches = [collator(test_rows[start : start + 64]) for start in range(0, len(test_rows), 64)]
    print(f"{len(train_rows)} passages to train on, {len(test_rows)} to evaluate on", flush=True)

    config = YanConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        num_attention_heads=4,
        feed_forward_multiplier=1,
        encoder_layers=3,
        flow_layers=2,
        decoder_layers=1,
        num_experts=options.experts,
        init_noise=0.5,
        max_position_embeddings=options.length,
        initializer_range=0.1,
        loss_weights={"mmd": 0.0},
        experts_implementation=None if torch.cuda.is_available() else "eager",
    )
    minutes = {}
    start = options.start
    if start is None:
        autoencoder = YanForAutoEncoding(config)
        arguments = (tokenizer, train_rows, "auto_encoding", options.autoencoder_steps, options.autoencoder_rate)
        minutes["autoencoder"] = fit(options, autoencoder, *arguments) / 60
        autoencoder.save_pretrained(options.work / "autoencoder")
        logging.set_verbosity_error()  # the flow's keys are missing, as they should
        model = YanForConditionalGeneration.from_pretrained(
            options.work / "autoencoder", experts_implementation="eager"
        )
        logging.set_verbosity_warning()
        # The latents are fixed, so that these two terms cannot shrink them; and they have to be hit closely.
        model.freeze("encoder", "decoder", "token_embeddings")
        model.config.loss_weights.update(flow=0.1, latent=0.1)
        short_rows = passages(tokenizer, texts, options.short_length)
        arguments = (tokenizer, short_rows, "span_infilling", options.short_steps, options.flow_rate)
        minutes["token"] = fit(options, model, *arguments, batch_size=2 * options.batch_size) / 60
        arguments = (tokenizer, train_rows, "span_infilling", options.flow_steps, options.flow_rate)
        minutes["token"] += fit(options, model, *arguments) / 60
        start = options.work / "token"
        model.save_pretrained(start)
    models = {}
    block = {
        "routing": "block",
        "routing_block_size": options.block_size,
        "routing_top_k": options.top_k or None,
        "core_threshold": options.threshold,
    }
    for name, fields in {"token, longer": {}, "block": block}.items():
        model = YanForConditionalGeneration.from_pretrained(start, experts_implementation="eager", **fields)
        if fields:
            model.config.loss_weights["load_balance"] = options.load_balance
        arguments = (tokenizer, train_rows, "span_infilling", options.tuning_steps, options.tuning_rate)
        minutes[name] = fit(options, model, *arguments) / 60
        models[name] = model.eval()
        model.save_pretrained(options.work / name.split(",")[0].replace("token", "longer"))
    rows = evaluate(options, models, batches)
    if options.output:
        hidden = ("work", "start", "output")
        save(
            options.output,
            {
                "options": {
                    name: value.name if isinstance(value, Path) else value
                    for name, value in vars(options).items()
                    if name not in hidden
                },
                "data": HUB_NAME if options.data is None else f"local copy, {options.data.name}",
                "train_passages": len(train_rows),
                "test_passages": len(test_rows),
                "parameters": models["block"].num_parameters(),
                "training_minutes": {name: round(value, 1) for name, value in minutes.items()},
                "rows": rows,
            },
        )
        plot(rows, f"block of {options.block_size}, {options.threshold}", options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
