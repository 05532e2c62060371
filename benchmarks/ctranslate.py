# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Transformers' autoregressive models in CTranslate2, an engine of its own kernels (`pip install ctranslate2`)."""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast


def _save(model: PreTrainedModel, folder: str):
    """A model with a tokenizer whose tokens are their own numbers, which the converter needs."""
    # What the converter looks up and Transformers no longer has.
    model.config.normalize_before = model.config.model_type == "mbart"
    model.save_pretrained(folder)
    vocabulary = {str(token): token for token in range(model.config.vocab_size)}
    special = {name: str(getattr(model.config, f"{name}_id")) for name in ("pad_token", "bos_token", "eos_token")}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special["pad_token"]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=special["pad_token"], **special).save_pretrained(
        folder
    )


def convert(model: PreTrainedModel, folder: str, quantization: str):
    """Writes a GPT-2, a BART or an mBART for CTranslate2; "float32" or "int8"."""
    import ctranslate2

    with tempfile.TemporaryDirectory() as saved:
        _save(model, saved)
        converter = ctranslate2.converters.TransformersConverter(saved)
        converter.convert(folder, quantization=quantization, force=True)


def _engine(folder: str, is_encoder_decoder: bool, quantization: str) -> Any:
    import ctranslate2

    engine = ctranslate2.Translator if is_encoder_decoder else ctranslate2.Generator
    threads = {"inter_threads": 1, "intra_threads": torch.get_num_threads()}
    return engine(folder, device="cpu", compute_type=quantization, **threads)


def _names(rows: list[list[int]]) -> list[list[str]]:
    """The tokens of the vocabulary that [`_save`] writes."""
    return [[str(token) for token in row] for row in rows]


def load(folder: str, is_encoder_decoder: bool, quantization: str) -> Callable[[torch.Tensor, int], object]:
    """What writes a target of a given length for sources `(B, Lx)`, greedily, with as many threads as PyTorch."""
    loaded = _engine(folder, is_encoder_decoder, quantization)

    def run(ids: torch.Tensor, length: int) -> object:
        rows = _names(ids.tolist())
        if is_encoder_decoder:
            limits = {"min_decoding_length": length, "max_decoding_length": length}
            return [found.hypotheses[0] for found in loaded.translate_batch(rows, beam_size=1, **limits)]
        limits = {"min_length": length, "max_length": length}
        results = loaded.generate_batch(rows, beam_size=1, include_prompt_in_result=False, **limits)
        return [found.sequences[0] for found in results]

    return run


def rewriter(model: PreTrainedModel, quantization: str) -> Callable[[list[list[int]], int], list[list[int]]]:
    """What writes for rows of tokens of an encoder-decoder, greedily, at most a number of tokens, the end left out."""
    with tempfile.TemporaryDirectory() as folder:
        convert(model, folder, quantization)
        loaded = _engine(folder, True, quantization)
    start = _names([[model.config.decoder_start_token_id]])  # as mBART's target language

    def run(rows: list[list[int]], longest: int) -> list[list[int]]:
        options = {"beam_size": 1, "max_batch_size": 64, "max_decoding_length": longest}
        found = loaded.translate_batch(_names(rows), target_prefix=start * len(rows), **options)
        return [[int(token) for token in result.hypotheses[0]] for result in found]

    return run


def translator(model: PreTrainedModel, quantization: str) -> Callable[[torch.Tensor, int], object]:
    """[`convert`] and [`load`]."""
    with tempfile.TemporaryDirectory() as folder:
        convert(model, folder, quantization)
        return load(folder, model.config.is_encoder_decoder, quantization)
