# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Source and target text of each task that YAN is trained on: small pure functions."""

import re
from collections.abc import Sequence
from typing import NamedTuple


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


__all__ = [
    "ANSWER_HEADER",
    "TextPair",
    "classification",
    "last_word",
    "middle_sentence",
    "question_answering",
    "space_with_answer",
    "split_sentences",
    "summarization",
]
