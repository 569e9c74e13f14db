"""Packing: from a folder of originals to a packed store that replaces it.

    as it is:   file --decoded, to check it--> the same bytes; for most JPEGs the same coefficients, in tiles
    smaller:    file --decode, upright--> RGB --longest side to max_side--> JPEG

A shard is the unit of work: a killed run loses at most its open shard.
"""

import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dali_diffusemix.base.cpus import cpus
from dali_diffusemix.base.workers import Workers
from dali_diffusemix.catalog.headers import Rejected
from dali_diffusemix.catalog.listing import index
from dali_diffusemix.catalog.table import Catalog
from dali_diffusemix.errors import ConfigError, DecodeError, StoreError
from dali_diffusemix.images.codec import RESTARTS, decode, encode, tile
from dali_diffusemix.store import OriginalShardWriter, OriginalStore, OriginalStoreWriter, index_is_current
from dali_diffusemix.store.writer import local_folders

_log = logging.getLogger(__name__)

_LEFT_OUT: Final = "It could not be decoded when it was packed; copy it again or remove it."
_DEFAULT_QUALITY: Final = 90
# Originals in memory at once; few, since they may have any size.
_BATCH: Final = 32
_MOST_SIDE: Final = 65500  # libjpeg's limit


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Options of packing. With neither `max_side` nor `quality` no pixel changes.

    Raises ConfigError if a field breaks its rule.
    """

    max_side: int | None = None  # pixels; larger images are scaled down so that their longest side has this
    quality: int | None = None  # of the JPEGs, 1 to 100; 90 if only max_side is given
    tiled: bool = True  # divide JPEGs into tiles, which loading can cut out; False keeps files' bytes
    originals_per_shard: int = 512

    def __post_init__(self) -> None:
        for name, most in (("max_side", _MOST_SIDE), ("quality", 100), ("originals_per_shard", 2**20)):
            value = getattr(self, name)
            if value is None and name != "originals_per_shard":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ConfigError(f"{name} must be a whole number from 1 to {most}, found {value!r}.")
        if self.max_side is not None and self.quality is None:
            object.__setattr__(self, "quality", _DEFAULT_QUALITY)
        if self.quality is not None and not self.tiled:
            raise ConfigError("tiled=False leaves files as they are: leave it out, or max_side and quality.")

    def settings(self) -> dict[str, str | int | None]:
        """The settings that a packed store records: all that decides a packed original besides its file."""
        settings: dict[str, str | int | None] = {"max_side": self.max_side, "quality": self.quality}
        if self.quality is not None:
            settings |= {"resize": "lanczos", "subsampling": "4:2:0"}
        return settings | {"restarts": RESTARTS if self.tiled else None}


@dataclass(frozen=True, kw_only=True)
class PackSummary:
    """The result of a run."""

    originals: int  # in the store
    bytes: int  # of all their files
    left_out: tuple[Rejected, ...]  # by this or an earlier run, since they could not be decoded
    made: int  # originals that this run read, including those left out
    seconds: float


def pack(
    root: str | os.PathLike[str],
    store: str | os.PathLike[str],
    config: PackConfig | None = None,
    *,
    catalog: Catalog | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PackSummary:
    """Pack a folder's originals. Call again to resume an interrupted run.

    Args:
        root: The folder of originals.
        store: The packed store, a folder outside `root`.
        config: How to pack; by default pixels do not change.
        catalog: The originals to pack, with paths relative to `root`; by default `index(root)`.
        progress: Called with the number of originals done, also by earlier runs, and of all originals.

    Raises:
        ConfigError: The store lies inside the root, or the root is a packed store.
        CatalogError: The originals cannot be listed.
        StoreError: The store is of other originals or settings, another run writes to it, none of the originals can be
            decoded, or the disk is full: then finished shards stay, and the same call resumes.
    """
    begin = time.perf_counter()
    root, store = local_folders(root, store)
    config = config or PackConfig()
    if OriginalStore.find(root) is not None:
        raise ConfigError(f"root must be a folder of images, found a packed store, {str(root)!r}; pack its folder.")
    originals = index(root) if catalog is None else catalog
    with OriginalStoreWriter.open(store, originals, config.settings(), config.originals_per_shard) as writer:
        finished, total, made = writer.done(), len(writer.catalog), 0
        done = sum(map(Counter.total, finished.values()))
        if progress is not None:
            progress(done, total)
        prepare = partial(_prepare, root, writer.catalog, config)
        with Workers(cpus(), "dali-diffusemix-pack") as threads:
            for shard, rows in writer.shards().items():
                if shard in finished:
                    continue
                with OriginalShardWriter(store, writer.catalog, shard) as files:
                    for start in range(0, len(rows), _BATCH):
                        batch = rows[start : start + _BATCH]
                        for row, packed in zip(batch, threads.map(prepare, batch), strict=True):
                            if packed is None:
                                files.leave_out(row)
                            else:
                                files.add(row, *packed.file, height=packed.height, width=packed.width)
                        made += len(batch)
                        if progress is not None:
                            progress(done + made, total)
        if made or not _is_current(store):  # a finished store is never unfinished, not even for a moment
            writer.finish(_LEFT_OUT)
    packed_store = OriginalStore.open(store)
    return PackSummary(
        originals=len(packed_store),
        bytes=int(packed_store.index["length"].sum(dtype="int64")),
        left_out=tuple(one for one in packed_store.catalog.rejected if one.reason == _LEFT_OUT),
        made=made,
        seconds=time.perf_counter() - begin,
    )


def _is_current(store: Path) -> bool:
    try:
        return index_is_current(store)
    except StoreError:
        return False


@dataclass(frozen=True, kw_only=True)
class _Packed:
    """An original as it is stored."""

    file: tuple[str, bytes]  # extension, content
    height: int  # upright
    width: int


def _prepare(root: Path, catalog: Catalog, config: PackConfig, row: int) -> _Packed | None:
    """An original as it is stored; None, with a warning in the log, if it cannot be read."""
    path = catalog.path(row)
    try:
        content = (root / path).read_bytes()
        pixels = decode(content)
        height, width = pixels.shape[:2]
        if config.quality is None:
            content = _tiled(content, pixels) if config.tiled else content
            return _Packed(file=(_extension(path), content), height=height, width=width)
        height, width = _fitted(height, width, config.max_side)
        if max(height, width) > _MOST_SIDE:
            raise DecodeError(f"a JPEG has at most {_MOST_SIDE} pixels a side, found {max(height, width)}.")
    except (OSError, DecodeError) as error:
        _log.warning("%r is left out: %s", path, error)
        return None
    image = Image.fromarray(pixels)
    if (height, width) != pixels.shape[:2]:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return _Packed(file=("jpg", encode(image, config.quality)), height=height, width=width)


def _tiled(content: bytes, pixels: NDArray[np.uint8]) -> bytes:
    """A JPEG in tiles, if that changes no pixel; else the file as it is."""
    tiled = tile(content)
    return tiled if tiled is not None and np.array_equal(decode(tiled), pixels) else content


def _fitted(height: int, width: int, max_side: int | None) -> tuple[int, int]:
    """The size of an image scaled to a longest side of at most `max_side`: whole pixels, halves up, at least 1."""
    longest = max(height, width)
    if max_side is None or longest <= max_side:
        return height, width
    # floor(side · max_side / longest + ½), in integers.
    fitted_height, fitted_width = (max(1, (2 * side * max_side + longest) // (2 * longest)) for side in (height, width))
    return fitted_height, fitted_width


def _extension(path: str) -> str:
    """A file's own extension, in small letters; WebDataset and DALI tell file types by it."""
    match = re.search(r"\.([A-Za-z0-9]+)\Z", path)
    return match[1].lower() if match else "img"
