# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The generation configuration: what `generate` takes, with its defaults, and what it refuses."""

import math
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationConfig


DEFAULT_MAX_LENGTH = 128

_ONE_PASS = "YAN writes all tokens at once instead of extending a prefix"
_BEAMS = f"{_ONE_PASS}, so there are no beams to search"
_PREFIX = f"{_ONE_PASS}, so a penalty or constraint on the tokens so far does not apply"
_ASSIST = f"{_ONE_PASS}, so there are no next tokens for an assistant to draft"
_CACHE = "the state of the solver is recomputed at every step, so there is no key-value cache of generated tokens"
_SAMPLE = "tokens are the argmax of the decoded latent; randomness comes from the initial noise and the experts"

# The fields that `generate` reads. All others of Transformers' configuration must keep a value that changes nothing.
_READ = {
    "max_new_tokens",
    "max_length",
    "min_new_tokens",
    "num_inference_steps",
    "expert_selection",
    "expert_temperature",
    "init_noise",
    "num_return_sequences",
    "return_dict_in_generate",
    "output_scores",
    "output_trajectory",
    "output_expert_indices",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "transformers_version",
}

# Why they are refused, where more can be said than that `generate` has no use for them.
_REASONS = {
    **dict.fromkeys(
        ("num_beams", "num_beam_groups", "diversity_penalty", "early_stopping", "length_penalty", "constraints"),
        _BEAMS,
    ),
    "force_words_ids": _BEAMS,
    **dict.fromkeys(("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"), _SAMPLE),
    **dict.fromkeys(("repetition_penalty", "no_repeat_ngram_size", "stop_strings", "penalty_alpha"), _PREFIX),
    **dict.fromkeys(("encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "dola_layers"), _PREFIX),
    **dict.fromkeys(("begin_suppress_tokens", "forced_bos_token_id", "decoder_start_token_id"), _PREFIX),
    **dict.fromkeys(("prompt_lookup_num_tokens", "use_mtp"), _ASSIST),
    **dict.fromkeys(("cache_implementation", "cache_config"), _CACHE),
    "min_length": "`min_new_tokens` is the shortest target, and the source does not count",
    "max_time": "the number of solver steps is fixed in advance; lower `num_inference_steps`",
    "guidance_scale": "classifier-free guidance of next-token logits has no counterpart here",
}

# Arguments of Transformers' `generate` that are no fields of its configuration.
REFUSED_ARGUMENTS = {
    "assistant_model": _ASSIST,
    "stopping_criteria": _PREFIX,
    "prefix_allowed_tokens_fn": _PREFIX,
    "negative_prompt_ids": _PREFIX,
    "past_key_values": _CACHE,
    "decoder_input_ids": f"{_ONE_PASS}: fix `initial_latents` or `target_lengths` instead",
    "custom_generate": "`generate` is YAN's own already",
}


class YanGenerationConfig(GenerationConfig):
    """
    Generation parameters of [`YanForConditionalGeneration`].

    Args:
        max_new_tokens (`int`, *optional*): Longest target, the end token included; not more than the position table
            holds. Without it, `max_length` means the same (the source does not count), and without both the longest
            target is 128 tokens, or what the position table holds.
        min_new_tokens (`int`, *optional*): Shortest target that the length head may choose.
        num_inference_steps (`int`, defaults to 3): Solver steps. Each costs one pass of the flow trunk.
        expert_selection (`str`, defaults to `"sample"`): How each target token's expert is chosen at t = 0: `"sample"`
            draws from the gate, `"greedy"` takes its mode.
        expert_temperature (`float`, defaults to 1.0): Divides the gate's log-probabilities; below 1 sharpens it.
        init_noise (`float`, *optional*): Scale of the initial state, by default the model configuration's. 0 is the
            deterministic start.
        num_return_sequences (`int`, defaults to 1): Samples per source; rows are repeated in order.
        return_dict_in_generate (`bool`, defaults to `False`): Whether to return a [`YanGenerateOutput`].
        output_scores (`bool`, defaults to `False`): Whether that holds the logits.
        output_trajectory (`bool`, defaults to `False`): Whether it holds the state after every step.
        output_expert_indices (`bool`, defaults to `False`): Whether it holds the chosen experts.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*): By default the model configuration's.

    Raises:
        ValueError: for an unknown field, a value out of range, or an option of autoregressive decoding, with the
            reason.
    """

    def __init__(self, **kwargs: Any):
        self.num_inference_steps: int | None = kwargs.pop("num_inference_steps", None)
        self.expert_selection: str | None = kwargs.pop("expert_selection", None)
        self.expert_temperature: float | None = kwargs.pop("expert_temperature", None)
        self.init_noise: float | None = kwargs.pop("init_noise", None)
        self.output_trajectory: bool | None = kwargs.pop("output_trajectory", None)
        self.output_expert_indices: bool | None = kwargs.pop("output_expert_indices", None)
        known = {*vars(GenerationConfig()), "_commit_hash", "_original_object_hash"}
        if unknown := sorted(set(kwargs) - known):
            raise ValueError(
                f"`{unknown[0]}` is not a generation parameter of YAN; see the docstring for those it has."
            )
        super().__init__(**kwargs)

    @classmethod
    def from_model_config(cls, model_config: PreTrainedConfig) -> "YanGenerationConfig":
        return cls(
            pad_token_id=model_config.pad_token_id,
            bos_token_id=model_config.bos_token_id,
            eos_token_id=model_config.eos_token_id,
            max_new_tokens=min(DEFAULT_MAX_LENGTH, model_config.max_position_embeddings),
            num_inference_steps=model_config.solver_steps,
        )

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        # `Seq2SeqTrainer` writes these into the fields that are unset.
        return {**GenerationConfig._get_default_generation_params(), "max_length": DEFAULT_MAX_LENGTH}

    def resolve(self, model_config: PreTrainedConfig) -> "YanGenerationConfig":
        """
        Fills every unset field that `generate` reads, in place.

        Raises:
            ValueError: where the longest target does not fit the position table.
        """
        for name, value in {
            "num_inference_steps": model_config.solver_steps,
            "expert_selection": "sample",
            "expert_temperature": 1.0,
            "init_noise": model_config.init_noise,
            "num_return_sequences": 1,
            "min_new_tokens": 1,
            "pad_token_id": model_config.pad_token_id,
            "eos_token_id": model_config.eos_token_id,
        }.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        table_size = model_config.max_position_embeddings
        if self.max_new_tokens is None:
            # The default is the one length that shrinks to fit; see `_get_default_generation_params`.
            if self.max_length in (None, DEFAULT_MAX_LENGTH):
                self.max_length = min(DEFAULT_MAX_LENGTH, table_size)
            self.max_new_tokens = self.max_length
        if self.max_new_tokens > table_size:
            raise ValueError(
                f"`max_new_tokens={self.max_new_tokens}` is more than the position table's "
                f"`max_position_embeddings={table_size}`. Ask for at most that many."
            )
        self.validate()
        return self

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None):
        """Raises `ValueError` for a value that is out of range or that only autoregressive decoding knows."""
        neutral = {**GenerationConfig._get_default_generation_params(), "guidance_scale": 1.0, "penalty_alpha": 0.0}
        for name, value in vars(self).items():
            if name in _READ or name.startswith("_") or value is None or value is False or value == neutral.get(name):
                continue
            raise ValueError(f"`{name}={value!r}` is not possible: {_REASONS.get(name, 'YAN has no use for it')}.")
        for name in ("max_new_tokens", "max_length", "min_new_tokens", "num_inference_steps", "num_return_sequences"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be an integer of at least 1, but is {value!r}.")
        longest = self.max_new_tokens or self.max_length
        if self.min_new_tokens is not None and longest is not None and self.min_new_tokens > longest:
            raise ValueError(f"`min_new_tokens={self.min_new_tokens}` is more than the longest target, {longest}.")
        if self.expert_selection not in (None, "sample", "greedy"):
            raise ValueError(f'`expert_selection` must be "sample" or "greedy", but is {self.expert_selection!r}.')
        for name, positive in (("expert_temperature", True), ("init_noise", False)):
            value = getattr(self, name)
            if value is None:
                continue
            if (
                not isinstance(value, (int, float))
                or not math.isfinite(value)
                or value < 0
                or (positive and not value)
            ):
                raise ValueError(f"`{name}` must be {'positive' if positive else 'at least 0'}, but is {value!r}.")
        for name in ("return_dict_in_generate", "output_scores", "output_trajectory", "output_expert_indices"):
            if getattr(self, name) not in (None, True, False):
                raise ValueError(f"`{name}` must be true or false, but is {getattr(self, name)!r}.")


__all__ = ["REFUSED_ARGUMENTS", "YanGenerationConfig"]
