"""Editors: turn an original into its edit under a prompt.

An editor has one method. `ProceduralEditor` needs no model; it is *not* diffusion. `DiffusersEditor` runs an
instruction-editing pipeline of diffusers. `ServerEditor` asks a server. A config describes an editor: processes pass it
on, and load the editor from it where the work is done.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.errors import ConfigError

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
"""The instruction to the paper's editor; `{prompt}` is one of `PROMPTS`."""


INSTRUCTION = "Change the style of this image to {prompt}. Keep its composition and its subject unchanged."
"""The instruction to editors that understand sentences."""


def check_words(name: str, text: str, *, known: Sequence[str] = ("prompt", "class")) -> None:
    """Raise ConfigError if a template or a prompt has a word in braces that nothing is filled in for."""
    for word in re.findall(r"\{(\w*)\}", text):
        if word not in known:
            allowed = " and ".join(f"{{{one}}}" for one in known)
            raise ConfigError(f"{name} may have {allowed}, found {{{word}}} in {text!r}; correct it.")


def check_template(text: str) -> None:
    """Raise ConfigError unless a template has {prompt}, and no other word in braces but {class}."""
    if "{prompt}" not in text:
        raise ConfigError(f"template must hold {{prompt}}, where the prompt goes; found {text!r}.")
    check_words("template", text)


def instruction(template: str, prompt: str, class_name: str) -> str:
    """The text that a model is given: `{prompt}` and `{class}` of the template filled in, also `{class}` of the prompt.

    Other braces stay as they are.
    """
    return template.replace("{prompt}", prompt).replace("{class}", class_name)


@dataclass(frozen=True, kw_only=True)
class EditTask:
    """One edit to make: of an image of the batch, under a prompt, from a seed."""

    image: int
    """Index into the batch of images; several tasks may share one image."""
    prompt: str
    """The bare prompt, without the template."""
    seed: int
    """0 ≤ seed < 2⁶⁴, a function of (image, prompt, variant) alone."""
    class_name: str = ""
    """The class of the image in words, for templates and prompts with `{class}`."""


class Editor(Protocol):
    """Edits a batch of images. Prompts and size are known when the editor is made."""

    def edit(self, images: Sequence[NDArray[np.uint8]], tasks: Sequence[EditTask]) -> Sequence[NDArray[Any]]:
        """Return one edit per task, in the tasks' order.

        Args:
            images: Originals, each (height, width, 3) uint8 RGB.
            tasks: The edits to make. An edit depends only on its own image, prompt and seed, never on the batch.

        Returns:
            Edits, each (height, width, 3) uint8 RGB of its image's size. An edit with numbers that are not finite is
            float32 and keeps them, so that it can be told from a black image.
        """
        ...


@runtime_checkable
class EditorConfig(Protocol):
    """An editor and its options: a frozen value that checks itself and can be pickled.

    It may have an attribute `remote`, True if a model elsewhere does the work and this process only waits for it: then
    one worker is enough, and shards are as short as for a model here.
    """

    @property
    def accelerated(self) -> bool:
        """True if it uses a GPU if there is one."""
        ...

    @property
    def multiple(self) -> int:
        """The divisor of both sides of the images that it takes."""
        ...

    def settings(self) -> Mapping[str, str | int | float | bool | None]:
        """The settings that an edit store records: all that decides an edit besides its image, prompt and seed."""
        ...

    def check(self, prompts: Sequence[str]) -> None:
        """Check it before any work begins.

        Raises:
            ConfigError: It does not know a prompt, or cannot use its model.
            MissingDependencyError: A package that it needs is not installed.
        """
        ...

    def load(self, prompts: Sequence[str], *, device: str, batch_size: int) -> Editor:
        """Load the editor.

        Args:
            prompts: The prompts that tasks may name.
            device: "cpu", "cuda" or "cuda:N".
            batch_size: The most edits made at once.

        Raises:
            ConfigError: It does not know a prompt, or cannot use its model.
            MissingDependencyError: A package that it needs is not installed.
        """
        ...
