"""One shard: its four files, written whole or not at all, and checked when they are read."""

import hashlib
import itertools
import logging
import math
import mmap
import os
import tarfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote_from_bytes

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.base.files import file_size, remove_temporary, replacing
from dali_diffusemix.catalog.table import Catalog
from dali_diffusemix.errors import StoreError
from dali_diffusemix.images.codec import ENDINGS
from dali_diffusemix.images.reading import OpenFile
from dali_diffusemix.store.layout import (
    ACCEPTED,
    EDITS,
    FILES,
    NOT_YET,
    ORIGINALS,
    REJECTED,
    SHARD,
    UNREADABLE,
    VERDICTS,
    Header,
    Kind,
    OriginalHeader,
    Shard,
    load,
    read_json,
    rejected_tar,
    understood,
    write_data,
    write_json,
    write_table,
    writing,
)

_log = logging.getLogger(__name__)

# Names that two verdicts had until version 0.1: shards keep the names that they were written with.
_FORMER = {"too like the original": "unchanged", "too unlike the original": "structure_lost"}


# Reading --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """A finished shard, as its .json describes it. The ending "rejected" stands for the tar of rejected edits."""

    kind: Kind
    store: Path
    number: int
    sizes: Mapping[str, int]  # ending to bytes
    hashes: Mapping[str, str]  # ending to SHA-256
    verdicts: Counter[str]
    left_out: Mapping[int, str]  # row of the catalog to the reason, of originals

    @classmethod
    def read(cls, kind: Kind, store: Path, number: int) -> "ShardRecord":
        """Read the .json. Raises StoreError."""
        file = store / "shards" / kind.file(number, "json")
        remedy = f"remove it and run `{kind.command}` again"
        try:
            stored = read_json(file, SHARD, remedy)
        except FileNotFoundError as error:
            raise StoreError(f"{str(file)!r}: is missing; run `{kind.command}` again.") from error
        with understood(file, remedy):
            files = {ending: stored["files"][ending] for ending in FILES}
            if "rejected" in stored["files"]:
                files["rejected"] = stored["files"]["rejected"]
            record = cls(
                kind=kind,
                store=store,
                number=number,
                sizes={ending: int(file["bytes"]) for ending, file in files.items()},
                hashes={ending: str(file["sha256"]) for ending, file in files.items()},
                verdicts=Counter(
                    {_FORMER.get(name, str(name)): int(count) for name, count in stored["verdicts"].items()}
                ),
                left_out={int(row): str(reason) for row, reason in dict(stored.get("left_out", {})).items()},
            )
            if not all(0 <= count < 2**31 for count in record.verdicts.values()):
                raise ValueError(f"verdicts {dict(record.verdicts)}")
            return record

    @property
    def indexed_sizes(self) -> tuple[int, ...]:
        """Bytes of each of FILES, as index.json has them."""
        return tuple(self.sizes[ending] for ending in FILES)

    def file(self, ending: str) -> Path:
        """One of the shard's files."""
        if ending == "rejected":
            return rejected_tar(self.store, self.number)
        return self.store / "shards" / self.kind.file(self.number, ending)

    @property
    def json(self) -> Path:
        """The shard's .json."""
        return self.file("json")

    def rows(self) -> NDArray[np.void]:
        """(n,) SHARD_ROW or ORIGINAL_SHARD_ROW, read from the .npy. Raises StoreError."""
        return load(self.kind, self.file("npy"), self.kind.shard_row, self.verdicts.total())

    def checked_rows(self, originals: int, prompts: int) -> NDArray[np.void]:
        """`rows` of edits, which must name existing originals, prompts and verdicts. Raises StoreError."""
        rows = self.rows()
        for name, count in (("original", originals), ("prompt", prompts), ("verdict", len(VERDICTS))):
            column = rows[name]
            wrong = (column < 0) | (column >= count)
            if wrong.any():
                raise EDITS.damaged(self.file("npy"), f"{name} must lie in 0 to {count - 1}, found {column[wrong][0]}")
        return rows

    def accepted(self, originals: int) -> NDArray[np.void]:
        """(accepted,) rows of the index, of a store with this many originals. Raises StoreError."""
        file, rows = self.file("npy"), self.rows()
        rows = rows[rows["verdict"] == VERDICTS.index(ACCEPTED)]
        if len(rows) != self.verdicts[ACCEPTED] or (
            len(rows) and not 0 <= rows["original"].min() <= rows["original"].max() < originals
        ):
            raise self.kind.damaged(file, "does not agree with its .json and the store's catalog")
        for name, least in (("height", 1), ("width", 1), ("length", 1), ("offset", 0)):
            if len(rows) and rows[name].min() < least:
                raise self.kind.damaged(file, f"{name} must be {least} or more, found {rows[name].min()}")
        index = np.empty(len(rows), self.kind.index_row)
        for name in self.kind.index_row.names or ():
            index[name] = self.number if name == "shard" else rows[name]
        return index


@dataclass(frozen=True, kw_only=True)
class DamagedShard:
    """A shard whose .json cannot be read."""

    number: int
    json: Path
    error: str


def list_shards(store: Path) -> dict[str, int]:
    """Name to size in bytes of all files in the shards' folder."""
    sizes = {}
    try:
        with suppress(FileNotFoundError), os.scandir(store / "shards") as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # a temporary file that another part has renamed
                    sizes[entry.name] = entry.stat().st_size
    except OSError as error:
        raise StoreError(f"{str(store / 'shards')!r}: cannot be listed ({error.strerror}).") from error
    return sizes


def finished_shards(kind: Kind, store: Path, count: int) -> dict[int, ShardRecord]:
    """Number to record of the first `count` shards, without those that are missing or whose files have other sizes."""
    listing = list_shards(store)
    finished = {}
    for number in range(count):
        if kind.file(number, "json") not in listing:
            continue
        record = ShardRecord.read(kind, store, number)
        found = {ending: listing.get(kind.file(number, ending)) for ending in FILES}
        if "rejected" in record.sizes:
            found["rejected"] = file_size(record.file("rejected"))
        if found == record.sizes:
            finished[number] = record
        else:
            _log.warning("Shard %d of %r is damaged and will be made again.", number, str(store))
    return finished


def open_tar(kind: Kind, store: Path, number: int, size: int) -> OpenFile:
    """Open a shard's tar, which must have this size: touching a mapping beyond a file's end kills the process."""
    file = store / "shards" / kind.file(number, "tar")
    try:
        tar = OpenFile(file)
    except OSError as error:
        raise StoreError(f"{str(file)!r}: cannot be read ({error.strerror}).") from error
    check_size(repr(str(file)), size, os.fstat(tar.descriptor).st_size, remedy(kind))
    return tar


def map_tar(kind: Kind, store: Path, number: int, size: int) -> NDArray[np.uint8]:
    """Map a shard's tar, (bytes,) uint8; see `open_tar`."""
    tar = open_tar(kind, store, number, size)
    return np.frombuffer(mmap.mmap(tar.descriptor, 0, access=mmap.ACCESS_READ), np.uint8)


def check_size(file: str, expected: int, found: int | None, remedy: str) -> None:
    """Raise StoreError unless a file has its size; `found` None: it is missing."""
    if found != expected:
        what = "is missing" if found is None else f"must have {expected} bytes, found {found}"
        raise StoreError(f"{file}: {what}; {remedy}.")


def remedy(kind: Kind) -> str:
    """The remedy for a damaged shard."""
    return f"run `{kind.command}` again to replace this shard (`dali-diffusemix verify` checks them all)"


# Writing --------------------------------------------------------------------------------------------------------------


class _TarWriter:
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
        """Write a member; returns the offset of its content."""
        self._write(_member_header(name, len(data)))
        offset = self.size
        self._write(data + bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def finish(self) -> dict[str, Any]:
        """Put the file in place; returns its entry for a JSON file."""
        with writing(self.file.parent), self._close:
            blocks = -(self.size + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE
            self._write(bytes(2 * tarfile.BLOCKSIZE + blocks))
        return {"bytes": self.size, "sha256": self._hash.hexdigest()}

    def give_up(self, error: BaseException) -> None:
        """Leave the previous file in place."""
        with writing(self.file.parent):
            self._close.__exit__(type(error), error, error.__traceback__)

    def _write(self, data: bytes) -> None:
        with writing(self.file.parent):
            self._stream.write(data)
        self._hash.update(data)
        self.size += len(data)


def _member_header(name: str, size: int) -> bytes:
    """A tar member's header, with time 0 and no owner, so that the same edits give the same bytes."""
    member = tarfile.TarInfo(name)
    member.size = size
    try:
        return member.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
    except ValueError:
        # A longer name needs an extension. DALI understands GNU's without the .idx, too.
        return member.tobuf(tarfile.GNU_FORMAT, "ascii", "strict")


class _FilesWriter(ABC):
    """Writes the files of one shard: all at the end of the `with` block, or none after an error."""

    def __init__(self, kind: Kind, store: Path, catalog: Catalog, number: int, length: int) -> None:
        self._kind = kind
        self._folder = store / "shards"
        self._catalog = catalog
        self._number = number
        self._length = length  # rows at the end
        self._rows: list[tuple[Any, ...]] = []
        self._groups: list[list[str]] = []  # of the .idx, one per line
        self._verdicts: Counter[str] = Counter()
        self._group_of = -1  # an original
        self._key_of: tuple[int, str] = (-1, "")  # an original and its key

    def __enter__(self) -> Self:
        with writing(self._folder):
            for folder in (self._folder, self._folder.with_name(REJECTED)):
                remove_temporary(folder, f"{self._kind.shard(self._number)}.*")
        self._tar = _TarWriter(self._folder / self._kind.file(self._number, "tar"))
        return self

    @abstractmethod
    def _content(self) -> dict[str, Any]:
        """The content of the .json besides number, files and verdicts."""

    def _other_files(self) -> dict[str, dict[str, Any]]:
        """Finish other files; returns their entries for the .json."""
        return {}

    def _name(self, original: int, extension: str) -> str:
        """The name of a tar member in an original's group."""
        if original != self._key_of[0]:
            self._key_of = original, _key(self._catalog.encoded_path(original))
        return f"{self._key_of[1]}.{extension}"

    def _add_file(self, original: int, extension: str, data: bytes) -> int:
        """Write a file of an original's group, directly after the others of the group; returns its offset."""
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


def _key(path: bytes) -> str:
    """A relative path as WebDataset's key; dots are escaped, since the first dot of a name begins the extension."""
    return quote_from_bytes(path, safe="/").replace(".", "%2E")


class ShardWriter(_FilesWriter):
    """Writes one shard of edits: all of it at the end of the `with` block, or nothing after an error.

        with ShardWriter(store, catalog, shard) as writer:
            writer.add(...)  # for each original, for each prompt, for each variant

    The files of an earlier attempt are replaced.

    Raises:
        StoreError: The disk is full, or the folder cannot be written.
    """

    def __init__(self, store: Path, catalog: Catalog, shard: Shard) -> None:
        super().__init__(EDITS, store, catalog, shard.number, len(shard))
        self._header = Header.read(store)
        self._ending = ENDINGS[str(self._header.settings.get("format", "jpeg"))]
        self._shard = shard
        self._rejected_file = rejected_tar(store, shard.number)
        self._rejected: _TarWriter | None = None

    def add(
        self,
        original: int,
        prompt: int,
        variant: int,
        *,
        seed: int,
        image: bytes | None,
        height: int = 0,
        width: int = 0,
        verdict: str = ACCEPTED,
        score: float = math.nan,
        ending: str | None = None,
    ) -> None:
        """Write one edit, a file of the store's format or with another `ending`; without `image` only its verdict.

        Edits of one original must follow each other.

        Edits that were not accepted go into a tar of their own, which no training reads.
        """
        offset = length = 0
        if image is not None:
            extension = f"{self._header.slugs[prompt]}.{variant}.{ending or self._ending}"
            length = len(image)
            if verdict == ACCEPTED:
                offset = self._add_file(original, extension, image)
            else:
                self._rejected = self._rejected or _TarWriter(self._rejected_file)
                offset = self._rejected.add(self._name(original, extension), image)
        code = VERDICTS.index(verdict)
        self._add_row(original, prompt, variant, seed, offset, length, height, width, code, score, verdict=verdict)

    def _other_files(self) -> dict[str, dict[str, Any]]:
        if self._rejected is not None:
            return {"rejected": self._rejected.finish()}
        with writing(self._folder):
            self._rejected_file.unlink(missing_ok=True)  # of an earlier attempt
        return {}

    def _give_up(self, error: BaseException) -> None:
        super()._give_up(error)
        if self._rejected is not None:
            self._rejected.give_up(error)

    def _content(self) -> dict[str, Any]:
        shard = self._shard
        return {
            "settings": dict(self._header.settings),
            "rows": [shard.rows[0], shard.rows[-1] + 1],
            "prompts": {index: self._header.prompts[index] for index in shard.prompts},
            "variants": [shard.variants.start, shard.variants.stop],
        }


class OriginalShardWriter(_FilesWriter):
    """Writes one shard of a packed store, like `ShardWriter`; every row is added or left out, in order."""

    def __init__(self, store: Path, catalog: Catalog, number: int) -> None:
        self._header = OriginalHeader.read(store)
        self.rows = self._header.rows(number)
        self._left_out: dict[int, str] = {}
        super().__init__(ORIGINALS, store, catalog, number, len(self.rows))

    def add(self, original: int, extension: str, content: bytes, *, height: int, width: int) -> None:
        """Write an original's file, whose image has this upright size; `extension` is ASCII, without a dot."""
        offset = self._add_file(original, extension, content)
        self._add_row(original, offset, len(content), height, width, 0, verdict=ACCEPTED)

    def leave_out(self, original: int, reason: str) -> None:
        """Record that an original cannot be read, and why."""
        self._left_out[original] = reason
        self._add_row(original, 0, 0, 0, 0, 1, verdict=UNREADABLE)

    def _content(self) -> dict[str, Any]:
        content: dict[str, Any] = {
            "settings": dict(self._header.settings),
            "rows": [self.rows.start, self.rows.stop],
        }
        return content | ({"left_out": self._left_out} if self._left_out else {})


class BegunShard:
    """A shard that a stopped run made in part: the edits of its first originals, to be copied into the whole one."""

    def __init__(self, rows: NDArray[np.void], tars: tuple[OpenFile, OpenFile | None]) -> None:
        """Use `BegunShard.find`."""
        self._rows = rows
        self._tars = tars
        self.originals = len(np.unique(rows["original"]))
        """The number of originals that are done."""

    @classmethod
    def find(cls, store: Path, shard: Shard) -> "BegunShard | None":
        """The part of a shard that is done; None if there is none, it is damaged or of other work."""
        try:
            record = ShardRecord.read(EDITS, store, shard.number)
            if not record.verdicts[NOT_YET] or record.verdicts.total() != len(shard):
                return None
            rows = record.rows()
            tar = OpenFile(record.file("tar"))
            rejected = OpenFile(record.file("rejected")) if "rejected" in record.sizes else None
            for ending, file in (("tar", tar), ("rejected", rejected)):
                if file is not None and _sha256(file) != record.hashes[ending]:
                    return None
        except (StoreError, OSError, KeyError):
            return None
        made = rows[rows["verdict"] != VERDICTS.index(NOT_YET)]
        wanted = [edit[:3] for edit in itertools.islice(shard.edits(), len(made))]
        if list(zip(*(made[name].tolist() for name in ("original", "prompt", "variant")), strict=True)) != wanted:
            return None
        return cls(made, (tar, rejected))

    def copy(self, writer: ShardWriter) -> Counter[str]:
        """Add all of it to a writer; returns the verdicts."""
        verdicts: Counter[str] = Counter()
        for row in self._rows:
            verdict = VERDICTS[row["verdict"]]
            tar = self._tars[0 if verdict == ACCEPTED else 1]
            length = int(row["length"])
            writer.add(
                *(int(row[name]) for name in ("original", "prompt", "variant")),
                seed=int(row["seed"]),
                image=os.pread(tar.descriptor, length, int(row["offset"])) if length and tar is not None else None,
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
