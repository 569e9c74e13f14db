"""Operations and samples for the tests of augmentation."""

import math
from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from dali_diffusemix.mix.augment import augmented_image
from dali_diffusemix.mix.pixel import encode
from dali_diffusemix.mix.tensor import TensorFormat
from dali_diffusemix.plan.augment import CODES, OPERATION

Numbers = Sequence[float]
One = tuple[str, int, tuple[int, int, int], Numbers]  # name, filter, fill, values


def operations(*rows: One) -> NDArray[np.void]:
    """(1, slots) of OPERATION."""
    out = np.zeros((1, len(rows)), dtype=OPERATION)
    for one, (name, filter, fill, values) in zip(out[0], rows, strict=True):
        one["code"], one["filter"], one["fill"] = CODES[name], filter, fill
        one["values"][: len(values)] = values
    return out


def expected(image: NDArray[np.uint8], some: NDArray[np.void], format: TensorFormat) -> NDArray[np.generic]:
    """One sample by the specification."""
    return encode(augmented_image(image, some, format).astype(np.float32), format)


@st.composite
def images(draw: st.DrawFn) -> NDArray[np.uint8]:
    """Noise, gradients and flat images of few values, of any small size."""
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = height, width, 3
    low = draw(st.integers(0, 255))
    high = draw(st.integers(low, 255))
    kind = draw(st.sampled_from(["noise", "few", "gradient"]))
    if kind == "noise":
        return generator.integers(low, high + 1, shape, dtype=np.uint8)
    if kind == "few":
        return generator.choice(generator.integers(low, high + 1, 3), shape).astype(np.uint8)
    ramp = np.add.outer(np.linspace(low, high, height), np.linspace(0, high - low, width)) / 2
    return np.clip(ramp[..., None] * generator.uniform(0, 1.5, 3), 0, 255).astype(np.uint8)


@st.composite
def near_halves(draw: st.DrawFn, limit: int) -> float:
    """A translation by whole and a half pixels, or by a few units in the last place more or less.

    Pillow adds 1 for each pixel, and such sums are rounded to whole numbers somewhere on the way.
    """
    amount = draw(st.integers(-limit, limit - 1)) + 0.5
    return amount + draw(st.integers(-40, 40)) * math.ulp(amount)


@st.composite
def an_operation(draw: st.DrawFn, height: int, width: int) -> One:
    """One operation with any values that it can have."""
    name = draw(st.sampled_from([name for name in CODES if name != "identity"]))
    filter, fill, values = 0, (0, 0, 0), ()
    side = max(height, width)
    if name in ("shear_x", "shear_y", "translate_x", "translate_y", "rotate"):
        limit = {"s": 1.5, "t": 2.0 * side, "r": 400.0}[name[0]]
        special = [0.0, 1.0, -1.0, 0.5, -0.5, 90.0, 180.0, -45.0, 135.0]
        amount = draw(st.floats(-limit, limit) | st.sampled_from([one for one in special if abs(one) <= limit]))
        if name[0] == "t" and draw(st.booleans()):
            amount = draw(near_halves(2 * side))
        filter, fill, values = draw(st.integers(0, 2)), draw(st.tuples(*[st.integers(0, 255)] * 3)), (amount,)
    elif name in ("brightness", "contrast", "color", "sharpness"):
        values = (draw(st.floats(0, 4) | st.sampled_from([0.0, 1.0, 2.0, 0.5])),)
    elif name == "hue":
        values = (draw(st.floats(-0.5, 0.5)),)
    elif name == "posterize":
        values = (draw(st.integers(0, 8)),)
    elif name in ("solarize", "solarize_add"):
        values = (draw(st.floats(0, 256)) if name == "solarize" else draw(st.integers(0, 128)),)
    elif name == "blur":
        values = (draw(st.floats(0.05, 8)), draw(st.integers(0, 15)) * 2 + 1)
    elif name in ("erase", "erase_noise"):
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        box = top, left, draw(st.integers(1, height - top)), draw(st.integers(1, width - left))
        words = st.integers(0, 2**32 - 1)
        rest = draw(st.tuples(*[st.floats(-4, 4)] * 3)) if name == "erase" else (draw(words), draw(words))
        values = (*box, *rest)
    return name, filter, fill, values


@st.composite
def samples(draw: st.DrawFn) -> tuple[NDArray[np.uint8], NDArray[np.void]]:
    """An image and one to four operations."""
    image = draw(images())
    height, width = image.shape[:2]
    return image, operations(*draw(st.lists(an_operation(height, width), min_size=1, max_size=4)))
