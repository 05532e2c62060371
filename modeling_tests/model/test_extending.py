# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
One change, one place: what a new solver, loss term, backbone or task needs is an entry of a table.

How many of the package's files a real one touches stands above each test; its test and its page come on top.
"""

import pytest
import torch
from testing_utils import batch_of_rows, small_config, small_model
from torch import nn
from transformers import AutoModelForSeq2SeqLM

from yan_hf import TaskEncoder, YanForConditionalGeneration, YanGenerationConfig, configuration_yan, train_tokenizer
from yan_hf.data.tasks import TASKS, Task, TextPair
from yan_hf.data.tokenization import MASK_MARKER
from yan_hf.losses import LOSS_FUNCTIONS
from yan_hf.mixers import MIXERS
from yan_hf.solver import SOLVERS, Tableau


# One file: the tableau in `solver.SOLVERS`.
@pytest.mark.slow
def test_a_solver(model, monkeypatch, tmp_path):
    ralston = Tableau((0.0, 2 / 3), ((), (2 / 3,)), (0.25, 0.75))
    with pytest.raises(ValueError, match="solver"):
        YanGenerationConfig(solver="ralston").validate()
    monkeypatch.setitem(SOLVERS, "ralston", ralston)
    YanGenerationConfig(solver="ralston").save_pretrained(tmp_path)
    assert YanGenerationConfig.from_pretrained(tmp_path).solver == "ralston"
    _, ids, mask = batch_of_rows([4, 6])
    arguments = {"target_lengths": 5, "seeds": [1, 2], "return_dict_in_generate": True}
    output = model.generate(ids, attention_mask=mask, solver="ralston", **arguments)
    euler = model.generate(ids, attention_mask=mask, **arguments)
    assert not output.latents.allclose(euler.latents)
    fine = {"num_inference_steps": 64, **arguments}
    exact = model.generate(ids, attention_mask=mask, solver="rk4", **fine).latents
    solved = model.generate(ids, attention_mask=mask, solver="ralston", **fine).latents
    first_order = model.generate(ids, attention_mask=mask, **fine).latents
    assert (solved - exact).norm() < 0.1 * (first_order - exact).norm()


# Two files: the function in `losses.LOSS_FUNCTIONS`, its weight in `configuration_yan.DEFAULT_LOSS_WEIGHTS`.
def test_a_loss_term(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="drift"):
        small_config(loss_weights={"drift": 1.0})
    monkeypatch.setitem(configuration_yan.DEFAULT_LOSS_WEIGHTS, "drift", 0.0)
    monkeypatch.setitem(LOSS_FUNCTIONS, "drift", lambda inputs: inputs.latents.square().mean())
    model = small_model(loss_weights={"drift": 0.5})
    _, ids, mask = batch_of_rows([4, 6])
    output = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    torch.testing.assert_close(output.loss_terms["drift"], output.latents.square().mean().detach())
    weighted = sum(weight * output.loss_terms.get(name, 0.0) for name, weight in model.config.loss_weights.items())
    torch.testing.assert_close(output.loss.detach(), weighted)
    model.save_pretrained(tmp_path)
    assert YanForConditionalGeneration.from_pretrained(tmp_path).config.loss_weights["drift"] == 0.5


class MovingAverage(nn.Module):
    """Mixes a position with its neighbours; padding counts as zeros."""

    def __init__(self, config):
        super().__init__()
        self.feed_forward_multiplier = 2
        self.strength = nn.Parameter(torch.empty(config.hidden_size))

    @torch.no_grad()
    def reset(self):
        self.strength.fill_(0.5)

    def forward(self, hidden_states, padding_mask=None):
        if padding_mask is not None:
            hidden_states = hidden_states * padding_mask[..., None]
        padded = nn.functional.pad(hidden_states, (0, 0, 1, 1))
        return self.strength * (padded[:, :-2] + padded[:, 2:])


# Two files: the module in `mixers.MIXERS`, its name and its fields in `configuration_yan`.
def test_a_backbone(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="average"):
        small_config(encoder_backbone="average")
    monkeypatch.setattr(configuration_yan, "BACKBONES", (*configuration_yan.BACKBONES, "average"))
    monkeypatch.setitem(MIXERS, "average", MovingAverage)
    model = small_model(encoder_backbone="average", flow_backbone="average")
    layer = model.model.encoder.layers[0]
    assert torch.equal(layer.mixer.strength, torch.full((32,), 0.5)) and layer.feed_forward.up_proj.out_features == 64
    rows, ids, mask = batch_of_rows([4, 6], side="left", extra=3)
    output = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    output.loss.backward()
    assert all(layer.mixer.strength.grad.any() for layer in model.model.flow.layers)
    asked = {"attention_mask": mask, "target_lengths": [5, 3], "seeds": [1, 2], "return_dict_in_generate": True}
    together = model.generate(ids, **asked).latents
    for row, length in enumerate(asked["target_lengths"]):
        alone = model.generate(
            rows[row][None], target_lengths=length, seeds=[row + 1], return_dict_in_generate=True
        ).latents[0]
        torch.testing.assert_close(alone, together[row, :length], rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(ids, **asked).latents, together)


def test_every_backbone_is_attention_or_has_its_mixer():
    assert set(configuration_yan.BACKBONES) == {"transformer", *MIXERS}


# One file: the columns and the function in `data.tasks.TASKS`.
def test_a_task(monkeypatch):
    def reverse(row, names):
        return [TextPair(f"{row['text']} {MASK_MARKER}", " ".join(reversed(row["text"].split())))]

    tokenizer = train_tokenizer(["one two three"] * 5, vocab_size=300, model_type="bpe")
    with pytest.raises(ValueError, match="reversal"):
        TaskEncoder("reversal", tokenizer)
    monkeypatch.setitem(TASKS, "reversal", Task(("text",), reverse))
    (source,), (target,) = TaskEncoder("reversal", tokenizer)({"text": ["one two three"]}).values()
    assert tokenizer.decode(target, skip_special_tokens=True).strip() == "three two one"
    assert tokenizer.mask_token_id in source
