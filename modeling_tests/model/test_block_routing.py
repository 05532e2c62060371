# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Block routing: core sets as the definition has them, padding that never votes, training, `generate`, outputs."""

import math
import random

import pytest
import torch
from testing_utils import SHALLOW, batch_of_rows, small_config, small_model
from transformers.generation import CompileConfig

from yan_hf import YanConfig, YanForConditionalGeneration, YanGenerationConfig
from yan_hf.experts import (
    RoutingOptions,
    block_of_token,
    choose_experts,
    core_experts,
    experts_of_blocks,
    gate_log_probs,
    restrict_to_core,
)


TRACED = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
BLOCK = {"routing": "block", "routing_block_size": 4, "core_threshold": 0.5}


def reference(logits, mask, block_size, top_k, threshold, min_experts):
    """
    The definition, in loops over Python's floats.

    Args:
        logits: For each row, for each position, for each expert.
        mask: For each row, for each position.

    Returns:
        For each row the core sets of its blocks, and for each position the restricted probabilities.
    """
    cores, probabilities = [], []
    for row_logits, row_mask in zip(logits, mask):
        num_experts = len(row_logits[0])
        gates = []
        for position, real in zip(row_logits, row_mask):
            exponentials = [math.exp(value - max(position)) if real else 1.0 for value in position]
            gates.append([value / sum(exponentials) for value in exponentials])
        real_positions = [position for position, real in enumerate(row_mask) if real]
        size = block_size or max(1, len(real_positions))
        row_cores, restricted = [], list(gates)
        for start in range(0, len(real_positions), size):
            block = real_positions[start : start + size]
            votes = [0.0] * num_experts
            for position in block:
                ranked = sorted(range(num_experts), key=lambda expert: (-gates[position][expert], expert))
                for expert in ranked[: top_k or num_experts]:
                    votes[expert] += gates[position][expert]
            total = sum(votes)
            core, mass = [], 0.0
            for expert in sorted(range(num_experts), key=lambda expert: (-votes[expert], expert)):
                if core and mass > threshold and len(core) >= min_experts:
                    break
                core.append(expert)
                mass += votes[expert] / total
            if threshold == 1:
                core = list(range(num_experts))
            row_cores.append(set(core))
            for position in block:
                kept = sum(gates[position][expert] for expert in core)
                restricted[position] = [
                    gates[position][expert] / kept if expert in core else 0.0 for expert in range(num_experts)
                ]
        cores.append(row_cores)
        probabilities.append(restricted)
    return cores, probabilities


def drawn_case(rng: random.Random):
    batch_size, length, num_experts = rng.randint(1, 3), rng.randint(1, 12), rng.randint(1, 9)
    scale = rng.choice([0.1, 1.0, 4.0])
    # Some with ties.
    digits = rng.choice([None, 0])
    logits = [
        [[round(rng.gauss(0, scale), digits or 15) for _ in range(num_experts)] for _ in range(length)]
        for _ in range(batch_size)
    ]
    mask = []
    for _ in range(batch_size):
        count = rng.randint(1, length)
        padding = [0] * (length - count)
        mask.append([1] * count + padding if rng.random() < 0.5 else padding + [1] * count)
    options = {
        "block_size": rng.choice([None, rng.randint(1, length + 2)]),
        "top_k": rng.choice([None, rng.randint(1, num_experts)]),
        "core_threshold": rng.choice([0.0, 1.0, rng.random(), rng.random()]),
        "min_experts": rng.choice([1, rng.randint(1, num_experts)]),
    }
    return logits, mask, options


def test_core_sets_and_gate_equal_the_definition_on_a_thousand_cases():
    rng = random.Random(0)
    sizes = set()
    for _ in range(1_000):
        logits, mask, options = drawn_case(rng)
        cores, probabilities = reference(logits, mask, *options.values())
        mask, routing = torch.tensor(mask), RoutingOptions("block", **options)
        log_probs = gate_log_probs(torch.tensor(logits, dtype=torch.float64), mask)
        restricted, core = restrict_to_core(log_probs, mask, routing)
        for row, row_cores in enumerate(cores):
            found = [set(block.nonzero()[:, 0].tolist()) for block in core[row]]
            assert found[: len(row_cores)] == row_cores, options
            assert not any(found[len(row_cores) :])
            sizes.update(map(len, row_cores))
        torch.testing.assert_close(restricted.exp(), torch.tensor(probabilities, dtype=torch.float64))
    assert len(sizes) == 9


def log_probs_of(*shape, scale=2.0, seed=0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)


@pytest.mark.parametrize("top_k", [None, 1, 3])
@pytest.mark.parametrize("block_size", [None, 1, 3])
def test_threshold_one_is_token_routing_to_the_bit(block_size, top_k):
    log_probs, mask = log_probs_of(2, 7, 6), torch.ones(2, 7)
    restricted, core = restrict_to_core(log_probs, mask, RoutingOptions("block", block_size, top_k, 1.0))
    assert torch.equal(restricted, log_probs) and core.all()


def test_a_core_set_of_all_experts_is_token_routing_to_the_bit():
    log_probs, mask = log_probs_of(2, 7, 6), torch.ones(2, 7)
    restricted, core = restrict_to_core(log_probs, mask, RoutingOptions("block", None, None, 0.5, min_experts=6))
    assert torch.equal(restricted, log_probs) and core.all()


def test_threshold_zero_leaves_one_expert_or_the_minimum():
    log_probs, mask = log_probs_of(2, 8, 6), torch.ones(2, 8)
    core = core_experts(log_probs, mask, RoutingOptions("block", 4, None, 0.0))
    assert core.shape == (2, 2, 6) and (core.sum(-1) == 1).all()
    votes = log_probs.exp().view(2, 2, 4, 6).sum(2)
    assert torch.equal(core.float().argmax(-1), votes.argmax(-1))
    core = core_experts(log_probs, mask, RoutingOptions("block", 4, None, 0.0, min_experts=3))
    assert (core.sum(-1) == 3).all()


def test_the_crossing_expert_is_included_and_equality_does_not_cross():
    log_probs = torch.tensor([[[0.5, 0.25, 0.125, 0.125]]], dtype=torch.float64).log()
    sizes = {
        threshold: int(core_experts(log_probs, torch.ones(1, 1), RoutingOptions("block", None, None, threshold)).sum())
        for threshold in (0.0, 0.49, 0.51, 0.74, 0.76, 0.99)
    }
    assert list(sizes.values()) == [1, 1, 2, 2, 3, 4]
    exact = torch.full((1, 2, 2), 0.5, dtype=torch.float64).log()
    core = core_experts(exact, torch.ones(1, 2), RoutingOptions("block", None, None, 0.5))
    assert core.all()  # the first expert's half does not exceed a half


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_neither_votes_nor_shifts_blocks(side):
    log_probs = log_probs_of(1, 7, 6)
    options = RoutingOptions("block", 3, 2, 0.5)
    alone, alone_core = restrict_to_core(log_probs, torch.ones(1, 7), options)
    padding = torch.full((1, 4, 6), -50.0)
    padding[..., 5] = 0.0  # would win every vote
    place = slice(4, None) if side == "left" else slice(7)
    parts = [padding, log_probs] if side == "left" else [log_probs, padding]
    mask = torch.zeros(1, 11, dtype=torch.long)
    mask[:, place] = 1
    assert torch.equal(block_of_token(mask, 3)[0, place], torch.tensor([0, 0, 0, 1, 1, 1, 2]))
    padded, core = restrict_to_core(torch.cat(parts, dim=1), mask, options)
    assert torch.equal(padded[:, place], alone)
    assert torch.equal(core[:, :3], alone_core) and not core[:, 3:].any()
    assert torch.equal(padded[mask == 0], padding[0])


def test_distinct_experts_are_counted_by_block():
    experts = torch.tensor([[3, 3, 1, 0, 0, 2], [1, 1, 1, 2, 0, 0]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    used = experts_of_blocks(experts, mask, 4, 3)
    assert used.sum(-1).tolist() == [[3, 2], [1, 1]]
    assert used[0].tolist() == [[True, True, False, True], [True, False, True, False]]
    assert experts_of_blocks(experts, mask, 4, None).sum(-1).tolist() == [[4], [2]]


# Training


def labels_batch(side="right"):
    _, ids, mask = batch_of_rows([9, 6, 4], "left")
    labels = torch.tensor(
        [[7, 8, 9, 5, 6, 7, 8, 2], [8, 2, -100, -100, -100, -100, -100, -100], [6, 7, 9, 9, 2, -100, -100, -100]]
    )
    if side == "left":
        labels = torch.stack([row.roll(int((row == -100).sum())) for row in labels])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_gradients_reach_the_gate_and_only_experts_of_core_sets():
    model = small_model(num_experts=8, routing="block", core_threshold=0.0, loss_weights={"load_balance": 0.0}).train()
    torch.manual_seed(0)
    output = model(**labels_batch())
    output.loss.backward()
    gradient = model.model.flow.experts.up_proj.grad.flatten(1).abs().amax(1)
    used = (gradient > 0).sum()
    assert 0 < used <= 6  # one for each row in the flow term, one in the solver
    assert torch.isfinite(output.loss)
    model.zero_grad()
    model.config.loss_weights.update(flow=0.0)
    model(**labels_batch()).loss.backward()
    gradient = model.model.flow.experts.up_proj.grad.flatten(1).abs().amax(1)
    # One for each row in the solver; positions behind a row's target draw from the whole gate, and do not count.
    assert 0 < (gradient > 0).sum() <= 3
    model = small_model(num_experts=8, **BLOCK, loss_weights={"load_balance": 0.0, "token": 0.0, "latent": 0.0})
    model.train()(**labels_batch()).loss.backward()
    for parameter in model.model.flow.gate.parameters():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0


def test_the_flow_term_has_the_restricted_mixture():
    """With one expert left, the flow term is that expert's own density."""
    model = small_model(num_experts=4, routing="block", core_threshold=0.0)
    batch = labels_batch()
    output = model(**batch)
    mask = batch["labels"] != -100
    log_probs = gate_log_probs(output.gate_logits, mask)
    core = core_experts(log_probs, mask, RoutingOptions("block", None, None, 0.0))
    generator = torch.Generator().manual_seed(0)
    times = torch.rand(3, generator=generator)
    noise = torch.randn(output.target_latents.shape, generator=generator)
    assert times.shape == (3,)
    velocity = output.target_latents - model.config.init_noise * noise
    chosen = core[:, 0].float().argmax(-1)
    fields = output.expert_fields[torch.arange(3), :, chosen]
    size = velocity.shape[-1]
    nll = 0.5 * (fields - velocity).square().sum(-1) + 0.5 * size * math.log(2 * math.pi)
    torch.testing.assert_close(output.loss_terms["flow"], nll[mask].mean(), rtol=1e-4, atol=1e-4)


def test_threshold_one_trains_as_token_routing():
    batch, losses = labels_batch(), []
    for fields in ({}, {**BLOCK, "core_threshold": 1.0}):
        model = small_model(**fields).train()
        torch.manual_seed(0)
        model(**batch).loss.backward()
        losses.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*losses))


def test_forward_mixes_the_core_set_only():
    model = small_model(num_experts=6, routing="block", routing_block_size=3, core_threshold=0.3)
    _, ids, mask = batch_of_rows([7, 4], "left")
    output = model(ids, mask)
    log_probs = gate_log_probs(output.gate_logits, mask)
    restricted, core = restrict_to_core(log_probs, mask, RoutingOptions.from_config(model.config))
    assert not core[0].all()
    expected = (restricted.exp()[..., None] * output.expert_fields).sum(2)
    torch.testing.assert_close(output.velocity, expected)


# Generation


def generate(model, ids, mask=None, **options):
    return model.generate(
        ids, mask, return_dict_in_generate=True, output_routing=True, output_expert_indices=True, **options
    )


@pytest.mark.parametrize("selection", ["sample", "greedy"])
def test_tokens_choose_inside_their_block_s_core_set(selection):
    model = small_model(num_experts=16)
    _, ids, mask = batch_of_rows([4, 9, 6], "left")
    lengths = torch.tensor([12, 7, 3])
    options = {"target_lengths": lengths, "seeds": [1, 2, 3], "expert_selection": selection}
    output = generate(model, ids, mask, **options, **BLOCK)
    assert output.core_experts.shape == (3, 3, 16) and output.distinct_experts.shape == (3, 3)
    assert (output.core_experts.sum(-1) < 16).all()
    for row, length in enumerate(lengths.tolist()):
        for start in range(0, 12, 4):
            block = set(output.expert_indices[row, start : min(start + 4, length)].tolist() if start < length else ())
            core = set(output.core_experts[row, start // 4].nonzero()[:, 0].tolist())
            assert block <= core and bool(block) == bool(core)
            assert output.distinct_experts[row, start // 4] == len(block)
    token = generate(model, ids, mask, **options, routing_block_size=4)
    assert (token.core_experts.sum(-1) == torch.tensor([[16, 16, 16], [16, 16, 0], [16, 0, 0]])).all()
    assert token.distinct_experts.sum() >= output.distinct_experts.sum() + (selection == "sample")


def test_threshold_one_generates_as_token_routing():
    model = small_model(num_experts=16)
    _, ids, mask = batch_of_rows([4, 9, 6])
    options = {"target_lengths": 12, "seeds": [1, 2, 3]}
    token = generate(model, ids, mask, **options)
    block = generate(model, ids, mask, **options, **{**BLOCK, "core_threshold": 1, "routing_top_k": 2})
    assert torch.equal(token.latents, block.latents) and torch.equal(token.expert_indices, block.expert_indices)
    one = generate(model, ids, mask, **options, routing="block", core_threshold=0)
    assert one.distinct_experts.tolist() == [[1], [1], [1]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [None, 4])
def test_a_row_does_not_depend_on_padding_or_neighbours(side, size):
    model = small_model(num_experts=16, **{**BLOCK, "routing_block_size": size})
    rows, ids, mask = batch_of_rows([1, 9, 6, 3], side, extra=2)
    lengths = [5, 12, 9, 1]
    batched = generate(model, ids, mask, seeds=[3, 1, 4, 1], target_lengths=lengths)
    for i, row in enumerate(rows):
        single = generate(model, row[None], seeds=[[3, 1, 4, 1][i]], target_lengths=lengths[i])
        num_blocks = single.core_experts.shape[1]
        assert torch.equal(batched.expert_indices[i, : lengths[i]], single.expert_indices[0])
        assert torch.equal(batched.core_experts[i, :num_blocks], single.core_experts[0])
        assert torch.equal(batched.distinct_experts[i, :num_blocks], single.distinct_experts[0])
        torch.testing.assert_close(batched.latents[i, : lengths[i]], single.latents[0], rtol=1e-5, atol=1e-5)


def test_positions_behind_a_canvas_need_no_expert_of_their_own():
    model = small_model(num_experts=16)
    _, ids, mask = batch_of_rows([4, 9])
    output = generate(model, ids, mask, seeds=[1, 2], target_lengths=[1, 12])
    assert (output.expert_indices[0] == output.expert_indices[0, 0]).all()


def test_candidates_bring_their_own_routing():
    model = small_model(num_experts=16, **BLOCK)
    _, ids, mask = batch_of_rows([4, 9])
    options = {"num_candidates": 3, "num_return_sequences": 2, "seeds": range(4), "target_lengths": [6, 11]}
    output = generate(model, ids, mask, **options)
    assert output.core_experts.shape == (4, 3, 16)
    canvas = torch.arange(11) < torch.tensor([6, 6, 11, 11])[:, None]
    used = experts_of_blocks(output.expert_indices, canvas, 16, 4)
    assert torch.equal(used.sum(-1), output.distinct_experts) and not (used & ~output.core_experts).any()


def test_given_experts_ask_no_gate():
    _, ids, mask = batch_of_rows([4, 9])
    output = generate(small_model(**BLOCK), ids, mask, expert_indices=torch.tensor([[0, 1, 2, 2, 3]] * 2))
    assert output.core_experts is None
    assert output.distinct_experts.shape[0] == 2


@pytest.mark.slow
def test_compiled_routing_is_the_plain_path_s():
    torch._dynamo.reset()
    model = small_model(num_experts=8, **BLOCK, **SHALLOW)
    _, ids, mask = batch_of_rows([4, 17, 6], "left")
    options = {"seeds": [1, 2, 3], "target_lengths": [3, 18, 9], "num_inference_steps": 1}
    plain = generate(model, ids, mask, **options)
    compiled = generate(model, ids, mask, compile=True, compile_config=TRACED, **options)
    for name in ("sequences", "distinct_experts", "core_experts"):
        assert torch.equal(getattr(plain, name), getattr(compiled, name)), name
    other = generate(model, ids, mask, compile=True, compile_config=TRACED, core_threshold=0, **options)
    assert (other.distinct_experts <= 1).all()  # another threshold is another program
    torch._dynamo.reset()


# Configuration


def test_configuration_holds_for_generate_and_survives_saving(tmp_path):
    model = small_model(num_experts=8, **BLOCK, min_experts=2, routing_top_k=3)
    _, ids, mask = batch_of_rows([4, 9])
    expected = generate(model, ids, mask, seeds=[1, 2], target_lengths=12)
    model.save_pretrained(tmp_path)
    loaded = YanForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.min_experts == 2 and loaded.config.routing_top_k == 3
    assert torch.equal(generate(loaded, ids, mask, seeds=[1, 2], target_lengths=12).latents, expected.latents)
    explicit = {**BLOCK, "min_experts": 2, "routing_top_k": 3}
    plain = small_model(num_experts=8)
    assert torch.equal(
        generate(plain, ids, mask, seeds=[1, 2], target_lengths=12, **explicit).latents, expected.latents
    )
    config = YanGenerationConfig(**explicit)
    config.save_pretrained(tmp_path / "generation")
    again = YanGenerationConfig.from_pretrained(tmp_path / "generation")
    assert {name: getattr(again, name) for name in explicit} == explicit


@pytest.mark.parametrize(
    "field, value",
    [
        ("routing", "tokens"),
        ("routing_block_size", 0),
        ("routing_block_size", -3),
        ("routing_top_k", 0),
        ("routing_top_k", 5),
        ("core_threshold", -0.1),
        ("core_threshold", 1.1),
        ("core_threshold", float("nan")),
        ("min_experts", 0),
        ("min_experts", 5),
    ],
)
def test_invalid_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        small_config(**{field: value})
    _, ids, mask = batch_of_rows([4])
    with pytest.raises(ValueError, match=field):
        small_model().generate(ids, mask, **{field: value})


def test_defaults_are_the_paper_s_token_routing():
    assert YanConfig().routing == "token"


def test_draws_stay_inside_whatever_the_noise():
    log_probs, mask = log_probs_of(1, 50, 8, scale=6.0), torch.ones(1, 50)
    restricted, core = restrict_to_core(log_probs, mask, RoutingOptions("block", None, None, 0.5))
    for seed in range(20):
        uniform = torch.rand(1, 50, 8, generator=torch.Generator().manual_seed(seed))
        assert core[0, 0][choose_experts(restricted, uniform, temperature=5.0)].all()
