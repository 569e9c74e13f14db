"""samplers: a loader's own order on its ranks, and a user's sampler as DataLoader takes it."""

import io
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from test_protocol import delivered, loader_of
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, ResumeWarning

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
        seen = set[int]()
        for found, found_labels, indices in batches:
            assert torch.equal(found_labels, labels[indices])
            for image, index in zip(found, indices.tolist(), strict=True):  # what comes again has another crop
                assert torch.equal(image, images[index]) == (index not in seen)
                seen.add(index)


def test_a_sampler_gives_whole_numbers(dataset: DiffuseMixDataset) -> None:
    """As DataLoader wants them: 1.7 is no index."""
    for wrong in (1.7, "3", torch.tensor(2.9)):
        with pytest.raises(TypeError):
            next(iter(DiffuseMixLoader(dataset, device="cpu", sampler=[wrong])))  # type: ignore[list-item]
    batch = next(iter(DiffuseMixLoader(dataset, device="cpu", sampler=[torch.tensor(2)], return_index=True)))  # type: ignore[list-item]
    assert batch[2].tolist() == [2]


class Shuffled(Sampler[int]):
    """As many scripts have it: an order drawn from a global generator."""

    def __init__(self, draw: Callable[[], list[int]]) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return 33

    def __iter__(self) -> Iterator[int]:
        return iter(self.draw())


def by_python() -> list[int]:
    order = list(range(33))
    random.shuffle(order)
    return order


GLOBAL: dict[str, Callable[[DiffuseMixDataset], Any]] = {
    "RandomSampler": lambda dataset: RandomSampler(dataset),
    "with replacement": lambda dataset: RandomSampler(dataset, replacement=True, num_samples=50),
    "SubsetRandomSampler": lambda dataset: SubsetRandomSampler(range(30)),
    "WeightedRandomSampler": lambda dataset: WeightedRandomSampler([1.0, 2.0, 3.0] * 11, 40),
    "NumPy": lambda dataset: Shuffled(lambda: np.random.permutation(33).tolist()),
    "Python": lambda dataset: Shuffled(by_python),
}


@pytest.mark.parametrize("kind", GLOBAL)
def test_a_sampler_without_a_generator_is_dataloaders_and_resumes(dataset: DiffuseMixDataset, kind: str) -> None:
    """Nearly every public script has one. Whatever else is drawn meanwhile changes nothing, and is not changed."""

    def seed() -> None:
        torch.manual_seed(9)
        np.random.seed(9)
        random.seed(9)

    def epoch(loader: Any) -> Iterator[list[int]]:
        for *_, indices in loader:
            yield indices.tolist()
            random.random(), np.random.random(), torch.rand(3)  # what training draws

    def new() -> DiffuseMixLoader:
        return DiffuseMixLoader(dataset, 6, sampler=GLOBAL[kind](dataset), device="cpu", return_index=True)

    seed()
    theirs = DataLoader([(0, i) for i in range(33)], 6, sampler=GLOBAL[kind](dataset))  # type: ignore[arg-type]
    expected = [list(epoch(theirs)) for _ in range(2)]
    seed()
    loader, found, states = new(), [], []
    for _ in range(2):
        found.append([])
        for batch in epoch(loader):
            found[-1].append(batch)
            states.append(loader.state_dict())
    assert found == expected
    for step in (0, 2, len(found[0]), len(found[0]) + 3):
        torch.manual_seed(step)  # a new process
        random.seed(step)
        again = new()
        buffer = io.BytesIO()
        torch.save(states[step], buffer)
        buffer.seek(0)
        again.load_state_dict(torch.load(buffer, weights_only=True))
        batches = iter(again)
        first = next(batches)[2].tolist()
        assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(step).get_state())
        number, place = divmod(step + 1, len(found[0]))
        assert [first, *(one.tolist() for *_, one in batches)] == found[number][place:]


def test_an_order_that_cannot_be_drawn_again_is_said(dataset: DiffuseMixDataset) -> None:
    orders = iter([list(range(33)), list(range(32, -1, -1))])
    loader = DiffuseMixLoader(dataset, 5, sampler=Shuffled(lambda: next(orders)), device="cpu")
    next(iter(loader))
    state = loader.state_dict()
    loader.load_state_dict(state)
    with pytest.warns(ResumeWarning, match="The sampler gives another order than the interrupted epoch had"):
        next(iter(loader))
    with pytest.warns(ResumeWarning, match="The state does not hold what redraws its epoch"):
        loader.load_state_dict({**state, "sampler": None})


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
