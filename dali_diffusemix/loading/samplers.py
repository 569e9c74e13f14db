"""The order in which a loader delivers samples: its own, or a user's sampler; and its own order as samplers."""

import operator
import random
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler, Sampler, SequentialSampler

from dali_diffusemix.errors import ConfigError
from dali_diffusemix.loading.ranks import Ranks
from dali_diffusemix.plan.order import EpochOrder


class BatchIndices(NamedTuple):
    """The samples of one batch."""

    step: int  # in its epoch
    delivered: int  # positions of the epoch's order that are delivered with this batch
    indices: NDArray[np.int64]  # (n,)
    views: NDArray[np.int64]  # (n,) how often each index came before in the epoch
    checksum: int = 0  # of the epoch's indices up to here, where a user's sampler gives them


class Order(Protocol):
    """Which samples the batches of an epoch hold, from any position on."""

    def __len__(self) -> int:
        """Batches in an epoch on this rank."""
        ...

    def batches(self, epoch: int, delivered: int) -> Iterator[BatchIndices]:
        """The batches of an epoch after so many delivered positions."""
        ...

    def begin(self) -> object:
        """Begin an epoch. Returns the state from which its indices can be drawn again; None if nothing is needed."""
        ...

    def state(self) -> object:
        """The state from which the next epoch's indices can be drawn; None if nothing is needed."""
        ...

    def resume(self, delivered: int, state: Any, checksum: int | None) -> None:
        """Prepare to go on after so many positions, of this checksum. Raises ConfigError if no batch begins there."""
        ...


@dataclass(frozen=True)
class OwnOrder:
    """The loader's own order: each epoch's, divided among the ranks."""

    length: int
    batch_size: int
    shuffle: bool
    drop_last: bool
    seed: int
    ranks: Ranks

    @property
    def epochs(self) -> EpochOrder:
        """The order that this rank takes part in. Raises ConfigError."""
        rank, world_size = self.ranks()
        return EpochOrder(
            length=self.length,
            batch_size=self.batch_size,
            shuffle=self.shuffle,
            drop_last=self.drop_last,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )

    def __len__(self) -> int:
        return len(self.epochs)

    def batches(self, epoch: int, delivered: int) -> Iterator[BatchIndices]:
        order = self.epochs
        size = order.global_batch_size
        for step in range(delivered // size, len(order)):
            indices = order.indices(epoch, order.positions(step))
            yield BatchIndices(step, (step + 1) * size, indices, np.zeros_like(indices))

    def begin(self) -> None:
        return None

    def state(self) -> None:
        return None

    def resume(self, delivered: int, state: Any, checksum: int | None) -> None:
        size = self.epochs.global_batch_size
        if not 0 <= delivered < len(self) * size or delivered % size:
            raise ConfigError(
                f"places of the state is {delivered} of {self.length}, which must be a multiple of the global batch "
                f"(batch_size x world_size = {size}); change batch_size so that their product stays the same."
            )


class SamplerOrder:
    """The order of a user's sampler, and of the generator that DataLoader would draw from beside it.

    Args:
        batches: The batch sampler.
        sampler: The sampler in it, if it is known.
        generator: The loader's generator.
        length: Samples in an epoch.
        ranks: The rank of this process, which is part of a view if the ranks share the repeats of an index.
    """

    def __init__(
        self,
        batches: Iterable[Sequence[int]],
        sampler: Iterable[int] | None,
        generator: torch.Generator | None,
        length: int,
        ranks: Ranks,
    ) -> None:
        self.batch_sampler = batches
        self.sampler = sampler
        self._generator = generator
        self._length = length
        self._ranks = ranks
        self._restored = False
        self._redrawn: GlobalState | None = None  # the global generators when the resumed epoch began
        self._expected: int | None = None  # the checksum of what was delivered of it

    def __len__(self) -> int:
        return len(self.batch_sampler)  # type: ignore[arg-type]

    def batches(self, epoch: int, delivered: int) -> Iterator[BatchIndices]:
        """Batches in the sampler's order; it is not told the epoch."""
        counted = _Counted(self.sampler, self._length, self._ranks)
        expected, self._expected = self._expected, None
        reached, checksum = 0, 0
        for step, batch in enumerate(self._epoch(delivered)):
            indices, views = counted(batch)
            before, reached = reached, reached + len(indices)
            checksum = zlib.crc32(indices.tobytes(), checksum)
            if reached > delivered:
                yield BatchIndices(step, reached, indices, views, checksum)
            elif reached == delivered > before and expected not in (None, checksum):
                warnings.warn(_INEXACT, ResumeWarning, stacklevel=2)

    def _epoch(self, delivered: int) -> Iterator[Sequence[int]]:
        restored, self._restored = self._restored, False
        state, self._redrawn = self._redrawn, None
        batches = iter(self.batch_sampler)
        empty = True
        if state is not None:  # what was delivered, and the batch after it, are drawn as they were
            with state.restored():
                self._draw_base_seed()
                again, reached = [], 0
                while reached <= delivered and (batch := next(batches, None)) is not None:
                    again.append(batch)
                    reached += len(batch)
            empty = not again
            yield from again
        for batch in batches:
            empty = False
            yield batch
        if restored and empty:  # a sampler that counts what it gave was restored at an epoch's end: the next one begins
            yield from self.batch_sampler

    def begin(self) -> object:
        if self._redrawn is not None:
            return self._redrawn.data
        state = self.state()
        self._draw_base_seed()
        return state

    def _draw_base_seed(self) -> None:
        """DataLoader draws its workers' seed before the order, from its generator or torch's global one."""
        torch.empty((), dtype=torch.int64).random_(generator=self._generator)

    def state(self) -> object:
        stateful = self._stateful()
        if isinstance(stateful, torch.Generator):
            return stateful.get_state()
        if stateful is not None:
            return stateful.state_dict()
        return GlobalState.now().data if self._draws_globally else None

    def resume(self, delivered: int, state: Any, checksum: int | None) -> None:
        self._restored = True
        self._expected = checksum
        self._redrawn = None
        stateful = self._stateful()
        if isinstance(stateful, torch.Generator):
            stateful.set_state(state)
        elif stateful is not None:
            stateful.load_state_dict(state)
        elif self._draws_globally:
            if state is None:
                if delivered:
                    message = f"The state does not hold what redraws its epoch. {_INEXACT}"
                    warnings.warn(message, ResumeWarning, stacklevel=4)
            else:
                self._redrawn = GlobalState(state)

    def _stateful(self) -> Any:
        for candidate in (self.batch_sampler, self.sampler):
            if hasattr(candidate, "state_dict") and hasattr(candidate, "load_state_dict"):
                return candidate
        generator = getattr(self.sampler, "generator", None)
        return generator if isinstance(generator, torch.Generator) else None

    @property
    def _draws_globally(self) -> bool:
        """False if the sampler certainly draws nothing from global generators."""
        sampler: object = self.sampler.sampler if isinstance(self.sampler, Distinct) else self.sampler
        sampler = self.batch_sampler if sampler is None else sampler
        return not isinstance(sampler, list | tuple | range | SequentialSampler | DistributedSampler)


_INEXACT: Final = (
    "The sampler gives another order than the interrupted epoch had, so samples of this epoch may be missing or come "
    "twice; give the sampler a generator of its own (generator=torch.Generator()), or state_dict and load_state_dict."
)


class ResumeWarning(UserWarning):
    """A sampler's order could not be drawn again when a run was resumed inside an epoch."""


@dataclass(frozen=True)
class GlobalState:
    """The states of the global generators of torch (CPU), NumPy and Python, as plain data with tensors."""

    data: Any

    @classmethod
    def now(cls) -> "GlobalState":
        """The present states."""
        kind, keys, *rest = np.random.get_state(legacy=True)
        version, words, gauss = random.getstate()
        return cls(
            {
                "torch": torch.get_rng_state(),
                "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
                "python": (version, torch.tensor(words), gauss),
            }
        )

    def set(self) -> None:
        """Set the generators to these states."""
        kind, keys, *rest = self.data["numpy"]
        version, words, gauss = self.data["python"]
        torch.set_rng_state(self.data["torch"])
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
        random.setstate((version, tuple(words.tolist()), gauss))

    @contextmanager
    def restored(self) -> Iterator[None]:
        """These states within the block, those before it afterwards."""
        before = GlobalState.now()
        self.set()
        try:
            yield
        finally:
            before.set()


# Repeats --------------------------------------------------------------------------------------------------------------


class View:
    """The index of a sample that came before in the epoch, with how often. `distinct` makes them.

    `DiffuseMixDataset` draws other random numbers for each view of an index. Where a plain number is needed it raises:
    a dataset that cannot tell views apart would give the same sample again.
    """

    __slots__ = ("index", "view")

    def __init__(self, index: int, view: int) -> None:
        self.index, self.view = index, view

    def __index__(self) -> int:
        raise ConfigError(
            f"distinct must be used with a DiffuseMixDataset or a part that dataset.subset() made of one, found "
            f"another that takes {self!r} as a number; it would give the same sample for each view."
        )

    def __repr__(self) -> str:
        return f"View({self.index}, {self.view})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, View) and (self.index, self.view) == (other.index, other.view)

    def __hash__(self) -> int:
        return hash((self.index, self.view))


class Distinct(Sampler[Any]):
    """A sampler that numbers the repeats of an index; `distinct` makes it."""

    def __init__(self, sampler: Iterable[int], *, across_ranks: bool) -> None:
        self.sampler = sampler
        self.across_ranks = across_ranks

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int | View]:
        seen = dict[int, int]()
        rank, world_size = _shares(self.sampler, Ranks(None)) if self.across_ranks else (0, 1)
        for one in self.sampler:
            index = operator.index(one)
            count = seen.get(index, 0)
            seen[index] = count + 1
            view = count * world_size + rank
            yield View(index, view) if view else index

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "sampler":
            raise AttributeError(name)
        return getattr(self.sampler, name)


def distinct(sampler: Iterable[int], *, across_ranks: bool = False) -> Distinct:
    """Wrap a sampler that repeats indices, so that each repeat has random numbers of its own.

    `DiffuseMixLoader` counts repeats itself and needs this only for `across_ranks`. `torch.utils.data.DataLoader`,
    whose workers cannot count, gives the same samples with it as the loader.

    Args:
        sampler: Yields indices of a `DiffuseMixDataset`, for example a WeightedRandomSampler.
        across_ranks: The repeats of an index go to different ranks (repeated augmentation): the rank is part of the
            view. torchvision's RASampler and timm's RepeatAugSampler are recognised without it by the loader.
    """
    return Distinct(sampler, across_ranks=across_ranks)


_REPEATED_AUGMENTATION: Final = frozenset({"RASampler", "RepeatAugSampler"})  # of torchvision's references, of timm


def _shares_repeats(sampler: object) -> bool:
    """True if a sampler is known to put the repeats of an index on different ranks."""
    return bool(_REPEATED_AUGMENTATION & {one.__name__ for one in type(sampler).__mro__})


def _shares(sampler: object, ranks: Ranks) -> tuple[int, int]:
    """The rank and the number of ranks for which a sampler yields its share."""
    rank, world_size = getattr(sampler, "rank", None), getattr(sampler, "num_replicas", None)
    return (rank, world_size) if isinstance(rank, int) and isinstance(world_size, int) else ranks()


class _Counted:
    """Turns the batches of an epoch, from its first on, into indices and views."""

    def __init__(self, sampler: object, length: int, ranks: Ranks) -> None:
        self._length = length
        self._numbered = isinstance(sampler, Distinct)
        self._seen = np.zeros(0 if self._numbered else length, dtype=np.int64)
        self._rank, self._world_size = _shares(sampler, ranks) if _shares_repeats(sampler) else (0, 1)

    def __call__(self, batch: Sequence[int | View]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        indices, views = addresses(batch, self._length)
        if self._numbered or not len(indices):
            return indices, views
        counts = self._seen[indices] + occurrences(indices)
        np.add.at(self._seen, indices, 1)
        return indices, np.where(views > 0, views, counts * self._world_size + self._rank)


def occurrences(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,) how often each of n values came before among them."""
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    begins = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
    out = np.empty(len(values), dtype=np.int64)
    out[order] = np.arange(len(values)) - np.repeat(begins, np.diff(np.append(begins, len(values))))
    return out


# Their own order as samplers ------------------------------------------------------------------------------------------


class Position(Protocol):
    """A loader's order, and where its next epoch begins."""

    @property
    def order(self) -> Any: ...

    @property
    def next_epoch(self) -> int: ...

    def set_epoch(self, epoch: int) -> None: ...

    def announce(self, epoch: int) -> None: ...


class OrderSampler(Sampler[int]):
    """The loader's own order of its next epoch on this rank, as a sampler."""

    def __init__(self, position: Position) -> None:
        self.batches = OrderBatchSampler(position)

    def __len__(self) -> int:
        return int(self.batches.position.order.epochs.count())

    def __iter__(self) -> Iterator[int]:
        for batch in self.batches:
            yield from batch

    def set_epoch(self, epoch: int) -> None:
        """Set the loader's next epoch."""
        self.batches.position.set_epoch(epoch)


class OrderBatchSampler(Sampler[list[int]]):
    """The loader's own batches of its next epoch on this rank, as a batch sampler."""

    def __init__(self, position: Position) -> None:
        self.position = position
        self.batch_size = position.order.batch_size
        self.drop_last = position.order.drop_last

    @property
    def sampler(self) -> OrderSampler:
        """The same as a sampler."""
        return OrderSampler(self.position)

    def __len__(self) -> int:
        return len(self.position.order)

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.position.next_epoch
        self.position.announce(epoch)  # a DataLoader over the dataset then gives the samples of this epoch
        for batch in self.position.order.batches(epoch, 0):
            yield batch.indices.tolist()


def addresses(
    batch: Sequence[int | View] | NDArray[np.integer[Any]], length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(n,) indices and views, as a list of `length` takes indices: negative ones count from its end.

    Raises:
        IndexError: there is no such index.
    """
    views = np.zeros(len(batch), dtype=np.int64)
    if isinstance(batch, np.ndarray) and batch.dtype.kind in "iu":
        found = batch.astype(np.int64)
    else:
        if any(isinstance(one, View) for one in batch):
            views[:] = [one.view if isinstance(one, View) else 0 for one in batch]
            batch = [one.index if isinstance(one, View) else one for one in batch]
        found = np.fromiter(map(operator.index, batch), np.int64, len(batch))
    wrong = (found < -length) | (found >= length)
    if wrong.any():
        raise IndexError(f"index {found[wrong][0]} is out of range for a dataset of {length} samples")
    return np.where(found < 0, found + length, found), views
