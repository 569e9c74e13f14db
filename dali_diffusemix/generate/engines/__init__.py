"""Engines: where the shards of an edit store are made. Which engine ran cannot be seen in the result.

An engine is one method. `LocalEngine` works in this process, or in one process for each device; `RayEngine` in actors
of a Ray cluster.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

Job = TypeVar("Job")
Report = TypeVar("Report")


class Engine(Protocol):
    """Runs jobs, each whole and on its own."""

    def run(self, start: Callable[[str], Callable[[Job], Iterable[Report]]], jobs: Sequence[Job]) -> Iterator[Report]:
        """Run every job, in any order and on any number of processes, and yield its reports as they come.

        Args:
            start: Called once in each process that works, with its device ("cpu", "cuda", "cuda:1"); returns what does
                one job, and holds what is costly to make (a model). It, the jobs and the reports can be pickled.
            jobs: What to do. A job that is done twice, after a process was lost, leaves the same as one done once; its
                reports say how far the job has come, not what is new, so that a repeated one counts once.

        Raises:
            DiffuseMixError: The first error that a job raised; jobs not yet begun are left.
        """
        ...
