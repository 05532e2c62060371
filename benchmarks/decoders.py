# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The systems that `speed.py` compares: YAN in three renderings, and other decoders of its size."""

from collections.abc import Callable

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from yan_hf import YanConfig, YanForConditionalGeneration
from yan_hf.experts import choose_experts, gate_log_probs


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
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


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


def _closest(name: str, build: Callable[[int], PreTrainedModel], parameters: int) -> PreTrainedModel:
    """The number of layers that comes closest to `parameters`, which must be within 5 %."""
    with torch.device("meta"):
        sizes = {layers: build(layers).num_parameters() for layers in range(1, 41)}
    layers = min(sizes, key=lambda count: abs(sizes[count] - parameters))
    if abs(sizes[layers] - parameters) > 0.05 * parameters:
        raise RuntimeError(f"No {name} of this width is within 5 % of {parameters:,} parameters.")
    return build(layers).eval()


def matching_gpt2(config: YanConfig, parameters: int) -> PreTrainedModel:
    """A GPT-2 of the same width with an untied head."""
    return _closest(
        "GPT-2",
        lambda layers: GPT2LMHeadModel(
            GPT2Config(
                vocab_size=config.vocab_size,
                n_embd=config.hidden_size,
                n_head=config.num_attention_heads,
                n_layer=layers,
                n_positions=2 * config.max_position_embeddings,
                tie_word_embeddings=False,
                **_SPECIAL,
            )
        ),
        parameters,
    )


def matching_bart(config: YanConfig, parameters: int) -> PreTrainedModel:
    """A BART of the same width, half of its layers in the encoder; its one table of tokens is tied, as in BART."""
    return _closest(
        "BART",
        lambda layers: BartForConditionalGeneration(
            BartConfig(
                vocab_size=config.vocab_size,
                d_model=config.hidden_size,
                encoder_layers=(layers + 1) // 2,
                decoder_layers=layers // 2,
                encoder_attention_heads=config.num_attention_heads,
                decoder_attention_heads=config.num_attention_heads,
                encoder_ffn_dim=4 * config.hidden_size,
                decoder_ffn_dim=4 * config.hidden_size,
                max_position_embeddings=2 * config.max_position_embeddings,
                decoder_start_token_id=1,
                forced_eos_token_id=None,
                **_SPECIAL,
            )
        ),
        parameters,
    )


def matching_bert(config: YanConfig, parameters: int) -> PreTrainedModel:
    """A bidirectional Transformer of the same width with an untied head, for masked diffusion."""
    return _closest(
        "BERT",
        lambda layers: BertForMaskedLM(
            BertConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                num_hidden_layers=layers,
                num_attention_heads=config.num_attention_heads,
                intermediate_size=4 * config.hidden_size,
                max_position_embeddings=2 * config.max_position_embeddings,
                tie_word_embeddings=False,
                **_SPECIAL,
            )
        ),
        parameters,
    )


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
