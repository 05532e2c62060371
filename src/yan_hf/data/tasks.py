# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Tasks: how the columns of a data set become source and target texts, and how these become token ids."""

import os
import re
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .tokenization import MASK_MARKER, encode_text


ANSWER_HEADER = "Answer:"

# The last run of letters; an apostrophe or hyphen inside a word belongs to it.
_LAST_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*(?=[\W\d_]*$)")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)]*\s+")


class TextPair(NamedTuple):
    """A source text and the target text to generate from it."""

    source: str
    target: str


def split_sentences(text: str) -> list[str]:
    """Splits at white space after a full stop, exclamation or question mark (and closing quotes)."""
    sentences, start = [], 0
    for match in _SENTENCE_END.finditer(text):
        sentences.append(text[start : match.end()].strip())
        start = match.end()
    return [sentence for sentence in [*sentences, text[start:].strip()] if sentence]


def middle_sentence(sentences: Sequence[str], mask_token: str, index: int = 2) -> TextPair:
    """
    Story infilling: one sentence, the third by default, replaced by a single mask token → the whole story.

    Raises:
        ValueError: where the story has no such sentence.
    """
    if not 0 <= index < len(sentences):
        raise ValueError(f"Sentence {index} cannot be masked: the story has {len(sentences)} sentences.")
    masked = [*sentences[:index], mask_token, *sentences[index + 1 :]]
    return TextPair(" ".join(masked), " ".join(sentences))


def last_word(text: str, mask_token: str) -> TextPair:
    """
    Word prediction: the last alphabetic word replaced by the mask token, the punctuation after it kept → that word.

    Raises:
        ValueError: for a text without a word, or with a mask token of its own.
    """
    if mask_token in text:
        raise ValueError(f"The text holds {mask_token!r} already: {text!r}.")
    match = _LAST_WORD.search(text)
    if match is None:
        raise ValueError(f"There is no alphabetic word to mask in {text!r}.")
    return TextPair(text[: match.start()] + mask_token + text[match.end() :], match.group())


def question_answering(
    context: str, question: str, answer: str, mask_token: str, whole_text: bool = False
) -> TextPair:
    """
    Reading comprehension: context, question, answer header and mask → the answer, or the whole text with it.

    Args:
        context: The passage.
        question: The question about it.
        answer: The answer.
        mask_token: The tokenizer's mask token.
        whole_text: Whether the target repeats the source with the answer in the mask's place, as in the paper's
            infilling set-up, instead of being the answer alone.
    """
    prompt = f"{context} {question} {ANSWER_HEADER} "
    return TextPair(prompt + mask_token, prompt + answer if whole_text else answer)


def space_with_answer(pair: TextPair, mask_token: str) -> TextPair:
    """
    Moves the space before the mask to the target: `"on the <mask>."`, `"mat"` → `"on the<mask>."`, `" mat"`.

    In subword vocabularies the space before a word is part of the word's token. Without it a target such as "mat" is
    other tokens, and more of them, than the same word anywhere else. Sources without a space before the mask stay.
    """
    spaced = f" {mask_token}"
    if spaced not in pair.source:
        return pair
    return TextPair(pair.source.replace(spaced, mask_token), f" {pair.target}")


def summarization(document: str, summary: str) -> TextPair:
    """Document → summary."""
    return TextPair(document, summary)


def classification(text: str, label: int, label_names: Sequence[str]) -> TextPair:
    """
    Classification as generation: document → label text, as in "1 positive".

    Raises:
        ValueError: for a label without a name.
    """
    if not 0 <= label < len(label_names):
        raise ValueError(
            f"`label` must be in 0 to {len(label_names) - 1}, one of {list(label_names)}, but is {label}."
        )
    return TextPair(text, f"{label} {label_names[label]}")


logger = logging.get_logger(__name__)

# Ending of a file's name → the builder of `datasets` that reads it.
_BUILDERS = {"jsonl": "json", "ndjson": "json", "json": "json", "csv": "csv", "parquet": "parquet"}


class Task(NamedTuple):
    """
    How a task reads a row.

    Attributes:
        columns: The columns it needs.
        build: Row, mask token and label names → pairs of texts.
        keep: Which end of a long source stays: its `"head"`, its `"tail"`, or head and `"question"`.
        story: Whether `max_sentences` applies, to the column `text`.
        masked: Whether its sources may come with masks of their own (`mask_marker`); others put one in themselves.
    """

    columns: tuple[str, ...]
    build: Callable[[dict[str, Any], str, Sequence[str] | None], list[TextPair]]
    keep: str = "head"
    story: bool = False
    masked: bool = False


def _text(value: Any, column: str) -> str:
    value = " ".join(value) if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value) else value
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"column `{column}` holds no text but {value!r}")
    if MASK_MARKER in value:
        raise ValueError(f"column `{column}` holds {MASK_MARKER!r}, which stands for a mask here")
    return value.strip()


def _answer(value: Any) -> str:
    # SQuAD on the Hub has {"text": [...], "answer_start": [...]}.
    value = value["text"] if isinstance(value, dict) and "text" in value else value
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return _text(value, "answer")


def _question_answering(row: dict[str, Any], mask: str, names: Sequence[str] | None) -> list[TextPair]:
    context = _text(row["context"], "context")
    questions = row.get("qas") or [row]
    for item in questions:
        if not isinstance(item, dict) or not {"question", "answer"} <= set(item):
            raise ValueError(f"column `qas` needs items with `question` and `answer`, but holds {str(item)[:80]!r}")
    return [
        question_answering(context, _text(item["question"], "question"), _answer(item["answer"]), mask)
        for item in questions
    ]


def _classification(row: dict[str, Any], mask: str, names: Sequence[str] | None) -> list[TextPair]:
    text, label = _text(row["text"], "text"), row["label"]
    if names is None:
        raise ValueError("classification needs `label_names`, or a column of the type `ClassLabel`")
    if isinstance(label, str):
        if label not in names:
            raise ValueError(f"column `label` holds {label!r}, which is none of {list(names)}")
        label = list(names).index(label)
    if isinstance(label, bool) or not isinstance(label, int):
        raise ValueError(f"column `label` holds neither a number nor a name but {label!r}")
    return [classification(text, label, names)]


def _last_word(row: dict[str, Any], mask: str, names: Sequence[str] | None) -> list[TextPair]:
    return [last_word(_text(row["text"], "text"), mask)]


def _middle_sentence(row: dict[str, Any], mask: str, names: Sequence[str] | None) -> list[TextPair]:
    return [middle_sentence(split_sentences(_text(row["text"], "text")), mask)]


def _summarization(row: dict[str, Any], mask: str, names: Sequence[str] | None) -> list[TextPair]:
    return [summarization(_text(row["document"], "document"), _text(row["summary"], "summary"))]


def _pairs(row: dict[str, Any], mask: str, names: Sequence[str] | None) -> list[TextPair]:
    return [TextPair(_text(row["source"], "source"), _text(row["target"], "target"))]


def _plain_text(row: dict[str, Any], mask: str, names: Sequence[str] | None) -> list[TextPair]:
    return [TextPair(_text(row["text"], "text"), "")]


TASKS = {
    "pairs": Task(("source", "target"), _pairs, masked=True),
    "question_answering": Task(("context", "question", "answer"), _question_answering, keep="question"),
    "classification": Task(("text", "label"), _classification, masked=True),
    "last_word": Task(("text",), _last_word, keep="tail", story=True),
    "middle_sentence": Task(("text",), _middle_sentence, story=True),
    "summarization": Task(("document", "summary"), _summarization, masked=True),
    # The collator masks spans: the text alone is tokenized.
    "span_infilling": Task(("text",), _plain_text, story=True),
}


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
        parts: What each split is in the data set: the name of one of its splits, or a slice as in `"train[:-2000]"`,
            for data sets that publish no validation split. A part that the data set does not have is left out. By
            default every split goes under its own name; files have no parts.

    Raises:
        ValueError: for both or neither of files and data set, a slice of a stream, and a file of another kind, of
            broken rows or of none.
        FileNotFoundError: for a file that is not there.
    """
    files = {split: name for split, name in (files or {}).items() if name}
    if bool(files) == bool(dataset):
        raise ValueError("Give local files (`train_file`, ...) or the name of a `dataset`, one of the two.")
    if dataset:
        splits = load_dataset(dataset, config, streaming=streaming)
        if parts is None:
            return splits
        found = DatasetDict()
        for name, part in parts.items():
            split, sliced, _ = part.partition("[")
            if split not in splits:
                continue
            if sliced and streaming:
                raise ValueError(
                    f"The part {part!r} of {dataset} is a slice, which a stream cannot give. Name a whole split, or "
                    "leave out `streaming`."
                )
            found[name] = load_dataset(dataset, config, split=part) if sliced else splits[split]
        return found
    found = DatasetDict()
    for split, name in files.items():
        if not Path(name).is_file():
            raise FileNotFoundError(f"There is no file {name}.")
        kind = _BUILDERS.get(str(name).removesuffix(".gz").rpartition(".")[2])
        if kind is None:
            raise ValueError(
                f"{name} is none of the files that can be read: {', '.join(_BUILDERS)}, or these in gzip."
            )
        try:
            found[split] = load_dataset(kind, data_files={split: str(name)}, split=split, streaming=streaming)
        except (DatasetGenerationError, ValueError, StopIteration) as error:
            # A file without rows is an error there too, in JSON a `StopIteration`.
            reason = str(error.__cause__ or error) or "it is empty"
            raise ValueError(f"{name} cannot be read as {kind}, or holds no rows: {reason}") from error
        if not streaming and len(found[split]) == 0:
            raise ValueError(f"{name} holds no rows.")
    return found


class TaskEncoder:
    """
    Turns batches of rows into `input_ids` and `labels`, for `datasets.map(batched=True)`; works on streams too.

    Args:
        task: A key of `TASKS`.
        tokenizer: A tokenizer with the special tokens YAN needs.
        columns: Names of the task's columns in the data, where they differ.
        label_names: Names of the classes, in the order of their numbers.
        max_source_length: Longer sources are cut, never in the question; where the mask would be cut off, the row is a
            bad one.
        max_target_length: Longest target, the end token included.
        skip_bad_rows: Whether rows that are empty, unusable or too long are left out, and counted in `skipped`,
            instead of raising. Worker processes (`num_proc`) log their counts.
        add_mask: Whether a source without a mask token gets one at its end, where the answer belongs: it lets the
            auto-encoder stage read off answers of tasks such as classification.
        mask_first: Whether that token comes first instead. Answers then stand at the same positions in every row, and
            the auto-encoder stage cannot see how long they are. Give `generate` sources that start with the mask then.
        space_in_target: Whether the space before a mask token goes to the target ([`space_with_answer`]), so that an
            answer is the same tokens there as in the text. Give `generate` sources without that space then.
        max_sentences: Only so many sentences of a text, the first ones, in the tasks last_word, middle_sentence and
            span_infilling.
        mask_marker: What stands for the mask token in the sources of pairs, classification and summarization, such as
            `"<mask>"`. Without one, and everywhere else, special tokens that a text spells out are text.

    Raises:
        ValueError: for an unknown task or column, and when called, for a row that cannot be used, with its number.
    """

    def __init__(
        self,
        task: str,
        tokenizer: PreTrainedTokenizerBase,
        columns: dict[str, str] | None = None,
        label_names: Sequence[str] | None = None,
        max_source_length: int | None = None,
        max_target_length: int | None = None,
        skip_bad_rows: bool = False,
        add_mask: bool = False,
        space_in_target: bool = False,
        mask_first: bool = False,
        max_sentences: int | None = None,
        mask_marker: str | None = None,
    ):
        if task not in TASKS:
            raise ValueError(f"`task` must be one of {', '.join(TASKS)}, but is {task!r}.")
        if mask_first and not add_mask:
            raise ValueError("`mask_first=True` says where the mask goes that `add_mask=True` adds: give both.")
        if max_sentences is not None and (max_sentences < 1 or not TASKS[task].story):
            stories = ", ".join(name for name, entry in TASKS.items() if entry.story)
            raise ValueError(
                f"`max_sentences` must be at least 1, in one of the tasks {stories}, but is {max_sentences} in {task}."
            )
        if mask_marker and not TASKS[task].masked:
            masked = ", ".join(name for name, entry in TASKS.items() if entry.masked)
            raise ValueError(
                f"`mask_marker` belongs to the tasks {masked}, but the task is {task}, which makes its own masks."
            )
        self.task, self.name, self.tokenizer = TASKS[task], task, tokenizer
        self.columns = {column: column for column in self.task.columns}
        for column, name in (columns or {}).items():
            if column not in self.columns:
                raise ValueError(f"The task {task} has no column `{column}`, but {', '.join(self.columns)}.")
            self.columns[column] = name
        self.label_names = list(label_names) if label_names else None
        self.max_source_length, self.max_target_length = max_source_length, max_target_length
        self.skip_bad_rows, self.space_in_target = skip_bad_rows, space_in_target
        self.add_mask, self.mask_first, self.max_sentences = add_mask, mask_first, max_sentences
        self.mask_marker = mask_marker
        self.skipped: dict[str, int] = {}
        # Part of what `datasets` takes a function's fingerprint of: a cached result would not count what it left out.
        # Where nothing is left out, results may be cached.
        self._process, self._run = (os.getpid(), uuid.uuid4().hex) if skip_bad_rows else (None, None)

    def check_columns(self, available: Sequence[str], where: str = "The data"):
        """Raises `ValueError` where a column is missing."""
        for column, name in self.columns.items():
            nested = self.name == "question_answering" and column in ("question", "answer") and "qas" in available
            if name not in available and not nested:
                raise ValueError(
                    f"{where} has no column `{name}` for the task's `{column}`, but {', '.join(available)}. Name the "
                    f"right one: `columns={{{column!r}: ...}}`."
                )

    def pairs(self, row: dict[str, Any]) -> list[TextPair]:
        """
        The texts of a row, which may hold several questions, with `MASK_MARKER` of [`tokenization`] for masks. Raises
        `ValueError` for a row that is of no use.
        """
        row = {**row, **{column: row[name] for column, name in self.columns.items() if name in row}}
        if self.max_sentences is not None:
            row["text"] = " ".join(split_sentences(_text(row["text"], "text"))[: self.max_sentences])
        mask = MASK_MARKER
        pairs = self.task.build(row, mask, self.label_names)
        if self.mask_marker:
            pairs = [pair._replace(source=pair.source.replace(self.mask_marker, mask)) for pair in pairs]
        if self.add_mask and self.name != "span_infilling":
            place = f"{mask} {{}}".format if self.mask_first else f"{{}} {mask}".format
            pairs = [pair if mask in pair.source else TextPair(place(pair.source), pair.target) for pair in pairs]
        return [space_with_answer(pair, mask) for pair in pairs] if self.space_in_target else pairs

    def encode(self, pair: TextPair, context: str = "") -> dict[str, list[int]]:
        """
        Tokens of one pair. Raises `ValueError` for a target that is too long, and where a source's mask is cut off.

        Args:
            pair: Source and target.
            context: What the source starts with and may lose the end of; for question answering, where it is all but
                the last sentence by default.
        """
        (ids,) = encode_text(self.tokenizer, [pair.source], MASK_MARKER)
        ids = self._cut(ids, pair.source, context)
        if self.name == "span_infilling":
            return {"input_ids": ids}
        (labels,) = encode_text(self.tokenizer, [pair.target], add_special_tokens=False)
        labels = [*labels, self.tokenizer.eos_token_id]
        limit = self.max_target_length
        if limit is not None and len(labels) > limit:
            raise ValueError(
                f"the target has {len(labels)} tokens with its end token, more than `max_target_length={limit}`: "
                f"{pair.target[:80]!r}"
            )
        return {"input_ids": ids, "labels": labels}

    def _cut(self, ids: list[int], source: str, context: str) -> list[int]:
        limit = self.max_source_length
        if limit is None or len(ids) <= limit:
            return ids
        if self.task.keep == "tail":
            kept = ids[-limit:]
        else:
            tail = 1  # the end token
            if self.task.keep == "question":
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
        if mask in ids and mask not in kept:
            raise ValueError(
                f"the source has {len(ids)} tokens, `max_source_length` is {limit}, and its mask lies where it is cut"
            )
        return kept

    def __call__(self, batch: dict[str, list[Any]], indices: Sequence[int] | None = None) -> dict[str, list]:
        """
        Args:
            batch: Columns of rows.
            indices: Their numbers, for error messages: `datasets.map(with_indices=True)`.

        Returns:
            `input_ids`, and `labels` unless the task is span infilling: lists of token ids, one for each pair.
        """
        self.check_columns(list(batch))
        count = len(next(iter(batch.values())))
        examples, left_out = [], 0
        for row in range(count):
            try:
                values = {name: column[row] for name, column in batch.items()}
                context = values.get(self.columns["context"]) if self.task.keep == "question" else None
                context = _text(context, "context") if context else ""
                examples += [self.encode(pair, context) for pair in self.pairs(values)]
            except ValueError as error:
                if not self.skip_bad_rows:
                    number = f"Row {indices[row]}" if indices is not None else f"Row {row} of this batch"
                    raise ValueError(
                        f"{number}: {error}. Mend it, or leave such rows out with `skip_bad_rows=True`."
                    ) from error
                reason = str(error).split(":")[0][:60]
                self.skipped[reason] = self.skipped.get(reason, 0) + 1
                left_out += 1
        if left_out and os.getpid() != self._process:
            # Counts of a worker process, and of one that reads a stream while training, never come back.
            logger.warning(f"{left_out} of {count} rows were left out: {self.skipped} so far in this process.")
        names = ("input_ids",) if self.name == "span_infilling" else ("input_ids", "labels")
        return {name: [example[name] for example in examples] for name in names}


def encode_split(rows: Dataset | IterableDataset, encoder: TaskEncoder, where: str = "The data"):
    """
    A split as tokenized examples: at once, so that bad rows show before training starts, or as a stream.

    Returns:
        The examples, and the number of rows left out (0 for a stream, which is not read yet).

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
    encoded = rows.map(encoder, load_from_cache_file=False, desc=f"tokenizing {where}", **options)
    if len(encoded) == 0:
        raise ValueError(f"{where} has no row that can be used: {len(rows)} rows, left out: {encoder.skipped}.")
    return encoded, sum(encoder.skipped.values())


__all__ = [
    "ANSWER_HEADER",
    "TASKS",
    "Task",
    "TaskEncoder",
    "TextPair",
    "classification",
    "encode_split",
    "last_word",
    "load_splits",
    "middle_sentence",
    "question_answering",
    "space_with_answer",
    "split_sentences",
    "summarization",
]
