"""The plan of a batch: everything random about it, as arrays, one row per sample.

`Planner` turns (seed, epoch, indices, views) into a `BatchPlan`, a pure function: a row depends on neither batch size,
worker, rank nor history, and any row of any epoch costs the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Final, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dali_diffusemix.base.philox import (
    CROP,
    EDIT,
    FLIP,
    FRACTAL,
    MASK,
    MIXED,
    WEIGHT,
    below,
    check_seed,
    draw,
    uniform,
)
from dali_diffusemix.errors import ConfigError
from dali_diffusemix.plan.augment import Augmentation, described, draw_operations, streams
from dali_diffusemix.plan.crops import Crop, Draws
from dali_diffusemix.plan.schedule import Schedule, setting_at, values_of
from dali_diffusemix.plan.spec import MASKS, MixSpec

PLAN_VERSION: Final = 1
"""Frozen by golden vectors: another value means that the same seed gives other samples."""

_SHOWN: Final = 12  # rows of a plan that is printed
_COMMON: Final = (MIXED, EDIT, MASK, FRACTAL, WEIGHT, FLIP, CROP)


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """One row per sample. Boxes are (top, left, height, width) relative to the image they lie in."""

    epoch: int
    index: NDArray[np.int64]  # (n,) number of the sample in the epoch
    view: NDArray[np.int64]  # (n,) how often the index came before in the epoch; 0 unless a sampler repeats it
    original: NDArray[np.int64]  # (n,) row of the catalog
    edit: NDArray[np.int64]  # (n,) row of the edit index; -1: not mixed
    mask: NDArray[np.int8]  # (n,) index in MASKS; -1: not mixed
    box: NDArray[np.float64]  # (n, 4) the crop; may leave [0, 1]
    span: NDArray[np.float64]  # (n, 4) the output within what mask and fractal span
    seam_width: float  # of what the mask spans
    flip: NDArray[np.bool_]  # (n,) left to right, last of all
    fractal: NDArray[np.int64]  # (n,) row of the bank; -1: none
    fractal_flip: NDArray[np.bool_]  # (n, 2) the fractal's own: upside down, left to right
    fractal_weight: NDArray[np.float32]  # (n,) λ; 0 where there is no fractal
    operations: NDArray[np.void]  # (n, slots) of `augment.OPERATION`: what follows the mix, in order; 0 slots: nothing
    output_size: tuple[int, int]  # (height, width) pixels

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        """The first rows, as a table."""
        shown = self.rows(0, _SHOWN)
        columns = {
            "index": [*map(str, shown.index)],
            "view": [*map(str, shown.view)] if shown.view.any() else [],
            "original": [*map(str, shown.original)],
            "edit": [str(edit) if edit >= 0 else "-" for edit in shown.edit],
            "mask": [MASKS[mask] if mask >= 0 else "-" for mask in shown.mask],
            "fractal": [str(fractal) if fractal >= 0 else "-" for fractal in shown.fractal],
            "weight": [f"{weight:.2f}" for weight in shown.fractal_weight],
            "flip": ["yes" if flip else "no" for flip in shown.flip],
            "box": [" ".join(f"{edge:.3f}" for edge in box) for box in shown.box],
            "operations": [", ".join(filter(None, map(described, row))) or "-" for row in shown.operations],
        }
        if not shown.operations.shape[1]:
            del columns["operations"]
        padded = []
        for name, texts in columns.items():
            width = max(map(len, (name, *texts)))
            padded += [[text.ljust(width) for text in (name, *texts)]] if texts else []
        height, width = self.output_size
        lines = [f"{type(self).__name__} of {len(self)} samples of epoch {self.epoch}, {height} x {width} pixels"]
        lines += [f"    {'  '.join(row)}".rstrip() for row in zip(*padded, strict=True)]
        return "\n".join([*lines, *["    ..."] * (len(self) > _SHOWN)])

    @property
    def mixed(self) -> NDArray[np.bool_]:
        """(n,) True where the sample shows an edit."""
        return self.edit >= 0

    def row(self, row: int) -> "BatchPlan":
        """The plan of one sample, a view."""
        return self.rows(row, row + 1)

    def rows(self, start: int, stop: int) -> "BatchPlan":
        """The plan of consecutive samples, a view."""
        return replace(self, **{name: getattr(self, name)[start:stop] for name in self._columns()})

    def with_rows(self, rows: Mapping[int, "BatchPlan"]) -> "BatchPlan":
        """The plan with some rows replaced by plans of one sample each."""
        columns = {name: getattr(self, name).copy() for name in self._columns()}
        for row, other in rows.items():
            for name, column in columns.items():
                column[row] = getattr(other, name)[0]
        return replace(self, **columns)

    def unmixed(self) -> "BatchPlan":
        """The same crops and flips of the originals alone: no edit, no fractal."""
        none = np.full(len(self), -1)
        return replace(
            self,
            edit=none.astype(self.edit.dtype),
            mask=none.astype(self.mask.dtype),
            fractal=none.astype(self.fractal.dtype),
            fractal_flip=np.zeros_like(self.fractal_flip),
            fractal_weight=np.zeros_like(self.fractal_weight),
        )

    @classmethod
    def _columns(cls) -> list[str]:
        return [field.name for field in fields(cls) if field.name not in ("epoch", "seam_width", "output_size")]


class EditTable(Protocol):
    """The edits of each original, sorted by original."""

    @property
    def starts(self) -> NDArray[np.int64]:
        """(originals + 1,) int64: the edits of original i are rows starts[i] to starts[i+1]."""
        ...

    def originals_of(self, edits: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) rows of the catalog that these edits belong to."""
        ...


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Turns (epoch, indices) into rows. Holds what decides them and draws nothing until asked.

    In a fixed epoch index i is original i. In an expanded one the first N indices are the originals, unmixed, and
    index N + j is edit j. Crop, mix and augment may be Schedules; all epochs have one length.
    """

    seed: int
    crop: Crop | Schedule[Crop]
    sizes: NDArray[np.int32]  # (originals, 2) (height, width) pixels
    mix: MixSpec | Schedule[MixSpec | None] | None = None
    edits: EditTable | None = None
    fractals: int = 0
    augment: tuple[Augmentation, ...] | Schedule[tuple[Augmentation, ...]] = ()

    def __post_init__(self) -> None:
        check_seed(self.seed, 0)
        for settings in values_of(self.augment):
            list(streams(settings))  # refuses too many of a kind
        mixes = values_of(self.mix)
        if len({mix is not None and mix.epoch == "expanded" for mix in mixes}) > 1:
            raise ConfigError(
                f"mix must give all epochs one length, found fixed and expanded ones in {self.mix!r}; take "
                "epoch='expanded' in all values, or in none."
            )
        for mix in mixes:
            self._check_mix(mix)

    def _check_mix(self, mix: MixSpec | None) -> None:
        """Refuse a mix for which something is missing."""
        if mix is None:
            return
        if self.edits is None:
            raise ConfigError("edits must be given with mix, found None; give an edit store or take mix=None.")
        if len(self.edits.starts) != len(self.sizes) + 1:
            raise ConfigError(
                f"edits must be of these originals: found starts for {len(self.edits.starts) - 1} originals, "
                f"{len(self.sizes)} in the catalog."
            )
        if self.fractals < 1 and mix.fractal_weight_range[1] > 0:
            raise ConfigError(
                f"fractal_weight {mix.fractal_weight} needs a fractal bank of at least 1, found {self.fractals}; "
                "give fractals=, or mix=MixSpec(fractal_weight=0)."
            )

    def __len__(self) -> int:
        """Samples in an epoch."""
        mix = setting_at(self.mix, 0)
        if mix is not None and self.edits is not None and mix.epoch == "expanded":
            return len(self.sizes) + int(self.edits.starts[-1])
        return len(self.sizes)

    def originals_of(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) rows of the catalog of these samples."""
        if len(self) == len(self.sizes) or self.edits is None:
            return indices
        edit = indices - len(self.sizes)
        originals = indices.copy()
        originals[edit >= 0] = self.edits.originals_of(edit[edit >= 0])
        return originals

    def batch(self, epoch: int, indices: ArrayLike, views: ArrayLike = 0) -> BatchPlan:
        """Return the rows of these samples in this epoch.

        Args:
            epoch: 0 ≤ epoch < 2³².
            indices: (n,) 0 ≤ index < len(self).
            views: (n,) or one for all: how often the index came before in the epoch, 0 ≤ view < 2³². Another view of
                the same index has other draws.

        Raises:
            ConfigError: an index, a view or the epoch lies outside its range.
        """
        index = np.atleast_1d(np.asarray(indices, dtype=np.int64))
        view = np.broadcast_to(np.asarray(views, dtype=np.int64), index.shape)
        count = len(index)
        if count and not (index.min() >= 0 and index.max() < len(self)):
            raise ConfigError(f"index must lie in [0, {len(self)}), found {index.min()} to {index.max()}.")
        if count and not (view.min() >= 0 and view.max() < 2**32):
            raise ConfigError(f"view must lie in [0, 2**32), found {view.min()} to {view.max()}.")
        # One call for what nearly every row needs; a crop's later tries are drawn for the rows that need them.
        common = dict(zip(_COMMON, draw(self.seed, epoch, index, _COMMON, view), strict=True))

        def draws(field: int, rows: NDArray[np.int64]) -> NDArray[np.uint32]:
            if field in common:
                return np.asarray(common[field][rows])
            return np.asarray(draw(self.seed, epoch, index[rows], [field], view[rows])[0])

        crop, chosen = setting_at(self.crop, epoch), setting_at(self.mix, epoch)
        original, edit = self._sources(chosen, index, draws)
        sizes = np.asarray(self.sizes[original], dtype=np.int32)
        box, flip = crop.boxes(sizes, draws)
        mixed = edit >= 0
        rows = np.arange(count)
        mix = chosen or MixSpec()
        of_mask, of_fractal = draws(MASK, rows)[:, 0], draws(FRACTAL, rows)
        masks = np.array([MASKS.index(m) for m in mix.masks], dtype=np.int8)
        low, high = mix.fractal_weight_range
        weight = np.where(mixed, low + (high - low) * uniform(draws(WEIGHT, rows)[:, 0]), 0).astype(np.float32)
        blended = weight > 0
        operations = draw_operations(setting_at(self.augment, epoch), count, crop.output_size, draws)
        return BatchPlan(
            epoch=epoch,
            index=index,
            view=view,
            original=original,
            edit=edit,
            mask=np.where(mixed, masks[below(of_mask, len(masks))], np.int8(-1)),
            box=box,
            span=box if mix.order == "mix_then_crop" else np.tile([0.0, 0.0, 1.0, 1.0], (count, 1)),
            seam_width=mix.seam_width,
            flip=flip,
            fractal=np.where(blended, below(of_fractal[:, 0], self.fractals), -1),
            fractal_flip=(of_fractal[:, 1:3] >> np.uint32(31)).astype(np.bool_) & blended[:, None],
            fractal_weight=weight,
            operations=operations,
            output_size=crop.output_size,
        )

    def _sources(
        self, mix: MixSpec | None, index: NDArray[np.int64], draws: Draws
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The original and the edit of each sample; -1 where it shows no edit."""
        if mix is None or self.edits is None:
            return index, np.full(len(index), -1, dtype=np.int64)
        if mix.epoch == "expanded":
            return self.originals_of(index), np.maximum(index - len(self.sizes), -1)
        rows = np.arange(len(index))
        first = np.asarray(self.edits.starts[index])
        count = np.asarray(self.edits.starts[index + 1]) - first
        probability = count / (1 + count) if mix.probability is None else mix.probability
        mixed = (uniform(draws(MIXED, rows)[:, 0]) < probability) & (count > 0)
        return index, np.where(mixed, first + below(draws(EDIT, rows)[:, 0], count), -1)
