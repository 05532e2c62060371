# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Coherent experts on real text: whether a shared choice of experts, and choosing anew, generate better at equal passes.

    python benchmarks/coherence.py --task infilling --data tinystories --experts 4 --reselect --output ...
    python benchmarks/coherence.py --task infilling --data tinystories --experts 1 --output ...

Tasks on stories: `infilling` (sentences with a span of one to three words masked, the whole sentence is generated),
`middle` (a sentence between its neighbours, which is generated), `last_word`. One stage of training for
`--train-steps` steps of `--batch-size`, the flow starting at the stretched source. Measured on the test rows:

- exact match of the greedy path with predicted and true lengths, for 1 to 4 solver steps;
- of 8 samples with true lengths: the best by the reference (`oracle`), the best by the joint score of choices and
  tokens (`reranked`), how many are distinct, and the loss in nats per token of an autoregressive judge, a GPT-2 of the
  same width trained on the targets of the same rows, on the first sample, on the greedy text, and on the references;
- the entropy of the gate and of the winners, and every expert's share, in the last steps of training.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from statistics import mean, stdev

import torch
from quality_systems import pad
from quality_tasks import MASK, TASKS, Task, encoded_examples, fitting_pairs, read_rows, tokenizer_of
from report import save
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from yan_hf import YanConfig, YanForConditionalGeneration
from yan_hf.data.alignment import fill_masks
from yan_hf.data.tasks import TextPair, space_with_answer, split_sentences


RESULTS = Path(__file__).with_name("results") / "coherence"
SAMPLES, SOLVER_STEPS = 8, (1, 2, 3, 4)


def middle_sentences(rows) -> list[TextPair]:
    """The sentence between two others of 4 to 14 words each, with its neighbours as the source."""
    pairs = []
    for row in rows:
        sentences = split_sentences(row["text"].replace("\n", " "))
        for before, sentence, after in zip(sentences, sentences[1:], sentences[2:]):
            if all(4 <= len(part.split()) <= 14 for part in (before, sentence, after)):
                pairs.append(space_with_answer(TextPair(f"{before} {MASK} {after}", sentence)))
    return pairs


COHERENCE_TASKS = {
    "infilling": TASKS["infilling"],
    "last_word": TASKS["last_word"],
    "middle": Task(
        hub_name=TASKS["infilling"].hub_name,
        pairs=middle_sentences,
        vocab_size=8_000,
        max_source_length=80,
        max_new_tokens=32,
        config=TASKS["infilling"].config,
    ),
}


class Rows:
    """Tokenized pairs as padded tensors."""

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, pairs: list[TextPair], device: torch.device):
        examples = encoded_examples(task, tokenizer, pairs)
        for example, pair in zip(examples, pairs):
            # A target that repeats its source is tokenized as that is, so that its tokens are there.
            if filled := fill_masks(tokenizer, example["input_ids"], pair.source, pair.target):
                example["labels"], _ = filled
        self.ids = pad([example["input_ids"] for example in examples], tokenizer.pad_token_id).to(device)
        self.labels = pad([example["labels"] for example in examples], -100).to(device)
        self.mask = (self.ids != tokenizer.pad_token_id).long()

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, index: torch.Tensor | slice) -> dict[str, torch.Tensor]:
        """Rows, without the columns that are padding in all of them."""
        ids, mask, labels = self.ids[index], self.mask[index], self.labels[index]
        source, target = int(mask.sum(1).max()), int((labels != -100).sum(1).max())
        return {"input_ids": ids[:, :source], "attention_mask": mask[:, :source], "labels": labels[:, :target]}


def make_model(options: argparse.Namespace, task: Task, vocab_size: int) -> YanForConditionalGeneration:
    is_token = options.scope == "token"
    weights = {"token": 1.0, "latent": 0.01, "gate": 0.1, "reconstruction": 0.5, "mmd": 0.0, "l2": 0.01, "length": 0.1}
    return YanForConditionalGeneration(
        YanConfig(
            vocab_size=vocab_size,
            hidden_size=options.hidden_size,
            num_attention_heads=4,
            encoder_layers=3,
            flow_layers=2,
            decoder_layers=1,
            num_experts=options.experts,
            max_position_embeddings=task.max_source_length,
            solver_steps=options.steps,
            expert_scope=options.scope,
            reselect_experts=options.reselect,
            winner_prior=options.prior,
            start_state=options.start_state,
            keep_known=options.keep_known,
            embedding_scale=0.2,
            initializer_range=0.05,
            detach_length_head=False,
            loss_weights={**weights, "flow": 0.01 if is_token else 0.0, "load_balance": 0.1 if is_token else 0.0},
        )
    )


def fit(model: torch.nn.Module, loss_of, rows: Rows, steps: int, rate: float, batch_size: int) -> dict[str, float]:
    """AdamW, 100 warm-up steps, decay over the last third; means of what `loss_of` reports in the last tenth."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    sums: dict[str, float] = {}
    model.train()
    for step in range(1, steps + 1):
        share = step / steps
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / 100) * min(1.0, max(0.02, (1 - share) / 0.33))
        index = torch.randint(len(rows), (batch_size,), device=rows.ids.device)
        loss, told = loss_of(rows.batch(index))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step > 0.9 * steps:
            for name, value in told.items():
                sums[name] = sums.get(name, 0.0) + value.detach() / (steps - int(0.9 * steps))
        if step % max(1, steps // 10) == 0:
            print(f"step {step} loss {float(loss.detach()):.3f}", flush=True)
    model.eval()
    return {name: value.tolist() for name, value in sums.items()}


def yan_loss(model: YanForConditionalGeneration):
    def loss_of(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        output = model(**batch)
        told = dict(output.loss_terms)
        if output.expert_indices is not None:
            wins = torch.nn.functional.one_hot(output.expert_indices[..., 0], model.config.num_experts).float()
            told["winner_shares"] = wins.mean(1)  # (C, K)
        return output.loss, told

    return loss_of


def judge_loss(judge: GPT2LMHeadModel, start: int, labels: torch.Tensor) -> torch.Tensor:
    """Nats of every row of targets, `(B, L)` with -100 behind them."""
    ids = labels.masked_fill(labels == -100, 0)
    logits = judge(torch.cat([ids.new_full((len(ids), 1), start), ids[:, :-1]], dim=1)).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return losses.sum(1)


def make_judge(options: argparse.Namespace, rows: Rows, vocab_size: int, start: int) -> GPT2LMHeadModel:
    torch.manual_seed(1234)
    config = GPT2Config(vocab_size=vocab_size, n_embd=128, n_head=4, n_layer=3, n_positions=96, resid_pdrop=0.1)
    judge = GPT2LMHeadModel(config).to(rows.ids.device)

    def loss_of(batch: dict[str, torch.Tensor]):
        return judge_loss(judge, start, batch["labels"]).sum() / (batch["labels"] != -100).sum(), {}

    fit(judge, loss_of, rows, options.judge_steps, 1e-3, options.batch_size)
    return judge


@torch.no_grad()
def evaluate(model, rows: Rows, judge: GPT2LMHeadModel, start: int, batch_size: int = 250) -> dict[str, object]:
    """The measures of the module's docstring."""
    pad_id = model.config.pad_token_id
    counts: dict[str, float] = {}

    def add(name: str, values: torch.Tensor | float):
        counts[name] = counts.get(name, 0.0) + float(values.sum() if isinstance(values, torch.Tensor) else values)

    def is_right(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        target = labels.masked_fill(labels == -100, pad_id)
        width = max(ids.shape[-1], target.shape[1])
        ids = torch.nn.functional.pad(ids, (0, width - ids.shape[-1]), value=pad_id)
        return (ids == torch.nn.functional.pad(target, (0, width - target.shape[1]), value=pad_id)).all(-1)

    for first in range(0, len(rows), batch_size):
        batch = rows.batch(slice(first, first + batch_size))
        labels = batch.pop("labels")
        lengths = (labels != -100).sum(1)
        seeds = list(range(first, first + len(labels)))
        greedy = {"expert_selection": "greedy", "seeds": seeds}
        for steps in SOLVER_STEPS:
            for name, given in (("predicted", None), ("true", lengths)):
                ids = model.generate(**batch, **greedy, num_inference_steps=steps, target_lengths=given)
                add(f"exact_match_{name}_{steps}", is_right(ids, labels))
            behind = torch.arange(ids.shape[1], device=ids.device) >= (ids != pad_id).sum(1)[:, None]
            add(f"judge_greedy_{steps}", judge_loss(judge, start, ids.masked_fill(behind, -100)))
            add(f"tokens_greedy_{steps}", (~behind).sum().float())
        many = {"num_return_sequences": SAMPLES, "target_lengths": lengths}
        many["seeds"] = [seed * SAMPLES + sample for seed in seeds for sample in range(SAMPLES)]
        ids = model.generate(**batch, **many).view(len(labels), SAMPLES, -1)
        add("oracle", torch.stack([is_right(ids[:, sample], labels) for sample in range(SAMPLES)]).any(0))
        add("sampled", is_right(ids[:, 0], labels))
        add("distinct", float(sum(len(set(map(tuple, row))) for row in ids.tolist())))
        behind = torch.arange(ids.shape[-1], device=ids.device) >= (ids[:, 0] != pad_id).sum(1)[:, None]
        add("judge_sampled", judge_loss(judge, start, ids[:, 0].masked_fill(behind, -100)))
        add("tokens_sampled", (~behind).sum().float())
        ids = model.generate(**batch, seeds=seeds, num_candidates=SAMPLES, rerank="joint", target_lengths=lengths)
        add("reranked", is_right(ids, labels))
        add("judge_references", judge_loss(judge, start, labels))
        add("tokens_references", (labels != -100).sum().float())
    figures = {name: value / len(rows) for name, value in counts.items() if not name.startswith(("judge", "tokens"))}
    for name in [name for name in counts if name.startswith("judge")]:
        figures[name] = counts[name] / counts[name.replace("judge", "tokens")]
    return {name: round(value, 4) for name, value in figures.items()}


def table() -> str:
    """Means over training seeds of the committed results, and standard deviations, as Markdown."""
    groups: dict[tuple, list[dict]] = {}
    for file in sorted(RESULTS.glob("*.json")):
        result = json.loads(file.read_text())
        settings = result["settings"]
        choice = "one field" if settings["experts"] == 1 else "anew" if settings["reselect"] else "held"
        start = settings["start_state"] + (", known kept" if settings.get("keep_known") else "")
        small = f", {settings['vocab_size']:,} tokens" if settings.get("vocab_size") else ""
        key = (settings["task"] + small, start, settings["experts"], choice, settings["prior"])
        groups.setdefault(key, []).append(result)
    columns = {
        "exact match, predicted length": "exact_match_predicted_3",
        "true length": "exact_match_true_3",
        "true length, one step": "exact_match_true_1",
        "a sample": "sampled",
        "best of 8, by score": "reranked",
        "best of 8, oracle": "oracle",
        "distinct of 8": "distinct",
        "judge, greedy text": "judge_greedy_3",
        "judge, a sample": "judge_sampled",
        "judge, the references": "judge_references",
    }
    head = ["task", "start", "K", "choice", "prior", "seeds", *columns]
    rows = [head, ["---"] * len(head)]
    for key, results in sorted(groups.items()):
        cells = []
        for name in columns.values():
            values = [result["figures"][name] for result in results]
            is_share = name.startswith("exact") or name in ("sampled", "reranked", "oracle")
            spread = f" ± {stdev(values) * (100 if is_share else 1):.2f}" if len(values) > 1 else ""
            cells.append((f"{100 * mean(values):.1f} %" if is_share else f"{mean(values):.2f}") + spread)
        rows.append([*key, len(results), *cells])
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=COHERENCE_TASKS, default="infilling")
    parser.add_argument("--data", type=Path, help="folder with train and test .jsonl.gz files; default: the Hub")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="solver steps in training")
    parser.add_argument("--scope", choices=("token", "target"), default="target")
    parser.add_argument("--reselect", action="store_true", help="choose anew at every step")
    parser.add_argument("--prior", type=float, default=0.0, help="weight of the gate's opinion in finding the winner")
    parser.add_argument("--start-state", choices=("noise", "stretched", "aligned"), default="stretched")
    parser.add_argument("--keep-known", action="store_true", help="generate the fillings alone")
    parser.add_argument("--vocab-size", type=int, help="instead of the task's: words of more tokens")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--train-steps", type=int, default=4_000)
    parser.add_argument("--judge-steps", type=int, default=2_000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--max-rows", type=int, default=1_500, help="test rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = COHERENCE_TASKS[options.task]
    if options.vocab_size:
        task = dataclasses.replace(task, vocab_size=options.vocab_size)
    texts = read_rows(task, options.data, "train")
    tokenizer = tokenizer_of(task, texts)
    train = Rows(task, tokenizer, fitting_pairs(task, tokenizer, texts), device)
    test_pairs = fitting_pairs(task, tokenizer, read_rows(task, options.data, "test"))[: options.max_rows]
    test = Rows(task, tokenizer, test_pairs, device)
    judge = make_judge(options, train, len(tokenizer), tokenizer.bos_token_id)
    torch.manual_seed(options.seed)
    model = make_model(options, task, len(tokenizer)).to(device)
    began = time.monotonic()
    told = fit(model, yan_loss(model), train, options.train_steps, options.learning_rate, options.batch_size)
    minutes = (time.monotonic() - began) / 60
    figures = evaluate(model, test, judge, tokenizer.bos_token_id)
    print(figures, flush=True)
    if options.output:
        settings = {name: value.name if isinstance(value, Path) else value for name, value in vars(options).items()}
        result = {
            "settings": {name: value for name, value in settings.items() if name != "output"},
            "parameters": model.num_parameters(),
            "train_rows": len(train),
            "test_rows": len(test),
            "training_minutes": round(minutes, 2),
            "last_training_steps": told,
            "figures": figures,
        }
        save(options.output, result)


if __name__ == "__main__":
    main()
