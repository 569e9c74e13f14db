"""Measurements of contenders in alternating turns, each in a process of its own.

interleaved ──(name, seconds)──> process: _Stream of batches ──_Turn──> Measurement
"""

import contextlib
import datetime
import multiprocessing
import os
import platform
import resource
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import torch
from numpy.typing import NDArray

from dali_diffusemix.base.cpus import cpus
from dali_diffusemix.bench.contenders import Contender, Factory
from dali_diffusemix.bench.result import Measurement, Spent
from dali_diffusemix.errors import DataError, DiffuseMixError

__all__ = ["MemoryWatch", "cpu_seconds", "interleaved", "machine"]

_SAMPLE_SECONDS: Final = 0.05  # between two readings of memory
_START: Final = 5  # the uncounted turn, which includes the start, may take so many times as long
_PACKAGES: Final = (  # whose versions a record has
    *("torch", "numpy", "pillow", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "cupy-cuda12x", "cupy-cuda13x"),
    *("spdl", "webdataset"),
)


# CPU time and memory --------------------------------------------------------------------------------------------------


def cpu_seconds() -> float:
    """Return the CPU time of this process and of those it started through multiprocessing, ended ones included."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for child in multiprocessing.active_children():
        with contextlib.suppress(OSError):  # it has just ended
            # Split after the name, which may hold any character: state is field 3, utime and stime are 14 and 15.
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def _memory_mib() -> float | None:
    """Return the memory of this process and those it started; a shared page counts once (PSS)."""
    total = 0
    for process in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            if process == os.getpid():
                return None
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


class MemoryWatch:
    """Samples the memory in a thread: `with MemoryWatch() as watch: ...`, then `watch.peak` in MiB."""

    def __init__(self) -> None:
        self.peak = _memory_mib()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while self.peak is not None and not self._stop.wait(_SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        if (now := _memory_mib()) is not None and self.peak is not None:
            self.peak = max(self.peak, now)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()


# Turns and processes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """Images and costs of one turn."""

    images: int
    seconds: float
    cpu_seconds: float
    peak_memory_mib: float | None = None
    spent: NDArray[np.float64] | None = None  # seconds of reading, decoding and mixing


class _Stream:
    """The batches of a contender, epoch after epoch."""

    def __init__(self, contender: Contender) -> None:
        self._contender = contender
        self._batches: Iterator[int] = iter(())

    def _take(self, batches: int) -> int:
        """Take this many batches; returns the number of their images."""
        images = 0
        for _ in range(batches):
            size = next(self._batches, None)
            if size is None:
                self._batches = self._contender.epoch()
                size = next(self._batches, 0)
            if size == 0:
                raise DataError("an epoch must give at least one image, found none; see the contender's own log.")
            images += size
        return images

    def turn(self, seconds: float | None) -> _Turn:
        """Time whole batches for at least `seconds`, in steady state; or, if that is None, one whole epoch."""
        if seconds is not None:
            self._take(self._contender.ahead)
        _synchronize()
        begin_spent = self._spent()
        images, begin, begin_cpu = 0, time.perf_counter(), cpu_seconds()
        if seconds is None:
            self._batches = self._contender.epoch()
            images = self._take(1) + sum(self._batches)
        else:
            # Batches of several workers arrive together, so count them together; on a busy machine at least once.
            while images == 0 or time.perf_counter() - begin < seconds:
                images += self._take(self._contender.ahead)
        _synchronize()
        turn = _Turn(images=images, seconds=time.perf_counter() - begin, cpu_seconds=cpu_seconds() - begin_cpu)
        return turn if begin_spent is None else replace(turn, spent=self._spent() - begin_spent)

    def _spent(self) -> Any:
        return None if self._contender.spent is None else self._contender.spent()


def _synchronize() -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def _serve(connection: Any, factories: Mapping[str, Factory]) -> None:
    """Run in a contender's process: answers (name, seconds, watch memory) with the turn or the error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    os.dup2(2, 1)  # standard output is the parent's results
    warnings.simplefilter("ignore")  # the parent has shown them
    multiprocessing.set_start_method(None, force=True)  # DataLoader's workers start as in the user's process
    streams: dict[str, _Stream] = {}
    while True:
        try:
            name, seconds, watched = connection.recv()
        except EOFError:
            return
        try:
            with MemoryWatch() if watched else contextlib.nullcontext() as watch:
                if name not in streams:
                    streams[name] = _Stream(factories[name]())
                turn = streams[name].turn(seconds)
            connection.send(turn if watch is None else replace(turn, peak_memory_mib=watch.peak))
        except DiffuseMixError as error:
            connection.send(error)
        except Exception as error:
            first = str(error).strip().splitlines() or ["no message"]
            failure = DiffuseMixError(f"{type(error).__name__}: {first[0]}")
            failure.add_note(traceback.format_exc())
            connection.send(failure)


class _Process:
    """The process in which one or more contenders run."""

    def __init__(self, factories: Mapping[str, Factory]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # Not a daemon: daemons may not have child processes.
        self._process = context.Process(target=_serve, args=(theirs, dict(factories)))
        self._process.start()
        theirs.close()
        self._open = True

    def ask(self, name: str, seconds: float | None, *, watched: bool) -> None:
        """Start a turn of a contender; if `watched`, its memory is measured too."""
        with contextlib.suppress(OSError):  # it has ended; `answer` reports that
            self._connection.send((name, seconds, watched))

    def answer(self, name: str, patience: float | None) -> _Turn:
        """Wait for the turn that was asked for. Raises DiffuseMixError."""
        try:
            if patience is not None and not self._connection.poll(patience):
                self._process.kill()
                raise DiffuseMixError(f"{name}: a turn must end within {patience:g} s, found one that did not.")
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(5)
            if self._process.is_alive():  # it closed the pipe and hangs
                self._process.kill()
                self._process.join()
            raise DiffuseMixError(
                f"{name}: its process must live to the end, found exit code {self._process.exitcode}; if it was killed "
                "for memory, use a smaller batch_size or fewer num_workers. A script that calls this needs "
                "`if __name__ == '__main__':`."
            ) from error
        if isinstance(answer, DiffuseMixError):
            raise answer
        assert isinstance(answer, _Turn)
        return answer

    def dismiss(self) -> None:
        """Ask the process to end, without waiting."""
        if self._open:
            self._connection.close()
        self._open = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.dismiss()
        if kind is None:
            self._process.join(10)
        self._process.terminate()
        self._process.join()


def interleaved(
    factories: Mapping[str, Factory],
    *,
    rounds: int,
    seconds: float | None = None,
    optional: Collection[str] = (),
    together: bool = False,
    progress: Callable[[], None] | None = None,
    begin_together: bool = False,
    patience: float | None = None,
    each_round: Callable[[Mapping[str, Measurement], Mapping[str, str]], None] | None = None,
) -> tuple[dict[str, Measurement], dict[str, str]]:
    """Run contenders alternately, A B C A B C ..., so that a drifting speed of the machine affects all alike.

    Each runs in a process of its own, started by `spawn`: call this under `if __name__ == "__main__":` in a script. The
    first round is not counted; it measures the memory.

    Args:
        factories: Contender's name to its factory.
        rounds: Counted turns of each contender.
        seconds: Minimum length of a turn, in steady state; None: a turn is one whole epoch.
        optional: Contenders that may fail; they are left out, with the reason.
        together: All contenders share one process, as variants of one loader may.
        progress: Called after each turn.
        begin_together: Run the uncounted turns at the same time, which saves time.
        patience: Seconds after which a turn's process is killed, five times as many in the uncounted turn, which
            includes the start; None: no limit.
        each_round: Called after each counted round with the results so far, as they are returned in the end.

    Returns:
        The measurements by contender, and the reason for each contender that was left out.

    Raises:
        DiffuseMixError: A contender that is not optional failed.
    """
    turns: dict[str, list[_Turn]] = {name: [] for name in factories}
    left_out: dict[str, str] = {}

    def found() -> dict[str, Measurement]:
        done = {name: turns[name] for name in factories if name not in left_out and len(turns[name]) > 1}
        return {name: _measurement(taken) for name, taken in done.items()}

    with contextlib.ExitStack() as stack:
        if together:
            shared = stack.enter_context(_Process(factories))
            processes = dict.fromkeys(factories, shared)
        else:
            processes = {name: stack.enter_context(_Process({name: one})) for name, one in factories.items()}
        for turn in range(1 + rounds):
            at_once = begin_together and turn == 0
            limit = None if patience is None else patience * (_START if turn == 0 else 1)
            if at_once:
                for name, process in processes.items():
                    process.ask(name, seconds, watched=True)
            for name, process in processes.items():
                if name not in left_out:
                    try:
                        if not at_once:
                            process.ask(name, seconds, watched=turn == 0)
                        turns[name].append(process.answer(name, limit))
                    except DiffuseMixError as error:
                        if name not in optional:
                            raise
                        left_out[name] = str(error)
                        if not together:
                            process.dismiss()  # frees its memory for the others
                if progress is not None:
                    progress()
            if turn and each_round is not None:
                each_round(found(), dict(left_out))
        for process in processes.values():
            process.dismiss()
    return found(), left_out


def _measurement(turns: Sequence[_Turn]) -> Measurement:
    """Sum up the turns; the first one only gives the memory."""
    spent = [turn.spent / turn.images for turn in turns[1:] if turn.spent is not None]
    return Measurement(
        images_per_second=tuple(turn.images / turn.seconds for turn in turns[1:]),
        cpu_seconds_per_image=tuple(turn.cpu_seconds / turn.images for turn in turns[1:]),
        peak_memory_mib=turns[0].peak_memory_mib,
        spent=Spent(*np.median(spent, axis=0).tolist()) if spent else None,
    )


# The machine ----------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Describe this machine: processor, cores that this process may use, GPU if any, versions and date."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found: dict[str, Any] = {
        "processor": next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), "unknown"),
        "cores": cpus(),
        "python": platform.python_version(),
        "versions": {},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found["versions"][package] = metadata.version(package)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {"name": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
    return found
