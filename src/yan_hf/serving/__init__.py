# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A trained model where its users are: Transformers' pipelines, an evaluation harness, a service."""
