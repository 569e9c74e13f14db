"""DALI: reads and decodes the pieces of a batch, several batches ahead, and does nothing else.

`PieceDecoder` is a queue: `submit` a batch's sources, `fetch` its decoded pieces, in order. A thread of its own reads
batches ahead of DALI. DALI's CPU decoder gives the same bytes as Pillow.

    submit ──> read, cut ──┬─> DALI, `ahead` batches of it ───┬──> fetch
                           └─> Pillow, what is not sound ─────┘

DALI is given sound JPEGs and PNGs alone: a header that it cannot parse can crash the process (a batch's last part is
parsed by a thread that leaves the others behind when it fails), and of codes with stray markers it delivers something
where Pillow refuses. One image that DALI cannot decode ends a DALI pipeline; here it costs a rebuild: the batch is
decoded once more, one source at a time, and what DALI still refuses is tried with `pixels.decode`.
"""

import logging
import os
import time
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.errors import DecodeError, MissingDependencyError
from dali_diffusemix.pixels import decode_listed
from dali_diffusemix.reading import IN_STORE, Extent, Place, name_of, read

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


_NO_IMAGE: Final = _Image(0, None)


def dali() -> tuple[Any, Any, Any]:
    """DALI's (fn, pipeline_def, types). Raises MissingDependencyError where it is not installed."""
    try:
        from nvidia.dali import fn, pipeline_def, types
    except ImportError as error:
        raise MissingDependencyError(
            f"DiffuseMixLoader needs NVIDIA DALI, which is not installed or is damaged ({error}): see "
            "`dali-diffusemix doctor`, or pip install 'dali-diffusemix[cpu]' on a machine without a GPU, [cuda12] or "
            "[cuda13] with one. The dataset alone works with torch.utils.data.DataLoader and needs no DALI."
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
        self._device = device
        self._build = partial(_build, device=device, largest=largest)
        self._decoders: set[int] = set()  # the pipeline's threads
        self._seconds = [0.0, 0.0]  # reading; decoding by earlier pipelines' threads
        self._pipeline = self._build_main()
        self._alone: Any = None  # a pipeline for one image
        self._reader = ThreadPoolExecutor(1, "dali-diffusemix-read")
        self._pillow = ThreadPoolExecutor(threads, "dali-diffusemix-pillow")
        self._reading: deque[Future[_Batch]] = deque()
        self._decoding: deque[_Batch] = deque()
        self._memory: list[NDArray[np.uint8]] = []  # to read into
        self._fetched: _Batch | None = None
        self._process = os.getpid()
        _living.add(self)

    @property
    def inherited(self) -> bool:
        """Whether this is a forked process's copy, whose threads stayed behind: it can do nothing."""
        return os.getpid() != self._process

    def submit(self, sources: Sources) -> None:
        """Start to read and decode a batch; returns at once."""
        memory = self._memory.pop() if self._memory else None
        self._reading.append(self._reader.submit(_read, sources, memory))
        self._advance()

    def fetch(self, stream: int | None = None) -> tuple[Decoded, Decoded]:
        """Return the oldest batch's originals and edits.

        Args:
            stream: The CUDA stream that will read the pieces: it is made to wait for them, not the caller. The CPU
                decoder waits here.
        """
        self._advance()
        batch = self._decoding.popleft()
        try:
            outputs = _share_outputs(batch.pipeline, stream)
        except RuntimeError as error:
            _log.info("DALI refused a batch, which is decoded again one by one: %s", error)
            decoded = self._decode_alone(batch)
            # The pipeline took the batches behind with it.
            self._pipeline = self._build_main()
            for behind in self._decoding:
                if behind.pipeline is batch.pipeline:
                    self._schedule(behind)
        else:
            originals, edits = (
                self._gather(source, [_Image(part[i].data_ptr(), None) for i in range(len(part))], part)
                for source, part in zip((batch.originals, batch.edits), outputs, strict=True)
            )
            decoded = originals, edits
        # A GPU may read the batch before this one a little longer than its outputs' hand-over.
        if self._fetched is not None:
            self._memory.append(self._fetched.memory)
        self._fetched = batch
        return decoded

    def decode_now(self, sources: Sources) -> tuple[Decoded, Decoded]:
        """Read and decode a batch beside those that were submitted, one image at a time."""
        batch = _read(sources, None)
        self._decode_unsound(batch)
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
        for future in self._reading:
            future.cancel()
        self._reading.clear()
        while self._decoding:
            try:
                batch = self._decoding.popleft()
                _share_outputs(batch.pipeline, None)
                self._memory.append(batch.memory)
            except RuntimeError:
                self._decoding.clear()
                self._pipeline = self._build_main()

    def close(self) -> None:
        """Give threads and memory back."""
        self._reader.shutdown(cancel_futures=True)
        self._pillow.shutdown(cancel_futures=True)
        self._reading.clear()
        self._decoding.clear()
        self._memory.clear()
        self._fetched = self._alone = self._pipeline = None

    def _advance(self) -> None:
        """Give DALI what has been read. Waits for a read only if DALI has nothing to do."""
        while self._reading and len(self._decoding) < self._ahead:
            if self._decoding and not self._reading[0].done():
                break
            batch = self._reading.popleft().result()
            self._seconds[0] += batch.seconds
            self._decode_unsound(batch)
            self._schedule(batch)
            self._decoding.append(batch)

    def _build_main(self) -> Any:
        self._seconds[1] = self.seconds()[1]
        before = _threads()
        pipeline = self._build(("originals", "edits"), self._batch_size, self._threads)
        self._decoders = _threads() - before
        return pipeline

    def _schedule(self, batch: "_Batch") -> None:
        """Give a batch to the pipeline; to a new one if the batch is larger than any before."""
        if len(batch.originals.places) > self._batch_size:
            self._batch_size = len(batch.originals.places)
            self._pipeline = self._build_main()
        _feed(self._pipeline, "originals", batch.originals)
        _feed(self._pipeline, "edits", batch.edits)
        self._pipeline.schedule_run()
        batch.pipeline = self._pipeline

    def _decode_unsound(self, batch: "_Batch") -> None:
        """Start what DALI is not given."""
        for source in (batch.originals, batch.edits):
            for row in np.flatnonzero(~source.sound).tolist():
                if source.images[row] is not None:
                    source.aside[row] = self._pillow.submit(_decode_by_pillow, source, row)

    def _decode_alone(self, batch: "_Batch") -> tuple[Decoded, Decoded]:
        """Decode a batch one image at a time, so that each result depends on its own file alone."""
        originals, edits = (
            self._gather(source, [self._decode_one(source, row) for row in range(len(source.places))], None)
            for source in (batch.originals, batch.edits)
        )
        return originals, edits

    def _decode_one(self, source: "_Source", row: int) -> "_Image | DecodeError":
        image = source.images[row]
        if image is None or not source.sound[row]:
            return _NO_IMAGE
        try:
            self._alone = self._alone or self._build(("originals",), 1, 1)
            _feed(self._alone, "originals", replace(source, images=[image], cuts=source.cuts[row : row + 1]), [True])
            self._alone.schedule_run()
            (outputs,) = _share_outputs(self._alone, None)
            return _Image(outputs[0].data_ptr(), outputs)
        except RuntimeError:
            self._alone = None
        return self._placed(_decode_by_pillow(source, row))

    def _placed(self, piece: "NDArray[np.uint8] | DecodeError") -> "_Image | DecodeError":
        """A piece on the decoder's device."""
        if isinstance(piece, DecodeError):
            return piece
        if self._device is None:
            return _Image(piece.ctypes.data, piece)
        from dali_diffusemix.gpu import to_device

        return _Image(*to_device(piece, self._device))

    def _gather(self, source: "_Source", results: "Sequence[_Image | DecodeError]", owner: object) -> Decoded:
        """Describe what was decoded of one source; what is missing of the results was decoded aside, or not at all."""
        data = np.zeros(len(results), dtype=np.uint64)
        owners, errors = [owner], dict(source.errors)
        for row, result in enumerate(results):
            if row in source.aside:
                result = self._placed(source.aside[row].result())
            elif source.images[row] is None:
                continue
            if isinstance(result, DecodeError):
                errors[row] = result
            else:
                data[row] = result.address
                if result.owner is not None:
                    owners.append(result.owner)
        return Decoded(
            data=data,
            shapes=source.windows[:, 2:] - source.windows[:, :2],
            places=source.windows[:, :2],
            image_sizes=source.sizes,
            owner=owners,
            errors=errors,
        )


@dataclass
class _Source:
    """One source of a batch, read."""

    places: Sequence[Place | None]
    windows: NDArray[np.int32]  # (n, 4) of the images in their places
    sizes: NDArray[np.int32]  # (n, 2)
    images: Sequence[NDArray[np.uint8] | None]  # encoded
    cuts: NDArray[np.int32]  # (n, 4) the windows in `images`
    sound: NDArray[np.bool_]  # (n,) fit for DALI
    errors: dict[int, DecodeError]
    aside: dict[int, "Future[NDArray[np.uint8] | DecodeError]"] = field(default_factory=dict)  # what DALI is not given


@dataclass
class _Batch:
    """A batch under way."""

    originals: _Source
    edits: _Source
    memory: NDArray[np.uint8]  # that its images lie in
    seconds: float  # that reading took
    pipeline: Any = None  # that decodes it


def _read(sources: Sources, memory: NDArray[np.uint8] | None) -> _Batch:
    """Read what a batch decodes, in one go."""
    begin = time.perf_counter()
    n = len(sources.originals)
    places = [*sources.originals, *sources.edits]
    windows = np.concatenate([sources.original_windows, sources.edit_windows])
    sizes = np.concatenate([sources.original_sizes, sources.edit_sizes])
    wanted = [None if empty else place for place, empty in zip(places, _is_empty(windows).tolist(), strict=True)]
    found = read(wanted, windows, sizes, memory)

    def part(first: int) -> _Source:
        rows = slice(first, first + n)
        errors = {row - first: error for row, error in found.errors.items() if first <= row < first + n}
        return _Source(
            places[rows], windows[rows], sizes[rows], found.images[rows], found.windows[rows], found.sound[rows], errors
        )

    return _Batch(part(0), part(n), found.memory, time.perf_counter() - begin)


def _decode_by_pillow(source: _Source, row: int) -> NDArray[np.uint8] | DecodeError:
    """The window of an image, (height, width, 3) uint8, or why it cannot be decoded."""
    place, image = source.places[row], source.images[row]
    if source.sound[row]:  # perhaps it was cut
        whole = read([place], np.zeros((1, 4), dtype=np.int32))
        image = whole.images[0]
        if image is None:
            return whole.errors[0]
    assert image is not None
    try:
        pixels = decode_listed(image, source.sizes[row], IN_STORE if isinstance(place, Extent) else None)
    except DecodeError as error:
        return DecodeError(f"{name_of(place)}: {error}")
    top, left, bottom, right = source.windows[row]
    return np.ascontiguousarray(pixels[top:bottom, left:right])


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


def decode_by_dali(image: NDArray[np.uint8], size: tuple[int, int], *, device: int | None) -> NDArray[np.uint8]:
    """What DALI alone makes of a whole encoded image, in the way in which `PieceDecoder` has it decoded.

    Args:
        image: (n,) the file's content; sound.
        size: (height, width) of its pixels.
        device: As `PieceDecoder` has it.

    Raises:
        MissingDependencyError: DALI is not installed.
        RuntimeError: DALI cannot decode it.
    """
    pipeline = _build(("image",), 1, 1, device=device, largest=size)
    pipeline.feed_input("image", [image])
    for end, values in zip(_ENDS, ((0, 0), size), strict=True):
        pipeline.feed_input(f"image_{end}", [np.array(values, dtype=np.int32)])
    pipeline.schedule_run()
    (outputs,) = _share_outputs(pipeline, None)
    return np.array(outputs.as_cpu().at(0))


def _share_outputs(pipeline: Any, stream: int | None) -> Any:
    # CUDA's own number of the default stream is 0, which DALI takes for none; 1 names it too.
    outputs = pipeline.share_outputs() if stream is None else pipeline.share_outputs(cuda_stream=stream or 1)
    # Outputs outlive this: DALI's default executor only learns that the next may be made.
    pipeline.release_outputs()
    return outputs


def _threads() -> set[int]:
    """This process's threads."""
    return {int(name) for name in os.listdir("/proc/self/task")}  # noqa: PTH208


def _is_empty(windows: NDArray[np.int32]) -> NDArray[np.bool_]:
    return np.asarray((windows[:, 2] <= windows[:, 0]) | (windows[:, 3] <= windows[:, 1]))


def _feed(pipeline: Any, name: str, source: _Source, sound: Sequence[bool] | None = None) -> None:
    """Feed images and the windows to decode of them; a placeholder's one pixel where there is none to decode."""
    fed = [
        image if image is not None and fit else None
        for image, fit in zip(source.images, source.sound.tolist() if sound is None else sound, strict=True)
    ]
    pipeline.feed_input(name, [_PLACEHOLDER if image is None else image for image in fed])
    none = np.array([image is None for image in fed])
    ends = np.where(none[:, None], np.array([0, 0, 1, 1], dtype=np.int32), source.cuts)
    for end, values in zip(_ENDS, (ends[:, :2], ends[:, 2:]), strict=True):
        pipeline.feed_input(f"{name}_{end}", np.ascontiguousarray(values))
