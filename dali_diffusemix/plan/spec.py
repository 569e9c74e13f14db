"""The mix: its masks, its seam, its share of fractal, and its epoch."""

from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from dali_diffusemix.errors import ConfigError
from dali_diffusemix.plan.numbers import alike, choice, interval, number_in, put, several

MASKS: Final = ("left", "right", "top", "bottom")
"""The sides that can show the edit; `BatchPlan.mask` holds the index in this tuple."""

Mask: TypeAlias = Literal["left", "right", "top", "bottom"]


@dataclass(frozen=True, kw_only=True)
class MixSpec:
    """Settings of the mix of originals, edits and fractals. `paper()` and `release()` are the two known ones.

    Source: Islam et al., "DiffuseMix: Label-Preserving Data Augmentation with Diffusion Models", CVPR 2024.
    """

    masks: tuple[Mask, ...] = MASKS
    """The masks to choose from, uniformly."""
    seam_width: float = 0.0
    """Width of the linear ramp between the sides, as a fraction of what the mask spans; 0 is a hard edge."""
    fractal_weight: float | tuple[float, float] = 0.20
    """λ, in [0, 1]; a pair is a range, drawn uniformly."""
    order: Literal["mix_then_crop", "crop_then_mix"] = "mix_then_crop"
    """`mix_then_crop`: mask and fractal span the image, wherever the crop lies. `crop_then_mix`: they span the crop."""
    epoch: Literal["fixed", "expanded"] = "fixed"
    """`fixed`: each original once, mixed with `probability`. `expanded`: originals and each edit once."""
    probability: float | None = None
    """Share of mixed samples of a fixed epoch; None is K/(1+K) for an original with K edits."""

    def __post_init__(self) -> None:
        given: Any = self.masks
        masks = several(given, lambda one: str(one) if isinstance(one, str) and one in MASKS else None)
        if not masks or len(set(masks)) != len(masks):
            raise ConfigError(
                f"masks must be one or more of {MASKS}, each once, in a tuple, found {given!r}; for example "
                "masks=('left', 'right')."
            )
        weight: Any = self.fractal_weight
        if isinstance(weight, tuple | list | np.ndarray):
            weight = alike(interval("fractal_weight", weight, 0, 1, (0.1, 0.3)))
        put(
            self,
            masks=masks,
            seam_width=number_in("seam_width", self.seam_width, 0, 1, 0.08, "lie in [0, 1], a fraction of the side"),
            fractal_weight=weight if isinstance(weight, tuple) else number_in("fractal_weight", weight, 0, 1, 0.2),
            order=choice("order", self.order, ("mix_then_crop", "crop_then_mix")),
            epoch=choice("epoch", self.epoch, ("fixed", "expanded")),
        )
        if self.probability is not None:
            put(self, probability=number_in("probability", self.probability, 0, 1, 0.5))
            if self.epoch == "expanded":
                raise ConfigError(
                    f"probability must be None in an expanded epoch, which holds every edit once, found "
                    f"{self.probability}; leave it out or take epoch='fixed'."
                )

    @property
    def fractal_weight_range(self) -> tuple[float, float]:
        """The range of λ; both ends are the same if it is one number."""
        weight = self.fractal_weight
        return weight if isinstance(weight, tuple) else (weight, weight)

    @classmethod
    def paper(cls) -> "MixSpec":
        """The paper's settings: four masks, a hard seam, λ = 0.2, an epoch that keeps its size."""
        return cls()

    @classmethod
    def release(cls) -> "MixSpec":
        """The released code's settings: right and bottom, a 20-pixel ramp at 256, the expanded set."""
        return cls(masks=("right", "bottom"), seam_width=20 / 256, epoch="expanded")
