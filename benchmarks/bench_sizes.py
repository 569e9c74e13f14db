"""Bytes on disk per image: of originals, unchanged and packed, and of edits, as JPEGs of the default qualities.

Method: `pack` and `generate` write real stores of the given photographs; the figure is the size of the whole store
divided by its number of images. Edits are procedural, of all nine prompts; edits of a diffusion model have other sizes.
Nothing is timed, so the machine need not be quiet.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from record import write

from dali_diffusemix.catalog import index
from dali_diffusemix.generate import GenerateConfig, generate
from dali_diffusemix.store import EditStore
from dali_diffusemix.store.pack import PackConfig, pack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of originals")
    parser.add_argument("--max-sides", default="400,500", help="pixels of packed originals' longest side")
    parser.add_argument("--edit-sizes", default="256,512", help="pixels a side")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {}

    def add(name: str, total: int, images: int) -> None:
        results[name] = {"images": images, "bytes_per_image": round(total / images)}

    catalog = index(options.data)
    add("files as they are", sum((options.data / path).stat().st_size for path in catalog.paths), len(catalog))
    with tempfile.TemporaryDirectory() as temporary:
        sides = [None, *map(int, options.max_sides.split(","))]
        for side in sides:
            store = Path(temporary) / f"packed-{side}"
            summary = pack(options.data, store, PackConfig(max_side=side), catalog=catalog)
            add("packed, the same pixels" if side is None else f"packed to {side} px", _bytes(store), summary.images)
        for size in map(int, options.edit_sizes.split(",")):
            store = Path(temporary) / f"edits-{size}"
            generate(options.data, store, GenerateConfig(size=size), catalog=catalog)
            add(f"edits of {size} px", _bytes(store), len(EditStore.open(store)))
    settings = {"data": str(options.data), "originals": len(catalog)}
    write(options.out, {"benchmark": "bench_sizes", "settings": settings, "results": results})


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
