# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`generate`: ODE sampling in the place of autoregressive decoding."""

import copy
import functools
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from .experts import experts_of_blocks
from .generation_config_yan import REFUSED_ARGUMENTS, YanGenerationConfig, make_processors, plain_value
from .layers import KERNELS
from .lengths import SourceInputs, are_by_token, choose_lengths, predicted_tokens
from .sampling import (
    CandidateLayout,
    DecodedTokens,
    EagerSampler,
    NoiseSource,
    SampleOutput,
    Sampler,
    SamplingOptions,
    consensus,
    cut_by_criteria,
    cycle_distance,
    decode_fillings,
    decode_tokens,
    eval_view,
    is_training,
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

# What `Seq2SeqTrainer` passes along with a batch and its settings.
_IGNORED_ARGUMENTS = {
    "labels", "decoder_attention_mask", "token_weights", "token_lengths", "encoder_states", "target_states",
    "synced_gpus", "use_cache", "use_model_defaults",
}  # fmt: skip


@dataclass
class YanGenerateOutput(ModelOutput):
    """
    Output of `generate` with `return_dict_in_generate=True`. `B` counts returned sequences.

    Args:
        sequences: Generated tokens, `(B, L)`, padding after the end token.
        sequence_scores: Mean log-probability of each sequence's tokens by the vocabulary head, before any processor,
            `(B,)`; with `keep_known`, of the fillings' tokens.
        lengths: Tokens of each sequence, the end token included, `(B,)`.
        length_mode: Where the canvas's length came from: `"predicted"` by the length head, `"slack"` (predicted and
            `length_slack` longer, so that the end token decides), or `"given"` by `target_lengths`.
        latents: The ODE's end, `(B, L, d)`.
        logits: With `output_scores`, `(B, L, V)`; before any processor.
        trajectory: With `output_trajectory`, the initial state and that after every solver step, `(S + 1, B, L, d)`.
        drafts: With `output_drafts`, the tokens that are read off after every solver step, `(S, B, L)`; the last ones
            are the `sequences`.
        expert_indices: With `output_expert_indices`, `(B, L)`; `(S, B, L)` where experts are chosen anew at every one
            of `S` solver steps.
        distinct_experts: With `output_routing`, how many experts the tokens of each of a canvas's `N` blocks of
            `routing_block_size` tokens chose, `(B, N)`; 0 behind a shorter canvas. With token routing too.
        core_experts: With `output_routing`, which experts each block could choose from, `(B, N, K)`, bool: all with
            token routing, none behind a shorter canvas. Absent where `expert_indices` were given.
        num_field_evaluations: Passes of the flow trunk.
    """

    sequences: torch.LongTensor | None = None
    sequence_scores: torch.FloatTensor | None = None
    lengths: torch.LongTensor | None = None
    length_mode: str | None = None
    latents: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    trajectory: torch.FloatTensor | None = None
    drafts: torch.LongTensor | None = None
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
    """One call of `generate`: the resolved configuration, the source, and what else the caller gave."""

    config: YanGenerationConfig
    source: SourceInputs
    streamer: BaseStreamer | None
    logits_processor: LogitsProcessorList | None
    stopping_criteria: StoppingCriteriaList
    target_lengths: int | list[int] | torch.Tensor | None
    generator: torch.Generator | None
    seeds: torch.Tensor | list[int] | None
    initial_latents: torch.Tensor | None
    expert_indices: torch.Tensor | None

    def width(self) -> int | None:
        """Positions that fixed latents and experts hold."""
        widths = []
        for name in ("initial_latents", "expert_indices"):
            if (values := getattr(self, name)) is not None:
                if values.dim() < 2 or values.numel() == 0:
                    raise ValueError(f"`{name}` must hold a position for each token, but have {tuple(values.shape)}.")
                widths.append(values.shape[1 if name == "initial_latents" else -1])
        return min(widths, default=None)


class Texts(NamedTuple):
    """The tokens of every row."""

    tokens: torch.Tensor  # (R, L), padding behind each text
    lengths: torch.Tensor  # tokens of each text, the end token included, (R,)
    kept: torch.Tensor  # which positions are the text's, (R, L)
    num_read: torch.Tensor  # tokens of each text that were not known, at least 1, (R,)
    scores: torch.Tensor | None  # mean log-probability of these tokens, (R,), if asked for
    logits: torch.Tensor | None  # (R, L, V), if asked for
    drafts: torch.Tensor | None  # after every solver step, (R, S, L), if asked for

    def rows(self, index: torch.Tensor) -> "Texts":
        """Some of the rows."""
        return Texts(*(None if values is None else values[index] for values in self))


def run_whole(model: nn.Module, name: str) -> None:
    """
    Lets a method of a model that FSDP2 shards run with whole weights: as the model's forward, its layers gathered too,
    since `generate` does not use all layers through their forward. All processes have to call the method together.
    """
    if name in vars(model) or not (dist.is_available() and dist.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    if not isinstance(model, FSDPModule):
        return
    method = getattr(model, name)

    def gathered(*arguments: Any, **keywords: Any) -> Any:
        layers = [module for module in model.modules() if isinstance(module, FSDPModule) and module is not model]
        for layer in layers:
            layer.unshard()
        try:
            return method(*arguments, **keywords)
        finally:
            for layer in layers:
                layer.reshard()

    setattr(model, name, gathered)
    # The model's own weights are gathered by FSDP2, as for its forward. That leaves them whole, for a backward pass.
    register_fsdp_forward_method(model, name)
    as_forward = getattr(model, name)

    @functools.wraps(method)
    def whole(*arguments: Any, **keywords: Any) -> Any:
        try:
            return as_forward(*arguments, **keywords)
        finally:
            model.reshard()

    setattr(model, name, whole)


class YanGenerationMixin:
    """The `generate` of [`YanForConditionalGeneration`]."""

    output_modalities = ("text",)  # pipelines name them

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
        mask_lengths: list[list[int]] | torch.LongTensor | None = None,
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
            attention_mask: `(B, Lx)`, 1 on real tokens. Padding may stand on either side.
            generation_config: Replaces the model's; keyword arguments override single fields of either. It may also
                come second by position, as in Transformers.
            streamer: Gets each step's draft through `put_draft`, where it has that, and then the tokens. Of several
                candidates the first one's drafts are shown.
            logits_processor: Transformers' processors, applied to the final logits of every position by itself, before
                those of the configuration. There is no prefix, so the ids they get are the source's.
            generator: Source of the randomness; the global one by default.
            target_lengths: The targets' true lengths, end token included: an int, or `(B,)`. Otherwise the length head
                predicts them. In two dimensions they are `mask_lengths`.
            seeds: One integer for each returned sequence instead of `generator`: a row's result then does not depend
                on the other rows, on padding or on the batch size. The first candidate is the one without candidates.
            initial_latents: The initial state `z0`, `(B, Ly, d)` for `B` returned sequences, which no noise scale
                multiplies; candidates share it. A shorter target uses its first positions; predicted lengths stay
                within it.
            expert_indices: The experts, `(B, Ly)`, or `(S, B, Ly)` with `reselect_experts`, instead of a choice by the
                gate; candidates share them.
            stopping_criteria: Transformers' criteria, each asked about every beginning of the finished text, which is
                cut where one says so.
            tokenizer: Needed for `stop_strings`.
            inputs: Another name of `input_ids`, Transformers'.
            mask_lengths: With a `config.start_state` that gives masks or source tokens lengths of their own, the true
                ones, instead of `target_lengths`: a list for each row, or `(B, M)`, in their order, 0 behind a row's
                last.
            kwargs: Fields of [`YanGenerationConfig`]. `labels` and what belongs to them are ignored.

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
        tensors = {"input_ids": input_ids, "attention_mask": attention_mask, "initial_latents": initial_latents}
        tensors |= {"inputs_embeds": kwargs.get("inputs_embeds"), "expert_indices": expert_indices}
        check_types({name: (value, torch.Tensor) for name, value in tensors.items()})
        check_types({"generation_config": (generation_config, GenerationConfig)})
        check_types({"generator": (generator, torch.Generator), "tokenizer": (tokenizer, PreTrainedTokenizerBase)})
        check_functions("logits_processor", logits_processor)
        check_functions("stopping_criteria", stopping_criteria)
        config, inputs_embeds = self._prepare_generation(generation_config, kwargs)
        if generator is not None and seeds is not None:
            raise ValueError("Pass `generator` or `seeds`, not both: each alone fixes the randomness.")
        check_source(self.config, input_ids, inputs_embeds, attention_mask, allow_empty_rows=False)
        check_no_prefix_tuning(self)
        if mask_lengths is not None:
            self._check_mask_lengths(mask_lengths, target_lengths)
            target_lengths = mask_lengths
        criteria = StoppingCriteriaList(stopping_criteria or [])
        if config.stop_strings is not None:
            if tokenizer is None:
                raise ValueError("`stop_strings` are found in the text: pass the `tokenizer` too.")
            criteria.append(StopStringCriteria(tokenizer, config.stop_strings))
        check_stopping_criteria(criteria)
        source = SourceInputs(input_ids, attention_mask, inputs_embeds)
        given = (target_lengths, generator, seeds, initial_latents, expert_indices)
        call = GenerationInputs(config, source, streamer, logits_processor, criteria, *given)
        # Also a part alone may be in training mode, as an adapter that has just been added is.
        model = eval_view(self) if is_training(self) else self
        run_whole(self, "_generate_with")
        with self._fast_kernels(config):
            output = self._generate_with(model, source, call)
        if not config.return_dict_in_generate:
            return output.sequences
        # A compiled program's next run writes into the memory of what this one gave.
        for name in ("latents", "trajectory", "expert_indices", "core_experts") if config.compile else ():
            if output.get(name) is not None:
                output[name] = output[name].clone()
        return output

    def _check_mask_lengths(self, mask_lengths: Any, target_lengths: Any):
        if target_lengths is not None:
            raise ValueError("Pass `mask_lengths` or `target_lengths`: the first give the length of the target too.")
        if self.config.start_state not in ("aligned", "fertility"):
            raise ValueError(
                "`mask_lengths` need a model that gives masks or source tokens lengths of their own: this one has "
                f"`start_state={self.config.start_state!r}`."
            )
        if not are_by_token(mask_lengths):
            raise ValueError(f"`mask_lengths` must hold a list of lengths for each row, but are {mask_lengths!r}.")

    def _generate_with(
        self, model: "YanGenerationMixin", source: SourceInputs, call: GenerationInputs
    ) -> YanGenerateOutput:
        """
        `_generate` of this model or of its view in eval mode, under whatever gathers this model's weights and moves
        the source to them.
        """
        call.source = source
        return model._generate(call)

    def _generate(self, call: GenerationInputs) -> YanGenerateOutput:
        sampler = self._sampler(call)
        layout, length_mode, encoded = self._prepare_lengths(call, sampler)
        noise = NoiseSource(layout, call.generator, call.seeds)
        start = self._prepare_latents(call, layout, noise)
        decoding = self._decoding_options(call, layout)
        sampled = self._sample(call, sampler, layout, encoded, start, decoding)
        texts = self._decode_tokens(call, layout, sampled, noise, decoding)
        layout, sampled, texts = self._select_candidates(call.config, layout, sampled, texts)
        if call.streamer is not None:
            call.streamer.put(texts.tokens.cpu())
            call.streamer.end()
        return self._output(call, length_mode, layout, sampled, texts)

    def _sampler(self, call: GenerationInputs) -> Sampler:
        if not call.config.compile:
            return EagerSampler(self)
        if hasattr(call.streamer, "put_draft"):
            logger.warning_once("`compile=True` is left aside for a streamer that shows drafts after every step.")
            return EagerSampler(self)
        if self.expert_offload is not None:
            raise ValueError(
                "`compile=True` is not possible with offloaded experts, whose copies no static program can hold. "
                "Leave it out, or call `disable_expert_offload()` first."
            )
        return inference_module("compiled").CompiledSampler(self, call.config.compile_config)

    def _prepare_lengths(
        self, call: GenerationInputs, sampler: Sampler
    ) -> tuple[CandidateLayout, str, torch.Tensor | None]:
        """The rows with their lengths, where these come from, and the source's latents if they were needed."""
        config, source, given = call.config, call.source, call.target_lengths
        encoded, num_sequences = None, config.num_return_sequences * config.num_candidates
        is_predicted = predicted_tokens(self.config, source)
        is_predicted = is_predicted if is_predicted is not None and bool(is_predicted.any()) else None
        by_token = is_predicted is not None and not are_by_token(given)
        if given is None or by_token:
            if not self.length_head.is_trained(self.config):
                raise ValueError(
                    "The length head of this model has never been trained (`config.length_head_trained` is False; "
                    "research checkpoints have none), so lengths cannot be predicted. Pass "
                    f"`{'mask_lengths' if by_token else 'target_lengths'}`, or fine-tune the model; where adapters "
                    "alone were trained, set `config.length_head_trained` to True."
                )
            encoded = sampler.encode(source)
        lengths, log_probs, token_lengths = choose_lengths(
            self.config, config, source, is_predicted, encoded, given, num_sequences, call.width()
        )
        length_mode = "given" if given is not None else "slack" if config.length_slack else "predicted"
        shape = (len(source.given), config.num_candidates, lengths.shape[1])
        layout = CandidateLayout(lengths.flatten(), log_probs.flatten(), *shape, token_lengths)
        return layout, length_mode, None if encoded is None else encoded.latents

    def _prepare_latents(
        self, call: GenerationInputs, layout: CandidateLayout, noise: NoiseSource
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """
        The initial state, `(R, L, d)`; for each choice of experts, noise to draw them by, `(R, L, C, K)`, or the
        experts themselves, `(R, L, C)`, of which the mode of the gate needs neither; and where in the source each
        position starts from, `(R, L)`, unless it starts from noise.
        """
        config, hidden_size, num_experts = call.config, self.config.hidden_size, self.config.num_experts
        num_choices = len(config.times()) - 1 if config.reselect_experts else 1
        rows = (layout.num_sequences, layout.width)
        if call.initial_latents is None:
            state = config.init_noise * noise.draw(torch.randn, hidden_size)
        else:
            shape = (*rows, hidden_size)
            state = layout.repeat(fitting_values("initial_latents", call.initial_latents, shape, noise.device))
        uniform = experts = None
        if call.expert_indices is not None:
            shape = (num_choices, *rows) if config.reselect_experts else rows
            parts = f"{'solver steps, ' * config.reselect_experts}returned sequences and positions"
            if config.reselect_experts != (call.expert_indices.dim() == 3):
                parts += f", with `reselect_experts={config.reselect_experts}`"
            experts = fitting_values("expert_indices", call.expert_indices, shape, noise.device, -1, parts)
            experts = check_expert_indices(experts, num_experts)
            experts = layout.repeat(experts.movedim(0, -1) if config.reselect_experts else experts[..., None])
        elif config.expert_selection == "sample":
            uniform = noise.draw(torch.rand, num_choices, num_experts)
        is_noise = self.config.start_state == "noise" or call.initial_latents is not None
        return state, uniform, experts, None if is_noise else layout.places(call.source)

    def _read_tokens(self, states: torch.Tensor, decoding: dict[str, Any], **changes: Any) -> DecodedTokens:
        """The tokens of states `(R, L, d)` that the decoder has prepared, around those that are known."""
        options = {**decoding, **changes}
        known = {name: options.pop(name) for name in ("known_ids", "forbidden")}
        decode = decode_tokens if known["known_ids"] is None else partial(decode_fillings, **known)
        return decode(self.lm_head, states, **options)

    def _decoding_options(self, call: GenerationInputs, layout: CandidateLayout) -> dict[str, Any]:
        """What [`decode_tokens`] is told for drafts and texts alike."""
        config, ids, device = call.config, call.source.input_ids, layout.lengths.device
        known_ids = forbidden = None
        if layout.token_lengths is not None and config.keep_known:
            known_ids = layout.known_ids(call.source, predicted_tokens(self.config, call.source))
            control = {config.pad_token_id, self.config.bos_token_id, self.config.mask_token_id}
            forbidden = torch.tensor(sorted({*control, *config.end_token_ids()} - {None}), device=device)
        copied_ids = end_places = goes_on = None
        has_places = self.config.start_state == "fertility" and layout.token_lengths is not None
        places = layout.places(call.source) if has_places or config.copy_bias else None
        if has_places:
            goes_on = layout.goes_on(places)
        if has_places and ids is not None and config.end_token_ids():
            # A text ends where its source does: an end token before that would cut it short.
            end_places = layout.end_places(call.source, config.end_token_ids())
        if config.copy_bias:
            if ids is None:
                raise ValueError("`copy_bias` needs `input_ids`, the tokens that are copied: leave it out.")
            copied_ids = ids.long().masked_fill(ids == self.config.mask_token_id, -1)
            copied_ids = layout.repeat_sources(copied_ids).gather(1, places)
        return {
            "copied_ids": copied_ids,
            "copy_bias": float(config.copy_bias),
            "end_places": end_places,
            "goes_on": goes_on,
            "known_ids": known_ids,
            "forbidden": forbidden,
            "processors": LogitsProcessorList([*(call.logits_processor or ()), *make_processors(config, device)]),
            "context_ids": None if ids is None else layout.repeat_sources(ids),
            "end_token_ids": config.end_token_ids(),
            "min_length": config.min_new_tokens,
            "with_scores": bool(config.return_dict_in_generate) or layout.rows_per_sequence > 1,
        }

    def _sample(
        self,
        call: GenerationInputs,
        sampler: Sampler,
        layout: CandidateLayout,
        encoded: torch.Tensor | None,
        start: tuple[torch.Tensor | None, ...],
        decoding: dict[str, Any],
    ) -> SampleOutput:
        """Solves the ODE; a streamer gets the drafts."""
        config, source, streamer = call.config, call.source, call.streamer
        end_matters = decoding["end_places"] is not None or (decoding["end_token_ids"] and config.min_new_tokens > 1)
        options = SamplingOptions.from_config(
            config,
            repeats=layout.rows_per_source,
            stratified=layout.samples_per_source if config.expert_selection == "stratified" else 0,
            decode_argmax=not (
                decoding["processors"]
                or config.do_sample
                or config.output_scores
                or end_matters
                or decoding["known_ids"] is not None
                or decoding["copied_ids"] is not None
                or decoding["goes_on"] is not None
                # On the CPU the vocabulary is read faster in parts, a loop that a compiler would unroll.
                or (config.compile and self.device.type == "cpu")
            ),
            with_scores=decoding["with_scores"],
        )
        if getattr(streamer, "skip_prompt", False) and source.input_ids is not None:
            streamer.put(source.input_ids.cpu())  # it skips what is put first
        names = ("context_ids", "known_ids", "copied_ids", "end_places", "goes_on")
        first = {name: None if decoding[name] is None else layout.first(decoding[name]) for name in names}
        lengths = layout.first(layout.lengths)

        def show_draft(state: torch.Tensor):
            streamer.put_draft(self._draft(config, layout.first(state), lengths, {**decoding, **first}).cpu())

        callback = show_draft if hasattr(streamer, "put_draft") else None
        return sampler.sample(options, source, encoded, layout.lengths, *start, callback_on_step_end=callback)

    def _draft(
        self, config: YanGenerationConfig, state: torch.Tensor, lengths: torch.Tensor, decoding: dict[str, Any]
    ) -> torch.Tensor:
        """The tokens `(R, L)` that a solver step's state `(R, L, d)` would give, none of them drawn."""
        tokens = self._read_tokens(self.model.decoder(state), decoding, with_scores=False).tokens
        pad_token_id, known_ids = config.pad_token_id or 0, decoding["known_ids"]
        return truncate_at_eos(tokens, lengths, decoding["end_token_ids"], pad_token_id, known_ids)[0]

    def _decode_tokens(
        self,
        call: GenerationInputs,
        layout: CandidateLayout,
        sampled: SampleOutput,
        noise: NoiseSource,
        decoding: dict[str, Any],
    ) -> Texts:
        """Every row's tokens, cut behind its end token and where a criterion stops, and their scores."""
        config, decoded = call.config, sampled.tokens
        if decoded is None:
            uniform = noise.draw(torch.rand, dtype=torch.float64) if config.do_sample else None
            asked = {"uniform": uniform, "with_logits": bool(config.output_scores)}
            decoded = self._read_tokens(sampled.decoded, decoding, **asked)
        # Where a device map puts the head on another device than the encoder.
        decoded = decoded.to(layout.lengths.device)
        pad_token_id = config.pad_token_id or 0
        known_ids = decoding["known_ids"]
        texts = truncate_at_eos(decoded.tokens, layout.lengths, decoding["end_token_ids"], pad_token_id, known_ids)
        # Here the host waits for the device; what cuts the texts is launched.
        check_finite("gate_logits", sampled.is_finite)
        check_finite("logits", decoded.is_finite)
        check_choice(config, decoded.has_choice, bool(call.logits_processor))
        if call.stopping_criteria:
            texts = cut_by_criteria(*texts[:2], call.stopping_criteria, pad_token_id)
        tokens, lengths, kept = texts
        num_read = lengths if known_ids is None else (kept & (known_ids < 0)).sum(dim=-1).clamp(min=1)
        scores = None
        if decoded.log_probs is not None:
            scores = decoded.log_probs.masked_fill(~kept, 0.0).sum(dim=-1) / num_read
        drafts = None
        if config.output_drafts:
            early = [self._draft(config, state, layout.lengths, decoding) for state in sampled.states[1:-1]]
            drafts = torch.stack([*early, tokens], dim=1)
        return Texts(tokens, lengths, kept, num_read, scores, decoded.logits, drafts)

    def _select_candidates(
        self, config: YanGenerationConfig, layout: CandidateLayout, sampled: SampleOutput, texts: Texts
    ) -> tuple[CandidateLayout, SampleOutput, Texts]:
        """The best candidate of each returned sequence, and no others."""
        if layout.rows_per_sequence == 1:
            return layout, sampled, texts
        utility = texts.scores
        if config.rerank == "joint":
            # Of length, choices of experts and tokens together, per token.
            utility = texts.scores + (layout.length_log_probs + sampled.path_log_probs) / texts.num_read
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
        self, call: GenerationInputs, length_mode: str, layout: CandidateLayout, sampled: SampleOutput, texts: Texts
    ) -> YanGenerateOutput:
        config, distinct, core, experts = call.config, None, None, None
        if config.output_routing:
            distinct, core = self._routing(config, sampled, layout.lengths, call.expert_indices is None)
        if config.output_expert_indices:
            experts = sampled.experts.movedim(-1, 0) if config.reselect_experts else sampled.experts[..., 0]
        return YanGenerateOutput(
            sequences=texts.tokens,
            sequence_scores=texts.scores,
            lengths=texts.lengths,
            length_mode=length_mode,
            latents=sampled.latents,
            logits=texts.logits,
            trajectory=sampled.states if config.output_trajectory else None,
            drafts=None if texts.drafts is None else texts.drafts.transpose(0, 1),
            expert_indices=experts,
            distinct_experts=distinct,
            core_experts=core,
            num_field_evaluations=len(evaluation_times(config.times(), config.solver)),
        )

    def _fast_kernels(self, config: YanGenerationConfig) -> AbstractContextManager:
        """Faster products on the CPU, where the package that brings them is there."""
        if self.device.type != "cpu":
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
        # None means "not set", as in Transformers.
        kwargs = {name: plain_value(value) for name, value in kwargs.items() if value is not None}
        kwargs = {name: value for name, value in kwargs.items() if name not in _IGNORED_ARGUMENTS}

        config = self.generation_config if generation_config is None else generation_config
        is_own = isinstance(config, YanGenerationConfig)
        config = copy.deepcopy(config) if is_own else YanGenerationConfig.from_dict(config.to_dict())
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
            # A compiled canvas may have more blocks; the set of a whole target is that of each of its blocks.
            core = core[:, : used.shape[1]] & used.any(dim=-1, keepdim=True)
        elif is_routed:
            core = used.any(dim=-1, keepdim=True).expand_as(used)
        return used.sum(dim=-1), core

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """PEFT wraps and calls it; `generate` has no steps to prepare inputs for."""
        return {"input_ids": input_ids, **kwargs}

    def adjust_generation_fn(self, generation_config: Any, auto: Any, pipeline: Any, name: Any, **kwargs: Any):
        """Called by `from_pretrained`: takes the given generation configuration, or that of the checkpoint `name`."""
        config_class, default = self.generation_config_class, self.generation_config
        kwargs.pop("trust_remote_code", None)
        if generation_config is not None:
            self.generation_config = config_class.from_dict(generation_config.to_dict())
        elif name is not None:
            try:
                self.generation_config = config_class.from_pretrained(
                    name, _from_auto=auto, _from_pipeline=pipeline, **kwargs
                )
            except OSError as error:
                if isinstance(error.__context__, (json.JSONDecodeError, UnicodeDecodeError)):
                    raise  # the file is there, but broken
                logger.info("The checkpoint has no generation configuration; the defaults are used.")
        # A file that Transformers wrote for another class may lack them.
        for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(self.generation_config, field) is None:
                setattr(self.generation_config, field, getattr(default, field))
        if self.generation_config.max_new_tokens is None and self.generation_config.max_length is None:
            self.generation_config.max_new_tokens = default.max_new_tokens
