# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""How the columns of a data set become source and target texts, and these token ids; a task is an entry in `TASKS`."""

import os
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .alignment import align_tokens, fill_masks
from .corruption import RestorationCorruption
from .tokenization import MASK_MARKER, encode_text


logger = logging.get_logger(__name__)

ANSWER_HEADER = "Answer:"

# The last run of letters; an apostrophe or hyphen inside a word belongs to it.
_LAST_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*(?=[\W\d_]*$)")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)]*\s+")
# Full stops that end no sentence: initials and common abbreviations.
_ABBREVIATION = re.compile(r"\b(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|Gen|Rev|vs|e\.g|i\.e|cf|Fig)\.$")

# Ending of a file's name → the builder of `datasets` that reads it.
_BUILDERS = {"jsonl": "json", "ndjson": "json", "json": "json", "csv": "csv", "parquet": "parquet"}


class TextPair(NamedTuple):
    """A source text and the target text to generate from it; `MASK_MARKER` of [`tokenization`] stands for masks."""

    source: str
    target: str


def split_sentences(text: str) -> list[str]:
    """Splits at white space after a full stop, exclamation or question mark (and closing quotes)."""
    sentences, start = [], 0
    for match in _SENTENCE_END.finditer(text):
        sentences.append(text[start : match.end()].strip())
        start = match.end()
    return [sentence for sentence in [*sentences, text[start:].strip()] if sentence]


def whole_sentences(text: str) -> list[str]:
    """
    As [`split_sentences`], but with the pieces together again where the next one starts with a lower-case letter, or
    the full stop belongs to an initial or a common abbreviation. A line's end ends a sentence.
    """
    sentences: list[str] = []
    for line in text.splitlines():
        whole: list[str] = []
        for piece in split_sentences(line):
            if whole and (piece[0].islower() or _ABBREVIATION.search(whole[-1])):
                whole[-1] += f" {piece}"
            else:
                whole.append(piece)
        sentences += whole
    return sentences


def pack_sentences(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int) -> list[str]:
    """
    Cuts a document into paragraphs of up to `max_tokens` tokens, the end token included, of as many whole sentences
    (see [`whole_sentences`]) as fit. A longer sentence is left out, and ends the paragraph before it.

    For `datasets.Dataset.map(..., batched=True)` before a [`TaskEncoder`].

    Raises:
        ValueError: for a `max_tokens` under 2.
    """
    if max_tokens < 2:
        raise ValueError(f"`max_tokens` must be at least 2, a token and the end token, but is {max_tokens}.")

    def fits(paragraph: str) -> bool:
        return len(encode_text(tokenizer, [paragraph], add_special_tokens=False)[0]) < max_tokens

    paragraphs, paragraph = [], ""
    for sentence in whole_sentences(text):
        longer = f"{paragraph} {sentence}".lstrip()
        if fits(longer):
            paragraph = longer
            continue
        paragraphs.append(paragraph)
        paragraph = sentence if paragraph and fits(sentence) else ""
    return [paragraph for paragraph in [*paragraphs, paragraph] if paragraph]


def middle_sentence(text: str) -> TextPair:
    """Story infilling: the third sentence masked → the whole story. Raises `ValueError` where there is no third."""
    sentences = split_sentences(text)
    if len(sentences) < 3:
        raise ValueError(f"The third sentence cannot be masked: the story has {len(sentences)} sentences.")
    return TextPair(" ".join([*sentences[:2], MASK_MARKER, *sentences[3:]]), " ".join(sentences))


def last_word(text: str) -> TextPair:
    """Word prediction: the last word masked, punctuation after it kept → the word. Raises `ValueError` without one."""
    match = _LAST_WORD.search(text)
    if match is None:
        raise ValueError(f"There is no alphabetic word to mask in {text!r}.")
    return TextPair(text[: match.start()] + MASK_MARKER + text[match.end() :], match.group())


def question_answering(context: str, question: str, answer: str) -> TextPair:
    """Reading comprehension: context, question, answer header and mask → the answer."""
    return TextPair(f"{context} {question} {ANSWER_HEADER} {MASK_MARKER}", answer)


def classification(text: str, label: int | str, label_names: Sequence[str] | None) -> TextPair:
    """Document → label text, as in "1 positive". Raises `ValueError` for a label, number or name, of no class."""
    if label_names is None:
        raise ValueError("classification needs `label_names`, or a column of the type `ClassLabel`")
    number = list(label_names).index(label) if label in label_names else label
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(label_names):
        known = f"in 0 to {len(label_names) - 1} or one of {list(label_names)}"
        raise ValueError(f"`label` must be {known}, but is {label!r}")
    return TextPair(text, f"{number} {label_names[number]}")


def space_with_answer(pair: TextPair) -> TextPair:
    """
    Moves the space before the mask to the target: `"on the <mask>."`, `"mat"` → `"on the<mask>."`, `" mat"`.

    In subword vocabularies that space is part of the word's token: without it "mat" is other tokens, and more of them,
    than anywhere else. Sources without a space before the mask stay.
    """
    source = pair.source.replace(f" {MASK_MARKER}", MASK_MARKER)
    return pair if source == pair.source else TextPair(source, f" {pair.target}")


def _text(row: dict[str, Any], column: str) -> str:
    """The text in a column, or that of a list of texts joined."""
    value = row[column]
    if isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value):
        value = " ".join(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"column `{column}` holds no text but {value!r}")
    if MASK_MARKER in value:
        raise ValueError(f"column `{column}` holds {MASK_MARKER!r}, which stands for a mask here")
    return value.strip()


def _questions(row: dict[str, Any], names: Sequence[str] | None) -> list[TextPair]:
    """A row's question, or those in its column `qas`."""
    context, pairs = _text(row, "context"), []
    for item in row.get("qas") or [row]:
        if not isinstance(item, dict) or not {"question", "answer"} <= set(item):
            raise ValueError(f"column `qas` needs items with `question` and `answer`, but holds {str(item)[:80]!r}")
        # SQuAD on the Hub has {"text": [...], "answer_start": [...]}.
        answer = item["answer"]
        answer = answer["text"] if isinstance(answer, dict) and "text" in answer else answer
        answer = answer[0] if isinstance(answer, (list, tuple)) and answer else answer
        pairs.append(question_answering(context, _text(item, "question"), _text({"answer": answer}, "answer")))
    return pairs


class Task(NamedTuple):
    """
    How a task reads a row.

    Attributes:
        columns: The columns it needs.
        build: Row and label names → pairs of texts.
        keep: Which end of a long source stays: its `"head"`, its `"tail"`, or head and `"question"`.
        nested: Those of the columns that may stand in the items of a column `qas` instead.
        masked: Whether its sources may come with masks of their own (`mask_marker`); others put one in themselves.
        story: Whether `max_sentences` applies, to the column `text`.
        has_target: Whether rows have a target; without one the collator masks spans of the source.
        corrupted: Whether a [`RestorationCorruption`] makes the sources.
    """

    columns: tuple[str, ...]
    build: Callable[[dict[str, Any], Sequence[str] | None], list[TextPair]]
    keep: str = "head"
    nested: tuple[str, ...] = ()
    masked: bool = False
    story: bool = False
    has_target: bool = True
    corrupted: bool = False


def _two_columns(source: str, target: str) -> Task:
    return Task((source, target), lambda row, names: [TextPair(_text(row, source), _text(row, target))], masked=True)


def _story(build: Callable[[str], TextPair], **fields: Any) -> Task:
    return Task(("text",), lambda row, names: [build(_text(row, "text"))], story=True, **fields)


TASKS = {
    "pairs": _two_columns("source", "target"),
    "question_answering": Task(
        ("context", "question", "answer"), _questions, keep="question", nested=("question", "answer")
    ),
    "classification": Task(
        ("text", "label"), lambda row, names: [classification(_text(row, "text"), row["label"], names)], masked=True
    ),
    "last_word": _story(last_word, keep="tail"),
    "middle_sentence": _story(middle_sentence),
    "summarization": _two_columns("document", "summary"),
    "span_infilling": _story(lambda text: TextPair(text, ""), has_target=False),
    "restoration": _story(lambda text: TextPair(text, text), corrupted=True),
}


def _names(field: str) -> str:
    """The tasks with this field, for messages."""
    return ", ".join(name for name, task in TASKS.items() if getattr(task, field))


@dataclass(eq=False)
class TaskEncoder:
    """
    Turns batches of rows into `input_ids` and `labels`, for `datasets.map(batched=True)`; works on streams too.

    Args:
        task: A key of `TASKS`.
        tokenizer: A tokenizer with the special tokens YAN needs.
        columns: Names of the task's columns in the data, where they differ.
        label_names: Names of the classes, in the order of their numbers.
        max_source_length: Longer sources are cut, never in the question; a row whose mask is cut off is a bad one,
            with `align` one of its masks.
        max_target_length: Longest target, the end token included.
        skip_bad_rows: Whether unusable rows are left out, and counted in `skipped` (worker processes log their
            counts), instead of raising.
        add_mask: Whether a source without a mask token gets one at its end, where the answer belongs: it lets the
            auto-encoder stage predict answers of tasks such as classification.
        mask_first: Whether that token comes first instead, so that answers stand at the same positions in every row,
            and the auto-encoder stage cannot see their length. `generate` then needs sources that start with it too.
        space_in_target: Whether the space before a mask token goes to the target, see [`space_with_answer`].
            `generate` then needs sources without that space too.
        max_sentences: Only so many sentences of a text, the first ones, in tasks that read stories.
        mask_marker: What stands for the mask token in the sources of tasks that make none themselves, such as
            `"<mask>"`. Without one, and everywhere else, special tokens that a text spells out are text.
        align: Whether examples get `token_lengths`, how many target tokens each source token stands for, which models
            whose flow starts at the source's tokens are trained with (`config.start_state`, `"aligned"` or
            `"fertility"`). A target that is the source with its masks filled is then tokenized piece by piece.
        corruption: Options of the [`RestorationCorruption`] that makes the sources of restoration, always with the
            same errors, for evaluation. For fresh ones in training give the collator this encoder's `corruption`.

    Raises:
        ValueError: for an unknown task or column, options that do not suit the task, and when called, for a row that
            cannot be used, with its number.
    """

    task: str
    tokenizer: PreTrainedTokenizerBase | None
    columns: dict[str, str] | None = None
    label_names: Sequence[str] | None = None
    max_source_length: int | None = None
    max_target_length: int | None = None
    skip_bad_rows: bool = False
    add_mask: bool = False
    space_in_target: bool = False
    mask_first: bool = False
    max_sentences: int | None = None
    mask_marker: str | None = None
    align: bool = False
    corruption: dict[str, Any] | RestorationCorruption | None = None
    skipped: dict[str, int] = field(default_factory=dict, init=False)

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"`task` must be one of {', '.join(TASKS)}, but is {self.task!r}.")
        if self.mask_first and not self.add_mask:
            raise ValueError("`mask_first=True` says where the mask goes that `add_mask=True` adds: give both.")
        if self.max_sentences is not None and (self.max_sentences < 1 or not self._task.story):
            wanted = f"at least 1, in one of the tasks {_names('story')}"
            raise ValueError(f"`max_sentences` must be {wanted}, but is {self.max_sentences} in {self.task}.")
        if self.mask_marker and not self._task.masked:
            raise ValueError(f"`mask_marker` belongs to {_names('masked')}; the task {self.task} makes its own masks.")
        if self.corruption is not None and not self._task.corrupted:
            raise ValueError(f"`corruption` belongs to {_names('corrupted')}, but the task is {self.task}.")
        if self._task.corrupted:
            self.corruption = self._make_corruption()
        own = self._task.columns
        if unknown := (self.columns or {}).keys() - set(own):
            raise ValueError(f"The task {self.task} has no column `{min(unknown)}`, but {', '.join(own)}.")
        self.columns = {**dict(zip(own, own)), **(self.columns or {})}
        # Part of what `datasets` takes a function's fingerprint of: a cached result would not count what it left out.
        # Where nothing is left out, results may be cached.
        self._process, self._run = (os.getpid(), uuid.uuid4().hex) if self.skip_bad_rows else (None, None)

    def _make_corruption(self) -> RestorationCorruption:
        if self.add_mask:
            raise ValueError(f"The task {self.task} takes no `add_mask`: fresh sources would have no mask.")
        if isinstance(self.corruption, RestorationCorruption):
            return self.corruption
        try:
            return RestorationCorruption(**(self.corruption or {}))
        except TypeError as error:
            raise ValueError(f"`corruption` must hold options of RestorationCorruption: {error}.") from error

    @classmethod
    def from_options(cls, options: Any, **changes: Any) -> "TaskEncoder":
        """An encoder by a command's options of the same names; `changes` come first."""
        given = {name: value for name, value in vars(options).items() if name in cls.__dataclass_fields__}
        return cls(**{**given, **changes})

    @property
    def _task(self) -> Task:
        return TASKS[self.task]  # looked up, since workers get a pickled encoder

    @property
    def objective(self) -> str:
        """The objective of the [`YanDataCollator`] that suits the examples."""
        return "pairs" if self._task.has_target else "span_infilling"

    def check_columns(self, available: Sequence[str], where: str = "The data"):
        """Raises `ValueError` where a column is missing."""
        for column, name in self.columns.items():
            if name not in available and not (column in self._task.nested and "qas" in available):
                found = f"{where} has no column `{name}` for the task's `{column}`, but {', '.join(available)}"
                raise ValueError(f"{found}. Name the right one: `columns={{{column!r}: ...}}`.")

    def pairs(self, row: dict[str, Any]) -> list[TextPair]:
        """The texts of a row, which may hold several questions. Raises `ValueError` for a row that is of no use."""
        row = {**row, **{column: row[name] for column, name in self.columns.items() if name in row}}
        if self.max_sentences is not None:
            row["text"] = " ".join(split_sentences(_text(row, "text"))[: self.max_sentences])
        pairs = self._task.build(row, self.label_names)
        if self._task.corrupted:
            pairs = [pair._replace(source=self.corruption(pair.source)) for pair in pairs]
        if self.mask_marker:
            pairs = [pair._replace(source=pair.source.replace(self.mask_marker, MASK_MARKER)) for pair in pairs]
        if self.add_mask and self._task.has_target:
            pairs = [pair if MASK_MARKER in pair.source else self._with_mask(pair) for pair in pairs]
        return [space_with_answer(pair) for pair in pairs] if self.space_in_target else pairs

    def _with_mask(self, pair: TextPair) -> TextPair:
        text = pair.source
        return pair._replace(source=f"{MASK_MARKER} {text}" if self.mask_first else f"{text} {MASK_MARKER}")

    def encode(self, pair: TextPair, context: str = "") -> dict[str, list[int]]:
        """
        Tokens of one pair. Raises `ValueError` for a target that is too long, and where a source's mask is cut off.

        `context` is what a question's source starts with and may lose the end of, or all but its last sentence.
        """
        (ids,) = encode_text(self.tokenizer, [pair.source], MASK_MARKER)
        ids = self._cut(ids, pair.source, context)
        if not self._task.has_target:
            return {"input_ids": ids}
        (labels,) = encode_text(self.tokenizer, [pair.target], add_special_tokens=False)
        labels = [*labels, self.tokenizer.eos_token_id]
        lengths = {}
        if self.align:
            filled = fill_masks(self.tokenizer, ids, pair.source, pair.target)
            labels, token_lengths = filled or (labels, align_tokens(self.tokenizer, ids, labels))
            lengths["token_lengths"] = token_lengths
        limit = self.max_target_length
        if limit is not None and len(labels) > limit:
            found = f"the target has {len(labels)} tokens with its end token"
            raise ValueError(f"{found}, more than `max_target_length={limit}`: {pair.target[:80]!r}")
        return {"input_ids": ids, "labels": labels, **lengths}

    def _cut(self, ids: list[int], source: str, context: str) -> list[int]:
        limit = self.max_source_length
        if limit is None or len(ids) <= limit:
            return ids
        if self._task.keep == "tail":
            kept = ids[-limit:]
        else:
            tail = 1  # the end token
            if self._task.keep == "question":
                # What stands behind the context stays: the context loses its end instead.
                if not (context and source.startswith(context)):
                    context = source.rpartition(f" {ANSWER_HEADER}")[0]
                    context = context[: context.rfind(split_sentences(context)[-1])]
                tail = len(encode_text(self.tokenizer, [source[len(context) :].lstrip()], MASK_MARKER)[0])
            elif self.tokenizer.mask_token_id in ids[-2:]:
                tail = 2
            if tail >= limit:
                raise ValueError(f"the question alone has {tail} tokens, `max_source_length` is {limit}")
            kept = ids[: limit - tail] + ids[-tail:]
        mask = self.tokenizer.mask_token_id
        # Aligned targets have a filling for every mask.
        if mask in ids and (mask not in kept or (self.align and ids.count(mask) != kept.count(mask))):
            found = f"the source has {len(ids)} tokens, `max_source_length` is {limit}"
            raise ValueError(f"{found}, and a mask lies where it is cut")
        return kept

    def __call__(self, batch: dict[str, list[Any]], indices: Sequence[int] | None = None) -> dict[str, list]:
        """
        `input_ids`, and `labels` unless the task is span infilling, of each pair in a batch of columns. `indices` are
        the rows' numbers, for error messages: `datasets.map(with_indices=True)`.
        """
        self.check_columns(list(batch))
        count = len(next(iter(batch.values())))
        examples, left_out = [], 0
        for row in range(count):
            try:
                values = {name: column[row] for name, column in batch.items()}
                context = self.columns.get("context")
                context = _text(values, context) if self._task.keep == "question" and values.get(context) else ""
                examples += [self.encode(pair, context) for pair in self.pairs(values)]
            except ValueError as error:
                if not self.skip_bad_rows:
                    number = f"Row {row} of this batch" if indices is None else f"Row {indices[row]}"
                    remedy = "Mend it, or leave such rows out with `skip_bad_rows=True`."
                    raise ValueError(f"{number}: {error}. {remedy}") from error
                reason = str(error).split(":")[0][:60]
                self.skipped[reason] = self.skipped.get(reason, 0) + 1
                left_out += 1
        if left_out and os.getpid() != self._process:
            # Counts of a worker process, and of one that reads a stream while training, never come back.
            logger.warning(f"{left_out} of {count} rows were left out: {self.skipped} so far in this process.")
        names = ["input_ids", "labels"] if self._task.has_target else ["input_ids"]
        names += ["token_lengths"] if self._task.has_target and self.align else []
        return {name: [example[name] for example in examples] for name in names}


def load_splits(
    files: dict[str, str] | None = None,
    dataset: str | None = None,
    config: str | None = None,
    streaming: bool = False,
    parts: dict[str, str] | None = None,
) -> DatasetDict:
    """
    Splits from local files or from the Hub.

    Args:
        files: Split → `.jsonl`, `.jsonl.gz`, `.json`, `.csv` or `.parquet` file.
        dataset: Name for `datasets.load_dataset`, instead of files.
        config: Its configuration.
        streaming: Whether rows are read as they are needed.
        parts: Split → what it is in the data set: one of its splits, or a slice as in `"train[:-2000]"` where there is
            no validation split; left out where the data set lacks it. By default every split goes by its own name.

    Raises:
        ValueError: for both or neither of files and data set, a slice of a stream, and a file that cannot be used.
        FileNotFoundError: for a file that is not there.
    """
    files = {split: name for split, name in (files or {}).items() if name}
    if bool(files) == bool(dataset):
        raise ValueError("Give local files (`train_file`, ...) or the name of a `dataset`, one of the two.")
    if dataset:
        splits = load_dataset(dataset, config, streaming=streaming)
        return splits if parts is None else _load_parts(splits, parts, dataset, config, streaming)
    found = DatasetDict()
    for split, name in files.items():
        if not Path(name).is_file():
            raise FileNotFoundError(f"There is no file {name}.")
        kind = _BUILDERS.get(str(name).removesuffix(".gz").rpartition(".")[2])
        if kind is None:
            raise ValueError(f"{name} is none of the files that can be read: {', '.join(_BUILDERS)}, or in gzip.")
        try:
            found[split] = load_dataset(kind, data_files={split: str(name)}, split=split, streaming=streaming)
        except (DatasetGenerationError, ValueError, StopIteration) as error:
            # A file without rows is an error there too, in JSON a `StopIteration`.
            reason = str(error.__cause__ or error) or "it is empty"
            raise ValueError(f"{name} cannot be read as {kind}, or holds no rows: {reason}") from error
        if not streaming and len(found[split]) == 0:
            raise ValueError(f"{name} holds no rows.")
    return found


def _load_parts(splits: DatasetDict, parts: dict[str, str], dataset: str, config: str | None, streaming: bool):
    found = DatasetDict()
    for name, part in parts.items():
        split, sliced, _ = part.partition("[")
        if split in splits and sliced and streaming:
            remedy = "Name a whole split, or leave out `streaming`."
            raise ValueError(f"{part!r} of {dataset} is a slice, which a stream cannot give. {remedy}")
        if split in splits:
            found[name] = load_dataset(dataset, config, split=part) if sliced else splits[split]
    return found


def encode_split(rows: Dataset | IterableDataset, encoder: TaskEncoder, where: str = "The data"):
    """
    A split as tokenized examples, at once, so that bad rows show before training, or as a stream; and the number
    of rows left out (0 for a stream, which is not read yet).

    Raises:
        ValueError: for a missing column, a row that cannot be used, and a split of which nothing is left.
    """
    if rows.column_names is not None:
        encoder.check_columns(rows.column_names, where)
    label = encoder.columns.get("label")
    if encoder.label_names is None and rows.features and isinstance(rows.features.get(label), ClassLabel):
        encoder.label_names = rows.features[label].names
    encoder.skipped = {}
    options = {"batched": True, "with_indices": True, "remove_columns": rows.column_names}
    if isinstance(rows, IterableDataset):
        encoder._process = None  # rows are read while training: what is left out is logged then
        return rows.map(encoder, **options), 0
    # A cached result would not have counted what it left out.
    try:
        encoded = rows.map(encoder, load_from_cache_file=False, desc=f"tokenizing {where}", **options)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if len(encoded) == 0:
        raise ValueError(f"{where} has no row that can be used: {len(rows)} rows, left out: {encoder.skipped}.")
    return encoded, sum(encoder.skipped.values())
