"""Stores in which somebody or something has changed a value: every reader names it, or quarantines the image."""

import copy
import itertools
import json
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from dali_diffusemix import (
    Catalog,
    CatalogError,
    DiffuseMixDataset,
    DiffuseMixLoader,
    EvalCrop,
    MixSpec,
    StoreError,
    cli,
)
from dali_diffusemix.errors import ConfigError, DiffuseMixError
from dali_diffusemix.generate import GenerateConfig, generate
from dali_diffusemix.inspect.report import write_report
from dali_diffusemix.inspect.verify import verify
from dali_diffusemix.store import EditStore, OriginalStore
from dali_diffusemix.store.pack import PackConfig, pack

DEEP = "[" * 100_000 + "]" * 100_000
VALUES: list[Any] = [None, -1, 0, 10**30, 1.5, "x", "\ud800", [], {}, [[]], True, float("nan"), 2**31, -(2**63), DEEP]
CONFIG = GenerateConfig(prompts=("autumn", "snowy"), size=16, originals_per_shard=12)
PACKED = PackConfig(originals_per_shard=12)

pytestmark = pytest.mark.filterwarnings("ignore::dali_diffusemix.QuarantineWarning")


def make_stores(photos: Path, folder: Path) -> Path:
    generate(photos, folder / "edits", CONFIG)
    pack(photos, folder / "packed", PACKED)
    return folder


@pytest.fixture(scope="module")
def stores(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stores(photos, tmp_path_factory.mktemp("stores"))


def nodes(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON tree; of long lists the first ones."""
    yield path
    children = tree.items() if isinstance(tree, dict) else enumerate(tree[:3]) if isinstance(tree, list) else ()
    for key, child in children:
        yield from nodes(child, (*path, key))


def changed(tree: Any, path: tuple[Any, ...], value: Any) -> str:
    """The tree as JSON with another value at a place; `...` removes it."""
    if not path:
        tree = value
    else:
        tree = copy.deepcopy(tree)
        inside = tree
        for key in path[:-1]:
            inside = inside[key]
        if value is ...:
            del inside[path[-1]]
        else:
            inside[path[-1]] = value
    return json.dumps(tree).replace(f'"{DEEP}"', DEEP)


def readers(photos: Path, store: Path) -> dict[str, Callable[[], object]]:
    """All that reads a store."""

    def load() -> None:
        edits = None if store.name == "packed" else store
        mix = None if edits is None else MixSpec(probability=1, fractal_weight=0)
        root = store if edits is None else photos
        dataset = DiffuseMixDataset(root, edits=edits, mix=mix, crop=EvalCrop(16))
        for place in range(0, len(dataset), 5):
            dataset[place]

    ways: dict[str, Callable[[], object]] = {"verify": lambda: verify(store), "load": load}
    if store.name == "packed":
        return ways | {"pack": lambda: pack(photos, store, PACKED)}
    ways["report"] = lambda: write_report(store, store.with_name("report"), root=photos, most=10)
    return ways | {"generate": lambda: generate(photos, store, CONFIG)}


def tampered(stores: Path, here: Path, kind: str, file: Path, write: Callable[[Path], None]) -> Path:
    store = here / kind
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(stores / kind, store)
    write(store / file)
    return store


def check(photos: Path, store: Path, what: object) -> None:
    for name, read in readers(photos, store).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read()
            except ConfigError as error:
                assert "is not a prompt that" in str(error), (name, what)  # of a prompt that was exchanged
            except DiffuseMixError:
                pass
            except BaseException as error:
                error.add_note(f"{name} of {what}")
                raise


def exchange_values(photos: Path, stores: Path, here: Path, kind: str, *, first: int, every: int) -> int:
    """Another value at each `every`-th place of a store's JSON files, from the `first` on; how many that were."""
    values = itertools.cycle(random.Random(1).sample([*VALUES, ...], len(VALUES) + 1))
    places = [
        (file, path)
        for file in sorted((stores / kind).rglob("*.json"))
        if not file.name.endswith("000001.json")
        for path in nodes(json.loads(file.read_text()))
    ]
    for file, path in places[first::every]:
        value, tree, relative = next(values), json.loads(file.read_text()), file.relative_to(stores / kind)
        text = changed(tree, path, None if value is ... and not path else value)
        store = tampered(stores, here, kind, relative, lambda f, text=text: f.write_text(text))  # type: ignore[misc]
        check(photos, store, (str(relative), path, str(value)[:40]))
    return len(places[first::every])


@pytest.mark.parametrize("kind", ["edits", "packed"])
def test_any_value_in_any_json(photos: Path, stores: Path, tmp_path: Path, kind: str) -> None:
    """At every eighth place, from another on each time; `make soak` takes all."""
    assert exchange_values(photos, stores, tmp_path / "here", kind, first=random.randrange(8), every=8) > 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["edits", "packed"])
def test_any_number_in_any_table(photos: Path, stores: Path, tmp_path: Path, kind: str) -> None:
    rng = random.Random(2)
    for file in sorted((stores / kind).rglob("*.npy")):
        table = np.load(file)
        for name in table.dtype.names or (None,):
            now = table.copy()
            column = now.reshape(-1) if name is None else now[name]
            info = np.iinfo(column.dtype) if column.dtype.kind in "iu" else None
            column[rng.randrange(len(column))] = (
                float("nan") if info is None else rng.choice([info.min, info.max, 0, 70])
            )
            relative = file.relative_to(stores / kind)
            store = tampered(stores, tmp_path / "here", kind, relative, lambda f, now=now: np.save(f, now))  # type: ignore[misc]
            check(photos, store, (str(relative), name))


@pytest.mark.parametrize("column", ["width", "height", "length", "offset", "shard"])
@pytest.mark.parametrize("kind", ["edits", "packed"])
def test_a_negative_number_in_the_index_costs_one_image(
    photos: Path, stores: Path, tmp_path: Path, kind: str, column: str
) -> None:
    def write(file: Path) -> None:
        table = np.load(file)
        table[column][7] = -5
        np.save(file, table)

    store = tampered(stores, tmp_path / "here", kind, Path("index.npy"), write)
    edits = store if kind == "edits" else None
    mix = None if edits is None else MixSpec(epoch="expanded", fractal_weight=0)
    dataset = DiffuseMixDataset(photos if edits else store, edits=edits, mix=mix, crop=EvalCrop(16), normalize=None)
    for place in range(len(dataset)):
        dataset[place]
    # Sizes of a packed store are its catalog's.
    expected = 0 if kind == "packed" and column in ("width", "height") else 1
    assert len(dataset.quarantine) == expected
    pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")
    loader = DiffuseMixLoader(dataset, 8, device="cpu")
    assert sum(len(labels) for _, labels in loader) == len(dataset) and len(loader.quarantine) == expected
    assert any(problem.file == "index.npy" for problem in verify(store).problems)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", '{"magic": 3}', DEEP, "{" * 9, '{"magic": "dali_diffusemix.store"}']
)
@pytest.mark.parametrize("kind", ["edits", "packed"])
def test_verify_names_a_damaged_store(photos: Path, stores: Path, tmp_path: Path, kind: str, text: str) -> None:
    for options in ((), ("--discard",), ("--quick",), ("--json",)):
        store = tampered(
            stores, tmp_path / "here", kind, Path("store.json"), lambda file: file.write_text(text) and None
        )
        result = CliRunner().invoke(cli.main, ["verify", str(store), *options])
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
        assert "store.json" in result.output and "Error: " in result.output


def test_nested_too_deeply_is_named(stores: Path, tmp_path: Path) -> None:
    for kind, opened in (("edits", EditStore.open), ("packed", OriginalStore.open)):
        for name in ("store.json", "index.json", "catalog/catalog.json"):
            store = tampered(stores, tmp_path / "here", kind, Path(name), lambda file: file.write_text(DEEP) and None)
            with pytest.raises(StoreError, match="nested too deeply"):
                opened(store)
    (tmp_path / "catalog").mkdir()
    (tmp_path / "catalog" / "catalog.json").write_text(DEEP)
    with pytest.raises(CatalogError, match="nested too deeply"):
        Catalog.open(tmp_path / "catalog")
