"""Training scripts killed with signal 9 wherever they are, started again, and compared with one that never was.

DALI_DIFFUSEMIX_SOAK_KILLS (20) is how often one process is killed, DALI_DIFFUSEMIX_SOAK_SEED where the kills fall.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from material import MakeStore, write_photograph
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
