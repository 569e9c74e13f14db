"""Training scripts and frameworks that are not in the project's own environment; `make clients` runs these tests.

Each client runs in the environment .clients, with a torch of PyPI and torchvision, or is skipped with a reason. The
scripts of timm and torchvision are taken from where they are and changed at run time, as their users would:

    DALI_DIFFUSEMIX_TIMM    a clone of huggingface/pytorch-image-models, of which HEAD and the newest tag are used
    DALI_DIFFUSEMIX_VISION  the sources of torchvision, with references/classification

With DALI_DIFFUSEMIX_CLIENTS_RECORD=FILE the results, the versions and what `measured` was given are written there.
"""

import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "integrations"))

from recording import Recording  # noqa: E402
from scripts import CLIENTS, Measured, version  # noqa: E402

from dali_diffusemix.fractals import FractalBank  # noqa: E402

recording = Recording("clients", "DALI_DIFFUSEMIX_CLIENTS_RECORD", {name: version(name) for name in CLIENTS})


@pytest.fixture(scope="session")
def data(photos: Path, edits: Path, bank: FractalBank, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/, edits/ and fractals.npy; train/ and val/ are photos/ too."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("photos", "train", "val"):
        (folder / name).symlink_to(photos)
    (folder / "edits").symlink_to(edits)
    assert bank.path is not None
    (folder / "fractals.npy").symlink_to(bank.path)
    return folder


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Measured:
    def note(**facts: Any) -> None:
        recording.note(request.node.nodeid, facts)

    return note


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(recording)
