"""samplers: a loader's own order on its ranks, and a user's sampler as DataLoader takes it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_protocol import delivered, loader_of
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader

pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")


def samples(dataset: DiffuseMixDataset, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    dataset.set_epoch(epoch)
    images, labels = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    return torch.stack(images), torch.tensor(labels)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_samplers_indices_are_those_of_a_list(dataset: DiffuseMixDataset) -> None:
    count = len(dataset)
    loader = loader_of(dataset, 2, sampler=[0, -1, -count, count - 1], return_index=True)
    assert [indices.tolist() for _, _, indices in loader] == [[0, count - 1], [0, count - 1]]
    for index in (count, -count - 1):
        with pytest.raises(IndexError, match=f"index {index} is out of range for a dataset of {count} samples"):
            list(loader_of(dataset, sampler=[0, index]))


@pytest.mark.parametrize("kind", ["random", "subset", "weighted", "list", "batches", "uneven batches", "generator"])
def test_the_order_is_the_one_that_dataloader_has(dataset: DiffuseMixDataset, kind: str) -> None:
    def options() -> dict[str, Any]:
        return {
            "random": lambda: {"sampler": RandomSampler(dataset, generator=seeded(1)), "batch_size": 5},
            "subset": lambda: {"sampler": SubsetRandomSampler(range(3, 20), generator=seeded(1)), "batch_size": 4},
            "weighted": lambda: {"sampler": WeightedRandomSampler([1, 0, 2] * 11, 29, generator=seeded(1))},
            "list": lambda: {"sampler": [4, 4, 0, 32, 7], "batch_size": 2, "drop_last": True},
            "batches": lambda: {"batch_sampler": BatchSampler(RandomSampler(dataset, generator=seeded(1)), 7, False)},
            "uneven batches": lambda: {"batch_sampler": [[0], [1, 2, 3], [4] * 9, [5, 6]]},
            "generator": lambda: {"shuffle": True, "generator": seeded(5), "batch_size": 6},
        }[kind]()

    ours = DiffuseMixLoader(dataset, device="cpu", return_index=True, **options())
    theirs = DataLoader([(i, 0) for i in range(len(dataset))], **options())  # type: ignore[arg-type]
    assert len(ours) == len(theirs)
    for epoch in range(3):
        images, labels = samples(dataset, epoch)
        batches, expected = list(ours), list(theirs)
        assert [indices.tolist() for _, _, indices in batches] == [indices.tolist() for indices, _ in expected]
        for found, found_labels, indices in batches:
            assert torch.equal(found, images[indices]) and torch.equal(found_labels, labels[indices])


def test_a_sampler_gives_whole_numbers(dataset: DiffuseMixDataset) -> None:
    """As DataLoader wants them: 1.7 is no index."""
    for wrong in (1.7, "3", torch.tensor(2.9)):
        with pytest.raises(TypeError):
            next(iter(DiffuseMixLoader(dataset, device="cpu", sampler=[wrong])))  # type: ignore[list-item]
    batch = next(iter(DiffuseMixLoader(dataset, device="cpu", sampler=[torch.tensor(2)], return_index=True)))  # type: ignore[list-item]
    assert batch[2].tolist() == [2]


@pytest.mark.parametrize("kind", ["generator", "random", "batches"])
def test_resume_with_a_users_sampler(dataset: DiffuseMixDataset, kind: str) -> None:
    def new() -> DiffuseMixLoader:
        options: dict[str, Any] = {
            "generator": lambda: {"shuffle": True, "generator": seeded(1), "batch_size": 5},
            "random": lambda: {"sampler": RandomSampler(dataset, generator=seeded(1)), "batch_size": 5},
            "batches": lambda: {"batch_sampler": [[0, 1], [5] * 4, [7], [9, 9, 9], [3]]},
        }[kind]()
        return DiffuseMixLoader(dataset, device="cpu", return_index=True, **options)

    loader, steps, states = new(), [], []
    for _ in range(2):
        for batch in loader:
            steps.append(batch)
            states.append(loader.state_dict())
    whole, per_epoch = delivered(iter(steps)), len(loader)
    for step, state in enumerate(states[:-1], start=1):
        again = new()
        again.load_state_dict(state)
        assert delivered(iter(again)) == whole[step : (step // per_epoch + 1) * per_epoch]


def test_an_error_ahead_loses_no_batch(dataset: DiffuseMixDataset) -> None:
    """A sampler that fails while later batches are asked for: the state is after the last batch that was delivered."""

    def indices() -> Iterator[int]:
        yield from range(20)
        raise OSError("no more indices")

    class Failing(list[int]):
        def __iter__(self) -> Iterator[int]:
            return indices()

    loader = loader_of(dataset, 2, sampler=Failing(range(20)), return_index=True, prefetch_factor=1)
    seen: list[int] = []
    with pytest.raises(OSError, match="no more indices"):
        for _, _, delivered_now in loader:
            seen += delivered_now.tolist()
    assert seen and loader.state_dict()["places"] == len(seen) and seen == list(range(len(seen)))


# --- ranks


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_the_global_batches(dataset: DiffuseMixDataset, world_size: int, drop_last: bool) -> None:
    options = {"shuffle": True, "return_index": True, "drop_last": drop_last}
    alone = [i.tolist() for _, _, i in loader_of(dataset, 30 // world_size * world_size, **options)]
    ranks = [
        [i.tolist() for _, _, i in loader_of(dataset, 30 // world_size, rank=r, world_size=world_size, **options)]
        for r in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    together = [[i for part in parts for i in part] for parts in zip(*ranks, strict=True)]
    if not drop_last and world_size == 5:  # the last 3 are filled up to 5, from the epoch's start
        assert together[-1][:3] == alone[-1] and together[-1][3:] == alone[0][:2]
        together, alone = together[:-1], alone[:-1]
    assert together == alone
