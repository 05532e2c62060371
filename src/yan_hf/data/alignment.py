# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""How many target tokens each source token stands for, for models whose flow starts at the source's tokens."""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..lengths import match_masks
from .tokenization import CASE_MARK, MASK_MARKER, encode_text, token_texts


_MARKS = re.compile(r"\W+")


def fillings_of(
    source: Sequence[Any], target: Sequence[Any], mask: Any, eos_token_id: int | None = None
) -> list[Any] | None:
    """
    What of the target, tokens or a text, stands for each mask of the source; `None` where the target is not the source
    with its masks filled, as [`match_masks`] finds.
    """
    lengths = match_masks(source, target, mask, eos_token_id)
    if lengths is None:
        return None
    fillings, start = [], 0
    for token, length in zip(source, lengths):
        if token == mask:
            fillings.append(target[start : start + length])
        start += length
    return fillings


def fill_masks(
    tokenizer: PreTrainedTokenizerBase, source_ids: Sequence[int], source: str, target: str
) -> tuple[list[int], list[int]] | None:
    """
    Labels that are the tokens of the source with each mask replaced by those of its filling, and how many of them each
    source token stands for; `None` where `target` is not the `source` with each `MASK_MARKER` filled. The known pieces
    are tokenized as in the source, which the whole target might not be.

    Args:
        tokenizer: The tokenizer of `source_ids`.
        source_ids: Tokens of the source; where it was cut, its end or beginning is left out of the labels too.
        source, target: The texts.
    """
    fillings = fillings_of(source, target, MASK_MARKER)
    if fillings is None or len(fillings) != list(source_ids).count(tokenizer.mask_token_id):
        return None  # it is no filled source, or a mask was cut away
    labels, lengths, filled = [], [], iter(encode_text(tokenizer, fillings, add_special_tokens=False))
    for token in source_ids:
        tokens = next(filled) if token == tokenizer.mask_token_id else [token]
        labels += tokens
        lengths.append(len(tokens))
    if labels[-1:] != [tokenizer.eos_token_id]:
        labels.append(tokenizer.eos_token_id)
    return labels, lengths


def align_tokens(tokenizer: PreTrainedTokenizerBase, source_ids: Sequence[int], labels: Sequence[int]) -> list[int]:
    """
    How many target tokens each source token stands for, whatever the two texts are: their sum is the number of labels.

    Words that are alike but for case and punctuation are matched, the first one where it is doubled; what is between
    them belongs together, and what has no counterpart to the word before it. Within a match tokens that are the same
    stand for each other, what is new belongs to the one before it (at the start to the first), and others are shared
    out evenly, in order.
    """
    source_words, target_words = _words(tokenizer, source_ids), _words(tokenizer, labels)
    keys = [[key for key, _ in words] for words in (source_words, target_words)]
    lengths, before, waiting = [0] * len(source_ids), None, 0
    for start, end, first, last in _matched_parts(*keys):
        places = [place for _, places in source_words[start:end] for place in places]
        targets = [labels[place] for _, places in target_words[first:last] for place in places]
        if places:
            for place, count in zip(places, match_tokens([source_ids[place] for place in places], targets)):
                lengths[place] = count
            lengths[places[0]], waiting, before = lengths[places[0]] + waiting, 0, places[-1]
        elif before is None:
            waiting += len(targets)  # for the first source token
        else:
            lengths[before] += len(targets)
    return lengths


def _matched_parts(source: Sequence[Any], target: Sequence[Any]) -> list[tuple[int, int, int, int]]:
    """
    Parts of two sequences that belong together, in order: where each starts and ends in the source and in the target.
    Of what the source has twice in a row and the target once the first copy is matched: either would do, and a model
    that predicts lengths must know which.
    """
    blocks = SequenceMatcher(None, source, target, autojunk=False).get_matching_blocks()
    pairs = [(block.a + i, block.b + i) for block in blocks for i in range(block.size)]
    parts, start, first = [], 0, 0
    for place, other in [*pairs, (len(source), len(target))]:
        while place - start > other - first and source[place - 1 : place] == source[place : place + 1]:
            place -= 1
        if place - start == other - first:
            parts += [(start + i, start + i + 1, first + i, first + i + 1) for i in range(place - start)]
        else:
            parts.append((start, place, first, other))
        parts.append((place, place + 1, other, other + 1))
        start, first = place + 1, other + 1
    return parts[:-1]


def match_tokens(source: Sequence[int], target: Sequence[int]) -> list[int]:
    """How many of the target's tokens each of the source's, at least one, stands for."""
    lengths = [0] * len(source)
    for _, start, end, first, last in SequenceMatcher(None, source, target, autojunk=False).get_opcodes():
        count, size = last - first, end - start
        if not size:
            lengths[max(0, start - 1)] += count
        for index in range(size):
            # Rounded up, so that the first ones stand for more.
            lengths[start + index] += -(-count * (index + 1) // size) - -(-count * index // size)
    return lengths


def _words(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
    """The words of a text, without case and marks, and the places of each one's tokens; special tokens are words."""
    special = set(tokenizer.all_special_ids)
    words: list[tuple[str, list[int]]] = []
    before = ""
    for place, (token, piece) in enumerate(zip(ids, token_texts(tokenizer, ids))):
        is_new = piece == CASE_MARK or (piece[:1].isspace() and before != CASE_MARK)
        if token in special or not words or is_new or words[-1][0] in special:
            words.append((token if token in special else "", []))
        before = piece
        key, places = words[-1]
        words[-1] = (key if token in special else key + piece, [*places, place])
    return [(key if isinstance(key, int) else _MARKS.sub("", key).casefold(), places) for key, places in words]
