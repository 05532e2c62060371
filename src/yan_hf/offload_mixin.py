# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Turning expert offloading on and off, and what a model refuses while it is on."""

from typing import Any

import torch
from torch import nn

from .experts import YanExperts
from .offload import MODES, SPECULATIONS, WEIGHTS, ExpertOffload, OffloadStats


class ExpertOffloadMixin:
    """`enable_expert_offload` and what a model refuses while it is on."""

    @property
    def expert_offload(self) -> ExpertOffload | None:
        """The offloading that is on, with its `stats`; `None` while all experts are resident."""
        experts = getattr(self._flow_of_experts(), "experts", None)
        return getattr(experts, "offload", None)

    def _flow_of_experts(self) -> nn.Module | None:
        base = getattr(self, self.base_model_prefix, self)
        return getattr(base, "flow", base)

    def enable_expert_offload(
        self,
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
        experts = getattr(self._flow_of_experts(), "experts", None)
        if experts is None:
            raise ValueError(f"`{type(self).__name__}` has no flow, and so no experts to offload.")
        if mode not in MODES:
            raise ValueError(f"`mode` must be one of {', '.join(MODES)}, but is {mode!r}.")
        if speculation not in SPECULATIONS:
            raise ValueError(f"`speculation` must be one of {', '.join(SPECULATIONS)}, but is {speculation!r}.")
        if mode == "on_demand" and speculation == "execute":
            raise ValueError(
                '`speculation="execute"` runs what was predicted, but `mode="on_demand"` predicts nothing.'
            )
        num_experts, num_layers = self.config.num_experts, self.config.flow_layers
        prediction_layer = num_layers // 2 if prediction_layer is None else prediction_layer
        for name, value, lowest, highest in (
            ("max_resident_experts", max_resident_experts, 1, num_experts),
            ("prediction_layer", prediction_layer, 0, num_layers - 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
                raise ValueError(f"`{name}` must be an integer from {lowest} to {highest}, but is {value!r}.")
        self._check_can_offload(experts)
        device = torch.device(self.device if device is None else device)
        if device.type == "meta":
            raise ValueError("`device` must be where to compute, but is the meta device.")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())

        # Whatever fails for want of memory fails before anything has changed.
        offload = ExpertOffload(experts, max_resident_experts, mode, speculation, device, prediction_layer)
        own = {id(parameter) for parameter in experts.parameters()}
        moved = [
            (tensor, tensor.data.to(device))
            for tensor in (*self.parameters(), *self.buffers())
            if id(tensor) not in own
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

    def _check_can_offload(self, experts: nn.Module):
        if self.config.velocity_field == "mixture":
            raise ValueError(
                'With `velocity_field="mixture"` every expert is computed at every pass: none can stay behind in CPU '
                "memory."
            )
        if self.training:
            raise RuntimeError(
                "Expert offloading is for inference, but the model is in training mode. Call `model.eval()` first."
            )
        if not isinstance(experts, YanExperts) or any(experts._parameters.get(name) is None for name in WEIGHTS):
            raise RuntimeError(
                "The experts have adapters that are not merged, which offloading does not know. Call "
                "`merge_and_unload()` on the adapted model first."
            )
        # Older versions of Transformers have expert parallelism, but not the attribute.
        is_part = getattr(experts, "_is_expert_parallel", False) or len(experts.up_proj) < self.config.num_experts
        if is_part or any("_hf_hook" in module.__dict__ for module in self.modules()):
            raise RuntimeError(
                "The model is spread over devices or processes (`device_map` or expert parallelism), which does not "
                "go together with expert offloading. Load it whole, on the CPU, and name the `device` here."
            )
        if any(parameter.is_meta for parameter in experts.parameters()):
            raise RuntimeError("The experts have no weights yet: they are on the meta device. Load them first.")

    def disable_expert_offload(self) -> OffloadStats | None:
        """Brings all experts to the device, and gives the statistics; does nothing where offloading is not on."""
        offload = self.expert_offload
        if offload is None:
            return None
        experts = self._flow_of_experts().experts
        with offload._lock:
            moved = [(parameter, parameter.data.to(offload.device)) for parameter in experts.parameters()]
            for parameter, data in moved:
                parameter.data = data
            experts.offload = None
            stats = offload.stats
            offload.release()
        return stats

    def train(self, mode: bool = True):
        if mode and self.expert_offload is not None:
            raise RuntimeError(
                "The model cannot enter training mode while its experts are offloaded: their copies on the device "
                "have no gradient. Call `model.disable_expert_offload()` first."
            )
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True):
        offload = self.expert_offload
        if offload is None:
            return super()._apply(fn, recurse)
        moved = fn(torch.empty(0, dtype=offload.dtype, device=offload.device))
        if (moved.device, moved.dtype) != (offload.device, offload.dtype):
            raise RuntimeError(
                f"The model cannot be moved or converted (to {moved.device}, {moved.dtype}) while its experts are "
                "offloaded. Call `model.disable_expert_offload()` first, or name the `device` when enabling it."
            )
        return self  # it is there already; the experts stay in CPU memory


__all__ = ["ExpertOffloadMixin"]
