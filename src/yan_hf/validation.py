# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Checks of what users pass to the model: each failure names the argument, the value and the remedy."""

import importlib
import reprlib
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation.stopping_criteria import ConfidenceCriteria, MaxTimeCriteria, StoppingCriteriaList
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
)


def _values_can_be_read(tensor: Tensor) -> bool:
    # Reading a value would break a graph being traced, and a meta tensor has none.
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or tensor.is_meta)


def check_mask(name: str, mask: Tensor | None, shape: torch.Size, like: str) -> None:
    """Raises `ValueError` unless `mask` is `None` or has the shape `(B, L)`."""
    if mask is not None and mask.shape != shape:
        raise ValueError(
            f"`{name}` must have the shape of `{like}`, {tuple(shape)}, but has shape {tuple(mask.shape)}. Pass the "
            "mask that the tokenizer returned with these ids."
        )


def check_no_cache(arguments: dict) -> None:
    """Raises `ValueError` for a key-value cache, which would be ignored: as of PEFT's prefix tuning."""
    if arguments.get("past_key_values") is not None:
        raise ValueError(
            "`past_key_values` was given, but YAN has no key-value cache: all positions are generated at once. Prefix "
            "tuning needs one; use LoRA or prompt tuning instead."
        )


def check_no_prefix_tuning(model: PreTrainedModel) -> None:
    """Raises `ValueError` where PEFT would put a prefix into a cache, by a method that YAN never calls."""
    wrapper = getattr(model.prepare_inputs_for_generation, "__self__", None)
    adapter = getattr(wrapper, "active_peft_config", None)
    if getattr(adapter, "peft_type", None) in ("PREFIX_TUNING", "CARTRIDGE"):
        raise ValueError(
            f"`{type(adapter).__name__}` hands `past_key_values` to the model, but YAN has no key-value cache: all "
            "positions are generated at once, and the adapter would have no effect. Use LoRA or prompt tuning instead."
        )


def check_encoder_type(config: PreTrainedConfig) -> None:
    """Raises `ValueError` for the configuration of a model that is no bidirectional encoder of text."""
    kind, known = type(config), (MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_TEXT_ENCODING_MAPPING)
    if getattr(config, "vocab_size", None) is None:
        raise ValueError(f"A model of the type {config.model_type!r} has no vocabulary: it cannot encode text.")
    is_bidirectional = (
        config.is_encoder_decoder
        or any(kind in mapping for mapping in known)
        or getattr(config, "is_causal", None) is False
        or getattr(config, "use_bidirectional_attention", False)
    )
    if getattr(config, "is_decoder", False) or (kind in MODEL_FOR_CAUSAL_LM_MAPPING and not is_bidirectional):
        raise ValueError(
            f"A model of the type {config.model_type!r} is causal: a token's state knows nothing of what follows. "
            "Take an encoder, such as BERT, ModernBERT or T5."
        )


def check_encoder_states(
    model: PreTrainedModel,
    source: tuple[Tensor | None, ...],
    labels: Tensor | None,
    encoder_states: Tensor | None,
    target_states: Tensor | None,
    canvas: Tensor | None,
) -> None:
    """
    Raises `ValueError` for cached states of another shape than the source's ids or embeddings and the labels, of one
    side alone or of a `canvas` of its own, without a pretrained encoder, and while that trains, an adapter on it too.
    """
    if model.config.encoder_config is None:
        raise ValueError("`encoder_states` and `target_states` are a pretrained encoder's: this model has its own.")
    if labels is None or encoder_states is None or target_states is None:
        raise ValueError(
            "Pass `encoder_states`, `target_states` and `labels` together: cached states are for training."
        )
    if model.training and any(weight.requires_grad for weight in model.model.encoder.model.parameters()):
        raise ValueError(
            "`encoder_states` were cached, but the encoder trains, so that they are out of date after the first step. "
            "Call `model.freeze('encoder')`, or leave the cached states out."
        )
    if canvas is not None:
        raise ValueError(
            "`target_states` were encoded on the canvas of the labels: leave `decoder_attention_mask` out."
        )
    width = model.config.encoder_config.hidden_size
    tokens = source[0] if source[0] is not None else source[2][..., 0]
    for name, states, like in (("encoder_states", encoder_states, tokens), ("target_states", target_states, labels)):
        if tuple(states.shape) != (*like.shape, width):
            raise ValueError(f"`{name}` must have shape {(*like.shape, width)}, but have {tuple(states.shape)}.")


def check_source(
    config: PreTrainedConfig,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    allow_empty_rows: bool = True,
) -> None:
    """
    Raises `ValueError` for a missing, doubled, empty or too long source, a mask of another shape, a row without a real
    token (unless `allow_empty_rows`), and a token id outside the vocabulary.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
    name, source = ("input_ids", input_ids) if input_ids is not None else ("inputs_embeds", inputs_embeds)
    num_dims = 2 if input_ids is not None else 3
    if source.dim() != num_dims:
        raise ValueError(
            f"`{name}` must have {num_dims} dimensions, but has shape {tuple(source.shape)}. A single sequence needs "
            "a batch dimension: `ids[None]`."
        )
    if source.numel() == 0:
        raise ValueError(f"`{name}` is empty: its shape is {tuple(source.shape)}. Every source needs a token.")
    check_mask("attention_mask", attention_mask, source.shape[:2], name)
    if attention_mask is None:
        check_length(config, name, source.shape[1])
    if input_ids is not None:
        check_ids(config, "input_ids", input_ids)
    if attention_mask is not None and _values_can_be_read(attention_mask):
        counts = attention_mask.bool().sum(dim=-1)
        longest, shortest = torch.stack([counts.max(), counts.min()]).tolist()
        check_length(config, name, longest)
        if shortest == 0 and not allow_empty_rows:
            raise ValueError(
                f"Row {int(counts.argmin())} of `attention_mask` has no real token, so there is nothing to generate "
                "from. Leave the row out or give it at least one token."
            )


def check_ids(config: PreTrainedConfig, name: str, ids: Tensor) -> None:
    """Raises `TypeError` for ids that are not integers, `ValueError` for ids outside the vocabulary."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"`{name}` must hold integer token ids, but its dtype is {ids.dtype}.")
    if not _values_can_be_read(ids):
        return
    lowest, highest = torch.stack(ids.aminmax()).tolist()
    if lowest < 0 or highest >= config.vocab_size:
        raise ValueError(
            f"`{name}` contains the token id {lowest if lowest < 0 else highest}, but the vocabulary has "
            f"{config.vocab_size} tokens, 0 to {config.vocab_size - 1}. Use the checkpoint's own tokenizer, or call "
            "`model.resize_token_embeddings(len(tokenizer))` after adding tokens."
        )


def check_length(config: PreTrainedConfig, name: str, length: int) -> None:
    """Raises `ValueError` for more tokens than the position table holds."""
    longest = config.max_position_embeddings
    if length > longest:
        raise ValueError(f"`{name}` has {length} tokens, over `max_position_embeddings={longest}`: truncate them.")


def check_state(
    config: PreTrainedConfig, latents: Tensor, timesteps: Tensor, decoder_attention_mask: Tensor, batch_size: int
) -> None:
    """Raises `ValueError` for a state, times or canvas whose shapes do not fit the source or the configuration."""
    if latents.dim() != 3 or latents.shape[0] != batch_size or latents.shape[2] != config.hidden_size:
        shape = f"({batch_size}, target length, hidden_size={config.hidden_size})"
        raise ValueError(f"`latents` must have shape {shape}, but have {tuple(latents.shape)}.")
    if timesteps.shape != (batch_size,):
        raise ValueError(f"`timesteps` must have shape ({batch_size},), but have {tuple(timesteps.shape)}.")
    check_mask("decoder_attention_mask", decoder_attention_mask, latents.shape[:2], "latents")
    if _values_can_be_read(timesteps) and not ((timesteps >= 0) & (timesteps <= 1)).all():
        raise ValueError(f"`timesteps` must be in [0, 1], from noise to text, but are {timesteps.tolist()}.")
    if _values_can_be_read(decoder_attention_mask):
        check_length(config, "latents", int(decoder_attention_mask.bool().sum(dim=-1).max()))


def check_labels(
    config: PreTrainedConfig, labels: Tensor, canvas: Tensor | None, batch_size: int, weights: Tensor | None = None
) -> None:
    """Raises for labels of another batch size, empty, too long or outside the vocabulary, and for unfit weights."""
    if labels.dim() != 2 or labels.shape[0] != batch_size or labels.shape[1] == 0:
        raise ValueError(f"`labels` must have shape ({batch_size}, target length), but have {tuple(labels.shape)}.")
    check_mask("decoder_attention_mask", canvas, labels.shape, "labels")
    check_mask("token_weights", weights, labels.shape, "labels")
    if weights is not None and _values_can_be_read(weights) and not (weights >= 0).all():
        raise ValueError("`token_weights` must not be negative or NaN: a token with weight 0 does not count.")
    check_ids(config, "labels", labels.masked_fill(labels == -100, 0))
    canvas = labels != -100 if canvas is None else canvas
    if _values_can_be_read(labels):
        check_length(config, "labels", int(canvas.bool().sum(dim=-1).max()))


def check_token_lengths(token_lengths: Tensor, canvas: Tensor, is_known: Tensor | None = None) -> None:
    """
    Raises `ValueError` for negative lengths of source tokens, for more than the target's canvas holds, and for known
    tokens that stand for another number than one.
    """
    if not _values_can_be_read(token_lengths):
        return
    sums, sizes = token_lengths.sum(dim=-1), canvas.sum(dim=-1)
    if bool((token_lengths < 0).any()) or bool((sums > sizes).any()):
        row = int(((token_lengths < 0).any(dim=-1) | (sums > sizes)).nonzero()[0])
        raise ValueError(
            f"Row {row} of `token_lengths` must not be negative, nor sum to more than the {int(sizes[row])} target "
            f"tokens, but is {token_lengths[row].tolist()}."
        )
    if is_known is not None and bool((is_known & (token_lengths != 1)).any()):
        row = int((is_known & (token_lengths != 1)).any(dim=-1).nonzero()[0])
        raise ValueError(
            f'Row {row} of `token_lengths` is {token_lengths[row].tolist()}, but with `start_state="aligned"` every '
            "known token stands for itself alone. For targets that are no source with its masks filled take "
            '`start_state="fertility"`.'
        )


def check_finite(name: str, values: Tensor) -> None:
    """Raises `ValueError` where something computed is not finite: `values`, or booleans that say whether it was."""
    if not _values_can_be_read(values):
        return
    is_finite = values if values.dtype == torch.bool else values.isfinite()
    if not (is_finite.all() if is_finite.dim() else is_finite):
        raise ValueError(
            f"`{name}` is not finite: the model's weights hold NaN or infinite values, or they overflow in half "
            "precision. Check the checkpoint, or load it with `dtype=torch.float32`."
        )


def inference_module(name: str) -> ModuleType:
    """
    A module of `yan_hf.inference`: what works on a model from outside does not travel with a checkpoint's code.
    Raises `ImportError` where the package is not installed.
    """
    try:
        return importlib.import_module(f"yan_hf.inference.{name}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("yan_hf"):
            raise
        raise ImportError(
            f"This needs `yan_hf.inference.{name}`, which is not among the code saved with a checkpoint. Install the "
            "package: `pip install yan-hf`."
        ) from error


def fitting_values(
    name: str,
    values: Tensor,
    shape: tuple[int, ...],
    device: torch.device,
    position_dim: int = 1,
    parts: str = "returned sequences, positions and width",
) -> Tensor:
    """
    What the caller fixes for every position, cut to the canvas and moved to the device. Raises `ValueError` unless
    `values` have `shape`, whose dimensions are the `parts`, or more positions in its dimension `position_dim`, and are
    finite.
    """
    others = list(shape)
    others[position_dim] = values.shape[position_dim] if values.dim() == len(shape) else -1
    if list(values.shape) != others or values.shape[position_dim] < shape[position_dim]:
        raise ValueError(
            f"`{name}` must have shape {shape}, {parts}, or more positions, but have {tuple(values.shape)}."
        )
    values = values.narrow(position_dim, 0, shape[position_dim]).to(device)
    if _values_can_be_read(values) and not torch.isfinite(values).all():
        raise ValueError(f"`{name}` holds values that are not finite.")
    return values


def check_expert_indices(experts: Tensor, num_experts: int) -> Tensor:
    """The indices as int64; raises `ValueError` unless they are integers in 0 to `num_experts - 1`."""
    if experts.is_floating_point() or experts.dtype == torch.bool:
        raise ValueError(f"`expert_indices` must be integers, but their dtype is {experts.dtype}.")
    if not _values_can_be_read(experts):
        return experts.long()
    lowest, highest = torch.stack(experts.aminmax()).tolist()
    if lowest < 0 or highest >= num_experts:
        raise ValueError(
            f"`expert_indices` must be in 0 to {num_experts - 1} with `num_experts={num_experts}`, but reach from "
            f"{lowest} to {highest}."
        )
    return experts.long()


def check_choice(config: PreTrainedConfig, has_choice: Tensor | None, has_processors: bool) -> None:
    """
    Raises `ValueError` where options of a resolved `config`, or the caller's processors, left some position without a
    token to choose; `has_choice` is `None` where no option was in the way.
    """
    if has_choice is None or not _values_can_be_read(has_choice) or bool(has_choice):
        return
    names = ["suppress_tokens", "min_new_tokens"]
    names += ["temperature", "top_k", "top_p", "min_p", "typical_p"] if config.do_sample else []
    values = {name: getattr(config, name) for name in names if getattr(config, name) not in (None, 1)}
    given = [f"`{name}={reprlib.repr(value)}`" for name, value in values.items()]
    given += ["`logits_processor`"] if has_processors else []
    raise ValueError(
        "No token is left to choose at some position: every logit is minus infinity there, or one is NaN, under "
        f"{', '.join(given)}. Leave one of them out, or allow more tokens."
    )


def check_types(arguments: dict[str, tuple[Any, type]]) -> None:
    """Raises `TypeError` for an argument, given by its name with the type it must have, that has another."""
    for name, (value, kind) in arguments.items():
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"`{name}` must be a `{kind.__name__}`, but is {value!r}.")


def check_functions(name: str, values: Any) -> None:
    """Raises `TypeError` for what is no list of functions."""
    if values is not None and not (isinstance(values, (list, tuple)) and all(map(callable, values))):
        raise TypeError(f"`{name}` must be a list of functions, but is {values!r}.")


def check_stopping_criteria(criteria: StoppingCriteriaList) -> None:
    """Raises `ValueError` for a criterion that cannot be applied to a finished text."""
    reasons = {
        MaxTimeCriteria: "it looks at the clock, but all tokens are generated at once; lower `num_inference_steps`",
        ConfidenceCriteria: "it looks at the scores of an assistant's drafts, and there is no assistant",
    }
    for kind, reason in reasons.items():
        if any(isinstance(criterion, kind) for criterion in criteria):
            raise ValueError(f"`{kind.__name__}` cannot stop `generate`: {reason}.")


def check_no_text_generation_pipeline() -> None:
    """Raises `ValueError` within Transformers' pipeline for language models that continue a prompt."""
    if _caller("transformers.pipelines.text_generation", "TextGenerationPipeline", "_forward") is not None:
        raise ValueError(
            'The pipeline "text-generation" continues a prompt, and cuts as many tokens as it has off the output. '
            "YAN generates a target for a source: call `ids = model.generate(**tokenizer(texts, padding=True, "
            'return_tensors="pt"))` and `tokenizer.batch_decode(ids, skip_special_tokens=True)`.'
        )


def check_trainer(model: PreTrainedModel) -> None:
    """Within the construction of Transformers' `Trainer`: checks its arguments."""
    trainer = _caller("transformers.trainer", "Trainer", "__init__")
    if trainer is not None:
        check_training_arguments(trainer.args, model)


def check_training_arguments(arguments: Any, model: nn.Module) -> None:
    """
    Raises `ValueError` for training arguments that would fail or mislead later: `label_smoothing_factor`, and what
    `generate` would refuse at the first evaluation (`generation_num_beams`, `generation_max_length`,
    `generation_config`).
    """
    if arguments.label_smoothing_factor:
        raise ValueError(
            f"`label_smoothing_factor={arguments.label_smoothing_factor}` takes the labels away from the model, and "
            "with them YAN's loss. Set `model.config.label_smoothing` instead."
        )
    given = {name: getattr(arguments, f"generation_{name}", None) for name in ("max_length", "num_beams")}
    config = getattr(arguments, "generation_config", None)
    wanted = getattr(arguments, "predict_with_generate", False) or any(value is not None for value in given.values())
    if wanted and hasattr(model, "_prepare_generation"):
        try:
            model._prepare_generation(config if hasattr(config, "to_dict") else model.generation_config, given)
        except ValueError as error:
            names = ", ".join(f"`generation_{name}={value}`" for name, value in given.items() if value is not None)
            raise ValueError(
                f"Evaluations with `generate` would fail, by {names or 'its configuration'}: {error}"
            ) from error


def _caller(module: str, cls: str, method: str) -> Any:
    """
    The object of whose method this is a part, or `None`: nothing among a model's arguments tells who has called. A
    module that was never imported has not.
    """
    cls = getattr(sys.modules.get(module), cls, None)
    code = getattr(getattr(cls, method, None), "__code__", None)
    frame = sys._getframe(1) if code is not None else None
    while frame is not None:
        if frame.f_code is code:
            return frame.f_locals["self"]
        frame = frame.f_back
    return None
