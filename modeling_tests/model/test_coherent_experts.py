# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Choices of experts that a block or the target shares, held or made anew, and the flow's start at the source."""

import math
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, get_peft_model
from testing_utils import DraftCounter, batch_of_rows, small_config, small_model
from torch.distributions import Normal

from yan_hf import YanConfig, YanForConditionalGeneration, modeling_yan
from yan_hf.configuration_yan import DEFAULT_LOSS_WEIGHTS
from yan_hf.experts import (
    RoutingOptions,
    choice_log_probs,
    choose_experts,
    gate_log_probs,
    share_choice,
    stratified_choice,
    sum_over_blocks,
)
from yan_hf.lengths import stretch
from yan_hf.losses import block_flow_matching_nll, token_log_probs
from yan_hf.modeling_yan import YanFlow
from yan_hf.sampling import SamplingOptions


SCOPES = [("token", False), ("token", True), ("block", False), ("block", True), ("target", False), ("target", True)]
BACKBONES = ["transformer", "mamba"]


def model_with(scope="target", anew=True, start="stretched", backbone="transformer", **changes):
    fields = {"expert_scope": scope, "reselect_experts": anew, "start_state": start, "routing_block_size": 3}
    return small_model(**fields, encoder_backbone=backbone, flow_backbone=backbone, **changes)


def labelled(side="right"):
    _, ids, mask = batch_of_rows([4, 9, 6], side)
    labels = batch_of_rows([5, 3, 8], "right", seed=2)[1]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(labels == 0, -100)}


# The functions


def test_sums_and_shared_gates_are_those_of_each_block():
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 0], [1, 1, 0, 1, 1, 1, 1]])
    log_probs = torch.randn(2, 7, 4).log_softmax(-1)
    shared, _ = share_choice(log_probs, None, mask, RoutingOptions(block_size=2, scope="block"))
    for row in range(2):
        real = mask[row].nonzero()[:, 0]
        for block in real.split(2):
            expected = log_probs[row, block].mean(0).log_softmax(-1)
            torch.testing.assert_close(shared[row, block], expected.expand(len(block), -1))
            total = sum_over_blocks(log_probs, mask, 2)[row, block]
            torch.testing.assert_close(total, log_probs[row, block].sum(0).expand(len(block), -1))


def test_the_noise_of_a_block_is_its_first_token_s():
    mask, uniform = torch.ones(2, 7), torch.rand(2, 7, 4)
    _, noise = share_choice(torch.zeros(2, 7, 4), uniform, mask, RoutingOptions(block_size=3, scope="block"))
    assert torch.equal(noise, uniform[:, [0, 0, 0, 3, 3, 3, 6]])
    _, noise = share_choice(torch.zeros(2, 7, 4), uniform, mask, RoutingOptions(scope="target"))
    assert torch.equal(noise, uniform[:, :1].expand_as(uniform))


def test_stratified_choices_divide_the_gate_and_go_on_dividing():
    gate, mask, whole = torch.tensor([0.12, 0.5, 0.01, 0.37]).log(), torch.ones(7, 6), RoutingOptions(scope="target")

    def choose(places, left, **changes):
        number = len(places)
        given = gate.expand(number, 6, 4), torch.tensor(places), mask[:number]
        experts, places = stratified_choice(*given, whole, changes.get("samples", 7), left, changes.get("heat", 1.0))
        assert (experts == experts[:, :1]).all()
        return experts[:, 0].tolist(), places.tolist()

    # Quotients 50, 37, 16.7, 12.3, 12, 10, 7.4: with room below, nobody gets more than is due.
    assert choose(list(range(7)), 2) == ([1, 3, 1, 3, 0, 1, 3], [0, 0, 1, 1, 0, 2, 2])
    # Of those that have chosen the same each goes a way of its own at last, as long as there are any.
    assert choose([0, 1, 2, 3], 0, samples=4)[0] == [1, 3, 0, 2]
    assert choose(list(range(7)), 0) == ([1, 3, 0, 2, 1, 3, 1], [0, 0, 0, 0, 1, 1, 2])
    assert choose(list(range(7)), 2, heat=100.0)[0] == [1, 3, 0, 2, 1, 3, 0]
    assert choose([0], 2, samples=1) == ([1], [0])
    # One more choice tells four apart, so that no expert gets more than these.
    gate = torch.tensor([0.9, 0.06, 0.03, 0.01]).log()
    assert choose(list(range(7)), 1)[0] == [0, 0, 0, 0, 1, 2, 1]
    # Nobody leaves a core set for want of room.
    gate = torch.tensor([0.32, 0.68, 0.0, 0.0]).log()
    assert choose([0, 1, 2, 3, 4], 0, samples=5)[0] == [1, 0, 1, 1, 0]


def test_stratified_choices_of_blocks_follow_one_another_and_padding_is_none():
    gate = torch.randn(1, 7, 4).log_softmax(-1).expand(8, 7, 4)
    places, mask = torch.arange(8), (torch.arange(7) < 4).long().expand(8, 7)
    whole, block = RoutingOptions(scope="target"), RoutingOptions(scope="block", block_size=3)
    experts, rest = stratified_choice(gate, places, mask, block, 8, 0)
    first, between = stratified_choice(gate[:, :3], places, mask[:, :3], whole, 8, 1)
    second, last = stratified_choice(gate[:, 3:4], between, mask[:, 3:4], whole, 8, 0)
    assert torch.equal(experts[:, :4], torch.cat([first, second], dim=1)) and torch.equal(rest, last)
    assert len(set(map(tuple, experts[:, [0, 3]].tolist()))) == 8 > len(set(first[:, 0].tolist()))


def test_lengths_of_a_sample_share_its_place():
    places = SamplingOptions(times=(), repeats=6, stratified=2).sample_places(12, torch.device("cpu"))
    assert places.tolist() == [0, 0, 0, 1, 1, 1] * 2


def test_a_path_s_probability_is_the_product_over_its_blocks():
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    options = RoutingOptions(block_size=2, scope="block")
    log_probs, _ = share_choice(torch.randn(2, 5, 3).log_softmax(-1), None, mask, options)
    experts = torch.tensor([[0, 0, 2, 2, 1], [1, 1, 1, 1, 1]])
    expected = torch.stack([log_probs[0, 0, 0] + log_probs[0, 2, 2] + log_probs[0, 4, 1], log_probs[1, 0, 1]])
    torch.testing.assert_close(choice_log_probs(log_probs, experts, mask, options), expected)
    assert not choice_log_probs(log_probs, experts, mask, RoutingOptions()).any()


def test_the_density_of_a_block_is_a_mixture_of_products():
    fields, velocity = torch.randn(1, 4, 3, 6), torch.randn(1, 4, 6)
    gate = torch.randn(1, 1, 3).log_softmax(-1).expand(1, 4, 3)
    mask = torch.tensor([[1, 1, 1, 0]])
    nll = block_flow_matching_nll(fields, gate, velocity, 0.7, mask, None)
    densities = Normal(fields[0, :3], 0.7).log_prob(velocity[0, :3, None]).sum(-1)  # (3, K)
    expected = -torch.logsumexp(gate[0, 0] + densities.sum(0), -1) / 3
    torch.testing.assert_close(nll[0, :3], expected.expand(3))


def test_tokens_that_do_not_count_shift_no_block():
    fields, velocity = torch.randn(1, 5, 3, 6), torch.randn(1, 5, 6)
    gate = torch.randn(1, 3, 3).log_softmax(-1).repeat_interleave(2, dim=1)[:, :5]
    mask, canvas = torch.tensor([[0, 1, 1, 1, 0]]), torch.ones(1, 5, dtype=torch.bool)
    nll = block_flow_matching_nll(fields, gate, velocity, 0.7, mask, 2, canvas)
    densities = Normal(fields[0], 0.7).log_prob(velocity[0, :, None]).sum(-1)  # (5, K)
    first = -torch.logsumexp(gate[0, 0] + densities[1], -1)
    second = -torch.logsumexp(gate[0, 2] + densities[2:4].sum(0), -1) / 2
    torch.testing.assert_close(nll[0, 1:4], torch.stack([first, second, second]))


def test_token_log_probs_in_chunks_are_those_at_once(monkeypatch):
    head, latents, labels = torch.nn.Linear(8, 50), torch.randn(23, 8), torch.randint(50, (23,))
    monkeypatch.setattr("yan_hf.losses._CHUNK_ELEMENTS", 50 * 4)
    sizes = []

    def decode(states):
        sizes.append(states.shape[1])
        return head(states)

    found = token_log_probs(decode, latents, labels, 50)
    expected = head(latents).log_softmax(-1).gather(1, labels[:, None])[:, 0].detach()
    torch.testing.assert_close(found, expected)
    assert max(sizes) == 4 and not found.requires_grad


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_stretched_source_is_the_nearest_token_whatever_the_padding(side):
    for source_length, target_length in [(1, 1), (1, 5), (7, 1), (7, 7), (4, 9), (9, 4)]:
        source = torch.randn(1, source_length, 3)
        padding = torch.full((1, 2, 3), 99.0)
        padded = torch.cat([padding, source] if side == "left" else [source, padding], 1)
        mask = torch.zeros(1, source_length + 2, dtype=torch.long)
        mask[0, 2:] = 1
        mask = mask if side == "left" else mask.flip(1)
        canvas = torch.zeros(1, target_length + 2, dtype=torch.long)
        canvas[0, :target_length] = 1
        found = stretch(padded, mask, canvas)[0]
        steps = max(1, target_length - 1)
        nearest = [math.floor(place * (source_length - 1) / steps + 0.5) for place in range(target_length)]
        assert torch.equal(found[:target_length], source[0, nearest]) and not found[target_length:].any()
        assert torch.equal(stretch(source, None, canvas[:, :target_length])[0], source[0, nearest])


# The model


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("start", ["noise", "stretched"])
@pytest.mark.parametrize(("scope", "anew"), SCOPES)
def test_a_row_depends_on_itself_alone(scope, anew, start, backbone):
    model = model_with(scope, anew, start, backbone)
    rows, ids, mask = batch_of_rows([4, 9, 6], "left", extra=2)
    options = {"return_dict_in_generate": True, "output_expert_indices": True, "num_candidates": 2, "rerank": "joint"}
    batched = model.generate(ids, mask, seeds=[1, 2, 3], **options)
    steps = (model.config.solver_steps,) if anew else ()
    assert batched.expert_indices.shape[:-1] == (*steps, 3)
    for index, row in enumerate(rows):
        alone = model.generate(row[None], seeds=[index + 1], **options)
        length = int(alone.lengths[0])
        assert torch.equal(alone.sequences[0, :length], batched.sequences[index, :length])
        assert torch.equal(alone.expert_indices[..., 0, :length], batched.expert_indices[..., index, :length])


@pytest.mark.parametrize(("scope", "anew"), SCOPES)
def test_who_shares_a_choice(scope, anew):
    model = model_with(scope, anew, gate_temperature=0.1)
    _, ids, mask = batch_of_rows([4, 9, 6])
    options = {"return_dict_in_generate": True, "output_expert_indices": True, "target_lengths": 9}
    experts = model.generate(ids, mask, seeds=[1, 2, 3], num_inference_steps=4, **options).expert_indices
    size = {"token": 1, "block": 3, "target": 9}[scope]
    blocks = experts.unflatten(-1, (9 // size, size))
    assert (blocks == blocks[..., :1]).all()
    assert size == 9 or not (blocks == blocks[..., :1, :1]).all()
    if anew:
        assert len(experts) == 4 and not (experts == experts[:1]).all()


@pytest.mark.parametrize(("scope", "anew"), SCOPES[2:])
def test_stratified_samples_go_different_ways_and_the_first_is_the_greedy_one(scope, anew):
    model = model_with(scope, anew, gate_temperature=0.5)
    _, ids, mask = batch_of_rows([4, 9, 6])
    options = {"return_dict_in_generate": True, "output_expert_indices": True, "target_lengths": 9, "init_noise": 0.0}
    greedy = model.generate(ids, mask, expert_selection="greedy", **options)
    spread = {**options, "expert_selection": "stratified"}
    many = model.generate(ids, mask, num_return_sequences=4, **spread)
    assert torch.equal(many.expert_indices.unflatten(-2, (3, 4))[..., 0, :], greedy.expert_indices)
    assert torch.equal(many.sequences[::4], greedy.sequences)
    paths = many.expert_indices.movedim(-2, 0).flatten(1).unflatten(0, (3, 4)).tolist()
    assert all(len(set(map(tuple, row))) == 4 for row in paths)
    again = model.generate(ids, mask, num_return_sequences=4, seeds=list(range(12)), **spread)
    assert torch.equal(again.expert_indices, many.expert_indices)
    # Candidates of a sequence count as samples do.
    best = model.generate(ids, mask, num_candidates=4, rerank="joint", **spread)
    assert all(text in many.sequences.tolist() for text in best.sequences.tolist())


def test_stratified_choices_need_shared_ones():
    ids = batch_of_rows([7])[1]
    with pytest.raises(ValueError, match='expert_selection="stratified".*expert_scope'):
        small_model().generate(ids, expert_selection="stratified")
    with pytest.raises(ValueError, match="expert_scope"):
        model_with("target").generate(ids, expert_selection="stratified", expert_scope="token")
    model = small_model(expert_scope="target")
    with pytest.raises(ValueError, match='expert_scope="block".*routing_block_size'):
        model.generate(ids, expert_scope="block")


def test_stratified_choices_stay_apart_in_core_sets_and_under_a_sharp_gate():
    """Of 4 samples in two choices: two experts that are allowed go four ways; so do those that are hardly likely."""

    def paths(log_probs, **options):
        found, place = [], torch.arange(4)
        for steps_left in (1, 0):
            gate, mask = log_probs.expand(4, 1, -1), torch.ones(4, 1)
            experts, place = stratified_choice(
                gate, place, mask, RoutingOptions(scope="target"), 4, steps_left, **options
            )
            found.append(experts[:, 0].tolist())
        return set(zip(*found))

    core = torch.tensor([0.95, 0.05, 0.0, 0.0]).log()
    assert paths(core) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    sharp = torch.tensor([-300.0, 0.0, -200.0, -100.0])
    assert paths(sharp) == {(1, 1), (1, 3), (1, 2), (1, 0)}
    for temperature in (1e-3, 1e-38, 1e-45):
        assert len(paths(sharp, temperature=temperature)) == 4
        uniform = torch.rand(4, 1, 4)
        assert choose_experts(sharp.expand(4, 1, -1), uniform, temperature).unique().tolist() == [1]


def test_drafts_are_those_of_the_streamer_and_the_last_one_is_the_text():
    class Streamer(DraftCounter):
        def put_draft(self, value):
            drafts.append(value)

    model = model_with(start="aligned", keep_known=True, mask_token_id=4, eos_token_id=2)
    ids = torch.tensor([[7, 8, 4, 10, 2, 0], [5, 4, 6, 4, 9, 2]])
    options = {"attention_mask": (ids != 0).long(), "mask_lengths": [[2, 0], [3, 1]], "suppress_tokens": [30]}
    drafts = []
    output = model.generate(
        ids, **options, seeds=[1, 2], output_drafts=True, return_dict_in_generate=True, streamer=Streamer()
    )
    assert output.drafts.shape == (3, *output.sequences.shape) and output.trajectory is None
    assert torch.equal(output.drafts, torch.stack(drafts)) and torch.equal(output.drafts[-1], output.sequences)
    assert (output.drafts[:, 0, :2] == torch.tensor([7, 8])).all()
    best = model.generate(
        ids,
        **options,
        seeds=[1, 2],
        output_drafts=True,
        return_dict_in_generate=True,
        num_candidates=3,
        do_sample=True,
    )
    assert torch.equal(best.drafts[-1], best.sequences)


def test_core_sets_of_a_whole_target_are_those_of_each_of_its_blocks():
    model = model_with("target", routing="block", core_threshold=0.5)
    _, ids, mask = batch_of_rows([4, 9])
    options = {"output_routing": True, "return_dict_in_generate": True, "target_lengths": [2, 8]}
    output = model.generate(ids, mask, seeds=[1, 2], **options)
    assert output.distinct_experts.shape == (2, 3) and output.core_experts.shape == (2, 3, 4)
    assert torch.equal(output.core_experts.any(-1), torch.tensor([[True, False, False], [True, True, True]]))
    assert (output.core_experts[1] == output.core_experts[1, 0]).all()


def test_given_experts_are_followed_at_every_step():
    model = model_with("target", True)
    _, ids, mask = batch_of_rows([4, 9])
    options = {"return_dict_in_generate": True, "output_expert_indices": True, "target_lengths": 6}
    free = model.generate(ids, mask, seeds=[1, 2], **options)
    given = model.generate(ids, mask, seeds=[1, 2], expert_indices=free.expert_indices, **options)
    torch.testing.assert_close(given.latents, free.latents)
    other = model.generate(ids, mask, seeds=[1, 2], expert_indices=(free.expert_indices + 1) % 4, **options)
    assert not torch.allclose(other.latents, free.latents, atol=1e-3)
    with pytest.raises(ValueError, match="`expert_indices` must have shape"):
        model.generate(ids, mask, expert_indices=free.expert_indices[0], **options)


@pytest.mark.parametrize("solver", ["euler", "heun", "rk4"])
def test_experts_change_at_steps_and_not_between_their_stages(solver):
    model = model_with("target", True)
    seen = []
    model.model.flow.register_forward_hook(
        lambda module, args, output: seen.append(output.expert_indices[0, 0].item())
    )
    ids = batch_of_rows([7])[1]
    output = model.generate(
        ids, seeds=[5], solver=solver, return_dict_in_generate=True, output_expert_indices=True, target_lengths=4
    )
    stages = {"euler": 1, "heun": 2, "rk4": 4}[solver]
    assert seen == output.expert_indices[:, 0, 0].repeat_interleave(stages).tolist()


def test_the_initial_latents_of_the_caller_are_the_start_itself():
    model = model_with(start="stretched")
    ids, start = batch_of_rows([7])[1], torch.randn(1, 5, 32)
    options = {"target_lengths": 5, "return_dict_in_generate": True, "output_trajectory": True}
    assert torch.equal(model.generate(ids, initial_latents=start, **options).trajectory[0], start)
    drawn = model.generate(ids, init_noise=0.0, **options).trajectory[0]
    source = model.model.encode(ids).last_hidden_state
    expected = stretch(model.model.start_proj(source), None, torch.ones(1, 5))
    torch.testing.assert_close(drawn, expected.detach())


def test_the_start_begins_as_the_source_itself():
    torch.manual_seed(0)
    model = YanForConditionalGeneration(small_config(start_state="stretched"))
    assert torch.equal(model.model.start_proj.weight, torch.eye(32))
    assert YanForConditionalGeneration(small_config()).model.start_proj is None


@pytest.mark.slow
@pytest.mark.parametrize(("scope", "anew"), SCOPES)
def test_compiled_equals_eager(scope, anew):
    model = model_with(scope, anew, encoder_layers=1, flow_layers=1, cross_attention_layers=[0])
    _, ids, mask = batch_of_rows([4, 9, 6], "left")
    spread = {"expert_selection": "stratified", "num_return_sequences": 3, "seeds": list(range(9))}
    for chosen in [{"seeds": [1, 2, 3]}, *([] if scope == "token" else [spread])]:
        options = {**chosen, "return_dict_in_generate": True, "output_expert_indices": True}
        expected = model.generate(ids, mask, **options)
        compiled = model.generate(ids, mask, compile=True, compile_config={"backend": "aot_eager"}, **options)
        assert torch.equal(compiled.sequences, expected.sequences)
        assert torch.equal(compiled.expert_indices, expected.expert_indices)


# Training


def winners_of(model, batch):
    torch.manual_seed(0)
    return model(**batch, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("anew", "fewest"), [(False, None), (True, None), (True, 1), (True, 20)])
def test_the_winner_explains_the_target_best(anew, fewest, monkeypatch):
    """
    Against every expert followed by hand from the state that the winners before have reached; likelihoods are those
    of the whole vocabulary, in training those among the targets' tokens and, of `fewest` if need be, others.
    """
    model = model_with("target", anew, start="noise", init_noise=0.0)
    batch = labelled()
    if fewest is not None:
        monkeypatch.setattr(modeling_yan, "_FEWEST_TOKENS", fewest)
        model.train()
    output = winners_of(model, batch)
    steps = model.config.solver_steps
    assert output.expert_indices.shape == (steps if anew else 1, 3, 8)
    counted = batch["labels"] != -100
    with torch.no_grad():
        source = model.model.encode(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        context = model.model.prepare_context(source, batch["attention_mask"], counted)
        state = torch.zeros(3, 8, 32)
        for step in range(steps):
            time = step / steps
            fields = model.model.flow(state, torch.full((1,), time), context).expert_fields
            choice = output.expert_indices[step if anew else 0]
            if anew or step == 0:
                scores = []
                for expert in range(4):
                    logits = model.decode(state + (1 - time) * fields[:, :, expert])
                    ids = batch["labels"].masked_fill(~counted, model.config.mask_token_id)
                    tokens = torch.arange(60) if fewest is None else ids.unique()
                    if fewest == 20:
                        assert len(tokens) < 20
                        tokens = torch.cat([tokens, torch.arange(0, 60, 3)]).unique()
                    columns = torch.searchsorted(tokens, ids)
                    found = logits[..., tokens].log_softmax(-1).gather(-1, columns[..., None])[..., 0]
                    scores.append((found * counted).sum(-1))
                assert torch.equal(torch.stack(scores, -1).argmax(-1), choice[:, 0])
            state = state + fields.gather(2, choice[..., None, None].expand(-1, -1, 1, 32))[:, :, 0] / steps
    torch.testing.assert_close(output.latents[counted], state[counted], rtol=1e-4, atol=1e-4)


def test_in_evaluation_a_winner_depends_on_its_row_alone():
    model, batch = model_with(init_noise=0.0), labelled()
    together = winners_of(model, batch)
    for row in range(3):
        number = int((batch["labels"][row] != -100).sum())
        one = {name: values[row : row + 1] for name, values in batch.items()}
        alone = winners_of(model, {**one, "labels": one["labels"][:, :number]})
        scores = together.expert_scores[:, row : row + 1, :number]
        torch.testing.assert_close(alone.expert_scores, scores, rtol=1e-4, atol=1e-4)


def test_targets_of_one_token_are_told_apart_in_training():
    model = model_with(init_noise=0.0).train()
    batch = {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[9]])}
    scores = winners_of(model, batch).expert_scores
    assert scores.std(-1).min() > 1e-3


@pytest.mark.parametrize("scope", ["block", "target"])
def test_winners_are_sought_in_the_core_set(scope):
    """With a threshold of 0, where the core set is the gate's mode; scores and gate term know all experts."""
    model = model_with(scope, routing="block", core_threshold=0.0, init_noise=0.0).train()
    output = winners_of(model, labelled())
    where = output.choice_mask.expand_as(output.expert_indices)
    assert torch.equal(output.expert_indices[where], output.choice_log_probs.argmax(-1)[where])
    assert not torch.equal(output.expert_indices[where], output.expert_scores.argmax(-1)[where])
    assert output.expert_scores.isfinite().all() and output.choice_log_probs.isfinite().all()


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("keep_known", [False, True])
def test_what_training_shares_and_fuses_changes_no_gradient(monkeypatch, anew, keep_known):
    """
    Against gradients through every expert's field, keys and values of each evaluation's own, and the logits of every
    step; the two steps before the last, of which each token draws one, have their mean.
    """
    start = {"start": "aligned", "keep_known": True} if keep_known else {"start": "noise"}
    weights = dict.fromkeys(DEFAULT_LOSS_WEIGHTS, 1.0)
    model = model_with("target", anew, init_noise=0.0, loss_weights=weights, **start).train()
    batch = labelled()
    if keep_known:
        batch = {"input_ids": torch.tensor([[7, 4, 9, 2], [8, 4, 4, 2]])}
        batch["labels"] = torch.tensor([[7, 20, 21, 9, 2], [8, 22, 23, 24, 2]])
    if anew:
        batch["token_weights"] = torch.rand(batch["labels"].shape)
    plain_forward = YanFlow.forward

    def through_all_fields(self, *args, field_selector=None, expert_indices=None, **kwargs):
        flow = plain_forward(self, *args, **kwargs)
        if field_selector is not None:
            log_probs = gate_log_probs(flow.gate_logits, args[2].canvas_mask)
            expert_indices = field_selector(log_probs, flow.expert_fields.detach())
        if expert_indices is not None:
            index = expert_indices[..., None, None].expand(-1, -1, 1, 32)
            flow.velocity = flow.expert_fields.gather(2, index)[:, :, 0]
        return flow

    found, rand = [], torch.rand

    def one_step_for_all(*given, **options):
        values = rand(*given, **options)
        return torch.full_like(values, case) if values.dim() == 2 else values

    for case in (0.0, 0.7, "plain"):
        if case == "plain":
            monkeypatch.setattr(YanFlow, "forward", through_all_fields)
            monkeypatch.setattr(YanFlow, "keys_can_be_shared", lambda self: False)
            monkeypatch.setattr("yan_hf.modeling_yan.can_fuse", lambda *_: False)
        model.zero_grad()
        torch.manual_seed(0)
        with patch("torch.rand", rand if case == "plain" else one_step_for_all):
            output = model(**batch)
        output.loss.backward()
        gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        assert {"model.flow.experts.up_proj", "lm_head.weight"} <= set(gradients)
        found.append({**output.loss_terms, **gradients})
    assert not torch.allclose(found[0]["token"], found[1]["token"], rtol=1e-4)
    mean = {name: (found[0][name] + found[1][name]) / 2 for name in found[0]}
    torch.testing.assert_close(mean, found[2], rtol=1e-4, atol=1e-5)


def test_only_the_winners_fields_are_part_of_the_graph():
    model = model_with("target", True, loss_weights={"flow": 0.0}).train()
    output = model(**labelled())
    assert output.velocity.requires_grad and not output.expert_fields.requires_grad
    chosen = output.expert_fields.gather(2, output.expert_indices[0, ..., None, None].expand(-1, -1, 1, 32))[:, :, 0]
    torch.testing.assert_close(output.velocity, chosen)


@pytest.mark.parametrize("scope", ["block", "target"])
def test_padding_changes_no_term(scope):
    weights = dict.fromkeys(DEFAULT_LOSS_WEIGHTS, 1.0) | {"mmd": 0.0}
    model = model_with(scope, True, init_noise=0.0, loss_weights=weights, time_beta=(1.0, 1.0))
    narrow = labelled()
    wide = labelled("left")
    wide = {
        name: torch.nn.functional.pad(value, (0, 3), value=-100 if name == "labels" else 0)
        for name, value in wide.items()
    }
    first, second = winners_of(model, narrow), winners_of(model, wide)
    torch.testing.assert_close(first.loss_terms, second.loss_terms, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_gate_learns_the_winners_and_the_target_its_reconstruction():
    weights = dict.fromkeys(DEFAULT_LOSS_WEIGHTS, 0.0) | {"token": 1.0, "gate": 1.0, "reconstruction": 1.0}
    # With the gate's opinion in it: where every expert explains a row fully, the winner is any of them.
    model = model_with("target", True, loss_weights=weights, winner_prior=1.0).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    batch = labelled()
    losses = []
    for _ in range(60):
        output = model(**batch)
        losses.append({name: float(term) for name, term in output.loss_terms.items()})
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name in ("token", "gate", "reconstruction"):
        last = sum(terms[name] for terms in losses[-10:]) / 10
        assert last < 0.5 * losses[0][name], name


@pytest.mark.parametrize("change", ["bfloat16", "checkpointing", "lora", "mamba"])
def test_it_trains_as_everything_else_does(change):
    model = model_with("block", True, backbone="mamba" if change == "mamba" else "transformer").train()
    experts = model.model.flow.experts
    if change == "bfloat16":
        model = model.to(torch.bfloat16)
    elif change == "checkpointing":
        model.gradient_checkpointing_enable()
    elif change == "lora":
        targets = ["model.flow.experts.up_proj", "model.flow.experts.down_proj"]
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], target_parameters=targets, lora_dropout=0))
    loss = model(**labelled()).loss
    loss.backward()
    assert torch.isfinite(loss)
    weights = dict(model.named_parameters())
    touched = [name for name in weights if "experts" in name and weights[name].grad is not None]
    assert touched and all(torch.isfinite(weights[name].grad).all() for name in touched)
    assert change == "lora" or experts.down_proj.grad.any()


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = model_with("target", True).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        winners_of(model, labelled()).loss.backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


# The configuration


def test_the_paper_s_preset_chooses_for_each_token_once_from_noise():
    config = YanConfig.from_preset("paper", hidden_size=32, vocab_size=60)
    assert (config.expert_scope, config.reselect_experts, config.start_state) == ("token", False, "noise")
    assert config.loss_weights["gate"] == config.loss_weights["reconstruction"] == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expert_scope": "row"}, "expert_scope"),
        ({"start_state": "aligned?"}, "start_state"),
        ({"expert_scope": "block"}, "routing_block_size"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        small_config(**fields)


def test_generate_can_override_the_scope():
    model = model_with("target", False)
    ids = batch_of_rows([7])[1]
    options = {"seeds": [1], "target_lengths": 6, "return_dict_in_generate": True, "output_expert_indices": True}
    experts = model.generate(ids, expert_scope="token", reselect_experts=True, **options).expert_indices
    assert experts.shape == (3, 1, 6) and len(experts.unique()) > 1
    with pytest.raises(ValueError, match="expert_scope"):
        model.generate(ids, expert_scope="row")


def test_saved_and_loaded_it_gives_the_same(tmp_path):
    model = model_with("target", True)
    with torch.no_grad():
        model.model.start_proj.weight += 0.1 * torch.randn(32, 32)
    ids = batch_of_rows([7])[1]
    model.save_pretrained(tmp_path)
    loaded = YanForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(ids, seeds=[1]), model.generate(ids, seeds=[1]))


def test_a_field_that_is_gone_is_refused_where_it_mattered():
    assert not hasattr(YanConfig(velocity_field="expert", detach_target_latents=False), "velocity_field")
    with pytest.raises(ValueError, match="velocity_field"):
        YanConfig(velocity_field="mixture")
