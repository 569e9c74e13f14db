"""Editors: what turns an original into its edit under a prompt.

An editor is one method. `ProceduralEditor` ships with the package and needs no model; it is *not* diffusion.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

PROMPTS = (
    "autumn",
    "snowy",
    "sunset",
    "watercolor art",
    "rainbow",
    "aurora",
    "mosaic",
    "ukiyo-e",
    "a sketch with crayon",
)
"""The nine prompts of the paper."""

TEMPLATE = "A transformed version of image into {prompt}"
"""What the paper's editor is told; `{prompt}` is one of `PROMPTS`."""


@dataclass(frozen=True, kw_only=True)
class EditTask:
    """One edit to make: which image of the batch, under which prompt, from which seed."""

    image: int
    """Position in the batch of images; several tasks may share one image."""
    prompt: str
    """The bare prompt, without the template."""
    seed: int
    """0 ≤ seed < 2⁶⁴, a function of (image, prompt, variant) alone."""


class Editor(Protocol):
    """Edits a batch of images. Prompts and size are known when the editor is made."""

    def edit(self, images: Sequence[NDArray[np.uint8]], tasks: Sequence[EditTask]) -> list[NDArray[np.uint8]]:
        """Return one edit per task, in the tasks' order.

        Args:
            images: Originals, each (height, width, 3) uint8 RGB.
            tasks: What to make. An edit depends on its own image, prompt and seed only, never on the batch.

        Returns:
            Edits, each (height, width, 3) uint8 RGB of its image's size.
        """
        ...
