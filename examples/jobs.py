"""Chains of commands, several at a time. Interrupting stops all of them."""

import contextlib
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PATIENCE = 20.0  # seconds for a process to end after SIGINT


@dataclass
class Job:
    """Commands that run one after the other, until one fails."""

    name: str
    output: Path  # gets what they print
    preparation: Hashable  # what the first command makes for all jobs of the same preparation
    commands: Sequence[Sequence[str]]  # the first runs only if no earlier job has made it
    seconds: float = field(default=0.0, init=False)  # that it took
    returned: int = field(default=0, init=False)  # status of the last command that ran

    @property
    def last_words(self) -> str:
        """The last line of the output that is not empty."""
        lines = [line for line in self.output.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else "it printed nothing"


class _Running:
    def __init__(self, job: Job, prepared: bool, environment: Mapping[str, str]) -> None:
        self.job, self.preparing, self._environment = job, not prepared, environment
        self._waiting = deque(job.commands[1:] if prepared else job.commands)
        self._start = time.monotonic()
        self._next()

    def _next(self) -> None:
        with self.job.output.open("a") as output:
            self.process = subprocess.Popen(
                self._waiting.popleft(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment,
                start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which passes it on
            )

    def advance(self) -> bool:
        """Start the next command if one has ended. Returns whether the job is over."""
        returned = self.process.poll()
        if returned is None:
            return False
        self.job.returned, self.job.seconds = returned, time.monotonic() - self._start
        if returned or not self._waiting:
            return True
        self.preparing = False
        self._next()
        return False


def run(
    jobs: Sequence[Job],
    *,
    at_once: int,
    environment: Mapping[str, str],
    may_start: Callable[[], bool],
    starts: Callable[[Job], None],
    done: Callable[[Job, int], None],
) -> None:
    """Run jobs in order.

    Args:
        jobs: What to run.
        at_once: How many of them at a time.
        environment: Environment variables of their processes.
        may_start: Asked before each job; if it says no, no more are started.
        starts: Called with each job before it starts.
        done: Called with each job that is over, and the number of jobs that are not started yet.

    Raises:
        KeyboardInterrupt: On SIGINT, after all processes have got it and ended.
    """
    waiting, running, prepared = deque(jobs), list[_Running](), set[Hashable]()
    try:
        while running or (waiting and may_start()):
            # Jobs that start while another one prepares would make the same.
            while waiting and len(running) < at_once and not any(one.preparing for one in running) and may_start():
                starts(job := waiting.popleft())
                running.append(_Running(job, job.preparation in prepared, environment))
            time.sleep(0.05)  # nothing waits for one of several processes everywhere
            for one in [one for one in running if one.advance()]:
                running.remove(one)
                done(one.job, len(waiting))
            prepared |= {one.job.preparation for one in running if not one.preparing}
    except KeyboardInterrupt:
        _stop([one.process for one in running])
        raise


def _stop(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Interrupt processes and all that they have started; kill what is left."""
    _signal(processes, signal.SIGINT)
    end = time.monotonic() + PATIENCE
    with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):  # the second Ctrl-C
        for one in processes:
            one.wait(max(end - time.monotonic(), 0.0))
    _signal(processes, signal.SIGKILL)


def _signal(processes: Sequence["subprocess.Popen[bytes]"], number: signal.Signals) -> None:
    for one in processes:
        with contextlib.suppress(ProcessLookupError):  # nothing of it is left
            os.killpg(one.pid, number)


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM and the end of the terminal raise KeyboardInterrupt, as Ctrl-C does."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {one: handler for one in numbers if (handler := signal.getsignal(one)) != signal.SIG_IGN}  # as nohup does
    for number in before:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
