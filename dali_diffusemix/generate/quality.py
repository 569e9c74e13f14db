"""Quality: a verdict on every edit, so that bad edits of a diffusion model are not trained on.

The first test that fails, in this order, is the verdict. Pixels are 0 to 1 here.

    not a number             share of pixels that are not finite
    black, white             share of pixels of which every channel is near 0, near 1
    flat                     standard deviation of the channel that varies most
    unchanged                mean absolute difference from the original over a grid of at most 32 x 32 cells: without
                             an edit, an autoencoder or JPEG changes only fine detail
    structure_lost           the larger of two correlations over that grid: of brightness, of either sign (a night, a
                             negative), and of its steepness; low if objects are not where they were

The score of an accepted edit is that of the last test: how much of the original's structure it kept, 0 to 1.

The thresholds were calibrated with photographs and procedural edits, not with a diffusion model's
(benchmarks/calibrate_quality.py). The released code's filter passes black images and drops white ones; see the tests.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.errors import ConfigError, DataError

_GRID = 32  # cells a side at most
_NEAR = 0.05  # of black and of white
_Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """The thresholds of the tests. Raises ConfigError unless each is from 0 to 1."""

    not_finite: float = 0.0  # share of pixels; more is rejected
    black: float = 0.98  # share of pixels; as many are rejected
    white: float = 0.98  # the same
    flat: float = 0.02  # standard deviation; less is rejected
    like: float = 0.015  # difference; less is rejected
    unlike: float = 0.25  # correlation; less is rejected

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ConfigError(f"thresholds: {name} must be a number from 0 to 1, found {value!r}.")

    def settings(self) -> dict[str, float]:
        """The settings that an edit store records: threshold to value."""
        return {name: float(value) for name, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """The verdict on an edit."""

    verdict: str | None  # one of store.REJECTIONS; None: accepted
    score: float  # of the verdict's test; of the last one if it is accepted
    threshold: float


def judge(original: NDArray[np.uint8], edit: NDArray[Any], thresholds: Thresholds | None = None) -> Judgement:
    """Judge an edit.

    Args:
        original: (height, width, 3) uint8, as the editor got it.
        edit: (height, width, 3) uint8, or float32 of one with numbers that are not finite.
        thresholds: The defaults unless given.

    Raises:
        DataError: The two are not images of one size.
    """
    if edit.ndim != 3 or edit.shape[2] != 3 or edit.size == 0 or original.shape != edit.shape:
        raise DataError(
            f"edit must be (height, width, 3) and of its original's size, found {edit.shape} beside {original.shape}; "
            "an editor returns images of the size that it is given."
        )
    limits = thresholds or Thresholds()
    if edit.dtype != np.uint8:
        share = float(np.mean(~np.isfinite(edit).all(axis=2)))
        if share > limits.not_finite:
            return Judgement(verdict="not a number", score=share, threshold=limits.not_finite)
        edit = np.clip(np.nan_to_num(edit), 0, 255).astype(np.uint8)
    near = round(255 * _NEAR)
    for name, share, limit in (
        ("black", _share(edit <= near), limits.black),
        ("white", _share(edit >= 255 - near), limits.white),
    ):
        if share >= limit:
            return Judgement(verdict=name, score=share, threshold=limit)
    cells, of_original = _averages(edit), _averages(original)
    flatness = float(edit.reshape(-1, 3)[:: max(1, edit.size // 3 // 4096)].std(axis=0).max()) / 255
    if flatness < limits.flat:
        return Judgement(verdict="flat", score=flatness, threshold=limits.flat)
    difference = float(np.abs(cells - of_original).mean())
    if difference < limits.like:
        return Judgement(verdict="unchanged", score=difference, threshold=limits.like)
    likeness = _structure(of_original, cells)
    verdict = "structure_lost" if likeness < limits.unlike else None
    return Judgement(verdict=verdict, score=likeness, threshold=limits.unlike)


def _share(which: NDArray[np.bool_]) -> float:
    """Share of pixels for which all three channels are True."""
    return float(np.count_nonzero(which[..., 0] & which[..., 1] & which[..., 2])) / which[..., 0].size


def _averages(image: NDArray[np.uint8]) -> _Floats:
    """Averages of an image over a grid of cells, (rows, columns, 3) float32 from 0 to 1."""
    height, width = image.shape[:2]
    rows, columns = min(height, _GRID), min(width, _GRID)
    tops, lefts = np.arange(rows) * height // rows, np.arange(columns) * width // columns
    # Bands of rows first: the long axis is summed in contiguous memory.
    bands = np.add.reduceat(image.reshape(height, width * 3), tops, axis=0, dtype=np.uint32).reshape(rows, width, 3)
    sums = np.add.reduceat(bands, lefts, axis=1, dtype=np.uint32)
    areas = np.diff(tops, append=height)[:, None] * np.diff(lefts, append=width)[None, :]
    return np.asarray(sums / (areas[..., None] * 255), np.float32)


def _structure(original: _Floats, edit: _Floats) -> float:
    """The similarity of two images' structure, 0 to 1, whatever their colours."""
    ours, theirs = original.mean(axis=2), edit.mean(axis=2)
    found = max(abs(_correlation(ours, theirs)), _correlation(_steepness(ours), _steepness(theirs)), 0.0)
    return min(found, 1.0)  # by rounding a little more


def _steepness(field: _Floats) -> _Floats:
    down, across = np.diff(field, axis=0, append=field[-1:]), np.diff(field, axis=1, append=field[:, -1:])
    return np.sqrt(down * down + across * across)


def _correlation(one: _Floats, other: _Floats) -> float:
    one, other = one - one.mean(), other - other.mean()
    scale = float(np.sqrt((one * one).sum() * (other * other).sum()))
    return float((one * other).sum()) / scale if scale > 1e-6 else 0.0
