"""The engine of one machine: runs jobs in this process, or in one process per device.

Worker processes are spawned, never forked: threads, CUDA and DALI do not survive a fork. Each has a pipe to this
process and exits at once when it closes, so that none outlives a killed process.
"""

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from dali_diffusemix.base.cpus import cpus
from dali_diffusemix.errors import ConfigError, DiffuseMixError, WorkerError
from dali_diffusemix.generate.engines import Job, Report

_log = logging.getLogger(__name__)

_PATIENCE = 10.0  # seconds that a worker has to exit at the end
_ROOT = "dali_diffusemix"  # the logger whose records workers send


def default_devices(accelerated: bool) -> tuple[str, ...]:
    """The devices to work on: every GPU if the work uses GPUs and there are any, else every CPU."""
    if accelerated:
        import torch

        if torch.cuda.is_available():
            return tuple(f"cuda:{device}" for device in range(torch.cuda.device_count()))
    return ("cpu",) * cpus()


class LocalEngine:
    """Runs jobs in order, in this process or, with several devices, in one process per device."""

    def __init__(self, devices: Sequence[str] = ("cpu",), *, attempts: int = 3) -> None:
        """Choose the devices.

        Args:
            devices: "cpu", "cuda" or "cuda:N" for each worker; a device may be repeated.
            attempts: How often a job is started at most if its workers die.

        Raises:
            ConfigError: There is no device, or no attempt.
        """
        self.devices = tuple(devices)
        self.attempts = attempts
        self._stopped = False
        if not self.devices or attempts < 1:
            raise ConfigError(f"devices must be one or more, attempts 1 or more; found {self.devices}, {attempts}.")

    def run(self, start: Callable[[str], Callable[[Job], Iterable[Report]]], jobs: Sequence[Job]) -> Iterator[Report]:
        """Yield the reports of all jobs as they come; see `Engine.run`.

        Raises:
            WorkerError: The worker processes of a job died, as often as it may be started.
        """
        self._stopped = False
        if not jobs:
            return  # no model need be loaded
        if len(self.devices) == 1:
            work = start(self.devices[0])
            for job in jobs:
                if self._stopped:
                    return
                yield from work(job)
            return
        devices = self.devices[: len(jobs)]
        with contextlib.ExitStack() as stack:
            workers = [stack.enter_context(_Worker(start, device, len(devices))) for device in devices]
            yield from self._supervise(workers, deque((job, 1) for job in jobs))

    def stop(self) -> None:
        """Start no more jobs; `run` ends with those under way."""
        self._stopped = True

    def _supervise(self, workers: Sequence["_Worker"], waiting: deque[tuple[Any, int]]) -> Iterator[Any]:
        """Hand out jobs, collect reports, replace workers that die."""
        for worker in workers:
            worker.take(waiting)
        while busy := [worker for worker in workers if worker.job is not None]:
            ready = wait([worker.pipe for worker in busy])
            for worker in busy:
                if worker.pipe not in ready:
                    continue
                try:
                    kind, content = worker.pipe.recv()
                except (EOFError, OSError, pickle.UnpicklingError):
                    self._replace(worker, waiting)
                    continue
                if kind == "report":
                    yield content
                elif kind == "log":
                    logging.getLogger(content.name).handle(content)
                elif kind == "error":
                    raise content
                else:
                    if self._stopped:
                        waiting.clear()
                    worker.take(waiting)

    def _replace(self, worker: "_Worker", waiting: deque[tuple[Any, int]]) -> None:
        assert worker.job is not None
        job, attempt = worker.job
        how = worker.how_it_ended()
        if attempt >= self.attempts:
            raise WorkerError(
                f"a worker process ended ({how}) {attempt} times over the same job, {job}; if memory is short, use "
                "fewer workers or smaller batches."
            )
        _log.warning("A worker process ended (%s); its job is started again in a new one.", how)
        waiting.appendleft((job, attempt + 1))
        worker.begin()
        worker.take(waiting)


class _Worker:
    """A worker process and the job that it runs."""

    process: BaseProcess
    pipe: Connection
    job: tuple[Any, int] | None  # with the number of the attempt

    def __init__(self, start: Callable[[str], Any], device: str, workers: int) -> None:
        self._start, self._device, self._workers = start, device, workers
        self.job = None

    def __enter__(self) -> "_Worker":
        self.begin()
        return self

    def begin(self) -> None:
        """Start a process, the first or a new one."""
        context = multiprocessing.get_context("spawn")
        self.job = None
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_work,
            args=(theirs, self._start, self._device),
            name=f"dali-diffusemix on {self._device}",
            daemon=True,
        )
        with _threads_limited(self._workers):
            self.process.start()
        theirs.close()  # so that the pipe closes with the process

    def take(self, waiting: deque[tuple[Any, int]]) -> None:
        """Start the next job, if there is one."""
        self.job = waiting.popleft() if waiting else None
        if self.job is not None:
            with contextlib.suppress(OSError):  # it died, which closes the pipe
                self.pipe.send(self.job[0])

    def how_it_ended(self) -> str:
        self.process.join(5)
        code = self.process.exitcode
        if code is None or code >= 0:
            return f"exit code {code}"
        why = ", which the system sends when memory runs out" if code == -signal.SIGKILL else ""
        return signal.Signals(-code).name + why

    def __exit__(self, error: object, *_: object) -> None:
        if error is None:
            with contextlib.suppress(OSError):
                self.pipe.send(None)
            self.process.join(_PATIENCE)
        self.pipe.close()
        self.process.kill()
        self.process.join()
        self.process.close()


@contextlib.contextmanager
def _threads_limited(workers: int) -> Iterator[None]:
    """Divide the CPUs among the processes that are started in here, unless the user has set their threads."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    each = str(max(1, cpus() // workers))
    ours = [name for name in names if name not in os.environ]
    os.environ.update(dict.fromkeys(ours, each))
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


# In the worker process ------------------------------------------------------------------------------------------------


def _work(pipe: Connection, start: Callable[[str], Callable[[Any], Iterable[Any]]], device: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent decides
    jobs: deque[Any] = deque()
    come = threading.Semaphore(0)
    sending = threading.Lock()

    def receive() -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                jobs.append(pipe.recv())
                come.release()
        os._exit(1)  # the parent is dead

    def send(kind: str, content: object = None) -> None:
        with sending:
            try:
                pipe.send((kind, content))
            except OSError:
                os._exit(1)

    threading.Thread(target=receive, daemon=True).start()
    logger = logging.getLogger(_ROOT)
    logger.addHandler(_Sender(send))
    logger.propagate = False
    try:
        work = start(device)
        while True:
            come.acquire()
            if (job := jobs.popleft()) is None:
                return
            for report in work(job):
                send("report", report)
            send("done")
    except BaseException as error:
        ours = isinstance(error, DiffuseMixError)
        error.add_note(f"on {device}" if ours else "".join(traceback.format_exception(error)).rstrip())
        send("error", _portable(error))


def _portable(error: BaseException) -> BaseException:
    """The error, or a RuntimeError with its text if it cannot be pickled."""
    try:
        again = pickle.loads(pickle.dumps(error))  # our own object, a moment old
        if type(again) is type(error):
            return error
    except Exception:  # a class may raise anything when it is copied
        pass
    portable = RuntimeError(f"{type(error).__name__}: {error}")
    portable.__notes__ = list(getattr(error, "__notes__", ()))
    return portable


class _Sender(logging.Handler):
    """Sends log records to the process that started this one."""

    def __init__(self, send: Callable[[str, object], None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        self._send("log", record)
