"""Samples: rows of a plan with their images; which of them to show, and how much of their images is decoded."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.errors import ConfigError
from dali_diffusemix.loading.dataset import DiffuseMixDataset, ImagePair
from dali_diffusemix.loading.quarantine import Failure, Substitution
from dali_diffusemix.mix.pixel import edit_weight, encode, mixed_image
from dali_diffusemix.mix.tensor import TensorFormat
from dali_diffusemix.plan.batch import BatchPlan, Planner
from dali_diffusemix.plan.order import EpochOrder
from dali_diffusemix.plan.spec import MASKS, MixSpec
from dali_diffusemix.plan.windows import visible_parts

MOST_ROWS: Final = 64
_MOST_EPOCHS: Final = 100

_PIXELS: Final = TensorFormat(dtype="uint8", channels_last=True, normalize=None)


# Which to show --------------------------------------------------------------------------------------------------------


def spread_indices(dataset: DiffuseMixDataset, *, epoch: int = 0, rows: int = 8) -> list[int]:
    """Choose samples worth showing: the first mixed ones of the epoch's shuffled order, spread over the classes.

    Where there are not enough of them, unmixed ones fill up. Raises ConfigError unless 1 ≤ rows ≤ 64.
    """
    return _spread(dataset, dataset.planner, epoch, rows)


def _spread(dataset: DiffuseMixDataset, planner: Planner, epoch: int, rows: int) -> list[int]:
    if not 1 <= rows <= MOST_ROWS:
        raise ConfigError(f"rows must lie in 1 to {MOST_ROWS}, found {rows}")
    order = EpochOrder(length=len(planner), batch_size=512, shuffle=True, seed=dataset.seed)
    share = math.ceil(rows / len(dataset.classes))
    shown: Counter[int] = Counter()
    chosen: list[int] = []
    further: list[int] = []  # mixed, of classes that have their share
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

    An index means an original in a fixed epoch, and an original or an edit in an expanded one. So a fixed mix shows its
    sample of the original, and an expanded one, which has several, the one with the edit that the first fixed mix draws
    for this original; unmixed, where that leaves it unmixed. Without a fixed mix an edit is drawn as if one were there.

    Args:
        dataset: What to draw from; its own mix does not matter.
        mixes: By name.
        epoch: The epoch that is drawn.
        originals: Rows of the catalog; None chooses them as `spread_indices` does.
        rows: How many, where `originals` is None; 1 to 64.

    Returns:
        Indices by the mix's name, all lists as long as the originals.

    Raises:
        ConfigError: An original is not in the catalog, or there is no mix, or nothing to mix with.
    """
    if not mixes:
        raise ConfigError("mixes must name at least 1 mix, found none")
    fixed = [mix for mix in mixes.values() if mix.epoch == "fixed"]
    reference = replace(
        dataset.planner, mix=fixed[0] if fixed else replace(next(iter(mixes.values())), epoch="fixed", probability=1)
    )
    count = len(dataset.catalog)
    chosen = np.array(_spread(dataset, reference, epoch, rows) if originals is None else originals, dtype=np.int64)
    if chosen.size and not (chosen.min() >= 0 and chosen.max() < count):
        raise ConfigError(
            f"originals must lie in [0, {count}), found {chosen.min()} to {chosen.max()}: mixes side by side show the "
            "same originals, whatever an index means under each; give rows of the catalog"
        )
    edit = reference.batch(epoch, chosen).edit
    expanded = np.where(edit >= 0, count + edit, chosen)
    return {name: (chosen if mix.epoch == "fixed" else expanded).tolist() for name, mix in mixes.items()}


def check_epochs(epochs: Sequence[int]) -> None:
    """Raise ConfigError unless there are 1 to 100 of them."""
    if not 1 <= len(epochs) <= _MOST_EPOCHS:
        raise ConfigError(f"epochs must name 1 to {_MOST_EPOCHS} epochs, found {len(epochs)}")


# How much is decoded --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What the loader decodes for one sample: windows (top, left, bottom, right), all 0 where nothing is."""

    original: tuple[int, int, int, int]
    original_size: tuple[int, int]  # (height, width) pixels
    edit: tuple[int, int, int, int]
    edit_size: tuple[int, int]  # (0, 0): not mixed

    @classmethod
    def of(cls, dataset: DiffuseMixDataset, plan: BatchPlan) -> list["Decoded"]:
        """Of every row of a plan, by `visible_parts`."""
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
        """How many pixels are decoded of the original and of the edit."""
        original, edit = ((bottom - top) * (right - left) for top, left, bottom, right in (self.original, self.edit))
        return original, edit

    @property
    def whole(self) -> tuple[int, int]:
        """How many pixels the original and the edit have."""
        return math.prod(self.original_size), math.prod(self.edit_size)


def decoded_shares(
    dataset: DiffuseMixDataset, *, epoch: int = 0, indices: Sequence[int] | NDArray[np.int64]
) -> NDArray[np.float64]:
    """What share of its images' pixels the loader decodes for each of some samples, as `plan.visible_parts` has it.

    Returns:
        (n, 3) of the original, of the edit (NaN where the sample is not mixed), and of all the pixels of both, or of
        the original alone where the sample is not mixed.

    Raises:
        ConfigError: An index or the epoch lies outside its range.
    """
    decoded = Decoded.of(dataset, dataset.planner.batch(epoch, indices))
    pixels = np.array([one.pixels for one in decoded], dtype=np.float64).reshape(-1, 2)
    whole = np.array([one.whole for one in decoded], dtype=np.float64).reshape(-1, 2)
    whole[whole == 0] = np.nan
    return np.column_stack([pixels / whole, pixels.sum(axis=1) / np.nansum(whole, axis=1)])


# A sample -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A row of the plan with its images. What is not there is None."""

    plan: BatchPlan  # of this sample, or of the one that takes its place
    row: int
    class_name: str
    prompt: str | None
    original: NDArray[np.uint8]  # (height, width, 3), and so are the next two, each of its own size
    edit: NDArray[np.uint8] | None
    fractal: NDArray[np.uint8] | None

    @classmethod
    def of(cls, dataset: DiffuseMixDataset, plan: BatchPlan, row: int, planner: Planner | None = None) -> "Sample":
        """The sample of a row; where that cannot be made, the one that takes its place in training.

        Args:
            dataset: Whose images they are; what fails goes into its quarantine.
            plan: Rows, of any mix.
            row: Which.
            planner: Whose rows they are; the dataset's unless given.

        Raises:
            DecodeError: It cannot be made, and the dataset has on_error="raise".
        """
        plan = plan.row(row)
        (images, *_), failures = dataset.decode_all(plan)
        if failures:
            plan, images = _substitute(dataset, plan, failures, planner or dataset.planner)
        edit, fractal = int(plan.edit[0]), int(plan.fractal[0])
        store, bank = dataset.store if edit >= 0 else None, dataset.bank
        original, edited = images
        assert original is not None
        return cls(
            plan=plan,
            row=0,
            class_name=dataset.classes[int(dataset.catalog.labels[plan.original[0]])],
            prompt=None if store is None else store.prompt_of(edit),
            original=original,
            edit=edited,
            fractal=None if bank is None or fractal < 0 else bank.images[fractal],
        )

    def hybrid(self) -> NDArray[np.uint8]:
        """H on the output grid, (height, width, 3) uint8."""
        return _rounded(mixed_image(self.plan, self.row, self.original, self.edit))

    def fractal_alone(self) -> NDArray[np.uint8]:
        """F on the output grid, (height, width, 3) uint8: the sample as it would be with λ = 1."""
        whole = replace(self.plan, fractal_weight=np.ones_like(self.plan.fractal_weight))
        return _rounded(mixed_image(whole, self.row, self.original, None, self.fractal))

    def augmented(self) -> NDArray[np.uint8]:
        """A on the output grid, (height, width, 3) uint8: what the network sees."""
        return _rounded(mixed_image(self.plan, self.row, self.original, self.edit, self.fractal))

    @property
    def box(self) -> NDArray[np.float64]:
        """The crop (top, left, height, width) in pixels of the original."""
        box: NDArray[np.float64] = self.plan.box[self.row] * np.tile(self.original.shape[:2], 2)
        return box

    def mask(self, size: tuple[int, int]) -> NDArray[np.uint8]:
        """M over the whole image, (height, width) uint8, and beyond the crop as if that went on."""
        weight = edit_weight(int(self.plan.mask[self.row]), self.plan.seam_width, self._span_of_image(), size)
        return np.broadcast_to(np.rint(255 * weight).astype(np.uint8), size)

    def seam(self) -> tuple[int, float]:
        """The axis across the seam (0 down, 1 to the right), and the seam's place on it; the image's side is 1."""
        axis = 1 if MASKS[int(self.plan.mask[self.row])] in ("left", "right") else 0
        span = self._span_of_image()
        return axis, float((0.5 - span[axis]) / span[axis + 2])

    def _span_of_image(self) -> NDArray[np.float64]:
        """The image within what mask and fractal span, where the plan has the output within it."""
        box, span = self.plan.box[self.row], self.plan.span[self.row]
        extent = span[2:] / box[2:]
        return np.concatenate([span[:2] - extent * box[:2], extent])

    def details(self) -> list[str]:
        """What the plan decided, for the caption."""
        plan, row = self.plan, self.row
        top, left, height, width = self.box
        lines = [
            f"crop {width:.0f} × {height:.0f} at x {left:.0f}, y {top:.0f}",
            f"of {self.original.shape[1]} × {self.original.shape[0]} pixels",
            "flipped left to right" if plan.flip[row] else "not flipped",
            f"index {plan.index[row]}",
        ]
        if self.edit is not None:
            lines.insert(0, f"mask {MASKS[int(plan.mask[row])]}  ·  λ = {plan.fractal_weight[row]:.2f}")
        return lines


def _substitute(
    dataset: DiffuseMixDataset, plan: BatchPlan, failures: Mapping[int, Failure], planner: Planner
) -> tuple[BatchPlan, ImagePair]:
    """What takes the place of a sample: its row and its images."""

    def decode(rows: BatchPlan) -> tuple[ImagePair, Mapping[int, Failure]]:
        pairs, failed = dataset.decode_all(rows)
        return pairs[0], failed

    substitution: Substitution[ImagePair] = Substitution(
        planner, dataset.name_of, dataset.on_error, size_of=lambda images: 0
    )
    return substitution(plan, failures, decode, dataset.quarantine)[0]


def _rounded(image: NDArray[np.float32]) -> NDArray[np.uint8]:
    return encode(image, _PIXELS).astype(np.uint8, copy=False)
