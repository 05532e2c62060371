# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The mixture: expert vector fields, the gate over them, and routing: which expert serves which token."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from .configuration_yan import YanConfig
from .layers import KERNELS, apply_linear, linear, linear_gelu, positions_from_mask


@use_experts_implementation(is_concatenated=True, is_transposed=False, has_bias=True, has_gate=False)
class YanRoutedExperts(nn.Module):
    """`K` feed-forward networks with their weights stacked: 3-D parameters that Transformers' MoE kernels take."""

    parts = ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias")

    def __init__(self, config: YanConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.intermediate_size
        self.up_proj = nn.Parameter(torch.empty(self.num_experts, self.intermediate_dim, self.hidden_dim))
        self.up_proj_bias = nn.Parameter(torch.empty(self.num_experts, self.intermediate_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.down_proj_bias = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts: `(T, d)`, `(T, k)`, `(T, k)` → `(T, d)`. The eager implementation."""
        slots = top_k_index.flatten().argsort(stable=True)
        # Under expert parallelism, indices past the last expert are another rank's.
        counts = torch.bincount(top_k_index.flatten(), minlength=self.num_experts).tolist()[: self.num_experts]
        slots, output = slots[: sum(counts)], torch.zeros_like(hidden_states)
        if not len(slots):
            return output
        tokens, weights = slots // top_k_index.shape[-1], top_k_weights.flatten()[slots, None]
        fields = self.fields(hidden_states[tokens], counts) * weights
        return output.index_add_(0, tokens, fields.to(output.dtype))

    def fields(self, states: Tensor, counts: list[int]) -> Tensor:
        """`(T, d)` → `(T, d)`: of the first so many states the first expert's field, and so on."""
        groups = zip(states.split(counts), self.parts_by_expert())
        return torch.cat([self.field(group, *parts) for group, parts in groups if len(group)])

    def parts_by_expert(self) -> Iterable[tuple[Tensor, ...]]:
        """What [`field`] takes of each expert."""
        # Taken apart once: the gradient of an index into all experts is as large as all experts, for each of them.
        return zip(*(getattr(self, name).unbind() for name in self.parts))

    def field(
        self, states: Tensor, up_proj: Tensor, up_proj_bias: Tensor, down_proj: Tensor, down_proj_bias: Tensor
    ) -> Tensor:
        """One expert's field, `(T, d)` → `(T, d)`."""
        return linear(linear_gelu(states, up_proj, up_proj_bias, self.act_fn), down_proj, down_proj_bias)


# Under the decorator; looked up once, since a compiler does not look into bound methods.
EAGER_FORWARD = YanRoutedExperts.forward.__wrapped__


class YanExperts(YanRoutedExperts):
    """The expert vector fields: one chosen expert per token, or all of them where the mixture's density is needed."""

    # Computes in the experts' place while their weights are in CPU memory (`yan_hf.inference.offload`).
    offload: Any = None

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
    ) -> Tensor:
        """`(T, d)` with indices and weights `(T, k)` → `(T, d)`; without them, every expert's field, `(T, K, d)`."""
        if self.offload is not None:
            return self.offload.compute(hidden_states, top_k_index, top_k_weights)
        if top_k_index is None:
            return self.all_fields(hidden_states)
        own = {"eager": EAGER_FORWARD, "blocks": YanExperts.by_blocks}
        arguments = self, hidden_states, top_k_index, top_k_weights
        output = None if KERNELS.experts is None else KERNELS.experts(*arguments)
        if output is None:
            output = own.get(self.implementation(hidden_states), YanRoutedExperts.forward)(*arguments)
        share = self.down_proj.shape[-1] / self.intermediate_dim
        if share < 1:
            # Tensor parallelism: the ranks' outputs are summed, each with the whole bias. All but this rank's share is
            # taken off the value; the bias's gradient is whole on each rank, as that of every replicated weight.
            biases = (top_k_weights[..., None] * self.down_proj_bias[top_k_index]).sum(dim=1)
            output = output - ((1 - share) * biases).detach()
        return output

    def implementation(self, hidden_states: Tensor) -> str:
        """Transformers' name of what computes `hidden_states`, or `"blocks"` for [`~YanExperts.by_blocks`]."""
        chosen = self.config._experts_implementation
        if hidden_states.dtype == torch.float64:
            return "eager"  # gradient checks run in it, and no grouped kernel does
        if chosen == "grouped_mm" and KERNELS.linear is not None and not torch.compiler.is_compiling():
            return "eager"  # the grouped product on the CPU is the same loop, over slower kernels
        if chosen == "grouped_mm" and hidden_states.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            return "eager"  # autocast does not know the grouped product, which would stay in float32
        if chosen == "grouped_mm" and hidden_states.device.type != "cpu" and self.up_proj.dtype != torch.bfloat16:
            return "blocks"  # the grouped product of other types is a loop that waits for the counts on the host
        return chosen

    def by_blocks(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """
        As the eager implementation, in shapes that do not depend on the choice: nothing waits for the device. An
        expert's tokens fill blocks of one size, the last one with zeros; `T·k / size + K` blocks are always enough.
        """
        num_tokens, k = top_k_index.shape
        all_experts = self.config.num_experts  # also where this module holds a part: the same shapes, the same bits
        size = 8 * (num_tokens * k // (8 * all_experts) + 1)  # plain arithmetic: every Dynamo traces it
        num_blocks = num_tokens * k // size + all_experts
        # Under expert parallelism, indices past the last expert are another rank's.
        top_k_weights = top_k_weights * (top_k_index < self.num_experts)
        experts = top_k_index.flatten().clamp(max=self.num_experts - 1)
        arange = partial(torch.arange, device=experts.device)
        # Which of its expert's tokens each one is, counted along the dimension that is contiguous.
        ranks = (arange(self.num_experts)[:, None] == experts).long().cumsum(dim=1)  # (K, T·k), from 1
        padded = (ranks[:, -1] + size - 1) // size * size
        ends = padded.cumsum(0)
        places = (ends - padded)[experts] + ranks.gather(0, experts[None])[0] - 1
        blocks = hidden_states.new_zeros(num_blocks * size, hidden_states.shape[-1])
        blocks = blocks.index_copy(0, places, hidden_states.repeat_interleave(k, dim=0)).view(num_blocks, size, -1)
        # Of each block; those behind the last one are zeros.
        expert = (ends <= (arange(num_blocks) * size)[:, None]).sum(dim=-1).clamp(max=self.num_experts - 1)
        inner = self.act_fn(torch.bmm(blocks, self.up_proj[expert].mT) + self.up_proj_bias[expert, None])
        fields = torch.bmm(inner, self.down_proj[expert].mT) + self.down_proj_bias[expert, None]
        fields = fields.flatten(0, 1)[places].view(num_tokens, k, -1)
        return (fields * top_k_weights[..., None]).sum(dim=1).to(hidden_states.dtype)

    def all_fields(self, hidden_states: Tensor, only: int | None = None) -> Tensor:
        """The fields of every expert, `(T, d)` → `(T, K, d)`, or of `only` one, `(T, 1, d)`."""
        num_experts = self.num_experts if only is None else 1
        if self.implementation(hidden_states) not in ("eager", "blocks"):
            return _all_by_index(partial(YanRoutedExperts.forward, self), hidden_states, num_experts, only or 0)
        part = slice(None) if only is None else slice(only, only + 1)
        up_proj, down_proj = self.up_proj[part].transpose(1, 2), self.down_proj[part].transpose(1, 2)
        states = hidden_states.expand(len(up_proj), *hidden_states.shape)  # (K, T, d), no copy
        inner = torch.bmm(states, up_proj) + self.up_proj_bias[part, None]
        fields = torch.bmm(self.act_fn(inner), down_proj) + self.down_proj_bias[part, None]
        return fields.transpose(0, 1)


def _all_by_index(routed: Callable, hidden_states: Tensor, num_experts: int, first: int = 0) -> Tensor:
    # Each token once for each expert: the kernels of routed tokens, already sorted by expert.
    num_tokens = hidden_states.shape[0]
    experts = torch.arange(first, first + num_experts, device=hidden_states.device)
    index = experts.repeat_interleave(num_tokens)[:, None]
    weights = torch.ones_like(index, dtype=hidden_states.dtype)
    fields = routed(hidden_states.repeat(num_experts, 1), index, weights)
    return fields.view(num_experts, num_tokens, -1).transpose(0, 1)


def expert_fields(experts: nn.Module, routed: Callable, hidden_states: Tensor, num_experts: int) -> Tensor:
    """
    Every expert's field, `(T, d)` → `(T, K, d)`, by a call of the module, where adapters and parallelism hook in.
    Where weights are spread over ranks, `routed` is called instead: those hooks know indices alone.
    """
    if any(isinstance(parameter, DTensor) for parameter in experts.parameters()):
        return _all_by_index(routed, hidden_states, num_experts)
    return experts(hidden_states)


class YanGate(nn.Module):
    """
    Gate over the experts, per target token: `[r ; pooled source ; time embedding]`, width `3d` → `Linear(3d, m·d) →
    GELU → Linear(m·d, K)`, divided by the gate's temperature.
    """

    def __init__(self, config: YanConfig):
        super().__init__()
        inner_size = config.gate_dim_multiplier * config.hidden_size
        self.up_proj = nn.Linear(3 * config.hidden_size, inner_size)
        self.down_proj = nn.Linear(inner_size, config.num_experts)
        self.temperature = config.gate_temperature

    def forward(self, hidden_states: Tensor, pooled_source: Tensor, time_embedding: Tensor) -> Tensor:
        """
        Of the trunk's result `r` `(B, Ly, d)`, the masked mean of the source's latents `(B, d)` and the time embedding
        `(B or 1, d)`: logits `(B, Ly, K)`, already divided by the temperature.
        """
        others = (values[:, None].expand_as(hidden_states) for values in (pooled_source, time_embedding))
        features = torch.cat([hidden_states, *others], dim=-1)
        return self.down_proj(nn.functional.gelu(apply_linear(self.up_proj, features))) / self.temperature


class YanExpertRoutes(nn.Module):
    """
    Hands on each token's experts `(T, k)` and their weights, as `(logits, weights, experts)`.

    A module, without parameters, so that the expert parallelism of Transformers before 5.21 can hook into it and leave
    each rank its own experts; later versions hook into the experts.
    """

    def __init__(self, config: YanConfig):
        super().__init__()
        self.num_experts = config.num_experts

    def forward(self, experts: Tensor, weights: Tensor) -> tuple[None, Tensor, Tensor]:
        return None, weights, experts


def gate_log_probs(gate_logits: Tensor, attention_mask: Tensor) -> Tensor:
    """
    Log-probabilities of the experts, at least float32, from logits `(B, Ly, K)`; padding, 0 in the mask `(B, Ly)`,
    gets the uniform distribution.
    """
    logits = gate_logits.to(torch.promote_types(gate_logits.dtype, torch.float32))
    # Equal logits are the uniform distribution.
    return logits.masked_fill(~attention_mask.bool()[..., None], 0.0).log_softmax(dim=-1)


def choose_experts(log_probs: Tensor, uniform: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """
    One expert per target token, `(B, Ly)`, int64, from their log-probabilities `(B, Ly, K)`: the most probable one, or
    with uniform noise of the same shape a draw by the Gumbel-max trick. A temperature below 1 sharpens the gate.
    """
    if uniform is None:
        return log_probs.argmax(dim=-1)
    tiny = torch.finfo(log_probs.dtype).tiny
    exponential = uniform.to(log_probs.dtype).clamp(min=tiny).log().neg().clamp(min=tiny)
    return (_sharpened(log_probs, temperature) - exponential.log()).argmax(dim=-1)


def _sharpened(log_probs: Tensor, temperature: float) -> Tensor:
    """Log-probabilities `(..., K)` divided by a temperature, up to a constant: 0 for the mode, however low it is."""
    return (log_probs - log_probs.amax(dim=-1, keepdim=True)) / temperature


@dataclass(frozen=True)
class RoutingOptions:
    """
    How experts are routed; hashable, so that a compiled program can be one for each.

    Tokens are put into blocks, and a block agrees: on the experts that its tokens may choose from (its core set, with
    `routing="block"`), and, with a `scope` beyond the token, on one choice for all of them, a core set of one.
    """

    routing: str = "token"  # or "block"
    block_size: int | None = None  # real target tokens of a block; `None` is the whole target
    top_k: int | None = None  # experts that a token votes for; `None` is all of them
    core_threshold: float = 1.0  # share of the votes that a core set has to exceed
    min_experts: int = 1  # least size of a core set
    scope: str = "token"  # whose tokens share one choice: or "block", or "target"

    @classmethod
    def from_config(cls, config: Any) -> "RoutingOptions":
        """Those of a [`YanConfig`], or of a resolved [`YanGenerationConfig`]: the fields have the same names."""
        return cls(
            config.routing,
            None if config.expert_scope == "target" else config.routing_block_size,
            config.routing_top_k,
            float(config.core_threshold),
            config.min_experts,
            config.expert_scope,
        )

    def num_blocks(self, length: int) -> int:
        """Blocks of a canvas of `length` positions, if all of them are real."""
        return 1 if self.block_size is None else -(-length // self.block_size)


def block_of_token(attention_mask: Tensor, block_size: int | None) -> Tensor:
    """
    The block of each token, `(B, Ly)`, int64. Real tokens are counted, so that padding on either side shifts no block;
    what stands at padding means nothing.
    """
    if block_size is None:
        return torch.zeros_like(attention_mask, dtype=torch.long)
    return positions_from_mask(attention_mask) // block_size


def _block_sums(values: Tensor, attention_mask: Tensor, block_size: int | None) -> Tensor:
    """The sum over the real tokens of each of a canvas's `N` blocks: `(B, Ly, K)` → `(B, N, K)`."""
    values = values.masked_fill(~attention_mask.bool()[..., None], 0)
    blocks = block_of_token(attention_mask, block_size)[..., None].expand_as(values)
    num_blocks = RoutingOptions(block_size=block_size).num_blocks(values.shape[1])
    return values.new_zeros(values.shape[0], num_blocks, values.shape[2]).scatter_add(1, blocks, values)


def sum_over_blocks(values: Tensor, attention_mask: Tensor, block_size: int | None) -> Tensor:
    """The sum over each block's real tokens, given to every token of the block: `(B, Ly, K)` → `(B, Ly, K)`."""
    if block_size is None:
        return values.masked_fill(~attention_mask.bool()[..., None], 0.0).sum(dim=1, keepdim=True).expand_as(values)
    blocks = block_of_token(attention_mask, block_size)[..., None].expand_as(values)
    return _block_sums(values, attention_mask, block_size).gather(1, blocks)


def first_of_blocks(attention_mask: Tensor, is_counted: Tensor, block_size: int | None) -> Tensor:
    """The first token of each block that counts, of masks `(B, Ly)`: `(B, Ly)`, bool; none in a block without one."""
    blocks = block_of_token(attention_mask, block_size).masked_fill(~is_counted, -1)
    before = nn.functional.pad(blocks.cummax(dim=1).values[:, :-1], (1, 0), value=-1)
    return is_counted & (blocks != before)


def tokens_per_block(attention_mask: Tensor, block_size: int | None, dtype: torch.dtype) -> Tensor:
    """The number of real tokens in each token's block, at least 1: `(B, Ly, 1)`."""
    return sum_over_blocks(torch.ones_like(attention_mask, dtype=dtype)[..., None], attention_mask, block_size).clamp(
        min=1
    )


def share_choice(
    log_probs: Tensor, uniform: Tensor | None, attention_mask: Tensor, options: RoutingOptions
) -> tuple[Tensor, Tensor | None]:
    """
    The gate `(B, Ly, K)` and the noise `(B, Ly, K)` of a choice that the tokens of a block share; as they are where
    each token has its own.

    The block's distribution is the softmax of its real tokens' mean log-probabilities (of their logits, that is); its
    noise is that of its first token, of canvases without padding before their last token.
    """
    if options.scope == "token":
        return log_probs, uniform
    counts = tokens_per_block(attention_mask, options.block_size, log_probs.dtype)
    log_probs = (sum_over_blocks(log_probs, attention_mask, options.block_size) / counts).log_softmax(dim=-1)
    if uniform is not None:
        first = block_of_token(attention_mask, options.block_size) * (options.block_size or 0)
        uniform = uniform.gather(1, first[..., None].expand_as(uniform))
    return log_probs, uniform


def stratified_choice(
    log_probs: Tensor,
    place: Tensor,
    attention_mask: Tensor,
    options: RoutingOptions,
    num_samples: int,
    steps_left: int,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """
    Shared choices of samples that divide the gate of [`share_choice`], `(B, Ly, K)`, divided by `temperature`, among
    them, without a look at each other.

    `place`, `(B,)`, is a row's place among those of its `num_samples` that have chosen the same so far. Of these, who
    comes first takes the gate's mode, and who comes next the expert whose share is furthest behind its probability, as
    seats are given to parties (Sainte-Laguë); no expert gets more than can go different ways in the choices that
    follow, of the other blocks and in the `steps_left`, among as many experts as this choice has in its core set.
    Gives the experts, `(B, Ly)`, and the place among those that have chosen the same after that.
    """
    length, experts = log_probs.shape[1], []
    size = options.block_size or length
    num_blocks = (attention_mask.sum(dim=-1) + size - 1).div(size, rounding_mode="floor")
    for block, first in enumerate(range(0, length, size)):  # of canvases without padding before their last token
        is_allowed = log_probs[:, first] > -torch.inf  # inside the core set
        # As logarithms, so that the gate's order is there for experts that it hardly gives anything.
        shares = _sharpened(log_probs[:, first], temperature).clamp(min=-1e30).masked_fill(~is_allowed, -torch.inf)
        choices_left = (num_blocks * (steps_left + 1) - block - 1).clamp(0, 32)[:, None]
        room = is_allowed.sum(dim=-1, keepdim=True).to(shares.dtype).pow(choices_left).clamp(max=num_samples)
        taken, chosen, following = torch.zeros_like(shares), torch.zeros_like(place), torch.zeros_like(place)
        for sample in range(num_samples):
            has_room = (taken < room) & is_allowed
            is_full = has_room.any(dim=-1, keepdim=True) & ~has_room
            best = (shares - (2 * taken + 1).log()).masked_fill(is_full, -torch.inf).argmax(dim=-1, keepdim=True)
            before = taken.gather(1, best)
            is_own = place == sample
            chosen, following = (
                torch.where(is_own, new[:, 0].to(old.dtype), old) for new, old in ((best, chosen), (before, following))
            )
            taken = taken.scatter(1, best, before + 1)
        experts.append(chosen)
        # Blocks behind a row's canvas are no choices.
        place = torch.where(attention_mask[:, first].bool(), following, place)
    blocks = block_of_token(attention_mask, options.block_size).clamp(max=len(experts) - 1)
    return torch.stack(experts, dim=1).gather(1, blocks), place


def choice_log_probs(log_probs: Tensor, experts: Tensor, attention_mask: Tensor, options: RoutingOptions) -> Tensor:
    """
    Log-probability of a row's shared choices `(B, Ly)`, `(B,)`: the sum over its blocks of what [`share_choice`]
    gives, `(B, Ly, K)`. 0 where each token has its own: no text can be told apart by as many choices as tokens.
    """
    if options.scope == "token":
        return log_probs.new_zeros(log_probs.shape[0])
    chosen = log_probs.gather(-1, experts[..., None])
    counts = tokens_per_block(attention_mask, options.block_size, chosen.dtype)
    return (chosen / counts).masked_fill(~attention_mask.bool()[..., None], 0.0).sum(dim=(1, 2))


@torch.no_grad()
def core_experts(log_probs: Tensor, attention_mask: Tensor, options: RoutingOptions) -> Tensor:
    """
    The core set of experts that each block of target tokens agrees on (dMoE, arXiv 2605.30876): whether each expert is
    in it, `(B, N, K)`, bool, for the `N` blocks of a canvas without padding; none for a block without a real token.

    Each real token votes with its probabilities of its `top_k` likeliest experts; the votes of a block are summed and
    normalised; the core set is the smallest prefix of the experts in descending order whose cumulative mass exceeds
    `core_threshold`, the expert that crosses it included, and has at least `min_experts`. Of equals the lower index
    comes first. A threshold of 1 cannot be exceeded and keeps every expert, those without votes too.
    """
    (_, length, num_experts), mask = log_probs.shape, attention_mask.bool()
    num_blocks = options.num_blocks(length)
    starts = torch.arange(num_blocks, device=mask.device) * (options.block_size or length)
    is_empty = (starts >= mask.sum(dim=-1, keepdim=True))[..., None]  # (B, N, 1)
    if options.core_threshold >= 1 or options.min_experts >= num_experts:
        return ~is_empty.expand(-1, -1, num_experts)
    # In double precision, so that the order in which a block's votes are added hardly decides who is in.
    dtype = torch.float32 if log_probs.device.type == "mps" else torch.float64
    votes = log_probs.to(dtype).exp()
    if options.top_k is not None and options.top_k < num_experts:
        # A stable sort rather than `topk`, which does not say which of equals it takes.
        chosen = votes.argsort(dim=-1, descending=True, stable=True)[..., : options.top_k]
        votes = torch.zeros_like(votes).scatter(-1, chosen, votes.gather(-1, chosen))
    votes = _block_sums(votes, mask, options.block_size)
    mass = votes / votes.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    mass, order = mass.sort(dim=-1, descending=True, stable=True)
    before = nn.functional.pad(mass.cumsum(dim=-1)[..., :-1], (1, 0))
    is_kept = before <= options.core_threshold
    is_kept[..., : options.min_experts] = True
    return torch.zeros_like(is_kept).scatter(-1, order, is_kept) & ~is_empty


def restrict_to_core(
    log_probs: Tensor, attention_mask: Tensor, options: RoutingOptions
) -> tuple[Tensor, Tensor | None]:
    """
    The gate inside the core sets: minus infinity outside, renormalised within; token routing leaves it as it is, and
    padding keeps its distribution. `(B, Ly, K)`, through which gradients reach the gate (the choice of the sets has
    none); and the core sets, `(B, N, K)`, or `None` with token routing.
    """
    if options.routing == "token":
        return log_probs, None
    core = core_experts(log_probs, attention_mask, options)
    blocks = block_of_token(attention_mask, options.block_size)
    is_allowed = core.gather(1, blocks[..., None].expand(log_probs.shape)) | ~attention_mask.bool()[..., None]
    restricted = log_probs.masked_fill(~is_allowed, -torch.inf)
    restricted = restricted - restricted.logsumexp(dim=-1, keepdim=True)
    # Where nothing was taken away, the very numbers of token routing.
    return torch.where(is_allowed.all(dim=-1, keepdim=True), log_probs, restricted), core


def experts_of_blocks(experts: Tensor, attention_mask: Tensor, num_experts: int, block_size: int | None) -> Tensor:
    """
    Which experts the tokens of each block chose, `(B, N, K)`, bool, of the choices `(B, Ly)` at real target tokens, 1
    in the mask `(B, Ly)`; its sum over the last dimension is each block's number of distinct experts.
    """
    is_chosen = experts[..., None] == torch.arange(num_experts, device=experts.device)
    return _block_sums(is_chosen.long(), attention_mask, block_size) > 0
