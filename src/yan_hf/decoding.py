# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""From latents to tokens: the vocabulary head in blocks, argmax or sampling, scores, the cut after the end token."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.stopping_criteria import StoppingCriteriaList

from .cpu_linear import is_plain_linear, linear


# Logits of one block: 2^25 float32 values are 128 MiB. A whole batch of long targets over a large vocabulary has many
# gigabytes of logits, and none of them is needed once its token is read.
_BLOCK_ELEMENTS = 2**25
# On the CPU the vocabulary is cut too, so that a block stays in the cache between the product and its maximum.
_CPU_TOKENS, _CPU_VOCABULARY, _CPU_BLOCK_ELEMENTS = 512, 8192, 2**21


@dataclass
class ReadTokens:
    """
    Tokens read off latents.

    Args:
        tokens: `(B, L)`, int64.
        log_probs: Log-probability of each token by the vocabulary head, before any processor, `(B, L)`, float32;
            `None` unless asked for.
        logits: `(B, L, V)`; `None` unless asked for.
        is_finite: Whether the logits are finite numbers, where a token was chosen by them, a tensor `()`.
        has_choice: Whether every position had a token left to choose, a tensor `()`; `None` for a plain argmax.
    """

    tokens: torch.Tensor
    log_probs: torch.Tensor | None
    logits: torch.Tensor | None
    is_finite: torch.Tensor
    has_choice: torch.Tensor | None = None


def make_processors(config: PreTrainedConfig, device: torch.device | str = "cpu") -> LogitsProcessorList:
    """
    Transformers' processors that the generation configuration asks for, in Transformers' order.

    Raises:
        ValueError: from the processors themselves, for values out of range.
    """
    processors = LogitsProcessorList()
    if config.suppress_tokens is not None:
        processors.append(SuppressTokensLogitsProcessor(config.suppress_tokens, device=device))
    if config.do_sample:
        if config.temperature is not None and config.temperature != 1.0:
            processors.append(TemperatureLogitsWarper(config.temperature))
        if config.top_k:
            processors.append(TopKLogitsWarper(top_k=config.top_k))
        if config.top_p is not None and config.top_p < 1.0:
            processors.append(TopPLogitsWarper(top_p=config.top_p))
        if config.min_p is not None:
            processors.append(MinPLogitsWarper(min_p=config.min_p))
        if config.typical_p is not None and config.typical_p < 1.0:
            processors.append(TypicalLogitsWarper(mass=config.typical_p))
    return processors


def _reads_by_vocabulary(head: nn.Module, states: torch.Tensor) -> bool:
    return (
        states.device.type == "cpu"
        and not torch.compiler.is_compiling()  # a compiler would unroll the loop
        and is_plain_linear(head)
        and head.weight.device == states.device
    )


def _argmax_by_vocabulary(
    head: nn.Linear, states: torch.Tensor, with_scores: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Argmax, its logit and, `with_scores`, the logarithm of the partition sum; `(T, d)` → `(T,)` each."""
    tokens = best = partition = None
    part_size = min(_CPU_VOCABULARY, max(1024, _CPU_BLOCK_ELEMENTS // len(states)))
    for start in range(0, head.out_features, part_size):
        part = slice(start, start + part_size)
        bias = None if head.bias is None else head.bias[part]
        logits = linear(states, head.weight[part], bias)
        part_best, part_tokens = logits.max(dim=-1)
        if with_scores:
            part_sum = logits.float().logsumexp(dim=-1)
            partition = part_sum if partition is None else torch.logaddexp(partition, part_sum)
        if best is None:
            tokens, best = part_tokens, part_best
        else:
            # The first of equal ones stays, as with one maximum over the vocabulary; a NaN wins, as there.
            better = (part_best > best) | part_best.isnan()
            tokens = torch.where(better, part_tokens + start, tokens)
            best = torch.where(better, part_best, best)
    return tokens, best, partition


def read_tokens(
    head: nn.Module,
    states: torch.Tensor,
    *,
    processors: LogitsProcessorList | None = None,
    uniform: torch.Tensor | None = None,
    context_ids: torch.Tensor | None = None,
    end_token_ids: list[int] | None = None,
    min_length: int = 1,
    with_scores: bool = False,
    with_logits: bool = False,
) -> ReadTokens:
    """
    Reads a token off every position, a block of positions at a time.

    Args:
        head: The vocabulary head, from `(T, d)` to logits `(T, V)`.
        states: What it reads, `(B, L, d)`.
        processors: Applied to the logits, float32, of each position by itself, `(T, V)`.
        uniform: Uniform noise `(B, L)`, float64, for a draw from the processed distribution; `None` takes the argmax.
        context_ids: Given to the processors as the ids so far, `(B, Lx)`: the source, since there is no prefix.
        end_token_ids: Tokens that are not taken at the first `min_length - 1` positions.
        with_scores: Whether to give the tokens' log-probabilities.
        with_logits: Whether to give the logits.
    """
    batch_size, length, _ = states.shape
    flat_states = states.flatten(0, 1)
    num_tokens = len(flat_states)
    processors = processors or None
    forbids_end = bool(end_token_ids) and min_length > 1
    is_argmax = processors is None and uniform is None and not with_logits and not forbids_end
    by_vocabulary = is_argmax and _reads_by_vocabulary(head, states)
    vocab_size = head.out_features if hasattr(head, "out_features") else head.weight.shape[0]
    block_size = _CPU_TOKENS if by_vocabulary else max(1, _BLOCK_ELEMENTS // vocab_size)
    blocks = []
    for start in range(0, num_tokens, block_size):
        block = slice(start, min(start + block_size, num_tokens))
        if by_vocabulary:
            tokens, chosen, partition = _argmax_by_vocabulary(head, flat_states[block], with_scores)
            blocks.append((tokens, chosen, chosen, partition, None, None))
            continue
        logits = head(flat_states[block])
        scores = logits
        indices = torch.arange(block.start, block.stop, device=states.device)
        if forbids_end:
            early = indices % length < min_length - 1
            scores = scores.clone()
            scores[:, end_token_ids] = scores[:, end_token_ids].masked_fill(early[:, None], -torch.inf)
        if processors is not None:
            rows = indices // length
            prefix = (
                context_ids[rows]
                if context_ids is not None
                else torch.empty(len(rows), 0, dtype=torch.long, device=states.device)
            )
            scores = processors(prefix, scores.float().clone())
        if uniform is None:
            best, tokens = scores.max(dim=-1)
            is_choice = best > -torch.inf  # false for NaN too
        else:
            tokens, is_choice = _draw(scores, uniform.flatten()[block])
        chosen = logits.gather(1, tokens[:, None])[:, 0]
        largest = chosen if is_argmax else logits.amax(dim=-1)
        partition = logits.float().logsumexp(dim=-1) if with_scores else None
        is_choice = None if is_argmax else is_choice
        blocks.append((tokens, chosen, largest, partition, is_choice, logits if with_logits else None))

    def join(parts: tuple) -> torch.Tensor | None:
        if parts[0] is None:
            return None
        return torch.cat(parts).view(batch_size, length, *parts[0].shape[1:])

    tokens, chosen, largest, partition, is_choice, logits = map(join, zip(*blocks))
    return ReadTokens(
        tokens=tokens,
        log_probs=chosen.float() - partition if with_scores else None,
        logits=logits,
        is_finite=torch.isfinite(largest).all(),
        has_choice=None if is_choice is None else is_choice.all(),
    )


def _draw(scores: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    One token for each row of `scores` `(T, V)` by inverting the cumulative distribution at `uniform` `(T,)`, and
    whether there is a distribution: where every score is minus infinity, or one is NaN, some token is given.
    """
    # In double precision: over a large vocabulary the rounding of a float32 sum is larger than many probabilities. One
    # number for each token, rather than one for each entry of the vocabulary, keeps draws cheap and repeatable.
    cumulative = scores.double().softmax(dim=-1).cumsum(dim=-1)
    threshold = uniform.to(cumulative.dtype)[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    # The last token with any probability, where rounding puts the threshold on the end of the sum.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())[:, 0]
    # Nothing is found among NaN: within the vocabulary, so that what is read at the token is in bounds.
    return torch.minimum(drawn, last).clamp(max=scores.shape[-1] - 1), torch.isfinite(cumulative[:, -1])


def cut_after_end(
    tokens: torch.Tensor, lengths: torch.Tensor, end_token_ids: list[int] | None, pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Pads behind the first end token of each canvas.

    Args:
        tokens: `(B, L)`.
        lengths: Lengths of the canvases, `(B,)`.

    Returns:
        The tokens, `(B, L)`; their number with the end token, `(B,)`; and which positions are kept, `(B, L)`.
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    for token in end_token_ids or ():
        is_end = (tokens == token) & (positions < lengths[:, None])
        first_end = torch.where(is_end, positions, tokens.shape[1]).amin(dim=-1)
        lengths = torch.minimum(lengths, first_end + 1)
    return _cut(tokens, lengths, pad_token_id)


def cut_by_criteria(
    tokens: torch.Tensor, lengths: torch.Tensor, criteria: StoppingCriteriaList, pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Cuts each text behind its shortest beginning at which a criterion stops; arguments and result as of
    [`cut_after_end`]. The criteria are asked about all rows together, and get no scores, as without `output_scores`.
    """
    for length in range(1, tokens.shape[1] + 1):
        is_done = torch.as_tensor(criteria(tokens[:, :length], None), device=tokens.device)
        lengths = torch.where(is_done, lengths.clamp(max=length), lengths)
    return _cut(tokens, lengths, pad_token_id)


def _cut(tokens: torch.Tensor, lengths: torch.Tensor, pad_token_id: int) -> tuple[torch.Tensor, ...]:
    kept = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    return tokens.masked_fill(~kept, pad_token_id), lengths, kept


__all__ = ["ReadTokens", "cut_after_end", "cut_by_criteria", "make_processors", "read_tokens"]
