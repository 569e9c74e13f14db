"""Small real data for the tests: photographs in a class tree, a store of their edits, a bank of fractals."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dali_diffusemix.fractals import FractalBank, render_bank
from dali_diffusemix.generate import GenerateConfig, generate

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Catalogs made by the tests stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DALI_DIFFUSEMIX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"../shared/data/{name} is not here")
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


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 3 classes with 11 photographs each, of odd and even sizes."""
    root = tmp_path_factory.mktemp("photos")
    for label, name in enumerate(("ants", "bees", "cats")):
        (root / name).mkdir()
        for i in range(11):
            image = photograph(label * 100 + i, 60 + 7 * i, 95 - 6 * i + label)
            (root / name / f"{i:02}.jpg").write_bytes(encoded(image, quality=90))
    return root


MakeStore = Callable[..., Path]


@pytest.fixture(scope="session")
def make_store(tmp_path_factory: pytest.TempPathFactory) -> MakeStore:
    def make(root: Path, *, prompts: tuple[str, ...] = ("autumn", "snowy"), size: int = 48) -> Path:
        store = tmp_path_factory.mktemp("store") / "edits"
        generate(root, store, GenerateConfig(prompts=prompts, size=size))
        return store

    return make


@pytest.fixture(scope="session")
def edits(photos: Path, make_store: MakeStore) -> Path:
    """A store with two edits of each photograph."""
    return make_store(photos)


@pytest.fixture(scope="session")
def bank(tmp_path_factory: pytest.TempPathFactory) -> FractalBank:
    return render_bank(tmp_path_factory.mktemp("bank") / "fractals.npy", count=4, size=64)
