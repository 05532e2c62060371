# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
YAN: encoder, mixture-of-experts flow and position-wise decoder (arXiv 2604.15009).

Shapes: `B` batch, `Lx` source length, `Ly` target length, `d` width, `V` vocabulary, `K` experts.
"""

import os
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .blocks import YanLengthHead, YanPositionEmbedding, masked_mean, positions_from_mask
from .configuration_yan import YanConfig
from .distributed import loss_group
from .generation_yan import YanGenerationConfig, YanGenerationMixin
from .objective import (
    flow_matching_nll,
    gate_entropy_loss,
    l2_loss,
    latent_loss,
    length_loss,
    load_balance_loss,
    mmd_loss,
    sample_times,
    token_loss,
    token_mean,
)
from .outputs import YanAutoEncodingOutput, YanFlowContext, YanFlowOutput, YanModelOutput, YanOutput
from .routing import RoutingOptions, choose_experts, gate_log_probs, restrict_to_core
from .solver import solve_flow, time_grid
from .stacks import YanDecoder, YanEncoder, YanFlow, YanPreTrainedModel
from .validation import check_labels, check_mask, check_no_cache, check_source, check_state


logger = logging.get_logger(__name__)


class YanModel(YanPreTrainedModel):
    """Encoder, flow and decoder body, without a vocabulary head."""

    _tp_plan = {"embed_tokens": "embedding_rowwise"}

    def __init__(self, config: YanConfig, add_flow: bool = True):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        num_positions = config.max_position_embeddings + config.num_extra_positions
        self.embed_positions = YanPositionEmbedding(num_positions, config.hidden_size)
        self.encoder = YanEncoder(config)
        self.flow = YanFlow(config) if add_flow else None
        self.decoder = YanDecoder(config)
        self.post_init()

    def encode(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_target: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """
        Tokens `(B, L)` → latents `(B, L, d)`. Padding, on either side, never changes a real position.

        The latents of a target (`is_target`) are what the flow regresses: `config.embedding_dropout` is for sources.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        positions = self._positions(inputs_embeds.shape[:2], attention_mask, inputs_embeds.device)
        states = inputs_embeds + positions
        if not is_target:
            # As the encoder's own dropout: off where it is frozen.
            states = nn.functional.dropout(states, self.config.embedding_dropout, self.encoder.training)
        return self.encoder(states, attention_mask, **kwargs)

    def _positions(self, shape: torch.Size, mask: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        if mask is None:
            return self.embed_positions(torch.arange(shape[1], device=device))[None]
        return self.embed_positions(positions_from_mask(mask.to(device)))

    @staticmethod
    def pool(latents: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Masked mean of the latents `(B, L, d)` over the sequence, `(B, d)`."""
        if mask is None:
            return latents.mean(dim=1)
        return masked_mean(latents, mask)

    def prepare_context(
        self,
        source_latents: torch.Tensor,
        source_mask: torch.Tensor | None,
        target_mask: torch.Tensor,
        times: list[float] | None = None,
        repeats: int = 1,
    ) -> YanFlowContext:
        """
        What the evaluations of the field for one batch of targets share.

        Args:
            source_latents: `h`, `(B, Lx, d)`.
            source_mask: `(B, Lx)`, or `None` without padding.
            target_mask: The canvas, `(B, Ly)`.
            times: The times of all evaluations, where they are known: what depends on the source or the time alone
                (the cross-attention's keys and values, time embeddings, adaptive scales) is then computed now, once.
            repeats: Targets for each source, next to each other, which share what depends on the source.
        """

        def repeat(states: torch.Tensor) -> torch.Tensor:
            return states.repeat_interleave(repeats, dim=0) if repeats > 1 else states

        positions = self._positions(target_mask.shape, target_mask, source_latents.device)
        pooled_source = repeat(self.pool(source_latents, source_mask))
        conditioning = {}
        if times is not None:
            conditioning = self.flow.condition(list(dict.fromkeys(times)), source_latents.device)
            source: list = [
                tuple(map(repeat, layer.cross_attn.project_key_value(source_latents)))
                if layer.has_cross_attention
                else None
                for layer in self.flow.layers
            ]
            source_latents = repeat(source_latents)
        else:
            source_latents = repeat(source_latents)
            source = [source_latents] * len(self.flow.layers)
        if source_mask is not None:
            source_mask = repeat(source_mask)
        return YanFlowContext(
            source=source,
            source_mask=create_bidirectional_mask(
                self.config, positions, source_mask, encoder_hidden_states=source_latents
            ),
            target_mask=create_bidirectional_mask(self.config, positions, target_mask)
            if self.config.flow_backbone == "transformer"
            else None,
            pooled_source=pooled_source,
            attention_mask=target_mask,
            positions=positions,
            conditioning=conditioning,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        latents: torch.FloatTensor | None = None,
        timesteps: torch.FloatTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> YanModelOutput:
        """
        Evaluates the experts' fields and the gate at one state and time, and decodes the end point they point to.

        Args:
            input_ids: Source tokens, `(B, Lx)`.
            attention_mask: `(B, Lx)`, 1 on real source tokens.
            latents: The state `z_t`, `(B, Ly, d)`. By default the deterministic start: zeros, on a canvas of the
                source's length.
            timesteps: `t` in [0, 1], `(B,)`; 0 by default.
            decoder_attention_mask: The target's canvas, `(B, Ly)`; by default all ones, or the source's mask where
                `latents` is absent.
            inputs_embeds: Source embeddings `(B, Lx, d)` instead of `input_ids`.
            encoder_outputs: The source's latents, where they are known already.

        Raises:
            ValueError: for inputs that contradict each other or the configuration.
        """
        if encoder_outputs is None:
            check_source(self.config, input_ids, inputs_embeds, attention_mask)
            encoder_outputs = self.encode(input_ids, attention_mask, inputs_embeds, **kwargs)
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        source_latents = encoder_outputs[0]
        if latents is None:
            latents = torch.zeros_like(source_latents)
            if decoder_attention_mask is None:
                decoder_attention_mask = attention_mask
        if timesteps is None:
            timesteps = latents.new_zeros(latents.shape[0])
        if decoder_attention_mask is None:
            decoder_attention_mask = torch.ones(latents.shape[:2], dtype=torch.long, device=latents.device)
        check_state(self.config, latents, timesteps, decoder_attention_mask, source_latents.shape[0])

        context = self.prepare_context(source_latents, attention_mask, decoder_attention_mask)
        flow = self.flow(latents, timesteps, context, **kwargs)
        end_point = latents + (1 - timesteps.to(latents.dtype))[:, None, None] * flow.velocity
        return YanModelOutput(
            last_hidden_state=self.decoder(end_point),
            encoder_last_hidden_state=source_latents,
            velocity=flow.velocity,
            expert_fields=flow.expert_fields,
            gate_logits=flow.gate_logits,
            hidden_states=flow.hidden_states,
            attentions=flow.attentions,
            cross_attentions=flow.cross_attentions,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


class YanForConditionalGeneration(YanPreTrainedModel, YanGenerationMixin):
    """YAN with a vocabulary head and a length head: trains on source-target pairs, and generates."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    generation_config_class = YanGenerationConfig

    def __init__(self, config: YanConfig):
        super().__init__(config)
        self.model = YanModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.length_head = YanLengthHead(config)
        # Counts `generate`'s compiled programs over its calls.
        self.compiled_programs: set[tuple] = set()
        self.post_init()

    def _weighted_sum(self, terms: dict[str, torch.Tensor]) -> torch.Tensor:
        # Terms without a weight are left out rather than multiplied by zero, which would keep a NaN.
        weights = self.config.loss_weights
        return sum((weights[name] * terms[name] for name in terms if weights[name] > 0), terms["l2"] * 0.0)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `(B, Ly, d)` → vocabulary logits `(B, Ly, V)`."""
        return self.lm_head(self.model.decoder(latents))

    def predict_lengths(self, source_latents: torch.Tensor, source_mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Logits of the target's length, `(B, max_position_embeddings)`, from the source's latents `(B, Lx, d)` and mask
        `(B, Lx)`; entry `i` stands for `i + 1` tokens.
        """
        source_latents = source_latents.detach() if self.config.detach_length_head else source_latents
        return self.length_head(source_latents, source_mask)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any):
        """As in the base class; `config.length_head_trained` becomes what [`~YanLengthHead.is_trained`] tells."""
        self.config.length_head_trained = self.length_head.is_trained(self.config, kwargs.get("state_dict"))
        super().save_pretrained(save_directory, *args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        latents: torch.FloatTensor | None = None,
        timesteps: torch.FloatTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        token_weights: torch.FloatTensor | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> YanOutput:
        """
        With `labels`, the training loss; without, the experts' fields and the gate at a state and time.

        Args:
            input_ids: Source tokens, `(B, Lx)`.
            attention_mask: `(B, Lx)`, 1 on real source tokens.
            labels: Target tokens, `(B, Ly)`, the end token included, -100 where ignored. Position `i` predicts
                `labels[:, i]`: nothing is shifted.
            decoder_attention_mask: The target's canvas, `(B, Ly)`; by default where `labels` are not -100. A position
                of the canvas with an ignored label is shown to the encoder as the mask token.
            latents: The state `z_t`, `(B, Ly, d)`, without `labels`. Zeros on a canvas of the source's length by
                default.
            timesteps: `t`, `(B,)`, without `labels`; 0 by default.
            inputs_embeds: Source embeddings `(B, Lx, d)` instead of `input_ids`.
            encoder_outputs: The source's latents, where they are known already.
            token_weights: How much each target token counts in the flow, latent and token terms, `(B, Ly)`.
            generator: Source of the loss's randomness. In eval mode a fixed seed is used by default, so that
                evaluation repeats; in training the global state.

        Raises:
            ValueError: for token ids outside the vocabulary, empty rows, masks of another shape, sources or labels
                longer than the position table, state together with labels, and a key-value cache.
        """
        check_no_cache(kwargs)
        if encoder_outputs is None:
            check_source(self.config, input_ids, inputs_embeds, attention_mask, allow_empty_rows=False)
            encoder_outputs = self.model.encode(
                input_ids, attention_mask, inputs_embeds, generator=generator, **kwargs
            )
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        if labels is None:
            if self.training and latents is None:
                logger.warning_once(
                    "A model in training mode got neither `labels` nor `latents`, so there is no YAN loss. If this is "
                    "a `Trainer` with `label_smoothing_factor`, which takes the labels away: set "
                    "`config.label_smoothing` instead."
                )
            output = self.model(
                attention_mask=attention_mask,
                latents=latents,
                timesteps=timesteps,
                decoder_attention_mask=decoder_attention_mask,
                encoder_outputs=encoder_outputs,
                **kwargs,
            )
            logits, terms = self.lm_head(output.last_hidden_state), {}
            extra = {"length_logits": self.predict_lengths(output.encoder_last_hidden_state, attention_mask)}
        else:
            if latents is not None or timesteps is not None:
                raise ValueError("`latents` and `timesteps` are drawn by the loss: pass them without `labels`.")
            output, logits, terms, extra = self._training_forward(
                encoder_outputs, attention_mask, labels, decoder_attention_mask, token_weights, generator, **kwargs
            )
        return YanOutput(
            loss=self._weighted_sum(terms) if labels is not None else None,
            loss_terms={name: term.detach() for name, term in terms.items()} if labels is not None else None,
            logits=logits,
            velocity=output.velocity,
            expert_fields=output.expert_fields,
            gate_logits=output.gate_logits,
            encoder_last_hidden_state=encoder_outputs[0],
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            cross_attentions=output.cross_attentions,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
            **extra,
        )

    def _training_forward(
        self,
        encoder_outputs: BaseModelOutput,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor,
        canvas: torch.Tensor | None,
        token_weights: torch.Tensor | None,
        generator: torch.Generator | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[YanFlowOutput, torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """
        The loss terms (arXiv 2604.15009, section 4), with what they were computed from. The solver runs, and the MMD
        is estimated, only if a weight asks for it; the other terms cost little and are always there to be watched.
        """
        config, weights = self.config, self.config.loss_weights
        source_latents = encoder_outputs[0]
        check_labels(config, labels, canvas, source_latents.shape[0], token_weights)
        labels = labels.long()
        if generator is None and not self.training:
            generator = torch.Generator(source_latents.device).manual_seed(0)

        # 1. The target's latents, on its canvas.
        counted = labels != -100
        canvas = counted if canvas is None else canvas.bool()
        mask = (counted & canvas).to(torch.float32)
        token_mask = mask if token_weights is None else mask * token_weights
        target_ids = labels.masked_fill(~counted, config.mask_token_id or 0)
        target_latents = self.model.encode(target_ids, canvas, generator=generator, is_target=True).last_hidden_state
        group = loss_group(self)
        regression_target = target_latents.detach() if config.detach_target_latents else target_latents

        # 2. Flow matching at a random time of the linear path.
        rand = {"generator": generator, "device": target_latents.device}
        times = sample_times(labels.shape[0], config.time_beta, target_latents.device, generator)
        initial_state = (config.init_noise * torch.randn(target_latents.shape, **rand)).to(target_latents.dtype)
        weight = times.to(target_latents.dtype)[:, None, None]
        state = (1 - weight) * initial_state + weight * regression_target
        context = self.model.prepare_context(source_latents, attention_mask, canvas)
        flow = self.model.flow(state, times, context, **kwargs)
        log_probs, routing = gate_log_probs(flow.gate_logits, canvas), RoutingOptions.from_config(config)
        mixture, _ = restrict_to_core(log_probs, canvas, routing)
        velocity = regression_target - initial_state
        nll = flow_matching_nll(flow.expert_fields, mixture, velocity, config.expert_sigma)
        terms = {"flow": token_mean(nll, token_mask, group)}

        # 3. The solved ODE: its own evaluations from the first on, with gradients through every step.
        solved = weights["latent"] > 0 or weights["token"] > 0
        if solved:
            uniform = torch.rand(log_probs.shape, **rand)

            def select(first_log_probs: torch.Tensor) -> torch.Tensor:
                return choose_experts(restrict_to_core(first_log_probs, canvas, routing)[0], uniform)

            chosen = select if config.velocity_field == "expert" else None
            latents, _ = solve_flow(self.model.flow, initial_state, context, time_grid(config.solver_steps), chosen)
        else:
            latents = state + (1 - weight) * flow.velocity
        logits = self.decode(latents)
        if solved:
            terms["latent"] = latent_loss(latents, regression_target, token_mask, group)
            terms["token"] = token_loss(logits, target_ids, token_mask, config.label_smoothing, group)

        # 4. The gate (the whole one: an expert outside every core set must be able to come back), the latents'
        # distribution and the length.
        terms["gate_entropy"] = gate_entropy_loss(log_probs, mask, group)
        terms["load_balance"] = load_balance_loss(log_probs, mask, group)
        if weights["mmd"] > 0:
            terms["mmd"] = mmd_loss(target_latents, mask, generator, group=group)
        terms["l2"] = l2_loss(target_latents, mask, group)
        length_logits = self.predict_lengths(source_latents, attention_mask)
        terms["length"] = length_loss(length_logits, self._target_lengths(labels, canvas), group)
        extra = {"latents": latents, "target_latents": target_latents, "length_logits": length_logits}
        return flow, logits, terms, extra

    def _target_lengths(self, labels: torch.Tensor, canvas: torch.Tensor) -> torch.Tensor:
        """Tokens up to the first end token, `(B,)`: the further ones of a canvas with slack do not count."""
        lengths = canvas.sum(dim=-1)
        if self.config.eos_token_id is None:
            return lengths
        places = positions_from_mask(canvas) + 1
        ends = torch.where((labels == self.config.eos_token_id) & canvas, places, labels.shape[1] + 1)
        return torch.minimum(lengths, ends.amin(dim=-1))


class YanForAutoEncoding(YanPreTrainedModel):
    """
    Encoder and decoder without a flow: the first training stage.

    The input is the text with spans collapsed to one mask token each, padded to the target's length; the label is the
    clean text, token for token. `YanForConditionalGeneration.from_pretrained` takes its checkpoints and starts the
    flow anew.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    # A full model's checkpoint loads too; its flow is not wanted here.
    _keys_to_ignore_on_load_unexpected = [r"(^|\.)flow\.", r"(^|\.)length_head\."]

    def __init__(self, config: YanConfig):
        super().__init__(config)
        self.model = YanModel(config, add_flow=False)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        token_weights: torch.FloatTensor | None = None,
        generator: torch.Generator | None = None,
        sparse_prediction: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> YanAutoEncodingOutput:
        """
        Args:
            input_ids: Corrupted tokens, `(B, L)`.
            attention_mask: `(B, L)`, 1 where the encoder looks.
            labels: Clean tokens, `(B, L)`, -100 where ignored. Nothing is shifted.
            inputs_embeds: Embeddings `(B, L, d)` instead of `input_ids`.
            token_weights: How much each token counts in the token term, `(B, L)`.
            generator: Source of the randomness, as in [`YanForConditionalGeneration`].
            sparse_prediction: Whether to decode only the positions whose label counts, row after row, so that `logits`
                are `(N, V)`. The loss is the same; where few positions count, the vocabulary head costs little.

        Raises:
            ValueError: for token ids outside the vocabulary, masks or labels of another shape, sequences longer than
                the position table, and `sparse_prediction` without `labels`.
        """
        check_source(self.config, input_ids, inputs_embeds, attention_mask)
        encoded = self.model.encode(input_ids, attention_mask, inputs_embeds, generator=generator, **kwargs)
        latents = encoded.last_hidden_state
        if labels is None:
            if sparse_prediction:
                raise ValueError("`sparse_prediction=True` needs `labels`, which say where to predict.")
            logits, loss, terms = self.lm_head(self.model.decoder(latents)), None, None
        else:
            if generator is None and not self.training:
                generator = torch.Generator(latents.device).manual_seed(0)
            check_mask("labels", labels, latents.shape[:2], "input_ids")
            check_labels(self.config, labels, None, latents.shape[0], token_weights)
            labels = labels.long()
            mask = (labels != -100).to(torch.float32)
            token_mask = mask if token_weights is None else mask * token_weights
            weights, group = self.config.loss_weights, loss_group(self)
            decoded = latents
            if sparse_prediction:
                counted = labels != -100
                decoded, labels, token_mask = latents[counted][None], labels[counted][None], token_mask[counted][None]
            logits = self.lm_head(self.model.decoder(decoded))
            terms = {"token": token_loss(logits, labels, token_mask, self.config.label_smoothing, group)}
            logits = logits[0] if sparse_prediction else logits
            if weights["mmd"] > 0:
                terms["mmd"] = mmd_loss(latents, mask, generator, group=group)
            terms["l2"] = l2_loss(latents, mask, group)
            loss = sum(weights[name] * term for name, term in terms.items())
            terms = {name: term.detach() for name, term in terms.items()}
        return YanAutoEncodingOutput(
            loss=loss,
            loss_terms=terms,
            logits=logits,
            last_hidden_state=latents,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )


__all__ = ["YanForAutoEncoding", "YanForConditionalGeneration", "YanModel", "YanPreTrainedModel"]
