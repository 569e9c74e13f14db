"""Processes that run probes, so that a probe that fails, dies or hangs does not affect the others.

the probes of a lane ──> process ──> a line of JSON each ──> answers
                         (after a failed probe, the rest in a new process)
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from dali_diffusemix.doctor.described import described
from dali_diffusemix.doctor.probes import PROBES
from dali_diffusemix.errors import DiffuseMixError

__all__ = ["Answer", "Lane", "run", "serve"]

_CHILD: Final = (
    "import sys; sys.path[:] = sys.argv[2:]; from dali_diffusemix.doctor.lanes import serve; serve(sys.argv[1])"
)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The result of a probe, or the reason why there is none."""

    found: Mapping[str, Any]
    error: str | None = None
    known: bool = False  # the error is one of this package, which names the remedy if there is one


class Lane:
    """Runs probes one after another in a process; after a failed one, the rest in a new process."""

    def __init__(
        self,
        probes: Sequence[str],
        environment: Mapping[str, str],
        tell: Callable[[str, Answer], None],
        arguments: Sequence[str] = (),
    ) -> None:
        self._waiting = deque(probes)
        self._environment, self._tell, self._arguments = environment, tell, arguments
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def run(self) -> None:
        while self._waiting and not self._stopped:
            try:
                self._run_process()
            except OSError as error:  # no process can be started
                self._tell(self._waiting.popleft(), Answer(found={}, error=described(error)))

    def stop(self) -> None:
        self._stopped = True
        self._kill()

    def _run_process(self) -> None:
        request = json.dumps({"probes": list(self._waiting), "arguments": self._arguments})
        with (
            # In memory: the disk may be full.
            os.fdopen(os.memfd_create("stderr"), "rb") as said,
            subprocess.Popen(
                [sys.executable, "-c", _CHILD, request, *sys.path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=said,
                env=self._environment,
                start_new_session=True,  # so that its child processes can be killed with it
            ) as process,
        ):
            self._process = process
            failed = False
            while self._waiting and not failed:
                seconds = PROBES[self._waiting[0]].seconds
                answer = self._next_answer(process, seconds) or _last_words(process, said.fileno())
                failed = answer.error is not None and not answer.known
                self._tell(self._waiting.popleft(), answer)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            self._kill()

    def _next_answer(self, process: "subprocess.Popen[bytes]", seconds: float) -> Answer | None:
        assert process.stdout is not None
        begin = time.monotonic()
        timer = threading.Timer(seconds, self._kill)
        timer.start()
        line = process.stdout.readline()
        timer.cancel()
        if line.endswith(b"\n"):
            return Answer(**json.loads(line))
        late = time.monotonic() - begin >= seconds
        return Answer(found={}, error=f"no answer within {seconds:g} s") if late else None

    def _kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


def run(lanes: Sequence[Lane]) -> None:
    """Run lanes in parallel."""
    with ThreadPoolExecutor(len(lanes)) as pool:
        futures = [pool.submit(lane.run) for lane in lanes]
        try:
            for future in futures:
                future.result()
        finally:
            for lane in lanes:
                lane.stop()


def _last_words(process: "subprocess.Popen[bytes]", said: int) -> Answer:
    """Return the reason why a process ended without an answer."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1)
    code = process.poll()
    if code is not None and code < 0:
        names = {number.value: number.name for number in signal.Signals}
        how = f"was ended by {names.get(-code, f'signal {-code}')}"
    else:
        how = "closed its output" if code is None else f"ended with exit code {code}"
    size = os.fstat(said).st_size
    lines = os.pread(said, 2000, max(0, size - 2000)).decode(errors="backslashreplace").splitlines()
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return Answer(found={}, error=f"the process that tried it {how}" + (f", after: {last}" if last else ""))


def serve(request: str) -> None:
    """Run probes in this process, a line of JSON for each answer."""
    # Output of libraries goes to standard error.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        asked = json.loads(request)
        for name in asked["probes"]:
            error, known = None, False
            found: Mapping[str, Any] = {}
            try:
                found = PROBES[name].run(*asked["arguments"])
            except Exception as raised:  # any error is the answer
                error, known = described(raised), isinstance(raised, DiffuseMixError)
            answers.write(json.dumps({"found": found, "error": error, "known": known}) + "\n")
            answers.flush()
            # After an error of this package, the process is in a good state.
            if error is not None and not known:
                break
    # Without shutting down libraries, which may fail too.
    os._exit(0)
