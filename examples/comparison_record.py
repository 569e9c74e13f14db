"""The record of a comparison: a JSON file with the recipe's settings and every run. Records of one comparison merge."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipe import Recipe, difference

import dali_diffusemix
from dali_diffusemix.bench import machine
from dali_diffusemix.errors import ConfigError

Result = dict[str, Any]
Settings = dict[str, dict[str, Any]]

OF_RUNS = (("data", "per_class"), ("train", "epochs"), ("train", "updates"), ("train", "seed"))
"""Fields that may differ between the runs of a comparison, beside those of its methods and grid."""


def settings(recipe: Recipe, grid: Sequence[str]) -> Settings:
    """Return what all runs of a comparison have in common, as JSON stores it.

    Args:
        recipe: The recipe with the changes that are for all runs.
        grid: Fields, such as "train.lr", that a grid varies.
    """
    varied = {*OF_RUNS, *(tuple(name.split(".")) for name in grid)}
    tables = {
        section: {name: value for name, value in fields.items() if (section, name) not in varied}
        for section, fields in recipe.tables().items()
    }
    found: Settings = json.loads(json.dumps(tables))
    return found


def name_of(result: Mapping[str, Any]) -> str:
    """Name a run as messages do."""
    values = "".join(f", {name}={value}" for name, value in result.get("grid", {}).items())
    return f"{result['images_per_class']} a class, {result['method']}{values}, seed {result['seed']}"


def read(file: Path, recipe: str, common: Settings) -> list[Result]:
    """Return the runs of a record.

    Args:
        file: The record.
        recipe: The file name of the comparison's recipe.
        common: Its `settings`.

    Raises:
        ConfigError: The file is no record, or one of a comparison with other settings.
    """
    try:
        record = json.loads(file.read_text())
        found, of, runs = record["recipe"], record.get("settings"), record["runs"]
        for one in runs:
            name_of(one), one["changes"], one["updates"]
    except FileNotFoundError as error:
        raise ConfigError(f"--merge: there is no record {str(file)!r}.") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{str(file)!r} is no record of a comparison ({type(error).__name__}: {error}); give a record.json that "
            "compare.py has written."
        ) from error
    if found != recipe:
        raise ConfigError(f"{str(file)!r} is of the recipe {found}, not of {recipe}.")
    if of is None:
        raise ConfigError(
            f"{str(file)!r} does not tell its recipe's settings: an older version wrote it. Make the comparison with "
            "another --out."
        )
    if differs := difference(of, common):
        name, there, here = differs
        raise ConfigError(
            f"{str(file)!r} is a comparison with other settings: {name} is {there!r} there and {here!r} here. Runs of "
            "both cannot be compared; give the same recipe and --set, or another --out."
        )
    return list(runs)


def check_together(runs: Sequence[Result], where: str) -> None:
    """Raise ConfigError if runs are not of one comparison: other updates, changes or test images.

    Args:
        runs: Finished ones and those that are to be made; the latter have no test images yet.
        where: Which records they are from, for the message.
    """
    updates: dict[str, int] = {}
    changes: dict[str, list[str]] = {}
    tested: set[tuple[Any, ...]] = set()
    for one in runs:
        images = one["images_per_class"]
        if "grid" not in one and updates.setdefault(images, one["updates"]) != one["updates"]:
            raise ConfigError(
                f"{where}: all runs of a training set must have the same number of updates, found "
                f"{updates[images]:,} and {one['updates']:,} for {images} images a class; give the same --sets, or "
                "another --out."
            )
        name = f"{name_of(one)}, {one['updates']:,} updates" if "grid" in one else name_of(one)
        if changes.setdefault(name, one["changes"]) != one["changes"]:
            raise ConfigError(
                f"{where}: {name}, has the changes {changes[name]} and {one['changes']}; give another --out."
            )
        if "test_fingerprint" in one:
            tested.add((one["test_images"], one["test_fingerprint"]))
    if len(tested) > 1:
        raise ConfigError(f"{where}: the runs are of different test images; compare them apart, with another --out.")


def write(file: Path, recipe: str, common: Settings, runs: Sequence[Result]) -> None:
    """Write a record, a line for each run; completely or not at all."""
    record = {
        "machine": {**machine(), "command": sys.argv},
        "version": dali_diffusemix.__version__,
        "recipe": recipe,
        "settings": common,
        "runs": "RUNS",
    }
    rows = ",\n  ".join(json.dumps(one) for one in runs)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1).replace('"RUNS"', f"[\n  {rows}\n ]") + "\n")
    temporary.replace(file)
