"""parts: Subset, ConcatDataset, splits, folds, targets and repeated indices, in the loader and in DataLoader."""

import pickle
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from material import write_photograph
from torch.utils.data import ConcatDataset, DataLoader, Sampler, Subset, WeightedRandomSampler, random_split

from dali_diffusemix import (
    Catalog,
    ConfigError,
    DiffuseMixDataset,
    DiffuseMixLoader,
    DiffuseMixSubset,
    EvalCrop,
    FractalBank,
    MixSpec,
    TrainCrop,
    distinct,
)

pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")


def batches_of(dataset: Any, *epochs: int, **options: Any) -> list[tuple[torch.Tensor, ...]]:
    """The loader's batches of these epochs."""
    loader = DiffuseMixLoader(dataset, 7, **{"device": "cpu", "num_workers": 2, **options})
    found = []
    for epoch in epochs or (0,):
        loader.set_epoch(epoch)
        found += [tuple(part.clone() for part in batch) for batch in loader]
    return found


def theirs(dataset: Any, *epochs: int, **options: Any) -> list[tuple[torch.Tensor, ...]]:
    """DataLoader's."""
    found = []
    for epoch in epochs or (0,):
        for one in dataset.datasets if isinstance(dataset, ConcatDataset) else [dataset]:
            while isinstance(one, Subset):
                one = one.dataset
            one.set_epoch(epoch)
        found += list(DataLoader(dataset, 7, **options))
    return found


def same(found: list[Any], expected: list[Any]) -> bool:
    return len(found) == len(expected) and all(
        torch.equal(a, b) and a.dtype == b.dtype
        for one, other in zip(found, expected, strict=True)
        for a, b in zip(one, other, strict=True)
    )


@pytest.fixture
def expanded(photos: Path, edits: Path, bank: FractalBank) -> DiffuseMixDataset:
    """33 originals and 66 edits."""
    return DiffuseMixDataset(photos, crop=TrainCrop(16), mix=MixSpec.release(), edits=edits, fractals=bank, seed=8)


# --- parts


@pytest.mark.slow
def test_a_part_is_in_the_loader_what_it_is_in_dataloader(
    dataset: DiffuseMixDataset, expanded: DiffuseMixDataset, photos: Path
) -> None:
    plain = DiffuseMixDataset(photos, crop=EvalCrop(24), normalize=((0.5,) * 3, (0.2,) * 3), seed=1)
    for part in (
        Subset(dataset, [3, -1, 30]),
        Subset(Subset(dataset, range(10, 30)), torch.tensor([4, 2, 19])),  # type: ignore[arg-type]
        random_split(dataset, [0.7, 0.3])[0],
        ConcatDataset([dataset, plain]),
        ConcatDataset([Subset(plain, range(9)), dataset.subset([5, 4]), plain]),
        dataset.subset(np.array([1, 1, 7, 1, 7])),
        dataset.subset([1, 2, 3, 4]).subset([3, 3]),
        expanded.split(0.4, 0.6)[1],
        dataset,
    ):
        assert same(batches_of(part, 0, 3), theirs(part, 0, 3))


def test_indices_are_those_of_what_the_loader_was_given(dataset: DiffuseMixDataset) -> None:
    part = Subset(dataset, [20, 5, 9, 5])
    (_, labels, indices), *_ = batches_of(part, return_index=True)
    assert indices.tolist() == [0, 1, 2, 3]
    assert labels.tolist() == [dataset.targets[i] for i in part.indices]
    plan = DiffuseMixLoader(part, 4, device="cpu").plan(0, 0)
    assert plan.index.tolist() == [20, 5, 9, 5] and plan.view.tolist() == [0, 0, 0, 1]


def test_an_index_that_a_part_repeats_is_another_view(dataset: DiffuseMixDataset) -> None:
    for part in (dataset.subset([6] * 30), ConcatDataset([dataset.subset([6] * 10)] * 3), Subset(dataset, [6] * 30)):
        images = torch.cat([images for images, *_ in batches_of(part)])
        assert len({image.numpy().tobytes() for image in images}) == 30
        assert torch.equal(images[0], dataset[6][0])
    other = torch.cat(
        [images for images, *_ in batches_of(dataset.subset([6] * 30), shuffle=True, rank=0, world_size=1)]
    )
    assert {one.numpy().tobytes() for one in other} == {one.numpy().tobytes() for one in images}


def test_resuming_inside_a_part(dataset: DiffuseMixDataset) -> None:
    part = dataset.subset([*range(20), *range(20)])
    whole = batches_of(part, shuffle=True)
    loader = DiffuseMixLoader(part, 7, shuffle=True, device="cpu")
    for _ in zip(range(3), loader, strict=False):
        state = loader.state_dict()
    again = DiffuseMixLoader(pickle.loads(pickle.dumps(part)), 7, shuffle=True, device="cpu")
    again.load_state_dict(state)
    assert same(list(again), whole[3:])
    for other in (dataset.subset([*range(20), *range(20, 0, -1)]), dataset.subset(range(40 - 7))):
        with pytest.raises(ConfigError, match="of the state is"):
            DiffuseMixLoader(other, 7, shuffle=True, device="cpu").load_state_dict(state)


def test_damage_in_a_part_is_replaced_as_in_the_whole(
    tmp_path: Path, photos: Path, edits: Path, bank: FractalBank
) -> None:
    import shutil

    root = shutil.copytree(photos, tmp_path / "photos")
    catalog = Catalog.open(edits / "catalog")
    (root / catalog.path(4)).write_bytes(b"no image")
    with pytest.warns(UserWarning, match="left out of sample 4"):
        dataset = DiffuseMixDataset(root, crop=TrainCrop(16), edits=edits, fractals=bank, seed=2)
        part = ConcatDataset([dataset.subset([4, 4, 5, 3]), dataset.subset(range(6, 33))])
        found = batches_of(part)
        expected = theirs(part)
    assert same(found, expected)


def test_what_does_not_fit_together_is_refused(dataset: DiffuseMixDataset, photos: Path) -> None:
    other = DiffuseMixDataset(photos, crop=EvalCrop(16))
    with pytest.raises(ConfigError, match=r"crop must give one size in all datasets of a loader, found \[\(16, 16\)"):
        DiffuseMixLoader(ConcatDataset([dataset, other]), device="cpu")
    with pytest.raises(ConfigError, match=r"dataset must be a DiffuseMixDataset, or a Subset .* found list"):
        DiffuseMixLoader(Subset([1, 2, 3], [0]), device="cpu")  # type: ignore[arg-type]
    with pytest.raises(IndexError, match="index 33 is out of range for a dataset of 33 samples"):
        dataset.subset([33])
    with pytest.raises(ConfigError, match="plan: the batches come from several datasets"):
        DiffuseMixLoader(ConcatDataset([dataset, DiffuseMixDataset(photos, crop=EvalCrop(24))]), 40, device="cpu").plan(
            0, 0
        )


def test_splits_are_stratified_disjoint_and_depend_on_labels_and_seed_only(
    dataset: DiffuseMixDataset, expanded: DiffuseMixDataset, photos: Path
) -> None:
    parts = dataset.split(0.6, 0.3, 0.1)
    assert [len(part) for part in parts] == [19, 10, 4]
    assert sorted(i for part in parts for i in part.indices) == list(range(33))
    for part, shares in zip(parts, ([6, 7], [3, 4], [1, 2]), strict=True):
        assert set(Counter(part.targets).values()) <= set(shares)
    plain = DiffuseMixDataset(photos, crop=EvalCrop(16), seed=77)
    for one, other, large in zip(parts, plain.split(0.6, 0.3, 0.1), expanded.split(0.6, 0.3, 0.1), strict=True):
        assert one.indices.tolist() == other.indices.tolist()
        of_large = expanded.planner.originals_of(large.indices)
        assert set(of_large.tolist()) == set(one.indices.tolist()) and len(large) == 3 * len(one)
        assert large.samples == [expanded.samples[i] for i in of_large]
    assert dataset.split(0.5, 0.5, seed=1)[0].indices.tolist() != dataset.split(0.5, 0.5)[0].indices.tolist()
    for wrong in ((), (0.5,), (0.9, 0.2), (1.5, -0.5)):
        with pytest.raises(ConfigError, match="fractions must be above 0 with sum 1, found"):
            dataset.split(*wrong)


def test_every_original_is_validated_on_once(dataset: DiffuseMixDataset) -> None:
    seen: list[int] = []
    for training, validation in dataset.folds(5):
        assert sorted([*training.indices, *validation.indices]) == list(range(33))
        assert set(Counter(validation.targets).values()) <= {2, 3}
        seen += validation.indices.tolist()
    assert sorted(seen) == list(range(33))
    nested = dataset.split(0.5, 0.5)[0].folds(2)[0][1]
    assert isinstance(nested, DiffuseMixSubset) and nested.dataset is dataset
    with pytest.raises(ConfigError, match=r"count must lie in \[2, 33\], the number of originals, found 34"):
        dataset.folds(34)


def test_a_part_has_the_attributes_of_its_dataset(dataset: DiffuseMixDataset) -> None:
    part = dataset.subset([32, 0, 0])
    assert part.classes == dataset.classes and part.class_to_idx == dataset.class_to_idx
    assert part.targets == [2, 0, 0] and part.samples == part.imgs == [dataset.samples[i] for i in (32, 0, 0)]
    part.set_epoch(4)
    assert part.epoch == dataset.epoch == 4 and len(part) == 3
    assert repr(part).startswith("DiffuseMixSubset, 3 samples of\nDiffuseMixDataset of ")
    assert torch.equal(part[-3][0], dataset[32][0]) and not torch.equal(part[1][0], part[2][0])


# --- targets


@pytest.mark.parametrize("kind", ["soft", "several", "numbers", "classes", "tensor"])
def test_targets_are_delivered_in_the_labels_place(photos: Path, kind: str) -> None:
    draws = np.random.default_rng(3)
    targets: Any = {
        "soft": draws.random((33, 4)),
        "several": draws.random((33, 5)) > 0.5,
        "numbers": draws.normal(size=33),
        "classes": draws.integers(0, 9, 33).astype(np.int16).tolist(),
        "tensor": torch.arange(66).reshape(33, 2),
    }[kind]
    dataset = DiffuseMixDataset(photos, crop=EvalCrop(16), targets=targets)
    for part in (dataset, dataset.subset([4, 30, 4]), ConcatDataset([dataset, dataset.subset([1])])):
        found = batches_of(part)
        assert same(found, theirs(part))
    expected = np.asarray(targets).astype(np.int64 if kind == "classes" else np.float32)
    assert np.array_equal(torch.cat([labels for _, labels in batches_of(dataset)]).numpy(), expected)
    assert np.array_equal(dataset.targets, expected)
    assert np.array_equal(dataset.subset([5, 2]).targets, expected[[5, 2]])


def test_targets_that_do_not_fit_are_refused(photos: Path) -> None:
    for wrong in ([1, 2], np.zeros((32, 2)), 3, ["a"] * 33):
        with pytest.raises(ConfigError, match="targets must be numbers with a row for each of 33 originals"):
            DiffuseMixDataset(photos, crop=EvalCrop(16), targets=wrong)


def test_class_weights_balance(photos: Path, expanded: DiffuseMixDataset) -> None:
    targets = np.array([0] * 20 + [2] * 10 + [3] * 3)
    dataset = DiffuseMixDataset(photos, crop=EvalCrop(16), targets=targets)
    weights = dataset.class_weights()
    assert weights.dtype == torch.float32
    assert torch.allclose(weights, torch.tensor([33 / 80, 0, 33 / 40, 33 / 12]))
    assert torch.allclose(dataset.subset([0, 20, 21, 22]).class_weights(), torch.tensor([4 / 3, 0, 4 / 9]))
    assert torch.equal(expanded.class_weights(), torch.ones(3))
    soft = DiffuseMixDataset(photos, crop=EvalCrop(16), targets=np.zeros((33, 3)))
    with pytest.raises(ConfigError, match=r"targets must be class numbers, found float32 of shape \(33, 3\)"):
        soft.class_weights()


# --- repeats


@pytest.fixture(scope="module")
def sixty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 photographs of three classes."""
    root = tmp_path_factory.mktemp("sixty")
    for i in range(60):
        write_photograph(root / "abc"[i % 3] / f"{i:02}.jpg", i, 60 + i % 7, 90 - i % 11)
    return root


def weighted() -> WeightedRandomSampler:
    """300 draws of 33 originals or more."""
    weights = torch.arange(1, 34, dtype=torch.float64)
    return WeightedRandomSampler(weights.tolist(), 300, generator=torch.Generator().manual_seed(7))


class Share(Sampler[Any]):
    """One rank's share of a sampler, as the wrappers of training frameworks divide it."""

    def __init__(self, sampler: Sampler[int], rank: int, num_replicas: int) -> None:
        self.sampler, self.rank, self.num_replicas = sampler, rank, num_replicas

    def __len__(self) -> int:
        return len(self.sampler) // self.num_replicas  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        return islice(self.sampler, self.rank, None, self.num_replicas)


@pytest.mark.parametrize("ranks", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_300_draws_of_60_images_are_300_crops_and_resume_anywhere(sixty: Path, ranks: int) -> None:
    dataset = DiffuseMixDataset(sixty, crop=TrainCrop(24), seed=3)
    draw = torch.Generator().manual_seed(7)
    weights = (torch.arange(60) + 1.0).tolist()
    order = list(WeightedRandomSampler(weights, 300, generator=draw))

    def new(rank: int) -> DiffuseMixLoader:
        sampler = WeightedRandomSampler(weights, 300, generator=torch.Generator().manual_seed(7))
        share: Any = sampler if ranks == 1 else distinct(Share(sampler, rank, ranks), across_ranks=True)
        return DiffuseMixLoader(dataset, 12 // ranks, sampler=share, device="cpu", return_index=True)

    crops, indices = Counter[bytes](), Counter[int]()
    for rank in range(ranks):
        loader, batches, states = new(rank), [], []
        for images, _, drawn in loader:
            batches.append((images.clone(), drawn.clone()))
            states.append(loader.state_dict())
        assert len(batches) == 25
        crops.update(image.numpy().tobytes() for images, _ in batches for image in images)
        indices.update(int(i) for _, drawn in batches for i in drawn)
        for step in range(0, 20, 2):  # ten places
            again = new(rank)
            again.load_state_dict(states[step])
            assert same([(images, drawn) for images, _, drawn in again], batches[step + 1 :])
    assert len(crops) == 300 and set(crops.values()) == {1}
    assert indices == Counter(order) and len(indices) < 60


@pytest.mark.parametrize("workers", [0, 2])
def test_distinct_gives_dataloader_the_same_draws(dataset: DiffuseMixDataset, workers: int) -> None:
    ours = [images.clone() for images, _ in DiffuseMixLoader(dataset, 16, sampler=weighted(), device="cpu")]
    for given in (dataset, dataset.subset(range(33))):
        dataset.set_epoch(0)
        loader = DataLoader(given, 16, sampler=distinct(weighted()), num_workers=workers)
        assert len(loader) == 19
        assert all(torch.equal(a, b) for a, (b, _) in zip(ours, loader, strict=True))
    also = DiffuseMixLoader(dataset, 16, sampler=distinct(weighted()), device="cpu")
    assert all(torch.equal(a, b) for a, (b, _) in zip(ours, also, strict=True))


def test_a_dataset_that_cannot_tell_views_apart_says_so(dataset: DiffuseMixDataset) -> None:
    assert list(distinct([3, 1, 3]))[:2] == [3, 1] and repr(list(distinct([3, 3]))[1]) == "View(3, 1)"
    for other in (Subset(dataset, range(33)), [0] * 33):
        with pytest.raises(ConfigError, match="distinct must be used with a DiffuseMixDataset or a part"):
            list(DataLoader(other, sampler=distinct([3, 3])))  # type: ignore[arg-type]


class RASampler(torch.utils.data.Sampler[int]):
    """Repeated augmentation as torchvision's references have it: each index three times, on the next ranks."""

    def __init__(self, count: int, rank: int, num_replicas: int) -> None:
        self.count, self.rank, self.num_replicas = count, rank, num_replicas

    def __len__(self) -> int:
        return 3 * self.count // self.num_replicas

    def __iter__(self) -> Any:
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(0)).repeat_interleave(3)
        return iter(order[self.rank :: self.num_replicas].tolist())


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_repeats_on_several_ranks_are_distinct_and_resume(dataset: DiffuseMixDataset, ranks: int) -> None:
    found = Counter[bytes]()
    for rank in range(ranks):
        whole = [
            (images.clone(), labels)
            for images, labels in DiffuseMixLoader(dataset, 5, sampler=RASampler(33, rank, ranks), device="cpu")
        ]
        found.update(image.numpy().tobytes() for images, _ in whole for image in images)
        loader = DiffuseMixLoader(dataset, 5, sampler=RASampler(33, rank, ranks), device="cpu")
        for _ in zip(range(2), loader, strict=False):
            state = loader.state_dict()
        again = DiffuseMixLoader(dataset, 5, sampler=RASampler(33, rank, ranks), device="cpu")
        again.load_state_dict(state)
        assert same(list(again), whole[2:])
        wrapped = distinct(RASampler(33, rank, ranks), across_ranks=True)
        dataset.set_epoch(0)
        assert same(list(DataLoader(dataset, 5, sampler=wrapped)), whole)
    assert set(found.values()) == {1} and len(found) == 99


def test_damaged_edits_of_several_views(tmp_path: Path, photos: Path, bank: FractalBank, make_store: Any) -> None:
    """What is known to fail in one view says nothing about the edit of another."""
    store = make_store(photos, prompts=("autumn", "snowy"))
    from dali_diffusemix import EditStore

    opened = EditStore.open(store)
    row = int(opened.starts[3])  # an edit of original 3
    shard = next((store / "shards").glob("*.tar")) if (store / "shards").is_dir() else next(store.glob("*.tar"))
    extent = opened.extents(np.array([row]))[0]
    with shard.open("r+b") as file:
        file.seek(extent.offset)
        file.write(b"\0" * 64)
    dataset = DiffuseMixDataset(
        photos, crop=TrainCrop(16), mix=MixSpec(probability=1), edits=store, fractals=bank, seed=4
    )
    draws = [3, 3, 3, 3, 2, 3, 3]
    with pytest.warns(UserWarning, match="its original is used unmixed"):
        ours = batches_of(dataset, sampler=draws)
    dataset.set_epoch(0)
    with pytest.warns(UserWarning, match="its original is used unmixed"):
        expected = list(DataLoader(dataset, 7, sampler=distinct(draws)))
    assert same(ours, expected)
