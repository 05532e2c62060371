# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Transformers' overfitting test: the training loss of each class with each backbone goes to a tenth on one batch."""

import unittest

from model_suite import YanAutoEncodingTester, YanMambaModelTester, YanModelTester
from seeded import SeededAutoEncoding, TrainableYan
from tests.test_training_mixin import TrainingTesterMixin


class TrainingTestCase(TrainingTesterMixin):
    model_tester = None
    yan_tester_class = YanModelTester
    trained_class = TrainableYan

    def setUp(self):
        self.model_tester = self.yan_tester_class(self)
        self.model_tester.causal_lm_class = self.trained_class


class YanTrainingTest(TrainingTestCase, unittest.TestCase):
    pass


class YanMambaTrainingTest(TrainingTestCase, unittest.TestCase):
    yan_tester_class = YanMambaModelTester


class YanAutoEncodingTrainingTest(TrainingTestCase, unittest.TestCase):
    yan_tester_class = YanAutoEncodingTester
    trained_class = SeededAutoEncoding
