# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The base class of all YAN models, and the stacks: encoder, flow and decoder."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import initialization as init
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import YanAttention, YanCrossAttention
from .blocks import (
    YanAdaptiveNorm,
    YanDecoderLayer,
    YanEncoderLayer,
    YanFlowLayer,
    YanLengthHead,
    YanPositionEmbedding,
    YanTimeEmbedding,
)
from .configuration_yan import AUTO_MAP, DEFAULT_LOSS_WEIGHTS, YanConfig
from .experts import YanExperts, YanRoutedExperts, expert_fields
from .mamba import YanMambaMixer, YanTimeStepProjection
from .offload_mixin import ExpertOffloadMixin
from .outputs import YanFlowConditioning, YanFlowContext, YanFlowOutput
from .routing import RoutingOptions, YanExpertRoutes, YanGate, gate_log_probs, restrict_to_core
from .saving import staged_save, unreadable_weights, write_code


# Tensor parallelism: attention by heads, feed-forward networks and experts by inner units; the rest is replicated.
_ATTENTION_PLAN = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
_FEED_FORWARD_PLAN = {"up_proj": "colwise", "down_proj": "rowwise"}
_EXPERTS_PLAN = {
    "experts.up_proj": "colwise",
    "experts.up_proj_bias": "rowwise",  # (K, units): as of any weight but a layer's bias, the last dimension is split
    "experts.down_proj": "rowwise",
    "experts": "moe_tp_experts",
}
# Expert parallelism: whole experts, some on each rank.
_EXPERT_WEIGHTS = ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias")
_EP_PLAN = {
    **{f"experts.{name}": "grouped_gemm" for name in _EXPERT_WEIGHTS},
    **(
        {"experts": "ep_dispatch_experts"}
        if "ep_dispatch_experts" in ALL_PARALLEL_STYLES
        else {"routes": "ep_router", "experts": "moe_tp_experts"}  # Transformers before 5.21
    ),
}


class YanPreTrainedModel(ExpertOffloadMixin, PreTrainedModel):
    """Initialisation, freezing by name and the features that Transformers asks a model for."""

    config: YanConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # Its loss is a mean, also under gradient accumulation: the batch's MMD and load balance are no sums over tokens.
    accepts_loss_kwargs = False
    _no_split_modules = ["YanEncoderLayer", "YanFlowLayer", "YanDecoderLayer", "YanExperts"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: YanConfig, *args, **kwargs):
        # A field may have been assigned, or overridden on loading, since the configuration was made.
        config.loss_weights = {**DEFAULT_LOSS_WEIGHTS, **config.loss_weights}
        config.validate_architecture()
        super().__init__(config, *args, **kwargs)

    def post_init(self):
        if any(isinstance(module, YanMambaMixer) for module in self.modules()):
            # Half precision would round the logarithms of the decay rates to a few bits.
            self._keep_in_fp32_modules_strict = {"A_log", "D"}
        super().post_init()
        self._apply_frozen()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ):
        """
        Saves as in the base class, into a folder of its own inside `save_directory`, whose files are renamed to their
        places when all are complete. Other files stay. Where the configuration has an `auto_map`, the code is saved
        too.

        Raises:
            OSError: where nothing can be written, as on a full disk; what was there before is untouched.
        """
        if self._auto_class is not None:
            # The base class names the saved class alone; its code brings the others along.
            self.config.auto_map = {**AUTO_MAP, **(getattr(self.config, "auto_map", None) or {})}
        arguments = {"is_main_process": is_main_process, "state_dict": state_dict, **kwargs}
        if not is_main_process or kwargs.get("distributed_checkpoint"):
            # Nothing is written here, or by all processes together.
            super().save_pretrained(save_directory, push_to_hub=push_to_hub, **arguments)
            if not kwargs.get("distributed_checkpoint"):
                self.barrier_after_gathered_checkpoint_save(getattr(self.config, "distributed_config", None))
            return
        hub = {
            name: arguments.pop(name)
            for name in ("repo_id", "commit_message", "private", "revision", "create_pr", "commit_description", "tags")
            if name in arguments
        }
        with staged_save(save_directory) as folder:
            if auto_map := getattr(self.config, "auto_map", None):
                write_code(auto_map, Path(__file__).parent, folder)
            super().save_pretrained(folder, **arguments)
        # Only now are the files in their places for the other processes of a sharded model.
        self.barrier_after_gathered_checkpoint_save(getattr(self.config, "distributed_config", None))
        if push_to_hub:
            repo_id = hub.pop("repo_id", None) or Path(save_directory).resolve().name
            self.push_to_hub(repo_id, token=kwargs.get("token"), **hub)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any):
        """
        As in the base class; parts that the configuration freezes are frozen.

        Raises:
            OSError: for weights that are damaged or cut short, with the files of a local folder.
        """
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            # The library's message names no file.
            folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
            files = ", ".join(map(str, unreadable_weights(folder))) or f"A file of weights of {folder}"
            raise OSError(
                f"{files}: damaged or cut short ({error}). Copy or download the checkpoint again."
            ) from error
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # Loading makes new parameters.
        model._apply_frozen()
        for module in model.modules():
            if isinstance(module, YanMambaMixer):
                module.mark_undecayed()
        return loaded

    def init_parallel_plans(self):
        super().init_parallel_plans()
        # Mamba mixers are replicated: a plan names no self-attention that a stack does not have.
        names = {name for name, _ in self.named_modules()}
        self._tp_plan = {
            pattern: style
            for pattern, style in self._tp_plan.items()
            if ".self_attn." not in pattern or pattern.replace("*", "0") in names
        }
        if self.dtype in (torch.float16, torch.bfloat16):
            # FSDP shards weights of one dtype together: beside a mixer's float32 parameters, its layers stand alone.
            for name, module in self.named_modules():
                if isinstance(module, YanMambaMixer):
                    pattern = re.sub(r"\.\d+\.", ".*.", name)
                    layers = [f"{pattern}.{layer}" for layer, _ in module.named_children()]
                    self._fsdp_plan |= dict.fromkeys([pattern, *layers], "free_full_weight")

    def _apply_frozen(self):
        for part in self.config.frozen_parts:
            for module in self._part(part):
                module.requires_grad_(False)
        self._frozen_to_eval()

    def _frozen_to_eval(self):
        for part in self.config.frozen_parts:
            for module in self._part(part):
                module.eval()
                for layer in module.modules():
                    if hasattr(layer, "base_layer"):
                        # An adapter on a frozen layer trains, as does its dropout.
                        layer.train()
                        layer.base_layer.eval()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # Transformers looks for the experts decorator in the source file of each model class; ours has its own file.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, YanRoutedExperts):
            init.normal_(module.up_proj, mean=0.0, std=std)
            init.zeros_(module.up_proj_bias)
            init.normal_(module.down_proj, mean=0.0, std=std)
            init.zeros_(module.down_proj_bias)
        elif isinstance(module, YanAdaptiveNorm):
            # Scale one and shift zero: every norm starts as a plain normalisation at every time.
            bias = torch.zeros_like(module.bias).view(module.num_norms, 2, -1)
            bias[:, 0] = 1.0
            init.copy_(module.bias, bias.flatten())
        elif isinstance(module, (YanMambaMixer, YanTimeStepProjection)):
            module.reset()
        elif isinstance(module, YanLengthHead):
            init.zeros_(module.query)
        elif isinstance(module, nn.Conv1d):
            # mamba-ssm leaves it to PyTorch: uniform, within one over the root of the kernel's width.
            bound = module.kernel_size[0] ** -0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, YanPositionEmbedding):
            init.copy_(module.weight, module.initial_weight(self.config.embedding_scale))
        elif isinstance(module, nn.Embedding):
            # Tokens as strong as positions: both have this root mean square.
            init.normal_(module.weight, mean=0.0, std=self.config.embedding_scale / 2**0.5)

    def _part(self, name: str) -> list[nn.Module]:
        """The modules of a part named in `config.frozen_parts`, as far as this model has them."""
        base = getattr(self, self.base_model_prefix, self)
        modules = {
            "encoder": [getattr(base, "encoder", None)],
            "flow": [getattr(base, "flow", None)],
            "decoder": [getattr(base, "decoder", None), getattr(self, "lm_head", None)],
            "token_embeddings": [getattr(base, "embed_tokens", None)],
            "position_embeddings": [getattr(base, "embed_positions", None)],
        }
        if name not in modules:
            raise ValueError(f"There is no part {name!r} to freeze; the parts are {', '.join(modules)}.")
        return [module for module in modules[name] if module is not None]

    def freeze(self, *parts: str):
        """
        Freezes parts of the model by name: they are not trained, and stay in eval mode while the rest trains.

        Args:
            parts: Of `"encoder"`, `"flow"`, `"decoder"`, `"token_embeddings"` and `"position_embeddings"`. The choice
                is saved with the configuration.

        Raises:
            ValueError: for another name.
        """
        for part in parts:
            for module in self._part(part):
                module.requires_grad_(False)
        self.config.frozen_parts = list(dict.fromkeys([*self.config.frozen_parts, *parts]))
        return self.train(self.training)

    def unfreeze(self, *parts: str):
        """Undoes [`~YanPreTrainedModel.freeze`] for the named parts, or for all of them."""
        parts = parts or tuple(self.config.frozen_parts)
        for part in parts:
            for module in self._part(part):
                module.requires_grad_(True)
        self.config.frozen_parts = [part for part in self.config.frozen_parts if part not in parts]
        self._apply_frozen()  # a tied table may belong to a part that is still frozen
        return self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        if mode:
            self._frozen_to_eval()
        return self


class YanEncoder(YanPreTrainedModel):
    """Bidirectional network from embedded tokens to latents, for sources and targets alike."""

    _can_record_outputs = {"hidden_states": YanEncoderLayer, "attentions": YanAttention}
    _tp_plan = {
        **{f"layers.*.self_attn.{name}": style for name, style in _ATTENTION_PLAN.items()},
        **{f"layers.*.feed_forward.{name}": style for name, style in _FEED_FORWARD_PLAN.items()},
    }
    _fsdp_plan = {"layers.*": "free_full_weight"}

    def __init__(self, config: YanConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(YanEncoderLayer(config, index) for index in range(config.encoder_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """
        Args:
            inputs_embeds: Token plus position embeddings, `(B, L, d)`.
            attention_mask: `(B, L)`, 1 on real tokens.
            generator: Source of the latent noise in training.
        """
        mask = attention_mask
        if self.config.encoder_backbone == "transformer":
            mask = create_bidirectional_mask(self.config, inputs_embeds, attention_mask)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, **kwargs)
        latents = self.norm(hidden_states)
        if self.training and self.config.latent_noise > 0:
            rand = {"generator": generator, "device": latents.device, "dtype": latents.dtype}
            scale = self.config.latent_noise * torch.rand(latents.shape[0], 1, 1, **rand)
            latents = latents + scale * torch.randn(latents.shape, **rand)
        return BaseModelOutput(last_hidden_state=latents)


class YanFlow(YanPreTrainedModel):
    """The flow: trunk, gate and expert vector fields."""

    _can_record_outputs = {
        "hidden_states": YanFlowLayer,
        "attentions": OutputRecorder(YanAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(YanCrossAttention, index=1),
    }
    _tp_plan = {
        **YanEncoder._tp_plan,
        **{f"layers.*.cross_attn.{name}": style for name, style in _ATTENTION_PLAN.items()},
        **_EXPERTS_PLAN,
    }
    _ep_plan = _EP_PLAN
    _fsdp_plan = {"layers.*": "free_full_weight"}

    def __init__(self, config: YanConfig):
        super().__init__(config)
        self.time_embedding = YanTimeEmbedding(config)
        self.layers = nn.ModuleList(YanFlowLayer(config, index) for index in range(config.flow_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gate = YanGate(config)
        self.routes = YanExpertRoutes(config)
        self.experts = YanExperts(config)
        self.gradient_checkpointing = False
        self.post_init()

    def condition(self, times: list[float], device: torch.device) -> dict[float, YanFlowConditioning]:
        """Time embedding and adaptive scales of every time, each matrix read once for all of them."""
        dtype = self.norm.weight.dtype
        timesteps = torch.tensor(times, device=device, dtype=torch.promote_types(dtype, torch.float32))
        embedding = self.time_embedding(timesteps, dtype)  # (S, d)
        activated = nn.functional.gelu(embedding)
        adaptive_norms = [layer.adaptive_norm(activated) for layer in self.layers]
        return {
            time: YanFlowConditioning(
                embedding[index : index + 1], [scales[index : index + 1] for scales in adaptive_norms]
            )
            for index, time in enumerate(times)
        }

    def _routed_fields(self, states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        _, weights, index = self.routes(index, weights)
        return self.experts(states, index, weights)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor | None,
        context: YanFlowContext,
        experts: torch.Tensor | Callable[[torch.Tensor], torch.Tensor] | None = None,
        conditioning: YanFlowConditioning | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> YanFlowOutput:
        """
        One evaluation of the vector field.

        Args:
            latents: The state `z_t`, `(B, Ly, d)`.
            timesteps: `t`, `(B,)`, or `(1,)` where the batch shares it.
            context: From [`YanModel.prepare_context`].
            experts: Indices `(B, Ly)` of the experts to compute, or a function from the gate's log-probabilities
                `(B, Ly, K)` to such indices; `None` computes every expert. Offloaded experts are predicted by calling
                the function for an earlier state first.
            conditioning: The time's part, from [`~YanFlow.condition`], instead of `timesteps`.
        """
        if conditioning is None:
            # The adaptive scales are left to the layers, whose weights may be gathered layer by layer.
            time_embedding = self.time_embedding(timesteps, self.norm.weight.dtype)
            conditioning = YanFlowConditioning(time_embedding, [None] * len(self.layers))
        time_embedding = conditioning.time_embedding  # (B or 1, d)
        hidden_states = latents + context.positions
        # The scan takes the canvas itself: the mask of self-attention is quadratic in the length.
        mask = context.attention_mask if self.config.flow_backbone == "mamba" else context.target_mask
        # An adapter around the experts has no such attribute; they themselves refuse it then.
        offload = getattr(self.experts, "offload", None)
        speculates = offload is not None and offload.mode == "speculative"
        predicted = None
        if speculates and isinstance(experts, torch.Tensor):
            offload.prefetch_known(experts)
        for index, (layer, source, scales) in enumerate(zip(self.layers, context.source, conditioning.adaptive_norms)):
            if speculates and callable(experts) and index == offload.prediction_layer:
                early_gate = self.gate(self.norm(hidden_states), context.pooled_source, time_embedding)
                predicted = offload.prefetch(experts(gate_log_probs(early_gate, context.attention_mask)))
            hidden_states = layer(hidden_states, time_embedding, source, mask, context.source_mask, scales, **kwargs)
        hidden_states = self.norm(hidden_states)
        shape = hidden_states.shape

        gate_logits = None
        if not isinstance(experts, torch.Tensor):
            gate_logits = self.gate(hidden_states, context.pooled_source, time_embedding)
            log_probs = gate_log_probs(gate_logits, context.attention_mask)
            if experts is None:
                states, num_experts = hidden_states.flatten(0, 1), self.config.num_experts
                fields = expert_fields(self.experts, self._routed_fields, states, num_experts)
                fields = fields.unflatten(0, shape[:2])  # (B, Ly, K, d)
                log_probs, _ = restrict_to_core(
                    log_probs, context.attention_mask, RoutingOptions.from_config(self.config)
                )
                velocity = (log_probs.exp().to(fields.dtype)[..., None] * fields).sum(dim=2)
                return YanFlowOutput(hidden_states, velocity, expert_fields=fields, gate_logits=gate_logits)
            if predicted is not None and offload.speculation == "execute":
                log_probs = offload.only(log_probs, predicted)
            experts = experts(log_probs)
            if predicted is not None:
                offload.note_recall(predicted, experts)
        index = experts.reshape(-1, 1)
        weights = torch.ones_like(index, dtype=hidden_states.dtype)
        velocity = self._routed_fields(hidden_states.reshape(-1, shape[-1]), index, weights).view(shape)
        return YanFlowOutput(hidden_states, velocity, gate_logits=gate_logits, expert_indices=experts)


class YanDecoder(nn.Module):
    """Position-wise network from latents to what the vocabulary head reads."""

    def __init__(self, config: YanConfig):
        super().__init__()
        self.layers = nn.ModuleList(YanDecoderLayer(config) for _ in range(config.decoder_layers))

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            latents = layer(latents)
        return latents


__all__ = ["YanDecoder", "YanEncoder", "YanFlow", "YanPreTrainedModel"]
