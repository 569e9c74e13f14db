"""The images of a comparison, the same for every contender."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.catalog.table import Catalog
from dali_diffusemix.errors import DataError, DecodeError
from dali_diffusemix.images.reading import Place, read
from dali_diffusemix.loading.dataset import DiffuseMixDataset
from dali_diffusemix.plan.batch import BatchPlan, Planner
from dali_diffusemix.plan.crops import TrainCrop
from dali_diffusemix.plan.spec import MixSpec
from dali_diffusemix.store import DENIED, EditStore, OriginalStore, ShardWriter, StoreWriter

_READ: Final = 64  # originals that are looked at together


@dataclass(frozen=True, kw_only=True)
class Material:
    """What all contenders of a comparison load, alike: images, crops, batches, threads, device."""

    root: Path  # of this package's loader: a folder, or a packed store
    files: Path  # a folder of the same images as files, for the others; the root itself where it is a folder
    catalog: Path | None = None  # of the originals, a saved `Catalog`; None: the edit store's or the root's own
    edits: Path | None = None
    fractals: Path | None = None
    epochs: int = 1  # passes over the originals that are one epoch, so that a small sample has long ones
    batch_size: int = 64
    num_workers: int = 2  # threads, or DataLoader's worker processes
    device: str = "cpu"
    size: int = 224  # pixels a side of a sample
    seed: int = 0

    def dataset(self, *, mixed: bool) -> DiffuseMixDataset:
        """The images under random crops and flips; mixed, all of them that have an edit."""
        dataset = DiffuseMixDataset(
            self.root,
            catalog=None if self.catalog is None else Catalog.open(self.catalog),
            edits=self.edits if mixed or self.catalog is None else None,
            fractals=self.fractals if mixed else None,
            mix=MixSpec(probability=1) if mixed else None,
            crop=TrainCrop(self.size),
            seed=self.seed,
        )
        if self.epochs > 1:
            dataset.planner = _LongPlanner(**vars(dataset.planner), epochs=self.epochs)
        return dataset


@dataclass(frozen=True, kw_only=True)
class _LongPlanner(Planner):
    """Several passes over the samples as one epoch; a sample has the same crop in each."""

    epochs: int

    def __len__(self) -> int:
        return super().__len__() * self.epochs

    def batch(self, epoch: int, indices: Any) -> BatchPlan:
        return super().batch(epoch, np.asarray(indices) % super().__len__())


def extract(store: OriginalStore, rows: Sequence[int], folder: Path) -> Path:
    """Write packed originals as files, the same bytes, at their paths in `folder`; what is there already stays."""
    for row in rows:
        file = folder / store.catalog.path(row)
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_name(f".{row}.tmp")  # the name itself may be as long as names can be
            unfinished.write_bytes(store.encoded(row).tobytes())
            unfinished.replace(file)
    return folder


def _sample(dataset: DiffuseMixDataset, rows: NDArray[np.int64], folder: Path) -> tuple[Path, Path | None]:
    """A catalog of some originals, and a store with an edit of each that has one, the same bytes."""
    catalog, store = dataset.catalog, dataset.store
    paths = [catalog.encoded_path(int(row)) for row in rows]
    chosen = Catalog.from_arrays(paths, catalog.labels[rows], catalog.classes, catalog.sizes[rows])
    chosen.save(folder / "catalog")
    if store is None:
        return folder / "catalog", None
    with StoreWriter.open(folder / "edits", chosen, store.settings) as writer:
        writer.order(("edit",), 1, 512)
        for shard in writer.shards():
            with ShardWriter(folder / "edits", writer.catalog, shard) as edits:
                for row in shard.rows:
                    _copy_edit(store, int(rows[row]), edits, row)
        writer.finish()
    return folder / "catalog", folder / "edits"


def _copy_edit(store: EditStore, original: int, edits: ShardWriter, row: int) -> None:
    """Copy the first edit of an original; where it has none, say so."""
    first = int(store.starts[original])
    if first == store.starts[original + 1]:
        edits.add(row, 0, 0, seed=0, jpeg=None, verdict=DENIED)
        return
    height, width = store.sizes(np.array([first]))[0].tolist()
    edits.add(row, 0, 0, seed=0, jpeg=store.encoded(first).tobytes(), height=height, width=width)


def chosen_rows(count: int, most: int, seed: int) -> NDArray[np.int64]:
    """A random choice of so many rows at most, in order."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))


def decodable(dataset: DiffuseMixDataset, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """Of some originals those that can be decoded, for all contenders alike, and how many cannot.

    Whatever is in order by its structure is not decoded here.
    """
    suspect: list[int] = []
    for start in range(0, len(rows), _READ):
        some = rows[start : start + _READ]
        packed = dataset.original_store
        places: Sequence[Place] = (
            [os.fsencode(dataset.path_of(row)) for row in some.tolist()] if packed is None else packed.extents(some)
        )
        found = read(places, np.zeros((len(some), 4), dtype=np.int32), dataset.catalog.sizes[some])
        suspect += some[~found.sound].tolist()

    def fails(row: int) -> bool:
        try:
            dataset.decode_original(row)
        except DecodeError:
            return True
        return False

    with ThreadPoolExecutor(_cores()) as pool:
        failed = [row for row, failing in zip(suspect, pool.map(fails, suspect), strict=True) if failing]
    if len(failed) == len(rows):
        raise DataError(
            f"root must have images that can be decoded, found none among {len(rows)} of {str(dataset.root)!r}, such "
            f"as {dataset.path_of(failed[0])!r}; restore them, or give another folder."
        )
    return np.setdiff1d(rows, failed), len(failed)


def sampled(
    material: Material, dataset: DiffuseMixDataset, rows: NDArray[np.int64], folder: Path, *, epoch: int
) -> Material:
    """The same of some originals, in epochs of at least `epoch` samples."""
    catalog, edits = _sample(dataset, rows, folder)
    return replace(material, catalog=catalog, edits=edits, epochs=-(-epoch // len(rows)))
