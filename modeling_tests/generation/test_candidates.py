# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Noise from seeds, length candidates, and the choice of the best candidate."""

import numpy as np
import pytest
import torch
from testing_utils import batch_of_rows, small_config, small_model

from yan_hf import YanGenerationConfig
from yan_hf.lengths import EncodedSource, SourceInputs, choose_lengths, given_lengths, predicted_lengths
from yan_hf.sampling import (
    CandidateLayout,
    NoiseSource,
    best_candidates,
    consensus,
    cycle_distance,
    token_f1,
)


def resolved(**fields):
    return YanGenerationConfig(**fields).resolve(small_config())


# Noise


def layout_of(lengths, num_samples=1, num_lengths=1, width=None):
    lengths = torch.as_tensor(lengths)
    layout = CandidateLayout(lengths, torch.zeros(len(lengths)), 1, num_samples, num_lengths)
    if width is not None:
        layout.width = width
    return layout


def test_a_row_s_noise_depends_on_its_seed_and_length_alone():
    batched = NoiseSource(layout_of([3, 7, 5], width=9), seeds=[4, 5, 4])
    drawn = [batched.draw(torch.randn, 6), batched.draw(torch.rand, 4), batched.draw(torch.rand, dtype=torch.float64)]
    assert [tuple(noise.shape) for noise in drawn] == [(3, 9, 6), (3, 9, 4), (3, 9)]
    for row, (length, seed) in enumerate([(3, 4), (7, 5), (5, 4)]):
        single = NoiseSource(layout_of([length]), seeds=[seed])
        alone = [single.draw(torch.randn, 6), single.draw(torch.rand, 4), single.draw(torch.rand, dtype=torch.float64)]
        for noise, expected in zip(drawn, alone):
            assert torch.equal(noise[row, :length], expected[0])
            assert (noise[row, length:] == 0).all()


def test_candidates_have_their_own_noise_and_lengths_share_it():
    source = NoiseSource(layout_of([4] * 8, 2, 2), seeds=torch.tensor([7, 8]))
    noise = source.draw(torch.randn, 16)
    assert torch.equal(noise[0], noise[1]) and torch.equal(noise[2], noise[3])
    assert not torch.equal(noise[0], noise[2]) and not torch.equal(noise[2], noise[6])
    alone = NoiseSource(layout_of([4]), seeds=[7]).draw(torch.randn, 16)
    assert torch.equal(noise[0], alone[0])


def test_without_seeds_the_generator_decides():
    draws = [
        NoiseSource(layout_of([2, 3]), torch.Generator().manual_seed(seed)).draw(torch.randn, 5) for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


# Lengths


def test_the_likeliest_lengths_within_the_limits_come_first():
    logits = torch.zeros(2, 24)
    logits[0, [9, 4, 19, 2]] = torch.tensor([4.0, 3.0, 9.0, 2.0])  # lengths 10, 5, 20, 3
    logits[1, 6] = 1.0
    config = resolved(num_length_candidates=3, max_new_tokens=12, min_new_tokens=3)
    lengths, log_probs = predicted_lengths(logits, config)
    assert lengths[0].tolist() == [10, 5, 3] and lengths[1, 0] == 7
    torch.testing.assert_close(log_probs[0], logits[0, 2:12].log_softmax(-1)[[7, 2, 0]])
    encoded = EncodedSource(None, logits, None)
    source = SourceInputs(torch.full((2, 4), 5), None, None)
    repeated = choose_lengths(small_config(), config, source, None, encoded, None, 2)
    assert torch.equal(repeated[0], lengths.repeat_interleave(2, dim=0))
    assert torch.equal(repeated[1], log_probs.repeat_interleave(2, dim=0))
    slack = resolved(num_length_candidates=3, max_new_tokens=12, min_new_tokens=3, length_slack=4)
    assert predicted_lengths(logits, slack)[0][0].tolist() == [12, 9, 7]


def test_no_more_length_candidates_than_lengths():
    config = resolved(num_length_candidates=9, max_new_tokens=4, min_new_tokens=3)
    assert sorted(predicted_lengths(torch.randn(1, 24), config)[0][0].tolist()) == [3, 4]


@pytest.mark.parametrize("options", [{"num_length_candidates": 2}, {"length_slack": 1}])
def test_given_lengths_leave_nothing_to_choose(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        given_lengths(3, resolved(**options), 24, 2, torch.device("cpu"))


@pytest.mark.parametrize("rerank", ["score", "joint"])
@pytest.mark.parametrize("candidates", [1, 4])
def test_the_best_of_the_length_candidates_is_kept(candidates, rerank):
    """Against a call for each length."""
    model = small_model()
    _, ids, mask = batch_of_rows([4, 9, 6])
    arguments = {"seeds": [1, 2, 3], "return_dict_in_generate": True, "eos_token_id": [59]}
    output = model.generate(ids, mask, num_length_candidates=candidates, rerank=rerank, **arguments)
    with torch.no_grad():
        logits = model(ids, mask).length_logits
    order = logits.argsort(dim=-1, descending=True, stable=True)[:, :candidates] + 1
    weights = logits.log_softmax(-1).gather(1, order - 1)
    for row in range(3):
        singles = [model.generate(ids, mask, target_lengths=int(length), **arguments) for length in order[row]]
        scores = torch.stack([single.sequence_scores[row] for single in singles])
        lengths = torch.stack([single.lengths[row] for single in singles])
        best = int((scores + (weights[row] / lengths if rerank == "joint" else 0)).argmax())
        torch.testing.assert_close(output.sequence_scores[row], scores[best], rtol=1e-5, atol=1e-5)
        assert int(output.lengths[row]) <= int(order[row, best])


def test_length_mode_says_where_the_length_came_from():
    model = small_model()
    model.length_head.down_proj.weight.data.zero_()
    model.length_head.down_proj.bias.data[4] += 99.0  # five tokens
    ids = torch.tensor([[5, 6, 7]])
    arguments = {"return_dict_in_generate": True, "seeds": [0]}
    plain = model.generate(ids, **arguments)
    slack = model.generate(ids, length_slack=3, **arguments)
    assert plain.length_mode == "predicted" and slack.length_mode == "slack"
    assert plain.latents.shape[1] == 5 and slack.latents.shape[1] == 8
    assert model.generate(ids, length_slack=3, max_new_tokens=6, **arguments).latents.shape[1] == 6
    assert model.generate(ids, target_lengths=5, **arguments).length_mode == "given"


# Choice


def test_token_f1_counts_repeated_tokens():
    assert token_f1([5, 6, 6], [6, 6, 7]) == pytest.approx(2 * 2 / 6)
    assert token_f1([], []) == 1 and token_f1([], [5]) == 0 and token_f1([5], [6]) == 0


def test_consensus_prefers_the_middle():
    assert consensus([[5]]) == [1.0]
    utility = consensus([[5, 6], [5, 6], [5, 7], [8, 9]])
    assert int(np.argmax(utility)) == 0 and utility[0] == pytest.approx((1 + 0.5 + 0) / 3) and utility[3] == 0


def test_best_candidates_break_ties_by_score_and_then_by_order():
    utility = torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 2.0]])
    scores = torch.tensor([[-3.0, -1.0, 0.0], [-1.0, -1.0, -2.0]])
    assert best_candidates(utility, scores).tolist() == [1, 3]


def test_cycle_distance_by_hand():
    latents = torch.tensor([[[1.0, 2.0], [3.0, 3.0], [9.0, 9.0]]])
    encoded = torch.tensor([[[1.0, 0.0], [3.0, 5.0], [0.0, 0.0]]])
    kept = torch.tensor([[True, True, False]])
    assert float(cycle_distance(latents, encoded, kept)) == pytest.approx((2.0 + 2.0) / 2)


@pytest.mark.parametrize("rerank", ["score", "cycle", "mbr"])
def test_reranking_keeps_the_candidate_it_says(rerank):
    """Against all candidates, drawn one by one by their own seeds."""
    model = small_model()
    _, ids, mask = batch_of_rows([4, 9])
    arguments = {"target_lengths": 6, "return_dict_in_generate": True, "eos_token_id": [59], "output_trajectory": True}
    output = model.generate(ids, mask, num_candidates=4, rerank=rerank, seeds=[3, 9], **arguments)
    for row, seed in enumerate((3, 9)):
        seeds = [NoiseSource._candidate_seed(seed, candidate) for candidate in range(4)]
        assert seeds[0] == seed and len(set(seeds)) == 4
        singles = [
            model.generate(ids[row : row + 1], mask[row : row + 1], seeds=[single], **arguments) for single in seeds
        ]
        scores = torch.cat([single.sequence_scores for single in singles])
        texts = [single.sequences[0, : int(single.lengths)].tolist() for single in singles]
        if rerank == "score":
            utility = scores
        elif rerank == "mbr":
            utility = torch.tensor(consensus([[token for token in text if token not in (0, 1, 59)] for text in texts]))
        else:
            distances = []
            for single in singles:
                kept = torch.arange(6) < single.lengths[:, None]
                with torch.no_grad():
                    encoded = model.model.encode(single.sequences, kept.long()).last_hidden_state
                distances.append(cycle_distance(single.latents, encoded, kept))
            utility = -torch.cat(distances)
        best = int(best_candidates(utility[None], scores[None]))
        length = int(singles[best].lengths)
        assert output.sequences[row, :length].tolist() == texts[best]
        torch.testing.assert_close(output.sequence_scores[row], scores[best], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.trajectory[:, row], singles[best].trajectory[:, 0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(output.trajectory[-1, row], output.latents[row])


def test_candidates_are_drawn_for_each_returned_sequence():
    model = small_model()
    _, ids, mask = batch_of_rows([4, 9])
    arguments = {"num_candidates": 2, "target_lengths": 5, "return_dict_in_generate": True, "output_scores": True}
    output = model.generate(ids, mask, num_return_sequences=3, seeds=list(range(6)), **arguments)
    assert output.sequences.shape[0] == 6 and output.logits.shape == (6, 5, 60)
    for row in range(6):
        source = slice(row // 3, row // 3 + 1)
        single = model.generate(ids[source], mask[source], seeds=[row], **arguments)
        assert torch.equal(output.sequences[row, : int(single.lengths)], single.sequences[0, : int(single.lengths)])
        torch.testing.assert_close(output.logits[row], single.logits[0], rtol=1e-4, atol=1e-4)
