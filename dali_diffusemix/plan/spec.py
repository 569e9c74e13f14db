"""The mix: its masks, its seam, its share of fractal, and its epoch."""

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from dali_diffusemix.errors import ConfigError

MASKS: Final = ("left", "right", "top", "bottom")
"""The sides that can show the edit; `BatchPlan.mask` holds the index in this tuple."""

Mask: TypeAlias = Literal["left", "right", "top", "bottom"]


def check_range(name: str, value: tuple[float, float], low: float, high: float) -> None:
    if not (len(value) == 2 and low <= value[0] <= value[1] <= high):
        raise ConfigError(f"{name} must be (low, high) with {low} ≤ low ≤ high ≤ {high}, found {value}.")


def check_number(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name} must lie in [{low}, {high}], found {value}.")


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
        object.__setattr__(self, "masks", tuple(self.masks))
        unknown = [m for m in self.masks if m not in MASKS]
        if unknown or not self.masks or len(set(self.masks)) != len(self.masks):
            raise ConfigError(f"masks must be one or more of {MASKS}, each once, found {self.masks}.")
        if not 0 <= self.seam_width <= 1:
            raise ConfigError(f"seam_width must lie in [0, 1], a fraction of the side, found {self.seam_width}.")
        if isinstance(self.fractal_weight, tuple):
            check_range("fractal_weight", self.fractal_weight, 0, 1)
        else:
            check_number("fractal_weight", self.fractal_weight, 0, 1)
        if self.order not in ("mix_then_crop", "crop_then_mix"):
            raise ConfigError(f"order must be 'mix_then_crop' or 'crop_then_mix', found {self.order!r}.")
        if self.epoch not in ("fixed", "expanded"):
            raise ConfigError(f"epoch must be 'fixed' or 'expanded', found {self.epoch!r}.")
        if self.probability is not None:
            if not 0 <= self.probability <= 1:
                raise ConfigError(f"probability must lie in [0, 1], found {self.probability}.")
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
