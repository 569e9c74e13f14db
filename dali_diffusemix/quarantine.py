"""What happens to a sample whose image cannot be read or decoded, and the log of such images.

Substitution is a function of the file and of (seed, epoch, index), never of what happened before: a failed edit gives
the original unmixed, a failed original the sample of the next index with that index's own row and label. So a damaged
file changes the samples that it is in and no others, in every rank, worker and resumed run alike.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal, NamedTuple, TypeVar

from dali_diffusemix.errors import ConfigError, DecodeError
from dali_diffusemix.plan import BatchPlan, Planner

Kind = Literal["original", "edit"]
OnError = Literal["substitute", "raise"]
_Pieces = TypeVar("_Pieces")

# In a row: then it is not files that are damaged, but storage that is gone.
_MOST: Final = 1000


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
    count: int = 1  # samples that it was in so far


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
        """Log an image; a `QuarantineWarning` where it is new."""
        known = self._found.get(path)
        if known is not None:
            self._found[path] = replace(known, count=known.count + 1)
            return
        self._found[path] = Quarantined(path, kind, reason, epoch, index)
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


class Substitution:
    """Finds the sample that takes the place of one that cannot be made, or raises, as `on_error` says.

    Args:
        planner: Whose rows they are.
        path_of: Names the image of a row of a plan.
        on_error: "substitute" or "raise".
    """

    def __init__(self, planner: Planner, path_of: Callable[[BatchPlan, Kind], str], on_error: OnError) -> None:
        self._planner = planner
        self._path_of = path_of
        self._on_error = on_error

    def __call__(
        self,
        row: BatchPlan,
        failure: Failure,
        decode: Callable[[BatchPlan], tuple[_Pieces, Failure | None]],
        log: Quarantine,
    ) -> tuple[BatchPlan, _Pieces]:
        """Return the row, of 1 sample, that takes the place of `row`, and its pieces.

        Args:
            row: The row that failed, of 1 sample.
            failure: What failed of it. Where both failed, the original.
            decode: Makes a row's pieces; if that fails, what it says about them.
            log: Where every failure is logged.

        Raises:
            DecodeError: with on_error="raise"; or none of 1,000 samples in a row can be made.
        """
        for _ in range(_MOST):
            kind, error = failure
            path, index = self._path_of(row, kind), int(row.index[0])
            if self._on_error == "raise":
                error.add_note(f"{kind} of sample {index} of epoch {row.epoch}: {path}")
                raise error
            log.add(kind, path, str(error), row.epoch, index)
            if kind == "edit":
                row = row.unmixed()
            else:
                row = self._planner.batch(row.epoch, [(index + 1) % len(self._planner)])
            pieces, again = decode(row)
            if again is None:
                return row, pieces
            failure = again
        raise DecodeError(
            f"none of {_MOST} samples in a row could be made. Is the storage there? The last: {path!r}: {error}"
        )
