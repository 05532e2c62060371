# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`generate`: ODE sampling in the place of autoregressive decoding."""

import json
from contextlib import nullcontext
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
from .generation_config_yan import REFUSED_ARGUMENTS, YanGenerationConfig, plain_value
from .inference.compiled import CompiledSampler
from .inference.cpu_kernels import OneDnnLinear
from .sampling import (
    NoiseSource,
    ReadTokens,
    SamplingOptions,
    Written,
    best_candidates,
    consensus,
    cut_after_end,
    cut_by_criteria,
    cycle_distance,
    encode,
    eval_view,
    given_lengths,
    make_processors,
    predicted_lengths,
    read_tokens,
    write,
)
from .solver import evaluation_times
from .validation import (
    check_choice,
    check_finite,
    check_functions,
    check_no_choice_of_experts,
    check_no_prefix_tuning,
    check_no_text_generation_pipeline,
    check_source,
    check_stopping_criteria,
    check_types,
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
        expert_indices (`torch.LongTensor` of shape `(B, L)`, *optional*): With `output_expert_indices`.
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
class _Given:
    """What the caller fixes beyond the configuration."""

    target_lengths: int | list[int] | torch.Tensor | None
    generator: torch.Generator | None
    seeds: torch.Tensor | list[int] | None
    initial_latents: torch.Tensor | None
    expert_indices: torch.Tensor | None
    stopping_criteria: StoppingCriteriaList

    def width(self) -> int | None:
        """Positions that fixed latents and experts hold."""
        widths = []
        for name in ("initial_latents", "expert_indices"):
            values = getattr(self, name)
            if values is not None:
                if values.dim() < 2 or values.numel() == 0:
                    raise ValueError(f"`{name}` must hold a position for each token, but have {tuple(values.shape)}.")
                widths.append(values.shape[1])
        return min(widths, default=None)


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
            expert_indices: The experts, `(B, Ly)`, instead of a choice by the gate; candidates share them.
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
        if self.config.velocity_field == "mixture":
            check_no_choice_of_experts(config, expert_indices)
        criteria = StoppingCriteriaList(stopping_criteria or [])
        if config.stop_strings is not None:
            if tokenizer is None:
                raise ValueError("`stop_strings` are found in the text: pass the `tokenizer` too.")
            criteria.append(StopStringCriteria(tokenizer, config.stop_strings))
        check_stopping_criteria(criteria)
        given = _Given(target_lengths, generator, seeds, initial_latents, expert_indices, criteria)
        # Also a part alone may be in training mode, as an adapter that has just been added is.
        model = eval_view(self) if any(module.training for module in self.modules()) else self
        fast = not config.compile and self.device.type == "cpu" and OneDnnLinear.is_available()
        run_whole(self, "_generate_with")
        with OneDnnLinear() if fast else nullcontext():
            output = self._generate_with(
                model, config, input_ids, attention_mask, inputs_embeds, streamer, logits_processor, given
            )
        return output if config.return_dict_in_generate else output.sequences

    def _generate_with(self, model: "YanGenerationMixin", *arguments: Any) -> YanGenerateOutput:
        """`_generate` of this model or of its view in eval mode, under whatever gathers this model's weights."""
        return model._generate(*arguments)

    def _generate(
        self,
        config: YanGenerationConfig,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        streamer: BaseStreamer | None,
        logits_processor: LogitsProcessorList | None,
        given: _Given,
    ) -> YanGenerateOutput:
        # 1. Encode the source, once.
        inputs = (input_ids, attention_mask, inputs_embeds)
        shown = input_ids if input_ids is not None else inputs_embeds
        batch_size, device = shown.shape[0], shown.device
        takes_drafts = streamer is not None and hasattr(streamer, "put_draft")
        compiled = None
        if config.compile and takes_drafts:
            logger.warning_once("`compile=True` is left aside for a streamer that shows drafts after every step.")
        elif config.compile and self.expert_offload is not None:
            raise ValueError(
                "`compile=True` is not possible with offloaded experts, whose copies no static program can hold. "
                "Leave it out, or call `disable_expert_offload()` first."
            )
        elif config.compile:
            compiled = CompiledSampler(self, config.compile_config)
        source = None
        if given.target_lengths is None and not self.length_head.is_trained(self.config):
            raise ValueError(
                "The length head of this model has never been trained (`config.length_head_trained` is False; "
                "research checkpoints have none), so lengths cannot be predicted. Pass `target_lengths`, or fine-tune "
                "the model; where adapters alone were trained, set `config.length_head_trained` to True."
            )
        if given.target_lengths is None:
            source, length_logits = encode(self, *inputs) if compiled is None else compiled.encode(*inputs)

        # 2. Choose each target's length, or several.
        num_sequences = config.num_return_sequences * config.num_candidates
        if given.target_lengths is None:
            candidate_lengths, length_log_probs = predicted_lengths(
                length_logits, config, num_sequences, given.width()
            )
            length_mode = "slack" if config.length_slack else "predicted"
        else:
            candidate_lengths = given_lengths(
                given.target_lengths,
                config,
                self.config.max_position_embeddings,
                batch_size,
                device,
                num_sequences,
                given.width(),
            )
            length_log_probs = torch.zeros(candidate_lengths.shape, device=device)
            length_mode = "given"
        lengths, num_lengths = candidate_lengths.flatten(), candidate_lengths.shape[1]
        num_choices = config.num_candidates * num_lengths  # rows for each returned sequence
        repeats = num_sequences * num_lengths  # rows for each source
        width = int(lengths.max())

        # 3. Draw the initial state, for every candidate.
        noise = NoiseSource(
            lengths, width, given.generator, given.seeds, num_candidates=config.num_candidates, num_lengths=num_lengths
        )
        hidden_size, num_experts = self.config.hidden_size, self.config.num_experts
        num_returned = len(lengths) // num_choices
        if given.initial_latents is None:
            initial_state = config.init_noise * noise.draw(torch.randn, hidden_size)
        else:
            shape = (num_returned, width, hidden_size)
            initial_state = self._check_given("initial_latents", given.initial_latents, shape, device)
            initial_state = initial_state.repeat_interleave(num_choices, dim=0)
        experts = uniform = None
        if given.expert_indices is not None:
            experts = self._check_given("expert_indices", given.expert_indices, (num_returned, width), device)
            experts = self._check_experts(experts).repeat_interleave(num_choices, dim=0)
        elif config.expert_selection == "sample" and self.config.velocity_field == "expert":
            uniform = noise.draw(torch.rand, num_experts)

        # 4. Solve the ODE: the first pass of the trunk chooses one expert per token and gives the first velocity.
        processors = LogitsProcessorList([*(logits_processor or ()), *make_processors(config, device)])
        end_token_ids = config.end_token_ids()
        with_scores = config.return_dict_in_generate or num_choices > 1
        reading = {
            "processors": processors,
            "context_ids": None if input_ids is None else input_ids.repeat_interleave(repeats, dim=0),
            "end_token_ids": end_token_ids,
            "min_length": config.min_new_tokens,
        }
        is_plain = not (processors or config.do_sample or config.output_scores)
        options = SamplingOptions(
            times=tuple(config.times()),
            solver=config.solver,
            expert_temperature=float(config.expert_temperature),
            repeats=repeats,
            keep_states=bool(config.output_trajectory),
            read_argmax=is_plain and not (end_token_ids and config.min_new_tokens > 1),
            with_scores=with_scores,
            routing=RoutingOptions.from_config(config),
            keep_core=bool(config.output_routing),
        )
        if getattr(streamer, "skip_prompt", False) and input_ids is not None:
            streamer.put(input_ids.cpu())  # it skips what is put first

        def show_draft(state: torch.Tensor):
            rows = slice(None, None, num_choices)
            draft = self.model.decoder(state[rows])
            context_ids = reading["context_ids"]
            draft = read_tokens(
                self.lm_head, draft, **{**reading, "context_ids": None if context_ids is None else context_ids[rows]}
            )
            pad_token_id = config.pad_token_id or 0
            streamer.put_draft(cut_after_end(draft.tokens, lengths[rows], end_token_ids, pad_token_id)[0].cpu())

        arguments = (lengths, initial_state, uniform, experts)
        written: Written
        if compiled is not None and source is None:
            written = compiled.encode_and_write(options, *inputs, *arguments)
        elif compiled is not None:
            written = compiled.write(options, source, attention_mask, *arguments)
        else:
            if source is None:
                source = self.model.encode(*inputs).last_hidden_state
            on_step = show_draft if takes_drafts else None
            written = write(self, options, source, attention_mask, *arguments, on_step=on_step)

        # 5. Decode, read off the tokens, cut after the end token.
        read = written.tokens
        if read is None:
            read = read_tokens(
                self.lm_head,
                written.decoded,
                uniform=noise.draw(torch.rand, dtype=torch.float64) if config.do_sample else None,
                with_scores=with_scores,
                with_logits=bool(config.output_scores),
                **reading,
            )
        check_finite("gate_logits", written.is_finite)
        check_finite("logits", read.is_finite)
        check_choice(config, read.has_choice, bool(logits_processor))
        canvas_lengths, pad_token_id = lengths, config.pad_token_id or 0
        tokens, lengths, kept = cut_after_end(read.tokens, lengths, end_token_ids, pad_token_id)
        if given.stopping_criteria:
            tokens, lengths, kept = cut_by_criteria(tokens, lengths, given.stopping_criteria, pad_token_id)
        scores = None
        if with_scores:
            scores = read.log_probs.masked_fill(~kept, 0.0).sum(dim=-1) / lengths

        # 6. Keep the best candidate of each returned sequence.
        if num_choices > 1:
            joint = scores + length_log_probs.flatten() / lengths
            chosen = self._choose(config, tokens, lengths, kept, scores, joint, written.latents, num_choices)
            written = self._rows(written, chosen)
            read = ReadTokens(tokens, None, None if read.logits is None else read.logits[chosen], read.is_finite)
            tokens, lengths, scores = tokens[chosen], lengths[chosen], scores[chosen]
            canvas_lengths = canvas_lengths[chosen]
        if streamer is not None:
            streamer.put(tokens.cpu())
            streamer.end()
        distinct, core = None, None
        if config.output_routing:
            distinct, core = self._routing(config, written, canvas_lengths, given.expert_indices is None)
        return YanGenerateOutput(
            sequences=tokens,
            sequence_scores=scores,
            lengths=lengths,
            length_mode=length_mode,
            latents=written.latents,
            logits=read.logits,
            trajectory=written.states,
            expert_indices=written.experts if config.output_expert_indices else None,
            distinct_experts=distinct,
            core_experts=core,
            num_field_evaluations=len(evaluation_times(list(options.times), options.solver)),
        )

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

    @staticmethod
    def _check_given(name: str, values: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """`values` cut to the canvas; its shape must be `shape`, or longer in the second dimension."""
        if values.dim() != len(shape) or values.shape[0] != shape[0] or values.shape[2:] != shape[2:]:
            raise ValueError(
                f"`{name}` must have shape {shape} (rows, target length, ...), but have {tuple(values.shape)}."
            )
        values = values[:, : shape[1]].to(device)
        if not torch.isfinite(values).all():
            raise ValueError(f"`{name}` holds values that are not finite.")
        return values

    def _check_experts(self, experts: torch.Tensor) -> torch.Tensor:
        if experts.is_floating_point() or experts.dtype == torch.bool:
            raise ValueError(f"`expert_indices` must be integers, but their dtype is {experts.dtype}.")
        lowest, highest = torch.stack([experts.min(), experts.max()]).tolist()
        if lowest < 0 or highest >= self.config.num_experts:
            raise ValueError(
                f"`expert_indices` must be in 0 to {self.config.num_experts - 1} with "
                f"`num_experts={self.config.num_experts}`, but reach from {lowest} to {highest}."
            )
        return experts.long()

    def _choose(
        self,
        config: YanGenerationConfig,
        tokens: torch.Tensor,
        lengths: torch.Tensor,
        kept: torch.Tensor,
        scores: torch.Tensor,
        joint: torch.Tensor,
        latents: torch.Tensor,
        num_choices: int,
    ) -> torch.Tensor:
        """The rows of the best candidates, `(B,)`."""
        utility = joint if config.rerank == "joint" else scores
        if config.rerank == "cycle":
            encoded = self.model.encode(tokens, kept.long()).last_hidden_state
            utility = -cycle_distance(latents, encoded, kept)
        elif config.rerank == "mbr":
            special = {config.pad_token_id, config.bos_token_id, *config.end_token_ids()}
            rows = [
                [token for token in row[:length] if token not in special]
                for row, length in zip(tokens.tolist(), lengths.tolist())
            ]
            groups = [rows[start : start + num_choices] for start in range(0, len(rows), num_choices)]
            utility = torch.tensor([consensus(group) for group in groups], device=scores.device)
        return best_candidates(utility.view(-1, num_choices), scores.view(-1, num_choices))

    def _routing(
        self, config: YanGenerationConfig, written: Written, lengths: torch.Tensor, is_routed: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """How many experts each block chose, `(B, N)`, and its core set, `(B, N, K)`, if the gate was asked."""
        canvas = torch.arange(written.experts.shape[1], device=lengths.device) < lengths[:, None]
        num_experts, block_size = self.config.num_experts, config.routing_block_size
        used = experts_of_blocks(written.experts, canvas, num_experts, block_size)
        core = written.core
        if core is not None:
            core = core[:, : used.shape[1]]  # a compiled canvas may have more blocks
        elif is_routed:
            core = used.any(dim=-1, keepdim=True).expand_as(used)
        return used.sum(dim=-1), core

    @staticmethod
    def _rows(written: Written, rows: torch.Tensor) -> Written:
        return Written(
            latents=written.latents[rows],
            decoded=written.decoded[rows],
            experts=None if written.experts is None else written.experts[rows],
            states=None if written.states is None else written.states[:, rows],
            tokens=None,
            is_finite=written.is_finite,
            core=None if written.core is None else written.core[rows],
        )

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
