# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Copies of a few experts on the device, the least recently used out first, of weights that stay in CPU memory."""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn


WEIGHTS = ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias")


@dataclass
class OffloadStats:
    """
    What crossed, and what was waited for.

    Args:
        hits, misses: Experts that evaluations of the fields found on the device, and that they had to load on demand.
        prefetched: Experts copied before they were needed, rightly or not.
        bytes_copied: Bytes of expert weights copied to the device.
        waits, wait_seconds: Evaluations that were issued with a copy outstanding, and how long they stood still. On a
            CPU, where no copy runs beside the computation, those with copies on demand, and the time of these.
        peak_resident_experts: Most experts on the device at once; never above `max_resident_experts`.
        chosen, predicted: Experts of choices that a prediction went ahead of, and how many of them it had named.
    """

    hits: int = 0
    misses: int = 0
    prefetched: int = 0
    bytes_copied: int = 0
    waits: int = 0
    wait_seconds: float = 0.0
    peak_resident_experts: int = 0
    chosen: int = 0
    predicted: int = 0

    @property
    def copies(self) -> int:
        """Experts copied to the device."""
        return self.misses + self.prefetched

    @property
    def recall(self) -> float | None:
        """Share of the chosen experts that were predicted; `None` where nothing was predicted."""
        return self.predicted / self.chosen if self.chosen else None


class CopyStream:
    """
    A CUDA stream for copies into slots. Events make a computation wait for a slot's copy, and a copy for the
    computation that still reads the slot.
    """

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._copied: dict[int, torch.cuda.Event] = {}  # slot → its last copy
        self._read: dict[int, torch.cuda.Event] = {}  # slot → the last computation that reads it
        self._stalls: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def run(self, copy: Callable[[], None], slot: int, ahead: bool):
        """Starts a copy into a slot, `ahead` of its use or on demand, once no computation reads the slot."""
        with torch.cuda.stream(self._stream):
            if slot in self._read:
                self._stream.wait_event(self._read[slot])
            copy()
            self._copied[slot] = self._stream.record_event()

    def wait(self, slots: list[int]) -> bool:
        """Lets the computation wait for the copies into the slots; says whether one was outstanding."""
        stream = torch.cuda.current_stream(self._device)
        events = [event for event in (self._copied[slot] for slot in slots) if not event.query()]
        if events:
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record(stream)
            for event in events:
                stream.wait_event(event)
            ended.record(stream)
            self._stalls.append((began, ended))
        return bool(events)

    def mark_read(self, slots: list[int]):
        """Lets later copies into the slots wait for what was issued so far."""
        self._read |= dict.fromkeys(slots, torch.cuda.current_stream(self._device).record_event())

    def take_wait_seconds(self) -> float:
        """How long computations have waited since the last call, once they are over."""
        stalls, self._stalls = self._stalls, []
        for _, ended in stalls:
            ended.synchronize()
        return sum(began.elapsed_time(ended) for began, ended in stalls) / 1000

    def synchronize(self):
        """Waits for all copies."""
        self._stream.synchronize()


class ImmediateCopies:
    """In the place of [`CopyStream`] on a CPU, where a copy is over when its call returns."""

    def __init__(self):
        self._seconds, self._was_late = 0.0, False

    def run(self, copy: Callable[[], None], slot: int, ahead: bool):
        began = time.perf_counter()
        copy()
        if not ahead:
            self._seconds, self._was_late = self._seconds + time.perf_counter() - began, True

    def wait(self, slots: list[int]) -> bool:
        was_late, self._was_late = self._was_late, False
        return was_late

    def mark_read(self, slots: list[int]):
        pass

    def take_wait_seconds(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def synchronize(self):
        pass


def change_count(tensor: torch.Tensor) -> int | None:
    """Counts changes in place; tensors of inference mode do not count them."""
    return None if tensor.is_inference() else tensor._version


class ExpertCache:
    """Device slots of one expert each: what is needed next takes that of the least recently used expert."""

    def __init__(self, experts: nn.Module, num_slots: int, device: torch.device):
        self.experts, self.num_slots, self.device, self.stats = experts, num_slots, device, OffloadStats()
        self.stream = CopyStream(device) if device.type == "cuda" else ImmediateCopies()
        # The experts' own code, over as many of them as there are slots: what is computed is the same to the bit.
        with torch.device("meta"):
            self.slots = type(experts)(experts.config).eval()
        self.slots.num_experts = num_slots
        for name in WEIGHTS:
            weight = getattr(experts, name)
            slots = torch.empty(num_slots, *weight.shape[1:], dtype=weight.dtype, device=device)
            setattr(self.slots, name, nn.Parameter(slots, requires_grad=False))
        self.expert_bytes = sum(getattr(experts, name)[0].nbytes for name in WEIGHTS)
        self._weights_seen: tuple | None = None
        self.clear()

    def clear(self):
        """Forgets what is on the device."""
        self.resident: OrderedDict[int, int] = OrderedDict()  # expert → slot, least recently used first
        self.free = list(range(self.num_slots))[::-1]
        self._slot_of: torch.Tensor | None = None  # (K,), on the device

    def load(self, experts: list[int], ahead: bool = False):
        """Starts the copies of those of at most `num_slots` experts that are missing, `ahead` of their use or not."""
        self._check_weights()
        missing = [expert for expert in experts if expert not in self.resident]
        for expert in experts:
            if expert in self.resident:
                self.resident.move_to_end(expert)
        if not ahead:
            self.stats.hits += len(experts) - len(missing)
        for expert in missing:
            # Those asked for are at the end, and they fit: the first one is never one of them.
            slot = self.free.pop() if self.free else self.resident.popitem(last=False)[1]
            self._slot_of = None
            try:
                self.stream.run(partial(self._copy_weights, expert, slot), slot, ahead)
            except BaseException:
                self.free.append(slot)
                raise
            self.resident[expert] = slot
            self.stats.prefetched += ahead
            self.stats.misses += not ahead
            self.stats.bytes_copied += self.expert_bytes
            self.stats.peak_resident_experts = max(self.stats.peak_resident_experts, len(self.resident))

    def _check_weights(self):
        parameters = [self.experts._parameters.get(name) for name in WEIGHTS]
        if any(parameter is None for parameter in parameters):
            raise RuntimeError(
                "The offloaded experts have adapters that are not merged. Call `merge_and_unload()` on the adapted "
                "model, or `disable_expert_offload()`."
            )
        seen = tuple((parameter.data_ptr(), change_count(parameter)) for parameter in parameters)
        if seen != self._weights_seen:
            self.clear()  # new weights were loaded, or the old ones changed
            self._weights_seen = seen

    def _copy_weights(self, expert: int, slot: int):
        for name in WEIGHTS:
            target, source = getattr(self.slots, name), getattr(self.experts, name)
            target.data[slot].copy_(source.data[expert], non_blocking=True)

    @contextmanager
    def loaded(self, experts: list[int]) -> Iterator[None]:
        """Within, computations may read the slots of these at most `num_slots` experts."""
        self.load(experts)
        slots = [self.resident[expert] for expert in experts]
        self.stats.waits += self.stream.wait(slots)
        try:
            yield
        finally:
            self.stream.mark_read(slots)

    def slots_of(self, index: torch.Tensor) -> torch.Tensor:
        """The slots of experts; any slot for one that is not on the device."""
        if self._slot_of is None:
            slots = [self.resident.get(expert, 0) for expert in range(self.experts.num_experts)]
            self._slot_of = torch.tensor(slots, device=self.device)
        return self._slot_of[index]
