"""The ranks of a distributed run: this process's, and the seed on which all agree."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import torch

from dali_diffusemix.errors import ConfigError

_WAIT: Final = timedelta(minutes=30)  # for rank 0 to make the same loader; as long as torch's own collectives wait
_asked: Counter[str] = Counter()  # agreements of this process, by what they are about


@dataclass(frozen=True)
class Ranks:
    """This process's rank and the world size: as given, or those of torch.distributed once it is initialised."""

    given: tuple[int, int] | None

    def __call__(self) -> tuple[int, int]:
        """(rank, world size); (0, 1) in a single process."""
        if self.given is not None:
            return self.given
        return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if initialised() else (0, 1)


def initialised() -> bool:
    """True if torch.distributed is in use."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def seeds_of_rank_0(subject: str, seeds: Sequence[int]) -> list[int]:
    """The seeds that rank 0 has for the same subject.

    Rank 0 leaves them in the store through which the processes found each other, and waits for nobody, so that a loader
    which only rank 0 makes does no harm. The others wait for it.

    Args:
        subject: What the seeds are for, the same text on all ranks; its n-th agreement here is its n-th on rank 0.
        seeds: This rank's.

    Raises:
        ConfigError: rank 0 did not take part within half an hour.
    """
    _asked[subject] += 1
    store: Any = torch.distributed.distributed_c10d._get_default_store()
    key = f"dali_diffusemix/seeds/{subject}/{_asked[subject]}"
    if torch.distributed.get_rank() == 0:
        store.set(key, json.dumps(list(seeds)))
        return list(seeds)
    try:
        store.wait([key], _WAIT)
    except RuntimeError as error:
        raise ConfigError(
            f"seed must be the same on all ranks, and rank 0 has made no loader of this dataset within {_WAIT}; let "
            "all ranks make it, or give rank=0, world_size=1 for a loader of one rank alone."
        ) from error
    found: list[int] = json.loads(store.get(key))
    return found
