"""The CPU library behind ctypes: kernels/*.cpp, built by setup.py.

It is a plain C library: ctypes releases the GIL around every call, and it does not depend on the Python version.
Where it was not built (no C++ compiler at installation) `library()` is None, said once, and NumPy does the work.
"""

import contextlib
import ctypes
import functools
import logging
import os
from importlib import resources
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

_log = logging.getLogger(__name__)
_FILE = "libdali_diffusemix.so"
_INTERFACE: Final = 4  # kernels/mix.cpp has the same
_DTYPES: Final = ("float32", "float16", "bfloat16", "uint8")  # as kernels/mix.cpp counts them


class SampleFormat(Protocol):
    """Type, layout and normalisation of the samples that a kernel writes; `mix.tensor.TensorFormat` is one."""

    @property
    def dtype(self) -> str:
        """One of float32, float16, bfloat16 and uint8."""
        ...

    @property
    def channels_last(self) -> bool:
        """(height, width, 3) in memory; else (3, height, width)."""
        ...

    def scale_and_offset(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(3,) float32 each: value = pixel × scale + offset."""
        ...


def load() -> ctypes.CDLL:
    """Load the library. Raises OSError or ModuleNotFoundError where it was not built, or built from older sources."""
    with resources.as_file(resources.files("dali_diffusemix.kernels") / _FILE) as path:
        loaded = ctypes.CDLL(str(path))
    found = loaded.dali_diffusemix_interface() if hasattr(loaded, "dali_diffusemix_interface") else 1
    if found != _INTERFACE:
        raise OSError(
            f"{_FILE} was built from another version: it has interface {found}, this version needs {_INTERFACE}"
        )
    return loaded


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None where it was not built. DALI_DIFFUSEMIX_NATIVE=0 pretends it was not."""
    if os.environ.get("DALI_DIFFUSEMIX_NATIVE") == "0":
        return None
    try:
        return load()
    except (OSError, ModuleNotFoundError) as error:
        _log.warning(
            "The CPU kernels were not built (%s): the NumPy definition is used, which is many times slower. "
            "Install a C++ compiler (g++) and reinstall dali-diffusemix with pip's --no-cache-dir to build them.",
            error,
        )
        return None


def mix(
    pieces: NDArray[np.void],
    rows: NDArray[np.void],
    bank: NDArray[np.uint8] | None,
    out: NDArray[np.generic],
    format: SampleFormat,
    operations: NDArray[np.void],
    noise: NDArray[np.uint8] | None,
    threads: int,
) -> bool:
    """Run the fused mix of kernels/mix.cpp; `mix.call.mix` describes and checks the arguments.

    Returns:
        Whether it ran: False where the library was not built.
    """
    loaded = library()
    if loaded is None:
        return False
    bank_size = (0, 0) if bank is None else bank.shape[1:3]
    out_size = out.shape[1:3] if format.channels_last else out.shape[2:]
    scale, offset = format.scale_and_offset()
    pieces = np.ascontiguousarray(pieces)
    short = loaded.dali_diffusemix_mix(
        _address(pieces), _address(rows), ctypes.c_int64(len(rows)),
        None if bank is None else _address(bank), *bank_size,
        _address(out), *out_size, _DTYPES.index(format.dtype), int(format.channels_last),
        _address(scale), _address(offset),
        _address(operations), operations.shape[1], None if noise is None else _address(noise), threads,
    )  # fmt: skip
    if short:
        raise MemoryError("no memory for the working rows of the mix")
    return True


def _address(array: NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def draw(
    seed: int,
    epoch: int,
    indices: NDArray[np.uint64],
    views: NDArray[np.uint64],
    fields: NDArray[np.uint64],
) -> NDArray[np.uint32] | None:
    """(fields, indices, 4) draws, as `philox.draw` describes them; None where the library was not built."""
    loaded = library()
    if loaded is None:
        return None
    out = np.empty((len(fields), len(indices), 4), dtype=np.uint32)
    loaded.dali_diffusemix_draw(
        ctypes.c_uint32(seed), ctypes.c_uint32(epoch), _address(indices), _address(views),
        ctypes.c_int64(len(indices)), _address(fields), ctypes.c_int64(len(fields)), _address(out),
    )  # fmt: skip
    return out


def permute(values: NDArray[np.uint64], keys: NDArray[np.uint64], half: int, length: int) -> bool:
    """Replace positions by what stands at them, as `philox.Permutation`; False where the library was not built."""
    loaded = library()
    if loaded is None:
        return False
    loaded.dali_diffusemix_permute(
        _address(values), ctypes.c_int64(len(values)), _address(keys), ctypes.c_int64(len(keys)), half,
        ctypes.c_uint64(length),
    )  # fmt: skip
    return True


def play_flame(
    maps: NDArray[np.float32],
    palette: NDArray[np.uint8],
    frame: NDArray[np.float32],
    address: tuple[int, int, int],
    first_step: int,
    steps: int,
    points: NDArray[np.float32],
    histogram: NDArray[np.uint32] | None,
    threads: int,
) -> None:
    """Play a fractal flame's chaos game: `points` move on, `histogram` (unless None) gains; both in place.

    Args:
        maps: (maps, 33), at most 16 rows, laid out as kernels/flame.cuh says.
        palette: (256, 3) RGB.
        frame: (4,) x and y of the upper left corner, histogram pixels per unit in x and in y.
        address: (seed, index, attempt), the key and counter of every draw.
        first_step, steps: which steps; a step's draws depend on its number.
        points: (clouds, 3, 1024) x, y and colour in [0, 1].
        histogram: (height + 2, width + 2, 4): hits, and sums of red, green and blue; a border takes the rest.
        threads: at most this many; the result does not depend on it.
    """
    loaded = library()
    assert loaded is not None
    height, width = (2, 2) if histogram is None else histogram.shape[:2]
    short = loaded.dali_diffusemix_flame(
        _address(maps), len(maps), _address(palette), _address(frame), width - 2, height - 2,
        *map(ctypes.c_uint32, address), first_step, steps, _address(points), len(points),
        None if histogram is None else _address(histogram), threads,
    )  # fmt: skip
    if short:
        raise MemoryError("no memory for the histograms of a fractal")


def read(
    paths: bytes,
    path_starts: NDArray[np.int64],
    files: NDArray[np.int32],
    offsets: NDArray[np.int64],
    lengths: NDArray[np.int64],
    windows: NDArray[np.int32],
    sizes: NDArray[np.int32],
    out: NDArray[np.uint8],
    begins: NDArray[np.int64],
    safe: NDArray[np.bool_],
    errors: NDArray[np.int32],
    threads: int,
) -> int:
    """Run kernels/read.cpp, which describes the arguments. The library must be there.

    Returns:
        The bytes that `out` must have room for; if it has not, call again with the arguments as they were.
    """
    loaded = library()
    assert loaded is not None
    loaded.dali_diffusemix_read.restype = ctypes.c_int64
    needed = int(
        loaded.dali_diffusemix_read(
            ctypes.c_int64(len(files)), paths, _address(path_starts), _address(files), _address(offsets),
            _address(lengths), _address(windows), _address(sizes), _address(out), ctypes.c_int64(len(out)),
            _address(begins), _address(safe), _address(errors), threads,
        )
    )  # fmt: skip
    if needed < 0:
        raise MemoryError("no memory to read a batch")
    return needed


def read_stretches(
    files: NDArray[np.int32],
    offsets: NDArray[np.int64],
    lengths: NDArray[np.int64],
    begins: NDArray[np.int64],
    out: NDArray[np.uint8],
    errors: NDArray[np.int32],
    threads: int,
) -> None:
    """Read `lengths[i]` bytes of an open file to `out[begins[i]:]`, for each; kernels/read.cpp has the error numbers.

    Up to `threads` read at once, if storage is slow. The library must be there.
    """
    assert not len(begins) or int((begins + lengths).max()) <= out.nbytes
    loaded = library()
    assert loaded is not None
    loaded.dali_diffusemix_read_stretches(
        ctypes.c_int64(len(files)), _address(files), _address(offsets), _address(lengths), _address(begins),
        _address(out), _address(errors), threads,
    )  # fmt: skip


def gather(
    addresses: NDArray[np.uint64],
    lengths: NDArray[np.int64],
    starts: NDArray[np.int64],
    out: NDArray[np.uint8],
    threads: int,
) -> None:
    """Copy pieces of memory into one: `lengths[i]` bytes at `addresses[i]` to `out[starts[i]:]`, off the GIL."""
    assert not len(starts) or int((starts + lengths).max()) <= out.nbytes
    loaded = library()
    if loaded is None:
        for address, length, start in zip(addresses.tolist(), lengths.tolist(), starts.tolist(), strict=True):
            ctypes.memmove(out.ctypes.data + start, address, length)
        return
    loaded.dali_diffusemix_gather(
        ctypes.c_int64(len(addresses)), _address(addresses), _address(lengths), _address(starts), _address(out), threads
    )


def tile_jpeg(content: bytes, width: int) -> bytes | None:
    """Run kernels/tile.cpp: a JPEG in tiles of at most `width` pixels.

    Returns:
        The new file; None where it cannot be divided or the library was not built.
    """
    loaded = library()
    if loaded is None:
        return None
    loaded.dali_diffusemix_tile_jpeg.restype = ctypes.c_int64
    room = len(content) + len(content) // 4 + 1024
    while True:
        out = np.empty(room, dtype=np.uint8)
        length = int(
            loaded.dali_diffusemix_tile_jpeg(
                content, ctypes.c_int64(len(content)), width, _address(out), ctypes.c_int64(room)
            )
        )
        if length >= 0:
            return out[:length].tobytes() if length else None
        room = -length


def quiet() -> None:
    """Keep the decoding libraries of DALI and Pillow that are loaded by now from printing what they find in files."""
    if (loaded := library()) is not None:
        loaded.dali_diffusemix_quiet()


def trim() -> None:
    """Give freed memory back to the system, where the C library keeps it: decoders' allocations leave much of it."""
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
