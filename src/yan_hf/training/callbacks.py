# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Callbacks for Transformers' `Trainer`."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback
from transformers.utils import logging

from ..data.checks import check_arguments
from ..data.collator import YanDataCollator


logger = logging.get_logger(__name__)


class EpochCallback(TrainerCallback):
    """Tells the collator which epoch it is, so that every epoch sees other masked spans.

    Args:
        collator: The collator that the trainer uses.
    """

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
    first. In `Trainer(callbacks=[LossTermsCallback()])` the terms reach the console and the log history only, and the
    training arguments are checked as [`YanTrainer`] does.
    """

    def __init__(self):
        self._sums: dict[bool, dict[str, torch.Tensor]] = {True: {}, False: {}}
        self._counts = {True: 0, False: 0}
        self._hook = None

    def watch(self, model: nn.Module | None):
        """Collects the terms of a model from now on; the trainer's events do this by themselves."""
        if self._hook is None and model is not None:
            # The terms come from YAN itself, below any wrapper.
            inner = next((part for part in model.modules() if hasattr(part, "predict_lengths")), None)
            inner = inner or next((part for part in model.modules() if hasattr(part, "lm_head")), model)
            self._hook = inner.register_forward_hook(self._collect)

    def _collect(self, module: nn.Module, args: Any, output: Any):
        terms = getattr(output, "loss_terms", None)
        if terms:
            sums = self._sums[module.training]
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.float()
            self._counts[module.training] += 1

    def on_init_end(self, args, state, control, model=None, **kwargs):
        check_arguments(args, model)
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
            count = self._counts[training]
            if key not in logs or not count:
                continue
            sums = self._sums[training]
            values = torch.stack([*sums.values(), torch.full_like(next(iter(sums.values())), count)])
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(values)
            means = (values[:-1] / values[-1]).tolist()
            terms = {f"{key}_{name}": round(value, 6) for name, value in zip(sums, means)}
            logs.update(terms)
            if state.log_history:
                state.log_history[-1].update(terms)
            self._sums[training], self._counts[training] = {}, 0


class ExpertUsageCallback(TrainerCallback):
    """
    Logs how training uses the experts, and revives dead ones; for an `expert_scope` beyond the token, where training
    follows winners.

    Added to every training log, over the steps since the last one: `expert_share_0`, `expert_share_1`, ..., how often
    each expert won; `winner_entropy`, of these shares, and `gate_entropy`, mean over choices, both in nats: with as
    many modes as experts the first is `log K`, and the second is what the gate cannot know.

    Args:
        revive_below: An expert that won less than this share of an even split is dead: it becomes a copy of the one
            that won most, with noise, so that the two can divide its texts. `None` only reports.
        every: Optimiser steps between two looks at who is dead.
        noise: Of the copy, in units of the standard deviation of each weight.

    Raises:
        ValueError: for values out of range.
    """

    def __init__(self, revive_below: float | None = 0.1, every: int = 200, noise: float = 0.05):
        if revive_below is not None and not 0 <= revive_below < 1:
            raise ValueError(f"`revive_below` must be in [0, 1), or None, but is {revive_below}.")
        if every < 1 or noise <= 0:
            raise ValueError(f"`every` must be at least 1 and `noise` positive, but are {every} and {noise}.")
        self.revive_below, self.every, self.noise = revive_below, every, noise
        self._hook = None
        self._logged = self._watched = None  # wins by expert, summed entropy and number of choices
        self.revived: list[tuple[int, int]] = []
        """Optimiser step and expert of every revival."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        inner = next((part for part in model.modules() if hasattr(part, "predict_lengths")), None)
        if inner is not None and self._hook is None:
            self._hook = inner.register_forward_hook(self._collect)
        self._logged = self._watched = None

    def on_train_end(self, args, state, control, **kwargs):
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @torch.no_grad()
    def _collect(self, module: nn.Module, args: Any, output: Any):
        winners = getattr(output, "expert_indices", None)
        if winners is None or not module.training:
            return
        log_probs = output.gate_logits.float().log_softmax(dim=-1)
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1).mean()
        wins = torch.bincount(winners.flatten(), minlength=log_probs.shape[-1]).float() / winners[0].numel()
        counts = torch.cat([wins, entropy[None], entropy.new_ones(1)])
        self._logged = counts if self._logged is None else self._logged + counts
        self._watched = counts if self._watched is None else self._watched + counts

    @staticmethod
    def _joined(counts: torch.Tensor) -> torch.Tensor:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(counts)
        return counts

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or "loss" not in logs or self._logged is None:
            return
        counts, self._logged = self._joined(self._logged.clone()), None
        shares = counts[:-2] / counts[:-2].sum()
        figures = {f"expert_share_{expert}": share for expert, share in enumerate(shares.tolist())}
        figures["winner_entropy"] = float(torch.special.entr(shares).sum())
        figures["gate_entropy"] = float(counts[-2] / counts[-1])
        logs.update({name: round(value, 4) for name, value in figures.items()})
        if state.log_history:
            state.log_history[-1].update({name: logs[name] for name in figures})

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.revive_below is None or self._watched is None or state.global_step % self.every:
            return
        counts, self._watched = self._joined(self._watched.clone()), None
        wins = counts[:-2]
        dead = (wins < self.revive_below * wins.mean()).nonzero()[:, 0].tolist()
        flow = next(part for part in model.modules() if hasattr(part, "expert_velocity"))
        for expert in dead:
            self._copy(flow, int(wins.argmax()), expert, state.global_step, optimizer)
            self.revived.append((state.global_step, expert))
            logger.warning(
                f"Expert {expert} won {wins[expert] / wins.sum():.1%} of the choices; it starts anew as a "
                f"copy of expert {int(wins.argmax())}."
            )

    @torch.no_grad()
    def _copy(self, flow: nn.Module, source: int, target: int, step: int, optimizer: Any):
        weights = [*flow.experts.parameters(), *flow.gate.down_proj.parameters()]
        if any(hasattr(weight, "device_mesh") for weight in weights):
            raise ValueError("`ExpertUsageCallback` cannot revive experts that FSDP shards: pass `revive_below=None`.")
        # The same on all processes.
        generator = torch.Generator().manual_seed(step * 1_000 + target)
        for weight in weights:
            noise = torch.randn(weight[source].shape, generator=generator).to(weight.device, weight.dtype)
            weight[target] = weight[source] + self.noise * weight.float().std().to(weight.dtype) * noise
            moments = getattr(optimizer, "state", {}).get(weight, {})
            for value in moments.values():
                if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                    value[target] = 0


class LengthHeadCallback(TrainerCallback):
    """Notes that the length head has been trained: where adapters were, its own weights do not tell."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if not model.config.length_head_trained and model.config.loss_weights["length"] > 0:
            model.config.length_head_trained = any(
                weight.requires_grad for name, weight in model.named_parameters() if "length_head." in name
            )


class EmaCallback(TrainerCallback):
    """
    Keeps an exponential moving average of the trained weights: what is evaluated, saved and left in the model.

    Training goes on with the plain weights; a checkpoint holds them beside the averages, in
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
        self._weights: dict[str, nn.Parameter] = {}
        # The weights that are not in the model: the averages while training, the plain ones in between.
        self._others: dict[str, torch.Tensor] = {}
        self._averaged = False
        self._count = 0
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
        if saved.is_file():
            # The checkpoint's own weights are the averages.
            for name, value in load_file(saved).items():
                self._weights[name].data.copy_(value)
        else:
            logger.warning(f"There is no {saved}: training goes on from the checkpoint's weights, averaged or not.")

    @torch.no_grad()
    def _swap(self):
        for name, weight in self._weights.items():
            kept = weight.detach().clone()
            weight.copy_(self._others[name])
            self._others[name].copy_(kept)
        self._averaged = not self._averaged

    def on_step_begin(self, args, state, control, **kwargs):
        if self._averaged:
            self._swap()

    def on_step_end(self, args, state, control, **kwargs):
        self._count += 1
        decay = min(self.decay, (1 + self._count) / (10 + self._count))
        averages = list(self._others.values())
        get_ema_multi_avg_fn(decay)(averages, [weight.detach() for weight in self._weights.values()], None)
        self._show(control)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._show(control)

    def _show(self, control):
        if (control.should_evaluate or control.should_save) and not self._averaged:
            self._swap()

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir() and self._averaged:
            partial = folder / f"{self.FILE}.partial"
            save_file({name: value.contiguous() for name, value in self._others.items()}, partial)
            os.replace(partial, folder / self.FILE)

    def on_train_end(self, args, state, control, **kwargs):
        # With `load_best_model_at_end` the best checkpoint's averages have just been loaded.
        if not self._averaged and not (args.load_best_model_at_end and state.best_model_checkpoint):
            self._swap()


__all__ = ["EmaCallback", "EpochCallback", "ExpertUsageCallback", "LengthHeadCallback", "LossTermsCallback"]
