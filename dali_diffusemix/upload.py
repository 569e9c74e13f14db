"""Decoded pieces from the host's memory to a GPU's: one asynchronous copy for a batch.

    pieces, wherever they are ──> one block of page-locked memory ──> one block on the GPU
           copied by threads, off the GIL            on a stream of its own, beside training

torch's allocators own both blocks: page-locked memory is used again once the copy from it is done, the GPU's once the
work that read it is. Blocks are as large as the largest batch so far, so that they fit each other.
"""

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from dali_diffusemix import native

_ALIGNMENT: Final = 256  # bytes, of each piece in its block
_GRAIN: Final = 1 << 21  # bytes that a block is a multiple of


class PieceUpload:
    """Copies the pieces of batches to a device.

    Args:
        device: Where to. The CPU stands in for a GPU in tests: all is done but the page-locking and the streams.
        threads: That copy into the page-locked block.
    """

    def __init__(self, device: torch.device, threads: int) -> None:
        self._device = device
        self._threads = threads
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._size = 0

    def __call__(self, tables: list[NDArray[np.void]]) -> tuple[list[NDArray[np.void]], torch.Tensor]:
        """Copy what piece tables describe, so that work on torch's current stream may read it. Waits for nothing.

        Args:
            tables: (n,) of `mixing.PIECE` each; their addresses are the host's, and not needed afterwards.

        Returns:
            The tables with addresses on the device, and the block that holds the pieces.
        """
        pieces = np.concatenate(tables)
        rows = np.flatnonzero(pieces["data"])
        lengths = pieces["height"][rows].astype(np.int64) * pieces["width"][rows] * 3
        ends = np.cumsum(-(-lengths // _ALIGNMENT) * _ALIGNMENT)
        starts = ends - -(-lengths // _ALIGNMENT) * _ALIGNMENT
        needed = int(ends[-1]) if len(ends) else 0
        self._size = max(self._size, -(-needed // _GRAIN) * _GRAIN)
        staging = torch.empty(self._size, dtype=torch.uint8, pin_memory=self._stream is not None)
        native.gather(np.ascontiguousarray(pieces["data"][rows]), lengths, starts, staging.numpy(), self._threads)
        block = self._copied(staging, needed)
        moved = pieces.copy()
        moved["data"][rows] = np.uint64(block.data_ptr()) + starts.astype(np.uint64)
        return np.split(moved, np.cumsum([len(table) for table in tables])[:-1]), block

    def _copied(self, staging: torch.Tensor, length: int) -> torch.Tensor:
        if self._stream is None:
            return staging.clone()
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            block = torch.empty(len(staging), dtype=torch.uint8, device=self._device)
            block[:length].copy_(staging[:length], non_blocking=True)
        current.wait_stream(self._stream)
        # Its memory is free for other copies once what the current stream does with it is done.
        block.record_stream(current)
        return block
