"""An editor that copies the originals, for ablations: a "mixed" sample is then the original and a fractal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.generate.editors import EditTask


@dataclass(frozen=True)
class CopyConfig:
    """See `dali_diffusemix.generate.editors.EditorConfig`."""

    accelerated = False
    multiple = 1

    def settings(self) -> Mapping[str, str | int | float | bool | None]:
        return {"editor": "copy", "version": 1}

    def check(self, prompts: Sequence[str]) -> None:
        pass  # any prompt will do

    def load(self, prompts: Sequence[str], *, device: str, batch_size: int) -> "CopyEditor":
        return CopyEditor()


class CopyEditor:
    def edit(self, images: Sequence[NDArray[np.uint8]], tasks: Sequence[EditTask]) -> Sequence[NDArray[Any]]:
        return [images[task.image] for task in tasks]
