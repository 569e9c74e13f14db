"""The plan: everything random about a batch, as arrays, one row per sample.

`Planner` turns (seed, epoch, indices) into a `BatchPlan`; `Schedule` says which indices a rank's batch holds.
Both are pure functions of their arguments: a row depends on neither batch size, worker, rank nor history, and any
row of any epoch costs the same. Nothing else in this package draws.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Final, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dali_diffusemix.errors import ConfigError
from dali_diffusemix.philox import Permutation, below, check_seed, draw, uniform

PLAN_VERSION: Final = 1
"""Frozen by golden vectors: another value means that the same seed gives other samples."""

MASKS: Final = ("left", "right", "top", "bottom")
"""Which side shows the edit; `BatchPlan.mask` holds the position in this tuple."""

Mask: TypeAlias = Literal["left", "right", "top", "bottom"]

# The third word of the counter: which decision a draw is for.
_MIXED, _EDIT, _MASK, _FRACTAL, _WEIGHT = range(5)
FLIP: Final = 5
"""Field of a crop's flip."""
CROP: Final = 16
"""Field of a crop's first try; the others follow."""
_COMMON: Final = (_MIXED, _EDIT, _MASK, _FRACTAL, _WEIGHT, FLIP, CROP)

Words: TypeAlias = Callable[[int, NDArray[np.int64]], NDArray[np.uint32]]
"""(field, rows (m,)) to (m, 4) uint32: the draws of one field for some rows of the batch."""


def _check_range(name: str, value: tuple[float, float], low: float, high: float) -> None:
    if not (len(value) == 2 and low <= value[0] <= value[1] <= high):
        raise ConfigError(f"{name} must be (low, high) with {low} ≤ low ≤ high ≤ {high}, found {value}")


def _check_number(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name} must lie in [{low}, {high}], found {value}")


@dataclass(frozen=True, kw_only=True)
class MixSpec:
    """How originals, edits and fractals are mixed. `paper()` and `release()` are the two known settings.

    Source: Islam et al., "DiffuseMix: Label-Preserving Data Augmentation with Diffusion Models", CVPR 2024.
    """

    masks: tuple[Mask, ...] = MASKS
    """The masks to choose from, uniformly."""
    seam_width: float = 0.0
    """Width of the linear ramp between the sides, as a fraction of what the mask spans; 0 is a hard edge."""
    fractal_weight: float | tuple[float, float] = 0.20
    """λ, in [0, 1]; a pair is a range, drawn uniformly."""
    order: Literal["mix_then_crop", "crop_then_mix"] = "mix_then_crop"
    """Whether mask and fractal span the image, wherever the crop lies, or the crop."""
    epoch: Literal["fixed", "expanded"] = "fixed"
    """`fixed`: each original once, mixed with `probability`. `expanded`: originals and each edit once."""
    probability: float | None = None
    """Share of mixed samples of a fixed epoch; None is K/(1+K) for an original with K edits."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "masks", tuple(self.masks))
        unknown = [m for m in self.masks if m not in MASKS]
        if unknown or not self.masks or len(set(self.masks)) != len(self.masks):
            raise ConfigError(f"masks must be one or more of {MASKS}, each once, found {self.masks}")
        if not 0 <= self.seam_width <= 1:
            raise ConfigError(f"seam_width must lie in [0, 1], a fraction of the side, found {self.seam_width}")
        if isinstance(self.fractal_weight, tuple):
            _check_range("fractal_weight", self.fractal_weight, 0, 1)
        else:
            _check_number("fractal_weight", self.fractal_weight, 0, 1)
        if self.order not in ("mix_then_crop", "crop_then_mix"):
            raise ConfigError(f"order must be 'mix_then_crop' or 'crop_then_mix', found {self.order!r}")
        if self.epoch not in ("fixed", "expanded"):
            raise ConfigError(f"epoch must be 'fixed' or 'expanded', found {self.epoch!r}")
        if self.probability is not None:
            if not 0 <= self.probability <= 1:
                raise ConfigError(f"probability must lie in [0, 1], found {self.probability}")
            if self.epoch == "expanded":
                raise ConfigError(
                    "probability has no meaning in an expanded epoch, which holds every edit once; "
                    f"found {self.probability}: leave it out or take epoch='fixed'"
                )

    @property
    def fractal_weight_range(self) -> tuple[float, float]:
        """λ's range; both ends alike where it is one number."""
        weight = self.fractal_weight
        return weight if isinstance(weight, tuple) else (weight, weight)

    @classmethod
    def paper(cls) -> "MixSpec":
        """What the paper describes: four masks, a hard seam, λ = 0.2, an epoch that keeps its size."""
        return cls()

    @classmethod
    def release(cls) -> "MixSpec":
        """What the released code does: right and bottom, a 20-pixel ramp at 256, the expanded set."""
        return cls(masks=("right", "bottom"), seam_width=20 / 256, epoch="expanded")


class Crop(Protocol):
    """Chooses the box of an image that becomes the sample. Seam for users' own crops."""

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of the sample, pixels."""
        ...

    def boxes(self, sizes: NDArray[np.int32], words: Words) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return boxes and flips.

        Args:
            sizes: (n, 2) int32, (height, width) of each original in pixels.
            words: Draws, by field (`CROP` and following, and `FLIP`) and rows.

        Returns:
            (n, 4) float64 boxes (top, left, height, width) relative to the image, which they may leave;
            (n,) bool, whether to flip left to right.
        """
        ...


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, int) else value
    if not (1 <= height <= 16384 and 1 <= width <= 16384):
        raise ConfigError(f"{name} must be 1 to 16384 pixels, an int or (height, width), found {value!r}")
    return int(height), int(width)


def _flips(probability: float, count: int, words: Words) -> NDArray[np.bool_]:
    return uniform(words(FLIP, np.arange(count))[:, 0]) < probability


def _relative(boxes: NDArray[np.float64], extents: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, 4) boxes in pixels over (n, 2) extents."""
    return boxes / np.tile(extents, (1, 2))


def _resized(sizes: NDArray[np.int32], resize: int | tuple[int, int] | None) -> NDArray[np.float64]:
    """Sizes after a resize: an int is the shorter side (the longer one cut to whole pixels), a pair is exact."""
    if resize is None:
        return sizes.astype(np.float64)
    if isinstance(resize, tuple):
        return np.broadcast_to(np.array(resize, dtype=np.float64), sizes.shape)
    shorter = sizes.min(axis=1, keepdims=True).astype(np.int64)
    return np.asarray(sizes.astype(np.int64) * resize // shorter, dtype=np.float64)


@dataclass(frozen=True)
class TrainCrop:
    """A box of random area and shape, resized to `size`: the law of torchvision's RandomResizedCrop.

    Source: Szegedy et al., "Going deeper with convolutions", CVPR 2015, section 6; ten tries, then the largest
    centred box with its ratio clamped.
    """

    size: int | tuple[int, int]
    """Output side, or (height, width), pixels."""
    scale: tuple[float, float] = field(default=(0.08, 1.0), kw_only=True)
    """Area of the box over the area of the image, uniform."""
    ratio: tuple[float, float] = field(default=(3 / 4, 4 / 3), kw_only=True)
    """Width over height, log-uniform."""
    flip: float = field(default=0.5, kw_only=True)
    """Probability of a left-right flip."""

    _TRIES = 10

    def __post_init__(self) -> None:
        _pair("size", self.size)
        _check_range("scale", self.scale, 0, 1)
        _check_range("ratio", self.ratio, 1e-3, 1e3)
        _check_number("flip", self.flip, 0, 1)
        if self.scale[1] == 0:
            raise ConfigError(f"scale must allow an area above 0, found {self.scale}")

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of the sample, pixels."""
        return _pair("size", self.size)

    def boxes(self, sizes: NDArray[np.int32], words: Words) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """See `Crop.boxes`."""
        extents = sizes.astype(np.float64)
        boxes = self._fallback(extents)
        rows = np.arange(len(sizes))
        log_low, log_high = np.log(self.ratio[0]), np.log(self.ratio[1])
        for attempt in range(self._TRIES):
            if not rows.size:
                break
            drawn = words(CROP + attempt, rows)
            area = extents[rows].prod(axis=1) * self._between(drawn[:, 0], *self.scale)
            ratio = np.exp(self._between(drawn[:, 1], log_low, log_high))
            shape = np.rint(np.sqrt(np.stack([area / ratio, area * ratio], axis=1)))
            fits = ((shape >= 1) & (shape <= extents[rows])).all(axis=1)
            taken, shape = rows[fits], shape[fits]
            corner = below(drawn[fits, 2:], extents[taken] - shape + 1)
            boxes[taken] = np.concatenate([corner, shape], axis=1)
            rows = rows[~fits]
        return _relative(boxes, extents), _flips(self.flip, len(sizes), words)

    @staticmethod
    def _between(words: NDArray[np.uint32], low: float, high: float) -> NDArray[np.float64]:
        return low + (high - low) * uniform(words)

    def _fallback(self, extents: NDArray[np.float64]) -> NDArray[np.float64]:
        height, width = extents[:, 0], extents[:, 1]
        ratio = width / height
        low, high = self.ratio
        crop_height = np.where(ratio < low, np.maximum(np.rint(width / low), 1), height)
        crop_width = np.where(ratio > high, np.maximum(np.rint(height * high), 1), width)
        top, left = (height - crop_height) // 2, (width - crop_width) // 2
        return np.stack([top, left, crop_height, crop_width], axis=1)


@dataclass(frozen=True)
class RandomCrop:
    """A box of the output's size at a random place of the (resized, padded) image, flipped half the time.

    The box may leave the image; what lies outside is 0 before normalisation. An image that is smaller than `size`,
    padding included, is placed at random inside the sample.
    """

    size: int | tuple[int, int]
    """Output side, or (height, width), pixels."""
    resize: int | tuple[int, int] | None = field(default=None, kw_only=True)
    """The image is first resized: an int is its shorter side, a pair (height, width) is exact; None leaves it."""
    padding: int = field(default=0, kw_only=True)
    """How far the box may leave the (resized) image on every side, pixels."""
    flip: float = field(default=0.5, kw_only=True)
    """Probability of a left-right flip."""

    def __post_init__(self) -> None:
        _pair("size", self.size)
        if self.resize is not None:
            _pair("resize", self.resize)
        if self.padding < 0:
            raise ConfigError(f"padding must be at least 0 pixels, found {self.padding}")
        _check_number("flip", self.flip, 0, 1)

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of the sample, pixels."""
        return _pair("size", self.size)

    def boxes(self, sizes: NDArray[np.int32], words: Words) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """See `Crop.boxes`."""
        extents = _resized(sizes, self.resize)
        shape = np.broadcast_to(np.array(self.output_size, dtype=np.float64), extents.shape)
        first, last = np.float64(-self.padding), extents + self.padding - shape
        low, high = np.minimum(first, last), np.maximum(first, last)
        drawn = words(CROP, np.arange(len(sizes)))
        corner = low + below(drawn[:, :2], high - low + 1)
        boxes = np.concatenate([corner, shape], axis=1)
        return _relative(boxes, extents), _flips(self.flip, len(sizes), words)


@dataclass(frozen=True)
class EvalCrop:
    """The centre of the image resized to `resize` on its shorter side; nothing random, no flip."""

    size: int | tuple[int, int]
    """Output side, or (height, width), pixels."""
    resize: int | tuple[int, int] | None = field(default=None, kw_only=True)
    """Shorter side, or exact (height, width), pixels; None is 8/7 of the (shorter) output side: 256 for 224."""

    def __post_init__(self) -> None:
        _pair("size", self.size)
        if self.resize is not None:
            _pair("resize", self.resize)

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of the sample, pixels."""
        return _pair("size", self.size)

    def boxes(self, sizes: NDArray[np.int32], words: Words) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """See `Crop.boxes`. Offsets are whole pixels, rounded half to even, as torchvision's CenterCrop."""
        resize = round(min(self.output_size) * 8 / 7) if self.resize is None else self.resize
        extents = _resized(sizes, resize)
        shape = np.broadcast_to(np.array(self.output_size, dtype=np.float64), extents.shape)
        boxes = np.concatenate([np.rint((extents - shape) / 2), shape], axis=1)
        return _relative(boxes, extents), np.zeros(len(sizes), dtype=np.bool_)


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """One row per sample. Boxes are (top, left, height, width) relative to the image they lie in."""

    epoch: int
    index: NDArray[np.int64]  # (n,) place in the epoch's numbering of samples
    original: NDArray[np.int64]  # (n,) row of the catalog
    edit: NDArray[np.int64]  # (n,) row of the edit index; -1: not mixed
    mask: NDArray[np.int8]  # (n,) position in MASKS; -1: not mixed
    box: NDArray[np.float64]  # (n, 4) the crop; may leave [0, 1]
    span: NDArray[np.float64]  # (n, 4) the output within what mask and fractal span
    seam_width: float  # of what the mask spans
    flip: NDArray[np.bool_]  # (n,) left to right, last of all
    fractal: NDArray[np.int64]  # (n,) row of the bank; -1: none
    fractal_flip: NDArray[np.bool_]  # (n, 2) the fractal's own: upside down, left to right
    fractal_weight: NDArray[np.float32]  # (n,) λ; 0 where there is no fractal
    output_size: tuple[int, int]  # (height, width) pixels

    def __len__(self) -> int:
        return len(self.index)

    @property
    def mixed(self) -> NDArray[np.bool_]:
        """(n,) whether the sample shows an edit."""
        return self.edit >= 0

    def row(self, place: int) -> "BatchPlan":
        """The plan of one sample, a view."""
        return replace(self, **{name: getattr(self, name)[place : place + 1] for name in self._columns()})

    def with_rows(self, rows: Mapping[int, "BatchPlan"]) -> "BatchPlan":
        """A plan with other rows, of one sample each, at some places."""
        columns = {name: getattr(self, name).copy() for name in self._columns()}
        for place, row in rows.items():
            for name, column in columns.items():
                column[place] = getattr(row, name)[0]
        return replace(self, **columns)

    def unmixed(self) -> "BatchPlan":
        """The same crops and flips of the originals alone: no edit, no fractal."""
        none = np.full(len(self), -1)
        return replace(
            self,
            edit=none.astype(self.edit.dtype),
            mask=none.astype(self.mask.dtype),
            fractal=none.astype(self.fractal.dtype),
            fractal_flip=np.zeros_like(self.fractal_flip),
            fractal_weight=np.zeros_like(self.fractal_weight),
        )

    @classmethod
    def _columns(cls) -> list[str]:
        return [field.name for field in fields(cls) if field.name not in ("epoch", "seam_width", "output_size")]


def visible_parts(
    plan: BatchPlan, original_sizes: NDArray[np.int32], edit_sizes: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the pixels of each source that its sample is made of: what is seen after crop and mask, and the halo.

        image                     seen: the crop, on this source's side of the seam
      ┌──────────────┬─────┐      halo: what the resize's filter reads beyond that
      │   ┌──────────┼──┐  │
      │   │   seen   │  │  │
      │   └──────────┼──┘  │
      └──────────────┴─────┘
                    seam

    Args:
        plan: n rows.
        original_sizes: (n, 2) (height, width) of the originals, pixels.
        edit_sizes: (n, 2) of the edits; any value where a row is not mixed.

    Returns:
        Of the originals and of the edits (n, 4) int32 windows: top, left, bottom, right, pixels of that image. Empty,
        all 0, where nothing of it is seen.
    """
    windows = []
    for is_edit, sizes in ((False, original_sizes), (True, edit_sizes)):
        window = np.empty((len(plan), 4), dtype=np.int32)
        empty = ~plan.mixed if is_edit else np.zeros(len(plan), dtype=np.bool_)
        for axis in (0, 1):
            first, last = _seen_outputs(plan, axis, is_edit)
            begin, end = _taps(plan, axis, first, last, sizes[:, axis])
            window[:, axis], window[:, axis + 2] = begin, end
            empty |= (first > last) | (begin >= end)
        window[empty] = 0
        windows.append(window)
    return windows[0], windows[1]


def _centre(
    start: NDArray[np.float64], extent: NDArray[np.float64], place: NDArray[np.int64], output: int
) -> NDArray[np.float64]:
    """Where output pixels' centres lie: the specification's order of operations, so that all decide alike."""
    return np.asarray(start + extent * ((place + 0.5) / output))


def seam_ramp(t: NDArray[np.float64], seam_width: float) -> NDArray[np.float64]:
    """m at t, the coordinate across the seam of what the mask spans: 0 before the seam, 1 behind it.

    m = clamp((t - 1/2) / seam_width + 1/2, 0, 1), and without a width [t >= 1/2].
    """
    if seam_width > 0:
        return np.clip((t - 0.5) / seam_width + 0.5, 0, 1)
    return (t >= 0.5).astype(np.float64)


def _first_output(
    start: NDArray[np.float64],
    extent: NDArray[np.float64],
    output: int,
    near: float,
    reached: Callable[[NDArray[np.float64]], NDArray[np.bool_]],
) -> NDArray[np.int64]:
    """(n,) the first output pixel whose centre has `reached` what begins near a place; `output` if none has."""
    place = np.clip(np.ceil((near - start) / extent * output - 0.5), -1, output + 1).astype(np.int64)
    # The division rounds: step to the pixel on which the condition itself turns.
    for _ in range(2):
        place = np.where(reached(_centre(start, extent, place - 1, output)), place - 1, place)
    for _ in range(2):
        place = np.where(reached(_centre(start, extent, place, output)), place, place + 1)
    return np.clip(place, 0, output)


def _seen_outputs(plan: BatchPlan, axis: int, is_edit: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(n,) first and last output pixel along an axis that a source is seen in; first > last where it is in none."""
    output = plan.output_size[axis]
    start, extent = plan.box[:, axis], plan.box[:, axis + 2]
    # Inside the image.
    first = _first_output(start, extent, output, 0.0, lambda t: t >= 0)
    last = _first_output(start, extent, output, 1.0, lambda t: t >= 1) - 1
    # On its side of the seam: M > 0 from `high` on, M < 1 before `low`.
    start, extent, width = plan.span[:, axis], plan.span[:, axis + 2], plan.seam_width
    high = _first_output(start, extent, output, 0.5 - width / 2, lambda t: seam_ramp(t, width) > 0)
    low = _first_output(start, extent, output, 0.5 + width / 2, lambda t: seam_ramp(t, width) >= 1)
    across = [MASKS.index(name) for name in (("top", "bottom") if axis == 0 else ("left", "right"))]
    for mask, edit_is_high in zip(across, (False, True), strict=True):
        rows = plan.mask == mask
        if is_edit == edit_is_high:
            first = np.where(rows, np.maximum(first, high), first)
        else:
            last = np.where(rows, np.minimum(last, low - 1), last)
    return first, last


def _taps(
    plan: BatchPlan, axis: int, first: NDArray[np.int64], last: NDArray[np.int64], size: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(n,) first source pixel that the first output pixel's filter reads, and the one after the last's last."""
    output = plan.output_size[axis]
    start, extent = plan.box[:, axis] * size, plan.box[:, axis + 2] * size
    reach = np.maximum(extent / output, 1.0)
    begin = np.maximum(_centre(start, extent, first, output) - reach + 0.5, 0)
    end = np.minimum(_centre(start, extent, last, output) + reach + 0.5, size)
    return begin.astype(np.int64), end.astype(np.int64)


class EditTable(Protocol):
    """Which edits each original has, sorted by original."""

    @property
    def starts(self) -> NDArray[np.int64]:
        """(originals + 1,) int64: the edits of original i are rows starts[i] to starts[i+1]."""
        ...

    def originals_of(self, edits: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) rows of the catalog that these edits belong to."""
        ...


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Turns (epoch, indices) into rows. Holds what decides them, draws nothing until asked.

    In a fixed epoch index i is original i. In an expanded one the first N indices are the originals, unmixed, and
    index N + j is edit j.
    """

    seed: int
    crop: Crop
    sizes: NDArray[np.int32]  # (originals, 2) (height, width) pixels
    mix: MixSpec | None = None
    edits: EditTable | None = None
    fractals: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed, 0)
        if self.mix is None:
            return
        if self.edits is None:
            raise ConfigError("mix needs edits: found mix without edits; give an edit store or take mix=None")
        if len(self.edits.starts) != len(self.sizes) + 1:
            raise ConfigError(
                f"edits must be of these originals: found starts for {len(self.edits.starts) - 1} originals, "
                f"{len(self.sizes)} in the catalog"
            )
        if self.fractals < 1 and self.mix.fractal_weight_range[1] > 0:
            raise ConfigError(
                f"fractal_weight {self.mix.fractal_weight} needs a fractal bank of at least 1, found {self.fractals}; "
                "give fractals=, or take fractal_weight=0"
            )

    def __len__(self) -> int:
        """Samples in an epoch."""
        if self.mix is not None and self.edits is not None and self.mix.epoch == "expanded":
            return len(self.sizes) + int(self.edits.starts[-1])
        return len(self.sizes)

    def batch(self, epoch: int, indices: ArrayLike) -> BatchPlan:
        """Return the rows of these samples in this epoch.

        Args:
            epoch: 0 ≤ epoch < 2³².
            indices: (n,) 0 ≤ index < len(self).

        Raises:
            ConfigError: an index or the epoch lies outside its range.
        """
        index = np.atleast_1d(np.asarray(indices, dtype=np.int64))
        count = len(index)
        if count and not (index.min() >= 0 and index.max() < len(self)):
            raise ConfigError(f"index must lie in [0, {len(self)}), found {index.min()} to {index.max()}")
        # One call for what nearly every row needs; a crop's later tries are drawn for the rows that need them.
        common = dict(zip(_COMMON, draw(self.seed, epoch, index, _COMMON), strict=True))

        def words(which: int, rows: NDArray[np.int64]) -> NDArray[np.uint32]:
            if which in common:
                return np.asarray(common[which][rows])
            return np.asarray(draw(self.seed, epoch, index[rows], [which])[0])

        original, edit = self._sources(index, words)
        sizes = np.asarray(self.sizes[original], dtype=np.int32)
        box, flip = self.crop.boxes(sizes, words)
        mixed = edit >= 0
        rows = np.arange(count)
        mix = self.mix or MixSpec()
        mask_words = words(_MASK, rows)[:, 0]
        masks = np.array([MASKS.index(m) for m in mix.masks], dtype=np.int8)
        fractal_words = words(_FRACTAL, rows)
        low, high = mix.fractal_weight_range
        weight = np.where(mixed, low + (high - low) * uniform(words(_WEIGHT, rows)[:, 0]), 0).astype(np.float32)
        blended = weight > 0
        return BatchPlan(
            epoch=epoch,
            index=index,
            original=original,
            edit=edit,
            mask=np.where(mixed, masks[below(mask_words, len(masks))], np.int8(-1)),
            box=box,
            span=box if mix.order == "mix_then_crop" else np.tile([0.0, 0.0, 1.0, 1.0], (count, 1)),
            seam_width=mix.seam_width,
            flip=flip,
            fractal=np.where(blended, below(fractal_words[:, 0], self.fractals), -1),
            fractal_flip=(fractal_words[:, 1:3] >> np.uint32(31)).astype(np.bool_) & blended[:, None],
            fractal_weight=weight,
            output_size=self.crop.output_size,
        )

    def _sources(self, index: NDArray[np.int64], words: Words) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which original and which edit each sample shows; -1 where it shows no edit."""
        if self.mix is None or self.edits is None:
            return index, np.full(len(index), -1, dtype=np.int64)
        if self.mix.epoch == "expanded":
            edit = index - len(self.sizes)
            is_edit = edit >= 0
            original = index.copy()
            original[is_edit] = self.edits.originals_of(edit[is_edit])
            return original, np.where(is_edit, edit, -1)
        rows = np.arange(len(index))
        first = np.asarray(self.edits.starts[index])
        count = np.asarray(self.edits.starts[index + 1]) - first
        probability = count / (1 + count) if self.mix.probability is None else self.mix.probability
        mixed = (uniform(words(_MIXED, rows)[:, 0]) < probability) & (count > 0)
        return index, np.where(mixed, first + below(words(_EDIT, rows)[:, 0], count), -1)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which samples a rank's batches hold: the epoch's order cut into global batches, those cut among ranks.

    Global batch s is batch_size x world_size consecutive places of the order. Rank r takes batch_size of them,
    from r x batch_size on. The last R < batch_size x world_size places are cut at R x r // world_size; if
    R < world_size they are first filled up to world_size from the epoch's start. So with the global batch size
    fixed, every full step sees the same samples whatever the number of ranks, and all ranks take as many steps.
    """

    length: int
    """Samples in the epoch."""
    batch_size: int
    """Samples per rank and step."""
    shuffle: bool = False
    drop_last: bool = False
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        check_seed(self.seed, 0)
        for name, value in (
            ("length", self.length),
            ("batch_size", self.batch_size),
            ("world_size", self.world_size),
        ):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, found {value}")
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank must lie in [0, world_size {self.world_size}), found {self.rank}")

    @property
    def global_batch_size(self) -> int:
        """Places that all ranks together take in one step."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Steps in an epoch, equal on all ranks."""
        if self.drop_last:
            return self.length // self.global_batch_size
        return -(-self.length // self.global_batch_size)

    def count(self) -> int:
        """Samples that this rank takes in an epoch."""
        steps = len(self)
        return (steps - 1) * self.batch_size + len(self.places(steps - 1)) if steps else 0

    def places(self, step: int) -> NDArray[np.int64]:
        """(n,) places of the epoch's order that this rank takes at `step`."""
        if not 0 <= step < len(self):
            raise ConfigError(f"step must lie in [0, {len(self)}), found {step}")
        start = step * self.global_batch_size
        remaining = self.length - start
        if remaining >= self.global_batch_size:
            first = start + self.rank * self.batch_size
            return np.arange(first, first + self.batch_size)
        filled = max(remaining, self.world_size)
        low, high = filled * self.rank // self.world_size, filled * (self.rank + 1) // self.world_size
        return (start + np.arange(low, high)) % self.length

    def indices(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) sample indices that stand at these places in this epoch."""
        if not self.shuffle:
            return places
        block = places // _BLOCK
        out = np.empty(len(places), dtype=np.int64)
        for number in np.unique(block):
            here = block == number
            out[here] = _order_block(self.length, self.seed, epoch, int(number))[places[here] % _BLOCK]
        return out


_BLOCK: Final = 8192


@functools.lru_cache(maxsize=8)
def _order_block(length: int, seed: int, epoch: int, number: int) -> NDArray[np.int64]:
    """A stretch of the epoch's order. NumPy computes a stretch in little more time than one batch of it."""
    start = number * _BLOCK
    block = Permutation(length, seed=seed, epoch=epoch)(np.arange(start, min(start + _BLOCK, length)))
    block.setflags(write=False)
    return block
