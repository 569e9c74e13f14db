"""The mix kernel on a GPU, against the specification."""

import gc
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from mixing_cases import Case, compare, random_case, table
from numpy.typing import NDArray

from dali_diffusemix.base import gpu
from dali_diffusemix.mix import IMAGENET, TensorFormat
from dali_diffusemix.mix.call import mix_on_device, piece_table
from dali_diffusemix.mix.pixel import encode, mixed_image
from dali_diffusemix.mix.tensor import DTYPES, DtypeName
from dali_diffusemix.plan import MASKS

DEVICE = torch.device("cuda", 0)


def on_device(originals: list[NDArray[np.uint8]], edits: list[NDArray[np.uint8]]) -> tuple[NDArray[np.void], object]:
    """The piece table of images that lie on the device, and what keeps them."""
    pieces = table(originals, edits)
    tensors = [
        [torch.from_numpy(np.array(image)).to(DEVICE) if image.size else None for image in images]
        for images in (originals, edits)
    ]
    pieces["data"] = [[0 if tensor is None else tensor.data_ptr() for tensor in source] for source in tensors]
    return pieces, tensors


def values(images: torch.Tensor, format: TensorFormat) -> NDArray[np.generic]:
    """The tensor's memory as `encode` lays it out; bfloat16 as its bits."""
    images = images.permute(0, 2, 3, 1) if format.channels_last else images
    if format.dtype == "bfloat16":
        images = images.contiguous().view(torch.int16)
    array: NDArray[np.generic] = images.cpu().numpy()
    return array.view(np.uint16) if format.dtype == "bfloat16" else array


def empty(count: int, out: tuple[int, int], format: TensorFormat) -> torch.Tensor:
    layout = torch.channels_last if format.channels_last else torch.contiguous_format
    dtype = getattr(torch, format.dtype)
    return torch.empty((count, 3, *out), dtype=dtype, device=DEVICE, memory_format=layout)


@cache
def reference(
    out: tuple[int, int], seed: int, largest: int, seam_width: float
) -> tuple[Case, list[NDArray[np.float32]]]:
    """Six samples and what the specification makes of them."""
    case = random_case(np.random.default_rng(seed), 6, out, largest, seam_width=seam_width, own_span=seed % 2 == 0)
    return case, [case.mixed(row) for row in range(6)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("out", [(224, 224), (1, 1), (3, 5), (32, 33), (31, 64), (63, 127), (96, 100)])
def test_the_kernel_is_the_specification(dtype: DtypeName, channels_last: bool, out: tuple[int, int]) -> None:
    normalize = None if dtype == "uint8" else IMAGENET
    format = TensorFormat(dtype=dtype, channels_last=channels_last, normalize=normalize)
    for seed, (largest, seam_width) in enumerate(product((1, 3, 40, 400), (0.0, 20 / 256, 1.0))):
        case, mixed = reference(out, seed, largest, seam_width)
        pieces, kept = on_device(case.originals, case.edits)
        images = empty(6, out, format)
        images.fill_(77)
        mix_on_device(case.plan, pieces, gpu.DeviceBank(case.bank, DEVICE), out=images, format=format)
        result = values(images, format)
        del kept
        for row in range(6):
            compare(result[row], encode(mixed[row], format), dtype)


@pytest.mark.parametrize("mask", range(4))
def test_pieces_of_what_is_seen_are_enough(mask: int) -> None:
    """Pixels that are not seen are not read: the pieces hold only their half and the filter's reach."""
    generator = np.random.default_rng(mask)
    case = random_case(generator, 1, (40, 48), 1)
    plan = case.plan
    original = generator.integers(0, 256, (120, 100, 3), dtype=np.uint8)
    edit = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    plan.box[:] = plan.span[:] = [0.2, 0.1, 0.7, 0.8]
    plan.mask[:], plan.edit[:], plan.fractal[:], plan.flip[:] = mask, 0, -1, False
    name = MASKS[mask]
    parts = []
    for image, first in ((original, name in ("right", "bottom")), (edit, name in ("left", "top"))):
        axis = 1 if name in ("left", "right") else 0
        side = image.shape[axis]
        low, high = (0, side * 6 // 10) if first else (side * 4 // 10, side)
        where = [slice(None), slice(None)]
        where[axis] = slice(low, high)
        piece = torch.from_numpy(np.ascontiguousarray(image[tuple(where)])).to(DEVICE)
        origin = [0, 0]
        origin[axis] = low
        described = piece_table(
            np.array([piece.data_ptr()], dtype=np.uint64),
            np.array([piece.shape[:2]], dtype=np.int32),
            origins=np.array([origin], dtype=np.int32),
            image_sizes=np.array([image.shape[:2]], dtype=np.int32),
        )
        parts.append((described, piece))
    images = empty(1, (40, 48), TensorFormat())
    mix_on_device(plan, np.stack([described for described, _ in parts]), None, out=images, format=TensorFormat())
    expected = encode(mixed_image(plan, 0, original, edit), TensorFormat())
    compare(values(images, TensorFormat())[0], expected, "float32")


def test_one_bank_for_each_device_and_process() -> None:
    images = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    bank = gpu.device_bank("a", images, DEVICE)
    assert gpu.device_bank("a", images, DEVICE) is bank
    assert gpu.device_bank("b", images, DEVICE) is not bank
    del bank
    gc.collect()
    assert ("a", DEVICE) not in gpu._banks


def test_launches_are_ordered_on_the_current_stream_and_wait_for_nothing() -> None:
    case = random_case(np.random.default_rng(5), 6, (64, 64), 300)
    pieces, kept = on_device(case.originals, case.edits)
    bank, images = gpu.DeviceBank(case.bank, DEVICE), empty(6, (64, 64), TensorFormat())
    mix_on_device(case.plan, pieces, bank, out=images, format=TensorFormat())  # compiles
    torch.cuda.synchronize()
    expected = images.clone()
    stream = torch.cuda.Stream()
    images.fill_(7)
    stream.wait_stream(torch.cuda.current_stream())
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # about a tenth of a second of the device's time
            mix_on_device(case.plan, pieces, bank, out=images, format=TensorFormat())
            done = torch.cuda.Event()
            done.record()
        # Launched and not waited for: the device is still asleep.
        assert not done.query()
        torch.cuda.current_stream().wait_stream(stream)
        same = (images == expected).all()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert bool(same)
    del kept


def test_a_source_of_which_nothing_is_seen_needs_no_piece() -> None:
    """A crop wholly on the edit's side: the original's address is 0 and is not touched; and the other way round."""
    generator = np.random.default_rng(3)
    case = random_case(generator, 1, (33, 40), 90)
    plan = case.plan
    plan.fractal[:], plan.fractal_weight[:], plan.edit[:] = -1, 0, 0
    plan.box[:] = plan.span[:] = [0.1, 0.55, 0.8, 0.4]
    image, edit = (generator.integers(0, 256, (60, 70, 3), dtype=np.uint8) for _ in range(2))
    for name, unseen in (("right", 0), ("left", 1)):
        plan.mask[:] = MASKS.index(name)
        pieces, kept = on_device([image], [edit])
        pieces["data"][unseen] = 0
        images = empty(1, (33, 40), TensorFormat())
        mix_on_device(plan, pieces, None, out=images, format=TensorFormat())
        compare(values(images, TensorFormat())[0], encode(mixed_image(plan, 0, image, edit), TensorFormat()), "float32")
        del kept
