"""DALI: reads and decodes the pieces of a batch, several batches ahead, and does nothing else.

`PieceDecoder` is a queue: `submit` a batch's sources, `fetch` its decoded pieces, in order. DALI's CPU decoder gives
the same bytes as Pillow. One image that DALI cannot decode ends a DALI pipeline; here it costs a rebuild: the batch
is decoded once more, one source at a time, and what DALI still refuses is tried with `pixels.decode`.
"""

import functools
import logging
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.errors import DecodeError, MissingDependencyError
from dali_diffusemix.pixels import check_size, decode

_log = logging.getLogger(__name__)

# A 1 x 1 picture (PNM): what a row without an edit decodes, for DALI wants every input of a batch alike in number.
_PLACEHOLDER: Final = np.frombuffer(b"P6\n1 1\n255\n\0\0\0", dtype=np.uint8)
_ENDS: Final = ("start", "end")


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What a batch decodes: for each sample a window of its original and one of its edit."""

    originals: Sequence[NDArray[np.uint8]]  # (n,) files' paths, or with `packed` encoded images, which must not change
    edits: Sequence[NDArray[np.uint8] | None]  # (n,) encoded edits; they must not change until fetched
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


@functools.cache
def _placeholder_file() -> NDArray[np.uint8]:
    """The path of a file that holds the placeholder: for files, of which DALI reads one for every sample."""
    descriptor = os.memfd_create("placeholder")
    os.write(descriptor, _PLACEHOLDER.tobytes())
    return np.frombuffer(f"/proc/self/fd/{descriptor}".encode(), dtype=np.uint8)


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


class PieceDecoder:
    """Decodes batches in the background, in the order in which they were submitted.

    Args:
        batch_size: Largest number of samples in a batch.
        threads: DALI's worker threads.
        device: The GPU that decodes and keeps the pieces, its number; None is the CPU.
        largest: (height, width) of the largest image, for which a GPU's decoder makes room at once.
        packed: Originals are given as encoded images, as edits are, and not as files' paths.

    Raises:
        MissingDependencyError: DALI is not installed.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        threads: int,
        device: int | None = None,
        largest: tuple[int, int] = (0, 0),
        packed: bool = False,
    ) -> None:
        self._batch_size = batch_size
        self._threads = threads
        self._device = device
        self._largest = largest
        self._packed = packed
        self._pipeline = self._build()
        # What DALI reads without a copy stays referenced here until it is fetched.
        self._waiting: deque[tuple[Sources, object]] = deque()

    def submit(self, sources: Sources) -> None:
        """Start to decode a batch; returns at once."""
        self._waiting.append((sources, self._schedule(sources)))

    def fetch(self, stream: int | None = None) -> tuple[Decoded, Decoded]:
        """Return the oldest batch's originals and edits.

        Args:
            stream: The CUDA stream that will read the pieces: it is made to wait for them, not the caller. The CPU
                decoder waits here.
        """
        sources, _ = self._waiting[0]
        try:
            originals, edits = self._share_outputs(self._pipeline, stream)
        except RuntimeError as error:
            _log.info("DALI refused a batch, which is decoded again one by one: %s", error)
            decoded = self._rescue(sources)
            self._waiting.popleft()
            # The pipeline took the batches behind with it.
            self._waiting = deque((waiting, self._schedule(waiting)) for waiting, _ in self._waiting)
            return decoded
        self._waiting.popleft()
        return (
            self._describe(originals, sources.original_windows, sources.original_sizes),
            self._describe(edits, sources.edit_windows, sources.edit_sizes),
        )

    def drain(self) -> None:
        """Throw away what was submitted and not fetched."""
        while self._waiting:
            self._waiting.popleft()
            try:
                self._share_outputs(self._pipeline, None)
            except RuntimeError:
                self._waiting.clear()
                self._pipeline = self._build()

    def close(self) -> None:
        """Give DALI's threads and memory back."""
        self._waiting.clear()
        self._pipeline = None

    def _build(self, *, alone: bool = False) -> Any:
        """A pipeline from originals and edits to pixels; `alone` from one image, which it calls an edit."""
        fn, pipeline_def, types = dali()
        height, width = self._largest
        options = {"output_type": types.RGB, "device": "cpu"}
        if self._device is not None:
            options |= {"device": "mixed", "preallocate_height_hint": height, "preallocate_width_hint": width}

        # A queue of one: more batches than that may be scheduled, and unlike a longer queue it does not ask for several
        # before the first is handed out.
        @pipeline_def(  # type: ignore[untyped-decorator]
            batch_size=1 if alone else self._batch_size,
            num_threads=1 if alone else self._threads,
            device_id=self._device,
            prefetch_queue_depth=1,
        )
        def pieces() -> Any:
            def external(name: str) -> Any:
                # What is read is not copied: `_schedule` keeps it.
                return fn.external_source(name=name, dtype=types.UINT8, ndim=1, no_copy=True)

            def window(name: str) -> dict[str, Any]:
                ends = {end: fn.external_source(name=f"{name}_{end}", dtype=types.INT32, ndim=1) for end in _ENDS}
                return {**ends, "axes": [0, 1]}

            decoded = [fn.decoders.image_slice(external("edits"), **window("edits"), **options)]
            if not alone:
                originals = external("originals")
                contents = originals if self._packed else fn.io.file.read(originals)
                decoded.insert(0, fn.decoders.image_slice(contents, **window("originals"), **options))
            return tuple(decoded)

        pipeline = pieces()
        pipeline.build()
        return pipeline

    def _share_outputs(self, pipeline: Any, stream: int | None) -> Any:
        # CUDA's own number of the default stream is 0, which DALI takes for none; 1 names it too.
        outputs = pipeline.share_outputs() if stream is None else pipeline.share_outputs(cuda_stream=stream or 1)
        # Outputs outlive this: DALI's default executor only learns that the next may be made.
        pipeline.release_outputs()
        return outputs

    def _schedule(self, sources: Sources) -> object:
        no_original, no_edit = _is_empty(sources.original_windows), _is_empty(sources.edit_windows)
        placeholder = _PLACEHOLDER if self._packed else _placeholder_file()
        originals = [
            placeholder if empty else original for original, empty in zip(sources.originals, no_original, strict=True)
        ]
        edits = [
            _PLACEHOLDER if empty or edit is None else edit for edit, empty in zip(sources.edits, no_edit, strict=True)
        ]
        _feed(self._pipeline, "originals", originals, sources.original_windows)
        _feed(self._pipeline, "edits", edits, sources.edit_windows)
        self._pipeline.schedule_run()
        return originals, edits

    @staticmethod
    def _describe(outputs: Any, windows: NDArray[np.int32], sizes: NDArray[np.int32]) -> Decoded:
        data = np.array([outputs[i].data_ptr() for i in range(len(outputs))], dtype=np.uint64)
        return Decoded(
            data=np.where(_is_empty(windows), np.uint64(0), data),
            shapes=windows[:, 2:] - windows[:, :2],
            places=windows[:, :2],
            image_sizes=sizes,
            owner=outputs,
            errors={},
        )

    def _rescue(self, sources: Sources) -> tuple[Decoded, Decoded]:
        """Decode a batch one image at a time, so that each result depends on its own file alone."""
        alone = _Alone(self)
        decode_original = alone.decode if self._packed else alone.decode_file
        originals = [
            decode_original(original, window, size) if _area(window) else None
            for original, window, size in zip(
                sources.originals, sources.original_windows, sources.original_sizes, strict=True
            )
        ]
        edits = [
            alone.decode(edit, window, size) if edit is not None and _area(window) else None
            for edit, window, size in zip(sources.edits, sources.edit_windows, sources.edit_sizes, strict=True)
        ]
        self._pipeline = self._build()
        return (
            self._gather(originals, sources.original_windows, sources.original_sizes),
            self._gather(edits, sources.edit_windows, sources.edit_sizes),
        )

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

    def __init__(self, decoder: PieceDecoder) -> None:
        self._decoder = decoder
        self._pipeline: Any = None

    def decode_file(
        self, path: NDArray[np.uint8], window: NDArray[np.int32], size: NDArray[np.int32]
    ) -> _Image | DecodeError:
        name = Path(os.fsdecode(path.tobytes()))
        try:
            content = name.read_bytes()
        except OSError as error:
            return DecodeError(f"{name}: cannot be read ({error}); restore it, or list the folder anew")
        return self.decode(np.frombuffer(content, dtype=np.uint8), window, size, name)

    def decode(
        self,
        content: NDArray[np.uint8],
        window: NDArray[np.int32],
        size: NDArray[np.int32],
        name: Path | None = None,
    ) -> _Image | DecodeError:
        if content.size:
            try:
                self._pipeline = self._pipeline or self._decoder._build(alone=True)
                _feed(self._pipeline, "edits", [content], window[None])
                self._pipeline.schedule_run()
                (outputs,) = self._decoder._share_outputs(self._pipeline, None)
                return _Image(outputs[0].data_ptr(), outputs)
            except RuntimeError:
                self._pipeline = None
        try:
            source = content if name is None else name
            pixels = decode(source)
            check_size(pixels, size, source)
        except DecodeError as error:
            return error
        top, left, bottom, right = window
        piece = np.ascontiguousarray(pixels[top:bottom, left:right])
        if self._decoder._device is None:
            return _Image(piece.ctypes.data, piece)
        from dali_diffusemix.gpu import to_device

        return _Image(*to_device(piece, self._decoder._device))


def _is_empty(windows: NDArray[np.int32]) -> NDArray[np.bool_]:
    return np.asarray((windows[:, 2] <= windows[:, 0]) | (windows[:, 3] <= windows[:, 1]))


def _area(window: NDArray[np.int32]) -> int:
    return int((window[2] - window[0]) * (window[3] - window[1]))


def _feed(pipeline: Any, name: str, encoded: list[NDArray[np.uint8]], windows: NDArray[np.int32]) -> None:
    """Feed images and the windows to decode of them; where a window is empty, a placeholder's one pixel."""
    pipeline.feed_input(name, encoded)
    ends = np.where(_is_empty(windows)[:, None], np.array([0, 0, 1, 1], dtype=np.int32), windows)
    for end, values in zip(_ENDS, (ends[:, :2], ends[:, 2:]), strict=True):
        pipeline.feed_input(f"{name}_{end}", np.ascontiguousarray(values))
