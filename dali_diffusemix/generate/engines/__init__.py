"""Engines: run the jobs that make the shards of an edit store. The result does not depend on the engine.

An engine has one method. `LocalEngine` works in this process, or in one process per device; `RayEngine` in actors of a
Ray cluster.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

Job = TypeVar("Job")
Report = TypeVar("Report")


class Engine(Protocol):
    """Runs independent jobs."""

    def run(self, start: Callable[[str], Callable[[Job], Iterable[Report]]], jobs: Sequence[Job]) -> Iterator[Report]:
        """Run every job, in any order and on any number of processes, and yield its reports as they come.

        Args:
            start: Called once in each worker process, with its device ("cpu", "cuda", "cuda:1"); returns a function
                that runs one job, and holds what is costly to make (a model). It, the jobs and the reports can be
                pickled.
            jobs: The jobs. One that runs twice, after a process was lost, has the effect of one run; its reports tell
                the state of the job, not what is new, so that a repeated report counts once.

        Raises:
            DiffuseMixError: The first error that a job raised; jobs that have not begun are left.
        """
        ...
