"""Samples: rows of a plan with their images; the choice of samples to show, and the parts that are decoded."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.errors import ConfigError, DecodeError
from dali_diffusemix.loading.dataset import DiffuseMixDataset, ImagePair, decode_edit
from dali_diffusemix.loading.quarantine import Failure, Substitution
from dali_diffusemix.mix.augment import augmented_image
from dali_diffusemix.mix.pixel import edit_weight, encode, mixed_image
from dali_diffusemix.mix.tensor import PIXELS, TensorFormat
from dali_diffusemix.plan.batch import BatchPlan, Planner
from dali_diffusemix.plan.order import EpochOrder
from dali_diffusemix.plan.spec import MASKS, MixSpec
from dali_diffusemix.plan.windows import visible_parts
from dali_diffusemix.store.mirror import MirrorError

Progress: TypeAlias = Callable[[int, int], None]
MOST_ROWS: Final = 64
MOST_DETAILS: Final = 6  # lines of `Sample.details`
_MOST_EPOCHS: Final = 100
_VALUES: Final = 6  # of a target that is shown as numbers


# Samples to show ------------------------------------------------------------------------------------------------------


def spread_indices(dataset: DiffuseMixDataset, *, epoch: int = 0, rows: int = 8) -> list[int]:
    """Choose samples worth showing: the first mixed ones of the epoch's shuffled order, spread over the classes.

    If there are not enough of them, unmixed ones are added. Raises ConfigError unless 1 ≤ rows ≤ 64.
    """
    return _spread(dataset, dataset.planner, epoch, rows)


def _spread(dataset: DiffuseMixDataset, planner: Planner, epoch: int, rows: int) -> list[int]:
    check_rows(rows)
    order = EpochOrder(length=len(planner), batch_size=512, shuffle=True, seed=dataset.seed)
    share = math.ceil(rows / len(dataset.classes))
    shown: Counter[int] = Counter()
    chosen: list[int] = []
    further: list[int] = []  # mixed, of classes with enough samples
    plain: list[int] = []
    for step in range(len(order)):
        plan = planner.batch(epoch, order.indices(epoch, order.positions(step)))
        columns = (plan.index, dataset.labels_of(plan), plan.mixed)
        for index, label, mixed in zip(*(column.tolist() for column in columns), strict=True):
            if not mixed:
                plain.append(index)
            elif shown[label] >= share:
                further.append(index)
            else:
                shown[label] += 1
                chosen.append(index)
        if len(chosen) >= rows:
            break
        del further[rows:], plain[rows:]
    return (chosen + further + plain)[:rows]


def matching_indices(
    dataset: DiffuseMixDataset,
    mixes: Mapping[str, MixSpec],
    *,
    epoch: int = 0,
    originals: Sequence[int] | None = None,
    rows: int = 8,
) -> dict[str, list[int]]:
    """Find samples of the same originals under each of several mixes.

    In a fixed epoch an index means an original; in an expanded epoch, an original or an edit. So a fixed mix shows its
    sample of the original. An expanded mix has several samples of it and shows the one with the edit that the first
    fixed mix draws for this original, or the unmixed one. Without a fixed mix, an edit is drawn as in a fixed one.

    Args:
        dataset: The dataset; its own mix does not matter.
        mixes: Mixes by name.
        epoch: The epoch.
        originals: Rows of the catalog; None chooses them as `spread_indices` does.
        rows: Number of originals if `originals` is None; 1 to 64.

    Returns:
        Indices by the name of the mix, one for each original.

    Raises:
        ConfigError: An original is not in the catalog, there is no mix, or there is nothing to mix with.
    """
    if not mixes:
        raise ConfigError("mixes must name at least 1 mix, found none.")
    fixed = [mix for mix in mixes.values() if mix.epoch == "fixed"]
    reference = replace(
        dataset.planner, mix=fixed[0] if fixed else replace(next(iter(mixes.values())), epoch="fixed", probability=1)
    )
    count = len(dataset.catalog)
    chosen = np.array(_spread(dataset, reference, epoch, rows) if originals is None else originals, dtype=np.int64)
    if chosen.size and not (chosen.min() >= 0 and chosen.max() < count):
        raise ConfigError(
            f"originals must lie in [0, {count}), found {chosen.min()} to {chosen.max()}; give rows of the catalog, "
            "because mixes side by side show the same originals."
        )
    edit = reference.batch(epoch, chosen).edit
    expanded = np.where(edit >= 0, count + edit, chosen)
    return {name: (chosen if mix.epoch == "fixed" else expanded).tolist() for name, mix in mixes.items()}


def counted(count: int, progress: Progress | None) -> Iterator[int]:
    """Numbers from 0; after each, `progress` is called with how many are done, and with all."""
    for number in range(count):
        yield number
        if progress is not None:
            progress(number + 1, count)


def check_rows(rows: int) -> None:
    """Raise ConfigError unless 1 ≤ rows ≤ 64."""
    if not 1 <= rows <= MOST_ROWS:
        raise ConfigError(f"rows must lie in 1 to {MOST_ROWS}, found {rows}.")


def check_epochs(epochs: Sequence[int]) -> None:
    """Raise ConfigError unless there are 1 to 100 of them."""
    if not 1 <= len(epochs) <= _MOST_EPOCHS:
        raise ConfigError(f"epochs must name 1 to {_MOST_EPOCHS} epochs, found {len(epochs)}.")


# Decoded parts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DecodedParts:
    """The windows (top, left, bottom, right) that the loader decodes for one sample; all 0 if nothing."""

    original: tuple[int, int, int, int]
    original_size: tuple[int, int]  # (height, width) pixels
    edit: tuple[int, int, int, int]
    edit_size: tuple[int, int]  # (0, 0) if not mixed

    @classmethod
    def of(cls, dataset: DiffuseMixDataset, plan: BatchPlan) -> list["DecodedParts"]:
        """Return those of every row of a plan, by `visible_parts`."""
        sizes = np.zeros((2, len(plan), 2), dtype=np.int32)
        sizes[0] = dataset.catalog.sizes[plan.original]
        if dataset.store is not None and plan.mixed.any():
            sizes[1, plan.mixed] = dataset.store.sizes(plan.edit[plan.mixed])
        (originals, edits), (original_sizes, edit_sizes) = visible_parts(plan, sizes), sizes
        columns = (column.tolist() for column in (originals, original_sizes, edits, edit_sizes))
        return [
            cls(original=tuple(a), original_size=tuple(b), edit=tuple(c), edit_size=tuple(d))
            for a, b, c, d in zip(*columns, strict=True)
        ]

    @property
    def pixels(self) -> tuple[int, int]:
        """Number of pixels that are decoded of the original and of the edit."""
        original, edit = ((bottom - top) * (right - left) for top, left, bottom, right in (self.original, self.edit))
        return original, edit

    @property
    def whole(self) -> tuple[int, int]:
        """Number of pixels of the original and of the edit."""
        return math.prod(self.original_size), math.prod(self.edit_size)


def decoded_shares(
    dataset: DiffuseMixDataset, *, epoch: int = 0, indices: Sequence[int] | NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the share of pixels that the loader decodes of the images of some samples, by `plan.visible_parts`.

    Returns:
        (n, 3): of the original; of the edit, NaN if the sample is not mixed; of both together, or of the original if
        the sample is not mixed.

    Raises:
        ConfigError: An index or the epoch lies outside its range.
    """
    decoded = DecodedParts.of(dataset, dataset.planner.batch(epoch, indices))
    pixels = np.array([one.pixels for one in decoded], dtype=np.float64).reshape(-1, 2)
    whole = np.array([one.whole for one in decoded], dtype=np.float64).reshape(-1, 2)
    whole[whole == 0] = np.nan
    return np.column_stack([pixels / whole, pixels.sum(axis=1) / np.nansum(whole, axis=1)])


# A sample -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A row of the plan with its images, None for those that it lacks."""

    plan: BatchPlan  # of this sample, or of its substitute
    row: int
    class_name: str
    prompt: str | None
    target: str | None  # if it is not the number of the class
    original: NDArray[np.uint8]  # (height, width, 3), like the next two; their sizes differ
    edit: NDArray[np.uint8] | None
    fractal: NDArray[np.uint8] | None
    format: TensorFormat  # the dataset's normalisation; values of an erasure are those after it

    @classmethod
    def of(cls, dataset: DiffuseMixDataset, plan: BatchPlan, row: int, planner: Planner | None = None) -> "Sample":
        """Return the sample of a row, or, if it cannot be made, its substitute in training.

        Args:
            dataset: The dataset of the images; failures go into its quarantine.
            plan: A plan, of any mix.
            row: A row of the plan.
            planner: The planner of the plan; by default that of the dataset.

        Raises:
            DecodeError: The sample cannot be made, and the dataset has on_error="raise".
        """
        plan = plan.row(row)
        (images, *_), failures = dataset.decode_all(plan)
        if failures:
            plan, images = _substitute(dataset, plan, failures, planner or dataset.planner)
        original, edit = images
        assert original is not None
        return cls._with(dataset, plan, original, edit)

    @classmethod
    def delivered(cls, dataset: DiffuseMixDataset, plan: BatchPlan) -> "Sample | None":
        """Return the sample of a plan of one row that a loader delivered; nothing is substituted or logged.

        None: an image cannot be decoded now. The loader decodes only what a sample shows, and here images are whole.
        """
        edit = int(plan.edit[0])
        try:
            original = dataset.decode_original(int(plan.original[0]))
            edited = None if dataset.store is None or edit < 0 else decode_edit(dataset.store, edit)
        except (DecodeError, MirrorError):
            return None
        return cls._with(dataset, plan, original, edited)

    @classmethod
    def _with(
        cls, dataset: DiffuseMixDataset, plan: BatchPlan, original: NDArray[np.uint8], edited: NDArray[np.uint8] | None
    ) -> "Sample":
        edit, fractal = int(plan.edit[0]), int(plan.fractal[0])
        store, bank = dataset.store if edit >= 0 else None, dataset.bank
        return cls(
            plan=plan,
            row=0,
            class_name=class_name_of(dataset, plan),
            prompt=None if store is None else store.prompt_of(edit),
            target=target_of(dataset, plan),
            original=original,
            edit=edited,
            fractal=None if bank is None or fractal < 0 else bank.images[fractal],
            format=TensorFormat(normalize=dataset.normalize),
        )

    def hybrid(self) -> NDArray[np.uint8]:
        """Return H on the output grid, (height, width, 3) uint8."""
        return _rounded(mixed_image(self.plan, self.row, self.original, self.edit))

    def fractal_alone(self) -> NDArray[np.uint8]:
        """Return F on the output grid, (height, width, 3) uint8: the sample with λ = 1."""
        whole = replace(self.plan, fractal_weight=np.ones_like(self.plan.fractal_weight))
        return _rounded(mixed_image(whole, self.row, self.original, None, self.fractal))

    def mixed(self) -> NDArray[np.uint8]:
        """Return A on the output grid, (height, width, 3) uint8."""
        return _rounded(mixed_image(self.plan, self.row, self.original, self.edit, self.fractal))

    def augmented(self) -> NDArray[np.uint8]:
        """Return what the network sees, (height, width, 3) uint8: A, after the dataset's `augment`."""
        return augmented_image(self.mixed(), self.operations, self.format)

    @property
    def operations(self) -> NDArray[np.void]:
        """(slots,) of `plan.augment.OPERATION`."""
        operations: NDArray[np.void] = self.plan.operations[self.row]
        return operations

    @property
    def box(self) -> NDArray[np.float64]:
        """The crop (top, left, height, width) in pixels of the original."""
        box: NDArray[np.float64] = self.plan.box[self.row] * np.tile(self.original.shape[:2], 2)
        return box

    def mask(self, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Return M over the whole image, (height, width) uint8, continued beyond the crop."""
        weight = edit_weight(int(self.plan.mask[self.row]), self.plan.seam_width, self._span_of_image(), size)
        return np.broadcast_to(np.rint(255 * weight).astype(np.uint8), size)

    def seam(self) -> tuple[int, float]:
        """Return the axis across the seam (0 down, 1 to the right) and its offset there, as a share of the image."""
        axis = 1 if MASKS[int(self.plan.mask[self.row])] in ("left", "right") else 0
        span = self._span_of_image()
        return axis, float((0.5 - span[axis]) / span[axis + 2])

    def _span_of_image(self) -> NDArray[np.float64]:
        """The image within the span of mask and fractal; the plan has the output within it."""
        box, span = self.plan.box[self.row], self.plan.span[self.row]
        extent = span[2:] / box[2:]
        return np.concatenate([span[:2] - extent * box[:2], extent])

    def details(self) -> list[str]:
        """Return the decisions of the plan, as lines of a caption; at most `MOST_DETAILS`."""
        plan, row = self.plan, self.row
        top, left, height, width = self.box
        lines = [
            f"crop {width:.0f} × {height:.0f} at x {left:.0f}, y {top:.0f}",
            f"of {self.original.shape[1]} × {self.original.shape[0]} pixels",
            "flipped left to right" if plan.flip[row] else "not flipped",
            f"index {plan.index[row]}" + (f"  ·  view {plan.view[row]}" if plan.view[row] else ""),
        ]
        if self.target is not None:
            lines.append(f"target {self.target}")
        if self.edit is not None:
            lines.insert(0, f"mask {MASKS[int(plan.mask[row])]}  ·  λ = {plan.fractal_weight[row]:.2f}")
        return lines


def class_name_of(dataset: DiffuseMixDataset, plan: BatchPlan) -> str:
    """Return the name of the class of a plan's first row."""
    return dataset.classes[int(dataset.catalog.labels[plan.original[0]])]


def target_of(dataset: DiffuseMixDataset, plan: BatchPlan) -> str | None:
    """Return the target of a plan's first row as text; None if it is the number of the class."""
    target = dataset.labels_of(plan)[0]
    if target.ndim == 0 and target == dataset.catalog.labels[plan.original[0]]:
        return None
    return str(target.tolist()) if target.ndim == 0 else "  ·  ".join(label_lines(target, dataset.classes))


def label_lines(label: NDArray[np.generic], classes: Sequence[str]) -> list[str]:
    """Return a label or target in one or two lines.

    A class number is the name of the class; probabilities of the classes are the two largest with their shares; all
    else is numbers.
    """
    values = np.asarray(label, dtype=np.float64).ravel()
    if not label.ndim:
        number = label.item()
        is_class = isinstance(number, int) and 0 <= number < len(classes)
        return [classes[number] if is_class else f"{number:.6g}"]
    if len(values) == len(classes) > 1 and values.min() >= 0 and abs(values.sum() - 1) < 0.01:
        largest = np.argsort(-values, kind="stable")[:2]
        return [f"{100 * values[one]:.0f} % {classes[one]}" for one in largest if values[one] >= 0.005]
    shown = " ".join(f"{value:.3g}" for value in values[:_VALUES])
    return [shown + (f" … ({len(values)} values)" if len(values) > _VALUES else "")]


def _substitute(
    dataset: DiffuseMixDataset, plan: BatchPlan, failures: Mapping[int, Failure], planner: Planner
) -> tuple[BatchPlan, ImagePair]:
    """Return the plan and the images of a sample's substitute."""

    def decode(rows: BatchPlan) -> tuple[ImagePair, Mapping[int, Failure]]:
        pairs, failed = dataset.decode_all(rows)
        return pairs[0], failed

    substitution: Substitution[ImagePair] = Substitution(
        planner, dataset.name_of, dataset.on_error, size_of=lambda images: 0
    )
    return substitution(plan, failures, decode, dataset.quarantine)[0]


def _rounded(image: NDArray[np.float32]) -> NDArray[np.uint8]:
    return encode(image, PIXELS).astype(np.uint8, copy=False)
