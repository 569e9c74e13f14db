"""Reading stores: tables that are mapped, images that are read where they lie."""

import json
import math
import mmap
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.catalog.table import Catalog, StaleCatalogWarning
from dali_diffusemix.errors import CatalogError, DecodeError, StoreError
from dali_diffusemix.images.reading import Extent, OpenFile
from dali_diffusemix.store.layout import (
    EDITS,
    FILES,
    INDEX,
    INDEX_ROW,
    NOT_YET,
    ORIGINAL_INDEX_ROW,
    ORIGINALS,
    SHARD_ROW,
    VERDICTS,
    Header,
    Kind,
    OriginalHeader,
    Record,
    Settings,
    ShardRecord,
    Sizes,
    UnfinishedStoreWarning,
    load,
    read_json,
    rejected_tar,
    sizes_of,
    stored_header,
    understood,
)
from dali_diffusemix.store.mirror import Mirror, MirrorError, is_url

# Each open or mapped shard holds a file descriptor, of which a process has 1024 as a rule; ImageNet has 2,500 shards.
_OPEN_SHARDS = 200
_LEFT_OUT = -1  # the shard of an original that was not packed


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

    def __init__(self, path: Path, header: Header, catalog: Catalog, tables: "_Tables", mirror: Mirror | None) -> None:
        """Use `EditStore.open`."""
        self.path = path
        self.mirror = mirror
        self.settings = header.settings
        self.prompts = header.prompts
        self._slugs = header.slugs
        self.catalog = catalog
        self.index = tables.index
        self.starts = tables.starts
        self._shards = tables.shards
        self._whole: EditStore | None = None  # whose edits these are, if the rows are another catalog's
        self._tars = _Tars(EDITS, path, tables.sizes, mirror)

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
        with _reached(EDITS, path) as (folder, mirror):
            return cls._open(folder, mirror)

    @classmethod
    def _open(cls, path: Path, mirror: Mirror | None) -> "EditStore":
        header, catalog = Header.read(path), open_catalog(path)
        if catalog.fingerprint not in (header.fingerprint, header.growing):
            header = Header.read(path)  # a run may have taken new originals in, between the two
        if catalog.fingerprint not in (header.fingerprint, header.growing):
            raise StoreError(
                f"{str(path)!r}: store.json is of originals with fingerprint {header.fingerprint[:16]}, but its "
                f"catalog has {catalog.fingerprint[:16]}; bring back the catalog that the store was made with."
            )
        listing = list_shards(path) if mirror is None else _list_mirrored(EDITS, mirror)
        header.check(path, len(catalog))
        done = [number for number in range(header.shard_count) if EDITS.file(number, "json") in listing]
        if not done:
            raise StoreError(
                f"{str(path)!r}: none of its {header.shard_count} shards is finished; "
                "run `dali-diffusemix generate` until it is."
            )
        tables, derived = _open_tables(path, header, len(catalog), done, mirror)
        _check_sizes(EDITS, path, tables.sizes, listing, mirror)
        missing = header.shard_count - len(done)
        if missing or not derived or tables.not_yet:
            what = "its index is not finished"
            if missing or tables.not_yet:
                what = f"{missing} of its {header.shard_count} shards are missing"
                what += f", and {tables.not_yet} edits of the others" if tables.not_yet else ""
            warnings.warn(
                f"{str(path)!r}: {what}; the {len(tables.index)} edits that are there are used. Run the "
                "`dali-diffusemix generate` that makes it again to finish it.",
                UnfinishedStoreWarning,
                stacklevel=3,
            )
        return cls(path, header, catalog, tables, mirror)

    def __reduce__(self) -> tuple[Callable[..., "EditStore"], tuple[Any, ...]]:
        if self._whole is not None:
            return EditStore.in_order_of, (self._whole, self.catalog)
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
        """(n, 2) height and width in pixels of these edits, (n,); 1 at least, whatever a damaged index says."""
        rows = self.index[edits]
        return np.asarray(np.maximum(np.stack([rows["height"], rows["width"]], axis=-1), 1), dtype=np.int32)

    def prompt_of(self, edit: int) -> str:
        """The prompt that an edit was made under, without the template."""
        return self.prompts[int(self.index["prompt"][edit])]

    def slug_of(self, edit: int) -> str:
        """The prompt of an edit as it is in the names of files."""
        return self._slugs[int(self.index["prompt"][edit])]

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

    @property
    def shards(self) -> tuple[int, ...]:
        """Numbers of the finished shards."""
        return self._shards

    def shard_rows(self, shard: int) -> NDArray[np.void]:
        """(n,) SHARD_ROW of all edits of a shard, rejected ones and those that were not made too.

        `original` is a row of the catalog in the store's folder. Of a store at a URL its tables are copied first.

        Raises:
            StoreError: The shard's table is missing or damaged.
        """
        if self.mirror is not None:
            self.mirror.copy_tables([EDITS.shard(shard)])
        record = ShardRecord.read(EDITS, self.path, shard)
        file = self.path / "shards" / EDITS.file(shard, "npy")
        rows = load(EDITS, file, SHARD_ROW, record.verdicts.total())
        check_shard_rows(file, rows, len((self._whole or self).catalog), len(self.prompts))
        return rows

    def encoded_row(self, shard: int, row: np.void) -> bytes | None:
        """The JPEG file of a row of `shard_rows`, accepted or not; None if there is none.

        Raises:
            StoreError: The tar is missing or cut short.
        """
        if not row["length"]:
            return None
        accepted = row["verdict"] == 0
        file = self.path / "shards" / EDITS.file(shard, "tar") if accepted else rejected_tar(self.path, shard)
        try:
            tar = OpenFile(file)
            data = os.pread(tar.descriptor, int(row["length"]), int(row["offset"]))
        except OSError as error:
            raise StoreError(f"{str(file)!r}: cannot be read ({error.strerror}).") from error
        if len(data) != row["length"]:
            raise EDITS.damaged(file, "is cut short")
        return data

    def in_order_of(self, catalog: Catalog) -> "EditStore":
        """The edits of another catalog's originals, with its rows; originals are paired by path.

        Raises:
            StoreError: The catalog lists an original that the store does not know.
        """
        if self.catalog.fingerprint == catalog.fingerprint and same_rows(self.catalog, catalog):
            return self
        rows = rows_of(self.catalog, catalog)
        if missing := np.flatnonzero(rows < 0).tolist():
            raise StoreError(
                f"{self._tars.where!r}: the store was built from other originals: of the {len(catalog)} given it lacks "
                f"{len(missing)} (for one {catalog.path(missing[0])!r}); give the originals that it was built from, or "
                "some of them, or run `dali-diffusemix generate` to take new ones in."
            )
        counts = (self.starts[1:] - self.starts[:-1])[rows]
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        edits = np.repeat(self.starts[rows] - starts[:-1], counts) + np.arange(starts[-1])
        index = self.index[edits]
        index["original"] = np.repeat(np.arange(len(catalog)), counts)
        for table in (index, starts):
            table.flags.writeable = False
        ordered = EditStore.__new__(EditStore)  # a copy, shards that are open included
        ordered.__dict__.update(self.__dict__)
        ordered.catalog, ordered.index, ordered.starts, ordered._whole = catalog, index, starts, self
        return ordered


def same_rows(ours: Catalog, given: Catalog) -> bool:
    """Whether two catalogs list the same originals in the same order."""
    names = ("path_offsets", "path_bytes", "labels")
    return ours.classes == given.classes and all(
        np.array_equal(getattr(ours, name), getattr(given, name)) for name in names
    )


def rows_of(ours: Catalog, given: Catalog) -> NDArray[np.int64]:
    """(given,) int64: the rows of our catalog with the originals of the one given; -1: not in it."""
    row_of = {path: row for row, path in enumerate(ours.paths)}
    return np.fromiter((row_of.get(path, -1) for path in given.paths), np.int64, len(given))


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
        with _reached(ORIGINALS, path) as (folder, mirror):
            return cls._open(folder, mirror)

    @classmethod
    def _open(cls, path: Path, mirror: Mirror | None) -> "OriginalStore":
        header = OriginalHeader.read(path)
        file = path / "index.json"
        remedy = f"remove it and run `{ORIGINALS.command}` again"
        try:
            stored = read_json(file, INDEX, remedy)
        except FileNotFoundError as error:
            raise StoreError(
                f"{str(path)!r}: the packed store is not finished (it has no index.json); run the "
                f"`{ORIGINALS.command}` that makes it again: it does the rest."
            ) from error
        with understood(file, remedy):
            fingerprint = str(stored["fingerprint"])
            sizes = sizes_of(stored["shards"])
        catalog = open_catalog(path)
        if catalog.fingerprint != fingerprint:
            raise StoreError(
                f"{str(path)!r}: index.json is of originals with fingerprint {fingerprint[:16]}, but the store's "
                f"catalog has {catalog.fingerprint[:16]}; {remedy}."
            )
        listing = list_shards(path) if mirror is None else _list_mirrored(ORIGINALS, mirror)
        _check_sizes(ORIGINALS, path, sizes, listing, mirror)
        index = load(ORIGINALS, path / "index.npy", ORIGINAL_INDEX_ROW, len(catalog), mapped=True)
        return cls(path, header.settings, catalog, index, _Tars(ORIGINALS, path, sizes, mirror))

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

        What was left out when the store was packed, since it could not be decoded, keeps its row of that catalog and
        cannot be decoded here either. So this store gives the samples of the folder that it was packed from.

        Raises:
            StoreError: The catalog lists an original that is not in here, and was not left out; or all were.
        """
        ours = self.catalog
        if same_rows(ours, catalog):
            return self
        rows = rows_of(ours, catalog)
        left_out = {one.path for one in ours.rejected}
        absent = np.flatnonzero(rows < 0)
        missing = [row for row in absent.tolist() if catalog.path(row) not in left_out]
        if missing or len(absent) == len(catalog):
            missing = missing or absent.tolist()
            raise StoreError(
                f"{str(self.path)!r}: the packed store lacks {len(missing)} of the {len(catalog)} originals asked for "
                f"(for one {catalog.path(missing[0])!r}); give the store that was packed from the same folder, or "
                "make the edits from this one."
            )
        sizes, index = ours.sizes[rows], self.index[rows]
        sizes[absent] = catalog.sizes[absent]
        index["shard"][absent] = _LEFT_OUT
        own_order = replace(catalog, sizes=sizes, _origin=None)
        ordered = OriginalStore(self.path, self.settings, own_order, index, self._tars)
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
        """Where the files of these originals, (n,), are; of a shard that has gone or was changed, and of an original
        that was left out when the store was packed, the error.

        Of a store at a URL it waits for their shards, and has the rest fetched in the background.

        Raises:
            MirrorError: The URL does not answer or refuses, or the disk is full.
        """
        rows = self.index[originals]
        there = rows["shard"] != _LEFT_OUT
        found = iter(self._tars.extents(rows[there]))
        return [
            next(found) if is_there else self._not_packed(original)
            for original, is_there in zip(originals.tolist(), there.tolist(), strict=True)
        ]

    def encoded(self, original: int) -> NDArray[np.uint8]:
        """An original's file, (bytes,) uint8: a read-only view into its shard, which is mapped.

        Raises:
            StoreError: The shard has gone or was changed since the store was opened.
            DecodeError: The original was left out when the store was packed.
        """
        if self.index["shard"][original] == _LEFT_OUT:
            raise self._not_packed(original)
        return self._tars.encoded(self.index[original])

    def _not_packed(self, original: int) -> DecodeError:
        return DecodeError(
            f"{self._tars.where}: {self.catalog.path(original)!r} was left out when this store was packed, for it "
            "could not be decoded; mend it and pack the folder into a new store, or go on without it"
        )


def _reopen_originals(path: str | Path, order: Catalog | None) -> OriginalStore:
    store = OriginalStore.open(path)
    return store if order is None else store.in_order_of(order)


@dataclass(frozen=True, kw_only=True)
class ShardFiles:
    """A finished shard of either kind of store, as its .json describes it."""

    number: int
    json: Path
    error: str | None  # what is wrong with the .json; then the rest is empty
    files: Mapping[str, Path]  # ending, or "rejected", to its file
    sizes: Mapping[str, int]  # that each must have
    hashes: Mapping[str, str]  # SHA-256 that each must have
    verdicts: Mapping[str, int]
    kind: Kind

    def rows(self) -> NDArray[np.void]:
        """(n,) SHARD_ROW or ORIGINAL_SHARD_ROW. Raises StoreError."""
        return load(self.kind, self.files["npy"], self.kind.shard_row, sum(self.verdicts.values()))


def _kind_of(path: Path) -> Kind:
    """Which kind of store a folder is. Raises StoreError if it is neither."""
    try:
        with stored_header(ORIGINALS, path):
            return ORIGINALS
    except StoreError:
        with stored_header(EDITS, path):
            return EDITS


def shard_files(path: Path) -> tuple[list[ShardFiles], int]:
    """The finished shards of a store of either kind, by number, and how many there will be. Raises StoreError."""
    kind = _kind_of(path)
    header = OriginalHeader.read(path) if kind is ORIGINALS else Header.read(path)
    header.check(path, len(open_catalog(path, kind.listing)))
    listing, shards = list_shards(path), []
    for number in range(header.shard_count):
        if kind.file(number, "json") not in listing:
            continue
        files = {ending: path / "shards" / kind.file(number, ending) for ending in FILES}
        what: str | None = None
        sizes: dict[str, int] = {}
        record: ShardRecord | None = None
        try:
            record = ShardRecord.read(kind, path, number)
            sizes = dict(zip(FILES, record.sizes, strict=True))
            if record.rejected is not None:
                files["rejected"], sizes["rejected"] = rejected_tar(path, number), record.rejected
        except StoreError as error:
            what = str(error)
        shards.append(
            ShardFiles(
                number=number,
                json=path / "shards" / kind.file(number, "json"),
                error=what,
                files=files,
                sizes=sizes,
                hashes={} if record is None else record.hashes,
                verdicts={} if record is None else record.verdicts,
                kind=kind,
            )
        )
    return shards, header.shard_count


def index_is_current(path: Path) -> bool:
    """Whether a store's index, as a reader takes it, is that of its shards. Raises StoreError: it cannot be opened."""
    kind = _kind_of(path)
    store = OriginalStore.open(path) if kind is ORIGINALS else EditStore.open(path)
    records = {shard.number: ShardRecord.read(kind, path, shard.number) for shard in shard_files(path)[0]}
    if isinstance(store, OriginalStore):
        listed = open_catalog(path, ORIGINALS.listing)
        return bool(np.array_equal(store.index, gather(kind, path, records, len(listed))))
    tables = derive(path, records, len(store.catalog))
    same = len(store.index) == len(tables.index) and all(
        np.array_equal(store.index[name], tables.index[name], equal_nan=name == "score")
        for name in INDEX_ROW.names or ()
    )
    return same and bool(np.array_equal(store.starts, tables.starts))


@dataclass(frozen=True, kw_only=True)
class _Tables:
    """The index of some shards."""

    index: NDArray[np.void]  # (edits,) INDEX_ROW
    starts: NDArray[np.int64]  # (originals + 1,)
    sizes: Sizes
    not_yet: int = 0  # edits that these shards lack

    @property
    def shards(self) -> tuple[int, ...]:
        return tuple(self.sizes)


def _reopen(path: Path, catalog: Catalog, shards: tuple[int, ...]) -> EditStore:
    """What `EditStore.open` gave elsewhere, whatever was added since."""
    header = Header.read(path)
    tables, _ = _open_tables(path, header, len(catalog), shards, None)
    return EditStore(path, header, catalog, tables, None)


def _reopen_mirrored(url: str, fingerprint: str, shards: tuple[int, ...]) -> EditStore:
    """The same of a store at a URL, perhaps on another machine."""
    with _reached(EDITS, url) as (path, mirror):
        header, catalog = Header.read(path), open_catalog(path)
        if catalog.fingerprint != fingerprint:
            raise StoreError(
                f"{url}: the store was replaced by one of other originals while another process was using it; build "
                "the dataset again."
            )
        tables, _ = _open_tables(path, header, len(catalog), shards, mirror)
        return EditStore(path, header, catalog, tables, mirror)


def _open_tables(
    path: Path, header: Header, originals: int, shards: Sequence[int], mirror: Mirror | None
) -> tuple[_Tables, bool]:
    """The index of these shards, and whether the store's own serves; if not, it is derived here, in memory."""
    try:
        record = Record.read(path)
    except FileNotFoundError:
        record = None
    if record is not None and list(record.sizes) == list(shards) and record.originals == originals:
        index = load(EDITS, path / "index.npy", INDEX_ROW, record.edits, mapped=True)
        starts = load(EDITS, path / "starts.npy", np.dtype("<i8"), originals + 1, mapped=True)
        if starts[0] != 0 or starts[-1] != record.edits or (starts[1:] < starts[:-1]).any():
            found = f"{starts[0]} to {starts[-1]}" if (starts[1:] >= starts[:-1]).all() else "some that go down"
            raise EDITS.damaged(path / "starts.npy", f"must run up from 0 to {record.edits}, found {found}")
        return _Tables(index=index, starts=starts, sizes=record.sizes, not_yet=record.not_yet), True
    if mirror is not None:
        mirror.copy_tables([EDITS.shard(number) for number in shards])
    records = {number: ShardRecord.read(EDITS, path, number) for number in shards}
    return derive(path, records, originals), False


def derive(path: Path, records: Mapping[int, "ShardRecord"], originals: int) -> _Tables:
    """Gather the accepted edits of these shards, sorted."""
    index = gather(EDITS, path, records, originals)
    key = (index["original"] << 32) | (index["prompt"].astype(np.int64) << 16) | index["variant"]
    if (key[1:] < key[:-1]).any():  # shards of one segment come sorted already
        index = index[np.argsort(key, kind="stable")]
    starts = np.searchsorted(index["original"], np.arange(originals + 1)).astype(np.int64)
    for table in (index, starts):
        table.flags.writeable = False
    return _Tables(
        index=index,
        starts=starts,
        sizes={number: record.sizes for number, record in records.items()},
        not_yet=sum(record.verdicts[NOT_YET] for record in records.values()),
    )


def tally(path: Path, records: Mapping[int, "ShardRecord"], catalog: Catalog, prompts: int) -> NDArray[np.int64]:
    """(classes, prompts, verdicts) how many edits of these shards there are."""
    shape = (len(catalog.classes), prompts, len(VERDICTS))
    counts = np.zeros(math.prod(shape), np.int64)
    for number, record in records.items():
        file = path / "shards" / EDITS.file(number, "npy")
        rows = load(EDITS, file, SHARD_ROW, record.verdicts.total())
        check_shard_rows(file, rows, len(catalog), prompts)
        places = (catalog.labels[rows["original"]], rows["prompt"], rows["verdict"])
        counts += np.bincount(np.ravel_multi_index(places, shape), minlength=len(counts))
    return counts.reshape(shape)


def check_shard_rows(file: Path, rows: NDArray[np.void], originals: int, prompts: int) -> None:
    """Raise StoreError unless a shard's rows name originals, prompts and verdicts that there are."""
    for name, count in (("original", originals), ("prompt", prompts), ("verdict", len(VERDICTS))):
        column = rows[name]
        wrong = (column < 0) | (column >= count)
        if wrong.any():
            raise EDITS.damaged(file, f"{name} must lie in 0 to {count - 1}, found {column[wrong][0]}")


def grown_catalog(store: Path, ours: Catalog, given: Catalog) -> Catalog:
    """Our catalog, and after it what else is given; what is not given any more stays, and a warning says so.

    Raises:
        StoreError: Fewer than half of ours are given, as of another dataset, or some are in other classes.
    """
    rows = rows_of(given, ours)
    kept = np.flatnonzero(rows < 0)
    here = np.flatnonzero(rows >= 0)
    classes = [ours.classes[label] for label in ours.labels[here].tolist()]
    if 2 * len(here) < len(ours) or [given.classes[label] for label in given.labels[rows[here]].tolist()] != classes:
        check_originals(EDITS, store, ours, given)
    if len(kept):
        warnings.warn(
            f"{str(store)!r}: {len(kept)} of its {len(ours)} originals are not among those given (for one "
            f"{ours.path(int(kept[0]))!r}); their edits stay in the store. To train without them, give the dataset "
            "catalog=dali_diffusemix.catalog.index(root).",
            StaleCatalogWarning,
            stacklevel=2,
        )
    more = np.setdiff1d(np.arange(len(given)), rows)
    if not len(more):
        return ours
    names = given.classes if set(ours.classes) <= set(given.classes) else sorted({*ours.classes, *given.classes})
    place = {name: label for label, name in enumerate(names)}
    labels = np.concatenate(
        [
            np.array([place[name] for name in catalog.classes])[catalog_labels]
            for catalog, catalog_labels in ((ours, ours.labels), (given, given.labels[more]))
        ]
    )
    paths = [ours.encoded_path(row) for row in range(len(ours))] + [given.encoded_path(row) for row in more.tolist()]
    sizes = np.concatenate([ours.sizes, given.sizes[more]])
    return replace(Catalog.from_arrays(paths, labels, names, sizes), rejected=given.rejected)


def gather(kind: Kind, path: Path, records: Mapping[int, "ShardRecord"], originals: int) -> NDArray[np.void]:
    """(accepted,) rows of the index, shard after shard; `originals` are listed."""
    index = np.empty(sum(record.verdicts[VERDICTS[0]] for record in records.values()), kind.index_row)
    filled = 0
    for number, record in records.items():
        file = path / "shards" / kind.file(number, "npy")
        rows = load(kind, file, kind.shard_row, sum(record.verdicts.values()))
        rows = rows[rows["verdict"] == 0]
        part = index[filled : filled + len(rows)]
        if len(rows) != record.verdicts[VERDICTS[0]] or (
            len(rows) and not 0 <= rows["original"].min() <= rows["original"].max() < originals
        ):
            raise kind.damaged(file, "does not agree with its .json and the store's catalog")
        for name, least in (("height", 1), ("width", 1), ("length", 1), ("offset", 0)):
            if len(rows) and rows[name].min() < least:
                raise kind.damaged(file, f"{name} must be {least} or more, found {rows[name].min()}")
        for name in kind.index_row.names or ():
            part[name] = number if name == "shard" else rows[name]
        filled += len(rows)
    return index


def _open_tar(kind: Kind, shards: Path, sizes: Sizes, number: int) -> OpenFile:
    """A whole tar, its size checked: touching what is mapped beyond a file's end kills a process."""
    file = shards / kind.file(number, "tar")
    try:
        tar = OpenFile(file)
    except OSError as error:
        raise StoreError(f"{str(file)!r}: cannot be read ({error.strerror}).") from error
    _check_size(repr(str(file)), sizes[number][0], os.fstat(tar.descriptor).st_size, _remedy(kind))
    return tar


def _map_tar(kind: Kind, shards: Path, sizes: Sizes, number: int) -> NDArray[np.uint8]:
    """A whole tar, (bytes,) uint8."""
    tar = _open_tar(kind, shards, sizes, number)
    return np.frombuffer(mmap.mmap(tar.descriptor, 0, access=mmap.ACCESS_READ), np.uint8)


class _Tars:
    """The tars of a store's shards, opened when they are first touched; those of a mirror fetched."""

    def __init__(self, kind: Kind, store: Path, sizes: Sizes, mirror: Mirror | None) -> None:
        self.where = str(store) if mirror is None else mirror.url
        self.mirror = mirror
        self._kind = kind
        self._sizes = sizes
        self._open = lru_cache(_OPEN_SHARDS)(partial(_open_tar, kind, store / "shards", sizes))
        self._map = lru_cache(_OPEN_SHARDS)(partial(_map_tar, kind, store / "shards", sizes))
        if mirror is not None:
            mirror.expect({kind.shard(number): of_shard[0] for number, of_shard in sizes.items()})

    def extents(self, rows: NDArray[np.void]) -> list[Extent | DecodeError]:
        """Where the files of these rows, (n,) of the index, are, or what is wrong with their shard."""
        tar: Callable[[int], OpenFile] = self._open
        if self.mirror is not None:
            tar = self._fetched
            known = [number for number in np.unique(rows["shard"]).tolist() if number in self._sizes]
            self.mirror.prefetch([self._kind.shard(number) for number in known])
        extents: list[Extent | DecodeError] = []
        for number, offset, length in zip(
            rows["shard"].tolist(), rows["offset"].tolist(), rows["length"].tolist(), strict=True
        ):
            try:
                self._check(number, offset, length)
                extents.append(Extent(tar(number), offset, length))
            except MirrorError:
                raise  # no fault of the shard's: there is nothing to put in its place
            except StoreError as error:
                extents.append(DecodeError(str(error)))
        return extents

    def encoded(self, row: np.void) -> NDArray[np.uint8]:
        """The file of a row of the index, (bytes,) uint8, read-only."""
        number, offset, length = int(row["shard"]), int(row["offset"]), int(row["length"])
        self._check(number, offset, length)
        if self.mirror is None:
            return self._map(number)[offset : offset + length]
        # Not mapped, so that the mirror can let go of the tar.
        return np.frombuffer(os.pread(self._fetched(number).descriptor, length, offset), np.uint8)

    def _check(self, number: int, offset: int, length: int) -> None:
        """Raise StoreError where a row of a damaged index names what is in no shard."""
        if number not in self._sizes or not (offset >= 0 and 0 < length <= self._sizes[number][0] - offset):
            raise StoreError(
                f"{self.where}/index.npy: is damaged: a row has shard {number}, offset {offset}, length {length}; run "
                f"`{self._kind.command}` again, which makes it anew."
            )

    def _fetched(self, number: int) -> OpenFile:
        assert self.mirror is not None
        return self.mirror.open(self._kind.shard(number))


def _check_sizes(kind: Kind, store: Path, sizes: Sizes, listing: Mapping[str, int], mirror: Mirror | None) -> None:
    remedy = _remedy(kind) if mirror is None else "upload the store again, all of it"
    for number, of_shard in sizes.items():
        for ending, size in zip(FILES, of_shard, strict=True):
            name = kind.file(number, ending)
            file = repr(str(store / "shards" / name)) if mirror is None else f"{mirror.url}/shards/{name}"
            _check_size(file, size, listing.get(name), remedy)


def _check_size(file: str, expected: int, found: int | None, remedy: str) -> None:
    if found != expected:
        what = "is missing" if found is None else f"must have {expected} bytes, found {found}"
        raise StoreError(f"{file}: {what}; {remedy}.")


def _remedy(kind: Kind) -> str:
    return f"run `{kind.command}` again, which makes this shard anew (`dali-diffusemix verify` checks them all)"


def list_shards(store: Path) -> dict[str, int]:
    """Name to size in bytes of all that lies in the shards' folder."""
    try:
        with os.scandir(store / "shards") as entries:
            return {entry.name: entry.stat().st_size for entry in entries}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StoreError(f"{str(store / 'shards')!r}: cannot be listed ({error.strerror}).") from error


@contextmanager
def _reached(kind: Kind, path: str | os.PathLike[str]) -> Iterator[tuple[Path, Mirror | None]]:
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
            with stored_header(kind, mirror.folder):
                pass
            _mirror_index(kind, mirror)
            _mirror_catalog(mirror)
            yield mirror.folder, mirror
    except StoreError as error:
        error.add_note(f"{str(mirror.folder)!r} is the mirror of {mirror.url!r}.")
        raise


def _mirror_index(kind: Kind, mirror: Mirror) -> None:
    try:
        data = mirror.refresh("index.json", vouches_for=kind.tables)
    except FileNotFoundError:
        return
    with understood(mirror.folder / "index.json", "upload the store again"):
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
    with understood(mirror.folder / "catalog" / "catalog.json", "upload the store again"):
        names = [str(name) for name in json.loads(data)["arrays"].values()]
    for name in names:
        if hashed := re.fullmatch(r"\w+-([0-9a-f]{16})\.npy", name):  # anything else `Catalog.open` refuses
            mirror.copy(f"catalog/{name}", hashed[1])


def _list_mirrored(kind: Kind, mirror: Mirror) -> dict[str, int]:
    """What lies in the shards' folder at the URL. Where that is not to be had, index.json's word is taken for it."""
    listing = mirror.listing()
    if listing is not None:
        return listing
    try:
        stored = read_json(mirror.folder / "index.json", INDEX, "upload the store again")
    except FileNotFoundError as error:
        raise StoreError(
            f"{mirror.url}: there is no list of its shards, and no index.json; finish the store with `{kind.command}`, "
            "then upload all of it."
        ) from error
    with understood(mirror.folder / "index.json", "upload the store again"):
        return {
            kind.file(int(number), ending): int(size)
            for number, sizes in sizes_of(stored["shards"]).items()
            for ending, size in (*zip(FILES, sizes, strict=True), ("json", 0))
        }


def open_catalog(store: Path, folder: str = "catalog") -> Catalog:
    try:
        return Catalog.open(store / folder)
    except CatalogError as error:
        raise StoreError(
            f"{str(store)!r}: the store's own catalog cannot be used; bring back a copy of its folder {folder!r}, or "
            f"make a new store. {error}"
        ) from error


def check_originals(kind: Kind, store: Path, ours: Catalog, given: Catalog) -> None:
    if ours.fingerprint == given.fingerprint:
        return
    stored, found = set(ours.paths), set(given.paths)
    differences = [
        f"{len(paths)} {where} (for one {min(paths)!r})"
        for paths, where in ((stored - found, "only in the store"), (found - stored, "not in the store"))
        if paths
    ] or ["the same files in other classes"]
    if kind is EDITS:
        remedy = "Give those that it was built from (new ones are welcome), or another store"
    else:
        remedy = "Pack into a new folder, or give just those that it was built from"
    raise StoreError(
        f"{str(store)!r}: the store was built from other originals: it has {len(stored)}, given are {len(found)}; "
        f"{', '.join(differences)}. {remedy}; if that folder has changed since, "
        f"Catalog.open({str(store / kind.listing)!r}) is the list that the store goes by."
    )
