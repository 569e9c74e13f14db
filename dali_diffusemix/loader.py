"""The loader: DataLoader's place in the training loop, with DALI decoding and one call per batch mixing.

plan ──> sources ──> DALI, some batches ahead ──> pieces ──> one mix call ──> tensors
"""

import math
import os
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Final, Self

import numpy as np
import torch
from numpy.typing import NDArray

from dali_diffusemix import gpu
from dali_diffusemix.dataset import DiffuseMixDataset
from dali_diffusemix.errors import ConfigError
from dali_diffusemix.mixing import DtypeName, TensorFormat, mix, mix_on_device, piece_table
from dali_diffusemix.philox import check_seed
from dali_diffusemix.pipeline import Decoded, PieceDecoder, Sources
from dali_diffusemix.plan import BatchPlan, Schedule, visible_parts
from dali_diffusemix.reading import Place

_DTYPES: Final[dict[torch.dtype, DtypeName]] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.uint8: "uint8",
}


class DiffuseMixLoader:
    """Iterates over batches of a `DiffuseMixDataset`: (images, labels) as PyTorch tensors on the device.

    The first `iter()` is epoch 0, each later one the next, unless `set_epoch` was called since. Two iterators at once
    are independent. The same (seed, epoch, index) gives the same sample as under `torch.utils.data.DataLoader`,
    whatever the batch size and the number of threads.

    Args:
        dataset: What to load. It decides every sample; the loader only how it is delivered.
        batch_size: Samples per batch.
        shuffle: Go through each epoch in an order of its own.
        num_workers: Threads that decode and mix; there are no worker processes. 0 is one thread.
        device: Where decoding and mixing are done and the tensors lie: "cuda" (the current GPU at the first `iter`),
            "cuda:N" or "cpu". On a GPU batches are ordered on torch's current stream, and nothing waits for it.
        dtype: float32, float16, bfloat16 or uint8 (which needs a dataset with normalize=None).
        memory_format: torch.contiguous_format or torch.channels_last.
        drop_last: Leave out a last batch that is not full.
        prefetch_factor: Batches that are decoded ahead.
        visible_parts: Decode of each image only what its sample shows; False decodes whole images, for comparison.

    Raises:
        ConfigError: an argument breaks a rule.
        MissingDependencyError: what the device needs is not installed; from `iter()`, DALI or a GPU is missing.
        DecodeError: from `next()`, where an image cannot be decoded; names the file.
    """

    def __init__(
        self,
        dataset: DiffuseMixDataset,
        batch_size: int = 1,
        shuffle: bool = False,
        *,
        num_workers: int = 0,
        device: str | torch.device = "cuda",
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
        drop_last: bool = False,
        prefetch_factor: int = 2,
        visible_parts: bool = True,
    ) -> None:
        if not isinstance(dataset, DiffuseMixDataset):
            raise ConfigError(
                f"dataset must be a DiffuseMixDataset, found {type(dataset).__name__}. Instead of it write\n"
                '    dataset = DiffuseMixDataset("path/to/train", crop=TrainCrop(224), mix=None)\n'
                "    loader = DiffuseMixLoader(dataset, batch_size=...)\n"
                "or keep torch.utils.data.DataLoader for datasets of other kinds"
            )
        if torch.device(device).type not in ("cuda", "cpu"):
            raise ConfigError(f"device must be 'cuda', 'cuda:N' or 'cpu', found {str(device)!r}")
        if torch.device(device).type == "cuda":
            gpu.check_installed()
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, found {dtype}")
        if memory_format not in (torch.contiguous_format, torch.channels_last):
            raise ConfigError(
                f"memory_format must be torch.contiguous_format or torch.channels_last, found {memory_format}"
            )
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("prefetch_factor", prefetch_factor, 1),
        ):
            if value < least:
                raise ConfigError(f"{name} must be at least {least}, found {value}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.num_workers = num_workers
        self.device = torch.device(device)
        self.dtype = dtype
        self.memory_format = memory_format
        self.drop_last = drop_last
        self.prefetch_factor = prefetch_factor
        self.visible_parts = visible_parts
        self._format = TensorFormat(
            dtype=_DTYPES[dtype],
            channels_last=memory_format is torch.channels_last,
            normalize=dataset.normalize,
        )
        self._schedule = Schedule(
            length=len(dataset), batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, seed=dataset.seed
        )
        self._next_epoch = 0
        # Decoders that no iterator uses: building one takes longer than a batch.
        self._idle: list[PieceDecoder] = []
        self._bank: gpu.DeviceBank | None = None
        self._retained = gpu.Retained()
        self._memory = _Memory()

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._schedule)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next `iter()`; those after it go on from there."""
        check_seed(self.dataset.seed, epoch)
        self._next_epoch = epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        device = self._current_device()
        epoch = self._next_epoch
        self._next_epoch = epoch + 1
        return self._batches(epoch, device)

    def _current_device(self) -> torch.device:
        """The device with its number. CUDA is touched here, at the first `iter`, and not before."""
        if self.device.type == "cuda":
            gpu.check_available()
            if ":" not in str(self.device):
                self.device = torch.device("cuda", torch.cuda.current_device())
        return self.device

    def _batches(self, epoch: int, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        decoder = self._idle.pop() if self._idle else self._new_decoder(device)
        plans: deque[BatchPlan] = deque()
        submitted = 0
        try:
            for step in range(len(self)):
                # As many batches again are read ahead as are decoded ahead.
                while submitted < min(len(self), step + 1 + 2 * self.prefetch_factor):
                    plans.append(self._plan(epoch, submitted))
                    decoder.submit(self._sources(plans[-1]))
                    submitted += 1
                plan = plans.popleft()
                labels = torch.from_numpy(self.dataset.labels_of(plan))
                if device.type == "cpu":
                    yield self._mix(plan, *decoder.fetch()), labels
                else:
                    with torch.cuda.device(device):
                        stream = torch.cuda.current_stream(device).cuda_stream
                        batch = self._mix_on_device(plan, *decoder.fetch(stream)), _to_device(labels, device)
                    yield batch
        finally:
            decoder.drain()
            self._idle.append(decoder)

    def _new_decoder(self, device: torch.device) -> PieceDecoder:
        sizes = self.dataset.catalog.sizes
        height, width = sizes[np.argmax(sizes.astype(np.int64).prod(axis=1))].tolist()
        return PieceDecoder(
            self.batch_size,
            threads=self._threads,
            device=device.index,
            ahead=1 + self.prefetch_factor,
            largest=(height, width),
        )

    @property
    def _threads(self) -> int:
        return max(1, self.num_workers)

    def _plan(self, epoch: int, step: int) -> BatchPlan:
        places = self._schedule.places(step)
        return self.dataset.planner.batch(epoch, self._schedule.indices(epoch, places))

    def _sources(self, plan: BatchPlan) -> Sources:
        dataset, store = self.dataset, self.dataset.store
        original_sizes = np.asarray(dataset.catalog.sizes[plan.original])
        edit_sizes = np.zeros_like(original_sizes)
        if store is not None and plan.mixed.any():
            edit_sizes[plan.mixed] = store.sizes(plan.edit[plan.mixed])
        if self.visible_parts:
            windows = visible_parts(plan, original_sizes, edit_sizes)
        else:
            whole = [np.concatenate([np.zeros_like(sizes), sizes], axis=1) for sizes in (original_sizes, edit_sizes)]
            windows = whole[0], whole[1]
        return Sources(
            originals=self._originals(plan.original),
            edits=self._edits(plan.edit),
            original_windows=windows[0],
            edit_windows=windows[1],
            original_sizes=original_sizes,
            edit_sizes=edit_sizes,
        )

    def _originals(self, rows: NDArray[np.int64]) -> Sequence[Place | None]:
        packed, catalog = self.dataset.original_store, self.dataset.catalog
        if packed is not None:
            return packed.extents(rows)
        root = os.fsencode(self.dataset.root)
        return [root + b"/" + catalog.encoded_path(row) for row in rows.tolist()]

    def _edits(self, rows: NDArray[np.int64]) -> Sequence[Place | None]:
        places: list[Place | None] = [None] * len(rows)
        if self.dataset.store is not None:
            mixed = np.flatnonzero(rows >= 0)
            for row, place in zip(mixed.tolist(), self.dataset.store.extents(rows[mixed]), strict=True):
                places[row] = place
        return places

    def _mix(self, plan: BatchPlan, originals: Decoded, edits: Decoded) -> torch.Tensor:
        self._raise_first_error(plan, originals, edits)
        buffer = self._memory.take(self._format.shape(len(plan), plan.output_size), self._format.storage)
        bank = self.dataset.bank
        mix(
            plan,
            _pieces(originals, plan),
            _pieces(edits, plan),
            None if bank is None else bank.images,
            out=buffer,
            format=self._format,
            threads=self._threads,
        )
        images = torch.from_numpy(buffer).view(self.dtype)
        return images.permute(0, 3, 1, 2) if self._format.channels_last else images

    def _mix_on_device(self, plan: BatchPlan, originals: Decoded, edits: Decoded) -> torch.Tensor:
        self._raise_first_error(plan, originals, edits)
        shape = (len(plan), 3, *plan.output_size)
        images = torch.empty(shape, dtype=self.dtype, device=self.device, memory_format=self.memory_format)
        mix_on_device(
            plan,
            _pieces(originals, plan),
            _pieces(edits, plan),
            self._device_bank(),
            out=images,
            format=self._format,
        )
        self._retained.add((originals.owner, edits.owner), self.device)
        return images

    def _device_bank(self) -> gpu.DeviceBank | None:
        bank = self.dataset.bank
        if bank is not None and self._bank is None:
            self._bank = gpu.device_bank(bank.path or bank, bank.images, self.device)
        return self._bank

    def _raise_first_error(self, plan: BatchPlan, originals: Decoded, edits: Decoded) -> None:
        for kind, decoded in (("original", originals), ("edit", edits)):
            for row, error in decoded.errors.items():
                error.add_note(
                    f"{kind} of sample {plan.index[row]} of epoch {plan.epoch}: "
                    f"{self.dataset.path_of(int(plan.original[row]))}"
                )
                raise error

    def close(self) -> None:
        """Give the decoders' threads and memory back. The loader can be used again; iterators in progress go on."""
        self._retained.wait()
        self._memory = _Memory()
        while self._idle:
            self._idle.pop().close()
        self._bank = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_idle": [], "_bank": None, "_retained": gpu.Retained(), "_memory": _Memory()}


def _to_device(labels: torch.Tensor, device: torch.device) -> torch.Tensor:
    return labels.pin_memory().to(device, non_blocking=True)


def _pieces(decoded: Decoded, plan: BatchPlan) -> NDArray[np.void]:
    return piece_table(decoded.data, decoded.shapes, plan.box, places=decoded.places, image_sizes=decoded.image_sizes)


class _Memory:
    """Memory for batches on the CPU, used again once nobody holds the batch: fresh pages cost time.

    A batch's tensor, and whatever shares its storage, keeps the array that it was made of. When that array goes, its
    memory comes back here, so a batch that somebody keeps is never overwritten.
    """

    _KEPT = 4  # blocks that lie idle at most

    def __init__(self) -> None:
        self._idle: list[NDArray[np.uint8]] = []

    def take(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
        """An array of this shape and type, its content undefined."""
        size = math.prod(shape) * dtype.itemsize
        block = self._idle.pop() if self._idle else None
        if block is None or block.nbytes < size:
            block = np.empty(size, dtype=np.uint8)
        array: NDArray[np.generic] = block[:size].view(dtype).reshape(shape)
        weakref.finalize(array, self._give_back, block).atexit = False
        return array

    def _give_back(self, block: NDArray[np.uint8]) -> None:
        if len(self._idle) < self._KEPT:
            self._idle.append(block)
