# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
`generate` outside PyTorch: both halves of the sampler as exported programs, written as ONNX and run by ONNX Runtime.

What is fixed for a whole batch ([`SamplingOptions`]) is fixed in the programs; batch and lengths are not. Lengths,
noise and the draws of experts are inputs, so that a runtime needs no random numbers of its own.
"""

import json
import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel

from ..configuration_yan import YanConfig
from ..generation_config_yan import YanGenerationConfig
from ..generation_yan import GenerationInputs, YanGenerationMixin
from ..lengths import EncodedSource, SourceInputs
from ..mixers import YanCausalConv, YanMambaMixer
from ..sampling import DecodedTokens, SampleOutput, SamplingOptions, encode, sample


ENCODER_INPUTS = ("input_ids", "attention_mask")
ENCODER_OUTPUTS = ("latents", "length_logits", "token_length_logits")
SAMPLER_INPUTS = ("latents", "attention_mask", "lengths", "initial_latents", "uniform", "places")
SAMPLER_OUTPUTS = ("tokens", "log_probs", "logits", "end_latents", "experts", "path_log_probs", "is_finite")
_METADATA = "yan_hf.sampling_options"


class EncoderProgram(nn.Module):
    """[`~sampling.encode`] of one model: `ENCODER_INPUTS` to `ENCODER_OUTPUTS`, of which a model may lack the last."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        return tuple(values for values in encode(self.model, input_ids, attention_mask, None) if values is not None)


class SamplerProgram(nn.Module):
    """[`~sampling.sample`] of one model with fixed options: `SAMPLER_INPUTS` to `SAMPLER_OUTPUTS`."""

    def __init__(self, model: PreTrainedModel, options: SamplingOptions):
        super().__init__()
        self.model, self.options = model, replace(options, decode_argmax=False)

    def forward(
        self,
        latents: Tensor,
        attention_mask: Tensor,
        lengths: Tensor,
        initial_latents: Tensor,
        uniform: Tensor,
        places: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        start = (lengths, initial_latents, uniform, None, places)
        sampled = sample(self.model, self.options, latents, attention_mask, *start)
        logits = self.model.lm_head(sampled.decoded)
        best, tokens = logits.max(dim=-1)
        log_probs = best - logits.logsumexp(dim=-1)
        return tokens, log_probs, logits, sampled.latents, sampled.experts, sampled.path_log_probs, sampled.is_finite


def _fixed(options: SamplingOptions) -> dict[str, Any]:
    """Those options that are fixed in a program."""
    fields = json.loads(json.dumps(asdict(options)))
    return {
        name: fields[name] for name in ("times", "solver", "expert_temperature", "stratified", "routing", "reselect")
    }


@contextmanager
def _exportable(model: PreTrainedModel):
    # Shapes that depend on the number of tokens alone; the default products of experts, and the default scan, have no
    # counterpart in ONNX.
    mixers = [module for module in model.modules() if isinstance(module, (YanMambaMixer, YanCausalConv))]
    before = model.config._experts_implementation, [mixer.implementation for mixer in mixers]
    model.config._experts_implementation = "blocks"
    for mixer in mixers:
        mixer.implementation = "scan" if isinstance(mixer, YanMambaMixer) else "torch"
    try:
        yield
    finally:
        model.config._experts_implementation = before[0]
        for mixer, implementation in zip(mixers, before[1]):
            mixer.implementation = implementation


def export_programs(model: PreTrainedModel, **options: Any) -> dict[str, ExportedProgram]:
    """
    Exports both halves of `generate` by `torch.export`, with dynamic batch, source length and target length.

    Args:
        model: A [`YanForConditionalGeneration`] in eval mode, in float32 on the CPU.
        options: Fields of [`YanGenerationConfig`], in the place of the model's. Solver, times, routing and temperature
            of the experts are fixed in the program.

    Returns:
        `"encoder"`, an [`EncoderProgram`], and `"sampler"`, a [`SamplerProgram`].

    Raises:
        ValueError: for block routing, stratified choices, pretrained encoders, quantized weights, and models in
            another dtype or on another device.
    """
    config = model.config
    if config.encoder_config is not None:
        raise ValueError(
            f"A pretrained encoder ({config.encoder_config.model_type}) cannot be exported: its padding is sorted to "
            "the end, by an operation that ONNX does not have. Models with an encoder of their own can."
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("Quantized weights cannot be exported: load the checkpoint without `quantization_config`.")
    if model.dtype != torch.float32 or model.device.type != "cpu":
        raise ValueError(f"Load the model in float32 on the CPU: it is {model.dtype} on {model.device}.")
    generation_config = model._prepare_generation(None, options)[0]
    sampling = SamplingOptions.from_config(generation_config)
    if "block" in (sampling.routing.routing, sampling.routing.scope):
        raise ValueError(
            f"`routing={sampling.routing.routing!r}` with `expert_scope={sampling.routing.scope!r}` cannot be "
            "exported: the number of blocks would be fixed. Tokens by themselves can, and whole targets."
        )
    if generation_config.expert_selection == "stratified":
        raise ValueError(
            '`expert_selection="stratified"` cannot be exported: the program would have to know which rows are one '
            'source\'s. "sample" and "greedy" can.'
        )
    # Sizes of 1 would be taken as constants, and one tensor given twice as one input.
    rows, source, target, choices = 2, 3, 4, len(sampling.times) - 1 if sampling.reselect else 1
    batch, longest = Dim("batch"), config.max_position_embeddings
    in_source, in_target = ({0: batch, 1: Dim(name, max=longest)} for name in ("source", "target"))
    ids, mask = torch.ones(2, rows, source, dtype=torch.long).unbind()
    inputs = [
        (torch.zeros(rows, source, config.hidden_size), in_source),
        (mask, in_source),
        (torch.tensor([target, target - 1]), {0: batch}),
        (torch.zeros(rows, target, config.hidden_size), in_target),
        (torch.rand(rows, target, choices, config.num_experts), in_target),
    ]
    if config.start_state != "noise":
        inputs.append((torch.zeros(rows, target, dtype=torch.long), in_target))
    calls = {
        "encoder": (EncoderProgram(model), [(ids, in_source), (mask, in_source)]),
        "sampler": (SamplerProgram(model, sampling), inputs),
    }
    programs = {}
    with torch.no_grad(), _exportable(model):
        for name, (program, given) in calls.items():
            values, shapes = zip(*given)
            programs[name] = torch.export.export(program.eval(), values, dynamic_shapes=shapes, strict=False)
    return programs


def write_onnx(model: PreTrainedModel, folder: str | Path, **options: Any):
    """
    Writes what [`OnnxYan`] loads: `encoder.onnx`, `sampler.onnx`, and the configurations. Arguments and errors as of
    [`export_programs`].

    Raises:
        ImportError: without the packages of torch's exporter.
    """
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise ImportError(f"The export needs {' and '.join(missing)}. Install them: pip install yan-hf[onnx]")
    folder = Path(folder)
    generation_config = model._prepare_generation(None, options)[0]
    is_aligned, has_places = model.token_length_head is not None, model.config.start_state != "noise"
    names = {
        "encoder": (ENCODER_INPUTS, ENCODER_OUTPUTS if is_aligned else ENCODER_OUTPUTS[:-1]),
        "sampler": (SAMPLER_INPUTS if has_places else SAMPLER_INPUTS[:-1], SAMPLER_OUTPUTS),
    }
    for name, program in export_programs(model, **options).items():
        inputs, outputs = names[name]
        written = torch.onnx.export(program, dynamo=True, input_names=inputs, output_names=outputs, verbose=False)
        if name == "sampler":
            fixed = _fixed(SamplingOptions.from_config(generation_config))
            written.model.metadata_props[_METADATA] = json.dumps(fixed)
        written.save(folder / f"{name}.onnx")
    config = YanConfig.from_dict(model.config.to_dict())
    config.length_head_trained = model.length_head.is_trained(model.config)
    config.save_pretrained(folder)
    generation_config.save_pretrained(folder)


class _Logits(nn.Identity):
    """The vocabulary head where the program has computed the logits."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.out_features = vocab_size


class OnnxYan(YanGenerationMixin, nn.Module):
    """
    A model in ONNX Runtime, with the `generate` of [`YanForConditionalGeneration`]: the same tokens for the same
    seeds, in float32.

    What belongs to the solver, to routing and to the experts' temperature is fixed since the export; another value is
    a `ValueError`, as are drafts, trajectories, given experts, `rerank="cycle"` and `inputs_embeds`.

    Args:
        folder: What `yan-hf export --onnx` has written.
        session: Arguments of `onnxruntime.InferenceSession`, such as `providers` and `sess_options`.

    Raises:
        ImportError: without onnxruntime.
        FileNotFoundError: for a folder without the programs.
    """

    device = torch.device("cpu")

    def __init__(self, folder: str | Path, **session: Any):
        super().__init__()
        try:
            from onnxruntime import InferenceSession
        except ImportError as error:
            raise ImportError(
                f"ONNX Runtime cannot be used ({error}). Install it: pip install yan-hf[onnx]"
            ) from error
        paths = [Path(folder) / f"{name}.onnx" for name in ("encoder", "sampler")]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise FileNotFoundError(f"{folder} has no {' and no '.join(missing)}: write it by `yan-hf export --onnx`.")
        session = {"providers": ["CPUExecutionProvider"], **session}
        self.encoder_session, self.sampler_session = (InferenceSession(path, **session) for path in paths)
        self.fixed = json.loads(self.sampler_session.get_modelmeta().custom_metadata_map[_METADATA])
        self.config = YanConfig.from_pretrained(folder)
        self.generation_config = YanGenerationConfig.from_pretrained(folder)
        self.lm_head = _Logits(self.config.vocab_size)
        self.length_head = SimpleNamespace(is_trained=lambda config: config.length_head_trained)
        self.eval()

    def encode(self, source: SourceInputs) -> EncodedSource:
        """As [`~sampling.encode`]."""
        found = _run(self.encoder_session, {"input_ids": source.input_ids.long(), "attention_mask": source.mask})
        return EncodedSource(*(found.get(name) for name in ENCODER_OUTPUTS))

    def sample(
        self,
        options: SamplingOptions,
        source: SourceInputs,
        encoded: Tensor | None,
        *start: Tensor | None,
        callback_on_step_end: Callable[[Tensor], None] | None = None,
    ) -> SampleOutput:
        """As [`~sampling.sample`], without states; with logits in the place of what the vocabulary head reads."""
        asked = _fixed(options)
        fixed = {"stratified": 0, **self.fixed}
        if changed := [name for name, value in fixed.items() if asked[name] != value]:
            raise ValueError(
                f"The exported program is fixed to {', '.join(f'{name}={fixed[name]}' for name in changed)}, but "
                f"is asked for {', '.join(f'{name}={asked[name]}' for name in changed)}: export it again with these."
            )
        lengths, state, uniform, _, places = start
        if uniform is None:
            choices = len(options.times) - 1 if options.reselect else 1
            # All Gumbel noise is 0, so that the gate's mode is drawn.
            uniform = torch.full((*state.shape[:2], choices, self.config.num_experts), math.exp(-1))
        latents = self.encode(source).latents if encoded is None else encoded
        latents, mask = (values.repeat_interleave(options.repeats, dim=0) for values in (latents, source.mask))
        inputs = dict(zip(SAMPLER_INPUTS, (latents, mask, lengths, state.float(), uniform, places)))
        skipped = "logits" if options.decode_argmax else "tokens"
        names = [name for name in SAMPLER_OUTPUTS if name != skipped]
        found = _run(self.sampler_session, {name: value for name, value in inputs.items() if value is not None}, names)
        tokens = None
        if options.decode_argmax:
            is_finite = torch.isfinite(found["log_probs"]).all()
            tokens = DecodedTokens(found["tokens"], found["log_probs"], None, is_finite)
        return SampleOutput(
            latents=found["end_latents"],
            decoded=found.get("logits"),
            experts=found["experts"],
            states=None,
            tokens=tokens,
            is_finite=found["is_finite"],
            path_log_probs=found["path_log_probs"],
        )

    def _sampler(self, call: GenerationInputs) -> "OnnxYan":
        config = call.config
        refused = {
            "compile": config.compile,
            "output_trajectory": config.output_trajectory,
            "output_drafts": config.output_drafts,
            "output_routing": config.output_routing,
            'rerank="cycle"': config.num_candidates > 1 and config.rerank == "cycle",
            "expert_indices": call.expert_indices is not None,
            "inputs_embeds": call.source.input_ids is None,
            "a streamer of drafts": hasattr(call.streamer, "put_draft"),
            "initial_latents": call.initial_latents is not None and self.config.start_state != "noise",
        }
        if names := [name for name, is_asked in refused.items() if is_asked]:
            raise ValueError(f"Not possible in ONNX Runtime: {', '.join(names)}. Leave it out, or use PyTorch.")
        return self


def _run(session: Any, inputs: dict[str, Tensor], names: list[str] | None = None) -> dict[str, Tensor]:
    names = names or [output.name for output in session.get_outputs()]
    outputs = session.run(names, {name: value.numpy() for name, value in inputs.items()})
    return {name: torch.as_tensor(output) for name, output in zip(names, outputs)}
