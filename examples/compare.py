"""Does an augmentation help on your data? Trains with and without it, over seeds, and says what the difference shows.

    python examples/compare.py examples/recipes/flowers5.toml --data ../shared/data/flowers128 --out runs/compare
    python examples/compare.py ... --methods "curve, DiffuseMix + TrivialAugment" --sets 20:4000,all:8000 --jobs 2
    python examples/compare.py ... --grid train.lr=0.02,0.05,0.1 --grid train.weight_decay=5e-4,5e-3

All runs of a training set have the same recipe, updates and schedule, except for the changes of their method. The
checkpoint is chosen on held-out images (the recipe's `held_out`, or a tenth) and scored once on the test images.
Finished runs, and runs of OUT/record.json and of records given with --merge, are skipped, and a killed run resumes: the
comparison can be made in pieces (--minutes, Ctrl-C) and on several machines. OUT is for one comparison: a changed
recipe, --set or number of updates needs another one. At the end, and at any time with --table, it writes to OUT:

    page.html    what the differences show, in sentences; accuracy, curves, cost
    compare.png  the same as a picture
    table.md     mean, standard deviation and number of runs; differences and what they show
    record.json  every run

--grid trains the methods (by default vanilla) with every combination of values, does not touch the test images, and
prints the combination that is best on the held-out ones; give it to the comparison as --set, for all methods alike.

Names of methods with spaces need quotes: --methods "vanilla,DiffuseMix paper".
"""

import argparse
import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import comparison_record
import jobs
from comparison_page import differences, page, picture
from data import parts, raw_fits, seconds_for_edits
from recipe import Recipe, difference, rule

from dali_diffusemix.base.words import did_you_mean
from dali_diffusemix.errors import ConfigError, DiffuseMixError

HERE = Path(__file__).parent
PAPER, PLAIN = ("mix.preset=paper",), ("mix.preset=none",)
TRIVIAL = 'train.augment=["trivialaugment"]'
# Nine, as many as the paper's prompts: four of them, and five styles.
NEURAL = (
    "edits.editor=neural_editor:StyleTransfer",
    'edits.prompts=["watercolor art", "mosaic", "ukiyo-e", "a sketch with crayon", '
    '"style 2", "style 5", "style 11", "style 19", "style 22"]',
    "edits.edit_size=256",
)

METHODS: dict[str, tuple[str, ...]] = {
    "vanilla": PLAIN,
    "TrivialAugment": (*PLAIN, TRIVIAL),
    "RandAugment": (*PLAIN, 'train.augment=["randaugment"]'),
    "CutMix": (*PLAIN, 'train.augment=["cutmix"]'),
    "MixUp": (*PLAIN, 'train.augment=["mixup"]'),
    "DiffuseMix paper": PAPER,
    "DiffuseMix release": ("mix.preset=release",),
    "DiffuseMix + TrivialAugment": (*PAPER, TRIVIAL),
    "DiffuseMix + CutMix": (*PAPER, 'train.augment=["cutmix"]'),
    "DiffuseMix + RandAugment": (*PAPER, 'train.augment=["randaugment"]'),
    "DiffuseMix expanded": (*PAPER, "mix.epoch=expanded"),
    "neural edits": (*PAPER, *NEURAL),
    "neural edits + TrivialAugment": (*PAPER, *NEURAL, TRIVIAL),
    "neural edits expanded": (*PAPER, *NEURAL, "mix.epoch=expanded"),
}
"""Method to its changes of the recipe. DiffuseMix uses the recipe's editor, neural edits that of neural_editor.py."""

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
    "neural: edit only": ("mix.preset=edits", *NEURAL),
    "neural: concatenation only": (*PAPER, *NEURAL, "mix.fractal_weight=0.0"),
}

KNOWN = METHODS | ABLATIONS
GROUPS: dict[str, tuple[str, ...]] = {
    "decide": ("vanilla", "TrivialAugment", "CutMix", "DiffuseMix paper", "DiffuseMix + TrivialAugment"),
    "evidence": (
        *("vanilla", "TrivialAugment", "CutMix", "MixUp", "DiffuseMix paper", "neural edits"),
        *("DiffuseMix + TrivialAugment", "neural edits + TrivialAugment"),
        *("DiffuseMix expanded", "neural edits expanded"),
    ),
    "methods": (
        *("vanilla", "RandAugment", "CutMix", "MixUp", "DiffuseMix paper", "DiffuseMix release"),
        *("DiffuseMix + CutMix", "DiffuseMix + RandAugment"),
    ),
    # The steps of the curves that the paper's authors publish: edits, concatenation, fractals.
    "curve": ("vanilla", "edit only", "concatenation only", "DiffuseMix paper"),
    "neural curve": ("vanilla", "neural: edit only", "neural: concatenation only", "neural edits"),
    "ablations": tuple(name for name in ABLATIONS if not name.startswith("neural")),
}
"""Names for --methods."""
BASELINE = "vanilla"
Key = tuple[object, ...]
POINTS = 60  # of a recorded curve of losses


@dataclass(frozen=True)
class Run:
    method: str
    changes: tuple[str, ...]  # of the method
    common: tuple[str, ...]  # of all runs
    images: str  # of each class; "all"
    updates: int | None  # None: the recipe's
    seed: int
    folder: Path
    cache: Path
    source: Path  # the recipe's file
    tests: bool = True  # False: a run of a grid, which must not see the test images
    chosen: Mapping[str, str] = field(default_factory=dict)  # a grid's values

    @cached_property
    def recipe(self) -> Recipe:
        return Recipe.read(self.source, self.sets())

    @property
    def name(self) -> str:
        return comparison_record.name_of(self.outline())

    @property
    def key(self) -> Key:
        return key(self.outline())

    def outline(self) -> dict[str, Any]:
        """Return what its entry in the record has before it is made."""
        found = {
            "method": self.method,
            "images_per_class": self.images,
            "seed": self.seed,
            "changes": list(self.sets()),
            "updates": self.recipe.train.updates,
        }
        return found if self.tests else {**found, "grid": dict(self.chosen)}

    @property
    def finished(self) -> bool:
        """Whether it is done. Raises ConfigError if its folder has a run of other settings."""
        file = self.folder / "run.json"
        if not file.exists():
            return False
        run = json.loads(file.read_text())
        if differs := difference(run["recipe"], self.recipe.tables()):
            name, there, here = differs
            raise ConfigError(
                f"{str(self.folder)!r} has a run with other settings: {name} is {there!r} there and {here!r} here; "
                "give the same recipe, --set and --sets, or another --out."
            )
        return (self.folder / "best.pt.evaluation.json").exists() if self.tests else bool(run["finished"])

    def sets(self) -> list[str]:
        few = [] if self.images == "all" else [f"data.per_class={self.images}"]
        updates = [] if self.updates is None else [f"train.updates={self.updates}"]
        values = [f"{name}={value}" for name, value in self.chosen.items()]
        return [*self.changes, *self.common, *values, *few, *updates, f"train.seed={self.seed}"]

    def job(self, options: argparse.Namespace) -> jobs.Job:
        """Return the commands that prepare, train and evaluate."""
        common = ["--data", str(options.data), "--workers", str(options.threads), "--device", options.device]
        layout = ["--channels-last"] if options.channels_last else []
        train = [
            *(sys.executable, str(HERE / "train.py"), str(self.source), "--out", str(self.folder)),
            *("--cache", str(self.cache), "--raw", str(options.cache / "raw")),
            *common,
            *layout,
            *([] if options.resident == "no" else ["--resident", options.resident]),
            *(word for one in self.sets() for word in ("--set", one)),
        ]
        commands = [[*train, "--prepare"], [*train, "--edits", str(self.cache / "edits")]]
        if self.tests:
            commands.append([sys.executable, str(HERE / "evaluate.py"), str(self.folder / "best.pt"), *common, *layout])
        presets = [one for one in self.changes if one in ("mix.preset=none", "mix.preset=edits")]
        return jobs.Job(self.name, self.folder / "output.txt", (self.cache, *presets), commands)

    def result(self) -> dict[str, Any]:
        """Return the run's entry in the record."""
        run = json.loads((self.folder / "run.json").read_text())
        with (self.folder / "valid.csv").open(newline="") as file:
            curve = [[int(row["step"]), round(float(row["top1"]), 4)] for row in csv.DictReader(file)]
        with (self.folder / "train.csv").open(newline="") as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file)]
        where = {name: run["machine"][name] for name in ("processor", "cores", "gpu") if name in run["machine"]}
        found = {
            **self.outline(),
            "training_images": run["data"]["train"]["images"],
            "last_loss": round(statistics.fmean(losses[-50:]), 4),
            "losses": _thinned(losses),
            "valid_top1": curve,
            "seconds": round(run["seconds"], 1),
            "images_per_second": run["images_per_second"],
            "loader_share": run["loader_share"],
            "resident": run["resident"],
            "edits_seconds": seconds_for_edits(self.cache) if "mix.preset=none" not in self.changes else 0.0,
            "starts": run["starts"],
            "commit": (self.folder / "commit").read_text(),
            "version": run["version"],
            "machine": {**where, "torch": run["machine"]["versions"].get("torch")},
        }
        if not self.tests:
            return found
        evaluation = json.loads((self.folder / "best.pt.evaluation.json").read_text())
        spoilt = evaluation["corruptions"]
        right = {"clean": evaluation["right"]}
        right |= {f"fgsm {strength}": scores["right"] for strength, scores in evaluation["fgsm"].items()}
        right |= {f"{name} {strength}": one["right"] for name, of in spoilt.items() for strength, one in of.items()}
        return {
            **found,
            "chosen_step": evaluation["step"],
            "top1": evaluation["top1"],
            "top1_interval": evaluation["top1_interval"],
            "fgsm_top1": {strength: scores["top1"] for strength, scores in evaluation["fgsm"].items()},
            "corrupted_top1": {
                name: {strength: scores["top1"] for strength, scores in of.items()} for name, of in spoilt.items()
            },
            "right": right,
            "test_images": evaluation["images"],
            "test_fingerprint": run["data"]["test"]["fingerprint"],
        }


def _thinned(losses: Sequence[float]) -> list[list[float]]:
    """Return [update, mean loss of the updates since the last point]."""
    ends = sorted({round(len(losses) * (point + 1) / POINTS) for point in range(POINTS)} - {0})
    return [[end, round(statistics.fmean(losses[start:end]), 4)] for start, end in zip([0, *ends], ends, strict=False)]


def words(text: str, name: str) -> list[str]:
    """Divide an option at its commas. Raises ConfigError where something is empty or twice."""
    found = [one.strip() for one in text.split(",")]
    rule(all(found), name, "a list divided by commas, without empty places", text)
    twice = next((one for one in found if found.count(one) > 1), None)
    rule(twice is None, name, f"a list without repetitions such as {twice}", text)
    return found


def methods_of(text: str, baseline: str | None) -> list[str]:
    """Return the methods of --methods, groups replaced by theirs; the baseline first, if there is one."""
    found = [] if baseline is None else [baseline]
    if baseline is not None and baseline not in KNOWN:
        like = did_you_mean(baseline, KNOWN)
        raise ConfigError(f"--baseline must be one of {', '.join(KNOWN)}, found {baseline!r}{like}")
    for one in words(text, "--methods"):
        if one not in GROUPS and one not in KNOWN:
            like = did_you_mean(one, [*GROUPS, *KNOWN])
            end = like if like != "." else f"; methods are {', '.join(KNOWN)}."
            raise ConfigError(f"--methods must be some of {', '.join(GROUPS)}, or of methods, found {one!r}{end}")
        found += GROUPS.get(one, (one,))
    return list(dict.fromkeys(found))


def sets_of(text: str, grid: bool) -> list[tuple[str, int | None]]:
    """Return the training sets of --sets: images per class, and updates if given."""
    found: list[tuple[str, int | None]] = []
    for one in words(text, "--sets"):
        images, colon, number = one.partition(":")
        counts = [*([] if images == "all" else [images]), *([number] if colon else [])]
        holds = all(count.isdecimal() and int(count) > 0 for count in counts)
        rule(holds, "--sets", "images per class (or all) : updates, such as 10:1000,all:2000", one)
        found.append((images if images == "all" else str(int(images)), int(number) if colon else None))
    repeated = next((images for images, _ in found if [one for one, _ in found].count(images) > 1), None)
    rule(grid or repeated is None, "--sets", f"one number of updates for {repeated} images a class", text)
    return found


def plan(options: argparse.Namespace) -> list[Run]:
    """Return the runs, seed by seed, so that an interrupted comparison is balanced too."""
    baseline = None if options.grid else options.baseline
    names = methods_of(options.methods or (BASELINE if options.grid else "decide"), baseline)
    seeds = words(options.seeds, "--seeds")
    rule(all(one.isdecimal() for one in seeds), "--seeds", "whole numbers from 0, such as 0,1,2", options.seeds)
    for name, value, least in (
        ("jobs", options.jobs, 1),
        ("threads", options.threads, 1),
        ("minutes", options.minutes, 0),
    ):
        rule(value is None or value >= least, f"--{name}", f"at least {least}", value)
    grid = [_values(one) for one in options.grid]
    recipe = Recipe.read(options.recipe, [*options.set, *(f"{name}={values[0]}" for name, values in grid)])
    common = [*options.set]
    if not recipe.data.held_out:
        common.append("data.held_out=0.1")
        print("held out: a tenth of the training images, to choose checkpoints on; the recipe holds out none")
    if recipe.train.epochs is not None:
        common.append("train.epochs=unset")
    runs = []
    for seed in map(int, seeds):
        for images, number in sets_of(options.sets, bool(grid)):
            if not number and recipe.train.updates is None:
                raise ConfigError(
                    f"--sets must give updates, such as {images}:30000, for a recipe that counts epochs: methods with "
                    "more samples in an epoch would be trained longer."
                )
            for name in names:
                changes = KNOWN[name]
                edits = [change for change in changes if change.startswith("edits.")]
                # Edits are made once for all runs that use the same.
                cache = options.cache / ("".join(filter(str.isalnum, "".join(edits).replace("edits.", ""))) or "edits")
                for values in itertools.product(*(of for _, of in grid)):
                    chosen = {section: value for (section, _), value in zip(grid, values, strict=True)}
                    parts_of = [images, name.replace(" ", "-"), str(seed)]
                    if grid:
                        of_set = f"{images}-{number or ''}"
                        parts_of = ["grid", of_set, *(f"{a}={b}" for a, b in chosen.items()), *parts_of[1:]]
                    runs.append(
                        Run(
                            method=name,
                            changes=changes,
                            common=tuple(common),
                            images=images,
                            updates=number,
                            seed=seed,
                            folder=options.out.joinpath(*parts_of),
                            cache=cache,
                            source=options.recipe,
                            tests=not grid,
                            chosen=chosen,
                        )
                    )
    return runs


def _values(text: str) -> tuple[str, list[str]]:
    name, equals, values = text.partition("=")
    if not equals or not values:
        raise ConfigError(f"--grid must be section.field=value,value, found {text!r}.")
    return name, words(values, f"--grid {name}")


def key(result: dict[str, Any]) -> Key:
    """Return the key of the run that a result of a record belongs to."""
    return result["method"], result["images_per_class"], result["seed"], tuple(result["changes"])


def recorded(file: Path, runs: Sequence[Run], options: argparse.Namespace) -> dict[Key, dict[str, Any]]:
    """Return the runs of the comparison's own record, and those of its runs that the records of --merge have.

    Raises ConfigError if they do not belong together.
    """
    wanted, name, common = {run.key for run in runs}, options.recipe.name, settings(runs, options)
    found = {key(one): one for one in comparison_record.read(file, name, common)} if file.exists() else {}
    for other in options.merge:
        theirs = {key(one): one for one in comparison_record.read(other, name, common)}
        taken = {of: one for of, one in theirs.items() if of in wanted}
        print(f"{other}: {len(taken)} of its {len(theirs)} runs belong to this comparison")
        found = taken | found
    where = " and ".join(map(str, [options.out, *options.merge]))
    comparison_record.check_together([*found.values(), *(run.outline() for run in runs)], where)
    return found


def settings(runs: Sequence[Run], options: argparse.Namespace) -> comparison_record.Settings:
    """Return what all runs have in common."""
    one = runs[0]
    grid = [f"{name}={value}" for name, value in one.chosen.items()]
    updates = [] if one.updates is None else [f"train.updates={one.updates}"]
    return comparison_record.settings(Recipe.read(options.recipe, [*one.common, *grid, *updates]), list(one.chosen))


def check_data(runs: Sequence[Run], options: argparse.Namespace) -> None:
    """Read the images of the largest training set before anything is trained, and decide --resident auto."""
    of_classes = [run for run in runs if run.images != "all"] or runs
    found = parts(max(of_classes, key=lambda run: run.recipe.data.per_class or 0).recipe, options.data)
    if options.resident == "auto":
        mixed = max(runs, key=lambda run: "mix.preset=none" not in run.changes)
        options.resident = "host" if raw_fits(mixed.recipe, found) else "no"


def execute(runs: Sequence[Run], options: argparse.Namespace) -> tuple[list[Run], list[Run]]:
    """Make runs, several at a time, and return which finished and which failed.

    If the first runs all fail, no more are started: the others would fail alike.

    Raises:
        KeyboardInterrupt: On SIGINT, after the runs have ended.
    """
    begun, of_folder = time.monotonic(), {run.folder: run for run in runs}
    failed: list[Run] = []
    finished: list[Run] = []

    def may_start() -> bool:
        in_time = options.minutes is None or time.monotonic() - begun < 60 * options.minutes
        return in_time and (bool(finished) or not failed)

    def starts(job: jobs.Job) -> None:
        job.output.parent.mkdir(parents=True, exist_ok=True)
        (job.output.parent / "commit").write_text(commit())

    def done(job: jobs.Job, left: int) -> None:
        run = of_folder[job.output.parent]
        if job.returned:
            failed.append(run)
            print(f"FAILED {run.name}: {job.last_words}\n  see {job.output}", flush=True)
            return
        finished.append(run)
        result = run.result()
        top1 = f"{result['top1']:.2%}" if run.tests else f"{best_valid(result):.2%} on validation"
        print(f"{run.name}: {top1} in {job.seconds:.0f} s; {left} of {len(runs)} left", flush=True)

    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    made = [run.job(options) for run in runs]
    jobs.run(made, at_once=options.jobs, environment=environment, may_start=may_start, starts=starts, done=done)
    return finished, failed


def spread(values: Sequence[float]) -> str:
    """Mean, standard deviation and count of values, in percent."""
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{deviation} ({len(values)})"


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table: a row per method, a column per training set, then FGSM and corruptions for the last."""
    sets = list(dict.fromkeys(one["images_per_class"] for one in results))
    methods = list(dict.fromkeys(one["method"] for one in results))
    strengths = list(results[0]["fgsm_top1"])
    spoilt = [name for name, of in results[0].get("corrupted_top1", {}).items() if of]

    def cells(method: str, images: str) -> list[dict[str, Any]]:
        return [one for one in results if one["method"] == method and one["images_per_class"] == images]

    heads = [f"{'all images' if images == 'all' else images + ' a class'}" for images in sets]
    last = heads[-1]
    heads += [f"{last}, FGSM {strength}/255" for strength in strengths] + [f"{last}, {name}" for name in spoilt]
    lines = [f"| method | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(heads)]
    for method in methods:
        columns = [[one["top1"] for one in cells(method, images)] for images in sets]
        columns += [[one["fgsm_top1"][strength] for one in cells(method, sets[-1])] for strength in strengths]
        columns += [
            [statistics.fmean(one["corrupted_top1"][name].values()) for one in cells(method, sets[-1])]
            for name in spoilt
        ]
        lines.append(f"| {method} | {' | '.join(spread(one) if one else '' for one in columns)} |")
    return "\n".join(lines) + "\n"


def best_valid(result: Mapping[str, Any]) -> float:
    """Return the accuracy of the checkpoint that validation chose."""
    return max(top1 for _, top1 in result["valid_top1"])


def grid_table(results: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of a grid, the best on validation first, of each training set by itself."""
    names = list(results[0]["grid"])
    heads = ["images a class", "updates", "method", *names, "validation top-1", "training loss", "minutes"]
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * len(heads))} |"]
    for _, of in sorted(grouped(results).items(), key=_rank):
        one = of[0]
        shown = [one["images_per_class"], f"{one['updates']:,}", one["method"], *one["grid"].values()]
        loss = statistics.fmean(result["last_loss"] for result in of)
        minutes = statistics.fmean(result["seconds"] for result in of) / 60
        lines.append(
            f"| {' | '.join(shown)} | {spread([best_valid(result) for result in of])} | {loss:.3f} | {minutes:.1f} |"
        )
    return "\n".join(lines) + "\n"


def grouped(results: Sequence[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Return the runs of a grid that differ by their seeds alone."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in results:
        at = (one["images_per_class"], one["updates"], one["method"], *one["grid"].items())
        found.setdefault(at, []).append(one)
    return found


def _rank(item: tuple[tuple[Any, ...], list[dict[str, Any]]]) -> tuple[Any, ...]:
    at, of = item
    return at[0], at[1], -statistics.fmean(map(best_valid, of))


def commit() -> str:
    """Commit of this script's checkout, with "+" if there are local changes; "unknown" without a checkout."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def write_grid(options: argparse.Namespace, results: Sequence[dict[str, Any]]) -> None:
    """Write and print a grid, and the best of each training set and number of updates."""
    text = grid_table(results)
    (options.out / "grid.md").write_text(text)
    print(text)
    shown = set()
    for at, of in sorted(grouped(results).items(), key=_rank):
        if at[:2] not in shown:
            shown.add(at[:2])
            sets = " ".join(f"--set {name}={value}" for name, value in of[0]["grid"].items())
            print(f"best on validation, {at[0]} a class, {at[1]:,} updates: {sets}")


def write(options: argparse.Namespace, results: Sequence[dict[str, Any]]) -> None:
    """Write and print a comparison."""
    tables = f"{table(results)}\n{differences(results, options.baseline)}"
    (options.out / "table.md").write_text(tables)
    (options.out / "page.html").write_text(page(results, options.recipe.stem, options.baseline), encoding="utf-8")
    picture(results, options.out / "compare.png", options.baseline)
    print(tables, end="")
    print(f"see {options.out / 'page.html'}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("recipe", type=Path, help="a TOML file; see examples/recipes")
    add("--data", type=Path, required=True, help="the dataset's folder, as unpacked")
    add("--out", type=Path, required=True, help="the comparison's folder")
    add("--cache", type=Path, help="for edits, fractals and raw copies; default OUT/cache")
    groups = ", ".join(GROUPS)
    add(
        "--methods",
        help=f"names and groups ({groups}), divided by commas; the baseline is always one; default decide",
    )
    add("--baseline", default=BASELINE, help=f"what the others are compared with; default {BASELINE}")
    add("--sets", default="all", help="images per class : updates, such as 10:1000,all:2000; default all")
    add("--seeds", default="0,1,2", help="a run for each; default 0,1,2")
    add("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="change the recipe of all runs")
    add("--grid", action="append", default=[], metavar="SECTION.FIELD=VALUES", help="values to try, with commas")
    add("--merge", action="append", default=[], type=Path, metavar="RECORD", help="a record.json made elsewhere")
    add("--jobs", type=int, default=1, help="runs at a time; default 1")
    add("--threads", type=int, default=1, help="per run, for training and for loading; default 1")
    add("--minutes", type=float, help="start no new run after this time")
    add("--device", default="cpu", help="cpu or cuda; default cpu")
    resident = ("auto", "host", "device", "no")
    add("--resident", choices=resident, default="auto", help="keep raw images in memory; auto: if they fit")
    add("--channels-last", action="store_true", help="memory format; faster on most processors")
    add("--table", action="store_true", help="run nothing; write the outputs of the finished runs")
    options = parser.parse_args(arguments)
    options.cache = options.cache or options.out / "cache"
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    runs = plan(options)
    file = options.out / ("grid.json" if options.grid else "record.json")
    before = recorded(file, runs, options)
    missing = [run for run in runs if run.key not in before]
    waiting = [] if options.table else [run for run in missing if not run.finished]
    finished: list[Run] = []
    failed: list[Run] = []
    interrupted = False
    if waiting:
        check_data(waiting, options)
        try:
            with jobs.terminated_as_interrupted():
                finished, failed = execute(waiting, options)
        except KeyboardInterrupt:
            interrupted = True
    results = list((before | {run.key: run.result() for run in missing if run.finished}).values())
    if results:
        options.out.mkdir(parents=True, exist_ok=True)
        comparison_record.write(file, options.recipe.name, settings(runs, options), results)
        (write_grid if options.grid else write)(options, results)
    unfinished = sum(not run.finished for run in missing)
    left = f"{unfinished} of {len(runs)} runs are not finished; "
    left += "run the command without --table." if options.table else "run the same command again."
    if interrupted:
        print(f"compare.py: interrupted; {left}", file=sys.stderr)
        sys.exit(130)
    if failed:
        rest = " None finished, so no more were started." if not finished and unfinished > len(failed) else ""
        sys.exit(f"compare.py: {len(failed)} of {len(waiting)} runs failed; see output.txt in their folders.{rest}")
    if unfinished:
        print(left)


if __name__ == "__main__":
    try:
        main()
    except DiffuseMixError as error:
        sys.exit(f"compare.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
