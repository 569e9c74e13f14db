"""Visible parts: they hold every pixel that a sample shows, nothing beyond the halo, and change no sample."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixing_cases import plan_of
from numpy.typing import NDArray

from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, EvalCrop, FractalBank, MixSpec, RandomCrop, TrainCrop
from dali_diffusemix.mix.pixel import edit_weight, resample_weights
from dali_diffusemix.plan import Crop, visible_parts
from dali_diffusemix.plan.crops import Draws


def needed(weights: NDArray[np.float32], shown: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The source pixels that the shown outputs of one axis read; not those whose weight is a rounding of 0."""
    return np.flatnonzero((weights[shown] > 1e-6).any(axis=0))


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 2**32 - 1),
    seam_width=st.sampled_from([0.0, 20 / 256, 0.3, 1.0]),
    own_span=st.booleans(),
    out=st.tuples(st.integers(1, 50), st.integers(1, 50)),
)
def test_parts_cover_what_is_shown_and_no_more_than_the_halo(
    seed: int, seam_width: float, own_span: bool, out: tuple[int, int]
) -> None:
    generator = np.random.default_rng(seed)
    count = 6
    mask = generator.integers(-1, 4, count).astype(np.int8)
    extent = np.exp(generator.uniform(np.log(1e-2), np.log(2), (count, 2)))
    box = np.concatenate([generator.uniform(-0.3, 0.9, (count, 2)), extent], axis=1)
    if seed % 4 == 0:  # crops whose pixels' centres lie exactly on the seam and on the edges
        box = np.round(box * 8) / 8
        box[:, 2:] = np.maximum(box[:, 2:], 1 / 8)
    span = np.tile([0.0, 0, 1, 1], (count, 1)) if own_span else None
    plan = plan_of(count, out, box=box, span=span, mask=mask, seam_width=seam_width)
    sizes = generator.integers(1, 120, (2, count, 2)).astype(np.int32)
    parts = visible_parts(plan, sizes)
    for row in range(count):
        for is_edit in (False, True):
            window, size = parts[int(is_edit), row], sizes[int(is_edit), row]
            if is_edit and mask[row] < 0:
                assert not window.any()
                continue
            m = np.zeros((1, 1)) if mask[row] < 0 else edit_weight(int(mask[row]), seam_width, plan.span[row], out)
            seen = np.broadcast_to(m > 1e-6 if is_edit else m < 1 - 1e-6, out)
            # M is constant along one axis, so what is seen is a rectangle.
            shown = [seen.any(axis=1), seen.any(axis=0)]
            lines = []
            for axis in (0, 1):
                start, extent_ = box[row, axis] * size[axis], box[row, axis + 2] * size[axis]
                weights = resample_weights(box[row, axis], box[row, axis + 2], out[axis], int(size[axis]))
                lines.append(needed(weights, shown[axis]))
                if window.any():
                    begin, end = window[axis], window[axis + 2]
                    assert 0 <= begin < end <= size[axis]
                    # The halo: the filter's reach around the centres of the pixels shown.
                    centre = start + extent_ * ((np.flatnonzero(shown[axis]) + 0.5) / out[axis])
                    reach = max(extent_ / out[axis], 1.0)
                    # A soft seam's first and last pixel may be a rounding of nothing.
                    reach += extent_ / out[axis] if seam_width > 0 else 0
                    assert begin >= centre.min() - reach - 0.5 - 1e-6 and end <= centre.max() + reach + 0.5 + 1e-6
            if lines[0].size and lines[1].size:
                assert window[0] <= lines[0][0] and lines[0][-1] < window[2]
                assert window[1] <= lines[1][0] and lines[1][-1] < window[3]
            else:
                # Nothing is seen, so nothing is decoded, unless the seam's last rounding lies in the crop.
                assert not window.any() or seam_width > 0


def epoch(dataset: DiffuseMixDataset, *, visible: bool, batch_size: int = 64) -> torch.Tensor:
    with DiffuseMixLoader(dataset, batch_size, num_workers=2, device="cpu", visible_parts=visible) as loader:
        return torch.cat([images for images, _ in loader])


@pytest.mark.parametrize(
    "crop", [TrainCrop(96), RandomCrop(64, padding=9), EvalCrop(64)], ids=lambda c: type(c).__name__
)
@pytest.mark.parametrize("mix", [MixSpec(probability=1), MixSpec(probability=1, seam_width=0.2, order="crop_then_mix")])
def test_parts_change_no_bit_of_a_sample(
    bank: FractalBank, crop: Crop, mix: MixSpec, imagenet_edits: tuple[Path, Path]
) -> None:
    """DALI's decoder gives the same bytes for a region, so on the CPU not even rounding differs, at the seam or off."""
    root, edits = imagenet_edits
    dataset = DiffuseMixDataset(root, edits=edits, fractals=bank, mix=mix, crop=crop, normalize=None)
    assert torch.equal(epoch(dataset, visible=True), epoch(dataset, visible=False))


class BesideTheImage:
    """A user's crop whose box lies wholly outside of every other image."""

    output_size = (8, 8)

    def boxes(self, sizes: NDArray[np.int32], draws: Draws) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        boxes = np.tile([0.1, 0.1, 0.5, 0.5], (len(sizes), 1))
        boxes[::2, 0] = 1.5
        return boxes, np.zeros(len(sizes), dtype=np.bool_)


@pytest.mark.parametrize("mix", [None, MixSpec(probability=1)])
def test_a_crop_outside_of_its_image_needs_no_pixels(
    photos: Path, edits: Path, bank: FractalBank, mix: MixSpec | None
) -> None:
    given = {} if mix is None else {"edits": edits, "fractals": bank}
    dataset = DiffuseMixDataset(photos, mix=mix, crop=BesideTheImage(), normalize=None, **given)
    samples = epoch(dataset, visible=True)
    assert torch.equal(samples, epoch(dataset, visible=False))
    assert not samples[::2].any() and samples[1::2].flatten(1).any(dim=1).all()


def test_most_of_the_pixels_are_not_decoded() -> None:
    """What it is for: with a hard seam a mixed sample decodes about one crop's worth, not two."""
    from test_plan import planner

    plan = planner(5000, mix=MixSpec(probability=1)).batch(0, range(5000))
    parts = visible_parts(plan, np.full((2, 5000, 2), (375, 500), dtype=np.int32))
    area = [((w[:, 2] - w[:, 0]) * (w[:, 3] - w[:, 1])).astype(np.int64) for w in parts]
    crop = (plan.box[:, 2] * 375) * (plan.box[:, 3] * 500)
    assert (sum(area) / crop).mean() < 1.1
    assert (area[0] == 0).any() and (area[1] == 0).any()
