# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`ModelTesterMixin` and `ConfigTester` of the installed Transformers, run against the three YAN classes."""

import unittest

import torch
from tests import test_modeling_common
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor, random_attention_mask
from transformers import BertConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.testing_utils import torch_device

from yan_hf import YanConfig, YanForAutoEncoding, YanForConditionalGeneration, YanModel


# The tests decide by class name in these tables, which only hold the library's own models.
MODEL_MAPPING_NAMES["yan"] = "YanModel"
MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES["yan"] = "YanForConditionalGeneration"


class YanModelTester:
    """A small model and inputs for it. Source and target have the same length, as the shape checks assume."""

    num_hidden_states_types = 2  # of the encoder and of the flow
    loss_reduction = "global"

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent
        self.batch_size = 3
        self.seq_length = 7
        self.hidden_size = 32
        self.num_hidden_layers = 2
        self.num_attention_heads = 4
        self.vocab_size = 99
        self.is_training = True

    def get_config(self) -> YanConfig:
        return YanConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            encoder_layers=self.num_hidden_layers,
            flow_layers=self.num_hidden_layers,
            decoder_layers=1,
            num_experts=4,
            max_position_embeddings=64,
            # Within the smallest vocabulary that the resizing test asks for.
            mask_token_id=3,
            # At 0.02 a wrong eager path passes.
            initializer_range=0.1,
            loss_reduction=self.loss_reduction,
        )

    def prepare_config_and_inputs_for_common(self):
        inputs = {
            "input_ids": ids_tensor([self.batch_size, self.seq_length], self.vocab_size),
            "attention_mask": random_attention_mask([self.batch_size, self.seq_length]),
            "latents": floats_tensor([self.batch_size, self.seq_length, self.hidden_size]),
            "timesteps": torch.linspace(0.1, 0.9, self.batch_size, device=torch_device),
        }
        return self.get_config(), inputs


class YanModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (YanModel, YanForConditionalGeneration)
    # There is no autoregressive decoding to test.
    all_generative_model_classes = ()

    def setUp(self):
        # The inputs' own generator, which nothing seeds: in half precision a comparison may fail by one rounding.
        test_modeling_common.global_rng.seed(0)
        self.model_tester = YanModelTester(self)
        self.config_tester = ConfigTester(self, config_class=YanConfig, hidden_size=32, num_attention_heads=4)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if "labels" in inputs:
            # The loss draws state and time itself.
            inputs.pop("latents", None)
            inputs.pop("timesteps", None)
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()


class YanMambaModelTester(YanModelTester):
    """The Mamba backbone in encoder and flow."""

    def get_config(self) -> YanConfig:
        config = super().get_config()
        config.encoder_backbone = "mamba"
        # Two tests ask for the weights of self-attention; there only the encoder is without.
        asks_for_attention = getattr(self.parent, "_testMethodName", "") in (
            "test_attention_outputs",
            "test_retain_grad_hidden_states_attentions",
        )
        config.flow_backbone = "transformer" if asks_for_attention else "mamba"
        return config


class YanMambaModelTest(YanModelTest):
    def setUp(self):
        super().setUp()
        self.model_tester = YanMambaModelTester(self)


class YanPretrainedEncoderTester(YanModelTester):
    """A pretrained encoder of Transformers."""

    def get_config(self) -> YanConfig:
        sizes = {name: getattr(self, name) for name in ("vocab_size", "num_hidden_layers", "num_attention_heads")}
        encoder = BertConfig(**sizes, hidden_size=32, intermediate_size=32, max_position_embeddings=64)
        return YanConfig(**{**super().get_config().to_dict(), "encoder_config": encoder})


class YanPretrainedEncoderTest(YanModelTest):
    def setUp(self):
        super().setUp()
        self.model_tester = YanPretrainedEncoderTester(self)


class YanAutoEncodingTester(YanModelTester):
    num_hidden_states_types = 1

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        return config, {name: inputs[name] for name in ("input_ids", "attention_mask")}


class YanAutoEncodingTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (YanForAutoEncoding,)
    all_generative_model_classes = ()

    def setUp(self):
        test_modeling_common.global_rng.seed(0)
        self.model_tester = YanAutoEncodingTester(self)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels:
            inputs["labels"] = inputs["input_ids"].clone()
        return inputs


@unittest.skip("an auto-encoder has no experts that a kernel could be called for")
def no_experts(self):
    """It shares its configuration, and so the choice of a kernel, with models that have experts."""


for _name in dir(ModelTesterMixin):
    if _name.startswith("test_eager_matches_batched_and_grouped_inference"):
        setattr(YanAutoEncodingTest, _name, no_experts)
