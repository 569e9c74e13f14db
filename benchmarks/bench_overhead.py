"""What mixing adds to a training step: A_O = (T_mix - T_plain) / T_plain, the measure of the paper's Figure 4.

Method: one model trains on batches from each source in turn (A B C A B C ...), `--skip` steps uncounted, because the
source has decoded ahead meanwhile, then `--steps` counted: the seconds of a step, next batch included. A_O of a round
is from its own turns; the figure is the median over `--rounds`, the interval the middle 95 % of medians of 10,000
resamples of the rounds. Loading and training share the machine's cores, as they do in training on it.

    plain       this package's loader, MixSpec.paper(probability=0): T_plain
    diffusemix  MixSpec.paper(): nine of ten samples mixed
    all_mixed   MixSpec(probability=1)
    cutmix      plain, and kornia's CutMix of each batch, its labels probabilities
    mixup       plain, and kornia's MixUp of each batch
    plain_dali  DALI alone: decode of the crop's region, resize, crop_mirror_normalize; in the same place

Images are cropped by TrainCrop; edits of all nine prompts are made first: procedural, `--edit-size` pixels a side.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import ROOT, write
from torch import nn

from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, MixSpec, TrainCrop
from dali_diffusemix.bench import dali
from dali_diffusemix.fractals import render_bank
from dali_diffusemix.generate import GenerateConfig, generate
from dali_diffusemix.mixing import IMAGENET, IMAGENET_MEAN, IMAGENET_STD

sys.path.insert(0, str(ROOT / "examples"))
from batch_transforms import batch_transform
from models import build

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


def ours(
    options: argparse.Namespace, edits: Path, bank: Path, size: int, probability: float | None, *names: str
) -> Batches:
    """Batches of this package's loader, for ever."""
    dataset = DiffuseMixDataset(
        options.data,
        edits=edits,
        fractals=bank,
        mix=MixSpec(probability=probability),
        crop=TrainCrop(size),
        normalize=None if names else IMAGENET,
    )
    loader = DiffuseMixLoader(
        dataset,
        options.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=options.workers,
        device=options.device,
        batch_transform=batch_transform(names, len(dataset.classes)),
    )
    while True:
        yield from loader


def plain_dali(options: argparse.Namespace, size: int) -> Batches:
    """Batches of DALI's own operators, for ever."""
    fn, pipeline_def, types = dali()
    cuda = options.device != "cpu"

    @pipeline_def(
        batch_size=options.batch_size,
        num_threads=options.workers,
        device_id=0 if cuda else None,
        prefetch_queue_depth=2,
        seed=0,
    )
    def pipeline() -> Any:
        encoded, label = fn.readers.file(file_root=str(options.data), random_shuffle=True)
        pixels = fn.decoders.image_random_crop(
            encoded, device="mixed" if cuda else "cpu", output_type=types.RGB, random_aspect_ratio=[3 / 4, 4 / 3]
        )
        pixels = fn.resize(pixels, size=[size, size], interp_type=types.INTERP_LINEAR, antialias=True)
        images = fn.crop_mirror_normalize(
            pixels,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[255 * mean for mean in IMAGENET_MEAN],
            std=[255 * deviation for deviation in IMAGENET_STD],
            mirror=fn.random.coin_flip(),
        )
        return images, label

    built = pipeline()
    while True:
        images, labels = (torch.utils.dlpack.from_dlpack(one.as_tensor()) for one in built.run())
        yield images, labels.flatten().long()


def measure(sources: dict[str, Batches], options: argparse.Namespace, classes: int) -> dict[str, list[float]]:
    """Seconds of a step, for each source and round; the round before the first is not counted."""
    model = build("resnet18", classes).to(options.device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    criterion = nn.CrossEntropyLoss()
    synchronize: Callable[[], None] = torch.cuda.synchronize if options.device != "cpu" else lambda: None

    def step(batches: Batches) -> None:
        images, labels = next(batches)
        loss = criterion(model(images), labels.to(images.device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    seconds: dict[str, list[float]] = {name: [] for name in sources}
    for turn in range(options.rounds + 1):
        for name, batches in sources.items():
            for _ in range(options.skip):
                step(batches)
            synchronize()
            begin = time.perf_counter()
            for _ in range(options.steps):
                step(batches)
            synchronize()
            if turn:
                seconds[name].append((time.perf_counter() - begin) / options.steps)
    return seconds


def overhead(mixed: list[float], plain: list[float]) -> dict[str, Any]:
    """A_O, its interval, and each round's."""
    each = np.array(mixed) / np.array(plain) - 1
    drawn = np.random.default_rng(0).integers(0, len(each), (10_000, len(each)))
    low, high = np.quantile(np.median(each[drawn], axis=1), [0.025, 0.975])
    return {
        "median": round(float(np.median(each)), 4),
        "interval": [round(float(low), 4), round(float(high), 4)],
        "each": [round(float(one), 4) for one in each],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of originals")
    parser.add_argument("--sizes", default="64,128", help="pixels a side")
    parser.add_argument("--edit-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--skip", type=int, default=6)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--sources", default="plain,diffusemix,all_mixed,cutmix,mixup,plain_dali")
    parser.add_argument("--cache", type=Path, help="where edits and fractals are made; else in a folder that goes")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        cache = options.cache or Path(temporary)
        edits, bank = cache / "edits", cache / "fractals.npy"
        generate(options.data, edits, GenerateConfig(size=options.edit_size))
        if not bank.exists():
            render_bank(bank, count=64, size=options.edit_size)
        classes = len(DiffuseMixDataset(options.data, edits=edits, crop=TrainCrop(64)).classes)
        results: dict[str, Any] = {}
        for size in map(int, options.sizes.split(",")):
            made: dict[str, Callable[[], Batches]] = {
                "plain": lambda size=size: ours(options, edits, bank, size, 0.0),
                "diffusemix": lambda size=size: ours(options, edits, bank, size, None),
                "all_mixed": lambda size=size: ours(options, edits, bank, size, 1.0),
                "cutmix": lambda size=size: ours(options, edits, bank, size, 0.0, "cutmix"),
                "mixup": lambda size=size: ours(options, edits, bank, size, 0.0, "mixup"),
                "plain_dali": lambda size=size: plain_dali(options, size),
            }
            sources = {name: made[name]() for name in options.sources.split(",")}
            seconds = measure(sources, options, classes)
            results[str(size)] = {
                name: {
                    "milliseconds_per_step": round(1000 * statistics.median(found), 2),
                    "A_O": overhead(found, seconds["plain"]),
                }
                for name, found in seconds.items()
            }
            del sources
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name not in ("out", "cache")
    }
    write(options.out, {"settings": settings, "model": "resnet18", "results": results})


if __name__ == "__main__":
    main()
