"""Pieces: one table for the visible parts of a batch's images, from the plan's windows to the mix.

    request(datasets, plans)  ──>  Pieces: locations, windows  ──decoder──>  Pieces: pixels  ──> mix

Of every array row 0 holds the originals and row 1 the edits, so the table goes into `mix` as it is.

Raw images need no decoder. Of those on disk the rows of a window are read, of small ones all: `read_raw`. Those of a
resident store are pixels in memory from the start.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.errors import DecodeError
from dali_diffusemix.images.reading import IN_STORE, Location, Stretches, read_stretches
from dali_diffusemix.loading.dataset import DiffuseMixDataset
from dali_diffusemix.loading.quarantine import Failure
from dali_diffusemix.mix.call import piece_table
from dali_diffusemix.plan.batch import BatchPlan
from dali_diffusemix.plan.windows import visible_parts
from dali_diffusemix.store import EditStore


@dataclass(kw_only=True)
class Pieces:
    """The visible parts of n samples' originals and edits: first the windows to decode, then the decoded pixels.

    A decoder fills in `table["data"]` and what it decoded more than asked, `on_host`, `owners` and `errors`.
    """

    locations: Sequence[Location | None]  # (2n,) of the originals, then of the edits; None: no image; () if all are raw
    table: NDArray[np.void]  # (2, n) of PIECE; data is 0 until it is decoded, height is 0 if nothing is shown
    raw: Stretches | None = None  # (2n,) raw images, which have no location; None: there are none
    on_host: NDArray[np.bool_] = field(init=False)  # (2, n) `data` is in host memory; else on the decoder's device
    owners: list[object] = field(default_factory=list)  # keep the memory of the pixels
    errors: dict[tuple[int, int], DecodeError] = field(default_factory=dict)  # by row and sample; its data is 0

    def __post_init__(self) -> None:
        self.on_host = np.zeros(self.table.shape, dtype=np.bool_)

    @classmethod
    def of(
        cls,
        locations: Sequence[Location | None],
        windows: NDArray[np.int32],
        sizes: NDArray[np.int32],
        raw: Stretches | None = None,
    ) -> Self:
        """Pieces to decode.

        Args:
            locations: (2n,).
            windows: (2, n, 4) top, left, bottom, right, upright pixels; empty where nothing is shown.
            sizes: (2, n, 2) height and width of the upright images.
            raw: (2n,) raw images.
        """
        begin, end = windows[..., :2], windows[..., 2:]
        nowhere = np.zeros(windows.shape[:2], dtype=np.uint64)
        table = piece_table(nowhere, end - begin, origins=begin, image_sizes=sizes)
        return cls(locations=locations, table=table, raw=raw)

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

    def read_raw(self, memory: NDArray[np.uint8] | None) -> NDArray[np.uint8] | None:
        """Read the raw images' rows that are shown.

        Args:
            memory: Memory to read into, if it is large enough.

        Returns:
            The memory that holds the pixels.
        """
        if self.raw is None:
            return memory
        pieces = self.table.reshape(-1)
        shown = pieces["height"] > 0
        for i, error in self.raw.errors.items():
            if shown[i]:
                self.errors[divmod(i, len(self))] = error
        rows = np.flatnonzero(shown & (self.raw.files >= 0))
        if not len(rows):
            return memory
        top, bottom = pieces["top"][rows], pieces["top"][rows] + pieces["height"][rows]
        height, width = pieces["image_height"][rows], pieces["image_width"][rows]
        pitch = 3 * np.asarray(width, dtype=np.int64)
        small = height * pitch <= _SMALL
        top, bottom = np.where(small, 0, top), np.where(small, height, bottom)
        offsets = np.asarray(self.raw.offsets[rows] + top * pitch, dtype=np.int64)
        lengths = np.asarray((bottom - top) * pitch, dtype=np.int64)
        memory, begins, failed = read_stretches(self.raw.files[rows], offsets, lengths, memory)
        pieces["data"][rows] = np.uint64(memory.ctypes.data) + begins.astype(np.uint64)
        pieces["top"][rows], pieces["height"][rows] = top, bottom - top
        pieces["left"][rows], pieces["width"][rows] = 0, width
        self.on_host.reshape(-1)[rows] = True
        self.owners.append(memory)
        for position, reason in failed.items():
            i = int(rows[position])
            pieces["data"][i] = 0
            self.errors[divmod(i, len(self))] = DecodeError(f"a raw image cannot be read ({reason}); {IN_STORE}.")
        return memory


# Bytes of a raw image that is read whole: reading a part of a page costs the same, and the mix shares more weights.
_SMALL: Final = 16384


Shares: TypeAlias = Sequence[tuple[DiffuseMixDataset, BatchPlan]]
"""Datasets, and the plans of their rows in a batch."""


def request(shares: Shares, *, visible_only: bool) -> Pieces:
    """The pieces to decode for the rows of one or several datasets: visible parts of the images, or whole images."""
    return joined([_requested(dataset, plan, visible_only=visible_only) for dataset, plan in shares])


def joined(shares: Sequence[Pieces]) -> Pieces:
    """The pieces of several datasets' rows, one after another."""
    if len(shares) == 1:
        return shares[0]
    locations: list[Location | None] = []
    if any(one.locations for one in shares):
        halves = [one.locations or (None,) * (2 * len(one)) for one in shares]
        for half in (slice(0, 1), slice(1, 2)):
            for one, its in zip(shares, halves, strict=True):
                locations += its[half.start * len(one) : half.stop * len(one)]
    pieces = Pieces(locations=locations, table=np.concatenate([one.table for one in shares], axis=1))
    pieces.on_host = np.concatenate([one.on_host for one in shares], axis=1)
    count, start = len(pieces), 0
    files, offsets = np.full((2, count), -1, dtype=np.int32), np.zeros((2, count), dtype=np.int64)
    raw = Stretches(files.reshape(-1), offsets.reshape(-1))
    for one in shares:
        columns = slice(start, start + len(one))
        pieces.errors |= {(row, start + sample): error for (row, sample), error in one.errors.items()}
        pieces.owners.extend(one.owners)
        if one.raw is not None:
            files[:, columns] = one.raw.files.reshape(2, -1)
            offsets[:, columns] = one.raw.offsets.reshape(2, -1)
            raw.owners.extend(one.raw.owners)
            for i, error in one.raw.errors.items():
                row, sample = divmod(i, len(one))
                raw.errors[row * count + start + sample] = error
            pieces.raw = raw
        start += len(one)
    return pieces


def sizes_of(dataset: DiffuseMixDataset, plan: BatchPlan) -> NDArray[np.int32]:
    """(2, n, 2) height and width of the originals and of the edits, 0 where there is none."""
    sizes, mixed = np.zeros((2, len(plan), 2), dtype=np.int32), plan.mixed
    sizes[0] = dataset.catalog.sizes[plan.original]
    if dataset.store is not None and mixed.any():
        sizes[1, mixed] = dataset.store.sizes(plan.edit[mixed])
    return sizes


def _requested(dataset: DiffuseMixDataset, plan: BatchPlan, *, visible_only: bool) -> Pieces:
    originals, edits, mixed = dataset.original_store, dataset.store, np.flatnonzero(plan.mixed)
    sizes = sizes_of(dataset, plan)
    locations: list[Location | None] = []
    count = 2 * len(plan)
    raw = Stretches(np.full(count, -1, dtype=np.int32), np.zeros(count, dtype=np.int64))
    if originals is not None and originals.raw:
        _take(raw, originals.stretches(plan.original), np.arange(len(plan)))
    else:
        locations = [*_originals(dataset, plan), *[None] * len(plan)]
    if edits is not None and len(mixed):
        if edits.raw:
            _take(raw, edits.stretches(plan.edit[mixed]), len(plan) + mixed)
        else:
            locations = locations or [None] * count
            for sample, location in zip(mixed.tolist(), edits.extents(plan.edit[mixed]), strict=True):
                locations[len(plan) + sample] = location
    # Small raw images are read whole, so what is shown of them matters only where it is an error.
    whole = not locations and not raw.errors and int(_bytes_of(sizes).max(initial=0)) <= _SMALL
    if visible_only and not whole:
        windows = visible_parts(plan, sizes)
    else:
        windows = np.concatenate([np.zeros_like(sizes), sizes], axis=2)
    return Pieces.of(locations, windows, sizes, raw if raw.owners or raw.errors else None)


def is_small(dataset: DiffuseMixDataset) -> bool:
    """True if the images of a raw dataset are small, by some of them, and on a local disk: a batch is there at once."""
    if any(store.mirror is not None for store in dataset.stores):
        return False
    some = [dataset.catalog.sizes[_spread(len(dataset.catalog))]]
    some += [store.sizes(_spread(len(store))) for store in dataset.stores if isinstance(store, EditStore)]
    return all(int(_bytes_of(sizes).max(initial=0)) <= _SMALL for sizes in some)


def _spread(count: int) -> NDArray[np.int64]:
    """At most 1000 of `count` rows, spread evenly."""
    return np.linspace(0, count - 1, min(count, 1000)).astype(np.int64)


def _bytes_of(sizes: NDArray[np.int32]) -> NDArray[np.int64]:
    """Bytes of the pixels of images with these sizes, (..., 2)."""
    return 3 * sizes[..., 0].astype(np.int64) * sizes[..., 1]


def _take(into: Stretches, found: Stretches, images: NDArray[np.int64]) -> None:
    """Fill in the raw images with these numbers."""
    into.files[images], into.offsets[images] = found.files, found.offsets
    into.owners.extend(found.owners)
    into.errors |= {int(images[i]): error for i, error in found.errors.items()}


def _originals(dataset: DiffuseMixDataset, plan: BatchPlan) -> Sequence[Location | None]:
    packed, catalog = dataset.original_store, dataset.catalog
    if packed is not None:
        return packed.extents(plan.original)
    root = os.fsencode(dataset.root)
    return [root + b"/" + catalog.encoded_path(row) for row in plan.original.tolist()]
