"""The decoder: reads and decodes the pieces of a batch, several batches ahead, and does nothing else.

`PieceDecoder` is a queue: `submit` a batch's sources, `fetch` its decoded pieces, in order. A thread of its own reads
batches ahead of DALI. DALI is given what a batch shows of originals and edits as one list, and what it shows alone.

    submit ──> read, cut ──┬─> DALI, `ahead` batches of it ───┬──> fetch
                           └─> Pillow, what is not sound ─────┘

DALI is given sound JPEGs and PNGs alone: a header that it cannot parse can crash the process (a batch's last part is
parsed by a thread that leaves the others behind when it fails), and of codes with stray markers it delivers something
where Pillow refuses. One image that DALI cannot decode ends a DALI pipeline; here it costs a rebuild: the batch is
decoded once more, one source at a time, and what DALI still refuses is tried with `codec.decode`.

DALI's queues know no batches: an exception between two of its calls, a Ctrl-C for one, would leave it an input ahead,
and every later sample would show another's pixels. So a decoder through whose calls an exception has passed can only
be closed (`intact`), a batch's number goes through DALI beside its images, and what comes out must have that number and
the shapes that were asked for.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.base.workers import Result, Workers
from dali_diffusemix.errors import DecodeError
from dali_diffusemix.images.codec import decode_listed
from dali_diffusemix.images.reading import IN_STORE, Extent, Place, name_of, read
from dali_diffusemix.loading.dali import GpuDecoding, Pipeline, gate

_log = logging.getLogger(__name__)


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
    """The decoded pieces of one source for a batch: upright RGB, (height, width, 3) uint8 each.

    A piece holds its window; a GPU that decodes no regions makes it larger.
    """

    data: NDArray[np.uint64]  # (n,) addresses; 0: the sample has none
    on_host: NDArray[np.bool_]  # (n,) the addresses are the host's; else they are the decoder's device's
    shapes: NDArray[np.int32]  # (n, 2) (height, width) of the pieces
    places: NDArray[np.int32]  # (n, 2) (top, left) of the pieces in their images
    image_sizes: NDArray[np.int32]  # (n, 2) (height, width) of the images
    owner: object  # keeps the memory
    errors: dict[int, DecodeError]  # by sample: what could not be decoded; its data is 0


class _Piece(NamedTuple):
    """One decoded piece."""

    address: int
    on_host: bool
    shape: tuple[int, int]
    place: tuple[int, int]  # in its image
    owner: object


class PieceDecoder:
    """Decodes batches in the background, in the order in which they were submitted.

    Args:
        batch_size: Samples in a batch; a larger one takes a new pipeline.
        threads: DALI's worker threads.
        ahead: Batches that DALI is given at once; those behind are read meanwhile.
        device: The GPU that decodes and keeps the pieces, its number; None is the CPU.
        gpu: How a GPU decodes.

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
        gpu: GpuDecoding | None = None,
    ) -> None:
        self._batch_size = batch_size
        self._threads = threads
        self._ahead = ahead
        self.device = device
        self._gpu = None if device is None else gpu or GpuDecoding()
        self._decoders: set[int] = set()  # the pipeline's threads
        self._seconds = [0.0, 0.0]  # reading; decoding by earlier pipelines' threads
        self._lock = gate.lock()
        self._pipelines: dict[bool, Pipeline] = {}  # by whether the GPU decodes
        self._alone: dict[bool, Pipeline] = {}  # for one image
        with gate.through(self._lock):
            self._build_main()
        self._reader = Workers(1, "dali-diffusemix-read")
        self._pillow = Workers(threads, "dali-diffusemix-pillow")
        self._reading: deque[Result[_ReadBatch]] = deque()
        self._decoding: deque[_ReadBatch | BaseException] = deque()  # an exception where a batch could not be begun
        self._memory: list[NDArray[np.uint8]] = []  # to read into
        self._fetched: _ReadBatch | None = None
        self._process = os.getpid()
        self.intact = True
        """Whether it can be used: no exception has passed through its calls."""

    @property
    def inherited(self) -> bool:
        """Whether this is a forked process's copy, whose threads stayed behind: it can do nothing."""
        return os.getpid() != self._process

    @contextmanager
    def _call(self) -> Iterator[None]:
        """Around all that changes the queues: intact again only if it comes to its end."""
        if not self.intact:
            raise RuntimeError("an exception has passed through this decoder, which can only be closed")
        self.intact = False
        with gate.through(self._lock):
            yield
        self.intact = True

    def submit(self, sources: Callable[[], Sources]) -> None:
        """Start to read and decode a batch; returns at once.

        Args:
            sources: Called once, in the thread that reads. What it raises, `fetch` raises when the batch's turn comes.
        """
        with self._call():
            memory = self._memory.pop() if self._memory else None
            self._reading.append(self._reader.submit(_read, sources, memory))
            self._advance()

    def fetch(self, stream: int | None = None) -> tuple[Decoded, Decoded]:
        """Return the oldest batch's originals and edits.

        Args:
            stream: A CUDA stream, not the default one: it is made to wait for what a GPU decodes, not the caller. What
                the CPU decodes is waited for here. DALI's later work waits for what is on that stream by then.
        """
        with self._call():
            self._advance()
            batch = self._decoding.popleft()
            if isinstance(batch, BaseException):
                raise batch
            try:
                pieces, owner = self._decoded(batch, stream)
            except RuntimeError as error:
                _log.info("DALI refused a batch, which is decoded again one by one: %s", error)
                decoded = self._decode_alone(batch)
                # The pipelines took the batches behind with them.
                old = [part.pipeline for part in batch.parts]
                self._build_main()
                for behind in self._decoding:
                    if isinstance(behind, _ReadBatch) and any(part.pipeline in old for part in behind.parts):
                        self._schedule(behind)
            else:
                decoded = self._gather(batch, pieces, owner)
            # A GPU may read the batch before this one a little longer than its outputs' hand-over.
            if self._fetched is not None:
                self._memory.append(self._fetched.memory)
            self._fetched = batch
            return decoded

    def decode_now(self, sources: Sources) -> tuple[Decoded, Decoded]:
        """Read and decode a batch beside those that were submitted, one image at a time."""
        with self._call():
            batch = _read(lambda: sources, None)
            self._decode_aside(batch)
            return self._decode_alone(batch)

    def seconds(self) -> tuple[float, float]:
        """What reading took so far, and the processor time of DALI's threads (which do nothing but decode)."""
        reading, decoding = self._seconds
        for thread in self._decoders:
            with suppress(OSError):  # it has ended
                decoding += time.clock_gettime(~thread << 3 | 6)  # Linux's clock of that thread
        return reading, decoding

    def drain(self) -> None:
        """Throw away what was submitted and not fetched."""
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
                    self._build_main()

    def close(self) -> None:
        """Give threads and memory back."""
        self.intact = False
        self._reader.close()
        self._pillow.close()
        self._reading.clear()
        self._decoding.clear()
        self._memory.clear()
        self._pipelines, self._alone, self._fetched = {}, {}, None

    def _advance(self) -> None:
        """Give DALI what has been read. Waits for a read only if DALI has nothing to do."""
        while self._reading and len(self._decoding) < self._ahead:
            if self._decoding and not self._reading[0].done():
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

    def _build(self, on_gpu: bool, batch_size: int, threads: int) -> "Pipeline":
        return Pipeline(batch_size, threads, device=self.device if on_gpu else None, gpu=self._gpu if on_gpu else None)

    def _build_main(self) -> None:
        self._seconds[1] = self.seconds()[1]
        before = _threads()
        # A batch has an original and an edit of each sample.
        self._pipelines = {
            on_gpu: self._build(on_gpu, 2 * self._batch_size, self._threads) for on_gpu in self._divided(None)
        }
        self._decoders = _threads() - before

    def _divided(self, batch: "_ReadBatch | None") -> dict[bool, NDArray[np.int64]]:
        """The rows of a batch that DALI is given, by whether the GPU decodes them; that follows from the row alone."""
        fed = np.zeros(0, dtype=np.int64) if batch is None else batch.fed
        if self._gpu is None:
            return {False: fed}
        if not self._gpu.edits_on_cpu:
            return {True: fed}
        edits = np.zeros(0, dtype=np.bool_) if batch is None else fed >= len(batch)
        return {True: fed[~edits], False: fed[edits]}

    def _schedule(self, batch: "_ReadBatch") -> None:
        """Give a batch to the pipelines; to new ones if the batch is larger than any before."""
        if len(batch) > self._batch_size:
            self._batch_size = len(batch)
            self._build_main()
        batch.parts = []
        for on_gpu, rows in self._divided(batch).items():
            if len(rows):
                pipeline = self._pipelines[on_gpu]
                number = pipeline.schedule([batch.images[row] for row in rows.tolist()], batch.cuts[rows])
                batch.parts.append(_Part(pipeline, number, rows))

    def _decoded(self, batch: "_ReadBatch", stream: int | None) -> "tuple[dict[int, _Piece | DecodeError], object]":
        """What DALI made of a batch, by row, and what keeps it."""
        pieces, owners = dict[int, _Piece | DecodeError](), []
        for part in batch.parts:
            outputs = part.pipeline.outputs(part.number, None if part.pipeline.on_host else stream)
            owners.append(outputs)
            for i, row in enumerate(part.rows.tolist()):
                pieces[row] = _piece_of(batch, row, part.pipeline, outputs[i], None)
        return pieces, owners

    def _decode_aside(self, batch: "_ReadBatch") -> None:
        """Start what DALI is not given."""
        for row in np.flatnonzero(~batch.sound).tolist():
            if batch.images[row] is not None:
                batch.aside[row] = self._pillow.submit(_decode_by_pillow, batch, row)

    def _decode_alone(self, batch: "_ReadBatch") -> tuple[Decoded, Decoded]:
        """Decode a batch one image at a time, so that each result depends on its own file alone."""
        found = {
            row: self._decode_one(batch, row, on_gpu)
            for on_gpu, rows in self._divided(batch).items()
            for row in rows.tolist()
        }
        return self._gather(batch, found, None)

    def _decode_one(self, batch: "_ReadBatch", row: int, on_gpu: bool) -> _Piece | DecodeError:
        try:
            pipeline = self._alone[on_gpu] = self._alone.get(on_gpu) or self._build(on_gpu, 1, 1)
            outputs = pipeline.outputs(pipeline.schedule([batch.images[row]], batch.cuts[row : row + 1]))
            return _piece_of(batch, row, pipeline, outputs[0], outputs)
        except RuntimeError:
            self._alone.pop(on_gpu, None)
        return _decode_by_pillow(batch, row)

    def _gather(
        self, batch: "_ReadBatch", results: dict[int, _Piece | DecodeError], owner: object
    ) -> tuple[Decoded, Decoded]:
        """Describe what was decoded of a batch, by DALI and aside."""
        data, on_host = np.zeros(len(batch.places), dtype=np.uint64), np.zeros(len(batch.places), dtype=np.bool_)
        owners = [owner]
        shapes, places = batch.windows[:, 2:] - batch.windows[:, :2], batch.windows[:, :2].copy()
        errors = dict(batch.errors)
        results |= {row: result.get() for row, result in batch.aside.items()}
        for row, result in results.items():
            if isinstance(result, DecodeError):
                errors[row] = result
            else:
                data[row], on_host[row], shapes[row], places[row], one = result
                if one is not None:
                    owners.append(one)

        def source(rows: slice) -> Decoded:
            return Decoded(
                data=data[rows],
                on_host=on_host[rows],
                shapes=shapes[rows],
                places=places[rows],
                image_sizes=batch.sizes[rows],
                owner=owners,
                errors={row - rows.start: error for row, error in errors.items() if rows.start <= row < rows.stop},
            )

        return source(slice(0, len(batch))), source(slice(len(batch), 2 * len(batch)))


class _Part(NamedTuple):
    """What of a batch a pipeline decodes."""

    pipeline: "Pipeline"
    number: int  # of the batch in the pipeline
    rows: NDArray[np.int64]


@dataclass
class _ReadBatch:
    """A batch under way: its n originals, then its n edits."""

    places: Sequence[Place | None]  # (2n,)
    windows: NDArray[np.int32]  # (2n, 4) of the images in their places
    sizes: NDArray[np.int32]  # (2n, 2)
    images: Sequence[NDArray[np.uint8] | None]  # (2n,) encoded; None: nothing of it is seen, or it cannot be read
    cuts: NDArray[np.int32]  # (2n, 4) the windows in `images`
    sound: NDArray[np.bool_]  # (2n,) fit for DALI
    errors: dict[int, DecodeError]
    memory: NDArray[np.uint8]  # that the images lie in
    seconds: float  # that reading took
    fed: NDArray[np.int64] = field(init=False)  # the rows that DALI is given
    aside: dict[int, Result[_Piece | DecodeError]] = field(default_factory=dict)  # by row: those it is not
    parts: "list[_Part]" = field(default_factory=list)

    def __post_init__(self) -> None:
        there = np.fromiter((image is not None for image in self.images), np.bool_, len(self.images))
        self.fed = np.flatnonzero(there & self.sound)

    def __len__(self) -> int:
        return len(self.places) // 2


def _read(make: Callable[[], Sources], memory: NDArray[np.uint8] | None) -> _ReadBatch:
    """Read what a batch decodes, in one go."""
    sources = make()
    begin = time.perf_counter()
    places = [*sources.originals, *sources.edits]
    windows = np.concatenate([sources.original_windows, sources.edit_windows])
    sizes = np.concatenate([sources.original_sizes, sources.edit_sizes])
    empty = (windows[:, 2] <= windows[:, 0]) | (windows[:, 3] <= windows[:, 1])
    wanted = [None if nothing else place for place, nothing in zip(places, empty.tolist(), strict=True)]
    found = read(wanted, windows, sizes, memory)
    return _ReadBatch(
        places=places,
        windows=windows,
        sizes=sizes,
        images=found.images,
        cuts=found.windows,
        sound=found.sound,
        errors=found.errors,
        memory=found.memory,
        seconds=time.perf_counter() - begin,
    )


def _decode_by_pillow(batch: _ReadBatch, row: int) -> _Piece | DecodeError:
    """The window of an image, on the host, or why it cannot be decoded."""
    place, image = batch.places[row], batch.images[row]
    if batch.sound[row]:  # perhaps it was cut
        whole = read([place], np.zeros((1, 4), dtype=np.int32))
        image = whole.images[0]
        if image is None:
            return whole.errors[0]
    assert image is not None
    try:
        pixels = decode_listed(image, batch.sizes[row], IN_STORE if isinstance(place, Extent) else None)
    except DecodeError as error:
        return DecodeError(f"{name_of(place)}: {error}")
    top, left, bottom, right = batch.windows[row].tolist()
    window = np.ascontiguousarray(pixels[top:bottom, left:right])
    return _Piece(window.ctypes.data, True, (bottom - top, right - left), (top, left), window)


def _piece_of(batch: _ReadBatch, row: int, pipeline: "Pipeline", pixels: Any, owner: object) -> _Piece:
    """Describe what a pipeline made of a row. Raises RuntimeError if that is not what was asked for."""
    top, left, bottom, right = batch.windows[row].tolist()
    height, width, _ = pixels.shape()
    if pipeline.regions:
        if (height, width) != (bottom - top, right - left):
            raise RuntimeError(f"a window of {bottom - top} x {right - left} came as {height} x {width} pixels")
    else:
        # The whole of what was cut out, which begins where the window lies in the image less where it lies in the cut.
        cut_top, cut_left, cut_bottom, cut_right = batch.cuts[row].tolist()
        if height < cut_bottom or width < cut_right:
            raise RuntimeError(f"an image of {cut_bottom} x {cut_right} at least came as {height} x {width} pixels")
        top, left = top - cut_top, left - cut_left
    return _Piece(pixels.data_ptr(), pipeline.on_host, (height, width), (top, left), owner)


def _threads() -> set[int]:
    """This process's threads."""
    return {int(name) for name in os.listdir("/proc/self/task")}  # noqa: PTH208
