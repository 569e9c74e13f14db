"""The contact sheet: what the plan does to some samples, step by step, as in the paper's Figure 3.

    caption | original  edit  mask | hybrid  fractal  augmented
            |  whole images, with  |  the output grid, pixel
            |  the crop's outline  |  for pixel, as trained on

Every cell is computed by the specification in `mixing` from a row of the dataset's own plan.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dali_diffusemix.dataset import DiffuseMixDataset
from dali_diffusemix.errors import ConfigError
from dali_diffusemix.mixing import TensorFormat, edit_weight, encode, mixed_image
from dali_diffusemix.pixels import decode
from dali_diffusemix.plan import MASKS, BatchPlan, MixSpec, Schedule

__all__ = ["COLUMNS", "contact_sheet", "spread_indices"]

COLUMNS: Final = (
    ("original", "I"),
    ("edit", "Î"),
    ("mask", "M"),
    ("hybrid", "H = M⊙Î + (1−M)⊙I"),
    ("fractal", "F"),
    ("augmented", "A = (1−λ)H + λF"),
)
"""The columns' names, and the paper's symbols for them."""

_MOST_ROWS: Final = 64

_Colour: TypeAlias = tuple[int, int, int]
_PAPER: Final = (252, 252, 250)
_PANEL: Final = (242, 242, 239)
_RULE: Final = (226, 226, 221)
_FADE: Final = (214, 214, 210)
_INK: Final = (27, 31, 36)
_MUTED: Final = (106, 112, 120)
_ACCENT: Final = (190, 67, 16)

_PIXELS: Final = TensorFormat(dtype="uint8", channels_last=True, normalize=None)


def contact_sheet(
    dataset: DiffuseMixDataset, *, epoch: int = 0, indices: Sequence[int] | None = None, rows: int = 8
) -> Image.Image:
    """Draw samples of a dataset, one a row: original, edit, mask, hybrid, fractal, augmented.

    Args:
        dataset: What to draw from; its seed, mix and crop decide the samples.
        epoch: The epoch whose samples are drawn; `dataset.epoch` is left alone.
        indices: Which samples; None takes `spread_indices`.
        rows: How many, where `indices` is None; 1 to 64.

    Returns:
        The sheet, RGB. Cells of the last three columns are the output grid pixel for pixel, enlarged by a whole
        number where it is below 128 pixels and shrunk where it is above 384.

    Raises:
        ConfigError: A sample is not in the dataset, or there are none or too many of them.
        DecodeError: An original or an edit cannot be decoded.
    """
    if indices is None:
        indices = spread_indices(dataset, epoch=epoch, rows=rows)
    if not 1 <= len(indices) <= _MOST_ROWS:
        raise ConfigError(f"indices must name 1 to {_MOST_ROWS} samples, found {len(indices)}")
    plan = dataset.planner.batch(epoch, indices)
    layout = _Layout.of(plan)
    sheet = _Sheet(Image.new("RGB", layout.size, _PAPER))
    _draw_header(sheet, layout)
    for row in range(len(plan)):
        _draw_row(sheet, layout, row, _Sample.of(dataset, plan, row))
    _draw_footer(sheet, layout, _footnotes(dataset, epoch))
    return sheet.image


def spread_indices(dataset: DiffuseMixDataset, *, epoch: int = 0, rows: int = 8) -> list[int]:
    """Choose samples worth showing: the first mixed ones of the epoch's shuffled order, spread over the classes.

    Where there are not enough of them, unmixed ones fill up. Raises ConfigError unless 1 ≤ rows ≤ 64.
    """
    if not 1 <= rows <= _MOST_ROWS:
        raise ConfigError(f"rows must lie in 1 to {_MOST_ROWS}, found {rows}")
    order = Schedule(length=len(dataset), batch_size=512, shuffle=True, seed=dataset.seed)
    share = math.ceil(rows / len(dataset.classes))
    shown: Counter[int] = Counter()
    chosen: list[int] = []
    further: list[int] = []  # mixed, of classes that have their share
    plain: list[int] = []
    for step in range(len(order)):
        plan = dataset.planner.batch(epoch, order.indices(epoch, order.places(step)))
        columns = (plan.index, dataset.labels_of(plan), plan.mixed)
        for index, label, mixed in zip(*(column.tolist() for column in columns), strict=True):
            if not mixed:
                plain.append(index)
            elif shown[label] >= share:
                further.append(index)
            else:
                shown[label] += 1
                chosen.append(index)
        if len(chosen) >= rows:
            break
        del further[rows:], plain[rows:]
    return (chosen + further + plain)[:rows]


# Samples --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """A row of the plan with its images. What is not there is None."""

    plan: BatchPlan
    row: int
    class_name: str
    prompt: str | None
    original: NDArray[np.uint8]  # (height, width, 3), and so are the next two, each of its own size
    edit: NDArray[np.uint8] | None
    fractal: NDArray[np.uint8] | None

    @classmethod
    def of(cls, dataset: DiffuseMixDataset, plan: BatchPlan, row: int) -> "_Sample":
        original, edit, fractal = int(plan.original[row]), int(plan.edit[row]), int(plan.fractal[row])
        store, bank = dataset.store if edit >= 0 else None, dataset.bank
        return cls(
            plan=plan,
            row=row,
            class_name=dataset.classes[int(dataset.catalog.labels[original])],
            prompt=None if store is None else store.prompt_of(edit),
            original=dataset.decode_original(original),
            edit=None if store is None else decode(store.encoded(edit)),
            fractal=None if bank is None or fractal < 0 else bank.images[fractal],
        )

    def hybrid(self) -> NDArray[np.uint8]:
        """H on the output grid, (height, width, 3) uint8."""
        return _rounded(mixed_image(self.plan, self.row, self.original, self.edit))

    def fractal_alone(self) -> NDArray[np.uint8]:
        """F on the output grid, (height, width, 3) uint8: the sample as it would be with λ = 1."""
        whole = replace(self.plan, fractal_weight=np.ones_like(self.plan.fractal_weight))
        return _rounded(mixed_image(whole, self.row, self.original, None, self.fractal))

    def augmented(self) -> NDArray[np.uint8]:
        """A on the output grid, (height, width, 3) uint8: what the network sees."""
        return _rounded(mixed_image(self.plan, self.row, self.original, self.edit, self.fractal))

    @property
    def box(self) -> NDArray[np.float64]:
        """The crop (top, left, height, width) in pixels of the original."""
        box: NDArray[np.float64] = self.plan.box[self.row] * np.tile(self.original.shape[:2], 2)
        return box

    def mask(self, size: tuple[int, int]) -> NDArray[np.uint8]:
        """M over the whole image, (height, width) uint8, and beyond the crop as if that went on."""
        weight = edit_weight(int(self.plan.mask[self.row]), self.plan.seam_width, self._span_of_image(), size)
        return np.broadcast_to(np.rint(255 * weight).astype(np.uint8), size)

    def seam(self) -> tuple[int, float]:
        """The axis across the seam (0 down, 1 to the right), and the seam's place on it; the image's side is 1."""
        axis = 1 if MASKS[int(self.plan.mask[self.row])] in ("left", "right") else 0
        span = self._span_of_image()
        return axis, float((0.5 - span[axis]) / span[axis + 2])

    def _span_of_image(self) -> NDArray[np.float64]:
        """The image within what mask and fractal span, where the plan has the output within it."""
        box, span = self.plan.box[self.row], self.plan.span[self.row]
        extent = span[2:] / box[2:]
        return np.concatenate([span[:2] - extent * box[:2], extent])

    def details(self) -> list[str]:
        """What the plan decided, for the caption."""
        plan, row = self.plan, self.row
        top, left, height, width = self.box
        lines = [
            f"crop {width:.0f} × {height:.0f} at x {left:.0f}, y {top:.0f}",
            f"of {self.original.shape[1]} × {self.original.shape[0]} pixels",
            "flipped left to right" if plan.flip[row] else "not flipped",
            f"index {plan.index[row]}",
        ]
        if self.edit is not None:
            lines.insert(0, f"mask {MASKS[int(plan.mask[row])]}  ·  λ = {plan.fractal_weight[row]:.2f}")
        return lines


def _rounded(image: NDArray[np.float32]) -> NDArray[np.uint8]:
    return encode(image, _PIXELS).astype(np.uint8, copy=False)


# The sheet ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where things lie on the sheet, pixels."""

    rows: int
    cell: tuple[int, int]  # (height, width)
    zoom: float  # of the output grid

    _MARGIN = 36
    _CAPTION = 206
    _GAP = 10
    _GROUP_GAP = 26  # between whole images and the output grid
    _ROW_GAP = 24
    _HEADER = 84
    _FOOTER = 84
    _LEAST_ROW = 134  # the caption's height

    @classmethod
    def of(cls, plan: BatchPlan) -> "_Layout":
        longest = max(plan.output_size)
        zoom = math.ceil(128 / longest) if longest < 128 else min(1.0, 384 / longest)
        height, width = (max(1, round(side * zoom)) for side in plan.output_size)
        return cls(rows=len(plan), cell=(height, width), zoom=zoom)

    @property
    def row_height(self) -> int:
        return max(self.cell[0], self._LEAST_ROW)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the sheet, as Pillow has it."""
        width = self.column(len(COLUMNS) - 1) + self.cell[1] + self._MARGIN
        return width, self.row(self.rows) - self._ROW_GAP + self._FOOTER

    @property
    def caption(self) -> tuple[int, int]:
        """Left edge and width of the captions."""
        return self._MARGIN, self._CAPTION - self._GROUP_GAP

    def column(self, column: int) -> int:
        """Left edge of a column."""
        group_gap = self._GROUP_GAP - self._GAP if column >= 3 else 0
        return self._MARGIN + self._CAPTION + column * (self.cell[1] + self._GAP) + group_gap

    def row(self, row: int) -> int:
        """Top of a row."""
        return self._HEADER + row * (self.row_height + self._ROW_GAP)

    @property
    def header(self) -> int:
        """Baseline of the columns' names."""
        return self._HEADER - 42

    @property
    def footer(self) -> int:
        """Top of the footer."""
        return self.size[1] - self._FOOTER

    def place(self, row: int, column: int) -> tuple[int, int]:
        """(left, top) of a cell, as Pillow has it."""
        return self.column(column), self.row(row)


class _Sheet:
    """An image, and how to write on it."""

    def __init__(self, image: Image.Image) -> None:
        self.image = image
        self.draw = ImageDraw.Draw(image)

    def write(self, x: float, baseline: float, text: str, size: int, colour: _Colour = _INK) -> None:
        """Write one line, from x on."""
        for run in _runs(text):
            if run in _STROKES:
                self.image.paste(colour, (round(x), round(baseline) - size), _drawn(run, size))
            else:
                self.draw.text((x, baseline), run, fill=colour, font=_font(size), anchor="ls")
            x += _width(run, size)

    def rule(self, y: int, left: int, right: int) -> None:
        """Draw a hairline."""
        self.draw.line([(left, y), (right, y)], fill=_RULE)


def _draw_header(sheet: _Sheet, layout: _Layout) -> None:
    left, _ = layout.caption
    sheet.write(left, layout.header, "DiffuseMix", 22)
    sheet.write(left, layout.header + 21, "samples of the plan", 14, _MUTED)
    for column, (name, symbols) in enumerate(COLUMNS):
        sheet.write(layout.column(column), layout.header, name, 18)
        sheet.write(layout.column(column), layout.header + 21, symbols, 14, _MUTED)


def _draw_row(sheet: _Sheet, layout: _Layout, row: int, sample: _Sample) -> None:
    _draw_caption(sheet, layout, row, sample)
    frame = _Frame.of(sample, layout.cell)
    cells: list[Image.Image | str] = [frame.show(Image.fromarray(sample.original))]
    if sample.edit is None:
        cells += ["not mixed:", "not mixed:", "not mixed:", "not mixed:"]
    else:
        cells += [
            frame.show(Image.fromarray(sample.edit)),
            frame.show(Image.fromarray(sample.mask((frame.height, frame.width))), seam=sample.seam()),
            _grid(sample.hybrid(), layout),
            "no fractal:" if sample.fractal is None else _grid(sample.fractal_alone(), layout),
        ]
    cells.append(_grid(sample.augmented(), layout))
    for column, cell in enumerate(cells):
        place = layout.place(row, column)
        if isinstance(cell, Image.Image):
            sheet.image.paste(cell, place)
        else:
            _draw_dash(sheet, layout, place, (cell, "shown as it is" if sample.edit is None else "λ is 0"))


def _draw_caption(sheet: _Sheet, layout: _Layout, row: int, sample: _Sample) -> None:
    (left, width), top = layout.caption, layout.row(row)
    if row:
        sheet.rule(top - layout._ROW_GAP // 2, left, layout.size[0] - left)
    sheet.write(left, top + 17, _fitted(sample.class_name, 20, width), 20)
    if sample.prompt is None:
        sheet.write(left, top + 41, "not mixed: shown as it is", 15, _MUTED)
    else:
        sheet.write(left, top + 41, _fitted(f"“{sample.prompt}”", 15, width), 15, _ACCENT)
    for line, text in enumerate(sample.details()):
        sheet.write(left, top + 66 + 17 * line, _fitted(text, 13, width), 13, _MUTED)


def _draw_dash(sheet: _Sheet, layout: _Layout, place: tuple[int, int], lines: tuple[str, str]) -> None:
    (left, top), (height, width) = place, layout.cell
    sheet.draw.rectangle([left, top, left + width - 1, top + height - 1], fill=_PANEL)
    for text, size, down in (("–", 20, -14), (lines[0], 13, 10), (lines[1], 13, 27)):
        sheet.write(left + (width - _width(text, size)) / 2, top + height // 2 + down, text, size, _MUTED)


def _draw_footer(sheet: _Sheet, layout: _Layout, notes: Sequence[str]) -> None:
    left, _ = layout.caption
    width = layout.size[0] - 2 * left
    sheet.rule(layout.footer + 20, left, left + width)
    for line, note in enumerate(notes):
        sheet.write(left, layout.footer + 44 + 19 * line, _fitted(note, 13, width), 13, _MUTED)


def _footnotes(dataset: DiffuseMixDataset, epoch: int) -> list[str]:
    presets = {MixSpec.paper(): "MixSpec.paper()", MixSpec.release(): "MixSpec.release()"}
    mix = "none" if dataset.mix is None else presets.get(dataset.mix, str(dataset.mix))
    crop = re.sub(r"\d+\.\d{4,}", lambda number: f"{float(number[0]):.3g}", str(dataset.crop))
    notes = [f"mix {mix}  ·  crop {crop}  ·  seed {dataset.seed}  ·  epoch {epoch}"]
    if dataset.store is not None:
        settings = dataset.store.settings
        procedural = settings.get("editor") == "procedural"
        edits = "procedural restyling, not diffusion" if procedural else f"{settings.get('model')}"
        notes.append(f"edits: {edits}")
    return notes


def _grid(pixels: NDArray[np.uint8], layout: _Layout) -> Image.Image:
    """An image on the output grid as a cell."""
    image, (height, width) = Image.fromarray(pixels), layout.cell
    if layout.zoom == 1:
        return image
    return image.resize((width, height), Image.Resampling.NEAREST if layout.zoom > 1 else Image.Resampling.BOX)


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """Where an original and its crop lie in a cell; the crop may leave the image."""

    cell: tuple[int, int]  # (height, width)
    left: int
    top: int
    height: int
    width: int
    crop: tuple[int, int, int, int]  # left, top, right, bottom in the cell

    @classmethod
    def of(cls, sample: _Sample, cell: tuple[int, int]) -> "_Frame":
        size, box = np.array(sample.original.shape[:2], dtype=np.float64), sample.box
        first, last = np.minimum(0, box[:2]), np.maximum(size, box[:2] + box[2:])
        scale = float((np.array(cell) / (last - first)).min())
        height, width = (max(1, int(side)) for side in np.rint(size * scale))
        corner = (np.array(cell) - (last - first) * scale) / 2 - first * scale
        top, left = (int(place) for place in np.rint(corner))
        crop_top, crop_left = np.rint(corner + box[:2] * scale)
        crop_bottom, crop_right = np.rint(corner + (box[:2] + box[2:]) * scale)
        crop = (int(crop_left), int(crop_top), int(crop_right), int(crop_bottom))
        return cls(cell=cell, left=left, top=top, height=height, width=width, crop=crop)

    @property
    def corner(self) -> tuple[int, int]:
        """Where the image begins, as Pillow has it."""
        return self.left, self.top

    def show(self, image: Image.Image, seam: tuple[int, float] | None = None) -> Image.Image:
        """A whole image with the crop outlined and the rest faded; the same frame for an original and its edit."""
        # Black, as a sample is where the crop leaves the image.
        bright = Image.new("RGB", self.cell[::-1])
        bright.paste(image.convert("RGB").resize((self.width, self.height), Image.Resampling.LANCZOS), self.corner)
        if seam is not None:
            self._draw_seam(ImageDraw.Draw(bright), *seam)
        whole = bright.crop((*self.corner, self.left + self.width, self.top + self.height))
        canvas = Image.new("RGB", bright.size, _PANEL)
        canvas.paste(Image.blend(whole, Image.new("RGB", whole.size, _FADE), 0.6), self.corner)
        canvas.paste(bright.crop(self.crop), self.crop[:2])
        left, top, right, bottom = self.crop
        draw = ImageDraw.Draw(canvas)
        # Dark about light, to be seen on every photograph.
        draw.rectangle([left, top, right - 1, bottom - 1], outline=_INK)
        if right - left > 4 and bottom - top > 4:
            draw.rectangle([left + 1, top + 1, right - 2, bottom - 2], outline=_PAPER)
        return canvas

    def _draw_seam(self, draw: ImageDraw.ImageDraw, axis: int, place: float) -> None:
        if axis == 1:
            x = self.left + round(place * self.width)
            draw.line([(x, self.top), (x, self.top + self.height - 1)], fill=_ACCENT, width=2)
        else:
            y = self.top + round(place * self.height)
            draw.line([(self.left, y), (self.left + self.width - 1, y)], fill=_ACCENT, width=2)


# Type -----------------------------------------------------------------------------------------------------------------

# Pillow's own font is at hand everywhere and handsome, but small: these are drawn. (width, lines) in ems, y upwards
# from the baseline.
_Point: TypeAlias = tuple[float, float]
_RING: Final[tuple[_Point, ...]] = tuple(
    (0.43 + 0.31 * math.cos(turn * math.pi / 12), 0.33 + 0.31 * math.sin(turn * math.pi / 12)) for turn in range(25)
)
_STROKES: Final[dict[str, tuple[float, tuple[tuple[_Point, ...], ...]]]] = {
    "×": (0.56, (((0.11, 0.11), (0.45, 0.45)), ((0.11, 0.45), (0.45, 0.11)))),
    "−": (0.60, (((0.10, 0.29), (0.50, 0.29)),)),
    "–": (0.54, (((0.04, 0.27), (0.50, 0.27)),)),
    "⊙": (0.86, (_RING, ((0.39, 0.33), (0.47, 0.33)))),
    "Î": (0.28, (((0.14, 0.00), (0.14, 0.70)), ((0.01, 0.80), (0.14, 0.92), (0.27, 0.80)))),
    "λ": (0.53, (((0.05, 0.71), (0.13, 0.70), (0.19, 0.60), (0.42, 0.03), (0.49, 0.02)), ((0.26, 0.43), (0.06, 0.0)))),
}
_STROKE: Final = 0.074
_OVERSAMPLING: Final = 8


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


@cache
def _has_glyph(character: str) -> bool:
    font = _font(20)
    return bytes(font.getmask(character)) != bytes(font.getmask("\uffff"))


@cache
def _drawn(character: str, size: int) -> Image.Image:
    """A character's mask; its baseline lies `size` pixels below its top."""
    width, lines = _STROKES[character]
    em = size * _OVERSAMPLING
    mask = Image.new("L", (math.ceil(width * size) * _OVERSAMPLING, (size + 2) * _OVERSAMPLING))
    draw = ImageDraw.Draw(mask)
    for line in lines:
        points = [(x * em, (1 - y) * em) for x, y in line]
        draw.line(points, fill=255, width=round(_STROKE * em), joint="curve")
    return mask.reduce(_OVERSAMPLING)


def _runs(text: str) -> list[str]:
    """The text as stretches that the font has, and characters that are drawn. Others lose accents, or become '?'."""
    runs = [""]
    for character in text:
        if character in _STROKES:
            runs += [character, ""]
            continue
        if not _has_glyph(character):
            plain = unicodedata.normalize("NFKD", character)[0]
            character = plain if plain.isprintable() and _has_glyph(plain) else "?"
        runs[-1] += character
    return [run for run in runs if run]


def _width(text: str, size: int) -> float:
    return sum(_STROKES[run][0] * size if run in _STROKES else _font(size).getlength(run) for run in _runs(text))


def _fitted(text: str, size: int, width: float) -> str:
    """The text, cut to a width."""
    if _width(text, size) <= width:
        return text
    while text and _width(text + "…", size) > width:
        text = text[:-1]
    return text + "…"
