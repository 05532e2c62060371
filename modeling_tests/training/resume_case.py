# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A short training run that `test_trainer.py` kills and resumes: `resume_case.py FOLDER [--wait]`."""

import sys
import time
from pathlib import Path

import torch
from testing_utils import small_config
from transformers import Seq2SeqTrainingArguments, TrainerCallback, set_seed

from yan_hf import YanDataCollator, YanForConditionalGeneration, train_tokenizer
from yan_hf.training.trainer import YanTrainer


class WaitAfter(TrainerCallback):
    """Stops the clock after a step, so that the killer comes in the middle of training."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            Path(args.output_dir, "in the middle").touch()
            time.sleep(120)


def train(folder: Path, wait: bool = False) -> torch.nn.Module:
    """Ten steps with everything that draws: dropout, noise, masked spans, shuffling; checkpoints every four steps."""
    texts = [f"the {colour} cat saw {count} dogs" for colour in ("red", "black", "white") for count in range(8)]
    tokenizer = train_tokenizer(texts * 5, vocab_size=330, model_type="bpe")
    set_seed(0)
    model = YanForConditionalGeneration(
        small_config(vocab_size=len(tokenizer), hidden_dropout=0.1, latent_noise=0.2, max_position_embeddings=48)
    )
    trainer = YanTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=str(folder),
            max_steps=10,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            save_steps=4,
            logging_steps=2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": tokenizer(text)["input_ids"]} for text in texts],
        data_collator=YanDataCollator(tokenizer, "span_infilling", mask_rate=0.3),
        callbacks=[WaitAfter()] if wait else [],
        ema_decay=0.8,
    )
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model(folder / "final")
    return trainer.model


if __name__ == "__main__":
    train(Path(sys.argv[1]), wait="--wait" in sys.argv)
