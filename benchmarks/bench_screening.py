"""The time that it takes to check a file before DALI is given it, in microseconds.

Method: `--files` copies of a photograph of each kind are read by `reading.read` from the page cache, alternating with
as many copies whose first two bytes are zero: the same bytes are read, and nothing is checked. The figure is the
difference of the medians over `--rounds`, per file.
"""

import argparse
import io
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from record import write

from dali_diffusemix.images.codec import encode
from dali_diffusemix.images.reading import read


def kinds(photograph: Image.Image) -> dict[str, bytes]:
    def saved(format: str = "JPEG", **options: object) -> bytes:
        stream = io.BytesIO()
        photograph.save(stream, format, **options)
        return stream.getvalue()

    return {
        "jpeg": saved(quality=90),
        "jpeg in tiles": encode(photograph, 90),
        "progressive jpeg": saved(quality=90, progressive=True),
        "png": saved("PNG"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photograph", type=Path)
    parser.add_argument("--files", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with Image.open(options.photograph) as opened:
        photograph = opened.convert("RGB")
    results = {}
    windows = np.zeros((options.files, 4), dtype=np.int32)
    sizes = np.tile(np.array([photograph.size[::-1]], dtype=np.int32), (options.files, 1))
    with tempfile.TemporaryDirectory() as folder:
        for kind, content in kinds(photograph).items():
            seconds: dict[str, list[float]] = {"sound": [], "unknown": []}
            locations = {}
            for name, begin in (("sound", content[:2]), ("unknown", bytes(2))):
                files = [Path(folder, f"{kind}-{name}-{i}") for i in range(options.files)]
                for file in files:
                    file.write_bytes(begin + content[2:])
                locations[name] = [os.fsencode(file) for file in files]
            memory = None
            for turn in range(1 + options.rounds):
                for name, files in locations.items():
                    begin = time.thread_time()
                    found = read(files, windows, sizes, memory)
                    if turn:
                        seconds[name].append(time.thread_time() - begin)
                    memory = found.memory
                    assert found.safe.all() if name == "sound" else not found.safe.any()
            sound, unknown = (statistics.median(seconds[name]) / options.files * 1e6 for name in ("sound", "unknown"))
            results[kind] = {
                "bytes": len(content),
                "microseconds": round(sound - unknown, 2),
                "with_reading": round(sound, 2),
                "reading_alone": round(unknown, 2),
            }
    settings = {"size": photograph.size, "files": options.files, "rounds": options.rounds}
    write(options.out, {"benchmark": "bench_screening", "settings": settings, "results": results})


if __name__ == "__main__":
    main()
