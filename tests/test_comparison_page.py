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
    scripts: SimpleNamespace, effects: dict[str, float], sets: tuple[str, ...] = ("20", "all")
) -> list[dict[str, Any]]:
    """Runs as compare.py records them, of methods with an effect each."""
    draw = np.random.default_rng(1)
    difficulty = draw.normal(0, 1.5, IMAGES)
    results = []
    for images in sets:
        for seed in range(3):
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
    head, _, *rows = scripts.comparison_page.differences(results, "vanilla").splitlines()
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
