"""The loader: DataLoader's place in the training loop, with DALI decoding and one call per batch mixing.

indices ──> plan ──> read, DALI: some batches ahead ──> pieces ──> one mix call ──> tensors
"""

import math
import os
import random
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import BatchSampler, RandomSampler

from dali_diffusemix.base import gpu, native
from dali_diffusemix.base.philox import check_seed, draw
from dali_diffusemix.errors import ConfigError
from dali_diffusemix.images.reading import Place
from dali_diffusemix.loading import auto
from dali_diffusemix.loading.dali import GpuDecoding
from dali_diffusemix.loading.dataset import DiffuseMixDataset, from_the_end
from dali_diffusemix.loading.decoder import Decoded, PieceDecoder, Sources
from dali_diffusemix.loading.quarantine import Failure, Quarantine, Substitution
from dali_diffusemix.loading.samplers import BatchOrder, OwnBatches, OwnOrder, UsersOrder
from dali_diffusemix.loading.upload import PieceUpload
from dali_diffusemix.mix.call import mix, mix_on_device, piece_table
from dali_diffusemix.mix.tensor import DtypeName, TensorFormat
from dali_diffusemix.plan.batch import BatchPlan
from dali_diffusemix.plan.order import Schedule
from dali_diffusemix.plan.windows import visible_parts

_DTYPES: Final[dict[torch.dtype, DtypeName]] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.uint8: "uint8",
}

Batch = tuple[torch.Tensor, ...]
BatchTransform = Callable[[torch.Tensor, torch.Tensor, torch.Generator], tuple[torch.Tensor, torch.Tensor]]

# DataLoader's arguments that mean nothing here: the value that asks for nothing, and what to do instead.
_MEANINGLESS: Final[dict[str, tuple[object, str]]] = {
    "collate_fn": (None, "batches are made whole; change them with batch_transform=, or in the training loop"),
    "pin_memory": (False, "batches lie on the loader's device already"),
    "pin_memory_device": ("", "batches lie on the device already"),
    "timeout": (0, "there are no worker processes to wait for"),
    "worker_init_fn": (None, "there are no worker processes; all randomness comes from the dataset's seed"),
    "multiprocessing_context": (None, "there are no worker processes"),
    "persistent_workers": (False, "threads are always kept; close() ends them"),
    "in_order": (True, "batches always come in order"),
    "snapshot_every_n_steps": (1, "state_dict() is made when it is asked for, and costs nothing before"),
}
# What the order and the batches follow from, as with DataLoader.
_FIXED: Final = ("dataset", "batch_size", "shuffle", "drop_last", "generator", "memory_format", "dtype")
# Philox fields of batch transforms, from here on, one for each rank; the plan's are small.
_TRANSFORM: Final = 2**31
_STATE_VERSION: Final = 1


@dataclass(frozen=True)
class LoaderStats:
    """What a loader's newest iterator spent its time on, in seconds, since its first batch was asked for.

    Reading and decoding go on beside training. On the CPU mixing is done inside `next()`; on a GPU `mix` is what it
    takes to launch it.
    """

    batches: int = 0
    images: int = 0
    total: float = 0.0
    wait: float = 0.0
    """Inside `next()`: training waited for the loader."""
    idle: float = 0.0
    """Of `wait`: nothing was decoded yet."""
    mix: float = 0.0
    """Of `wait`: mixing."""
    read: float = 0.0
    """Reading, in a thread of its own."""
    decode: float = 0.0
    """Processor time of DALI's threads, all of them together. What a GPU decodes is not in it."""
    decoded_on: Literal["cpu", "gpu"] = "cpu"
    """Where images are decoded: the loader's `decode`, and where that is "auto", what it came to."""

    @property
    def bottleneck(self) -> Literal["loader", "training"]:
        """Which waits for the other: the loader is in the way if training spends more than a tenth waiting for it."""
        return "loader" if self.wait > 0.1 * self.total else "training"


class DiffuseMixLoader:
    """Iterates over batches of a `DiffuseMixDataset`: (images, labels) as PyTorch tensors on the device.

    The first `iter()` is epoch 0, each later one the next, unless `set_epoch` was called since. Iterators are
    independent of each other. The same (seed, epoch, index) gives the same sample as under
    `torch.utils.data.DataLoader`, whatever the batch size, the number of threads and of ranks.

    Args:
        dataset: What to load. It decides every sample; the loader only how it is delivered.
        batch_size: Samples per batch, on each rank.
        shuffle: Go through each epoch in an order of its own, which the dataset's seed decides; with `generator`, in
            the order that DataLoader would draw from it.
        sampler: The indices to load, in order; of this rank alone, as with DataLoader. It is not told the epoch.
        batch_sampler: The same as lists of indices, one for each batch.
        num_workers: Threads that decode and mix; there are no worker processes. 0 is one thread.
        device: Where mixing is done and the tensors lie: "cuda" (the current GPU at the first `iter`), "cuda:N" or
            "cpu". On a GPU batches are ordered on torch's current stream, and nothing waits for it.
        decode: Where a GPU's images are decoded. "cpu": with the pixels of device="cpu", and one copy of what a batch
            shows to the GPU. "gpu" or a `GpuDecoding`: by DALI's mixed decoders, whose pixels are nearly those. "auto":
            on the GPU if that works on this machine and is at least a tenth faster; the first `iter` ever on a machine
            tries it, which takes up to a few minutes, and the user's cache folder remembers the answer.
        dtype: float32, float16, bfloat16 or uint8 (which needs a dataset with normalize=None).
        memory_format: torch.contiguous_format or torch.channels_last.
        drop_last: Leave out a last batch that is not full.
        generator: Decides the order when shuffling, in place of the dataset's seed.
        prefetch_factor: Batches that are decoded ahead; as many again are read ahead.
        rank: Which share of each global batch of batch_size x world_size samples is this process's. None:
            torch.distributed's where it is initialised, else 0. Ranks deliver equally many batches.
        world_size: How many processes share a global batch; given with `rank`, or neither.
        batch_transform: Called with (images, labels, generator) of each batch on the device; gives the images and
            labels to deliver. The generator, on the device too, and the global ones of torch, NumPy and Python are
            seeded for the call by (seed, epoch, step, rank).
        return_index: Deliver (images, labels, indices): (n,) int64, which samples of the epoch these are, on the CPU.
        visible_parts: Decode of each image only what its sample shows; False decodes whole images, for comparison.

    Raises:
        ConfigError: an argument breaks a rule.
        MissingDependencyError: what the device needs is not installed; from `iter()`, a GPU is missing; from `next()`,
            DALI is.
        DecodeError: from `next()`: an image cannot be read or decoded, and the dataset has on_error="raise".
        IndexError: from `next()`: a sampler gives an index that the dataset does not have.
    """

    quarantine: Quarantine
    """The images that could not be read or decoded, by path."""

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
        prefetch_factor = 2 if prefetch_factor is None else prefetch_factor
        if not isinstance(dataset, DiffuseMixDataset):
            raise ConfigError(
                f"dataset must be a DiffuseMixDataset, found {type(dataset).__name__}. Instead of it write\n"
                '    dataset = DiffuseMixDataset("path/to/train", crop=TrainCrop(224), mix=None)\n'
                "    loader = DiffuseMixLoader(dataset, batch_size=...)\n"
                "or keep torch.utils.data.DataLoader for datasets of other kinds"
            )
        _check_others(others)
        _check_device(device)
        auto.check(decode, torch.device(device))
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, found {dtype}")
        if memory_format not in (torch.contiguous_format, torch.channels_last):
            raise ConfigError(
                f"memory_format must be torch.contiguous_format or torch.channels_last, found {memory_format}"
            )
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("prefetch_factor", prefetch_factor, 1),
        ):
            if value is not None and (not isinstance(value, int | np.integer) or value >= 2**31):
                raise ConfigError(f"{name} must be a whole number, at least {least}, found {value!r}")
            if value is None or value < least:
                raise ConfigError(f"{name} must be at least {least}, found {value}")
        if batch_transform is not None and not callable(batch_transform):
            raise ConfigError(
                f"batch_transform must be a function of (images, labels, generator), found {batch_transform!r}"
            )
        if (rank is None) != (world_size is None):
            raise ConfigError(f"rank and world_size go together, found rank={rank} and world_size={world_size}")
        if sampler is not None and shuffle:
            raise ConfigError("sampler decides the order: found shuffle=True beside it; leave one of them out")
        if batch_sampler is not None and (batch_size != 1 or shuffle or sampler is not None or drop_last):
            raise ConfigError(
                "batch_sampler decides the batches: batch_size, shuffle, sampler and drop_last must be left out"
            )
        if rank is not None and (sampler is not None or batch_sampler is not None):
            raise ConfigError(
                "rank and world_size cut the loader's own order: found them beside a sampler, which gives one rank's "
                "indices (as DistributedSampler does); leave them or it out"
            )
        self.dataset = dataset
        self.batch_size: int | None = batch_size if batch_sampler is None else None
        self.shuffle = bool(shuffle)
        self.num_workers = num_workers
        self.device = torch.device(device)
        self.decode = decode
        self.dtype = dtype
        self.memory_format = memory_format
        self.drop_last = drop_last
        self.generator = generator
        self.prefetch_factor = prefetch_factor
        self.batch_transform = batch_transform
        self.return_index = return_index
        self.visible_parts = visible_parts
        self.quarantine = Quarantine()
        self._substitution: Substitution[_Pieces] | None = None
        if shuffle and generator is not None:
            if rank is not None:
                raise ConfigError("generator decides the order of one process: leave out rank and world_size, or it")
            sampler = RandomSampler(dataset, generator=generator)
        self._users: UsersOrder | None = None
        if sampler is not None or batch_sampler is not None:
            batches = batch_sampler
            if batches is None:
                batches = BatchSampler(sampler, batch_size, drop_last)  # type: ignore[arg-type]
            sampler = getattr(batches, "sampler", None) if sampler is None else sampler
            self._users = UsersOrder(batches, sampler, generator)
        self._placement = None if rank is None or world_size is None else (rank, world_size)
        if self._placement is not None:
            _ = self._schedule  # checks them
        self._format = TensorFormat(
            dtype=_DTYPES[dtype],
            channels_last=memory_format is torch.channels_last,
            normalize=dataset.normalize,
        )
        self._next = _Position(0, 0)
        self._newest: _Progress | None = None  # unless its epoch was given up since
        self._measured: _Progress | None = None
        # Decoders that no iterator uses: building one takes longer than a batch.
        self._idle: list[PieceDecoder] = []
        self._decoding: GpuDecoding | None = None  # None: on the CPU; what `decode` comes to
        self._resolved = False  # that is known: from the first `iter` on
        self._upload: PieceUpload | None = None  # of a GPU's pieces that the CPU decodes
        self._bank: gpu.DeviceBank | None = None
        self._retained = gpu.Retained()
        self._memory = _Memory()

    def __setattr__(self, name: str, value: object) -> None:
        if name in _FIXED and name in self.__dict__:
            raise ConfigError(f"{name} of a loader cannot be changed: found {value!r}; make another loader")
        super().__setattr__(name, value)

    # --- DataLoader's protocol

    def __len__(self) -> int:
        """Batches in an epoch on this rank; all ranks have equally many."""
        return len(self._schedule) if self._users is None else len(self._users.batches)  # type: ignore[arg-type]

    def __iter__(self) -> "_Iterator":
        if self.device.type == "cuda":
            gpu.check_available()
            if ":" not in str(self.device):
                self.device = torch.device("cuda", torch.cuda.current_device())
            if not self._resolved:
                self._decoding = auto.resolve(self.decode, self.device, self._threads)
                self._resolved = True
        start = self._next
        self._next = _Position(start.epoch + 1, 0)
        self._newest = _Progress(start.epoch, start.places, self._users.begin() if self._users else None)
        self._newest.decoded_on = "cpu" if self._decoding is None else "gpu"
        self._measured = self._newest
        self._substitution = None  # what it knows of files may have changed
        return _Iterator(self, self._newest)

    @property
    def rank(self) -> int:
        """Which share of each global batch this process takes."""
        return self._share()[0]

    @property
    def world_size(self) -> int:
        """How many processes share each global batch."""
        return self._share()[1]

    @property
    def sampler(self) -> Iterable[int]:
        """The user's sampler, or a view of the loader's own order of the next epoch on this rank; both have `len`."""
        users = None if self._users is None else self._users.sampler
        return OwnOrder(self) if users is None else users

    @property
    def batch_sampler(self) -> Iterable[Sequence[int]]:
        """The same in batches."""
        return OwnBatches(self) if self._users is None else self._users.batches

    # What DataLoader has and nothing here uses.
    collate_fn = None
    pin_memory = False
    pin_memory_device = ""
    timeout = 0
    worker_init_fn = None
    multiprocessing_context = None
    persistent_workers = False
    in_order = True

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next `iter()`; those after it go on from there.

        After `load_state_dict`, choosing the epoch that the state is of leaves the place in it.
        """
        check_seed(self.dataset.seed, epoch)
        newest = self._newest
        if newest is not None and newest.running and not newest.begin:
            # No batch was asked of it yet: it goes along, as DataLoader asks its sampler at the first `next`.
            self._next = _Position(newest.epoch, newest.places)
            if epoch != newest.epoch:
                newest.epoch, newest.places = epoch, 0
        if epoch != self._next.epoch:
            self._next = _Position(epoch, 0)
        if self._newest is not None and not self._newest.running:
            self._newest = None

    def plan(self, epoch: int, step: int) -> BatchPlan:
        """The plan of this rank's batch `step` of an epoch, before any substitution; not with a user's sampler."""
        if self._users is not None:
            raise ConfigError("plan: the batches are a sampler's; give its indices to dataset.planner.batch instead")
        schedule = self._schedule
        return self.dataset.planner.batch(epoch, schedule.indices(epoch, schedule.places(step)))

    def stats(self) -> LoaderStats:
        """Where the newest iterator's time went so far."""
        return LoaderStats() if self._measured is None else self._measured.stats()

    # --- resuming

    def state_dict(self) -> dict[str, Any]:
        """Where the newest iterator is, for `load_state_dict`: counts what was delivered, not what is under way.

        After the last batch it is the beginning of the next epoch. The state is plain data, of the same size at any
        place.
        """
        newest = self._newest
        position = self._next if newest is None else _Position(newest.epoch, newest.places)
        state: dict[str, Any] = {
            "version": _STATE_VERSION,
            "seed": self.dataset.seed,
            "epoch": position.epoch,
            "places": position.places,
            "length": len(self.dataset),
            "shuffle": self.shuffle,
            "fingerprint": self.dataset.catalog.fingerprint,
        }
        if self._users is not None:
            state["sampler"] = self._users.state() if newest is None else newest.sampler
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next `iter()` go on where the state was taken, by any number of ranks with the same global batch.

        Raises:
            ConfigError: the state is of another dataset, seed or order, with what differs; or the number of samples
                delivered is no multiple of the global batch.
        """
        if not isinstance(state, Mapping) or state.get("version") != _STATE_VERSION:
            found = state.get("version") if isinstance(state, Mapping) else type(state).__name__
            raise ConfigError(f"state must be of version {_STATE_VERSION}, from a DiffuseMixLoader, found {found}")
        ours = self.state_dict()
        remedies = {
            "seed": "give the dataset this seed",
            "length": "give the dataset the same originals, mix and, in an expanded epoch, edits",
            "shuffle": "give the loader the same shuffle",
            "fingerprint": "give the dataset the same originals: it covers their relative paths and labels",
        }
        for name, remedy in remedies.items():
            if state.get(name) != ours[name]:
                raise ConfigError(f"{name} of the state is {state.get(name)!r}, here it is {ours[name]!r}; {remedy}")
        if ("sampler" in state) != (self._users is not None):
            there, here = ("a", "none") if "sampler" in state else ("no", "one")
            raise ConfigError(f"the state was taken with {there} sampler, this loader has {here}")
        try:
            epoch, places = int(state["epoch"]), int(state["places"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"state must hold whole numbers as epoch and places, found {dict(state)!r}") from error
        check_seed(self.dataset.seed, epoch)
        if self._users is None:
            size = self._schedule.global_batch_size
            if not 0 <= places < len(self) * size or places % size:
                raise ConfigError(
                    f"places of the state is {places} of {len(self.dataset)}, which must be a multiple of the global "
                    f"batch (batch_size x world_size = {size}); change batch_size so that their product stays the same"
                )
        else:
            self._users.restore(state["sampler"])
        self._next = _Position(epoch, places)
        self._newest = None

    # --- lifetime

    def close(self) -> None:
        """Give the decoders' threads and memory back. The loader can be used again; iterators in progress go on."""
        self._retained.wait()
        self._memory = _Memory()
        self._substitution = None
        while self._idle:
            self._idle.pop().close()
        self._bank = self._upload = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, object]:
        fresh: dict[str, object] = {
            "_idle": [],
            "_decoding": None,
            "_resolved": False,
            "_upload": None,
            "_bank": None,
            "_retained": gpu.Retained(),
            "_memory": _Memory(),
            "_newest": None,
            "_measured": None,
            "_substitution": None,
        }
        return {**self.__dict__, **fresh}

    # --- one batch

    def _share(self) -> tuple[int, int]:
        if self._placement is None:
            distributed = torch.distributed
            if not (distributed.is_available() and distributed.is_initialized()):
                return 0, 1
            return distributed.get_rank(), distributed.get_world_size()
        return self._placement

    @property
    def _schedule(self) -> Schedule:
        rank, world_size = self._share()
        return Schedule(
            length=len(self.dataset),
            batch_size=self.batch_size or 1,
            shuffle=self.shuffle,
            drop_last=self.drop_last,
            seed=self.dataset.seed,
            rank=rank,
            world_size=world_size,
        )

    def count(self) -> int:
        """Samples in an epoch on this rank; not with a user's sampler."""
        return self._schedule.count()

    def next_orders(self) -> Iterator[BatchOrder]:
        """The batches of the next epoch on this rank; not with a user's sampler."""
        return self._orders(self._next.epoch, 0)

    def _orders(self, epoch: int, places: int) -> Iterator[BatchOrder]:
        """What to deliver from a place of an epoch on."""
        if self._users is not None:
            for order in self._users.orders(places):
                yield order._replace(indices=from_the_end(order.indices, len(self.dataset)))
            return
        schedule = self._schedule
        size = schedule.global_batch_size
        for step in range(places // size, len(schedule)):
            indices = schedule.indices(epoch, schedule.places(step))
            yield BatchOrder(step, (step + 1) * size, indices)

    def _take_decoder(self, batch_size: int) -> PieceDecoder:
        with suppress(IndexError):  # of several threads each takes its own
            while (decoder := self._idle.pop()).inherited:
                pass
            return decoder
        return PieceDecoder(
            batch_size,
            threads=self._threads,
            ahead=1 + self.prefetch_factor,
            device=None if self._decoding is None else self.device.index,
            gpu=self._decoding,
        )

    @property
    def _threads(self) -> int:
        return max(1, self.num_workers)

    def _complete(
        self, plan: BatchPlan, decoder: PieceDecoder, decoded: tuple[Decoded, Decoded]
    ) -> tuple[BatchPlan, "_Pieces"]:
        """A batch's pieces, and its plan after the samples that cannot be made were substituted."""
        pieces = _Pieces.of(decoded)
        failures = _failures(decoded)
        if not failures:
            return plan, pieces

        def decode(rows: BatchPlan) -> tuple[_Pieces, Mapping[int, Failure]]:
            alone = decoder.decode_now(sources_of(self.dataset, rows, seen_only=self.visible_parts))
            return _Pieces.of(alone), _failures(alone)

        if self._substitution is None:
            dataset = self.dataset
            self._substitution = Substitution(
                dataset.planner, dataset.name_of, dataset.on_error, size_of=lambda pieces: pieces.nbytes
            )
        rows = {}
        for place, (row, found) in self._substitution(plan, failures, decode, self.quarantine).items():
            rows[place] = row
            pieces.table[:, place], pieces.on_host[:, place] = found.table[:, 0], found.on_host[:, 0]
            pieces.owners.extend(found.owners)
        return plan.with_rows(rows), pieces

    def _mix(self, plan: BatchPlan, pieces: "_Pieces") -> torch.Tensor:
        if self.device.type == "cuda":
            return self._mix_on_device(plan, pieces)
        buffer = self._memory.take(self._format.shape(len(plan), plan.output_size), self._format.storage)
        bank = self.dataset.bank
        mix(
            plan,
            pieces.table,
            None if bank is None else bank.images,
            out=buffer,
            format=self._format,
            threads=self._threads,
        )
        images = torch.from_numpy(buffer).view(self.dtype)
        return images.permute(0, 3, 1, 2) if self._format.channels_last else images

    def _mix_on_device(self, plan: BatchPlan, pieces: "_Pieces") -> torch.Tensor:
        shape = (len(plan), 3, *plan.output_size)
        images = torch.empty(shape, dtype=self.dtype, device=self.device, memory_format=self.memory_format)
        table, copied = self._uploader()(pieces.table.ravel(), pieces.on_host.ravel())
        mix_on_device(plan, table.reshape(2, -1), self._device_bank(), out=images, format=self._format)
        del copied  # until now: its memory goes to nothing that could run before the mix
        if self._decoding is not None:
            self._retained.add(tuple(pieces.owners), self.device)
        return images

    def _uploader(self) -> PieceUpload:
        self._upload = self._upload or PieceUpload(self.device, self._threads)
        return self._upload

    def _device_bank(self) -> gpu.DeviceBank | None:
        bank = self.dataset.bank
        if bank is not None and self._bank is None:
            self._bank = gpu.device_bank(bank.path or bank, bank.images, self.device)
        return self._bank

    def _transformed(self, images: torch.Tensor, labels: torch.Tensor, epoch: int, step: int) -> Batch:
        assert self.batch_transform is not None
        words = draw(self.dataset.seed, epoch, [step], [_TRANSFORM + self._share()[0]])[0, 0].astype(np.uint64)
        seed = int(words[0] << np.uint64(32) | words[1])
        with _seeded(seed, self.device):
            changed = self.batch_transform(images, labels, torch.Generator(self.device).manual_seed(seed))
        if isinstance(changed, str) or not (isinstance(changed, Sequence) and len(changed) == 2):
            raise ConfigError(f"batch_transform must give (images, labels), found {type(changed).__name__}")
        return tuple(changed)


class _Position(NamedTuple):
    epoch: int
    places: int  # delivered, by all ranks together; with a user's sampler, of it


@dataclass
class _Progress:
    """How far an iterator is."""

    epoch: int
    places: int
    sampler: object  # the sampler's state when the epoch began
    running: bool = True
    batches: int = 0
    images: int = 0
    begin: float = 0.0
    end: float = 0.0
    wait: float = 0.0
    idle: float = 0.0
    mix: float = 0.0
    decoded_on: Literal["cpu", "gpu"] = "cpu"
    decoder: PieceDecoder | None = None
    before: tuple[float, float] = (0.0, 0.0)  # the decoder's seconds when the iterator took it
    seconds: tuple[float, float] = (0.0, 0.0)  # when it was given back

    def stats(self) -> LoaderStats:
        read, decode = self.seconds if self.decoder is None else self.decoder.seconds()
        return LoaderStats(
            batches=self.batches,
            images=self.images,
            total=self.end - self.begin,
            wait=self.wait,
            idle=self.idle,
            mix=self.mix,
            read=read - self.before[0],
            decode=decode - self.before[1],
            decoded_on=self.decoded_on,
        )


class _Planned:
    """A batch's plan and sources, made when they are first asked for: by the decoder, in its own thread.

    It does not hold the loader, which would then live as long as the thread is at it.
    """

    plan: BatchPlan

    def __init__(self, dataset: DiffuseMixDataset, epoch: int, order: BatchOrder, *, seen_only: bool) -> None:
        self.order = order
        self._dataset, self._epoch, self._seen_only = dataset, epoch, seen_only

    def __call__(self) -> Sources:
        self.plan = self._dataset.planner.batch(self._epoch, self.order.indices)
        return sources_of(self._dataset, self.plan, seen_only=self._seen_only)


def sources_of(dataset: DiffuseMixDataset, plan: BatchPlan, *, seen_only: bool) -> Sources:
    """Where the images of a batch are, and what of them is to be decoded: what is seen, or all."""
    store = dataset.store
    sizes = np.zeros((2, len(plan), 2), dtype=np.int32)
    sizes[0] = dataset.catalog.sizes[plan.original]
    if store is not None and plan.mixed.any():
        sizes[1, plan.mixed] = store.sizes(plan.edit[plan.mixed])
    windows = visible_parts(plan, sizes) if seen_only else np.concatenate([np.zeros_like(sizes), sizes], axis=2)
    return Sources(
        originals=_originals(dataset, plan.original),
        edits=_edits(dataset, plan.edit),
        original_windows=windows[0],
        edit_windows=windows[1],
        original_sizes=sizes[0],
        edit_sizes=sizes[1],
    )


def _originals(dataset: DiffuseMixDataset, rows: NDArray[np.int64]) -> Sequence[Place | None]:
    packed, catalog = dataset.original_store, dataset.catalog
    if packed is not None:
        return packed.extents(rows)
    root = os.fsencode(dataset.root)
    return [root + b"/" + catalog.encoded_path(row) for row in rows.tolist()]


def _edits(dataset: DiffuseMixDataset, rows: NDArray[np.int64]) -> Sequence[Place | None]:
    places: list[Place | None] = [None] * len(rows)
    if dataset.store is not None:
        mixed = np.flatnonzero(rows >= 0)
        for row, place in zip(mixed.tolist(), dataset.store.extents(rows[mixed]), strict=True):
            places[row] = place
    return places


class _Iterator(Iterator[Batch]):
    """One epoch. Nothing is read before the first `next`. Several threads may share it; each batch goes to one."""

    def __init__(self, loader: DiffuseMixLoader, progress: _Progress) -> None:
        self._lock = threading.RLock()  # a thread that lost it to an exception may go on
        self._loader = loader
        self._progress = progress
        self._orders: Iterator[BatchOrder] | None = None
        self._under_way: deque[_Planned] = deque()

    def __len__(self) -> int:
        return len(self._loader)

    def __reduce__(self) -> Any:
        raise TypeError("an iterator of a loader cannot be copied or pickled; save loader.state_dict() instead")

    def __next__(self) -> Batch:
        decoder = self._progress.decoder
        if decoder is not None and decoder.inherited:
            raise ConfigError(
                "this iterator was begun in the process that was forked, and its threads stayed there; call "
                "iter(loader) in the process that is to have the batches"
            )
        with self._lock:
            return self._advance()

    def _advance(self) -> Batch:
        progress, loader = self._progress, self._loader
        if not progress.running:
            raise StopIteration
        begin = time.perf_counter()
        try:
            if self._orders is None:
                progress.begin = begin
                self._orders = loader._orders(progress.epoch, progress.places)
            self._submit()
            if not self._under_way:
                self._finish()
                raise StopIteration
            batch, order = self._deliver()
        except BaseException:
            self.close()
            raise
        progress.batches += 1
        progress.images += len(batch[0])
        progress.places = order.places
        if not self._under_way:  # at least one more was asked for before this one was delivered
            self._finish()
        progress.end = time.perf_counter()
        progress.wait += progress.end - begin
        return batch

    def _submit(self) -> None:
        loader, progress = self._loader, self._progress
        # As many batches again are read ahead as are decoded ahead.
        while len(self._under_way) < 1 + 2 * loader.prefetch_factor:
            assert self._orders is not None
            order = next(self._orders, None)
            if order is None:
                return
            if progress.decoder is None:
                progress.decoder = loader._take_decoder(loader.batch_size or len(order.indices))
                progress.before = progress.decoder.seconds()
            planned = _Planned(loader.dataset, progress.epoch, order, seen_only=loader.visible_parts)
            progress.decoder.submit(planned)
            self._under_way.append(planned)

    def _deliver(self) -> tuple[Batch, BatchOrder]:
        loader, progress, decoder = self._loader, self._progress, self._progress.decoder
        assert decoder is not None
        planned = self._under_way.popleft()
        order = planned.order
        begin = time.perf_counter()
        if loader.device.type == "cpu":
            decoded = decoder.fetch()
            progress.idle += time.perf_counter() - begin
            images, plan = self._mixed(planned.plan, decoded)
            labels = torch.from_numpy(loader.dataset.labels_of(plan))
        else:
            with torch.cuda.device(loader.device):
                decoded = decoder.fetch(loader._uploader().stream)
                progress.idle += time.perf_counter() - begin
                images, plan = self._mixed(planned.plan, decoded)
                labels = torch.from_numpy(loader.dataset.labels_of(plan)).pin_memory()
                labels = labels.to(loader.device, non_blocking=True)
        batch: Batch = (images, labels)
        if loader.batch_transform is not None:
            batch = loader._transformed(images, labels, progress.epoch, order.step)
        if loader.return_index:
            batch = (*batch, torch.from_numpy(plan.index.copy()))
        return batch, order

    def _mixed(self, plan: BatchPlan, decoded: tuple[Decoded, Decoded]) -> tuple[torch.Tensor, BatchPlan]:
        assert self._progress.decoder is not None
        plan, pieces = self._loader._complete(plan, self._progress.decoder, decoded)
        begin = time.perf_counter()
        images = self._loader._mix(plan, pieces)
        self._progress.mix += time.perf_counter() - begin
        return images, plan

    def _finish(self) -> None:
        """The epoch is over: a state taken from now on is the next one's beginning."""
        progress, loader = self._progress, self._loader
        if loader._newest is progress:
            progress.epoch, progress.places = progress.epoch + 1, 0
            progress.sampler = None if loader._users is None else loader._users.state()
        self.close()

    def close(self) -> None:
        """Give the decoder back."""
        progress = self._progress
        if not progress.running:
            return
        progress.running = False
        self._under_way.clear()
        decoder, progress.decoder = progress.decoder, None
        if decoder is not None and not decoder.inherited:
            progress.seconds = decoder.seconds()
            if decoder.intact:
                decoder.drain()
                native.trim()
                self._loader._idle.append(decoder)
            else:
                decoder.close()

    def __del__(self) -> None:
        # DALI is gone before what is left at the interpreter's end.
        if not sys.is_finalizing():
            self.close()


@dataclass
class _Pieces:
    """Decoded pieces as the mix takes them, and what keeps their memory."""

    table: NDArray[np.void]  # (2, n) of `mix.call.PIECE`: originals, edits
    on_host: NDArray[np.bool_]  # (2, n)
    owners: list[object] = field(default_factory=list)

    @classmethod
    def of(cls, decoded: tuple[Decoded, Decoded]) -> Self:
        tables = [piece_table(d.data, d.shapes, origins=d.places, image_sizes=d.image_sizes) for d in decoded]
        return cls(np.stack(tables), np.stack([d.on_host for d in decoded]), [d.owner for d in decoded])

    @property
    def nbytes(self) -> int:
        """Bytes of the pieces' pixels."""
        return int(3 * (self.table["height"].astype(np.int64) * self.table["width"]).sum())


def _failures(decoded: tuple[Decoded, Decoded]) -> dict[int, Failure]:
    originals, edits = decoded
    return {
        **{row: Failure("edit", error) for row, error in edits.errors.items()},
        **{row: Failure("original", error) for row, error in originals.errors.items()},
    }


def _check_others(others: Mapping[str, object]) -> None:
    for name, value in others.items():
        if name not in _MEANINGLESS:
            raise TypeError(f"DiffuseMixLoader has no argument {name!r}")
        neutral, remedy = _MEANINGLESS[name]
        if value != neutral:
            raise ConfigError(f"{name} has no meaning here, found {value!r}: {remedy}. Leave it out")


def _check_device(device: str | torch.device) -> None:
    try:
        known = torch.device(device).type in ("cuda", "cpu")
    except (RuntimeError, TypeError):  # torch knows none of that name, or it is no name
        known = False
    if not known:
        raise ConfigError(f"device must be 'cuda', 'cuda:N' or 'cpu', found {str(device)!r}")
    if torch.device(device).type == "cuda":
        gpu.check_installed()


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global random number generators, and put them back afterwards."""
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


class _Memory:
    """Memory for batches on the CPU, used again once nobody holds the batch: fresh pages cost time.

    A batch's tensor, and whatever shares its storage, keeps the array that it was made of. When that array goes, its
    memory comes back here, so a batch that somebody keeps is never overwritten.
    """

    _KEPT = 4  # blocks that lie idle at most

    def __init__(self) -> None:
        self._idle: list[NDArray[np.uint8]] = []

    def take(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
        """An array of this shape and type, its content undefined."""
        size = math.prod(shape) * dtype.itemsize
        block = None
        with suppress(IndexError):  # another thread took the last one
            block = self._idle.pop()
        if block is None or block.nbytes < size:
            block = np.empty(size, dtype=np.uint8)
        array: NDArray[np.generic] = block[:size].view(dtype).reshape(shape)
        weakref.finalize(array, self._give_back, block).atexit = False
        return array

    def _give_back(self, block: NDArray[np.uint8]) -> None:
        if len(self._idle) < self._KEPT:
            self._idle.append(block)
