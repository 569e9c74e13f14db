"""One call a batch: from decoded pieces and a plan to the training tensor.

`mix` computes the specification of `mix.pixel` for a batch, with the fused kernel of kernels/mix.cpp where it was
built, and `mix_on_device` with the GPU's. They work on a `piece_table`: a piece is a rectangle of decoded pixels and
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
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.base import native
from dali_diffusemix.errors import ConfigError
from dali_diffusemix.plan.batch import BatchPlan

if TYPE_CHECKING:
    import torch

    from dali_diffusemix.base import gpu
from dali_diffusemix.mix.pixel import encode, mixed_image
from dali_diffusemix.mix.tensor import DTYPES, TensorFormat

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

    from dali_diffusemix.base import gpu

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
