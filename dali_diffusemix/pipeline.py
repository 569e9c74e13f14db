"""DALI: reads and decodes the pieces of a batch, several batches ahead, and does nothing else.

`PieceDecoder` is a queue: `submit` a batch's sources, `fetch` its decoded pieces, in order. A thread of its own reads
batches ahead of DALI. DALI's CPU decoder gives the same bytes as Pillow. One image that DALI cannot decode ends a DALI
pipeline; here it costs a rebuild: the batch is decoded once more, one source at a time, and what DALI still refuses is
tried with `pixels.decode`.

    submit ──> read, cut ──> DALI, `ahead` batches of it ──> fetch
"""

import logging
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.errors import DecodeError, MissingDependencyError
from dali_diffusemix.pixels import check_size, decode
from dali_diffusemix.reading import Batch, Place, name_of, read

_log = logging.getLogger(__name__)

# A 1 x 1 picture (PNM): what a row without an edit decodes, for DALI wants every input of a batch alike in number.
_PLACEHOLDER: Final = np.frombuffer(b"P6\n1 1\n255\n\0\0\0", dtype=np.uint8)
_ENDS: Final = ("start", "end")


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What a batch decodes: for each sample a window of its original and one of its edit."""

    originals: Sequence[Place | None]  # (n,)
    edits: Sequence[Place | None]  # (n,); None where there is no edit
    original_windows: NDArray[np.int32]  # (n, 4) top, left, bottom, right, upright pixels; empty: not decoded
    edit_windows: NDArray[np.int32]  # (n, 4); empty also where there is no edit
    original_sizes: NDArray[np.int32]  # (n, 2) (height, width) that the windows are of
    edit_sizes: NDArray[np.int32]  # (n, 2)


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """The decoded pieces of one source for a batch: the windows, upright RGB, (height, width, 3) uint8 each."""

    data: NDArray[np.uint64]  # (n,) addresses, on the decoder's device; 0: the sample has none
    shapes: NDArray[np.int32]  # (n, 2) (height, width) of the pieces
    places: NDArray[np.int32]  # (n, 2) (top, left) of the pieces in their images
    image_sizes: NDArray[np.int32]  # (n, 2) (height, width) of the images
    owner: object  # keeps the memory
    errors: dict[int, DecodeError]  # by sample: what could not be decoded; its data is 0


class _Image(NamedTuple):
    """One decoded image."""

    address: int
    owner: object


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


# DALI's threads do not live on in a forked process, and it ends a process that destroys a pipeline without them.
_living: weakref.WeakSet["PieceDecoder"] = weakref.WeakSet()
_inherited: list["PieceDecoder"] = []
os.register_at_fork(after_in_child=lambda: _inherited.extend(_living))


class PieceDecoder:
    """Decodes batches in the background, in the order in which they were submitted.

    Args:
        batch_size: Samples in a batch; a larger one takes a new pipeline.
        threads: DALI's worker threads.
        ahead: Batches that DALI is given at once; those behind are read meanwhile.
        device: The GPU that decodes and keeps the pieces, its number; None is the CPU.
        largest: (height, width) of the largest image, for which a GPU's decoder makes room at once.

    Raises:
        MissingDependencyError: DALI is not installed.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        threads: int,
        ahead: int = 2,
        device: int | None = None,
        largest: tuple[int, int] = (0, 0),
    ) -> None:
        self._batch_size = batch_size
        self._threads = threads
        self._ahead = ahead
        self._build = partial(_build, device=device, largest=largest)
        self._decoders: set[int] = set()  # the pipeline's threads
        self._seconds = [0.0, 0.0]  # reading; decoding by earlier pipelines' threads
        self._pipeline = self._build_main()
        self._alone = _Alone(self._build, device)
        self._reader = ThreadPoolExecutor(1, "dali-diffusemix-read")
        self._reading: deque[tuple[Sources, Future[_Read]]] = deque()
        self._decoding: deque[tuple[Sources, _Read, Any]] = deque()  # with the pipeline that does it
        self._memory: list[NDArray[np.uint8]] = []  # to read into
        self._fetched: _Read | None = None
        _living.add(self)

    def submit(self, sources: Sources) -> None:
        """Start to read and decode a batch; returns at once."""
        memory = self._memory.pop() if self._memory else None
        self._reading.append((sources, self._reader.submit(_read, sources, memory)))
        self._advance()

    def fetch(self, stream: int | None = None) -> tuple[Decoded, Decoded]:
        """Return the oldest batch's originals and edits.

        Args:
            stream: The CUDA stream that will read the pieces: it is made to wait for them, not the caller. The CPU
                decoder waits here.
        """
        self._advance()
        sources, encoded, pipeline = self._decoding.popleft()
        try:
            originals, edits = _share_outputs(pipeline, stream)
        except RuntimeError as error:
            _log.info("DALI refused a batch, which is decoded again one by one: %s", error)
            decoded = self._decode_alone(sources, encoded)
            # The pipeline took the batches behind with it.
            self._pipeline = self._build_main()
            behind, self._decoding = self._decoding, deque()
            for later_sources, later, its in behind:
                self._decoding.append((later_sources, later, self._schedule(later) if its is pipeline else its))
        else:
            decoded = (
                self._describe(originals, sources.original_windows, sources.original_sizes, encoded.originals),
                self._describe(edits, sources.edit_windows, sources.edit_sizes, encoded.edits),
            )
        # A GPU may read the batch before this one a little longer than its outputs' hand-over.
        if self._fetched is not None:
            self._memory.append(self._fetched.memory)
        self._fetched = encoded
        return decoded

    def decode_now(self, sources: Sources) -> tuple[Decoded, Decoded]:
        """Read and decode a batch beside those that were submitted, one image at a time."""
        return self._decode_alone(sources, _read(sources, None))

    def seconds(self) -> tuple[float, float]:
        """What reading took so far, and the processor time of DALI's threads (which do nothing but decode)."""
        reading, decoding = self._seconds
        for thread in self._decoders:
            with suppress(OSError):  # it has ended
                decoding += time.clock_gettime(~thread << 3 | 6)  # Linux's clock of that thread
        return reading, decoding

    def drain(self) -> None:
        """Throw away what was submitted and not fetched."""
        for _, future in self._reading:
            future.cancel()
        self._reading.clear()
        while self._decoding:
            _, _, pipeline = self._decoding.popleft()
            try:
                _share_outputs(pipeline, None)
            except RuntimeError:
                self._decoding.clear()
                self._pipeline = self._build_main()

    def close(self) -> None:
        """Give DALI's threads and memory back."""
        self._reader.shutdown(cancel_futures=True)
        self._reading.clear()
        self._decoding.clear()
        self._memory.clear()
        self._fetched = None
        self._alone.close()
        self._pipeline = None

    def _advance(self) -> None:
        """Give DALI what has been read. Waits for a read only if DALI has nothing to do."""
        while self._reading and len(self._decoding) < self._ahead:
            if self._decoding and not self._reading[0][1].done():
                break
            sources, future = self._reading.popleft()
            encoded = future.result()
            self._seconds[0] += encoded.seconds
            self._decoding.append((sources, encoded, self._schedule(encoded)))

    def _build_main(self) -> Any:
        self._seconds[1] = self.seconds()[1]
        before = _threads()
        pipeline = self._build(("originals", "edits"), self._batch_size, self._threads)
        self._decoders = _threads() - before
        return pipeline

    def _schedule(self, encoded: "_Read") -> Any:
        """Give a batch to the pipeline, which is returned; to a new one if the batch is larger than any before."""
        if len(encoded.originals.images) > self._batch_size:
            self._batch_size = len(encoded.originals.images)
            self._pipeline = self._build_main()
        _feed(self._pipeline, "originals", encoded.originals)
        _feed(self._pipeline, "edits", encoded.edits)
        self._pipeline.schedule_run()
        return self._pipeline

    @staticmethod
    def _describe(outputs: Any, windows: NDArray[np.int32], sizes: NDArray[np.int32], encoded: Batch) -> Decoded:
        data = np.array([outputs[i].data_ptr() for i in range(len(outputs))], dtype=np.uint64)
        data[_is_empty(windows)] = 0
        data[list(encoded.errors)] = 0
        return Decoded(
            data=data,
            shapes=windows[:, 2:] - windows[:, :2],
            places=windows[:, :2],
            image_sizes=sizes,
            owner=outputs,
            errors=encoded.errors,
        )

    def _decode_alone(self, sources: Sources, encoded: "_Read") -> tuple[Decoded, Decoded]:
        """Decode a batch one image at a time, so that each result depends on its own file alone."""

        def decoded(
            places: Sequence[Place | None], windows: NDArray[np.int32], sizes: NDArray[np.int32], batch: Batch
        ) -> Decoded:
            results = [
                batch.errors.get(i) if image is None else self._alone.decode(place, image, cut, window, size)
                for i, (place, image, cut, window, size) in enumerate(
                    zip(places, batch.images, batch.windows, windows, sizes, strict=True)
                )
            ]
            return self._gather(results, windows, sizes)

        originals = decoded(sources.originals, sources.original_windows, sources.original_sizes, encoded.originals)
        edits = decoded(sources.edits, sources.edit_windows, sources.edit_sizes, encoded.edits)
        return originals, edits

    @staticmethod
    def _gather(
        results: Sequence[_Image | DecodeError | None], windows: NDArray[np.int32], sizes: NDArray[np.int32]
    ) -> Decoded:
        images = [result if isinstance(result, _Image) else _Image(0, None) for result in results]
        return Decoded(
            data=np.array([image.address for image in images], dtype=np.uint64),
            shapes=windows[:, 2:] - windows[:, :2],
            places=windows[:, :2],
            image_sizes=sizes,
            owner=images,
            errors={i: result for i, result in enumerate(results) if isinstance(result, DecodeError)},
        )


class _Alone:
    """Decodes windows of single images as a decoder does, and with Pillow what DALI refuses."""

    def __init__(self, build: Callable[..., Any], device: int | None) -> None:
        self._build = build
        self._device = device
        self._pipeline: Any = None

    def close(self) -> None:
        self._pipeline = None

    def decode(
        self,
        place: Place | None,
        image: NDArray[np.uint8],
        cut: NDArray[np.int32],
        window: NDArray[np.int32],
        size: NDArray[np.int32],
    ) -> _Image | DecodeError:
        """Decode the window `cut` of an encoded image, which is `window` of the one in its place."""
        try:
            self._pipeline = self._pipeline or self._build(("edits",), 1, 1)
            _feed(self._pipeline, "edits", Batch([image], cut[None], {}, image))
            self._pipeline.schedule_run()
            (outputs,) = _share_outputs(self._pipeline, None)
            return _Image(outputs[0].data_ptr(), outputs)
        except RuntimeError:
            self._pipeline = None
        whole = read([place], np.zeros((1, 4), dtype=np.int32))
        if whole.images[0] is None:
            return whole.errors[0]
        try:
            pixels = decode(whole.images[0])
            check_size(pixels, size, "the image")
        except DecodeError as error:
            return DecodeError(f"{name_of(place)}: {error}")
        top, left, bottom, right = window
        piece = np.ascontiguousarray(pixels[top:bottom, left:right])
        if self._device is None:
            return _Image(piece.ctypes.data, piece)
        from dali_diffusemix.gpu import to_device

        return _Image(*to_device(piece, self._device))


def _build(names: Sequence[str], batch_size: int, threads: int, *, device: int | None, largest: tuple[int, int]) -> Any:
    """A pipeline that decodes windows of encoded images; for each name it has three inputs and one output."""
    fn, pipeline_def, types = dali()
    options = {"output_type": types.RGB, "device": "cpu"}
    if device is not None:
        height, width = largest
        options |= {"device": "mixed", "preallocate_height_hint": height, "preallocate_width_hint": width}

    # A queue of one: more batches than that may be scheduled, and unlike a longer queue it does not ask for several
    # before the first is handed out.
    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=batch_size, num_threads=threads, device_id=device, prefetch_queue_depth=1
    )
    def pieces() -> Any:
        def window(name: str) -> dict[str, Any]:
            ends = {end: fn.external_source(name=f"{name}_{end}", dtype=types.INT32, ndim=1) for end in _ENDS}
            return {**ends, "axes": [0, 1]}

        def encoded(name: str) -> Any:
            # It is not copied: who feeds it keeps it.
            return fn.external_source(name=name, dtype=types.UINT8, ndim=1, no_copy=True)

        return tuple(fn.decoders.image_slice(encoded(name), **window(name), **options) for name in names)

    pipeline = pieces()
    pipeline.build()
    return pipeline


def _share_outputs(pipeline: Any, stream: int | None) -> Any:
    # CUDA's own number of the default stream is 0, which DALI takes for none; 1 names it too.
    outputs = pipeline.share_outputs() if stream is None else pipeline.share_outputs(cuda_stream=stream or 1)
    # Outputs outlive this: DALI's default executor only learns that the next may be made.
    pipeline.release_outputs()
    return outputs


class _Read(NamedTuple):
    """A batch's encoded images."""

    originals: Batch
    edits: Batch
    memory: NDArray[np.uint8]  # that both lie in
    seconds: float  # that it took


def _read(sources: Sources, memory: NDArray[np.uint8] | None) -> _Read:
    """Read what a batch decodes, in one go."""
    begin = time.perf_counter()
    windows = np.concatenate([sources.original_windows, sources.edit_windows])
    places = [
        None if empty else place
        for place, empty in zip([*sources.originals, *sources.edits], _is_empty(windows).tolist(), strict=True)
    ]
    sizes = np.concatenate([sources.original_sizes, sources.edit_sizes])
    batch, n = read(places, windows, sizes, memory), len(sources.originals)
    errors: tuple[dict[int, DecodeError], ...] = ({}, {})
    for row, error in batch.errors.items():
        errors[row // n][row % n] = error
    originals = Batch(batch.images[:n], batch.windows[:n], errors[0], batch.memory)
    edits = Batch(batch.images[n:], batch.windows[n:], errors[1], batch.memory)
    return _Read(originals, edits, batch.memory, time.perf_counter() - begin)


def _threads() -> set[int]:
    """This process's threads."""
    return {int(name) for name in os.listdir("/proc/self/task")}  # noqa: PTH208


def _is_empty(windows: NDArray[np.int32]) -> NDArray[np.bool_]:
    return np.asarray((windows[:, 2] <= windows[:, 0]) | (windows[:, 3] <= windows[:, 1]))


def _feed(pipeline: Any, name: str, batch: Batch) -> None:
    """Feed images and the windows to decode of them; a placeholder's one pixel where there is none."""
    pipeline.feed_input(name, [_PLACEHOLDER if image is None else image for image in batch.images])
    none = np.array([image is None for image in batch.images])
    ends = np.where(none[:, None], np.array([0, 0, 1, 1], dtype=np.int32), batch.windows)
    for end, values in zip(_ENDS, (ends[:, :2], ends[:, 2:]), strict=True):
        pipeline.feed_input(f"{name}_{end}", np.ascontiguousarray(values))
