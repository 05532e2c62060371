# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`quality.py` with `--encoder`: systems around a pretrained encoder, the same for all of them, and how they train."""

import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from quality_systems import AutoregressiveCollator
from quality_tasks import Task, encoded_examples
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertLMHeadModel,
    EncoderDecoderModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from yan_hf import YanConfig, YanDataCollator, YanForConditionalGeneration, encode_dataset
from yan_hf.data.tasks import TextPair


# What becomes of the encoder: weights of its own that learn with all else, as a yardstick; its pretrained ones kept,
# learning too, or adapted by matrices of low rank. What is around it learns in full.
MODES = ("scratch", "frozen", "trained", "lora")


def load_encoder(path: str, mode: str, num_tokens: int) -> PreTrainedModel:
    """The pretrained encoder, or one of its shape with random weights."""
    if mode == "scratch":
        encoder = AutoModel.from_config(AutoConfig.from_pretrained(path))
    else:
        encoder = AutoModel.from_pretrained(path)
    if num_tokens > encoder.config.vocab_size:
        encoder.resize_token_embeddings(num_tokens)
    return encoder


def adapt(encoder: PreTrainedModel):
    """LoRA on every linear layer of an encoder, which keeps its own weights."""
    encoder.requires_grad_(False)
    names = {name for name, module in encoder.named_modules() if isinstance(module, torch.nn.Linear)}
    inject_adapter_in_model(LoraConfig(r=16, lora_alpha=32, target_modules=sorted(names)), encoder)


def new_yan(options: Namespace, task: Task, tokenizer: PreTrainedTokenizerBase) -> YanForConditionalGeneration:
    """A YAN around the encoder."""
    encoder = load_encoder(options.encoder, options.encoder_mode, len(tokenizer))
    fields = {
        "flow_layers": 1,
        "decoder_layers": 1,
        "detach_length_head": False,
        "num_experts": options.experts,
        "max_position_embeddings": task.max_source_length,
        "hidden_size": encoder.config.hidden_size,
        "num_attention_heads": encoder.config.num_attention_heads,
        "loss_weights": {"mmd": 0.0},
        "latent_noise": 0.1 if options.encoder_mode == "frozen" else 0.0,
        "frozen_parts": ["encoder"] if options.encoder_mode == "frozen" else [],
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "mask")},
    }
    config = YanConfig(encoder_config=encoder.config, **{**fields, **options.config_fields})
    model = YanForConditionalGeneration(config, encoder=encoder)
    if options.encoder_mode == "lora":
        adapt(model.model.encoder.model)
    return model


def new_encoder_decoder(
    options: Namespace, tokenizer: PreTrainedTokenizerBase, parameters: int, positions: int
) -> EncoderDecoderModel:
    """The same encoder before a BERT that decodes from left to right, as wide as the parameters allow."""
    encoder = load_encoder(options.encoder, options.encoder_mode, len(tokenizer))
    size = encoder.config.hidden_size
    if options.encoder_mode == "frozen":
        encoder.requires_grad_(False)
    elif options.encoder_mode == "lora":
        adapt(encoder)

    def build(width: int) -> EncoderDecoderModel:
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=size,
            num_hidden_layers=2,  # YAN's block of the flow and of the decoder
            num_attention_heads=encoder.config.num_attention_heads,
            intermediate_size=width,
            max_position_embeddings=positions,
            is_decoder=True,
            add_cross_attention=True,
        )
        return EncoderDecoderModel(encoder=encoder, decoder=BertLMHeadModel(config))

    widths = range(64, 32 * size, 64)
    model = build(min(widths, key=lambda width: abs(build(width).num_parameters() - parameters)))
    model.config.max_position_embeddings = positions
    for config in (model.config, model.generation_config):
        config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        config.decoder_start_token_id = tokenizer.bos_token_id
    return model


class KeepFrozenInEval(TrainerCallback):
    """A frozen encoder without dropout, as YAN's is."""

    def __init__(self, encoder: PreTrainedModel):
        self.encoder = encoder

    def on_step_begin(self, args, state, control, **kwargs):
        self.encoder.eval()


def train_with_encoder(
    options: Namespace, task: Task, tokenizer: PreTrainedTokenizerBase, pairs: list[TextPair], folder: Path
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A trained system; and the minutes that its training took, its steps, and its rate."""
    set_seed(options.seed)
    yan = new_yan(options, task, tokenizer)
    rate, steps = options.learning_rate[0], options.flow_steps or task.flow_steps
    data = Dataset.from_list(encoded_examples(task, tokenizer, pairs))
    collator, callbacks = YanDataCollator(tokenizer), []
    began = time.monotonic()
    if options.system == "yan":
        model = yan
        if options.encoder_mode != "scratch":
            few = data.shuffle(seed=options.seed).select(range(min(len(data), 2000)))
            model.fit_latent_statistics(DataLoader(few.with_format("torch"), batch_size=64, collate_fn=collator))
        if options.encoder_mode == "frozen":
            data = encode_dataset(model, data, dtype="float16")
    else:
        positions = task.max_source_length + task.max_new_tokens
        model = new_encoder_decoder(options, tokenizer, yan.num_parameters(), positions)
        collator = AutoregressiveCollator(tokenizer, "ar-bart")
        if options.encoder_mode == "frozen":
            callbacks.append(KeepFrozenInEval(model.encoder))
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=rate,
        warmup_steps=min(50, steps // 10),
        adam_beta2=0.98,
        weight_decay=0.01,
        seed=options.seed,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        logging_steps=max(1, steps // 10),
        report_to="none",
        disable_tqdm=not options.progress,
        remove_unused_columns=False,
    )
    Trainer(model, arguments, train_dataset=data, data_collator=collator, callbacks=callbacks).train()
    minutes = round((time.monotonic() - began) / 60, 1)
    return model.eval(), {
        "autoencoder_steps": 0,
        "flow_steps": steps,
        "training_minutes": minutes,
        "learning_rate": rate,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
