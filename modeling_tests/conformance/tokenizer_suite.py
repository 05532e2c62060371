# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Transformers' common tokenizer tests, with what `train_tokenizer` makes: a unigram and a BPE vocabulary."""

import unittest

from make_models import TOKENIZERS
from tests.test_tokenization_common import TokenizerTesterMixin
from transformers import PreTrainedTokenizerFast


class UnigramTokenizerTest(TokenizerTesterMixin, unittest.TestCase):
    tokenizer_class = PreTrainedTokenizerFast
    from_pretrained_id = TOKENIZERS["unigram"]


class BpeTokenizerTest(TokenizerTesterMixin, unittest.TestCase):
    tokenizer_class = PreTrainedTokenizerFast
    from_pretrained_id = TOKENIZERS["bpe"]
