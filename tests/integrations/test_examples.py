"""The examples run, from the command line."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, data: Path, *options: str) -> str:
    command = [sys.executable, EXAMPLES / name, data / "photos", data / "photos", data / "edits", data / "fractals.npy"]
    done = subprocess.run(
        [*command, "--batch-size", "8", "--size", "64", *options], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(find_spec("lightning") is None, reason="Lightning is not installed")
def test_lightning_module(data: Path, tmp_path: Path) -> None:
    found = run("lightning_module.py", data, "--out", str(tmp_path), "--epochs", "2")
    assert re.search(r"^accuracy [01]\.\d+$", found, flags=re.MULTILINE)
    assert (tmp_path / "last.ckpt").is_file()


@pytest.mark.skipif(find_spec("accelerate") is None, reason="Accelerate is not installed")
def test_accelerate_loop(data: Path, tmp_path: Path) -> None:
    options = ("--cpu", "--out", str(tmp_path / "out"), "--save-every", "2")
    lines = run("accelerate_loop.py", data, *options, "--epochs", "1").splitlines()
    # A second call goes on with the next epoch.
    lines += run("accelerate_loop.py", data, *options, "--epochs", "2").splitlines()
    assert [re.sub(r"\d+ of", "n of", line) for line in lines] == [f"epoch {epoch}: n of 33 right" for epoch in (0, 1)]
