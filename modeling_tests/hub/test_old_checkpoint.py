# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A checkpoint that version 0.1 saved, before the code moved into its rooms, gives the tokens that it gave then."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM

import yan_hf  # noqa: F401


FOLDER = Path(__file__).with_name("checkpoint_0_1")


def test_a_checkpoint_of_version_0_1_gives_the_same_tokens(caplog):
    model, info = AutoModelForSeq2SeqLM.from_pretrained(FOLDER, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    expected = json.loads((FOLDER / "expected.json").read_text())
    source = {name: torch.tensor(expected[name]) for name in ("input_ids", "attention_mask")}
    assert model.generate(**source, seeds=[1, 2]).tolist() == expected["sequences"]
    sampled = model.generate(**source, seeds=[1, 2], do_sample=True, num_candidates=2, target_lengths=[6, 4])
    assert sampled.tolist() == expected["sampled"]
    assert "does not know" not in caplog.text  # fields that are gone are no newer version's
