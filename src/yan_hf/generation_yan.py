# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`generate`: ODE sampling in the place of autoregressive decoding."""

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from .distributed import run_whole
from .experts import RoutingOptions, experts_of_blocks
from .generation_config_yan import REFUSED_ARGUMENTS, YanGenerationConfig, make_processors, plain_value
from .layers import KERNELS
from .sampling import (
    CandidateLayout,
    EagerSampler,
    NoiseSource,
    SampleOutput,
    Sampler,
    SamplingOptions,
    SourceInputs,
    consensus,
    cut_by_criteria,
    cycle_distance,
    decode_tokens,
    eval_view,
    given_lengths,
    predicted_lengths,
    truncate_at_eos,
)
from .solver import evaluation_times
from .validation import (
    check_choice,
    check_expert_indices,
    check_finite,
    check_functions,
    check_no_prefix_tuning,
    check_no_text_generation_pipeline,
    check_source,
    check_stopping_criteria,
    check_types,
    fitting_values,
    inference_module,
)


logger = logging.get_logger(__name__)


@dataclass
class YanGenerateOutput(ModelOutput):
    """
    Output of `generate` with `return_dict_in_generate=True`. `B` counts returned sequences.

    Args:
        sequences (`torch.LongTensor` of shape `(B, L)`): Generated tokens, padding after the end token.
        sequence_scores (`torch.FloatTensor` of shape `(B,)`): Mean log-probability of each sequence's tokens by the
            vocabulary head, before any processor.
        lengths (`torch.LongTensor` of shape `(B,)`): Tokens of each sequence, the end token included.
        length_mode (`str`): Where the canvas's length came from: `"predicted"` by the length head, `"slack"`
            (predicted and `length_slack` longer, so that the end token decides), or `"given"` by `target_lengths`.
        latents (`torch.FloatTensor` of shape `(B, L, d)`): The ODE's end.
        logits (`torch.FloatTensor` of shape `(B, L, V)`, *optional*): With `output_scores`; before any processor.
        trajectory (`torch.FloatTensor` of shape `(S + 1, B, L, d)`, *optional*): With `output_trajectory`: the initial
            state and the state after every solver step.
        expert_indices (`torch.LongTensor` of shape `(B, L)`, *optional*): With `output_expert_indices`; of shape
            `(S, B, L)` where experts are chosen anew at every one of `S` solver steps.
        distinct_experts (`torch.LongTensor` of shape `(B, N)`, *optional*): With `output_routing`: how many experts
            the tokens of each of a canvas's `N` blocks of `routing_block_size` tokens chose; 0 behind a shorter
            canvas. With token routing too.
        core_experts (`torch.BoolTensor` of shape `(B, N, K)`, *optional*): With `output_routing`: which experts each
            block could choose from; all with token routing, none behind a shorter canvas. Absent where
            `expert_indices` were given, since no gate was asked.
        num_field_evaluations (`int`): Passes of the flow trunk.
    """

    sequences: torch.LongTensor | None = None
    sequence_scores: torch.FloatTensor | None = None
    lengths: torch.LongTensor | None = None
    length_mode: str | None = None
    latents: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    trajectory: torch.FloatTensor | None = None
    expert_indices: torch.LongTensor | None = None
    distinct_experts: torch.LongTensor | None = None
    core_experts: torch.BoolTensor | None = None
    num_field_evaluations: int | None = None

    @property
    def scores(self) -> tuple[torch.FloatTensor, ...] | None:
        """`logits` as autoregressive models return them: `(B, V)` for each position."""
        return None if self.logits is None else self.logits.unbind(dim=1)


@dataclass
class GenerationInputs:
    """What the caller fixes beyond the configuration."""

    target_lengths: int | list[int] | torch.Tensor | None
    generator: torch.Generator | None
    seeds: torch.Tensor | list[int] | None
    initial_latents: torch.Tensor | None
    expert_indices: torch.Tensor | None
    stopping_criteria: StoppingCriteriaList
    has_processors: bool

    def width(self) -> int | None:
        """Positions that fixed latents and experts hold."""
        widths = []
        for name in ("initial_latents", "expert_indices"):
            values = getattr(self, name)
            if values is not None:
                if values.dim() < 2 or values.numel() == 0:
                    raise ValueError(f"`{name}` must hold a position for each token, but have {tuple(values.shape)}.")
                widths.append(values.shape[1 if name == "initial_latents" else -1])
        return min(widths, default=None)


@dataclass
class Texts:
    """
    The tokens of every row.

    Args:
        tokens: `(R, L)`, padding behind each text.
        lengths: Tokens of each text, the end token included, `(R,)`.
        kept: Which positions are the text's, `(R, L)`.
        scores: Mean log-probability of each text's tokens, `(R,)`, if asked for.
        logits: `(R, L, V)`, if asked for.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    kept: torch.Tensor
    scores: torch.Tensor | None
    logits: torch.Tensor | None

    def rows(self, index: torch.Tensor) -> "Texts":
        """Some of the rows."""
        values = (self.tokens, self.lengths, self.kept, self.scores, self.logits)
        return Texts(*(None if value is None else value[index] for value in values))


class YanGenerationMixin:
    """The `generate` of [`YanForConditionalGeneration`]."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        generation_config: YanGenerationConfig | None = None,
        streamer: BaseStreamer | None = None,
        logits_processor: LogitsProcessorList | None = None,
        generator: torch.Generator | None = None,
        target_lengths: int | list[int] | torch.Tensor | None = None,
        seeds: torch.Tensor | list[int] | None = None,
        initial_latents: torch.FloatTensor | None = None,
        expert_indices: torch.LongTensor | None = None,
        stopping_criteria: StoppingCriteriaList | list[StoppingCriteria] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        inputs: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> torch.LongTensor | YanGenerateOutput:
        """
        Generates whole targets at once:

        ```
        0. Resolve the generation configuration and check the inputs.
        1. Encode the source, once.
        2. Choose each target's length, or several.
        3. Draw the initial state, for every candidate.
        4. Solve the ODE: the first pass of the trunk chooses one expert per token and gives the first velocity.
        5. Decode, read off the tokens, cut after the end token.
        6. Keep the best candidate of each returned sequence.
        ```

        Args:
            input_ids: Source tokens, `(B, Lx)`.
            attention_mask: `(B, Lx)`, 1 on real source tokens. Padding may stand on either side.
            generation_config: Replaces the model's; keyword arguments override single fields of either. It may also
                come second by position, as in Transformers.
            streamer: Gets each step's draft through `put_draft`, where it has that, and then the tokens. Of several
                candidates the first one's drafts are shown.
            logits_processor: Transformers' processors, applied to the final logits of every position by itself, before
                those of the configuration. There is no prefix, so the ids they get are the source's.
            target_lengths: The targets' true lengths, end token included, where they are known: an int, or `(B,)`.
                Otherwise the length head predicts them.
            generator: Source of the randomness; the global one by default.
            seeds: One integer for each returned sequence instead of `generator`: a row's result then does not depend
                on the other rows, on padding or on the batch size. The first candidate is the one without candidates.
            initial_latents: The initial state `z0`, `(B, Ly, d)` for `B` returned sequences, which no noise scale
                multiplies; candidates share it. Its first positions are used where a target is shorter; predicted
                lengths stay within it.
            expert_indices: The experts, `(B, Ly)`, or `(S, B, Ly)` with `reselect_experts`, instead of a choice by the
                gate; candidates share them.
            stopping_criteria: Transformers' criteria. Each is asked about every beginning of the finished text, as if
                it had been written token by token, and the text is cut where one says so.
            tokenizer: Needed for `stop_strings`.
            inputs: Another name of `input_ids`, Transformers'.
            kwargs: Fields of [`YanGenerationConfig`]. Model inputs that `generate` has no use for (`labels` and what
                belongs to them) are ignored.

        Returns:
            Tokens `(B · num_return_sequences, L)`, or a [`YanGenerateOutput`].

        Raises:
            ValueError: for unknown, contradictory or autoregressive-only arguments, bad inputs (see
                [`YanForConditionalGeneration.forward`]), non-finite weights, options that leave no token to choose,
                criteria that ask for more than a text, PEFT's prefix tuning, and calls by the pipeline for language
                models.
            TypeError: for an argument that is no tensor, generator or list where it should be one.
        """
        # 0. Resolve the generation configuration and check the inputs.
        check_no_text_generation_pipeline()
        if isinstance(attention_mask, GenerationConfig) and generation_config is None:
            attention_mask, generation_config = None, attention_mask
        if inputs is not None and input_ids is not None:
            raise ValueError("`inputs` is another name of `input_ids`: pass one of them.")
        input_ids = inputs if input_ids is None else input_ids
        check_types(
            {
                "input_ids": (input_ids, torch.Tensor),
                "attention_mask": (attention_mask, torch.Tensor),
                "inputs_embeds": (kwargs.get("inputs_embeds"), torch.Tensor),
                "initial_latents": (initial_latents, torch.Tensor),
                "expert_indices": (expert_indices, torch.Tensor),
                "generation_config": (generation_config, GenerationConfig),
                "generator": (generator, torch.Generator),
                "tokenizer": (tokenizer, PreTrainedTokenizerBase),
            }
        )
        check_functions("logits_processor", logits_processor)
        check_functions("stopping_criteria", stopping_criteria)
        config, inputs_embeds = self._prepare_generation(generation_config, kwargs)
        if generator is not None and seeds is not None:
            raise ValueError("Pass `generator` or `seeds`, not both: each alone fixes the randomness.")
        check_source(self.config, input_ids, inputs_embeds, attention_mask, allow_empty_rows=False)
        check_no_prefix_tuning(self)
        criteria = StoppingCriteriaList(stopping_criteria or [])
        if config.stop_strings is not None:
            if tokenizer is None:
                raise ValueError("`stop_strings` are found in the text: pass the `tokenizer` too.")
            criteria.append(StopStringCriteria(tokenizer, config.stop_strings))
        check_stopping_criteria(criteria)
        given = GenerationInputs(
            target_lengths, generator, seeds, initial_latents, expert_indices, criteria, bool(logits_processor)
        )
        # Also a part alone may be in training mode, as an adapter that has just been added is.
        model = eval_view(self) if any(module.training for module in self.modules()) else self
        run_whole(self, "_generate_with")
        with self._fast_kernels(config):
            source = SourceInputs(input_ids, attention_mask, inputs_embeds)
            output = self._generate_with(model, config, source, streamer, logits_processor, given)
        return output if config.return_dict_in_generate else output.sequences

    def _generate_with(self, model: "YanGenerationMixin", *arguments: Any) -> YanGenerateOutput:
        """`_generate` of this model or of its view in eval mode, under whatever gathers this model's weights."""
        return model._generate(*arguments)

    def _generate(
        self,
        config: YanGenerationConfig,
        source: SourceInputs,
        streamer: BaseStreamer | None,
        logits_processor: LogitsProcessorList | None,
        given: GenerationInputs,
    ) -> YanGenerateOutput:
        sampler = self._sampler(config, streamer)
        layout, length_mode, encoded = self._prepare_lengths(config, sampler, source, given)
        noise = NoiseSource(layout, given.generator, given.seeds)
        start = self._prepare_latents(config, layout, noise, given)
        decoding = self._decoding_options(config, layout, source, logits_processor)
        sampled = self._sample(config, sampler, layout, source, encoded, start, decoding, streamer, given)
        texts = self._decode_tokens(config, layout, sampled, noise, decoding, given)
        layout, sampled, texts = self._select_candidates(config, layout, sampled, texts)
        if streamer is not None:
            streamer.put(texts.tokens.cpu())
            streamer.end()
        return self._output(config, length_mode, layout, sampled, texts, given)

    def _sampler(self, config: YanGenerationConfig, streamer: BaseStreamer | None) -> Sampler:
        if not config.compile:
            return EagerSampler(self)
        if hasattr(streamer, "put_draft"):
            logger.warning_once("`compile=True` is left aside for a streamer that shows drafts after every step.")
            return EagerSampler(self)
        if self.expert_offload is not None:
            raise ValueError(
                "`compile=True` is not possible with offloaded experts, whose copies no static program can hold. "
                "Leave it out, or call `disable_expert_offload()` first."
            )
        return inference_module("compiled").CompiledSampler(self, config.compile_config)

    def _prepare_lengths(
        self, config: YanGenerationConfig, sampler: Sampler, source: SourceInputs, given: GenerationInputs
    ) -> tuple[CandidateLayout, str, torch.Tensor | None]:
        """The rows with their lengths, where these come from, and the source's latents if they were needed."""
        num_sources, device = source.given.shape[0], source.given.device
        num_sequences = config.num_return_sequences * config.num_candidates
        encoded = None
        if given.target_lengths is None:
            if not self.length_head.is_trained(self.config):
                raise ValueError(
                    "The length head of this model has never been trained (`config.length_head_trained` is False; "
                    "research checkpoints have none), so lengths cannot be predicted. Pass `target_lengths`, or "
                    "fine-tune the model; where adapters alone were trained, set `config.length_head_trained` to True."
                )
            encoded, length_logits = sampler.encode(source)
            lengths, log_probs = predicted_lengths(length_logits, config, num_sequences, given.width())
            length_mode = "slack" if config.length_slack else "predicted"
        else:
            table_size = self.config.max_position_embeddings
            lengths = given_lengths(
                given.target_lengths, config, table_size, num_sources, device, num_sequences, given.width()
            )
            log_probs, length_mode = torch.zeros(lengths.shape, device=device), "given"
        num_samples, num_lengths = config.num_candidates, lengths.shape[1]
        layout = CandidateLayout(lengths.flatten(), log_probs.flatten(), num_sources, num_samples, num_lengths)
        return layout, length_mode, encoded

    def _prepare_latents(
        self, config: YanGenerationConfig, layout: CandidateLayout, noise: NoiseSource, given: GenerationInputs
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        The initial state, `(R, L, d)`; and, for each choice of experts, noise to draw them by, `(R, L, C, K)`, or the
        experts themselves, `(R, L, C)`. The mode of the gate needs neither.
        """
        hidden_size, num_experts = self.config.hidden_size, self.config.num_experts
        num_choices = len(config.times()) - 1 if config.reselect_experts else 1
        if given.initial_latents is None:
            state = config.init_noise * noise.draw(torch.randn, hidden_size)
        else:
            shape = (layout.num_sequences, layout.width, hidden_size)
            state = layout.repeat(fitting_values("initial_latents", given.initial_latents, shape, noise.device))
        uniform = experts = None
        if given.expert_indices is not None:
            leading = (num_choices,) if config.reselect_experts else ()
            shape = (*leading, layout.num_sequences, layout.width)
            experts = fitting_values("expert_indices", given.expert_indices, shape, noise.device, position_dim=-1)
            experts = check_expert_indices(experts, num_experts)
            experts = layout.repeat(experts.movedim(0, -1) if config.reselect_experts else experts[..., None])
        elif config.expert_selection == "sample":
            uniform = noise.draw(torch.rand, num_choices, num_experts)
        return state, uniform, experts

    @staticmethod
    def _decoding_options(
        config: YanGenerationConfig,
        layout: CandidateLayout,
        source: SourceInputs,
        logits_processor: LogitsProcessorList | None,
    ) -> dict[str, Any]:
        """What [`decode_tokens`] is told for drafts and texts alike."""
        ids, device = source.input_ids, layout.lengths.device
        return {
            "processors": LogitsProcessorList([*(logits_processor or ()), *make_processors(config, device)]),
            "context_ids": None if ids is None else ids.repeat_interleave(layout.rows_per_source, dim=0),
            "end_token_ids": config.end_token_ids(),
            "min_length": config.min_new_tokens,
        }

    def _sample(
        self,
        config: YanGenerationConfig,
        sampler: Sampler,
        layout: CandidateLayout,
        source: SourceInputs,
        encoded: torch.Tensor | None,
        start: tuple[torch.Tensor | None, ...],
        decoding: dict[str, Any],
        streamer: BaseStreamer | None,
        given: GenerationInputs,
    ) -> SampleOutput:
        """Solves the ODE; a streamer gets the drafts."""
        end_matters = bool(decoding["end_token_ids"]) and config.min_new_tokens > 1
        options = SamplingOptions(
            times=tuple(config.times()),
            solver=config.solver,
            expert_temperature=float(config.expert_temperature),
            repeats=layout.rows_per_source,
            keep_states=bool(config.output_trajectory),
            decode_argmax=not (decoding["processors"] or config.do_sample or config.output_scores or end_matters),
            with_scores=self._needs_scores(config, layout),
            routing=RoutingOptions.from_config(config),
            reselect=bool(config.reselect_experts),
            is_start_given=given.initial_latents is not None,
            keep_core=bool(config.output_routing),
        )
        if getattr(streamer, "skip_prompt", False) and source.input_ids is not None:
            streamer.put(source.input_ids.cpu())  # it skips what is put first
        first = {
            name: layout.first(value) if name == "context_ids" and value is not None else value
            for name, value in decoding.items()
        }

        def show_draft(state: torch.Tensor):
            draft = decode_tokens(self.lm_head, self.model.decoder(layout.first(state)), **first)
            tokens, *_ = truncate_at_eos(
                draft.tokens, layout.first(layout.lengths), decoding["end_token_ids"], config.pad_token_id or 0
            )
            streamer.put_draft(tokens.cpu())

        callback = show_draft if hasattr(streamer, "put_draft") else None
        sampled = sampler.sample(options, source, encoded, layout.lengths, *start, callback_on_step_end=callback)
        check_finite("gate_logits", sampled.is_finite)
        return sampled

    @staticmethod
    def _needs_scores(config: YanGenerationConfig, layout: CandidateLayout) -> bool:
        return bool(config.return_dict_in_generate) or layout.rows_per_sequence > 1

    def _decode_tokens(
        self,
        config: YanGenerationConfig,
        layout: CandidateLayout,
        sampled: SampleOutput,
        noise: NoiseSource,
        decoding: dict[str, Any],
        given: GenerationInputs,
    ) -> Texts:
        """Every row's tokens, cut behind its end token and where a criterion stops, and their scores."""
        decoded = sampled.tokens
        if decoded is None:
            decoded = decode_tokens(
                self.lm_head,
                sampled.decoded,
                uniform=noise.draw(torch.rand, dtype=torch.float64) if config.do_sample else None,
                with_scores=self._needs_scores(config, layout),
                with_logits=bool(config.output_scores),
                **decoding,
            )
        check_finite("logits", decoded.is_finite)
        check_choice(config, decoded.has_choice, given.has_processors)
        pad_token_id = config.pad_token_id or 0
        texts = truncate_at_eos(decoded.tokens, layout.lengths, decoding["end_token_ids"], pad_token_id)
        if given.stopping_criteria:
            texts = cut_by_criteria(*texts[:2], given.stopping_criteria, pad_token_id)
        tokens, lengths, kept = texts
        scores = None
        if decoded.log_probs is not None:
            scores = decoded.log_probs.masked_fill(~kept, 0.0).sum(dim=-1) / lengths
        return Texts(tokens, lengths, kept, scores, decoded.logits)

    def _select_candidates(
        self, config: YanGenerationConfig, layout: CandidateLayout, sampled: SampleOutput, texts: Texts
    ) -> tuple[CandidateLayout, SampleOutput, Texts]:
        """The best candidate of each returned sequence, and no others."""
        if layout.rows_per_sequence == 1:
            return layout, sampled, texts
        utility = texts.scores
        if config.rerank == "joint":
            # Of length, choices of experts and tokens together, per token.
            utility = texts.scores + (layout.length_log_probs + sampled.path_log_probs) / texts.lengths
        elif config.rerank == "cycle":
            encoded = self.model.encode(texts.tokens, texts.kept.long()).last_hidden_state
            utility = -cycle_distance(sampled.latents, encoded, texts.kept)
        elif config.rerank == "mbr":
            special = {config.pad_token_id, config.bos_token_id, *config.end_token_ids()}
            rows = [
                [token for token in row[:length] if token not in special]
                for row, length in zip(texts.tokens.tolist(), texts.lengths.tolist())
            ]
            size = layout.rows_per_sequence
            groups = [rows[start : start + size] for start in range(0, len(rows), size)]
            utility = torch.tensor([consensus(group) for group in groups], device=texts.scores.device).flatten()
        chosen = layout.best(utility, texts.scores)
        kept = CandidateLayout(layout.lengths[chosen], layout.length_log_probs[chosen], layout.num_sources, 1, 1)
        return kept, sampled.rows(chosen), texts.rows(chosen)

    def _output(
        self,
        config: YanGenerationConfig,
        length_mode: str,
        layout: CandidateLayout,
        sampled: SampleOutput,
        texts: Texts,
        given: GenerationInputs,
    ) -> YanGenerateOutput:
        distinct = core = experts = None
        if config.output_routing:
            distinct, core = self._routing(config, sampled, layout.lengths, given.expert_indices is None)
        if config.output_expert_indices:
            experts = sampled.experts.movedim(-1, 0) if config.reselect_experts else sampled.experts[..., 0]
        return YanGenerateOutput(
            sequences=texts.tokens,
            sequence_scores=texts.scores,
            lengths=texts.lengths,
            length_mode=length_mode,
            latents=sampled.latents,
            logits=texts.logits,
            trajectory=sampled.states,
            expert_indices=experts,
            distinct_experts=distinct,
            core_experts=core,
            num_field_evaluations=len(evaluation_times(config.times(), config.solver)),
        )

    def _fast_kernels(self, config: YanGenerationConfig) -> AbstractContextManager:
        """Faster products on the CPU, where the package that brings them is there."""
        if config.compile or self.device.type != "cpu":
            return nullcontext()
        try:
            kernels = inference_module("cpu_kernels")
        except ImportError:
            return nullcontext()  # slower, and the same tokens
        return kernels.use_onednn(KERNELS) if kernels.is_available() else nullcontext()

    def _prepare_generation(
        self, generation_config: YanGenerationConfig | None, kwargs: dict[str, Any]
    ) -> tuple[YanGenerationConfig, torch.Tensor | None]:
        """The configuration with every field resolved, and `inputs_embeds` if given."""
        kwargs = dict(kwargs)
        inputs_embeds = kwargs.pop("inputs_embeds", None)
        for name, reason in REFUSED_ARGUMENTS.items():
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"`{name}` is not possible: {reason}.")
        # What `Seq2SeqTrainer` passes along with a batch and its settings.
        for name in (
            "labels",
            "decoder_attention_mask",
            "token_weights",
            "synced_gpus",
            "use_cache",
            "use_model_defaults",
        ):
            kwargs.pop(name, None)
        # None means "not set", as in Transformers.
        kwargs = {name: plain_value(value) for name, value in kwargs.items() if value is not None}

        config = self.generation_config if generation_config is None else generation_config
        config = YanGenerationConfig.from_dict(config.to_dict())
        if "max_length" in kwargs and "max_new_tokens" not in kwargs:
            config.max_new_tokens = None
        if "time_schedule" in kwargs:
            schedules = (kwargs["time_schedule"], config.time_schedule)
            if any(isinstance(schedule, (list, tuple)) for schedule in schedules):
                config.num_inference_steps = None  # the list says how many
            if kwargs["time_schedule"] != "shifted":
                config.time_shift = None
        for name, value in kwargs.items():
            if name not in vars(config):
                raise ValueError(f"`generate` has no argument `{name}`; see its docstring for those it has.")
            setattr(config, name, value)
        config.validate()
        return config.resolve(self.config), inputs_embeds

    def _routing(
        self, config: YanGenerationConfig, sampled: SampleOutput, lengths: torch.Tensor, is_routed: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """How many experts each block chose, `(B, N)`, and its core set, `(B, N, K)`, if the gate was asked."""
        canvas = torch.arange(sampled.experts.shape[1], device=lengths.device) < lengths[:, None]
        num_experts, block_size = self.config.num_experts, config.routing_block_size
        used = torch.stack(
            [experts_of_blocks(experts, canvas, num_experts, block_size) for experts in sampled.experts.unbind(-1)]
        ).any(dim=0)
        core = sampled.core
        if core is not None:
            core = core[:, : used.shape[1]]  # a compiled canvas may have more blocks
        elif is_routed:
            core = used.any(dim=-1, keepdim=True).expand_as(used)
        return used.sum(dim=-1), core

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """PEFT wraps and calls it; `generate` has no steps to prepare inputs for."""
        return {"input_ids": input_ids, **kwargs}

    def adjust_generation_fn(
        self,
        generation_config: Any,
        from_auto_class: Any,
        from_pipeline: Any,
        pretrained_model_name_or_path: Any,
        *args: Any,
        trust_remote_code: bool | None = None,
        **kwargs: Any,
    ):
        """Called by `from_pretrained`: takes the given generation configuration, or the checkpoint's."""
        config_class = self.generation_config_class
        default = self.generation_config
        if generation_config is not None:
            self.generation_config = config_class.from_dict(generation_config.to_dict())
        elif pretrained_model_name_or_path is not None:
            try:
                self.generation_config = config_class.from_pretrained(
                    pretrained_model_name_or_path,
                    _from_auto=from_auto_class,
                    _from_pipeline=from_pipeline,
                    **kwargs,
                )
            except OSError as error:
                if isinstance(error.__context__, (json.JSONDecodeError, UnicodeDecodeError)):
                    raise  # the file is there, but broken
                logger.info("The checkpoint has no generation configuration; the defaults are used.")
        # A file that Transformers wrote for another class may lack them.
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(self.generation_config, name) is None:
                setattr(self.generation_config, name, getattr(default, name))
        if self.generation_config.max_new_tokens is None and self.generation_config.max_length is None:
            self.generation_config.max_new_tokens = default.max_new_tokens


__all__ = ["YanGenerateOutput", "YanGenerationMixin"]
