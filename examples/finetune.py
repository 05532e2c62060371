# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Fine-tunes YAN on a task, keeps the checkpoint with the best generated metric, and reports the test split once.

    python examples/finetune.py examples/configs/sst2.yaml --train_file train.jsonl.gz --validation_file ...
    accelerate launch --num_processes 2 examples/finetune.py examples/configs/sst2.yaml ...
    torchrun --nproc-per-node 2 examples/finetune.py examples/configs/sst2.yaml ...

`--model` is a YAN checkpoint, or one of `pretrain_autoencoder.py`, whose flow then starts anew; without it a new model
is trained from scratch, or around the pretrained `--encoder`.
"""

from pathlib import Path

from common import (
    DataArguments,
    ModelArguments,
    encode_splits,
    freeze_parts,
    make_tokenizer,
    mapping,
    new_model,
    parse,
    prepare,
    prepare_encoder,
    read_splits,
    task_encoder,
)
from huggingface_hub import ModelCardData
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, Seq2SeqTrainingArguments

from yan_hf import ExpertUsageCallback, YanDataCollator, YanForConditionalGeneration, compute_metrics
from yan_hf.data.checks import check_vocabulary
from yan_hf.hub.model_card import CARD_FILE, check_card_file, check_fields
from yan_hf.training.trainer import YanTrainer


def make_model(tokenizer, data: DataArguments, arguments: ModelArguments) -> PreTrainedModel:
    """The checkpoint, or a new model; parts frozen by name."""
    if arguments.model:
        model = AutoModelForSeq2SeqLM.from_pretrained(arguments.model)
    else:
        model = new_model(YanForConditionalGeneration, tokenizer, data, arguments)
    check_vocabulary(tokenizer, model)
    freeze_parts(model, arguments)
    return model


def card_fields(arguments: ModelArguments, folder: str) -> dict:
    """What a card is to say, where one is asked for; looked at now, and not after hours."""
    fields = mapping(arguments.card)
    if fields:
        fields["card_data"] = ModelCardData(**fields.get("card_data", {}))
        check_fields(fields["card_data"], {name: text for name, text in fields.items() if name != "card_data"})
        check_card_file(Path(folder, CARD_FILE))
    return fields


def train(model: PreTrainedModel, tokenizer, splits: dict, data: DataArguments, arguments, training) -> YanTrainer:
    """Trains, and evaluates the validation and test splits by what is generated."""
    table = model.config.max_position_embeddings
    for name in ("max_source_length", "max_target_length"):
        if getattr(data, name) > table:
            raise ValueError(
                f"`{name}` is {getattr(data, name)}, but the model has {table} positions: give at most that."
            )
    card = card_fields(arguments, training.output_dir)
    examples = encode_splits(splits, tokenizer, data)
    encoder = task_encoder(data, tokenizer)
    collator = YanDataCollator(
        tokenizer,
        encoder.objective,
        mask_rate=data.mask_rate,
        max_length=data.max_target_length if encoder.objective == "span_infilling" else data.max_source_length,
        corruption=encoder.corruption,
        align=data.align and (encoder.corruption is not None or encoder.objective == "span_infilling"),
        canvas_slack=data.canvas_slack,
        max_target_length=data.max_target_length,
    )
    if arguments.encoder and not arguments.model:
        prepare_encoder(model, examples, collator, training)
    training.predict_with_generate = True
    if training.generation_max_length is None:
        training.generation_max_length = data.max_target_length
    trainer = YanTrainer(
        model=model,
        args=training,
        train_dataset=examples["train"],
        eval_dataset=examples.get("validation"),
        data_collator=collator,
        processing_class=tokenizer,
        compute_metrics=compute_metrics(tokenizer),
        ema_decay=arguments.ema_decay,
    )
    if model.config.expert_scope != "token":
        trainer.add_callback(ExpertUsageCallback())  # an expert that never wins learns nothing
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint or None)
    trainer.save_model()
    for name, prefix in (("validation", "eval"), ("test", "test")):
        if name in examples:
            metrics = trainer.evaluate(examples[name], metric_key_prefix=prefix)
            trainer.log_metrics(prefix, metrics)
            trainer.save_metrics(prefix, metrics)
            if card:  # of the test split, where there is one
                trainer.create_model_card(metrics=metrics, split=name, **card)
    return trainer


def main():
    data, arguments, training = parse(DataArguments, ModelArguments, Seq2SeqTrainingArguments)
    prepare(training, arguments)
    splits = read_splits(data)
    tokenizer = make_tokenizer(splits, data, arguments)
    train(make_model(tokenizer, data, arguments), tokenizer, splits, data, arguments, training)


if __name__ == "__main__":
    main()
