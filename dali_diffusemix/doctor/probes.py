"""What is found out about a machine: each probe is a function that tries something, and raises where it does not work.

They run in processes of their own (`lanes`), and import there what they try.
"""

import contextlib
import ctypes
import importlib
import os
import platform
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import dali_diffusemix
from dali_diffusemix.base.cpus import affinity, control_groups, cpus, quota
from dali_diffusemix.errors import ConfigError, DiffuseMixError, MissingDependencyError

if TYPE_CHECKING:
    from dali_diffusemix.loading.dataset import DiffuseMixDataset

__all__ = ["CUPY", "DALI", "EXTRAS", "LANES", "PROBES", "Extra", "Probe", "described"]

_PACKAGES: Final = (
    *("torch", "numpy", "pillow", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "nvidia-nvimgcodec-cu12"),
    *("nvidia-nvimgcodec-cu13", "cupy-cuda12x", "cupy-cuda13x", "cupy", "diffusers", "transformers", "accelerate"),
    *("safetensors", "ray", "fsspec", "s3fs", "kornia", "scipy", "matplotlib", "tensorboard", "lightning", "timm"),
    *("scikit-image", "scikit-learn", "torchdata", "webdataset"),
)
DALI: Final = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")
CUPY: Final = ("cupy-cuda12x", "cupy-cuda13x", "cupy")
_COMPILER_SECONDS: Final = 10.0
_VARIABLES: Final = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "LD_LIBRARY_PATH", "LD_PRELOAD")

# Of the photographs that are tried.
_HEIGHT, _WIDTH = 48, 64
_COUNT: Final = 4

# Of DATA.
_MOST_LISTED: Final = 20_000  # files
_MOST_READ: Final = 256  # files
_MOST_BYTES: Final = 4 << 20  # of a file
_READING_SECONDS: Final = 1.0  # of each of two measurements, and of listing
_THREADS: Final = 16  # the most that the loader reads with


def described(error: BaseException) -> str:
    """An error in a line, with its type unless it is one of this package's."""
    text = " ".join(str(error).split())
    return text if isinstance(error, DiffuseMixError) else f"{type(error).__name__}: {text}".removesuffix(": ")


# What is there ------------------------------------------------------------------------------------------------


def _package() -> dict[str, Any]:
    folder = Path(dali_diffusemix.__file__).parent
    return {
        "version": dali_diffusemix.__version__,
        "folder": str(folder),
        "checkout": (folder.parent / "pyproject.toml").is_file(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "executable": sys.executable,
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("DALI_DIFFUSEMIX_") or name in _VARIABLES
        },
    }


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in _lines("/proc/meminfo") if line.endswith("kB")}
    files = (group / name for group in control_groups("memory") for name in ("memory.max", "memory.limit_in_bytes"))
    limits = [int(line) for file in files for line in _lines(file)[:1] if line.isdecimal()]
    try:
        distribution = platform.freedesktop_os_release().get("PRETTY_NAME")
    except OSError:
        distribution = None
    return {
        "distribution": distribution,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
        "processor": next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), "unknown"),
        "cores": cpus(),
        "affinity": affinity(),
        "quota": quota(),
        "memory": sizes["MemTotal"],
        "memory_available": sizes["MemAvailable"],
        "memory_limit": min((limit for limit in limits if limit < sizes["MemTotal"]), default=None),
        "shared_memory": shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
    }


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _versions() -> dict[str, Any]:
    found: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_: ClassVar = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


def _gpus() -> dict[str, Any]:
    """The GPUs that the driver has, without CUDA: by NVML, which comes with the driver."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        raise MissingDependencyError("no NVIDIA driver: libnvidia-ml.so.1 is not there") from None
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
    for place in range(count.value):
        device, memory, major, minor = ctypes.c_void_p(), _Memory(), ctypes.c_int(), ctypes.c_int()
        call("nvmlDeviceGetHandleByIndex_v2", place, ctypes.byref(device))
        call("nvmlDeviceGetName", device, text, 96)
        call("nvmlDeviceGetMemoryInfo", device, ctypes.byref(memory))
        call("nvmlDeviceGetCudaComputeCapability", device, ctypes.byref(major), ctypes.byref(minor))
        capability = f"{major.value}.{minor.value}"
        devices.append({"name": text.value.decode(), "memory": memory.total, "capability": capability})
    if not devices:
        raise MissingDependencyError(f"the NVIDIA driver {driver} has no GPU")
    return {"driver": driver, "cuda": f"{version.value // 1000}.{version.value % 1000 // 10}", "devices": devices}


def _torch() -> dict[str, Any]:
    import torch

    why = None
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
            why = "no GPU is visible"
        except (AssertionError, RuntimeError) as error:  # what torch says itself
            why = described(error)
    properties = [
        torch.cuda.get_device_properties(place) for place in range(torch.cuda.device_count() if not why else 0)
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


def _compiler() -> dict[str, Any]:
    """The C++ compiler that an installation would use; it is given a line to compile."""
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


def _cache() -> dict[str, Any]:
    """The folder that catalogs are kept in: a nameless file is made where it is, or would be made."""
    from dali_diffusemix.catalog.table import default_location

    folder = default_location(".").parent
    place = folder
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from error
    free = shutil.disk_usage(place).free
    return {"folder": str(folder), "exists": place == folder, "free": free, "file_system": _file_system(place)}


# What is tried ------------------------------------------------------------------------------------------------


def _kernel() -> dict[str, Any]:
    from dali_diffusemix.base.native import load

    if os.environ.get("DALI_DIFFUSEMIX_NATIVE") == "0":
        raise ConfigError("switched off by DALI_DIFFUSEMIX_NATIVE=0; NumPy mixes, many times slower")
    try:
        library = load()
    except (OSError, ModuleNotFoundError) as error:
        raise MissingDependencyError(f"not built; NumPy mixes, many times slower ({error})") from error
    for name in ("mix", "flame", "read", "tile_jpeg"):
        if not hasattr(library, f"dali_diffusemix_{name}"):
            raise MissingDependencyError(f"built from another version: it has no dali_diffusemix_{name}")
    return {"library": library._name, "detail": "the C++ library loads"}


def _gpu_kernel() -> dict[str, Any]:
    from dali_diffusemix.base.gpu import compiler

    return dict(zip(("cupy", "nvrtc"), compiler(), strict=True))


def _picture(format: str) -> bytes:
    """A small photograph of Pillow's format: smooth, so that decoders hardly differ."""
    import io

    import numpy as np
    from PIL import Image

    rows, columns = np.mgrid[:_HEIGHT, :_WIDTH]
    pixels = np.stack([4 * rows, 3 * columns, 2 * (rows + columns)], axis=-1).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format, quality=90)
    return stream.getvalue()


def _tried(formats: Sequence[str], decode: Callable[[bytes], object]) -> dict[str, str | None]:
    """Formats, and what is wrong with each: None where it can be decoded."""
    found: dict[str, str | None] = {}
    for format in formats:
        try:
            decode(_picture(format))
            found[format] = None
        except Exception as error:  # of many kinds
            found[format] = described(error)
    if all(found.values()):
        raise RuntimeError(f"it decodes none of {', '.join(found)}: {found[formats[0]]}")
    return found


def _pillow() -> dict[str, Any]:
    from PIL import __version__, features

    from dali_diffusemix.images.codec import decode
    from dali_diffusemix.images.formats import FORMATS

    return {
        "version": __version__,
        "libjpeg_turbo": features.version("libjpeg_turbo"),
        "zlib": features.version("zlib"),
        "zlib_ng": features.version("zlib_ng"),
        "webp": features.version("webp"),
        "formats": _tried(FORMATS, decode),
    }


def _dali_cpu() -> dict[str, Any]:
    return {"formats": _dali(None)}


def _dali_gpu() -> dict[str, Any]:
    _gpus()
    return {"formats": _dali(0), "hardware_jpeg": _hardware_jpeg()}


def _dali(device: int | None) -> dict[str, str | None]:
    import numpy as np

    from dali_diffusemix.images.codec import decode
    from dali_diffusemix.loading.dali import dali, decode_by_dali

    try:
        dali()
    except MissingDependencyError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and cause.name in ("nvidia", "nvidia.dali"):
            raise MissingDependencyError("NVIDIA DALI is not installed") from error
        raise ImportError(f"NVIDIA DALI is installed, but cannot be imported: {cause}") from error

    def check(content: bytes) -> None:
        pixels = decode_by_dali(np.frombuffer(content, dtype=np.uint8), (_HEIGHT, _WIDTH), device=device)
        difference = int(np.abs(pixels.astype(int) - decode(content)).max())
        if difference > (0 if device is None else 16):
            raise ValueError(f"its pixels differ from Pillow's, by up to {difference} of 255")

    return _tried(("JPEG", "PNG"), check)


def _hardware_jpeg() -> bool | None:
    """Whether the GPU has an engine of its own for JPEGs, which nvJPEG then uses; None: that cannot be told."""
    for package in ("nvidia-nvjpeg-cu12", "nvidia-nvjpeg"):
        with contextlib.suppress(metadata.PackageNotFoundError, OSError):
            files = metadata.files(package) or []
            library = next((file.locate() for file in files if file.name.startswith("libnvjpeg.so")), None)
            if library is not None:
                handle = ctypes.c_void_p()
                # 3 is NVJPEG_BACKEND_HARDWARE; of the answers 0 is success, 7 NVJPEG_STATUS_ARCH_MISMATCH.
                code = ctypes.CDLL(str(library)).nvjpegCreateEx(3, None, None, 0, ctypes.byref(handle))
                return {0: True, 7: False}.get(code)
    return None


@contextlib.contextmanager
def _photographs() -> Iterator["DiffuseMixDataset"]:
    """A dataset of photographs in a folder of its own."""
    from dali_diffusemix.catalog.listing import index
    from dali_diffusemix.loading.dataset import DiffuseMixDataset
    from dali_diffusemix.plan.crops import TrainCrop

    with tempfile.TemporaryDirectory() as folder:
        root = _write_photographs(Path(folder) / "photographs")
        catalog = index(root, location=Path(folder) / "catalog")
        yield DiffuseMixDataset(root, catalog=catalog, crop=TrainCrop(32), normalize=None, on_error="raise")


def _write_photographs(root: Path) -> Path:
    for place in range(_COUNT):
        file = root / f"class {place % 2}" / f"{place}.{('jpg', 'png')[place // 2 % 2]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(_picture("PNG" if file.suffix == ".png" else "JPEG"))
    return root


def _dataset() -> dict[str, Any]:
    from torch.utils.data import DataLoader

    with _photographs() as dataset:
        batches = iter(DataLoader(dataset, batch_size=_COUNT, num_workers=1))
        images, _ = next(batches)
        del batches
    return {"detail": f"{len(images)} samples by a worker process"}


def _load(device: str) -> dict[str, Any]:
    import torch

    from dali_diffusemix.loading.loader import DiffuseMixLoader

    with _photographs() as dataset:
        # On a GPU too: that needs no more than PyTorch, CuPy and DALI's CPU decoders.
        with DiffuseMixLoader(dataset, batch_size=_COUNT, num_workers=1, device=device, decode="cpu") as loader:
            images, _ = next(iter(loader))
            found = images.cpu()
        difference = 255 * float((found - torch.stack([dataset[place][0] for place in range(_COUNT)])).abs().max())
    if difference > (0 if device == "cpu" else 16):
        raise RuntimeError(f"samples differ from the dataset's, by up to {difference:.3g} of 255")
    alike = "the dataset's, bit for bit" if not difference else f"the dataset's within {difference:.2g} of 255"
    return {"difference": difference, "detail": f"{_COUNT} samples by DALI: {alike}"}


def _decoding() -> dict[str, Any]:
    """Which way to decode is the fastest for the GPU, with a thread for each core; loaders then know it."""
    _gpus()
    import torch

    from dali_diffusemix.loading.auto import choose

    if not torch.cuda.is_available():
        raise MissingDependencyError("PyTorch sees no GPU")
    cores = _machine()["cores"]
    return {"threads": cores, "choice": str(choose(0, cores))}


def _edits() -> dict[str, Any]:
    from dali_diffusemix.catalog.listing import index
    from dali_diffusemix.fractals.bank import render_bank
    from dali_diffusemix.generate.config import GenerateConfig
    from dali_diffusemix.generate.run import generate
    from dali_diffusemix.store import EditStore

    with tempfile.TemporaryDirectory() as folder:
        root = _write_photographs(Path(folder) / "photographs")
        catalog = index(root, location=Path(folder) / "catalog")
        generate(root, Path(folder) / "edits", GenerateConfig(prompts=("autumn",), size=32), catalog=catalog)
        edits, fractals = EditStore.open(Path(folder) / "edits"), render_bank(Path(folder) / "f.npy", count=1, size=16)
        return {"detail": f"{len(edits)} edits and {len(fractals)} fractal made"}


def _imports(modules: Sequence[str]) -> dict[str, Any]:
    """Import packages. Nothing is done with them: that would take long."""
    for name in modules:
        package = name.partition(".")[0]
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != package:
                raise
            raise MissingDependencyError(f"{package} is not installed") from error
    names = list(dict.fromkeys(name.partition(".")[0] for name in modules))
    return {"detail": f"{' and '.join(filter(None, (', '.join(names[:-1]), names[-1])))} can be imported"}


# DATA ---------------------------------------------------------------------------------------------------------


def _data(data: str) -> dict[str, Any]:
    """How fast files of a folder or a store are read: cold, as far as the system drops them from its page cache."""
    if "://" in data:
        raise ConfigError(f"DATA is a URL, {data}, whose speed is not measured; give a folder")
    root = Path(data)
    if not root.is_dir():
        raise ConfigError(f"DATA must be a folder of images or a store, found no folder {data!r}; correct the path")
    header = b"".join(line.encode() for line in _lines(root / "store.json")[:9])
    stored = b'"magic": "dali_diffusemix.' in header
    files, unreadable, complete = _list_files(root, ".tar" if stored else "")
    if not files:
        why = f"; {unreadable}" if unreadable else ""
        raise ConfigError(f"DATA must hold {'shards' if stored else 'images'}, found no file in {data!r}{why}")
    chosen = random.Random(0).sample(files, min(len(files), _MOST_READ))
    half = -(-len(chosen) // 2)
    return {
        "path": data,
        "kind": "store" if stored else "folder",
        "file_system": _file_system(root),
        "free": shutil.disk_usage(root).free,
        "files": len(files),
        "all_listed": complete,
        "unreadable": unreadable,
        "one_thread": _read(chosen[:half], 1),
        "many_threads": _read(chosen[half:], _THREADS) if len(chosen) > half else None,
    }


def _list_files(root: Path, ending: str) -> tuple[list[Path], str | None, bool]:
    """Files below a folder, or many of them, from folders in any order; why some cannot be listed; if these are all."""
    begin = time.monotonic()
    waiting, files, unreadable = [root], list[Path](), None
    draw = random.Random(0)
    while waiting:
        if len(files) >= _MOST_LISTED or (files and time.monotonic() - begin > _READING_SECONDS):
            return files, unreadable, False
        folder = waiting.pop(draw.randrange(len(waiting)))
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir():
                        waiting.append(Path(entry))
                    elif entry.is_file() and entry.name.endswith(ending):
                        files.append(Path(entry))
        except OSError as error:
            unreadable = described(error)
    return files, unreadable, True


def _read(files: Sequence[Path], threads: int) -> dict[str, Any]:
    """Read files, each up to a size, after the system was asked to drop them from its page cache."""
    for file in files:
        with contextlib.suppress(OSError), file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before, begin = _fetched(), time.perf_counter()

    def read(file: Path) -> int | str:
        if time.perf_counter() - begin > _READING_SECONDS:
            return -1
        try:
            with file.open("rb", buffering=0) as opened:
                return len(opened.read(_MOST_BYTES))
        except OSError as error:
            return described(error)

    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(read, files))
    seconds, fetched = time.perf_counter() - begin, _fetched()
    sizes = [result for result in results if isinstance(result, int) and result >= 0]
    errors = [result for result in results if isinstance(result, str)]
    size = sum(sizes)
    return {
        "threads": threads,
        "files": len(sizes),
        "bytes": size,
        "seconds": round(seconds, 4),
        "mb_per_second": round(size / 1e6 / seconds, 1),
        "files_per_second": round(len(sizes) / seconds, 1),
        # By the system's account of this process; network file systems and memory are not in it.
        "from_storage": None if fetched is None or not size else round(min(1.0, (fetched - (before or 0)) / size), 3),
        "unreadable": len(errors),
        "error": errors[0] if errors else None,
    }


def _fetched() -> int | None:
    """Bytes that this process has had storage fetch."""
    return next((int(line.split()[1]) for line in _lines("/proc/self/io") if line.startswith("read_bytes:")), None)


def _file_system(path: Path) -> str | None:
    """The type of the file system that a folder lies on."""
    place, found, deepest = path.resolve(), None, -1
    for line in _lines("/proc/self/mountinfo"):
        fields, _, source = line.partition(" - ")
        mounted = Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), fields.split()[4]))
        if place.is_relative_to(mounted) and len(mounted.parts) >= deepest:
            found, deepest = source.split()[0], len(mounted.parts)
    return found


# The probes, and who runs them ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """Something to find out: a function, and the keys of what it finds."""

    run: Callable[..., Mapping[str, Any]]
    keys: tuple[str, ...] = ("detail",)
    seconds: float = 30.0  # that it may take


@dataclass(frozen=True)
class Extra:
    """An optional part: what is imported, what that is called by pip, and how all of it is installed."""

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
    "package": Probe(_package, ("version", "folder", "checkout", "python", "executable", "environment")),
    "machine": Probe(
        _machine,
        (
            *("distribution", "system", "libc", "processor", "cores", "affinity", "quota", "memory"),
            *("memory_available", "memory_limit", "shared_memory"),
        ),
    ),
    "versions": Probe(_versions, _PACKAGES),
    "gpus": Probe(_gpus, ("driver", "cuda", "devices")),
    "torch": Probe(_torch, ("version", "cuda", "threads", "devices", "why_no_gpu")),
    "compiler": Probe(_compiler, ("command", "version")),
    "kernel": Probe(_kernel, ("library", "detail")),
    "gpu_kernel": Probe(_gpu_kernel, ("cupy", "nvrtc")),
    "pillow": Probe(_pillow, ("version", "libjpeg_turbo", "zlib", "zlib_ng", "webp", "formats")),
    "dali_cpu": Probe(_dali_cpu, ("formats",)),
    "dali_gpu": Probe(_dali_gpu, ("formats", "hardware_jpeg")),
    "cache": Probe(_cache, ("folder", "exists", "free", "file_system")),
    "data": Probe(
        _data,
        (
            *("path", "kind", "file_system", "free", "files", "all_listed", "unreadable", "one_thread"),
            "many_threads",
        ),
    ),
    "load_cpu": Probe(partial(_load, "cpu"), ("difference", "detail")),
    "load_cuda": Probe(partial(_load, "cuda"), ("difference", "detail")),
    "decoding": Probe(_decoding, ("threads", "choice"), seconds=240.0),
    "dataset": Probe(_dataset),
    "edits": Probe(_edits),
    **{name: Probe(partial(_imports, extra.modules)) for name, extra in EXTRAS.items()},
}

# Side by side. What imports torch stands together, for that takes longest.
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
