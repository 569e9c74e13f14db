"""A gallery of an edit store: static pages that open from disk, without a server or files from elsewhere.

    report/index.html            settings, counts and verdicts; filters; the gallery
           gallery.css, gallery.js
           data/rows-0000.js     a page of edits; a script, because a page opened from disk may not fetch files
           data/sheet-0000.jpg   the thumbnails of the page, in one picture

A page of the gallery loads when it scrolls into view, so that ten thousand edits open as fast as ten.
"""

import html
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dali_diffusemix import __version__
from dali_diffusemix.base.cpus import cpus
from dali_diffusemix.base.workers import Workers
from dali_diffusemix.errors import ConfigError, DecodeError
from dali_diffusemix.images.codec import decode
from dali_diffusemix.inspect.originals import FoundOriginals, last_root, runs_of
from dali_diffusemix.store import REJECTIONS, VERDICTS, EditStore

__all__ = ["Gallery", "write_report"]

_SIDE: Final = 96  # pixels of a thumbnail
_PER_PAGE: Final = 120  # thumbnails, originals included; twelve in a row
_ACROSS: Final = 12
_BINS: Final = 20
_ASSETS: Final = Path(__file__).parent / "assets"


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """A gallery that was written."""

    page: Path
    edits: int  # shown
    of: int  # in the store
    originals: bool  # True if originals are shown beside their edits


def write_report(
    store: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    most: int = 10_000,
    progress: Callable[[int, int], None] | None = None,
) -> Gallery:
    """Write the gallery of a store.

    Args:
        store: The edit store's folder.
        out: A folder that is new, empty, or has an earlier report, which is replaced.
        root: The originals, a folder or a packed store; by default the root of the last run that made edits.
        most: Maximum number of edits shown; if there are more, an even selection of originals. All are counted.
        progress: Called with the number of edits drawn, and of all that will be.

    Raises:
        StoreError: There is no such store.
        ConfigError: `out` has other files or cannot be written, or `root` does not exist.
    """
    edits = EditStore.open(store)
    runs = runs_of(edits.path)
    if root is not None and not Path(root).is_dir():
        raise ConfigError(f"root must be the folder of the originals, found {str(root)!r}, which is not a folder.")
    originals = FoundOriginals(edits, root if root is not None else last_root(runs))
    out = Path(out).absolute()
    tally = np.zeros((len(edits.catalog.classes), len(edits.prompts), len(VERDICTS)), np.int64)
    scores: dict[str, list[NDArray[np.float32]]] = {}
    tables = []
    for shard in edits.shards:
        rows = edits.shard_rows(shard)
        np.add.at(tally, (edits.catalog.labels[rows["original"]], rows["prompt"], rows["verdict"]), 1)
        for verdict in np.unique(rows["verdict"]).tolist():
            scores.setdefault(VERDICTS[verdict], []).append(rows["score"][rows["verdict"] == verdict])
        tables.append(np.stack([np.full(len(rows), shard), np.arange(len(rows)), rows["original"], rows["verdict"]], 1))
    chosen = _chosen(np.concatenate(tables), most)
    try:
        _prepare(out)
        pages = list(_write_pages(out, edits, originals, chosen, progress))
        content = _summary(edits, tally, scores, runs, pages, len(chosen), originals.found)
        (out / "index.html").write_text(_page(edits.path.name, content), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"out must be a folder that can be written, found {str(out)!r}: {error}; name another."
        ) from error
    return Gallery(page=out / "index.html", edits=len(chosen), of=int(tally.sum()), originals=originals.found)


def _prepare(out: Path) -> None:
    ours = out / "gallery.js"
    if out.is_dir() and any(out.iterdir()) and not ours.is_file():
        raise ConfigError(
            f"out must be a new or empty folder, or an earlier report, found other files in {str(out)!r}; name another."
        )
    (out / "data").mkdir(parents=True, exist_ok=True)
    for old in (out / "data").iterdir():
        old.unlink()
    for asset in ("gallery.css", "gallery.js"):
        shutil.copyfile(_ASSETS / asset, out / asset)


def _chosen(rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """(n, 4) shard, row in it, original, verdict of the edits to show, by original: all, or a selection."""
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0], rows[:, 2]))]
    if len(rows) <= most:
        return rows
    # Up to half of them are originals with an edit that was not accepted: people look for these.
    bad = np.unique(rows[rows[:, 3] != 0, 2])
    good = np.setdiff1d(rows[:, 2], bad)
    room = max(1, most * (len(bad) + len(good)) // len(rows))
    bad = _spread(bad, max(room // 2, room - len(good)))
    shown = np.concatenate([bad, _spread(good, room - len(bad))])
    return rows[np.isin(rows[:, 2], shown)][:most]


def _spread(values: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most so many of the values, evenly spread."""
    return values if len(values) <= most else values[np.linspace(0, len(values) - 1, most).astype(np.int64)]


def _write_pages(
    out: Path,
    edits: EditStore,
    originals: FoundOriginals,
    chosen: NDArray[np.int64],
    progress: Callable[[int, int], None] | None,
) -> Iterator[dict[str, Any]]:
    """Write the pages; yields the entry of each in the index: the verdicts, prompts and classes that occur."""
    tables: dict[int, NDArray[np.void]] = {}
    groups = np.split(chosen, np.flatnonzero(np.diff(chosen[:, 2])) + 1) if len(chosen) else []
    page: list[NDArray[np.int64]] = []
    done = number = 0
    with Workers(cpus(), "dali-diffusemix-report") as pool:
        for index, group in enumerate(groups):
            page.append(group)
            if sum(len(one) + 1 for one in page) < _PER_PAGE and index + 1 < len(groups):
                continue
            shards = {int(row[0]) for one in page for row in one}
            tables = {shard: tables[shard] if shard in tables else edits.shard_rows(shard) for shard in shards}
            yield _write_page(out, number, edits, originals, page, tables, pool)
            done += sum(map(len, page))
            number, page = number + 1, []
            if progress is not None:
                progress(done, len(chosen))


def _write_page(
    out: Path,
    number: int,
    edits: EditStore,
    originals: FoundOriginals,
    page: list[NDArray[np.int64]],
    tables: Mapping[int, NDArray[np.void]],
    pool: Workers,
) -> dict[str, Any]:
    catalog = edits.catalog
    thumbnails: list[Callable[[], NDArray[np.uint8] | None]] = []
    groups: list[dict[str, Any]] = []
    for group in page:
        original = int(group[0, 2])
        shown: dict[str, Any] = {"path": _readable(catalog.path(original)), "class": int(catalog.labels[original])}
        if originals.found:
            shown["at"] = len(thumbnails)
            thumbnails.append(partial(originals.pixels, original))
        shown["edits"] = []
        for shard, index, _, verdict in group.tolist():
            row = tables[shard][index]
            score = float(row["score"])
            edit = {
                "prompt": int(row["prompt"]),
                "variant": int(row["variant"]),
                "verdict": verdict,
                "score": None if np.isnan(score) else round(score, 4),
                "seed": str(row["seed"]),
            }
            if row["length"]:
                edit["at"] = len(thumbnails)
                thumbnails.append(partial(_edit_pixels, edits, shard, row))
            shown["edits"].append(edit)
        groups.append(shown)
    drawn = list(pool.map(_thumbnail, thumbnails))
    rows = max(1, -(-len(drawn) // _ACROSS))
    sheet = Image.new("RGB", (_ACROSS * _SIDE, rows * _SIDE), "#888")
    for index, image in enumerate(drawn):
        if image is not None:
            sheet.paste(image, (index % _ACROSS * _SIDE, index // _ACROSS * _SIDE))
    stream = io.BytesIO()
    sheet.save(stream, "JPEG", quality=82)
    (out / "data" / f"sheet-{number:04}.jpg").write_bytes(stream.getvalue())
    data = json.dumps(groups, separators=(",", ":"))
    (out / "data" / f"rows-{number:04}.js").write_text(f"gallery.loaded({number},{data});\n", encoding="ascii")
    return {
        "rows": rows,
        "groups": len(groups),
        "classes": sorted({group["class"] for group in groups}),
        "prompts": sorted({edit["prompt"] for group in groups for edit in group["edits"]}),
        "verdicts": sorted({edit["verdict"] for group in groups for edit in group["edits"]}),
    }


def _edit_pixels(edits: EditStore, shard: int, row: np.void) -> NDArray[np.uint8] | None:
    data = edits.encoded_row(shard, row)
    try:
        return None if data is None else decode(data)
    except DecodeError:
        return None  # `verify` reports it


def _thumbnail(pixels_of: Callable[[], NDArray[np.uint8] | None]) -> Image.Image | None:
    """The middle square of an image."""
    pixels = pixels_of()
    if pixels is None:
        return None
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    box = (left, top, left + side, top + side)
    return Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC, box=box)


def _summary(
    edits: EditStore,
    tally: NDArray[np.int64],
    scores: Mapping[str, list[NDArray[np.float32]]],
    runs: list[dict[str, Any]],
    pages: list[dict[str, Any]],
    shown: int,
    originals: bool,
) -> dict[str, Any]:
    """The content of the index page."""
    histograms = {}
    for verdict, parts in scores.items():
        values = np.concatenate(parts)
        values = values[np.isfinite(values)]
        if len(values):
            counts, _ = np.histogram(np.clip(values, 0, 1), bins=_BINS, range=(0, 1))
            histograms[verdict] = counts.tolist()
    return {
        "store": _readable(str(edits.path)),
        "version": __version__,
        "originals": len(edits.catalog),
        "beside": originals,
        "classes": [_readable(name) for name in edits.catalog.classes],
        "prompts": list(edits.prompts),
        "verdicts": list(VERDICTS),
        "rejections": list(REJECTIONS),
        "settings": {str(name): value for name, value in edits.settings.items()},
        "tally": tally.tolist(),
        "histograms": histograms,
        "runs": {
            "count": len(runs),
            "seconds": sum(float(run.get("seconds", 0)) for run in runs),
            "edits": sum(int(run.get("edits", 0)) for run in runs),
            "hosts": sorted({str(run.get("host")) for run in runs}),
        },
        "pages": pages,
        "shown": shown,
        "side": _SIDE,
        "across": _ACROSS,
    }


def _readable(text: str) -> str:
    """Text in which bytes of file names that are not UTF-8 are escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _page(title: str, content: Mapping[str, Any]) -> str:
    # In a script element only what could end it is escaped.
    data = json.dumps(content).replace("<", "\\u003c")
    template = (_ASSETS / "gallery.html").read_text(encoding="utf-8")
    return template.replace("{{title}}", html.escape(_readable(title))).replace("{{data}}", data)
