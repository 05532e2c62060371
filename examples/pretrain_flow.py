# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Stage 2: pre-trains the flow on span infilling, from a stage-1 checkpoint: collapsed text → the whole text.

    python examples/pretrain_flow.py examples/configs/stories_flow.yaml --model runs/stories_autoencoder

Encoder, decoder and embeddings train too unless they are frozen, e.g. `--freeze encoder decoder`; frozen parts run in
eval mode.
"""

from common import DataArguments, ModelArguments, make_tokenizer, parse, prepare, read_splits
from finetune import make_model, train
from transformers import Seq2SeqTrainingArguments


def main():
    data, arguments, training = parse(DataArguments, ModelArguments, Seq2SeqTrainingArguments)
    prepare(training, arguments)
    data.task = "span_infilling"
    splits = read_splits(data)
    tokenizer = make_tokenizer(splits, data, arguments)
    train(make_model(tokenizer, data, arguments), tokenizer, splits, data, arguments, training)


if __name__ == "__main__":
    main()
