"""Fractal flames: the structural images F_v, rendered.

    genome (Philox) -> orbits -> frame -> 64 x 64 preview -> full picture: (size, size, 3) uint8
       ^                           |            |
       +------- next attempt, if it is collapsed or dull

Fractal i of seed s is a function of (s, i, size), whatever the number of threads, and shows the same motif at every
size. The chaos game gives the same bits in C++ and in NumPy (about ten times slower); the pictures' tones use NumPy's
logarithms and powers, whose last bit may differ between machines.

Source: Draves and Reckase, "The Fractal Flame Algorithm" (2008).
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.base import native
from dali_diffusemix.base.cpus import cpus
from dali_diffusemix.base.philox import FLAME, philox4x32, uniform
from dali_diffusemix.errors import ConfigError

_Floats = NDArray[np.floating[Any]]  # float32 throughout

_GENOME: Final = 2**32 - 1  # counter word 1, where an orbit has its step
_START: Final = 2**32 - 2
_CLOUD: Final = 1024  # points that are sorted together; kernels/flame.cpp has the same number
_POINTS: Final = 16 * _CLOUD
_PILOT_STEPS: Final = 24
_SAMPLES_PER_PIXEL: Final = 96
_OVERSAMPLING: Final = 2
_PREVIEW: Final = 64  # pixels a side
_MOST_STEPS: Final = 2**24 // _POINTS  # 2**24 samples of at most 255 fit 32 bits, even in one pixel

_VARIATIONS: Final = (
    "linear", "sinusoidal", "spherical", "swirl", "horseshoe", "polar", "handkerchief", "heart", "disc", "spiral",
    "hyperbolic", "diamond", "ex", "julia", "bent", "eyefish", "bubble", "cylinder",
)  # fmt: skip
# A map's row, as kernels/flame.cuh describes it.
_POST, _COLOUR, _SPEED, _THRESHOLD, _WEIGHTS = 6, 12, 13, 14, 15
_ROW: Final = _WEIGHTS + len(_VARIATIONS)
_IDENTITY: Final = (1, 0, 0, 0, 1, 0)
# OKLab hues in degrees: red, orange, yellow, green, teal, blue, violet, magenta. Evenly spaced ones look mostly green.
_HUES: Final = (25, 55, 95, 140, 195, 260, 300, 345)
# Björn Ottosson, "A perceptual color space for image processing" (2020); transposed, for row vectors.
_LAB_TO_LMS: Final = np.array(
    [[1, 1, 1], [0.3963377774, -0.1055613458, -0.0894841775], [0.2158037573, -0.0638541728, -1.2914855480]]
)
_LMS_TO_RGB: Final = np.array(
    [
        [4.0767416621, -1.2684380046, -0.0041960863],
        [-3.3077115913, 2.6097574011, -0.7034186147],
        [0.2309699292, -0.3413193965, 1.7076147010],
    ]
)


# The genome -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Flame:
    """The genome of one attempt at one fractal."""

    seed: int
    index: int
    attempt: int
    maps: _Floats  # (maps, 33), laid out as kernels/flame.cuh says
    palette: NDArray[np.uint8]  # (256, 3) RGB


class _FlameDraws:
    """Uniform numbers of one attempt, taken in order."""

    def __init__(self, seed: int, index: int, attempt: int) -> None:
        counter = np.array([(i, _GENOME, index, attempt) for i in range(128)], dtype=np.uint32)
        self._values: Iterator[float] = iter(uniform(philox4x32(counter, (seed, FLAME))).ravel().tolist())

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._values)

    def below(self, bound: int) -> int:
        return int(next(self._values) * bound)

    def chance(self, probability: float) -> bool:
        return next(self._values) < probability


def _affine(draws: _FlameDraws, smallest: float, largest: float, reach: float) -> list[float]:
    """Return a b c d e f: a rotation, two scales, a rotation, and a shift by at most `reach`."""
    p, q = draws.between(0, math.tau), draws.between(0, math.tau)
    s, t = draws.between(smallest, largest), draws.between(smallest, largest)
    far, way = reach * math.sqrt(draws.between(0, 1)), draws.between(0, math.tau)
    cp, sp, cq, sq = math.cos(p), math.sin(p), math.cos(q), math.sin(q)
    return [
        s * cp * cq - t * sp * sq, -s * cp * sq - t * sp * cq, far * math.cos(way),
        s * sp * cq + t * cp * sq, -s * sp * sq + t * cp * cq, far * math.sin(way),
    ]  # fmt: skip


def _draw_flame(seed: int, index: int, attempt: int) -> _Flame:
    """Draw three to six maps, rotations for every fourth flame, and a palette. The numbers were chosen by eye."""
    draws = _FlameDraws(seed, index, attempt)
    count = 3 + draws.below(4)
    # Two or three variations per flame give it a character; a dash of linear keeps it from falling apart.
    favourites = [draws.below(len(_VARIATIONS)) for _ in range(2 + draws.below(2))]
    maps = np.zeros((count, _ROW))
    for i, row in enumerate(maps):
        row[:_POST] = _affine(draws, 0.45, 1.1, 1.2)
        share = draws.between(0, 1)
        row[_WEIGHTS + favourites[draws.below(len(favourites))]] += share
        row[_WEIGHTS + (favourites[draws.below(len(favourites))] if draws.chance(0.6) else 0)] += 1 - share
        row[_POST:_COLOUR] = _affine(draws, 0.7, 1.0, 0.6) if draws.chance(0.4) else _IDENTITY
        row[_COLOUR] = (i + draws.between(0, 0.9)) / count
        row[_SPEED] = draws.between(0.45, 0.7)
    weights = [draws.between(0.3, 1) for _ in range(count)]
    if draws.chance(0.25):  # symmetry: rotations about the origin that leave the colour alone
        order = 2 + draws.below(5)
        turns = np.zeros((order - 1, _ROW))
        for k, row in enumerate(turns, start=1):
            a = math.tau * k / order
            row[:_POST] = math.cos(a), -math.sin(a), 0, math.sin(a), math.cos(a), 0
            row[_POST:_COLOUR] = _IDENTITY
            row[_WEIGHTS] = 1
        maps = np.concatenate([maps, turns])
        weights += [sum(weights)] * (order - 1)
    maps[1:, _THRESHOLD] = np.cumsum(weights)[:-1] / sum(weights)
    # Coarse numbers: a last bit of a sine on another machine must not start another orbit.
    maps = np.rint(maps * 4096) / 4096
    return _Flame(seed=seed, index=index, attempt=attempt, maps=maps.astype(np.float32), palette=_draw_palette(draws))


def _draw_palette(draws: _FlameDraws) -> NDArray[np.uint8]:
    """Return (256, 3) RGB: a smooth closed walk through OKLab between two hues, light and dark by turns."""
    knots = 4 + 2 * draws.below(2)
    first = draws.below(len(_HUES))
    pair = first, (first + 2 + draws.below(5)) % len(_HUES)  # at least two names apart
    names = [*pair, *(pair[draws.below(2)] for _ in range(knots - 2))]
    hue = np.radians([_HUES[name] + draws.between(-12, 12) for name in names])
    light = np.array([draws.between(0.35, 0.6) if k % 2 else draws.between(0.7, 0.95) for k in range(knots)])
    chroma = np.array([draws.between(0.1, 0.26) for _ in range(knots)])
    corner = np.stack([light, chroma * np.cos(hue), chroma * np.sin(hue)], axis=1)
    whole, part = np.divmod(np.arange(256) * knots / 256, 1)
    k, smooth = whole.astype(int), (part * part * (3 - 2 * part))[:, None]
    lab = corner[k] * (1 - smooth) + corner[(k + 1) % knots] * smooth
    linear = np.clip((lab @ _LAB_TO_LMS) ** 3 @ _LMS_TO_RGB, 0, 1)
    rgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    palette: NDArray[np.uint8] = np.rint(255 * rgb).astype(np.uint8)
    return palette


# The chaos game -------------------------------------------------------------------------------------------------------


def _unit(words: NDArray[np.uint32]) -> _Floats:
    """Map words to [0, 1): their upper 24 bits, exactly."""
    return (words >> 8).astype(np.float32) * np.float32(2.0**-24)


def _sin_turns(t: _Floats) -> _Floats:
    t = t - ((t + 12582912.0) - 12582912.0)
    a = np.abs(t)
    u = np.minimum(a, 0.5 - a)
    q = u * u
    s = u * (6.2831853 + q * (-41.341702 + q * (81.605249 + q * (-76.705860 + q * 42.058694))))
    return np.where(t < 0, -s, s)


def _angle_turns(x: _Floats, y: _Floats) -> _Floats:
    ax, ay = np.abs(x), np.abs(y)
    z = np.minimum(ax, ay) / (np.maximum(ax, ay) + 1e-20)
    q = z * z
    t = z * (0.15915132 + q * (-0.05293867 + q * (0.03080340 + q * (-0.01853087 + q * (0.00838004 + q * -0.00186549)))))
    t = np.where(ax < ay, t, 0.25 - t)
    t = np.where(y < 0, 0.5 - t, t)
    return np.where(x < 0, -t, t)


def _variation(name: str, x: _Floats, y: _Floats, bits: NDArray[np.uint32]) -> tuple[_Floats, _Floats]:
    r2 = x * x + y * y + 1e-12
    r = np.sqrt(r2)

    def sine(a: _Floats) -> _Floats:
        return _sin_turns(a * 0.15915494)

    def cosine(a: _Floats) -> _Floats:
        return _sin_turns(a * 0.15915494 + 0.25)

    match name:
        case "linear":
            return x, y
        case "sinusoidal":
            return sine(x), sine(y)
        case "spherical":
            return x / r2, y / r2
        case "swirl":
            s, c = sine(r2), cosine(r2)
            return x * s - y * c, x * c + y * s
        case "horseshoe":
            return (x - y) * (x + y) / r, 2 * x * y / r
        case "polar":
            return 2 * _angle_turns(x, y), r - 1
        case "handkerchief":
            s, c = sine(r), cosine(r)
            return x * c + y * s, y * c + x * s
        case "heart":
            t = _angle_turns(x, y) * r
            return r * _sin_turns(t), -r * _sin_turns(t + 0.25)
        case "disc":
            t, h = 2 * _angle_turns(x, y), 0.5 * r
            return t * _sin_turns(h), t * _sin_turns(h + 0.25)
        case "spiral":
            return (y / r + sine(r)) / r, (x / r - cosine(r)) / r
        case "hyperbolic":
            return x / r2, y
        case "diamond":
            return x / r * cosine(r), y / r * sine(r)
        case "ex":
            s, c = sine(r), cosine(r)
            p, q = (x * c + y * s) / r, (y * c + x * s) / r
            p3, q3 = p * p * p, q * q * q
            return r * (p3 + q3), r * (p3 - q3)
        case "julia":
            p = np.sqrt(0.5 * (r + np.abs(y)))
            q = 0.5 * np.abs(x) / (p + 1e-20)
            u, v = np.where(y < 0, q, p), np.where(y < 0, p, q)
            w = np.where(x < 0, -v, v)
            return np.where(bits & 1, -u, u), np.where(bits & 1, -w, w)
        case "bent":
            return np.where(x < 0, 2 * x, x), np.where(y < 0, 0.5 * y, y)
        case "eyefish":
            return 2 * x / (r + 1), 2 * y / (r + 1)
        case "bubble":
            return 4 * x / (r2 + 4), 4 * y / (r2 + 4)
        case "cylinder":
            return sine(x), y
    raise AssertionError(name)


def _play_numpy(
    flame: _Flame, points: _Floats, first_step: int, steps: int, frame: _Floats, histogram: NDArray[np.uint32] | None
) -> None:
    """Do what kernels/flame.cpp does, bit for bit."""
    clouds = len(points)
    counter = np.zeros((clouds * _CLOUD // 4, 4), np.uint32)
    counter[:, 0] = np.arange(len(counter))
    counter[:, 2:] = flame.index, flame.attempt
    colours = np.insert(flame.palette, 0, 1, axis=1).astype(np.uint32)
    x, y, c = points[:, 0], points[:, 1], points[:, 2]
    for step in range(first_step, first_step + steps):
        counter[:, 1] = step
        words = philox4x32(counter, (flame.seed, FLAME))
        bits = words.reshape(clouds, -1, 4).swapaxes(1, 2).reshape(clouds, _CLOUD)
        draw = _unit(bits)
        choice = (draw[..., None] >= flame.maps[1:, _THRESHOLD]).sum(-1, dtype=np.uint8)
        order = np.argsort(choice, axis=1, kind="stable")
        x, y, c, choice = (np.take_along_axis(a, order, axis=1) for a in (x, y, c, choice))
        for m, row in enumerate(flame.maps):
            here = np.nonzero(choice == m)
            px, py, own = x[here], y[here], bits[here]
            ax, ay = row[0] * px + row[1] * py + row[2], row[3] * px + row[4] * py + row[5]
            sx, sy = np.zeros_like(ax), np.zeros_like(ay)
            for name, weight in zip(_VARIATIONS, row[_WEIGHTS:], strict=True):
                if weight != 0:
                    vx, vy = _variation(name, ax, ay, own)
                    sx, sy = sx + weight * vx, sy + weight * vy
            b = row[_POST:_COLOUR]
            x[here], y[here] = b[0] * sx + b[1] * sy + b[2], b[3] * sx + b[4] * sy + b[5]
            c[here] = c[here] * (1 - row[_SPEED]) + row[_SPEED] * row[_COLOUR]
        near = (np.abs(x) < 1e3) & (np.abs(y) < 1e3)
        x = np.where(near, x, 2 * draw - 1)
        y = np.where(near, y, 2 * _unit(bits << np.uint32(12)) - 1)
        if histogram is None:
            continue
        height, width = histogram.shape[:2]
        u = np.clip((x - frame[0]) * frame[2] + 1, 0, width - 0.5).astype(np.int64)
        v = np.clip((y - frame[1]) * frame[3] + 1, 0, height - 0.5).astype(np.int64)
        shade = colours[(c * np.float32(255.9)).astype(np.int64)]
        cell = (v * width + u).ravel()
        for channel in range(4):
            sums = np.bincount(cell, shade[..., channel].ravel(), minlength=height * width)
            histogram[..., channel] += sums.reshape(height, width).astype(np.uint32)
    points[:, 0], points[:, 1], points[:, 2] = x, y, c


def _play(
    flame: _Flame,
    points: _Floats,
    first_step: int,
    steps: int,
    frame: _Floats,
    histogram: NDArray[np.uint32] | None,
    threads: int,
) -> None:
    """Move `points` by `steps` and count them in `histogram`, if given; see native.play_flame."""
    if native.library() is None:
        with np.errstate(all="ignore"):  # points that leave are replaced, as in C++
            _play_numpy(flame, points, first_step, steps, frame, histogram)
    else:
        address = flame.seed, flame.index, flame.attempt
        native.play_flame(flame.maps, flame.palette, frame, address, first_step, steps, points, histogram, threads)


def _start(flame: _Flame) -> _Floats:
    """Return (clouds, 3, 1024): x and y in [-1, 1), colour in [0, 1)."""
    counter = np.zeros((_POINTS * 3 // 4, 4), np.uint32)
    counter[:, 0] = np.arange(len(counter))
    counter[:, 1:] = _START, flame.index, flame.attempt
    points = _unit(philox4x32(counter, (flame.seed, FLAME))).reshape(-1, 3, _CLOUD)
    points[:, :2] = 2 * points[:, :2] - 1
    return points


# The picture ----------------------------------------------------------------------------------------------------------


def _frame(points: _Floats) -> _Floats | None:
    """Return (4,) left, top, 1/width, 1/height of a window on the middle 80 % of the points along both axes.

    None if the points have collapsed to a point or a line, or fly apart.
    """
    (left, right), (top, bottom) = (np.quantile(points[:, axis], [0.1, 0.9]) for axis in (0, 1))
    width, height = right - left, bottom - top
    if not (0.02 < width < 50 and 0.02 < height < 50):
        return None
    # A pixel may be up to 1.6 times as wide as high or the reverse: flames bear that, and it fills the picture.
    w, h = max(width, height / 1.6), max(height, width / 1.6)
    return np.array([(left + right - w) / 2, (top + bottom - h) / 2, 1 / w, 1 / h], np.float32)


def _spread_palette(flame: _Flame, points: _Floats) -> _Flame:
    """Widen the palette where the points' colours crowd, so that all of it is seen."""
    colours = np.sort(points[:, 2], axis=None)
    rank = np.searchsorted(colours, np.arange(256) / 255.9) / colours.size
    shade = 255 * (0.75 * rank + 0.25 * np.linspace(0, 1, 256))
    return dataclasses.replace(flame, palette=flame.palette[shade.astype(int)])


def _filter(planes: _Floats, taps: list[int], *, dilation: int = 1, stride: int = 1) -> _Floats:
    """Filter the last two axes of (planes, height, width) with `taps` over their sum, edges repeated."""
    margin = ((len(taps) - 1) * dilation + 1 - stride) // 2
    for axis in (1, 2):
        n = planes.shape[axis] // stride
        padded = np.pad(planes, [(margin, margin) if a == axis else (0, 0) for a in range(3)], mode="edge")
        planes = np.zeros_like(padded, shape=(*planes.shape[:axis], n, *planes.shape[axis + 1 :]))
        for k, tap in enumerate(taps):
            window = slice(k * dilation, k * dilation + n * stride, stride)
            planes += padded[(slice(None),) * axis + (window,)] * np.float32(tap / sum(taps))
    return planes


def _luma(picture: _Floats) -> _Floats:
    red, green, blue = np.moveaxis(picture, -1, 0)
    luma: _Floats = 0.299 * red + 0.587 * green + 0.114 * blue  # ITU-R BT.601
    return luma


def _develop(planes: _Floats, backdrop: _Floats) -> tuple[_Floats, _Floats]:
    """Turn sums into a picture: density filter, log-density, halving, colour, exposure, backdrop.

    Args:
        planes: (4, 2 size, 2 size) hits, and sums of red, green and blue of 0 to 255.
        backdrop: (3,) RGB in [0, 1], shown where there are no hits.

    Returns:
        picture: (size, size, 3) RGB in [0, 1].
        cover: (size, size) in [0, 1], the share of the flame.
    """
    # Where there are few hits, average over a wider area (Draves and Reckase's density estimation, on two scales).
    near = _filter(planes, [1, 4, 6, 4, 1])
    far = _filter(near, [1, 4, 6, 4, 1], dilation=2)
    fine, coarse = near[:1] / (near[:1] + 40), far[:1] / (far[:1] + 10)
    far += (near - far) * coarse
    planes = far + (planes - far) * fine

    hits = planes[0]
    level = np.log1p(hits * np.float32(20 / hits.mean()))
    low, high = np.quantile(level, [0.02, 0.998])
    level = np.clip((level - np.float32(0.8 * low)) / np.float32(max(high - 0.8 * low, 1e-6)), 0, 1)
    planes = planes * (level / np.maximum(hits, 1e-6))
    cover, *colour = _filter(planes, [1, 3, 3, 1], stride=2)
    picture = np.stack(colour, axis=-1) / np.maximum(255 * cover, 1e-6)[..., None]

    # Overlapping sheets average towards grey: restore the saturation.
    luma = _luma(picture)[..., None]
    saturation = float(np.average(picture.max(-1) - picture.min(-1), weights=cover))
    picture = luma + (picture - luma) * np.float32(np.clip(0.42 / max(saturation, 1e-3), 0.8, 1.8))

    # Expose so that the median of the cover is 0.55 and the mean of the picture 0.36, as far as gamma may go.
    gamma = np.clip(math.log(float(np.median(cover)) + 1e-3) / math.log(0.55), 0.8, 3)
    cover = (cover ** np.float32(1 / gamma))[..., None]
    picture = np.clip(picture * cover, 0, 1)
    picture = np.clip(picture * np.float32(0.95 / max(np.quantile(picture.max(-1), 0.97), 1e-3)), 0, 1)
    mean = float(np.clip(_luma(picture).mean(), 0.01, 0.99))
    picture = picture ** np.float32(np.clip(math.log(0.36) / math.log(mean), 0.65, 1.4))
    picture += (1 - picture) * (0.35 * cover**6)  # the densest places glow
    picture += (1 - picture) * (1 - cover) ** 2 * backdrop
    return picture, cover[..., 0]


def _picture(
    flame: _Flame, points: _Floats, first_step: int, frame: _Floats, size: int, threads: int
) -> tuple[_Floats, _Floats, int]:
    """Play on and develop; return the picture and its cover as _develop does, and the step reached."""
    side = _OVERSAMPLING * size
    last = first_step + max(8, _SAMPLES_PER_PIXEL * size * size // _POINTS)
    planes = np.zeros((4, side, side), np.float32)
    scale = frame * np.array([1, 1, side, side], np.float32)
    for step in range(first_step, last, _MOST_STEPS):
        histogram = np.zeros((side + 2, side + 2, 4), np.uint32)
        steps = min(_MOST_STEPS, last - step)
        _play(flame, points, step, steps, scale, histogram, threads)
        planes += histogram[1:-1, 1:-1].transpose(2, 0, 1)
    backdrop = flame.palette[flame.palette.sum(axis=1).argmin()] * np.float32(0.5 / 255)
    return *_develop(planes, backdrop), last


def _flaw(picture: _Floats, cover: _Floats) -> str | None:
    """Return the flaw of a dull (64, 64, 3) preview in [0, 1] with its (64, 64) cover, or None."""
    luma = _luma(picture)
    cells = cover.reshape(8, 8, 8, 8).mean(axis=(1, 3))
    if (cells > 0.15).mean() < 0.9:
        return "empty: more than a tenth of its 8 x 8 cells show no flame"
    if not 0.2 <= luma.mean() <= 0.65:
        return "too dark or too bright: its mean luma lies outside 0.2 to 0.65"
    # Pairs of pixels are averaged first, so that grain does not count as detail.
    pairs = luma.reshape(32, 2, 32, 2).mean(axis=(1, 3))
    if (pairs.reshape(8, 4, 8, 4).std(axis=(1, 3)) > 0.04).mean() < 0.75:
        return "flat: in more than a quarter of its 8 x 8 cells luma deviates by 0.04 or less"
    share = np.histogram(luma, 64, (0, 1))[0] / luma.size
    share = share[share > 0]
    if -(share * np.log2(share)).sum() < 4.5:
        return "poor: its luma, in 64 levels, has less than 4.5 bits of entropy"
    red, green, blue = np.moveaxis(picture, -1, 0)
    if math.hypot((red - green).std(), ((red + green) / 2 - blue).std()) < 0.12:
        return "monochrome: its opponent colours deviate by less than 0.12 (Hasler and Süsstrunk 2003)"
    return None


def render(index: int, *, size: int = 256, seed: int = 0, threads: int | None = None) -> NDArray[np.uint8]:
    """Render fractal `index` of `seed`.

    Args:
        index: The number of the fractal, 0 <= index < 2**32.
        size: Pixels of a side, 16 to 1024.
        seed: 0 <= seed < 2**32.
        threads: The most threads; by default one per CPU. The result does not depend on it.

    Returns:
        (size, size, 3) uint8 RGB.

    Raises:
        ConfigError: An argument is out of range.
    """
    check_ranges(index=index, size=size, seed=seed, threads=threads)
    threads = threads or cpus()
    attempt = 0
    while True:  # about every second attempt passes
        flame = _draw_flame(seed, index, attempt)
        points = _start(flame)
        _play(flame, points, 0, _PILOT_STEPS, np.zeros(4, np.float32), None, threads)
        frame = _frame(points)
        if frame is not None:
            flame = _spread_palette(flame, points)
            preview, cover, step = _picture(flame, points, _PILOT_STEPS, frame, _PREVIEW, threads)
            if _flaw(preview, cover) is None:
                break
        attempt += 1
    picture, _, _ = _picture(flame, points, step, frame, size, threads)
    return np.rint(255 * picture).astype(np.uint8)


def check_ranges(*, index: int = 0, count: int = 1, size: int = 16, seed: int = 0, threads: int | None = None) -> None:
    """Raise ConfigError unless every argument is in its range."""
    rules = {
        "index": (index, 0, 2**32 - 1),
        "count": (count, 1, 2**32 - 1),
        "size": (size, 16, 1024),
        "seed": (seed, 0, 2**32 - 1),
        "threads": (1 if threads is None else threads, 1, 1024),
    }
    for name, (value, least, most) in rules.items():
        if not least <= value <= most:
            raise ConfigError(f"{name} must lie in {least} to {most}, found {value}.")
