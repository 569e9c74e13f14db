"""The catalog: a table of the originals, with path, class and size, in memory and on disk.

    Catalog.open(folder)                     open what was saved
    Catalog.from_arrays(paths, labels, ...)  any layout (lists of files, CUB, several folders)

On disk a catalog is a folder: `catalog.json` names four plain `.npy` arrays, which are memory-mapped: a million rows
open in milliseconds, and all processes of a machine share them. An array file is named after its content and never
changed; the JSON is replaced last, so after a crash the previous catalog is in force.
"""

import functools
import hashlib
import io
import json
import logging
import operator
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from dali_diffusemix.base.files import cache_folder, remove_temporary, why_damaged, write
from dali_diffusemix.catalog.headers import Listing, Rejected, existing_root, first_reason, quoted, read_sizes
from dali_diffusemix.errors import CatalogError, ConfigError

_log = logging.getLogger(__name__)

_MAGIC = "dali_diffusemix.catalog"
_VERSION = 1
_JSON = "catalog.json"
# Array to its type, one file each. N rows; little-endian on every machine.
_ARRAYS: dict[str, np.dtype[Any]] = {
    "labels": np.dtype("<i4"),  # (N,)
    "sizes": np.dtype("<i4"),  # (N, 2) height, width
    "path_bytes": np.dtype("u1"),  # (all paths end to end,)
    "path_offsets": np.dtype("<i8"),  # (N + 1,)
}
_ARRAY_FILE = re.compile(rf"(?:{'|'.join(_ARRAYS)})-[0-9a-f]{{16}}\.npy")
# Files that a killed process left are removed after this long; younger ones may belong to a running process.
_ORPHAN_SECONDS = 3600.0


class StaleCatalogWarning(UserWarning):
    """The folder has changed since its catalog was made."""


@dataclass(frozen=True)
class _Origin:
    """The folder that a catalog was opened from. Its arrays were checked when they were saved."""

    folder: Path
    digest: str  # of catalog.json, which names the arrays by their content
    fingerprint: str


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Catalog:
    """The originals: N rows of relative path, label and size. Immutable; its arrays are read-only.

    Paths are bytes, as the file system has them; as `str` they are what `os.fsdecode` gives, so names that are not
    UTF-8 survive. A catalog that was opened from disk is pickled as its folder's path.

    Raises ConfigError if the fields disagree.
    """

    classes: tuple[str, ...]  # a label is an index into these
    labels: npt.NDArray[np.int32]  # (N,) int32
    sizes: npt.NDArray[np.int32]  # (N, 2) int32: height, width, as seen after the EXIF orientation
    path_bytes: npt.NDArray[np.uint8]  # (all paths end to end,) uint8
    path_offsets: npt.NDArray[np.int64]  # (N + 1,) int64: path r is path_bytes[path_offsets[r]:path_offsets[r + 1]]
    rejected: tuple[Rejected, ...] = ()
    folder_mtimes: Mapping[str, int] = field(default_factory=dict)  # class folder to nanoseconds; {}: not a folder
    _origin: _Origin | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "rejected", tuple(self.rejected))
        if self._origin is None:
            for name, dtype in _ARRAYS.items():
                object.__setattr__(self, name, _integers(name, getattr(self, name), dtype))
            _check(self)
        for name in _ARRAYS:
            # A view, so that the caller's own array stays as writable as it was.
            view = np.asarray(getattr(self, name)).view()
            view.flags.writeable = False
            object.__setattr__(self, name, view)

    @classmethod
    def from_arrays(
        cls,
        paths: Sequence[str | bytes],
        labels: npt.ArrayLike,
        classes: Sequence[str],
        sizes: npt.ArrayLike | None = None,
        *,
        root: str | os.PathLike[str] | None = None,
        workers: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> "Catalog":
        """The catalog of files that are not laid out as root/class/image.

        `paths` are relative to the root, POSIX, without `.` or `..`; `labels` (N,) are indices into `classes`; `sizes`
        (N, 2) are height and width with the EXIF orientation applied. Without sizes the headers below `root` are read,
        and files that cannot be used are left out, logged and listed in `rejected`.

        Raises ConfigError for arguments that break a rule, CatalogError if no file can be used.
        """
        encoded = [path if isinstance(path, bytes) else os.fsencode(path) for path in paths]
        for row, path in enumerate(encoded):
            if _IRREGULAR.search(path):
                raise ConfigError(
                    f"paths must be relative to the root, POSIX, without empty parts, '.', '..' or NUL; "
                    f"paths[{row}] is {os.fsdecode(path)!r}; write it as 'folder/image.jpg'."
                )
        if sizes is not None:
            path_bytes, path_offsets = _join(encoded)
            return cls(
                classes=tuple(classes),
                labels=np.asarray(labels),
                sizes=np.asarray(sizes),
                path_bytes=path_bytes,
                path_offsets=path_offsets,
            )
        if root is None:
            raise ConfigError("sizes may be left out only where root is given, below which the headers are read.")
        # Checked before a million headers are read.
        numbers = _integers("labels", labels, _ARRAYS["labels"])
        _check_labels(numbers, len(encoded), len(classes))
        names = [os.fsdecode(path) for path in encoded]
        listing = Listing(classes=tuple(classes), paths=names, labels=numbers.tolist(), rejected=[], folder_mtimes={})
        return read_listing(existing_root(root), listing, workers, progress)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        where = "" if self._origin is None else f", opened from {str(self._origin.folder)!r}"
        return f"<Catalog of {len(self)} images in {len(self.classes)} classes{where}>"

    def encoded_path(self, row: int) -> bytes:
        """The path of a row, relative to the root, as the file system has it.

        Raises:
            IndexError: There is no such row.
            CatalogError: The path leads out of the root: the catalog was tampered with.
        """
        row = range(len(self))[operator.index(row)]
        path = self.path_bytes[self.path_offsets[row] : self.path_offsets[row + 1]].tobytes()
        if _IRREGULAR.search(path):
            where = "the catalog" if self._origin is None else str(self._origin.folder)
            raise CatalogError(
                f"{where!r}: paths must be relative to the root, without empty parts, '.', '..' or NUL; row {row} has "
                f"{os.fsdecode(path)!r}; do not use what it came with, or list the folder again."
            )
        return path

    def path(self, row: int) -> str:
        """The path of a row, relative to the root, POSIX. Raises as `encoded_path`."""
        return os.fsdecode(self.encoded_path(row))

    @property
    def paths(self) -> Sequence[str]:
        """All paths, as a view that makes each string on access."""
        return _Paths(self)

    def take(self, rows: npt.ArrayLike) -> "Catalog":
        """The catalog of some rows, (n,), in the order given, with all classes. Raises IndexError."""
        chosen = np.arange(len(self))[np.asarray(rows, dtype=np.int64)]
        path_bytes, path_offsets = _join([self.encoded_path(row) for row in chosen.tolist()])
        return Catalog(
            classes=self.classes,
            labels=self.labels[chosen],
            sizes=self.sizes[chosen],
            path_bytes=path_bytes,
            path_offsets=path_offsets,
        )

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Class name to label."""
        return {name: label for label, name in enumerate(self.classes)}

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the paths and their classes, 64 hexadecimal digits, whatever the order, mtimes, sizes and content.

        SHA-256 over the sorted rows, joined by NUL; a row is the path, NUL, and the name of its class (UTF-8).
        """
        if self._origin is not None:
            return self._origin.fingerprint
        endings = [b"\0" + _encoded_name(name) for name in self.classes]
        rows = [path + endings[label] for path, label in zip(self._encoded(), self.labels.tolist(), strict=True)]
        rows.sort()
        return hashlib.sha256(b"\0".join(rows)).hexdigest()

    def _encoded(self) -> Iterator[bytes]:
        """Every path as bytes; a million take well under a second."""
        everything, ends = self.path_bytes.tobytes(), self.path_offsets.tolist()
        return map(everything.__getitem__, map(slice, ends[:-1], ends[1:]))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the catalog to a folder, replacing one that is there.

        A reader, and a crash at any moment, finds either the old catalog or the new one. Raises CatalogError.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            before = _files_named(folder)
            files = {}
            for name, dtype in _ARRAYS.items():
                content = io.BytesIO()
                np.save(content, getattr(self, name).astype(dtype, copy=False), allow_pickle=False)
                data = content.getbuffer()
                files[name] = f"{name}-{hashlib.sha256(data).hexdigest()[:16]}.npy"
                write(folder / files[name], data)
            write(folder / _JSON, self._json(files).encode("ascii"))
            _remove_stale(folder, before, keep=files.values())
        except OSError as error:
            raise CatalogError(
                f"{str(folder)!r}: the catalog cannot be written ({error}); permit writing there, or choose another "
                "folder (DALI_DIFFUSEMIX_CACHE sets the cache folder)."
            ) from error

    def _json(self, files: Mapping[str, str]) -> str:
        # Pure ASCII: JSON escapes a lone surrogate (a byte that is not UTF-8) as \udcXX, and restores it on reading.
        return json.dumps(
            {
                "magic": _MAGIC,
                "version": _VERSION,
                "count": len(self),
                "fingerprint": self.fingerprint,
                "arrays": files,
                "classes": self.classes,
                "rejected": [asdict(one) for one in self.rejected],
                "folder_mtimes": dict(self.folder_mtimes),
            },
            ensure_ascii=True,
            indent=1,
        )

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "Catalog":
        """Open a catalog that `save` wrote, memory-mapped. Raises CatalogError."""
        folder = Path(folder).absolute()
        text = _read_json(folder)
        try:
            return cls._load(folder, text)
        except CatalogError:
            # Another process may have replaced the catalog, and removed its arrays, since the JSON was read.
            if (now := _read_json(folder)) == text:
                raise
            return cls._load(folder, now)

    @classmethod
    def _load(cls, folder: Path, text: bytes) -> "Catalog":
        file = folder / _JSON
        try:
            stored = json.loads(text)
            if not isinstance(stored, dict):
                raise TypeError(f"must be an object, found {type(stored).__name__}")
            magic, version = stored["magic"], stored["version"]
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise _damaged(file, f"must be a JSON object with 'magic' and 'version' ({why_damaged(error)})") from error
        if magic != _MAGIC:
            raise _damaged(file, f"'magic' must be {_MAGIC!r}, found {magic!r}")
        if version != _VERSION:
            raise CatalogError(
                f"{str(file)!r}: 'version' must be {_VERSION}, found {version!r}; use the release of dali_diffusemix "
                "that wrote it, or list the folder again with `dali-diffusemix index ROOT --refresh`."
            )
        try:
            count = int(stored["count"])
            names = {name: str(stored["arrays"][name]) for name in _ARRAYS}
            fields: dict[str, Any] = {
                "classes": tuple(map(str, stored["classes"])),
                "rejected": tuple(Rejected(str(one["path"]), str(one["reason"])) for one in stored["rejected"]),
                "folder_mtimes": {str(name): int(mtime) for name, mtime in stored["folder_mtimes"].items()},
            }
            origin = _Origin(folder, hashlib.sha256(text).hexdigest(), str(stored["fingerprint"]))
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            raise _damaged(file, f"a field is missing or of the wrong kind ({why_damaged(error)})") from error
        for name in names.values():
            if not _ARRAY_FILE.fullmatch(name):  # so that it cannot lead to another folder
                raise _damaged(file, f"array files must be named NAME-HASH.npy, found {name!r}")
        shapes = {"labels": (count,), "sizes": (count, 2), "path_offsets": (count + 1,)}
        arrays: dict[str, Any] = {name: _map(folder / names[name], _ARRAYS[name], shapes.get(name)) for name in _ARRAYS}
        offsets, total = arrays["path_offsets"], len(arrays["path_bytes"])
        if offsets[0] != 0 or offsets[-1] != total:
            found = f"{offsets[0]} and {offsets[-1]}"
            raise _damaged(folder / names["path_offsets"], f"must run from 0 to {total}, found {found}")
        # Some milliseconds for a million rows; without this, code far from here would fail.
        labels, sizes, classes = arrays["labels"], arrays["sizes"], len(fields["classes"])
        if (offsets[1:] < offsets[:-1]).any():
            raise _damaged(folder / names["path_offsets"], "must not go down, but does")
        if count and not 0 <= labels.min() <= labels.max() < classes:
            found = f"{labels.min()} to {labels.max()}"
            raise _damaged(
                folder / names["labels"], f"must lie in 0 to {classes - 1}, indices into classes, found {found}"
            )
        if count and sizes.min() < 1:
            raise _damaged(folder / names["sizes"], f"must be 1 or more, found {sizes.min()}")
        return cls(**fields, **arrays, _origin=origin)

    def __reduce__(self) -> tuple[Callable[..., "Catalog"], tuple[Any, ...]]:
        if self._origin is not None:
            return _reopen, (self._origin.folder, self._origin.digest)
        names = ("classes", *_ARRAYS, "rejected", "folder_mtimes")
        return _rebuild, ({name: getattr(self, name) for name in names},)


def default_location(root: str | os.PathLike[str]) -> Path:
    """The default folder for the catalog of `root`.

    It is catalogs/HASH in `cache_folder`; HASH is of the root's absolute path with links resolved.
    """
    return cache_folder() / "catalogs" / hashlib.sha256(os.fsencode(Path(root).resolve())).hexdigest()[:16]


# Values and checks ----------------------------------------------------------------------------------------------------

# An empty part (so also a leading or trailing slash, and the empty path), `.`, `..`, or a NUL.
_IRREGULAR = re.compile(rb"(?:\A|/)\.{0,2}(?:/|\Z)|\0")


class _Paths(Sequence[str]):
    """All paths of a catalog, each made on access."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def __len__(self) -> int:
        return len(self._catalog)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self._catalog.path(one) for one in range(len(self))[row]]
        return self._catalog.path(row)

    def __iter__(self) -> Iterator[str]:
        return map(os.fsdecode, self._catalog._encoded())

    def __repr__(self) -> str:
        return f"<paths of {self._catalog!r}>"


def _join(paths: Sequence[bytes]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Paths end to end, (total,) uint8, and their offsets, (N + 1,) int64."""
    offsets = np.zeros(len(paths) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, paths), np.int64, len(paths)), out=offsets[1:])
    return np.frombuffer(b"".join(paths), np.uint8), offsets


def _integers(name: str, values: npt.ArrayLike, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The values as contiguous integers of `dtype`, never rounded or wrapped; a copy if that is needed."""
    given = np.asarray(values)
    if given.size and given.dtype.kind not in "iu":
        raise ConfigError(f"{name} must be integers, found {given.dtype}.")
    if given.size and (given.min() < 0 or given.max() > np.iinfo(dtype).max):
        raise ConfigError(f"{name} must lie between 0 and {np.iinfo(dtype).max}, found {given.min()} to {given.max()}.")
    return np.ascontiguousarray(given, dtype)


def _check_labels(labels: npt.NDArray[Any], count: int, classes: int) -> None:
    if labels.shape != (count,):
        raise ConfigError(f"labels must be of shape ({count},), one for each path, found {labels.shape}.")
    if not count:
        raise ConfigError("paths must name at least one image, found none.")
    if labels.max() >= classes:
        raise ConfigError(f"labels must lie in 0..{classes - 1}, indices into classes; found {labels.max()}.")


def _check(catalog: Catalog) -> None:
    """Raise ConfigError unless the fields agree."""
    classes, offsets, sizes = catalog.classes, catalog.path_offsets, catalog.sizes
    if len(set(classes)) != len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise ConfigError(f"classes must differ from one another, found {twice!r} more than once.")
    for name in classes:
        _encoded_name(name)
    if offsets.ndim != 1 or not len(offsets):
        raise ConfigError(f"path_offsets must be of shape (N + 1,), found {offsets.shape}.")
    count = len(offsets) - 1
    _check_labels(catalog.labels, count, len(classes))
    if sizes.shape != (count, 2):
        raise ConfigError(f"sizes must be of shape ({count}, 2), height and width, found {sizes.shape}.")
    if sizes.min() < 1:
        row = int(np.argmin(sizes.min(axis=1)))
        raise ConfigError(f"sizes must be 1 or more, found {tuple(sizes[row].tolist())} in row {row}.")
    if catalog.path_bytes.ndim != 1 or offsets[0] != 0 or offsets[-1] != len(catalog.path_bytes):
        raise ConfigError(
            f"path_offsets must run from 0 to the length of path_bytes, {catalog.path_bytes.shape}; "
            f"found {offsets[0]} to {offsets[-1]}."
        )
    if (offsets[1:] <= offsets[:-1]).any():
        raise ConfigError(f"paths must not be empty, found one in row {np.argmax(offsets[1:] <= offsets[:-1])}.")
    if not catalog.path_bytes.all():
        raise ConfigError("paths must not contain NUL.")


def _encoded_name(name: str) -> bytes:
    try:
        encoded = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise ConfigError(f"classes must be text or what os.fsdecode gives, found {name!r}.") from error
    if b"\0" in encoded:
        raise ConfigError(f"classes must not contain NUL, found {name!r}.")
    return encoded


def _rebuild(fields: dict[str, Any]) -> Catalog:
    return Catalog(**fields)


def _reopen(folder: Path, digest: str) -> Catalog:
    catalog = Catalog.open(folder)
    if catalog._origin is None or catalog._origin.digest != digest:
        raise CatalogError(
            f"{str(folder)!r}: the catalog was replaced while another process was using it; its rows may stand for "
            "other images now. Build the dataset again."
        )
    return catalog


def read_listing(
    root: Path, listing: Listing, workers: int | None, progress: Callable[[int, int], None] | None
) -> Catalog:
    """The catalog of a listing: reads the headers, logs and rejects files that cannot be used.

    Raises CatalogError if no file can be used.
    """
    sizes, verdicts = read_sizes(root, listing.paths, workers, progress)
    rejected = sorted(listing.rejected + verdicts, key=operator.attrgetter("path"))
    usable = sizes[:, 0] > 0
    if not usable.any():
        raise CatalogError(
            f"{str(root)!r}: there is no usable image of any class ({quoted(listing.classes)}); "
            f"expected root/class/image.jpg. {first_reason(rejected)}"
        )
    if rejected:
        _log.warning("%r: %s", str(root), first_reason(rejected))
    taken = [os.fsencode(path) for path, use in zip(listing.paths, usable.tolist(), strict=True) if use]
    path_bytes, path_offsets = _join(taken)
    return Catalog(
        classes=listing.classes,
        labels=np.array(listing.labels, np.int32)[usable],
        sizes=sizes[usable],
        path_bytes=path_bytes,
        path_offsets=path_offsets,
        rejected=tuple(rejected),
        folder_mtimes=listing.folder_mtimes,
    )


# On disk --------------------------------------------------------------------------------------------------------------


def _damaged(file: Path, what: str) -> CatalogError:
    return CatalogError(f"{str(file)!r}: {what}; list the folder again with `dali-diffusemix index ROOT --refresh`.")


def is_catalog(folder: Path) -> bool:
    """True if a folder has a catalog, whole or damaged."""
    try:
        (folder / _JSON).stat()
    except OSError:
        return False
    return True


def _read_json(folder: Path) -> bytes:
    try:
        return (folder / _JSON).read_bytes()
    except FileNotFoundError as error:
        raise CatalogError(
            f"{str(folder)!r}: there is no catalog ({_JSON}); make one with `dali-diffusemix index ROOT`."
        ) from error
    except OSError as error:
        raise CatalogError(f"{str(folder / _JSON)!r}: cannot be read ({error.strerror}).") from error


def _map(file: Path, dtype: np.dtype[Any], shape: tuple[int, ...] | None) -> npt.NDArray[Any]:
    """Map an array, read-only; `shape` None: of any length. Raises CatalogError."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a header is a Python literal, which fails in many ways
        # NumPy advises to unpickle unknown content.
        why = "it is no array" if "allow_pickle" in str(error) else error
        raise _damaged(file, f"the array is missing or cut short ({why})") from error
    expected = (*array.shape[:1],) if shape is None else shape
    if array.dtype != dtype or array.shape != expected:
        raise _damaged(file, f"must be {dtype} of shape {expected}, found {array.dtype} of shape {array.shape}")
    return np.asarray(array)


def _files_named(folder: Path) -> set[str]:
    """The array files that a folder's catalog names, if it can be read."""
    try:
        return set(map(str, json.loads((folder / _JSON).read_bytes())["arrays"].values()))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return set()


def _remove_stale(folder: Path, before: set[str], keep: Iterable[str]) -> None:
    """Remove the arrays of the previous catalog, and what killed processes left."""
    kept = set(keep)
    for file in folder.iterdir():
        if file.name in kept or not _ARRAY_FILE.fullmatch(file.name):
            continue
        try:
            if file.name in before or time.time() - file.stat().st_mtime > _ORPHAN_SECONDS:
                file.unlink()
        except OSError:
            _log.debug("Not removed: %s", file, exc_info=True)  # another process did, or has it mapped (Windows)
    remove_temporary(folder, seconds=_ORPHAN_SECONDS)
