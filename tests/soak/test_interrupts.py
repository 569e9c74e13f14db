"""Exceptions at every line of an epoch, and Ctrl-C at random moments: no wrong batch afterwards.

DALI_DIFFUSEMIX_SOAK_SIGNALS (500) is how often the process is interrupted, DALI_DIFFUSEMIX_SOAK_SEED when.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import run

import numpy as np
import pytest
from interrupting import Case, make_case

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
SIGNALS = int(os.environ.get("DALI_DIFFUSEMIX_SOAK_SIGNALS", "500"))
SEED = int(os.environ.get("DALI_DIFFUSEMIX_SOAK_SEED", "0"))


@pytest.mark.parametrize("pieces", ["equal", "mixed"])
def test_an_exception_at_every_line(pieces: str, tmp_path: Path, measured: Callable[..., None]) -> None:
    case = make_case(tmp_path, pieces)
    places = case.places(np.random.default_rng(SEED))
    thrown = [case.throw(at).thrown for at in places]
    # Threads do not run the same way twice: some lines have no such turn.
    measured(lines=len({line for line, _ in places}), places=len(places), thrown=sum(thrown))
    assert sum(thrown) > 0.9 * len(places)


@pytest.mark.parametrize("pieces", ["equal", "mixed"])
def test_signals_at_random_moments(pieces: str, tmp_path: Path, measured: Callable[..., None]) -> None:
    """As in a notebook, whose cell is stopped and run again; in a process of its own."""
    command = [sys.executable, __file__, str(tmp_path), pieces, str(SIGNALS), str(SEED)]
    done = run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr
    interrupted, batches = map(int, done.stdout.split())
    measured(signals=SIGNALS, interrupted=interrupted, batches=batches)
    assert interrupted > SIGNALS // 2


def interrupted_often(case: Case, signals: int, seed: int) -> tuple[int, int]:
    """Interrupt loops over a loader and begin again; returns how many were, and the batches that were compared."""
    draw, loader, interrupted, batches = np.random.default_rng(seed), case.make(), 0, 0
    for _ in range(signals):
        timer = threading.Timer(float(draw.uniform(0, 0.03)), os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            while timer.is_alive():
                loader.set_epoch(0)
                for images, _, indices in loader:
                    for image, index in zip(images, indices.tolist(), strict=True):
                        if not image.equal(case.expected[0][index]):
                            raise SystemExit(f"after {interrupted} interrupts sample {index} is wrong")
                    batches += 1
            time.sleep(1)  # the signal is on its way
        except KeyboardInterrupt:
            interrupted += 1
        timer.join()
    loader.set_epoch(1)
    case.check(loader, 2)
    return interrupted, batches


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    print(*interrupted_often(make_case(Path(sys.argv[1]), sys.argv[2]), *map(int, sys.argv[3:])))  # noqa: T201
