"""Threads for work: results in their order, errors where they are asked for, ends that wait for nobody who is gone."""

import gc
import subprocess
import sys
import threading
import time

import pytest

from dali_diffusemix.base.workers import Workers


def threads_of(name: str) -> int:
    return sum(thread.name.startswith(name) for thread in threading.enumerate())


def test_results_and_errors() -> None:
    workers = Workers(3, "test")
    assert threads_of("test") == 0
    results = [workers.submit(divmod, 7, number) for number in (2, 0, 3)]
    assert results[0].get() == results[0].get() == (3, 1) and results[2].get() == (2, 1)
    with pytest.raises(ZeroDivisionError):
        results[1].get()
    assert isinstance(results[1].error(), ZeroDivisionError) and results[0].error() is None
    assert all(result.done() for result in results)
    assert threads_of("test") == 3
    workers.close()
    assert threads_of("test") == 0


def test_what_has_not_begun_is_dropped_and_what_has_is_waited_for() -> None:
    workers, begun, ended = Workers(1, "test"), threading.Event(), []

    def slow() -> None:
        begun.set()
        time.sleep(0.1)
        ended.append(1)

    for _ in range(5):
        workers.submit(slow)
    begun.wait()
    workers.close()
    assert ended == [1]


def test_threads_end_with_what_they_work_for() -> None:
    workers = Workers(2, "test")
    kept = object()
    workers.submit(id, kept).get()
    assert sys.getrefcount(kept) == 2  # a thread that waits holds nothing
    del workers
    gc.collect()
    for _ in range(100):
        if not threads_of("test"):
            break
        time.sleep(0.01)
    assert not threads_of("test")


def test_they_do_not_keep_the_interpreter() -> None:
    code = (
        "from dali_diffusemix.base.workers import Workers; import time; w = Workers(2, 'x'); w.submit(time.sleep, 60)"
    )
    begin = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 0
    assert time.monotonic() - begin < 20


def test_map_keeps_the_order_and_raises_an_error_in_its_turn() -> None:
    with Workers(3, "test") as workers:
        assert list(workers.map(abs, range(-50, 0))) == list(range(50, 0, -1))
        results = workers.map(lambda number: 1 // number, (2, 1, 0, 3))
        assert (next(results), next(results)) == (0, 1)
        with pytest.raises(ZeroDivisionError):
            next(results)
    assert threads_of("test") == 0
