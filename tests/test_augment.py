"""Augmentation after the mix: its law, the CPU's kernel and the GPU's source against it, and what the plan draws."""

import numpy as np
import pytest
from augment_cases import expected, near_halves, operations, samples
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mixing_cases import plan_of, table
from numpy.typing import NDArray
from test_cuda_source import SHIM, Shim

from dali_diffusemix.mix import IMAGENET, TensorFormat
from dali_diffusemix.mix.augment import lowered, noise_table
from dali_diffusemix.mix.call import mix
from dali_diffusemix.mix.tensor import DTYPES

FORMATS = [
    TensorFormat(dtype=dtype, channels_last=last, normalize=None if dtype == "uint8" else IMAGENET)
    for dtype in DTYPES
    for last in (False, True)
]


def by_the_kernel(
    image: NDArray[np.uint8], some: NDArray[np.void], format: TensorFormat, threads: int = 1
) -> NDArray[np.generic]:
    """One sample of a mix that shows all of an image, pixel for pixel."""
    height, width = image.shape[:2]
    plan = plan_of(1, (height, width), box=np.array([[0.0, 0, 1, 1]]), operations=some)
    out = np.zeros(format.shape(1, (height, width)), dtype=format.storage)
    mix(plan, table([image]), None, out=out, format=format, threads=threads)
    return out[0]


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(sample=samples())
def test_the_kernel_gives_the_specifications_bits(sample: tuple[NDArray[np.uint8], NDArray[np.void]]) -> None:
    image, some = sample
    for format in (FORMATS[0], FORMATS[-1]):
        np.testing.assert_array_equal(by_the_kernel(image, some, format), expected(image, some[0], format))


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Shim:
    return Shim(SHIM / "augment.cpp", tmp_path_factory.mktemp("shim"), contract="off")


def on_the_shim(
    shim: Shim,
    image: NDArray[np.uint8],
    some: NDArray[np.void],
    format: TensorFormat,
    *,
    in_shared: bool = True,
    descending: bool = False,
) -> NDArray[np.generic]:
    """Two samples, the second with an operation less, as the GPU's launcher gives them; the first is returned."""
    height, width = image.shape[:2]
    both = np.concatenate([some, some])
    both[1, 0] = np.zeros((), dtype=some.dtype)
    mixed = np.ascontiguousarray(np.stack([image, image]))
    scratch, rows = np.full_like(mixed, 0xC5), np.full(mixed.shape, np.nan, dtype=np.float32)
    table, noise = lowered(both, (height, width), format), noise_table(format)
    out = np.full(format.shape(2, (height, width)), 77, dtype=format.storage)
    scale, offset = format.scale_and_offset()
    shim.launch(
        f"augment_{format.dtype}_{'channels_last' if format.channels_last else 'nchw'}",
        (2, 1, 1),
        (512, 1, 1),
        [
            np.uint64(mixed.ctypes.data),
            np.uint64(0 if in_shared else scratch.ctypes.data),
            np.uint64(rows.ctypes.data),
            np.uint64(table.ctypes.data),
            np.int32(table.shape[1]),
            np.uint64(noise.ctypes.data),
            np.uint64(out.ctypes.data),
            *(np.int32(side) for side in (height, width)),
            *scale,
            *offset,
        ],
        descending=descending,
    )
    np.testing.assert_array_equal(out[1], by_the_kernel(image, both[1:], format))
    return out[0]


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(sample=samples())
@example(sample=(np.zeros((1, 1, 3), dtype=np.uint8), operations(("equalize", 0, (0, 0, 0), ()))))
def test_the_gpus_source_gives_the_same_bits(shim: Shim, sample: tuple[NDArray[np.uint8], NDArray[np.void]]) -> None:
    """In shared memory and outside, with threads in both orders: nothing depends on which comes first."""
    image, some = sample
    for turn, format in enumerate((FORMATS[0], FORMATS[-1])):
        for in_shared in (True, False):
            found = on_the_shim(shim, image, some, format, in_shared=in_shared, descending=turn == 1)
            np.testing.assert_array_equal(found, by_the_kernel(image, some, format))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), axis=st.sampled_from("xy"), side=st.integers(1, 2000))
@example(data=None, axis="x", side=300)
@example(data=None, axis="y", side=300)
def test_translations_of_nearly_half_a_pixel(shim: Shim, data: st.DataObject | None, axis: str, side: int) -> None:
    """Pillow finds some pixels one further, and so do both kernels, on both axes at any size."""
    format = FORMATS[0]
    image = np.random.default_rng(side).integers(0, 256, (side, 2, 3), dtype=np.uint8)
    image = image.transpose(1, 0, 2).copy() if axis == "x" else image
    amounts = [-0.4999999999999999, 0.5000000000000001, 1.5000000000000002, 121.50000000000001, -121.49999999999999]
    for amount in amounts if data is None else [data.draw(near_halves(side))]:
        some = operations((f"translate_{axis}", 0, (9, 8, 7), (amount,)))
        wanted = expected(image, some[0], format)
        np.testing.assert_array_equal(by_the_kernel(image, some, format), wanted)
        np.testing.assert_array_equal(on_the_shim(shim, image, some, format), wanted)


@pytest.mark.parametrize("format", FORMATS, ids=lambda one: f"{one.dtype}-{one.channels_last}")
def test_every_format(shim: Shim, format: TensorFormat) -> None:
    generator = np.random.default_rng(3)
    some = operations(("rotate", 0, (9, 8, 7), (33.0,)), ("color", 0, (0, 0, 0), (1.7,)))
    for height, width in ((1, 1), (5, 3), (64, 17), (33, 70)):
        image = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        wanted = expected(image, some[0], format)
        np.testing.assert_array_equal(by_the_kernel(image, some, format), wanted)
        np.testing.assert_array_equal(on_the_shim(shim, image, some, format), wanted)
