"""Text in Pillow's default font, and the characters that it lacks."""

import math
import unicodedata
from functools import cache
from typing import Final, TypeAlias

from PIL import Image, ImageDraw, ImageFont

# Pillow's default font is always available, but lacks these characters, which are drawn: (width, lines) in ems, y
# upwards from the baseline.
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

Colour: TypeAlias = tuple[int, int, int]


def write(image: Image.Image, position: tuple[float, float], text: str, size: int, colour: Colour) -> None:
    """Write one line on an RGB image, starting at (x, baseline)."""
    draw = ImageDraw.Draw(image)
    x, baseline = position
    for run in runs(text):
        if run in _STROKES:
            image.paste(colour, (round(x), round(baseline) - size), _drawn(run, size))
        else:
            draw.text((x, baseline), run, fill=colour, font=_font(size), anchor="ls")
        x += width(run, size)


def width(text: str, size: int) -> float:
    """Return the width of a line in pixels."""
    return sum(_STROKES[run][0] * size if run in _STROKES else _font(size).getlength(run) for run in runs(text))


def fitted(text: str, size: int, most: float) -> tuple[str, int]:
    """Return the text and its size, so that it fits in a width: up to a fifth smaller, and then cut."""
    least = math.ceil(0.8 * size)
    while size > least and width(text, size) > most:
        size -= 1
    if width(text, size) <= most:
        return text, size
    while text and width(text + "…", size) > most:
        text = text[:-1]
    return text + "…", size


def wrapped(text: str, size: int, most: float, between: str = "  ·  ") -> list[str]:
    """Return the text in lines, broken between its parts or else between words; a single word may be wider."""
    lines: list[str] = []
    for part in text.split(between):
        longer = f"{lines[-1]}{between}{part}" if lines else part
        if lines and width(longer, size) <= most:
            lines[-1] = longer
        elif between != " " and width(part, size) > most:
            lines += wrapped(part, size, most, " ")
        else:
            lines.append(part)
    return lines


def runs(text: str) -> list[str]:
    """Split the text into runs in the font and drawn characters; others lose accents, or become '?'."""
    found = [""]
    for character in text:
        if character in _STROKES:
            found += [character, ""]
            continue
        if not _has_glyph(character):
            plain = unicodedata.normalize("NFKD", character)[0]
            character = plain if plain.isprintable() and _has_glyph(plain) else "?"
        found[-1] += character
    return [run for run in found if run]


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


@cache
def _has_glyph(character: str) -> bool:
    font = _font(20)
    return bytes(font.getmask(character)) != bytes(font.getmask("\uffff"))


@cache
def _drawn(character: str, size: int) -> Image.Image:
    """The mask of a character; its baseline is `size` pixels below its top."""
    width, lines = _STROKES[character]
    em = size * _OVERSAMPLING
    mask = Image.new("L", (math.ceil(width * size) * _OVERSAMPLING, (size + 2) * _OVERSAMPLING))
    draw = ImageDraw.Draw(mask)
    for line in lines:
        points = [(x * em, (1 - y) * em) for x, y in line]
        draw.line(points, fill=255, width=round(_STROKE * em), joint="curve")
    return mask.reduce(_OVERSAMPLING)
