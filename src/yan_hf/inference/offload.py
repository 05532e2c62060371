# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Expert weights that stay in CPU memory, with a bounded number of them on the device.

The idea is that of "Speculating Experts" (arXiv 2603.19289): the experts that will be needed are predicted from a
state that is there already, and their copies run beside the computation. A choice that is held is predicted in the
first solver step only. [`OffloadedExperts`] computes in the experts' place, out of an [`ExpertCache`];
[`ExpertPredictor`] hooks into the flow.
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from ..experts import gate_log_probs
from .expert_cache import WEIGHTS, ExpertCache, OffloadStats, change_count


MODES = ("on_demand", "speculative")
SPECULATIONS = ("verify", "execute")


def _refuse_gradient(gradient: Tensor):
    raise RuntimeError(
        "Offloaded experts have no gradient: training is not possible with expert offloading. Call "
        "`model.disable_expert_offload()` first."
    )


class OffloadedExperts:
    """
    Computes in the place of a model's experts; made by [`~YanPreTrainedModel.enable_expert_offload`]. One lock guards
    cache and statistics, so that several threads may generate with one model; each evaluation of the fields holds it.
    """

    def __init__(self, experts: nn.Module, max_resident_experts: int, device: torch.device):
        self.max_resident_experts, self.device = max_resident_experts, device
        self.dtype, self.num_experts = experts.up_proj.dtype, experts.num_experts
        self.cache = ExpertCache(experts, max_resident_experts, device)
        self.expert_bytes = self.cache.expert_bytes
        self.slot_bytes = max_resident_experts * self.expert_bytes
        self.predictor: ExpertPredictor | None = None
        self._last_choice: tuple | None = None
        self._lock = threading.RLock()

    def __reduce__(self):
        raise RuntimeError(
            "A model with offloaded experts cannot be copied or pickled: save it with `save_pretrained`, or call "
            "`disable_expert_offload()` first."
        )

    def check_placement(self, fn: Callable[[Tensor], Tensor]):
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
            return list(self.cache.resident)

    @property
    def stats(self) -> OffloadStats:
        """A copy of the statistics since the last `reset_stats`. On CUDA it waits for what is running."""
        with self._lock:
            self.cache.stats.wait_seconds += self.cache.stream.take_wait_seconds()
            return replace(self.cache.stats)

    def reset_stats(self) -> OffloadStats:
        """Starts counting anew, with the experts that are on the device left there; returns the old statistics."""
        with self._lock:
            stats = self.stats
            self.cache.stats = OffloadStats(peak_resident_experts=len(self.cache.resident))
            return stats

    def clear(self):
        """Forgets what is on the device, so that everything is copied again: for weights changed through `.data`."""
        with self._lock:
            self.cache.clear()

    def release(self):
        """Takes the hooks off, ends the copies that run and gives up the slots."""
        if self.predictor is not None:
            self.predictor.remove()
        with self._lock:
            self.cache.stream.synchronize()
            self.cache.clear()
            self.cache.slots = None

    def prefetch(self, predicted: Tensor) -> list[int]:
        """Starts the copies of predicted experts `(B, Ly)`, of too many those of the most tokens; gives the taken."""
        counts = torch.bincount(predicted.flatten(), minlength=self.num_experts).cpu()
        order = counts.argsort(descending=True, stable=True)[: self.max_resident_experts]
        taken = order[counts[order] > 0].tolist()
        with self._lock:
            self.cache.load(taken, ahead=True)
        return taken

    def prefetch_known(self, experts: Tensor):
        """Starts the copies of chosen experts `(B, Ly)` that are missing, as far as that pushes no chosen one out."""
        with self._lock:
            self.cache.load(self._groups(self._needed(experts))[0], ahead=True)

    def note_recall(self, predicted: list[int], experts: Tensor):
        """Counts how many of the chosen `experts` `(B, Ly)` had been predicted."""
        with self._lock:
            needed = self._needed(experts)
            self.cache.stats.chosen += len(needed)
            self.cache.stats.predicted += len(set(needed) & set(predicted))

    def compute(self, hidden_states: Tensor, index: Tensor | None, weights: Tensor | None) -> Tensor:
        """
        What the experts compute, `(T, d)`, `(T, 1)`, `(T, 1)` → `(T, d)`, or every expert's field, `(T, K, d)`.

        More needed experts than slots are computed in groups that fit, those on the device first.
        """
        with torch.no_grad(), self._lock:
            is_all = index is None
            fields = self._all_fields(hidden_states) if is_all else self._routed(hidden_states, index, weights)
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            fields.requires_grad_().register_hook(_refuse_gradient)
        return fields

    def _routed(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        if index.shape[-1] != 1:
            raise ValueError(f"Offloaded experts compute one expert per token, but got {index.shape[-1]}.")
        cache, groups = self.cache, self._groups(self._needed(index))
        if len(groups) == 1:
            with cache.loaded(groups[0]):
                return cache.slots(hidden_states, cache.slots_of(index), weights)
        fields = torch.zeros_like(hidden_states)
        for group in groups:
            is_member = torch.isin(index, torch.tensor(group, device=index.device))  # (T, 1)
            with cache.loaded(group):
                slots = cache.slots_of(index)
                if cache.experts.implementation(hidden_states) in ("batched_mm", "blocks"):
                    # Their sums depend on the size of the batch: all tokens, of which the group's count.
                    fields = torch.where(is_member, cache.slots(hidden_states, slots, weights), fields)
                else:
                    rows = is_member[:, 0].nonzero()[:, 0]
                    fields[rows] = cache.slots(hidden_states[rows], slots[rows], weights[rows])
        return fields

    def _all_fields(self, hidden_states: Tensor) -> Tensor:
        fields: list[Tensor | None] = [None] * self.num_experts
        for group in self._groups(list(range(self.num_experts))):
            with self.cache.loaded(group):
                for expert in group:
                    fields[expert] = self.cache.slots.all_fields(hidden_states, self.cache.resident[expert])
        return torch.cat(fields, dim=1)

    def _needed(self, experts: Tensor) -> list[int]:
        """The distinct experts of a choice, in order. A choice that is held is read from the device only once."""
        experts = experts.reshape(-1)
        key = (experts.data_ptr(), experts.shape, experts.stride(), change_count(experts))
        if self._last_choice is None or self._last_choice[0] != key or key[-1] is None:
            # With the tensor itself, whose memory is then no other's.
            self._last_choice = (key, experts, experts.unique().tolist())
        return self._last_choice[-1]

    def _groups(self, needed: list[int]) -> list[list[int]]:
        size = self.max_resident_experts
        if len(needed) > size:
            needed = sorted(needed, key=lambda expert: expert not in self.cache.resident)
        return [needed[start : start + size] for start in range(0, len(needed), size)]


# `call`: the evaluation of a flow that runs in this thread and has not come to its prediction.
_running = threading.local()


class ExpertPredictor:
    """
    Starts copies ahead, by hooks on the flow and on block `layer` of its trunk. What an evaluation will choose is
    predicted from the block's input, by the trunk's final norm, the gate and the evaluation's own selector. With
    `executes` only predicted experts may be chosen.
    """

    def __init__(self, flow: nn.Module, offloaded: OffloadedExperts, layer: int, executes: bool):
        self.offloaded, self.executes = offloaded, executes
        self._handles = [
            flow.register_forward_pre_hook(self._before_flow, with_kwargs=True),
            flow.layers[layer].register_forward_pre_hook(self._before_block),
        ]

    def remove(self):
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _before_flow(self, flow: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        names = ("latents", "timesteps", "context", "modulation", "expert_indices", "expert_selector")
        kwargs = {**dict(zip(names, args)), **kwargs}
        _running.call = None
        if kwargs.get("expert_indices") is not None:
            self.offloaded.prefetch_known(kwargs["expert_indices"])
        elif (selector := kwargs.get("expert_selector")) is not None:
            call = SimpleNamespace(flow=flow, context=kwargs["context"], selector=selector, predicted=[])
            _running.call, kwargs["expert_selector"] = call, partial(self._select, call)
        return (), kwargs

    @torch.no_grad()
    def _before_block(self, block: nn.Module, args: tuple):
        call, _running.call = getattr(_running, "call", None), None
        if call is not None:
            hidden_states, time_embedding = args[:2]
            gate_logits = call.flow.gate(call.flow.norm(hidden_states), call.context.pooled_source, time_embedding)
            experts = call.selector(gate_log_probs(gate_logits, call.context.canvas_mask))
            call.predicted = self.offloaded.prefetch(experts)

    def _select(self, call: SimpleNamespace, log_probs: Tensor) -> Tensor:
        if self.executes:
            is_missing = torch.ones(log_probs.shape[-1], dtype=torch.bool)
            is_missing[call.predicted] = False
            # Not minus infinity, which means a broken gate to the checks; far enough that no draw gets there.
            far = torch.finfo(log_probs.dtype).min / 4
            log_probs = log_probs.masked_fill(is_missing.to(log_probs.device), far).log_softmax(dim=-1)
        experts = call.selector(log_probs)
        self.offloaded.note_recall(call.predicted, experts)
        return experts


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
) -> OffloadedExperts:
    """
    Keeps the experts' weights in CPU memory (pinned, with CUDA) and at most `max_resident_experts` on the device.
    Saving while it is on saves the full weights. Called again, it changes the settings.

    Args:
        model: A YAN with a flow.
        max_resident_experts: Experts on the device at once, 1 to `num_experts`. Where a call needs more, they take
            turns: results stay exact, but weights cross at every step.
        mode: `"on_demand"` copies an expert when it is needed; `"speculative"` predicts the experts of a choice that
            is not held from an early state of the trunk, and copies them while the rest of it runs.
        speculation: What becomes of a chosen expert that was not predicted: `"verify"` loads it on demand, so that
            results are those of the resident model; `"execute"` lets the gate choose among the predicted experts
            only, which is approximate and never loads on demand.
        device: Where to compute, by default where the model is. All parts but the experts are moved there; load a
            model whose experts do not fit on the CPU, and name the device here.
        prediction_layer: Trunk blocks that run before the prediction, 0 to `flow_layers - 1`; by default half of
            them. A later state predicts better and leaves less time for the copies.

    Returns:
        The [`OffloadedExperts`], also at `model.expert_offload`; its `stats` is an [`OffloadStats`].

    Raises:
        ValueError: for a value out of range, an unknown mode, and a model without experts.
        RuntimeError: in training mode, with adapters on the experts that are not merged, and for a model that is
            spread over devices or processes.
    """
    flow = _flow_of_experts(model)
    experts = getattr(flow, "experts", None)
    if experts is None:
        raise ValueError(f"`{type(model).__name__}` has no flow, and so no experts to offload.")
    for name, value, known in (("mode", mode, MODES), ("speculation", speculation, SPECULATIONS)):
        if value not in known:
            raise ValueError(f"`{name}` must be one of {', '.join(known)}, but is {value!r}.")
    if mode == "on_demand" and speculation == "execute":
        raise ValueError('`speculation="execute"` runs what was predicted, but `mode="on_demand"` predicts nothing.')
    prediction_layer = model.config.flow_layers // 2 if prediction_layer is None else prediction_layer
    for name, value, lowest, highest in (
        ("max_resident_experts", max_resident_experts, 1, model.config.num_experts),
        ("prediction_layer", prediction_layer, 0, model.config.flow_layers - 1),
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
    offloaded = OffloadedExperts(experts, max_resident_experts, device)
    own = set(experts.parameters())
    moved = {tensor: tensor.data.to(device) for tensor in {*model.parameters(), *model.buffers()} - own}
    for parameter in own:
        data = parameter.data.cpu()
        moved[parameter] = data.pin_memory() if device.type == "cuda" and not data.is_pinned() else data
    if experts.offload is not None:
        experts.offload.release()
    if mode == "speculative":
        offloaded.predictor = ExpertPredictor(flow, offloaded, prediction_layer, speculation == "execute")
    experts.offload = offloaded
    for tensor, data in moved.items():
        tensor.data = data
    return offloaded


def _check_can_offload(model: PreTrainedModel, experts: nn.Module):
    is_spread = any("_hf_hook" in module.__dict__ for module in model.modules())
    if model.training:
        reason = "Expert offloading is for inference, but the model is in training mode. Call `model.eval()` first."
    elif any(experts._parameters.get(name) is None for name in WEIGHTS):
        reason = (
            "The experts have adapters that are not merged, which offloading does not know. Call "
            "`merge_and_unload()` on the adapted model first."
        )
    elif is_spread or getattr(experts, "_is_expert_parallel", False):
        reason = (
            "The model is spread over devices or processes (`device_map` or expert parallelism), which does not go "
            "together with expert offloading. Load it whole, on the CPU, and name the `device` here."
        )
    elif getattr(model, "is_quantized", False):
        reason = "The model is quantised, for the CPU, where there is nothing to offload. Load the float checkpoint."
    elif any(parameter.is_meta for parameter in experts.parameters()):
        reason = "The experts have no weights yet: they are on the meta device. Load them first."
    else:
        return
    raise RuntimeError(reason)


def disable_expert_offload(model: PreTrainedModel) -> OffloadStats | None:
    """Brings all experts to the device, and gives the statistics; does nothing where offloading is not on."""
    offloaded = model.expert_offload
    if offloaded is None:
        return None
    experts = _flow_of_experts(model).experts
    moved = [(parameter, parameter.data.to(offloaded.device)) for parameter in experts.parameters()]
    for parameter, data in moved:
        parameter.data = data
    experts.offload, stats = None, offloaded.stats
    offloaded.release()
    return stats
