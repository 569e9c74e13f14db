"""What the settings of augmentation make of chosen draws and of many draws; and tests of distributions.

Shared by tests/test_torchvision.py and tests/against_torchvision/compare.py, which calls torchvision and timm.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from mixing_cases import plan_of, table
from numpy.typing import NDArray

from dali_diffusemix.base.philox import draw
from dali_diffusemix.mix import TensorFormat
from dali_diffusemix.mix.call import mix
from dali_diffusemix.plan.augment import (
    OPERATION,
    OPERATIONS,
    Augmentation,
    AutoAugment,
    ColorJitter,
    GaussianBlur,
    Grayscale,
    Interpolation,
    RandAugment,
    RandomErasing,
    Solarize,
    TimmRandAugment,
    TrivialAugmentWide,
    augmentations,
    draw_operations,
)

PIXELS = TensorFormat(dtype="uint8", channels_last=True, normalize=None)
SIGNED = (
    *("shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    *("brightness", "color", "contrast", "sharpness"),
)
WARPS = SIGNED[:5]
FIXED = ("identity", "autocontrast", "equalize", "invert", "grayscale")  # without a value
WIDE = ("identity", *SIGNED, "posterize", "solarize", "autocontrast", "equalize")  # torchvision's order
TIMM = (  # timm's order
    *("autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "color", "contrast"),
    *("brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y"),
)


def by_the_kernel(
    images: NDArray[np.uint8], operations: NDArray[np.void], format: TensorFormat = PIXELS
) -> NDArray[np.generic]:
    """Samples that show all of (n, height, width, 3) images, pixel for pixel, with (n, slots) operations."""
    count, size = len(images), images.shape[1:3]
    plan = plan_of(count, size, box=np.tile([0.0, 0, 1, 1], (count, 1)), operations=operations)
    out = np.zeros(format.shape(count, size), dtype=format.storage)
    mix(plan, table(list(images)), None, out=out, format=format)
    return out


# Chosen draws ---------------------------------------------------------------------------------------------------------


def word(number: int, bound: int) -> int:
    """A draw that `philox.below` maps to a number in [0, bound), and `uniform` into that part of [0, 1)."""
    return ((2 * number + 1) << 31) // bound


def chosen(setting: Augmentation, size: tuple[int, int], *blocks: tuple[int, ...]) -> NDArray[np.void]:
    """(slots,) of OPERATION: what a setting makes of these draws; those that are not given are 0."""
    out = np.zeros((1, setting.slots), dtype=OPERATION)

    def draws(block: int, rows: NDArray[np.int64]) -> NDArray[np.uint32]:
        found = blocks[block] if block < len(blocks) else ()
        return np.array([[*found, 0, 0, 0, 0][:4]] * len(rows), dtype=np.uint32).reshape(-1, 4)

    setting.draw(out, size, draws)
    return out[0]


@dataclass(frozen=True)
class Case:
    """An operation of a setting at one bin, sign or value."""

    setting: str
    name: str  # of `OPERATIONS`
    operation: NDArray[np.void]  # ()
    size: tuple[int, int]  # of the image: (height, width)
    bin: int = 0
    sign: int = 1
    more: Mapping[str, float | str] = field(default_factory=dict)  # the setting's arguments

    @property
    def group(self) -> str:
        return f"{self.setting} {self.name}"

    @property
    def key(self) -> str:
        if self.more:
            return ", ".join(
                f"{name} {value:g}" if not isinstance(value, str) else value for name, value in self.more.items()
            )
        return f"{self.bin}{'-' if self.sign < 0 else '+'}"


def _bins(name: str, bins: int) -> Iterator[tuple[int, int]]:
    for bin in range(1 if name in FIXED else bins):
        for sign in (1, -1) if name in SIGNED else (1,):
            yield bin, sign


FILL = (124, 116, 104)


def trivial_cases(size: tuple[int, int], interpolation: Interpolation = "nearest") -> Iterator[Case]:
    """Every operation, bin and sign of TrivialAugmentWide; with another filter the warps, filled with `FILL`."""
    setting, title = TrivialAugmentWide(), "TrivialAugmentWide"
    if interpolation != "nearest":
        setting, title = TrivialAugmentWide(interpolation=interpolation, fill=FILL), f"{title}({interpolation})"
    for number, name in enumerate(WIDE):
        if interpolation != "nearest" and name not in WARPS:
            continue
        for bin, sign in _bins(name, 31):
            made = chosen(setting, size, (word(number, 14), word(bin, 31), word(int(sign < 0), 2)))
            yield Case(title, name, made[0], size, bin, sign)


def rand_cases(size: tuple[int, int]) -> Iterator[Case]:
    """Every operation, magnitude and sign of RandAugment."""
    title = "RandAugment" if size[0] == size[1] else "RandAugment, not square"
    for number, name in enumerate(WIDE):
        for bin, sign in _bins(name, 31):
            made = chosen(RandAugment(1, bin), size, (word(number, 14), word(int(sign < 0), 2)))
            yield Case(title, name, made[0], size, bin, sign)


def auto_cases(size: tuple[int, int]) -> Iterator[Case]:
    """Both operations of AutoAugment's 25 pairs, with both signs; `bin` is the pair, twice, plus the place."""
    for pair in range(25):
        for place in range(2):
            for sign in (1, -1):
                low, high = word(pair, 25), word(int(sign < 0), 2)
                made = chosen(AutoAugment(), size, (low, 0, high), (0, high))[place]
                name = OPERATIONS[made["code"]]
                if (sign > 0 or name in SIGNED) and name != "identity":
                    yield Case("AutoAugment", name, made, size, 2 * pair + place, sign)


def single_cases(size: tuple[int, int]) -> Iterator[Case]:
    """ColorJitter's four, Grayscale, Solarize and GaussianBlur."""
    for name in ("brightness", "contrast", "saturation"):
        for factor in (0, 0.1, 0.37, 0.6, 0.83, 0.99, 1.01, 1.2, 1.4, 1.9, 2, 3.3):
            made = chosen(ColorJitter(**{name: (factor, factor)}), size)[0]
            yield Case("ColorJitter", OPERATIONS[made["code"]], made, size, more={"factor": factor})
    for turns in (-0.5, -0.41, -0.25, -0.1, -0.05, -0.003, 0.003, 0.02, 0.1, 0.2, 0.333, 0.5):
        yield Case("ColorJitter", "hue", chosen(ColorJitter(hue=(turns, turns)), size)[0], size, more={"turns": turns})
    yield Case("Grayscale", "grayscale", chosen(Grayscale(), size)[0], size)
    for threshold in (0, 0.5, 1, 77.3, 128, 200, 255, 256):
        made = chosen(Solarize(threshold), size)[0]
        yield Case("Solarize", "solarize", made, size, more={"threshold": threshold})
    for side in (3, 5, 13, 23):
        for sigma in (0.1, 0.3, 0.7, 1.0, 1.5, 2.0, 5.0):
            if side // 2 < min(size):
                made = chosen(GaussianBlur(side, sigma), size)[0]
                yield Case("GaussianBlur", "blur", made, size, more={"side": side, "sigma": sigma})


TIMM_LEVELS = (0.0, 0.7, 2.0, 3.3, 5.0, 6.1, 7.5, 8.4, 9.0, 9.37, 10.0)


def timm_cases(size: tuple[int, int], levels: tuple[float, ...] = TIMM_LEVELS) -> Iterator[Case]:
    """timm's 15 operations, increasing or not, at fixed magnitudes, with both signs and both filters."""
    for increasing in (True, False):
        title = "timm, increasing" if increasing else "timm"
        for number, name in enumerate(TIMM):
            signed = name in WARPS or (increasing and name in SIGNED)
            changes = name in ("posterize", "solarize", *SIGNED[5:])
            if not increasing and not changes:
                continue  # the same operation
            for level in (5.0,) if name in FIXED else levels:
                for sign in (1, -1) if signed else (1,):
                    for filter in ("bilinear", "bicubic") if name in WARPS else ("",):
                        setting = TimmRandAugment(level, 1, increasing=increasing)
                        at = (word(number, 15), 0, word(int(sign < 0), 2)), (0, 0, word(int(filter == "bicubic"), 2))
                        more: dict[str, float | str] = {
                            "level": level,
                            "sign": sign,
                            **({"filter": filter} if filter else {}),
                        }
                        yield Case(title, name, chosen(setting, size, *at)[0], size, sign=sign, more=more)


def refused(case: Case) -> bool:
    """True of 0 bits: Pillow 13 refuses them, so timm 1.0.31 fails there; older versions gave black."""
    return case.name == "posterize" and not case.operation["values"][0]


SMALL = (12, 16)  # of the image in tests/data/torchvision.npz


def frozen_image() -> NDArray[np.uint8]:
    """A picture of large steps, ramps and noise, without the values next to 0 and 255."""
    generator = np.random.default_rng(29)
    height, width = SMALL
    ramp = np.add.outer(np.arange(height) * 5, np.arange(width) * 7)[..., None] * (1.0, 0.6, -0.5) + (5, 30, 160)
    ramp[2:7, 3:8] = (200, 40, 90)
    ramp[8:, 10:] += generator.integers(-40, 40, (4, 6, 3))
    return np.asarray(np.clip(ramp, 3, 250), dtype=np.uint8)


def frozen_cases() -> Iterator[Case]:
    """The cases in tests/data/torchvision.npz."""
    yield from trivial_cases(SMALL)
    for filter in ("bilinear", "bicubic"):
        yield from (case for case in trivial_cases(SMALL, filter) if case.bin % 10 == 6)
    yield from (case for case in rand_cases(SMALL) if case.bin % 10 == 9)
    yield from auto_cases(SMALL)
    yield from single_cases(SMALL)
    yield from (case for case in timm_cases(SMALL, (2.0, 9.37)) if not refused(case))


# Many draws -----------------------------------------------------------------------------------------------------------


def drawn(settings: tuple[Augmentation, ...], count: int, size: tuple[int, int], seed: int = 1) -> NDArray[np.void]:
    """(count, slots) of OPERATION, as a plan draws them."""
    return draw_operations(settings, count, size, lambda number, rows: draw(seed, 0, rows, [number])[0])


Key = tuple[Hashable, ...]


def applied(row: NDArray[np.void], *, values: bool = True) -> Key:
    """The operations of a sample, each (name, value), without those that do nothing by name."""
    return tuple(
        (OPERATIONS[one["code"]], rounded(float(one["values"][0])) if values else None)
        for one in row
        if OPERATIONS[one["code"]] != "identity"
    )


def rounded(value: float) -> float:
    return round(value, 6) + 0.0  # no -0.0


def chi_square(one: Mapping[Hashable, int], other: Mapping[Hashable, int], least: int = 10) -> tuple[float, int, float]:
    """Whether two samples have one distribution: statistic, degrees of freedom, probability of a larger statistic.

    Cells with fewer than `least` expected in either are merged into one. The probability is also that of the cell that
    differs most, times the number of cells: a missing cell of many is noticed.
    """
    totals = np.array([sum(one.values()), sum(other.values())], dtype=np.float64)
    cells = []
    rare = np.zeros(2)
    for key in {**one, **other}:
        pair = np.array([one.get(key, 0), other.get(key, 0)], dtype=np.float64)
        if (pair.sum() * totals / totals.sum()).min() < least:
            rare += pair
        else:
            cells.append(pair)
    if rare.sum():
        cells.append(rare)
    observed = np.array(cells)
    expected = observed.sum(axis=1, keepdims=True) * totals / totals.sum()
    statistic = float(((observed - expected) ** 2 / expected).sum())
    degrees = len(cells) - 1
    if not degrees:
        return statistic, degrees, 1.0
    # Of each cell against all others: the same test, with one degree.
    apart = ((observed - expected) ** 2 * (1 / expected + 1 / (totals - expected))).sum(axis=1).max()
    worst = len(cells) * chi_square_above(float(apart), 1)
    return statistic, degrees, min(1.0, 2 * min(chi_square_above(statistic, degrees), worst))


def chi_square_above(statistic: float, degrees: int) -> float:
    half = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def kolmogorov(one: NDArray[np.float64], other: NDArray[np.float64]) -> tuple[float, float]:
    """Whether two samples have one distribution: Kolmogorov's and Smirnov's statistic, probability of a larger one."""
    one, other = np.sort(one), np.sort(other)
    both = np.concatenate([one, other])
    gap = np.searchsorted(one, both, side="right") / len(one) - np.searchsorted(other, both, side="right") / len(other)
    statistic = float(np.abs(gap).max())
    return statistic, kolmogorov_above(statistic * math.sqrt(len(one) * len(other) / (len(one) + len(other))))


def kolmogorov_above(value: float) -> float:
    if value < 0.2:
        return 1.0
    return min(1.0, max(0.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * value) ** 2) for k in range(1, 101))))


def counted(keys: Iterator[Hashable]) -> Counter[Hashable]:
    return Counter(keys)


def text(key: Hashable) -> str:
    """A cell's name in tests/data/torchvision.json."""

    def words(one: object) -> str:
        if isinstance(one, tuple):
            return " ".join(map(words, one))
        return f"{one:.6g}" if isinstance(one, float) else str(one)

    return "; ".join(map(words, key)) if isinstance(key, tuple) else words(key)


def timm_drawn(setting: str, count: int, size: tuple[int, int]) -> list[Key]:
    """What the plan draws: (name, value, filter or None) of each operation that is applied."""
    names = ("nearest", "bilinear", "bicubic")
    warps = [OPERATIONS.index(name) for name in WARPS]
    return [
        tuple(
            (OPERATIONS[one["code"]], float(one["values"][0]), names[one["filter"]] if one["code"] in warps else None)
            for one in row
            if one["code"]
        )
        for row in drawn(augmentations(setting), count, size)
    ]


def sides(key: Key) -> Key:
    """What is discrete of timm's operations: name, filter, side of the value that changes nothing."""
    return tuple((name, filter or "", _side(name, value)) for name, value, filter in key)


def _side(name: str, value: float) -> int:
    neutral = 1.0 if name in SIGNED[5:] else 0.0
    return int(np.sign(value - neutral)) if name in SIGNED else 0


Boxes = NDArray[np.float64]  # (n, 4) top, left, height, width
BOX_FIGURES: Mapping[str, Callable[[Boxes, tuple[int, int]], NDArray[np.float64]]] = {
    "top": lambda box, size: box[:, 0] / (size[0] - box[:, 2] + 1),
    "left": lambda box, size: box[:, 1] / (size[1] - box[:, 3] + 1),
    "area": lambda box, size: box[:, 2] * box[:, 3],
    "height": lambda box, size: box[:, 2],
    "width": lambda box, size: box[:, 3],
    "ratio": lambda box, size: box[:, 2] / np.maximum(box[:, 3], 1),
}


def boxes_drawn(setting: RandomErasing, count: int, size: tuple[int, int]) -> tuple[Boxes, list[bool]]:
    """The boxes, and for each sample whether anything is erased."""
    rows = drawn((setting,), count, size)[:, 0]
    erased = rows["code"] != 0
    return rows["values"][erased, :4], erased.tolist()


def jitter_drawn(
    setting: ColorJitter, count: int, size: tuple[int, int]
) -> tuple[list[Key], dict[str, NDArray[np.float64]]]:
    """The orders, and the values of each adjustment."""
    rows = drawn((setting,), count, size)
    values = rows["values"][..., 0]
    orders: list[Key] = [tuple(OPERATIONS[code] for code in row) for row in rows["code"].tolist()]
    return orders, {name: values[rows["code"] == OPERATIONS.index(name)] for name in orders[0]}
