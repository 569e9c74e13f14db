"""How fast this loader is on your data and machine, beside others, and what to change to make it faster.

    every contender in a process of its own ──> turns, A B C A B C ... ──> medians, and the gain of each change tried

A turn takes what the contender had ready, uncounted, and then times whole batches. Speed is wall time; CPU time and
memory are those of the contender's process and its workers.
"""

import contextlib
import datetime
import math
import multiprocessing
import os
import platform
import resource
import signal
import statistics
import tempfile
import textwrap
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dali_diffusemix.base.cpus import cpus
from dali_diffusemix.base.files import write
from dali_diffusemix.catalog.table import Catalog
from dali_diffusemix.errors import ConfigError, DataError, DecodeError, DiffuseMixError, StoreError
from dali_diffusemix.images.reading import Location, read
from dali_diffusemix.loading.dali import dali
from dali_diffusemix.loading.dataset import DiffuseMixDataset
from dali_diffusemix.loading.loader import DiffuseMixLoader
from dali_diffusemix.mix.pixel import edit_weight
from dali_diffusemix.mix.tensor import IMAGENET_MEAN, IMAGENET_STD
from dali_diffusemix.plan.batch import BatchPlan, Planner
from dali_diffusemix.plan.crops import TrainCrop
from dali_diffusemix.plan.spec import MixSpec
from dali_diffusemix.store import DENIED, EditStore, OriginalStore, ShardWriter, StoreWriter
from dali_diffusemix.store.pack import PackConfig, pack

__all__ = [
    "BenchResult",
    "Contender",
    "Factory",
    "Material",
    "Measurement",
    "MemoryWatch",
    "PillowCrops",
    "Trial",
    "bench",
    "cpu_seconds",
    "diffusemix",
    "extract",
    "interleaved",
    "machine",
    "pillow",
    "plain_dali",
    "plain_dali_batches",
]

_Path = str | os.PathLike[str]

_PACKAGES: Final = (
    *("torch", "numpy", "pillow", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "cupy-cuda12x", "cupy-cuda13x"),
    *("spdl", "webdataset"),
)
_PAYS: Final = 1.05  # the least gain that is advice
_PACKED: Final = 256  # originals that are packed to try it
_LEAST_BATCHES: Final = 32  # in an epoch of a sample
_READ: Final = 64  # originals that are looked at together
_SAMPLE_SECONDS: Final = 0.05  # between two looks at memory
_COLUMNS: Final = 80  # of the text
_QUEUE: Final = 2  # of batches; DALI's own, and longer ones are no faster
_OURS: Final = ("diffusemix", "plain")


# What is loaded -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Material:
    """What all contenders of a comparison load, alike: images, crops, batches, threads, device."""

    root: Path  # of this package's loader: a folder, or a packed store
    files: Path  # a folder of the same images as files, for the others; the root itself where it is a folder
    catalog: Path | None = None  # of the originals, a saved `Catalog`; None: the edit store's or the root's own
    edits: Path | None = None
    fractals: Path | None = None
    epochs: int = 1  # passes over the originals that are one epoch, so that a small sample has long ones
    batch_size: int = 64
    num_workers: int = 2  # threads, or DataLoader's worker processes
    device: str = "cpu"
    size: int = 224  # pixels a side of a sample
    seed: int = 0

    def dataset(self, *, mixed: bool) -> DiffuseMixDataset:
        """The images under random crops and flips; mixed, all of them that have an edit."""
        dataset = DiffuseMixDataset(
            self.root,
            catalog=None if self.catalog is None else Catalog.open(self.catalog),
            edits=self.edits if mixed or self.catalog is None else None,
            fractals=self.fractals if mixed else None,
            mix=MixSpec(probability=1) if mixed else None,
            crop=TrainCrop(self.size),
            seed=self.seed,
        )
        if self.epochs > 1:
            dataset.planner = _LongPlanner(**vars(dataset.planner), epochs=self.epochs)
        return dataset


@dataclass(frozen=True, kw_only=True)
class _LongPlanner(Planner):
    """Several passes over the samples as one epoch; a sample has the same crop in each."""

    epochs: int

    def __len__(self) -> int:
        return super().__len__() * self.epochs

    def batch(self, epoch: int, indices: Any) -> BatchPlan:
        return super().batch(epoch, np.asarray(indices) % super().__len__())


def extract(store: OriginalStore, rows: Sequence[int], folder: Path) -> Path:
    """Write packed originals as files, the same bytes, at their paths in `folder`; what is there already stays."""
    for row in rows:
        file = folder / store.catalog.path(row)
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write(file, store.encoded(row).tobytes())
    return folder


def _sample(dataset: DiffuseMixDataset, rows: NDArray[np.int64], folder: Path) -> tuple[Path, Path | None]:
    """A catalog of some originals, and a store with an edit of each that has one, the same bytes."""
    catalog, store = dataset.catalog, dataset.store
    paths = [catalog.encoded_path(int(row)) for row in rows]
    chosen = Catalog.from_arrays(paths, catalog.labels[rows], catalog.classes, catalog.sizes[rows])
    chosen.save(folder / "catalog")
    if store is None:
        return folder / "catalog", None
    with StoreWriter.open(folder / "edits", chosen, store.settings) as writer:
        writer.order(("edit",), 1, 512)
        for shard in writer.shards():
            with ShardWriter(folder / "edits", writer.catalog, shard) as edits:
                for row in shard.rows:
                    _copy_edit(store, int(rows[row]), edits, row)
        writer.finish()
    return folder / "catalog", folder / "edits"


def _copy_edit(store: EditStore, original: int, edits: ShardWriter, row: int) -> None:
    """Copy the first edit of an original; where it has none, say so."""
    first = int(store.starts[original])
    if first == store.starts[original + 1]:
        edits.add(row, 0, 0, seed=0, jpeg=None, verdict=DENIED)
        return
    height, width = store.sizes(np.array([first]))[0].tolist()
    edits.add(row, 0, 0, seed=0, jpeg=store.encoded(first).tobytes(), height=height, width=width)


# Contenders -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Something that delivers batches."""

    epoch: Callable[[], Iterator[int]]  # begins an epoch; gives the size of each batch as it arrives
    ahead: int  # batches that it holds ready at most while nobody asks


Factory = Callable[[], Contender]
"""Builds a contender, in the contender's own process: a module's function, or a `partial` of one."""


def diffusemix(
    material: Material,
    *,
    mixed: bool = True,
    channels_last: bool = False,
    visible_parts: bool = True,
    prefetch_factor: int = 2,
    decode: Any = None,
) -> Contender:
    """This package's loader; `mixed`, or the plain images; `decode` is the loader's, where one is given."""
    way: dict[str, Any] = {} if decode is None else {"decode": decode}
    loader = DiffuseMixLoader(
        material.dataset(mixed=mixed),
        material.batch_size,
        shuffle=True,
        num_workers=material.num_workers,
        device=material.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
        prefetch_factor=prefetch_factor,
        visible_parts=visible_parts,
        **way,
    )
    return Contender(epoch=lambda: (len(images) for images, _ in loader), ahead=prefetch_factor + 1)


def plain_dali(material: Material, *, form: str = "region") -> Contender:
    """DALI by itself, see `plain_dali_batches`."""
    batches = plain_dali_batches(material, form=form)
    images_of_epoch = len(material.dataset(mixed=False).catalog) * material.epochs

    def epoch() -> Iterator[int]:
        left = images_of_epoch
        while left > 0:
            images, _ = next(batches)
            # The reader goes on into the next epoch, where the last batch of this one has room.
            yield min(left, len(images))
            left -= material.batch_size

    return Contender(epoch=epoch, ahead=_QUEUE + 1)


def plain_dali_batches(
    material: Material, *, form: str = "region", drop_last: bool = False
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of DALI by itself, without end: decode, resize, crop_mirror_normalize. Crops of the same law, its own.

    Args:
        material: The images.
        form: What is decoded, and where. "region": the crop alone, on the device; "whole": the image, on the device,
            cropped by the resize, as a hardware decoder wants it; "cpu": the crop alone, on the CPU, then copied.
        drop_last: Leave out the part of a batch that an epoch of the reader ends with.

    Raises:
        ConfigError: There is no such form.
        MissingDependencyError: DALI is not installed.
    """
    if form not in ("region", "whole", "cpu"):
        raise ConfigError(f"form must be 'region', 'whole' or 'cpu', found {form!r}.")
    fn, pipeline_def, types = dali()
    catalog = material.dataset(mixed=False).catalog
    cuda = material.device != "cpu"
    decoder = "mixed" if cuda and form != "cpu" else "cpu"
    side = material.size
    resize = {"size": [side, side], "interp_type": types.INTERP_LINEAR, "antialias": True}

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=material.batch_size,
        num_threads=material.num_workers,
        device_id=(torch.device(material.device).index or 0) if cuda else None,
        prefetch_queue_depth=_QUEUE,
        seed=material.seed,
    )
    def pipeline() -> Any:
        files = [os.path.join(material.files, path) for path in catalog.paths]  # noqa: PTH118 - speed
        encoded, label = fn.readers.file(files=files, labels=catalog.labels.tolist(), shuffle_after_epoch=True)
        if form == "whole":
            pixels = fn.decoders.image(encoded, device=decoder, output_type=types.RGB)
            pixels = fn.random_resized_crop(pixels, random_aspect_ratio=[3 / 4, 4 / 3], **resize)
        else:
            pixels = fn.decoders.image_random_crop(
                encoded, device=decoder, output_type=types.RGB, random_aspect_ratio=[3 / 4, 4 / 3]
            )
            pixels = fn.resize(pixels.gpu() if cuda and form == "cpu" else pixels, **resize)
        images = fn.crop_mirror_normalize(
            pixels,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[255 * mean for mean in IMAGENET_MEAN],
            std=[255 * deviation for deviation in IMAGENET_STD],
            mirror=fn.random.coin_flip(),
        )
        return images, label

    built = pipeline()

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            images, labels = (torch.utils.dlpack.from_dlpack(one.as_tensor()) for one in built.run())
            if len(images) == material.batch_size or not drop_last:
                yield images, labels.flatten()

    return batches()


class PillowCrops(Dataset[tuple[torch.Tensor, int]]):
    """The reference way, a sample at a time, at its fastest in Pillow and NumPy: `resize(box=...)`, then NumPy's mix.

    A sample is a (3, size, size) float32 tensor, normalised, and its label. The crops are the dataset's.
    """

    def __init__(self, material: Material, *, mixed: bool = False) -> None:
        self.dataset = material.dataset(mixed=mixed)
        self._files, self._size = material.files, (material.size, material.size)
        self._mean = np.array(IMAGENET_MEAN, dtype=np.float32) * 255
        self._deviation = np.array(IMAGENET_STD, dtype=np.float32) * 255

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[torch.Tensor, int]]:
        """Samples of a batch of indices, planned together."""
        plan = self.dataset.planner.batch(self.dataset.epoch, indices)
        return [self._sample(plan, row) for row in range(len(plan))]

    def _sample(self, plan: BatchPlan, row: int) -> tuple[torch.Tensor, int]:
        path = os.path.join(self._files, self.dataset.catalog.path(int(plan.original[row])))  # noqa: PTH118 - speed
        with Image.open(path) as original:
            return self.sample(plan, row, original)

    def sample(self, plan: BatchPlan, row: int, original: Image.Image) -> tuple[torch.Tensor, int]:
        """The sample of a row of a plan, whose original is given."""
        sample = self.cropped(original, plan.box[row])
        if plan.edit[row] >= 0:
            with contextlib.suppress(OSError, ValueError, SyntaxError, StoreError):  # a damaged edit: unmixed
                sample = self._mixed(plan, row, sample)
        if plan.flip[row]:
            sample = sample[:, ::-1]
        channels_first = np.ascontiguousarray(((sample - self._mean) / self._deviation).transpose(2, 0, 1))
        return torch.from_numpy(channels_first), int(self.dataset.catalog.labels[plan.original[row]])

    def _mixed(self, plan: BatchPlan, row: int, sample: NDArray[np.float32]) -> NDArray[np.float32]:
        store, bank = self.dataset.store, self.dataset.bank
        if store is None or bank is None:
            raise ConfigError("mixed needs edits and fractals, found none; give both.")
        with Image.open(BytesIO(store.encoded(int(plan.edit[row])).tobytes())) as edit:
            m = edit_weight(int(plan.mask[row]), plan.seam_width, plan.span[row], self._size)[..., None]
            hybrid = m * self.cropped(edit, plan.box[row]) + (1 - m) * sample
        weight = plan.fractal_weight[row]
        rows, columns = (slice(None, None, -1 if flipped else 1) for flipped in plan.fractal_flip[row])
        fractal = Image.fromarray(bank.images[plan.fractal[row]][rows, columns])
        return np.asarray((1 - weight) * hybrid + weight * self.cropped(fractal, plan.span[row]))

    def cropped(self, image: Image.Image, box: NDArray[np.float64]) -> NDArray[np.float32]:
        """A relative box (top, left, height, width) of an image, as (size, size, 3) float32, 0 to 255."""
        top, left, height, width = box * [image.height, image.width, image.height, image.width]
        region = (left, top, min(left + width, image.width), min(top + height, image.height))
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        return np.asarray(rgb.resize(self._size, Image.Resampling.BILINEAR, box=region), dtype=np.float32)


def pillow(material: Material, *, mixed: bool = False) -> Contender:
    """Pillow under torch's DataLoader with worker processes that live over the epochs."""
    crops = PillowCrops(material, mixed=mixed)
    loader = DataLoader(
        crops,
        batch_size=material.batch_size,
        shuffle=True,
        num_workers=material.num_workers,
        persistent_workers=True,
        pin_memory=material.device != "cpu",
    )

    def epoch() -> Iterator[int]:
        crops.dataset.set_epoch(crops.dataset.epoch + 1)
        return (len(images.to(material.device, non_blocking=True)) for images, _ in loader)

    return Contender(epoch=epoch, ahead=material.num_workers * 2)  # 2: DataLoader's own prefetch_factor


# Measuring ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A contender's counted rounds, one value a round."""

    images_per_second: tuple[float, ...]
    cpu_seconds_per_image: tuple[float, ...]  # of the contender's process and its workers
    peak_memory_mib: float | None = None  # of these together, in the uncounted round; None: it cannot be read here

    def json(self) -> dict[str, Any]:
        """Medians, the lowest and highest round, and all rounds."""
        rates = self.images_per_second
        return {
            "images_per_second": round(statistics.median(rates), 1),
            "lowest": round(min(rates), 1),
            "highest": round(max(rates), 1),
            "cpu_seconds_per_image": round(statistics.median(self.cpu_seconds_per_image), 6),
            "peak_memory_mib": None if self.peak_memory_mib is None else round(self.peak_memory_mib, 1),
            "rounds": [round(rate, 1) for rate in rates],
        }


def cpu_seconds() -> float:
    """CPU time of this process and of those it started through multiprocessing, the ended ones included."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for child in multiprocessing.active_children():
        with contextlib.suppress(OSError):  # it has just ended
            # After the name, which may hold anything: state is field 3, utime and stime are 14 and 15.
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def _memory_mib() -> float | None:
    """Memory of this process and those it started; a page that several share counts once, in equal parts."""
    total = 0
    for process in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            if process == os.getpid():
                return None
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


class MemoryWatch:
    """Looks at the memory all the while: `with MemoryWatch() as watch: ...; watch.peak`, MiB."""

    def __init__(self) -> None:
        self.peak = _memory_mib()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while self.peak is not None and not self._stop.wait(_SAMPLE_SECONDS):
            self._look()

    def _look(self) -> None:
        if (now := _memory_mib()) is not None and self.peak is not None:
            self.peak = max(self.peak, now)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """What a turn gave."""

    images: int
    seconds: float
    cpu_seconds: float
    peak_memory_mib: float | None = None


class _Stream:
    """A contender's batches, epoch after epoch."""

    def __init__(self, contender: Contender) -> None:
        self._contender = contender
        self._batches: Iterator[int] = iter(())

    def _take(self, batches: int) -> int:
        """Take this many batches; returns their images."""
        images = 0
        for _ in range(batches):
            size = next(self._batches, None)
            if size is None:
                self._batches = self._contender.epoch()
                size = next(self._batches, 0)
            if size == 0:
                raise DataError("an epoch must give at least one image, found none; look at the contender's own log.")
            images += size
        return images

    def turn(self, seconds: float | None) -> _Turn:
        """Time whole batches for `seconds` at least, in steady state; or one whole epoch, from its beginning."""
        if seconds is not None:
            self._take(self._contender.ahead)
        _synchronize()
        images, begin, begin_cpu = 0, time.perf_counter(), cpu_seconds()
        if seconds is None:
            self._batches = self._contender.epoch()
            images = self._take(1) + sum(self._batches)
        else:
            # Batches of several workers arrive together, so they are counted together.
            while time.perf_counter() - begin < seconds:
                images += self._take(self._contender.ahead)
        _synchronize()
        return _Turn(images=images, seconds=time.perf_counter() - begin, cpu_seconds=cpu_seconds() - begin_cpu)


def _synchronize() -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def _serve(connection: Any, factories: Mapping[str, Factory]) -> None:
    """A contender's process: answers (name, seconds, watch memory) with the turn, or with the error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    os.dup2(2, 1)  # standard output is the parent's results
    warnings.simplefilter("ignore")  # the parent has shown them
    multiprocessing.set_start_method(None, force=True)  # of DataLoader's workers: as in the user's own process
    streams: dict[str, _Stream] = {}
    while True:
        try:
            name, seconds, watched = connection.recv()
        except EOFError:
            return
        try:
            with MemoryWatch() if watched else contextlib.nullcontext() as watch:
                if name not in streams:
                    streams[name] = _Stream(factories[name]())
                turn = streams[name].turn(seconds)
            connection.send(turn if watch is None else replace(turn, peak_memory_mib=watch.peak))
        except DiffuseMixError as error:
            connection.send(error)
        except Exception as error:
            first = str(error).strip().splitlines() or ["no message"]
            failure = DiffuseMixError(f"{type(error).__name__}: {first[0]}")
            failure.add_note(traceback.format_exc())
            connection.send(failure)


class _Process:
    """The process in which contenders live."""

    def __init__(self, factories: Mapping[str, Factory]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # Not a daemon: those may not have workers.
        self._process = context.Process(target=_serve, args=(theirs, dict(factories)))
        self._process.start()
        theirs.close()
        self._open = True

    def ask(self, name: str, seconds: float | None, *, watched: bool) -> None:
        """Begin a turn of a contender; `watched`, its memory too."""
        with contextlib.suppress(OSError):  # it has ended, which `answer` says
            self._connection.send((name, seconds, watched))

    def answer(self, name: str, patience: float | None) -> _Turn:
        """The turn that was asked for. Raises DiffuseMixError."""
        try:
            if patience is not None and not self._connection.poll(patience):
                self._process.kill()
                raise DiffuseMixError(f"{name}: a turn must end within {patience:g} s, found that this one did not.")
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(5)
            if self._process.is_alive():  # it closed the pipe and hangs
                self._process.kill()
                self._process.join()
            raise DiffuseMixError(
                f"{name}: its process must live to the end, found exit code {self._process.exitcode}; if it was killed "
                "for memory, take a smaller batch_size or fewer num_workers. A script that calls this needs "
                "`if __name__ == '__main__':`."
            ) from error
        if isinstance(answer, DiffuseMixError):
            raise answer
        assert isinstance(answer, _Turn)
        return answer

    def dismiss(self) -> None:
        """Ask it to end, without waiting."""
        if self._open:
            self._connection.close()
        self._open = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.dismiss()
        if kind is None:
            self._process.join(10)
        self._process.terminate()
        self._process.join()


def interleaved(
    factories: Mapping[str, Factory],
    *,
    rounds: int,
    seconds: float | None = None,
    optional: Collection[str] = (),
    together: bool = False,
    progress: Callable[[], None] | None = None,
    begin_together: bool = False,
    patience: float | None = None,
    each_round: Callable[[Mapping[str, Measurement], Mapping[str, str]], None] | None = None,
) -> tuple[dict[str, Measurement], dict[str, str]]:
    """Run contenders in turn, A B C A B C ..., so that a machine whose speed drifts treats them alike.

    Each has a process of its own, begun by `spawn`: a script calls this under `if __name__ == "__main__":`. The first
    round is not counted; in it the memory is measured.

    Args:
        factories: Name to what builds the contender.
        rounds: Counted turns of each.
        seconds: Length of a turn at least, in steady state; None: a turn is a whole epoch from its beginning.
        optional: Contenders that may fail or die; they are left out, with the reason.
        together: All contenders share one process, for variants of one.
        progress: Called after each turn.
        begin_together: The uncounted turns of all contenders run at the same time, which saves their starts.
        patience: Seconds that a turn may take, the uncounted one, which has the start in it, five times as many; the
            process of a contender that takes longer is killed. None: any time.
        each_round: Called after each counted round with what is known so far, as it is returned in the end.

    Returns:
        The measurements, and what was left out with the reason of each.

    Raises:
        DiffuseMixError: A contender that is not optional failed.
    """
    turns: dict[str, list[_Turn]] = {name: [] for name in factories}
    left_out: dict[str, str] = {}

    def found() -> dict[str, Measurement]:
        done = {name: turns[name] for name in factories if name not in left_out and len(turns[name]) > 1}
        return {name: _measurement(taken) for name, taken in done.items()}

    with contextlib.ExitStack() as stack:
        if together:
            shared = stack.enter_context(_Process(factories))
            processes = dict.fromkeys(factories, shared)
        else:
            processes = {name: stack.enter_context(_Process({name: one})) for name, one in factories.items()}
        for turn in range(1 + rounds):
            at_once = begin_together and turn == 0
            limit = None if patience is None else patience * (5 if turn == 0 else 1)
            if at_once:
                for name, process in processes.items():
                    process.ask(name, seconds, watched=True)
            for name, process in processes.items():
                if name not in left_out:
                    try:
                        if not at_once:
                            process.ask(name, seconds, watched=turn == 0)
                        turns[name].append(process.answer(name, limit))
                    except DiffuseMixError as error:
                        if name not in optional:
                            raise
                        left_out[name] = str(error)
                        if not together:
                            process.dismiss()  # what it holds of the machine is not taken from the rest
                if progress is not None:
                    progress()
            if turn and each_round is not None:
                each_round(found(), dict(left_out))
        for process in processes.values():
            process.dismiss()
    return found(), left_out


def _measurement(turns: Sequence[_Turn]) -> Measurement:
    """What the turns gave, without the first, which is there for the memory."""
    return Measurement(
        images_per_second=tuple(turn.images / turn.seconds for turn in turns[1:]),
        cpu_seconds_per_image=tuple(turn.cpu_seconds / turn.images for turn in turns[1:]),
        peak_memory_mib=turns[0].peak_memory_mib,
    )


def machine() -> dict[str, Any]:
    """The processor, the cores this process may use, the GPU where there is one, versions and date."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found: dict[str, Any] = {
        "processor": next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), "unknown"),
        "cores": cpus(),
        "python": platform.python_version(),
        "versions": {},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found["versions"][package] = metadata.version(package)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {"name": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
    return found


# The whole ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A change that was tried, and its gain: images a second with it over those without, round by round."""

    setting: str  # what it changes: one change at most of each is advised
    change: str
    gains: tuple[float, ...]

    @property
    def gain(self) -> float:
        """The median gain."""
        return statistics.median(self.gains)

    @property
    def pays(self) -> bool:
        """Whether it is worth doing: at least 1.05 in the middle, and a gain in every round."""
        return self.gain >= _PAYS and min(self.gains) > 1

    def __str__(self) -> str:
        return f"{self.change}: {self.gain:.2f}x"

    def json(self) -> dict[str, Any]:
        """The change, its median gain, the lowest and the highest."""
        return {
            "change": self.change,
            "gain": round(self.gain, 3),
            "lowest": round(min(self.gains), 3),
            "highest": round(max(self.gains), 3),
        }


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """What `bench` found."""

    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    results: Mapping[str, Measurement]  # by contender
    left_out: Mapping[str, str] = field(default_factory=dict)  # contender to reason
    trials: tuple[Trial, ...] = ()

    @property
    def advice(self) -> tuple[Trial, ...]:
        """The changes that pay, the best for each setting, greatest gain first."""
        ranked = sorted((trial for trial in self.trials if trial.pays), key=lambda trial: -trial.gain)
        best: dict[str, Trial] = {}
        for trial in ranked:
            best.setdefault(trial.setting, trial)
        return tuple(best.values())

    def json(self) -> dict[str, Any]:
        """One object for machines: machine, settings, results, left_out, tried, advice."""
        return {
            "machine": dict(self.machine),
            "settings": dict(self.settings),
            "results": {name: measurement.json() for name, measurement in self.results.items()},
            "left_out": dict(self.left_out),
            "tried": [trial.json() for trial in self.trials],
            "advice": [trial.json() for trial in self.advice],
        }

    def lines(self) -> Iterator[str]:
        """For people: a table of at most 80 columns, what was tried, and what to change."""
        settings = self.settings
        yield from textwrap.wrap(
            f"{settings['images']} of {settings['originals']} images, {settings['size']} px, batches of "
            f"{settings['batch_size']}, {settings['num_workers']} workers, {settings['device']}, "
            f"{settings['rounds']} rounds",
            _COLUMNS,
        )
        if settings.get("undecodable"):
            yield f"{settings['undecodable']} left out: they cannot be decoded"
        yield ""
        yield f"{'':14}{'images/s':>9}{'lowest':>9}{'highest':>9}{'CPU ms/image':>14}{'MiB':>7}{'relative':>10}"
        first = next(iter(self.results), "")
        for name, measurement in self.results.items():
            row = measurement.json()
            memory = "-" if row["peak_memory_mib"] is None else f"{row['peak_memory_mib']:.0f}"
            ratio = row["images_per_second"] / self.results[first].json()["images_per_second"]
            yield (
                f"{name:14}{row['images_per_second']:9.0f}{row['lowest']:9.0f}{row['highest']:9.0f}"
                f"{row['cpu_seconds_per_image'] * 1e3:14.2f}{memory:>7}{ratio:9.2f}x"
            )
        for name, reason in self.left_out.items():
            yield from textwrap.wrap(f"{name} left out: {reason}", _COLUMNS, subsequent_indent="  ")
        yield ""
        yield f"Tried on {first}, each by itself:"
        for trial in self.trials:
            yield f"  {trial} ({min(trial.gains):.2f} to {max(trial.gains):.2f})"
        yield ""
        if not self.advice:
            yield "Advice: nothing to change"
        for trial in self.advice:
            yield f"Advice: {trial}"


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
    """Compare this loader with others on one's own images, and try what could make it faster.

    The contenders are `diffusemix` (every sample mixed that has an edit), `plain` (this loader, nothing mixed),
    `plain_dali`, `pillow_plain` and `pillow_mixed`; without edits the plain ones. Of a large folder a random sample is
    used, the same for all and for the same seed. Tried are other numbers of workers, other values of prefetch_factor
    and, where originals are much larger than a sample, packing them smaller.

    Call it under `if __name__ == "__main__":`, for contenders run in processes of their own.

    Args:
        root: The folder of originals, or a packed store.
        edits: The edit store.
        fractals: The fractal bank's file; needed with edits.
        batch_size: Samples per batch.
        num_workers: Threads, and DataLoader's workers; None: the cores there are.
        device: "cpu", "cuda" or "cuda:N".
        size: Pixels a side of a sample.
        rounds: Counted turns of each contender.
        seconds: Length of a turn, at least; half of that for what is tried.
        images: Originals used at most; 32 batches at least.
        seed: Of the sample and of the crops.
        progress: Called with the turns done and the turns there are.

    Raises:
        ConfigError: An argument breaks its rule.
        CatalogError, StoreError: The originals, edits or fractals cannot be used.
        MissingDependencyError: DALI, or what the device needs, is missing.
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
            raise ConfigError(f"{name} must be at least 1, found {value}; give a greater one or leave it out.")
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"device must be 'cpu', 'cuda' or 'cuda:N', found {device!r}; leave it out to have 'cpu'.")
    if not 0 < seconds < math.inf:
        raise ConfigError(f"seconds must be greater than 0, found {seconds}; leave it out to have 1.")
    if (edits is None) != (fractals is None):
        given, lacking = ("edits", "fractals") if fractals is None else ("fractals", "edits")
        raise ConfigError(f"edits and fractals must be given together, found {given} alone; give {lacking} too.")
    dali()
    dataset = DiffuseMixDataset(root, edits=edits, fractals=fractals, crop=TrainCrop(size), seed=seed)
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
        rows = _rows(len(dataset), max(images, _LEAST_BATCHES * batch_size), seed)
        rows, undecodable = _decodable(dataset, rows)
        if len(rows) < len(dataset):
            material = _sampled(material, dataset, rows, Path(scratch) / "sample", epoch=len(dataset))
        if dataset.original_store is not None:
            material = replace(material, files=extract(dataset.original_store, rows.tolist(), Path(scratch) / "files"))

        mixed = edits is not None
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
        changes = _changes(material, mixed) + _packing(material, dataset, rows, Path(scratch) / "packing", mixed)
        variants = _contenders(changes)
        done, total = 0, (1 + rounds) * (len(contenders) + len(variants))

        def step() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)

        others = [name for name in contenders if name not in _OURS]
        results, left_out = interleaved(contenders, rounds=rounds, seconds=seconds, optional=others, progress=step)
        tried, _ = interleaved(variants, rounds=rounds, seconds=seconds / 2, together=True, progress=step)
    settings = {
        "root": str(root),
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
        machine=machine(), settings=settings, results=results, left_out=left_out, trials=tuple(_trials(changes, tried))
    )


def _rows(count: int, most: int, seed: int) -> NDArray[np.int64]:
    """A random choice of so many rows at most, in order."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))


def _decodable(dataset: DiffuseMixDataset, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """Of some originals those that can be decoded, for all contenders alike, and how many cannot.

    Whatever is in order by its structure is not decoded here.
    """
    suspect: list[int] = []
    for start in range(0, len(rows), _READ):
        some = rows[start : start + _READ]
        packed = dataset.original_store
        places: Sequence[Location] = (
            [os.fsencode(dataset.path_of(row)) for row in some.tolist()] if packed is None else packed.extents(some)
        )
        found = read(places, np.zeros((len(some), 4), dtype=np.int32), dataset.catalog.sizes[some])
        suspect += some[~found.safe].tolist()

    def fails(row: int) -> bool:
        try:
            dataset.decode_original(row)
        except DecodeError:
            return True
        return False

    with ThreadPoolExecutor(cpus()) as pool:
        failed = [row for row, failing in zip(suspect, pool.map(fails, suspect), strict=True) if failing]
    if len(failed) == len(rows):
        raise DataError(
            f"root must have images that can be decoded, found none among {len(rows)} of {str(dataset.root)!r}, such "
            f"as {dataset.path_of(failed[0])!r}; restore them, or give another folder."
        )
    return np.setdiff1d(rows, failed), len(failed)


def _sampled(
    material: Material, dataset: DiffuseMixDataset, rows: NDArray[np.int64], folder: Path, *, epoch: int
) -> Material:
    """The same of some originals, in epochs of at least `epoch` samples."""
    catalog, edits = _sample(dataset, rows, folder)
    return replace(material, catalog=catalog, edits=edits, epochs=-(-epoch // len(rows)))


@dataclass(frozen=True, kw_only=True)
class _Change:
    """A change to try: this package's loader with it, and without."""

    setting: str
    change: str
    before: str  # the name of `without` among the contenders
    without: Factory
    with_it: Factory


def _changes(material: Material, mixed: bool) -> list[_Change]:
    """Other numbers of workers, and of batches ahead."""
    now, cores, base = material.num_workers, cpus(), partial(diffusemix, material, mixed=mixed)
    variants: list[tuple[str, int, int, Factory]] = [
        ("num_workers", count, now, partial(diffusemix, replace(material, num_workers=count), mixed=mixed))
        for count in sorted({max(1, cores // 2), cores} - {now})
    ]
    variants += [("prefetch_factor", ahead, 2, partial(base, prefetch_factor=ahead)) for ahead in (1, 4)]
    return [
        _Change(
            setting=name, change=f"{name}={value} instead of {old}", before="as it is", without=base, with_it=variant
        )
        for name, value, old, variant in variants
    ]


def _contenders(changes: Sequence[_Change]) -> dict[str, Factory]:
    """What has to run to try these changes."""
    return {one.before: one.without for one in changes} | {one.change: one.with_it for one in changes}


def _trials(changes: Sequence[_Change], found: Mapping[str, Measurement]) -> Iterator[Trial]:
    """The gains, round by round."""
    for one in changes:
        pairs = zip(found[one.change].images_per_second, found[one.before].images_per_second, strict=True)
        yield Trial(setting=one.setting, change=one.change, gains=tuple(after / before for after, before in pairs))


def _packing(
    material: Material, dataset: DiffuseMixDataset, rows: NDArray[np.int64], folder: Path, mixed: bool
) -> list[_Change]:
    """Packing, as they are and to a smaller size, tried on some originals; nothing where they are packed already."""
    if dataset.original_store is not None:
        return []
    side = 10 * math.ceil(material.size * 16 / 9 / 10)  # 400 for 224: a random crop's pixels are seldom enlarged
    longest = dataset.catalog.sizes[rows].max(axis=1)
    sides = (None, side) if np.median(longest) >= 1.2 * side else (None,)
    chosen = rows[_rows(len(rows), _PACKED, material.seed)]
    some = _sampled(material, dataset, chosen, folder, epoch=_LEAST_BATCHES * material.batch_size)
    assert some.catalog is not None
    changes = []
    for most in sides:
        name = "pack, the same pixels" if most is None else f"pack --max-side {most}"
        store = folder / f"packed-{most}"
        pack(material.root, store, PackConfig(max_side=most), catalog=Catalog.open(some.catalog))
        packed = replace(some, root=store, catalog=None)  # its own catalog has the sizes in there
        changes.append(
            _Change(
                setting=name,
                change=f"{name} (on {len(chosen)} of your originals)",
                before="not packed",
                without=partial(diffusemix, some, mixed=mixed),
                with_it=partial(diffusemix, packed, mixed=mixed),
            )
        )
    return changes
