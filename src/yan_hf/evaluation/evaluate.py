# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Texts from many sources in batches, and the metrics of a checkpoint on a task's rows."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, product
from statistics import mean, stdev
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from ..data.sources import encode_source
from ..data.tokenization import shown_texts
from .metrics import METRICS, score_texts


# Seeds of one run of sampling are this far apart from those of the next: each row has its own.
SEED_STRIDE = 1_000_003

LENGTH_MODES = ("predicted", "true")


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Iterable[str],
    batch_size: int = 32,
    seed: int = 0,
    mask_marker: str | None = None,
    split_special_tokens: bool = True,
    first: int = 1,
    where: str = "Source",
    with_steps: bool = False,
    numbers: Iterable[int] | None = None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """
    Generates a text for each source, in order; sources are read as they are needed. A text does not depend on the
    batch size: every row draws from a seed of its own.

    Args:
        model: A [`YanForConditionalGeneration`] in eval mode.
        tokenizer: Its tokenizer.
        sources: Source texts.
        batch_size: Sources at once.
        seed: Another one draws other texts.
        mask_marker: What stands for the mask token in a source; nothing by default, see [`encode_text`].
        split_special_tokens: `False` lets special tokens that a source spells out act as such.
        first: The first source's number, which its seed is made of: go on in the middle with another one.
        where: What a source is called in an error, before its number.
        with_steps: Whether a row has `steps` too: for every solver step, pairs of a token's text and its expert.
        numbers: The sources' numbers, where they do not follow one another from `first` on.
        options: Options of `generate`. With `num_return_sequences` over 1, rows are repeated in order.

    Yields:
        `source`, `text`, `length` (tokens, the end token too), `length_mode`, `score` (tokens' mean log-probability).

    Raises:
        ValueError: for a source that is empty or too long, with its number, after the texts for those before it.
    """
    copies = options.get("num_return_sequences") or model.generation_config.num_return_sequences or 1
    marks = {"mask_marker": mask_marker, "split_special_tokens": split_special_tokens}
    longest = model.config.max_position_embeddings
    numbered = enumerate(sources, start=first) if numbers is None else zip(numbers, sources)
    failure = None
    while failure is None:
        numbers, texts, rows = [], [], []
        try:
            for number, text in islice(numbered, batch_size):
                rows.append(encode_source(tokenizer, text, longest, f"{where} {number}", **marks))
                numbers.append(number)
                texts.append(text)
        except ValueError as error:
            failure = error  # raised when what came before it is generated
        if not rows:
            break
        padded = tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(model.device)
        batch = {name: padded[name] for name in ("input_ids", "attention_mask")}
        extra = {"output_drafts": True, "output_expert_indices": True} if with_steps else {}
        seeds = [seed * SEED_STRIDE + number * copies + copy for number in numbers for copy in range(copies)]
        output = model.generate(**batch, seeds=seeds, return_dict_in_generate=True, **extra, **options)
        steps = _steps(tokenizer, output) if with_steps else None
        found = tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
        lengths, scores = output.lengths.tolist(), output.sequence_scores.tolist()
        for index, text in enumerate(found):
            row = {"source": texts[index // copies], "text": text, "length": lengths[index]}
            row |= {"length_mode": output.length_mode, "score": scores[index]}
            yield {**row, "steps": steps[index]} if steps else row
    if failure is not None:
        raise failure


def _steps(tokenizer: PreTrainedTokenizerBase, output: Any) -> list[list[list[tuple]]]:
    """For each row, for each solver step: the draft's tokens as texts, and their experts."""
    experts = output.expert_indices
    experts = experts.tolist() if experts.dim() == 3 else [experts.tolist()] * len(output.drafts)
    kept = output.drafts != tokenizer.pad_token_id
    places = torch.arange(1, kept.shape[-1] + 1, device=kept.device)
    lengths, drafts = (kept * places).amax(dim=-1).tolist(), output.drafts.tolist()  # without padding at the end
    return [
        [
            list(zip(shown_texts(tokenizer, draft[row][: length[row]]), chosen[row]))
            for draft, length, chosen in zip(drafts, lengths, experts)
        ]
        for row in range(len(output.lengths))
    ]


def generate_examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict[str, Any]],
    collator: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
    true_lengths: bool = False,
    seed: int = 0,
    batch_size: int = 64,
    progress: str | None = None,
    **options: Any,
) -> tuple[list[str], list[str], dict[str, Any]]:
    """
    Generates a text for each tokenized example.

    Args:
        model, tokenizer, seed, batch_size, options: As for [`generate_texts`].
        examples: Rows with `input_ids` and whatever else `collator` reads.
        collator: Makes batches with `labels`, such as a [`YanDataCollator`].
        true_lengths: Whether `generate` is told the targets' lengths.
        progress: What the progress bar says; none without it.

    Returns:
        The texts, the targets' texts, and the figures `sources` (texts), `lengths` (tokens of each text with its end),
        `seconds`, `tokens_per_second` and `num_field_evaluations` (passes of the flow for a batch).
    """
    options = {"max_new_tokens": model.config.max_position_embeddings, **options}
    texts, references, sources, lengths, seconds, passes = [], [], [], [], 0.0, None
    starts = range(0, len(examples), batch_size)
    for start in tqdm(starts, desc=progress, leave=False, file=sys.stderr, disable=progress is None or None):
        batch = collator([examples[row] for row in range(start, min(start + batch_size, len(examples)))])
        labels = batch.pop("labels")
        counted = labels != -100
        if true_lengths:
            batch["target_lengths"] = counted.sum(-1)
        batch = {name: value.to(model.device) for name, value in batch.items()}
        seeds = [seed * SEED_STRIDE + start + row for row in range(len(labels))]
        began = time.perf_counter()
        output = model.generate(**batch, seeds=seeds, return_dict_in_generate=True, **options)
        lengths += output.lengths.tolist()  # waits for the device, so that the clock may be read
        seconds += time.perf_counter() - began
        passes = getattr(output, "num_field_evaluations", None)
        texts += tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
        sources += tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        labels = labels.masked_fill(~counted, tokenizer.pad_token_id)
        references += tokenizer.batch_decode(labels, skip_special_tokens=True)
    figures = {"sources": sources, "lengths": lengths, "seconds": seconds, "tokens_per_second": sum(lengths) / seconds}
    return texts, references, {**figures, "num_field_evaluations": passes}


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict[str, Any]],
    collator: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
    steps: Sequence[int] = (3,),
    seeds: int = 3,
    metrics: Sequence[str] = ("exact_match", "f1"),
    batch_size: int = 64,
    length_modes: Sequence[str] = LENGTH_MODES,
    progress: bool = False,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """
    Metrics on tokenized examples, for predicted and true lengths and several numbers of solver steps.

    Args:
        model, tokenizer, examples, collator, batch_size, options: As for [`generate_examples`].
        steps: Numbers of solver steps.
        seeds: Sampling seeds; the metrics are their mean.
        metrics: Keys of `METRICS`.
        length_modes: `"predicted"`, `"true"` or both.
        progress: Whether to show a progress bar.

    Yields:
        For each mode and number of steps: `lengths`, `steps`, and each metric and `tokens_per_second`, with its
        standard deviation over the seeds under `..._spread`.

    Raises:
        ValueError: for an unknown metric or length mode, and without examples.
    """
    for name, accepted, values in (("metrics", METRICS, metrics), ("length_modes", LENGTH_MODES, length_modes)):
        if wrong := [value for value in values if value not in accepted]:
            raise ValueError(f"`{name}` may contain {', '.join(accepted)}, but contains {wrong[0]!r}.")
    if len(examples) == 0:
        raise ValueError("There is no example to evaluate on.")
    given = (model, tokenizer, examples, collator)
    for mode, count in product(length_modes, steps):
        chosen = {"true_lengths": mode == "true", "batch_size": batch_size, "num_inference_steps": count}
        runs = []
        for seed in range(seeds):
            label = f"{mode} lengths, {count} steps, seed {seed}" if progress else None
            texts, references, speed = generate_examples(*given, seed=seed, progress=label, **chosen, **options)
            figures = score_texts(texts, references, metrics, speed["sources"])
            runs.append({"tokens_per_second": speed["tokens_per_second"], **figures})
        row: dict[str, Any] = {"lengths": mode, "steps": count}
        for name in runs[0]:
            values = [run[name] for run in runs]
            row[name] = mean(values)
            row[f"{name}_spread"] = stdev(values) if len(values) > 1 else 0.0
        yield row
