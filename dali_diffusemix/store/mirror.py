"""Mirrors: a store behind a URL, copied file by file into a local folder that all processes of a machine share.

    EditStore.open("s3://bucket/edits")      any URL that fsspec knows: s3, gs, https, file, memory

The small files are fetched when a store is opened. A shard's tar is fetched when it is first needed, and ahead of
use once training begins: all shards in order, and before them those that a reader waits for.

    store.json, index.json, catalog/catalog.json, shards/*.json     fetched anew by each process
    all else                                                        vouched for by one of these, with its SHA-256

A file that is vouched for is in its place only while the JSON beside it is the one that it was checked against: where
that has changed at the source, what it vouched for is removed before it is replaced. So what is there can be used, and
whatever moment a process is killed at, the next one goes on from there, in the middle of a tar if need be.

    DALI_DIFFUSEMIX_MIRROR           folder that mirrors are made in; else mirrors/ in the user's cache folder
    DALI_DIFFUSEMIX_MIRROR_LIMIT     bytes that the tars of one mirror may take; else there is no limit
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
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from dali_diffusemix.catalog.table import default_location
from dali_diffusemix.errors import ConfigError, MissingDependencyError, StoreError
from dali_diffusemix.images.reading import OpenFile

__all__ = ["Mirror", "MirrorError", "MirrorLimitWarning", "is_url"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_URL: Final = re.compile(r"(?:[A-Za-z0-9+.-]+::)*[A-Za-z][A-Za-z0-9+.-]*://")
_SHARDS: Final = "shards"
# Downloads at once. One connection to S3 gives some 50 MB/s.
_THREADS: Final = 8
# Bytes asked for at once. A connection that is cut costs what it had of them, so it is asked for less the next time.
_MOST_BYTES: Final = 16 << 20
_LEAST_BYTES: Final = 64 << 10
# Tries of one request, and seconds before the second; each further wait is twice as long.
_TRIES: Final = 6
_FIRST_WAIT = 0.5
# Open tars, each a file descriptor, of which a process has 1024 as a rule.
_OPEN_TARS: Final = 200
# Of its own, so that the program's own draws stay what they are.
_jitter = random.SystemRandom()


class MirrorError(StoreError):
    """A mirror cannot be filled: its source does not answer or refuses, or the disk is full."""


class MirrorLimitWarning(UserWarning):
    """A mirror may not grow as large as its store, so that shards are fetched again and again."""


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether it is a URL and no local path. A `Path` never is: it makes `s3:/bucket` of `s3://bucket`."""
    return isinstance(path, str) and _URL.match(path) is not None


class Mirror:
    """A local folder that becomes a copy of a store: shards/NAME.json, .npy and .tar, and what lies beside shards/.

    Threads fetch tars; they are started when one is asked for, and end when nothing is left to fetch, with the process,
    or soon after nobody holds the mirror. It may be used by many threads, and after a fork.

    Args:
        url: Where the store lies, as fsspec has it. Credentials come from where its protocol looks for them.
        folder: Where the copy is made; else one for each URL, in the folder that the module's head tells of.
        limit: Bytes that its tars may take; else as the module's head tells. Tars in use are never removed for it.

    Raises:
        ConfigError: the limit is no number of bytes.
    """

    def __init__(self, url: str, folder: str | os.PathLike[str] | None = None, limit: int | None = None) -> None:
        self.url = url.rstrip("/")
        self.folder = _default_folder(self.url) if folder is None else Path(folder).absolute()
        self.limit = _default_limit() if limit is None else limit
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit must be at least 1 byte, found {self.limit}.")
        self._sizes: dict[str, int] = {}  # bytes of the tar of each shard that may be asked for
        self._checked: set[str] = set()  # shards whose .json this process has compared with the source's
        self._failed: dict[str, StoreError] = {}  # shards that are not what their .json says
        self._opened: OrderedDict[str, OpenFile] = OrderedDict()  # the one used last stands last
        self._begin()
        _mirrors.add(self)

    def _begin(self) -> None:
        """What a forked process needs anew."""
        self._lock = threading.Lock()
        self._source: tuple[Any, str] | None = None  # fsspec's file system, and the store's path in it
        self._source_lock = threading.Lock()
        self._pending: OrderedDict[str, bool] = OrderedDict()  # shards to fetch; whether somebody waits for it
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
        """Keep the small files as they are while they are fetched and opened: one process at a time."""
        with self._on_disk():
            (self.folder / _SHARDS).mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / ".lock"):
            yield

    def refresh(self, name: str, vouches_for: Sequence[str] = ()) -> bytes:
        """Fetch a file anew; if it is not what it was, remove the files that it vouches for.

        Raises:
            FileNotFoundError: the source has no such file; nor has the mirror any longer, nor what it vouched for.
            MirrorError: the source does not answer or refuses, or the file cannot be written.
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
                    _write(file, data)
        if data is None:
            assert missing is not None
            raise missing
        return data

    def copy(self, name: str, sha256: str = "") -> None:
        """Fetch a file unless it is here. `sha256` is its hash, or how that begins; "": none is known.

        Raises:
            StoreError: the source has no such file, or one with another hash.
            MirrorError: the source does not answer or refuses, or the file cannot be written.
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
                    _write(file, data)
                return
        raise self._damaged(name, sha256, found)

    def copy_tables(self, shards: Sequence[str]) -> None:
        """Fetch the .json and the .npy of these shards. Raises as `copy`."""

        def copy_table(shard: str) -> None:
            with self._on_disk(), _locked(self._file(shard, "lock")):
                self.copy(f"{_SHARDS}/{shard}.npy", self._recorded(shard, "npy")[1])

        with ThreadPoolExecutor(_THREADS) as threads:
            list(threads.map(copy_table, shards))

    def listing(self) -> dict[str, int] | None:
        """Name to size in bytes of all that lies in the shards' folder; None if the source does not list its files."""
        files, root = self._files()
        try:
            entries = self._try(_SHARDS, lambda _: files.ls(f"{root}/{_SHARDS}", detail=True))
        except (FileNotFoundError, NotImplementedError, MirrorError) as error:
            # Many servers give files, but no lists of them, and some users may read, but not list.
            if isinstance(error, MirrorError) and not _refuses(error.__cause__):
                raise
            return None
        found = {str(entry["name"]).rstrip("/").rpartition("/")[2]: entry["size"] for entry in entries}
        return None if None in found.values() else {name: int(size) for name, size in found.items()}

    # Shards -------------------------------------------------------------------------------------------------------

    def expect(self, sizes: Mapping[str, int]) -> None:
        """Say which shards may be asked for, in order, and the bytes of the tar of each."""
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
        """Fetch all shards in the background, and `first` before all others, several at once."""
        with self._lock:
            missing = [shard for shard in first if shard not in self._opened]
        if missing:
            self._request(missing, waited_for=True)
        if not self._all_asked_for:
            self._all_asked_for = True
            self._request(list(self._sizes), waited_for=False)

    def open(self, shard: str) -> OpenFile:
        """A shard's tar, checked; waits until it is here.

        Raises:
            StoreError: the source has no such tar, or one of another size or hash than the store's.
            MirrorError: the source does not answer or refuses, or the disk is full.
        """
        with self._lock:
            if (opened := self._opened.get(shard)) is not None:
                self._opened.move_to_end(shard)
                return opened
            self._wanted[shard] += 1
        try:
            while True:
                self._request([shard], waited_for=True)[0].result()
                # Another process may have made room with it before it could be opened; then once more.
                if (opened := self._opened_now(shard)) is not None:
                    return opened
        finally:
            with self._lock:
                self._wanted[shard] -= 1

    def close(self) -> None:
        """Stop fetching, and let go of open tars. What was fetched stays; a mirror that is closed fetches no more."""
        with self._lock:
            self._closed.set()
            self._opened.clear()
            pending, self._pending = self._pending, OrderedDict()
            for shard in pending:
                self._results.pop(shard).set_exception(self._is_closed())

    def _opened_now(self, shard: str) -> OpenFile | None:
        tar = self._file(shard, "tar")
        with self._on_disk(), _locked(self._file(shard, "lock")):
            if shard not in self._checked or _size(tar) != self._sizes[shard]:
                return None
            opened = OpenFile(tar)
            if self.limit is not None:
                os.utime(opened.descriptor)  # when it was used last
        with self._lock:
            opened = self._opened.setdefault(shard, opened)
            if len(self._opened) > _OPEN_TARS:
                self._opened.popitem(last=False)
        return opened

    def _request(self, shards: Sequence[str], *, waited_for: bool) -> list["Future[None]"]:
        """Have these shards fetched, in this order; those that somebody waits for before all others."""
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
        """Fetch the next shard; False: there was none."""
        with self._lock:
            if not self._pending:
                self._threads -= 1
                return False
            shard, waited_for = self._pending.popitem(last=False)
        failure = None
        try:
            self._fetch(shard, waited_for)
        except Exception as error:
            # Who asked for it gets it. If nobody did yet, somebody will, and it is tried again.
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
        """Bring a tar into its place. What nobody waits for is left to whoever fetches it, and never costs another."""
        if (failed := self._failed.get(shard)) is not None:
            raise StoreError(str(failed))
        tar = self._file(shard, "tar")
        with self._on_disk(), _locked(self._file(shard, "lock"), wait=waited_for) as held:
            if not held or (shard in self._checked and _size(tar) == self._sizes[shard]):
                return
            if _size(tar) != self._sizes[shard] and not self._make_room(shard, evict=waited_for):
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
        """There is no room for what nobody waits for."""
        with self._lock:
            for shard in [shard for shard, waited_for in self._pending.items() if not waited_for]:
                del self._pending[shard]
                self._results.pop(shard).set_result(None)

    def _fetch_checked(self, shard: str, tar: Path) -> None:
        part = self._file(shard, "part")
        sha256 = found = ""
        for _ in range(2):  # what a process that was killed has left may be damaged: then from its beginning
            size, sha256 = self._recorded(shard, "tar")
            if size != self._sizes[shard]:
                raise StoreError(
                    f"{self.url}/{_SHARDS}/{shard}.tar: was changed since the store was opened: it must have "
                    f"{self._sizes[shard]} bytes, found {size}; open the store again."
                )
            if _size(tar) == size:
                return
            found = self._receive(f"{_SHARDS}/{shard}.tar", part, size)
            if found == sha256:
                part.replace(tar)
                _sync(tar.parent)
                return
            part.unlink()
        raise self._damaged(f"{_SHARDS}/{shard}.tar", sha256, found)

    def _recorded(self, shard: str, ending: str) -> tuple[int, str]:
        """Bytes and SHA-256 of one of a shard's files, as the source has them; whoever asks holds the shard's lock."""
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
        """Go on with a download where it ended, to its end; gives the SHA-256 of all of it."""
        sha256 = hashlib.sha256()
        if (_size(part) or 0) > size:
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
        """Take room for a tar, from the tars used least recently if need be; False: there is none."""
        if self.limit is None:
            return True
        with _locked(self.folder / ".room.lock"):
            others: dict[str, tuple[float, int]] = {}  # last use, bytes
            with os.scandir(self.folder / _SHARDS) as entries:
                for entry in entries:
                    other, _, ending = entry.name.strip(".").rpartition(".")
                    if ending in ("tar", "part") and other != shard:
                        found = entry.stat()
                        # What is being fetched will be as large as it must be.
                        others[other] = found.st_mtime, self._sizes.get(other, found.st_size)
            room = self.limit - sum(size for _, size in others.values())
            with self._lock:
                places = {other: place for place, other in enumerate(self._opened)}
            for other in sorted(others, key=lambda other: (places.get(other, -1), others[other][0])):
                if room >= self._sizes[shard] or not evict:
                    break
                if self._evict(other):
                    room += others[other][1]
            if room < self._sizes[shard] and not evict:
                return False
            self._file(shard, "part").touch()
        return True

    def _evict(self, shard: str) -> bool:
        """Remove a tar that nobody here is using; False: somebody is, or is fetching it."""
        with _locked(self._file(shard, "lock"), wait=False) as held, self._lock:
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
                    files.retries = 1  # it is tried again here
                self._source = files, root.rstrip("/")
            return self._source

    def _read(self, name: str) -> bytes:
        """A whole small file. Raises FileNotFoundError, MirrorError."""
        files, root = self._files()
        return self._try(name, lambda _: bytes(files.cat_file(f"{root}/{name}")))

    def _read_range(self, name: str, start: int, size: int, step: int, attempt: int) -> bytes:
        """Some bytes of a file from `start` on, the fewer the more attempts have failed. At least one."""
        files, root = self._files()
        end = min(size, start + max(_LEAST_BYTES, step >> attempt))
        try:
            data = bytes(files.cat_file(f"{root}/{name}", start=start, end=end))
        except FileNotFoundError as error:
            raise self._missing(name) from error
        except Exception as error:
            # What servers say to a range that lies beyond the end.
            if start == 0 or (getattr(error, "errno", 0) != errno.EINVAL and getattr(error, "status", 0) != 416):
                raise
            data = b""
        if len(data) > end - start:  # a server that knows no ranges gives the whole file
            data = data[start:size]
        if not data:
            raise StoreError(
                f"{self.url}/{name}: must have {size} bytes, found {start}; upload the shard again, or open the store "
                "again if it was changed."
            )
        return data

    def _try(self, name: str, call: Callable[[int], _T]) -> _T:
        """Call with the number of attempts that have failed, until one does not."""
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
        """Turn what goes wrong with the local disk into a MirrorError."""
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
    """Threads, connections and held locks are the parent's."""
    for mirror in _mirrors:
        _of_parent.append(mirror._source)
        mirror._begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _work(reference: "weakref.ref[Mirror]") -> None:
    """Fetch until nothing is left, or nobody holds the mirror."""
    while (mirror := reference()) is not None and mirror._fetch_next():
        del mirror


def _refuses(error: BaseException | None) -> bool:
    """Whether asking again would give the same answer."""
    # botocore's errors are known by their names: it need not be installed.
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
        return True
    return isinstance(error, PermissionError) or getattr(error, "status", 0) in (401, 403)


def _default_folder(url: str) -> Path:
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    if own := os.environ.get("DALI_DIFFUSEMIX_MIRROR"):
        return Path(own).absolute() / key
    return default_location(os.curdir).parents[1].absolute() / "mirrors" / key


def _default_limit() -> int | None:
    given = os.environ.get("DALI_DIFFUSEMIX_MIRROR_LIMIT")
    try:
        return int(given) if given else None
    except ValueError as error:
        raise ConfigError(
            f"DALI_DIFFUSEMIX_MIRROR_LIMIT must be a number of bytes, found {given!r}; write 200 GB as 200000000000."
        ) from error


@contextmanager
def _locked(file: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock; the system lets go of it when the process ends. Gives whether it is held."""
    import fcntl  # not on every system, and only mirrors need it

    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            held = False
        yield held
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # processes that were forked in between hold the descriptor too
        os.close(descriptor)


def _size(file: Path) -> int | None:
    """Bytes of a file; None: there is none."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return None


def _write(file: Path, data: bytes) -> None:
    """Write a file whole or not at all. Whoever does so holds the lock of its place."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
    _sync(file.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
