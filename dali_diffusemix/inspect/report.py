"""A gallery of an edit store: static pages that open from disk, without a server or files from elsewhere.

    report/index.html            settings, counts and verdicts; filters; the gallery
           gallery.css, gallery.js
           data/rows-0000.js     details of 240 edits; a script, because a page opened from disk may not fetch files
           data/sheet-0000.jpg   pictures of 12 edits and their originals, up to 256 pixels each

Rows and sheets load when they are scrolled into view, so that ten thousand edits open as fast as ten.
"""

import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dali_diffusemix.base.cpus import cpus
from dali_diffusemix.base.workers import Workers
from dali_diffusemix.errors import ConfigError
from dali_diffusemix.inspect.gallery import ASSETS, CHUNK, SMALL, EditView, current_rows, shrunk
from dali_diffusemix.inspect.originals import FoundOriginals
from dali_diffusemix.store import EditStore

__all__ = ["Gallery", "write_report"]

_SIDE: Final = 256  # pixels of a picture, at most
_PER_SHEET: Final = 12  # edits of this size
_ACROSS: Final = 4
_UNIT: Final = 16  # pixels of a JPEG's unit
_QUALITY: Final = 82
# "file:" is what 'self' would be, if pages opened from disk had an origin.
_POLICY: Final = "default-src 'none'; script-src 'self' file:; style-src 'self' file:; img-src 'self' data: file:"


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
        StoreError: There is no such store, or the decisions beside it are damaged.
        ConfigError: `out` has other files or cannot be written, or `root` does not exist.
    """
    edits = EditStore.open(store)
    every = current_rows(edits)
    view = EditView(edits, FoundOriginals(edits, root), _chosen(every, most))
    content = view.content(every, writable=False)
    out = Path(out).absolute()
    try:
        _prepare(out)
        sheets = _Sheets.of(view)
        _write_data(out / "data", view, sheets, progress)
        content["sheets"] = {"ending": sheets.ending, "width": _ACROSS * sheets.pitch}
        (out / "index.html").write_text(view.page(content, _POLICY), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"out must be a folder that can be written, found {str(out)!r}: {error}; name another."
        ) from error
    return Gallery(page=out / "index.html", edits=len(view.rows), of=len(every), originals=view.originals.found)


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
        shutil.copyfile(ASSETS / asset, out / asset)


def _chosen(rows: NDArray[np.void], most: int) -> NDArray[np.void]:
    """(n,) ROW of the edits to show, by original: all, or a selection."""
    if len(rows) <= most:
        return rows
    # Up to half of them are originals with an edit that was not accepted: people look for these.
    bad = np.unique(rows["original"][rows["verdict"] != 0])
    good = np.setdiff1d(rows["original"], bad)
    room = max(1, most * (len(bad) + len(good)) // len(rows))
    bad = _spread(bad, max(room // 2, room - len(good)))
    shown = np.concatenate([bad, _spread(good, room - len(bad))])
    return rows[np.isin(rows["original"], shown)][:most]


def _spread(values: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most so many of the values, evenly spread."""
    return values if len(values) <= most else values[np.linspace(0, len(values) - 1, most).astype(np.int64)]


@dataclass(frozen=True)
class _Sheets:
    """Pictures of edits and originals, many in a file."""

    view: EditView
    side: int  # of a cell, pixels
    ending: str

    @classmethod
    def of(cls, view: EditView) -> "_Sheets":
        rows = view.rows[view.rows["length"] > 0]
        sides = [rows["height"], rows["width"]]
        if view.originals.found:
            sides += [view.edits.catalog.sizes[view.rows["original"]].ravel()]
        side = min(_SIDE, int(np.concatenate(sides).max(initial=1)))
        return cls(view, side, "png" if side <= SMALL else "jpg")

    @property
    def pitch(self) -> int:
        """From one cell to the next, pixels: a JPEG's unit more, so that none is seen in another's edge."""
        return -(-self.side // _UNIT) * _UNIT + _UNIT

    @property
    def length(self) -> int:
        """Edits of a sheet."""
        return _PER_SHEET * max(1, _SIDE // self.side) ** 2

    def picture(self, number: int) -> tuple[bytes, list[dict[str, Any]]]:
        """A sheet's file; for each of its edits, where it and its original are: left, top, width, height."""
        first = number * self.length
        cells: list[Image.Image] = []
        where: list[dict[str, Any]] = []
        original, of_original = None, None
        for place in range(first, min(first + self.length, len(self.view.rows))):
            if original != (original := int(self.view.rows["original"][place])):
                of_original = self._place(cells, self.view.originals.pixels(original))
            of_edit = self._place(cells, self.view.pixels(place))
            where.append({"sheet": number, "edit": of_edit, "originalAt": of_original})
        sheet = Image.new("RGB", (_ACROSS * self.pitch, max(1, -(-len(cells) // _ACROSS)) * self.pitch), "#888")
        for index, cell in enumerate(cells):
            sheet.paste(cell, (index % _ACROSS * self.pitch, index // _ACROSS * self.pitch))
        stream = io.BytesIO()
        sheet.save(stream, **({"format": "PNG"} if self.ending == "png" else {"format": "JPEG", "quality": _QUALITY}))
        return stream.getvalue(), [{**one, "sheetHeight": sheet.height} for one in where]

    def _place(self, cells: list[Image.Image], pixels: NDArray[np.uint8] | None) -> list[int] | None:
        if pixels is None:
            return None
        index, image = len(cells), shrunk(pixels, self.side)
        cells.append(image)
        return [index % _ACROSS * self.pitch, index // _ACROSS * self.pitch, *image.size]


def _write_data(data: Path, view: EditView, sheets: _Sheets, progress: Callable[[int, int], None] | None) -> None:
    count = -(-len(view.rows) // sheets.length)
    where: list[dict[str, Any]] = []

    def written(number: int) -> list[dict[str, Any]]:
        file, of_edits = sheets.picture(number)
        (data / f"sheet-{number:04}.{sheets.ending}").write_bytes(file)
        return of_edits

    with Workers(cpus(), "dali-diffusemix-report") as pool:
        for of_edits in pool.map(written, range(count)):
            where += of_edits
            if progress is not None:
                progress(len(where), len(view.rows))
    for chunk in range(-(-len(view.rows) // CHUNK)):
        details = [
            {**detail, **of_edit}
            for detail, of_edit in zip(view.details(chunk), where[chunk * CHUNK : (chunk + 1) * CHUNK], strict=True)
        ]
        text = json.dumps(details, separators=(",", ":"))
        (data / f"rows-{chunk:04}.js").write_text(f"gallery.loaded({chunk},{text});\n", encoding="ascii")
