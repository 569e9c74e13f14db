"""Reading: the encoded images of a batch, in one block of memory, cut down to the windows that are shown.

One call of the C library reads a batch without the GIL. Files are read, not mapped: a mapping kills the process when
its file shrinks, and waits for storage page by page, in the decoder's threads. JPEGs with restart markers, as
`codec.encode` writes them, are cut down to the tiles that a window touches, so the decoder has nothing to skip.
`Encoded.safe` says which images DALI may be given: kernels/screen.h knows what DALI decodes as Pillow does.

Of raw images, which need no decoding, `read_stretches` reads the rows that are shown.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.base import native
from dali_diffusemix.errors import DecodeError

# Reads that wait for storage at the same time; fast storage needs only one.
_THREADS: Final = 16
_ENDS_EARLY: Final = -1
_REASONS: Final = {
    _ENDS_EARLY: "it ends early",
    -2: "it is empty",
    -3: "it is not a file",
    -4: "its size differs from the catalog's",
    -5: "it has more than a GiB",
}


class OpenFile:
    """A file that stays open for reading as long as this object lives."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # at the interpreter's end `os` is gone
        if hasattr(self, "descriptor"):
            close(self.descriptor)


class Extent(NamedTuple):
    """An image inside an open file."""

    file: OpenFile
    offset: int  # bytes
    length: int  # bytes


@dataclass
class Stretches:
    """Plain pixels in open files: n images, rows of (width, 3) uint8 one after another."""

    files: NDArray[np.int32]  # (n,) descriptors; -1: there is none
    offsets: NDArray[np.int64]  # (n,) of the first pixel, bytes
    errors: dict[int, DecodeError] = field(default_factory=dict)  # by image: why there is none
    owners: list[OpenFile] = field(default_factory=list)  # keep the files open


IN_STORE: Final = "run `dali-diffusemix verify STORE --discard`, and the command again that made the store"
"""The remedy for a damaged image in a store, which cannot be replaced by itself."""

Location: TypeAlias = bytes | Extent | DecodeError
"""Where an encoded image is: a file's name, part of an open file, or nowhere, for the reason given."""


@dataclass(frozen=True)
class Encoded:
    """The encoded images of a batch."""

    images: list[NDArray[np.uint8] | None]  # (n,) bytes; None: not asked for, or unreadable
    windows: NDArray[np.int32]  # (n, 4) the windows asked for, in these images
    safe: NDArray[np.bool_]  # (n,) JPEGs and PNGs that DALI decodes as Pillow does; of a PNG, only its pixels
    errors: dict[int, DecodeError]  # by row: why it could not be read
    memory: NDArray[np.uint8] | None  # holds the images

    @classmethod
    def none(cls, count: int) -> "Encoded":
        """No image in any of so many places."""
        return cls([None] * count, np.zeros((count, 4), dtype=np.int32), np.zeros(count, dtype=np.bool_), {}, None)


def read(
    locations: Sequence[Location | None],
    windows: NDArray[np.int32],
    sizes: NDArray[np.int32] | None = None,
    memory: NDArray[np.uint8] | None = None,
) -> Encoded:
    """Read images, and cut those that have restart markers down to their windows.

    Args:
        locations: Where the n images are; None is not read.
        windows: (n, 4) top, left, bottom, right, upright pixels; an image with an empty window is read whole.
        sizes: (n, 2) (height, width) that the upright images must have. Checked in safe images only; for the rest, and
            for all without the C library, the decoder checks.
        memory: Memory to read into, if it is large enough.
    """
    count = len(locations)
    errors = {i: one for i, one in enumerate(locations) if isinstance(one, DecodeError)}
    names = [one if isinstance(one, bytes) else b"" for one in locations]
    lengths_of_names = np.fromiter(map(len, names), np.int64, count)
    path_starts = np.cumsum(lengths_of_names + 1) - lengths_of_names - 1
    path_starts[lengths_of_names == 0] = -1
    extents = [(i, one) for i, one in enumerate(locations) if isinstance(one, Extent)]
    rows = [i for i, _ in extents]
    files = np.full(count, -1, dtype=np.int32)
    offsets, lengths = np.zeros((2, count), dtype=np.int64)
    files[rows] = [extent.file.descriptor for _, extent in extents]
    offsets[rows] = [extent.offset for _, extent in extents]
    lengths[rows] = [extent.length for _, extent in extents]

    sizes = np.zeros((count, 2), dtype=np.int32) if sizes is None else np.ascontiguousarray(sizes, dtype=np.int32)
    memory = np.empty(0, dtype=np.uint8) if memory is None else memory
    run = partial(_read if native.library() is None else native.read, b"\0".join(names) + b"\0", path_starts)
    while True:
        starts, safe = np.full(count, -1, dtype=np.int64), np.zeros(count, dtype=np.bool_)
        cuts, read_lengths, codes = windows.copy(), lengths.copy(), np.zeros(count, dtype=np.int32)
        needed = run(files, offsets, read_lengths, cuts, sizes, memory, starts, safe, codes, _THREADS)
        if needed <= len(memory):
            break
        memory = np.empty(needed + needed // 4, dtype=np.uint8)
    for i in np.flatnonzero(codes).tolist():
        reason = _reason(int(codes[i]))
        remedy = IN_STORE if isinstance(locations[i], Extent) else "restore it, or run `index --refresh`"
        errors[i] = DecodeError(f"{name_of(locations[i])}: cannot be read ({reason}); {remedy}.")
    starts[codes != 0] = -1
    images = [
        None if start < 0 else memory[start : start + length]
        for start, length in zip(starts.tolist(), read_lengths.tolist(), strict=True)
    ]
    return Encoded(images, cuts, safe, errors, memory)


def read_stretches(
    files: NDArray[np.int32],
    offsets: NDArray[np.int64],
    lengths: NDArray[np.int64],
    memory: NDArray[np.uint8] | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.int64], dict[int, str]]:
    """Read stretches of open files, one after another, into one block of memory.

    Args:
        files: (n,) descriptors.
        offsets: (n,) where they begin, bytes.
        lengths: (n,) bytes.
        memory: Memory to read into, if it is large enough.

    Returns:
        The memory; (n,) where each begins in it; and why some could not be read, by row.
    """
    ends = np.cumsum(lengths)
    begins, needed = ends - lengths, int(ends[-1]) if len(ends) else 0
    if memory is None or len(memory) < needed:
        memory = np.empty(needed + needed // 4, dtype=np.uint8)
    codes = np.zeros(len(files), dtype=np.int32)
    run = _read_stretches if native.library() is None else native.read_stretches
    run(files, offsets, lengths, begins, memory, codes, _THREADS)
    return memory, begins, {row: _reason(int(codes[row])) for row in np.flatnonzero(codes).tolist()}


def _reason(code: int) -> str:
    return _REASONS.get(code) or os.strerror(code)


def _read_stretches(
    files: NDArray[np.int32],
    offsets: NDArray[np.int64],
    lengths: NDArray[np.int64],
    begins: NDArray[np.int64],
    out: NDArray[np.uint8],
    errors: NDArray[np.int32],
    threads: int,
) -> None:
    """`native.read_stretches` without the C library."""
    for i, (file, offset, length, begin) in enumerate(
        zip(files.tolist(), offsets.tolist(), lengths.tolist(), begins.tolist(), strict=True)
    ):
        try:
            if os.preadv(file, [out.data[begin : begin + length]], offset) < length:
                errors[i] = _ENDS_EARLY
        except OSError as error:
            errors[i] = error.errno or _ENDS_EARLY


def name_of(location: Location | None) -> str:
    """The name of an image in an error."""
    if isinstance(location, Extent):
        return f"{os.fspath(location.file.path)} at byte {location.offset}"
    return os.fsdecode(location) if isinstance(location, bytes) else "no image"


def _read(
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
    """`native.read` without the C library; nothing is cut."""
    used = 0
    for i, (start, file) in enumerate(zip(path_starts.tolist(), files.tolist(), strict=True)):
        if start < 0 and file < 0:
            continue
        try:
            if file < 0:
                with open(paths[start : paths.index(b"\0", start)], "rb") as stream:  # noqa: PTH123 - a name in bytes
                    content = stream.read()
            else:
                content = os.pread(file, int(lengths[i]), int(offsets[i]))
        except OSError as error:
            errors[i] = error.errno or _ENDS_EARLY
            continue
        if file >= 0 and len(content) < lengths[i]:
            errors[i] = _ENDS_EARLY
        elif not content:
            errors[i] = -2
        elif used + len(content) <= len(out):
            out[used : used + len(content)] = np.frombuffer(content, dtype=np.uint8)
            begins[i] = used
        lengths[i] = len(content)
        used += len(content)
    return used
