"""The dataset: everything that decides a sample. Takes ImageFolder's place under any DataLoader.

Here a sample is decoded by Pillow and mixed by the same function as in `DiffuseMixLoader`, which see for speed.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, get_worker_info

from dali_diffusemix.catalog import Catalog, index
from dali_diffusemix.errors import CatalogError, ConfigError, DecodeError, StoreError
from dali_diffusemix.fractals import FractalBank
from dali_diffusemix.mixing import IMAGENET, Normalize, TensorFormat, mix, piece_table
from dali_diffusemix.philox import check_seed
from dali_diffusemix.pixels import decode_listed
from dali_diffusemix.plan import BatchPlan, Crop, MixSpec, Planner
from dali_diffusemix.quarantine import Failure, Kind, OnError, Quarantine, Substitution, check_on_error
from dali_diffusemix.reading import IN_STORE
from dali_diffusemix.remote import MirrorError, is_url
from dali_diffusemix.store import EditStore, OriginalStore

_Path = str | os.PathLike[str]
_Pair = tuple[NDArray[np.uint8] | None, NDArray[np.uint8] | None]

_EPOCH: Final = 0  # the shared cells: the epoch, then samples served in it by the main process and by each worker
_SLOTS: Final = 257


class RepeatedEpochWarning(UserWarning):
    """A DataLoader went through the dataset twice without `set_epoch`: the second time gives the same samples."""


class DiffuseMixDataset(Dataset[tuple[torch.Tensor, int]]):
    """A map-style dataset of DiffuseMix samples, with ImageFolder's attributes.

    `dataset[i]` is a pure function of (seed, epoch, i): a (3, height, width) float32 tensor and its label. In an
    `expanded` epoch the dataset is longer than `samples`: index N + j is edit j.

    Args:
        root: Folder of originals, root/class/**/image, or a packed store of them, which may be a URL.
        catalog: The originals to use, for other layouts: paths relative to `root`. Else the edit store's catalog;
            without edits, the packed store's, or the one in the user's cache folder, made on first use.
        edits: Edit store, or its folder or URL. Needed where `mix` is given.
        fractals: Fractal bank, or its file. Needed where `mix` blends fractals.
        mix: How to mix; None gives plain samples, for validation.
        crop: How to crop, and the output size.
        normalize: (mean, std) for values in [0, 1]; None leaves [0, 1].
        seed: 0 ≤ seed < 2³².
        on_error: What to do about an image that cannot be read or decoded: "substitute" gives for a failed edit the
            original unmixed and for a failed original the sample of the next index (the one after the last is the
            first), and logs it in `quarantine`; "raise" raises DecodeError.

    Raises:
        CatalogError: the folder holds no images, or its catalog cannot be used.
        StoreError: the edit store, the packed store or the bank cannot be used, or is of other originals.
        ConfigError: arguments do not fit together.
    """

    quarantine: Quarantine
    """The images that could not be read or decoded by this object in this process, by path; a loader has its own."""

    original_store: OriginalStore | None  # row r of the catalog is its image r; None: the originals are files

    def __init__(
        self,
        root: _Path,
        *,
        crop: Crop,
        catalog: Catalog | None = None,
        edits: EditStore | _Path | None = None,
        fractals: FractalBank | _Path | None = None,
        mix: MixSpec | None = None,
        normalize: Normalize | None = IMAGENET,
        seed: int = 0,
        on_error: OnError = "substitute",
    ) -> None:
        _check_kinds(crop, mix)
        self.root = root if isinstance(root, str) and is_url(root) else Path(root)
        if isinstance(self.root, Path) and not self.root.is_dir():
            raise CatalogError(f"{str(root)!r}: there is no such folder; give that of the originals.")
        packed = OriginalStore.find(root)
        self.store = EditStore.open(edits) if isinstance(edits, str | os.PathLike) else edits
        self.bank = FractalBank.open(fractals) if isinstance(fractals, str | os.PathLike) else fractals
        if self.store is not None:
            if catalog is not None:
                self.store = self.store.in_order_of(catalog)
            catalog = self.store.catalog
            if packed is None:
                _check_same_originals(self.root, self.store)
        if packed is not None:
            packed = packed if catalog is None else packed.in_order_of(catalog)
            catalog = packed.catalog
        self.original_store = packed
        self.catalog = index(root) if catalog is None else catalog
        self.mix = mix
        self.crop = crop
        self.normalize = normalize
        self.seed = seed
        self.planner = Planner(
            seed=seed,
            crop=crop,
            sizes=self.catalog.sizes,
            mix=mix,
            edits=self.store,
            fractals=0 if self.bank is None else len(self.bank),
        )
        self.on_error = on_error
        check_on_error(on_error)
        self.quarantine = Quarantine()
        self._format = TensorFormat(normalize=normalize)
        # In shared memory, so that persistent workers see a new epoch.
        self._cells = torch.zeros(1 + _SLOTS, dtype=torch.int64)
        self._warned_of = -1
        self._cells.share_memory_()  # type: ignore[no-untyped-call]

    @property
    def classes(self) -> list[str]:
        """Class names, sorted."""
        return list(self.catalog.classes)

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Class name to label."""
        return dict(self.catalog.class_to_idx)

    @property
    def samples(self) -> Sequence[tuple[str, int]]:
        """(path, label) of every original; a view that makes each pair when it is looked at.

        Of a packed store a path tells which original it is: there is no such file.
        """
        return _Samples(self.root, self.catalog)

    imgs = samples

    @property
    def targets(self) -> list[int]:
        """Label of every original."""
        targets: list[int] = self.catalog.labels.tolist()
        return targets

    @property
    def epoch(self) -> int:
        """The epoch that `dataset[i]` gives samples of."""
        return int(self._cells[_EPOCH])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; call it before each one, as with DistributedSampler. Running workers see it too."""
        check_seed(self.seed, epoch)
        self._cells[1:] = 0
        self._cells[_EPOCH] = epoch

    def __len__(self) -> int:
        return len(self.planner)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"index {index} is out of range for a dataset of {count} samples")
        return self._samples_of(np.array([index % count]))[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[torch.Tensor, int]]:
        """Samples of a batch of indices. DataLoader calls this rather than `dataset[i]` for each."""
        self._count(len(indices))
        return self._samples_of(np.asarray(indices, dtype=np.int64) % len(self))

    def path_of(self, original: int) -> str:
        """Path of an original, by its row in the catalog; of a packed store the name of none of its files."""
        return os.path.join(self.root, self.catalog.path(original))  # noqa: PTH118 - a URL, or many at speed

    @property
    def substitution(self) -> Substitution:
        """Finds what takes the place of a sample that cannot be made."""
        return Substitution(self.planner, self._name_of, self.on_error)

    def labels_of(self, plan: BatchPlan) -> NDArray[np.int64]:
        """(n,) int64 labels of a plan's rows."""
        return np.asarray(self.catalog.labels[plan.original], dtype=np.int64)

    def _samples_of(self, indices: NDArray[np.int64]) -> list[tuple[torch.Tensor, int]]:
        plan = self.planner.batch(self.epoch, indices)
        images, substituted = [], {}
        for place in range(len(plan)):
            row = plan.row(place)
            pair, failure = self._decode(row)
            if failure is not None:
                row, pair = self.substitution(row, failure, self._decode, self.quarantine)
                substituted[place] = row
            images.append(pair)
        if substituted:
            plan = plan.with_rows(substituted)
        originals, edits = zip(*images, strict=True)
        tensor = torch.empty(self._format.shape(len(plan), plan.output_size), dtype=torch.float32)
        mix(
            plan,
            _whole_images(originals, plan.box),
            _whole_images(edits, plan.box),
            None if self.bank is None else self.bank.images,
            out=tensor.numpy(),
            format=self._format,
        )
        # Copies, so that a sample kept does not keep its batch.
        samples = [image.clone() for image in tensor] if len(plan) > 1 else [tensor[0]]
        return list(zip(samples, self.labels_of(plan).tolist(), strict=True))

    def _decode(self, row: BatchPlan) -> tuple[_Pair, Failure | None]:
        """The original and the edit of a plan of one row; what failed, the original if both did."""
        try:
            original = self.decode_original(int(row.original[0]))
        except DecodeError as error:
            return (None, None), Failure("original", error)
        try:
            edit = decode_edit(self.store, int(row.edit[0])) if self.store is not None and row.mixed[0] else None
            return (original, edit), None
        except DecodeError as error:
            return (original, None), Failure("edit", error)

    def _name_of(self, row: BatchPlan, kind: Kind) -> str:
        """What the quarantine calls the original or the edit of a plan of one row."""
        path = self.path_of(int(row.original[0]))
        if kind == "original" or self.store is None:
            return path
        edit = self.store.index[row.edit[0]]
        return (
            f"{self.store.path}/{self.catalog.path(int(row.original[0]))}: {self.store.prompts[edit['prompt']]}, "
            f"variant {edit['variant']}"
        )

    def decode_original(self, original: int) -> NDArray[np.uint8]:
        """An original's upright pixels, (height, width, 3) uint8, by its row in the catalog.

        Raises:
            DecodeError: it cannot be decoded, or has another size than it is listed with.
            MirrorError: of a packed store at a URL: the source does not answer.
        """
        path, size = self.path_of(original), self.catalog.sizes[original]
        if self.original_store is None:
            return decode_listed(path, size)
        return _decode_stored(self.original_store, original, size, path)

    def _count(self, samples: int) -> None:
        """Notice that an epoch is drawn a second time: under DataLoader nobody else can."""
        worker = get_worker_info()
        slot = 1 + (0 if worker is None else 1 + worker.id % (_SLOTS - 1))
        # Each process writes its own cell, so nothing is lost between them.
        self._cells[slot] += samples
        epoch = self.epoch
        if int(self._cells[1:].sum()) > len(self) and self._warned_of != epoch:
            self._warned_of = epoch
            warnings.warn(
                f"epoch {epoch} has been drawn once already and its samples repeat: call dataset.set_epoch(epoch) "
                "before each epoch (DiffuseMixLoader does it by itself)",
                RepeatedEpochWarning,
                stacklevel=2,
            )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({str(self.root)!r}, originals={len(self.catalog)}, "
            f"edits={0 if self.store is None else len(self.store)}, mix={self.mix}, crop={self.crop}, seed={self.seed})"
        )


def _check_kinds(crop: object, mix: object) -> None:
    """Refuse what is easily given in place of a crop and of a mix, for it would fail far from here."""
    if not callable(getattr(crop, "boxes", None)) or isinstance(crop, type):
        size = crop if isinstance(crop, int) else 224
        raise ConfigError(f"crop must be a TrainCrop, RandomCrop or EvalCrop, found {crop!r}; write TrainCrop({size})")
    if mix is not None and not isinstance(mix, MixSpec):
        raise ConfigError(f"mix must be a MixSpec or None, found {mix!r}; write MixSpec.paper(), with brackets")


def decode_edit(store: EditStore, edit: int) -> NDArray[np.uint8]:
    """An edit's pixels, (height, width, 3) uint8. Raises DecodeError; MirrorError where its source does not answer."""
    return _decode_stored(store, edit, store.sizes(np.array([edit]))[0], f"{store.path}: edit {edit}")


def _decode_stored(store: EditStore | OriginalStore, row: int, size: NDArray[np.int32], name: str) -> NDArray[np.uint8]:
    try:
        return decode_listed(store.encoded(row), size, IN_STORE)
    except MirrorError:
        raise  # nothing is wrong with the image
    except (DecodeError, StoreError) as error:
        raise DecodeError(f"{name}: {error}") from error


def _whole_images(images: Sequence[NDArray[np.uint8] | None], boxes: NDArray[np.float64]) -> NDArray[np.void]:
    data = np.array([0 if image is None else image.ctypes.data for image in images], dtype=np.uint64)
    shapes = np.array([(0, 0) if image is None else image.shape[:2] for image in images], dtype=np.int32)
    return piece_table(data, shapes, boxes)


def _check_same_originals(root: str | Path, store: EditStore) -> None:
    """Refuse edits of another folder: none of a spread of their originals is there."""
    rows = np.unique(np.linspace(0, len(store.catalog) - 1, 32).astype(np.int64))
    if not any(Path(root, store.catalog.path(int(row))).is_file() for row in rows):
        raise StoreError(
            f"{store.path}: the edits are of other originals: {root} has none of {len(rows)} that were looked for, "
            f"such as {store.catalog.path(int(rows[0]))!r}; give the folder that they were generated from, or generate "
            "edits for this one"
        )


class _Samples(Sequence[tuple[str, int]]):
    """ImageFolder's list of (path, label), without holding a million strings."""

    def __init__(self, root: str | Path, catalog: Catalog) -> None:
        self._root, self._catalog = root, catalog

    def __len__(self) -> int:
        return len(self._catalog)

    @overload
    def __getitem__(self, row: int) -> tuple[str, int]: ...
    @overload
    def __getitem__(self, row: slice) -> list[tuple[str, int]]: ...
    def __getitem__(self, row: int | slice) -> Any:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        row = range(len(self))[row]
        return os.path.join(self._root, self._catalog.path(row)), int(self._catalog.labels[row])  # noqa: PTH118 - speed

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return (self[i] for i in range(len(self)))
