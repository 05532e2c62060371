# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""How long a target is, as a whole or token by token of its source, and how the source is laid on its canvas."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig

from .validation import check_finite, check_mask, check_token_lengths


# Elements of the largest tensor of the search for lengths, 128 MiB in float32.
_BLOCK_ELEMENTS = 2**25


class SourceInputs(NamedTuple):
    """A batch of sources: ids `(B, Lx)` or embeddings `(B, Lx, d)`, and their mask `(B, Lx)`."""

    input_ids: torch.Tensor | None
    attention_mask: torch.Tensor | None
    inputs_embeds: torch.Tensor | None

    @property
    def given(self) -> torch.Tensor:
        """The ids, or the embeddings in their place."""
        return self.inputs_embeds if self.input_ids is None else self.input_ids

    @property
    def mask(self) -> torch.Tensor:
        """Which tokens are real, `(B, Lx)`, int64, also where no `attention_mask` was given."""
        if self.attention_mask is None:
            return torch.ones(self.given.shape[:2], dtype=torch.long, device=self.given.device)
        return self.attention_mask.long()


class EncodedSource(NamedTuple):
    """The source's latents, and what is predicted from them."""

    latents: torch.Tensor  # (B, Lx, d)
    length_logits: torch.Tensor  # of the target's length, (B, max_position_embeddings)
    # Of the number of target tokens that each source token stands for, (B, Lx, max_token_length + 1).
    token_length_logits: torch.Tensor | None


def repeat_rows(values: torch.Tensor | None, count: int) -> torch.Tensor | None:
    """Every row `count` times, `(R, ...)` → `(R · count, ...)`; the values themselves for one."""
    return values if values is None or count == 1 else values.repeat_interleave(count, dim=0)


def predicted_lengths(
    logits: torch.Tensor, config: PreTrainedConfig, given_width: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The likeliest lengths within the limits of a resolved [`YanGenerationConfig`], from the length head's logits
    `(B, max_position_embeddings)`, whose entry `i` stands for `i + 1` tokens; fixed latents or experts hold
    `given_width` positions. `(B, m)`, the likeliest first, and their log-probabilities among the allowed ones; `m` is
    `num_length_candidates`, or as many as the limits allow.

    Raises:
        ValueError: for limits that leave no length, and logits that are not finite.
    """
    longest = config.max_new_tokens if given_width is None else min(config.max_new_tokens, given_width)
    if config.min_new_tokens > longest:
        raise ValueError(
            f"`min_new_tokens={config.min_new_tokens}` is more than the {longest} positions that `initial_latents` or "
            "`expert_indices` hold."
        )
    logits = logits.float()
    check_finite("length_logits", logits)
    allowed = logits[:, config.min_new_tokens - 1 : longest]
    order = allowed.argsort(dim=-1, descending=True, stable=True)[:, : config.num_length_candidates]
    log_probs = allowed.log_softmax(dim=-1).gather(1, order)
    return (order + config.min_new_tokens + config.length_slack).clamp(max=longest), log_probs


def given_lengths(
    target_lengths: int | list[int] | torch.Tensor,
    config: PreTrainedConfig,
    table_size: int,
    batch_size: int,
    device: torch.device,
    given_width: int | None = None,
) -> torch.Tensor:
    """
    The lengths that the caller knows, an integer or one for each source, as `(B, 1)`.

    Raises:
        ValueError: for lengths that are no integers, not one for each row, outside the position table or the fixed
            latents, or together with options that choose among predicted lengths.
    """
    lengths = _integers(target_lengths, config)
    if lengths.dim() > 1:
        raise ValueError("`target_lengths` must be an integer or a 1-D integer tensor, one length for each row.")
    if lengths.dim() == 1 and len(lengths) != batch_size:
        raise ValueError(f"`target_lengths` holds {len(lengths)} lengths for a batch of {batch_size} rows.")
    lengths = lengths.expand(batch_size)
    _check_given(lengths, table_size, given_width)
    return lengths.to(device, copy=True)[:, None]  # `generate` may return them, and the caller's are the caller's


def are_by_token(target_lengths: Any) -> bool:
    """Whether lengths are given for masks or source tokens, in two dimensions."""
    if isinstance(target_lengths, (list, tuple)):
        return any(np.ndim(row) > 0 for row in target_lengths)
    return np.ndim(target_lengths) > 1


def given_token_lengths(
    target_lengths: list[list[int]] | torch.Tensor, config: PreTrainedConfig, is_predicted: torch.Tensor
) -> torch.Tensor | None:
    """
    The lengths that the caller knows for every token of which `is_predicted` `(B, Lx)`, `(B, M)`, in their order, 0
    behind a row's last, which a list may leave out; `None` where they are not given so.

    Raises:
        ValueError: for lengths that are no integers, negative, or not as many as there are tokens.
    """
    if not are_by_token(target_lengths):
        return None
    rows = [_integers(row, config) for row in target_lengths]
    numbers = is_predicted.sum(dim=-1).tolist()
    width = max(numbers)
    fit = [
        row.dim() == 1 and len(row) in (number, width) and not bool(row[number:].any())
        for row, number in zip(rows, numbers)
    ]
    if len(rows) != len(numbers) or not all(fit):
        raise ValueError(
            "`mask_lengths`, or `target_lengths` in two dimensions, hold a length for every mask or source token, of "
            f"which the rows have {numbers}, but are {[row.tolist() for row in rows]}."
        )
    lengths = torch.stack([nn.functional.pad(row, (0, width - len(row))) for row in rows])
    if bool((lengths < 0).any()):
        raise ValueError(f"`mask_lengths` must not be negative, but are {lengths.tolist()}.")
    return lengths.to(is_predicted.device)


def _integers(target_lengths: Any, config: PreTrainedConfig) -> torch.Tensor:
    for name, neutral in (("num_length_candidates", 1), ("length_slack", 0)):
        if (value := getattr(config, name)) != neutral:
            raise ValueError(f"`{name}={value}` chooses among predicted lengths, but `target_lengths` gives them.")
    try:
        lengths = torch.as_tensor(target_lengths)  # checked where they are
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"`target_lengths` must be integers, but are {target_lengths!r}.") from error
    if lengths.numel() > 0 and (lengths.is_floating_point() or lengths.dtype == torch.bool):
        raise ValueError(f"`target_lengths` must be integers, but their dtype is {lengths.dtype}.")
    return lengths.long()


def _check_given(lengths: torch.Tensor, table_size: int, given_width: int | None):
    shortest, width = torch.stack(lengths.aminmax()).tolist()
    if shortest < 1 or width > table_size:
        limits = f"1 to `max_position_embeddings={table_size}`"
        raise ValueError(f"`target_lengths` must be in {limits}, but reach from {shortest} to {width}.")
    if given_width is not None and width > given_width:
        raise ValueError(
            f"`target_lengths` reach {width}, but `initial_latents` or `expert_indices` hold {given_width} positions."
        )


def predicted_tokens(config: PreTrainedConfig, source: SourceInputs) -> torch.Tensor | None:
    """
    Which source tokens stand for a predicted number of target tokens, `(B, Lx)`, bool: masks with
    `start_state="aligned"`, all with `"fertility"`; `None` otherwise.

    Raises:
        ValueError: for embeddings, in which no mask can be seen, where masks are asked for.
    """
    if config.start_state not in ("aligned", "fertility"):
        return None
    if config.start_state == "aligned" and source.input_ids is None:
        raise ValueError('`start_state="aligned"` looks for mask tokens: pass `input_ids`, not embeddings.')
    is_real = source.mask.bool()
    return is_real if config.start_state == "fertility" else is_real & (source.input_ids == config.mask_token_id)


def likeliest_sums(
    log_probs: torch.Tensor, lowest: torch.Tensor, highest: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The likeliest combinations of one length for each of `M` tokens whose sum is within limits: log-probabilities
    `(B, M, C)`, entry `i` for `i`, and limits `(B,)` → lengths `(B, count, M)`, the likeliest first, and their joint
    log-probabilities `(B, count)`, minus infinity where there are no more.
    """
    best, lengths = log_probs.max(dim=-1)
    scores, sums = best.sum(dim=-1), lengths.sum(dim=-1)
    fits = (sums >= lowest) & (sums <= highest)
    if count == 1 and bool(fits.all()):
        return lengths[:, None], scores[:, None]
    width = max(1, int(highest.max()) + 1)
    rows = max(1, _BLOCK_ELEMENTS // (width * log_probs.shape[-1] * count))
    parts = zip(log_probs.split(rows), lowest.split(rows), highest.split(rows))
    found = [_likeliest_sums(*part, count, width) for part in parts]
    found_lengths, found_scores = (torch.cat(values) for values in zip(*found))
    if count == 1:  # whatever the other rows of the batch need
        return (
            torch.where(fits[:, None, None], lengths[:, None], found_lengths),
            torch.where(fits[:, None], scores[:, None], found_scores),
        )
    return found_lengths, found_scores


def _likeliest_sums(
    log_probs: torch.Tensor, lowest: torch.Tensor, highest: torch.Tensor, count: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    # Viterbi's search with the sum so far as the state, and the best `count` ways to each.
    (batch_size, num_tokens, size), device = log_probs.shape, log_probs.device
    sums = torch.arange(width, device=device)
    before = sums[:, None] - torch.arange(size, device=device)  # (T, C)
    scores = log_probs.new_full((batch_size, width, count), -torch.inf)
    scores[:, 0, 0] = 0.0
    choices = []
    for token in range(num_tokens):
        reached = scores[:, before.clamp(min=0)] + log_probs[:, token, None, :, None]  # (B, T, C, count)
        reached = reached.masked_fill(before[..., None] < 0, -torch.inf)
        scores, choice = reached.flatten(2).topk(count, dim=-1)
        choices.append(choice)
    is_allowed = (sums >= lowest[:, None]) & (sums <= highest[:, None])
    scores = scores.masked_fill(~is_allowed[..., None], -torch.inf)
    scores, place = scores.flatten(1).topk(count, dim=-1)
    total, rank = place // count, place % count
    rows, lengths = torch.arange(batch_size, device=device)[:, None], []
    for choice in reversed(choices):
        chosen = choice[rows, total, rank]
        lengths.append(chosen // count)
        total, rank = (total - chosen // count).clamp(min=0), chosen % count
    return torch.stack(lengths[::-1], dim=-1), scores


def token_lengths_from(
    source: SourceInputs,
    is_predicted: torch.Tensor,
    logits: torch.Tensor | None,
    lowest: torch.Tensor,
    highest: torch.Tensor,
    count: int,
    given: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    How many target tokens every source token stands for, `(B, count, Lx)`: one for a known token, none for padding,
    and the likeliest numbers for those that are predicted, of logits `(B, Lx, C)`, so that their sum is within the
    limits `(B,)` for the whole target; or the `given` ones, `(B, M)`, in their order. Also their log-probabilities,
    `(B, count)`. Rows without predicted tokens are all zeros.

    Raises:
        ValueError: where no combination is within the limits.
    """
    numbers = is_predicted.sum(dim=-1)
    order = is_predicted.long().argsort(dim=-1, descending=True, stable=True)[:, : int(numbers.max())]
    is_token = torch.arange(order.shape[1], device=order.device) < numbers[:, None]
    is_real = source.mask.bool()
    known = (is_real & ~is_predicted).long() * is_predicted.any(dim=-1, keepdim=True)
    if given is not None:
        lengths, scores = given[:, None], torch.zeros(len(given), 1, device=given.device)
    else:
        check_finite("token_length_logits", logits)
        index = order[..., None].expand(-1, -1, logits.shape[-1])
        log_probs = logits.float().log_softmax(dim=-1).gather(1, index)
        nothing = torch.full_like(log_probs[0, 0], -torch.inf)
        nothing[0] = 0.0
        num_known, is_free = known.sum(dim=-1), numbers == 0
        # The longest length that the head knows stands for longer ones too: so many, where the limits ask for them.
        missing = lowest - num_known - numbers * (log_probs.shape[-1] - 1)
        if (extra := int(missing.masked_fill(is_free, 0).max())) > 0:
            unlikely = -1e4 * torch.arange(1, extra + 1, device=log_probs.device)
            log_probs = torch.cat([log_probs, log_probs[..., -1:] + unlikely], dim=-1)
            nothing = nn.functional.pad(nothing, (0, extra), value=-torch.inf)
        log_probs = torch.where(is_token[..., None], log_probs, nothing)
        lowest, highest = (limit - num_known for limit in (lowest, highest))
        lengths, scores = likeliest_sums(
            log_probs, lowest.masked_fill(is_free, 0), highest.masked_fill(is_free, 0), count
        )
        if not bool((scores[:, 0] > -torch.inf).all()):
            row = int((scores[:, 0] == -torch.inf).nonzero()[0])
            raise ValueError(
                f"Row {row} has {int(num_known[row])} known tokens and {int(numbers[row])} others, which cannot be "
                f"between {int(lowest[row] + num_known[row])} and {int(highest[row] + num_known[row])} target tokens "
                "together: check `target_lengths`, `min_new_tokens` and `max_new_tokens`."
            )
        # A row of few combinations repeats its best one.
        lengths = torch.where((scores > -torch.inf)[..., None], lengths, lengths[:, :1])
    lengths = lengths * is_token[:, None]
    known = known[:, None].expand(-1, lengths.shape[1], -1)
    return known.scatter_add(2, order[:, None].expand_as(lengths), lengths), scores


def choose_lengths(
    model_config: PreTrainedConfig,
    config: PreTrainedConfig,
    source: SourceInputs,
    is_predicted: torch.Tensor | None,
    encoded: EncodedSource | None,
    target_lengths: int | list | torch.Tensor | None,
    num_sequences: int,
    given_width: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """
    Lengths of the canvases to try for every returned sequence, given or predicted, `(B · num_sequences, m)`, their
    log-probabilities, and how many target tokens each source token stands for, `(B · num_sequences · m, Lx)`, where
    that counts. Arguments and errors as of [`predicted_lengths`], [`given_lengths`] and [`token_lengths_from`].
    """
    batch_size, device, table_size = len(source.given), source.given.device, model_config.max_position_embeddings
    has_tokens = is_predicted is not None  # in some row
    by_token = given_token_lengths(target_lengths, config, is_predicted) if has_tokens else None
    count, lowest, highest = 1, config.min_new_tokens, config.max_new_tokens
    if target_lengths is None:
        lengths, log_probs = predicted_lengths(encoded.length_logits, config, given_width)
        count = lengths.shape[1]
        highest = highest if given_width is None else min(highest, given_width)
    elif by_token is None:
        lengths = given_lengths(target_lengths, config, table_size, batch_size, device, given_width)
        log_probs, lowest, highest = torch.zeros(lengths.shape, device=device), lengths[:, 0], lengths[:, 0]
    token_lengths = None
    if has_tokens:
        lowest, highest = (
            limit if isinstance(limit, torch.Tensor) else torch.full((batch_size,), limit, device=device)
            for limit in (lowest, highest)
        )
        logits = None if encoded is None else encoded.token_length_logits
        token_lengths, scores = token_lengths_from(source, is_predicted, logits, lowest, highest, count, by_token)
        sums, is_aligned = token_lengths.sum(dim=-1), is_predicted.any(dim=-1, keepdim=True)
        if by_token is not None:
            if not bool(is_aligned.all()):
                row = int((~is_aligned[:, 0]).nonzero()[0])
                raise ValueError(f"Row {row} has no mask, so that `mask_lengths` give it no length.")
            _check_given(sums[:, 0], table_size, given_width)
            lengths, log_probs = sums, scores
        elif not config.keep_known:  # else the text ends where its source does
            sums = (sums + config.length_slack).clamp(max=highest[:, None])
        lengths, log_probs = torch.where(is_aligned, sums, lengths), torch.where(is_aligned, scores, log_probs)
        token_lengths = repeat_rows(token_lengths, num_sequences).flatten(0, 1)
    return repeat_rows(lengths, num_sequences), repeat_rows(log_probs, num_sequences), token_lengths


def match_masks(
    source_ids: Sequence[Any], target_ids: Sequence[Any], mask_token_id: Any, eos_token_id: int | None = None
) -> list[int] | None:
    """
    How many target tokens every source token stands for, where the target is the source with each mask filled: 1 for a
    known token, the filling's length for a mask. `None` where it is not. Of several ways to match, early fillings are
    short; end tokens beyond the source's are a longer canvas. An ignored label, -100, matches any token.
    """

    def trailing_ends(ids: Sequence[Any]) -> int:
        return next((count for count, token in enumerate(reversed(ids)) if token != eos_token_id), len(ids))

    def stands_at(start: int, part: Sequence[Any]) -> bool:
        window = target_ids[start : start + len(part)]
        return start >= 0 and len(window) == len(part) and all(a in (b, -100) for a, b in zip(window, part))

    if (extra := trailing_ends(target_ids) - trailing_ends(source_ids)) > 0:
        target_ids = target_ids[:-extra]
    masks = [place for place, token in enumerate(source_ids) if token == mask_token_id]
    parts = [source_ids[a + 1 : b] for a, b in zip([-1, *masks], [*masks, len(source_ids)])]
    end = len(parts[0])
    if not masks or not stands_at(0, parts[0]):
        return None
    lengths = [1] * end
    for part in parts[1:-1]:
        start = next((place for place in range(end, len(target_ids) + 1) if stands_at(place, part)), None)
        if start is None:
            return None
        lengths += [start - end, *[1] * len(part)]
        end = start + len(part)
    start = len(target_ids) - len(parts[-1])
    if start < end or not stands_at(start, parts[-1]):
        return None
    return [*lengths, start - end, *[1] * len(parts[-1])]


def training_token_lengths(
    config: PreTrainedConfig,
    source: SourceInputs,
    labels: torch.Tensor,
    canvas: torch.Tensor,
    token_lengths: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """
    How many target tokens every source token stands for, `(B, Lx)`, zeros in rows without predicted ones, and which
    are predicted, as of [`predicted_tokens`]; `None` for a start that does not ask. Without `token_lengths` they are
    found in the `labels` `(B, Ly)` on their `canvas` `(B, Ly)`, by [`match_masks`].

    Raises:
        ValueError: for labels that are not the source with its masks filled, missing lengths of a
            `start_state="fertility"`, and lengths of another shape, negative, or more than the canvas holds.
    """
    is_predicted = predicted_tokens(config, source)
    if is_predicted is None:
        return None
    if token_lengths is None:
        if config.start_state == "fertility":
            raise ValueError(
                '`start_state="fertility"` is trained with `token_lengths` beside the labels, how many target tokens '
                "each source token stands for: `TaskEncoder(align=True)` adds them to the examples."
            )
        token_lengths = torch.zeros_like(source.input_ids, dtype=torch.long)
        is_real = source.mask.bool()
        for row in is_predicted.any(dim=-1).nonzero()[:, 0].tolist():
            ids, target = source.input_ids[row, is_real[row]].tolist(), labels[row, canvas[row]].tolist()
            if (lengths := match_masks(ids, target, config.mask_token_id, config.eos_token_id)) is None:
                raise ValueError(
                    f'Row {row}: with `start_state="aligned"`, `labels` must be the source with each mask filled, but '
                    "the known tokens are not all there. `TaskEncoder(align=True)` tokenizes so; for other targets "
                    'take `start_state="stretched"`.'
                )
            token_lengths[row, is_real[row]] = torch.tensor(lengths, device=token_lengths.device)
        return token_lengths, is_predicted
    check_mask("token_lengths", token_lengths, source.given.shape[:2], "input_ids")
    token_lengths = token_lengths.long() * is_predicted.any(dim=-1, keepdim=True)
    is_known = None
    if config.start_state == "aligned":
        is_real = source.mask.bool()
        is_known = is_real & ~is_predicted & is_predicted.any(dim=-1, keepdim=True)
    check_token_lengths(token_lengths, canvas, is_known)
    return token_lengths, is_predicted


def source_places(
    source_mask: torch.Tensor, canvas: torch.Tensor, token_lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Where in the source `(B, Lx)` the start of every position of the target's canvas `(B, Ly)` comes from, `(B, Ly)`.

    With `token_lengths` `(B, Lx)`, as many neighbouring positions as each token stands for come from it, and what is
    behind them from the last one. Without, and in rows of zeros, the source is stretched: of `n` source tokens and `m`
    target tokens, position `j` comes from the token `round(j (n - 1) / (m - 1))`. Padding on either side of either, 0
    in the masks, changes nothing.
    """
    # Real tokens first, in their order.
    order = source_mask.long().argsort(dim=-1, descending=True, stable=True)
    last_source = (source_mask.long().sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    last_target = (canvas.long().sum(dim=-1, keepdim=True) - 1).clamp(min=1)
    places = (canvas.long().cumsum(dim=-1) - 1).clamp(min=0)
    # Rounded in integers, halves upwards.
    nearest = ((2 * places * last_source + last_target) // (2 * last_target)).clamp(max=last_source)
    stretched = order.gather(1, nearest)
    if token_lengths is None:
        return stretched
    ends = token_lengths.cumsum(dim=-1)
    # The first token that ends behind the position.
    aligned = torch.searchsorted(ends, places.contiguous(), right=True)
    aligned = torch.minimum(aligned, order.gather(1, last_source))
    return torch.where(ends[:, -1:] > 0, aligned, stretched)


def lay_out(source: torch.Tensor, places: torch.Tensor, canvas: torch.Tensor) -> torch.Tensor:
    """The latents `(B, Lx, d)` at [`source_places`] `(B, Ly)`: `(B, Ly, d)`, zeros outside the canvas."""
    latents = source.gather(1, places[..., None].expand(-1, -1, source.shape[-1]))
    return latents * canvas.to(latents.dtype)[..., None]


def stretch(source: torch.Tensor, source_mask: torch.Tensor | None, canvas: torch.Tensor) -> torch.Tensor:
    """The latents `(B, Lx, d)` stretched over the canvas `(B, Ly)`, as by [`source_places`]: `(B, Ly, d)`."""
    if source_mask is None:
        source_mask = torch.ones(source.shape[:2], dtype=torch.long, device=source.device)
    return lay_out(source, source_places(source_mask, canvas), canvas)
