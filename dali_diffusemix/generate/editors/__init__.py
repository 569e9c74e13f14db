"""Editors: what turns an original into its edit under a prompt.

An editor is one method. `ProceduralEditor` ships with the package and needs no model; it is *not* diffusion.
`DiffusersEditor` runs an instruction-editing pipeline of diffusers. An editor is described by a config, which processes
hand to each other, and loaded from it where the work is done.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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

    def edit(self, images: Sequence[NDArray[np.uint8]], tasks: Sequence[EditTask]) -> Sequence[NDArray[Any]]:
        """Return one edit per task, in the tasks' order.

        Args:
            images: Originals, each (height, width, 3) uint8 RGB.
            tasks: What to make. An edit depends on its own image, prompt and seed only, never on the batch.

        Returns:
            Edits, each (height, width, 3) uint8 RGB of its image's size. One that came out with numbers that are not
            finite is float32 instead, those numbers left in it, so that it can be told from a black image.
        """
        ...


class EditorConfig(Protocol):
    """Which editor, and how it edits: a frozen value, checked when it is made, that can be pickled."""

    @property
    def accelerated(self) -> bool:
        """Whether it wants a GPU where there is one."""
        ...

    @property
    def multiple(self) -> int:
        """What both sides of the images given to the editor must be divisible by."""
        ...

    def settings(self) -> Mapping[str, str | int | float | bool | None]:
        """What an edit store records: all that decides an edit besides its image, prompt and seed."""
        ...

    def check(self, prompts: Sequence[str]) -> None:
        """Say what is wrong before any work is begun.

        Raises:
            ConfigError: It does not know a prompt, or cannot use its model.
            MissingDependencyError: What it needs is not installed.
        """
        ...

    def load(self, prompts: Sequence[str], *, device: str, batch_size: int) -> Editor:
        """Make the editor.

        Args:
            prompts: Those that tasks may name.
            device: "cpu", "cuda" or "cuda:N".
            batch_size: Edits made at once, at most.

        Raises:
            ConfigError: It does not know a prompt, or cannot use its model.
            MissingDependencyError: What it needs is not installed.
        """
        ...
