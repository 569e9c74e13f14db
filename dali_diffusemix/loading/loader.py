"""The loader: DataLoader's protocol. `batches` makes the tensors, `cursor` knows the position in the epoch."""

import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import torch
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

from dali_diffusemix.errors import ConfigError
from dali_diffusemix.loading import auto
from dali_diffusemix.loading.batches import Batch, Batches, BatchMaker, BatchTransform, Clock, Delivery, LoaderStats
from dali_diffusemix.loading.cursor import Cursor, Identity
from dali_diffusemix.loading.dataset import DiffuseMixDataset
from dali_diffusemix.loading.quarantine import Quarantine
from dali_diffusemix.loading.samplers import Order, OrderBatchSampler, OrderSampler, OwnOrder, Ranks, SamplerOrder
from dali_diffusemix.plan.batch import BatchPlan

# DataLoader's arguments that have no effect here: the neutral value, and what to do instead.
_NO_EFFECT: Final[dict[str, tuple[object, str]]] = {
    "collate_fn": (None, "batches are made whole; change them with batch_transform=, or in the training loop"),
    "pin_memory": (False, "batches are on the loader's device already"),
    "pin_memory_device": ("", "batches are on the device already"),
    "timeout": (0, "there are no worker processes to wait for"),
    "worker_init_fn": (None, "there are no worker processes; all randomness comes from the dataset's seed"),
    "multiprocessing_context": (None, "there are no worker processes"),
    "persistent_workers": (False, "threads are always kept; close() ends them"),
    "in_order": (True, "batches always come in order"),
    "snapshot_every_n_steps": (1, "state_dict() is made when it is called, and costs nothing before"),
}
# The order, the batches and the threads follow from these.
_FIXED: Final = (
    *("dataset", "batch_size", "shuffle", "drop_last", "generator", "memory_format", "dtype", "num_workers"),
    *("decode", "prefetch_factor", "return_index", "visible_parts"),
)


class DiffuseMixLoader:
    """Iterates over batches of a `DiffuseMixDataset`: (images, labels) as PyTorch tensors on the device.

    The first `iter()` is epoch 0, each later one the next, unless `set_epoch` was called since. Iterators are
    independent of each other. The same (seed, epoch, index) gives the same sample as under
    `torch.utils.data.DataLoader`, whatever the batch size, the number of threads and of ranks.

    Args:
        dataset: The dataset. It decides every sample; the loader only decides how samples are delivered.
        batch_size: Samples per batch, on each rank.
        shuffle: Deliver each epoch in an order of its own, drawn from the dataset's seed; with `generator`, in the
            order that DataLoader would draw from it.
        sampler: The indices to load, in order; of this rank only, as with DataLoader. It is not told the epoch.
        batch_sampler: The same as lists of indices, one per batch.
        num_workers: Threads that decode and mix; there are no worker processes. 0 is one thread.
        device: Where samples are mixed and delivered: "cuda" (the current GPU at the first `iter`), "cuda:N" or "cpu".
            On a GPU, batches are ordered on torch's current stream, and the host does not wait.
        decode: Where images are decoded if the device is a GPU. "cpu": pixels are those of device="cpu", and the
            visible parts are copied to the GPU once per batch. "gpu" or a `GpuDecoding`: by DALI's mixed decoders,
            whose pixels differ slightly. "auto": on the GPU if that works on this machine and is at least 10 % faster;
            the first `iter` ever on a machine measures it, which takes up to a few minutes, and the result is kept in
            the user's cache folder.
        dtype: float32, float16, bfloat16 or uint8 (which needs a dataset with normalize=None).
        memory_format: torch.contiguous_format or torch.channels_last.
        drop_last: Drop the last batch if it is not full.
        generator: Draws the order when shuffling, instead of the dataset's seed.
        prefetch_factor: Batches that are decoded ahead; as many again are read ahead.
        rank: This process's share of each global batch of batch_size x world_size samples. None: that of
            torch.distributed if it is initialised, else 0. All ranks deliver the same number of batches.
        world_size: Number of processes that share a global batch; give both `rank` and `world_size`, or neither.
        batch_transform: A function of (images, labels, generator), called for each batch on the device; it returns the
            images and labels to deliver. The generator is seeded by (seed, epoch, step, rank). For transforms that draw
            from the global generators of torch, NumPy or Python, wrap it: `globally_seeded(transform)`.
        return_index: Deliver (images, labels, indices): (n,) int64 indices of the samples in the epoch, on the CPU.
        visible_parts: Decode only the parts of images that samples show. False decodes whole images, for comparison.

    Raises:
        ConfigError: an argument breaks a rule.
        MissingDependencyError: what the device needs is not installed; from `iter()`: there is no GPU; from `next()`:
            DALI is not installed.
        DecodeError: from `next()`: an image cannot be read or decoded, and the dataset has on_error="raise".
        IndexError: from `next()`: a sampler yields an index that the dataset does not have.
    """

    def __init__(
        self,
        dataset: DiffuseMixDataset,
        batch_size: int = 1,
        shuffle: bool | None = None,
        sampler: Iterable[int] | None = None,
        batch_sampler: Iterable[Sequence[int]] | None = None,
        num_workers: int = 0,
        *,
        device: str | torch.device = "cuda",
        decode: auto.Decode = "auto",
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
        prefetch_factor: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        batch_transform: BatchTransform | None = None,
        return_index: bool = False,
        visible_parts: bool = True,
        **others: object,
    ) -> None:
        _check_dataset(dataset)
        _check_others(others)
        prefetch_factor = 2 if prefetch_factor is None else prefetch_factor
        _check_number("batch_size", batch_size, 1)
        _check_number("num_workers", num_workers, 0)
        _check_number("prefetch_factor", prefetch_factor, 1)
        if batch_transform is not None and not callable(batch_transform):
            raise ConfigError(
                f"batch_transform must be a function of (images, labels, generator), found {batch_transform!r}."
            )
        if (rank is None) != (world_size is None):
            raise ConfigError(
                f"rank and world_size must be given together, found rank={rank} and world_size={world_size}."
            )
        if sampler is not None and shuffle:
            raise ConfigError("sampler decides the order: found shuffle=True beside it; leave one of them out.")
        if batch_sampler is not None and (batch_size != 1 or shuffle or sampler is not None or drop_last):
            raise ConfigError(
                "batch_sampler decides the batches: batch_size, shuffle, sampler and drop_last must be left out."
            )
        if rank is not None and (sampler is not None or batch_sampler is not None):
            raise ConfigError(
                "rank and world_size divide the loader's own order: found them beside a sampler, which yields one "
                "rank's indices (as DistributedSampler does); leave them or it out."
            )
        if shuffle and generator is not None and rank is not None:
            raise ConfigError("generator decides the order of one process: leave out rank and world_size, or it.")
        self.dataset = dataset
        self.batch_size: int | None = batch_size if batch_sampler is None else None
        self.shuffle = bool(shuffle)
        self.num_workers = num_workers
        self.decode = decode
        self.dtype = dtype
        self.memory_format = memory_format
        self.drop_last = drop_last
        self.generator = generator
        self.prefetch_factor = prefetch_factor
        self.return_index = return_index
        self.visible_parts = visible_parts
        self._ranks = Ranks(None if rank is None or world_size is None else (rank, world_size))
        delivery = Delivery(
            device=_device(device),
            decode=decode,
            dtype=dtype,
            memory_format=memory_format,
            threads=max(1, num_workers),
            prefetch_factor=prefetch_factor,
            return_index=return_index,
            visible_parts=visible_parts,
        )
        if shuffle and generator is not None:
            sampler = RandomSampler(dataset, generator=generator)
        self._order: OwnOrder | SamplerOrder
        if sampler is None and batch_sampler is None:
            self._order = OwnOrder(len(dataset), batch_size, self.shuffle, drop_last, dataset.seed, self._ranks)
            if rank is not None:
                _ = self._order.epochs  # refuses a rank outside the world size
        else:
            if batch_sampler is None:
                batch_sampler = BatchSampler(sampler, batch_size, drop_last)  # type: ignore[arg-type]
            sampler = getattr(batch_sampler, "sampler", None) if sampler is None else sampler
            self._order = SamplerOrder(batch_sampler, sampler, generator, len(dataset))
        identity = Identity(dataset.seed, len(dataset), self.shuffle, dataset.catalog.fingerprint)
        self._cursor = Cursor(self._order, identity, has_sampler=isinstance(self._order, SamplerOrder))
        self._maker = BatchMaker(dataset, delivery, self._ranks, batch_transform)
        self._clock: Clock | None = None  # of the newest iterator

    def __setattr__(self, name: str, value: object) -> None:
        if name in _FIXED and name in self.__dict__:
            raise ConfigError(f"{name} of a loader cannot be changed, found {value!r}; make another loader.")
        super().__setattr__(name, value)

    # --- DataLoader's protocol

    def __len__(self) -> int:
        """Batches in an epoch on this rank; the same on all ranks."""
        return len(self._order)

    def __iter__(self) -> "_Iterator":
        self._maker.prepare()
        batches = Batches(self._maker, self._order, self._cursor.begin(), self.batch_size)
        self._clock = batches.clock
        return _Iterator(batches, self._cursor, self._order)

    @property
    def device(self) -> torch.device:
        """The device of the batches; "cuda" without a number until the first `iter`."""
        return self._maker.device

    @property
    def rank(self) -> int:
        """This process's share of each global batch."""
        return self._ranks()[0]

    @property
    def world_size(self) -> int:
        """Number of processes that share each global batch."""
        return self._ranks()[1]

    @property
    def sampler(self) -> Iterable[int]:
        """The user's sampler, or the loader's own order of the next epoch on this rank; both have `len`."""
        if isinstance(self._order, SamplerOrder):
            # As DataLoader does where a batch sampler has none.
            return SequentialSampler(self.dataset) if self._order.sampler is None else self._order.sampler
        return OrderSampler(self._order, self._cursor)

    @property
    def batch_sampler(self) -> Iterable[Sequence[int]]:
        """The same in batches."""
        if isinstance(self._order, SamplerOrder):
            return self._order.batch_sampler
        return OrderBatchSampler(self._order, self._cursor)

    @property
    def batch_transform(self) -> BatchTransform | None:
        """The function that changes each batch."""
        return self._maker.batch_transform

    @batch_transform.setter
    def batch_transform(self, transform: BatchTransform | None) -> None:
        self._maker.batch_transform = transform

    @property
    def quarantine(self) -> Quarantine:
        """The images that could not be read or decoded, by path."""
        return self._maker.quarantine

    @quarantine.setter
    def quarantine(self, quarantine: Quarantine) -> None:
        self._maker.quarantine = quarantine

    # DataLoader's attributes that have no effect here.
    collate_fn = None
    pin_memory = False
    pin_memory_device = ""
    timeout = 0
    worker_init_fn = None
    multiprocessing_context = None
    persistent_workers = False
    in_order = True

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next `iter()`; later ones count on from there.

        After `load_state_dict`, setting the epoch of that state keeps the position inside it.
        """
        self._cursor.set_epoch(epoch)

    def plan(self, epoch: int, step: int) -> BatchPlan:
        """Return the plan of this rank's batch `step` of an epoch, before any substitution.

        Raises:
            ConfigError: the order is a sampler's, or there is no such step.
        """
        if isinstance(self._order, SamplerOrder):
            raise ConfigError("plan: the batches are a sampler's; give its indices to dataset.planner.batch instead.")
        order = self._order.epochs
        return self.dataset.planner.batch(epoch, order.indices(epoch, order.positions(step)))

    def stats(self) -> LoaderStats:
        """Return where the newest iterator's time has gone so far."""
        return LoaderStats() if self._clock is None else self._clock.stats()

    # --- resuming

    def state_dict(self) -> dict[str, Any]:
        """Return the newest iterator's position, for `load_state_dict`. Prefetched batches do not count.

        After the last batch it is the beginning of the next epoch. The state is plain data, of the same size at any
        position.
        """
        return self._cursor.state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next `iter()` resume where the state was taken, on any number of ranks with the same global batch.

        Raises:
            ConfigError: the state is of another dataset, seed or order, and the message says what differs; or the
                number of delivered samples is no multiple of the global batch.
        """
        self._cursor.load(state)

    # --- lifetime

    def close(self) -> None:
        """Release the decoders' threads and memory. The loader can be used again; iterators in progress go on."""
        self._maker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_clock": None}


class _Iterator(Iterator[Batch]):
    """One epoch. Several threads may share it; each batch goes to one of them."""

    def __init__(self, batches: Batches, cursor: Cursor, order: Order) -> None:
        self._lock = threading.RLock()  # a thread that an exception took out of it may enter again
        self._batches = batches
        self._cursor = cursor
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __reduce__(self) -> Any:
        raise TypeError("an iterator of a loader cannot be copied or pickled; save loader.state_dict() instead")

    def __next__(self) -> Batch:
        if self._batches.inherited:
            raise ConfigError(
                "this iterator was begun in the process that was forked, and its threads stayed there; call "
                "iter(loader) in the process that is to have the batches."
            )
        with self._lock:
            if not self._batches.run.running:
                raise StopIteration
            try:
                batch = self._batches.next()
            except BaseException:
                self.close()
                raise
            if self._batches.exhausted:
                self._cursor.finish(self._batches.run)
                self._batches.close()
            if batch is None:
                raise StopIteration
            return batch

    def close(self) -> None:
        """End the epoch here and release the decoder."""
        self._batches.close()

    def __del__(self) -> None:
        # At the interpreter's end DALI is gone already.
        if not sys.is_finalizing():
            self.close()


def _device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device must be 'cuda', 'cuda:N' or 'cpu', found {str(device)!r}.") from error


def _check_dataset(dataset: object) -> None:
    if not isinstance(dataset, DiffuseMixDataset):
        raise ConfigError(
            f"dataset must be a DiffuseMixDataset, found {type(dataset).__name__}. Instead of it write\n"
            '    dataset = DiffuseMixDataset("path/to/train", crop=TrainCrop(224), mix=None)\n'
            "    loader = DiffuseMixLoader(dataset, batch_size=...)\n"
            "or keep torch.utils.data.DataLoader for datasets of other kinds."
        )


def _check_number(name: str, value: object, least: int) -> None:
    if not isinstance(value, int | np.integer) or value >= 2**31:
        raise ConfigError(f"{name} must be a whole number, at least {least}, found {value!r}.")
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, found {value}.")


def _check_others(others: Mapping[str, object]) -> None:
    for name, value in others.items():
        if name not in _NO_EFFECT:
            raise TypeError(f"DiffuseMixLoader has no argument {name!r}")
        neutral, remedy = _NO_EFFECT[name]
        if value != neutral:
            raise ConfigError(f"{name} has no effect here, found {value!r}: {remedy}. Leave it out.")
