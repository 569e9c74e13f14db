"""Augmentation after the mix: which operations a sample gets, and how strong, drawn by the plan.

The settings are frozen values with torchvision's names, ranges and order of operations; `TimmRandAugment` has timm's.
Each draws from streams of its own (`base.philox`), by its kind and how many of its kind come before: adding or removing
one changes no draw of another kind.
`mix.augment` is the law of the pixels.

Sources: Müller and Hutter, "TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation", ICCV 2021; Cubuk et
al., "RandAugment: Practical automated data augmentation with a reduced search space", NeurIPS 2020; Cubuk et al.,
"AutoAugment: Learning Augmentation Strategies from Data", CVPR 2019; Zhong et al., "Random Erasing Data Augmentation",
AAAI 2020; Touvron et al., "DeiT III: Revenge of the ViT", ECCV 2022; torchvision 0.29.1 (transforms.v2); timm 1.0.31.
"""

import contextlib
import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, ClassVar, Final, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.base.philox import AUGMENT, below, uniform
from dali_diffusemix.errors import ConfigError
from dali_diffusemix.plan.crops import Draws
from dali_diffusemix.plan.numbers import (
    alike,
    choice,
    interval,
    number_in,
    pair,
    probability,
    put,
    real,
    refused,
    several,
    whole,
    whole_number,
)
from dali_diffusemix.plan.schedule import Schedule, schedule_meant

OPERATIONS: Final = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    *("brightness", "contrast", "color", "sharpness", "hue", "grayscale"),
    *("posterize", "solarize", "solarize_add", "autocontrast", "equalize", "invert"),
    *("blur", "erase", "erase_noise"),
)
"""The operations; a code is the index in this tuple. kernels/augment.cuh has the same codes."""

CODES: Final = {name: code for code, name in enumerate(OPERATIONS)}

FILTERS: Final = ("nearest", "bilinear", "bicubic")
Interpolation: TypeAlias = Literal["nearest", "bilinear", "bicubic"]

OPERATION: Final = np.dtype(
    [
        ("code", np.uint8),
        ("filter", np.uint8),
        ("fill", np.uint8, 3),
        ("unused", np.uint8, 3),
        ("values", np.float64, 8),
    ]
)
"""One operation on one sample. `values` by its code, the others 0:

    shear_x, shear_y            pixels across for each pixel down, pixels down for each across; no pixel of the sample
                                is read 2**15 pixels or more away
    translate_x, translate_y    pixels to the right, pixels down
    rotate                      degrees, counterclockwise about the middle
    brightness, contrast, color, sharpness   factor; 1 changes nothing
    hue                         turns, -1/2 to 1/2
    posterize                   bits that are kept
    solarize                    threshold; values from it on are inverted
    solarize_add                what is added to values below 128
    blur                        sigma in pixels; side of the kernel
    erase                       top, left, height, width in pixels; R, G, B as `RandomErasing.value` says
    erase_noise                 top, left, height, width; two words that key the noise
"""


def no_operations(count: int) -> NDArray[np.void]:
    """(count, 0) of `OPERATION`."""
    return np.zeros((count, 0), dtype=OPERATION)


@runtime_checkable
class Augmentation(Protocol):
    """One setting of augmentation."""

    @property
    def slots(self) -> int:
        """Operations that a sample gets from it at most."""
        ...

    def draw(self, out: NDArray[np.void], size: tuple[int, int], draws: Draws) -> None:
        """Draw the operations of a batch.

        Args:
            out: (n, slots) of `OPERATION`, all identity.
            size: (height, width) of the samples, pixels.
            draws: (block, rows (m,)) to (m, 4) uint32: draws of this setting for some rows of the batch.
        """
        ...


def _filled(value: object) -> tuple[int, int, int]:
    """The colour of `fill`: three values from 0 to 255."""
    one = real(0 if value is None else value)
    found = several(value, real) if one is None else (one,) * 3
    if found is None or len(found) != 3 or not all(part in range(256) for part in found):
        raise refused("fill", "be a value from 0 to 255 or three of them (R, G, B)", value, 0)
    return int(found[0]), int(found[1]), int(found[2])


def _jitter(name: str, value: object, *, hue: bool = False) -> tuple[float, float]:
    """A jitter's range: a number is the distance from 1, not below 0; of the hue, from 0."""
    centre, low, high = (0.0, -0.5, 0.5) if hue else (1.0, 0.0, math.inf)
    distance = real(0 if value is None else value)
    found = pair(value)
    if distance is not None and distance >= 0:
        found = centre - distance if hue else max(centre - distance, 0.0), centre + distance
    if found is None or not low <= found[0] or not found[1] <= high:
        rule = "from 0 to 0.5, or (low, high) within -0.5 and 0.5" if hue else "of at least 0, or (low, high) from 0 on"
        raise refused(name, f"be a number {rule}", value, 0.1 if hue else 0.4)
    return found


def _between(drawn: NDArray[np.uint32], low: float, high: float) -> NDArray[np.float64]:
    return low + (high - low) * uniform(drawn)


# Single operations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast, saturation and hue, each by a random amount, in random order: torchvision's ColorJitter.

    A number is the distance from 1 (of hue, from 0) to both sides; a pair is the range itself.
    """

    brightness: float | tuple[float, float] | None = 0
    """Factor; 0 is black."""
    contrast: float | tuple[float, float] | None = 0
    """Factor; 0 is the mean grey."""
    saturation: float | tuple[float, float] | None = 0
    """Factor; 0 is grey."""
    hue: float | tuple[float, float] | None = 0
    """Turns of the colour circle, -1/2 to 1/2."""

    _CODES: ClassVar = ("brightness", "contrast", "color", "hue")

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation", "hue"):
            put(self, **{name: _jitter(name, getattr(self, name), hue=name == "hue")})

    @cached_property
    def _ranges(self) -> dict[int, tuple[float, float]]:
        """By its place in `_CODES`, the range of each that varies."""
        ranges: list[Any] = [self.brightness, self.contrast, self.saturation, self.hue]
        return {i: pair for i, pair in enumerate(ranges) if pair != ((0.0, 0.0) if i == 3 else (1.0, 1.0))}

    @property
    def slots(self) -> int:
        """One for each that varies."""
        return len(self._ranges)

    def draw(self, out: NDArray[np.void], size: tuple[int, int], draws: Draws) -> None:
        """See `Augmentation.draw`."""
        rows = np.arange(len(out))
        factors, keys = draws(0, rows), draws(1, rows)[:, list(self._ranges)]
        # Sorting random keys gives every order equally often.
        place = np.argsort(np.argsort(keys, axis=1, kind="stable"), axis=1)
        for column, (number, (low, high)) in enumerate(self._ranges.items()):
            at = rows, place[:, column]
            out["code"][at] = CODES[self._CODES[number]]
            out["values"][(*at, np.zeros_like(rows))] = _between(factors[:, number], low, high)


@dataclass(frozen=True)
class Grayscale:
    """Grey of three equal channels, with a probability: torchvision's RandomGrayscale."""

    p: float = 1.0
    """Probability."""
    slots: ClassVar = 1

    def __post_init__(self) -> None:
        put(self, p=probability("p", self.p))

    def draw(self, out: NDArray[np.void], size: tuple[int, int], draws: Draws) -> None:
        """See `Augmentation.draw`."""
        out["code"][uniform(draws(0, np.arange(len(out)))[:, 0]) < self.p] = CODES["grayscale"]


@dataclass(frozen=True)
class Solarize:
    """Values from a threshold on are inverted, with a probability: torchvision's RandomSolarize."""

    threshold: float = 128
    """0 to 256."""
    p: float = 1.0
    """Probability."""
    slots: ClassVar = 1

    def __post_init__(self) -> None:
        put(self, threshold=number_in("threshold", self.threshold, 0, 256, 128), p=probability("p", self.p))

    def draw(self, out: NDArray[np.void], size: tuple[int, int], draws: Draws) -> None:
        """See `Augmentation.draw`."""
        chosen = uniform(draws(0, np.arange(len(out)))[:, 0]) < self.p
        out["code"][chosen] = CODES["solarize"]
        out["values"][chosen, 0, 0] = self.threshold


@dataclass(frozen=True)
class GaussianBlur:
    """A Gaussian of random width, with a probability: torchvision's GaussianBlur. Borders are mirrored."""

    kernel_size: int
    """Side of the kernel, odd, pixels."""
    sigma: float | tuple[float, float] = (0.1, 2.0)
    """Standard deviation, pixels; a pair is a range, drawn uniformly."""
    p: float = 1.0
    """Probability."""
    slots: ClassVar = 1

    _LARGEST: ClassVar = 63

    def __post_init__(self) -> None:
        side = whole(self.kernel_size)
        if side is None or side % 2 == 0 or not 1 <= side <= self._LARGEST:
            raise refused("kernel_size", f"be one odd number, 1 to {self._LARGEST} pixels", self.kernel_size, 5)
        one = real(self.sigma)
        sigmas = pair(self.sigma) if one is None else (one, one)
        if sigmas is None or sigmas[0] <= 0:
            raise refused("sigma", "be above 0, a number or (low, high)", self.sigma, (0.1, 2.0))
        put(self, kernel_size=side, sigma=alike(sigmas), p=probability("p", self.p))

    @property
    def _sigmas(self) -> tuple[float, float]:
        return self.sigma if isinstance(self.sigma, tuple) else (self.sigma, self.sigma)

    def draw(self, out: NDArray[np.void], size: tuple[int, int], draws: Draws) -> None:
        """See `Augmentation.draw`."""
        drawn = draws(0, np.arange(len(out)))
        chosen = uniform(drawn[:, 0]) < self.p
        out["code"][chosen] = CODES["blur"]
        out["values"][chosen, 0, 0] = _between(drawn[chosen, 1], *self._sigmas)
        out["values"][chosen, 0, 1] = self.kernel_size


@dataclass(frozen=True)
class RandomErasing:
    """A rectangle is filled, with a probability: torchvision's RandomErasing, where it follows Normalize.

    The rectangle is tried ten times until it is smaller than the sample; else nothing is erased.
    """

    p: float = 0.5
    """Probability."""
    scale: tuple[float, float] = (0.02, 0.33)
    """Area of the rectangle over the area of the sample, uniform."""
    ratio: tuple[float, float] = (0.3, 3.3)
    """Height over width, log-uniform."""
    value: float | tuple[float, float, float] | Literal["random"] = 0.0
    """What the tensor holds there, rounded to 8 bits: 0 is the mean colour if the dataset normalises, else black; three
    values are those of R, G and B; "random" is normal noise of mean 0 and deviation 1."""
    slots: ClassVar = 1

    _TRIES: ClassVar = 10

    def __post_init__(self) -> None:
        one = real(self.value)
        value = several(self.value, real) if one is None else (one,) * 3
        noise = isinstance(self.value, str) and self.value == "random"
        if not noise and (value is None or len(value) != 3):
            raise refused("value", "be a number, three numbers or 'random'", self.value, 0)
        put(
            self,
            p=probability("p", self.p),
            scale=interval("scale", self.scale, 0, 1, (0.02, 0.33)),
            ratio=interval("ratio", self.ratio, 1e-3, 1e3, (0.3, 3.3)),
            value="random" if value is None else alike(value),
        )

    def draw(self, out: NDArray[np.void], size: tuple[int, int], draws: Draws) -> None:
        """See `Augmentation.draw`."""
        first = draws(0, np.arange(len(out)))
        rows = np.flatnonzero(uniform(first[:, 0]) < self.p)
        noise = isinstance(self.value, str)
        log_low, log_high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for attempt in range(self._TRIES):
            if not rows.size:
                break
            drawn = draws(1 + attempt, rows)
            area = size[0] * size[1] * _between(drawn[:, 0], *self.scale)
            ratio = np.exp(_between(drawn[:, 1], log_low, log_high))
            shape = np.rint(np.sqrt(np.stack([area * ratio, area / ratio], axis=1)))
            fits = (shape < size).all(axis=1)
            taken, shape = rows[fits], shape[fits]
            values = out["values"]
            values[taken, 0, :2] = below(drawn[fits, 2:], np.asarray(size) - shape + 1)
            values[taken, 0, 2:4] = shape
            out["code"][taken, 0] = CODES["erase_noise" if noise else "erase"]
            if noise:
                values[taken, 0, 4:6] = first[taken, 1:3]
            else:
                values[taken, 0, 4:7] = self.value
            rows = rows[~fits]


# Policies -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Warp:
    """Filter and fill of shears, translations and rotations."""

    interpolation: Interpolation = field(default="nearest", kw_only=True)
    """Filter of shears, translations and rotations."""
    fill: int | tuple[int, int, int] | None = field(default=0, kw_only=True)
    """What comes in from outside, 0 to 255; three values are R, G, B; None is 0."""

    def _check_warp(self) -> None:
        put(self, interpolation=choice("interpolation", self.interpolation, FILTERS), fill=_filled(self.fill))

    def _put(self, out: NDArray[np.void], codes: NDArray[np.integer], values: NDArray[np.float64]) -> None:
        """Write one operation for each row, out (n,)."""
        out["code"] = codes
        out["values"][:, 0] = values
        out["filter"] = FILTERS.index(self.interpolation)
        out["fill"] = self.fill


def _steps(low: float, high: float, bins: int) -> NDArray[np.float64]:
    """torch.linspace in float32, where it has fused multiply-adds."""
    low, high = float(np.float32(low)), float(np.float32(high))
    step = float(np.float32(np.float32(high - low) / np.float32(bins - 1)))
    i = np.arange(bins)
    found = np.where(i < bins // 2, low + step * i, high - step * (bins - 1 - i))
    return found.astype(np.float32).astype(np.float64)


_Space: TypeAlias = tuple[NDArray[np.int64], NDArray[np.float64]]
"""Codes (operations,) and values (operations, bins, 2): as they are, and negated where that is another operation."""


def _space(names: Sequence[str], magnitudes: dict[str, NDArray[np.float64] | None], bins: int) -> _Space:
    """The values that magnitudes become."""
    values = np.zeros((len(names), bins, 2))
    for row, name in enumerate(names):
        magnitude = magnitudes[name]
        if magnitude is None:
            continue
        both = np.stack([magnitude, -magnitude], axis=1)
        if name in ("brightness", "color", "contrast", "sharpness"):
            both = 1.0 + both
        elif name in ("translate_x", "translate_y"):
            both = np.trunc(both)
        elif name == "posterize":
            both = np.stack([magnitude] * 2, axis=1)
        elif name == "solarize":
            both = 255.0 * np.stack([magnitude] * 2, axis=1)
        values[row] = both
    return np.array([CODES[name] for name in names]), values


_SHARED: Final = (
    *("shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast", "sharpness"),
    *("posterize", "solarize", "autocontrast", "equalize"),
)


def _magnitudes(
    bins: int, *, shear: float, translate: tuple[float, float], rotate: float, enhance: float, bits: int
) -> dict[str, NDArray[np.float64] | None]:
    # As torch rounds: float32, half to even.
    step = np.float32((bins - 1) / bits)
    posterize = np.rint(np.float32(8) - np.arange(bins, dtype=np.float32) / step).astype(np.float64)
    return {
        "identity": None,
        "shear_x": _steps(0, shear, bins),
        "shear_y": _steps(0, shear, bins),
        "translate_x": _steps(0, translate[1], bins),
        "translate_y": _steps(0, translate[0], bins),
        "rotate": _steps(0, rotate, bins),
        **{name: _steps(0, enhance, bins) for name in ("brightness", "color", "contrast", "sharpness")},
        "posterize": posterize,
        "solarize": _steps(1, 0, bins),
        "autocontrast": None,
        "equalize": None,
        "invert": None,
    }


@cache
def _wide(bins: int) -> _Space:
    magnitudes = _magnitudes(bins, shear=0.99, translate=(32, 32), rotate=135, enhance=0.99, bits=6)
    return _space(("identity", *_SHARED), magnitudes, bins)


@cache
def _standard(names: tuple[str, ...], bins: int, size: tuple[int, int]) -> _Space:
    translate = 150 / 331 * size[0], 150 / 331 * size[1]
    magnitudes = _magnitudes(bins, shear=0.3, translate=translate, rotate=30, enhance=0.9, bits=4)
    return _space(names, magnitudes, bins)


def _bins(value: object) -> int:
    return whole_number("num_magnitude_bins", value, 2, 1000, 31)


@dataclass(frozen=True)
class TrivialAugmentWide(_Warp):
    """One operation of 14 with one magnitude, both uniform: torchvision's TrivialAugmentWide."""

    num_magnitude_bins: int = 31
    slots: ClassVar = 1

    def __post_init__(self) -> None:
        put(self, num_magnitude_bins=_bins(self.num_magnitude_bins))
        self._check_warp()

    def draw(self, out: NDArray[np.void], size: tuple[int, int], draws: Draws) -> None:
        """See `Augmentation.draw`."""
        codes, values = _wide(self.num_magnitude_bins)
        drawn = draws(0, np.arange(len(out)))
        which, step = below(drawn[:, 0], len(codes)), below(drawn[:, 1], self.num_magnitude_bins)
        self._put(out[:, 0], codes[which], values[which, step, drawn[:, 2] >> np.uint32(31)])


@dataclass(frozen=True)
class RandAugment(_Warp):
    """`num_ops` operations of 14, uniform, all of one magnitude: torchvision's RandAugment."""

    num_ops: int = 2
    magnitude: int = 9
    """Which of `num_magnitude_bins`, from 0."""
    num_magnitude_bins: int = 31

    def __post_init__(self) -> None:
        bins = _bins(self.num_magnitude_bins)
        put(
            self,
            num_ops=whole_number("num_ops", self.num_ops, 0, 16, 2),
            magnitude=whole_number("magnitude", self.magnitude, 0, bins - 1, min(9, bins - 1)),
            num_magnitude_bins=bins,
        )
        self._check_warp()

    @property
    def slots(self) -> int:
        """`num_ops`."""
        return self.num_ops

    def draw(self, out: NDArray[np.void], size: tuple[int, int], draws: Draws) -> None:
        """See `Augmentation.draw`."""
        codes, values = _standard(("identity", *_SHARED), self.num_magnitude_bins, size)
        for slot in range(self.num_ops):
            drawn = draws(slot, np.arange(len(out)))
            which = below(drawn[:, 0], len(codes))
            self._put(out[:, slot], codes[which], values[which, self.magnitude, drawn[:, 1] >> np.uint32(31)])


# (operation, probability, magnitude of 10), in pairs: Cubuk et al. 2019, table 9 of the supplement.
_IMAGENET: Final = (
    ("posterize", 0.4, 8, "rotate", 0.6, 9),
    ("solarize", 0.6, 5, "autocontrast", 0.6, 0),
    ("equalize", 0.8, 0, "equalize", 0.6, 0),
    ("posterize", 0.6, 7, "posterize", 0.6, 6),
    ("equalize", 0.4, 0, "solarize", 0.2, 4),
    ("equalize", 0.4, 0, "rotate", 0.8, 8),
    ("solarize", 0.6, 3, "equalize", 0.6, 0),
    ("posterize", 0.8, 5, "equalize", 1.0, 0),
    ("rotate", 0.2, 3, "solarize", 0.6, 8),
    ("equalize", 0.6, 0, "posterize", 0.4, 6),
    ("rotate", 0.8, 8, "color", 0.4, 0),
    ("rotate", 0.4, 9, "equalize", 0.6, 0),
    ("equalize", 0.0, 0, "equalize", 0.8, 0),
    ("invert", 0.6, 0, "equalize", 1.0, 0),
    ("color", 0.6, 4, "contrast", 1.0, 8),
    ("rotate", 0.8, 8, "color", 1.0, 2),
    ("color", 0.8, 8, "solarize", 0.8, 7),
    ("sharpness", 0.4, 7, "invert", 0.6, 0),
    ("shear_x", 0.6, 5, "equalize", 1.0, 0),
    ("color", 0.4, 0, "equalize", 0.6, 0),
    ("equalize", 0.4, 0, "solarize", 0.2, 4),
    ("solarize", 0.6, 5, "autocontrast", 0.6, 0),
    ("invert", 0.6, 0, "equalize", 1.0, 0),
    ("color", 0.6, 4, "contrast", 1.0, 8),
    ("equalize", 0.8, 0, "equalize", 0.6, 0),
)
_AUTO_NAMES: Final = (*_SHARED, "invert")


@cache
def _policy(slot: int) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """(25,) each: number in `_AUTO_NAMES`, probability and magnitude of the first or second operation of the pairs."""
    names, probabilities, magnitudes = zip(*(pair[3 * slot : 3 * slot + 3] for pair in _IMAGENET), strict=True)
    return np.array([_AUTO_NAMES.index(name) for name in names]), np.array(probabilities), np.array(magnitudes)


@dataclass(frozen=True)
class AutoAugment(_Warp):
    """One of 25 pairs of operations, each with its probability and magnitude: AutoAugment's policy for ImageNet."""

    policy: Literal["imagenet"] = "imagenet"
    """As torchvision has it; its policies for CIFAR-10 and SVHN are not here."""
    slots: ClassVar = 2

    def __post_init__(self) -> None:
        policy: Any = self.policy
        put(self, policy=choice("policy", getattr(policy, "value", policy), ("imagenet",)))  # also torchvision's enum
        self._check_warp()

    def draw(self, out: NDArray[np.void], size: tuple[int, int], draws: Draws) -> None:
        """See `Augmentation.draw`."""
        codes, values = _standard(_AUTO_NAMES, 10, size)
        rows = np.arange(len(out))
        first, second = draws(0, rows), draws(1, rows)
        pair = below(first[:, 0], len(_IMAGENET))
        for slot, drawn in enumerate((first[:, 1:3], second[:, :2])):
            which, probability, magnitude = (column[pair] for column in _policy(slot))
            self._put(out[:, slot], codes[which], values[which, magnitude, drawn[:, 1] >> np.uint32(31)])
            out["code"][uniform(drawn[:, 0]) >= probability, slot] = CODES["identity"]


_TIMM: Final = (
    *("autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "color", "contrast"),
    *("brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y"),
)


_TIMM_PART: Final = re.compile(
    "m(?P<magnitude>{0})|n(?P<num_ops>{0})|p(?P<p>{1})|mstd(?P<magnitude_std>{1})|mmax(?P<magnitude_max>{0})|"
    "inc(?P<increasing>[01])".format("[0-9]{1,9}", r"[0-9]{1,9}(\.[0-9]+)?")
)
"""A part of timm's form; the group's name is the argument's."""


@dataclass(frozen=True)
class TimmRandAugment:
    """`num_ops` operations of 15, each with a probability and a random magnitude: timm's RandAugment.

    timm writes it as a string, which `augment=` takes: "rand-m9-mstd0.5-inc1" is TimmRandAugment(magnitude=9,
    magnitude_std=0.5, increasing=True).
    """

    magnitude: float = 10
    """m: of 10."""
    num_ops: int = 2
    """n."""
    p: float = 0.5
    """Probability of each operation."""
    magnitude_std: float = 0
    """mstd: standard deviation of the magnitude, normal and cut to [0, magnitude_max]; above 100, it is uniform up to
    `magnitude`."""
    magnitude_max: float = 10
    """mmax."""
    increasing: bool = False
    """inc: posterize, solarize and the four factors become stronger with the magnitude."""
    interpolation: Literal["random", "nearest", "bilinear", "bicubic"] = "random"
    """"random" is bilinear or bicubic, drawn for each operation."""
    fill: int | tuple[int, int, int] = (124, 116, 104)
    """What comes in from outside: timm takes the mean colour, which is this for ImageNet's."""

    def __post_init__(self) -> None:
        magnitude: Any = self.magnitude
        if isinstance(magnitude, str):
            raise ConfigError(
                f"magnitude must be a number, found {magnitude!r}; write augment={magnitude!r} or "
                f"TimmRandAugment.of({magnitude!r})."
            )
        given = {name: real(getattr(self, name)) for name in ("magnitude", "magnitude_std")}
        for name, value in given.items():
            if value is None or value < 0:
                raise refused(name, "be a number of at least 0", getattr(self, name), 9 if name == "magnitude" else 0.5)
        most = real(self.magnitude_max)
        if most is None or not 0 < most <= 100:
            raise refused("magnitude_max", "be above 0 and at most 100", self.magnitude_max, 10)
        increasing: Any = self.increasing
        if not isinstance(increasing, bool | np.bool_) and whole(increasing) not in (0, 1):
            raise refused("increasing", "be True or False", increasing, True)
        put(
            self,
            **given,
            num_ops=whole_number("num_ops", self.num_ops, 0, 16, 2),
            p=probability("p", self.p),
            magnitude_max=most,
            increasing=bool(increasing),
            interpolation=choice("interpolation", self.interpolation, ("random", *FILTERS)),
            fill=_filled(self.fill),
        )

    @property
    def slots(self) -> int:
        """`num_ops`."""
        return self.num_ops

    @classmethod
    def of(cls, text: str) -> "TimmRandAugment":
        """Read timm's form: "rand", then parts of m, n, p, mstd, mmax and inc with their numbers, joined by "-"."""
        form = "rand-m9-n2-p0.5-mstd0.5-mmax10-inc1"
        if not isinstance(text, str) or text.split("-")[0] != "rand":
            raise ConfigError(f"text must be of timm's form {form}, found {text!r}.")
        settings: dict[str, Any] = {}
        for part in text.split("-")[1:]:
            match = _TIMM_PART.fullmatch(part)
            found = {name: number for name, number in match.groupdict().items() if number} if match else {}
            if not found or found.keys() & settings:
                raise ConfigError(
                    f"augment must be of timm's form {form}, each part once, found {part!r} in {text!r}; inc is 0 or "
                    "1, m, n and mmax are whole, and mstd101 is a magnitude that is uniform."
                )
            settings |= {name: float(number) if "." in number else int(number) for name, number in found.items()}
        return cls(**settings)

    def draw(self, out: NDArray[np.void], size: tuple[int, int], draws: Draws) -> None:
        """See `Augmentation.draw`."""
        rows = np.arange(len(out))
        for slot in range(self.num_ops):
            self._draw_one(out[:, slot], size, draws(2 * slot, rows), draws(2 * slot + 1, rows))

    def _draw_one(
        self, out: NDArray[np.void], size: tuple[int, int], first: NDArray[np.uint32], second: NDArray[np.uint32]
    ) -> None:
        which = below(first[:, 0], len(_TIMM))
        applied = uniform(first[:, 1]) < self.p
        values = np.zeros(len(out))
        level = self._levels(second[:, 0], second[:, 1]) / 10
        sign = np.where(first[:, 2] >> np.uint32(31), -1.0, 1.0)
        for number, name in enumerate(_TIMM):
            rows = which == number
            values[rows] = self._values(name, level[rows], sign[rows], size)
        out["code"] = np.where(applied, np.array([CODES[name] for name in _TIMM])[which], CODES["identity"])
        out["values"][:, 0] = values
        out["fill"] = self.fill
        random = 1 + (second[:, 2] >> np.uint32(31))
        out["filter"] = random if self.interpolation == "random" else FILTERS.index(self.interpolation)

    def _levels(self, one: NDArray[np.uint32], other: NDArray[np.uint32]) -> NDArray[np.float64]:
        """Magnitudes from two draws each."""
        if self.magnitude_std > 100:
            found = self.magnitude * uniform(one)
        elif self.magnitude_std > 0:
            # Box and Muller 1958; 1 - u is above 0.
            normal = np.sqrt(-2 * np.log(1 - uniform(one))) * np.cos(2 * np.pi * uniform(other))
            found = self.magnitude + self.magnitude_std * normal
        else:
            found = np.full(len(one), float(self.magnitude))
        return np.clip(found, 0, self.magnitude_max)

    def _values(
        self, name: str, level: NDArray[np.float64], sign: NDArray[np.float64], size: tuple[int, int]
    ) -> NDArray[np.float64]:
        if name == "rotate":
            return 30 * level * sign
        if name in ("shear_x", "shear_y"):
            return 0.3 * level * sign
        if name in ("translate_x", "translate_y"):
            return 0.45 * level * sign * size[1 if name == "translate_x" else 0]
        if name == "posterize":
            bits: NDArray[np.float64] = np.clip(np.trunc(level * 4), 0, 8)
            return np.maximum(4 - bits, 0) if self.increasing else bits
        if name == "solarize":
            threshold = np.minimum(np.trunc(level * 256), 256)
            return 256 - threshold if self.increasing else threshold
        if name == "solarize_add":
            return np.minimum(np.trunc(level * 110), 128)
        if name in ("color", "contrast", "brightness", "sharpness"):
            return np.maximum(0.1, 1 + 0.9 * level * sign) if self.increasing else 1.8 * level + 0.1
        return np.zeros_like(level)


@dataclass(frozen=True)
class RandomChoice:
    """One of some settings, drawn for each sample: torchvision's RandomChoice."""

    transforms: tuple[Augmentation, ...]
    p: tuple[float, ...] | None = None
    """Weights of the settings, which need not add up to 1; None weighs all alike."""

    def __post_init__(self) -> None:
        given: Any = self.transforms
        settings = [_listed(one, "transforms") for one in given] if isinstance(given, tuple | list) else []
        lists = [one for one in given if isinstance(one, tuple | list)] if settings else []
        if not settings or lists or any(len(one) != 1 for one in settings):
            raise ConfigError(
                "transforms must hold single settings, one or more (not lists of settings, nor 'ThreeAugment', which "
                f"is two), found {given!r}; for example RandomChoice((Grayscale(), Solarize()))."
            )
        put(self, transforms=tuple(one for (one,) in settings))
        if any(isinstance(one, RandomChoice) for one in self.transforms):
            raise ConfigError(
                f"transforms must hold no RandomChoice, found {self.transforms!r}; write one, with p for its settings."
            )
        if len(settings) > _MOST_CHOICES:
            raise ConfigError(f"transforms must hold at most {_MOST_CHOICES} settings, found {len(settings)}.")
        if self.p is not None:
            weights = several(self.p, real) or ()
            fits = len(weights) == len(settings) and min(weights) >= 0
            if not fits or not 0 < sum(weights) < math.inf:
                rule = f"hold {len(settings)} weights of at least 0, one above it, with a finite sum"
                raise refused("p", rule, self.p, (1.0,) * len(settings))
            put(self, p=weights)

    @property
    def slots(self) -> int:
        """The largest number of any of them."""
        return max(one.slots for one in self.transforms)

    def draw(self, out: NDArray[np.void], size: tuple[int, int], draws: Draws) -> None:
        """See `Augmentation.draw`."""
        weights = np.array(self.p or (1.0,) * len(self.transforms))
        bounds = np.cumsum(weights) / weights.sum()
        chosen = np.searchsorted(bounds[:-1], uniform(draws(0, np.arange(len(out)))[:, 0]), side="right")
        for number, one in enumerate(self.transforms):
            rows = np.flatnonzero(chosen == number)
            out[rows, : one.slots] = _drawn(one, size, draws, (1 + number) * _WITHIN, rows)


def three_augment(jitter: float = 0.3) -> tuple[Augmentation, ...]:
    """3-Augment of DeiT III: grey, solarized or blurred, then colour jitter."""
    return RandomChoice((Grayscale(), Solarize(), GaussianBlur(13, (0.1, 2.0)))), ColorJitter(jitter, jitter, jitter)


# All settings ---------------------------------------------------------------------------------------------------------

Augment: TypeAlias = Augmentation | str | Iterable[Augmentation | str] | None
"""What `augment=` takes: a setting, a string, several of both, or None."""

_BLOCKS: Final = 2**16  # of each setting
_WITHIN: Final = 2**8  # of a setting within RandomChoice; its own and those of settings within it
_KINDS: Final[tuple[type, ...]] = (
    *(ColorJitter, Grayscale, GaussianBlur, Solarize, TrivialAugmentWide, RandAugment, AutoAugment),
    *(RandomErasing, TimmRandAugment, RandomChoice),
)
"""A setting's stream is by its kind, and by how many of its kind come before."""
_OF_A_KIND: Final = 16
_MOST_CHOICES: Final = 255  # in RandomChoice: _BLOCKS / _WITHIN, but for its own
_OWN: Final = 32  # the first kind of settings of users' own
_MOST_KINDS: Final = 1000


def _check_setting(one: object, name: str) -> None:
    slots = whole(one.slots) if isinstance(one, Augmentation) and not isinstance(one, type) else None
    if slots is not None and slots >= 0:
        return
    remedy = ""
    if isinstance(one, type):
        remedy = f"; write {one.__name__}()"
    elif isinstance(one, Schedule):
        remedy = "; write one Schedule, whose values are settings or lists of them"
    elif isinstance(one, Mapping | Set):
        remedy = f"; write {schedule_meant(one, 'a list, whose order counts')}"
    elif type(one).__module__.startswith("torchvision."):
        remedy = " of torchvision; take the setting of that name from dali_diffusemix"
    raise ConfigError(
        f"{name} must be a setting (ColorJitter, Grayscale, GaussianBlur, Solarize, TrivialAugmentWide, RandAugment, "
        "AutoAugment, TimmRandAugment, RandomErasing, RandomChoice), several of them, 'rand-m9-mstd0.5-inc1' or "
        f"'ThreeAugment', found {one!r}{remedy}."
    )


def augmentations(augment: Augment) -> tuple[Augmentation, ...]:
    """The settings in their order. Raises ConfigError if something else is among them."""
    return _listed(augment, "augment")


def _listed(augment: Any, name: str) -> tuple[Augmentation, ...]:
    """`augmentations` of an argument of that name."""
    if augment is None:
        return ()
    if isinstance(augment, str):
        if augment.split("-")[0] == "rand":
            return (TimmRandAugment.of(augment),)
        if augment.lower() == "threeaugment":
            return three_augment()
        raise ConfigError(
            f"{name} must be 'ThreeAugment' or of timm's form 'rand-m9-mstd0.5-inc1' if it is a string, found "
            f"{augment!r}; for the others write TrivialAugmentWide(), RandAugment(), AutoAugment()."
        )
    parts = None
    if not isinstance(augment, Augmentation | type | Mapping | Set):
        with contextlib.suppress(TypeError):  # tensors of no axis claim to be iterable
            parts = iter(augment)
    if parts is None:
        _check_setting(augment, name)
        return (augment,)
    return tuple(one for part in parts for one in _listed(part, name))


def settings_of(
    augment: "Augment | Schedule[Augment]",
) -> "tuple[Augmentation, ...] | Schedule[tuple[Augmentation, ...]]":
    """`augmentations`, of each value of a Schedule."""
    if isinstance(augment, Schedule):
        return Schedule({epoch: augmentations(value) for epoch, value in augment.steps})
    return augmentations(augment)


def streams(settings: Sequence[Augmentation]) -> Iterator[int]:
    """The first field of each setting's stream. Raises ConfigError for more of a kind than have streams."""
    seen: dict[int, int] = {}
    for one in settings:
        name = type(one).__name__
        # Settings of a user's own are told apart by their names.
        own = _OWN + int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % (_MOST_KINDS - _OWN)
        kind = _KINDS.index(type(one)) if type(one) in _KINDS else own
        number = seen.get(kind, 0)
        if number == _OF_A_KIND:
            raise ConfigError(
                f"augment must have at most {_OF_A_KIND} settings of a kind, found more of {name}; leave some out."
            )
        seen[kind] = number + 1
        yield AUGMENT + (kind * _OF_A_KIND + number) * _BLOCKS


def _check_drawn(drawn: NDArray[np.void], size: tuple[int, int], one: Augmentation) -> None:
    """Raise ConfigError unless operations that a user's own setting drew are such that can be computed."""
    code, values = drawn["code"], drawn["values"]
    names = np.array((*OPERATIONS, *["?"] * (256 - len(OPERATIONS))))[code]
    first, second = values[..., 0], values[..., 1]
    with np.errstate(invalid="ignore"):
        top, left, height, width = (values[..., i] for i in range(4))
        inside = (top >= 0) & (left >= 0) & (height >= 0) & (width >= 0)
        inside &= (top + height <= size[0]) & (left + width <= size[1])
        whole = (values[..., :4] == np.rint(values[..., :4])).all(axis=-1)
        words = (values[..., 4:6] >= 0) & (values[..., 4:6] < 2**32)
        rules = {
            "?": np.zeros_like(inside),
            "shear_x": np.abs(first) * size[0] + size[1] < 2**15,
            "shear_y": np.abs(first) * size[1] + size[0] < 2**15,
            "hue": np.abs(first) <= 0.5,
            "posterize": (first >= 0) & (first <= 8) & (first == np.rint(first)),
            "solarize_add": (first >= 0) & (first <= 255),
            "blur": (first > 0) & (second >= 1) & (second <= GaussianBlur._LARGEST) & (second % 2 == 1),
            "erase": inside & whole,
            "erase_noise": inside & whole & words.all(axis=-1),
        }
        right = np.isfinite(values).all(axis=-1) & (np.abs(first) < 2**14) & (drawn["filter"] < len(FILTERS))
        for name, holds in rules.items():
            right &= holds | (names != name)
    if not right.all():
        row, slot = np.argwhere(~right)[0].tolist()
        name = names[row, slot]
        rule = "; a shear must read within 2**15 pixels" if name.startswith("shear") else ""
        raise ConfigError(
            f"draw of {type(one).__name__} must give operations as plan.augment.OPERATION describes them, for samples "
            f"of {size[0]} x {size[1]} pixels, found {name} with filter {drawn['filter'][row, slot]} and "
            f"values {values[row, slot].tolist()}{rule}."
        )


def _drawn(
    one: Augmentation, size: tuple[int, int], draws: Draws, first: int, rows: NDArray[np.int64]
) -> NDArray[np.void]:
    """(len(rows), slots) of `OPERATION`: what a setting, whose draws begin with block `first`, draws for some rows."""
    out = np.zeros((len(rows), one.slots), dtype=OPERATION)
    one.draw(out, size, lambda block, some: draws(first + block, rows[some]))
    if type(one) not in _KINDS:
        _check_drawn(out, size, one)
    return out


def draw_operations(
    settings: Sequence[Augmentation], count: int, size: tuple[int, int], draws: Draws
) -> NDArray[np.void]:
    """Draw a batch's operations.

    Args:
        settings: In their order.
        count: n, samples.
        size: (height, width) of the samples, pixels.
        draws: (field, rows (m,)) to (m, 4) uint32.

    Returns:
        (n, slots) of `OPERATION`.
    """
    if not settings:
        return no_operations(count)
    rows = np.arange(count)
    drawn = [_drawn(one, size, draws, first, rows) for one, first in zip(settings, streams(settings), strict=True)]
    out = np.concatenate(drawn, axis=1)
    out[out["code"] == CODES["identity"]] = np.zeros((), dtype=OPERATION)  # of what was not chosen nothing is left
    return out


def described(operation: np.void) -> str:
    """An operation in words, such as "rotate 13.5"; empty for identity."""
    name = OPERATIONS[int(operation["code"])]
    values = operation["values"]
    if name == "identity":
        return ""
    if name in ("autocontrast", "equalize", "invert", "grayscale"):
        return name
    if name in ("erase", "erase_noise"):
        return f"erase {values[2]:.0f}x{values[3]:.0f}"
    return f"{name} {values[0]:.3g}"
