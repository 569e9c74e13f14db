"""Writing stores: by processes that may be killed at any moment, and more than one that may want to."""

import hashlib
import logging
import math
import os
import struct
import tarfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self
from urllib.parse import quote_from_bytes

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.catalog.headers import Rejected
from dali_diffusemix.catalog.table import Catalog
from dali_diffusemix.errors import StoreError
from dali_diffusemix.images.reading import OpenFile
from dali_diffusemix.store.layout import (
    EDITS,
    FILES,
    INDEX,
    MOST,
    NOT_YET,
    ORIGINALS,
    REJECTED,
    SHARD,
    VERDICTS,
    WHOLE,
    Header,
    Kind,
    OriginalHeader,
    Part,
    Record,
    Settings,
    Shard,
    ShardRecord,
    file_size,
    load,
    rejected_tar,
    replacing,
    stored_header,
    write_data,
    write_json,
    write_table,
    writing,
)
from dali_diffusemix.store.mirror import is_url
from dali_diffusemix.store.readers import (
    check_originals,
    derive,
    gather,
    grown_catalog,
    list_shards,
    open_catalog,
    tally,
)

_log = logging.getLogger(__name__)


class StoreWriter:
    """The one run that may add to a part of a store: orders work, says what is missing, derives the index."""

    path: Path
    catalog: Catalog  # the store's own, whose rows shards name
    _header: Header
    _part: Part
    _lock: "_Lock"

    @classmethod
    @contextmanager
    def open(
        cls, path: str | os.PathLike[str], catalog: Catalog, settings: Settings, part: Part = WHOLE
    ) -> Iterator["StoreWriter"]:
        """Open a store for writing, or begin one; until the block ends no other run can write to the same part.

        Args:
            path: The store's folder; it may be there, empty.
            catalog: The originals: those of the store, and any number of new ones, which get rows after them.
            settings: What decides an edit besides its original, prompt and variant.
            part: Which shards this run makes, if others share the work.

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
                if (path / "store.json").exists():
                    writer._header = Header.read(path)
                    _check_settings(path, writer._header.settings, settings)
                    writer._grow(catalog)
                else:
                    writer._header = Header(
                        settings=settings, prompts=(), segments=(), denied={}, fingerprint=catalog.fingerprint
                    )
                writer.catalog = open_catalog(path)
                writer._header.check(path, len(writer.catalog))
            yield writer

    def _grow(self, catalog: Catalog) -> None:
        """Take new originals into the store's catalog, after all others."""
        path, ours = self.path, open_catalog(self.path)
        header = self._header
        if ours.fingerprint not in (header.fingerprint, header.growing):
            raise StoreError(
                f"{str(path)!r}: store.json is of originals with fingerprint {header.fingerprint[:16]}, but its "
                f"catalog has {ours.fingerprint[:16]}; bring back the catalog that the store was made with."
            )
        if header.growing is not None:  # a run ended here
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

    def order(
        self,
        prompts: Sequence[str],
        variants: int,
        originals_per_shard: int,
        denied: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        """Ask for the first `variants` variants of every original under every prompt; what was asked before stays.

        Args:
            prompts: Without the template.
            variants: Edits of an original under one prompt.
            originals_per_shard: Of the shards that are ordered now.
            denied: Prompt to patterns (as file names have them) of the classes whose originals it is not for.

        Raises:
            StoreError: A prompt of the store is denied to other classes than before, or there are too many.
        """
        with self._lock.ordering():
            self._header = Header.read(self.path) if (self.path / "store.json").exists() else self._header
            for prompt in [one for one in self._header.prompts if one in prompts]:
                before, now = self._header.denied.get(prompt, ()), tuple(denied.get(prompt, ()))
                if before != now:
                    raise StoreError(
                        f"{str(self.path)!r}: the prompt {prompt!r} is denied to {list(before)} in the store, found "
                        f"{list(now)}; go on with the store's own, or give another folder."
                    )
            header = self._header.extended(prompts, variants, len(self.catalog), originals_per_shard, denied)
            if len(header.prompts) > MOST or variants > MOST:
                raise StoreError(
                    f"{str(self.path)!r}: a store has at most {MOST} prompts and variants, "
                    f"found {len(header.prompts)} and {variants}."
                )
            with writing(self.path):
                if header != self._header or not (self.path / "store.json").exists():
                    header.write(self.path)
            self._header = header

    @property
    def prompts(self) -> tuple[str, ...]:
        """All prompts ordered so far; a shard names them by their places in here."""
        return self._header.prompts

    @property
    def denied(self) -> Mapping[str, tuple[str, ...]]:
        """Prompt to patterns of the classes whose originals it is not for."""
        return self._header.denied

    @property
    def shard_count(self) -> int:
        """All shards ordered so far, of every part."""
        return self._header.shard_count

    def shards(self) -> list[Shard]:
        """The shards of this part ordered so far, by number."""
        return self._shards(self._header)

    def _shards(self, header: Header) -> list[Shard]:
        mine = {number for segment in header.segments for number in segment.numbers(self._part)}
        return [shard for shard in header.shards() if shard.number in mine]

    def done(self) -> dict[int, Counter[str]]:
        """Finished shards, and how many of their edits had which verdict. One whose files have other sizes is not."""
        return {number: verdicts for number, verdicts in self._closed().items() if not verdicts[NOT_YET]}

    def begun(self) -> dict[int, Counter[str]]:
        """Shards that a run made in part before it was stopped, with the verdicts that are there already."""
        return {
            number: Counter({name: count for name, count in verdicts.items() if name != NOT_YET})
            for number, verdicts in self._closed().items()
            if verdicts[NOT_YET]
        }

    def _closed(self) -> dict[int, Counter[str]]:
        finished = _finished_shards(EDITS, self.path, self._header.shard_count)
        return {number: record.verdicts for number, record in finished.items()}

    def finish(self) -> NDArray[np.int64]:
        """Derive the index of the whole store from its shards.

        Returns:
            (classes, prompts, verdicts) how many edits are there.
        """
        with self._lock.ordering():
            return self._finish()

    def _finish(self) -> NDArray[np.int64]:
        records = _finished_shards(EDITS, self.path, self._header.shard_count)
        tables = derive(self.path, records, len(self.catalog))
        with writing(self.path):
            # Without its record the index is not used: no reader takes half of the old one and half of the new.
            (self.path / "index.json").unlink(missing_ok=True)
            files = {
                name: write_table(self.path / name, table)
                for name, table in zip(EDITS.tables, (tables.index, tables.starts), strict=True)
            }
            record = Record(
                edits=len(tables.index), originals=len(self.catalog), sizes=tables.sizes, not_yet=tables.not_yet
            )
            record.write(self.path, files)
        return tally(self.path, records, self.catalog, len(self._header.prompts))


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


def _check_folder(kind: Kind, path: Path) -> None:
    """Refuse a folder that is something else, before anything of it is touched."""
    with writing(path):
        if (path / "store.json").exists():
            with stored_header(kind, path):
                return  # one of the other kind, or of another version, is refused
        if not path.is_dir():
            return
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


def _begin(kind: Kind, path: Path, catalog: Catalog, *, alone: bool) -> None:
    """Clear away what a run that was killed left of the store's own files; list the originals of a new store."""
    with writing(path):
        # Those of shards may be another part's, at work; each is cleared away when its shard is made.
        of_shards = [path / "shards", path / REJECTED] if alone else []
        for folder in {path, path / "catalog", path / kind.listing, *of_shards}:
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
        if not (path / "store.json").exists():
            catalog.save(path / kind.listing)


def _finished_shards(kind: Kind, path: Path, count: int) -> dict[int, ShardRecord]:
    """Of this many shards those that are there, by number. One whose files have other sizes is not."""
    listing = list_shards(path)
    finished = {}
    for number in range(count):
        if kind.file(number, "json") not in listing:
            continue
        record = ShardRecord.read(kind, path, number)
        whole = tuple(listing.get(kind.file(number, ending)) for ending in FILES) == record.sizes
        if whole and (record.rejected is None or file_size(rejected_tar(path, number)) == record.rejected):
            finished[number] = record
        else:
            _log.warning("Shard %d of %r is damaged and will be made anew.", number, str(path))
    return finished


class _Tar:
    """Writes a tar in place of another, whole or not at all."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.size = 0
        self._hash = hashlib.sha256()
        with writing(file.parent), ExitStack() as stack:
            file.parent.mkdir(exist_ok=True)
            self._stream = stack.enter_context(replacing(file))
            self._close = stack.pop_all()

    def add(self, name: str, data: bytes) -> int:
        """Write a file; return where it begins."""
        self._write(_member_header(name, len(data)))
        offset = self.size
        self._write(data + bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def finish(self) -> dict[str, Any]:
        """Put it in its place; return what a JSON file says of it."""
        with writing(self.file.parent), self._close:
            blocks = -(self.size + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE
            self._write(bytes(2 * tarfile.BLOCKSIZE + blocks))
        return {"bytes": self.size, "sha256": self._hash.hexdigest()}

    def give_up(self, error: BaseException) -> None:
        """Leave what was in its place."""
        with writing(self.file.parent):
            self._close.__exit__(type(error), error, error.__traceback__)

    def _write(self, data: bytes) -> None:
        with writing(self.file.parent):
            self._stream.write(data)
        self._hash.update(data)
        self.size += len(data)


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
        self._group_of = -1  # an original
        self._key_of: tuple[int, str] = (-1, "")  # an original and its key

    def __enter__(self) -> Self:
        with writing(self._folder):
            for folder in (self._folder, self._folder.with_name(REJECTED)):
                for leftover in folder.glob(f".{self._kind.shard(self._number)}.*.tmp"):
                    leftover.unlink(missing_ok=True)  # of a process that was killed
        self._tar = _Tar(self._folder / self._kind.file(self._number, "tar"))
        return self

    @abstractmethod
    def _content(self) -> dict[str, Any]:
        """What the .json says of the shard besides its number, files and verdicts."""

    def _other_files(self) -> dict[str, dict[str, Any]]:
        """Finish what other files there are; what the .json says of them."""
        return {}

    def _name(self, original: int, extension: str) -> str:
        """What a file of an original's group is called in a tar."""
        if original != self._key_of[0]:
            self._key_of = original, _key(self._catalog.encoded_path(original))
        return f"{self._key_of[1]}.{extension}"

    def _add_file(self, original: int, extension: str, data: bytes) -> int:
        """Write a file of an original's group; return where it begins. Those of one group must follow each other."""
        if original != self._group_of:
            self._group_of = original
            self._groups.append([])
        name = self._name(original, extension)
        offset = self._tar.add(name, data)
        self._groups[-1].append(f"{extension} {offset} {len(data)} {name}")
        return offset

    def _add_row(self, *row: object, verdict: str) -> None:
        self._rows.append(row)
        self._verdicts[verdict] += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and len(self._rows) != self._length:
            error = StoreError(f"shard {self._number} needs {self._length} {self._kind.images}, got {len(self._rows)}.")
            self._give_up(error)
            raise error
        if error is not None:
            self._give_up(error)
            return
        files = self._other_files()
        files["tar"] = self._tar.finish()
        with writing(self._folder):
            lines = [f"v1.2 {len(self._groups)}", *map(" ".join, self._groups), ""]
            idx, npy = (self._folder / self._kind.file(self._number, ending) for ending in ("idx", "npy"))
            files["idx"] = write_data(idx, "\n".join(lines).encode("ascii"))
            files["npy"] = write_table(npy, np.array(self._rows, self._kind.shard_row))
            content = {
                "shard": self._number,
                **self._content(),
                "files": files,
                "verdicts": {name: self._verdicts[name] for name in VERDICTS if self._verdicts[name]},
            }
            write_json(self._folder / self._kind.file(self._number, "json"), SHARD, content)

    def _give_up(self, error: BaseException) -> None:
        self._tar.give_up(error)


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
        self._rejected_file = rejected_tar(store, shard.number)
        self._rejected: _Tar | None = None

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
        """Write one edit; without `jpeg` its verdict alone. Edits of one original must follow each other.

        What was not accepted goes into a tar of its own, where no training looks.
        """
        offset = length = 0
        if jpeg is not None:
            extension = f"{self._header.slugs[prompt]}.{variant}.jpg"
            length = len(jpeg)
            if verdict == VERDICTS[0]:
                offset = self._add_file(original, extension, jpeg)
            else:
                self._rejected = self._rejected or _Tar(self._rejected_file)
                offset = self._rejected.add(self._name(original, extension), jpeg)
        code = VERDICTS.index(verdict)
        self._add_row(original, prompt, variant, seed, offset, length, height, width, code, score, verdict=verdict)

    def _other_files(self) -> dict[str, dict[str, Any]]:
        if self._rejected is not None:
            return {"rejected": self._rejected.finish()}
        with writing(self._folder):
            self._rejected_file.unlink(missing_ok=True)  # of an earlier try
        return {}

    def _give_up(self, error: BaseException) -> None:
        super()._give_up(error)
        if self._rejected is not None:
            self._rejected.give_up(error)

    def _content(self) -> dict[str, Any]:
        shard = self._shard
        return {
            "settings": dict(self._header.settings),
            "rows": [shard.rows.start, shard.rows.stop],
            "prompts": {place: self._header.prompts[place] for place in shard.prompts},
            "variants": [shard.variants.start, shard.variants.stop],
        }


class BegunShard:
    """What a run that was stopped made of a shard: the edits of its first originals, to be copied into the new one."""

    def __init__(self, rows: NDArray[np.void], tars: tuple[OpenFile, OpenFile | None]) -> None:
        """Use `BegunShard.find`."""
        self._rows = rows
        self._tars = tars
        self.originals = len(np.unique(rows["original"]))
        """How many originals are done."""

    @classmethod
    def find(cls, store: Path, shard: Shard) -> "BegunShard | None":
        """Whether there is one, whole and of this work; what is damaged is no use and is made anew."""
        try:
            record = ShardRecord.read(EDITS, store, shard.number)
            if not record.verdicts[NOT_YET] or record.verdicts.total() != len(shard):
                return None
            folder = store / "shards"
            rows = load(EDITS, folder / EDITS.file(shard.number, "npy"), EDITS.shard_row, len(shard))
            tar = OpenFile(folder / EDITS.file(shard.number, "tar"))
            rejected = None if record.rejected is None else OpenFile(rejected_tar(store, shard.number))
            for ending, file in (("tar", tar), ("rejected", rejected)):
                if file is not None and _sha256(file) != record.hashes[ending]:
                    return None
        except (StoreError, OSError, KeyError):
            return None
        made = rows[rows["verdict"] != VERDICTS.index(NOT_YET)]
        each = len(shard.prompts) * len(shard.variants)
        wanted = [
            (original, prompt, variant)
            for original in shard.rows[: len(made) // each]
            for prompt in shard.prompts
            for variant in shard.variants
        ]
        if list(zip(*(made[name].tolist() for name in ("original", "prompt", "variant")), strict=True)) != wanted:
            return None
        return cls(made, (tar, rejected))

    def copy(self, writer: ShardWriter) -> Counter[str]:
        """Add all of it to a writer; gives the verdicts."""
        verdicts: Counter[str] = Counter()
        for row in self._rows:
            verdict = VERDICTS[row["verdict"]]
            tar = self._tars[0 if verdict == VERDICTS[0] else 1]
            length = int(row["length"])
            writer.add(
                *(int(row[name]) for name in ("original", "prompt", "variant")),
                seed=int(row["seed"]),
                jpeg=os.pread(tar.descriptor, length, int(row["offset"])) if length and tar is not None else None,
                height=int(row["height"]),
                width=int(row["width"]),
                verdict=verdict,
                score=float(row["score"]),
            )
            verdicts[verdict] += 1
        return verdicts


def _sha256(file: OpenFile) -> str:
    with open(os.dup(file.descriptor), "rb") as stream:  # noqa: PTH123 - a descriptor
        stream.seek(0)
        return hashlib.file_digest(stream, "sha256").hexdigest()


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


_BYTES = 2**40  # of the lock file that stand for the parts of a store; it need not be that long


class _Lock:
    """A store's lock file: one byte for whoever changes what all share, and a stretch of bytes for each part.

    Stretches of parts that may share shards overlap. The system lets go of them when a process ends, however that comes
    about, and no clock is asked. Locks are of the open file, so two runs of one process exclude each other too.
    """

    def __init__(self, folder: Path, descriptor: int) -> None:
        self._folder = folder
        self._descriptor = descriptor

    @contextmanager
    def ordering(self) -> Iterator[None]:
        """Wait until no other run changes what all share: store.json, the catalog, the index."""
        import fcntl  # not on every system, and only writers need it

        with writing(self._folder):
            self._call(fcntl.F_OFD_SETLKW, fcntl.F_WRLCK, 0, 1)
        try:
            yield
        finally:
            self._call(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, 0, 1)

    @contextmanager
    def held(self, part: Part) -> Iterator[None]:
        """Hold a part. Raises StoreError if another run holds one that overlaps."""
        import fcntl

        share = part.stretch(_BYTES)
        with writing(self._folder), self.ordering():
            try:
                self._call(fcntl.F_OFD_SETLK, fcntl.F_WRLCK, 1 + share.start, len(share))
            except (BlockingIOError, PermissionError) as error:
                holders = "; ".join(self._holders().values()) or "another process"
                raise StoreError(
                    f"{str(self._folder)!r}: {holders} is writing to this store, part {part} of it or one that "
                    "overlaps; wait for it to end, or stop it."
                ) from error
            # A run that was killed left its line; whoever has the whole store knows that there is no other.
            others = {} if part == WHOLE else self._holders()
            self._note({**others, str(part): f"process {os.getpid()} on {os.uname().nodename} (part {part})"})
        try:
            yield
        finally:
            with suppress(OSError), self.ordering():
                self._note({name: line for name, line in self._holders().items() if name != str(part)})

    def _holders(self) -> dict[str, str]:
        """Part to who said that they work on it."""
        lines = os.pread(self._descriptor, 2**16, 0).decode("ascii", "replace").splitlines()
        return {line.rpartition("(part ")[2].rstrip(")"): line for line in lines}

    def _note(self, holders: Mapping[str, str]) -> None:
        with suppress(OSError):  # a full disk; the lock holds all the same
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, "".join(f"{line}\n" for line in holders.values()).encode("ascii", "replace"), 0)

    def _call(self, command: int, kind: int, start: int, length: int) -> None:
        import fcntl

        # struct flock: type, whence, start, length, process (of which such locks have none)
        fcntl.fcntl(self._descriptor, command, struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0))


@contextmanager
def _locked(kind: Kind, folder: Path, part: Part) -> Iterator[_Lock]:
    """Hold a part of a store, which is begun if it is not there."""
    _check_folder(kind, folder)
    with writing(folder), ExitStack() as stack:
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        stack.callback(os.close, descriptor)
        closing = stack.pop_all()
    lock = _Lock(folder, descriptor)
    with closing, lock.held(part):
        yield lock
