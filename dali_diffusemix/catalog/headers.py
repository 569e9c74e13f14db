"""Headers: the sizes of many image files, and the reason for each file that cannot be used."""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dali_diffusemix.base.workers import Workers
from dali_diffusemix.errors import CatalogError, ConfigError
from dali_diffusemix.images.formats import read_size

# If the files are cached, one thread is fastest, since parsing holds the GIL, and eight are half as fast (still four
# times what is needed). On a cold disk or a network folder one thread would take hours.
_WORKERS = 8
_FILES_PER_TASK = 128


@dataclass(frozen=True)
class Rejected:
    """A file or folder that was found and left out."""

    path: str  # relative to the root, POSIX
    reason: str  # a sentence: the rule, the value found, the remedy if there is one


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The files below a root, before any of them is opened."""

    classes: tuple[str, ...]
    paths: list[str]  # relative to the root, POSIX
    labels: list[int]  # one per path
    rejected: list[Rejected]  # what is neither a file in a class folder nor a folder
    folder_mtimes: dict[str, int]  # class folder to nanoseconds, taken before it was listed


def existing_root(root: str | os.PathLike[str]) -> Path:
    """The folder of originals. Raises CatalogError unless it exists."""
    folder = Path(root)
    try:
        folder.stat()
    except OSError as error:
        raise CatalogError(
            f"{str(folder)!r}: there is no such folder ({error.strerror}); expected one with root/class/image.jpg."
        ) from error
    if not folder.is_dir():
        raise CatalogError(f"{str(folder)!r}: is a file; expected a folder with root/class/image.jpg.")
    return folder


def read_sizes(
    root: Path, paths: Sequence[str], workers: int | None, progress: Callable[[int, int], None] | None
) -> tuple[npt.NDArray[np.int32], list[Rejected]]:
    """(N, 2) heights and widths, 0 for files that cannot be used, and these files with their reasons."""
    if workers is not None and workers < 1:
        raise ConfigError(f"workers must be 1 or more, found {workers}.")
    sizes = np.zeros((len(paths), 2), np.int32)
    rejected: list[Rejected] = []

    def read(start: int) -> list[tuple[int, int] | str]:
        return [read_size(f"{root}/{path}") for path in paths[start : start + _FILES_PER_TASK]]

    Image.init()  # here, so that the threads need not import Pillow's formats
    starts = range(0, len(paths), _FILES_PER_TASK)
    with warnings.catch_warnings():
        # Filters are process-wide, so only Pillow is silenced. Its warnings (odd EXIF, many pixels) are either harmless
        # to the size or a reason below.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        # Threads: a process with threads cannot be forked, and spawning needs `if __name__ == ...` in users' scripts.
        with Workers(workers or _WORKERS, "dali-diffusemix-headers") as threads:
            for start, results in zip(starts, threads.map(read, starts), strict=True):
                for row, result in enumerate(results, start):
                    if isinstance(result, str):
                        rejected.append(Rejected(paths[row], result))
                    else:
                        sizes[row] = result
                if progress is not None:
                    progress(start + len(results), len(paths))
    return sizes, rejected


def quoted(names: Sequence[str]) -> str:
    """The first names and the number of the rest, for a message."""
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def first_reason(rejected: Sequence[Rejected]) -> str:
    """The number of rejected files and the reason for the first, for a message."""
    if not rejected:
        return "No files were found."
    return f"{len(rejected)} left out, the first {rejected[0].path!r}: {rejected[0].reason}"
