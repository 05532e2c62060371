# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""No hub for any test, GPU tests only with a GPU, and the fixture of a small model."""

import os


# Before any import of transformers: nothing here may ask a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from testing_utils import small_model

from yan_hf import YanForConditionalGeneration


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def model() -> YanForConditionalGeneration:
    return small_model()
