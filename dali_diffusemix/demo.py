"""The demonstration: every step in one run, on photographs that ship with well-known packages.

    photographs -> index -> fractals -> edits -> contact sheet -> batches by DALI, and the same ones by Pillow

The edits are procedural restylings, not diffusion.
"""

import importlib.util
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dali_diffusemix.base.cpus import cpus
from dali_diffusemix.base.files import new_folder, remove_temporary
from dali_diffusemix.catalog.listing import index
from dali_diffusemix.catalog.table import Catalog
from dali_diffusemix.errors import ConfigError, MissingDependencyError
from dali_diffusemix.fractals.bank import FractalBank, render_bank
from dali_diffusemix.generate.config import GenerateConfig
from dali_diffusemix.generate.run import generate
from dali_diffusemix.inspect.preview import contact_sheet
from dali_diffusemix.loading.dataset import DiffuseMixDataset
from dali_diffusemix.loading.loader import DiffuseMixLoader
from dali_diffusemix.mix.tensor import IMAGENET_STD
from dali_diffusemix.plan.crops import TrainCrop
from dali_diffusemix.plan.order import EpochOrder
from dali_diffusemix.plan.spec import MixSpec

__all__ = ["PHOTOGRAPHS", "DemoDisplay", "DemoResult", "run_demo"]

PHOTOGRAPHS: Final = {
    "astronaut": (("skimage", "data/astronaut.png"),),
    "cat": (("skimage", "data/chelsea.png"),),
    "coffee": (("skimage", "data/coffee.png"),),
    "flower": (("sklearn", "datasets/images/flower.jpg"),),
    "galaxies": (("skimage", "data/hubble_deep_field.jpg"),),
    "motorcycle": (("skimage", "data/motorcycle_left.png"), ("skimage", "data/motorcycle_right.png")),
    "pagoda": (("sklearn", "datasets/images/china.jpg"),),
    "rocket": (("skimage", "data/rocket.jpg"),),
}
"""Class to photographs, each a package and a file in it. The licences of both packages permit this use."""

_CUTS: Final = 8  # per class
_MOST_ORIGINALS: Final = 64  # from a user's folder, which may hold a million
_FRACTALS: Final = 32
_SIZE: Final = 256
_CROP: Final = 224
_BATCH: Final = 16
_MEASURED_SECONDS: Final = 3.0
_MARKER: Final = "demo.json"
_MAGIC: Final = "dali_diffusemix.demo"


class DemoDisplay(Protocol):
    """Shows results and progress of the demonstration."""

    def fact(self, name: str, text: str) -> None:
        """Show the result of a step."""
        ...

    def progress(self, what: str, unit: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """Show a long step; yields a function to call with the number of units done, and of all units."""
        ...


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """The result of a demonstration."""

    sheet: str
    originals: int
    classes: int
    edits: int
    fractals: int
    batch_shape: tuple[int, ...]
    batch_dtype: str
    label_dtype: str
    compared: int
    """Samples of DALI and Pillow that were compared."""
    identical: int
    """Those whose pixels and labels are the same bits."""
    largest_difference: float
    """Largest difference between the two, over all pixels, in steps of 1/255."""
    images_per_second: float
    threads: int
    seconds: float


def run_demo(
    display: DemoDisplay,
    *,
    folder: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str],
    keep: bool = False,
) -> DemoResult:
    """Run every step from photographs to batches.

    Args:
        display: Shows results and progress.
        folder: Photographs, folder/class/**/image; at most 64 are used. None takes `PHOTOGRAPHS`.
        out: The output folder. Output of an earlier demonstration is removed first.
        keep: Keep and reuse the output of an earlier demonstration.

    Raises:
        ConfigError: `out` holds other files, or cannot be written.
        MissingDependencyError: The packages with the photographs, or DALI, are not installed.
        CatalogError, StoreError: The user's folder or the kept output cannot be used.
    """
    begin = time.perf_counter()
    out = Path(out).absolute()
    photographs = [] if folder is not None else _find_photographs()
    root = out / "photographs" if folder is None else Path(folder).absolute()
    with _writing(out):
        _prepare(out, root, keep)
        if folder is None and not root.is_dir():
            with display.progress("Cutting photographs", "images") as progress:
                _cut(photographs, root, progress)
    catalog = _index(display, root, out / "catalog")
    bank = _fractals(display, out / "fractals.npy")
    edits = out / "edits"
    with display.progress("Making edits", "edits") as progress:
        summary = generate(root, edits, GenerateConfig(size=_SIZE), catalog=catalog, progress=progress)
    dataset = DiffuseMixDataset(root, edits=edits, fractals=bank, mix=MixSpec.paper(), crop=TrainCrop(_CROP), seed=0)
    assert dataset.store is not None
    made = f"{summary.made} made now, {summary.images_per_second:.0f}/s" if summary.made else "all kept"
    display.fact(
        "Edits",
        f"{len(dataset.store)} of {_SIZE} x {_SIZE} pixels, under {len(dataset.store.prompts)} prompts ({made}); "
        "procedural restyling, not diffusion",
    )
    sheet = out / "sheet.png"
    with _writing(out), display.progress("Drawing samples", "samples") as progress:
        contact_sheet(dataset, progress=progress).save(sheet)
    display.fact("Sheet", f"{sheet}")
    threads = cpus()
    with DiffuseMixLoader(dataset, batch_size=_BATCH, shuffle=True, num_workers=threads, device="cpu") as loader:
        images, labels = next(iter(loader))
        display.fact(
            "Batches",
            f"images {tuple(images.shape)} {_name(images.dtype)}, "
            f"labels {tuple(labels.shape)} {_name(labels.dtype)}, on the {images.device.type.upper()}",
        )
        with display.progress("Comparing samples", "samples") as progress:
            compared, identical, difference = _compare(dataset, loader, progress)
        others = "" if identical == compared else f"; in the others no pixel differs by more than {difference:.2f}/255"
        display.fact(
            "Equality",
            f"{identical} of {compared} samples are identical by DALI and by Pillow under torch's DataLoader{others}",
        )
        with display.progress("Measuring the speed", "images"):  # for some seconds, however many these are
            speed = _measure(loader)
    display.fact("Speed", f"{speed:.0f} images/s, mixed and ready to train on, {threads} CPU threads")
    return DemoResult(
        sheet=str(sheet),
        originals=len(catalog),
        classes=len(catalog.classes),
        edits=len(dataset.store),
        fractals=len(bank),
        batch_shape=tuple(images.shape),
        batch_dtype=_name(images.dtype),
        label_dtype=_name(labels.dtype),
        compared=compared,
        identical=identical,
        largest_difference=difference,
        images_per_second=speed,
        threads=threads,
        seconds=time.perf_counter() - begin,
    )


# The output folder ----------------------------------------------------------------------------------------------------


def _prepare(out: Path, root: Path, keep: bool) -> None:
    """Make the folder, empty unless earlier output is kept. Other files are never touched."""
    marker = out / _MARKER
    if out.exists() and any(out.iterdir()):
        before = _root_of(marker)
        if before is None:
            raise ConfigError(
                f"{str(out)!r}: the demo's folder must be new, empty, or that of an earlier demo, found other files; "
                "name another with --out."
            )
        if keep and before != str(root):
            raise ConfigError(
                f"{str(out)!r}: the demo to keep must have the photographs of {str(root)!r}, found {before!r}; omit "
                "--keep to start again."
            )
        if not keep:
            for name in ("photographs", "catalog", "edits"):
                if (out / name).exists():
                    shutil.rmtree(out / name)
            for name in ("fractals.npy", "sheet.png"):
                (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({"magic": _MAGIC, "photographs": str(root)}) + "\n", encoding="ascii")


def _root_of(marker: Path) -> str | None:
    """The photographs of the demo that wrote this file; None if no demo did."""
    try:
        content = json.loads(marker.read_bytes())
        return str(content["photographs"]) if content["magic"] == _MAGIC else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{str(out)!r}: the demo's folder must be one that can be written, found: {error}; name another with --out."
        ) from error


# The steps ------------------------------------------------------------------------------------------------------------


def _find_photographs() -> list[tuple[str, list[Path]]]:
    """Find classes and files to cut, without importing the packages that hold them."""
    found = []
    for name, files in PHOTOGRAPHS.items():
        paths = []
        for package, file in files:
            spec = importlib.util.find_spec(package)
            folders = [] if spec is None else spec.submodule_search_locations or []
            path = next((one for folder in folders if (one := Path(folder) / file).is_file()), None)
            if path is None:
                raise MissingDependencyError(
                    f"the demo's photographs must be in scikit-image and scikit-learn, found no {package}/{file}; "
                    "pip install scikit-image scikit-learn, or use your own photographs: dali-diffusemix demo FOLDER."
                )
            paths.append(path)
        found.append((name, paths))
    return found


def _cut(photographs: list[tuple[str, list[Path]]], root: Path, progress: Callable[[int, int], None]) -> None:
    """Cut the photographs of each class into overlapping pictures of 250 to 500 pixels a side, the same every time."""
    remove_temporary(root.parent, root.name)
    done, total = 0, _CUTS * len(photographs)
    with new_folder(root) as folder:
        for name, paths in photographs:
            (folder / name).mkdir()
            images = [Image.open(path).convert("RGB") for path in paths]
            draws = random.Random(name)
            for cut in range(_CUTS):
                image = images[cut % len(images)]
                width, height = draws.randint(320, 500), draws.randint(250, 400)
                width, height = min(width, image.width), min(height, image.height)
                left, top = draws.randint(0, image.width - width), draws.randint(0, image.height - height)
                picture = image.crop((left, top, left + width, top + height))
                picture.save(folder / name / f"{name}-{cut}.jpg", quality=92)
                done += 1
                progress(done, total)


def _index(display: DemoDisplay, root: Path, location: Path) -> Catalog:
    with display.progress("Reading headers", "images") as progress:
        catalog = index(root, location=location, progress=progress)
    found = len(catalog)
    left_out = f", {len(catalog.rejected)} files left out" if catalog.rejected else ""
    used = ""
    if found > _MOST_ORIGINALS:
        rows = np.linspace(0, found - 1, _MOST_ORIGINALS).round().astype(np.int64)
        paths = [catalog.path(row) for row in rows]
        catalog = Catalog.from_arrays(paths, catalog.labels[rows], catalog.classes, catalog.sizes[rows])
        used = f"; the demo uses {len(catalog)}"
    display.fact("Photographs", f"{found} in {len(catalog.classes)} classes{left_out}{used}")
    return catalog


def _fractals(display: DemoDisplay, path: Path) -> FractalBank:
    if path.exists():
        bank = FractalBank.open(path)
        display.fact("Fractals", f"{len(bank)} kept")
        return bank
    begin = time.perf_counter()
    with display.progress("Rendering fractals", "fractals") as progress:
        bank = render_bank(path, count=_FRACTALS, size=_SIZE, progress=progress)
    rate = len(bank) / (time.perf_counter() - begin)
    display.fact("Fractals", f"{len(bank)} of {_SIZE} x {_SIZE} pixels ({rate:.1f}/s)")
    return bank


def _compare(
    dataset: DiffuseMixDataset, loader: DiffuseMixLoader, progress: Callable[[int, int], None]
) -> tuple[int, int, float]:
    """Compare DALI and Pillow: numbers of samples and of identical ones, largest difference in steps of 1/255."""
    order = EpochOrder(length=len(dataset), batch_size=loader.batch_size or 1, shuffle=True, seed=dataset.seed)
    batches = [order.indices(0, order.positions(step)).tolist() for step in range(len(order))]
    deviation = torch.tensor(IMAGENET_STD).reshape(1, 3, 1, 1)
    count, identical, largest = 0, 0, 0.0
    loader.set_epoch(0)
    for (images, labels), (expected, expected_labels) in zip(
        loader, DataLoader(dataset, batch_sampler=batches), strict=True
    ):
        assert torch.equal(labels, expected_labels)
        difference = (images - expected).abs() * deviation * 255
        count, largest = count + len(images), max(largest, float(difference.max()))
        identical += sum(map(torch.equal, images, expected))
        progress(count, len(dataset))
    return count, identical, largest


def _measure(loader: DiffuseMixLoader) -> float:
    """Images per second, over whole epochs."""
    count, begin = 0, time.perf_counter()
    while (passed := time.perf_counter() - begin) < _MEASURED_SECONDS:
        count += sum(len(labels) for _, labels in loader)
    return count / passed


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
