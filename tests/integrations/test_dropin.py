"""docs/dropin.md: its tables name all that DataLoader has, what it says raises does, and its code runs."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import training_set
from torch.utils.data import DataLoader, RandomSampler

from dali_diffusemix import ConfigError, DiffuseMixDataset, DiffuseMixLoader, EvalCrop

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

# Arguments that the table says raise, with a value that does.
RAISING: dict[str, dict[str, Any]] = {
    "dataset": {"dataset": [1, 2, 3]},
    "batch_size": {"batch_size": None},
    "batch_sampler": {"batch_sampler": [[1]], "batch_size": 2},
    "collate_fn": {"collate_fn": torch.stack},
    "pin_memory": {"pin_memory": True},
    "timeout": {"timeout": 5},
    "worker_init_fn": {"worker_init_fn": print},
    "multiprocessing_context": {"multiprocessing_context": "spawn"},
    "persistent_workers": {"persistent_workers": True},
    "pin_memory_device": {"pin_memory_device": "cuda"},
    "in_order": {"in_order": False},
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


def test_every_other_argument_is_taken(dataset: DiffuseMixDataset) -> None:
    values: dict[str, dict[str, Any]] = {
        "shuffle": {"shuffle": True},
        "sampler": {"sampler": RandomSampler(dataset)},
        "num_workers": {"num_workers": 2},
        "drop_last": {"drop_last": True},
        "generator": {"generator": torch.Generator()},
        "prefetch_factor": {"prefetch_factor": 3},
    }
    assert set(values) == set(ARGUMENTS) - set(RAISING)
    for options in values.values():
        DiffuseMixLoader(dataset, device="cpu", **options)


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
    assert ours.prefetch_factor == 2
    assert DiffuseMixLoader(dataset, batch_sampler=[[1, 2]], device="cpu").batch_size is None


def test_unknown_arguments_raise(dataset: DiffuseMixDataset) -> None:
    for name in ("snapshot_every_n_steps", "nothing"):
        with pytest.raises((TypeError, ConfigError), match=name):
            DiffuseMixLoader(dataset, device="cpu", **{name: 3})


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


@pytest.mark.parametrize("title", ["Batch transforms", "timm"])
def test_the_other_examples(data: Path, title: str) -> None:
    names: dict[str, Any] = dict(globals())
    names |= {"dataset": training_set(data), "dataset_train": training_set(data), "dataset_eval": training_set(data)}
    exec(code(title), names)
    images, labels = next(iter(names["loader" if title == "Batch transforms" else "loader_train"]))
    assert images.shape == (8, 3, 24, 24)
    assert labels.shape == ((8, 3) if title == "Batch transforms" else (8,))
