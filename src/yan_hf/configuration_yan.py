# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Configuration of YAN, a non-autoregressive language model trained with mixture-of-experts flow matching."""

import copy
import dataclasses
import math
import os
from pathlib import Path
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import StrictDataclassFieldValidationError, strict
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging
from transformers.utils.type_validators import activation_fn_key, interval, probability

from .saving import staged_save, write_code


logger = logging.get_logger(__name__)

# Attention, and those of the table in `mixers`.
BACKBONES = ("transformer", "mamba")
MambaImplementation = Literal["auto", "torch", "cuda"]
Routing = Literal["token", "block"]
ExpertScope = Literal["token", "block", "target"]
# The parts of the model that can be frozen by name.
Part = Literal["encoder", "flow", "decoder", "token_embeddings", "position_embeddings"]

_count = interval(min=1)
_positive = interval(min=0, exclude_min=True, max=math.inf, exclude_max=True)
_not_negative = interval(min=0, max=math.inf, exclude_max=True)
_dropout = interval(min=0, max=1, exclude_max=True)

# The terms of the training loss (functions in `losses`), in the order in which they are reported.
# The flow and latent terms are sums over the width: at weights near 1 they drown the tokens, and the gate collapses.
DEFAULT_LOSS_WEIGHTS = {
    "flow": 0.01,
    "latent": 0.01,
    "token": 1.0,
    "gate_entropy": 0.0,
    "load_balance": 0.1,
    "mmd": 0.01,
    "l2": 0.01,
    "length": 0.1,
    "gate": 0.1,
    "reconstruction": 0.0,
}

# Named starting points of `YanConfig.from_preset`. The paper publishes its sizes but no loss weights: here each of its
# terms counts with 1, what it has not (length head, winners, reconstruction) with 0. Its initial state is plain
# normal noise.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "vocab_size": 128_258,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "encoder_layers": 6,
        "flow_layers": 6,
        "decoder_layers": 2,
        "num_experts": 4,
        "init_noise": 1.0,
        "loss_weights": dict.fromkeys(DEFAULT_LOSS_WEIGHTS, 1.0) | {"length": 0.0, "gate": 0.0, "reconstruction": 0.0},
    },
}


# Where a checkpoint that is saved with its code has the classes of the Auto classes.
AUTO_MAP = {
    "AutoConfig": "configuration_yan.YanConfig",
    "AutoModel": "modeling_yan.YanModel",
    "AutoModelForSeq2SeqLM": "modeling_yan.YanForConditionalGeneration",
}

# What Transformers writes into every configuration beside the fields.
_OTHER_FIELDS = {*vars(PreTrainedConfig()), *PreTrainedConfig().to_dict(), "auto_map", "torch_dtype"} | {
    "model_type", "quantization_config", "experts_implementation", "attn_implementation", "_commit_hash",
    "name_or_path", "transformers_weights", "use_cache",
    "velocity_field", "detach_target_latents",  # of version 0.1; see `__post_init__`
}  # fmt: skip


def check_block_size(config: PreTrainedConfig):
    """Raises `ValueError` where blocks share a choice of experts and have no size; of `generate`'s options too."""
    if config.expert_scope == "block" and config.routing_block_size is None:
        raise ValueError(
            '`expert_scope="block"` needs `routing_block_size`, the tokens of a block; for the whole target take '
            '`expert_scope="target"`.'
        )


def _raise_value_errors(config_class: type) -> type:
    """Makes `ValueError`s of what `@strict` raises for a field, and lets it check the names of `attribute_map` too."""
    checked_setattr = config_class.__setattr__

    def __setattr__(self: Any, name: str, value: Any):
        try:
            checked_setattr(self, self.attribute_map.get(name, name), value)
        except StrictDataclassFieldValidationError as error:
            raise ValueError(f"`{name}` cannot be {value!r}: {error.__cause__}") from error

    config_class.__setattr__ = __setattr__
    return config_class


@_raise_value_errors
@strict
class YanConfig(PreTrainedConfig):
    r"""
    Configuration of [`YanModel`], [`YanForConditionalGeneration`] and [`YanForAutoEncoding`].

    The architecture follows "Towards Faster Language Model Inference Using Mixture-of-Experts Flow Matching"
    (arXiv 2604.15009). Every field is checked; an invalid value raises an error that names the field, its value and
    what is accepted.

    Args:
        vocab_size: Number of tokens `V`.
        hidden_size: Width `d` of the latents. Even (the time embedding has a sine and a cosine half).
        num_attention_heads: Attention heads; must divide `hidden_size`.
        attention_bias: Whether the query, key and value projections have a bias.
        feed_forward_multiplier: Inner width of feed-forward networks and experts, in units of `hidden_size`.
        max_position_embeddings: The longest source and the longest target, in tokens.
        num_extra_positions: Further rows of the position table, never read; converted research checkpoints have one.
        encoder_layers, flow_layers: Blocks of the encoder, and of the flow trunk.
        decoder_layers: Residual blocks of the position-wise decoder; may be 0.
        cross_attention_layers: Indices of the flow blocks with cross-attention to the source; `None`: all of them.
        encoder_backbone, flow_backbone: `"transformer"` or `"mamba"`.
        encoder_config: Configuration of an encoder of Transformers, or its fields with a `model_type`, in the place of
            the model's own encoder and token table; of an encoder-decoder model, the encoder.
            [`~YanPreTrainedModel.from_encoder_pretrained`] takes the weights too. `vocab_size` and `encoder_layers`
            are then the encoder's, and `max_position_embeddings` is at most what its position table holds.
        mamba_state_size, mamba_conv_kernel, mamba_expand: Of the Mamba mixer: state size, width of the causal
            convolution, and expansion factor.
        mamba_ff_multiplier: Feed-forward width multiplier of Mamba blocks.
        mamba_implementation: How the selective scan and the causal convolution are computed: `"torch"`, on any device;
            `"cuda"`, by the kernels of mamba-ssm and causal-conv1d, an error without them; `"auto"`, by those kernels
            where they are installed and the tensors are on a CUDA device, except under `torch.compile`.
        mamba_padding: `"exact"`: each row is scanned within its own real tokens, so that padding changes nothing.
            `"research"`: as in the research code, for converted checkpoints: the whole padded row is scanned, and
            reversed by a plain flip, so that a row's result depends on its padding.
        num_experts: Number `K` of expert vector fields; 1 is plain flow matching.
        gate_temperature: The gate's logits are divided by it.
        gate_dim_multiplier: Inner width of the gate, in units of `hidden_size`.
        expert_scope: Whose tokens share one choice of expert. `"token"`: each target token's own, drawn from the gate,
            in training too, as published. `"block"`: those of `routing_block_size` real tokens. `"target"`: all of the
            target. In the last two training follows the expert that explains a block's true tokens best (its winner),
            and the gate learns to name it.
        reselect_experts: Whether experts are chosen anew at every solver step, from the state reached so far, instead
            of once at t = 0: `S` steps then can tell up to `K^S` texts apart.
        winner_prior: Weight of the gate's own log-probability beside the target's log-likelihood when the winner is
            found. 0 lets experts divide the texts by what explains them; at 1, full expectation-maximisation, one
            expert tends to take all.
        start_state: Where the flow starts. `"noise"`: from noise alone, as published. Else from the source's latents,
            laid on the target's canvas and mapped linearly, plus noise. `"stretched"`: evenly. `"aligned"`: sources
            have mask tokens, and targets are these texts with every mask filled by any number of tokens, which the
            model predicts for each mask: known tokens start at their own place, a filling from its mask's latent; a
            source without masks is stretched. `"fertility"`: the model predicts for every source token how many target
            tokens it stands for (its fertility; Gu et al. 2018, arXiv 1711.02281).
        keep_known: Whether the known tokens of a source with masks are taken over, so that only fillings are trained
            and generated. Needs `start_state="aligned"`.
        max_token_length: The most target tokens that one mask or source token is predicted to stand for.
        repeat_window: The encoder is told which tokens repeat up to so many right before them, as a word that was
            written twice, by an embedding that is added to theirs; 0: it is not. For the model's own encoder.
        expert_sigma: Standard deviation `σ` of each expert's normal density.
        routing: `"token"`: each target token chooses among all experts. `"block"`: the tokens of a block first agree
            on a core set of experts, and each then chooses inside it ([`~yan_hf.experts.core_experts`]; dMoE,
            arXiv 2605.30876), in training, where the mixture's weights and the winners are restricted too, and in
            `generate`, which can override this field and the next four. With `expert_scope="target"` the whole target
            is one block.
        routing_block_size: Real target tokens of a block; `None` is the whole target.
        routing_top_k: A token votes for its so many likeliest experts; `None`: for all of them.
        core_threshold: The core set is the smallest set of most voted-for experts whose share of the votes exceeds it.
            1 keeps every expert, which is token routing; 0 keeps the first alone.
        min_experts: The core set has at least so many experts.
        init_noise: Scale of the initial state `z0`. The flow reads the sum of state and position: noise much louder
            than the position table hides from the first step which position it is at.
        latent_noise: Upper end of the noise scale added to the encoder's output in training.
        time_beta: `(a, b)` of the Beta distribution that the training times are drawn from.
        solver_steps: Euler steps of the solver that the latent and token terms unroll in training, and the default of
            `generate`. (The research code counts grid points: one more.)
        solver_steps_range: `(lowest, highest)`: each training batch draws its number of steps between these, so that
            one model serves all of them; `None`: always `solver_steps`.
        loss_weights: Weight of each term in `DEFAULT_LOSS_WEIGHTS`; others keep their default.
        label_smoothing: Label smoothing of the token term.
        loss_reduction: What the training loss of a batch over several processes is. `"global"`: that of the joined
            batch, gradients included: token counts, the gate's mean and the latents of the MMD are exchanged, so that
            all processes must compute their losses together. `"local"`: each process's own.
        detach_length_head: Whether the length term leaves the encoder's weights alone.
        length_head_trained: Whether the length head means anything. Converted research checkpoints start without one:
            then `generate` asks for `target_lengths`. Training with a weight on the length term sets it.
        frozen_parts: Parts that are not trained and run in eval mode while the rest trains, of `"encoder"`, `"flow"`,
            `"decoder"`, `"token_embeddings"`, `"position_embeddings"`.
        hidden_act: Activation of feed-forward networks, experts and gate; the paper's is the exact GELU.
        hidden_dropout: Dropout after the attention and feed-forward sub-layers.
        attention_dropout: Dropout on the attention weights.
        embedding_dropout: Dropout on the source's embeddings, tokens and positions together, of the model's own
            encoder.
        layer_norm_eps: Epsilon of every layer normalisation.
        initializer_range: Standard deviation of the initial weights.
        residual_init_scale: Factor on it for the matrices that end a residual branch or an expert. With 0 every layer
            starts as the identity: a new model whose flow starts at the source's tokens copies them before it has
            learned anything.
        embedding_scale: Amplitude of the sinusoids that the position table starts with; the token table starts with
            normal numbers of the same root mean square.
        pad_token_id, bos_token_id, eos_token_id, mask_token_id: Special tokens, by default those of
            `yan-hf train-tokenizer`.
        tie_word_embeddings: Whether the vocabulary head shares the token table's weight.

    Example:

    ```python
    >>> from yan_hf import YanConfig, YanForConditionalGeneration

    >>> config = YanConfig(vocab_size=1000, hidden_size=64, num_attention_heads=4, encoder_layers=2, flow_layers=2)
    >>> model = YanForConditionalGeneration(config)
    ```
    """

    model_type = "yan"
    keys_to_ignore_at_inference = [
        "loss_terms", "last_hidden_state", "encoder_last_hidden_state", "velocity", "expert_fields", "gate_logits",
        "expert_indices", "expert_scores", "choice_log_probs", "choice_mask", "latents", "target_latents",
        "length_logits", "token_length_logits",
    ]  # fmt: skip
    attribute_map = {
        "d_model": "hidden_size",
        "num_hidden_layers": "flow_layers",
        "encoder_attention_heads": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "dropout": "hidden_dropout",
        "num_local_experts": "num_experts",
    }
    sub_configs: ClassVar[dict[str, type]] = {"encoder_config": AutoConfig}
    # A plan here would be merged into every stack that shares this flat configuration, under doubled prefixes.
    base_model_tp_plan, base_model_ep_plan, base_model_pp_plan, base_model_fsdp_plan = {}, {}, {}, {}

    vocab_size: int = _count(default=32_000)
    hidden_size: int = interval(min=4)(default=512)
    num_attention_heads: int = _count(default=8)
    attention_bias: bool = False
    feed_forward_multiplier: int = _count(default=4)
    max_position_embeddings: int = _count(default=1024)
    num_extra_positions: int = interval(min=0)(default=0)
    encoder_layers: int = _count(default=6)
    flow_layers: int = _count(default=6)
    decoder_layers: int = interval(min=0)(default=2)
    cross_attention_layers: list[int] | None = None
    encoder_backbone: str = "transformer"
    flow_backbone: str = "transformer"
    encoder_config: dict[str, Any] | PreTrainedConfig | None = None
    mamba_state_size: int = _count(default=16)
    mamba_conv_kernel: int = _count(default=4)
    mamba_expand: int = _count(default=2)
    mamba_ff_multiplier: int = _count(default=4)
    mamba_implementation: MambaImplementation = "auto"
    mamba_padding: Literal["exact", "research"] = "exact"
    num_experts: int = _count(default=4)
    gate_temperature: int | float = _positive(default=1.0)
    gate_dim_multiplier: int = _count(default=1)
    expert_scope: ExpertScope = "token"
    reselect_experts: bool = False
    winner_prior: int | float = _not_negative(default=0.0)
    start_state: Literal["noise", "stretched", "aligned", "fertility"] = "noise"
    keep_known: bool = False
    max_token_length: int = _count(default=32)
    repeat_window: int = interval(min=0)(default=0)
    expert_sigma: int | float = _positive(default=1.0)
    routing: Routing = "token"
    routing_block_size: int | None = None
    routing_top_k: int | None = None
    core_threshold: int | float = probability(default=0.8)
    min_experts: int = _count(default=1)
    init_noise: int | float = _not_negative(default=0.2)
    latent_noise: int | float = _not_negative(default=0.0)
    time_beta: list[int | float] | tuple[int | float, int | float] = (1.0, 1.0)
    solver_steps: int = _count(default=3)
    solver_steps_range: list[int] | tuple[int, int] | None = None
    loss_weights: dict[str, int | float] | None = None
    label_smoothing: int | float = _dropout(default=0.0)
    loss_reduction: Literal["global", "local"] = "global"
    detach_length_head: bool = True
    length_head_trained: bool = True
    frozen_parts: list[Part] | None = None
    hidden_act: str = activation_fn_key(default="gelu")
    hidden_dropout: int | float = _dropout(default=0.0)
    attention_dropout: int | float = _dropout(default=0.0)
    embedding_dropout: int | float = _dropout(default=0.0)
    layer_norm_eps: float = _positive(default=1e-5)
    initializer_range: float = _not_negative(default=0.02)
    residual_init_scale: int | float = _not_negative(default=1.0)
    embedding_scale: int | float = _not_negative(default=1.0)
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    mask_token_id: int | None = 4
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any):
        # Before defaults are derived from the fields that they name.
        for alias in [name for name in kwargs if name in self.attribute_map]:
            setattr(self, self.attribute_map[alias], kwargs.pop(alias))
        if (old := kwargs.pop("velocity_field", "expert")) != "expert":
            raise ValueError(
                f"`velocity_field={old!r}`, the mean of all experts, is not supported any more. Load the checkpoint "
                "with yan_hf 0.1, or drop the field to follow one expert."
            )
        kwargs.pop("detach_target_latents", None)
        if self.encoder_config is not None:
            self._follow_encoder()
        if self.cross_attention_layers is None:
            self.cross_attention_layers = list(range(self.flow_layers))
        self.time_beta = list(self.time_beta)
        self.frozen_parts = list(self.frozen_parts or [])
        if self.solver_steps_range is not None:
            self.solver_steps_range = list(self.solver_steps_range)
        self.loss_weights = {**DEFAULT_LOSS_WEIGHTS, **(self.loss_weights or {})}
        super().__post_init__(**kwargs)
        # `@strict` calls it again, but wraps what it raises: here a caller gets the plain `ValueError`.
        self.validate_architecture()

    def validate_architecture(self):
        """
        Called at construction, when a model is built and before saving: the checks across fields, and those of lists
        and dictionaries, which can change without an assignment. Raises `ValueError` naming the field and its value.
        """
        self._check_layers()
        if self.encoder_config is not None:
            self._check_encoder()
        self._check_lists()
        self._check_routing()
        if self.start_state == "aligned" and self.mask_token_id is None:
            raise ValueError('`start_state="aligned"` fills masks: it needs a `mask_token_id`.')
        if self.keep_known and self.start_state != "aligned":
            raise ValueError(f'`keep_known` needs `start_state="aligned"`, but that is {self.start_state!r}.')
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id"):
            self._check_range(name, getattr(self, name), 0, self.vocab_size - 1, "vocab_size")

    def _follow_encoder(self):
        """Makes `encoder_config` a configuration; fields that were left at their defaults follow it."""
        if isinstance(self.encoder_config, dict):
            kind = self.encoder_config.get("model_type")
            if kind not in CONFIG_MAPPING:
                raise ValueError(
                    f"`encoder_config['model_type']` is {kind!r}, which is no model of Transformers. Take the fields "
                    "of an encoder's config.json as they are, or `AutoConfig.from_pretrained(...)`."
                )
            self.encoder_config = CONFIG_MAPPING[kind](**self.encoder_config)
        # A model that has it keeps its own, whose attention implementation this configuration would reset.
        self.encoder_config = copy.deepcopy(self.encoder_config)
        if any(getattr(self.encoder_config, name, None) is None for name in ("vocab_size", "hidden_size")):
            kind = self.encoder_config.model_type
            raise ValueError(f"`encoder_config` of the type {kind!r} has no vocabulary or no width: it reads no text.")
        longest = getattr(self.encoder_config, "max_position_embeddings", None)
        follow = self._encoder_sizes()
        if isinstance(longest, int) and longest > 0:
            follow["max_position_embeddings"] = min(longest, self.max_position_embeddings)
        for name, value in follow.items():
            if getattr(self, name) == getattr(type(self), name):
                setattr(self, name, value)

    def _encoder_sizes(self) -> dict[str, int]:
        """Fields that are `encoder_config`'s, where it tells."""
        sizes = {"vocab_size": "vocab_size", "encoder_layers": "num_hidden_layers"}
        found = {name: getattr(self.encoder_config, theirs, None) for name, theirs in sizes.items()}
        return {name: value for name, value in found.items() if value is not None}

    def _check_encoder(self):
        for name, value in self._encoder_sizes().items():
            if getattr(self, name) != value:
                raise ValueError(f"`{name}={getattr(self, name)}` must be left out: `encoder_config` has {value}.")
        for name in ("encoder_backbone", "embedding_dropout", "repeat_window"):
            if getattr(self, name) != getattr(type(self), name):
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` is of the model's own encoder, but there is an "
                    "`encoder_config`. Leave one of them out."
                )
        if getattr(self.encoder_config, "is_decoder", False):
            raise ValueError("`encoder_config.is_decoder` is set: a decoder sees no token to its right.")

    def _check_layers(self):
        for name in ("encoder_backbone", "flow_backbone"):
            if (value := getattr(self, name)) not in BACKBONES:
                raise ValueError(f"`{name}` must be one of {', '.join(BACKBONES)}, but is {value!r}.")
        if self.hidden_size % 2:
            raise ValueError(f"`hidden_size={self.hidden_size}` must be even: the time embedding has two halves.")
        if self.hidden_size % self.num_attention_heads:
            numbers = f"{self.num_attention_heads} does not divide {self.hidden_size}"
            raise ValueError(f"`num_attention_heads` must divide `hidden_size`, but {numbers}.")
        indices = self.cross_attention_layers
        for index in indices:
            self._check_range("cross_attention_layers", index, 0, self.flow_layers - 1, "flow_layers")
        if len(set(indices)) != len(indices):
            raise ValueError(f"`cross_attention_layers` must not repeat an index, but is {indices}.")

    def _check_lists(self):
        self.frozen_parts = self.frozen_parts  # checked by the assignment
        if len(self.time_beta) != 2 or not all(0 < value < math.inf for value in self.time_beta):
            raise ValueError(f"`time_beta` must be two positive finite numbers `(a, b)`, but is {self.time_beta}.")
        steps = self.solver_steps_range
        if steps is not None and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
            raise ValueError(f"`solver_steps_range` must be `(lowest, highest)`, at least 1, but is {steps}.")
        if steps is not None and self.loss_reduction == "local":
            raise ValueError(
                '`solver_steps_range` needs `loss_reduction="global"`: processes that share weights must take as many '
                "steps as one another, and draw their number together."
            )
        for name, weight in self.loss_weights.items():
            if name not in DEFAULT_LOSS_WEIGHTS:
                terms = ", ".join(DEFAULT_LOSS_WEIGHTS)
                raise ValueError(f"`loss_weights` has no term `{name}`; the terms are {terms}.")
            if not 0 <= weight < math.inf:
                raise ValueError(f"`loss_weights['{name}']` must be finite and not negative, but is {weight}.")

    def _check_routing(self):
        if self.routing_block_size is not None and self.routing_block_size < 1:
            size = self.routing_block_size
            raise ValueError(f"`routing_block_size` must be at least 1, or `None`, the whole target, but is {size}.")
        check_block_size(self)
        for name in ("routing_top_k", "min_experts"):
            self._check_range(name, getattr(self, name), 1, self.num_experts, "num_experts")

    def _check_range(self, name: str, value: int | None, lowest: int, highest: int, other: str):
        if value is not None and not lowest <= value <= highest:
            limits = f"{lowest} to {highest} with `{other}={getattr(self, other)}`"
            raise ValueError(f"`{name}` must be in {limits}, but is {value}.")

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any):
        """
        As in the base class, and a process killed meanwhile leaves the old file. The modules that an `auto_map` names
        are written too; entries whose module is not at hand are left out.
        """
        kept = getattr(self, "auto_map", None)
        with staged_save(save_directory) as folder:
            try:
                if kept:
                    self.auto_map = write_code(kept, Path(__file__).parent, folder)
                super().save_pretrained(folder)
            finally:
                if kept:
                    self.auto_map = kept
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", None) or Path(save_directory).resolve().name, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """As in the base class, with a warning that lists fields which this version does not know."""
        known = {field.name for field in dataclasses.fields(cls)} | {*cls.attribute_map, *_OTHER_FIELDS}
        if unknown := sorted(config_dict.keys() - known):
            logger.warning(
                f"The configuration has fields that this version of yan_hf does not know: {', '.join(unknown)}. They "
                "are kept, but change nothing; the checkpoint may come from a newer version: pip install -U yan-hf."
            )
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_preset(cls, name: str, **fields: Any) -> "YanConfig":
        """
        A configuration by name, with fields of your own on top: `"default"`, what measured best here, or `"paper"`,
        the published sizes and every term of the paper's loss with the same weight. Else raises `ValueError`.
        """
        if name not in PRESETS:
            raise ValueError(f"`name` must be one of {', '.join(PRESETS)}, but is {name!r}.")
        return cls(**{**PRESETS[name], **fields})

    @property
    def intermediate_size(self) -> int:
        """Inner width of the feed-forward networks and of the experts; setting it sets `feed_forward_multiplier`."""
        return self.feed_forward_multiplier * self.hidden_size

    @intermediate_size.setter
    def intermediate_size(self, size: int):
        if size % self.hidden_size:
            width = self.hidden_size
            raise ValueError(f"`intermediate_size` must be a multiple of `hidden_size={width}`, but is {size}.")
        self.feed_forward_multiplier = size // self.hidden_size
