# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Callbacks for Transformers' `Trainer`."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerState
from transformers.utils import logging

from ..data.collator import YanDataCollator
from ..data.files import whole_file


logger = logging.get_logger(__name__)


def _part_with(model: nn.Module, name: str) -> nn.Module | None:
    """The first part of a model that has an attribute, below any wrapper."""
    return next((part for part in model.modules() if hasattr(part, name)), None)


def _joined(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def _add_to_log(state: TrainerState, logs: dict[str, float], figures: dict[str, float]):
    logs.update(figures)
    if state.log_history:
        state.log_history[-1].update(figures)


class EpochCallback(TrainerCallback):
    """Tells `collator`, which the trainer uses, the epoch: each sees other masked spans."""

    def __init__(self, collator: YanDataCollator):
        self.collator = collator
        self._epoch = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._epoch = int(state.epoch or 0)

    def on_epoch_begin(self, args, state, control, **kwargs):
        # Counted here: for a stream, whose length nobody knows, `state.epoch` says something else.
        self.collator.set_epoch(self._epoch)
        self._epoch += 1


class LossTermsCallback(TrainerCallback):
    """
    Adds the mean of each loss term since the last log, `loss_flow`, `loss_token`, ..., to what the trainer logs, and
    that over an evaluation's batches, `eval_loss_flow`, ..., under the evaluation's own prefix.

    Reporting integrations (TensorBoard, ...) see what callbacks before them have added: [`YanTrainer`] puts this one
    first. In `Trainer(callbacks=[LossTermsCallback()])` the terms reach the console and the log history only.
    """

    def __init__(self):
        self._sums: dict[bool, dict[str, torch.Tensor]] = {True: {}, False: {}}
        self._counts = {True: 0, False: 0}
        self._hook = None

    def watch(self, model: nn.Module | None):
        """Collects the terms of a model from now on; the trainer's events do this by themselves."""
        if self._hook is None and model is not None:
            inner = _part_with(model, "predict_lengths") or _part_with(model, "lm_head") or model
            self._hook = inner.register_forward_hook(self._collect)

    def _collect(self, module: nn.Module, args: Any, output: Any):
        if terms := getattr(output, "loss_terms", None):
            sums = self._sums[module.training]
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.float()
            self._counts[module.training] += 1

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self.watch(model)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.watch(model)

    def on_predict(self, args, state, control, **kwargs):
        # A prediction is not logged: its terms belong to no later evaluation.
        self._sums[False], self._counts[False] = {}, 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None:
            return
        # An evaluation logs its runtime beside its loss, under its prefix.
        evaluations = [key for key in logs if f"{key.removesuffix('_loss')}_runtime" in logs and key.endswith("_loss")]
        for training, key in [(True, "loss"), *((False, key) for key in evaluations)]:
            sums, count = self._sums[training], self._counts[training]
            if key not in logs or not count:
                continue
            values = _joined(torch.stack([*sums.values(), torch.full_like(next(iter(sums.values())), count)]))
            means = (values[:-1] / values[-1]).tolist()
            _add_to_log(state, logs, {f"{key}_{name}": round(value, 6) for name, value in zip(sums, means)})
            self._sums[training], self._counts[training] = {}, 0


class ExpertUsageCallback(TrainerCallback):
    """
    Logs how training uses the experts, and puts idle ones to work; for an `expert_scope` beyond the token, where
    training follows winners.

    Added to every training log, over the steps since the last one: `expert_share_0`, `expert_share_1`, ..., how often
    each expert won, of all choices of blocks with tokens that count; `winner_entropy`, of these shares, and
    `gate_entropy`, of the gate that a block shares, mean over these choices, both in nats.

    Hard winners have local optima: an expert that never wins gets no gradient, two may share one kind of text while a
    third has to serve two kinds. Every `every` steps the expert that would be missed least becomes a copy of the one
    with the most to gain, with noise, so that the two can divide its texts: where the log-likelihood that its texts
    would lose with their second best expert is less than `ratio` of what the other's texts lack to certainty.

    Args:
        ratio: See above; 0 only reports.
        every: Optimiser steps between two looks.
        until: Share of the training after which experts are left alone.
        noise: Of the copy, in units of the standard deviation of each weight.

    Raises:
        ValueError: for values out of range, and for experts that FSDP shards (pass `ratio=0`).
    """

    def __init__(self, ratio: float = 0.05, every: int = 100, until: float = 0.7, noise: float = 0.05):
        if not (0 <= ratio < 1 and 0 <= until <= 1):
            raise ValueError(f"`ratio` must be in [0, 1) and `until` in [0, 1], but are {ratio} and {until}.")
        if every < 1 or noise <= 0:
            raise ValueError(f"`every` must be at least 1 and `noise` positive, but are {every} and {noise}.")
        self.ratio, self.every, self.until, self.noise = ratio, every, until, noise
        self._hook = self._logged = self._watched = None
        self.revived: list[tuple[int, int, int]] = []
        """Optimiser step, the expert that was given up, and the one that it became a copy of."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        inner = _part_with(model, "predict_lengths")
        if inner is not None and self._hook is None:
            self._hook = inner.register_forward_hook(self.collect)
        self._logged = self._watched = None

    def on_train_end(self, args, state, control, **kwargs):
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @torch.no_grad()
    def collect(self, module: nn.Module, args: Any, output: Any):
        """Takes note of a training forward's choices; the hook that is put on the model."""
        if getattr(output, "expert_scores", None) is None or not module.training:
            return
        # Every choice once, by weights: on a GPU an index by a mask would wait.
        scores = output.expert_scores.float().flatten(0, 2)  # (N, K)
        is_choice = output.choice_mask.expand_as(output.expert_indices).flatten().float()
        best = scores.topk(min(2, scores.shape[-1]), dim=-1).values
        entropy = torch.special.entr(output.choice_log_probs.float().exp()).sum(dim=-1).flatten()
        wins = nn.functional.one_hot(output.expert_indices.flatten(), scores.shape[-1]).float() * is_choice[:, None]
        rows = [wins.sum(0), wins.T @ -best[:, 0], wins.T @ (best[:, 0] - best[:, -1])]
        sums = torch.stack([entropy @ is_choice, is_choice.sum()])
        counts = torch.stack([*rows, *sums[:, None].expand(2, wins.shape[1])])  # (5, K)
        self._logged = counts if self._logged is None else self._logged + counts
        self._watched = counts if self._watched is None else self._watched + counts

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or "loss" not in logs or self._logged is None:
            return
        counts, self._logged = _joined(self._logged.clone()), None
        shares = counts[0] / counts[0].sum()
        figures = {f"expert_share_{expert}": share for expert, share in enumerate(shares.tolist())}
        figures["winner_entropy"] = float(torch.special.entr(shares).sum())
        figures["gate_entropy"] = float(counts[3, 0] / counts[4, 0])
        _add_to_log(state, logs, {name: round(value, 4) for name, value in figures.items()})

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step <= self.until * state.max_steps:
            self.revive(model, optimizer, state.global_step)

    def revive(self, model: nn.Module, optimizer: Any, step: int):
        """Called after every optimiser step; looks every `every` steps."""
        if not self.ratio or self._watched is None or step % self.every:
            return
        counts, self._watched = _joined(self._watched.clone()), None
        _, lacking, missed, *_ = counts
        idle, source = int(missed.argmin()), int(lacking.argmax())
        flow = _part_with(model, "expert_velocity")
        if not all(weight.requires_grad for weight in flow.experts.parameters()):
            return  # frozen, or trained through adapters
        if idle == source or missed[idle] >= self.ratio * lacking[source]:
            return
        self._copy(flow, source, idle, step, optimizer)
        self.revived.append((step, idle, source))
        logger.info(
            f"Expert {idle}, which won {counts[0, idle] / counts[0].sum():.1%} of the choices, becomes a copy of "
            f"expert {source}, which won {counts[0, source] / counts[0].sum():.1%}."
        )

    @torch.no_grad()
    def _copy(self, flow: nn.Module, source: int, target: int, step: int, optimizer: Any):
        weights = [*flow.experts.parameters(), *flow.gate.down_proj.parameters()]
        if any(hasattr(weight, "device_mesh") for weight in weights):
            raise ValueError("`ExpertUsageCallback` cannot copy experts that FSDP shards: pass `ratio=0`.")
        generator = torch.Generator().manual_seed(step * 1_000 + target)  # the same on all processes
        state = getattr(getattr(optimizer, "optimizer", optimizer), "state", {})
        for weight in weights:
            noise = torch.randn(weight[source].shape, generator=generator).to(weight.device, weight.dtype)
            weight[target] = weight[source] + self.noise * weight.float().std().to(weight.dtype) * noise
            for value in state.get(weight, {}).values():
                if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                    value[target] = 0  # the moments of what is no more


class LengthHeadCallback(TrainerCallback):
    """Notes that the length head has been trained: where adapters were, its own weights do not tell."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if not model.config.length_head_trained and model.config.loss_weights["length"] > 0:
            weights = (weight for name, weight in model.named_parameters() if "length_head." in name)
            model.config.length_head_trained = any(weight.requires_grad for weight in weights)


class EmaCallback(TrainerCallback):
    """
    Keeps an exponential moving average of the trained weights: what is evaluated, saved and left in the model.
    Training goes on with the plain weights, which a checkpoint holds beside the averages, in
    `training_weights.safetensors`, so that a resumed run equals one left alone.

    Args:
        decay: Of the average; in the first steps it is lower, `(1 + n) / (10 + n)` after `n` steps.

    Raises:
        ValueError: for a decay outside (0, 1), and for weights sharded by FSDP, which it does not average.
    """

    FILE = "training_weights.safetensors"

    def __init__(self, decay: float = 0.999):
        if not 0 < decay < 1:
            raise ValueError(f"`decay` must be in (0, 1), but is {decay}.")
        self.decay = decay
        self._averaged, self._count = False, 0
        self._weights: dict[str, nn.Parameter] = {}
        # The weights that are not in the model: the averages while training, the plain ones in between.
        self._others: dict[str, torch.Tensor] = {}
        # The checkpoint that training resumes from, where it is not in the output folder.
        self.resumed_from: str | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        if any(hasattr(weight, "device_mesh") for weight in self._weights.values()):
            raise ValueError("`EmaCallback` does not average weights that FSDP shards. Leave it out, or use DDP.")
        self._others = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._averaged, self._count = False, state.global_step
        if not state.global_step:
            return
        folder = self.resumed_from or Path(args.output_dir) / f"checkpoint-{state.global_step}"
        saved = Path(folder) / self.FILE
        if saved.is_file():  # then the checkpoint's own weights are the averages
            for name, value in load_file(saved).items():
                self._weights[name].data.copy_(value)
        else:
            logger.warning(f"There is no {saved}: training goes on from the checkpoint's weights, averaged or not.")

    @torch.no_grad()
    def _swap(self):
        for name, weight in self._weights.items():
            other, self._others[name] = self._others[name], weight.detach().clone()
            weight.copy_(other)
        self._averaged = not self._averaged

    def on_step_begin(self, args, state, control, **kwargs):
        if self._averaged:
            self._swap()

    def on_step_end(self, args, state, control, **kwargs):
        self._count += 1
        decay = min(self.decay, (1 + self._count) / (10 + self._count))
        averages = list(self._others.values())
        get_ema_multi_avg_fn(decay)(averages, [weight.detach() for weight in self._weights.values()], None)
        self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        if (control.should_evaluate or control.should_save) and not self._averaged:
            self._swap()

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir() and self._averaged:
            with whole_file(folder / self.FILE) as partial:
                save_file({name: value.contiguous() for name, value in self._others.items()}, partial)

    def on_train_end(self, args, state, control, **kwargs):
        # With `load_best_model_at_end` the best checkpoint's averages have just been loaded.
        if not self._averaged and not (args.load_best_model_at_end and state.best_model_checkpoint):
            self._swap()
