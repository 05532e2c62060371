# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
YAN: encoder, mixture-of-experts flow and position-wise decoder (arXiv 2604.15009).

Shapes: `B` batch, `Lx` source length, `Ly` target length, `d` width, `V` vocabulary, `K` experts.
"""

import dataclasses
import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel, PreTrainedTokenizerBase
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput, ModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_yan import AUTO_MAP, DEFAULT_LOSS_WEIGHTS, YanConfig
from .experts import (
    RoutingOptions,
    YanExpertRoutes,
    YanExperts,
    YanGate,
    YanRoutedExperts,
    choose_experts,
    expert_fields,
    first_of_blocks,
    gate_log_probs,
    restrict_to_core,
    share_choice,
    sum_over_blocks,
)
from .generation_config_yan import YanGenerationConfig
from .generation_yan import YanGenerationMixin
from .layers import (
    AdaLNModulation,
    YanAttention,
    YanCrossAttention,
    YanDecoderLayer,
    YanEncoderLayer,
    YanEncoderProjection,
    YanFlowLayer,
    YanLengthHead,
    YanPositionEmbedding,
    YanRepeatEmbedding,
    YanStartOffsets,
    YanStartProjection,
    YanTimeEmbedding,
    YanTokenLengthHead,
    add_latent_noise,
    is_plain_linear,
    longest_sequence,
    masked_mean,
    positions_from_mask,
)
from .lengths import SourceInputs, lay_out, repeat_rows, source_places, training_token_lengths
from .losses import (
    LossGroup,
    LossInputs,
    can_fuse,
    fused_token_loss,
    l2_loss,
    loss_group,
    loss_terms,
    mmd_loss,
    sample_times,
    token_log_probs,
    token_loss,
)
from .mixers import MIXERS, YanMambaMixer
from .sampling import solve_flow
from .saving import staged_save, unreadable_weights, write_code
from .solver import integrate, time_grid
from .validation import (
    check_encoder_states,
    check_encoder_type,
    check_labels,
    check_mask,
    check_no_cache,
    check_source,
    check_state,
    check_trainer,
    inference_module,
)


logger = logging.get_logger(__name__)


@dataclass
class TimeModulation:
    """What one time contributes to any state: its embedding `(1, d)`, and each flow block's scales and shifts."""

    time_embedding: torch.Tensor
    layers: list[torch.Tensor]


@dataclass
class YanFlowContext:
    """What every solver step of one target shares, so that it is computed once."""

    source_latents: torch.Tensor  # `h`, (B, Lx, d)
    source_mask: torch.Tensor | None  # both masks as the attention implementation wants them
    self_attention_mask: torch.Tensor | None  # none for mixers, which take the canvas itself
    pooled_source: torch.Tensor  # masked mean of the source's latents, (B, d)
    canvas_mask: torch.Tensor  # (B, Ly), 1 on the target's real positions
    positions: torch.Tensor  # position embeddings of the canvas, (B, Ly, d)
    # From `YanFlow.cache_cross_attention`, without which each evaluation computes them.
    source_key_values: list[tuple[torch.Tensor, torch.Tensor] | None] | None = None
    # For each time that is known in advance, from `YanFlow.embed_times`.
    modulations: dict[float, TimeModulation] = field(default_factory=dict)


@dataclass
class YanFlowOutput(ModelOutput):
    """
    Output of [`YanFlow`]; `hidden_states`, `attentions` and `cross_attentions` when asked for.

    Args:
        last_hidden_state: The trunk's result `r`, `(B, Ly, d)`.
        velocity: `(B, Ly, d)`: the chosen experts' field, or the mixture's mean `Σ_k π_k u_k` where all were computed.
        expert_fields: All fields `u_k`, `(B, Ly, K, d)`, where they were computed.
        gate_logits: `(B, Ly, K)`; absent where the choice of experts was given.
        expert_indices: The chosen experts, `(B, Ly)`, int64.
    """

    last_hidden_state: torch.FloatTensor | None = None
    velocity: torch.FloatTensor | None = None
    expert_fields: torch.FloatTensor | None = None
    gate_logits: torch.FloatTensor | None = None
    expert_indices: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class YanModelOutput(ModelOutput):
    """
    Output of [`YanModel`]; what is not listed is the flow trunk's and the encoder's, when asked for.

    Args:
        last_hidden_state: The decoder body's result for the estimated end point `z_t + (1 - t) Σ_k π_k u_k`,
            `(B, Ly, d)`.
        encoder_last_hidden_state: The source's latents `h`, `(B, Lx, d)`.
        velocity: The mixture's mean field, `(B, Ly, d)`.
        expert_fields: The experts' fields `u_k(z_t, t)`, `(B, Ly, K, d)`.
        gate_logits: `(B, Ly, K)`.
    """

    last_hidden_state: torch.FloatTensor | None = None
    encoder_last_hidden_state: torch.FloatTensor | None = None
    velocity: torch.FloatTensor | None = None
    expert_fields: torch.FloatTensor | None = None
    gate_logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    encoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    encoder_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class YanOutput(ModelOutput):
    """
    Output of [`YanForConditionalGeneration`]; what is not listed is as in [`YanModelOutput`], with `labels` at the
    training time.

    Args:
        loss: With `labels`, the weighted sum of the terms, `()`.
        loss_terms: With `labels`, the terms before weighting, detached, by the names of `DEFAULT_LOSS_WEIGHTS`.
            Without a weight `mmd` is left out, and without one on either, `latent` and `token` are.
        logits: `(B, Ly, V)`, decoded from the end of the solved ODE with `labels`; from the estimated end point
            without, and where no weight asks for the solver. With `labels` and `config.keep_known`, `(N, V)`, of the
            `N` tokens of fillings.
        latents: With `labels`, the latents that were decoded, `(B, Ly, d)`.
        target_latents: With `labels`, the targets' latents, `(B, Ly, d)`.
        length_logits: Of the target's length, `(B, max_position_embeddings)`; entry `i` stands for `i + 1` tokens.
        token_length_logits: Of how many target tokens each source token stands for, `(B, Lx, max_token_length + 1)`,
            with a `start_state` that predicts it.
        expert_indices: With `labels` and an `expert_scope` beyond the token, the winner of every choice,
            `(C, B, Ly)`: one, or one for each solver step with `reselect_experts`.
        expert_scores: What each winner was found by, `(C, B, Ly, K)`: the log-likelihood of the block's tokens under
            each expert, and the gate's opinion with `winner_prior`.
        choice_log_probs: The gate that the block's tokens share at every choice, `(C, B, Ly, K)`, in logarithms.
        choice_mask: The first token of each block that counts in the loss, `(B, Ly)`, bool: where a choice is read
            once.
    """

    loss: torch.FloatTensor | None = None
    loss_terms: dict[str, torch.FloatTensor] | None = None
    logits: torch.FloatTensor | None = None
    latents: torch.FloatTensor | None = None
    target_latents: torch.FloatTensor | None = None
    length_logits: torch.FloatTensor | None = None
    token_length_logits: torch.FloatTensor | None = None
    expert_indices: torch.LongTensor | None = None
    expert_scores: torch.FloatTensor | None = None
    choice_log_probs: torch.FloatTensor | None = None
    choice_mask: torch.BoolTensor | None = None
    velocity: torch.FloatTensor | None = None
    expert_fields: torch.FloatTensor | None = None
    gate_logits: torch.FloatTensor | None = None
    encoder_last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    encoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    encoder_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class YanAutoEncodingOutput(ModelOutput):
    """
    Output of [`YanForAutoEncoding`]; `hidden_states` and `attentions` of the encoder when asked for.

    Args:
        loss: With `labels`, the weighted sum of the terms, `()`.
        loss_terms: With `labels`, the `token`, `mmd` and `l2` terms, detached.
        logits: `(B, L, V)`, token for token; `(N, V)`, of the `N` labels that count, with `sparse_prediction`.
        last_hidden_state: The latents, `(B, L, d)`.
    """

    loss: torch.FloatTensor | None = None
    loss_terms: dict[str, torch.FloatTensor] | None = None
    logits: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


# Tensor parallelism: attention by heads, feed-forward networks and experts by inner units; the rest is replicated.
_ATTENTION_PLAN = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
# Expert parallelism: whole experts, some on each rank.
_EP_PLAN = {
    **{f"experts.{name}": "grouped_gemm" for name in ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias")},
    "experts": "ep_dispatch_experts",
}
if "ep_dispatch_experts" not in ALL_PARALLEL_STYLES:  # Transformers before 5.21
    _EP_PLAN |= {"routes": "ep_router", "experts": "moe_tp_experts"}


# Tokens among which winners are sought in training, at least.
_FEWEST_TOKENS = 64
_HUB_ARGUMENTS = ("repo_id", "commit_message", "private", "revision", "create_pr", "commit_description", "tags")


class YanPreTrainedModel(PreTrainedModel):
    """Initialisation, freezing by name and the features that Transformers asks a model for."""

    config: YanConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True

    # Its loss is a mean, also under gradient accumulation: the batch's MMD and load balance are no sums over tokens.
    @property
    def accepts_loss_kwargs(self) -> bool:
        """`False`. A `Trainer` asks when it is made, so that arguments which would fail later are refused here."""
        check_trainer(self)
        return False

    _no_split_modules = ["YanEncoderLayer", "YanFlowLayer", "YanDecoderLayer", "YanExperts"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
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
        if self.config.encoder_config is not None and hasattr(self, "lm_head"):
            size, width = self.get_input_embeddings().embedding_dim, self.config.hidden_size
            if self.config.tie_word_embeddings and size != width:
                raise ValueError(
                    f"`tie_word_embeddings` needs a token table of the width `hidden_size={width}`, but the encoder's "
                    f"has {size}: leave the head untied."
                )
            self._tied_weights_keys = {"lm_head.weight": f"{self._table_name()}.weight"}
        super().post_init()
        self._apply_frozen()

    def _table_name(self) -> str:
        """The name of the token table's module."""
        table = self.get_input_embeddings()
        return next(name for name, module in self.named_modules() if module is table)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ):
        """
        Saves as in the base class, but files appear in `save_directory` when all are complete, and others stay. Where
        the configuration has an `auto_map`, the code is saved too. Raises `OSError` where nothing can be written;
        what was there before is untouched.
        """
        if self._auto_class is not None:
            # The base class names the saved class alone; its code brings the others along.
            self.config.auto_map = {**AUTO_MAP, **(getattr(self.config, "auto_map", None) or {})}
        kwargs |= {"is_main_process": is_main_process, "state_dict": state_dict}
        is_joint = kwargs.get("distributed_checkpoint")  # written by all processes together
        if is_joint or not is_main_process:
            super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        else:
            hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}
            with staged_save(save_directory) as folder:
                if auto_map := getattr(self.config, "auto_map", None):
                    write_code(auto_map, Path(__file__).parent, folder)
                super().save_pretrained(folder, **kwargs)
        if not is_joint:
            # Only now are the files in their places for the other processes of a sharded model.
            self.barrier_after_gathered_checkpoint_save(getattr(self.config, "distributed_config", None))
            if push_to_hub and is_main_process:
                repo_id = hub.pop("repo_id", None) or Path(save_directory).resolve().name
                self.push_to_hub(repo_id, token=kwargs.get("token"), **hub)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any):
        """
        As in the base class; parts that the configuration freezes are frozen. Raises `OSError` for weights that are
        damaged or cut short, with the files of a local folder.
        """
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            # The library's message names no file.
            folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
            files = ", ".join(map(str, unreadable_weights(folder))) or f"A file of weights of {folder}"
            message = f"{files}: damaged or cut short ({error}). Copy or download the checkpoint again."
            raise OSError(message) from error
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if getattr(model.config, "quantization_config", None) and getattr(model, "hf_quantizer", None) is None:
            raise ImportError(
                f"The checkpoint is quantised, {model.config.quantization_config}, and nothing here reads that: its "
                "integers would be taken for weights. Install the package and import it: `pip install yan-hf`."
            )
        # Loading makes new parameters.
        model._apply_frozen()
        for module in model.modules():
            if isinstance(module, YanMambaMixer):
                module.mark_undecayed()
        return loaded

    @classmethod
    def from_encoder_pretrained(
        cls, name_or_path: str | os.PathLike, tokenizer: PreTrainedTokenizerBase | None = None, **kwargs: Any
    ):
        """
        A new model around a pretrained encoder: any that `AutoModel` loads, of an encoder-decoder model its encoder.

        Args:
            name_or_path: The encoder's name on the Hub, or its folder.
            tokenizer: Its tokenizer after [`prepare_tokenizer`]: gives the special tokens, and the encoder's token
                table grows to its size. Without it call [`prepare_tokenizer`] with the model.
            kwargs: Fields of [`YanConfig`]; `hidden_size`, `num_attention_heads` and `max_position_embeddings` are
                the encoder's by default, the last at most 1,024. All others go to the encoder's `from_pretrained`:
                `dtype`, `attn_implementation`, `device_map`, `quantization_config`, `revision` and so on.

        Raises:
            ValueError: for a model that reads no text or only leftwards, and fields that do not fit it.
            OSError: where there is no such model.
        """
        own = {field.name for field in dataclasses.fields(cls.config_class)} | {*cls.config_class.attribute_map}
        own -= {field.name for field in dataclasses.fields(PreTrainedConfig)}
        fields = {name: kwargs.pop(name) for name in own & kwargs.keys()}
        fields = {cls.config_class.attribute_map.get(name, name): value for name, value in fields.items()}
        encoder = AutoModel.from_pretrained(name_or_path, **kwargs)
        config = encoder.config
        check_encoder_type(config)
        if tokenizer is not None and len(tokenizer) > config.vocab_size:
            encoder.resize_token_embeddings(len(tokenizer))
        longest = longest_sequence(encoder.get_encoder() if config.is_encoder_decoder else encoder)
        longest = longest or getattr(config, "max_position_embeddings", None) or 1024
        defaults = {"hidden_size": config.hidden_size, "max_position_embeddings": min(longest, 1024)}
        if "hidden_size" not in fields:
            defaults["num_attention_heads"] = config.num_attention_heads
        special = {"pad": ("pad",), "bos": ("bos", "cls"), "eos": ("eos", "sep"), "mask": ("mask",)}
        for name, names in special.items():
            ids = (getattr(tokenizer or config, f"{name}_token_id", None) for name in names)
            defaults[f"{name}_token_id"] = next((i for i in ids if isinstance(i, int) and i >= 0), None)
        defaults["attn_implementation"] = kwargs.get("attn_implementation")
        config = cls.config_class(encoder_config=config, **{**defaults, **fields})
        config.encoder_config = encoder.config  # not a copy: the layers have this one
        with encoder.device:
            model = cls._from_config(config, encoder=encoder, dtype=encoder.dtype)
        model._tokenizer_prepared = tokenizer is not None
        return model

    @torch.no_grad()
    def fit_latent_statistics(self, batches: Iterable[dict[str, torch.Tensor]]):
        """
        Estimates mean and deviation of a pretrained encoder's states over all real tokens of sources and targets, in
        one pass; they are saved with the model. Call it before training.

        Args:
            batches: What a data loader gives: `input_ids` with `attention_mask`, and `labels`; or cached states.

        Raises:
            ValueError: without a pretrained encoder, or for fewer than two tokens.
        """
        base = getattr(self, self.base_model_prefix, self)
        if self.config.encoder_config is None:
            raise ValueError("Only a model with an `encoder_config` has statistics: the model's own encoder learns.")
        count, total, squares = 0, 0.0, 0.0
        was_training = base.encoder.model.training
        base.encoder.model.eval()
        for batch in batches:
            for states, mask in base.encoder.encode_batch(
                {name: value.to(self.device) for name, value in batch.items()}
            ):
                values = states[mask.bool()].float()
                count += len(values)
                total = total + values.sum(dim=0).double().cpu()
                squares = squares + values.square().sum(dim=0).double().cpu()
        base.encoder.model.train(was_training)
        if count < 2:
            raise ValueError(f"Mean and deviation need at least two tokens, but the batches hold {count}.")
        mean = total / count
        base.encoder.latent_mean.copy_(mean)
        base.encoder.latent_std.copy_((squares / count - mean.square()).clamp(min=1e-8).sqrt())

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
        for module in self._parts(self.config.frozen_parts):
            module.requires_grad_(False)
        self._frozen_to_eval()

    def _frozen_to_eval(self):
        for module in self._parts(self.config.frozen_parts):
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
            init.normal_(module.down_proj, mean=0.0, std=std * self.config.residual_init_scale)
            init.zeros_(module.up_proj_bias)
            init.zeros_(module.down_proj_bias)
        elif getattr(module, "ends_residual", False) and self.config.residual_init_scale != 1:
            init.normal_(module.weight, mean=0.0, std=std * self.config.residual_init_scale)
        elif isinstance(module, (YanStartOffsets, YanRepeatEmbedding)):
            init.zeros_(module.weight)
        elif isinstance(module, YanPretrainedEncoder):
            init.zeros_(module.latent_mean)
            init.ones_(module.latent_std)
        elif isinstance(module, YanEncoderProjection):
            init.orthogonal_(module.weight)
        elif isinstance(module, YanStartProjection):
            init.copy_(module.weight, torch.eye(module.out_features, dtype=module.weight.dtype))
        elif isinstance(module, AdaLNModulation):
            # Scale one and shift zero: every norm starts as a plain normalisation at every time.
            bias = torch.zeros_like(module.bias).view(module.num_norms, 2, -1)
            bias[:, 0] = 1.0
            init.copy_(module.bias, bias.flatten())
        elif hasattr(module, "reset"):  # parts of mixers that know their own start
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

    def _parts(self, names: Iterable[str]) -> list[nn.Module]:
        """The modules of parts named as in `config.frozen_parts`, as far as this model has them."""
        base = getattr(self, self.base_model_prefix, self)
        encoder, tokens = getattr(base, "encoder", None), getattr(base, "embed_tokens", None)
        if isinstance(encoder, YanPretrainedEncoder):  # its projection is new, and trains
            encoder, tokens = encoder.model, base.get_input_embeddings()
        modules = {
            "encoder": [encoder],
            "flow": [getattr(base, "flow", None)],
            "decoder": [getattr(base, "decoder", None), getattr(self, "lm_head", None)],
            "token_embeddings": [tokens, getattr(base, "embed_repeats", None)],
            "position_embeddings": [getattr(base, "embed_positions", None)],
        }
        if unknown := [name for name in names if name not in modules]:
            raise ValueError(f"There is no part {unknown[0]!r} to freeze; the parts are {', '.join(modules)}.")
        return [module for name in names for module in modules[name] if module is not None]

    def freeze(self, *parts: str):
        """
        Freezes parts of the model: they are not trained, and stay in eval mode while the rest trains. Named as in
        `config.frozen_parts`, where the choice is saved; raises `ValueError` for another name.
        """
        for module in self._parts(parts):
            module.requires_grad_(False)
        self.config.frozen_parts = list(dict.fromkeys([*self.config.frozen_parts, *parts]))
        return self.train(self.training)

    def unfreeze(self, *parts: str):
        """Undoes [`~YanPreTrainedModel.freeze`] for the named parts, or for all of them."""
        parts = parts or tuple(self.config.frozen_parts)
        for module in self._parts(parts):
            module.requires_grad_(True)
        self.config.frozen_parts = [part for part in self.config.frozen_parts if part not in parts]
        self._apply_frozen()  # a tied table may belong to a part that is still frozen
        return self.train(self.training)

    def _weighted_sum(self, terms: dict[str, torch.Tensor]) -> torch.Tensor:
        # Terms without a weight are left out rather than multiplied by zero, which would keep a NaN.
        weights = self.config.loss_weights
        return sum((weights[name] * terms[name] for name in terms if weights[name] > 0), terms["l2"] * 0.0)

    def train(self, mode: bool = True):
        if mode and self.expert_offload is not None:
            raise RuntimeError(
                "The model cannot enter training mode while its experts are offloaded: their copies on the device "
                "have no gradient. Call `model.disable_expert_offload()` first."
            )
        super().train(mode)
        if mode:
            self._frozen_to_eval()
        return self

    @property
    def expert_offload(self) -> Any:
        """The expert offloading that is on, with its `stats`; `None` while all experts are resident."""
        base = getattr(self, self.base_model_prefix, self)
        experts = getattr(getattr(base, "flow", base), "experts", None)
        return getattr(experts, "offload", None)

    def enable_expert_offload(self, *arguments: Any, **keywords: Any) -> Any:
        """
        Keeps the experts' weights in CPU memory and a bounded number of them on the device: arguments and result of
        `yan_hf.inference.offload.enable_expert_offload`. Raises `ImportError` where the package is not installed.
        """
        return inference_module("offload").enable_expert_offload(self, *arguments, **keywords)

    def disable_expert_offload(self) -> Any:
        """Brings all experts to the device, and gives the statistics; does nothing where offloading is not on."""
        if self.expert_offload is None:
            return None
        return inference_module("offload").disable_expert_offload(self)

    def _apply(self, fn: Any, recurse: bool = True):
        if self.expert_offload is None:
            return super()._apply(fn, recurse)
        self.expert_offload.check_placement(fn)
        return self  # it is there already; the experts stay in CPU memory


def _attention_mask(
    config: YanConfig, states: torch.Tensor, mask: torch.Tensor | None, source_latents: torch.Tensor | None = None
) -> Any:
    """
    A padding mask `(B, L)` as the attention implementation takes it, of `states` `(B, L, d)` over themselves or over
    `source_latents`.
    """
    # Transformers leaves out a mask of ones; off the CPU, the host would wait for the device to know that it is one.
    skip = mask is None or states.device.type == "cpu"
    options = {"encoder_hidden_states": source_latents, "allow_is_bidirectional_skip": skip}
    return create_bidirectional_mask(config, states, mask, **options)


class YanEncoder(YanPreTrainedModel):
    """Bidirectional network from embedded tokens to latents, for sources and targets alike."""

    _can_record_outputs = {"hidden_states": YanEncoderLayer, "attentions": YanAttention}
    _tp_plan = {
        **{f"layers.*.self_attn.{name}": style for name, style in _ATTENTION_PLAN.items()},
        "layers.*.feed_forward.up_proj": "colwise",
        "layers.*.feed_forward.down_proj": "rowwise",
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
        """Token plus position embeddings `(B, L, d)` → latents `(B, L, d)`, with noise of `generator` in training."""
        mask = attention_mask
        if self.config.encoder_backbone not in MIXERS:
            mask = _attention_mask(self.config, inputs_embeds, attention_mask)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, **kwargs)
        latents = self.norm(hidden_states)
        if self.training and self.config.latent_noise > 0:
            latents = add_latent_noise(latents, self.config.latent_noise, generator)
        return BaseModelOutput(last_hidden_state=latents)


class YanPretrainedEncoder(nn.Module):
    """
    An encoder of Transformers in the place of [`YanEncoder`], from tokens to latents `W · (s - μ) / σ`: its states `s`
    of its own width `D`, their mean and deviation, which [`~YanPreTrainedModel.fit_latent_statistics`] estimates, and
    a projection where `D` is not `config.hidden_size`.
    """

    def __init__(self, config: YanConfig, model: PreTrainedModel | None = None):
        super().__init__()
        self.config = config
        if model is None:
            check_encoder_type(config.encoder_config)
            # In the dtype that the rest is made in, whatever the encoder's checkpoint had.
            model = AutoModel.from_config(config.encoder_config, dtype=torch.get_default_dtype())
        self.model = model.get_encoder() if config.encoder_config.is_encoder_decoder else model
        if "add_pooling_layer" in inspect.signature(type(self.model).__init__).parameters:
            self.model.pooler = None  # of one vector for a text: its weights would never be used
        longest = longest_sequence(self.model)
        if longest is not None and config.max_position_embeddings > longest:
            raise ValueError(
                f"`max_position_embeddings={config.max_position_embeddings}` is over the {longest} tokens that the "
                f"position table of the encoder ({config.encoder_config.model_type}) holds: set it to {longest}."
            )
        width = config.encoder_config.hidden_size
        self.register_buffer("latent_mean", torch.zeros(width))
        self.register_buffer("latent_std", torch.ones(width))
        self.proj = None
        if width != config.hidden_size:
            self.proj = YanEncoderProjection(width, config.hidden_size, bias=False)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """Tokens `(B, L)` or their embeddings → latents `(B, L, d)`, with noise of `generator` in training."""
        encoded = self.encode(input_ids, attention_mask, inputs_embeds, **kwargs)
        latents = self.to_latents(encoded.last_hidden_state, generator)
        return BaseModelOutput(latents, encoded.hidden_states, encoded.attentions)

    def encode(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """
        The encoder's own states, `(B, L, D)`. Every row is encoded with its real tokens first, whatever side its
        padding is on, since not every encoder counts positions from the first real token.
        """
        options = {name: kwargs.get(name) for name in ("output_attentions", "output_hidden_states")}
        options = {name: value for name, value in options.items() if value is not None}
        if attention_mask is None:
            encoded = self.model(input_ids=input_ids, inputs_embeds=inputs_embeds, **options)
            return BaseModelOutput(encoded[0], encoded.get("hidden_states"), encoded.get("attentions"))
        is_real = attention_mask.bool()
        order = is_real.long().argsort(dim=1, descending=True, stable=True)
        back = order.argsort(dim=1)
        # Beyond this only padding is left, for which the encoder may have no position.
        width = min(order.shape[1], self.config.max_position_embeddings)
        order, back = order[:, :width], back.clamp(max=width - 1)

        def unpack(states: torch.Tensor) -> torch.Tensor:
            return states.take_along_dim(back[..., None], dim=1)

        if input_ids is not None:
            # RoBERTa, for one, finds the padding by its token.
            pad_token_id = getattr(self.config.encoder_config, "pad_token_id", None) or 0
            input_ids = input_ids.masked_fill(~is_real, pad_token_id).gather(1, order)
        else:
            inputs_embeds = inputs_embeds.take_along_dim(order[..., None], dim=1)
        packed_mask = is_real.gather(1, order).long()
        encoded = self.model(input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=packed_mask, **options)
        hidden_states, attentions = encoded.get("hidden_states"), encoded.get("attentions")
        if hidden_states is not None:
            hidden_states = tuple(states if states is None else unpack(states) for states in hidden_states)
        if attentions is not None:
            rows, columns = back[:, None, :, None], back[:, None, None, :]
            attentions = tuple(
                weights if weights is None else weights.take_along_dim(rows, dim=2).take_along_dim(columns, dim=3)
                for weights in attentions
            )
        return BaseModelOutput(unpack(encoded[0]), hidden_states, attentions)

    def encode_batch(self, batch: dict[str, torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """States and masks, `(B, L, D)` and `(B, L)`, of a training batch's sources and of its targets."""
        ids, labels = batch["input_ids"], batch.get("labels")
        mask = batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(ids)
        states = batch.get("encoder_states")
        yield self.encode(ids, mask).last_hidden_state if states is None else states, mask
        if labels is not None:
            states, canvas = batch.get("target_states"), labels != -100
            if states is None:
                states = self.encode(labels.masked_fill(~canvas, 0), canvas).last_hidden_state
            yield states, canvas

    def to_latents(self, states: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """The encoder's states `(B, L, D)` → latents `(B, L, d)`, with noise of `generator` in training."""
        latents = (states.to(self.latent_mean.dtype) - self.latent_mean) / self.latent_std
        latents = latents if self.proj is None else self.proj(latents)
        if self.training and self.config.latent_noise > 0:
            latents = add_latent_noise(latents, self.config.latent_noise, generator)
        return latents


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
        "experts.up_proj": "colwise",
        "experts.up_proj_bias": "rowwise",  # (K, units): of any weight but a layer's bias, the last dimension is split
        "experts.down_proj": "rowwise",
        "experts": "moe_tp_experts",
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

    def embed_times(self, times: list[float], device: torch.device) -> dict[float, TimeModulation]:
        """Time embedding and modulation of every time, each matrix read once for all of them."""
        dtype = self.norm.weight.dtype
        # Filled on the device: a list copied from the host's memory waits for all that the device has been given.
        kind = {"device": device, "dtype": torch.promote_types(dtype, torch.float32)}
        timesteps = torch.stack([torch.full((), time, **kind) for time in times])
        embedding = self.time_embedding(timesteps, dtype)  # (S, d)
        activated = nn.functional.gelu(embedding)
        layers = [layer.adaptive_norm(activated) for layer in self.layers]
        return {
            time: TimeModulation(embedding[index : index + 1], [scales[index : index + 1] for scales in layers])
            for index, time in enumerate(times)
        }

    def cache_cross_attention(
        self, source_latents: torch.Tensor, repeats: int = 1
    ) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
        """Keys and values of `source_latents` `(B, Lx, d)` for each block, for `repeats` targets of each source."""
        return [
            tuple(repeat_rows(states, repeats) for states in layer.cross_attn.project_key_value(source_latents))
            if layer.has_cross_attention
            else None
            for layer in self.layers
        ]

    def keys_can_be_shared(self) -> bool:
        """
        Whether training's evaluations may share the keys and values of the source, computed outside the layers: not
        where these gather their weights from ranks, nor where checkpointing computes a layer anew from its inputs.
        """
        if self.gradient_checkpointing:
            return False
        layers = (layer.cross_attn for layer in self.layers if layer.has_cross_attention)
        weights = [getattr(proj, "weight", None) for layer in layers for proj in (layer.k_proj, layer.v_proj)]
        return all(type(weight) is nn.Parameter and weight.dim() == 2 for weight in weights)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        context: YanFlowContext,
        modulation: TimeModulation | None = None,
        expert_indices: torch.Tensor | None = None,
        expert_selector: Callable[[torch.Tensor], torch.Tensor] | None = None,
        field_selector: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> YanFlowOutput:
        """
        One evaluation of the vector field: of the experts that are given or that a selector chooses, or else of all of
        them, with the mixture's mean.

        Args:
            latents: The state `z_t`, `(B, Ly, d)`.
            timesteps: `t`, `(B,)`, or `(1,)` where the batch shares it.
            context: From [`YanModel.prepare_context`].
            modulation: What [`~YanFlow.embed_times`] has computed of `timesteps`.
            expert_indices: The experts to compute, `(B, Ly)`.
            expert_selector: From the gate's log-probabilities `(B, Ly, K)` to the experts to compute. Of these alone:
                offloaded experts are predicted by calling it for an earlier state first.
            field_selector: From the same and every expert's field, `(B, Ly, K, d)`, to the experts to compute. Only
                the chosen ones' fields have a gradient, which takes far less than one through all of them.
        """
        if modulation is None:
            # The scales are left to the layers, whose weights may be gathered layer by layer.
            embedding = self.time_embedding(timesteps, self.norm.weight.dtype)
            modulation = TimeModulation(embedding, [None] * len(self.layers))
        hidden_states = self.encode_state(latents, context, modulation, **kwargs)
        gate_logits = fields = None
        if expert_indices is None:
            gate_logits = self.gate(hidden_states, context.pooled_source, modulation.time_embedding)
            log_probs = gate_log_probs(gate_logits, context.canvas_mask)
            if expert_selector is not None:
                expert_indices = expert_selector(log_probs)
            elif field_selector is not None:
                with torch.no_grad():
                    fields = self.all_fields(hidden_states)
                expert_indices = field_selector(log_probs, fields)
        if expert_indices is not None:
            velocity = self.expert_velocity(hidden_states, expert_indices)
        else:
            fields = self.all_fields(hidden_states)
            velocity = self.mixture_velocity(fields, log_probs, context.canvas_mask)
        return YanFlowOutput(hidden_states, velocity, fields, gate_logits, expert_indices)

    def encode_state(
        self, latents: torch.Tensor, context: YanFlowContext, modulation: TimeModulation, **kwargs: Any
    ) -> torch.Tensor:
        """The trunk: state `(B, Ly, d)` → `r`, `(B, Ly, d)`."""
        hidden_states = latents + context.positions
        # Mixers take the canvas itself: the mask of self-attention is quadratic in the length.
        mask = context.canvas_mask if self.config.flow_backbone in MIXERS else context.self_attention_mask
        key_values = context.source_key_values or [None] * len(self.layers)
        for layer, scales, key_value in zip(self.layers, modulation.layers, key_values):
            source = (context.source_latents, mask, context.source_mask)
            hidden_states = layer(hidden_states, modulation.time_embedding, *source, scales, key_value, **kwargs)
        return self.norm(hidden_states)

    def expert_velocity(self, hidden_states: torch.Tensor, expert_indices: torch.Tensor) -> torch.Tensor:
        """The field of one expert for each token: `r` `(B, Ly, d)` and experts `(B, Ly)` → `(B, Ly, d)`."""
        index = expert_indices.reshape(-1, 1)
        weights = torch.ones_like(index, dtype=hidden_states.dtype)
        return self._routed_fields(hidden_states.flatten(0, 1), index, weights).view(hidden_states.shape)

    def all_fields(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Every expert's field `u_k`: `r` `(B, Ly, d)` → `(B, Ly, K, d)`."""
        states, num_experts = hidden_states.flatten(0, 1), self.config.num_experts
        fields = expert_fields(self.experts, self._routed_fields, states, num_experts)
        return fields.unflatten(0, hidden_states.shape[:2])

    def mixture_velocity(
        self, fields: torch.Tensor, log_probs: torch.Tensor, canvas_mask: torch.Tensor
    ) -> torch.Tensor:
        """The mean under the gate `(B, Ly, K)` of the experts' fields `(B, Ly, K, d)`, `(B, Ly, d)`."""
        log_probs, _ = restrict_to_core(log_probs, canvas_mask, RoutingOptions.from_config(self.config))
        return (log_probs.exp().to(fields.dtype)[..., None] * fields).sum(dim=2)

    def _routed_fields(self, states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        _, weights, index = self.routes(index, weights)
        return self.experts(states, index, weights)


class YanDecoder(nn.Module):
    """Position-wise network from latents to what the vocabulary head reads."""

    def __init__(self, config: YanConfig):
        super().__init__()
        self.layers = nn.ModuleList(YanDecoderLayer(config) for _ in range(config.decoder_layers))

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            latents = layer(latents)
        return latents


def _traces(flow: ModelOutput, encoded: BaseModelOutput) -> dict[str, Any]:
    """What a model's output takes from the flow's evaluation and from the encoder."""
    names = ("velocity", "expert_fields", "gate_logits", "hidden_states", "attentions", "cross_attentions")
    traces = {name: getattr(flow, name) for name in names}
    encoder_names = ("last_hidden_state", "hidden_states", "attentions")
    return traces | {f"encoder_{name}": getattr(encoded, name) for name in encoder_names}


class YanModel(YanPreTrainedModel):
    """Encoder, flow and decoder body, without a vocabulary head."""

    _tp_plan = {"embed_tokens": "embedding_rowwise"}

    def __init__(self, config: YanConfig, add_flow: bool = True, encoder: PreTrainedModel | None = None):
        super().__init__(config)
        if config.encoder_config is None:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_repeats = YanRepeatEmbedding(config) if config.repeat_window else None
        num_positions = config.max_position_embeddings + config.num_extra_positions
        self.embed_positions = YanPositionEmbedding(num_positions, config.hidden_size)
        if config.encoder_config is None:
            self.encoder = YanEncoder(config)
        else:
            self.encoder = YanPretrainedEncoder(config, encoder)
        self.flow = YanFlow(config) if add_flow else None
        # From the source's latents to the flow's start.
        self.start_proj = self.start_offsets = None
        if add_flow and config.start_state != "noise":
            self.start_proj = YanStartProjection(config.hidden_size, config.hidden_size, bias=False)
            self.start_offsets = YanStartOffsets(2 * config.max_token_length, config.hidden_size)
        self.decoder = YanDecoder(config)
        self.post_init()

    def init_parallel_plans(self):
        """As in the base class; of a pretrained encoder the token table is sharded, as the head that may share it."""
        super().init_parallel_plans()
        if self.config.encoder_config is not None:
            self._tp_plan[self._table_name()] = self._tp_plan.pop("embed_tokens")

    def get_input_embeddings(self) -> nn.Module:
        """The token table, of a pretrained encoder where there is one."""
        return self.embed_tokens if self.config.encoder_config is None else self.encoder.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding):
        """Replaces the token table; `encoder_config` gets its size."""
        if self.config.encoder_config is None:
            self.embed_tokens = value
        else:
            self.encoder.model.set_input_embeddings(value)
            self.encoder.model.config.vocab_size = self.config.encoder_config.vocab_size = value.num_embeddings

    def encode(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_target: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """
        Tokens `(B, L)` → latents `(B, L, d)`. Padding, on either side, never changes a real position. What the flow
        regresses (`is_target`) has no `config.embedding_dropout`.
        """
        if self.config.encoder_config is not None:
            return self.encoder(input_ids, attention_mask, inputs_embeds, **kwargs)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
            if self.embed_repeats is not None:
                inputs_embeds = inputs_embeds + self.embed_repeats(input_ids)
        elif self.embed_repeats is not None:
            raise ValueError("`repeat_window` looks for repeated tokens: pass `input_ids`, not embeddings.")
        states = inputs_embeds + self._positions(inputs_embeds.shape[:2], attention_mask, inputs_embeds.device)
        if not is_target:
            # As the encoder's own dropout: off where it is frozen.
            states = nn.functional.dropout(states, self.config.embedding_dropout, self.encoder.training)
        return self.encoder(states, attention_mask, **kwargs)

    def _positions(self, shape: torch.Size, mask: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        if mask is None:
            return self.embed_positions(torch.arange(shape[1], device=device))[None]
        return self.embed_positions(positions_from_mask(mask.to(device)))

    @staticmethod
    def pool(latents: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Masked mean of the latents `(B, L, d)` over the sequence, `(B, d)`."""
        return latents.mean(dim=1) if mask is None else masked_mean(latents, mask)

    def start(
        self, source_latents: torch.Tensor, places: torch.Tensor, canvas: torch.Tensor, repeats: int = 1
    ) -> torch.Tensor:
        """
        What the flow's start takes from the source, to which noise is added: `W · A(h) + r`, `(B · repeats, Ly, d)`,
        where `A` lays the latents `(B, Lx, d)` on the canvas `(B · repeats, Ly)`, at the `places` `(B · repeats, Ly)`
        in the source that [`~lengths.source_places`] gives, and `r` are [`YanStartOffsets`].
        """
        start = lay_out(repeat_rows(self.start_proj(source_latents), repeats), places, canvas)
        return start + self.start_offsets(places, canvas) * canvas.to(start.dtype)[..., None]

    def prepare_context(
        self,
        source_latents: torch.Tensor,
        source_mask: torch.Tensor | None,
        canvas_mask: torch.Tensor,
        repeats: int = 1,
    ) -> YanFlowContext:
        """
        What the evaluations of the field for one batch of targets share, of the source's latents `(B, Lx, d)` and mask
        `(B, Lx)` and the targets' canvas `(B · repeats, Ly)`, the targets of one source next to each other.
        """
        positions = self._positions(canvas_mask.shape, canvas_mask, source_latents.device)
        pooled_source = repeat_rows(self.pool(source_latents, source_mask), repeats)
        source_latents, source_mask = repeat_rows(source_latents, repeats), repeat_rows(source_mask, repeats)
        source_mask = _attention_mask(self.config, positions, source_mask, source_latents)
        self_attention_mask = None
        if self.config.flow_backbone not in MIXERS:
            self_attention_mask = _attention_mask(self.config, positions, canvas_mask)
        return YanFlowContext(source_latents, source_mask, self_attention_mask, pooled_source, canvas_mask, positions)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        latents: torch.FloatTensor | None = None,
        timesteps: torch.FloatTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> YanModelOutput:
        """
        Evaluates the experts' fields and the gate at one state and time, and decodes the end point they point to.

        Args:
            input_ids: Source tokens, `(B, Lx)`.
            attention_mask: `(B, Lx)`, 1 on real source tokens.
            latents: The state `z_t`, `(B, Ly, d)`. By default zeros, on a canvas of the source's length.
            timesteps: `t` in [0, 1], `(B,)`; 0 by default.
            decoder_attention_mask: The target's canvas, `(B, Ly)`; by default all ones, or the source's without
                `latents`.
            inputs_embeds: Source embeddings `(B, Lx, d)` instead of `input_ids`.
            encoder_outputs: The source's latents, where they are known already.

        Raises:
            ValueError: for inputs that contradict each other or the configuration.
        """
        if encoder_outputs is None:
            check_source(self.config, input_ids, inputs_embeds, attention_mask)
            encoder_outputs = self.encode(input_ids, attention_mask, inputs_embeds, **kwargs)
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        source_latents = encoder_outputs[0]
        if latents is None:
            latents = torch.zeros_like(source_latents)
            if decoder_attention_mask is None:
                decoder_attention_mask = attention_mask
        if timesteps is None:
            timesteps = latents.new_zeros(latents.shape[0])
        if decoder_attention_mask is None:
            decoder_attention_mask = torch.ones(latents.shape[:2], dtype=torch.long, device=latents.device)
        check_state(self.config, latents, timesteps, decoder_attention_mask, source_latents.shape[0])

        context = self.prepare_context(source_latents, attention_mask, decoder_attention_mask)
        flow = self.flow(latents, timesteps, context, **kwargs)
        end_point = latents + (1 - timesteps.to(latents.dtype))[:, None, None] * flow.velocity
        return YanModelOutput(last_hidden_state=self.decoder(end_point), **_traces(flow, encoder_outputs))


class YanForConditionalGeneration(YanPreTrainedModel, YanGenerationMixin):
    """YAN with a vocabulary head and a length head: trains on source-target pairs, and generates."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    generation_config_class = YanGenerationConfig

    def __init__(self, config: YanConfig, encoder: PreTrainedModel | None = None):
        super().__init__(config)
        self.model = YanModel(config, encoder=encoder)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.length_head = YanLengthHead(config)
        self.token_length_head = None
        if config.start_state in ("aligned", "fertility"):
            self.token_length_head = YanTokenLengthHead(config)
        # Counts `generate`'s compiled programs over its calls.
        self.compiled_programs: set[tuple] = set()
        self.post_init()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `(B, Ly, d)` → vocabulary logits `(B, Ly, V)`."""
        return self.lm_head(self.model.decoder(latents))

    def predict_lengths(self, source_latents: torch.Tensor, source_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of the target's length from the source's latents and mask, as [`YanLengthHead`] gives them."""
        source_latents = source_latents.detach() if self.config.detach_length_head else source_latents
        return self.length_head(source_latents, source_mask)

    def predict_token_lengths(self, source_latents: torch.Tensor) -> torch.Tensor | None:
        """Logits of the number of target tokens that each source token stands for, as [`YanTokenLengthHead`]."""
        if self.token_length_head is None:
            return None
        source_latents = source_latents.detach() if self.config.detach_length_head else source_latents
        return self.token_length_head(source_latents)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any):
        """As in the base class; `config.length_head_trained` becomes what [`~YanLengthHead.is_trained`] tells."""
        self.config.length_head_trained = self.length_head.is_trained(self.config, kwargs.get("state_dict"))
        super().save_pretrained(save_directory, *args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        latents: torch.FloatTensor | None = None,
        timesteps: torch.FloatTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        token_weights: torch.FloatTensor | None = None,
        token_lengths: torch.LongTensor | None = None,
        encoder_states: torch.FloatTensor | None = None,
        target_states: torch.FloatTensor | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> YanOutput:
        """
        With `labels`, the training loss; without, the experts' fields and the gate at a state and time.

        Args:
            input_ids: Source tokens, `(B, Lx)`.
            attention_mask: `(B, Lx)`, 1 on real source tokens.
            labels: Target tokens, `(B, Ly)`, the end token included, -100 where ignored. Position `i` predicts
                `labels[:, i]`: nothing is shifted.
            decoder_attention_mask: The target's canvas, `(B, Ly)`; by default where `labels` are not -100. A position
                of the canvas with an ignored label is shown to the encoder as the mask token.
            latents, timesteps: As of [`YanModel.forward`], without `labels`.
            inputs_embeds, encoder_outputs: Instead of `input_ids`, as there.
            token_weights: How much each target token counts in the flow, latent and token terms, `(B, Ly)`.
            token_lengths: With `labels`, how many target tokens each source token stands for, `(B, Lx)`, for a
                `start_state` that predicts it. With `"aligned"` they are found in the labels by default.
            encoder_states, target_states: With `labels`, a frozen pretrained encoder's states of the source's and the
                target's tokens, `(B, Lx, D)` and `(B, Ly, D)`, as [`encode_dataset`] gives them: the encoder does not
                run, and the loss is the same.
            generator: Source of the loss's randomness. In eval mode a fixed seed is used by default, so that
                evaluation repeats; in training the global state.

        Raises:
            ValueError: for token ids outside the vocabulary, empty rows, masks of another shape, sources or labels
                longer than the position table, state together with labels, and a key-value cache.
        """
        check_no_cache(kwargs)
        if encoder_outputs is None:
            check_source(self.config, input_ids, inputs_embeds, attention_mask, allow_empty_rows=False)
            source = (input_ids, attention_mask, inputs_embeds)
            if encoder_states is None and target_states is None:
                encoder_outputs = self.model.encode(*source, generator=generator, **kwargs)
            else:
                check_encoder_states(self, source, labels, encoder_states, target_states, decoder_attention_mask)
                encoder_outputs = BaseModelOutput(self.model.encoder.to_latents(encoder_states, generator))
        elif encoder_states is not None or target_states is not None:
            raise ValueError("Pass cached states or `encoder_outputs`: both are the encoder's result.")
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        if labels is None:
            if self.training and latents is None:
                logger.warning_once(
                    "A model in training mode got neither `labels` nor `latents`, so there is no YAN loss."
                )
            state = (latents, timesteps, decoder_attention_mask)
            output = self.model(None, attention_mask, *state, encoder_outputs=encoder_outputs, **kwargs)
            logits = self.lm_head(output.last_hidden_state)
            latents = output.encoder_last_hidden_state
            extra = {
                "length_logits": self.predict_lengths(latents, attention_mask),
                "token_length_logits": self.predict_token_lengths(latents),
            }
        else:
            if latents is not None or timesteps is not None:
                raise ValueError("`latents` and `timesteps` are drawn by the loss: pass them without `labels`.")
            source = SourceInputs(input_ids, attention_mask, encoder_outputs[0] if input_ids is None else None)
            target = (labels, decoder_attention_mask, token_weights, token_lengths, target_states)
            output, logits, terms, extra = self._training_forward(
                encoder_outputs, source, *target, generator, **kwargs
            )
            extra["loss"] = self._weighted_sum(terms)
            extra["loss_terms"] = {name: term.detach() for name, term in terms.items()}
        return YanOutput(logits=logits, **extra, **_traces(output, encoder_outputs))

    def _training_forward(
        self,
        encoder_outputs: BaseModelOutput,
        source: SourceInputs,
        labels: torch.Tensor,
        canvas: torch.Tensor | None,
        token_weights: torch.Tensor | None,
        token_lengths: torch.Tensor | None,
        target_states: torch.Tensor | None,
        generator: torch.Generator | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[ModelOutput, torch.Tensor, dict[str, torch.Tensor], dict[str, Any]]:
        """
        The loss terms (arXiv 2604.15009, section 4), with what they were computed from. The solver runs, the
        flow term has its pass and the MMD is estimated only if a weight asks for it; the other terms cost little and
        are always there to be watched.
        """
        weights, routing = self.config.loss_weights, RoutingOptions.from_config(self.config)
        if generator is None and not self.training:
            generator = torch.Generator(encoder_outputs[0].device).manual_seed(0)
        target = (labels, canvas, token_weights, token_lengths, target_states)
        inputs, initial_state, context = self._prepare_loss(encoder_outputs[0], source, *target, generator)

        # Flow matching at a random time of the linear path. Without it the solver's first step trains the gate.
        flow, solved = None, weights["latent"] > 0 or weights["token"] > 0
        if weights["flow"] > 0 or not solved:
            flow, latents = self._match_flow(initial_state, context, inputs, routing, **kwargs)

        # The solved ODE: its own evaluations from the first on, with gradients through every step.
        if not solved:
            logits = self._decode_counted(latents, inputs)
        else:
            solve = self._solve_by_gate if routing.scope == "token" else self._solve_by_winners
            latents, first = solve(initial_state, context, inputs, routing)
            if flow is None:
                flow, inputs.gate_log_probs = first, gate_log_probs(first.gate_logits, context.canvas_mask)
            inputs.latents, logits = latents, inputs.logits[-1]
        if weights["reconstruction"] > 0:
            inputs.target_logits = [self._decode_counted(inputs.target_latents, inputs)]
        names = ("target_latents", "length_logits", "token_length_logits")
        extra = {"latents": latents, **{name: getattr(inputs, name) for name in names}}
        if inputs.choices:
            extra["expert_indices"] = torch.stack([winners for _, winners in inputs.choices])
            extra["expert_scores"] = torch.stack(inputs.expert_scores)
            extra["choice_log_probs"] = torch.stack([gate for gate, _ in inputs.choices]).detach()
            extra["choice_mask"] = first_of_blocks(inputs.canvas, inputs.mask > 0, routing.block_size)
        return flow, logits, loss_terms(inputs), extra

    def _prepare_loss(
        self,
        source_latents: torch.Tensor,
        source: SourceInputs,
        labels: torch.Tensor,
        canvas: torch.Tensor | None,
        token_weights: torch.Tensor | None,
        token_lengths: torch.Tensor | None,
        target_states: torch.Tensor | None,
        generator: torch.Generator | None,
    ) -> tuple[LossInputs, torch.Tensor, YanFlowContext]:
        """The target's latents on its canvas, the flow's start `(B, Ly, d)`, and what its evaluations share."""
        config = self.config
        check_labels(config, labels, canvas, source_latents.shape[0], token_weights)
        labels = labels.long()
        counted = labels != -100
        canvas = counted if canvas is None else canvas.bool()
        target_ids = labels.masked_fill(~counted, config.mask_token_id or 0)
        if target_states is not None:
            target_latents = self.model.encoder.to_latents(target_states, generator)
        else:
            encoded = self.model.encode(target_ids, canvas, generator=generator, is_target=True)
            target_latents = encoded.last_hidden_state
        shape, device = target_latents.shape, target_latents.device
        times = sample_times(shape[0], config.time_beta, device, generator)
        state = config.init_noise * torch.randn(shape, generator=generator, device=device)
        state = state.to(target_latents.dtype)
        places, by_token = self._lay_out_source(source, labels, canvas, token_lengths)
        if places is not None:
            state = state + self.model.start(source_latents, places, canvas)
        if config.keep_known:
            # Fillings, and all tokens of rows without masks.
            counted = counted & (by_token[1].gather(1, places) | ~by_token[1].any(dim=-1, keepdim=True))
        mask = (counted & canvas).to(torch.float32)
        token_lengths, is_predicted = by_token or (None, None)
        whole = source_latents
        if is_predicted is not None:
            # The length of a target whose tokens have their own: its head learns it, the encoder need not.
            whole = torch.where(is_predicted.any(dim=-1)[:, None, None], whole.detach(), whole)
        inputs = LossInputs(
            config=config,
            group=loss_group(self),
            generator=generator,
            times=times,
            labels=target_ids,
            canvas=canvas,
            mask=mask,
            token_weights=mask if token_weights is None else mask * token_weights,
            target_latents=target_latents,
            length_logits=self.predict_lengths(whole, source.attention_mask),
            lengths=self._target_lengths(labels, canvas),
            token_length_logits=self.predict_token_lengths(source_latents),
            token_lengths=token_lengths,
            is_predicted=is_predicted,
        )
        context = self.model.prepare_context(source_latents, source.attention_mask, canvas)
        if self.model.flow.keys_can_be_shared():
            context.source_key_values = self.model.flow.cache_cross_attention(source_latents)
        return inputs, state, context

    def _lay_out_source(
        self, source: SourceInputs, labels: torch.Tensor, canvas: torch.Tensor, token_lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, tuple[torch.Tensor, torch.Tensor] | None]:
        """
        Where in the source each position of the canvas starts from, `(B, Ly)`, and what
        [`~lengths.training_token_lengths`] gives; `None` where the flow starts from noise.
        """
        if self.config.start_state == "noise":
            return None, None
        by_token = training_token_lengths(self.config, source, labels, canvas, token_lengths)
        return source_places(source.mask, canvas.long(), None if by_token is None else by_token[0]), by_token

    def _decode_counted(self, latents: torch.Tensor, inputs: LossInputs) -> torch.Tensor:
        """Logits, of the tokens that count alone with `config.keep_known`."""
        return self.decode(latents[inputs.mask > 0]) if self.config.keep_known else self.decode(latents)

    def _match_flow(
        self,
        initial_state: torch.Tensor,
        context: YanFlowContext,
        inputs: LossInputs,
        routing: RoutingOptions,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[YanFlowOutput, torch.Tensor]:
        """
        Evaluates all experts on the linear path at `inputs.times`, and leaves in `inputs` what the flow term compares.
        Also gives the end point that the mixture's mean points to, `(B, Ly, d)`.
        """
        weight = inputs.times.to(initial_state.dtype)[:, None, None]
        state = (1 - weight) * initial_state + weight * inputs.target_latents
        flow = self.model.flow(state, inputs.times, context, **kwargs)
        inputs.gate_log_probs = gate_log_probs(flow.gate_logits, context.canvas_mask)
        shared, _ = share_choice(inputs.gate_log_probs, None, context.canvas_mask, routing)
        inputs.routed_log_probs, _ = restrict_to_core(shared, context.canvas_mask, routing)
        inputs.expert_fields, inputs.velocity = flow.expert_fields, inputs.target_latents - initial_state
        return flow, state + (1 - weight) * flow.velocity

    def _num_steps(self, group: LossGroup | None, generator: torch.Generator | None) -> int:
        """Solver steps of a forward; in training drawn from `config.solver_steps_range`, by all processes alike."""
        if not self.training or self.config.solver_steps_range is None:
            return self.config.solver_steps
        lowest, highest = self.config.solver_steps_range
        device = generator.device if generator is not None else self.device if group is not None else "cpu"
        number = torch.randint(highest - lowest + 1, (), generator=generator, device=device)
        # A sum of even draws is as even, and the same for all.
        number = number if group is None else group.total(number.to(self.device))
        return lowest + int(number) % (highest - lowest + 1)

    def _solve_by_gate(
        self, state: torch.Tensor, context: YanFlowContext, inputs: LossInputs, routing: RoutingOptions
    ) -> tuple[torch.Tensor, YanFlowOutput]:
        """
        The ODE's end, `(B, Ly, d)`, along experts drawn from the gate; its logits are left in `inputs`. Also gives the
        first evaluation.
        """
        canvas = context.canvas_mask
        shape = torch.Size([*canvas.shape, self.config.num_experts])
        noise: dict[int, torch.Tensor] = {}

        def select(log_probs: torch.Tensor, step: int) -> torch.Tensor:
            if step not in noise:  # it is where offloaded experts were predicted
                noise[step] = torch.rand(shape, generator=inputs.generator, device=canvas.device)
            return choose_experts(restrict_to_core(log_probs, canvas, routing)[0], noise[step])

        times, reselect = time_grid(self._num_steps(inputs.group, inputs.generator)), self.config.reselect_experts
        evaluations: list[YanFlowOutput] = []

        def evaluate(*arguments: Any, **options: Any) -> YanFlowOutput:
            evaluations.append(self.model.flow(*arguments, **options))
            return evaluations[-1]

        state, _ = solve_flow(evaluate, state, context, times, select, reselect=reselect)
        inputs.logits = [self._decode_counted(state, inputs)]
        return state, evaluations[0]

    def _solve_by_winners(
        self, state: torch.Tensor, context: YanFlowContext, inputs: LossInputs, routing: RoutingOptions
    ) -> tuple[torch.Tensor, YanFlowOutput]:
        """
        The ODE's end, `(B, Ly, d)`, along the experts that explain the target best: the winner of a block is the one
        whose estimated end point `z_t + (1 - t) u_k` gives the block's true tokens the highest likelihood. The logits
        of the winner's end point at every step and the choices are left in `inputs`. Also gives the first evaluation.
        """
        canvas, dtype = context.canvas_mask, torch.promote_types(state.dtype, torch.float32)
        first: YanFlowOutput | None = None
        tokens = self._winner_tokens(inputs)

        def velocity(state: torch.Tensor, time: float) -> torch.Tensor:
            def select(log_probs: torch.Tensor, fields: torch.Tensor) -> torch.Tensor:
                gate, _ = share_choice(log_probs, None, canvas, routing)
                ends = state[:, :, None] + (1 - time) * fields
                scores = self._winner_scores(ends, gate, canvas, inputs, routing, tokens)
                is_outside = restrict_to_core(gate, canvas, routing)[0] == -torch.inf
                winners = scores.masked_fill(is_outside, -torch.inf).argmax(dim=-1)
                inputs.choices.append((gate, winners))
                inputs.expert_scores.append(scores)
                return winners

            nonlocal first
            timesteps = torch.full((1,), time, device=state.device, dtype=dtype)
            if not inputs.choices or self.config.reselect_experts:
                flow = self.model.flow(state, timesteps, context, field_selector=select)
            else:
                flow = self.model.flow(state, timesteps, context, expert_indices=inputs.choices[-1][1])
            first = first or flow
            end_points.append(state + (1 - time) * flow.velocity)
            return flow.velocity

        end_points: list[torch.Tensor] = []
        state = integrate(velocity, state, time_grid(self._num_steps(inputs.group, inputs.generator)))
        self._supervise(end_points, inputs)
        return state, first

    def _supervise(self, end_points: list[torch.Tensor], inputs: LossInputs):
        """
        Decodes every step's end point `(B, Ly, d)` for the token term; only the last one's logits must be kept. In
        training each token draws the one of the others that its loss is taken of, for the mean over them all.
        """
        *early, last = end_points
        if early and can_fuse(self.lm_head, last, self.config.label_smoothing):
            labels, weights, states, number = inputs.labels, inputs.token_weights, torch.stack(early), len(early)
            if self.training and number > 1:
                uniform = torch.rand(labels.shape, generator=inputs.generator, device=labels.device)
                drawn = (number * uniform).long().clamp(max=number - 1)[None, :, :, None]
                states = states.gather(0, drawn.expand(1, *states.shape[1:]))
            if self.config.keep_known:
                counted = inputs.mask > 0
                states, labels, weights = states[:, counted], labels[counted], weights[counted]
            labels, weights = (values.flatten().repeat(len(states)) for values in (labels, weights))
            has_weights, states = inputs.token_weights is not inputs.mask, self.model.decoder(states).flatten(0, -2)
            loss = fused_token_loss(states, self.lm_head, labels, weights, has_weights, inputs.group)
            inputs.early_losses, early = [loss] * number, []
        inputs.logits = [self._decode_counted(latents, inputs) for latents in (*early, last)]

    def _winner_tokens(self, inputs: LossInputs) -> torch.Tensor | None:
        """The tokens among which an expert has to find the true ones, `(U,)`, in order; `None` for the vocabulary."""
        if not (self.training and is_plain_linear(self.lm_head)):
            return None
        # Those of the batch's targets: a vocabulary for every expert would cost more than all else.
        tokens = inputs.labels.unique()
        tokens = tokens if inputs.group is None else inputs.group.union(tokens)
        if len(tokens) >= _FEWEST_TOKENS:
            return tokens
        # Against a few, or one, every expert would seem to be right: others, spread over the vocabulary.
        size = self.config.vocab_size
        return torch.cat(
            [tokens, torch.arange(0, size, max(1, size // _FEWEST_TOKENS), device=tokens.device)]
        ).unique()

    @torch.no_grad()
    def _winner_scores(
        self,
        end_points: torch.Tensor,
        gate: torch.Tensor,
        canvas: torch.Tensor,
        inputs: LossInputs,
        routing: RoutingOptions,
        tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        How well each expert's end point of `(B, Ly, K, d)` fits the true tokens of each block, `(B, Ly, K)`; the
        shared gate's log-probabilities `(B, Ly, K)` count with `config.winner_prior`. Likelihoods are those among the
        `tokens` `(U,)`, or of the whole vocabulary.
        """
        labels, decode, size = inputs.labels, self.decode, self.config.vocab_size
        if tokens is not None:
            labels = torch.searchsorted(tokens, labels)
            weight, bias, size = self.lm_head.weight[tokens], self.lm_head.bias[tokens], len(tokens)

            def decode(latents: torch.Tensor) -> torch.Tensor:
                return nn.functional.linear(self.model.decoder(latents), weight, bias)

        labels = labels[..., None].expand(end_points.shape[:3])
        log_probs = token_log_probs(decode, end_points.flatten(0, 2), labels.flatten(), size).view(labels.shape)
        log_probs = log_probs * inputs.mask[..., None]
        return sum_over_blocks(log_probs, canvas, routing.block_size) + self.config.winner_prior * gate

    def _target_lengths(self, labels: torch.Tensor, canvas: torch.Tensor) -> torch.Tensor:
        """Tokens up to the first end token, `(B,)`: the further ones of a canvas with slack do not count."""
        lengths = canvas.sum(dim=-1)
        if self.config.eos_token_id is None:
            return lengths
        places = positions_from_mask(canvas) + 1
        ends = torch.where((labels == self.config.eos_token_id) & canvas, places, labels.shape[1] + 1)
        return torch.minimum(lengths, ends.amin(dim=-1))


class YanForAutoEncoding(YanPreTrainedModel):
    """
    Encoder and decoder without a flow: the first training stage.

    The input is the text with spans collapsed to one mask token each, padded to the length of the clean text, which is
    the label. `YanForConditionalGeneration.from_pretrained` takes its checkpoints and starts the flow anew.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    decode = YanForConditionalGeneration.decode
    # A full model's checkpoint loads too; its flow is not wanted here.
    _keys_to_ignore_on_load_unexpected = [
        r"(^|\.)flow\.",
        r"(^|\.)(token_)?length_head\.",
        r"(^|\.)start_(proj|offsets)\.",
    ]

    def __init__(self, config: YanConfig, encoder: PreTrainedModel | None = None):
        super().__init__(config)
        self.model = YanModel(config, add_flow=False, encoder=encoder)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        token_weights: torch.FloatTensor | None = None,
        generator: torch.Generator | None = None,
        sparse_prediction: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> YanAutoEncodingOutput:
        """
        Args:
            input_ids: Corrupted tokens, `(B, L)`.
            attention_mask: `(B, L)`, 1 where the encoder looks.
            labels: Clean tokens, `(B, L)`, -100 where ignored. Nothing is shifted.
            inputs_embeds: Embeddings `(B, L, d)` instead of `input_ids`.
            token_weights: How much each token counts in the token term, `(B, L)`.
            generator: Source of the randomness, as in [`YanForConditionalGeneration`].
            sparse_prediction: Whether to decode only the positions whose label counts, row after row: the loss is the
                same, and the vocabulary head costs less.

        Raises:
            ValueError: for token ids outside the vocabulary, masks or labels of another shape, sequences longer than
                the position table, and `sparse_prediction` without `labels`.
        """
        check_source(self.config, input_ids, inputs_embeds, attention_mask)
        encoded = self.model.encode(input_ids, attention_mask, inputs_embeds, generator=generator, **kwargs)
        latents = encoded.last_hidden_state
        if labels is None:
            if sparse_prediction:
                raise ValueError("`sparse_prediction=True` needs `labels`, which say where to predict.")
            logits, loss, terms = self.decode(latents), None, None
        else:
            if generator is None and not self.training:
                generator = torch.Generator(latents.device).manual_seed(0)
            check_mask("labels", labels, latents.shape[:2], "input_ids")
            check_labels(self.config, labels, None, latents.shape[0], token_weights)
            labels = labels.long()
            counted, group = labels != -100, loss_group(self)
            mask = counted.to(torch.float32)
            token_mask = mask if token_weights is None else mask * token_weights
            decoded = latents
            if sparse_prediction:
                decoded, labels, token_mask = latents[counted][None], labels[counted][None], token_mask[counted][None]
            logits = self.decode(decoded)
            terms = {"token": token_loss(logits, labels, token_mask, self.config.label_smoothing, group)}
            logits = logits[0] if sparse_prediction else logits
            if self.config.loss_weights["mmd"] > 0:
                terms["mmd"] = mmd_loss(latents, mask, generator, group=group)
            terms["l2"] = l2_loss(latents, mask, group)
            loss = self._weighted_sum(terms)
            terms = {name: term.detach() for name, term in terms.items()}
        traces = (latents, encoded.hidden_states, encoded.attentions)
        return YanAutoEncodingOutput(loss, terms, logits, *traces)
