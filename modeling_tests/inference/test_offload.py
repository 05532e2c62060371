# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Expert offloading: exact results, a bound that holds, least recently used out, and what it refuses."""

import copy
import pickle
import sys
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from testing_utils import batch_of_rows, small_model
from transformers import dynamic_module_utils

from yan_hf import OffloadStats, YanForAutoEncoding, YanForConditionalGeneration, YanModel, export_with_code
from yan_hf.experts import YanExperts, experts_of_blocks


EXACT = [{"mode": "on_demand"}, {"mode": "speculative"}]
LENGTHS = [5, 12, 9]


def many_experts(**changes):
    return small_model(num_experts=16, **changes)


def watch_copies(offload) -> list[int]:
    """The experts that are copied from now on."""
    copied, original = [], offload.cache._copy_weights
    offload.cache._copy_weights = lambda expert, slot: copied.append(expert) or original(expert, slot)
    return copied


def watch_predictions(offload) -> list[list[int]]:
    """The experts of every prediction from now on."""
    predicted, original = [], offload.prefetch
    offload.prefetch = lambda experts: predicted.append(original(experts)) or predicted[-1]
    return predicted


def generate(model, ids=None, **options):
    _, rows, mask = batch_of_rows([4, 9, 6], "left")
    if ids is None:
        ids = rows
    options = {"target_lengths": LENGTHS, "seeds": [1, 2, 3], **options}
    return model.generate(
        ids, mask, return_dict_in_generate=True, output_expert_indices=True, output_trajectory=True, **options
    )


def experts_by_choice(output) -> list[set[int]]:
    """The distinct experts of every choice: one, or one for each solver step."""
    canvas = torch.arange(output.latents.shape[1]) < torch.tensor(LENGTHS)[:, None]
    choices = output.expert_indices.view(-1, *canvas.shape)
    return [set(experts_of_blocks(choice, canvas, 16, None).any(0)[0].nonzero()[:, 0].tolist()) for choice in choices]


def needed_experts(output) -> set[int]:
    return set().union(*experts_by_choice(output))


def assert_identical(output, expected):
    for name in ("sequences", "latents", "trajectory", "expert_indices", "sequence_scores"):
        assert torch.equal(getattr(output, name), getattr(expected, name)), name


@pytest.mark.parametrize("routing", ["token", "block"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_exact_modes_are_identical_to_the_resident_model(dtype, implementation, routing):
    model = many_experts(routing=routing, core_threshold=0.7).to(dtype)
    model.set_experts_implementation(implementation)
    expected = generate(model)
    _, ids, mask = batch_of_rows([4, 9, 6])
    forward = model(ids, mask)
    for settings in EXACT:
        for bound in (16, 9, 2, 1):
            offload = model.enable_expert_offload(bound, **settings)
            assert_identical(generate(model), expected)
            assert_identical(generate(model), expected)
            output = model(ids, mask)
            assert torch.equal(output.expert_fields, forward.expert_fields)
            assert torch.equal(output.logits, forward.logits)
            assert offload.stats.peak_resident_experts == len(offload.resident_experts) == min(bound, 16)
            assert model.disable_expert_offload().copies > 0
            assert_identical(generate(model), expected)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("scope", ["token", "block", "target"])
def test_choices_anew_at_every_step_are_predicted_at_every_step_and_exact(scope, solver):
    model = many_experts(
        expert_scope=scope, reselect_experts=True, routing="block", routing_block_size=4, core_threshold=0.7
    )
    expected = generate(model, output_routing=True, solver=solver)
    assert (expected.expert_indices[0] != expected.expert_indices[1]).any()
    chosen = [len(choice) for choice in experts_by_choice(expected)]
    for settings in (*EXACT, {"prediction_layer": 0}, {"prediction_layer": 2}):
        for bound in (16, 2, 1):
            offload = model.enable_expert_offload(bound, **settings)
            output = generate(model, output_routing=True, solver=solver)
            assert_identical(output, expected)
            assert torch.equal(output.core_experts, expected.core_experts)
            stats = offload.stats
            assert stats.hits + stats.misses == sum(chosen) * (2 if solver == "heun" else 1)
            assert stats.chosen == (0 if settings == {"mode": "on_demand"} else sum(chosen))
            if bound == 16:
                assert stats.copies == len(offload.resident_experts)


@pytest.mark.parametrize("routing", [{}, {"routing": "block", "core_threshold": 0.7, "routing_block_size": 4}])
@pytest.mark.parametrize("scope", ["token", "target"])
def test_executing_predicts_at_every_step_where_experts_are_chosen_anew(scope, routing):
    model = many_experts(reselect_experts=True, expert_scope=scope)
    for bound in (16, 2):
        offload = model.enable_expert_offload(bound, speculation="execute", prediction_layer=0)
        predicted = watch_predictions(offload)
        output = generate(model, **routing)
        assert len(predicted) == 3
        assert all(choice <= set(found) for choice, found in zip(experts_by_choice(output), predicted))
        assert offload.stats.misses == 0 and offload.stats.recall == 1


@pytest.mark.parametrize("settings", EXACT)
def test_the_bound_holds_at_every_moment(settings, monkeypatch):
    model = many_experts()
    offload = model.enable_expert_offload(3, **settings)
    counts = []
    original = offload.cache._copy_weights

    def watched(expert, slot):
        original(expert, slot)
        counts.append(len(offload.cache.resident) + 1)

    monkeypatch.setattr(offload.cache, "_copy_weights", watched)
    assert len(needed_experts(generate(model))) > 3
    assert max(counts) == 3
    stats = offload.stats
    assert stats.peak_resident_experts == 3
    experts = model.model.flow.experts
    assert offload.expert_bytes == sum(parameter.nbytes for parameter in experts.parameters()) // 16
    slots = sum(weight.nbytes for weight in offload.cache.slots.parameters())
    assert offload.slot_bytes == slots == 3 * offload.expert_bytes


def test_on_demand_copies_each_needed_expert_once_for_a_call():
    model = many_experts()
    needed = needed_experts(generate(model))
    offload = model.enable_expert_offload(16, mode="on_demand")
    copied = watch_copies(offload)
    generate(model, num_inference_steps=4)
    stats = offload.stats
    assert sorted(copied) == sorted(needed)
    assert (stats.misses, stats.hits, stats.prefetched) == (len(needed), 3 * len(needed), 0)
    assert stats.bytes_copied == len(needed) * offload.expert_bytes
    assert stats.waits == 1 and stats.wait_seconds > 0 and stats.recall is None
    generate(model)
    assert offload.stats.copies == len(needed)  # they are still there
    generate(model, solver="heun", seeds=[4, 5, 6])
    assert len(set(copied)) == len(copied) == offload.stats.copies


@pytest.mark.parametrize("bound", [16, 12])
def test_speculation_copies_each_needed_expert_once_for_a_call(bound):
    model = many_experts()
    needed = needed_experts(generate(model))
    assert len(needed) <= bound
    for layer in range(3):
        offload = model.enable_expert_offload(bound, prediction_layer=layer)
        copied = watch_copies(offload)
        generate(model)
        stats = offload.stats
        assert all(copied.count(expert) == 1 for expert in needed)
        assert stats.copies == len(copied) == stats.prefetched + stats.misses
        assert stats.hits + stats.misses == 3 * len(needed)
        assert stats.chosen == len(needed) and stats.predicted == stats.chosen - stats.misses
        assert stats.recall == stats.predicted / stats.chosen


def test_a_trunk_that_changes_nothing_more_is_predicted_perfectly():
    model = many_experts()
    with torch.no_grad():
        for layer in list(model.model.flow.layers)[1:]:
            for name in ("self_attn.o_proj", "feed_forward.down_proj", "cross_attn.o_proj"):
                if hasattr(layer, name.split(".")[0]):
                    layer.get_submodule(name).weight.zero_()
                    layer.get_submodule(name).bias.zero_()
    offload = model.enable_expert_offload(16, prediction_layer=1)
    generate(model)
    stats = offload.stats
    assert stats.recall == 1 and stats.misses == 0 and stats.waits == 0 and stats.prefetched > 3


def test_of_too_many_predictions_those_of_most_tokens_are_copied():
    offload = many_experts().enable_expert_offload(2)
    assert offload.prefetch(torch.tensor([[3, 9, 9, 5, 5, 5]])) == [5, 9]
    assert offload.prefetch(torch.tensor([[7, 7, 7, 7]])) == [7]
    assert offload.resident_experts == [9, 7] and offload.stats.prefetched == 3


def test_given_experts_are_prefetched_exactly():
    model = many_experts()
    experts = torch.tensor([[0, 3, 3, 7, 7, 0, 0, 0, 0, 0, 0, 0]] * 3)
    expected = generate(model, expert_indices=experts)
    offload = model.enable_expert_offload(4)
    copied = watch_copies(offload)
    assert_identical(generate(model, expert_indices=experts), expected)
    stats = offload.stats
    assert sorted(copied) == [0, 3, 7] and stats.misses == 0 and stats.recall is None


def compute(model, experts):
    states = torch.ones(len(experts), 32)
    index = torch.tensor(experts)[:, None]
    with torch.no_grad():
        return model.model.flow.experts(states, index, torch.ones(len(experts), 1))


def test_least_recently_used_goes_first():
    model = many_experts()
    expected = compute(model, [2, 9])
    offload = model.enable_expert_offload(3, mode="on_demand")
    copied = watch_copies(offload)
    for experts, order in (
        ([5], [5]),
        ([2, 8], [5, 2, 8]),
        ([5], [2, 8, 5]),
        ([9], [8, 5, 9]),
        ([8, 8], [5, 9, 8]),
        ([1, 9], [8, 9, 1]),
        ([2], [9, 1, 2]),
    ):
        compute(model, experts)
        assert offload.resident_experts == order
    assert torch.equal(compute(model, [2, 9]), expected)
    assert copied == [5, 2, 8, 9, 1, 2]


def test_more_experts_than_slots_take_turns_with_those_on_the_device_first():
    model = many_experts()
    expected = compute(model, [0, 1, 2, 3, 4, 4])
    offload = model.enable_expert_offload(2, mode="on_demand")
    compute(model, [3, 4])
    assert torch.equal(compute(model, [0, 1, 2, 3, 4, 4]), expected)
    stats = offload.stats
    assert (stats.hits, stats.misses) == (2, 5) and stats.peak_resident_experts == 2


def test_executing_runs_predicted_experts_only():
    model = many_experts()
    offload = model.enable_expert_offload(16, speculation="execute", prediction_layer=0)
    predicted = watch_predictions(offload)
    output = generate(model)
    assert needed_experts(output) <= set(predicted[0])
    stats = offload.stats
    assert stats.misses == 0 and stats.waits == 0 and stats.recall == 1
    # What was chosen depends on the prediction alone, not on what happens to be on the device.
    compute(model, list(range(16)))
    assert_identical(generate(model), output)
    for options in (
        {"routing": "block", "core_threshold": 0.5, "routing_block_size": 4},
        {"routing": "block", "core_threshold": 1.0, "min_experts": 16},
        {"expert_temperature": 1000.0},
        {"expert_selection": "greedy"},
    ):
        offload = model.enable_expert_offload(2, speculation="execute")
        output = generate(model, **options)
        assert len(needed_experts(output)) <= 2 and offload.stats.misses == 0


def test_block_routing_shrinks_what_crosses():
    model = many_experts()
    copies = {}
    for routing in ("token", "block"):
        offload = model.enable_expert_offload(16, mode="on_demand")
        generate(model, routing=routing, core_threshold=0.2)
        copies[routing] = offload.stats.bytes_copied
    assert copies["block"] < copies["token"]


# Failures, copies, threads


@pytest.mark.parametrize("settings", EXACT)
@pytest.mark.parametrize("bound", [2, 12])
def test_an_exception_in_the_middle_leaves_a_usable_model(settings, bound, monkeypatch):
    model = many_experts()
    expected = generate(model)
    offload = model.enable_expert_offload(bound, **settings)
    cache = offload.cache
    original, calls = cache._copy_weights, []

    def fails(expert, slot):
        calls.append(expert)
        if len(calls) % 3 == 0:
            cache.slots.up_proj.data[slot].fill_(torch.nan)  # half a copy
            raise MemoryError("no memory")
        original(expert, slot)

    monkeypatch.setattr(cache, "_copy_weights", fails)
    with pytest.raises(MemoryError):
        generate(model)
    monkeypatch.setattr(cache, "_copy_weights", original)
    assert calls[-1] not in offload.resident_experts
    assert len(offload.resident_experts) + len(cache.free) == bound
    assert_identical(generate(model), expected)

    class Streamer:
        def put_draft(self, ids):
            raise KeyboardInterrupt

        def put(self, ids):
            pass

    with pytest.raises(KeyboardInterrupt):
        generate(model, streamer=Streamer())
    assert_identical(generate(model), expected)
    assert offload.stats.peak_resident_experts <= bound


def test_two_models_at_once():
    first, second = many_experts(), many_experts(seed=5)
    expected = generate(first), generate(second)
    offloads = first.enable_expert_offload(2, mode="on_demand"), second.enable_expert_offload(3)
    for _ in range(2):
        for model, output in zip((first, second), expected):
            assert_identical(generate(model), output)
    assert [len(offload.resident_experts) for offload in offloads] == [2, 3]
    first.disable_expert_offload()
    assert first.expert_offload is None and second.expert_offload is offloads[1]
    assert_identical(generate(second), expected[1])


@pytest.mark.parametrize("settings", EXACT)
@pytest.mark.parametrize("bound", [2, 10])
@pytest.mark.parametrize("reselect", [False, True])
def test_threads_generate_in_parallel(reselect, settings, bound):
    model = many_experts(reselect_experts=reselect)
    seeds = [[thread, thread + 50, thread + 100] for thread in range(4)]
    expected = [generate(model, seeds=numbers) for numbers in seeds]
    offload = model.enable_expert_offload(bound, **settings)
    failures = []

    def work(thread):
        try:
            for _ in range(3):
                assert_identical(generate(model, seeds=seeds[thread]), expected[thread])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    stats = offload.stats
    assert stats.peak_resident_experts <= bound and len(offload.resident_experts) == bound
    chosen = sum(len(choice) for output in expected for choice in experts_by_choice(output))
    evaluated = chosen * (1 if reselect else 3)
    assert stats.hits + stats.misses == 3 * evaluated
    assert stats.bytes_copied == stats.copies * offload.expert_bytes


def test_saving_while_enabled_saves_the_full_weights(tmp_path):
    model = many_experts()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    expected = generate(model)
    model.enable_expert_offload(2)
    generate(model)
    state = model.state_dict()
    assert state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in weights)
    model.save_pretrained(tmp_path)
    assert_identical(generate(model), expected)
    loaded = YanForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.expert_offload is None
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded.state_dict().items())
    # Loaded weights are views of the mapped file: at another offset, matrix kernels may round otherwise.
    torch.testing.assert_close(generate(loaded).latents, expected.latents, rtol=1e-5, atol=1e-5)


def test_a_model_of_the_code_saved_with_a_checkpoint_is_offloaded_by_the_package(tmp_path, monkeypatch):
    many_experts(seed=3).save_pretrained(tmp_path / "plain")
    export_with_code(tmp_path / "plain", tmp_path / "code")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", sys.path[:])
    name = "modeling_yan.YanForConditionalGeneration"
    model = dynamic_module_utils.get_class_from_dynamic_module(name, str(tmp_path / "code")).from_pretrained(
        tmp_path / "code"
    )
    assert not isinstance(model.model.flow.experts, YanExperts)
    for weight in model.parameters():
        # Loaded weights are views of the mapped file: at another offset, matrix kernels may round otherwise.
        weight.data = weight.data.clone()
    expected = generate(model)
    for settings in EXACT:
        offload = model.enable_expert_offload(2, **settings)
        assert_identical(generate(model), expected)
        assert offload.stats.misses > 0
    assert model.disable_expert_offload().chosen > 0


def test_a_part_in_training_mode_is_predicted_too():
    """`generate` then runs copies of the modules, which share the hooks."""
    model = many_experts()
    expected = generate(model)
    offload = model.enable_expert_offload(4)
    model.model.decoder.train()
    assert_identical(generate(model), expected)
    assert offload.stats.chosen == len(needed_experts(expected))


def test_new_weights_are_copied_anew():
    model, other = many_experts(), many_experts(seed=7)
    expected = generate(other)
    offload = model.enable_expert_offload(16)
    generate(model)
    model.load_state_dict(other.state_dict())
    assert_identical(generate(model), expected)
    with torch.no_grad():
        model.model.flow.experts.down_proj.mul_(2)
    changed = generate(model)
    assert not torch.equal(changed.latents, expected.latents)
    model.model.flow.experts.down_proj.data.mul_(0.5)
    offload.clear()
    assert_identical(generate(model), expected)


def test_lora_works_merged_and_elsewhere_and_is_refused_on_the_experts():
    experts = ["flow.experts.up_proj", "flow.experts.down_proj"]
    torch.manual_seed(3)
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"], target_parameters=experts)
    model = get_peft_model(many_experts(), config).eval()
    expected = generate(model)
    with pytest.raises(RuntimeError, match="merge_and_unload"):
        model.enable_expert_offload(4)
    merged = model.merge_and_unload()
    exact = generate(merged)
    merged.enable_expert_offload(4)
    assert_identical(generate(merged), exact)
    torch.testing.assert_close(exact.latents, expected.latents, rtol=1e-4, atol=1e-4)
    # Adapters on other parts do not matter; on the experts they are seen even if they come later.
    torch.manual_seed(3)
    elsewhere = get_peft_model(many_experts(), LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear"))
    elsewhere.eval()
    expected = generate(elsewhere)
    elsewhere.enable_expert_offload(4)
    assert_identical(generate(elsewhere), expected)
    late = many_experts()
    late.enable_expert_offload(4)
    late = get_peft_model(late, config)
    with pytest.raises(RuntimeError, match="merge_and_unload"):
        generate(late)


# What it refuses


def test_training_mode_is_refused_by_name():
    model = many_experts().train()
    with pytest.raises(RuntimeError, match="training mode"):
        model.enable_expert_offload(4)
    model.eval()
    expected = generate(model)
    model.enable_expert_offload(4)
    for part in (model, model.model, model.model.flow):
        with pytest.raises(RuntimeError, match="training mode"):
            part.train()
    assert not any(module.training for module in model.modules())
    assert_identical(generate(model), expected)
    model.disable_expert_offload()
    assert model.train().training


@pytest.mark.parametrize("reselect", [False, True])
def test_gradients_are_refused_by_name(reselect):
    model = many_experts(reselect_experts=reselect)
    _, ids, mask = batch_of_rows([4, 6])
    labels = torch.tensor([[7, 8, 2], [8, 2, -100]])
    expected = model(ids, mask, labels=labels).loss
    offload = model.enable_expert_offload(4)
    loss = model(ids, mask, labels=labels).loss
    assert torch.equal(loss, expected) and offload.stats.chosen > 0
    with pytest.raises(RuntimeError, match="disable_expert_offload"):
        loss.backward()


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"max_resident_experts": 0}, "max_resident_experts"),
        ({"max_resident_experts": 17}, "max_resident_experts"),
        ({"max_resident_experts": 2.0}, "max_resident_experts"),
        ({"max_resident_experts": True}, "max_resident_experts"),
        ({"mode": "eager"}, "mode"),
        ({"speculation": "hope"}, "speculation"),
        ({"mode": "on_demand", "speculation": "execute"}, "speculation"),
        ({"prediction_layer": -1}, "prediction_layer"),
        ({"prediction_layer": 3}, "prediction_layer"),
        ({"device": "meta"}, "device"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, match):
    model = many_experts()
    with pytest.raises(ValueError, match=match):
        model.enable_expert_offload(**{"max_resident_experts": 4, **arguments})
    assert model.expert_offload is None


def test_models_without_experts_and_compiled_generation_are_refused():
    config = many_experts().config
    with pytest.raises(ValueError, match="no experts"):
        YanForAutoEncoding(config).eval().enable_expert_offload(2)
    assert YanForAutoEncoding(config).disable_expert_offload() is None
    model = many_experts()
    model.enable_expert_offload(4)
    with pytest.raises(ValueError, match="compile"):
        generate(model, compile=True)
    assert YanModel(config).eval().enable_expert_offload(2).max_resident_experts == 2


def test_moving_and_copying_are_refused_while_enabled():
    model = many_experts()
    offload = model.enable_expert_offload(4)
    with pytest.raises(RuntimeError, match="disable_expert_offload"):
        model.to(torch.float64)
    with pytest.raises(RuntimeError, match="disable_expert_offload"):
        model.bfloat16()
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert model.to("cpu").float() is model  # where it is already
    with pytest.raises(RuntimeError, match="disable_expert_offload"):
        copy.deepcopy(model)
    for part in (model, model.model.flow.layers, offload):
        with pytest.raises(RuntimeError, match="disable_expert_offload"):
            pickle.dumps(part)
    assert model.expert_offload is offload


def test_enabling_again_changes_the_settings_and_disabling_twice_does_nothing():
    model = many_experts()
    expected = generate(model)
    first = model.enable_expert_offload(4, mode="on_demand")
    second = model.enable_expert_offload(2)
    assert model.expert_offload is second and first is not second
    assert_identical(generate(model), expected)
    assert first.stats == OffloadStats()  # nothing of it is left on the model
    assert isinstance(model.disable_expert_offload(), OffloadStats) and model.disable_expert_offload() is None
    copy.deepcopy(model)
    flow = model.model.flow
    assert not any(module._forward_pre_hooks for module in (flow, *flow.layers))


def test_statistics_start_anew_and_are_copies():
    model = many_experts()
    offload = model.enable_expert_offload(4)
    generate(model)
    stats = offload.reset_stats()
    assert stats.copies > 0 and offload.stats.copies == 0
    assert offload.stats.peak_resident_experts == 4  # they are still there
    offload.stats.misses = 99
    assert offload.stats.misses == 0


# On the meta device: the offload test in `test_generate_on_meta.py`; memory is not pinned and no copy is late there.
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", EXACT)
@pytest.mark.parametrize("bound", [2, 12])
def test_cuda_is_identical_and_keeps_the_weights_in_pinned_memory(bound, settings, dtype):
    model = many_experts().to(dtype).cuda()
    _, ids, mask = batch_of_rows([4, 9, 6], "left")
    arguments = {"attention_mask": mask.cuda(), "target_lengths": LENGTHS, "seeds": [1, 2, 3]}
    expected = model.generate(ids.cuda(), **arguments, return_dict_in_generate=True)
    # From a model in CPU memory, whose experts never were on the device together.
    model = many_experts().to(dtype)
    offload = model.enable_expert_offload(bound, device="cuda", **settings)
    assert model.device.type == "cuda"
    assert all(weight.is_pinned() for weight in model.model.flow.experts.parameters())
    assert all(weight.is_cuda for weight in model.model.flow.gate.parameters())
    # Late copies, and late computations that read the slots: each has to wait for the other.
    copy_weights = offload.cache._copy_weights
    offload.cache._copy_weights = lambda *args: (torch.cuda._sleep(10**7), copy_weights(*args))
    offload.cache.slots.register_forward_pre_hook(lambda *_: torch.cuda._sleep(10**7))
    for _ in range(3):
        output = model.generate(ids.cuda(), **arguments, return_dict_in_generate=True)
        assert torch.equal(output.latents, expected.latents)
    stats = offload.stats
    assert stats.peak_resident_experts <= bound and stats.waits > 0
    assert 1e-3 < stats.wait_seconds < 0.1 * stats.copies
    assert offload.stats.wait_seconds == stats.wait_seconds  # counted once
    model.disable_expert_offload()
    assert all(weight.is_cuda for weight in model.parameters())
    assert torch.equal(model.generate(ids.cuda(), **arguments, return_dict_in_generate=True).latents, expected.latents)


# On the meta device: no twin, since nothing is allocated there.
@pytest.mark.gpu
def test_cuda_memory_holds_the_slots_only():
    torch.cuda.empty_cache()
    model = small_model(num_experts=64, hidden_size=256, num_attention_heads=4)
    experts = sum(weight.nbytes for weight in model.model.flow.experts.parameters())
    others = sum(weight.nbytes for weight in model.parameters()) - experts
    before = torch.cuda.memory_allocated()
    model.enable_expert_offload(8, device="cuda")
    assert torch.cuda.memory_allocated() - before < others + experts / 8 + 2**21
