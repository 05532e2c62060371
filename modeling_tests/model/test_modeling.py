# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The models: padding, masks, initialisation, freezing, the loss's randomness and its gradients."""

import copy
import warnings

import pytest
import torch
from testing_utils import batch_of_rows, small_config, small_model

from yan_hf import YanForAutoEncoding, YanForConditionalGeneration, YanModel
from yan_hf.configuration_yan import DEFAULT_LOSS_WEIGHTS


SIDES = ["left", "right"]
# Transformers compiles flex attention, which takes longer than all else here.
IMPLEMENTATIONS = ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)]


def set_attention(model, implementation):
    model.set_attn_implementation(implementation)
    return model


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", SIDES)
@torch.no_grad()
def test_padding_changes_no_real_position(model, side, implementation):
    set_attention(model, implementation)
    rows, ids, mask = batch_of_rows([3, 9, 6], side, extra=2)
    state = torch.randn(3, 7, 32)
    times = torch.tensor([0.0, 0.4, 0.9])
    canvas = (torch.arange(7) < torch.tensor([[7], [2], [5]])).long()
    batched = model(ids, mask, latents=state, timesteps=times, decoder_attention_mask=canvas)
    for i, row in enumerate(rows):
        length = int(canvas[i].sum())
        single = model(row[None], latents=state[i : i + 1, :length], timesteps=times[i : i + 1])
        for name in ("logits", "velocity", "expert_fields", "gate_logits"):
            torch.testing.assert_close(batched[name][i, :length], single[name][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(batched.length_logits[i], single.length_logits[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            batched.encoder_last_hidden_state[i, mask[i].bool()],
            single.encoder_last_hidden_state[0],
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_what_stands_in_the_padding_does_not_matter(model, implementation):
    set_attention(model, implementation)
    _, ids, mask = batch_of_rows([3, 9])
    other = ids.masked_fill(mask == 0, 17)
    state, times = torch.randn(2, 4, 32), torch.zeros(2)
    expected = model(ids, mask, latents=state, timesteps=times)
    result = model(other, mask, latents=state, timesteps=times)
    torch.testing.assert_close(result.logits, expected.logits, rtol=1e-5, atol=1e-5)
    # The source does reach the target: without this the lines above would hold for a model that ignores it.
    changed = model(ids.roll(1, 0), mask.roll(1, 0), latents=state, timesteps=times)
    assert (changed.logits - expected.logits).abs().max() > 1e-2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_attention_implementations_agree(implementation):
    model = small_model()
    _, ids, mask = batch_of_rows([4, 9], "left")
    inputs = {"input_ids": ids, "attention_mask": mask, "latents": torch.randn(2, 5, 32), "timesteps": torch.rand(2)}
    expected = set_attention(model, "eager")(**inputs)
    assert model.config._attn_implementation == "eager"
    result = set_attention(model, implementation)(**inputs)
    torch.testing.assert_close(result.logits, expected.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_fully_padded_rows_are_finite_and_leave_others_alone(model, implementation):
    base = set_attention(model, implementation).model
    rows, ids, mask = batch_of_rows([5, 5])
    mask[1] = 0
    state, canvas = torch.randn(2, 4, 32), torch.ones(2, 4, dtype=torch.long)
    canvas[1] = 0
    output = base(ids, mask, latents=state, decoder_attention_mask=canvas)
    assert all(torch.isfinite(value).all() for value in output.to_tuple())
    single = base(rows[0][None], latents=state[:1])
    torch.testing.assert_close(output.last_hidden_state[0], single.last_hidden_state[0], rtol=1e-5, atol=1e-5)


def test_gradients_are_finite_with_a_fully_padded_target():
    model = small_model().train()
    _, ids, mask = batch_of_rows([5, 4])
    labels = torch.randint(5, 60, (2, 4))
    labels[1] = -100
    model(ids, mask, labels=labels).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_two_dimensional_masks_of_flash_attention_pad_the_source_only(model):
    """Flash attention's mask is `(B, Lx)`; its kernels would drop queries by it."""
    cross = model.model.flow.layers[0].cross_attn
    states, source = torch.randn(2, 3, 32), torch.randn(2, 5, 32)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    result, _ = cross(states, mask, cross.project_key_value(source))
    for row, length in enumerate((3, 5)):
        single, _ = cross(states[row : row + 1], None, cross.project_key_value(source[row : row + 1, :length]))
        torch.testing.assert_close(result[row], single[0], rtol=1e-5, atol=1e-5)


def test_cross_attention_only_where_asked():
    model = small_model(cross_attention_layers=[1])
    assert [layer.has_cross_attention for layer in model.model.flow.layers] == [False, True, False]
    assert [layer.adaptive_norm.out_features // 32 for layer in model.model.flow.layers] == [4, 6, 4]
    _, ids, _ = batch_of_rows([5])
    model.set_attn_implementation("eager")
    output = model(ids, output_attentions=True, output_hidden_states=True)
    assert (len(output.attentions), len(output.cross_attentions), len(output.hidden_states)) == (3, 1, 4)
    assert (len(output.encoder_attentions), len(output.encoder_hidden_states)) == (2, 3)


def test_attention_probabilities_are_zero_on_padding(model):
    set_attention(model, "eager")
    _, ids, mask = batch_of_rows([3, 6])
    output = model(ids, mask, latents=torch.randn(2, 4, 32), output_attentions=True)
    for weights in (*output.encoder_attentions, *output.cross_attentions):
        assert (weights[0, :, :, 3:] == 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))


# Initialisation


def check_initial_weights(model):
    for layer in model.model.flow.layers:
        bias = layer.adaptive_norm.bias.detach().view(-1, 2, model.config.hidden_size)
        assert (bias[:, 0] == 1).all() and (bias[:, 1] == 0).all()
    experts = model.model.flow.experts
    assert (experts.up_proj_bias == 0).all() and (experts.down_proj_bias == 0).all()
    for weight in (experts.up_proj, experts.down_proj, model.model.encoder.layers[0].self_attn.q_proj.weight):
        assert float(weight.std()) == pytest.approx(model.config.initializer_range, rel=0.1)
    assert not torch.equal(experts.up_proj[0], experts.up_proj[1])


def test_model_from_a_config_is_initialised():
    check_initial_weights(YanForConditionalGeneration(small_config()))


def test_missing_keys_are_initialised_on_load(tmp_path):
    """An auto-encoder's checkpoint has no flow: loading it starts the flow as a new model would."""
    source = YanForAutoEncoding(small_config())
    source.save_pretrained(tmp_path)
    model, info = YanForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    check_initial_weights(model)
    assert {key.split(".")[0] if "flow" not in key else "flow" for key in info["missing_keys"]} == {
        "flow",
        "length_head",
    }
    assert not info["unexpected_keys"]
    torch.testing.assert_close(model.model.encoder.norm.weight, source.model.encoder.norm.weight)
    assert torch.equal(model.lm_head.weight, source.lm_head.weight)


def test_auto_encoder_takes_a_full_model_s_encoder(tmp_path):
    full = small_model()
    full.save_pretrained(tmp_path)
    model, info = YanForAutoEncoding.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and model.model.flow is None
    assert torch.equal(
        model.model.encoder.layers[0].self_attn.q_proj.weight, full.model.encoder.layers[0].self_attn.q_proj.weight
    )


# Embeddings


def test_tied_head_shares_the_token_table_and_survives_saving(tmp_path):
    model = small_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = YanForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    untied = small_model()
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


@pytest.mark.parametrize("tie", [False, True])
def test_resize_token_embeddings(tie):
    model = small_model(tie_word_embeddings=tie)
    before = model.model.embed_tokens.weight.detach().clone()
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70
    assert model.get_input_embeddings().weight.shape == (70, 32)
    assert model.get_output_embeddings().weight.shape == (70, 32) and model.lm_head.bias.shape == (70,)
    assert torch.equal(model.model.embed_tokens.weight[:60], before)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    ids = torch.tensor([[69, 5, 6]])
    assert model(ids, labels=ids).logits.shape == (1, 3, 70)
    table = torch.nn.Embedding(70, 32)
    model.set_input_embeddings(table)
    assert model.model.embed_tokens is table


# Experts


def test_experts_implementations_agree_and_really_switch(model):
    _, ids, mask = batch_of_rows([4, 9])
    results, used = {}, []
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        used.append(model.model.flow.experts.config._experts_implementation)
        results[implementation] = model.generate(
            ids, mask, target_lengths=6, seeds=[0, 1], return_dict_in_generate=True
        ).latents
    assert used == ["eager", "batched_mm", "grouped_mm"]
    torch.testing.assert_close(results["batched_mm"], results["eager"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results["grouped_mm"], results["eager"], rtol=1e-5, atol=1e-5)


def test_chosen_expert_equals_its_field_among_all(model):
    experts = model.model.flow.experts
    states, index = torch.randn(7, 32), torch.randint(0, 4, (7, 1))
    fields = experts(states)
    assert fields.shape == (7, 4, 32)
    torch.testing.assert_close(experts(states, index, torch.ones(7, 1)), fields[torch.arange(7), index[:, 0]])
    expected = torch.nn.functional.linear(
        torch.nn.functional.gelu(torch.nn.functional.linear(states, experts.up_proj[2], experts.up_proj_bias[2])),
        experts.down_proj[2],
        experts.down_proj_bias[2],
    )
    torch.testing.assert_close(fields[:, 2], expected)


# Freezing


def test_everything_trains_by_default(model):
    assert all(p.requires_grad for p in model.parameters())
    model.train()
    assert all(module.training for module in model.modules())


def test_frozen_parts_get_no_gradient_and_stay_in_eval_mode(tmp_path):
    model = small_model(hidden_dropout=0.5, latent_noise=1.0).train()
    model.freeze("encoder", "decoder", "token_embeddings")
    _, ids, mask = batch_of_rows([4, 6])
    first, second = (model.model.encode(ids, mask).last_hidden_state for _ in range(2))
    assert torch.equal(first, second)  # neither dropout nor latent noise
    model(ids, mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    frozen = {n for n, p in model.named_parameters() if p.grad is None}
    assert frozen == {
        n
        for n, _ in model.named_parameters()
        if n.startswith(("model.encoder", "model.decoder", "model.embed_tokens", "lm_head"))
    }
    model.save_pretrained(tmp_path)
    loaded = YanForConditionalGeneration.from_pretrained(tmp_path)
    assert not any(p.requires_grad for p in loaded.model.encoder.parameters())
    loaded.train()
    assert not loaded.model.encoder.training and not loaded.lm_head.weight.requires_grad and loaded.model.flow.training
    loaded.unfreeze()
    assert loaded.model.encoder.training and all(p.requires_grad for p in loaded.parameters())
    with pytest.raises(ValueError, match="gate"):
        loaded.freeze("gate")


# The loss


def test_frozen_parts_of_a_configuration_are_frozen_from_the_start():
    torch.manual_seed(0)
    model = YanForConditionalGeneration(small_config(frozen_parts=["encoder"], hidden_dropout=0.5))
    assert not model.model.encoder.training and model.model.flow.training
    model(**labelled_batch()).loss.backward()
    assert model.model.encoder.norm.weight.grad is None and model.model.flow.norm.weight.grad is not None


def test_a_tied_table_stays_frozen_with_either_part():
    model = small_model(tie_word_embeddings=True).freeze("decoder", "token_embeddings").unfreeze("decoder")
    assert not model.model.embed_tokens.weight.requires_grad and model.lm_head.bias.requires_grad


def labelled_batch():
    _, ids, mask = batch_of_rows([4, 9, 6])
    labels = torch.randint(5, 60, (3, 7), generator=torch.Generator().manual_seed(3))
    labels[1, 4:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_loss_is_the_weighted_sum_of_its_terms():
    weights = {
        "flow": 0.5,
        "latent": 2.0,
        "token": 3.0,
        "gate_entropy": 0.7,
        "load_balance": 1.5,
        "mmd": 4.0,
        "l2": 0.1,
    }
    model = small_model(loss_weights={**weights, "length": 0.3})
    output = model(**labelled_batch())
    expected = sum({**weights, "length": 0.3}[name] * float(term) for name, term in output.loss_terms.items())
    assert len(output.loss_terms) == 8
    assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert all(not term.requires_grad for term in output.loss_terms.values())


def test_terms_without_weight_are_not_computed():
    model = small_model(loss_weights=dict.fromkeys(["latent", "token", "mmd", "l2", "length", "load_balance"], 0))
    calls = []
    model.model.flow.register_forward_hook(lambda *_: calls.append(1))
    output = model(**labelled_batch())
    assert not {"latent", "token", "mmd"} & set(output.loss_terms)
    assert float(output.loss) == pytest.approx(0.01 * float(output.loss_terms["flow"]))
    assert len(calls) == 1


def test_training_costs_one_pass_and_one_for_each_solver_step():
    model = small_model(solver_steps=4)
    calls = []
    model.model.flow.register_forward_hook(lambda *_: calls.append(1))
    batch = labelled_batch()
    expected = model(**batch)
    assert len(calls) == 1 + 4
    # Without the flow term no pass of its own: the gate's terms are those of the solver's first step.
    calls.clear()
    for weights in ({"flow": 0.0}, {"flow": 0.0, "latent": 0.0}):
        model.config.loss_weights |= weights
        output = model(**batch)
        assert len(calls) == 4 and "flow" not in output.loss_terms
        torch.testing.assert_close(output.latents, expected.latents)
        calls.clear()
    gate = output.gate_logits[batch["labels"] != -100].softmax(-1)
    entropy = -(gate * gate.log()).sum(-1).mean()
    assert float(output.loss_terms["gate_entropy"]) == pytest.approx(-float(entropy), rel=1e-4)


def test_evaluation_repeats_and_follows_the_generator(model):
    batch = labelled_batch()
    state = torch.random.get_rng_state()
    first, second = model(**batch), model(**batch)
    assert first.loss == second.loss and torch.equal(first.logits, second.logits)
    assert torch.equal(torch.random.get_rng_state(), state)
    seeded = [model(**batch, generator=torch.Generator().manual_seed(seed)).loss.item() for seed in (7, 7, 8)]
    assert seeded[0] == seeded[1] != seeded[2]
    model.train()
    assert model(**batch).loss != model(**batch).loss


def test_ignored_labels_do_not_count(model):
    batch = labelled_batch()
    wide = {**batch, "labels": torch.nn.functional.pad(batch["labels"], (0, 3), value=-100)}
    output = model(**wide)
    # Wider padding draws other noise; with the deterministic start and one expert nothing random is left but time.
    quiet = small_model(init_noise=0.0, num_experts=1, loss_weights={"mmd": 0})
    torch.testing.assert_close(quiet(**wide).loss, quiet(**batch).loss)
    assert output.logits.shape[1] == 10


@pytest.mark.parametrize("term", ["latent", "token"])
def test_unrolled_terms_have_gradients_through_all_steps(term):
    """Zeroing the gradient that leaves any one solver step must change the gradient of the loss."""
    weights = dict.fromkeys(["latent", "token", "load_balance", "mmd", "l2", "length"], 0) | {term: 1.0, "flow": 1e-3}
    model = small_model(loss_weights=weights, solver_steps=3)
    batch = labelled_batch()

    def gradient(cut):
        model.zero_grad()
        calls = []

        def hook(module, inputs, output):
            calls.append(1)
            if len(calls) == cut:
                output.velocity = output.velocity.detach()
            return output

        handle = model.model.flow.register_forward_hook(hook)
        model(**batch, generator=torch.Generator().manual_seed(0)).loss.backward()
        handle.remove()
        assert len(calls) == 4  # the flow term's pass, then three steps
        return model.model.flow.experts.down_proj.grad.clone()

    full = gradient(cut=0)
    # The first pass belongs to flow matching: the unrolled terms share nothing with it.
    torch.testing.assert_close(gradient(cut=1), full)
    for step in (2, 3, 4):
        assert (gradient(cut=step) - full).abs().max() > 1e-6


def test_solver_s_gradient_by_finite_differences():
    """The derivative of the token term along one direction of the weights, in float64."""
    weights = dict.fromkeys(["flow", "latent", "load_balance", "mmd", "l2", "length"], 0)
    model = small_model(loss_weights=weights).double()
    batch = labelled_batch()
    parameter = model.model.flow.experts.up_proj

    def loss():
        return model(**batch, generator=torch.Generator().manual_seed(0)).loss

    loss().backward()
    direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = float((parameter.grad * direction).sum())
    step = 1e-6
    with torch.no_grad():
        parameter += step * direction
        above = float(loss())
        parameter -= 2 * step * direction
        below = float(loss())
    assert (above - below) / (2 * step) == pytest.approx(expected, rel=1e-5)


def test_target_latents_are_trained_by_the_flow_term():
    model = small_model(loss_weights=dict.fromkeys(DEFAULT_LOSS_WEIGHTS, 0) | {"flow": 1.0})
    batch = labelled_batch()
    # Only targets use this token, so its embedding is reached through the target's latents alone.
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == 59, 58)
    batch["labels"][0, 0] = 59
    model(**batch).loss.backward()
    assert model.model.embed_tokens.weight.grad[59].any()


def test_length_head_leaves_the_encoder_alone_unless_asked():
    for detached in (True, False):
        weights = dict.fromkeys(["flow", "latent", "token", "load_balance", "mmd", "l2"], 0)
        model = small_model(loss_weights=weights, detach_length_head=detached)
        model(**labelled_batch()).loss.backward()
        gradient = model.model.encoder.norm.weight.grad
        assert (gradient is None or not gradient.any()) == detached
        assert model.length_head.down_proj.weight.grad.any()


@pytest.mark.parametrize("has_masks", [True, False])
def test_the_length_of_a_target_whose_masks_have_theirs_leaves_the_encoder_alone(has_masks):
    """Its head learns it nevertheless, for sources without masks."""
    weights = dict.fromkeys(["flow", "latent", "token", "load_balance", "mmd", "l2"], 0)
    model = small_model(loss_weights=weights, detach_length_head=False, start_state="aligned", mask_token_id=4)
    torch.nn.init.zeros_(model.token_length_head.down_proj.weight)  # no gradient goes through it
    ids = torch.tensor([[7, 4 if has_masks else 9, 8, 2]])
    model(input_ids=ids, labels=torch.tensor([[7, 10, 8, 2]] if has_masks else [[7, 10, 2]])).loss.backward()
    assert model.model.encoder.norm.weight.grad.any() == (not has_masks)
    assert model.length_head.down_proj.weight.grad.any()


def test_length_head_starts_as_a_mean_and_learns_where_to_look():
    """One token of the source tells the length; a mean over the source does not show which."""
    torch.manual_seed(0)
    model = YanForConditionalGeneration(small_config(detach_length_head=False))
    head = model.length_head
    latents, mask = torch.randn(3, 6, 32), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    means = torch.stack([row[kept.bool()].mean(dim=0) for row, kept in zip(latents, mask)])
    expected = head.down_proj(torch.nn.functional.gelu(head.up_proj(means)))
    torch.testing.assert_close(head(latents, mask), expected)
    assert not head(torch.full((1, 6, 32), 9.0), mask[:1] * 0).sub(head(torch.zeros(1, 1, 32))).abs().max() > 1e-6
    # The marked position, the one whose first entry is high, holds the length in the others.
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    codes = torch.randn(8, 32)

    def draw(count):
        found = codes[torch.randint(8, (count, 12))] + 0.1 * torch.randn(count, 12, 32)
        place, lengths = torch.randint(12, (count,)), torch.randint(8, (count,))
        found[:, :, 0] = 0.0
        found[torch.arange(count), place] = codes[lengths]
        found[torch.arange(count), place, 0] = 3.0
        return found, lengths

    for _ in range(400):
        found, lengths = draw(64)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(found), lengths).backward()
        optimizer.step()
    found, lengths = draw(500)
    assert (head(found).argmax(-1) == lengths).float().mean() > 0.95


@pytest.mark.parametrize("frozen", (False, True))
def test_embedding_dropout_is_for_the_source_in_training(frozen):
    model = small_model(embedding_dropout=0.4, frozen_parts=["encoder"] if frozen else [])
    _, ids, mask = batch_of_rows([5, 3])
    inner = model.model
    still = inner.encode(ids, mask).last_hidden_state
    torch.testing.assert_close(still, inner.encode(ids, mask).last_hidden_state)
    model.train()
    assert torch.equal(inner.encode(ids, mask).last_hidden_state, still) == frozen
    # What the flow regresses stays as it is.
    target = inner.encode(ids, mask, is_target=True).last_hidden_state
    torch.testing.assert_close(target, still)
    with pytest.raises(ValueError, match="`embedding_dropout`.*1.5"):
        small_config(embedding_dropout=1.5)


def test_length_term_counts_to_the_first_end_token():
    """A canvas with slack is filled with end tokens; the length to predict is the target's own."""
    model = small_model(init_noise=0.0, num_experts=1)
    _, ids, mask = batch_of_rows([4, 6])
    labels = torch.tensor([[7, 8, 2, -100, -100, -100], [7, 8, 9, 9, 2, -100]])
    slack = torch.tensor([[7, 8, 2, 2, 2, -100], [7, 8, 9, 9, 2, 2]])
    plain = model(ids, mask, labels=labels).loss_terms["length"]
    torch.testing.assert_close(model(ids, mask, labels=slack).loss_terms["length"], plain)
    logits = model(ids, mask, labels=labels).length_logits
    torch.testing.assert_close(plain, torch.nn.functional.cross_entropy(logits, torch.tensor([2, 4])).detach())


def test_encoder_outputs_may_be_a_tuple(model):
    batch = labelled_batch()
    source = model.model.encode(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    result = model(attention_mask=batch["attention_mask"], labels=batch["labels"], encoder_outputs=(source,))
    torch.testing.assert_close(result.loss, model(**batch).loss)


def test_latent_noise_is_for_training_only():
    model = small_model(latent_noise=0.5)
    _, ids, mask = batch_of_rows([4, 6])
    clean = model.model.encode(ids, mask).last_hidden_state
    assert torch.equal(clean, model.model.encode(ids, mask).last_hidden_state)
    noisy = model.train().model.encode(ids, mask).last_hidden_state
    scales = (noisy - clean).std(dim=(1, 2))
    assert (scales > 0).all() and (scales < 0.6).all() and (scales[0] - scales[1]).abs() > 1e-4


def test_token_weights_move_the_loss(model):
    batch = labelled_batch()
    ones = torch.ones(batch["labels"].shape)
    base, even = model(**batch).loss_terms, model(**batch, token_weights=3 * ones).loss_terms
    torch.testing.assert_close(base["token"], even["token"])
    skewed = model(**batch, token_weights=ones.index_fill(1, torch.tensor([0]), 10.0)).loss_terms
    assert skewed["token"] != base["token"] and skewed["flow"] != base["flow"] and skewed["mmd"] == base["mmd"]


@pytest.mark.parametrize("weighted", (False, True))
def test_sparse_prediction_changes_neither_loss_nor_gradient(weighted):
    model = YanForAutoEncoding(small_model(label_smoothing=0.1).config).eval()
    _, ids, mask = batch_of_rows([6, 3, 5])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, ::2] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if weighted:
        batch["token_weights"] = torch.rand(labels.shape, generator=torch.Generator().manual_seed(0)) + 0.5
    found = {}
    for sparse in (False, True):
        model.zero_grad()
        output = model(**batch, sparse_prediction=sparse)
        output.loss.backward()
        found[sparse] = output, {name: weight.grad.clone() for name, weight in model.named_parameters()}
    dense, sparse = found[False], found[True]
    torch.testing.assert_close(sparse[0].loss, dense[0].loss)
    torch.testing.assert_close(sparse[0].logits, dense[0].logits[labels != -100])
    for name, gradient in dense[1].items():
        torch.testing.assert_close(sparse[1][name], gradient, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="`sparse_prediction=True` needs `labels`"):
        model(ids, mask, sparse_prediction=True)


def test_gradient_checkpointing_changes_no_gradient():
    batch = labelled_batch()
    gradients = []
    for checkpointing in (False, True):
        model = small_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model(**batch, generator=torch.Generator().manual_seed(0)).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_auto_encoder_loss_and_padding():
    torch.manual_seed(0)
    model = YanForAutoEncoding(small_config()).eval()
    rows, ids, mask = batch_of_rows([3, 7])
    labels = ids.masked_fill(mask == 0, -100)
    output = model(ids, mask, labels=labels)
    assert set(output.loss_terms) == {"token", "mmd", "l2"}
    expected = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss_terms["token"], expected)
    torch.testing.assert_close(output.logits[0, :3], model(rows[0][None]).logits[0], rtol=1e-5, atol=1e-5)
    assert model(ids, mask, labels=labels).loss == output.loss


def test_half_precision_is_close_to_float32(model):
    batch = labelled_batch()
    expected = model(**batch)
    half = copy.deepcopy(model).to(torch.bfloat16)
    result = half(**batch)
    assert result.logits.dtype == torch.bfloat16 and torch.isfinite(result.loss)
    assert float(result.loss_terms["flow"]) == pytest.approx(float(expected.loss_terms["flow"]), rel=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
        mixed = model(**batch)
    assert mixed.loss_terms["flow"].dtype == torch.float32
    assert float(mixed.loss_terms["flow"]) == pytest.approx(float(expected.loss_terms["flow"]), rel=0.05)


def test_base_model_has_no_vocabulary_head():
    names = dict(YanModel(small_config()).named_parameters())
    assert not any("lm_head" in name or "length_head" in name for name in names)
    assert {name.split(".")[0] for name in names} == {"embed_tokens", "embed_positions", "encoder", "flow", "decoder"}
