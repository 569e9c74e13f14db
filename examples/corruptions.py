"""Corrupted images: noise, blur, contrast and JPEG, in five strengths.

These are the simple ones of ImageNet-C (Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations", ICLR 2019), made here, with the strengths that its authors chose for Tiny-ImageNet-C,
whose images have 64 pixels. x is an image with values from 0 to 1, c the strength's number in `LEVELS`:

    noise     x + c n, n standard normal for each value
    blur      x convolved with a Gaussian of standard deviation c s / 64 pixels, s the shorter side; edges are repeated
    contrast  m + c (x - m), m each channel's mean
    jpeg      x compressed as a JPEG of quality c

Results are clipped to 0 to 1 and rounded to 8 bits. Images of other sizes have the same strengths; only the blur grows
with them. The noise is drawn from the image's own pixels: an image has the same noise in every run, on every machine.
These are not ImageNet-C's files: scores on them compare methods here, and nothing else.
"""

import hashlib
import io
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LEVELS: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "noise": (0.04, 0.08, 0.12, 0.15, 0.18),
        "blur": (0.5, 0.75, 1.0, 1.25, 1.5),
        "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
        "jpeg": (65, 58, 50, 40, 25),
    }
)
"""Corruption to the number of each strength, 1 to 5."""


def corrupt(image: NDArray[np.uint8], name: str, strength: int) -> NDArray[np.uint8]:
    """Return a corrupted copy of an image.

    Args:
        image: (height, width, 3) RGB.
        name: One of `LEVELS`.
        strength: 1 to 5.
    """
    number = LEVELS[name][strength - 1]
    if name == "jpeg":
        return _jpeg(image, int(number))
    changed = _OF_VALUES[name](image.astype(np.float64) / 255, number, image)
    return np.rint(np.clip(changed, 0, 1) * 255).astype(np.uint8)


def _noise(values: NDArray[np.float64], deviation: float, image: NDArray[np.uint8]) -> NDArray[np.float64]:
    seed = hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=16).digest()
    return values + deviation * np.random.default_rng(int.from_bytes(seed)).standard_normal(values.shape)


def _blur(values: NDArray[np.float64], deviation: float, image: NDArray[np.uint8]) -> NDArray[np.float64]:
    deviation *= min(image.shape[:2]) / 64
    reach = int(4 * deviation + 0.5)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        widths = [(reach, reach) if one == axis else (0, 0) for one in range(3)]
        wide = np.lib.stride_tricks.sliding_window_view(np.pad(values, widths, mode="edge"), len(weights), axis=axis)
        values = wide @ weights
    return values


def _contrast(values: NDArray[np.float64], share: float, image: NDArray[np.uint8]) -> NDArray[np.float64]:
    mean = values.mean((0, 1), keepdims=True)
    return mean + share * (values - mean)


def _jpeg(image: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    with Image.open(file) as compressed:
        return np.asarray(compressed.convert("RGB"))


_OF_VALUES: Mapping[str, Callable[[NDArray[np.float64], float, NDArray[np.uint8]], NDArray[np.float64]]] = {
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
}
