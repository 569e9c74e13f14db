"""The settings of augmentation against frozen results of torchvision and timm: tests/data/torchvision.npz and .json.

tests/against_torchvision/compare.py wrote these files and compares with the packages themselves.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from augment_draws import (
    BOX_FIGURES,
    FIXED,
    SIGNED,
    TIMM,
    WIDE,
    applied,
    boxes_drawn,
    by_the_kernel,
    chi_square,
    chosen,
    drawn,
    frozen_cases,
    frozen_image,
    jitter_drawn,
    kolmogorov,
    kolmogorov_above,
    sides,
    text,
    timm_drawn,
    word,
)
from numpy.typing import NDArray

from dali_diffusemix.plan.augment import (
    OPERATIONS,
    Augmentation,
    AutoAugment,
    ColorJitter,
    RandAugment,
    RandomErasing,
    TrivialAugmentWide,
    augmentations,
)

DATA = Path(__file__).parent / "data"
COUNT = 40_000  # samples drawn
LEAST = 1e-4  # probability of what is drawn; the seed is fixed, so a test passes always or never


@pytest.fixture(scope="module")
def frozen() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DATA / "torchvision.json").read_text())
    return found


def test_the_files_name_their_versions_and_are_small(frozen: dict[str, Any]) -> None:
    assert set(frozen["versions"]) == {"torchvision", "timm", "pillow", "torch"}
    assert sum((DATA / name).stat().st_size for name in ("torchvision.json", "torchvision.npz")) < 300_000


# Pixels ---------------------------------------------------------------------------------------------------------------


def test_each_operation_gives_the_frozen_pixels(frozen: dict[str, Any]) -> None:
    with np.load(DATA / "torchvision.npz") as file:
        names, pixels, image = file["names"].astype(str).tolist(), file["pixels"], file["image"]
    np.testing.assert_array_equal(image, frozen_image())
    cases = list(frozen_cases())
    assert names == [f"{case.group}: {case.key}" for case in cases]
    found = by_the_kernel(np.stack([image] * len(cases)), np.stack([case.operation.reshape(1) for case in cases]))
    difference = np.abs(found.astype(int) - pixels.astype(int)).max(axis=(1, 2, 3))
    wrong = {
        name: int(far)
        for name, case, far in zip(names, cases, difference, strict=True)
        if far > frozen["largest"][case.group]
    }
    assert wrong == {}


def test_the_pixels_depend_on_bin_and_sign() -> None:
    """So the test above would notice a wrong one: few bins of an operation look the same."""
    with np.load(DATA / "torchvision.npz") as file:
        names, pixels = file["names"].astype(str).tolist(), file["pixels"]
    for name in SIGNED:
        rows = [row for row, one in enumerate(names) if one.startswith(f"TrivialAugmentWide {name}:")]
        assert len(rows) == 62
        assert len({pixels[row].tobytes() for row in rows}) >= 20, name


# Magnitudes -----------------------------------------------------------------------------------------------------------


def values_of(name: str, magnitude: float) -> float:
    """What an operation gets for torchvision's magnitude."""
    if name in SIGNED[5:]:
        return 1.0 + magnitude
    if name in ("translate_x", "translate_y", "posterize"):
        return float(int(magnitude))
    return 255.0 * magnitude if name == "solarize" else magnitude


@pytest.mark.parametrize("title", ["TrivialAugmentWide", "RandAugment", "RandAugment, not square"])
def test_magnitudes_are_torchvisions_floats(frozen: dict[str, Any], title: str) -> None:
    table = frozen["tables"][title]
    size, space = tuple(table["size"]), table["space"]
    assert list(space) == list(WIDE)
    for number, (name, row) in enumerate(space.items()):
        assert row["signed"] == (name in SIGNED) and (row["magnitudes"] is None) == (name in FIXED)
        for bin in range(31):
            for negative in (0, 1):
                sign = (word(number, 14), word(negative, 2))
                if title == "TrivialAugmentWide":
                    made = chosen(TrivialAugmentWide(), size, (sign[0], word(bin, 31), sign[1]))[0]
                else:
                    made = chosen(RandAugment(1, bin), size, sign)[0]
                magnitude = 0.0 if row["magnitudes"] is None else row["magnitudes"][bin]
                magnitude *= -1 if negative and row["signed"] else 1
                wanted = 0.0 if name in FIXED else values_of(name, magnitude)
                assert (OPERATIONS[made["code"]], made["values"][0]) == (name, wanted), (bin, negative)


def test_autoaugment_has_torchvisions_pairs(frozen: dict[str, Any]) -> None:
    table = frozen["tables"]["AutoAugment"]
    size = tuple(table["size"])
    highest = 2**32 - 1
    for pair, both in enumerate(table["pairs"]):
        for place, (name, probability, number) in enumerate(both):
            space = table["space"][name]
            for negative in (0, 1):
                sign = word(negative, 2)
                magnitude = 0.0 if space["magnitudes"] is None else space["magnitudes"][number]
                magnitude *= -1 if negative and space["signed"] else 1
                for draw, happens in ((0, probability > 0), (highest, probability == 1)):
                    made = chosen(AutoAugment(), size, (word(pair, 25), draw, sign), (draw, sign))[place]
                    assert OPERATIONS[made["code"]] == (name if happens else "identity")
                    assert not happens or name in FIXED or made["values"][0] == values_of(name, magnitude)
                last = math.ceil(probability * 2**32)  # the first draw for which it is left out
                if 0 < last <= highest:
                    for draw, happens in ((last - 1, True), (last, False)):
                        made = chosen(AutoAugment(), size, (word(pair, 25), draw, sign), (draw, sign))[place]
                        assert (OPERATIONS[made["code"]] == name) == happens


# Distributions --------------------------------------------------------------------------------------------------------

POLICIES: dict[str, Augmentation] = {
    "TrivialAugmentWide": TrivialAugmentWide(),
    "RandAugment": RandAugment(),
    "AutoAugment": AutoAugment(),
}
TEXTS = ("rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5", "rand-m7-n3-mstd101-inc1")


def size_of(frozen: dict[str, Any]) -> tuple[int, int]:
    height, width = frozen["sizes"]["draws"]
    return height, width


def probability(frozen: dict[str, Any], title: str, keys: Iterable[Hashable]) -> float:
    """Of counts as different from the frozen ones as these."""
    counts: Counter[Hashable] = Counter(text(key) for key in keys)
    return chi_square(frozen["draws"][title]["cells"], counts)[2]


def at_quantiles(frozen: dict[str, Any], title: str, values: NDArray[np.float64] | list[float]) -> float:
    """Probability of values as far from the frozen quantiles as these."""
    row = frozen["draws"][title]
    theirs, values = np.array(row["values"]), np.sort(np.asarray(values, dtype=np.float64))
    levels = np.arange(1, len(theirs) + 1) / (len(theirs) + 1)
    near = 1e-7 * np.maximum(1, np.abs(theirs))  # the frozen ones are rounded
    below = np.searchsorted(values, theirs - near, side="left") / len(values)
    up_to = np.searchsorted(values, theirs + near, side="right") / len(values)
    far = max((below - levels).max(), (levels - up_to).max(), 0.0)
    return kolmogorov_above(far * math.sqrt(len(values) * row["samples"] / (len(values) + row["samples"])))


@pytest.mark.parametrize("title", POLICIES)
def test_policies_draw_as_torchvision_does(frozen: dict[str, Any], title: str) -> None:
    keys = [applied(row) for row in drawn((POLICIES[title],), COUNT, size_of(frozen))]
    assert probability(frozen, title, keys) > LEAST
    cells = frozen["draws"][title]["cells"]
    singles = {one for cell in cells for one in cell.split("; ") if one}
    assert singles == {text((one,)) for key in keys for one in key}  # no operation, bin or sign is missing or added


@pytest.mark.parametrize("title", TEXTS)
def test_timms_settings_draw_as_timm_does(frozen: dict[str, Any], title: str) -> None:
    keys = timm_drawn(title, COUNT, size_of(frozen))
    if f"{title}, operations" in frozen["draws"]:
        assert probability(frozen, f"{title}, operations", map(sides, keys)) > LEAST
    found = {}
    for name in TIMM:
        values = [value for key in keys for which, value, _ in key if which == name]
        if name in ("posterize", "solarize", "solarize_add"):
            found[name] = probability(frozen, f"{title}, {name}", ((name, value) for value in values))
        elif name not in FIXED:
            found[name] = at_quantiles(frozen, f"{title}, {name}", values)
    assert len(found) == 12 and min(found.values()) > LEAST, found


def test_erasing_draws_as_torchvision_does(frozen: dict[str, Any]) -> None:
    boxes, erased = boxes_drawn(RandomErasing(), COUNT, size_of(frozen))
    assert probability(frozen, "RandomErasing, erased", ((one,) for one in erased)) > LEAST
    found = {
        name: at_quantiles(frozen, f"RandomErasing, {name}", value(boxes, size_of(frozen)))
        for name, value in BOX_FIGURES.items()
    }
    assert min(found.values()) > LEAST, found


def test_jitter_draws_as_torchvision_does(frozen: dict[str, Any]) -> None:
    orders, factors = jitter_drawn(ColorJitter(0.4, 0.4, 0.4, 0.1), COUNT, size_of(frozen))
    assert probability(frozen, "ColorJitter, order", orders) > LEAST
    found = {name: at_quantiles(frozen, f"ColorJitter, {name}", values) for name, values in factors.items()}
    assert len(found) == 4 and min(found.values()) > LEAST, found


def test_three_augment_takes_one_of_three_and_then_jitters(frozen: dict[str, Any]) -> None:
    """DeiT III's law, which no package has: grey, solarized from 128 or blurred, then ColorJitter(0.3, 0.3, 0.3)."""
    rows = drawn(augmentations("ThreeAugment"), COUNT, size_of(frozen))
    first = Counter(OPERATIONS[code] for code in rows["code"][:, 0])
    assert chi_square(first, dict.fromkeys(("grayscale", "solarize", "blur"), COUNT))[2] > LEAST
    assert set(rows["values"][rows["code"] == OPERATIONS.index("solarize"), 0]) == {128.0}
    blurs = rows["values"][rows["code"] == OPERATIONS.index("blur")]
    even = np.linspace(0.1, 2.0, COUNT)
    assert set(blurs[:, 1]) == {13.0} and kolmogorov(blurs[:, 0], even)[1] > LEAST
    for name in ("brightness", "contrast", "color"):
        factors = rows["values"][..., 0][rows["code"] == OPERATIONS.index(name)]
        assert len(factors) == COUNT and kolmogorov(factors, np.linspace(0.7, 1.3, COUNT))[1] > LEAST


# The tests themselves -------------------------------------------------------------------------------------------------

SPOILED: dict[str, Callable[[str, float], bool]] = {
    "an operation is missing": lambda name, value: name == "color",
    "a sign is missing": lambda name, value: name == "rotate" and value < 0,
    "a bin is missing": lambda name, value: name == "shear_x" and abs(value - 0.33) < 0.01,
    "solarize is half as frequent": lambda name, value: name == "solarize" and int(value * 10) % 2 == 0,
}


@pytest.mark.parametrize("fault", SPOILED)
def test_a_wrong_distribution_is_noticed(frozen: dict[str, Any], fault: str) -> None:
    keys = [applied(row) for row in drawn((TrivialAugmentWide(),), COUNT, size_of(frozen))]
    spoiled = [() if any(SPOILED[fault](name, value) for name, value in key) else key for key in keys]
    assert spoiled != keys
    assert probability(frozen, "TrivialAugmentWide", spoiled) < LEAST


def test_a_wrong_range_is_noticed(frozen: dict[str, Any]) -> None:
    size = size_of(frozen)
    _, factors = jitter_drawn(ColorJitter(0.42, 0.4, 0.4, 0.105), COUNT, size)
    assert at_quantiles(frozen, "ColorJitter, brightness", factors["brightness"]) < LEAST
    assert at_quantiles(frozen, "ColorJitter, hue", factors["hue"]) < LEAST
    boxes, _ = boxes_drawn(RandomErasing(0.5, (0.02, 0.35), (0.3, 3.0)), COUNT, size)
    assert at_quantiles(frozen, "RandomErasing, area", boxes[:, 2] * boxes[:, 3]) < LEAST
    assert at_quantiles(frozen, "RandomErasing, ratio", boxes[:, 2] / boxes[:, 3]) < LEAST


def test_kolmogorovs_and_smirnovs_test() -> None:
    generator = np.random.default_rng(0)
    some = [generator.normal(size=4000) for _ in range(2)]
    assert kolmogorov(*some)[1] > 0.01 and kolmogorov(some[0], some[1] + 0.15)[1] < 1e-6
    assert kolmogorov_above(1.3581) == pytest.approx(0.05, abs=1e-4)  # the table's 5 %
    assert kolmogorov_above(0.0) == 1 and kolmogorov_above(5.0) < 1e-20
