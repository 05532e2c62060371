# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Saves small models and tokenizers into the working folder, where PEFT's and the tokenizer tests load them."""

import sys
from pathlib import Path

import torch
from model_suite import YanMambaModelTester, YanModelTester
from tests import test_tokenization_common

from yan_hf import YanForConditionalGeneration, train_tokenizer


# By what the tests call them; no name may look like one of the library's models.
MODELS = {"yan-transformer": YanModelTester, "yan-mamba": YanMambaModelTester}
TOKENIZERS = {"unigram": "yan-unigram-tokenizer", "bpe": "yan-bpe-tokenizer"}


def main(folder: Path):
    for name, tester in MODELS.items():
        torch.manual_seed(0)
        config = tester(None).get_config()
        config.attention_bias = True  # one method adapts biases only
        model = YanForConditionalGeneration(config)
        # Tests compare the texts of several calls without a seed.
        model.generation_config.update(init_noise=0.0, expert_selection="greedy")
        model.save_pretrained(folder / name)
    text = Path(test_tokenization_common.__file__).with_name("fixtures") / "sample_text.txt"
    for model_type, name in TOKENIZERS.items():
        train_tokenizer(text.read_text().splitlines(), 400, model_type).save_pretrained(folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
