"""Images per second of small images: this package from files, from raw stores and resident, torch by hand, FFCV, DALI.

    python benchmarks/bench_small.py 32 PHOTOGRAPHS --ffcv VENV/bin/python --out RECORD
    python benchmarks/bench_small.py 32 PHOTOGRAPHS --variants --images 10000 --out RECORD
    python benchmarks/bench_small.py photographs PHOTOGRAPHS --out RECORD

Method: each contender runs in a process of its own; they alternate (A B C A B C ...), whole batches for at least
--seconds each time, in steady state: batches that are ready are taken before, uncounted. The first turn, which includes
the start, is not counted; it measures the peak memory. The figure is the median of --rounds. Batches are float32,
normalised, on the CPU, NCHW unless the name says channels_last. A contender that fails or is not here is left out, with
the reason. Stores and files that a contender needs are made when it starts, and kept in --cache.

32: --images PNGs of 32 x 32, crops of the photographs, --distinct different ones, each several times; one edit each,
64 fractals of 32 px; batch 256, every sample mixed by MixSpec.paper(), RandomCrop(32, padding=4), half of them flipped.

    diffusemix                from the folder of PNGs and the edit store
    diffusemix_raw            from stores of raw pixels, `pack(..., PackConfig(format="raw"))`
    diffusemix_resident       the same with resident="host"
    ..._channels_last         the same as torch.channels_last
    torch_WAY                 the same mix by hand, on tensors in memory (torch_loop.py): the fastest way, or all with
                              --variants (each holds its images in memory: --images 10000 needs about
                              16 GB). Before, they are compared with each other and with `mix.pixel`.
    ffcv, ffcv_contiguous     FFCV's raw mode, plain samples: RandomTranslate(padding=4), RandomHorizontalFlip,
                              NormalizeImage; os_cache=True, OrderOption.RANDOM; NCHW by ToTorchImage or by torch
    ffcv_channels_last        the same without the change of layout
    ffcv_quasi_random...      the same two with OrderOption.QUASI_RANDOM

    With --device cuda: diffusemix_resident with resident="device", and torch with its tensors on the GPU.

photographs: --repeat copies of each; TrainCrop, batch 64; edits of 256 px.

    plain_dali                DALI alone, from the files, to 224
    plain_dali_400            the same from JPEGs packed to 400 px, quality 90
    diffusemix_400            this package, mixed, from the packed store of these JPEGs
    diffusemix_raw_256        the same from raw stores, originals with a longest side of 256 px
    diffusemix_resident_256   the same with resident="host"
    ..._128_to_SIDE           from photographs shrunk to 128 px (JPEG, quality 95), with edits of 128 px

    With --device cuda: plain_dali (whole images on the GPU), diffusemix_raw_256, diffusemix_resident_256, and with
    resident="device" diffusemix_device_256 and diffusemix_device_256_augment, which has augment=TrivialAugmentWide().

After the warm rounds there are --cold-rounds rounds of one epoch each, in a new process, from files that were removed
from the page cache (posix_fadvise; the cache of a virtual machine's host is not affected), with the bytes that it read
from the disk (read_bytes of /proc/self/io). The process has started before, with a few batches. A resident set is read
when it starts, so it has no cold figure.

FFCV's environment is described in bench_ffcv.py.

The ways of torch_loop.py are compared in the record of --variants (2026-11-27-2cores-small-variants.json): `select` in
threads, the contender, is the fastest or within 10 % of it in each run; a plain loop in float32 makes about half of it.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from bench_reading import copies, forget
from PIL import Image
from record import ROOT, write
from torch_loop import MIXES, WAYS, Draws, Images, torch_loop

from dali_diffusemix import (
    DiffuseMixDataset,
    DiffuseMixLoader,
    MixSpec,
    RandomCrop,
    TrainCrop,
    TrivialAugmentWide,
    bench,
)
from dali_diffusemix.bench import Contender, Material, Measurement, extract, plain_dali
from dali_diffusemix.catalog.listing import index
from dali_diffusemix.catalog.table import Catalog
from dali_diffusemix.fractals import FractalBank, render_bank
from dali_diffusemix.generate import GenerateConfig, generate
from dali_diffusemix.images.codec import decode
from dali_diffusemix.mix import IMAGENET_MEAN, IMAGENET_STD
from dali_diffusemix.mix.pixel import encode, mixed_image
from dali_diffusemix.mix.tensor import TensorFormat
from dali_diffusemix.plan.augment import Augmentation
from dali_diffusemix.plan.crops import Crop
from dali_diffusemix.store import EditStore, OriginalStore, ShardWriter, StoreWriter, Wish
from dali_diffusemix.store.pack import PackConfig, pack

SIDE = 32
CLASSES = 100
BEST = "select", "_threads"  # the fastest of torch_loop.py; measure with --variants
FFCV_EPOCH = 20  # passes that are one epoch of FFCV, so that what it allocates in each does not count


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A contender, what it reads, and whose process it runs in."""

    make: Callable[[], Contender]
    reads: tuple[Path, ...] = ()
    warm_up: Callable[[], Contender] | None = None  # of other files, if the contender would keep those that it reads
    ffcv: bool = False


# Preparation ----------------------------------------------------------------------------------------------------------


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """Make a folder, whole or not at all; an existing one stays."""
    if not folder.exists():
        partial_folder = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir(parents=True)
        make(partial_folder)
        partial_folder.rename(folder)
    return folder


def crops_of(photographs: Path, count: int, folder: Path) -> None:
    """Write square crops of photographs, shrunk to `SIDE`, as PNGs of `CLASSES` classes."""
    files = sorted(photographs.glob("*/*"))
    random = np.random.default_rng(0)
    for number in range(min(CLASSES, count)):
        (folder / f"c{number:02}").mkdir()
    for turn, file in enumerate(files):
        with Image.open(file) as opened:
            photograph = opened.convert("RGB")
        for number in range(turn, count, len(files)):
            side = int(random.integers(min(SIDE, *photograph.size), min(photograph.size) + 1))
            left, top = (int(random.integers(extent - side + 1)) for extent in photograph.size)
            box = (left, top, left + side, top + side)
            small = photograph.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box)
            small.save(folder / f"c{number % CLASSES:02}" / f"{number:05}.png")


def shrunk(photographs: Path, longest: int, folder: Path) -> None:
    for file in sorted(photographs.glob("*/*")):
        (folder / file.parent.name).mkdir(exist_ok=True)
        with Image.open(file) as opened:
            photograph = opened.convert("RGB")
        photograph.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        photograph.save(folder / file.parent.name / f"{file.stem}.jpg", quality=95)


def repeated_edits(store: EditStore, catalog: Catalog, folder: Path) -> None:
    """Write a store with an edit for every copy (`copies`) of the store's originals; a rejected edit is replaced."""
    rows = {store.catalog.path(row): row for row in range(len(store.catalog))}
    with StoreWriter.open(folder, catalog, store.settings) as writer:
        writer.order(Wish(prompts={"edit": None}, variants=1, originals_per_shard=512))
        for shard in writer.shards():
            with ShardWriter(folder, writer.catalog, shard) as edits:
                for row in shard.rows:
                    class_name, _, name = catalog.path(row).rpartition("/")
                    original = rows[f"{class_name}/{name.partition('-')[2]}"]
                    edit = min(int(store.starts[original]), len(store) - 1)  # its own, or the next one's
                    height, width = store.sizes(np.array([edit]))[0].tolist()
                    edits.add(row, 0, 0, seed=0, image=store.encoded(edit).tobytes(), height=height, width=width)
        writer.finish()


@dataclass(frozen=True)
class Prepared:
    """Copies of originals with an edit each, and fractals."""

    originals: Path
    edits: Path
    fractals: Path

    @classmethod
    def of(cls, distinct: Path, folder: Path, repeat: int, side: int) -> Self:
        """Make everything in `folder` from different originals, with edits and fractals of a size; or keep it."""
        originals = once(folder / "originals", lambda new: copies(distinct, new, repeat))
        config = GenerateConfig(prompts=("sunset",), size=side, format="jpeg")
        made = once(folder / "distinct-edits", lambda new: generate(distinct, new, config))
        edits = folder / "edits"
        once(edits, lambda new: repeated_edits(EditStore.open(made), index(originals), new))
        fractals = folder / "fractals.npy"
        if not fractals.exists():
            render_bank(fractals, count=64, size=side)
        return cls(originals, edits, fractals)


# This package ---------------------------------------------------------------------------------------------------------


def ours(
    root: Path,
    edits: Path,
    fractals: Path,
    crop: Crop,
    options: argparse.Namespace,
    *,
    raw: Path | None = None,
    max_side: int | None = None,
    resident: str | None = None,
    channels_last: bool = False,
    augment: Augmentation | None = None,
) -> Contender:
    """Return this package's loader; with `raw` from raw stores in this folder, which are made of root and edits."""
    if raw is not None:
        smaller: dict[str, Any] = {} if max_side is None else {"max_side": max_side}
        pack(root, raw / "originals", PackConfig(format="raw", **smaller))
        pack(edits, raw / "edits", PackConfig(format="raw"))
        root, edits = raw / "originals", raw / "edits"
    dataset = DiffuseMixDataset(
        root,
        edits=edits,
        fractals=fractals,
        mix=MixSpec(probability=1),
        crop=crop,
        augment=augment,
        seed=0,
        on_error="raise",
    )
    more: dict[str, Any] = {} if resident is None else {"resident": resident}
    loader = DiffuseMixLoader(
        dataset,
        options.batch_size,
        shuffle=True,
        num_workers=options.threads,
        device=options.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
        **more,
    )
    return Contender(epoch=lambda: (len(images) for images, _ in loader), ahead=3)


# 32 x 32 --------------------------------------------------------------------------------------------------------------


def prepared_32(options: argparse.Namespace, folder: Path) -> Prepared:
    distinct = options.distinct
    case = folder / f"32-{distinct}-{options.images}"
    once(case / "distinct", lambda new: crops_of(options.root, distinct, new))
    return Prepared.of(case / "distinct", case, options.images // distinct, SIDE)


def in_memory(prepared: Prepared, folder: Path) -> Images:
    """Read all images as tensors; they are decoded once."""

    def decoded(target: Path) -> None:
        store = EditStore.open(prepared.edits)
        rows = range(len(store.catalog))
        assert len(store) == len(rows)  # an edit has the number of its original
        np.save(
            target / "originals.npy", [decode((prepared.originals / store.catalog.path(r)).read_bytes()) for r in rows]
        )
        np.save(target / "edits.npy", [decode(store.encoded(row).tobytes()) for row in rows])
        np.save(target / "labels.npy", store.catalog.labels.astype(np.int64))

    once(folder, decoded)
    originals, edits, labels = (
        torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("originals", "edits", "labels")
    )
    return Images(originals, edits, torch.from_numpy(np.array(FractalBank.open(prepared.fractals).images)), labels)


def by_hand(prepared: Prepared, options: argparse.Namespace, mix: str, way: str) -> Contender:
    images = in_memory(prepared, prepared.edits.parent / "arrays")
    if options.device != "cpu":  # all that the loop makes is there then, its constants too
        torch.set_default_device(options.device)
        loops = importlib.reload(sys.modules["torch_loop"])
        there = [getattr(images, field.name).to(options.device) for field in fields(images)]
        return loops.torch_loop(loops.Images(*there), options.batch_size, options.threads, mix, way)
    return torch_loop(images, options.batch_size, options.threads, mix, way)


def check(images: Images, dataset: DiffuseMixDataset, mixes: Sequence[str]) -> None:
    """Compare mixes with the specification, on the draws of a plan, and with each other on random ones."""
    plan = dataset.planner.batch(0, range(min(64, len(dataset))))
    draws = Draws.of_plan(plan, SIDE)
    expected = [
        encode(
            mixed_image(
                plan,
                row,
                images.originals[plan.original[row]].numpy(),
                images.edits[plan.original[row]].numpy(),
                images.fractals[plan.fractal[row]].numpy(),
            ),
            TensorFormat(),
        )
        for row in range(len(plan))
    ]
    random = Draws.random(torch.arange(len(images.labels))[:256], len(images.fractals))
    reference = MIXES["float"](images)(random)
    for name in mixes:
        mix = MIXES[name](images)
        torch.testing.assert_close(mix(draws), torch.from_numpy(np.stack(expected)), atol=1e-5, rtol=0, msg=name)
        torch.testing.assert_close(mix(random), reference, atol=1e-5, rtol=0, msg=name)


def checked(prepared: Prepared, mixes: Sequence[str]) -> None:
    dataset = DiffuseMixDataset(
        prepared.originals,
        edits=prepared.edits,
        fractals=prepared.fractals,
        mix=MixSpec(probability=1),
        crop=RandomCrop(SIDE, padding=4),
        seed=0,
    )
    check(in_memory(prepared, prepared.edits.parent / "arrays"), dataset, mixes)


def ffcv(prepared: Prepared, options: argparse.Namespace, layout: str, order: str) -> Contender:
    """Return FFCV with raw images; runs in FFCV's environment."""
    from bench_ffcv import Contiguous, Files
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, RandomTranslate, Squeeze, ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter

    beton = prepared.edits.parent / "raw.beton"
    if not beton.exists():
        field = RGBImageField(write_mode="raw")
        written = beton.with_suffix(".partial")
        writer = DatasetWriter(str(written), {"image": field, "label": IntField()})
        writer.from_indexed_dataset(Files(prepared.originals, pixels=True))
        written.rename(beton)
    loader = Loader(
        str(beton),
        batch_size=options.batch_size,
        num_workers=options.threads,
        os_cache=True,
        order=OrderOption[order],
        seed=0,
        # QUASI_RANDOM fails with repeated indices
        indices=np.tile(np.arange(options.images, dtype=np.uint64), FFCV_EPOCH if order == "RANDOM" else 1),
        pipelines={
            "image": [
                SimpleRGBImageDecoder(),
                RandomTranslate(padding=4),
                RandomHorizontalFlip(),
                NormalizeImage(255 * np.array(IMAGENET_MEAN), 255 * np.array(IMAGENET_STD), np.float32),
                ToTensor(),
                ToTorchImage(channels_last=layout != "nchw"),
                *([Contiguous()] if layout == "contiguous" else []),
            ],
            "label": [IntDecoder(), ToTensor(), Squeeze()],
        },
        drop_last=False,
        batches_ahead=options.batches_ahead,
    )
    return Contender(epoch=lambda: (len(images) for images, _ in loader), ahead=options.batches_ahead + 2)


def entries_32(options: argparse.Namespace, folder: Path) -> dict[str, Entry]:
    prepared = prepared_32(options, folder)
    crop = RandomCrop(SIDE, padding=4)
    plain = partial(ours, prepared.originals, prepared.edits, prepared.fractals, crop, options)
    raw = partial(plain, raw=prepared.edits.parent / "raw")
    found = {
        "diffusemix": Entry(make=plain),
        "diffusemix_raw": Entry(make=raw),
        "diffusemix_resident": Entry(make=partial(raw, resident="host")),
        "diffusemix_channels_last": Entry(make=partial(plain, channels_last=True)),
        "diffusemix_raw_channels_last": Entry(make=partial(raw, channels_last=True)),
        "diffusemix_resident_channels_last": Entry(make=partial(raw, resident="host", channels_last=True)),
    }
    if options.device != "cpu":
        some = MIXES if options.variants else ("float", "padded", "select", "quadrants")
        return {
            "diffusemix_resident": Entry(make=partial(raw, resident="device")),
            "diffusemix_resident_channels_last": Entry(make=partial(raw, resident="device", channels_last=True)),
            **{f"torch_{mix}": Entry(make=partial(by_hand, prepared, options, mix, "")) for mix in some},
        }
    ways = [BEST]
    if options.variants:  # DataLoader's workers only for the plainest and the fastest
        ways = [(mix, way) for mix in MIXES for way in WAYS if way != "_workers" or mix in ("float", BEST[0])]
    found |= {f"torch_{mix}{way}": Entry(make=partial(by_hand, prepared, options, mix, way)) for mix, way in ways}
    if options.ffcv is not None:
        forms = [("", "nchw", "RANDOM"), ("_contiguous", "contiguous", "RANDOM")]
        forms += [("_channels_last", "channels_last", "RANDOM"), ("_quasi_random", "contiguous", "QUASI_RANDOM")]
        forms += [("_quasi_random_channels_last", "channels_last", "QUASI_RANDOM")]
        found |= {
            f"ffcv{name}": Entry(make=partial(ffcv, prepared, options, layout, order), ffcv=True)
            for name, layout, order in forms
        }
    return found


# Photographs ----------------------------------------------------------------------------------------------------------


def entries_photographs(options: argparse.Namespace, folder: Path) -> dict[str, Entry]:
    case = folder / f"photographs-{options.repeat}"
    whole = Prepared.of(options.root, case / "whole", options.repeat, 256)
    if options.device != "cpu":
        return entries_photographs_on_gpu(options, case, whole)
    small = once(case / "distinct-128", lambda new: shrunk(options.root, 128, new))
    of_128 = Prepared.of(small, case / "128", options.repeat, 128)
    packed = once(case / "400" / "store", lambda new: pack(whole.originals, new, PackConfig(max_side=400)))
    store = OriginalStore.open(packed)
    files_400 = once(case / "400" / "files", lambda new: extract(store, range(len(store)), new))

    def dali(files: Path, size: int) -> Entry:
        def material(root: Path) -> Material:
            return Material(
                root=root, files=root, batch_size=options.batch_size, num_workers=options.threads, size=size
            )

        # DALI's reader keeps 1024 files to shuffle them.
        warm_up = partial(plain_dali, material(options.root))
        return Entry(make=partial(plain_dali, material(files)), reads=(files,), warm_up=warm_up)

    def mixed(root: Path, of: Prepared, size: int, raw: Path | None = None, **more: Any) -> Entry:
        make = partial(ours, root, of.edits, of.fractals, TrainCrop(size), options, raw=raw, **more)
        if "resident" in more:
            return Entry(make=make)
        return Entry(make=make, reads=(root, of.edits) if raw is None else (raw,))

    raw_256 = partial(mixed, whole.originals, whole, 224, case / "raw-256", max_side=256)
    found = {
        "plain_dali": dali(whole.originals, 224),
        "plain_dali_400": dali(files_400, 224),
        "diffusemix_400": mixed(packed, whole, 224),
        "diffusemix_raw_256": raw_256(),
        "diffusemix_resident_256": raw_256(resident="host"),
    }
    for size in (128, 224):
        found |= {
            f"plain_dali_128_to_{size}": dali(of_128.originals, size),
            f"diffusemix_128_to_{size}": mixed(of_128.originals, of_128, size),
            f"diffusemix_raw_128_to_{size}": mixed(of_128.originals, of_128, size, case / "raw-128"),
        }
    return found


def entries_photographs_on_gpu(options: argparse.Namespace, case: Path, whole: "Prepared") -> dict[str, Entry]:
    material = Material(
        root=whole.originals,
        files=whole.originals,
        batch_size=options.batch_size,
        num_workers=options.threads,
        device=options.device,
        size=224,
    )

    def raw(**more: Any) -> Entry:
        make = partial(ours, whole.originals, whole.edits, whole.fractals, TrainCrop(224), options, **more)
        return Entry(make=partial(make, raw=case / "raw-256", max_side=256))

    return {
        "plain_dali": Entry(make=partial(plain_dali, material, form="whole")),
        "diffusemix_raw_256": raw(),
        "diffusemix_resident_256": raw(resident="host"),
        "diffusemix_device_256": raw(resident="device"),
        "diffusemix_device_256_augment": raw(resident="device", augment=TrivialAugmentWide()),
    }


# Turns ----------------------------------------------------------------------------------------------------------------


def read_bytes() -> int:
    """Return the bytes that this process has had read from the disk."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def endless(contender: Contender) -> Iterator[int]:
    while True:
        yield from contender.epoch()


def timed(contender: Contender, batches: Iterator[int], seconds: float | None) -> dict[str, float]:
    """Time whole batches for at least `seconds`; or, if that is None, one epoch."""
    if seconds is not None:
        for _ in range(contender.ahead):
            next(batches)
    images, begin, cpu, read = 0, time.perf_counter(), bench.cpu_seconds(), read_bytes()
    if seconds is None:
        images = sum(contender.epoch())
    else:
        while images == 0 or time.perf_counter() - begin < seconds:
            images += sum(itertools.islice(batches, contender.ahead))
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    took = time.perf_counter() - begin
    return {
        "images_per_second": images / took,
        "cpu_seconds_per_image": (bench.cpu_seconds() - cpu) / images,
        "read_bytes_per_image": (read_bytes() - read) / images,
    }


def serve(entry: Entry) -> None:
    """Run in a contender's process: answer each turn, {"seconds", "cold", "watch"}, in a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    started: tuple[Contender, Iterator[int]] | None = None
    for line in sys.stdin:
        turn = json.loads(line)
        try:
            if started is None:
                contender = entry.make()
                started = contender, endless(contender)
            if turn["cold"]:
                # What starts once is not the disk's time.
                first_batches = started[1] if entry.warm_up is None else entry.warm_up().epoch()
                for _ in itertools.islice(first_batches, started[0].ahead):
                    pass
                for folder in entry.reads:
                    forget(folder)
            with bench.MemoryWatch() if turn["watch"] else contextlib.nullcontext() as watch:
                answer: dict[str, Any] = dict(timed(*started, turn["seconds"]))
            answer["memory"] = None if watch is None else watch.peak
        except Exception as error:
            traceback.print_exc()
            first = str(error).strip().splitlines() or ["no message"]
            answer = {"error": f"{type(error).__name__}: {first[0]}"}
        print(json.dumps(answer), file=answers, flush=True)


class Server:
    """A contender in a process of its own."""

    def __init__(self, name: str, entry: Entry, options: argparse.Namespace, folder: Path) -> None:
        python = options.ffcv if entry.ffcv else Path(sys.executable)
        self._log = folder / f"log-{name}"
        self._patience = options.patience
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, __file__, *sys.argv[1:], "--cache", folder, "--serve", name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
                },
            )

    def turn(self, seconds: float | None, *, cold: bool = False, first: bool = False) -> dict[str, Any]:
        """Return what a turn took, or {"error": reason}."""
        assert self._process.stdin is not None and self._process.stdout is not None
        late = threading.Timer(self._patience * (5 if first else 1), self._process.kill)
        late.start()
        try:
            self._process.stdin.write(json.dumps({"seconds": seconds, "cold": cold, "watch": first}) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except OSError:
            answer = ""
        finally:
            late.cancel()
        if answer:
            return dict(json.loads(answer))
        last = self._log.read_text().strip().splitlines() or ["nothing in its log"]
        return {"error": f"its process ended with exit code {self._process.wait()}: {last[-1]}"}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._process.kill()
        self._process.wait()


def measured(turns: Sequence[Mapping[str, Any]], memory: float | None) -> dict[str, Any]:
    found = Measurement(
        images_per_second=tuple(turn["images_per_second"] for turn in turns),
        cpu_seconds_per_image=tuple(turn["cpu_seconds_per_image"] for turn in turns),
        peak_memory_mib=memory,
    )
    return found.json()


def warm_rounds(
    entries: Mapping[str, Entry], options: argparse.Namespace, folder: Path, keep: Callable[..., None]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Run contenders alternately; returns the results, and the reasons of those that are left out."""
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in entries}
    left_out: dict[str, str] = {}
    results: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(Server(name, entry, options, folder)) for name, entry in entries.items()}
        for number in range(1 + options.rounds):
            for name, server in servers.items():
                if name in left_out:
                    continue
                answer = server.turn(options.seconds, first=number == 0)
                if "error" in answer:
                    left_out[name] = f"failed: {answer['error']}"
                    results.pop(name, None)
                turns[name].append(answer)
                if number and name not in left_out:
                    results[name] = measured(turns[name][1:], turns[name][0]["memory"])
            if number:
                keep(results, {}, left_out)
    return results, left_out


def cold_rounds(
    entries: Mapping[str, Entry], options: argparse.Namespace, folder: Path, left_out: dict[str, str]
) -> dict[str, Any]:
    """Run an epoch of each contender alternately, in new processes, with its files not in the page cache."""
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in entries}
    for _ in range(options.cold_rounds):
        for name, entry in entries.items():
            with Server(name, entry, options, folder) as server:
                answer = server.turn(None, cold=True, first=True)
            if "error" in answer:
                left_out[f"{name}, cold"] = f"failed: {answer['error']}"
            else:
                turns[name].append(answer)
    return {
        name: {
            **measured(taken, max(turn["memory"] or 0 for turn in taken) or None),
            "read_bytes_per_image": round(statistics.median(turn["read_bytes_per_image"] for turn in taken)),
        }
        for name, taken in turns.items()
        if taken
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("root", type=Path, help="a folder of photographs, root/class/image")
    parser.add_argument("--images", type=int, default=50000, help="of 32 x 32")
    parser.add_argument("--distinct", type=int, default=5000, help="different ones among them")
    parser.add_argument("--repeat", type=int, default=16, help="copies of each photograph")
    parser.add_argument("--batch-size", type=int, help="256 of 32 x 32, 64 photographs by default")
    parser.add_argument("--device", default="cpu", help="cuda: 32 x 32 in the memory of the GPU, by torch and resident")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches-ahead", type=int, default=1, help="of FFCV")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="length of a turn")
    parser.add_argument("--cold-rounds", type=int, default=5, help="of photographs")
    parser.add_argument("--variants", action="store_true", help="all ways of torch_loop.py")
    parser.add_argument("--ffcv", type=Path, help="the python of FFCV's environment")
    parser.add_argument("--only", default="", help="contenders, separated by commas")
    parser.add_argument("--cache", type=Path, help="keep what is made here for the next run, of one root")
    parser.add_argument("--patience", type=float, default=300, help="seconds that a turn may take, the first 5 times")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.batch_size = options.batch_size or (256 if options.part == "32" else 64)
    options.distinct = min(options.distinct, options.images)
    if options.images % options.distinct:
        parser.error(f"--images must be a multiple of --distinct, found {options.images} and {options.distinct}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.cache or Path(temporary)
        entries = PARTS[options.part](options, folder)
        if options.serve:
            serve(entries[options.serve])
            return
        wanted = options.only.split(",") if options.only else list(entries)
        if unknown := set(wanted) - set(entries):
            parser.error(f"--only must name some of {', '.join(entries)}, found {', '.join(sorted(unknown))}")
        entries = {name: entries[name] for name in wanted}
        settings = {
            "part": options.part,
            "images": options.images if options.part == "32" else len(list(options.root.glob("*/*"))) * options.repeat,
            "distinct": options.distinct if options.part == "32" else len(list(options.root.glob("*/*"))),
            "batch_size": options.batch_size,
            "threads": options.threads,
            "device": options.device,
            "seconds": options.seconds,
            "batches_ahead": options.batches_ahead,
        }
        if options.part == "32":
            mixes = dict.fromkeys(name.removeprefix("torch_") for name in wanted if name.startswith("torch_"))
            checked(prepared_32(options, folder), [mix for mix in MIXES if any(f"{mix}{way}" in mixes for way in WAYS)])

        def keep(results: Mapping[str, Any], cold: Mapping[str, Any], left_out: Mapping[str, str]) -> None:
            content = {"benchmark": "bench_small", "settings": settings, "results": results, "cold": cold}
            write(options.out, {**content, "left_out": left_out}, quiet=True)

        results, left_out = warm_rounds(entries, options, folder, keep)
        stored = {name: entry for name, entry in entries.items() if entry.reads and name in results}
        cold = cold_rounds(stored, options, folder, left_out)
        keep(results, cold, left_out)
    for title, rows in (("warm", results), ("cold", cold)):
        for name, row in rows.items():
            read = f"{row['read_bytes_per_image']:10} bytes read" if title == "cold" else ""
            print(
                f"{title} {name:36}{row['images_per_second']:9.0f} images/s ({row['lowest']:.0f} to "
                f"{row['highest']:.0f}){row['cpu_seconds_per_image'] * 1e6:9.1f} us of CPU{read}"
            )
    for name, reason in left_out.items():
        print(f"{name}: {reason[:200]}")
    if not results:
        raise SystemExit("no contender could be measured")


PARTS = {"32": entries_32, "photographs": entries_photographs}


if __name__ == "__main__":
    main()
