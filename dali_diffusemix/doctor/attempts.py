"""Probes that try a function of the package: decoding, loading, editing, importing."""

import contextlib
import ctypes
import importlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dali_diffusemix.doctor.described import described
from dali_diffusemix.doctor.machine import probe_gpus, probe_machine
from dali_diffusemix.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from dali_diffusemix.loading.dataset import DiffuseMixDataset

# Size and number of test photographs.
_HEIGHT, _WIDTH = 48, 64
_COUNT: Final = 4


def probe_kernel() -> dict[str, Any]:
    from dali_diffusemix.base.native import load

    if os.environ.get("DALI_DIFFUSEMIX_NATIVE") == "0":
        raise ConfigError("switched off by DALI_DIFFUSEMIX_NATIVE=0; NumPy mixes, many times slower")
    try:
        library = load()
    except (OSError, ModuleNotFoundError) as error:
        raise MissingDependencyError(f"not built for this version; NumPy mixes, many times slower ({error})") from error
    return {"library": library._name, "detail": "the C++ library loads"}


def probe_gpu_kernel() -> dict[str, Any]:
    from dali_diffusemix.base.gpu import compiler

    return dict(zip(("cupy", "nvrtc"), compiler(), strict=True))


def _picture(format: str) -> bytes:
    """Return a small photograph in one of Pillow's formats: smooth, so that decoders hardly differ."""
    import io

    import numpy as np
    from PIL import Image

    rows, columns = np.mgrid[:_HEIGHT, :_WIDTH]
    pixels = np.stack([4 * rows, 3 * columns, 2 * (rows + columns)], axis=-1).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format, quality=90)
    return stream.getvalue()


def _tried(formats: Sequence[str], decode: Callable[[bytes], object]) -> dict[str, str | None]:
    """Try formats; returns the error of each, None if it can be decoded."""
    found: dict[str, str | None] = {}
    for format in formats:
        try:
            decode(_picture(format))
            found[format] = None
        except Exception as error:  # any error
            found[format] = described(error)
    if all(found.values()):
        raise RuntimeError(f"it decodes none of {', '.join(found)}: {found[formats[0]]}")
    return found


def probe_pillow() -> dict[str, Any]:
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


def probe_dali_cpu() -> dict[str, Any]:
    return {"formats": _dali(None)}


def probe_dali_gpu() -> dict[str, Any]:
    probe_gpus()
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
    """True if the GPU has a hardware decoder for JPEGs, which nvJPEG then uses; None if unknown."""
    for package in ("nvidia-nvjpeg-cu12", "nvidia-nvjpeg"):
        with contextlib.suppress(metadata.PackageNotFoundError, OSError):
            files = metadata.files(package) or []
            library = next((file.locate() for file in files if file.name.startswith("libnvjpeg.so")), None)
            if library is not None:
                handle = ctypes.c_void_p()
                # 3 is NVJPEG_BACKEND_HARDWARE; it returns 0 for success, or 7, NVJPEG_STATUS_ARCH_MISMATCH.
                code = ctypes.CDLL(str(library)).nvjpegCreateEx(3, None, None, 0, ctypes.byref(handle))
                return {0: True, 7: False}.get(code)
    return None


@contextlib.contextmanager
def _photographs() -> Iterator["DiffuseMixDataset"]:
    """Yield a dataset of photographs in a temporary folder."""
    from dali_diffusemix.catalog.listing import index
    from dali_diffusemix.loading.dataset import DiffuseMixDataset
    from dali_diffusemix.plan.crops import TrainCrop

    with tempfile.TemporaryDirectory() as folder:
        root = _write_photographs(Path(folder) / "photographs")
        catalog = index(root, location=Path(folder) / "catalog")
        yield DiffuseMixDataset(root, catalog=catalog, crop=TrainCrop(32), normalize=None, on_error="raise")


def _write_photographs(root: Path) -> Path:
    for number in range(_COUNT):
        file = root / f"class {number % 2}" / f"{number}.{('jpg', 'png')[number // 2 % 2]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(_picture("PNG" if file.suffix == ".png" else "JPEG"))
    return root


def probe_dataset() -> dict[str, Any]:
    from torch.utils.data import DataLoader

    with _photographs() as dataset:
        batches = iter(DataLoader(dataset, batch_size=_COUNT, num_workers=1))
        images, _ = next(batches)
        del batches
    return {"detail": f"{len(images)} samples by a worker process"}


def probe_load(device: str) -> dict[str, Any]:
    import torch

    from dali_diffusemix.loading.loader import DiffuseMixLoader

    with _photographs() as dataset:
        # With DALI's CPU decoders on a GPU too: PyTorch and CuPy are then all that it needs.
        with DiffuseMixLoader(dataset, batch_size=_COUNT, num_workers=1, device=device, decode="cpu") as loader:
            images, _ = next(iter(loader))
            found = images.cpu()
        difference = 255 * float((found - torch.stack([dataset[index][0] for index in range(_COUNT)])).abs().max())
    if difference > (0 if device == "cpu" else 16):
        raise RuntimeError(f"samples differ from the dataset's, by up to {difference:.3g} of 255")
    alike = "the dataset's, bit for bit" if not difference else f"the dataset's within {difference:.2g} of 255"
    return {"difference": difference, "detail": f"{_COUNT} samples by DALI: {alike}"}


def probe_decoding() -> dict[str, Any]:
    """Find the fastest way to decode for the GPU, with one thread per core; loaders then use it."""
    probe_gpus()
    import torch

    from dali_diffusemix.loading.auto import choose

    if not torch.cuda.is_available():
        raise MissingDependencyError("PyTorch sees no GPU")
    cores = probe_machine()["cores"]
    return {"threads": cores, "choice": str(choose(0, cores))}


def probe_edits() -> dict[str, Any]:
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


def probe_imports(modules: Sequence[str]) -> dict[str, Any]:
    """Import packages, without using them: that would take long."""
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
