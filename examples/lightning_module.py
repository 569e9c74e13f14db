"""Train a classifier with Lightning, on one device or several. The Trainer takes the loader unchanged.

    pip install '.[lightning]'
    dali-diffusemix generate data/train cache/edits --editor procedural --prompts autumn,snowy
    dali-diffusemix fractals cache/fractals.npy --count 64
    python examples/lightning_module.py data/train data/val cache/edits cache/fractals.npy

On several devices each loader takes its share of every batch. A checkpoint contains the position in the epoch: run it
again with --resume last.ckpt to continue with the next batch.
"""

import argparse
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional

from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, EvalCrop, MixSpec, TrainCrop


class Classifier(lightning.LightningModule):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.network = torch.nn.Sequential(
            *(torch.nn.Conv2d(3, 32, 7, stride=4), torch.nn.ReLU(), torch.nn.Conv2d(32, 64, 3, stride=2)),
            *(torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(64, classes)),
        )

    def training_step(self, batch: list[torch.Tensor], number: int) -> torch.Tensor:
        images, labels = batch
        return functional.cross_entropy(self.network(images), labels)

    def validation_step(self, batch: list[torch.Tensor], number: int) -> None:
        images, labels = batch
        right = (self.network(images).argmax(1) == labels).float().mean()
        self.log("accuracy", right, batch_size=len(labels), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path, help="folder of originals")
    parser.add_argument("valid", type=Path, help="folder of photographs of the same classes")
    parser.add_argument("edits", type=Path, help="edit store of the originals")
    parser.add_argument("fractals", type=Path, help="fractal bank")
    parser.add_argument("--batch-size", type=int, default=64, help="per device")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("checkpoints"))
    parser.add_argument("--resume", type=Path, help="a checkpoint")
    options = parser.parse_args()

    mixed = DiffuseMixDataset(
        options.train,
        edits=options.edits,
        fractals=options.fractals,
        mix=MixSpec.paper(),
        crop=TrainCrop(options.size),
    )
    plain = DiffuseMixDataset(options.valid, crop=EvalCrop(options.size))
    train = DiffuseMixLoader(mixed, options.batch_size, shuffle=True, num_workers=4, device=options.device)
    valid = DiffuseMixLoader(plain, options.batch_size, num_workers=4, device=options.device)

    trainer = lightning.Trainer(
        accelerator=options.device,
        devices=options.devices,
        max_epochs=options.epochs,
        callbacks=[ModelCheckpoint(options.out, every_n_train_steps=10, save_last=True)],
        logger=False,
    )
    trainer.fit(Classifier(len(mixed.classes)), train, valid, ckpt_path=options.resume)
    print(f"accuracy {float(trainer.callback_metrics['accuracy']):.3f}")


if __name__ == "__main__":
    main()
