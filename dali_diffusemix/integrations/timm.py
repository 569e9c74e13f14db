"""The loader in timm's training script, instead of the loaders that the script makes.

    loader_train = prepare(DiffuseMixLoader(dataset_train, ..., drop_last=True), mixup_fn)
    loader_eval = prepare(DiffuseMixLoader(dataset_eval, ...))

replaces `create_loader(...)`; `mixup_fn` is the script's `collate_fn`, a FastCollateMixup, or a Mixup. Leave the
script's prefetcher on: batches are normalised and on the device.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dali_diffusemix.errors import ConfigError
from dali_diffusemix.loading.batches import Batch
from dali_diffusemix.loading.loader import DiffuseMixLoader
from dali_diffusemix.loading.seeding import globally_seeded


class Mixup(Protocol):
    """The part of `timm.data.Mixup` that is used here; its subclass FastCollateMixup has it too."""

    mixup_enabled: bool

    # Of images and targets; FastCollateMixup takes a list of samples.
    def __call__(self, one: Any, other: Any, /) -> Any: ...


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
    def batch_sampler(self) -> Any:
        """That of the loader. Versions after 1.0.28 look for `set_epoch` here first, and then in `sampler`."""
        return self.loader.batch_sampler

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
        mixup_fn: The script's `timm.data.Mixup` or `FastCollateMixup`. It becomes the loader's batch transform, so its
            draws depend only on (seed, epoch, step, rank). A FastCollateMixup mixes as the Mixup of the same
            arguments: normalised batches, without rounding to whole pixel values. Both need batches of even size: give
            the loader drop_last=True.

    Raises:
        ConfigError: The loader has another batch transform or batches of odd size, or `mixup_fn` is a collate function
            of another kind or mode.
    """
    if mixup_fn is not None:
        if loader.batch_transform is not None:
            raise ConfigError(
                "mixup_fn must be the only batch transform, found another in the loader; leave one of them out."
            )
        size, rest = loader.batch_size or 0, 0 if loader.drop_last else len(loader.dataset)
        if size % 2 or rest % 2:
            raise ConfigError(
                f"mixup_fn must get batches of even size, found batch_size={size} and {len(loader.dataset)} samples "
                f"with drop_last={loader.drop_last}; give the loader an even batch_size and drop_last=True."
            )
        loader.batch_transform = globally_seeded(_Mixing(_of_batches(mixup_fn)))
    return TimmLoader(loader, mixup_fn)


@dataclass
class _Mixing:
    mix: Callable[..., tuple[torch.Tensor, torch.Tensor]]

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.mix(images, labels)


def _of_batches(mixup_fn: Mixup) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The function of (images, target) that mixes a batch: for a FastCollateMixup that of Mixup, its base class.

    Raises:
        ConfigError: It is no Mixup, or in the mode "half", which Mixup lacks.
    """
    if not hasattr(mixup_fn, "mixup_enabled"):
        raise ConfigError(
            f"mixup_fn must be a timm.data.Mixup or FastCollateMixup, found {type(mixup_fn).__name__}; batches are "
            "made whole, so leave other collate functions out."
        )
    for one in type(mixup_fn).__mro__:
        if one.__name__ == "FastCollateMixup":
            if "half" in getattr(mixup_fn, "mode", ""):
                raise ConfigError(
                    "mode of mixup_fn must be 'batch', 'pair' or 'elem', found 'half'; it would deliver half of each "
                    "batch: give the loader half the batch_size."
                )
            base: Any = super(one, mixup_fn)
            found: Callable[..., tuple[torch.Tensor, torch.Tensor]] = base.__call__
            return found
    return mixup_fn.__call__
