"""What happens to a sample whose image cannot be read or decoded, and the log of such images.

Substitution is a function of the file and of (seed, epoch, index), never of what happened before: a failed edit gives
the original unmixed, a failed original the sample of the next index with that index's own row and label. So a damaged
file changes the samples that it is in and no others, in every rank, worker and resumed run alike.

What failed is remembered for the rest of an epoch: a run of n damaged files then costs n decodes, and not n for each of
its samples. That saves time and changes no sample, for a sample that failed fails again.
"""

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final, Generic, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.errors import ConfigError, DecodeError
from dali_diffusemix.plan.batch import BatchPlan, Planner

Kind = Literal["original", "edit"]
OnError = Literal["substitute", "raise"]
_Pieces = TypeVar("_Pieces")

_MOST: Final = 1000  # in a row: then perhaps it is not files that are damaged, but storage that is gone
_SPREAD: Final = 64  # others that are tried then
_AHEAD: Final = 16  # tried at once in a long run
_EPOCHS: Final = 2  # that are remembered
_KEPT: Final = 64 * 2**20  # bytes of substitutes that are kept, to be used again
_WARNED: Final = 100  # images named by warnings


class QuarantineWarning(UserWarning):
    """An image could not be read or decoded, and another sample took its sample's place."""


@dataclass(frozen=True)
class Quarantined:
    """An image that could not be read or decoded."""

    path: str
    kind: Kind
    reason: str
    epoch: int  # of the first sample that it was in
    index: int  # of that sample
    count: int = 1  # samples of the plan that it was in so far


class Quarantine(Mapping[str, Quarantined]):
    """Path to what became of it. A log: nothing depends on it."""

    def __init__(self) -> None:
        self._found: dict[str, Quarantined] = {}

    def __getitem__(self, path: str) -> Quarantined:
        return self._found[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __repr__(self) -> str:
        return f"<Quarantine of {len(self)} images: {list(self)[:3]}{'...' if len(self) > 3 else ''}>"

    def add(self, kind: Kind, path: str, reason: str, epoch: int, index: int) -> None:
        """Log an image; a `QuarantineWarning` where it is new, for the first 100 images."""
        known = self._found.get(path)
        if known is not None:
            self._found[path] = replace(known, count=known.count + 1)
            return
        self._found[path] = Quarantined(path, kind, reason, epoch, index)
        if len(self._found) > _WARNED:
            if len(self._found) == _WARNED + 1:
                warnings.warn(
                    f"more than {_WARNED} images could not be read or decoded; further ones are replaced without a "
                    "warning each: `quarantine` has all of them, with their reasons",
                    QuarantineWarning,
                    stacklevel=2,
                )
            return
        instead = "its original is used unmixed" if kind == "edit" else "the sample of the next index takes its place"
        warnings.warn(
            f"{kind} {path!r} is left out of sample {index} of epoch {epoch}, {instead}: {reason}",
            QuarantineWarning,
            stacklevel=2,
        )


def check_on_error(on_error: str) -> None:
    """Raise ConfigError unless it is one of the two."""
    if on_error not in ("substitute", "raise"):
        raise ConfigError(f"on_error must be 'substitute' or 'raise', found {on_error!r}")


class Failure(NamedTuple):
    """Why a sample cannot be made."""

    kind: Kind
    error: DecodeError


class _Facts(Generic[_Pieces]):
    """What is known of an epoch's samples: two bytes for each, and the latest substitutes."""

    def __init__(self, samples: int) -> None:
        self.originals = bytearray(samples)  # by index: whether the sample cannot be made at all
        self.edits = bytearray(samples)  # whether it can be made unmixed alone
        self._made: dict[int, tuple[BatchPlan, _Pieces, int]] = {}  # with the bytes of the pieces; last used last
        self._size = 0  # bytes of all of them
        self._lock = threading.Lock()  # iterators in several threads

    def of(self, kind: Kind) -> bytearray:
        return self.originals if kind == "original" else self.edits

    def following(self, index: int) -> Iterator[int]:
        """The samples after one that are not known to fail, round the end of the epoch, up to it."""
        for start, stop in ((index + 1, len(self.originals)), (0, index)):
            place = self.originals.find(_UNKNOWN, start, stop)
            while place >= 0:
                yield place
                place = self.originals.find(_UNKNOWN, place + 1, stop)

    def made(self, index: int) -> tuple[BatchPlan, _Pieces] | None:
        """A substitute that is kept."""
        with self._lock:
            kept = self._made.pop(index, None)
            if kept is None:
                return None
            self._made[index] = kept
        return kept[:2]

    def keep(self, row: BatchPlan, pieces: _Pieces, size: int) -> None:
        with self._lock:
            before = self._made.pop(int(row.index[0]), None)  # another thread's
            self._made[int(row.index[0])] = row, pieces, size
            self._size += size - (0 if before is None else before[2])
            while len(self._made) > 1 and self._size > _KEPT:
                self._size -= self._made.pop(next(iter(self._made)))[2]


_UNKNOWN: Final = b"\0"
_LOGGED: Final = 1
_TOLD: Final = 2  # by another process, which has logged it


class Substitution(Generic[_Pieces]):
    """Finds the samples that take the place of those that cannot be made, or raises, as `on_error` says.

    Args:
        planner: Whose rows they are.
        name_of: Names the image of a row of a plan of 1 sample.
        on_error: "substitute" or "raise".
        size_of: How many bytes pieces have.
        told: Whether another process has found that the original of a sample cannot be decoded.
    """

    def __init__(
        self,
        planner: Planner,
        name_of: Callable[[BatchPlan, Kind], str],
        on_error: OnError,
        *,
        size_of: Callable[[_Pieces], int],
        told: Callable[[int], bool] = lambda index: False,
    ) -> None:
        self._planner = planner
        self._name_of = name_of
        self._on_error = on_error
        self._size_of = size_of
        self._told = told
        self._epochs: dict[int, _Facts[_Pieces]] = {}

    def __call__(
        self,
        plan: BatchPlan,
        failures: Mapping[int, Failure],
        decode: Callable[[BatchPlan], tuple[_Pieces, Mapping[int, Failure]]],
        log: Quarantine,
    ) -> dict[int, tuple[BatchPlan, _Pieces]]:
        """Return what takes the place of samples of a batch: by place the row, of 1 sample, and its pieces.

        Args:
            plan: The batch.
            failures: By place, what failed; of a sample of which both failed, the original.
            decode: Makes the pieces of a plan's rows; says by place what failed.
            log: Where every failure is logged.

        Raises:
            DecodeError: with on_error="raise"; or no sample of the epoch can be made, or none of 1,000 in a row and
                none of others all over the epoch.
        """
        facts = self._epochs.get(plan.epoch)
        if facts is None:
            while len(self._epochs) >= _EPOCHS:
                del self._epochs[next(iter(self._epochs))]
            facts = self._epochs[plan.epoch] = _Facts(len(self._planner))
        search = _Search(self, facts, decode, log)
        rows = {place: plan.row(place) for place in sorted(failures)}
        for place, row in rows.items():  # all of them first: then none is decoded again as another's substitute
            search.note(row, failures[place])
        return {place: search.instead_of(row, failures[place].kind) for place, row in rows.items()}

    def forget(self) -> None:
        """Begin anew: files may have been mended since."""
        self._epochs.clear()

    def correct(self, epoch: int, indices: NDArray[np.int64]) -> None:
        """Forget what is known, if these samples, (n,), that could be made, were known to fail: a file was mended."""
        facts = self._epochs.get(epoch)
        if facts is not None and any(facts.originals[index] for index in indices.tolist()):
            del self._epochs[epoch]


class _Search(Generic[_Pieces]):
    """One call of `Substitution`."""

    def __init__(
        self,
        whole: Substitution[_Pieces],
        facts: _Facts[_Pieces],
        decode: Callable[[BatchPlan], tuple[_Pieces, Mapping[int, Failure]]],
        log: Quarantine,
    ) -> None:
        self._whole = whole
        self._planner = whole._planner
        self._facts = facts
        self._decode = decode
        self._log = log

    def note(self, row: BatchPlan, failure: Failure) -> None:
        """Log what failed, once for each sample; raise it, if that is asked for."""
        kind, error = failure
        name, index = self._whole._name_of(row, kind), int(row.index[0])
        if self._whole._on_error == "raise":
            error.add_note(f"{kind} of sample {index} of epoch {row.epoch}: {name}")
            raise error
        known = self._facts.of(kind)
        if known[index] != _LOGGED:
            known[index] = _LOGGED
            self._log.add(kind, name, str(error), row.epoch, index)
        self._last = f"{name!r}: {error}"

    def instead_of(self, row: BatchPlan, kind: Kind) -> tuple[BatchPlan, _Pieces]:
        """What takes the place of a sample that failed, after that was noted."""
        found = self._made(row.unmixed()) if kind == "edit" else None
        return found or self._following(row.epoch, int(row.index[0]))

    def _made(self, row: BatchPlan) -> tuple[BatchPlan, _Pieces] | None:
        """A sample, unmixed if its edit fails; None if its original does."""
        while True:
            pieces, failures = self._decode(row)
            if not failures:
                return row, pieces
            self.note(row, failures[0])
            if failures[0].kind == "original":
                return None
            row = row.unmixed()

    def _following(self, epoch: int, index: int) -> tuple[BatchPlan, _Pieces]:
        """The first sample after one that can be made."""
        tried, ahead, asked = 0, 1, False
        candidates = self._facts.following(index)
        while chosen := self._next(candidates, ahead):
            if (kept := self._facts.made(chosen[0])) is not None:
                return kept
            for row in self._promising(self._plan(epoch, chosen)):
                if (kept := self._facts.made(int(row.index[0]))) is not None:
                    return kept
                if (found := self._made(row)) is not None:
                    self._facts.keep(*found, self._whole._size_of(found[1]))
                    return found
            tried += len(chosen)
            ahead = min(2 * ahead, _AHEAD)
            if tried >= _MOST and not asked:
                asked = True
                if not self._any_elsewhere(epoch):
                    break
        else:
            tried = len(self._planner)
        raise DecodeError(
            f"none of {tried} samples in a row could be made. Is the storage there? The last: {self._last}"
        )

    def _next(self, candidates: Iterator[int], count: int) -> list[int]:
        chosen: list[int] = []
        for index in candidates:
            if self._whole._told(index):
                self._facts.originals[index] = _TOLD
                continue
            chosen.append(index)
            if len(chosen) == count or self._facts.made(index) is not None:
                break
        return chosen

    def _plan(self, epoch: int, indices: list[int]) -> BatchPlan:
        plan = self._planner.batch(epoch, indices)
        edits = self._facts.edits
        unmixed = {place: plan.row(place).unmixed() for place, index in enumerate(indices) if edits[index]}
        return plan.with_rows(unmixed) if unmixed else plan

    def _promising(self, plan: BatchPlan) -> Iterator[BatchPlan]:
        """Of several rows, decoded at once to find out, those whose original does not fail; of one, that."""
        if len(plan) == 1:
            yield plan
            return
        _, failures = self._decode(plan)
        for place in range(len(plan)):
            row = plan.row(place)
            if place in failures and failures[place].kind == "original":
                self.note(row, failures[place])
            else:
                yield row  # decoded again, so that it holds no memory but its own

    def _any_elsewhere(self, epoch: int) -> bool:
        """Whether any of some samples all over the epoch can be made, of those that are not known to fail."""
        spread = np.unique(np.linspace(0, len(self._planner) - 1, _SPREAD).astype(np.int64))
        for index in (one for one in spread.tolist() if not self._facts.originals[one]):
            _, failures = self._decode(self._planner.batch(epoch, [index]).unmixed())
            if not failures:
                return True
        return False
