# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Transformers' tensor-, expert- and FSDP-parallel tests, on two ranks on the CPU."""

import functools
import multiprocessing
import unittest

import torch
from model_suite import YanAutoEncodingTester, YanMambaModelTester, YanModelTester
from seeded import AutoEncodingRankConfig, RankConfig, SeededAutoEncoding, SeededYan
from tests import test_fsdp_mixin, test_tensor_parallel_mixin
from tests.test_fsdp_mixin import FSDPTesterMixin
from tests.test_tensor_parallel_mixin import TensorParallelTesterMixin


try:
    from tests import test_expert_parallel_mixin
    from tests.test_expert_parallel_mixin import ExpertParallelTesterMixin
except ImportError:  # older versions test it in the tensor-parallel mixin

    class ExpertParallelTesterMixin:
        pass
else:
    test_expert_parallel_mixin.EP_DISTRIBUTED_TEST_MODEL_TYPES = None

# Otherwise only a few of the library's own models are tested.
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None


# Ranks are forked from a server that has imported what they need, which costs a process of its own many seconds.
multiprocessing.set_forkserver_preload(["seeded", "tests.test_tensor_parallel_mixin", "tests.test_fsdp_mixin"])
torch.multiprocessing.spawn = functools.partial(torch.multiprocessing.start_processes, start_method="forkserver")

# A loss that is a mean over rows and draws nothing: the rows of one process are compared with their slices on several.
DRAWS_NOTHING = {
    "init_noise": 0.0,
    "gate_temperature": 1e-6,
    "loss_weights": dict.fromkeys(("flow", "gate_entropy", "load_balance", "mmd"), 0.0),
}


class ParallelTestCase(TensorParallelTesterMixin, FSDPTesterMixin):
    model_tester = None
    yan_tester_class = YanModelTester
    parallel_class = SeededYan
    rank_config = RankConfig

    def setUp(self):
        self.model_tester = self.yan_tester_class(self)
        self.model_tester.causal_lm_class = self.parallel_class
        # The unsharded model stands on every rank too: its loss must not be that of the ranks' batches joined.
        self.model_tester.loss_reduction = "local"
        self.all_model_classes = (self.parallel_class,)

    def _get_tiny_config(self):
        fields = super()._get_tiny_config()[1]
        if "grad_accumulation" in self._testMethodName:
            fields = {**fields, **DRAWS_NOTHING}
        return self.rank_config, fields


class YanParallelTest(ParallelTestCase, ExpertParallelTesterMixin, unittest.TestCase):
    pass


class YanMambaParallelTest(ParallelTestCase, ExpertParallelTesterMixin, unittest.TestCase):
    yan_tester_class = YanMambaModelTester


class YanAutoEncodingParallelTest(ParallelTestCase, unittest.TestCase):
    yan_tester_class = YanAutoEncodingTester
    parallel_class = SeededAutoEncoding
    rank_config = AutoEncodingRankConfig

    @unittest.skip("an auto-encoder does not generate")
    def test_tp_generation(self):
        """Its parts are those of the full model, whose generation is tested."""


@unittest.skip("an auto-encoder has no experts")
def no_experts(self):
    """Older versions test expert parallelism together with tensor parallelism."""


for _name in dir(TensorParallelTesterMixin):
    if _name.startswith("test_ep_"):
        setattr(YanAutoEncodingParallelTest, _name, no_experts)
