"""Two processes under Lightning, killed within an epoch, take up where they were."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dali_diffusemix.fractals import FractalBank

pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")
pytest.importorskip("lightning", reason="Lightning is not installed: pip install 'dali-diffusemix[lightning]'")

HERE = Path(__file__).parents[1] / "integrations"
sys.path.insert(0, str(HERE))

from fit import expected, record  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def run(*arguments: object) -> int:
    command = [sys.executable, HERE / "fit.py", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, timeout=300).returncode


@pytest.mark.parametrize("step", [1, 3, 5, 7, 9])
def test_two_processes_killed_at_a_step_go_on_there(
    photos: Path, edits: Path, bank: FractalBank, tmp_path: Path, step: int
) -> None:
    data, killed, resumed = tmp_path / "data", tmp_path / "killed", tmp_path / "resumed"
    data.mkdir()
    assert bank.path is not None
    for name, target in (("photos", photos), ("edits", edits), ("fractals.npy", bank.path)):
        (data / name).symlink_to(target)
    assert run(data, killed, "--devices", 2, "--kill-at", step) == -signal.SIGKILL
    assert run(data, resumed, "--devices", 2, "--resume", killed / f"step={step}.ckpt") == 0
    for rank in range(2):
        whole = expected(data, rank, 2)
        assert record(killed, rank=rank) == whole[:step]
        assert record(resumed, rank=rank) == whole[step:]
