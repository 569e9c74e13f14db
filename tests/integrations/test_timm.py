"""The contract of timm's training script, by a loop written after it; with timm's own Mixup where timm is installed."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from samples import training_set

from dali_diffusemix import ConfigError, DiffuseMixLoader
from dali_diffusemix.integrations.timm import TimmLoader, prepare

pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")

Batches = list[tuple[torch.Tensor, torch.Tensor]]


class Mixup:
    """What timm's does, in short: one λ for a batch from NumPy's global generator, labels become soft."""

    def __init__(self) -> None:
        self.mixup_enabled = True

    def __call__(self, x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert len(x) % 2 == 0
        lam = np.random.beta(0.8, 0.8) if self.mixup_enabled else 1.0
        soft = torch.nn.functional.one_hot(target, 3).float()
        return x * lam + x.flip(0) * (1 - lam), soft * lam + soft.flip(0) * (1 - lam)


def timms() -> Any:
    from timm.data import Mixup as Original

    return Original(mixup_alpha=0.8, num_classes=3)


MIXUPS = [
    Mixup,
    pytest.param(timms, marks=pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")),
]


def train(
    loader: Any,
    *,
    epochs: int,
    start: int = 0,
    mixup_off_epoch: int = 0,
    tells_dataset: bool = True,
    distributed: bool = False,
) -> Batches:
    """The parts of train.py that touch a loader, with its prefetcher on: all batches."""
    dataset = loader.dataset
    seen = []
    for epoch in range(start, epochs):
        if tells_dataset and hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)
        elif distributed and hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        if mixup_off_epoch and epoch >= mixup_off_epoch and loader.mixup_enabled:
            loader.mixup_enabled = False
        last = len(loader) - 1
        for number, (images, target) in enumerate(loader):
            assert (number == last) == (len(seen) % len(loader) == last)
            seen.append((images, target))
    return seen


def make(data: Path, mixup_fn: Any = None) -> TimmLoader:
    return prepare(DiffuseMixLoader(training_set(data), 8, shuffle=True, drop_last=True, device="cpu"), mixup_fn)


def equal(found: Batches, expected: Batches) -> bool:
    return len(found) == len(expected) > 0 and all(
        torch.equal(a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_the_script_chooses_the_epoch(data: Path) -> None:
    loader = DiffuseMixLoader(training_set(data), 8, shuffle=True, drop_last=True, device="cpu")
    expected = [tuple(batch) for _ in range(3) for batch in loader]
    steps = len(loader)
    assert equal(train(make(data), epochs=3), expected)
    # As --resume does it: the script tells the dataset, or in older versions the sampler of distributed runs.
    assert equal(train(make(data), epochs=3, start=1), expected[steps:])
    assert equal(train(make(data), epochs=3, start=1, tells_dataset=False, distributed=True), expected[steps:])
    # Older versions, one process: nobody is told anything.
    assert equal(train(make(data), epochs=3, tells_dataset=False), expected)


def test_a_state_within_the_epoch_is_kept(data: Path) -> None:
    loader = make(data)
    expected = train(loader, epochs=2)
    loader = make(data)
    batches = iter(loader)
    next(batches)
    resumed = make(data)
    resumed.loader.load_state_dict(loader.loader.state_dict())
    assert equal(train_without_count(resumed, 0), expected[1 : len(loader)])


def train_without_count(loader: TimmLoader, epoch: int) -> Batches:
    loader.dataset.set_epoch(epoch)
    return [(images, target) for images, target in loader]


@pytest.mark.parametrize("mixup", MIXUPS)
def test_mixup_draws_by_the_step(data: Path, mixup: Callable[[], Any]) -> None:
    np.random.seed(0)
    first = train(make(data, mixup()), epochs=2)
    after = np.random.rand()
    again = train(make(data, mixup()), epochs=2, start=1)
    assert equal(again, first[len(first) // 2 :])
    assert not torch.equal(first[0][0], train(make(data), epochs=1)[0][0])
    np.random.seed(0)
    assert np.random.rand() == after


@pytest.mark.parametrize("mixup", MIXUPS)
def test_mixup_goes_off_and_labels_stay_soft(data: Path, mixup: Callable[[], Any]) -> None:
    loader, plain = make(data, mixup()), train(make(data), epochs=3)
    assert loader.mixup_enabled
    found = train(loader, epochs=3, mixup_off_epoch=2)
    assert not loader.mixup_enabled
    last = len(found) * 2 // 3
    for (images, target), (same, label) in zip(found[last:], plain[last:], strict=True):
        torch.testing.assert_close(images, same)
        assert target.shape == (8, 3) and torch.equal(target.argmax(1), label)
    assert not torch.equal(found[last - 1][0], plain[last - 1][0])


def test_without_mixup_it_is_off(data: Path) -> None:
    loader = make(data)
    loader.mixup_enabled = True
    assert not loader.mixup_enabled
    with pytest.raises(ConfigError, match="leave one of them out"):
        prepare(
            DiffuseMixLoader(
                training_set(data), device="cpu", batch_transform=lambda images, labels, _: (images, labels)
            ),
            Mixup(),
        )
