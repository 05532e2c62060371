# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The Ray cluster that services and batches run on."""

import os


try:
    import ray
except ImportError as error:
    raise ImportError(f"Ray cannot be used ({error}). Install it: pip install yan-hf[serve]") from error


def start_ray(num_cpus: int):
    """
    Joins the cluster that `RAY_ADDRESS` names, or starts one on this machine, unless this process is in one already.

    Args:
        num_cpus: What is asked for on this machine at least, where it has fewer cores: they are then shared.
    """
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init()
    else:
        ray.init(num_cpus=max(os.cpu_count() or 1, num_cpus), include_dashboard=False)
