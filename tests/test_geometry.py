"""One geometry: specification, kernel and windows agree on centres, inside, seam and taps, to the last bit."""

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mixing_cases import Case, compare, rational_cases, table, two_thirds, visible_pieces

from dali_diffusemix.base import native
from dali_diffusemix.mix import TensorFormat
from dali_diffusemix.mix.call import PIECE, ROW, mix
from dali_diffusemix.mix.pixel import resample_weights
from dali_diffusemix.plan.geometry import Axis, centre, inside

FORMAT = TensorFormat(normalize=None)


def test_the_tables_are_laid_out_as_the_kernels_declare_them() -> None:
    """mix_pixel.cuh asserts the same numbers."""
    assert (PIECE.itemsize, ROW.itemsize) == (32, 88)


@settings(max_examples=100, deadline=None)
@given(
    start=st.fractions(-2, 2, max_denominator=200),
    extent=st.fractions(0, 2, max_denominator=200).filter(bool),
    sources=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    output=st.integers(1, 64),
)
def test_a_centre_inside_has_taps_in_an_image_of_any_size(
    start: object, extent: object, sources: tuple[int, int], output: int
) -> None:
    i = np.arange(output)
    box = float(start), float(extent)  # type: ignore[arg-type]
    shown = inside(centre(*box, i, output))
    for source in sources:
        axis = Axis(*box, output, source)
        first, end = axis.taps(axis.source_centre(i[shown]))
        assert (first >= 0).all() and (end <= source).all() and (first < end).all()
        # So an original and its edit are seen at the same output pixels, whatever their sizes.
        assert np.array_equal(resample_weights(*box, output, source).any(axis=1), shown)


@pytest.mark.skipif(native.library() is None, reason="the CPU kernel was not built on this machine")
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(case=rational_cases())
@example(case=two_thirds())
@example(case=two_thirds(fractal_weight=0.2))
def test_specification_kernel_and_windows_agree(case: Case) -> None:
    whole, parts = (np.full(FORMAT.shape(1, case.plan.output_size), np.nan, dtype=np.float32) for _ in range(2))
    mix(case.plan, table(case.originals, case.edits), case.bank, out=whole, format=FORMAT)
    compare(whole[0], case.expected(0, FORMAT), "float32")
    pieces, kept = visible_pieces(case)
    mix(case.plan, pieces, case.bank, out=parts, format=FORMAT)
    del kept
    np.testing.assert_array_equal(parts.view(np.uint32), whole.view(np.uint32))


def test_a_centre_on_the_far_edge_is_outside_for_all() -> None:
    i = np.arange(7)
    t, axis = centre(2 / 3, 2 / 3, i, 7), Axis(2 / 3, 2 / 3, 7, 100)
    assert t[3] == 1 and axis.source_centre(i)[3] < 100
    for weight in (0.0, 0.2):
        sample = two_thirds(fractal_weight=weight).expected(0, FORMAT)
        assert sample[:, :3].all() and not sample[:, 3:].any()
