"""The order in which a loader delivers samples: its own, or a user's sampler; and its own order as samplers."""

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

from dali_diffusemix.errors import ConfigError
from dali_diffusemix.plan.order import EpochOrder


class BatchIndices(NamedTuple):
    """The samples of one batch."""

    step: int  # in its epoch
    delivered: int  # positions of the epoch's order that are delivered with this batch
    indices: NDArray[np.int64]  # (n,)


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

    def resume(self, delivered: int, state: Any) -> None:
        """Prepare to go on after so many positions. Raises ConfigError if no batch begins there."""
        ...


@dataclass(frozen=True)
class Ranks:
    """This process's rank and the world size: as given, or those of torch.distributed once it is initialised."""

    given: tuple[int, int] | None

    def __call__(self) -> tuple[int, int]:
        """(rank, world size); (0, 1) in a single process."""
        if self.given is not None:
            return self.given
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return 0, 1
        return distributed.get_rank(), distributed.get_world_size()


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
            yield BatchIndices(step, (step + 1) * size, order.indices(epoch, order.positions(step)))

    def begin(self) -> None:
        return None

    def state(self) -> None:
        return None

    def resume(self, delivered: int, state: Any) -> None:
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
    """

    def __init__(
        self,
        batches: Iterable[Sequence[int]],
        sampler: Iterable[int] | None,
        generator: torch.Generator | None,
        length: int,
    ) -> None:
        self.batch_sampler = batches
        self.sampler = sampler
        self._generator = generator
        self._length = length
        self._restored = False

    def __len__(self) -> int:
        return len(self.batch_sampler)  # type: ignore[arg-type]

    def batches(self, epoch: int, delivered: int) -> Iterator[BatchIndices]:
        """Batches in the sampler's order; it is not told the epoch."""
        reached = 0
        for step, batch in enumerate(self._epoch()):
            reached += len(batch)
            if reached > delivered:
                yield BatchIndices(step, reached, from_the_end(batch, self._length))

    def _epoch(self) -> Iterator[Sequence[int]]:
        restored, self._restored = self._restored, False
        empty = True
        for batch in self.batch_sampler:
            empty = False
            yield batch
        if restored and empty:  # a sampler that counts what it gave was restored at an epoch's end: the next one begins
            yield from self.batch_sampler

    def begin(self) -> object:
        state = self.state()
        if self._generator is not None:  # DataLoader draws its workers' seed before the order
            torch.empty((), dtype=torch.int64).random_(generator=self._generator)
        return state

    def state(self) -> object:
        stateful = self._stateful()
        if isinstance(stateful, torch.Generator):
            return stateful.get_state()
        return None if stateful is None else stateful.state_dict()

    def resume(self, delivered: int, state: Any) -> None:
        self._restored = True
        stateful = self._stateful()
        if isinstance(stateful, torch.Generator):
            stateful.set_state(state)
        elif stateful is not None:
            stateful.load_state_dict(state)

    def _stateful(self) -> Any:
        for candidate in (self.batch_sampler, self.sampler):
            if hasattr(candidate, "state_dict") and hasattr(candidate, "load_state_dict"):
                return candidate
        generator = getattr(self.sampler, "generator", None)
        return generator if isinstance(generator, torch.Generator) else None


class Position(Protocol):
    """Where a loader's next epoch begins."""

    @property
    def next_epoch(self) -> int: ...

    def set_epoch(self, epoch: int) -> None: ...


class OrderSampler(Sampler[int]):
    """The loader's own order of its next epoch on this rank, as a sampler."""

    def __init__(self, order: OwnOrder, position: Position) -> None:
        self.batches = OrderBatchSampler(order, position)

    def __len__(self) -> int:
        return self.batches.order.epochs.count()

    def __iter__(self) -> Iterator[int]:
        for batch in self.batches:
            yield from batch

    def set_epoch(self, epoch: int) -> None:
        """Set the loader's next epoch."""
        self.batches.position.set_epoch(epoch)


class OrderBatchSampler(Sampler[list[int]]):
    """The loader's own batches of its next epoch on this rank, as a batch sampler."""

    def __init__(self, order: OwnOrder, position: Position) -> None:
        self.order = order
        self.position = position
        self.batch_size = order.batch_size
        self.drop_last = order.drop_last

    @property
    def sampler(self) -> OrderSampler:
        """The same as a sampler."""
        return OrderSampler(self.order, self.position)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.order.batches(self.position.next_epoch, 0):
            yield batch.indices.tolist()


def from_the_end(indices: Sequence[int] | NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """(n,) indices as a list of `length` takes them: negative ones count from its end. Raises IndexError."""
    found = np.fromiter(map(operator.index, indices), np.int64, len(indices))
    wrong = (found < -length) | (found >= length)
    if wrong.any():
        raise IndexError(f"index {found[wrong][0]} is out of range for a dataset of {length} samples")
    return np.where(found < 0, found + length, found)
