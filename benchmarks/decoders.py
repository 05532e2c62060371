# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What YAN is compared with: other decoders of its size, the research schedule, and what a call cannot do without."""

from bisect import bisect_left
from functools import partial
from typing import Any

import torch
from transformers import (
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    MBartConfig,
    MBartForConditionalGeneration,
    PreTrainedModel,
)
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from yan_hf import YanConfig, YanForConditionalGeneration
from yan_hf.experts import choose_experts, gate_log_probs
from yan_hf.layers import YanPositionEmbedding


SIZES = {
    "tiny": {
        "vocab_size": 2_000,
        "hidden_size": 192,
        "num_attention_heads": 4,
        "encoder_layers": 2,
        "flow_layers": 2,
        "decoder_layers": 1,
        "num_experts": 2,
    },
    "base": {
        "vocab_size": 128_258,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "encoder_layers": 6,
        "flow_layers": 6,
        "decoder_layers": 2,
        "num_experts": 4,
    },
}

# Tokens that prompt lookup proposes at once.
LOOKUP_TOKENS = 10


@torch.no_grad()
def naive_generate(
    model: YanForConditionalGeneration, input_ids: torch.Tensor, length: int, steps: int
) -> torch.Tensor:
    """The research schedule: the gate's pass is thrown away, all experts and the source are computed at every step."""
    base = model.model
    source = base.encode(input_ids).last_hidden_state
    batch_size = input_ids.shape[0]
    canvas = torch.ones(batch_size, length, dtype=torch.long, device=source.device)
    state = torch.randn(batch_size, length, model.config.hidden_size, device=source.device, dtype=source.dtype)
    times = torch.zeros(batch_size, device=source.device)
    gate = base.flow(state, times, base.prepare_context(source, None, canvas)).gate_logits
    log_probs = gate_log_probs(gate, canvas)
    experts = choose_experts(log_probs, torch.rand_like(log_probs))
    index = experts[..., None, None].expand(-1, -1, 1, state.shape[-1])
    for step in range(steps):
        context = base.prepare_context(source, None, canvas)
        fields = base.flow(state, torch.full_like(times, step / steps), context).expert_fields
        state = state + fields.gather(2, index)[:, :, 0] / steps
    return model.decode(state).argmax(-1)


@torch.no_grad()
def masked_diffusion_generate(
    model: BertForMaskedLM, input_ids: torch.Tensor, length: int, steps: int, mask_token_id: int
) -> torch.Tensor:
    """
    Decodes as LLaDA does (Nie et al. 2025, greedy, one block, low-confidence remasking): every step computes all
    positions and keeps the most confident tokens among the masked ones, equally many in each step.
    """
    batch_size, source_length = input_ids.shape
    tokens = torch.full((batch_size, length), mask_token_id, device=input_ids.device)
    for step in range(steps):
        hidden_states = model.bert(torch.cat([input_ids, tokens], dim=1)).last_hidden_state
        logits = model.cls(hidden_states[:, source_length:])
        best, candidates = logits.max(dim=-1)
        confidence = best.float() - logits.float().logsumexp(dim=-1)
        masked = tokens == mask_token_id
        count = length * (step + 1) // steps - length * step // steps
        chosen = confidence.masked_fill(~masked, -torch.inf).topk(count, dim=-1).indices
        tokens = tokens.scatter(1, chosen, candidates.gather(1, chosen))
    return tokens


def _gpt2(config: YanConfig, layers: tuple[int, int], width: int, positions: int) -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=config.hidden_size,
            n_head=config.num_attention_heads,
            n_layer=sum(layers),
            n_inner=width,
            n_positions=positions,
            initializer_range=config.initializer_range,
            resid_pdrop=0.0,
            embd_pdrop=config.embedding_dropout,
            attn_pdrop=0.0,
            tie_word_embeddings=config.tie_word_embeddings,
            **_vocabulary(config),
        )
    )


class BidirectionalBart(MBartForConditionalGeneration):
    """A BART, with norms before its layers, whose decoder sees a target's whole canvas at once."""

    def decode(
        self,
        source: torch.Tensor,
        source_mask: torch.Tensor,
        canvas: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits `(B, Ly, V)` of the decoder's input on its `canvas` `(B, Ly)`, given the encoder's states."""
        hidden_states = self.model.decoder(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            # With four dimensions a mask is taken as it is, instead of becoming causal.
            attention_mask=canvas.bool()[:, None, None].expand(-1, 1, canvas.shape[1], -1),
            encoder_hidden_states=source,
            encoder_attention_mask=source_mask,
            use_cache=False,
        ).last_hidden_state
        return self.lm_head(hidden_states)


class MaskPredictBart(BidirectionalBart):
    """With a head that predicts how many tokens longer a target is than its source, from the first one's state."""

    longest_offset = 64

    def __init__(self, config: MBartConfig):
        super().__init__(config)
        self.length_head = torch.nn.Linear(config.d_model, 2 * self.longest_offset + 1)
        self.post_init()


def lowest(scores: torch.Tensor, canvas: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Which positions of the canvases `(B, L)` have the `counts` `(B,)` lowest scores."""
    ranks = scores.masked_fill(~canvas, torch.inf).argsort(dim=-1).argsort(dim=-1)
    return ranks < counts[:, None]


@torch.no_grad()
def mask_predict(
    model: MaskPredictBart, source: torch.Tensor, source_mask: torch.Tensor, lengths: torch.Tensor, iterations: int
) -> torch.Tensor:
    """
    Mask-Predict (Ghazvininejad et al. 2019) of targets of `lengths` `(B,)`, `(B, Ly)`, padded, given the encoder's
    states: the least sure tokens are written again.
    """
    canvas = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
    tokens = torch.full(canvas.shape, model.config.pad_token_id, device=lengths.device)
    confidences = torch.zeros(canvas.shape, device=lengths.device)
    for iteration in range(iterations):
        masked = lowest(confidences, canvas, lengths * (iterations - iteration) // iterations)
        ids = tokens.masked_fill(masked, model.config.mask_token_id)
        found = model.decode(source, source_mask, canvas, input_ids=ids).log_softmax(-1).max(-1)
        tokens = torch.where(masked, found.indices, tokens)
        confidences = torch.where(masked, found.values, confidences)
    return tokens


def ctc_logits(
    model: BidirectionalBart, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `(B, r Lx, V)`, where the decoder starts from the source's states, each `r` times; how many count."""
    source = model.model.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
    repeats = model.config.upsample
    embeddings, canvas = (values.repeat_interleave(repeats, dim=1) for values in (source, attention_mask))
    return model.decode(source, attention_mask, canvas, inputs_embeds=embeddings), canvas.sum(-1)


class LookupGenerator(PromptLookupCandidateGenerator):
    """Finds candidates in the source too; Transformers' own looks in what the decoder has written alone."""

    source: torch.Tensor  # (1, Lx)

    def get_candidates(self, input_ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        candidates, _ = super().get_candidates(torch.cat([self.source, input_ids], dim=1))
        return candidates[:, self.source.shape[1] :], None


class SourceLookup:
    """Of a BART whose `prompt_lookup_num_tokens` finds what it copies in the source."""

    def _get_candidate_generator(self, generation_config, input_ids, inputs_tensor, *args, **kwargs):
        generator = LookupGenerator(
            eos_token_id=generation_config._eos_token_tensor,
            num_output_tokens=generation_config.prompt_lookup_num_tokens,
            max_length=inputs_tensor.shape[1] + generation_config.max_length,
        )
        generator.source = inputs_tensor
        return generator


class LookupBart(SourceLookup, BartForConditionalGeneration):
    """BART with prompt lookup in its source."""


class LookupMBart(SourceLookup, MBartForConditionalGeneration):
    """The same with norms before the layers."""


def _bart(
    config: YanConfig,
    layers: tuple[int, int],
    width: int,
    positions: int,
    model_class: type[PreTrainedModel] = BartForConditionalGeneration,
) -> PreTrainedModel:
    model = model_class(
        model_class.config_class(
            d_model=config.hidden_size,
            encoder_layers=layers[0],
            decoder_layers=layers[1],
            encoder_attention_heads=config.num_attention_heads,
            decoder_attention_heads=config.num_attention_heads,
            encoder_ffn_dim=width,
            decoder_ffn_dim=width,
            max_position_embeddings=positions,
            init_std=config.initializer_range,
            dropout=0.0,
            decoder_start_token_id=config.eos_token_id,
            forced_eos_token_id=None,
            **_vocabulary(config),
        )
    )
    # Positions start as YAN's do: from random tables a small BART learns to copy a long source only after much longer.
    for stack in (model.model.encoder, model.model.decoder):
        table = stack.embed_positions.weight
        sinusoids = YanPositionEmbedding(*table.shape).initial_weight(2**0.5 * config.initializer_range)
        table.data.copy_(sinusoids)
    # The stacks' own dropout is that of their embeddings; the configuration has one value for everything.
    model.model.encoder.dropout = model.model.decoder.dropout = config.embedding_dropout
    return model


def _bert(config: YanConfig, layers: tuple[int, int], width: int, positions: int) -> PreTrainedModel:
    return BertForMaskedLM(
        BertConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=sum(layers),
            num_attention_heads=config.num_attention_heads,
            intermediate_size=width,
            max_position_embeddings=positions,
            tie_word_embeddings=False,
            **_vocabulary(config),
        )
    )


def _vocabulary(config: YanConfig) -> dict[str, int]:
    return {name: getattr(config, name) for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}


# A GPT-2 whose head is tied where YAN's is, a BART with its one table of tokens, one with norms before its layers, a
# bidirectional Transformer for masked diffusion, and BARTs that write all tokens at once.
_BUILDERS = {
    "ar-gpt2": _gpt2,
    "ar-bart": _bart,
    "masked-diffusion": _bert,
    "ar-mbart": partial(_bart, model_class=MBartForConditionalGeneration),
    "cmlm": partial(_bart, model_class=MaskPredictBart),
    "ctc": partial(_bart, model_class=BidirectionalBart),
}


def matching_model(
    system: str, config: YanConfig, parameters: int, positions: int, vary: str = "layers"
) -> PreTrainedModel:
    """
    Another architecture of YAN's width, with the number of parameters that comes closest to YAN's.

    Args:
        system: `"ar-gpt2"`, `"ar-bart"`, `"ar-mbart"`, `"masked-diffusion"`, `"cmlm"` or `"ctc"`.
        config: YAN's.
        parameters: YAN's number.
        positions: Size of the position table.
        vary: What brings it there: the number of `"layers"`, half of them in BART's encoder, or the feed-forward
            `"width"`, with YAN's number of layers.

    Raises:
        RuntimeError: where nothing comes within 5 %.
    """
    size = config.hidden_size
    if vary == "layers":
        shapes = [((count - count // 2, count // 2), 4 * size) for count in range(1, 41)]
    else:
        shapes = [((config.encoder_layers, config.flow_layers), width) for width in range(16, 64 * size, 16)]
    build = _BUILDERS[system]

    def surplus(shape: tuple[tuple[int, int], int]) -> int:
        with torch.device("meta"):
            return build(config, *shape, positions).num_parameters() - parameters

    index = bisect_left(shapes, 0, key=surplus)
    shape = min(shapes[max(index - 1, 0) : index + 1], key=lambda shape: abs(surplus(shape)))
    if abs(surplus(shape)) > 0.05 * parameters:
        raise RuntimeError(f"No {system} of this width is within 5 % of {parameters:,} parameters by its {vary}.")
    return build(config, *shape, positions)


def floor_costs(config: YanConfig, batch_size: int, source_length: int, length: int, steps: int) -> tuple[int, int]:
    """
    What one `generate` cannot do without: parameters read, each once a pass and every expert that is used once, and
    multiply-adds.
    """
    width, vocab_size = config.hidden_size, config.vocab_size
    feed_forward, attention = 2 * config.feed_forward_multiplier * width**2, 4 * width**2
    sources, targets = batch_size * source_length, batch_size * length
    blocks, crossing = config.flow_layers, len(config.cross_attention_layers)
    encoder = config.encoder_layers * (attention + feed_forward)
    trunk = blocks * (attention + feed_forward) + crossing * attention // 2  # queries and outputs
    keys = crossing * attention // 2
    adaptive = 4 * blocks * width**2 + 2 * crossing * width**2
    gate = 3 * config.gate_dim_multiplier * width**2
    decoder = config.decoder_layers * feed_forward + vocab_size * width
    experts = min(config.num_experts, targets) * feed_forward
    parameters = encoder + keys + gate + decoder + adaptive + steps * (trunk + experts)
    scores = (
        2
        * width
        * (
            config.encoder_layers * sources * source_length
            + steps * targets * (blocks * length + crossing * source_length)
        )
    )
    multiply_adds = (
        sources * (encoder + keys)
        + steps * targets * (trunk + feed_forward)
        + steps * adaptive
        + targets * (gate + decoder)
        + scores
    )
    return parameters, multiply_adds
