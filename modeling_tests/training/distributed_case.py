# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What `test_distributed.py` runs, on one process or on two (`torchrun --nproc-per-node 2 distributed_case.py FOLDER`).

Random draws are a function of the row in the joined batch and of the order of the draws: a row gets the same numbers
on whatever process it is.
"""

import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from yan_hf import YanConfig, YanForAutoEncoding, YanForConditionalGeneration


ROWS, WIDTH = 3, 9
LOSS_WEIGHTS = {
    "flow": 0.1, "latent": 0.1, "token": 1.0, "gate_entropy": 0.3, "load_balance": 1.0, "mmd": 1.0, "l2": 0.2,
    "length": 0.5, "gate": 0.5, "reconstruction": 0.5,
}  # fmt: skip


def make_model(auto_encoding: bool = False, backbone: str = "transformer", **fields) -> torch.nn.Module:
    torch.manual_seed(0)
    config = YanConfig(
        vocab_size=50,
        hidden_size=16,
        num_attention_heads=2,
        encoder_layers=2,
        flow_layers=2,
        decoder_layers=1,
        max_position_embeddings=16,
        initializer_range=0.2,
        latent_noise=0.5,
        encoder_backbone=backbone,
        flow_backbone=backbone,
        loss_weights=LOSS_WEIGHTS,
        experts_implementation="eager",
        **fields,
    )
    return (YanForAutoEncoding if auto_encoding else YanForConditionalGeneration)(config).train()


def joined_batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two processes' rows, of which the second's have far fewer tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 50, (2 * ROWS, WIDTH), generator=generator)
    labels = torch.randint(5, 50, (2 * ROWS, WIDTH), generator=generator)
    lengths = torch.tensor([[9, 8, 7], [9, 2, 1]]).flatten()
    places = torch.arange(WIDTH)
    mask = (places < lengths.roll(1)[:, None]).long()
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "labels": labels.masked_fill(places >= lengths[:, None], -100),
    }


def filled_batch() -> dict[str, torch.Tensor]:
    """Sources with masks; in the second process's rows every filling is empty."""
    sources = torch.tensor([[7, 4, 9, 2], [8, 4, 4, 2], [6, 4, 11, 2]]).repeat(2, 1)
    labels = [[7, 20, 21, 9, 2], [8, 22, 23, 24, 2], [6, 30, 11, 2], [7, 9, 2], [8, 2], [6, 11, 2]]
    rows = [torch.tensor(row) for row in labels]
    return {"input_ids": sources, "labels": torch.nn.utils.rnn.pad_sequence(rows, True, padding_value=-100)}


@contextmanager
def draws_by_row(rank: int, size: int):
    """Replaces `torch.rand` and `torch.randn` by draws that depend on the row in the joined batch."""
    count = 0

    def draw(function):
        def replacement(*shape, generator=None, device=None, dtype=None):
            nonlocal count
            count += 1
            shape = tuple(shape[0]) if not isinstance(shape[0], int) else shape
            # The draws for the joined batch, of which a process takes its rows.
            seeded = torch.Generator().manual_seed(count)
            rows = shape[0] * (2 if size == 2 else 1)
            values = function(rows, *shape[1:], generator=seeded, dtype=dtype)
            return values[rank * shape[0] : (rank + 1) * shape[0]]

        return replacement

    with patch("torch.rand", draw(torch.rand)), patch("torch.randn", draw(torch.randn)):
        yield


def rows_of(batch: dict[str, torch.Tensor], rank: int, size: int) -> dict[str, torch.Tensor]:
    return batch if size == 1 else {name: value[rank * ROWS : (rank + 1) * ROWS] for name, value in batch.items()}


def loss_and_gradients(
    auto_encoding: bool, backbone: str, max_points: int, fields: dict, rank: int, size: int
) -> dict:
    model = make_model(auto_encoding, backbone, **fields)
    wrapped = DistributedDataParallel(model) if size == 2 else model
    batch = rows_of(filled_batch() if model.config.keep_known else joined_batch(), rank, size)
    with draws_by_row(rank, size), patch("yan_hf.losses.mmd_loss.__defaults__", _defaults(max_points)):
        output = wrapped(**batch)
    output.loss.backward()
    terms = {**output.loss_terms, "loss": output.loss.detach()}
    if size == 2:
        for value in terms.values():
            dist.all_reduce(value)
            value /= 2
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return {"terms": terms, "gradients": gradients}


def _defaults(max_points: int) -> tuple:
    from yan_hf.losses import mmd_loss

    return tuple(max_points if value == 2_000 else value for value in mmd_loss.__defaults__)


def train_sharded(
    folder: Path, rank: int, size: int, **fields
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Three steps of AdamW, sharded by FSDP2 on two processes, and what is written around them; saves the model."""
    model = make_model(**fields)
    if size == 2:
        for module in [*model.modules()]:
            if type(module).__name__ in ("YanEncoderLayer", "YanFlowLayer", "BertLayer"):
                fully_shard(module)
        fully_shard(model)
    before = written(model, rank, size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    for step in range(3):
        with draws_by_row(rank, size):
            model(**rows_of(joined_batch(step), rank, size)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = written(model, rank, size)
    if size == 2:
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0:
            model.save_pretrained(folder / "sharded", state_dict=dict(state))
    else:
        state = model.state_dict()
    return state, {"before": before, "after": after}


def written(model, rank: int, size: int) -> torch.Tensor:
    """What a process writes for its rows, in training mode: before any training step, and between them."""
    batch = rows_of(joined_batch(), rank, size)
    ids = model.generate(
        batch["input_ids"],
        batch["attention_mask"],
        seeds=[rank * ROWS + row for row in range(len(batch["input_ids"]))],
        target_lengths=5,
        synced_gpus=size == 2,
    )
    if size == 1:
        return ids
    both = [torch.empty_like(ids) for _ in range(size)]
    dist.all_gather(both, ids)
    return torch.cat(both)


BLOCK = {"expert_scope": "block", "routing_block_size": 3}
ANEW = {"expert_scope": "target", "reselect_experts": True, "start_state": "stretched"}
ENCODER = {"model_type": "bert", "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
ENCODER |= {"num_attention_heads": 2, "max_position_embeddings": 16, "initializer_range": 0.2}
ENCODER |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PRETRAINED = {"encoder_config": ENCODER}
CASES = {
    "pretrained encoder": (False, "transformer", 2_000, PRETRAINED),
    "frozen pretrained encoder": (False, "transformer", 2_000, {**PRETRAINED, "frozen_parts": ["encoder"]}),
    "full": (False, "transformer", 2_000, {}),
    "full, few points": (False, "transformer", 20, {}),
    "mamba": (False, "mamba", 2_000, {}),
    "auto-encoder": (True, "transformer", 2_000, {}),
    "winners of blocks": (False, "transformer", 2_000, BLOCK),
    "fillings alone": (False, "transformer", 2_000, {"start_state": "aligned", "keep_known": True}),
    "fillings alone, winners": (False, "transformer", 2_000, {"start_state": "aligned", "keep_known": True, **BLOCK}),
    "winners of targets, anew": (False, "mamba", 2_000, ANEW),
}


def main(folder: Path):
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    results = {name: loss_and_gradients(*case, rank, size) for name, case in CASES.items()}
    results["sharded"] = train_sharded(folder / "drawn", rank, size)
    results["sharded, pretrained"] = train_sharded(folder / "pretrained", rank, size, **PRETRAINED)
    results["sharded, winners"] = train_sharded(folder / "winners", rank, size, **ANEW)
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
