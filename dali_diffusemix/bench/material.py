"""The images of a comparison: all contenders load the same ones, in the same way."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dali_diffusemix.base.cpus import cpus
from dali_diffusemix.base.files import write
from dali_diffusemix.base.workers import Workers
from dali_diffusemix.catalog.table import Catalog
from dali_diffusemix.errors import DataError, DecodeError
from dali_diffusemix.images.reading import Location, read
from dali_diffusemix.loading.dataset import DiffuseMixDataset
from dali_diffusemix.plan.batch import BatchPlan, Planner
from dali_diffusemix.plan.crops import TrainCrop
from dali_diffusemix.plan.spec import MixSpec
from dali_diffusemix.store import DENIED, EditStore, OriginalStore, ShardWriter, StoreWriter, Wish

__all__ = ["LEAST_BATCHES", "Material", "decodable", "extract", "random_rows", "reduced"]

LEAST_BATCHES: Final = 32  # in an epoch of a random sample of the originals
_READ: Final = 64  # originals that are read at once


@dataclass(frozen=True, kw_only=True)
class Material:
    """The work of every contender in a comparison: images, crops, batches, threads, device."""

    root: Path  # for this package's loader: a folder, or a packed store
    files: Path  # for the others: a folder of the same images as files; the root itself if that is a folder
    catalog: Path | None = None  # a saved `Catalog` of the originals; None: that of the edit store or the root
    edits: Path | None = None
    fractals: Path | None = None
    epochs: int = 1  # passes over the originals that count as one epoch, so that a small sample has long epochs
    batch_size: int = 64
    num_workers: int = 2  # threads, or worker processes of DataLoader
    device: str = "cpu"
    size: int = 224  # side length of a sample in pixels
    seed: int = 0

    def dataset(self, *, mixed: bool) -> DiffuseMixDataset:
        """Return the images with random crops and flips; if `mixed`, every image that has an edit is mixed."""
        dataset = DiffuseMixDataset(
            self.root,
            catalog=None if self.catalog is None else Catalog.open(self.catalog),
            edits=self.edits if mixed or self.catalog is None else None,  # plain with edits: of their originals only
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
    """Several passes over the samples as one epoch; a sample has the same crop in each pass."""

    epochs: int

    def __len__(self) -> int:
        return super().__len__() * self.epochs

    def batch(self, epoch: int, indices: ArrayLike, views: ArrayLike = 0) -> BatchPlan:
        return super().batch(epoch, np.asarray(indices) % super().__len__(), views)


def extract(store: OriginalStore, rows: Sequence[int], folder: Path) -> Path:
    """Write packed originals as files with the same bytes, at their paths in `folder`; existing files stay."""
    for row in rows:
        file = folder / store.catalog.path(row)
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write(file, store.encoded(row).tobytes(), durable=False)
    return folder


# Fewer originals ------------------------------------------------------------------------------------------------------


def random_rows(count: int, most: int, seed: int) -> NDArray[np.int64]:
    """Choose at most `most` of `count` rows at random; returns them sorted."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))


def decodable(dataset: DiffuseMixDataset, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """Leave out originals that cannot be decoded, so that every contender loads the same ones.

    Only files whose structure does not pass the check for DALI are decoded here.

    Returns:
        The rows that can be decoded, and the number of those that cannot.

    Raises:
        DataError: None of them can be decoded.
    """
    suspect: list[int] = []
    for start in range(0, len(rows), _READ):
        some = rows[start : start + _READ]
        packed = dataset.original_store
        locations: Sequence[Location] = (
            [os.fsencode(dataset.path_of(row)) for row in some.tolist()] if packed is None else packed.extents(some)
        )
        found = read(locations, np.zeros((len(some), 4), dtype=np.int32), dataset.catalog.sizes[some])
        suspect += some[~found.safe].tolist()

    def fails(row: int) -> bool:
        try:
            dataset.decode_original(row)
        except DecodeError:
            return True
        return False

    with Workers(cpus(), "dali-diffusemix-bench") as pool:
        failed = [row for row, failing in zip(suspect, pool.map(fails, suspect), strict=True) if failing]
    if len(failed) == len(rows):
        raise DataError(
            f"root must have images that can be decoded, found none among {len(rows)} of {str(dataset.root)!r}, such "
            f"as {dataset.path_of(failed[0])!r}; restore them, or give another folder."
        )
    return np.setdiff1d(rows, failed), len(failed)


def reduced(
    material: Material, dataset: DiffuseMixDataset, rows: NDArray[np.int64], folder: Path, *, epoch: int
) -> Material:
    """Return the material reduced to some originals, with epochs of at least `epoch` samples.

    Writes a catalog of these originals, and a store with one edit of each that has any, into `folder`.
    """
    catalog, store = dataset.catalog, dataset.store
    paths = [catalog.encoded_path(int(row)) for row in rows]
    chosen = Catalog.from_arrays(paths, catalog.labels[rows], catalog.classes, catalog.sizes[rows])
    chosen.save(folder / "catalog")
    edits = None if store is None else _copy_edits(store, rows, chosen, folder / "edits")
    return replace(material, catalog=folder / "catalog", edits=edits, epochs=-(-epoch // len(rows)))


def _copy_edits(store: EditStore, rows: NDArray[np.int64], chosen: Catalog, folder: Path) -> Path:
    """Write a store of the first edit of each original, with the same bytes; the verdict of one without is denied."""
    with StoreWriter.open(folder, chosen, store.settings) as writer:
        writer.order(Wish(prompts={"edit": None}, variants=1, originals_per_shard=512))
        for shard in writer.shards():
            with ShardWriter(folder, writer.catalog, shard) as edits:
                for row in shard.rows:
                    original = int(rows[row])
                    first = int(store.starts[original])
                    if first == store.starts[original + 1]:
                        edits.add(row, 0, 0, seed=0, image=None, verdict=DENIED)
                    else:
                        height, width = store.sizes(np.array([first]))[0].tolist()
                        jpeg = store.encoded(first).tobytes()
                        edits.add(row, 0, 0, seed=0, image=jpeg, height=height, width=width)
        writer.finish()
    return folder
