"""The worker: makes one shard.

    original --decode, upright--> RGB --to the editor's size--> editor, all prompts at once --> quality --JPEG--> shard

While the editor works on one batch of originals, the next batch is read, and the edits of the previous one are judged
and encoded.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dali_diffusemix.base.workers import Result, Workers
from dali_diffusemix.catalog.table import Catalog
from dali_diffusemix.errors import DecodeError, WorkerError
from dali_diffusemix.generate import quality
from dali_diffusemix.generate.config import GenerateConfig
from dali_diffusemix.generate.editors import Editor, EditTask
from dali_diffusemix.generate.originals import Originals
from dali_diffusemix.images.codec import encode_as
from dali_diffusemix.store import (
    DENIED,
    NOT_YET,
    REJECTIONS,
    BegunShard,
    EditKey,
    Shard,
    ShardWriter,
)
from dali_diffusemix.store.layout import ACCEPTED, UNREADABLE, Header

_log = logging.getLogger(__name__)


# Seeds of an edit in one round: more than the attempts that `retry` allows.
_ATTEMPTS: Final = 128


def edit_seed(seed: int, path: bytes, prompt: str, variant: int, attempt: int = 0) -> int:
    """An edit's seed, 0 ≤ seed < 2⁶⁴: a function of the arguments alone, so that new files change no seed.

    The first 8 bytes, little-endian, of SHA-256 over the store's seed, the original's relative path, the prompt, the
    variant and, for retries, the attempt; numbers in decimal, all joined by NUL. Edits that are made again count their
    attempts from 128 times their round.
    """
    parts = [str(seed).encode(), path, prompt.encode("utf-8", "surrogateescape"), str(variant).encode()]
    parts += [str(attempt).encode()] if attempt else []
    return int.from_bytes(hashlib.sha256(b"\0".join(parts)).digest()[:8], "little")


@dataclass(frozen=True, kw_only=True)
class ShardProgress:
    """The state of a shard while it is made."""

    shard: int
    verdicts: Counter[str]  # of its edits so far, including those of an earlier run
    rejected: Counter[str]  # prompt to edits that quality rejected
    closed: bool = False  # its files are written, with these edits


@dataclass(frozen=True, kw_only=True)
class _Made:
    """An edit that is ready to be stored."""

    file: bytes
    height: int
    width: int
    verdict: str
    score: float


@dataclass(kw_only=True)
class _Edit:
    """An edit of a batch, made or not."""

    key: EditKey
    image: int | None  # index into the batch's images; None: the original cannot be read
    seed: int
    made: _Made | None = None  # None: not made yet, or not to be made


@dataclass(frozen=True, kw_only=True)
class _EditBatch:
    """Some originals of a shard with their edits, which are judged while the editor makes the next batch."""

    images: Sequence[NDArray[np.uint8]]
    edits: Sequence[_Edit]  # in the order of the shard
    making: Sequence[tuple[_Edit, Result[_Made]]]


class ShardWorker:
    """Makes shards, one at a time, with one editor for all of them."""

    def __init__(self, root: Path, store: Path, config: GenerateConfig, stop: Path, device: str) -> None:
        """When the file `stop` appears, the run is to stop."""
        self._root = root
        self._store = store
        self._config = config
        self._stop = stop
        if self._is_stopped():
            return  # a model may take minutes to load
        self._header = Header.read(store)  # all prompts of the store, its rules and class names
        prompts = self._header.prompts
        self._editor: Editor = config.editor_config.load(prompts, device=device, batch_size=config.batch_size)
        self._catalog = Catalog.open(store / "catalog")
        self._originals = Originals(root, self._catalog)
        # On CPUs each worker has one; beside a GPU some are free.
        self._threads = 1 if device == "cpu" else 4
        self._wanted = self._header.wanted(self._catalog.classes)

    def __call__(self, shard: Shard) -> Iterator[ShardProgress]:
        """Make one shard, or a part of it if the run is stopped; yields its state after each batch.

        Raises:
            WorkerError: The editor's server is gone; the shard is closed with the edits that were made before.
        """
        if self._is_stopped():
            return
        verdicts: Counter[str] = Counter()
        rejected: Counter[str] = Counter()
        begun = BegunShard.find(self._store, shard)
        threads = Workers(self._threads, "dali-diffusemix-generate")
        gone: WorkerError | None = None
        with ShardWriter(self._store, self._catalog, shard) as writer, threads:
            if begun is not None:
                verdicts += begun.copy(writer)
            try:
                for batch in self._batches(shard, 0 if begun is None else begun.originals, threads):
                    for edit in batch.edits:
                        verdict = self._add(writer, edit)
                        verdicts[verdict] += 1
                        if verdict in REJECTIONS:
                            rejected[self._header.prompts[edit.key.prompt]] += 1
                    yield ShardProgress(shard=shard.number, verdicts=verdicts.copy(), rejected=rejected.copy())
            except WorkerError as error:
                if not verdicts:
                    raise
                gone = error
            self._leave(writer, shard, verdicts.total())
        yield ShardProgress(shard=shard.number, verdicts=verdicts.copy(), rejected=rejected.copy(), closed=True)
        if gone is not None:
            raise gone

    def _is_stopped(self) -> bool:
        return self._stop.exists()

    def _leave(self, writer: ShardWriter, shard: Shard, done: int) -> None:
        """Record the edits after the first `done` as not made yet."""
        for key in islice(shard.edits(), done, None):
            writer.add(*key[:3], seed=self._seed(key, 0), image=None, verdict=NOT_YET)

    def _batches(self, shard: Shard, first: int, threads: Workers) -> Iterator[_EditBatch]:
        """The shard's originals, from index `first` on, with their edits made; the editor is one batch ahead.

        If the run is stopped it ends early, but not before the first batch.
        """
        # Enough originals to fill the editor's batches, even with one prompt.
        size = self._config.batch_size
        keys = {original: list(of_it) for original, of_it in groupby(shard.edits(), attrgetter("original"))}
        groups = [shard.rows[start : start + size] for start in range(first, len(shard.rows), size)]
        reading = threads.map(self._read, groups[0])
        before: _EditBatch | None = None
        for number, rows in enumerate(groups, 1):
            if before is not None and self._is_stopped():
                break
            images = list(reading)
            if number < len(groups):
                reading = threads.map(self._read, groups[number])
            batch = self._edit([keys[row] for row in rows], images, threads)
            if before is not None:
                yield self._settled(before, threads)
            before = batch
        if before is not None:
            yield self._settled(before, threads)

    def _edit(
        self, keys: Sequence[Sequence[EditKey]], images: Sequence[NDArray[np.uint8] | None], threads: Workers
    ) -> _EditBatch:
        """Make the edits of some originals in one call, and submit them to quality."""
        readable: list[NDArray[np.uint8]] = []
        edits: list[_Edit] = []
        for of_original, image in zip(keys, images, strict=True):
            index = None if image is None else len(readable)
            readable += [] if image is None else [image]
            edits += [_Edit(key=key, image=index, seed=self._seed(key, 0)) for key in of_original]
        wanted = [edit for edit in edits if edit.image is not None and not self._is_denied(edit)]
        return _EditBatch(images=readable, edits=edits, making=self._make(readable, wanted, threads))

    def _settled(self, batch: _EditBatch, threads: Workers) -> _EditBatch:
        """The batch with its edits made; edits that quality rejects are made again from other seeds."""
        making = batch.making
        for attempt in range(1, self._config.retry + 2):
            for edit, result in making:
                edit.made = result.get()
            again = [edit for edit, _ in making if edit.made is not None and edit.made.verdict != ACCEPTED]
            if not again or attempt > self._config.retry:
                break
            for edit in again:
                edit.seed = self._seed(edit.key, attempt)
            making = self._make(batch.images, again, threads)
        return batch

    def _make(
        self, images: Sequence[NDArray[np.uint8]], edits: Sequence[_Edit], threads: Workers
    ) -> list[tuple[_Edit, Result[_Made]]]:
        if not edits:
            return []
        tasks = []
        for edit in edits:
            assert edit.image is not None
            name = self._catalog.classes[self._catalog.labels[edit.key.original]]
            tasks.append(
                EditTask(
                    image=edit.image,
                    prompt=self._header.prompts[edit.key.prompt],
                    seed=edit.seed,
                    class_name=self._header.class_names.get(name, ""),
                )
            )
        pixels = self._editor.edit(images, tasks)
        return [
            (edit, threads.submit(self._finish, images[task.image], result))
            for edit, task, result in zip(edits, tasks, pixels, strict=True)
        ]

    def _finish(self, original: NDArray[np.uint8], edit: NDArray[Any]) -> _Made:
        """Judge an edit, and encode it at its stored size."""
        judged = quality.judge(original, edit, self._config.thresholds)
        if edit.dtype != np.uint8:
            edit = np.clip(np.nan_to_num(edit, nan=0, posinf=255, neginf=0), 0, 255).astype(np.uint8)
        height, width = edit.shape[:2]
        scale = self._config.scale
        if scale != 1:
            height, width = (max(1, round(side * scale)) for side in (height, width))
            edit = np.asarray(Image.fromarray(edit).resize((width, height), Image.Resampling.BICUBIC))
        file = encode_as(self._config.stored_format, edit, self._config.jpeg_quality)
        verdict = judged.verdict or ACCEPTED
        return _Made(file=file, height=height, width=width, verdict=verdict, score=judged.score)

    def _add(self, writer: ShardWriter, edit: _Edit) -> str:
        key = edit.key[:3]
        if edit.made is None:
            verdict = UNREADABLE if edit.image is None else DENIED
            writer.add(*key, seed=edit.seed, image=None, verdict=verdict)
            return verdict
        made = edit.made
        writer.add(
            *key,
            seed=edit.seed,
            image=made.file,
            height=made.height,
            width=made.width,
            verdict=made.verdict,
            score=made.score,
        )
        return made.verdict

    def _is_denied(self, edit: _Edit) -> bool:
        return not self._wanted[self._catalog.labels[edit.key.original], edit.key.prompt]

    def _seed(self, key: EditKey, attempt: int) -> int:
        path, prompt = self._catalog.encoded_path(key.original), self._header.prompts[key.prompt]
        return edit_seed(self._config.seed, path, prompt, key.variant, key.round * _ATTEMPTS + attempt)

    def _read(self, original: int) -> NDArray[np.uint8] | None:
        """An original at the editor's size, (height, width, 3) uint8; None if it cannot be read."""
        try:
            pixels = self._originals.pixels(original)
        except DecodeError as error:
            _log.warning("No edits are made of the original %r: %s", self._catalog.path(original), error)
            return None
        height, width = self._config.shape(*pixels.shape[:2])
        return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
