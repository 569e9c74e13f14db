"""What torchdata's StatefulDataLoader promises of a loader without worker processes: by the real one and by ours."""

import copy
import io
import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import described, training_set
from torch.utils.data import BatchSampler, RandomSampler, Sampler

from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, EvalCrop

pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")
stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")
samplers = pytest.importorskip("torchdata.stateful_dataloader.sampler", reason="torchdata is not installed")

# Under StatefulDataLoader nobody tells the dataset the epoch, and these samples do not depend on it.
pytestmark = [
    pytest.mark.filterwarnings("ignore::dali_diffusemix.RepeatedEpochWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata 0.11 calls it
]

STEPS = 7  # of 33 samples in batches of 5


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(4)


class Rotation(Sampler[int]):
    """Each epoch starts one sample later. Its state is where it is: the epoch, and what it has given of it."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.epoch = self.given = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        while self.given < self.count:
            self.given += 1
            yield (self.epoch + self.given - 1) % self.count
        self.epoch, self.given = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.given = state["epoch"], state["given"]


ORDERS: dict[str, Callable[[DiffuseMixDataset], dict[str, Any]]] = {
    "in order": lambda dataset: {"batch_size": 5},
    "torchdata's RandomSampler": lambda dataset: {
        "batch_size": 5,
        "sampler": samplers.RandomSampler(dataset, generator=seeded()),
    },
    "batch sampler": lambda dataset: {
        "batch_sampler": samplers.BatchSampler(samplers.RandomSampler(dataset, generator=seeded()), 5, False)
    },
}
# StatefulDataLoader forgets the generator of PyTorch's own samplers; given one itself, the epochs after a resumed one
# are others than they would have been.
ONLY_OURS: dict[str, Callable[[DiffuseMixDataset], dict[str, Any]]] = {
    "shuffled by a generator": lambda dataset: {"batch_size": 5, "shuffle": True, "generator": seeded()},
    "shuffled": lambda dataset: {"batch_size": 5, "shuffle": True},
    "RandomSampler": lambda dataset: {"batch_size": 5, "sampler": RandomSampler(dataset, generator=seeded())},
    "PyTorch's batch sampler": lambda dataset: {
        "batch_sampler": BatchSampler(RandomSampler(dataset, generator=seeded()), 5, False)
    },
}
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def dataset(photos: Path) -> DiffuseMixDataset:
    return DiffuseMixDataset(photos, crop=EvalCrop(16), normalize=None)


CASES = [
    *(pytest.param(("theirs", order), id=f"theirs, {order}", marks=pytest.mark.slow) for order in ORDERS),
    *(pytest.param(("ours", order), id=f"ours, {order}") for order in {**ORDERS, **ONLY_OURS}),
]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def make(case: tuple[str, str], dataset: DiffuseMixDataset) -> Make:
    """Makes the same loader again, of either kind."""
    whose, order = case

    def make(**options: Any) -> Any:
        options = {**{**ORDERS, **ONLY_OURS}[order](dataset), **options}
        if whose == "ours":
            return DiffuseMixLoader(dataset, device="cpu", **options)
        return stateful.StatefulDataLoader(dataset, **options)

    return make


def seen(batches: Any) -> list[Any]:
    return [described(images, labels) for images, labels in batches]


def after(loader: Any, epochs: int, steps: int) -> Any:
    """The loader's state after so many epochs and steps."""
    for _ in range(epochs):
        seen(loader)
    batches = iter(loader)
    for _ in range(steps):
        next(batches)
    return loader.state_dict()


@pytest.fixture(scope="module")
def whole(make: Make) -> list[list[Any]]:
    loader = make()
    return [seen(loader) for _ in range(3)]


def test_theirs_and_ours_agree(dataset: DiffuseMixDataset) -> None:
    for order, options in ORDERS.items():
        theirs = stateful.StatefulDataLoader(dataset, **options(dataset))
        ours = DiffuseMixLoader(dataset, device="cpu", **options(dataset))
        for epoch in range(3):
            assert seen(ours) == seen(theirs), (order, epoch)


def test_a_state_before_the_first_iter(make: Make, whole: list[list[Any]]) -> None:
    first = make()
    state = first.state_dict()
    assert seen(first) == whole[0]
    resumed = make()
    resumed.load_state_dict(state)
    assert seen(resumed) == whole[0]
    assert seen(resumed) == whole[1]


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_state_within_an_epoch(make: Make, whole: list[list[Any]], epochs: int) -> None:
    first = make()
    for _ in range(epochs):
        seen(first)
    batches = iter(first)
    for steps in range(1, STEPS):
        next(batches)
        resumed = make()
        resumed.load_state_dict(copy.deepcopy(first.state_dict()))
        assert seen(resumed) == whole[epochs][steps:], steps
        if steps in (1, STEPS - 1):
            assert seen(resumed) == whole[epochs + 1], steps


def test_a_state_after_an_epoch(make: Make, whole: list[list[Any]]) -> None:
    first = make()
    seen(first)
    resumed = make()
    resumed.load_state_dict(first.state_dict())
    assert seen(resumed) == whole[1]


def test_loading_after_iter(make: Make, whole: list[list[Any]]) -> None:
    state = after(make(), 0, 3)
    loader = make()
    batches = iter(loader)
    next(batches)
    loader.load_state_dict(state)
    assert seen(loader) == whole[0][3:]


def test_loading_twice(make: Make, whole: list[list[Any]]) -> None:
    loader = make()
    loader.load_state_dict(after(make(), 0, 3))
    loader.load_state_dict(after(make(), 0, 5))
    assert seen(loader) == whole[0][5:]


def test_one_state_serves_several_loaders(make: Make, whole: list[list[Any]]) -> None:
    state = after(make(), 0, 4)
    for _ in range(2):
        loader = make()
        loader.load_state_dict(state)
        assert seen(loader) == whole[0][4:]


def test_a_state_of_a_resumed_loader(make: Make, whole: list[list[Any]]) -> None:
    state = after(make(), 0, 2)
    for steps in (4, 5, 6):
        loader = make()
        loader.load_state_dict(state)
        batches = iter(loader)
        for _ in range(steps - 2):
            next(batches)
        resumed = make()
        resumed.load_state_dict(loader.state_dict())
        assert seen(resumed) == whole[0][steps:]


def test_a_state_does_not_change_later(make: Make, whole: list[list[Any]]) -> None:
    loader = make()
    batches = iter(loader)
    states = []
    for _ in range(4):
        next(batches)
        state = loader.state_dict()
        states.append((state, copy.deepcopy(state)))
    seen(batches)
    seen(loader)
    for steps, (state, copied) in enumerate(states, 1):
        for one in (state, copied):
            resumed = make()
            resumed.load_state_dict(one)
            assert seen(resumed) == whole[0][steps:]


def test_a_state_can_be_stored(make: Make, whole: list[list[Any]]) -> None:
    state = after(make(), 0, 3)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    for stored in (torch.load(file, weights_only=True), pickle.loads(pickle.dumps(state))):
        resumed = make()
        resumed.load_state_dict(stored)
        assert seen(resumed) == whole[0][3:]


# --- ours alone


@pytest.fixture(params=[*ORDERS, *ONLY_OURS])
def ours(request: pytest.FixtureRequest, dataset: DiffuseMixDataset) -> Make:
    def make(**options: Any) -> DiffuseMixLoader:
        return DiffuseMixLoader(dataset, device="cpu", **{**{**ORDERS, **ONLY_OURS}[request.param](dataset), **options})

    return make


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(one[k], other[k]) if torch.is_tensor(one[k]) else one[k] == other[k] for k in one | other)


def test_a_loaded_state_is_the_state(ours: Make) -> None:
    state = after(ours(), 1, 3)
    loader = ours()
    loader.load_state_dict(state)
    assert same(loader.state_dict(), state)
    batches = iter(loader)
    assert same(loader.state_dict(), state)
    next(batches)
    assert not same(loader.state_dict(), state)


def test_after_the_last_batch_the_state_is_the_next_epochs(ours: Make) -> None:
    """StatefulDataLoader's becomes so one `next` later: resumed from its, a loop runs zero times first."""
    loader = ours()
    state = after(loader, 0, STEPS)
    whole = ours()
    seen(whole)
    resumed = ours()
    resumed.load_state_dict(state)
    assert seen(resumed) == seen(whole)


def test_threads_and_read_ahead_may_change(ours: Make) -> None:
    whole = seen(ours())
    state = after(ours(num_workers=3, prefetch_factor=4), 0, 3)
    for options in ({"num_workers": 0}, {"num_workers": 1, "prefetch_factor": 1}, {"num_workers": 4}):
        resumed = ours(**options)
        resumed.load_state_dict(state)
        assert seen(resumed) == whole[3:]


def test_nothing_is_made_twice(ours: Make) -> None:
    resumed = ours()
    resumed.load_state_dict(after(ours(), 0, 5))
    seen(resumed)
    assert (resumed.stats().batches, resumed.stats().images) == (2, 33 - 25)


def test_the_state_is_the_newest_iterators(dataset: DiffuseMixDataset) -> None:
    loader = DiffuseMixLoader(dataset, 5, shuffle=True, device="cpu")
    outer = iter(loader)
    next(outer)
    inner = iter(loader)
    next(inner)
    next(inner)
    assert (loader.state_dict()["epoch"], loader.state_dict()["places"]) == (1, 10)
    next(outer)
    assert (loader.state_dict()["epoch"], loader.state_dict()["places"]) == (1, 10)


def test_the_state_of_the_loaders_own_order_is_json(dataset: DiffuseMixDataset) -> None:
    for options in ({}, {"shuffle": True}):
        state = after(DiffuseMixLoader(dataset, 5, device="cpu", **options), 0, 2)  # type: ignore[arg-type]
        assert json.loads(json.dumps(state)) == state


def test_mixed_samples_go_on_as_under_statefuldataloader(data: Path) -> None:
    """StatefulDataLoader over the same dataset, told the epoch, and the loader: the same batches after resuming."""

    def options() -> dict[str, Any]:
        return {"batch_size": 5, "sampler": samplers.RandomSampler(range(33), generator=seeded())}

    found = []
    for kind in ("theirs", "ours"):
        dataset = training_set(data)

        def make(dataset: DiffuseMixDataset = dataset, kind: str = kind) -> Any:
            if kind == "ours":
                return DiffuseMixLoader(dataset, device="cpu", **options())
            return stateful.StatefulDataLoader(dataset, **options())

        loader = make()
        seen(loader)
        dataset.set_epoch(1)
        state = after(loader, 0, 3)
        resumed = make()
        resumed.load_state_dict(state)
        dataset.set_epoch(1)
        found.append(seen(resumed))
    assert found[0] == found[1] and len(found[0]) == STEPS - 3


def resumable(dataset: DiffuseMixDataset, sampler: Callable[[], Sequence[int]]) -> None:
    whole = DiffuseMixLoader(dataset, 5, sampler=sampler(), device="cpu")
    epochs = [seen(whole) for _ in range(3)]
    for epoch in (0, 1):
        for steps in (0, 3, 6):
            resumed = DiffuseMixLoader(dataset, 5, sampler=sampler(), device="cpu")
            resumed.load_state_dict(after(DiffuseMixLoader(dataset, 5, sampler=sampler(), device="cpu"), epoch, steps))
            assert seen(resumed) == epochs[epoch][steps:], (epoch, steps)
            assert seen(resumed) == epochs[epoch + 1], (epoch, steps)


def test_a_sampler_whose_state_is_its_place(dataset: DiffuseMixDataset) -> None:
    resumable(dataset, lambda: Rotation(33))  # type: ignore[arg-type, return-value]


def test_torchdatas_distributed_sampler(dataset: DiffuseMixDataset) -> None:
    resumable(dataset, lambda: samplers.StatefulDistributedSampler(dataset, num_replicas=1, rank=0))  # type: ignore[no-any-return]
