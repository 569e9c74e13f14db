"""The engine of a Ray cluster: one actor per worker. Ray is imported only here."""

import logging
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from dali_diffusemix.errors import ConfigError, DiffuseMixError, MissingDependencyError, WorkerError
from dali_diffusemix.generate.engines import Job, Report

_log = logging.getLogger(__name__)

_PATIENCE = 60.0  # seconds before the warning that no worker has started
_CONNECT = 10.0  # seconds that a cluster's address has to answer


class RayEngine:
    """Runs jobs in actors of a Ray cluster. An actor that dies is replaced, and its job is started again.

    Originals and store must be at the same paths on all nodes, and the package installed there.
    """

    def __init__(
        self,
        *,
        address: str | None = None,
        workers: int | None = None,
        num_gpus: float | None = None,
        num_cpus: float = 1,
        attempts: int = 3,
    ) -> None:
        """Describe the workers; `run` connects to the cluster.

        Args:
            address: Of the cluster; None: the one that this process is connected to, else a new one on this machine.
            workers: The number of actors; None: as many as the cluster has room for at present.
            num_gpus: GPUs per actor, possibly less than 1; None: 1 if the cluster has any.
            num_cpus: CPUs per actor.
            attempts: How often a job is started at most if its actors die.

        Raises:
            ConfigError: A number is out of range.
        """
        for name, value, least in (("workers", workers, 1), ("num_gpus", num_gpus, 0), ("attempts", attempts, 1)):
            if value is not None and value < least:
                raise ConfigError(f"{name} must be {least} or more, found {value!r}.")
        if num_cpus <= 0:
            raise ConfigError(f"num_cpus must be more than 0, found {num_cpus!r}.")
        self.address = address
        self.workers = workers
        self.num_gpus = num_gpus
        self.num_cpus = num_cpus
        self.attempts = attempts
        self._stopped = False

    def run(self, start: Callable[[str], Callable[[Job], Iterable[Report]]], jobs: Sequence[Job]) -> Iterator[Report]:
        """Yield the reports of all jobs as they come; see `Engine.run`.

        Raises:
            MissingDependencyError: Ray is not installed.
            ConfigError: The cluster does not answer.
            WorkerError: No node of the cluster can run a worker, or the actors of a job died, as often as it may be
                started.
        """
        self._stopped = False
        if not jobs:
            return
        ray = _ray()
        ours = not ray.is_initialized()
        if ours:
            try:
                _knock(self.address)
                ray.init(
                    address=self.address,
                    include_dashboard=None if self.address else False,
                    logging_level=logging.WARNING,
                )
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ConfigError(
                    f"address must be that of a Ray cluster that answers, found {self.address!r}: {error}."
                ) from error
        try:
            yield from _RayRun(ray, self, start, jobs).reports()
        finally:
            if ours:
                ray.shutdown()

    def stop(self) -> None:
        """Start no more jobs; `run` ends with those under way."""
        self._stopped = True

    @property
    def stopped(self) -> bool:
        """True if no more jobs are to be started."""
        return self._stopped


class _Actor:
    """Runs jobs one after another in a process of the cluster."""

    def __init__(self, start: Callable[[str], Callable[[Any], Iterable[Any]]], device: str) -> None:
        self._start, self._device = start, device
        self._work: Callable[[Any], Iterable[Any]] | None = None

    def do(self, job: Any) -> Iterator[Any]:
        # Here, so that an error is one of a job: in __init__ it would look like an actor that died.
        self._work = self._work or self._start(self._device)
        yield from self._work(job)


class _RayRun:
    """One call of `RayEngine.run`."""

    def __init__(self, ray: Any, engine: RayEngine, start: Callable[[str], Any], jobs: Sequence[Any]) -> None:
        self._ray = ray
        self._engine = engine
        self._attempts = engine.attempts
        resources = ray.cluster_resources()
        gpus = (1.0 if resources.get("GPU") else 0.0) if engine.num_gpus is None else engine.num_gpus
        wanted = {name: value for name, value in (("GPU", gpus), ("CPU", engine.num_cpus)) if value}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(node.get(name, 0) >= value for name, value in wanted.items()) for node in nodes):
            raise WorkerError(
                f"a worker needs {wanted}, and no node of the Ray cluster has that: "
                f"{[{name: node.get(name, 0) for name in wanted} for node in nodes]}; ask for less with num_gpus."
            )
        room = int(min(resources.get(name, 0) // value for name, value in wanted.items()))
        self._count = min(len(jobs), engine.workers or max(1, room))
        self._waiting: deque[tuple[Any, int]] = deque((job, 1) for job in jobs)
        self._start = ray.put(start)
        self._device = "cuda" if gpus else "cpu"
        self._class = ray.remote(num_gpus=gpus, num_cpus=engine.num_cpus, max_restarts=0)(_Actor)
        self._at: dict[Any, tuple[Any, Any, int]] = {}  # a stream of reports to its actor, job and attempt

    def reports(self) -> Iterator[Any]:
        ray, begun = self._ray, False
        try:
            for _ in range(self._count):
                self._begin(self._class.remote(self._start, self._device))
            while self._at:
                ready, _ = ray.wait(list(self._at), num_returns=1, timeout=None if begun else _PATIENCE)
                if not ready:
                    _log.warning(
                        "No worker has started after %d s: the Ray cluster is busy, or loads; %s are free.",
                        _PATIENCE,
                        ray.available_resources(),
                    )
                begun = True
                for stream in ready:
                    yield from self._next(stream)
        finally:
            for actor, _, _ in self._at.values():
                ray.kill(actor)

    def _begin(self, actor: Any) -> None:
        """Give an actor the next job; end it if there is none."""
        if self._waiting and not self._engine.stopped:
            job, attempt = self._waiting.popleft()
            self._at[actor.do.options(num_returns="streaming").remote(job)] = actor, job, attempt
        else:
            self._ray.kill(actor)

    def _next(self, stream: Any) -> Iterator[Any]:
        """Take the next report of a stream, its end, or its error."""
        ray = self._ray
        actor, job, attempt = self._at[stream]
        try:
            report = ray.get(next(stream))
        except StopIteration:
            del self._at[stream]
            self._begin(actor)
            return
        except ray.exceptions.RayActorError as error:
            del self._at[stream]
            if attempt >= self._attempts:
                raise WorkerError(f"an actor of Ray died {attempt} times over the same job, {job}: {error}.") from error
            _log.warning("An actor of Ray died; its job is started again in a new one. %s", str(error).splitlines()[0])
            self._waiting.appendleft((job, attempt + 1))
            self._begin(self._class.remote(self._start, self._device))
            return
        except ray.exceptions.RayTaskError as error:
            # Ours are raised as they were; others keep the actor's traceback.
            raise error.cause if isinstance(error.cause, DiffuseMixError) else error from None
        yield report


def _knock(address: str | None) -> None:
    """Raise ConnectionError if nothing answers at host:port; Ray itself would try for minutes.

    Other kinds of addresses ("auto", "local", ray://) are left to Ray.
    """
    host, _, port = (address or "").rpartition(":")
    if not host or "://" in host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(str(error)) from error


def _ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise MissingDependencyError("this engine needs Ray; run `pip install 'dali-diffusemix[ray]'`.") from error
    return ray
