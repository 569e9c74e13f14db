"""Images per second of plain FFCV, with the JPEGs that bench_loader.py reads: the same crops, flips, size and type.

Method: as in bench_loader.py, contenders alternate (A B C A B C ...), one epoch each time, the first (in which FFCV
compiles) not counted; the figure is the median of `--rounds`. FFCV reads a file of its own, written beforehand and held
in the page cache (os_cache=True), in random order (OrderOption.RANDOM), on the CPU: random crop decoded and resized by
RandomResizedCropRGBImageDecoder, RandomHorizontalFlip, NormalizeImage to float32. Each image is used `--repeat` times
by repeating its index, so that as much memory is read as through bench_loader's links.

The file is written in two ways (`--write`), because FFCV's own writer takes only pixels and encodes them again:

    kept          the JPEGs' own bytes, through a field whose encoder copies them; colours and subsampling stay too.
                  With --max-side they are bench_loader's, of this package's `pack`.
    encoded       by FFCV: RGBImageField(write_mode="jpg", max_resolution=--max-side, jpeg_quality=--quality); OpenCV
                  subsamples the colours (4:2:0), which makes originals without subsampling much cheaper to decode

and how a batch lies in memory (`--layout`):

    nchw          contiguous, as bench_loader's contenders make it: ToTorchImage(channels_last=False)
    contiguous    the same by torch: ToTorchImage(), then a module that calls .contiguous(); often quicker
    channels_last FFCV's own way, without that copy: the same numbers in another order of memory

--batches-ahead is 1 by default, the fastest of 1, 2 and 3 (FFCV's default) on the machine of the records.

`images_per_second` counts whole epochs. FFCV allocates its batches again in every epoch, which a long epoch hides:
`steady_images_per_second` starts when each of them has been used once: the figure to compare with.

FFCV needs an environment of its own (compiled against OpenCV and libturbojpeg; here Debian 12, Python 3.11):

    apt-get install -y g++ pkg-config libturbojpeg0-dev libopencv-dev
    python3.11 -m venv VENV
    VENV/bin/pip install "setuptools<80" wheel
    VENV/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    VENV/bin/pip install "numpy<2" numba "opencv-python-headless<4.11" pillow tqdm psutil
    VENV/bin/pip install --no-build-isolation --no-deps ffcv==1.0.2

It uses this package's measuring from the checkout: PYTHONPATH=. VENV/bin/python benchmarks/bench_ffcv.py ...

compare_ffcv.sh runs this script and bench_loader.py alternately and writes one record of both.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from record import interleaved, write

SIZE = 224
MEAN, DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # ImageNet's


def need_ffcv() -> None:
    try:
        import ffcv  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"FFCV is not here ({error}). It needs an environment of its own:\n{__doc__}") from error


class Files:
    """The photographs for FFCV's writer: (path or pixels, label)."""

    def __init__(self, root: Path, pixels: bool) -> None:
        self.paths, self.pixels = sorted(root.glob("*/*")), pixels
        self.classes = sorted({path.parent.name for path in self.paths})
        if not self.paths:
            raise SystemExit(f"No images in {root}: expected root/class/image.")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path = self.paths[index]
        label = self.classes.index(path.parent.name)
        if not self.pixels:
            return path, label
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB")), label


def write_beton(root: Path, target: Path, kept: bool, max_side: int | None, quality: int) -> None:
    """Write FFCV's file of the photographs, whole or not at all."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    class KeptJPEGField(RGBImageField):
        """Stores the bytes of a JPEG file; read as an RGBImageField."""

        def encode(self, destination: Any, image: Path, malloc: Callable[[int], Any]) -> None:
            with Image.open(image) as opened:
                if opened.format != "JPEG" or opened.mode not in ("RGB", "L"):
                    raise ValueError(f"{image} is {opened.format} in {opened.mode}: FFCV decodes JPEGs of RGB or L.")
                destination["width"], destination["height"] = opened.size
            encoded = np.fromfile(image, dtype=np.uint8)
            destination["mode"] = 0  # jpg
            destination["data_ptr"], storage = malloc(encoded.nbytes)
            storage[:] = encoded

    photographs = Files(root, pixels=not kept)
    encode = {"write_mode": "jpg", "max_resolution": max_side, "jpeg_quality": quality}
    field = KeptJPEGField() if kept else RGBImageField(**encode)
    partial = target.with_suffix(".partial")
    DatasetWriter(str(partial), {"image": field, "label": IntField()}).from_indexed_dataset(photographs)
    partial.rename(target)


def mean_bytes(beton: Path) -> float:
    """Return the mean size of a stored image in bytes."""
    from ffcv.fields import RGBImageField
    from ffcv.reader import Reader

    reader = Reader(str(beton), {"image": RGBImageField})
    return float(reader.alloc_table["size"].mean())


class Contiguous(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.contiguous()


def contender(beton: Path, options: argparse.Namespace, layout: str, steady: list[float]) -> Callable[[], int]:
    """Return a function for one epoch of FFCV; it appends the rate after the start to `steady`."""
    from ffcv.fields import RGBImageField
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.reader import Reader
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage

    custom = {"image": RGBImageField}
    image = [
        RandomResizedCropRGBImageDecoder((SIZE, SIZE)),
        RandomHorizontalFlip(),
        NormalizeImage(255 * MEAN, 255 * DEVIATION, np.float32),
        ToTensor(),
        ToTorchImage(channels_last=layout != "nchw"),
        *([Contiguous()] if layout == "contiguous" else []),
    ]
    loader = Loader(
        str(beton),
        batch_size=options.batch_size,
        num_workers=options.threads,
        os_cache=True,
        order=OrderOption.RANDOM,
        seed=0,
        indices=np.tile(np.arange(Reader(str(beton), custom).num_samples, dtype=np.uint64), options.repeat),
        pipelines={"image": image, "label": [IntDecoder(), ToTensor(), Squeeze()]},
        custom_fields=custom,
        drop_last=False,
        batches_ahead=options.batches_ahead,
    )
    slots = options.batches_ahead + 2  # batches that FFCV allocates when an epoch starts

    def epoch() -> int:
        count = before = 0
        for number, (images, _) in enumerate(loader, 1):
            count += len(images)
            if number == slots:
                begin, before = time.perf_counter(), count
        if count > before > 0:
            steady.append((count - before) / (time.perf_counter() - begin))
        return count

    return epoch


def versions() -> dict[str, str]:
    """Return versions that record.machine() does not list, and the C libraries that FFCV has loaded."""
    found = {name: metadata.version(name) for name in ("ffcv", "numba", "opencv-python-headless")}
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    for library in ("libturbojpeg", "libopencv_imgproc"):
        found[library] = ", ".join(sorted(Path(path).name for path in mapped if Path(path).name.startswith(library)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="a folder of photographs, root/class/image")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2, help="FFCV's num_workers")
    parser.add_argument("--batches-ahead", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", default="kept,encoded", help="kept, encoded, or both with a comma")
    parser.add_argument("--layout", default="nchw,contiguous,channels_last", help="some of these")
    parser.add_argument("--max-side", type=int, help="pack to N px; `kept` takes what bench_loader packed in --cache")
    parser.add_argument("--quality", type=int, default=90, help="of `encoded`")
    parser.add_argument("--cache", type=Path, help="keep FFCV's files here, of one root; bench_loader's will do")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    need_ffcv()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.cache or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        contenders, sizes, steady = {}, {}, {}
        for way in options.write.split(","):
            kept, root = way == "kept", options.root
            side = options.max_side or "whole"
            if kept and options.max_side:
                root = folder / f"files-{side}"
            kind = "files" if kept else f"encoded-{options.quality}"
            beton = folder / f"{kind}-{side}.beton"
            if not beton.exists():
                write_beton(root, beton, kept, options.max_side, options.quality)
            sizes[way] = round(mean_bytes(beton))
            for layout in options.layout.split(","):
                name = f"ffcv_{way}" + ("" if layout == "nchw" else f"_{layout}")
                steady[name] = []
                contenders[name] = contender(beton, options, layout, steady[name])
        results = interleaved(contenders, options.rounds)
    for name, rates in steady.items():
        if rates[1:]:
            results[name]["steady_images_per_second"] = round(statistics.median(rates[1:]), 1)
    photographs = len(Files(options.root, pixels=False))
    settings = {
        "images": photographs * options.repeat,
        "batch_size": options.batch_size,
        "threads": options.threads,
        "device": "cpu",
        "batches_ahead": options.batches_ahead,
        "max_side": options.max_side,
        "quality": options.quality,
        "mean_bytes": sizes,
        "versions": versions(),
    }
    write(options.out, {"benchmark": "bench_ffcv", "settings": settings, "results": results})


if __name__ == "__main__":
    main()
