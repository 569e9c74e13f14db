"""Draws a record of bench_loader.py or compare_ffcv.sh: a bar for each contender, images per second.

    .venv/bin/python benchmarks/plot.py benchmarks/results/RECORD.json --out docs/loader

writes docs/loader.png and docs/loader.svg. A bar is a median, with a whisker from the lowest to the highest round;
behind the value of another contender stands how many times faster DiffuseMix is. The fastest comes first; bars of this
package are coloured.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TITLES = {
    "diffusemix": "DiffuseMix, every sample mixed",
    "diffusemix_channels_last": "DiffuseMix, channels-last",
    "diffusemix_packed": "DiffuseMix, packed, same pixels",
    "diffusemix_whole": "DiffuseMix, whole images decoded",
    "plain": "this loader, nothing mixed",
    "plain_dali": "plain DALI",
    "pillow_plain": "plain Pillow, DataLoader",
    "pillow_mixed": "DiffuseMix by Pillow and NumPy",
    "spdl": "plain SPDL",
    "webdataset": "plain WebDataset, Pillow",
    "ffcv_kept": "FFCV, same JPEGs, NCHW",
    "ffcv_kept_contiguous": "FFCV, same JPEGs, contiguous NCHW",
    "ffcv_kept_channels_last": "FFCV, same JPEGs, channels-last",
    "ffcv_encoded": "FFCV, its own JPEGs, NCHW",
    "ffcv_encoded_contiguous": "FFCV, its own JPEGs, contiguous NCHW",
    "ffcv_encoded_channels_last": "FFCV, its own JPEGs, channels-last",
}
CLEAR = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # no grid line through a number
MIXED, OURS, OTHERS, INK, FAINT = "#0b6e4f", "#7cb8a2", "#b9bec5", "#20262d", "#6b747e"


def colour(name: str) -> str:
    if name in ("diffusemix", "diffusemix_packed", "diffusemix_channels_last"):
        return MIXED
    return OURS if name in ("diffusemix_whole", "plain") else OTHERS


def caption(record: dict[str, Any]) -> str:
    """Return a description of the measurement and the machine."""
    settings = record["settings"].get("loader", record["settings"])
    machine = record.get("machines", {}).get("loader", record["machine"])
    packed = f"packed to {settings['max_side']} px" if settings["max_side"] else "originals as they are"
    where = machine["gpu"]["name"] if settings["device"] != "cpu" else machine["processor"].replace("(R)", "")
    return (
        f"{settings['images']:,} images, {packed}, 224 x 224, batches of {settings['batch_size']}, "
        f"{settings['threads']} threads or workers\n{where}, {machine['cores']} cores; "
        f"median of {rounds(record)} rounds, whiskers lowest to highest"
    )


def rounds(record: dict[str, Any]) -> int:
    return min(len(found["rounds"]) for found in record["results"].values())


def draw(record: dict[str, Any], title: str) -> "plt.Figure":
    shown = {name: found for name, found in record["results"].items() if not name.endswith("_steady")}
    names = sorted(shown, key=lambda name: shown[name]["images_per_second"])
    rates = [shown[name]["images_per_second"] for name in names]
    below = [rate - shown[name]["lowest"] for name, rate in zip(names, rates, strict=True)]
    above = [shown[name]["highest"] - rate for name, rate in zip(names, rates, strict=True)]
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "svg.fonttype": "none"})
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.4 * len(names)), layout="constrained")
    bars = axes.barh(range(len(names)), rates, height=0.68, color=[colour(name) for name in names], zorder=2)
    whiskers = {"ecolor": INK, "elinewidth": 1, "capsize": 3, "capthick": 1, "zorder": 3}
    axes.errorbar(rates, range(len(names)), xerr=[below, above], fmt="none", **whiskers)
    most = max(rate + up for rate, up in zip(rates, above, strict=True))
    ours = shown.get("diffusemix", {}).get("images_per_second")
    for bar, name, rate, up in zip(bars, names, rates, above, strict=True):
        position = (rate + up + most * 0.012, bar.get_y() + bar.get_height() / 2)
        value = axes.annotate(
            f"{rate:,.0f}",
            position,
            va="center",
            color=INK,
            fontweight="bold" if colour(name) == MIXED else "normal",
            bbox=CLEAR,
        )
        if ours is not None and colour(name) == OTHERS:
            axes.annotate(
                f"  DiffuseMix is {ours / rate:.2f}x",
                xy=(1, 0.5),
                xycoords=value,
                va="center",
                color=FAINT,
                fontsize=9,
                bbox=CLEAR,
                zorder=2.5,
            )
    axes.set_yticks(range(len(names)), [TITLES.get(name, name) for name in names])
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_color(INK)
        label.set_fontweight("bold" if colour(name) == MIXED else "normal")
    axes.set_xlim(0, most * 1.32)
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= most], minor=False)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("images a second", color=FAINT, loc="left")
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", colors=FAINT, length=0)
    axes.grid(axis="x", color="#e4e7ea", zorder=0)
    axes.spines[:].set_visible(False)
    left = {"x": 0.012, "ha": "left", "va": "top", "transform": figure.transFigure}
    height = figure.get_figheight()
    figure.text(y=1 - 0.12 / height, s=title, fontsize=13, fontweight="bold", color=INK, **left)
    figure.text(y=1 - 0.44 / height, s=caption(record), fontsize=9, color=FAINT, linespacing=1.4, **left)
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.9 / height))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("--title", default="From JPEGs to training batches")
    parser.add_argument("--out", type=Path, required=True, help="without ending: .png and .svg are written")
    options = parser.parse_args()
    figure = draw(json.loads(options.record.read_text()), options.title)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for ending in ("png", "svg"):
        figure.savefig(
            options.out.with_suffix(f".{ending}"), dpi=160, metadata={"Date": None} if ending == "svg" else {}
        )


if __name__ == "__main__":
    main()
