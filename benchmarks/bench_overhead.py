"""The time that mixing adds to a training step: A_O = (T_mix - T_plain) / T_plain, the measure of the paper's Figure 4.

Method: one model trains on batches from each source alternately (A B C A B C ...): `--skip` steps are not counted,
because the source has decoded ahead meanwhile, then `--steps` are counted, as seconds per step including the next
batch. A_O of a round is computed from the turns of that round; the figure is the median over `--rounds`, the interval
the middle 95 % of medians of 10,000 resamples of the rounds. Loading and training share the machine's cores, as in a
training run.

    plain       this package's loader, MixSpec.paper(probability=0): T_plain
    diffusemix  MixSpec.paper(): nine of ten samples mixed
    all_mixed   MixSpec(probability=1)
    cutmix      plain, and kornia's CutMix of each batch, its labels probabilities
    mixup       plain, and kornia's MixUp of each batch
    plain_dali  DALI alone, as in dali_diffusemix.bench; --dali-form as in bench_loader.py: region, whole, cpu

With --decode this package's loader decodes for a GPU in one of the `WAYS` of bench_loader.py. A source that fails costs
only its own row; the record is written after each round. --amp trains in bfloat16 and channels_last.

Images are cropped by TrainCrop. First, procedural edits of all nine prompts are made, `--edit-size` pixels a side.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_loader import WAYS
from record import ROOT, write
from torch import nn

from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, MixSpec, TrainCrop
from dali_diffusemix.bench import Material, plain_dali_batches
from dali_diffusemix.fractals import render_bank
from dali_diffusemix.generate import GenerateConfig, generate

sys.path.insert(0, str(ROOT / "examples"))
from batch_transforms import batch_transform
from models import build

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]
Seconds = dict[str, list[float]]
Reasons = dict[str, str]


def ours(
    options: argparse.Namespace, edits: Path, bank: Path, size: int, probability: float | None, mixer: str | None = None
) -> Batches:
    """Yield batches of this package's loader, without end."""
    dataset = DiffuseMixDataset(
        options.data,
        edits=edits,
        fractals=bank,
        mix=MixSpec(probability=probability),
        crop=TrainCrop(size),
        seed=0,
    )
    way = {} if options.decode is None else {"decode": WAYS[options.decode]}
    loader = DiffuseMixLoader(
        dataset,
        options.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=options.workers,
        device=options.device,
        batch_transform=batch_transform(mixer, len(dataset.classes)),
        memory_format=torch.channels_last if options.amp else torch.contiguous_format,
        **way,
    )
    while True:
        yield from loader


def plain_dali(options: argparse.Namespace, size: int) -> Batches:
    """Yield batches of DALI alone, without end."""
    material = Material(
        root=options.data,
        files=options.data,
        batch_size=options.batch_size,
        num_workers=options.workers,
        device=options.device,
        size=size,
    )
    for images, labels in plain_dali_batches(material, form=options.dali_form, drop_last=True):
        yield images, labels.long()


def measure(
    sources: dict[str, Batches],
    options: argparse.Namespace,
    classes: int,
    each_round: Callable[[Seconds, Reasons], None],
) -> None:
    """Call `each_round` with the seconds per step of each source and round; one more round before is not counted.

    A source that fails is left out afterwards, with the reason.
    """
    model = build(options.model, classes).to(options.device)
    if options.amp:
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    criterion = nn.CrossEntropyLoss()
    synchronize: Callable[[], None] = torch.cuda.synchronize if options.device != "cpu" else lambda: None
    kind = torch.device(options.device).type

    def step(batches: Batches) -> None:
        images, labels = next(batches)
        if options.amp:
            images = images.to(memory_format=torch.channels_last)  # no change for this package's loader
        with torch.autocast(kind, torch.bfloat16, enabled=options.amp):
            loss = criterion(model(images), labels.to(images.device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def turn_of(batches: Batches) -> float:
        for _ in range(options.skip):
            step(batches)
        synchronize()
        begin = time.perf_counter()
        for _ in range(options.steps):
            step(batches)
        synchronize()
        return (time.perf_counter() - begin) / options.steps

    seconds: Seconds = {name: [] for name in sources}
    left_out: Reasons = {}
    for turn in range(options.rounds + 1):
        for name, batches in sources.items():
            if name in left_out:
                continue
            try:
                taken = turn_of(batches)
            except Exception as error:
                if name == "plain":  # the others are compared with it
                    raise
                left_out[name] = f"failed: {type(error).__name__}: {error}"
                seconds.pop(name)
                continue
            if turn:
                seconds[name].append(taken)
        if turn:
            each_round(seconds, left_out)


def overhead(mixed: list[float], plain: list[float]) -> dict[str, Any]:
    """Return A_O, its interval, and its value in each round."""
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
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--amp", action="store_true", help="bfloat16 and channels_last")
    parser.add_argument("--decode", choices=WAYS, help="of this package's loader on a GPU")
    parser.add_argument("--dali-form", default="region")
    parser.add_argument("--cache", type=Path, help="where edits and fractals are made; else in a folder that goes")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        cache = options.cache or Path(temporary)
        edits, bank = cache / "edits", cache / "fractals.npy"
        generate(options.data, edits, GenerateConfig(size=options.edit_size))
        if not bank.exists():
            render_bank(bank, count=64, size=options.edit_size)
        classes = len(DiffuseMixDataset(options.data, edits=edits, crop=TrainCrop(64), mix=None, seed=0).classes)
        settings = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(options).items()
            if name not in ("out", "cache", "model")
        }
        results: dict[str, Any] = {}
        left_out: dict[str, Reasons] = {}

        def keep(size: str, seconds: Seconds, reasons: Reasons) -> None:
            results[size] = {
                name: {
                    "milliseconds_per_step": round(1000 * statistics.median(found), 2),
                    "A_O": overhead(found, seconds["plain"]),
                }
                for name, found in seconds.items()
            }
            left_out[size] = dict(reasons)
            content = {"settings": settings, "model": options.model, "results": results, "left_out": left_out}
            write(options.out, {"benchmark": "bench_overhead", **content}, quiet=True)

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
            measure(sources, options, classes, partial(keep, str(size)))
            del sources
    for size, rows in results.items():
        for name, row in rows.items():
            found = row["A_O"]
            interval = f"{found['interval'][0]:.2%} to {found['interval'][1]:.2%}"
            print(f"{size:>4} {name:12}{row['milliseconds_per_step']:9.2f} ms, A_O {found['median']:7.2%} ({interval})")
        for name, reason in left_out[size].items():
            print(f"{size:>4} {name:12} {reason[:200]}")


if __name__ == "__main__":
    main()
