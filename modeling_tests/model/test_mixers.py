# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The Mamba mixers and models with a Mamba backbone in encoder, flow or both."""

import math
from functools import cache
from inspect import signature
from itertools import pairwise
from types import MethodType, SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from testing_utils import batch_of_rows, small_config, small_model
from torch import nn
from torch.nn.functional import conv1d, silu, softplus
from transformers.utils import is_kernels_available

from yan_hf import YanConfig, YanForAutoEncoding, YanForConditionalGeneration
from yan_hf import selective_scan as scan_module
from yan_hf.mixers import (
    YanBidirectionalMamba,
    YanCausalConvFunction,
    YanMambaMixer,
    YanSelectiveScan,
    scan_orders,
)


SIDES = ["left", "right"]
BOTH = {"encoder_backbone": "mamba", "flow_backbone": "mamba"}
BACKBONES = [
    {"encoder_backbone": encoder, "flow_backbone": flow}
    for encoder in ("transformer", "mamba")
    for flow in ("transformer", "mamba")
]


def make_mixer(seed=0, cls=YanBidirectionalMamba, **changes):
    """A mixer with random parameters, large enough that its state matters."""
    torch.manual_seed(seed)
    mixer = cls(small_config(**changes))
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.dim() < 2 else 0.3))
            if name.endswith("A_log"):
                parameter.uniform_(-1, 2)
    return mixer


def mixer_by_formula(mixer, x):
    """One direction on one row `(L, d)`, position by position."""
    rank, size = mixer.step_rank, mixer.state_size
    states, gate = (x @ mixer.in_proj.weight.T).chunk(2, dim=-1)
    kernel = mixer.conv1d.weight.shape[-1]
    padded = torch.cat([states.new_zeros(kernel - 1, states.shape[1]), states])
    states = silu(conv1d(padded.T[None], mixer.conv1d.weight, mixer.conv1d.bias, groups=states.shape[1])[0].T)
    state, outputs = 0.0, []
    for t in range(len(x)):
        step, b, c = (states[t] @ mixer.x_proj.weight.T).split([rank, size, size])
        step = softplus(step @ mixer.dt_proj.weight.T + mixer.dt_proj.bias)[:, None]
        state = torch.exp(-step * mixer.A_log.exp()) * state + step * b * states[t][:, None]
        outputs.append((state @ c + mixer.D * states[t]) * silu(gate[t]))
    return torch.stack(outputs) @ mixer.out_proj.weight.T


# The mixer


def test_parameters_have_the_layout_of_mamba_ssm():
    mixer = YanMambaMixer(YanConfig(hidden_size=40, num_attention_heads=4, mamba_state_size=5, mamba_expand=3))
    assert {name: tuple(value.shape) for name, value in mixer.state_dict().items()} == {
        "A_log": (120, 5),
        "D": (120,),
        "in_proj.weight": (240, 40),
        "conv1d.weight": (120, 1, 4),
        "conv1d.bias": (120,),
        "x_proj.weight": (3 + 2 * 5, 120),  # the rank is 40 / 16, rounded up
        "dt_proj.weight": (120, 3),
        "dt_proj.bias": (120,),
        "out_proj.weight": (40, 120),
    }
    assert mixer.A_log._no_weight_decay and mixer.D._no_weight_decay
    both = YanBidirectionalMamba(small_config())
    assert both.proj.weight.shape == (32, 64) and both.proj.bias is not None


@torch.no_grad()
def test_mixer_is_the_formula():
    mixer = make_mixer(cls=YanMambaMixer).double()
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), torch.stack([mixer_by_formula(mixer, row) for row in x]))


@torch.no_grad()
def test_bidirectional_mixer_is_the_formula():
    mixer = make_mixer().double()
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    expected = []
    for row in x:
        backward = mixer_by_formula(mixer.bwd, row.flip(0)).flip(0)
        expected.append(torch.cat([mixer_by_formula(mixer.fwd, row), backward], -1))
    expected = torch.stack(expected) @ mixer.proj.weight.T + mixer.proj.bias
    torch.testing.assert_close(mixer(x), expected)


def test_equals_the_mamba_of_transformers():
    """The same weights in the library's `MambaMixer`, on its path without kernels."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    mixer = make_mixer(cls=YanMambaMixer)
    other = MambaMixer(MambaConfig(hidden_size=32, state_size=16, expand=2, conv_kernel=4, num_hidden_layers=1), 0)
    other.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 11, 32)
    torch.testing.assert_close(mixer(x), other.eval()(x), rtol=1e-5, atol=1e-5)


def test_equals_the_mamba_of_mamba_ssm():
    mamba_ssm = pytest.importorskip("mamba_ssm")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    mixer = make_mixer(cls=YanMambaMixer).cuda()
    other = mamba_ssm.Mamba(d_model=32, use_fast_path=False).cuda()
    other.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 11, 32).cuda()
    torch.testing.assert_close(mixer(x), other(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_each_direction_has_its_own_view():
    """The forward half sees the past only, the backward half the future only."""
    mixer = make_mixer()
    x = torch.randn(1, 9, 32)
    changed = x.clone()
    changed[:, 4] += 1.0
    for half, untouched in ((slice(0, 32), slice(0, 4)), (slice(32, 64), slice(5, 9))):
        only = make_mixer()
        only.proj.weight.zero_()
        only.proj.weight[:, half] = mixer.proj.weight[:, half]
        same = (only(x) == only(changed))[0].all(-1)
        assert same.nonzero().flatten().tolist() == list(range(9))[untouched]


# Padding


def test_scan_orders():
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    forward, backward = scan_orders(mask)
    assert forward.tolist() == [[3, 0, 1, 4, 2], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert backward.tolist() == [[3, 2, 1, 4, 0], [1, 0, 2, 3, 4], [0, 1, 2, 3, 4], [4, 3, 2, 1, 0]]


@pytest.mark.parametrize("filler", [7.0, float("nan")])
@pytest.mark.parametrize(
    "mask",
    [[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
    ids=["right", "left", "between", "one", "none"],
)
def test_padding_never_enters_the_mixer(mask, filler):
    """A row equals its real tokens alone, values and gradients, whatever stands in the padding."""
    mixer = make_mixer()
    mask = torch.tensor([mask, [1] * 6])
    real = mask.bool()
    x = torch.randn(2, 6, 32).masked_fill(~real[..., None], filler).requires_grad_()
    weights = torch.randn(2, 6, 32)
    output = mixer(x, mask)
    (output[real] * weights[real]).sum().backward()
    gradient = {name: parameter.grad.clone() for name, parameter in mixer.named_parameters()}
    mixer.zero_grad()
    for row in range(2):
        if not real[row].any():
            continue
        single = x.detach()[row, real[row]][None].requires_grad_()
        expected = mixer(single)
        torch.testing.assert_close(output[row, real[row]], expected[0], rtol=1e-5, atol=1e-5)
        (expected[0] * weights[row, real[row]]).sum().backward()
        torch.testing.assert_close(x.grad[row, real[row]], single.grad[0], rtol=1e-5, atol=1e-5)
    assert (x.grad[~real] == 0).all()
    for name, parameter in mixer.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_research_padding_scans_the_padded_row():
    exact, research = make_mixer(), make_mixer(mamba_padding="research")
    x = torch.randn(2, 6, 32)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    plain = torch.cat([research.fwd(x), research.bwd(x.flip(1)).flip(1)], dim=-1)
    assert torch.equal(research(x, mask), research.proj(plain))
    torch.testing.assert_close(research(x, mask)[1], exact(x, mask)[1], rtol=1e-5, atol=1e-5)
    assert (research(x, mask)[0, :3] - exact(x, mask)[0, :3]).abs().max() > 1e-3


@pytest.mark.parametrize("padding", ["exact", "research"])
@torch.no_grad()
def test_padding_is_zeroed_after_each_sub_layer(padding):
    model = small_model(mamba_padding=padding, **BOTH).model
    _, ids, mask = batch_of_rows([3, 6], "left")
    seen = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        for layer in model.encoder.layers
        for module in (layer.feed_forward_norm, layer.mixer_norm)
    ]
    hooks.append(model.encoder.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0])))
    model.encode(ids, mask)
    assert len(seen) == 5
    for states in seen[1:]:  # the first is the embedded input
        assert (states[mask == 0] == 0).all() and (states[mask == 1] != 0).all()
    for hook in hooks:
        hook.remove()
    context = model.prepare_context(torch.randn(2, 4, 32), None, mask)
    assert context.self_attention_mask is None  # it would be quadratic in the length
    outputs = []
    hook = model.flow.layers[-1].register_forward_hook(lambda module, args, output: outputs.append(output))
    model.flow(torch.randn(2, 6, 32), torch.zeros(2), context)
    hook.remove()
    assert (outputs[0][mask == 0] == 0).all()


@torch.no_grad()
def test_research_models_equal_exact_ones_on_rows_without_padding():
    exact = small_model(**BOTH)
    research = small_model(mamba_padding="research", **BOTH)
    _, ids, mask = batch_of_rows([6, 6])
    state = torch.randn(2, 5, 32)
    expected = exact(ids, mask, latents=state).logits
    torch.testing.assert_close(research(ids, mask, latents=state).logits, expected, rtol=1e-5, atol=1e-5)
    _, ids, mask = batch_of_rows([3, 6])
    difference = research(ids, mask, latents=state).logits - exact(ids, mask, latents=state).logits
    assert difference[0].abs().max() > 1e-3


@pytest.mark.parametrize("backbones", BACKBONES, ids=lambda value: "-".join(value.values()))
@pytest.mark.parametrize("side", SIDES)
@torch.no_grad()
def test_batched_equals_single(backbones, side):
    model = small_model(**backbones)
    rows, ids, mask = batch_of_rows([3, 9, 6], side, extra=2)
    times = torch.tensor([0.0, 0.4, 0.9])
    canvas = (torch.arange(7) < torch.tensor([[7], [2], [5]])).long()
    if side == "left":
        canvas = canvas.flip(1)
    state = torch.randn(3, 7, 32)
    batched = model(ids, mask, latents=state, timesteps=times, decoder_attention_mask=canvas)
    for i, row in enumerate(rows):
        real = canvas[i].bool()
        single = model(row[None], latents=state[i : i + 1, real], timesteps=times[i : i + 1])
        for name in ("logits", "velocity", "expert_fields", "gate_logits"):
            torch.testing.assert_close(batched[name][i, real], single[name][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            batched.encoder_last_hidden_state[i, mask[i].bool()],
            single.encoder_last_hidden_state[0],
            rtol=1e-5,
            atol=1e-5,
        )
    lengths = torch.tensor([7, 3, 5])
    options = {"return_dict_in_generate": True, "output_scores": True}
    generated = model.generate(ids, attention_mask=mask, target_lengths=lengths, seeds=[3, 4, 5], **options)
    for i, row in enumerate(rows):
        single = model.generate(row[None], target_lengths=lengths[i : i + 1], seeds=[3 + i], **options)
        length = single.sequences.shape[1]
        assert torch.equal(generated.sequences[i, :length], single.sequences[0])
        torch.testing.assert_close(generated.latents[i, :length], single.latents[0], rtol=1e-5, atol=1e-5)


def test_gradients_are_finite_with_a_fully_padded_target():
    model = small_model(**BOTH).train()
    _, ids, mask = batch_of_rows([5, 4])
    labels = torch.randint(5, 60, (2, 4))
    labels[1] = -100
    model(ids, mask, labels=labels).loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


# Initialisation, saving


def check_initial_weights(model):
    mixers = [module for module in model.modules() if isinstance(module, YanMambaMixer)]
    assert len(mixers) == 2 * (2 + (3 if model.config.flow_backbone == "mamba" else 0))
    for mixer in mixers:
        torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17.0).expand(64, -1))
        assert (mixer.D == 1).all()
        bound = mixer.step_rank**-0.5
        assert mixer.dt_proj.weight.abs().max() <= bound
        assert float(mixer.dt_proj.weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.25)
        steps = softplus(mixer.dt_proj.bias)
        assert steps.min() >= 1e-3 * 0.999 and steps.max() <= 1e-1 * 1.001
        assert float(steps.log10().mean()) == pytest.approx(-2, abs=0.3)
        assert float(steps.log10().std()) == pytest.approx(2 / 12**0.5, rel=0.3)
        assert mixer.conv1d.weight.abs().max() <= 0.5 and float(mixer.conv1d.weight.std()) > 0.2
        assert mixer.conv1d.bias.abs().max() <= 0.5 and float(mixer.conv1d.bias.std()) > 0.2
        for linear in (mixer.in_proj, mixer.out_proj):
            assert float(linear.weight.std()) == pytest.approx(model.config.initializer_range, rel=0.1)
    biases = [mixer.dt_proj.bias for mixer in mixers]
    assert all(not torch.equal(one, other) for one, other in pairwise(biases))


def test_model_from_a_config_is_initialised():
    torch.manual_seed(0)
    check_initial_weights(YanForConditionalGeneration(small_config(**BOTH)))


def test_missing_keys_are_initialised_on_load(tmp_path):
    torch.manual_seed(0)
    source = YanForAutoEncoding(small_config(**BOTH))
    source.save_pretrained(tmp_path)
    model = YanForConditionalGeneration.from_pretrained(tmp_path)
    check_initial_weights(model)
    mixer = model.model.encoder.layers[0].mixer.fwd
    assert torch.equal(mixer.dt_proj.bias, source.model.encoder.layers[0].mixer.fwd.dt_proj.bias)
    assert mixer.A_log._no_weight_decay and mixer.D._no_weight_decay


@torch.no_grad()
def test_saved_models_load_to_the_same_results(tmp_path):
    model = small_model(mamba_state_size=8, mamba_conv_kernel=3, mamba_expand=1, mamba_ff_multiplier=2, **BOTH)
    assert model.model.flow.layers[0].feed_forward.up_proj.out_features == 64
    model.save_pretrained(tmp_path)
    loaded = YanForConditionalGeneration.from_pretrained(tmp_path)
    _, ids, mask = batch_of_rows([3, 6])
    options = {"target_lengths": 5, "seeds": [1, 2], "return_dict_in_generate": True}
    expected, result = (one.generate(ids, attention_mask=mask, **options) for one in (model, loaded))
    # Loaded weights are views of the mapped file: at another offset, matrix kernels may round otherwise.
    torch.testing.assert_close(result.latents, expected.latents, rtol=1e-5, atol=1e-5)
    assert torch.equal(expected.sequences, result.sequences)
    half = YanForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    mixer = half.model.encoder.layers[0].mixer.fwd
    assert mixer.A_log.dtype == mixer.D.dtype == torch.float32 and mixer.in_proj.weight.dtype == torch.bfloat16
    half.generate(ids, attention_mask=mask, target_lengths=5)


def test_vocabulary_can_be_resized():
    model = small_model(**BOTH)
    model.resize_token_embeddings(71)
    _, ids, mask = batch_of_rows([3, 6], vocab_size=71)
    assert model(ids, mask).logits.shape[-1] == 71


# Training


def loss_and_gradients(model, autocast=False):
    _, ids, mask = batch_of_rows([5, 8], "left")
    labels = torch.randint(5, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    labels[0, 4:] = -100
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(ids, mask, labels=labels, generator=torch.Generator().manual_seed(1)).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_every_parameter_of_the_mixers_gets_a_gradient():
    _, gradients = loss_and_gradients(small_model(**BOTH).train())
    mixers = {name: gradient for name, gradient in gradients.items() if ".mixer." in name}
    assert len(mixers) == 5 * (2 * 9 + 2)
    assert all(gradient.abs().max() > 0 for gradient in mixers.values())


@pytest.mark.parametrize("implementation", ["auto", "torch"])
def test_adapters_on_the_mixers_linear_layers_train(implementation):
    """Wrapped layers are what is computed with: their adapters get gradients, and change the output."""
    targets = ["in_proj", "x_proj", "dt_proj", "out_proj"]
    model = small_model(mamba_implementation=implementation, **BOTH)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).train()
    _, gradients = loss_and_gradients(adapted)
    assert len(gradients) == 2 * 4 * 2 * 5  # two matrices, four layers, two directions, five blocks
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
    mixer = adapted.base_model.model.model.encoder.layers[0].mixer.fwd
    x = torch.randn(1, 5, 32)
    before = mixer(x)
    for target in targets:
        layer = getattr(mixer, target)
        scaling = dict(layer.scaling)
        layer.set_scale("default", 0.0)
        assert (mixer(x) - before).abs().max() > 1e-6, target
        layer.scaling.update(scaling)
    torch.testing.assert_close(mixer(x), before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    loss, gradients = loss_and_gradients(small_model(**BOTH).train())
    model = small_model(**BOTH).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    other_loss, others = loss_and_gradients(model)
    torch.testing.assert_close(other_loss, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast):
    expected, _ = loss_and_gradients(small_model(**BOTH).train())
    model = small_model(**BOTH).train()
    loss, gradients = loss_and_gradients(model if autocast else model.to(torch.bfloat16), autocast)
    assert float(loss) == pytest.approx(float(expected), rel=0.05)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


# torch.compile, generation


@pytest.mark.parametrize("padding", ["exact", "research"])
@torch.no_grad()
@pytest.mark.slow
def test_compiles_to_one_graph(padding):
    model = small_model(mamba_padding=padding, encoder_layers=1, flow_layers=1, cross_attention_layers=None, **BOTH)
    _, ids, mask = batch_of_rows([3, 9], "left")
    compiled = torch.compile(model.model.encode, fullgraph=True, backend="aot_eager")
    expected = model.model.encode(ids, mask).last_hidden_state
    torch.testing.assert_close(compiled(ids, mask).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    context = model.model.prepare_context(expected, mask, torch.ones(2, 5, dtype=torch.long))
    compiled = torch.compile(model.model.flow, fullgraph=True, backend="aot_eager")
    state, times = torch.randn(2, 5, 32), torch.tensor([0.1, 0.7])
    experts = torch.zeros(2, 5, dtype=torch.long)
    model.set_experts_implementation("batched_mm")
    result = compiled(state, times, context, expert_indices=experts).velocity
    expected = model.model.flow(state, times, context, expert_indices=experts).velocity
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiled_training_step_has_the_same_gradients():
    mixer, mask = make_mixer(), torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]])
    x = torch.randn(2, 5, 32)
    gradients = []
    for function in (mixer, torch.compile(mixer, fullgraph=True, backend="aot_eager")):
        mixer.zero_grad()
        function(x, mask).square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in mixer.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_generation_gives_the_same_tokens():
    model = small_model(encoder_layers=1, flow_layers=1, cross_attention_layers=None, **BOTH)
    model.set_experts_implementation("batched_mm")
    _, ids, mask = batch_of_rows([3, 6])
    options = {"target_lengths": 5, "seeds": [1, 2]}
    expected = model.generate(ids, attention_mask=mask, **options)
    settings = {"backend": "aot_eager", "mode": None, "fullgraph": True}
    result = model.generate(ids, attention_mask=mask, compile=True, compile_config=settings, **options)
    assert torch.equal(result, expected)


# Kernels of the Hub


class ScanKernel(nn.Module):
    """As `kernels-community/mamba-ssm` has `selective_scan_fn`."""

    def forward(
        self,
        hidden_states,
        dt,
        A,
        B,
        C,
        D=None,
        z=None,
        delta_bias=None,
        delta_softplus=False,
        return_last_state=False,
        use_mambapy=False,
        use_associative_scan=False,
        **kwargs,
    ):
        KERNEL_CALLS.append(("scan", *(values.dtype for values in (hidden_states, dt, A, B, C, D, z))))
        return scan_module.selective_scan_sequential(hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus)


class ConvKernel(nn.Module):
    """As it has `causal_conv1d_fn`."""

    def forward(self, hidden_states, weight, bias=None, activation=None, **kwargs):
        assert hidden_states.is_contiguous() and activation == "silu"
        KERNEL_CALLS.append(("conv", hidden_states.dtype, weight.dtype, bias.dtype))
        return scan_module.causal_conv(hidden_states, weight[:, None], bias)


KERNEL_CALLS = []
KERNELS = {YanSelectiveScan: ScanKernel, YanCausalConvFunction: ConvKernel}


def put_kernels(model):
    """Replaces the functions as `kernels.kernelize` does it."""
    for module in model.modules():
        if type(module) in KERNELS:
            module.forward = MethodType(KERNELS[type(module)].forward, module)
    KERNEL_CALLS.clear()
    return model


@torch.no_grad()
def test_kernels_of_the_hub_take_the_place_of_the_scan_and_the_convolution():
    plain, model = small_model(**BOTH), put_kernels(small_model(**BOTH))
    _, ids, mask = batch_of_rows([3, 6])
    options = {"attention_mask": mask, "target_lengths": 5, "seeds": [1, 2]}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
    assert {call[0] for call in KERNEL_CALLS} == {"scan", "conv"}
    KERNEL_CALLS.clear()
    model.to(torch.bfloat16).generate(ids, **options)
    bf16, f32 = torch.bfloat16, torch.float32
    assert set(KERNEL_CALLS) == {("scan", bf16, bf16, f32, bf16, bf16, f32, bf16), ("conv", bf16, bf16, bf16)}
    KERNEL_CALLS.clear()
    plain.generate(ids, **options)  # another model of the process keeps its own way
    model.double().generate(ids, **options)  # which the kernels do not know
    put_kernels(small_model(mamba_implementation="torch", **BOTH)).generate(ids, **options)
    assert not KERNEL_CALLS
    put_kernels(small_model(mamba_conv_kernel=5, **BOTH)).generate(ids, **options)  # wider than the kernels
    assert {call[0] for call in KERNEL_CALLS} == {"scan"}


def test_kernels_are_trained_through():
    _, ids, mask = batch_of_rows([3, 6])
    gradients = []
    for put in (put_kernels, lambda model: model):
        model = put(small_model(**BOTH)).train()
        torch.manual_seed(0)
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert KERNEL_CALLS
    for grad, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_a_compiled_model_keeps_kernels_out_of_its_graph():
    mixer = put_kernels(make_mixer())
    x = torch.randn(2, 5, mixer.proj.out_features)
    torch.testing.assert_close(torch.compile(mixer, backend="eager", fullgraph=True)(x), make_mixer()(x))
    assert not KERNEL_CALLS


@pytest.mark.skipif(not is_kernels_available(), reason="needs the version of `kernels` that Transformers asks for")
@torch.no_grad()
def test_use_kernels_finds_the_functions():
    import kernels

    for function, kernel in KERNELS.items():
        names = [list(signature(cls.forward).parameters.values()) for cls in (function, kernel)]
        assert [parameter.kind for parameter in names[0]] == [parameter.kind for parameter in names[1]]

    class Repository:
        def __init__(self, kernel):
            self.load = lambda: kernel

    mapping = {
        function.kernel_layer_name: {"cpu": {kernels.Mode.INFERENCE: Repository(kernel)}}
        for function, kernel in KERNELS.items()
    }
    assert set(mapping) == {"selective_scan_fn", "causal_conv1d_fn"}
    model = small_model(**BOTH)
    with kernels.use_kernel_mapping(mapping):
        kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu")
    KERNEL_CALLS.clear()
    _, ids, mask = batch_of_rows([3, 6])
    model.generate(ids, attention_mask=mask, seeds=[1, 2])
    assert {call[0] for call in KERNEL_CALLS} == {"scan", "conv"}


def test_the_way_of_the_scan_is_logged_once(monkeypatch):
    lines = []
    logger = SimpleNamespace(info_once=cache(lines.append))
    monkeypatch.setattr(scan_module, "logger", logger)
    mixer, x = make_mixer(), torch.randn(2, 5, 32)
    mixer(x), mixer(x)
    put_kernels(mixer)(x)
    assert len(lines) == 2 and "PyTorch's operations on cpu" in lines[0] and "use_kernels" in lines[1]


# Configuration


def test_demanding_cuda_without_the_packages_says_how_to_install_them(monkeypatch):
    monkeypatch.setattr(scan_module, "_cuda_kernels", lambda: None)
    config = small_config(mamba_implementation="cuda", **BOTH)
    with pytest.raises(ImportError, match=r"`mamba_implementation='cuda'` needs .*pip install yan-hf\[mamba\]"):
        YanForConditionalGeneration(config)
    YanForConditionalGeneration(small_config(mamba_implementation="cuda"))  # has no mixer that needs them


@pytest.mark.parametrize("field", ["mamba_implementation", "mamba_padding", "encoder_backbone", "flow_backbone"])
def test_unknown_choices_are_named(field):
    with pytest.raises(ValueError, match=f"`{field}` .*(must be one of|expected one of)"):
        YanConfig(**{field: "other"})


def test_backbones_have_the_layers_they_are_made_of():
    model = small_model(encoder_backbone="mamba").model
    layer, flow_layer = model.encoder.layers[0], model.flow.layers[0]
    assert isinstance(layer.mixer, nn.Module) and not hasattr(layer, "self_attn")
    assert hasattr(flow_layer, "self_attn") and not hasattr(flow_layer, "mixer")
    assert hasattr(small_model(flow_backbone="mamba").model.flow.layers[0], "cross_attn")
    assert math.ceil(32 / 16) == layer.mixer.fwd.dt_proj.in_features
