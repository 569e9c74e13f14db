"""The mix of DiffuseMix written by hand in torch, for a set of small square images in memory, in several ways.

Batches are whole tensors; every way makes the same numbers from the same `Draws`, those of MixSpec.paper() with
RandomCrop(32, padding=4): the mask and the fractal span the image, outside it is 0, then flip and normalise.

    float           everything in float32: select, blend, pad, then crop and flip by advanced indexing
    float_unfold    the same, cropped by indexing an unfolded view of the padded batch
    float_grid      the same, cropped and flipped by grid_sample
    uint8           select, pad, crop and flip bytes, and blend and normalise what is left
    uint8_unfold    the same with the unfolded view
    padded          both sets are padded and stored with their mirror images, so that crops are views of the sets;
                    fractals are stored scaled and normalised: one addcmul blends and normalises
    padded_rows     the same with the colours of a pixel together (NHWC); the last step makes NCHW
    padded_pixels   the same with four bytes a pixel, one int32
    pixels          the same, and one gather takes each pixel from the original or from the edit
    select          as `padded`, but whole images are gathered, in long runs, selected by bits and blended; then cropped
    quadrants       the same, but one gather takes quarters of images, each from the original or from the edit
    compiled        torch.compile of the formula, for images as they are
    compiled_padded torch.compile of `padded`

    padded_rows_channels_last, pixels_channels_last: without the last step's change of layout

And where a batch is made: in the main thread (with `threads` threads for each operation), in threads of Python with one
thread for each operation (`_threads`), or by DataLoader's workers (`_workers`).
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from dali_diffusemix.bench import Contender
from dali_diffusemix.mix import IMAGENET_MEAN, IMAGENET_STD
from dali_diffusemix.plan.batch import BatchPlan

PADDING = 4
OFFSETS = 2 * PADDING + 1  # of a crop, along each axis
FRACTAL_WEIGHT = 0.2
MEAN = 255 * torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
DEVIATION = 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1)
SCALE = (1 - FRACTAL_WEIGHT) / DEVIATION  # of what is not fractal
Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Images:
    """The whole set in memory; images are (n, side, side, 3) uint8."""

    originals: torch.Tensor
    edits: torch.Tensor  # one for each original
    fractals: torch.Tensor
    labels: torch.Tensor  # (n,) int64

    @property
    def side(self) -> int:
        return self.originals.shape[1]


@dataclass(frozen=True)
class Draws:
    """What is random in a batch, a row for each sample."""

    image: torch.Tensor  # (b,) int64
    side: torch.Tensor  # (b,) int64: left, right, top, bottom show the edit
    fractal: torch.Tensor  # (b,) int64
    fractal_flip: torch.Tensor  # (b, 2) int64: upside down, left to right
    corner: torch.Tensor  # (b, 2) int64: top, left of the crop in the padded image
    flip: torch.Tensor  # (b,) int64

    @classmethod
    def random(cls, image: torch.Tensor, fractals: int) -> "Draws":
        drawn = torch.rand(7, len(image))  # one call costs less than six
        sizes = torch.tensor([4, fractals, 2, 2, OFFSETS, OFFSETS, 2]).view(7, 1)
        side, fractal, up, across, top, left, flip = (drawn * sizes).long()
        return cls(image, side, fractal, torch.stack([up, across], 1), torch.stack([top, left], 1), flip)

    @classmethod
    def of_plan(cls, plan: BatchPlan, side: int) -> "Draws":
        """The draws of this package's plan, if each original has one edit."""
        corner = np.rint(plan.box[:, :2] * side).astype(np.int64) + PADDING
        columns = (plan.original, plan.mask, plan.fractal, plan.fractal_flip, corner, plan.flip)
        return cls(*(torch.from_numpy(column.astype(np.int64)) for column in columns))


Mix = Callable[[Draws], torch.Tensor]

# Parts ----------------------------------------------------------------------------------------------------------------


def edit_masks(side: int) -> torch.Tensor:
    """(4, side, side) bool: where each mask shows the edit."""
    near = torch.arange(side) < side // 2
    across, down = near.expand(side, side), near.view(-1, 1).expand(side, side)
    return torch.stack([across, ~across, down, ~down])


def flipped_bank(fractals: torch.Tensor) -> torch.Tensor:
    """(4 m, side, side, 3): each fractal in its four flips; see `fractal_row`."""
    return torch.stack([fractals.flip([d for d in (1, 2) if f & (3 - d)]) for f in range(4)], 1).flatten(0, 1)


def fractal_row(draws: Draws) -> torch.Tensor:
    return draws.fractal * 4 + draws.fractal_flip[:, 0] * 2 + draws.fractal_flip[:, 1]


def planes(images: torch.Tensor) -> torch.Tensor:
    """NHWC to NCHW, contiguous."""
    return images.permute(0, 3, 1, 2).contiguous()


def padded(images: torch.Tensor) -> torch.Tensor:
    """NHWC with a border of 0."""
    return F.pad(images, (0, 0, PADDING, PADDING, PADDING, PADDING))


def mirrored(images: torch.Tensor) -> torch.Tensor:
    """(2 n, ...): rows 2 i and 2 i + 1 are image i and its mirror image, NHWC."""
    return torch.stack([images, images.flip(2)], 1).flatten(0, 1)


def normalized_bank(fractals: torch.Tensor) -> torch.Tensor:
    """(4 m, padded side, padded side, 3) float32: λF, normalised, so that SCALE times the rest can be added to it."""
    bank = padded(flipped_bank(fractals)).float()
    return (FRACTAL_WEIGHT * bank - MEAN.flatten()) / DEVIATION.flatten()


def windows(images: torch.Tensor, side: int, dims: tuple[int, int]) -> torch.Tensor:
    """All crops as a view: the dimensions (top, left) come after the first one, those of a crop stay in their place."""
    view = images.unfold(dims[0], side, 1).unfold(dims[1], side, 1)  # window dimensions come last
    view = view.movedim((dims[0], dims[1]), (1, 2))
    return view.movedim((-2, -1), (dims[0] + 2, dims[1] + 2))


def cropped_by_index(images: torch.Tensor, draws: Draws, side: int) -> torch.Tensor:
    """Crop and flip padded NCHW images by advanced indexing."""
    along = torch.arange(side)
    rows = draws.corner[:, :1] + along
    columns = draws.corner[:, 1:] + torch.where(draws.flip.view(-1, 1) == 1, along.flip(0), along)
    batch, channels = torch.arange(len(images)).view(-1, 1, 1, 1), torch.arange(3).view(1, -1, 1, 1)
    return images[batch, channels, rows[:, None, :, None], columns[:, None, None, :]]


def cropped_by_unfold(images: torch.Tensor, draws: Draws, side: int) -> torch.Tensor:
    """Crop padded NCHW images by indexing a view, then flip."""
    cropped = windows(images, side, (2, 3))[torch.arange(len(images)), draws.corner[:, 0], draws.corner[:, 1]]
    return torch.where(draws.flip.view(-1, 1, 1, 1) == 1, cropped.flip(-1), cropped)


def cropped_by_grid(images: torch.Tensor, draws: Draws, side: int) -> torch.Tensor:
    """Crop and flip NCHW images that are not padded by grid_sample, which fills with 0."""
    along = torch.arange(side)
    rows = draws.corner[:, :1] + along - PADDING
    columns = draws.corner[:, 1:] + torch.where(draws.flip.view(-1, 1) == 1, along.flip(0), along) - PADDING
    shape = (len(images), side, side)
    grid = torch.stack([columns.view(-1, 1, side).expand(shape), rows.view(-1, side, 1).expand(shape)], 3)
    grid = (2 * grid + 1) / side - 1
    return F.grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def as_pixels(images: torch.Tensor) -> torch.Tensor:
    """(n, h, w, 3) uint8 to (n, h, w) int32: red, green, blue, 0."""
    return F.pad(images, (0, 1)).view(torch.int32).squeeze(-1)


def as_draws_of_mirrored(draws: Draws) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(row of `mirrored`, side, row of the bank, top, left) that give the flipped sample without a flip."""
    flip = draws.flip
    side = torch.where(draws.side < 2, draws.side ^ flip, draws.side)
    left = torch.where(flip == 1, OFFSETS - 1 - draws.corner[:, 1], draws.corner[:, 1])
    return 2 * draws.image + flip, side, fractal_row(draws) ^ flip, draws.corner[:, 0], left


# Ways to mix ----------------------------------------------------------------------------------------------------------


def float_mix(images: Images, *, crop: str = "index") -> Mix:
    originals, edits = planes(images.originals), planes(images.edits)
    bank, masks = planes(flipped_bank(images.fractals)).float(), edit_masks(images.side)[:, None]

    def mix(draws: Draws) -> torch.Tensor:
        original, edit = (one.index_select(0, draws.image).float() for one in (originals, edits))
        hybrid = torch.where(masks[draws.side], edit, original)
        blended = hybrid.mul_(1 - FRACTAL_WEIGHT).add_(bank.index_select(0, fractal_row(draws)), alpha=FRACTAL_WEIGHT)
        if crop == "grid":
            return cropped_by_grid(blended, draws, images.side).sub_(MEAN).div_(DEVIATION)
        crops = cropped_by_index if crop == "index" else cropped_by_unfold
        return crops(F.pad(blended, (PADDING,) * 4), draws, images.side).sub_(MEAN).div_(DEVIATION)

    return mix


def uint8_mix(images: Images, *, crop: str = "index") -> Mix:
    originals, edits = planes(images.originals), planes(images.edits)
    bank, masks = planes(padded(flipped_bank(images.fractals))), edit_masks(images.side)[:, None]
    crops = cropped_by_index if crop == "index" else cropped_by_unfold

    def mix(draws: Draws) -> torch.Tensor:
        hybrid = torch.where(masks[draws.side], *(one.index_select(0, draws.image) for one in (edits, originals)))
        hybrid = crops(F.pad(hybrid, (PADDING,) * 4), draws, images.side)
        fractal = crops(bank.index_select(0, fractal_row(draws)), draws, images.side)
        blended = hybrid.float().mul_(1 - FRACTAL_WEIGHT).add_(fractal, alpha=FRACTAL_WEIGHT)
        return blended.sub_(MEAN).div_(DEVIATION)

    return mix


def padded_mix(images: Images) -> Mix:
    side = images.side
    originals, edits = (
        windows(planes(mirrored(padded(one))), side, (2, 3)) for one in (images.originals, images.edits)
    )
    bank = windows(planes(normalized_bank(images.fractals)), side, (2, 3))
    masks = windows(padded(edit_masks(side)[..., None])[..., 0], side, (1, 2))

    def mix(draws: Draws) -> torch.Tensor:
        image, mask, fractal, top, left = as_draws_of_mirrored(draws)
        hybrid = torch.where(masks[mask, top, left][:, None], edits[image, top, left], originals[image, top, left])
        return bank[fractal, top, left].addcmul_(hybrid.float(), SCALE)

    return mix


def select_mix(images: Images) -> Mix:
    side, shape = images.side, (-1, 3, images.side + 2 * PADDING, images.side + 2 * PADDING)
    originals, edits = (
        planes(mirrored(padded(one))).flatten(1).view(torch.int64) for one in (images.originals, images.edits)
    )
    bank = planes(normalized_bank(images.fractals)).flatten(1)
    bits = 255 * planes(padded(edit_masks(side)[..., None].expand(-1, -1, -1, 3))).flatten(1).to(torch.uint8)
    masks = bits.view(torch.int64)
    scale = SCALE.expand(shape[1:]).flatten()

    def mix(draws: Draws) -> torch.Tensor:
        image, mask, fractal, top, left = as_draws_of_mirrored(draws)
        original, hybrid = originals.index_select(0, image), edits.index_select(0, image)
        hybrid.bitwise_xor_(original).bitwise_and_(masks.index_select(0, mask)).bitwise_xor_(original)
        mixed = bank.index_select(0, fractal).addcmul_(hybrid.view(torch.uint8).float(), scale)
        return windows(mixed.view(shape), side, (2, 3))[torch.arange(len(mixed)), top, left]

    return mix


def row_windows(images: torch.Tensor, side: int) -> torch.Tensor:
    """All crops of NHWC images as a view (n, top, left, side, 3 side): a row of pixels is one run of memory."""
    count, height, width, channels = images.shape
    shape = (count, height - side + 1, width - side + 1, side, side * channels)
    row = width * channels
    return images.as_strided(shape, (height * row, row, channels, row, 1))


def padded_rows_mix(images: Images, *, channels_last: bool = False) -> Mix:
    side = images.side
    originals, edits = (row_windows(mirrored(padded(one)), side) for one in (images.originals, images.edits))
    masks = row_windows(padded(edit_masks(side)[..., None].expand(-1, -1, -1, 3)), side)
    bank = normalized_bank(images.fractals)
    scale = SCALE.flatten().repeat(side) if channels_last else SCALE
    fractals = row_windows(bank, side) if channels_last else windows(planes(bank), side, (2, 3))

    def mix(draws: Draws) -> torch.Tensor:
        image, mask, fractal, top, left = as_draws_of_mirrored(draws)
        hybrid = torch.where(masks[mask, top, left], edits[image, top, left], originals[image, top, left])
        if channels_last:
            mixed = fractals[fractal, top, left].addcmul_(hybrid.float(), scale)
            return mixed.view(-1, side, side, 3).permute(0, 3, 1, 2)
        hybrid = hybrid.view(-1, side, side, 3).permute(0, 3, 1, 2).to(torch.float32)
        return fractals[fractal, top, left].addcmul_(hybrid, scale)

    return mix


def pixel_mix(images: Images, *, one_gather: bool, channels_last: bool = False) -> Mix:
    side = images.side
    wide = side + 2 * PADDING
    sets = [as_pixels(mirrored(padded(one))) for one in (images.originals, images.edits)]
    masks = windows(padded(edit_masks(side)[..., None])[..., 0], side, (1, 2))
    bank = normalized_bank(images.fractals)
    fractals = row_windows(bank, side) if channels_last else windows(planes(bank), side, (2, 3))
    scale = SCALE.flatten().repeat(side) if channels_last else SCALE
    if one_gather:
        both = torch.stack(sets, 1).flatten()  # original, edit, its mirror images, the next original
        along = torch.arange(wide * wide).view(1, wide, wide).expand(4, wide, wide)
        places = (windows(along, side, (1, 2)) + masks * wide * wide).contiguous()
    else:
        originals, edits = (windows(one, side, (1, 2)) for one in sets)

    def mix(draws: Draws) -> torch.Tensor:
        image, mask, fractal, top, left = as_draws_of_mirrored(draws)
        if one_gather:
            pixels = both[places[mask, top, left] + (image * 2 * wide * wide).view(-1, 1, 1)]
        else:
            pixels = torch.where(masks[mask, top, left], edits[image, top, left], originals[image, top, left])
        colours = pixels.contiguous().unsqueeze(-1).view(torch.uint8)[..., :3]
        if channels_last:
            mixed = fractals[fractal, top, left].addcmul_(colours.float().flatten(2), scale)
            return mixed.view(-1, side, side, 3).permute(0, 3, 1, 2)
        hybrid = colours.permute(0, 3, 1, 2).to(torch.float32)
        return fractals[fractal, top, left].addcmul_(hybrid, scale)

    return mix


def quadrant_mix(images: Images) -> Mix:
    side, half = images.side, images.side // 2

    def quarters(whole: torch.Tensor) -> torch.Tensor:
        divided = mirrored(whole).view(-1, 2, half, 2, half, 3).permute(0, 1, 3, 5, 2, 4)
        return divided.reshape(-1, 4, 3 * half * half)

    both = torch.stack([quarters(images.originals), quarters(images.edits)], 1).flatten(0, 2)
    places = torch.arange(4) + 4 * edit_masks(2).flatten(1).long()  # (4 masks, 4 quarters)
    bank = planes(normalized_bank(images.fractals))
    scale = SCALE.view(3, 1, 1, 1, 1)

    def mix(draws: Draws) -> torch.Tensor:
        image, mask, fractal, top, left = as_draws_of_mirrored(draws)
        found = both.index_select(0, (places[mask] + 8 * image.view(-1, 1)).flatten())
        mixed = bank.index_select(0, fractal)
        inner = mixed[:, :, PADDING : PADDING + side, PADDING : PADDING + side]
        hybrid = found.view(-1, 2, 2, 3, half, half).permute(0, 3, 1, 4, 2, 5)
        inner.unflatten(2, (2, half)).unflatten(4, (2, half)).addcmul_(hybrid.float(), scale)
        return windows(mixed, side, (2, 3))[torch.arange(len(mixed)), top, left]

    return mix


def compiled_mix(images: Images, *, stored_padded: bool) -> Mix:
    side = images.side
    channel = torch.arange(3).view(1, 3, 1, 1)
    row, column = torch.arange(side).view(1, 1, side, 1), torch.arange(side).view(1, 1, 1, side)
    if stored_padded:
        originals, edits = (planes(mirrored(padded(one))) for one in (images.originals, images.edits))
        bank = planes(normalized_bank(images.fractals))
    else:
        originals, edits = planes(images.originals), planes(images.edits)
        bank = planes(flipped_bank(images.fractals))

    def shown(mask: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        along = torch.where(mask < 2, x, y) < side // 2
        return along ^ (mask % 2 == 1)

    def from_padded(
        image: torch.Tensor, mask: torch.Tensor, fractal: torch.Tensor, top: torch.Tensor, left: torch.Tensor
    ) -> torch.Tensor:
        image, mask, fractal, top, left = (one.view(-1, 1, 1, 1) for one in (image, mask, fractal, top, left))
        y, x = row + top, column + left
        edit = shown(mask, y - PADDING, x - PADDING)
        hybrid = torch.where(edit, edits[image, channel, y, x], originals[image, channel, y, x])
        return hybrid.float() * SCALE + bank[fractal, channel, y, x]

    def from_images(
        image: torch.Tensor,
        mask: torch.Tensor,
        fractal: torch.Tensor,
        top: torch.Tensor,
        left: torch.Tensor,
        flip: torch.Tensor,
    ) -> torch.Tensor:
        image, mask, fractal, top, left, flip = (
            one.view(-1, 1, 1, 1) for one in (image, mask, fractal, top, left, flip)
        )
        y, x = row + top - PADDING, torch.where(flip == 1, side - 1 - column, column) + left - PADDING
        inside = (y >= 0) & (y < side) & (x >= 0) & (x < side)
        edit, y, x = shown(mask, y, x), y.clamp(0, side - 1), x.clamp(0, side - 1)
        hybrid = torch.where(edit, edits[image, channel, y, x], originals[image, channel, y, x]).float()
        blended = (1 - FRACTAL_WEIGHT) * hybrid + FRACTAL_WEIGHT * bank[fractal, channel, y, x].float()
        return (torch.where(inside, blended, 0.0) - MEAN) / DEVIATION

    function = torch.compile(from_padded if stored_padded else from_images, dynamic=False)

    def mix(draws: Draws) -> torch.Tensor:
        if stored_padded:
            return function(*as_draws_of_mirrored(draws))
        top, left = draws.corner.unbind(1)
        return function(draws.image, draws.side, fractal_row(draws), top.contiguous(), left.contiguous(), draws.flip)

    return mix


MIXES: dict[str, Callable[[Images], Mix]] = {
    "float": float_mix,
    "float_unfold": lambda images: float_mix(images, crop="unfold"),
    "float_grid": lambda images: float_mix(images, crop="grid"),
    "uint8": uint8_mix,
    "uint8_unfold": lambda images: uint8_mix(images, crop="unfold"),
    "padded": padded_mix,
    "padded_rows": padded_rows_mix,
    "padded_rows_channels_last": lambda images: padded_rows_mix(images, channels_last=True),
    "padded_pixels": lambda images: pixel_mix(images, one_gather=False),
    "pixels": lambda images: pixel_mix(images, one_gather=True),
    "pixels_channels_last": lambda images: pixel_mix(images, one_gather=True, channels_last=True),
    "select": select_mix,
    "quadrants": quadrant_mix,
    "compiled": lambda images: compiled_mix(images, stored_padded=False),
    "compiled_padded": lambda images: compiled_mix(images, stored_padded=True),
}
WAYS = ("", "_threads", "_workers")


# Batches --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop(Dataset[Batch]):
    """A batch for each tensor of indices."""

    images: Images
    mix: Mix

    def __getitem__(self, indices: torch.Tensor) -> Batch:
        draws = Draws.random(indices, len(self.images.fractals))
        return self.mix(draws), self.images.labels[indices]


@dataclass(frozen=True)
class Order:
    """The indices of each batch, another permutation in each epoch."""

    count: int
    batch_size: int

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.randperm(self.count).split(self.batch_size))


def torch_loop(images: Images, batch_size: int, threads: int, mix: str, way: str = "") -> Contender:
    """Return the loop with one of `MIXES` in one of `WAYS`."""
    torch.set_num_threads(threads if way == "" else 1)
    loop, order = Loop(images, MIXES[mix](images)), Order(len(images.labels), batch_size)
    if way == "_workers":
        workers: Any = DataLoader(loop, batch_size=None, sampler=order, num_workers=threads, persistent_workers=True)
        return Contender(epoch=lambda: (len(made) for made, _ in workers), ahead=2 * threads)
    if way == "":
        return Contender(epoch=lambda: (len(loop[indices][0]) for indices in order), ahead=1)
    pool, ahead = ThreadPoolExecutor(threads), 2 * threads

    def epoch() -> Iterator[int]:
        begun: deque[Future[Batch]] = deque()
        for indices in order:
            begun.append(pool.submit(loop.__getitem__, indices))
            if len(begun) == ahead:
                yield len(begun.popleft().result()[0])
        while begun:
            yield len(begun.popleft().result()[0])

    return Contender(epoch=epoch, ahead=ahead)
