"""DALI: reads and decodes the pieces of a batch, several batches ahead, and does nothing else.

`PieceDecoder` is a queue: `submit` a batch's sources, `fetch` its decoded pieces, in order. A thread of its own reads
batches ahead of DALI. DALI is given what a batch shows of originals and edits as one list, and what it shows alone.

    submit ──> read, cut ──┬─> DALI, `ahead` batches of it ───┬──> fetch
                           └─> Pillow, what is not sound ─────┘

DALI's CPU decoder gives the same bytes as Pillow. A GPU's (`GpuDecoding`) does not: its transform and its chroma
upsampling are others.

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
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.errors import ConfigError, DecodeError, MissingDependencyError
from dali_diffusemix.native import quiet
from dali_diffusemix.pixels import decode_listed
from dali_diffusemix.reading import IN_STORE, Extent, Place, name_of, read

_log = logging.getLogger(__name__)

_ENDS: Final = ("start", "end")


@dataclass(frozen=True, kw_only=True)
class GpuDecoding:
    """How a GPU decodes: by DALI's mixed decoders, which use nvJPEG and the GPU's JPEG engine.

    Args:
        regions: Decode of each image only the window that its sample shows. False: whole images, which is all that a
            JPEG engine can do; of a JPEG with restart markers, as edit stores and packed stores hold, that is the part
            that was cut out of it on reading.
        hardware_load: The share of a batch that the JPEG engine decodes, where there is one; 0 to 1.
    """

    regions: bool = False
    hardware_load: float = 0.65

    def __post_init__(self) -> None:
        if not 0 <= self.hardware_load <= 1:
            raise ConfigError(f"hardware_load must be from 0 to 1, found {self.hardware_load}")


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
        self._pipeline: Any = self._build_main()
        self._alone: _Pipeline | None = None  # a pipeline for one image
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
            outputs = [] if batch.pipeline is None else batch.pipeline.outputs(stream)
        except RuntimeError as error:
            _log.info("DALI refused a batch, which is decoded again one by one: %s", error)
            decoded = self._decode_alone(batch)
            # The pipeline took the batches behind with it.
            self._pipeline = self._build_main()
            for behind in self._decoding:
                if behind.pipeline is batch.pipeline:
                    self._schedule(behind)
        else:
            decoded = self._gather(batch, self._pieces_of(batch, outputs), outputs)
        # A GPU may read the batch before this one a little longer than its outputs' hand-over.
        if self._fetched is not None:
            self._memory.append(self._fetched.memory)
        self._fetched = batch
        return decoded

    def decode_now(self, sources: Sources) -> tuple[Decoded, Decoded]:
        """Read and decode a batch beside those that were submitted, one image at a time."""
        batch = _read(sources, None)
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
        for future in self._reading:
            future.cancel()
        self._reading.clear()
        while self._decoding:
            try:
                batch = self._decoding.popleft()
                if batch.pipeline is not None:
                    batch.pipeline.outputs()
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
            self._decode_aside(batch)
            self._schedule(batch)
            self._decoding.append(batch)

    def _build(self, batch_size: int, threads: int) -> "_Pipeline":
        return _Pipeline(batch_size, threads, device=self.device, gpu=self._gpu)

    def _build_main(self) -> "_Pipeline":
        self._seconds[1] = self.seconds()[1]
        before = _threads()
        pipeline = self._build(2 * self._batch_size, self._threads)  # an original and an edit each
        self._decoders = _threads() - before
        return pipeline

    def _schedule(self, batch: "_Batch") -> None:
        """Give a batch to the pipeline; to a new one if the batch is larger than any before."""
        if len(batch) > self._batch_size:
            self._batch_size = len(batch)
            self._pipeline = self._build_main()
        batch.pipeline = None
        if len(batch.fed):
            self._pipeline.schedule([batch.images[row] for row in batch.fed.tolist()], batch.cuts[batch.fed])
            batch.pipeline = self._pipeline

    def _decode_aside(self, batch: "_Batch") -> None:
        """Start what DALI is not given."""
        for row in np.flatnonzero(~batch.sound).tolist():
            if batch.images[row] is not None:
                batch.aside[row] = self._pillow.submit(_decode_by_pillow, batch, row)

    def _decode_alone(self, batch: "_Batch") -> tuple[Decoded, Decoded]:
        """Decode a batch one image at a time, so that each result depends on its own file alone."""
        return self._gather(batch, {row: self._decode_one(batch, row) for row in batch.fed.tolist()}, None)

    def _decode_one(self, batch: "_Batch", row: int) -> _Piece | DecodeError:
        try:
            self._alone = self._alone or self._build(1, 1)
            self._alone.schedule([batch.images[row]], batch.cuts[row : row + 1])
            outputs = self._alone.outputs()
            return self._piece_of(batch, row, outputs[0], outputs)
        except RuntimeError:
            self._alone = None
        return _decode_by_pillow(batch, row)

    def _pieces_of(self, batch: "_Batch", outputs: Any) -> dict[int, _Piece | DecodeError]:
        """What DALI made of what it was fed, by row."""
        return {row: self._piece_of(batch, row, outputs[i], None) for i, row in enumerate(batch.fed.tolist())}

    def _piece_of(self, batch: "_Batch", row: int, pixels: Any, owner: object) -> _Piece:
        top, left, bottom, right = batch.windows[row].tolist()
        if self._gpu is None or self._gpu.regions:
            return _Piece(pixels.data_ptr(), self.device is None, (bottom - top, right - left), (top, left), owner)
        # The whole of what was cut out, which begins where the window lies in the image less where it lies in the cut.
        height, width, _ = pixels.shape()
        cut_top, cut_left = batch.cuts[row, :2].tolist()
        return _Piece(pixels.data_ptr(), False, (height, width), (top - cut_top, left - cut_left), owner)

    def _gather(
        self, batch: "_Batch", results: dict[int, _Piece | DecodeError], owner: object
    ) -> tuple[Decoded, Decoded]:
        """Describe what was decoded of a batch, by DALI and aside."""
        data, on_host = np.zeros(len(batch.places), dtype=np.uint64), np.zeros(len(batch.places), dtype=np.bool_)
        owners = [owner]
        shapes, places = batch.windows[:, 2:] - batch.windows[:, :2], batch.windows[:, :2].copy()
        errors = dict(batch.errors)
        results |= {row: future.result() for row, future in batch.aside.items()}
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


@dataclass
class _Batch:
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
    aside: dict[int, "Future[_Piece | DecodeError]"] = field(default_factory=dict)  # by row: those it is not
    pipeline: "_Pipeline | None" = None  # that decodes it; None: DALI is given nothing

    def __post_init__(self) -> None:
        there = np.fromiter((image is not None for image in self.images), np.bool_, len(self.images))
        self.fed = np.flatnonzero(there & self.sound)

    def __len__(self) -> int:
        return len(self.places) // 2


def _read(sources: Sources, memory: NDArray[np.uint8] | None) -> _Batch:
    """Read what a batch decodes, in one go."""
    begin = time.perf_counter()
    places = [*sources.originals, *sources.edits]
    windows = np.concatenate([sources.original_windows, sources.edit_windows])
    sizes = np.concatenate([sources.original_sizes, sources.edit_sizes])
    empty = (windows[:, 2] <= windows[:, 0]) | (windows[:, 3] <= windows[:, 1])
    wanted = [None if nothing else place for place, nothing in zip(places, empty.tolist(), strict=True)]
    found = read(wanted, windows, sizes, memory)
    return _Batch(
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


def _decode_by_pillow(batch: _Batch, row: int) -> _Piece | DecodeError:
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


class _Pipeline:
    """A DALI pipeline that decodes at most `batch_size` encoded images, or windows of them, at a time."""

    def __init__(self, batch_size: int, threads: int, *, device: int | None, gpu: GpuDecoding | None) -> None:
        fn, pipeline_def, types = dali()
        self._regions = gpu is None or gpu.regions
        options = {"output_type": types.RGB, "device": "cpu"}
        if gpu is not None:
            options |= {"device": "mixed", "hw_decoder_load": gpu.hardware_load}

        # A queue of one: more batches than that may be scheduled, and unlike a longer queue it does not ask for several
        # before the first is handed out.
        @pipeline_def(  # type: ignore[untyped-decorator]
            batch_size=batch_size, num_threads=threads, device_id=device, prefetch_queue_depth=1
        )
        def pieces() -> Any:
            # It is not copied: who feeds it keeps it.
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
            if not self._regions:
                return fn.decoders.image(encoded, **options)
            ends = {end: fn.external_source(name=end, dtype=types.INT32, ndim=1) for end in _ENDS}
            return fn.decoders.image_slice(encoded, **ends, axes=[0, 1], **options)

        self._pipeline = pieces()
        self._pipeline.build()
        quiet()

    def schedule(self, images: Sequence[NDArray[np.uint8] | None], windows: NDArray[np.int32]) -> None:
        """Have images decoded, of each its window (top, left, bottom, right) where the pipeline decodes windows."""
        self._pipeline.feed_input("encoded", images)
        if self._regions:
            for end, values in zip(_ENDS, (windows[:, :2], windows[:, 2:]), strict=True):
                self._pipeline.feed_input(end, np.ascontiguousarray(values))
        self._pipeline.schedule_run()

    def outputs(self, stream: int | None = None) -> Any:
        """The decoded images of the oldest batch that was scheduled, a list of DALI's. `stream` will wait for them."""
        # CUDA's own number of the default stream is 0, which DALI takes for none; 1 names it too.
        share = self._pipeline.share_outputs
        (outputs,) = share() if stream is None else share(cuda_stream=stream or 1)
        # Outputs outlive this: DALI's default executor only learns that the next may be made.
        self._pipeline.release_outputs()
        return outputs


def decode_by_dali(
    image: NDArray[np.uint8], size: tuple[int, int], *, device: int | None, gpu: GpuDecoding | None = None
) -> NDArray[np.uint8]:
    """What DALI alone makes of a whole encoded image, in the way in which `PieceDecoder` has it decoded.

    Args:
        image: (n,) the file's content; sound.
        size: (height, width) of its pixels.
        device, gpu: As `PieceDecoder` has them.

    Raises:
        MissingDependencyError: DALI is not installed.
        RuntimeError: DALI cannot decode it.
    """
    pipeline = _Pipeline(1, 1, device=device, gpu=None if device is None else gpu or GpuDecoding())
    pipeline.schedule([image], np.array([(0, 0, *size)], dtype=np.int32))
    return np.array(pipeline.outputs().as_cpu().at(0))


def _threads() -> set[int]:
    """This process's threads."""
    return {int(name) for name in os.listdir("/proc/self/task")}  # noqa: PTH208
