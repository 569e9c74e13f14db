"""Upload of decoded pieces to a GPU: one asynchronous copy per batch.

    pieces in host memory ──> one block of page-locked memory ──> one block on the GPU
           copied by threads, off the GIL            on a stream of its own, beside training

What a GPU decodes becomes ready on the same stream. It has no other work: DALI orders its next work behind the stream
that its outputs were handed to, and would wait for training if that were the training stream.

torch's allocators own both blocks: page-locked memory is reused when the copy from it is done, the GPU's when the work
that reads it is done. Blocks are as large as the largest batch of this sample size so far, so that they can replace
each other.
"""

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from dali_diffusemix.base import native

_ALIGNMENT: Final = 256  # bytes, of each piece in its block
_GRAIN: Final = 1 << 21  # bytes that a block is a multiple of


class PieceUpload:
    """Copies the pieces of batches to a device.

    Args:
        device: The target. Tests use the CPU in place of a GPU: everything runs but page-locking and streams.
        threads: Threads that copy into the page-locked block.
    """

    def __init__(self, device: torch.device, threads: int) -> None:
        self._device = device
        self._threads = threads
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._size = 0  # bytes of a block
        self._samples = (0, 0)  # size of the samples that the blocks were for

    @property
    def stream(self) -> int | None:
        """The number of the CUDA stream on which pieces become ready; None for the CPU."""
        return None if self._stream is None else int(self._stream.cuda_stream)

    def __call__(
        self, table: NDArray[np.void], on_host: NDArray[np.bool_], samples: tuple[int, int] = (0, 0)
    ) -> tuple[NDArray[np.void], object]:
        """Let work on torch's current stream read the pieces; copies those that are on the host. Waits for nothing.

        Args:
            table: (2, n) of `mix.call.PIECE`.
            on_host: (2, n) pieces in host memory. They are copied, and not needed afterwards.
            samples: (height, width) of the samples that are made of them.

        Returns:
            The table with all addresses on the device, and the owner of the copies' memory: keep it until the work
            was launched.
        """
        pieces = table.ravel()
        rows = np.flatnonzero(on_host.ravel() & (pieces["data"] != 0))
        if not len(rows):
            self._hand_over()
            return table, None
        lengths = pieces["height"][rows].astype(np.int64) * pieces["width"][rows] * 3
        ends = np.cumsum(-(-lengths // _ALIGNMENT) * _ALIGNMENT)
        starts = ends - -(-lengths // _ALIGNMENT) * _ALIGNMENT
        needed = int(ends[-1])
        before = self._size if samples == self._samples else 0
        self._size, self._samples = max(before, -(-needed // _GRAIN) * _GRAIN), samples
        staging = torch.empty(self._size, dtype=torch.uint8, pin_memory=self._stream is not None)
        native.gather(np.ascontiguousarray(pieces["data"][rows]), lengths, starts, staging.numpy(), self._threads)
        block = self._copied(staging, needed)
        moved = pieces.copy()
        moved["data"][rows] = np.uint64(block.data_ptr()) + starts.astype(np.uint64)
        return moved.reshape(table.shape), block

    def _copied(self, staging: torch.Tensor, length: int) -> torch.Tensor:
        if self._stream is None:
            return staging.clone()
        with torch.cuda.stream(self._stream):
            block = torch.empty(len(staging), dtype=torch.uint8, device=self._device)
            block[:length].copy_(staging[:length], non_blocking=True)
        self._hand_over()
        # Its memory is free for other copies when the current stream is done with it.
        block.record_stream(torch.cuda.current_stream(self._device))
        return block

    def _hand_over(self) -> None:
        """Make the current stream wait for what was submitted so far."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
