# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Fine-tunes YAN with LoRA (PEFT): on the linear layers, and where asked on the experts' 3-D weights.

    python examples/finetune_lora.py examples/configs/sst2_lora.yaml --model runs/sst2 --train_file train.jsonl.gz ...

`--output_dir` gets the adapter, its folder `merged` the whole model with the adapter merged in.
"""

from pathlib import Path

from common import DataArguments, LoraArguments, ModelArguments, make_tokenizer, parse, prepare, read_splits
from finetune import make_model, train
from peft import LoraConfig, get_peft_model
from transformers import Seq2SeqTrainingArguments

from yan_hf.data.files import check_not_input


def main():
    data, arguments, lora, training = parse(DataArguments, ModelArguments, LoraArguments, Seq2SeqTrainingArguments)
    if not arguments.model:
        raise SystemExit("finetune_lora.py: give --model, the checkpoint to adapt.")
    if lora.adapt_experts and {"flow", "experts"} & {name.split(".")[-1] for name in lora.modules_to_save or []}:
        raise SystemExit(
            f"finetune_lora.py: the experts train in full with modules_to_save={lora.modules_to_save}, and cannot be "
            "adapted too. Leave out adapt_experts, or the flow among modules_to_save."
        )
    prepare(training, arguments)
    check_not_input(Path(training.output_dir, "merged"), arguments.model)
    splits = read_splits(data)
    tokenizer = make_tokenizer(splits, data, arguments)
    modules = lora.target_modules
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.lora_dropout,
        target_modules="all-linear" if modules == ["all-linear"] else modules,
        target_parameters=["flow.experts.up_proj", "flow.experts.down_proj"] if lora.adapt_experts else None,
        modules_to_save=lora.modules_to_save,
        task_type="SEQ_2_SEQ_LM",
    )
    model = get_peft_model(make_model(tokenizer, data, arguments), config)
    model.print_trainable_parameters()
    trainer = train(model, tokenizer, splits, data, arguments, training)
    if trainer.is_world_process_zero():
        merged = Path(training.output_dir) / "merged"
        trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().save_pretrained(merged)
        tokenizer.save_pretrained(merged)


if __name__ == "__main__":
    main()
