# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`generate` on the meta device, where a value read back to the host and a tensor made elsewhere are errors. What is read
or copied by design is named here, and in the documentation.
"""

import sys

import pytest
import torch
from testing_utils import (
    ENCODER,
    ENCODER_READS,
    SHALLOW,
    DraftCounter,
    NoHost,
    batch_of_rows,
    small_config,
    small_model,
)
from torch.overrides import TorchFunctionMode
from transformers.generation import CompileConfig
from transformers.generation.stopping_criteria import MaxLengthCriteria

from yan_hf import YanForConditionalGeneration
from yan_hf.experts import YanExperts
from yan_hf.inference.compiled import _pad, _pad_rows
from yan_hf.inference.expert_cache import ExpertCache
from yan_hf.sampling import CandidateLayout
from yan_hf.solver import SOLVERS


WIDTH = 6
# The lengths of the canvases, whose longest is the shape of all that follows.
LENGTHS = {"host_lengths": lambda lengths: [WIDTH] * len(lengths)}
# Lengths by source token: whether there are any, how many, and whether the likeliest ones are within the limits.
BY_TOKEN = {
    "_prepare_lengths": lambda found: True,
    "token_lengths_from": lambda value: True if value.dtype == torch.bool else 7,
    "likeliest_sums": lambda value: True if value.dtype == torch.bool else WIDTH,
}
GIVEN_BY_TOKEN = {
    **BY_TOKEN,
    "given_token_lengths": lambda numbers: [1, 1],
    "choose_lengths": lambda value: True,
    "token_lengths_from": lambda value: 1,
    "_check_given": lambda limits: [1, WIDTH],
}
UNLIKELY = {**BY_TOKEN, "likeliest_sums": lambda value: False if value.dtype == torch.bool else WIDTH}
# Which rows have no known tokens, and which tokens are fillings.
FILLINGS = {"decode_fillings": lambda mask, **_: torch.zeros(2, mask.dim(), dtype=torch.long, device="meta").unbind(1)}
CONSENSUS = {"_select_candidates": lambda tokens: torch.zeros(tokens.shape, dtype=torch.long).tolist()}
MAMBA = {"encoder_backbone": "mamba", "flow_backbone": "mamba"}
PAPER, TARGET = {}, {"expert_scope": "target", "reselect_experts": True}
ALIGNED = {"start_state": "aligned", "mask_token_id": 4}
FERTILITY = {"start_state": "fertility", "repeat_window": 3}
SAMPLED = {"do_sample": True, "top_k": 5, "top_p": 0.9, "typical_p": 0.9, "temperature": 0.8, "min_p": 0.1}
BLOCKS = {"routing": "block", "routing_block_size": 4, "core_threshold": 0.6, "routing_top_k": 2}
EVERYTHING = dict.fromkeys(("output_scores", "output_trajectory", "output_expert_indices", "output_routing"), True)
SEVERAL = {"num_candidates": 2, "num_return_sequences": 2}
# Fields of the model, options, what is read beside the lengths, and what is copied from the host.
CASES = [
    *((PAPER, {"solver": solver, "num_inference_steps": 2}, {}, ()) for solver in SOLVERS),
    *((PAPER, {"time_schedule": schedule}, {}, ()) for schedule in ("cosine", "shifted", [0.0, 0.2, 1.0])),
    (PAPER, {"target_lengths": WIDTH}, {}, ("given_lengths",)),
    (PAPER, {"target_lengths": [3, WIDTH]}, {}, ("given_lengths",)),
    (PAPER, {"min_new_tokens": 3, "max_new_tokens": 9, "length_slack": 1}, {}, ()),
    (PAPER, {"expert_selection": "greedy", "init_noise": 0.0, "eos_token_id": [1, 2]}, {}, ()),
    (PAPER, {"expert_temperature": 0.5, **EVERYTHING}, {}, ()),
    (PAPER, {**SEVERAL, "num_length_candidates": 3}, {}, ()),
    *((PAPER, {**SEVERAL, "rerank": name}, {}, ()) for name in ("joint", "cycle")),
    (PAPER, SAMPLED, {}, ()),
    (PAPER, {"suppress_tokens": [7]}, {}, ("__init__",)),  # Transformers' processor
    (PAPER, {"seeds": [1, 2], **SAMPLED}, {}, ("draw",)),
    (PAPER, {"initial_latents": torch.zeros(2, 9, 32, device="meta")}, {}, ()),
    (PAPER, {"expert_indices": torch.zeros(2, 9, dtype=torch.long, device="meta")}, {}, ()),
    (PAPER, {"stopping_criteria": [MaxLengthCriteria(3)]}, {}, ()),
    (PAPER, {**BLOCKS, **EVERYTHING}, {}, ()),
    (PAPER, {"expert_scope": "block", "routing_block_size": 4}, {}, ()),
    (TARGET, {"num_candidates": 2, "rerank": "joint", **EVERYTHING}, {}, ()),
    (TARGET, {"expert_selection": "stratified", **SEVERAL, **EVERYTHING}, {}, ()),
    (MAMBA, EVERYTHING, {}, ()),
    ({"attn_implementation": "eager"}, {}, {}, ()),
    ({"start_state": "stretched"}, {}, {}, ()),
    ({"encoder_config": ENCODER}, {}, ENCODER_READS, ()),
    (ALIGNED, {}, BY_TOKEN, ()),
    (ALIGNED, {"num_length_candidates": 2}, BY_TOKEN, ()),
    (ALIGNED, {"mask_lengths": [[2], [3]]}, GIVEN_BY_TOKEN, ("given_token_lengths",)),
    (FERTILITY, {}, UNLIKELY, ()),
    (FERTILITY, {"copy_bias": 2.0}, UNLIKELY, ()),
    (ALIGNED, {"keep_known": True}, {**BY_TOKEN, **FILLINGS}, ("_decoding_options",)),
    # What is computed from the tokens on the host.
    (PAPER, {"num_candidates": 2, "rerank": "mbr"}, CONSENSUS, ("_select_candidates",)),
]


def meta_model(fields, dtype):
    fields = dict(fields)
    attention = fields.pop("attn_implementation", "sdpa")
    with torch.device("meta"):
        model = YanForConditionalGeneration(small_config(**fields)).to(dtype).eval()
    model.config.length_head_trained = True
    model.set_attn_implementation(attention)
    return model


def source():
    ids = torch.zeros(2, 7, dtype=torch.long, device="meta")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("number", range(len(CASES)))
def test_only_lengths_are_read(number):
    fields, options, reads, copies = CASES[number]
    dtype = (torch.bfloat16, torch.float16, torch.float32)[number % 3]
    model = meta_model(fields, dtype)
    with NoHost({**LENGTHS, **reads}, copies) as mode:
        output = model.generate(**source(), **options, return_dict_in_generate=True)
    assert set(mode.seen) >= {"host_lengths", *copies} and mode.seen["host_lengths"] == 1
    assert sum(mode.seen[name] for name in BY_TOKEN) <= 7
    count = options.get("num_return_sequences", 1)
    assert output.sequences.shape == (2 * count, WIDTH) and output.sequences.is_meta
    assert output.latents.dtype == dtype and output.sequence_scores.dtype == torch.float32
    assert output.trajectory is None or output.trajectory.dtype == dtype


@pytest.mark.parametrize(
    "fields",
    [
        *({**fields, **MAMBA} for fields in ({}, {"start_state": "stretched"})),
        *(PAPER, {"start_state": "stretched"}, TARGET, {"encoder_config": ENCODER}),
    ],
)
@pytest.mark.parametrize("names", [("input_ids",), ("inputs_embeds",), ("inputs_embeds", "attention_mask")])
@pytest.mark.slow
def test_sources_without_mask_or_tokens(fields, names):
    model, given = meta_model(fields, torch.bfloat16), source()
    width = model.get_input_embeddings().embedding_dim
    given["inputs_embeds"] = torch.zeros(2, 7, width, device="meta", dtype=torch.bfloat16)
    with NoHost({**LENGTHS, **ENCODER_READS}) as mode:
        assert model.generate(**{name: given[name] for name in names}).is_meta
    assert mode.seen["host_lengths"] == 1


def test_a_source_of_fertilities_without_a_mask():
    model = meta_model(FERTILITY, torch.float32)
    with NoHost({**LENGTHS, **UNLIKELY}) as mode:
        model.generate(source()["input_ids"], copy_bias=2.0)
    assert sum(mode.seen[name] for name in BY_TOKEN) <= 7


def test_a_streamer_gets_its_tokens_on_the_host():
    streamer, reads = DraftCounter(), dict.fromkeys(("show_draft", "_generate"), lambda tokens: tokens)
    model = meta_model(PAPER, torch.float32)
    with NoHost({**LENGTHS, **reads}) as mode:
        model.generate(**source(), streamer=streamer)
    assert set(mode.seen) == {"host_lengths", *reads} and streamer.drafts == 3


@pytest.mark.parametrize("options", [{}, {"mode": "on_demand"}, {"speculation": "execute"}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_offloaded_experts_read_the_choice_of_experts_alone(dtype, options):
    """The experts in CPU memory, all else on the device; with more chosen experts than slots, and without."""
    for chosen in (2, 3):
        reads = {
            "_needed": lambda experts, chosen=chosen: torch.arange(chosen),
            "prefetch": lambda experts, **_: torch.tensor([1, 0, 4, 0]),
            "_routed": lambda mask: torch.zeros(5, 1, dtype=torch.long, device="meta"),
        }
        model = small_model().to(dtype)
        model.enable_expert_offload(2, **options)
        device, flow = torch.device("meta"), model.model.flow
        experts = flow._modules.pop("experts")
        flow.experts = (model.to(device), experts)[1]
        experts.offload.device, experts.offload.cache = device, ExpertCache(experts, 2, device)
        with NoHost({**LENGTHS, **reads}, ("_routed", "slots_of", "_select", "_copy_weights")) as mode:
            output = model.generate(**source(), return_dict_in_generate=True)
        assert output.latents.is_meta and output.latents.dtype == dtype
        assert "_needed" in mode.seen and ("prefetch" in mode.seen) == ("mode" not in options)


@pytest.mark.parametrize("fields", [PAPER, TARGET, {"encoder_backbone": "mamba", "flow_backbone": "mamba"}])
@pytest.mark.slow
def test_the_compiled_path_is_one_graph(fields, monkeypatch):
    """Of each half, and of both where lengths are given; in the shapes and dtypes of the device."""
    monkeypatch.setattr(CandidateLayout, "host_lengths", property(lambda layout: [WIDTH] * len(layout.lengths)))
    model = meta_model({**fields, **SHALLOW}, torch.bfloat16)
    fast = {"compile": True, "compile_config": CompileConfig(fullgraph=True, backend="aot_eager", mode=None)}
    for options in ({}, {"target_lengths": WIDTH, "num_inference_steps": 1}):
        output = model.generate(**source(), **fast, **options, return_dict_in_generate=True)
        assert output.sequences.shape == (2, WIDTH) and output.latents.dtype == torch.bfloat16
    assert len(model.compiled_programs) == 3


def test_the_compiled_path_pads_on_the_device():
    values = torch.zeros(3, 5, 2, device="meta")
    with NoHost():
        assert _pad_rows(_pad(values, 3, 8), 4).shape == (4, 8, 2)


class Readers(TorchFunctionMode):
    """The functions of this package that read a value, in order, on any device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in NoHost.READS - {"__getitem__"}:
            frame = sys._getframe(1)
            while not frame.f_globals["__name__"].startswith("yan_hf"):
                frame = frame.f_back
            self.names.append(frame.f_code.co_name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("fields", "options", "more"),
    [
        (PAPER, {}, []),
        (PAPER, {"solver": "rk4", "time_schedule": "shifted"}, []),
        (PAPER, {**BLOCKS, "output_routing": True}, []),
        (PAPER, {**SEVERAL, "rerank": "joint"}, []),
        (TARGET, {"expert_selection": "stratified", **SEVERAL, **BLOCKS}, []),
        (MAMBA, {"output_trajectory": True}, []),
        ({"start_state": "stretched"}, {}, []),
        # Most ways of choosing a token ask whether one was left.
        (PAPER, SAMPLED, ["check_choice"]),
        (PAPER, {"min_new_tokens": 3}, ["check_choice"]),
    ],
)
def test_every_stop_of_a_call(fields, options, more, monkeypatch):
    """With the checks of values, which the meta device does not have: of the inputs, the lengths, and at the end."""
    monkeypatch.setattr(YanExperts, "implementation", lambda self, states: "blocks")  # as off the CPU
    model, (_, ids, mask) = small_model(**fields), batch_of_rows([4, 7])
    with Readers() as mode:
        model.generate(ids, mask, **options)
    # Transformers looks at a mask on the CPU only, and a vocabulary in parts at numbers there.
    names = [name for name in mode.names if name != "_attention_mask"]
    lengths = ["check_ids", "check_source", "check_finite", "host_lengths"]
    assert names == [*lengths, "check_finite", "check_finite", *more]
