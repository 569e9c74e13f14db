"""The page and the picture that compare.py ends with."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
IMAGES = 300


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    sys.path.insert(0, str(EXAMPLES))
    names = ("comparison_page", "significance")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path.remove(str(EXAMPLES))
    for name in names:
        del sys.modules[name]


def record(
    scripts: SimpleNamespace, effects: dict[str, float], sets: tuple[str, ...] = ("20", "all"), seeds: int = 3
) -> list[dict[str, Any]]:
    """Runs as compare.py records them, of methods with an effect each."""
    draw = np.random.default_rng(1)
    difficulty = draw.normal(0, 1.5, IMAGES)
    results = []
    for images in sets:
        for seed in range(seeds):
            for method, effect in effects.items():
                names = ["clean", "fgsm 4", *(f"{name} {level}" for name in ("noise", "blur") for level in (1, 5))]
                skill = 0.7 + effect + draw.normal(0, 0.02)
                right = {
                    name: difficulty + draw.normal(0, 1, IMAGES) < skill - 0.3 * at for at, name in enumerate(names)
                }
                top1 = {name: float(of.mean()) for name, of in right.items()}
                results.append(
                    {
                        "method": method,
                        "images_per_class": images,
                        "seed": seed,
                        "training_images": 100,
                        "updates": 4000,
                        "last_loss": 0.04 if images == "20" else 0.5,
                        "losses": [[at, 1.5 * 0.9 ** (at / 100)] for at in range(100, 4001, 100)],
                        "valid_top1": [[at, 0.5 + 0.00004 * at] for at in range(500, 4001, 500)],
                        "seconds": 90.0,
                        "images_per_second": 400.0,
                        "loader_share": 0.03,
                        "edits_seconds": 600.0 if "Mix" in method else 0.0,
                        "commit": "0123456789" * 4,
                        "machine": {"processor": "A <fast> one", "cores": 2, "torch": "2.0"},
                        "top1": top1["clean"],
                        "fgsm_top1": {"4": top1["fgsm 4"]},
                        "corrupted_top1": {
                            name: {str(level): top1[f"{name} {level}"] for level in (1, 5)}
                            for name in ("noise", "blur")
                        },
                        "right": {name: scripts.significance.to_text(of) for name, of in right.items()},
                        "test_images": IMAGES,
                    }
                )
    return results


@pytest.fixture(scope="module")
def results(scripts: SimpleNamespace) -> list[dict[str, Any]]:
    return record(scripts, {"vanilla": 0.0, "DiffuseMix <paper>": 1.2, "CutMix": 0.0, "bad": -1.2})


@pytest.fixture(scope="module")
def page(scripts: SimpleNamespace, results: list[dict[str, Any]]) -> str:
    return scripts.comparison_page.page(results, "my <data>", "vanilla")


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(page: str) -> tuple[str, Reader]:
    reader = Reader()
    reader.feed(page)
    return " ".join(" ".join(reader.text).split()), reader


def test_it_says_what_every_comparison_shows(
    page: str, scripts: SimpleNamespace, results: list[dict[str, Any]]
) -> None:
    text, _ = read(page)
    found = scripts.comparison_page.compared(results, scripts.comparison_page.CLEAN, "vanilla")
    assert len(found) == 6
    for one in found.values():
        assert scripts.significance.sentence(one) in text
        assert one.images == IMAGES
    assert found["all", "DiffuseMix <paper>"].verdict == "better" and found["all", "bad"].verdict == "worse"
    assert "All images : of 3 methods, 1 better and 1 worse than vanilla; no difference shown for 1." in text
    assert "p-values are two-sided, after Holm's correction for 6 comparisons. The t-tests have 6 degrees" in text
    assert "On corrupted test images" in text and "Under attack: FGSM" in text


def test_the_table_of_differences_says_the_same(scripts: SimpleNamespace, results: list[dict[str, Any]]) -> None:
    head, _, *rows, blank, note = scripts.comparison_page.differences(results, "vanilla").splitlines()
    assert blank == "" and note == (
        "In brackets: the 95 % interval of the difference over 3 seeds; its variance is that of all methods together, "
        "and it is not corrected, so it can exclude zero where no difference is shown. Better and worse: at the 5 % "
        "level over seeds and over test images, after Holm's correction for 6 comparisons on clean images, 6 "
        "comparisons on corrupted images, 6 comparisons under FGSM, each of these groups by itself, over all training "
        "sets. Unclear: over seeds alone, or the method's own seeds vary more than those of all."
    )
    fewer = scripts.comparison_page.differences(without(results, ("all", "bad", 2)), "vanilla")
    assert "over the 2 to 3 seeds that both methods have; " in fewer
    cells = {row.split(" | ")[0].strip("| "): row.strip("| ").split(" | ")[1:] for row in rows}
    heads = head.strip("| ").split(" | ")[1:]
    for (images, method), one in scripts.comparison_page.compared(
        results, scripts.comparison_page.CLEAN, "vanilla"
    ).items():
        column = heads.index("all images" if images == "all" else f"{images} images a class")
        low, high = map(scripts.significance.points, one.interval)
        verdict = {"none": "no difference shown", "unclear": "unclear"}.get(one.verdict, f"**{one.verdict}**")
        assert cells[method][column] == f"{scripts.significance.points(one.mean)} ({low} to {high}): {verdict}"
    assert {len(row) for row in cells.values()} == {len(heads)} == {4}


def leads(page: str) -> list[str]:
    """The lines of the page's first summary."""
    return [
        " ".join(re.sub("<[^>]*>", "", line).split())
        for line in re.findall("<li>(.*?)</li>", page.partition("<ul class=lead>")[2].partition("</ul>")[0])
    ]


def without(results: list[dict[str, Any]], *missing: tuple[str, str, int]) -> list[dict[str, Any]]:
    """The results less those of a training set, a method and seeds from a number on."""
    return [
        one
        for one in results
        if not any((one["images_per_class"], one["method"]) == at[:2] and one["seed"] >= at[2] for at in missing)
    ]


def test_a_method_with_one_seed_is_counted_apart(scripts: SimpleNamespace, results: list[dict[str, Any]]) -> None:
    page = scripts.comparison_page.page
    some = [one for one in results if one["method"] in ("vanilla", "CutMix", "bad") and one["images_per_class"] == "20"]
    few = without(some, ("20", "bad", 1))
    found = scripts.comparison_page.compared(few, scripts.comparison_page.CLEAN, "vanilla")
    assert [one.verdict for one in found.values()] == ["none", "unknown"]
    assert leads(page(few, "few", "vanilla")) == [
        "20 images a class: of 2 methods, no difference from vanilla shown for 1; 1 has one seed, which cannot tell."
    ]
    few = without(results, ("20", "CutMix", 1), ("20", "bad", 1), ("all", "bad", 1))
    assert leads(page(few, "few", "vanilla")) == [
        "20 images a class: of 3 methods, 1 better than vanilla; 2 have one seed, which cannot tell.",
        "All images: of 3 methods, 1 better than vanilla; no difference shown for 1; "
        "1 has one seed, which cannot tell.",
    ]
    # What is said of the correction is what was corrected for.
    text, _ = read(page(few, "few", "vanilla"))
    assert "after Holm's correction for 3 comparisons over seeds and 6 over images. The t-tests have" in text
    note = scripts.comparison_page.differences(few, "vanilla").splitlines()[-1]
    assert note.count("3 comparisons") == 3


def test_a_single_method_and_single_things(scripts: SimpleNamespace, results: list[dict[str, Any]]) -> None:
    page = scripts.comparison_page.page
    two = [one for one in results if one["method"] in ("vanilla", "CutMix") and one["images_per_class"] == "20"]
    assert leads(page(two, "two", "vanilla")) == ["20 images a class: no difference of CutMix from vanilla is shown."]
    good = [
        one for one in results if one["method"] in ("vanilla", "DiffuseMix <paper>") and one["images_per_class"] == "20"
    ]
    assert leads(page(good, "good", "vanilla")) == [
        "20 images a class: DiffuseMix &lt;paper&gt; is better than vanilla."
    ]
    unclear = [{name: value for name, value in one.items() if name != "right"} for one in good]
    assert leads(page(unclear, "unclear", "vanilla")) == [
        "20 images a class: it is unclear whether DiffuseMix &lt;paper&gt; differs from vanilla."
    ]
    text, _ = read(page([one for one in two if one["seed"] < 2], "few", "vanilla"))
    assert "p-values are two-sided. The t-test has 1 degree of freedom." in text and "1 degrees" not in text
    machine = {"processor": "A", "cores": 1, "torch": "2.0"}
    single = [
        {**two[0], "images_per_class": "1", "updates": 1, "training_images": 1, "machine": machine, "last_loss": 2}
    ]
    text, _ = read(page(single, "one", "vanilla"))
    assert "vanilla alone \xb7 1 run, 1 seed \xb7 300 test images" in text
    assert "2.00 with 1 image a class after 1 update." in text and "On 1 core of A" in text
    text, _ = read(page([*single, {**single[0], "method": "CutMix"}], "one", "vanilla"))
    assert "1 method against vanilla" in text and "1 image a class 1 image, 1 update" in text
    for noun in ("methods", "runs", "seeds", "images", "updates", "comparisons", "cores"):
        assert not re.search(rf"\b1 {noun}\b", text), noun


def test_one_seed_makes_whole_sentences(scripts: SimpleNamespace, results: list[dict[str, Any]]) -> None:
    few = [one for one in results if one["seed"] == 0]
    text, _ = read(scripts.comparison_page.page(few, "few", "vanilla"))
    assert leads(scripts.comparison_page.page(few, "few", "vanilla")) == [
        "20 images a class: one seed, which cannot tell.",
        "All images: one seed, which cannot tell.",
    ]
    assert "p-values are two-sided, after Holm's correction for 6 comparisons. 20 images" in text
    note = scripts.comparison_page.differences(few, "vanilla").splitlines()[-2:]
    assert note == ["", "One seed gives no interval and does not show whether there is a difference."]


def test_a_training_set_without_the_baseline_is_named(scripts: SimpleNamespace, results: list[dict[str, Any]]) -> None:
    few = without(results, ("20", "vanilla", 0), ("all", "bad", 0))
    page = scripts.comparison_page.page(few, "few", "vanilla")
    first, last = leads(page)
    assert first == "20 images a class: vanilla has no run yet."
    assert last.startswith("All images: of 2 methods, ") and last.endswith("; nothing to compare yet for bad.")
    text, _ = read(page)
    assert text.count("20 images a class 100 images, 4,000 updates Vanilla has no run yet.") == 3
    assert text.count("Nothing to compare yet for bad.") == 3
    rows = scripts.comparison_page.differences(few, "vanilla").splitlines()
    assert all(row.split(" | ")[1] == "vanilla has no run yet" for row in rows[2:5])
    assert rows[4] == "| bad | vanilla has no run yet |" + " nothing to compare yet |" * 3
    # The baseline has no run at all, or none of the same seed.
    none = [one for one in results if one["method"] != "vanilla"]
    assert leads(scripts.comparison_page.page(none, "none", "vanilla")) == [
        "20 images a class: vanilla has no run yet.",
        "All images: vanilla has no run yet.",
    ]
    assert scripts.comparison_page.differences(none, "vanilla").count("vanilla has no run yet") == 6
    apart = [one for one in results if one["seed"] == (1 if one["method"] == "vanilla" else 0)]
    assert (
        "nothing to compare yet for DiffuseMix &lt;paper&gt;, CutMix, bad."
        in leads(scripts.comparison_page.page(apart, "apart", "vanilla"))[0]
    )


def test_the_baseline_alone_has_no_table_of_differences(
    scripts: SimpleNamespace, results: list[dict[str, Any]]
) -> None:
    alone = [one for one in results if one["method"] == "vanilla"]
    assert scripts.comparison_page.differences(alone, "vanilla") == ""


def wild(scripts: SimpleNamespace) -> list[dict[str, Any]]:
    """Two seeds of two methods, the difference of which is far from the same."""
    results = record(scripts, {"vanilla": 0.0, "CutMix": 0.0}, ("20",), seeds=2)
    results[0]["top1"], results[2]["top1"] = 0.3, 0.5
    results[1]["top1"], results[3]["top1"] = 0.45, 0.95
    return results


def test_two_seeds_that_can_find_nothing(scripts: SimpleNamespace) -> None:
    results = wild(scripts)
    page = scripts.comparison_page.page(results, "wild", "vanilla")
    text, _ = read(page)
    assert "95 % interval \N{MINUS SIGN}100.0 to +100.0: no difference shown" in text
    assert "This comparison could not have found any difference four times out of five, not even one of" in text
    assert leads(page) == [
        "20 images a class: no difference of CutMix from vanilla is shown; with so few seeds none could be found."
    ]
    assert "(\N{MINUS SIGN}100.0 to +100.0)" in scripts.comparison_page.differences(results, "vanilla")
    for found in re.findall(r"\d+\.\d (?=points would)|(?<=interval .)\d+\.\d| to .(\d+\.\d)", text):
        assert float(found or 0) <= 100


def test_accuracies_are_drawn_from_0_to_100(
    scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib import pyplot

    results, drawn = wild(scripts), []
    perfect = [{**one, "top1": 1.0, "valid_top1": [[1, 1.0], [2, 1.0]]} for one in results]
    with monkeypatch.context() as patch:
        patch.setattr(pyplot, "close", drawn.append)
        for of in (results, perfect):
            scripts.comparison_page.picture(of, tmp_path / "some.png", "vanilla")
    for figure in drawn:
        accuracy, validation, _ = figure.axes
        assert 0 <= accuracy.get_xlim()[0] < accuracy.get_xlim()[1] <= 100
        assert 0 <= validation.get_ylim()[0] < validation.get_ylim()[1] <= 100
        assert "each method's own deviation" in accuracy.get_xlabel()
        pyplot.close(figure)
    page = scripts.comparison_page.page(perfect, "perfect", "vanilla")
    shown = [float(tick) for tick in re.findall("<text[^>]*>([0-9.]+)</text>", page.partition("training loss<")[0])]
    assert max(shown) == 100


def test_the_two_deviations_are_told_apart(page: str) -> None:
    text, _ = read(page)
    caption = text.partition("Accuracy of every run")[2].partition("Curves")[0]
    assert "of this method's own deviation" in caption and "deviation pooled over all methods" in caption


def test_a_corruption_that_some_runs_lack(scripts: SimpleNamespace, results: list[dict[str, Any]]) -> None:
    lacking = [{**results[0], "corrupted_top1": {"noise": results[0]["corrupted_top1"]["noise"], "blur": {}}}]
    assert "<th>blur" in scripts.comparison_page.page([*lacking, *results[1:]], "some", "vanilla")
    assert "<th>blur" not in scripts.comparison_page.page(lacking, "one", "vanilla")


def test_a_corrupted_score_is_the_mean_of_all_corruptions(
    scripts: SimpleNamespace, results: list[dict[str, Any]]
) -> None:
    one, measure = results[0], scripts.comparison_page.CORRUPTED
    right = measure.right(one)
    assert right.shape == (IMAGES,) and right.max() == 4
    assert right.mean() / 4 == pytest.approx(measure.score(one))


def test_it_warns_of_training_that_was_too_short(page: str) -> None:
    text, _ = read(page)
    assert (
        "Trained too briefly? The training loss of vanilla is still 0.50 with all images after 4,000 updates." in text
    )
    assert "20 images a class after" not in text


def test_it_warns_from_the_loss_that_training_md_names(scripts: SimpleNamespace, results: list[dict[str, Any]]) -> None:
    assert "a training loss below about 0.05" in " ".join((ROOT / "docs/training.md").read_text().split())
    for loss, warned in ((0.04, False), (0.07, True)):
        few = [{**one, "last_loss": loss} for one in results]
        assert ("Trained too briefly?" in scripts.comparison_page.page(few, "few", "vanilla")) is warned


def test_it_warns_of_a_baseline_that_varies_more_than_the_rest(
    scripts: SimpleNamespace, results: list[dict[str, Any]]
) -> None:
    assert "A noisy baseline?" not in scripts.comparison_page.page(results, "few", "vanilla")

    def spread(factor: float) -> str:
        runs = [
            {**one, "top1": 0.7 + factor * (one["seed"] - 1)}
            if (one["images_per_class"], one["method"]) == ("all", "vanilla")
            else {**one, "top1": 0.7 + 0.01 * (one["seed"] - 1)}
            for one in results
        ]
        return read(scripts.comparison_page.page(runs, "few", "vanilla"))[0]

    # Three seeds each, three other methods: the F test of 2 and 6 degrees of freedom is at 1 % for 3.3 times theirs.
    assert "A noisy baseline?" not in spread(0.032)
    assert "vary more than those of the other methods: 3.4 points with all images instead of 1.0 (st" in spread(0.034)


def test_it_is_one_file_and_escapes_names(page: str) -> None:
    text, reader = read(page)
    assert not {"script", "link", "img", "iframe", "paper", "data", "fast"} & set(reader.tags)
    assert not {"src", "href"} & {name for name, _ in reader.attributes}
    assert "url(" not in page and "http" not in page and "@import" not in page
    assert "my <data>" in text and "DiffuseMix <paper>" in text and "A <fast> one" in text


def test_it_shows_curves_dots_and_cost(page: str, results: list[dict[str, Any]]) -> None:
    text, reader = read(page)
    assert page.count("class='line baseline'") == 4  # validation and loss of two training sets
    assert reader.tags.count("circle") == len(results) + 3 * 6  # every run, and each comparison of three measures
    assert "10.0 400 3%" in text  # edits in minutes, images/s, share
    drawn = [float(value) for path in re.findall(r" d='([^']*)'", page) for value in re.findall(r"-?\d+\.?\d*", path)]
    assert len(drawn) > 500 and all(-1 <= value <= 480 for value in drawn)


def test_old_records_and_few_runs_make_pages(
    scripts: SimpleNamespace, results: list[dict[str, Any]], tmp_path: Path
) -> None:
    old = json.loads((ROOT / "benchmarks/results/2026-11-25-2cores-compare.json").read_text())["runs"]
    text, _ = read(scripts.comparison_page.page(old, "flowers5", "vanilla"))
    assert "which test images were right is not recorded" in text
    assert " better than vanilla." not in text and "nan" not in text.lower()
    alone = [one for one in results if one["method"] == "vanilla"]
    for few in (alone, results[:1], results[:2]):
        assert "Accuracy of every run" in scripts.comparison_page.page(few, "few", "vanilla")
        scripts.comparison_page.picture(few, tmp_path / "few.png", "vanilla")


def test_the_picture(scripts: SimpleNamespace, results: list[dict[str, Any]], tmp_path: Path) -> None:
    scripts.comparison_page.picture(results, tmp_path / "compare.png", "vanilla")
    with Image.open(tmp_path / "compare.png") as picture:
        assert picture.width > 800 and picture.height > 700


@pytest.mark.slow
def test_nothing_overflows_on_a_telephone(page: str, tmp_path: Path, browser: Any) -> None:
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    browser.get((tmp_path / "page.html").as_uri())
    for width in (390, 1280):
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
        )
        wide = browser.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width
        chips = "return [...document.querySelectorAll('.row')].every(row => row.scrollWidth <= row.clientWidth + 1)"
        assert browser.execute_script(chips)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert not browser.get_log("browser")
