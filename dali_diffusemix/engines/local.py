"""The engine that needs nothing: one job after another, in this process."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from dali_diffusemix.engines import Job, Report


class LocalEngine:
    """Runs jobs in this process, in their order."""

    def run(self, start: Callable[[], Callable[[Job], Iterable[Report]]], jobs: Sequence[Job]) -> Iterator[Report]:
        """Yield the reports of each job in turn; see `Engine.run`."""
        if not jobs:
            return  # nothing is worth loading a model for
        work = start()
        for job in jobs:
            yield from work(job)
