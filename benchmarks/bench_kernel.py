"""The mix kernel alone: time for a batch, and the bandwidth that this is.

Method: 256 samples of 224 x 224 from 500 x 375 originals and 256 x 256 edits, `MixSpec.paper()` with every sample
mixed, `TrainCrop`. On a GPU: CUDA events around `--repeat` launches over `--sets` rotating batches of fresh pixels,
warmed up; the time of one is the median over the launches. On the CPU: wall time on `--threads` threads. The bytes
counted are those that must move: seen pixels of each source once, the fractals once for each sample, the output once.
A copy on the device, counted as bytes read plus bytes written, is timed beside it as the ceiling.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from record import write

from dali_diffusemix import gpu
from dali_diffusemix.mixing import DTYPES, IMAGENET, TensorFormat, edit_weight, mix, mix_on_device, piece_table
from dali_diffusemix.plan import BatchPlan, MixSpec, Planner, TrainCrop


class OneEdit:
    """Every original has one edit."""

    def __init__(self, count: int) -> None:
        self.starts = np.arange(count + 1)

    def originals_of(self, edits: np.ndarray) -> np.ndarray:
        return edits


def bytes_moved(plan: BatchPlan, format: TensorFormat, original: tuple[int, int], edit: tuple[int, int]) -> int:
    """Bytes that must be read and written for the batch."""
    total = int(np.prod(format.shape(len(plan), plan.output_size))) * format.storage.itemsize
    for row in range(len(plan)):
        share = float(edit_weight(int(plan.mask[row]), 0.0, plan.span[row], plan.output_size).mean())
        area, span = plan.box[row, 2] * plan.box[row, 3], plan.span[row, 2] * plan.span[row, 3]
        total += int(3 * area * ((1 - share) * original[0] * original[1] + share * edit[0] * edit[1]))
        total += int(3 * span * 256 * 256)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=100)
    parser.add_argument("--sets", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    count, original, edit = options.batch_size, (375, 500), (256, 256)
    generator = np.random.default_rng(0)
    planner = Planner(
        seed=0,
        crop=TrainCrop(224),
        sizes=np.tile(np.array(original, dtype=np.int32), (count, 1)),
        mix=MixSpec(probability=1),
        edits=OneEdit(count),
        fractals=64,
    )
    bank = generator.integers(0, 256, (64, 256, 256, 3), dtype=np.uint8)
    cuda = options.device != "cpu"
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    device_bank = gpu.DeviceBank(bank, device) if cuda else None
    batches = []
    for number in range(options.sets):
        plan = planner.batch(number, np.arange(count))
        tables, kept = [], []
        for size in (original, edit):
            pixels = torch.randint(0, 256, (count, *size, 3), dtype=torch.uint8, device=device)
            step = pixels[0].numel()
            data = (pixels.data_ptr() + np.arange(count) * step).astype(np.uint64)
            tables.append(piece_table(data, np.tile(np.array(size, dtype=np.int32), (count, 1)), plan.box))
            kept.append(pixels)
        batches.append((plan, tables, kept))

    results = {}
    for dtype in DTYPES:
        for channels_last in (False, True):
            normalize = None if dtype == "uint8" else IMAGENET
            format = TensorFormat(dtype=dtype, channels_last=channels_last, normalize=normalize)
            seconds = []
            if cuda:
                layout = torch.channels_last if channels_last else torch.contiguous_format
                shape = (count, 3, 224, 224)
                out = torch.empty(shape, dtype=getattr(torch, dtype), device=device, memory_format=layout)
                events = []
                for turn in range(10 + options.repeat):
                    plan, tables, _ = batches[turn % options.sets]
                    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    # The tables go to the device before the kernel; both are what a batch costs there.
                    begin.record()
                    mix_on_device(plan, *tables, device_bank, out=out, format=format)
                    end.record()
                    events.append((begin, end))
                torch.cuda.synchronize()
                seconds = [begin.elapsed_time(end) / 1e3 for begin, end in events[10:]]
            else:
                out = np.empty(format.shape(count, (224, 224)), dtype=format.storage)
                for turn in range(2 + options.repeat):
                    plan, tables, _ = batches[turn % options.sets]
                    begin = time.perf_counter()
                    mix(plan, *tables, bank, out=out, format=format, threads=options.threads)
                    seconds.append(time.perf_counter() - begin)
                seconds = seconds[2:]
            middle = statistics.median(seconds)
            moved = bytes_moved(batches[0][0], format, original, edit)
            results[f"{dtype} {'channels_last' if channels_last else 'nchw'}"] = {
                "milliseconds": round(middle * 1e3, 4),
                "lowest": round(min(seconds) * 1e3, 4),
                "highest": round(max(seconds) * 1e3, 4),
                "megabytes": round(moved / 1e6, 1),
                "gigabytes_per_second": round(moved / middle / 1e9, 1),
            }
    if cuda:
        source = torch.randint(0, 256, (1 << 30,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        times = []
        for _ in range(20):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            target.copy_(source)
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        rate = 2 * source.numel() / statistics.median(times) / 1e9
        results["copy on the device"] = {"gigabytes_per_second": round(rate, 1)}
    write(options.out, {"benchmark": "bench_kernel", "device": options.device, "batch_size": count, "results": results})


if __name__ == "__main__":
    main()
