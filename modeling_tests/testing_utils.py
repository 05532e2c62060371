# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Small models with weights large enough that a wrong path shows, batches of rows, and a device without values."""

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from transformers import BertConfig

from yan_hf import YanConfig, YanForConditionalGeneration


# One block of each kind, for tests whose time is that of a compiler.
SHALLOW = {"encoder_layers": 1, "flow_layers": 1, "cross_attention_layers": [0]}

# An encoder of Transformers, and where that looks whether its mask is all ones.
ENCODER = BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
ENCODER_READS = {"_ignore_bidirectional_mask_sdpa": lambda mask: False}


def small_config(**changes) -> YanConfig:
    """A configuration of a few ten thousand parameters; some blocks have no cross-attention."""
    fields = {
        "vocab_size": 60,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "encoder_layers": 2,
        "flow_layers": 3,
        "decoder_layers": 1,
        "cross_attention_layers": [0, 2],
        "num_experts": 4,
        "max_position_embeddings": 24,
        "initializer_range": 0.15,
    }
    return YanConfig(**{**fields, **changes})


def small_model(seed: int = 0, **changes) -> YanForConditionalGeneration:
    """A model in eval mode, the same for the same seed; no bias, norm or query is left at its neutral start."""
    torch.manual_seed(seed)
    model = YanForConditionalGeneration(small_config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name or "query" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def mmd_by_loops(points: torch.Tensor) -> float:
    """
    The unbiased squared MMD of points `(n, d)` with N(0, I), pair by pair; the kernel's means over normal points by
    sums over a fine grid, dimension by dimension.
    """
    points, grid = points.double(), torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    density = torch.exp(-grid.square() / 2) / (2 * math.pi) ** 0.5 * (grid[1] - grid[0])
    wider = torch.exp(-grid.square() / 4) / (4 * math.pi) ** 0.5 * (grid[1] - grid[0])  # of a difference of two

    def kernel(difference: torch.Tensor, width: float) -> torch.Tensor:
        return torch.exp(-difference.square() / (2 * width**2))

    total = 0.0
    for width in (0.2, 0.5, 1, 2, 5):
        pairs = [kernel(a - b, width).prod() for a, b in permutations(points, 2)]
        across = [(kernel(point[:, None] - grid, width) * density).sum(dim=-1).prod() for point in points]
        normal = (kernel(grid, width) * wider).sum() ** points.shape[1]
        total += float(sum(pairs) / len(pairs) - 2 * sum(across) / len(across) + normal)
    return total


def batch_of_rows(lengths: list[int], side: str = "right", extra: int = 0, seed: int = 1, vocab_size: int = 60):
    """Rows of random tokens: a list of `(length,)` tensors, and the same rows padded into one batch."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(5, vocab_size, (length,), generator=generator) for length in lengths]
    width = max(lengths) + extra
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(len(row))
        input_ids[index, place] = row
        attention_mask[index, place] = 1
    return rows, input_ids, attention_mask


class DraftCounter:
    """A streamer that counts drafts."""

    drafts = 0

    def put_draft(self, value):
        self.drafts += 1

    def put(self, value):
        pass

    def end(self):
        pass


class NoHost(TorchFunctionMode):
    """
    Makes the meta device stand for an accelerator, whose host waits wherever a value is read, or is copied from the
    host's memory. PyTorch itself refuses most reads on that device, and some tensors of another beside its own.

    Args:
        reads: By the name of the function that reads, what it gets in the place of the value: a function of the read's
            arguments. Other reads fail.
        copies: Names of functions that may copy values from the host. Other copies raise `AssertionError`.

    `seen` counts the reads and copies of each function.
    """

    READS = {"item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__"}
    READS |= {"nonzero", "unique", "bincount", "__getitem__"}  # whose result has a shape that is read

    def __init__(self, reads: dict[str, Callable] | None = None, copies: tuple[str, ...] = ()):
        super().__init__()
        self.reads, self.copies, self.seen = reads or {}, copies, Counter()

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        frame, name = sys._getframe(1), getattr(function, "__name__", "")
        while frame.f_globals["__name__"].split(".")[0] == "torch":
            frame = frame.f_back
        caller = frame.f_code.co_name
        if name == "_sample_dirichlet":
            return torch.empty_like(args[0])  # PyTorch has no such kernel for the meta device
        if self._is_read(name, args) and caller in self.reads:
            self.seen[caller] += 1
            return self.reads[caller](*args)
        result = function(*args, **(kwargs or {}))
        # Older versions of Transformers copy a zero for the mask of eager attention.
        if caller != "eager_mask" and self._is_copy(name, args, kwargs or {}, result):
            assert caller in self.copies, f"{caller}: {name} copies values from the host"
            self.seen[caller] += 1
        return result

    def _is_read(self, name: str, args: tuple) -> bool:
        is_read = name in self.READS and args[0].is_meta
        return is_read and (name != "__getitem__" or getattr(args[1], "dtype", None) == torch.bool)

    def _is_copy(self, name: str, args: tuple, kwargs: dict, result: Any) -> bool:
        if name in ("__getitem__", "__setitem__", "index_put", "index_put_") and args[0].is_meta:
            index = args[1] if isinstance(args[1], (tuple, list)) else (args[1],)
            if name.startswith("__") and any(isinstance(part, (list, range, np.ndarray)) for part in index):
                return True
            by_mask = any(getattr(part, "dtype", None) == torch.bool for part in index)
            if by_mask and len(args) > 2 and isinstance(args[2], torch.Tensor):
                raise AssertionError(f"{name}: values of the device at a mask wait for how many these are")
        tensors = [value for value in _flat([args, kwargs]) if isinstance(value, torch.Tensor)]
        is_result = isinstance(result, torch.Tensor) and result.is_meta
        # Many operations take another device's tensor on this one, and a number goes along with the launch.
        is_here = is_result or any(value.is_meta for value in tensors)
        if is_here and any(not value.is_meta and value.dim() > 0 for value in tensors):
            return True
        if not is_result:
            return False
        is_given = name in ("tensor", "as_tensor", "asarray") and not isinstance(args[0], torch.Tensor)
        return is_given or name == "new_tensor" or any(not value.is_meta for value in tensors[:1])


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _flat(part)
    else:
        yield value
