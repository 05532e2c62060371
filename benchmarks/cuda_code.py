# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Generates the CUDA code of `generate(compile=True)` for a GPU that is not there: every program by Inductor, and each of
its Triton kernels down to the binary for sm_90 (H100, H200). Nothing runs.

    python benchmarks/cuda_code.py --size tiny --output benchmarks/results/cuda_code.json

It needs a PyTorch built for CUDA, with Triton, and no driver: graphs are traced on the meta device, then compiled for
fake CUDA tensors. What PyTorch would ask the driver for (the processor's properties, streams, loading a binary) is
answered here. Products of matrices are cuBLAS's and attention is FlashAttention's, which come compiled with PyTorch.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from decoders import SIZES
from report import save
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.generation import CompileConfig

from yan_hf import YanConfig, YanForConditionalGeneration
from yan_hf.sampling import CandidateLayout


H100 = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    total_memory=80 << 30,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    L2_cache_size=50 << 20,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    is_integrated=0,
    gcnArchName="",
    uuid="0",
)
# In this process, from scratch; and without the pass that computes constants on the device.
SETTINGS = {"compile_threads": 1, "force_disable_caches": True, "joint_graph_constant_folding": False}
MODELS = {
    "paper": {},
    "target scope": {"expert_scope": "target", "reselect_experts": True},
    "from the source": {"start_state": "stretched"},
    "mamba": {"encoder_backbone": "mamba", "flow_backbone": "mamba"},
}
WIDTH = 24


@contextlib.contextmanager
def pretended_gpu(kernels: list[str]) -> Iterator[None]:
    """PyTorch and Triton believe in an H100; `kernels` gets the names of the binaries that would be loaded onto it."""
    import triton
    from torch._inductor import config
    from torch._inductor.fx_passes import fuse_attention, pad_mm
    from torch._inductor.runtime import triton_helpers, triton_heuristics
    from torch.utils import _triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_device(self) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    def keep(autotuner: Any):
        for result in autotuner.compile_results:
            kernels.append(getattr(result.kernel, "name", None) or result.kernel.metadata.name)
        autotuner.launchers = [lambda *arguments, **keywords: None]

    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: H100,
        "get_arch_list": lambda: ["sm_90"],
        "is_bf16_supported": lambda *arguments, **keywords: True,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda device=None: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "_lazy_init": lambda: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch.cuda, "_get_device_properties", lambda device: H100, create=True))
        # Both look for patterns by tracing on the device.
        stack.enter_context(mock.patch.object(fuse_attention, "_sfdp_init", lambda *_: None))
        stack.enter_context(mock.patch.object(pad_mm, "_pad_mm_init", lambda *_: None))
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None))
        stack.enter_context(mock.patch.object(triton_heuristics.CachingAutotuner, "_make_launchers", keep))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", Driver()))
        stack.enter_context(config.patch(SETTINGS))
        _triton.has_triton.cache_clear()
        yield
    _triton.has_triton.cache_clear()


def to_cuda(value: Any) -> Any:
    """The GPU for the meta device."""
    return torch.device("cuda", 0) if value == torch.device("meta") else value


def backend(programs: list[dict[str, Any]]) -> Callable:
    """A backend of `torch.compile` that compiles a meta graph for CUDA, and runs it on the meta device."""

    def compile_for_cuda(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable:
        from torch._inductor.compile_fx import compile_fx

        mode, kernels, began = FakeTensorMode(), [], time.perf_counter()
        copied = torch.fx.Graph()
        copied.output(copied.graph_copy(graph.graph, {}))
        for node in copied.nodes:
            node.args, node.kwargs = torch.fx.node.map_aggregate((node.args, node.kwargs), to_cuda)
        module = torch.fx.GraphModule(graph, copied)
        with mode:
            given = [
                torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=to_cuda(value.device))
                for value in inputs
            ]
        with pretended_gpu(kernels), tracing(TracingContext(mode)), mode:
            compile_fx(module, given)
        programs.append(
            {
                "operations": sum(node.op.startswith("call") for node in graph.graph.nodes),
                "kernels": len(set(kernels)),
                "binaries": len(kernels),
                "seconds": time.perf_counter() - began,
            }
        )
        return graph.forward

    return compile_for_cuda


def generate_code(config: YanConfig) -> list[dict[str, Any]]:
    """The programs of both halves, and of a call whose lengths are given, in bfloat16."""
    with torch.device("meta"):
        model = YanForConditionalGeneration(config).to(torch.bfloat16).eval()
    model.config.length_head_trained = True
    programs: list[dict[str, Any]] = []
    settings = CompileConfig(fullgraph=True, backend=backend(programs), mode=None)
    ids = torch.zeros(2, 16, dtype=torch.long, device="meta")
    for options in ({}, {"target_lengths": WIDTH}):
        with mock.patch.object(CandidateLayout, "host_lengths", property(lambda layout: [WIDTH] * 2)):
            model.generate(ids, torch.ones_like(ids), compile=True, compile_config=settings, **options)
    return programs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--models", choices=MODELS, nargs="+", default=list(MODELS))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if torch.version.cuda is None:
        raise SystemExit("cuda_code.py needs a PyTorch that is built for CUDA; a GPU it needs not.")
    found = {}
    for name in options.models:
        found[name] = generate_code(YanConfig(**SIZES[options.size], **MODELS[name]))
        print(name, json.dumps(found[name]), flush=True)
    if options.output:
        save(options.output, {"target": "sm_90", "cuda": torch.version.cuda, "programs": found})


if __name__ == "__main__":
    main()
