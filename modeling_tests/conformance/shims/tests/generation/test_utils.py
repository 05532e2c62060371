# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Stands in for a file that Transformers' source distribution leaves out."""


class GenerationTesterMixin:
    pass
