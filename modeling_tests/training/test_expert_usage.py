# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What the callback on experts reports, and which experts it puts to work."""

import pytest
import torch
from testing_utils import small_model
from transformers import Seq2SeqTrainingArguments

from yan_hf import ExpertUsageCallback, YanTrainer
from yan_hf.modeling_yan import YanOutput


def output_of(scores):
    """A forward's output whose expert scores are `(C, B, K)`."""
    scores = torch.tensor(scores)[:, :, None]
    return YanOutput(
        expert_scores=scores,
        expert_indices=scores.argmax(-1),
        choice_log_probs=scores.log_softmax(-1),
        choice_mask=torch.ones(scores.shape[1:3], dtype=torch.bool),
    )


def callback_after(scores, **options):
    model, callback = (
        small_model(num_experts=3, expert_scope="target").train(),
        ExpertUsageCallback(every=1, **options),
    )
    callback.collect(model, (), output_of(scores))
    return model, callback


def test_an_expert_that_two_share_becomes_a_copy_of_the_one_that_serves_two_kinds():
    # Experts 0 and 1 explain the first rows equally well; expert 2 serves the others, badly.
    scores = [[[-1.0, -1.1, -50.0], [-1.1, -1.0, -50.0], [-90.0, -90.0, -30.0], [-90.0, -90.0, -30.0]]]
    model, callback = callback_after(scores)
    flow = model.model.flow
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    before = {name: weight.clone() for name, weight in flow.named_parameters()}
    callback.revive(model, optimizer, 1)
    ((step, idle, source),) = callback.revived
    assert (step, source) == (1, 2) and idle in (0, 1)
    for name, weight in flow.experts.named_parameters():
        old = before[f"experts.{name}"]
        change = (weight[idle] - old[source]).abs().max()
        assert 0 < change < old.std() and torch.equal(weight[1 - idle], old[1 - idle])
        assert not optimizer.state[weight]["exp_avg"][idle].any() and optimizer.state[weight]["exp_avg"][source].any()
    assert torch.equal(flow.layers[0].feed_forward.up_proj.weight, before["layers.0.feed_forward.up_proj.weight"])


@pytest.mark.parametrize("skew", [1, 3])
def test_experts_that_each_serve_their_kind_are_left_alone(skew):
    kinds = [[-0.1, -60.0, -60.0]] * skew + [[-60.0, -0.1, -60.0], [-60.0, -60.0, -0.1]]
    model, callback = callback_after([kinds])
    callback.revive(model, None, 1)
    assert not callback.revived


@pytest.mark.parametrize("is_frozen", [False, True])
def test_it_only_reports_where_it_is_told_to_or_experts_are_frozen(is_frozen):
    model, callback = callback_after([[[-1.0, -90.0, -90.0]] * 4], **({} if is_frozen else {"ratio": 0}))
    if is_frozen:
        model.freeze("flow")
    callback.revive(model, None, 1)
    assert not callback.revived


@pytest.mark.parametrize("anew", [False, True])
def test_every_block_that_counts_is_a_choice(anew):
    """Fillings behind known tokens, whose own blocks have nothing to explain, and rows padded on either side."""
    fields = {"start_state": "aligned", "keep_known": True, "mask_token_id": 4, "routing_block_size": 2}
    model = small_model(expert_scope="block", reselect_experts=anew, **fields).train()
    ids = torch.tensor([[7, 8, 9, 4, 2, 0], [5, 4, 6, 4, 9, 2]])
    labels = torch.tensor([[7, 8, 9, 11, 12, 13, 2, -100], [5, 21, 22, 23, 6, 9, 2, -100]])
    lengths = torch.tensor([[1, 1, 1, 3, 1, 0], [1, 3, 1, 0, 1, 1]])
    output = model(ids, (ids != 0).long(), labels=labels, token_lengths=lengths)
    # The fillings are at 3 to 5 in the first row and at 1 to 3 in the second, in blocks of 2.
    places = torch.tensor([[0, 0, 0, 1, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0]]).bool()
    assert torch.equal(output.choice_mask, places)
    callback = ExpertUsageCallback()
    callback.collect(model, (), output)
    wins = output.expert_indices[:, places].flatten().bincount(minlength=4).float()
    assert torch.equal(callback._logged[0], wins) and (callback._logged[4] == len(output.expert_indices) * 4).all()
    log_probs = output.choice_log_probs[:, places]
    entropy = -(log_probs.exp() * log_probs).sum(-1).sum()
    torch.testing.assert_close(callback._logged[3], entropy.expand(4))


def test_shares_and_entropies_are_logged(tmp_path):
    model = small_model(num_experts=3, expert_scope="target", reselect_experts=True)
    rows = [{"input_ids": [5 + i, 6, 7], "labels": [5 + i, 8]} for i in range(8)]
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=4, logging_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True
    )

    def collate(features):
        return {name: torch.tensor([feature[name] for feature in features]) for name in features[0]}

    trainer = YanTrainer(
        model, arguments, data_collator=collate, train_dataset=rows, callbacks=[ExpertUsageCallback(every=1)]
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for log in logs:
        assert sum(log[f"expert_share_{expert}"] for expert in range(3)) == pytest.approx(1, abs=1e-3)
        assert 0 <= log["winner_entropy"] <= 1.0987 and 0 < log["gate_entropy"] <= 1.0987
    assert not model._forward_hooks or not any(
        getattr(hook, "__self__", None).__class__ is ExpertUsageCallback for hook in model._forward_hooks.values()
    )


@pytest.mark.parametrize("options", [{"ratio": 1.0}, {"every": 0}, {"noise": 0.0}, {"until": 2.0}])
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        ExpertUsageCallback(**options)
