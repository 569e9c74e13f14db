"""Attributes that decide the samples: neither changed nor deleted, on a dataset, a part of one or a loader."""

from typing import Final

from dali_diffusemix.errors import ConfigError

SCHEDULED: Final = ("crop", "mix", "augment")
"""Settings of a dataset that may be Schedules."""
_SETTLED: Final = (*SCHEDULED, "normalize", "seed", "targets")
_TRANSFORMS: Final = ("transform", "target_transform", "transforms")
RECIPES: Final = {
    "transform": (
        "{name} must be left out, found {found!r}: crop= crops and flips, augment= has TrivialAugmentWide, "
        "RandAugment, AutoAugment, ColorJitter, GaussianBlur, RandomErasing and others, normalize= normalises, and "
        "for the rest of a transform give the loader batch_transform=globally_seeded(lambda images, labels, _: "
        "(transform(images), labels)), which gets whole batches. For example crop=TrainCrop(224) for "
        "RandomResizedCrop(224) and RandomHorizontalFlip(), crop=EvalCrop(224) for Resize(256) and CenterCrop(224)."
    ),
    "target_transform": (
        "{name} must be left out, found {found!r}: give the targets themselves, a row for each original, for example "
        "targets=[target_transform(label) for label in dataset.targets]."
    ),
}
"""What to write in place of ImageFolder's transforms."""


class Settled:
    """Refuses to change what decides the samples: where it is not kept, a new value would have no effect."""

    @property
    def _being_made(self) -> bool:
        """True while they are written for the first time."""
        return False

    def __setattr__(self, name: str, value: object) -> None:
        if name in _TRANSFORMS:
            raise ConfigError(RECIPES.get(name, RECIPES["transform"]).format(name=name, found=value))
        if name in _SETTLED and not self._being_made:
            raise _refused(name, f", found {value!r}")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in _SETTLED:
            raise _refused(name, " or deleted")
        super().__delattr__(name)


def check_unchanged(dataset: object) -> None:
    """Raise ConfigError if torch's Subset or ConcatDataset was given what only the datasets in it have."""
    for name in SCHEDULED:
        if name in vars(dataset) and not isinstance(dataset, Settled):
            raise _refused(name, f", found {vars(dataset)[name]!r} on a {type(dataset).__name__}")


def _refused(name: str, found: str) -> ConfigError:
    message = (
        f"{name} of a dataset cannot be changed{found}: it decides the samples, and some of them are planned ahead; "
        f"make another dataset, DiffuseMixDataset(..., {name}=...), and a loader of it."
    )
    if name in SCHEDULED:
        message += f" To change it with the epoch, give {name}=Schedule({{0: ..., 30: ...}})."
    return ConfigError(message)
