# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
int8 on the CPU: which library multiplies fastest, and what a checkpoint loses and gains.

    python benchmarks/quantization.py products --output benchmarks/results/int8_products.json
    python benchmarks/quantization.py checkpoint --task restoration --test-file test.jsonl.gz \\
        --output benchmarks/results/int8_restoration.json

`products` times one linear layer of the `base` size by every way that is installed, in turns, on one
thread, in seconds of the processor:

- `float32`, `bfloat16`: oneDNN's product, without a quantisation;
- `int-mm`: what `yan_hf.inference.int8` does, `torch._int_mm` with a scale for each token and each output;
- `qlinear`: oneDNN's quantised layer with packed weights, the same scales;
- `torchao-dynamic`, `torchao-weight-only`: `quantize_` with torchao's configurations (`pip install torchao`);
- `onnxruntime`: dynamic quantisation, one scale for all activations (`pip install onnx onnxruntime`).

`checkpoint` writes the same texts with the same seeds by a checkpoint in `float32`, in `bfloat16`, in `int8`
(`YanInt8Config`), with torchao's weights in 8 bits (`weight-only`, `YanInt8WeightOnlyConfig`) and by ONNX Runtime in
float32 (`onnx`), as far as the packages are there: each one's metrics, the share of positions and of texts that are
those of `float32`, the size of its files, and its time for a text at batch 1 on one thread, in turns, in seconds of
the processor.
"""

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from report import onnx_session_options, save

from yan_hf.inference.int8 import YanInt8Config, int8_linear, quantize_rows


KINDS = ("float32", "bfloat16", "int8", "weight-only", "onnx")

# Tokens, inputs and outputs of the layers: a projection, both of a feed-forward network, and the vocabulary.
SHAPES = [(m, *layer) for m in (16, 64, 256) for layer in ((512, 512), (512, 2048), (2048, 512))] + [
    (64, 512, 128_258)
]


def _onnxruntime(layer: torch.nn.Linear, folder: str) -> Callable[[torch.Tensor], object]:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime.quantization import QuantType, quantize_dynamic

    size, outputs = layer.in_features, layer.out_features
    constants = {"weight": layer.weight.detach().T.contiguous(), "bias": layer.bias.detach()}
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"]), helper.make_node("Add", ["y", "bias"], ["z"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", size])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["T", outputs])],
        [numpy_helper.from_array(value.numpy(), name) for name, value in constants.items()],
    )
    files = [f"{folder}/{name}.onnx" for name in ("float", "int8")]
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), files[0])
    quantize_dynamic(*files, per_channel=True, weight_type=QuantType.QInt8)
    session = onnxruntime.InferenceSession(files[1], onnx_session_options(), providers=["CPUExecutionProvider"])
    return lambda states: torch.from_numpy(session.run(None, {"x": states.numpy()})[0])


def _torchao(layer: torch.nn.Linear, config: str) -> Callable[[torch.Tensor], object]:
    import copy

    from torchao import quantization

    module = torch.nn.Sequential(copy.deepcopy(layer))
    quantization.quantize_(module, getattr(quantization, config)())
    return module


def ways(layer: torch.nn.Linear, tokens: int, folder: str) -> dict[str, Callable[[torch.Tensor], object]]:
    """Every way to compute a layer that is installed."""
    weight, scale = quantize_rows(layer.weight.detach())
    half = layer.weight.detach().bfloat16()
    packed = torch.ops.onednn.qlinear_prepack(weight, [tokens, layer.in_features])
    no_offset = torch.zeros(len(scale), dtype=torch.int64)

    def onednn(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise.default(states, weight, None, "none", [], "")

    def qlinear(states: torch.Tensor) -> torch.Tensor:
        integers, scales = quantize_rows(states)  # oneDNN's kernels take unsigned ones here, with 128 as zero
        unsigned = (integers.to(torch.int16) + 128).to(torch.uint8)
        form = (None, 1.0, 0, torch.float32, "none", [], "")
        product = torch.ops.onednn.qlinear_pointwise(unsigned, 1.0, 128, packed, scale, no_offset, *form)
        return torch.addcmul(layer.bias, product, scales[:, None])

    found = {
        "float32": lambda states: onednn(states, layer.weight) + layer.bias,
        "bfloat16": lambda states: onednn(states.bfloat16(), half).float() + layer.bias,
        "int-mm": lambda states: int8_linear(states, weight, scale, layer.bias),
        "qlinear": qlinear,
    }
    if importlib.util.find_spec("torchao"):
        found["torchao-dynamic"] = _torchao(layer, "Int8DynamicActivationInt8WeightConfig")
        found["torchao-weight-only"] = _torchao(layer, "Int8WeightOnlyConfig")
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        found["onnxruntime"] = _onnxruntime(layer, folder)
    return found


@torch.no_grad()
def products(options: argparse.Namespace):
    """Times every layer by every way, in turns."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for tokens, inputs, outputs in SHAPES:
        layer, states = torch.nn.Linear(inputs, outputs), torch.randn(tokens, inputs)
        exact = layer(states)
        with tempfile.TemporaryDirectory() as folder:
            systems = ways(layer, tokens, folder)
            errors = {name: ((run(states) - exact).norm() / exact.norm()).item() for name, run in systems.items()}
            seconds: dict[str, list[float]] = {name: [] for name in systems}
            for _ in range(options.rounds):
                for name, run in systems.items():
                    began = time.process_time()  # others may use the processor too
                    run(states)
                    seconds[name].append(time.process_time() - began)
        for name, times in seconds.items():
            row = {"system": name, "tokens": tokens, "inputs": inputs, "outputs": outputs}
            row |= {"processor_seconds": median(times), "relative_error": errors[name]}
            rows.append(row)
            print(" ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    save(options.output, {"seed": 0, "rounds": options.rounds, "rows": rows})


def load_in(kind: str, checkpoint: str, folder: str) -> tuple[Any, int]:
    """A checkpoint in one of the kinds, and the bytes of its weights when it is saved."""
    from transformers import AutoModelForSeq2SeqLM

    from yan_hf import OnnxYan, YanInt8WeightOnlyConfig, export_to_onnx

    if kind == "onnx":
        export_to_onnx(checkpoint, folder)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.onnx*"))
        return OnnxYan(folder, sess_options=onnx_session_options()), size
    how: dict[str, Any] = {
        "float32": lambda: {"dtype": "float32"},
        "bfloat16": lambda: {"dtype": "bfloat16"},
        "int8": lambda: {"quantization_config": YanInt8Config()},
        "weight-only": lambda: {"quantization_config": YanInt8WeightOnlyConfig(), "dtype": "float32"},
    }[kind]()
    model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint, **how).eval()
    model.save_pretrained(folder)
    return model, sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def checkpoint(options: argparse.Namespace):
    """Writes the same texts in every kind."""
    from rewriting import batches_of, data_arguments, make_examples, paragraphs, read_documents, run, score
    from rewriting_systems import load_tokenizer, rewriters

    torch.set_num_threads(1)
    needs = {"weight-only": ("torchao",), "onnx": ("onnxscript", "onnxruntime")}
    kinds = [kind for kind in KINDS if all(map(importlib.util.find_spec, needs.get(kind, ())))]
    data, folder = data_arguments(options.task, []), options.checkpoint or f"checkpoints/{options.task}"
    tokenizer = load_tokenizer(folder)
    texts = paragraphs(read_documents(options.test_file), tokenizer, options.tokens, options.rows)
    examples = make_examples(texts, data, tokenizer, 0)
    systems, rows = {}, {}
    for kind in kinds:
        with tempfile.TemporaryDirectory() as saved:
            model, size = load_in(kind, folder, saved)
        rows[kind] = {"file_bytes": size}
        systems[kind] = rewriters("yan", model, data.max_target_length)["yan-3"]
    written, _ = run(systems, batches_of(examples, 32))
    few = batches_of(examples[: options.timed_rows], 1)
    run(systems, few)
    timed = run(systems, few, time.process_time)[1]
    for kind, found in written.items():
        pairs = list(zip(found, written["float32"], strict=True))
        positions = sum(max(map(len, pair)) for pair in pairs)
        rows[kind] |= {
            "same_positions": sum(a == b for pair in pairs for a, b in zip(*pair)) / positions,
            "same_texts": sum(first == second for first, second in pairs) / len(pairs),
            "processor_seconds": median(timed[kind]),
            "metrics": score(options.task, found, examples, tokenizer),
        }
        print(kind, json.dumps(rows[kind], indent=2), flush=True)
    save(options.output, {"task": options.task, "texts": len(examples), "tokens": options.tokens, "systems": rows})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("products")
    command.add_argument("--rounds", type=int, default=31)
    command.set_defaults(run=products)
    command.add_argument("--output", type=Path, required=True)
    command = commands.add_parser("checkpoint")
    command.add_argument("--task", choices=("restoration", "infilling"), required=True)
    command.add_argument("--checkpoint", help="default: the task's in `checkpoints/`")
    command.add_argument("--test-file", required=True, help="JSON lines with `text`")
    command.add_argument("--tokens", type=int, default=64, help="of a paragraph")
    command.add_argument("--rows", type=int, default=320)
    command.add_argument("--timed-rows", type=int, default=20)
    command.add_argument("--output", type=Path, required=True)
    command.set_defaults(run=checkpoint)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
