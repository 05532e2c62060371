# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`generate`: batches, lengths, outputs, its configuration and what it refuses."""

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from testing_utils import SHALLOW, batch_of_rows, small_config, small_model
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList, TextStreamer, pipeline
from transformers.generation import CompileConfig
from transformers.generation.stopping_criteria import (
    ConfidenceCriteria,
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import TextDiffusionStreamer

from yan_hf import (
    YanForConditionalGeneration,
    YanGenerationConfig,
    generation_yan,
    train_tokenizer,
)
from yan_hf.inference import cpu_kernels
from yan_hf.sampling import solve_flow
from yan_hf.solver import time_grid


def generate(model, ids, mask=None, **kwargs):
    return model.generate(ids, mask, return_dict_in_generate=True, output_scores=True, **kwargs)


def with_end_tokens(model, bias=2.0):
    """A model that writes end tokens now and then."""
    with torch.no_grad():
        model.lm_head.bias[model.config.eos_token_id] += bias
    return model


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options", [{}, {"num_inference_steps": 1}, {"expert_selection": "greedy", "init_noise": 0.5}]
)
def test_a_row_does_not_depend_on_padding_neighbours_or_batch_size(side, options):
    model = with_end_tokens(small_model())
    rows, ids, mask = batch_of_rows([1, 9, 6, 3], side, extra=2)
    batched = generate(model, ids, mask, seeds=[3, 1, 4, 1], **options)
    assert len({int(length) for length in batched.lengths}) > 1
    for i, row in enumerate(rows):
        single = generate(model, row[None], seeds=[[3, 1, 4, 1][i]], **options)
        length = int(single.lengths)
        assert torch.equal(batched.sequences[i, :length], single.sequences[0, :length])
        assert (batched.sequences[i, length:] == 0).all() and int(batched.lengths[i]) == length
        torch.testing.assert_close(batched.logits[i, :length], single.logits[0, :length], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(batched.sequence_scores[i], single.sequence_scores[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_with_fixed_latents_and_experts_does_not_depend_on_its_batch(model, side):
    rows, ids, mask = batch_of_rows([2, 9, 6], side)
    state, experts = torch.randn(3, 8, 32), torch.randint(0, 4, (3, 8))
    lengths = torch.tensor([8, 3, 5])
    batched = generate(model, ids, mask, initial_latents=state, expert_indices=experts, target_lengths=lengths)
    for i, (row, length) in enumerate(zip(rows, lengths.tolist())):
        single = generate(
            model,
            row[None],
            initial_latents=state[i : i + 1],
            expert_indices=experts[i : i + 1],
            target_lengths=length,
        )
        torch.testing.assert_close(batched.logits[i, :length], single.logits[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(batched.sequences[i, :length], single.sequences[0])


def test_sequences_are_cut_after_the_first_end_token():
    model = with_end_tokens(small_model(), 3.0)
    _, ids, mask = batch_of_rows([4, 6, 8])
    output = generate(model, ids, mask, target_lengths=20, seeds=[0, 1, 2])
    drawn = output.logits.argmax(-1)
    assert (drawn == 2).any()
    for row, tokens in enumerate(drawn.tolist()):
        length = tokens.index(2) + 1 if 2 in tokens else 20
        assert output.lengths[row] == length
        assert output.sequences[row].tolist() == tokens[:length] + [0] * (20 - length)


def test_several_end_tokens(model):
    _, ids, mask = batch_of_rows([4])
    plain = generate(model, ids, mask, target_lengths=10, seeds=[0])
    ends = plain.sequences[0, [3, 6]].tolist()
    output = generate(model, ids, mask, target_lengths=10, seeds=[0], eos_token_id=ends)
    first = min(plain.sequences[0].tolist().index(end) for end in ends)
    assert int(output.lengths) == first + 1


def test_scores_are_mean_log_probabilities():
    model = with_end_tokens(small_model())
    _, ids, mask = batch_of_rows([4, 6])
    output = generate(model, ids, mask, target_lengths=9, seeds=[0, 1])
    log_probs = output.logits.log_softmax(-1).amax(-1)
    for row, length in enumerate(output.lengths.tolist()):
        assert float(output.sequence_scores[row]) == pytest.approx(float(log_probs[row, :length].mean()), rel=1e-5)


# Lengths


def test_predicted_length_is_the_head_s_mode_within_the_limits(model):
    _, ids, mask = batch_of_rows([4, 6])
    source = model.model.encode(ids, mask).last_hidden_state
    logits = model.predict_lengths(source, mask)
    output = generate(model, ids, mask, eos_token_id=[59], max_new_tokens=24)
    assert output.length_mode == "predicted"
    assert output.latents.shape[1] == int(logits.argmax(-1).max()) + 1
    output = generate(model, ids, mask, max_new_tokens=5, seeds=[0, 1])
    assert output.latents.shape[1] == int(logits[:, :5].argmax(-1).max()) + 1
    with torch.no_grad():
        model.length_head.down_proj.bias[1] += 100
    assert generate(model, ids, mask).latents.shape[1] == 2
    assert generate(model, ids, mask, min_new_tokens=7, max_new_tokens=7).latents.shape[1] == 7


def test_given_lengths(model):
    _, ids, mask = batch_of_rows([4, 6])
    output = generate(model, ids, mask, target_lengths=torch.tensor([3, 6]), eos_token_id=[59])
    assert output.length_mode == "given" and output.sequences.shape == (2, 6)
    assert (output.sequences[0, 3:] == 0).all()
    assert generate(model, ids, mask, target_lengths=1).sequences.shape == (2, 1)
    assert generate(model, ids, mask, target_lengths=24).sequences.shape == (2, 24)


def test_given_lengths_stay_the_caller_s(model):
    _, ids, mask = batch_of_rows([4, 6])
    given = torch.tensor([3, 6])
    generate(model, ids, mask, target_lengths=given, eos_token_id=[]).lengths.zero_()
    assert given.tolist() == [3, 6]


@pytest.mark.parametrize(
    "lengths", [0, 25, torch.tensor([3]), torch.tensor([3, 4, 5]), torch.tensor([3.0, 4.0]), torch.tensor([-1, 3])]
)
def test_bad_target_lengths(model, lengths):
    _, ids, mask = batch_of_rows([4, 6])
    with pytest.raises(ValueError, match="target_lengths"):
        model.generate(ids, mask, target_lengths=lengths)


def test_max_length_is_the_target_s_and_max_new_tokens_wins(model):
    _, ids, mask = batch_of_rows([9])
    with torch.no_grad():
        model.length_head.down_proj.bias += 100 * torch.arange(24)  # as long as allowed
    assert model.generate(ids, mask, max_length=4).shape[1] == 4
    assert model.generate(ids, mask, max_length=4, max_new_tokens=6).shape[1] == 6
    assert model.generate(ids, mask, generation_config=YanGenerationConfig(max_length=4)).shape[1] == 4
    assert model.generate(ids, mask, generation_config=YanGenerationConfig()).shape[1] == 24
    # What Seq2SeqTrainer does to the configuration after its first batch.
    model.generation_config.update(**model.generation_config._get_default_generation_params(), defaults_only=True)
    assert model.generate(ids, mask).shape[1] == 24
    with pytest.raises(ValueError, match="max_new_tokens=25.*max_position_embeddings=24"):
        model.generate(ids, mask, max_new_tokens=25)


# Randomness


def test_generator_repeats_and_init_noise_zero_is_deterministic(model):
    _, ids, mask = batch_of_rows([4, 6])

    def run(**kwargs):
        return generate(model, ids, mask, target_lengths=6, **kwargs).latents

    def seeded(seed):
        return run(generator=torch.Generator().manual_seed(seed))

    assert torch.equal(seeded(0), seeded(0)) and not torch.equal(seeded(0), seeded(1))
    assert not torch.equal(run(), run())
    assert torch.equal(run(init_noise=0.0, expert_selection="greedy"), run(init_noise=0.0, expert_selection="greedy"))
    torch.manual_seed(5)
    first = run()
    torch.manual_seed(5)
    assert torch.equal(first, run())


def test_num_return_sequences_repeats_rows_in_order(model):
    rows, ids, mask = batch_of_rows([4, 6])
    seeds = [5, 6, 7, 8]
    output = generate(model, ids, mask, num_return_sequences=2, seeds=seeds, target_lengths=torch.tensor([3, 5]))
    assert output.sequences.shape == (4, 5)
    for index, seed in enumerate(seeds):
        length = [3, 5][index // 2]
        single = generate(model, rows[index // 2][None], seeds=[seed], target_lengths=length)
        torch.testing.assert_close(output.latents[index, :length], single.latents[0], rtol=1e-5, atol=1e-5)


def test_initial_latents_are_taken_as_they_are(model):
    _, ids, mask = batch_of_rows([4, 6])
    state = torch.randn(2, 7, 32)
    output = generate(
        model, ids, mask, initial_latents=state, target_lengths=5, output_trajectory=True, init_noise=0.0
    )
    assert torch.equal(output.trajectory[0], state[:, :5])
    assert generate(model, ids, mask, initial_latents=state).latents.shape[1] <= 7  # predicted lengths stay within it
    with pytest.raises(ValueError, match="target_lengths"):
        model.generate(ids, mask, initial_latents=state, target_lengths=8)
    for wrong in (state[:1], state[..., :5], state[0]):
        with pytest.raises(ValueError, match="initial_latents"):
            model.generate(ids, mask, initial_latents=wrong, target_lengths=5)
    for wrong in (torch.full((2, 5), 4), torch.full((2, 5), -1)):
        with pytest.raises(ValueError, match="expert_indices"):
            model.generate(ids, mask, expert_indices=wrong, target_lengths=5)


# Outputs


def test_outputs_that_are_asked_for(model):
    _, ids, mask = batch_of_rows([4, 6])
    plain = model.generate(ids, mask, target_lengths=5)
    assert isinstance(plain, torch.Tensor) and plain.dtype == torch.long
    output = model.generate(ids, mask, target_lengths=5, return_dict_in_generate=True)
    assert output.logits is None and output.trajectory is None and output.expert_indices is None
    output = model.generate(
        ids,
        mask,
        target_lengths=5,
        num_inference_steps=4,
        return_dict_in_generate=True,
        output_scores=True,
        output_trajectory=True,
        output_expert_indices=True,
    )
    assert output.num_field_evaluations == 4
    assert output.trajectory.shape == (5, 2, 5, 32) and torch.equal(output.trajectory[-1], output.latents)
    assert output.logits.shape == (2, 5, 60) and output.expert_indices.shape == (2, 5)
    repeated = generate(
        model,
        ids,
        mask,
        target_lengths=5,
        num_inference_steps=4,
        initial_latents=output.trajectory[0],
        expert_indices=output.expert_indices,
    )
    torch.testing.assert_close(repeated.latents, output.latents)


def test_trunk_passes_equal_solver_steps_and_the_source_is_projected_once(model):
    """S passes, one encoder call, and cross-attention keys once for each block that has it."""
    _, ids, mask = batch_of_rows([4, 6])
    counts = {"flow": 0, "encoder": 0, "keys": 0, "gate": 0}

    def count(name):
        return lambda *_: counts.__setitem__(name, counts[name] + 1)

    model.model.flow.register_forward_hook(count("flow"))
    model.model.encoder.register_forward_hook(count("encoder"))
    model.model.flow.gate.register_forward_hook(count("gate"))
    for layer in model.model.flow.layers:
        if layer.has_cross_attention:
            layer.cross_attn.k_proj.register_forward_hook(count("keys"))
    output = generate(model, ids, mask, num_inference_steps=3)
    assert counts == {"flow": 3, "encoder": 1, "keys": 2, "gate": 1}
    assert output.num_field_evaluations == 3


def test_streamer_gets_drafts_and_then_the_tokens(model):
    class Recorder:
        def __init__(self):
            self.events = []

        def put_draft(self, value):
            self.events.append(("draft", value))

        def put(self, value):
            self.events.append(("final", value))

        def end(self):
            self.events.append(("end", None))

    recorder = Recorder()
    _, ids, mask = batch_of_rows([4])
    tokens = model.generate(ids, mask, streamer=recorder, num_inference_steps=3, target_lengths=6)
    assert [kind for kind, _ in recorder.events] == ["draft"] * 3 + ["final", "end"]
    assert torch.equal(recorder.events[2][1], tokens) and torch.equal(recorder.events[3][1], tokens)


def test_model_in_training_mode_generates_as_in_eval_mode():
    model = small_model(hidden_dropout=0.5, latent_noise=1.0)
    _, ids, mask = batch_of_rows([4, 6])
    expected = generate(model, ids, mask, seeds=[0, 1])
    model.train()
    assert torch.equal(generate(model, ids, mask, seeds=[0, 1]).latents, expected.latents)
    assert model.training and model.model.flow.training


def test_parts_in_training_mode_generate_in_eval_mode_and_stay_in_training_mode():
    """As an adapter that has just been added to a model in eval mode."""
    model = small_model(hidden_dropout=0.5)
    _, ids, mask = batch_of_rows([4, 6])
    expected = generate(model, ids, mask, seeds=[0, 1])
    model.model.flow.train()
    assert torch.equal(generate(model, ids, mask, seeds=[0, 1]).latents, expected.latents)
    assert not model.training and not model.model.encoder.training
    assert all(module.training for module in model.model.flow.modules())


def test_scores_are_the_logits_of_each_position(model):
    _, ids, mask = batch_of_rows([4, 6])
    options = {"target_lengths": 5, "return_dict_in_generate": True}
    output = model.generate(ids, mask, **options, output_scores=True)
    assert len(output.scores) == 5 and torch.equal(output.scores[2], output.logits[:, 2])
    assert model.generate(ids, mask, **options).scores is None


def test_bfloat16_generates_finite_values_close_to_float32(model):
    _, ids, mask = batch_of_rows([4, 6])
    expected = generate(model, ids, mask, seeds=[0, 1], target_lengths=6, expert_selection="greedy")
    half = generate(
        copy.deepcopy(model).bfloat16(), ids, mask, seeds=[0, 1], target_lengths=6, expert_selection="greedy"
    )
    assert half.latents.dtype == torch.bfloat16
    difference = (half.latents.float() - expected.latents).abs().mean() / expected.latents.abs().mean()
    assert float(difference) < 0.05


# Configuration


def test_generation_config_round_trip(tmp_path):
    config = YanGenerationConfig(num_inference_steps=5, expert_selection="greedy", max_new_tokens=9, eos_token_id=2)
    config.save_pretrained(tmp_path)
    loaded = YanGenerationConfig.from_pretrained(tmp_path)
    assert loaded == config and loaded.num_inference_steps == 5


def test_model_saves_and_loads_its_generation_config(tmp_path):
    model = small_model(solver_steps=4)
    assert model.generation_config.num_inference_steps == 4
    model.generation_config.expert_selection = "greedy"
    model.save_pretrained(tmp_path)
    loaded = YanForConditionalGeneration.from_pretrained(tmp_path)
    assert type(loaded.generation_config) is YanGenerationConfig
    assert loaded.generation_config.expert_selection == "greedy"
    # A plain configuration, as another tool may have written it, is accepted.
    GenerationConfig(max_new_tokens=7).save_pretrained(tmp_path)
    loaded = YanForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.generation_config.max_new_tokens == 7 and loaded.generation_config.eos_token_id == 2
    (tmp_path / "generation_config.json").unlink()
    assert YanForConditionalGeneration.from_pretrained(tmp_path).generation_config.max_new_tokens == 24


def test_keyword_arguments_override_and_leave_the_model_s_config_alone(model):
    _, ids, mask = batch_of_rows([4])
    before = model.generation_config.to_dict()
    assert generate(model, ids, mask, num_inference_steps=6).num_field_evaluations == 6
    given = YanGenerationConfig(num_inference_steps=2)
    assert generate(model, ids, mask, generation_config=given).num_field_evaluations == 2
    assert generate(model, ids, mask, generation_config=given, num_inference_steps=1).num_field_evaluations == 1
    assert model.generation_config.to_dict() == before and given.num_inference_steps == 2


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_inference_steps", 0),
        ("num_inference_steps", 2.5),
        ("num_inference_steps", True),
        ("max_new_tokens", 0),
        ("expert_selection", "best"),
        ("expert_temperature", 0.0),
        ("init_noise", -1.0),
        ("init_noise", math.inf),
        ("num_return_sequences", 0),
        ("output_scores", "yes"),
        ("num_beams", 4),
        ("repetition_penalty", 1.2),
        ("no_repeat_ngram_size", 3),
        ("do_sample", 3),
        ("solver", "dopri5"),
        ("time_schedule", "linear"),
        ("time_schedule", [0.0, 0.5]),
        ("time_schedule", [0.0, 0.6, 0.5, 1.0]),
        ("time_shift", 2.0),
        ("num_length_candidates", 0),
        ("length_slack", -1),
        ("num_candidates", 1.5),
        ("rerank", "best"),
        ("compile", "yes"),
        ("cache_implementation", "static"),
        ("min_length", 20),
        ("max_time", 10.0),
        ("bad_words_ids", [[5]]),
        ("suppress_tokens", "all"),
        ("output_attentions", True),
        ("resolve", 3),
        ("step_count", 3),
    ],
)
def test_bad_and_foreign_values_are_refused_by_name(model, field, value):
    with pytest.raises(ValueError, match=field):
        YanGenerationConfig(**{field: value})
    with pytest.raises(ValueError, match=field):
        model.generate(torch.tensor([[5, 6]]), **{field: value})


IDS = torch.tensor([[5, 6, 7], [8, 9, 5]])


@pytest.mark.parametrize(
    "arguments, options",
    [
        ((), {"inputs": IDS}),
        ((IDS, GenerationConfig(max_new_tokens=5)), {}),
        ((IDS,), {"stopping_criteria": StoppingCriteriaList()}),
        ((IDS,), {"stopping_criteria": []}),
        ((IDS,), {"max_new_tokens": np.int64(5), "min_new_tokens": torch.tensor(2)}),
        ((IDS,), {"num_return_sequences": np.int32(1)}),
        ((IDS,), {"generation_config": GenerationConfig(max_new_tokens=np.int64(5))}),
        ((IDS,), {"do_sample": np.bool_(True), "temperature": np.float32(0.5)}),
        *(((IDS,), {"eos_token_id": end}) for end in (2, [2], (2, 3), [], np.int64(2), torch.tensor([2]))),
        ((IDS,), {"do_sample": False, "temperature": 0.7}),
        ((IDS,), {"temperature": 0.0, "top_k": 3, "top_p": 0.9, "typical_p": 0.9, "min_p": 0.1}),
        ((IDS,), {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "num_beams": 1, "do_sample": False}),
        ((IDS,), {"early_stopping": True, "length_penalty": 2.0, "renormalize_logits": True, "min_length": 0}),
        ((IDS,), {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "begin_suppress_tokens": []}),
    ],
)  # fmt: skip
def test_what_a_sequence_to_sequence_model_of_transformers_accepts_is_accepted(model, arguments, options):
    limit = 5 if any(isinstance(value, GenerationConfig) for value in (*arguments, *options.values())) else 24
    assert model.generate(*arguments, **options).shape[1] <= limit
    if not options.get("do_sample"):
        seeded = model.generate(*arguments, seeds=[1, 2], **options)
        plain = model.generate(IDS, seeds=[1, 2], max_new_tokens=options.get("max_new_tokens", limit))
        assert torch.equal(seeded, plain) or {"eos_token_id", "min_new_tokens"} & set(options)


def test_input_ids_have_two_names_but_are_passed_once(model):
    with pytest.raises(ValueError, match="inputs"):
        model.generate(inputs=IDS, input_ids=IDS)


def test_a_list_of_end_tokens_in_the_model_s_configuration(tmp_path):
    model = small_model()
    model.generation_config.eos_token_id = [2, 7]
    model.save_pretrained(tmp_path)
    loaded = YanForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(IDS, seeds=[1, 2]), model.generate(IDS, seeds=[1, 2], eos_token_id=[2, 7]))


def test_stopping_criteria_cut_the_finished_text(model):
    """A criterion sees the text grow token by token; candidates are cut before the best is chosen."""
    plain = model.generate(IDS, seeds=[1, 2], target_lengths=9)
    end = int(plain[0, 3])

    def cut(criteria, **options):
        return generate(model, IDS, seeds=[1, 2], target_lengths=9, stopping_criteria=criteria, **options)

    assert cut([MaxLengthCriteria(4)]).sequences.tolist() == [[*row[:4], *[0] * 5] for row in plain.tolist()]
    output = cut(StoppingCriteriaList([EosTokenCriteria(end)]))
    for row, length, text in zip(output.sequences.tolist(), output.lengths.tolist(), plain.tolist()):
        expected = text[: text.index(end) + 1] if end in text else text
        assert row == expected + [0] * (9 - len(expected)) and length == len(expected)
    assert cut([lambda ids, scores: ids[:, -1] == end]).sequences.tolist() == output.sequences.tolist()
    scored = cut([MaxLengthCriteria(1)], num_candidates=3)
    assert (scored.lengths == 1).all()
    torch.testing.assert_close(
        scored.sequence_scores, scored.logits.log_softmax(-1)[:, 0].gather(1, scored.sequences[:, :1])[:, 0]
    )
    for criterion in (MaxTimeCriteria(9.0), ConfidenceCriteria(None)):
        with pytest.raises(ValueError, match=f"{type(criterion).__name__}.*it looks at"):
            cut([criterion])
    for criterion in (lambda ids, scores: scores[-1].max() > 0, lambda ids, scores: scores.max() > 0, lambda *_: None):
        with pytest.raises(ValueError, match="of function, failed.*`None` for the scores"):
            cut([criterion])


def test_stop_strings_cut_the_finished_text():
    tokenizer = train_tokenizer(["a b c d e f g h i j"] * 3, vocab_size=290)
    model = small_model(vocab_size=len(tokenizer))
    with torch.no_grad():
        model.lm_head.bias[:261] -= 100  # letters rather than bytes
    plain = model.generate(IDS, seeds=[1, 2], target_lengths=9)
    stop = tokenizer.decode(plain[0, 2:4])
    cut = model.generate(IDS, seeds=[1, 2], target_lengths=9, stop_strings=stop, tokenizer=tokenizer)
    assert stop in tokenizer.decode(cut[0]) and not cut[0, 4:].any()
    length = int((cut[0] != 0).sum())
    assert stop not in tokenizer.decode(cut[0, : length - 1]) and torch.equal(cut[0, :length], plain[0, :length])
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate(IDS, stop_strings=stop)


# Nothing left to choose


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize(
    "name, options",
    [
        ("suppress_tokens", {"suppress_tokens": list(range(60))}),
        ("min_new_tokens", {"suppress_tokens": [*range(2), *range(3, 60)], "min_new_tokens": 3}),
        ("logits_processor", {"logits_processor": [lambda ids, scores: torch.full_like(scores, -math.inf)]}),
        ("logits_processor", {"logits_processor": [lambda ids, scores: scores.clone().fill_diagonal_(math.nan)]}),
    ],
)
def test_options_that_leave_no_token_are_named(model, name, options, do_sample):
    with pytest.raises(ValueError, match=f"No token is left.*{name}"):
        model.generate(IDS, do_sample=do_sample, target_lengths=3, **options)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"suppress_tokens": [3]}])
@pytest.mark.parametrize("part", ["row", "all"])
def test_nan_logits_are_the_weights_fault(model, options, part):
    with torch.no_grad():
        model.lm_head.bias[slice(17, 18) if part == "row" else slice(None)] = math.nan
    with pytest.raises(ValueError, match="logits.*weights"):
        model.generate(IDS, **options)


# Nothing is changed


DROPOUTS = {"hidden_dropout": 0.3, "attention_dropout": 0.3, "embedding_dropout": 0.3, "latent_noise": 0.5}


def in_training(backbone="transformer", **changes):
    return small_model(encoder_backbone=backbone, flow_backbone=backbone, **DROPOUTS, **changes).train()


@pytest.mark.parametrize(
    "case",
    [
        *("plain", "mamba", "lora", "experts", "hooks", "checkpointing"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("compiled part", "compile")),
    ],
)
def test_a_model_in_training_mode_generates_as_in_eval_mode_and_is_not_changed(case):
    changes = SHALLOW if case == "compile" else {}
    model = written = in_training("mamba" if case == "mamba" else "transformer", **changes)
    options = {"seeds": [1, 2], "target_lengths": 7}
    if case in ("lora", "experts"):
        target = {"target_modules": "all-linear"} if case == "lora" else {"target_parameters": ["experts.up_proj"]}
        dropout = 0.5 if case == "lora" else 0.0
        written = get_peft_model(model, LoraConfig(init_lora_weights=False, lora_dropout=dropout, **target)).train()
    elif case == "hooks":
        cpu_offload(model)
    elif case == "checkpointing":
        model.gradient_checkpointing_enable()
    elif case == "compiled part":
        model.model.encoder.layers[0].compile(backend="eager")
        model.model.encoder.layers[1] = torch.compile(model.model.encoder.layers[1], backend="eager")
    elif case == "compile":
        options |= {"compile": True, "compile_config": CompileConfig(backend="aot_eager", fullgraph=True)}
    modes = {name: module.training for name, module in written.named_modules()}
    tensors = [*written.parameters(), *written.buffers()]
    versions = [value._version for value in tensors]
    config = copy.deepcopy(model.config.to_dict())
    ids = written.generate(input_ids=IDS, **options)
    assert torch.equal(written.generate(input_ids=IDS, **options), ids)
    assert {name: module.training for name, module in written.named_modules()} == modes
    # PEFT itself writes a weight anew at every call where it adapts a parameter.
    assert case == "experts" or [value._version for value in tensors] == versions
    assert model.config.to_dict() == config
    written.eval()
    assert torch.equal(written.generate(input_ids=IDS, **options), ids)


def test_a_model_in_eval_mode_is_not_copied(model, monkeypatch):
    monkeypatch.setattr(generation_yan, "eval_view", lambda model: pytest.fail("copied"))
    model.generate(IDS)


def test_threads_generate_on_a_model_that_another_one_trains():
    """Dropout stays on in every training step, and off in every text."""
    model = in_training()
    expected = copy.deepcopy(model).eval().generate(IDS, seeds=[1, 2])
    parts, modes, stop = list(model.modules()), [], threading.Event()

    def train():
        while not stop.is_set():
            model(input_ids=IDS, labels=IDS).loss.backward()
            modes.append(all(part.training for part in parts))

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda _: model.generate(IDS, seeds=[1, 2]), range(24)))
    finally:
        stop.set()
        trainer.join()
    assert all(torch.equal(ids, expected) for ids in results)
    assert modes and all(modes)


def test_the_length_head_is_trained_by_an_optimiser_step_alone(tmp_path):
    """A forward pass, in training mode or not, leaves a head untrained; saving notes what training did."""
    torch.manual_seed(0)
    model = YanForConditionalGeneration(small_config(length_head_trained=False)).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert not model.config.length_head_trained
    model.save_pretrained(tmp_path / "untrained")
    for untrained in (model, YanForConditionalGeneration.from_pretrained(tmp_path / "untrained")):
        with pytest.raises(ValueError, match="never been trained"):
            untrained.generate(IDS)
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    assert model.generate(IDS).shape[0] == 2
    model.save_pretrained(tmp_path / "trained")
    loaded = YanForConditionalGeneration.from_pretrained(tmp_path / "trained")
    assert loaded.config.length_head_trained and loaded.generate(IDS).shape[0] == 2


# Tools around the model


def test_the_pipeline_of_language_models_is_refused_with_the_right_way(tmp_path):
    tokenizer = train_tokenizer(["a b c d e f g h i j"] * 3, vocab_size=290)
    writer = pipeline("text-generation", model=small_model(vocab_size=len(tokenizer)), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="model.generate"):
        writer("a b c")
    writer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="AutoModelForSeq2SeqLM"):  # by the folder's name
        pipeline("text-generation", model=str(tmp_path))
    with pytest.raises(ValueError, match="AutoModelForSeq2SeqLM"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backbone", ["transformer", "mamba"])
def test_dynamic_quantization_generates(backbone):
    model = small_model(encoder_backbone=backbone, flow_backbone=backbone)
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert quantized.generate(IDS, target_lengths=6, seeds=[1, 2]).shape == (2, 6)
    assert quantized.generate(IDS, num_candidates=2, do_sample=True).shape[0] == 2


@pytest.mark.parametrize("name", ["assistant_model", "past_key_values", "decoder_input_ids"])
def test_autoregressive_arguments_are_refused_with_the_reason(model, name):
    with pytest.raises(ValueError, match=f"{name}.*(at once|solver)"):
        model.generate(torch.tensor([[5, 6]]), **{name: object()})


def test_contradictions_are_refused(model):
    ids = torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match="min_new_tokens"):
        model.generate(ids, min_new_tokens=9, max_new_tokens=4)
    with pytest.raises(ValueError, match="not both"):
        model.generate(ids, seeds=[1], generator=torch.Generator())
    for seeds in ([1, 2], [1.5], [2**64], [-1]):
        with pytest.raises(ValueError, match="seeds"):
            model.generate(ids, seeds=seeds)
    with pytest.raises(ValueError, match="min_new_tokens"):
        model.generate(ids, min_new_tokens=5, initial_latents=torch.randn(1, 3, 32))
    for name, value in (
        ("initial_latents", torch.randn(1, 0, 32)),
        ("initial_latents", torch.randn(0, 3, 32)),
        ("expert_indices", torch.zeros(1, 3)),
    ):
        with pytest.raises(ValueError, match=name):
            model.generate(ids, target_lengths=1 if name == "expert_indices" else None, **{name: value})


def test_lengths_as_a_list_are_repeated_with_their_rows(model):
    _, ids, mask = batch_of_rows([4, 6])
    output = generate(model, ids, mask, target_lengths=[3, 5], num_return_sequences=2, eos_token_id=[59])
    assert output.sequences.shape == (4, 5)


def test_text_streamer_that_skips_the_prompt_prints_the_answer(model):
    class Tokenizer:
        def decode(self, tokens, **kwargs):
            return " ".join(map(str, torch.as_tensor(tokens).tolist()))

    class Collect(TextStreamer):
        def __init__(self):
            super().__init__(Tokenizer(), skip_prompt=True)
            self.text = ""

        def on_finalized_text(self, text, stream_end=False):
            self.text += text

    streamer = Collect()
    tokens = model.generate(torch.tensor([[5, 6]]), streamer=streamer, target_lengths=4, eos_token_id=[59], seeds=[0])
    assert streamer.text.split() == [str(token) for token in tokens[0].tolist()]


def test_transformers_text_diffusion_streamer_shows_drafts(model, capsys):
    class Tokenizer:
        def decode(self, tokens, **kwargs):
            return " ".join(map(str, torch.as_tensor(tokens).tolist()))

    streamer = TextDiffusionStreamer(Tokenizer())
    arguments = {"target_lengths": 4, "eos_token_id": [59], "seeds": [0], "return_dict_in_generate": True}
    output = model.generate(
        torch.tensor([[5, 6]]), streamer=streamer, num_inference_steps=3, output_trajectory=True, **arguments
    )
    shown = capsys.readouterr().out
    drafts = [part.split("\033[0m")[0] for part in shown.split("\033[33m")[1:]]
    with torch.no_grad():
        expected = model.decode(output.trajectory[1:, 0]).argmax(-1)
    assert drafts == [" ".join(map(str, row)) for row in expected.tolist()]
    assert shown.rstrip().endswith(" ".join(map(str, output.sequences[0].tolist())))
    with pytest.raises(ValueError, match="batch size 1"):
        model.generate(torch.tensor([[5, 6], [7, 8]]), streamer=TextDiffusionStreamer(Tokenizer()))


def test_drafts_of_several_candidates_are_the_first_one_s(model):
    class Recorder:
        drafts = []

        def put_draft(self, value):
            self.drafts.append(value)

        def put(self, value):
            pass

        def end(self):
            pass

    ids = torch.tensor([[5, 6, 7]])
    several, one = Recorder(), Recorder()
    several.drafts, one.drafts = [], []
    model.generate(ids, streamer=several, target_lengths=5, num_candidates=3, seeds=[2])
    model.generate(ids, streamer=one, target_lengths=5, seeds=[2])
    assert len(several.drafts) == 3
    assert all(torch.equal(left, right) for left, right in zip(several.drafts, one.drafts))


def test_logits_processors_change_the_tokens_and_get_the_source(model):
    _, ids, mask = batch_of_rows([4, 6])
    seen = []

    def only_even(input_ids, scores):
        seen.append(input_ids)
        return scores.masked_fill(torch.arange(60) % 2 == 1, -torch.inf)

    arguments = {"target_lengths": 5, "seeds": [0, 1], "eos_token_id": [59]}
    plain = model.generate(ids, mask, **arguments)
    tokens = model.generate(ids, mask, logits_processor=LogitsProcessorList([only_even]), **arguments)
    assert (plain % 2 == 1).any() and (tokens % 2 == 0).all()
    assert torch.equal(torch.cat(seen), ids.repeat_interleave(5, dim=0))
    # By position, as in the contract.
    assert torch.equal(model.generate(ids, mask, None, None, LogitsProcessorList([only_even]), **arguments), tokens)


def test_the_shortest_target_is_kept_to():
    model = with_end_tokens(small_model(), bias=50.0)
    _, ids, mask = batch_of_rows([4, 6])
    assert (generate(model, ids, mask, target_lengths=9).lengths == 1).all()
    output = generate(model, ids, mask, target_lengths=9, min_new_tokens=4)
    assert (output.lengths == 4).all() and (output.sequences[:, 3] == 2).all()


def test_a_list_of_times_says_how_many_steps(model):
    ids = torch.tensor([[5, 6]])
    times = [0.0, 0.25, 1.0]
    assert generate(model, ids, time_schedule=times).num_field_evaluations == 2
    with pytest.raises(ValueError, match="num_inference_steps"):
        model.generate(ids, time_schedule=times, num_inference_steps=3)
    model.generation_config = YanGenerationConfig(time_schedule=times, max_new_tokens=9)
    assert generate(model, ids).num_field_evaluations == 2
    assert generate(model, ids, time_schedule="cosine").num_field_evaluations == 3
    shifted = {"time_schedule": "shifted", "time_shift": 5.0}
    model.generation_config = YanGenerationConfig(max_new_tokens=9, **shifted)
    assert generate(model, ids, time_schedule="uniform").num_field_evaluations == 3


def test_solvers_and_schedules_reach_the_sampler(model):
    """Against the solver called by hand."""
    ids = torch.tensor([[5, 6, 7]])
    start, experts = torch.randn(1, 5, 32), torch.randint(0, 4, (1, 5))
    fixed = {"initial_latents": start, "expert_indices": experts, "target_lengths": 5}
    for solver, schedule, shift in (("rk4", "uniform", None), ("heun", "cosine", None), ("midpoint", "shifted", 2.0)):
        output = generate(
            model, ids, solver=solver, time_schedule=schedule, time_shift=shift, num_inference_steps=2, **fixed
        )
        with torch.no_grad():
            context = model.model.prepare_context(model.model.encode(ids).last_hidden_state, None, torch.ones(1, 5))
            times = time_grid(2, schedule, *([shift] if shift else []))
            expected, _ = solve_flow(model.model.flow, start, context, times, None, experts[..., None], False, solver)
        torch.testing.assert_close(output.latents, expected, rtol=1e-5, atol=1e-5)


def test_tokens_outside_the_vocabulary_are_named(model):
    for name, value in (("suppress_tokens", [60]), ("eos_token_id", [99]), ("pad_token_id", -1)):
        with pytest.raises(ValueError, match="vocabulary"):
            model.generate(torch.tensor([[5, 6]]), **{name: value})


def test_what_a_trainer_passes_along_is_ignored(model):
    _, ids, mask = batch_of_rows([4, 6])
    tokens = model.generate(
        input_ids=ids, attention_mask=mask, labels=ids, num_beams=1, max_length=20, synced_gpus=False, seeds=[0, 1]
    )
    assert torch.equal(tokens, model.generate(ids, mask, max_length=20, seeds=[0, 1]))


def test_inputs_embeds(model):
    _, ids, mask = batch_of_rows([4, 6], "left")
    expected = generate(model, ids, mask, seeds=[0, 1])
    result = generate(model, None, mask, inputs_embeds=model.get_input_embeddings()(ids).detach(), seeds=[0, 1])
    assert torch.equal(result.sequences, expected.sequences)


@pytest.mark.skipif(not cpu_kernels.is_available(), reason="needs oneDNN on x86")
@pytest.mark.parametrize("adapted", [False, True])
def test_products_through_onednn_change_nothing_also_with_adapters(monkeypatch, adapted):
    """Small models stay below the size from which it is used; here everything goes through it."""
    model = small_model()
    if adapted:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
        plain = model.generate(torch.tensor([[5, 6, 7]]), seeds=[0], return_dict_in_generate=True).latents
        model = peft.get_peft_model(model, config).eval()
    _, ids, mask = batch_of_rows([4, 9, 6], "left")
    arguments = {"input_ids": ids, "attention_mask": mask, "seeds": [0, 1, 2], "return_dict_in_generate": True}
    expected = model.generate(**arguments)
    if adapted:
        changed = model.generate(input_ids=torch.tensor([[5, 6, 7]]), seeds=[0], return_dict_in_generate=True).latents
        assert changed.shape != plain.shape or not torch.allclose(changed, plain)
    monkeypatch.setattr(cpu_kernels, "_SMALLEST_PRODUCT", 1)
    result = model.generate(**arguments)
    assert torch.equal(result.sequences, expected.sequences)
    torch.testing.assert_close(result.latents, expected.latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.sequence_scores, expected.sequence_scores, rtol=1e-4, atol=1e-5)


def test_a_cold_gate_is_a_greedy_one(model):
    _, ids, mask = batch_of_rows([4, 9, 6])
    arguments = {"target_lengths": 20, "seeds": [0, 1, 2], "output_expert_indices": True}
    greedy = generate(model, ids, mask, expert_selection="greedy", **arguments).expert_indices
    assert torch.equal(generate(model, ids, mask, expert_temperature=1e-4, **arguments).expert_indices, greedy)
    assert not torch.equal(generate(model, ids, mask, **arguments).expert_indices, greedy)
