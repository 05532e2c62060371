# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The flow's start at the source's own tokens: lengths for each mask and each token, and known tokens that stay."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from testing_utils import small_config, small_model
from transformers.generation import CompileConfig

from yan_hf import YanForAutoEncoding, YanForConditionalGeneration
from yan_hf.layers import YanStartOffsets
from yan_hf.lengths import SourceInputs, likeliest_sums, match_masks, source_places, token_lengths_from
from yan_hf.sampling import decode_tokens


MASK, END, PAD = 4, 2, 0
BACKBONES = ["transformer", pytest.param("mamba", marks=pytest.mark.slow)]
# Rows with no mask, one, two next to each other, and three of which one is at either end.
ROWS = [[7, 8, 9, 10, END], [7, MASK, 9, END], [7, 8, MASK, MASK, 30, END], [MASK, 11, 12, MASK, 13, MASK]]


def padded(rows, side="right", extra=0):
    width = max(map(len, rows)) + extra
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[index, place], mask[index, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def model_with(start="aligned", backbone="transformer", **changes):
    backbones = {"encoder_backbone": backbone, "flow_backbone": backbone}
    model = small_model(start_state=start, max_token_length=4, max_position_embeddings=40, **backbones, **changes)
    # Zeros in a new model, which would hide what depends on it.
    torch.nn.init.normal_(model.model.start_offsets.weight, generator=torch.Generator().manual_seed(0))
    return model


def generate(model, batch, **options):
    options = {"seeds": list(range(len(batch["input_ids"]) * options.get("num_return_sequences", 1))), **options}
    return model.generate(**batch, return_dict_in_generate=True, **options)


def is_filled(row, text):
    """Whether a text is the source with something in the place of every mask."""
    return match_masks(row, text, MASK) is not None


# The functions


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([5, 6, MASK]), min_size=1, max_size=8), st.data())
def test_fillings_are_found_in_a_target(source, data):
    fillings = [data.draw(st.lists(st.sampled_from([5, 6]), max_size=3)) if i == MASK else [i] for i in source]
    target = [token for filling in fillings for token in filling] + [END] * data.draw(st.integers(0, 2))
    found = match_masks(source, target, MASK, END)
    if MASK not in source:
        assert found is None
        return
    rest = iter(target)
    laid = [[next(rest) for _ in range(length)] for length in found]
    assert all(part == [token] for token, part in zip(source, laid) if token != MASK)
    assert set(rest) <= {END}


def test_what_is_no_filled_source_has_no_lengths():
    assert match_masks([7, MASK, 9], [7, 5, 8], MASK) is None
    assert match_masks([7, MASK, 9], [9], MASK) is None
    assert match_masks([7, MASK, 8, MASK, 9], [7, 9], MASK) is None
    assert match_masks([7, MASK, 9], [-100, 5, 9], MASK) == [1, 1, 1]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 5), st.integers(0, 6), st.integers(0, 6))
def test_the_likeliest_sums_are_those_of_a_full_search(seed, num_tokens, count, lowest, more):
    generator = torch.Generator().manual_seed(seed)
    log_probs = torch.randn(2, num_tokens, 4, generator=generator).log_softmax(-1)
    limits = torch.tensor([lowest, 0]), torch.tensor([lowest + more, 12])
    lengths, scores = likeliest_sums(log_probs, *limits, count)
    for row in range(2):
        ways = [
            (sum(float(log_probs[row, m, way[m]]) for m in range(num_tokens)), way)
            for way in itertools.product(range(4), repeat=num_tokens)
            if limits[0][row] <= sum(way) <= limits[1][row]
        ]
        ways = sorted(ways, reverse=True)[:count]
        assert scores[row, len(ways) :].eq(-torch.inf).all()
        for (score, way), found, found_score in zip(ways, lengths[row].tolist(), scores[row].tolist()):
            assert list(way) == found and abs(score - found_score) < 1e-4


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_position_starts_from_the_token_that_stands_there(side):
    batch = padded([[7, 8, 9], [7, MASK, 9]], side, extra=2)
    mask = batch["attention_mask"]
    lengths = torch.zeros_like(mask)
    lengths[1, mask[1] == 1] = torch.tensor([1, 3, 1])
    canvas = torch.tensor([[1] * 5 + [0] * 3, [1] * 7 + [0]])
    places = source_places(mask, canvas, lengths) - mask.argmax(-1, keepdim=True)
    assert places[0, :5].tolist() == [0, 1, 1, 2, 2]  # stretched
    assert places[1, :7].tolist() == [0, 1, 1, 1, 2, 2, 2]  # what is behind the text from its last token


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.integers(0, 3), st.sampled_from(["left", "right"]))
def test_positions_know_how_many_neighbours_share_their_token(places, extra, side):
    offsets = YanStartOffsets(8, 2)
    torch.nn.init.normal_(offsets.weight)
    canvas = torch.ones(1, len(places), dtype=torch.long)
    ids = torch.tensor([places])
    runs = [len(list(run)) for _, run in itertools.groupby(places)]
    before = [index for size in runs for index in range(size)]
    behind = [size - 1 - index for size in runs for index in range(size)]
    rows = offsets.weight
    expected = torch.stack([rows[min(b, 3)] + rows[4 + min(a, 3)] for b, a in zip(before, behind)])[None]
    assert torch.equal(offsets(ids, canvas), expected)
    pad = (extra, 0) if side == "left" else (0, extra)
    # Padding takes the places of its neighbours.
    wider = torch.nn.functional.pad(ids[None].float(), pad, mode="replicate")[0].long()
    found = offsets(wider, torch.nn.functional.pad(canvas, pad))
    assert torch.equal(found[:, pad[0] : pad[0] + len(places)], expected)


def test_a_new_model_can_copy_its_source():
    kind = {"embedding_scale": 0.2, "tie_word_embeddings": True, "solver_steps": 3}
    ids = torch.randint(5, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    size = {"vocab_size": 60, "hidden_size": 64, "start_state": "fertility", "max_position_embeddings": 40, **kind}
    copied = []
    for scale in (0.0, 1.0):
        torch.manual_seed(0)
        model = YanForConditionalGeneration(small_config(residual_init_scale=scale, **size)).eval()
        written = generate(model, batch, target_lengths=torch.ones_like(ids), eos_token_id=[]).sequences
        copied.append((written == ids).float().mean().item())
    assert copied[0] == 1.0 and copied[1] < 0.9


def test_limits_that_no_filling_can_meet_are_named():
    batch = padded([[7, MASK, 9, END]])
    source, is_mask = SourceInputs(*batch.values(), None), batch["input_ids"] == MASK
    limits = torch.tensor([9]), torch.tensor([12])
    limits = torch.tensor([1]), torch.tensor([2])
    with pytest.raises(ValueError, match="3 known tokens and 1 others"):
        token_lengths_from(source, is_mask, torch.zeros(1, 4, 5), *limits, 1)


def test_a_given_total_may_be_longer_than_the_head_s_longest_lengths():
    """And the other rows of the batch get what they get alone."""
    model = model_with(keep_known=True)
    output = generate(model, padded(ROWS[1:]), target_lengths=[12, 16, 8])
    assert output.lengths.tolist() == [12, 16, 8]
    alone = generate(model, padded(ROWS[3:]), target_lengths=[8], seeds=[2])
    assert torch.equal(output.sequences[2, :8], alone.sequences[0])


def test_known_tokens_stand_for_themselves_alone():
    lengths = torch.tensor([[2, 0, 0, 1]])
    with pytest.raises(ValueError, match="every known token stands for itself"):
        model_with()(**padded([ROWS[1]]), labels=torch.tensor([[7, 20, END]]), token_lengths=lengths)


def test_an_untrained_length_head_asks_for_what_is_missing():
    model = model_with()
    model.config.length_head_trained = False
    with torch.no_grad():
        model.length_head.query.zero_()
    assert generate(model, padded(ROWS[:1]), target_lengths=5).lengths <= 5  # has no mask
    assert generate(model, padded(ROWS[1:2]), mask_lengths=[[2]], keep_known=True).lengths == 5
    for options in ({}, {"target_lengths": 5}):
        with pytest.raises(ValueError, match="Pass `mask_lengths`"):
            generate(model, padded(ROWS[1:2]), **options)


# Training


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("keep_known", [False, True])
@pytest.mark.parametrize("scope", ["token", "target"])
def test_the_loss_does_not_depend_on_padding(backbone, keep_known, scope):
    experts = 1 if scope == "token" else 4  # which are drawn position by position
    fields = {"expert_scope": scope, "num_experts": experts, "init_noise": 0.0}
    model = model_with(backbone=backbone, keep_known=keep_known, **fields)
    model.config.loss_weights = {**model.config.loss_weights, "flow": 0.0, "mmd": 0.0}
    targets = [[7, 8, 9, 5, END], [7, 20, 21, 9, END], [7, 8, 22, 23, 30, END], [24, 11, 12, 13, 25]]
    losses = []
    for side, extra in (("right", 0), ("left", 3)):
        labels = padded(targets, extra=extra)
        labels = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
        torch.manual_seed(0)
        output = model(**padded(ROWS, side, extra), labels=labels)
        losses.append(output.loss)
        if keep_known:
            assert output.logits.shape == (5 + 2 + 2 + 2, 60)  # all of the row without masks, and the fillings
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scope", ["token", "block", "target"])
def test_a_batch_of_empty_fillings_has_finite_gradients(scope):
    model = model_with(keep_known=True, expert_scope=scope, routing_block_size=2).train()
    model.config.loss_weights = dict.fromkeys(model.config.loss_weights, 1.0)
    output = model(**padded(ROWS[1:2]), labels=torch.tensor([[7, 9, END]]))
    output.loss.backward()
    assert output.logits.shape == (0, 60) and output.loss.isfinite()
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)


def test_targets_that_are_no_filled_source_are_refused():
    model = model_with()
    with pytest.raises(ValueError, match="known tokens are not all there"):
        model(**padded([ROWS[1]]), labels=torch.tensor([[7, 20, END]]))
    with pytest.raises(ValueError, match="not embeddings"):
        model(inputs_embeds=torch.zeros(1, 3, 32), labels=torch.tensor([[7, 20, END]]))
    with pytest.raises(ValueError, match="align=True"):
        model_with("fertility")(**padded([ROWS[1]]), labels=torch.tensor([[7, 20, END]]))
    lengths = torch.tensor([[3, 1, 1, 1]])
    with pytest.raises(ValueError, match="`token_lengths`"):
        model_with("fertility")(**padded([ROWS[1]]), labels=torch.tensor([[7, 20, END]]), token_lengths=lengths)


def test_the_configuration_names_what_contradicts():
    with pytest.raises(ValueError, match="keep_known"):
        small_config(keep_known=True)
    with pytest.raises(ValueError, match="solver_steps_range"):
        small_config(solver_steps_range=[1, 3], loss_reduction="local")
    with pytest.raises(ValueError, match="mask_token_id"):
        small_config(start_state="aligned", mask_token_id=None)
    with pytest.raises(ValueError, match="keep_known"):
        small_model().generate(torch.tensor([[7, MASK]]), keep_known=True)


@pytest.mark.slow
def test_lengths_of_tokens_are_learnt():
    model = model_with("fertility").train()
    batch = padded([[7, 8, 9], [10, 11, 12]])
    lengths = torch.tensor([[1, 2, 0], [0, 1, 3]])
    labels = torch.tensor([[20, 21, 22, -100], [23, 24, 25, 26]])
    model.config.loss_weights["length"] = 1.0
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        model(**batch, labels=labels, token_lengths=lengths).loss.backward()
        optimizer.step()
    assert generate(model.eval(), batch).lengths.tolist() == [3, 4]


def test_a_generator_fixes_the_number_of_steps_too():
    model, labels = model_with(solver_steps_range=(1, 4)).train(), torch.tensor([[7, 20, 21, 9, END]])
    losses = []
    for _ in range(6):
        torch.randint(9, (1,))  # the global state moves on
        loss = model(**padded(ROWS[1:2]), labels=labels, generator=torch.Generator().manual_seed(3)).loss
        losses.append(float(loss.detach()))
    assert len(set(losses)) == 1


# Generation


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("start, keep_known", [("aligned", False), ("aligned", True), ("fertility", False)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_candidates": 2, "num_length_candidates": 3, "rerank": "joint"},
        {"do_sample": True, "temperature": 0.7, "num_return_sequences": 2},
        {"length_slack": 2, "expert_scope": "target", "reselect_experts": True},
        {"copy_bias": 1.5},
    ],
)
def test_a_row_does_not_depend_on_its_batch(backbone, start, keep_known, options):
    model = model_with(start, backbone, keep_known=keep_known)
    number = options.get("num_return_sequences", 1)
    singles = [
        generate(model, padded([row]), **options, seeds=list(range(index * number, (index + 1) * number)))
        for index, row in enumerate(ROWS)
    ]
    for side, extra in (("right", 0), ("left", 5)):
        batch = generate(model, padded(ROWS, side, extra), **options)
        for index, single in enumerate(singles):
            for sample in range(number):
                row = index * number + sample
                length = int(single.lengths[sample])
                assert int(batch.lengths[row]) == length
                assert torch.equal(batch.sequences[row, :length], single.sequences[sample, :length])


@pytest.mark.parametrize("start", ["aligned", "fertility", "stretched"])
def test_a_bias_makes_a_text_a_copy(start):
    model = model_with(start)
    batch = padded([[7, MASK, 9, 10, END], [7, 8, 9, END]], side="left")
    given = {"target_lengths": [[1] * 5, [1] * 4] if start == "fertility" else [5, 4]}
    plain, copied = (generate(model, batch, **given, copy_bias=bias) for bias in (0.0, 1e4))
    assert copied.lengths.tolist() == [5, 4] and copied.sequences[1, :4].tolist() == [7, 8, 9, END]
    first = copied.sequences[0].tolist()
    assert [first[0], *first[2:]] == [7, 9, 10, END] and first[1] != MASK  # a mask is copied from nowhere
    assert not torch.equal(plain.sequences, copied.sequences)
    with pytest.raises(
        ValueError, match="pass `input_ids`" if start == "aligned" else "`copy_bias` needs `input_ids`"
    ):
        embeds = model.get_input_embeddings()(batch["input_ids"])
        model.generate(inputs_embeds=embeds, attention_mask=batch["attention_mask"], copy_bias=1.0, **given)
    with pytest.raises(ValueError, match="starts at the source's tokens"):
        small_model().generate(**batch, copy_bias=1.0)


def test_a_text_ends_where_its_source_does():
    model = model_with("fertility")
    batch = padded([[7, 8, 9, END], [7, 8, 9, 10]])
    with torch.no_grad():
        model.lm_head.bias[END] = 1e3
    found = generate(model, batch, target_lengths=torch.tensor([[2, 1, 1, 2], [1, 1, 1, 1]]))
    assert found.lengths.tolist() == [6, 1]  # the second one has no end of its own
    assert found.sequences[0].tolist().index(END) == 5
    # With slack there is no telling where the end is.
    assert generate(model, batch, length_slack=1).lengths[0] == 1


def test_neighbours_from_one_token_do_not_write_the_same():
    model, batch = model_with("fertility"), padded([[7, 8, END]])
    lengths = {"target_lengths": torch.tensor([[3, 2, 1]]), "output_scores": True}
    with torch.no_grad():
        model.lm_head.bias[30] = 1e3
    output = generate(model, batch, **lengths)
    text, logits = output.sequences[0].tolist(), output.logits[0].clone()
    # Of the pairs (0, 1), (1, 2) and (3, 4) those that lose least have given way; 2 and 3 are of different tokens.
    logits[:, END] = -torch.inf
    (first, second), ranked = logits.topk(2).values.unbind(1), logits.topk(2).indices
    lost = first - second
    assert ranked[:, 0].tolist() == [30] * 6 and text[5] == 30
    gives = {int(lost[a] >= lost[b]) + a for a, b in ((0, 1), (1, 2), (3, 4))}
    assert text[:5] == [int(ranked[place, int(place in gives)]) for place in range(5)]
    expected = output.logits[0].log_softmax(-1).gather(1, output.sequences[0][:, None]).mean()
    torch.testing.assert_close(output.sequence_scores[0], expected)
    drawn = generate(model, batch, **lengths, do_sample=True)
    assert drawn.sequences[0, :5].tolist() == [30] * 5  # a draw is one of the distribution


def test_of_tokens_without_an_other_none_gives_way():
    head = torch.nn.Linear(2, 2, bias=False)
    states = torch.tensor([[[1.0, 0.0], [2.0, 0.0]]])
    with torch.no_grad():
        head.weight.copy_(torch.eye(2))
    options = {"goes_on": torch.tensor([[False, True]])}
    assert decode_tokens(head, states, **options).tokens.tolist() == [[1, 0]]
    assert decode_tokens(head, 0 * states, **options).tokens.tolist() == [[0, 1]]  # of equal ones the first
    alone = decode_tokens(head, states, **options, forbidden=torch.tensor([1]))
    assert alone.tokens.tolist() == [[0, 0]] and alone.has_choice


@pytest.mark.parametrize("backbone", BACKBONES)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.sampled_from([1, END, MASK, *range(5, 12)]), min_size=1, max_size=8), min_size=1, max_size=3
    ),
    seed=st.integers(0, 9),
)
def test_what_is_known_stays(backbone, rows, seed):
    """End tokens within the source too."""
    model = model_with(backbone=backbone)
    output = generate(model, padded(rows), keep_known=True, init_noise=3.0, seeds=[seed] * len(rows))
    for row, text, length in zip(rows, output.sequences.tolist(), output.lengths.tolist()):
        if MASK in row and set(row) != {MASK}:
            filled = text[:length]
            assert is_filled(row, filled)
            known = sum(token != MASK for token in row)
            assert sum(token in (PAD, 1, END, MASK) for token in filled) == sum(token in (1, END) for token in row)
            assert length - known <= 4 * row.count(MASK)


def test_lengths_can_be_given_for_each_mask():
    model = model_with()
    lengths = [[0, 0, 0], [2, 0, 0], [0, 3, 0], [1, 2, 1]]
    with pytest.raises(ValueError, match="Row 0 has no mask"):
        generate(model, padded(ROWS), target_lengths=lengths)
    rows, lengths = ROWS[1:], lengths[1:]
    output = generate(model, padded(rows), target_lengths=lengths, keep_known=True)
    assert output.length_mode == "given" and output.lengths.tolist() == [5, 7, 7]
    for row, text, given_lengths in zip(rows, output.sequences.tolist(), lengths):
        rest, given_lengths = iter(text), iter(given_lengths)
        for token in row:
            part = [next(rest) for _ in range(next(given_lengths) if token == MASK else 1)]
            assert token == MASK or part == [token]
    total = generate(model, padded(rows), target_lengths=[6, 8, 7], keep_known=True)
    assert total.lengths.tolist() == [6, 8, 7]
    ragged = generate(model, padded(rows), mask_lengths=[[2], [0, 3], [1, 2, 1]], keep_known=True)
    assert torch.equal(ragged.sequences, output.sequences)
    for wrong in ([[1, 2]] * 3, [[-1, 0, 0]] * 3, [[0.5, 0, 0]] * 3, [[2], [3], [1, 2, 1]], [[2, 5, 0]] * 3, [[1]]):
        with pytest.raises(ValueError, match="(target|mask)_lengths"):
            generate(model, padded(rows), target_lengths=wrong)
    for wrong, more in (([1, 2, 3], {}), ([[2], [0, 3], [1, 2, 1]], {"target_lengths": 9})):
        with pytest.raises(ValueError, match="mask_lengths"):
            generate(model, padded(rows), mask_lengths=wrong, **more)
    with pytest.raises(ValueError, match="start_state='noise'"):
        small_model().generate(torch.tensor([[7, MASK]]), mask_lengths=[[1]])


def test_several_lengths_are_combinations_the_likeliest_first():
    model, batch = model_with(), padded([ROWS[2]])
    with torch.no_grad():
        log_probs = model(**batch).token_length_logits[0, 2:4].log_softmax(-1)
    ways = sorted(
        itertools.product(range(5), repeat=2), key=lambda way: -float(log_probs[0, way[0]] + log_probs[1, way[1]])
    )
    seen = []
    for way in ways[:3]:
        seen.append(generate(model, batch, target_lengths=[list(way)], seeds=[3]))
    best = max(range(3), key=lambda index: float(seen[index].sequence_scores))
    output = generate(model, batch, num_length_candidates=3, seeds=[3])
    length = int(output.lengths)
    assert output.lengths == seen[best].lengths
    assert torch.equal(output.sequences[:, :length], seen[best].sequences[:, :length])


def test_the_known_tokens_are_in_the_drafts_too():
    drafts = []
    streamer = SimpleNamespace(put=lambda ids: None, end=lambda: None, put_draft=lambda ids: drafts.append(ids))
    rows = ROWS[1:]
    generate(model_with(), padded(rows), keep_known=True, streamer=streamer, num_candidates=2)
    assert len(drafts) == 3
    for draft in drafts:
        for row, text in zip(rows, draft.tolist()):
            assert is_filled(row, [token for token in text if token != PAD])


def test_the_scores_are_those_of_the_fillings():
    output = generate(model_with(), padded(ROWS[1:2]), keep_known=True, target_lengths=[[2]], output_scores=True)
    log_probs = output.logits[0].log_softmax(-1)
    text = output.sequences[0]
    expected = (log_probs[1, text[1]] + log_probs[2, text[2]]) / 2
    torch.testing.assert_close(output.sequence_scores[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("start, keep_known", [("aligned", True), ("fertility", False), ("stretched", False)])
def test_the_compiled_path_gives_the_same(start, keep_known):
    model = model_with(start, keep_known=keep_known)
    options = {"compile": True, "compile_config": CompileConfig(fullgraph=True, backend="aot_eager", mode=None)}
    for more in ({}, {"num_candidates": 2, "num_length_candidates": 2}):
        plain = generate(model, padded(ROWS, "left"), **more)
        fast = generate(model, padded(ROWS, "left"), **more, **options)
        assert torch.equal(plain.sequences, fast.sequences) and torch.equal(plain.lengths, fast.lengths)
        torch.testing.assert_close(plain.latents, fast.latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", ["aligned", "fertility"])
def test_offload_and_saving_change_nothing(start, tmp_path):
    model = model_with(start, keep_known=start == "aligned")
    expected = generate(model, padded(ROWS)).sequences
    model.enable_expert_offload(max_resident_experts=1)
    assert torch.equal(generate(model, padded(ROWS)).sequences, expected)
    model.disable_expert_offload()
    model.save_pretrained(tmp_path)
    loaded = YanForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(generate(loaded, padded(ROWS)).sequences, expected)
    report = YanForAutoEncoding.from_pretrained(tmp_path, output_loading_info=True)[1]
    assert not report["unexpected_keys"]
