"""Probes of the machine, its GPUs, and what is installed."""

import ctypes
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Final

import dali_diffusemix
from dali_diffusemix.base.cpus import affinity, control_groups, cpus, quota
from dali_diffusemix.doctor.described import described
from dali_diffusemix.errors import ConfigError, MissingDependencyError

PACKAGES: Final = (
    *("torch", "numpy", "pillow", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "nvidia-nvimgcodec-cu12"),
    *("nvidia-nvimgcodec-cu13", "cupy-cuda12x", "cupy-cuda13x", "cupy", "diffusers", "transformers", "accelerate"),
    *("safetensors", "ray", "fsspec", "s3fs", "kornia", "scipy", "matplotlib", "tensorboard", "lightning", "timm"),
    *("scikit-image", "scikit-learn", "torchdata", "webdataset"),
)


_COMPILER_SECONDS: Final = 10.0
_VARIABLES: Final = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "LD_LIBRARY_PATH", "LD_PRELOAD")


def probe_package() -> dict[str, Any]:
    folder = Path(dali_diffusemix.__file__).parent
    return {
        "version": dali_diffusemix.__version__,
        "folder": str(folder),
        "checkout": (folder.parent / "pyproject.toml").is_file(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "executable": sys.executable,
        "environment": {
            name: "(set)" if name.endswith("_KEY") else value  # reports are passed on
            for name, value in sorted(os.environ.items())
            if name.startswith("DALI_DIFFUSEMIX_") or name in _VARIABLES
        },
    }


def probe_machine() -> dict[str, Any]:
    processors, memory = read_lines("/proc/cpuinfo"), read_lines("/proc/meminfo")
    sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in memory if line.endswith("kB")}
    files = (group / name for group in control_groups("memory") for name in ("memory.max", "memory.limit_in_bytes"))
    limits = [int(line) for file in files for line in read_lines(file)[:1] if line.isdecimal()]
    try:
        distribution = platform.freedesktop_os_release().get("PRETTY_NAME")
    except OSError:
        distribution = None
    return {
        "distribution": distribution,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
        "processor": next((line.split(":", 1)[1].strip() for line in processors if "model name" in line), "unknown"),
        "cores": cpus(),
        "affinity": affinity(),
        "quota": quota(),
        "memory": sizes["MemTotal"],
        "memory_available": sizes["MemAvailable"],
        "memory_limit": min((limit for limit in limits if limit < sizes["MemTotal"]), default=None),
        "shared_memory": shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
    }


def read_lines(path: str | Path) -> list[str]:
    """Return the lines of a file; none if it cannot be read."""
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def probe_versions() -> dict[str, Any]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


class _NvmlMemory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_: ClassVar = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


def probe_gpus() -> dict[str, Any]:
    """Return the GPUs of the driver, without CUDA: by NVML, which is part of the driver."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        raise MissingDependencyError("no NVIDIA driver: libnvidia-ml.so.1 is missing") from None
    nvml.nvmlErrorString.restype = ctypes.c_char_p

    def call(name: str, *arguments: object) -> None:
        if code := getattr(nvml, name)(*arguments):
            raise MissingDependencyError(f"the NVIDIA driver does not answer: {nvml.nvmlErrorString(code).decode()}")

    text, count, version = ctypes.create_string_buffer(96), ctypes.c_uint(), ctypes.c_int()
    call("nvmlInit_v2")
    call("nvmlSystemGetDriverVersion", text, 96)
    driver = text.value.decode()
    call("nvmlSystemGetCudaDriverVersion_v2", ctypes.byref(version))
    call("nvmlDeviceGetCount_v2", ctypes.byref(count))
    devices = []
    for index in range(count.value):
        device, memory, major, minor = ctypes.c_void_p(), _NvmlMemory(), ctypes.c_int(), ctypes.c_int()
        call("nvmlDeviceGetHandleByIndex_v2", index, ctypes.byref(device))
        call("nvmlDeviceGetName", device, text, 96)
        call("nvmlDeviceGetMemoryInfo", device, ctypes.byref(memory))
        call("nvmlDeviceGetCudaComputeCapability", device, ctypes.byref(major), ctypes.byref(minor))
        capability = f"{major.value}.{minor.value}"
        devices.append({"name": text.value.decode(), "memory": memory.total, "capability": capability})
    if not devices:
        raise MissingDependencyError(f"the NVIDIA driver {driver} has no GPU")
    return {"driver": driver, "cuda": f"{version.value // 1000}.{version.value % 1000 // 10}", "devices": devices}


def probe_torch() -> dict[str, Any]:
    import torch

    why = None
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
            why = "no GPU is visible"
        except (AssertionError, RuntimeError) as error:  # the reason that torch gives
            why = described(error)
    properties = [
        torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count() if not why else 0)
    ]
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "devices": [
            {"name": one.name, "memory": one.total_memory, "capability": f"{one.major}.{one.minor}"}
            for one in properties
        ],
        "why_no_gpu": why,
    }


def probe_compiler() -> dict[str, Any]:
    """Return the C++ compiler that an installation would use, after compiling a line with it."""
    names = [os.environ.get("CXX", ""), "g++", "c++", "clang++"]
    command = next((words for words in map(shlex.split, names) if words and shutil.which(words[0])), None)
    if command is None:
        raise MissingDependencyError("no C++ compiler is found: neither $CXX nor g++, c++ or clang++")
    run = partial(subprocess.run, capture_output=True, text=True, timeout=_COMPILER_SECONDS)
    version = run([*command, "--version"]).stdout.splitlines()
    tried = run([*command, "-std=c++17", "-fsyntax-only", "-xc++", "-"], input="#include <vector>\n")
    if tried.returncode:
        said = tried.stderr.strip().splitlines()
        raise MissingDependencyError(f"{command[0]} compiles no C++17: {said[0] if said else tried.returncode}")
    return {"command": shlex.join(command), "version": version[0] if version else "unknown"}


def probe_cache() -> dict[str, Any]:
    """Check the folder of catalogs: an unnamed file is made in it, or in the closest folder that exists."""
    from dali_diffusemix.catalog.table import default_location

    folder = default_location(".").parent
    existing = folder
    while not existing.exists():
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from error
    free = shutil.disk_usage(existing).free
    return {"folder": str(folder), "exists": existing == folder, "free": free, "file_system": file_system(existing)}


def file_system(path: Path) -> str | None:
    """Return the type of the file system of a folder."""
    path, found, deepest = path.resolve(), None, -1
    for line in read_lines("/proc/self/mountinfo"):
        fields, _, source = line.partition(" - ")
        mounted = Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), fields.split()[4]))
        if path.is_relative_to(mounted) and len(mounted.parts) >= deepest:
            found, deepest = source.split()[0], len(mounted.parts)
    return found
