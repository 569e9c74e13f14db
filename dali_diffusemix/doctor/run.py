"""`examine`: runs the probes and combines their answers."""

import contextlib
import os
import pwd
import re
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from dali_diffusemix.doctor.advice import FEATURES, judge, traps
from dali_diffusemix.doctor.examination import Examination
from dali_diffusemix.doctor.lanes import Answer, Lane, run
from dali_diffusemix.doctor.probes import LANES, PROBES, Probe

__all__ = ["examine"]


def examine(
    data: str | os.PathLike[str] | None = None, *, progress: Callable[[int, int], None] | None = None
) -> Examination:
    """Try what this package needs on this machine, in a few seconds.

    Args:
        data: A folder of images, or a store; some of its files are read to measure the speed of reading.
        progress: Called with the number of probes done, and of all probes.
    """
    begin = time.perf_counter()
    count = sum(map(len, LANES)) + (data is not None)
    answers: dict[str, Answer] = {}
    lock = threading.Lock()

    def tell(name: str, answer: Answer) -> None:
        with lock:
            answers[name] = answer
            if progress is not None:
                progress(len(answers), count)

    with contextlib.ExitStack() as stack:
        environment = dict(os.environ)
        with contextlib.suppress(OSError):  # no folder for temporary files; probes that need one report it
            # Made here, so that a process that crashes leaves nothing behind.
            environment["TMPDIR"] = stack.enter_context(tempfile.TemporaryDirectory(prefix="ddm-"))
        run([Lane(probes, environment, tell) for probes in LANES])
        if data is not None:
            # Alone: the others would slow it down.
            run([Lane(("data",), environment, tell, (os.fsdecode(data),))])
    homes = _homes()
    answers = {name: _presentable(probe, answers.get(name, Answer(found={})), homes) for name, probe in PROBES.items()}
    return Examination(
        answers=answers,
        works={name: judge(name, answers) for name in FEATURES},
        notes=traps(answers),
        seconds=time.perf_counter() - begin,
    )


def _presentable(probe: Probe, answer: Answer, homes: re.Pattern[str]) -> Answer:
    """Return an answer with all keys of its probe, and with ~ for the user's home folder in its texts."""

    def without(value: Any) -> Any:
        if isinstance(value, str):
            return homes.sub("~", value)
        if isinstance(value, Mapping):
            return {key: without(one) for key, one in value.items()}
        return [without(one) for one in value] if isinstance(value, list) else value

    found = {key: without(answer.found.get(key)) for key in probe.keys}
    return Answer(found=found, error=without(answer.error), known=answer.known)


def _homes() -> re.Pattern[str]:
    """Return a pattern of the user's home folder, as a whole path or as the beginning of one."""
    found = {os.environ.get("HOME", "")}
    with contextlib.suppress(KeyError):  # a user without an entry
        found.add(pwd.getpwuid(os.getuid()).pw_dir)
    found |= {os.path.realpath(home) for home in found if home}
    homes = sorted((home.rstrip("/") for home in found if home.startswith("/") and home.strip("/")), reverse=True)
    return re.compile(rf"(?<![\w.~-])(?:{'|'.join(map(re.escape, homes)) or '(?!)'})(?![\w.-])")
