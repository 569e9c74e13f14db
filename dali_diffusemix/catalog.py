"""The catalog: which originals there are, in which order, of which class and size.

    index("data/train")                      list a folder once, keep the result, open it ever after
    Catalog.from_arrays(paths, labels, ...)  any other layout (lists of files, CUB, several folders)

A folder is read as `torchvision.datasets.ImageFolder` reads it, root/class/**/image, in the same order. Only
headers are read, and every visible file is either taken or reported with a reason (`Catalog.rejected`).

On disk a catalog is a folder: `catalog.json` says what there is and names four plain `.npy` arrays, which are
memory-mapped: a million rows open in milliseconds, and all processes of a machine share them. An array file is named
after its content and never changed; the JSON is replaced last, so a crash leaves the previous catalog in force.
"""

import functools
import hashlib
import io
import json
import logging
import operator
import os
import re
import secrets
import shlex
import struct
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from dali_diffusemix.errors import CatalogError, ConfigError

__all__ = [
    "MAX_PIXELS",
    "Catalog",
    "Listing",
    "Rejected",
    "StaleCatalogWarning",
    "default_location",
    "index",
    "list_images",
    "orientation",
]

_log = logging.getLogger(__name__)

MAX_PIXELS = 89_478_485
"""Images of more pixels are rejected. It is Pillow's own limit, above which it warns of a decompression bomb."""

_MAGIC = "dali_diffusemix.catalog"
_VERSION = 1
_JSON = "catalog.json"
# Each is stored in its own file. N rows; little-endian on every machine.
_ARRAYS: dict[str, np.dtype[Any]] = {
    "labels": np.dtype("<i4"),  # (N,)
    "sizes": np.dtype("<i4"),  # (N, 2) height, width
    "path_bytes": np.dtype("u1"),  # (all paths end to end,)
    "path_offsets": np.dtype("<i8"),  # (N + 1,)
}
_ARRAY_FILE = re.compile(rf"(?:{'|'.join(_ARRAYS)})-[0-9a-f]{{16}}\.npy")
_TEMPORARY = re.compile(rf"\.(?:{_ARRAY_FILE.pattern}|catalog\.json)\.[0-9a-f]{{8}}\.tmp")
# What a killed process left behind is removed after this long; anything younger may belong to a living one.
_ORPHAN_SECONDS = 3600.0
SUPPORTED = "JPEG, PNG, BMP, TIFF, PNM and WebP"
# Warm, one thread reads most headers a second, since parsing holds the GIL. Eight lose half of that (still four times
# what is needed), but keep a cold disk or a network folder busy, where one thread would wait for hours.
_WORKERS = 8
_FILES_PER_TASK = 128
# Beyond all metadata of 98 % of photographs (ImageNet), and little enough to fetch over a network.
_HEADER_BYTES = 16384
_START_BYTES = 4096  # that tell what a file is


class StaleCatalogWarning(UserWarning):
    """The folder has changed since its catalog was made."""


@dataclass(frozen=True)
class Rejected:
    """A file (or folder) that was found and left out."""

    path: str  # relative to the root, POSIX
    reason: str  # a sentence: the rule, the value found, the remedy where there is one


@dataclass(frozen=True)
class _Origin:
    """Where a catalog was opened from. It was checked when it was saved, and is not checked again."""

    folder: Path
    digest: str  # of catalog.json, which names the arrays by their content
    fingerprint: str


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Catalog:
    """The originals: N rows of relative path, label and size. Immutable; its arrays are read-only.

    A path is bytes, as the file system has it; as `str` it is what `os.fsdecode` makes of it, so that names that are
    not UTF-8 come back unharmed. A catalog that was opened from disk is pickled as its location.

    Raises ConfigError where the fields do not agree.
    """

    classes: tuple[str, ...]  # a label is a place in here
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

        `paths` are relative to the root, POSIX, without `.` or `..`; `labels` (N,) are places in `classes`; `sizes`
        (N, 2) are height and width with the EXIF orientation applied. Without sizes the headers below `root` are read,
        and files that cannot be used are left out, logged and listed in `rejected`.

        Raises ConfigError for arguments that break a rule, CatalogError if no file at all can be used.
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
        return _read_headers(_existing_root(root), listing, workers, progress)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        where = "" if self._origin is None else f", opened from {str(self._origin.folder)!r}"
        return f"<Catalog of {len(self)} images in {len(self.classes)} classes{where}>"

    def encoded_path(self, row: int) -> bytes:
        """The path of a row, relative to the root, as the file system has it.

        Raises:
            IndexError: There is no such row.
            CatalogError: The path leads out of the root: somebody has changed the catalog.
        """
        row = range(len(self))[operator.index(row)]
        path = self.path_bytes[self.path_offsets[row] : self.path_offsets[row + 1]].tobytes()
        if _IRREGULAR.search(path):
            where = "the catalog" if self._origin is None else str(self._origin.folder)
            raise CatalogError(
                f"{where!r}: paths must be relative to the root, without empty parts, '.', '..' or NUL; row {row} has "
                f"{os.fsdecode(path)!r}; do not use what it came with, or list the folder anew."
            )
        return path

    def path(self, row: int) -> str:
        """The path of a row, relative to the root, POSIX. Raises as `encoded_path`."""
        return os.fsdecode(self.encoded_path(row))

    @property
    def paths(self) -> Sequence[str]:
        """All paths, as a view that makes each string when it is asked for."""
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
        """What is listed, in 64 hexadecimal digits: independent of row order, of mtimes, of sizes and of content.

        SHA-256 over the rows, sorted, joined by NUL; a row is the path, NUL, and the name of its class (UTF-8).
        """
        if self._origin is not None:
            return self._origin.fingerprint
        endings = [b"\0" + _encoded_name(name) for name in self.classes]
        rows = [path + endings[label] for path, label in zip(self._encoded(), self.labels.tolist(), strict=True)]
        rows.sort()
        return hashlib.sha256(b"\0".join(rows)).hexdigest()

    def _encoded(self) -> Iterator[bytes]:
        """Every path as bytes: a million in well under a second."""
        everything, ends = self.path_bytes.tobytes(), self.path_offsets.tolist()
        return map(everything.__getitem__, map(slice, ends[:-1], ends[1:]))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the catalog to a folder, in place of the one that may be there.

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
                _write(folder / files[name], data)
            _write(folder / _JSON, self._json(files).encode("ascii"))
            _remove_stale(folder, before, keep=files.values())
        except OSError as error:
            raise CatalogError(
                f"{str(folder)!r}: the catalog cannot be written ({error}); permit writing there, or choose another "
                "folder (DALI_DIFFUSEMIX_CACHE names that of the cache)."
            ) from error

    def _json(self, files: Mapping[str, str]) -> str:
        # Pure ASCII: JSON escapes a lone surrogate (a byte that is not UTF-8) as \udcXX, and gives it back on reading.
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
        """The catalog that `save` wrote, memory-mapped. Raises CatalogError."""
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
                "that wrote it, or list the folder anew with `dali-diffusemix index ROOT --refresh`."
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
        # Some milliseconds for a million rows. Whoever trusts them later fails far from here.
        labels, sizes, classes = arrays["labels"], arrays["sizes"], len(fields["classes"])
        if (offsets[1:] < offsets[:-1]).any():
            raise _damaged(folder / names["path_offsets"], "must not go down, but does")
        if count and not 0 <= labels.min() <= labels.max() < classes:
            found = f"{labels.min()} to {labels.max()}"
            raise _damaged(
                folder / names["labels"], f"must lie in 0 to {classes - 1}, places in classes, found {found}"
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
    """The folder that keeps the catalog of `root` unless another is given.

    It is catalogs/HASH in `cache_folder`; HASH is of the root's absolute path with links resolved.
    """
    return cache_folder() / "catalogs" / hashlib.sha256(os.fsencode(Path(root).resolve())).hexdigest()[:16]


def cache_folder() -> Path:
    """The user's folder for what can be made again: $DALI_DIFFUSEMIX_CACHE, else dali-diffusemix in $XDG_CACHE_HOME or
    ~/.cache. Raises ConfigError where there is no home folder either.
    """
    if own := os.environ.get("DALI_DIFFUSEMIX_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "dali-diffusemix"
    try:
        return Path.home() / ".cache" / "dali-diffusemix"
    except RuntimeError as error:
        raise ConfigError("There is no home folder to cache in; set DALI_DIFFUSEMIX_CACHE to a folder.") from error


def index(
    root: str | os.PathLike[str],
    *,
    location: str | os.PathLike[str] | None = None,
    refresh: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Catalog:
    """The catalog of root/class/**/image: opened if it was made before, else made and kept.

    A file once listed keeps its row, label and size, even if it has vanished since; where the class folders have
    changed, a StaleCatalogWarning says so. `refresh` lists anew: files still there keep their order and come first, new
    ones follow in ImageFolder's order, vanished ones leave, all headers are read again.

    `location` is the catalog's folder (`default_location` unless given), outside `root`; if the default one cannot be
    written, a warning is logged and the catalog lives in memory only. `workers` threads read headers; `progress` is
    called with the files done and the files there are.

    Raises CatalogError: no such folder, no class folders, folders that are splits (train, val), a class without usable
    image, a damaged catalog, or a given location that cannot be written. ConfigError: a location inside the root.
    """
    folder = _existing_root(root)
    where = default_location(folder) if location is None else Path(location)
    if where.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"location must lie outside the root, where it would pass for a class; found {str(where)!r} "
            f"inside {str(folder)!r}."
        )
    previous = None
    if _is_catalog(where):
        if not refresh:
            catalog = Catalog.open(where)
            _check_no_splits(folder, catalog.classes, catalog.paths)
            _warn_if_stale(catalog, folder)
            return catalog
        try:
            previous = Catalog.open(where)
        except CatalogError as error:
            _log.warning("The previous catalog is replaced, and its row order lost: %s", error)
    catalog = _read_folder(folder, previous, workers, progress)
    try:
        catalog.save(where)
    except CatalogError as error:
        if location is not None:
            raise
        _log.warning("The folder will be listed again next time: %s", error)
        return catalog
    return Catalog.open(where)


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The files below a root, before any of them is opened."""

    classes: tuple[str, ...]
    paths: list[str]  # relative to the root, POSIX
    labels: list[int]  # one for each path
    rejected: list[Rejected]  # what is neither a file in a class folder nor a folder
    folder_mtimes: dict[str, int]  # class folder to nanoseconds, taken before it was listed


def list_images(root: str | os.PathLike[str]) -> Listing:
    """The files below root/class, in ImageFolder's order, without opening them.

    Classes are the sorted sub-folders of the root; within one, folders are sorted by path and the files of each by
    name. Links are followed, but not in circles. Hidden files and folders (a leading dot) are passed over.

    Raises CatalogError if there is no such folder, or no folder in it, or its folders are splits with classes in them.
    """
    folder = _existing_root(root)
    rejected: list[Rejected] = []
    try:
        entries, identity = _scan(folder)
    except OSError as error:
        raise CatalogError(f"{str(folder)!r}: the folder cannot be listed ({error.strerror}).") from error
    classes = []
    for entry in entries:
        if _is(entry.is_dir):
            classes.append(entry.name)
        else:
            rejected.append(
                Rejected(entry.name, "It lies in no class folder; move it to root/class/ if it is to be used.")
            )
    if not classes:
        raise CatalogError(
            f"{str(folder)!r}: there are no class folders; expected root/class/image.jpg, "
            f"found {len(entries)} other files; move the images of each class to a folder of its own."
        )
    folder_mtimes = _folder_mtimes(folder, classes)
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = _list_class(folder, name, identity, rejected)
        paths += found
        labels += [label] * len(found)
    _check_no_splits(folder, classes, paths)
    return Listing(classes=tuple(classes), paths=paths, labels=labels, rejected=rejected, folder_mtimes=folder_mtimes)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; from 5 on the sides are swapped.

    Only EXIF in its own place counts (APP1, eXIf, the TIFF's tags): what DALI's decoders read. `exif_transpose` also
    looks into XMP and into a PNG's text, which they do not. EXIF that cannot be parsed counts as none: the pixels are
    as good as ever. Pillow applies a TIFF's when it loads the pixels, and finds a PNG's behind the pixels only then.
    """
    try:
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            exif = image.getexif()
        else:
            exif = Image.Exif()
            exif.load(image.info.get("exif", b""))
        value = exif.get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return int(value) if value in range(1, 9) else 1


# Values and checks ----------------------------------------------------------------------------------------------------

# An empty part (so also a leading or trailing slash, and the empty path), `.`, `..`, or a NUL.
_IRREGULAR = re.compile(rb"(?:\A|/)\.{0,2}(?:/|\Z)|\0")


class _Paths(Sequence[str]):
    """All paths of a catalog, each made when it is asked for."""

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
    """Paths end to end, (total,) uint8, and where each begins and ends, (N + 1,) int64."""
    offsets = np.zeros(len(paths) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, paths), np.int64, len(paths)), out=offsets[1:])
    return np.frombuffer(b"".join(paths), np.uint8), offsets


def _integers(name: str, values: npt.ArrayLike, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The values as contiguous integers of `dtype`, never rounded or wrapped; a copy unless they are that already."""
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
        raise ConfigError(f"labels must lie in 0..{classes - 1}, places in classes; found {labels.max()}.")


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
            f"{str(folder)!r}: the catalog was made anew while another process was using it; its rows may stand for "
            "other images now. Build the dataset again."
        )
    return catalog


# Listing --------------------------------------------------------------------------------------------------------------


def _existing_root(root: str | os.PathLike[str]) -> Path:
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


def _scan(folder: Path | str) -> tuple[list[os.DirEntry[str]], tuple[int, int]]:
    """The visible entries of a folder, by name, and which folder it is, by whatever path. Raises OSError."""
    with os.scandir(folder) as entries:
        visible = sorted(
            (entry for entry in entries if not entry.name.startswith(".")), key=operator.attrgetter("name")
        )
    status = Path(folder).stat()
    return visible, (status.st_dev, status.st_ino)


def _is(test: Callable[[], bool]) -> bool:
    """What `DirEntry.is_dir` or `is_file` says; False for a link to itself, or to where we may not look."""
    try:
        return test()
    except OSError:
        return False


def _list_class(root: Path, name: str, root_identity: tuple[int, int], rejected: list[Rejected]) -> list[str]:
    """The files of one class in the order of ImageFolder, which is that of `sorted(os.walk(...))`: folders by path."""
    found: list[tuple[str, list[str]]] = []
    pending = [(name, frozenset({root_identity}))]
    while pending:
        folder, above = pending.pop()
        try:
            entries, identity = _scan(f"{root}/{folder}")
        except OSError as error:
            rejected.append(Rejected(folder, f"The folder cannot be listed ({error.strerror}); permit reading it."))
            continue
        if identity in above:
            rejected.append(Rejected(folder, "The link leads back to a folder above it; remove it."))
            continue
        files = []
        for entry in entries:
            if _is(entry.is_dir):
                pending.append((f"{folder}/{entry.name}", above | {identity}))
            elif _is(entry.is_file):
                files.append(entry.name)
            else:
                reason = "It is no file: a link to nothing, a pipe, a socket or a device; remove it."
                rejected.append(Rejected(f"{folder}/{entry.name}", reason))
        found.append((folder, files))
    found.sort()
    return [f"{folder}/{file}" for folder, files in found for file in files]


_SPLIT = re.compile(
    r"(?P<train>train|training)|val|valid|validation|test|testing|dev|eval|evaluation|holdout|extra", re.IGNORECASE
)
_SPLIT_OF = re.compile(r"[-_ .]?(?:set|split|data|images|\d+)$", re.IGNORECASE)


def _check_no_splits(root: Path, classes: Sequence[str], paths: Sequence[str]) -> None:
    """Raise CatalogError where class folders are splits of a dataset, each with the class folders in it."""
    splits = {name: match for name in classes if (match := _SPLIT.fullmatch(_SPLIT_OF.sub("", name)))}
    if len(splits) < 2 or not any(match["train"] for match in splits.values()):
        return
    inside: dict[str, set[str]] = {name: set() for name in splits}
    for path in paths:
        name, _, rest = path.partition("/")
        if name in inside and "/" in rest:
            inside[name].add(rest.partition("/")[0])
    train = next(name for name, match in splits.items() if match["train"])
    shared = any(inside[train] & inside[name] for name in splits if name != train)
    if shared or (inside[train] and len(splits) == len(classes)):
        raise CatalogError(
            f"{str(root)!r}: its folders {_names(sorted(splits))} must be classes, but they look like splits of a "
            f"dataset: {train!r} holds folders of its own ({_names(sorted(inside[train]))}). Which is meant? Give one "
            f"of them, as {str(root / train)!r}. If they are classes, list them with Catalog.from_arrays."
        )


def _folder_mtimes(root: Path, classes: Iterable[str]) -> dict[str, int]:
    """When each class folder last changed, in nanoseconds; 0 where that cannot be told."""
    mtimes = {}
    for name in classes:
        try:
            mtimes[name] = (root / name).stat().st_mtime_ns
        except OSError:
            mtimes[name] = 0
    return mtimes


def _warn_if_stale(catalog: Catalog, root: Path) -> None:
    """One StaleCatalogWarning if class folders came, went or changed. A look at them alone, not at their files."""
    before = catalog.folder_mtimes
    if not before:
        return
    try:
        entries, _ = _scan(root)
    except OSError:
        return  # the images may still be read by name
    now = _folder_mtimes(root, (entry.name for entry in entries if _is(entry.is_dir)))
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed:
        warnings.warn(
            f"{str(root)!r} has changed since it was indexed ({len(changed)} class folders, {changed[0]!r} first); its "
            f"{len(catalog)} images are those of then. `dali-diffusemix index {shlex.quote(str(root))} --refresh` "
            "lists it anew.",
            StaleCatalogWarning,
            stacklevel=3,
        )


def warn_of_deleted(catalog: Catalog, root: Path) -> None:
    """One StaleCatalogWarning if originals of an edit store's catalog are gone from their folder.

    Looked into are the class folders that changed since they were listed; of a catalog that does not know, all folders.
    Where that is very much, as after a copy of a large dataset, nothing is.
    """
    before = catalog.folder_mtimes
    rows = np.arange(len(catalog))
    if before:
        now = _folder_mtimes(root, before)
        changed = [label for label, name in enumerate(catalog.classes) if now.get(name) != before.get(name)]
        rows = np.flatnonzero(np.isin(catalog.labels, changed))
    if len(rows) > _MOST_LOOKED_FOR:
        return
    there: dict[str, set[str]] = {}
    gone: list[str] = []
    for row in rows.tolist():
        path = catalog.path(row)
        folder, _, name = path.rpartition("/")
        if folder not in there:
            try:
                there[folder] = set(os.listdir(root / folder))  # noqa: PTH208 - names alone, at speed
            except FileNotFoundError:
                there[folder] = set()
            except OSError:
                return  # the images may still be read by name
        if name not in there[folder]:
            gone.append(path)
    if gone:
        where = shlex.quote(str(root))
        warnings.warn(
            f"{str(root)!r}: {len(gone)} of the {len(catalog)} originals that the edits are of are gone (for one "
            f"{gone[0]!r}); they stay samples, and others are shown in their place. To train without them, run "
            f"`dali-diffusemix index {where} --refresh` and give the dataset catalog=dali_diffusemix.catalog."
            "index(root).",
            StaleCatalogWarning,
            stacklevel=3,
        )


_MOST_LOOKED_FOR = 200_000  # originals


def _read_folder(
    root: Path, previous: Catalog | None, workers: int | None, progress: Callable[[int, int], None] | None
) -> Catalog:
    """List a folder and read its headers; files that `previous` has come first, in its order."""
    listing = list_images(root)
    if previous is not None:
        rows = {path: row for row, path in enumerate(previous.paths)}
        order = sorted(range(len(listing.paths)), key=lambda place: rows.get(listing.paths[place], len(rows)))
        paths, labels = listing.paths, listing.labels
        listing = replace(listing, paths=[paths[place] for place in order], labels=[labels[place] for place in order])
    catalog = _read_headers(root, listing, workers, progress)
    images = np.bincount(catalog.labels, minlength=len(catalog.classes))
    if not images.all():
        empty = [catalog.classes[label] for label in np.flatnonzero(images == 0)]
        raise CatalogError(
            f"{str(root)!r}: every class folder must hold at least one usable image, but {len(empty)} of "
            f"{len(images)} hold none: {_names(empty)}; remove them or add images. "
            + _first([one for one in catalog.rejected if one.path.split("/")[0] in set(empty)])
        )
    return catalog


def _read_headers(
    root: Path, listing: Listing, workers: int | None, progress: Callable[[int, int], None] | None
) -> Catalog:
    """The files of a listing that can be used; the others are logged and rejected. CatalogError if all are."""
    sizes, verdicts = _read_sizes(root, listing.paths, workers, progress)
    rejected = sorted(listing.rejected + verdicts, key=operator.attrgetter("path"))
    usable = sizes[:, 0] > 0
    if not usable.any():
        raise CatalogError(
            f"{str(root)!r}: there is no usable image of any class ({_names(listing.classes)}); "
            f"expected root/class/image.jpg. {_first(rejected)}"
        )
    if rejected:
        _log.warning("%r: %s", str(root), _first(rejected))
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


def _names(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _first(rejected: Sequence[Rejected]) -> str:
    if not rejected:
        return "No files were found."
    return f"{len(rejected)} left out, the first {rejected[0].path!r}: {rejected[0].reason}"


# Headers --------------------------------------------------------------------------------------------------------------


class _Unusable(Exception):
    """The reason why a file cannot be used, as a sentence."""


def _read_sizes(
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


def read_size(path: str) -> tuple[int, int] | str:
    """Height and width as seen after the EXIF orientation, from the header alone; else the reason why not."""
    try:
        with Path(path).open("rb", buffering=_HEADER_BYTES) as file:
            return _measure(file)
    except _Unusable as error:
        return str(error)
    except OSError as error:
        return f"It cannot be read ({error.strerror or error}); it must be a file that you may read."


def _measure(file: BinaryIO) -> tuple[int, int]:
    """As `read_size`, of an open file. Raises _Unusable, and OSError of the file itself."""
    start = file.read(_START_BYTES)
    if not start:
        raise _Unusable("It is empty (0 bytes); copy it again or remove it.")
    name = format_of(start)
    if name is None:
        raise _Unusable(_no_image(start))
    if name == "JPEG" and (why := _unsupported_frame(start, file)):
        raise _Unusable(why)
    try:
        with Image.open(file, formats=[name]) as image:
            if name != "WEBP" and not image.tile:
                raise _Unusable(f"Its {name} header ends before the pixels; the file is cut short.")
            width, height = image.size
            if isinstance(image, TiffImagePlugin.TiffImageFile):
                # Before the pixels are loaded, `size` has the orientation in some versions of Pillow and not in others.
                width, height = image.tag_v2[ExifTags.Base.ImageWidth], image.tag_v2[ExifTags.Base.ImageLength]
            if height * width > MAX_PIXELS:
                limit = f"more than the limit of {MAX_PIXELS}"
                raise _Unusable(f"It has {height} x {width} pixels, {limit}; make it smaller.")
            if name == "PNG" and "exif" not in image.info and _exif_follows(file, image.tile[0][2] - 8):
                image.load()
            return (width, height) if orientation(image) >= 5 else (height, width)
    except _Unusable:
        raise
    except Image.DecompressionBombError as error:
        raise _Unusable(f"It has more pixels than the limit of {MAX_PIXELS} ({error}); make it smaller.") from error
    except UnidentifiedImageError as error:
        raise _Unusable(f"Its {name} header cannot be read; the file is damaged or cut short.") from error
    except ValueError as error:
        # Pillow's protection against text that is a decompression bomb; the picture may be as good as any.
        if name == "PNG" and "MAX_TEXT" in str(error):
            raise _Unusable(
                "unsupported: the text stored in this PNG (a workflow or a prompt, for instance) is larger than "
                f"Pillow's limit of {PngImagePlugin.MAX_TEXT_CHUNK} bytes; save it without the text."
            ) from error
        raise _Unusable(_damaged_header(name, error)) from error
    except Exception as error:  # Pillow raises many kinds, and none may end the listing of a million files
        raise _Unusable(_damaged_header(name, error)) from error


def _damaged_header(name: str, error: Exception) -> str:
    return f"Its {name} header cannot be read ({type(error).__name__}: {error}); the file is damaged."


def format_of(start: bytes) -> str | None:
    """Pillow's name for the format of a file that begins so. The ending of its name plays no part."""
    if start.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if start.startswith(b"BM"):
        return "BMP"
    if start.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if start[:1] == b"P" and start[1:2] in b"123456" and start[2:3] in b" \t\n\v\f\r#":
        return "PPM"
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        return "WEBP"
    return None


# What is met in the place of images, by its beginning.
_OTHERS = (
    (rb"GIF8", "a GIF"),
    (rb"....ftyp(?:avif|avis)", "an AVIF image"),
    (rb"....ftyp(?:hei|hev|mif|msf)", "a HEIF image"),
    (rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ", "a video"),
    (rb"\0\0\0\x0cJXL |\xff\x0a", "a JPEG XL image"),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (rb"8BPS", "a Photoshop file"),
    (rb"\0\0\x01\0", "an icon"),
    (rb"%PDF", "a PDF"),
    (rb"PK\x03\x04|\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!", "an archive"),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*(?:<!DOCTYPE svg[^>]*>\s*)?<svg\b", "an SVG drawing"),
)
_KINDS = tuple((re.compile(pattern, re.DOTALL | re.IGNORECASE), what) for pattern, what in _OTHERS)
_PAGE = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body)\b", re.DOTALL | re.IGNORECASE
)
_ANSWER = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml|<Error\b|\{)", re.IGNORECASE)


def _no_image(start: bytes) -> str:
    """Why a file that begins so is none of the formats that are read."""
    if start.startswith(b"version https://git-lfs.github.com/"):
        return "It is a Git LFS pointer, not the image itself; run `git lfs pull` in its repository."
    if b"/annex/objects/" in start:
        return "It is a git-annex pointer, not the image itself; run `git annex get` in its repository."
    if _PAGE.match(start):
        return "It is an HTML page, as a failed download leaves one; download the image itself again."
    for pattern, what in _KINDS:
        if pattern.match(start):
            return f"unsupported: it is {what}; supported are {SUPPORTED}; convert it."
    if _ANSWER.match(start):
        return "It is text (XML or JSON), as a failed download leaves it; download the image itself again."
    return f"unsupported: it begins with {start[:12]!r}; supported are {SUPPORTED}; convert it."


# Frames of a JPEG that decoders do not read: lossless, differential, hierarchical.
_RARE_FRAMES = {
    0xC3: "lossless",
    0xC5: "hierarchical",
    0xC6: "hierarchical",
    0xC7: "lossless",
    0xCB: "lossless",
    0xCD: "hierarchical",
    0xCE: "hierarchical",
    0xCF: "lossless",
}


_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def _unsupported_frame(start: bytes, file: BinaryIO) -> str | None:
    """What no decoder here reads of a JPEG that begins so, as a sentence; None where that is not why."""
    frame = _frame(start, file)
    if frame is None:
        return None
    kind, bits = frame
    if kind in _RARE_FRAMES:
        return f"unsupported: it is a {_RARE_FRAMES[kind]} JPEG; save it as an ordinary one, or as PNG."
    if bits != 8:
        return f"unsupported: it is a JPEG of {bits} bits, 8 are supported; convert it."
    return None


def _frame(start: bytes, file: BinaryIO) -> tuple[int, int] | None:
    """A JPEG's frame marker, without its FF, and the bits of a value; None where there is none."""
    here, base, place = start, 0, 2  # a stretch of the file, where it begins, and where a marker is
    while True:
        at = place - base
        if at + 5 > len(here):
            file.seek(place)
            here, base, at = file.read(64), place, 0
            if len(here) < 5:
                return None
        if here[at] != 0xFF:
            return None
        kind = here[at + 1]
        if kind in _FRAMES:
            return kind, here[at + 4]
        if kind == 0xFF:  # a fill byte
            place += 1
        elif kind == 0x01 or 0xD0 <= kind <= 0xD7:  # without a segment
            place += 2
        else:
            size = here[at + 2] << 8 | here[at + 3]
            if kind == 0xDA or size < 2:
                return None
            place += 2 + size


def _exif_follows(file: BinaryIO, place: int) -> bool:
    """Whether a PNG has EXIF from `place`, its first pixels, on. exiftool puts it there; Pillow finds it on loading."""
    back = file.tell()
    file.seek(place)
    found = False
    while not found and len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        here = file.tell()
        found = kind == b"eXIf"
        file.seek(here + length + 4)  # 4: the checksum
    file.seek(back)
    return found


# On disk --------------------------------------------------------------------------------------------------------------


def _damaged(file: Path, what: str) -> CatalogError:
    return CatalogError(f"{str(file)!r}: {what}; list the folder anew with `dali-diffusemix index ROOT --refresh`.")


def why_damaged(error: Exception) -> str:
    """What is wrong with a JSON file that could not be understood."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return f"it is no JSON: {error}"
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return f"a value is of the wrong kind: {error}"


def _is_catalog(folder: Path) -> bool:
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
    """Map one array, read-only; its length is free where `shape` is None. Raises CatalogError."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a header is a Python literal, which fails in many ways
        # NumPy advises to unpickle what it does not know.
        why = "it is no array" if "allow_pickle" in str(error) else error
        raise _damaged(file, f"the array is missing or cut short ({why})") from error
    expected = (*array.shape[:1],) if shape is None else shape
    if array.dtype != dtype or array.shape != expected:
        raise _damaged(file, f"must be {dtype} of shape {expected}, found {array.dtype} of shape {array.shape}")
    return np.asarray(array)


def _files_named(folder: Path) -> set[str]:
    """The array files of the catalog that is there, if there is one that can be read."""
    try:
        return set(map(str, json.loads((folder / _JSON).read_bytes())["arrays"].values()))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return set()


def _write(file: Path, data: bytes | memoryview) -> None:
    """Write a file whole or not at all: beside its place, to the disk, and only then into its place."""
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened, and need not be
        descriptor = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_stale(folder: Path, before: set[str], keep: Iterable[str]) -> None:
    """Remove the arrays of the catalog that was there before, and what processes that were killed have left."""
    kept = set(keep)
    for file in folder.iterdir():
        if file.name in kept or not (_ARRAY_FILE.fullmatch(file.name) or _TEMPORARY.fullmatch(file.name)):
            continue
        try:
            if file.name in before or time.time() - file.stat().st_mtime > _ORPHAN_SECONDS:
                file.unlink()
        except OSError:
            _log.debug("Not removed: %s", file, exc_info=True)  # somebody else did, or has it mapped (Windows)
