"""Philox against its published vectors, draws by address, and the permutation's properties."""

import re
from collections import Counter
from importlib import resources
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

import dali_diffusemix
from dali_diffusemix.base import native, philox
from dali_diffusemix.base.philox import CROP, Permutation, below, draw, philox4x32, uniform
from dali_diffusemix.errors import ConfigError

# Random123's kat_vectors, philox 4x32 10.
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_published_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    np.testing.assert_array_equal(philox4x32(counter, key), expected)


def test_vectorised_over_any_leading_axes() -> None:
    counters = np.array([c for c, _, _ in KNOWN_ANSWERS]).reshape(3, 1, 4)
    keys = np.array([k for _, k, _ in KNOWN_ANSWERS]).reshape(3, 1, 2)
    np.testing.assert_array_equal(philox4x32(counters, keys)[:, 0], [e for _, _, e in KNOWN_ANSWERS])


@given(
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 2**32 - 1),
    indices=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=20),
    fields=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4),
)
def test_a_draw_depends_on_its_address_alone(seed: int, epoch: int, indices: list[int], fields: list[int]) -> None:
    together = draw(seed, epoch, indices, fields)
    assert together.shape == (len(fields), len(indices), 4)
    for f, field in enumerate(fields):
        for i, index in enumerate(indices):
            counter = [index & 0xFFFFFFFF, index >> 32, field, 0]
            np.testing.assert_array_equal(together[f, i], philox4x32(counter, [seed, epoch]))


def test_seed_and_epoch_do_not_alias() -> None:
    assert not np.array_equal(draw(1, 0, range(8), [0]), draw(0, 1, range(8), [0]))


@pytest.mark.parametrize(("seed", "epoch"), [(-1, 0), (2**32, 0), (0, -1), (0, 2**32)])
def test_a_seed_or_epoch_out_of_range_is_named(seed: int, epoch: int) -> None:
    with pytest.raises(ConfigError, match=r"(seed|epoch) must be at least 0 and below 2\*\*32, found"):
        draw(seed, epoch, [0], [0])


def test_uniform_is_uniform_on_the_half_open_interval() -> None:
    values = uniform(draw(7, 3, np.arange(50_000), [0])[0]).ravel()
    assert values.min() >= 0 and values.max() < 1
    assert kstest(values, "uniform").pvalue > 1e-3
    assert uniform(np.array([0xFFFFFFFF], dtype=np.uint32))[0] < 1


@given(bound=st.integers(1, 2**31), words=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_below_is_the_high_half_of_the_product(bound: int, words: list[int]) -> None:
    expected = [word * bound >> 32 for word in words]
    np.testing.assert_array_equal(below(np.array(words, dtype=np.uint32), bound), expected)


@given(length=st.integers(1, 3000), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 1000))
def test_a_permutation_holds_each_index_once(length: int, seed: int, epoch: int) -> None:
    order = Permutation(length, seed=seed, epoch=epoch)(np.arange(length))
    np.testing.assert_array_equal(np.sort(order), np.arange(length))


@given(length=st.integers(1, 2**40), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_any_position_can_be_looked_up_alone(length: int, seed: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=8, unique=True))
    permutation = Permutation(length, seed=seed, epoch=5)
    together = permutation(positions)
    assert len(set(together.tolist())) == len(positions)
    assert together.tolist() == [int(permutation([position])[0]) for position in positions]


@pytest.mark.slow
@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_all_orders_of_a_few_are_equally_likely(length: int) -> None:
    keys = [(seed, epoch) for seed in range(30) for epoch in range(40)]
    seen = Counter(tuple(Permutation(length, seed=s, epoch=e)(np.arange(length)).tolist()) for s, e in keys)
    counts = [seen[order] for order in permutations(range(length))]
    assert chisquare(counts).pvalue > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("length", [16, 100, 257])
def test_every_index_is_equally_likely_at_every_position_and_after_every_other(length: int) -> None:
    at_position = np.zeros((length, length))
    step = np.zeros(length)
    for seed in range(400):
        order = Permutation(length, seed=seed, epoch=0)(np.arange(length))
        at_position[np.arange(length), order] += 1
        np.add.at(step, (order[1:] - order[:-1]) % length, 1)
    assert chisquare(at_position.ravel()).pvalue > 1e-3
    assert chisquare(step[1:]).pvalue > 1e-3


def test_positions_outside_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"positions must lie in \[0, 10\), found 3 to 10"):
        Permutation(10, seed=0, epoch=0)([3, 10])


# --- the register of streams ------------------------------------------------------------------------------------------


def test_no_two_streams_collide() -> None:
    """Whatever the number of a crop's tries and of ranks, fields do not meet; flames have a key of their own."""
    single = (philox.MIXED, philox.EDIT, philox.MASK, philox.FRACTAL, philox.WEIGHT, philox.FLIP, philox.PERMUTATION)
    fields = [range(field, field + 1) for field in single]
    fields += [range(philox.CROP, philox.BATCH_TRANSFORM), range(philox.BATCH_TRANSFORM, philox.PERMUTATION)]
    fields.sort(key=lambda field: field.start)
    assert all(one.stop <= following.start for one, following in pairwise(fields))
    assert fields[0].start >= 0 and fields[-1].stop <= 2**32
    assert 10**9 < philox.FLAME < 2**32  # no epoch


def test_all_draws_are_in_the_register() -> None:
    """Who draws is named there, with its constant: a new stream has to be added to both."""
    package = Path(dali_diffusemix.__file__).parent
    sources = {file.relative_to(package).as_posix(): file.read_text("utf-8") for file in package.rglob("*.py")}
    drawing = {name for name, text in sources.items() if re.search(r"\b(philox4x32|draw|Permutation)\(", text)}
    assert drawing - {"base/philox.py", "base/native.py"} == {
        "plan/batch.py",
        "plan/augment.py",  # by fields that it asks the batch for
        "plan/order.py",
        "mix/augment.py",
        "loading/batches.py",
        "fractals/flame.py",
    }
    augment = (resources.files("dali_diffusemix.kernels") / "augment.cuh").read_text("utf-8")
    assert re.findall(r"kNoiseField = ([^;]+);", augment) == ["1u << 30"] and philox.NOISE == 1 << 30
    flame = (resources.files("dali_diffusemix.kernels") / "flame.cpp").read_text("utf-8")
    assert re.findall(r"kKey = (\w+);", flame) == [f"0x{philox.FLAME:X}"]


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 1000, 65537, 2**33 + 5])
def test_the_library_draws_the_same(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """kernels/draw.cpp against NumPy, whose draws are checked against published answers above."""
    if native.library() is None:
        pytest.skip("the library was not built")
    generator = np.random.default_rng(length)
    indices = generator.integers(0, 2**62, 300)
    views, fields = generator.integers(0, 2**32, 300), [0, 3, CROP + 5, 2**32 - 1]
    positions = np.unique(generator.integers(0, length, 500))
    seed, epoch = (int(one) for one in generator.integers(0, 2**32, 2))

    def drawn() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        order = philox.Permutation(length, seed=seed, epoch=epoch)
        return philox.draw(seed, epoch, indices, fields, views), philox.draw(seed, epoch, 5, 7), order(positions)

    by_library = drawn()
    monkeypatch.setattr(native, "library", lambda: None)
    for one, other in zip(by_library, drawn(), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype
