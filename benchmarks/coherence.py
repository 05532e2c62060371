# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Coherent experts on real text: whether a shared choice of experts, and choosing anew, generate better at equal passes.

    python benchmarks/coherence.py --task infilling --data tinystories --models 1 4-anew 8-held --seed 0 --work work

Tasks on stories: `infilling` (sentences with a span of one to three words masked, which is generated), `middle` (a
sentence between its neighbours, which is generated), `last_word`.

One field is trained for `--grow-at` of `--train-steps`; from there each of the `--models` goes on by itself for the
rest: `1`, the field, or `K-token`, `K-held`, `K-anew`, where it becomes K experts that tokens choose for themselves,
or the whole target once, or at every step. `--grow-at 0` trains each from nothing. `--work` keeps what has been
trained, which is not trained again: a folder for one setting of the training's other options. Measured on the test
rows, for 1 to 4 solver steps:

- exact match of the greedy text with predicted and true lengths;
- of 8 texts with true lengths, which divide the gate's choices among them (`expert_selection="stratified"`; of one
  field and of tokens that choose for themselves, drawn ones): the best by the reference (`oracle`), the best by the
  joint score of choices and tokens (`reranked`), how many are `distinct`, and the loss in nats per token of an
  autoregressive judge, a GPT-2 of width 128 trained on the targets of the same rows, on all 8;
- for three steps also the oracle and the distinct texts of 8 whose choices are `drawn`, of 8 whose `tokens` are, of
  the 8 likeliest that the greedy text's token distributions give, each token by itself (`listed`), and where experts
  are chosen anew, of the 8 that a `beam` over the choices keeps, and the best of those by the joint score
  (`reranked_beam`);
- the entropy of the gate and every expert's share of the winners, in the last steps of training.
"""

import argparse
import json
import time
from functools import partial
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
from yan_hf.training.callbacks import ExpertUsageCallback


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


_SHARED_WEIGHTS = {
    "token": 1.0,
    "latent": 0.01,
    "gate": 0.1,
    "reconstruction": 0.5,
    "mmd": 0.0,
    "l2": 0.01,
    "length": 0.1,
}
LOSS_WEIGHTS = {
    "target": {**_SHARED_WEIGHTS, "flow": 0.0, "load_balance": 0.0},
    "token": {**_SHARED_WEIGHTS, "flow": 0.01, "load_balance": 0.1},
}


def choice_fields(name: str) -> dict[str, object]:
    """The configuration's fields of one of the `--models`."""
    experts, _, choice = name.partition("-")
    if choice not in (("",) if experts == "1" else ("token", "held", "anew")):
        raise ValueError(f"`--models` must be 1, K-token, K-held or K-anew, but one is {name!r}.")
    scope = "token" if choice == "token" else "target"
    fields = {"expert_scope": scope, "reselect_experts": choice == "anew", "loss_weights": LOSS_WEIGHTS[scope]}
    return {"num_experts": int(experts), **fields}


def make_model(options: argparse.Namespace, task: Task, vocab_size: int, name: str) -> YanForConditionalGeneration:
    return YanForConditionalGeneration(
        YanConfig(
            vocab_size=vocab_size,
            hidden_size=options.hidden_size,
            num_attention_heads=4,
            encoder_layers=3,
            flow_layers=2,
            decoder_layers=1,
            max_position_embeddings=task.max_source_length,
            solver_steps=options.steps,
            start_state="aligned" if options.task == "infilling" else "stretched",
            keep_known=options.task == "infilling",
            embedding_scale=0.2,
            initializer_range=0.05,
            detach_length_head=False,
            **choice_fields(name),
        )
    )


def fit(
    model: torch.nn.Module,
    loss_of,
    rows: Rows,
    steps: int,
    rate: float,
    batch_size: int,
    begin: float = 0.0,
    decays: bool = True,
    usage: ExpertUsageCallback | None = None,
) -> dict[str, float]:
    """
    AdamW, 100 warm-up steps, decay over the last third of the training, of which `begin` has been done, if it
    `decays`; means of what `loss_of` reports in the last tenth.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    sums: dict[str, float] = {}
    first = int(begin * steps)
    model.train()
    for step in range(first + 1, steps + 1):
        share = step / steps
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step - first) / 100)
            group["lr"] *= min(1.0, max(0.02, (1 - share) / 0.33)) if decays else 1.0
        index = torch.randint(len(rows), (batch_size,), device=rows.ids.device)
        loss, told = loss_of(rows.batch(index))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if usage is not None and share <= usage.until:
            usage.revive(model, optimizer, step)
        if step > 0.9 * steps:
            for name, value in told.items():
                sums[name] = sums.get(name, 0.0) + value.detach() / (steps - int(0.9 * steps))
        if step % max(1, steps // 10) == 0:
            print(f"step {step} loss {float(loss.detach()):.3f}", flush=True)
    model.eval()
    return {name: value.tolist() for name, value in sums.items()}


def yan_loss(model: YanForConditionalGeneration, usage: ExpertUsageCallback | None = None):
    def loss_of(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        output = model(**batch)
        if usage is not None:
            usage.collect(model, None, output)
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

    kept = options.work / f"{options.task}_judge.pt"
    if kept.is_file():
        judge.load_state_dict(torch.load(kept))
        return judge.eval()
    fit(judge, loss_of, rows, options.judge_steps, 1e-3, options.batch_size)
    torch.save(judge.state_dict(), kept)
    return judge


@torch.no_grad()
def grow_experts(field: YanForConditionalGeneration, model: YanForConditionalGeneration):
    """Takes a trained field's weights over: every expert is a copy of it with noise (arXiv 2212.05055)."""
    weights = field.state_dict()
    for name, value in model.state_dict().items():
        if weights[name].shape == value.shape:
            value.copy_(weights[name])
        elif "experts" in name:
            value.copy_(weights[name] + 0.5 * weights[name].std() * torch.randn_like(value))


def first_stage(options: argparse.Namespace, task: Task, rows: Rows, vocab_size: int) -> YanForConditionalGeneration:
    """One field, at a constant rate, from which all models go on."""
    torch.manual_seed(options.seed)
    model = make_model(options, task, vocab_size, "1").to(rows.ids.device)
    kept = options.work / f"{options.task}_field_seed{options.seed}.pt"
    if kept.is_file():
        model.load_state_dict(torch.load(kept))
        return model
    steps = int(options.grow_at * options.train_steps)
    fit(model, yan_loss(model), rows, steps, options.learning_rate, options.batch_size, decays=False)
    torch.save(model.state_dict(), kept)
    return model


def open_places(config: YanConfig, batch: dict[str, torch.Tensor], lengths: torch.Tensor) -> torch.Tensor:
    """Which positions of targets of these lengths are generated, `(B, L)`: all, or the filling of the only mask."""
    places = torch.arange(int(lengths.max()), device=lengths.device)
    first, number = torch.zeros_like(lengths), lengths
    if config.keep_known:
        first = (batch["input_ids"] == config.mask_token_id).int().argmax(dim=1)
        number = lengths - batch["attention_mask"].sum(dim=1) + 1
    return (places >= first[:, None]) & (places < (first + number)[:, None])


def likeliest_texts(logits: torch.Tensor, ids: torch.Tensor, is_open: torch.Tensor) -> torch.Tensor:
    """
    The `SAMPLES` likeliest texts if the tokens of the positions with `is_open` `(B, L)` were independent, of logits
    `(B, L, V)`; the others are those of `ids` `(B, L)`. `(B · SAMPLES, L)`.
    """
    values, tokens = logits.log_softmax(dim=-1).topk(SAMPLES, dim=-1)
    scores = values.new_full((len(ids), SAMPLES), -torch.inf)
    scores[:, 0] = 0
    texts = ids[:, None].repeat(1, SAMPLES, 1)
    for place in range(ids.shape[1]):
        # A known token is the only choice, and every text goes on as it is.
        more = values[:, place].masked_fill(~is_open[:, place, None], -torch.inf)
        more[:, 0] = torch.where(is_open[:, place], more[:, 0], 0.0)
        chosen = torch.where(is_open[:, place, None], tokens[:, place], ids[:, place, None])
        scores, best = (scores[:, :, None] + more[:, None]).flatten(1).topk(SAMPLES, dim=-1)
        texts = texts.gather(1, (best // SAMPLES)[..., None].expand_as(texts))
        texts[:, :, place] = chosen.gather(1, best % SAMPLES)
    return texts.flatten(0, 1)


@torch.no_grad()
def beam_of_choices(
    model: YanForConditionalGeneration, batch: dict[str, torch.Tensor], lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Texts along the `SAMPLES` likeliest paths of shared choices that a beam of as many finds, from a start without
    noise: ids `(B, SAMPLES, L)` and their joint scores `(B, SAMPLES)`, mean log-probabilities of path and tokens.
    """
    steps, size = model.config.solver_steps, len(lengths)
    canvas = (torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]).long()
    run = {**batch, "target_lengths": lengths, "init_noise": 0.0, "return_dict_in_generate": True}
    encoded = {"encoder_outputs": model.model.encode(**batch), "attention_mask": batch["attention_mask"]}

    def along(path: torch.Tensor, **asked: bool):
        return model.generate(**run, **asked, expert_indices=path[..., None].expand(steps, size, canvas.shape[1]))

    paths = torch.zeros(size, 1, steps, dtype=torch.long, device=lengths.device)  # (B, paths, S)
    scores = torch.zeros(size, 1, device=lengths.device)
    for step in range(steps):
        gates = []
        for path in paths.unbind(1):
            state = along(path.T, output_trajectory=True).trajectory[step]
            times = torch.full((size,), step / steps, device=lengths.device)
            logits = model(**encoded, latents=state, timesteps=times, decoder_attention_mask=canvas).gate_logits
            mean_logits = (logits * canvas[..., None]).sum(1) / lengths[:, None]
            gates.append(mean_logits.log_softmax(dim=-1))
        grown = scores[..., None] + torch.stack(gates, dim=1)  # (B, paths, K)
        number = grown.shape[-1]
        scores, best = grown.flatten(1).topk(min(SAMPLES, grown[0].numel()), dim=-1)
        paths = paths.gather(1, (best // number)[..., None].expand(-1, -1, steps)).clone()
        paths[:, :, step] = best % number
    found = [along(path.T) for path in paths.unbind(1)]
    # As `rerank="joint"`: of a filling, known tokens do not count.
    counts = open_places(model.config, batch, lengths).sum(1)
    joint = [text.sequence_scores + score / counts for text, score in zip(found, scores.unbind(1))]
    return torch.stack([text.sequences for text in found], dim=1), torch.stack(joint, dim=1)


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

    def add_texts(name: str, ids: torch.Tensor, labels: torch.Tensor):
        texts = ids.view(len(labels), SAMPLES, -1)
        add(f"oracle_{name}", torch.stack([is_right(texts[:, sample], labels) for sample in range(SAMPLES)]).any(0))
        add(f"distinct_{name}", float(sum(len(set(map(tuple, row))) for row in texts.tolist())))
        add_judged(name, ids)

    def add_judged(name: str, ids: torch.Tensor):
        behind = torch.arange(ids.shape[1], device=ids.device) >= (ids != pad_id).sum(1)[:, None]
        add(f"judge_{name}", judge_loss(judge, start, ids.masked_fill(behind, -100)))
        add(f"tokens_{name}", (~behind).sum().float())

    # From one start, so that the choices alone differ.
    spread = {"expert_selection": "stratified", "init_noise": 0.0}
    spread = spread if model.config.expert_scope == "target" and model.config.num_experts > 1 else {}
    drawn_tokens = {"do_sample": True, "top_k": 0, "expert_selection": "greedy"}
    for first in range(0, len(rows), batch_size):
        batch = rows.batch(slice(first, first + batch_size))
        labels = batch.pop("labels")
        lengths = (labels != -100).sum(1)
        seeds = list(range(first, first + len(labels)))
        given = {"target_lengths": lengths}
        many = {**given, "num_return_sequences": SAMPLES}
        many["seeds"] = [seed * SAMPLES + sample for seed in seeds for sample in range(SAMPLES)]
        for steps in SOLVER_STEPS:
            for name, length in (("predicted", {}), ("true", given)):
                greedy = {"expert_selection": "greedy", "seeds": seeds, "num_inference_steps": steps, **length}
                ids = model.generate(**batch, **greedy)
                add(f"exact_match_{name}_{steps}", is_right(ids, labels))
            add_judged(f"greedy_{steps}", ids)
            best = {"num_candidates": SAMPLES, "rerank": "joint", "seeds": seeds, "num_inference_steps": steps}
            add(f"reranked_{steps}", is_right(model.generate(**batch, **best, **given, **spread), labels))
            add_texts(f"{steps}", model.generate(**batch, **many, num_inference_steps=steps, **spread), labels)
        add_texts("drawn", model.generate(**batch, **many), labels)
        add_texts("tokens", model.generate(**batch, **many, **drawn_tokens), labels)
        asked = {"return_dict_in_generate": True, "output_scores": True, "expert_selection": "greedy"}
        one = model.generate(**batch, **given, **asked, init_noise=0.0)
        add_texts(
            "listed", likeliest_texts(one.logits, one.sequences, open_places(model.config, batch, lengths)), labels
        )
        if spread and model.config.reselect_experts:
            texts, scores = beam_of_choices(model, batch, lengths)
            add_texts("beam", texts.flatten(0, 1), labels)
            add("reranked_beam", is_right(texts[torch.arange(len(texts)), scores.argmax(1)], labels))
        add("judge_references", judge_loss(judge, start, labels))
        add("tokens_references", (labels != -100).sum().float())
    figures = {name: value / len(rows) for name, value in counts.items() if not name.startswith(("judge", "tokens"))}
    for name in [name for name in counts if name.startswith("judge")]:
        figures[name] = counts[name] / counts[name.replace("judge", "tokens", 1)]
    return {name: round(value, 4) for name, value in figures.items()}


def run(options: argparse.Namespace, name: str, make_field, task: Task, train: Rows, test: Rows, judge, tokenizer):
    """Trains and measures one of the models, and saves its result."""
    output = options.output / f"{options.task}_{name}_seed{options.seed}.json"
    if output.is_file():
        return
    torch.manual_seed(options.seed)
    model = make_model(options, task, len(tokenizer), name).to(train.ids.device)
    usage = ExpertUsageCallback() if model.config.expert_scope == "target" and name != "1" else None
    kept = options.work / f"{options.task}_{name}_seed{options.seed}.pt"
    if kept.is_file():
        weights, told, minutes = torch.load(kept)
        model.load_state_dict(weights)
    else:
        if options.grow_at:
            grow_experts(make_field(), model)
        torch.manual_seed(options.seed + 1_000)  # other rows than the first stage's
        began = time.monotonic()
        more = {"begin": options.grow_at, "usage": usage}
        loss_of = yan_loss(model, usage)
        told = fit(model, loss_of, train, options.train_steps, options.learning_rate, options.batch_size, **more)
        minutes = (time.monotonic() - began) / 60
        torch.save((model.state_dict(), told, minutes), kept)
    figures = evaluate(model.eval(), test, judge, tokenizer.bos_token_id)
    print(name, figures, flush=True)
    settings = {name: value.name if isinstance(value, Path) else value for name, value in vars(options).items()}
    settings = {name: value for name, value in settings.items() if name not in ("output", "work", "models")}
    result = {
        "settings": {"model": name, **settings},
        "parameters": model.num_parameters(),
        "train_rows": len(train),
        "test_rows": len(test),
        "training_minutes": round(minutes, 2),  # of its own stage
        "last_training_steps": told,
        "figures": figures,
    }
    save(output, result)


TEXTS = {
    "exact match, predicted length": "exact_match_predicted_3",
    "true length": "exact_match_true_3",
    "best of 8, by score": "reranked_3",
    "best of 8, oracle": "oracle_3",
    "drawn": "oracle_drawn",
    "beam": "oracle_beam",
    "tokens drawn": "oracle_tokens",
    "tokens listed": "oracle_listed",
    "distinct of 8": "distinct_3",
    "judge, greedy text": "judge_greedy_3",
    "judge, the 8": "judge_3",
}
BY_STEPS = {
    f"{title}, {steps} step{'s' * (steps > 1)}": f"{name}_{steps}"
    for title, name in (("oracle", "oracle"), ("distinct", "distinct"), ("judge, the 8", "judge"))
    for steps in SOLVER_STEPS
}


def table(columns: dict[str, str] = TEXTS, folder: Path = RESULTS) -> str:
    """Means over training seeds of the committed results, and standard deviations, as Markdown."""
    groups: dict[tuple, list[dict]] = {}
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text())
        experts, _, choice = result["settings"]["model"].partition("-")
        groups.setdefault((result["settings"]["task"], choice or "one field", int(experts)), []).append(result)
    head = ["task", "choice", "K", "seeds", *columns]
    rows = [head, ["---"] * len(head)]
    order = ["one field", "token", "held", "anew"]
    for key, results in sorted(groups.items(), key=lambda item: (item[0][0], order.index(item[0][1]), item[0][2])):
        cells = []
        for name in columns.values():
            values = [result["figures"].get(name) for result in results]
            if None in values:  # no beam of choices that are held
                cells.append("")
                continue
            is_share = name.startswith(("exact", "reranked", "oracle"))
            spread = f" ± {stdev(values) * (100 if is_share else 1):.2f}" if len(values) > 1 else ""
            cells.append((f"{100 * mean(values):.1f} %" if is_share else f"{mean(values):.2f}") + spread)
        rows.append([*key, len(results), *cells])
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=COHERENCE_TASKS, default="infilling")
    parser.add_argument("--data", type=Path, help="folder with train and test .jsonl.gz files; default: the Hub")
    parser.add_argument("--models", nargs="+", default=["1", "4-anew", "8-held"])
    parser.add_argument("--steps", type=int, default=3, help="solver steps in training")
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--train-steps", type=int, default=2_000)
    parser.add_argument("--grow-at", type=float, default=0.5, help="share of the training after which models part")
    parser.add_argument("--judge-steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--max-rows", type=int, default=1_500, help="test rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="folder for what the models share")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    for name in options.models:
        choice_fields(name)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = COHERENCE_TASKS[options.task]
    texts = read_rows(task, options.data, "train")
    tokenizer = tokenizer_of(task, texts)
    train = Rows(task, tokenizer, fitting_pairs(task, tokenizer, texts), device)
    test_pairs = fitting_pairs(task, tokenizer, read_rows(task, options.data, "test"))[: options.max_rows]
    test = Rows(task, tokenizer, test_pairs, device)
    options.work.mkdir(parents=True, exist_ok=True)
    judge = make_judge(options, train, len(tokenizer), tokenizer.bos_token_id)
    for name in options.models:
        make_field = partial(first_stage, options, task, train, len(tokenizer))
        run(options, name, make_field, task, train, test, judge, tokenizer)


if __name__ == "__main__":
    main()
