"""Augmentation on a GPU: the CPU's bits, operation by operation and through the loader, without DALI."""

from pathlib import Path

import numpy as np
import pytest
import torch
from augment_cases import One, operations
from mixing_cases import plan_of, table
from numpy.typing import NDArray
from test_gpu_kernel import DEVICE, empty, on_device, values

from dali_diffusemix import (
    AutoAugment,
    ColorJitter,
    DiffuseMixDataset,
    DiffuseMixLoader,
    FractalBank,
    GaussianBlur,
    MixSpec,
    RandAugment,
    RandomCrop,
    RandomErasing,
    TrainCrop,
    TrivialAugmentWide,
)
from dali_diffusemix.mix import IMAGENET, TensorFormat
from dali_diffusemix.mix.call import mix, mix_on_device
from dali_diffusemix.mix.tensor import DTYPES
from dali_diffusemix.store.pack import PackConfig, pack

NOTHING = np.empty((0, 0, 3), dtype=np.uint8)
NONE = (0, 0, 0)


def cases(height: int, width: int) -> list[One]:
    """Every operation, with values that change much."""
    fill = (10, 200, 30)
    warps = {"shear_x": -0.7, "shear_y": 0.31, "translate_x": 13.4, "translate_y": -7.0, "rotate": 27.3}
    return [
        *((name, filter, fill, (amount,)) for name, amount in warps.items() for filter in range(3)),
        *((f"translate_{axis}", 0, fill, (9.500000000000002,)) for axis in "xy"),
        *((name, 0, NONE, (1.83,)) for name in ("brightness", "contrast", "color", "sharpness")),
        *((name, 0, NONE, (0.21,)) for name in ("brightness", "contrast", "color", "sharpness", "hue")),
        ("posterize", 0, NONE, (3,)),
        ("solarize", 0, NONE, (93.5,)),
        ("solarize_add", 0, NONE, (87,)),
        *((name, 0, NONE, ()) for name in ("grayscale", "autocontrast", "equalize", "invert")),
        ("blur", 0, NONE, (1.3, 13)),
        ("erase", 0, NONE, (height // 3, width // 4, height // 2, width // 2, 0.3, -1.0, 2.0)),
        ("erase_noise", 0, NONE, (height // 3, width // 4, height // 2, width // 2, 3_141_592_653, 5)),
    ]


def photograph(height: int, width: int) -> NDArray[np.uint8]:
    """Gradients with noise: values from 20 to 230."""
    generator = np.random.default_rng(height * width)
    ramp = np.add.outer(np.linspace(20, 120, height), np.linspace(0, 90, width))[..., None] * (0.7, 1, 0.9)
    return np.clip(ramp + generator.integers(0, 20, (height, width, 3)), 0, 255).astype(np.uint8)


def both(
    images: list[NDArray[np.uint8]], some: NDArray[np.void], format: TensorFormat
) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """The batch by the GPU and by the CPU, of images that the mix shows pixel for pixel."""
    size = images[0].shape[0], images[0].shape[1]
    plan = plan_of(len(images), size, box=np.tile([0.0, 0, 1, 1], (len(images), 1)), operations=some)
    pieces, kept = on_device(images, [NOTHING] * len(images))
    out = empty(len(images), size, format)
    out.fill_(77)
    mix_on_device(plan, pieces, None, out=out, format=format)
    expected = np.zeros(format.shape(len(images), size), dtype=format.storage)
    mix(plan, table(images), None, out=expected, format=format)
    found = values(out, format)
    del kept
    return found, expected


@pytest.mark.parametrize("size", [(224, 224), (1, 1), (5, 3), (33, 70), (300, 280)])
def test_every_operation_gives_the_cpus_bits(size: tuple[int, int]) -> None:
    """In shared memory; the last size is too large for it."""
    format = TensorFormat(dtype="uint8", normalize=None)
    some = cases(*size)
    if min(size) < 4:
        some = [one for one in some if not one[0].startswith("erase")]
    rows = np.concatenate([operations(one) for one in some])
    found, expected = both([photograph(*size)] * len(some), rows, format)
    for one, result, wanted in zip(some, found, expected, strict=True):
        assert np.array_equal(result, wanted), (one, np.abs(result.astype(int) - wanted.astype(int)).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_format_after_several_operations(dtype: str, channels_last: bool) -> None:
    format = TensorFormat(dtype=dtype, channels_last=channels_last, normalize=None if dtype == "uint8" else IMAGENET)  # type: ignore[arg-type]
    for size in ((224, 224), (31, 57), (310, 290)):
        some = cases(*size)
        rows = np.concatenate([operations(some[i], some[-i - 1], some[(7 * i) % len(some)]) for i in range(8)])
        rows[3] = np.zeros((), dtype=rows.dtype)  # a sample that nothing happens to
        found, expected = both([photograph(*size)] * 8, rows, format)
        np.testing.assert_array_equal(found, expected)


SETTINGS = [
    TrivialAugmentWide(),
    [RandAugment(), AutoAugment()],
    "rand-m9-mstd0.5-inc1",
    "ThreeAugment",
    [ColorJitter(0.4, 0.4, 0.4, 0.1), GaussianBlur(9, p=0.5), RandomErasing(1, value="random")],
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("resident", ["device", "host"])
def test_the_loader_gives_the_cpus_samples(photos: Path, tmp_path: Path, setting: object, resident: str) -> None:
    pack(photos, tmp_path / "raw", PackConfig(format="raw"))
    dataset = DiffuseMixDataset(
        tmp_path / "raw", mix=None, crop=RandomCrop(96, padding=8), augment=setting, normalize=None, seed=2
    )
    for dtype in (torch.uint8, torch.float32):
        batches = []
        for device, where in (("cuda", resident), ("cpu", None)):
            with DiffuseMixLoader(dataset, 16, shuffle=True, device=device, resident=where, dtype=dtype) as loader:  # type: ignore[arg-type]
                batches.append([images.cpu() for images, _ in loader])
        assert all(torch.equal(one, other) for one, other in zip(*batches, strict=True))


def test_mixed_samples_are_close(photos: Path, edits: Path, bank: FractalBank, tmp_path: Path) -> None:
    """The mix rounds to 8 bits, and its sums differ in their order: a value in a thousand is one step off."""
    pack(photos, tmp_path / "originals", PackConfig(format="raw"))
    pack(edits, tmp_path / "edits", PackConfig(format="raw"))
    dataset = DiffuseMixDataset(
        tmp_path / "originals",
        edits=tmp_path / "edits",
        fractals=bank,
        mix=MixSpec.paper(),
        crop=TrainCrop(128),
        augment=[ColorJitter(0.3, 0.3, 0.3), RandomErasing(1)],
        normalize=None,
        seed=5,
    )
    found = []
    for device, resident in (("cuda", "device"), ("cpu", None)):
        with DiffuseMixLoader(dataset, 16, device=device, resident=resident, dtype=torch.uint8) as loader:  # type: ignore[arg-type]
            found.append(torch.cat([images.cpu().int() for images, _ in loader]))
    difference = (found[0] - found[1]).abs()
    assert difference.max() <= 4 and (difference > 0).float().mean() < 0.01


def test_launches_wait_for_nothing() -> None:
    format = TensorFormat()
    size, some = (64, 64), cases(64, 64)
    rows = np.concatenate([operations(one) for one in some])
    images = [photograph(*size)] * len(some)
    expected, _ = both(images, rows, format)  # compiles, and fills caches
    plan = plan_of(len(images), size, box=np.tile([0.0, 0, 1, 1], (len(images), 1)), operations=rows)
    pieces, kept = on_device(images, [NOTHING] * len(images))
    out = empty(len(images), size, format)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mix_on_device(plan, pieces, None, out=out, format=format)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    np.testing.assert_array_equal(values(out, format), expected)
    assert out.device == DEVICE
    del kept
