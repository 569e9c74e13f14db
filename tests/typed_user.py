"""A user's program, checked by `mypy --strict` in `make check` and `make dist`: how the public API is typed."""

from collections.abc import Iterator, Mapping
from typing import Any, assert_type

import torch
from torch.utils.data import DataLoader

from dali_diffusemix import (
    Catalog,
    ColorJitter,
    DiffuseMixDataset,
    DiffuseMixLoader,
    EditStore,
    EvalCrop,
    FractalBank,
    LoaderStats,
    MixSpec,
    Quarantined,
    RandAugment,
    RandomCrop,
    RandomErasing,
    Schedule,
    TrainCrop,
    TrivialAugmentWide,
)


def train(root: str, model: torch.nn.Module) -> None:
    spec = MixSpec.paper()
    assert_type(spec, MixSpec)
    dataset = DiffuseMixDataset(
        root, edits="cache/edits", fractals="cache/fractals.npy", mix=spec, crop=TrainCrop(224), seed=0
    )
    assert_type(dataset[0], tuple[torch.Tensor, Any])
    assert_type(dataset.classes, list[str])
    assert_type(dataset.class_to_idx, dict[str, int])
    assert_type(dataset.targets, Any)
    assert_type(dataset.samples[0], tuple[str, int])
    assert_type(dataset.catalog, Catalog)
    assert_type(dataset.store, EditStore | None)
    assert_type(dataset.bank, FractalBank | None)

    loader = DiffuseMixLoader(dataset, batch_size=256, shuffle=True, num_workers=8, device="cpu")
    assert_type(len(loader), int)
    for batch in loader:
        assert_type(batch, tuple[torch.Tensor, ...])
    for images, labels in loader:
        assert_type(images, torch.Tensor)
        assert_type(labels, torch.Tensor)
        torch.nn.functional.cross_entropy(model(images), labels)
    assert_type(loader.stats(), LoaderStats)
    assert_type(loader.images_per_second, float)
    for one in loader.quarantine.values():
        assert_type(one, Quarantined)
    state = loader.state_dict()
    assert_type(state, dict[str, Any])
    loader.load_state_dict(state)


def augmented(root: str) -> None:
    crop = TrainCrop(224)
    several = DiffuseMixDataset(
        root, crop=crop, augment=[TrivialAugmentWide(), RandomErasing(0.25, value="random"), "ThreeAugment"]
    )
    one = DiffuseMixDataset(root, crop=crop, augment=ColorJitter(0.4, 0.4, (0.6, 1.4)))
    changing = Schedule({0: None, 5: RandAugment(), 10: "rand-m9-mstd0.5-inc1"})
    for dataset in (several, one, DiffuseMixDataset(root, crop=crop, augment=changing)):
        DiffuseMixLoader(dataset, batch_size=8).preview("now.png")


def under_a_plain_dataloader(root: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for crop in (TrainCrop(224), RandomCrop(32, padding=4), EvalCrop(224)):
        dataset = DiffuseMixDataset(root, crop=crop, mix=None, normalize=None, on_error="raise")
        dataset.set_epoch(1)
        loader: DataLoader[tuple[torch.Tensor, int]] = DataLoader(dataset, batch_size=4)
        yield from loader


def by_epoch(root: str) -> DiffuseMixDataset:
    growing = Schedule({0: TrainCrop(128), 30: TrainCrop(224)})
    assert_type(growing.at(3), TrainCrop)
    mix = Schedule({0: None, 5: MixSpec.paper()})
    return DiffuseMixDataset(root, edits="cache/edits", fractals="cache/fractals.npy", crop=growing, mix=mix)


def swap(images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    order = torch.randperm(len(images), generator=generator)
    return images[order], labels[order]


def changed(dataset: DiffuseMixDataset, options: Mapping[str, int]) -> DiffuseMixLoader:
    return DiffuseMixLoader(dataset, batch_transform=swap, prefetch_factor=options["ahead"], return_index=True)


def mistakes(dataset: DiffuseMixDataset) -> None:
    """Each is found: an ignored error that is none is one, too."""
    DiffuseMixDataset("data/train")  # type: ignore[call-arg]
    DiffuseMixDataset("data/train", crop=TrainCrop(224), transform=swap)  # type: ignore[arg-type]
    DiffuseMixDataset("data/train", crop=224)  # type: ignore[arg-type]
    DiffuseMixDataset("data/train", crop=Schedule({0: 128, 30: 224}))  # type: ignore[dict-item]
    DiffuseMixLoader("data/train")  # type: ignore[arg-type]
    DiffuseMixLoader(dataset, batch_size="256")  # type: ignore[arg-type]
    MixSpec(masks=("middle",))  # type: ignore[arg-type]
