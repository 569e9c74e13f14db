"""The loader in timm's training script, instead of the loaders that the script makes.

    loader_train = prepare(DiffuseMixLoader(dataset_train, ..., drop_last=True), mixup_fn)
    loader_eval = prepare(DiffuseMixLoader(dataset_eval, ...))

replaces `create_loader(...)`. Leave the script's prefetcher on: batches are normalised and on the device.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dali_diffusemix.errors import ConfigError
from dali_diffusemix.loading.batches import Batch
from dali_diffusemix.loading.loader import DiffuseMixLoader
from dali_diffusemix.loading.seeding import globally_seeded


class Mixup(Protocol):
    """The part of `timm.data.Mixup` that is used here."""

    mixup_enabled: bool

    def __call__(self, x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...


class TimmLoader:
    """A `DiffuseMixLoader` with the interface of timm's prefetching loader; `prepare` makes it."""

    loader: DiffuseMixLoader

    def __init__(self, loader: DiffuseMixLoader, mixup_fn: Mixup | None) -> None:
        self.loader = loader
        self._mixup = mixup_fn
        self._epoch = self._of_dataset()

    @property
    def dataset(self) -> Any:
        return self.loader.dataset

    @property
    def batch_size(self) -> int | None:
        return self.loader.batch_size

    @property
    def sampler(self) -> Any:
        return self.loader.sampler

    @property
    def mixup_enabled(self) -> bool:
        """True while Mixup or CutMix is on. The script turns them off for the last epochs; labels stay soft."""
        return self._mixup is not None and self._mixup.mixup_enabled

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        if self._mixup is not None:
            self._mixup.mixup_enabled = enabled

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        """Return the iterator of the epoch that the script has set on the dataset."""
        epoch = self._of_dataset()
        if epoch is not None and epoch != self._epoch:
            self.loader.set_epoch(epoch)
        batches = iter(self.loader)
        self._epoch = self._of_dataset()
        return batches

    def _of_dataset(self) -> int | None:
        """The epoch of the dataset, which the loader sets too; a Subset of torch has none."""
        return getattr(self.dataset, "epoch", None)


def prepare(loader: DiffuseMixLoader, mixup_fn: Mixup | None = None) -> TimmLoader:
    """Wrap a loader for timm's training script.

    Args:
        loader: The loader to wrap.
        mixup_fn: The script's `timm.data.Mixup`. It becomes the loader's batch transform, so its draws depend only on
            (seed, epoch, step, rank). It needs batches of even size: give the loader drop_last=True.

    Raises:
        ConfigError: The loader has another batch transform.
    """
    if mixup_fn is not None:
        if loader.batch_transform is not None:
            raise ConfigError(
                "mixup_fn must be the only batch transform, found another in the loader; leave one of them out."
            )
        loader.batch_transform = globally_seeded(_Mixing(mixup_fn))
    return TimmLoader(loader, mixup_fn)


@dataclass
class _Mixing:
    mixup_fn: Mixup

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.mixup_fn(images, labels)
