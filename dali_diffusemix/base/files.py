"""Files that are replaced whole or not at all, locks that end with their process, and the user's cache folder."""

import json
import os
import secrets
import shutil
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dali_diffusemix.errors import ConfigError

# File systems allow names of 255 bytes, some of 143: a temporary name takes this many from the file's own.
_NAME_BYTES = 100


@contextmanager
def replacing(file: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Write a file whole or not at all: yields a new file, which takes the name `file` at the end of the block.

    The temporary file lies beside it, as `.NAME.8HEX.tmp` (a long name is cut), and is removed after an error; a
    process that is killed leaves it: see `remove_temporary`. `durable`: the content is on the disk before the name is,
    so that it survives a power failure; it takes some milliseconds.
    """
    name = os.fsdecode(os.fsencode(file.name)[:_NAME_BYTES])
    temporary = file.with_name(f".{name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as stream:
            yield stream
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        sync_folder(file.parent)


def write(file: Path, data: bytes | memoryview, *, durable: bool = True) -> None:
    """Write a file whole or not at all; see `replacing`."""
    with replacing(file, durable=durable) as stream:
        stream.write(data)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Make a folder whole or not at all: yields a temporary one, which takes the name `folder` at the end of the block.

    If another process was faster, its folder stays.
    """
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_temporary(folder: Path, names: str = "*", *, seconds: float = 0) -> None:
    """Remove the temporary files and folders of `names` (a pattern) that killed processes left, if they are that old.

    Younger ones may belong to a running process, unless a lock excludes that.
    """
    for temporary in folder.glob(f".{names}.{'[0-9a-f]' * 8}.tmp"):
        with suppress(OSError):  # another process was faster, or it stays: it harms nobody
            if time.time() - temporary.stat().st_mtime >= seconds:
                shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()


def file_size(file: Path) -> int | None:
    """Bytes of a file; None if there is none."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return None


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk."""
    if os.name == "posix":  # elsewhere a folder cannot be opened, and need not be
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def locked(file: Path, part: range | None = None, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file, or a range of its bytes, during the block; yields True if it is held.

    The system releases the lock when the process ends, and consults no clock. Two blocks in one process exclude each
    other too. The bytes need not exist. Locks of a whole file (`flock`) and of a range (`F_OFD_SETLK`) are independent.

    Args:
        file: Made if it is missing.
        part: Bytes to lock; the whole file unless given.
        wait: Wait until nobody else holds it, rather than yield False.
    """
    import fcntl  # POSIX only

    def change(kind: int, *, wait: bool) -> None:
        if part is None:
            fcntl.flock(descriptor, kind | (0 if wait else fcntl.LOCK_NB))
        else:
            of_range = {fcntl.LOCK_EX: fcntl.F_WRLCK, fcntl.LOCK_UN: fcntl.F_UNLCK}[kind]
            # struct flock: type, whence, start, length, process (0 for these locks)
            lock = struct.pack("hhqqi4x", of_range, os.SEEK_SET, part.start, len(part), 0)
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, lock)

    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            change(fcntl.LOCK_EX, wait=wait)
            held = True
        except (BlockingIOError, PermissionError):
            held = False
        try:
            yield held
        finally:
            change(fcntl.LOCK_UN, wait=False)  # processes forked in the block have the descriptor too
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """The user's cache folder.

    $DALI_DIFFUSEMIX_CACHE, else dali-diffusemix in $XDG_CACHE_HOME or ~/.cache. Raises ConfigError if there is no home
    folder either.
    """
    if own := os.environ.get("DALI_DIFFUSEMIX_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "dali-diffusemix"
    try:
        return Path.home() / ".cache" / "dali-diffusemix"
    except RuntimeError as error:
        raise ConfigError("There is no home folder to cache in; set DALI_DIFFUSEMIX_CACHE to a folder.") from error


def why_damaged(error: Exception) -> str:
    """The reason why a JSON file could not be read, for a message."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return f"it is no JSON: {error}"
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return f"a value is of the wrong kind: {error}"
