"""Visible parts: the pixels of each source that a sample is made of."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.plan.batch import BatchPlan
from dali_diffusemix.plan.geometry import Axis, before, beyond, centre, seam_ramp
from dali_diffusemix.plan.spec import MASKS


def visible_parts(plan: BatchPlan, sizes: NDArray[np.int32]) -> NDArray[np.int32]:
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
        sizes: (2, n, 2) (height, width) of the originals and of the edits, pixels; of an edit any value where a row is
            not mixed.

    Returns:
        (2, n, 4) int32 windows: top, left, bottom, right, pixels of that image. Empty, all 0, where nothing of it is
        seen.
    """
    windows = np.empty((2, len(plan), 4), dtype=np.int32)
    for is_edit, window, size in zip((False, True), windows, sizes, strict=True):
        empty = ~plan.mixed if is_edit else np.zeros(len(plan), dtype=np.bool_)
        for axis in (0, 1):
            first, last = _seen_outputs(plan, axis, is_edit)
            line = Axis(plan.box[:, axis], plan.box[:, axis + 2], plan.output_size[axis], size[:, axis])
            window[:, axis], window[:, axis + 2] = (
                line.taps(line.source_centre(first))[0],
                line.taps(line.source_centre(last))[1],
            )
            empty |= first > last
        window[empty] = 0
    return windows


def _first_output(
    start: NDArray[np.float64],
    extent: NDArray[np.float64],
    output: int,
    near: float,
    reached: Callable[[NDArray[np.float64]], NDArray[np.bool_]],
) -> NDArray[np.int64]:
    """(n,) the first output pixel whose centre has `reached` what begins near a coordinate; `output` if none has."""
    pixel = np.clip(np.ceil((near - start) / extent * output - 0.5), -1, output + 1).astype(np.int64)
    # The division rounds: step to the pixel on which the condition itself turns.
    for _ in range(2):
        pixel = np.where(reached(centre(start, extent, pixel - 1, output)), pixel - 1, pixel)
    for _ in range(2):
        pixel = np.where(reached(centre(start, extent, pixel, output)), pixel, pixel + 1)
    return np.clip(pixel, 0, output)


def _seen_outputs(plan: BatchPlan, axis: int, is_edit: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(n,) first and last output pixel along an axis that a source is seen in; first > last where it is in none."""
    output = plan.output_size[axis]
    start, extent = plan.box[:, axis], plan.box[:, axis + 2]
    # Inside the image.
    first = _first_output(start, extent, output, 0.0, lambda t: ~before(t))
    last = _first_output(start, extent, output, 1.0, beyond) - 1
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
