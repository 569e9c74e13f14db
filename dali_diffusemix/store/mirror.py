"""Mirrors: a store at a URL, copied file by file into a local folder that all processes of a machine share.

    EditStore.open("s3://bucket/edits")      any URL that fsspec knows: s3, gs, https, file, memory

The small files are fetched when a store is opened. A shard's tar is fetched on first use, and once training begins
ahead of it: all shards in order, and first those that a reader waits for.

    store.json, index.json, catalog/catalog.json, shards/*.json     fetched by each process
    all other files                                                 vouched for by one of these, with their SHA-256

A file that is vouched for exists only beside the JSON that it was checked against: if the JSON has changed at the
source, the files that it vouched for are removed before it is replaced. So every file that exists can be used, and a
process can be killed at any moment: the next one resumes, even in the middle of a tar.

    DALI_DIFFUSEMIX_MIRROR           folder for mirrors; by default mirrors/ in the user's cache folder
    DALI_DIFFUSEMIX_MIRROR_LIMIT     bytes that the tars of one mirror may take; by default there is no limit
"""

import errno
import hashlib
import json
import logging
import os
import random
import re
import threading
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from dali_diffusemix.base.files import cache_folder, file_size, locked, remove_temporary, sync_folder, write
from dali_diffusemix.base.workers import Workers
from dali_diffusemix.errors import ConfigError, MissingDependencyError, StoreError
from dali_diffusemix.images.reading import OpenFile

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_URL: Final = re.compile(r"(?:[A-Za-z0-9+.-]+::)*[A-Za-z][A-Za-z0-9+.-]*://")
_SHARDS: Final = "shards"
# Downloads at once. One connection to S3 gives some 50 MB/s.
_THREADS: Final = 8
# Bytes per request. A request that is cut off is repeated with fewer.
_MOST_BYTES: Final = 16 << 20
_LEAST_BYTES: Final = 64 << 10
# Attempts per request, and seconds before the second one; each further wait is twice as long.
_TRIES: Final = 6
_FIRST_WAIT = 0.5
# Temporary files this old belong to a process that was killed.
_OLD_SECONDS: Final = 3600
# Open tars, each a file descriptor; a process usually may have 1024.
_OPEN_TARS: Final = 200
# A generator of its own, so that the program's own draws do not change.
_jitter = random.SystemRandom()


class MirrorError(StoreError):
    """A mirror cannot be filled: its source does not answer or refuses, or the disk is full."""


class MirrorLimitWarning(UserWarning):
    """A mirror's limit is smaller than its store, so shards are fetched again and again."""


def is_url(path: str | os.PathLike[str]) -> bool:
    """True if it is a URL, not a local path. A `Path` never is: it turns `s3://bucket` into `s3:/bucket`."""
    return isinstance(path, str) and _URL.match(path) is not None


class Mirror:
    """A local folder that becomes a copy of a store: shards/NAME.json, .npy and .tar, and the files beside shards/.

    Threads fetch tars: they start when one is requested, and end when nothing is left to fetch, with the process, or
    soon after the mirror is garbage. Many threads may use a mirror, also after a fork.

    Args:
        url: The store, for fsspec. Credentials come from where its protocol looks for them.
        folder: The copy; by default one per URL, see the module's docstring.
        limit: Bytes that its tars may take; by default see the module's docstring. Tars in use are never removed.

    Raises:
        ConfigError: The limit is no number of bytes.
    """

    def __init__(self, url: str, folder: str | os.PathLike[str] | None = None, limit: int | None = None) -> None:
        self.url = url.rstrip("/")
        self.folder = _default_folder(self.url) if folder is None else Path(folder).absolute()
        self.limit = _default_limit() if limit is None else limit
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit must be at least 1 byte, found {self.limit}.")
        self._sizes: dict[str, int] = {}  # bytes of the tar of each shard that may be requested
        self._checked: set[str] = set()  # shards whose .json this process has compared with the source's
        self._failed: dict[str, StoreError] = {}  # shards that are not what their .json says
        self._opened: OrderedDict[str, OpenFile] = OrderedDict()  # the last one was used last
        self._begin()
        _mirrors.add(self)

    def _begin(self) -> None:
        """Set up what a forked process cannot share."""
        self._lock = threading.RLock()  # a thread that an exception took out of it may enter again
        self._source: tuple[Any, str] | None = None  # fsspec's file system, and the store's path in it
        self._source_lock = threading.RLock()
        self._pending: OrderedDict[str, bool] = OrderedDict()  # shards to fetch; True if a reader waits
        self._results: dict[str, Future[None]] = {}  # of shards that are pending or being fetched
        self._wanted: Counter[str] = Counter()  # shards that are being opened
        self._threads = 0
        self._all_asked_for = False
        self._closed = threading.Event()

    def __repr__(self) -> str:
        return f"<Mirror of {self.url!r} in {str(self.folder)!r}>"

    # Small files --------------------------------------------------------------------------------------------------

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Exclude other processes while the small files are fetched and opened."""
        folders = [self.folder, *(self.folder / name for name in ("catalog", _SHARDS))]
        with self._on_disk():
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / ".lock"):
            for folder in folders:
                remove_temporary(folder, seconds=_OLD_SECONDS)
            yield

    def refresh(self, name: str, vouches_for: Sequence[str] = ()) -> bytes:
        """Fetch a file again; if it has changed, remove the files that it vouches for.

        Raises:
            FileNotFoundError: The source has no such file; it was removed here too, with the files that it vouches for.
            MirrorError: The source does not answer or refuses, or the file cannot be written.
        """
        file = self.folder / name
        try:
            data: bytes | None = self._read(name)
            missing = None
        except FileNotFoundError as error:
            data, missing = None, error
        with self._on_disk():
            if data is None or not file.is_file() or file.read_bytes() != data:
                for other in (*vouches_for, name):
                    (self.folder / other).unlink(missing_ok=True)
                if data is not None:
                    write(file, data)
        if data is None:
            assert missing is not None
            raise missing
        return data

    def refresh_beside(self, ending: str) -> None:
        """Fetch again the file beside the store that has its name with this ending; it will lie beside the mirror.

        Raises:
            MirrorError: The source does not answer, or the file cannot be written.
        """
        if "/" not in self.url.partition("://")[2]:
            return  # the root of a server or of a bucket: there is nothing beside it
        files, root = self._files()
        file = self.folder.with_name(self.folder.name + ending)
        try:
            data = self._try(f"..{ending}", lambda _: bytes(files.cat_file(f"{root}{ending}")))
        except (FileNotFoundError, MirrorError) as error:
            # Users who may not list a bucket get no other answer for a file that is not there.
            if isinstance(error, MirrorError) and not _refuses(error.__cause__):
                raise
            with self._on_disk():
                file.unlink(missing_ok=True)
            return
        with self._on_disk():
            write(file, data)

    def copy(self, name: str, sha256: str = "") -> None:
        """Fetch a file unless it is here. `sha256` is its hash, or the beginning of it; "" if it is unknown.

        Raises:
            StoreError: The source has no such file, or one with another hash.
            MirrorError: The source does not answer or refuses, or the file cannot be written.
        """
        file = self.folder / name
        if file.is_file():
            return
        found = ""
        for _ in range(2):
            try:
                data = self._read(name)
            except FileNotFoundError as error:
                raise self._missing(name) from error
            found = hashlib.sha256(data).hexdigest()
            if found.startswith(sha256):
                with self._on_disk():
                    write(file, data)
                return
        raise self._damaged(name, sha256, found)

    def copy_tables(self, shards: Sequence[str]) -> None:
        """Fetch the .json and the .npy of these shards. Raises like `copy`."""

        def copy_table(shard: str) -> None:
            with self._on_disk(), locked(self._file(shard, "lock")):
                self.copy(f"{_SHARDS}/{shard}.npy", self._recorded(shard, "npy")[1])

        with Workers(_THREADS, "dali-diffusemix-mirror") as threads:
            list(threads.map(copy_table, shards))

    def listing(self) -> dict[str, int] | None:
        """Name to size in bytes of the files in the shards' folder; None if the source does not list its files."""
        files, root = self._files()
        try:
            entries = self._try(_SHARDS, lambda _: files.ls(f"{root}/{_SHARDS}", detail=True))
        except (FileNotFoundError, NotImplementedError, MirrorError) as error:
            # Many servers cannot list files, and some users may read but not list.
            if isinstance(error, MirrorError) and not _refuses(error.__cause__):
                raise
            return None
        found = {str(entry["name"]).rstrip("/").rpartition("/")[2]: entry["size"] for entry in entries}
        return None if None in found.values() else {name: int(size) for name, size in found.items()}

    # Shards -------------------------------------------------------------------------------------------------------

    def expect(self, sizes: Mapping[str, int]) -> None:
        """Set the shards that may be requested, in order, with the bytes of their tars."""
        self._sizes = dict(sizes)
        total = sum(sizes.values())
        if self.limit is not None and total > self.limit:
            warnings.warn(
                f"{self.url}: its shards have {total} bytes, but the mirror may take {self.limit} "
                "(DALI_DIFFUSEMIX_MIRROR_LIMIT). An epoch in random order uses them all at once: they will be fetched "
                "again and again. Raise the limit if the disk allows it.",
                MirrorLimitWarning,
                stacklevel=5,
            )

    def prefetch(self, first: Sequence[str]) -> None:
        """Fetch all shards in the background, `first` before the others."""
        with self._lock:
            missing = [shard for shard in first if shard not in self._opened]
        if missing:
            self._request(missing, waited_for=True)
        if not self._all_asked_for:
            self._all_asked_for = True
            self._request(list(self._sizes), waited_for=False)

    def open(self, shard: str) -> OpenFile:
        """Open a shard's tar, checked; waits until it is here.

        Raises:
            StoreError: The source has no such tar, or one of another size or hash.
            MirrorError: The source does not answer or refuses, or the disk is full.
        """
        with self._lock:
            if (opened := self._opened.get(shard)) is not None:
                self._opened.move_to_end(shard)
                return opened
            self._wanted[shard] += 1
        try:
            while True:
                self._request([shard], waited_for=True)[0].result()
                # Another process may have removed it to make room before it could be opened: fetch it again.
                if (opened := self._opened_now(shard)) is not None:
                    return opened
        finally:
            with self._lock:
                self._wanted[shard] -= 1

    def close(self) -> None:
        """Stop fetching for good, and close the tars. Fetched files stay."""
        with self._lock:
            self._closed.set()
            self._opened.clear()
            pending, self._pending = self._pending, OrderedDict()
            for shard in pending:
                self._results.pop(shard).set_exception(self._is_closed())

    def _opened_now(self, shard: str) -> OpenFile | None:
        tar = self._file(shard, "tar")
        with self._on_disk(), locked(self._file(shard, "lock")):
            if shard not in self._checked or file_size(tar) != self._sizes[shard]:
                return None
            opened = OpenFile(tar)
            if self.limit is not None:
                os.utime(opened.descriptor)  # the time of its last use
        with self._lock:
            opened = self._opened.setdefault(shard, opened)
            if len(self._opened) > _OPEN_TARS:
                self._opened.popitem(last=False)
        return opened

    def _request(self, shards: Sequence[str], *, waited_for: bool) -> list["Future[None]"]:
        """Have these shards fetched, in this order; before all others if a reader waits for them."""
        with self._lock:
            if self._closed.is_set():
                raise self._is_closed()
            for shard in shards:
                if shard not in self._results:
                    self._results[shard] = Future()
                    self._pending[shard] = False
            if waited_for:
                for shard in reversed(shards):
                    if shard in self._pending:
                        self._pending[shard] = True
                        self._pending.move_to_end(shard, last=False)
            for _ in range(min(_THREADS - self._threads, len(self._pending))):
                self._threads += 1
                threading.Thread(target=_work, args=[weakref.ref(self)], name="mirror", daemon=True).start()
            return [self._results[shard] for shard in shards]

    def _fetch_next(self) -> bool:
        """Fetch the next shard; False if there is none."""
        with self._lock:
            if not self._pending:
                self._threads -= 1
                return False
            shard, waited_for = self._pending.popitem(last=False)
        failure = None
        try:
            self._fetch(shard, waited_for)
        except Exception as error:
            # Readers that wait for it get the error. If none does yet, the next one has it fetched again.
            _log.debug("%s: shard %s was not fetched.", self.url, shard, exc_info=True)
            failure = error
        with self._lock:
            result = self._results.pop(shard)
        if failure is None:
            result.set_result(None)
        else:
            result.set_exception(failure)
        return True

    def _fetch(self, shard: str, waited_for: bool) -> None:
        """Fetch a tar. One that no reader waits for is left to a process that fetches it, and evicts no other."""
        if (failed := self._failed.get(shard)) is not None:
            raise StoreError(str(failed))
        tar = self._file(shard, "tar")
        with self._on_disk(), locked(self._file(shard, "lock"), wait=waited_for) as held:
            if not held or (shard in self._checked and file_size(tar) == self._sizes[shard]):
                return
            if file_size(tar) != self._sizes[shard] and not self._make_room(shard, evict=waited_for):
                self._leave_the_rest()
                return
            try:
                self._fetch_checked(shard, tar)
            except MirrorError:
                raise
            except StoreError as error:
                self._failed[shard] = error
                raise
            self._checked.add(shard)

    def _leave_the_rest(self) -> None:
        """Drop the requests that no reader waits for: there is no room for them."""
        with self._lock:
            for shard in [shard for shard, waited_for in self._pending.items() if not waited_for]:
                del self._pending[shard]
                self._results.pop(shard).set_result(None)

    def _fetch_checked(self, shard: str, tar: Path) -> None:
        part = self._file(shard, "part")
        sha256 = found = ""
        for _ in range(2):  # the part that a killed process left may be damaged: then from the beginning
            size, sha256 = self._recorded(shard, "tar")
            if size != self._sizes[shard]:
                raise StoreError(
                    f"{self.url}/{_SHARDS}/{shard}.tar: was changed since the store was opened: it must have "
                    f"{self._sizes[shard]} bytes, found {size}; open the store again."
                )
            if file_size(tar) == size:
                return
            found = self._receive(f"{_SHARDS}/{shard}.tar", part, size)
            if found == sha256:
                part.replace(tar)
                sync_folder(tar.parent)
                return
            part.unlink()
        raise self._damaged(f"{_SHARDS}/{shard}.tar", sha256, found)

    def _recorded(self, shard: str, ending: str) -> tuple[int, str]:
        """Bytes and SHA-256 of a shard's file, from the source's .json. The caller holds the shard's lock."""
        name = f"{_SHARDS}/{shard}.json"
        parts = [f"{_SHARDS}/{self._file(shard, other).name}" for other in ("tar", "npy", "part")]
        try:
            stored = json.loads(self.refresh(name, vouches_for=parts))["files"][ending]
            size, sha256 = int(stored["bytes"]), str(stored["sha256"])
        except FileNotFoundError as error:
            raise self._missing(name) from error
        except (ValueError, TypeError, KeyError) as error:
            raise StoreError(f"{self.url}/{name}: is damaged ({error!r}); upload the store again.") from error
        return size, sha256

    def _receive(self, name: str, part: Path, size: int) -> str:
        """Resume a download and finish it; returns the SHA-256 of the whole file."""
        sha256 = hashlib.sha256()
        if (file_size(part) or 0) > size:
            part.unlink()
        with part.open("a+b") as stream:
            stream.seek(0)
            while data := stream.read(1 << 20):
                sha256.update(data)
            done, step = stream.tell(), _MOST_BYTES
            while done < size:
                if self._closed.is_set():
                    raise self._is_closed()
                data = self._try(name, partial(self._read_range, name, done, size, step))
                sha256.update(data)
                stream.write(data)
                stream.flush()
                done += len(data)
                step = min(_MOST_BYTES, max(_LEAST_BYTES, 2 * len(data)))
            os.fsync(stream.fileno())
        return sha256.hexdigest()

    def _make_room(self, shard: str, *, evict: bool) -> bool:
        """Reserve room for a tar; with `evict`, remove the least recently used ones. False if there is no room."""
        if self.limit is None:
            return True
        with locked(self.folder / ".room.lock"):
            others: dict[str, tuple[float, int]] = {}  # last use, bytes
            with os.scandir(self.folder / _SHARDS) as entries:
                for entry in entries:
                    other, _, ending = entry.name.strip(".").rpartition(".")
                    if ending in ("tar", "part") and other != shard:
                        found = entry.stat()
                        # A tar that is being fetched counts with its final size.
                        others[other] = found.st_mtime, self._sizes.get(other, found.st_size)
            room = self.limit - sum(size for _, size in others.values())
            with self._lock:
                last_used = {other: rank for rank, other in enumerate(self._opened)}
            for other in sorted(others, key=lambda other: (last_used.get(other, -1), others[other][0])):
                if room >= self._sizes[shard] or not evict:
                    break
                if self._evict(other):
                    room += others[other][1]
            if room < self._sizes[shard] and not evict:
                return False
            self._file(shard, "part").touch()
        return True

    def _evict(self, shard: str) -> bool:
        """Remove a tar; False if this process uses it, or another fetches it."""
        with locked(self._file(shard, "lock"), wait=False) as held, self._lock:
            if not held or self._wanted[shard]:
                return False
            if (opened := self._opened.pop(shard, None)) is not None:
                reference = weakref.ref(opened)
                del opened
                if (opened := reference()) is not None:
                    self._opened[shard] = opened
                    return False
            for ending in ("tar", "part"):
                self._file(shard, ending).unlink(missing_ok=True)
        return True

    def _file(self, shard: str, ending: str) -> Path:
        hidden = "." if ending in ("lock", "part") else ""
        return self.folder / _SHARDS / f"{hidden}{shard}.{ending}"

    # The source ---------------------------------------------------------------------------------------------------

    def _files(self) -> tuple[Any, str]:
        """fsspec's file system, and the store's path in it."""
        with self._source_lock:
            if self._source is None:
                try:
                    from fsspec.core import url_to_fs

                    files, root = url_to_fs(self.url, use_listings_cache=False, skip_instance_cache=True)
                except ImportError as error:
                    raise MissingDependencyError(
                        f"{self.url}: stores at URLs need fsspec and its package for the protocol ({error}); "
                        "run `pip install 'dali-diffusemix[s3]'` for s3."
                    ) from error
                except ValueError as error:
                    raise StoreError(f"{self.url}: the URL cannot be used ({error}); correct it.") from error
                if hasattr(files, "retries"):
                    files.retries = 1  # `_try` repeats
                self._source = files, root.rstrip("/")
            return self._source

    def _read(self, name: str) -> bytes:
        """A whole small file. Raises FileNotFoundError, MirrorError."""
        files, root = self._files()
        return self._try(name, lambda _: bytes(files.cat_file(f"{root}/{name}")))

    def _read_range(self, name: str, start: int, size: int, step: int, attempt: int) -> bytes:
        """At least one byte of a file from `start` on; fewer bytes after each failed attempt."""
        files, root = self._files()
        end = min(size, start + max(_LEAST_BYTES, step >> attempt))
        try:
            data = bytes(files.cat_file(f"{root}/{name}", start=start, end=end))
        except FileNotFoundError as error:
            raise self._missing(name) from error
        except Exception as error:
            # Servers answer so to a range beyond the end.
            if start == 0 or (getattr(error, "errno", 0) != errno.EINVAL and getattr(error, "status", 0) != 416):
                raise
            data = b""
        if len(data) > end - start:  # a server without ranges sends the whole file
            data = data[start:size]
        if not data:
            raise StoreError(
                f"{self.url}/{name}: must have {size} bytes, found {start}; upload the shard again, or open the store "
                "again if it was changed."
            )
        return data

    def _try(self, name: str, call: Callable[[int], _T]) -> _T:
        """Call with the number of failed attempts until one succeeds. Raises MirrorError."""
        failure: Exception | None = None
        for attempt in range(_TRIES):
            if attempt and self._closed.wait(_FIRST_WAIT * 2 ** (attempt - 1) * _jitter.uniform(0.5, 1.5)):
                raise self._is_closed()
            try:
                return call(attempt)
            except (FileNotFoundError, NotImplementedError, StoreError):
                raise
            except Exception as error:
                if _refuses(error):
                    raise MirrorError(
                        f"{self.url}/{name}: access is refused ({error}); give credentials that may read it (for s3 "
                        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile; for a public bucket "
                        "FSSPEC_S3_ANON=true)."
                    ) from error
                _log.info("%s/%s: attempt %d failed: %r", self.url, name, attempt + 1, error)
                failure = error
        raise MirrorError(
            f"{self.url}/{name}: cannot be read, after {_TRIES} attempts ({type(failure).__name__}: {failure}); check "
            "the address and the network, and run the same again: what was fetched is kept."
        ) from failure

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        """Turn errors of the local disk into a MirrorError."""
        try:
            yield
        except OSError as error:
            needed = f"the shards have {sum(self._sizes.values())} bytes" if self._sizes else "a store needs room"
            raise MirrorError(
                f"{str(self.folder)!r}: the mirror of {self.url} cannot be written ({error}); {needed}. Make room or "
                "permit writing, set DALI_DIFFUSEMIX_MIRROR to another folder, or DALI_DIFFUSEMIX_MIRROR_LIMIT to the "
                "bytes that it may take; what was fetched is kept."
            ) from error

    def _missing(self, name: str) -> StoreError:
        return StoreError(f"{self.url}/{name}: is missing; upload the store again, all of it.")

    def _damaged(self, name: str, expected: str, found: str) -> StoreError:
        return StoreError(
            f"{self.url}/{name}: is damaged: its SHA-256 must be {expected}, found {found}, twice; upload it again "
            "from where the store was made, then open the store again."
        )

    def _is_closed(self) -> StoreError:
        return MirrorError(f"{self.url}: its mirror was closed; open the store again.")


_mirrors: "weakref.WeakSet[Mirror]" = weakref.WeakSet()
_of_parent: list[object] = []  # connections that a forked process must not close


def _after_fork() -> None:
    """Set mirrors up again: threads, connections and held locks are the parent's."""
    for mirror in _mirrors:
        _of_parent.append(mirror._source)
        mirror._begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _work(reference: "weakref.ref[Mirror]") -> None:
    """Fetch until nothing is left or the mirror is garbage."""
    while (mirror := reference()) is not None and mirror._fetch_next():
        del mirror


def _refuses(error: BaseException | None) -> bool:
    """True if the source refuses access, so that another attempt would fail too."""
    # botocore's errors are known by their names: it need not be installed.
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
        return True
    return isinstance(error, PermissionError) or getattr(error, "status", 0) in (401, 403)


def _default_folder(url: str) -> Path:
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    if own := os.environ.get("DALI_DIFFUSEMIX_MIRROR"):
        return Path(own).absolute() / key
    return cache_folder().absolute() / "mirrors" / key


def _default_limit() -> int | None:
    given = os.environ.get("DALI_DIFFUSEMIX_MIRROR_LIMIT")
    try:
        return int(given) if given else None
    except ValueError as error:
        raise ConfigError(
            f"DALI_DIFFUSEMIX_MIRROR_LIMIT must be a number of bytes, found {given!r}; write 200 GB as 200000000000."
        ) from error
