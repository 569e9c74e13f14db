"""Small real data for the tests: photographs in a class tree, a store of their edits, a bank of fractals.

`make test` shares the tests out among as many processes as there are cores (pytest-xdist). Each process has its own
copy of the data, so that a test may damage a file for a moment; only what takes seconds to make is common to all, by
`once`.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# One thread for each of several processes: more only wait for each other. Before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch
from material import MakeStore, shared, write_photograph

from dali_diffusemix import DiffuseMixDataset, MixSpec, TrainCrop
from dali_diffusemix.fractals import FractalBank, render_bank
from dali_diffusemix.generate import GenerateConfig, generate

Make = Callable[[Path], object]


@pytest.hookimpl(optionalhook=True)  # which pytest without pytest-xdist has not
def pytest_xdist_auto_num_workers() -> int:
    return len(os.sched_getaffinity(0))


# No test is about how long one example takes, and tests run side by side.
hypothesis.settings.register_profile("ours", deadline=None)
hypothesis.settings.load_profile("ours")


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Make], Path]:
    """(name, make) to a folder that `make` filled, in whichever process of the run asked first."""
    common = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        common = common.parent

    def made(name: str, make: Make) -> Path:
        folder, done = common / f"once {name}", common / f"once {name}.done"
        with (common / f"once {name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Catalogs made by the tests stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DALI_DIFFUSEMIX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Datasets without a seed have that of torch, which otherwise differs in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 3 classes with 11 photographs each, of odd and even sizes."""
    root = tmp_path_factory.mktemp("photos")
    for label, name in enumerate(("ants", "bees", "cats")):
        for i in range(11):
            write_photograph(root / name / f"{i:02}.jpg", label * 100 + i, 60 + 7 * i, 95 - 6 * i + label, quality=90)
    return root


@pytest.fixture(scope="session")
def make_store(tmp_path_factory: pytest.TempPathFactory) -> MakeStore:
    def make(root: Path, *, prompts: tuple[str, ...] = ("autumn", "snowy"), size: int = 48) -> Path:
        store = tmp_path_factory.mktemp("store") / "edits"
        generate(root, store, GenerateConfig(prompts=prompts, size=size, format="jpeg"))
        return store

    return make


@pytest.fixture(scope="session")
def edits(photos: Path, make_store: MakeStore) -> Path:
    """A store with two edits of each photograph."""
    return make_store(photos)


@pytest.fixture(scope="session")
def imagenet_edits(once: Callable[[str, Make], Path]) -> tuple[Path, Path]:
    """256 photographs of ImageNet, which must not be changed, and a store with an edit of each."""
    root = shared("imagenet_sample")
    config = GenerateConfig(prompts=("sunset",), size=128)
    return root, once("imagenet", lambda folder: generate(root, folder / "edits", config)) / "edits"


@pytest.fixture(scope="session")
def bank(tmp_path_factory: pytest.TempPathFactory) -> FractalBank:
    return render_bank(tmp_path_factory.mktemp("bank") / "fractals.npy", count=4, size=64)


@pytest.fixture
def dataset(photos: Path, edits: Path, bank: FractalBank) -> DiffuseMixDataset:
    """33 samples of 24 x 24, mixed as in the paper."""
    return DiffuseMixDataset(photos, crop=TrainCrop(24), mix=MixSpec.paper(), edits=edits, fractals=bank, seed=3)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small InstructPix2Pix pipeline."""
    pytest.importorskip("diffusers")
    from tiny_model import build_instruct_pix2pix

    return build_instruct_pix2pix(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real Chromium, headless."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("there is no Chromium with its driver here")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for flag in [*flags.split(), "disable-component-update", "disable-sync", "window-size=1280,900"]:
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options, webdriver.ChromeService(driver))
    found.set_script_timeout(120)
    yield found
    found.quit()
