"""Compare augmentations on one dataset at equal updates: run train.py and evaluate.py many times, and write a table.

    python examples/compare.py examples/recipes/flowers5.toml --data ../shared/data/flowers128 --out runs/compare \\
        --sets 10:1000,20:1000,50:1000,all:2000 --seeds 0,1,2 --jobs 2
    python examples/compare.py ... --methods ablations --sets 50:1000

All runs of a training set have the same recipe, updates and schedule, except for the changes of their method. The
checkpoint is chosen on held-out images (the recipe's `held_out`) and scored once on the test images. Finished runs and
runs in OUT/record.json are skipped, and a killed run resumes, so the comparison can be made in pieces (--minutes). At
the end, and at any time with --table, it writes to OUT: record.json (every run), table.md (mean, standard deviation and
number of runs) and compare.png.
"""

import argparse
import csv
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import dali_diffusemix
from dali_diffusemix.bench import machine

HERE = Path(__file__).parent
PAPER, PLAIN = ("mix.preset=paper",), ("mix.preset=none",)

METHODS: dict[str, tuple[str, ...]] = {
    "vanilla": PLAIN,
    "RandAugment": (*PLAIN, 'train.augment=["randaugment"]'),
    "CutMix": (*PLAIN, 'train.augment=["cutmix"]'),
    "MixUp": (*PLAIN, 'train.augment=["mixup"]'),
    "DiffuseMix paper": PAPER,
    "DiffuseMix release": ("mix.preset=release",),
    "DiffuseMix + CutMix": (*PAPER, 'train.augment=["cutmix"]'),
    "DiffuseMix + RandAugment": (*PAPER, 'train.augment=["randaugment"]'),
}
"""Method to its changes of the recipe."""

ABLATIONS: dict[str, tuple[str, ...]] = {
    "vanilla": PLAIN,
    "edit only": ("mix.preset=edits",),
    "concatenation only": (*PAPER, "mix.fractal_weight=0.0"),
    "fractal only": (*PAPER, "edits.editor=copy", 'edits.prompts=["copy"]', "mix.probability=0.9"),
    "all (paper)": PAPER,
    "1 prompt": (*PAPER, 'edits.prompts=["autumn"]'),
    "3 prompts": (*PAPER, 'edits.prompts=["autumn", "snowy", "sunset"]'),
    "masks left and right": (*PAPER, 'mix.masks=["left", "right"]'),
    "masks top and bottom": (*PAPER, 'mix.masks=["top", "bottom"]'),
    "fractal weight 0.1": (*PAPER, "mix.fractal_weight=0.1"),
    "fractal weight 0.4": (*PAPER, "mix.fractal_weight=0.4"),
    "mixed half the time": (*PAPER, "mix.probability=0.5"),
    "expanded epoch": (*PAPER, "mix.epoch=expanded"),
    "mask spans the crop": (*PAPER, "mix.order=crop_then_mix"),
}


@dataclass(frozen=True)
class Run:
    method: str
    changes: tuple[str, ...]
    images: str  # of each class; "all"
    updates: int
    seed: int
    folder: Path
    cache: Path

    @property
    def key(self) -> tuple[object, ...]:
        return self.method, self.images, self.seed, tuple(self.sets())

    @property
    def finished(self) -> bool:
        return (self.folder / "best.pt.evaluation.json").exists()

    def sets(self) -> list[str]:
        few = [] if self.images == "all" else [f"data.per_class={self.images}"]
        return [*self.changes, *few, f"train.updates={self.updates}", f"train.seed={self.seed}"]

    def commands(self, options: argparse.Namespace) -> Iterator[list[str]]:
        """Yield the commands of the run, in order."""
        common = ["--data", str(options.data), "--workers", str(options.threads), "--device", options.device]
        changes = [word for one in self.sets() for word in ("--set", one)]
        layout = ["--channels-last"] if options.channels_last else []
        yield [
            *(sys.executable, str(HERE / "train.py"), str(options.recipe), "--out", str(self.folder)),
            *("--cache", str(self.cache), *common, *layout, *changes),
        ]
        yield [sys.executable, str(HERE / "evaluate.py"), str(self.folder / "best.pt"), *common]

    def result(self) -> dict[str, Any]:
        """Return the run's entry in the record."""
        run = json.loads((self.folder / "run.json").read_text())
        evaluation = json.loads((self.folder / "best.pt.evaluation.json").read_text())
        with (self.folder / "valid.csv").open(newline="") as file:
            curve = [[int(row["step"]), round(float(row["top1"]), 4)] for row in csv.DictReader(file)]
        with (self.folder / "train.csv").open(newline="") as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file)]
        return {
            "method": self.method,
            "images_per_class": self.images,
            "seed": self.seed,
            "changes": list(self.sets()),
            "training_images": run["data"]["train"]["images"],
            "updates": len(losses),
            "last_loss": round(statistics.fmean(losses[-50:]), 4),
            "valid_top1": curve,
            "chosen_step": evaluation["step"],
            "top1": evaluation["top1"],
            "top1_interval": evaluation["top1_interval"],
            "fgsm_top1": {strength: scores["top1"] for strength, scores in evaluation["fgsm"].items()},
            "test_images": evaluation["images"],
            "seconds": round(run["seconds"], 1),
            "starts": run["starts"],
            "commit": (self.folder / "commit").read_text(),
        }


def plan(options: argparse.Namespace) -> list[Run]:
    """Return the runs, seed by seed, so that an interrupted comparison is balanced too."""
    known = METHODS | ABLATIONS
    names = {"methods": list(METHODS), "ablations": list(ABLATIONS)}.get(options.methods, options.methods.split(","))
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"compare.py: --methods must name some of {', '.join(known)}, found {unknown[0]!r}.")
    runs = []
    for seed in map(int, options.seeds.split(",")):
        for images, updates in (one.split(":") for one in options.sets.split(",")):
            for name in names:
                changes = known[name]
                edits = [one for one in changes if one.startswith("edits.")]
                # Edits are made once for all runs that use the same.
                cache = options.cache / ("".join(filter(str.isalnum, "".join(edits).replace("edits.", ""))) or "edits")
                folder = options.out / images / name.replace(" ", "-") / str(seed)
                runs.append(Run(name, changes, images, int(updates), seed, folder, cache))
    return runs


def key(result: dict[str, Any]) -> tuple[object, ...]:
    """Return the key of the run that a result of a record belongs to."""
    return result["method"], result["images_per_class"], result["seed"], tuple(result["changes"])


def recorded(file: Path) -> dict[tuple[object, ...], dict[str, Any]]:
    """Return the runs of an existing record, from an earlier part of the comparison."""
    found = json.loads(file.read_text())["runs"] if file.exists() else []
    return {key(one): one for one in found}


def execute(runs: Sequence[Run], options: argparse.Namespace) -> list[Run]:
    """Run everything that is not finished, several runs at a time. Returns the failed runs."""
    waiting: queue.SimpleQueue[Run] = queue.SimpleQueue()
    for run in runs:
        if not run.finished:
            waiting.put(run)
    total, failed, lock, begun = waiting.qsize(), [], threading.Lock(), time.monotonic()
    making: dict[Path, threading.Lock] = {run.cache: threading.Lock() for run in runs}
    made: set[tuple[Path, bool]] = set()
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}

    def call(command: Sequence[str], output: TextIO) -> int:
        return subprocess.run(command, stdout=output, stderr=output, env=environment).returncode

    def work() -> None:
        while options.minutes is None or time.monotonic() - begun < 60 * options.minutes:
            try:
                run = waiting.get_nowait()
            except queue.Empty:
                return
            run.folder.mkdir(parents=True, exist_ok=True)
            (run.folder / "commit").write_text(commit())
            start = time.monotonic()
            with (run.folder / "output.txt").open("a") as output:
                train, evaluate = run.commands(options)
                with making[run.cache]:  # edits are made once, by one run
                    returned = 0
                    wanted = (run.cache, "mix.preset=edits" in run.changes)
                    if wanted not in made and "mix.preset=none" not in run.changes:
                        returned = call([*train, "--prepare"], output)
                        if returned == 0:
                            made.add(wanted)
                for command in ([*train, "--edits", str(run.cache / "edits")], evaluate):
                    returned = returned or call(command, output)
            with lock:
                left = waiting.qsize()
                name = f"{run.images} a class, {run.method}, seed {run.seed}"
                if returned:
                    failed.append(run)
                    print(f"FAILED {name}: see {run.folder / 'output.txt'}", flush=True)
                else:
                    top1 = run.result()["top1"]
                    print(f"{name}: {top1:.2%} in {time.monotonic() - start:.0f} s; {left} of {total} left", flush=True)

    threads = [threading.Thread(target=work) for _ in range(options.jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed


def spread(values: Sequence[float]) -> str:
    """Mean, standard deviation and count of values, in percent."""
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{deviation} ({len(values)})"


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table: one row per method, one column per training set, and FGSM for the largest one."""
    sets = list(dict.fromkeys(one["images_per_class"] for one in results))
    methods = list(dict.fromkeys(one["method"] for one in results))
    strengths = list(results[0]["fgsm_top1"])

    def cells(method: str, images: str) -> list[dict[str, Any]]:
        return [one for one in results if one["method"] == method and one["images_per_class"] == images]

    heads = [f"{'all images' if images == 'all' else images + ' a class'}" for images in sets]
    heads += [f"{heads[-1]}, FGSM {strength}/255" for strength in strengths]
    lines = [f"| method | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(heads)]
    for method in methods:
        columns = [[one["top1"] for one in cells(method, images)] for images in sets]
        columns += [[one["fgsm_top1"][strength] for one in cells(method, sets[-1])] for strength in strengths]
        lines.append(f"| {method} | {' | '.join(spread(one) if one else '' for one in columns)} |")
    return "\n".join(lines) + "\n"


def plot(results: Sequence[dict[str, Any]], file: Path) -> None:
    """Plot top-1 of each method on each training set: a dot per run, a line for their mean."""
    try:
        import matplotlib
    except ImportError:
        print("no compare.png: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    sets = list(dict.fromkeys(one["images_per_class"] for one in results))
    methods = list(dict.fromkeys(one["method"] for one in results))[::-1]
    figure, panels = pyplot.subplots(
        1,
        len(sets),
        figsize=(2.4 + 2.3 * len(sets), 1.1 + 0.33 * len(methods)),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axes, images in zip(panels[0], sets, strict=True):
        for row, method in enumerate(methods):
            found = [
                100 * one["top1"] for one in results if one["method"] == method and one["images_per_class"] == images
            ]
            if not found:
                continue
            colour = "#1f5fa8" if "DiffuseMix" in method else "#8a8a8a"
            axes.plot(found, [row] * len(found), "o", color=colour, markersize=4, alpha=0.55)
            axes.plot([statistics.fmean(found)] * 2, [row - 0.32, row + 0.32], color=colour, linewidth=2.5)
            if method == "vanilla":
                axes.axvline(statistics.fmean(found), color="#8a8a8a", linewidth=0.8, linestyle=":")
        axes.set(title="all images" if images == "all" else f"{images} a class", xlabel="test top-1, %")
        axes.set_yticks(range(len(methods)), methods)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.25)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def commit() -> str:
    """Commit of this script's checkout, with "+" if there are local changes; "unknown" without a checkout."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="for edits and fractals; default OUT/cache")
    parser.add_argument("--methods", default="methods", help="'methods', 'ablations', or names, separated by commas")
    parser.add_argument("--sets", default="all:2000", help="images per class : updates, such as 10:1000,all:2000")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="per run, for training and for loading")
    parser.add_argument("--minutes", type=float, help="start no new run after this time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--channels-last", action="store_true", help="memory format; faster on most processors")
    parser.add_argument("--table", action="store_true", help="run nothing; write the table of the finished runs")
    options = parser.parse_args()
    options.cache = options.cache or options.out / "cache"
    runs = plan(options)
    file = options.out / "record.json"
    before = recorded(file)
    missing = [run for run in runs if run.key not in before]
    failed = [] if options.table else execute(missing, options)
    results = list((before | {run.key: run.result() for run in missing if run.finished}).values())
    if results:
        record = {
            "machine": {**machine(), "command": sys.argv},
            "version": dali_diffusemix.__version__,
            "recipe": options.recipe.name,
            "runs": results,
        }
        text = json.dumps({**record, "runs": "RUNS"}, indent=1)
        rows = ",\n  ".join(json.dumps(one) for one in results)
        file.write_text(text.replace('"RUNS"', f"[\n  {rows}\n ]") + "\n")
        (options.out / "table.md").write_text(table(results))
        plot(results, options.out / "compare.png")
        print(table(results), end="")
    unfinished = sum(not run.finished for run in missing)
    if failed:
        sys.exit(f"compare.py: {len(failed)} runs failed; see output.txt in their folders.")
    if unfinished:
        print(f"{unfinished} of {len(runs)} runs are not finished; run the same command again.")


if __name__ == "__main__":
    main()
