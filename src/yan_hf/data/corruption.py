# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Text without case and punctuation, with typing errors: the sources of the task `restoration`."""

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


# As CommonMark has it: as many backquotes at the end as at the start.
_CODE = re.compile(r"((?<!`)(`+)(?!`).*?(?<!`)\2(?!`))", re.DOTALL)

# Marks that always go; those that stay between two letters or digits, and `.` and `-` that start a number too.
_MARKS = re.compile(
    r"""[;!?…"“”„‟«»‹›()\[\]{}—―]
    | (?<![^\W_])['‘’,:] | (?<![^\W_])[.‐‑-](?!\d) | ['‘’,:.‐‑-](?![^\W_])
    | (?<!\d)– | –(?!\d)""",
    re.VERBOSE,
)
# A word, with the marks that stay inside it.
WORD = re.compile(r"[^\W_]+(?:(?:['‘’,:.‐‑-]|(?<=\d)–(?=\d))[^\W_]+)*")
_CORE = re.compile(r"[^\W_](?:.*[^\W_])?", re.DOTALL)  # a word without what stands around it

_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
# A key's neighbours in its row, and the two keys above and below, which are shifted to the right row by row.
_NEIGHBOURS = {
    key: "".join(
        _KEYS[row][column]
        for row, column in ((r, c - 1), (r, c + 1), (r - 1, c), (r - 1, c + 1), (r + 1, c - 1), (r + 1, c))
        if 0 <= row < len(_KEYS) and 0 <= column < len(_KEYS[row])
    )
    for r, keys in enumerate(_KEYS)
    for c, key in enumerate(keys)
}


def _insertion(word: str, letters: list[int], place: float, pick: float) -> str:
    """A letter twice, or a key beside it as well."""
    i = letters[int(place * len(letters))]
    keys = word[i] + _NEIGHBOURS.get(word[i].lower(), "")
    return word[: i + 1] + keys[int(pick * len(keys))] + word[i + 1 :]


def _deletion(word: str, letters: list[int], place: float, pick: float) -> str:
    i = letters[int(place * len(letters))]
    return word[:i] + word[i + 1 :] if len(letters) > 1 else word


def _swap(word: str, letters: list[int], place: float, pick: float) -> str:
    pairs = [i for i in letters if word[i + 1 : i + 2].isalpha() and word[i] != word[i + 1]]
    if not pairs:
        return word
    i = pairs[int(place * len(pairs))]
    return word[:i] + word[i + 1] + word[i] + word[i + 2 :]


def _neighbour(word: str, letters: list[int], place: float, pick: float) -> str:
    letters = [i for i in letters if word[i].lower() in _NEIGHBOURS]
    if not letters:
        return word
    i = letters[int(place * len(letters))]
    keys = _NEIGHBOURS[word[i].lower()]
    key = keys[int(pick * len(keys))]
    return word[:i] + (key.upper() if word[i].isupper() else key) + word[i + 1 :]


def _doubling(word: str, letters: list[int], place: float, pick: float) -> str:
    return f"{word} {word}"


# Name → function of a word, the places of its letters, and two draws in [0, 1). The word itself: it cannot be done.
_ERRORS: dict[str, Callable[[str, list[int], float, float], str]] = {
    "insertion": _insertion,
    "deletion": _deletion,
    "swap": _swap,
    "neighbour": _neighbour,
    "doubling": _doubling,
}


def quote_words(text: str, first: int, count: int = 1) -> str:
    """The text with `count` of its words, from the one numbered `first` on, in backquotes, as code is written."""
    words = list(WORD.finditer(text))[first : first + count]
    if not words:
        return text
    start, end = words[0].start(), words[-1].end()
    return f"{text[:start]}`{text[start:end]}`{text[end:]}"


@dataclass
class RestorationCorruption:
    """
    Turns clean text into text as it is typed in haste: `"He's 3.5 m tall, she said."` → `"he's 3.5 m atll she said"`.

    Code in `backquotes` stays as it is, and words with digits get no typing error.

    Args:
        error_rate: Share of the other words that get a typing error, one each.
        errors: Kinds of errors, drawn evenly: `"insertion"` (of the letter again or a key beside it), `"deletion"`,
            `"swap"` (of two letters side by side), `"neighbour"` (a key beside the right one, on a QWERTY keyboard)
            and `"doubling"` (of the word). A word that is too short for one gets another.
        strip_case: Whether everything becomes lower case.
        strip_punctuation: Whether `. , ; : ! ? …`, quotes, brackets and dashes go; where that would join two words, a
            space stays, and runs of white space become one space. Apostrophes, hyphens, full stops, commas and colons
            between two letters or digits stay (don't, well-known, 3.5, example.com), and so do an en dash between
            digits and a point or minus sign that starts a number. A text of nothing else stays as it is.
        clean_rate: Share of the texts that stay as they are, to learn from them that good text needs no change.

    Raises:
        ValueError: for a rate outside [0, 1], an unknown kind of error or none, and a switch that is no bool.
    """

    error_rate: float = 0.1
    errors: Sequence[str] = tuple(_ERRORS)
    strip_case: bool = True
    strip_punctuation: bool = True
    clean_rate: float = 0.0

    def __post_init__(self):
        for name in ("error_rate", "clean_rate"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"`{name}` must be a number in [0, 1], but is {value!r}.")
        for name in ("strip_case", "strip_punctuation"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be true or false, but is {getattr(self, name)!r}.")
        if isinstance(self.errors, str) or not self.errors or not set(self.errors) <= set(_ERRORS):
            remedy = "For no errors set `error_rate=0`."
            raise ValueError(f"`errors` must be some of {', '.join(_ERRORS)}, but is {self.errors!r}. {remedy}")

    def __call__(self, text: str, seed: int = 0, epoch: int = 0) -> str:
        """The corrupted text, a function of the text, the seed and the epoch alone (both at least 0)."""
        rng = np.random.default_rng([seed, epoch, zlib.crc32(text.encode(errors="surrogatepass"))])
        if rng.random() < self.clean_rate:
            return text
        # Text, code, its backquotes, text, ...
        parts = _CODE.split(text) if "`" in text else [text]
        parts[::3] = [self._strip(part) for part in parts[::3]]
        if self.error_rate > 0:
            parts[::3] = [self._with_errors(part, rng) for part in parts[::3]]
        del parts[2::3]
        corrupted = "".join(parts)
        if self.strip_punctuation:
            corrupted = corrupted.strip()
        return corrupted or text

    def _strip(self, text: str) -> str:
        if self.strip_case:
            text = text.lower()
        return re.sub(r"\s+", " ", _MARKS.sub(" ", text)) if self.strip_punctuation else text

    def _with_errors(self, text: str, rng: np.random.Generator) -> str:
        pieces = re.split(r"(\s+)", text)  # words and, between them, white space
        chosen = np.flatnonzero(rng.random(len(pieces) // 2 + 1) < self.error_rate).tolist()
        for index, draws in zip(chosen, rng.random((len(chosen), 3)).tolist()):
            word = pieces[2 * index]
            core = _CORE.search(word)
            if core is not None and not any(map(str.isnumeric, word)):
                pieces[2 * index] = word[: core.start()] + self._mistype(core.group(), *draws) + word[core.end() :]
        return "".join(pieces)

    def _mistype(self, word: str, kind: float, place: float, pick: float) -> str:
        letters = [i for i, character in enumerate(word) if character.isalpha()]
        first = int(kind * len(self.errors))
        for name in (*self.errors[first:], *self.errors[:first]) if letters else ():
            if (mistyped := _ERRORS[name](word, letters, place, pick)) != word:
                return mistyped
        return word
