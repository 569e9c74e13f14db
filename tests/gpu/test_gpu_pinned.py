"""Batches made on the CPU for a GPU: page-locked memory, used again, never overwritten while somebody has it."""

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader

from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, EvalCrop, FractalBank, TrainCrop

pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")


@pytest.fixture
def dataset(photos: Path, edits: Path, bank: FractalBank) -> DiffuseMixDataset:
    return DiffuseMixDataset(photos, edits=edits, fractals=bank, crop=TrainCrop(64), seed=1)


def pinned(dataset: Any, batch_size: int = 8, **options: Any) -> DiffuseMixLoader:
    return DiffuseMixLoader(dataset, batch_size, device="cpu", num_workers=2, pin_memory=True, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_all_parts_of_a_batch_are_pinned_and_the_same(
    dataset: DiffuseMixDataset, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    options: dict[str, Any] = {"dtype": dtype, "memory_format": memory_format, "return_index": True}
    plain = DiffuseMixLoader(dataset, 8, device="cpu", **options)
    for batch, expected in zip(pinned(dataset, **options), plain, strict=True):
        for part, other in zip(batch, expected, strict=True):
            assert part.is_pinned() and torch.equal(part, other) and part.dtype == other.dtype
        assert batch[0].is_contiguous(memory_format=memory_format)


def test_what_a_transform_makes_and_several_datasets_are_pinned(dataset: DiffuseMixDataset, photos: Path) -> None:
    both = ConcatDataset([dataset, DiffuseMixDataset(photos, crop=EvalCrop(64))])
    for loader in (pinned(dataset, batch_transform=lambda images, labels, _: (2 * images, labels)), pinned(both, 40)):
        assert all(part.is_pinned() for batch in loader for part in batch)
    theirs = DataLoader(dataset, 8, pin_memory=True)
    assert next([part.is_pinned() for part in batch] for batch in theirs) == [True, True]


def test_no_batch_is_overwritten_while_it_is_held_or_copied(dataset: DiffuseMixDataset) -> None:
    """Copies that do not wait are on their way while the next batches are made."""
    plain = [images.clone() for images, _ in DiffuseMixLoader(dataset, 8, device="cpu")]
    held = list(pinned(dataset))
    assert all(torch.equal(images, expected) for (images, _), expected in zip(held, plain, strict=True))
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):  # the copies wait for it
        busy = busy @ busy.clamp(-1, 1)
    there = [images.to("cuda", non_blocking=True) for images, _ in pinned(dataset)]
    assert all(torch.equal(images.cpu(), expected) for images, expected in zip(there, plain, strict=True))


def test_memory_stays_flat_over_fifty_epochs(dataset: DiffuseMixDataset) -> None:
    loader, peaks = pinned(dataset), []
    for epoch in range(50):
        for images, labels in loader:
            images.to("cuda", non_blocking=True), labels.to("cuda", non_blocking=True)
        if epoch in (4, 49):
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert peaks[1] - peaks[0] < 16 * 1024  # kibibytes
