"""The specification of augmentation after the mix: Pillow's operations on the mixed sample, rounded to 8 bits.

`augmented_image` is the law, as torchvision.transforms.v2 computes it on a Pillow image; the kernels give its bits.
What Pillow lacks is defined here in NumPy: the blur, as torchvision has it for tensors; noise, by address.
"""

import functools
import math
from statistics import NormalDist
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from dali_diffusemix.base.philox import NOISE, philox4x32
from dali_diffusemix.mix.tensor import TensorFormat
from dali_diffusemix.plan.augment import CODES, FILTERS, OPERATIONS

NOISE_STEPS: Final = 4096
"""Values of normal noise, equally probable: their largest is 3.67 deviations from the mean."""

_RESAMPLING: Final = dict(
    zip(FILTERS, (Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC), strict=True)
)
_ENHANCERS: Final = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "color": ImageEnhance.Color,
    "sharpness": ImageEnhance.Sharpness,
}


def augmented_image(image: NDArray[np.uint8], operations: NDArray[np.void], format: TensorFormat) -> NDArray[np.uint8]:
    """Apply operations in their order.

    Args:
        image: (height, width, 3) uint8.
        operations: (slots,) of `plan.augment.OPERATION`.
        format: Its normalisation; values of an erasure are those after it.

    Returns:
        (height, width, 3) uint8.
    """
    for operation in operations:
        image = _applied(image, operation, format)
    return image


def _applied(image: NDArray[np.uint8], operation: np.void, format: TensorFormat) -> NDArray[np.uint8]:
    name, values = OPERATIONS[operation["code"]], operation["values"].tolist()
    if name == "identity":
        return image
    if name == "blur":
        return blurred(image, values[0], int(values[1]))
    if name in ("erase", "erase_noise"):
        return _erased(image, operation, format)
    picture = Image.fromarray(image)
    amount = values[0]
    resampling, fill = _RESAMPLING[FILTERS[operation["filter"]]], tuple(operation["fill"].tolist())
    if name == "rotate":
        picture = picture.rotate(amount, resampling, fillcolor=fill)
    elif name in ("shear_x", "shear_y", "translate_x", "translate_y"):
        matrix = _matrix(name, amount)
        picture = picture.transform(picture.size, Image.Transform.AFFINE, matrix, resampling, fillcolor=fill)
    elif name in _ENHANCERS:
        picture = _ENHANCERS[name](picture).enhance(amount)
    elif name == "hue":
        hue, saturation, value = picture.convert("HSV").split()
        turned = Image.fromarray(np.asarray(hue) + np.uint8(_shift(amount)))
        picture = Image.merge("HSV", (turned, saturation, value)).convert("RGB")
    elif name == "grayscale":
        picture = picture.convert("L").convert("RGB")
    elif name == "posterize":
        # Of 0 bits nothing is left; newer versions of ImageOps.posterize refuse it.
        picture = picture.point([i & ~((1 << (8 - int(amount))) - 1) for i in range(256)] * 3)
    elif name == "solarize":
        picture = ImageOps.solarize(picture, amount)
    elif name == "solarize_add":
        table = [min(255, i + int(amount)) if i < 128 else i for i in range(256)]
        picture = picture.point(table * 3)
    elif name == "autocontrast":
        picture = ImageOps.autocontrast(picture)
    elif name == "equalize":
        picture = ImageOps.equalize(picture)
    else:
        assert name == "invert"
        picture = ImageOps.invert(picture)
    return np.asarray(picture)


def _matrix(name: str, amount: float) -> tuple[float, ...]:
    """From output to input pixels, (a, b, c, d, e, f): x = a x' + b y' + c, y = d x' + e y' + f."""
    return {
        "shear_x": (1, amount, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, amount, 1, 0),
        "translate_x": (1, 0, -amount, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, -amount),
    }[name]


def _shift(turns: float) -> int:
    """A hue's shift of 256 steps, as torchvision rounds it: of 255 to a turn, toward 0."""
    return int(turns * 255) % 256


def blurred(image: NDArray[np.uint8], sigma: float, side: int) -> NDArray[np.uint8]:
    """A Gaussian blur over mirrored borders, in float32, rounded half to even.

    Args:
        image: (height, width, 3) uint8.
        sigma: Standard deviation, pixels.
        side: Side of the kernel, odd, pixels. The weights of that many sum to 1.
    """
    radius = side // 2
    exact = [math.exp(-0.5 * (k / sigma * (k / sigma))) for k in range(radius + 1)]
    total = sum((2 if k else 1) * exact[k] for k in range(radius, -1, -1))
    weights = [np.float32(one / total) for one in exact]

    def pass_along(values: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
        size = values.shape[axis]
        at = np.arange(size)
        result = weights[0] * values
        for k in range(1, radius + 1):
            pair = values.take(_mirrored(at - k, size), axis) + values.take(_mirrored(at + k, size), axis)
            result = result + weights[k] * pair
        return result

    return np.asarray(np.rint(pass_along(pass_along(image.astype(np.float32), 1), 0)), dtype=np.uint8)


def _mirrored(at: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Positions with both ends mirrored; the end itself comes once."""
    if size == 1:
        return np.zeros_like(at)
    at = at % (2 * (size - 1))
    return np.where(at < size, at, 2 * (size - 1) - at)


def _erased(image: NDArray[np.uint8], operation: np.void, format: TensorFormat) -> NDArray[np.uint8]:
    top, left, height, width = operation["values"][:4].astype(int).tolist()
    image = image.copy()
    part = image[top : top + height, left : left + width]
    if OPERATIONS[operation["code"]] == "erase":
        part[:] = _colour(operation["values"][4:7], format)
        return image
    pixels = (np.arange(top, top + height)[:, None] * image.shape[1] + np.arange(left, left + width)).ravel()
    counters = np.zeros((len(pixels), 4), dtype=np.uint64)
    counters[:, 0], counters[:, 2] = pixels, NOISE
    steps = philox4x32(counters, operation["values"][4:6].astype(np.uint64))[:, :3] >> np.uint32(20)
    part[:] = noise_table(format)[np.arange(3), steps].reshape(part.shape)
    return image


def _pixel_units(format: TensorFormat) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(3,) each: the pixel, 0 to 255, at a tensor's value of 0, and pixels for each 1."""
    mean, std = format.normalize or ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return 255 * np.array(mean), 255 * np.array(std)


def _to_bytes(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    return np.asarray(np.clip(np.floor(values + 0.5), 0, 255), dtype=np.uint8)


def _colour(values: NDArray[np.float64], format: TensorFormat) -> NDArray[np.uint8]:
    """(..., 3) pixels of (..., 3) values of the tensor."""
    zero, one = _pixel_units(format)
    return _to_bytes(zero + one * values)


@functools.lru_cache(8)
def noise_table(format: TensorFormat) -> NDArray[np.uint8]:
    """(3, NOISE_STEPS) uint8: the pixels of normal noise of mean 0 and deviation 1 in the tensor, by channel."""
    normal = NormalDist()
    values = np.array([normal.inv_cdf((i + 0.5) / NOISE_STEPS) for i in range(NOISE_STEPS)])
    return np.ascontiguousarray(_colour(values[:, None], format).T)


def lowered(operations: NDArray[np.void], size: tuple[int, int], format: TensorFormat) -> NDArray[np.void]:
    """The operations as the kernels take them, which find nearest pixels in 16.16 fixed point.

    Args:
        operations: (n, slots) of `plan.augment.OPERATION`.
        size: (height, width) of the samples, pixels.
        format: Its normalisation; values of an erasure are those after it.

    Returns:
        (n, slots), contiguous: of warps, `values` are the matrix from output to input pixels; of a hue, fill[0] is the
        shift; of an erasure, `fill` is the colour.
    """
    if not operations.size:
        return operations
    result = np.array(operations, order="C")
    code, values = result["code"], result["values"]
    for name in ("shear_x", "shear_y", "translate_x", "translate_y"):
        rows = code == CODES[name]
        if rows.any():
            amounts = values[rows, 0]
            matrices = np.zeros((len(amounts), 8))
            matrices[:, :6] = _matrix(name, 0)
            moved, sign = {"shear_x": (1, 1), "shear_y": (3, 1), "translate_x": (2, -1), "translate_y": (5, -1)}[name]
            matrices[:, moved] = sign * amounts
            if name.startswith("translate"):
                nearest = result["filter"][rows] == FILTERS.index("nearest")
                step, side = (0, size[1]) if name == "translate_x" else (4, size[0])
                matrices[nearest, step], matrices[nearest, moved] = _whole_steps(matrices[nearest, moved], side)
            values[rows] = matrices
    rows = code == CODES["rotate"]
    if rows.any():
        values[rows] = _rotations(values[rows, 0], size)
    rows = code == CODES["hue"]
    if rows.any():
        result["fill"][rows, 0] = [_shift(turns) for turns in values[rows, 0].tolist()]
    rows = code == CODES["erase"]
    if rows.any():
        result["fill"][rows] = _colour(values[rows, 4:7], format)
    return result


def _whole_steps(offsets: NDArray[np.float64], side: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The (n,) steps and offsets with which 16.16 fixed point reads the pixels that Pillow reads for a translation.

    Pillow adds 1 from pixel to pixel, in float64. Such a sum can be rounded up to a whole number, once: all pixels from
    there on are read one further. A step of 1 + 2**-16 does that, since sides are below 2**16 pixels.
    """
    first = offsets + 0.5
    pixel = np.floor(first)
    further = np.zeros(len(offsets), dtype=np.int64)  # pixels that are
    near = first - pixel > 1 - 2.0**-20  # of the others no sum comes close to a whole number
    places = np.concatenate([first[near, None], np.ones((int(near.sum()), side - 1))], axis=1).cumsum(axis=1)
    further[near] = (np.floor(places) - np.arange(side) > pixel[near, None]).sum(axis=1)
    more = np.where(further > 0, 2.0**-16, 0)
    return 1 + more, pixel + (further > 0) - (side - further) * more - (1 + more) / 2


def _rotations(degrees: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float64]:
    """(n, 8) matrices of rotations about the middle. Python's `round`, as in Pillow, is not NumPy's."""
    x, y = size[1] / 2, size[0] / 2
    matrices = np.zeros((len(degrees), 8))
    for matrix, turn in zip(matrices, degrees.tolist(), strict=True):
        angle = -math.radians(turn % 360.0)
        cosine, sine = round(math.cos(angle), 15), round(math.sin(angle), 15)
        matrix[:6] = cosine, sine, cosine * -x + sine * -y + x, -sine, cosine, -sine * -x + cosine * -y + y
    return matrices
