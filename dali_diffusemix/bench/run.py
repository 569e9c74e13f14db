"""`bench`: the whole of a comparison, on one's own images."""

import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from dali_diffusemix.base.cpus import cpus
from dali_diffusemix.bench import changes
from dali_diffusemix.bench.contenders import Factory, diffusemix, pillow, plain_dali
from dali_diffusemix.bench.material import LEAST_BATCHES, Material, decodable, extract, random_rows, reduced
from dali_diffusemix.bench.measure import interleaved, machine
from dali_diffusemix.bench.result import BenchResult, gigabytes
from dali_diffusemix.errors import ConfigError
from dali_diffusemix.loading.dali import dali
from dali_diffusemix.loading.dataset import DiffuseMixDataset
from dali_diffusemix.plan.crops import TrainCrop

__all__ = ["bench"]

_Path = str | os.PathLike[str]

_OURS: Final = ("diffusemix", "plain")  # may not fail


def bench(
    root: _Path,
    *,
    edits: _Path | None = None,
    fractals: _Path | None = None,
    batch_size: int = 64,
    num_workers: int | None = None,
    device: str = "cpu",
    size: int = 224,
    rounds: int = 5,
    seconds: float = 1.0,
    images: int = 2048,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> BenchResult:
    """Compare this loader with others on one's own images, and try changes that could make it faster.

    The contenders are `diffusemix` (every sample that has an edit is mixed), `plain` (this loader, nothing mixed),
    `plain_dali`, `pillow_plain` and `pillow_mixed`; without edits only the plain ones. Of raw stores that fit into
    memory, also `diffusemix_resident` (or `plain_resident`): they stay there. A large folder is represented by a random
    sample of it, the same for all contenders and for the same seed. Other values of num_workers and prefetch_factor are
    tried, and packing: with the same pixels; smaller, if originals are much larger than a sample; as raw pixels, if
    originals are small, or all images as raw pixels take a small part of the free memory.

    Call it under `if __name__ == "__main__":`, because contenders run in processes of their own. More than ten
    arguments, because they are the options of the command: an object of them would only wrap plain values.

    Args:
        root: The folder of originals, or a packed store.
        edits: The edit store.
        fractals: The fractal bank's file; needed with edits.
        batch_size: Samples per batch.
        num_workers: Threads, or worker processes of DataLoader; None: one per core.
        device: "cpu", "cuda" or "cuda:N".
        size: Side length of a sample in pixels.
        rounds: Counted turns of each contender.
        seconds: Minimum length of a turn; half of that for changes.
        images: Maximum number of originals, but at least 32 batches.
        seed: Seed of the random sample and of the crops.
        progress: Called with the number of turns done, and of all turns.

    Raises:
        ConfigError: An argument breaks its rule.
        CatalogError, StoreError: The originals, edits or fractals cannot be used.
        MissingDependencyError: DALI, which only raw stores do not need, or what the device needs, is missing.
        DiffuseMixError: This package's loader failed, or its process ended. Others that fail are in `left_out`.
    """
    num_workers = cpus() if num_workers is None else num_workers
    for name, value in (
        ("batch_size", batch_size),
        ("num_workers", num_workers),
        ("rounds", rounds),
        ("images", images),
    ):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, found {value}; give a larger one or leave it out.")
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"device must be 'cpu', 'cuda' or 'cuda:N', found {device!r}; leave it out to have 'cpu'.")
    if not 0 < seconds < math.inf:
        raise ConfigError(f"seconds must be greater than 0, found {seconds}; leave it out to have 1.")
    if (edits is None) != (fractals is None):
        given, lacking = ("edits", "fractals") if fractals is None else ("fractals", "edits")
        raise ConfigError(f"edits and fractals must be given together, found {given} alone; give {lacking} too.")
    dataset = DiffuseMixDataset(root, edits=edits, fractals=fractals, mix=None, crop=TrainCrop(size), seed=seed)
    raw = changes.RawImages.of(dataset, device)
    if not raw.there:
        dali()
    with tempfile.TemporaryDirectory(prefix="dali-diffusemix-bench-") as scratch:
        material = Material(
            root=Path(root),
            files=Path(root),
            edits=None if edits is None else Path(edits),
            fractals=None if fractals is None else Path(fractals),
            batch_size=batch_size,
            num_workers=num_workers,
            device=device,
            size=size,
            seed=seed,
        )
        rows = random_rows(len(dataset), max(images, LEAST_BATCHES * batch_size), seed)
        rows, undecodable = decodable(dataset, rows)
        if len(rows) < len(dataset):
            material = reduced(material, dataset, rows, Path(scratch) / "sample", epoch=len(dataset))
        if dataset.original_store is not None:
            material = replace(material, files=extract(dataset.original_store, rows.tolist(), Path(scratch) / "files"))

        given_edits = None if edits is None else Path(edits)  # the material's may be a part of them
        mixed = given_edits is not None
        contenders: dict[str, Factory] = {
            "plain": partial(diffusemix, material, mixed=False),
            "plain_dali": partial(plain_dali, material),
            "pillow_plain": partial(pillow, material),
        }
        if mixed:
            contenders = {
                "diffusemix": partial(diffusemix, material),
                **contenders,
                "pillow_mixed": partial(pillow, material, mixed=True),
            }
        name, no_room = next(iter(contenders)), {}
        if raw.there and raw.resident is None:
            no_room[f"{name}_resident"] = f"{gigabytes(raw.bytes)} of images, {gigabytes(raw.free)} of memory are free"
        elif raw.there:
            ours = partial(diffusemix, material, mixed=mixed, resident=raw.resident)
            contenders = {name: contenders[name], f"{name}_resident": ours, **contenders}
        tried = changes.settings(material, mixed)
        tried += changes.packing(material, dataset, rows, Path(scratch) / "packing", given_edits, raw)
        variants = changes.contenders_of(tried)
        done, total = 0, (1 + rounds) * (len(contenders) + len(variants))

        def step() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)

        others = [name for name in contenders if name not in _OURS]
        results, left_out = interleaved(contenders, rounds=rounds, seconds=seconds, optional=others, progress=step)
        with_changes, _ = interleaved(variants, rounds=rounds, seconds=seconds / 2, together=True, progress=step)
    left_out |= no_room
    settings = {
        "root": str(root),
        "raw": raw.there,
        "median_size": np.median(dataset.catalog.sizes, axis=0).astype(int).tolist(),
        "originals": len(dataset),
        "images": len(rows),
        "undecodable": undecodable,
        "batch_size": batch_size,
        "num_workers": num_workers,
        "device": device,
        "size": size,
        "rounds": rounds,
        "seconds": seconds,
        "seed": seed,
    }
    return BenchResult(
        machine=machine(),
        settings=settings,
        results=results,
        left_out=left_out,
        trials=(*changes.trials_of(tried, with_changes), *changes.of_residence(raw, results)),
    )
