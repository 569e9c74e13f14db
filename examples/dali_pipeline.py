"""DiffuseMix inside your own DALI pipeline, on the CPU. Prints the shape of a batch and the images/s.

    dali-diffusemix generate data/train cache/edits --editor procedural --prompts autumn,snowy
    dali-diffusemix fractals cache/fractals.npy --count 64
    python examples/dali_pipeline.py data/train cache/edits cache/fractals.npy

The samples are those of DiffuseMixLoader(shuffle=True) over the same files; the loader is faster.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import DALIGenericIterator

from dali_diffusemix import EditStore, FractalBank, MixSpec, TrainCrop
from dali_diffusemix import fn as dmx
from dali_diffusemix.plan import EpochOrder

SEED = 0
SIZE = (224, 224)

# Decoded instead of an edit if a sample has none: a 1 x 1 image (PNM).
NO_EDIT = np.frombuffer(b"P6\n1 1\n255\n\0\0\0", dtype=np.uint8)


class Originals:
    """The inputs of a batch. DALI calls it for every batch, with the numbers of batch and epoch."""

    def __init__(self, root: Path, store: EditStore, batch_size: int) -> None:
        self._root, self._catalog = root, store.catalog
        self._edits = np.diff(store.starts)
        self._order = EpochOrder(length=len(self._catalog), batch_size=batch_size, shuffle=True, seed=SEED)

    def __call__(self, batch: types.BatchInfo) -> tuple[Any, ...]:
        if batch.iteration == len(self._order):
            raise StopIteration
        index = self._order.indices(batch.epoch_idx, self._order.positions(batch.iteration))
        paths = [np.frombuffer(os.fsencode(self._root / self._catalog.path(i)), dtype=np.uint8) for i in index]
        return paths, index, self._edits[index], np.full(len(index), batch.epoch_idx), self._catalog.labels[index]


class Edits:
    """Read the edits that the plan names. DALI calls it for every batch."""

    def __init__(self, store: EditStore) -> None:
        self._store = store

    def __call__(self, index: list[NDArray[Any]], edit: list[NDArray[Any]]) -> list[NDArray[np.uint8]]:
        first = self._store.starts[np.array(index)]
        return [NO_EDIT if e < 0 else self._store.encoded(f + e) for f, e in zip(first, edit, strict=True)]


@pipeline_def
def training(originals: Originals, edits: Edits, bank: FractalBank, threads: int) -> tuple[Any, Any]:
    paths, index, count, epoch, labels = fn.external_source(source=originals, num_outputs=5, batch_info=True)
    jpegs = fn.io.file.read(paths)
    plan = dmx.plan(
        index,
        fn.peek_image_shape(jpegs),
        seed=SEED,
        epoch=epoch,
        crop=TrainCrop(SIZE),
        mix=MixSpec.paper(),
        fractals=bank,
        edits_per_original=count,
    )
    edited = fn.python_function(index, plan.edit, function=edits, batch_processing=True)
    original, edit = fn.decoders.image([jpegs, edited], device="cpu", output_type=types.RGB)
    images = dmx.mix(original, edit, plan, fractals=bank, output_size=SIZE, threads=threads)
    return images, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of originals")
    parser.add_argument("edits", type=Path, help="edit store of these originals")
    parser.add_argument("fractals", type=Path, help="fractal bank")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()

    store = EditStore.open(options.edits)
    pipeline = training(
        Originals(options.root, store, options.batch_size),
        Edits(store),
        FractalBank.open(options.fractals),
        options.threads,
        batch_size=options.batch_size,
        num_threads=options.threads,
        device_id=None,
    )
    loader = DALIGenericIterator(pipeline, ["images", "labels"], auto_reset=True, prepare_first_batch=False)
    for epoch in range(options.epochs):
        start, count = time.perf_counter(), 0
        for (batch,) in loader:
            if not count:
                print(f"epoch {epoch}: images {tuple(batch['images'].shape)} {batch['images'].dtype}")
            count += len(batch["labels"])
        print(f"epoch {epoch}: {count} images, {count / (time.perf_counter() - start):.0f} images/s")


if __name__ == "__main__":
    main()
