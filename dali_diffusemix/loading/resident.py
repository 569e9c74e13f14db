"""Resident stores: raw images that stay in memory, so that a batch is its plan and one call.

    host     one copy for all processes of a machine: anonymous memory that the first of them fills and seals, and the
             others find through /proc; it is gone with the last of them, however they end
    device   one copy in the memory of a GPU

A shard lies in memory as it lies on disk. Each is checked against its SHA-256 on the way; the images of a damaged one
cannot be made, as if it could not be read.
"""

import hashlib
import logging
import mmap
import os
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Final, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from dali_diffusemix.base.cpus import cpus
from dali_diffusemix.base.files import locked, write
from dali_diffusemix.base.memory import free_memory
from dali_diffusemix.base.workers import Workers
from dali_diffusemix.errors import ConfigError, DecodeError, StoreError
from dali_diffusemix.loading.dataset import DiffuseMixDataset
from dali_diffusemix.loading.pieces import Pieces, Shares, joined, sizes_of
from dali_diffusemix.mix.call import piece_table
from dali_diffusemix.plan.batch import BatchPlan
from dali_diffusemix.plan.windows import visible_parts
from dali_diffusemix.store import EditStore, OriginalStore, RawShards
from dali_diffusemix.store.mirror import MirrorError

_log = logging.getLogger(__name__)

Resident: TypeAlias = Literal["host", "device"]
Store: TypeAlias = EditStore | OriginalStore

_SHARE: Final = 0.9  # of the free memory that stores may take
_CHUNK: Final = 1 << 22  # bytes read at once


def check(resident: object, device: torch.device, datasets: Iterable[DiffuseMixDataset]) -> None:
    """Raise ConfigError unless these datasets can be resident there."""
    if resident is None:
        return
    if resident not in ("host", "device"):
        raise ConfigError(f"resident must be 'host', 'device' or None, found {resident!r}.")
    if resident == "device" and device.type != "cuda":
        raise ConfigError(f"resident='device' is the memory of a GPU, found device={str(device)!r}; give 'host'.")
    for dataset in datasets:
        if dataset.original_store is None or not dataset.original_store.raw:
            raise ConfigError(
                f"resident={resident!r} needs raw images, found {str(dataset.root)!r}, whose images must be decoded; "
                f"run `dali-diffusemix pack {dataset.root} STORE --format raw`, and give the dataset STORE."
            )
        for store in dataset.stores:
            if not store.raw:
                raise ConfigError(
                    f"resident={resident!r} needs raw images, found edits in {str(store.path)!r}, which must be "
                    f"decoded; run `dali-diffusemix pack {store.path} STORE --format raw`, and give edits=STORE."
                )


class Residents:
    """The stores of a loader's datasets in memory.

    Args:
        datasets: Theirs.
        device: The GPU that holds them; None is the host. Tests use the CPU in place of a GPU.
        windows: Pieces are the rows that samples show, to be copied elsewhere; else whole images.

    Raises:
        ConfigError: There is not enough memory; the message has the bytes needed and free.
        MirrorError: The URL of a store does not answer.
    """

    def __init__(
        self, datasets: Iterable[DiffuseMixDataset], device: torch.device | None, *, windows: bool = False
    ) -> None:
        self._on_host = device is None
        self._windows = windows
        self._memories: dict[int, _Memory] = {}  # by the identity of a store's shards
        make = _HostMemory.of if device is None else partial(_DeviceMemory.of, device)
        for store in chain.from_iterable(dataset.stores for dataset in datasets):
            if id(store.raw_shards) not in self._memories:
                self._memories[id(store.raw_shards)] = make(store.raw_shards)

    def request(self, shares: Shares) -> Pieces:
        """The pieces of the rows of one or several datasets."""
        return joined([self._pieces(dataset, plan) for dataset, plan in shares])

    def _pieces(self, dataset: DiffuseMixDataset, plan: BatchPlan) -> Pieces:
        sizes = sizes_of(dataset, plan)
        data, failed = np.zeros((2, len(plan)), dtype=np.uint64), dict[tuple[int, int], DecodeError]()
        mixed = np.flatnonzero(plan.mixed)
        for row, (store, samples, images) in enumerate(
            (
                (dataset.original_store, np.arange(len(plan)), plan.original),
                (dataset.store, mixed, plan.edit[mixed]),
            )
        ):
            if store is None or not len(samples):
                continue
            found, errors = self._memories[id(store.raw_shards)].addresses(store, images)
            data[row, samples] = found
            failed |= {(row, int(samples[i])): error for i, error in errors.items()}
        table = piece_table(data, sizes)
        if failed or self._windows:
            windows = visible_parts(plan, sizes)
            top, height = windows[..., 0], windows[..., 2] - windows[..., 0]
            failed = {place: error for place, error in failed.items() if height[place] > 0}
            if self._windows:
                table["data"] += (top.astype(np.uint64) * 3 * sizes[..., 1].astype(np.uint64)) * (table["data"] != 0)
                table["data"][height == 0] = 0
                table["top"], table["height"] = top, height
        pieces = Pieces(locations=(), table=table, errors=failed, owners=list(self._memories.values()))
        pieces.on_host[:] = self._on_host
        return pieces


_in_this_process: weakref.WeakValueDictionary[str, "_Memory"] = weakref.WeakValueDictionary()


class _Memory:
    """A store's shards in memory.

    Args:
        starts: Shard to the address where it begins.
        errors: Why the images of other shards cannot be made.
    """

    def __init__(self, starts: dict[int, int], errors: dict[int, DecodeError]) -> None:
        self._errors = errors
        self._starts = np.zeros(max([*starts, *errors], default=0) + 1, dtype=np.uint64)
        self._starts[list(starts)] = list(starts.values())

    def addresses(self, store: Store, images: NDArray[np.int64]) -> tuple[NDArray[np.uint64], dict[int, DecodeError]]:
        """(n,) the address of the first pixel of each image, 0 for those that cannot be made; and why, by position."""
        found = store.places(images)
        shards = np.where((found.shards >= 0) & (found.shards < len(self._starts)), found.shards, 0)
        starts = self._starts[shards]
        usable = (found.shards >= 0) & (starts != 0)
        errors = dict(found.errors)
        usable[list(errors)] = False
        for i in np.flatnonzero(~usable).tolist():
            errors.setdefault(i, self._errors.get(int(found.shards[i])) or DecodeError("its shard is not in memory"))
        return np.where(usable, starts + found.offsets.astype(np.uint64), 0).astype(np.uint64), errors


def _contents(shards: RawShards, number: int) -> Iterator[tuple[int, memoryview]]:
    """A shard's tar, in parts with their offsets. Raises StoreError if it is missing or not what was written."""
    file, digest, size = shards.open(number), hashlib.sha256(), shards.sizes[number]
    buffer = memoryview(bytearray(min(_CHUNK, size)))
    for begin in range(0, size, _CHUNK):
        part = buffer[: min(_CHUNK, size - begin)]
        try:
            if os.preadv(file.descriptor, [part], begin) < len(part):
                raise shards.damaged(number, "ends early")
        except OSError as error:
            raise shards.damaged(number, f"cannot be read ({error.strerror})") from error
        digest.update(part)
        yield begin, part
    if digest.hexdigest() != shards.sha256(number):
        raise shards.damaged(number, "has changed: its SHA-256 differs")


def _copied(shards: RawShards, number: int, write: Callable[[int, memoryview], object]) -> DecodeError | None:
    """Have all parts of a shard written; returns what is wrong with it."""
    try:
        for begin, part in _contents(shards, number):
            write(begin, part)
    except MirrorError:
        raise  # the shard may be fine
    except StoreError as error:
        _log.warning("%s", error)
        return DecodeError(str(error))
    return None


def _check_room(shards: RawShards, free: int, where: str) -> None:
    if shards.bytes > _SHARE * free:
        raise ConfigError(
            f"resident: {shards.where} needs {shards.bytes} bytes ({shards.bytes / 1e9:.2f} GB) of {where}, of whose "
            f"{free} free bytes ({free / 1e9:.2f} GB) at most {_SHARE:.0%} are taken; leave resident out, pack smaller "
            "images (--max-side), or make room."
        )


# Host ---------------------------------------------------------------------------------------------------------------


class _HostMemory(_Memory):
    """A store in anonymous memory that all processes of this user on this machine share.

    The process that comes first makes a file in memory (memfd), fills and seals it: nobody can change or cut it any
    more. Those that come later open the same file through /proc/PID/fd of any process that has it. A small file in the
    folder for temporary files lists these. The memory is gone when no process has it any more.
    """

    def __init__(self, shards: RawShards, descriptor: int, errors: dict[int, DecodeError]) -> None:
        self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        pixels = np.frombuffer(self._map, dtype=np.uint8)
        base = pixels.ctypes.data
        usable = {number: base + begin for number, begin in shards.starts.items() if number not in errors}
        super().__init__(usable, errors)
        self._owner = pixels
        self._end = weakref.finalize(self, os.close, descriptor)

    @classmethod
    def of(cls, shards: RawShards) -> _Memory:
        """The memory of these shards; made if no process has it."""
        key = shards.key
        memory = _in_this_process.get(key)
        if memory is None:
            descriptor, errors = _shared(key, shards)
            memory = _in_this_process[key] = cls(shards, descriptor, errors)
        return memory


def _shared(key: str, shards: RawShards) -> tuple[int, dict[int, DecodeError]]:
    """The descriptor of the memory of some shards, and those that are damaged."""
    folder = Path(tempfile.gettempdir()) / f"dali-diffusemix-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    name, lock, listing = f"dali_diffusemix-{key[:32]}", folder / "resident.lock", folder / "resident"
    byte = 1 + int(key[:12], 16)  # of the lock: who fills one store does not keep others from theirs
    with locked(lock, range(byte, byte + 1)):
        for process, number in _holders(listing, name):
            if (descriptor := _opened(process, number, name)) is not None:
                break
        else:
            descriptor = _made(name, shards)
        with locked(lock, range(1)):
            lines = [
                " ".join(map(str, line)) for line in _lines(listing) if Path(f"/proc/{line[1]}/fd/{line[2]}").exists()
            ]
            write(listing, "\n".join([*lines, f"{name} {os.getpid()} {descriptor}", ""]).encode(), durable=False)
    return descriptor, _errors_in(shards, descriptor)


def _lines(listing: Path) -> list[tuple[str, int, int]]:
    """(name, process, descriptor) of memory that processes had; some may have ended."""
    with suppress(OSError, ValueError):
        lines = map(str.split, listing.read_text().splitlines())
        return [(name, int(process), int(number)) for name, process, number in lines]
    return []


def _holders(listing: Path, name: str) -> list[tuple[int, int]]:
    """(process, descriptor) of those that had the memory of this name."""
    return [(process, number) for found, process, number in _lines(listing) if found == name]


def _opened(process: int, number: int, name: str) -> int | None:
    """Open the memory of another process; None if that has none of this name, is another user's or not whole."""
    try:
        path = Path(f"/proc/{process}/fd/{number}")
        if name not in str(path.readlink()):
            return None
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    if os.fstat(descriptor).st_uid != os.getuid() or not _is_sealed(descriptor):
        os.close(descriptor)
        return None
    return descriptor


def _seal(descriptor: int) -> None:
    """Keep everybody from changing or cutting memory, for good."""
    import fcntl  # Linux only, as the rest

    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)


def _is_sealed(descriptor: int) -> bool:
    import fcntl

    return bool(fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE)


def _made(name: str, shards: RawShards) -> int:
    """Make the memory of some shards, and behind them a byte for each that is damaged."""
    _check_room(shards, free_memory(), "memory")
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, shards.bytes + len(shards.starts))

        def copy(number: int) -> bool:
            begin = shards.starts[number]
            return _copied(shards, number, lambda at, part: os.pwrite(descriptor, part, begin + at)) is not None

        with Workers(cpus(), "dali-diffusemix-resident") as threads:
            flags = bytes(threads.map(copy, shards.starts))
        os.pwrite(descriptor, flags, shards.bytes)
        _seal(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _errors_in(shards: RawShards, descriptor: int) -> dict[int, DecodeError]:
    flags = os.pread(descriptor, len(shards.starts), shards.bytes)
    return {
        number: DecodeError(str(shards.damaged(number, "was damaged when it was read into memory")))
        for number, flag in zip(shards.starts, flags, strict=True)
        if flag
    }


# Device -------------------------------------------------------------------------------------------------------------


class _DeviceMemory(_Memory):
    """A store in the memory of a GPU, once in a process."""

    def __init__(self, shards: RawShards, device: torch.device) -> None:
        self._pixels = torch.empty(shards.bytes, dtype=torch.uint8, device=device)
        errors: dict[int, DecodeError] = {}
        for number, begin in shards.starts.items():

            def write(offset: int, part: memoryview, begin: int = begin) -> None:
                # Copied before the buffer is used again: memory that is not page-locked is waited for.
                there = self._pixels[begin + offset : begin + offset + len(part)]
                there.copy_(torch.from_numpy(np.frombuffer(part, dtype=np.uint8)))

            if (error := _copied(shards, number, write)) is not None:
                errors[number] = error
        base = self._pixels.data_ptr()
        super().__init__(
            {number: base + begin for number, begin in shards.starts.items() if number not in errors}, errors
        )

    @classmethod
    def of(cls, device: torch.device, shards: RawShards) -> _Memory:
        """The memory of these shards on a device; made if this process has none."""
        key = f"{shards.key} {device}"
        memory = _in_this_process.get(key)
        if memory is None:
            if device.type == "cuda":
                _check_room(shards, torch.cuda.mem_get_info(device)[0], f"the memory of {device}")
            memory = _in_this_process[key] = cls(shards, device)
        return memory


class PiecesOnDevice:
    """Takes the place of a `PieceDecoder`: nothing is read or decoded, so pieces are made when they are fetched."""

    inherited = False
    intact = True

    def __init__(self) -> None:
        self._coming: deque[Callable[[], Pieces]] = deque()

    def submit(self, make: Callable[[], Pieces]) -> None:
        """Take a batch's pieces, to be made."""
        self._coming.append(make)

    def fetch(self, stream: int | None = None, timeout: float = 0) -> Pieces:
        """Make the oldest batch's."""
        return self._coming.popleft()()

    def decode_now(self, pieces: Pieces) -> Pieces:
        """They are there."""
        return pieces

    def seconds(self) -> tuple[float, float]:
        """Of reading and decoding."""
        return 0.0, 0.0

    def close(self) -> None:
        """Forget what was submitted."""
        self._coming.clear()
