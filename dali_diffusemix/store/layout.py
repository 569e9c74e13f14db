"""The layout of a store: names, versions, tables, and the JSON files that describe it."""

import hashlib
import io
import itertools
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix import __version__
from dali_diffusemix.base.files import why_damaged, write
from dali_diffusemix.catalog.listing import holds_images
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

ORDER_ROW = np.dtype([("original", "<i8"), ("prompt", "<i2"), ("variant", "<i2"), ("round", "<i2")])
"""An edit of an order: see `EditOrder`."""

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
# The folder of the lists of edits that were ordered one by one.
ORDERS = "orders"
# Rounds of an edit: made once, then made again. int16.
ROUNDS = 32767


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
    newest: int = VERSION  # of store.json

    @property
    def a_name(self) -> str:
        """Its name after an article, for a message."""
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"

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
    newest=2,
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


class EditKey(NamedTuple):
    """An edit of a store, to be made in a round: 0 the first time, then 1 more than before."""

    original: int  # row of the store's catalog
    prompt: int  # index into the store's prompts
    variant: int
    round: int


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A unit of work, of retry and of storage: edits of some originals, one original after another."""

    number: int
    rows: Sequence[int]  # of the catalog
    prompts: tuple[int, ...]  # indices into the store's prompts
    variants: range
    listed: tuple[EditKey, ...] | None = None  # the edits, unless they are all of these prompts and variants

    def __len__(self) -> int:
        """The number of its edits."""
        if self.listed is not None:
            return len(self.listed)
        return len(self.rows) * len(self.prompts) * len(self.variants)

    def edits(self) -> Iterator[EditKey]:
        """Its edits, in the order of its rows."""
        if self.listed is not None:
            return iter(self.listed)
        return (
            EditKey(original, prompt, variant, 0)
            for original in self.rows
            for prompt in self.prompts
            for variant in self.variants
        )


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
class _Work(ABC):
    """Work that was ordered at once, cut into shards along the originals."""

    originals_per_shard: int
    first_shard: int

    @property
    @abstractmethod
    def originals(self) -> int:
        """The number of originals."""

    @property
    def shard_count(self) -> int:
        return math.ceil(self.originals / self.originals_per_shard)

    def numbers(self, part: Part) -> range:
        """The shards of a part. They do not change when work is added."""
        share = part.share(self.shard_count)
        return range(self.first_shard, self.first_shard + self.shard_count)[share.start : share.stop]


@dataclass(frozen=True, kw_only=True)
class Segment(_Work):
    """A box of work: originals x prompts x variants."""

    rows: range
    prompts: tuple[int, ...]
    variants: range

    @property
    def originals(self) -> int:
        return len(self.rows)

    def shards(self, store: Path) -> Iterator[Shard]:
        """Its shards, by number."""
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

    def is_valid(self, prompts: int) -> bool:
        """True if its numbers make sense, in a store with so many prompts."""
        return (
            0 <= self.rows.start <= self.rows.stop < 2**62
            and 0 <= self.variants.start < self.variants.stop <= MOST
            and all(0 <= prompt < prompts for prompt in self.prompts)
        )


@dataclass(frozen=True, kw_only=True)
class EditOrder(_Work):
    """Edits that were ordered one by one: those of prompts that only some classes have, and those made again.

    They are listed in a file, (edits,) `ORDER_ROW` sorted by original, prompt and variant. Where an earlier shard has
    the same edit, that of the later one takes its place.
    """

    sha256: str
    edits: int
    listed_originals: int

    @property
    def originals(self) -> int:
        return self.listed_originals

    @property
    def file(self) -> str:
        """Relative to the store."""
        return f"{ORDERS}/{self.first_shard:06d}.npy"

    @classmethod
    def of(cls, table: NDArray[np.void], originals_per_shard: int, first_shard: int) -> "EditOrder":
        """The order of a table of `ORDER_ROW`, which `write_file` writes."""
        return cls(
            sha256=hashlib.sha256(_npy(table)).hexdigest(),
            edits=len(table),
            listed_originals=len(np.unique(table["original"])),
            originals_per_shard=originals_per_shard,
            first_shard=first_shard,
        )

    def write_file(self, store: Path, table: NDArray[np.void]) -> None:
        (store / ORDERS).mkdir(exist_ok=True)
        write(store / self.file, _npy(table))

    def table(self, store: Path) -> NDArray[np.void]:
        """(edits,) ORDER_ROW. Raises StoreError."""
        file, remedy = store / self.file, "bring back a copy of it, or make a new store"
        try:
            data = file.read_bytes()
        except OSError as error:
            raise StoreError(f"{str(file)!r}: cannot be read ({error.strerror}); {remedy}.") from error
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise StoreError(f"{str(file)!r}: has changed since it was written; {remedy}.")
        table: NDArray[np.void] = np.load(io.BytesIO(data), allow_pickle=False)
        return table

    def shards(self, store: Path) -> Iterator[Shard]:
        """Its shards, by number. Raises StoreError."""
        table = self.table(store)
        firsts = np.flatnonzero(np.diff(table["original"], prepend=-1))[:: self.originals_per_shard].tolist()
        for index, (start, stop) in enumerate(itertools.pairwise([*firsts, len(table)])):
            listed = tuple(EditKey(*row) for row in table[start:stop].tolist())
            yield Shard(
                number=self.first_shard + index,
                rows=tuple(dict.fromkeys(edit.original for edit in listed)),
                prompts=tuple(sorted({edit.prompt for edit in listed})),
                variants=range(min(edit.variant for edit in listed), max(edit.variant for edit in listed) + 1),
                listed=listed,
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "listed": self.file,
            "sha256": self.sha256,
            "edits": self.edits,
            "originals": self.originals,
            "originals_per_shard": self.originals_per_shard,
            "first_shard": self.first_shard,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "EditOrder":
        return cls(
            sha256=str(stored["sha256"]),
            edits=int(stored["edits"]),
            listed_originals=int(stored["originals"]),
            originals_per_shard=int(stored["originals_per_shard"]),
            first_shard=int(stored["first_shard"]),
        )

    def is_valid(self, prompts: int) -> bool:
        """True if its numbers make sense."""
        return 1 <= self.originals <= self.edits < 2**62


@dataclass(frozen=True)
class Rule:
    """The classes that a prompt is applied to."""

    only: tuple[str, ...] | None = None  # patterns, as for file names; None: all classes
    deny: tuple[str, ...] = ()  # patterns of classes among them that it is not applied to

    def applies(self, classes: Sequence[str]) -> NDArray[np.bool_]:
        """(classes,) True for those that it is applied to."""
        return np.array(
            [
                (self.only is None or any(fnmatchcase(name, pattern) for pattern in self.only))
                and not any(fnmatchcase(name, pattern) for pattern in self.deny)
                for name in classes
            ],
            dtype=np.bool_,
        )


@dataclass(frozen=True, kw_only=True)
class Header:
    """The content of store.json."""

    settings: Settings
    prompts: tuple[str, ...]
    segments: tuple[Segment | EditOrder, ...]
    rules: Mapping[str, Rule]  # prompt to its classes, where these are not all
    fingerprint: str  # of the catalog
    growing: str | None = None  # fingerprint of the catalog that is replacing it
    class_names: Mapping[str, str] = field(default_factory=dict)  # class to its words in an instruction, where given

    @property
    def shard_count(self) -> int:
        return sum(segment.shard_count for segment in self.segments)

    def shards(self, store: Path) -> Iterator[Shard]:
        """All shards, by number. Raises StoreError if the file of an order cannot be used."""
        return itertools.chain.from_iterable(segment.shards(store) for segment in self.segments)

    @property
    def boxes(self) -> tuple[Segment, ...]:
        """The segments that are boxes."""
        return tuple(segment for segment in self.segments if isinstance(segment, Segment))

    @property
    def orders(self) -> tuple[EditOrder, ...]:
        """The segments whose edits are listed."""
        return tuple(segment for segment in self.segments if isinstance(segment, EditOrder))

    @cached_property
    def slugs(self) -> tuple[str, ...]:
        """The prompts as parts of file names: all different, and unchanged when prompts are added."""
        slugs: list[str] = []
        for index, prompt in enumerate(self.prompts):
            slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:64]
            slugs.append(slug if slug and slug not in slugs else f"{slug or 'prompt'}--{index}")
        return tuple(slugs)

    def wanted(self, classes: Sequence[str]) -> NDArray[np.bool_]:
        """(classes, prompts) True where a prompt is applied to a class."""
        table = np.ones((len(classes), len(self.prompts)), dtype=np.bool_)
        for prompt, rule in self.rules.items():
            table[:, self.prompts.index(prompt)] = rule.applies(classes)
        return table

    def variants(self, store: Path) -> int:
        """The most variants that were ordered of an edit. Raises StoreError if the file of an order cannot be used."""
        most = [box.variants.stop for box in self.boxes]
        return max([*most, *(int(order.table(store)["variant"].max()) + 1 for order in self.orders)], default=1)

    def with_prompts(self, prompts: Sequence[str]) -> "Header":
        """The header that knows these prompts, too."""
        return replace(self, prompts=tuple(dict.fromkeys((*self.prompts, *prompts))))

    def with_order(self, table: NDArray[np.void], originals_per_shard: int) -> "Header":
        """The header with the edits of a table of `ORDER_ROW` ordered; the order's file is still to be written."""
        return replace(self, segments=(*self.segments, EditOrder.of(table, originals_per_shard, self.shard_count)))

    def with_boxes(self, prompts: Sequence[str], variants: int, rows: int, originals_per_shard: int) -> "Header":
        """The header with the boxes added that are missing until all rows have these variants of these prompts."""
        known = self.with_prompts(prompts)
        wanted = sorted(known.prompts.index(prompt) for prompt in prompts)
        segments = list(self.segments)
        bounds = {0, rows} | {bound for segment in self.boxes for bound in (segment.rows.start, segment.rows.stop)}
        for start, stop in itertools.pairwise(sorted(bounds)):
            # Between two bounds every row has the same variants of a prompt, counted from 0.
            ordered = dict.fromkeys(wanted, 0)
            for segment in self.boxes:
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
        return replace(known, segments=tuple(segments))

    def write(self, store: Path) -> None:
        only = {prompt: rule.only for prompt, rule in self.rules.items() if rule.only is not None}
        content = {
            "settings": dict(self.settings),
            "prompts": self.prompts,
            "denied": {prompt: rule.deny for prompt, rule in self.rules.items() if rule.deny},
            **({"only": only} if only else {}),
            **({"class_names": dict(self.class_names)} if self.class_names else {}),
            "segments": [segment.to_json() for segment in self.segments],
            "fingerprint": self.fingerprint,
            **({} if self.growing is None else {"growing": self.growing}),
            "written_by": f"dali_diffusemix {__version__}",
        }
        # What reads version 1 alone would use edits that were made again, or are not wanted any more.
        write_json(store / "store.json", EDITS.magic, content, version=2 if self.orders or only else 1)

    @classmethod
    def find(cls, store: Path) -> "Header | None":
        """`read`, but None if the folder has no store.json. Raises StoreError."""
        return cls.read(store) if (store / "store.json").exists() else None

    @classmethod
    def read(cls, store: Path) -> "Header":
        with stored_header(EDITS, store) as stored:
            prompts = tuple(map(str, stored["prompts"]))
            only, denied = (
                {str(name): tuple(map(str, of)) for name, of in dict(stored.get(key, {})).items()}
                for key in ("only", "denied")
            )
            header = cls(
                settings=MappingProxyType(dict(stored["settings"])),
                prompts=prompts,
                segments=tuple(
                    EditOrder.from_json(one) if "listed" in one else Segment.from_json(one)
                    for one in stored["segments"]
                ),
                rules={
                    name: Rule(only.get(name), denied.get(name, ()))
                    for name in prompts
                    if name in only or name in denied
                },
                fingerprint=str(stored["fingerprint"]),
                growing=None if stored.get("growing") is None else str(stored["growing"]),
                class_names={str(name): str(words) for name, words in dict(stored.get("class_names", {})).items()},
            )
            number = 0
            for segment in header.segments:
                if not (
                    segment.is_valid(len(prompts))
                    and segment.first_shard == number
                    and 1 <= segment.originals_per_shard < 2**62
                ):
                    raise ValueError(f"segment {segment}")
                number += segment.shard_count
        return header

    def check(self, store: Path, originals: int) -> None:
        """Raise StoreError if it names more originals than there are."""
        most = max((segment.rows.stop for segment in self.boxes), default=0)
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
    if store.is_file():
        hint = "; it may be a fractal bank: are edits and fractals swapped?" if store.suffix == ".npy" else "."
        raise StoreError(f"{str(store)!r} must be {kind.a_name}, which is a folder, found a file{hint}")
    remedy = "bring back a copy of it, or make a new store"
    elsewhere = f"use another folder (what has {other.magic!r}, the {other.name}, {other.use})"
    try:
        stored = read_json(file, kind.magic, remedy, elsewhere, newest=kind.newest)
    except FileNotFoundError as error:
        found = f"{str(store)!r}: there is no {kind.name} (store.json);"
        if holds_images(store):
            found = f"{str(store)!r} is a folder of images, not {kind.a_name}; give the one that was made of it, or"
        raise StoreError(f"{found} make one with `{kind.command} ROOT STORE`.") from error
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


def _npy(table: NDArray[Any]) -> bytes:
    content = io.BytesIO()
    np.save(content, table, allow_pickle=False)
    return content.getvalue()


def write_table(file: Path, table: NDArray[Any]) -> dict[str, Any]:
    """Write a .npy file; returns its entry for a JSON file."""
    return write_data(file, _npy(table))


def write_json(file: Path, magic: str, content: Mapping[str, Any], *, version: int = VERSION) -> None:
    write(file, json.dumps({"magic": magic, "version": version, **content}, indent=1).encode("ascii") + b"\n")


def read_json(
    file: Path, magic: str, remedy: str, elsewhere: str | None = None, *, newest: int = VERSION
) -> dict[str, Any]:
    """Read a JSON object of this magic. Raises FileNotFoundError, StoreError.

    Args:
        file: The file.
        magic: The expected magic.
        remedy: The remedy if it is damaged.
        elsewhere: The remedy if it has another magic; by default the same.
        newest: Its version may be 1 to this one.
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
    if version not in range(1, newest + 1):
        expected = VERSION if newest == VERSION else f"1 to {newest}"
        raise StoreError(
            f"{str(file)!r}: 'version' must be {expected}, found {version!r}; update dali_diffusemix to the release "
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
