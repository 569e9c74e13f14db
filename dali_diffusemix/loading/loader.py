"""The loader: DataLoader's protocol. `batches` makes the tensors, `cursor` knows the position in the epoch."""

import importlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

import numpy as np
import torch
from torch.utils.data import BatchSampler, ConcatDataset, RandomSampler, SequentialSampler, Subset

from dali_diffusemix.errors import ConfigError
from dali_diffusemix.loading import arguments, auto
from dali_diffusemix.loading.accumulation import Ending
from dali_diffusemix.loading.batches import (
    Batch,
    Batches,
    BatchMaker,
    BatchTransform,
    Clock,
    Delivery,
    LoaderStats,
    Newest,
)
from dali_diffusemix.loading.cursor import Cursor, Identity
from dali_diffusemix.loading.dataset import DiffuseMixDataset
from dali_diffusemix.loading.description import counted, in_a_line, name_of, table
from dali_diffusemix.loading.parts import Parts
from dali_diffusemix.loading.quarantine import Quarantine
from dali_diffusemix.loading.ranks import Ranks, initialised, seeds_of_rank_0
from dali_diffusemix.loading.resident import Resident
from dali_diffusemix.loading.resident import check as check_resident
from dali_diffusemix.loading.samplers import Order, OrderBatchSampler, OrderSampler, OwnOrder, SamplerOrder
from dali_diffusemix.loading.settled import Settled
from dali_diffusemix.plan.batch import BatchPlan

_log = logging.getLogger(__name__)
AnyDataset: TypeAlias = DiffuseMixDataset | Subset[Any] | ConcatDataset[Any]

# The order, the batches and the threads follow from these.
_FIXED: Final = (
    *("dataset", "batch_size", "shuffle", "drop_last", "generator", "memory_format", "dtype", "num_workers"),
    *("decode", "prefetch_factor", "return_index", "visible_parts", "pin_memory", "timeout", "resident"),
)


class DiffuseMixLoader(Settled):
    """Iterates over batches of a `DiffuseMixDataset`: (images, labels) as PyTorch tensors on the device.

    The first `iter()` is epoch 0, each later one the next, unless `set_epoch` was called since. Iterators are
    independent of each other. The same (seed, epoch, index) gives the same sample as under
    `torch.utils.data.DataLoader`, whatever the batch size, the number of threads and of ranks.

    More than ten arguments besides DataLoader's own, because each is a way of delivery that people choose by itself.

    Args:
        dataset: The dataset, or a Subset or ConcatDataset of such. It decides every sample; the loader only decides how
            samples are delivered.
        batch_size: Samples per batch, on each rank.
        shuffle: Deliver each epoch in an order of its own, drawn from the dataset's seed; with `generator`, in the
            order that DataLoader would draw from it.
        sampler: The indices to load, in order; of this rank only, as with DataLoader. It is not told the epoch. An
            index that it repeats within an epoch has other random numbers each time.
        batch_sampler: The same as lists of indices, one per batch.
        num_workers: Threads that decode and mix; there are no worker processes. 0 is one thread.
        collate_fn: None or torch's default_collate: batches are made whole.
        pin_memory: With device="cpu", deliver in page-locked memory, from which `.to("cuda", non_blocking=True)` does
            not wait. It is torch's, which uses it again once a batch is copied and nobody holds it.
        drop_last: Drop the last batch if it is not full.
        timeout: Seconds that `next()` waits for a batch to be read; 0 is as long as it takes.
        worker_init_fn: Accepted with a warning, and not called.
        generator: Draws the order when shuffling, instead of the dataset's seed.
        prefetch_factor: Batches that are decoded ahead; as many again are read ahead. None is 2.
        multiprocessing_context, persistent_workers, pin_memory_device, in_order, snapshot_every_n_steps: Accepted.
            There are no worker processes, threads are always kept, batches always come in order, and a state is made
            when it is asked for.
        device: Where samples are mixed and delivered: "cuda" (the current GPU at the first `iter`), "cuda:N" or "cpu".
            On a GPU, batches are ordered on torch's current stream, and the host does not wait. None is the GPU where
            everything for it works, else the CPU.
        decode: Where images are decoded if the device is a GPU. "cpu": pixels are those of device="cpu", and the
            visible parts are copied to the GPU once per batch. "gpu" or a `GpuDecoding`: by DALI's mixed decoders,
            whose pixels differ slightly. "auto": on the GPU if that works on this machine and is at least 10 % faster;
            the first `iter` ever on a machine measures it, which takes up to a few minutes, and the result is kept in
            the user's cache folder.
        dtype: float32, float16, bfloat16 or uint8 (which needs a dataset with normalize=None).
        memory_format: torch.contiguous_format or torch.channels_last.
        rank: This process's share of each global batch of batch_size x world_size samples. None: that of
            torch.distributed if it is initialised, else 0. All ranks deliver the same number of batches.
        world_size: Number of processes that share a global batch; give both `rank` and `world_size`, or neither.
        batch_transform: A function of (images, labels, generator), called for each batch on the device; it returns the
            images and labels to deliver. The generator is seeded by (seed, epoch, step, rank). For transforms that draw
            from the global generators of torch, NumPy or Python, wrap it: `globally_seeded(transform)`.
        return_index: Deliver (images, labels, indices): (n,) int64 indices of the samples in the epoch, on the CPU.
        visible_parts: Decode only the parts of images that samples show. False decodes whole images, for comparison.
        resident: Where raw images (`pack --format raw`) stay in memory, from the first `iter` on. "host": once for all
            processes of the machine. "device": once in the GPU's memory; then a batch takes neither reading nor copying
            of images, no thread and no DALI. None: they are read when they are shown.

    Raises:
        ConfigError: an argument breaks a rule, or the ranks were given different seeds.
        MissingDependencyError: what the device needs is not installed; from `iter()`: there is no GPU; from `next()`:
            DALI is not installed.
        DecodeError: from `next()`: an image cannot be read or decoded, and the dataset has on_error="raise".
        LoaderTimeoutError: from `next()`: a batch was not read within `timeout`.
        IndexError: from `next()`: a sampler yields an index that the dataset does not have.
    """

    def __init__(
        self,
        dataset: AnyDataset,
        batch_size: int = 1,
        shuffle: bool | None = None,
        sampler: Iterable[int] | None = None,
        batch_sampler: Iterable[Sequence[int]] | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: object = None,
        generator: torch.Generator | None = None,
        *,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory_device: str = "",
        in_order: bool = True,
        snapshot_every_n_steps: int = 1,
        device: str | torch.device | None = None,
        decode: auto.Decode = "auto",
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
        rank: int | None = None,
        world_size: int | None = None,
        batch_transform: BatchTransform | None = None,
        return_index: bool = False,
        visible_parts: bool = True,
        resident: Resident | None = None,
    ) -> None:
        self._parts = Parts(dataset)
        arguments.check_batch_size(batch_size)
        arguments.check_number("num_workers", num_workers, 0)
        arguments.check_number("prefetch_factor", 2 if prefetch_factor is None else prefetch_factor, 1)
        arguments.check_collate(collate_fn)
        arguments.check_timeout(timeout)
        arguments.check_worker_init(worker_init_fn)
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
        self.dataset: Any = dataset
        self.batch_size: int | None = batch_size if batch_sampler is None else None
        self.shuffle = bool(shuffle)
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.drop_last = drop_last
        self.timeout = timeout
        self.worker_init_fn = worker_init_fn
        self.multiprocessing_context = multiprocessing_context
        self.generator = generator
        # As DataLoader reports it.
        self.prefetch_factor = 2 if prefetch_factor is None and num_workers else prefetch_factor
        self.persistent_workers = persistent_workers
        self.pin_memory_device = pin_memory_device
        self.in_order = in_order
        self.decode = decode
        self.dtype = dtype
        self.memory_format = memory_format
        self.return_index = return_index
        self.visible_parts = visible_parts
        self.resident = resident
        self._ranks = Ranks(None if rank is None or world_size is None else (rank, world_size))
        if shuffle and generator is not None:
            sampler = RandomSampler(dataset, generator=generator)
        self._seeds_of_rank_0: list[int] | None = None  # None: not asked for yet
        self._said = False
        delivery = Delivery(
            device=arguments.chosen_device(device),
            decode=decode,
            dtype=dtype,
            memory_format=memory_format,
            threads=max(1, num_workers),
            prefetch_factor=self.prefetch_factor or 2,
            return_index=return_index,
            visible_parts=visible_parts,
            pin_memory=pin_memory,
            timeout=timeout,
            resident=resident,
        )
        check_resident(resident, delivery.device, self._parts.datasets)
        length = len(dataset)
        self._order: OwnOrder | SamplerOrder
        if sampler is None and batch_sampler is None:
            seed = self._parts.first.seed
            self._order = OwnOrder(length, batch_size, self.shuffle, drop_last, seed, self._ranks)
            if rank is not None:
                _ = self._order.epochs  # refuses a rank outside the world size
            if drop_last and 0 < length < batch_size:
                warnings.warn(
                    f"this loader has no batches: drop_last drops the only one, of {length} samples, since batch_size "
                    f"is {batch_size}. Give a smaller batch_size, or leave drop_last out.",
                    stacklevel=2,
                )
        else:
            if batch_sampler is None:
                batch_sampler = BatchSampler(sampler, batch_size, drop_last)  # type: ignore[arg-type]
            sampler = getattr(batch_sampler, "sampler", None) if sampler is None else sampler
            self._order = SamplerOrder(batch_sampler, sampler, generator, length, self._ranks)
        has_sampler = isinstance(self._order, SamplerOrder)
        self._cursor = Cursor(self._order, self._identity(), has_sampler=has_sampler, announce=self._parts.set_epoch)
        self._agree()
        self._maker = BatchMaker(self._parts, delivery, self._ranks, batch_transform)
        self._clock: Clock | None = None  # of the newest iterator, as the next one
        self._newest: Newest | None = None

    def __setattr__(self, name: str, value: object) -> None:
        if name in _FIXED and name in self.__dict__:
            raise ConfigError(f"{name} of a loader cannot be changed, found {value!r}; make another loader.")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in _FIXED:
            raise ConfigError(f"{name} of a loader cannot be changed or deleted; make another loader.")
        super().__delattr__(name)

    # --- DataLoader's protocol

    def __len__(self) -> int:
        """Batches in an epoch on this rank; the same on all ranks."""
        return len(self._order)

    def __iter__(self) -> "_Iterator":
        self._agree()
        self._say_share()
        self._maker.prepare()
        batches = Batches(self._maker, self._order, self._cursor.begin(), self.batch_size)
        self._clock, self._newest = batches.clock, batches.newest
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
        return OrderSampler(self._cursor)

    @property
    def batch_sampler(self) -> Iterable[Sequence[int]]:
        """The same in batches."""
        if isinstance(self._order, SamplerOrder):
            return self._order.batch_sampler
        return OrderBatchSampler(self._cursor)

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

    @property
    def collate_fn(self) -> Callable[[list[Any]], Any]:
        """default_collate; a function that raises where a DataLoader with it would or might deliver something else.

        With several ranks it raises too: who makes such a DataLoader may divide what the sampler has divided already.
        """
        plain = self.batch_transform is None and self.dtype is torch.float32 and not self.return_index
        return arguments.collate_of(plain=plain and self.world_size == 1)

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
        indices = order.indices(epoch, order.positions(step))
        shares = list(self._parts.shares(indices, np.zeros_like(indices)))
        if len(shares) > 1:
            raise ConfigError("plan: the batches come from several datasets; ask the planner of each for its samples.")
        return self._parts.first.planner.batch(epoch, shares[0].indices, shares[0].views)

    def stats(self) -> LoaderStats:
        """Return where the newest iterator's time has gone so far."""
        return LoaderStats() if self._clock is None else self._clock.stats()

    @property
    def images_per_second(self) -> float:
        """Images that training gets a second on this rank: `stats().images_per_second`; 0.0 before the first batch.

        For a progress bar. It costs nothing: the loader computes it when it delivers a batch.
        """
        clock = self._clock  # another thread may begin an epoch
        return 0.0 if clock is None else clock.images_per_second

    def preview(self, file: str | os.PathLike[str], *, rows: int = 8) -> None:
        """Draw the first samples of the batch that the newest iterator delivered last, as the command `preview` draws.

        A row shows one sample: original with crop, edit, mask, hybrid, fractal, and the sample as it was delivered,
        after substitution. Nothing is kept for it but the batch's plan: the images are decoded again, by Pillow, so
        with decode="gpu" pixels differ slightly. The iterator and the following batches stay as they are. Batches that
        are prefetched are not delivered.

        With a `batch_transform` one more column has the delivered tensors themselves, with normalize undone, and their
        labels: the class, or the two largest shares. The loader only has weak references to them, so the column is
        there while the training loop holds the batch, and shows what was changed in place since.

        Each rank draws its own batch: give each its own file.

        Args:
            file: Ends in .png or .jpg; replaced whole. Its folder is made.
            rows: Number of samples at most, 1 to 64.

        Raises:
            ConfigError: no batch was delivered yet, or an argument breaks a rule.
        """
        newest = self._newest  # another thread may begin an epoch
        batch = None if newest is None else newest.batch
        if batch is None:
            raise ConfigError(
                "preview draws the batch that the newest iterator delivered last, and it has delivered none; call "
                "preview inside the loop over the loader, or after it."
            )
        # By name, because the pictures are made in a room above this one: docs/architecture.md, "Rooms".
        pictures: Any = importlib.import_module("dali_diffusemix.inspect.preview")
        pictures.write_batch(
            file, batch.samples(self._parts.datasets), step=batch.batch.step, rows=rows, made=batch.made
        )

    def _agree(self) -> None:
        """Agree with the other ranks on the seeds, once torch.distributed is initialised: those of rank 0."""
        if self._ranks.given is not None or not initialised():
            return
        datasets = self._parts.datasets
        if self._seeds_of_rank_0 is None:  # asked for once, also if what it says raises
            self._seeds_of_rank_0 = self._asked_of_rank_0()
            pairs = zip(datasets, self._seeds_of_rank_0, strict=True)
            self._take_seeds([one.seed if one.seed_given else seed for one, seed in pairs])
        for one, seed in zip(datasets, self._seeds_of_rank_0, strict=True):
            if one.seed_given and one.seed != seed:
                raise ConfigError(
                    f"seed must be the same on all ranks: rank 0 has {seed}, rank {self.rank} has {one.seed}; give the "
                    "dataset one seed, or leave it out."
                )

    def _asked_of_rank_0(self) -> list[int]:
        """The seed of each dataset, as rank 0 has it."""
        seeds = [one.seed for one in self._parts.datasets]
        if isinstance(self._order, OwnOrder):
            subject = f"{self._parts.first.catalog.fingerprint} {len(self.dataset)} {self.shuffle}"
            return seeds_of_rank_0(subject, seeds)
        # With a sampler each rank may have originals of its own, and nothing follows from given seeds that differ.
        free = [one.seed for one in self._parts.datasets if not one.seed_given]
        theirs = seeds_of_rank_0("sampler", free[:1]) if free else []
        return [one.seed if one.seed_given else theirs[0] for one in self._parts.datasets]

    def _say_share(self) -> None:
        """Log once that this process only gets its share: an evaluation by one rank alone would not notice."""
        rank, world_size = self._ranks()
        if isinstance(self._order, OwnOrder) and self._ranks.given is None and world_size > 1 and not self._said:
            self._said = True
            _log.info(
                "Rank %d of %d gets its share of each epoch, because torch.distributed is initialised. A loader that "
                "gives one rank the whole epoch: rank=0, world_size=1.",
                rank,
                world_size,
            )

    # --- resuming

    def state_dict(self) -> dict[str, Any]:
        """Return the newest iterator's position, for `load_state_dict`. Prefetched batches do not count.

        After the last batch it is the beginning of the next epoch. The state is plain data, of the same size at any
        position.
        """
        return self._cursor.state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next `iter()` resume where the state was taken, on any number of ranks with the same global batch.

        A dataset that was not given a seed takes that of the state.

        Raises:
            ConfigError: the state is of another dataset, seed, order or Schedule, and the message says what differs; or
                the number of delivered samples is no multiple of the global batch.
        """
        dataset = self._parts.first
        takes = not dataset.seed_given and len(self._parts.datasets) == 1
        self._cursor.load(state, any_seed=takes)
        if takes and state["seed"] != dataset.seed:
            _log.info(
                "The dataset's seed is %d, from the state that is resumed; it was %d.", state["seed"], dataset.seed
            )
            self._take_seeds([state["seed"]])

    def _take_seeds(self, seeds: Sequence[int]) -> None:
        """Let the datasets that were not given a seed have these."""
        for dataset, seed in zip(self._parts.datasets, seeds, strict=True):
            if dataset.seed != seed:
                dataset.take_seed(seed)
        if isinstance(self._order, OwnOrder):
            self._order = replace(self._order, seed=self._parts.first.seed)
        self._cursor.adopt(self._order, self._identity())

    def _identity(self) -> Identity:
        parts = self._parts
        return Identity(parts.first.seed, len(self.dataset), self.shuffle, parts.fingerprint, parts.schedules)

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

    def __repr__(self) -> str:
        """A few aligned lines, from what is in memory."""
        return table(
            type(self).__name__,
            {
                "dataset": lambda: in_a_line(self.dataset),
                "batch size": lambda: (
                    ("given by the batch sampler" if self.batch_size is None else f"{self.batch_size:,}")
                    + (", full batches only" if self.drop_last else "")
                ),
                "batches": self._described_batches,
                "order": self._described_order,
                "device": self._described_device,
                "decoding": self._described_decoding,
                "workers": lambda: (
                    f"{counted(self._maker.delivery.threads, 'thread')}, "
                    f"{counted(self._maker.delivery.prefetch_factor, 'batch', 'batches')} decoded ahead"
                ),
                "resident": lambda: {"host": "in memory", "device": "in the GPU's memory"}.get(
                    str(self.resident), "no"
                ),
                "batch_transform": lambda: None if self.batch_transform is None else name_of(self.batch_transform),
            },
        )

    def _described_batches(self) -> str:
        try:
            text = f"{len(self):,}"
        except TypeError:  # a user's sampler without a length
            text = "unknown: the sampler has no length"
        rank, world_size = self._ranks()
        return text + (f", on rank {rank} of {world_size}" if world_size > 1 else "")

    def _described_order(self) -> str:
        if isinstance(self._order, OwnOrder):
            return "shuffled" if self.shuffle else "not shuffled"
        order = self._order
        return type(order.batch_sampler if order.sampler is None else order.sampler).__name__

    def _described_device(self) -> str:
        last = self.memory_format is torch.channels_last
        details = [str(self.device), str(self.dtype).removeprefix("torch."), *["channels last"] * last]
        return ", ".join([*details, *["page-locked"] * (self.pin_memory and self.device.type == "cpu")])

    def _described_decoding(self) -> str:
        maker = self._maker
        if all(one.is_raw for one in self._parts.datasets):
            return "nothing to decode: raw images"
        if self.device.type == "cpu":
            return "on the CPU"
        if not maker.prepared:
            return f"{self.decode}: to be chosen" if self.decode == "auto" else str(self.decode)
        return f"on the {maker.decoded_on.upper()}" + (", chosen by trying" if self.decode == "auto" else "")

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_clock": None, "_newest": None}


class _Iterator(Iterator[Batch]):
    """One epoch. Several threads may share it; each batch goes to one of them."""

    def __init__(self, batches: Batches, cursor: Cursor, order: Order) -> None:
        self._lock = threading.RLock()  # a thread that an exception took out of it may enter again
        self._batches = batches
        self._cursor = cursor
        self._order = order
        self._ending = Ending()

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
                self._ending.close()
                raise StopIteration
            try:
                batch = self._batches.next()
            except BaseException:
                self.close()
                raise
            if self._batches.exhausted:
                self._cursor.finish(self._batches.run)
                self._batches.close()
                self._ending.end_of_dataloader = True
            if batch is None:
                self._ending.close()
                raise StopIteration
            return batch

    def close(self) -> None:
        """End the epoch here and release the decoder."""
        self._ending.close()
        self._batches.close()

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # At the interpreter's end DALI is gone already, and perhaps the names of this module.
        if not finalizing():
            self.close()
