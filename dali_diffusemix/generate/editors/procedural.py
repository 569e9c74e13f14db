"""The procedural editor: restyles photographs for the nine prompts with NumPy and Pillow, without a diffusion model.

This is not diffusion: a photograph is graded, simplified and overlaid; nothing new is imagined.

    photograph -> colour grade (3-D table) -> simplify or tessellate -> light, strokes, snow, paper -> edit

Colours are float32 in 0 to 1, (height, width, 3); fields such as masks and noise are float32, (height, width).
Lengths are in units: a photograph's geometric mean side is 256 units, whatever its size in pixels, so that an edit
of a larger copy looks alike. All random choices come from the task's own generator.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from dali_diffusemix.base.words import did_you_mean
from dali_diffusemix.errors import ConfigError, DataError
from dali_diffusemix.generate.editors import PROMPTS, EditTask

Floats = NDArray[np.float32]
Restyling = Callable[["_Photo", np.random.Generator], Floats]

_UNITS = 256.0


@dataclass(frozen=True, kw_only=True)
class ProceduralConfig:
    """The procedural editor. It has no options."""

    accelerated: ClassVar[bool] = False
    multiple: ClassVar[int] = 1

    def settings(self) -> dict[str, str]:
        """The settings that an edit store records; `revision` changes if any pixel would."""
        return {
            "editor": "procedural",
            "model": "none (procedural restyling, not diffusion)",
            "revision": "1",
        }

    def check(self, prompts: Sequence[str]) -> None:
        """Raise ConfigError if a prompt is none of the nine."""
        ProceduralEditor(prompts)

    def load(self, prompts: Sequence[str], *, device: str, batch_size: int) -> "ProceduralEditor":
        """Make the editor; device and batch size do not matter. Raises ConfigError if a prompt is none of the nine."""
        return ProceduralEditor(prompts)


class ProceduralEditor:
    """Restyles photographs for the nine prompts without a model: procedural, not diffusion.

    An edit keeps the photograph's composition, so its label holds, and takes the colours, light and texture of the
    prompt. It is a pure function of (image, prompt, seed) for given versions of NumPy and Pillow. It serves
    demonstrations, tests and machines without an accelerator; it is not shown to train as well as a diffusion model's
    edit.
    """

    def __init__(self, prompts: Sequence[str] = PROMPTS) -> None:
        """Check the prompts.

        Args:
            prompts: The prompts that tasks may name, out of the nine in `PROMPTS`.

        Raises:
            ConfigError: A prompt is none of the nine.
        """
        for prompt in prompts:
            if prompt not in _RESTYLINGS:
                raise ConfigError(
                    f"prompts: {prompt!r} is not a prompt that the procedural editor knows; these are "
                    f"{', '.join(map(repr, _RESTYLINGS))}{did_you_mean(prompt, _RESTYLINGS)} For free text use a "
                    "diffusers editor."
                )
        self._prompts = tuple(prompts)

    def edit(self, images: Sequence[NDArray[np.uint8]], tasks: Sequence[EditTask]) -> list[NDArray[np.uint8]]:
        """Return one edit per task, in the tasks' order.

        Args:
            images: Originals, each (height, width, 3) uint8 RGB, at least 1x1.
            tasks: The edits to make; each names one of the editor's prompts.

        Returns:
            Edits, each (height, width, 3) uint8 RGB of its image's size.

        Raises:
            ConfigError: A task names another prompt.
            DataError: An image is not (height, width, 3) uint8.
        """
        edits: dict[int, NDArray[np.uint8]] = {}
        # Image by image, so that the views that its tasks share are computed once and then freed.
        order = sorted(range(len(tasks)), key=lambda task: tasks[task].image)
        for image, of_image in groupby(order, key=lambda task: tasks[task].image):
            photo = _Photo(images[image])
            edits.update((task, self._restyle(photo, tasks[task])) for task in of_image)
        return [edits[task] for task in range(len(tasks))]

    def _restyle(self, photo: "_Photo", task: EditTask) -> NDArray[np.uint8]:
        if task.prompt not in self._prompts:
            raise ConfigError(
                f"prompt must be one of {list(self._prompts)}, found {task.prompt!r}; name it in "
                "ProceduralEditor(prompts=...)."
            )
        rng = np.random.Generator(np.random.Philox(key=task.seed))
        return _to_bytes(_RESTYLINGS[task.prompt](photo, rng))


class _Photo:
    """A photograph and the views of it that several restylings share, each computed once."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or pixels.size == 0:
            raise DataError(
                f"images: each must be (height, width, 3) uint8 with at least one pixel; found {pixels.shape} "
                f"{pixels.dtype}. Convert it to RGB first."
            )
        self.pixels = pixels
        self.height, self.width = pixels.shape[:2]
        self.shape = (self.height, self.width)
        self.unit = math.sqrt(self.height * self.width) / _UNITS
        """Pixels in one unit of length."""

    @cached_property
    def picture(self) -> Image.Image:
        """The photograph as Pillow's RGB image."""
        return Image.fromarray(self.pixels)

    @cached_property
    def luma(self) -> Floats:
        """Brightness, (height, width)."""
        return _to_floats(self.picture.convert("L"))

    @cached_property
    def light(self) -> Image.Image:
        """The photograph with its shadows lifted as far as it is dark, as paint on pale paper would show it."""
        mean = min(max(float(self.luma.mean()), 0.02), 0.98)
        gamma = min(max(math.log(0.58) / math.log(mean), 0.42), 1.0)
        table = [round(255 * (level / 255) ** gamma) for level in range(256)]
        return self.picture.point(table * 3)

    @cached_property
    def painted(self) -> Image.Image:
        """`light` simplified into flat areas with crisp edges."""
        return Image.blend(_flatten(self.light, 2.2 * self.unit), self.light, 0.3)

    @cached_property
    def y(self) -> Floats:
        """Distance from the top, (height, 1): 0 at the top, 1 at the bottom."""
        return _centres(self.height)[:, None] / np.float32(self.height)

    @cached_property
    def x(self) -> Floats:
        """Distance from the left, (1, width): 0 at the left, 1 at the right."""
        return _centres(self.width)[None, :] / np.float32(self.width)

    def distance(self, x: float, y: float) -> Floats:
        """Distance in geometric mean sides to the point at fractions (x, y), (height, width)."""
        across = (self.x - np.float32(x)) * np.float32(self.width / self.unit / _UNITS)
        down = (self.y - np.float32(y)) * np.float32(self.height / self.unit / _UNITS)
        distance: Floats = np.hypot(across, down)
        return distance


# --- fields -----------------------------------------------------------------------------------------------------


def _centres(count: int) -> Floats:
    """Coordinates of the pixels' centres along an axis, (count,)."""
    return np.arange(count, dtype=np.float32) + np.float32(0.5)


def _to_bytes(colour: Floats) -> NDArray[np.uint8]:
    return (np.clip(colour, 0, 1) * 255 + 0.5).astype(np.uint8)


def _to_floats(picture: Image.Image) -> Floats:
    return np.asarray(picture, np.float32) * np.float32(1 / 255)


def _smoothstep(field: Floats, low: float, high: float) -> Floats:
    """Rise smoothly from 0 at `low` to 1 at `high`; falls instead where `high` is below `low`."""
    t = np.clip((field - np.float32(low)) * np.float32(1 / (high - low)), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)


def _mix(under: Floats, over: Floats, weight: Floats) -> Floats:
    """Blend colours by a field."""
    return np.asarray(under + (over - under) * weight[..., None], np.float32)


def _screen(under: Floats, light: Floats) -> Floats:
    """Add light as a second exposure would: never past white."""
    return np.asarray(1 - (1 - under) * (1 - np.clip(light, 0, 1)), np.float32)


def _resize(field: Floats, shape: tuple[int, int], law: Image.Resampling = Image.Resampling.BICUBIC) -> Floats:
    """Resample a field to `shape`."""
    return np.asarray(Image.fromarray(field).resize(shape[::-1], law))


def _blur(field: Floats, radius: float) -> Floats:
    """Blur a field of values 0 to 1 with a Gaussian, in 8 bits."""
    picture = Image.fromarray(_to_bytes(field))
    return _to_floats(picture.filter(ImageFilter.GaussianBlur(radius)))


def _lowpass(field: Floats, cell: float) -> Floats:
    """Blur a field in full precision by shrinking it to cells of `cell` pixels and growing it again."""
    height, width = field.shape
    small = (math.ceil(height / max(1.0, cell)), math.ceil(width / max(1.0, cell)))
    return _resize(_resize(field, small, Image.Resampling.BOX), (height, width))


def _noise(rng: np.random.Generator, photo: _Photo, cell: float | tuple[float, float], octaves: int = 1) -> Floats:
    """Smooth noise around 0.5, (height, width); `cell` is its grain in units, (down, across) if they differ."""
    down, across = cell if isinstance(cell, tuple) else (cell, cell)
    total = np.zeros(photo.shape, np.float32)
    for octave in range(octaves):
        step = photo.unit / 2**octave
        cells = (
            math.ceil(photo.height / max(1.0, down * step)),
            math.ceil(photo.width / max(1.0, across * step)),
        )
        total += _resize(rng.random((cells[0] + 1, cells[1] + 1), np.float32), photo.shape) * np.float32(0.5**octave)
    total /= np.float32(2 - 0.5 ** (octaves - 1))
    return total


# --- colour -----------------------------------------------------------------------------------------------------


def _rgb(*codes: str) -> Floats:
    """Colours from hexadecimal codes, (count, 3)."""
    return np.array([[int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)] for code in codes], np.float32)


def _ramp(field: Floats, colours: Floats, stops: Sequence[float] | None = None) -> Floats:
    """Colour a field by a gradient: `colours` stand at `stops`, by default evenly from 0 to 1."""
    at = np.linspace(0, 1, len(colours)) if stops is None else np.asarray(stops)
    table = np.stack([np.interp(np.linspace(0, 1, 256), at, colours[:, c]) for c in range(3)], 1)
    index = (np.clip(field, 0, 1) * 255 + 0.5).astype(np.uint8)
    return np.asarray(np.take(table.astype(np.float32), index, axis=0))


def _colour(red: float, green: float, blue: float) -> Floats:
    return np.array([red, green, blue], np.float32)


def _brightness(colour: Floats) -> Floats:
    """Brightness of colours, without their last axis; a plain sum, as BLAS would start threads."""
    weights = _colour(0.299, 0.587, 0.114)
    total: Floats = colour[..., 0] * weights[0] + colour[..., 1] * weights[1] + colour[..., 2] * weights[2]
    return total


def _tinted(colour: Floats, tint: Floats) -> Floats:
    """Give `colour` the hue and saturation of `tint`, keeping its brightness."""
    return np.asarray(tint + (_brightness(colour) - _brightness(tint))[..., None], np.float32)


def _saturated(colour: Floats, amount: float) -> Floats:
    grey = _brightness(colour)[..., None]
    return np.asarray(grey + (colour - grey) * np.float32(amount), np.float32)


_SIDE = 17


def _lattice() -> Floats:
    """Every colour of a coarse cube, (17³, 3), red fastest as Pillow's tables have it."""
    steps = np.linspace(0, 1, _SIDE, dtype=np.float32)
    blue, green, red = np.meshgrid(steps, steps, steps, indexing="ij")
    return np.stack([red, green, blue], -1).reshape(-1, 3)


_LATTICE = _lattice()


@lru_cache(maxsize=32)
def _table(grade: Callable[[Floats], Floats]) -> ImageFilter.Color3DLUT:
    return ImageFilter.Color3DLUT(_SIDE, np.clip(grade(_LATTICE), 0, 1).ravel().tolist())


def _graded(picture: Image.Image, grade: Callable[[Floats], Floats]) -> Floats:
    """Apply a module's function of colour, (count, 3), to a picture: computed on a coarse cube and interpolated."""
    return _to_floats(picture.filter(_table(grade)))


# --- structure --------------------------------------------------------------------------------------------------


def _flatten(picture: Image.Image, radius: float) -> Image.Image:
    """Smooth inside areas and keep their edges: each pixel takes the calm one of its four neighbouring squares.

    A Kuwahara filter with soft weights (Papari et al., 2007).
    """
    reach = max(1, round(radius))
    box = ImageFilter.BoxBlur(reach)
    grey = picture.convert("L")
    unrest = ImageChops.difference(grey, grey.filter(box)).filter(box)
    pad = ((reach, reach), (reach, reach))
    means = np.pad(np.asarray(picture.filter(box)), (*pad, (0, 0)), "edge")
    weights = np.pad((np.asarray(unrest, np.float32) + 0.5) ** -2, pad, "edge") ** 2
    total = np.zeros((picture.height, picture.width, 3), np.float32)
    norm = np.zeros((picture.height, picture.width), np.float32)
    for dy in (0, 2 * reach):
        for dx in (0, 2 * reach):
            window = (slice(dy, dy + picture.height), slice(dx, dx + picture.width))
            total += means[window] * weights[window][..., None]
            norm += weights[window]
    return Image.fromarray((total / norm[..., None] + 0.5).astype(np.uint8))


def _outlines(picture: Image.Image, width: float, contrast: float) -> Floats:
    """Dark drawn lines, 1 on a line, (height, width): a difference of Gaussians, `width` pixels wide."""
    grey = picture.convert("L")
    fine = _to_floats(grey.filter(ImageFilter.GaussianBlur(width)))
    wide = _to_floats(grey.filter(ImageFilter.GaussianBlur(width * 2.2)))
    return _smoothstep(wide - fine, 0.3 * contrast, contrast)


def _flow(photo: _Photo, fallback: float, shape: tuple[int, int]) -> Floats:
    """Angle of the edges nearby, in radians, resampled to `shape`; `fallback` where nothing has a direction."""
    cell = max(1.0, 3 * photo.unit)
    small = (math.ceil(photo.height / cell), math.ceil(photo.width / cell))
    luma = np.pad(_resize(photo.luma, small, Image.Resampling.BOX), 1, "edge")
    across = luma[1:-1, 2:] - luma[1:-1, :-2]
    down = luma[2:, 1:-1] - luma[:-2, 1:-1]
    # Directions have no sign, so they are averaged at the doubled angle (the structure tensor).
    calm = np.float32(0.002)
    cosine = _lowpass(down * down - across * across, 4) + calm * np.float32(math.cos(2 * fallback))
    sine = _lowpass(-2 * across * down, 4) + calm * np.float32(math.sin(2 * fallback))
    return np.arctan2(_resize(sine, shape), _resize(cosine, shape)) * np.float32(0.5)


def _smear(field: Floats, across: Floats, down: Floats, reach: float, steps: int = 11) -> Floats:
    """Average a field along straight strokes of ±`reach` pixels in the directions given."""
    height, width = field.shape
    rows, columns = _centres(height)[:, None], _centres(width)[None, :]
    flat = np.ascontiguousarray(field).ravel()
    total = np.zeros_like(field)
    for offset in np.linspace(-reach, reach, steps, dtype=np.float32):
        y = np.clip(rows + down * offset, 0, height - 1).astype(np.int32)
        x = np.clip(columns + across * offset, 0, width - 1).astype(np.int32)
        total += np.take(flat, y * width + x)
    return total / np.float32(steps)


# --- the nine ---------------------------------------------------------------------------------------------------


def _autumn(photo: _Photo, rng: np.random.Generator) -> Floats:
    """Green turns to gold and crimson in drifts, low golden light falls in, leaves drift down."""
    gold, crimson = _graded(photo.picture, _golden), _graded(photo.picture, _crimson)
    turned = rng.uniform(-0.15, 0.15)
    drifts = _smoothstep(_noise(rng, photo, 40, 3) + np.float32(turned), 0.36, 0.64)
    colour = _mix(gold, crimson, drifts) * _colour(1.0, rng.uniform(0.88, 1.0), rng.uniform(0.8, 1.1))
    glow = rng.uniform(0.7, 1.2) * np.exp(-2.2 * photo.distance(rng.uniform(-0.1, 1.1), -0.1))
    colour = _screen(colour, glow[..., None] * _colour(0.75, 0.48, 0.14))
    return _to_floats(_scatter_leaves(Image.fromarray(_to_bytes(colour)), photo.unit, rng))


def _golden(rgb: Floats) -> Floats:
    return _foliage(rgb, _rgb("2a1404", "9a4a08", "f0a020", "fff0c0"))


def _crimson(rgb: Floats) -> Floats:
    return _foliage(rgb, _rgb("20060a", "8a1c0c", "e8621c", "ffdfb0"))


def _foliage(rgb: Floats, leaf: Floats) -> Floats:
    """Recolour green by the gradient `leaf` and warm everything else."""
    red, green, blue = rgb[:, 0], rgb[:, 1], rgb[:, 2]
    leafy = _smoothstep((green - blue) - 0.5 * np.clip(red - green, 0, 1), 0.0, 0.18)
    leafy *= _smoothstep(red - green, 0.22, 0.02)
    luma = _brightness(rgb)
    warm = _saturated(rgb, 0.9) * _colour(1.1, 0.97, 0.74) + _colour(0.03, 0.01, 0.0)
    warm = 0.7 * warm + 0.3 * _ramp(luma, _rgb("2a1404", "8a4a14", "e8a038", "fff0cc"))
    return _mix(warm, _ramp(np.clip(luma * 1.25, 0, 1), leaf), leafy * 0.92)


_LEAF_COLOURS = _rgb("b3260f", "d9540f", "e88a12", "f2b52a", "8f3a12", "c43c10")


def _scatter_leaves(picture: Image.Image, unit: float, rng: np.random.Generator) -> Image.Image:
    """Paste falling maple leaves of several depths onto a picture, in place."""
    count = int(rng.integers(14, 24))
    sizes = 3.5 + 8.0 * rng.random(count) ** 2
    turns, tilts = rng.random(count) * 2 * math.pi, 0.35 + 0.65 * rng.random(count)
    centres = rng.random((count, 2)) * [picture.width, picture.height]
    inks = rng.integers(0, len(_LEAF_COLOURS), count)
    for i in np.argsort(sizes, kind="stable"):
        mask = _leaf(sizes[i] * unit, turns[i], tilts[i])
        colour = tuple(int(c) for c in _LEAF_COLOURS[inks[i]] * 255)
        corner = (int(centres[i, 0] - mask.width / 2), int(centres[i, 1] - mask.height / 2))
        picture.paste(colour, (*corner, corner[0] + mask.width, corner[1] + mask.height), mask)
    return picture


def _leaf(radius: float, turn: float, tilt: float) -> Image.Image:
    """A maple leaf's silhouette with lighter veins, turned by `turn` and foreshortened by `tilt`, as an L mask."""
    fine = 4
    side = max(1, math.ceil(2 * radius))
    angles = np.linspace(0, 2 * math.pi, 45)[:-1]
    rim = 0.62 + 0.3 * np.abs(np.cos(2.5 * angles)) ** 0.8 + 0.08 * np.cos(20 * angles)
    rim *= 0.8 + 0.2 * np.cos(angles)
    points = np.stack([rim * np.cos(angles), tilt * rim * np.sin(angles)], 1)
    spin = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])

    def points_of(outline: NDArray[np.float64]) -> list[tuple[float, ...]]:
        return [tuple(point) for point in (((outline @ spin.T) * radius + side / 2) * fine).tolist()]

    mask = Image.new("L", (side * fine, side * fine))
    draw = ImageDraw.Draw(mask)
    draw.polygon(points_of(points), fill=235)
    for tip in points[[0, 9, 35]]:
        draw.line(points_of(np.array([[-0.3, 0.0], 0.85 * tip])), fill=150, width=max(1, round(radius * fine / 14)))
    draw.line(points_of(np.array([[-0.3, 0.0], [-1.0, 0.12 * tilt]])), fill=235, width=max(1, round(radius * fine / 9)))
    return mask.reduce(fine)


def _snowy(photo: _Photo, rng: np.random.Generator) -> Floats:
    """Cold light, snow lying where surfaces face up, flakes near and far."""
    colour = _graded(photo.picture, _wintry)
    shade = _lowpass(photo.luma, 5 * photo.unit)
    step = max(1, round(3 * photo.unit))
    above = np.pad(shade, ((step, 0), (0, 0)), "edge")[: photo.height]
    drift = _noise(rng, photo, 24, 3)
    lying = 2.2 * (shade - above) + 0.8 * shade + 0.7 * (drift - 0.5) + 0.25 * (photo.y - 0.5)
    snow = _smoothstep(lying, 0.42, 0.72)
    relief = 0.9 + 0.35 * (photo.luma - shade) + 0.12 * (_noise(rng, photo, 3) - 0.5)
    colour = _mix(colour, relief[..., None] * _colour(0.93, 0.97, 1.03), 0.85 * snow)
    haze = 0.28 * (1 - photo.y) + 0.12 * drift
    colour = _mix(colour, _colour(0.82, 0.88, 0.95), haze)
    return _mix(colour, _colour(1.0, 1.0, 1.0), _flakes(photo, rng))


def _wintry(rgb: Floats) -> Floats:
    pale = _saturated(rgb, 0.45)
    return (0.1 + 0.88 * pale) * _colour(0.88, 0.98, 1.12)


def _flakes(photo: _Photo, rng: np.random.Generator) -> Floats:
    """Cover by falling snow, (height, width): many small flakes far away, a few large, blurred ones nearby."""
    cover = np.zeros(photo.shape, np.float32)
    for count, radius, opacity, blur in ((420, 0.7, 0.7, 0.0), (110, 1.3, 0.9, 0.5), (22, 3.2, 0.75, 1.6)):
        layer = Image.new("L", (2 * photo.width, 2 * photo.height))
        draw = ImageDraw.Draw(layer)
        x, y = rng.random((2, count)) * [[layer.width], [layer.height]]
        radii = radius * (0.6 + 0.8 * rng.random(count)) * photo.unit * 2
        for px, py, r in zip(x.tolist(), y.tolist(), radii.tolist(), strict=True):
            draw.ellipse((px - r, py - r, px + r, py + r), fill=255)
        layer = layer.reduce(2)
        if blur:
            layer = layer.filter(ImageFilter.GaussianBlur(blur * photo.unit))
        cover = np.maximum(cover, _to_floats(layer) * np.float32(opacity))
    return cover


_FIRE = _rgb("33204a", "8a2f4e", "e6552c", "ffa436", "d8502a", "6e2a3a", "301a36")
_ROSE = _rgb("241c66", "6a3a9c", "d8588a", "ff9a70", "c44a72", "5a2868", "2a1850")
"""Evening skies from the zenith through the horizon to the ground; a sunset lies somewhere between the two."""


def _sunset(photo: _Photo, rng: np.random.Generator) -> Floats:
    """Purple above, fire along the horizon, a low sun and its haze; what stands before the sun stays dark."""
    sun, height, backdrop = _sun_position(photo, rng)
    horizon, size = max(0.45, height + 0.1), rng.uniform(0.06, 0.1)
    colour = _graded(photo.picture, _dusk)
    drift = 0.05 * (_noise(rng, photo, (14, 90), 2) - 0.5)
    sky = _ramp(
        0.5 * photo.y / np.float32(horizon) + drift,
        _FIRE + (_ROSE - _FIRE) * np.float32(rng.random()),
        (0, 0.18, 0.36, 0.5, 0.62, 0.8, 1),
    )
    luma = _blur(photo.luma, 0.6 * photo.unit)
    colour = 0.38 * colour + 0.62 * sky * (0.25 + 1.05 * luma)[..., None]
    gap = photo.distance(sun, height)
    # Whatever differs from the sky around the sun is taken to stand in front of it.
    clear = _smoothstep(np.abs(photo.luma - backdrop), 0.3, 0.12)
    glow = (0.3 + 0.25 * clear) * np.exp(-5.5 * gap) + (0.15 + 0.3 * clear) * np.exp(-40 * gap * gap)
    colour = _screen(colour, glow[..., None] * _colour(1.0, 0.62, 0.22))
    return _mix(colour, _colour(1.0, 0.94, 0.72), 0.95 * clear * _smoothstep(gap, size, 0.85 * size))


def _sun_position(photo: _Photo, rng: np.random.Generator) -> tuple[float, float, float]:
    """The sun's position, as fractions (across, down), and the brightness there: the likeliest sky of a few draws."""
    small = _resize(photo.luma, (16, 16), Image.Resampling.BOX)
    ragged = _resize(np.abs(photo.luma - _lowpass(photo.luma, 10 * photo.unit)), (16, 16), Image.Resampling.BOX)
    across, down = rng.uniform([[0.1], [0.12]], [[0.9], [0.5]], (2, 12))
    cells = (down * 16).astype(int), (across * 16).astype(int)
    best = int(np.argmax(0.5 * small[cells] - 10 * ragged[cells] - 0.3 * down))
    return float(across[best]), float(down[best]), float(small[cells][best])


def _dusk(rgb: Floats) -> Floats:
    luma = _brightness(rgb)
    toned = _ramp(luma, _rgb("140a26", "4a1f4e", "b04a3c", "f59a4a", "ffe2a8"))
    return 0.55 * toned + 0.45 * rgb * _colour(1.15, 0.82, 0.72)


def _watercolor(photo: _Photo, rng: np.random.Generator) -> Floats:
    """Flat washes with wet edges that pool pigment, on rough paper that stays white at the rim."""
    paper = _noise(rng, photo, 1.5)
    wobble = [(_noise(rng, photo, 9) - 0.5) * np.float32(3.5 * photo.unit) for _ in range(2)]
    wash = _displaced(_to_floats(photo.painted), wobble[0], wobble[1])
    bloom = _noise(rng, photo, 36, 3) - 0.5
    pigment = rng.uniform(0.86, 1.06, 3).astype(np.float32)
    wash = _saturated(1 - (1 - wash) * pigment * np.float32(0.9), 1.45)
    luma = _brightness(wash)
    pooled = np.clip(_blur(luma, 2.5 * photo.unit) - luma, -0.04, 0.12)
    density = 0.95 + 5.0 * pooled + 0.9 * bloom + 0.28 * (paper - 0.5)
    colour = np.clip(wash, 0.03, 1) ** np.clip(density, 0.3, 2)[..., None]
    rim = np.minimum(np.minimum(photo.x, 1 - photo.x), np.minimum(photo.y, 1 - photo.y))
    painted = _smoothstep(rim + 0.09 * bloom, 0.0, 0.025)
    wet = 4 * painted * (1 - painted)
    sheet = _colour(0.985, 0.975, 0.95) * (0.94 + 0.1 * paper)[..., None]
    return _mix(sheet, colour * (1 - 0.15 * wet)[..., None], painted)


def _displaced(colour: Floats, across: Floats, down: Floats) -> Floats:
    """Fetch each pixel from `across` and `down` pixels away, (height, width, 3)."""
    height, width = colour.shape[:2]
    y = np.clip(_centres(height)[:, None] + down, 0, height - 1).astype(np.int32)
    x = np.clip(_centres(width)[None, :] + across, 0, width - 1).astype(np.int32)
    return np.asarray(np.take(colour.reshape(-1, 3), y * width + x, axis=0))


_SPECTRUM = _rgb("e8264a", "f5762a", "f7d038", "4ec94e", "2bb3d8", "3f5fe0", "9a3fd0")


def _rainbow(photo: _Photo, rng: np.random.Generator) -> Floats:
    """A spectral sheen slides over the picture and one bright bow stands in it."""
    angle = rng.uniform(0, 2 * math.pi)
    shift = rng.random()
    slide = math.cos(angle) * photo.x + math.sin(angle) * photo.y + np.float32(shift)
    phase = (slide + 0.35 * (_noise(rng, photo, 90) - 0.5)) % 1
    loop = np.concatenate([_SPECTRUM, _SPECTRUM[:1]])
    colour = _to_floats(photo.picture)
    sheen = _tinted(0.14 + 0.84 * colour, _ramp(phase, loop))
    colour = _mix(colour, sheen, 0.3 + 0.35 * photo.luma**0.5)
    bow = (photo.distance(rng.uniform(0.25, 0.75), rng.uniform(0.95, 1.2)) - rng.uniform(0.7, 0.8)) / 0.17
    inside = _smoothstep(bow, 0.0, 0.18) * _smoothstep(bow, 1.0, 0.82)
    band = _ramp(1 - bow, _SPECTRUM)
    return _mix(colour, 0.35 * colour + 0.75 * band, 0.72 * inside)


def _aurora(photo: _Photo, rng: np.random.Generator) -> Floats:
    """Night falls and curtains of green and violet light hang over the picture."""
    columns = max(2, math.ceil(photo.width / photo.unit / 2))
    small = sum((depth * _curtain(columns, rng) for depth in (0.7, 1.0)), np.zeros((64, columns, 3), np.float32))
    curtains = Image.fromarray(_to_bytes(small))
    light = _to_floats(curtains.resize(photo.picture.size, Image.Resampling.BICUBIC))
    haze = curtains.resize((max(2, columns // 10), 6), Image.Resampling.BOX)
    ambient = _to_floats(haze.resize(photo.picture.size, Image.Resampling.BICUBIC))
    colour = _graded(photo.picture, _night) * (1 + 1.6 * ambient)
    lit = 0.55 + 0.45 * _smoothstep(photo.luma, 0.05, 0.6)
    colour = _screen(colour, (light + 0.35 * ambient) * lit[..., None])
    stars = rng.random(photo.shape, np.float32) > 0.9985
    dark = _smoothstep(photo.luma, 0.6, 0.2) * _smoothstep(photo.y, 0.7, 0.2)
    return np.asarray(colour + (np.float32(0.7) * stars * dark)[..., None], np.float32)


def _night(rgb: Floats) -> Floats:
    luma = _brightness(rgb)
    return 0.55 * _ramp(luma, _rgb("02040f", "0c1c3c", "1f4a62", "4f8f90", "b8e0d0")) + 0.25 * rgb


def _curtain(columns: int, rng: np.random.Generator) -> Floats:
    """One folded curtain of light, (64, columns, 3): a bright hem, rays that fade upwards from green to violet."""
    rows = 64
    along = np.linspace(-0.2, 1.2, 6 * columns)
    waves = rng.uniform(0, 2 * math.pi, 4)
    fold = 0.07 * np.sin(9 * along + waves[0]) + 0.035 * np.sin(23 * along + waves[1])
    hem = rng.uniform(0.35, 0.6) + 0.13 * np.sin(4.5 * along + waves[2]) + 0.04 * np.sin(17 * along + waves[3])
    knots = np.linspace(-0.2, 1.2, columns // 2 + 2)
    rays = np.interp(along, knots, rng.random(len(knots)) ** 1.5) + 0.25
    # Where the curtain folds back over itself, its light adds up.
    x = np.floor((along + fold) * columns).astype(int)
    y = np.clip(hem * rows, 0, rows - 1).astype(int)
    seen = (x >= 0) & (x < columns)
    source = np.bincount((y * columns + x)[seen], rays[seen] / 6, rows * columns).reshape(rows, columns)
    for row in range(1, rows):
        source[row] += 0.78 * source[row - 1]
    brightness, height = np.zeros((2, rows, columns), np.float32)
    glow, age = np.zeros((2, columns))
    for row in range(rows - 1, -1, -1):
        glow = glow * 0.93 + 0.35 * source[row]
        age = (age + 1 / 26) * (1 - np.clip(0.7 * source[row], 0, 1))
        brightness[row], height[row] = glow, age
    tint = _ramp(height, _rgb("b8ffd0", "3df58a", "22c98a", "5a5ae0", "9a3fd8"))
    return np.asarray(tint * np.tanh(0.9 * brightness)[..., None], np.float32)


_GROUTS = _rgb("1c1917", "1c1917", "16202c", "7d7365")
"""Colours of the joints, to which a quarter of the tile's own colour is added."""


def _mosaic(photo: _Photo, rng: np.random.Generator) -> Floats:
    """Small tiles of one colour each, laid along the forms, bevelled, set in grout."""
    tile = max(2, round(rng.uniform(5.6, 7.4) * photo.unit))
    grout = _GROUTS[rng.integers(len(_GROUTS))]
    cells = (math.ceil(photo.height / tile) + 2, math.ceil(photo.width / tile) + 2)
    angles = _flow(photo, rng.uniform(0, math.pi), cells) + rng.uniform(-0.15, 0.15, cells).astype(np.float32)
    seen = (slice(photo.height), slice(photo.width))
    owner, gap, bevel = _tessellate(tile, angles, rng.uniform(-0.22, 0.22, (2, *cells)))
    owner, gap, bevel = owner[seen], gap[seen], bevel[seen]
    pixels, owners, tiles = np.asarray(photo.light), owner.ravel(), angles.size
    area = np.maximum(np.bincount(owners, minlength=tiles), 1) * 255
    means = np.stack([np.bincount(owners, pixels[..., c].ravel(), tiles) / area for c in range(3)], 1)
    colours = _saturated(means.astype(np.float32), 1.45) + rng.normal(0, 0.04, (tiles, 1)).astype(np.float32)
    face = np.take(colours, owner, axis=0) * (1 + 0.3 * bevel)[..., None]
    return _mix(face, 0.25 * face + grout, _smoothstep(gap, 0.19, 0.08))


def _tessellate(tile: int, angles: Floats, offsets: NDArray[np.float64]) -> tuple[NDArray[np.int32], Floats, Floats]:
    """Divide a plane among askew squares: each pixel belongs to the square whose centre is nearest in its own frame.

    Args:
        tile: Side of a cell, in pixels; each cell has one square.
        angles: The squares' rotations, (rows + 2, columns + 2) radians, with a margin of one cell all around.
        offsets: Their centres relative to the cells', (2, rows + 2, columns + 2), down and across, in cells.

    Returns:
        Owner, gap and bevel, each (rows·tile, columns·tile): the flat index of the pixel's square, the additional
        distance to the next one (0 on a joint), and the pixel's distance up and left of its square's centre.
    """
    rows, columns = angles.shape[0] - 2, angles.shape[1] - 2
    ids = np.arange(angles.size, dtype=np.int32).reshape(angles.shape)
    sites = (ids, np.cos(angles), np.sin(angles), *offsets.astype(np.float32))
    within = _centres(tile) / np.float32(tile) - np.float32(0.5)  # a cell, its centre at 0
    # Axes (row, pixel row, column, pixel column): a cell's site broadcasts over its pixels, without any gathering.
    shape = (rows, tile, columns, tile)
    owner = np.zeros(shape, np.int32)
    bevel = np.zeros(shape, np.float32)
    nearest, second = np.full((2, *shape), 9, np.float32)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            window = (slice(1 + dy, 1 + dy + rows), None, slice(1 + dx, 1 + dx + columns), None)
            name, cosine, sine, below, beside = (site[window] for site in sites)
            down = within[None, :, None, None] - dy - below
            across = within[None, None, None, :] - dx - beside
            distance = np.maximum(np.abs(cosine * across + sine * down), np.abs(cosine * down - sine * across))
            closer = distance < nearest
            np.minimum(second, np.maximum(nearest, distance), out=second)
            np.minimum(nearest, distance, out=nearest)
            np.copyto(owner, name, where=closer)
            np.copyto(bevel, -(down + across), where=closer)
    whole = (rows * tile, columns * tile)
    return owner.reshape(whole), (second - nearest).reshape(whole), bevel.reshape(whole)


_WOODBLOCK = _rgb(
    "1c1f2e", "23375e", "33608c", "7ba3b5", "b9c9bd", "efe3c4", "f6efdc", "dcbf86", "c98b45", "8a4a2c", "b8402e",
    "df8a6a", "5c6b3c", "95a06a", "434f68", "8d98a0",
)  # fmt: skip
"""Inks of the prints: indigo and Prussian blue, paper, ochre, vermilion, moss, slate."""

_SKY_INKS = _rgb("1f3f78", "1f3f78", "17606e", "b8402e", "a8742a")
"""Inks that a printer would wipe into the sky."""


def _ukiyoe(photo: _Photo, rng: np.random.Generator) -> Floats:
    """A woodblock print: few flat inks, dark contours, washi grain, a bokashi band and a seal."""
    colour = _graded(photo.painted, _inked)
    lines = _outlines(photo.painted, max(0.5, 1.0 * photo.unit), 0.035)
    for ink, edge in ((_SKY_INKS[rng.integers(len(_SKY_INKS))], 0.0), (_rgb("2c3f5e")[0], 1.0)):
        band = _smoothstep(np.abs(photo.y - np.float32(edge)), rng.uniform(0.16, 0.42), 0.0)
        colour *= 1 - (0.85 - 0.45 * edge) * band[..., None] * (1 - ink)
    grain = _noise(rng, photo, (1.2, 26), 2) - 0.5 + 0.3 * (_noise(rng, photo, 1) - 0.5)
    colour *= (1 + 0.16 * grain)[..., None]
    return _sealed(_mix(colour, _rgb("171a28")[0], 0.92 * lines), photo.unit, rng)


def _sealed(colour: Floats, unit: float, rng: np.random.Generator) -> Floats:
    """Stamp a small vermilion seal with paper-white strokes in a corner."""
    height, width = colour.shape[:2]
    side, fine = max(1, round(15 * unit)), 4
    stamp = Image.new("L", (side * fine, side * fine), 235)
    draw = ImageDraw.Draw(stamp)
    for x0, y0, x1, y1 in (rng.choice([0.2, 0.35, 0.5, 0.65, 0.8], (5, 4)) * side * fine).tolist():
        # Strokes run straight, as carved: along the axis on which they are longer.
        end = (x1, y0) if abs(x1 - x0) > abs(y1 - y0) else (x0, y1)
        draw.line(((x0, y0), end), fill=30, width=max(1, round(0.09 * side * fine)))
    margin = side // 2
    top = max(0, (margin, height - margin - side)[rng.integers(2)])
    left = max(0, (margin, width - margin - side)[rng.integers(2)])
    corner = colour[top : top + side, left : left + side]
    mask = _to_floats(stamp.reduce(fine))[: corner.shape[0], : corner.shape[1]]
    corner[:] = _mix(corner, _rgb("b5301f")[0], mask)
    return colour


def _inked(rgb: Floats) -> Floats:
    """The nearest ink; hue counts more than brightness."""
    vivid = np.clip((rgb - 0.5) * 1.1 + 0.53, 0, 1)
    vivid = _saturated(vivid, 1.25)

    def opponent(colour: Floats) -> Floats:
        luma = _brightness(colour)
        return np.stack([luma, 1.2 * (colour[:, 0] - luma), 1.2 * (colour[:, 2] - luma)], 1)

    gaps = ((opponent(vivid)[:, None] - opponent(_WOODBLOCK)[None]) ** 2).sum(-1)
    return np.asarray(_WOODBLOCK[gaps.argmin(1)], np.float32)


def _crayon(photo: _Photo, rng: np.random.Generator) -> Floats:
    """Wax strokes along the forms on white paper, denser in the shade, over a rubbed base; broken contours."""
    angle = _flow(photo, rng.uniform(0.35, 1.2) * rng.choice([-1, 1]), photo.shape)
    strokes = _smear(_noise(rng, photo, 2), np.cos(angle), np.sin(angle), 10 * photo.unit)
    strokes = np.clip((strokes - 0.5) * 3 + 0.5, 0, 1)
    tooth = _noise(rng, photo, 1.3)
    wax = _graded(photo.painted, _waxes)
    pressure = 1 - _brightness(wax)
    stroked = _smoothstep(0.2 + 0.85 * pressure - strokes - 0.15 * (tooth - 0.5), -0.2, 0.2)
    rubbed = 0.6 * _smoothstep(0.35 + 0.7 * pressure - tooth, -0.3, 0.3)
    lines = _outlines(photo.painted, max(0.5, 1.1 * photo.unit), 0.04) * _smoothstep(tooth, 0.2, 0.5)
    paper = _colour(0.99, 0.98, 0.955) * (0.97 + 0.05 * tooth)[..., None]
    sheet = _mix(paper, wax, np.maximum(rubbed, stroked))
    return _mix(sheet, 0.3 * wax, 0.8 * lines)


def _waxes(rgb: Floats) -> Floats:
    """Strong wax colours that leave the paper some of the brightness."""
    return 0.06 + 0.88 * np.clip(_saturated(rgb, 1.7), 0, 1) ** 1.15


_RESTYLINGS: dict[str, Restyling] = {
    "autumn": _autumn,
    "snowy": _snowy,
    "sunset": _sunset,
    "watercolor art": _watercolor,
    "rainbow": _rainbow,
    "aurora": _aurora,
    "mosaic": _mosaic,
    "ukiyo-e": _ukiyoe,
    "a sketch with crayon": _crayon,
}
