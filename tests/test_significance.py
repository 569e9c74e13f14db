"""examples/significance.py: its tests against SciPy's, brute force and simulation, and what its sentences claim."""

import importlib
import itertools
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy import stats

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def significance() -> Iterator[ModuleType]:
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("significance")
    sys.path.remove(str(EXAMPLES))
    del sys.modules["significance"]


def test_bits_come_back(significance: ModuleType) -> None:
    draw = np.random.default_rng(1)
    for n in (1, 7, 8, 9, 906):
        right = draw.random(n) < 0.7
        text = significance.to_text(right)
        assert (significance.from_text(text, n) == right).all() and len(text) <= n / 6 + 4
    with pytest.raises(ValueError, match="114 bytes are not 1000 bits"):
        significance.from_text(text, 1000)


def test_two_methods_make_the_ordinary_paired_t_test(significance: ModuleType) -> None:
    draw = np.random.default_rng(2)
    for n in (2, 3, 5):
        plain, other = draw.normal(0.7, 0.02, n), draw.normal(0.72, 0.02, n)
        scores = {"all": {"vanilla": dict(enumerate(plain)), "other": dict(enumerate(other))}}
        found = significance.compare(scores, {}, "vanilla")["all", "other"]
        expected = stats.ttest_rel(other, plain)
        assert found.p_seeds == pytest.approx(expected.pvalue)
        assert found.interval == pytest.approx(tuple(expected.confidence_interval()))
        assert found.noise.freedom == n - 1 and found.comparisons == 1 and found.p_images is None


def test_the_noise_is_that_of_a_two_way_analysis_of_variance(significance: ModuleType) -> None:
    draw = np.random.default_rng(3)
    values = draw.normal(0.6, 0.02, (5, 3)) + draw.normal(0, 0.05, 3)  # seeds that are good for all methods
    scores = {f"m{row}": dict(enumerate(of)) for row, of in enumerate(values)}
    residual = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    found = significance.noise(scores)
    assert found.freedom == 8
    assert found.deviation == pytest.approx(math.sqrt((residual**2).sum() / 8))
    del scores["m4"][0], scores["m4"][2]  # a run of a single seed adds nothing
    assert significance.noise(scores).freedom == 6
    assert significance.noise({"a": {0: 0.5}, "b": {0: 0.6}}) is None


def test_the_test_over_images_is_mcnemars_and_brute_force(significance: ModuleType) -> None:
    draw = np.random.default_rng(4)
    for _ in range(20):
        differences = draw.integers(-1, 2, 200)
        wins, losses = int((differences == 1).sum()), int((differences == -1).sum())
        expected = stats.binomtest(wins, wins + losses).pvalue
        assert significance.images_p(differences) == pytest.approx(expected)
    for _ in range(20):
        differences = draw.integers(-3, 4, 11)
        every = np.array(list(itertools.product((-1, 1), repeat=11))) @ differences
        expected = float(np.mean(np.abs(every) >= abs(differences.sum())))
        assert significance.images_p(differences) == pytest.approx(expected)
    assert significance.images_p(np.zeros(10, np.int64)) == 1
    assert significance.images_p(np.ones(50_000, np.int64) * 5) == 0  # of many images, quickly


def test_holms_correction(significance: ModuleType) -> None:
    assert significance.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert significance.holm([0.6, 0.9]) == [1.0, 1.0] and significance.holm([]) == []
    draw = np.random.default_rng(5)
    wrong = sum(min(significance.holm(list(draw.random(7)))) < 0.05 for _ in range(4000))
    assert 0.035 < wrong / 4000 < 0.065


@pytest.mark.parametrize(("seeds", "freedom", "level"), [(3, 2, 0.05), (3, 14, 0.05 / 7), (5, 4, 0.01)])
def test_the_smallest_difference_is_found_four_times_out_of_five(
    seeds: int, freedom: int, level: float, significance: ModuleType
) -> None:
    error = 0.01
    difference = significance.smallest(error, freedom, level)
    draw = np.random.default_rng(6)
    means = draw.normal(difference, error, 20_000)
    errors = error * np.sqrt(draw.chisquare(freedom, 20_000) / freedom)
    found = np.mean(2 * stats.t.sf(np.abs(means) / errors, freedom) < level)
    assert found == pytest.approx(0.8, abs=0.015)


@pytest.mark.parametrize(("seeds", "deviations"), [(3, 3.4), (5, 2.3)])
def test_what_training_md_says_of_few_seeds(seeds: int, deviations: float, significance: ModuleType) -> None:
    noise = significance.Noise(0.01, 4 * (seeds - 1))  # of plain training and four methods
    found = significance.smallest(noise.of_difference(seeds), noise.freedom, 0.05 / 4)
    assert found / 0.01 == pytest.approx(deviations, abs=0.05)
    text = " ".join((EXAMPLES.parent / "docs/training.md").read_text(encoding="utf-8").split())
    assert "it is 3.4 standard deviations of a single run with three seeds, 2.3 with five." in text


def runs(
    draw: np.random.Generator, effects: dict[str, float], *, seeds: int = 3, images: int = 400, noise: float = 0.01
) -> tuple[dict[str, dict[str, dict[int, float]]], dict[str, dict[str, dict[int, np.ndarray]]]]:
    """Accuracies and right answers of methods with an effect each; images are of different difficulty."""
    difficulty = draw.normal(0, 1.5, images)
    scores: dict[str, dict[int, float]] = {}
    right: dict[str, dict[int, np.ndarray]] = {}
    for method, effect in effects.items():
        for seed in range(seeds):
            skill = 1.0 + 4 * (effect + draw.normal(0, noise))
            found = (difficulty + draw.normal(0, 1, images) < skill).astype(np.int64)
            scores.setdefault(method, {})[seed] = float(found.mean())
            right.setdefault(method, {})[seed] = found
    return {"all": scores}, {"all": right}


def test_methods_without_effect_are_seldom_called_better(significance: ModuleType) -> None:
    """At most one page in twenty claims anything if nothing helps."""
    draw = np.random.default_rng(7)
    claims = 0
    for _ in range(200):
        scores, right = runs(draw, dict.fromkeys(("vanilla", "a", "b", "c", "d"), 0.0))
        found = significance.compare(scores, right, "vanilla")
        claims += any(one.verdict in ("better", "worse") for one in found.values())
    assert claims / 200 < 0.08


def test_real_effects_are_found_and_named(significance: ModuleType) -> None:
    draw = np.random.default_rng(8)
    effects = {"vanilla": 0.0, "good": 0.25, "bad": -0.25, "same": 0.0}
    scores, right = runs(draw, effects, images=900)
    found = {method: one for (_, method), one in significance.compare(scores, right, "vanilla").items()}
    assert {method: one.verdict for method, one in found.items()} == {"good": "better", "bad": "worse", "same": "none"}
    good, same = significance.sentence(found["good"]), significance.sentence(found["same"])
    assert "better than vanilla" in good
    assert re.search(
        r"noise of 3 seeds \(paired t-test, p [<=] 0\.\d+\) and of 900 test images \(exact sign-flip", good
    )
    assert "no difference shown" in same and "paired t-test" in same and "better" not in same
    smallest = re.search(r"A true difference of (\d+\.\d) points would be found four times out of five", same)
    assert smallest and float(smallest[1]) == pytest.approx(100 * found["same"].smallest, abs=0.05)


def test_what_cannot_be_said_is_not_said(significance: ModuleType) -> None:
    draw = np.random.default_rng(9)
    scores, right = runs(draw, {"vanilla": 0.0, "other": 0.3}, seeds=1)
    one = significance.compare(scores, right, "vanilla")["all", "other"]
    assert one.verdict == "unknown" and one.p_images < 0.05
    assert "One seed says nothing about the noise of training" in significance.sentence(one)
    scores, _ = runs(draw, {"vanilla": 0.0, "other": 0.3})
    one = significance.compare(scores, {}, "vanilla")["all", "other"]  # an older record
    assert one.verdict == "unclear" and "not recorded" in significance.sentence(one)
    # Few images: seeds agree, but the images may be luck.
    right = {
        "all": {name: dict.fromkeys(range(3), np.arange(20) < count) for name, count in (("vanilla", 10), ("o", 12))}
    }
    scores = {"all": {name: {seed: float(np.mean(of[seed])) for seed in of} for name, of in right["all"].items()}}
    counts = {
        "all": {name: {seed: each.astype(np.int64) for seed, each in of.items()} for name, of in right["all"].items()}
    }
    one = significance.compare(scores, counts, "vanilla")["all", "o"]
    assert one.p_seeds < 0.05 <= one.p_images and one.verdict == "unclear"
    assert "not than that of 20 test images" in significance.sentence(one)
    assert significance.compare({"all": {"other": {0: 0.5}}}, {}, "vanilla") == {}


def test_one_seed_makes_whole_sentences(significance: ModuleType) -> None:
    draw = np.random.default_rng(9)
    for effect, expected in (
        (
            0.3,
            r"These networks do differ on these 400 test images \(exact sign-flip test, p [^)]*\); others from other",
        ),
        (0.0, r"The difference may also be luck of these 400 test images \(exact sign-flip test, p = 0\.\d+\)\.$"),
    ):
        scores, right = runs(draw, {"vanilla": 0.0, "other": effect}, seeds=1)
        assert re.search(
            expected, significance.sentence(significance.compare(scores, right, "vanilla")["all", "other"])
        )


def test_a_difference_that_only_the_correction_hides_says_so(significance: ModuleType) -> None:
    plain = {0: 0.600, 1: 0.610, 2: 0.605}
    noisy = {f"m{at}": {0: 0.600 + at / 500, 1: 0.609 - at / 500, 2: 0.606} for at in range(6)}
    better = {0: 0.614, 1: 0.614, 2: 0.613}
    found = significance.compare({"all": {"vanilla": plain, "better": better, **noisy}}, {}, "vanilla")
    one = found["all", "better"]
    assert one.verdict == "none" and one.interval[0] > 0 and one.alone and one.comparisons == 7
    assert (
        "no difference shown. Alone it would be significant at the 5 % level; after the correction for 7 comparisons "
        "it is not larger than the noise of 3 seeds (paired t-test, p = "
    ) in significance.sentence(one)
    other = found["all", "m0"]
    assert not other.alone and "no difference shown. It is not larger than" in significance.sentence(other)


def test_the_correction_is_for_what_has_several_seeds(significance: ModuleType) -> None:
    scores = {"a": {"vanilla": {0: 0.5, 1: 0.52}, "x": {0: 0.55, 1: 0.56}, "y": {0: 0.5}}}
    scores["b"] = {"vanilla": {0: 0.5}, "x": {0: 0.6}}
    found = significance.compare(scores, {}, "vanilla")
    one = found["a", "x"]
    assert len(found) == 3 and one.comparisons == 1 and one.methods == 2
    assert one.p_seeds == pytest.approx(stats.ttest_rel([0.55, 0.56], [0.5, 0.52]).pvalue)
    error = one.noise.of_difference(2)
    assert one.smallest == pytest.approx(significance.smallest(error, 1, 0.05))


def test_no_more_than_100_points_is_claimed(significance: ModuleType) -> None:
    scores = {"all": {"vanilla": {0: 0.3, 1: 0.5}, "other": {0: 0.45, 1: 0.95}}}
    one = significance.compare(scores, {}, "vanilla")["all", "other"]
    assert one.interval == (-1, 1) and one.smallest > 1 and one.blind
    text = significance.sentence(one)
    assert "could not have found any difference" in text and "needs more seeds" in text
    assert "A true difference of" not in text


def test_seeds_that_do_not_vary_are_no_proof(significance: ModuleType) -> None:
    """Two seeds of few images can give the same difference by luck."""
    flips = np.arange(200)
    right = {"vanilla": dict.fromkeys(range(3), flips < 100), "same": dict.fromkeys(range(3), flips < 100)}
    right["better"] = dict.fromkeys(range(3), flips < 130)
    scores = {"all": {name: {seed: float(of[seed].mean()) for seed in of} for name, of in right.items()}}
    counts = {"all": {name: {seed: of[seed].astype(np.int64) for seed in of} for name, of in right.items()}}
    found = significance.compare(scores, counts, "vanilla")
    same, better = found["all", "same"], found["all", "better"]
    assert better.p_images < 0.05 and better.verdict == "unclear" and not better.uneven
    assert "all 3 seeds gave the same difference" in significance.sentence(better)
    assert same.verdict == "none" and "A true difference of 0.0" not in significance.sentence(same)
    assert "All seeds gave the same, so they do not tell" in significance.sentence(same)


def test_numbers_have_nouns(significance: ModuleType) -> None:
    assert [significance.counted(number, "run") for number in (0, 1, 2, 1000)] == [
        "0 runs",
        "1 run",
        "2 runs",
        "1,000 runs",
    ]


def test_a_method_with_wild_seeds_is_not_called_better(significance: ModuleType) -> None:
    steady = {f"m{number}": {seed: 0.6 + 0.001 * ((seed * number) % 3) for seed in range(3)} for number in range(12)}
    scores = {"all": {"vanilla": {0: 0.6, 1: 0.601, 2: 0.6}, **steady, "wild": {0: 0.60, 1: 0.75, 2: 0.68}}}
    one = significance.compare(scores, {}, "vanilla")["all", "wild"]
    assert one.p_seeds < 0.05 and one.uneven and one.verdict == "unclear"
    assert "its own seeds differ more" in significance.sentence(one) or "own seeds" in significance.sentence(one)
    assert not significance.compare(scores, {}, "vanilla")["all", "m3"].uneven
