"""RandAugment, CutMix and MixUp for the loader's `batch_transform=`, from kornia (pip install kornia).

kornia draws from torch's global generator, so the transform is wrapped in `globally_seeded`: runs repeat and resume.
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from dali_diffusemix import globally_seeded
from dali_diffusemix.errors import ConfigError, MissingDependencyError
from dali_diffusemix.mix import IMAGENET_MEAN, IMAGENET_STD

NAMES = ("randaugment", "cutmix", "mixup")
Transform = Callable[[torch.Tensor, torch.Tensor, torch.Generator], tuple[torch.Tensor, torch.Tensor]]


def batch_transform(names: Sequence[str], classes: int) -> Transform | None:
    """Return the transforms in this order, from images in [0, 1] and int64 labels to normalised images and labels.

    After CutMix or MixUp, labels are (batch, classes) probabilities. RandAugment transforms each image separately.
    """
    if not names:
        return None
    if unknown := [name for name in names if name not in NAMES]:
        raise ConfigError(f"train.augment must name some of {', '.join(NAMES)}, found {unknown[0]!r}.")
    if {"cutmix", "mixup"} <= set(names) or "randaugment" in names[1:]:
        raise ConfigError(
            f"train.augment must have randaugment first, then cutmix or mixup, not both, found {list(names)}."
        )
    try:
        from kornia import augmentation
        from kornia.augmentation.auto import RandAugment
    except ImportError as error:
        raise MissingDependencyError("train.augment needs kornia: pip install kornia.") from error
    mixers = {
        # Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018.
        "mixup": lambda: augmentation.RandomMixUpV2(p=1.0, data_keys=["input", "class"]),
        # Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers", ICCV 2019.
        "cutmix": lambda: augmentation.RandomCutMixV2(p=1.0, data_keys=["input", "class"], use_correct_lambda=True),
    }
    # Cubuk et al., "RandAugment: Practical Automated Data Augmentation", NeurIPS 2020.
    # One operation at a time: rounding moves some results out of [0, 1], and the next operation would refuse them.
    policy = RandAugment(n=1, m=9) if "randaugment" in names else None
    mixer = next((mixers[name]() for name in names if name in mixers), None)
    mean = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)

    def transform(
        images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if policy is not None:
            for _ in range(2):
                images = torch.cat([policy(image[None]) for image in images]).clamp(0, 1)
        images = (images - mean.to(images.device)) / std.to(images.device)
        if mixer is None:
            return images, labels
        images, pairs = mixer(images, labels)
        ours, others, share = pairs.reshape(len(labels), 3).unbind(1)
        if "cutmix" in names:  # returns the share of the image's own label; MixUp, that of the other label
            share = 1 - share
        ours, others = (functional.one_hot(one.long(), classes).float() for one in (ours, others))
        return images, ours + share[:, None] * (others - ours)

    return globally_seeded(transform)
