"""DiffuseMix (Islam et al., CVPR 2024) at load time: a drop-in replacement of PyTorch's DataLoader on NVIDIA DALI.

    from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, TrainCrop

    dataset = DiffuseMixDataset("data/train", edits="cache/edits", fractals="cache/fractals.npy",
                                crop=TrainCrop(224), seed=0)
    loader = DiffuseMixLoader(dataset, batch_size=256, shuffle=True, num_workers=8, pin_memory=True)

Names are imported when they are first used: importing this package loads neither torch nor DALI.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dali_diffusemix.catalog.table import Catalog, StaleCatalogWarning
    from dali_diffusemix.errors import (
        CatalogError,
        ConfigError,
        DataError,
        DecodeError,
        DiffuseMixError,
        LoaderTimeoutError,
        MissingDependencyError,
        StoreError,
    )
    from dali_diffusemix.fractals.bank import FractalBank
    from dali_diffusemix.loading.batches import LoaderStats
    from dali_diffusemix.loading.dali import GpuDecoding
    from dali_diffusemix.loading.dataset import DiffuseMixDataset, RepeatedEpochWarning
    from dali_diffusemix.loading.loader import DiffuseMixLoader
    from dali_diffusemix.loading.quarantine import Quarantined, QuarantineWarning
    from dali_diffusemix.loading.samplers import ResumeWarning, distinct
    from dali_diffusemix.loading.seeding import globally_seeded
    from dali_diffusemix.loading.subset import DiffuseMixSubset
    from dali_diffusemix.plan.augment import (
        AutoAugment,
        ColorJitter,
        GaussianBlur,
        Grayscale,
        RandAugment,
        RandomChoice,
        RandomErasing,
        Solarize,
        TimmRandAugment,
        TrivialAugmentWide,
    )
    from dali_diffusemix.plan.crops import EvalCrop, RandomCrop, TrainCrop
    from dali_diffusemix.plan.schedule import Schedule
    from dali_diffusemix.plan.spec import MixSpec
    from dali_diffusemix.store import EditStore
    from dali_diffusemix.store.pack import PackConfig, pack

__version__ = "0.1.0"

__all__ = [
    "AutoAugment",
    "Catalog",
    "CatalogError",
    "ColorJitter",
    "ConfigError",
    "DataError",
    "DecodeError",
    "DiffuseMixDataset",
    "DiffuseMixError",
    "DiffuseMixLoader",
    "DiffuseMixSubset",
    "EditStore",
    "EvalCrop",
    "FractalBank",
    "GaussianBlur",
    "GpuDecoding",
    "Grayscale",
    "LoaderStats",
    "LoaderTimeoutError",
    "MissingDependencyError",
    "MixSpec",
    "PackConfig",
    "QuarantineWarning",
    "Quarantined",
    "RandAugment",
    "RandomChoice",
    "RandomCrop",
    "RandomErasing",
    "RepeatedEpochWarning",
    "ResumeWarning",
    "Schedule",
    "Solarize",
    "StaleCatalogWarning",
    "StoreError",
    "TimmRandAugment",
    "TrainCrop",
    "TrivialAugmentWide",
    "distinct",
    "globally_seeded",
    "pack",
]

_HOME = {
    "AutoAugment": "plan.augment",
    "Catalog": "catalog",
    "ColorJitter": "plan.augment",
    "DiffuseMixDataset": "loading.dataset",
    "DiffuseMixLoader": "loading.loader",
    "DiffuseMixSubset": "loading.subset",
    "EditStore": "store",
    "EvalCrop": "plan",
    "FractalBank": "fractals",
    "GaussianBlur": "plan.augment",
    "GpuDecoding": "loading.dali",
    "Grayscale": "plan.augment",
    "LoaderStats": "loading.batches",
    "MixSpec": "plan",
    "PackConfig": "store.pack",
    "QuarantineWarning": "loading.quarantine",
    "Quarantined": "loading.quarantine",
    "RandAugment": "plan.augment",
    "RandomChoice": "plan.augment",
    "RandomCrop": "plan",
    "RandomErasing": "plan.augment",
    "RepeatedEpochWarning": "loading.dataset",
    "ResumeWarning": "loading.samplers",
    "Schedule": "plan",
    "Solarize": "plan.augment",
    "StaleCatalogWarning": "catalog",
    "TimmRandAugment": "plan.augment",
    "TrainCrop": "plan",
    "TrivialAugmentWide": "plan.augment",
    "distinct": "loading.samplers",
    "globally_seeded": "loading.seeding",
    "pack": "store.pack",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOME.get(name, 'errors')}")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
