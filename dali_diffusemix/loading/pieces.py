"""Pieces: one table for the visible parts of a batch's images, from the plan's windows to the mix.

    request(datasets, plans)  ──>  Pieces: locations, windows  ──decoder──>  Pieces: pixels  ──> mix

Of every array row 0 holds the originals and row 1 the edits, so the table goes into `mix` as it is.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.errors import DecodeError
from dali_diffusemix.images.reading import Location
from dali_diffusemix.loading.dataset import DiffuseMixDataset
from dali_diffusemix.loading.quarantine import Failure
from dali_diffusemix.mix.call import piece_table
from dali_diffusemix.plan.batch import BatchPlan
from dali_diffusemix.plan.windows import visible_parts


@dataclass(kw_only=True)
class Pieces:
    """The visible parts of n samples' originals and edits: first the windows to decode, then the decoded pixels.

    A decoder fills in `table["data"]` and what it decoded more than asked, `on_host`, `owners` and `errors`.
    """

    locations: Sequence[Location | None]  # (2n,) of the originals, then of the edits; None: there is no image
    table: NDArray[np.void]  # (2, n) of PIECE; data is 0 until it is decoded, height is 0 if nothing is shown
    on_host: NDArray[np.bool_] = field(init=False)  # (2, n) `data` is in host memory; else on the decoder's device
    owners: list[object] = field(default_factory=list)  # keep the memory of the pixels
    errors: dict[tuple[int, int], DecodeError] = field(default_factory=dict)  # by row and sample; its data is 0

    def __post_init__(self) -> None:
        self.on_host = np.zeros(self.table.shape, dtype=np.bool_)

    @classmethod
    def of(cls, locations: Sequence[Location | None], windows: NDArray[np.int32], sizes: NDArray[np.int32]) -> Self:
        """Pieces to decode.

        Args:
            locations: (2n,).
            windows: (2, n, 4) top, left, bottom, right, upright pixels; empty where nothing is shown.
            sizes: (2, n, 2) height and width of the upright images.
        """
        begin, end = windows[..., :2], windows[..., 2:]
        nowhere = np.zeros(windows.shape[:2], dtype=np.uint64)
        return cls(locations=locations, table=piece_table(nowhere, end - begin, origins=begin, image_sizes=sizes))

    def __len__(self) -> int:
        """Samples."""
        return int(self.table.shape[1])

    @property
    def windows(self) -> NDArray[np.int32]:
        """(2n, 4) top, left, bottom, right of the pieces in their images."""
        pieces = self.table.ravel()
        begin = np.stack([pieces["top"], pieces["left"]], axis=1)
        return np.concatenate([begin, begin + np.stack([pieces["height"], pieces["width"]], axis=1)], axis=1)

    @property
    def sizes(self) -> NDArray[np.int32]:
        """(2n, 2) height and width of the images."""
        pieces = self.table.ravel()
        return np.stack([pieces["image_height"], pieces["image_width"]], axis=1)

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels."""
        return int(3 * (self.table["height"].astype(np.int64) * self.table["width"]).sum())

    def failures(self) -> dict[int, Failure]:
        """Why samples cannot be made, by sample; of one whose original and edit failed, the original."""
        failed: dict[int, Failure] = {}
        for row, sample in sorted(self.errors):  # originals first
            failed.setdefault(sample, Failure("edit" if row else "original", self.errors[row, sample]))
        return failed

    def replace(self, sample: int, other: "Pieces") -> None:
        """Replace a sample by the only sample of other pieces."""
        self.table[:, sample], self.on_host[:, sample] = other.table[:, 0], other.on_host[:, 0]
        self.owners.extend(other.owners)


def request(shares: Sequence[tuple[DiffuseMixDataset, BatchPlan]], *, visible_only: bool) -> Pieces:
    """The pieces to decode for the rows of one or several datasets: visible parts of the images, or whole images."""
    found = [_requested(dataset, plan, visible_only=visible_only) for dataset, plan in shares]
    originals, edits, windows, sizes = zip(*found, strict=True)
    if len(found) == 1:
        return Pieces.of([*originals[0], *edits[0]], windows[0], sizes[0])
    locations = [one for kind in (originals, edits) for share in kind for one in share]
    return Pieces.of(locations, np.concatenate(windows, axis=1), np.concatenate(sizes, axis=1))


def _requested(
    dataset: DiffuseMixDataset, plan: BatchPlan, *, visible_only: bool
) -> tuple[Sequence[Location | None], Sequence[Location | None], NDArray[np.int32], NDArray[np.int32]]:
    """(n,) locations of the originals and of the edits, their (2, n, 4) windows and (2, n, 2) sizes."""
    store = dataset.store
    sizes = np.zeros((2, len(plan), 2), dtype=np.int32)
    sizes[0] = dataset.catalog.sizes[plan.original]
    if store is not None and plan.mixed.any():
        sizes[1, plan.mixed] = store.sizes(plan.edit[plan.mixed])
    windows = visible_parts(plan, sizes) if visible_only else np.concatenate([np.zeros_like(sizes), sizes], axis=2)
    return _originals(dataset, plan), _edits(dataset, plan), windows, sizes


def _originals(dataset: DiffuseMixDataset, plan: BatchPlan) -> Sequence[Location | None]:
    packed, catalog = dataset.original_store, dataset.catalog
    if packed is not None:
        return packed.extents(plan.original)
    root = os.fsencode(dataset.root)
    return [root + b"/" + catalog.encoded_path(row) for row in plan.original.tolist()]


def _edits(dataset: DiffuseMixDataset, plan: BatchPlan) -> Sequence[Location | None]:
    locations: list[Location | None] = [None] * len(plan)
    if dataset.store is not None:
        mixed = np.flatnonzero(plan.mixed)
        for sample, location in zip(mixed.tolist(), dataset.store.extents(plan.edit[mixed]), strict=True):
            locations[sample] = location
    return locations
