"""Stores: images on disk, made once by processes that may be killed at any moment, read ever after by many.

An edit store holds edits:

    store.json                       what was asked for: settings, prompts, and the work ordered so far ("segments")
    catalog/                         the originals; a row never shifts
    shards/edits-000000.tar          edits as WebDataset has them, one group for each original
                       .idx          DALI's index of the tar (`wds2idx`, v1.2)
                       .npy          one row for each edit, rejected ones too: `SHARD_ROW`
                       .json         settings, sizes, hashes, verdicts; written last: a shard without it is not there
    index.npy, starts.npy            derived from the shards: the accepted edits, sorted by original, prompt, variant
    index.json                       of which shards they are derived

A segment is a box of work, originals x prompts x variants, cut into shards along the originals. Shards are numbered by
the segments alone, never by when or where they were made, so that a later run knows which are missing.

A packed store holds originals, in shards of the same four files:

    store.json                       settings, and how many originals make a shard
    listed/                          the catalog of the folder that is packed, whose rows the shards name
    shards/originals-000000.tar      one member for each original (.idx, .npy: `ORIGINAL_SHARD_ROW`, .json)
    catalog/                         derived: the originals that were packed, with the sizes that they have here
    index.npy                        derived: where they lie, a row for each row of catalog/
    index.json                       of which shards these are derived; written last: without it a store is unfinished

A store may be read where it lies behind a URL; `remote` then makes a copy of it in a local folder.
"""

import hashlib
import io
import itertools
import json
import logging
import math
import mmap
import os
import re
import tarfile
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO, Self, TypeAlias
from urllib.parse import quote_from_bytes

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix import __version__
from dali_diffusemix.catalog import Catalog, Rejected
from dali_diffusemix.errors import CatalogError, DecodeError, StoreError
from dali_diffusemix.reading import Extent, OpenFile
from dali_diffusemix.remote import Mirror, MirrorError, is_url

__all__ = [
    "INDEX_ROW",
    "ORIGINAL_INDEX_ROW",
    "ORIGINAL_SHARD_ROW",
    "SHARD_ROW",
    "VERDICTS",
    "EditStore",
    "OriginalShardWriter",
    "OriginalStore",
    "OriginalStoreWriter",
    "Shard",
    "ShardWriter",
    "StoreWriter",
    "UnfinishedStoreWarning",
]

_log = logging.getLogger(__name__)

Settings: TypeAlias = Mapping[str, str | int | float | bool | None]
"""What decides a store's images besides the original, prompt and variant of each."""

VERDICTS = ("accepted", "unreadable original")
"""What a verdict's number means. Only what was accepted is trained on."""

SHARD_ROW = np.dtype(
    [
        ("original", "<i8"),  # row of the store's catalog
        ("prompt", "<i2"),  # place in the store's prompts
        ("variant", "<i2"),
        ("seed", "<u8"),
        ("offset", "<i8"),  # of the JPEG in the tar
        ("length", "<i4"),  # of the JPEG in bytes; 0: there is none
        ("height", "<i4"),
        ("width", "<i4"),
        ("verdict", "u1"),  # place in VERDICTS
        ("score", "<f4"),  # of the verdict; NaN: none
    ]
)
"""An edit in its shard, accepted or not."""

INDEX_ROW = np.dtype(
    [
        ("original", "<i8"),
        ("prompt", "<i2"),
        ("variant", "<i2"),
        ("shard", "<i4"),
        ("offset", "<i8"),
        ("length", "<i4"),
        ("height", "<i4"),
        ("width", "<i4"),
        ("score", "<f4"),
    ]
)
"""An accepted edit in the index of the whole store."""

ORIGINAL_SHARD_ROW = np.dtype(
    [
        ("original", "<i8"),  # row of the catalog of what was listed
        ("offset", "<i8"),  # of the file in the tar
        ("length", "<i4"),  # of the file in bytes; 0: there is none
        ("height", "<i4"),  # upright
        ("width", "<i4"),
        ("verdict", "u1"),  # place in VERDICTS
    ]
)
"""An original in its shard, packed or not."""

ORIGINAL_INDEX_ROW = np.dtype(
    [("original", "<i8"), ("shard", "<i4"), ("offset", "<i8"), ("length", "<i4"), ("height", "<i4"), ("width", "<i4")]
)
"""A packed original in the index of the whole store."""

_VERSION = 1
_SHARD, _INDEX = (f"dali_diffusemix.{kind}" for kind in ("shard", "index"))
_FILES = ("tar", "idx", "npy")
# Each open or mapped shard holds a file descriptor, of which a process has 1024 as a rule; ImageNet has 2,500 shards.
_OPEN_SHARDS = 200
# Shard to the bytes of each of _FILES.
_Sizes: TypeAlias = dict[int, tuple[int, ...]]
# prompt and variant are int16.
_MOST = 32768


class UnfinishedStoreWarning(UserWarning):
    """A store is read of which shards are missing, or whose index is not up to date."""


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What a store is of; all else of a store is alike."""

    images: str  # what it holds, and how its shards' names begin
    name: str
    magic: str  # of store.json
    command: str  # what makes it
    use: str  # what such a store is good for: the remedy where it is found in the other's place
    listing: str  # the folder of the catalog whose rows its shards name
    shard_row: np.dtype[Any]
    index_row: np.dtype[Any]
    tables: tuple[str, ...]  # that index.json vouches for

    def shard(self, number: int) -> str:
        """A shard's name."""
        return f"{self.images}-{number:06d}"

    def file(self, number: int, ending: str) -> str:
        """A shard's file."""
        return f"{self.shard(number)}.{ending}"

    def damaged(self, file: Path, what: str) -> StoreError:
        return StoreError(f"{str(file)!r}: {what}; run `{self.command}` again, which makes it anew.")


_EDITS = _Kind(
    images="edits",
    name="edit store",
    magic="dali_diffusemix.store",
    command="dali-diffusemix generate",
    use="is given as edits",
    listing="catalog",
    shard_row=SHARD_ROW,
    index_row=INDEX_ROW,
    tables=("index.npy", "starts.npy"),
)
_ORIGINALS = _Kind(
    images="originals",
    name="packed store",
    magic="dali_diffusemix.originals",
    command="dali-diffusemix pack",
    use="is given in place of the folder of originals",
    listing="listed",
    shard_row=ORIGINAL_SHARD_ROW,
    index_row=ORIGINAL_INDEX_ROW,
    tables=("index.npy",),
)


# What was asked for --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A unit of work, of retry and of storage: some originals, each under every one of some prompts."""

    number: int
    rows: range  # of the catalog
    prompts: tuple[int, ...]  # places in the store's prompts
    variants: range

    def __len__(self) -> int:
        """How many edits it has."""
        return len(self.rows) * len(self.prompts) * len(self.variants)


@dataclass(frozen=True, kw_only=True)
class _Segment:
    """Work that was ordered at once."""

    rows: range
    prompts: tuple[int, ...]
    variants: range
    originals_per_shard: int
    first_shard: int

    @property
    def shard_count(self) -> int:
        return math.ceil(len(self.rows) / self.originals_per_shard)

    def shards(self) -> Iterator[Shard]:
        for place in range(self.shard_count):
            rows = self.rows[place * self.originals_per_shard : (place + 1) * self.originals_per_shard]
            yield Shard(number=self.first_shard + place, rows=rows, prompts=self.prompts, variants=self.variants)

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": [self.rows.start, self.rows.stop],
            "prompts": list(self.prompts),
            "variants": [self.variants.start, self.variants.stop],
            "originals_per_shard": self.originals_per_shard,
            "first_shard": self.first_shard,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "_Segment":
        return cls(
            rows=range(*map(int, stored["rows"])),
            prompts=tuple(map(int, stored["prompts"])),
            variants=range(*map(int, stored["variants"])),
            originals_per_shard=int(stored["originals_per_shard"]),
            first_shard=int(stored["first_shard"]),
        )


@dataclass(frozen=True, kw_only=True)
class _Header:
    """The content of store.json."""

    settings: Settings
    prompts: tuple[str, ...]
    segments: tuple[_Segment, ...]
    fingerprint: str  # of the catalog

    @property
    def shard_count(self) -> int:
        return sum(segment.shard_count for segment in self.segments)

    def shards(self) -> Iterator[Shard]:
        """All shards, by number."""
        return itertools.chain.from_iterable(segment.shards() for segment in self.segments)

    @cached_property
    def slugs(self) -> tuple[str, ...]:
        """The prompts as parts of file names: all different, and the same ever after, whatever prompts follow."""
        slugs: list[str] = []
        for place, prompt in enumerate(self.prompts):
            slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:64]
            slugs.append(slug if slug and slug not in slugs else f"{slug or 'prompt'}--{place}")
        return tuple(slugs)

    def extended(self, prompts: Sequence[str], variants: int, rows: int, originals_per_shard: int) -> "_Header":
        """With the work that is still to be ordered until all rows have these variants of these prompts."""
        known = (*self.prompts, *(prompt for prompt in prompts if prompt not in self.prompts))
        places = sorted(known.index(prompt) for prompt in prompts)
        segments = list(self.segments)
        bounds = {0, rows} | {bound for segment in segments for bound in (segment.rows.start, segment.rows.stop)}
        for start, stop in itertools.pairwise(sorted(bounds)):
            # Between two bounds every row has the same variants of a prompt, counted from 0.
            ordered = dict.fromkeys(places, 0)
            for segment in self.segments:
                if start in segment.rows:
                    for place in ordered.keys() & set(segment.prompts):
                        ordered[place] = max(ordered[place], segment.variants.stop)
            for first in sorted(set(ordered.values())):
                if first < variants:
                    segments.append(
                        _Segment(
                            rows=range(start, stop),
                            prompts=tuple(place for place in places if ordered[place] == first),
                            variants=range(first, variants),
                            originals_per_shard=originals_per_shard,
                            first_shard=sum(segment.shard_count for segment in segments),
                        )
                    )
        return replace(self, prompts=known, segments=tuple(segments))

    def write(self, store: Path) -> None:
        content = {
            "settings": dict(self.settings),
            "prompts": self.prompts,
            "segments": [segment.to_json() for segment in self.segments],
            "fingerprint": self.fingerprint,
            "written_by": f"dali_diffusemix {__version__}",
        }
        _write_json(store / "store.json", _EDITS.magic, content)

    @classmethod
    def read(cls, store: Path) -> "_Header":
        with _stored_header(_EDITS, store) as stored:
            header = cls(
                settings=MappingProxyType(dict(stored["settings"])),
                prompts=tuple(map(str, stored["prompts"])),
                segments=tuple(map(_Segment.from_json, stored["segments"])),
                fingerprint=str(stored["fingerprint"]),
            )
            for segment in header.segments:
                if segment.originals_per_shard < 1 or not set(segment.prompts) <= set(range(len(header.prompts))):
                    raise ValueError(f"segment {segment}")
        return header


@dataclass(frozen=True, kw_only=True)
class _OriginalHeader:
    """The content of a packed store's store.json."""

    settings: Settings
    originals: int  # that are listed
    originals_per_shard: int

    @property
    def shard_count(self) -> int:
        return math.ceil(self.originals / self.originals_per_shard)

    def rows(self, shard: int) -> range:
        return range(self.originals)[shard * self.originals_per_shard : (shard + 1) * self.originals_per_shard]

    def write(self, store: Path) -> None:
        content = {
            "settings": dict(self.settings),
            "originals": self.originals,
            "originals_per_shard": self.originals_per_shard,
            "written_by": f"dali_diffusemix {__version__}",
        }
        _write_json(store / "store.json", _ORIGINALS.magic, content)

    @classmethod
    def read(cls, store: Path) -> "_OriginalHeader":
        with _stored_header(_ORIGINALS, store) as stored:
            header = cls(
                settings=MappingProxyType(dict(stored["settings"])),
                originals=int(stored["originals"]),
                originals_per_shard=int(stored["originals_per_shard"]),
            )
            if header.originals_per_shard < 1:
                raise ValueError(f"originals_per_shard {header.originals_per_shard}")
        return header


@contextmanager
def _stored_header(kind: _Kind, store: Path) -> Iterator[dict[str, Any]]:
    """The content of store.json; whatever is found wrong with it becomes a StoreError."""
    file = store / "store.json"
    other = _ORIGINALS if kind is _EDITS else _EDITS
    remedy = f"use another folder (what has {other.magic!r}, the {other.name}, {other.use})"
    try:
        stored = _read_json(file, kind.magic, remedy)
    except FileNotFoundError as error:
        raise StoreError(
            f"{str(store)!r}: there is no {kind.name} (store.json); make one with `{kind.command} ROOT STORE`."
        ) from error
    with _understood(file, "bring back a copy of it, or make a new store"):
        yield stored


# Reading --------------------------------------------------------------------------------------------------------------


class EditStore:
    """The accepted edits of a store, as a table and as JPEG files.

    Edits are numbered 0 to len - 1, sorted by original, then prompt, then variant: an `EditTable` of the plan. The
    table is memory-mapped, shards are mapped when they are first touched. A store is pickled as its path and the shards
    that it saw, so that another process sees the same edits even while more are being made.
    """

    path: Path  # a mirror's folder, where there is one
    mirror: Mirror | None  # where the files come from, if the store lies behind a URL
    settings: Settings  # what decides an edit besides its original, prompt and variant
    prompts: tuple[str, ...]
    catalog: Catalog
    index: NDArray[np.void]  # (edits,) INDEX_ROW
    starts: NDArray[np.int64]  # (originals + 1,) the edits of original i are starts[i] to starts[i + 1]

    def __init__(self, path: Path, header: _Header, catalog: Catalog, tables: "_Tables", mirror: Mirror | None) -> None:
        """Use `EditStore.open`."""
        self.path = path
        self.mirror = mirror
        self.settings = header.settings
        self.prompts = header.prompts
        self.catalog = catalog
        self.index = tables.index
        self.starts = tables.starts
        self._shards = tables.shards
        self._tars = _Tars(_EDITS, path, tables.sizes, mirror)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "EditStore":
        """Open a store; one that is unfinished with the shards that it has, and an `UnfinishedStoreWarning`.

        Args:
            path: Its folder, or a URL as `str`.

        Raises:
            StoreError: There is no store, no shard yet, a file is missing, cut short, or of a newer version.
            MirrorError: Its URL does not answer or refuses, or the disk is full (a StoreError).
            MissingDependencyError: What the URL needs is not installed.
        """
        with _reached(_EDITS, path) as (folder, mirror):
            return cls._open(folder, mirror)

    @classmethod
    def _open(cls, path: Path, mirror: Mirror | None) -> "EditStore":
        header = _Header.read(path)
        catalog = _open_catalog(path)
        if catalog.fingerprint != header.fingerprint:
            raise StoreError(
                f"{str(path)!r}: store.json is of originals with fingerprint {header.fingerprint[:16]}, but its "
                f"catalog has {catalog.fingerprint[:16]}; bring back the catalog that the store was made with."
            )
        listing = _list_shards(path) if mirror is None else _list_mirrored(_EDITS, mirror)
        done = [number for number in range(header.shard_count) if _EDITS.file(number, "json") in listing]
        if not done:
            raise StoreError(
                f"{str(path)!r}: none of its {header.shard_count} shards is finished; "
                "run `dali-diffusemix generate` until it is."
            )
        tables, derived = _open_tables(path, header, len(catalog), done, mirror)
        _check_sizes(_EDITS, path, tables.sizes, listing)
        missing = header.shard_count - len(done)
        if missing or not derived:
            what = (
                f"{missing} of its {header.shard_count} shards are missing" if missing else "its index is not finished"
            )
            warnings.warn(
                f"{str(path)!r}: {what}; the {len(tables.index)} edits that are there are used. Run the "
                "`dali-diffusemix generate` that makes it again to finish it.",
                UnfinishedStoreWarning,
                stacklevel=3,
            )
        return cls(path, header, catalog, tables, mirror)

    def __reduce__(self) -> tuple[Callable[..., "EditStore"], tuple[Any, ...]]:
        if self.mirror is not None:
            return _reopen_mirrored, (self.mirror.url, self.catalog.fingerprint, self._shards)
        return _reopen, (self.path, self.catalog, self._shards)

    def __len__(self) -> int:
        """How many edits were accepted."""
        return len(self.index)

    def __repr__(self) -> str:
        return f"<EditStore {self._tars.where!r}: {len(self)} edits of {len(self.catalog)} originals>"

    def originals_of(self, edits: NDArray[np.int64]) -> NDArray[np.int64]:
        """The originals, (n,) rows of the catalog, that these edits, (n,), belong to."""
        return np.asarray(self.index["original"][edits], dtype=np.int64)

    def sizes(self, edits: NDArray[np.int64]) -> NDArray[np.int32]:
        """(n, 2) height and width in pixels of these edits, (n,)."""
        rows = self.index[edits]
        return np.stack([rows["height"], rows["width"]], axis=-1)

    def prompt_of(self, edit: int) -> str:
        """The prompt that an edit was made under, without the template."""
        return self.prompts[int(self.index["prompt"][edit])]

    def extents(self, edits: NDArray[np.int64]) -> list[Extent | DecodeError]:
        """Where the JPEG files of these edits, (n,), are; of a shard that has gone or was changed the error.

        Of a store at a URL it waits for their shards, and has the rest fetched in the background.

        Raises:
            MirrorError: The URL does not answer or refuses, or the disk is full.
        """
        return self._tars.extents(self.index[edits])

    def encoded(self, edit: int) -> NDArray[np.uint8]:
        """An edit's JPEG file, (bytes,) uint8: a read-only view into its shard, which is mapped.

        Raises:
            StoreError: The shard has gone or was changed since the store was opened.
        """
        return self._tars.encoded(self.index[edit])

    def check_originals(self, catalog: Catalog) -> None:
        """Raise StoreError, with what differs, unless the store was built from the originals of `catalog`."""
        _check_originals(self.path, self.catalog, catalog)


class OriginalStore:
    """Packed originals: row r of the catalog is image r. Finished, it never changes; it is pickled as its path.

    Shards are mapped when they are first touched.
    """

    path: Path  # a mirror's folder, where there is one
    mirror: Mirror | None  # where the files come from, if the store lies behind a URL
    settings: Settings  # how the originals were packed
    catalog: Catalog  # the originals in here, with the sizes that they have in here
    index: NDArray[np.void]  # (originals,) ORIGINAL_INDEX_ROW

    def __init__(
        self, path: Path, settings: Settings, catalog: Catalog, index: NDArray[np.void], tars: "_Tars"
    ) -> None:
        """Use `OriginalStore.open`."""
        self.path = path
        self.mirror = tars.mirror
        self.settings = settings
        self.catalog = catalog
        self.index = index
        self._tars = tars
        self._order: Catalog | None = None  # whose rows these are, if not the store's own

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "OriginalStore":
        """Open a packed store.

        Args:
            path: Its folder, or a URL as `str`.

        Raises:
            StoreError: There is no packed store, it is unfinished, a file is missing, cut short, or of a newer version.
            MirrorError: Its URL does not answer or refuses, or the disk is full (a StoreError).
            MissingDependencyError: What the URL needs is not installed.
        """
        with _reached(_ORIGINALS, path) as (folder, mirror):
            return cls._open(folder, mirror)

    @classmethod
    def _open(cls, path: Path, mirror: Mirror | None) -> "OriginalStore":
        header = _OriginalHeader.read(path)
        file = path / "index.json"
        remedy = f"remove it and run `{_ORIGINALS.command}` again"
        try:
            stored = _read_json(file, _INDEX, remedy)
        except FileNotFoundError as error:
            raise StoreError(
                f"{str(path)!r}: the packed store is not finished (it has no index.json); run the "
                f"`{_ORIGINALS.command}` that makes it again: it does the rest."
            ) from error
        with _understood(file, remedy):
            fingerprint = str(stored["fingerprint"])
            sizes = {int(number): tuple(map(int, sizes)) for number, *sizes in stored["shards"]}
        catalog = _open_catalog(path)
        if catalog.fingerprint != fingerprint:
            raise StoreError(
                f"{str(path)!r}: index.json is of originals with fingerprint {fingerprint[:16]}, but the store's "
                f"catalog has {catalog.fingerprint[:16]}; {remedy}."
            )
        listing = _list_shards(path) if mirror is None else _list_mirrored(_ORIGINALS, mirror)
        _check_sizes(_ORIGINALS, path, sizes, listing)
        index = _load(_ORIGINALS, path / "index.npy", ORIGINAL_INDEX_ROW, len(catalog), mapped=True)
        return cls(path, header.settings, catalog, index, _Tars(_ORIGINALS, path, sizes, mirror))

    @classmethod
    def find(cls, path: str | os.PathLike[str]) -> "OriginalStore | None":
        """The packed store that `path` is, or None where it is a folder of images, which no URL can be.

        Raises:
            StoreError: It is an edit store, or a packed one that cannot be opened.
            MirrorError: See `open`.
        """
        if is_url(path):
            return cls.open(path)
        try:
            with (Path(path) / "store.json").open("rb") as file:
                ours = b'"magic": "dali_diffusemix.' in file.read(256)
        except OSError:
            return None
        return cls.open(path) if ours else None

    def in_order_of(self, catalog: Catalog) -> "OriginalStore":
        """These originals with the rows and labels of another catalog, which pairs by path.

        Raises:
            StoreError: The catalog lists an original that is not in here.
        """
        ours = self.catalog
        arrays = ("path_offsets", "path_bytes", "labels")
        if ours.classes == catalog.classes and all(
            np.array_equal(getattr(ours, name), getattr(catalog, name)) for name in arrays
        ):
            return self
        row_of = {path: row for row, path in enumerate(ours.paths)}
        rows = np.fromiter((row_of.get(path, -1) for path in catalog.paths), np.int64, len(catalog))
        if missing := np.flatnonzero(rows < 0).tolist():
            raise StoreError(
                f"{str(self.path)!r}: the packed store lacks {len(missing)} of the {len(catalog)} originals asked for "
                f"(for one {catalog.path(missing[0])!r}); give the store that was packed from the same folder, or "
                "make the edits from this one. What could not be decoded was not packed: its catalog's `rejected`."
            )
        own_order = replace(catalog, sizes=ours.sizes[rows], _origin=None)
        ordered = OriginalStore(self.path, self.settings, own_order, self.index[rows], self._tars)
        ordered._order = catalog
        return ordered

    def __reduce__(self) -> tuple[Callable[..., "OriginalStore"], tuple[Any, ...]]:
        return _reopen_originals, (self.path if self.mirror is None else self.mirror.url, self._order)

    def __len__(self) -> int:
        """How many originals there are."""
        return len(self.index)

    def __repr__(self) -> str:
        return f"<OriginalStore {self._tars.where!r}: {len(self)} originals>"

    def extents(self, originals: NDArray[np.int64]) -> list[Extent | DecodeError]:
        """Where the files of these originals, (n,), are; of a shard that has gone or was changed the error.

        Of a store at a URL it waits for their shards, and has the rest fetched in the background.

        Raises:
            MirrorError: The URL does not answer or refuses, or the disk is full.
        """
        return self._tars.extents(self.index[originals])

    def encoded(self, original: int) -> NDArray[np.uint8]:
        """An original's file, (bytes,) uint8: a read-only view into its shard, which is mapped.

        Raises:
            StoreError: The shard has gone or was changed since the store was opened.
        """
        return self._tars.encoded(self.index[original])


def _reopen_originals(path: str | Path, order: Catalog | None) -> OriginalStore:
    store = OriginalStore.open(path)
    return store if order is None else store.in_order_of(order)


@dataclass(frozen=True, kw_only=True)
class _Tables:
    """The index of some shards."""

    index: NDArray[np.void]  # (edits,) INDEX_ROW
    starts: NDArray[np.int64]  # (originals + 1,)
    sizes: _Sizes

    @property
    def shards(self) -> tuple[int, ...]:
        return tuple(self.sizes)


def _reopen(path: Path, catalog: Catalog, shards: tuple[int, ...]) -> EditStore:
    """What `EditStore.open` gave elsewhere, whatever was added since."""
    header = _Header.read(path)
    tables, _ = _open_tables(path, header, len(catalog), shards, None)
    return EditStore(path, header, catalog, tables, None)


def _reopen_mirrored(url: str, fingerprint: str, shards: tuple[int, ...]) -> EditStore:
    """The same of a store at a URL, perhaps on another machine."""
    with _reached(_EDITS, url) as (path, mirror):
        header, catalog = _Header.read(path), _open_catalog(path)
        if catalog.fingerprint != fingerprint:
            raise StoreError(
                f"{url}: the store was replaced by one of other originals while another process was using it; build "
                "the dataset again."
            )
        tables, _ = _open_tables(path, header, len(catalog), shards, mirror)
        return EditStore(path, header, catalog, tables, mirror)


def _open_tables(
    path: Path, header: _Header, originals: int, shards: Sequence[int], mirror: Mirror | None
) -> tuple[_Tables, bool]:
    """The index of these shards, and whether the store's own serves; if not, it is derived here, in memory."""
    try:
        record = _Record.read(path)
    except FileNotFoundError:
        record = None
    if record is not None and list(record.sizes) == list(shards) and record.originals == originals:
        index = _load(_EDITS, path / "index.npy", INDEX_ROW, record.edits, mapped=True)
        starts = _load(_EDITS, path / "starts.npy", np.dtype("<i8"), originals + 1, mapped=True)
        if starts[0] != 0 or starts[-1] != record.edits:
            found = f"{starts[0]} to {starts[-1]}"
            raise _EDITS.damaged(path / "starts.npy", f"must run from 0 to {record.edits}, found {found}")
        return _Tables(index=index, starts=starts, sizes=record.sizes), True
    if mirror is not None:
        mirror.copy_tables([_EDITS.shard(number) for number in shards])
    records = {number: _ShardRecord.read(_EDITS, path, number) for number in shards}
    return _derive(path, records, originals), False


def _derive(path: Path, records: Mapping[int, "_ShardRecord"], originals: int) -> _Tables:
    """Gather the accepted edits of these shards, sorted."""
    index = _gather(_EDITS, path, records, originals)
    key = (index["original"] << 32) | (index["prompt"].astype(np.int64) << 16) | index["variant"]
    if (key[1:] < key[:-1]).any():  # shards of one segment come sorted already
        index = index[np.argsort(key, kind="stable")]
    starts = np.searchsorted(index["original"], np.arange(originals + 1)).astype(np.int64)
    for table in (index, starts):
        table.flags.writeable = False
    return _Tables(index=index, starts=starts, sizes={number: record.sizes for number, record in records.items()})


def _gather(kind: _Kind, path: Path, records: Mapping[int, "_ShardRecord"], originals: int) -> NDArray[np.void]:
    """(accepted,) rows of the index, shard after shard; `originals` are listed."""
    index = np.empty(sum(record.verdicts[VERDICTS[0]] for record in records.values()), kind.index_row)
    filled = 0
    for number, record in records.items():
        file = path / "shards" / kind.file(number, "npy")
        rows = _load(kind, file, kind.shard_row, sum(record.verdicts.values()))
        rows = rows[rows["verdict"] == 0]
        part = index[filled : filled + len(rows)]
        if len(part) != len(rows) or (
            len(rows) and not 0 <= rows["original"].min() <= rows["original"].max() < originals
        ):
            raise kind.damaged(file, "does not agree with its .json and the store's catalog")
        for name in kind.index_row.names or ():
            part[name] = number if name == "shard" else rows[name]
        filled += len(rows)
    return index


@dataclass(frozen=True, kw_only=True)
class _Record:
    """The content of index.json: of what index.npy and starts.npy were derived."""

    edits: int
    originals: int
    sizes: _Sizes

    @classmethod
    def read(cls, store: Path) -> "_Record":
        file = store / "index.json"
        stored = _read_json(file, _INDEX, "remove it and run `dali-diffusemix generate` again")
        with _understood(file, "remove it and run `dali-diffusemix generate` again"):
            sizes = {int(number): tuple(map(int, sizes)) for number, *sizes in stored["shards"]}
            return cls(edits=int(stored["edits"]), originals=int(stored["originals"]), sizes=sizes)

    def write(self, store: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
        shards = [[number, *sizes] for number, sizes in self.sizes.items()]
        content = {"edits": self.edits, "originals": self.originals, "files": files, "shards": shards}
        _write_json(store / "index.json", _INDEX, content)


@dataclass(frozen=True, kw_only=True)
class _ShardRecord:
    """What a shard's .json says that others need."""

    sizes: tuple[int, ...]  # bytes of each of _FILES
    verdicts: Counter[str]

    @classmethod
    def read(cls, kind: _Kind, store: Path, number: int) -> "_ShardRecord":
        file = store / "shards" / kind.file(number, "json")
        remedy = f"remove it and run `{kind.command}` again"
        try:
            stored = _read_json(file, _SHARD, remedy)
        except FileNotFoundError as error:
            raise StoreError(f"{str(file)!r}: has gone; run `{kind.command}` again.") from error
        with _understood(file, remedy):
            return cls(
                sizes=tuple(int(stored["files"][ending]["bytes"]) for ending in _FILES),
                verdicts=Counter({str(name): int(count) for name, count in stored["verdicts"].items()}),
            )


def _open_tar(kind: _Kind, shards: Path, sizes: _Sizes, number: int) -> OpenFile:
    """A whole tar, its size checked: touching what is mapped beyond a file's end kills a process."""
    file = shards / kind.file(number, "tar")
    try:
        tar = OpenFile(file)
    except OSError as error:
        raise StoreError(f"{str(file)!r}: cannot be read ({error.strerror}).") from error
    _check_size(kind, file, sizes[number][0], os.fstat(tar.descriptor).st_size)
    return tar


def _map_tar(kind: _Kind, shards: Path, sizes: _Sizes, number: int) -> NDArray[np.uint8]:
    """A whole tar, (bytes,) uint8."""
    tar = _open_tar(kind, shards, sizes, number)
    return np.frombuffer(mmap.mmap(tar.descriptor, 0, access=mmap.ACCESS_READ), np.uint8)


class _Tars:
    """The tars of a store's shards, opened when they are first touched; those of a mirror fetched."""

    def __init__(self, kind: _Kind, store: Path, sizes: _Sizes, mirror: Mirror | None) -> None:
        self.where = str(store) if mirror is None else mirror.url
        self.mirror = mirror
        self._kind = kind
        self._open = lru_cache(_OPEN_SHARDS)(partial(_open_tar, kind, store / "shards", sizes))
        self._map = lru_cache(_OPEN_SHARDS)(partial(_map_tar, kind, store / "shards", sizes))
        if mirror is not None:
            mirror.expect({kind.shard(number): of_shard[0] for number, of_shard in sizes.items()})

    def extents(self, rows: NDArray[np.void]) -> list[Extent | DecodeError]:
        """Where the files of these rows, (n,) of the index, are, or what is wrong with their shard."""
        tar: Callable[[int], OpenFile] = self._open
        if self.mirror is not None:
            tar = self._fetched
            self.mirror.prefetch([self._kind.shard(number) for number in np.unique(rows["shard"]).tolist()])
        extents: list[Extent | DecodeError] = []
        for number, offset, length in zip(
            rows["shard"].tolist(), rows["offset"].tolist(), rows["length"].tolist(), strict=True
        ):
            try:
                extents.append(Extent(tar(number), offset, length))
            except MirrorError:
                raise  # no fault of the shard's: there is nothing to put in its place
            except StoreError as error:
                extents.append(DecodeError(str(error)))
        return extents

    def encoded(self, row: np.void) -> NDArray[np.uint8]:
        """The file of a row of the index, (bytes,) uint8, read-only."""
        number, offset, length = int(row["shard"]), int(row["offset"]), int(row["length"])
        if self.mirror is None:
            return self._map(number)[offset : offset + length]
        # Not mapped, so that the mirror can let go of the tar.
        return np.frombuffer(os.pread(self._fetched(number).descriptor, length, offset), np.uint8)

    def _fetched(self, number: int) -> OpenFile:
        assert self.mirror is not None
        return self.mirror.open(self._kind.shard(number))


def _check_sizes(kind: _Kind, store: Path, sizes: _Sizes, listing: Mapping[str, int]) -> None:
    for number, of_shard in sizes.items():
        for ending, size in zip(_FILES, of_shard, strict=True):
            name = kind.file(number, ending)
            _check_size(kind, store / "shards" / name, size, listing.get(name))


def _check_size(kind: _Kind, file: Path, expected: int, found: int | None) -> None:
    if found != expected:
        what = "is missing" if found is None else f"must have {expected} bytes, found {found}"
        raise StoreError(
            f"{str(file)!r}: {what}; run `{kind.command}` again, which makes this shard anew "
            "(`dali-diffusemix verify` checks them all)."
        )


def _list_shards(store: Path) -> dict[str, int]:
    """Name to size in bytes of all that lies in the shards' folder."""
    try:
        with os.scandir(store / "shards") as entries:
            return {entry.name: entry.stat().st_size for entry in entries}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StoreError(f"{str(store / 'shards')!r}: cannot be listed ({error.strerror}).") from error


@contextmanager
def _reached(kind: _Kind, path: str | os.PathLike[str]) -> Iterator[tuple[Path, Mirror | None]]:
    """A store's folder; of one at a URL its mirror too, in whose folder the small files then are."""
    if not is_url(path):
        yield Path(path).absolute(), None
        return
    mirror = Mirror(str(path))
    try:
        with mirror.opening():
            try:
                mirror.refresh("store.json")
            except FileNotFoundError as error:
                raise StoreError(
                    f"{mirror.url}: there is no {kind.name} (store.json: {error}); correct the URL, or upload a store "
                    f"that `{kind.command}` made, all of it."
                ) from error
            with _stored_header(kind, mirror.folder):
                pass
            _mirror_index(kind, mirror)
            _mirror_catalog(mirror)
            yield mirror.folder, mirror
    except StoreError as error:
        error.add_note(f"{str(mirror.folder)!r} is the mirror of {mirror.url!r}.")
        raise


def _mirror_index(kind: _Kind, mirror: Mirror) -> None:
    try:
        data = mirror.refresh("index.json", vouches_for=kind.tables)
    except FileNotFoundError:
        return
    with _understood(mirror.folder / "index.json", "upload the store again"):
        files = dict(json.loads(data).get("files", {}))  # older stores have none
        hashes = {name: str(files[name]["sha256"]) if files else "" for name in kind.tables}
    for name, sha256 in hashes.items():
        mirror.copy(name, sha256)


def _mirror_catalog(mirror: Mirror) -> None:
    try:
        data = mirror.refresh("catalog/catalog.json")
    except FileNotFoundError as error:
        raise StoreError(
            f"{mirror.url}/catalog/catalog.json: is missing; upload the store again, all of it."
        ) from error
    with _understood(mirror.folder / "catalog" / "catalog.json", "upload the store again"):
        names = [str(name) for name in json.loads(data)["arrays"].values()]
    for name in names:
        if hashed := re.fullmatch(r"\w+-([0-9a-f]{16})\.npy", name):  # anything else `Catalog.open` refuses
            mirror.copy(f"catalog/{name}", hashed[1])


def _list_mirrored(kind: _Kind, mirror: Mirror) -> dict[str, int]:
    """What lies in the shards' folder at the URL. Where that is not to be had, index.json's word is taken for it."""
    listing = mirror.listing()
    if listing is not None:
        return listing
    try:
        stored = _read_json(mirror.folder / "index.json", _INDEX, "upload the store again")
    except FileNotFoundError as error:
        raise StoreError(
            f"{mirror.url}: there is no list of its shards, and no index.json; finish the store with `{kind.command}`, "
            "then upload all of it."
        ) from error
    with _understood(mirror.folder / "index.json", "upload the store again"):
        return {
            kind.file(int(number), ending): int(size)
            for number, *sizes in stored["shards"]
            for ending, size in (*zip(_FILES, sizes, strict=True), ("json", 0))
        }


def _open_catalog(store: Path, folder: str = "catalog") -> Catalog:
    try:
        return Catalog.open(store / folder)
    except CatalogError as error:
        raise StoreError(
            f"{str(store)!r}: the store's own catalog cannot be used; bring back a copy of its folder {folder!r}, or "
            f"make a new store. {error}"
        ) from error


def _check_originals(store: Path, ours: Catalog, given: Catalog, folder: str = "catalog") -> None:
    if ours.fingerprint == given.fingerprint:
        return
    stored, found = set(ours.paths), set(given.paths)
    differences = [
        f"{len(paths)} {where} (for one {min(paths)!r})"
        for paths, where in ((stored - found, "only in the store"), (found - stored, "not in the store"))
        if paths
    ] or ["the same files in other classes"]
    raise StoreError(
        f"{str(store)!r}: the store was built from other originals: it has {len(stored)}, given are {len(found)}; "
        f"{', '.join(differences)}. Give the folder it was built from, or another store; if that folder has changed "
        f"since, Catalog.open({str(store / folder)!r}) is the list that the store goes by."
    )


# Writing --------------------------------------------------------------------------------------------------------------


class StoreWriter:
    """The one run that may add to a store at a time: orders work, says which shards are missing, derives the index."""

    path: Path
    catalog: Catalog  # the store's own, whose rows shards name
    _header: _Header

    @classmethod
    @contextmanager
    def open(cls, path: str | os.PathLike[str], catalog: Catalog, settings: Settings) -> Iterator["StoreWriter"]:
        """Open a store for writing, or begin one; until the block ends no other run can.

        Args:
            path: The store's folder; it may be there, empty.
            catalog: The originals.
            settings: What decides an edit besides its original, prompt and variant.

        Raises:
            StoreError: Another run is writing, the store is of other originals or settings, of a newer version, or
                the folder is something else or cannot be written.
        """
        path = _local_folder(path)
        with _begun(_EDITS, path, catalog) as listed:
            writer = cls()
            writer.path = path
            writer.catalog = listed
            if (path / "store.json").exists():
                writer._header = _Header.read(path)
            else:
                writer._header = _Header(settings=settings, prompts=(), segments=(), fingerprint=catalog.fingerprint)
            _check_settings(path, writer._header.settings, settings)
            yield writer

    def order(self, prompts: Sequence[str], variants: int, originals_per_shard: int) -> None:
        """Ask for the first `variants` variants of every original under every prompt; what was asked before stays."""
        header = self._header.extended(prompts, variants, len(self.catalog), originals_per_shard)
        if len(header.prompts) > _MOST or variants > _MOST:
            raise StoreError(
                f"{str(self.path)!r}: a store has at most {_MOST} prompts and variants, "
                f"found {len(header.prompts)} and {variants}."
            )
        if header != self._header or not (self.path / "store.json").exists():
            with _writing(self.path):
                header.write(self.path)
        self._header = header

    @property
    def prompts(self) -> tuple[str, ...]:
        """All prompts ordered so far; a shard names them by their places in here."""
        return self._header.prompts

    def shards(self) -> list[Shard]:
        """All shards ordered so far, by number."""
        return list(self._header.shards())

    def done(self) -> dict[int, Counter[str]]:
        """Finished shards, and how many of their edits had which verdict. One whose files have other sizes is not."""
        finished = _finished_shards(_EDITS, self.path, self._header.shard_count)
        return {number: record.verdicts for number, record in finished.items()}

    def finish(self) -> None:
        """Derive the index of the whole store from its shards."""
        records = _finished_shards(_EDITS, self.path, self._header.shard_count)
        tables = _derive(self.path, records, len(self.catalog))
        with _writing(self.path):
            # Without its record the index is not used: no reader takes half of the old one and half of the new.
            (self.path / "index.json").unlink(missing_ok=True)
            files = {
                name: _write_table(self.path / name, table)
                for name, table in zip(_EDITS.tables, (tables.index, tables.starts), strict=True)
            }
            _Record(edits=len(tables.index), originals=len(self.catalog), sizes=tables.sizes).write(self.path, files)


def _local_folder(path: str | os.PathLike[str]) -> Path:
    if is_url(path):
        raise StoreError(f"{path}: a store is written to a folder, found a URL; give a folder, and upload it then.")
    return Path(path).absolute()


class OriginalStoreWriter:
    """The one run that may add to a packed store at a time."""

    path: Path
    catalog: Catalog  # what is listed; the shards name its rows
    _header: _OriginalHeader

    @classmethod
    @contextmanager
    def open(
        cls, path: str | os.PathLike[str], catalog: Catalog, settings: Settings, originals_per_shard: int
    ) -> Iterator["OriginalStoreWriter"]:
        """Open a packed store for writing, or begin one; until the block ends no other run can.

        Args:
            path: The store's folder; it may be there, empty.
            catalog: The originals to pack.
            settings: How they are packed.
            originals_per_shard: Of a new store; one that was begun goes on with its own.

        Raises:
            StoreError: Another run is writing, the store is of other originals or settings, of a newer version, or
                the folder is something else or cannot be written.
        """
        path = _local_folder(path)
        with _begun(_ORIGINALS, path, catalog) as listed:
            writer = cls()
            writer.path = path
            writer.catalog = listed
            if not (path / "store.json").exists():
                header = _OriginalHeader(
                    settings=settings, originals=len(listed), originals_per_shard=originals_per_shard
                )
                with _writing(path):
                    header.write(path)
            writer._header = _OriginalHeader.read(path)
            _check_settings(path, writer._header.settings, settings)
            yield writer

    def shards(self) -> dict[int, range]:
        """All shards: number to rows of the catalog."""
        return {number: self._header.rows(number) for number in range(self._header.shard_count)}

    def done(self) -> dict[int, Counter[str]]:
        """Finished shards, and how many of their originals had which verdict; see `StoreWriter.done`."""
        finished = _finished_shards(_ORIGINALS, self.path, self._header.shard_count)
        return {number: record.verdicts for number, record in finished.items()}

    def finish(self, left_out: str) -> None:
        """Derive the catalog and the index of the whole store from its shards, which must all be there.

        Args:
            left_out: Why the catalog rejects an original that was not accepted.

        Raises:
            StoreError: No original was accepted, or the folder cannot be written.
        """
        records = _finished_shards(_ORIGINALS, self.path, self._header.shard_count)
        index = _gather(_ORIGINALS, self.path, records, len(self.catalog))
        if not len(index):
            raise StoreError(
                f"{str(self.path)!r}: none of the {len(self.catalog)} originals could be packed; give a folder of "
                "images that can be decoded, and a new store."
            )
        catalog = self._packed(index, left_out)
        with _writing(self.path):
            # Without its record the store is unfinished: no reader takes half of the old one and half of the new.
            (self.path / "index.json").unlink(missing_ok=True)
            catalog.save(self.path / "catalog")
            content = {
                "fingerprint": catalog.fingerprint,
                "files": {"index.npy": _write_table(self.path / "index.npy", index)},
                "shards": [[number, *record.sizes] for number, record in records.items()],
            }
            _write_json(self.path / "index.json", _INDEX, content)

    def _packed(self, index: NDArray[np.void], left_out: str) -> Catalog:
        """The catalog of what was packed, a row for each of the index."""
        listed, rows = self.catalog, index["original"]
        sizes = np.stack([index["height"], index["width"]], axis=-1)
        rejected = np.setdiff1d(np.arange(len(listed)), rows).tolist()
        packed = Catalog.from_arrays(
            [listed.encoded_path(row) for row in rows.tolist()], listed.labels[rows], listed.classes, sizes
        )
        return replace(packed, rejected=(*listed.rejected, *(Rejected(listed.path(row), left_out) for row in rejected)))


@contextmanager
def _begun(kind: _Kind, path: Path, catalog: Catalog) -> Iterator[Catalog]:
    """Hold the lock of a store, a new one if there is none, and give the catalog whose rows its shards name."""
    with _writing(path):
        if (path / "store.json").exists():
            with _stored_header(kind, path):
                pass  # one of the other kind, or of another version, is refused before anything is touched
        elif path.is_dir():
            if any((path / "shards").glob(f"{kind.images}-*")):
                raise StoreError(
                    f"{str(path)!r}: has shards, but no store.json, which says what they are; bring back a copy of "
                    "it, or give a new folder."
                )
            # What a run that was killed at its very beginning leaves, besides temporary files.
            others = {entry.name for entry in path.iterdir()} - {kind.listing, "shards"}
            if foreign := sorted(name for name in others if not name.startswith(".")):
                raise StoreError(
                    f"{str(path)!r}: is no {kind.name}, but has other files in it ({foreign[0]!r}); "
                    "give an empty or a new folder."
                )
        (path / "shards").mkdir(parents=True, exist_ok=True)
    with _locked(path):
        with _writing(path):
            for folder in (path, path / "catalog", path / kind.listing, path / "shards"):
                for leftover in folder.glob(".*.tmp"):
                    leftover.unlink()
            if not (path / "store.json").exists():
                catalog.save(path / kind.listing)
        listed = _open_catalog(path, kind.listing)
        _check_originals(path, listed, catalog, kind.listing)
        yield listed


def _finished_shards(kind: _Kind, path: Path, count: int) -> dict[int, _ShardRecord]:
    """Of this many shards those that are there, by number. One whose files have other sizes is not."""
    listing = _list_shards(path)
    finished = {}
    for number in range(count):
        if kind.file(number, "json") not in listing:
            continue
        record = _ShardRecord.read(kind, path, number)
        if tuple(listing.get(kind.file(number, ending)) for ending in _FILES) == record.sizes:
            finished[number] = record
        else:
            _log.warning("Shard %d of %r is damaged and will be made anew.", number, str(path))
    return finished


class _ShardFiles(ABC):
    """Writes the files of one shard: all of them, at the end of the `with` block, or after an error nothing."""

    def __init__(self, kind: _Kind, store: Path, catalog: Catalog, number: int, length: int) -> None:
        self._kind = kind
        self._folder = store / "shards"
        self._catalog = catalog
        self._number = number
        self._length = length  # rows that it must have in the end
        self._rows: list[tuple[Any, ...]] = []
        self._groups: list[list[str]] = []  # of the .idx, a line each
        self._verdicts: Counter[str] = Counter()
        self._key_of: tuple[int, str] = (-1, "")  # an original and its key
        self._hash = hashlib.sha256()
        self._size = 0

    def __enter__(self) -> Self:
        with _writing(self._folder), ExitStack() as stack:
            self._tar = stack.enter_context(_replacing(self._folder / self._kind.file(self._number, "tar")))
            self._close = stack.pop_all()
        return self

    @abstractmethod
    def _content(self) -> dict[str, Any]:
        """What the .json says of the shard besides its number, files and verdicts."""

    def _add_file(self, original: int, extension: str, data: bytes) -> int:
        """Write a file of an original's group; return where it begins. Those of one group must follow each other."""
        if original != self._key_of[0]:
            self._key_of = original, _key(self._catalog.encoded_path(original))
            self._groups.append([])
        name = f"{self._key_of[1]}.{extension}"
        self._write(_member_header(name, len(data)))
        offset = self._size
        self._write(data + bytes(-len(data) % tarfile.BLOCKSIZE))
        self._groups[-1].append(f"{extension} {offset} {len(data)} {name}")
        return offset

    def _add_row(self, *row: object, verdict: str) -> None:
        self._rows.append(row)
        self._verdicts[verdict] += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _writing(self._folder):
            if error is not None:
                self._close.__exit__(kind, error, trace)
                return
            with self._close:
                if len(self._rows) != self._length:
                    raise StoreError(
                        f"shard {self._number} needs {self._length} {self._kind.images}, got {len(self._rows)}."
                    )
                blocks = -(self._size + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE
                self._write(bytes(2 * tarfile.BLOCKSIZE + blocks))
            files: dict[str, dict[str, Any]] = {"tar": {"bytes": self._size, "sha256": self._hash.hexdigest()}}
            lines = [f"v1.2 {len(self._groups)}", *map(" ".join, self._groups), ""]
            idx, npy = (self._folder / self._kind.file(self._number, ending) for ending in ("idx", "npy"))
            files["idx"] = _write_data(idx, "\n".join(lines).encode("ascii"))
            files["npy"] = _write_table(npy, np.array(self._rows, self._kind.shard_row))
            content = {
                "shard": self._number,
                **self._content(),
                "files": files,
                "verdicts": {name: self._verdicts[name] for name in VERDICTS},
            }
            _write_json(self._folder / self._kind.file(self._number, "json"), _SHARD, content)

    def _write(self, data: bytes) -> None:
        with _writing(self._folder):
            self._tar.write(data)
        self._hash.update(data)
        self._size += len(data)


class ShardWriter(_ShardFiles):
    """Writes one shard of edits: all of it, at the end of the `with` block, or after an error nothing.

        with ShardWriter(store, catalog, shard) as writer:
            writer.add(...)  # for each original, for each prompt, for each variant

    What was written of an earlier try is replaced.

    Raises:
        StoreError: The disk is full, or the folder cannot be written.
    """

    def __init__(self, store: Path, catalog: Catalog, shard: Shard) -> None:
        super().__init__(_EDITS, store, catalog, shard.number, len(shard))
        self._header = _Header.read(store)
        self._shard = shard

    def add(
        self,
        original: int,
        prompt: int,
        variant: int,
        *,
        seed: int,
        jpeg: bytes | None,
        height: int = 0,
        width: int = 0,
        verdict: str = VERDICTS[0],
        score: float = math.nan,
    ) -> None:
        """Write one edit; without `jpeg` its verdict alone. Edits of one original must follow each other."""
        offset = length = 0
        if jpeg is not None:
            offset = self._add_file(original, f"{self._header.slugs[prompt]}.{variant}.jpg", jpeg)
            length = len(jpeg)
        code = VERDICTS.index(verdict)
        self._add_row(original, prompt, variant, seed, offset, length, height, width, code, score, verdict=verdict)

    def _content(self) -> dict[str, Any]:
        shard = self._shard
        return {
            "settings": dict(self._header.settings),
            "rows": [shard.rows.start, shard.rows.stop],
            "prompts": {place: self._header.prompts[place] for place in shard.prompts},
            "variants": [shard.variants.start, shard.variants.stop],
        }


class OriginalShardWriter(_ShardFiles):
    """Writes one shard of a packed store, as `ShardWriter` does one of edits; `add` each of its rows in turn."""

    def __init__(self, store: Path, catalog: Catalog, number: int) -> None:
        self._header = _OriginalHeader.read(store)
        self.rows = self._header.rows(number)
        super().__init__(_ORIGINALS, store, catalog, number, len(self.rows))

    def add(self, original: int, extension: str, content: bytes, *, height: int, width: int) -> None:
        """Write one original's file, whose image has this upright size; `extension` is ASCII, without a dot."""
        offset = self._add_file(original, extension, content)
        self._add_row(original, offset, len(content), height, width, 0, verdict=VERDICTS[0])

    def leave_out(self, original: int) -> None:
        """Record that an original cannot be read."""
        self._add_row(original, 0, 0, 0, 0, 1, verdict=VERDICTS[1])

    def _content(self) -> dict[str, Any]:
        return {"settings": dict(self._header.settings), "rows": [self.rows.start, self.rows.stop]}


def _key(path: bytes) -> str:
    """A relative path as WebDataset's key: what follows the first dot of a name would be the extension."""
    return quote_from_bytes(path, safe="/").replace(".", "%2E")


def _member_header(name: str, size: int) -> bytes:
    """What stands before a file in a tar. It has time 0 and no owner, so that the same edits give the same bytes."""
    member = tarfile.TarInfo(name)
    member.size = size
    try:
        return member.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
    except ValueError:
        # A longer name needs an extension. GNU's is the one that DALI understands without the .idx, too.
        return member.tobuf(tarfile.GNU_FORMAT, "ascii", "strict")


def _check_settings(store: Path, stored: Settings, asked: Settings) -> None:
    names = [name for name in {**stored, **asked} if stored.get(name) != asked.get(name)]
    if names:
        differences = "".join(
            f"\n  {name}: {stored.get(name)!r} in the store, {asked.get(name)!r} asked for" for name in names
        )
        raise StoreError(
            f"{str(store)!r}: the store was made with other settings; go on with its own, or give another folder:"
            f"{differences}"
        )


# Files ----------------------------------------------------------------------------------------------------------------


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. The system lets go of it when the process ends, however that comes about."""
    import fcntl  # not on every system, and only writers need it

    with _writing(folder), ExitStack() as stack:
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        stack.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 200).decode("ascii", "replace") or "another process"
            raise StoreError(
                f"{str(folder)!r}: {holder} is writing to this store; wait for it to end, or stop it."
            ) from error
        with suppress(OSError):  # a full disk; the lock holds all the same
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode("ascii", "replace"), 0)
        closing = stack.pop_all()
    with closing:
        yield
        with suppress(OSError):
            os.ftruncate(descriptor, 0)


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    """Turn what goes wrong with a disk into a StoreError that says what stays and how to go on."""
    try:
        yield
    except (OSError, CatalogError) as error:
        raise StoreError(
            f"{str(place)!r}: cannot be written ({error}). Finished shards stay as they are; make room, or permit "
            "writing, and run the same command again: it does the rest."
        ) from error


@contextmanager
def _replacing(file: Path) -> Iterator[BinaryIO]:
    """Write a file whole or not at all: beside its place, to the disk, and only then into its place."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    descriptor = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_data(file: Path, data: bytes) -> dict[str, Any]:
    """Write a file; gives what a JSON file says of it."""
    with _replacing(file) as stream:
        stream.write(data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _write_table(file: Path, table: NDArray[Any]) -> dict[str, Any]:
    content = io.BytesIO()
    np.save(content, table, allow_pickle=False)
    return _write_data(file, content.getvalue())


def _write_json(file: Path, magic: str, content: Mapping[str, Any]) -> None:
    with _replacing(file) as stream:
        stream.write(json.dumps({"magic": magic, "version": _VERSION, **content}, indent=1).encode("ascii") + b"\n")


def _read_json(file: Path, magic: str, remedy: str) -> dict[str, Any]:
    """A JSON object of this kind and version. Raises FileNotFoundError, StoreError."""
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(f"{str(file)!r}: cannot be read ({error.strerror}).") from error
    with _understood(file, remedy):
        stored: dict[str, Any] = json.loads(data)
        found, version = stored["magic"], stored["version"]
    if found != magic:
        raise StoreError(f"{str(file)!r}: 'magic' must be {magic!r}, found {found!r}; {remedy}.")
    if version != _VERSION:
        raise StoreError(
            f"{str(file)!r}: 'version' must be {_VERSION}, found {version!r}; update dali_diffusemix to the release "
            "that wrote it."
        )
    return stored


@contextmanager
def _understood(file: Path, remedy: str) -> Iterator[None]:
    """Turn what goes wrong with a JSON file's content into a StoreError."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StoreError(f"{str(file)!r}: is damaged ({error!r}); {remedy}.") from error


def _load(kind: _Kind, file: Path, dtype: np.dtype[Any], count: int, *, mapped: bool = False) -> NDArray[Any]:
    """An array of `count` rows. Raises StoreError."""
    try:
        array = np.load(file, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise kind.damaged(file, f"is missing or cut short ({error})") from error
    if array.dtype != dtype or array.shape != (count,):
        raise kind.damaged(file, f"must be {count} rows of {dtype}, found {array.shape} of {array.dtype}")
    return np.asarray(array)
