"""Does an augmentation help on your data? Trains with and without it, over seeds, and says what the difference shows.

    python examples/compare.py examples/recipes/flowers5.toml --data ../shared/data/flowers128 --out runs/compare
    python examples/compare.py ... --methods curve --sets 20:4000,50:4000,all:8000 --seeds 0,1,2,3,4 --jobs 2
    python examples/compare.py ... --grid train.lr=0.02,0.05,0.1 --grid train.weight_decay=5e-4,5e-3

All runs of a training set have the same recipe, updates and schedule, except for the changes of their method. The
checkpoint is chosen on held-out images (the recipe's `held_out`, or a tenth) and scored once on the test images.
Finished runs, and runs of OUT/record.json and of records given with --merge, are skipped, and a killed run resumes: the
comparison can be made in pieces (--minutes) and on several machines. At the end, and at any time with --table, it
writes to OUT:

    page.html    what the differences show, in sentences; accuracy, curves, cost
    compare.png  the same as a picture
    table.md     mean, standard deviation and number of runs; differences and what they show
    record.json  every run

--grid trains the methods (by default vanilla) with every combination of values, does not touch the test images, and
prints the combination that is best on the held-out ones; give it to the comparison as --set, for all methods alike.
"""

import argparse
import csv
import itertools
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from comparison_page import differences, page, picture
from data import parts, raw_fits, seconds_for_edits
from recipe import Recipe

import dali_diffusemix
from dali_diffusemix.bench import machine
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
    tests: bool = True  # False: a run of a grid, which must not see the test images
    chosen: Mapping[str, str] = field(default_factory=dict)  # a grid's values

    @property
    def key(self) -> Key:
        return self.method, self.images, self.seed, tuple(self.sets())

    @property
    def name(self) -> str:
        values = "".join(f", {name}={value}" for name, value in self.chosen.items())
        return f"{self.images} a class, {self.method}{values}, seed {self.seed}"

    @property
    def finished(self) -> bool:
        if self.tests:
            return (self.folder / "best.pt.evaluation.json").exists()
        file = self.folder / "run.json"
        return file.exists() and bool(json.loads(file.read_text())["finished"])

    def sets(self) -> list[str]:
        few = [] if self.images == "all" else [f"data.per_class={self.images}"]
        updates = [] if self.updates is None else [f"train.updates={self.updates}"]
        values = [f"{name}={value}" for name, value in self.chosen.items()]
        return [*self.changes, *self.common, *values, *few, *updates, f"train.seed={self.seed}"]

    def commands(self, options: argparse.Namespace) -> Iterator[list[str]]:
        """Yield the commands that train and evaluate, in order."""
        common = ["--data", str(options.data), "--workers", str(options.threads), "--device", options.device]
        changes = [word for one in self.sets() for word in ("--set", one)]
        layout = ["--channels-last"] if options.channels_last else []
        resident = [] if options.resident == "no" else ["--resident", options.resident]
        yield [
            *(sys.executable, str(HERE / "train.py"), str(options.recipe), "--out", str(self.folder)),
            *("--cache", str(self.cache), "--raw", str(options.cache / "raw")),
            *common,
            *layout,
            *resident,
            *changes,
        ]
        if self.tests:
            yield [sys.executable, str(HERE / "evaluate.py"), str(self.folder / "best.pt"), *common, *layout]

    def result(self) -> dict[str, Any]:
        """Return the run's entry in the record."""
        run = json.loads((self.folder / "run.json").read_text())
        with (self.folder / "valid.csv").open(newline="") as file:
            curve = [[int(row["step"]), round(float(row["top1"]), 4)] for row in csv.DictReader(file)]
        with (self.folder / "train.csv").open(newline="") as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file)]
        where = {name: run["machine"][name] for name in ("processor", "cores", "gpu") if name in run["machine"]}
        found = {
            "method": self.method,
            "images_per_class": self.images,
            "seed": self.seed,
            "changes": list(self.sets()),
            "training_images": run["data"]["train"]["images"],
            "updates": len(losses),
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
            return {**found, "grid": dict(self.chosen)}
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


def plan(options: argparse.Namespace) -> list[Run]:
    """Return the runs, seed by seed, so that an interrupted comparison is balanced too."""
    named = options.methods or (BASELINE if options.grid else "decide")
    names = list(GROUPS.get(named, named.split(",")))
    if unknown := [name for name in names if name not in KNOWN]:
        raise ConfigError(
            f"--methods must be one of {', '.join(GROUPS)}, or some of {', '.join(KNOWN)}, found {unknown[0]!r}."
        )
    grid = [_values(one) for one in options.grid]
    recipe = Recipe.read(options.recipe, [*options.set, *(f"{name}={values[0]}" for name, values in grid)])
    common = [*options.set]
    if not recipe.data.held_out:
        common.append("data.held_out=0.1")
        print("held out: a tenth of the training images, to choose checkpoints on; the recipe holds out none")
    runs = []
    for seed in map(int, options.seeds.split(",")):
        for one in options.sets.split(","):
            images, _, number = one.partition(":")
            if not number and recipe.train.updates is None:
                raise ConfigError(
                    f"--sets must give updates, such as {images}:30000, for a recipe that counts epochs: methods with "
                    "more samples in an epoch would be trained longer."
                )
            unset = ("train.epochs=unset",) if recipe.train.epochs is not None else ()
            for name in names:
                changes = KNOWN[name]
                edits = [change for change in changes if change.startswith("edits.")]
                # Edits are made once for all runs that use the same.
                cache = options.cache / ("".join(filter(str.isalnum, "".join(edits).replace("edits.", ""))) or "edits")
                for values in itertools.product(*(of for _, of in grid)):
                    chosen = {section: value for (section, _), value in zip(grid, values, strict=True)}
                    parts_of = [images, name.replace(" ", "-"), str(seed)]
                    if grid:
                        parts_of = [
                            "grid",
                            f"{images}-{number}",
                            *(f"{a}={b}" for a, b in chosen.items()),
                            *parts_of[1:],
                        ]
                    runs.append(
                        Run(
                            method=name,
                            changes=changes,
                            common=(*common, *unset),
                            images=images,
                            updates=int(number) if number else None,
                            seed=seed,
                            folder=options.out.joinpath(*parts_of),
                            cache=cache,
                            tests=not grid,
                            chosen=chosen,
                        )
                    )
    return runs


def _values(text: str) -> tuple[str, list[str]]:
    name, equals, values = text.partition("=")
    if not equals or not values:
        raise ConfigError(f"--grid must be section.field=value,value, found {text!r}.")
    return name, values.split(",")


def key(result: dict[str, Any]) -> Key:
    """Return the key of the run that a result of a record belongs to."""
    return result["method"], result["images_per_class"], result["seed"], tuple(result["changes"])


def recorded(own: Path, others: Sequence[Path], runs: Sequence[Run], recipe: str) -> dict[Key, dict[str, Any]]:
    """Return the runs of existing records.

    Args:
        own: The record of earlier parts of the comparison, if there is one.
        others: Records from elsewhere; of these only the runs that belong to the comparison.
        runs: The comparison.
        recipe: The name of its recipe.
    """
    found: dict[Key, dict[str, Any]] = {}
    wanted = {run.key for run in runs}
    for file in [*([own] if own.exists() else []), *others]:
        if not file.exists():
            raise ConfigError(f"--merge: there is no record {str(file)!r}.")
        record = json.loads(file.read_text())
        if record["recipe"] != recipe:
            raise ConfigError(f"{str(file)!r} is of the recipe {record['recipe']}, not of {recipe}.")
        found = {key(one): one for one in record["runs"] if file == own or key(one) in wanted} | found
    tested = {(one["test_images"], one["test_fingerprint"]) for one in found.values() if "test_fingerprint" in one}
    if len(tested) > 1:
        raise ConfigError(f"the records of {str(own)!r} and --merge are of different test images; compare them apart.")
    return found


def execute(runs: Sequence[Run], options: argparse.Namespace) -> list[Run]:
    """Run everything that is not finished, several runs at a time. Returns the failed runs."""
    waiting: queue.SimpleQueue[Run] = queue.SimpleQueue()
    for run in runs:
        if not run.finished:
            waiting.put(run)
    total, failed, lock, begun = waiting.qsize(), [], threading.Lock(), time.monotonic()
    making = threading.Lock()
    made: set[tuple[Path, str]] = set()
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
                train, *evaluate = run.commands(options)
                with making:  # edits and raw copies are made once, by one run
                    returned = 0
                    presets = [one for one in run.changes if one in ("mix.preset=none", "mix.preset=edits")]
                    wanted = (run.cache, presets[0] if presets else "")
                    if wanted not in made:
                        returned = call([*train, "--prepare"], output)
                        if returned == 0:
                            made.add(wanted)
                for command in ([*train, "--edits", str(run.cache / "edits")], *evaluate):
                    returned = returned or call(command, output)
            with lock:
                left = waiting.qsize()
                if returned:
                    failed.append(run)
                    print(f"FAILED {run.name}: see {run.folder / 'output.txt'}", flush=True)
                else:
                    result = run.result()
                    top1 = f"{result['top1']:.2%}" if run.tests else f"{best_valid(result):.2%} on validation"
                    print(f"{run.name}: {top1} in {time.monotonic() - start:.0f} s; {left} of {total} left", flush=True)

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


def write_record(file: Path, recipe: str, results: Sequence[dict[str, Any]]) -> None:
    record = {
        "machine": {**machine(), "command": sys.argv},
        "version": dali_diffusemix.__version__,
        "recipe": recipe,
        "runs": results,
    }
    text = json.dumps({**record, "runs": "RUNS"}, indent=1)
    rows = ",\n  ".join(json.dumps(one) for one in results)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text.replace('"RUNS"', f"[\n  {rows}\n ]") + "\n")
    temporary.replace(file)


def write_grid(options: argparse.Namespace, results: Sequence[dict[str, Any]]) -> None:
    """Write and print a grid, and the best of each training set and number of updates."""
    write_record(options.out / "grid.json", options.recipe.name, results)
    text = grid_table(results)
    (options.out / "grid.md").write_text(text)
    print(text)
    shown = set()
    for at, of in sorted(grouped(results).items(), key=_rank):
        if at[:2] not in shown:
            shown.add(at[:2])
            sets = " ".join(f"--set {name}={value}" for name, value in of[0]["grid"].items())
            print(f"best on validation, {at[0]} a class, {at[1]:,} updates: {sets}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="for edits, fractals and raw copies; default OUT/cache")
    groups = ", ".join(GROUPS)
    parser.add_argument("--methods", help=f"{groups}, or names, separated by commas; default decide")
    parser.add_argument("--sets", default="all", help="images per class : updates, such as 10:1000,all:2000")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="for all methods")
    parser.add_argument("--grid", action="append", default=[], metavar="SECTION.FIELD=VALUES", help="values to try")
    parser.add_argument("--merge", action="append", default=[], type=Path, metavar="RECORD", help="runs made elsewhere")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="per run, for training and for loading")
    parser.add_argument("--minutes", type=float, help="start no new run after this time")
    parser.add_argument("--device", default="cpu")
    resident = ("auto", "host", "device", "no")
    parser.add_argument(
        "--resident", choices=resident, default="auto", help="keep raw images in memory; auto: if they fit"
    )
    parser.add_argument("--channels-last", action="store_true", help="memory format; faster on most processors")
    parser.add_argument("--table", action="store_true", help="run nothing; write the outputs of the finished runs")
    options = parser.parse_args(arguments)
    options.cache = options.cache or options.out / "cache"
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    runs = plan(options)
    file = options.out / ("grid.json" if options.grid else "record.json")
    before = recorded(file, options.merge, runs, options.recipe.name)
    missing = [run for run in runs if run.key not in before]
    if options.resident == "auto" and missing and not options.table:
        mixed = max(missing, key=lambda run: "mix.preset=none" not in run.changes)
        recipe = Recipe.read(options.recipe, mixed.sets())
        options.resident = "host" if raw_fits(recipe, parts(recipe, options.data)) else "no"
    options.out.mkdir(parents=True, exist_ok=True)
    failed = [] if options.table else execute(missing, options)
    results = list((before | {run.key: run.result() for run in missing if run.finished}).values())
    if results and options.grid:
        write_grid(options, results)
    elif results:
        write_record(file, options.recipe.name, results)
        tables = f"{table(results)}\n{differences(results, BASELINE)}"
        (options.out / "table.md").write_text(tables)
        (options.out / "page.html").write_text(page(results, options.recipe.stem, BASELINE), encoding="utf-8")
        picture(results, options.out / "compare.png", BASELINE)
        print(tables, end="")
        print(f"see {options.out / 'page.html'}")
    unfinished = sum(not run.finished for run in missing)
    if failed:
        sys.exit(f"compare.py: {len(failed)} runs failed; see output.txt in their folders.")
    if unfinished:
        print(f"{unfinished} of {len(runs)} runs are not finished; run the same command again.")


if __name__ == "__main__":
    try:
        main()
    except DiffuseMixError as error:
        sys.exit(f"compare.py: {error}")
