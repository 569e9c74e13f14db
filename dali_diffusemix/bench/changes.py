"""Changes that could make loading faster, to be tried."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.base.cpus import cpus
from dali_diffusemix.bench.contenders import Factory, diffusemix
from dali_diffusemix.bench.material import LEAST_BATCHES, Material, random_rows, reduced
from dali_diffusemix.bench.result import Measurement, Trial
from dali_diffusemix.catalog.table import Catalog
from dali_diffusemix.loading.dataset import DiffuseMixDataset
from dali_diffusemix.store.pack import PackConfig, pack

__all__ = ["contenders_of", "packing", "settings", "trials_of"]

_PACKED: Final = 256  # originals that are packed to try packing


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change to try: this package's loader with it and without it."""

    setting: str  # as in `Trial`
    change: str
    before: str  # the name of `without` among the contenders
    without: Factory
    with_it: Factory


def settings(material: Material, mixed: bool) -> list[Change]:
    """Return other values of num_workers and prefetch_factor."""
    now, cores, base = material.num_workers, cpus(), partial(diffusemix, material, mixed=mixed)
    variants: list[tuple[str, int, int, Factory]] = [
        ("num_workers", count, now, partial(diffusemix, replace(material, num_workers=count), mixed=mixed))
        for count in sorted({max(1, cores // 2), cores} - {now})
    ]
    variants += [("prefetch_factor", ahead, 2, partial(base, prefetch_factor=ahead)) for ahead in (1, 4)]
    return [
        Change(
            setting=name, change=f"{name}={value} instead of {old}", before="as it is", without=base, with_it=variant
        )
        for name, value, old, variant in variants
    ]


def contenders_of(changes: Sequence[Change]) -> dict[str, Factory]:
    """Return the contenders that have to run to try these changes."""
    return {one.before: one.without for one in changes} | {one.change: one.with_it for one in changes}


def trials_of(changes: Sequence[Change], found: Mapping[str, Measurement]) -> Iterator[Trial]:
    """Yield the gains of the changes, round by round."""
    for one in changes:
        pairs = zip(found[one.change].images_per_second, found[one.before].images_per_second, strict=True)
        yield Trial(setting=one.setting, change=one.change, gains=tuple(after / before for after, before in pairs))


def packing(
    material: Material, dataset: DiffuseMixDataset, rows: NDArray[np.int64], folder: Path, mixed: bool
) -> list[Change]:
    """Return packing, with the same pixels and smaller, tried on some originals; nothing if they are packed."""
    if dataset.original_store is not None:
        return []
    side = 10 * math.ceil(material.size * 16 / 9 / 10)  # 400 for 224: few random crops are then enlarged
    longest = dataset.catalog.sizes[rows].max(axis=1)
    sides = (None, side) if np.median(longest) >= 1.2 * side else (None,)
    chosen = rows[random_rows(len(rows), _PACKED, material.seed)]
    some = reduced(material, dataset, chosen, folder, epoch=LEAST_BATCHES * material.batch_size)
    assert some.catalog is not None
    changes = []
    for most in sides:
        name = "pack, the same pixels" if most is None else f"pack --max-side {most}"
        store = folder / f"packed-{most}"
        pack(material.root, store, PackConfig(max_side=most), catalog=Catalog.open(some.catalog))
        packed = replace(some, root=store, catalog=None)  # its own catalog has the packed sizes
        changes.append(
            Change(
                setting=name,
                change=f"{name} (on {len(chosen)} of your originals)",
                before="not packed",
                without=partial(diffusemix, some, mixed=mixed),
                with_it=partial(diffusemix, packed, mixed=mixed),
            )
        )
    return changes
