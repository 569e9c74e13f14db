"""Global random generators, seeded for batch transforms that take no generator of their own."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from dali_diffusemix.loading.batches import BatchTransform
from dali_diffusemix.loading.description import name_of


def globally_seeded(transform: BatchTransform) -> BatchTransform:
    """Wrap a batch transform that draws from the global generators of torch, NumPy or Python.

    They are seeded for each call from the transform's generator, thus by (seed, epoch, step, rank), and restored
    afterwards. Use it for torchvision's and kornia's transforms and timm's Mixup, which take no generator.
    """
    return _GloballySeeded(transform)


class _GloballySeeded:
    def __init__(self, transform: BatchTransform) -> None:
        self._transform = transform

    def __repr__(self) -> str:
        return f"globally_seeded({name_of(self._transform)})"

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with _seeded(generator.initial_seed(), images.device):
            return self._transform(images, labels, generator)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global random number generators, and restore them afterwards."""
    devices = [device] if device.type == "cuda" else []
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices, device_type="cuda"):
        torch.default_generator.manual_seed(seed)
        for there in devices:
            with torch.cuda.device(there):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
