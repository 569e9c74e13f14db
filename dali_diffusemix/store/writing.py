"""Writing stores: by processes that may be killed at any moment, and more than one that may want to."""

import hashlib
import logging
import math
import os
import tarfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote_from_bytes

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.catalog import Catalog, Rejected
from dali_diffusemix.errors import StoreError
from dali_diffusemix.remote import is_url
from dali_diffusemix.store.layout import (
    EDITS,
    FILES,
    INDEX,
    MOST,
    ORIGINALS,
    SHARD,
    VERDICTS,
    Header,
    Kind,
    OriginalHeader,
    Record,
    Settings,
    Shard,
    ShardRecord,
    replacing,
    stored_header,
    write_data,
    write_json,
    write_table,
    writing,
)
from dali_diffusemix.store.reading import check_originals, derive, gather, list_shards, open_catalog

_log = logging.getLogger(__name__)


class StoreWriter:
    """The one run that may add to a store at a time: orders work, says which shards are missing, derives the index."""

    path: Path
    catalog: Catalog  # the store's own, whose rows shards name
    _header: Header

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
        with _begun(EDITS, path, catalog) as listed:
            writer = cls()
            writer.path = path
            writer.catalog = listed
            if (path / "store.json").exists():
                writer._header = Header.read(path)
            else:
                writer._header = Header(settings=settings, prompts=(), segments=(), fingerprint=catalog.fingerprint)
            _check_settings(path, writer._header.settings, settings)
            yield writer

    def order(self, prompts: Sequence[str], variants: int, originals_per_shard: int) -> None:
        """Ask for the first `variants` variants of every original under every prompt; what was asked before stays."""
        header = self._header.extended(prompts, variants, len(self.catalog), originals_per_shard)
        if len(header.prompts) > MOST or variants > MOST:
            raise StoreError(
                f"{str(self.path)!r}: a store has at most {MOST} prompts and variants, "
                f"found {len(header.prompts)} and {variants}."
            )
        if header != self._header or not (self.path / "store.json").exists():
            with writing(self.path):
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
        finished = _finished_shards(EDITS, self.path, self._header.shard_count)
        return {number: record.verdicts for number, record in finished.items()}

    def finish(self) -> None:
        """Derive the index of the whole store from its shards."""
        records = _finished_shards(EDITS, self.path, self._header.shard_count)
        tables = derive(self.path, records, len(self.catalog))
        with writing(self.path):
            # Without its record the index is not used: no reader takes half of the old one and half of the new.
            (self.path / "index.json").unlink(missing_ok=True)
            files = {
                name: write_table(self.path / name, table)
                for name, table in zip(EDITS.tables, (tables.index, tables.starts), strict=True)
            }
            Record(edits=len(tables.index), originals=len(self.catalog), sizes=tables.sizes).write(self.path, files)


def _local_folder(path: str | os.PathLike[str]) -> Path:
    if is_url(path):
        raise StoreError(f"{path}: a store is written to a folder, found a URL; give a folder, and upload it then.")
    return Path(path).absolute()


class OriginalStoreWriter:
    """The one run that may add to a packed store at a time."""

    path: Path
    catalog: Catalog  # what is listed; the shards name its rows
    _header: OriginalHeader

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
        with _begun(ORIGINALS, path, catalog) as listed:
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
            _check_settings(path, writer._header.settings, settings)
            yield writer

    def shards(self) -> dict[int, range]:
        """All shards: number to rows of the catalog."""
        return {number: self._header.rows(number) for number in range(self._header.shard_count)}

    def done(self) -> dict[int, Counter[str]]:
        """Finished shards, and how many of their originals had which verdict; see `StoreWriter.done`."""
        finished = _finished_shards(ORIGINALS, self.path, self._header.shard_count)
        return {number: record.verdicts for number, record in finished.items()}

    def finish(self, left_out: str) -> None:
        """Derive the catalog and the index of the whole store from its shards, which must all be there.

        Args:
            left_out: Why the catalog rejects an original that was not accepted.

        Raises:
            StoreError: No original was accepted, or the folder cannot be written.
        """
        records = _finished_shards(ORIGINALS, self.path, self._header.shard_count)
        index = gather(ORIGINALS, self.path, records, len(self.catalog))
        if not len(index):
            raise StoreError(
                f"{str(self.path)!r}: none of the {len(self.catalog)} originals could be packed; give a folder of "
                "images that can be decoded, and a new store."
            )
        catalog = self._packed(index, left_out)
        with writing(self.path):
            # Without its record the store is unfinished: no reader takes half of the old one and half of the new.
            (self.path / "index.json").unlink(missing_ok=True)
            catalog.save(self.path / "catalog")
            content = {
                "fingerprint": catalog.fingerprint,
                "files": {"index.npy": write_table(self.path / "index.npy", index)},
                "shards": [[number, *record.sizes] for number, record in records.items()],
            }
            write_json(self.path / "index.json", INDEX, content)

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
def _begun(kind: Kind, path: Path, catalog: Catalog) -> Iterator[Catalog]:
    """Hold the lock of a store, a new one if there is none, and give the catalog whose rows its shards name."""
    with writing(path):
        if (path / "store.json").exists():
            with stored_header(kind, path):
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
        with writing(path):
            for folder in (path, path / "catalog", path / kind.listing, path / "shards"):
                for leftover in folder.glob(".*.tmp"):
                    leftover.unlink()
            if not (path / "store.json").exists():
                catalog.save(path / kind.listing)
        listed = open_catalog(path, kind.listing)
        check_originals(path, listed, catalog, kind.listing)
        yield listed


def _finished_shards(kind: Kind, path: Path, count: int) -> dict[int, ShardRecord]:
    """Of this many shards those that are there, by number. One whose files have other sizes is not."""
    listing = list_shards(path)
    finished = {}
    for number in range(count):
        if kind.file(number, "json") not in listing:
            continue
        record = ShardRecord.read(kind, path, number)
        if tuple(listing.get(kind.file(number, ending)) for ending in FILES) == record.sizes:
            finished[number] = record
        else:
            _log.warning("Shard %d of %r is damaged and will be made anew.", number, str(path))
    return finished


class _ShardFiles(ABC):
    """Writes the files of one shard: all of them, at the end of the `with` block, or after an error nothing."""

    def __init__(self, kind: Kind, store: Path, catalog: Catalog, number: int, length: int) -> None:
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
        with writing(self._folder), ExitStack() as stack:
            self._tar = stack.enter_context(replacing(self._folder / self._kind.file(self._number, "tar")))
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
        with writing(self._folder):
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
            files["idx"] = write_data(idx, "\n".join(lines).encode("ascii"))
            files["npy"] = write_table(npy, np.array(self._rows, self._kind.shard_row))
            content = {
                "shard": self._number,
                **self._content(),
                "files": files,
                "verdicts": {name: self._verdicts[name] for name in VERDICTS},
            }
            write_json(self._folder / self._kind.file(self._number, "json"), SHARD, content)

    def _write(self, data: bytes) -> None:
        with writing(self._folder):
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
        super().__init__(EDITS, store, catalog, shard.number, len(shard))
        self._header = Header.read(store)
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
        self._header = OriginalHeader.read(store)
        self.rows = self._header.rows(number)
        super().__init__(ORIGINALS, store, catalog, number, len(self.rows))

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


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. The system lets go of it when the process ends, however that comes about."""
    import fcntl  # not on every system, and only writers need it

    with writing(folder), ExitStack() as stack:
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
