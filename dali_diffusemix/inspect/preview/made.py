"""The tensors that a batch transform made, as pictures and words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dali_diffusemix.inspect.preview.canvas import PANEL, zoomed
from dali_diffusemix.inspect.preview.samples import label_lines, target_of
from dali_diffusemix.loading.batches import Made, PlannedSample
from dali_diffusemix.loading.dataset import DiffuseMixDataset
from dali_diffusemix.mix.tensor import Normalize
from dali_diffusemix.plan.batch import BatchPlan

_SLACK: Final = 2 / 255  # beyond [0, 1], by rounding


@dataclass(frozen=True, kw_only=True)
class MadeSamples:
    """The first samples of a batch after its transform."""

    images: list[NDArray[np.uint8]]  # (height, width, 3) each, as a person would see them
    labels: list[list[str]]  # lines
    about: str  # a footnote

    @classmethod
    def of(cls, made: Made, samples: Sequence[PlannedSample], rows: int) -> "MadeSamples | str":
        """Return the first `rows` of them; or why they cannot be drawn, as a footnote."""
        batch = made()
        if batch is None:
            return "What batch_transform made is not shown: nothing holds that batch's tensors any more."
        images, labels = batch
        if images.ndim != 4 or images.shape[:2] != (len(samples), 3):
            return (
                f"What batch_transform made is not shown: it has the shape {tuple(images.shape)}, and one image is "
                "drawn for each sample."
            )
        values = [
            _plain(image, dataset.normalize)
            for image, (dataset, _) in zip(_on_cpu(images, rows), samples[:rows], strict=True)
        ]
        beyond = float(np.mean([np.mean((one < -_SLACK) | (one > 1 + _SLACK)) for one in values]))
        about = "Last column: the tensors after batch_transform, as they are now, with normalize undone."
        if beyond >= 0.001:
            about += f" {100 * beyond:.1f} % of their values lie beyond black or white and are clipped."
        texts: list[list[str]] = [[] for _ in values]
        if labels is not None and labels.ndim and len(labels) == len(samples):
            texts = [
                _label(label, dataset, plan)
                for label, (dataset, plan) in zip(_on_cpu(labels, rows), samples[:rows], strict=True)
            ]
        return cls(images=[_bytes(one) for one in values], labels=texts, about=about)

    def picture(self, row: int, cell: tuple[int, int]) -> Image.Image:
        """Return an image as large as it fits in a cell of (height, width)."""
        image = self.images[row]
        zoom = min(cell[0] / image.shape[0], cell[1] / image.shape[1])
        shown = zoomed(image, zoom)
        canvas = Image.new("RGB", cell[::-1], PANEL)
        canvas.paste(shown, ((cell[1] - shown.width) // 2, (cell[0] - shown.height) // 2))
        return canvas


def _label(label: NDArray[np.generic], dataset: DiffuseMixDataset, plan: BatchPlan) -> list[str]:
    # Whole numbers that the dataset was given as targets are not those of its classes.
    return label_lines(label, dataset.classes if label.ndim or target_of(dataset, plan) is None else ())


def _on_cpu(values: torch.Tensor, rows: int) -> NDArray[np.generic]:
    shown = values.detach()[:rows]
    shown = shown.float() if shown.is_floating_point() else shown
    found: NDArray[np.generic] = shown.cpu().contiguous().numpy()
    return found


def _plain(image: NDArray[np.generic], normalize: Normalize | None) -> NDArray[np.float64]:
    """(height, width, 3) values of which 0 is black and 1 is white."""
    values = np.asarray(image, dtype=np.float64).transpose(1, 2, 0)
    if image.dtype.kind != "f":
        return values / 255
    if normalize is None:
        return values
    mean, deviation = np.asarray(normalize)
    return np.asarray(values * deviation + mean)


def _bytes(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    return np.rint(255 * np.clip(np.nan_to_num(values), 0, 1)).astype(np.uint8)
