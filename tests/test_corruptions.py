"""examples/corruptions.py: what its docstring promises of each corruption."""

import importlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from material import photograph
from PIL import Image
from scipy import ndimage

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("noise", "blur", "contrast", "jpeg")


@pytest.fixture(scope="module")
def corruptions() -> Iterator[ModuleType]:
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("corruptions")
    sys.path.remove(str(EXAMPLES))
    del sys.modules["corruptions"]


@pytest.mark.parametrize("name", NAMES)
def test_images_keep_their_form_and_strengths_grow(name: str, corruptions: ModuleType) -> None:
    assert tuple(corruptions.LEVELS) == NAMES
    image = photograph(1, 64, 80)
    before = image.copy()
    errors = []
    for strength in range(1, 6):
        changed = corruptions.corrupt(image, name, strength)
        assert changed.shape == image.shape and changed.dtype == np.uint8
        assert (changed == corruptions.corrupt(image.copy(), name, strength)).all()  # the same in every run
        errors.append(np.mean((changed.astype(float) - image) ** 2))
    assert errors == sorted(errors) and errors[0] > 0
    assert (image == before).all()


def test_the_noise_is_normal_and_the_images_own(corruptions: ModuleType) -> None:
    grey = np.full((200, 200, 3), 128, np.uint8)
    for strength, deviation in enumerate(corruptions.LEVELS["noise"], 1):
        noise = corruptions.corrupt(grey, "noise", strength).astype(float) / 255 - 128 / 255
        assert noise.std() == pytest.approx(deviation, rel=0.02) and abs(noise.mean()) < 0.003
    other = grey.copy()
    other[0, 0, 0] += 1
    first, second = (corruptions.corrupt(one, "noise", 1).astype(float) for one in (grey, other))
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.02
    # A channel has noise of its own.
    assert abs(np.corrcoef(first[..., 0].ravel(), first[..., 1].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize(("height", "width"), [(64, 64), (128, 160), (32, 32)])
def test_the_blur_is_a_gaussian_that_grows_with_the_image(height: int, width: int, corruptions: ModuleType) -> None:
    image = photograph(2, height, width)
    for strength, sigma in enumerate(corruptions.LEVELS["blur"], 1):
        wide = sigma * min(height, width) / 64
        expected = ndimage.gaussian_filter(image / 255, (wide, wide, 0), mode="nearest", truncate=4)
        found = corruptions.corrupt(image, "blur", strength)
        assert np.abs(found - expected * 255).max() <= 0.5 + 1e-6


def test_the_contrast_keeps_each_channels_mean(corruptions: ModuleType) -> None:
    image = photograph(3, 64, 64)
    for strength, share in enumerate(corruptions.LEVELS["contrast"], 1):
        found = corruptions.corrupt(image, "contrast", strength).astype(float)
        mean = image.mean((0, 1))
        assert np.abs(found - (mean + share * (image - mean))).max() <= 0.5 + 1e-6


def test_the_jpeg_is_pillows(corruptions: ModuleType) -> None:
    image = photograph(4, 64, 64)
    for strength, quality in enumerate(corruptions.LEVELS["jpeg"], 1):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        assert (corruptions.corrupt(image, "jpeg", strength) == np.asarray(Image.open(file))).all()
