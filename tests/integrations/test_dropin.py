"""docs/dropin.md: its tables name all that DataLoader has, what it says raises does, and its code runs."""

import functools
import inspect
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import training_set
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
    random_split,
)

from dali_diffusemix import (
    ConfigError,
    DiffuseMixDataset,
    DiffuseMixLoader,
    EvalCrop,
    FractalBank,
    TrainCrop,
    distinct,
)

pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")

TEXT = (Path(__file__).parents[2] / "docs" / "dropin.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def table(title: str) -> dict[str, tuple[str, str]]:
    """Name to (here, why)."""
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) ?\|$", section(title), flags=re.MULTILINE)
    return {name: (here, why) for name, here, why in rows}


def code(title: str) -> str:
    return re.findall(r"```python\n(.*?)```", section(title), flags=re.DOTALL)[0]  # type: ignore[no-any-return]


ARGUMENTS, ATTRIBUTES = table("Arguments"), table("Attributes")

CALLS = re.findall(r"^\| `(DataLoader\(.*\))` \| (.*?) \|$", section("Calls"), flags=re.MULTILINE)

# Arguments that the table says raise, with a value that does.
RAISING: dict[str, dict[str, Any]] = {
    "dataset": {"dataset": [1, 2, 3]},
    "batch_size": {"batch_size": None},
    "batch_sampler": {"batch_sampler": [[1]], "batch_size": 2},
    "collate_fn": {"collate_fn": torch.stack},
}


@pytest.fixture
def dataset(photos: Path) -> DiffuseMixDataset:
    return DiffuseMixDataset(photos, crop=EvalCrop(16))


def test_the_tables_name_all_that_dataloader_has() -> None:
    assert list(ARGUMENTS) == list(inspect.signature(DataLoader).parameters)
    assert set(ATTRIBUTES) == {name for name in dir(DataLoader([0])) if not name.startswith("_")}


def test_the_table_says_what_raises() -> None:
    assert {name for name, (here, why) in ARGUMENTS.items() if "**raises**" in here + why} == set(RAISING)


@pytest.mark.parametrize("name", RAISING)
def test_it_raises_and_says_what_to_use(name: str, dataset: DiffuseMixDataset) -> None:
    with pytest.raises(ConfigError) as caught:
        DiffuseMixLoader(**{"dataset": dataset, "device": "cpu", **RAISING[name]})
    message, (here, why) = str(caught.value), ARGUMENTS[name]
    assert name in message
    if "raises** unless" in here:  # the remedy of the message is the table's
        remedy = re.split(r"[,:;] ", why)[0]
        assert remedy.replace("by one kernel call", "").strip() in message or remedy.split(" by ")[0] in message


def seed_worker(worker: int) -> None:
    random.seed(torch.initial_seed() + worker)


def run(call: str, kind: str, new: Callable[[], tuple[DiffuseMixDataset, DiffuseMixDataset]], loader: Any) -> Any:
    """The batches of two epochs of a call, as a script makes it."""
    dataset, other = new()
    names = {"dataset": dataset, "other": other, "seed_worker": seed_worker, "g": torch.Generator().manual_seed(3)}
    names |= {"weights": [1.0, 5.0, 0.5] * 11, "DataLoader": loader, "default_collate": default_collate}
    names |= {one.__name__: one for one in (BatchSampler, DistributedSampler, RandomSampler, SequentialSampler)}
    names |= {one.__name__: one for one in (SubsetRandomSampler, WeightedRandomSampler)}
    names |= {one.__name__: one for one in (ConcatDataset, Subset, random_split)}
    if kind == "distinct" and loader is DataLoader:
        call = re.sub(r"sampler=(.*)\)$", r"sampler=distinct(\1))", call)
        names["distinct"] = distinct
    torch.manual_seed(11)
    made, found = eval(call, names), []
    for epoch in range(2):
        if loader is DataLoader:
            for one in (dataset, other):
                one.set_epoch(epoch)
        found.append([(images.clone(), labels.clone()) for images, labels in made])
    return found


@pytest.mark.filterwarnings("ignore:.*worker_init_fn is not called", "ignore:.*pin_memory")
@pytest.mark.parametrize(("call", "kind"), CALLS, ids=[f"{i}" for i in range(len(CALLS))])
def test_a_call_gives_what_dataloader_gives(call: str, kind: str, photos: Path, edits: Path, bank: FractalBank) -> None:
    def new() -> tuple[DiffuseMixDataset, DiffuseMixDataset]:
        mixed = DiffuseMixDataset(photos, edits=edits, fractals=bank, crop=TrainCrop(16), seed=5)
        return mixed, DiffuseMixDataset(photos, crop=EvalCrop(16), normalize=None, seed=6)

    ours = functools.partial(DiffuseMixLoader, device="cpu")
    if kind == "raises":
        with pytest.raises(ConfigError):
            run(call, kind, new, ours)
        return
    found, expected = run(call, kind, new, ours), run(call, kind, new, DataLoader)
    assert len(found[0]) == len(expected[0])
    if kind == "in order":
        found, expected = (
            [sorted(one, key=lambda batch: float(batch[0].sum())) for one in both] for both in (found, expected)
        )
    for epoch, (batches, theirs) in enumerate(zip(found, expected, strict=True)):
        for (images, labels), (their_images, their_labels) in zip(batches, theirs, strict=True):
            assert images.shape == their_images.shape and images.dtype == their_images.dtype, epoch
            assert labels.shape == their_labels.shape and labels.dtype == their_labels.dtype
            if kind != "own order":
                assert torch.equal(images, their_images) and torch.equal(labels, their_labels)
    if kind == "own order":
        if "drop_last" not in call:
            pixels = [[image.numpy().tobytes() for images, _ in epoch for image in images] for epoch in found]
            others = [[image.numpy().tobytes() for images, _ in epoch for image in images] for epoch in expected]
            assert [sorted(one) for one in pixels] == [sorted(one) for one in others] and pixels != others
    else:
        assert kind in ("same", "distinct", "in order")


def test_there_are_forty_calls() -> None:
    assert len(CALLS) >= 40 and len(set(CALLS)) == len(CALLS)


def test_neutral_values_and_dataloaders_defaults_are_taken(dataset: DiffuseMixDataset) -> None:
    """Whatever DataLoader is given that asks for nothing may stay where it is."""
    defaults = {n: p.default for n, p in inspect.signature(DataLoader).parameters.items() if n != "dataset"}
    loader = DiffuseMixLoader(dataset, device="cpu", **defaults)
    assert len(list(loader)) == 33


def test_attributes_are_as_the_table_says(dataset: DiffuseMixDataset) -> None:
    ours, theirs = DiffuseMixLoader(dataset, 4, device="cpu"), DataLoader(dataset, 4)
    for name, (here, _) in ATTRIBUTES.items():
        if here == "missing":
            assert not hasattr(ours, name)
        elif value := re.fullmatch(r"`(.*)`", here):
            assert getattr(ours, name) == eval(value[1])
        elif here == "the same":
            assert getattr(ours, name) == getattr(theirs, name)
        else:
            assert hasattr(ours, name)
    assert list(ours.sampler) == list(theirs.sampler) and list(ours.batch_sampler) == list(theirs.batch_sampler)
    assert ours.prefetch_factor is None and DiffuseMixLoader(dataset, num_workers=2).prefetch_factor == 2
    assert DiffuseMixLoader(dataset, batch_sampler=[[1, 2]], device="cpu").batch_size is None


def test_unknown_arguments_raise(dataset: DiffuseMixDataset) -> None:
    with pytest.raises(TypeError, match="nothing"):
        DiffuseMixLoader(dataset, device="cpu", **{"nothing": 3})


def run_resume(dataset: DiffuseMixDataset, checkpoint: Path, train: Callable[..., None]) -> None:
    model = torch.nn.Linear(2, 2)
    given = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1), "train": train}
    exec(code("Resume"), {**globals(), **given, "dataset": dataset, "checkpoint": checkpoint})


def test_the_resume_example(data: Path, tmp_path: Path) -> None:
    """Killed in every batch once: what was trained on is what was saved, and the rest the same."""
    whole: list[torch.Tensor] = []
    run_resume(training_set(data), tmp_path / "whole", lambda images, _: whole.append(images))
    assert len(whole) == 3 * 5
    seen: list[torch.Tensor] = []

    def train(images: torch.Tensor, labels: torch.Tensor) -> None:
        if len(seen) in alive:
            alive.remove(len(seen))
            raise KeyboardInterrupt
        seen.append(images)

    alive = set(range(15))
    while True:
        try:
            run_resume(training_set(data), tmp_path / "killed", train)
        except KeyboardInterrupt:
            continue
        break
    assert not alive and len(seen) == len(whole)
    assert all(torch.equal(a, b) for a, b in zip(seen, whole, strict=True))


def test_the_examples_of_repeats_and_parts(data: Path) -> None:
    names: dict[str, Any] = {**globals(), "dataset": training_set(data), "generator": torch.Generator().manual_seed(1)}
    exec(code("Repeats") + "\nfound = list(batches)", names)
    assert sum(len(images) for images, _ in names["found"]) == 40
    exec(code("Parts and targets"), names)
    assert len(names["few"]) == 10 and len(names["training"]) + len(names["validation"]) == 33


@pytest.mark.parametrize("title", ["Batch transforms", "timm"])
def test_the_other_examples(data: Path, title: str) -> None:
    names: dict[str, Any] = dict(globals())
    names |= {"dataset": training_set(data), "dataset_train": training_set(data), "dataset_eval": training_set(data)}
    exec(code(title), names)
    images, labels = next(iter(names["loader" if title == "Batch transforms" else "loader_train"]))
    assert images.shape == (8, 3, 24, 24)
    assert labels.shape == ((8, 3) if title == "Batch transforms" else (8,))
