"""The dataset: everything that decides a sample. Replaces ImageFolder under any DataLoader.

Samples are decoded by Pillow here and mixed by the same call as in `DiffuseMixLoader`, which is faster.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal, Self, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Dataset, get_worker_info

from dali_diffusemix.base.philox import check_seed
from dali_diffusemix.catalog.listing import index, warn_of_changes
from dali_diffusemix.catalog.table import Catalog
from dali_diffusemix.errors import CatalogError, ConfigError, DecodeError, StoreError
from dali_diffusemix.fractals.bank import FractalBank
from dali_diffusemix.images.codec import decode_listed, raw_pixels
from dali_diffusemix.images.reading import IN_STORE
from dali_diffusemix.loading.description import dataset_rows, table
from dali_diffusemix.loading.quarantine import Failure, Kind, OnError, Quarantine, Substitution, check_on_error
from dali_diffusemix.loading.samplers import View, addresses
from dali_diffusemix.loading.settled import RECIPES
from dali_diffusemix.loading.subset import Divisible
from dali_diffusemix.mix.call import mix, piece_table
from dali_diffusemix.mix.tensor import IMAGENET, Normalize, TensorFormat
from dali_diffusemix.plan.augment import Augment, settings_of
from dali_diffusemix.plan.batch import BatchPlan, Planner
from dali_diffusemix.plan.crops import Crop
from dali_diffusemix.plan.numbers import whole
from dali_diffusemix.plan.schedule import Schedule, schedule_meant, values_of
from dali_diffusemix.plan.spec import MixSpec
from dali_diffusemix.store import EditStore, OriginalStore, Selection
from dali_diffusemix.store.mirror import MirrorError, is_url

_log = logging.getLogger(__name__)
_Path = str | os.PathLike[str]
Sample = tuple[torch.Tensor, Any]
ImagePair = tuple[NDArray[np.uint8] | None, NDArray[np.uint8] | None]

# The shared cells: the epoch, the samples that the main process and each worker served in it, and one bit per original
# that is set once the original was found undecodable in this epoch.
_EPOCH: Final = 0
_SLOTS: Final = 257
_FAILED: Final = 1 + _SLOTS


class RepeatedEpochWarning(UserWarning):
    """A DataLoader drew an epoch twice without `set_epoch`: the second pass repeats the samples of the first.

    Never given for a dataset whose epochs are all the same, as for validation.
    """


_COUNTED: Final = 100_000  # edits; the table of so many is read in a millisecond


class DiffuseMixDataset(Divisible, Dataset[Sample]):
    """A map-style dataset of DiffuseMix samples, with ImageFolder's attributes.

    `dataset[i]` is a pure function of (seed, epoch, i): a (3, height, width) float32 tensor and its label. In an
    `expanded` epoch the dataset is longer than `samples`: index N + j is edit j.

    What decides a sample cannot be changed afterwards: make another dataset. More than ten arguments, because each of
    them decides samples.

    Args:
        root: Folder of originals, root/class/**/image, or a packed store of originals, which may be a URL.
        catalog: The originals to use, for other layouts: paths relative to `root`. Default: the edit store's catalog;
            without edits, the packed store's, or the one in the user's cache folder, which is made on first use.
        edits: Edit store, or its folder or URL. Required with a `mix`.
        fractals: Fractal bank, or its file. Required if `mix` blends fractals.
        mix: How to mix; None gives plain samples, for validation. "auto": `MixSpec.paper()` with edits, else None. A
            `Schedule` changes it with the epoch; all its epochs must have one length.
        crop: How to crop, and the output size. A `Schedule` changes them with the epoch.
        augment: What follows the mix, on 8-bit pixels: a setting such as `TrivialAugmentWide()`, several in order,
            timm's "rand-m9-mstd0.5-inc1", or "ThreeAugment". None leaves samples as they are, not rounded to 8 bits.
            A `Schedule` changes it with the epoch.
        normalize: (mean, std) for values in [0, 1]; None leaves values in [0, 1].
        seed: 0 ≤ seed < 2³². None takes `torch.initial_seed()`, modulo 2³², when the dataset is made, and logs it; in
            a distributed run the loaders take that of rank 0.
        prompts: Use only edits under these prompts; by default under all.
        exclude: Leave out edits under these prompts: a list, or class (or pattern of classes) to prompts.
        min_score: Use only edits with at least this score of quality, see `generate.quality`; or name of a score (see
            `dali-diffusemix score`) to the least.
        targets: What is delivered in the labels' place, a row for each original in the order of `samples`: (n,)
            integers; or float32, (n,) or (n, k): soft labels, several labels, regression.
        on_error: What to do with an image that cannot be read or decoded. "substitute": for a failed edit, use the
            original unmixed; for a failed original, use the sample of the next index (the first follows the last);
            log it in `quarantine`. "raise": raise DecodeError.
        transform, target_transform: ImageFolder's; they raise with what to write instead.

    Raises:
        CatalogError: the folder holds no images, or its catalog cannot be used.
        StoreError: the edit store, the packed store or the bank cannot be used, or belongs to other originals.
        ConfigError: an argument breaks a rule, or arguments contradict each other.
    """

    quarantine: Quarantine
    """The images that this object could not read or decode in this process, by path; a loader has its own."""

    original_store: OriginalStore | None  # its image r is row r of the catalog; None: originals are files
    transform = target_transform = None

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        """Refuse ImageFolder's transforms before a crop is asked for: the message says what to write."""
        if len(arguments) > 1 and isinstance(arguments[1], str | os.PathLike):
            raise ConfigError(
                f"only root is given by position, found {arguments[1]!r} after it; write edits=, fractals= and crop=."
            )
        given = {**dict(zip(("transform", "target_transform"), arguments[1:], strict=False)), **options}
        for name in ("transform", "target_transform"):
            if given.get(name) is not None:
                raise ConfigError(RECIPES[name].format(name=name, found=given[name]))
        return super().__new__(cls)

    def __init__(
        self,
        root: _Path,
        *,
        crop: Crop | Schedule[Crop],
        catalog: Catalog | None = None,
        edits: EditStore | _Path | None = None,
        fractals: FractalBank | _Path | None = None,
        mix: MixSpec | Schedule[MixSpec | None] | Literal["auto"] | None = "auto",
        augment: Augment | Schedule[Augment] = None,
        normalize: Normalize | None = IMAGENET,
        seed: int | None = None,
        prompts: Collection[str] | None = None,
        exclude: Collection[str] | Mapping[str, Collection[str]] = (),
        min_score: float | Mapping[str, float] | None = None,
        targets: ArrayLike | None = None,
        on_error: OnError = "substitute",
        transform: None = None,
        target_transform: None = None,
    ) -> None:
        if isinstance(mix, str) and mix == "auto":
            mix = None if edits is None else MixSpec.paper()
        for one in values_of(crop):
            _check_crop(one)
        for spec in values_of(mix):
            _check_mix(spec)
        self.root = root if isinstance(root, str) and is_url(root) else Path(root)
        if isinstance(self.root, Path) and not self.root.is_dir():
            raise CatalogError(f"{str(root)!r}: there is no such folder; give the folder of the originals.")
        packed = OriginalStore.find(root)
        self.store = EditStore.open(edits) if isinstance(edits, str | os.PathLike) else edits
        self.bank = FractalBank.open(fractals) if isinstance(fractals, str | os.PathLike) else fractals
        selection = Selection(prompts=prompts, exclude=exclude, min_score=min_score)
        if selection != Selection():
            if self.store is None:
                raise ConfigError(
                    f"prompts, exclude and min_score must be left out without edits, found {selection}; give edits too."
                )
            offered = self.store
            self.store = offered.select(selection)
            if len(offered) and not len(self.store):
                raise ConfigError(
                    f"prompts, exclude and min_score must leave some of the {len(offered)} edits of "
                    f"{str(offered.path)!r}, found {selection}, which leaves none; ask for less, or give no edits."
                )
        chosen = catalog is not None
        if self.store is not None:
            if catalog is not None:
                self.store = self.store.reindexed(catalog)
            catalog = self.store.catalog
            if packed is None:
                _check_same_originals(self.root, self.store)
                if not chosen:
                    warn_of_changes(self.store.catalog, Path(self.root))
        if packed is not None:
            packed = packed if catalog is None else packed.reindexed(catalog)
            catalog = packed.catalog
        self.original_store = packed
        self.catalog = index(root) if catalog is None else catalog
        self.mix = mix
        self.crop = crop
        self.augment = settings_of(augment)
        self.normalize = normalize
        self.seed_given = seed is not None
        if seed is None:
            seed = torch.initial_seed() % 2**32
            _log.info("The dataset's seed is %d, from torch.initial_seed(); seed= gives another.", seed)
        check_seed(seed, 0)
        self.seed = seed = int(seed)
        self.planner = Planner(
            seed=seed,
            crop=crop,
            sizes=self.catalog.sizes,
            mix=mix,
            edits=self.store,
            fractals=0 if self.bank is None else len(self.bank),
            augment=self.augment,
        )
        self.on_error = on_error
        check_on_error(on_error)
        self.quarantine = Quarantine()
        self._format = TensorFormat(normalize=normalize)
        self._mixes = any(spec is not None for spec in values_of(mix))
        if self._mixes and self.store is not None and not len(self.store):
            _log.warning(
                "%s: no edit of it is in use, so no sample is mixed; `dali-diffusemix report` shows why.",
                self.store.path,
            )
        self._varies = (
            self._mixes
            or any(values_of(self.augment))
            or len(values_of(crop)) > 1
            or any(_draws(one, self.catalog.sizes[:1]) for one in values_of(crop))
        )
        # In shared memory, so that persistent workers see a new epoch.
        self._cells = torch.zeros(_FAILED + -(-len(self.catalog) // 64), dtype=torch.int64)
        self._warned_of = -1
        self._cells.share_memory_()  # type: ignore[no-untyped-call]
        self._substitution: Substitution[ImagePair] | None = None
        self._targets = None if targets is None else _checked_targets(targets, len(self.catalog))
        self._labels: list[int] | None = None
        # For `repr`, which must not read a table.
        counted = self.store is not None and (selection != Selection() or len(self.store) <= _COUNTED)
        self._edits_by_prompt = self.store.count_by_prompt() if counted and self.store is not None else {}

    @property
    def _being_made(self) -> bool:
        return "_cells" not in self.__dict__

    def take_seed(self, seed: int) -> None:
        """Take another seed, as all ranks do that were not given one."""
        self.__dict__["seed"] = seed
        self.planner = replace(self.planner, seed=seed)
        self._substitution = None

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
        """(path, label) of every original, as a view that makes each pair on access.

        With a packed store, a path identifies the original; there is no such file.
        """
        return _Samples(self.root, self.catalog)

    imgs = samples

    @property
    def targets(self) -> Any:
        """The target of every original: a list of labels, or the array that the dataset was given."""
        if self._targets is not None:
            return self._targets
        # Made once: loops access it for every sample.
        if self._labels is None:
            self._labels = self.catalog.labels.tolist()
        return self._labels

    def class_labels(self) -> NDArray[np.int64]:
        """(originals,) int64 class numbers. Raises ConfigError if the targets are none."""
        targets = self.catalog.labels if self._targets is None else self._targets
        if targets.ndim != 1 or targets.dtype.kind != "i" or targets.min(initial=0) < 0:
            raise ConfigError(f"targets must be class numbers, found {targets.dtype} of shape {targets.shape}.")
        return np.asarray(targets, dtype=np.int64)

    def _whole(self) -> "tuple[DiffuseMixDataset, NDArray[np.int64]]":
        return self, np.arange(len(self))

    @property
    def epoch(self) -> int:
        """The epoch of the samples that `dataset[i]` returns."""
        return int(self._cells[_EPOCH])

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; call it before each one, as with DistributedSampler. Running workers see it too."""
        check_seed(self.seed, epoch)
        self._cells[1:] = 0
        self._cells[_EPOCH] = epoch

    def __len__(self) -> int:
        return len(self.planner)

    def __getitem__(self, index: int | View) -> Sample:
        return self.samples_at(*addresses([index], len(self)))[0]

    def __getitems__(self, indices: Sequence[int | View]) -> list[Sample]:
        """The samples of a batch of indices. DataLoader calls this instead of `dataset[i]`."""
        return self.samples_at(*addresses(indices, len(self)), counted=True)

    @property
    def stores(self) -> list[OriginalStore | EditStore]:
        """The stores whose images samples show in any epoch: of originals, if packed, and of edits, if it mixes."""
        found = (self.original_store, self.store if self._mixes else None)
        return [store for store in found if store is not None]

    @property
    def is_raw(self) -> bool:
        """True if nothing has to be decoded: originals and edits are raw images in stores."""
        return self.original_store is not None and all(store.raw for store in self.stores)

    def path_of(self, original: int) -> str:
        """Path of an original, by its row in the catalog; with a packed store, there is no such file."""
        return os.path.join(self.root, self.catalog.path(original))  # noqa: PTH118 - a URL, or many at speed

    def labels_of(self, plan: BatchPlan) -> NDArray[Any]:
        """The labels of a plan's rows, (n,) int64; or the rows of `targets`."""
        if self._targets is not None:
            return self._targets[plan.original]
        return np.asarray(self.catalog.labels[plan.original], dtype=np.int64)

    def samples_at(
        self, indices: NDArray[np.int64], views: NDArray[np.int64], *, counted: bool = False
    ) -> list[Sample]:
        """The samples of (n,) indices and views.

        Args:
            indices: 0 ≤ index < len(self).
            views: How often each index came before in the epoch.
            counted: Warn if the epoch is drawn a second time.
        """
        if counted:
            self._count(int((views == 0).sum()))
        plan = self.planner.batch(self.epoch, indices, views)
        images, failures = self.decode_all(plan)
        if self._substitution is not None:  # it may have remembered a failure of one of these
            self._substitution.correct(plan.epoch, np.delete(plan.index, list(failures)))
        if failures:
            plan, images = self._substituted(plan, images, failures)
        originals, edits = zip(*images, strict=True)
        tensor = torch.empty(self._format.shape(len(plan), plan.output_size), dtype=torch.float32)
        mix(
            plan,
            _whole_images(originals, edits),
            None if self.bank is None else self.bank.images,
            out=tensor.numpy(),
            format=self._format,
        )
        # Copies, so that one sample does not keep the memory of its batch.
        samples = [image.clone() for image in tensor] if len(plan) > 1 else [tensor[0]]
        labels = self.labels_of(plan)
        # As an int, which default_collate makes int64 of; a tensor of float32 stays one.
        targets = labels.tolist() if labels.ndim == 1 and labels.dtype == np.int64 else list(torch.from_numpy(labels))
        return list(zip(samples, targets, strict=True))

    def _substituted(
        self, plan: BatchPlan, images: list[ImagePair], failures: Mapping[int, Failure]
    ) -> tuple[BatchPlan, list[ImagePair]]:
        """The plan and images with substitutes for the samples that failed."""
        if self._substitution is None:
            self._substitution = Substitution(
                self.planner, self.name_of, self.on_error, size_of=_bytes_of, told=self._is_known_to_fail
            )

        def decode(rows: BatchPlan) -> tuple[ImagePair, Mapping[int, Failure]]:
            pairs, failed = self.decode_all(rows)
            return pairs[0], failed

        found = self._substitution(plan, failures, decode, self.quarantine)
        for row, (_, pair) in found.items():
            images[row] = pair
        return plan.with_rows({row: substitute for row, (substitute, _) in found.items()}), images

    def decode_all(self, plan: BatchPlan) -> tuple[list[ImagePair], dict[int, Failure]]:
        """The original and the edit of each row of a plan, (height, width, 3) uint8, None where there is none.

        Returns:
            The pairs, and what failed by row: the original if both did.
        """
        pairs, failures = [], {}
        for row, (original, edit, mixed) in enumerate(
            zip(plan.original.tolist(), plan.edit.tolist(), plan.mixed.tolist(), strict=True)
        ):
            pair: ImagePair = (None, None)
            kind: Kind = "original"
            try:
                pair = self.decode_original(original), None
                self._note_original(original, failed=False)
                kind = "edit"
                if self.store is not None and mixed:
                    pair = pair[0], decode_edit(self.store, edit)
            except DecodeError as error:
                if kind == "original":
                    self._note_original(original, failed=True)
                failures[row] = Failure(kind, error)
            pairs.append(pair)
        return pairs, failures

    def _note_original(self, original: int, *, failed: bool) -> None:
        """Record for the other processes whether an original could be decoded, if they do not know."""
        word, bit = divmod(original, 64)
        cells = self._cells.numpy()[_FAILED:].view(np.uint64)
        mask = np.uint64(1) << np.uint64(bit)
        if bool(cells[word] & mask) != failed:  # an update lost to another process only costs a decode
            cells[word] = cells[word] | mask if failed else cells[word] & ~mask

    def _is_known_to_fail(self, index: int) -> bool:
        """True if some process could not decode the original of a sample."""
        count = len(self.catalog)
        original = index
        if index >= count:
            assert self.store is not None
            original = int(self.store.originals_of(np.array([index - count]))[0])
        word, bit = divmod(original, 64)
        return bool(int(self._cells[_FAILED + word]) >> bit & 1)

    def name_of(self, row: BatchPlan, kind: Kind) -> str:
        """Name of the original or the edit of a plan of one row, for the quarantine."""
        path = self.path_of(int(row.original[0]))
        if kind == "original" or self.store is None:
            return path
        edit = int(row.edit[0])
        return (
            f"{self.store.path}/{self.catalog.path(int(row.original[0]))}: {self.store.prompt_of(edit)}, variant "
            f"{self.store.variant_of(edit)}"
        )

    def decode_original(self, original: int) -> NDArray[np.uint8]:
        """An original's upright pixels, (height, width, 3) uint8, by its row in the catalog.

        Raises:
            DecodeError: it cannot be decoded, or its size differs from the catalog's.
            MirrorError: the source of a packed store at a URL does not answer.
        """
        path, size = self.path_of(original), self.catalog.sizes[original]
        if self.original_store is None:
            return decode_listed(path, size)
        return _decode_stored(self.original_store, original, size, path)

    def _count(self, samples: int) -> None:
        """Warn if an epoch is drawn a second time: under DataLoader nothing else can notice it."""
        worker = get_worker_info()
        slot = 1 + (0 if worker is None else 1 + worker.id % (_SLOTS - 1))
        # Each process writes a cell of its own, so no count is lost.
        self._cells[slot] += samples
        epoch = self.epoch
        if self._varies and int(self._cells[1:_FAILED].sum()) > len(self) and self._warned_of != epoch:
            self._warned_of = epoch
            warnings.warn(
                f"epoch {epoch} has been drawn once already and its samples repeat: call dataset.set_epoch(epoch) "
                "before each epoch (DiffuseMixLoader counts epochs itself). If a sampler repeats indices, wrap it: "
                "distinct(sampler) (DiffuseMixLoader counts repeats itself).",
                RepeatedEpochWarning,
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_substitution": None, "_labels": None}

    def __repr__(self) -> str:
        name, state = type(self).__name__, self.__dict__
        return table(f"{name} of {state.get('root', '?')}", dataset_rows(self, state.get("_edits_by_prompt", {})))


def _check_crop(crop: Any) -> None:
    """Refuse values that are easily mistaken for a crop, and would fail far from here."""
    if not callable(getattr(crop, "boxes", None)) or isinstance(crop, type):
        remedy = schedule_meant(crop, f"TrainCrop({whole(crop) or 224})")
        raise ConfigError(f"crop must be a TrainCrop, RandomCrop or EvalCrop, found {crop!r}; write {remedy}.")


def _check_mix(mix: object) -> None:
    if mix is not None and not isinstance(mix, MixSpec):
        remedy = schedule_meant(mix, "MixSpec.paper(), with brackets")
        raise ConfigError(f"mix must be a MixSpec or None, found {mix!r}; write {remedy}.")


def _checked_targets(targets: ArrayLike, originals: int) -> NDArray[Any]:
    """The targets as an array of int64 or float32 with a row for each original."""
    found = np.asarray(targets)
    if found.ndim < 1 or len(found) != originals or found.dtype.kind not in "iubf":
        raise ConfigError(
            f"targets must be numbers with a row for each of {originals} originals, in the order of dataset.samples, "
            f"found shape {found.shape} of {found.dtype}."
        )
    classes = found.ndim == 1 and found.dtype.kind in "iu"
    return np.array(found, dtype=np.int64 if classes else np.float32)


def _draws(crop: Crop, sizes: NDArray[np.int32]) -> bool:
    """True if a crop draws anything for images of these sizes, (n, 2); otherwise all epochs are the same."""
    drawn = False

    def draws(field: int, rows: NDArray[np.int64]) -> NDArray[np.uint32]:
        nonlocal drawn
        drawn = True
        return np.zeros((len(rows), 4), dtype=np.uint32)

    crop.boxes(np.asarray(sizes, dtype=np.int32), draws)
    return drawn


def decode_edit(store: EditStore, edit: int) -> NDArray[np.uint8]:
    """An edit's pixels, (height, width, 3) uint8. Raises DecodeError; MirrorError if its source does not answer."""
    return _decode_stored(store, edit, store.sizes(np.array([edit]))[0], f"{store.path}: edit {edit}")


def _decode_stored(store: EditStore | OriginalStore, row: int, size: NDArray[np.int32], name: str) -> NDArray[np.uint8]:
    try:
        content = store.encoded(row)
        return raw_pixels(content, size) if store.raw else decode_listed(content, size, IN_STORE)
    except MirrorError:
        raise  # the image may be fine
    except (DecodeError, StoreError) as error:
        raise DecodeError(f"{name}: {error}") from error


def _bytes_of(pair: ImagePair) -> int:
    return sum(0 if image is None else image.nbytes for image in pair)


def _whole_images(*sources: Sequence[NDArray[np.uint8] | None]) -> NDArray[np.void]:
    """The piece table of whole originals and edits."""
    data = [[0 if image is None else image.ctypes.data for image in images] for images in sources]
    shapes = [[(0, 0) if image is None else image.shape[:2] for image in images] for images in sources]
    return piece_table(np.array(data, dtype=np.uint64), np.array(shapes, dtype=np.int32))


def _check_same_originals(root: str | Path, store: EditStore) -> None:
    """Refuse the edits of another folder: none of a sample of their originals is there."""
    rows = np.unique(np.linspace(0, len(store.catalog) - 1, 32).astype(np.int64))
    paths = [store.catalog.path(int(row)) for row in rows]
    if any(Path(root, path).is_file() for path in paths):
        return
    error = StoreError(
        f"{store.path}: the edits belong to other originals: {root} has none of {len(rows)} that were looked for, such "
        f"as {paths[0]!r}; give the folder that they were generated from, or generate edits for this one."
    )
    with contextlib.suppress(OSError):  # the root may be missing, or not be read
        for below in sorted(Path(root).iterdir()):
            if (below / paths[0]).is_file():
                error.add_note(f"{str(below)!r} has it.")
                error.instead = {str(root): str(below)}
                break
    raise error


class _Samples(Sequence[tuple[str, int]]):
    """ImageFolder's list of (path, label) that holds no million strings."""

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

    def __repr__(self) -> str:
        return f"<{len(self)} (path, label), the first {self[0]}>" if len(self) else "<0 (path, label)>"
