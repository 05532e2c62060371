# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What the training scripts share: their options, and data and models made from them."""

import json
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from datasets import Dataset, DatasetDict, load_from_disk
from tokenizers import AddedToken
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainingArguments,
    set_seed,
)

from yan_hf import (
    YanConfig,
    YanDataCollator,
    YanForConditionalGeneration,
    encode_dataset,
    prepare_tokenizer,
    train_tokenizer,
)
from yan_hf.data.corruption import WORD, quote_words
from yan_hf.data.files import check_not_input
from yan_hf.data.tasks import TASKS, TaskEncoder, encode_split, load_splits, pack_sentences
from yan_hf.data.tokenization import MASK_MARKER


@dataclass
class DataArguments:
    """What to train on."""

    task: str = field(default="pairs", metadata={"help": f"one of {', '.join(TASKS)}"})
    train_file: str | None = field(default=None, metadata={"help": "JSON Lines (.gz or not), CSV or Parquet file"})
    validation_file: str | None = field(default=None, metadata={"help": "the same for validation"})
    test_file: str | None = field(default=None, metadata={"help": "the same for the test"})
    dataset: str | None = field(default=None, metadata={"help": "name for datasets.load_dataset, instead of files"})
    dataset_config: str | None = field(default=None, metadata={"help": "its configuration"})
    train_split: str = field(default="train", metadata={"help": "its split to train on, or a slice: train[:-2000]"})
    validation_split: str = field(default="validation", metadata={"help": "its split to choose the checkpoint by"})
    test_split: str = field(default="test", metadata={"help": "its split to report, which chooses nothing"})
    columns: str | None = field(
        default=None, metadata={"help": 'the task\'s columns in the data, where they differ: {"text": "sentence"}'}
    )
    class_names: list[str] | None = field(default=None, metadata={"help": "names of the classes, in order"})
    max_source_length: int = field(default=128, metadata={"help": "longer sources are cut"})
    max_target_length: int = field(default=128, metadata={"help": "longest target, the end token included"})
    skip_bad_rows: bool = field(default=False, metadata={"help": "leave unusable rows out instead of stopping"})
    add_mask: bool = field(default=False, metadata={"help": "put a mask token behind sources that have none"})
    mask_first: bool = field(default=False, metadata={"help": "with add_mask: in front of them instead"})
    mask_marker: str | None = field(
        default=None,
        metadata={"help": "what stands for the mask in the rows' sources, such as <mask>; default: nothing"},
    )
    space_in_target: bool = field(default=False, metadata={"help": "the space before a mask belongs to the target"})
    max_sentences: int | None = field(default=None, metadata={"help": "only the first sentences of a story"})
    max_train_rows: int | None = field(default=None, metadata={"help": "use only the first rows"})
    max_eval_rows: int | None = field(default=None, metadata={"help": "evaluate only the first rows"})
    streaming: bool = field(default=False, metadata={"help": "read training rows as they are needed"})
    corruption: str | None = field(
        default=None, metadata={"help": 'how restoration spoils texts, as JSON: {"error_rate": 0.2}'}
    )
    align: bool = field(
        default=False, metadata={"help": "find the target tokens of each source token, for a flow that starts there"}
    )
    pack_tokens: list[int] | None = field(
        default=None,
        metadata={
            "help": "cut texts into paragraphs of whole sentences of at most so many tokens; of several in turn"
        },
    )
    code_rate: float = field(
        default=0.0, metadata={"help": "share of the paragraphs of which some words are put in backquotes, as code"}
    )
    encoded: str | None = field(
        default=None, metadata={"help": "folder for the tokenized rows: kept there, and read where it is"}
    )
    canvas_slack: float = field(default=0.0, metadata={"help": "share of the canvases longer than their target"})
    mask_rate: float = field(default=0.08, metadata={"help": "share of the tokens masked in span infilling"})


@dataclass
class ModelArguments:
    """What to train."""

    model: str | None = field(default=None, metadata={"help": "checkpoint to start from; by default a new model"})
    encoder: str | None = field(
        default=None,
        metadata={"help": "pretrained encoder of a new model: a folder, or a name on the Hub"},
    )
    tokenizer: str | None = field(default=None, metadata={"help": "tokenizer, by default the model's or a new one"})
    vocab_size: int = field(default=4000, metadata={"help": "of a new tokenizer"})
    tokenizer_rows: int | None = field(default=None, metadata={"help": "train it on the first rows only"})
    factor_case: bool = field(
        default=False, metadata={"help": "a capital letter is a mark and the small letter in a new tokenizer"}
    )
    config: str | None = field(default=None, metadata={"help": "fields of a new model's YanConfig, as JSON"})
    freeze: list[str] | None = field(
        default=None,
        metadata={"help": "parts to freeze: encoder, flow, decoder, token_embeddings, position_embeddings"},
    )
    unfreeze: list[str] | None = field(
        default=None, metadata={"help": "parts to train again that the checkpoint says are frozen"}
    )
    ema_decay: float | None = field(default=None, metadata={"help": "average the weights, e.g. 0.999"})
    card: str | None = field(
        default=None, metadata={"help": "write a model card: arguments of YanTrainer.create_model_card, as JSON"}
    )


@dataclass
class LoraArguments:
    """The adapter."""

    rank: int = field(default=8, metadata={"help": "rank of the adapters"})
    alpha: int = field(default=16, metadata={"help": "their scale, divided by the rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on their input"})
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "linear layers by name, or all-linear; by default YAN's own choice"}
    )
    adapt_experts: bool = field(default=False, metadata={"help": "adapt the experts' 3-D weights too"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules that train in full"})


def parse(*types: type, arguments: Sequence[str] | None = None, ignored: tuple[type, ...] = ()) -> tuple[Any, ...]:
    """
    Options from a YAML file, the command line, or both: `script.py [config.yaml] [--option value ...]`.

    The command line wins. Unknown keys of the file are refused, but for the fields of `ignored`, another script's.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = HfArgumentParser(types)
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        path = Path(arguments.pop(0))
        values = yaml.safe_load(path.read_text()) or {}
        foreign = {option.name for kind in ignored for option in fields(kind)}
        values = {name: value for name, value in values.items() if name not in foreign}
        known = {action.dest for action in parser._actions}
        if unknown := sorted(set(values) - known):
            parser.error(f"{path} has unknown options: {', '.join(unknown)}")
        for action in parser._actions:
            if action.nargs in ("*", "+") and isinstance(values.get(action.dest), (str, int, float)):
                values[action.dest] = [values[action.dest]]  # a list of one, written without brackets
        names = values.get("class_names") or []
        if not all(isinstance(name, str) for name in names):
            parser.error(f"{path}: `class_names` must be texts, but are {names}; quote them, as in ['no', 'yes']")
        # An option that the file gives need not stand on the command line.
        for action in parser._actions:
            action.required = action.required and action.dest not in values
        parser.set_defaults(**values)
    return parser.parse_args_into_dataclasses(arguments)


def mapping(value: str | dict | None) -> dict[str, Any]:
    """A mapping given in YAML, or as JSON on the command line."""
    value = yaml.safe_load(value) if isinstance(value, str) else value
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"Expected a mapping such as {{name: value}}, but got {value!r}.")
    return value or {}


def read_splits(data: DataArguments, needed: str = "train") -> dict[str, Any]:
    """The splits that there are, under the names train, validation and test; one of them must be."""
    files = {"train": data.train_file, "validation": data.validation_file, "test": data.test_file}
    # Files on the command line stand in for the data set that a configuration file names.
    dataset = None if any(files.values()) else data.dataset
    parts = {"train": data.train_split, "validation": data.validation_split, "test": data.test_split}
    found = dict(load_splits(files, dataset, data.dataset_config, data.streaming, parts if dataset else None))
    if needed not in found:
        if dataset:
            raise ValueError(f"{dataset} has no split {parts[needed]!r}: name one with `{needed}_split`.")
        raise ValueError(f"There is no `{needed}_file`, which this script needs.")
    for name, limit in (
        ("train", data.max_train_rows),
        ("validation", data.max_eval_rows),
        ("test", data.max_eval_rows),
    ):
        if name in found and limit is not None:
            found[name] = found[name].take(limit)
    return found


def task_encoder(data: DataArguments, tokenizer: PreTrainedTokenizerBase | None, **changes: Any) -> TaskEncoder:
    """What turns rows into texts and token ids; `changes` stand in for options."""
    fields = {"columns": mapping(data.columns), "label_names": data.class_names, **changes}
    fields["corruption"] = mapping(data.corruption) or None
    return TaskEncoder.from_options(data, tokenizer=tokenizer, **fields)


def make_tokenizer(splits: dict[str, Any], data: DataArguments, model: ModelArguments) -> PreTrainedTokenizerBase:
    """The named tokenizer, the model's, the encoder's, or a new one trained on the training rows."""
    if model.tokenizer or model.model:
        return AutoTokenizer.from_pretrained(model.tokenizer or model.model)
    if model.encoder:
        return prepare_tokenizer(AutoTokenizer.from_pretrained(model.encoder))
    encoder = task_encoder(data, None, skip_bad_rows=True, add_mask=False, mask_first=False)

    def texts():
        for row in islice(splits["train"], model.tokenizer_rows):
            try:
                pairs = encoder.pairs(row)
            except ValueError:
                continue  # reported when the rows are tokenized
            yield from (f"{pair.source.replace(MASK_MARKER, '')} {pair.target.strip()}" for pair in pairs)

    encoder.check_columns(list(next(iter(splits["train"]))), "The training data")
    tokenizer = train_tokenizer(texts(), vocab_size=model.vocab_size, model_type="bpe", factor_case=model.factor_case)
    if data.align and encoder.objective == "span_infilling":
        # "a <mask> cat" means the same as "a<mask> cat": the space is part of what the mask stands for.
        tokenizer.add_special_tokens({"mask_token": AddedToken(tokenizer.mask_token, lstrip=True, special=True)})
    return tokenizer


def new_model(
    cls: type[PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    data: DataArguments,
    model: ModelArguments,
    joined: bool = False,
) -> PreTrainedModel:
    """A new model, for sources and targets of the longest length, or for both in one sequence."""
    longest = (sum if joined else max)((data.max_source_length, data.max_target_length))
    if model.encoder:
        fields = {"max_position_embeddings": longest, **mapping(model.config)}
        return cls.from_encoder_pretrained(model.encoder, tokenizer, **fields)
    fields = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": longest,
        **{
            name: getattr(tokenizer, name)
            for name in ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id")
        },
        **mapping(model.config),
    }
    return cls(YanConfig(**fields))


def freeze_parts(model: PreTrainedModel, arguments: ModelArguments):
    """Freezes and unfreezes parts by name, and says what is frozen: a checkpoint remembers it."""
    if arguments.unfreeze:
        model.unfreeze(*arguments.unfreeze)
    if arguments.freeze:
        model.freeze(*arguments.freeze)
    if model.config.frozen_parts:
        print(f"Frozen: {', '.join(model.config.frozen_parts)} (train them with --unfreeze).", flush=True)


# Options of batches, not of the tokenized rows.
_OF_BATCHES = ("encoded", "align", "canvas_slack", "mask_rate")


def with_code(text: str, rate: float) -> str:
    """For a `rate` of the texts, the same ones in every run: with one to three of its words in backquotes."""
    rng = np.random.default_rng(zlib.crc32(text.encode()))
    if "`" in text or rng.random() >= rate:
        return text
    return quote_words(text, int(rng.integers(max(1, len(WORD.findall(text))))), int(rng.integers(1, 4)))


def _packed(
    batch: dict[str, list],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    column: str,
    sizes: list[int],
    code_rate: float,
) -> dict[str, list[str]]:
    """Paragraphs of a batch of documents, of up to each of the sizes in turn, a share of them with code."""
    texts = [" ".join(text) if isinstance(text, list) else text for text in batch[column]]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"`pack_tokens` needs a text in every row of the column `{column}`.")
    rows = [pack_sentences(tokenizer, text, sizes[row % len(sizes)]) for row, text in zip(indices, texts)]
    return {column: [with_code(paragraph, code_rate) for paragraphs in rows for paragraph in paragraphs]}


def encode_splits(
    splits: dict[str, Any], tokenizer: PreTrainedTokenizerBase, data: DataArguments
) -> dict[str, Dataset]:
    """
    Tokenized splits, of paragraphs where texts are packed, kept in the folder `data.encoded`; says how many rows were
    left out. Training rows that are spoilt anew every epoch have no `token_lengths`: the collator finds them.

    Raises `ValueError` for a folder of rows that were made of other data, or by other options or another tokenizer.
    """
    if not 0 <= data.code_rate <= 1 or (data.code_rate and not data.pack_tokens):
        raise ValueError(
            f"`code_rate` must be a share of the paragraphs that `pack_tokens` cuts, not {data.code_rate}."
        )
    if data.encoded and data.streaming:
        raise ValueError("`encoded` keeps the rows of a run; streamed ones are not kept: leave one of them out.")
    made_by = Path(data.encoded or "", "made_by.json")
    made = {name: value for name, value in vars(data).items() if name not in _OF_BATCHES}
    made["tokenizer"] = zlib.crc32(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    if data.encoded and Path(data.encoded).is_dir():
        before = json.loads(made_by.read_text())
        before = {**vars(DataArguments()), **before}  # options that were not there yet
        if changed := sorted(name for name in made if before.get(name) != made[name]):
            found = f"`{changed[0]}` was {before.get(changed[0])!r} and is {made[changed[0]]!r}"
            raise ValueError(f"{data.encoded} holds rows that were made otherwise: {found}. Name another folder.")
        return dict(load_from_disk(data.encoded))
    encoded = {}
    for name, rows in splits.items():
        if data.pack_tokens:
            column = mapping(data.columns).get("text", "text")
            if rows.column_names and column not in rows.column_names:
                raise ValueError(f"`pack_tokens` cuts texts of a column `{column}`, but there is {rows.column_names}.")
            fields = {
                "column": column,
                "sizes": data.pack_tokens,
                "code_rate": data.code_rate if name == "train" else 0.0,
            }
            packed = partial(_packed, tokenizer=tokenizer, **fields)
            rows = rows.map(packed, batched=True, with_indices=True, remove_columns=rows.column_names)
        encoder = task_encoder(data, tokenizer)
        encoder.align &= name != "train" or encoder.corruption is None
        encoded[name], skipped = encode_split(rows, encoder, f"the {name} split")
        if skipped:
            print(f"Left out {skipped} rows of the {name} split: {encoder.skipped}", flush=True)
    if data.encoded:
        DatasetDict(encoded).save_to_disk(data.encoded)
        made_by.write_text(json.dumps(made, indent=2) + "\n")
    return encoded


def prepare_encoder(
    model: PreTrainedModel,
    examples: dict[str, Dataset],
    collator: YanDataCollator,
    training: Seq2SeqTrainingArguments,
):
    """
    Fits the statistics of a new model's pretrained encoder on the first 500 batches. Where it is frozen, the training
    rows of a [`YanForConditionalGeneration`] get its states, so that it never runs again, unless the collator changes
    them.
    """
    model.to(training.device)
    loader = DataLoader(examples["train"], training.per_device_train_batch_size, collate_fn=collator)
    model.fit_latent_statistics(islice(loader, 500))
    stays = collator.objective == "pairs" and collator.corruption is None and collator.canvas_slack == 0
    is_frozen = isinstance(model, YanForConditionalGeneration) and "encoder" in model.config.frozen_parts
    if is_frozen and stays and isinstance(examples["train"], Dataset):
        examples["train"] = encode_dataset(model, examples["train"], dtype="float16")


def prepare(training: Seq2SeqTrainingArguments, arguments: ModelArguments | None = None):
    """
    Before anything is drawn. `resume_from_checkpoint` may be `true`: the last whole checkpoint, if there is one.

    Raises `ValueError` where the output of a new run would replace the checkpoint to start from.
    """
    resume = str(training.resume_from_checkpoint or "false").lower()
    if resume in ("true", "false", "none"):
        training.resume_from_checkpoint = True if resume == "true" else None
    if arguments is not None and not training.resume_from_checkpoint:
        check_not_input(training.output_dir, arguments.model)
    set_seed(training.seed)
