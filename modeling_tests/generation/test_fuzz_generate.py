# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Drawn calls of `generate`: a row's result depends on itself alone, limits are kept, and what is refused is refused by a
`ValueError`, or a `TypeError` for what is no tensor or list, that names an argument. 300 draws of each;
`YAN_HF_FUZZ=5000` (`make fuzz`) draws as many, new ones.
"""

import os
import re
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from testing_utils import small_model
from transformers.generation.logits_process import SuppressTokensLogitsProcessor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from yan_hf import YanGenerationConfig
from yan_hf.inference import compiled
from yan_hf.solver import SOLVERS


pytestmark = pytest.mark.slow
TABLE = 24  # positions of the small models
KINDS = {
    "transformer": {},
    "mamba encoder": {"encoder_backbone": "mamba"},
    "mamba flow": {"flow_backbone": "mamba"},
    "block routing": {"routing": "block", "routing_block_size": 3, "min_experts": 2},
    "many experts": {"num_experts": 12, "gate_temperature": 0.5},
    "one expert, tied tables": {"num_experts": 1, "tie_word_embeddings": True},
    "an expert for the target, anew, from the source": {
        "expert_scope": "target",
        "reselect_experts": True,
        "start_state": "stretched",
    },
    "an expert for each block": {"expert_scope": "block", "routing_block_size": 3, "start_state": "stretched"},
    "a length for each token": {"start_state": "fertility", "max_token_length": 24, "repeat_window": 2},
    "known tokens around masks": {"start_state": "aligned", "keep_known": True},
    "untrained length head": {"length_head_trained": False, "attention_bias": True},
}
FUZZ = int(os.environ.get("YAN_HF_FUZZ", "0"))
drawn = settings(
    max_examples=FUZZ or 300,
    deadline=None,
    derandomize=not FUZZ,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # a smaller failing call takes long to find, and says little more
    suppress_health_check=list(HealthCheck),
)


@cache
def model_of(kind: str):
    dropouts = {"hidden_dropout": 0.2, "latent_noise": 0.3}  # which a text has no part in, whatever the mode
    model = small_model(encoder_layers=1, flow_layers=2, cross_attention_layers=[0], **dropouts, **KINDS[kind])
    with torch.no_grad():
        model.lm_head.bias[model.config.eos_token_id] += 1.5  # writes end tokens now and then
        if not model.config.length_head_trained:
            model.length_head.query.zero_()
    return model


class Recorder(BaseStreamer):
    """Keeps what a streamer gets."""

    def __init__(self):
        self.values, self.drafts, self.ended = [], 0, False

    def put(self, value):
        self.values.append(value)

    def put_draft(self, value):
        self.drafts += 1

    def end(self):
        self.ended = True


@st.composite
def batches(draw):
    """Rows of tokens, and a batch in which they stand anywhere, in their order: padding on both sides and holes."""
    lengths = draw(st.lists(st.sampled_from([1, 2, 5, 11, TABLE]), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    rows = [torch.randint(5, 60, (length,), generator=generator) for length in lengths]
    rows = [row.masked_fill(row < 14, 4) for row in rows]  # masks, which mean something to some models
    width = max(lengths) + draw(st.integers(0, 3))
    ids = torch.randint(0, 60, (len(rows), width), generator=generator)  # what stands in the padding is anything
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        holes = draw(st.sampled_from(["left", "right", "anywhere"]))
        places = torch.randperm(width, generator=generator)[: len(row)].sort().values
        places = {"left": slice(width - len(row), None), "right": slice(len(row))}.get(holes, places)
        ids[index, places], mask[index, places] = row, 1
    return rows, ids, mask


@st.composite
def schedules(draw):
    kind = draw(st.sampled_from(["uniform", "cosine", "shifted", "list"]))
    if kind == "list":
        inner = sorted(set(draw(st.lists(st.integers(1, 99), max_size=3))))
        return {"time_schedule": [0.0, *(time / 100 for time in inner), 1.0]}
    schedule = {"time_schedule": kind, "num_inference_steps": draw(st.integers(1, 3))}
    return {**schedule, "time_shift": draw(st.sampled_from([0.5, 3.0]))} if kind == "shifted" else schedule


@st.composite
def lengths_of(draw, kind):
    if KINDS[kind].get("keep_known"):  # known tokens alone may be more than a limit allows
        return draw(st.sampled_from([{}, {"num_length_candidates": 2}, {"length_slack": 3}]))
    is_predicted = KINDS[kind].get("length_head_trained", True)
    longest = draw(st.integers(1, TABLE))
    given_lengths = [{"target_lengths": value} for value in (1, TABLE, "drawn")]
    predicted = [
        {},
        {"max_new_tokens": np.int64(longest), "min_new_tokens": draw(st.integers(1, longest))},
        {"max_new_tokens": longest, "num_length_candidates": draw(st.integers(2, 3))},
        {"length_slack": 3},
    ]
    return draw(st.sampled_from(predicted + given_lengths if is_predicted else given_lengths))


SAMPLED = [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 0, "min_p": 0.1}, {"typical_p": 0.8}]
NOW_AND_THEN = {
    "suppress_tokens": [3, 4, 7],
    "logits_processor": [SuppressTokensLogitsProcessor([5, 6])],
    "stopping_criteria": [MaxLengthCriteria(6), EosTokenCriteria(9)],
    "eos_token_id": [2, 11],
}


@st.composite
def readings(draw):
    options = {"do_sample": True, **draw(st.sampled_from(SAMPLED))} if draw(st.booleans()) else {}
    return {**options, **{name: value for name, value in NOW_AND_THEN.items() if draw(st.integers(0, 4)) == 0}}


@st.composite
def option_sets(draw, kind):
    options = {
        **draw(schedules()),
        **draw(lengths_of(kind)),
        **draw(readings()),
        "solver": draw(st.sampled_from(sorted(SOLVERS))),
        "num_return_sequences": draw(st.integers(1, 2)),
        "num_candidates": draw(st.integers(1, 2)),
        "rerank": draw(st.sampled_from(["score", "joint", "cycle", "mbr"])),
        "init_noise": draw(st.sampled_from([0.0, 0.7, 1.0])),
        "compile": draw(st.booleans()),
    }
    if KINDS[kind].get("start_state", "noise") != "noise":
        options["copy_bias"] = draw(st.sampled_from([0.0, 2.0]))
    options["expert_temperature"] = draw(st.sampled_from([0.5, 1.0, 2.0]))
    if draw(st.booleans()):
        routing = {"routing": "block", "routing_block_size": 2, "core_threshold": 0.5, "min_experts": 1}
        options.update(draw(st.sampled_from([{"routing": "token"}, routing, {**routing, "routing_top_k": 1}])))
    if draw(st.booleans()):
        options["expert_scope"] = draw(st.sampled_from(["token", "block", "target"]))
        options["reselect_experts"] = draw(st.booleans())
        if options["expert_scope"] == "block":
            options.setdefault("routing_block_size", draw(st.sampled_from([1, 3, 40])))
    scope = options.get("expert_scope", KINDS[kind].get("expert_scope", "token"))
    options["expert_selection"] = draw(
        st.sampled_from(["sample", "greedy", *([] if scope == "token" else ["stratified"])])
    )
    options["output_expert_indices"] = options["output_routing"] = True
    return options


def steps_of(options):
    return options.get("num_inference_steps", len(options["time_schedule"]) - 1)


def is_anew(options, model):
    return options.get("reselect_experts", model.config.reselect_experts)


def arguments_of(draw, model, options, num_rows):
    """What has a row for each source or returned sequence: drawn here, sliced for a row by itself."""
    n, seed = options["num_return_sequences"], draw(st.integers(0, 2**40))
    generator = torch.Generator().manual_seed(seed)
    values = {"seeds": [seed + index for index in range(num_rows * n)]}
    if draw(st.integers(0, 3)) == 0:
        values["initial_latents"] = torch.randn(num_rows * n, TABLE, 32, generator=generator)
    if draw(st.integers(0, 3)) == 0:
        steps = (steps_of(options),) if is_anew(options, model) else ()
        shape = (*steps, num_rows * n, TABLE)
        values["expert_indices"] = torch.randint(model.config.num_experts, shape, generator=generator)
    if options.get("target_lengths") == "drawn":
        del options["target_lengths"]
        values["target_lengths"] = torch.randint(1, TABLE + 1, (num_rows,), generator=generator)
    return values


def of_row(values, row, n):
    """The part of `arguments_of` that belongs to one source."""
    counts = {name: 1 if name == "target_lengths" else n for name in values}
    rows = {name: slice(row * count, (row + 1) * count) for name, count in counts.items()}
    return {
        name: value[:, rows[name]] if name == "expert_indices" and value.dim() == 3 else value[rows[name]]
        for name, value in values.items()
    }


def check_limits(output, options, model):
    kept = torch.arange(output.sequences.shape[1]) < output.lengths[:, None]
    assert not output.sequences.masked_fill(kept, 0).any() and output.sequences.shape[1] <= TABLE
    assert int(output.lengths.max()) <= int(options.get("max_new_tokens", TABLE))
    ends = set(options.get("eos_token_id", [model.config.eos_token_id]))
    never = {*options.get("suppress_tokens", []), *([5, 6] if "logits_processor" in options else [])}
    is_stopped = "stopping_criteria" in options
    shortest = 1 if is_stopped or "target_lengths" in options else options.get("min_new_tokens", 1)
    for row, length in zip(output.sequences.tolist(), output.lengths.tolist()):
        text = row[:length]
        assert not never & set(text) and not ends & set(text[:-1]) and length >= shortest
        assert not is_stopped or (length <= 6 and 9 not in text[:-1])


@drawn
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)), batch=batches(), training=st.booleans())
def test_a_row_depends_on_itself_alone_and_limits_are_kept(data, kind, batch, training):
    model, (rows, ids, mask) = model_of(kind).train(training), batch
    options = data.draw(option_sets(kind))
    n = options["num_return_sequences"]
    each = arguments_of(data.draw, model, options, len(rows))
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_trajectory": True}
    streamer = Recorder()
    original, compiled._compiled = compiled._compiled, lambda function, *_: function  # padded, but run as it stands
    try:
        batched = model.generate(ids, mask, streamer=streamer, **options, **each, **asked)
        singles = [
            model.generate(source[None], **options, **of_row(each, row, n), **asked) for row, source in enumerate(rows)
        ]
    finally:
        compiled._compiled = original
    assert model.training == training and streamer.ended and torch.equal(streamer.values[-1], batched.sequences)
    num_steps = steps_of(options)
    assert streamer.drafts == num_steps
    assert batched.num_field_evaluations == num_steps * len(SOLVERS[options["solver"]].nodes)
    assert batched.trajectory.shape == (num_steps + 1, *batched.latents.shape)
    assert batched.sequences.shape == batched.latents.shape[:2] == batched.logits.shape[:2]
    check_limits(batched, {**options, **each}, model)
    for row, single in enumerate(singles):
        assert single.length_mode == batched.length_mode
        for sample in range(n):
            index, length = row * n + sample, int(single.lengths[sample])
            assert int(batched.lengths[index]) == length
            assert torch.equal(batched.sequences[index, :length], single.sequences[sample, :length])
            pairs = [
                (getattr(batched, name)[index, :length], getattr(single, name)[sample, :length])
                for name in ("latents", "logits")
            ]
            pairs.append((batched.trajectory[:, index, :length], single.trajectory[:, sample, :length]))
            pairs.append((batched.sequence_scores[index], single.sequence_scores[sample]))
            choices = batched.expert_indices[..., index, :length], single.expert_indices[..., sample, :length]
            assert torch.equal(*choices)
            for found, expected in pairs:
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# Values of every field of the configuration, of which some are out of range, of another type, or autoregressive.
WILD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 30),
    st.sampled_from([0.0, -1.0, 0.5, 1.0, float("nan"), float("inf"), np.float32(0.5), np.int64(3)]),
    st.sampled_from(["sample", "greedy", "token", "block", "euler", "uniform", "score", "", "x"]),
    st.lists(st.integers(-1, 70), max_size=3),
    st.sampled_from([[0.0, 0.5, 1.0], [1.0, 0.0], [[5]], {}, (2,), torch.tensor(3), torch.tensor([2, 3])]),
)
NAMES = sorted(name for name in vars(YanGenerationConfig()) if not name.startswith("_") and "compile" not in name)
NAMES += ["target_lengths", "seeds", "initial_latents", "expert_indices", "attention_mask", "generator", "inputs"]
NAMES += ["logits_processor", "stopping_criteria", "tokenizer", "generation_config", "no_such_option"]


@drawn
@given(
    kind=st.sampled_from(sorted(KINDS)), options=st.dictionaries(st.sampled_from(NAMES), WILD, min_size=1, max_size=3)
)
def test_whatever_is_passed_is_taken_or_refused_by_name(kind, options):
    model = model_of(kind)
    try:
        ids = model.generate(torch.tensor([[5, 6, 7], [8, 9, 5]]), **{"target_lengths": 3, **options})
    except (ValueError, TypeError) as error:
        assert re.search(r"`\w+[`=]", str(error)), error
    else:
        assert (ids if isinstance(ids, torch.Tensor) else ids.sequences).shape[1] <= TABLE
