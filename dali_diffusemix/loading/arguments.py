"""DataLoader's arguments: which are kept, which are satisfied as things are, and which cannot be."""

import logging
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np
import torch
from torch.utils.data import default_collate

from dali_diffusemix.base import gpu
from dali_diffusemix.errors import ConfigError, MissingDependencyError

_log = logging.getLogger(__name__)
_UNIMAGINABLE: Final = 2**31


def check_number(name: str, value: object, least: int, remedy: str = "") -> None:
    """Raise ConfigError unless a value is a whole number in range."""
    if not isinstance(value, int | np.integer) or value >= _UNIMAGINABLE:
        raise ConfigError(f"{name} must be a whole number, at least {least}, found {value!r}{remedy}.")
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, found {value}{remedy}.")


def check_batch_size(batch_size: object) -> None:
    """Raise ConfigError unless batches have a size."""
    remedy = "; batches are made whole: for single samples give 1, or take dataset[i]" if batch_size is None else ""
    check_number("batch_size", batch_size, 1, remedy)


def check_timeout(timeout: object) -> None:
    """Raise ConfigError unless it is a time in seconds."""
    if not isinstance(timeout, int | float | np.number) or not 0 <= float(timeout) < _UNIMAGINABLE:
        raise ConfigError(f"timeout must be seconds, at least 0 (which is no limit), found {timeout!r}.")


def check_collate(collate_fn: object) -> None:
    """Raise ConfigError unless batches are what the function makes anyway."""
    if collate_fn is None or collate_fn is default_collate:
        return
    raise ConfigError(
        f"collate_fn must be left out or be torch's default_collate, found {collate_fn!r}: batches are made whole, and "
        "change in batch_transform, which gets them on the device. For example\n"
        "    def change(images, labels, generator):\n"
        "        return cutmix(images, labels)\n"
        "    loader = DiffuseMixLoader(dataset, ..., batch_transform=globally_seeded(change))"
    )


def check_worker_init(worker_init_fn: object) -> None:
    """Warn that a function for worker processes is not called."""
    if worker_init_fn is not None:
        warnings.warn(
            "worker_init_fn is not called: there are no worker processes, and the dataset's seed decides all samples.",
            stacklevel=3,
        )


def warn_of_no_pinning() -> None:
    """Warn, as DataLoader does, where there is no page-locked memory to put batches in."""
    warnings.warn("pin_memory=True: there is no GPU on this machine, so batches are in ordinary memory.", stacklevel=4)


def chosen_device(device: str | torch.device | None) -> torch.device:
    """The device as given; for None the GPU where everything for it works, else the CPU."""
    if device is None:
        return torch.device(_default_device())
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device must be 'cuda', 'cuda:N', 'cpu' or None, found {str(device)!r}.") from error


@cache
def _default_device() -> str:
    try:
        gpu.check_available()
        gpu.compiler()
    except MissingDependencyError as error:
        _log.info("Batches are made on the CPU. %s", error)
        return "cpu"
    _log.info("Batches are made on the GPU; device='cpu' makes them on the CPU.")
    return "cuda"


def collate_of(*, plain: bool) -> Callable[[Any], Any]:
    """Return the `collate_fn` of a loader, for whoever makes a DataLoader from the loader's attributes.

    Args:
        plain: A DataLoader would make the same batches.
    """
    return default_collate if plain else _refuse


def _refuse(batch: object) -> Any:
    raise ConfigError(
        "a DataLoader made from the attributes of a DiffuseMixLoader would lack the loader's batch_transform, dtype or "
        "indices, or divide its samples among the ranks once more; iterate over the loader itself (under Ray Train "
        "without prepare_data_loader). To skip batches, load a state: loader.load_state_dict(state)."
    )
