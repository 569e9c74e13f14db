"""The CPU kernel on small images, where it copies pixels instead of resampling them: it is the specification."""

import ctypes
import mmap
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mixing_cases import Case, compare, pixels, rational_case, table, visible_pieces

from dali_diffusemix.base import native
from dali_diffusemix.mix import IMAGENET, TensorFormat
from dali_diffusemix.mix.call import mix
from dali_diffusemix.mix.tensor import DTYPES
from dali_diffusemix.plan import MASKS, EvalCrop, MixSpec, Planner, RandomCrop, TrainCrop

needs_library = pytest.mark.skipif(native.library() is None, reason="the CPU kernel was not built on this machine")

# Boxes are exact in images of 2^n pixels, so that pixels are copied; in images of 28, 33 and 35 some weights are not
# quite 1.
sides = st.one_of(st.sampled_from([1, 2, 4, 8, 16, 32]), st.sampled_from([28, 33, 35]), st.integers(1, 40))
sizes = st.one_of(sides.map(lambda side: (side, side)), st.tuples(sides, sides))


class OneEdit:
    """Every original has one edit."""

    def __init__(self, count: int) -> None:
        self.starts = np.arange(count + 1)

    def originals_of(self, edits: np.ndarray) -> np.ndarray:
        return edits


@st.composite
def small_cases(draw: st.DrawFn) -> Case:
    """Samples of one crop. Images have the sample's size half the time: only then all their pixels are copied."""
    out = draw(sizes)
    count = draw(st.integers(1, 8))
    image_sizes = st.one_of(st.just(out), sizes)
    originals = draw(st.lists(image_sizes, min_size=count, max_size=count))
    alike = draw(st.booleans())  # with their edits
    edits = originals if alike else draw(st.lists(image_sizes, min_size=count, max_size=count))
    bank = draw(image_sizes)
    crop = draw(
        st.one_of(
            st.builds(RandomCrop, st.just(out), padding=st.integers(0, 8), resize=st.one_of(st.none(), sides)),
            st.builds(EvalCrop, st.just(out), resize=st.sampled_from([None, min(out), max(out)])),
            st.just(TrainCrop(out)),
        )
    )
    planner = Planner(
        seed=draw(st.integers(0, 2**32 - 1)),
        crop=crop,
        sizes=np.array(originals, dtype=np.int32),
        mix=MixSpec(
            masks=draw(st.sampled_from([MASKS, *((mask,) for mask in MASKS)])),
            probability=draw(st.sampled_from([0.5, 1.0])),
            seam_width=draw(st.sampled_from([0.0, 20 / 256])),
            fractal_weight=draw(st.sampled_from([0.0, 0.2, 1.0])),
            order=draw(st.sampled_from(["mix_then_crop", "crop_then_mix"])),
        ),
        edits=OneEdit(count),
        fractals=3,
    )
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return Case(
        plan=planner.batch(0, np.arange(count)),
        originals=[pixels(generator, *size) for size in originals],
        edits=[pixels(generator, *size) for size in edits],
        bank=generator.integers(0, 256, (3, *bank, 3), dtype=np.uint8),
    )


@st.composite
def formats(draw: st.DrawFn) -> TensorFormat:
    dtype = draw(st.sampled_from(DTYPES))
    normalize = None if dtype == "uint8" else draw(st.sampled_from([None, IMAGENET]))
    return TensorFormat(dtype=dtype, channels_last=draw(st.booleans()), normalize=normalize)


def check(case: Case, format: TensorFormat, *, parts: bool = False, threads: int = 1) -> None:
    pieces, _kept = visible_pieces(case) if parts else (table(case.originals, case.edits), None)
    count = len(case.plan)
    result = np.full(format.shape(count, case.plan.output_size), 7, dtype=format.storage)
    mix(case.plan, pieces, case.bank, out=result, format=format, threads=threads)
    for row in range(count):
        compare(result[row], case.expected(row, format), format.dtype)


@needs_library
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(case=small_cases(), format=formats(), parts=st.booleans(), threads=st.integers(1, 3))
def test_small_samples_are_the_specification(case: Case, format: TensorFormat, parts: bool, threads: int) -> None:
    check(case, format, parts=parts, threads=threads)


@needs_library
@pytest.mark.slow
@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(case=small_cases(), format=formats(), parts=st.booleans(), threads=st.integers(1, 3))
def test_many_small_samples_are_the_specification(case: Case, format: TensorFormat, parts: bool, threads: int) -> None:
    check(case, format, parts=parts, threads=threads)


@needs_library
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("flips", [(False, False, False), (True, False, True), (True, True, False)])
@pytest.mark.parametrize("mask", range(-1, 4))
@pytest.mark.parametrize("side", [5, 15, 16, 17, 32, 40])
def test_copies_are_exact(side: int, mask: int, flips: tuple[bool, bool, bool], channels_last: bool) -> None:
    """Without a seam's ramp, a fractal's weight or a normalisation, bytes come out as they went in."""
    whole = [0.0, 0.0, 1.0, 1.0]
    size = (side, side)
    case = rational_case(box=whole, span=whole, out=size, sizes=(size, size, size), mask=mask, flips=flips)
    format = TensorFormat(dtype="uint8", channels_last=channels_last, normalize=None)
    result = np.zeros(format.shape(1, size), dtype=np.uint8)
    mix(case.plan, table(case.originals, case.edits), case.bank, out=result, format=format)
    np.testing.assert_array_equal(result[0], case.expected(0, format))


@needs_library
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("flip", [False, True])
def test_nothing_behind_a_piece_is_read(flip: bool, channels_last: bool) -> None:
    """Pieces that end where a page begins that must not be read: a read of it would end the process."""
    side, page = 16, mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    pages = np.frombuffer(memory, dtype=np.uint8)
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(pages.ctypes.data + page), ctypes.c_size_t(page), 0) == 0
    whole = [0.0, 0.0, 1.0, 1.0]
    case = rational_case(
        box=whole, span=whole, out=(side, side), sizes=((side, side),) * 3, mask=-1, flips=(flip, False, False)
    )
    last = pages[page - side * side * 3 : page].reshape(side, side, 3)
    last[:] = case.originals[0]
    check(replace(case, originals=[last]), TensorFormat(channels_last=channels_last))


@needs_library
@pytest.mark.parametrize("start", [-0.5, 0.5])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("left_right", [False, True])
def test_a_fractal_that_spans_half_the_sample(start: float, axis: int, left_right: bool) -> None:
    span = [0.0, 0.0, 1.0, 1.0]
    span[axis] = start
    for side in (20, 64):
        case = rational_case(
            box=[0.0, 0.0, 1.0, 1.0],
            span=span,
            out=(20, 20),
            sizes=((20, 20), (20, 20), (side, side)),
            mask=1,
            flips=(False, False, left_right),
            fractal_weight=0.5,
        )
        check(case, TensorFormat())


@needs_library
def test_more_geometries_than_a_thread_remembers() -> None:
    """Crops at some hundred places, each of them twice."""
    count, size = 400, (9, 9)
    generator = np.random.default_rng(5)
    planner = Planner(
        seed=0,
        crop=RandomCrop(size, padding=4),
        sizes=np.tile(np.array([32, 64], dtype=np.int32), (count, 1)),
        mix=MixSpec(probability=1),
        edits=OneEdit(count),
        fractals=3,
    )
    images = [pixels(generator, 32, 64) for _ in range(count)]
    bank = generator.integers(0, 256, (3, 32, 64, 3), dtype=np.uint8)
    plan = planner.batch(0, np.arange(count))
    check(Case(plan=plan, originals=images, edits=images[::-1], bank=bank), TensorFormat())
