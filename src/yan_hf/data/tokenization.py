# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Tokenizers: sentencepiece training, and what YAN needs of an existing tokenizer."""

import io
import string
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging


logger = logging.get_logger(__name__)

# In the order of their ids.
_PIECES = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
SPECIAL_TOKENS = {f"{name}_token": piece for name, piece in _PIECES.items()}

# Stands for the first masked span in what T5 was trained on.
_SENTINEL = "<extra_id_0>"

# What stands for a mask in texts made by the package, until they are encoded: a code point that Unicode sets aside for
# internal use, so that a text which spells out a mask token has none.
MASK_MARKER = "\ufdd0"

# With `factor_case`, what stands before a small letter that is a capital one in the text, and before its space.
CASE_MARK = "\ufdd1"
_CAPITALS = string.ascii_uppercase
_CASES = {f" {letter}": f"{CASE_MARK} {letter.lower()}" for letter in _CAPITALS}
_CASES |= {letter: f"{CASE_MARK}{letter.lower()}" for letter in _CAPITALS}
# sentencepiece writes a space as this; here the space is left as it is, so that the character stays free for text.
_SPIECE_SPACE = "▁"


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 8_000,
    model_type: str = "unigram",
    model_max_length: int | None = None,
    factor_case: bool = False,
    **trainer_options: Any,
) -> PreTrainedTokenizerFast:
    """
    Trains a sentencepiece tokenizer with byte fallback, and `<pad> <s> </s> <unk> <mask>` as ids 0 to 4.

    Encoding appends the end token. Any Unicode text decodes to itself, white space included. Called directly, the
    tokenizer takes a special token that a text spells out for that token; [`encode_text`] keeps it text.

    Args:
        texts: Lines of text to train on.
        vocab_size: Tokens in all, special tokens and 256 bytes too; fewer come out of a text with too few pieces.
        model_type: `"unigram"` or `"bpe"`.
        model_max_length: Longest sequence that the tokenizer does not warn about.
        factor_case: Whether a capital letter of A to Z is a mark and the small letter, so that a word is the same
            tokens in either case, behind a mark or not. Of a text that holds the mark itself, U+FDD1, which Unicode
            sets aside, it is lost.
        trainer_options: More options of `sentencepiece.SentencePieceTrainer.train`.

    Returns:
        A tokenizer that `save_pretrained` writes and `AutoTokenizer.from_pretrained` reads.

    Raises:
        ValueError: for another model type, an empty corpus, or a vocabulary too small for the text's characters.
    """
    import sentencepiece

    if model_type not in ("unigram", "bpe"):
        raise ValueError(f'`model_type` must be "unigram" or "bpe", but is {model_type!r}.')
    if vocab_size <= (least := len(SPECIAL_TOKENS) + 256):
        raise ValueError(f"`vocab_size` must be over {least}, the special tokens and the bytes, but is {vocab_size}.")
    buffer = io.BytesIO()
    options = {"hard_vocab_limit": False, "byte_fallback": True, "character_coverage": 0.9995, "minloglevel": 2}
    # Nothing is normalised away: decoding gives the text back.
    options |= {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
    for index, name in enumerate(("pad", "bos", "eos", "unk")):
        options |= {f"{name}_id": index, f"{name}_piece": _PIECES[name]}
    symbols = [_PIECES["mask"], *([CASE_MARK] if factor_case else [])]
    options |= {"user_defined_symbols": symbols, "vocab_size": vocab_size, "model_type": model_type}
    options |= trainer_options
    lines = _nonempty(texts)
    if factor_case:
        normalizer = _case_normalizer()
        lines = (normalizer.normalize_str(line) for line in lines)
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=buffer, **options)
    except RuntimeError as error:
        raise ValueError(f"sentencepiece could not train a vocabulary of {vocab_size}: {error}") from error
    processor = sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())
    return _to_fast_tokenizer(processor, model_type, model_max_length, factor_case)


def _case_normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.Replace(capital, marked) for capital, marked in _CASES.items()])


def _nonempty(texts: Iterable[str]) -> Iterator[str]:
    lines = (line for text in texts for line in text.splitlines() if line)
    first = next(lines, None)
    if first is None:
        raise ValueError("There is no text to train a tokenizer on: every line is empty.")
    yield from chain([first], lines)


def _to_fast_tokenizer(
    processor: Any, model_type: str, model_max_length: int | None, factor_case: bool
) -> PreTrainedTokenizerFast:
    """The same vocabulary in the `tokenizers` library, with real spaces in the pieces."""
    ids = range(processor.get_piece_size())
    pieces = [processor.id_to_piece(index).replace(_SPIECE_SPACE, " ") for index in ids]
    scores = [processor.get_score(index) for index in ids]
    if model_type == "unigram":
        tokenizer = Tokenizer(models.Unigram(list(zip(pieces, scores)), unk_id=3, byte_fallback=True))
        # A text may contain "<0x41>" as it stands; cut at "<", it is not taken for the byte.
        tokenizer.pre_tokenizer = pre_tokenizers.Split("<", behavior="isolated")
    else:
        # Special tokens and bytes are not made of other pieces: a text that spells them out has none of them.
        whole = [processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i) for i in ids]
        whole[processor.piece_to_id(_PIECES["mask"])] = True
        merges = _merges({piece: index for index, piece in enumerate(pieces) if not whole[index]}, scores)
        vocab = {piece: index for index, piece in enumerate(pieces)}
        tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=_PIECES["unk"], byte_fallback=True))
    capitals = [decoders.Replace(marked, capital) for capital, marked in _CASES.items()] if factor_case else []
    capitals += [decoders.Replace(CASE_MARK, "")] if factor_case else []  # one that a model wrote before no letter
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), *capitals])
    if factor_case:
        tokenizer.normalizer = _case_normalizer()
        alone = pre_tokenizers.Split(CASE_MARK, behavior="isolated")
        before = [] if tokenizer.pre_tokenizer is None else [tokenizer.pre_tokenizer]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, alone])
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in _PIECES.values()])
    eos = _PIECES["eos"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {eos}", pair=f"$A {eos} $B {eos}", special_tokens=[(eos, tokenizer.token_to_id(eos))]
    )
    options = {"model_max_length": model_max_length} if model_max_length else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS, **options
    )


def _merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """The merges behind a sentencepiece BPE vocabulary, whose scores rank its pieces."""
    cuts = ((index, piece[:cut], piece[cut:]) for piece, index in vocab.items() for cut in range(1, len(piece)))
    found = [
        (-scores[index], vocab[left], vocab[right], left, right)
        for index, left, right in cuts
        if left in vocab and right in vocab
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def encode_text(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    mask_marker: str | None = None,
    max_length: int | None = None,
    add_special_tokens: bool = True,
    split_special_tokens: bool = True,
) -> list[list[int]]:
    """
    Token ids of texts that are nothing but text: a special token that one spells out, such as `</s>`, is split like
    any other word.

    Args:
        tokenizer: The tokenizer.
        texts: The texts.
        mask_marker: What stands for the mask token; nothing by default. Take one that the texts cannot hold.
        max_length: Longer texts are cut, on the tokenizer's truncation side; what the tokenizer adds stays.
        add_special_tokens: Whether the tokenizer's begin and end tokens are added.
        split_special_tokens: `False` lets special tokens that a text spells out act as such.

    Raises:
        ValueError: for a mask marker and a tokenizer without a mask token.
    """
    if not texts:
        return []  # which tokenizers do not take
    pieces = [text.split(mask_marker) if mask_marker else [text] for text in texts]
    mask = tokenizer.mask_token
    if mask is None and any(len(row) > 1 for row in pieces):
        raise ValueError("The tokenizer has no mask token; call `yan_hf.prepare_tokenizer(tokenizer, model)`.")
    rows = tokenizer([(mask or "").join(row) for row in pieces], add_special_tokens=False)["input_ids"]
    if split_special_tokens:
        control = _control_ids(tokenizer)
        for index, row in enumerate(pieces):
            # Most texts spell out no special token: then the marked masks are all there is.
            if [i for i in rows[index] if i in control] != [tokenizer.mask_token_id] * (len(row) - 1):
                parts = [_encode_piece(tokenizer, piece, control) for piece in row]
                rows[index] = parts[0] + [i for part in parts[1:] for i in (tokenizer.mask_token_id, *part)]
                if mask_marker is None and mask and mask in row[0]:
                    logger.warning_once(f"A text spells out {mask}, which stays text: name a mask marker to mask it.")
    before, after = _added_ids(tokenizer) if add_special_tokens else ([], [])
    if max_length is not None:
        limit = max(0, max_length - len(before) - len(after))
        left = tokenizer.truncation_side == "left"
        rows = [row[max(0, len(row) - limit) :] if left else row[:limit] for row in rows]
    return [[*before, *row, *after] for row in rows]


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of every token by itself, with the space before it."""
    return [token.replace("▁", " ").replace("Ġ", " ") for token in tokenizer.convert_ids_to_tokens(list(ids))]


def shown_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """As [`token_texts`], as they are read: a capital's mark is empty, and the letter behind it is one."""
    shown, is_capital = [], False
    for piece in token_texts(tokenizer, ids):
        if is_capital and piece != CASE_MARK:
            letter = len(piece) - len(piece.lstrip(" "))
            piece = piece[:letter] + piece[letter : letter + 1].upper() + piece[letter + 1 :]
        is_capital = piece == CASE_MARK
        shown.append("" if is_capital else piece)
    return shown


def _control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Special tokens that no text may turn into; an unknown word's token is a text's own."""
    ids = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    named = ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id")
    return ids | {getattr(tokenizer, name) for name in named} - {None}


def _encode_piece(tokenizer: PreTrainedTokenizerBase, text: str, control: set[int]) -> list[int]:
    def characters(index: int) -> list[int]:
        # T5's vocabulary, for one, holds its end token as an ordinary piece too: its characters instead.
        ids = tokenizer.convert_tokens_to_ids(list(tokenizer.convert_ids_to_tokens(index)))
        return [i for i in ids if i is not None and i not in control]

    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [i for index in ids for i in (characters(index) if index in control else [index])]


def _added_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    bare, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None
) -> PreTrainedTokenizerBase:
    """
    Gives an existing tokenizer (GPT-2, Llama, T5 style) the special tokens YAN needs, in place, and fits a model.

    Missing begin, end, pad and mask tokens are added; a pad token that is also the end token is replaced by one of its
    own. BERT's `[CLS]` and `[SEP]` begin and end texts, and T5's first sentinel is the mask. A tokenizer with only one
    of begin and end tokens uses it for both, as GPT-2's does. A YAN model's tables are resized where the vocabulary
    has outgrown them, and its configurations get the special tokens.

    Returns:
        The tokenizer.
    """
    for name, other in (("bos_token", "cls_token"), ("eos_token", "sep_token")):
        if getattr(tokenizer, name) is None and getattr(tokenizer, other) is not None:
            setattr(tokenizer, name, getattr(tokenizer, other))
    if tokenizer.mask_token is None and _SENTINEL in tokenizer.get_vocab():
        tokenizer.mask_token = _SENTINEL
    if tokenizer.eos_token is None and tokenizer.bos_token is not None:
        tokenizer.eos_token = tokenizer.bos_token
    given = {name: getattr(tokenizer, name) for name in ("eos_token", "pad_token", "mask_token")}
    if given["pad_token"] == given["eos_token"]:
        given["pad_token"] = None
    if missing := {name: SPECIAL_TOKENS[name] for name, token in given.items() if token is None}:
        tokenizer.add_special_tokens(missing)
    if tokenizer.bos_token is None:
        tokenizer.bos_token = tokenizer.eos_token
    if model is not None:
        model._tokenizer_prepared = True  # from now on this vocabulary is the model's
        if len(tokenizer) > model.config.vocab_size:
            model.resize_token_embeddings(len(tokenizer))
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id"):
            setattr(model.config, name, getattr(tokenizer, name))
            if getattr(model, "generation_config", None) is not None and name != "mask_token_id":
                setattr(model.generation_config, name, getattr(tokenizer, name))
    return tokenizer
