"""Images per second: DiffuseMixLoader, mixed and plain, plain DALI, Pillow with DataLoader, SPDL and WebDataset.

Method: each contender runs in a process of its own; they alternate (A B C A B C ...), one epoch each time, the first
not counted; the figure is the median of `--rounds`. All make batches of 224 x 224 float32, normalised, with random
crops and flips, on `--device`; NCHW unless the name says channels_last. Files are in the page cache after the first
epoch. Each image is used `--repeat` times, so that epochs are long compared with the batches that DALI decodes ahead
while others are timed. CPU seconds are those of the contender's process and its workers; their peak memory (PSS:
shared pages count once) is measured in the first epoch, in which nothing is timed.

    diffusemix                this package, MixSpec.paper() with every sample mixed: DALI, one fused kernel
    diffusemix_channels_last  the same, as torch.channels_last
    diffusemix_packed         the same as the first, from a packed store: the same pixels, of JPEGs in tiles
    diffusemix_whole          the same as the first, with visible_parts=False: whole images are decoded
    plain                     this package, mix=None
    plain_dali                DALI alone: decode of the crop's region only, resize, crop_mirror_normalize
    plain_dali_whole          the same, but the whole image is decoded, and cropped while it is resized
    plain_dali_cpu            the same as plain_dali, decoded on the CPU, copied, and the rest on the GPU
    pillow_plain              DataLoader, Pillow's resize(box=...), NumPy's normalise
    pillow_mixed              the same for original and edit, mixed by NumPy one sample at a time, as in the release
    spdl                      SPDL's DataLoader: FFmpeg decodes, crops, resizes and flips in threads; torch normalises
    webdataset                the same JPEGs in tar shards, WebDataset, pillow_plain's work by WebLoader's workers

On a GPU this package's loader is also measured with each way to decode: `diffusemix_WAY`, `diffusemix_packed_WAY` and
`plain_WAY`, where WAY is one of `WAYS`: `cpu`; `gpu`, whole images; `regions`; `shared`, edits on the CPU and originals
on the GPU; `fancy`, colours interpolated as on the CPU; the hardware decoder's share, in percent, at the end.

With --seconds S a turn is not an epoch but whole batches for S seconds, in steady state, as in `dali-diffusemix bench`.
A contender that fails, dies or takes more than --patience seconds for a counted turn costs only its own row: the reason
is in the record, which is written after each round.

With --max-side N the images are first shrunk by this package's `pack`. Its loader then reads the packed store; all
others, including FFCV (bench_ffcv.py), read the same JPEGs as files.

SPDL and WebDataset are in the extra `bench`; a contender that is not installed is left out, with the reason. SPDL also
needs FFmpeg's libraries.
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from record import write

from dali_diffusemix.bench import (
    Contender,
    Factory,
    Material,
    Measurement,
    PillowCrops,
    diffusemix,
    extract,
    interleaved,
    pillow,
    plain_dali,
)
from dali_diffusemix.errors import DataError, MissingDependencyError
from dali_diffusemix.fractals import render_bank
from dali_diffusemix.generate import GenerateConfig, generate
from dali_diffusemix.loading.auto import Decode
from dali_diffusemix.loading.dali import GpuDecoding
from dali_diffusemix.loading.dataset import DiffuseMixDataset
from dali_diffusemix.mix import IMAGENET_MEAN, IMAGENET_STD
from dali_diffusemix.store import OriginalStore
from dali_diffusemix.store.pack import PackConfig, pack

IMAGES_PER_SHARD = 64  # of WebDataset's
EPOCH = 1 << 14  # minimum number of images in an epoch, if turns are not epochs


# Ways to decode of this package's loader on a GPU; see `GpuDecoding`.
WAYS: dict[str, Decode] = {
    "cpu": "cpu",
    "gpu": GpuDecoding(),
    "gpu_0": GpuDecoding(hardware_load=0),
    "gpu_90": GpuDecoding(hardware_load=0.9),
    "gpu_fancy": GpuDecoding(fancy_upsampling=True),
    "regions": GpuDecoding(regions=True),
    "regions_90": GpuDecoding(regions=True, hardware_load=0.9),
    "regions_fancy": GpuDecoding(regions=True, fancy_upsampling=True),
    "shared": GpuDecoding(edits_on_cpu=True),
    "shared_90": GpuDecoding(edits_on_cpu=True, hardware_load=0.9),
    "shared_regions": GpuDecoding(regions=True, edits_on_cpu=True),
    "shared_regions_90": GpuDecoding(regions=True, edits_on_cpu=True, hardware_load=0.9),
    "shared_regions_100": GpuDecoding(regions=True, edits_on_cpu=True, hardware_load=1),
}


def missing(package: str) -> MissingDependencyError:
    return MissingDependencyError(f"{package} is not installed: pip install '.[bench]'")


@dataclass
class Crops:
    """The samples of each epoch for SPDL: files in random order, with FFmpeg's filters."""

    dataset: DiffuseMixDataset
    files: Path
    epoch: int = 0

    def __iter__(self) -> Iterator[tuple[str, str]]:
        dataset, (size, _) = self.dataset, self.dataset.crop.output_size
        self.epoch += 1
        order = np.random.default_rng().permutation(len(dataset))
        for start in range(0, len(order), 256):
            plan = dataset.planner.batch(self.epoch, order[start : start + 256])
            boxes = np.rint(plan.box * np.tile(dataset.catalog.sizes[plan.original], 2)).astype(int)
            for original, (top, left, height, width), flip in zip(plan.original, boxes, plan.flip, strict=True):
                filters = f"crop={width}:{height}:{left}:{top}:exact=1,scale={size}:{size}:flags=bilinear"
                filters += ",hflip,format=pix_fmts=rgb24" if flip else ",format=pix_fmts=rgb24"
                yield str(self.files / dataset.catalog.path(int(original))), filters


def spdl(material: Material) -> Contender:
    """Return SPDL, as its documentation builds a DataLoader: threads decode with filters, batches are converted."""
    try:
        import spdl.io
        from spdl.dataloader import DataLoader
        from spdl.io.utils import get_ffmpeg_versions
    except ImportError as error:
        raise missing("spdl") from error
    get_ffmpeg_versions()  # loads FFmpeg, or fails here instead of at each image
    dataset = material.dataset(mixed=False)
    mean = 255 * torch.tensor(IMAGENET_MEAN, device=material.device).view(3, 1, 1)
    deviation = 255 * torch.tensor(IMAGENET_STD, device=material.device).view(3, 1, 1)
    buffered = 3  # SPDL's default

    def decoded(sample: tuple[str, str]) -> Any:
        path, filters = sample
        return spdl.io.decode_packets(spdl.io.demux_image(path), filter_desc=filters)

    def batch(frames: list[Any]) -> torch.Tensor:
        pixels = torch.from_numpy(spdl.io.to_numpy(spdl.io.convert_frames(frames))).to(material.device)
        channels_first = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return channels_first.sub_(mean).div_(deviation)

    loader = DataLoader(
        Crops(dataset, material.files),
        preprocessor=decoded,
        batch_size=material.batch_size,
        aggregator=batch,
        buffer_size=buffered,
        num_threads=material.num_workers,
    )

    def epoch() -> Iterator[int]:
        count = 0
        for images in loader:
            count += len(images)
            yield len(images)
        if count != len(dataset):  # SPDL logs what fails and goes on
            raise DataError(f"SPDL must deliver {len(dataset)} images, found {count}; its log says why.")

    return Contender(epoch=epoch, ahead=buffered + material.num_workers)


def webdataset(material: Material, shards: Path, repeat: int) -> Contender:
    """Return WebDataset over tar shards of the JPEGs, each read `repeat` times; workers make whole batches."""
    try:
        import webdataset as wds
    except ImportError as error:
        raise missing("webdataset") from error
    crops = PillowCrops(material)
    dataset = crops.dataset

    def batch(samples: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        plan = dataset.planner.batch(dataset.epoch, [int(sample["__key__"]) for sample in samples])
        made = []
        for row, sample in enumerate(samples):
            with Image.open(BytesIO(sample["jpg"])) as original:
                made.append(crops.sample(plan, row, original))
        images, labels = zip(*made, strict=True)
        return torch.stack(images), torch.tensor(labels)

    urls = [str(shard) for shard in sorted(shards.glob("*.tar"))] * repeat
    stream = wds.WebDataset(urls, shardshuffle=len(urls), empty_check=False).shuffle(1000)
    stream = stream.batched(material.batch_size, collation_fn=None).map(batch)
    loader = wds.WebLoader(
        stream,
        batch_size=None,
        num_workers=material.num_workers,
        persistent_workers=True,
        pin_memory=material.device != "cpu",
    )

    def epoch() -> Iterator[int]:
        dataset.set_epoch(dataset.epoch + 1)
        return (len(images.to(material.device, non_blocking=True)) for images, _ in loader)

    return Contender(epoch=epoch, ahead=2 * material.num_workers)


def write_shards(material: Material, folder: Path, repeat: int) -> Path:
    """Write shards for WebDataset with each image once: one of the `repeat` links to it in the catalog."""
    import tarfile

    catalog = material.dataset(mixed=False).catalog
    rows = [row for row, path in enumerate(catalog.paths) if Path(path).name.startswith("0-")]
    if len(rows) * repeat != len(catalog):
        raise SystemExit(f"{material.files} must have {repeat} links to each image, found {len(catalog)} in all.")
    folder.mkdir(parents=True, exist_ok=True)
    rows = np.random.default_rng(0).permutation(rows).tolist()
    for number, start in enumerate(range(0, len(rows), IMAGES_PER_SHARD)):
        shard = folder / f"{number:05}.tar"
        if shard.exists():
            continue
        partial_shard = folder / "partial"
        with tarfile.open(partial_shard, "w", dereference=True) as tar:
            for row in rows[start : start + IMAGES_PER_SHARD]:
                tar.add(material.files / catalog.path(row), f"{row:08}.jpg")
        partial_shard.rename(shard)
    return folder


def linked(root: Path, folder: Path, repeat: int) -> Path:
    """Make a folder with several links to each image of `root`."""
    for file in root.glob("*/*"):
        (folder / file.parent.name).mkdir(parents=True, exist_ok=True)
        for turn in range(repeat):
            link = folder / file.parent.name / f"{turn}-{file.name}"
            if not link.is_symlink():
                link.symlink_to(file.resolve())
    return folder


def prepared(root: Path, folder: Path, repeat: int, max_side: int | None) -> Material:
    """Make links, packed store, edits and fractals in `folder`; existing ones stay. The edits are of the root.

    With `max_side` the packed images are also in `folder`/files-N, as files for FFCV.
    """
    case = folder / (f"packed-{max_side}-{repeat}" if max_side else f"whole-{repeat}")
    ours = files = linked(root, case / "train", repeat)
    pack(files, case / "store", PackConfig(max_side=max_side))
    if max_side:
        ours = case / "store"
        pack(root, folder / f"store-{max_side}", PackConfig(max_side=max_side))
        once = OriginalStore.open(folder / f"store-{max_side}")
        files = linked(extract(once, range(len(once)), folder / f"files-{max_side}"), case / "files", repeat)
    generate(ours, case / "edits", GenerateConfig(prompts=("sunset",), size=256))
    bank = folder / "fractals.npy"
    if not bank.exists():
        render_bank(bank, count=64, size=256)
    return Material(root=ours, files=files, edits=case / "edits", fractals=bank)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="a folder of photographs, root/class/image")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2, help="of DALI, SPDL and the kernel; workers of the others")
    parser.add_argument("--repeat", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="contenders, separated by commas")
    parser.add_argument("--max-side", type=int, help="pack the originals first: longest side N px, quality 90")
    parser.add_argument("--cache", type=Path, help="keep what is set up here for the next run, of one root")
    parser.add_argument("--seconds", type=float, help="length of a turn; else it is a whole epoch")
    parser.add_argument("--patience", type=float, default=600, help="seconds that a turn may take")
    parser.add_argument("--begin-together", action="store_true", help="the uncounted turns at the same time")
    parser.add_argument("--prepare", action="store_true", help="only set up what --cache keeps")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.cache or Path(temporary)
        material = replace(
            prepared(options.root, folder, options.repeat, options.max_side),
            batch_size=options.batch_size,
            num_workers=options.threads,
            device=options.device,
        )
        images = len(material.dataset(mixed=False))
        if options.seconds is not None:
            material = replace(material, epochs=-(-max(EPOCH, 16 * options.batch_size) // images))
        if options.prepare:
            return
        packed = replace(material, root=material.edits.parent / "store")
        shards = folder / f"shards-{options.max_side or 'whole'}"
        contenders: dict[str, Factory] = {
            "diffusemix": partial(diffusemix, material),
            "diffusemix_channels_last": partial(diffusemix, material, channels_last=True),
            "diffusemix_packed": partial(diffusemix, packed),
            "diffusemix_whole": partial(diffusemix, material, visible_parts=False),
            "plain": partial(diffusemix, material, mixed=False),
            "plain_dali": partial(plain_dali, material),
            "plain_dali_whole": partial(plain_dali, material, form="whole"),
            "pillow_plain": partial(pillow, material),
            "pillow_mixed": partial(pillow, material, mixed=True),
            "spdl": partial(spdl, material),
            "webdataset": partial(webdataset, material, shards, options.repeat),
        }
        if options.device != "cpu":
            contenders |= {
                "plain_dali_cpu": partial(plain_dali, material, form="cpu"),
                **{f"diffusemix_{way}": partial(diffusemix, material, decode=WAYS[way]) for way in WAYS},
                **{f"diffusemix_packed_{way}": partial(diffusemix, packed, decode=WAYS[way]) for way in WAYS},
                **{f"plain_{way}": partial(diffusemix, material, mixed=False, decode=WAYS[way]) for way in WAYS},
            }
        wanted = options.only.split(",") if options.only else list(contenders)
        if unknown := set(wanted) - set(contenders):
            parser.error(f"--only must name some of {', '.join(contenders)}, found {', '.join(sorted(unknown))}")
        if "webdataset" in wanted:
            write_shards(material, shards, options.repeat)
        settings = {
            "images": images,
            "batch_size": options.batch_size,
            "threads": options.threads,
            "device": options.device,
            "max_side": options.max_side,
            "seconds": options.seconds,
        }

        def keep(results: Mapping[str, Measurement], left_out: Mapping[str, str]) -> None:
            found = {name: measurement.json() for name, measurement in results.items()}
            reasons = {name: stated(reason) for name, reason in left_out.items()}
            content = {"benchmark": "bench_loader", "settings": settings, "results": found, "left_out": reasons}
            write(options.out, content, quiet=True)

        results, left_out = interleaved(
            {name: contenders[name] for name in wanted},
            rounds=options.rounds,
            seconds=options.seconds,
            optional=wanted,
            begin_together=options.begin_together,
            patience=options.patience,
            each_round=keep,
        )
        keep(results, left_out)
    first = next(iter(results.values()), None)
    for name, measurement in results.items():
        row = measurement.json()
        rate = row["images_per_second"]
        ratio = rate / first.json()["images_per_second"]
        print(f"{name:26}{rate:9.0f} images/s ({row['lowest']:.0f} to {row['highest']:.0f}) {ratio:6.2f}x")
    for name, reason in left_out.items():
        print(f"{name:26}{stated(reason)[:200]}")
    if not results:
        raise SystemExit("no contender could be measured")


def stated(reason: str) -> str:
    """Return the reason why a contender is left out, for the record."""
    return reason if "not installed" in reason else f"failed: {reason}"


if __name__ == "__main__":
    main()
