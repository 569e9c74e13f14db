"""The fractal bank: one memory-mapped file of structural images, opened, rendered or made from a folder."""

import contextlib
import io
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dali_diffusemix.base.cpus import cpus
from dali_diffusemix.base.files import replacing
from dali_diffusemix.base.workers import Workers
from dali_diffusemix.errors import ConfigError, DecodeError, StoreError
from dali_diffusemix.fractals.flame import check_ranges, render
from dali_diffusemix.images.codec import decode
from dali_diffusemix.images.formats import read_size

_log = logging.getLogger(__name__)


class FractalBank:
    """Fractals of one size, in memory or mapped from a .npy file.

    Args:
        images: (count, height, width, 3) uint8 RGB, C-contiguous, count >= 1.

    Attributes:
        images: The same, read-only.
        path: The absolute path of the file that it was opened from, or None.

    Raises:
        ConfigError: `images` is something else.
    """

    images: NDArray[np.uint8]
    path: Path | None

    def __init__(self, images: NDArray[np.uint8]) -> None:
        if (found := _misfit(images)) is not None:
            raise ConfigError(f"images must be a C-contiguous (count, height, width, 3) uint8 array, found {found}.")
        self.images = images.view(np.ndarray)
        self.images.flags.writeable = False
        self.path = None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Map a bank's file, read-only. It is pickled as its path.

        Raises:
            StoreError: The file is missing, damaged or not a bank.
        """
        path = Path(path).absolute()
        remedy = f"render one with `dali-diffusemix fractals {path}{' --overwrite' if path.is_file() else ''}`."
        try:
            images = np.lib.format.open_memmap(path, mode="r")  # never unpickles
        except Exception as error:  # NumPy's parser of headers may raise anything
            if path.is_dir():
                remedy = "it may be an edit store: are edits and fractals swapped?"
            raise StoreError(f"fractal bank {path}: must be a readable .npy file, found: {error}; {remedy}") from error
        if (found := _misfit(images)) is not None:
            raise StoreError(
                f"fractal bank {path}: must hold a C-contiguous (count, height, width, 3) uint8 array, "
                f"found {found}; {remedy}"
            )
        bank = cls(images)
        bank.path = path
        return bank

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(count, height, width, 3)."""
        count, height, width, channels = self.images.shape
        return count, height, width, channels

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        return f"FractalBank({str(self.path) if self.path else 'in memory'}, shape={self.shape})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self).open, (self.path,)) if self.path else (type(self), (self.images,))


def render_bank(
    path: str | os.PathLike[str],
    *,
    count: int = 64,
    size: int = 256,
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    threads: int | None = None,
) -> FractalBank:
    """Render fractals 0 … count-1 of `seed` into a bank, and open it. The file appears when it is whole.

    Args:
        path: The .npy file to write; missing folders are made.
        count: The number of fractals, at least 1.
        size: Pixels of a side, 16 to 1024.
        seed: 0 <= seed < 2**32.
        overwrite: Replace an existing file.
        progress: Called after each fractal with the number of those done and of all.
        threads: Fractals rendered at once; by default one per CPU. The result does not depend on it.

    Raises:
        ConfigError: An argument is out of range.
        StoreError: The file exists, or cannot be written.
    """
    check_ranges(count=count, size=size, seed=seed, threads=threads)
    one = partial(render, size=size, seed=seed, threads=1)
    with _new_bank(path, size, overwrite) as add, Workers(threads or cpus(), "dali-diffusemix-fractals") as workers:
        for done, image in enumerate(workers.map(one, range(count)), 1):
            add(image)
            if progress is not None:
                progress(done, count)
    return FractalBank.open(path)


def bank_from_folder(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    size: int = 256,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[FractalBank, list[tuple[Path, str]]]:
    """Make a bank of a folder's images, in the order of their paths, each cut to its central square and resized.

    Args:
        path: The .npy file to write; missing folders are made.
        folder: It is searched with all subfolders; hidden files are skipped.
        size: Pixels of a side, 16 to 1024; Pillow's LANCZOS filter.
        overwrite: Replace an existing file.
        progress: Called after each file with the number of those done and of all.

    Returns:
        The bank, and the path and the reason of each file that cannot be decoded, which are logged, too.

    Raises:
        ConfigError: `size` is out of range.
        StoreError: The bank exists or cannot be written, or the folder holds no readable image.
    """
    check_ranges(size=size)
    folder = Path(folder)
    files = sorted(f for f in folder.rglob("*") if f.is_file() and not f.name.startswith("."))
    unreadable: list[tuple[Path, str]] = []
    with _new_bank(path, size, overwrite) as add:
        for done, file in enumerate(files, start=1):
            try:
                image = Image.fromarray(decode(file))
            except DecodeError as error:
                why = read_size(str(file))  # tells what a file is that is no supported image
                reason = f"{str(file)!r}: {why}" if isinstance(why, str) else str(error)
                unreadable.append((file, reason))
                _log.warning("Left out of the fractal bank: %s", reason)
            else:
                add(np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)))
            if progress is not None:
                progress(done, len(files))
        if len(unreadable) == len(files):
            raise StoreError(
                f"folder {folder}: must hold at least one image that can be decoded, found {len(files)} files, "
                "none of them readable; name another folder, or render a bank with `dali-diffusemix fractals`."
            )
    return FractalBank.open(path), unreadable


@contextlib.contextmanager
def _new_bank(
    path: str | os.PathLike[str], size: int, overwrite: bool
) -> Iterator[Callable[[NDArray[np.uint8]], None]]:
    """Yield a function that adds one (size, size, 3) image; the file appears if the block ends without an error."""
    path = Path(path)
    count = 0

    def add(image: NDArray[np.uint8]) -> None:
        nonlocal count
        with _writing(path):
            file.write(image.tobytes())
        count += 1

    with contextlib.ExitStack() as stack:
        with _writing(path):
            if path.exists() and not overwrite:
                raise StoreError(f"fractal bank {path}: must not exist yet; name another file, or say --overwrite.")
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(replacing(path))
            # Written, not mapped: a full disk is then an error and does not kill the process.
            file.write(_header(0, size))
        yield add
        with _writing(path):
            file.seek(0)
            file.write(_header(count, size))
            stack.close()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"fractal bank {path}: must be writable, found: {error}; name another file.") from error


def _header(count: int, size: int) -> bytes:
    """Return the .npy header; NumPy pads it so that its length does not depend on `count`."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
    )
    return header.getvalue()


def _misfit(images: object) -> str | None:
    """Return a description of `images` unless they can be a bank's."""
    if not isinstance(images, np.ndarray):
        return type(images).__name__
    if images.ndim == 4 and images.shape[-1] == 3 and images.size > 0 and images.dtype == np.uint8:
        return None if images.flags.c_contiguous else "another order of the axes in memory"
    return f"shape {images.shape} and dtype {images.dtype}"
