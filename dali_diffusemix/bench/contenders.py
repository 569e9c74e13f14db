"""The contenders: this package's loader, plain DALI, and Pillow under DataLoader."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dali_diffusemix.bench.material import Material
from dali_diffusemix.errors import ConfigError, StoreError
from dali_diffusemix.loading.auto import Decode
from dali_diffusemix.loading.dali import dali
from dali_diffusemix.loading.loader import DiffuseMixLoader
from dali_diffusemix.loading.resident import Resident
from dali_diffusemix.mix.pixel import edit_weight
from dali_diffusemix.mix.tensor import IMAGENET_MEAN, IMAGENET_STD
from dali_diffusemix.plan.batch import BatchPlan

__all__ = ["Contender", "Factory", "PillowCrops", "diffusemix", "pillow", "plain_dali", "plain_dali_batches"]

_QUEUE: Final = 2  # batches that DALI prefetches: its default, and longer queues are no faster


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Something that delivers batches."""

    epoch: Callable[[], Iterator[int]]  # begins an epoch; yields the size of each batch when it arrives
    ahead: int  # batches that it prefetches at most
    spent: Callable[[], NDArray[np.float64]] | None = None  # seconds of reading, decoding and mixing since the start


Factory = Callable[[], Contender]
"""Builds a contender, in a process of its own: a function of a module, or a `partial` of one."""


def diffusemix(
    material: Material,
    *,
    mixed: bool = True,
    channels_last: bool = False,
    visible_parts: bool = True,
    prefetch_factor: int = 2,
    decode: Decode = "auto",
    resident: Resident | None = None,
) -> Contender:
    """Return this package's loader, with mixed or with plain images."""
    loader = DiffuseMixLoader(
        material.dataset(mixed=mixed),
        material.batch_size,
        shuffle=True,
        num_workers=material.num_workers,
        device=material.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
        prefetch_factor=prefetch_factor,
        visible_parts=visible_parts,
        decode=decode,
        resident=resident,
    )
    before = np.zeros(3)  # of the epochs that have ended

    def spent() -> NDArray[np.float64]:
        stats = loader.stats()  # of the newest epoch
        return np.add(before, (stats.read, stats.decode, stats.mix))

    def epoch() -> Iterator[int]:
        nonlocal before
        before = spent()
        return (len(images) for images, _ in loader)

    return Contender(epoch=epoch, ahead=prefetch_factor + 1, spent=spent)


def plain_dali(material: Material, *, form: str = "region") -> Contender:
    """Return DALI alone, see `plain_dali_batches`."""
    batches = plain_dali_batches(material, form=form)
    images_of_epoch = len(material.dataset(mixed=False).catalog) * material.epochs

    def epoch() -> Iterator[int]:
        left = images_of_epoch
        while left > 0:
            images, _ = next(batches)
            # The reader fills the last batch of an epoch with samples of the next one.
            yield min(left, len(images))
            left -= material.batch_size

    return Contender(epoch=epoch, ahead=_QUEUE + 1)


def plain_dali_batches(
    material: Material, *, form: str = "region", drop_last: bool = False
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of DALI alone, without end: decode, resize, crop_mirror_normalize.

    The crops follow the same law as `TrainCrop`, but DALI draws them.

    Args:
        material: The images.
        form: What is decoded, and where. "region": only the crop, on the device; "whole": the whole image, on the
            device, cropped while resizing, which suits a hardware decoder; "cpu": only the crop, on the CPU, then
            copied.
        drop_last: Skip incomplete batches.

    Raises:
        ConfigError: There is no such form.
        MissingDependencyError: DALI is not installed.
    """
    if form not in ("region", "whole", "cpu"):
        raise ConfigError(f"form must be 'region', 'whole' or 'cpu', found {form!r}.")
    fn, pipeline_def, types = dali()
    catalog = material.dataset(mixed=False).catalog
    cuda = material.device != "cpu"
    decoder = "mixed" if cuda and form != "cpu" else "cpu"
    side = material.size
    resize = {"size": [side, side], "interp_type": types.INTERP_LINEAR, "antialias": True}

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=material.batch_size,
        num_threads=material.num_workers,
        device_id=(torch.device(material.device).index or 0) if cuda else None,
        prefetch_queue_depth=_QUEUE,
        seed=material.seed,
    )
    def pipeline() -> Any:
        files = [os.path.join(material.files, path) for path in catalog.paths]  # noqa: PTH118 - speed
        encoded, label = fn.readers.file(files=files, labels=catalog.labels.tolist(), shuffle_after_epoch=True)
        if form == "whole":
            pixels = fn.decoders.image(encoded, device=decoder, output_type=types.RGB)
            pixels = fn.random_resized_crop(pixels, random_aspect_ratio=[3 / 4, 4 / 3], **resize)
        else:
            pixels = fn.decoders.image_random_crop(
                encoded, device=decoder, output_type=types.RGB, random_aspect_ratio=[3 / 4, 4 / 3]
            )
            pixels = fn.resize(pixels.gpu() if cuda and form == "cpu" else pixels, **resize)
        images = fn.crop_mirror_normalize(
            pixels,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[255 * mean for mean in IMAGENET_MEAN],
            std=[255 * deviation for deviation in IMAGENET_STD],
            mirror=fn.random.coin_flip(),
        )
        return images, label

    built = pipeline()

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            images, labels = (torch.utils.dlpack.from_dlpack(one.as_tensor()) for one in built.run())
            if len(images) == material.batch_size or not drop_last:
                yield images, labels.flatten()

    return batches()


class PillowCrops(Dataset[tuple[torch.Tensor, int]]):
    """Samples by Pillow and NumPy, one at a time, in the fastest way these have: `resize(box=...)`, then the mix.

    A sample is a (3, size, size) float32 tensor, normalised, and its label. Crops are those of the dataset.
    """

    def __init__(self, material: Material, *, mixed: bool = False) -> None:
        self.dataset = material.dataset(mixed=mixed)
        self._files, self._size = material.files, (material.size, material.size)
        self._mean = np.array(IMAGENET_MEAN, dtype=np.float32) * 255
        self._deviation = np.array(IMAGENET_STD, dtype=np.float32) * 255

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[torch.Tensor, int]]:
        """Return the samples of a batch of indices, with one plan."""
        plan = self.dataset.planner.batch(self.dataset.epoch, indices)
        return [self._sample(plan, row) for row in range(len(plan))]

    def _sample(self, plan: BatchPlan, row: int) -> tuple[torch.Tensor, int]:
        path = os.path.join(self._files, self.dataset.catalog.path(int(plan.original[row])))  # noqa: PTH118 - speed
        with Image.open(path) as original:
            return self.sample(plan, row, original)

    def sample(self, plan: BatchPlan, row: int, original: Image.Image) -> tuple[torch.Tensor, int]:
        """Return the sample of a row of a plan; `original` is its image."""
        sample = self.cropped(original, plan.box[row])
        if plan.edit[row] >= 0:
            with contextlib.suppress(
                OSError, ValueError, SyntaxError, StoreError
            ):  # a damaged edit gives an unmixed sample
                sample = self._mixed(plan, row, sample)
        if plan.flip[row]:
            sample = sample[:, ::-1]
        channels_first = np.ascontiguousarray(((sample - self._mean) / self._deviation).transpose(2, 0, 1))
        return torch.from_numpy(channels_first), int(self.dataset.catalog.labels[plan.original[row]])

    def _mixed(self, plan: BatchPlan, row: int, sample: NDArray[np.float32]) -> NDArray[np.float32]:
        store, bank = self.dataset.store, self.dataset.bank
        if store is None or bank is None:
            raise ConfigError("mixed must have edits and fractals, found none; give both.")
        with Image.open(BytesIO(store.encoded(int(plan.edit[row])).tobytes())) as edit:
            m = edit_weight(int(plan.mask[row]), plan.seam_width, plan.span[row], self._size)[..., None]
            hybrid = m * self.cropped(edit, plan.box[row]) + (1 - m) * sample
        weight = plan.fractal_weight[row]
        rows, columns = (slice(None, None, -1 if flipped else 1) for flipped in plan.fractal_flip[row])
        fractal = Image.fromarray(bank.images[plan.fractal[row]][rows, columns])
        return np.asarray((1 - weight) * hybrid + weight * self.cropped(fractal, plan.span[row]))

    def cropped(self, image: Image.Image, box: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return a relative box (top, left, height, width) of an image, resized: (size, size, 3) float32, 0 to 255."""
        top, left, height, width = box * [image.height, image.width, image.height, image.width]
        region = (left, top, min(left + width, image.width), min(top + height, image.height))
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        return np.asarray(rgb.resize(self._size, Image.Resampling.BILINEAR, box=region), dtype=np.float32)


def pillow(material: Material, *, mixed: bool = False) -> Contender:
    """Return Pillow under torch's DataLoader, with persistent worker processes."""
    crops = PillowCrops(material, mixed=mixed)
    loader = DataLoader(
        crops,
        batch_size=material.batch_size,
        shuffle=True,
        num_workers=material.num_workers,
        persistent_workers=True,
        pin_memory=material.device != "cpu",
    )

    def epoch() -> Iterator[int]:
        crops.dataset.set_epoch(crops.dataset.epoch + 1)
        return (len(images.to(material.device, non_blocking=True)) for images, _ in loader)

    return Contender(epoch=epoch, ahead=material.num_workers * 2)  # DataLoader's default prefetch_factor is 2
