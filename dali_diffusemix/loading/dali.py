"""DALI, which is imported only here: one pipeline that decodes, and how DALI is kept alive and quiet.

DALI's CPU decoder gives the same bytes as Pillow. A GPU's (`GpuDecoding`) does not: its transform and its chroma
upsampling are others.
"""

import atexit
import ctypes
import os
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.base.native import quiet
from dali_diffusemix.errors import ConfigError, MissingDependencyError

_ENDS: Final = ("start", "end")


@dataclass(frozen=True, kw_only=True)
class GpuDecoding:
    """Settings of decoding on a GPU, by DALI's mixed decoders, which use nvJPEG and the GPU's JPEG engine.

    Args:
        regions: Decode only the windows that samples show. False: decode whole images, which is all that a JPEG engine
            can do; of JPEGs with restart markers, as edit stores and packed stores hold, only the part that was cut
            out on reading.
        hardware_load: The share of a batch that the JPEG engine decodes, if there is one; 0 to 1.
        edits_on_cpu: Decode edits on the CPU while the GPU decodes the originals.
        fancy_upsampling: Interpolate colours as libjpeg-turbo does.
    """

    regions: bool = False
    hardware_load: float = 0.65
    edits_on_cpu: bool = False
    fancy_upsampling: bool = False

    def __post_init__(self) -> None:
        for name in ("regions", "edits_on_cpu", "fancy_upsampling"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, found {getattr(self, name)!r}; give one of them.")
        if not isinstance(self.hardware_load, int | float) or not 0 <= self.hardware_load <= 1:
            raise ConfigError(
                f"hardware_load must be a number from 0 to 1, found {self.hardware_load!r}; leave it out for 0.65."
            )


def dali() -> tuple[Any, Any, Any]:
    """DALI's (fn, pipeline_def, types). Raises MissingDependencyError if it is not installed."""
    try:
        _import_dali()
        from nvidia.dali import fn, pipeline_def, types
    except ImportError as error:
        raise MissingDependencyError(
            f"DiffuseMixLoader needs NVIDIA DALI, which is not installed or is damaged ({error}): see "
            "`dali-diffusemix doctor`, or pip install 'dali-diffusemix[cpu]' on a machine without a GPU, [cuda12] or "
            "[cuda13] with one. The dataset alone works with torch.utils.data.DataLoader and needs no DALI."
        ) from error
    return fn, pipeline_def, types


def _import_dali() -> None:
    """Import DALI in a thread, because a Ctrl-C in the main thread would leave a half-imported DALI for good."""
    if "nvidia.dali.pipeline" in sys.modules or threading.current_thread() is not threading.main_thread():
        return
    thread = threading.Thread(target=_import_here, name="dali-diffusemix-import", daemon=True)
    thread.start()
    thread.join()


def _import_here() -> None:
    with suppress(ImportError):  # the next import reports it
        import nvidia.dali.fn  # noqa: F401


# DALI's threads do not exist in a forked process, and shutting down or destroying a pipeline there waits for them for
# ever; DALI itself would do so when the process exits. So inherited pipelines are left alone.
_pipelines: weakref.WeakSet["Pipeline"] = weakref.WeakSet()


def _disown_pipelines() -> None:
    for ours in list(_pipelines):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(ours))  # keeps it, and what it holds, from being destroyed
        registry: set[Any] = getattr(type(ours.pipeline), "_pipes", set())  # what DALI shuts down on exit
        registry -= {one for one in registry if one() is ours.pipeline}
    _pipelines.clear()
    gate.reopen()


class _Gate:
    """Keeps threads out of DALI when the interpreter exits: DALI then shuts down even pipelines that are in use."""

    def __init__(self) -> None:
        self._registered = False
        self.reopen()

    def reopen(self) -> None:
        """Begin again in a forked process, which has none of the threads that may hold locks."""
        self._closed = False
        self._locks: weakref.WeakSet[Any] = weakref.WeakSet()

    def lock(self) -> Any:
        """A lock for `through`; reentrant, so that a thread which an exception took out of it may enter again."""
        lock = threading.RLock()
        self._locks.add(lock)
        return lock

    @contextmanager
    def through(self, lock: Any) -> Iterator[None]:
        """Guards calls of DALI: one thread at a time per lock."""
        if not self._registered:
            dali()  # handlers run in reverse order: ours before DALI's
            atexit.register(self._close)
            self._registered = True
        if self._closed:
            if threading.current_thread().daemon:
                threading.Event().wait()  # for ever, as Python does with daemon threads on exit
            raise RuntimeError("the interpreter is exiting and DALI with it: close loaders before")
        with lock:
            yield

    def _close(self) -> None:
        """Only daemon threads are left: wait until they are outside, and keep them there."""
        self._closed = True
        for lock in list(self._locks):
            lock.acquire(timeout=10)  # never released


gate = _Gate()
os.register_at_fork(after_in_child=_disown_pipelines)


class Pipeline:
    """A DALI pipeline that decodes at most `batch_size` encoded images, or windows of them, at a time."""

    def __init__(self, batch_size: int, threads: int, *, device: int | None, gpu: GpuDecoding | None) -> None:
        fn, pipeline_def, types = dali()
        self.regions = gpu is None or gpu.regions
        self.on_host = gpu is None
        options = {"output_type": types.RGB, "device": "cpu"}
        if gpu is not None:
            options |= {
                "device": "mixed",
                "hw_decoder_load": gpu.hardware_load,
                "jpeg_fancy_upsampling": gpu.fancy_upsampling,
            }

        # A queue of one: more batches may be scheduled, and unlike a longer queue it does not request several before it
        # returns the first.
        @pipeline_def(  # type: ignore[untyped-decorator]
            batch_size=batch_size, num_threads=threads, device_id=device, prefetch_queue_depth=1
        )
        def pieces() -> Any:
            # Not copied: the caller keeps it.
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
            number = fn.external_source(name="number", dtype=types.INT64, ndim=0)
            if not self.regions:
                return fn.decoders.image(encoded, **options), number
            ends = {end: fn.external_source(name=end, dtype=types.INT32, ndim=1) for end in _ENDS}
            return fn.decoders.image_slice(encoded, **ends, axes=[0, 1], **options), number

        self.pipeline = pieces()
        self.pipeline.build()
        quiet()
        self._scheduled = 0
        _pipelines.add(self)

    def schedule(self, images: Sequence[NDArray[np.uint8] | None], windows: NDArray[np.int32]) -> int:
        """Start to decode images, or their windows (top, left, bottom, right) if the pipeline decodes windows.

        Returns:
            The batch's number, for `outputs`.
        """
        self._scheduled += 1
        self.pipeline.feed_input("encoded", images)
        self.pipeline.feed_input("number", np.full(len(images), self._scheduled))
        if self.regions:
            for end, values in zip(_ENDS, (windows[:, :2], windows[:, 2:]), strict=True):
                self.pipeline.feed_input(end, np.ascontiguousarray(values))
        self.pipeline.schedule_run()
        return self._scheduled

    def outputs(self, number: int, stream: int | None = None) -> Any:
        """The decoded images of the oldest scheduled batch, as DALI's TensorList. `stream` waits for them.

        Raises:
            RuntimeError: DALI cannot decode one of them, or has mistaken the batch for another.
        """
        share = self.pipeline.share_outputs
        outputs, numbers = share() if stream is None else share(cuda_stream=stream)
        # The outputs stay valid: DALI's default executor only learns that it may make the next.
        self.pipeline.release_outputs()
        found = np.asarray(numbers.as_tensor())
        if len(found) != len(outputs) or (found != number).any():
            raise RuntimeError(f"batch {number} of a DALI pipeline came as {found}")
        return outputs


def decode_by_dali(
    image: NDArray[np.uint8], size: tuple[int, int], *, device: int | None, gpu: GpuDecoding | None = None
) -> NDArray[np.uint8]:
    """The pixels that DALI alone makes of a whole encoded image, decoded as in `PieceDecoder`.

    Args:
        image: (n,) the file's content; safe for DALI.
        size: (height, width) of its pixels.
        device, gpu: As `PieceDecoder` has them.

    Raises:
        MissingDependencyError: DALI is not installed.
        RuntimeError: DALI cannot decode it.
    """
    with gate.through(gate.lock()):
        pipeline = Pipeline(1, 1, device=device, gpu=None if device is None else gpu or GpuDecoding())
        number = pipeline.schedule([image], np.array([(0, 0, *size)], dtype=np.int32))
        return np.array(pipeline.outputs(number).as_cpu().at(0))
