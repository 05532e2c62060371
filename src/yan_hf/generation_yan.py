# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`generate`: ODE sampling in the place of autoregressive decoding."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from .generation_config_yan import REFUSED_ARGUMENTS, YanGenerationConfig
from .routing import choose_experts
from .solver import solve_flow, uniform_times
from .validation import check_finite, check_source


logger = logging.get_logger(__name__)


@dataclass
class YanGenerateOutput(ModelOutput):
    """
    Output of `generate` with `return_dict_in_generate=True`. `B` counts returned sequences.

    Args:
        sequences (`torch.LongTensor` of shape `(B, L)`): Generated tokens, padding after the end token.
        sequence_scores (`torch.FloatTensor` of shape `(B,)`): Mean log-probability of each sequence's tokens.
        lengths (`torch.LongTensor` of shape `(B,)`): Tokens of each sequence, the end token included.
        length_mode (`str`): Where the canvas's length came from: `"predicted"` or `"given"`.
        latents (`torch.FloatTensor` of shape `(B, L, d)`): The ODE's end.
        logits (`torch.FloatTensor` of shape `(B, L, V)`, *optional*): With `output_scores`.
        trajectory (`torch.FloatTensor` of shape `(S + 1, B, L, d)`, *optional*): With `output_trajectory`: the initial
            state and the state after every solver step.
        expert_indices (`torch.LongTensor` of shape `(B, L)`, *optional*): With `output_expert_indices`.
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
    num_field_evaluations: int | None = None


class YanGenerationMixin:
    """The `generate` of [`YanForConditionalGeneration`]."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        generation_config: YanGenerationConfig | None = None,
        streamer: BaseStreamer | None = None,
        target_lengths: int | torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        seeds: torch.Tensor | list[int] | None = None,
        initial_latents: torch.FloatTensor | None = None,
        expert_indices: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> torch.LongTensor | YanGenerateOutput:
        """
        Generates whole targets at once:

        ```
        0. Resolve the generation configuration and check the inputs.
        1. Encode the source, once.
        2. Choose each target's length.
        3. Draw the initial state.
        4. Solve the ODE: the first pass of the trunk chooses one expert per token and gives the first velocity.
        5. Decode, read off the tokens, cut after the end token.
        ```

        Args:
            input_ids: Source tokens, `(B, Lx)`.
            attention_mask: `(B, Lx)`, 1 on real source tokens. Padding may stand on either side.
            generation_config: Replaces the model's; keyword arguments override single fields of either.
            streamer: Gets each step's draft through `put_draft`, where it has that, and then the tokens.
            target_lengths: The targets' true lengths, end token included, where they are known: an int, or `(B,)`.
                Otherwise the length head predicts them.
            generator: Source of the randomness; the global one by default.
            seeds: One integer for each returned sequence instead of `generator`: a row's result then does not depend
                on the other rows, on padding or on the batch size.
            initial_latents: The initial state `z0`, `(B, Ly, d)` for `B` returned sequences, which no noise scale
                multiplies. Its first positions are used where a target is shorter; predicted lengths stay within it.
            expert_indices: The experts, `(B, Ly)`, instead of a choice by the gate.
            kwargs: Fields of [`YanGenerationConfig`]. Model inputs that `generate` has no use for (`labels` and what
                belongs to them) are ignored.

        Returns:
            Tokens `(B · num_return_sequences, L)`, or a [`YanGenerateOutput`].

        Raises:
            ValueError: for unknown, contradictory or autoregressive-only arguments, bad inputs (see
                [`YanForConditionalGeneration.forward`]), and non-finite weights.
        """
        # 0. Resolve the generation configuration and check the inputs.
        config, inputs_embeds = self._prepare_generation(generation_config, kwargs)
        if generator is not None and seeds is not None:
            raise ValueError("Pass `generator` or `seeds`, not both: each alone fixes the randomness.")
        check_source(self.config, input_ids, inputs_embeds, attention_mask, allow_empty_rows=False)
        was_training = self.training
        if was_training:
            self.eval()
        try:
            output = self._generate(
                config,
                input_ids,
                attention_mask,
                inputs_embeds,
                streamer,
                target_lengths,
                generator,
                seeds,
                initial_latents,
                expert_indices,
            )
        finally:
            self.train(was_training)
        return output if config.return_dict_in_generate else output.sequences

    def _generate(
        self,
        config: YanGenerationConfig,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        streamer: BaseStreamer | None,
        target_lengths: int | torch.Tensor | None,
        generator: torch.Generator | None,
        seeds: torch.Tensor | list[int] | None,
        initial_latents: torch.Tensor | None,
        expert_indices: torch.Tensor | None,
    ) -> YanGenerateOutput:
        # 1. Encode the source, once.
        source = self.model.encode(input_ids, attention_mask, inputs_embeds).last_hidden_state
        if (repeats := config.num_return_sequences) > 1:
            source = source.repeat_interleave(repeats, dim=0)
            if attention_mask is not None:
                attention_mask = attention_mask.repeat_interleave(repeats, dim=0)
            if target_lengths is not None and torch.as_tensor(target_lengths).dim() == 1:
                target_lengths = torch.as_tensor(target_lengths).repeat_interleave(repeats, dim=0)

        # 2. Choose each target's length.
        widths = []
        for name, given in (("initial_latents", initial_latents), ("expert_indices", expert_indices)):
            if given is not None:
                if given.dim() < 2 or given.numel() == 0:
                    raise ValueError(f"`{name}` must hold a position for each token, but have {tuple(given.shape)}.")
                widths.append(given.shape[1])
        lengths, width = self._choose_lengths(
            config, source, attention_mask, target_lengths, min(widths, default=None)
        )
        canvas = (torch.arange(width, device=source.device) < lengths[:, None]).long()

        # 3. Draw the initial state.
        draw = self._noise_source(lengths, width, generator, seeds)
        if initial_latents is None:
            state = (config.init_noise * draw(torch.randn, self.config.hidden_size)).to(source.dtype)
        else:
            shape = (len(lengths), width, self.config.hidden_size)
            state = self._check_given("initial_latents", initial_latents, shape, source.device).to(source.dtype)
        select: torch.Tensor | Callable
        if expert_indices is not None:
            select = self._check_given("expert_indices", expert_indices, (len(lengths), width), source.device)
            if select.is_floating_point() or select.dtype == torch.bool:
                raise ValueError(f"`expert_indices` must be integers, but their dtype is {select.dtype}.")
            select = select.long()
            if select.min() < 0 or select.max() >= self.config.num_experts:
                raise ValueError(
                    f"`expert_indices` must be in 0 to {self.config.num_experts - 1} with "
                    f"`num_experts={self.config.num_experts}`, but reach from {int(select.min())} to "
                    f"{int(select.max())}."
                )
        else:
            uniform = draw(torch.rand, self.config.num_experts) if config.expert_selection == "sample" else None

            def select(log_probs: torch.Tensor) -> torch.Tensor:
                check_finite("gate_logits", log_probs)
                return choose_experts(log_probs, uniform, config.expert_temperature)

        # 4. Solve the ODE: the first pass of the trunk chooses one expert per token and gives the first velocity.
        context = self.model.prepare_context(source, attention_mask, canvas, cache_source=True)
        times = uniform_times(config.num_inference_steps)
        trajectory = [state] if config.output_trajectory else None
        takes_drafts = streamer is not None and hasattr(streamer, "put_draft")
        if input_ids is not None and getattr(streamer, "skip_prompt", False):
            streamer.put(input_ids.cpu())  # it skips what is put first

        def on_step(state: torch.Tensor):
            if trajectory is not None:
                trajectory.append(state)
            if takes_drafts:
                streamer.put_draft(self._read_tokens(config, self.decode(state), lengths)[0].cpu())

        latents, experts = solve_flow(self.model.flow, state, context, times, select, on_step)

        # 5. Decode, read off the tokens, cut after the end token.
        logits = self.decode(latents)
        sequences, lengths, scores = self._read_tokens(config, logits, lengths)
        if streamer is not None:
            streamer.put(sequences.cpu())
            streamer.end()
        return YanGenerateOutput(
            sequences=sequences,
            sequence_scores=scores,
            lengths=lengths,
            length_mode="predicted" if target_lengths is None else "given",
            latents=latents,
            logits=logits if config.output_scores else None,
            trajectory=torch.stack(trajectory) if trajectory is not None else None,
            expert_indices=experts if config.output_expert_indices else None,
            num_field_evaluations=len(times) - 1,
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
        kwargs = {name: value for name, value in kwargs.items() if value is not None}

        config = self.generation_config if generation_config is None else generation_config
        config = YanGenerationConfig.from_dict(config.to_dict())
        if "max_length" in kwargs and "max_new_tokens" not in kwargs:
            config.max_new_tokens = None
        for name, value in kwargs.items():
            if name not in vars(config):
                raise ValueError(f"`generate` has no argument `{name}`; see its docstring for those it has.")
            setattr(config, name, value)
        config.validate()
        return config.resolve(self.config), inputs_embeds

    def _choose_lengths(
        self,
        config: YanGenerationConfig,
        source: torch.Tensor,
        attention_mask: torch.Tensor | None,
        target_lengths: int | torch.Tensor | None,
        given_width: int | None,
    ) -> tuple[torch.Tensor, int]:
        """Lengths of the canvases, `(B,)`, and the longest of them."""
        longest = config.max_new_tokens
        if target_lengths is None:
            if given_width is not None:
                longest = min(longest, given_width)
            if config.min_new_tokens > longest:
                raise ValueError(
                    f"`min_new_tokens={config.min_new_tokens}` is more than the {longest} positions that "
                    "`initial_latents` or `expert_indices` hold."
                )
            logits = self.predict_lengths(self.model.pool(source, attention_mask)).float()
            check_finite("length_logits", logits)
            allowed = torch.arange(1, logits.shape[1] + 1, device=logits.device)
            allowed = (allowed >= config.min_new_tokens) & (allowed <= longest)
            lengths = logits.masked_fill(~allowed, -torch.inf).argmax(dim=-1) + 1
            return lengths, int(lengths.max())
        lengths = torch.as_tensor(target_lengths, device=source.device)
        if lengths.is_floating_point() or lengths.dtype == torch.bool or lengths.dim() > 1:
            raise ValueError("`target_lengths` must be an integer or a 1-D integer tensor, one length for each row.")
        if lengths.dim() == 1 and len(lengths) != len(source):
            raise ValueError(f"`target_lengths` holds {len(lengths)} lengths for a batch of {len(source)} rows.")
        lengths = lengths.expand(len(source))
        shortest, width = torch.stack([lengths.min(), lengths.max()]).tolist()
        table_size = self.config.max_position_embeddings
        if shortest < 1 or width > table_size:
            raise ValueError(
                f"`target_lengths` must be in 1 to `max_position_embeddings={table_size}`, but reach from {shortest} "
                f"to {width}."
            )
        if given_width is not None and width > given_width:
            raise ValueError(
                f"`target_lengths` reach {width}, but `initial_latents` or `expert_indices` hold {given_width} "
                "positions."
            )
        return lengths, width

    @staticmethod
    def _noise_source(
        lengths: torch.Tensor,
        width: int,
        generator: torch.Generator | None,
        seeds: torch.Tensor | list[int] | None,
    ) -> Callable[..., torch.Tensor]:
        """A function `(torch.randn or torch.rand, size) → (B, L, size)`, float32 so that dtypes share their noise."""
        batch_size, device = len(lengths), lengths.device
        if seeds is None:
            noise_device = device if generator is None else generator.device

            def draw(sample: Callable, size: int) -> torch.Tensor:
                return sample(batch_size, width, size, generator=generator, device=noise_device).to(device)

            return draw

        seeds = seeds.flatten().tolist() if isinstance(seeds, torch.Tensor) else list(seeds)
        if not all(isinstance(seed, int) and 0 <= seed < 2**63 for seed in seeds):
            raise ValueError(f"`seeds` must be integers from 0 to 2**63 - 1, but are {seeds}.")
        if len(seeds) != batch_size:
            raise ValueError(f"`seeds` holds {len(seeds)} seeds for {batch_size} returned sequences.")
        # On the CPU, so that a seed means the same on every device; each row as long as itself, not as its neighbours.
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        row_lengths = lengths.tolist()

        def draw_rows(sample: Callable, size: int) -> torch.Tensor:
            noise = torch.zeros(batch_size, width, size)
            for row, (length, row_generator) in enumerate(zip(row_lengths, generators)):
                noise[row, :length] = sample(length, size, generator=row_generator)
            return noise.to(device)

        return draw_rows

    @staticmethod
    def _check_given(name: str, values: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """`values` cut to the canvas; its shape must be `shape`, or longer in the second dimension."""
        if values.dim() != len(shape) or values.shape[0] != shape[0] or values.shape[2:] != shape[2:]:
            raise ValueError(
                f"`{name}` must have shape {shape} (rows, target length, ...), but have {tuple(values.shape)}."
            )
        return values[:, : shape[1]].to(device)

    @staticmethod
    def _read_tokens(
        config: YanGenerationConfig, logits: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Argmax tokens with padding after the end token, their number, and their mean log-probability."""
        best_logits, tokens = logits.max(dim=-1)
        check_finite("logits", best_logits)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        if config.eos_token_id is not None:
            ends = torch.as_tensor(config.eos_token_id, device=tokens.device)
            is_end = torch.isin(tokens, ends) & (positions < lengths[:, None])
            first_end = torch.where(is_end, positions, tokens.shape[1]).amin(dim=-1)
            lengths = torch.minimum(lengths, first_end + 1)
        kept = positions < lengths[:, None]
        log_probs = (best_logits.float() - logits.float().logsumexp(dim=-1)).masked_fill(~kept, 0.0)
        return tokens.masked_fill(~kept, config.pad_token_id or 0), lengths, log_probs.sum(dim=-1) / lengths

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
            except OSError:
                logger.info("The checkpoint has no generation configuration; the defaults are used.")
        # A file that Transformers wrote for another class may lack them.
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(self.generation_config, name) is None:
                setattr(self.generation_config, name, getattr(default, name))
        if self.generation_config.max_new_tokens is None and self.generation_config.max_length is None:
            self.generation_config.max_new_tokens = default.max_new_tokens


__all__ = ["YanGenerateOutput", "YanGenerationMixin"]
