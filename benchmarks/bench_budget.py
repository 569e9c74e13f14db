"""The CPU time of a mixed sample, divided into plan, read, decode and mix.

Method: epochs of DiffuseMixLoader, batch 64, 224 x 224 float32, every sample mixed, on `--threads` threads, files in
the page cache. CPU time is that of the whole process, including the threads of DALI and the kernel. Parts are left out
one at a time, the epochs alternate, and the figure for each variant is the median of `--rounds`:

    whole         everything
    no mix        without the call of the kernel: read, decode, plan, Python
    no decode     planning, windows and reading, including cutting
    plan          planning and windows alone
    whole images  everything, with visible_parts=False

`mix` is whole minus no mix; `decode` is no mix minus no decode, and includes DALI's own overhead; `read` is no decode
minus plan. With --packed the originals are packed with the same pixels (`tiles`), or to a longest side with --max-side.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from record import write

from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, MixSpec, TrainCrop
from dali_diffusemix.fractals import render_bank
from dali_diffusemix.generate import GenerateConfig, generate
from dali_diffusemix.loading import batches as module
from dali_diffusemix.loading import decoder
from dali_diffusemix.loading.pieces import Pieces, request
from dali_diffusemix.store.pack import PackConfig, pack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="a folder of photographs, root/class/image")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--max-side", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store, bank = Path(folder) / "edits", Path(folder) / "fractals.npy"
        generate(options.root, store, GenerateConfig(prompts=("sunset",), size=256))
        render_bank(bank, count=64, size=256)
        mix, crop = MixSpec(probability=1), TrainCrop(224)
        root = options.root
        if options.packed or options.max_side:
            root = Path(folder) / "originals"
            pack(options.root, root, PackConfig(max_side=options.max_side))
        dataset = DiffuseMixDataset(root, edits=store, fractals=bank, mix=mix, crop=crop, seed=0)

        def loader(visible_parts: bool) -> DiffuseMixLoader:
            return DiffuseMixLoader(
                dataset, 64, shuffle=True, num_workers=options.threads, device="cpu", visible_parts=visible_parts
            )

        parts, whole = loader(True), loader(False)
        real = module.mix

        epochs = itertools.count()

        def made(epoch: int, indices: Sequence[int]) -> Pieces:
            return request([(dataset, dataset.planner.batch(epoch, indices))], visible_only=True)

        def coming() -> Iterator[Callable[[], Pieces]]:
            """The batches of another epoch, before they are planned."""
            epoch = next(epochs)
            parts.set_epoch(epoch)
            for indices in parts.batch_sampler:
                yield partial(made, epoch, indices)

        def plan_only() -> None:
            for make in coming():
                make()

        memory: list[NDArray[np.uint8] | None] = [None]

        def no_decode() -> None:
            for make in coming():
                memory[0] = decoder._read(make, memory[0]).encoded.memory

        def epoch(which: DiffuseMixLoader, *, mixed: bool = True) -> None:
            module.mix = real if mixed else lambda *arguments, **more: None
            for _ in which:
                pass
            module.mix = real

        variants = {
            "whole": lambda: epoch(parts),
            "no mix": lambda: epoch(parts, mixed=False),
            "no decode": no_decode,
            "plan": plan_only,
            "whole images": lambda: epoch(whole),
        }
        cpu: dict[str, list[float]] = {name: [] for name in variants}
        wall: dict[str, list[float]] = {name: [] for name in variants}
        for turn in range(1 + options.rounds):
            for name, work in variants.items():
                begin, begin_cpu = time.perf_counter(), time.process_time()
                for _ in range(4):
                    work()
                if turn:
                    wall[name].append((time.perf_counter() - begin) / (4 * len(dataset)) * 1e3)
                    cpu[name].append((time.process_time() - begin_cpu) / (4 * len(dataset)) * 1e3)
        middle = {name: statistics.median(values) for name, values in cpu.items()}

        plans = []
        for turn in range(60):
            begin = time.perf_counter()
            dataset.planner.batch(turn, np.arange(256) % len(dataset))
            plans.append(time.perf_counter() - begin)
        # The shares are differences within a round, so that drift between rounds drops out.
        mix_share = statistics.median(a - b for a, b in zip(cpu["whole"], cpu["no mix"], strict=True))
        decode_share = statistics.median(a - b for a, b in zip(cpu["no mix"], cpu["no decode"], strict=True))
        read_share = statistics.median(a - b for a, b in zip(cpu["no decode"], cpu["plan"], strict=True))
    results = {
        "cpu_milliseconds_an_image": {
            "everything": round(middle["whole"], 3),
            "decode": round(decode_share, 3),
            "read": round(read_share, 3),
            "mix": round(mix_share, 3),
            "plan, windows, places": round(middle["plan"], 3),
            "outside reading and decoding": round(mix_share + middle["plan"], 3),
            "everything, whole images decoded": round(middle["whole images"], 3),
        },
        "images_per_second": {
            name: round(1e3 / statistics.median(wall[name]), 1) for name in ("whole", "no mix", "whole images")
        },
        "plan_of_256_milliseconds": round(statistics.median(plans[10:]) * 1e3, 3),
        "rounds_cpu_milliseconds": {name: [round(value, 3) for value in values] for name, values in cpu.items()},
    }
    settings = {"images": len(dataset), "batch_size": 64, "threads": options.threads}
    settings |= {"packed": options.packed or options.max_side is not None, "max_side": options.max_side}
    write(options.out, {"benchmark": "bench_budget", "settings": settings, "results": results})


if __name__ == "__main__":
    main()
