"""Reading: the encoded images of a batch, in one block of memory, cut down to what is seen.

One call of the library reads a batch off the GIL. Nothing is mapped: a mapping kills the process when its file
shrinks, and waits for storage page by page, in the decoder's threads. JPEGs with restart markers, as `pixels.encode`
writes them, are cut down to the tiles that a window touches: the decoder then has nothing to skip. `Batch.sound` says
what DALI may be given: kernels/screen.h knows what DALI decodes as Pillow does.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.base import native
from dali_diffusemix.errors import DecodeError

# Reads that wait for storage at once; on a fast one there are none.
_THREADS: Final = 16
_ENDS_EARLY: Final = -1
_REASONS: Final = {
    _ENDS_EARLY: "it ends early",
    -2: "it is empty",
    -3: "it is not a file",
    -4: "it has not the size that it was listed with",
    -5: "it has more than a GiB",
}


class OpenFile:
    """A file that is open for reading until nobody holds it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class Extent(NamedTuple):
    """An image inside an open file."""

    file: OpenFile
    offset: int  # bytes
    length: int  # bytes


IN_STORE: Final = "run `dali-diffusemix verify STORE --discard`, and the command again that made the store"
"""What to advise where an image in a store is damaged: nobody can copy or mend that one alone."""

# Where an encoded image is: a whole file by its name, part of an open one, or nowhere, for the reason given.
Place: TypeAlias = bytes | Extent | DecodeError


@dataclass(frozen=True)
class Batch:
    """Encoded images, read."""

    images: list[NDArray[np.uint8] | None]  # None: none was asked for, or it could not be read
    windows: NDArray[np.int32]  # (n, 4) the windows asked for, in these images
    sound: NDArray[np.bool_]  # (n,) a JPEG or PNG, of a PNG no more than its pixels, that DALI decodes as Pillow does
    errors: dict[int, DecodeError]  # what could not be read
    memory: NDArray[np.uint8]  # that the images lie in


def read(
    places: Sequence[Place | None],
    windows: NDArray[np.int32],
    sizes: NDArray[np.int32] | None = None,
    memory: NDArray[np.uint8] | None = None,
) -> Batch:
    """Read images, and cut out of those that allow it what a window shows.

    Args:
        places: Where n images are; None is not read.
        windows: (n, 4) top, left, bottom, right, upright pixels; an image whose window is empty is read whole.
        sizes: (n, 2) (height, width) that they must have, upright. Looked at in what is sound; of the rest, and
            without the library of all, the decoder finds out.
        memory: What to read into, if it is large enough.
    """
    count = len(places)
    errors = {i: place for i, place in enumerate(places) if isinstance(place, DecodeError)}
    names = [place if isinstance(place, bytes) else b"" for place in places]
    lengths_of_names = np.fromiter(map(len, names), np.int64, count)
    path_starts = np.cumsum(lengths_of_names + 1) - lengths_of_names - 1
    path_starts[lengths_of_names == 0] = -1
    extents = [(i, place) for i, place in enumerate(places) if isinstance(place, Extent)]
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
        starts, sound = np.full(count, -1, dtype=np.int64), np.zeros(count, dtype=np.bool_)
        cuts, read_lengths, codes = windows.copy(), lengths.copy(), np.zeros(count, dtype=np.int32)
        needed = run(files, offsets, read_lengths, cuts, sizes, memory, starts, sound, codes, _THREADS)
        if needed <= len(memory):
            break
        memory = np.empty(needed + needed // 4, dtype=np.uint8)
    for i in np.flatnonzero(codes).tolist():
        reason = _REASONS.get(int(codes[i])) or os.strerror(int(codes[i]))
        remedy = IN_STORE if isinstance(places[i], Extent) else "restore it, or list the folder anew"
        errors[i] = DecodeError(f"{name_of(places[i])}: cannot be read ({reason}); {remedy}")
    starts[codes != 0] = -1
    images = [
        None if start < 0 else memory[start : start + length]
        for start, length in zip(starts.tolist(), read_lengths.tolist(), strict=True)
    ]
    return Batch(images, cuts, sound, errors, memory)


def name_of(place: Place | None) -> str:
    """What an error calls an image."""
    if isinstance(place, Extent):
        return f"{os.fspath(place.file.path)} at byte {place.offset}"
    return os.fsdecode(place) if isinstance(place, bytes) else "no image"


def _read(
    paths: bytes,
    path_starts: NDArray[np.int64],
    files: NDArray[np.int32],
    offsets: NDArray[np.int64],
    lengths: NDArray[np.int64],
    windows: NDArray[np.int32],
    sizes: NDArray[np.int32],
    out: NDArray[np.uint8],
    places: NDArray[np.int64],
    sound: NDArray[np.bool_],
    errors: NDArray[np.int32],
    threads: int,
) -> int:
    """`native.read` where the library was not built; nothing is cut."""
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
            places[i] = used
        lengths[i] = len(content)
        used += len(content)
    return used
