"""The loader under Hugging Face Accelerate.

    model, optimizer = accelerator.prepare(model, optimizer)
    train, valid = prepare(train, accelerator), prepare(valid, accelerator)

`Accelerator.prepare` would not change the loader, and then `accumulate` and `gather_for_metrics` would not know where
an epoch ends. The loader shards data and puts batches on the device itself, so only the end of an epoch is added.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderStateMixin

from dali_diffusemix.errors import ConfigError
from dali_diffusemix.loading.batches import Batch
from dali_diffusemix.loading.loader import DiffuseMixLoader
from dali_diffusemix.plan.order import EpochOrder

# Attributes that a second loader, which makes the last batch, takes from the first.
_DELIVERY: Final = (
    *("num_workers", "device", "decode", "dtype", "memory_format", "pin_memory"),
    *("prefetch_factor", "batch_transform", "return_index", "visible_parts"),
)


class AcceleratedLoader(DataLoaderStateMixin):  # type: ignore[misc]
    """A `DiffuseMixLoader` that tells Accelerate where an epoch ends; `prepare` makes it.

    Each iteration is an epoch, as with the loader. All processes deliver the same number of batches. If Accelerate
    evens batches, they also have the same size: repeated samples are at the end of what is gathered.
    """

    loader: DiffuseMixLoader

    def __init__(self, loader: DiffuseMixLoader, accelerator: Accelerator) -> None:
        self.loader = loader
        self.gradient_state = accelerator.gradient_state
        self._even = accelerator.even_batches

    @property
    def dataset(self) -> Any:
        return self.loader.dataset

    @property
    def batch_size(self) -> int | None:
        """Samples per batch, on each process."""
        return self.loader.batch_size

    @property
    def total_batch_size(self) -> int:
        """Samples per batch, over all processes; a batch of a batch sampler counts as 1."""
        return (self.batch_size or 1) * self.loader.world_size

    @property
    def total_dataset_length(self) -> int:
        return len(self.dataset)

    @property
    def sampler(self) -> Any:
        """Raises AttributeError, because `accelerate.skip_first_batches` would make a DataLoader from it."""
        raise AttributeError(
            "sampler is that of the loader; use prepared.loader.sampler, and to skip batches "
            "prepared.skip_first_batches(n) instead of accelerate.skip_first_batches."
        )

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        epoch = self.state_dict()["epoch"]
        self.begin()
        if "sampler" in self.state_dict():
            self.remainder = -1  # it is unknown which samples a sampler repeats
        try:
            for batch in batches:
                # After the last batch, the state is the beginning of the next epoch.
                self.end_of_dataloader = self.state_dict()["epoch"] != epoch
                yield self._evened(batch, epoch) if self.end_of_dataloader else batch
        finally:
            self.end()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.loader.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the loader. `Accelerator.save_state` saves it, because `prepare` registered it."""
        return self.loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state of the loader. `Accelerator.load_state` calls this."""
        self.loader.load_state_dict(state)

    def skip_first_batches(self, count: int) -> "AcceleratedLoader":
        """Start the next iteration after so many batches, without making them; returns this loader.

        Only scripts that count batches themselves need it: `Accelerator.load_state` leaves nothing to skip.

        Raises:
            ConfigError: An epoch has fewer batches, or a batch sampler decides their sizes.
        """
        if not 0 <= count < len(self):
            raise ConfigError(f"count must lie in [0, {len(self)}), the batches of an epoch, found {count}.")
        if self.batch_size is None:
            raise ConfigError(
                "skip_first_batches must not have a batch sampler, found one; let the sampler start later."
            )
        state = self.state_dict()
        share = self.batch_size if "sampler" in state else self.total_batch_size
        self.load_state_dict({**state, "places": count * share, "checksum": None})
        return self

    @property
    def _drop_last(self) -> bool:
        return self.loader.drop_last

    def _evened(self, batch: Batch, epoch: int) -> Batch:
        """Return the last batch of the epoch, with the same size on all processes.

        The loader divides the R samples left among W processes so that none is repeated: ⌊R/W⌋ or ⌈R/W⌉ each. Here each
        process takes ⌈R/W⌉, in order; those missing at the end come from the beginning of the epoch.
        """
        loader, count, left = self.loader, self.loader.world_size, self.remainder
        if not self._even or left <= count or left % count == 0:
            return batch
        length, size = len(self.dataset), -(-left // count)
        positions = (length - left + np.arange(size) + size * loader.rank) % length
        order = EpochOrder(length=length, batch_size=1, shuffle=loader.shuffle, seed=self.dataset.seed)
        last = DiffuseMixLoader(
            self.dataset,
            # Empty batches are skipped but counted, because a batch transform draws by the step.
            batch_sampler=[*([[]] * (len(self) - 1)), order.indices(epoch, positions).tolist()],
            **{name: getattr(loader, name) for name in _DELIVERY},
        )
        last.quarantine = loader.quarantine
        last.set_epoch(epoch)
        with last:
            return next(iter(last))


def prepare(loader: DiffuseMixLoader, accelerator: Accelerator) -> AcceleratedLoader:
    """Register a loader with an accelerator, as `Accelerator.prepare` does for DataLoaders.

    `accumulate` and `gather_for_metrics` then know the last batch of an epoch, and `save_state` and `load_state` the
    position in it. With a user's sampler, `gather_for_metrics` drops nothing, because it is unknown what repeats.

    Raises:
        ConfigError: The loader delivers on another device than the accelerator's, or the accelerator splits batches or
            dispatches them from the main process.
    """
    check(loader, accelerator)
    prepared = AcceleratedLoader(loader, accelerator)
    accelerator.register_for_checkpointing(prepared)
    return prepared


def check(loader: DiffuseMixLoader, accelerator: Accelerator) -> None:
    """Raise ConfigError if the loader and the accelerator do not agree on who makes batches, and on which device."""
    for name in ("split_batches", "dispatch_batches"):
        if getattr(accelerator, name):
            raise ConfigError(
                f"{name} of the accelerator must be False, found True; each process makes its own batches."
            )
    here, there = loader.device, accelerator.device
    if here.type != there.type or (here.index is not None and here.index != there.index):
        raise ConfigError(
            f"device of the loader must be the accelerator's, {str(there)!r}, found {str(here)!r}; give "
            f"DiffuseMixLoader(device={there.type!r})."
        )
