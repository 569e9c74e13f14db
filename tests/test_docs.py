"""Figures in docs/performance.md are those of the committed records."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
RECORD = "2026-11-23-2cores"


def results(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{RECORD}-{name}.json").read_text())
    assert {"processor", "cores", "versions", "commit"} <= set(record["machine"])
    return dict(record["results"])


def test_the_loaders_table() -> None:
    whole, packed = results("loader"), results("loader-400")
    rows = {
        "**DiffuseMix, every sample mixed**": "diffusemix",
        "this loader, nothing mixed": "plain",
        "plain DALI: region decode, resize, crop_mirror_normalize": "plain_dali",
        "plain Pillow, DataLoader": "pillow_plain",
        "DiffuseMix by Pillow and NumPy, DataLoader": "pillow_mixed",
    }
    for title, name in rows.items():
        line = next(line for line in TEXT.splitlines() if line.startswith(f"| {title} "))
        for record in (whole, packed):
            rate = record[name]["images_per_second"]
            assert f"{rate:.0f}" in line, (title, rate)
            if name not in ("diffusemix", "plain"):
                assert f"{record['diffusemix']['images_per_second'] / rate:.2f}x" in line, title


def test_the_budget_and_the_start() -> None:
    budget = results("budget")
    for value in budget["cpu_milliseconds_an_image"].values():
        assert f"{value:.2f}" in TEXT, value
    assert f"{budget['plan_of_256_milliseconds']:.2f} ms" in TEXT
    start = results("startup")
    assert f"{start['index']['files_per_second']} files/s" in TEXT
    assert f"{start['index']['minutes_for_1280000']:.1f} minutes" in TEXT
    assert f"{start['start']['seconds']:.2f} s" in TEXT


def test_the_ffcv_table() -> None:
    whole, packed = results("ffcv"), results("ffcv-400")
    rows = {
        "**DiffuseMix, NCHW**": "diffusemix",
        "FFCV, same JPEGs, contiguous NCHW": "ffcv_kept_contiguous",
        "FFCV, same JPEGs, channels-last": "ffcv_kept_channels_last",
        "FFCV, its own JPEGs, contiguous NCHW": "ffcv_encoded_contiguous",
        "FFCV, its own JPEGs, channels-last": "ffcv_encoded_channels_last",
    }
    for title, name in rows.items():
        line = next(line for line in TEXT.splitlines() if line.startswith(f"| {title} "))
        for record in (whole, packed):
            assert f"{record[name]['images_per_second']:.0f}" in line, (title, name)
            if name != "diffusemix":
                assert f"{record[name]['diffusemix_over_this']:.2f}x" in line, (title, name)
