"""An estimate of a run, from a few edits that are made and thrown away."""

import math
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from dali_diffusemix.catalog.table import Catalog
from dali_diffusemix.generate.config import GenerateConfig
from dali_diffusemix.generate.engines import Job, Report
from dali_diffusemix.generate.run import Redoable, edits_to_make, generate, list_originals
from dali_diffusemix.store import DENIED, WHOLE, Part
from dali_diffusemix.store.layout import UNREADABLE

# Edits to make: a model takes seconds for each, other editors milliseconds.
_TRIES_BY_MODEL: Final = 8
_TRIES: Final = 64


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The work of a run."""

    edits: int  # that it would make
    bytes: int  # that they would take
    seconds: float  # that it would take
    tried: int  # edits that bytes and seconds were estimated from; 0: they are unknown


def estimate(
    root: str | os.PathLike[str],
    store: str | os.PathLike[str],
    config: GenerateConfig,
    *,
    catalog: Catalog | None = None,
    devices: Sequence[str] = ("cpu",),
    part: Part = WHOLE,
    redo: Collection[Redoable] = (),
) -> Estimate:
    """Estimate the `generate` with the same arguments, from a few edits that one worker makes.

    Nothing is written to the store. Without a store, or to extend one, all originals are taken as equally laborious.

    Args:
        root: The folder of originals, or a packed store.
        store: The edit store, which need not exist.
        config: The edits to make.
        catalog: The originals to use; by default `list_originals(root)`.
        devices: The devices of the run, one for each worker.
        part: The shards that the run makes.
        redo: The edits that it makes again.

    Raises:
        ConfigError, CatalogError, StoreError: As `generate`.
    """
    originals = list_originals(root) if catalog is None else catalog
    edits = edits_to_make(root, store, config, catalog=originals, part=part, redo=redo)
    nothing = Estimate(edits=edits, bytes=0, seconds=0, tried=0)
    if not edits:
        return nothing
    tries = _TRIES_BY_MODEL if config.editor_config.accelerated else _TRIES
    each = len(config.all_prompts) * config.variants
    count = min(len(originals), max(2, math.ceil(tries / each)))
    some = originals.take(np.unique(np.linspace(0, len(originals) - 1, count).astype(np.int64)))
    watch = _Stopwatch(devices[0])
    with tempfile.TemporaryDirectory(prefix="dali-diffusemix-") as folder:
        trial = Path(folder) / "edits"
        verdicts = generate(root, trial, config, catalog=some, engine=watch).verdicts
        made = sum(count for name, count in verdicts.items() if name not in (DENIED, UNREADABLE))
        if not made:
            return nothing
        size = sum(file.stat().st_size for file in trial.rglob("*.tar")) + sum(
            file.stat().st_size for file in (trial / "shards").glob("*.npy")
        )
    return Estimate(
        edits=edits,
        bytes=round(edits * size / made),
        seconds=watch.loading + edits * watch.working / made / len(devices),
        tried=made,
    )


class _Stopwatch:
    """An engine that runs jobs in this process, and measures how long it takes to begin and to work."""

    def __init__(self, device: str) -> None:
        self.devices = (device,)
        self.loading = self.working = 0.0  # seconds

    def run(self, start: Callable[[str], Callable[[Job], Iterable[Report]]], jobs: Sequence[Job]) -> Iterator[Report]:
        begin = time.perf_counter()
        work = start(self.devices[0])
        ready = time.perf_counter()
        for job in jobs:
            yield from work(job)
        self.loading, self.working = ready - begin, time.perf_counter() - ready
