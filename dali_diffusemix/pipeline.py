"""DALI: reads and decodes the pieces of a batch, several batches ahead, and does nothing else.

`PieceDecoder` is a queue: `submit` a batch's sources, `fetch` its decoded pieces, in order. DALI's CPU decoder gives
the same bytes as Pillow. One image that DALI cannot decode ends a DALI pipeline; here it costs a rebuild: the batch
is decoded once more, one source at a time, and what DALI still refuses is tried with `pixels.decode`.
"""

import logging
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.errors import DecodeError, MissingDependencyError
from dali_diffusemix.pixels import decode

_log = logging.getLogger(__name__)

# A 1 x 1 picture (PNM): what a row without an edit decodes, for DALI wants every input of a batch alike in number.
_PLACEHOLDER: Final = np.frombuffer(b"P6\n1 1\n255\n\0\0\0", dtype=np.uint8)


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What a batch decodes: a file per sample and, where the sample is mixed, an edit's bytes."""

    paths: Sequence[bytes]
    """(n,) files of the originals."""
    edits: Sequence[NDArray[np.uint8] | None]
    """(n,) encoded edits; None where a sample is not mixed. They must not change until fetched."""

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """The decoded pieces of one source for a batch: whole upright RGB images, (height, width, 3) uint8 each."""

    data: NDArray[np.uint64]  # (n,) addresses; 0: the sample has none
    shapes: NDArray[np.int32]  # (n, 2) (height, width)
    owner: object  # keeps the memory
    errors: dict[int, DecodeError]  # by sample: what could not be decoded; its data is 0

    @classmethod
    def from_arrays(cls, arrays: Sequence[NDArray[np.uint8] | DecodeError | None]) -> Self:
        """Describe pixels that lie in NumPy arrays."""
        images = [a if isinstance(a, np.ndarray) else None for a in arrays]
        return cls(
            data=np.array([0 if a is None else a.ctypes.data for a in images], dtype=np.uint64),
            shapes=np.array([(0, 0) if a is None else a.shape[:2] for a in images], dtype=np.int32).reshape(-1, 2),
            owner=images,
            errors={i: a for i, a in enumerate(arrays) if isinstance(a, DecodeError)},
        )


def dali() -> tuple[Any, Any, Any]:
    """DALI's (fn, pipeline_def, types). Raises MissingDependencyError where it is not installed."""
    try:
        from nvidia.dali import fn, pipeline_def, types
    except ImportError as error:
        raise MissingDependencyError(
            "DiffuseMixLoader needs NVIDIA DALI, which is not installed: pip install 'dali-diffusemix[cpu]' on a "
            "machine without a GPU, [cuda12] or [cuda13] with one. The dataset alone works with "
            "torch.utils.data.DataLoader and needs no DALI."
        ) from error
    return fn, pipeline_def, types


def _build(batch_size: int, threads: int, *, read_files: bool) -> Any:
    """A pipeline from `content`, encoded images (or, with `read_files`, `paths` as well) to pixels."""
    fn, pipeline_def, types = dali()

    # A queue of one: more batches than that may be scheduled, and unlike a longer queue it does not ask for several
    # before the first is handed out.
    @pipeline_def(batch_size=batch_size, num_threads=threads, device_id=None, prefetch_queue_depth=1)  # type: ignore[untyped-decorator]
    def pieces() -> Any:
        encoded = [fn.external_source(name="content", dtype=types.UINT8, ndim=1, no_copy=True)]
        if read_files:
            paths = fn.external_source(name="paths", dtype=types.UINT8, ndim=1, no_copy=True)
            encoded.insert(0, fn.io.file.read(paths))
        return tuple(fn.decoders.image(x, device="cpu", output_type=types.RGB) for x in encoded)

    pipeline = pieces()
    pipeline.build()
    return pipeline


class PieceDecoder:
    """Decodes batches in the background, in the order in which they were submitted.

    Args:
        batch_size: Largest number of samples in a batch.
        threads: DALI's worker threads.

    Raises:
        MissingDependencyError: DALI is not installed.
    """

    def __init__(self, batch_size: int, *, threads: int) -> None:
        self._batch_size = batch_size
        self._threads = threads
        self._pipeline: Any = _build(batch_size, threads, read_files=True)
        # What DALI reads without a copy stays referenced here until it is fetched.
        self._waiting: deque[tuple[Sources, object]] = deque()

    def __len__(self) -> int:
        """Batches submitted and not yet fetched."""
        return len(self._waiting)

    def submit(self, sources: Sources) -> None:
        """Start to decode a batch; returns at once."""
        self._waiting.append((sources, self._schedule(sources)))

    def fetch(self) -> tuple[Decoded, Decoded]:
        """Wait for the oldest batch and return its originals and its edits."""
        sources, _ = self._waiting[0]
        try:
            originals, edits = self._pipeline.share_outputs()
            self._pipeline.release_outputs()
        except RuntimeError as error:
            _log.info("DALI refused a batch, which is decoded again one by one: %s", error)
            decoded = self._rescue(sources)
            self._waiting.popleft()
            # The pipeline took the batches behind with it.
            self._waiting = deque((waiting, self._schedule(waiting)) for waiting, _ in self._waiting)
            return decoded
        self._waiting.popleft()
        mixed = np.array([edit is not None for edit in sources.edits])
        return self._describe(originals, np.ones(len(sources), dtype=np.bool_)), self._describe(edits, mixed)

    def drain(self) -> None:
        """Throw away what was submitted and not fetched."""
        while self._waiting:
            self._waiting.popleft()
            try:
                self._pipeline.share_outputs()
                self._pipeline.release_outputs()
            except RuntimeError:
                self._waiting.clear()
                self._pipeline = _build(self._batch_size, self._threads, read_files=True)

    def close(self) -> None:
        """Give DALI's threads and memory back."""
        self._waiting.clear()
        self._pipeline = None

    def _schedule(self, sources: Sources) -> object:
        paths = [np.frombuffer(path, dtype=np.uint8) for path in sources.paths]
        edits = [_PLACEHOLDER if edit is None else edit for edit in sources.edits]
        self._pipeline.feed_input("paths", paths)
        self._pipeline.feed_input("content", edits)
        self._pipeline.schedule_run()
        return paths, edits

    @staticmethod
    def _describe(outputs: Any, present: NDArray[np.bool_]) -> Decoded:
        data = np.array([outputs[i].data_ptr() for i in range(len(outputs))], dtype=np.uint64)
        shapes = np.array(outputs.shape(), dtype=np.int32)[:, :2]
        return Decoded(data=np.where(present, data, np.uint64(0)), shapes=shapes, owner=outputs, errors={})

    def _rescue(self, sources: Sources) -> tuple[Decoded, Decoded]:
        """Decode a batch one source at a time, so that each result depends on its own file alone."""
        one = _OneByOne()
        originals = [one.decode_file(path) for path in sources.paths]
        edits = [None if edit is None else one.decode(edit) for edit in sources.edits]
        self._pipeline = _build(self._batch_size, self._threads, read_files=True)
        return Decoded.from_arrays(originals), Decoded.from_arrays(edits)


class _OneByOne:
    """Decodes single images with DALI, and with Pillow what DALI refuses."""

    def __init__(self) -> None:
        self._pipeline: Any = None

    def decode_file(self, path: bytes) -> NDArray[np.uint8] | DecodeError:
        name = Path(os.fsdecode(path))
        try:
            content = name.read_bytes()
        except OSError as error:
            return DecodeError(f"{name}: cannot be read ({error}); restore it, or list the folder anew")
        return self.decode(np.frombuffer(content, dtype=np.uint8), name)

    def decode(self, content: NDArray[np.uint8], name: Path | None = None) -> NDArray[np.uint8] | DecodeError:
        if content.size:
            try:
                self._pipeline = self._pipeline or _build(1, 1, read_files=False)
                self._pipeline.feed_input("content", [content])
                self._pipeline.schedule_run()
                (pixels,) = self._pipeline.share_outputs()
                image = np.array(pixels.at(0))
                self._pipeline.release_outputs()
                return image
            except RuntimeError:
                self._pipeline = None
        try:
            return decode(content if name is None else name)
        except DecodeError as error:
            return error
