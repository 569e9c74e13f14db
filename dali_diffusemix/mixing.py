"""The mix itself: from decoded pieces and a plan to the training tensor.

The functions named `resample_weights`, `edit_weight`, `mixed_image` and `encode` are the specification, in NumPy.
`mix` does the same for a batch in one call, with the fused kernel of kernels/mix.cpp where it was built, and
`mix_on_device` with the GPU's. They work on a `piece_table`: a piece is a rectangle of decoded pixels and
the place where it lies in its image.

        image (of the original, or of the edit)
      ┌─────────────────────────────────────┐
      │  place = (top, left)                │
      │    ┌───────────────────┐            │
      │    │ piece             │            │        the box is the crop, in the image's pixels; the piece
      │    │     ┌─────────────┼───┐        │        holds what of the box is seen, plus the filter's halo
      │    │     │ seen        │box│        │
      │    └─────┼─────────────┘   │        │
      │          └─────────────────┘        │
      └─────────────────────────────────────┘
"""

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix import native
from dali_diffusemix.errors import ConfigError
from dali_diffusemix.plan import MASKS, BatchPlan, seam_ramp

if TYPE_CHECKING:
    import torch

    from dali_diffusemix import gpu

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
    """What the values of the training tensor look like."""

    dtype: DtypeName = "float32"
    channels_last: bool = False
    normalize: Normalize | None = IMAGENET
    """None leaves floats in [0, 1] and is the only choice for uint8, which holds 0 to 255."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {DTYPES}, found {self.dtype!r}")
        if self.normalize is None:
            return
        if self.dtype == "uint8":
            raise ConfigError("dtype uint8 holds plain pixels: give normalize=None, or take a float dtype")
        try:
            fits = np.asarray(self.normalize, dtype=np.float64).shape == (2, 3)
        except (TypeError, ValueError):  # of other lengths, or no numbers
            fits = False
        if not fits:
            raise ConfigError(f"normalize must be (mean, std), three numbers each, found {self.normalize}")
        if min(self.normalize[1]) <= 0:
            raise ConfigError(f"normalize's deviations must be above 0, found {self.normalize[1]}")

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


# --------------------------------------------------------------------------------------------------------------
# The specification
# --------------------------------------------------------------------------------------------------------------


def resample_weights(start: float, extent: float, output: int, source: int) -> NDArray[np.float32]:
    """Weights of a one-dimensional resample: Pillow's antialiased bilinear `resize(..., BILINEAR, box=...)`.

    A triangle filter, widened by the ratio when shrinking, its support clipped to the image, its weights summing
    to 1. An output pixel whose centre lies outside the image has no weights and becomes 0.

    Args:
        start: Where the box begins, source pixels.
        extent: Length of the box, source pixels.
        output: Output pixels.
        source: Source pixels.

    Returns:
        (output, source) float32.
    """
    scale = extent / output
    centre = start + extent * ((np.arange(output) + 0.5) / output)
    distance = np.abs(np.arange(source) + 0.5 - centre[:, None]) / max(scale, 1.0)
    weights = np.maximum(1 - distance, 0)
    weights[(centre < 0) | (centre >= source)] = 0
    total = weights.sum(axis=1, keepdims=True)
    return np.asarray(weights / np.where(total > 0, total, 1), dtype=np.float32)


def resample(image: NDArray[np.uint8], box: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float32]:
    """The box of an image on the output grid, in float32 without rounding between.

    Args:
        image: (height, width, 3) uint8.
        box: (top, left, height, width), image pixels; may leave the image, where the result is 0.
        size: (height, width) of the output.

    Returns:
        (height, width, 3) float32 in [0, 255].
    """
    rows = resample_weights(box[0], box[2], size[0], image.shape[0])
    columns = resample_weights(box[1], box[3], size[1], image.shape[1])
    # W_y @ image @ W_x.T for each channel.
    half = np.tensordot(rows, image.astype(np.float32), axes=(1, 0))
    return np.tensordot(half, columns, axes=(1, 1)).transpose(0, 2, 1)


def edit_weight(mask: int, seam_width: float, span: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float32]:
    """M: the weight of the edit at every output pixel.

    Args:
        mask: Position in `MASKS`.
        seam_width: w, a fraction of what the mask spans.
        span: (top, left, height, width): the output within what the mask spans.
        size: (height, width) of the output.

    Returns:
        (height, 1) or (1, width) float32 in [0, 1].
    """
    name = MASKS[mask]
    axis = 1 if name in ("left", "right") else 0
    t = span[axis] + span[axis + 2] * ((np.arange(size[axis]) + 0.5) / size[axis])
    m = seam_ramp(t, seam_width)
    m = m if name in ("right", "bottom") else 1 - m
    return np.asarray(m, dtype=np.float32).reshape((1, -1) if axis == 1 else (-1, 1))


def mixed_image(
    plan: BatchPlan,
    row: int,
    original: NDArray[np.uint8],
    edit: NDArray[np.uint8] | None = None,
    fractal: NDArray[np.uint8] | None = None,
) -> NDArray[np.float32]:
    """A = (1-λ) (M ⊙ Î + (1-M) ⊙ I) + λ F on the output grid: one sample from whole images.

    Args:
        plan: The batch's plan.
        row: Which sample of it.
        original: (height, width, 3) uint8.
        edit: (height, width, 3) uint8, its own size; None where the sample is not mixed.
        fractal: (height, width, 3) uint8, its own size; None where there is none.

    Returns:
        (height, width, 3) float32 in [0, 255].
    """
    size = plan.output_size
    image = _resample_relative(original, plan.box[row], size)
    if edit is not None:
        m = edit_weight(int(plan.mask[row]), plan.seam_width, plan.span[row], size)[..., None]
        image = m * _resample_relative(edit, plan.box[row], size) + (1 - m) * image
    if fractal is not None:
        upside_down, left_right = plan.fractal_flip[row]
        fractal = fractal[:: -1 if upside_down else 1, :: -1 if left_right else 1]
        weight = plan.fractal_weight[row]
        blended = (1 - weight) * image + weight * _resample_relative(fractal, plan.span[row], size)
        image = np.where(_inside(plan.box[row], size)[..., None], blended, np.float32(0))
    return image[:, ::-1] if plan.flip[row] else image


def _resample_relative(
    image: NDArray[np.uint8], box: NDArray[np.float64], size: tuple[int, int]
) -> NDArray[np.float32]:
    height, width = image.shape[:2]
    return resample(image, box * np.array([height, width, height, width]), size)


def _inside(box: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.bool_]:
    """(height, width) bool: whose centres lie in the image; outside is 0, fractal or not."""
    inside = []
    for axis in (0, 1):
        centre = box[axis] + box[axis + 2] * ((np.arange(size[axis]) + 0.5) / size[axis])
        inside.append((centre >= 0) & (centre < 1))
    return np.asarray(np.logical_and.outer(*inside))


def encode(image: NDArray[np.float32], format: TensorFormat) -> NDArray[np.generic]:
    """Normalise and cast: (height, width, 3) float32 in [0, 255] to one sample of the tensor's type and layout.

    uint8 rounds half up; float16 and bfloat16 round half to even. bfloat16 comes as its bits, uint16.
    """
    scale, offset = format.scale_and_offset()
    value = image * scale + offset
    if not format.channels_last:
        value = value.transpose(2, 0, 1)
    if format.dtype == "uint8":
        return np.asarray(np.clip(np.floor(value + np.float32(0.5)), 0, 255), dtype=np.uint8)
    if format.dtype == "bfloat16":
        bits = np.ascontiguousarray(value).view(np.uint32)
        return np.asarray((bits + 0x7FFF + (bits >> 16 & 1)) >> 16, dtype=np.uint16)
    return np.asarray(value, dtype=format.storage)


# --------------------------------------------------------------------------------------------------------------
# A batch in one call
# --------------------------------------------------------------------------------------------------------------

PIECE: Final = np.dtype(
    [
        ("data", np.uint64),  # address of (height, width, 3) uint8, contiguous; 0: no piece
        ("height", np.int32),
        ("width", np.int32),
        ("top", np.int32),  # where the piece lies in its image
        ("left", np.int32),
        ("image_height", np.int32),
        ("image_width", np.int32),
        ("box", np.float64, 4),  # the crop (top, left, height, width), image pixels
    ],
    align=True,
)
"""One decoded piece, as kernels/mix_pixel.cuh declares it."""

ROW: Final = np.dtype(
    [
        ("span", np.float64, 4),
        ("seam_width", np.float64),
        ("fractal_weight", np.float32),
        ("fractal", np.int32),
        ("mask", np.int32),
        ("flip", np.uint8),
        ("fractal_flip", np.uint8, 2),
    ],
    align=True,
)
"""One sample of the plan, as kernels/mix_pixel.cuh declares it."""


def piece_table(
    data: NDArray[np.uint64],
    shapes: NDArray[np.int32],
    boxes: NDArray[np.float64],
    *,
    places: NDArray[np.int32] | None = None,
    image_sizes: NDArray[np.int32] | None = None,
) -> NDArray[np.void]:
    """Describe a batch's pieces of one source to `mix`.

    Args:
        data: (n,) addresses of the pixels; 0 where a sample has no such piece.
        shapes: (n, 2) (height, width) of the pieces.
        boxes: (n, 4) the crops, relative to the image.
        places: (n, 2) (top, left) of the pieces in their images; None: pieces are whole images.
        image_sizes: (n, 2) (height, width) of the images; None: pieces are whole images.

    Returns:
        (n,) of `PIECE`. It holds addresses only: the pixels must outlive it.
    """
    sizes = shapes if image_sizes is None else image_sizes
    table = np.zeros(len(data), dtype=PIECE)
    table["data"] = data
    table["height"], table["width"] = shapes[:, 0], shapes[:, 1]
    table["image_height"], table["image_width"] = sizes[:, 0], sizes[:, 1]
    if places is not None:
        table["top"], table["left"] = places[:, 0], places[:, 1]
    table["box"] = boxes * np.tile(sizes, (1, 2))
    return table


def row_table(plan: BatchPlan) -> NDArray[np.void]:
    """Describe a batch's rows to the kernels: (n,) of `ROW`."""
    rows = np.zeros(len(plan), dtype=ROW)
    for name in ("span", "seam_width", "fractal_weight", "fractal", "mask", "flip", "fractal_flip"):
        rows[name] = getattr(plan, name)
    return rows


def mix(
    plan: BatchPlan,
    originals: NDArray[np.void],
    edits: NDArray[np.void],
    bank: NDArray[np.uint8] | None,
    *,
    out: NDArray[np.generic],
    format: TensorFormat,
    threads: int = 1,
) -> None:
    """Mix a batch into `out`.

    Args:
        plan: n rows.
        originals: (n,) piece table of the originals.
        edits: (n,) piece table of the edits; data is 0 where a row is not mixed.
        bank: (count, height, width, 3) uint8 fractals; None where no row has one.
        out: `format.shape(n, plan.output_size)` of `format.storage`, contiguous.
        format: Type, layout and normalisation of the result.
        threads: Threads of the CPU kernel. The result does not depend on it.

    Raises:
        ConfigError: the arguments do not fit together.
    """
    count = len(plan)
    expected = format.shape(count, plan.output_size)
    if out.shape != expected or out.dtype != format.storage or not out.flags.c_contiguous:
        raise ConfigError(
            f"out must be contiguous {format.storage} of shape {expected}, found {out.dtype} of shape {out.shape}"
        )
    _check_tables(plan, originals, edits, 0 if bank is None else len(bank))
    if threads < 1:
        raise ConfigError(f"threads must be at least 1, found {threads}")
    scale, offset = format.scale_and_offset()
    done = native.mix(
        originals,
        edits,
        row_table(plan),
        bank,
        out,
        output_size=plan.output_size,
        dtype=DTYPES.index(format.dtype),
        channels_last=format.channels_last,
        scale=scale,
        offset=offset,
        threads=threads,
    )
    if not done:
        for row in range(count):
            fractal = None if bank is None or plan.fractal[row] < 0 else bank[plan.fractal[row]]
            edit = _whole_image(edits[row]) if plan.edit[row] >= 0 else None
            out[row] = encode(mixed_image(plan, row, _whole_image(originals[row]), edit, fractal), format)


def mix_on_device(
    plan: BatchPlan,
    originals: NDArray[np.void],
    edits: NDArray[np.void],
    bank: "gpu.DeviceBank | None",
    *,
    out: "torch.Tensor",
    format: TensorFormat,
) -> None:
    """Mix a batch on a GPU: one launch on torch's current stream, which nothing here waits for.

    Args:
        plan: n rows, at most 65535.
        originals: (n,) piece table of the originals; its addresses are the device's.
        edits: (n,) piece table of the edits; data is 0 where a row is not mixed.
        bank: Fractals on the same device; None where no row has one.
        out: (n, 3, height, width) CUDA tensor of the format's type, contiguous in its memory format.
        format: Type, layout and normalisation of the result.

    The pieces must stay until the launch is done: `gpu.Retained`.

    Raises:
        ConfigError: the arguments do not fit together.
    """
    import torch

    from dali_diffusemix import gpu

    layout = torch.channels_last if format.channels_last else torch.contiguous_format
    shape = (len(plan), 3, *plan.output_size)
    if (
        out.device.type != "cuda"
        or out.shape != shape
        or out.dtype is not getattr(torch, format.dtype)
        or not out.is_contiguous(memory_format=layout)
    ):
        raise ConfigError(
            f"out must be a CUDA tensor of {format.dtype}, shape {shape} and {layout}, found {out.dtype} of shape "
            f"{tuple(out.shape)} on {out.device}"
        )
    if len(plan) > 65535:
        raise ConfigError(f"a batch on a GPU has at most 65535 samples, found {len(plan)}; take a smaller batch_size")
    _check_tables(plan, originals, edits, 0 if bank is None else len(bank))
    if not len(plan):
        return
    scale, offset = format.scale_and_offset()
    gpu.mix(
        originals,
        edits,
        row_table(plan),
        bank,
        out,
        output_size=plan.output_size,
        name=f"mix_{format.dtype}_{'channels_last' if format.channels_last else 'nchw'}",
        scale=scale,
        offset=offset,
    )


def _check_tables(plan: BatchPlan, originals: NDArray[np.void], edits: NDArray[np.void], fractals: int) -> None:
    if len(originals) != len(plan) or len(edits) != len(plan):
        raise ConfigError(f"the plan has {len(plan)} rows, found {len(originals)} originals and {len(edits)} edits")
    # A source of which a sample shows nothing needs no piece: which, only the plan's visible_parts knows.
    if not np.where(plan.mixed, originals["data"] | edits["data"], originals["data"]).all():
        raise ConfigError("every row needs a piece of its original, and every mixed row one of its original or edit")
    if len(plan) and plan.fractal.max() >= fractals:
        raise ConfigError(f"the plan wants fractal {plan.fractal.max()}, the bank holds {fractals}")
    for name, table in (("original", originals), ("edit", edits)):
        inside = (table["top"] >= 0) & (table["left"] >= 0) & (table["height"] > 0) & (table["width"] > 0)
        inside &= table["top"] + table["height"] <= table["image_height"]
        inside &= table["left"] + table["width"] <= table["image_width"]
        if wrong := np.flatnonzero(~inside & (table["data"] != 0)).tolist():
            raise ConfigError(f"a piece must lie in its image, found row {wrong[0]} of the {name}s: {table[wrong[0]]}")


def _whole_image(piece: np.void) -> NDArray[np.uint8]:
    """(height, width, 3) uint8: the image that a piece is of; what the piece leaves out is not seen and 0."""
    height, width = int(piece["height"]), int(piece["width"])
    buffer = (ctypes.c_uint8 * (height * width * 3)).from_address(int(piece["data"]))
    pixels: NDArray[np.uint8] = np.ctypeslib.as_array(buffer).reshape(height, width, 3)
    if (piece["image_height"], piece["image_width"]) == (height, width):
        return pixels
    image = np.zeros((piece["image_height"], piece["image_width"], 3), dtype=np.uint8)
    image[piece["top"] : piece["top"] + height, piece["left"] : piece["left"] + width] = pixels
    return image
