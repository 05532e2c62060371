# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Stands in for a package that PEFT's common tests import for models of another kind."""


class StableDiffusionPipeline:
    pass
