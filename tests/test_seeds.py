"""The seed that nobody gives, in one process and in several; and what of a dataset cannot be changed."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from torch.utils.data import ConcatDataset

from dali_diffusemix import (
    ConfigError,
    DiffuseMixDataset,
    DiffuseMixLoader,
    EvalCrop,
    FractalBank,
    MixSpec,
    TrainCrop,
)

pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")


def test_the_seed_is_torchs(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    def first(seed: int | None) -> DiffuseMixDataset:
        return DiffuseMixDataset(photos, crop=TrainCrop(16), seed=seed)

    torch.manual_seed(2**40 + 123)
    with caplog.at_level(logging.INFO):
        one = first(None)
    assert one.seed == 123 and "The dataset's seed is 123, from torch.initial_seed()" in caplog.text
    torch.rand(5)
    assert first(None).seed == 123  # what was drawn since does not matter
    torch.manual_seed(124)
    other = first(None)
    assert torch.equal(one[3][0], first(123)[3][0]) and not torch.equal(one[3][0], other[3][0])
    orders = [list(DiffuseMixLoader(each, 4, shuffle=True, device="cpu").batch_sampler) for each in (one, other)]
    assert orders[0] != orders[1]
    assert repr(one).endswith(" 123, from torch")
    state = DiffuseMixLoader(one, 4, device="cpu").state_dict()
    assert state["seed"] == 123
    with pytest.raises(ConfigError, match="seed of the state is 123, here it is 124; give the dataset this seed"):
        DiffuseMixLoader(first(124), 4, device="cpu").load_state_dict(state)


@pytest.mark.parametrize("part", [False, True])
def test_a_run_without_seeds_resumes_as_it_began(photos: Path, caplog: pytest.LogCaptureFixture, part: bool) -> None:
    datasets = []

    def new(seed: int) -> DiffuseMixLoader:
        torch.manual_seed(seed)  # as if every process had another
        datasets.append(DiffuseMixDataset(photos, crop=TrainCrop(16)))
        given = datasets[-1].subset(range(33)) if part else datasets[-1]
        return DiffuseMixLoader(given, 4, shuffle=True, device="cpu")

    loader, batches, states = new(1), [], []
    for images, labels in loader:
        batches.append((images.clone(), labels))
        states.append(loader.state_dict())
    again = new(2)
    with pytest.raises(ConfigError, match="length of the state is 32, here it is 33"):
        again.load_state_dict({**states[3], "length": 32})
    assert datasets[-1].seed == 2
    with caplog.at_level(logging.INFO):
        again.load_state_dict(states[3])
    assert datasets[-1].seed == 1 and "seed is 1, from the state that is resumed; it was 2" in caplog.text
    assert again.state_dict() == states[3]
    for (images, labels), (expected, theirs) in zip(again, batches[4:], strict=True):
        assert torch.equal(images, expected) and torch.equal(labels, theirs)


RANK = """
import json, logging, sys
import torch
from torch import distributed
from torch.utils.data import ConcatDataset
from dali_diffusemix import ConfigError, DiffuseMixDataset, DiffuseMixLoader, TrainCrop
from dali_diffusemix.catalog import index

meeting, root, rank, case = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
torch.manual_seed(50 + rank)  # as scripts do it

def begin():
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)

def loader_of(seed=None, **options):
    dataset = DiffuseMixDataset(root, crop=TrainCrop(16), seed=seed)
    return DiffuseMixLoader(dataset, 5, device="cpu", return_index=True, **options)

def seen(loader):
    return [[i for *_, indices in loader for i in indices.tolist()] for _ in range(2)]

if case == "late":
    loader = loader_of(shuffle=True)
begin()
if case == "agree":
    first, second = loader_of(shuffle=True), loader_of(shuffle=True)
    if rank == 0:  # evaluation by one rank alone
        alone = loader_of(rank=0, world_size=1)
        assert sorted(seen(alone)[0]) == list(range(33))
        DiffuseMixLoader(DiffuseMixDataset(root, crop=TrainCrop(20)), 4, device="cpu")
    both = DiffuseMixDataset(root, crop=TrainCrop(16)), DiffuseMixDataset(root, crop=TrainCrop(16), seed=4)
    third = DiffuseMixLoader(ConcatDataset(both), 4, device="cpu")
    mine = index(root).take(range(rank, 33, 2))
    apart = DiffuseMixDataset(root, catalog=mine, crop=TrainCrop(16))  # originals of its own, with a sampler
    seen(DiffuseMixLoader(apart, 4, sampler=range(len(apart)), device="cpu", return_index=True))
    assert apart.seed == 50
    found = [seen(first), seen(second), first.dataset.seed, [one.seed for one in both]]
elif case == "late":
    found = [seen(loader), loader.dataset.seed, loader.state_dict()["seed"]]
else:
    try:
        found = list(loader_of(seed=60 + rank)) and "no error"
    except ConfigError as error:
        found = str(error)
print(json.dumps(found))
distributed.barrier() if case == "agree" else None
"""


def ranks(tmp_path: Path, photos: Path, case: str) -> list[tuple[Any, str]]:
    """What two processes found, and what they logged."""
    scripts = [warm.Script("-c", RANK, tmp_path / "meeting", photos, rank, case) for rank in range(2)]
    told = [script.communicate(timeout=90) for script in scripts]
    for output, errors in told:
        assert output, errors
    return [(json.loads(output.splitlines()[-1]), errors) for output, errors in told]


@pytest.mark.slow
def test_ranks_take_the_seed_of_rank_0(tmp_path: Path, photos: Path) -> None:
    (zero, log), (one, _) = ranks(tmp_path, photos, "agree")
    for mine, theirs in zip(zero[:2], one[:2], strict=True):
        for epoch, other in zip(mine, theirs, strict=True):
            assert sorted(epoch + other) == list(range(33))
    assert zero[2] == one[2] == 50 and zero[3] == one[3] == [50, 4]
    assert log.count("Rank 0 of 2 gets its share of each epoch, because torch.distributed is initialised") == 2
    assert "rank=0, world_size=1" in log


def test_seeds_that_differ_are_an_error_that_names_both(tmp_path: Path, photos: Path) -> None:
    (zero, _), (one, _) = ranks(tmp_path, photos, "given")
    assert zero == "no error"
    assert one.startswith("seed must be the same on all ranks: rank 0 has 60, rank 1 has 61; give the dataset one seed")


@pytest.mark.slow
def test_a_loader_from_before_the_ranks_met_takes_it_too(tmp_path: Path, photos: Path) -> None:
    """As with Lightning, whose Trainer starts the processes after it was given the loader."""
    (zero, _), (one, _) = ranks(tmp_path, photos, "late")
    assert [sorted(mine + theirs) for mine, theirs in zip(zero[0], one[0], strict=True)] == [list(range(33))] * 2
    assert zero[1:] == one[1:] == [50, 50]


# --- what cannot be changed


def test_what_decides_samples_cannot_be_changed(photos: Path, edits: Path, bank: FractalBank) -> None:
    dataset = DiffuseMixDataset(photos, crop=TrainCrop(16), edits=edits, fractals=bank, seed=1)
    values = {"mix": None, "crop": EvalCrop(16), "seed": 2, "normalize": None, "targets": [1] * 33, "augment": None}
    for name, value in values.items():
        with pytest.raises(ConfigError, match=f"{name} of a dataset cannot be changed.*make another dataset"):
            setattr(dataset, name, value)
    for name, recipe in (
        ("transform", "batch_transform=globally_seeded"),
        ("transforms", "batch_transform=globally_seeded"),
        ("target_transform", r"targets=\[target_transform\(label\)"),
    ):
        with pytest.raises(ConfigError, match=f"{name} must be left out.*{recipe}"):
            setattr(dataset, name, str)
    assert dataset.transform is None and dataset.mix == MixSpec.paper() and dataset.seed == 1
    dataset.owner = "a user's own attribute"  # type: ignore[attr-defined]


def test_image_folders_own_arguments_say_what_to_write(photos: Path) -> None:
    with pytest.raises(ConfigError, match=r"transform must be left out, found .*crop=TrainCrop"):
        DiffuseMixDataset(photos, str)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="target_transform must be left out, found"):
        DiffuseMixDataset(photos, target_transform=int, crop=EvalCrop(16))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"crop must be a TrainCrop, RandomCrop or EvalCrop, found None; write"):
        DiffuseMixDataset(photos, crop=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'crop'"):
        DiffuseMixDataset(photos)  # type: ignore[call-arg]
    assert DiffuseMixDataset(photos, crop=EvalCrop(16), transform=None).transform is None


def test_edits_are_mixed_unless_told_otherwise(photos: Path, edits: Path, bank: FractalBank) -> None:
    def mix_of(**options: Any) -> MixSpec | None:
        return DiffuseMixDataset(photos, crop=TrainCrop(16), **options).mix

    assert mix_of(edits=edits, fractals=bank) == MixSpec.paper()
    assert mix_of() is None and mix_of(edits=edits, fractals=bank, mix=None) is None
    assert mix_of(edits=edits, mix=MixSpec(fractal_weight=0)) == MixSpec(fractal_weight=0)
    with pytest.raises(ConfigError, match=r"give fractals=, or mix=MixSpec\(fractal_weight=0\)"):
        mix_of(edits=edits)
    with pytest.raises(ConfigError, match=r"mix must be a MixSpec or None, found 'paper'; write MixSpec.paper\(\)"):
        mix_of(edits=edits, mix="paper")


def test_a_concatenation_agrees_too(photos: Path) -> None:
    both = ConcatDataset([DiffuseMixDataset(photos, crop=EvalCrop(16), seed=seed) for seed in (1, 2)])
    assert DiffuseMixLoader(both, device="cpu").state_dict()["seed"] == 1
