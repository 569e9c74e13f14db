"""The specification of every pixel, in NumPy; its geometry is `plan.geometry`."""

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.mix.tensor import TensorFormat
from dali_diffusemix.plan.batch import BatchPlan
from dali_diffusemix.plan.geometry import Axis, centre, inside, seam_ramp
from dali_diffusemix.plan.spec import MASKS


def resample_weights(start: float, extent: float, output: int, source: int) -> NDArray[np.float32]:
    """Weights of a one-dimensional resample: Pillow's antialiased bilinear `resize(..., BILINEAR, box=...)`.

    A triangle filter, widened by the ratio when shrinking, its support clipped to the image, its weights summing
    to 1. An output pixel whose centre lies outside the image has no weights and becomes 0.

    Args:
        start: Where the box begins, relative to the image.
        extent: Length of the box, relative to the image.
        output: Output pixels.
        source: Source pixels.

    Returns:
        (output, source) float32.
    """
    axis = Axis(start, extent, output, source)
    i, x = np.arange(output)[:, None], np.arange(source)
    at = axis.source_centre(i)
    first, end = axis.taps(at)
    weights = np.maximum(1 - np.abs((x + 0.5 - at) / axis.reach), 0)
    weights[(x < first) | (x >= end) | ~inside(centre(start, extent, i, output))] = 0
    total = weights.sum(axis=1, keepdims=True)
    return np.asarray(weights / np.where(total > 0, total, 1), dtype=np.float32)


def resample(image: NDArray[np.uint8], box: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float32]:
    """The box of an image on the output grid, in float32 without rounding between.

    Args:
        image: (height, width, 3) uint8.
        box: (top, left, height, width), relative to the image, which it may leave; there the result is 0.
        size: (height, width) of the output.

    Returns:
        (height, width, 3) float32 in [0, 255].
    """
    rows = resample_weights(box[0], box[2], size[0], image.shape[0])
    columns = resample_weights(box[1], box[3], size[1], image.shape[1])
    # W_y @ image @ W_x.T for each channel.
    half = np.tensordot(rows, image.astype(np.float32), axes=(1, 0))
    return np.tensordot(half, columns, axes=(1, 1)).transpose(0, 2, 1)


def edit_weight(mask: int, seam_width: float, span: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float32]:
    """M: the weight of the edit at every output pixel.

    Args:
        mask: Index in `MASKS`.
        seam_width: w, a fraction of what the mask spans.
        span: (top, left, height, width): the output within what the mask spans.
        size: (height, width) of the output.

    Returns:
        (height, 1) or (1, width) float32 in [0, 1].
    """
    name = MASKS[mask]
    axis = 1 if name in ("left", "right") else 0
    m = seam_ramp(centre(span[axis], span[axis + 2], np.arange(size[axis]), size[axis]), seam_width)
    m = m if name in ("right", "bottom") else 1 - m
    return np.asarray(m, dtype=np.float32).reshape((1, -1) if axis == 1 else (-1, 1))


def mixed_image(
    plan: BatchPlan,
    row: int,
    original: NDArray[np.uint8],
    edit: NDArray[np.uint8] | None = None,
    fractal: NDArray[np.uint8] | None = None,
) -> NDArray[np.float32]:
    """A = (1-λ) (M ⊙ Î + (1-M) ⊙ I) + λ F on the output grid: one sample from whole images.

    Args:
        plan: The batch's plan.
        row: Which sample of it.
        original: (height, width, 3) uint8.
        edit: (height, width, 3) uint8, its own size; None where the sample is not mixed.
        fractal: (height, width, 3) uint8, its own size; None where there is none.

    Returns:
        (height, width, 3) float32 in [0, 255].
    """
    size = plan.output_size
    image = resample(original, plan.box[row], size)
    if edit is not None:
        m = edit_weight(int(plan.mask[row]), plan.seam_width, plan.span[row], size)[..., None]
        image = m * resample(edit, plan.box[row], size) + (1 - m) * image
    if fractal is not None:
        upside_down, left_right = plan.fractal_flip[row]
        fractal = fractal[:: -1 if upside_down else 1, :: -1 if left_right else 1]
        weight = plan.fractal_weight[row]
        blended = (1 - weight) * image + weight * resample(fractal, plan.span[row], size)
        image = np.where(_inside(plan.box[row], size)[..., None], blended, np.float32(0))
    return image[:, ::-1] if plan.flip[row] else image


def _inside(box: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.bool_]:
    """(height, width): True where the centre lies in the image. Outside is 0, fractal or not."""
    rows, columns = (inside(centre(box[axis], box[axis + 2], np.arange(size[axis]), size[axis])) for axis in (0, 1))
    return rows[:, None] & columns


def encode(image: NDArray[np.float32], format: TensorFormat) -> NDArray[np.generic]:
    """Normalise and cast: (height, width, 3) float32 in [0, 255] to one sample of the tensor's type and layout.

    uint8 rounds half up; float16 and bfloat16 round half to even. bfloat16 comes as its bits, uint16.
    """
    scale, offset = format.scale_and_offset()
    value = image * scale + offset
    if not format.channels_last:
        value = value.transpose(2, 0, 1)
    if format.dtype == "uint8":
        return np.asarray(np.clip(np.floor(value + np.float32(0.5)), 0, 255), dtype=np.uint8)
    if format.dtype == "bfloat16":
        bits = np.ascontiguousarray(value).view(np.uint32)
        return np.asarray((bits + 0x7FFF + (bits >> 16 & 1)) >> 16, dtype=np.uint16)
    return np.asarray(value, dtype=format.storage)
