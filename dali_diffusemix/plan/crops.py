"""Crops: the box of an image that becomes the sample."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.base.philox import CROP, FLIP, below, uniform
from dali_diffusemix.errors import ConfigError
from dali_diffusemix.plan.numbers import alike, interval, probability, put, sides, whole, whole_number

Draws: TypeAlias = Callable[[int, NDArray[np.int64]], NDArray[np.uint32]]
"""(field, rows (m,)) to (m, 4) uint32: the draws of one field for some rows of the batch."""


class Crop(Protocol):
    """Chooses the box of an image that becomes the sample. Seam for users' own crops."""

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of the sample, pixels."""
        ...

    def boxes(self, sizes: NDArray[np.int32], draws: Draws) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return boxes and flips.

        Args:
            sizes: (n, 2) int32, (height, width) of each original in pixels.
            draws: The draws of a field (`FLIP`, `CROP` or one after it, of `base.philox`) for some rows.

        Returns:
            (n, 4) float64 boxes (top, left, height, width) relative to the image, which they may leave;
            (n,) bool, whether to flip left to right.
        """
        ...


def _flips(probability: float, count: int, draws: Draws) -> NDArray[np.bool_]:
    return uniform(draws(FLIP, np.arange(count))[:, 0]) < probability


def _relative(boxes: NDArray[np.float64], extents: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, 4) boxes in pixels over (n, 2) extents."""
    return boxes / np.tile(extents, (1, 2))


def _resize(value: int | tuple[int, int] | None) -> int | tuple[int, int] | None:
    """A shorter side, or an exact (height, width), as it is given."""
    return None if value is None else sides("resize", value)[0] if whole(value) else sides("resize", value)


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
        put(
            self,
            size=alike(sides("size", self.size)),
            scale=interval("scale", self.scale, 0, 1, (0.08, 1.0)),
            ratio=interval("ratio", self.ratio, 1e-3, 1e3, (0.75, 1.33)),
            flip=probability("flip", self.flip),
        )
        if self.scale[1] == 0:
            raise ConfigError(f"scale must allow an area above 0, found {self.scale}; for example scale=(0.08, 1.0).")

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of the sample, pixels."""
        return sides("size", self.size)

    def boxes(self, sizes: NDArray[np.int32], draws: Draws) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """See `Crop.boxes`."""
        extents = sizes.astype(np.float64)
        boxes = self._fallback(extents)
        rows = np.arange(len(sizes))
        log_low, log_high = np.log(self.ratio[0]), np.log(self.ratio[1])
        for attempt in range(self._TRIES):
            if not rows.size:
                break
            drawn = draws(CROP + attempt, rows)
            area = extents[rows].prod(axis=1) * self._between(drawn[:, 0], *self.scale)
            ratio = np.exp(self._between(drawn[:, 1], log_low, log_high))
            shape = np.rint(np.sqrt(np.stack([area / ratio, area * ratio], axis=1)))
            fits = ((shape >= 1) & (shape <= extents[rows])).all(axis=1)
            taken, shape = rows[fits], shape[fits]
            corner = below(drawn[fits, 2:], extents[taken] - shape + 1)
            boxes[taken] = np.concatenate([corner, shape], axis=1)
            rows = rows[~fits]
        return _relative(boxes, extents), _flips(self.flip, len(sizes), draws)

    @staticmethod
    def _between(drawn: NDArray[np.uint32], low: float, high: float) -> NDArray[np.float64]:
        return low + (high - low) * uniform(drawn)

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
    """A box of the output's size at a random position in the (resized, padded) image, flipped half the time.

    The box may leave the image; what lies outside is 0 before normalisation. An image that is smaller than `size`,
    padding included, lies at random inside the sample.
    """

    size: int | tuple[int, int]
    """Output side, or (height, width), pixels."""
    resize: int | tuple[int, int] | None = field(default=None, kw_only=True)
    """The image is first resized: an int is its shorter side, a pair (height, width) is exact; None leaves it."""
    padding: int = field(default=0, kw_only=True)
    """Margin by which the box may leave the (resized) image on every side, pixels."""
    flip: float = field(default=0.5, kw_only=True)
    """Probability of a left-right flip."""

    def __post_init__(self) -> None:
        put(
            self,
            size=alike(sides("size", self.size)),
            resize=_resize(self.resize),
            padding=whole_number("padding", self.padding, 0, 16384, 4),
            flip=probability("flip", self.flip),
        )

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of the sample, pixels."""
        return sides("size", self.size)

    def boxes(self, sizes: NDArray[np.int32], draws: Draws) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """See `Crop.boxes`."""
        extents = _resized(sizes, self.resize)
        shape = np.broadcast_to(np.array(self.output_size, dtype=np.float64), extents.shape)
        first, last = np.float64(-self.padding), extents + self.padding - shape
        low, high = np.minimum(first, last), np.maximum(first, last)
        drawn = draws(CROP, np.arange(len(sizes)))
        corner = low + below(drawn[:, :2], high - low + 1)
        boxes = np.concatenate([corner, shape], axis=1)
        return _relative(boxes, extents), _flips(self.flip, len(sizes), draws)


@dataclass(frozen=True)
class EvalCrop:
    """The centre of the image resized to `resize` on its shorter side; nothing random, no flip."""

    size: int | tuple[int, int]
    """Output side, or (height, width), pixels."""
    resize: int | tuple[int, int] | None = field(default=None, kw_only=True)
    """Shorter side, or exact (height, width), pixels; None is 8/7 of the (shorter) output side: 256 for 224."""

    def __post_init__(self) -> None:
        put(self, size=alike(sides("size", self.size)), resize=_resize(self.resize))

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of the sample, pixels."""
        return sides("size", self.size)

    def boxes(self, sizes: NDArray[np.int32], draws: Draws) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """See `Crop.boxes`. Offsets are whole pixels, rounded half to even, as torchvision's CenterCrop."""
        resize = round(min(self.output_size) * 8 / 7) if self.resize is None else self.resize
        extents = _resized(sizes, resize)
        shape = np.broadcast_to(np.array(self.output_size, dtype=np.float64), extents.shape)
        boxes = np.concatenate([np.rint((extents - shape) / 2), shape], axis=1)
        return _relative(boxes, extents), np.zeros(len(sizes), dtype=np.bool_)
