"""Packing: originals from anywhere, or the edits of a store, into a store that is faster to read.

    as it is:   file --decoded, to check it--> the same bytes; for most JPEGs the same coefficients, in tiles
    otherwise:  file --decode, upright--> RGB --longest side to max_side--> JPEG, PNG or raw pixels

A shard is the unit of work: a killed run loses at most its open shard.
"""

import logging
import os
import re
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dali_diffusemix.base.cpus import cpus
from dali_diffusemix.base.words import did_you_mean
from dali_diffusemix.base.workers import Workers
from dali_diffusemix.catalog.headers import Rejected
from dali_diffusemix.catalog.table import Catalog
from dali_diffusemix.errors import ConfigError, DecodeError, StoreError
from dali_diffusemix.images.codec import ENDINGS, RESTARTS, STORED, Stored, decode, encode_as, raw_header, tile
from dali_diffusemix.images.formats import format_of
from dali_diffusemix.sources import Source, source_of
from dali_diffusemix.sources.columns import LabelChoice
from dali_diffusemix.sources.folder import FolderSource
from dali_diffusemix.store.catalogs import rows_of, same_rows
from dali_diffusemix.store.decisions import Decisions
from dali_diffusemix.store.layout import ACCEPTED, NOT_YET, VERDICTS, Header, Settings, UnfinishedStoreWarning
from dali_diffusemix.store.mirror import is_url
from dali_diffusemix.store.readers import EditStore, OriginalStore, index_is_current
from dali_diffusemix.store.scores import copy_scores
from dali_diffusemix.store.shards import OriginalShardWriter, ShardWriter
from dali_diffusemix.store.writer import OriginalStoreWriter, StoreWriter, check_outside, local_folder

_log = logging.getLogger(__name__)

_DEFAULT_QUALITY: Final = 90
# Originals in memory at once; few, since they may have any size.
_BATCH: Final = 32
_MOST_SIDE: Final = 65500  # libjpeg's limit
_BLOCK: Final = 512  # bytes, of which files in a tar and their headers are multiples
_TABLES: Final = 150  # bytes of an image's rows in all tables, nearly
# The endings of files that are kept as they are: WebDataset and DALI tell file types by them.
_KEPT: Final = {"JPEG": "jpg", "PNG": "png", "BMP": "bmp", "TIFF": "tif", "PPM": "ppm", "WEBP": "webp"}

Content: TypeAlias = bytes | NDArray[np.uint8] | DecodeError
"""An image of a source: its file, or its (height, width, 3) uint8 pixels, or why there is none."""


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Options of packing. With none of `max_side`, `quality` and `format="jpeg"` no pixel changes.

    Raises ConfigError if a field breaks its rule.
    """

    format: Stored | None = None  # of the images: "raw" pixels, "png", "jpeg"; None keeps the files that there are
    max_side: int | None = None  # pixels; larger images are scaled down so that their longest side has this
    quality: int | None = None  # of JPEGs, 1 to 100; 90 unless given
    tiled: bool = True  # divide JPEGs into tiles, which loading can cut out; False keeps files' bytes
    originals_per_shard: int = 512

    def __post_init__(self) -> None:
        for name, most in (("max_side", _MOST_SIDE), ("quality", 100), ("originals_per_shard", 2**20)):
            value = getattr(self, name)
            if value is None and name != "originals_per_shard":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ConfigError(f"{name} must be a whole number from 1 to {most}, found {value!r}.")
        if self.format is not None and self.format not in STORED:
            raise ConfigError(
                f"format must be one of {', '.join(STORED)} or None, found {self.format!r}"
                f"{did_you_mean(self.format, STORED)}"
            )
        if self.format is None and (self.max_side is not None or self.quality is not None):
            object.__setattr__(self, "format", "jpeg")
        if self.format == "jpeg":
            object.__setattr__(self, "quality", self.quality or _DEFAULT_QUALITY)
        elif self.quality is not None:
            raise ConfigError(f"quality is that of JPEGs: leave it out beside format={self.format!r}.")
        if self.format is not None and not self.tiled:
            raise ConfigError("tiled=False leaves files as they are: leave it out, or max_side, quality and format.")

    def settings(self) -> dict[str, str | int | None]:
        """The settings that a packed store records: all that decides a packed original besides its file."""
        settings: dict[str, str | int | None] = {"max_side": self.max_side, "quality": self.quality}
        if self.format in ("png", "raw"):
            settings["format"] = self.format
        if self.max_side is not None or self.format == "jpeg":
            settings["resize"] = "lanczos"
        if self.format == "jpeg":
            settings["subsampling"] = "4:2:0"
        return settings | {"restarts": RESTARTS if self.tiled and self.format in (None, "jpeg") else None}

    def bytes_of(self, sizes: NDArray[np.int32]) -> int | None:
        """Bytes of a store of raw images of (n, 2) heights and widths; None for other formats, of which nobody knows.

        Exact but for the ends of tars and for names, which are long where they have more than 30 letters.
        """
        if self.format != "raw":
            return None
        height, width = _fitted(sizes, self.max_side).T.astype(np.int64)
        digits = sum(np.floor(np.log10(side)) for side in (height, width)) - 2  # beyond one each
        length = len(raw_header(1, 1)) + 2 + digits.astype(np.int64) + 3 * height * width
        return int((_blocks(length) + _TABLES).sum())


@dataclass(frozen=True, kw_only=True)
class PackSummary:
    """The result of a run."""

    images: int  # in the store: originals, or accepted edits
    bytes: int  # of all their files
    left_out: tuple[Rejected, ...]  # by this or an earlier run, by file (and row), with the reason
    made: int  # images that this run read, including those left out
    seconds: float


def pack(
    source: Any,
    store: str | os.PathLike[str],
    config: PackConfig | None = None,
    *,
    catalog: Catalog | None = None,
    kind: str | None = None,
    image: str | None = None,
    label: LabelChoice = None,
    split: str = "train",
    progress: Callable[[int, int], None] | None = None,
) -> PackSummary:
    """Pack originals from anywhere, or the edits of a store. Call again to resume an interrupted run.

    Args:
        source: A folder of class folders or of a published dataset, WebDataset tars, Parquet files, a
            `datasets.Dataset`, a map-style dataset of (image, label), arrays (images, labels), or an edit store:
            see `dali_diffusemix.sources.source_of`, which also takes `kind`, `image`, `label` and `split`.
        store: The packed store, a folder outside the source.
        config: How to pack. By default files stay as they are; arrays and edits become raw images.
        catalog: The originals of a folder to pack, with paths relative to it; by default `index(source)`.
        kind, image, label, split: What the source is, where it does not show.
        progress: Called with the number of images done, also by earlier runs, and of all images.

    Raises:
        ConfigError: The store lies inside the source, the source is packed already, or an option does not fit it.
        CatalogError: The originals cannot be listed.
        StoreError: The store is of other images or settings, another run writes to it, no original can be decoded, or
            the disk is too small or full: then finished shards stay, and the same call resumes.
        MissingDependencyError: The library that reads the source is not installed.
    """
    config = config or PackConfig()
    source = source_to_pack(source, catalog=catalog, kind=kind, image=image, label=label, split=split)
    store = local_folder("store", store)
    for folder in [source.path] if isinstance(source, EditStore) else source.folders:
        check_outside(folder, store)
    if isinstance(source, EditStore):
        return _pack_edits(source, store, config, progress)
    return _pack_originals(source, store, config, progress)


def source_to_pack(
    source: Any,
    *,
    catalog: Catalog | None = None,
    kind: str | None = None,
    image: str | None = None,
    label: LabelChoice = None,
    split: str = "train",
) -> Source | EditStore:
    """The source that `pack` would take; it raises what that does."""
    options = {"catalog": catalog, "kind": kind, "image": image, "label": label, "split": split}
    if isinstance(source, EditStore):
        _refuse(f"the edit store {str(source.path)!r}", options)
        if source.mirror is not None:
            raise ConfigError(f"source must be a local edit store, found {source.mirror.url!r}; pack a copy of it.")
        return EditStore.open(source.path)  # it may be reindexed, or have grown
    if isinstance(source, Source):
        _refuse(source.name, options)
        return source
    if isinstance(source, str | os.PathLike) and not is_url(source):
        folder = Path(source).absolute()
        if (edits := EditStore.find(folder)) is not None:
            _refuse(f"the edit store {str(folder)!r}", options)
            return edits
        if OriginalStore.find(folder) is not None:
            raise ConfigError(
                f"source must be images, found a packed store, {str(folder)!r}; pack what it was made from."
            )
        if catalog is not None:
            _refuse("a catalog", {**options, "catalog": None})
            return FolderSource.of_catalog(folder, catalog)
    if catalog is not None:
        raise ConfigError(f"catalog is of a local folder, found it beside a {type(source).__name__}; leave it out.")
    return source_of(source, kind=kind, image=image, label=label, split=split)


def _refuse(what: str, options: Mapping[str, object]) -> None:
    """Raise ConfigError for options that say what a source is, beside one that is known."""
    for name, value in options.items():
        if value is not None and (name, value) != ("split", "train"):
            raise ConfigError(f"{name} does not apply to {what}, found {value!r}; leave it out.")


def packed_bytes(source: Source | EditStore, config: PackConfig) -> int | None:
    """Bytes that a store of raw images will take, nearly; None for other formats, of which nobody knows."""
    if isinstance(source, EditStore):
        return _edit_bytes(_resolved(config, raw=True), [source.shard_rows(shard) for shard in source.shards])
    return _resolved(config, raw=source.pixels).bytes_of(source.catalog().sizes)


def _resolved(config: PackConfig, *, raw: bool) -> PackConfig:
    """The config with the format of what has no files to keep. Raises ConfigError if they are to be kept."""
    if not raw or config.format is not None:
        return config
    if not config.tiled:
        raise ConfigError("tiled=False leaves files as they are, and arrays and edits become raw images: leave it out.")
    return replace(config, format="raw")


def _pack_originals(
    source: Source, store: Path, config: PackConfig, progress: Callable[[int, int], None] | None
) -> PackSummary:
    begin = time.perf_counter()
    config = _resolved(config, raw=source.pixels)
    with OriginalStoreWriter.open(store, source.catalog(), config.settings(), config.originals_per_shard) as writer:
        shards, finished = writer.shards(), writer.done()
        missing = {shard: rows for shard, rows in shards.items() if shard not in finished}
        sizes = [writer.catalog.sizes[rows.start : rows.stop] for rows in missing.values()]
        if sizes:
            _check_room(store, config.bytes_of(np.concatenate(sizes)))
        count = _Count(progress, sum(map(Counter.total, finished.values())), len(writer.catalog))
        with (
            Workers(cpus(), "dali-diffusemix-pack") as threads,
            closing(_contents(source, writer.catalog, missing.values())) as contents,
        ):
            for shard, rows in missing.items():
                with OriginalShardWriter(store, writer.catalog, shard) as files:
                    packed = _in_batches(threads, partial(_packed, config), islice(contents, len(rows)))
                    for row, one in zip(rows, packed, strict=True):
                        if isinstance(one, DecodeError):
                            _log.warning("%r is left out: %s", writer.catalog.path(row), one)
                            files.leave_out(row, str(one))
                        else:
                            ending, content = one.file
                            if config.format is None:
                                ending = _ending(writer.catalog.path(row)) or ending
                            files.add(row, ending, content, height=one.height, width=one.width)
                        count.add()
                count.end_shard()
        if missing or not _is_current(store):  # a finished store is never unfinished, not even for a moment
            writer.finish()
    packed_store = OriginalStore.open(store)
    return PackSummary(
        images=len(packed_store),
        bytes=int(packed_store.index["length"].sum(dtype="int64")),
        left_out=packed_store.catalog.rejected,
        made=count.made,
        seconds=time.perf_counter() - begin,
    )


def _contents(source: Source, listed: Catalog, wanted: Iterable[range]) -> Generator[Content, None, None]:
    """The content of these rows of the store's list, by path: the source may list the same in another order.

    Rows that follow one another are read at once: beginning within a row group or a compressed tar takes long.
    """
    rows = np.concatenate([np.zeros(0, np.int64), *(np.arange(one.start, one.stop) for one in wanted)])
    if not same_rows(source.catalog(), listed):
        rows = rows_of(source.catalog(), listed)[rows]
    for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
        if len(run):
            yield from source.read(range(int(run[0]), int(run[-1]) + 1))


def _pack_edits(
    edits: EditStore, store: Path, config: PackConfig, progress: Callable[[int, int], None] | None
) -> PackSummary:
    """Pack an edit store, shard for shard: all its rows, with what quality rejected as it is."""
    begin = time.perf_counter()
    config = _resolved(config, raw=True)
    header = Header.read(edits.path)
    tables = {number: edits.shard_rows(number) for number in edits.shards}
    lacking = header.shard_count - len(tables)
    not_yet = sum(int((table["verdict"] == _NOT_YET).sum()) for table in tables.values())
    if lacking or not_yet:
        raise StoreError(
            f"{str(edits.path)!r}: the edit store is not finished ({lacking} shards and {not_yet} edits of others are "
            "missing); run the `dali-diffusemix generate` that makes it again, then pack it."
        )
    with StoreWriter.open(store, edits.catalog, _settings_of(edits.settings, config)) as writer:
        writer.order_as(edits.path)
        finished = writer.done()
        missing = [shard for shard in writer.shards() if shard.number not in finished]
        _check_room(store, _edit_bytes(config, [tables[shard.number] for shard in missing]))
        count = _Count(progress, sum(map(Counter.total, finished.values())), sum(map(len, header.shards(edits.path))))
        with Workers(cpus(), "dali-diffusemix-pack") as threads:
            for shard in missing:
                table = tables[shard.number]
                contents = ((row, edits.encoded_row(shard.number, row)) for row in table)
                with ShardWriter(store, writer.catalog, shard) as files:
                    prepared = _in_batches(threads, partial(_packed_edit, config, edits), contents)
                    for row, one in zip(table, prepared, strict=True):
                        files.add(
                            *(int(row[name]) for name in ("original", "prompt", "variant")),
                            seed=int(row["seed"]),
                            image=None if one is None else one.file[1],
                            height=0 if one is None else one.height,
                            width=0 if one is None else one.width,
                            verdict=VERDICTS[row["verdict"]],
                            score=float(row["score"]),
                            ending=None if one is None else one.file[0],
                        )
                        count.add()
                count.end_shard()
        if missing or not _is_current(store):
            writer.finish()
    rejected = Decisions.of(edits.path).rejected() - Decisions.of(store).rejected()
    if rejected:
        Decisions.of(store).add("reject", sorted(rejected))  # a packed edit keeps its name
    copy_scores(edits.path, store)
    packed_store = EditStore.open(store)
    return PackSummary(
        images=len(packed_store),
        bytes=int(packed_store.index["length"].sum(dtype="int64")),
        left_out=(),
        made=count.made,
        seconds=time.perf_counter() - begin,
    )


_NOT_YET: Final = VERDICTS.index(NOT_YET)


def _edit_bytes(config: PackConfig, tables: Sequence[NDArray[np.void]]) -> int | None:
    """Bytes of packed shards of edits, see `PackConfig.bytes_of`; rejected ones stay as they are."""
    needed = 0
    for table in tables:
        accepted = table["verdict"] == VERDICTS.index(ACCEPTED)
        raw = config.bytes_of(np.stack([table["height"], table["width"]], axis=1)[accepted])
        if raw is None:
            return None
        rejected = table["length"][~accepted]
        needed += raw + int(_blocks(rejected[rejected > 0]).sum()) + table.itemsize * len(rejected)
    return needed


def _settings_of(settings: Settings, config: PackConfig) -> Settings:
    """The settings of an edit store, packed."""
    packed = {"packed_" + name: value for name, value in config.settings().items() if value is not None}
    assert config.format is not None
    return {**settings, "format": config.format, **{name: packed[name] for name in packed if name != "packed_format"}}


class _Count:
    """Counts images, for `progress`."""

    def __init__(self, progress: Callable[[int, int], None] | None, done: int, total: int) -> None:
        self._progress, self._done, self._total = progress, done, total
        self.made = self._told = 0
        self._tell()

    def add(self) -> None:
        """Count one."""
        self.made += 1
        if self.made - self._told == _BATCH:
            self._tell()

    def end_shard(self) -> None:
        """Tell the rest."""
        if self.made > self._told:
            self._tell()

    def _tell(self) -> None:
        self._told = self.made
        if self._progress is not None:
            self._progress(self._done + self.made, self._total)


def _check_room(store: Path, needed: int | None) -> None:
    """Raise StoreError if the disk has less room than that."""
    if needed is None:
        return
    free = shutil.disk_usage(store).free
    if needed > free:
        raise StoreError(
            f"{str(store)!r}: the store will take {needed / 1e9:.2f} GB ({needed} bytes) more, and {free / 1e9:.2f} GB "
            "are free on that disk; make room, name a folder elsewhere, or pack with max_side or in another format."
        )


def _is_current(store: Path) -> bool:
    """True if a store of finished shards has the tables of these shards."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UnfinishedStoreWarning)  # edit stores are read without their tables, too
            return index_is_current(store)
    except (StoreError, UnfinishedStoreWarning):
        return False


def _in_batches(threads: Workers, prepare: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """The results of `prepare`, in order; few items are in memory at once."""
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == _BATCH:
            yield from threads.map(prepare, batch)
            batch = []
    yield from threads.map(prepare, batch)


@dataclass(frozen=True, kw_only=True)
class _Packed:
    """An image as it is stored."""

    file: tuple[str, bytes]  # ending, content
    height: int  # upright
    width: int


def _packed(config: PackConfig, content: Content) -> _Packed | DecodeError:
    """An image as it is stored, or why it cannot be."""
    if isinstance(content, DecodeError):
        return content
    try:
        pixels = decode(content) if isinstance(content, bytes) else content
        height, width = pixels.shape[:2]
        if config.format is None:
            assert isinstance(content, bytes)
            file = (_kept(content), _tiled(content, pixels) if config.tiled else content)
            return _Packed(file=file, height=height, width=width)
        height, width = _fitted(np.array([[height, width]], dtype=np.int32), config.max_side)[0].tolist()
        if config.format == "jpeg" and max(height, width) > _MOST_SIDE:
            raise DecodeError(f"a JPEG has at most {_MOST_SIDE} pixels a side, found {max(height, width)}.")
    except DecodeError as error:
        return error
    image: Image.Image | NDArray[np.uint8] = pixels
    if (height, width) != pixels.shape[:2]:
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
    file = (ENDINGS[config.format], encode_as(config.format, image, config.quality))
    return _Packed(file=file, height=height, width=width)


def _packed_edit(config: PackConfig, edits: EditStore, edit: tuple[np.void, bytes | None]) -> _Packed | None:
    """An edit as it is stored; one that was rejected as it is. Raises StoreError for a damaged one."""
    row, content = edit
    if content is None:
        return None
    if VERDICTS[row["verdict"]] != ACCEPTED:
        return _Packed(file=(_kept(content), content), height=int(row["height"]), width=int(row["width"]))
    packed = _packed(config, content)
    if isinstance(packed, DecodeError):
        raise StoreError(
            f"{str(edits.path)!r}: the edit of {edits.catalog.path(int(row['original']))!r} under "
            f"{edits.prompts[int(row['prompt'])]!r} is damaged ({packed}); run `dali-diffusemix verify --discard` on "
            "the store, and `generate` again to replace it."
        )
    return packed


def _kept(content: bytes) -> str:
    """The ending of a file that is kept as it is."""
    return _KEPT[format_of(content[:4096]) or "JPEG"]


def _blocks(length: NDArray[np.integer]) -> NDArray[np.int64]:
    """Bytes that files of these lengths take in a tar, with their headers."""
    return _BLOCK + -(-length.astype(np.int64) // _BLOCK) * _BLOCK


def _ending(path: str) -> str | None:
    """A file's own ending, in small letters."""
    match = re.search(r"\.([A-Za-z0-9]+)\Z", path)
    return match[1].lower() if match else None


def _tiled(content: bytes, pixels: NDArray[np.uint8]) -> bytes:
    """A JPEG in tiles, if that changes no pixel; else the file as it is."""
    tiled = tile(content)
    return tiled if tiled is not None and np.array_equal(decode(tiled), pixels) else content


def _fitted(sizes: NDArray[np.int32], max_side: int | None) -> NDArray[np.int64]:
    """(n, 2) sizes scaled to a longest side of at most `max_side`: whole pixels, halves up, at least 1."""
    found = np.asarray(sizes, dtype=np.int64)
    if max_side is None:
        return found
    longest = found.max(axis=1, keepdims=True)
    # floor(side · max_side / longest + ½), in integers.
    return np.where(longest <= max_side, found, np.maximum(1, (2 * found * max_side + longest) // (2 * longest)))
