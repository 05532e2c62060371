# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The training objective: mixture-of-experts flow matching and the terms beside it (arXiv 2604.15009, sections 3 and 4).

[`LOSS_FUNCTIONS`] names the terms; their default weights are in the configuration.

Everything here is a function of tensors. Masks are 1 on the target tokens that count. Sums run in float32 at least,
whatever the model's precision or autocast.

`group` is there for a batch that is spread over processes. Data-parallel engines average gradients over these, and an
average of each process's own loss is not the loss of the joined batch: token means have different denominators, and
load balance and MMD are not means over tokens at all. So sums and points are exchanged: the value on one process is
its share of the joined batch's, times the number of processes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils.generic import maybe_autocast

from .experts import RoutingOptions, sum_over_blocks
from .layers import is_plain_linear


# Bandwidths of the RBF kernels of the MMD term, and how many latents it looks at.
MMD_BANDWIDTHS = (0.2, 0.5, 1.0, 2.0, 5.0)
MMD_MAX_POINTS = 2_000


class LossGroup:
    """The processes of a group, by default all, that share a batch and compute its loss at the same time."""

    def __init__(self, group: "dist.ProcessGroup | None" = None):
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the processes, a constant for autograd."""
        values = values.detach().clone()
        dist.all_reduce(values, group=self.group)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the processes, through which gradients flow back to each."""
        from torch.distributed.nn.functional import all_reduce

        return all_reduce(values, group=self.group or dist.group.WORLD)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Rows of all processes, as many of each, in order, `(n, ...)` → `(size · n, ...)`, with gradients to each."""
        # A sum of rows that only one process fills: backends without a reduce-scatter have its gradient too.
        slots = values.new_zeros(self.size, *values.shape)
        slots[self.rank] = values
        return self.sum(slots).flatten(0, 1)

    def union(self, tokens: torch.Tensor) -> torch.Tensor:
        """The distinct tokens of all processes, sorted, from each one's own, `(n,)`."""
        padded = tokens[:1].repeat(self.largest(len(tokens), tokens.device))
        padded[: len(tokens)] = tokens
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat(parts).unique()

    def largest(self, count: int, device: torch.device) -> int:
        """The largest of the processes' counts."""
        value = torch.tensor(count, device=device)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group)
        return int(value)


def loss_group(model: nn.Module) -> LossGroup | None:
    """
    The group over which a model's training loss is joined, `None` where each process stands for itself: in evaluation,
    which may run on one process, and under tensor parallelism, where the processes hold the same rows.
    """
    is_joined = model.config.loss_reduction == "global" and model.training and torch.is_grad_enabled()
    if not is_joined or (getattr(model, "_tp_size", None) or 1) > 1:
        return None
    is_spread = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return LossGroup() if is_spread else None


def upcast(values: torch.Tensor) -> torch.Tensor:
    """To float32, or float64 where it is that already."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def token_mean(values: torch.Tensor, mask: torch.Tensor, group: LossGroup | None = None) -> torch.Tensor:
    """Mean of `values` `(B, Ly)` over the tokens of `mask` `(B, Ly)`, which may hold weights; 0 if there are none."""
    values = upcast(values)
    mask = mask.to(values.dtype)
    # `where` and not a product alone: a non-finite value at a masked position must not reach the sum.
    values = torch.where(mask > 0, values, 0.0)
    return (values * mask).sum() / _token_count(mask, group)


def _token_count(mask: torch.Tensor, group: LossGroup | None) -> torch.Tensor:
    count = mask.sum() if group is None else group.total(mask.sum()) / group.size
    return count.clamp(min=torch.finfo(mask.dtype).tiny)


def sample_times(
    batch_size: int, beta: tuple[float, float] | list[float], device: torch.device, generator: torch.Generator | None
) -> torch.Tensor:
    """One time in [0, 1] per sequence, from Beta(a, b): `(B,)` float32."""
    a, b = beta
    if a == b == 1:
        return torch.rand(batch_size, generator=generator, device=device)
    if generator is None:
        # Its check of the arguments would read them back from the device; the configuration has checked them.
        concentrations = (torch.full((), float(value), device=device) for value in beta)
        return torch.distributions.Beta(*concentrations, validate_args=False).sample((batch_size,))
    # torch's Beta takes no generator, and reseeding the global ones would disturb others: NumPy's, seeded from ours.
    seed = torch.randint(2**62, (1,), generator=generator, device=generator.device).item()
    times = np.random.default_rng(seed).beta(a, b, size=batch_size)
    return torch.from_numpy(times).to(device, torch.float32)


def expert_log_densities(expert_fields: torch.Tensor, velocity: torch.Tensor, sigma: float) -> torch.Tensor:
    """
    `log N(u*; u_k, σ²I)`, the full normal density, for each expert: fields `u_k(z_t, t)`, `(..., K, d)`, and the
    conditional velocity `u* = z1 - z0`, `(..., d)` → `(..., K)`, float32 at least.
    """
    size = velocity.shape[-1]
    squared_distances = (upcast(expert_fields) - upcast(velocity)[..., None, :]).square().sum(dim=-1)
    return -0.5 * squared_distances / sigma**2 - 0.5 * size * math.log(2 * math.pi * sigma**2)


def flow_matching_nll(
    expert_fields: torch.Tensor, gate_log_probs: torch.Tensor, velocity: torch.Tensor, sigma: float
) -> torch.Tensor:
    """
    Per-token `-log Σ_k π_k N(u*; u_k, σ²I)` (section 3), the summand of `L_flow`: `(...,)`, float32 at least.
    Arguments as of [`expert_log_densities`], and `log π_k(z_t, t)`, `(..., K)`.
    """
    with maybe_autocast(expert_fields.device.type, enabled=False):
        log_densities = expert_log_densities(expert_fields, velocity, sigma)
        return -torch.logsumexp(upcast(gate_log_probs) + log_densities, dim=-1)


def responsibilities(
    expert_fields: torch.Tensor, gate_log_probs: torch.Tensor, velocity: torch.Tensor, sigma: float
) -> torch.Tensor:
    """`γ_k ∝ π_k N(u*; u_k, σ²I)`: the posterior probability of each expert, `(..., K)`. Arguments as above."""
    log_densities = expert_log_densities(expert_fields, velocity, sigma)
    return torch.softmax(upcast(gate_log_probs) + log_densities, dim=-1)


def latent_loss(
    latents: torch.Tensor, target_latents: torch.Tensor, mask: torch.Tensor, group: LossGroup | None = None
) -> torch.Tensor:
    """Squared distance of the sampled latent to the target's, summed over the width, mean over the tokens."""
    return token_mean((upcast(latents) - upcast(target_latents)).square().sum(dim=-1), mask, group)


def token_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor,
    label_smoothing: float = 0.0,
    group: LossGroup | None = None,
) -> torch.Tensor:
    """Cross-entropy of the decoded tokens, mean over the tokens of `mask`. No shift: position i predicts label i."""
    losses = nn.functional.cross_entropy(
        upcast(logits).flatten(0, 1),
        labels.masked_fill(mask == 0, -100).flatten(),
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return token_mean(losses.view(labels.shape), mask, group)


def can_fuse(head: nn.Module, states: torch.Tensor, label_smoothing: float) -> bool:
    """Whether [`fused_token_loss`] can take a vocabulary head's `states`."""
    return (
        hasattr(nn, "LinearCrossEntropyOptions")  # PyTorch 2.13
        and is_plain_linear(head)
        and label_smoothing == 0
        and states.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and states.device.type in ("cpu", "cuda", "meta")
        and not torch.compiler.is_compiling()
    )


def fused_token_loss(
    states: torch.Tensor,
    head: nn.Linear,
    labels: torch.Tensor,
    mask: torch.Tensor,
    has_weights: bool,
    group: LossGroup | None = None,
) -> torch.Tensor:
    """
    [`token_loss`] of `head(states)`, for states `(N, d)`, labels and mask `(N,)`, which is 0 or 1 unless it
    `has_weights`. By PyTorch's chunked product and cross-entropy: the logits of all are never there at once, nor are
    their gradients.
    """
    weight, bias = head.weight, head.bias
    if not states.is_meta and torch.is_autocast_enabled(states.device.type):  # it does not know the meta device
        dtype = torch.get_autocast_dtype(states.device.type)
        states, weight, bias = states.to(dtype), weight.to(dtype), bias.to(dtype)
    # Small enough for a cache, large enough that a pass over the vocabulary is worth it.
    size = max(1, min(512, _CHUNK_ELEMENTS // len(weight)))
    options = nn.LinearCrossEntropyOptions(
        batch_chunk_size=size, chunking_method=None, acc_policy="balanced", allow_retain_graph=True
    )
    ids = labels.masked_fill(mask == 0, -100)
    cross_entropy = partial(nn.functional.linear_cross_entropy, linear_bias=bias, ignore_index=-100, options=options)
    if states.dtype == torch.float32 and not has_weights:
        # Its gradients come with it, but a sum in half precision would be rounded as a whole.
        return cross_entropy(states, weight, ids, reduction="sum") / _token_count(mask, group)
    return token_mean(cross_entropy(states, weight, ids, reduction="none"), mask, group)


# Logits of one chunk: 2^25 values are 128 MiB in float32, however many tokens and experts there are.
_CHUNK_ELEMENTS = 2**25


@torch.no_grad()
def token_log_probs(
    decode: Callable[[torch.Tensor], torch.Tensor], latents: torch.Tensor, labels: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """
    Log-probability of each label, latents `(N, d)` and labels `(N,)` → `(N,)`, float32 at least, without a gradient:
    in chunks, so that the logits of all are never there at once. `decode`: `(1, T, d)` → `(1, T, V)`.
    """
    size = max(1, _CHUNK_ELEMENTS // vocab_size)
    chunks = zip(latents.split(size), labels.split(size))
    cross_entropy = partial(nn.functional.cross_entropy, reduction="none")
    return -torch.cat([cross_entropy(upcast(decode(states[None])[0]), ids) for states, ids in chunks])


def gate_entropy_loss(
    gate_log_probs: torch.Tensor, mask: torch.Tensor, group: LossGroup | None = None
) -> torch.Tensor:
    """Minus the mean entropy of the gate."""
    log_probs = upcast(gate_log_probs)
    return token_mean((log_probs.exp() * log_probs).sum(dim=-1), mask, group)


def load_balance_loss(
    gate_log_probs: torch.Tensor, mask: torch.Tensor, group: LossGroup | None = None
) -> torch.Tensor:
    """`Σ_k p̄_k log(K p̄_k)` with `p̄` the gate's mean over the tokens: 0 when balanced, `log K` when collapsed."""
    probs = upcast(gate_log_probs).exp()
    weights = mask.to(probs.dtype)[..., None]
    total, count = (probs * weights).sum(dim=(0, 1)), weights.sum()
    if group is not None:
        # Not a mean over tokens: the gate's mean is taken over all processes first.
        total, count = group.sum(total), group.total(count)
    floor = torch.finfo(probs.dtype).tiny
    mean_probs = total / count.clamp(min=1)
    # An expert's share may underflow to 0, where `p log p` is 0 but its derivative is not finite.
    return (mean_probs * (probs.shape[-1] * mean_probs).clamp(min=floor).log()).sum()


def mmd_loss(
    latents: torch.Tensor,
    mask: torch.Tensor,
    generator: torch.Generator | None = None,
    bandwidths: tuple[float, ...] = MMD_BANDWIDTHS,
    max_points: int = MMD_MAX_POINTS,
    group: LossGroup | None = None,
) -> torch.Tensor:
    """
    Unbiased squared maximum mean discrepancy, `()`, between the target latents `(B, Ly, d)` and `N(0, I)`, over the
    tokens whose `mask` `(B, Ly)` is positive; 0 where they are fewer than two.

    The kernel is `Σ_b exp(-‖x - y‖² / 2b²)` over the bandwidths `b` (Gretton et al. 2012, eq. 3). Its means over the
    normal distribution are in closed form, rather than over drawn points: the same expectation, with less noise and a
    third of the arithmetic. A random subset is taken of more than `max_points` tokens, those of all processes of the
    `group` together.
    """
    points = upcast(latents).flatten(0, 1)  # (n, d)
    # Weights rather than a selection by mask keep the shapes static, for `torch.compile`.
    weights = (mask > 0).flatten().to(points.dtype)
    if group is not None:
        padding = group.largest(len(points), points.device) - len(points)
        points, weights = nn.functional.pad(points, (0, 0, 0, padding)), nn.functional.pad(weights, (0, padding))
    size = len(points) * (1 if group is None else group.size)
    if size > max_points:
        # Random keys in [0, 1) and one more for a real token: real tokens come first, in random order.
        keys = torch.rand(len(points), generator=generator, device=points.device) + weights
        chosen = keys.topk(min(max_points, len(points))).indices
        points, weights, keys = points[chosen], weights[chosen], keys[chosen]
    if group is not None:
        points, weights = group.gather(points), group.gather(weights)
        if size > max_points:
            chosen = group.gather(keys).topk(max_points).indices
            points, weights = points[chosen], weights[chosen]
    count, width = weights.sum(), points.shape[-1]
    with maybe_autocast(points.device.type, enabled=False):
        within = 2 * _kernel_sum(points, weights, bandwidths) / (count * (count - 1)).clamp(min=1)
        across, normal = 0.0, 0.0
        for variance in (bandwidth**2 for bandwidth in bandwidths):
            # E exp(-‖x - y‖² / 2b²) for y of N(0, I), and for x too.
            kernel = torch.exp(points.square().sum(dim=-1) * (-0.5 / (variance + 1)))
            across = across + (variance / (variance + 1)) ** (width / 2) * kernel
            normal += (variance / (variance + 2)) ** (width / 2)
    return torch.where(count >= 2, within - 2 * (weights @ across) / count.clamp(min=1) + normal, 0.0)


def _kernel_sum(points: torch.Tensor, weights: torch.Tensor, bandwidths: tuple[float, ...]) -> torch.Tensor:
    """Sum of the kernel over all pairs of points, each pair once and none of a point with itself."""
    norms, total = points.square().sum(dim=-1), points.new_zeros(())
    for start in range(0, len(points), 256):  # in parts that fit a cache
        rows, others = slice(start, start + 256), slice(start, None)
        # |x|² + |y|² - 2xy needs no (n, n, d) tensor and, unlike `cdist`, has a gradient at distance zero.
        squared = (norms[rows, None] + norms[others] - 2 * points[rows] @ points[others].T).clamp(min=0)
        squared = squared.masked_fill(torch.ones_like(squared, dtype=torch.bool).tril(), torch.inf)
        kernel = sum(torch.exp(squared * (-0.5 / bandwidth**2)) for bandwidth in bandwidths)
        total = total + weights[rows] @ kernel @ weights[others]
    return total


def l2_loss(latents: torch.Tensor, mask: torch.Tensor, group: LossGroup | None = None) -> torch.Tensor:
    """Mean square of the target latents."""
    return token_mean(upcast(latents).square().mean(dim=-1), mask, group)


def length_loss(length_logits: torch.Tensor, lengths: torch.Tensor, group: LossGroup | None = None) -> torch.Tensor:
    """
    Cross-entropy of the length head: logits `(B, N)`, whose entry `i` stands for `i + 1` tokens, and the true lengths
    `(B,)`; rows of length 0 do not count.
    """
    labels = (lengths - 1).masked_fill(lengths < 1, -100)
    losses = nn.functional.cross_entropy(upcast(length_logits), labels, reduction="none")
    return token_mean(losses, lengths > 0, group)


def block_flow_matching_nll(
    expert_fields: torch.Tensor,
    gate_log_probs: torch.Tensor,
    velocity: torch.Tensor,
    sigma: float,
    mask: torch.Tensor,
    block_size: int | None,
    canvas: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    `-log Σ_k π_k Π_i N(u*_i; u_{k,i}, σ²I)` over the tokens `i` of a block, which share their expert, divided by their
    number: arguments as of [`flow_matching_nll`], with the block's gate at each of its tokens. `(B, Ly)`. The blocks
    are those of the `canvas` `(B, Ly)`, by default of the tokens of the `mask`, which alone count.
    """
    canvas = mask if canvas is None else canvas
    with maybe_autocast(expert_fields.device.type, enabled=False):
        log_densities = expert_log_densities(expert_fields, velocity, sigma).masked_fill(mask[..., None] == 0, 0.0)
        joint = upcast(gate_log_probs) + sum_over_blocks(log_densities, canvas, block_size)
        counts = sum_over_blocks((mask > 0).to(joint.dtype)[..., None], canvas, block_size)[..., 0]
        return -torch.logsumexp(joint, dim=-1) / counts.clamp(min=1)


def gate_loss(
    gate_log_probs: torch.Tensor, winners: torch.Tensor, mask: torch.Tensor, group: LossGroup | None = None
) -> torch.Tensor:
    """Cross-entropy of the gate `(B, Ly, K)` with the experts that explain the target best, `(B, Ly)`."""
    return token_mean(-gate_log_probs.gather(-1, winners[..., None])[..., 0], mask, group)


@dataclass
class LossInputs:
    """What one training forward has computed, for the terms to choose from; `None` or empty where it was not."""

    config: PreTrainedConfig
    group: LossGroup | None  # the processes that share the batch
    generator: torch.Generator | None  # of the randomness of estimates
    times: torch.Tensor  # of the points on the linear path, (B,)
    labels: torch.Tensor  # target ids, (B, Ly), any token where none counts
    canvas: torch.Tensor  # (B, Ly), bool, the target's positions
    mask: torch.Tensor  # (B, Ly), 1 on the tokens that count
    token_weights: torch.Tensor  # the same with the caller's weights
    target_latents: torch.Tensor  # `z1`, (B, Ly, d)
    length_logits: torch.Tensor  # (B, N)
    lengths: torch.Tensor  # (B,)
    # Where source tokens have lengths: logits (B, Lx, C), the lengths (B, Lx), and which are predicted, (B, Lx).
    token_length_logits: torch.Tensor | None = None
    token_lengths: torch.Tensor | None = None
    is_predicted: torch.Tensor | None = None
    # The whole gate, (B, Ly, K), at the training time, or else at the solver's first step.
    gate_log_probs: torch.Tensor | None = None
    # At the training time: `u_k`, (B, Ly, K, d); `u*`, (B, Ly, d); and the gate as routing restricts and shares it.
    expert_fields: torch.Tensor | None = None
    velocity: torch.Tensor | None = None
    routed_log_probs: torch.Tensor | None = None
    latents: torch.Tensor | None = None  # the solved ODE's end, (B, Ly, d)
    # (B, Ly, V) for each supervised end point: the ODE's end, or that of every solver step; (N, V), of the tokens that
    # count, with `config.keep_known`.
    logits: list[torch.Tensor] = field(default_factory=list)
    early_losses: list[torch.Tensor] = field(default_factory=list)  # token losses of end points without logits
    # For each solver step that chose: the shared gate, (B, Ly, K), and the winners, (B, Ly).
    choices: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    expert_scores: list[torch.Tensor] = field(default_factory=list)  # what these were found by, (B, Ly, K)
    target_logits: list[torch.Tensor] = field(default_factory=list)  # those decoded from `z1`


def _flow(inputs: LossInputs) -> torch.Tensor | None:
    if inputs.expert_fields is None:
        return None
    arguments = (inputs.expert_fields, inputs.routed_log_probs, inputs.velocity, inputs.config.expert_sigma)
    routing = RoutingOptions.from_config(inputs.config)
    if routing.scope == "token":
        nll = flow_matching_nll(*arguments)
    else:
        nll = block_flow_matching_nll(*arguments, inputs.mask, routing.block_size, inputs.canvas)
    return token_mean(nll, inputs.token_weights, inputs.group)


def _latent(inputs: LossInputs) -> torch.Tensor | None:
    if inputs.latents is None:
        return None
    return latent_loss(inputs.latents, inputs.target_latents, inputs.token_weights, inputs.group)


def _token(
    inputs: LossInputs, logits: list[torch.Tensor], smoothing: float = 0.0, others: Sequence[torch.Tensor] = ()
) -> torch.Tensor | None:
    labels, weights = inputs.labels, inputs.token_weights
    if inputs.config.keep_known:
        logits, counted = [values[None] for values in logits], inputs.mask > 0
        labels, weights = labels[counted][None], weights[counted][None]
    arguments = (labels, weights, smoothing, inputs.group)
    losses = [*others, *(token_loss(values, *arguments) for values in logits)]
    return sum(losses) / len(losses) if losses else None


def _mmd(inputs: LossInputs) -> torch.Tensor | None:
    if not inputs.config.loss_weights["mmd"]:
        return None
    return mmd_loss(inputs.target_latents, inputs.mask, inputs.generator, group=inputs.group)


def _length(inputs: LossInputs) -> torch.Tensor:
    loss = length_loss(inputs.length_logits, inputs.lengths, inputs.group)
    if inputs.token_lengths is None:
        return loss
    # Longer ones than the head knows count as the longest.
    labels = inputs.token_lengths.clamp(max=inputs.token_length_logits.shape[-1] - 1)
    return loss + token_loss(inputs.token_length_logits, labels, inputs.is_predicted, group=inputs.group)


def _gate(inputs: LossInputs) -> torch.Tensor | None:
    losses = [gate_loss(*choice, inputs.mask, inputs.group) for choice in inputs.choices]
    return sum(losses) if losses else None


# Name → function of the inputs; `None` where the term was not computed. The default weights, and the order in which
# terms are reported, are `configuration_yan.DEFAULT_LOSS_WEIGHTS`.
LOSS_FUNCTIONS: dict[str, Callable[[LossInputs], torch.Tensor | None]] = {
    "flow": _flow,
    "latent": _latent,
    "token": lambda inputs: _token(inputs, inputs.logits, inputs.config.label_smoothing, inputs.early_losses),
    # The whole gate: an expert outside every core set must be able to come back.
    "gate_entropy": lambda inputs: gate_entropy_loss(inputs.gate_log_probs, inputs.mask, inputs.group),
    "load_balance": lambda inputs: load_balance_loss(inputs.gate_log_probs, inputs.mask, inputs.group),
    "mmd": _mmd,
    "l2": lambda inputs: l2_loss(inputs.target_latents, inputs.mask, inputs.group),
    "length": _length,
    "gate": _gate,
    "reconstruction": lambda inputs: _token(inputs, inputs.target_logits),
}


def loss_terms(inputs: LossInputs) -> dict[str, torch.Tensor]:
    """The terms that were computed, by name, before weighting."""
    terms = {name: function(inputs) for name, function in LOSS_FUNCTIONS.items()}
    return {name: term for name, term in terms.items() if term is not None}
