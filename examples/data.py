"""A recipe's images for training, validation and testing, and the edits and fractals, which are made if missing.

Raw copies of images and edits, which loaders keep in memory, are made too if they are wanted.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from copies import CopyConfig
from recipe import Recipe

from dali_diffusemix import Catalog, DiffuseMixDataset, PackConfig, pack
from dali_diffusemix.base.memory import free_memory
from dali_diffusemix.catalog import Split, index, read_layout
from dali_diffusemix.errors import CatalogError, ConfigError, StoreError
from dali_diffusemix.fractals import render_bank
from dali_diffusemix.generate import GenerateConfig, generate
from dali_diffusemix.generate.engines.local import LocalEngine, default_devices
from dali_diffusemix.generate.quality import Thresholds
from dali_diffusemix.inspect.export import export
from dali_diffusemix.mix import IMAGENET

FEW = 512  # images; on a CPU their edits are made in this process, since starting others takes seconds


@dataclass(frozen=True)
class Parts:
    """The splits of a dataset. Splits made by the recipe share no image and no copy of its bytes."""

    root: Path  # of training images
    all_train: Catalog  # all training images; edits are made for them
    train: Catalog  # the ones to train on
    valid: Split
    test: Split


def hashes(root: Path, catalog: Catalog) -> list[bytes]:
    """Return the SHA-256 of every file."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda path: hashlib.sha256((root / path).read_bytes()).digest(), catalog.paths))


def shares(digests: list[bytes], seed: int, purpose: str) -> np.ndarray:
    """Return (n,) numbers in [0, 1), functions of the bytes, so copies stay together and new files move no other."""
    drawn = [hashlib.sha256(f"{seed} {purpose} ".encode() + digest).digest() for digest in digests]
    return np.array([int.from_bytes(one[:8], "big") / 2**64 for one in drawn])


def parts(recipe: Recipe, data: Path) -> Parts:
    """Divide a dataset as the recipe says.

    Raises ConfigError if a class is left without images or has fewer than the recipe wants, or if the dataset's own
    test images would be left out; and what `read_layout` raises.
    """
    rules = recipe.data
    own = [name for name in ("val", "test") if (data / "train").is_dir() and (data / name).is_dir()]
    if rules.test_share and rules.layout == "folder" and own:
        raise ConfigError(
            f"data.test_share must be 0 for a folder with {own[-1]}/, whose images would not be used, found "
            f"{rules.test_share}; set data.test_share=0 and data.test={own[-1]}, or give the folder train/ as the data."
        )
    root, everything = read_layout(rules.layout, data, rules.train)
    divided = rules.test_share > 0  # by the recipe, not by the dataset
    digests = hashes(root, everything) if divided or rules.held_out or rules.per_class else []
    rows = np.arange(len(everything))

    def some(chosen: np.ndarray, purpose: str) -> Catalog:
        if not len(chosen):
            raise ConfigError(f"data: no image is left for {purpose}; choose other shares.")
        return everything.take(chosen)

    if divided:
        for_test = shares(digests, rules.split_seed, "test") < rules.test_share
        test = Split(root, some(rows[for_test], "testing"))
        rows = rows[~for_test]
    else:
        try:
            test = read_layout(rules.layout, data, rules.test)
        except CatalogError as error:
            raise CatalogError(
                f"data.test is {rules.test!r}: {error} data.test names the split to test on; data.test_share takes a "
                "share of the training images instead."
            ) from error
        if test.catalog.classes != everything.classes:
            raise ConfigError(
                f"data.test: {rules.test!r} has {len(test.catalog.classes)} classes and {rules.train!r} has "
                f"{len(everything.classes)}, or others; they must be the same."
            )
    all_train, valid = some(rows, "training"), test
    if rules.held_out:
        held_out = shares(digests, rules.split_seed, "held out")[rows] < rules.held_out
        valid = Split(root, some(rows[held_out], "validation"))
        rows = rows[~held_out]
    if rules.per_class is not None:
        # Smaller training sets are subsets of larger ones.
        order = rows[np.argsort(shares(digests, rules.split_seed, "per class")[rows], kind="stable")]
        labels = everything.labels[order]
        counts = np.bincount(labels, minlength=len(everything.classes))
        if rules.per_class > counts.min():
            raise ConfigError(
                f"data.per_class must be at most {counts.min()}, the training images of "
                f"{everything.classes[counts.argmin()]!r} without those for testing and validation, found "
                f"{rules.per_class}."
            )
        chosen = [order[labels == label][: rules.per_class] for label in range(len(everything.classes))]
        rows = np.sort(np.concatenate(chosen))
    train = some(rows, "training")
    empty = np.flatnonzero(np.bincount(train.labels, minlength=len(train.classes)) == 0)
    if len(empty):
        raise ConfigError(
            f"data: no image of class {train.classes[empty[0]]!r} is left for training; choose other shares."
        )
    return Parts(root, all_train, train, valid, test)


RAW = PackConfig(format="raw")


def raw_fits(recipe: Recipe, found: Parts) -> bool:
    """Whether raw copies of images and edits take at most a quarter of the free memory."""
    needed = sum(RAW.bytes_of(one.sizes) or 0 for one in (found.all_train, found.test.catalog))
    if recipe.mix.preset != "none":
        edits = len(found.all_train) * len(recipe.edits.prompts) * recipe.edits.variants
        needed += 3 * recipe.edits.size**2 * edits
    return 4 * needed <= free_memory()


def pack_images(found: Parts, raw: Path) -> None:
    """Make raw copies of all images."""
    for name, root, catalog in (("train", found.root, found.all_train), ("test", found.test.root, found.test.catalog)):
        pack(root, raw / name, RAW, catalog=catalog)


def seconds_for_edits(cache: Path) -> float:
    """Return the time that making the edits of a cache has taken so far, in all runs."""
    file = cache / "seconds.json"
    return float(json.loads(file.read_text())["edits"]) if file.exists() else 0.0


def prepare(recipe: Recipe, found: Parts, cache: Path, raw: Path | None = None) -> None:
    """Make the edits and fractals of the recipe that the cache lacks. Resumes an interrupted run.

    Args:
        recipe: The recipe.
        found: Its images.
        cache: Where the edits and fractals go, and the raw copies of edits.
        raw: Where the raw copies of images go; None makes no raw copies.
    """
    if raw is not None:
        pack_images(found, raw)
    if recipe.mix.preset == "none":
        return
    wanted = recipe.edits
    config = GenerateConfig(
        editor=CopyConfig() if wanted.editor == "copy" else wanted.editor,
        prompts=wanted.prompts,
        size=wanted.size,
        edit_size=wanted.edit_size,
        resize=wanted.resize,
        variants=wanted.variants,
        seed=wanted.seed,
        thresholds=Thresholds(like=0.0) if wanted.editor == "copy" else Thresholds(),
    )

    shown = -1

    def show(done: int, total: int) -> None:
        nonlocal shown
        if done // 500 > shown or done == total:
            shown = done // 500
            print(f"edits {done:,} of {total:,}", flush=True)

    # `generate` by itself uses every GPU, but one core.
    many = len(found.all_train) > FEW
    engine = LocalEngine(default_devices(config.editor_config.accelerated)) if many else None
    summary = generate(found.root, cache / "edits", config, catalog=found.all_train, engine=engine, progress=show)
    if summary.made:
        seconds = round(seconds_for_edits(cache) + summary.seconds, 1)
        (cache / "seconds.json").write_text(json.dumps({"edits": seconds}) + "\n")
    if summary.missing:
        raise StoreError(f"{cache / 'edits'}: {summary.missing} shards are missing; run this again.")
    if not (cache / "fractals.npy").exists():
        bank = recipe.fractals
        render_bank(cache / "fractals.npy", count=bank.count, size=bank.size, seed=bank.seed)
    if recipe.mix.preset == "edits" and not (cache / "exported").is_dir():
        export(found.root, cache / "edits", cache / "exported.tmp")
        (cache / "exported.tmp").rename(cache / "exported")
    if raw is not None:
        if recipe.mix.preset == "edits":
            pack(cache / "exported", cache / "exported-raw", RAW, catalog=index(cache / "exported"))
        else:
            pack(cache / "edits", raw_edits(cache / "edits"), RAW)


def raw_edits(edits: Path) -> Path:
    """Return where the raw copies of an edit store are."""
    return edits.with_name(f"{edits.name}-raw")


def train_set(
    recipe: Recipe, found: Parts, *, edits: Path, fractals: Path, cache: Path, raw: Path | None = None
) -> DiffuseMixDataset:
    """Return the training set; with `raw`, of the raw copies that `prepare` made."""
    common = {
        "crop": recipe.crop.training(),
        "seed": recipe.train.seed,
        "augment": recipe.train.samples_augment,
        "on_error": recipe.data.on_error,
    }
    mix = recipe.mix.spec()
    if recipe.mix.preset == "edits":
        catalog = _exported(cache / "exported", found.train)
        return DiffuseMixDataset(cache / ("exported-raw" if raw else "exported"), catalog=catalog, **common)
    root = found.root if raw is None else raw / "train"
    if mix is None:
        return DiffuseMixDataset(root, catalog=found.train, **common)
    if raw is not None:
        edits = raw_edits(edits)
    for name, path in (("edits", edits), ("fractals", fractals)):
        if not path.exists():
            raise ConfigError(f"there are no {name} at {str(path)!r}; make them first, with --prepare and one process.")
    return DiffuseMixDataset(root, catalog=found.train, edits=edits, fractals=fractals, mix=mix, **common)


def _exported(folder: Path, originals: Catalog) -> Catalog:
    """Return a catalog of originals and edits as files: name.jpg, name.jpg.autumn.0.jpg."""
    everything, wanted = index(folder), set(originals.paths)
    rows = [row for row, path in enumerate(everything.paths) if path in wanted or path.rsplit(".", 3)[0] in wanted]
    return everything.take(rows)


def plain_set(recipe: Recipe, split: Split, *, normalize: bool = True, raw: Path | None = None) -> DiffuseMixDataset:
    """Return the images for validation or testing; `raw` is the folder of their raw copies."""
    return DiffuseMixDataset(
        split.root if raw is None else raw,
        catalog=split.catalog,
        crop=recipe.crop.evaluation(),
        normalize=IMAGENET if normalize else None,
        on_error=recipe.data.on_error,
    )
