"""One call per batch: from decoded pieces and a plan to the training tensor.

`mix` computes the specification of `mix.pixel` for a batch, with the fused kernel of kernels/mix.cpp where it was
built, and `mix_on_device` with the GPU's. They work on a `piece_table`: a piece is a rectangle of decoded pixels and
its origin in its image.

        image (of the original, or of the edit)
      ┌─────────────────────────────────────┐
      │  origin = (top, left)               │
      │    ┌───────────────────┐            │
      │    │ piece             │            │        the box is the crop; the piece holds what of the box
      │    │     ┌─────────────┼───┐        │        is seen, plus the filter's halo
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
from dali_diffusemix.mix.augment import augmented_image, lowered, noise_table
from dali_diffusemix.mix.pixel import encode, mixed_image
from dali_diffusemix.mix.tensor import PIXELS, TensorFormat
from dali_diffusemix.plan.augment import CODES
from dali_diffusemix.plan.batch import BatchPlan
from dali_diffusemix.plan.windows import visible_parts

if TYPE_CHECKING:
    import torch

    from dali_diffusemix.base import gpu

PIECE: Final = np.dtype(
    [
        ("data", np.uint64),  # address of (height, width, 3) uint8, contiguous; 0: no piece
        ("height", np.int32),
        ("width", np.int32),
        ("top", np.int32),  # the piece's origin in its image
        ("left", np.int32),
        ("image_height", np.int32),
        ("image_width", np.int32),
    ],
    align=True,
)
"""One decoded piece, as kernels/mix_pixel.cuh declares it."""

ROW: Final = np.dtype(
    [
        ("box", np.float64, 4),
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
    *,
    origins: NDArray[np.int32] | None = None,
    image_sizes: NDArray[np.int32] | None = None,
) -> NDArray[np.void]:
    """Describe a batch's pieces to `mix`.

    Args:
        data: (2, n) addresses of the pixels, of originals and of edits; 0 where a sample has no such piece.
        shapes: (2, n, 2) (height, width) of the pieces.
        origins: (2, n, 2) (top, left) of the pieces in their images; None: pieces are whole images.
        image_sizes: (2, n, 2) (height, width) of the images; None: pieces are whole images.

    Returns:
        (2, n) of `PIECE`; any other shape of `data` gives a table of that shape. It holds addresses only: the pixels
        must outlive it.
    """
    table = np.zeros(np.shape(data), dtype=PIECE)
    table["data"] = data
    table["height"], table["width"] = shapes[..., 0], shapes[..., 1]
    sizes = shapes if image_sizes is None else image_sizes
    table["image_height"], table["image_width"] = sizes[..., 0], sizes[..., 1]
    if origins is not None:
        table["top"], table["left"] = origins[..., 0], origins[..., 1]
    return table


def row_table(plan: BatchPlan) -> NDArray[np.void]:
    """Describe a batch's rows to the kernels: (n,) of `ROW`."""
    rows = np.zeros(len(plan), dtype=ROW)
    for name in ROW.names or ():
        rows[name] = getattr(plan, name)
    return rows


def mix(
    plan: BatchPlan,
    pieces: NDArray[np.void],
    bank: NDArray[np.uint8] | None,
    *,
    out: NDArray[np.generic],
    format: TensorFormat,
    threads: int = 1,
) -> None:
    """Mix a batch into `out`.

    Args:
        plan: n rows.
        pieces: (2, n) of `PIECE`: originals, edits; the edit's data is 0 where a row is not mixed.
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
            f"out must be contiguous {format.storage} of shape {expected}, found {out.dtype} of shape {out.shape}."
        )
    _check_tables(plan, pieces, 0 if bank is None else len(bank))
    if threads < 1:
        raise ConfigError(f"threads must be at least 1, found {threads}.")
    operations = lowered(plan.operations, plan.output_size, format)
    if not native.mix(pieces, row_table(plan), bank, out, format, operations, _noise(plan, format), threads):
        for row, (original, edit) in enumerate(pieces.T):
            fractal = None if bank is None or plan.fractal[row] < 0 else bank[plan.fractal[row]]
            shown = _whole_image(edit) if plan.edit[row] >= 0 else None
            out[row] = sample(plan, row, _whole_image(original), shown, fractal, format)


def sample(
    plan: BatchPlan,
    row: int,
    original: NDArray[np.uint8],
    edit: NDArray[np.uint8] | None,
    fractal: NDArray[np.uint8] | None,
    format: TensorFormat,
) -> NDArray[np.generic]:
    """One sample by the specification: mixed; with operations rounded to 8 bits and augmented; then encoded."""
    image = mixed_image(plan, row, original, edit, fractal)
    if plan.operations.shape[1]:
        pixels = encode(image, PIXELS)
        image = augmented_image(np.asarray(pixels, dtype=np.uint8), plan.operations[row], format).astype(np.float32)
    return encode(image, format)


def _noise(plan: BatchPlan, format: TensorFormat) -> NDArray[np.uint8] | None:
    """The table of noise, if an operation needs it."""
    return noise_table(format) if (plan.operations["code"] == CODES["erase_noise"]).any() else None


def mix_on_device(
    plan: BatchPlan,
    pieces: NDArray[np.void],
    bank: "gpu.DeviceBank | None",
    *,
    out: "torch.Tensor",
    format: TensorFormat,
) -> None:
    """Mix a batch on a GPU: one launch on torch's current stream, or two with augmentation, without waiting for them.

    Args:
        plan: n rows, at most 65535.
        pieces: (2, n) of `PIECE`, as in `mix`, with the device's addresses.
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
            f"{tuple(out.shape)} on {out.device}."
        )
    if len(plan) > 65535:
        raise ConfigError(f"a batch on a GPU must have at most 65535 samples, found {len(plan)}; reduce batch_size.")
    _check_tables(plan, pieces, 0 if bank is None else len(bank))
    if not len(plan):
        return
    # The tables go after the launch: torch gives their memory to nothing that could run before it on this stream.
    tables = gpu.upload(pieces, row_table(plan), out.device)
    if not plan.operations.shape[1]:
        gpu.launch(tables, bank, out, format)
        return
    mixed = torch.empty(shape, dtype=torch.uint8, device=out.device, memory_format=torch.channels_last)
    gpu.launch(tables, bank, mixed, PIXELS)
    operations = lowered(plan.operations, plan.output_size, format)
    blurs = bool((operations["code"] == CODES["blur"]).any())
    gpu.augment(mixed, operations, _noise(plan, format), out, format, blurs=blurs)


def _check_tables(plan: BatchPlan, pieces: NDArray[np.void], fractals: int) -> None:
    if pieces.shape != (2, len(plan)):
        raise ConfigError(
            f"pieces must be (2, {len(plan)}), the originals and the edits of the plan's rows, found {pieces.shape}."
        )
    # A source of which a sample shows nothing needs no piece. Rows with one of two pieces are believed to know which.
    originals, edits = pieces["data"]
    without = np.flatnonzero(np.where(plan.mixed, originals | edits, originals) == 0).tolist()
    if any(visible_parts(plan.row(row), np.ones((2, 1, 2), dtype=np.int32)).any() for row in without):
        raise ConfigError("every row needs a piece of its original, and every mixed row one of its original or edit.")
    if len(plan) and plan.fractal.max() >= fractals:
        raise ConfigError(f"plan.fractal must be below the bank's {fractals}, found {plan.fractal.max()}.")
    # As PIECE lays them out, (2, n, 2) each: few operations, for this is done for every batch.
    numbers = np.ascontiguousarray(pieces).view(np.int32).reshape(2, len(plan), -1)
    size, begin, image = numbers[..., 2:4], numbers[..., 4:6], numbers[..., 6:8]
    inside = ((size > 0) & (begin >= 0) & (begin + size <= image)).all(axis=-1)
    for row, column in np.argwhere(~inside & (pieces["data"] != 0)).tolist():
        name = ("original", "edit")[row]
        raise ConfigError(f"a piece must lie in its image, found row {column} of the {name}s: {pieces[row, column]}.")


def _whole_image(piece: np.void) -> NDArray[np.uint8]:
    """(height, width, 3) uint8: the image of a piece, 0 outside the piece, where it is not seen."""
    height, width = int(piece["height"]), int(piece["width"])
    buffer = (ctypes.c_uint8 * (height * width * 3)).from_address(int(piece["data"]))
    pixels: NDArray[np.uint8] = np.ctypeslib.as_array(buffer).reshape(height, width, 3)
    if (piece["image_height"], piece["image_width"]) == (height, width):
        return pixels
    image = np.zeros((piece["image_height"], piece["image_width"], 3), dtype=np.uint8)
    image[piece["top"] : piece["top"] + height, piece["left"] : piece["left"] + width] = pixels
    return image
