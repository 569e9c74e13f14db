"""A warning for batch transforms that change the colours of normalised images, which torchvision clamps silently."""

import warnings
from collections.abc import Sequence
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, Final

import numpy as np
import torch

# Operations of torchvision that need values in [0, 1] or uint8: on normalised images they clamp most values away.
_COLOUR: Final = frozenset(
    [
        "AugMix",
        "AutoAugment",
        "ColorJitter",
        "RandAugment",
        "RandomAdjustSharpness",
        "RandomAutocontrast",
        "RandomEqualize",
        "RandomInvert",
        "RandomPhotometricDistort",
        "RandomPosterize",
        "RandomSolarize",
        "TrivialAugmentWide",
    ]
)


def warn_of_colour(transform: object) -> None:
    """Warn of a batch transform that has torchvision change the colours of normalised images."""
    if (name := _colour_operation(transform, depth=5)) is not None:
        warnings.warn(
            f"batch_transform has torchvision's {name}, which needs values in [0, 1] or uint8, and gets normalised "
            "images: it clamps most of them away. Give the dataset augment= instead, which has the common ones; or "
            "normalize=None and the loader dtype=torch.uint8, and normalise behind it: docs/migration.md.",
            stacklevel=4,
        )


def _colour_operation(found: Any, depth: int) -> str | None:
    """The name of a colour operation: a transform itself, or within a Compose, a wrapper or what a function uses."""
    kind = type(found)
    if kind.__name__ in _COLOUR and kind.__module__.startswith("torchvision.transforms"):
        return kind.__name__
    if depth == 0:
        return None
    inner: list[Any] = []
    if isinstance(found, FunctionType):
        inner += [cell.cell_contents for cell in found.__closure__ or () if _is_filled(cell)]
        inner += [found.__globals__[name] for name in found.__code__.co_names if name in found.__globals__]
    elif isinstance(found, partial):
        inner += [found.func, *found.args, *found.keywords.values()]
    elif isinstance(found, MethodType):
        inner.append(found.__self__)
    elif not isinstance(found, type | ModuleType | str | bytes | torch.Tensor | np.ndarray):
        parts = getattr(found, "transforms", None)
        inner += parts if isinstance(parts, Sequence | torch.nn.ModuleList) else ()
        inner += [part for name, part in getattr(found, "__dict__", {}).items() if name != "transforms"][:16]
    return next((name for one in inner if (name := _colour_operation(one, depth - 1))), None)


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that has no value yet
        return False
