"""The cost of augmentation: of the whole loader with each way to augment, and of each operation in the kernel.

    python benchmarks/bench_augment.py loaders PHOTOGRAPHS --out RECORD
    python benchmarks/bench_augment.py operations --out RECORD
    python benchmarks/bench_augment.py operations --device cuda --out RECORD

loaders: 224 pixels, TrainCrop, batch 64, two threads or workers, float32, normalised, on the CPU. Contenders:

    plain                     this package, mix=None, no augment
    plain_augment             the same with augment=TrivialAugmentWide()
    plain_transform           the same with batch_transform: torchvision's v2.TrivialAugmentWide on each image of a
                              uint8 batch, then torch normalises the batch. It runs in the main process.
    mixed, mixed_augment,     the same three with every sample mixed by MixSpec.paper()
    mixed_transform
    torchvision               ImageFolder (Pillow), v2.RandomResizedCrop, RandomHorizontalFlip, ToImage, ToDtype,
                              Normalize; DataLoader with two persistent workers
    torchvision_augment       the same with v2.TrivialAugmentWide after the flip, on Pillow images

Method of loaders, as in `bench_loader.py`: each contender runs in a process of its own; they alternate. A turn takes
whole batches for at least --seconds, in steady state. The figures are medians of --rounds; the first round is not
counted. `augment_cpu_milliseconds_per_image` is the CPU time of a contender with the operations minus that of the same
one without: the median over rounds, the lowest and the highest. The target for `augment=` is 0.35 ms. Without
torchvision its contenders are left out.

operations: a batch of mixed samples of 224 pixels (64 on the CPU, 256 on a GPU), made by `mix.call` from 500 x 375
originals and 256 x 256 edits in memory: smooth random pictures with a little noise. float32, NCHW. Needs neither DALI
nor torchvision. Cases: no augment ("none"; samples are not rounded to 8 bits), one operation that changes nothing
("identity"), each operation, and each setting with what its plan draws, over --plans batches.

Method of operations: cases alternate, --rounds counted rounds after an uncounted one. On the CPU the figure is the CPU
time on one thread. On a GPU it is the time between two CUDA events around `mix_on_device`, queued behind other work so
that the device does not wait for the host; `host_microseconds_per_image` is the time that the call takes on the host.
`over_identity` and `over_none` are medians over rounds of the difference from these cases in the same round. The
figures of a setting are means over its batches.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from record import write

from dali_diffusemix.base import gpu
from dali_diffusemix.base.philox import draw
from dali_diffusemix.mix import IMAGENET_MEAN, IMAGENET_STD, TensorFormat
from dali_diffusemix.mix.call import mix, mix_on_device, piece_table
from dali_diffusemix.plan import BatchPlan, MixSpec, Planner, TrainCrop
from dali_diffusemix.plan.augment import (
    CODES,
    FILTERS,
    OPERATION,
    Augment,
    AutoAugment,
    ColorJitter,
    RandAugment,
    RandomErasing,
    TrivialAugmentWide,
    augmentations,
    draw_operations,
    no_operations,
)

SIDE = 224
ORIGINAL, EDIT, BANK = (375, 500), (256, 256), (64, 256, 256, 3)
EPOCH = 1 << 14  # minimum number of images in an epoch
TARGET = 0.35  # CPU milliseconds per image of augment=TrivialAugmentWide()

# Operations -----------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, Augment] = {
    "TrivialAugmentWide()": TrivialAugmentWide(),
    "TrivialAugmentWide(bilinear)": TrivialAugmentWide(interpolation="bilinear"),
    "RandAugment()": RandAugment(),
    "AutoAugment()": AutoAugment(),
    "ColorJitter(0.4, 0.4, 0.4, 0.1)": ColorJitter(0.4, 0.4, 0.4, 0.1),
    "ThreeAugment": "ThreeAugment",
    "rand-m9-mstd0.5-inc1": "rand-m9-mstd0.5-inc1",
    "RandomErasing(1)": RandomErasing(1),
    "RandomErasing(1, value='random')": RandomErasing(1, value="random"),
}

# Typical values; of the warps for each filter.
VALUES: dict[str, tuple[float, ...]] = {
    "identity": (),
    "shear_x": (0.3,),
    "shear_y": (0.3,),
    "translate_x": (20,),
    "translate_y": (20,),
    "rotate": (20.0,),
    "brightness": (1.4,),
    "contrast": (1.4,),
    "color": (1.4,),
    "sharpness": (1.4,),
    "hue": (0.1,),
    "grayscale": (),
    "posterize": (4,),
    "solarize": (128,),
    "solarize_add": (60,),
    "autocontrast": (),
    "equalize": (),
    "invert": (),
    "blur": (1.0, 13),
    "erase": (50, 60, 100, 90),
    "erase_noise": (50, 60, 100, 90, 1, 2),
}
WARPS = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")


class OneEdit:
    """Every original has one edit."""

    def __init__(self, count: int) -> None:
        self.starts = np.arange(count + 1)

    def originals_of(self, edits: NDArray[np.int64]) -> NDArray[np.int64]:
        return edits


def pictures(count: int, size: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Return (count, height, width, 3) uint8: smooth colours with a little noise."""
    coarse = torch.rand(count, 3, 9, 12, device=device)
    made = torch.empty(count, *size, 3, dtype=torch.uint8, device=device)
    for start in range(0, count, 16):
        smooth = torch.nn.functional.interpolate(coarse[start : start + 16], size, mode="bicubic") * 255
        smooth += torch.randn_like(smooth) * 4
        made[start : start + 16] = smooth.clamp_(0, 255).permute(0, 2, 3, 1).to(torch.uint8)
    return made


@dataclass(frozen=True)
class Batch:
    """A mixed batch without operations, and what holds its pixels."""

    plan: BatchPlan
    pieces: NDArray[np.void]
    pixels: list[torch.Tensor]


def make_batch(count: int, device: torch.device) -> Batch:
    planner = Planner(
        seed=0,
        crop=TrainCrop(SIDE),
        sizes=np.tile(np.array(ORIGINAL, dtype=np.int32), (count, 1)),
        mix=MixSpec(probability=1),
        edits=OneEdit(count),
        fractals=BANK[0],
    )
    pixels = [pictures(count, size, device) for size in (ORIGINAL, EDIT)]
    data = np.stack([(one.data_ptr() + np.arange(count) * one[0].numel()).astype(np.uint64) for one in pixels])
    shapes = np.array([ORIGINAL, EDIT], dtype=np.int32)[:, None].repeat(count, axis=1)
    return Batch(planner.batch(0, np.arange(count)), piece_table(data, shapes), pixels)


def cases(count: int, plans: int) -> dict[str, list[NDArray[np.void]]]:
    """Return the operations of each case, for one batch or more."""
    found = {"none": [no_operations(count)]}
    for name, values in VALUES.items():
        for number, filter in enumerate(FILTERS if name in WARPS else ("",)):
            one = np.zeros((count, 1), dtype=OPERATION)
            one["code"], one["filter"], one["fill"] = CODES[name], number, 128
            one["values"][..., : len(values)] = values
            found[f"{name}, {filter}" if filter else name] = [one]
    for name, augment in SETTINGS.items():
        found[name] = []
        for epoch in range(plans):

            def draws(field: int, rows: NDArray[np.int64], epoch: int = epoch) -> NDArray[np.uint32]:
                return draw(0, epoch, rows, [field])[0]

            found[name].append(draw_operations(augmentations(augment), count, (SIDE, SIDE), draws))
    return found


Times = dict[str, float]  # seconds by kind


def on_cpu(batch: Batch) -> Callable[[NDArray[np.void]], Times]:
    format = TensorFormat()
    bank = pictures(BANK[0], BANK[1:3], torch.device("cpu")).numpy()
    out = np.empty(format.shape(len(batch.plan), batch.plan.output_size), dtype=format.storage)

    def run(operations: NDArray[np.void]) -> Times:
        plan = replace(batch.plan, operations=operations)
        begin = time.process_time()
        mix(plan, batch.pieces, bank, out=out, format=format, threads=1)
        return {"": time.process_time() - begin}

    return run


def on_gpu(batch: Batch, device: torch.device) -> Callable[[NDArray[np.void]], Times]:
    format = TensorFormat()
    bank = gpu.DeviceBank(pictures(BANK[0], BANK[1:3], device).cpu().numpy(), device)
    out = torch.empty(format.shape(len(batch.plan), batch.plan.output_size), device=device)

    def run(operations: NDArray[np.void]) -> Times:
        plan = replace(batch.plan, operations=operations)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(10_000_000)  # about 5 ms: longer than the host takes
        begin.record()
        before = time.perf_counter()
        mix_on_device(plan, batch.pieces, bank, out=out, format=format)
        host = time.perf_counter() - before
        end.record()
        end.synchronize()
        return {"": begin.elapsed_time(end) / 1e3, "host_": host}

    return run


def operations(options: argparse.Namespace) -> None:
    began = time.perf_counter()
    torch.manual_seed(0)
    cuda = options.device != "cpu"
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    count = options.batch_size or (256 if cuda else 64)
    batch = make_batch(count, device)
    run = on_gpu(batch, device) if cuda else on_cpu(batch)
    some = cases(count, options.plans)
    turns: dict[str, list[list[Times]]] = {name: [] for name in some}  # rounds, batches
    for turn in range(1 + options.rounds):
        if turn > 1 and time.perf_counter() - began > options.limit:
            break
        for name, batches in some.items():
            found = [run(one) for one in batches]
            if turn:
                turns[name].append(found)
    results: dict[str, dict[str, float]] = {}
    for name, rounds in turns.items():
        row = results[name] = {}
        for kind in rounds[0][0]:
            each = [statistics.mean(one[kind] for one in batches) / count * 1e6 for batches in rounds]
            row[f"{kind}microseconds_per_image"] = round(statistics.median(each), 3)
            if kind:
                continue
            row["lowest"], row["highest"] = round(min(each), 3), round(max(each), 3)
            for other in ("identity", "none"):
                pairs = zip(each, turns[other], strict=True)
                over = statistics.median(one - two[0][""] / count * 1e6 for one, two in pairs)
                row[f"over_{other}"] = round(over, 3)
        host = f" {row['host_microseconds_per_image']:8.2f} on the host" if cuda else ""
        print(
            f"{name:34}{row['microseconds_per_image']:9.2f} us an image, over identity {row['over_identity']:8.2f}, "
            f"over none {row['over_none']:8.2f}{host}"
        )
    settings = {
        "part": "operations",
        "device": options.device,
        "batch_size": count,
        "rounds": len(turns["none"]),
        "plans": options.plans,
        "seconds": round(time.perf_counter() - began, 1),
    }
    write(options.out, {"benchmark": "bench_augment", "settings": settings, "results": results}, quiet=True)


# Loaders --------------------------------------------------------------------------------------------------------------
# DALI and torchvision are imported here only: the other part runs without them.

Way = Literal["none", "augment", "transform"]
LOADERS = ("plain", "plain_augment", "plain_transform", "mixed", "mixed_augment", "mixed_transform")
LOADERS += ("torchvision", "torchvision_augment")


def torchvision_v2() -> Any:
    from dali_diffusemix.errors import MissingDependencyError

    try:
        from torchvision.transforms import v2
    except ImportError as error:
        raise MissingDependencyError("torchvision is not installed: see tests/torchvision") from error
    return v2


def ours(material: Any, *, mixed: bool, way: Way) -> Any:
    """Return this package's loader."""
    from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader
    from dali_diffusemix.bench import Contender
    from dali_diffusemix.loading.seeding import globally_seeded

    more: dict[str, Any] = {}
    if way == "transform":
        trivial = torchvision_v2().TrivialAugmentWide()
        mean = 255 * torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
        deviation = 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1)

        def transform(images: torch.Tensor, labels: torch.Tensor, _: object) -> tuple[torch.Tensor, torch.Tensor]:
            augmented = torch.stack([trivial(image) for image in images])
            return augmented.float().sub_(mean).div_(deviation), labels

        more = {"dtype": torch.uint8, "batch_transform": globally_seeded(transform)}
    dataset = DiffuseMixDataset(
        material.root,
        edits=material.edits if mixed else None,
        fractals=material.fractals if mixed else None,
        mix=MixSpec(probability=1) if mixed else None,
        crop=TrainCrop(SIDE),
        augment=TrivialAugmentWide() if way == "augment" else None,
        seed=0,
        **({"normalize": None} if way == "transform" else {}),
    )
    loader = DiffuseMixLoader(
        dataset, material.batch_size, shuffle=True, num_workers=material.num_workers, device="cpu", **more
    )
    return Contender(epoch=lambda: (len(images) for images, _ in loader), ahead=3)


def by_torchvision(material: Any, *, augment: bool) -> Any:
    """Return ImageFolder and v2's transforms under DataLoader, with persistent workers."""
    v2 = torchvision_v2()
    from torchvision.datasets import ImageFolder

    from dali_diffusemix.bench import Contender

    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SIDE),
            v2.RandomHorizontalFlip(),
            *([v2.TrivialAugmentWide()] if augment else []),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    loader = torch.utils.data.DataLoader(
        ImageFolder(str(material.files), transform),
        material.batch_size,
        shuffle=True,
        num_workers=material.num_workers,
        persistent_workers=True,
    )
    return Contender(epoch=lambda: (len(images) for images, _ in loader), ahead=2 * material.num_workers)


def prepared(root: Path, folder: Path, options: argparse.Namespace) -> Any:
    """Make links to the photographs, edits and fractals in `folder`; existing ones stay."""
    from bench_loader import linked
    from bench_small import once, repeated_edits

    from dali_diffusemix.bench import Material
    from dali_diffusemix.catalog import index
    from dali_diffusemix.fractals import render_bank
    from dali_diffusemix.generate import GenerateConfig, generate
    from dali_diffusemix.store import EditStore

    repeat = -(-EPOCH // sum(1 for _ in root.glob("*/*")))
    folder.mkdir(parents=True, exist_ok=True)
    files = once(folder / "train", lambda new: linked(root, new, repeat))
    config = GenerateConfig(prompts=("sunset",), size=256)
    distinct = once(folder / "distinct-edits", lambda new: generate(root, new, config))
    edits = once(folder / "edits", lambda new: repeated_edits(EditStore.open(distinct), index(files), new))
    if not (folder / "fractals.npy").exists():
        render_bank(folder / "fractals.npy", count=64, size=256)
    return Material(
        root=files,
        files=files,
        edits=edits,
        fractals=folder / "fractals.npy",
        batch_size=options.batch_size or 64,
        num_workers=options.threads,
    )


def differences(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the CPU milliseconds per image that the operations add, by contender, from pairs in the same round."""
    found = {}
    for name in results:
        base, _, way = name.rpartition("_")
        if base in results and way in ("augment", "transform"):
            pairs = zip(results[name].cpu_seconds_per_image, results[base].cpu_seconds_per_image, strict=True)
            each = [1e3 * (one - two) for one, two in pairs]
            figures = {"median": statistics.median(each), "lowest": min(each), "highest": max(each)}
            found[name] = {figure: round(value, 4) for figure, value in figures.items()}
    return found


def loaders(options: argparse.Namespace) -> None:
    from dali_diffusemix.bench import interleaved

    with tempfile.TemporaryDirectory() as temporary:
        material = prepared(options.photographs, options.cache or Path(temporary), options)
        contenders: dict[str, Any] = {
            name if way == "none" else f"{name}_{way}": partial(ours, material, mixed=name == "mixed", way=way)
            for name in ("plain", "mixed")
            for way in ("none", "augment", "transform")
        }
        contenders["torchvision"] = partial(by_torchvision, material, augment=False)
        contenders["torchvision_augment"] = partial(by_torchvision, material, augment=True)
        assert set(contenders) == set(LOADERS)
        settings = {
            "part": "loaders",
            "device": "cpu",
            "images": sum(1 for _ in material.files.glob("*/*")),
            "batch_size": material.batch_size,
            "threads": options.threads,
            "rounds": options.rounds,
            "seconds": options.turn,
            "target_cpu_milliseconds_per_image": TARGET,
        }

        def keep(results: Mapping[str, Any], left_out: Mapping[str, str]) -> None:
            content = {
                "benchmark": "bench_augment",
                "settings": settings,
                "results": {name: measurement.json() for name, measurement in results.items()},
                "augment_cpu_milliseconds_per_image": differences(results),
                "left_out": dict(left_out),
            }
            write(options.out, content, quiet=True)

        results, left_out = interleaved(
            {name: contenders[name] for name in options.only.split(",")} if options.only else contenders,
            rounds=options.rounds,
            seconds=options.turn,
            optional=list(contenders),
            patience=300,
            each_round=keep,
        )
        keep(results, left_out)
    for name, measurement in results.items():
        row = measurement.json()
        print(
            f"{name:22}{row['images_per_second']:8.0f} images/s ({row['lowest']:.0f} to {row['highest']:.0f})"
            f"{row['cpu_seconds_per_image'] * 1e3:8.3f} ms of CPU"
        )
    for name, row in differences(results).items():
        print(f"{name:22} adds {row['median']:.3f} ms of CPU ({row['lowest']:.3f} to {row['highest']:.3f})")
    for name, reason in left_out.items():
        print(f"{name:22}{reason[:200]}")
    if not results:
        raise SystemExit("no contender could be measured")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    of_loaders = parts.add_parser("loaders")
    of_loaders.add_argument("photographs", type=Path, help="a folder of photographs, root/class/image")
    of_loaders.add_argument("--threads", type=int, default=2, help="of this package; workers of DataLoader")
    of_loaders.add_argument("--seconds", dest="turn", type=float, default=4.0, help="length of a turn")
    of_loaders.add_argument("--cache", type=Path, help="keep what is made here for the next run, of one root")
    of_loaders.add_argument("--only", default="", help="contenders, separated by commas")
    of_operations = parts.add_parser("operations")
    of_operations.add_argument("--device", default="cpu")
    of_operations.add_argument("--plans", type=int, default=4, help="batches of each setting")
    of_operations.add_argument("--limit", type=float, default=20.0, help="seconds after which no round begins")
    for part, rounds in ((of_loaders, 5), (of_operations, 20)):
        part.add_argument("--batch-size", type=int, help="64; of operations on a GPU 256")
        part.add_argument("--rounds", type=int, default=rounds)
        part.add_argument("--out", type=Path)
    options = parser.parse_args()
    {"loaders": loaders, "operations": operations}[options.part](options)


if __name__ == "__main__":
    main()
