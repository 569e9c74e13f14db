"""Photographs for the tests: real ones if they are beside the repository, else synthetic ones."""

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# DALI_DIFFUSEMIX_SHARED names another folder, on a host to which this one did not travel.
SHARED = Path(os.environ.get("DALI_DIFFUSEMIX_SHARED") or Path(__file__).parents[2] / "shared" / "data")

MakeStore = Callable[..., Path]
"""(root, *, prompts, size) to the folder of a new store of its edits."""


def shared(name: str) -> Path:
    import pytest  # which distribution/installed.py does without

    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    return folder


def photograph(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    """(height, width, 3) uint8: smooth shapes and some grain, so that JPEG treats it as a photograph."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    grain = generator.normal(0, 6, (height, width, 3))
    return np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)


def encoded(image: NDArray[np.uint8] | Image.Image, format: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(file, format, **options)
    return file.getvalue()


def write_photograph(file: Path, seed: int, height: int, width: int, **options: object) -> None:
    """Write a JPEG or, if the suffix is .png, a PNG; `options` are those of Pillow's `save`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    form = "PNG" if file.suffix == ".png" else "JPEG"
    file.write_bytes(encoded(photograph(seed, height, width), form, **options))


def write_photographs(
    root: Path, classes: Sequence[str], count: int, height: int = 96, width: int = 128, *, seed: int = 0
) -> Path:
    """Write CLASS/0.jpg, CLASS/1.jpg and so on below `root`, and return it."""
    for label, name in enumerate(classes):
        for number in range(count):
            write_photograph(root / name / f"{number}.jpg", seed + 1000 * label + number, height, width)
    return root
