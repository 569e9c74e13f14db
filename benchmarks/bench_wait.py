"""The time of `next()` in the training thread on a GPU, for each way to decode, and the time to build a decoder.

Method: a loop whose step keeps the GPU busy for `--busy` milliseconds, without waiting for it (except every tenth
step), over `--steps` steps of `--batch-size` photographs, every sample mixed. Reported for each way, as medians over
the steps after the first ten: the time inside `next()`; its part without a decoded batch (idle) and its part until the
mix was launched (mix); and the thread's CPU time. `build` is the time to the first batch of a second loader in the same
process. `memory` is the memory in use on the device after so many epochs of 40 small batches.
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from bench_loader import WAYS, prepared
from record import write

from dali_diffusemix import DiffuseMixLoader
from dali_diffusemix.bench import Material
from dali_diffusemix.loading.auto import Decode


def waits(material: Material, decode: Decode, steps: int, busy: float) -> dict[str, float]:
    """Return medians in milliseconds."""

    def loader() -> DiffuseMixLoader:
        return DiffuseMixLoader(
            material.dataset(mixed=True),
            material.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=material.num_workers,
            device=material.device,
            decode=decode,
        )

    next(iter(loader()))  # compiles
    measured = loader()
    begin = time.perf_counter()
    batches = iter(measured)
    next(batches)
    synchronize(material)
    build = time.perf_counter() - begin
    cycles = int(busy * 1.98e6)  # at the GPU's clock under load
    inside, own, idle, mix, whole = [], [], [], [], []
    for step in range(steps):
        start, before = time.perf_counter(), measured.stats()
        thread = time.thread_time()
        images, _ = next(batches)
        own.append(time.thread_time() - thread)
        inside.append(time.perf_counter() - start)
        after = measured.stats()
        idle.append(after.idle - before.idle)
        mix.append(after.mix - before.mix)
        if images.is_cuda:
            torch.cuda._sleep(cycles)
        else:
            time.sleep(busy / 1e3)
        images.sum()
        if step % 10 == 9:
            synchronize(material)
        whole.append(time.perf_counter() - start)
    measured.close()
    rows = {"next": inside, "idle": idle, "mix": mix, "thread": own}
    found = {name: round(statistics.median(row[10:]) * 1e3, 3) for name, row in rows.items()}
    return {**found, "step": round(statistics.mean(whole[10:]) * 1e3, 3), "build": round(build * 1e3, 1)}


def synchronize(material: Material) -> None:
    if material.device != "cpu":
        torch.cuda.synchronize()


def memory(material: Material, decode: Decode, epochs: int) -> dict[int, float]:
    """Return the memory in use on the device in MiB, by epoch."""
    used = {}
    small = replace(material, epochs=1, batch_size=8, size=64)
    with DiffuseMixLoader(small.dataset(mixed=True), 8, num_workers=4, device=material.device, decode=decode) as loader:
        for epoch in range(epochs):
            for batch, _ in enumerate(loader):
                if batch == 39:
                    break
            if epoch % max(1, epochs // 8) == 0 or epoch == epochs - 1:
                torch.cuda.synchronize()
                free, total = torch.cuda.mem_get_info()
                used[epoch] = round((total - free) / 2**20, 1)
    return used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="a folder of photographs, root/class/image")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--busy", type=float, default=30.0, help="milliseconds of a step")
    parser.add_argument("--epochs", type=int, default=0, help="epochs in which memory is measured; 0: none")
    parser.add_argument("--ways", default="cpu,gpu,regions,shared_regions_90")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    material = replace(
        prepared(options.root, options.cache, 1, None),
        batch_size=options.batch_size,
        num_workers=options.threads,
        device=options.device,
    )
    images = len(material.dataset(mixed=False))
    material = replace(material, epochs=-(-(options.steps + 8) * options.batch_size // images))
    results: dict[str, dict[str, object]] = {}
    for way in options.ways.split(","):
        results[way] = {**waits(material, WAYS[way], options.steps, options.busy)}
        print(way, results[way], flush=True)
    settings = {"batch_size": options.batch_size, "busy": options.busy, "threads": options.threads}
    for way in options.ways.split(","):
        if options.epochs:
            results[way]["memory"] = memory(material, WAYS[way], options.epochs)
            print(way, results[way]["memory"], flush=True)
        write(options.out, {"benchmark": "bench_wait", "settings": settings, "results": results}, quiet=True)


if __name__ == "__main__":
    main()
