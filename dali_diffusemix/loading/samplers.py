"""The order in which a loader goes through its samples: its own as a sampler, and a user's sampler as its order."""

import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler


class BatchOrder(NamedTuple):
    """What a batch is made of."""

    step: int
    places: int  # delivered once this is
    indices: NDArray[np.int64]


class UsersOrder:
    """A user's sampler, and the generator that DataLoader would draw from beside it."""

    def __init__(
        self, batches: Iterable[Sequence[int]], sampler: Iterable[int] | None, generator: torch.Generator | None
    ) -> None:
        self.batches = batches
        self.sampler = sampler
        self._generator = generator
        self._restored = False

    def orders(self, places: int) -> Iterator[BatchOrder]:
        """Its batches after so many indices."""
        delivered = 0
        for step, batch in enumerate(self._epoch()):
            delivered += len(batch)
            if delivered > places:
                yield BatchOrder(step, delivered, np.fromiter(map(operator.index, batch), np.int64))

    def _epoch(self) -> Iterator[Sequence[int]]:
        restored, self._restored = self._restored, False
        empty = True
        for batch in self.batches:
            empty = False
            yield batch
        if restored and empty:  # a sampler that counts what it gave was put back to an epoch's end: now comes the next
            yield from self.batches

    def begin(self) -> object:
        """Begin an epoch. Returns the state from which its indices can be drawn again."""
        state = self.state()
        if self._generator is not None:  # DataLoader draws its workers' seed before the order
            torch.empty((), dtype=torch.int64).random_(generator=self._generator)
        return state

    def state(self) -> object:
        """The state from which the next epoch's indices can be drawn; None where it has none that it gives."""
        stateful = self._stateful()
        if isinstance(stateful, torch.Generator):
            return stateful.get_state()
        return None if stateful is None else stateful.state_dict()

    def restore(self, state: Any) -> None:
        """Go back to a state."""
        self._restored = True
        stateful = self._stateful()
        if isinstance(stateful, torch.Generator):
            stateful.set_state(state)
        elif stateful is not None:
            stateful.load_state_dict(state)

    def _stateful(self) -> Any:
        for candidate in (self.batches, self.sampler):
            if hasattr(candidate, "state_dict") and hasattr(candidate, "load_state_dict"):
                return candidate
        generator = getattr(self.sampler, "generator", None)
        return generator if isinstance(generator, torch.Generator) else None


class Ordered(Protocol):
    """What the views of a loader's own order need of it."""

    batch_size: int | None
    drop_last: bool

    def __len__(self) -> int: ...
    def count(self) -> int: ...
    def next_orders(self) -> Iterator[BatchOrder]: ...
    def set_epoch(self, epoch: int) -> None: ...


class OwnOrder(Sampler[int]):
    """The loader's own order on this rank, as a sampler."""

    def __init__(self, loader: Ordered) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return self._loader.count()

    def __iter__(self) -> Iterator[int]:
        for batch in OwnBatches(self._loader):
            yield from batch

    def set_epoch(self, epoch: int) -> None:
        """Choose the loader's next epoch."""
        self._loader.set_epoch(epoch)


class OwnBatches(Sampler[list[int]]):
    """The loader's own batches on this rank, as a batch sampler."""

    def __init__(self, loader: Ordered) -> None:
        self._loader = loader
        self.batch_size = loader.batch_size
        self.drop_last = loader.drop_last

    @property
    def sampler(self) -> OwnOrder:
        return OwnOrder(self._loader)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[list[int]]:
        for order in self._loader.next_orders():
            yield order.indices.tolist()
