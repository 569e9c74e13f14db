"""Jobs for the engines' tests, in a module that other processes can import."""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dali_diffusemix.errors import StoreError


@dataclass(frozen=True)
class Task:
    """What a job does: some reports, and then what is named."""

    name: str
    folder: Path
    reports: int = 2
    then: str = ""


class Said(NamedTuple):
    """A report."""

    name: str
    place: int
    process: int
    device: str


class Start:
    """Makes a worker; `fault` is what goes wrong there."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def __call__(self, device: str) -> Callable[[Task], Iterator[Said]]:
        if self.fault:
            raise StoreError(self.fault)
        logging.getLogger("dali_diffusemix.engine_jobs").warning("a worker on %s", device)
        return Worker(device)


class Worker:
    """Does tasks."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, task: Task) -> Iterator[Said]:
        with (task.folder / f"{task.name}.begun").open("a") as file:
            file.write("x")
        tries = (task.folder / f"{task.name}.begun").stat().st_size
        for place in range(task.reports):
            yield Said(task.name, place, os.getpid(), self.device)
            time.sleep(0.01)
            if task.then == "die" or (task.then == "die once" and tries == 1):
                os.kill(os.getpid(), signal.SIGKILL)
        if task.then == "fail":
            raise StoreError(f"{task.name} is no good")
        if task.then == "break":
            raise ZeroDivisionError(task.name)
        if task.then == "sleep":
            (task.folder / "sleeps").write_text(str(os.getpid()))
            time.sleep(600)
