"""Work that is killed at one replacement of a file after another, as a power cut or the system may do it."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any


def killed_at_each(work: Callable[[int], object], step: int = 1) -> int:
    """Run work in copies of this process, of which each is killed at a later replacement, until one ends by itself.

    Copies, because a new process would import everything again, which takes a second each time.

    Args:
        work: Called with 0, `step`, 2 · `step`, ...: the number of replacements that it may make.
        step: Of the replacements only every so many is the last one.

    Returns:
        The first number that was not needed.
    """
    left = 0
    replace = Path.replace

    def counted(self: Path, target: Any) -> Path:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return replace(self, target)

    Path.replace = counted  # type: ignore[method-assign]
    moment, killed = 0, True
    while killed:
        if (child := os.fork()) == 0:
            left = moment
            try:
                work(moment)
                os._exit(0)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL), code
        moment, killed = moment + step, code != 0
    return moment
