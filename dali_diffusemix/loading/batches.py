"""Batches: from sample indices to tensors. `BatchMaker` makes them, `Batches` keeps some of them under way.

indices ─> plan ─> visible windows ─> read ─> decode ─> substitute ─> mix ─> batch_transform ─> deliver
           └────── in the decoder's threads, ahead ─────┘└─────────── inside next() ────────────┘
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from operator import itemgetter
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.weak import TensorWeakRef

from dali_diffusemix.base import gpu, native
from dali_diffusemix.base.philox import BATCH_TRANSFORM, draw
from dali_diffusemix.errors import ConfigError
from dali_diffusemix.loading import arguments, auto, colours
from dali_diffusemix.loading.cursor import Run
from dali_diffusemix.loading.dali import GpuDecoding
from dali_diffusemix.loading.dataset import DiffuseMixDataset
from dali_diffusemix.loading.decoder import PieceDecoder
from dali_diffusemix.loading.memory import BatchMemory
from dali_diffusemix.loading.parts import Parts
from dali_diffusemix.loading.pieces import Pieces, Shares, is_small, request
from dali_diffusemix.loading.quarantine import Failure, Quarantine, Substitution
from dali_diffusemix.loading.ranks import Ranks
from dali_diffusemix.loading.resident import PiecesOnDevice, Resident, Residents
from dali_diffusemix.loading.samplers import BatchIndices, Order
from dali_diffusemix.loading.upload import PieceUpload
from dali_diffusemix.mix.call import mix, mix_on_device
from dali_diffusemix.mix.tensor import DtypeName, TensorFormat
from dali_diffusemix.plan.batch import BatchPlan

Batch = tuple[torch.Tensor, ...]
AnyDecoder: TypeAlias = PieceDecoder | PiecesOnDevice
PlannedSample: TypeAlias = tuple[DiffuseMixDataset, BatchPlan]  # of one row
BatchTransform = Callable[[torch.Tensor, torch.Tensor, torch.Generator], tuple[torch.Tensor, torch.Tensor]]

DTYPES: Final[Mapping[torch.dtype, DtypeName]] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.uint8: "uint8",
}
"""The types of a batch."""


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """Settings of delivery, none of which changes the samples. `DiffuseMixLoader` documents them."""

    device: torch.device
    decode: auto.Decode
    dtype: torch.dtype
    memory_format: torch.memory_format
    threads: int
    prefetch_factor: int
    return_index: bool
    visible_parts: bool
    pin_memory: bool
    timeout: float
    resident: Resident | None

    def __post_init__(self) -> None:
        if self.device.type not in ("cuda", "cpu"):
            raise ConfigError(f"device must be 'cuda', 'cuda:N' or 'cpu', found {str(self.device)!r}.")
        if self.device.type == "cuda":
            gpu.check_installed()
        auto.check(self.decode, self.device)
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(map(str, DTYPES))}, found {self.dtype}.")
        if self.memory_format not in (torch.contiguous_format, torch.channels_last):
            raise ConfigError(
                f"memory_format must be torch.contiguous_format or torch.channels_last, found {self.memory_format}."
            )


@dataclass(frozen=True)
class LoaderStats:
    """Where the time of a loader's newest iterator went, in seconds since its first batch was requested.

    Reading and decoding run beside training. On the CPU, mixing runs inside `next()`; on a GPU `mix` is the time to
    launch it.
    """

    batches: int = 0
    images: int = 0
    total: float = 0.0
    wait: float = 0.0
    """Inside `next()`: training waited for the loader."""
    idle: float = 0.0
    """Part of `wait`: nothing was decoded yet."""
    mix: float = 0.0
    """Part of `wait`: mixing."""
    read: float = 0.0
    """Reading, in a thread of its own."""
    decode: float = 0.0
    """CPU time of DALI's threads, added up. Decoding on a GPU is not included."""
    decoded_on: Literal["cpu", "gpu"] = "cpu"
    """Where images are decoded; with decode="auto", the way that was chosen."""

    images_per_second: float = 0.0
    """What training gets on this rank: over the last 100 batches, or as many as there were, the images divided by the
    seconds from the request of the first of them to the delivery of the last. The time that training itself takes
    between batches, and whatever else it does there, is included. Up to 100 batches it is `images / total`."""

    @property
    def bottleneck(self) -> Literal["loader", "training"]:
        """The slower side: "loader" if training waits for more than a tenth of the time."""
        return "loader" if self.wait > 0.1 * self.total else "training"


class BatchMaker:
    """Makes the batches of a loader, for any number of iterators; holds what they share.

    Args:
        parts: The datasets, which decide every sample.
        delivery: Settings of delivery.
        ranks: This process's rank, which seeds the batch transform.
        batch_transform: Changes each batch.
    """

    def __init__(self, parts: Parts, delivery: Delivery, ranks: Ranks, batch_transform: BatchTransform | None) -> None:
        self.parts = parts
        self.delivery = delivery
        self.batch_transform = batch_transform
        self.quarantine = Quarantine()
        self.device = delivery.device  # with its number, once `prepare` was called
        self._ranks = ranks
        self._formats = [
            TensorFormat(
                dtype=DTYPES[delivery.dtype],
                channels_last=delivery.memory_format is torch.channels_last,
                normalize=dataset.normalize,
            )
            for dataset in parts.datasets
        ]
        self._forget()

    def _forget(self) -> None:
        """Begin without anything that cannot go to another process."""
        self._way: GpuDecoding | None = None  # to decode; None is on the CPU
        self.prepared = False
        self._pins = False  # batches on the CPU are in page-locked memory
        # Building one takes longer than a batch. With the size of the samples that it worked for.
        self._free: list[tuple[PieceDecoder, tuple[int, int]]] = []
        self._substitutions: dict[int, Substitution[Pieces]] = {}  # by the dataset's number, as the next one
        self._upload: PieceUpload | None = None
        self._banks: dict[int, gpu.DeviceBank] = {}
        self._residents: Residents | None = None
        self._retained = gpu.Retained()
        self._memory = BatchMemory()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("parts", "delivery", "batch_transform", "quarantine", "device", "_ranks", "_formats")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def prepare(self) -> None:
        """Begin an epoch: find the GPU, the first time also the way to decode. Raises MissingDependencyError."""
        if self.device.type == "cuda":
            gpu.check_available()
            if ":" not in str(self.device):
                self.device = torch.device("cuda", torch.cuda.current_device())
        if not self.prepared:
            if self.delivery.pin_memory and self.device.type == "cpu":
                self._pins = torch.cuda.is_available()
                if not self._pins:
                    arguments.warn_of_no_pinning()
            if self.batch_transform is not None and any(one.normalize is not None for one in self.parts.datasets):
                colours.warn_of_colour(self.batch_transform)
            if not self._raw:
                self._way = auto.resolve(self.delivery.decode, self.device, self.delivery.threads)
            self.prepared = True
        if self.delivery.resident is not None and self._residents is None:
            on_gpu = self.device.type == "cuda"
            self._residents = Residents(
                self.parts.datasets,
                self.device if self.delivery.resident == "device" else None,
                windows=on_gpu and self.delivery.resident == "host",
            )
        self._substitutions.clear()  # files may have been repaired since

    @property
    def _raw(self) -> bool:
        """True if nothing has to be decoded."""
        return all(one.is_raw for one in self.parts.datasets)

    @cached_property
    def planned_together(self) -> int:
        """Samples that are planned and read at a time; 0 is a batch.

        For small images NumPy's calls take longer than what they do, and hold the interpreter's lock meanwhile.
        """
        return _TOGETHER if self._raw and all(map(is_small, self.parts.datasets)) else 0

    @property
    def decoded_on(self) -> Literal["cpu", "gpu"]:
        """Where images are decoded."""
        return "cpu" if self._way is None else "gpu"

    def close(self) -> None:
        """Release the free decoders and all memory; decoders in use stay."""
        self._retained.wait()
        self._memory = BatchMemory()
        self._substitutions.clear()
        while self._free:
            self._free.pop()[0].close()
        self._banks.clear()
        self._upload = None
        self._residents = None

    # --- decoders

    def take_decoder(self, batch_size: int, size: tuple[int, int]) -> AnyDecoder:
        """A decoder for one iterator over samples of this size.

        Free decoders of another size are closed: they hold memory for it, and come from an epoch with another crop.
        """
        if self.delivery.resident == "device":
            return PiecesOnDevice()
        with suppress(IndexError):  # each of several threads takes its own
            while True:
                decoder, its_size = self._free.pop()
                if decoder.inherited:
                    continue
                if its_size == size:
                    return decoder
                decoder.close()
        return PieceDecoder(
            batch_size,
            threads=self.delivery.threads,
            ahead=1 + self.delivery.prefetch_factor,
            device=None if self._way is None else self.device.index,
            gpu=self._way,
            raw=self._raw,
        )

    def give_back(self, decoder: AnyDecoder, size: tuple[int, int]) -> None:
        """Take a decoder of samples of this size back: emptied, or closed if an exception has passed through it."""
        if decoder.intact and isinstance(decoder, PieceDecoder):
            decoder.drain()
            native.trim()
            self._free.append((decoder, size))
        else:
            decoder.close()

    # --- one batch

    def requester(self) -> Callable[[Shares], Pieces]:
        """The function that makes the pieces of a batch, to decode or in memory; it does not hold this object."""
        if self._residents is not None:
            return self._residents.request
        return partial(request, visible_only=self.delivery.visible_parts)

    def fetch(self, decoder: AnyDecoder, clock: "Clock") -> Pieces:
        """The decoder's oldest pieces."""
        begin = time.perf_counter()
        uploads = self.device.type == "cuda" and self.delivery.resident != "device"
        with self._on_device():
            pieces = decoder.fetch(self._uploader().stream if uploads else None, self.delivery.timeout)
        clock.idle += time.perf_counter() - begin
        return pieces

    def deliver(
        self, planned: "_Planned", pieces: Pieces, decoder: AnyDecoder, clock: "Clock"
    ) -> "tuple[Batch, list[_PlannedShare]]":
        """A batch, as tensors on the device; and the plans of its samples, after substitution."""
        with self._on_device():
            shares = planned.shares if not pieces.errors else self._substituted(planned.shares, pieces, decoder)
            begin = time.perf_counter()
            images = self._images(shares, pieces)
            clock.mix += time.perf_counter() - begin
            labels = self._labels(shares)
            if self.device.type == "cuda":
                labels = labels.pin_memory().to(self.device, non_blocking=True)
        batch: Batch = (images, labels)
        if self.batch_transform is not None:
            batch = self._transformed(self.batch_transform, images, labels, planned.epoch, planned.batch.step)
        if self.delivery.return_index:
            batch = (*batch, torch.from_numpy(self._indices(planned, shares)))
        return tuple(map(_pinned, batch)) if self._pins else batch, shares

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _substituted(self, shares: "list[_PlannedShare]", pieces: Pieces, decoder: AnyDecoder) -> "list[_PlannedShare]":
        """Replace the samples that cannot be made, in the pieces and in the plans that are returned."""
        failures = pieces.failures()
        return [self._substituted_in(share, failures, pieces, decoder) for share in shares]

    def _substituted_in(
        self,
        share: "_PlannedShare",
        failures: Mapping[int, Failure],
        pieces: Pieces,
        decoder: AnyDecoder,
    ) -> "_PlannedShare":
        number, plan, columns = share.number, share.plan, share.columns
        dataset = self.parts.datasets[number]
        here = {
            sample - columns.start: one for sample, one in failures.items() if columns.start <= sample < columns.stop
        }
        if not here:
            return share

        def decode(rows: BatchPlan) -> tuple[Pieces, Mapping[int, Failure]]:
            found = decoder.decode_now(self.requester()([(dataset, rows)]))
            return found, found.failures()

        if number not in self._substitutions:
            self._substitutions[number] = Substitution(
                dataset.planner, dataset.name_of, dataset.on_error, size_of=lambda pieces: pieces.nbytes
            )
        rows = {}
        for row, (substitute, others) in self._substitutions[number](plan, here, decode, self.quarantine).items():
            rows[row] = substitute
            pieces.replace(columns.start + row, others)
        return replace(share, plan=plan.with_rows(rows))

    def _images(self, shares: "list[_PlannedShare]", pieces: Pieces) -> torch.Tensor:
        """The mixed samples, in the order of the batch."""
        make = self._mixed_on_gpu if self.device.type == "cuda" else self._mixed
        made = [make(share, pieces) for share in shares]
        return _in_order(shares, made)

    def _mixed(self, share: "_PlannedShare", pieces: Pieces) -> torch.Tensor:
        plan, format = share.plan, self._formats[share.number]
        shape = format.shape(len(plan), plan.output_size)
        if self._pins:
            # torch uses pinned memory again, once nobody holds it and copies from it are done.
            images = torch.empty(shape, dtype=self.delivery.dtype, pin_memory=True)
            buffer = images.view(_STORED.get(self.delivery.dtype, self.delivery.dtype)).numpy().view(format.storage)
        else:
            buffer = self._memory.take(shape, format.storage)
            images = torch.from_numpy(buffer).view(self.delivery.dtype)
        bank = self.parts.datasets[share.number].bank
        mix(
            plan,
            pieces.table[:, share.columns],
            None if bank is None else bank.images,
            out=buffer,
            format=format,
            threads=self.delivery.threads,
        )
        return images.permute(0, 3, 1, 2) if format.channels_last else images

    def _mixed_on_gpu(self, share: "_PlannedShare", pieces: Pieces) -> torch.Tensor:
        plan, columns = share.plan, share.columns
        images = torch.empty(
            (len(plan), 3, *plan.output_size),
            dtype=self.delivery.dtype,
            device=self.device,
            memory_format=self.delivery.memory_format,
        )
        table, copied = pieces.table[:, columns], None
        if self.delivery.resident != "device":
            table, copied = self._uploader()(table, pieces.on_host[:, columns], plan.output_size)
        mix_on_device(plan, table, self._device_bank(share.number), out=images, format=self._formats[share.number])
        del copied  # only here: its memory must not go to work that could run before the mix
        if self._way is not None:
            self._retained.add(tuple(pieces.owners), self.device)
        return images

    def _labels(self, shares: "list[_PlannedShare]") -> torch.Tensor:
        """The targets, in the order of the batch, on the CPU."""
        found = [torch.from_numpy(self.parts.datasets[share.number].labels_of(share.plan)) for share in shares]
        return _in_order(shares, found)

    def _indices(self, planned: "_Planned", shares: "list[_PlannedShare]") -> NDArray[np.int64]:
        """(n,) the index of each sample in what the loader was given; of a substitute of a dataset, its own."""
        if len(shares) == 1 and self.parts.whole:
            return shares[0].plan.index.copy()
        return planned.batch.indices

    def _uploader(self) -> PieceUpload:
        self._upload = self._upload or PieceUpload(self.device, self.delivery.threads)
        return self._upload

    def _device_bank(self, number: int) -> gpu.DeviceBank | None:
        bank = self.parts.datasets[number].bank
        if bank is None:
            return None
        if number not in self._banks:
            self._banks[number] = gpu.device_bank(bank.path or bank, bank.images, self.device)
        return self._banks[number]

    def _transformed(
        self, transform: BatchTransform, images: torch.Tensor, labels: torch.Tensor, epoch: int, step: int
    ) -> Batch:
        field = BATCH_TRANSFORM + self._ranks()[0]
        draws = draw(self.parts.first.seed, epoch, [step], [field])[0, 0].astype(np.uint64)
        seed = int(draws[0] << np.uint64(32) | draws[1])
        changed = transform(images, labels, torch.Generator(self.device).manual_seed(seed))
        if isinstance(changed, str) or not (isinstance(changed, Sequence) and len(changed) == 2):
            raise ConfigError(f"batch_transform must return (images, labels), found {type(changed).__name__}.")
        return tuple(changed)


_RECENT: Final = 100  # batches
# What NumPy can hold of the types that it lacks.
_STORED: Final = {torch.bfloat16: torch.int16}


def _pinned(part: torch.Tensor) -> torch.Tensor:
    return part.pin_memory() if isinstance(part, torch.Tensor) and not part.is_pinned() else part


def _in_order(shares: "list[_PlannedShare]", made: list[torch.Tensor]) -> torch.Tensor:
    """The rows that the datasets made, in the order of the batch."""
    if len(made) == 1:
        return made[0]
    order = torch.from_numpy(np.argsort(np.concatenate([share.rows for share in shares])))
    return torch.cat(made)[order.to(made[0].device)]


@dataclass
class Clock:
    """Where the time of one iterator went."""

    decoded_on: Literal["cpu", "gpu"]
    batches: int = 0
    images: int = 0
    begin: float | None = None
    end: float = 0.0
    wait: float = 0.0
    idle: float = 0.0
    mix: float = 0.0
    images_per_second: float = 0.0
    _recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_RECENT))
    """Of each recent batch, when it was requested, and the images before it."""
    _decoder: AnyDecoder | None = None
    _seconds: tuple[float, float] = (0.0, 0.0)  # of reading and decoding, as long as there is no decoder

    def start(self, decoder: AnyDecoder) -> None:
        """The iterator has taken a decoder, which worked for other iterators before."""
        self._decoder, self._seconds = decoder, decoder.seconds()

    def stop(self) -> None:
        """The iterator gives its decoder back."""
        self._seconds, self._decoder = self._spent(), None

    def _spent(self) -> tuple[float, float]:
        if self._decoder is None:
            return self._seconds
        read, decode = self._decoder.seconds()
        return read - self._seconds[0], decode - self._seconds[1]

    def count(self, batch: Batch, begin: float) -> None:
        """Count a batch that was requested at `begin` and is delivered now."""
        self.begin = begin if self.begin is None else self.begin
        self._recent.append((begin, self.images))
        self.batches += 1
        self.images += len(batch[0])
        self.end = time.perf_counter()
        self.wait += self.end - begin
        since, before = self._recent[0]
        self.images_per_second = (self.images - before) / max(self.end - since, 1e-9)

    def stats(self) -> LoaderStats:
        """The figures so far."""
        read, decode = self._spent()
        return LoaderStats(
            batches=self.batches,
            images=self.images,
            total=self.end - (self.begin or self.end),
            wait=self.wait,
            idle=self.idle,
            mix=self.mix,
            read=read,
            decode=decode,
            decoded_on=self.decoded_on,
            images_per_second=self.images_per_second,
        )


class Batches:
    """The batches of one epoch from a run's position on, several of them under way. Nothing is read before `next`.

    Args:
        maker: Makes them.
        order: The batches of the epoch.
        run: The position; it may move to another epoch until the first `next`.
        batch_size: Samples per batch, unless a batch sampler decides it.
    """

    def __init__(self, maker: BatchMaker, order: Order, run: Run, batch_size: int | None) -> None:
        self.run = run
        self.clock = Clock(maker.decoded_on)
        self.newest = Newest()
        self._maker = maker
        self._order = order
        self._batch_size = batch_size
        self._decoder: AnyDecoder | None = None
        self._size = (0, 0)  # of the samples, for which the decoder works
        self._coming: Iterator[BatchIndices] = iter(())
        self._under_way: deque[_Planning] = deque()
        self._fetched: tuple[deque[_Planned], Pieces] | None = None  # batches that are read, and their pieces

    def next(self) -> Batch | None:
        """Return the next batch; None after the last."""
        begin = time.perf_counter()
        if not self.run.started:
            self.run.started = True
            self._coming = self._order.batches(self.run.epoch, self.run.delivered)
        self._submit()
        if self.exhausted:
            return None
        assert self._decoder is not None
        if not self._ready:
            planning = self._under_way.popleft()
            pieces = self._maker.fetch(self._decoder, self.clock)
            self._fetched = deque(planning.made), pieces
        assert self._fetched is not None
        planned = self._fetched[0].popleft()
        batch, shares = self._maker.deliver(planned, self._fetched[1], self._decoder, self.clock)
        made = None if self._maker.batch_transform is None else Made(batch)
        self.newest.batch = replace(planned, shares=shares, made=made)
        self.run.delivered, self.run.checksum = planned.batch.delivered, planned.batch.checksum
        self.clock.count(batch, begin)
        return batch

    @property
    def _ready(self) -> int:
        """Batches that are read and not delivered."""
        return 0 if self._fetched is None else len(self._fetched[0])

    @property
    def exhausted(self) -> bool:
        """True when `next` has returned the last batch, because it submits at least one more than it returns."""
        return not self._under_way and not self._ready

    @property
    def inherited(self) -> bool:
        """True in a process that was forked after the first `next`: the threads are not there."""
        return self._decoder is not None and self._decoder.inherited

    def close(self) -> None:
        """End the run here and give the decoder back."""
        self.run.running = False
        self._under_way.clear()
        self._fetched = None
        decoder, self._decoder = self._decoder, None
        if decoder is not None and not decoder.inherited:
            self.clock.stop()
            self._maker.give_back(decoder, self._size)

    def _submit(self) -> None:
        # As many batches are read ahead as are decoded ahead.
        while self._ready + sum(map(len, self._under_way)) < 1 + 2 * self._maker.delivery.prefetch_factor:
            first = next(self._coming, None)
            if first is None:
                return
            if self._decoder is None:
                self._size = self._maker.parts.output_size(self.run.epoch)
                self._decoder = self._maker.take_decoder(self._batch_size or len(first.indices), self._size)
                self.clock.start(self._decoder)
            maker = self._maker
            more = maker.planned_together // max(1, len(first.indices)) - 1
            batches = [first, *islice(self._coming, max(0, more))]
            planning = _Planning(maker.parts, self.run.epoch, batches, maker.requester())
            self._decoder.submit(planning)
            self._under_way.append(planning)


# Samples of small images that are planned at a time.
_TOGETHER: Final = 2048


@dataclass(frozen=True)
class _PlannedShare:
    """The samples of a batch that one dataset makes: its plan, and where they lie."""

    number: int  # of the dataset
    plan: BatchPlan
    rows: NDArray[np.int64]  # (m,) in the batch
    columns: slice  # of the pieces


@dataclass(frozen=True)
class _Planned:
    """A batch that is planned."""

    epoch: int
    batch: BatchIndices
    shares: list[_PlannedShare]
    made: "Made | None" = None  # by a batch transform

    def samples(self, datasets: Sequence[DiffuseMixDataset]) -> list[PlannedSample]:
        """The samples in the order of the batch."""
        found = [
            (row, (datasets[share.number], share.plan.row(number)))
            for share in self.shares
            for number, row in enumerate(share.rows.tolist())
        ]
        return [sample for _, sample in sorted(found, key=itemgetter(0))]


class Made:
    """The images and labels that a batch transform made, as long as somebody else holds them: weak references.

    The plan cannot tell them, and holding them would take the memory of one more batch.
    """

    def __init__(self, batch: Batch) -> None:
        self._parts = [TensorWeakRef(one) if isinstance(one, torch.Tensor) else None for one in batch[:2]]

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """The images, and the labels if they are still there; None without images."""
        images, labels = (None if one is None else one() for one in self._parts)
        return None if images is None else (images, labels)


@dataclass
class Newest:
    """The newest batch that an iterator delivered, as plans after substitution: no pixels are kept."""

    batch: _Planned | None = None


class _Planning:
    """Batches under way, one or some. Called in the decoder's reading thread, it makes their plans and their pieces.

    It does not hold the maker, which would otherwise live as long as that thread works on it.
    """

    made: list[_Planned]

    def __init__(
        self, parts: Parts, epoch: int, batches: Sequence[BatchIndices], request: Callable[[Shares], Pieces]
    ) -> None:
        self._parts, self._epoch, self._batches, self._request = parts, epoch, batches, request

    def __len__(self) -> int:
        """Batches."""
        return len(self._batches)

    def __call__(self) -> Pieces:
        datasets, batches = self._parts.datasets, self._batches
        together = len(batches) > 1
        indices, views = (
            np.concatenate([getattr(one, name) for one in batches]) if together else getattr(batches[0], name)
            for name in ("indices", "views")
        )
        bounds = np.cumsum([0, *(len(one.indices) for one in batches)])
        self.made = [_Planned(self._epoch, one, []) for one in batches]
        plans, start = [], 0
        for number, rows, index, view in self._parts.shares(indices, views):
            plan = datasets[number].planner.batch(self._epoch, index, view)
            plans.append((datasets[number], plan))
            cuts = np.searchsorted(rows, bounds).tolist()  # rows go up
            for planned, begin, end, first in zip(self.made, cuts, cuts[1:], bounds.tolist(), strict=False):
                if end > begin:
                    its_plan = plan.rows(begin, end) if together else plan
                    columns = slice(start + begin, start + end)
                    planned.shares.append(_PlannedShare(number, its_plan, rows[begin:end] - first, columns))
            start += len(rows)
        return self._request(plans)
