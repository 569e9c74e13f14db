"""Python scripts in processes of their own that do not import torch and DALI first, which takes seconds.

multiprocessing's fork server has imported them, once for all tests of a process, and such a process is a fork of it. It
ends by `os._exit`: what is tested of imports, of the interpreter's end or of its options takes `subprocess`.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import types
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch.utils.data",
        "torch.distributed",
        "nvidia.dali.fn",
        "nvidia.dali.pipeline",
        "dali_diffusemix.loading.loader",
        "dali_diffusemix.generate",
    ]
)


class Script:
    """A script that runs, with `subprocess.Popen`'s attributes and methods; its input and output are text, in pipes.

    Args:
        arguments: `-c`, code and what comes behind it in `sys.argv`; or a file and that.
        env: Variables besides those of this process.
        session: In a session and a process group of its own.
    """

    def __init__(self, *arguments: object, env: dict[str, str] | None = None, session: bool = False) -> None:
        pipes = [CONTEXT.Pipe(duplex=False) for _ in range(3)]
        theirs = [pipes[0][0], pipes[1][1], pipes[2][1]]
        given = [str(argument) for argument in arguments]
        environment = {**os.environ, **(env or {})}
        self._process = CONTEXT.Process(target=_run, args=(given, environment, Path.cwd(), session, theirs))
        self._process.start()
        self.pid = self._process.pid
        ours = [pipes[0][1], pipes[1][0], pipes[2][0]]
        self.stdin, self.stdout, self.stderr = (
            os.fdopen(os.dup(one.fileno()), mode) for one, mode in zip(ours, "wrr", strict=True)
        )
        for one in (*theirs, *ours):
            one.close()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise TimeoutError(f"{self} has not ended within {timeout} s")
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end, and return its output and its errors."""
        self.stdin.close()
        with ThreadPoolExecutor(2) as readers, self.stdout, self.stderr:
            output, errors = (readers.submit(stream.read) for stream in (self.stdout, self.stderr))
            try:
                self.wait(timeout)
            except TimeoutError:
                self.kill()
                raise
            return output.result(), errors.result()

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.kill()
        for stream in (self.stdin, self.stdout, self.stderr):
            stream.close()
        self.wait(60)


def run(*arguments: object, env: dict[str, str] | None = None, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a script to its end, which must be a good one."""
    with Script(*arguments, env=env) as script:
        output, errors = script.communicate(timeout)
    assert script.returncode == 0, errors[-4000:]
    return subprocess.CompletedProcess(list(arguments), 0, output, errors)


def _run(
    arguments: Sequence[str], environment: dict[str, str], folder: Path, session: bool, streams: Sequence[Connection]
) -> None:
    if session:
        os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream.fileno(), number)
        stream.close()
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, buffering, closefd=False)
        for number, mode, buffering in ((0, "r", -1), (1, "w", -1), (2, "w", 1))
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    first, *rest = arguments
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        main: Any = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")
