# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The selective scan and the causal convolution: the fast path against the oracle and against plain formulas."""

import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu, softplus

from yan_hf import selective_scan as module
from yan_hf.selective_scan import causal_conv, resolve_implementation, selective_scan, selective_scan_sequential


NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def scan_inputs(seed, batch=2, width=6, length=9, state=4, dtype=torch.float32, strong=False):
    """Random inputs by name; with `strong`, decays from nearly one to those that underflow within a few positions."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.rand(batch, width, length, generator=g) * 12 - 8 if strong else -2.0
    inputs = {
        "u": torch.randn(batch, width, length, generator=g),
        "delta": torch.randn(batch, width, length, generator=g) + scale,
        "A": -torch.rand(width, state, generator=g) * (60 if strong else state) - 1e-3,
        "B": torch.randn(batch, state, length, generator=g),
        "C": torch.randn(batch, state, length, generator=g),
        "D": torch.randn(width, generator=g),
        "z": torch.randn(batch, width, length, generator=g),
        "delta_bias": torch.randn(width, generator=g) - 1,
    }
    keep = ("A", "D", "delta_bias")  # mamba-ssm keeps these in float32
    return {
        name: value.to(dtype if name not in keep or dtype == torch.float64 else torch.float32)
        for name, value in inputs.items()
    }


def value_and_gradients(function, inputs, seed=0, **options):
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    output = function(**leaves, delta_softplus=True, **options)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).to(output.dtype)
    (output * weights.to(output.device)).sum().backward()
    return {"output": output.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def assert_close(results, expected, tolerance):
    """Within `tolerance` of the oracle, relative to each tensor's largest entry where that is above one."""
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        assert results[name].dtype == value.dtype and torch.isfinite(results[name]).all(), name
        scale = max(1.0, float(value.abs().max()))
        difference = float((results[name].double() - value.double()).abs().max()) / scale
        assert difference <= tolerance, (name, difference)


TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 3),
    width=st.integers(1, 9),
    length=st.one_of(st.integers(1, 40), st.integers(100, 300)),
    state=st.integers(1, 64),
    strong=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCES)),
)
def test_fast_path_equals_the_oracle(seed, batch, width, length, state, strong, dtype):
    inputs = scan_inputs(seed, batch, width, length, state, dtype, strong)
    expected = value_and_gradients(selective_scan_sequential, inputs)
    assert_close(value_and_gradients(selective_scan, inputs, implementation="torch"), expected, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(("length", "state"), [(2048, 1), (1023, 64), (2048, 16)])
def test_fast_path_equals_the_oracle_at_length(length, state, dtype):
    inputs = scan_inputs(length + state, 1, 4, length, state, dtype)
    expected = value_and_gradients(selective_scan_sequential, inputs)
    assert_close(value_and_gradients(selective_scan, inputs, implementation="torch"), expected, TOLERANCES[dtype])


@pytest.mark.parametrize("length", [1, 2, 9])
def test_the_scan_that_is_exported_equals_the_oracle(length):
    inputs = scan_inputs(4, length=length, strong=True)
    with torch.no_grad():
        expected = selective_scan_sequential(**inputs, delta_softplus=True)
        found = selective_scan(**inputs, delta_softplus=True, implementation="scan")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 16, 17, 24])
def test_lengths_around_the_borders_of_chunks(length, monkeypatch):
    monkeypatch.setitem(module._CHUNK_NUMBERS, "cpu", 1)
    inputs = scan_inputs(3, length=length)
    assert module._chunk_length(inputs["u"].mT, 4) == 8
    expected = value_and_gradients(selective_scan_sequential, inputs)
    assert_close(value_and_gradients(selective_scan, inputs, implementation="torch"), expected, 1e-5)


@pytest.mark.parametrize("length", [1, 2, 3, 8, 13, 40])
def test_the_recurrence_of_other_devices(length, monkeypatch):
    def recur(link, states, length, reverse=False):
        if reverse:
            module._recur_by_doubling(link.values[1:length], states.values[:length], True)
        else:
            module._recur_by_doubling(link.values[:length], states.values[: length + 1])

    monkeypatch.setattr(module, "_recur", recur)
    inputs = scan_inputs(4, length=length, strong=True)
    expected = value_and_gradients(selective_scan_sequential, inputs)
    assert_close(value_and_gradients(selective_scan, inputs, implementation="torch"), expected, 1e-5)


# On the meta device: Mamba in `test_meta_device.py`, by the torch path; the kernels need a GPU.
@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["torch", "cuda"])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_paths_on_a_gpu_equal_the_oracle(dtype, implementation):
    if implementation == "cuda":
        pytest.importorskip("mamba_ssm")
        pytest.importorskip("causal_conv1d")
    for length, state in [(1, 1), (77, 16), (1024, 16), (2048, 64)]:
        inputs = scan_inputs(length, 2, 16, length, state, dtype)
        inputs = {name: value.cuda() for name, value in inputs.items()}
        expected = value_and_gradients(lambda **given: selective_scan_sequential(**given), inputs)
        results = value_and_gradients(selective_scan, inputs, implementation=implementation)
        assert_close(results, expected, TOLERANCES[dtype])


def test_oracle_is_the_formula():
    """Unrolled: `y_t = Σ_s C_t · exp(A Σ_{s<r<=t} Δ_r) Δ_s B_s u_s`, then the skip and the gate."""
    inputs = scan_inputs(5, 1, 3, 5, 2, torch.float64)
    u, A, B, C = inputs["u"][0], inputs["A"], inputs["B"][0], inputs["C"][0]
    delta = softplus(inputs["delta"][0] + inputs["delta_bias"][:, None])
    expected = torch.zeros(3, 5, dtype=torch.float64)
    for t in range(5):
        for s in range(t + 1):
            decay = torch.exp(A * delta[:, s + 1 : t + 1].sum(-1, keepdim=True))
            expected[:, t] += (decay * B[:, s] * C[:, t]).sum(-1) * delta[:, s] * u[:, s]
    expected = (expected + inputs["D"][:, None] * u) * silu(inputs["z"][0])
    for scan in (selective_scan_sequential, selective_scan):
        torch.testing.assert_close(scan(**inputs, delta_softplus=True)[0], expected)


def test_gradients_are_those_of_differences():
    inputs = scan_inputs(6, 1, 2, 10, 3, torch.float64)
    leaves = [value.requires_grad_() for value in inputs.values()]

    def scan(*values):
        return selective_scan(**dict(zip(NAMES, values)), delta_softplus=True)

    assert torch.autograd.gradcheck(scan, leaves)


def test_optional_arguments_may_be_left_out():
    inputs = {name: value for name, value in scan_inputs(7).items() if name in ("u", "delta", "A", "B", "C")}
    inputs["delta"] = inputs["delta"].abs()
    torch.testing.assert_close(selective_scan(**inputs), selective_scan_sequential(**inputs), rtol=1e-5, atol=1e-5)


def test_what_the_backward_pass_keeps_grows_linearly_and_slowly():
    """The states at chunk borders, not those of every position."""
    inputs = scan_inputs(8, 1, 256, 1024, 16)
    sizes = []
    for length in (512, 1024):
        leaves = {
            name: (value[..., :length] if value.shape[-1] == 1024 else value).clone().requires_grad_()
            for name, value in inputs.items()
        }
        kept = {}

        def pack(values, kept=kept):
            kept[values.untyped_storage().data_ptr()] = values.untyped_storage().nbytes()
            return values

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda values: values):
            output = selective_scan(**leaves, delta_softplus=True)
        sizes.append(sum(kept.values()))
        del output
    assert sizes[1] < 2.1 * sizes[0]
    assert sizes[1] < 1024 * 256 * 16 * 4  # one state per position


@pytest.mark.slow
def test_the_operator_is_sound():
    """Fake tensors, autograd registration and schema, by PyTorch's own check."""
    inputs = scan_inputs(9, length=20)
    given = [inputs["u"].mT, softplus(inputs["delta"]).mT, inputs["A"], inputs["B"].mT, inputs["C"].mT]
    for values in (given, [value.clone().requires_grad_() for value in given]):
        torch.library.opcheck(torch.ops.yan_hf.selective_scan.default, [*values, values is not given])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.slow
def test_compiles_to_one_graph(dynamic):
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (12, 30):
        inputs = scan_inputs(10, length=length)
        expected = value_and_gradients(selective_scan, inputs)
        assert_close(value_and_gradients(compiled, inputs), expected, 1e-6)


def test_a_second_copy_of_the_module_uses_the_same_operator():
    spec = types.ModuleType("copied_scan")
    spec.__package__ = "yan_hf"
    with open(module.__file__) as file:
        exec(compile(file.read(), module.__file__, "exec"), spec.__dict__)
    inputs = scan_inputs(11)
    for scan in (spec.selective_scan, selective_scan):
        expected = value_and_gradients(selective_scan_sequential, inputs)
        assert_close(value_and_gradients(scan, inputs), expected, 1e-5)


@pytest.mark.parametrize("name", ["u", "delta", "B", "C"])
def test_contradicting_shapes_are_named(name):
    inputs = scan_inputs(12)
    inputs[name] = inputs[name][:, :1]
    with pytest.raises(ValueError, match=f"`{name}` must have the shape"):
        selective_scan(**inputs)


# The causal convolution


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), length=st.integers(1, 12), kernel=st.integers(1, 6), bias=st.booleans())
def test_convolution_is_the_formula(seed, length, kernel, bias):
    """`silu(b + Σ_k w_k x_{t - K + 1 + k})`, zeros before the start."""
    torch.manual_seed(seed)
    x, weight = torch.randn(2, 3, length), torch.randn(3, 1, kernel)
    offset = torch.randn(3) if bias else None
    expected = torch.zeros(2, 3, length) + (0 if offset is None else offset[:, None])
    for t in range(length):
        for k in range(kernel):
            if t - kernel + 1 + k >= 0:
                expected[..., t] += weight[:, 0, k] * x[..., t - kernel + 1 + k]
    torch.testing.assert_close(causal_conv(x, weight, offset), silu(expected), rtol=1e-5, atol=1e-5)


# The choice of the way


def test_demanding_cuda_without_the_packages_says_how_to_install_them(monkeypatch):
    monkeypatch.setattr(module, "_cuda_kernels", lambda: None)
    with pytest.raises(ImportError, match=r"pip install yan-hf\[mamba\]"):
        resolve_implementation("cuda")
    with pytest.raises(ImportError, match=r"pip install yan-hf\[mamba\]"):
        selective_scan(**scan_inputs(13), implementation="cuda")
    with pytest.raises(ImportError, match=r"pip install yan-hf\[mamba\]"):
        causal_conv(torch.zeros(1, 2, 3), torch.zeros(2, 1, 4), implementation="cuda")
    assert resolve_implementation("auto") == resolve_implementation("torch") == "torch"


def test_kernels_are_not_given_tensors_of_a_cpu(monkeypatch):
    monkeypatch.setattr(module, "_cuda_kernels", lambda: (None, None))
    with pytest.raises(ValueError, match="on cpu"):
        selective_scan(**scan_inputs(14), implementation="cuda")
    selective_scan(**scan_inputs(14), implementation="auto")
    assert resolve_implementation("auto") == "auto"


def test_unknown_implementations_are_named():
    with pytest.raises(ValueError, match="must be one of auto, torch, cuda, but is 'triton'"):
        selective_scan(**scan_inputs(15), implementation="triton")


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError])
def test_a_broken_installation_counts_as_none(monkeypatch, error):
    def fail(name):
        raise error(name)

    module._cuda_kernels.cache_clear()
    monkeypatch.setattr(module.importlib, "import_module", fail)
    assert module._cuda_kernels() is None
    module._cuda_kernels.cache_clear()


def test_the_packages_are_called_as_they_want(monkeypatch):
    """Argument order and dtypes of `selective_scan_fn` and `causal_conv1d_fn`, by stand-ins."""
    seen = {}

    def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
        seen["scan"] = [value.dtype for value in (u, delta, A, B, C, D, z, delta_bias)]
        return selective_scan_sequential(u, delta, A, B, C, D, z, delta_bias, delta_softplus)

    def convolution(x, weight, bias=None, activation=None):
        seen["conv"] = (tuple(weight.shape), x.is_contiguous(), activation)
        return causal_conv(x, weight[:, None], bias, "torch")

    interface = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = scan
    package = types.ModuleType("causal_conv1d")
    package.causal_conv1d_fn = convolution
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    monkeypatch.setitem(sys.modules, "causal_conv1d", package)
    module._cuda_kernels.cache_clear()
    monkeypatch.setattr(module, "_use_kernels", lambda implementation, *_, **__: implementation != "torch")
    inputs = scan_inputs(16, dtype=torch.bfloat16)
    inputs["B"] = inputs["B"].float()
    expected = selective_scan_sequential(**inputs, delta_softplus=True)
    result = selective_scan(**inputs, delta_softplus=True, implementation="cuda")
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)
    bf16, f32 = torch.bfloat16, torch.float32
    assert seen["scan"] == [bf16, bf16, f32, bf16, bf16, f32, bf16, f32]
    x, weight, bias = torch.randn(2, 7, 3).mT, torch.randn(3, 1, 4), torch.randn(3)
    result = causal_conv(x, weight, bias, implementation="cuda")
    torch.testing.assert_close(result, causal_conv(x, weight, bias, implementation="torch"))
    assert seen["conv"] == ((3, 4), True, "silu")
    with pytest.raises(ValueError, match="widths 2, 3 and 4, but `mamba_conv_kernel` is 5"):
        causal_conv(x, torch.randn(3, 1, 5), bias, implementation="cuda")
    module._cuda_kernels.cache_clear()
