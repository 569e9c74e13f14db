"""The probes, by name, and the lanes that run them in parallel."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from dali_diffusemix.doctor.attempts import (
    probe_dali_cpu,
    probe_dali_gpu,
    probe_dataset,
    probe_decoding,
    probe_edits,
    probe_gpu_kernel,
    probe_imports,
    probe_kernel,
    probe_load,
    probe_pillow,
)
from dali_diffusemix.doctor.machine import (
    PACKAGES,
    probe_cache,
    probe_compiler,
    probe_gpus,
    probe_machine,
    probe_package,
    probe_torch,
    probe_versions,
)
from dali_diffusemix.doctor.storage import probe_data

__all__ = ["CUPY", "DALI", "EXTRAS", "LANES", "PROBES", "Extra", "Probe"]

DALI: Final = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")
CUPY: Final = ("cupy-cuda12x", "cupy-cuda13x", "cupy")


@dataclass(frozen=True)
class Probe:
    """A function that finds something out, or raises, and the keys of its result."""

    run: Callable[..., Mapping[str, Any]]
    keys: tuple[str, ...] = ("detail",)
    seconds: float = 30.0  # its time limit


@dataclass(frozen=True)
class Extra:
    """An optional part: its modules, their packages, and the argument of pip that installs it."""

    modules: tuple[str, ...]
    packages: tuple[str, ...]
    install: str


EXTRAS: Final = {
    "diffusers": Extra(("diffusers", "transformers"), ("diffusers", "transformers"), "'dali-diffusemix[generate]'"),
    "ray": Extra(("ray",), ("ray",), "'dali-diffusemix[ray]'"),
    "s3": Extra(("fsspec", "s3fs"), ("fsspec", "s3fs"), "'dali-diffusemix[s3]'"),
    "train": Extra(
        ("kornia.augmentation", "scipy.io", "matplotlib", "tensorboard"),
        ("kornia", "scipy", "matplotlib", "tensorboard"),
        "'dali-diffusemix[train]'",
    ),
    "accelerate": Extra(("accelerate",), ("accelerate",), "'dali-diffusemix[accelerate]'"),
}

PROBES: Final[Mapping[str, Probe]] = {
    "package": Probe(probe_package, ("version", "folder", "checkout", "python", "executable", "environment")),
    "machine": Probe(
        probe_machine,
        (
            *("distribution", "system", "libc", "processor", "cores", "affinity", "quota", "memory"),
            *("memory_available", "memory_limit", "shared_memory"),
        ),
    ),
    "versions": Probe(probe_versions, PACKAGES),
    "gpus": Probe(probe_gpus, ("driver", "cuda", "devices")),
    "torch": Probe(probe_torch, ("version", "cuda", "threads", "devices", "why_no_gpu")),
    "compiler": Probe(probe_compiler, ("command", "version")),
    "kernel": Probe(probe_kernel, ("library", "detail")),
    "gpu_kernel": Probe(probe_gpu_kernel, ("cupy", "nvrtc")),
    "pillow": Probe(probe_pillow, ("version", "libjpeg_turbo", "zlib", "zlib_ng", "webp", "formats")),
    "dali_cpu": Probe(probe_dali_cpu, ("formats",)),
    "dali_gpu": Probe(probe_dali_gpu, ("formats", "hardware_jpeg")),
    "cache": Probe(probe_cache, ("folder", "exists", "free", "file_system")),
    "data": Probe(
        probe_data,
        (
            *("path", "kind", "file_system", "free", "files", "all_listed", "unreadable", "one_thread"),
            "many_threads",
        ),
    ),
    "load_cpu": Probe(partial(probe_load, "cpu"), ("difference", "detail")),
    "load_cuda": Probe(partial(probe_load, "cuda"), ("difference", "detail")),
    "decoding": Probe(probe_decoding, ("threads", "choice"), seconds=240.0),
    "dataset": Probe(probe_dataset),
    "edits": Probe(probe_edits),
    **{name: Probe(partial(probe_imports, extra.modules)) for name, extra in EXTRAS.items()},
}

# Run in parallel. Probes that import torch share a lane, because the import takes longest.
LANES: Final = (
    (
        "torch",
        "dataset",
        "dali_cpu",
        "load_cpu",
        "dali_gpu",
        "gpu_kernel",
        "load_cuda",
        "decoding",
        "train",
        "accelerate",
        "diffusers",
    ),
    ("package", "machine", "versions", "gpus", "compiler", "kernel", "pillow", "cache", "edits", "s3", "ray"),
)
