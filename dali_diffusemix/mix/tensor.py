"""The training tensor: its type, layout and normalisation."""

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.errors import ConfigError

IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)

Triple: TypeAlias = tuple[float, float, float]
Normalize: TypeAlias = tuple[Triple, Triple]
"""(mean, standard deviation) of R, G, B, for values in [0, 1]."""

IMAGENET: Final[Normalize] = (IMAGENET_MEAN, IMAGENET_STD)

DtypeName: TypeAlias = Literal["float32", "float16", "bfloat16", "uint8"]
DTYPES: Final[tuple[DtypeName, ...]] = ("float32", "float16", "bfloat16", "uint8")


@dataclass(frozen=True, kw_only=True)
class TensorFormat:
    """Type, layout and normalisation of the training tensor."""

    dtype: DtypeName = "float32"
    channels_last: bool = False
    normalize: Normalize | None = IMAGENET
    """None leaves floats in [0, 1] and is the only choice for uint8, which holds 0 to 255."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {DTYPES}, found {self.dtype!r}.")
        if self.normalize is None:
            return
        if self.dtype == "uint8":
            raise ConfigError("dtype uint8 holds plain pixels: give normalize=None, or take a float dtype.")
        try:
            fits = np.asarray(self.normalize, dtype=np.float64).shape == (2, 3)
        except (TypeError, ValueError):  # of other lengths, or no numbers
            fits = False
        if not fits:
            raise ConfigError(f"normalize must be (mean, std), three numbers each, found {self.normalize}.")
        mean, deviation = (tuple(map(float, three)) for three in self.normalize)
        if min(deviation) <= 0:
            raise ConfigError(f"normalize's deviations must be above 0, found {deviation}.")
        object.__setattr__(self, "normalize", (mean, deviation))  # of lists, arrays or tensors, too

    @property
    def storage(self) -> np.dtype[np.generic]:
        """NumPy's type for the buffer; bfloat16, which NumPy lacks, is held as uint16."""
        return np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype)

    def shape(self, count: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Shape of the contiguous buffer for `count` samples of (height, width)."""
        return (count, *size, 3) if self.channels_last else (count, 3, *size)

    def scale_and_offset(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(3,) float32 each: value = pixel × scale + offset, pixels in [0, 255]."""
        if self.dtype == "uint8":
            return np.ones(3, dtype=np.float32), np.zeros(3, dtype=np.float32)
        mean, std = self.normalize or ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        return (1 / (255 * np.array(std))).astype(np.float32), (-np.array(mean) / np.array(std)).astype(np.float32)


PIXELS: Final = TensorFormat(dtype="uint8", channels_last=True, normalize=None)
"""8-bit pixels, (height, width, 3): what augmentation works on, and pictures show."""
