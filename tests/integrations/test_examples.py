"""The examples run, from the command line."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import warm

pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, data: Path, *options: str) -> str:
    given = (data / "photos", data / "photos", data / "edits", data / "fractals.npy", "--batch-size", 8, "--size", 64)
    return warm.run(EXAMPLES / name, *given, *options, timeout=120).stdout


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lightning") is None, reason="Lightning is not installed")
def test_lightning_module(data: Path, tmp_path: Path) -> None:
    found = run("lightning_module.py", data, "--out", str(tmp_path), "--epochs", "2")
    assert re.search(r"^accuracy [01]\.\d+$", found, flags=re.MULTILINE)
    assert (tmp_path / "last.ckpt").is_file()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("accelerate") is None, reason="Accelerate is not installed")
def test_accelerate_loop(data: Path, tmp_path: Path) -> None:
    options = ("--cpu", "--out", str(tmp_path / "out"), "--save-every", "2")
    lines = run("accelerate_loop.py", data, *options, "--epochs", "1").splitlines()
    # A second call goes on with the next epoch.
    lines += run("accelerate_loop.py", data, *options, "--epochs", "2").splitlines()
    assert [re.sub(r"\d+ of", "n of", line) for line in lines] == [f"epoch {epoch}: n of 33 right" for epoch in (0, 1)]
