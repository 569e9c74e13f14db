"""Images a second: DiffuseMixLoader, mixed and plain, against plain DALI and against Pillow with DataLoader.

Method: one process, contenders in turn (A B C A B C ...), one epoch each time, the first not counted; the figure is the
median of `--rounds`. All make 224 x 224 float32 NCHW batches, normalised, with random crops and flips, on `--device`.
Files are in the page cache after the first epoch. Each image is taken `--repeat` times, by links: DALI decodes first
batches of its next epoch while the others are timed, which a short epoch would count in its favour.

    diffusemix        this package, MixSpec.paper() with every sample mixed: DALI, one fused kernel
    plain             this package, mix=None
    plain_dali        DALI alone: decode of the crop's region only, resize, crop_mirror_normalize
    pillow_plain      DataLoader, Pillow's resize(box=...), torch's normalise
    pillow_mixed      the same for original and edit, mixed for each sample with NumPy, as the released code does
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from record import interleaved, write
from torch.utils.data import DataLoader, Dataset

from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, MixSpec, TrainCrop
from dali_diffusemix.fractals import render_bank
from dali_diffusemix.generate import GenerateConfig, generate
from dali_diffusemix.mixing import IMAGENET_MEAN, IMAGENET_STD, edit_weight

SIZE = 224


def plain_dali(dataset: DiffuseMixDataset, batch_size: int, threads: int, device: str) -> Callable[[], int]:
    """DALI as its users have it, with its own random crop."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    cuda = device != "cpu"

    @pipeline_def(batch_size=batch_size, num_threads=threads, device_id=0 if cuda else None, seed=0)
    def pipeline() -> Any:
        files, labels = [path for path, _ in dataset.samples], dataset.targets
        encoded, label = fn.readers.file(files=files, labels=labels, random_shuffle=True, name="reader")
        pixels = fn.decoders.image_random_crop(encoded, device="mixed" if cuda else "cpu", output_type=types.RGB)
        pixels = fn.resize(pixels, size=[SIZE, SIZE], interp_type=types.INTERP_LINEAR, antialias=True)
        images = fn.crop_mirror_normalize(
            pixels,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[255 * m for m in IMAGENET_MEAN],
            std=[255 * s for s in IMAGENET_STD],
            mirror=fn.random.coin_flip(),
        )
        return images, label

    names, policy = ["images", "labels"], LastBatchPolicy.PARTIAL
    iterator = DALIGenericIterator(pipeline(), names, reader_name="reader", last_batch_policy=policy, auto_reset=True)

    def epoch() -> int:
        return sum(len(batch[0]["images"]) for batch in iterator)

    return epoch


class PillowDataset(Dataset[tuple[torch.Tensor, int]]):
    """The reference way, a sample at a time, at its fastest in Pillow and NumPy."""

    def __init__(self, dataset: DiffuseMixDataset, mixed: bool) -> None:
        self.dataset, self.mixed = dataset, mixed
        self.mean = np.array(IMAGENET_MEAN, dtype=np.float32) * 255
        self.deviation = np.array(IMAGENET_STD, dtype=np.float32) * 255

    def __len__(self) -> int:
        return len(self.dataset)

    @staticmethod
    def cropped(image: Image.Image, box: np.ndarray) -> np.ndarray:
        top, left, height, width = box * [image.height, image.width, image.height, image.width]
        region = (left, top, min(left + width, image.width), min(top + height, image.height))
        resized = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=region)
        return np.asarray(resized, dtype=np.float32)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        dataset = self.dataset
        plan = dataset.planner.batch(dataset.epoch, [index])
        with Image.open(dataset.path_of(index)) as original:
            sample = self.cropped(original, plan.box[0])
        if self.mixed and plan.edit[0] >= 0:
            import io

            with Image.open(io.BytesIO(dataset.store.encoded(int(plan.edit[0])))) as edit:
                m = edit_weight(int(plan.mask[0]), plan.seam_width, plan.span[0], (SIZE, SIZE))[..., None]
                sample = m * self.cropped(edit, plan.box[0]) + (1 - m) * sample
            fractal = Image.fromarray(dataset.bank.images[plan.fractal[0]])
            weight = plan.fractal_weight[0]
            sample = (1 - weight) * sample + weight * self.cropped(fractal, plan.span[0])
        if plan.flip[0]:
            sample = sample[:, ::-1]
        sample = (sample - self.mean) / self.deviation
        return torch.from_numpy(np.ascontiguousarray(sample.transpose(2, 0, 1))), int(dataset.catalog.labels[index])


def pillow(dataset: DiffuseMixDataset, batch_size: int, workers: int, device: str, mixed: bool) -> Callable[[], int]:
    loader = DataLoader(
        PillowDataset(dataset, mixed),
        batch_size=batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device != "cpu",
    )

    def epoch() -> int:
        dataset.set_epoch(dataset.epoch + 1)
        return sum(len(images.to(device, non_blocking=True)) for images, _ in loader)

    return epoch


def ours(dataset: DiffuseMixDataset, batch_size: int, threads: int, device: str) -> Callable[[], int]:
    loader = DiffuseMixLoader(dataset, batch_size=batch_size, shuffle=True, num_workers=threads, device=device)

    def epoch() -> int:
        count = sum(len(images) for images, _ in loader)
        if device != "cpu":
            torch.cuda.synchronize()
        return count

    return epoch


def packed(root: Path, folder: Path, max_side: int) -> Path:
    """A folder with the images of `root`, their longest side at most `max_side`, as JPEGs of quality 90."""
    for file in root.glob("*/*"):
        target = folder / file.parent.name / f"{file.stem}.jpg"
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        partial = folder / "partial"
        image.save(partial, "JPEG", quality=90)
        partial.rename(target)
    return folder


def linked(root: Path, folder: Path, repeat: int) -> Path:
    """A folder with each image of `root` several times."""
    for file in root.glob("*/*"):
        (folder / file.parent.name).mkdir(parents=True, exist_ok=True)
        for turn in range(repeat):
            link = folder / file.parent.name / f"{turn}-{file.name}"
            if not link.is_symlink():
                link.symlink_to(file.resolve())
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="a folder of photographs, root/class/image")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2, help="of DALI and the kernel; workers of DataLoader")
    parser.add_argument("--repeat", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="contenders, separated by commas")
    parser.add_argument("--max-side", type=int, help="pack the originals first: longest side N px, quality 90")
    parser.add_argument("--cache", type=Path, help="keep links, edits and fractals here for the next run, of one root")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, originals = options.cache or Path(temporary), options.root
        if options.max_side:
            originals = packed(originals, folder / f"originals-{options.max_side}", options.max_side)
        case = folder / f"{options.max_side or 'whole'}-{options.repeat}"
        store, bank = case / "edits", folder / "fractals.npy"
        root = linked(originals, case / "train", options.repeat)
        generate(root, store, GenerateConfig(prompts=("sunset",), size=256))
        if not bank.exists():
            render_bank(bank, count=64, size=256)
        crop, batch, threads, device = TrainCrop(SIZE), options.batch_size, options.threads, options.device
        mixed = DiffuseMixDataset(root, edits=store, fractals=bank, mix=MixSpec(probability=1), crop=crop)
        plain = DiffuseMixDataset(root, edits=store, crop=crop)
        contenders = {
            "diffusemix": ours(mixed, batch, threads, device),
            "plain": ours(plain, batch, threads, device),
            "plain_dali": plain_dali(plain, batch, threads, device),
            "pillow_plain": pillow(plain, batch, threads, device, mixed=False),
            "pillow_mixed": pillow(mixed, batch, threads, device, mixed=True),
        }
        wanted = options.only.split(",") if options.only else list(contenders)
        results = interleaved({name: contenders[name] for name in wanted}, options.rounds)
    settings = {"images": len(plain), "batch_size": batch, "threads": threads, "device": device}
    settings["max_side"] = options.max_side
    write(options.out, {"benchmark": "bench_loader", "settings": settings, "results": results})


if __name__ == "__main__":
    main()
