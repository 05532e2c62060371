# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The blocks against plain renderings of the model page's formulas, in float64, with random weights and biases."""

import math

import pytest
import torch
from testing_utils import small_model
from torch.nn.functional import gelu, layer_norm, softmax

from yan_hf.layers import repeated_tokens, sdpa_in_float32


@pytest.mark.parametrize(
    ("tokens", "longest", "expected"),
    [
        ([7, 7, 8], 4, [0, 1, 0]),
        ([7, 7, 7], 4, [0, 1, 1]),
        ([7, 8, 7, 8, 9], 4, [0, 0, 2, 2, 0]),
        ([7, 8, 7, 8, 9], 1, [0, 0, 0, 0, 0]),
        ([5, 6, 7, 5, 6, 7, 7], 3, [0, 0, 0, 3, 3, 3, 1]),
        ([7, 8, 9, 8, 7], 4, [0, 0, 0, 0, 0]),
        ([0, 0, 7, 4, 4, 2, 2], 4, [0, 0, 0, 0, 0, 0, 0]),  # special tokens
        ([7], 4, [0]),
    ],
)
def test_repeated_tokens(tokens, longest, expected):
    for before, behind in ((0, 0), (3, 0), (0, 3)):
        padded = [0] * before + tokens + [0] * behind
        found = repeated_tokens(torch.tensor([padded]), [0, 1, 2, 4], longest)
        assert found.tolist() == [[0] * before + expected + [0] * behind]


def test_the_encoder_is_told_of_repeats():
    plain, model = small_model(), small_model(repeat_window=2)
    assert model.load_state_dict(plain.state_dict(), strict=False).missing_keys == ["model.embed_repeats.weight"]
    once, twice = torch.tensor([[7, 8, 9]]), torch.tensor([[7, 8, 8, 9, 8, 9]])

    def change():
        return [(model.model.encode(ids)[0] - plain.model.encode(ids)[0]).abs().amax().item() for ids in (once, twice)]

    with torch.no_grad():
        assert change() == [0, 0]  # a model that is trained on starts from what it knew
        model.model.embed_repeats.weight[1:].normal_()
        assert change()[0] == 0 and change()[1] > 1e-3
        with pytest.raises(ValueError, match="`repeat_window` looks for repeated tokens"):
            model.model.encode(inputs_embeds=torch.zeros(1, 3, model.config.hidden_size))
    model.freeze("token_embeddings")
    assert not model.model.embed_repeats.weight.requires_grad


def linear(module, x):
    return x @ module.weight.T + (0 if module.bias is None else module.bias)


def feed_forward(module, x):
    return linear(module.down_proj, gelu(linear(module.up_proj, x)))


def attention(module, x, source, heads=4):
    """One head at a time."""
    query, key, value = linear(module.q_proj, x), linear(module.k_proj, source), linear(module.v_proj, source)
    outputs = []
    for q, k, v in zip(query.chunk(heads, -1), key.chunk(heads, -1), value.chunk(heads, -1)):
        outputs.append(softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v)
    return linear(module.o_proj, torch.cat(outputs, -1))


def plain_norm(x):
    """Without learned scale and shift: zero mean, unit variance, eps 1e-5."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)


def norm(module, x):
    return plain_norm(x) * module.weight + module.bias


def double_model(**changes):
    return small_model(**changes).double().requires_grad_(False)


def test_plain_norm_is_layer_norm():
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(plain_norm(x), layer_norm(x, (8,)))


def test_encoder():
    """Token plus position; pre-norm blocks; a final norm."""
    model = double_model(attention_bias=True).model
    ids = torch.tensor([[5, 9, 7, 11]])
    x = model.embed_tokens.weight[ids] + model.embed_positions.weight[:4]
    for layer in model.encoder.layers:
        normed = norm(layer.self_attn_norm, x)
        x = x + attention(layer.self_attn, normed, normed)
        x = x + feed_forward(layer.feed_forward, norm(layer.feed_forward_norm, x))
    torch.testing.assert_close(model.encode(ids).last_hidden_state, norm(model.encoder.norm, x))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("length", [5, 257])
def test_attention_trains_in_bfloat16_by_the_way_that_is_faster_on_a_cpu(monkeypatch, autocast, length):
    found, calls = [], []
    plain = sdpa_in_float32
    monkeypatch.setattr(
        "yan_hf.layers.sdpa_in_float32", lambda *args, **kwargs: calls.append(1) or plain(*args, **kwargs)
    )
    for is_half in (True, False):
        layer = small_model().model.encoder.layers[0].self_attn
        torch.manual_seed(0)
        states = torch.randn(2, length, 32)
        mask = torch.ones(2, 1, length, length, dtype=torch.bool).tril(2)
        if is_half and not autocast:
            layer, states = layer.bfloat16(), states.bfloat16()
        states.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half and autocast):
            output, _ = layer(states, mask)
        assert not is_half or output.dtype == torch.bfloat16
        output.float().square().sum().backward()
        found.append((output.float(), states.grad.float(), layer.k_proj.weight.grad.float()))
    for half, expected in zip(*found):
        assert (half - expected).abs().max() < 0.05 * expected.abs().max()
    assert len(calls) == (1 if length < 257 else 0)
    with torch.no_grad():
        layer.bfloat16()(states.bfloat16(), mask)
    assert len(calls) == (1 if length < 257 else 0)


def test_time_embedding():
    model = double_model().model
    times = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    half = 16
    expected = []
    for t in times.tolist():
        frequencies = [math.exp(-i * math.log(10_000) / (half - 1)) for i in range(half)]
        angles = [math.sin(t * f) for f in frequencies] + [math.cos(t * f) for f in frequencies]
        expected.append(gelu(linear(model.flow.time_embedding.proj, torch.tensor(angles, dtype=torch.float64))))
    torch.testing.assert_close(model.flow.time_embedding(times, torch.float64), torch.stack(expected))


def test_flow_trunk_gate_and_experts():
    """Adaptive norms are scale times norm plus shift; chunks of self-attention, feed-forward, cross-attention."""
    model = double_model(attention_bias=True, gate_temperature=0.7).model
    source, state = torch.randn(2, 5, 32, dtype=torch.float64), torch.randn(2, 3, 32, dtype=torch.float64)
    times = torch.tensor([0.2, 0.9], dtype=torch.float64)
    flow = model.flow
    embedding = flow.time_embedding(times, torch.float64)

    x = state + model.embed_positions.weight[:3]
    for index, layer in enumerate(flow.layers):
        chunks = linear(layer.adaptive_norm, gelu(embedding))[:, None].split(32, dim=-1)
        normed = chunks[0] * plain_norm(x) + chunks[1]
        x = x + attention(layer.self_attn, normed, normed)
        if index in (0, 2):
            x = x + attention(layer.cross_attn, chunks[4] * plain_norm(x) + chunks[5], source)
        else:
            assert len(chunks) == 4
        x = x + feed_forward(layer.feed_forward, chunks[2] * plain_norm(x) + chunks[3])
    x = norm(flow.norm, x)
    features = torch.cat([x, source.mean(1, keepdim=True).expand_as(x), embedding[:, None].expand_as(x)], -1)
    gate = linear(flow.gate.down_proj, gelu(linear(flow.gate.up_proj, features))) / 0.7
    fields = []
    for k in range(4):
        inner = gelu(x @ flow.experts.up_proj[k].T + flow.experts.up_proj_bias[k])
        fields.append(inner @ flow.experts.down_proj[k].T + flow.experts.down_proj_bias[k])

    output = flow(state, times, model.prepare_context(source, None, torch.ones(2, 3)))
    torch.testing.assert_close(output.last_hidden_state, x)
    torch.testing.assert_close(output.gate_logits, gate)
    torch.testing.assert_close(output.expert_fields, torch.stack(fields, 2))
    mean = (softmax(gate, -1)[..., None] * torch.stack(fields, 2)).sum(2)
    torch.testing.assert_close(output.velocity, mean)


def test_decoder_and_head():
    model = double_model(decoder_layers=2)
    x = latents = torch.randn(2, 3, 32, dtype=torch.float64)
    for layer in model.model.decoder.layers:
        x = x + feed_forward(layer.feed_forward, norm(layer.norm, x))
    torch.testing.assert_close(model.decode(latents), x @ model.lm_head.weight.T + model.lm_head.bias)


def test_forward_decodes_the_estimated_end_point():
    """`z_t + (1 - t) Σ_k π_k u_k`."""
    model = double_model()
    state, times = torch.randn(2, 3, 32, dtype=torch.float64), torch.tensor([0.25, 0.75], dtype=torch.float64)
    output = model(torch.tensor([[5, 6], [7, 8]]), latents=state, timesteps=times)
    end_point = state + torch.tensor([0.75, 0.25])[:, None, None] * output.velocity
    torch.testing.assert_close(output.logits, model.decode(end_point))
