"""What a store consists of: tables, names, and the JSON that describes it."""

import hashlib
import io
import itertools
import json
import math
import os
import re
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix import __version__
from dali_diffusemix.base.files import why_damaged
from dali_diffusemix.errors import CatalogError, ConfigError, StoreError

Settings: TypeAlias = Mapping[str, str | int | float | bool | None]
"""What decides a store's images besides the original, prompt and variant of each."""

REJECTIONS = ("black", "white", "flat", "not a number", "unchanged", "structure_lost")
"""Why quality rejects an edit."""

VERDICTS = ("accepted", "unreadable original", *REJECTIONS, "denied", "not made yet")
"""What a verdict's number means. Only what was accepted is trained on; what is denied to a class is not made, and what
is not made yet is left to the next run."""

ACCEPTED, UNREADABLE = VERDICTS[:2]
DENIED, NOT_YET = VERDICTS[-2:]
# The names that two verdicts had until version 0.1: shards keep the names that they were written with.
_FORMER = {"too like the original": "unchanged", "too unlike the original": "structure_lost"}

SHARD_ROW = np.dtype(
    [
        ("original", "<i8"),  # row of the store's catalog
        ("prompt", "<i2"),  # place in the store's prompts
        ("variant", "<i2"),
        ("seed", "<u8"),
        ("offset", "<i8"),  # of the JPEG in the tar; of one that quality rejected, in the tar under rejected/
        ("length", "<i4"),  # of the JPEG in bytes; 0: there is none
        ("height", "<i4"),
        ("width", "<i4"),
        ("verdict", "u1"),  # place in VERDICTS
        ("score", "<f4"),  # of the verdict, see `quality`; NaN: none
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

VERSION = 1
SHARD, INDEX = (f"dali_diffusemix.{kind}" for kind in ("shard", "index"))
FILES = ("tar", "idx", "npy")
# Shard to the bytes of each of FILES.
Sizes: TypeAlias = dict[int, tuple[int, ...]]
# prompt and variant are int16.
MOST = 32768
# The folder of what quality rejected: apart from the shards, so that whoever reads all tars there trains on none of it.
REJECTED = "rejected"


class UnfinishedStoreWarning(UserWarning):
    """A store is read of which shards are missing, or whose index is not up to date."""


@dataclass(frozen=True, kw_only=True)
class Kind:
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


EDITS = Kind(
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
ORIGINALS = Kind(
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


def rejected_tar(store: Path, number: int) -> Path:
    """Where a shard's edits are that quality rejected."""
    return store / REJECTED / EDITS.file(number, "tar")


def file_size(file: Path) -> int | None:
    """Bytes; None: there is no such file."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return None


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


@dataclass(frozen=True)
class Part:
    """What one of several runs that share a store's work makes: of each segment's shards an equal stretch.

    Raises ConfigError unless 1 ≤ number ≤ count.
    """

    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count <= MOST:
            raise ConfigError(f"part must be i/n with 1 ≤ i ≤ n ≤ {MOST}, found {self}.")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Read "i/n". Raises ConfigError."""
        if not (match := re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)):
            raise ConfigError(f"part must be i/n, such as 1/8, found {text!r}.")
        return cls(int(match[1]), int(match[2]))

    def stretch(self, length: int) -> range:
        """Its share of `length` places. Parts whose shares overlap, of whatever counts, may share shards."""
        return range(length * (self.number - 1) // self.count, length * self.number // self.count)


WHOLE = Part()


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Work that was ordered at once."""

    rows: range
    prompts: tuple[int, ...]
    variants: range
    originals_per_shard: int
    first_shard: int

    @property
    def shard_count(self) -> int:
        return math.ceil(len(self.rows) / self.originals_per_shard)

    def numbers(self, part: "Part") -> range:
        """The shards that belong to a part. More segments change nothing of it."""
        share = part.stretch(self.shard_count)
        return range(self.first_shard, self.first_shard + self.shard_count)[share.start : share.stop]

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
    def from_json(cls, stored: Mapping[str, Any]) -> "Segment":
        return cls(
            rows=range(*map(int, stored["rows"])),
            prompts=tuple(map(int, stored["prompts"])),
            variants=range(*map(int, stored["variants"])),
            originals_per_shard=int(stored["originals_per_shard"]),
            first_shard=int(stored["first_shard"]),
        )


@dataclass(frozen=True, kw_only=True)
class Header:
    """The content of store.json."""

    settings: Settings
    prompts: tuple[str, ...]
    segments: tuple[Segment, ...]
    denied: Mapping[str, tuple[str, ...]]  # prompt to patterns of the classes whose originals it is not for
    fingerprint: str  # of the catalog
    growing: str | None = None  # fingerprint of the catalog that is taking its place

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

    def extended(
        self,
        prompts: Sequence[str],
        variants: int,
        rows: int,
        originals_per_shard: int,
        denied: Mapping[str, Sequence[str]],
    ) -> "Header":
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
                        Segment(
                            rows=range(start, stop),
                            prompts=tuple(place for place in places if ordered[place] == first),
                            variants=range(first, variants),
                            originals_per_shard=originals_per_shard,
                            first_shard=sum(segment.shard_count for segment in segments),
                        )
                    )
        new = {prompt: tuple(denied[prompt]) for prompt in known if denied.get(prompt) and prompt not in self.denied}
        return replace(self, prompts=known, segments=tuple(segments), denied={**self.denied, **new})

    def write(self, store: Path) -> None:
        content = {
            "settings": dict(self.settings),
            "prompts": self.prompts,
            "denied": self.denied,
            "segments": [segment.to_json() for segment in self.segments],
            "fingerprint": self.fingerprint,
            **({} if self.growing is None else {"growing": self.growing}),
            "written_by": f"dali_diffusemix {__version__}",
        }
        write_json(store / "store.json", EDITS.magic, content)

    @classmethod
    def read(cls, store: Path) -> "Header":
        with stored_header(EDITS, store) as stored:
            header = cls(
                settings=MappingProxyType(dict(stored["settings"])),
                prompts=tuple(map(str, stored["prompts"])),
                segments=tuple(map(Segment.from_json, stored["segments"])),
                denied={str(name): tuple(map(str, of)) for name, of in dict(stored.get("denied", {})).items()},
                fingerprint=str(stored["fingerprint"]),
                growing=None if stored.get("growing") is None else str(stored["growing"]),
            )
            number = 0
            for segment in header.segments:
                rows, variants, places = segment.rows, segment.variants, range(len(header.prompts))
                if not (
                    0 <= rows.start <= rows.stop < 2**62
                    and 0 <= variants.start < variants.stop <= MOST
                    and 1 <= segment.originals_per_shard < 2**62
                    and segment.first_shard == number
                    and all(place in places for place in segment.prompts)
                ):
                    raise ValueError(f"segment {segment}")
                number += segment.shard_count
        return header

    def check(self, store: Path, originals: int) -> None:
        """Raise StoreError unless its work is on so many originals."""
        most = max((segment.rows.stop for segment in self.segments), default=0)
        if most > originals:
            raise StoreError(
                f"{str(store / 'store.json')!r}: 'segments' must be of the {originals} originals in the store's "
                f"catalog, found {most}; bring back a copy of it, or make a new store."
            )


@dataclass(frozen=True, kw_only=True)
class OriginalHeader:
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
        write_json(store / "store.json", ORIGINALS.magic, content)

    @classmethod
    def read(cls, store: Path) -> "OriginalHeader":
        with stored_header(ORIGINALS, store) as stored:
            header = cls(
                settings=MappingProxyType(dict(stored["settings"])),
                originals=int(stored["originals"]),
                originals_per_shard=int(stored["originals_per_shard"]),
            )
            if not (1 <= header.originals_per_shard < 2**62 and 0 <= header.originals < 2**62):
                raise ValueError(f"originals_per_shard {header.originals_per_shard}, originals {header.originals}")
        return header

    def check(self, store: Path, originals: int) -> None:
        """Raise StoreError unless so many originals are listed."""
        if self.originals != originals:
            raise StoreError(
                f"{str(store / 'store.json')!r}: 'originals' must be {originals}, as many as the store lists, found "
                f"{self.originals}; bring back a copy of it, or make a new store."
            )


@contextmanager
def stored_header(kind: Kind, store: Path) -> Iterator[dict[str, Any]]:
    """The content of store.json; whatever is found wrong with it becomes a StoreError."""
    file = store / "store.json"
    other = ORIGINALS if kind is EDITS else EDITS
    remedy = "bring back a copy of it, or make a new store"
    elsewhere = f"use another folder (what has {other.magic!r}, the {other.name}, {other.use})"
    try:
        stored = read_json(file, kind.magic, remedy, elsewhere)
    except FileNotFoundError as error:
        raise StoreError(
            f"{str(store)!r}: there is no {kind.name} (store.json); make one with `{kind.command} ROOT STORE`."
        ) from error
    with understood(file, remedy):
        yield stored


# What is derived ------------------------------------------------------------------------------------------------------


def sizes_of(shards: Sequence[Sequence[Any]]) -> Sizes:
    """The sizes in index.json, a number and then the bytes of each of FILES. Raises ValueError."""
    sizes = {int(number): tuple(map(int, sizes)) for number, *sizes in shards}
    for number, of_shard in sizes.items():
        if not 0 <= number < 2**31 or len(of_shard) != len(FILES) or min(of_shard) < 0:
            raise ValueError(f"shard {number} has sizes {of_shard}")
    return sizes


@dataclass(frozen=True, kw_only=True)
class Record:
    """The content of index.json: of what index.npy and starts.npy were derived."""

    edits: int
    originals: int
    sizes: Sizes
    not_yet: int = 0  # edits that these shards lack, for the run was stopped that made them

    @classmethod
    def read(cls, store: Path) -> "Record":
        file = store / "index.json"
        stored = read_json(file, INDEX, "remove it and run `dali-diffusemix generate` again")
        with understood(file, "remove it and run `dali-diffusemix generate` again"):
            return cls(
                edits=int(stored["edits"]),
                originals=int(stored["originals"]),
                sizes=sizes_of(stored["shards"]),
                not_yet=int(stored.get("not_yet", 0)),
            )

    def write(self, store: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
        shards = [[number, *sizes] for number, sizes in self.sizes.items()]
        content = {"edits": self.edits, "originals": self.originals, "files": files, "shards": shards}
        content |= {"not_yet": self.not_yet} if self.not_yet else {}
        write_json(store / "index.json", INDEX, content)


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What a shard's .json says that others need."""

    sizes: tuple[int, ...]  # bytes of each of FILES
    hashes: Mapping[str, str]  # ending to SHA-256; "rejected" too, where there are such
    rejected: int | None  # bytes of the tar of what quality rejected
    verdicts: Counter[str]

    @classmethod
    def read(cls, kind: Kind, store: Path, number: int) -> "ShardRecord":
        file = store / "shards" / kind.file(number, "json")
        remedy = f"remove it and run `{kind.command}` again"
        try:
            stored = read_json(file, SHARD, remedy)
        except FileNotFoundError as error:
            raise StoreError(f"{str(file)!r}: has gone; run `{kind.command}` again.") from error
        with understood(file, remedy):
            files = stored["files"]
            record = cls(
                sizes=tuple(int(files[ending]["bytes"]) for ending in FILES),
                hashes={str(ending): str(file["sha256"]) for ending, file in files.items()},
                rejected=int(files["rejected"]["bytes"]) if "rejected" in files else None,
                verdicts=Counter(
                    {_FORMER.get(name, str(name)): int(count) for name, count in stored["verdicts"].items()}
                ),
            )
            if not all(0 <= count < 2**31 for count in record.verdicts.values()):
                raise ValueError(f"verdicts {dict(record.verdicts)}")
            return record


# Files ----------------------------------------------------------------------------------------------------------------


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn what goes wrong with a disk into a StoreError that says what stays and how to go on."""
    try:
        yield
    except (OSError, CatalogError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error  # without the remedy of catalogs
        raise StoreError(
            f"{str(place)!r}: cannot be written ({cause}). Finished shards stay as they are; make room, or permit "
            "writing, and run the same command again: it does the rest."
        ) from error


@contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """Write a file whole or not at all: beside its place, to the disk, and only then into its place."""
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")  # a run on another machine has its own
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


def write_data(file: Path, data: bytes) -> dict[str, Any]:
    """Write a file; gives what a JSON file says of it."""
    with replacing(file) as stream:
        stream.write(data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def write_table(file: Path, table: NDArray[Any]) -> dict[str, Any]:
    content = io.BytesIO()
    np.save(content, table, allow_pickle=False)
    return write_data(file, content.getvalue())


def write_json(file: Path, magic: str, content: Mapping[str, Any]) -> None:
    with replacing(file) as stream:
        stream.write(json.dumps({"magic": magic, "version": VERSION, **content}, indent=1).encode("ascii") + b"\n")


def read_json(file: Path, magic: str, remedy: str, elsewhere: str | None = None) -> dict[str, Any]:
    """A JSON object of this kind and version. Raises FileNotFoundError, StoreError.

    Args:
        file: Where it is.
        magic: Its kind.
        remedy: What to do where it is damaged.
        elsewhere: What to do where it is of another kind; the same unless given.
    """
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(f"{str(file)!r}: cannot be read ({error.strerror}).") from error
    with understood(file, remedy):
        stored: dict[str, Any] = json.loads(data)
        if not isinstance(stored, dict):
            raise TypeError(f"must be an object, found {type(stored).__name__}")
        found, version = stored["magic"], stored["version"]
    if found != magic:
        raise StoreError(f"{str(file)!r}: 'magic' must be {magic!r}, found {found!r}; {elsewhere or remedy}.")
    if version != VERSION:
        raise StoreError(
            f"{str(file)!r}: 'version' must be {VERSION}, found {version!r}; update dali_diffusemix to the release "
            "that wrote it."
        )
    return stored


@contextmanager
def understood(file: Path, remedy: str) -> Iterator[None]:
    """Turn what goes wrong with a JSON file's content into a StoreError."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise StoreError(f"{str(file)!r}: is damaged ({why_damaged(error)}); {remedy}.") from error


def load(kind: Kind, file: Path, dtype: np.dtype[Any], count: int, *, mapped: bool = False) -> NDArray[Any]:
    """An array of `count` rows. Raises StoreError."""
    try:
        array = np.load(file, mmap_mode="r" if mapped else None, allow_pickle=False)
    except Exception as error:  # a header is a Python literal, which fails in many ways
        # NumPy advises to unpickle what it does not know.
        why = "it is no array" if "allow_pickle" in str(error) else error
        raise kind.damaged(file, f"is missing or cut short ({why})") from error
    if array.dtype != dtype or array.shape != (count,):
        raise kind.damaged(file, f"must be {count} rows of {dtype}, found {array.shape} of {array.dtype}")
    return np.asarray(array)
