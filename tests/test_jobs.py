"""examples/jobs.py: what compare.py runs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import jobs

    yield jobs
    del sys.modules["jobs"]


@pytest.fixture
def run(jobs: Any, tmp_path: Path) -> Callable[..., SimpleNamespace]:
    """Runs jobs, given as their preparation and shell commands; returns what was called in order."""

    def run(*wanted: tuple[str, Sequence[str]], at_once: int = 1, may_start: Callable[[], bool] = lambda: True) -> Any:
        made = [
            jobs.Job(str(place), tmp_path / f"{place}.txt", preparation, [["sh", "-c", one] for one in commands])
            for place, (preparation, commands) in enumerate(wanted)
        ]
        seen = SimpleNamespace(starts=[], done=[], jobs=made)
        jobs.run(
            made,
            at_once=at_once,
            environment={**os.environ, "OUT": str(tmp_path)},
            may_start=may_start,
            starts=lambda job: seen.starts.append(job.name),
            done=lambda job, left: seen.done.append((job.name, job.returned, left)),
        )
        return seen

    return run


def test_commands_run_in_order_until_one_fails(run: Any) -> None:
    seen = run(("a", ["echo 1", "echo 2"]), ("b", ["echo 1", "echo why; echo; exit 3", "echo 4"]), ("b", ["true"] * 2))
    assert seen.done == [("0", 0, 2), ("1", 3, 1), ("2", 0, 0)]
    assert seen.jobs[0].output.read_text() == "1\n2\n"
    assert seen.jobs[1].output.read_text() == "1\nwhy\n\n"
    assert seen.jobs[1].last_words == "why"
    assert seen.jobs[2].last_words == "it printed nothing"
    assert seen.jobs[1].seconds > 0


def test_what_is_prepared_is_prepared_once(run: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    prepare, work = f"sleep 0.2; echo prepare >> {log}", f"echo work >> {log}"
    seen = run(*[("a", [prepare, work])] * 3, ("b", [prepare, work]), at_once=3)
    lines = log.read_text().split()
    assert lines.count("prepare") == 2 and lines.count("work") == 4
    assert lines[0] == "prepare"  # nothing works on what is not there yet
    assert sorted(name for name, *_ in seen.done) == ["0", "1", "2", "3"]


def test_a_preparation_that_failed_is_made_again(run: Any, tmp_path: Path) -> None:
    once = f"mkdir {tmp_path / 'tried'} && exit 1; true"
    seen = run(*[("a", [once, "true"])] * 3)
    assert [returned for _, returned, _ in seen.done] == [1, 0, 0]
    assert [job.output.read_text().count("File exists") for job in seen.jobs] == [0, 1, 0]


def test_some_run_at_a_time(run: Any, tmp_path: Path) -> None:
    # Each of two waits for the other one.
    meet = "touch $OUT/{0}; while [ ! -e $OUT/{1} ]; do sleep 0.02; done"
    run(("a", ["true", meet.format("x", "y")]), ("a", ["true", meet.format("y", "x")]), at_once=2)


def test_no_more_are_started(run: Any) -> None:
    left = [True, True, False]
    seen = run(*[("a", ["true", "true"])] * 3, may_start=lambda: left.pop(0) if left else False)
    assert seen.starts == ["0"]
    assert seen.done == [("0", 0, 2)]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("deaf", [False, True], ids=["", "deaf"])
def test_interrupting_leaves_no_process(number: signal.Signals, deaf: bool, tmp_path: Path) -> None:
    """Neither the commands nor what they have started; one that ignores the interrupt is killed."""
    trap = "trap '' INT; " if deaf else ""
    command = f"{trap}echo $$ > {tmp_path}/$1; sleep 100 & echo $! >> {tmp_path}/$1; wait"
    script = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
import jobs
from pathlib import Path
jobs.PATIENCE = {1.0 if deaf else 30.0}
made = [jobs.Job(name, Path({str(tmp_path)!r}, name + ".txt"), 0, [["true"], ["bash", "-c", {command!r}, "x", name]])
        for name in ("a", "b")]
with jobs.terminated_as_interrupted():
    jobs.run(made, at_once=2, environment={{}}, may_start=lambda: True, starts=print, done=print)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
    files = [tmp_path / name for name in ("a", "b")]
    end = time.monotonic() + 60
    while not all(file.exists() and len(file.read_text().split()) == 2 for file in files):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    pids = [int(one) for file in files for one in file.read_text().split()]
    assert all(map(_alive, pids))
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert b"KeyboardInterrupt" in errors
    assert not any(map(_alive, pids))


def test_the_end_of_the_terminal_may_be_ignored(jobs: Any) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with jobs.terminated_as_interrupted():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) == signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) != signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, before)
