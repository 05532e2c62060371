# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The pipeline "text2text-generation", which Transformers 5 no longer has."""

from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, pipelines
from transformers.pipelines import PIPELINE_REGISTRY, Pipeline

from ..data.sources import encode_source


TASK = "text2text-generation"


class Text2TextGenerationPipeline(Pipeline):
    """
    A text for each source, by `pipeline("text2text-generation", model=path)`.

    Sources are a text, a list, a `datasets` column or a generator, whose results come one by one. A call, and the
    constructor for all calls, takes `batch_size` and `num_workers` as every pipeline, all options of `generate`, and:

    Args:
        seed: Makes texts repeatable: a source then gets the same texts whatever stands beside it in its batch. Its
            copies, of `num_return_sequences`, draw from this seed and those that follow it.
        mask_marker: What stands for the mask token in a source, such as `"<mask>"`; nothing by default. All other
            special tokens that a source spells out are text.
        split_special_tokens: `False` lets special tokens that a source spells out act as such.
        return_tensors: Whether results hold `generated_token_ids` instead of `generated_text`.

    Returns:
        For one source a list with a `{"generated_text": ...}` for each returned sequence. A list of sources gives a
        list of these, or of the dictionaries themselves where there is one for each source.

    Raises:
        TypeError: for a source that is no text.
        ValueError: for one that is empty or too long, for what `generate` refuses, and for other models than YAN.
    """

    _load_processor = _load_image_processor = _load_video_processor = _load_feature_extractor = False
    _load_tokenizer = True

    def __init__(self, model: Any, *args: Any, **kwargs: Any):
        if model.config.model_type != "yan":
            raise ValueError(
                f"The pipeline {TASK!r} is YAN's, but this is a model of type {model.config.model_type!r}, for which "
                "Transformers 5 has no such pipeline. Call its `generate`."
            )
        super().__init__(model, *args, **kwargs)

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The texts; see the class."""
        if isinstance(inputs, (list, tuple)) and not inputs:
            return []
        results = super().__call__(list(inputs) if isinstance(inputs, tuple) else inputs, *args, **kwargs)
        if isinstance(inputs, (list, tuple)) and all(len(result) == 1 for result in results):
            return [result[0] for result in results]
        return results

    def _sanitize_parameters(
        self,
        mask_marker: str | None = None,
        split_special_tokens: bool | None = None,
        return_tensors: bool | None = None,
        **options: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        encoding = {"mask_marker": mask_marker, "split_special_tokens": split_special_tokens}
        encoding = {name: value for name, value in encoding.items() if value is not None}
        return encoding, options, {} if return_tensors is None else {"return_tensors": return_tensors}

    def preprocess(self, input_: str, **marks: Any) -> dict[str, torch.Tensor]:
        """Token ids of one source, `(1, L)`, and their mask."""
        ids = torch.tensor([encode_source(self.tokenizer, input_, self.model.config.max_position_embeddings, **marks)])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _forward(self, input_tensors: dict[str, torch.Tensor], seed: int | None = None, **options: Any) -> dict:
        """Returned sequences of each source, `(B, n, L)`."""
        num_sources = len(input_tensors["input_ids"])
        config = options.get("generation_config") or self.model.generation_config
        copies = options.get("num_return_sequences") or config.num_return_sequences or 1
        if seed is not None:
            options["seeds"] = [seed + copy for copy in range(copies)] * num_sources
        if options.get("stop_strings") is not None or config.stop_strings is not None:
            options["tokenizer"] = self.tokenizer
        found = self.model.generate(**input_tensors, **options)
        sequences = found if isinstance(found, torch.Tensor) else found.sequences
        return {"sequences": sequences.unflatten(0, (num_sources, copies))}

    def postprocess(self, model_outputs: dict, return_tensors: bool = False) -> list[dict[str, Any]]:
        """A dictionary for each returned sequence of one source."""
        sequences = model_outputs["sequences"][0].tolist()
        if return_tensors:
            return [{"generated_token_ids": ids} for ids in sequences]
        texts = self.tokenizer.batch_decode(sequences, skip_special_tokens=True)
        return [{"generated_text": text} for text in texts]


def register():
    """Called by `import yan_hf`. The task's name is free in Transformers 5; another package may have taken it."""
    if TASK in PIPELINE_REGISTRY.supported_tasks:
        return
    # Newer releases refuse the name before they look into the registry.
    getattr(pipelines, "REMOVED_TASKS", {}).pop(TASK, None)
    PIPELINE_REGISTRY.register_pipeline(TASK, Text2TextGenerationPipeline, AutoModelForSeq2SeqLM, type="text")
    # With it, `save_pretrained` would copy this file into the checkpoint, where its imports lead nowhere.
    del Text2TextGenerationPipeline._registered_impl
