"""The loader under Hugging Face Accelerate.

    model, optimizer = accelerator.prepare(model, optimizer)
    train, valid = prepare(train, accelerator), prepare(valid, accelerator)

`Accelerator.prepare` would leave the loader as it is, and then `accumulate` and `gather_for_metrics` would not know
where an epoch ends. It shards and places batches on the device by itself, so nothing is wrapped around but that.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderStateMixin

from dali_diffusemix.errors import ConfigError
from dali_diffusemix.loading.batches import Batch
from dali_diffusemix.loading.dataset import DiffuseMixDataset
from dali_diffusemix.loading.loader import DiffuseMixLoader
from dali_diffusemix.plan.order import EpochOrder

# What a second loader that makes the last batch needs of the first.
_DELIVERY: Final = (
    *("num_workers", "device", "dtype", "memory_format"),
    *("prefetch_factor", "batch_transform", "return_index", "visible_parts"),
)


class AcceleratedLoader(DataLoaderStateMixin):  # type: ignore[misc]
    """A `DiffuseMixLoader` that tells Accelerate where it is. Made by `prepare`.

    Each iteration is an epoch, as with the loader. All processes deliver equally many batches, and where Accelerate
    evens batches out they are equally large too: the samples that repeat stand at the end of what is gathered.
    """

    loader: DiffuseMixLoader

    def __init__(self, loader: DiffuseMixLoader, accelerator: Accelerator) -> None:
        self.loader = loader
        self.gradient_state = accelerator.gradient_state
        self._even = accelerator.even_batches

    @property
    def dataset(self) -> DiffuseMixDataset:
        return self.loader.dataset

    @property
    def batch_size(self) -> int | None:
        """Samples per batch, on each process."""
        return self.loader.batch_size

    @property
    def total_batch_size(self) -> int:
        """Samples per batch, on all processes together; a sampler's batches count as 1."""
        return (self.batch_size or 1) * self.loader.world_size

    @property
    def total_dataset_length(self) -> int:
        return len(self.dataset)

    @property
    def sampler(self) -> Any:
        """Not there: `accelerate.skip_first_batches` would make a DataLoader of it."""
        raise AttributeError(
            "sampler is the loader's: use prepared.loader.sampler; to skip batches, in the place of "
            "accelerate.skip_first_batches, prepared.skip_first_batches(n)"
        )

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        epoch = self.state_dict()["epoch"]
        self.begin()
        if "sampler" in self.state_dict():
            self.remainder = -1  # nobody knows what a sampler repeats
        try:
            for batch in batches:
                # After the last batch the state is the next epoch's beginning.
                self.end_of_dataloader = self.state_dict()["epoch"] != epoch
                yield self._evened(batch, epoch) if self.end_of_dataloader else batch
        finally:
            self.end()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.loader.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The loader's. `prepare` registered it: `Accelerator.save_state` saves it."""
        return self.loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The loader's. `Accelerator.load_state` calls it."""
        self.loader.load_state_dict(state)

    def skip_first_batches(self, count: int) -> "AcceleratedLoader":
        """Let the next iteration begin after so many batches, none of which is made, and return this loader.

        It is only for scripts that count batches themselves: `Accelerator.load_state` leaves nothing to skip.

        Raises:
            ConfigError: there are not so many; or a batch sampler decides how large they are.
        """
        if not 0 <= count < len(self):
            raise ConfigError(f"count must lie in [0, {len(self)}), the batches of an epoch, found {count}")
        if self.batch_size is None:
            raise ConfigError("skip_first_batches: a batch sampler decides the batches; let it begin later")
        state = self.state_dict()
        share = self.batch_size if "sampler" in state else self.total_batch_size
        self.load_state_dict({**state, "places": count * share})
        return self

    @property
    def _drop_last(self) -> bool:
        return self.loader.drop_last

    def _evened(self, batch: Batch, epoch: int) -> Batch:
        """The epoch's last batch, equally large on all processes.

        The loader cuts the R samples left among W processes so that none is repeated: ⌊R/W⌋ or ⌈R/W⌉ each. Here each
        takes ⌈R/W⌉, in order, and what is missing at the end comes from the epoch's beginning.
        """
        loader, count, left = self.loader, self.loader.world_size, self.remainder
        if not self._even or left <= count or left % count == 0:
            return batch
        length, size = len(self.dataset), -(-left // count)
        places = (length - left + np.arange(size) + size * loader.rank) % length
        order = EpochOrder(length=length, batch_size=1, shuffle=loader.shuffle, seed=self.dataset.seed)
        last = DiffuseMixLoader(
            self.dataset,
            # Empty batches are passed over but counted: a batch transform draws by the step.
            batch_sampler=[*([[]] * (len(self) - 1)), order.indices(epoch, places).tolist()],
            **{name: getattr(loader, name) for name in _DELIVERY},
        )
        last.quarantine = loader.quarantine
        last.set_epoch(epoch)
        with last:
            return next(iter(last))


def prepare(loader: DiffuseMixLoader, accelerator: Accelerator) -> AcceleratedLoader:
    """Make a loader known to an accelerator: what `Accelerator.prepare` does for DataLoaders.

    `accumulate` and `gather_for_metrics` then know the epoch's last batch, and `save_state` and `load_state` the place
    in it. With a sampler of one's own `gather_for_metrics` drops nothing, because nobody knows what it repeats.

    Raises:
        ConfigError: the loader delivers on another device than the accelerator's, or the accelerator is set to cut
            batches or to send them from the main process.
    """
    for name in ("split_batches", "dispatch_batches"):
        if getattr(accelerator, name):
            raise ConfigError(
                f"{name} of the accelerator must be unset: every process makes its own batches, of batch_size samples"
            )
    here, there = loader.device, accelerator.device
    if here.type != there.type or (here.index is not None and here.index != there.index):
        raise ConfigError(
            f"device of the loader must be the accelerator's, {str(there)!r}, found {str(here)!r}; give "
            f"DiffuseMixLoader(device={there.type!r})"
        )
    prepared = AcceleratedLoader(loader, accelerator)
    accelerator.register_for_checkpointing(prepared)
    return prepared
