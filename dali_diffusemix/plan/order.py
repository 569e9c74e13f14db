"""The order of an epoch: the samples of every rank's batches."""

import functools
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.base.philox import SPLIT, Permutation, check_seed
from dali_diffusemix.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EpochOrder:
    """The samples of a rank's batches: the epoch's order cut into global batches, those cut among ranks.

    Global batch s is batch_size x world_size consecutive positions of the order. Rank r takes batch_size of them,
    from r x batch_size on. The last R < batch_size x world_size positions are cut at R x r // world_size; if
    R < world_size they are first filled up to world_size from the epoch's start. So with the global batch size
    fixed, every full step sees the same samples whatever the number of ranks, and all ranks take as many steps.
    """

    length: int
    """Samples in the epoch."""
    batch_size: int
    """Samples per rank and step."""
    shuffle: bool = False
    drop_last: bool = False
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        check_seed(self.seed, 0)
        for name, value in (
            ("length", self.length),
            ("batch_size", self.batch_size),
            ("world_size", self.world_size),
        ):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, found {value}.")
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank must lie in [0, world_size {self.world_size}), found {self.rank}.")

    @property
    def global_batch_size(self) -> int:
        """Positions that all ranks together take in one step."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Steps in an epoch, equal on all ranks."""
        if self.drop_last:
            return self.length // self.global_batch_size
        return -(-self.length // self.global_batch_size)

    def count(self) -> int:
        """Samples that this rank takes in an epoch."""
        steps = len(self)
        return (steps - 1) * self.batch_size + len(self.positions(steps - 1)) if steps else 0

    def positions(self, step: int) -> NDArray[np.int64]:
        """(n,) positions in the epoch's order that this rank takes at `step`."""
        if not 0 <= step < len(self):
            raise ConfigError(f"step must lie in [0, {len(self)}), found {step}.")
        start = step * self.global_batch_size
        remaining = self.length - start
        if remaining >= self.global_batch_size:
            first = start + self.rank * self.batch_size
            return np.arange(first, first + self.batch_size)
        filled = max(remaining, self.world_size)
        low, high = filled * self.rank // self.world_size, filled * (self.rank + 1) // self.world_size
        return (start + np.arange(low, high)) % self.length

    def indices(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) sample indices at these positions of this epoch."""
        if not self.shuffle:
            return positions
        block = positions // _BLOCK
        out = np.empty(len(positions), dtype=np.int64)
        for number in np.unique(block):
            here = block == number
            out[here] = _order_block(self.length, self.seed, epoch, int(number))[positions[here] % _BLOCK]
        return out


_BLOCK: Final = 8192


@functools.lru_cache(maxsize=8)
def _order_block(length: int, seed: int, epoch: int, number: int) -> NDArray[np.int64]:
    """A block of the epoch's order. NumPy computes one in little more time than a batch of it."""
    start = number * _BLOCK
    block = Permutation(length, seed=seed, epoch=epoch)(np.arange(start, min(start + _BLOCK, length)))
    block.setflags(write=False)
    return block


def split_order(count: int, seed: int) -> NDArray[np.int64]:
    """(count,) 0 ... count - 1 in a random order, from which the parts of a dataset are drawn."""
    check_seed(seed, 0)
    return Permutation(count, seed=seed, epoch=SPLIT)(np.arange(count))
