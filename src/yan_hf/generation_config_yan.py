# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The generation configuration: what `generate` takes, with its defaults, and what it refuses."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, get_args

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

from .configuration_yan import ExpertScope, Routing, YanConfig, check_block_size
from .solver import DEFAULT_TIME_SHIFT, SOLVERS, TIME_SCHEDULES, time_grid


logger = logging.get_logger(__name__)

DEFAULT_MAX_LENGTH = 128
_ONE_PASS = "YAN writes all tokens at once instead of extending a prefix"
_BEAMS = f"{_ONE_PASS}, so there are no beams to search"
_PREFIX = f"{_ONE_PASS}, so a penalty or constraint on the tokens so far does not apply"
_ASSIST = f"{_ONE_PASS}, so there are no next tokens for an assistant to draft"
_CACHE = "the state of the solver is recomputed at every step, so there is no key-value cache of generated tokens"


@dataclass(frozen=True)
class Check:
    """What an option may be, in words and as a function. `None`, an unset option, is never checked."""

    accepts: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Option:
    """An option of `generate`: everything that is said about it, once."""

    # What an unset option becomes, or a function of the model's configuration whose docstring says what it returns;
    # with `None` the option stays unset.
    default: Any
    check: Check | None  # `None` where Transformers checks it
    help: str  # one line, for the documentation and the command line
    only_sampling: bool = False  # whether it is read with `do_sample` only
    command_line: bool = True  # whether it is an argument of `yan-hf generate`

    @property
    def default_text(self) -> str:
        """The default in words."""
        if callable(self.default):
            return self.default.__doc__ or "from the model's configuration"
        return "unset" if self.default is None else f"`{self.default}`"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(lowest: int) -> Check:
    return Check(f"an integer of at least {lowest}", lambda value: _is_integer(value) and value >= lowest)


def _one_of(choices: Iterable[str]) -> Check:
    return Check(f"one of {', '.join(choices)}", lambda value: value in tuple(choices))


def _is_schedule(value: Any) -> bool:
    if not isinstance(value, (list, tuple)):
        return value in TIME_SCHEDULES
    rises = all(map(_is_number, value)) and all(start < end for start, end in pairwise(value))
    return rises and len(value) > 1 and value[0] == 0 and value[-1] == 1


BOOLEAN = Check("true or false", lambda value: value in (True, False))
_COUNT = _integer(1)
_POSITIVE = Check("positive", lambda value: _is_number(value) and value > 0)
_NOT_NEGATIVE = Check("at least 0", lambda value: _is_number(value) and value >= 0)
_SHARE = Check("in [0, 1]", lambda value: _is_number(value) and 0 <= value <= 1)
_SCHEDULE = Check(f"one of {', '.join(TIME_SCHEDULES)}, or a list of times that increase from 0 to 1", _is_schedule)
_TOKEN = Check("the number of a token", _is_integer)
_TOKENS = Check(
    "a list of token numbers", lambda value: isinstance(value, (list, tuple)) and all(map(_is_integer, value))
)
_END_TOKENS = Check("a token number, or a list of them", lambda value: _TOKEN.holds(value) or _TOKENS.holds(value))
_COMPILE_CONFIG = Check("a `CompileConfig`", lambda value: isinstance(value, (CompileConfig, dict)))


def _default_length(model_config: PreTrainedConfig) -> int:
    """128, or what the position table holds"""
    return min(DEFAULT_MAX_LENGTH, model_config.max_position_embeddings)


def _field(name: str) -> Callable[[PreTrainedConfig], Any]:
    """A default that is a field of the model's configuration."""

    def default(model_config: PreTrainedConfig) -> Any:
        return getattr(model_config, name)

    default.__doc__ = f"the model's `{name}`"
    return default


# What `generate` reads. All other fields of Transformers' configuration must keep a value that changes nothing.
# Fields, defaults, checks, docstring, the documentation's table and the command line's arguments are made from this.
OPTIONS = {
    "num_inference_steps": Option(_field("solver_steps"), _COUNT, "solver steps"),
    "solver": Option(
        "euler",
        _one_of(SOLVERS),
        "how the ODE is solved; passes of the flow trunk a step: euler 1, midpoint and heun 2, rk4 4",
    ),
    "time_schedule": Option("uniform", _SCHEDULE, "times that the steps lead through; a list has one more than steps"),
    "time_shift": Option(
        None,
        _POSITIVE,
        f"of the shifted schedule, {DEFAULT_TIME_SHIFT:g} if unset; above 1 makes the steps near the noise short",
    ),
    "max_new_tokens": Option(
        _default_length, _COUNT, "longest target, the end token included; the source does not count"
    ),
    "max_length": Option(None, _COUNT, "means the same, where `max_new_tokens` is unset", command_line=False),
    "min_new_tokens": Option(
        1, _COUNT, "shortest target: no shorter length is predicted, no end token is taken before it"
    ),
    "num_length_candidates": Option(1, _COUNT, "how many of the likeliest lengths are tried, as rows of one batch"),
    "length_slack": Option(
        0, _integer(0), "positions added to a predicted length, for models trained with canvas slack"
    ),
    "num_return_sequences": Option(1, _COUNT, "texts for each source; rows are repeated in order"),
    "num_candidates": Option(1, _COUNT, "samples drawn for each returned sequence, of which the best is kept"),
    "rerank": Option(
        "score",
        _one_of(("score", "joint", "cycle", "mbr")),
        "what is best: score, the mean log-probability of the tokens; joint, that, the length's and that of shared "
        "choices of experts (take it with several lengths); cycle, the distance of the latents to those of the text; "
        "mbr, token F1 with the others",
    ),
    "expert_selection": Option(
        "sample",
        _one_of(("sample", "greedy", "stratified")),
        "how experts are chosen: drawn from the gate; its mode; or, where choices are shared, the samples of a source "
        "divide the gate among them, the first at its mode, and go different ways",
    ),
    "expert_temperature": Option(1.0, _POSITIVE, "divides the gate's log-probabilities; below 1 sharpens it"),
    "expert_scope": Option(
        _field("expert_scope"), _one_of(get_args(ExpertScope)), "whose tokens share one choice of expert"
    ),
    "reselect_experts": Option(
        _field("reselect_experts"), BOOLEAN, "whether experts are chosen anew at every solver step"
    ),
    "keep_known": Option(
        _field("keep_known"), BOOLEAN, "whether the known tokens around a source's masks are taken over as they are"
    ),
    "copy_bias": Option(
        0.0,
        _NOT_NEGATIVE,
        "added to the logit of the source token that a position starts from: above 0 less is changed; needs a start "
        "at the source's tokens",
    ),
    "init_noise": Option(
        _field("init_noise"), _NOT_NEGATIVE, "scale of the initial state; 0 is the deterministic start"
    ),
    "routing": Option(
        _field("routing"),
        _one_of(get_args(Routing)),
        "token: each token chooses among all experts; block: inside the core set that its block agrees on",
    ),
    "routing_block_size": Option(
        _field("routing_block_size"),
        _COUNT,
        "real target tokens of a block; the position table's size is the whole target",
    ),
    "routing_top_k": Option(
        _field("routing_top_k"), _COUNT, "how many experts a token votes for; `num_experts` is all of them"
    ),
    "core_threshold": Option(
        _field("core_threshold"), _SHARE, "share of a block's votes that its core set has to exceed"
    ),
    "min_experts": Option(_field("min_experts"), _COUNT, "least size of a core set"),
    "do_sample": Option(
        False, BOOLEAN, "whether tokens are drawn from the final logits, each by itself, instead of the argmax"
    ),
    "temperature": Option(None, _POSITIVE, "divides the final logits", only_sampling=True),
    "top_k": Option(None, _integer(0), "only so many likeliest tokens; 50 if unset, 0 for all", only_sampling=True),
    "top_p": Option(None, None, "only the likeliest tokens that have this share together", only_sampling=True),
    "min_p": Option(None, None, "only tokens with this share of the likeliest one's", only_sampling=True),
    "typical_p": Option(None, None, "only the most typical tokens with this share together", only_sampling=True),
    "suppress_tokens": Option(None, _TOKENS, "list of token ids that are never taken"),
    "renormalize_logits": Option(False, BOOLEAN, "changes nothing: scores are normalised anyway", command_line=False),
    "stop_strings": Option(
        None, None, "the text is cut behind the first of them; `generate` needs `tokenizer` too", command_line=False
    ),
    "compile": Option(False, BOOLEAN, "whether to run the compiled fast path, with shapes rounded up to buckets"),
    "compile_config": Option(None, _COMPILE_CONFIG, "backend, mode and options of the compiler", command_line=False),
    "return_dict_in_generate": Option(False, BOOLEAN, "whether to return a `YanGenerateOutput`", command_line=False),
    "output_scores": Option(False, BOOLEAN, "whether that holds the logits", command_line=False),
    "output_trajectory": Option(False, BOOLEAN, "whether it holds the state after every step", command_line=False),
    "output_drafts": Option(False, BOOLEAN, "whether it holds the tokens after every step", command_line=False),
    "output_expert_indices": Option(False, BOOLEAN, "whether it holds the chosen experts", command_line=False),
    "output_routing": Option(
        False, BOOLEAN, "whether it holds each block's core set and number of distinct experts", command_line=False
    ),
    "pad_token_id": Option(_field("pad_token_id"), _TOKEN, "fills rows behind their end", command_line=False),
    "bos_token_id": Option(None, _TOKEN, "unused: a target begins with its first token", command_line=False),
    "eos_token_id": Option(_field("eos_token_id"), _END_TOKENS, "the end token, or several", command_line=False),
}

# As in Transformers, left aside with a warning where they have no part: without sampling, and without beams.
_LEFT_ASIDE = {"early_stopping", "length_penalty"}

# Why they are refused, where more can be said than that `generate` has no use for them.
_REASONS = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "diversity_penalty"), _BEAMS),
    **dict.fromkeys(("constraints", "force_words_ids"), _BEAMS),
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
    Generation parameters of [`YanForConditionalGeneration`]: every option of `OPTIONS` is a field, `None` where unset.

    Raises:
        ValueError: for an unknown field, a value out of range, or an option of autoregressive decoding, with the
            reason.
    """

    def __init__(self, **kwargs: Any):
        kwargs = {name: plain_value(value) for name, value in kwargs.items()}
        inherited = vars(GenerationConfig())
        for name in OPTIONS:
            if name not in inherited:
                setattr(self, name, kwargs.pop(name, None))
        if unknown := sorted(kwargs.keys() - inherited.keys() - {"_commit_hash", "_original_object_hash"}):
            name = unknown[0]
            raise ValueError(f"`{name}` is not a generation parameter of YAN; see the docstring for those it has.")
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
        tokens = {name: getattr(model_config, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        lengths = {"max_new_tokens": _default_length(model_config), "num_inference_steps": model_config.solver_steps}
        return cls(**tokens, **lengths)

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        # `Seq2SeqTrainer` writes these into the fields that are unset.
        return {**GenerationConfig._get_default_generation_params(), "max_length": DEFAULT_MAX_LENGTH}

    def resolve(self, model_config: PreTrainedConfig) -> "YanGenerationConfig":
        """
        Fills every unset field that `generate` reads, in place. Raises `ValueError` for what does not fit the model's
        position table, experts or vocabulary.
        """
        if isinstance(self.time_schedule, (list, tuple)):
            self.num_inference_steps = len(self.time_schedule) - 1
        # 128 is what Seq2SeqTrainer writes into `max_length`; see `_get_default_generation_params`.
        if self.max_new_tokens is None and self.max_length != DEFAULT_MAX_LENGTH:
            self.max_new_tokens = self.max_length
        for name, option in OPTIONS.items():
            if getattr(self, name) is None:
                setattr(self, name, option.default(model_config) if callable(option.default) else option.default)
        if self.do_sample and self.top_k is None:
            self.top_k = GenerationConfig._get_default_generation_params().get("top_k")
        limits = dict.fromkeys(("routing_top_k", "min_experts"), "num_experts")
        for name, limit in {**limits, "max_new_tokens": "max_position_embeddings"}.items():
            value, highest = getattr(self, name) or 1, getattr(model_config, limit)
            if value > highest:
                raise ValueError(
                    f"`{name}={value}` is more than the model's `{limit}={highest}`. Ask for at most that many."
                )
        if self.expert_selection == "stratified" and self.expert_scope == "token":
            raise ValueError(
                '`expert_selection="stratified"` divides choices that tokens share, but with `expert_scope="token"` '
                'each has its own. Take "sample", or the scope "block" or "target" if the model was trained with it.'
            )
        check_block_size(self)
        if self.copy_bias and model_config.start_state == "noise":
            raise ValueError(
                f"`copy_bias={self.copy_bias}` needs a model whose flow starts at the source's tokens, but its "
                '`start_state` is "noise". Leave it out.'
            )
        if self.keep_known and model_config.start_state != "aligned":
            raise ValueError(
                f'`keep_known` needs a model with `start_state="aligned"`, which knows where the source\'s tokens '
                f"stand in the target; this one has {model_config.start_state!r}."
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
        for name, value in vars(self).items():
            option = OPTIONS.get(name)
            if name.startswith("_") or name == "transformers_version" or value is None:
                continue
            if option is not None and (self.do_sample or not option.only_sampling):
                if option.check is not None and not option.check.holds(value):
                    raise ValueError(f"`{name}` must be {option.check.accepts}, but is {value!r}.")
            elif value in (False, [], {}, neutral.get(name)):
                continue
            elif option is not None or name in _LEFT_ASIDE:
                missing = "`do_sample=True`" if option is not None else "beams, which YAN does not have"
                logger.warning_once(f"`{name}={value!r}` changes nothing without {missing}.")
            else:
                raise ValueError(f"`{name}={value!r}` is not possible: {_REASONS.get(name, 'YAN has no use for it')}.")
        self._validate_together()
        try:
            make_processors(self)
        except (TypeError, ValueError) as error:
            # Transformers' message tells the value, but not always the field.
            names = [name for name, option in OPTIONS.items() if option.only_sampling or name == "suppress_tokens"]
            given = ", ".join(f"`{name}={value!r}`" for name in names if (value := getattr(self, name)) is not None)
            raise ValueError(f"One of {given} is not possible: {error}") from error

    def _validate_together(self):
        """The checks across fields."""
        longest = self.max_new_tokens or self.max_length
        if self.min_new_tokens is not None and longest is not None and self.min_new_tokens > longest:
            raise ValueError(f"`min_new_tokens={self.min_new_tokens}` is more than the longest target, {longest}.")
        schedule = self.time_schedule
        if isinstance(schedule, (list, tuple)) and self.num_inference_steps not in (None, len(schedule) - 1):
            raise ValueError(
                f"`num_inference_steps={self.num_inference_steps}` contradicts `time_schedule`, whose "
                f"{len(schedule)} times are {len(schedule) - 1} steps. Leave it out."
            )
        if self.time_shift is not None and schedule != "shifted":
            raise ValueError(
                f'`time_shift={self.time_shift}` belongs to `time_schedule="shifted"`, but that is {schedule!r}.'
            )


YanGenerationConfig.__doc__ = f"{YanGenerationConfig.__doc__}\n    Args:\n" + "".join(
    f"        {name}: {option.help} (default: {option.default_text})\n" for name, option in OPTIONS.items()
)


def make_processors(config: PreTrainedConfig, device: torch.device | str = "cpu") -> LogitsProcessorList:
    """
    Transformers' processors that the generation configuration asks for, in Transformers' order; they raise
    `ValueError` for values out of range.
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
