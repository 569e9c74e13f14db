"""CuPy and the GPU: compiles the kernels at first use and launches them on torch's current stream.

CuPy is imported only here, and only when something is launched: importing this module touches no GPU. Only
`Retained.wait` and the first use of a kernel or a bank wait for the device.
"""

import functools
import importlib.util
import re
import weakref
from collections import deque
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from dali_diffusemix.base.native import SampleFormat
from dali_diffusemix.errors import MissingDependencyError

_TILE: Final = 32  # output pixels of a block, both ways: kTile in kernels/mix.cu
_THREADS: Final = 256  # of a block: kThreads there
_AUGMENT_THREADS: Final = 512  # of a block: kThreads in kernels/augment.cu
_INSTALL: Final = "pip install 'dali-diffusemix[cuda12]' (or [cuda13]) with a PyTorch built for CUDA"


def check_installed() -> None:
    """Raise MissingDependencyError unless CUDA's dependencies are installed. Touches no driver."""
    missing = []
    if torch.version.cuda is None:
        missing.append(f"PyTorch {torch.__version__} is built without CUDA")
    if importlib.util.find_spec("cupy") is None:
        missing.append("CuPy is not installed")
    _refuse(missing)


def check_available() -> None:
    """Raise MissingDependencyError unless there is a usable GPU. Initialises the driver."""
    check_installed()
    if not torch.cuda.is_available():
        cuda = torch.version.cuda
        _refuse([f"no NVIDIA GPU or no driver is found, or the driver is older than PyTorch's CUDA {cuda}"])


def compiler() -> tuple[str, str]:
    """The versions of CuPy and of its compiler, NVRTC. Raises MissingDependencyError."""
    try:
        import cupy

        major, minor = cupy.cuda.nvrtc.getVersion()
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"{error.name} is not installed: {_INSTALL}.") from error
    except RuntimeError as error:
        raise MissingDependencyError(f"CuPy does not find NVRTC ({error}): {_INSTALL}.") from error
    return str(cupy.__version__), f"{major}.{minor}"


def _refuse(missing: list[str]) -> None:
    if missing:
        raise MissingDependencyError(
            f"device='cuda' cannot be used on this machine: {' and '.join(missing)}. On a machine with an NVIDIA GPU: "
            f"{_INSTALL}; without one give device='cpu'."
        )


def source(file: str = "mix.cu") -> str:
    """A CUDA source with its headers inserted: the key of CuPy's cache of compiled kernels is this text alone."""
    folder = resources.files("dali_diffusemix.kernels")
    inserted = set()

    def text(name: str) -> str:
        if name in inserted:
            return ""
        inserted.add(name)
        content = (folder / name).read_text(encoding="utf-8").replace("#pragma once", "")
        return re.sub(r'#include "(\w+\.cuh)"', lambda include: text(include[1]), content)

    return text(file)


def options(name: str | None = None, *, file: str = "mix.cu") -> tuple[str, ...]:
    """NVRTC's options besides the architecture, to compile only the kernel `name` of a file; None: all eight."""
    # 177 would warn about the functions of the headers that only the CPU's kernels call.
    common = ["--std=c++17", "--diag-suppress=177"]
    if file == "augment.cu":  # its pixels are those of the CPU
        common.append("--fmad=false")
    if name is None:
        return tuple(common)
    dtype, layout = name.split("_", 1)[1].split("_", 1)
    last = str(layout == "channels_last").lower()
    return (*common, f"-DMIX_NAME={name}", f"-DMIX_ELEMENT={dtype.capitalize()}", f"-DMIX_CHANNELS_LAST={last}")


@functools.cache
def _kernel(device: int, name: str) -> Any:
    import cupy

    file = f"{name.split('_')[0]}.cu"
    with cupy.cuda.Device(device):
        return cupy.RawModule(code=source(file), options=options(name, file=file)).get_function(name)


class _TorchStream:
    """A stream handle in the protocol of CuPy 14; only late versions of torch's streams have it."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


@functools.cache
def _stream(handle: int, device: int) -> Any:
    """CuPy's object for a torch stream. Kept for good: some CuPy versions destroy the stream with the object."""
    import cupy

    with cupy.cuda.Device(device):
        if hasattr(cupy.cuda.Stream, "from_external"):
            return cupy.cuda.Stream.from_external(_TorchStream(handle))
        return cupy.cuda.ExternalStream(handle, device)


class DeviceBank:
    """A fractal bank in a device's memory, (count, height, width, 3) uint8. `device_bank` shares them."""

    def __init__(self, images: NDArray[np.uint8], device: torch.device) -> None:
        # A copy, since torch cannot hold memory that is mapped read-only.
        self.images = torch.from_numpy(np.array(images)).to(device)

    def __len__(self) -> int:
        return len(self.images)


_banks: weakref.WeakValueDictionary[tuple[object, torch.device], DeviceBank] = weakref.WeakValueDictionary()


def device_bank(key: object, images: NDArray[np.uint8], device: torch.device) -> DeviceBank:
    """The one copy of a bank on a device in this process, made at the first call.

    Args:
        key: Identifies the bank: its path, or an object of its own.
        images: (count, height, width, 3) uint8.
        device: The device.
    """
    bank = _banks.get((key, device))
    if bank is None:
        bank = _banks[key, device] = DeviceBank(images, device)
    return bank


@dataclass(frozen=True)
class DeviceTables:
    """A batch's pieces and rows in device memory, copied by `upload`."""

    count: int  # samples
    pieces: int  # addresses
    rows: int
    owner: object


def upload(pieces: NDArray[np.void], rows: NDArray[np.void], device: torch.device) -> DeviceTables:
    """Copy a batch's tables to the device in one go, on torch's current stream, without waiting.

    Args:
        pieces: (2, n) of `mix.call.PIECE`: originals, edits.
        rows: (n,) of `mix.call.ROW`.
        device: The device.
    """
    staging = torch.empty(pieces.nbytes + rows.nbytes, dtype=torch.uint8, pin_memory=True)
    view = staging.numpy()
    view[: pieces.nbytes] = np.ascontiguousarray(pieces).reshape(-1).view(np.uint8)
    view[pieces.nbytes :] = rows.view(np.uint8)
    # torch does not use pinned memory again before a copy from it is done.
    there = staging.to(device, non_blocking=True)
    return DeviceTables(len(rows), there.data_ptr(), there.data_ptr() + pieces.nbytes, there)


def launch(tables: DeviceTables, bank: DeviceBank | None, out: torch.Tensor, format: SampleFormat) -> None:
    """Launch the mix kernel on torch's current stream; `mix.call.mix_on_device` describes and checks the arguments."""
    import cupy

    device = out.device
    height, width = out.shape[2:]
    scale, offset = format.scale_and_offset()
    pixels = None if bank is None else bank.images
    arguments = (
        np.uintp(tables.pieces),
        np.uintp(tables.rows),
        np.uintp(0 if pixels is None else pixels.data_ptr()),
        np.int32(0 if pixels is None else pixels.shape[1]),
        np.int32(0 if pixels is None else pixels.shape[2]),
        np.uintp(out.data_ptr()),
        np.int32(height),
        np.int32(width),
        *scale,
        *offset,
    )
    grid = (-(-width // _TILE), -(-height // _TILE), tables.count)
    name = f"mix_{format.dtype}_{'channels_last' if format.channels_last else 'nchw'}"
    stream = torch.cuda.current_stream(device).cuda_stream
    with cupy.cuda.Device(device.index), _stream(stream, device.index):
        _kernel(device.index, name)(grid, (_THREADS, 1, 1), arguments)


@functools.cache
def _shared_memory(device: int) -> int:
    """Bytes of shared memory that a block may have for a sample, beside what the kernel itself uses."""
    import cupy

    return int(cupy.cuda.runtime.deviceGetAttribute(97, device)) - 8192  # cudaDevAttrMaxSharedMemoryPerBlockOptin


def augment(
    samples: torch.Tensor,
    operations: NDArray[np.void],
    noise: NDArray[np.uint8] | None,
    out: torch.Tensor,
    format: SampleFormat,
    *,
    blurs: bool,
) -> None:
    """Launch the augmentation kernel on torch's current stream.

    Args:
        samples: (n, 3, height, width) uint8, channels last, on the device; it is overwritten.
        operations: (n, slots) as `mix.augment.lowered` makes them, contiguous.
        noise: (3, 4096) uint8 for erasures with noise, or None.
        out, format: As in `launch`.
        blurs: An operation is a blur.
    """
    import cupy

    device = out.device
    count, _, height, width = out.shape
    scale, offset = format.scale_and_offset()
    tables = [operations.reshape(-1).view(np.uint8), *([] if noise is None else [noise.reshape(-1)])]
    staging = torch.empty(sum(map(len, tables)), dtype=torch.uint8, pin_memory=True)
    staging.numpy()[:] = np.concatenate(tables)
    there = staging.to(device, non_blocking=True)
    nbytes = height * width * 3
    kept = nbytes <= _shared_memory(device.index)
    scratch = None if kept else torch.empty_like(samples)
    rows = torch.empty(samples.numel(), dtype=torch.float32, device=device) if blurs else None
    arguments = (
        np.uintp(samples.data_ptr()),
        np.uintp(0 if scratch is None else scratch.data_ptr()),
        np.uintp(0 if rows is None else rows.data_ptr()),
        np.uintp(there.data_ptr()),
        np.int32(operations.shape[1]),
        np.uintp(0 if noise is None else there.data_ptr() + operations.nbytes),
        np.uintp(out.data_ptr()),
        np.int32(height),
        np.int32(width),
        *scale,
        *offset,
    )
    name = f"augment_{format.dtype}_{'channels_last' if format.channels_last else 'nchw'}"
    stream = torch.cuda.current_stream(device).cuda_stream
    with cupy.cuda.Device(device.index), _stream(stream, device.index):
        kernel = _kernel(device.index, name)
        if kept and kernel.max_dynamic_shared_size_bytes < nbytes:
            kernel.max_dynamic_shared_size_bytes = nbytes
        kernel((count, 1, 1), (_AUGMENT_THREADS, 1, 1), arguments, shared_mem=nbytes if kept else 0)


class Retained:
    """Keeps memory that the device still reads. Each addition releases what has been read, without waiting."""

    def __init__(self) -> None:
        self._kept: deque[tuple[torch.cuda.Event, object]] = deque()

    def add(self, owner: object, device: torch.device) -> None:
        """Keep `owner` until all work now on torch's current stream is done."""
        while self._kept and self._kept[0][0].query():  # type: ignore[no-untyped-call]
            self._kept.popleft()
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        self._kept.append((event, owner))

    def wait(self) -> None:
        """Wait for the device and release everything."""
        while self._kept:
            self._kept.popleft()[0].synchronize()
