"""The decoder: reads and decodes the pieces of batches in the background, several batches ahead.

`PieceDecoder` is a queue: `submit` a batch's pieces, `fetch` them decoded, in the same order. A thread of its own reads
batches ahead of DALI. DALI gets the visible parts of originals and edits as one list.

    submit ──> read, cut ──┬─> DALI, `ahead` batches of it ───┬──> fetch
                           └─> Pillow, what is not safe ──────┘

DALI only gets JPEGs and PNGs that are safe for it: a header that it cannot parse can crash the process (the thread that
fails leaves the others at work on what it takes down), and from codes with stray markers it makes pixels where Pillow
refuses. One image that DALI cannot decode ends its pipeline; here it costs a rebuild: the batch is decoded again, one
image at a time, and what DALI still refuses goes to Pillow.

DALI's queues do not number batches: an exception between two of its calls (Ctrl-C, for example) would leave one of them
an input ahead, and every later sample would show another sample's pixels. So a decoder can only be closed once an
exception has passed through its calls (`intact`). A batch's number goes through DALI beside its images, and DALI's
output must have this number and the shapes that were asked for.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.base.workers import Result, Workers
from dali_diffusemix.errors import DecodeError, LoaderTimeoutError
from dali_diffusemix.images.codec import decode_listed
from dali_diffusemix.images.reading import IN_STORE, Encoded, Extent, name_of, read
from dali_diffusemix.loading.dali import GpuDecoding, Pipeline, gate
from dali_diffusemix.loading.pieces import Pieces

_log = logging.getLogger(__name__)


class PieceDecoder:
    """Decodes batches in the background, in the order in which they were submitted.

    Args:
        batch_size: Samples per batch; a larger batch takes a new pipeline.
        threads: DALI's worker threads.
        ahead: Batches that DALI gets at once; those behind them are read meanwhile.
        device: Number of the GPU that decodes and keeps the pieces; None is the CPU.
        gpu: How a GPU decodes.
        raw: All images are raw, so DALI is not needed.

    Raises:
        MissingDependencyError: DALI is needed and not installed.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        threads: int,
        ahead: int = 2,
        device: int | None = None,
        gpu: GpuDecoding | None = None,
        raw: bool = False,
    ) -> None:
        self._batch_size = batch_size
        self._threads = threads
        self._ahead = ahead
        self.device = device
        self._gpu = None if device is None else gpu or GpuDecoding()
        self._dali_threads: set[int] = set()
        self._seconds = [0.0, 0.0]  # reading; decoding by the threads of earlier pipelines
        self._lock = gate.lock()
        self._pipelines: dict[bool, Pipeline] = {}  # by whether the GPU decodes
        self._single: dict[bool, Pipeline] = {}  # the same for one image
        self._raw = raw
        if not raw:
            with gate.through(self._lock):
                self._build_pipelines()
        self._reader = Workers(1, "dali-diffusemix-read")
        self._pillow = Workers(threads, "dali-diffusemix-pillow")
        self._reading: deque[Result[_ReadPieces]] = deque()
        self._decoding: deque[_ReadPieces | BaseException] = deque()  # an exception if reading a batch raised it
        self._memory: list[_Memory] = []  # free, to read into
        self._fetched: _ReadPieces | None = None
        self._process = os.getpid()
        self._hangs = False  # the reading thread waits for a storage that does not answer
        self.intact = True
        """True while the decoder can be used: no exception has passed through its calls."""

    @property
    def inherited(self) -> bool:
        """True in a forked process, where the decoder's threads do not exist: it cannot be used there."""
        return os.getpid() != self._process

    @contextmanager
    def _call(self) -> Iterator[None]:
        """Guards everything that changes the queues: the decoder is intact again only if it ends normally."""
        if not self.intact:
            raise RuntimeError("an exception has passed through this decoder, which can only be closed")
        self.intact = False
        with self._lock if self._raw else gate.through(self._lock):
            yield
        self.intact = True

    def submit(self, make: Callable[[], Pieces]) -> None:
        """Start to read and decode a batch; returns at once.

        Args:
            make: Called once, in the reading thread. If it raises, `fetch` raises the same for this batch.
        """
        with self._call():
            memory = self._memory.pop() if self._memory else (None, None)
            self._reading.append(self._reader.submit(_read, make, memory))
            self._advance(wait=False)

    def fetch(self, stream: int | None = None, timeout: float = 0) -> Pieces:
        """Return the oldest batch, decoded.

        Args:
            stream: A CUDA stream, not the default one, that waits for what the GPU decodes; the caller does not wait.
                What the CPU decodes is waited for here. DALI's later work waits for what this stream holds by then.
            timeout: Seconds to wait for its reading; 0 is as long as it takes.

        Raises:
            LoaderTimeoutError: it was not read in time.
        """
        if timeout and not self._decoding and not self._reading[0].wait(timeout):
            self.intact, self._hangs = False, True
            raise LoaderTimeoutError(
                f"timeout of {timeout:g} seconds is over, and a batch is still being read. Check that the storage "
                "answers, or give the loader a longer timeout."
            )
        with self._call():
            self._advance(wait=True)
            batch = self._decoding.popleft()
            if isinstance(batch, BaseException):
                raise batch
            try:
                found = self._outputs(batch, stream)
            except RuntimeError as error:
                _log.info("DALI refused a batch, which is decoded again image by image: %s", error)
                found = self._decode_singly(batch)
                # The pipelines lost the batches behind it.
                old = [part.pipeline for part in batch.parts]
                self._build_pipelines()
                for behind in self._decoding:
                    if isinstance(behind, _ReadPieces) and any(part.pipeline in old for part in behind.parts):
                        self._schedule(behind)
            batch.fill(found)
            # A GPU may still read the batch before this one for a moment after its outputs were handed over.
            if self._fetched is not None:
                self._memory.append(self._fetched.memory)
            self._fetched = batch
            return batch.pieces

    def decode_now(self, pieces: Pieces) -> Pieces:
        """Read and decode a batch ahead of those that were submitted, image by image."""
        with self._call():
            batch = _read(lambda: pieces, (None, None))
            self._decode_aside(batch)
            batch.fill(self._decode_singly(batch))
            return pieces

    def seconds(self) -> tuple[float, float]:
        """Seconds of reading so far, and CPU seconds of DALI's threads (which only decode)."""
        reading, decoding = self._seconds
        for thread in self._dali_threads:
            with suppress(OSError):  # it has ended
                decoding += time.clock_gettime(~thread << 3 | 6)  # Linux's clock of that thread
        return reading, decoding

    def drain(self) -> None:
        """Drop what was submitted and not fetched."""
        with self._call():
            self._reader.drop()
            self._reading.clear()
            while self._decoding:
                batch = self._decoding.popleft()
                if isinstance(batch, BaseException):
                    continue
                try:
                    for part in batch.parts:
                        part.pipeline.outputs(part.number)
                    self._memory.append(batch.memory)
                except RuntimeError:
                    self._decoding.clear()
                    self._build_pipelines()

    def close(self) -> None:
        """Release threads and memory."""
        self.intact = False
        self._reader.close(wait=not self._hangs)
        self._pillow.close()
        self._reading.clear()
        self._decoding.clear()
        self._memory.clear()
        self._pipelines, self._single, self._fetched = {}, {}, None

    def _advance(self, *, wait: bool) -> None:
        """Give DALI what has been read. If DALI has nothing to do, `wait` for a read."""
        while self._reading and len(self._decoding) < self._ahead:
            if (self._decoding or not wait) and not self._reading[0].done():
                break
            reading = self._reading.popleft()
            if (error := reading.error()) is not None:
                self._decoding.append(error)
                continue
            batch = reading.get()
            self._seconds[0] += batch.seconds
            self._decode_aside(batch)
            self._schedule(batch)
            self._decoding.append(batch)

    def _build(self, on_gpu: bool, batch_size: int, threads: int) -> Pipeline:
        return Pipeline(batch_size, threads, device=self.device if on_gpu else None, gpu=self._gpu if on_gpu else None)

    def _build_pipelines(self) -> None:
        self._seconds[1] = self.seconds()[1]
        before = _threads()
        # A batch has an original and an edit of each sample.
        self._pipelines = {on_gpu: self._build(on_gpu, 2 * self._batch_size, self._threads) for on_gpu in self._sides}
        self._dali_threads = _threads() - before

    @property
    def _sides(self) -> tuple[bool, ...]:
        """Which pipelines there are, by whether the GPU decodes."""
        if self._gpu is None:
            return (False,)
        return (True, False) if self._gpu.edits_on_cpu else (True,)

    def _divided(self, batch: "_ReadPieces") -> dict[bool, NDArray[np.int64]]:
        """The images of a batch that DALI gets, by whether the GPU decodes them; it depends on the row alone."""
        if len(self._sides) == 1:
            return {self._sides[0]: batch.fed}
        edits = batch.fed >= len(batch.pieces)
        return {True: batch.fed[~edits], False: batch.fed[edits]}

    def _schedule(self, batch: "_ReadPieces") -> None:
        """Give a batch to the pipelines; to new ones if it is larger than any before."""
        batch.parts = []
        if not len(batch.fed):
            return
        if len(batch.pieces) > self._batch_size:
            self._batch_size = len(batch.pieces)
            self._build_pipelines()
        for on_gpu, images in self._divided(batch).items():
            if len(images):
                pipeline = self._pipelines[on_gpu]
                encoded = [batch.encoded.images[i] for i in images.tolist()]
                number = pipeline.schedule(encoded, batch.encoded.windows[images])
                batch.parts.append(_Part(pipeline, number, images))

    def _outputs(self, batch: "_ReadPieces", stream: int | None) -> "dict[int, _Pixels | DecodeError]":
        """DALI's outputs for a batch, by image."""
        found = dict[int, _Pixels | DecodeError]()
        for part in batch.parts:
            outputs = part.pipeline.outputs(part.number, None if part.pipeline.on_host else stream)
            for position, i in enumerate(part.images.tolist()):
                found[i] = batch.described(i, part.pipeline, outputs[position], outputs)
        return found

    def _decode_aside(self, batch: "_ReadPieces") -> None:
        """Start Pillow on what DALI does not get."""
        for i in batch.unsafe.tolist():
            batch.aside[i] = self._pillow.submit(_decode_by_pillow, batch, i)

    def _decode_singly(self, batch: "_ReadPieces") -> "dict[int, _Pixels | DecodeError]":
        """Decode a batch image by image, so that each result depends on its own file only."""
        return {
            i: self._decode_one(batch, i, on_gpu)
            for on_gpu, images in self._divided(batch).items()
            for i in images.tolist()
        }

    def _decode_one(self, batch: "_ReadPieces", i: int, on_gpu: bool) -> "_Pixels | DecodeError":
        try:
            pipeline = self._single[on_gpu] = self._single.get(on_gpu) or self._build(on_gpu, 1, 1)
            encoded = batch.encoded
            outputs = pipeline.outputs(pipeline.schedule([encoded.images[i]], encoded.windows[i : i + 1]))
            return batch.described(i, pipeline, outputs[0], outputs)
        except RuntimeError:
            self._single.pop(on_gpu, None)
        return _decode_by_pillow(batch, i)


_Memory: TypeAlias = tuple[NDArray[np.uint8] | None, NDArray[np.uint8] | None]
"""Memory that a batch is read into: of files; of raw images."""


class _Pixels(NamedTuple):
    """One decoded piece."""

    address: int
    on_host: bool
    origin: tuple[int, int]  # (top, left) in its image
    shape: tuple[int, int]  # (height, width)
    owner: object


class _Part(NamedTuple):
    """The images of a batch that one pipeline decodes."""

    pipeline: Pipeline
    number: int  # of the batch in the pipeline
    images: NDArray[np.int64]


@dataclass
class _ReadPieces:
    """A batch that was read. Its 2n images are counted through: the originals, then the edits."""

    pieces: Pieces
    windows: NDArray[np.int32]  # (2n, 4) asked for, in the images
    encoded: Encoded  # (2n,)
    memory: "_Memory"
    seconds: float  # of reading
    fed: NDArray[np.int64] = field(init=False)  # images that DALI gets
    unsafe: NDArray[np.int64] = field(init=False)  # images that Pillow gets
    aside: "dict[int, Result[_Pixels | DecodeError]]" = field(default_factory=dict)  # what Pillow makes of those
    parts: list[_Part] = field(default_factory=list)

    def __post_init__(self) -> None:
        read = np.fromiter((image is not None for image in self.encoded.images), np.bool_, len(self.encoded.images))
        self.fed = np.flatnonzero(read & self.encoded.safe)
        self.unsafe = np.flatnonzero(read & ~self.encoded.safe)

    def described(self, i: int, pipeline: Pipeline, pixels: Any, owner: object) -> _Pixels:
        """Describe what a pipeline made of image i. Raises RuntimeError unless it is what was asked for."""
        top, left, bottom, right = self.windows[i].tolist()
        height, width, _ = pixels.shape()
        if pipeline.regions:
            if (height, width) != (bottom - top, right - left):
                raise RuntimeError(f"a window of {bottom - top} x {right - left} came as {height} x {width} pixels")
        else:
            # All that was cut out of the file; the window lies at `cut` in it.
            cut_top, cut_left, cut_bottom, cut_right = self.encoded.windows[i].tolist()
            if height < cut_bottom or width < cut_right:
                raise RuntimeError(f"an image of {cut_bottom} x {cut_right} at least came as {height} x {width} pixels")
            top, left = top - cut_top, left - cut_left
        return _Pixels(pixels.data_ptr(), pipeline.on_host, (top, left), (height, width), owner)

    def fill(self, found: dict[int, _Pixels | DecodeError]) -> None:
        """Fill in the pieces: what DALI made, what Pillow made, and what could not be read."""
        pieces = self.pieces
        results: dict[int, _Pixels | DecodeError] = {**self.encoded.errors, **found}
        results |= {i: result.get() for i, result in self.aside.items()}
        pixels = {i: result for i, result in results.items() if not isinstance(result, DecodeError)}
        for i, result in results.items():
            if isinstance(result, DecodeError):
                pieces.errors[divmod(i, len(pieces))] = result
        if not pixels:
            return
        flat, images = pieces.table.reshape(-1), np.fromiter(pixels, np.int64, len(pixels))
        addresses, on_host, origins, shapes, owners = zip(*pixels.values(), strict=True)
        flat["data"][images], pieces.on_host.reshape(-1)[images] = addresses, on_host
        flat["top"][images], flat["left"][images] = np.array(origins).T
        flat["height"][images], flat["width"][images] = np.array(shapes).T
        pieces.owners.extend({id(owner): owner for owner in owners}.values())


def _read(make: Callable[[], Pieces], memory: "_Memory") -> _ReadPieces:
    """Make a batch's pieces and read their images: one call of the library for files, one for raw images."""
    pieces = make()
    begin = time.perf_counter()
    windows = pieces.windows
    if pieces.locations:
        shown = (windows[:, 2] > windows[:, 0]) & (windows[:, 3] > windows[:, 1])
        wanted = [one if seen else None for one, seen in zip(pieces.locations, shown.tolist(), strict=True)]
        encoded = read(wanted, windows, pieces.sizes, memory[0])
    else:
        encoded = Encoded.none(len(windows))
    pixels = pieces.read_raw(memory[1])
    return _ReadPieces(pieces, windows, encoded, (encoded.memory, pixels), time.perf_counter() - begin)


def _decode_by_pillow(batch: _ReadPieces, i: int) -> _Pixels | DecodeError:
    """The window of image i, or why it cannot be decoded."""
    location, image = batch.pieces.locations[i], batch.encoded.images[i]
    if batch.encoded.safe[i]:  # it may have been cut
        whole = read([location], np.zeros((1, 4), dtype=np.int32))
        image = whole.images[0]
        if image is None:
            return whole.errors[0]
    assert image is not None
    try:
        piece = batch.pieces.table.reshape(-1)[i]
        size = np.array([piece["image_height"], piece["image_width"]])
        pixels = decode_listed(image, size, IN_STORE if isinstance(location, Extent) else None)
    except DecodeError as error:
        return DecodeError(f"{name_of(location)}: {error}")
    top, left, bottom, right = batch.windows[i].tolist()
    window = np.ascontiguousarray(pixels[top:bottom, left:right])
    return _Pixels(window.ctypes.data, True, (top, left), (bottom - top, right - left), window)


def _threads() -> set[int]:
    """This process's threads."""
    return {int(name) for name in os.listdir("/proc/self/task")}  # noqa: PTH208
