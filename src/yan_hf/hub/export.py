# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Checkpoints for elsewhere: with the code that they need, to be loaded without this package, or as ONNX."""

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file

from ..configuration_yan import AUTO_MAP, YanConfig
from ..data.files import check_output_folder
from ..inference.onnx import write_onnx
from ..modeling_yan import YanForAutoEncoding, YanForConditionalGeneration
from ..saving import staged_save
from .info import check_model_type


def load_model(model_dir: str | Path) -> PreTrainedModel:
    """A checkpoint as the class and in the dtype that it was saved in."""
    check_model_type(model_dir, YanConfig.get_config_dict(model_dir)[0].get("model_type"))
    config = YanConfig.from_pretrained(model_dir)
    auto_encoder = (config.architectures or [""])[0] == YanForAutoEncoding.__name__
    cls = YanForAutoEncoding if auto_encoder else YanForConditionalGeneration
    return cls.from_pretrained(model_dir, dtype="auto")


def export_with_code(model_dir: str | Path, output_dir: str | Path, overwrite: bool = False):
    """
    Writes a checkpoint with the modules that it needs, so that it loads without this package by
    `AutoModelForSeq2SeqLM.from_pretrained(..., trust_remote_code=True)`, and likewise for the other Auto classes.

    Args:
        model_dir: Folder of the checkpoint, or its name on the Hub; its tokenizer and its card come along.
        output_dir: Folder to write, new or empty.
        overwrite: Whether files of a checkpoint in `output_dir` that are written again are replaced.

    Raises:
        FileExistsError: for an `output_dir` that holds anything, but for a checkpoint with `overwrite`.
    """
    check_output_folder(output_dir, overwrite)
    model = load_model(model_dir)
    model.config.auto_map = dict(AUTO_MAP)
    with staged_save(output_dir) as folder:
        model.save_pretrained(folder)  # with the modules that `auto_map` names
        path = cached_file(model_dir, "README.md", _raise_exceptions_for_missing_entries=False)
        if path is not None:
            shutil.copyfile(path, folder / "README.md")
        _copy_tokenizer(model_dir, folder)


def export_to_onnx(model_dir: str | Path, output_dir: str | Path, overwrite: bool = False, **options: Any):
    """
    Writes a checkpoint as the ONNX programs that [`OnnxYan`] runs, in float32, with its tokenizer.

    Args:
        model_dir, output_dir, overwrite: As of [`export_with_code`].
        options: Fields of [`YanGenerationConfig`] in the place of the checkpoint's. Solver, times, routing and
            temperature of the experts are fixed in the programs.

    Raises:
        FileExistsError: as by [`export_with_code`].
        ImportError: without the packages of `yan-hf[onnx]`.
        ValueError: for block routing, pretrained encoders, quantized weights, and auto-encoders.
    """
    check_output_folder(output_dir, overwrite)
    model = load_model(model_dir)
    if not isinstance(model, YanForConditionalGeneration):
        raise ValueError(f"{model_dir} holds an auto-encoder, which generates nothing: export the whole model.")
    with staged_save(output_dir) as folder:
        write_onnx(model.float(), folder, **options)
        _copy_tokenizer(model_dir, folder)


def _copy_tokenizer(model_dir: str | Path, folder: Path):
    path = cached_file(model_dir, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False)
    if path is not None:
        AutoTokenizer.from_pretrained(model_dir).save_pretrained(folder)
