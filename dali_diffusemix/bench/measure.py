"""Measuring contenders in turn, each in a process of its own."""

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

import torch

from dali_diffusemix.bench.contenders import Contender, Factory
from dali_diffusemix.bench.result import Measurement
from dali_diffusemix.errors import DataError, DiffuseMixError

_PACKAGES: Final = (
    *("torch", "numpy", "pillow", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "cupy-cuda12x", "cupy-cuda13x"),
    *("spdl", "webdataset"),
)


_SAMPLE_SECONDS: Final = 0.05  # between two looks at memory


def cpu_seconds() -> float:
    """CPU time of this process and of those it started through multiprocessing, the ended ones included."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for child in multiprocessing.active_children():
        with contextlib.suppress(OSError):  # it has just ended
            # After the name, which may hold anything: state is field 3, utime and stime are 14 and 15.
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def _memory_mib() -> float | None:
    """Memory of this process and those it started; a page that several share counts once, in equal parts."""
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
    """Looks at the memory all the while: `with MemoryWatch() as watch: ...; watch.peak`, MiB."""

    def __init__(self) -> None:
        self.peak = _memory_mib()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while self.peak is not None and not self._stop.wait(_SAMPLE_SECONDS):
            self._look()

    def _look(self) -> None:
        if (now := _memory_mib()) is not None and self.peak is not None:
            self.peak = max(self.peak, now)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """What a turn gave."""

    images: int
    seconds: float
    cpu_seconds: float
    peak_memory_mib: float | None = None


class _Stream:
    """A contender's batches, epoch after epoch."""

    def __init__(self, contender: Contender) -> None:
        self._contender = contender
        self._batches: Iterator[int] = iter(())

    def _take(self, batches: int) -> int:
        """Take this many batches; returns their images."""
        images = 0
        for _ in range(batches):
            size = next(self._batches, None)
            if size is None:
                self._batches = self._contender.epoch()
                size = next(self._batches, 0)
            if size == 0:
                raise DataError("an epoch must give at least one image, found none; look at the contender's own log.")
            images += size
        return images

    def turn(self, seconds: float | None) -> _Turn:
        """Time whole batches for `seconds` at least, in steady state; or one whole epoch, from its beginning."""
        if seconds is not None:
            self._take(self._contender.ahead)
        _synchronize()
        images, begin, begin_cpu = 0, time.perf_counter(), cpu_seconds()
        if seconds is None:
            self._batches = self._contender.epoch()
            images = self._take(1) + sum(self._batches)
        else:
            # Batches of several workers arrive together, so they are counted together.
            while time.perf_counter() - begin < seconds:
                images += self._take(self._contender.ahead)
        _synchronize()
        return _Turn(images=images, seconds=time.perf_counter() - begin, cpu_seconds=cpu_seconds() - begin_cpu)


def _synchronize() -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def _serve(connection: Any, factories: Mapping[str, Factory]) -> None:
    """A contender's process: answers (name, seconds, watch memory) with the turn, or with the error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    os.dup2(2, 1)  # standard output is the parent's results
    warnings.simplefilter("ignore")  # the parent has shown them
    multiprocessing.set_start_method(None, force=True)  # of DataLoader's workers: as in the user's own process
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
    """The process in which contenders live."""

    def __init__(self, factories: Mapping[str, Factory]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # Not a daemon: those may not have workers.
        self._process = context.Process(target=_serve, args=(theirs, dict(factories)))
        self._process.start()
        theirs.close()
        self._open = True

    def ask(self, name: str, seconds: float | None, *, watched: bool) -> None:
        """Begin a turn of a contender; `watched`, its memory too."""
        with contextlib.suppress(OSError):  # it has ended, which `answer` says
            self._connection.send((name, seconds, watched))

    def answer(self, name: str, patience: float | None) -> _Turn:
        """The turn that was asked for. Raises DiffuseMixError."""
        try:
            if patience is not None and not self._connection.poll(patience):
                self._process.kill()
                raise DiffuseMixError(f"{name}: a turn must end within {patience:g} s, found that this one did not.")
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(5)
            if self._process.is_alive():  # it closed the pipe and hangs
                self._process.kill()
                self._process.join()
            raise DiffuseMixError(
                f"{name}: its process must live to the end, found exit code {self._process.exitcode}; if it was killed "
                "for memory, take a smaller batch_size or fewer num_workers. A script that calls this needs "
                "`if __name__ == '__main__':`."
            ) from error
        if isinstance(answer, DiffuseMixError):
            raise answer
        assert isinstance(answer, _Turn)
        return answer

    def dismiss(self) -> None:
        """Ask it to end, without waiting."""
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
    """Run contenders in turn, A B C A B C ..., so that a machine whose speed drifts treats them alike.

    Each has a process of its own, begun by `spawn`: a script calls this under `if __name__ == "__main__":`. The first
    round is not counted; in it the memory is measured.

    Args:
        factories: Name to what builds the contender.
        rounds: Counted turns of each.
        seconds: Length of a turn at least, in steady state; None: a turn is a whole epoch from its beginning.
        optional: Contenders that may fail or die; they are left out, with the reason.
        together: All contenders share one process, for variants of one.
        progress: Called after each turn.
        begin_together: The uncounted turns of all contenders run at the same time, which saves their starts.
        patience: Seconds that a turn may take, the uncounted one, which has the start in it, five times as many; the
            process of a contender that takes longer is killed. None: any time.
        each_round: Called after each counted round with what is known so far, as it is returned in the end.

    Returns:
        The measurements, and what was left out with the reason of each.

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
            limit = None if patience is None else patience * (5 if turn == 0 else 1)
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
                            process.dismiss()  # what it holds of the machine is not taken from the rest
                if progress is not None:
                    progress()
            if turn and each_round is not None:
                each_round(found(), dict(left_out))
        for process in processes.values():
            process.dismiss()
    return found(), left_out


def _measurement(turns: Sequence[_Turn]) -> Measurement:
    """What the turns gave, without the first, which is there for the memory."""
    return Measurement(
        images_per_second=tuple(turn.images / turn.seconds for turn in turns[1:]),
        cpu_seconds_per_image=tuple(turn.cpu_seconds / turn.images for turn in turns[1:]),
        peak_memory_mib=turns[0].peak_memory_mib,
    )


def machine() -> dict[str, Any]:
    """The processor, the cores this process may use, the GPU where there is one, versions and date."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found: dict[str, Any] = {
        "processor": next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), "unknown"),
        "cores": _cores(),
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


def _cores() -> int:
    return len(os.sched_getaffinity(0))
