"""The loader in the place of those that timm's training script makes.

    loader_train = prepare(DiffuseMixLoader(dataset_train, ..., drop_last=True), mixup_fn)
    loader_eval = prepare(DiffuseMixLoader(dataset_eval, ...))

for `create_loader(...)`, with the script's prefetcher left on: batches come normalised and on the device.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dali_diffusemix.errors import ConfigError
from dali_diffusemix.loading.batches import Batch
from dali_diffusemix.loading.dataset import DiffuseMixDataset
from dali_diffusemix.loading.loader import DiffuseMixLoader
from dali_diffusemix.loading.seeding import globally_seeded


class Mixup(Protocol):
    """What is needed of `timm.data.Mixup`."""

    mixup_enabled: bool

    def __call__(self, x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...


class TimmLoader:
    """A `DiffuseMixLoader` with what timm's script asks of a prefetching loader. Made by `prepare`."""

    loader: DiffuseMixLoader

    def __init__(self, loader: DiffuseMixLoader, mixup_fn: Mixup | None) -> None:
        self.loader = loader
        self._mixup = mixup_fn
        self._epoch = loader.dataset.epoch

    @property
    def dataset(self) -> DiffuseMixDataset:
        return self.loader.dataset

    @property
    def batch_size(self) -> int | None:
        return self.loader.batch_size

    @property
    def sampler(self) -> Any:
        return self.loader.sampler

    @property
    def mixup_enabled(self) -> bool:
        """Whether Mixup or CutMix are on. The script turns them off for the last epochs; labels stay soft."""
        return self._mixup is not None and self._mixup.mixup_enabled

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        if self._mixup is not None:
            self._mixup.mixup_enabled = enabled

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        """The script tells the dataset the epoch, if that can be told, and not the sampler."""
        epoch = self.dataset.epoch
        if epoch != self._epoch:
            self._epoch = epoch
            self.loader.set_epoch(epoch)
        return iter(self.loader)


def prepare(loader: DiffuseMixLoader, mixup_fn: Mixup | None = None) -> TimmLoader:
    """Wrap a loader for timm's training script.

    Args:
        loader: What to wrap.
        mixup_fn: The script's `timm.data.Mixup`. It becomes the loader's batch transform, so what it draws depends on
            (seed, epoch, step, rank) alone. It wants batches of even size: give the loader drop_last=True.

    Raises:
        ConfigError: the loader has another batch transform.
    """
    if mixup_fn is not None:
        if loader.batch_transform is not None:
            raise ConfigError("mixup_fn becomes batch_transform, and the loader has one already: leave one of them out")
        loader.batch_transform = globally_seeded(_Mixing(mixup_fn))
    return TimmLoader(loader, mixup_fn)


@dataclass
class _Mixing:
    mixup_fn: Mixup

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.mixup_fn(images, labels)
