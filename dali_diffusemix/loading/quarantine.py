"""The quarantine: substitutes for samples whose image cannot be read or decoded, and the log of such images.

A substitute is a function of the file and of (seed, epoch, index, view), never of what happened before: for a failed
edit the original unmixed, for a failed original the sample of the next index, in the same view, with that index's own
row and label. So a damaged file changes the samples that show it and no others, on every rank, in every worker and in
resumed runs.

Failures are remembered for the rest of an epoch: n damaged files in a row then cost n decodes, instead of n per sample.
That changes no sample, because a sample that failed would fail again.
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

_MOST: Final = 1000  # failures in a row after which the storage may be gone
_SPREAD: Final = 64  # samples that are tried then
_AHEAD: Final = 16  # rows that are decoded at once in a long run of failures
_EPOCHS: Final = 2  # epochs that are remembered
_KEPT: Final = 64 * 2**20  # bytes of substitutes that are kept for reuse
_WARNED: Final = 100  # images that get a warning each


class QuarantineWarning(UserWarning):
    """An image could not be read or decoded, and its sample was replaced."""


@dataclass(frozen=True)
class Quarantined:
    """An image that could not be read or decoded."""

    path: str
    kind: Kind
    reason: str
    epoch: int  # of the first sample that showed it
    index: int  # of that sample
    count: int = 1  # samples that showed it so far


class Quarantine(Mapping[str, Quarantined]):
    """A log of damaged images by path. Nothing depends on it."""

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
        """Log an image; each of the first 100 images gives a `QuarantineWarning` when it is new."""
        known = self._found.get(path)
        if known is not None:
            self._found[path] = replace(known, count=known.count + 1)
            return
        self._found[path] = Quarantined(path, kind, reason, epoch, index)
        if len(self._found) > _WARNED:
            if len(self._found) == _WARNED + 1:
                warnings.warn(
                    f"more than {_WARNED} images could not be read or decoded; the samples of further "
                    "ones are replaced without a warning; `quarantine` lists all of them with their reasons.",
                    QuarantineWarning,
                    stacklevel=2,
                )
            return
        instead = "its original is used unmixed" if kind == "edit" else "the sample of the next index replaces it"
        warnings.warn(
            f"{kind} {path!r} is left out of sample {index} of epoch {epoch}, {instead}: {reason}",
            QuarantineWarning,
            stacklevel=2,
        )


def check_on_error(on_error: str) -> None:
    """Raise ConfigError unless on_error is one of its two values."""
    if on_error not in ("substitute", "raise"):
        raise ConfigError(f"on_error must be 'substitute' or 'raise', found {on_error!r}.")


class Failure(NamedTuple):
    """The image of a sample that failed, and why."""

    kind: Kind
    error: DecodeError


class _Facts(Generic[_Pieces]):
    """The known failures of an epoch, two bytes per sample, and the latest substitutes."""

    def __init__(self, samples: int) -> None:
        self.originals = bytearray(samples)  # by index: set if the sample cannot be made at all
        self.edits = bytearray(samples)  # set if its view 0 can only be made unmixed; other views have other edits
        # By index and view, with the size of the pieces in bytes; last used last.
        self._made: dict[tuple[int, int], tuple[BatchPlan, _Pieces, int]] = {}
        self._size = 0  # bytes of all of them
        self._lock = threading.RLock()  # several iterators; a thread that an exception took out of it may enter again

    def of(self, kind: Kind) -> bytearray:
        return self.originals if kind == "original" else self.edits

    def following(self, index: int) -> Iterator[int]:
        """The samples after one that are not known to fail, in circular order."""
        for start, stop in ((index + 1, len(self.originals)), (0, index)):
            sample = self.originals.find(_UNKNOWN, start, stop)
            while sample >= 0:
                yield sample
                sample = self.originals.find(_UNKNOWN, sample + 1, stop)

    def made(self, index: int, view: int) -> tuple[BatchPlan, _Pieces] | None:
        """A kept substitute, or None."""
        with self._lock:
            kept = self._made.pop((index, view), None)
            if kept is None:
                return None
            self._made[index, view] = kept
        return kept[:2]

    def keep(self, row: BatchPlan, pieces: _Pieces, size: int) -> None:
        key = int(row.index[0]), int(row.view[0])
        with self._lock:
            before = self._made.pop(key, None)  # another thread's
            self._made[key] = row, pieces, size
            self._size += size - (0 if before is None else before[2])
            while len(self._made) > 1 and self._size > _KEPT:
                self._size -= self._made.pop(next(iter(self._made)))[2]


_UNKNOWN: Final = b"\0"
_LOGGED: Final = 1
_TOLD: Final = 2  # by another process, which has logged it


class Substitution(Generic[_Pieces]):
    """Finds substitutes for samples that cannot be made, or raises, as `on_error` says.

    Args:
        planner: Makes the rows of substitutes.
        name_of: Returns the name of the image of a plan of one row.
        on_error: "substitute" or "raise".
        size_of: Returns the size of pieces in bytes.
        told: Returns True if another process could not decode the original of a sample.
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
        """Return the substitutes for samples of a batch: by row of the batch, the plan of one row and its pieces.

        Args:
            plan: The batch.
            failures: The failures by row; the original's if both images failed.
            decode: Makes the pieces of a plan's rows; returns them and the failures by row.
            log: Gets every failure.

        Raises:
            DecodeError: with on_error="raise"; or no sample of the epoch can be made; or none of 1,000 in a row and
                none of a sample of the whole epoch.
        """
        facts = self._epochs.get(plan.epoch)
        if facts is None:
            while len(self._epochs) >= _EPOCHS:
                del self._epochs[next(iter(self._epochs))]
            facts = self._epochs[plan.epoch] = _Facts(len(self._planner))
        search = _Search(self, facts, decode, log)
        rows = {row: plan.row(row) for row in sorted(failures)}
        for row, sample in rows.items():  # all of them first, so that none is decoded again as another's substitute
            search.note(sample, failures[row])
        return {row: search.instead_of(sample, failures[row].kind) for row, sample in rows.items()}

    def forget(self) -> None:
        """Forget all failures: files may have been repaired since."""
        self._epochs.clear()

    def correct(self, epoch: int, indices: NDArray[np.int64]) -> None:
        """Forget an epoch's failures if one of these samples, (n,), could be made but was known to fail."""
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
        """Log a failure once per sample; with on_error="raise", raise it."""
        kind, error = failure
        name, index = self._whole._name_of(row, kind), int(row.index[0])
        if self._whole._on_error == "raise":
            error.add_note(f"{kind} of sample {index} of epoch {row.epoch}: {name}")
            raise error
        known = self._facts.of(kind)
        other = kind == "edit" and row.view[0] > 0
        if other or known[index] != _LOGGED:
            if not other:
                known[index] = _LOGGED
            self._log.add(kind, name, str(error), row.epoch, index)
        self._last = f"{name!r}: {error}"

    def instead_of(self, row: BatchPlan, kind: Kind) -> tuple[BatchPlan, _Pieces]:
        """The substitute for a sample whose failure was noted."""
        found = self._made(row.unmixed()) if kind == "edit" else None
        return found or self._following(row.epoch, int(row.index[0]), int(row.view[0]))

    def _made(self, row: BatchPlan) -> tuple[BatchPlan, _Pieces] | None:
        """A sample, unmixed if its edit fails; None if its original fails."""
        while True:
            pieces, failures = self._decode(row)
            if not failures:
                return row, pieces
            self.note(row, failures[0])
            if failures[0].kind == "original":
                return None
            row = row.unmixed()

    def _following(self, epoch: int, index: int, view: int) -> tuple[BatchPlan, _Pieces]:
        """The first sample after this one that can be made."""
        tried, ahead, asked = 0, 1, False
        candidates = self._facts.following(index)
        while chosen := self._next(candidates, ahead, view):
            if (kept := self._facts.made(chosen[0], view)) is not None:
                return kept
            for row in self._promising(self._plan(epoch, chosen, view)):
                if (kept := self._facts.made(int(row.index[0]), view)) is not None:
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
            f"none of {tried} samples in a row could be made. Check that the storage is there. "
            f"The last failure: {self._last}."
        )

    def _next(self, candidates: Iterator[int], count: int, view: int) -> list[int]:
        chosen: list[int] = []
        for index in candidates:
            if self._whole._told(index):
                self._facts.originals[index] = _TOLD
                continue
            chosen.append(index)
            if len(chosen) == count or self._facts.made(index, view) is not None:
                break
        return chosen

    def _plan(self, epoch: int, indices: list[int], view: int) -> BatchPlan:
        plan = self._planner.batch(epoch, indices, view)
        edits = self._facts.edits
        unmixed = {row: plan.row(row).unmixed() for row, index in enumerate(indices) if view == 0 and edits[index]}
        return plan.with_rows(unmixed) if unmixed else plan

    def _promising(self, plan: BatchPlan) -> Iterator[BatchPlan]:
        """The rows whose original can be decoded; several rows are decoded at once to find out, one is not."""
        if len(plan) == 1:
            yield plan
            return
        _, failures = self._decode(plan)
        for i in range(len(plan)):
            row = plan.row(i)
            if i in failures and failures[i].kind == "original":
                self.note(row, failures[i])
            else:
                yield row  # decoded again, so that it keeps no memory but its own

    def _any_elsewhere(self, epoch: int) -> bool:
        """True if any of a sample of the epoch can be made, leaving out known failures."""
        spread = np.unique(np.linspace(0, len(self._planner) - 1, _SPREAD).astype(np.int64))
        for index in (one for one in spread.tolist() if not self._facts.originals[one]):
            _, failures = self._decode(self._planner.batch(epoch, [index]).unmixed())
            if not failures:
                return True
        return False
