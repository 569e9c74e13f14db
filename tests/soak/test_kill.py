"""Training scripts killed with signal 9 wherever they are, started again, and compared with one that never was.

DALI_DIFFUSEMIX_SOAK_KILLS (20) is how often one process is killed, DALI_DIFFUSEMIX_SOAK_SEED where the kills fall.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from material import MakeStore, shared, write_photograph
from test_training import EXAMPLES, environment, rows, sets, torchrun
from training import Training, check_all_lines, delivered, kill_somewhere, runs

from dali_diffusemix import FractalBank

KILLS = int(os.environ.get("DALI_DIFFUSEMIX_SOAK_KILLS", "20"))
SEED = int(os.environ.get("DALI_DIFFUSEMIX_SOAK_SEED", "0"))
STEP_SECONDS = 0.05  # longer than it takes to notice a step


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory, make_store: MakeStore, bank: FractalBank) -> tuple[Path, ...]:
    """Root, edits and fractals: 227 photographs, a number that no batch size here divides."""
    root = tmp_path_factory.mktemp("kill") / "train"
    for i in range(227):
        file = root / f"class{i % 3}" / f"{i:03}.jpg"
        write_photograph(file, i, 50 + i % 37, 90 - i % 41, quality=90)
    return root, make_store(root), bank.path


def arguments(
    material: tuple[Path, ...], out: Path, batch_size: int, epochs: int, mix: str, order: str
) -> list[object]:
    shuffle = ["--shuffle"] if order == "shuffle" else []
    settings = ["--batch-size", batch_size, "--epochs", epochs, "--mix", mix, "--threads", 2, "--pause", STEP_SECONDS]
    return [*material, out, *settings, *shuffle]


def test_one_process(material: tuple[Path, ...], tmp_path: Path, measured: Callable[..., None]) -> None:
    """Every kill, half of them after some steps and half at any time at all, the start included."""
    # At most 10 steps from kill to kill, of 29 in an epoch: the training is not over before the last kill.
    epochs = 1 + KILLS * 10 // 29
    whole = arguments(material, tmp_path / "whole", 8, epochs, "fixed", "shuffle")
    Training([*whole, "--pause", 0]).finish()
    expected = delivered(tmp_path / "whole")
    assert sum(map(len, expected.values())) == 227 * epochs

    out, draw, kills = tmp_path / "killed", np.random.default_rng(SEED), []
    for number in range(KILLS):
        training = Training(arguments(material, out, 8, epochs, "fixed", "shuffle"))
        # 2 or 3 seconds go into the start.
        when = {"steps": (1, 9)} if number % 2 else {"steps": (9, 9), "seconds": 4.0}
        kills.append(kill_somewhere(training, out, draw, **when))
    Training([*arguments(material, out, 8, epochs, "fixed", "shuffle"), "--pause", 0]).finish()
    measured(seed=SEED, kills=kills, steps=len(expected))

    assert delivered(out) == expected
    check_all_lines(out, expected)
    # The training went the same way too, to the last bit.
    (uninterrupted,) = runs(tmp_path / "whole")
    for run in runs(out):
        for step in run.steps:
            assert run.losses(step) == uninterrupted.losses(step)


@pytest.mark.parametrize(
    ("mix", "order", "worlds"),
    [
        ("fixed", "shuffle", (4, 2, 1)),
        ("expanded", "shuffle", (4, 2, 4)),
        ("fixed", "in order", (4, 1, 2)),
    ],
)
def test_four_processes_go_on_as_fewer(
    material: tuple[Path, ...], tmp_path: Path, measured: Callable[..., None], mix: str, order: str, worlds: tuple[int]
) -> None:
    epochs = 1 if mix == "expanded" else 3
    Training([*arguments(material, tmp_path / "whole", 16, epochs, mix, order), "--pause", 0]).finish()
    expected = delivered(tmp_path / "whole")

    out, draw, kills = tmp_path / "killed", np.random.default_rng([SEED, len(mix), worlds[1]]), []
    for world_size in worlds[:-1]:
        training = Training(arguments(material, out, 16 // world_size, epochs, mix, order), world_size)
        kills.append({"world_size": world_size, **kill_somewhere(training, out, draw, steps=(4, 16))})
    last = worlds[-1]
    Training([*arguments(material, out, 16 // last, epochs, mix, order), "--pause", 0], last).finish()
    measured(seed=SEED, kills=kills, steps=len(expected))

    assert [run.world_size for run in runs(out)] == list(worlds)
    assert all(run.begin > (0, 0) for run in runs(out)[1:])
    assert delivered(out) == expected
    check_all_lines(out, expected)


def test_one_of_four_processes_dies(material: tuple[Path, ...], tmp_path: Path, measured: Callable[..., None]) -> None:
    """The launcher then ends the others, and two processes go on."""
    Training([*arguments(material, tmp_path / "whole", 16, 2, "fixed", "shuffle"), "--pause", 0]).finish()
    expected = delivered(tmp_path / "whole")

    out, draw = tmp_path / "killed", np.random.default_rng(SEED)
    training = Training(arguments(material, out, 4, 2, "fixed", "shuffle"), 4)
    kill = kill_somewhere(training, out, draw, steps=(4, 16), one=int(draw.integers(4)))
    Training([*arguments(material, out, 8, 2, "fixed", "shuffle"), "--pause", 0], 2).finish()
    measured(seed=SEED, kill=kill)

    assert [run.world_size for run in runs(out)] == [4, 2]
    assert delivered(out) == expected
    check_all_lines(out, expected)


def test_the_trainer_of_the_examples(tmp_path: Path, measured: Callable[..., None]) -> None:
    """examples/train.py in two processes, killed once."""
    data, out = shared("ants_bees"), tmp_path / "killed"
    common = [str(EXAMPLES / "recipes/flowers5.toml"), "--data", str(data), "--workers", "1"]
    common += ["--device", "cpu", "--cache", str(tmp_path / "cache"), "--checkpoint-every", "4", "--log-every", "1"]
    common += sets(
        *("data.test_share=0.0", "data.held_out=0.0", "data.test=val", "train.updates=24", "train.batch_size=16"),
        *("train.validate_every=12", "model.width=8", "edits.size=64", 'edits.prompts=["autumn"]', "fractals.count=4"),
    )
    subprocess.run([sys.executable, str(EXAMPLES / "train.py"), *common, "--prepare"], check=True, timeout=300)
    subprocess.run(torchrun(*common, "--out", str(tmp_path / "whole")), check=True, env=environment(), timeout=300)
    process = subprocess.Popen(torchrun(*common, "--out", str(out)), env=environment(), start_new_session=True)
    deadline = time.monotonic() + 240
    while not (out / "train.csv").exists() or len(rows(out / "train.csv")) < 10:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    state = torch.load(out / "last.pt", weights_only=True)
    assert 0 < state["step"] < 24
    measured(killed_after_step=state["step"])
    subprocess.run(torchrun(*common, "--out", str(out)), check=True, env=environment(), timeout=300)
    assert len(rows(out / "train.csv")) == 24
    for name in ("train.csv", "valid.csv"):
        assert (out / name).read_text() == (tmp_path / "whole" / name).read_text()
    weights = [torch.load(one / "last.pt", weights_only=True)["model"] for one in (out, tmp_path / "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
