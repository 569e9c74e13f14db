"""Uses the package as it was installed: python installed.py library|numpy, beside a copy of material.py.

check.py runs it, with the library and then without; both must give the same samples. Nothing but the package and what
it depends on is installed: no DALI, no pytest.
"""

import contextlib
import importlib.util
import logging
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import numpy as np
from material import write_photographs
from torch.utils.data import DataLoader

import dali_diffusemix
from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, MissingDependencyError, MixSpec, TrainCrop
from dali_diffusemix.base import native

PROGRAM = Path(sys.executable).with_name("dali-diffusemix")


def run(*arguments: object) -> str:
    command = [str(PROGRAM), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def check_files() -> None:
    home = Path(dali_diffusemix.__file__).parent
    assert home.is_relative_to(sys.prefix), home
    tops = {file.parts[0] for file in metadata.files("dali-diffusemix") or ()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"..", "dali_diffusemix"}, tops
    for name in ("kernels", "tests", "benchmarks", "examples", "nvidia"):
        assert importlib.util.find_spec(name) is None, f"there is a package {name}"
    assert (home / "py.typed").is_file()
    assets = {file.name for file in resources.files("dali_diffusemix").joinpath("inspect", "assets").iterdir()}
    assert assets == {"gallery.css", "gallery.html", "gallery.js"}, assets
    kernels = {file.name for file in resources.files("dali_diffusemix.kernels").iterdir()}
    assert {"mix.cu", "mix_pixel.cuh", "flame.cuh", "jpeg.h", "mix.cpp", "read.cpp"} <= kernels, kernels


def samples() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    crop, mix = TrainCrop(32), MixSpec.paper()
    dataset = DiffuseMixDataset("train", edits="edits", fractals="fractals.npy", crop=crop, mix=mix, seed=0)
    with contextlib.suppress(MissingDependencyError):
        next(iter(DiffuseMixLoader(dataset, device="cpu")))
        raise AssertionError("a loader without DALI")
    ((images, labels),) = DataLoader(dataset, batch_size=8, num_workers=1)
    assert images.shape == (8, 3, 32, 32) and labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    return images.numpy()


def main() -> None:
    assert sys.argv[1] in ("library", "numpy")
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dali_diffusemix").addHandler(handler)
    assert (native.library() is not None) == (sys.argv[1] == "library")
    assert ("Install a C++ compiler" in "".join(said)) == (sys.argv[1] == "numpy"), said

    check_files()
    version = metadata.version("dali-diffusemix")
    assert version == dali_diffusemix.__version__ and version in run("--version")
    if sys.argv[1] == "library":
        write_photographs(Path("train"), ("ants", "bees"), 4)
        assert "8 images in 2 classes" in run("index", "train")
        run("generate", "train", "edits", "--editor", "procedural", "--prompts", "autumn,snowy", "--size", "48")
        run("fractals", "fractals.npy", "--count", "2", "--size", "32")
        np.save("samples.npy", samples())
    else:
        run("fractals", "numpy.npy", "--count", "1", "--size", "16")
        np.testing.assert_allclose(samples(), np.load("samples.npy"), atol=1e-4)


if __name__ == "__main__":
    main()
