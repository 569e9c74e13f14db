"""The edits of a store as people look at them: `report` writes this view into files, `review` serves it.

A gallery is one page. It holds a few numbers about each edit (`EditView.columns`), so that it filters and sorts a
hundred thousand at once; the rest of an edit (`EditView.details`) and its images come when they are scrolled into view.
"""

import base64
import html
import io
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dali_diffusemix import __version__
from dali_diffusemix.errors import DecodeError, StoreError
from dali_diffusemix.images.codec import decode
from dali_diffusemix.inspect.originals import FoundOriginals, runs_of
from dali_diffusemix.store import DENIED, NOT_YET, REJECTIONS, SHARD_ROW, VERDICTS, EditStore
from dali_diffusemix.store.decisions import Decisions, EditName
from dali_diffusemix.store.scores import Scores
from dali_diffusemix.store.selection import rejected_by_hand

ASSETS: Final = Path(__file__).parent / "assets"
CHUNK: Final = 240  # edits whose details are loaded at once
SMALL: Final = 64  # pixels; the longest side of images that JPEG would spoil
ROW: Final = np.dtype([*SHARD_ROW.descr, ("shard", "<i4"), ("row", "<i4"), ("shown", "u1")])
"""An edit: its row in its shard, where that is, and its verdict now: denied, if its class no longer has its prompt."""
_ACCEPTED: Final = 0  # in VERDICTS
_UNREADABLE: Final = 1
_BINS: Final = 20


def current_rows(edits: EditStore) -> NDArray[np.void]:
    """(n,) ROW of the edits of a store as they are at present, accepted or not, by original, prompt and variant.

    An edit that was made again, in a later shard, takes the place of the earlier one.

    Raises:
        StoreError: A shard's table is missing or damaged.
    """
    parts = [np.zeros(0, ROW)]
    for shard in edits.shards:
        rows = edits.shard_rows(shard)
        part = np.zeros(len(rows), ROW)
        for name in SHARD_ROW.names or ():
            part[name] = rows[name]
        part["shard"], part["row"] = shard, np.arange(len(rows))
        parts.append(part)
    rows = np.concatenate(parts)
    made = rows["verdict"] != VERDICTS.index(NOT_YET)
    rows = rows[np.lexsort((rows["shard"], made, rows["variant"], rows["prompt"], rows["original"]))]
    key = rows[["original", "prompt", "variant"]]
    last = np.ones(len(rows), bool)
    last[:-1] = key[1:] != key[:-1]
    rows = rows[last]
    rows["shown"] = np.where(edits.are_wanted(rows), rows["verdict"], VERDICTS.index(DENIED))
    return rows


def scores_of(edits: EditStore, rows: NDArray[np.void]) -> dict[str, NDArray[np.float32]]:
    """The scores of edits, (n,) ROW, by name, each (n,); NaN: none. The lowest are the worst.

    "score" is that of the verdict; the others are those that `dali-diffusemix score` made. Damaged ones are left out.
    """
    found = {"score": np.asarray(rows["score"], np.float32)}
    for name in Scores.names(edits.path):
        column = np.full(len(rows), np.nan, np.float32)
        with suppress(StoreError):  # `verify` reports it
            scores = Scores.open(edits.path, name)
            for shard in np.unique(rows["shard"]).tolist():
                values = scores.column(shard, edits.shard_rows(shard))
                if values is not None:
                    here = rows["shard"] == shard
                    column[here] = values[rows["row"][here]]
            found[name] = column
    return found


@dataclass(frozen=True)
class EditView:
    """The edits of a store, their originals, and what people decided about them.

    Args:
        edits: The store.
        originals: Its originals.
        rows: (n,) ROW: the edits that are shown.
    """

    edits: EditStore
    originals: FoundOriginals
    rows: NDArray[np.void]

    @property
    def decisions(self) -> Decisions:
        """Those about this store."""
        return Decisions.of(self.edits.path)

    def name(self, place: int) -> EditName:
        """The name of an edit, by its place in `rows`."""
        row = self.rows[place]
        path = self.edits.catalog.path(int(row["original"]))
        return EditName(path, self.edits.prompts[row["prompt"]], int(row["variant"]), int(row["shard"]))

    def accepted(self) -> NDArray[np.bool_]:
        """(n,) True for edits that are trained on unless a person rejects them."""
        return np.asarray(self.rows["shown"] == _ACCEPTED)

    def rejected(self) -> NDArray[np.bool_]:
        """(n,) True for edits that a person rejected. Raises StoreError."""
        shards = self.rows["shard"].astype(np.int64)
        names = self.decisions.rejected()
        return self.accepted() & rejected_by_hand(names, self.rows, shards, self.edits.catalog, self.edits.prompts)

    def places(self, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) the places in `rows` of edits given as (n, 2) shard and row in it; -1: there is no such edit."""
        keys, order = self._keys
        wanted = pairs[:, 0] << 32 | pairs[:, 1]
        found = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
        there = (pairs >= 0).all(1) & (pairs < 2**31).all(1)
        there &= keys[found] == wanted if len(keys) else False
        return np.where(there, order[found] if len(keys) else -1, -1)

    @cached_property
    def _keys(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(n,) shard and row as one number, sorted; (n,) the place of each."""
        keys = self.rows["shard"].astype(np.int64) << 32 | self.rows["row"]
        order = np.argsort(keys)
        return keys[order], order

    def columns(self) -> dict[str, Any]:
        """The numbers of all edits, as base64 of little-endian arrays. Raises StoreError."""
        labels = self.edits.catalog.labels[self.rows["original"]]
        whole = {"shard": self.rows["shard"], "row": self.rows["row"], "class": labels, "prompt": self.rows["prompt"]}
        return {
            **{name: _base64(column.astype("<i4")) for name, column in whole.items()},
            "verdict": _base64(self.rows["shown"].astype("u1")),
            "rejected": self.rejected_column(),
            "scores": {
                name: _base64(column.astype("<f4")) for name, column in scores_of(self.edits, self.rows).items()
            },
        }

    def rejected_column(self) -> str:
        """The column that people change. Raises StoreError."""
        return _base64(self.rejected().astype("u1"))

    def details(self, chunk: int) -> list[dict[str, Any]]:
        """The rest of what a page shows of the edits of a chunk."""
        return [self._detail(row) for row in self.rows[chunk * CHUNK : (chunk + 1) * CHUNK]]

    def _detail(self, row: np.void) -> dict[str, Any]:
        original = int(row["original"])
        catalog = self.edits.catalog
        there = self.originals.found and row["verdict"] != _UNREADABLE
        return {
            "path": readable(catalog.path(original)),
            "original": original,
            "originalSize": catalog.sizes[original].tolist() if there else None,
            "size": [int(row["height"]), int(row["width"])] if row["length"] else None,
            "variant": int(row["variant"]),
            "seed": str(row["seed"]),
        }

    def file(self, place: int) -> bytes | None:
        """An edit's file; None if it has no image. Raises StoreError: the shard is missing or cut short."""
        row = self.rows[place]
        return self.edits.encoded_row(int(row["shard"]), row)

    def pixels(self, place: int) -> NDArray[np.uint8] | None:
        """(height, width, 3) uint8 of an edit; None if it has no image or a damaged one, which `verify` reports.

        Raises:
            StoreError: The shard is missing or cut short.
        """
        data = self.file(place)
        try:
            return None if data is None else decode(data)
        except DecodeError:
            return None

    def content(self, every: NDArray[np.void], *, writable: bool) -> dict[str, Any]:
        """All that the page holds.

        Args:
            every: (m,) ROW: the edits that are counted.
            writable: The page can change decisions.

        Raises:
            StoreError: The decisions are damaged.
        """
        edits = self.edits
        tally = np.zeros((len(edits.catalog.classes), len(edits.prompts), len(VERDICTS)), np.int64)
        np.add.at(tally, (edits.catalog.labels[every["original"]], every["prompt"], every["shown"]), 1)
        runs = runs_of(edits.path)
        return {
            "store": readable(str(edits.path)),
            "version": __version__,
            "writable": writable,
            "decisions": readable(str(self.decisions.file)),
            "originals": len(edits.catalog),
            "beside": self.originals.found,
            "classes": [readable(name) for name in edits.catalog.classes],
            "prompts": [readable(name) for name in edits.prompts],
            "verdicts": list(VERDICTS),
            "rejections": list(REJECTIONS),
            "settings": {readable(str(name)): readable(str(value)) for name, value in edits.settings.items()},
            "tally": tally.tolist(),
            "histograms": _histograms(every),
            "runs": {
                "count": len(runs),
                "seconds": sum(_number(run.get("seconds")) for run in runs),
                "edits": sum(_number(run.get("edits")) for run in runs),
                "hosts": sorted({readable(str(run.get("host"))) for run in runs}),
            },
            "count": len(self.rows),
            "chunk": CHUNK,
            "columns": self.columns(),
        }

    def page(self, content: Mapping[str, Any], policy: str) -> str:
        """The HTML of the page, with its content and Content-Security-Policy."""
        # In a script element only what could end it is escaped.
        data = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
        title = "/".join(self.edits.path.parts[-2:])
        fields = {"title": html.escape(readable(title)), "policy": html.escape(policy), "data": data}
        parts = (ASSETS / "gallery.html").read_text(encoding="utf-8").split("{{")
        return parts[0] + "".join(fields[name] + rest for name, _, rest in (part.partition("}}") for part in parts[1:]))


def shrunk(pixels: NDArray[np.uint8], most: int) -> Image.Image:
    """An image of (height, width, 3) pixels, made smaller if a side has more than `most`."""
    image = Image.fromarray(pixels)
    if max(image.size) <= most:
        return image
    scale = most / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


def encoded(image: Image.Image, *, lossless: bool = False) -> tuple[str, bytes]:
    """The media type and file of a picture: a JPEG; a PNG if it is small or must not lose anything."""
    stream = io.BytesIO()
    if lossless or max(image.size) <= SMALL:
        image.save(stream, "PNG")
        return "image/png", stream.getvalue()
    image.save(stream, "JPEG", quality=90)
    return "image/jpeg", stream.getvalue()


def readable(text: str) -> str:
    """Text without control characters, and without bytes of file names that are not UTF-8: these are escaped."""
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte that is not UTF-8, as Python holds it in names
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _histograms(rows: NDArray[np.void]) -> dict[str, list[int]]:
    """Verdict to the number of its edits with a score in each twentieth of 0 to 1."""
    found = {}
    for verdict in np.unique(rows["verdict"]).tolist():
        values = rows["score"][rows["verdict"] == verdict]
        values = values[np.isfinite(values)]
        if len(values):
            counts, _ = np.histogram(np.clip(values, 0, 1), bins=_BINS, range=(0, 1))
            found[VERDICTS[verdict]] = counts.tolist()
    return found


def _base64(column: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(column).tobytes()).decode("ascii")
