"""The sheet of paper: colours, layout, and drawing.

left                                       in groups, with a wider gap before each
  header           column    column            column
  caption          ┌──────┐  ┌──────┐          ┌──────┐   top of row 0
                   │ cell │  │ cell │          │ cell │
                   └──────┘  └──────┘          └──────┘
                   notes     notes             notes
  ─────────────────────────────────────────────────────
  caption          ...                                    top of row 1
  ─────────────────────────────────────────────────────
  footer
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dali_diffusemix.inspect.preview.lettering import Colour, fitted, width, wrapped, write
from dali_diffusemix.inspect.preview.samples import MOST_DETAILS, Sample

PAPER: Final = (252, 252, 250)
PANEL: Final = (242, 242, 239)
RULE: Final = (226, 226, 221)
FADE: Final = (214, 214, 210)
INK: Final = (27, 31, 36)
MUTED: Final = (106, 112, 120)
ACCENT: Final = (190, 67, 16)

Line: TypeAlias = tuple[str, int, Colour]
"""(text, size, colour) of one line of type."""

Window: TypeAlias = tuple[int, int, int, int]
"""A rectangle (top, left, bottom, right)."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The layout of a sheet, in pixels."""

    rows: int
    columns: int
    cell: tuple[int, int]  # (height, width)
    zoom: float  # of the output grid
    groups: tuple[int, ...] = ()  # first columns of groups
    captions: int = 0  # width of the captions at the left, 0 for none; multiplied by `scale`, like the next ones
    notes: int = 0  # lines under each cell
    footer_lines: int = 2
    scale: float = 1.0  # of text and space

    _MARGIN = 36
    _GAP = 10
    _GROUP_GAP = 26
    _ROW_GAP = 24
    _HEADER = 84
    _CAPTION = 49 + 17 * MOST_DETAILS  # height
    _NOTE = 18
    _FOOTER = 46
    _FOOTNOTE = 19
    _SHOWN = 960  # width at which text has its normal size; on a wider sheet it is larger, to be legible when shrunk

    @classmethod
    def of(
        cls,
        output_size: tuple[int, int],
        *,
        rows: int,
        columns: int,
        groups: tuple[int, ...] = (),
        captions: int = 0,
        notes: int = 0,
        enlarged: bool = True,
    ) -> "Layout":
        """Lay out cells for samples of a size; text is `enlarged` if the sheet is wide."""
        zoom = zoom_of(output_size)
        height, width = (max(1, round(side * zoom)) for side in output_size)
        space = 2 * cls._MARGIN + captions + (columns - 1) * cls._GAP + len(groups) * (cls._GROUP_GAP - cls._GAP)
        # The width of the sheet is columns * width + scale * space.
        scale = max(1.0, columns * width / max(1, cls._SHOWN - space)) if enlarged else 1.0
        return cls(
            rows=rows,
            columns=columns,
            cell=(height, width),
            zoom=zoom,
            groups=groups,
            captions=captions,
            notes=notes,
            scale=scale,
        )

    def scaled(self, length: float) -> int:
        """Return a length, or a text size, on this sheet."""
        return round(length * self.scale)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the sheet, in Pillow's order."""
        return self.right + self.left, self.footer + self.scaled(self._FOOTER + self._FOOTNOTE * self.footer_lines)

    @property
    def left(self) -> int:
        """Left edge of the content."""
        return self.scaled(self._MARGIN)

    @property
    def right(self) -> int:
        """Right edge of the content."""
        return self.column(self.columns - 1) + self.cell[1]

    def column(self, column: int) -> int:
        """Return the left edge of a column."""
        groups = sum(column >= first for first in self.groups)
        space = self._MARGIN + self.captions + column * self._GAP + groups * (self._GROUP_GAP - self._GAP)
        return self.scaled(space) + column * self.cell[1]

    def row(self, row: int) -> int:
        """Return the top of a row."""
        height = self.cell[0] + (self.scaled(8 + self._NOTE * self.notes) if self.notes else 0)
        height = max(height, self.scaled(self._CAPTION) if self.captions else 0)
        return self.scaled(self._HEADER) + row * (height + self.scaled(self._ROW_GAP))

    @property
    def footer(self) -> int:
        """Top of the footer."""
        return self.row(self.rows) - self.scaled(self._ROW_GAP)

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """Return (left, top) of a cell, in Pillow's order."""
        return self.column(column), self.row(row)


def zoom_of(output_size: tuple[int, int], least: int = 128, most: int = 384) -> float:
    """Return the zoom of samples: a whole number to reach `least` pixels, or below 1 to stay within `most`."""
    longest = max(output_size)
    return math.ceil(least / longest) if longest < least else min(1.0, most / longest)


def zoomed(pixels: NDArray[np.uint8], zoom: float) -> Image.Image:
    """Return an image on the output grid, enlarged or shrunk."""
    image = Image.fromarray(pixels)
    if zoom == 1:
        return image
    size = (max(1, round(image.width * zoom)), max(1, round(image.height * zoom)))
    return image.resize(size, Image.Resampling.NEAREST if zoom > 1 else Image.Resampling.BOX)


class Sheet:
    """A sheet that is being drawn; it starts with its footer."""

    def __init__(self, layout: Layout, footer: Sequence[str]) -> None:
        lines = [line for note in footer for line in wrapped(note, layout.scaled(13), layout.right - layout.left)]
        self.layout = replace(layout, footer_lines=max(layout.footer_lines, len(lines)))
        self.image = Image.new("RGB", self.layout.size, PAPER)
        self._draw = ImageDraw.Draw(self.image)
        self._rule(self.layout.footer + self.layout.scaled(20))
        for line, text in enumerate(lines):
            baseline = self.layout.footer + self.layout.scaled(44 + Layout._FOOTNOTE * line)
            self._write(self.layout.left, baseline, text, 13, MUTED)

    def title(self, name: str, below: str) -> None:
        """Write the title of the sheet, above the captions."""
        self._head(self.layout.left, self.layout.scaled(self.layout.captions), name, below, 22)

    def head(self, column: int, name: str, below: str, columns: int = 1) -> None:
        """Write a name at the top of one or more columns, and a line below it."""
        left = self.layout.column(column)
        self._head(left, self.layout.column(column + columns - 1) + self.layout.cell[1] - left, name, below, 18)

    def divide(self, row: int) -> None:
        """Draw a thin line above a row."""
        self._rule(self.layout.row(row) - self.layout.scaled(Layout._ROW_GAP) // 2)

    def caption(self, row: int, lines: Sequence[tuple[int, Line]]) -> None:
        """Write the caption at the left of a row: lines, each with its distance from the top."""
        scaled, top = self.layout.scaled, self.layout.row(row)
        most = scaled(self.layout.captions - Layout._GROUP_GAP)
        for down, (text, size, colour) in lines:
            self._write(self.layout.left, top + scaled(down), text, size, colour, most)

    def cell(self, row: int, column: int, content: Image.Image | tuple[str, str], notes: Sequence[Line] = ()) -> None:
        """Draw a cell, with notes below it: a picture, or two lines that say why there is none."""
        (left, top), (height, across) = self.layout.corner(row, column), self.layout.cell
        scaled = self.layout.scaled
        if isinstance(content, Image.Image):
            self.image.paste(content, (left, top))
        else:
            self._draw.rectangle([left, top, left + across - 1, top + height - 1], fill=PANEL)
            for text, size, down in (("–", 20, -14), (content[0], 13, 10), (content[1], 13, 27)):
                x = left + (across - width(text, scaled(size))) / 2
                self._write(x, top + height // 2 + scaled(down), text, size, MUTED)
        for line, (text, size, colour) in enumerate(notes):
            baseline = top + height + scaled(8 + Layout._NOTE * line + 12)
            self._write(left, baseline, text, size, colour, across)

    def _head(self, x: int, most: int, name: str, below: str, size: int) -> None:
        baseline = self.layout.scaled(Layout._HEADER - 42)
        self._write(x, baseline, name, size, INK, most)
        self._write(x, baseline + self.layout.scaled(21), below, 14, MUTED, most)

    def _write(
        self, x: float, baseline: float, text: str, size: int, colour: Colour = INK, most: float = math.inf
    ) -> None:
        """Write one line, from x on, as it fits in a width; its size is that at scale 1."""
        text, size = fitted(text, self.layout.scaled(size), most)
        write(self.image, (x, baseline), text, size, colour)

    def _rule(self, y: int) -> None:
        """Draw a hairline across the sheet."""
        self._draw.line([(self.layout.left, y), (self.layout.right, y)], fill=RULE, width=self.layout.scaled(1))


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The rectangles of a whole image and its crop in a cell; the crop may extend beyond the image."""

    cell: tuple[int, int]  # (height, width)
    left: int
    top: int
    height: int
    width: int
    crop: tuple[int, int, int, int]  # left, top, right, bottom in the cell

    @classmethod
    def of(cls, sample: Sample, cell: tuple[int, int]) -> "Frame":
        """Return the frame of a sample's original; its edit is drawn in the same frame."""
        return cls.around(sample.original.shape[:2], sample.box, cell)

    @classmethod
    def around(cls, image_size: tuple[int, ...], box: NDArray[np.float64], cell: tuple[int, int]) -> "Frame":
        """Return the largest frame in which the image and the box (top, left, height, width) in its pixels fit."""
        size = np.array(image_size, dtype=np.float64)
        first, last = np.minimum(0, box[:2]), np.maximum(size, box[:2] + box[2:])
        scale = float((np.array(cell) / (last - first)).min())
        height, width = (max(1, int(side)) for side in np.rint(size * scale))
        corner = (np.array(cell) - (last - first) * scale) / 2 - first * scale
        top, left = (int(edge) for edge in np.rint(corner))
        crop_top, crop_left = (int(edge) for edge in np.rint(corner + box[:2] * scale))
        crop_bottom, crop_right = (int(edge) for edge in np.rint(corner + (box[:2] + box[2:]) * scale))
        # The crop is at least one pixel wide.
        crop = (crop_left, crop_top, max(crop_right, crop_left + 1), max(crop_bottom, crop_top + 1))
        return cls(cell=cell, left=left, top=top, height=height, width=width, crop=crop)

    @property
    def corner(self) -> tuple[int, int]:
        """(left, top) of the image, in Pillow's order."""
        return self.left, self.top

    def rectangle(self, window: Window, image_size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return a window of the image's pixels as (left, top, right, bottom) in the cell; empty if the window is."""
        (top, left, bottom, right), (height, width) = window, image_size
        if left >= right or top >= bottom:
            return self.left, self.top, self.left, self.top
        across, down = self.width / width, self.height / height
        first = self.left + int(left * across), self.top + int(top * down)
        return *first, self.left + math.ceil(right * across), self.top + math.ceil(bottom * down)

    def show(self, image: Image.Image, seam: tuple[int, float] | None = None) -> Image.Image:
        """Return the whole image with the crop outlined and the rest faded."""
        bright = self._bright(image)
        if seam is not None:
            self._draw_seam(ImageDraw.Draw(bright), *seam)
        canvas = self._faded(bright)
        canvas.paste(bright.crop(self.crop), self.crop[:2])
        self._outline_crop(ImageDraw.Draw(canvas))
        return canvas

    def show_part(self, image: Image.Image, part: tuple[int, int, int, int], line: int) -> Image.Image:
        """Return the whole image with a part (a rectangle in the cell) and the crop outlined, and the rest faded."""
        bright = self._bright(image)
        canvas = self._faded(bright)
        draw = ImageDraw.Draw(canvas)
        left, top, right, bottom = part
        if left < right and top < bottom:
            canvas.paste(bright.crop(part), part[:2])
        self._outline_crop(draw)
        if left < right and top < bottom:
            draw.rectangle([left, top, right - 1, bottom - 1], outline=ACCENT, width=line)
        return canvas

    def show_whole(self, image: Image.Image) -> Image.Image:
        """Return the whole image."""
        canvas = Image.new("RGB", self.cell[::-1], PANEL)
        canvas.paste(self._resized(image), self.corner)
        return canvas

    def _resized(self, image: Image.Image) -> Image.Image:
        return image.convert("RGB").resize((self.width, self.height), Image.Resampling.LANCZOS)

    def _bright(self, image: Image.Image) -> Image.Image:
        # On black, as in a sample outside the image.
        bright = Image.new("RGB", self.cell[::-1])
        bright.paste(self._resized(image), self.corner)
        return bright

    def _faded(self, bright: Image.Image) -> Image.Image:
        whole = bright.crop((*self.corner, self.left + self.width, self.top + self.height))
        canvas = Image.new("RGB", bright.size, PANEL)
        canvas.paste(Image.blend(whole, Image.new("RGB", whole.size, FADE), 0.6), self.corner)
        return canvas

    def _outline_crop(self, draw: ImageDraw.ImageDraw) -> None:
        left, top, right, bottom = self.crop
        # Dark around light, visible on every photograph.
        draw.rectangle([left, top, right - 1, bottom - 1], outline=INK)
        if right - left > 4 and bottom - top > 4:
            draw.rectangle([left + 1, top + 1, right - 2, bottom - 2], outline=PAPER)

    def _draw_seam(self, draw: ImageDraw.ImageDraw, axis: int, offset: float) -> None:
        if axis == 1:
            x = self.left + round(offset * self.width)
            draw.line([(x, self.top), (x, self.top + self.height - 1)], fill=ACCENT, width=2)
        else:
            y = self.top + round(offset * self.height)
            draw.line([(self.left, y), (self.left + self.width - 1, y)], fill=ACCENT, width=2)
