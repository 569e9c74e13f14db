"""Counter-based random numbers: a draw is a function of its address, never of what was drawn before.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011): Philox4x32-10. An address
is a key of two 32-bit words and a counter of four; it yields four 32-bit draws.

This is the register of all streams. No two share an address:

    key               counter                                stream
    (seed, epoch)     (index low, index high, field, view)   a sample: MIXED, EDIT, MASK, FRACTAL, WEIGHT, FLIP, and
                                                             CROP and the fields after it, a crop's tries;
                                                             AUGMENT and the fields after it, augmentation
    (drawn, drawn)    (pixel, 0, NOISE, 0)                   noise in an erased rectangle, keyed by its sample's draws
    (seed, epoch)     (step low, step high, field, 0)        the batch transform of rank r: BATCH_TRANSFORM + r
    (seed, epoch)     (round, 0, PERMUTATION, 0)             the epoch's order
    (seed, SPLIT)     (round, 0, PERMUTATION, 0)             the parts of a dataset; no epoch reaches SPLIT
    (seed, FLAME)     (block, step, index, attempt)          fractal flames; no epoch reaches FLAME

Outside this register: editors seed generators of NumPy's or torch's with a SHA-256 of the edit's address
(`generate.worker.edit_seed`), a user's sampler draws from torch's generators, and `bench` and `decode="auto"` take
material for their measurements from NumPy's `default_rng`.
"""

from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dali_diffusemix.base import native
from dali_diffusemix.errors import ConfigError

MIXED: Final = 0
"""Field: whether a sample is mixed."""
EDIT: Final = 1
"""Field: which edit."""
MASK: Final = 2
"""Field: which mask."""
FRACTAL: Final = 3
"""Field: which fractal, and its flips."""
WEIGHT: Final = 4
"""Field: the fractal's weight."""
FLIP: Final = 5
"""Field: a crop's flip."""
CROP: Final = 16
"""Field: a crop's first try; the fields up to AUGMENT are for more."""
AUGMENT: Final = 2**20
"""Field: the first setting of augmentation; `plan.augment` divides the fields up to NOISE."""
NOISE: Final = 2**30
"""Field: noise; no sample draws from it. kernels/augment.cuh has the same number."""
BATCH_TRANSFORM: Final = 2**31
"""Field: the batch transform of rank 0; the other ranks follow."""
PERMUTATION: Final = 2**32 - 1
"""Field: the round keys of the epoch's order."""
SPLIT: Final = 0x53504C54
"""Second word of the key, where the others have the epoch: the parts of a dataset."""
FLAME: Final = 0x464C414D
"""Second word of the key, where the others have the epoch: fractal flames. kernels/flame.cpp has the same number."""

_MULTIPLIER_0: Final = np.uint64(0xD2511F53)
_MULTIPLIER_1: Final = np.uint64(0xCD9E8D57)
_WEYL_0: Final = 0x9E3779B9
_WEYL_1: Final = 0xBB67AE85
_ROUNDS: Final = 10
_LOW: Final = np.uint64(0xFFFFFFFF)
_WORD: Final = np.uint64(32)


def philox4x32(counter: ArrayLike, key: ArrayLike) -> NDArray[np.uint32]:
    """Philox4x32-10 of every counter.

    Args:
        counter: (..., 4) uint32.
        key: (..., 2) uint32, broadcast against the counters' leading axes.

    Returns:
        (..., 4) uint32.
    """
    counter = np.asarray(counter, dtype=np.uint64)
    key = np.asarray(key, dtype=np.uint64)
    if counter.ndim == 1:  # NumPy warns when a scalar wraps around, never when an array does
        return np.asarray(philox4x32(counter[None], key)[0])
    # One contiguous row per word: four times faster than strided columns.
    c0, c1, c2, c3 = (np.ascontiguousarray(counter[..., i]) for i in range(4))
    k0, k1 = key[..., 0], key[..., 1]
    for step in range(_ROUNDS):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        round_0 = (k0 + np.uint64(step * _WEYL_0 & 0xFFFFFFFF)) & _LOW
        round_1 = (k1 + np.uint64(step * _WEYL_1 & 0xFFFFFFFF)) & _LOW
        c0, c1 = (product_1 >> _WORD) ^ c1 ^ round_0, product_1 & _LOW
        c2, c3 = (product_0 >> _WORD) ^ c3 ^ round_1, product_0 & _LOW
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def check_seed(seed: int, epoch: int) -> None:
    """Raise ConfigError unless both fit the key's 32-bit words."""
    for name, value in (("seed", seed), ("epoch", epoch)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            raise ConfigError(f"{name} must be a whole number, found {value!r}.")
        if not 0 <= value < 2**32:
            raise ConfigError(f"{name} must be at least 0 and below 2**32, found {value}.")


def draw(seed: int, epoch: int, indices: ArrayLike, fields: ArrayLike, views: ArrayLike = 0) -> NDArray[np.uint32]:
    """Return four draws for every (index, field).

    Args:
        seed: 0 ≤ seed < 2³².
        epoch: 0 ≤ epoch < 2³².
        indices: (n,) sample indices, 0 ≤ index < 2⁶³.
        fields: (f,) which decision the draws are for, 0 ≤ field < 2³².
        views: (n,) or one for all, how often the index came before in the epoch, 0 ≤ view < 2³².

    Returns:
        (f, n, 4) uint32.
    """
    check_seed(seed, epoch)
    indices = np.ascontiguousarray(indices, dtype=np.uint64)
    fields = np.ascontiguousarray(fields, dtype=np.uint64)
    view = np.ascontiguousarray(np.broadcast_to(np.asarray(views, dtype=np.uint64), indices.shape))
    if (drawn := native.draw(int(seed), int(epoch), indices, view, fields)) is not None:
        return drawn
    counter = np.zeros((fields.size, indices.size, 4), dtype=np.uint64)
    counter[..., 0] = indices & _LOW
    counter[..., 1] = indices >> _WORD
    counter[..., 2] = fields[:, None]
    counter[..., 3] = view
    return philox4x32(counter, (seed, epoch))


def uniform(draws: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Map draws to [0, 1), exactly: the draw over 2³²."""
    return draws.astype(np.float64) * 2.0**-32


def below(draws: NDArray[np.uint32], bound: ArrayLike) -> NDArray[np.int64]:
    """Map draws to integers in [0, bound): the high half of draw × bound (Lemire 2019, bias below bound / 2³²)."""
    product = draws.astype(np.uint64) * np.asarray(bound, dtype=np.uint64)
    return (product >> _WORD).astype(np.int64)


_PERMUTATION_ROUNDS: Final = 16
_MINIMUM_BITS: Final = 4


class Permutation:
    """A pseudo-random order of 0 … length-1 that is computed only where it is looked at.

    A Feistel network over the next power of two, walked along its cycles until the value lies below `length`
    (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). Any position costs the same and nothing is
    stored. Its round keys are Philox draws of (seed, epoch), so every epoch has its own order.
    """

    def __init__(self, length: int, *, seed: int, epoch: int) -> None:
        if not 1 <= length < 2**62:
            raise ConfigError(f"length must be at least 1 and below 2**62, found {length}.")
        self._length = length
        # At least 4 bits: with fewer, a Feistel network cannot reach every order.
        bits = max(_MINIMUM_BITS, (length - 1).bit_length())
        bits += bits % 2
        self._half = np.uint64(bits // 2)
        self._mask = np.uint64((1 << (bits // 2)) - 1)
        draws = draw(seed, epoch, np.arange(_PERMUTATION_ROUNDS), [PERMUTATION])
        # 64 bits of key a round.
        self._keys = draws[0, :, 0].astype(np.uint64) | draws[0, :, 1].astype(np.uint64) << _WORD

    def __len__(self) -> int:
        return self._length

    def __call__(self, positions: ArrayLike) -> NDArray[np.int64]:
        """Return the index at each position; (n,) int64 in, (n,) int64 out."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and not (positions.min() >= 0 and positions.max() < self._length):
            raise ConfigError(
                f"positions must lie in [0, {self._length}), found {positions.min()} to {positions.max()}."
            )
        values = positions.astype(np.uint64)
        if native.permute(values, self._keys, int(self._half), self._length):
            return values.astype(np.int64)
        values = self._encipher(values)
        outside = np.flatnonzero(values >= self._length)
        while outside.size:
            values[outside] = self._encipher(values[outside])
            outside = outside[values[outside] >= self._length]
        return values.astype(np.int64)

    def _encipher(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix64(right ^ key) & self._mask)
        return left << self._half | right


def _mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
