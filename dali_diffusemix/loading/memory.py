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

    Only memory for samples of the latest size is kept: their size changes with the epoch where the crop does.
    """

    def __init__(self) -> None:
        # Bytes of a sample, and free blocks of such; one object, because several threads change both.
        self._kept: tuple[int, list[NDArray[np.uint8]]] = 0, []

    def take(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
        """Return an array of this shape, whose first axis is the samples, and type; its content is undefined."""
        sample = math.prod(shape[1:]) * dtype.itemsize
        size = shape[0] * sample
        kept = self._kept
        if kept[0] != sample:
            kept = self._kept = sample, []
        block = None
        with suppress(IndexError):  # another thread took the last one
            block = kept[1].pop()
        if block is None or block.nbytes < size:
            block = np.empty(size, dtype=np.uint8)
        array: NDArray[np.generic] = block[:size].view(dtype).reshape(shape)
        weakref.finalize(array, self._give_back, block, sample).atexit = False
        return array

    def _give_back(self, block: NDArray[np.uint8], sample: int) -> None:
        latest, free = self._kept
        if sample == latest and len(free) < _KEPT:
            free.append(block)
