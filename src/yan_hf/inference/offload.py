# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Expert weights that stay in CPU memory, with a bounded number of them on the device.

The idea is that of "Speculating Experts" (arXiv 2603.19289): the experts that will be needed are predicted from a
state that is there already, and their copies run beside the computation. In YAN the choice is made once, at t = 0, and
held, so that only the first step has anything to predict, and each needed expert crosses once per `generate` where the
bound allows.

On CUDA the weights lie in pinned memory, and copies run on a stream of their own: events make the computation wait for
a slot's copy, and a copy for the computation that still reads the slot. On a CPU the same code makes plain copies.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from ..experts import YanExperts


MODES = ("on_demand", "speculative")
SPECULATIONS = ("verify", "execute")
WEIGHTS = ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias")


@dataclass
class OffloadStats:
    """
    What crossed, and what was waited for.

    Args:
        hits: Experts that an evaluation of the fields needed and found on the device, prefetched ones included,
            counted at every solver step.
        misses: Experts that it had to load on demand.
        prefetched: Experts copied before they were needed, rightly or not.
        bytes_copied: Bytes of expert weights copied to the device: all misses and prefetched ones.
        waits: Evaluations that had a copy outstanding when they were issued.
        wait_seconds: Time that the computation stood still for copies. On a CPU, where a copy is no process of its
            own, the time of the copies on demand.
        copies_by_expert: How often each expert was copied.
        peak_resident_experts: Most experts on the device at once; never above `max_resident_experts`.
        peak_resident_bytes: Their bytes.
        predictions_by_layer: For each trunk layer that predicted: how many of the experts that the first step chose
            had been predicted, and how many it chose.
    """

    hits: int = 0
    misses: int = 0
    prefetched: int = 0
    bytes_copied: int = 0
    waits: int = 0
    wait_seconds: float = 0.0
    copies_by_expert: dict[int, int] = field(default_factory=dict)
    peak_resident_experts: int = 0
    peak_resident_bytes: int = 0
    predictions_by_layer: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def copies(self) -> int:
        """Experts copied to the device."""
        return self.misses + self.prefetched

    @property
    def recall_by_layer(self) -> dict[int, float]:
        """Share of the first step's experts that were predicted, for each trunk layer that predicted."""
        return {layer: found / max(1, chosen) for layer, (found, chosen) in self.predictions_by_layer.items()}

    @property
    def recall(self) -> float | None:
        """The same over all layers; `None` where nothing was predicted."""
        if not self.predictions_by_layer:
            return None
        found, chosen = map(sum, zip(*self.predictions_by_layer.values()))
        return found / max(1, chosen)


class _NoGradient(torch.autograd.Function):
    """Passes on what offloaded experts computed, and says so where a gradient is asked for."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, fields: torch.Tensor) -> torch.Tensor:
        return fields.view_as(fields)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor):
        raise RuntimeError(
            "Offloaded experts have no gradient: training is not possible with expert offloading. Call "
            "`model.disable_expert_offload()` first."
        )


def _version(tensor: torch.Tensor) -> int | None:
    """Counts changes in place; tensors of inference mode do not count them."""
    return None if tensor.is_inference() else tensor._version


class ExpertOffload:
    """
    Runs a model's experts out of a bounded number of device slots; made by
    [`~YanPreTrainedModel.enable_expert_offload`].

    A slot holds one expert. Whatever is needed next takes the slot of the least recently used expert. One lock guards
    slots and statistics, so that several threads may generate with one model; each evaluation of the fields holds it.

    Args:
        experts: The model's experts, whose parameters stay where they are: in CPU memory.
        max_resident_experts: Slots.
        mode: `"on_demand"` or `"speculative"`.
        speculation: `"verify"` or `"execute"`.
        device: Where the slots are.
        prediction_layer: Trunk blocks before the state that predicts.
    """

    def __init__(
        self,
        experts: YanExperts,
        max_resident_experts: int,
        mode: str,
        speculation: str,
        device: torch.device,
        prediction_layer: int,
    ):
        self.mode, self.speculation, self.prediction_layer = mode, speculation, prediction_layer
        self.max_resident_experts, self.device = max_resident_experts, device
        self.num_experts = experts.num_experts
        self.dtype = experts.up_proj.dtype
        self._experts = experts
        # The experts' own code, over as many of them as there are slots: what is computed is the same to the bit.
        with torch.device("meta"):
            self._slots = YanExperts(experts.config).eval()
        self._slots.num_experts = max_resident_experts
        for name in WEIGHTS:
            weight = getattr(experts, name)
            slots = torch.empty(max_resident_experts, *weight.shape[1:], dtype=weight.dtype, device=device)
            setattr(self._slots, name, nn.Parameter(slots, requires_grad=False))
        self.expert_bytes = sum(getattr(experts, name)[0].nbytes for name in WEIGHTS)
        self._lock = threading.RLock()
        self._last_choice = threading.local()
        self._resident: OrderedDict[int, int] = OrderedDict()  # expert → slot, least recently used first
        self._free = list(range(max_resident_experts))[::-1]
        self._slot_of: torch.Tensor | None = None  # (K,), on the device
        self._weights_seen: tuple | None = None
        self._stats = OffloadStats()
        self._stream = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
            self._copied: dict[int, torch.cuda.Event] = {}  # slot → its last copy
            self._read: dict[int, torch.cuda.Event] = {}  # slot → the last computation that reads it
            self._stalls: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __deepcopy__(self, memo: dict):
        raise RuntimeError("A model with offloaded experts cannot be copied: call `disable_expert_offload()` first.")

    def __reduce__(self):
        raise RuntimeError(
            "A model with offloaded experts cannot be pickled: save it with `save_pretrained`, or call "
            "`disable_expert_offload()` first."
        )

    def check_placement(self, fn: Callable[[torch.Tensor], torch.Tensor]):
        """Raises `RuntimeError` where `fn`, of `module.to` and its like, would move or convert the model."""
        moved = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if (moved.device, moved.dtype) != (self.device, self.dtype):
            raise RuntimeError(
                f"The model cannot be moved or converted (to {moved.device}, {moved.dtype}) while its experts are "
                "offloaded. Call `model.disable_expert_offload()` first, or name the `device` when enabling it."
            )

    @property
    def resident_experts(self) -> list[int]:
        """The experts on the device, least recently used first."""
        with self._lock:
            return list(self._resident)

    @property
    def slot_bytes(self) -> int:
        """Device memory of all slots."""
        return self.max_resident_experts * self.expert_bytes

    @property
    def stats(self) -> OffloadStats:
        """A copy of the statistics since the last `reset_stats`. On CUDA it waits for what is running."""
        with self._lock:
            if self._stream is not None:
                for began, ended in self._stalls:
                    ended.synchronize()
                    self._stats.wait_seconds += began.elapsed_time(ended) / 1000
                self._stalls.clear()
            return replace(
                self._stats,
                copies_by_expert=dict(self._stats.copies_by_expert),
                predictions_by_layer=dict(self._stats.predictions_by_layer),
            )

    def reset_stats(self) -> OffloadStats:
        """Starts counting anew, with the experts that are on the device left there; returns the old statistics."""
        with self._lock:
            stats, self._stats = self.stats, OffloadStats()
            self._note_residents()
            return stats

    def clear(self):
        """Forgets what is on the device, so that everything is copied again: for weights changed through `.data`."""
        with self._lock:
            self._resident.clear()
            self._free = list(range(self.max_resident_experts))[::-1]
            self._slot_of = None

    def release(self):
        """Ends the copies that run and gives up the slots."""
        with self._lock:
            if self._stream is not None:
                self._stream.synchronize()
            self.clear()
            for name in WEIGHTS:
                setattr(self._slots, name, None)

    # Speculation, called by the flow

    def prefetch(self, predicted: torch.Tensor) -> list[int]:
        """
        Starts the copies of predicted experts; of too many, those of the most tokens.

        Args:
            predicted: Experts `(B, Ly)`.

        Returns:
            The experts that are on the device or on their way.
        """
        counts = torch.bincount(predicted.flatten(), minlength=self.num_experts).tolist()
        order = sorted(range(self.num_experts), key=lambda expert: -counts[expert])
        chosen = [expert for expert in order[: self.max_resident_experts] if counts[expert]]
        with self._lock:
            self._check_weights()
            self._load(chosen, is_prefetch=True)
        return chosen

    def prefetch_known(self, experts: torch.Tensor):
        """Starts the copies of chosen experts `(B, Ly)` that are missing, as far as that pushes no chosen one out."""
        with self._lock:
            self._check_weights()
            needed = self._needed(experts)
            resident = [expert for expert in needed if expert in self._resident]
            missing = [expert for expert in needed if expert not in self._resident]
            self._load([*resident, *missing[: self.max_resident_experts - len(resident)]], is_prefetch=True)

    def only(self, log_probs: torch.Tensor, available: list[int]) -> torch.Tensor:
        """The gate `(B, Ly, K)` with all of its mass on the available experts, for `speculation="execute"`."""
        is_missing = torch.ones(self.num_experts, dtype=torch.bool)
        is_missing[available] = False
        # Not minus infinity, which means a broken gate to the checks; far enough that no draw gets there.
        far = torch.finfo(log_probs.dtype).min / 4
        return log_probs.masked_fill(is_missing.to(log_probs.device), far).log_softmax(dim=-1)

    def note_recall(self, predicted: list[int], experts: torch.Tensor):
        """Counts how many of the chosen `experts` `(B, Ly)` had been predicted."""
        with self._lock:
            needed = self._needed(experts)
            found, chosen = self._stats.predictions_by_layer.get(self.prediction_layer, (0, 0))
            counts = (found + len(set(needed) & set(predicted)), chosen + len(needed))
            self._stats.predictions_by_layer[self.prediction_layer] = counts

    # Computation, called by the experts

    def compute(
        self, hidden_states: torch.Tensor, index: torch.Tensor | None, weights: torch.Tensor | None
    ) -> torch.Tensor:
        """
        What the experts compute, `(T, d)`, `(T, 1)`, `(T, 1)` → `(T, d)`, or every expert's field, `(T, K, d)`.

        More needed experts than slots are computed in groups that fit, those on the device first.
        """
        with torch.no_grad(), self._lock:
            self._check_weights()
            if index is None:
                fields = self._compute_all(hidden_states)
            else:
                fields = self._compute_chosen(hidden_states, index, weights)
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            return _NoGradient.apply(hidden_states, fields)
        return fields

    def _compute_chosen(self, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if index.shape[-1] != 1:
            raise ValueError(f"Offloaded experts compute one expert per token, but got {index.shape[-1]}.")
        groups = self._groups(self._needed(index))
        if len(groups) == 1:
            self._load(groups[0])
            fields = self._slots(hidden_states, self._slots_of(groups[0], index), weights)
            self._note_read(groups[0])
            return fields
        fields = torch.zeros_like(hidden_states)
        for group in groups:
            self._load(group)
            is_member = torch.isin(index, torch.tensor(group, device=index.device))  # (T, 1)
            slots = self._slots_of(group, index)
            if self._experts.implementation(hidden_states) in ("batched_mm", "blocks"):
                # Their sums depend on the size of the batch: all tokens, of which the group's count.
                fields = torch.where(is_member, self._slots(hidden_states, slots, weights), fields)
            else:
                rows = is_member[:, 0].nonzero()[:, 0]
                fields[rows] = self._slots(hidden_states[rows], slots[rows], weights[rows])
            self._note_read(group)
        return fields

    def _compute_all(self, hidden_states: torch.Tensor) -> torch.Tensor:
        fields: list[torch.Tensor | None] = [None] * self.num_experts
        for group in self._groups(list(range(self.num_experts))):
            self._load(group)
            self._slots_of(group)
            for expert in group:
                fields[expert] = self._slots.all_fields(hidden_states, self._resident[expert])
            self._note_read(group)
        return torch.cat(fields, dim=1)

    def _needed(self, experts: torch.Tensor) -> list[int]:
        """The distinct experts of a choice, in order. A choice that is held is read from the device only once."""
        key = (experts.data_ptr(), experts.numel(), _version(experts))
        last = getattr(self._last_choice, "value", None)
        if last is not None and last[0] == key and key[2] is not None:
            return last[2]
        needed = experts.unique().tolist()
        # With the tensor itself, whose memory is then no other's.
        self._last_choice.value = (key, experts, needed)
        return needed

    def _groups(self, needed: list[int]) -> list[list[int]]:
        size = self.max_resident_experts
        if len(needed) > size:
            needed = sorted(needed, key=lambda expert: expert not in self._resident)
        return [needed[start : start + size] for start in range(0, len(needed), size)]

    # Slots

    def _check_weights(self):
        parameters = [self._experts._parameters.get(name) for name in WEIGHTS]
        if any(parameter is None for parameter in parameters):
            raise RuntimeError(
                "The offloaded experts have adapters that are not merged. Call `merge_and_unload()` on the adapted "
                "model, or `disable_expert_offload()`."
            )
        seen = tuple((parameter.data_ptr(), _version(parameter)) for parameter in parameters)
        if seen != self._weights_seen:
            self.clear()  # new weights were loaded, or the old ones changed
            self._weights_seen = seen

    def _load(self, experts: list[int], is_prefetch: bool = False):
        """Brings at most as many experts as there are slots onto the device."""
        missing = []
        for expert in experts:
            if expert in self._resident:
                self._resident.move_to_end(expert)
            else:
                missing.append(expert)
        began = time.perf_counter()
        for expert in missing:
            self._copy(expert)
            if is_prefetch:
                self._stats.prefetched += 1
            else:
                self._stats.misses += 1
        if not is_prefetch:
            self._stats.hits += len(experts) - len(missing)
            if missing and self._stream is None:
                self._stats.waits += 1
                self._stats.wait_seconds += time.perf_counter() - began

    def _copy(self, expert: int):
        # Asked-for experts have been moved to the end, and they fit: the first one is never one of them.
        slot = self._free.pop() if self._free else self._resident.popitem(last=False)[1]
        self._slot_of = None
        try:
            if self._stream is None:
                self._copy_weights(expert, slot)
            else:
                with torch.cuda.stream(self._stream):
                    if slot in self._read:
                        self._stream.wait_event(self._read[slot])
                    self._copy_weights(expert, slot)
                    self._copied[slot] = self._stream.record_event()
        except BaseException:
            self._free.append(slot)
            raise
        self._resident[expert] = slot
        self._stats.bytes_copied += self.expert_bytes
        self._stats.copies_by_expert[expert] = self._stats.copies_by_expert.get(expert, 0) + 1
        self._note_residents()

    def _copy_weights(self, expert: int, slot: int):
        for name in WEIGHTS:
            target, source = getattr(self._slots, name), getattr(self._experts, name)
            target.data[slot].copy_(source.data[expert], non_blocking=True)

    def _note_residents(self):
        count = len(self._resident)
        self._stats.peak_resident_experts = max(self._stats.peak_resident_experts, count)
        self._stats.peak_resident_bytes = self._stats.peak_resident_experts * self.expert_bytes

    def _slots_of(self, group: list[int], index: torch.Tensor | None = None) -> torch.Tensor | None:
        """The slots of `index`, once the copies of the group have been waited for."""
        if self._stream is not None:
            stream = torch.cuda.current_stream(self.device)
            events = [self._copied[self._resident[expert]] for expert in group]
            events = [event for event in events if not event.query()]
            if events:
                began = torch.cuda.Event(enable_timing=True)
                ended = torch.cuda.Event(enable_timing=True)
                began.record(stream)
                for event in events:
                    stream.wait_event(event)
                ended.record(stream)
                self._stalls.append((began, ended))
                self._stats.waits += 1
        if index is None:
            return None
        if self._slot_of is None:
            slots = [self._resident.get(expert, 0) for expert in range(self.num_experts)]
            self._slot_of = torch.tensor(slots, device=self.device)
        return self._slot_of[index]

    def _note_read(self, group: list[int]):
        if self._stream is not None:
            event = torch.cuda.current_stream(self.device).record_event()
            for expert in group:
                self._read[self._resident[expert]] = event


def _flow_of_experts(model: PreTrainedModel) -> nn.Module | None:
    base = getattr(model, model.base_model_prefix, model)
    return getattr(base, "flow", base)


def enable_expert_offload(
    model: PreTrainedModel,
    max_resident_experts: int,
    mode: str = "speculative",
    speculation: str = "verify",
    device: torch.device | str | None = None,
    prediction_layer: int | None = None,
) -> ExpertOffload:
    """
    Keeps the experts' weights in CPU memory (pinned, with CUDA) and at most `max_resident_experts` on the device.

    Saving while it is on saves the full weights. Called again, it changes the settings.

    Args:
        model: A YAN with a flow.
        max_resident_experts: Experts on the device at once, 1 to `num_experts`. Where a call needs more, they take
            turns: results stay exact, but weights cross at every step.
        mode: `"on_demand"` copies an expert when it is needed. `"speculative"` predicts the first step's experts
            from an early state of the trunk, through its final norm and the gate, and copies them while the rest
            of the trunk runs; from the second step on the experts are known.
        speculation: What becomes of a first step's expert that was not predicted: `"verify"` loads it on demand,
            so that results are those of the resident model; `"execute"` lets the gate choose among the predicted
            experts only, which is approximate and never loads on demand.
        device: Where to compute, by default where the model is. All parts but the experts are moved there; load a
            model whose experts do not fit on the CPU, and name the device here.
        prediction_layer: Trunk blocks that run before the prediction, 0 to `flow_layers - 1`; by default half of
            them. A later state predicts better and leaves less time for the copies.

    Returns:
        The [`ExpertOffload`], also at `model.expert_offload`; its `stats` is an [`OffloadStats`].

    Raises:
        ValueError: for a value out of range, an unknown mode, a model without experts, and one that follows the
            mean of all experts.
        RuntimeError: in training mode, with adapters on the experts that are not merged, and for a model that is
            spread over devices or processes.
    """
    experts = getattr(_flow_of_experts(model), "experts", None)
    if experts is None:
        raise ValueError(f"`{type(model).__name__}` has no flow, and so no experts to offload.")
    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {', '.join(MODES)}, but is {mode!r}.")
    if speculation not in SPECULATIONS:
        raise ValueError(f"`speculation` must be one of {', '.join(SPECULATIONS)}, but is {speculation!r}.")
    if mode == "on_demand" and speculation == "execute":
        raise ValueError('`speculation="execute"` runs what was predicted, but `mode="on_demand"` predicts nothing.')
    num_experts, num_layers = model.config.num_experts, model.config.flow_layers
    prediction_layer = num_layers // 2 if prediction_layer is None else prediction_layer
    for name, value, lowest, highest in (
        ("max_resident_experts", max_resident_experts, 1, num_experts),
        ("prediction_layer", prediction_layer, 0, num_layers - 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
            raise ValueError(f"`{name}` must be an integer from {lowest} to {highest}, but is {value!r}.")
    _check_can_offload(model, experts)
    device = torch.device(model.device if device is None else device)
    if device.type == "meta":
        raise ValueError("`device` must be where to compute, but is the meta device.")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())

    # Whatever fails for want of memory fails before anything has changed.
    offload = ExpertOffload(experts, max_resident_experts, mode, speculation, device, prediction_layer)
    own = {id(parameter) for parameter in experts.parameters()}
    moved = [
        (tensor, tensor.data.to(device)) for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in own
    ]
    for parameter in experts.parameters():
        data = parameter.data.cpu()
        if device.type == "cuda" and not data.is_pinned():
            data = data.pin_memory()
        moved.append((parameter, data))
    old = experts.offload
    experts.offload = offload
    for tensor, data in moved:
        tensor.data = data
    if old is not None:
        old.release()
    return offload


def _check_can_offload(model: PreTrainedModel, experts: nn.Module):
    if model.training:
        raise RuntimeError(
            "Expert offloading is for inference, but the model is in training mode. Call `model.eval()` first."
        )
    if not isinstance(experts, YanExperts) or any(experts._parameters.get(name) is None for name in WEIGHTS):
        raise RuntimeError(
            "The experts have adapters that are not merged, which offloading does not know. Call "
            "`merge_and_unload()` on the adapted model first."
        )
    if getattr(experts, "_is_expert_parallel", False) or any(
        "_hf_hook" in module.__dict__ for module in model.modules()
    ):
        raise RuntimeError(
            "The model is spread over devices or processes (`device_map` or expert parallelism), which does not "
            "go together with expert offloading. Load it whole, on the CPU, and name the `device` here."
        )
    if any(parameter.is_meta for parameter in experts.parameters()):
        raise RuntimeError("The experts have no weights yet: they are on the meta device. Load them first.")


def disable_expert_offload(model: PreTrainedModel) -> OffloadStats | None:
    """Brings all experts to the device, and gives the statistics; does nothing where offloading is not on."""
    offload = model.expert_offload
    if offload is None:
        return None
    experts = _flow_of_experts(model).experts
    with offload._lock:
        moved = [(parameter, parameter.data.to(offload.device)) for parameter in experts.parameters()]
        for parameter, data in moved:
            parameter.data = data
        experts.offload = None
        stats = offload.stats
        offload.release()
    return stats


__all__ = [
    "MODES",
    "SPECULATIONS",
    "WEIGHTS",
    "ExpertOffload",
    "OffloadStats",
    "disable_expert_offload",
    "enable_expert_offload",
]
