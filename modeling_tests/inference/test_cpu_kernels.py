# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Weights that are kept in oneDNN's layout: the same bits, every change of a weight is seen, gone with the weight."""

import gc

import pytest
import torch
from torch import nn

from yan_hf.inference import cpu_kernels, int8
from yan_hf.layers import KERNELS, apply_linears, linear


def packed_parts(weight: nn.Parameter) -> list[torch.Tensor]:
    """What is kept of a parameter."""
    return [packed for _, _, packed in int8._PACKED.get(weight, {}).values() if packed is not None]


def product(states, weight, bias=None):
    with torch.no_grad(), cpu_kernels.use_onednn(KERNELS):
        return linear(states, weight, bias)


def change_in_place(weight):
    with torch.no_grad():
        weight += 1


def change_data(weight):
    weight.data += 1  # as PEFT merges adapters


def replace_data(weight):
    weight.data = weight.data + 1


def load(weight):
    layer = nn.Module()
    layer.weight = weight
    layer.load_state_dict({"weight": weight.detach() + 1})


@pytest.mark.skipif(not cpu_kernels.is_available(), reason="needs oneDNN on x86")
@pytest.mark.parametrize("number", [1, 2, 7, 64])
@pytest.mark.parametrize("change", [change_in_place, change_data, replace_data, load], ids=lambda case: case.__name__)
def test_every_change_of_a_packed_weight_is_seen(monkeypatch, number, change):
    monkeypatch.setattr(cpu_kernels, "_SMALLEST_PRODUCT", 1)
    torch.manual_seed(0)
    weight, states, bias = nn.Parameter(torch.randn(96, 64)), torch.randn(number, 64), torch.randn(96)
    for _ in range(2):
        results = [product(states, weight, bias) for _ in range(3)]
        assert all(torch.equal(result, results[0]) for result in results)
        torch.testing.assert_close(results[0], nn.functional.linear(states, weight.detach(), bias))
        assert len(packed_parts(weight)) == (number > 1)
        change(weight)
    with torch.no_grad(), cpu_kernels.use_onednn(KERNELS):  # one call of `generate`, in which slots are filled anew
        for _ in range(3):
            torch.testing.assert_close(linear(states, weight), nn.functional.linear(states, weight))
            weight += 1


@pytest.mark.skipif(not cpu_kernels.is_available(), reason="needs oneDNN on x86")
def test_layers_and_experts_are_kept_and_parts_of_a_vocabulary_are_not(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "_SMALLEST_PRODUCT", 1)
    experts, head = nn.Parameter(torch.randn(3, 32, 64)), nn.Parameter(torch.randn(96, 64))
    states = torch.randn(5, 64)
    for _ in range(3):
        for expert in (0, 2):
            result = product(states, experts[expert])
            torch.testing.assert_close(result, states @ experts[expert].detach().T)
        product(states, head[32:64])
        product(states, torch.randn(8, 64))  # no parameter
    assert len(packed_parts(experts)) == 2 and not packed_parts(head)
    kept = len(int8._PACKED)
    del experts
    gc.collect()
    assert len(int8._PACKED) < kept


@pytest.mark.skipif(not int8._multiplies_packed(), reason="needs oneDNN and VNNI")
def test_packed_int8_products_equal_plain_ones_to_the_bit(monkeypatch):
    """
    But for sums of unsigned states beyond float32's integers, which some processors round before they take out the
    zero.
    """
    monkeypatch.setattr(int8, "_SMALLEST_PACKED", 1)
    generator = torch.Generator().manual_seed(0)
    for number in (1, 2, 64):
        integers = torch.randint(-127, 128, (number, 2048), generator=generator, dtype=torch.int8)
        weights = torch.randint(-127, 128, (2, 96, 2048), generator=generator, dtype=torch.int8)
        integers[0], weights[0, 0] = 127, 127  # the largest sum there is
        weights = nn.Parameter(weights, requires_grad=False)
        rows = int8._QuantisedRows(integers, torch.rand(number))
        scale, bias = torch.rand(96), torch.randn(96)
        for _ in range(2):
            for weight in weights:
                packed = int8._prepared(weight)
                assert packed.is_mkldnn
                expected = int8._product(rows, weight, scale, bias)
                found = int8._product(rows, packed, scale, bias)
                sums = (rows.as_unsigned().double() @ weight.double().T).abs()
                is_exact = sums < 2**24
                assert torch.equal(found[is_exact], expected[is_exact]) and is_exact.any()
                rounding = 2**-23 * sums * scale * rows.scales[:, None]
                assert ((found - expected).abs() <= rounding + 1e-6 * expected.abs()).all()
            weights.copy_(weights.flip(0))
        assert len(packed_parts(weights)) == 2


@pytest.mark.parametrize("precise", [False, True], ids=["8 bits", "16 bits"])
@pytest.mark.parametrize("smallest", [1, 2**40], ids=["packed", "plain"])
def test_layers_that_read_the_same_states_quantise_them_once(monkeypatch, smallest, precise):
    if smallest == 1 and not int8._multiplies_packed():
        pytest.skip("needs oneDNN and VNNI")
    monkeypatch.setattr(int8, "_SMALLEST_PACKED", smallest)
    floats = [nn.Linear(16, size, bias=size > 8) for size in (8, 8, 24)]
    layers = [int8.Int8Linear(layer, precise) for layer in floats]
    for layer, quantised in zip(floats, layers):
        integers, scale = int8.quantize_rows(layer.weight.detach())
        quantised.load_state_dict({"weight": integers, "weight_scale": scale}, strict=False)
    calls = []
    quantize = int8.quantize_rows
    monkeypatch.setattr(int8, "quantize_rows", lambda *given: calls.append(1) or quantize(*given))
    states = torch.randn(2, 3, 16)
    with torch.inference_mode():
        expected = [layer(states) for layer in layers]
        calls.clear()
        found = apply_linears(layers, states)
        assert len(calls) == 1 + precise
        for one, other, layer in zip(found, expected, layers):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
            exact = nn.functional.linear(states, layer.weight * layer.weight_scale[:, None], layer.bias)
            assert (one - exact).norm() < (1e-4 if precise else 0.02) * exact.norm()
        # A changed weight or scale counts, and so does a hook.
        layers[1].weight.neg_()
        layers[2].weight_scale.mul_(2)
        assert torch.equal(apply_linears(layers, states)[1], -expected[1])
        torch.testing.assert_close(
            apply_linears(layers, states)[2] - floats[2].bias, 2 * (expected[2] - floats[2].bias)
        )
        layers[0].register_forward_hook(lambda *given: given[-1] + 1)
        assert torch.equal(apply_linears(layers, states)[0], expected[0] + 1)
