# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The layers of encoder, flow and decoder: attention, feed-forward networks, norms and embeddings."""

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.activations import ACT2FN, GELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_yan import YanConfig
from .mixers import MIXERS


class Kernels(threading.local):
    """
    Faster products for the calling thread, which `yan_hf.inference.cpu_kernels` puts here while `generate` runs.

    `linear` takes states `(..., d)`, weight `(n, d)`, bias and `"none"` or `"gelu"`; `argmax` gives the largest entry
    of `linear(states, weight, bias)` and its place, in parts of a given size; `experts` takes the experts' module and
    the arguments of its forward. All give `None` where PyTorch should compute the result.
    """

    linear: Callable[..., Tensor | None] | None = None
    argmax: Callable[..., tuple[Tensor, Tensor] | None] | None = None
    experts: Callable[..., Tensor | None] | None = None


KERNELS = Kernels()


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "_hf_hook" in module.__dict__)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a layer's weight may be used without calling the layer: no adapter, hook or parametrization is there."""
    is_linear = type(module) is nn.Linear and type(module._parameters.get("weight")) is nn.Parameter
    return is_linear and not _has_hooks(module)


def linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`nn.functional.linear`, by the thread's [`Kernels`] where they can."""
    product = None if KERNELS.linear is None else KERNELS.linear(states, weight, bias, "none")
    return nn.functional.linear(states, weight, bias) if product is None else product


def linear_gelu(states: Tensor, weight: Tensor, bias: Tensor | None, act_fn: nn.Module) -> Tensor:
    """`act_fn(linear(states))`, in one go where the thread's [`Kernels`] can and the activation is the exact GELU."""
    if KERNELS.linear is not None and type(act_fn) is GELUActivation:
        product = KERNELS.linear(states, weight, bias, "gelu")
        if product is not None:
            return product
    return act_fn(linear(states, weight, bias))


def apply_linear(layer: nn.Module, states: Tensor) -> Tensor:
    """`layer(states)`, by the thread's [`Kernels`] where the layer is a plain one."""
    if KERNELS.linear is not None and is_plain_linear(layer):
        return linear(states, layer.weight, layer.bias)
    return layer(states)


def apply_linears(layers: Sequence[nn.Module], states: Tensor) -> list[Tensor]:
    """[`apply_linear`] of each layer, by one product where all are of a quantised class that has a `joint` one."""
    kinds = {type(layer) for layer in layers}
    if len(kinds) == 1 and hasattr(kind := kinds.pop(), "joint") and not any(map(_has_hooks, layers)):
        return kind.joint(layers, states)
    return [apply_linear(layer, states) for layer in layers]


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[Tensor, Tensor]:
    """Attention with its weights, from `(B, heads, L, d/heads)` to `(B, Lq, heads, d/heads)`."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    if attention_mask is not None:
        # A query without any key attends to nothing, as in the fused kernels, rather than evenly to the padding.
        weights = weights.masked_fill(attention_mask <= torch.finfo(attention_mask.dtype).min, 0.0)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def is_slow_in_training(query: Tensor, key: Tensor) -> bool:
    """
    Whether [`sdpa_in_float32`] is the faster way: on a CPU, PyTorch's backward pass of attention in bfloat16 takes
    twice float32's time over 64 tokens, and as long over 256 (2.13).
    """
    is_half = query.dtype == torch.bfloat16
    return is_half and query.requires_grad and query.device.type == "cpu" and key.shape[2] <= 256


def sdpa_in_float32(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any):
    """Transformers' `sdpa`, in float32 for queries in another type, also under autocast."""
    with torch.autocast(query.device.type, enabled=False):
        states = (query.float(), key.float(), value.float())
        output, weights = ALL_ATTENTION_FUNCTIONS["sdpa"](module, *states, *args, **kwargs)
    return output.to(query.dtype), weights


class YanAttention(nn.Module):
    """Bidirectional multi-head attention, over the sequence itself or over the source's latents."""

    def __init__(self, config: YanConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = False
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        size, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(size, size, bias=bias)
        self.k_proj = nn.Linear(size, size, bias=bias)
        self.v_proj = nn.Linear(size, size, bias=bias)
        self.o_proj = nn.Linear(size, size)
        self.o_proj.ends_residual = True  # for its initialisation, as below

    def _split_heads(self, states: Tensor) -> Tensor:
        return states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def project_key_value(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of `states` `(B, L, d)`, each `(B, heads, L, d/heads)`."""
        key, value = apply_linears((self.k_proj, self.v_proj), states)
        return self._split_heads(key), self._split_heads(value)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value: tuple[Tensor, Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        if key_value is None:
            projected = apply_linears((self.q_proj, self.k_proj, self.v_proj), hidden_states)
            query, key, value = map(self._split_heads, projected)
        else:
            query, (key, value) = self._split_heads(apply_linear(self.q_proj, hidden_states)), key_value
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if attention_interface is ALL_ATTENTION_FUNCTIONS["sdpa"] and is_slow_in_training(query, key):
            attention_interface = sdpa_in_float32
        if key_value is not None and isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            # Flash attention takes padding as a 2-D mask, and unpads the queries by it too: right for a sequence's
            # own keys, wrong for those of another. A padded source goes through sdpa instead.
            attention_interface = ALL_ATTENTION_FUNCTIONS["sdpa"]
            attention_mask = attention_mask.bool()[:, None, None, :]
        dropout = self.attention_dropout if self.training else 0.0
        kwargs |= {"dropout": dropout, "scaling": self.scaling, "is_causal": False}
        output, weights = attention_interface(self, query, key, value, attention_mask, **kwargs)
        return apply_linear(self.o_proj, output.reshape(*hidden_states.shape[:-1], -1)), weights


class YanCrossAttention(YanAttention):
    """Attention over the source. A class of its own so that its weights are recorded as `cross_attentions`."""


class YanFeedForward(nn.Module):
    """`Linear(d, m·d) → activation → Linear(m·d, d)`, biases on."""

    def __init__(self, config: YanConfig, multiplier: int | None = None):
        super().__init__()
        inner_size = (multiplier or config.feed_forward_multiplier) * config.hidden_size
        self.up_proj = nn.Linear(config.hidden_size, inner_size)
        self.down_proj = nn.Linear(inner_size, config.hidden_size)
        self.down_proj.ends_residual = True
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        if KERNELS.linear is not None and is_plain_linear(self.up_proj):
            inner = linear_gelu(hidden_states, self.up_proj.weight, self.up_proj.bias, self.act_fn)
        else:
            inner = self.act_fn(self.up_proj(hidden_states))
        return apply_linear(self.down_proj, inner)


class YanTimeEmbedding(nn.Module):
    """Sines and cosines of the time, then `Linear(d, d)` and an exact GELU, in a given dtype: `(B,)` → `(B, d)`."""

    def __init__(self, config: YanConfig):
        super().__init__()
        self.half_size = config.hidden_size // 2
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        # The angles need more digits than half precision has; the frequencies are cheap, so they are no buffer.
        angle_dtype = torch.promote_types(timesteps.dtype, torch.float32)
        steps = torch.arange(self.half_size, device=timesteps.device, dtype=angle_dtype)
        frequencies = torch.exp(steps * (-math.log(10_000) / (self.half_size - 1)))
        angles = timesteps.to(angle_dtype)[:, None] * frequencies  # (B, d/2)
        embedding = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return nn.functional.gelu(self.proj(embedding.to(dtype)))


class AdaLNModulation(nn.Linear):
    """
    Scales and shifts of a flow block's norms, from the GELU of the time embedding: `(B, d)` → `(B, 2·n·d)`, `n` norms.
    The GELU is the caller's: with it in here an adapter's product, which sees the layer's input, could not be merged.

    The chunks are scale and shift of the self-attention norm, of the feed-forward norm and, where the block has one,
    of the cross-attention norm. A class of its own, so that it can be initialised apart: the scale multiplies the
    normalised state directly (it is not `1 + scale`), so its bias starts at one.
    """

    def __init__(self, config: YanConfig, num_norms: int):
        super().__init__(config.hidden_size, 2 * num_norms * config.hidden_size)
        self.num_norms = num_norms

    def forward(self, activated: Tensor) -> Tensor:
        return linear(activated, self.weight, self.bias)


def adaptive_layer_norm(hidden_states: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """
    A norm of a flow block: states `(B, Ly, d)`, scale and shift `(B or 1, 1, d)`, two of [`AdaLNModulation`]'s chunks.
    No method there, since an adapter that stands in the layer's place has its `forward` and nothing else of it.
    """
    size = hidden_states.shape[-1]
    if scale.shape[0] == 1 and scale.dtype == hidden_states.dtype:
        # One time for all rows: scale and shift are the kernel's own, without two more passes over the states.
        return nn.functional.layer_norm(hidden_states, (size,), scale.view(-1), shift.view(-1), eps)
    return nn.functional.layer_norm(hidden_states, (size,), eps=eps) * scale + shift


def _add(hidden_states: Tensor, update: Tensor, layer: nn.Module, padding_mask: Tensor | None = None) -> Tensor:
    """A layer's residual connection, with zeros where `padding_mask` `(B, L)` is 0."""
    states = hidden_states + nn.functional.dropout(update, layer.dropout, layer.training)
    return states if padding_mask is None else states.masked_fill(~padding_mask.bool()[..., None], 0.0)


class YanEncoderLayer(GradientCheckpointingLayer):
    """
    Pre-norm block: `x += Mixer(LN(x))`, `x += FF(LN(x))`.

    The mixer is self-attention, under the 4-D mask or what the attention implementation takes for it; or, with another
    backbone, one of `MIXERS` under the padding mask `(B, L)`, and padding is zeroed after each sub-layer.
    """

    def __init__(self, config: YanConfig, layer_idx: int):
        super().__init__()
        self.has_mixer, multiplier = config.encoder_backbone in MIXERS, None
        if self.has_mixer:
            self.mixer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.mixer = MIXERS[config.encoder_backbone](config)
            multiplier = self.mixer.feed_forward_multiplier
        else:
            self.self_attn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.self_attn = YanAttention(config, layer_idx)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = YanFeedForward(config, multiplier)
        self.dropout = config.hidden_dropout

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Unpack[TransformersKwargs]
    ) -> Tensor:
        if self.has_mixer:
            padding_mask, update = attention_mask, self.mixer(self.mixer_norm(hidden_states), attention_mask)
        else:
            padding_mask = None
            update, _ = self.self_attn(self.self_attn_norm(hidden_states), attention_mask, **kwargs)
        hidden_states = _add(hidden_states, update, self, padding_mask)
        update = self.feed_forward(self.feed_forward_norm(hidden_states))
        return _add(hidden_states, update, self, padding_mask)


class YanFlowLayer(GradientCheckpointingLayer):
    """
    Block of the flow trunk: self-attention or one of `MIXERS`, cross-attention where it has one, feed-forward; with
    adaptive norms. The masks are those of [`YanEncoderLayer`]; cross-attention has its own with either backbone.
    """

    def __init__(self, config: YanConfig, layer_idx: int):
        super().__init__()
        self.has_mixer, multiplier = config.flow_backbone in MIXERS, None
        self.has_cross_attention = layer_idx in config.cross_attention_layers
        if self.has_mixer:
            self.mixer = MIXERS[config.flow_backbone](config)
            multiplier = self.mixer.feed_forward_multiplier
        else:
            self.self_attn = YanAttention(config, layer_idx)
        if self.has_cross_attention:
            self.cross_attn = YanCrossAttention(config, layer_idx)
        self.feed_forward = YanFeedForward(config, multiplier)
        self.adaptive_norm = AdaLNModulation(config, num_norms=3 if self.has_cross_attention else 2)
        self.eps = config.layer_norm_eps
        self.dropout = config.hidden_dropout

    def forward(
        self,
        hidden_states: Tensor,
        time_embedding: Tensor,
        source_latents: Tensor | None,
        attention_mask: Tensor | None,
        source_mask: Tensor | None,
        modulation: Tensor | None = None,
        source_key_value: tuple[Tensor, Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        if modulation is None:
            modulation = self.adaptive_norm(nn.functional.gelu(time_embedding))  # (B or 1, 2·n·d)
        chunks = modulation.view(modulation.shape[0], -1, 1, hidden_states.shape[-1]).unbind(1)
        normed = adaptive_layer_norm(hidden_states, chunks[0], chunks[1], self.eps)
        padding_mask = attention_mask if self.has_mixer else None
        if self.has_mixer:
            update = self.mixer(normed, attention_mask)
        else:
            update, _ = self.self_attn(normed, attention_mask, **kwargs)
        hidden_states = _add(hidden_states, update, self, padding_mask)
        if self.has_cross_attention:
            if source_key_value is None:  # otherwise computed once for many steps
                source_key_value = self.cross_attn.project_key_value(source_latents)
            normed = adaptive_layer_norm(hidden_states, chunks[4], chunks[5], self.eps)
            update, _ = self.cross_attn(normed, source_mask, source_key_value, **kwargs)
            hidden_states = _add(hidden_states, update, self, padding_mask)
        update = self.feed_forward(adaptive_layer_norm(hidden_states, chunks[2], chunks[3], self.eps))
        return _add(hidden_states, update, self, padding_mask)


class YanPositionEmbedding(nn.Embedding):
    """
    The learned table of absolute positions. A class of its own, so that it can be initialised apart: as sines and
    cosines, in which a relative position is a linear map, so that attention to it is easier to learn.
    """

    def initial_weight(self, scale: float) -> Tensor:
        """Sinusoids of amplitude `scale` (Vaswani et al. 2017, section 3.5), sines in the first half."""
        half_size = self.embedding_dim // 2
        frequencies = torch.exp(torch.arange(half_size) * (-math.log(10_000) / half_size))
        angles = torch.arange(self.num_embeddings)[:, None] * frequencies
        return scale * torch.cat([angles.sin(), angles.cos()], dim=-1)


class YanStartProjection(nn.Linear):
    """From the source's latents to the flow's start. A class of its own, so that it starts as the identity."""


def offsets_in_runs(values: Tensor) -> tuple[Tensor, Tensor]:
    """How many positions before each of a row's values `(B, L)`, and behind it, belong to the same run of equals."""

    def before(values: Tensor) -> Tensor:
        positions = torch.arange(values.shape[1], device=values.device)
        is_first = (positions == 0) | (values != values.roll(1, dims=1))
        run = is_first.long().cumsum(dim=-1) - 1
        # Of each run; the others add nothing to it.
        starts = torch.zeros_like(run).scatter_add(1, run, torch.where(is_first, positions, 0))
        return positions - starts.gather(1, run)

    return before(values), before(values.flip(-1)).flip(-1)


class YanStartOffsets(nn.Embedding):
    """
    Tells the target positions that start from one source token apart, which nothing else does at the start: the sum of
    a row for the number of these before a position, and one for that behind it. A class of its own, so that it starts
    as zeros.
    """

    def forward(self, places: Tensor, canvas: Tensor) -> Tensor:
        """The [`~lengths.source_places`] of the positions of a canvas, `(B, L)` each → `(B, L, d)`."""
        places = torch.where(canvas > 0, places, -1)
        half = self.num_embeddings // 2
        before, behind = (offset.clamp(max=half - 1) for offset in offsets_in_runs(places))
        return super().forward(before) + super().forward(half + behind)


def repeated_tokens(input_ids: Tensor, special_ids: list[int], longest: int) -> Tensor:
    """
    Which tokens `(B, L)` repeat those right before them: for each one the least `n` up to `longest` such that it lies
    in `n` tokens that are the same, one by one, as the `n` before these; 0 for the others and for special tokens.
    `(B, L)`, int64. What stands before or behind a text, padding too, changes nothing.
    """
    length = input_ids.shape[1]

    def moved(values: Tensor, places: int) -> Tensor:
        padded = nn.functional.pad(values, (max(0, places), max(0, -places)))
        return padded[:, :length] if places > 0 else padded[:, -places:]

    is_text = torch.ones_like(input_ids)
    for token in special_ids:
        is_text = is_text * (input_ids != token)
    found = torch.zeros_like(input_ids)
    for size in range(longest, 0, -1):
        is_same = (input_ids == moved(input_ids, size)) * is_text * moved(is_text, size)
        # `size` in a row: at the last of them, and then at all of them.
        ends = is_same
        for shift in range(1, size):
            ends = ends * moved(is_same, shift)
        within = ends
        for shift in range(1, size):
            within = within + moved(ends, -shift)
        found = torch.where(within > 0, size, found)
    return found


class YanRepeatEmbedding(nn.Embedding):
    """
    Tells the encoder which tokens are [`repeated_tokens`]: attention by positions alone learns slowly to compare
    neighbours. A class of its own, so that it starts as zeros.
    """

    def __init__(self, config: YanConfig):
        super().__init__(config.repeat_window + 1, config.hidden_size)
        special = (config.pad_token_id, config.bos_token_id, config.eos_token_id, config.mask_token_id)
        self.special_ids = [token for token in special if token is not None]

    def forward(self, input_ids: Tensor) -> Tensor:
        """Tokens `(B, L)` → `(B, L, d)`."""
        return super().forward(repeated_tokens(input_ids, self.special_ids, self.num_embeddings - 1))


class YanDecoderLayer(GradientCheckpointingLayer):
    """Residual block of the position-wise decoder: `x += FF(LN(x))`."""

    def __init__(self, config: YanConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = YanFeedForward(config)
        self.dropout = config.hidden_dropout

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _add(hidden_states, self.feed_forward(self.norm(hidden_states)), self)


class YanLengthHead(nn.Module):
    """
    Distribution over target lengths from the source, pooled by attention with one learned query. It starts at zero,
    where it takes the mean, and learns to look where the answer belongs, which a mean over a long source drowns.
    """

    def __init__(self, config: YanConfig):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(config.hidden_size))
        self.up_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.down_proj = nn.Linear(config.hidden_size, config.max_position_embeddings)

    def is_trained(self, config: YanConfig, state_dict: dict[str, Tensor] | None = None) -> bool:
        """
        Whether its lengths mean anything: the configuration says so, or an optimiser has moved the query from zero.
        The query is the one in the model's `state_dict`, where that has it.
        """
        query = self.query if state_dict is None else state_dict.get("length_head.query", self.query)
        query = query.to_local() if isinstance(query, DTensor) else query
        return config.length_head_trained or (not query.is_meta and bool(query.any()))

    def forward(self, source_latents: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """
        Logits `(B, max_position_embeddings)`, entry `i` for `i + 1` tokens with the end token, from `h` `(B, Lx, d)`
        and the mask `(B, Lx)`, 1 on real tokens. A row without any is pooled to zeros.
        """
        scores = source_latents @ self.query.to(source_latents.dtype) * self.query.shape[0] ** -0.5
        if source_mask is not None:
            scores = scores.masked_fill(source_mask == 0, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(source_latents.dtype)
        if source_mask is not None:
            weights = weights * source_mask.to(weights.dtype)
        pooled_source = (weights[..., None] * source_latents).sum(dim=1)
        return self.down_proj(nn.functional.gelu(self.up_proj(pooled_source)))


class YanTokenLengthHead(nn.Module):
    """Distribution over how many target tokens a source token or mask stands for, from its latent."""

    def __init__(self, config: YanConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.up_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.down_proj = nn.Linear(config.hidden_size, config.max_token_length + 1)

    def forward(self, source_latents: Tensor) -> Tensor:
        """`h` `(B, Lx, d)` → logits `(B, Lx, max_token_length + 1)`, entry `i` for `i` tokens."""
        return self.down_proj(nn.functional.gelu(self.up_proj(self.norm(source_latents))))


class YanEncoderProjection(nn.Linear):
    """From a pretrained encoder's width to the flow's. A class of its own, so that it starts orthogonal."""


def longest_sequence(encoder: nn.Module) -> int | None:
    """How many tokens the table of absolute positions of an encoder holds; `None` where it has none."""
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in ("position_embeddings", "embed_positions"):
            # RoBERTa's positions start behind the padding's, BART's at an offset.
            padding = -1 if module.padding_idx is None else module.padding_idx
            return module.num_embeddings - getattr(module, "offset", padding + 1)
    return None


def add_latent_noise(latents: Tensor, largest: float, generator: torch.Generator | None) -> Tensor:
    """`h + s·ε` with `s ~ U(0, largest)` for each row of `(B, L, d)`."""
    rand = {"generator": generator, "device": latents.device, "dtype": latents.dtype}
    scale = largest * torch.rand(latents.shape[0], 1, 1, **rand)
    return latents + scale * torch.randn(latents.shape, **rand)


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """Position of each token among its row's real tokens, `(B, L)`; padding gets a valid index that nothing reads."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` `(B, L, d)` over the positions where `mask` `(B, L)` is set: `(B, d)`; 0 for an empty row."""
    weights = mask.to(values.dtype)[..., None]
    return (values * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
