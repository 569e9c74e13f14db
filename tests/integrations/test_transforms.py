"""Batch transforms that people use: exact after resuming, and apart from the program's own random numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from samples import training_set

from dali_diffusemix import DiffuseMixLoader, globally_seeded

pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")

Pair = tuple[torch.Tensor, torch.Tensor]


def mixup(images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> Pair:
    """Zhang et al. 2018 with α = 1: λ uniform, the partner a permutation; it draws from the generator given."""
    weight = torch.rand((), generator=generator, device=images.device)
    partner = torch.randperm(len(images), generator=generator, device=images.device)
    soft = torch.nn.functional.one_hot(labels, 3).to(images.dtype)
    return weight * images + (1 - weight) * images[partner], weight * soft + (1 - weight) * soft[partner]


def kornias(name: str) -> Callable[[torch.Tensor, torch.Tensor, torch.Generator], Pair]:
    """One of kornia's mixing augmentations, which draw from PyTorch's global generator."""
    augmentation = pytest.importorskip("kornia.augmentation", reason="kornia is not installed")
    options = {"use_correct_lambda": True} if name == "RandomCutMixV2" else {}  # else it warns
    module = getattr(augmentation, name)(data_keys=["input", "class"], **options)

    def transform(images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> Pair:
        images, labels = module(images, labels)
        return images, labels

    return transform


@pytest.fixture(params=["mixup", "RandomMixUpV2", "RandomCutMixV2", "RandomMosaic"])
def transform(request: pytest.FixtureRequest) -> Any:
    if request.param == "RandomMosaic":  # images alone; the labels stay
        augmentation = pytest.importorskip("kornia.augmentation", reason="kornia is not installed")
        mosaic = augmentation.RandomMosaic(output_size=(24, 24))
        return globally_seeded(lambda images, labels, generator: (mosaic(images), labels))
    return mixup if request.param == "mixup" else globally_seeded(kornias(request.param))


def make(data: Path, transform: Any, **options: Any) -> DiffuseMixLoader:
    return DiffuseMixLoader(
        training_set(data), 8, shuffle=True, device="cpu", drop_last=True, batch_transform=transform, **options
    )


def equal(found: list[Any], expected: list[Any]) -> bool:
    return len(found) == len(expected) > 0 and all(
        torch.equal(a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_resuming_and_the_programs_own_draws_change_nothing(data: Path, transform: Any) -> None:
    torch.manual_seed(0)
    loader = make(data, transform)
    epochs = [list(loader) for _ in range(2)]
    assert not torch.equal(epochs[0][0][0], next(iter(make(data, None)))[0])
    for step in range(len(loader)):
        first = make(data, transform)
        first.set_epoch(1)
        batches = iter(first)
        for _ in range(step):
            next(batches)
        resumed = make(data, transform, num_workers=2, prefetch_factor=3)
        resumed.load_state_dict(first.state_dict())
        torch.manual_seed(step)
        np.random.seed(step)
        assert equal(list(resumed), epochs[1][step:])


def test_the_programs_own_draws_go_on(data: Path, transform: Any) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    for _ in make(data, transform):
        pass
    assert torch.equal(torch.rand(3), expected[0]) and np.array_equal(np.random.rand(3), expected[1])


def test_mixup_mixes_what_the_loader_gives(data: Path) -> None:
    plain, mixed = list(make(data, None)), list(make(data, mixup))
    weights = []
    for (images, labels), (blended, soft) in zip(plain, mixed, strict=True):
        basis, target = images.flatten(1).double(), blended.flatten(1).double()
        shares = torch.linalg.lstsq(basis.T, target.T).solution.T  # how much of each image is in each result
        torch.testing.assert_close(shares.sum(1), torch.ones(8, dtype=torch.float64))
        torch.testing.assert_close(shares @ torch.nn.functional.one_hot(labels, 3).double(), soft.double())
        weights.append(float(shares.max()))
    assert len(set(weights)) == len(weights)
