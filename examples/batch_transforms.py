"""CutMix and MixUp for the loader's `batch_transform=`, from kornia (pip install kornia).

kornia draws from torch's global generator, so the transform is wrapped in `globally_seeded`: runs repeat and resume.
"""

from collections.abc import Callable

import torch
from torch.nn import functional

from dali_diffusemix import globally_seeded
from dali_diffusemix.errors import MissingDependencyError

Transform = Callable[[torch.Tensor, torch.Tensor, torch.Generator], tuple[torch.Tensor, torch.Tensor]]


def batch_transform(name: str | None, classes: int) -> Transform | None:
    """Return CutMix or MixUp, from images and int64 labels to images and (batch, classes) probabilities."""
    if name is None:
        return None
    try:
        from kornia import augmentation
    except ImportError as error:
        raise MissingDependencyError(f"train.augment's {name} needs kornia: pip install kornia.") from error
    if name == "cutmix":  # Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers", ICCV 2019
        mixer = augmentation.RandomCutMixV2(p=1.0, data_keys=["input", "class"], use_correct_lambda=True)
    else:  # Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018
        mixer = augmentation.RandomMixUpV2(p=1.0, data_keys=["input", "class"])

    def transform(
        images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        images, pairs = mixer(images, labels)
        ours, others, share = pairs.reshape(len(labels), 3).unbind(1)
        if name == "cutmix":  # returns the share of the image's own label; MixUp, that of the other label
            share = 1 - share
        ours, others = (functional.one_hot(one.long(), classes).float() for one in (ours, others))
        return images, ours + share[:, None] * (others - ours)

    return globally_seeded(transform)
