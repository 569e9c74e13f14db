"""The headers of many files: their sizes, and the reason for every file that cannot be used."""

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dali_diffusemix.errors import CatalogError, ConfigError
from dali_diffusemix.images.formats import read_size

# Warm, one thread reads most headers a second, since parsing holds the GIL. Eight lose half of that (still four times
# what is needed), but keep a cold disk or a network folder busy, where one thread would wait for hours.
_WORKERS = 8
_FILES_PER_TASK = 128


@dataclass(frozen=True)
class Rejected:
    """A file (or folder) that was found and left out."""

    path: str  # relative to the root, POSIX
    reason: str  # a sentence: the rule, the value found, the remedy where there is one


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The files below a root, before any of them is opened."""

    classes: tuple[str, ...]
    paths: list[str]  # relative to the root, POSIX
    labels: list[int]  # one for each path
    rejected: list[Rejected]  # what is neither a file in a class folder nor a folder
    folder_mtimes: dict[str, int]  # class folder to nanoseconds, taken before it was listed


# Listing --------------------------------------------------------------------------------------------------------------


def existing_root(root: str | os.PathLike[str]) -> Path:
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


def names(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def first(rejected: Sequence[Rejected]) -> str:
    if not rejected:
        return "No files were found."
    return f"{len(rejected)} left out, the first {rejected[0].path!r}: {rejected[0].reason}"


def read_sizes(
    root: Path, paths: Sequence[str], workers: int | None, progress: Callable[[int, int], None] | None
) -> tuple[npt.NDArray[np.int32], list[Rejected]]:
    """(N, 2) heights and widths, 0 where a file cannot be used, and why not."""
    if workers is not None and workers < 1:
        raise ConfigError(f"workers must be 1 or more, found {workers}.")
    sizes = np.zeros((len(paths), 2), np.int32)
    rejected: list[Rejected] = []

    def read(start: int) -> list[tuple[int, int] | str]:
        return [read_size(f"{root}/{path}") for path in paths[start : start + _FILES_PER_TASK]]

    Image.init()  # here, so that the threads need not import Pillow's formats
    # Threads: processes could be forked only while there are no threads, and spawned only below `if __name__ == ...`.
    pool = ThreadPoolExecutor(workers or _WORKERS, thread_name_prefix="catalog")
    starts = range(0, len(paths), _FILES_PER_TASK)
    with warnings.catch_warnings():
        # The filters are the whole process's, so nothing but Pillow is silenced meanwhile. What it warns of (odd EXIF,
        # many pixels) is either harmless to the size or a verdict below.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            for start, results in zip(starts, pool.map(read, starts), strict=True):
                for row, result in enumerate(results, start):
                    if isinstance(result, str):
                        rejected.append(Rejected(paths[row], result))
                    else:
                        sizes[row] = result
                if progress is not None:
                    progress(start + len(results), len(paths))
        finally:
            pool.shutdown(cancel_futures=True)
    return sizes, rejected
