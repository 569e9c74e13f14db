"""Memory for batches on the CPU, used again when a batch is no longer held: fresh pages cost time."""

import math
import weakref
from contextlib import suppress
from typing import Final

import numpy as np
from numpy.typing import NDArray

_KEPT: Final = 4  # free blocks at most


class BatchMemory:
    """Hands out arrays and takes their memory back when nobody holds them.

    A batch's tensor, and every view of its storage, keeps the array that it was made from. Only when that array is gone
    its memory is used again, so a batch that somebody keeps is never overwritten.
    """

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []

    def take(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
        """Return an array of this shape and type; its content is undefined."""
        size = math.prod(shape) * dtype.itemsize
        block = None
        with suppress(IndexError):  # another thread took the last one
            block = self._free.pop()
        if block is None or block.nbytes < size:
            block = np.empty(size, dtype=np.uint8)
        array: NDArray[np.generic] = block[:size].view(dtype).reshape(shape)
        weakref.finalize(array, self._give_back, block).atexit = False
        return array

    def _give_back(self, block: NDArray[np.uint8]) -> None:
        if len(self._free) < _KEPT:
            self._free.append(block)
