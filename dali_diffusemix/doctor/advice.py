"""Conclusions from the answers of the probes: what works, why something does not, and what to do about it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dali_diffusemix.doctor.lanes import Answer
from dali_diffusemix.doctor.probes import CUPY, DALI, EXTRAS, Extra

__all__ = ["FEATURES", "Feature", "judge", "traps"]

FEATURES: Final[Mapping[str, str]] = {
    "load_cpu": "DiffuseMixLoader, CPU",
    "load_cuda": "DiffuseMixLoader, GPU",
    "dataset": "dataset in a DataLoader",
    "kernel": "fast kernel on the CPU",
    "edits": "procedural edits",
    "diffusers": "diffusion edits",
    "ray": "generate on Ray",
    "s3": "stores behind s3://",
    "cache": "keeping catalogs",
    "train": "examples/train.py",
    "accelerate": "under Accelerate",
}
"""Features, by the probe that tries them."""

_REPORT: Final = "report it with this output: no known cause explains it"


@dataclass(frozen=True, kw_only=True)
class Feature:
    """A feature of this package, and whether it works here."""

    title: str
    works: bool
    detail: str  # what was tried, or the reason why it does not work
    remedy: str | None = None  # if it does not work


def judge(name: str, answers: Mapping[str, Answer]) -> Feature:
    """Judge whether the feature of a probe works."""
    error = answers[name].error
    if error is None:
        return Feature(title=FEATURES[name], works=True, detail=_detail(name, answers))
    if name == "load_cpu":
        error = answers["dali_cpu"].error or error
    elif name == "load_cuda":
        error = _why_no_gpu(error, answers)
    return Feature(title=FEATURES[name], works=False, detail=error, remedy=_remedy(name, answers))


def _detail(name: str, answers: Mapping[str, Answer]) -> str:
    found = answers[name].found
    if name == "cache":
        return "the cache folder can be written"
    if name == "load_cpu" and (error := answers["dali_cpu"].error):
        return f"only by Pillow, because DALI decodes nothing: {error}"
    if name == "diffusers" and answers["load_cuda"].error is not None:
        return f"{found['detail']}; without a GPU it is slow"
    return str(found["detail"])


def _why_no_gpu(error: str, answers: Mapping[str, Answer]) -> str:
    """Return what is missing, or the error itself if nothing is."""
    gpus, torch = answers["gpus"], answers["torch"]
    missing = [gpus.error] if gpus.error else []
    if torch.error is None and torch.found["cuda"] is None:
        missing.append(f"PyTorch {torch.found['version']} is built without CUDA")
    elif torch.found["why_no_gpu"] and not missing:
        missing.append(f"PyTorch sees no GPU ({torch.found['why_no_gpu']})")
    if answers["gpu_kernel"].error:
        installed = any(answers["versions"].found[package] for package in CUPY)
        missing.append(answers["gpu_kernel"].error if installed else "CuPy is not installed")
    if not missing and answers["dali_gpu"].error:
        missing.append(f"DALI: {answers['dali_gpu'].error}")
    return "; ".join(missing) or error


def _remedy(name: str, answers: Mapping[str, Answer]) -> str:
    error = answers[name].error or ""
    if name in EXTRAS:
        return _install(EXTRAS[name], answers["versions"].found)
    if name == "load_cuda":
        return _gpu_remedy(answers)
    if answers["torch"].error and name in ("load_cpu", "dataset"):
        return _torch_remedy(answers)
    if name == "load_cpu" and answers["dali_cpu"].error:
        return _dali_remedy(answers)
    if name == "kernel":
        return _kernel_remedy(answers)
    if name == "cache":
        return "set DALI_DIFFUSEMIX_CACHE to a folder that can be written"
    if name == "dataset" and ("shm" in error or "SIGBUS" in error):
        return "give the container more shared memory: docker run --shm-size=2g"
    if "No usable temporary directory" in error or "No space left" in error:
        return "set TMPDIR to a folder that can be written and has room"
    return _REPORT


def _torch_remedy(answers: Mapping[str, Answer]) -> str:
    again = "again " if answers["versions"].found["torch"] else ""
    return f"install PyTorch {again}for your machine: https://pytorch.org/get-started/locally"


def _install(extra: Extra, versions: Mapping[str, Any]) -> str:
    """Return the command for an optional part: it installs a missing one and replaces a broken one."""
    if all(versions[package] for package in extra.packages):
        # Without dependencies, which could replace the PyTorch that was chosen by another build.
        return f"pip install --force-reinstall --no-deps {' '.join(extra.packages)}"
    return f"pip install {extra.install}"


def _dali_remedy(answers: Mapping[str, Answer]) -> str:
    wheels = [package for package in DALI if answers["versions"].found[package]]
    extra = "cpu" if answers["gpus"].error else _cuda_extra(answers)
    if not wheels:
        return f"pip install 'dali-diffusemix[{extra}]'"
    if len(wheels) == 1:
        return f"pip install --force-reinstall {wheels[0]}"
    return f"pip uninstall -y {' '.join(wheels)}; then pip install 'dali-diffusemix[{extra}]'"


def _cuda_extra(answers: Mapping[str, Answer]) -> str:
    """Return the extra for the CUDA of PyTorch, or else of the driver."""
    cuda = answers["torch"].found["cuda"] or answers["gpus"].found["cuda"] or "12"
    return "cuda13" if int(cuda.partition(".")[0]) >= 13 else "cuda12"


def _gpu_remedy(answers: Mapping[str, Answer]) -> str:
    if answers["gpus"].error:
        return (
            "on a machine with an NVIDIA GPU and its driver: pip install 'dali-diffusemix[cuda12]' (or [cuda13]), and "
            "a PyTorch built for CUDA"
        )
    if answers["torch"].error:
        return _torch_remedy(answers)
    if answers["torch"].found["cuda"] is None:
        return "install a PyTorch built for CUDA (https://pytorch.org/get-started/locally), then run this again"
    if answers["torch"].found["why_no_gpu"]:
        return (
            "check CUDA_VISIBLE_DEVICES, and that the driver is new enough for PyTorch's CUDA "
            f"{answers['torch'].found['cuda']}"
        )
    if answers["gpu_kernel"].error:
        return f"pip install 'dali-diffusemix[{_cuda_extra(answers)}]'"
    if answers["dali_gpu"].error:
        return _dali_remedy(answers)
    return _REPORT


def _kernel_remedy(answers: Mapping[str, Answer]) -> str:
    if os.environ.get("DALI_DIFFUSEMIX_NATIVE") == "0":
        return "unset DALI_DIFFUSEMIX_NATIVE"
    package = answers["package"].found
    where = f"-e {Path(package['folder']).parent}" if package["checkout"] else "dali-diffusemix"
    first = "install a C++ compiler (Debian, Ubuntu: apt install g++), then " if answers["compiler"].error else ""
    return f"{first}pip install --force-reinstall --no-deps {where}"


def traps(answers: Mapping[str, Answer]) -> list[str]:
    """Return notes on common mistakes, even if everything works."""
    versions, machine = answers["versions"].found, answers["machine"].found
    notes = []
    if all(versions[package] for package in DALI):
        notes.append(
            f"{' and '.join(DALI)} are both installed, but own the same folder, which may hold files of both. "
            f"{_dali_remedy(answers)}"
        )
    if sum(versions[package] is not None for package in CUPY) > 1:
        notes.append("more than one CuPy is installed, in the same folder; uninstall all of them, then install one")
    if machine["quota"] is not None and machine["quota"] < machine["affinity"]:
        notes.append(
            f"this container may use {machine['quota']:g} of the {machine['affinity']} cores that it sees; "
            f"give num_workers={machine['cores']}, because more threads would have to wait"
        )
    if machine["shared_memory"] is not None and machine["shared_memory"] < 1 << 30:
        notes.append(
            f"/dev/shm has {machine['shared_memory'] >> 20} MiB, too little for many worker processes of DataLoader: "
            "docker run --shm-size=2g"
        )
    return notes
