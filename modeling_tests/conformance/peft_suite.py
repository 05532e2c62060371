# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""PEFT's encoder-decoder tests, with the models of `make_models.py` in the place of those on the Hub."""

from make_models import MODELS
from peft_tests import test_encoder_decoder_models


# The list that the tests are parametrized with.
test_encoder_decoder_models.PEFT_ENCODER_DECODER_MODELS_TO_TEST[:] = MODELS


class TestYanPeft(test_encoder_decoder_models.TestEncoderDecoderModels):
    def prepare_inputs_for_testing(self):
        inputs = super().prepare_inputs_for_testing()
        # There is no prefix of the target to be given; `generate` refuses one.
        inputs.pop("decoder_input_ids")
        return inputs
