"""The geometry of a sample: centres, inside, seam ramp and taps. kernels/mix_pixel.cuh has the same, line by line.

Windows, specification and kernels all decide by it, in double and in the same order of operations, so that they agree
on what is inside, seen and read. Arguments broadcast.

    output pixels over the box, relative to the image; · is a centre
    ┌─────────┬─────────┬─────────┬─────────┐
    │    ·    │    ·    │    ·    │    ·    │
    └─────────┴─────────┴─────────┴─────────┘
          ├─── reach ───·─── reach ───┤
    ──┬──────┬──────┬──────┬──────┬──────┬──────┬── source pixels
      │      │ first│      │      │ last │      │   taps of that centre: weight 1 at it, 0 from `reach` on
    ──┴──────┴──────┴──────┴──────┴──────┴──────┴──

A centre is inside if 0 ≤ t < 1, relative to the image. So an original and its edit agree, whatever their sizes. In
source pixels, rounding may put such a centre just beyond the image's edge; the filter reaches at least one pixel to
each side, so it still has a tap in the image.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64] | float
Integers: TypeAlias = NDArray[np.integer] | int


def centre(start: Floats, extent: Floats, i: Integers, output: int) -> NDArray[np.float64]:
    """Centre of output pixel i in the box [start, start + extent), in the unit that the box has."""
    return np.asarray(start + extent * ((np.asarray(i) + 0.5) / output))


def before(t: NDArray[np.float64]) -> NDArray[np.bool_]:
    """True for centres, relative to the image, above it or to the left of it."""
    return t < 0


def beyond(t: NDArray[np.float64]) -> NDArray[np.bool_]:
    """True for centres, relative to the image, below it or to the right of it."""
    return t >= 1


def inside(t: NDArray[np.float64]) -> NDArray[np.bool_]:
    """True for centres, relative to the image, that lie in it. Elsewhere a sample is 0."""
    return ~before(t) & ~beyond(t)


def seam_ramp(t: NDArray[np.float64], seam_width: float) -> NDArray[np.float64]:
    """m at t, the coordinate across the seam of what the mask spans: 0 before the seam, 1 behind it.

    m = clamp((t - 1/2) / seam_width + 1/2, 0, 1), and without a width [t >= 1/2].
    """
    if seam_width > 0:
        return np.clip((t - 0.5) / seam_width + 0.5, 0, 1)
    return (t >= 0.5).astype(np.float64)


@dataclass(frozen=True)
class Axis:
    """The resample of one axis: the box [start, start + extent), relative to an image, to `output` pixels."""

    start: Floats
    extent: Floats
    output: int
    source: Integers
    """Pixels of the image."""

    @property
    def reach(self) -> NDArray[np.float64]:
        """Half-width of the triangle filter, source pixels: 1, and more when shrinking."""
        return np.asarray(np.maximum(self.extent * self.source / self.output, 1.0))

    def source_centre(self, i: Integers) -> NDArray[np.float64]:
        """Centre of output pixel i, source pixels."""
        return centre(np.multiply(self.start, self.source), np.multiply(self.extent, self.source), i, self.output)

    def taps(self, centre: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First source pixel that the output pixel of a source centre reads, and the one after the last."""
        low, high = centre - self.reach + 0.5, centre + self.reach + 0.5
        return np.maximum(low, 0).astype(np.int64), np.minimum(high, self.source).astype(np.int64)
