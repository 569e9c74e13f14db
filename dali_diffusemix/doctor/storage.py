"""The probe of SOURCE: the speed at which files of a folder or a store are read."""

import contextlib
import os
import random
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from dali_diffusemix.doctor.described import described
from dali_diffusemix.doctor.machine import file_system, read_lines
from dali_diffusemix.errors import ConfigError

_MOST_LISTED: Final = 20_000  # files
_MOST_READ: Final = 256  # files
_MOST_BYTES: Final = 4 << 20  # per file
_READING_SECONDS: Final = 1.0  # for each of two measurements, and for listing
_THREADS: Final = 16  # maximum of the loader


def probe_data(data: str) -> dict[str, Any]:
    """Measure how fast files of a folder or a store are read, as cold as the system makes its page cache."""
    if "://" in data:
        raise ConfigError(f"SOURCE must be a folder, found the URL {data}, whose speed is not measured")
    root = Path(data)
    if not root.is_dir():
        raise ConfigError(f"SOURCE must be a folder of images or a store, found no folder {data!r}; correct the path")
    header = b"".join(line.encode() for line in read_lines(root / "store.json")[:9])
    stored = b'"magic": "dali_diffusemix.' in header
    files, unreadable, complete = list_files(root, ".tar" if stored else "")
    if not files:
        why = f"; {unreadable}" if unreadable else ""
        raise ConfigError(f"SOURCE must hold {'shards' if stored else 'images'}, found no file in {data!r}{why}")
    chosen = random.Random(0).sample(files, min(len(files), _MOST_READ))
    half = -(-len(chosen) // 2)
    return {
        "path": data,
        "kind": "store" if stored else "folder",
        "file_system": file_system(root),
        "free": shutil.disk_usage(root).free,
        "files": len(files),
        "all_listed": complete,
        "unreadable": unreadable,
        "one_thread": _read(chosen[:half], 1),
        "many_threads": _read(chosen[half:], _THREADS) if len(chosen) > half else None,
    }


def list_files(root: Path, ending: str) -> tuple[list[Path], str | None, bool]:
    """List files below a folder, or many of them; returns them, an error of listing, and True if these are all."""
    begin = time.monotonic()
    waiting, files, unreadable = [root], list[Path](), None
    draw = random.Random(0)
    while waiting:
        if len(files) >= _MOST_LISTED or (files and time.monotonic() - begin > _READING_SECONDS):
            return files, unreadable, False
        folder = waiting.pop(draw.randrange(len(waiting)))
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir():
                        waiting.append(Path(entry))
                    elif entry.is_file() and entry.name.endswith(ending):
                        files.append(Path(entry))
        except OSError as error:
            unreadable = described(error)
    return files, unreadable, True


def _read(files: Sequence[Path], threads: int) -> dict[str, Any]:
    """Read files, each up to a size, after asking the system to drop them from its page cache."""
    for file in files:
        with contextlib.suppress(OSError), file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before, begin = _fetched(), time.perf_counter()

    def read(file: Path) -> int | str:
        if time.perf_counter() - begin > _READING_SECONDS:
            return -1
        try:
            with file.open("rb", buffering=0) as opened:
                return len(opened.read(_MOST_BYTES))
        except OSError as error:
            return described(error)

    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(read, files))
    seconds, fetched = time.perf_counter() - begin, _fetched()
    sizes = [result for result in results if isinstance(result, int) and result >= 0]
    errors = [result for result in results if isinstance(result, str)]
    size = sum(sizes)
    return {
        "threads": threads,
        "files": len(sizes),
        "bytes": size,
        "seconds": round(seconds, 4),
        "mb_per_second": round(size / 1e6 / seconds, 1),
        "files_per_second": round(len(sizes) / seconds, 1),
        # As the system counts it for this process, without network file systems and memory.
        "from_storage": None if fetched is None or not size else round(min(1.0, (fetched - (before or 0)) / size), 3),
        "unreadable": len(errors),
        "error": errors[0] if errors else None,
    }


def _fetched() -> int | None:
    """Bytes that this process has read from storage."""
    return next((int(line.split()[1]) for line in read_lines("/proc/self/io") if line.startswith("read_bytes:")), None)
