"""Cases for tests of the mix: random plans, ragged images and what the specification makes of them."""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from dali_diffusemix.mix import TensorFormat
from dali_diffusemix.mix.call import piece_table
from dali_diffusemix.mix.pixel import encode, mixed_image
from dali_diffusemix.plan import BatchPlan, visible_parts
from dali_diffusemix.plan.augment import no_operations

NOTHING = np.zeros((0, 0, 3), dtype=np.uint8)

# The kernel's sums differ from NumPy's in their order only. Values are below 3 in size after normalisation (255
# before), a sample adds at most a few hundred products: float32 gives errors of some 1e-6 relative.
FLOAT32_TOLERANCE = 2e-5


def pixels(generator: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    return generator.integers(0, 256, (height, width, 3), dtype=np.uint8)


def plan_of(
    count: int,
    size: tuple[int, int],
    *,
    box: NDArray[np.float64],
    span: NDArray[np.float64] | None = None,
    mask: NDArray[np.int8] | None = None,
    flip: NDArray[np.bool_] | None = None,
    fractal: NDArray[np.int64] | None = None,
    fractal_flip: NDArray[np.bool_] | None = None,
    fractal_weight: NDArray[np.float32] | None = None,
    seam_width: float = 0.0,
    operations: NDArray[np.void] | None = None,
) -> BatchPlan:
    mask = np.full(count, -1, dtype=np.int8) if mask is None else mask
    return BatchPlan(
        epoch=0,
        index=np.arange(count),
        view=np.zeros(count, dtype=np.int64),
        original=np.arange(count),
        edit=np.where(mask >= 0, np.arange(count), -1),
        mask=mask,
        box=box,
        span=box if span is None else span,
        seam_width=seam_width,
        flip=np.zeros(count, dtype=np.bool_) if flip is None else flip,
        fractal=np.full(count, -1) if fractal is None else fractal,
        fractal_flip=np.zeros((count, 2), dtype=np.bool_) if fractal_flip is None else fractal_flip,
        fractal_weight=np.zeros(count, dtype=np.float32) if fractal_weight is None else fractal_weight,
        operations=no_operations(count) if operations is None else operations,
        output_size=size,
    )


def table(originals: list[NDArray[np.uint8]], edits: list[NDArray[np.uint8]] | None = None) -> NDArray[np.void]:
    """The piece table of whole images; without edits no row is mixed."""
    both = [originals, [NOTHING] * len(originals) if edits is None else edits]
    data = np.array([[image.ctypes.data if image.size else 0 for image in images] for images in both], dtype=np.uint64)
    return piece_table(data, np.array([[image.shape[:2] for image in images] for images in both], dtype=np.int32))


def compare(result: NDArray[np.generic], expected: NDArray[np.generic], dtype: str) -> None:
    if dtype == "uint8":
        assert np.abs(result.astype(int) - expected.astype(int)).max() <= 1
        return
    if dtype == "bfloat16":
        result, expected = ((a.astype(np.uint32) << 16).view(np.float32) for a in (result, expected))
    # Half and bfloat16 may fall to either neighbour: one unit in the last place, 11 and 8 bits.
    relative = {"float32": 1e-6, "float16": 2**-10, "bfloat16": 2**-7}[dtype]
    np.testing.assert_allclose(
        result.astype(np.float64), expected.astype(np.float64), rtol=relative, atol=FLOAT32_TOLERANCE
    )


@dataclass
class Case:
    """A batch to mix."""

    plan: BatchPlan
    originals: list[NDArray[np.uint8]]
    edits: list[NDArray[np.uint8]]  # NOTHING where a row is not mixed
    bank: NDArray[np.uint8]

    def mixed(self, row: int) -> NDArray[np.float32]:
        """What the specification makes of a row, (height, width, 3) in [0, 255]."""
        edit = self.edits[row] if self.plan.mask[row] >= 0 else None
        fractal = self.bank[self.plan.fractal[row]] if self.plan.fractal[row] >= 0 else None
        return mixed_image(self.plan, row, self.originals[row], edit, fractal)

    def expected(self, row: int, format: TensorFormat) -> NDArray[np.generic]:
        """The same as the tensor has it."""
        return encode(self.mixed(row), format)


def random_case(
    generator: np.random.Generator,
    count: int,
    out: tuple[int, int],
    largest: int,
    *,
    seam_width: float = 0.0,
    own_span: bool = False,
) -> Case:
    """Images of up to `largest` pixels a side, some rows not mixed, some without a fractal, crops on any side."""
    originals = [pixels(generator, *generator.integers(1, largest + 1, 2)) for _ in range(count)]
    mask = generator.integers(-1, 4, count).astype(np.int8)
    edits = [pixels(generator, *generator.integers(1, largest + 1, 2)) if m >= 0 else NOTHING for m in mask]
    bank = generator.integers(0, 256, (3, *generator.integers(1, 50, 2), 3), dtype=np.uint8)
    # Boxes from a thousandth of the image to more than all of it, leaving it on any side.
    extent = np.exp(generator.uniform(np.log(1e-3), np.log(2), (count, 2)))
    box = np.concatenate([generator.uniform(-0.3, 0.9, (count, 2)), extent], axis=1)
    fractal = np.where(mask >= 0, generator.integers(-1, 3, count), -1)
    plan = plan_of(
        count,
        out,
        box=box,
        span=np.tile([0.0, 0, 1, 1], (count, 1)) if own_span else None,
        mask=mask,
        flip=generator.random(count) < 0.5,
        fractal=fractal,
        fractal_flip=generator.random((count, 2)) < 0.5,
        fractal_weight=np.where(fractal >= 0, generator.random(count), 0).astype(np.float32),
        seam_width=seam_width,
    )
    return Case(plan=plan, originals=originals, edits=edits, bank=bank)


@st.composite
def rational_cases(draw: st.DrawFn) -> Case:
    """One sample whose box and span are fractions: centres often lie exactly on an edge, a seam or between pixels."""

    def box() -> list[float]:
        sides = []
        for _ in range(2):
            denominator = draw(st.integers(1, 200))
            extent = Fraction(draw(st.integers(1, 2 * denominator)), denominator)
            start = Fraction(draw(st.integers(-2 * denominator, 2 * denominator)), denominator)
            sides.append((float(start), float(extent)))
        return [sides[0][0], sides[1][0], sides[0][1], sides[1][1]]

    sides = st.tuples(st.integers(1, 200), st.integers(1, 200))
    crop = box()
    return rational_case(
        box=crop,
        span=draw(st.sampled_from([crop, [0.0, 0.0, 1.0, 1.0], box()])),
        out=draw(st.tuples(st.integers(1, 64), st.integers(1, 64))),
        sizes=(draw(sides), draw(sides), draw(sides)),
        mask=draw(st.integers(-1, 3)),
        seam_width=draw(st.sampled_from([0.0, 1 / 7, 20 / 256, 1.0])),
        flips=draw(st.tuples(st.booleans(), st.booleans(), st.booleans())),
        fractal_weight=draw(st.sampled_from([0.0, 0.2, 1.0])),
    )


def rational_case(
    *,
    box: list[float],
    span: list[float],
    out: tuple[int, int],
    sizes: tuple[tuple[int, int], ...],
    mask: int,
    seam_width: float = 0.0,
    flips: tuple[bool, bool, bool] = (False, False, False),
    fractal_weight: float = 0.0,
) -> Case:
    """One sample; `sizes` are of the original, the edit and the fractal, `flips` the sample's and the fractal's."""
    original, edit, fractal = (pixels(np.random.default_rng(7), *size) for size in sizes)
    plan = plan_of(
        1,
        out,
        box=np.array([box]),
        span=np.array([span]),
        mask=np.array([mask], dtype=np.int8),
        flip=np.array([flips[0]]),
        fractal=np.array([0 if fractal_weight else -1]),
        fractal_flip=np.array([flips[1:]]),
        fractal_weight=np.array([fractal_weight], dtype=np.float32),
        seam_width=seam_width,
    )
    return Case(plan=plan, originals=[original], edits=[edit if mask >= 0 else NOTHING], bank=fractal[None])


def two_thirds(*, fractal_weight: float = 0.0) -> Case:
    """A box of start and extent 2/3: relative to the image the fourth centre is 1, in its 100 pixels below 100."""
    box = [2 / 3, 0.0, 2 / 3, 1.0]
    sizes = ((100, 20), (45, 20), (30, 30))
    span = [0.0, 0.0, 1.0, 1.0]  # a fractal all over the crop
    return rational_case(box=box, span=span, out=(7, 7), sizes=sizes, mask=1, fractal_weight=fractal_weight)


def visible_pieces(case: Case) -> tuple[NDArray[np.void], list[NDArray[np.uint8]]]:
    """The piece table of what the windows of `visible_parts` cut from a case's images, and the pieces' pixels."""
    images = [case.originals, case.edits]
    sizes = np.array([[image.shape[:2] for image in source] for source in images], dtype=np.int32)
    windows = visible_parts(case.plan, sizes)
    data, kept = np.zeros(sizes.shape[:2], dtype=np.uint64), []
    for source, row in np.argwhere(windows.any(axis=2)):
        top, left, bottom, right = windows[source, row]
        kept.append(images[source][row][top:bottom, left:right].flatten())
        data[source, row] = kept[-1].ctypes.data
    return piece_table(data, windows[..., 2:] - windows[..., :2], origins=windows[..., :2], image_sizes=sizes), kept
