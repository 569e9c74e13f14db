"""Writers of stores: they order work, tell what is missing and derive the index; any of several runs may be killed."""

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.base.files import locked, remove_temporary
from dali_diffusemix.catalog.headers import Rejected
from dali_diffusemix.catalog.table import Catalog
from dali_diffusemix.errors import ConfigError, StoreError
from dali_diffusemix.store.catalogs import check_originals, grown_catalog, open_catalog
from dali_diffusemix.store.index import EditIndex, IndexRecord, gather, tally
from dali_diffusemix.store.layout import (
    EDITS,
    INDEX,
    MOST,
    NOT_YET,
    ORDERS,
    ORIGINALS,
    REJECTED,
    VERDICTS,
    WHOLE,
    EditOrder,
    Header,
    Kind,
    OriginalHeader,
    Part,
    Rule,
    Settings,
    Shard,
    stored_header,
    write_json,
    write_table,
    writing,
)
from dali_diffusemix.store.mirror import is_url
from dali_diffusemix.store.ordering import Redo, Wish, ordered
from dali_diffusemix.store.shards import finished_shards

# Settings that a run may change in a store: they decide how often an edit is tried, and each edit keeps its seed.
_MAY_DIFFER: Final = ("retry",)


class StoreWriter:
    """The only run that may add to a part of an edit store: orders work, tells what is missing, derives the index."""

    path: Path
    catalog: Catalog  # the store's own; shards name its rows
    _header: Header
    _part: Part
    _lock: "_StoreLock"

    @classmethod
    @contextmanager
    def open(
        cls, path: str | os.PathLike[str], catalog: Catalog, settings: Settings, part: Part = WHOLE
    ) -> Iterator["StoreWriter"]:
        """Open a store for writing, or begin one; during the block no other run can write to the same part.

        Args:
            path: The store's folder, which may exist and be empty.
            catalog: The originals: those of the store and any number of new ones, which get the rows after them.
            settings: All that decides an edit besides its original, prompt and variant.
            part: The shards that this run makes, if several runs share the work.

        Raises:
            StoreError: Another run is writing to this part, the store is of other originals or settings, of a newer
                version, or the folder is something else or cannot be written.
        """
        path = _local_folder(path)
        with _locked(EDITS, path, part) as lock:
            writer = cls()
            writer.path, writer._part, writer._lock = path, part, lock
            with lock.ordering():
                _begin(EDITS, path, catalog, alone=part == WHOLE)
                if (header := Header.find(path)) is not None:
                    writer._header = header
                    if part != WHOLE or not _is_without_edits(path):
                        _check_settings(path, writer._header.settings, settings, may_differ=_MAY_DIFFER)
                    writer._grow(catalog, settings)
                else:
                    writer._header = Header(
                        settings=settings, prompts=(), segments=(), rules={}, fingerprint=catalog.fingerprint
                    )
                writer.catalog = open_catalog(path)
                writer._header.check(path, len(writer.catalog))
            yield writer

    def _grow(self, catalog: Catalog, settings: Settings) -> None:
        """Take these settings, and add new originals to the end of the store's catalog."""
        path, ours = self.path, open_catalog(self.path)
        header = replace(self._header, settings=settings)
        if ours.fingerprint not in (header.fingerprint, header.growing):
            raise StoreError(
                f"{str(path)!r}: store.json is of originals with fingerprint {header.fingerprint[:16]}, but its "
                f"catalog has {ours.fingerprint[:16]}; bring back the catalog that the store was made with."
            )
        if header.growing is not None:  # a run was stopped here
            header = replace(header, fingerprint=ours.fingerprint, growing=None)
        grown = grown_catalog(path, ours, catalog)
        with writing(path):
            if grown is not ours:
                replace(header, growing=grown.fingerprint).write(path)
                grown.save(path / EDITS.listing)
                header = replace(header, fingerprint=grown.fingerprint)
            if header != self._header:
                header.write(path)
        self._header = header

    def order(self, wish: Wish, *, redo: Redo | None = None) -> None:
        """Order the edits that a run wishes; earlier orders stay.

        Ordered are the wished variants of every original under every wished prompt, where its rule applies, and edits
        that were denied and are wanted now.

        Args:
            wish: The edits.
            redo: Edits to make again; see `ordering.ordered`.

        Raises:
            StoreError: Class names differ from the store's, there are too many prompts, or a file is damaged.
        """
        with self._lock.ordering():
            before = Header.find(self.path) or self._header
            header, table = ordered(before, wish, redo, self.path, self.catalog)
            if len(header.prompts) > MOST or wish.variants > MOST:
                raise StoreError(
                    f"{str(self.path)!r}: a store has at most {MOST} prompts and variants, "
                    f"found {len(header.prompts)} and {wish.variants}."
                )
            with writing(self.path):
                if len(table):
                    header.orders[-1].write_file(self.path, table)  # before store.json, which names it
                if header != before or not (self.path / "store.json").exists():
                    header.write(self.path)
            self._header = header

    @staticmethod
    def outstanding(
        path: Path, catalog: Catalog, settings: Settings, wish: Wish, *, redo: Redo | None = None, part: Part = WHOLE
    ) -> int:
        """The number of edits that a run with this wish would make; nothing is written. Raises like `open`, `order`."""
        if (header := Header.find(path)) is not None:
            if part != WHOLE or not _is_without_edits(path):
                _check_settings(path, header.settings, settings, may_differ=_MAY_DIFFER)
            catalog = grown_catalog(path, open_catalog(path), catalog)
        else:
            _check_folder(EDITS, path)
            header = Header(settings=settings, prompts=(), segments=(), rules={}, fingerprint=catalog.fingerprint)
        header, table = ordered(header, wish, redo, path, catalog)
        wanted = header.wanted(catalog.classes)
        closed = finished_shards(EDITS, path, header.shard_count)
        count = 0
        for segment in header.segments:
            new = len(table) > 0 and segment is header.segments[-1]
            if isinstance(segment, EditOrder):
                rows = table if new else segment.table(path)
                each = wanted[catalog.labels[rows["original"]], rows["prompt"]]
                places = np.unique(rows["original"], return_inverse=True)[1]
                edits = np.bincount(places, each, segment.originals).astype(np.int64)
            else:
                labels = catalog.labels[segment.rows.start : segment.rows.stop]
                edits = wanted[:, list(segment.prompts)].sum(axis=1)[labels] * len(segment.variants)
            for number in segment.numbers(part):
                first = (number - segment.first_shard) * segment.originals_per_shard
                if number not in closed:
                    count += int(edits[first : first + segment.originals_per_shard].sum())
                elif closed[number].verdicts[NOT_YET]:
                    rows = closed[number].checked_rows(len(catalog), len(header.prompts))
                    rows = rows[rows["verdict"] == VERDICTS.index(NOT_YET)]
                    count += int(wanted[catalog.labels[rows["original"]], rows["prompt"]].sum())
        return count

    def order_as(self, other: Path) -> None:
        """Order what another store has ordered, in the same shards. Raises StoreError unless earlier orders agree."""
        theirs = Header.read(other)
        with self._lock.ordering():
            ours = self._header
            if (
                theirs.segments[: len(ours.segments)] != ours.segments
                or theirs.prompts[: len(ours.prompts)] != ours.prompts
            ):
                raise StoreError(
                    f"{str(self.path)!r}: its edits were ordered otherwise than those of the store to pack; give a new "
                    "folder."
                )
            self._header = replace(theirs, settings=ours.settings, fingerprint=ours.fingerprint, growing=ours.growing)
            with writing(self.path):
                for order in theirs.orders:
                    order.write_file(self.path, order.table(other))
                if self._header != ours or not (self.path / "store.json").exists():
                    self._header.write(self.path)

    @property
    def prompts(self) -> tuple[str, ...]:
        """All prompts ordered so far; shards name them by index."""
        return self._header.prompts

    @property
    def rules(self) -> Mapping[str, Rule]:
        """Prompt to the classes that it is applied to, where these are not all."""
        return self._header.rules

    @property
    def class_names(self) -> Mapping[str, str]:
        """Class to its words in an instruction, where given."""
        return self._header.class_names

    @property
    def shard_count(self) -> int:
        """The number of shards ordered so far, of every part."""
        return self._header.shard_count

    def shards(self) -> list[Shard]:
        """The shards of this part ordered so far, by number."""
        return self._shards(self._header)

    def _shards(self, header: Header) -> list[Shard]:
        mine = {number for segment in header.segments for number in segment.numbers(self._part)}
        return [shard for shard in header.shards(self.path) if shard.number in mine]

    def done(self) -> dict[int, Counter[str]]:
        """Finished shards with the count of each verdict; without those whose files have other sizes."""
        return {number: verdicts for number, verdicts in self._closed().items() if not verdicts[NOT_YET]}

    def begun(self) -> dict[int, Counter[str]]:
        """Shards that a stopped run made in part, with the count of each verdict so far."""
        return {
            number: Counter({name: count for name, count in verdicts.items() if name != NOT_YET})
            for number, verdicts in self._closed().items()
            if verdicts[NOT_YET]
        }

    def _closed(self) -> dict[int, Counter[str]]:
        finished = finished_shards(EDITS, self.path, self._header.shard_count)
        return {number: record.verdicts for number, record in finished.items()}

    def finish(self) -> NDArray[np.int64]:
        """Derive the index of the whole store from its shards.

        Returns:
            (classes, prompts, verdicts) the number of edits.
        """
        with self._lock.ordering():
            return self._finish()

    def _finish(self) -> NDArray[np.int64]:
        records = finished_shards(EDITS, self.path, self._header.shard_count)
        index = EditIndex.derive(records, self._header, len(self.catalog))
        with writing(self.path):
            # Without index.json readers do not use the tables, so none sees half of the old and half of the new.
            (self.path / "index.json").unlink(missing_ok=True)
            files = {
                name: write_table(self.path / name, table)
                for name, table in zip(EDITS.tables, (index.rows, index.starts), strict=True)
            }
            record = IndexRecord(
                edits=len(index.rows), originals=len(self.catalog), sizes=index.sizes, not_yet=index.not_yet
            )
            record.write(self.path, files)
        return tally(records, self._header, self.catalog)


def local_folders(root: str | os.PathLike[str], store: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The absolute folders of originals and of the store to make of them.

    Raises ConfigError if one of them is a URL, or the store lies inside the root.
    """
    source, target = local_folder("root", root), local_folder("store", store)
    check_outside(source, target)
    return source, target


def local_folder(name: str, given: str | os.PathLike[str]) -> Path:
    """The absolute folder. Raises ConfigError if it is a URL."""
    if isinstance(given, str) and is_url(given):
        raise ConfigError(
            f"{name} must be a local folder, found {given!r}; work on a copy, and upload the store afterwards."
        )
    return Path(given).absolute()


def check_outside(root: Path, store: Path) -> None:
    """Raise ConfigError if a store lies inside the folder that it is made of."""
    if store.resolve().is_relative_to(root.resolve()):
        raise ConfigError(
            f"store must lie outside the root, where it would pass for a class; found {str(store)!r} in {str(root)!r}."
        )


def _local_folder(path: str | os.PathLike[str]) -> Path:
    if is_url(path):
        raise StoreError(
            f"{path}: a store is written to a folder, found a URL; give a folder, and upload it afterwards."
        )
    return Path(path).absolute()


# What stores say that were packed before reasons were kept.
_LEFT_OUT = "It could not be decoded when it was packed; copy it again or remove it."


class OriginalStoreWriter:
    """The only run that may add to a packed store."""

    path: Path
    catalog: Catalog  # of the packed folder; shards name its rows
    _header: OriginalHeader

    @classmethod
    @contextmanager
    def open(
        cls, path: str | os.PathLike[str], catalog: Catalog, settings: Settings, originals_per_shard: int
    ) -> Iterator["OriginalStoreWriter"]:
        """Open a packed store for writing, or begin one; during the block no other run can.

        Args:
            path: The store's folder, which may exist and be empty.
            catalog: The originals to pack.
            settings: How they are packed.
            originals_per_shard: Of a new store; an existing one keeps its own.

        Raises:
            StoreError: Another run is writing, the store is of other originals or settings, of a newer version, or
                the folder is something else or cannot be written.
        """
        path = _local_folder(path)
        with _locked(ORIGINALS, path, WHOLE):
            _begin(ORIGINALS, path, catalog, alone=True)
            listed = open_catalog(path, ORIGINALS.listing)
            check_originals(ORIGINALS, path, listed, catalog)
            writer = cls()
            writer.path = path
            writer.catalog = listed
            if not (path / "store.json").exists():
                header = OriginalHeader(
                    settings=settings, originals=len(listed), originals_per_shard=originals_per_shard
                )
                with writing(path):
                    header.write(path)
            writer._header = OriginalHeader.read(path)
            writer._header.check(path, len(listed))
            _check_settings(path, writer._header.settings, settings)
            yield writer

    def shards(self) -> dict[int, range]:
        """Number to rows of the catalog, of all shards."""
        return {number: self._header.rows(number) for number in range(self._header.shard_count)}

    def done(self) -> dict[int, Counter[str]]:
        """Finished shards with the count of each verdict; see `StoreWriter.done`."""
        finished = finished_shards(ORIGINALS, self.path, self._header.shard_count)
        return {number: record.verdicts for number, record in finished.items()}

    def finish(self) -> None:
        """Derive the catalog and the index of the store from its shards, which must all be finished.

        Raises:
            StoreError: No original was accepted, or the folder cannot be written.
        """
        records = finished_shards(ORIGINALS, self.path, self._header.shard_count)
        index = gather(ORIGINALS, records, len(self.catalog))
        if not len(index):
            raise StoreError(
                f"{str(self.path)!r}: none of the {len(self.catalog)} originals could be packed; give a folder of "
                "images that can be decoded, and a new store."
            )
        reasons = {row: reason for record in records.values() for row, reason in record.left_out.items()}
        catalog = self._packed(index, reasons)
        with writing(self.path):
            # Without index.json the store is unfinished, so no reader sees half of the old and half of the new.
            (self.path / "index.json").unlink(missing_ok=True)
            catalog.save(self.path / "catalog")
            content = {
                "fingerprint": catalog.fingerprint,
                "files": {"index.npy": write_table(self.path / "index.npy", index)},
                "shards": [[number, *record.indexed_sizes] for number, record in records.items()],
            }
            write_json(self.path / "index.json", INDEX, content)

    def _packed(self, index: NDArray[np.void], reasons: Mapping[int, str]) -> Catalog:
        """The catalog of the packed originals, in the index's order; `reasons`, by row, for those left out."""
        listed, rows = self.catalog, index["original"]
        sizes = np.stack([index["height"], index["width"]], axis=-1)
        rejected = np.setdiff1d(np.arange(len(listed)), rows).tolist()
        packed = Catalog.from_arrays(
            [listed.encoded_path(row) for row in rows.tolist()], listed.labels[rows], listed.classes, sizes
        )
        left_out = [Rejected(listed.path(row), reasons.get(row, _LEFT_OUT)) for row in rejected]
        return replace(packed, rejected=(*listed.rejected, *left_out))


def _check_folder(kind: Kind, path: Path) -> None:
    """Refuse a folder that is something else, before anything in it is touched."""
    with writing(path):
        # Listed first, for another run may begin the store at the same time: its store.json comes before its shards.
        entries = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
        has_shards = any((path / "shards").glob(f"{kind.images}-*"))
        if (path / "store.json").exists():
            with stored_header(kind, path):
                return  # a store of the other kind, or of another version, is refused
        if has_shards:
            raise StoreError(
                f"{str(path)!r}: has shards, but no store.json, which says what they are; bring back a copy of "
                "it, or give a new folder."
            )
        # A run that was killed at its very beginning leaves these, and temporary files.
        foreign = sorted(name for name in entries - {kind.listing, "shards"} if not name.startswith("."))
        if foreign:
            raise StoreError(
                f"{str(path)!r}: is no {kind.name}, but has other files in it ({foreign[0]!r}); "
                "give an empty or a new folder."
            )


def _begin(kind: Kind, path: Path, catalog: Catalog, *, alone: bool) -> None:
    """Remove temporary files of killed runs; list the originals of a new store."""
    with writing(path):
        # Those of shards may belong to another part at work; they are removed when their shard is made.
        of_shards = [path / "shards", path / REJECTED] if alone else []
        for folder in {path, path / "catalog", path / ORDERS, path / kind.listing, *of_shards}:
            remove_temporary(folder)
        if not (path / "store.json").exists():
            catalog.save(path / kind.listing)


def _is_without_edits(store: Path) -> bool:
    """True if no shard is there: a run that failed before its first edit binds no later one to its settings."""
    return not any((store / "shards").glob(f"{EDITS.images}-*.json"))


def _check_settings(store: Path, stored: Settings, asked: Settings, *, may_differ: Collection[str] = ()) -> None:
    names = [name for name in {**stored, **asked} if stored.get(name) != asked.get(name) and name not in may_differ]
    if names:
        differences = "".join(
            f"\n  {name}: {stored.get(name)!r} in the store, {asked.get(name)!r} asked for" for name in names
        )
        raise StoreError(
            f"{str(store)!r}: the store was made with other settings; keep its own, or give another folder:"
            f"{differences}"
        )


# Bytes of the lock file that are divided among the parts of a store; the file need not have them.
_BYTES = 2**40


class _StoreLock:
    """A store's lock file: byte 0 is locked to change what all parts share, and a range of bytes for each part at work.

    The ranges of parts that may share shards overlap. The file says who holds them, for messages.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / ".lock"

    @contextmanager
    def ordering(self) -> Iterator[None]:
        """Wait until no other run changes what all parts share: store.json, the catalog, the index."""
        with ExitStack() as stack:
            with writing(self._folder):
                stack.enter_context(locked(self._file, range(1)))
            yield

    @contextmanager
    def held(self, part: Part) -> Iterator[None]:
        """Hold a part. Raises StoreError if another run holds one that overlaps."""
        share = part.share(_BYTES)
        with ExitStack() as stack:
            with writing(self._folder), self.ordering():
                if not stack.enter_context(locked(self._file, range(1 + share.start, 1 + share.stop), wait=False)):
                    holders = "; ".join(self._holders().values()) or "another process"
                    raise StoreError(
                        f"{str(self._folder)!r}: {holders} is writing to this store, part {part} of it or one that "
                        "overlaps; wait for it to end, or stop it."
                    )
                # Killed runs left their lines; if this one has the whole store, there are no others.
                others = {} if part == WHOLE else self._holders()
                self._note({**others, str(part): f"process {os.getpid()} on {os.uname().nodename} (part {part})"})
            try:
                yield
            finally:
                with suppress(OSError, StoreError), self.ordering():
                    self._note({name: line for name, line in self._holders().items() if name != str(part)})

    def _holders(self) -> dict[str, str]:
        """Part to the line of the run that works on it."""
        lines = self._file.read_text("ascii", "replace").splitlines()
        return {line.rpartition("(part ")[2].rstrip(")"): line for line in lines}

    def _note(self, holders: Mapping[str, str]) -> None:
        with suppress(OSError):  # a full disk; the lock is held all the same
            self._file.write_text("".join(f"{line}\n" for line in holders.values()), "ascii", "replace")


@contextmanager
def _locked(kind: Kind, folder: Path, part: Part) -> Iterator[_StoreLock]:
    """Hold a part of a store; its folder is made if it is missing."""
    _check_folder(kind, folder)
    with writing(folder):
        (folder / "shards").mkdir(parents=True, exist_ok=True)
    lock = _StoreLock(folder)
    with lock.held(part):
        yield lock
