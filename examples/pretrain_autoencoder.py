# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Stage 1: trains encoder and decoder as an auto-encoder that fills masked spans, on any text.

    python examples/pretrain_autoencoder.py examples/configs/stories_autoencoder.yaml --train_file train.jsonl.gz

With `--masked_answers`, it learns rows of a task with a mask token in their source (question answering, last word, or
any with `--add_mask`) instead: the masked span is the answer, and only it counts. That is how a small model learns a
task from scratch, before the flow learns to generate the answer.
"""

from dataclasses import dataclass, field

from common import (
    DataArguments,
    ModelArguments,
    encode_splits,
    freeze_parts,
    make_tokenizer,
    new_model,
    parse,
    prepare,
    prepare_encoder,
    read_splits,
)
from curriculum import as_masked_answer
from transformers import Seq2SeqTrainingArguments

from yan_hf import YanDataCollator, YanForAutoEncoding
from yan_hf.data.checks import check_vocabulary
from yan_hf.training.trainer import YanTrainer


@dataclass
class StageArguments:
    """What the auto-encoder learns."""

    masked_answers: bool = field(default=False, metadata={"help": "a task's answers instead of masked spans"})


def right_tokens(prediction) -> dict[str, float]:
    """Share of the counted tokens that were predicted right, and of the rows in which all were."""
    right, counted = prediction.predictions == prediction.label_ids, prediction.label_ids != -100
    return {"token_accuracy": float(right[counted].mean()), "row_accuracy": float((right | ~counted).all(-1).mean())}


def main():
    data, model_arguments, stage, training = parse(
        DataArguments, ModelArguments, StageArguments, Seq2SeqTrainingArguments
    )
    prepare(training, model_arguments)
    if not stage.masked_answers:
        data.task = "span_infilling"
    splits = read_splits(data)
    splits.pop("test", None)
    tokenizer = make_tokenizer(splits, data, model_arguments)
    if model_arguments.model:
        model = YanForAutoEncoding.from_pretrained(model_arguments.model)
    else:
        model = new_model(YanForAutoEncoding, tokenizer, data, model_arguments, joined=stage.masked_answers)
    check_vocabulary(tokenizer, model)
    freeze_parts(model, model_arguments)
    examples = encode_splits(splits, tokenizer, data)
    if stage.masked_answers:
        examples = {
            name: rows.map(lambda row: as_masked_answer(row["input_ids"], row["labels"], tokenizer))
            for name, rows in examples.items()
        }
        collator = YanDataCollator(tokenizer)
    else:
        collator = YanDataCollator(
            tokenizer, "auto_encoding", mask_rate=data.mask_rate, max_length=data.max_target_length
        )
    if model_arguments.encoder and not model_arguments.model:
        prepare_encoder(model, examples, collator, training)
    trainer = YanTrainer(
        model=model,
        args=training,
        train_dataset=examples["train"],
        eval_dataset=examples.get("validation"),
        data_collator=collator,
        processing_class=tokenizer,
        compute_metrics=right_tokens,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        ema_decay=model_arguments.ema_decay,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint or None)
    trainer.save_model()
    if "validation" in examples:
        trainer.log_metrics("eval", metrics := trainer.evaluate())
        trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
