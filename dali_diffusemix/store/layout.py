"""The layout of a store: names, versions, tables, and the JSON files that describe it."""

import hashlib
import io
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix import __version__
from dali_diffusemix.base.files import why_damaged, write
from dali_diffusemix.errors import CatalogError, ConfigError, StoreError

Settings: TypeAlias = Mapping[str, str | int | float | bool | None]
"""All that decides a store's images, besides the original, prompt and variant of each."""

REJECTIONS = ("black", "white", "flat", "not a number", "unchanged", "structure_lost")
"""The reasons why quality rejects an edit."""

VERDICTS = ("accepted", "unreadable original", *REJECTIONS, "denied", "not made yet")
"""Verdicts by number. Only accepted edits are trained on. Edits that are denied to a class are not made; those not made
yet are left to the next run."""

ACCEPTED, UNREADABLE = VERDICTS[:2]
DENIED, NOT_YET = VERDICTS[-2:]

SHARD_ROW = np.dtype(
    [
        ("original", "<i8"),  # row of the store's catalog
        ("prompt", "<i2"),  # index into the store's prompts
        ("variant", "<i2"),
        ("seed", "<u8"),
        ("offset", "<i8"),  # of its file in the tar; of one that quality rejected, in the tar under rejected/
        ("length", "<i4"),  # of its file in bytes; 0: there is none
        ("height", "<i4"),
        ("width", "<i4"),
        ("verdict", "u1"),  # index into VERDICTS
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
        ("original", "<i8"),  # row of the catalog of the packed folder
        ("offset", "<i8"),  # of the file in the tar
        ("length", "<i4"),  # of the file in bytes; 0: there is none
        ("height", "<i4"),  # upright
        ("width", "<i4"),
        ("verdict", "u1"),  # index into VERDICTS
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
# The folder of rejected edits: apart from the shards, so that a training that reads all tars there sees none of them.
REJECTED = "rejected"


class UnfinishedStoreWarning(UserWarning):
    """A store is read whose shards are not all there, or whose index is out of date."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """File names, magic and row types of one kind of store."""

    images: str  # what it holds; the names of its shards begin with this
    name: str
    magic: str  # of store.json
    command: str  # makes it
    use: str  # how it is used: the remedy if it is given as the other kind
    listing: str  # the folder of the catalog whose rows its shards name
    shard_row: np.dtype[Any]
    index_row: np.dtype[Any]
    tables: tuple[str, ...]  # files whose hashes are in index.json

    def shard(self, number: int) -> str:
        """A shard's name."""
        return f"{self.images}-{number:06d}"

    def file(self, number: int, ending: str) -> str:
        """A shard's file."""
        return f"{self.shard(number)}.{ending}"

    def damaged(self, file: Path, what: str) -> StoreError:
        """The error for a file that can be made again."""
        return StoreError(f"{str(file)!r}: {what}; run `{self.command}` again to replace it.")


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


def is_raw(settings: Settings) -> bool:
    """True for a store of raw images: plain pixels, each behind `codec.raw_header`."""
    return settings.get("format") == "raw"


def rejected_tar(store: Path, number: int) -> Path:
    """The tar of a shard's rejected edits."""
    return store / REJECTED / EDITS.file(number, "tar")


# store.json -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A unit of work, of retry and of storage: all edits of some originals under some prompts."""

    number: int
    rows: range  # of the catalog
    prompts: tuple[int, ...]  # indices into the store's prompts
    variants: range

    def __len__(self) -> int:
        """The number of its edits."""
        return len(self.rows) * len(self.prompts) * len(self.variants)


@dataclass(frozen=True)
class Part:
    """Part `number` of `count` of a store's work: an equal share of consecutive shards of each segment.

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

    def share(self, length: int) -> range:
        """Its share of `length` items. Parts whose shares overlap, whatever their counts, may share shards."""
        return range(length * (self.number - 1) // self.count, length * self.number // self.count)


WHOLE = Part()


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A box of work that was ordered at once: originals x prompts x variants, cut into shards along the originals."""

    rows: range
    prompts: tuple[int, ...]
    variants: range
    originals_per_shard: int
    first_shard: int

    @property
    def shard_count(self) -> int:
        return math.ceil(len(self.rows) / self.originals_per_shard)

    def numbers(self, part: Part) -> range:
        """The shards of a part. They do not change when segments are added."""
        share = part.share(self.shard_count)
        return range(self.first_shard, self.first_shard + self.shard_count)[share.start : share.stop]

    def shards(self) -> Iterator[Shard]:
        for index in range(self.shard_count):
            rows = self.rows[index * self.originals_per_shard : (index + 1) * self.originals_per_shard]
            yield Shard(number=self.first_shard + index, rows=rows, prompts=self.prompts, variants=self.variants)

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
    denied: Mapping[str, tuple[str, ...]]  # prompt to patterns of classes whose originals it is not applied to
    fingerprint: str  # of the catalog
    growing: str | None = None  # fingerprint of the catalog that is replacing it

    @property
    def shard_count(self) -> int:
        return sum(segment.shard_count for segment in self.segments)

    def shards(self) -> Iterator[Shard]:
        """All shards, by number."""
        return itertools.chain.from_iterable(segment.shards() for segment in self.segments)

    @cached_property
    def slugs(self) -> tuple[str, ...]:
        """The prompts as parts of file names: all different, and unchanged when prompts are added."""
        slugs: list[str] = []
        for index, prompt in enumerate(self.prompts):
            slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:64]
            slugs.append(slug if slug and slug not in slugs else f"{slug or 'prompt'}--{index}")
        return tuple(slugs)

    def extended(
        self,
        prompts: Sequence[str],
        variants: int,
        rows: int,
        originals_per_shard: int,
        denied: Mapping[str, Sequence[str]],
    ) -> "Header":
        """The header with the segments added that are missing until all rows have these variants of these prompts."""
        known = (*self.prompts, *(prompt for prompt in prompts if prompt not in self.prompts))
        wanted = sorted(known.index(prompt) for prompt in prompts)
        segments = list(self.segments)
        bounds = {0, rows} | {bound for segment in segments for bound in (segment.rows.start, segment.rows.stop)}
        for start, stop in itertools.pairwise(sorted(bounds)):
            # Between two bounds every row has the same variants of a prompt, counted from 0.
            ordered = dict.fromkeys(wanted, 0)
            for segment in self.segments:
                if start in segment.rows:
                    for prompt in ordered.keys() & set(segment.prompts):
                        ordered[prompt] = max(ordered[prompt], segment.variants.stop)
            for first in sorted(set(ordered.values())):
                if first < variants:
                    segments.append(
                        Segment(
                            rows=range(start, stop),
                            prompts=tuple(prompt for prompt in wanted if ordered[prompt] == first),
                            variants=range(first, variants),
                            originals_per_shard=originals_per_shard,
                            first_shard=sum(segment.shard_count for segment in segments),
                        )
                    )
        new = {name: tuple(denied[name]) for name in known if denied.get(name) and name not in self.denied}
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
                rows, variants = segment.rows, segment.variants
                if not (
                    0 <= rows.start <= rows.stop < 2**62
                    and 0 <= variants.start < variants.stop <= MOST
                    and 1 <= segment.originals_per_shard < 2**62
                    and segment.first_shard == number
                    and all(0 <= prompt < len(header.prompts) for prompt in segment.prompts)
                ):
                    raise ValueError(f"segment {segment}")
                number += segment.shard_count
        return header

    def check(self, store: Path, originals: int) -> None:
        """Raise StoreError if it names more originals than there are."""
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
    originals: int  # rows of the catalog of the packed folder
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
        """Raise StoreError unless it is of this many originals."""
        if self.originals != originals:
            raise StoreError(
                f"{str(store / 'store.json')!r}: 'originals' must be {originals}, as many as the store lists, found "
                f"{self.originals}; bring back a copy of it, or make a new store."
            )


@contextmanager
def stored_header(kind: Kind, store: Path) -> Iterator[dict[str, Any]]:
    """Read store.json; errors about its content in the block become a StoreError."""
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


# Files ----------------------------------------------------------------------------------------------------------------


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of a disk into a StoreError that says what is kept and how to resume."""
    try:
        yield
    except (OSError, CatalogError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error  # without the remedy of catalogs
        raise StoreError(
            f"{str(path)!r}: cannot be written ({cause}). Finished shards stay as they are; make room, or permit "
            "writing, and run the same command again: it does the rest."
        ) from error


def write_data(file: Path, data: bytes) -> dict[str, Any]:
    """Write a file; returns its entry for a JSON file."""
    write(file, data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def write_table(file: Path, table: NDArray[Any]) -> dict[str, Any]:
    """Write a .npy file; returns its entry for a JSON file."""
    content = io.BytesIO()
    np.save(content, table, allow_pickle=False)
    return write_data(file, content.getvalue())


def write_json(file: Path, magic: str, content: Mapping[str, Any]) -> None:
    write(file, json.dumps({"magic": magic, "version": VERSION, **content}, indent=1).encode("ascii") + b"\n")


def read_json(file: Path, magic: str, remedy: str, elsewhere: str | None = None) -> dict[str, Any]:
    """Read a JSON object of this magic and version. Raises FileNotFoundError, StoreError.

    Args:
        file: The file.
        magic: The expected magic.
        remedy: The remedy if it is damaged.
        elsewhere: The remedy if it has another magic; by default the same.
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
    """Turn errors about a JSON file's content into a StoreError."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise StoreError(f"{str(file)!r}: is damaged ({why_damaged(error)}); {remedy}.") from error


def load(kind: Kind, file: Path, dtype: np.dtype[Any], count: int, *, mapped: bool = False) -> NDArray[Any]:
    """Load an array of `count` rows. Raises StoreError."""
    try:
        array = np.load(file, mmap_mode="r" if mapped else None, allow_pickle=False)
    except Exception as error:  # a header is a Python literal, which fails in many ways
        # NumPy advises to unpickle unknown content.
        why = "it is no array" if "allow_pickle" in str(error) else error
        raise kind.damaged(file, f"is missing or cut short ({why})") from error
    if array.dtype != dtype or array.shape != (count,):
        raise kind.damaged(file, f"must be {count} rows of {dtype}, found {array.shape} of {array.dtype}")
    return np.asarray(array)
