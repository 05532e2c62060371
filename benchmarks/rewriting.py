# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Rewriting (restoration and infilling) by YAN and by other systems of its size, trained on the same rows: quality beside
latency, in one run.

    python benchmarks/rewriting.py train --task restoration --system ar-bart --checkpoint runs/restoration \\
        --train-file train.jsonl.gz --output runs/restoration-ar-bart --minutes 60
    python benchmarks/rewriting.py compare --task restoration --yan runs/restoration \\
        --systems ar-bart=runs/restoration-ar-bart ... --test-file test.jsonl.gz
    python benchmarks/rewriting.py table restoration
    python benchmarks/rewriting.py experts --task restoration --yan runs/restoration --test-file test.jsonl.gz

Every system gets the tokenizer of a YAN checkpoint, its width and layers, its parameters (within 5 %, by the width of
the feed-forward layers), and the data, corruption, batches and optimiser of `examples/configs/TASK.yaml`; options of
the training scripts (`examples/common.py`, Transformers' training arguments) replace single values. With `--minutes`
the learning rate falls to zero as they pass, and preparing the rows does not count. A call that was interrupted goes
on where it stopped.

- `yan`: as `examples/finetune.py` trains it, with the checkpoint's tokenizer and configuration;
- `ar-bart`: source → target, with norms before the layers, as mBART has them, which learns to copy sooner; greedy, and
  with prompt lookup (`-lookup`) that looks in the source too, which Transformers' own does not in models with an
  encoder;
- `ar-gpt2`: source and target in one sequence, greedy and with prompt lookup; `ar-gpt2-fillings`, for infilling,
  writes the fillings alone, with the mask token between them;
- `cmlm`: Mask-Predict (Ghazvininejad et al. 2019) with the likeliest length and 1, 3 and 10 iterations;
- `ctc`: one pass over the source's states, each `--upsample` times, trained with the CTC loss.

`compare` cuts the test documents into paragraphs of over three quarters of 32, 64 and 128 tokens. Latency is the
median over paragraphs, one at a time, throughput that of batches of 32; every paragraph and batch goes through all
systems in turn. Systems with prompt lookup and compiled ones (`--fast`) take one at a time, so that they have
no throughput, and the quality of what they are the fast form of, whose texts they have to give. `no system` is the
source as it is. With restoration every system also gets clean paragraphs, which should stay, and paragraphs with a
word in backquotes.

`experts` says what each expert of a YAN whose targets share their choice writes when it writes everything, in one
step, beside the gate's choice, and beside the best expert of each row by the reference.
"""

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from difflib import SequenceMatcher
from itertools import chain, islice, zip_longest
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from decoders import matching_model
from report import save
from rewriting_report import NO_SYSTEM, plot, table
from rewriting_systems import (
    MODELS,
    BaselineCollator,
    BaselineTrainer,
    Rewriter,
    Rows,
    TimeBudget,
    TimedYanTrainer,
    architecture,
    fast_rewriters,
    load_model,
    load_tokenizer,
    num_positions,
    padded_batch,
    rewriters,
    texts_of,
)
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedTokenizerBase, Seq2SeqTrainingArguments, set_seed

from yan_hf import YanDataCollator, encode_text
from yan_hf.data.alignment import fillings_of
from yan_hf.data.corruption import WORD, quote_words
from yan_hf.data.tasks import TaskEncoder, load_splits, pack_sentences, whole_sentences
from yan_hf.evaluation.metrics import score_texts
from yan_hf.training.callbacks import EpochCallback
from yan_hf.training.trainer import last_complete_checkpoint


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "rewriting"
sys.path.append(str(ROOT / "examples"))

from common import DataArguments, ModelArguments, encode_splits, parse, read_splits, task_encoder  # noqa: E402


TASKS = ("restoration", "infilling")
SYSTEMS = tuple(MODELS)
RESTORATION_METRICS = (
    "word_error_rate", "punctuation_f1", "capitalization_f1", "sentence_accuracy", "wrong_edit_rate",
)  # fmt: skip


# Training


def make_collator(
    data: DataArguments, encoder: TaskEncoder, tokenizer: PreTrainedTokenizerBase, align: bool = False
) -> YanDataCollator:
    """The batches that YAN is trained on, but for the slack of its canvases, which no other system has."""
    is_span = encoder.objective == "span_infilling"
    return YanDataCollator(
        tokenizer,
        encoder.objective,
        mask_rate=data.mask_rate,
        max_length=data.max_target_length if is_span else data.max_source_length,
        corruption=encoder.corruption,
        align=align and (encoder.corruption is not None or is_span),
    )


def make_model(options: argparse.Namespace, data: DataArguments) -> torch.nn.Module:
    """A new model of the checkpoint's size, or one to start from."""
    config = AutoConfig.from_pretrained(options.checkpoint)
    if options.system == "yan" and options.start:
        return AutoModelForSeq2SeqLM.from_pretrained(options.start, config=config)
    if options.system == "yan":
        return AutoModelForSeq2SeqLM.from_config(config)
    if options.start:
        return load_model(options.system, options.start).train()
    with torch.device("meta"):
        parameters = AutoModelForSeq2SeqLM.from_config(config).num_parameters()
    positions = num_positions(options.system, data.max_source_length, data.max_target_length, options.upsample)
    model = matching_model(architecture(options.system), config, parameters, positions, vary="width")
    model.config.mask_token_id, model.config.upsample = config.mask_token_id, options.upsample
    return model


def train(options: argparse.Namespace, arguments: list[str]):
    """Trains a system; its folder then holds the model, the tokenizer and `training.json`."""
    if options.system == "ar-gpt2-fillings" and options.task != "infilling":
        raise SystemExit("rewriting.py: ar-gpt2-fillings fills masks: it needs --task infilling.")
    report = options.output / "training.json"
    if report.is_file():
        raise SystemExit(f"rewriting.py: {options.output} holds a trained system: choose another --output.")
    given = ["--output_dir", str(options.output), "--learning_rate", str(options.learning_rate), *arguments]
    config = str(ROOT / "examples" / "configs" / f"{options.task}.yaml")
    kinds = (DataArguments, Seq2SeqTrainingArguments)
    data, training = parse(*kinds, arguments=[config, *given], ignored=(ModelArguments,))
    data.align &= options.system == "yan"
    training.remove_unused_columns = False
    if options.minutes:
        training.max_steps = 10**6
    set_seed(training.seed)
    tokenizer, model = load_tokenizer(options.checkpoint), make_model(options, data)
    examples = encode_splits({"train": read_splits(data)["train"]}, tokenizer, data)["train"]
    collator = make_collator(data, task_encoder(data, tokenizer), tokenizer, data.align)
    budget = TimeBudget(options.minutes)
    common = {"model": model, "args": training, "train_dataset": examples, "processing_class": tokenizer}
    if options.system == "yan":
        trainer = TimedYanTrainer(**common, data_collator=collator, budget=budget)
    else:
        batches = BaselineCollator(collator, options.system)
        trainer = BaselineTrainer(**common, data_collator=batches, system=options.system, budget=budget)
        trainer.add_callback(EpochCallback(collator))
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(options.output, ["trainer_state.json"]))
    minutes = budget.elapsed()
    trainer.save_model()
    found = {
        "system": options.system,
        "minutes": round(minutes, 3),
        "steps": trainer.state.global_step,
        "learning_rate": training.learning_rate,
        "batch_size": training.per_device_train_batch_size,
        "loss": next((entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry), None),
        "parameters": model.num_parameters(),
    }
    report.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


# Rows


class Example(NamedTuple):
    """A source and its target, as texts and as tokens that end with the end token."""

    source: str
    target: str
    source_ids: list[int]
    target_ids: list[int]


def data_arguments(task: str, arguments: list[str]) -> DataArguments:
    """The task's, with options of the command line."""
    config = str(ROOT / "examples" / "configs" / f"{task}.yaml")
    ignored = (ModelArguments, Seq2SeqTrainingArguments)
    return parse(DataArguments, arguments=[config, *arguments], ignored=ignored)[0]


def read_documents(file: str) -> list[str]:
    """The texts in the column `text`, lists of sentences joined."""
    split = load_splits({"test": file})["test"]
    return [" ".join(text) if isinstance(text, list) else text for text in split["text"]]


def paragraphs(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, size: int, count: int) -> list[str]:
    """Paragraphs of over three quarters of `size` tokens: the first one of every document, then the second ones."""

    def long_enough(paragraph: str) -> bool:
        return 4 * (len(encode_text(tokenizer, [paragraph])[0])) > 3 * size

    columns = zip_longest(*(filter(long_enough, pack_sentences(tokenizer, text, size)) for text in documents))
    return list(islice((paragraph for paragraph in chain.from_iterable(columns) if paragraph), count))


def with_code(text: str) -> str:
    """The text with a word in its middle in backquotes."""
    return quote_words(text, len(WORD.findall(text)) // 2)


def make_examples(
    texts: list[str], data: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int, clean: bool = False
) -> list[Example]:
    """Masked or spoilt texts, the same in every run of a seed; or with `clean` such as should stay as they are."""
    encoder = task_encoder(data, tokenizer)
    (*targets,) = encode_text(tokenizer, texts)
    if encoder.objective == "span_infilling":
        collator = make_collator(data, encoder, tokenizer)
        collator.seed = seed
        batches = [collator([{"input_ids": ids}]) for ids in targets]
        sources = [batch["input_ids"][0].tolist() for batch in batches]
        written = tokenizer.batch_decode(sources, skip_special_tokens=True)
        return list(map(Example, written, texts, sources, targets))
    encoder.corruption.clean_rate = 0.0
    written = texts if clean else [encoder.corruption(text, seed) for text in texts]
    made = map(Example, written, texts, encode_text(tokenizer, written), targets)
    return [example for example in made if len(example.source_ids) <= data.max_source_length]


# Scores


def _numbers(text: str) -> list[str]:
    return [word for word in WORD.findall(text) if any(map(str.isdigit, word))]


def _names(text: str) -> list[str]:
    """Capitalised words inside sentences, "I" and its contractions apart."""
    inside = (word for sentence in whole_sentences(text) for word in WORD.findall(sentence)[1:])
    return [word for word in inside if word[0].isupper() and not re.fullmatch(r"I(['’]\w+)?", word)]


def _code(text: str) -> list[str]:
    return re.findall(r"`[^`]+`", text)


def survivors(find: Any, texts: Sequence[str], references: Sequence[str]) -> list[int]:
    """How many of what `find` finds in the references stand in the texts too, and how many there are."""
    kept = total = 0
    for text, reference in zip(texts, references):
        wanted = Counter(find(reference))
        kept += (wanted & Counter(find(text))).total()
        total += wanted.total()
    return [kept, total]


def score_restoration(texts: list[str], examples: list[Example]) -> dict[str, Any]:
    sources, references = [example.source for example in examples], [example.target for example in examples]
    figures = score_texts(texts, references, RESTORATION_METRICS, sources)
    found = {"numbers": survivors(_numbers, texts, references), "names": survivors(_names, texts, references)}
    return {**figures, **found}


def score_infilling(
    texts: list[str], examples: list[Example], ids: Rows, tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """
    Exact match and F1 of whole texts; the share of the known tokens that stand in the text, in order; and that of the
    fillings that are right, token by token, none of them in a text that lacks a known token.
    """
    mask, eos = tokenizer.mask_token_id, tokenizer.eos_token_id
    figures = score_texts(texts, [example.target for example in examples], ("exact_match", "f1"))
    known = kept = right = total = 0
    for example, written in zip(examples, ids):
        given = [token for token in example.source_ids[:-1] if token != mask]
        matcher = SequenceMatcher(None, given, written, autojunk=False)
        known, kept = known + len(given), kept + sum(block.size for block in matcher.get_matching_blocks())
        wanted = fillings_of(example.source_ids, example.target_ids, mask, eos)
        found = fillings_of(example.source_ids, [*written, eos], mask, eos) or []
        right, total = right + sum(a == b for a, b in zip(found, wanted)), total + len(wanted)
    return {**figures, "fillings_right": right / total, "known_kept": kept / known}


def score(task: str, written: Rows, examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Of what a system wrote, without end tokens."""
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    if task == "infilling":
        return score_infilling(texts, examples, written, tokenizer)
    return score_restoration(texts, examples)


# Comparison


def run(
    systems: dict[str, Rewriter], batches: Iterable[Rows], clock: Callable[[], float] = time.perf_counter
) -> tuple[dict[str, Rows], dict[str, list[float]]]:
    """What every system writes, and its seconds for each batch; every batch goes through all systems in turn."""
    ids: dict[str, Rows] = {name: [] for name in systems}
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for batch in batches:
        for name, rewrite in systems.items():
            began = clock()
            ids[name] += rewrite(batch)
            seconds[name].append(clock() - began)
    return ids, seconds


def batches_of(examples: list[Example], size: int) -> list[Rows]:
    sources = [example.source_ids for example in examples]
    return [sources[start : start + size] for start in range(0, len(sources), size)]


def probe(
    systems: dict[str, Rewriter],
    texts: list[str],
    data: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """How many of the clean texts and of their sentences every system leaves alone, and how much code it keeps."""
    clean = make_examples(texts, data, tokenizer, seed, clean=True)
    coded = make_examples(list(map(with_code, texts)), data, tokenizer, seed)
    kept, _ = run(systems, batches_of(clean, 32))
    written, _ = run(systems, batches_of(coded, 32))
    targets, coded_targets = ([example.target for example in examples] for examples in (clean, coded))
    figures = {}
    for name in systems:
        texts = tokenizer.batch_decode(kept[name], skip_special_tokens=True)
        found = score_texts(texts, targets, ("unchanged_rate", "sentence_accuracy"), targets)
        texts = tokenizer.batch_decode(written[name], skip_special_tokens=True)
        figures[name] = {
            "unchanged_rate": found["unchanged_rate"],
            "unchanged_sentences": found["sentence_accuracy"],
            "code": survivors(_code, texts, coded_targets),
        }
    return figures


def measure(
    systems: dict[str, Rewriter],
    documents: list[str],
    size: int,
    options: argparse.Namespace,
    data: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:
    """A row of figures for every system, on paragraphs of one size."""
    texts = paragraphs(documents, tokenizer, size, options.rows)
    examples = make_examples(texts, data, tokenizer, options.seed)
    if not examples:
        raise SystemExit(f"rewriting.py: the test file has no paragraph of about {size} tokens.")
    compiled = {name: system for name, system in systems.items() if "-compiled" in name}
    batched = {name: systems[name] for name in systems if not (name in compiled or name.endswith("-lookup"))}
    singles = batches_of(examples[: options.timed_rows], 1)
    run(systems, singles[:1])  # warms up
    run(compiled, singles)  # a program for every combination of lengths
    ids, batch_seconds = run(batched, batches_of(examples, 32))
    single_ids, single_seconds = run(systems, singles)
    num_tokens = sum(len(example.target_ids) for example in examples)

    rows = {name: score(options.task, written, examples, tokenizer) for name, written in ids.items()}
    unwritten = [[i for i in example.source_ids[:-1] if i != tokenizer.mask_token_id] for example in examples]
    rows[NO_SYSTEM] = score(options.task, unwritten, examples, tokenizer)
    if options.task == "restoration":
        probed = {**batched, NO_SYSTEM: lambda sources: [source[:-1] for source in sources]}
        for name, figures in probe(probed, texts[: options.probe_rows], data, tokenizer, options.seed).items():
            rows[name] |= figures
    for name in set(systems) - set(batched):
        plain = name.removesuffix("-lookup").replace("-compiled", "")
        same = [a == b for a, b in zip(single_ids[name], single_ids[plain])]
        rows[name] = {**rows[plain], "same_text": sum(same) / len(same)}
    found = []
    for name in (NO_SYSTEM, *systems):
        row = {"system": name, "size": size, "rows": len(examples), **rows[name]}
        if name in systems:
            row |= {"latency_seconds": median(single_seconds[name]), "timed_rows": len(singles)}
        if name in batched:
            row["tokens_per_second"] = num_tokens / sum(batch_seconds[name])
        found.append(row)
    return found


def compare(options: argparse.Namespace, arguments: list[str]):
    """Evaluates YAN and the baselines on the same paragraphs; writes figures, plot and table."""
    torch.set_num_threads(options.threads)
    data = data_arguments(options.task, arguments)
    tokenizer = load_tokenizer(options.yan)
    systems, about = {}, {}
    for name, folder in (("yan", options.yan), *options.systems):
        if name != "yan" and load_tokenizer(folder).get_vocab() != tokenizer.get_vocab():
            raise SystemExit(f"rewriting.py: {folder} has another tokenizer than {options.yan}.")
        model = load_model(name, folder)
        systems |= rewriters(name, model, data.max_target_length)
        if name == "yan" and options.fast:
            systems |= fast_rewriters(model, folder, data.max_target_length)
        training = Path(folder, "training.json")
        about[name] = json.loads(training.read_text()) if training.is_file() else {}
        about[name]["parameters"] = model.num_parameters()
    documents = read_documents(options.test_file)
    rows = []
    for size in options.sizes:
        rows += measure(systems, documents, size, options, data, tokenizer)
        report = {"task": options.task, "seed": options.seed, "systems": about, "rows": rows}
        save(options.output, report)  # after every size, so that a run that is cut short loses nothing
    plot(report, options.output.with_suffix(".png"))
    print(table(report))


def experts(options: argparse.Namespace, arguments: list[str]):
    """Writes what single experts are worth."""
    torch.set_num_threads(options.threads)
    data = data_arguments(options.task, arguments)
    tokenizer, model = load_tokenizer(options.yan), load_model("yan", options.yan)
    if (model.config.expert_scope, model.config.reselect_experts) != ("target", True):
        raise SystemExit(f"rewriting.py: {options.yan} has no experts that whole targets choose anew at every step.")
    texts = paragraphs(read_documents(options.test_file), tokenizer, options.size, options.rows)
    rows: dict[str, Any] = {}
    for kind in ("spoilt", "clean") if options.task == "restoration" else ("masked",):
        examples = make_examples(texts, data, tokenizer, options.seed, clean=kind == "clean")
        shares: Counter = Counter()

        def write(expert: int | None, examples: list[Example] = examples, shares: Counter = shares) -> Rows:
            written: Rows = []
            for sources in batches_of(examples, 32):
                given = {"expert_selection": "greedy"}
                if expert is not None:
                    given["expert_indices"] = torch.full((1, len(sources), data.max_target_length), expert)
                found = model.generate(
                    **padded_batch(sources, model.config.pad_token_id),
                    seeds=list(range(len(sources))),
                    num_inference_steps=1,
                    max_new_tokens=data.max_target_length,
                    return_dict_in_generate=True,
                    output_expert_indices=True,
                    **given,
                )
                shares.update(found.expert_indices[0, :, 0].tolist() if expert is None else [])
                written += texts_of(found.sequences, model.config)
            return written

        written = {"gate": write(None)} | {f"expert {k}": write(k) for k in range(model.config.num_experts)}
        likeness = [
            {
                name: SequenceMatcher(None, ids[row], example.target_ids, autojunk=False).ratio()
                for name, ids in written.items()
            }
            for row, example in enumerate(examples)
        ]
        written["best by the reference"] = [written[max(like, key=like.get)][row] for row, like in enumerate(likeness)]
        rows[kind] = {
            "gate_chose": [shares[k] / len(examples) for k in range(model.config.num_experts)],
            "rows": len(examples),
            **{name: score(options.task, ids, examples, tokenizer) for name, ids in written.items()},
        }
        print(kind, json.dumps(rows[kind], indent=1))
    save(options.output, {"task": options.task, "size": options.size, "seed": options.seed, "kinds": rows})


def named_folder(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if name not in SYSTEMS or not folder:
        raise argparse.ArgumentTypeError(f"expected SYSTEM=FOLDER with one of {', '.join(SYSTEMS)}, not {text!r}")
    return name, Path(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("train", help="train a system", allow_abbrev=False)
    command.add_argument("--task", choices=TASKS, required=True)
    command.add_argument("--system", choices=("yan", *SYSTEMS), required=True)
    command.add_argument("--checkpoint", type=Path, required=True, help="YAN's: tokenizer and configuration")
    command.add_argument("--output", type=Path, required=True, help="a call with the same one goes on")
    command.add_argument("--start", type=Path, help="a trained one to go on from")
    command.add_argument("--minutes", type=float, help="of training, instead of --max-steps")
    command.add_argument("--learning-rate", type=float, default=1e-3)
    command.add_argument("--upsample", type=int, choices=(2, 3), default=2, help="positions for a source token in CTC")

    command = commands.add_parser("compare", help="evaluate all systems in one run", allow_abbrev=False)
    command.add_argument("--task", choices=TASKS, required=True)
    command.add_argument("--yan", type=Path, required=True, help="its checkpoint")
    command.add_argument("--systems", type=named_folder, nargs="*", default=[], metavar="SYSTEM=FOLDER")
    command.add_argument("--test-file", required=True, help="documents, in the column `text`")
    command.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128])
    command.add_argument("--rows", type=int, default=320, help="paragraphs of every size")
    command.add_argument("--timed-rows", type=int, default=30, help="of them one at a time, for the latency")
    command.add_argument("--fast", action="store_true", help="YAN also compiled and in 8 bits (some minutes a size)")
    command.add_argument("--probe-rows", type=int, default=160, help="paragraphs that are clean, and with code")
    command.add_argument("--threads", type=int, default=1)
    command.add_argument("--seed", type=int, default=0, help="of the corruption")
    command.add_argument("--output", type=Path, help="JSON file, the plot next to it (default: the task's results)")

    command = commands.add_parser("experts", help="what single experts write", allow_abbrev=False)
    command.add_argument("--task", choices=TASKS, required=True)
    command.add_argument("--yan", type=Path, required=True, help="its checkpoint")
    command.add_argument("--test-file", required=True, help="documents, in the column `text`")
    command.add_argument("--size", type=int, default=32, help="tokens of a paragraph")
    command.add_argument("--rows", type=int, default=160)
    command.add_argument("--threads", type=int, default=1)
    command.add_argument("--seed", type=int, default=0, help="of the corruption")
    command.add_argument("--output", type=Path, help="JSON file (default: among the results)")

    command = commands.add_parser("table", help="print the figures as Markdown")
    command.add_argument("task", choices=TASKS)

    options, rest = parser.parse_known_args()
    if options.command == "train":
        train(options, rest)
    elif options.command == "compare":
        options.output = options.output or RESULTS / f"{options.task}.json"
        compare(options, rest)
    elif options.command == "experts":
        options.output = options.output or RESULTS / f"{options.task}_experts.json"
        experts(options, rest)
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    else:
        print(table(json.loads((RESULTS / f"{options.task}.json").read_text())))


if __name__ == "__main__":
    main()
