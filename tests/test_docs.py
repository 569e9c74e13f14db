"""Figures in the documents are those of the committed records."""

import importlib
import json
import re
import statistics
import sys
import tarfile
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from dali_diffusemix.store import OriginalStore
from dali_diffusemix.store.pack import pack

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
RECORD = "2026-11-23-2cores"
H100 = "2026-11-26-h100"
GENERATION = "2026-11-24-2cores"


STEPS = ("edit only", "concatenation only", "DiffuseMix paper")
FIVE_SEEDS = ("vanilla", "TrivialAugment", "DiffuseMix paper", "DiffuseMix + TrivialAugment")


def results(name: str, of: str = RECORD) -> Any:
    """By contender, or row by row."""
    record: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{of}-{name}.json").read_text())
    assert {"processor", "cores", "versions", "commit"} <= set(record["machine"])
    assert not record["machine"].get("changed")
    return record["results"]


def cells(title: str, section: str) -> list[str]:
    """The cells of a row of a table in a section, but its title."""
    text = TEXT[TEXT.index(f"# {section}\n") :]
    line = next(line for line in text.splitlines() if line.startswith(f"| {title} |"))
    return [cell.strip().strip("*") for cell in line.strip("|").split("|")][1:]


def rate(record: dict[str, Any], name: str) -> float:
    return float(record[name]["images_per_second"])


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("**DiffuseMix, every sample mixed**", "diffusemix"),
        ("DiffuseMix, channels-last", "diffusemix_channels_last"),
        ("DiffuseMix, whole images decoded", "diffusemix_whole"),
        ("this loader, nothing mixed", "plain"),
        ("plain DALI: region decode, resize, crop_mirror_normalize", "plain_dali"),
        ("plain SPDL", "spdl"),
        ("plain WebDataset, Pillow", "webdataset"),
        ("plain Pillow, DataLoader", "pillow_plain"),
        ("DiffuseMix by Pillow and NumPy, DataLoader", "pillow_mixed"),
    ],
)
def test_the_loaders_table(title: str, name: str) -> None:
    found = cells(title, "Loader, against others")
    for record, first in ((results("loader"), 0), (results("loader-400"), 4)):
        row = record[name]
        expected = [rate(record, name), row["cpu_seconds_per_image"] * 1e3, row["peak_memory_mib"]]
        assert found[first : first + 3] == [f"{expected[0]:.0f}", f"{expected[1]:.2f}", f"{expected[2]:.0f}"]
        ratios = [f"{rate(record, 'diffusemix') / rate(record, name):.2f}x"]
        if not first:
            ratios.append(f"{rate(record, 'diffusemix_packed') / rate(record, name):.2f}x")
        others = ("plain_dali", "spdl", "webdataset", "pillow_plain", "pillow_mixed")
        assert found[first + 3] == (", ".join(ratios) if name in others else "")


def test_the_targets() -> None:
    loader, loader_400, ffcv, ffcv_400 = (results(name) for name in ("loader", "loader-400", "ffcv", "ffcv-400"))
    packed, last = "diffusemix_packed", "diffusemix_channels_last"
    rows = {
        "plain DALI": (1.25, "plain_dali", loader, loader_400, "diffusemix"),
        "plain FFCV, same JPEGs, contiguous NCHW": (1.25, "ffcv_kept_contiguous", ffcv, ffcv_400, "diffusemix"),
        "plain FFCV, same JPEGs, channels-last": (1.25, "ffcv_kept_channels_last", ffcv, ffcv_400, last),
        "Pillow and DataLoader, mixed": (4.0, "pillow_mixed", loader, loader_400, "diffusemix"),
    }
    for title, (target, name, whole, smaller, ours) in rows.items():
        _, *found = cells(title, "Targets")
        for cell, record, which in zip(found, (whole, whole, smaller), (ours, packed, ours), strict=True):
            ratio = rate(record, which) / rate(record, name)
            assert cell == f"{ratio:.2f}x, " + ("met" if ratio >= target else "**missed").rstrip("*"), (title, cell)


def test_the_ffcv_table() -> None:
    whole, packed = results("ffcv"), results("ffcv-400")
    rows = {
        "FFCV, same JPEGs, contiguous NCHW": "ffcv_kept_contiguous",
        "FFCV, same JPEGs, channels-last": "ffcv_kept_channels_last",
        "FFCV, its own JPEGs, contiguous NCHW": "ffcv_encoded_contiguous",
        "FFCV, its own JPEGs, channels-last": "ffcv_encoded_channels_last",
    }
    for title, name in rows.items():
        ours = "diffusemix_channels_last" if "channels_last" in name else "diffusemix"
        assert cells(title, "FFCV") == [
            f"{rate(whole, name):.0f}",
            f"{rate(whole, ours) / rate(whole, name):.2f}x",
            f"{rate(whole, 'diffusemix_packed') / rate(whole, name):.2f}x",
            f"{rate(packed, name):.0f}",
            f"{rate(packed, ours) / rate(packed, name):.2f}x",
        ]


SMALL = "2026-11-27-2cores"


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("**DiffuseMix, raw, resident**", "diffusemix_resident"),
        ("**DiffuseMix, raw, from the page cache**", "diffusemix_raw"),
        ("DiffuseMix, raw, resident, channels-last", "diffusemix_resident_channels_last"),
        ("DiffuseMix, raw, page cache, channels-last", "diffusemix_raw_channels_last"),
        ("DiffuseMix, PNGs and JPEG edits", "diffusemix"),
        ("the same mix by hand in torch, tensors in memory", "torch_select_threads"),
        ("plain FFCV, raw mode, NCHW", "ffcv"),
        ("plain FFCV, raw mode, NCHW by torch", "ffcv_contiguous"),
        ("plain FFCV, raw mode, channels-last", "ffcv_channels_last"),
    ],
)
def test_images_of_32(title: str, name: str) -> None:
    record = results("small-32", SMALL)
    row, layout = record[name], "_channels_last" if name.endswith("channels_last") else ""
    expected = [
        f"{rate(record, name):.0f}",
        f"{row['cpu_seconds_per_image'] * 1e6:.0f}",
        f"{row['peak_memory_mib']:.0f}",
    ]
    for ours in ("diffusemix_resident", "diffusemix_raw"):
        is_ours = name.startswith(("diffusemix_raw", "diffusemix_resident"))
        expected.append("" if is_ours else f"{rate(record, ours + layout) / rate(record, name):.2f}x")
    assert cells(title, "Images of 32 x 32") == expected


def test_the_mix_by_hand() -> None:
    """The contender is the fastest of the ways that were tried, or near it; the text has the plain loop's figure."""
    record = results("small-variants", SMALL)
    ways = {name: rate(record, name) for name in record if name.startswith("torch_")}
    assert ways["torch_select_threads"] >= 0.9 * max(ways.values())
    text = " ".join(TEXT.split())
    assert f"A plain loop in float32 makes {ways['torch_float_unfold']:,.0f} images/s there" in text
    assert f"with `resident` {rate(record, 'diffusemix_resident'):,.0f}." in text


@pytest.mark.parametrize(
    ("title", "name", "raw"),
    [
        ("plain DALI, files, to 224", "plain_dali", "raw_256"),
        ("plain DALI, JPEGs of 400 px, to 224", "plain_dali_400", "raw_256"),
        ("DiffuseMix, packed to 400 px, to 224", "diffusemix_400", "raw_256"),
        ("**DiffuseMix, raw of 256 px, to 224**", "diffusemix_raw_256", None),
        ("**DiffuseMix, raw of 256 px, resident, to 224**", "diffusemix_resident_256", None),
        ("plain DALI, 128 px, to 128", "plain_dali_128_to_128", "raw_128_to_128"),
        ("DiffuseMix, JPEGs of 128 px, to 128", "diffusemix_128_to_128", "raw_128_to_128"),
        ("**DiffuseMix, raw of 128 px, to 128**", "diffusemix_raw_128_to_128", None),
        ("plain DALI, 128 px, to 224", "plain_dali_128_to_224", "raw_128_to_224"),
        ("DiffuseMix, JPEGs of 128 px, to 224", "diffusemix_128_to_224", "raw_128_to_224"),
        ("**DiffuseMix, raw of 128 px, to 224**", "diffusemix_raw_128_to_224", None),
    ],
)
def test_small_photographs(title: str, name: str, raw: str | None) -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / f"{SMALL}-small-photographs.json").read_text())
    warm, cold = record["results"], record["cold"]
    expected = [f"{rate(warm, name):.0f}", f"{warm[name]['cpu_seconds_per_image'] * 1e3:.2f}"]
    expected += [f"{rate(cold, name):.0f}", f"{cold[name]['read_bytes_per_image']:,}"] if name in cold else ["", ""]
    expected.append("" if raw is None else f"{rate(warm, f'diffusemix_{raw}') / rate(warm, name):.2f}x")
    assert cells(title, "Small photographs, and large ones made small") == expected


def test_the_readmes_figures() -> None:
    loader, ffcv = results("loader"), results("ffcv")
    small, photographs = results("small-32", SMALL), results("small-photographs", SMALL)
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    own, dali_128 = "ffcv_encoded_channels_last", "plain_dali_128_to_128"
    for text in (
        f"{rate(loader, 'diffusemix'):,.0f} mixed images/s; plain DALI makes {rate(loader, 'plain_dali'):,.0f}, and",
        f"Pillow with DataLoader {rate(loader, 'pillow_mixed'):,.0f}.",
        f"load faster: {rate(loader, 'diffusemix_packed'):,.0f} with the same pixels.",
        f"(32 x 32) load at {rate(small, 'diffusemix_resident'):,.0f} images/s",
        f"128, it makes {rate(photographs, 'diffusemix_128_to_128') / rate(photographs, dali_128):.2f}x plain",
        f"FFCV's own JPEGs {rate(ffcv, 'diffusemix_channels_last') / rate(ffcv, own):.2f}x",
    ):
        assert text in readme, text


def test_the_budget() -> None:
    budgets = [results(name)["cpu_milliseconds_an_image"] for name in ("budget", "budget-packed", "budget-400")]
    rows = {
        "read, check, cut": "read",
        "decode (DALI)": "decode",
        "mix: resample, seam, fractal, flip, normalise, layout": "mix",
        "plan, windows, places": "plan, windows, places",
        "**outside reading and decoding** (target: at most 0.8)": "outside reading and decoding",
        "everything": "everything",
        "everything, whole images decoded (`visible_parts=False`)": "everything, whole images decoded",
    }
    for title, name in rows.items():
        assert cells(title, "Where the time goes") == [f"{budget[name]:.2f}" for budget in budgets]
    assert f"{results('budget')['plan_of_256_milliseconds']:.2f} ms" in TEXT


def test_long_runs() -> None:
    soak = results("soak")
    assert all(result["outcome"] == "passed" for result in soak.values())

    def measured(part: str) -> dict[str, Any]:
        return next(dict(result["measured"]) for name, result in soak.items() if part in name)

    kills = len(measured("test_one_process")["kills"])
    assert cells(f"training killed by SIGKILL at {kills} random points and resumed", "Long runs")
    for title, name in (
        ("host memory, epoch 50 over epoch 5", "loader"),
        ("the same, every epoch broken off", "breaks"),
        ("the same, with damaged files", "damaged"),
        ("the same, the dataset under DataLoader", "dataset"),
    ):
        growth = measured(f"stays_flat[{name}]")["growth_mib"]
        assert growth <= 20 and cells(title, "Long runs")[0] == f"{growth:+.1f} MiB"
    scale = measured("imagenets_size")
    title = "1.28 million originals with 9 edits each, opened by 4 ranks, and the first plan"
    assert cells(title, "Long runs")[0] == f"{scale['planned_seconds']:.2f} s"
    assert f"{scale['mib_of_all_ranks']['pss']} MiB" in TEXT


def test_reading_and_the_start() -> None:
    reading = results("reading")
    for title, name in (
        ("folder of files", "folder"),
        ("packed, the same pixels", "packed"),
        ("packed to 400 px", "packed-400"),
    ):
        rates = [rate(reading, f"{name}, prefetch_factor={f}, {state}") for f in (2, 8) for state in ("warm", "cold")]
        assert cells(title, "Reading")[:4] == [f"{value:.0f}" for value in rates]
    start = results("startup")
    assert f"{start['index']['files_per_second']} files/s" in TEXT
    assert f"{start['index']['minutes_for_1280000']:.1f} minutes" in TEXT
    assert f"{start['start']['seconds']:.2f} s" in TEXT


def test_generation() -> None:
    text = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
    found, baseline = results("generate", GENERATION), results("generate", GENERATION)["released"]
    rows = {
        "the released way": "released",
        "`generate`, one process": "generate",
        "`generate`, two processes": "generate, all",
        "`generate`, one process, 3 steps of dpm-solver++": "generate, 3 steps",
    }
    for title, name in rows.items():
        made = rate(found, name)
        assert f"| {title} | {made:.1f} | {made / rate({'': baseline}, ''):.2f}x |" in text
    assert rate(found, "generate") >= 2 * rate(found, "released")


def test_the_gpu_page() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8").replace("\n", " ")
    loader, ways = results("loader", H100), results("loader-ways", H100)
    best = rate(loader, "plain_dali_whole")
    rows = {
        "plain DALI, whole images on the GPU (its fastest form)": "plain_dali_whole",
        "plain DALI, the crop's region on the GPU": "plain_dali",
        "plain DALI, region on the CPU, the rest on the GPU": "plain_dali_cpu",
        "**DiffuseMix, whole images on the GPU**": "diffusemix_gpu",
        "DiffuseMix, regions on the GPU": "diffusemix_gpu_regions",
        "DiffuseMix, packed store, on the GPU": "diffusemix_packed_gpu",
        "DiffuseMix, on the CPU": "diffusemix_cpu",
        "DiffuseMix, packed store, on the CPU": "diffusemix_packed_cpu",
        "this loader without mixing, on the GPU": "plain_gpu",
        "Pillow and DataLoader, mixed, 16 workers": "pillow_mixed",
    }
    for title, name in rows.items():
        made, cpu = rate(loader, name), loader[name]["cpu_seconds_per_image"] * 1e3
        assert f"| {title} | {made:.0f} | {made / best:.2f}x | {cpu:.2f} ms |" in text
    assert best == max(rate(loader, name) for name in loader)
    assert f"{rate(loader, 'diffusemix_cpu') / rate(loader, 'plain_dali_cpu'):.2f}x of plain DALI's images" in text
    whole, packed, pillow = (rate(loader, name) for name in ("diffusemix_gpu", "diffusemix_packed_gpu", "pillow_mixed"))
    assert f"{whole / best:.2f}x, packed {packed / best:.2f}x |" in text
    assert f"{whole / pillow:.1f}x, packed {packed / pillow:.1f}x |" in text
    (kernel,) = (
        row
        for row in results("kernel", H100)
        if (row["shape"], row["dtype"], row["layout"]) == ("direct", "float32", "nchw")
    )
    batch = 256 / whole * 1e3
    assert f"takes {kernel['milliseconds']:.2f} ms of a batch's {batch:.1f} ms" in text
    assert f"| 2 % | {100 * kernel['milliseconds'] / batch:.1f} % |" in text
    waits = results("wait", H100)
    assert f"`next()` took {waits['gpu']['next']:.1f} ms" in text
    assert f"the same loop took {waits['cpu']['step']:.1f} ms a step" in text
    for name in ("overhead", "overhead-2"):
        found = results(name, H100)["224"]
        assert f"{100 * found['all_mixed']['A_O']['median']:+.0f} %" in text
        assert f"{-100 * found['plain_dali']['A_O']['median']:.0f} %" in text
    made = results("generate", H100)
    for name in ("generate", "generate, 5 steps"):
        assert f"{made[name]['over_released']:.1f}x" in text
    for name in ("diffusemix_shared_90", "diffusemix_gpu", "diffusemix_packed_shared_90", "diffusemix_packed_gpu"):
        assert f"{rate(ways, name):,.0f}" in text
    for name in ("diffusemix_gpu_fancy", "diffusemix_regions_fancy"):
        assert f"{rate(ways, name):,.0f}" in text
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    assert f"{whole:,.0f} mixed images/s, **{whole / best:.2f}x of" in readme


def test_the_cost_of_screening() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    most = max(row["microseconds"] for row in results("screening", "2026-11-26-2cores").values())
    assert f"The cost is at most {most:.1f} µs for a photograph of 500 x 375." in text


def test_the_calibration() -> None:
    text = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8").replace("\n", " ")
    found = results("quality", GENERATION)
    good = [kind for name, kind in found.items() if name.startswith("good")]
    rejected = sum(kind["edits"] - kind["verdicts"]["accepted"] for kind in good)
    assert f"of {sum(kind['edits'] for kind in good)} good edits they reject {rejected}" in text
    assert f"nothing was edited they accept {found['bad: unchanged']['accepted']:.0%}".replace("%", " %") in text
    assert f"of edits of *another* photograph {found['bad: another']['accepted']:.0%}".replace("%", " %") in text


def test_the_overhead_table() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    found = results("overhead", GENERATION)
    rows = {
        "**DiffuseMix, `MixSpec.paper()`** (target: at most 3 %)": "diffusemix",
        "DiffuseMix, every sample mixed": "all_mixed",
        "CutMix of kornia": "cutmix",
        "MixUp of kornia": "mixup",
        "plain DALI: region decode, resize, crop_mirror_normalize": "plain_dali",
    }

    def percent(share: float) -> str:
        return f"{100 * share:+.1f}".replace("-", "−")

    for title, name in rows.items():
        cells = []
        for size in ("64", "128"):
            overhead = found[size][name]["A_O"]
            low, high = overhead["interval"]
            cells.append(f"{percent(overhead['median'])} % ({percent(low)} to {percent(high)})")
            assert name != "diffusemix" or overhead["median"] <= 0.03
        assert f"| {title} | {' | '.join(cells)} |\n" in text


def test_the_kernels_page() -> None:
    text = (ROOT / "docs" / "kernel.md").read_text(encoding="utf-8")
    prose = " ".join(text.split())
    folder, runs, copies = ROOT / "benchmarks" / "results", [], []
    for name in ("kernel", "kernel-2"):
        record = json.loads((folder / f"2026-11-26-h100-{name}.json").read_text())
        assert record["batch_size"] == 256
        copies.append(record["copy_gigabytes_per_second"])
        runs.append({(row["shape"], f"{row['dtype']}_{row['layout']}"): row for row in record["results"]})
    assert f"reaches {copies[0]:,.0f} GB/s" in prose
    kernels = [name for shape, name in runs[0] if shape == "direct"]
    assert len(kernels) == 8

    def of(shape: str, value: str = "milliseconds") -> dict[str, list[float]]:
        """By kernel, the two runs' values."""
        return {name: [run[shape, name][value] for run in runs] for name in kernels}

    def span(values: list[float], digits: int) -> str:
        return f"{min(values):.{digits}f} to {max(values):.{digits}f}"

    def every(values: dict[str, list[float]]) -> list[float]:
        return [value for both in values.values() for value in both]

    direct, staged, upload = of("direct"), of("staged"), of("direct", "with_upload_milliseconds")
    for name in kernels:
        row = runs[0]["direct", name]
        milliseconds = [", ".join(f"{one:.3f}" for one in two[name]) for two in (direct, upload, staged)]
        rates = ", ".join(f"{rate:.0f}" for rate in of("direct", "gigabytes_per_second")[name])
        cells = [*milliseconds[:2], row["megabytes"], rates, f"{row['share_of_copy']:.2f}", milliseconds[2]]
        assert f"| `{name}` | {' | '.join(map(str, cells))} |\n" in text
    assert f"The times are {span(every(direct), 3)} ms for all types" in prose
    times = (span(every(two), 3) for two in (direct, staged))
    assert "**Measured: {} ms, and {} ms for staged.**".format(*times) in prose
    floors = [one / copies[0] for one in (runs[0]["direct", name]["megabytes"] for name in kernels)]
    assert f"at the copy's rate they take {span(floors, 2)} ms" in prose
    ratios = [runs[0]["direct", name]["milliseconds"] / floor for name, floor in zip(kernels, floors, strict=True)]
    assert f"need by a factor of {span(ratios, 0)}" in prose
    most, least = (runs[0]["direct", name]["megabytes"] for name in ("float32_nchw", "uint8_nchw"))
    assert f"float32 moves {most / least:.1f} times the bytes of uint8" in prose
    bank, written = 64 * 256 * 256 * 3 / 1e6, 256 * 224 * 224 * 3 / 1e6
    assert f"read {runs[0]['direct', 'uint8_nchw']['megabytes'] - written - bank:.0f} MB of originals" in prose

    phrases = []
    for layout in ("nchw", "channels_last"):
        pairs = [
            pair for name in kernels if name.endswith(layout) for pair in zip(direct[name], staged[name], strict=True)
        ]
        phrases.append(span([100 * (1 - ours / plain) for plain, ours in pairs], 1))
        phrases.append(span([1e3 * (plain - ours) for plain, ours in pairs], 0))
    assert "{} % faster than direct in NCHW ({} µs) and {} % in channels-last ({} µs)".format(*phrases) in prose
    slower = [100 * (runs[0]["staged4", name]["milliseconds"] / direct[name][0] - 1) for name in kernels]
    assert f"was {span(slower, 0)} % slower than direct" in prose
    with tarfile.open(folder / "2026-11-26-h100.tar.gz") as archive:
        member = archive.extractfile("second/kernel-staged,direct.json")
        assert member is not None
        other = json.load(member)["results"]
    assert [row["shape"] for row in other] == ["staged"] * 8 + ["direct"] * 8
    for row in other:
        same = runs[1][row["shape"], f"{row['dtype']}_{row['layout']}"]["milliseconds"]
        assert abs(row["milliseconds"] / same - 1) <= 0.003
    longer = [half / other for half, other in zip(direct["float16_nchw"], direct["bfloat16_nchw"], strict=True)]
    assert {f"{100 * (one - 1):.0f}" for one in longer} == {"5"}
    assert "`float16_nchw` takes 5 % longer than `bfloat16_nchw`" in prose
    loader = json.loads((folder / "2026-11-26-h100-loader.json").read_text())["results"]
    batches = [256e3 / rate(loader, name) for name in ("diffusemix_gpu", "diffusemix_packed_gpu")]
    assert "takes the loader {:.1f} ms from files and {:.1f} ms from a packed store".format(*batches) in prose
    # The second run's: the first has an outlier, which the page names.
    assert f"({upload['bfloat16_channels_last'][0]:.3f} ms) is an outlier" in prose
    assert max(two[1] for two in upload.values()) < 0.02 * min(batches)
    assert max(direct[name][k] - staged[name][k] for name in kernels for k in (0, 1)) < 0.001 * min(batches)


def test_imagenet_at_scale() -> None:
    text = (ROOT / "docs" / "imagenet.md").read_text(encoding="utf-8")
    images = 1_281_167
    assert f"{images:,}" in text
    sizes = {name: one["bytes_per_image"] for name, one in results("sizes", "2026-11-25-2cores").items()}
    for title, name in (
        ("originals, files as they are", "files as they are"),
        *((name, name) for name in ("packed, the same pixels", "packed to 500 px", "packed to 400 px")),
    ):
        assert f"| {title} | {sizes[name] / 1e3:.0f} kB | {sizes[name] * images / 1e9:.0f} GB |\n" in text
    for size in (256, 512):
        each = sizes[f"edits of {size} px"]
        total = " | ".join(f"{each * images * prompts / 1e9:.0f} GB" for prompts in (1, 3, 9))
        assert f"| {size} px | {each / 1e3:.0f} kB | {total} |\n" in text
    for edits_per_second in (1, 5, 20):
        hours = " | ".join(f"{images * prompts / edits_per_second / 3600:,.0f} h" for prompts in (1, 3, 9))
        assert f"| {edits_per_second} | {hours} |\n" in text
    loader, loader_400 = results("loader"), results("loader-400")
    milliseconds = [
        1e3 * one["cpu_seconds_per_image"]
        for one in (loader["diffusemix"], loader["diffusemix_packed"], loader_400["diffusemix"])
    ]
    assert "{:.2f} ms from files as they are, {:.2f} ms packed".format(*milliseconds) in text.replace("\n", " ")
    for rate in (1_000, 3_000, 10_000):
        cores = " | ".join(f"{rate * one / 1e3:.1f}" for one in milliseconds)
        assert f"| {rate:,} | {cores} |\n" in text
    soak = results("soak", GENERATION)
    made = next(one for name, one in soak.items() if "five_thousand" in name)["measured"]["images_per_second"]
    assert f"made {made:.0f} edits a second" in text.replace("\n", " ")


def bytes_of_raw(height: int, width: int) -> int:
    """Bytes that a raw image takes in its tar."""
    content = 3 * height * width + len(f"P6\n{width} {height}\n255\n")
    return 512 + -(-content // 512) * 512


def test_bytes_of_raw_images(tmp_path: Path) -> None:
    pack((np.zeros((2, 32, 40, 3), np.uint8), None), tmp_path / "store")
    first, second = OriginalStore.open(tmp_path / "store").index["offset"]
    assert second - first == bytes_of_raw(32, 40)
    for title, size in (
        ("32 x 32 (CIFAR)", (32, 32)),
        ("64 x 64 (Tiny-ImageNet)", (64, 64)),
        ("256 x 256", (256, 256)),
    ):
        assert cells(title, "Which format")[0] == f"{bytes_of_raw(*size):,}"
    assert f"| {bytes_of_raw(375, 500):,} and more |" in TEXT
    text = (ROOT / "docs" / "imagenet.md").read_text(encoding="utf-8")
    for title, height, width in (
        ("`--max-side 256`", 192, 256),
        ("`--max-side 341`", 256, 341),
        ("edits of 256 px, 1 prompt", 256, 256),
    ):
        each = bytes_of_raw(height, width)
        total = each * 1_281_167 / 1e9
        assert f"| {title} | {width} x {height} | {each / 1e3:.0f} kB | {total:.0f} GB |\n" in text
    assert f"of 500 x 375 pixels takes {bytes_of_raw(375, 500) / 1e3:.0f} kB" in " ".join(text.split())


@pytest.fixture
def compare() -> Iterator[ModuleType]:
    """examples/compare.py."""
    before = set(sys.modules)
    sys.path.insert(0, str(ROOT / "examples"))
    yield importlib.import_module("compare")
    sys.path.remove(str(ROOT / "examples"))
    for name in set(sys.modules) - before:
        if str(ROOT / "examples") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def record_of(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


@pytest.mark.parametrize(
    ("name", "group", "sets"),
    [
        ("2026-11-27-2cores-evidence", "evidence", ("20", "50", "all")),
        ("2026-11-27-2cores-curve", "curve", ("all",)),
        ("2026-11-25-2cores-compare", "methods", ("10", "20", "50", "all")),
        ("2026-11-25-2cores-compare-ablations", "ablations", ("50",)),
    ],
)
def test_the_tables_of_results(compare: ModuleType, name: str, group: str, sets: tuple[str, ...]) -> None:
    """Made of the records by the script that made those; all methods of a column trained alike."""
    runs = record_of(name)["runs"]
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    table = compare.table(runs)
    assert table in text
    if "11-27" in name:
        assert compare.differences(runs, "vanilla") in text
    if "ablations" in name:  # what is said about it
        figures = re.findall(r"\d+\.\d\b", text.split(table)[1].split("\n### ")[0])
        assert len(figures) > 9
        assert set(figures) - {"0.1", "0.2", "0.4"} <= set(re.findall(r"\d+\.\d\b", table))
    methods = compare.methods_of(group, "vanilla")
    five = FIVE_SEEDS if "evidence" in name else ()
    assert sorted((run["method"], run["images_per_class"], run["seed"]) for run in runs) == sorted(
        (method, images, seed) for method in methods for images in sets for seed in range(5 if method in five else 3)
    )
    for images in sets:
        column = [run for run in runs if run["images_per_class"] == images]
        assert len({run["updates"] for run in column}) == len({run["test_images"] for run in column}) == 1
    for run in runs:
        assert re.fullmatch(r"[0-9a-f]{40}", run["commit"])  # without the mark of a changed checkout
        of_method = compare.KNOWN[run["method"]]
        assert run["changes"][: len(of_method)] == list(of_method)


@pytest.fixture(scope="module")
def long_runs() -> list[dict[str, Any]]:
    return list(record_of("2026-11-27-2cores-evidence")["runs"])


def test_the_findings_of_long_training(compare: ModuleType, long_runs: list[dict[str, Any]]) -> None:
    text = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    page, points = importlib.import_module("comparison_page"), importlib.import_module("significance").points
    sets, (vanilla, trivial, paper, both), cutmix = ("20", "50", "all"), FIVE_SEEDS, "CutMix"
    neural, neural_both = "neural edits", "neural edits + TrivialAugment"

    def three(values: Iterable[object]) -> str:
        return "{}, {} and {}".format(*values)

    def over(baseline: str, measure: Any, *methods: str) -> Any:
        return page.compared([run for run in long_runs if run["method"] in (baseline, *methods)], measure, baseline)

    def of(name: str, method: str, images: str) -> list[float]:
        return [float(run[name]) for run in long_runs if (run["method"], run["images_per_class"]) == (method, images)]

    def gain(found: Any, method: str, images: str) -> str:
        """Without a sign, since the text says "gains"."""
        shown = str(points(found[images, method].mean))
        assert shown[0] == "+"
        return shown[1:]

    def changes(found: Any, method: str) -> str:
        return three(points(found[images, method].mean) for images in sets)

    def verdicts(found: Any, method: str) -> list[str]:
        return [found[images, method].verdict for images in sets]

    def by_seed(method: str, images: str, value: Callable[[dict[str, Any]], float]) -> dict[int, float]:
        chosen = [run for run in long_runs if (run["method"], run["images_per_class"]) == (method, images)]
        return {run["seed"]: value(run) for run in chosen}

    def less(method: str, baseline: str, images: str, seeds: Iterable[int], value: Any = None) -> float:
        """The mean difference, computed without the page's functions."""
        value = value or (lambda run: run["top1"])
        ours, theirs = by_seed(method, images, value), by_seed(baseline, images, value)
        return statistics.fmean(ours[seed] - theirs[seed] for seed in seeds)

    def without_contrast(run: dict[str, Any]) -> float:
        strengths = [of for name, of in run["corrupted_top1"].items() if name != "contrast"]
        return statistics.fmean(top1 for of in strengths for top1 in of.values())

    clean, corrupted, attacked = (
        page.compared(long_runs, measure, vanilla) for measure in (page.CLEAN, page.CORRUPTED, page.ATTACKED)
    )
    kinds, everything = over(paper, page.CLEAN, neural), page.compared(long_runs, page.CLEAN, trivial)
    upon = over(trivial, page.CLEAN, both, neural_both)
    pair = over(trivial, page.CLEAN, both)
    upon_attacked = over(trivial, page.ATTACKED, both, neural_both)
    warning = re.search(
        r": (\S+) points with all images instead of (\S+) ", page.page(long_runs, "flowers5_long", vanilla)
    )
    assert warning is not None
    of_all = by_seed(vanilla, "all", lambda run: run["top1"])
    contrast = {
        method: three(f"{100 * less(method, vanilla, images, range(5), without_contrast):.1f}" for images in sets)
        for method in (trivial, paper)
    }
    expanded = {
        kind: three(points(less(f"{kind.removesuffix(' paper')} expanded", kind, images, range(3))) for images in sets)
        for kind in (paper, neural)
    }
    later = {method: points(less(method, vanilla, "all", (3, 4))) for method in (paper, trivial, both)}
    speeds, waits = (
        [statistics.median(of(name, method, "all")) for method in (vanilla, paper, cutmix)]
        for name in ("images_per_second", "loader_share")
    )
    seconds = [max(of("edits_seconds", method, "all")) for method in (paper, neural)]
    losses = [statistics.fmean(of("last_loss", vanilla, images)) for images in sets]
    for said in (
        f"Vanilla, {trivial}, {paper} and {both} have five seeds, all others three",
        f"it gains {gain(clean, paper, '20')} and {gain(clean, paper, '50')} points over training without augmentation",
        f"With all images it gains {gain(clean, paper, 'all')}, which is not clearly more than noise.**",
        f"the gains are {gain(clean, neural, '20')} and {gain(clean, neural, '50')} (both not shown to be more than "
        f"noise) and {gain(clean, neural, 'all')}.",
        f"needs no edits, gains {three(gain(clean, trivial, images) for images in sets)};",
        "its loss is {:.3f}, {:.3f} and {:.2f} with 20, 50 and all images a class".format(*losses),
        f"all ten methods, {three(f'{100 * clean[images, paper].noise.deviation:.1f}' for images in sets)} points",
        f"not than that of 906 test images (p = {clean['all', paper].p_images:.2f})",
        f"Vanilla's runs vary by {warning[1]} points, those of the other methods by {warning[2]};",
        f"seed 0 of vanilla ({100 * of_all[0]:.1f} %) is low",
        f"give DiffuseMix {later[paper]} points, TrivialAugment {later[trivial]} and both {later[both]}.",
        f"neural ones change accuracy by {changes(kinds, neural)} points (p = "
        f"{three(f'{kinds[images, neural].p_seeds:.2f}' for images in sets)};",
        f"gains {three(points(-everything[images, paper].mean).strip('+') for images in sets)} points more than",
        f"procedural edits change accuracy by {changes(upon, both)} points, neural ones by "
        f"{changes(upon, neural_both)}: no difference is shown (p at least "
        f"{min(one.p_seeds for one in upon.values()):.2f};",
        f"are unclear with 20 a class (p = {pair['20', both].p_seeds:.2f} over seeds, {pair['20', both].p_images:.2f} "
        f"over images) and not shown with 50 (p = {pair['50', both].p_seeds:.2f} over seeds)",
        f"on the other corruptions it gains {contrast[trivial]} points, DiffuseMix with procedural edits "
        f"{contrast[paper]}.",
        f"is better than vanilla with few images ({points(corrupted['20', paper].mean)} and "
        f"{points(corrupted['50', paper].mean)} points) and not shown to be with all "
        f"({points(corrupted['all', paper].mean)})",
        f"with procedural edits ({points(attacked['all', both].mean)} points) and with neural ones "
        f"({points(attacked['all', neural_both].mean)}); with 20 a class CutMix is worse "
        f"({points(attacked['20', cutmix].mean)})",
        f"the edits gain {gain(upon_attacked, both, 'all')} and {gain(upon_attacked, neural_both, 'all')} points with",
        f"change accuracy by {expanded[paper]} points with procedural edits and by {expanded[neural]} with neural ones",
        f"took {seconds[0]:.0f} s with the procedural editor and {seconds[1]:.0f} s with the neural one",
        f"Vanilla trained at {speeds[0]:,.0f} images/s on one core, DiffuseMix at {speeds[1]:,.0f} (",
        "{:.0f} % and {:.0f} % of the time, kornia's CutMix {:.0f} %".format(*(100 * one for one in waits)),
        f"its loss with all images is still {statistics.fmean(of('last_loss', paper, 'all')):.2f}, on its own",
    ):
        assert said in text
    assert max(losses) < 0.05  # or more updates are needed
    assert verdicts(clean, paper) == verdicts(clean, both) == ["better", "better", "unclear"]
    assert verdicts(clean, trivial) == ["better"] * 3
    assert verdicts(clean, neural) == ["none", "none", "better"]
    assert verdicts(clean, cutmix) == ["better", "none", "better"]
    assert verdicts(pair, both) == ["unclear", "none", "none"]
    assert min(min(pair[images, both].differences) for images in ("20", "50")) > 0
    assert all(len(pair[images, both].differences) == 5 for images in sets)
    assert max((one.mean, method) for (at, method), one in clean.items() if at == "all")[1] == cutmix
    for images in ("20", "50"):
        assert max((one.mean, method) for (at, method), one in clean.items() if at == images)[1] in (both, neural_both)
    for found in (kinds, upon):
        assert {one.verdict for one in found.values()} == {"none"}
    assert {everything[images, paper].verdict for images in sets} == {"none"}
    assert all(everything[images, paper].mean < 0 for images in sets)
    assert verdicts(corrupted, paper) == ["better", "better", "none"]
    for images in sets:
        best = sorted((one.mean, method) for (at, method), one in corrupted.items() if at == images)[-3:]
        assert {method for _, method in best} == {trivial, both, neural_both}
        assert corrupted[images, paper].mean <= clean[images, paper].mean
    assert {key: one.verdict for key, one in attacked.items() if one.verdict in ("better", "worse")} == {
        ("20", cutmix): "worse",
        ("all", both): "better",
        ("all", neural_both): "better",
    }
    for (at, _), one in upon_attacked.items():
        assert one.verdict == ("better" if at == "all" else "none")


def test_twice_the_updates_gain_nothing_for_plain_training(long_runs: list[dict[str, Any]]) -> None:
    text = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    [longer] = record_of("2026-11-27-2cores-longer")["runs"]
    [run] = [
        run
        for run in long_runs
        if (run["method"], run["images_per_class"], run["seed"]) == ("vanilla", "all", longer["seed"])
    ]
    assert longer["method"] == "vanilla" and longer["updates"] == 2 * run["updates"]
    assert re.fullmatch(r"[0-9a-f]{40}", longer["commit"])
    best = {updates: max(top1 for _, top1 in of["valid_top1"]) for updates, of in ((1, run), (2, longer))}
    assert best[2] < best[1] and longer["top1"] < run["top1"]
    assert (
        f"give {100 * best[2]:.1f} % on validation instead of {100 * best[1]:.1f} %, and {100 * longer['top1']:.1f} % "
        f"instead of {100 * run['top1']:.1f} % on the test images (seed {longer['seed']}; the loss is "
        f"{longer['last_loss']:.3f})" in text
    )


def test_the_findings_of_the_steps(compare: ModuleType, long_runs: list[dict[str, Any]]) -> None:
    text = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    page, points = importlib.import_module("comparison_page"), importlib.import_module("significance").points
    runs = record_of("2026-11-27-2cores-curve")["runs"]
    steps = page.compared(runs, page.CLEAN, "vanilla")
    gains = [points(steps["all", name].mean).strip("+") for name in STEPS]
    five = points(page.compared(long_runs, page.CLEAN, "vanilla")["all", STEPS[-1]].mean).strip("+")
    said = (
        "Edits alone gain {} points over vanilla on average, concatenated with originals {}, with fractals too {} ({} "
    )
    assert said.format(*gains, five) in text
    assert {one.verdict for one in steps.values()} == {"none"}
    orders = set()
    for seed in range(3):
        of_seed = {run["method"]: run["top1"] for run in runs if run["seed"] == seed}
        orders.add(tuple(sorted(STEPS, key=of_seed.__getitem__)))
    assert len(orders) > 1  # "the order is not the same in every seed"


def test_the_page_compares_as_scipy_does(compare: ModuleType, long_runs: list[dict[str, Any]]) -> None:
    """Two methods alone give the ordinary paired t-test."""
    from scipy import stats

    page = importlib.import_module("comparison_page")
    for images in ("20", "50", "all"):
        for method in ("DiffuseMix paper", "neural edits"):
            pair = [
                run
                for run in long_runs
                if run["images_per_class"] == images and run["method"] in (method, "vanilla") and run["seed"] < 3
            ]
            top1 = {name: [run["top1"] for run in pair if run["method"] == name] for name in (method, "vanilla")}
            [one] = page.compared(pair, page.CLEAN, "vanilla").values()
            assert one.p_seeds == pytest.approx(stats.ttest_rel(top1[method], top1["vanilla"]).pvalue)


def test_the_findings_of_results() -> None:
    """Differences are those of the table's rounded figures."""
    text = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    runs = json.loads((ROOT / "benchmarks" / "results" / "2026-11-25-2cores-compare.json").read_text())["runs"]

    def mean(value: Callable[[dict[str, Any]], float], method: str, images: str) -> float:
        found = [value(run) for run in runs if (run["method"], run["images_per_class"]) == (method, images)]
        return statistics.fmean(found)

    def over_vanilla(method: str, images: str, value: Callable[[dict[str, Any]], float]) -> str:
        ours, plain = (round(100 * mean(value, name, images), 1) for name in (method, "vanilla"))
        return f"{abs(ours - plain):.1f}"

    def clean(run: dict[str, Any]) -> float:
        return float(run["top1"])

    def attacked(run: dict[str, Any]) -> float:
        return float(run["fgsm_top1"]["8"])

    paper, both = "DiffuseMix paper", "DiffuseMix + RandAugment"
    of_all = [over_vanilla(name, "all", clean) for name in (paper, "MixUp", "CutMix", "RandAugment")]
    assert "DiffuseMix is {} points below vanilla, MixUp {}, CutMix {}, RandAugment {}.".format(*of_all) in text
    of_ten = [over_vanilla(name, "10", clean) for name in (paper, "MixUp", "RandAugment")]
    assert "DiffuseMix is {} points above it, MixUp {}, RandAugment {}.".format(*of_ten) in text
    under = [over_vanilla(name, "all", attacked) for name in (paper, "CutMix", both)]
    assert "DiffuseMix is {} points above vanilla, CutMix {}, DiffuseMix with RandAugment {},".format(*under) in text
    for loss, method, images in (("is {:.2f}, D", "vanilla", "all"), ("DiffuseMix's {:.2f}.", paper, "all")):
        assert loss.format(mean(lambda run: float(run["last_loss"]), method, images)) in text
    assert f"does fit ({mean(lambda run: float(run['last_loss']), 'vanilla', '10'):.2f})" in text


def test_the_long_schedule_was_chosen_for_plain_training() -> None:
    """By validation, and it fits its training images."""
    record = json.loads((ROOT / "benchmarks/results/2026-11-27-2cores-grid.json").read_text())
    recipe = tomllib.loads((ROOT / "examples/recipes" / record["recipe"]).read_text())["train"]
    best = max(record["runs"], key=lambda run: max(top1 for _, top1 in run["valid_top1"]))
    assert (best["method"], best["updates"]) == ("vanilla", recipe["updates"])
    assert {name: float(value) for name, value in best["grid"].items()} == {
        "train.lr": recipe["lr"],
        "train.weight_decay": recipe["weight_decay"],
    }
    assert best["last_loss"] < 0.05
    first, second = sorted((max(top1 for _, top1 in run["valid_top1"]) for run in record["runs"]), reverse=True)[:2]
    assert round(702 * (first - second)) == 1
    text = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    assert "one run each (seed 0, all images; the best two differ by one image of 702)" in text
    assert {(run["seed"], run["images_per_class"]) for run in record["runs"]} == {(0, "all")}


def test_small_images_on_a_gpu() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    found = results("small", "2026-11-27-h100")
    rows = {
        '`resident="device"`': "diffusemix_resident",
        '`resident="device"`, channels last': "diffusemix_resident_channels_last",
        "the mix by hand in torch: images in float32": "torch_float",
        "selection by bits": "torch_select",
        "images padded beforehand": "torch_padded",
    }
    for title, name in rows.items():
        row = found[name]
        rates = "{images_per_second:.0f} ({lowest:.0f} to {highest:.0f})".format(**row)
        assert f"| {title} | {rates} | {1e6 * row['cpu_seconds_per_image']:.0f} µs |\n" in text
    times = found["torch_padded"]["images_per_second"] / found["diffusemix_resident"]["images_per_second"]
    assert f"The best loop by hand is {times:.2f} times as fast here" in text


def test_raw_photographs_on_a_gpu() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    found, loaders = results("raw", "2026-11-27-h100"), results("loader", "2026-11-27-h100")
    dali = rate(loaders, "plain_dali_whole")
    rows = {
        "raw images read from the page cache": "diffusemix_raw_256",
        '`resident="host"`': "diffusemix_resident_256",
        '`resident="device"`': "diffusemix_device_256",
        "the same with `augment=TrivialAugmentWide()`": "diffusemix_device_256_augment",
    }
    for title, name in rows.items():
        times, cpu = rate(found, name) / dali, 1e6 * found[name]["cpu_seconds_per_image"]
        assert f"| {title} | {rate(found, name):.0f} | {times:.2f}x | {cpu:.0f} µs |\n" in text
    rates = [round(rate(loaders, name)) for name in ("plain_dali_whole", "diffusemix_gpu", "diffusemix_cpu")]
    prose = " ".join(text.split())
    assert "plain DALI made {}, DiffuseMix {} with whole images on the GPU, and {} on the CPU".format(*rates) in prose
    wait = results("wait", "2026-11-27-h100")
    assert f"`next()` takes {wait['gpu']['next']:.1f} ms with the GPU's decoders and the step " in prose
    assert f"and {wait['cpu']['step']:.1f} ms on 27 November" in prose


def test_augmentation_on_a_gpu() -> None:
    text = (ROOT / "docs" / "kernel.md").read_text(encoding="utf-8")
    found = results("augment", "2026-11-27-h100")
    named = ("TrivialAugmentWide()", "RandAugment()", "AutoAugment()", "rand-m9-mstd0.5-inc1")
    rows = {f"`{name}`": name for name in (*named, "ColorJitter(0.4, 0.4, 0.4, 0.1)", "ThreeAugment")}
    for title, name in (rows | {"blur with a kernel of 13": "blur"}).items():
        row = found[name]
        assert f"| {title} | {row['microseconds_per_image']:.3f} | {row['over_none']:.3f} |\n" in text
    assert f"| no augment | {found['none']['microseconds_per_image']:.3f} | |\n" in text


def test_augmentation_page() -> None:
    text = (ROOT / "docs" / "augmentation.md").read_text(encoding="utf-8")
    record = json.loads((ROOT / "benchmarks/results/2026-11-27-2cores-augment.json").read_text())
    found, added = results("augment", "2026-11-27-2cores"), record["augment_cpu_milliseconds_per_image"]
    for name, row in found.items():
        cells = f" | {rate(found, name):.0f} | {1e3 * row['cpu_seconds_per_image']:.2f} | "
        if name in added:
            cells += "{median:.2f} ({lowest:.2f} to {highest:.2f}) |".format(**added[name]).replace("-", "−")
        assert cells in text, name
    assert added["plain_augment"]["median"] <= 0.35 and added["mixed_augment"]["median"] <= 0.35
    host, device = results("augment-operations", "2026-11-27-2cores"), results("augment", "2026-11-27-h100")
    for name in host:
        if f"| `{name}` |" in text:
            assert f"| `{name}` | {host[name]['over_none']:.0f} | {device[name]['over_none']:.2f} |\n" in text
    compared = results("torchvision", "2026-11-27")["pixels"]
    differ = {name: row for name, row in compared.items() if row["differ"]}
    assert set(differ) == {"GaussianBlur blur", "DeiT III's blur (Pillow)"}
    blur, boxes = differ["GaussianBlur blur"], differ["DeiT III's blur (Pillow)"]
    assert f"| {100 * blur['differ']:.4f} % of values differ, by {blur['largest']} of 255" in text
    more = 100 * boxes["differ_by_more_than_1"]
    assert (
        f"| {100 * boxes['differ']:.0f} % of values differ, {more:.1f} % by more than 1, {boxes['largest']} at most"
        in text
    )


def test_the_scores() -> None:
    """Swapped edits that pass, in docs/choosing.md."""
    text = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    alone = results("score", "2026-11-27-2cores")
    both = results("score-styles", "2026-11-27-2cores")["both editors"]
    shares = [f"{both[name]['another']:.1%}".replace("%", " %") for name in both]
    assert f"| the same, trained on the edits of both editors | {shares[0]} | {shares[1]}; {shares[2]} of six" in text
    rows = {
        "`quality`": alone["structure"],
        "`Agreement`": alone["agreement"],
        "the same, trained without": alone["unseen prompts"],
        "probability": alone["classifier"],
        "cosine": alone["features"],
    }
    for title, row in rows.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| {title}"))
        shown = [cell.strip() for cell in line.strip("|").split("|")][1:]
        wanted = [row[name]["another"] if name in row else None for name in ("procedural", "neural styles")]
        assert shown == ["" if share is None else f"{share:.1%}".replace("%", " %") for share in wanted]
