"""Is a difference between two ways of training larger than noise? Tests for few seeds and many test images.

Scores differ by luck, too: that of the seed, and that of the test images. Each has its own test here, and both tests
compare pairs: the same seeds, the same test images.

    seeds     A paired t-test over seeds. Its variance is pooled over all methods of a training set: the residual of the
              additive model accuracy = method + seed, with (methods - 1)(seeds - 1) degrees of freedom if no run is
              missing. With two methods this is the ordinary paired t-test. It assumes that the runs of all methods vary
              alike.
    images    An exact sign-flip test over test images: if a method makes no difference, then on each image the two
              methods' answers, of all seeds together, can be exchanged. Its p-value is the share of all exchanges that
              give a difference at least as large as the one found. With one seed this is the exact McNemar test.

Holm's correction is for the number of comparisons (Holm, "A Simple Sequentially Rejective Multiple Test Procedure",
1979).
"""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.errors import MissingDependencyError

try:
    from scipy import optimize, signal, stats
except ImportError as error:
    raise MissingDependencyError(
        "the tests of a comparison need SciPy; run `pip install 'dali-diffusemix[train]'`."
    ) from error

LEVEL = 0.05
POWER = 0.8


def to_text(right: NDArray[np.bool_]) -> str:
    """Return (n,) booleans as text, a bit each."""
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def from_text(text: str, n: int) -> NDArray[np.bool_]:
    """Return the (n,) booleans that `to_text` wrote. Raises ValueError if the text is not of n booleans."""
    found = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    if len(found) != -(-n // 8):
        raise ValueError(f"{len(found)} bytes are not {n} bits")
    return np.unpackbits(found, count=n).astype(bool)


@dataclass(frozen=True)
class Noise:
    """How much single runs vary."""

    deviation: float  # standard deviation of a run, apart from its method and its seed
    freedom: int  # degrees of freedom

    def of_difference(self, seeds: int) -> float:
        """Standard error of the mean difference between two methods over paired seeds."""
        return self.deviation * math.sqrt(2 / seeds)


def noise(scores: Mapping[str, Mapping[int, float]]) -> Noise | None:
    """Return the noise of runs, pooled over methods, or None if they do not tell.

    Args:
        scores: By method and seed.
    """
    cells = [(method, seed) for method, of in scores.items() for seed in of]
    methods, seeds = list(scores), sorted({seed for _, seed in cells})
    design = np.zeros((len(cells), len(methods) + len(seeds)))
    for row, (method, seed) in enumerate(cells):
        design[row, methods.index(method)] = design[row, len(methods) + seeds.index(seed)] = 1
    values = np.array([scores[method][seed] for method, seed in cells])
    fitted, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    freedom = len(cells) - int(rank)
    if freedom < 1:
        return None
    residual = values - design @ fitted
    return Noise(math.sqrt(float(residual @ residual) / freedom), freedom)


def seeds_p(mean: float, error: float, freedom: int) -> float:
    """Return the two-sided p-value of a mean difference with its standard error."""
    if error < 1e-12:  # runs that do not vary at all, such as of two images
        return 1.0 if abs(mean) < 1e-12 else 0.0
    return float(2 * stats.t.sf(abs(mean) / error, freedom))


def images_p(differences: NDArray[np.int64]) -> float:
    """Return the two-sided p-value of the exact sign-flip test.

    Args:
        differences: (images,) how often one method is right, less how often the other is; over seeds, and over
            conditions if the images were scored in several.
    """
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    if not len(sizes):
        return 1.0
    # Images with a difference of ±s move the sum by s, times a binomial number of signs.
    parts = []
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        part = np.zeros(size * count + 1)
        part[::size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        parts.append(part)
    law = np.maximum(reduce(signal.fftconvolve, parts), 0)
    total = int(sizes @ counts)
    sums = np.abs(2 * np.arange(total + 1) - total)
    return min(float(law[sums >= abs(int(differences.sum()))].sum()), 1.0)


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values after Holm's correction for their number."""
    order = np.argsort(values, kind="stable")
    corrected, least = [0.0] * len(values), 0.0
    for place, at in enumerate(order.tolist()):
        least = max(least, min((len(values) - place) * values[at], 1.0))
        corrected[at] = least
    return corrected


def smallest(error: float, freedom: int, level: float = LEVEL, power: float = POWER) -> float:
    """Return the true difference that a two-sided t-test of a level finds with a probability of `power`.

    Args:
        error: Standard error of the difference.
        freedom: Degrees of freedom of the error.
    """
    if error < 1e-12:
        return 0.0
    # Averaged over estimates of the error, at even steps of their probability: SciPy's nct is NaN for large shifts.
    estimates = np.sqrt(stats.chi2.ppf((np.arange(4000) + 0.5) / 4000, freedom) / freedom)
    limit = float(stats.t.isf(level / 2, freedom))

    def found(shift: float) -> float:
        return (
            float(np.mean(stats.norm.sf(limit * estimates - shift) + stats.norm.cdf(-limit * estimates - shift)))
            - power
        )

    high = limit + 1.0
    while found(high) < 0:
        high *= 2
    return float(error * optimize.brentq(found, 0.0, high))


@dataclass(frozen=True)
class Comparison:
    """A method against the baseline: same training set, seeds and test images."""

    method: str
    baseline: str
    differences: tuple[float, ...]  # of accuracy, method less baseline, for each seed that both have
    images: int | None  # that both were tested on; None: what they got right is not recorded
    methods: int  # over which the variance is pooled: those with two seeds or more
    comparisons: int  # that p_seeds is corrected for: those with two seeds or more
    noise: Noise | None  # None: one seed, which does not tell
    p_seeds: float | None  # corrected
    p_images: float | None  # corrected

    @property
    def mean(self) -> float:
        return math.fsum(self.differences) / len(self.differences)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the difference over seeds, of this comparison by itself, within -1 to 1."""
        if self.noise is None:
            return None
        half = self.noise.of_difference(len(self.differences)) * float(stats.t.isf(LEVEL / 2, self.noise.freedom))
        return max(self.mean - half, -1.0), min(self.mean + half, 1.0)

    @property
    def alone(self) -> bool:
        """Whether the test over seeds is significant before the correction: the interval excludes zero."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)

    @property
    def smallest(self) -> float | None:
        """The true difference that the test over seeds finds four times out of five, after the correction."""
        if self.noise is None:
            return None
        error = self.noise.of_difference(len(self.differences))
        return smallest(error, self.noise.freedom, LEVEL / self.comparisons)

    @property
    def blind(self) -> bool:
        """Whether no difference would be found four times out of five: accuracies differ by 100 points at most."""
        return self.smallest is not None and self.smallest > 1

    @property
    def uneven(self) -> bool:
        """Whether its seeds differ more than the pooled noise explains, so that the pooled test is too kind to it."""
        if self.noise is None or len(self.differences) < 3 or self.noise.freedom < len(self.differences):
            return False
        if self.still:
            return False
        spread = float(np.var(self.differences, ddof=1)) / (2 * self.noise.deviation**2)
        freedom = len(self.differences) - 1
        return bool(spread * freedom > stats.chi2.isf(0.01, freedom))

    @property
    def still(self) -> bool:
        """Whether all seeds gave the same difference, so that there is no noise to compare with."""
        return self.noise is not None and self.noise.deviation < 1e-12

    @property
    def verdict(self) -> str:
        """Better, worse, unclear (images may be luck, or seeds vary unevenly or not), none or unknown (one seed)."""
        if self.p_seeds is None:
            return "unknown"
        if self.p_seeds >= LEVEL:
            return "none"
        if self.p_images is None or self.p_images >= LEVEL or self.uneven or self.still:
            return "unclear"
        return "better" if self.mean > 0 else "worse"


def compare(
    scores: Mapping[str, Mapping[str, Mapping[int, float]]],
    right: Mapping[str, Mapping[str, Mapping[int, NDArray[np.int64]]]],
    baseline: str,
) -> dict[tuple[str, str], Comparison]:
    """Compare every method with the baseline, on every training set; p-values are corrected for all of them together.

    Args:
        scores: Accuracy by training set, method and seed.
        right: (images,) how often each test image was right, for the same runs; runs may be missing.
        baseline: The method that the others are compared with.

    Returns:
        Comparisons by training set and method. Methods without a seed of the baseline's are missing.
    """
    plain: dict[tuple[str, str], Comparison] = {}
    pooled = {name: noise(of) for name, of in scores.items()}
    for name, of in scores.items():
        for method in of:
            seeds = sorted(of[method].keys() & of.get(baseline, {}).keys())
            if method == baseline or not seeds:
                continue
            differences = tuple(of[method][seed] - of[baseline][seed] for seed in seeds)
            pairs = [(right.get(name, {}).get(one, {}).get(seed)) for seed in seeds for one in (method, baseline)]
            known = [pair for pair in pairs if pair is not None]
            images = len(known[0]) if len(known) == len(pairs) and len({len(one) for one in known}) == 1 else None
            found = pooled[name] if len(seeds) > 1 else None
            p_seeds = p_images = None
            if found is not None:
                mean = math.fsum(differences) / len(seeds)
                p_seeds = seeds_p(mean, found.of_difference(len(seeds)), found.freedom)
            if images is not None:
                p_images = images_p(np.sum(known[::2], axis=0) - np.sum(known[1::2], axis=0))
            several = sum(len(runs) > 1 for runs in of.values())
            plain[name, method] = Comparison(
                method, baseline, differences, images, several, 0, found, p_seeds, p_images
            )
    return _corrected(plain)


def _corrected(plain: Mapping[tuple[str, str], Comparison]) -> dict[tuple[str, str], Comparison]:
    corrected: dict[str, dict[tuple[str, str], float]] = {}
    for field in ("p_seeds", "p_images"):
        known = {at: getattr(one, field) for at, one in plain.items() if getattr(one, field) is not None}
        corrected[field] = dict(zip(known, holm(list(known.values())), strict=True))
    tested = len(corrected["p_seeds"])
    return {
        at: replace(one, comparisons=tested, **{field: of.get(at) for field, of in corrected.items()})
        for at, one in plain.items()
    }


def points(value: float) -> str:
    """Return a difference of accuracies in percentage points, with its sign."""
    text = f"{100 * value:+.1f}"
    return "0.0" if text == "-0.0" else text.replace("-", "\N{MINUS SIGN}")


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as "1 seed" or "906 images"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}" if value < 0.1 else f"p = {value:.2f}"


def sentence(one: Comparison) -> str:
    """Say what a comparison shows, in plain words, with its tests and their n. p-values are corrected."""
    seeds = len(one.differences)
    by_images = also = ""
    if one.images is not None and one.p_images is not None:
        by_images = f"{counted(one.images, 'test image')} (exact sign-flip test, {_p(one.p_images)})"
        if one.p_images < LEVEL:
            also = f" These networks do differ on these {by_images}; others from other seeds may not."
    if one.noise is None or one.p_seeds is None:
        more = also or (f" The difference may also be luck of these {by_images}." if by_images else "")
        return f"{points(one.mean)} points. One seed says nothing about the noise of training.{more}"
    assert one.interval is not None and one.smallest is not None
    by_seeds = f"{seeds} seeds (paired t-test, {_p(one.p_seeds)})"
    low, high = map(points, one.interval)
    start = f"{points(one.mean)} points, 95 % interval {low} to {high}:"
    match one.verdict:
        case "better" | "worse":
            return (
                f"{start} {one.verdict} than {one.baseline}. The difference is larger than the noise of {by_seeds} and "
                f"of {by_images}."
            )
        case "unclear" if one.uneven:
            return (
                f"{start} unclear. It is larger than the pooled noise of {by_seeds}, but this method's own seeds "
                "differ more than that; more seeds would tell."
            )
        case "unclear" if one.p_images is None or one.p_images >= LEVEL:
            why = f"not than that of {by_images}" if by_images else "which test images were right is not recorded"
            return f"{start} unclear. It is larger than the noise of {by_seeds}, but {why}."
        case "unclear":
            return (
                f"{start} unclear. It is larger than the luck of {by_images}, but all {seeds} seeds gave the same "
                "difference, so that there is no noise of seeds to compare with; more seeds would tell."
            )
    why = "It"
    if one.alone:
        why = (
            "Alone it would be significant at the 5 % level; after the correction for "
            f"{counted(one.comparisons, 'comparison')} it"
        )
    return f"{start} no difference shown. {why} is not larger than the noise of {by_seeds}.{also} {_would_find(one)}"


def _would_find(one: Comparison) -> str:
    """Say which true difference a comparison of several seeds finds."""
    assert one.smallest is not None
    if one.still:
        return "All seeds gave the same, so they do not tell which true difference would be found."
    if one.blind:
        return (
            "This comparison could not have found any difference four times out of five, not even one of 100 points; "
            "it needs more seeds."
        )
    return (
        f"A true difference of {100 * one.smallest:.1f} points would be found four times out of five; smaller ones "
        "stay open."
    )
