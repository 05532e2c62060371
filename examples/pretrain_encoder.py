# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Pretrains a small ModernBERT by masked language modelling on texts, as an encoder to start a YAN from.

    python examples/pretrain_encoder.py --train_files train-00.jsonl.gz train-01.jsonl.gz --column text \\
        --output_dir runs/encoder --max_steps 20000 --per_device_train_batch_size 32 --learning_rate 5e-4
    python examples/finetune.py examples/configs/sst2.yaml --model "" --encoder runs/encoder --freeze encoder

The recipe is that of Transformers' `run_mlm.py`: texts are joined and cut into blocks, and random tokens are masked
anew in every batch. Give it the training parts of data sets only.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from common import prepare
from datasets import Dataset
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    ModernBertConfig,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.hf_argparser import HfArgumentParser

from yan_hf import train_tokenizer
from yan_hf.data.files import iterate_column


@dataclass
class EncoderArguments:
    """The texts, and the encoder's size."""

    train_files: list[str] = field(
        metadata={"help": "texts, or .jsonl / .jsonl.gz files with a column of them; a file named twice counts twice"}
    )
    column: list[str] = field(default_factory=lambda: ["text"], metadata={"help": "that column, or one for each file"})
    lower_case: bool = field(default=False, metadata={"help": "texts in small letters"})
    tokenizer: str | None = field(default=None, metadata={"help": "by default one is trained on the texts"})
    vocab_size: int = field(default=8_000, metadata={"help": "of a new tokenizer"})
    hidden_size: int = field(default=256, metadata={"help": "width"})
    num_hidden_layers: int = field(default=6, metadata={"help": "blocks"})
    num_attention_heads: int = field(default=4, metadata={"help": "attention heads"})
    block_size: int = field(default=128, metadata={"help": "tokens of a block"})
    max_position_embeddings: int = field(default=512, metadata={"help": "the longest sequence"})
    mask_rate: float = field(default=0.3, metadata={"help": "share of the tokens masked"})


def texts_of(options: EncoderArguments) -> Iterator[str]:
    """The texts of all files. Raises `ValueError` where neither one column is given nor one for every file."""
    files, columns = options.train_files, options.column
    if len(columns) not in (1, len(files)):
        raise ValueError(f"`column` must be one name or one for each of {len(files)} files, but has {len(columns)}.")
    for file, column in zip(files, columns if len(columns) > 1 else columns * len(files)):
        has_columns = file.removesuffix(".gz").endswith((".jsonl", ".json"))
        for text in iterate_column(Path(file), column if has_columns else None):
            yield text.lower() if options.lower_case else text


def blocks(texts: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, size: int) -> dict[str, list[list[int]]]:
    """The joined tokens of a batch of texts in blocks of one size; what is left over is dropped."""
    ids = list(chain.from_iterable(tokenizer(texts["text"])["input_ids"]))
    return {"input_ids": [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]}


def main():
    options, training = HfArgumentParser((EncoderArguments, TrainingArguments)).parse_args_into_dataclasses()
    prepare(training)
    texts = Dataset.from_dict({"text": list(texts_of(options))})
    if options.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    else:
        tokenizer = train_tokenizer((row["text"] for row in texts), options.vocab_size, "bpe")
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    ends = {"cls_token_id": tokenizer.bos_token_id, "sep_token_id": tokenizer.eos_token_id}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        intermediate_size=2 * options.hidden_size,  # gated: half as wide as a plain one
        sparse_prediction=True,  # the head reads masked positions alone: a step is 1.7 times as fast at this size
        **{name: getattr(options, name) for name in sizes},
        **ends,
        **special,
    )
    arguments = {"tokenizer": tokenizer, "size": options.block_size}
    data = texts.map(blocks, batched=True, fn_kwargs=arguments, remove_columns=["text"], desc="tokenizing")
    trainer = Trainer(
        model=AutoModelForMaskedLM.from_config(config),
        args=training,
        train_dataset=data,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=options.mask_rate),
        processing_class=tokenizer,
    )
    result = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint or None)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)


if __name__ == "__main__":
    main()
