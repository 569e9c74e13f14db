"""Images per second from loose files and from packed stores, with a warm and a cold page cache.

Method: epochs of DiffuseMixLoader alternate (A B C A B C ...), every sample mixed, batch 64, 224 x 224 float32; the
figure is the median of `--rounds`. Each variant has its own files (`--repeat` copies of every photograph, no links), so
that none warms the cache of another. Before a cold epoch, its copies, edits and fractals are removed from the page
cache (posix_fadvise, after a sync), which needs no privileges; the cache of a virtual machine's host is not affected.

    folder        loose files, unchanged
    packed        the same bytes in a packed store (`dali-diffusemix pack`)
    packed-400    longest side 400 px, quality 90, with restart markers

`read` is the reading of one epoch, in the order of an epoch: seconds of the reader's thread per image.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from record import write

from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, MixSpec, TrainCrop
from dali_diffusemix.fractals import render_bank
from dali_diffusemix.generate import GenerateConfig, generate
from dali_diffusemix.store.pack import PackConfig, pack


def forget(folder: Path) -> None:
    """Remove the files of a folder from the page cache."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def copies(root: Path, folder: Path, repeat: int) -> Path:
    for file in root.glob("*/*"):
        (folder / file.parent.name).mkdir(parents=True, exist_ok=True)
        for turn in range(repeat):
            shutil.copyfile(file, folder / file.parent.name / f"{turn}-{file.name}")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="a folder of photographs, root/class/image")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="folder of the copies; by default a temporary one")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as temporary:
        folder = Path(temporary)
        roots = {"folder": copies(options.root, folder / "folder" / "train", options.repeat)}
        for name, config in (("packed", PackConfig()), ("packed-400", PackConfig(max_side=400))):
            roots[name] = folder / name / "store"
            pack(roots["folder"], roots[name], config)
        loaders: dict[str, tuple[Path, DiffuseMixLoader]] = {}
        for name, root in roots.items():
            home = folder / name
            generate(roots["folder"], home / "edits", GenerateConfig(prompts=("sunset",), size=256))
            render_bank(home / "fractals.npy", count=8, size=256)
            dataset = DiffuseMixDataset(
                root,
                edits=home / "edits",
                fractals=home / "fractals.npy",
                mix=MixSpec(probability=1),
                crop=TrainCrop(224),
                seed=0,
            )
            for prefetch in (2, 8):
                loader = DiffuseMixLoader(
                    dataset, 64, True, num_workers=options.threads, device="cpu", prefetch_factor=prefetch
                )
                loaders[f"{name}, prefetch_factor={prefetch}"] = home, loader
        found: dict[str, dict[str, list[float]]] = {}
        for turn in range(1 + options.rounds):
            for name, (home, loader) in loaders.items():
                for state in ("cold", "warm"):
                    if state == "cold":
                        forget(home)
                    begin = time.perf_counter()
                    count = sum(len(images) for images, _ in loader)
                    seconds = time.perf_counter() - begin
                    if turn:
                        rounds = found.setdefault(f"{name}, {state}", {"rate": [], "read": []})
                        rounds["rate"].append(count / seconds)
                        rounds["read"].append(loader.stats().read / count * 1e3)
        results = {
            name: {
                "images_per_second": round(statistics.median(rounds["rate"]), 1),
                "read_milliseconds_an_image": round(statistics.median(rounds["read"]), 3),
                "rounds": [round(rate, 1) for rate in rounds["rate"]],
            }
            for name, rounds in found.items()
        }
    settings = {"images": count, "batch_size": 64, "threads": options.threads}
    write(options.out, {"benchmark": "bench_reading", "settings": settings, "results": results})


if __name__ == "__main__":
    main()
