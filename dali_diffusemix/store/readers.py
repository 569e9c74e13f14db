"""Readers of stores: tables that are mapped, and images that are read from the shards' tars."""

import hashlib
import itertools
import json
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.base.workers import Workers
from dali_diffusemix.catalog.listing import holds_images
from dali_diffusemix.catalog.table import Catalog
from dali_diffusemix.errors import ConfigError, DecodeError, StoreError
from dali_diffusemix.images.codec import RAW_HEADER, STORED, Stored
from dali_diffusemix.images.reading import Extent, OpenFile, Stretches
from dali_diffusemix.store.catalogs import open_catalog, rows_of, same_rows
from dali_diffusemix.store.decisions import DECISIONS_ENDING, Decisions, EditName
from dali_diffusemix.store.index import EditIndex, Replaced, gather, sizes_of
from dali_diffusemix.store.layout import (
    ACCEPTED,
    EDITS,
    FILES,
    INDEX,
    INDEX_ROW,
    ORIGINAL_INDEX_ROW,
    ORIGINALS,
    VERDICTS,
    WHOLE,
    Header,
    Kind,
    OriginalHeader,
    Settings,
    Sizes,
    UnfinishedStoreWarning,
    is_raw,
    load,
    read_json,
    rejected_tar,
    stored_header,
    understood,
)
from dali_diffusemix.store.mirror import Mirror, MirrorError, is_url
from dali_diffusemix.store.scores import RESERVED, Scores, check_name
from dali_diffusemix.store.selection import Selection, rejected_by_hand
from dali_diffusemix.store.shards import (
    DamagedShard,
    ShardRecord,
    check_size,
    list_shards,
    map_tar,
    open_tar,
    remedy,
)

# Each open or mapped shard holds a file descriptor. A process usually may have 1024; ImageNet has 2,500 shards.
_OPEN_SHARDS = 200
_Found = TypeVar("_Found", "Places", Stretches)
_SCORE_THREADS = 8  # that fetch scores, two small files a shard
_LEFT_OUT = -1  # in place of the shard, for an original that was not packed


class EditStore:
    """The accepted edits of a store, as a table and as image files.

    Edits are numbered 0 to len - 1, sorted by original, then prompt, then variant: an `EditTable` of the plan. The
    table is memory-mapped; shards are opened on first use. A store is pickled as its path and its shards, so another
    process sees the same edits even while more are being made.
    """

    path: Path  # the mirror's folder if the store is at a URL
    mirror: Mirror | None  # fetches the files of a store at a URL
    settings: Settings  # all that decides an edit besides its original, prompt and variant
    prompts: tuple[str, ...]
    catalog: Catalog
    starts: NDArray[np.int64]  # (originals + 1,) the edits of original i are starts[i] to starts[i + 1]

    def __init__(self, path: Path, header: Header, catalog: Catalog, index: EditIndex, mirror: Mirror | None) -> None:
        """Use `EditStore.open`."""
        self.path = path
        self.mirror = mirror
        self.settings = header.settings
        self.prompts = header.prompts
        self._header = header
        self.catalog = catalog
        self._table = index.rows  # (edits there,) INDEX_ROW
        self._rows: NDArray[np.int64] | None = None  # (edits,) rows of the table; None: all
        self.starts = index.starts
        self._shards = index.shards
        self._base: EditStore | None = None  # the opened store that this one has some edits of
        self._tars = _Tars(EDITS, path, index.sizes, mirror)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "EditStore":
        """Open a store. An unfinished one has the shards that are there, with an `UnfinishedStoreWarning`.

        Edits that people rejected (`decisions`) are left out, and those that the store's rules do not want any more.

        Args:
            path: Its folder, or a URL as `str`.

        Raises:
            StoreError: There is no store, no shard yet, a file is missing, cut short, or of a newer version.
            MirrorError: Its URL does not answer or refuses, or the disk is full (a StoreError).
            MissingDependencyError: A package that the URL needs is not installed.
        """
        with _reached(EDITS, path) as (folder, mirror):
            return cls._open(folder, mirror)

    @classmethod
    def find(cls, path: Path) -> "EditStore | None":
        """Open the edit store in a folder; None if the folder is something else. Raises StoreError."""
        return cls.open(path) if kind_at(path) is EDITS else None

    @classmethod
    def _open(cls, path: Path, mirror: Mirror | None) -> "EditStore":
        header, catalog = Header.read(path), open_catalog(path)
        if catalog.fingerprint not in (header.fingerprint, header.growing):
            header = Header.read(path)  # a run may have added originals between the two reads
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
        index, its_own = _open_index(path, header, len(catalog), done, mirror)
        _check_sizes(EDITS, path, index.sizes, listing, mirror)
        missing = header.shard_count - len(done)
        if missing or not its_own or index.not_yet:
            what = "its index is not finished"
            if missing or index.not_yet:
                what = f"{missing} of its {header.shard_count} shards are missing"
                what += f", and {index.not_yet} edits of the others" if index.not_yet else ""
            warnings.warn(
                f"{str(path)!r}: {what}; the {len(index.rows)} edits that are there are used. Run the "
                "`dali-diffusemix generate` that makes it again to finish it.",
                UnfinishedStoreWarning,
                stacklevel=3,
            )
        return cls(path, header, catalog, index, mirror)._offered(Decisions.of(path).rejected())

    def __reduce__(self) -> tuple[Callable[..., "EditStore"], tuple[Any, ...]]:
        if self._base is not None:
            return _restored, (self._base, self.catalog, self._rows, self.starts)
        if self.mirror is not None:
            return _reopen_mirrored, (self.mirror.url, self.catalog.fingerprint, self._tars.sizes)
        return _reopen, (self.path, self.catalog, self._tars.sizes)

    def __len__(self) -> int:
        """The number of edits."""
        return int(self.starts[-1])

    def __repr__(self) -> str:
        return f"<EditStore {self._tars.where!r}: {len(self)} edits of {len(self.catalog)} originals>"

    @property
    def index(self) -> NDArray[np.void]:
        """(edits,) INDEX_ROW, read-only; a copy, unless the edits are all that are there."""
        if self._rows is None:
            return self._table
        index = self._table[self._rows]
        index["original"] = np.repeat(np.arange(len(self.catalog)), np.diff(self.starts))
        index.flags.writeable = False
        return index

    def _at(self, edits: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) rows of the table of these edits, (n,)."""
        return edits if self._rows is None else self._rows[edits]

    def originals_of(self, edits: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) int64: the originals, rows of the catalog, of these edits, (n,)."""
        if self._rows is None:
            return np.asarray(self._table["original"][edits], dtype=np.int64)
        return np.asarray(np.searchsorted(self.starts, edits, side="right") - 1, dtype=np.int64)

    def sizes(self, edits: NDArray[np.int64]) -> NDArray[np.int32]:
        """(n, 2) height and width in pixels of these edits, (n,); at least 1, even if the index is damaged."""
        rows = self._at(edits)
        height, width = (self._table[name][rows] for name in ("height", "width"))
        return np.asarray(np.maximum(np.stack([height, width], axis=-1), 1), dtype=np.int32)

    @property
    def raw(self) -> bool:
        """True if the edits are raw images: plain pixels, which need no decoding."""
        return is_raw(self.settings)

    @staticmethod
    def format_at(path: Path) -> Stored:
        """The format of the edits in a store's folder. Raises StoreError."""
        found = Header.read(path).settings.get("format")
        return next((one for one in STORED if one == found), "jpeg")

    def _row(self, edit: int) -> np.void:
        row: np.void = self._table[edit if self._rows is None else self._rows[edit]]
        return row

    def prompt_of(self, edit: int) -> str:
        """The prompt of an edit, without the template."""
        return self.prompts[int(self._row(edit)["prompt"])]

    def variant_of(self, edit: int) -> int:
        """The variant of an edit, of those under one prompt."""
        return int(self._row(edit)["variant"])

    def count_by_prompt(self) -> dict[str, int]:
        """Number of edits under each prompt of the store, in its order. Reads the whole table."""
        prompts = self._table["prompt"] if self._rows is None else self._table["prompt"][self._rows]
        counts = np.bincount(np.clip(prompts, 0, None), minlength=len(self.prompts))
        return dict(zip(self.prompts, counts.tolist(), strict=False))  # a damaged table may have more

    def slug_of(self, edit: int) -> str:
        """The prompt of an edit as it stands in file names."""
        return self._header.slugs[int(self._row(edit)["prompt"])]

    def extents(self, edits: NDArray[np.int64]) -> list[Extent | DecodeError]:
        """The locations of the files of these edits, (n,), or the error if a shard is missing or was changed.

        For a store at a URL, waits for their shards, and has the rest fetched in the background.

        Raises:
            MirrorError: The URL does not answer or refuses, or the disk is full.
        """
        return self._tars.extents(self._table[self._at(edits)])

    def stretches(self, edits: NDArray[np.int64]) -> Stretches:
        """Where the pixels of these edits, (n,) of a raw store, lie. Raises MirrorError, see `extents`."""
        return self._tars.stretches(self._table, self._at(edits))

    def places(self, edits: NDArray[np.int64]) -> "Places":
        """The same in the shards."""
        return self._tars.places(self._table, self._at(edits))

    @property
    def raw_shards(self) -> "RawShards":
        """The shards of a raw store; the same object for all that this store was reindexed to."""
        return self._tars.raw

    def encoded(self, edit: int) -> NDArray[np.uint8]:
        """An edit's file, (bytes,) uint8: a read-only view into its shard, which is mapped.

        Raises:
            StoreError: The shard is missing, or was changed since the store was opened.
        """
        return self._tars.encoded(self._row(edit))

    @property
    def shards(self) -> tuple[int, ...]:
        """Numbers of the finished shards."""
        return self._shards

    def shard_rows(self, shard: int) -> NDArray[np.void]:
        """(n,) SHARD_ROW of all edits of a shard, including those that were rejected or not made.

        `original` is a row of the catalog in the store's folder. For a store at a URL, the shard's tables are copied
        first.

        Raises:
            StoreError: The shard's table is missing or damaged.
        """
        if self.mirror is not None:
            self.mirror.copy_tables([EDITS.shard(shard)])
        record = ShardRecord.read(EDITS, self.path, shard)
        return record.checked_rows(len((self._base or self).catalog), len(self.prompts))

    def is_replaced(self, shard: int, rows: NDArray[np.void]) -> NDArray[np.bool_]:
        """(n,) True for rows of `shard_rows`, (n,), whose edit a later shard made again. Raises StoreError."""
        return self._replaced.mask(shard, rows)

    def are_wanted(self, rows: NDArray[np.void]) -> NDArray[np.bool_]:
        """(n,) True for rows of `shard_rows`, (n,), whose class still has their prompt."""
        catalog = (self._base or self).catalog
        return np.asarray(self._header.wanted(catalog.classes)[catalog.labels[rows["original"]], rows["prompt"]])

    @cached_property
    def _replaced(self) -> Replaced:
        listed = {number for order in self._header.orders for number in order.numbers(WHOLE)} & set(self._shards)
        if self.mirror is not None:
            self.mirror.copy_tables([EDITS.shard(number) for number in sorted(listed)])
        return Replaced({number: ShardRecord.read(EDITS, self.path, number) for number in listed}, self._header)

    def encoded_row(self, shard: int, row: np.void) -> bytes | None:
        """The file of a row of `shard_rows`, accepted or not; None if it has none.

        Raises:
            StoreError: The tar is missing or cut short.
        """
        if not row["length"]:
            return None
        accepted = row["verdict"] == VERDICTS.index(ACCEPTED)
        file = self.path / "shards" / EDITS.file(shard, "tar") if accepted else rejected_tar(self.path, shard)
        try:
            tar = OpenFile(file)
            data = os.pread(tar.descriptor, int(row["length"]), int(row["offset"]))
        except OSError as error:
            raise StoreError(f"{str(file)!r}: cannot be read ({error.strerror}).") from error
        if len(data) != row["length"]:
            raise EDITS.damaged(file, "is cut short")
        return data

    def reindexed(self, catalog: Catalog) -> "EditStore":
        """The edits of another catalog's originals, by its rows; originals are paired by path.

        Raises:
            StoreError: The catalog lists an original that the store lacks.
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
        counts = np.diff(self.starts)[rows]
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        edits = np.repeat(self.starts[rows] - starts[:-1], counts) + np.arange(starts[-1])
        return self._derived(catalog, self._at(edits), starts)

    def select(self, selection: Selection) -> "EditStore":
        """The store with some of its edits only, numbered anew.

        Raises:
            ConfigError: It names a prompt that the store lacks, or no name that scores may have; or no edit is left.
            StoreError: The store has no such scores, or not of all its shards.
            MirrorError: The URL of the store does not answer or refuses.
        """
        table = selection.table(self.path, self.prompts, self.catalog.classes)
        index = self.index
        mask = table[self.catalog.labels[index["original"]], index["prompt"]]
        for name, least in selection.least.items():
            mask &= self._scores(name, index) >= float(least)
        return self._only(mask)

    def _scores(self, name: str, index: NDArray[np.void]) -> NDArray[np.float32]:
        """(edits,) a score of all edits."""
        if name in RESERVED:
            return np.asarray(index["score"], np.float32)
        if self.mirror is not None:
            _mirror_scores(self.mirror, name, np.unique(index["shard"]).tolist())
        return Scores.open(self.path, name).values(index)

    def _offered(self, rejected: Collection[EditName]) -> "EditStore":
        """The store without edits that its rules do not want any more, and without those that people rejected."""
        if not rejected and not self._header.rules:
            return self
        index, wanted = self.index, self._header.wanted(self.catalog.classes)
        mask = wanted[self.catalog.labels[index["original"]], index["prompt"]]
        mask &= ~rejected_by_hand(rejected, index, index["shard"], self.catalog, self.prompts)
        return self._only(mask)

    def _only(self, mask: NDArray[np.bool_]) -> "EditStore":
        """The store with the edits of a mask, (edits,)."""
        if mask.all():
            return self
        ends = np.concatenate([[0], np.cumsum(mask)]).astype(np.int64)
        return self._derived(self.catalog, self._at(np.flatnonzero(mask)), ends[self.starts])

    def _derived(self, catalog: Catalog, rows: NDArray[np.int64], starts: NDArray[np.int64]) -> "EditStore":
        """A store of these rows of the table, in the order of the catalog's originals, that shares the open shards."""
        derived = EditStore.__new__(EditStore)
        derived.__dict__.update(self.__dict__)
        derived.catalog, derived._rows, derived.starts, derived._base = catalog, rows, starts, self._base or self
        for array in (rows, starts):
            array.flags.writeable = False
        return derived


class OriginalStore:
    """Packed originals: image r is row r of the catalog. Finished, it never changes; it is pickled as its path.

    Shards are opened on first use.
    """

    path: Path  # the mirror's folder if the store is at a URL
    mirror: Mirror | None  # fetches the files of a store at a URL
    settings: Settings  # how the originals were packed
    catalog: Catalog  # the packed originals, with their packed sizes
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
        self._reindexed_by: Catalog | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "OriginalStore":
        """Open a packed store.

        Args:
            path: Its folder, or a URL as `str`.

        Raises:
            StoreError: There is no packed store, it is unfinished, a file is missing, cut short, or of a newer version.
            MirrorError: Its URL does not answer or refuses, or the disk is full (a StoreError).
            MissingDependencyError: A package that the URL needs is not installed.
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
        """Open the packed store at `path`; None if it is a folder of images, which no URL can be.

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

    def reindexed(self, catalog: Catalog) -> "OriginalStore":
        """These originals by the rows and labels of another catalog; they are paired by path.

        Originals that could not be decoded when the store was packed keep their rows of that catalog, and cannot be
        decoded here either. So this store gives the samples of the folder that it was packed from.

        Raises:
            StoreError: The catalog lists an original that is neither packed nor was left out, or none that is packed.
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
        reindexed = OriginalStore(
            self.path, self.settings, replace(catalog, sizes=sizes, _origin=None), index, self._tars
        )
        reindexed._reindexed_by = catalog
        return reindexed

    def __reduce__(self) -> tuple[Callable[..., "OriginalStore"], tuple[Any, ...]]:
        return _reopen_originals, (self.path if self.mirror is None else self.mirror.url, self._reindexed_by)

    def __len__(self) -> int:
        """The number of originals."""
        return len(self.index)

    def __repr__(self) -> str:
        return f"<OriginalStore {self._tars.where!r}: {len(self)} originals>"

    @property
    def raw(self) -> bool:
        """True if the originals are raw images: plain pixels, which need no decoding."""
        return is_raw(self.settings)

    def stretches(self, originals: NDArray[np.int64]) -> Stretches:
        """Where the pixels of these originals, (n,) of a raw store, lie. Raises MirrorError, see `extents`."""
        return self._without_left_out(self._tars.stretches(self.index, originals), originals)

    def places(self, originals: NDArray[np.int64]) -> "Places":
        """The same in the shards."""
        return self._without_left_out(self._tars.places(self.index, originals), originals)

    def _without_left_out(self, found: _Found, originals: NDArray[np.int64]) -> _Found:
        """Note the errors of originals that were left out."""
        for i in np.flatnonzero(self.index["shard"][originals] == _LEFT_OUT).tolist():
            found.errors[i] = self._not_packed(int(originals[i]))
        return found

    @property
    def raw_shards(self) -> "RawShards":
        """The shards of a raw store; the same object for all that this store was reindexed to."""
        return self._tars.raw

    def extents(self, originals: NDArray[np.int64]) -> list[Extent | DecodeError]:
        """The locations of the files of these originals, (n,), or the error if a shard is missing or was changed.

        An original that was left out when the store was packed is an error, too. For a store at a URL, waits for their
        shards, and has the rest fetched in the background.

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
            StoreError: The shard is missing, or was changed since the store was opened.
            DecodeError: The original was left out when the store was packed.
        """
        if self.index["shard"][original] == _LEFT_OUT:
            raise self._not_packed(original)
        return self._tars.encoded(self.index[original])

    def _not_packed(self, original: int) -> DecodeError:
        return DecodeError(
            f"{self._tars.where}: {self.catalog.path(original)!r} was left out when this store was packed, since it "
            "could not be decoded; repair it and pack the folder into a new store, or train without it."
        )


def _reopen_originals(path: str | Path, reindexed_by: Catalog | None) -> OriginalStore:
    store = OriginalStore.open(path)
    return store if reindexed_by is None else store.reindexed(reindexed_by)


def index_is_current(path: Path) -> bool:
    """True if a store's index, as readers see it, is that of its shards. Raises StoreError if it cannot be opened."""
    kind = _kind_of(path)
    store = OriginalStore.open(path) if kind is ORIGINALS else EditStore.open(path)
    records = {shard.number: ShardRecord.read(kind, path, shard.number) for shard in shard_records(path)[0]}
    if isinstance(store, OriginalStore):
        listed = open_catalog(path, ORIGINALS.listing)
        return bool(np.array_equal(store.index, gather(kind, records, len(listed))))
    header, originals = Header.read(path), len(store.catalog)
    found, _ = _open_index(path, header, originals, store.shards, None)
    index = EditIndex.derive(records, header, originals)
    same = len(found.rows) == len(index.rows) and all(
        np.array_equal(found.rows[name], index.rows[name], equal_nan=name == "score") for name in INDEX_ROW.names or ()
    )
    return same and bool(np.array_equal(found.starts, index.starts))


def order_problems(path: Path) -> Iterator[tuple[str, str]]:
    """The orders of a store whose file cannot be used: the file, relative to the store, and what is wrong."""
    if _kind_of(path) is EDITS:
        for order in Header.read(path).orders:
            try:
                order.table(path)
            except StoreError as error:
                yield order.file, str(error)


def kind_at(path: str | os.PathLike[str]) -> Kind | None:
    """The kind of the store in a local folder; None if there is no store that can be read."""
    if is_url(path) or not (Path(path) / "store.json").exists():
        return None
    try:
        return _kind_of(Path(path))
    except StoreError:
        return None


def check_order(root: str | os.PathLike[str], store: str | os.PathLike[str]) -> None:
    """Raise ConfigError if the first folder is a store and the second one holds images, which is the wrong order."""
    kind = kind_at(root)
    if kind is not None and not is_url(store) and not (Path(store) / "store.json").exists() and holds_images(store):
        error = ConfigError(
            f"{str(root)!r} is {kind.a_name}, {str(store)!r} is a folder of images: are the two arguments swapped?"
        )
        error.instead = {str(root): str(store), str(store): str(root)}
        raise error


def shard_records(path: Path) -> tuple[list[ShardRecord | DamagedShard], int]:
    """The finished shards of a store of either kind, by number, and the number of all. Raises StoreError."""
    kind = _kind_of(path)
    header = OriginalHeader.read(path) if kind is ORIGINALS else Header.read(path)
    header.check(path, len(open_catalog(path, kind.listing)))
    listing = list_shards(path)
    shards: list[ShardRecord | DamagedShard] = []
    for number in range(header.shard_count):
        if (json := kind.file(number, "json")) in listing:
            try:
                shards.append(ShardRecord.read(kind, path, number))
            except StoreError as error:
                shards.append(DamagedShard(number=number, json=path / "shards" / json, error=str(error)))
    return shards, header.shard_count


def _kind_of(path: Path) -> Kind:
    """The kind of a store. Raises StoreError if it is neither."""
    try:
        with stored_header(ORIGINALS, path):
            return ORIGINALS
    except StoreError:
        with stored_header(EDITS, path):
            return EDITS


def _open_index(
    path: Path, header: Header, originals: int, shards: Sequence[int], mirror: Mirror | None
) -> tuple[EditIndex, bool]:
    """The index of these shards; False if it is not the store's own, but was derived here."""
    if (index := EditIndex.open(path, originals, shards)) is not None:
        return index, True
    if mirror is not None:
        mirror.copy_tables([EDITS.shard(number) for number in shards])
    records = {number: ShardRecord.read(EDITS, path, number) for number in shards}
    return EditIndex.derive(records, header, originals), False


def _restored(base: EditStore, catalog: Catalog, rows: NDArray[np.int64], starts: NDArray[np.int64]) -> EditStore:
    return base._derived(catalog, rows, starts)


def _reopen(path: Path, catalog: Catalog, sizes: Sizes) -> EditStore:
    """Open a store with the shards of these sizes, whatever was added since."""
    header = Header.read(path)
    index, _ = _open_index(path, header, len(catalog), tuple(sizes), None)
    _check_unchanged(str(path), index.sizes, sizes)
    return EditStore(path, header, catalog, index, None)


def _reopen_mirrored(url: str, fingerprint: str, sizes: Sizes) -> EditStore:
    """Open a store at a URL with the shards of these sizes, perhaps on another machine."""
    with _reached(EDITS, url) as (path, mirror):
        header, catalog = Header.read(path), open_catalog(path)
        if catalog.fingerprint != fingerprint:
            raise StoreError(
                f"{url}: the store was replaced by one of other originals while another process was using it; build "
                "the dataset again."
            )
        index, _ = _open_index(path, header, len(catalog), tuple(sizes), mirror)
        _check_unchanged(url, index.sizes, sizes)
        return EditStore(path, header, catalog, index, mirror)


def _check_unchanged(where: str, found: Sizes, sizes: Sizes) -> None:
    """Raise StoreError if a shard has other edits now: rows of the index would be those of other originals."""
    if changed := [number for number in sizes if found[number] != sizes[number]]:
        raise StoreError(
            f"{where}: shard {changed[0]} has other edits than when this process's dataset was built, since "
            "`dali-diffusemix generate` has gone on with it; build the dataset again."
        )


class Places(NamedTuple):
    """Where the pixels of n raw images of a store lie."""

    shards: NDArray[np.int64]  # (n,) numbers; -1: the image is not there
    offsets: NDArray[np.int64]  # (n,) of the first pixel in the shard's tar, bytes
    errors: dict[int, DecodeError]  # by image: what is wrong with the index


class RawShards:
    """The shards of a raw store, to be read as a whole: one after another, by number."""

    def __init__(self, tars: "_Tars", kind: Kind, hashes: Mapping[int, str]) -> None:
        """Use `EditStore.raw_shards` and `OriginalStore.raw_shards`."""
        self._tars, self._kind, self._hashes = tars, kind, hashes
        self.where = repr(tars.where)
        self.sizes = {number: size for number, (size, *_) in sorted(tars.sizes.items())}  # bytes of each
        ends = itertools.accumulate(self.sizes.values(), initial=0)
        self.starts = dict(zip(self.sizes, ends, strict=False))  # where each begins
        self.bytes = sum(self.sizes.values())

    @property
    def key(self) -> str:
        """Identifies their content."""
        return hashlib.sha256("".join(self._hashes[number] for number in self.sizes).encode()).hexdigest()

    def open(self, number: int) -> OpenFile:
        """A shard's tar. Raises StoreError if it is missing; MirrorError if it cannot be fetched."""
        return self._tars.open(number)

    def sha256(self, number: int) -> str:
        """That of a shard's tar."""
        return self._hashes[number]

    def damaged(self, number: int, what: str) -> StoreError:
        """The error for a damaged shard."""
        name = self._kind.file(number, "tar")
        return StoreError(f"{self._tars.where}/shards/{name}: {what}; {remedy(self._kind)}.")


class _Tars:
    """The tars of a store's shards, opened, or fetched by the mirror, on first use."""

    def __init__(self, kind: Kind, store: Path, sizes: Sizes, mirror: Mirror | None) -> None:
        self.where = str(store) if mirror is None else mirror.url
        self.mirror = mirror
        self._kind = kind
        self._store = store
        self.sizes = sizes
        self._open = lru_cache(_OPEN_SHARDS)(lambda number: open_tar(kind, store, number, sizes[number][0]))
        self._map = lru_cache(_OPEN_SHARDS)(lambda number: map_tar(kind, store, number, sizes[number][0]))
        if mirror is not None:
            mirror.expect({kind.shard(number): of_shard[0] for number, of_shard in sizes.items()})

    def extents(self, rows: NDArray[np.void]) -> list[Extent | DecodeError]:
        """The locations of the files of these rows, (n,) of the index, or what is wrong with their shard."""
        tar: Callable[[int], OpenFile] = self._open
        if self.mirror is not None:
            tar = self._fetched
            known = [number for number in np.unique(rows["shard"]).tolist() if number in self.sizes]
            self.mirror.prefetch([self._kind.shard(number) for number in known])
        extents: list[Extent | DecodeError] = []
        for number, offset, length in zip(
            rows["shard"].tolist(), rows["offset"].tolist(), rows["length"].tolist(), strict=True
        ):
            try:
                self._check(number, offset, length)
                extents.append(Extent(tar(number), offset, length))
            except MirrorError:
                raise  # not an error of the shard, so nothing can replace it
            except StoreError as error:
                extents.append(DecodeError(str(error)))
        return extents

    def places(self, index: NDArray[np.void], images: NDArray[np.int64]) -> "Places":
        """Where the pixels of raw images, (n,) rows of the index, lie; the index may be damaged."""
        # Column by column: of a row, which is more than a cache line, nothing else is touched.
        shards, offsets, lengths, height, width = (
            index[name][images].astype(np.int64) for name in ("shard", "offset", "length", "height", "width")
        )
        header = lengths - 3 * height * width
        known = (shards >= 0) & (shards < len(self._ends))
        ends = self._ends[np.where(known, shards, 0)]
        wrong = (
            ~known | (offsets < 0) | (header < RAW_HEADER[0]) | (header > RAW_HEADER[1]) | (offsets + lengths > ends)
        )
        errors = {
            i: DecodeError(str(self._damaged(int(shards[i]), int(offsets[i]), int(lengths[i]))))
            for i in np.flatnonzero(wrong & (shards != _LEFT_OUT)).tolist()
        }
        return Places(np.where(wrong, -1, shards), offsets + header, errors)

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """(shards,) bytes of the tar of each; 0 for those that are not there."""
        ends = np.zeros(max(self.sizes, default=0) + 1, dtype=np.int64)
        ends[list(self.sizes)] = [size for size, *_ in self.sizes.values()]
        return ends

    def stretches(self, index: NDArray[np.void], images: NDArray[np.int64]) -> Stretches:
        """The same in open files; an error also for those whose shard cannot be opened."""
        places = self.places(index, images)
        found = Stretches(np.full(len(images), -1, dtype=np.int32), places.offsets, places.errors)
        shards = np.unique(places.shards).tolist()
        if self.mirror is not None:
            self.mirror.prefetch([self._kind.shard(number) for number in shards if number >= 0])
        for number in shards:
            if number < 0:
                continue
            here = places.shards == number
            try:
                file = self.open(number)
            except MirrorError:
                raise  # not an error of the shard, so nothing can replace it
            except StoreError as error:
                found.errors |= dict.fromkeys(np.flatnonzero(here).tolist(), DecodeError(str(error)))
                continue
            found.files[here] = file.descriptor
            found.owners.append(file)
        return found

    def open(self, number: int) -> OpenFile:
        """A shard's tar. Raises StoreError; MirrorError if it cannot be fetched."""
        return self._open(number) if self.mirror is None else self._fetched(number)

    @cached_property
    def raw(self) -> "RawShards":
        """The shards of a raw store."""
        if self.mirror is not None:
            self.mirror.copy_tables([self._kind.shard(number) for number in self.sizes])
        records = {number: ShardRecord.read(self._kind, self._store, number) for number in self.sizes}
        return RawShards(self, self._kind, {number: record.hashes["tar"] for number, record in records.items()})

    def encoded(self, row: np.void) -> NDArray[np.uint8]:
        """The file of a row of the index, (bytes,) uint8, read-only."""
        number, offset, length = int(row["shard"]), int(row["offset"]), int(row["length"])
        self._check(number, offset, length)
        if self.mirror is None:
            return self._map(number)[offset : offset + length]
        # Not mapped, so that the mirror can release the tar.
        return np.frombuffer(os.pread(self._fetched(number).descriptor, length, offset), np.uint8)

    def _check(self, number: int, offset: int, length: int) -> None:
        """Raise StoreError if a row of a damaged index lies in no shard."""
        if number not in self.sizes or not (offset >= 0 and 0 < length <= self.sizes[number][0] - offset):
            raise self._damaged(number, offset, length)

    def _damaged(self, number: int, offset: int, length: int) -> StoreError:
        return StoreError(
            f"{self.where}/index.npy: is damaged: a row has shard {number}, offset {offset}, length {length}; run "
            f"`{self._kind.command}` again to replace it."
        )

    def _fetched(self, number: int) -> OpenFile:
        assert self.mirror is not None
        return self.mirror.open(self._kind.shard(number))


def _check_sizes(kind: Kind, store: Path, sizes: Sizes, listing: Mapping[str, int], mirror: Mirror | None) -> None:
    advice = remedy(kind) if mirror is None else "upload the store again, all of it"
    for number, of_shard in sizes.items():
        for ending, size in zip(FILES, of_shard, strict=True):
            name = kind.file(number, ending)
            file = repr(str(store / "shards" / name)) if mirror is None else f"{mirror.url}/shards/{name}"
            check_size(file, size, listing.get(name), advice)


@contextmanager
def _reached(kind: Kind, path: str | os.PathLike[str]) -> Iterator[tuple[Path, Mirror | None]]:
    """Yield a store's folder; for a store at a URL its mirror and the mirror's folder, which has the small files."""
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
            if kind is EDITS:
                mirror.refresh_beside(DECISIONS_ENDING)
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


def _mirror_scores(mirror: Mirror, name: str, shards: Sequence[int]) -> None:
    """Fetch a column of scores of these shards, as far as the source has it."""
    check_name(name)
    folder = f"scores/{name}"
    (mirror.folder / folder).mkdir(parents=True, exist_ok=True)
    mirror.copy_tables([EDITS.shard(shard) for shard in shards])

    def fetch(shard: int) -> None:
        json_file, npy = (f"{folder}/{EDITS.file(shard, ending)}" for ending in ("json", "npy"))
        with suppress(FileNotFoundError):
            data = mirror.refresh(json_file, vouches_for=[npy])
            with understood(mirror.folder / json_file, "upload the scores again"):
                sha256 = str(json.loads(data)["npy"]["sha256"])
            mirror.copy(npy, sha256)

    with suppress(FileNotFoundError), Workers(_SCORE_THREADS, "dali-diffusemix-scores") as threads:
        mirror.refresh(f"{folder}/column.json")
        list(threads.map(fetch, shards))


def _list_mirrored(kind: Kind, mirror: Mirror) -> dict[str, int]:
    """Name to size of the files in the shards' folder at the URL; from index.json if the server cannot list them."""
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
