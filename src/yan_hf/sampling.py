# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The tensor half of `generate`: noise, encoding, solving, decoding, and the choice among candidates."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from types import MethodType
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.modeling_utils import PreTrainedModel

from .experts import (
    RoutingOptions,
    choice_log_probs,
    choose_experts,
    restrict_to_core,
    share_choice,
    stratified_choice,
)
from .layers import KERNELS, is_plain_linear, linear
from .lengths import EncodedSource, SourceInputs, repeat_rows, source_places
from .solver import SOLVERS, evaluation_times, integrate


@dataclass
class CandidateLayout:
    """
    The rows of one call: for each source its returned sequences, for each of these its samples, and for each sample
    the lengths that are tried for it, in this order.

    """

    lengths: torch.Tensor  # of the canvases, (R,)
    length_log_probs: torch.Tensor  # (R,)
    num_sources: int
    num_samples: int  # drawn for each returned sequence
    num_lengths: int  # tried for each sample
    # How many target tokens every source token stands for, (R, Lx), all zeros in rows where that is not predicted.
    token_lengths: torch.Tensor | None = None

    @property
    def rows_per_source(self) -> int:
        return len(self.lengths) // self.num_sources

    @property
    def samples_per_source(self) -> int:
        return self.rows_per_source // self.num_lengths

    @property
    def rows_per_sequence(self) -> int:
        return self.num_samples * self.num_lengths

    @property
    def num_sequences(self) -> int:
        return len(self.lengths) // self.rows_per_sequence

    @cached_property
    def host_lengths(self) -> list[int]:
        """The lengths, read once from the device: the host has to know the shapes of what comes after."""
        return self.lengths.tolist()

    @cached_property
    def width(self) -> int:
        return max(self.host_lengths)

    @cached_property
    def canvas(self) -> torch.Tensor:
        """Which positions are a row's own, `(R, L)`, bool."""
        return torch.arange(self.width, device=self.lengths.device) < self.lengths[:, None]

    def places(self, source: SourceInputs) -> torch.Tensor:
        """Where in the source each position starts from, `(R, L)`; see [`source_places`]."""
        return source_places(self.repeat_sources(source.mask), self.canvas.long(), self.token_lengths)

    def is_text(self) -> torch.Tensor:
        """Which positions stand for tokens of the source, `(R, L)`, bool: none behind the text."""
        num_tokens = self.token_lengths.sum(dim=-1, keepdim=True)
        return torch.arange(self.width, device=num_tokens.device) < num_tokens

    def goes_on(self, places: torch.Tensor) -> torch.Tensor:
        """Which positions start from the same token as the one before, `(R, L)`, bool, of the [`places`]."""
        return nn.functional.pad(places[:, 1:] == places[:, :-1], (1, 0)) & self.is_text()

    def known_ids(self, source: SourceInputs, is_mask: torch.Tensor) -> torch.Tensor:
        """
        The source's tokens `(B, Lx)` where they stand in the target, `(R, L)`; -1 in the fillings of the tokens with
        `is_mask` `(B, Lx)`, behind the text and in rows without masks.
        """
        ids = self.repeat_sources(source.input_ids.masked_fill(is_mask, -1))
        return ids.long().gather(1, self.places(source)).masked_fill(~self.is_text(), -1)

    def end_places(self, source: SourceInputs, end_token_ids: list[int]) -> torch.Tensor:
        """
        Where end tokens may be taken, `(R, L)`, bool: in texts whose source ends with one that stands for some target
        token at their last position alone; but anywhere on canvases with slack.
        """
        ids, mask = self.repeat_sources(source.input_ids), self.repeat_sources(source.mask)
        positions = torch.arange(ids.shape[1], device=ids.device)
        last = torch.where(mask > 0, positions, 0).amax(dim=-1, keepdim=True)
        ends = torch.stack([ids.gather(1, last) == token for token in end_token_ids]).any(dim=0)
        ends = ends & (self.token_lengths.gather(1, last) > 0)
        ends = ends & (self.token_lengths.sum(dim=-1, keepdim=True) == self.lengths[:, None])
        return ~ends | (torch.arange(self.width, device=ids.device) == self.lengths[:, None] - 1)

    def repeat_sources(self, values: torch.Tensor) -> torch.Tensor:
        """What each source has, `(B, ...)`, for each of its candidates, `(R, ...)`."""
        return repeat_rows(values, self.rows_per_source)

    def repeat(self, values: torch.Tensor) -> torch.Tensor:
        """What each returned sequence has, `(B · n, ...)`, for each of its candidates, `(R, ...)`."""
        return repeat_rows(values, self.rows_per_sequence)

    def first(self, values: torch.Tensor) -> torch.Tensor:
        """The first candidate of each returned sequence."""
        return values[:: self.rows_per_sequence]

    def best(self, utility: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Rows of the best candidates, `(B · n,)`, by utility and then by score, `(R,)` each."""
        return best_candidates(*(values.view(-1, self.rows_per_sequence) for values in (utility, scores)))


class NoiseSource:
    """
    Draws noise for the positions of a batch of canvases.

    With `seeds`, one for each returned sequence, what a row gets depends on its own seed and length and on nothing
    else: each row is drawn by itself, as long as itself, on the CPU. Lengths tried for one sample share its seed, and
    the first sample uses the given one.

    Raises:
        ValueError: for seeds that are no integers from 0 to 2⁶³ - 1, or not one for each returned sequence.
    """

    def __init__(
        self,
        layout: CandidateLayout,
        generator: torch.Generator | None = None,
        seeds: torch.Tensor | list[int] | None = None,
    ):
        self.shape, self.device = (len(layout.lengths), layout.width), layout.lengths.device
        self.generator = generator
        self.row_generators: list[torch.Generator] | None = None
        if seeds is None:
            return
        if isinstance(seeds, (torch.Tensor, np.ndarray)):
            seeds = seeds.flatten().tolist()
        seeds = list(seeds) if isinstance(seeds, Sequence) else [seeds]
        if not all(isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**63 for seed in seeds):
            raise ValueError(f"`seeds` must be integers from 0 to 2**63 - 1, but are {seeds}.")
        if len(seeds) != layout.num_sequences:
            raise ValueError(f"`seeds` holds {len(seeds)} seeds for {layout.num_sequences} returned sequences.")
        self.row_lengths = layout.host_lengths
        self.row_generators = [
            torch.Generator().manual_seed(self._candidate_seed(seed, candidate))
            for seed in seeds
            for candidate in range(layout.num_samples)
            for _ in range(layout.num_lengths)
        ]

    @staticmethod
    def _candidate_seed(seed: int, candidate: int) -> int:
        if candidate == 0:
            return seed
        # Far apart, also for neighbouring seeds.
        return int(np.random.SeedSequence([seed, candidate]).generate_state(1, np.uint64)[0] >> np.uint64(1))

    def draw(
        self, sample: Callable[..., torch.Tensor], *size: int, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """`sample`, `torch.randn` or `torch.rand`, for every position: `(R, L, *size)`, 0 behind a row's canvas."""
        if self.row_generators is None:
            device = self.device if self.generator is None else self.generator.device
            return sample(*self.shape, *size, generator=self.generator, device=device, dtype=dtype).to(self.device)
        noise = torch.zeros(*self.shape, *size, dtype=dtype)
        for row, (length, row_generator) in enumerate(zip(self.row_lengths, self.row_generators)):
            noise[row, :length] = sample(length, *size, generator=row_generator, dtype=dtype)
        return noise.to(self.device)


# Logits of one block: 2^25 float32 values are 128 MiB, where a whole batch of long targets has many gigabytes. Blocks
# are whole tiles of a GPU's product, which takes as long for the last tile's first row as for all of it.
_BLOCK_ELEMENTS, _TILE = 2**25, 128
# On the CPU the vocabulary is cut too, so that a block stays in the cache between the product and its maximum.
_CPU_TOKENS, _CPU_VOCABULARY = 512, 4096
# Bytes of a row of logits whose multiples a GPU's fastest products ask for: another vocabulary is read in two parts.
_ALIGNMENT = 16


@dataclass
class DecodedTokens:
    """Tokens read off latents."""

    tokens: torch.Tensor  # (B, L), int64
    log_probs: torch.Tensor | None  # by the vocabulary head, before any processor, (B, L), float32, if asked for
    logits: torch.Tensor | None  # (B, L, V), if asked for
    is_finite: torch.Tensor  # whether the logits are finite numbers, where a token was chosen by them, ()
    has_choice: torch.Tensor | None = None  # whether each position had a token left, (); `None` for a plain argmax

    def to(self, device: torch.device) -> "DecodedTokens":
        """The same on a device."""
        return DecodedTokens(*(values if values is None else values.to(device) for values in vars(self).values()))


def _vocabulary_part(head: nn.Module, states: torch.Tensor) -> int | None:
    """How many tokens of the vocabulary an argmax reads at a time; `None` for all of them, by the head itself."""
    is_plain = is_plain_linear(head)
    if not (is_plain or hasattr(head, "by_part")) or head.weight.device != states.device:
        return None
    if states.device.type == "cpu":
        return None if torch.compiler.is_compiling() else _CPU_VOCABULARY  # a compiler would unroll the loop
    # Under autocast each part's weight would be cast again for every block; it does not know the meta device.
    if not is_plain or (not states.is_meta and torch.is_autocast_enabled(states.device.type)):
        return None
    rest = head.out_features % (_ALIGNMENT // head.weight.element_size())
    return head.out_features - rest if 0 < rest < head.out_features else None


def _argmax_by_vocabulary(
    head: nn.Module, states: torch.Tensor, with_scores: bool, part_size: int, is_on_host: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Argmax, its logit and, `with_scores`, the logarithm of the partition sum; `(T, d)` → `(T,)` each."""
    tokens = best = partition = None
    if hasattr(head, "by_part"):  # a quantised layer, which prepares the states once
        logits_of = head.by_part(states)
    else:
        if KERNELS.argmax is not None and not with_scores:
            found = KERNELS.argmax(states, head.weight, head.bias, part_size)
            if found is not None:
                return *found, None

        def logits_of(part: slice) -> torch.Tensor:
            return linear(states, head.weight[part], None if head.bias is None else head.bias[part])

    for start in range(0, head.out_features, part_size):
        logits = logits_of(slice(start, start + part_size))
        if with_scores:
            part_sum = logits.float().logsumexp(dim=-1)
            partition = part_sum if partition is None else torch.logaddexp(partition, part_sum)
        if best is None or not is_on_host:
            part_tokens = logits.argmax(dim=-1)
            part_best = logits.gather(1, part_tokens[:, None])[:, 0]
        if best is None:
            tokens, best = part_tokens, part_best
            continue
        # The first of equal ones stays, as with one maximum over the vocabulary; a NaN wins, as there.
        if is_on_host:
            # A place, which takes ten times as long as a maximum, is looked for in the few rows that have a new one.
            part_best = logits.amax(dim=-1)
            better = ((part_best > best) | part_best.isnan()).nonzero()[:, 0]
            tokens[better] = logits[better].argmax(dim=-1) + start
            best[better] = part_best[better]
        else:
            better = (part_best > best) | part_best.isnan()
            tokens, best = torch.where(better, part_tokens + start, tokens), torch.where(better, part_best, best)
    return tokens, best, partition


def decode_tokens(
    head: nn.Module,
    states: torch.Tensor,
    *,
    processors: LogitsProcessorList | None = None,
    uniform: torch.Tensor | None = None,
    context_ids: torch.Tensor | None = None,
    end_token_ids: list[int] | None = None,
    min_length: int = 1,
    end_places: torch.Tensor | None = None,
    forbidden: torch.Tensor | None = None,
    copied_ids: torch.Tensor | None = None,
    copy_bias: float = 0.0,
    goes_on: torch.Tensor | None = None,
    with_scores: bool = False,
    with_logits: bool = False,
) -> DecodedTokens:
    """
    Reads a token off every position, a block of positions at a time.

    Args:
        head: The vocabulary head, from `(T, d)` to logits `(T, V)`, which may be changed in place.
        states: What it reads, `(B, L, d)`.
        processors: Applied to the logits, float32, of each position by itself, `(T, V)`.
        uniform: Uniform noise `(B, L)`, float64, for a draw from the processed distribution; `None` takes the argmax.
        context_ids: The source, `(B, Lx)`, given to the processors as the ids so far, since there is no prefix.
        end_token_ids: Tokens that are not taken at the first `min_length - 1` positions.
        end_places: Where alone they may be taken otherwise, `(B, L)`, bool.
        forbidden: Tokens that are not taken in any position, `(N,)`.
        copied_ids: For each position the token, `(B, L)`, -1 for none, whose logit `copy_bias` is added to first.
        goes_on: Whether a position goes on with what the one before began, `(B, L)`, bool. Of two such neighbours with
            the same argmax the one that loses least takes its second-best token: each by itself cannot know which of
            them is to write it.
        with_scores, with_logits: Whether to give the tokens' log-probabilities, and the logits.
    """
    length, flat_states = states.shape[1], states.flatten(0, 1)
    processors = processors or None
    forbids_end = bool(end_token_ids) and (min_length > 1 or end_places is not None)
    goes_on = goes_on if uniform is None else None
    others = (processors, uniform, forbidden, copied_ids, goes_on)
    if not (with_logits or forbids_end) and all(other is None for other in others):
        return _decode_argmax(head, states, with_scores)
    blocks, seconds, block_size = [], [], _block_size(head)
    for start in range(0, len(flat_states), block_size):
        block = slice(start, start + block_size)
        logits = head(flat_states[block])
        largest = logits.amax(dim=-1)
        # From here on scores are changed in place.
        scores = logits.clone() if with_scores or with_logits else logits
        indices = torch.arange(start, start + len(logits), device=states.device)
        no_end = (indices % length < min_length - 1) if forbids_end else None
        if forbids_end and end_places is not None:
            no_end = no_end | ~end_places.flatten()[block].to(scores.device)
        copied = None if copied_ids is None else copied_ids.flatten()[block].to(scores.device)
        _adjust_scores(scores, copied, copy_bias, forbidden, end_token_ids, no_end)
        if processors is not None:
            prefix = indices.new_empty(len(indices), 0) if context_ids is None else context_ids[indices // length]
            scores = processors(prefix, scores.float())
        if uniform is None:
            best, tokens = scores.max(dim=-1)
            is_choice = best > -torch.inf  # false for NaN too
        else:
            tokens, is_choice = _draw(scores, uniform.flatten()[block])
        chosen = logits.gather(1, tokens[:, None])[:, 0]
        if goes_on is not None:
            # Not the two largest at once, whose order would be open where they are equal.
            next_best, second = scores.scatter(1, tokens[:, None], -torch.inf).max(dim=-1)
            seconds.append((best - next_best, second, logits.gather(1, second[:, None])[:, 0]))
        partition = logits.float().logsumexp(dim=-1) if with_scores else None
        blocks.append((tokens, chosen, largest, partition, is_choice, logits if with_logits else None))

    tokens, chosen, largest, partition, is_choice, logits = _join(blocks, states.shape[:2])
    if goes_on is not None:
        seconds = _join(seconds, states.shape[:2])
        tokens, chosen = _take_second_best(tokens, chosen, *seconds, goes_on.to(tokens.device), end_token_ids or ())
    log_probs = chosen.float() - partition if with_scores else None
    return DecodedTokens(tokens, log_probs, logits, torch.isfinite(largest).all(), is_choice.all())


def _decode_argmax(head: nn.Module, states: torch.Tensor, with_scores: bool) -> DecodedTokens:
    """[`decode_tokens`] where nothing but the logits counts, and they need not all be there at once."""
    part_size, is_on_host = _vocabulary_part(head, states), states.device.type == "cpu"
    block_size = _CPU_TOKENS if part_size is not None and is_on_host else _block_size(head)
    blocks = []
    for block in states.flatten(0, 1).split(block_size):
        if part_size is not None:
            blocks.append(_argmax_by_vocabulary(head, block, with_scores, part_size, is_on_host))
            continue
        logits = head(block)
        chosen, tokens = logits.max(dim=-1)
        blocks.append((tokens, chosen, logits.float().logsumexp(dim=-1) if with_scores else None))
    tokens, chosen, partition = _join(blocks, states.shape[:2])
    log_probs = chosen.float() - partition if with_scores else None
    return DecodedTokens(tokens, log_probs, None, torch.isfinite(chosen).all())


def _block_size(head: nn.Module) -> int:
    """How many positions' logits are there at once."""
    vocab_size = head.out_features if hasattr(head, "out_features") else head.weight.shape[0]
    size = max(1, _BLOCK_ELEMENTS // vocab_size)
    return size - size % _TILE if size > _TILE else size


def _join(blocks: Sequence[Sequence[torch.Tensor | None]], shape: torch.Size) -> list[torch.Tensor | None]:
    """Of results `(T, ...)` of each block of positions those of all, `(B, L, ...)`."""
    return [None if parts[0] is None else torch.cat(parts).view(*shape, *parts[0].shape[1:]) for parts in zip(*blocks)]


def _adjust_scores(
    scores: torch.Tensor,
    copied: torch.Tensor | None,
    copy_bias: float,
    forbidden: torch.Tensor | None,
    end_token_ids: list[int] | None,
    no_end: torch.Tensor | None,
):
    """
    What [`decode_tokens`] does to the scores `(T, V)` before any processor, in place: a bias for the `copied` tokens
    `(T,)`, none for the `forbidden` ones, nor for end tokens where there is `no_end` `(T,)`.
    """
    if copied is not None:
        bias = (copy_bias * (copied >= 0)).to(scores.dtype)
        scores.scatter_add_(1, copied.clamp(min=0)[:, None], bias[:, None])
    if forbidden is not None:
        scores.index_fill_(1, forbidden.to(scores.device), -torch.inf)
    if no_end is not None:
        for token in end_token_ids:  # a list as an index would be copied to the device
            scores[:, token].masked_fill_(no_end, -torch.inf)


def _take_second_best(
    tokens: torch.Tensor,
    logits: torch.Tensor,
    lost: torch.Tensor,
    second: torch.Tensor,
    its_logit: torch.Tensor,
    goes_on: torch.Tensor,
    end_token_ids: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The `tokens` and their `logits`, `(B, L)` each, where of two neighbours with the same token, of which the later one
    `goes_on`, that takes its `second` token, with `its_logit`, whose logit is less by what is `lost`, if it is finite.
    """
    for token in end_token_ids:
        goes_on = goes_on & (tokens != token)  # a canvas ends in as many as are left
    lost = torch.where(lost < torch.inf, lost, torch.inf)  # NaN too
    is_pair = (
        (tokens[:, 1:] == tokens[:, :-1]) & goes_on[:, 1:] & (torch.minimum(lost[:, 1:], lost[:, :-1]) < torch.inf)
    )
    is_first = is_pair & (lost[:, :-1] < lost[:, 1:])
    gives = nn.functional.pad(is_first, (0, 1)) | nn.functional.pad(is_pair & ~is_first, (1, 0))
    return torch.where(gives, second, tokens), torch.where(gives, its_logit, logits)


def decode_fillings(
    head: nn.Module,
    states: torch.Tensor,
    known_ids: torch.Tensor,
    forbidden: torch.Tensor,
    *,
    uniform: torch.Tensor | None = None,
    context_ids: torch.Tensor | None = None,
    copied_ids: torch.Tensor | None = None,
    end_places: None = None,  # known tokens end a text
    goes_on: None = None,  # and only they are known to be one token
    with_scores: bool = False,
    with_logits: bool = False,
    **options: Any,
) -> DecodedTokens:
    """
    As [`decode_tokens`], but rows of `known_ids` `(B, L)` that have any, not -1, keep these, with a log-probability of
    0, and no `forbidden` token `(N,)` comes between; only what is not known is read, unless logits are asked for.
    """
    known_ids = known_ids.to(states.device)
    has_known, is_open = (known_ids >= 0).any(dim=-1), known_ids < 0
    tokens, log_probs = known_ids.clone(), torch.zeros(known_ids.shape, device=states.device) if with_scores else None
    texts = (~has_known).nonzero(as_tuple=True)
    fillings = (is_open & has_known[:, None]).nonzero(as_tuple=True)
    is_finite, has_choice = [torch.ones((), dtype=torch.bool, device=states.device)], []
    # Texts without known tokens as they are; fillings token by token, each a row of its own.
    for places, more in ((texts, {}), (fillings, {"forbidden": forbidden, "end_token_ids": None})):
        if (number := len(places[0])) == 0:
            continue
        found = decode_tokens(
            head,
            states[places].view(number, -1, states.shape[-1]),
            uniform=None if uniform is None else uniform[places].view(number, -1),
            context_ids=None if context_ids is None else context_ids[places[0]],
            copied_ids=None if copied_ids is None else copied_ids[places].view(number, -1),
            with_scores=with_scores,
            **{**options, **more},
        )
        tokens[places] = found.tokens.view_as(tokens[places])
        if with_scores:
            log_probs[places] = found.log_probs.view_as(tokens[places])
        is_finite.append(found.is_finite)
        has_choice += [] if found.has_choice is None else [found.has_choice]
    choice = torch.stack(has_choice).all() if has_choice else None
    return DecodedTokens(
        tokens, log_probs, head(states) if with_logits else None, torch.stack(is_finite).all(), choice
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


def truncate_at_eos(
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    end_token_ids: list[int] | None,
    pad_token_id: int,
    known_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Pads behind the first end token of each canvas: tokens `(B, L)` and lengths of the canvases `(B,)` → tokens
    `(B, L)`, their number with the end token `(B,)`, and which positions are kept, `(B, L)`. Rows with known tokens,
    not -1 in `known_ids` `(B, L)`, stay whole.
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    for token in end_token_ids or ():
        is_end = (tokens == token) & (positions < lengths[:, None])
        if known_ids is not None:
            is_end = is_end & (known_ids < 0).all(dim=-1, keepdim=True)
        first_end = torch.where(is_end, positions, tokens.shape[1]).amin(dim=-1)
        lengths = torch.minimum(lengths, first_end + 1)
    return _cut(tokens, lengths, pad_token_id)


def cut_by_criteria(
    tokens: torch.Tensor, lengths: torch.Tensor, criteria: StoppingCriteriaList, pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Cuts each text behind its shortest beginning at which a criterion stops; arguments and result as of
    [`truncate_at_eos`]. The criteria are asked about all rows together, and get no scores, as without `output_scores`.

    Raises:
        ValueError: for criteria that need scores.
    """
    for length in range(1, tokens.shape[1] + 1):
        try:
            is_done = torch.as_tensor(criteria(tokens[:, :length], None), device=tokens.device)
        except (AttributeError, TypeError) as error:
            names = ", ".join(type(criterion).__name__ for criterion in criteria)
            raise ValueError(
                f"A stopping criterion, of {names}, failed: {error}. It is asked about the finished text: it gets the "
                "token ids, `None` for the scores, and must return booleans."
            ) from error
        lengths = torch.where(is_done, lengths.clamp(max=length), lengths)
    return _cut(tokens, lengths, pad_token_id)


def _cut(tokens: torch.Tensor, lengths: torch.Tensor, pad_token_id: int) -> tuple[torch.Tensor, ...]:
    kept = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    return tokens.masked_fill(~kept, pad_token_id), lengths, kept


def cycle_distance(latents: torch.Tensor, encoded: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """
    How far the latents that were written, `(R, L, d)`, are from the encoder's of the text that was read off them: the
    mean of the squared difference over the width and the text's positions `kept` `(R, L)`: `(R,)`, float32.
    """
    difference = (latents.float() - encoded.float()).square().mean(dim=-1) * kept
    return difference.sum(dim=-1) / kept.sum(dim=-1).clamp(min=1)


def token_f1(first: list[int], second: list[int]) -> float:
    """F1 of two texts as bags of tokens; 1 for two empty texts."""
    if not first or not second:
        return float(first == second)
    common = sum((Counter(first) & Counter(second)).values())
    return 2 * common / (len(first) + len(second))


def consensus(texts: list[list[int]]) -> list[float]:
    """Mean token F1 of each candidate with the others: the utility of minimum Bayes risk decoding."""
    if len(texts) == 1:
        return [1.0]
    others = [texts[:row] + texts[row + 1 :] for row in range(len(texts))]
    return [sum(token_f1(text, other) for other in rest) / len(rest) for text, rest in zip(texts, others)]


def best_candidates(utility: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """
    The row, of `B · c`, of the best candidate of each returned sequence, `(B,)`: that of the highest utility `(B, c)`,
    among equal ones that of the higher score `(B, c)`, then the first.
    """
    is_best = utility == utility.amax(dim=-1, keepdim=True)
    choice = scores.masked_fill(~is_best, -torch.inf).argmax(dim=-1)
    return choice + utility.shape[1] * torch.arange(len(choice), device=choice.device)


def solve_flow(
    flow: Callable[..., Any],
    initial_state: torch.Tensor,
    context: Any,
    times: list[float],
    expert_selector: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
    expert_indices: torch.Tensor | None = None,
    reselect: bool = False,
    solver: str = "euler",
    callback_on_step_end: Callable[[torch.Tensor], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Solves the ODE along one expert for each target token (section 5 of the model's paper). The first evaluation gives
    both the gate, from which the experts are chosen, and the first velocity: `S` Euler steps are `S` evaluations.

    Args:
        flow: The vector field, [`YanFlow`].
        initial_state: `z0`, `(B, Ly, d)`.
        context: What all evaluations share, a [`YanFlowContext`].
        times: Increasing grid from 0 to 1.
        expert_selector: From the gate's log-probabilities, `(B, Ly, K)`, and the number of the solver step to the
            experts, `(B, Ly)`.
        expert_indices: The experts, `(B, Ly, C)`, instead; `C` as in the result.
        reselect: Whether experts are chosen at the beginning of every solver step, or once and held.
        solver: A name in `SOLVERS`.
        callback_on_step_end: Called with every new state.

    Returns:
        The state at the last time, `(B, Ly, d)`, and the experts, `(B, Ly, C)`, of every choice: one, or one for each
        solver step with `reselect`.
    """
    num_stages = len(SOLVERS[solver].nodes)
    choices = [] if expert_indices is None else list(expert_indices.unbind(dim=-1))
    evaluation = 0

    def velocity(state: torch.Tensor, time: float) -> torch.Tensor:
        nonlocal evaluation
        step = evaluation // num_stages if reselect else 0
        evaluation += 1
        known = choices[step] if step < len(choices) else None
        # One time for the whole batch, so that embedding and modulation are computed for a single row.
        dtype = torch.promote_types(state.dtype, torch.float32)
        timesteps = torch.full((1,), time, device=state.device, dtype=dtype)
        selector = None if known is not None else lambda log_probs: expert_selector(log_probs, step)
        asked = {"expert_indices": known, "expert_selector": selector}
        output = flow(state, timesteps, context, modulation=context.modulations.get(time), **asked)
        if known is None:
            choices.append(output.expert_indices)
        return output.velocity

    state = integrate(velocity, initial_state, times, solver, callback_on_step_end)
    return state, torch.stack(choices, dim=-1)


@dataclass(frozen=True)
class SamplingOptions:
    """What is fixed for a whole batch; hashable, so that a compiled program can be one for each."""

    times: tuple[float, ...]  # the solver's grid
    solver: str = "euler"
    expert_temperature: float = 1.0  # divides the gate's log-probabilities
    repeats: int = 1  # targets for each source
    stratified: int = 0  # number of a source's samples that divide the gate among them; 0 where each has all of it
    keep_states: bool = False  # whether to keep the state after every step
    decode_argmax: bool = True  # whether to read the tokens too, as the argmax
    with_scores: bool = False  # whether to give their log-probabilities
    routing: RoutingOptions = field(default_factory=RoutingOptions)
    reselect: bool = False  # whether experts are chosen anew at every solver step
    keep_core: bool = False  # whether to keep the core sets

    @classmethod
    def from_config(cls, config: Any, **more: Any) -> "SamplingOptions":
        """Of a resolved [`YanGenerationConfig`], and what that does not say."""
        return cls(
            times=tuple(config.times()),
            solver=config.solver,
            expert_temperature=float(config.expert_temperature),
            keep_states=bool(config.output_trajectory or config.output_drafts),
            routing=RoutingOptions.from_config(config),
            reselect=bool(config.reselect_experts),
            keep_core=bool(config.output_routing),
            **more,
        )

    def sample_places(self, num_rows: int, device: torch.device) -> torch.Tensor:
        """The place of each row among the samples of its source that are `stratified`, `(R,)`."""
        rows = torch.arange(num_rows, device=device) % self.repeats
        return rows.div(self.repeats // self.stratified, rounding_mode="floor")  # the lengths of a sample share one


@dataclass
class SampleOutput:
    """What solving and decoding gives."""

    latents: torch.Tensor  # the ODE's end, (R, L, d)
    decoded: torch.Tensor  # what the vocabulary head reads, (R, L, d)
    experts: torch.Tensor | None  # of every choice, one or as many as solver steps, (R, L, C)
    states: torch.Tensor | None  # the initial state and that after every step, (S + 1, R, L, d), if asked for
    tokens: DecodedTokens | None  # with `decode_argmax`
    is_finite: torch.Tensor  # whether the gate's log-probabilities are finite numbers, ()
    core: torch.Tensor | None = None  # the core sets of experts, (R, N, K), with block routing, if asked for
    path_log_probs: torch.Tensor | None = None  # of all shared choices of experts, (R,); 0 with token scope

    def rows(self, index: torch.Tensor) -> "SampleOutput":
        """Some of the rows, without their tokens."""
        names = ("latents", "decoded", "experts", "core", "path_log_probs")
        chosen = {name: value[index] for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **chosen, states=None if self.states is None else self.states[:, index], tokens=None)


def is_training(module: nn.Module) -> bool:
    """Whether any part of a module is in training mode; without the names that `modules()` makes."""
    return module.training or any(is_training(child) for child in module._modules.values() if child is not None)


def eval_view(module: nn.Module) -> nn.Module:
    """
    A view of a model in eval mode: copies of its modules that share all parameters, buffers and hooks with it.
    `eval()` would change the model under another thread, which may be training it.
    """
    module = module._modules.get("_orig_mod", module)  # of a compiled part, whose program is that of its own mode
    view = object.__new__(type(module))
    children = {name: None if child is None else eval_view(child) for name, child in module._modules.items()}
    view.__dict__.update(module.__dict__, training=False, _modules=children, _compiled_call_impl=None)
    for name, value in module.__dict__.items():
        # What was put in a method's place, as accelerate's hooks are, calls the module that it was made for.
        if isinstance(value, MethodType) and value.__self__ is module:
            view.__dict__[name] = MethodType(value.__func__, view)
        elif isinstance(value, partial) and value.args and value.args[0] is module:
            view.__dict__[name] = partial(value.func, view, *value.args[1:], **value.keywords)
    return view


def encode(
    model: PreTrainedModel,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
) -> EncodedSource:
    """Encodes the source and predicts lengths."""
    source = model.model.encode(input_ids, attention_mask, inputs_embeds).last_hidden_state
    return EncodedSource(source, model.predict_lengths(source, attention_mask), model.predict_token_lengths(source))


class _ExpertChooser:
    """
    Chooses the experts of every solver step, of the gate's log-probabilities `(R, L, K)`: [`solve_flow`]'s selector,
    which keeps what [`SampleOutput`] tells of the choices.
    """

    def __init__(self, options: SamplingOptions, canvas: torch.Tensor, uniform: torch.Tensor | None):
        self.options, self.canvas, self.uniform = options, canvas, uniform
        # By solver step, of its last choice (that before it is the prediction of offloaded experts): whether the gate
        # is finite, the core sets, and the log-probability of what was chosen.
        self.records: dict[int, tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]] = {}
        # Before a solver step, a row's place among the samples that have chosen the same.
        self.places = {0: options.sample_places(canvas.shape[0], canvas.device)} if options.stratified else {}

    def held(self, experts: torch.Tensor) -> torch.Tensor:
        """Experts `(R, L, ...)` where positions behind a row's canvas follow its first token, and need none."""
        is_real = self.canvas.bool().view(*self.canvas.shape, *[1] * (experts.dim() - 2))
        return torch.where(is_real, experts, experts[:, :1])

    def __call__(self, log_probs: torch.Tensor, step: int) -> torch.Tensor:
        canvas, routing, temperature = self.canvas, self.options.routing, self.options.expert_temperature
        is_finite = torch.isfinite(log_probs).all()
        noise = None if self.uniform is None else self.uniform[:, :, step]
        log_probs, noise = share_choice(log_probs, noise, canvas, routing)
        log_probs, core = restrict_to_core(log_probs, canvas, routing)
        if self.options.stratified:
            choices = self.options.stratified, len(self.options.times) - 2 - step if self.options.reselect else 0
            experts, self.places[step + 1] = stratified_choice(
                log_probs, self.places[step], canvas, routing, *choices, temperature
            )
        else:
            experts = choose_experts(log_probs, noise, temperature)
        experts = self.held(experts)
        self.records[step] = (is_finite, core, choice_log_probs(log_probs, experts, canvas, routing))
        return experts

    def outcome(self) -> dict[str, torch.Tensor | None]:
        """Fields of [`SampleOutput`]."""
        finite, core, paths = zip(*self.records.values()) if self.records else ((), (), ())
        canvas, keeps_core = self.canvas, self.options.keep_core and core and core[0] is not None
        return {
            "is_finite": torch.stack([torch.ones_like(canvas[0, 0], dtype=torch.bool), *finite]).all(),
            "core": torch.stack(core).any(dim=0) if keeps_core else None,
            "path_log_probs": sum(paths, torch.zeros(canvas.shape[:1], device=canvas.device)),
        }


def sample(
    model: PreTrainedModel,
    options: SamplingOptions,
    source: torch.Tensor,
    source_mask: torch.Tensor | None,
    lengths: torch.Tensor,
    initial_state: torch.Tensor,
    uniform: torch.Tensor | None,
    expert_indices: torch.Tensor | None,
    places: torch.Tensor | None,
    callback_on_step_end: Callable[[torch.Tensor], None] | None = None,
) -> SampleOutput:
    """
    Solves the ODE and decodes its end.

    Args:
        model, options: A [`YanForConditionalGeneration`] and static options.
        source, source_mask: The source's latents, `(B, Lx, d)`, and mask, `(B, Lx)`.
        lengths: Lengths of the canvases, `(R,)`, `R = B · options.repeats`.
        initial_state: The noise of `z0`, or `z0` itself without `places`, `(R, L, d)`.
        uniform: Noise for the draw of experts, `(R, L, C, K)`; `None` takes the gate's mode.
        expert_indices: Experts `(R, L, C)` instead of a choice by the gate.
        places: Where in the source each position starts from, [`source_places`], `(R, L)`.
        callback_on_step_end: Called with the state after every step.
    """
    # A model that is spread over devices may have its encoder elsewhere than the ids.
    device, flow = source.device, model.model.flow
    lengths, state = lengths.to(device), initial_state.to(device, source.dtype)
    uniform, expert_indices, source_mask, places = (
        None if value is None else value.to(device) for value in (uniform, expert_indices, source_mask, places)
    )
    canvas = (torch.arange(state.shape[1], device=device) < lengths[:, None]).long()
    if places is not None:
        state = state + model.model.start(source, places, canvas, options.repeats)
    states, chooser = [state], _ExpertChooser(options, canvas, uniform)

    def after_step(state: torch.Tensor):
        if options.keep_states:
            states.append(state)
        if callback_on_step_end is not None:
            callback_on_step_end(state)

    times = list(options.times)
    context = model.model.prepare_context(source, source_mask, canvas, options.repeats)
    context.source_key_values = flow.cache_cross_attention(source, options.repeats)
    context.modulations = flow.embed_times(list(dict.fromkeys(evaluation_times(times, options.solver))), device)
    choice = (chooser, None if expert_indices is None else chooser.held(expert_indices), options.reselect)
    latents, experts = solve_flow(flow, state, context, times, *choice, options.solver, after_step)
    decoded = model.model.decoder(latents)
    tokens = decode_tokens(model.lm_head, decoded, with_scores=options.with_scores) if options.decode_argmax else None
    return SampleOutput(
        latents=latents,
        decoded=decoded,
        experts=experts,
        states=torch.stack(states) if options.keep_states else None,
        tokens=tokens,
        **chooser.outcome(),
    )


def encode_and_sample(
    model: PreTrainedModel,
    options: SamplingOptions,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    *start: torch.Tensor | None,
) -> SampleOutput:
    """Both halves at once, where the lengths do not wait for the encoder; `start` is `lengths` and the rest."""
    source = model.model.encode(input_ids, attention_mask, inputs_embeds).last_hidden_state
    return sample(model, options, source, attention_mask, *start)


class Sampler(Protocol):
    """The two halves of `generate` that touch the network, over one model."""

    def encode(self, source: SourceInputs) -> EncodedSource:
        """As [`encode`]."""

    def sample(
        self,
        options: SamplingOptions,
        source: SourceInputs,
        encoded: torch.Tensor | None,
        *start: torch.Tensor | None,
        callback_on_step_end: Callable[[torch.Tensor], None] | None = None,
    ) -> SampleOutput:
        """As [`sample`], after encoding the source where that has not been done; `start` is `lengths` and the rest."""


@dataclass
class EagerSampler:
    """Runs both halves as they are."""

    model: PreTrainedModel

    def encode(self, source: SourceInputs) -> EncodedSource:
        return encode(self.model, *source)

    def sample(
        self,
        options: SamplingOptions,
        source: SourceInputs,
        encoded: torch.Tensor | None,
        *start: torch.Tensor | None,
        callback_on_step_end: Callable[[torch.Tensor], None] | None = None,
    ) -> SampleOutput:
        if encoded is None:
            encoded = self.model.model.encode(*source).last_hidden_state
        return sample(self.model, options, encoded, source.attention_mask, *start, callback_on_step_end)
