"""The NumPy specification against Pillow and the written equations; the kernel against the specification."""

import ctypes
import math
import platform
import shutil
import subprocess
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from augment_cases import operations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from mixing_cases import FLOAT32_TOLERANCE, NOTHING, compare, pixels, plan_of, random_case, table
from numpy.typing import NDArray
from PIL import Image

from dali_diffusemix.base import native
from dali_diffusemix.errors import ConfigError
from dali_diffusemix.mix import IMAGENET, TensorFormat
from dali_diffusemix.mix.call import mix, piece_table
from dali_diffusemix.mix.pixel import edit_weight, encode, mixed_image, resample, resample_weights
from dali_diffusemix.mix.tensor import DTYPES, DtypeName
from dali_diffusemix.plan import MASKS, BatchPlan, geometry
from dali_diffusemix.plan.augment import OPERATIONS

SHARED = Path(__file__).parents[2] / "shared"

needs_library = pytest.mark.skipif(native.library() is None, reason="the CPU kernel was not built on this machine")

# --- the specification ----------------------------------------------------------------------------------------------


@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    out_height=st.integers(1, 60),
    out_width=st.integers(1, 60),
    data=st.data(),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_resample_is_pillows(
    height: int, width: int, out_height: int, out_width: int, data: st.DataObject, seed: int
) -> None:
    image = pixels(np.random.default_rng(seed), height, width)
    left, right = sorted(data.draw(st.tuples(st.floats(0, width), st.floats(0, width))))
    top, bottom = sorted(data.draw(st.tuples(st.floats(0, height), st.floats(0, height))))
    if right - left < 0.01 or bottom - top < 0.01:
        return
    expected = Image.fromarray(image).resize(
        (out_width, out_height), Image.Resampling.BILINEAR, box=(left, top, right, bottom)
    )
    box = np.array([top, left, bottom - top, right - left]) / np.array([height, width, height, width])
    ours = resample(image, box, (out_height, out_width))
    rounded = np.floor(ours + 0.5).astype(int)
    # Pillow rounds to whole values between its two passes and holds weights in 22 bits.
    assert np.abs(rounded - np.asarray(expected).astype(int)).max() <= 1


def test_the_resample_is_pillows_on_photographs() -> None:
    files = sorted((SHARED / "data/imagenet_sample").glob("*/*"))[:24]
    if not files:
        pytest.skip("../shared/data/imagenet_sample is not here")
    generator = np.random.default_rng(0)
    for file in files:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        left, top = generator.integers(0, image.width // 2), generator.integers(0, image.height // 2)
        right = generator.integers(left + 1, image.width + 1)
        bottom = generator.integers(top + 1, image.height + 1)
        expected = image.resize((224, 224), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
        box = np.array([top, left, bottom - top, right - left]) / np.tile((image.height, image.width), 2)
        ours = resample(np.asarray(image), box, (224, 224))
        assert np.abs(np.floor(ours + 0.5) - np.asarray(expected).astype(int)).max() <= 1


@given(
    start=st.floats(-2, 2),
    extent=st.floats(0.01, 4),
    output=st.integers(1, 64),
    source=st.integers(1, 80),
)
def test_weights_sum_to_one_inside_and_to_zero_outside(start: float, extent: float, output: int, source: int) -> None:
    weights = resample_weights(start, extent, output, source)
    expected = geometry.inside(geometry.centre(start, extent, np.arange(output), output))
    np.testing.assert_allclose(weights.sum(axis=1), expected, atol=1e-6)
    assert (weights >= 0).all()


@pytest.mark.parametrize("mask", range(4))
@pytest.mark.parametrize("seam_width", [0.0, 20 / 256, 1.0])
def test_the_edit_is_on_the_named_side(mask: int, seam_width: float) -> None:
    m = edit_weight(mask, seam_width, np.array([0.0, 0, 1, 1]), (64, 48))
    name = MASKS[mask]
    m = np.broadcast_to(m, (64, 48))
    corner = {"left": (32, 0), "right": (32, 47), "top": (0, 24), "bottom": (63, 24)}[name]
    opposite = {"left": (32, 47), "right": (32, 0), "top": (63, 24), "bottom": (0, 24)}[name]
    assert m[corner] > 0.95 and m[opposite] < 0.05
    assert m.mean() == pytest.approx(0.5)
    if seam_width == 0:
        assert set(np.unique(m)) == {0, 1}
    else:
        across = m[0] if name in ("left", "right") else m[:, 0]
        # A linear ramp: its steps are all alike.
        steps = np.abs(np.diff(across))
        ramp = steps[(across[1:] > 0) & (across[1:] < 1) & (across[:-1] > 0) & (across[:-1] < 1)]
        np.testing.assert_allclose(ramp, 1 / (seam_width * len(across)), atol=1e-6)


def equations_in_float64(
    plan: BatchPlan,
    row: int,
    original: NDArray[np.uint8],
    edit: NDArray[np.uint8] | None,
    fractal: NDArray[np.uint8] | None,
) -> NDArray[np.float64]:
    """DESIGN's equations, pixel by pixel, in Python floats, for a hard seam and mix_then_crop."""
    height, width = plan.output_size

    def at(image: NDArray[np.uint8], v: float, u: float, box: NDArray[np.float64]) -> NDArray[np.float64] | float:
        # (v, u): the output pixel's centre, relative to the image.
        taps = []
        for centre, extent, output, source in (
            (v * image.shape[0], box[2] * image.shape[0], height, image.shape[0]),
            (u * image.shape[1], box[3] * image.shape[1], width, image.shape[1]),
        ):
            if not (0 <= v < 1 and 0 <= u < 1):
                return 0.0
            reach = max(extent / output, 1.0)
            weight = {k: 1 - abs(k + 0.5 - centre) / reach for k in range(source)}
            weight = {k: w for k, w in weight.items() if w > 0}
            total = math.fsum(weight.values())
            taps.append({k: w / total for k, w in weight.items()})
        return sum(wy * wx * image[y, x].astype(np.float64) for y, wy in taps[0].items() for x, wx in taps[1].items())

    top, left, extent_y, extent_x = plan.box[row]
    result = np.zeros((height, width, 3))
    for y in range(height):
        for x in range(width):
            v, u = top + (y + 0.5) / height * extent_y, left + (x + 0.5) / width * extent_x
            value = at(original, v, u, plan.box[row])
            if edit is not None:
                side = MASKS[plan.mask[row]]
                if {"left": u < 0.5, "right": u >= 0.5, "top": v < 0.5, "bottom": v >= 0.5}[side]:
                    value = at(edit, v, u, plan.box[row])
            if fractal is not None and 0 <= v < 1 and 0 <= u < 1:
                upside_down, left_right = plan.fractal_flip[row]
                turned = np.flipud(fractal) if upside_down else fractal
                turned = np.fliplr(turned) if left_right else turned
                weight = float(plan.fractal_weight[row])
                value = (1 - weight) * value + weight * at(turned, v, u, plan.box[row])
            result[y, width - 1 - x if plan.flip[row] else x] = value
    return result


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(seed=st.integers(0, 2**32 - 1), mask=st.integers(-1, 3))
def test_the_specification_is_the_papers_equations(seed: int, mask: int) -> None:
    generator = np.random.default_rng(seed)
    original = pixels(generator, *generator.integers(1, 20, 2))
    edit = pixels(generator, *generator.integers(1, 14, 2)) if mask >= 0 else None
    fractal = pixels(generator, *generator.integers(1, 14, 2)) if mask >= 0 else None
    plan = plan_of(
        1,
        tuple(generator.integers(1, 9, 2).tolist()),
        box=np.concatenate([generator.uniform(-0.2, 0.6, (1, 2)), generator.uniform(0.1, 0.9, (1, 2))], axis=1),
        mask=np.array([mask], dtype=np.int8),
        flip=generator.random(1) < 0.5,
        fractal=np.array([0 if mask >= 0 else -1]),
        fractal_flip=generator.random((1, 2)) < 0.5,
        fractal_weight=np.array([0.2 if mask >= 0 else 0], dtype=np.float32),
    )
    ours = mixed_image(plan, 0, original, edit, fractal)
    np.testing.assert_allclose(ours, equations_in_float64(plan, 0, original, edit, fractal), atol=2e-4)


def test_a_crop_then_mix_seam_lies_in_the_middle_of_the_crop() -> None:
    original, edit = np.zeros((40, 40, 3), dtype=np.uint8), np.full((20, 20, 3), 255, dtype=np.uint8)
    box = np.array([[0.6, 0.7, 0.3, 0.2]])
    right = np.array([MASKS.index("right")], dtype=np.int8)
    crop_first = plan_of(1, (8, 8), box=box, span=np.array([[0.0, 0, 1, 1]]), mask=right)
    np.testing.assert_array_equal(mixed_image(crop_first, 0, original, edit)[0, :, 0], [0] * 4 + [255] * 4)
    # The same crop of a mask over the image lies wholly on the right: all edit.
    assert (mixed_image(plan_of(1, (8, 8), box=box, mask=right), 0, original, edit) == 255).all()


# --- encode -------------------------------------------------------------------------------------------------------


@given(npst.arrays(np.float32, (3, 5, 3), elements=st.floats(0, 255, width=32)))
def test_encode_agrees_with_torchs_casts(image: NDArray[np.float32]) -> None:
    for dtype in DTYPES:
        normalize = None if dtype == "uint8" else IMAGENET
        ours = encode(image, TensorFormat(dtype=dtype, normalize=normalize))
        value = torch.from_numpy(image).permute(2, 0, 1)
        if normalize is None:
            expected = torch.floor(value + 0.5).to(torch.uint8)
            np.testing.assert_array_equal(ours, expected.numpy())
            continue
        plain = encode(image, TensorFormat(normalize=normalize))
        mean, std = (torch.tensor(t).view(3, 1, 1) for t in normalize)
        np.testing.assert_allclose(plain, ((value / 255 - mean) / std).numpy(), atol=1e-5)
        if dtype == "bfloat16":
            exact = torch.from_numpy(plain).to(torch.bfloat16).view(torch.uint16).numpy()
            np.testing.assert_array_equal(ours, exact)
        elif dtype == "float16":
            np.testing.assert_array_equal(ours, torch.from_numpy(plain).to(torch.float16).numpy())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"dtype": "uint8"}, "dtype uint8 holds plain pixels: give normalize=None"),
        ({"normalize": ((0.5,) * 3, (0.5, 0.0, 0.5))}, "deviations must be above 0"),
        ({"normalize": ((0.5,), (0.5,))}, "three numbers each"),
        ({"normalize": ((0.5,) * 3, (0.5,))}, "three numbers each"),
        ({"normalize": (0.5, 0.5)}, r"three numbers each, found \(0.5, 0.5\)"),
        ({"normalize": 0.5}, "three numbers each, found 0.5"),
        ({"normalize": "imagenet"}, "three numbers each, found imagenet"),
    ],
)
def test_a_format_checks_itself(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TensorFormat(**arguments)  # type: ignore[arg-type]


# --- the kernel -------------------------------------------------------------------------------------------------------


@needs_library
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 5),
    out=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    largest=st.sampled_from([1, 3, 40, 300]),
    seam_width=st.sampled_from([0.0, 20 / 256, 0.5, 1.0]),
    own_span=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    channels_last=st.booleans(),
    threads=st.integers(1, 4),
)
def test_the_kernel_is_the_specification(
    seed: int,
    count: int,
    out: tuple[int, int],
    largest: int,
    seam_width: float,
    own_span: bool,
    dtype: DtypeName,
    channels_last: bool,
    threads: int,
) -> None:
    case = random_case(np.random.default_rng(seed), count, out, largest, seam_width=seam_width, own_span=own_span)
    format = TensorFormat(
        dtype=dtype, channels_last=channels_last, normalize=None if dtype == "uint8" or seed % 3 == 0 else IMAGENET
    )
    result = np.zeros(format.shape(count, out), dtype=format.storage)
    mix(case.plan, table(case.originals, case.edits), case.bank, out=result, format=format, threads=threads)
    for row in range(count):
        compare(result[row], case.expected(row, format), dtype)


@needs_library
def test_the_kernel_gives_the_same_bits_on_any_number_of_threads() -> None:
    generator = np.random.default_rng(1)
    count = 160  # enough for the kernel to start all the threads
    images = [pixels(generator, 90, 70) for _ in range(count)]
    box = np.tile([0.1, 0.2, 0.7, 0.6], (count, 1))
    plan = plan_of(count, (33, 44), box=box, mask=(np.arange(count) % 4).astype(np.int8))
    results = []
    for threads in (1, 2, 7, 32):
        result = np.zeros((count, 3, 33, 44), dtype=np.float32)
        mix(plan, table(images, images), None, out=result, format=TensorFormat(), threads=threads)
        results.append(result.tobytes())
    assert len(set(results)) == 1


def some_operations(row: int) -> NDArray[np.void]:
    """Two operations: every one comes in one of 24 rows, warps with each filter."""
    names = [name for name in OPERATIONS if not name.startswith("erase")]
    values = {"posterize": (3,), "solarize": (90,), "solarize_add": (50,), "rotate": (31.0,), "blur": (1.4, 9)}
    chosen = names[row % len(names)], names[(row * 7 + 3) % len(names)]
    return operations(*((name, row % 3, (9, 8, 7), values.get(name, (0.37,))) for name in chosen))


@pytest.mark.slow
@needs_library
@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("g++") is None, reason="wants g++ on x86-64")
def test_every_processor_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's clones, built one by one: without AVX, with AVX2, and what this machine has."""
    sources = [Path(__file__).parents[1] / "kernels" / name for name in ("mix.cpp", "augment.cpp")]
    flags = "-std=c++17 -O3 -fno-math-errno -ffp-contract=off -fPIC -shared -pthread -DMIX_CLONES="
    libraries = [native.library()]
    supported = Path("/proc/cpuinfo").read_text()
    for processor, feature in (("x86-64", "sse2"), ("haswell", "avx2"), ("skylake-avx512", "avx512vl")):
        if feature in supported:
            target = tmp_path / f"{processor}.so"
            subprocess.run(["g++", *flags.split(), f"-march={processor}", "-o", target, *sources], check=True)
            libraries.append(ctypes.CDLL(str(target)))
    case = random_case(np.random.default_rng(8), 24, (61, 75), 300, seam_width=0.1)
    pieces = table(case.originals, case.edits)
    augmented = replace(case.plan, operations=np.concatenate([some_operations(row) for row in range(24)]))
    for plan, dtype in product((case.plan, augmented), DTYPES):
        format = TensorFormat(dtype=dtype, normalize=None if dtype == "uint8" else IMAGENET)
        results = []
        for library in libraries:
            monkeypatch.setattr(native, "library", lambda library=library: library)
            result = np.zeros(format.shape(24, (61, 75)), dtype=format.storage)
            mix(plan, pieces, case.bank, out=result, format=format)
            results.append(result.tobytes())
        assert len(libraries) > 2 and len(set(results)) == 1, dtype


@needs_library
@pytest.mark.parametrize("mask", range(4))
@pytest.mark.parametrize("seam_width", [0.0, 0.1])
def test_pieces_that_hold_what_is_seen_give_what_whole_images_give(mask: int, seam_width: float) -> None:
    """The interface of visible parts: pixels that are not seen need not be there."""
    generator = np.random.default_rng(mask)
    original, edit = pixels(generator, 120, 100), pixels(generator, 64, 64)
    box = np.array([[0.2, 0.1, 0.7, 0.8]])
    plan = plan_of(1, (40, 48), box=box, mask=np.array([mask], dtype=np.int8), seam_width=seam_width)
    whole = np.zeros((1, 3, 40, 48), dtype=np.float32)
    mix(plan, table([original], [edit]), None, out=whole, format=TensorFormat())

    def cut(image: NDArray[np.uint8], shown: str) -> tuple[NDArray[np.uint8], list[int]]:
        # The shown half, the seam's ramp and the filter's reach, generously.
        height, width = image.shape[:2]
        margin = 0.05 + seam_width / 2 + 0.04
        low, high = (0.0, 0.5 + margin) if shown in ("left", "top") else (0.5 - margin, 1.0)
        rows, columns = (slice(None), slice(int(low * width), math.ceil(high * width)))
        if shown in ("top", "bottom"):
            rows, columns = (slice(int(low * height), math.ceil(high * height)), slice(None))
        return np.ascontiguousarray(image[rows, columns]), [rows.start or 0, columns.start or 0]

    opposite = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
    seen_original, original_origin = cut(original, opposite[MASKS[mask]])
    seen_edit, edit_origin = cut(edit, MASKS[mask])
    assert seen_original.size < original.size and seen_edit.size < edit.size
    pieces = piece_table(
        np.array([[seen_original.ctypes.data], [seen_edit.ctypes.data]], dtype=np.uint64),
        np.array([[seen_original.shape[:2]], [seen_edit.shape[:2]]], dtype=np.int32),
        origins=np.array([[original_origin], [edit_origin]], dtype=np.int32),
        image_sizes=np.array([[original.shape[:2]], [edit.shape[:2]]], dtype=np.int32),
    )
    parts = np.zeros_like(whole)
    mix(plan, pieces, None, out=parts, format=TensorFormat())
    np.testing.assert_array_equal(parts, whole)


def test_without_the_library_numpy_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(3)
    images = [pixels(generator, 50, 40) for _ in range(3)]
    bank = generator.integers(0, 256, (2, 30, 30, 3), dtype=np.uint8)
    box = np.array([[0.1, 0.2, 0.7, 0.6], [0, 0, 1, 1], [-0.1, -0.2, 0.5, 0.7]])
    plan = plan_of(
        3,
        (21, 17),
        box=box,
        mask=np.array([0, -1, 3], dtype=np.int8),
        flip=np.array([True, False, True]),
        fractal=np.array([1, -1, 0]),
        fractal_weight=np.array([0.2, 0, 0.3], dtype=np.float32),
    )
    results = []
    for available in (True, False):
        if not available:
            monkeypatch.setattr(native, "library", lambda: None)
        result = np.zeros((3, 3, 21, 17), dtype=np.float32)
        mix(plan, table(images, images), bank, out=result, format=TensorFormat())
        results.append(result)
    np.testing.assert_allclose(*results, atol=FLOAT32_TOLERANCE)


def test_mix_says_what_does_not_fit() -> None:
    box = np.array([[0.0, 0, 1, 1]])
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    plan = plan_of(1, (2, 2), box=box, mask=np.array([0], dtype=np.int8), fractal=np.array([0]))
    good = np.zeros((1, 3, 2, 2), dtype=np.float32)
    whole, none = table([image], [image]), table([NOTHING])
    for out in (
        np.zeros((1, 2, 2, 3), np.float32),
        np.zeros((1, 3, 2, 2)),
        np.zeros((1, 3, 2, 4), np.float32)[..., ::2],
    ):
        with pytest.raises(ConfigError, match="out must be contiguous float32 of shape"):
            mix(plan, whole, None, out=out, format=TensorFormat())
    with pytest.raises(ConfigError, match="every mixed row one of its original or edit"):
        mix(plan, none, None, out=good, format=TensorFormat())
    with pytest.raises(ConfigError, match=r"plan\.fractal must be below the bank's 0, found 0"):
        mix(plan, whole, None, out=good, format=TensorFormat())
    with pytest.raises(ConfigError, match=r"pieces must be \(2, 1\), .* found \(2, 2\)"):
        mix(plan, table([image] * 2), None, out=good, format=TensorFormat())
    with pytest.raises(ConfigError, match="threads must be at least 1"):
        mix(plan_of(1, (2, 2), box=box), whole, None, out=good, format=TensorFormat(), threads=0)
