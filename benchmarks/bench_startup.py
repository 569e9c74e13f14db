"""From a folder to the first batch: the speed of indexing, and the start of a run with a large, cached catalog.

Method: symbolic links repeat the photographs, so that headers are read from real files in the page cache.

    index     20,000 files are listed and their headers read, `--rounds` times with `refresh`; the figure is the median,
              and the time for 1.28 million files at that speed.
    start     a new Python process: imports, DiffuseMixDataset with a cached catalog of 100,000 originals with an edit
              each, DiffuseMixLoader with shuffle, the first batch of 64. Wall time of the whole process, median.
"""

import argparse
import io
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from record import write

from dali_diffusemix.catalog import index
from dali_diffusemix.fractals import render_bank
from dali_diffusemix.generate import GenerateConfig
from dali_diffusemix.generate.worker import edit_seed
from dali_diffusemix.store import ShardWriter, StoreWriter, Wish

START = """
import sys
from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, MixSpec, TrainCrop

root, store, bank = sys.argv[1:]
dataset = DiffuseMixDataset(root, edits=store, fractals=bank, mix=MixSpec.paper(), crop=TrainCrop(224), seed=0)
images, labels = next(iter(DiffuseMixLoader(dataset, 64, shuffle=True, num_workers=2, device="cpu")))
assert images.shape == (64, 3, 224, 224)
"""


def linked(photographs: list[Path], root: Path, count: int) -> None:
    """Make `count` links to photographs, a thousand per class."""
    for number in range(count):
        folder = root / f"class-{number // 1000:04}"
        if number % 1000 == 0:
            folder.mkdir(parents=True)
        (folder / f"{number:07}.jpg").symlink_to(photographs[number % len(photographs)])


def small_edits(root: Path, store: Path) -> None:
    """Make a store with one small edit per original: always the same picture, because only reading it matters."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "JPEG")
    config = GenerateConfig(prompts=("sunset",), size=64)
    with StoreWriter.open(store, index(root), config.settings()) as writer:
        writer.order(Wish(prompts=dict.fromkeys(config.prompts), variants=1, originals_per_shard=512))
        for shard in writer.shards():
            with ShardWriter(store, writer.catalog, shard) as shards:
                for row in shard.rows:
                    seed = edit_seed(0, writer.catalog.encoded_path(row), "sunset", 0)
                    shards.add(row, 0, 0, seed=seed, image=file.getvalue(), height=64, width=64)
        writer.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="a folder of photographs, root/class/image")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    photographs = sorted(path.resolve() for path in options.root.glob("*/*"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        linked(photographs, folder / "some", 20_000)
        rates = []
        for _ in range(options.rounds):
            begin = time.perf_counter()
            catalog = index(folder / "some", location=folder / "catalog", refresh=True)
            rates.append(len(catalog) / (time.perf_counter() - begin))
        rate = statistics.median(rates)

        linked(photographs, folder / "many", 100_000)
        small_edits(folder / "many", folder / "edits")
        render_bank(folder / "fractals.npy", count=64, size=256)
        seconds = []
        for _ in range(1 + options.rounds):
            begin = time.perf_counter()
            arguments = [folder / "many", folder / "edits", folder / "fractals.npy"]
            subprocess.run([sys.executable, "-c", START, *map(str, arguments)], check=True)
            seconds.append(time.perf_counter() - begin)
    results = {
        "index": {
            "files_per_second": round(rate),
            "rounds": [round(value) for value in rates],
            "minutes_for_1280000": round(1_280_000 / rate / 60, 2),
        },
        "start": {"seconds": round(statistics.median(seconds[1:]), 2), "rounds": [round(s, 2) for s in seconds[1:]]},
    }
    write(options.out, {"benchmark": "bench_startup", "results": results})


if __name__ == "__main__":
    main()
