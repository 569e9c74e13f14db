"""The mix kernel alone: time per batch, and the bandwidth.

Method: 256 samples of 224 x 224 from 500 x 375 originals and 256 x 256 edits of random pixels, `MixSpec.paper()` with
every sample mixed, `TrainCrop`. The counted bytes are the minimum that must move: the visible part of each source once,
each fractal of the batch once, the output once.

On a GPU, for every type and layout: the output is filled with a pattern, mixed, and a few samples are compared with the
specification; a kernel that is wrong or fails gets no time. Then `--launches` launches are timed between two CUDA
events, after work that keeps the device busy until all are queued, alternating over `--sets` batches with their tables
on the device. The time of one launch is the median over such runs, `--repeat` launches in total. `with_upload` is the
same with the tables copied to the device before each launch, as in the loader, and nothing queued before. A copy on the
device (bytes read plus bytes written) is timed as the upper limit. The record is written after every row. After
`--seconds` no row begins.

On the CPU: wall time on `--threads` threads. `--side 32` measures small images instead: originals, edits and fractals
of 32 x 32 with `RandomCrop(32, padding=4)`, an eighth of the side.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from record import machine

from dali_diffusemix.base import gpu
from dali_diffusemix.mix import IMAGENET, TensorFormat
from dali_diffusemix.mix.call import mix, piece_table, row_table
from dali_diffusemix.mix.pixel import edit_weight, encode, mixed_image
from dali_diffusemix.mix.tensor import DTYPES
from dali_diffusemix.plan import BatchPlan, MixSpec, Planner, RandomCrop, TrainCrop

CHECKED = 3  # samples compared with the specification


class OneEdit:
    """Every original has one edit."""

    def __init__(self, count: int) -> None:
        self.starts = np.arange(count + 1)

    def originals_of(self, edits: np.ndarray) -> np.ndarray:
        return edits


@dataclass(frozen=True)
class Sizes:
    """(height, width) of the images, and the crop."""

    original: tuple[int, int] = (375, 500)
    edit: tuple[int, int] = (256, 256)
    bank: tuple[int, int, int, int] = (64, 256, 256, 3)
    crop: TrainCrop | RandomCrop = field(default_factory=lambda: TrainCrop(224))

    @classmethod
    def small(cls, side: int) -> "Sizes":
        return cls((side, side), (side, side), (64, side, side, 3), RandomCrop(side, padding=side // 8))

    @property
    def output(self) -> tuple[int, int]:
        return self.crop.output_size


@dataclass(frozen=True)
class Batch:
    """A plan, its piece table and the tensors that hold the pixels."""

    plan: BatchPlan
    pieces: NDArray[np.void]  # (2, samples) of `mix.call.PIECE`
    pixels: tuple[torch.Tensor, torch.Tensor]  # (samples, height, width, 3) uint8


def make_batches(sizes: Sizes, count: int, sets: int, device: torch.device) -> list[Batch]:
    planner = Planner(
        seed=0,
        crop=sizes.crop,
        sizes=np.tile(np.array(sizes.original, dtype=np.int32), (count, 1)),
        mix=MixSpec(probability=1),
        edits=OneEdit(count),
        fractals=sizes.bank[0],
    )
    batches = []
    for number in range(sets):
        plan = planner.batch(number, np.arange(count))
        data, kept = [], []
        for size in (sizes.original, sizes.edit):
            pixels = torch.randint(0, 256, (count, *size, 3), dtype=torch.uint8, device=device)
            data.append((pixels.data_ptr() + np.arange(count) * pixels[0].numel()).astype(np.uint64))
            kept.append(pixels)
        shapes = np.array([sizes.original, sizes.edit], dtype=np.int32)[:, None].repeat(count, axis=1)
        batches.append(Batch(plan, piece_table(np.stack(data), shapes), (kept[0], kept[1])))
    return batches


def bytes_moved(sizes: Sizes, plan: BatchPlan, format: TensorFormat) -> int:
    """Return the minimum number of bytes that must be read and written for the batch."""
    total = int(np.prod(format.shape(len(plan), plan.output_size))) * format.storage.itemsize
    for row in range(len(plan)):
        share = float(edit_weight(int(plan.mask[row]), 0.0, plan.span[row], plan.output_size).mean())
        begin, end = plan.box[row, :2], plan.box[row, :2] + plan.box[row, 2:]
        area = float((np.minimum(end, 1) - np.maximum(begin, 0)).clip(0).prod())  # of the box, in the image
        total += int(3 * area * ((1 - share) * np.prod(sizes.original) + share * np.prod(sizes.edit)))
    return total + int((np.unique(plan.fractal) >= 0).sum()) * int(np.prod(sizes.bank[1:]))


def formats() -> list[TensorFormat]:
    return [
        TensorFormat(dtype=dtype, channels_last=channels_last, normalize=None if dtype == "uint8" else IMAGENET)
        for dtype in DTYPES
        for channels_last in (False, True)
    ]


def layout_of(format: TensorFormat) -> str:
    return "channels_last" if format.channels_last else "nchw"


class Record:
    """The results so far, written to a file after every row."""

    def __init__(self, path: Path | None, **content: object) -> None:
        self._path, self._begin = path, time.perf_counter()
        self._content: dict[str, Any] = {"machine": machine(), "benchmark": "bench_kernel", **content, "results": []}

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begin

    def add(self, **row: object) -> None:
        self._content["results"].append(row)
        self.set("seconds", round(self.seconds, 1))
        print(json.dumps(row))

    def set(self, name: str, value: object) -> None:
        self._content[name] = value
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(self._content, indent=1) + "\n")


def times_of(seconds: list[float], moved: int) -> dict[str, float]:
    middle = statistics.median(seconds)
    return {
        "milliseconds": round(middle * 1e3, 4),
        "lowest": round(min(seconds) * 1e3, 4),
        "highest": round(max(seconds) * 1e3, 4),
        "megabytes": round(moved / 1e6, 1),
        "gigabytes_per_second": round(moved / middle / 1e9, 1),
    }


def time_on_device(work: Callable[[int], object], launches: int, runs: int, *, queued: bool) -> list[float]:
    """Return seconds of `work(turn)`, means of `launches`; if `queued`, the device starts when all are launched."""
    seconds = []
    for run in range(runs + 1):  # the first is not counted
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if queued:
            torch.cuda._sleep(4_000_000)  # about 2 ms
        begin.record()
        for turn in range(launches):
            work(run * launches + turn)
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3 / launches)
    return seconds[1:]


def copy_rate(device: torch.device) -> float:
    """Return the bytes per second, read and written, of a copy on the device."""
    source = torch.randint(0, 256, (1 << 30,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = time_on_device(lambda _: target.copy_(source), 3, 5, queued=True)
    return 2 * source.numel() / statistics.median(seconds)


def wrong(out: torch.Tensor, expected: list[NDArray[np.float32]], format: TensorFormat) -> str | None:
    """Return what is wrong with the first samples, or None."""
    first = out[: len(expected)]
    values = (first.permute(0, 2, 3, 1) if format.channels_last else first).float().cpu().numpy()
    for row, image in enumerate(expected):
        wanted = encode(image, format)
        if format.dtype == "bfloat16":
            wanted = (wanted.astype(np.uint32) << 16).view(np.float32)
        difference = np.abs(values[row] - wanted.astype(np.float32))
        relative = {"float32": 1e-6, "float16": 2**-10, "bfloat16": 2**-7, "uint8": 0}[format.dtype]
        allowed = relative * np.abs(wanted.astype(np.float32)) + (1 if format.dtype == "uint8" else 2e-5)
        if not (difference <= allowed).all():  # NaN is never smaller
            bad = int((~(difference <= allowed)).sum())
            return f"sample {row}: {bad} of {difference.size} values, the largest difference is {difference.max()}"
    return None


def on_gpu(options: argparse.Namespace, record: Record) -> None:
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    batches = make_batches(options.sizes, options.batch_size, options.sets, device)
    bank = np.random.default_rng(0).integers(0, 256, options.sizes.bank, dtype=np.uint8)
    device_bank = gpu.DeviceBank(bank, device)
    plan = batches[0].plan
    fractals = [bank[number] if number >= 0 else None for number in plan.fractal]
    pixels = [tensor[:CHECKED].cpu().numpy() for tensor in batches[0].pixels]
    checked = range(min(CHECKED, len(plan)))
    expected = [mixed_image(plan, row, pixels[0][row], pixels[1][row], fractals[row]) for row in checked]
    tables = [gpu.upload(batch.pieces, row_table(batch.plan), device) for batch in batches]

    ceiling = copy_rate(device)
    record.set("copy_gigabytes_per_second", round(ceiling / 1e9, 1))
    for format in formats():
        row = {"dtype": format.dtype, "layout": layout_of(format)}
        if record.seconds > options.seconds:
            record.add(**row, skipped=f"{options.seconds} seconds are over")
            continue
        try:
            record.add(**row, **time_kernel(format, batches, tables, device_bank, expected, options, ceiling))
        except Exception as error:  # the next rows are still measured
            record.add(**row, wrong=f"{type(error).__name__}: {error}"[:2000])


def time_kernel(
    format: TensorFormat,
    batches: list[Batch],
    tables: list[gpu.DeviceTables],
    bank: gpu.DeviceBank,
    expected: list[NDArray[np.float32]],
    options: argparse.Namespace,
    ceiling: float,
) -> dict[str, object]:
    device, memory = bank.images.device, format.shape(options.batch_size, options.sizes.output)
    pattern = torch.full((int(np.prod(memory)) * format.storage.itemsize,), 0xFF, dtype=torch.uint8, device=device)
    out = pattern.view(getattr(torch, format.dtype)).view(memory)
    if format.channels_last:
        out = out.permute(0, 3, 1, 2)

    def launch(table: gpu.DeviceTables) -> None:
        gpu.launch(table, bank, out, format)

    def upload_and_launch(turn: int) -> None:
        batch = batches[turn % len(batches)]
        launch(gpu.upload(batch.pieces, row_table(batch.plan), device))

    begin = time.perf_counter()
    launch(tables[0])
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    found = wrong(out, expected, format)
    if found is not None:
        return {"wrong": found}
    runs = max(1, options.repeat // options.launches)
    seconds = time_on_device(lambda turn: launch(tables[turn % len(tables)]), options.launches, runs, queued=True)
    loader = time_on_device(upload_and_launch, options.launches, max(1, runs // 2), queued=False)
    moved = sum(bytes_moved(options.sizes, batch.plan, format) for batch in batches) // len(batches)
    return {
        **times_of(seconds, moved),
        "share_of_copy": round(moved / statistics.median(seconds) / ceiling, 3),
        "with_upload_milliseconds": round(statistics.median(loader) * 1e3, 4),
        "first_launch_seconds": round(first, 2),
    }


def on_cpu(options: argparse.Namespace, record: Record) -> None:
    batches = make_batches(options.sizes, options.batch_size, options.sets, torch.device("cpu"))
    bank = np.random.default_rng(0).integers(0, 256, options.sizes.bank, dtype=np.uint8)
    for format in formats():
        out = np.empty(format.shape(options.batch_size, options.sizes.output), dtype=format.storage)
        seconds = []
        for turn in range(2 + options.repeat):
            batch = batches[turn % len(batches)]
            begin = time.perf_counter()
            mix(batch.plan, batch.pieces, bank, out=out, format=format, threads=options.threads)
            seconds.append(time.perf_counter() - begin)
        moved = sum(bytes_moved(options.sizes, batch.plan, format) for batch in batches) // len(batches)
        record.add(dtype=format.dtype, layout=layout_of(format), **times_of(seconds[2:], moved))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--launches", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=140)
    parser.add_argument("--sets", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=22.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", type=int, help="of small images; else 224 x 224 from larger ones")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.sizes = Sizes.small(options.side) if options.side else Sizes()
    record = Record(options.out, device=options.device, batch_size=options.batch_size, side=options.side)
    if options.device == "cpu":
        on_cpu(options, record)
    else:
        on_gpu(options, record)
    print(f"{record.seconds:.1f} seconds")


if __name__ == "__main__":
    main()
