"""The tests' small data in one folder, for scripts that run in processes of their own."""

from pathlib import Path

import pytest

from dali_diffusemix.fractals import FractalBank


@pytest.fixture(scope="session")
def data(photos: Path, edits: Path, bank: FractalBank, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/, edits/ and fractals.npy."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "photos").symlink_to(photos)
    (folder / "edits").symlink_to(edits)
    assert bank.path is not None
    (folder / "fractals.npy").symlink_to(bank.path)
    return folder
