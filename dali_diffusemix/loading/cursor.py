"""The cursor: which epoch comes next, how far the newest iterator is, and the state from which a run resumes.

    iter()       begin(): a `Run` at the next epoch, or where a loaded state says; the epoch after it comes next
    next()       run.started = True, then run.delivered = ...  for each batch
    the end      finish(run): the run stands at the beginning of the epoch after it
    set_epoch    the epoch of the next iter(); a run that was not asked for a batch yet moves along
    state_dict   where the newest run stands; without one, the beginning of the next epoch

Everything is counted in delivered batches, so what is read or decoded ahead does not count. The order (the loader's own
or a user's sampler) says what an epoch holds; the cursor only says where in it the loader is.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Final, NamedTuple

from dali_diffusemix.base.philox import check_seed
from dali_diffusemix.errors import ConfigError
from dali_diffusemix.loading.samplers import Order

_VERSION: Final = 1
_REMEDIES: Final = {
    "seed": "give the dataset this seed",
    "length": "give the dataset the same originals, mix and, in an expanded epoch, edits",
    "shuffle": "give the loader the same shuffle",
    "fingerprint": "give the dataset the same originals: it covers their relative paths and labels",
}


class Identity(NamedTuple):
    """The dataset and order of a state: a state of anything else is refused."""

    seed: int
    length: int  # samples in an epoch
    shuffle: bool
    fingerprint: str  # of the catalog
    schedules: Sequence[Mapping[str, str]] = ()  # the settings of each dataset that change with the epoch


@dataclass
class Run:
    """The position of one iterator."""

    epoch: int
    delivered: int  # positions of the order, by all ranks together; with a user's sampler, of its indices
    sampler: object  # the order's state when the epoch began
    checksum: int = 0  # of the delivered indices of a sampler
    started: bool = False  # a batch was asked for
    running: bool = True  # until it is finished or closed


class Cursor:
    """The position of a loader.

    Args:
        order: The batches of an epoch.
        identity: The dataset and order that states belong to.
        has_sampler: The order is a user's, and its state is part of a state.
        announce: Called with each epoch that is begun or set.
    """

    def __init__(
        self,
        order: Order,
        identity: Identity,
        *,
        has_sampler: bool,
        announce: Callable[[int], None] | None = None,
    ) -> None:
        self._announce = announce
        self.order = order
        self._identity = identity
        self._has_sampler = has_sampler
        self._next = (0, 0)  # epoch and delivered positions that the next run begins with
        self._checksum = 0  # of those positions
        self._newest: Run | None = None  # None: the next run decides, as after `load`
        self._lock = threading.RLock()  # a thread that an exception took out of it may enter again

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_newest": None, "_lock": None}  # iterators stay behind

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()  # a thread that an exception took out of it may enter again

    @property
    def next_epoch(self) -> int:
        """The epoch of the next `begin`."""
        return self._next[0]

    def begin(self) -> Run:
        """Begin the next epoch, or resume where a loaded state says."""
        with self._lock:  # several threads may begin: each gets an epoch and a run of its own
            epoch, delivered = self._next
            self._next = epoch + 1, 0
            run = self._newest = Run(epoch, delivered, self.order.begin(), self._checksum)
            self._checksum = 0
        self.announce(epoch)
        return run

    def announce(self, epoch: int) -> None:
        """Say that an epoch is begun, by this cursor or by a user of the order."""
        if self._announce is not None:
            self._announce(epoch)

    def finish(self, run: Run) -> None:
        """A run has delivered everything: a state taken from here on is the beginning of the epoch after it."""
        if run is self._newest:
            run.epoch, run.delivered, run.sampler, run.checksum = run.epoch + 1, 0, self.order.state(), 0
        run.running = False

    def adopt(self, order: Order, identity: Identity) -> None:
        """Take the order of another seed; the position stays."""
        self.order, self._identity = order, identity

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next run. A position inside that epoch, as a loaded state gives it, is kept."""
        check_seed(self._identity.seed, epoch)
        self.announce(epoch)
        run = self._newest
        if run is not None and run.running and not run.started:
            # DataLoader asks its sampler at the first `next`, and so do we.
            self._next, self._checksum = (run.epoch, run.delivered), run.checksum
            if epoch != run.epoch:
                run.epoch, run.delivered, run.checksum = epoch, 0, 0
        if epoch != self._next[0]:
            self._next, self._checksum = (epoch, 0), 0
        if run is not None and not run.running:
            self._newest = None

    def state(self) -> dict[str, Any]:
        """The position as plain data, of the same size wherever it is."""
        run = self._newest
        epoch, delivered = self._next if run is None else (run.epoch, run.delivered)
        identity = self._identity
        state: dict[str, Any] = {
            "version": _VERSION,
            "seed": identity.seed,
            "epoch": epoch,
            "places": delivered,
            "length": identity.length,
            "shuffle": identity.shuffle,
            "fingerprint": identity.fingerprint,
        }
        if identity.schedules:
            state["schedules"] = [dict(one) for one in identity.schedules]
        if self._has_sampler:
            state["sampler"] = self.order.state() if run is None else run.sampler
            state["checksum"] = self._checksum if run is None else run.checksum
        return state

    def load(self, state: Mapping[str, Any], *, any_seed: bool = False) -> None:
        """Let the next run begin where a state was taken.

        Args:
            state: The state.
            any_seed: It may be of another seed, which the caller takes over then.

        Raises:
            ConfigError: it is no state of this version, it belongs to something else, or no batch begins there.
        """
        if not isinstance(state, Mapping) or state.get("version") != _VERSION:
            found = state.get("version") if isinstance(state, Mapping) else type(state).__name__
            raise ConfigError(f"state must be of version {_VERSION}, from a DiffuseMixLoader, found {found}.")
        for name, remedy in _REMEDIES.items():
            ours = getattr(self._identity, name)
            if state.get(name) != ours and not (any_seed and name == "seed"):
                raise ConfigError(f"{name} of the state is {state.get(name)!r}, here it is {ours!r}; {remedy}.")
        _check_schedules(state.get("schedules", ()), self._identity.schedules)
        if ("sampler" in state) != self._has_sampler:
            there, here = ("a", "none") if "sampler" in state else ("no", "one")
            raise ConfigError(
                f"the state was taken with {there} sampler, this loader has {here}; give the loader the same sampler."
            )
        try:
            epoch, delivered = int(state["epoch"]), int(state["places"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"state must hold whole numbers as epoch and places, found {dict(state)!r}.") from error
        check_seed(state["seed"], epoch)
        checksum = state.get("checksum")
        self.order.resume(delivered, state.get("sampler"), checksum)
        self._next, self._checksum = (epoch, delivered), checksum or 0
        self._newest = None


def _check_schedules(theirs: Any, ours: Sequence[Mapping[str, str]]) -> None:
    """Refuse a state of other Schedules: with them the rest of the run would be another."""
    if not isinstance(theirs, Sequence) or not all(isinstance(one, Mapping) for one in theirs):
        raise ConfigError(f"state must hold a table of each dataset as schedules, found {theirs!r}.")
    none: Mapping[str, str] = {}
    for number, (there, here) in enumerate(zip_longest(theirs, ours, fillvalue=none)):
        for name in sorted({*there, *here}):
            if there.get(name) != here.get(name):
                of = f" of dataset {number}" if max(len(theirs), len(ours)) > 1 else ""
                raise ConfigError(
                    f"{name}{of} of the state is {there.get(name, 'no Schedule')}, here it is "
                    f"{here.get(name, 'no Schedule')}; give the dataset the same {name}."
                )
