"""The outputs of compare.py that are looked at: a page of HTML, in one file, and a picture."""

import html
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from significance import LEVEL, Comparison, compare, counted, from_text, points, sentence

Result = Mapping[str, Any]

FITTED = 0.05  # training loss above which a network does not fit its training images yet
PALETTE = ("#2f6fbb", "#c8501e", "#3a8f5c", "#8a5bb5", "#b8860b", "#c2417f", "#2b98a4", "#7a6a58", "#6b7f1f", "#5566dd")
VERDICTS = {
    "better": ("better", "better"),
    "worse": ("worse", "worse"),
    "unclear": ("unclear", "unclear"),
    "none": ("none", "no difference shown"),
    "unknown": ("none", "one seed"),
}


@dataclass(frozen=True)
class Measure:
    """Something that is compared: an accuracy on one or several conditions of the test images."""

    name: str
    conditions: Callable[[Result], list[tuple[str, float]]]  # of a run: name in its `right`, and accuracy

    def score(self, one: Result) -> float | None:
        found = [top1 for _, top1 in self.conditions(one)]
        return statistics.fmean(found) if found else None

    def right(self, one: Result) -> NDArray[np.int64] | None:
        """(images,) in how many of the conditions each image was right; None if the run does not tell."""
        names = [name for name, _ in self.conditions(one)]
        of = one.get("right", {})
        if not names or any(name not in of for name in names):
            return None
        return np.sum([from_text(of[name], one["test_images"]) for name in names], axis=0, dtype=np.int64)


def _spoilt(one: Result) -> list[tuple[str, float]]:
    return [
        (f"{name} {level}", top1) for name, of in one.get("corrupted_top1", {}).items() for level, top1 in of.items()
    ]


CLEAN = Measure("test images", lambda one: [("clean", one["top1"])])
CORRUPTED = Measure("corrupted test images, mean of all corruptions", _spoilt)
ATTACKED = Measure(
    "test images under FGSM, mean of all strengths",
    lambda one: [(f"fgsm {level}", top1) for level, top1 in one["fgsm_top1"].items()],
)


def compared(results: Sequence[Result], measure: Measure, baseline: str) -> dict[tuple[str, str], Comparison]:
    """Return every comparison with the baseline, by training set and method."""
    scores: dict[str, dict[str, dict[int, float]]] = {}
    right: dict[str, dict[str, dict[int, NDArray[np.int64]]]] = {}
    for one in results:
        at, method, seed = one["images_per_class"], one["method"], one["seed"]
        score, of_images = measure.score(one), measure.right(one)
        if score is not None:
            scores.setdefault(at, {}).setdefault(method, {})[seed] = score
        if of_images is not None:
            right.setdefault(at, {}).setdefault(method, {})[seed] = of_images
    return compare(scores, right, baseline)


def _interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean over seeds."""
    if len(values) < 2:
        return None
    half = statistics.stdev(values) / math.sqrt(len(values)) * float(stats.t.isf(LEVEL / 2, len(values) - 1))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def _ordered(results: Iterable[Result], name: str) -> list[Any]:
    return list(dict.fromkeys(one[name] for one in results))


def _of_set(images: str) -> str:
    return "all images" if images == "all" else f"{images} image{'' if images == '1' else 's'} a class"


def _colours(methods: Sequence[str], baseline: str) -> dict[str, str]:
    others = [name for name in methods if name != baseline]
    return {name: PALETTE[place % len(PALETTE)] for place, name in enumerate(others)}


# --- HTML


def page(results: Sequence[Result], name: str, baseline: str) -> str:
    """Return the page of a comparison: one file without links.

    Args:
        results: The runs of a record.
        name: The recipe's name.
        baseline: The method that the others are compared with.
    """
    sets, methods = _ordered(results, "images_per_class"), _ordered(results, "method")
    clean = compared(results, CLEAN, baseline)
    colours = _colours(methods, baseline)
    body = [
        f"<header><h1>Does it help? <span>{html.escape(name)}</span></h1><p>{_facts(results, baseline)}</p></header>",
        _summary(clean, results, sets, baseline),
        _trained_too_briefly(results, sets, baseline),
        _noisy_baseline(results, sets, baseline),
        f"<section><h2>Accuracy on the test images</h2>{_verdicts(clean, results, sets, baseline)}</section>"
        if clean
        else "",
        _accuracies(results, sets, methods, baseline),
        _curves(results, sets, methods, colours),
    ]
    for title, measure in (("On corrupted test images", CORRUPTED), ("Under attack: FGSM", ATTACKED)):
        if found := compared(results, measure, baseline):
            body.append(
                f"<section><h2>{title}</h2><p>Accuracy on {measure.name}.</p>"
                f"{_summary(found, results, sets, baseline)}<details><summary>Every comparison</summary>"
                f"{_verdicts(found, results, sets, baseline)}</details></section>"
            )
    body += [_details(results, sets, methods), _cost(results, sets, methods), _reading(results, baseline)]
    style = Path(__file__).with_suffix(".css").read_text()
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>Does it help? {html.escape(name)}</title><style>{style}</style><main>{''.join(body)}</main></html>\n"
    )


def differences(results: Sequence[Result], baseline: str) -> str:
    """Return a Markdown table of the differences from the baseline, in points, and what they show; "" without methods.

    A row per method; a column per training set, then two for the last set: corrupted images and FGSM. A line below says
    what the intervals and labels are.
    """
    sets = _ordered(results, "images_per_class")
    methods = [name for name in _ordered(results, "method") if name != baseline]
    if not methods:
        return ""
    last = _of_set(sets[-1])
    measures = [(_of_set(images), images, CLEAN) for images in sets]
    measures += [(f"{last}, corrupted", sets[-1], CORRUPTED), (f"{last}, FGSM", sets[-1], ATTACKED)]
    found = {measure.name: compared(results, measure, baseline) for measure in (CLEAN, CORRUPTED, ATTACKED)}
    shown = [
        (head, images, found[measure.name])
        for head, images, measure in measures
        if measure is CLEAN or found[measure.name]
    ]
    absent = {
        images: f"{baseline} has no run yet" if _without(results, images, baseline) else "nothing to compare yet"
        for images in sets
    }
    lines = [f"| against {baseline} | {' | '.join(head for head, *_ in shown)} |", "| --- |" + " --- |" * len(shown)]
    for method in methods:
        cells = [_difference(of[at, method]) if (at, method) in of else absent[at] for _, at, of in shown]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _meaning(found)]) + "\n"


def _meaning(found: Mapping[str, Mapping[tuple[str, str], Comparison]]) -> str:
    """What the intervals and labels of `differences` are; comparisons by measure."""
    names = {CLEAN.name: "on clean images", CORRUPTED.name: "on corrupted images", ATTACKED.name: "under FGSM"}
    tested = {name: [one for one in of.values() if one.p_seeds is not None] for name, of in found.items()}
    groups = ", ".join(f"{counted(len(of), 'comparison')} {names[name]}" for name, of in tested.items() if of)
    if not groups:
        return "One seed gives no interval and does not show whether there is a difference."
    seeds = sorted({len(one.differences) for of in tested.values() for one in of})
    over = f"{seeds[0]} seeds" if len(seeds) == 1 else f"the {seeds[0]} to {seeds[-1]} seeds that both methods have"
    return (
        f"In brackets: the 95 % interval of the difference over {over}; its variance is that of all methods together, "
        "and it is not corrected, so it can exclude zero where no difference is shown. Better and worse: at the 5 % "
        f"level over seeds and over test images, after Holm's correction for {groups}, each of these groups by itself, "
        "over all training sets. Unclear: over seeds alone, or the method's own seeds vary more than those of all."
    )


def _difference(one: Comparison) -> str:
    between = " ({} to {})".format(*map(points, one.interval)) if one.interval else ""
    label = VERDICTS[one.verdict][1]
    return f"{points(one.mean)}{between}: {f'**{label}**' if one.verdict in ('better', 'worse') else label}"


def _facts(results: Sequence[Result], baseline: str) -> str:
    methods, seeds = _ordered(results, "method"), sorted({one["seed"] for one in results})
    others = len(methods) - (baseline in methods)
    tested = sorted({one["test_images"] for one in results})
    against = (
        f"{counted(others, 'method')} against {html.escape(baseline)}" if others else f"{html.escape(baseline)} alone"
    )
    images = " and ".join([*(f"{one:,}" for one in tested[:-1]), counted(tested[-1], "test image")])
    return (
        f"{against} &middot; {counted(len(results), 'run')}, {counted(len(seeds), 'seed')} &middot; "
        f"{images}, never used to choose anything"
    )


def _summary(
    found: Mapping[tuple[str, str], Comparison], results: Sequence[Result], sets: Sequence[str], baseline: str
) -> str:
    """Say in a line for each training set how many methods are better, worse, and neither."""
    lines = []
    for images in sets:
        of_set = [one for (at, _), one in found.items() if at == images]
        parts = [_counts(of_set)] if of_set else []
        if any(one.verdict == "none" and one.blind for one in of_set):
            parts.append("with so few seeds none could be found")
        parts += [html.escape(missing)] if (missing := _missing(found, results, images, baseline)) else []
        if parts:
            lines.append(f"<li><b>{_of_set(images).capitalize()}</b>: {'; '.join(parts)}.</li>")
    return f"<ul class=lead>{''.join(lines)}</ul>" if lines else "<p class=lead>There is nothing to compare yet.</p>"


def _counts(of_set: Sequence[Comparison]) -> str:
    """Say how many comparisons of a training set have which verdict."""
    verdicts, baseline = [one.verdict for one in of_set], html.escape(of_set[0].baseline)
    shown = {name: f"<b class={name}>{verdicts.count(name)} {name}</b>" for name in ("better", "worse", "unclear")}
    shown = {name: text for name, text in shown.items() if name in verdicts}
    none, unknown = verdicts.count("none"), verdicts.count("unknown")
    if unknown == len(verdicts):
        return "one seed, which cannot tell"
    if len(verdicts) == 1:
        method = html.escape(of_set[0].method)
        if none:
            return f"no difference of {method} from {baseline} is shown"
        if "unclear" in shown:
            return f"it is <b class=unclear>unclear</b> whether {method} differs from {baseline}"
        return f"{method} is <b class={verdicts[0]}>{verdicts[0]}</b> than {baseline}"
    if none == len(verdicts):
        return f"no difference from {baseline} is shown for any of {none} methods"
    said = [shown[name] for name in ("better", "worse") if name in shown]
    parts = [f"{' and '.join(said)} than {baseline}"] if said else []
    parts += [shown["unclear"]] if "unclear" in shown else []
    parts += [f"no difference{'' if said else f' from {baseline}'} shown for {none}"] if none else []
    parts += [f"{unknown} {'has' if unknown == 1 else 'have'} one seed, which cannot tell"] if unknown else []
    return f"of {len(verdicts)} methods, {'; '.join(parts)}"


def _missing(found: Mapping[tuple[str, str], Comparison], results: Sequence[Result], images: str, baseline: str) -> str:
    """Say what of a training set cannot be compared yet; "" if there is nothing like it."""
    if _without(results, images, baseline):
        return f"{baseline} has no run yet"
    names = [name for name in _ordered(results, "method") if name != baseline and (images, name) not in found]
    return f"nothing to compare yet for {', '.join(names)}" if names else ""


def _without(results: Sequence[Result], images: str, baseline: str) -> bool:
    """Whether the baseline has no run with a training set."""
    return not any((one["images_per_class"], one["method"]) == (images, baseline) for one in results)


def _trained_too_briefly(results: Sequence[Result], sets: Sequence[str], baseline: str) -> str:
    """Say where the baseline does not fit its training images, so that the comparison comes too early."""
    short = []
    for images in sets:
        of = [one for one in results if one["images_per_class"] == images and one["method"] == baseline]
        if of and (loss := statistics.fmean(one["last_loss"] for one in of)) > FITTED:
            short.append(f"{loss:.2f} with {_of_set(images)} after {counted(of[0]['updates'], 'update')}")
    if not short:
        return ""
    return (
        f"<p class=warning><b>Trained too briefly?</b> The training loss of {html.escape(baseline)} is still "
        f"{', '.join(short)}. A network that does not fit its training images yet seldom gains from harder ones: give "
        "it more updates before you decide.</p>"
    )


def _noisy_baseline(results: Sequence[Result], sets: Sequence[str], baseline: str) -> str:
    """Say where the baseline's runs vary more than those of the other methods, which the pooled tests do not know."""
    noisy = []
    for images in sets:
        scores: dict[str, list[float]] = {}
        for one in results:
            if one["images_per_class"] == images:
                scores.setdefault(one["method"], []).append(100 * one["top1"])
        variance = {method: (statistics.variance(of), len(of) - 1) for method, of in scores.items() if len(of) > 1}
        if baseline not in variance or len(variance) < 2:
            continue
        own, freedom = variance.pop(baseline)
        others = sum(count for _, count in variance.values())
        pooled = sum(one * count for one, count in variance.values()) / others
        if stats.f.sf(own / max(pooled, 1e-12), freedom, others) < 0.01:
            noisy.append(f"{own**0.5:.1f} points with {_of_set(images)} instead of {pooled**0.5:.1f}")
    if not noisy:
        return ""
    name = html.escape(baseline)
    return (
        f"<p class=warning><b>A noisy baseline?</b> The runs of {name} vary more than those of the other methods: "
        f"{', '.join(noisy)} (standard deviation over seeds). Every difference contains its noise, and the tests take "
        f"all methods to vary alike: there the differences are less sure than their p-values say. More seeds of {name} "
        "would tell.</p>"
    )


def _verdicts(
    found: Mapping[tuple[str, str], Comparison], results: Sequence[Result], sets: Sequence[str], baseline: str
) -> str:
    """Return every comparison with its sentence, by training set, and what cannot be compared yet."""
    blocks = []
    for images in sets:
        rows = [(method, one) for (at, method), one in found.items() if at == images]
        rows.sort(key=lambda row: -row[1].mean)
        reach = max((abs(end) for _, one in rows for end in (one.mean, *(one.interval or ()))), default=0.0) or 0.01
        items = []
        for method, one in rows:
            kind, label = VERDICTS[one.verdict]
            items.append(
                f"<li><div class=row><b>{html.escape(method)}</b>{_strip(one, reach, kind)}"
                f"<span class=number>{points(one.mean)}</span><span class='chip {kind}'>{label}</span></div>"
                f"<p>{html.escape(sentence(one))}</p></li>"
            )
        of = next(one for one in results if one["images_per_class"] == images)
        size = f"{counted(of['training_images'], 'image')}, {counted(of['updates'], 'update')}"
        blocks.append(f"<h3>{_of_set(images).capitalize()} <small>{size}</small></h3>")
        if items:
            blocks.append(f"<ul class=verdicts>{''.join(items)}</ul>")
        if missing := _missing(found, results, images, baseline):
            blocks.append(f"<p class=missing>{html.escape(missing[:1].upper() + missing[1:])}.</p>")
    return f"{_about(found)}{''.join(blocks)}"


def _about(found: Mapping[tuple[str, str], Comparison]) -> str:
    """Say what all p-values of a section have in common; "" if there are none."""
    noises = [one.noise for one in found.values() if one.noise is not None]
    seeds, images = len(noises), sum(one.p_images is not None for one in found.values())
    if not seeds and not images:
        return ""
    text = "p-values are two-sided"
    if seeds and images and seeds != images:
        text += f", after Holm's correction for {counted(seeds, 'comparison')} over seeds and {images} over images"
    elif max(seeds, images) > 1:
        text += f", after Holm's correction for {max(seeds, images)} comparisons"
    if seeds:
        *some, last = sorted({one.freedom for one in noises})
        text += f". The {'t-test has' if seeds == 1 else 't-tests have'} {''.join(f'{one} or ' for one in some)}"
        text += f"{counted(last, 'degree')} of freedom"
        if max(one.methods for one in found.values()) > 2:
            text += f": {'its' if seeds == 1 else 'their'} variance is pooled over the methods of a training set"
    return f"<p>{text}.</p>"


def _strip(one: Comparison, reach: float, kind: str) -> str:
    """Draw a difference and its interval on a scale from -reach to reach."""

    def x(value: float) -> float:
        return 60 + 56 * value / reach

    interval = one.interval
    bar = f"<path d='M{x(interval[0]):.1f} 9H{x(interval[1]):.1f}'/>" if interval else ""
    return (
        f"<svg class='strip {kind}' viewBox='0 0 120 18' aria-hidden=true><path class=zero d='M60 1V17'/>{bar}"
        f"<circle cx={x(one.mean):.1f} cy=9 r=4 /></svg>"
    )


def _scale(low: float, high: float, steps: int = 4) -> list[float]:
    """Return round ticks within a range."""
    span = max(high - low, 1e-9)
    raw = span / steps
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * one for one in (1, 2, 5, 10) if size * one >= raw)
    return [round(step * tick, 10) for tick in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _accuracies(results: Sequence[Result], sets: Sequence[str], methods: Sequence[str], baseline: str) -> str:
    charts = []
    for images in sets:
        values = {
            method: [
                100 * one["top1"] for one in results if (one["method"], one["images_per_class"]) == (method, images)
            ]
            for method in methods
        }
        values = {method: of for method, of in values.items() if of}
        charts.append(
            f"<figure><figcaption>{_of_set(images).capitalize()}</figcaption>{_dots(values, baseline)}</figure>"
        )
    return (
        "<section><h2>Accuracy of every run</h2><p>Test top-1, %. A dot is a run. The line is the mean of a method, "
        "the bar its 95 % interval over seeds, of this method's own deviation. The sentences about differences take "
        "the deviation pooled over all methods instead, and compare equal seeds, so bars may overlap where a "
        f"difference is shown, and the other way round.</p><div class=charts>{''.join(charts)}</div></section>"
    )


def _dots(values: Mapping[str, Sequence[float]], baseline: str) -> str:
    bars = {method: _interval(of) for method, of in values.items()}
    ends = [end for of in values.values() for end in of] + [end for bar in bars.values() if bar for end in bar]
    low, high = max(min(ends), 0.0), min(max(ends), 100.0)
    low, high = (max(low - 1, 0.0), min(high + 1, 100.0)) if high - low < 1 else (low, high)
    left, width, top, step = 158, 192, 6, 25
    height = top + step * len(values)

    def x(value: float) -> float:
        return left + width * min(max((value - low) / (high - low), 0.0), 1.0)

    drawn = [
        f"<path class=grid d='M{x(tick):.1f} {top}V{height}'/>"
        f"<text x={x(tick):.1f} y={height + 14} class=tick>{tick:g}</text>"
        for tick in _scale(low, high)
    ]
    if baseline in values:
        at = x(statistics.fmean(values[baseline]))
        drawn.append(f"<path class=base d='M{at:.1f} {top}V{height}'/>")
    for row, (method, of) in enumerate(values.items()):
        y = top + step * row + step / 2
        kind = "baseline" if method == baseline else "method"
        short = method if len(method) < 24 else method.replace("TrivialAugment", "TrivialAug.")
        drawn.append(f"<text x={left - 10} y={y + 4:.1f} class=name>{html.escape(short)}</text>")
        if bar := bars[method]:
            drawn.append(f"<path class='interval {kind}' d='M{x(bar[0]):.1f} {y:.1f}H{x(bar[1]):.1f}'/>")
        drawn += [f"<circle class={kind} cx={x(one):.1f} cy={y:.1f} r=3 />" for one in of]
        mean = x(statistics.fmean(of))
        drawn.append(f"<path class='mean {kind}' d='M{mean:.1f} {y - 8:.1f}V{y + 8:.1f}'/>")
    return f"<svg class=chart viewBox='0 0 360 {height + 20}' role=img>{''.join(drawn)}</svg>"


def _mean_curve(results: Iterable[Result], name: str) -> list[tuple[float, float]]:
    """Return the mean over seeds of a curve, at the updates that all of them have."""
    found = [dict(map(tuple, one[name])) for one in results if one.get(name)]
    if not found:
        return []
    shared = sorted(set.intersection(*(set(of) for of in found)))
    return [(at, statistics.fmean(of[at] for of in found)) for at in shared]


def _curves(results: Sequence[Result], sets: Sequence[str], methods: Sequence[str], colours: Mapping[str, str]) -> str:
    charts = []
    for images in sets:
        for name, title, log in (("valid_top1", "validation top-1, %", False), ("losses", "training loss", True)):
            lines = {
                method: _mean_curve(
                    [one for one in results if (one["method"], one["images_per_class"]) == (method, images)], name
                )
                for method in methods
            }
            lines = {method: of for method, of in lines.items() if len(of) > 1}
            if lines:
                caption = f"{_of_set(images).capitalize()}: {title}"
                charts.append(f"<figure><figcaption>{caption}</figcaption>{_lines(lines, colours, log)}</figure>")
    if not charts:
        return ""
    legend = "".join(
        f"<li><i style='background:{colours.get(method, 'currentColor')}'></i>{html.escape(method)}</li>"
        for method in methods
    )
    return (
        "<section><h2>Curves</h2><p>Means over seeds, by update. The training loss of a method is that of its own, "
        "harder images; its axis is logarithmic. With a cosine schedule every curve flattens at its end: only more "
        f"updates show whether it is done.</p><ul class=legend>{legend}</ul>"
        f"<div class='charts pairs'>{''.join(charts)}</div></section>"
    )


def _lines(lines: Mapping[str, Sequence[tuple[float, float]]], colours: Mapping[str, str], log: bool) -> str:
    def value(y: float) -> float:
        return math.log10(max(y, 1e-4)) if log else 100 * y

    ys = [value(y) for of in lines.values() for _, y in of]
    low, high = min(ys), max(ys)
    low, high = (low - 0.1, high + 0.1) if high - low < 0.2 else (low, high)
    low, high = (low, high) if log else (max(low, 0.0), min(high, 100.0))
    last = max(at for of in lines.values() for at, _ in of)
    left, width, top, tall = 40, 308, 8, 170

    def place(at: float, y: float) -> str:
        return f"{left + width * at / last:.1f} {top + tall * (high - y) / (high - low):.1f}"

    if log:
        marks = [(math.log10(one * 10.0**power), one * 10.0**power) for power in range(-4, 3) for one in (1, 2, 5)]
        ticks = [(at, f"{shown:g}") for at, shown in marks if low <= at <= high]
        ticks = ticks if len(ticks) < 8 else [tick for tick in ticks if tick[1].strip("0.").startswith("1")]
    else:
        ticks = [(at, f"{at:g}") for at in _scale(low, high)]
    drawn = []
    for at, shown in ticks:
        y = top + tall * (high - at) / (high - low)
        drawn.append(f"<path class=grid d='M{left} {y:.1f}H{left + width}'/>")
        drawn.append(f"<text class=name x={left - 6} y={y + 4:.1f}>{shown}</text>")
    for tick in _scale(0, last):
        shown = f"{tick / 1000:g}k" if tick >= 1000 else f"{tick:g}"
        drawn.append(f"<text class=tick x={left + width * tick / last:.1f} y={top + tall + 16}>{shown}</text>")
    for method, of in lines.items():
        style = f"style='stroke:{colours[method]}'" if method in colours else ""
        kind = "line" if method in colours else "'line baseline'"
        path = " ".join(f"{'M' if place_ == 0 else 'L'}{place(at, value(y))}" for place_, (at, y) in enumerate(of))
        drawn.append(f"<path class={kind} {style} d='{path}'><title>{html.escape(method)}</title></path>")
    return f"<svg class=chart viewBox='0 0 360 {top + tall + 22}' role=img>{''.join(drawn)}</svg>"


def _percent(values: Sequence[float]) -> str:
    if not values:
        return "<td>"
    deviation = f"<small> ± {100 * statistics.stdev(values):.1f}</small>" if len(values) > 1 else ""
    return f"<td>{100 * statistics.fmean(values):.1f}{deviation}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{one}" for one in heads)
    return f"<div class=wide><table><tr>{head}{''.join('<tr>' + ''.join(row) for row in rows)}</table></div>"


def _details(results: Sequence[Result], sets: Sequence[str], methods: Sequence[str]) -> str:
    blocks = []
    for images in sets:
        of_set = [one for one in results if one["images_per_class"] == images]
        names = list(dict.fromkeys(name for one in of_set for name, of in one.get("corrupted_top1", {}).items() if of))
        strengths = list(dict.fromkeys(level for one in of_set for level in one["fgsm_top1"]))
        rows = []
        for method in methods:
            runs = [one for one in of_set if one["method"] == method]
            if not runs:
                continue
            spoilt = [
                [statistics.fmean(of.values()) for one in runs if (of := one.get("corrupted_top1", {}).get(name))]
                for name in names
            ]
            attacked = [[one["fgsm_top1"][level] for one in runs if level in one["fgsm_top1"]] for level in strengths]
            cells = [[one["top1"] for one in runs], *spoilt, *attacked]
            rows.append([f"<th>{html.escape(method)}", f"<td>{len(runs)}", *map(_percent, cells)])
        heads = ["method", "seeds", "clean", *names, *(f"FGSM {level}/255" for level in strengths)]
        blocks.append(f"<h3>{_of_set(images).capitalize()}</h3>{_table(heads, rows)}")
    return (
        "<section><h2>All figures</h2><p>Test top-1, %: mean and standard deviation over seeds; for a corruption, the "
        f"mean of its strengths.</p>{''.join(blocks)}</section>"
    )


def _cost(results: Sequence[Result], sets: Sequence[str], methods: Sequence[str]) -> str:
    rows = []
    for method in methods:
        of = [one for one in results if one["method"] == method]
        minutes = [[one["seconds"] / 60 for one in of if one["images_per_class"] == images] for images in sets]
        speed = [one["images_per_second"] for one in of if "images_per_second" in one]
        share = [one["loader_share"] for one in of if "loader_share" in one]
        edits = max((one.get("edits_seconds", 0.0) for one in of), default=0.0) / 60
        rows.append(
            [
                f"<th>{html.escape(method)}",
                *(f"<td>{statistics.fmean(one):.1f}" if one else "<td>" for one in minutes),
                f"<td>{edits:.1f}" if edits else "<td>",
                f"<td>{statistics.median(speed):,.0f}" if speed else "<td>",
                f"<td>{statistics.median(share):.0%}" if share else "<td>",
            ]
        )
    heads = [
        "method",
        *(f"a run with {_of_set(images)}, minutes" for images in sets),
        "edits, once, minutes",
        "images/s of training",
        "waiting for the loader",
    ]
    machines = sorted({_machine(one["machine"]) for one in results if "machine" in one})
    where = f" On {html.escape('; '.join(machines))}." if machines else ""
    return (
        "<section><h2>Cost</h2><p>Mean time of a run, with validation; the rate and the share of the time spent "
        f"waiting for images are medians.{where}</p>{_table(heads, rows)}</section>"
    )


def _machine(found: Mapping[str, Any]) -> str:
    gpu = f", {found['gpu']['name']}" if "gpu" in found else ""
    cores = f"{found.get('cores')} {'core' if found.get('cores') == 1 else 'cores'}"
    return f"{cores} of {found.get('processor')}{gpu}, torch {found.get('torch')}"


def _reading(results: Sequence[Result], baseline: str) -> str:
    commits = sorted({one["commit"][:12] + ("+" if one["commit"].endswith("+") else "") for one in results})
    base, head = html.escape(baseline), "Commit" if len(commits) == 1 else "Commits"
    return f"""<section><h2>How to read this</h2><dl>
<dt>Better, worse
<dd>The difference from {base} is larger than two kinds of luck. Of the seeds: a paired t-test over seeds, its variance
pooled over all methods of the training set. Of the test images: an exact sign-flip test over the images, which with one
seed is McNemar's. Both at the 5 % level, after Holm's correction for the number of comparisons of a section.
<dt>Unclear
<dd>Larger than the noise of the seeds, but the test images may be luck, or the seeds of this method vary more than
those of the others, or all seeds gave the same difference.
<dt>No difference shown
<dd>That is not equality. The sentence says which true difference this comparison would have found four times out of
five; anything smaller stays open. More seeds find smaller ones. With few seeds and few methods it may find none.
<dt>Interval
<dd>95 % for each comparison by itself, over seeds, and no wider than accuracies can differ. It is not corrected for the
number of comparisons, so that one without zero may have no difference shown: its sentence says so.
<dt>What the t-test assumes
<dd>Runs of all methods vary alike, and about normally. With three seeds nobody can check that.
<dt>What is not claimed
<dd>Anything about other data, networks or lengths of training, or about learning rates chosen for each method: all have
those of {base}. The sections on corrupted and attacked images are corrected each by itself.
</dl><p class=small>{head}: {html.escape(", ".join(commits))}. Checkpoints were chosen on held-out images and scored
once on the test images.</p></section>"""


# --- the picture


def picture(results: Sequence[Result], file: Path, baseline: str) -> None:
    """Draw accuracy with intervals, validation and loss of each training set; if matplotlib is missing, say so."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {file.name}: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    sets, methods = _ordered(results, "images_per_class"), _ordered(results, "method")
    colours = {baseline: "#1b1f24"} | _colours(methods, baseline)
    curves = [name for name in ("valid_top1", "losses") if any(len(one.get(name, ())) > 1 for one in results)]
    heights = [0.9 + 0.34 * len(methods), *(2.5 for _ in curves)]
    figure, panels = pyplot.subplots(
        len(heights),
        len(sets),
        figsize=(max(2.6 + 2.8 * len(sets), 6.4), sum(heights) + 0.5),
        layout="constrained",
        squeeze=False,
        height_ratios=heights,
    )
    for column, images in enumerate(sets):
        of_set = [one for one in results if one["images_per_class"] == images]
        axes = panels[0][column]
        for row, method in enumerate(methods[::-1]):
            found = [100 * one["top1"] for one in of_set if one["method"] == method]
            if not found:
                continue
            mean = statistics.fmean(found)
            if bar := _interval(found):
                axes.plot(bar, [row, row], color=colours[method], linewidth=7, alpha=0.2, solid_capstyle="butt")
            axes.plot(found, [row] * len(found), "o", color=colours[method], markersize=4, alpha=0.6, clip_on=False)
            axes.plot([mean] * 2, [row - 0.32, row + 0.32], color=colours[method], linewidth=2.5, clip_on=False)
            if method == baseline:
                axes.axvline(mean, color="#8a8a8a", linewidth=0.8, linestyle=":")
        left, right = axes.get_xlim()
        axes.set_xlim(max(left, 0), min(right, 100))
        label = "test top-1, %; bars: 95 % over seeds,\nof each method's own deviation"
        axes.set_title(_of_set(images))
        axes.set_xlabel(label, fontsize="small")
        axes.set_yticks(range(len(methods)), methods[::-1] if column == 0 else [""] * len(methods))
        axes.grid(axis="x", alpha=0.25)
        for at, name in enumerate(curves, 1):
            axes = panels[at][column]
            for method in methods:
                curve = _mean_curve([one for one in of_set if one["method"] == method], name)
                scale = 100 if name == "valid_top1" else 1
                axes.plot(
                    [x for x, _ in curve],
                    [scale * y for _, y in curve],
                    color=colours[method],
                    linewidth=2.2 if method == baseline else 1.4,
                    label=method,
                )
            axes.set(xlabel="updates", ylabel="validation top-1, %" if name == "valid_top1" else "training loss")
            if name == "losses":
                axes.set_yscale("log")
            else:
                low, high = axes.get_ylim()
                axes.set_ylim(max(low, 0), min(high, 100))
            axes.grid(alpha=0.25)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    if curves:
        handles, labels = panels[1][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(methods), 4), frameon=False)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
