"""Engines: every job is done whoever dies, errors arrive, and nobody is left behind."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_jobs import Start, Task

from dali_diffusemix.errors import ConfigError, StoreError, WorkerError
from dali_diffusemix.generate.engines import Engine
from dali_diffusemix.generate.engines.local import LocalEngine, default_devices
from dali_diffusemix.generate.engines.ray import RayEngine, _knock

HERE = Path(__file__).parent
# Ray's own, of sockets and of processes that it lets go of.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True, scope="module")
def importable() -> Iterator[None]:
    """Processes that are started from here find this folder's modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
        yield


@pytest.fixture(scope="module")
def cluster(importable: None) -> Iterator[None]:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.fixture(params=["one process", "two processes", pytest.param("ray", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest) -> Engine:
    if request.param == "ray":
        request.getfixturevalue("cluster")
        return RayEngine(workers=2)
    return LocalEngine(("cpu",) if request.param == "one process" else ("cpu", "cpu"))


def tasks(folder: Path, count: int = 6, **then: str) -> list[Task]:
    """Named 0, 1, ...; `_3="die"` is what becomes of the third."""
    return [Task(str(place), folder, then=then.get(f"_{place}", "")) for place in range(count)]


def begun(folder: Path) -> dict[str, int]:
    return {file.stem: file.stat().st_size for file in folder.glob("*.begun")}


def test_every_job_is_done_once_and_says_so(engine: Engine, tmp_path: Path) -> None:
    said = list(engine.run(Start(), tasks(tmp_path)))
    assert sorted((one.name, one.place) for one in said) == [(str(n), place) for n in range(6) for place in range(2)]
    for name in "012345":
        assert [one.place for one in said if one.name == name] == [0, 1]  # a job's own reports keep their order
    assert begun(tmp_path) == dict.fromkeys("012345", 1)
    assert {one.device for one in said} == {"cpu"}


def test_no_job_needs_no_worker(engine: Engine) -> None:
    assert list(engine.run(Start("nobody may start"), [])) == []


def test_the_first_error_of_a_job_is_raised(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="2 is no good"):
        list(engine.run(Start(), tasks(tmp_path, 40, _2="fail")))
    assert len(begun(tmp_path)) < 40


def test_an_error_that_is_not_ours_arrives_too(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="1"):
        list(engine.run(Start(), tasks(tmp_path, 3, _1="break")))


def test_a_worker_that_cannot_begin_says_why(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no model"):
        list(engine.run(Start("no model"), tasks(tmp_path)))


@pytest.fixture(params=["two processes", pytest.param("ray", marks=pytest.mark.slow)])
def many(request: pytest.FixtureRequest) -> Engine:
    if request.param == "ray":
        request.getfixturevalue("cluster")
        return RayEngine(workers=2, attempts=2)
    return LocalEngine(("cpu", "cpu"), attempts=2)


@pytest.mark.slow
def test_the_job_of_a_worker_that_dies_is_begun_again(
    many: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        said = list(many.run(Start(), tasks(tmp_path, 6, _1="die once", _4="die once")))
    assert begun(tmp_path) == {**dict.fromkeys("012345", 1), "1": 2, "4": 2}
    assert {(one.name, one.place) for one in said} == {(str(n), place) for n in range(6) for place in range(2)}
    assert caplog.text.count("its job is started again") == 2


@pytest.mark.slow
def test_a_job_that_kills_every_worker_ends_the_run(many: Engine, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"2 times over the same job, Task\(name='1'"):
        list(many.run(Start(), tasks(tmp_path, 6, _1="die")))
    assert begun(tmp_path)["1"] == 2


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def gone(process: int, seconds: float = 5) -> bool:
    until = time.monotonic() + seconds
    while alive(process):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def test_whoever_stops_listening_leaves_no_process(many: Engine, tmp_path: Path) -> None:
    run: Any = many.run(Start(), tasks(tmp_path, 6, _1="sleep"))
    processes = {next(run).process for _ in range(4)}
    run.close()
    assert os.getpid() not in processes and all(gone(process, 20) for process in processes)


RUN = """
import logging, signal, sys
from pathlib import Path
from engine_jobs import Start, Task
from dali_diffusemix.generate.engines.local import LocalEngine
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    folder = Path(sys.argv[1])
    for said in LocalEngine(("cpu", "cpu")).run(Start(), [Task(str(n), folder, then="sleep") for n in range(2)]):
        print(said.process, flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_process_that_they_work_for(tmp_path: Path, how: signal.Signals) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN)
    with subprocess.Popen(
        [sys.executable, script, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        processes = {int(run.stdout.readline()) for _ in range(4)}
        run.send_signal(how)
        run.wait(20)
        assert len(processes) == 2 and all(gone(process, 2) for process in processes)


def closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port


UNANSWERED = """
import sys
from dali_diffusemix.generate.engines.ray import RayEngine
list(RayEngine(address=sys.argv[1]).run(None, [1]))
"""


@pytest.mark.slow
def test_an_address_that_does_not_answer_is_said_at_once() -> None:
    """In a process of its own: this one may be connected to a cluster, which then is the one that is used."""
    pytest.importorskip("ray")
    address = f"127.0.0.1:{closed_port()}"
    run = subprocess.run([sys.executable, "-c", UNANSWERED, address], capture_output=True, text=True, timeout=60)
    last = run.stderr.splitlines()[-1]
    assert last.startswith("dali_diffusemix.errors.ConfigError: address must be that of a Ray cluster that answers")
    assert address in last and "refused" in last


def test_an_address_that_answers_and_other_kinds_are_left_to_ray() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        for address in (f"127.0.0.1:{server.getsockname()[1]}", None, "auto", "local", "ray://nowhere.invalid:10001"):
            _knock(address)
    with pytest.raises(ConnectionError):
        _knock("127.0.0.1:65536")


def test_records_of_workers_are_logged_here(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        list(LocalEngine(("cpu", "cpu")).run(Start(), tasks(tmp_path)))
    assert caplog.text.count("a worker on cpu") == 2


def test_devices_of_this_machine() -> None:
    cores = len(os.sched_getaffinity(0))
    assert default_devices(False) == ("cpu",) * cores
    import torch

    gpus = torch.cuda.device_count()
    assert default_devices(True) == tuple(f"cuda:{n}" for n in range(gpus)) if gpus else ("cpu",) * cores


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LocalEngine(()), "devices must be one or more"),
        (lambda: LocalEngine(attempts=0), "attempts 1 or more"),
        (lambda: RayEngine(workers=0), "workers must be 1 or more, found 0"),
        (lambda: RayEngine(num_gpus=-1), "num_gpus must be 0 or more, found -1"),
        (lambda: RayEngine(num_cpus=0), "num_cpus must be more than 0, found 0"),
    ],
)
def test_engines_check_what_they_are_given(make: Callable[[], Engine], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.slow
def test_what_no_node_of_the_cluster_has_is_said(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"a worker needs {'GPU': 99.*no node of the Ray cluster has that"):
        list(RayEngine(num_gpus=99).run(Start(), tasks(tmp_path)))
