"""What the tests of this folder load, and how they compare it."""

import hashlib
from pathlib import Path

import torch

from dali_diffusemix import DiffuseMixDataset, MixSpec, TrainCrop

SIZE = 24


def training_set(data: Path) -> DiffuseMixDataset:
    return DiffuseMixDataset(
        data / "photos",
        crop=TrainCrop(SIZE),
        mix=MixSpec.paper(),
        edits=data / "edits",
        fractals=data / "fractals.npy",
        seed=3,
    )


def described(images: torch.Tensor, indices: torch.Tensor) -> tuple[list[int], str]:
    """A batch's indices and what stands for its pixels."""
    return indices.tolist(), hashlib.sha256(images.numpy().tobytes()).hexdigest()
