"""Training under Lightning that writes down what each rank was given; run by test_lightning.py."""

import argparse
import json
import os
import signal
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from samples import SIZE, described, training_set
from torch.utils.data import DistributedSampler

from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, EvalCrop

BATCH = 8  # on all ranks together
EPOCHS = 2

Record = list[tuple[int, list[int], str]]
"""(epoch, indices, pixels) of every batch."""


def expected(data: Path, rank: int = 0, world_size: int = 1) -> Record:
    """What the loader by itself delivers in the trainer's epochs."""
    loader = DiffuseMixLoader(
        training_set(data),
        BATCH // world_size,
        shuffle=True,
        device="cpu",
        return_index=True,
        rank=rank,
        world_size=world_size,
    )
    return [(epoch, *described(images, index)) for epoch in range(EPOCHS) for images, _, index in loader]


def record(out: Path, stage: str = "training", rank: int = 0) -> Record:
    """What `Recorder` noted."""
    lines = (out / f"{stage}-{rank}.jsonl").read_text().splitlines()
    return [(epoch, indices, pixels) for epoch, indices, pixels in map(json.loads, lines)]


class Recorder(lightning.LightningModule):
    """A linear classifier that notes what it is given in STAGE-RANK.jsonl."""

    def __init__(self, out: Path, kill_at: int | None = None) -> None:
        super().__init__()
        self.network = torch.nn.Linear(3 * SIZE * SIZE, 3)
        torch.nn.init.zeros_(self.network.weight)
        torch.nn.init.zeros_(self.network.bias)
        self.out = out
        self.kill_at = kill_at

    def note(self, stage: str, epoch: int, batch: list[torch.Tensor]) -> None:
        indices, pixels = described(batch[0], batch[2])
        with (self.out / f"{stage}-{self.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps([epoch, indices, pixels]) + "\n")

    def training_step(self, batch: list[torch.Tensor], number: int) -> torch.Tensor:
        if self.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.note("training", self.current_epoch, batch)
        images, labels, _ = batch
        return torch.nn.functional.cross_entropy(self.network(images.flatten(1)), labels)

    def on_train_epoch_start(self) -> None:
        loader = self.trainer.train_dataloader
        if isinstance(loader.sampler, DistributedSampler):  # the trainer tells it the epoch, but not the loader
            loader.set_epoch(self.current_epoch)

    def validation_step(self, batch: list[torch.Tensor], number: int) -> None:
        stage = "sanity" if self.trainer.sanity_checking else "validation"
        self.note(stage, self.current_epoch, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(
    data: Path,
    out: Path,
    *,
    devices: int = 1,
    epochs: int = EPOCHS,
    resume: Path | None = None,
    kill_at: int | None = None,
    sampler: DistributedSampler[Any] | None = None,
    **options: Any,
) -> list[torch.Tensor]:
    """Train, and return the weights; `options` are the trainer's."""
    out.mkdir(parents=True, exist_ok=True)
    train, valid = (
        DiffuseMixLoader(dataset, BATCH // devices, num_workers=1, device="cpu", return_index=True, **order)
        for dataset, order in (
            (training_set(data), {"shuffle": True} if sampler is None else {"sampler": sampler}),
            (DiffuseMixDataset(data / "photos", crop=EvalCrop(SIZE)), {}),
        )
    )
    model = Recorder(out, kill_at)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=epochs,
        callbacks=[ModelCheckpoint(out, filename="{step}", every_n_train_steps=1, save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, train, valid, ckpt_path=resume)
    return [parameter.detach() for parameter in model.parameters()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--kill-at", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    fit(**vars(arguments))
