# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The selective scan of Mamba-1 (Gu and Dao 2023, section 3.2, algorithm 2) and its causal convolution, each behind one
function with three ways: a plain recurrence as the oracle, a fast pure-PyTorch path, and the CUDA kernels of mamba-ssm
and causal-conv1d where they are installed.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t        h: (B, D, N)
    y_t = C_t h_t + D u_t,  times silu(z_t) where there is a gate

Shapes and names are those of mamba-ssm: `B` batch, `D` inner width, `L` length, `N` state size. No CUDA package is
imported before a mixer is built.

The fast path goes through the sequence in chunks. Within a chunk, the recurrence is one multiply-add per position, and
everything else a few operations on the whole chunk; only the state at each chunk's start is kept for the backward
pass, which computes the others again. No step divides by a product of decays, which underflows. The path is one
operator to `torch.compile`: no loop is unrolled into its graph.
"""

import importlib
import math
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import get_args

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from transformers.utils import logging

from .configuration_yan import MambaImplementation


logger = logging.get_logger(__name__)

# Numbers in a chunk's states: few enough to stay in a CPU's cache; on other devices, enough to fill it.
_CHUNK_NUMBERS = {"cpu": 2**19}
_CHUNK_NUMBERS_ELSEWHERE = 2**24
_LONGEST_CHUNK = 128


@lru_cache(maxsize=1)
def _cuda_kernels() -> tuple | None:
    """`selective_scan_fn` and `causal_conv1d_fn`, or `None` where a package is missing or does not load."""
    try:
        scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
        convolution = importlib.import_module("causal_conv1d").causal_conv1d_fn
    except (ImportError, AttributeError, OSError, RuntimeError):
        return None  # built for another PyTorch or another CUDA, they fail in any of these ways
    return None if convolution is None else (scan, convolution)


def resolve_implementation(implementation: str, field: str = "implementation") -> str:
    """
    The way that a mixer will use, `"torch"` where the kernels cannot be imported.

    Args:
        implementation: `"torch"`; `"cuda"`, which demands the kernels; or `"auto"`, which takes them if they are
            there, for tensors on a CUDA device in eager mode.
        field: What the value is called in an error message: `ValueError` for another name, `ImportError` for `"cuda"`
            without the packages.
    """
    if implementation not in (choices := get_args(MambaImplementation)):
        raise ValueError(f"`{field}` must be one of {', '.join(choices)}, but is {implementation!r}.")
    if implementation == "torch" or _cuda_kernels() is not None:
        return implementation
    if implementation == "cuda":
        raise ImportError(
            f"`{field}='cuda'` needs the packages mamba-ssm and causal-conv1d: install them with `pip install "
            "yan-hf[mamba]` (this needs a CUDA toolkit), or set it to 'auto' or 'torch'."
        )
    return "torch"


def _use_kernels(implementation: str, states: Tensor, supported: bool = True) -> bool:
    # The kernels are opaque to the compiler and would break its graph; they do not know float64.
    suited = supported and states.device.type == "cuda" and states.dtype != torch.float64
    if implementation == "torch" or (implementation == "auto" and (torch.compiler.is_compiling() or not suited)):
        return False
    if resolve_implementation(implementation) == "cuda" and states.device.type != "cuda":
        raise ValueError(
            f"implementation='cuda' needs tensors on a CUDA device, but they are on {states.device}: move the model "
            "there, or choose 'auto' or 'torch'."
        )
    return _cuda_kernels() is not None


def tell_once(states: Tensor, way: str):
    """Logs by what the scan runs on a kind of device, once; not in a compiler's graph."""
    if not torch.compiler.is_compiling():
        logger.info_once(f"Mamba's scan runs by {way} on {states.device.type}.")


def selective_scan_sequential(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False) -> Tensor:
    """[`selective_scan`], one position after the other, in float32 (float64 for such inputs). The oracle of tests."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    steps = _step_sizes(delta.mT, delta_bias, delta_softplus).unbind(1)  # (B, D) each
    decay_rate = A.to(dtype)  # (D, N)
    state = torch.zeros(*u.shape[:2], A.shape[1], dtype=dtype, device=u.device)
    outputs = []
    for x, step, b, c in zip(u.to(dtype).unbind(-1), steps, B.to(dtype).unbind(-1), C.to(dtype).unbind(-1)):
        decay = torch.exp(step[..., None] * decay_rate)
        state = decay * state + (step * x)[..., None] * b[:, None]
        outputs.append((state * c[:, None]).sum(dim=-1))
    return _skip_and_gate(torch.stack(outputs, dim=1), u.mT, D, None if z is None else z.mT).mT


def _scan_by_operator(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """`y` `(B, L, D)` of inputs `(B, L, ·)` and A `(D, N)`, as one operator over the positions."""

    def advance(carry: tuple[Tensor, Tensor], position: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor], Tensor]:
        (state, rate), (x, step, b, c) = carry, position
        state = torch.exp(step[..., None] * rate) * state + (step * x)[..., None] * b[:, None]
        return (state, rate.clone()), (state * c[:, None]).sum(dim=-1)  # the operator takes no alias

    dtype = torch.promote_types(u.dtype, torch.float32)
    positions = tuple(values.transpose(0, 1).to(dtype) for values in (u, delta, B, C))
    start = (positions[0].new_zeros(*positions[0].shape[1:], A.shape[1]), A.to(dtype))
    return scan(advance, start, positions, dim=0)[1].transpose(0, 1)


def _step_sizes(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """Δ `(B, L, D)`, in float32 or wider."""
    delta = delta.to(torch.promote_types(delta.dtype, torch.float32))
    if bias is not None:
        delta = delta + bias.to(delta.dtype)
    return nn.functional.softplus(delta) if softplus else delta


def _skip_and_gate(output: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """The output `(B, L, D)`, which is written to, with skip connection and gate, in the dtype of `u`."""
    if D is not None:
        output.addcmul_(u.to(output.dtype), D.to(output.dtype))
    if z is not None:
        output = output * nn.functional.silu(z.to(output.dtype))
    return output.to(u.dtype)


# The fast path: tensors are (B, L, ·) here, as the linear layers make them, and states are (T, B, N, D): the innermost
# dimension is the wide one, and a position is one block of memory.


def _chunk_length(u: Tensor, state_size: int) -> int:
    numbers = _CHUNK_NUMBERS.get(u.device.type, _CHUNK_NUMBERS_ELSEWHERE)
    return max(8, min(_LONGEST_CHUNK, numbers // max(1, u.shape[0] * u.shape[2] * state_size)))


class _Buffer:
    """Memory for `(T, B, N, D)` that chunks of up to `T` positions share, with a view of each position."""

    def __init__(self, values: Tensor):
        self.values, self.rows = values, values.unbind(0)


_memory = threading.local()


def _workspace(name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """
    Memory of a thread's chunks on the CPU, kept from call to call: fresh pages would cost as much as the arithmetic.
    A few chunks' numbers at most; elsewhere PyTorch's caching allocator does the same.
    """
    count, kept = math.prod(shape), getattr(_memory, key := f"{name}_{like.dtype}", None)
    if like.device.type != "cpu" or count > 2 * _CHUNK_NUMBERS["cpu"]:
        return like.new_empty(shape)
    if kept is None or len(kept) < count:
        with torch.inference_mode(False):  # such a tensor could not be written to later, outside of that mode
            kept = torch.empty(count, dtype=like.dtype)
        setattr(_memory, key, kept)
    return kept[:count].view(shape)


def _recur(link: _Buffer, states: _Buffer, length: int, reverse: bool = False) -> None:
    """
    In place, `states[t + 1] += link[t] · states[t]` for `t` from 0 to `length - 1`; or with `reverse`, `states[t] +=
    link[t + 1] · states[t + 1]` for `t` from `length - 2` to 0. On the CPU one operation per position; elsewhere,
    where a launch costs more than the work, by doubling.
    """
    used, written = (slice(1, length), slice(length)) if reverse else (slice(length), slice(length + 1))
    if states.values.device.type != "cpu":
        _recur_by_doubling(link.values[used], states.values[written], reverse)
        return
    order = slice(None, None, -1 if reverse else 1)
    links, rows = link.rows[used][order], states.rows[written][order]
    for factor, row, following in zip(links, rows, rows[1:]):
        following.addcmul_(factor, row)


def _recur_by_doubling(link: Tensor, states: Tensor, reverse: bool = False) -> None:
    """The same in about `log2(T)` operations on the whole chunk (Hillis and Steele 1986)."""
    product, span = link, 1  # the factor between `t` and `t + span`; at most one, so an underflow to zero is right
    while span < len(states):
        first, last = states[:-span], states[span:]
        target, source = (first, last) if reverse else (last, first)
        target.copy_(torch.addcmul(target, product, source))
        product = product[:-span] * product[span:]
        span *= 2


class _Scan:
    """The inputs of a scan, positions first, and the buffers that its chunks of `T` positions share."""

    def __init__(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor):
        dtype = torch.promote_types(u.dtype, torch.float32)
        self.u, self.delta, self.b, self.c = (x.transpose(0, 1).to(dtype).contiguous() for x in (u, delta, B, C))
        self.rate = A.to(dtype).t().contiguous()  # (N, D)
        # As a power of two, which PyTorch computes several times faster than `exp` on some processors.
        self.binary_rate = self.rate / math.log(2)
        total = len(self.u)
        length = min(_chunk_length(u, A.shape[1]), total)
        self.places = [slice(start, min(start + length, total)) for start in range(0, total, max(length, 1))]
        self.state_shape = (u.shape[0], *self.rate.shape)
        self.decay = self.buffer("decay", length)
        self.states = self.buffer("states", length + 1)  # before each position and after the last

    def run(self, place: slice, initial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs Δ·u `(T, B, D)`, decays `(T, B, N, D)` and states `(T + 1, B, N, D)` of one chunk."""
        length = place.stop - place.start
        decay, states = self.decay.values[:length], self.states.values[: length + 1]
        delta = self.delta[place]
        scaled = delta * self.u[place]
        torch.mul(delta[:, :, None], self.binary_rate, out=decay).exp2_()
        states[0] = initial
        torch.mul(scaled[:, :, None], self.b[place][..., None], out=states[1:])
        _recur(self.decay, self.states, length)
        return scaled, decay, states

    def buffer(self, name: str, length: int) -> _Buffer:
        return _Buffer(_workspace(name, (length, *self.state_shape), self.rate))

    def empty(self, *shape: int) -> Tensor:
        return self.rate.new_empty(shape)


def _scan_forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, differentiable: bool
) -> tuple[Tensor, Tensor]:
    """`y` `(L, B, D)`, and where `differentiable`, the state before each chunk; inputs `(B, L, ·)`, A `(D, N)`."""
    scan = _Scan(u, delta, A, B, C)
    output = scan.empty(*scan.u.shape)
    borders = scan.empty(len(scan.places) if differentiable else 0, *scan.state_shape)
    state = torch.zeros(scan.state_shape, dtype=output.dtype, device=u.device)
    for index, place in enumerate(scan.places):
        if differentiable:
            borders[index] = state
        _, _, states = scan.run(place, state)
        torch.matmul(scan.c[place][:, :, None], states[1:], out=output[place][:, :, None])
        state = states[-1]
    return output, borders


def _scan_backward(
    grad: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, borders: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the inputs, positions first. The adjoint of the state is the same recurrence, from the end."""
    scan = _Scan(u, delta, A, B, C)
    grad_u, grad_delta, grad_b, grad_c = (scan.empty(*values.shape) for values in (scan.u, scan.delta, scan.b, scan.c))
    # One for each place in a chunk, summed at the end: one pass over memory less, and shorter sums.
    grad_rates = scan.buffer("grad_rates", len(scan.decay.rows)).values.zero_()
    adjoints = scan.buffer("adjoints", len(scan.decay.rows))
    carried = None
    for index in range(len(scan.places) - 1, -1, -1):
        place = scan.places[index]
        scaled, decay, states = scan.run(place, borders[index])
        grad_output, step = grad[place].to(scaled.dtype), scan.delta[place]
        _contract(grad_output, states[1:], out=grad_c[place])
        adjoint = torch.mul(scan.c[place][..., None], grad_output[:, :, None], out=adjoints.values[: len(scaled)])
        if carried is not None:
            adjoint[-1] += carried
        _recur(scan.decay, adjoints, len(scaled), reverse=True)
        carried = decay[0] * adjoint[0]
        _contract(scaled, adjoint, out=grad_b[place])
        grad_scaled = (scan.b[place][:, :, None] @ adjoint)[:, :, 0]  # (T, B, D)
        torch.mul(grad_scaled, step, out=grad_u[place])
        # Of the exponent Δ_t A, which the decay alone depends on.
        grad_exponent = adjoint.mul_(decay).mul_(states[:-1])
        grad_rates[: len(scaled)].addcmul_(grad_exponent, step[:, :, None])
        torch.mul(grad_exponent, scan.rate, out=decay)
        torch.sum(decay, dim=2, out=grad_delta[place]).addcmul_(grad_scaled, scan.u[place])
    return (
        grad_u.to(u.dtype),
        grad_delta.to(delta.dtype),
        grad_rates.sum(dim=(0, 1)).t().contiguous().to(A.dtype),
        grad_b.to(B.dtype),
        grad_c.to(C.dtype),
    )


def _contract(values: Tensor, states: Tensor, out: Tensor) -> None:
    """Sum over the width: `(T, B, D)`, `(T, B, N, D)` → `(T, B, N)`; the other order is a slow kernel on the CPU."""
    torch.matmul(values[:, :, None], states.mT, out=out[:, :, None])


def _register_operator() -> Callable[..., tuple[Tensor, Tensor]]:
    """
    The scan as an operator, which compilers take as it is. A checkpoint that brings this file along is a second module
    in the same process: it uses the operator that is there.
    """
    if hasattr(torch.ops.yan_hf, "selective_scan"):
        return torch.ops.yan_hf.selective_scan
    forward = torch.library.custom_op("yan_hf::selective_scan", _scan_forward, mutates_args=())
    backward = torch.library.custom_op("yan_hf::selective_scan_backward", _scan_backward, mutates_args=())

    @forward.register_fake
    def _(u, delta, A, B, C, differentiable):
        dtype = torch.promote_types(u.dtype, torch.float32)
        output = u.new_empty(u.shape[1], u.shape[0], u.shape[2], dtype=dtype)
        length = _chunk_length(u, A.shape[1])
        chunks = (u.shape[1] + length - 1) // length if differentiable else 0
        return output, output.new_empty(chunks, u.shape[0], A.shape[1], A.shape[0])

    @backward.register_fake
    def _(grad, u, delta, A, B, C, borders):
        grads = [values.new_empty(values.transpose(0, 1).shape) for values in (u, delta, B, C)]
        return grads[0], grads[1], A.new_empty(A.shape), grads[2], grads[3]

    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:5], output[1])

    def differentiate(ctx, grad_output, grad_borders):
        grad_u, grad_delta, grad_a, grad_b, grad_c = backward(grad_output, *ctx.saved_tensors)
        grads = [grad.transpose(0, 1).contiguous() for grad in (grad_u, grad_delta, grad_b, grad_c)]
        return grads[0], grads[1], grad_a, grads[2], grads[3], None

    forward.register_autograd(differentiate, setup_context=save)
    return forward


_SCAN = _register_operator()


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    implementation: str = "auto",
) -> Tensor:
    """
    The selective scan, with the arguments of mamba-ssm's `selective_scan_fn`. The state is float32, or float64 for
    such inputs.

    Args:
        u: The input, `(B, D, L)`. So is the output, in its dtype.
        delta: Step sizes Δ, `(B, D, L)`, before `delta_bias` `(D,)` and, with `delta_softplus`, the softplus.
        A: Rates, `(D, N)`, negative.
        B, C: Into and out of the state, each `(B, N, L)`.
        D: Weight of the skip connection, `(D,)`.
        z: Gate, `(B, D, L)`; its SiLU multiplies the output.
        implementation: `"auto"`, `"torch"` or `"cuda"`, see [`resolve_implementation`]; or `"scan"`, PyTorch's own
            operator, slower, which exporters take with any length.

    Raises:
        ValueError: for shapes that contradict each other; for another implementation; for `"cuda"` off CUDA.
        ImportError: for `"cuda"` without mamba-ssm.
    """
    width, state_size = A.shape
    sizes = {"u": (u, width), "delta": (delta, width), "B": (B, state_size), "C": (C, state_size)}
    for name, (values, size) in sizes.items():
        if values.shape != (shape := (u.shape[0], size, u.shape[-1])):
            raise ValueError(
                f"`{name}` must have the shape {shape}, as `u` and `A` `{(width, state_size)}` have it, but has "
                f"{tuple(values.shape)}."
            )
    if implementation == "scan":
        steps = _step_sizes(delta.mT, delta_bias, delta_softplus)
        output = _scan_by_operator(u.mT, steps, A, B.mT, C.mT)
        return _skip_and_gate(output, u.mT, D, None if z is None else z.mT).mT
    if _use_kernels(implementation, u):
        tell_once(u, "mamba-ssm's kernel")
        kernel, _ = _cuda_kernels()
        delta, B, C = (values.to(u.dtype) for values in (delta, B, C))
        D, delta_bias = (None if values is None else values.float() for values in (D, delta_bias))
        z = None if z is None else z.to(u.dtype)
        return kernel(u, delta, A.float(), B, C, D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus)
    tell_once(u, "PyTorch's operations")
    # As the linear layers of a mixer make them, these are views; a caller's own layout is changed once, here.
    u, delta = u.mT.contiguous(), delta.mT.contiguous()
    delta = _step_sizes(delta, delta_bias, delta_softplus)
    differentiable = torch.is_grad_enabled() and any(values.requires_grad for values in (u, delta, A, B, C))
    output, _ = _SCAN(u, delta, A, B.mT, C.mT, differentiable)
    return _skip_and_gate(output.transpose(0, 1).contiguous(), u, D, None if z is None else z.mT).mT


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, implementation: str = "auto") -> Tensor:
    """
    Causal depthwise convolution and SiLU: position `t` sees `t - K + 1` to `t`, and zeros before the start.

    Args:
        x: `(B, D, L)`. So is the output, in its dtype.
        weight: `(D, 1, K)`, as `nn.Conv1d` has it.
        bias: `(D,)`.
        implementation: As in [`selective_scan`], with its errors; `"cuda"` has kernels for widths of 2 to 4.
    """
    kernel_size = weight.shape[-1]
    supported = 2 <= kernel_size <= 4
    if _use_kernels(implementation, x, supported):
        if not supported:
            raise ValueError(
                f"causal-conv1d has kernels for widths 2, 3 and 4, but `mamba_conv_kernel` is {kernel_size}: choose "
                "`mamba_implementation='auto'` or 'torch'."
            )
        _, convolution = _cuda_kernels()
        bias = None if bias is None else bias.to(x.dtype)
        return convolution(x.contiguous(), weight[:, 0].to(x.dtype), bias, activation="silu")
    # Multiply-adds of shifted copies: as fast as `conv1d`, in the layout of the linear layers, and without kernels
    # whose results may lie in memory otherwise than a compiler expects.
    dtype, length = torch.promote_types(x.dtype, torch.float32), x.shape[-1]
    padded = nn.functional.pad(x.mT.to(dtype), (0, 0, kernel_size - 1, 0))  # (B, K - 1 + L, D)
    output = padded.new_zeros(()) if bias is None else bias.to(dtype)
    for shift, tap in enumerate(weight[:, 0].to(dtype).unbind(-1)):
        output = torch.addcmul(output, padded[:, shift : shift + length], tap)
    return nn.functional.silu(output).to(x.dtype).mT
