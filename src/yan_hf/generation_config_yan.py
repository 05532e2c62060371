# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The generation configuration: what `generate` takes, with its defaults, and what it refuses."""

import math
from dataclasses import fields
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import CompileConfig, GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.utils import logging

from .configuration_yan import EXPERT_SCOPES, ROUTINGS, YanConfig
from .solver import DEFAULT_TIME_SHIFT, SOLVERS, TIME_SCHEDULES, time_grid


logger = logging.get_logger(__name__)

DEFAULT_MAX_LENGTH = 128
RERANKERS = ("score", "joint", "cycle", "mbr")

_ONE_PASS = "YAN writes all tokens at once instead of extending a prefix"
_BEAMS = f"{_ONE_PASS}, so there are no beams to search"
_PREFIX = f"{_ONE_PASS}, so a penalty or constraint on the tokens so far does not apply"
_ASSIST = f"{_ONE_PASS}, so there are no next tokens for an assistant to draft"
_CACHE = "the state of the solver is recomputed at every step, so there is no key-value cache of generated tokens"

# The fields that `generate` reads. All others of Transformers' configuration must keep a value that changes nothing.
_READ = {
    "max_new_tokens",
    "max_length",
    "min_new_tokens",
    "num_inference_steps",
    "solver",
    "time_schedule",
    "time_shift",
    "num_length_candidates",
    "length_slack",
    "num_candidates",
    "rerank",
    "compile",
    "compile_config",
    "do_sample",
    "suppress_tokens",
    "stop_strings",
    "renormalize_logits",
    "expert_selection",
    "expert_temperature",
    "init_noise",
    "routing",
    "expert_scope",
    "reselect_experts",
    "routing_block_size",
    "routing_top_k",
    "core_threshold",
    "min_experts",
    "num_return_sequences",
    "return_dict_in_generate",
    "output_scores",
    "output_trajectory",
    "output_expert_indices",
    "output_routing",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "transformers_version",
}

# Read too, but only with `do_sample`.
_READ_IF_SAMPLED = {"temperature", "top_k", "top_p", "min_p", "typical_p"}

# As in Transformers, left aside with a warning where they have no part: without sampling, and without beams.
_LEFT_ASIDE = {"early_stopping", "length_penalty"}

# Why they are refused, where more can be said than that `generate` has no use for them.
_REASONS = {
    **dict.fromkeys(
        ("num_beams", "num_beam_groups", "diversity_penalty", "constraints", "force_words_ids"),
        _BEAMS,
    ),
    **dict.fromkeys(("repetition_penalty", "no_repeat_ngram_size", "penalty_alpha"), _PREFIX),
    **dict.fromkeys(("encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "dola_layers"), _PREFIX),
    **dict.fromkeys(("begin_suppress_tokens", "forced_bos_token_id", "decoder_start_token_id"), _PREFIX),
    **dict.fromkeys(("prompt_lookup_num_tokens", "use_mtp"), _ASSIST),
    **dict.fromkeys(("cache_implementation", "cache_config"), _CACHE),
    "bad_words_ids": "tokens are chosen by themselves; list single ones in `suppress_tokens`",
    "min_length": "`min_new_tokens` is the shortest target, and the source does not count",
    "max_time": "the number of solver steps is fixed in advance; lower `num_inference_steps`",
    "guidance_scale": "classifier-free guidance of next-token logits has no counterpart here",
}

# Arguments of Transformers' `generate` that are no fields of its configuration.
REFUSED_ARGUMENTS = {
    "assistant_model": _ASSIST,
    "prefix_allowed_tokens_fn": _PREFIX,
    "negative_prompt_ids": _PREFIX,
    "past_key_values": _CACHE,
    "decoder_input_ids": f"{_ONE_PASS}: fix `initial_latents` or `target_lengths` instead",
    "custom_generate": "`generate` is YAN's own already",
}


def plain_value(value: Any) -> Any:
    """NumPy's and torch's numbers and arrays as Python's own, in which a configuration is checked and saved."""
    return value.tolist() if isinstance(value, (np.generic, np.ndarray, torch.Tensor)) else value


class YanGenerationConfig(GenerationConfig):
    """
    Generation parameters of [`YanForConditionalGeneration`].

    Args:
        max_new_tokens (`int`, *optional*): Longest target, the end token included; not more than the position table
            holds. Without it, `max_length` means the same (the source does not count), and without both the longest
            target is 128 tokens, or what the position table holds.
        min_new_tokens (`int`, *optional*): Shortest target, the end token included: shorter lengths are not predicted,
            and no end token is taken before it.
        num_inference_steps (`int`, defaults to 3): Solver steps. Each costs as many passes of the flow trunk as the
            solver has stages.
        solver (`str`, defaults to `"euler"`): `"euler"` (one pass a step), `"midpoint"`, `"heun"` (two) or `"rk4"`
            (four). Compare their quality at equal passes.
        time_schedule (`str` or `list[float]`, defaults to `"uniform"`): `"uniform"`, `"cosine"` or `"shifted"` (see
            [`~yan_hf.solver.time_grid`]), or an increasing list of times from 0 to 1, one more than steps.
        time_shift (`float`, *optional*): Of the shifted schedule, 3 by default; above 1 makes the steps near the
            noise short.
        num_length_candidates (`int`, defaults to 1): How many of the likeliest lengths are tried, as rows of one
            batch.
        length_slack (`int`, defaults to 0): Positions added to a predicted length, for models that were trained with
            canvas slack ([`YanDataCollator`]): the end token then cuts the text.
        num_candidates (`int`, defaults to 1): Samples drawn for each returned sequence, of which the best is kept.
        rerank (`str`, defaults to `"score"`): How the best of all candidates is chosen, those of several lengths
            included: `"score"`, the mean log-probability of the tokens; `"joint"`, the same with the log-probability
            of the predicted length added to the sum before the mean; `"cycle"`, the distance between the latents and
            the encoder's of the text; `"mbr"`, the token F1 with the other candidates. The score breaks a tie. With
            length candidates prefer `"joint"`: a text can be likely on a canvas of an unlikely length.
        do_sample (`bool`, defaults to `False`): Whether tokens are drawn from the final logits, each position by
            itself, rather than their argmax.
        temperature, top_k, top_p, min_p, typical_p (*optional*): With `do_sample`, as in Transformers, whose
            processors and defaults they are (so `top_k` is 50; 0 turns it off).
        suppress_tokens (`list[int]`, *optional*): Tokens that are never taken.
        stop_strings (`str` or `list[str]`, *optional*): The text is cut behind the first of them; `generate` needs the
            `tokenizer` then.
        compile (`bool`, defaults to `False`): Whether to run the compiled fast path, with lengths and batch rounded up
            to buckets ([`~yan_hf.inference.compiled`]).
        compile_config (`CompileConfig`, *optional*): Backend, mode and options of the compiler.
        expert_selection (`str`, defaults to `"sample"`): How each target token's expert is chosen at t = 0: `"sample"`
            draws from the gate, `"greedy"` takes its mode.
        expert_temperature (`float`, defaults to 1.0): Divides the gate's log-probabilities; below 1 sharpens it.
        init_noise (`float`, *optional*): Scale of the initial state, by default the model configuration's. 0 is the
            deterministic start.
        expert_scope (`str`, *optional*): Whose tokens share one choice of expert, `"token"`, `"block"` or
            `"target"`; by default the model configuration's.
        reselect_experts (`bool`, *optional*): Whether experts are chosen anew at every solver step; by default the
            model configuration's.
        routing (`str`, *optional*): `"token"` or `"block"`; this and the next four are explained in [`YanConfig`] and
            by default the model configuration's.
        routing_block_size (`int`, *optional*): Real target tokens of a block; the position table's size is the whole
            target, whatever the model configuration says.
        routing_top_k (`int`, *optional*): Experts that a token votes for; `num_experts` is all of them.
        core_threshold (`float`, *optional*): Share of a block's votes that its core set has to exceed.
        min_experts (`int`, *optional*): Least size of a core set.
        num_return_sequences (`int`, defaults to 1): Samples per source; rows are repeated in order.
        return_dict_in_generate (`bool`, defaults to `False`): Whether to return a [`YanGenerateOutput`].
        output_scores (`bool`, defaults to `False`): Whether that holds the logits.
        output_trajectory (`bool`, defaults to `False`): Whether it holds the state after every step.
        output_expert_indices (`bool`, defaults to `False`): Whether it holds the chosen experts.
        output_routing (`bool`, defaults to `False`): Whether it holds each block's core set and its number of distinct
            experts.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*): By default the model configuration's.

    Raises:
        ValueError: for an unknown field, a value out of range, or an option of autoregressive decoding, with the
            reason.
    """

    def __init__(self, **kwargs: Any):
        kwargs = {name: plain_value(value) for name, value in kwargs.items()}
        self.num_inference_steps: int | None = kwargs.pop("num_inference_steps", None)
        self.solver: str | None = kwargs.pop("solver", None)
        self.time_schedule: str | list[float] | None = kwargs.pop("time_schedule", None)
        self.time_shift: float | None = kwargs.pop("time_shift", None)
        self.num_length_candidates: int | None = kwargs.pop("num_length_candidates", None)
        self.length_slack: int | None = kwargs.pop("length_slack", None)
        self.num_candidates: int | None = kwargs.pop("num_candidates", None)
        self.rerank: str | None = kwargs.pop("rerank", None)
        self.compile: bool | None = kwargs.pop("compile", None)
        self.expert_selection: str | None = kwargs.pop("expert_selection", None)
        self.expert_temperature: float | None = kwargs.pop("expert_temperature", None)
        self.init_noise: float | None = kwargs.pop("init_noise", None)
        self.routing: str | None = kwargs.pop("routing", None)
        self.expert_scope: str | None = kwargs.pop("expert_scope", None)
        self.reselect_experts: bool | None = kwargs.pop("reselect_experts", None)
        self.routing_block_size: int | None = kwargs.pop("routing_block_size", None)
        self.routing_top_k: int | None = kwargs.pop("routing_top_k", None)
        self.core_threshold: float | None = kwargs.pop("core_threshold", None)
        self.min_experts: int | None = kwargs.pop("min_experts", None)
        self.output_trajectory: bool | None = kwargs.pop("output_trajectory", None)
        self.output_expert_indices: bool | None = kwargs.pop("output_expert_indices", None)
        self.output_routing: bool | None = kwargs.pop("output_routing", None)
        known = {*vars(GenerationConfig()), "_commit_hash", "_original_object_hash"}
        if unknown := sorted(set(kwargs) - known):
            raise ValueError(
                f"`{unknown[0]}` is not a generation parameter of YAN; see the docstring for those it has."
            )
        super().__init__(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name: Any, config_file_name: Any = None, **kwargs: Any):
        """As in the base class. Raises `ValueError` with the file's name where it holds no usable configuration."""
        try:
            return super().from_pretrained(pretrained_model_name, config_file_name, **kwargs)
        except (AttributeError, TypeError, ValueError) as error:
            name = config_file_name or "generation_config.json"
            raise ValueError(f"{name} of {pretrained_model_name} cannot be used: {error}") from error

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "YanGenerationConfig":
        """As in the base class. A model's `from_pretrained` passes on what overrides the model's own configuration."""
        known = vars(cls())
        overrides = {field.name for field in fields(YanConfig) if field.name not in known}
        return super().from_dict(config_dict, **{name: kwargs[name] for name in kwargs if name not in overrides})

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
        if isinstance(self.time_schedule, (list, tuple)):
            self.num_inference_steps = len(self.time_schedule) - 1
        for name, value in {
            "num_inference_steps": model_config.solver_steps,
            "solver": "euler",
            "time_schedule": "uniform",
            "num_length_candidates": 1,
            "length_slack": 0,
            "num_candidates": 1,
            "rerank": "score",
            "compile": False,
            "do_sample": False,
            "expert_selection": "sample",
            "expert_temperature": 1.0,
            "init_noise": model_config.init_noise,
            "routing": model_config.routing,
            "expert_scope": model_config.expert_scope,
            "reselect_experts": model_config.reselect_experts,
            "routing_block_size": model_config.routing_block_size,
            "routing_top_k": model_config.routing_top_k,
            "core_threshold": model_config.core_threshold,
            "min_experts": model_config.min_experts,
            "num_return_sequences": 1,
            "min_new_tokens": 1,
            "pad_token_id": model_config.pad_token_id,
            "eos_token_id": model_config.eos_token_id,
        }.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.do_sample and self.top_k is None:
            self.top_k = GenerationConfig._get_default_generation_params().get("top_k")
        for name in ("routing_top_k", "min_experts"):
            if (getattr(self, name) or 1) > model_config.num_experts:
                raise ValueError(
                    f"`{name}={getattr(self, name)}` is more than the model's `num_experts="
                    f"{model_config.num_experts}`. Ask for at most that many."
                )
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
        for token in (*(self.suppress_tokens or ()), *self.end_token_ids(), self.pad_token_id or 0):
            if not 0 <= token < model_config.vocab_size:
                raise ValueError(
                    f"The generation configuration names the token {token}, but the vocabulary has "
                    f"{model_config.vocab_size} tokens. Check `suppress_tokens`, `eos_token_id` and `pad_token_id`."
                )
        self.validate()
        return self

    def end_token_ids(self) -> list[int]:
        """The end tokens as a list, which may be empty."""
        if self.eos_token_id is None:
            return []
        return [self.eos_token_id] if isinstance(self.eos_token_id, int) else list(self.eos_token_id)

    def times(self) -> list[float]:
        """The solver's grid, of a resolved configuration."""
        if isinstance(self.time_schedule, (list, tuple)):
            return [float(time) for time in self.time_schedule]
        shift = DEFAULT_TIME_SHIFT if self.time_shift is None else self.time_shift
        return time_grid(self.num_inference_steps, self.time_schedule, shift)

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None):
        """Raises `ValueError` for a value that is out of range or that only autoregressive decoding knows."""
        neutral = {**GenerationConfig._get_default_generation_params(), "guidance_scale": 1.0, "penalty_alpha": 0.0}
        read = _READ | _READ_IF_SAMPLED if self.do_sample else _READ
        for name, value in vars(self).items():
            if name in read or name.startswith("_") or value in (None, False, [], {}, neutral.get(name)):
                continue
            if name in _READ_IF_SAMPLED | _LEFT_ASIDE:
                missing = "`do_sample=True`" if name in _READ_IF_SAMPLED else "beams, which YAN does not have"
                logger.warning_once(f"`{name}={value!r}` changes nothing without {missing}.")
                continue
            raise ValueError(f"`{name}={value!r}` is not possible: {_REASONS.get(name, 'YAN has no use for it')}.")
        for name in (
            "return_dict_in_generate",
            "output_scores",
            "output_trajectory",
            "output_expert_indices",
            "output_routing",
            "reselect_experts",
            "compile",
            "do_sample",
        ):
            if getattr(self, name) not in (None, True, False):
                raise ValueError(f"`{name}` must be true or false, but is {getattr(self, name)!r}.")
        self._validate_numbers()
        self._validate_choices()
        try:
            make_processors(self)
        except (TypeError, ValueError) as error:
            # Transformers' message tells the value, but not always the field.
            fields = {name: getattr(self, name) for name in (*sorted(_READ_IF_SAMPLED), "suppress_tokens")}
            given = ", ".join(f"`{name}={value!r}`" for name, value in fields.items() if value is not None)
            raise ValueError(f"One of {given} is not possible: {error}") from error

    def _validate_numbers(self):
        at_least_one = ("max_new_tokens", "max_length", "min_new_tokens", "num_inference_steps")
        at_least_one += ("num_return_sequences", "num_length_candidates", "num_candidates")
        at_least_one += ("routing_block_size", "routing_top_k", "min_experts")
        for name in (*at_least_one, "length_slack", *(["top_k"] if self.do_sample else [])):
            value, lowest = getattr(self, name), int(name in at_least_one)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < lowest):
                raise ValueError(f"`{name}` must be an integer of at least {lowest}, but is {value!r}.")
        for name in ("eos_token_id", "suppress_tokens", "pad_token_id", "bos_token_id"):
            value = getattr(self, name)
            is_list = name in ("eos_token_id", "suppress_tokens") and isinstance(value, (list, tuple))
            if not all(token is None or type(token) is int for token in (value if is_list else [value])) or (
                is_list and None in value
            ):
                raise ValueError(f"`{name}` must name tokens by their numbers, but is {value!r}.")
        longest = self.max_new_tokens or self.max_length
        if self.min_new_tokens is not None and longest is not None and self.min_new_tokens > longest:
            raise ValueError(f"`min_new_tokens={self.min_new_tokens}` is more than the longest target, {longest}.")
        for name, positive in (
            ("expert_temperature", True),
            ("temperature", True),
            ("time_shift", True),
            ("init_noise", False),
        ):
            value = getattr(self, name) if name != "temperature" or self.do_sample else None
            if value is not None and not (
                isinstance(value, (int, float))
                and not isinstance(value, bool)
                and math.isfinite(value)
                and (value > 0 or (value == 0 and not positive))
            ):
                raise ValueError(f"`{name}` must be {'positive' if positive else 'at least 0'}, but is {value!r}.")
        share = self.core_threshold
        if share is not None and not (
            isinstance(share, (int, float)) and not isinstance(share, bool) and 0 <= share <= 1
        ):
            raise ValueError(f"`core_threshold` must be in [0, 1], but is {share!r}.")

    def _validate_choices(self):
        for name, choices in (
            ("expert_selection", ("sample", "greedy")),
            ("solver", tuple(SOLVERS)),
            ("rerank", RERANKERS),
            ("routing", ROUTINGS),
            ("expert_scope", EXPERT_SCOPES),
        ):
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, but is {value!r}.")
        schedule = self.time_schedule
        if isinstance(schedule, (list, tuple)):
            if not (
                len(schedule) > 1
                and all(isinstance(time, (int, float)) and not isinstance(time, bool) for time in schedule)
                and schedule[0] == 0
                and schedule[-1] == 1
                and all(start < end for start, end in pairwise(schedule))
            ):
                raise ValueError(f"`time_schedule` must increase from 0 to 1, but is {schedule!r}.")
            if self.num_inference_steps not in (None, len(schedule) - 1):
                raise ValueError(
                    f"`num_inference_steps={self.num_inference_steps}` contradicts `time_schedule`, whose "
                    f"{len(schedule)} times are {len(schedule) - 1} steps. Leave it out."
                )
        elif schedule is not None and schedule not in TIME_SCHEDULES:
            raise ValueError(
                f"`time_schedule` must be one of {', '.join(TIME_SCHEDULES)} or a list of times, but is {schedule!r}."
            )
        if self.time_shift is not None and schedule != "shifted":
            raise ValueError(
                f'`time_shift={self.time_shift}` belongs to `time_schedule="shifted"`, but that is {schedule!r}.'
            )
        if self.compile_config is not None and not isinstance(self.compile_config, (CompileConfig, dict)):
            raise ValueError(f"`compile_config` must be a `CompileConfig`, but is {self.compile_config!r}.")


def make_processors(config: PreTrainedConfig, device: torch.device | str = "cpu") -> LogitsProcessorList:
    """
    Transformers' processors that the generation configuration asks for, in Transformers' order.

    Raises:
        ValueError: from the processors themselves, for values out of range.
    """
    processors = LogitsProcessorList()
    if config.suppress_tokens is not None:
        processors.append(SuppressTokensLogitsProcessor(config.suppress_tokens, device=device))
    if config.do_sample:
        if config.temperature is not None and config.temperature != 1.0:
            processors.append(TemperatureLogitsWarper(config.temperature))
        if config.top_k:
            processors.append(TopKLogitsWarper(top_k=config.top_k))
        if config.top_p is not None and config.top_p < 1.0:
            processors.append(TopPLogitsWarper(top_p=config.top_p))
        if config.min_p is not None:
            processors.append(MinPLogitsWarper(min_p=config.min_p))
        if config.typical_p is not None and config.typical_p < 1.0:
            processors.append(TypicalLogitsWarper(mass=config.typical_p))
    return processors


__all__ = ["REFUSED_ARGUMENTS", "RERANKERS", "YanGenerationConfig", "make_processors", "plain_value"]
