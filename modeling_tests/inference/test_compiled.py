# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The compiled fast path: the same results, a bounded number of programs, nothing that breaks a graph."""

import copy
import dataclasses
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from testing_utils import SHALLOW, DraftCounter, batch_of_rows, small_config, small_model
from torch._dynamo.utils import counters
from transformers.generation import CompileConfig

from yan_hf import YanForConditionalGeneration, YanInt8Config
from yan_hf.experts import choose_experts
from yan_hf.inference import compiled, cpu_kernels, int8
from yan_hf.inference.compiled import length_buckets
from yan_hf.sampling import solve_flow
from yan_hf.solver import time_grid


# Traced by dynamo into whole graphs and run without code generation: all that can go wrong but the code itself.
TRACED = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
# Where the number of steps does not matter: each is traced.
FAST = {"compile": True, "compile_config": TRACED, "num_inference_steps": 1}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def generate(model, ids, mask, **options):
    return model.generate(
        ids, mask, return_dict_in_generate=True, output_expert_indices=True, output_trajectory=True, **options
    )


def assert_same(result, expected):
    assert torch.equal(result.sequences, expected.sequences) and torch.equal(result.lengths, expected.lengths)
    assert result.num_field_evaluations == expected.num_field_evaluations
    for row, length in enumerate(expected.lengths.tolist()):
        assert torch.equal(result.expert_indices[row, :length], expected.expert_indices[row, :length])
    for name in ("latents", "trajectory"):
        torch.testing.assert_close(getattr(result, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.sequence_scores, expected.sequence_scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("side", "options"),
    [
        ("left", {}),
        pytest.param("right", {"target_lengths": [3, 24, 9]}, marks=pytest.mark.slow),
        pytest.param(
            "left",
            {"solver": "heun", "num_candidates": 2, "num_length_candidates": 2, "num_inference_steps": 2},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "right", {"do_sample": True, "temperature": 0.8, "expert_selection": "greedy"}, marks=pytest.mark.slow
        ),
    ],
)
def test_results_are_those_of_the_plain_path(side, options):
    model = small_model(**SHALLOW)
    _, ids, mask = batch_of_rows([4, 17, 6], side)
    expected = generate(model, ids, mask, seeds=[1, 2, 3], **options)
    assert_same(generate(model, ids, mask, seeds=[1, 2, 3], compile=True, compile_config=TRACED, **options), expected)
    assert counters["graph_break"] == {}


@pytest.fixture
def small_operators(monkeypatch):
    """Small products are operators of a program, too."""
    monkeypatch.setattr(cpu_kernels, "_SMALLEST_PRODUCT", 0)
    monkeypatch.setattr(cpu_kernels, "_SMALLEST_COMPILED", 0)
    monkeypatch.setattr(int8, "_SMALLEST_PACKED", 0)


def calls_of(run):
    """How often each of this package's operators is called."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        run()
    events = recorded.key_averages()
    return {event.key.removeprefix("yan_hf::"): event.count for event in events if event.key.startswith("yan_hf::")}


needs_onednn = pytest.mark.skipif(not cpu_kernels.is_available(), reason="needs oneDNN on x86")


@needs_onednn
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.slow
def test_large_products_are_operators(small_operators, implementation):
    model = small_model(**SHALLOW)
    model.set_experts_implementation(implementation)
    _, ids, mask = batch_of_rows([4, 17], "left")
    options = {"target_lengths": [3, 8], "seeds": [1, 2]}
    expected = generate(model, ids, mask, **options)
    run = {**options, "compile": True, "compile_config": TRACED}
    assert_same(generate(model, ids, mask, **run), expected)
    calls = calls_of(lambda: generate(model, ids, mask, **run))
    assert calls["experts"] == 3 and calls["linear"] > 20 and counters["graph_break"] == {}
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.flow.experts.down_proj.mul_(-2)
    changed = generate(twin, ids, mask, **run)
    assert_same(changed, generate(twin, ids, mask, **options))
    assert not torch.equal(changed.latents, expected.latents)
    assert_same(generate(model, ids, mask, **run), expected)


@needs_onednn
@pytest.mark.slow
def test_adapters_of_the_experts_count(small_operators):
    config = LoraConfig(target_modules=["q_proj"], target_parameters=["experts.up_proj"], lora_dropout=0)
    model = get_peft_model(small_model(**SHALLOW), config).eval()
    _, ids, mask = batch_of_rows([4, 6])
    plain = {"input_ids": ids, "attention_mask": mask, "target_lengths": 6, "seeds": [0, 1]}
    before = model.generate(**plain, return_dict_in_generate=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    expected = model.generate(**plain, return_dict_in_generate=True)
    # PEFT's way of changing a parameter for a forward breaks the graph.
    broken = CompileConfig(fullgraph=False, backend="aot_eager", mode=None)
    found = model.generate(**plain, return_dict_in_generate=True, compile=True, compile_config=broken)
    torch.testing.assert_close(found.latents, expected.latents, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before.latents, expected.latents, atol=1e-3)


@needs_onednn
@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "plain"])
@pytest.mark.slow
def test_int8_is_compiled_too(small_operators, monkeypatch, tmp_path, is_packed):
    if not is_packed:
        monkeypatch.setattr(int8, "_SMALLEST_PACKED", 2**40)
    small_model(hidden_size=64, initializer_range=0.05, **SHALLOW).save_pretrained(tmp_path)
    model = YanForConditionalGeneration.from_pretrained(tmp_path, quantization_config=YanInt8Config())
    _, ids, mask = batch_of_rows([4, 17], "left")
    options = {"target_lengths": [3, 8], "seeds": [1, 2]}
    run = {**options, "compile": True, "compile_config": TRACED}
    expected = generate(model, ids, mask, **options)
    assert_same(generate(model, ids, mask, **run), expected)
    calls = calls_of(lambda: generate(model, ids, mask, **run))
    assert calls["experts"] == 3 and (calls.get("int8_product", 0) > 20) == (is_packed and int8.has_vnni())
    assert counters["graph_break"] == {}


def into_memory(value, memory, place):
    """A program's result in the memory of its earlier ones, as a CUDA graph gives it."""
    if isinstance(value, torch.Tensor):
        return memory.setdefault(place, torch.empty_like(value)).copy_(value)
    if dataclasses.is_dataclass(value):
        fields = {name: into_memory(part, memory, (*place, name)) for name, part in vars(value).items()}
        return dataclasses.replace(value, **fields)
    if isinstance(value, tuple):
        return type(value)(*(into_memory(part, memory, (*place, index)) for index, part in enumerate(value)))
    return value


@pytest.mark.parametrize("options", [{}, {"target_lengths": 6}, {"num_candidates": 2}], ids=str)
def test_what_a_call_returns_outlives_the_next_replay(monkeypatch, options):
    memory = {}

    def recorded(function, *_):
        return lambda *arguments: into_memory(function(*arguments), memory, (function.__name__,))

    monkeypatch.setattr(compiled, "_compiled", recorded)
    model = small_model(**SHALLOW)
    _, ids, mask = batch_of_rows([16, 16])
    asked = {"routing": "block", "output_routing": True, "compile": True, **options}
    first = generate(model, ids, mask, seeds=[1, 2], **asked)
    before = copy.deepcopy(first)
    second = generate(model, ids, mask, seeds=[3, 4], **asked)
    assert memory and not torch.equal(second.latents, first.latents)
    for name, value in before.items():
        assert not isinstance(value, torch.Tensor) or torch.equal(first[name], value), name


@pytest.mark.slow
def test_mamba_is_compiled_too():
    model = small_model(encoder_backbone="mamba", flow_backbone="mamba", **SHALLOW)
    _, ids, mask = batch_of_rows([4, 17, 6], "left")
    expected = generate(model, ids, mask, seeds=[1, 2, 3])
    assert_same(generate(model, ids, mask, seeds=[1, 2, 3], compile=True, compile_config=TRACED), expected)


@pytest.mark.slow
def test_programs_are_bounded_by_buckets():
    """Many lengths and batch sizes, few programs: a recompilation would show as another graph."""
    model = small_model(**SHALLOW)
    for batch_size in (3, 4):
        for source_length, target_length in ((2, 3), (9, 16), (16, 7), (5, 13)):
            _, ids, mask = batch_of_rows([source_length] * batch_size)
            model.generate(ids, mask, target_lengths=target_length, **FAST)
    assert len(model.compiled_programs) == 1
    assert counters["stats"]["unique_graphs"] == 1
    _, ids, mask = batch_of_rows([17])
    model.generate(ids, mask, target_lengths=3, **FAST)
    assert len(model.compiled_programs) == 2 and counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
def test_a_part_of_what_the_caller_gives_is_no_other_program():
    """Wider latents are cut to a view, whose strides a compiler would take for other inputs."""
    model = small_model(**SHALLOW)
    _, ids, mask = batch_of_rows([4, 6])
    for width in (24, 16, 20):
        latents = torch.zeros(2, width, model.config.hidden_size)
        model.generate(ids, mask, target_lengths=16, initial_latents=latents, **FAST)
    assert len(model.compiled_programs) == counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_more_programs_than_allowed_run_plain(monkeypatch, caplog):
    monkeypatch.setattr(compiled, "MAX_PROGRAMS", 1)
    logging.getLogger("yan_hf").propagate = logging.getLogger("transformers").propagate = True
    compiled.logger.warning_once.cache_clear() if hasattr(compiled.logger.warning_once, "cache_clear") else None
    model = small_model(**SHALLOW)
    results = []
    for length in (5, 20):
        _, ids, mask = batch_of_rows([4, 6])
        options = {"target_lengths": length, "seeds": [0, 1], "num_inference_steps": 1}
        expected = model.generate(ids, mask, **options)
        results.append(torch.equal(model.generate(ids, mask, **{**options, **FAST}), expected))
    assert results == [True, True] and len(model.compiled_programs) == 1
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_a_compiled_model_can_be_copied_trained_and_compiled_again():
    model = small_model(**SHALLOW)
    _, ids, mask = batch_of_rows([4, 6])
    arguments = {"target_lengths": 6, "seeds": [0, 1], "num_inference_steps": 1}
    fast = {**arguments, **FAST}
    before = model.generate(ids, mask, **fast)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.7)
    changed = model.generate(ids, mask, **fast)
    assert torch.equal(changed, model.generate(ids, mask, **arguments)) and not torch.equal(changed, before)
    assert torch.equal(twin.generate(ids, mask, **fast), before)


def test_buckets_waste_less_than_a_third():
    buckets = length_buckets(1024)
    assert buckets[:6] == [16, 24, 32, 48, 64, 96] and buckets[-1] == 1024 and buckets == sorted(set(buckets))
    for length in range(17, 1025):
        bucket = next(bucket for bucket in buckets if bucket >= length)
        assert (bucket - length) / bucket < 1 / 3
    assert length_buckets(24) == [16, 24] and length_buckets(10) == [10] and length_buckets(100)[-1] == 100


def test_a_model_spread_over_devices_is_refused():
    model = small_model(**SHALLOW)
    model.hf_device_map = {"model": 0, "lm_head": "cpu"}
    with pytest.raises(ValueError, match="one device"):
        model.generate(torch.tensor([[5, 6]]), compile=True)


def test_drafts_are_shown_all_the_same():
    recorder = DraftCounter()
    small_model(**SHALLOW).generate(torch.tensor([[5, 6]]), compile=True, compile_config=TRACED, streamer=recorder)
    assert recorder.drafts == 3


@pytest.mark.slow
def test_inductor_gives_the_same_results():
    model = small_model(**SHALLOW)
    _, ids, mask = batch_of_rows([4, 17], "left")
    options = {"target_lengths": [3, 8], "seeds": [1, 2]}
    assert_same(generate(model, ids, mask, compile=True, **options), generate(model, ids, mask, **options))


# On the meta device: `test_only_lengths_are_read` in `test_generate_on_meta.py`.
@pytest.mark.gpu
def test_the_loop_does_not_wait_for_the_device():
    model = small_model().cuda()
    times = time_grid(3)
    with torch.no_grad():
        source = model.model.encode(torch.randint(5, 60, (2, 7), device="cuda")).last_hidden_state
        context = model.model.prepare_context(source, None, torch.ones(2, 9, device="cuda"))
        context.modulations = model.model.flow.embed_times(times, source.device)
        state = torch.randn(2, 9, 32, device="cuda")
        uniform = torch.rand(2, 9, 4, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            solve_flow(
                model.model.flow, state, context, times, lambda log_probs, _: choose_experts(log_probs, uniform)
            )
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mask_given", [True, False])
@pytest.mark.slow
def test_embeddings_and_missing_masks_are_compiled_too(mask_given):
    model = small_model(**SHALLOW)
    ids = torch.randint(5, 60, (2, 7))
    mask = torch.ones_like(ids) if mask_given else None
    embeddings = model.get_input_embeddings()(ids).detach()
    model.generation_config.num_inference_steps = 1
    expected = model.generate(ids, mask, seeds=[0, 1])
    fast = {"seeds": [0, 1], **FAST}
    assert torch.equal(model.generate(ids, mask, **fast), expected)
    assert torch.equal(model.generate(None, mask, inputs_embeds=embeddings, **fast), expected)
    model.generation_config.compile = True
    model.generation_config.compile_config = TRACED
    assert torch.equal(model.generate(ids, mask, seeds=[0, 1]), expected)


# On the meta device: `test_the_compiled_path_is_one_graph` in `test_generate_on_meta.py`; nothing is recorded there.
@pytest.mark.gpu
def test_cuda_graphs_give_the_same_results_without_waiting_in_the_loop():
    model = small_model().cuda()
    _, ids, mask = batch_of_rows([4, 17, 6])
    ids, mask = ids.cuda(), mask.cuda()
    for options in ({}, {"target_lengths": [3, 24, 9]}):
        expected = generate(model, ids, mask, seeds=[1, 2, 3], **options)
        for _ in range(3):  # the third call replays
            assert_same(generate(model, ids, mask, seeds=[1, 2, 3], compile=True, **options), expected)


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a PyTorch that is built for CUDA; no GPU")
@pytest.mark.parametrize("fields", [{}, {"encoder_backbone": "mamba", "flow_backbone": "mamba"}], ids=str)
@pytest.mark.slow
def test_code_for_cuda_is_generated_without_a_gpu(fields):
    """Down to the kernels' binaries for sm_90, of both halves and of the whole."""
    from cuda_code import generate_code

    programs = generate_code(small_config(**SHALLOW, **fields))
    assert len(programs) == 3 and all(program["binaries"] >= program["kernels"] > 5 for program in programs)
    assert not torch.cuda.is_initialized()
