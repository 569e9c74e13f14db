"""The samplers of timm and torchvision that put the repeats of an index on different ranks, and colour operations."""

import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import folder_of

from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, TrainCrop, globally_seeded


def timms(dataset: DiffuseMixDataset, rank: int, ranks: int) -> Any:
    sampler = pytest.importorskip("timm.data.distributed_sampler").RepeatAugSampler
    return sampler(dataset, ranks, rank, selected_round=0, selected_ratio=1)


def torchvisions(dataset: DiffuseMixDataset, rank: int, ranks: int) -> Any:
    folder = folder_of("DALI_DIFFUSEMIX_VISION", "the sources of torchvision")
    sampler = runpy.run_path(str(folder / "references/classification/sampler.py"))["RASampler"](dataset, ranks, rank)
    sampler.num_selected_samples = sampler.num_samples  # otherwise it rounds down to 256
    return sampler


@pytest.mark.parametrize("make", [timms, torchvisions])
@pytest.mark.parametrize("ranks", [1, 4])
def test_every_repeat_is_another_crop(data: Path, make: Any, ranks: int) -> None:
    dataset = DiffuseMixDataset(data / "photos", crop=TrainCrop(24), seed=5)
    found, drawn = Counter[bytes](), 0
    for rank in range(ranks):
        loader = DiffuseMixLoader(dataset, 8, sampler=make(dataset, rank, ranks), device="cpu")
        whole, states = [], []
        for images, _ in loader:
            whole.append(images.clone())
            states.append(loader.state_dict())
        found.update(image.numpy().tobytes() for images in whole for image in images)
        drawn += sum(len(images) for images in whole)
        again = DiffuseMixLoader(dataset, 8, sampler=make(dataset, rank, ranks), device="cpu")
        again.load_state_dict(states[0])
        assert all(torch.equal(a, b) for (a, _), b in zip(again, whole[1:], strict=True))
    assert len(found) == drawn >= 33 * (3 if make is torchvisions else 1)


def test_colour_operations_on_normalised_images_are_said(data: Path) -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2")

    def warns(operation: Any, **options: Any) -> bool:
        dataset = DiffuseMixDataset(data / "photos", crop=TrainCrop(24), **options)
        transform = globally_seeded(lambda images, labels, _: (operation(images), labels))
        with pytest.warns(UserWarning) as caught:
            import warnings

            warnings.warn("one at least", UserWarning, stacklevel=1)
            iter(DiffuseMixLoader(dataset, 8, device="cpu", batch_transform=transform))
        return any("batch_transform has torchvision's" in str(one.message) for one in caught)

    for operation in (v2.RandAugment(), v2.Compose([v2.RandomErasing(), v2.TrivialAugmentWide()]), v2.ColorJitter(0.4)):
        assert warns(operation) and not warns(operation, normalize=None)
    assert not warns(v2.Compose([v2.RandomErasing(), v2.RandomHorizontalFlip()]))


def test_the_recipe_for_colour_operations(data: Path) -> None:
    """That of docs/migration.md, with the real RandAugment: normalised behind it, per image."""
    v2 = pytest.importorskip("torchvision.transforms.v2")
    text = (Path(__file__).parents[2] / "docs" / "migration.md").read_text(encoding="utf-8")
    code = text.split("### RandAugment and other colour operations")[1].split("```python\n")[1].split("```")[0]
    body = "image.flip(0) if torch.rand(()) < 0.5 else image"
    assert body in code
    names: dict[str, Any] = {"augment": v2.RandAugment()}
    exec(code.replace('"data/train"', repr(str(data / "photos"))).replace(body, "augment(image)"), names)
    images, _ = next(iter(names["loader"]))
    assert images.dtype == torch.float32 and -2.2 < images.min() < 0 < images.max() < 2.7
