"""The worker: makes one shard whole.

    original --decode, upright--> RGB --to the editor's size--> editor, all prompts at once --> quality --JPEG--> shard

While the editor works on some originals, the next are read, and the edits of those before are judged and encoded.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dali_diffusemix.catalog.table import Catalog
from dali_diffusemix.errors import DecodeError
from dali_diffusemix.generate import quality
from dali_diffusemix.generate.config import GenerateConfig
from dali_diffusemix.generate.editors import Editor, EditTask
from dali_diffusemix.images.codec import decode, encode
from dali_diffusemix.store import (
    DENIED,
    NOT_YET,
    REJECTIONS,
    BegunShard,
    OriginalStore,
    Shard,
    ShardWriter,
)
from dali_diffusemix.store.layout import ACCEPTED, UNREADABLE

_log = logging.getLogger(__name__)


def edit_seed(seed: int, path: bytes, prompt: str, variant: int, attempt: int = 0) -> int:
    """An edit's seed, 0 ≤ seed < 2⁶⁴: a function of nothing but its arguments, so that adding files shifts nothing.

    The first 8 bytes, little-endian, of SHA-256 over the store's seed, the original's relative path, the prompt, the
    variant and, from the first retry on, the attempt, the numbers in decimal, joined by NUL.
    """
    parts = [str(seed).encode(), path, prompt.encode("utf-8", "surrogateescape"), str(variant).encode()]
    parts += [str(attempt).encode()] if attempt else []
    return int.from_bytes(hashlib.sha256(b"\0".join(parts)).digest()[:8], "little")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a shard has come."""

    shard: int
    verdicts: Counter[str]  # of its edits so far, those of a run before included
    rejected: Counter[str]  # prompt to edits that quality rejected
    closed: bool = False  # its files are in their places, with these edits


@dataclass(frozen=True, kw_only=True)
class _Made:
    """An edit that is ready to be stored."""

    jpeg: bytes
    height: int
    width: int
    verdict: str
    score: float


@dataclass(kw_only=True)
class _Edit:
    """An edit on its way."""

    original: int
    prompt: int
    variant: int
    image: int | None  # place in the batch of images; None: the original cannot be read
    seed: int
    made: _Made | None = None  # None: is not to be made


@dataclass(frozen=True, kw_only=True)
class _EditBatch:
    """Some originals of a shard, with their edits; those are judged and encoded while the editor works on others."""

    images: Sequence[NDArray[np.uint8]]
    edits: Sequence[_Edit]  # in the order of the shard
    making: Sequence[tuple[_Edit, Future[_Made]]]


class ShardWorker:
    """Makes shards, one at a time; an editor is made once for all of them."""

    def __init__(self, root: Path, store: Path, config: GenerateConfig, stop: Path, device: str) -> None:
        """`config.prompts` are the store's, which may be more than were asked for today; `stop` appears at the end."""
        self._root = root
        self._store = store
        self._config = config
        self._stop = stop
        if self._is_stopped():
            return  # a model may take minutes to load
        self._editor: Editor = config.editor_config.load(config.prompts, device=device, batch_size=config.batch_size)
        self._catalog = Catalog.open(store / "catalog")
        packed = OriginalStore.find(root)
        self._packed = None if packed is None else packed.reindexed(self._catalog)
        # Each processor has an editor of its own; beside a GPU some are free.
        self._threads = 1 if device == "cpu" else 4
        classes = self._catalog.classes
        self._denied = [
            frozenset(
                label
                for label, name in enumerate(classes)
                if any(fnmatchcase(name, pattern) for pattern in config.denied.get(prompt, ()))
            )
            for prompt in config.prompts
        ]

    def __call__(self, shard: Shard) -> Iterator[Progress]:
        """Make one shard, or as much of it as there is time for; yield after each batch how far it has come."""
        if self._is_stopped():
            return
        verdicts: Counter[str] = Counter()
        rejected: Counter[str] = Counter()
        begun = BegunShard.find(self._store, shard)
        with ShardWriter(self._store, self._catalog, shard) as writer, ThreadPoolExecutor(self._threads) as pool:
            if begun is not None:
                verdicts += begun.copy(writer)
            for batch in self._batches(shard, 0 if begun is None else begun.originals, pool):
                for edit in batch.edits:
                    verdict = self._add(writer, edit)
                    verdicts[verdict] += 1
                    if verdict in REJECTIONS:
                        rejected[self._config.prompts[edit.prompt]] += 1
                yield Progress(shard=shard.number, verdicts=verdicts.copy(), rejected=rejected.copy())
            self._leave(writer, shard, verdicts.total())
        yield Progress(shard=shard.number, verdicts=verdicts.copy(), rejected=rejected.copy(), closed=True)

    def _is_stopped(self) -> bool:
        return self._stop.exists()

    def _leave(self, writer: ShardWriter, shard: Shard, done: int) -> None:
        """Note what the next run has to make, after so many edits."""
        for original in shard.rows[done // (len(shard.prompts) * len(shard.variants)) :]:
            for prompt in shard.prompts:
                for variant in shard.variants:
                    seed = self._seed(original, prompt, variant, 0)
                    writer.add(original, prompt, variant, seed=seed, jpeg=None, verdict=NOT_YET)

    def _batches(self, shard: Shard, first: int, pool: ThreadPoolExecutor) -> Iterator[_EditBatch]:
        """The shard's originals, from one on, with their edits ready: the editor is a batch ahead of what is yielded.

        It ends early where the run is stopped, but not before the first.
        """
        # So many originals that the editor's batches are full, whatever the number of prompts.
        size = self._config.batch_size
        groups = [shard.rows[start : start + size] for start in range(first, len(shard.rows), size)]
        reading = pool.map(self._read, groups[0])
        before: _EditBatch | None = None
        for place, rows in enumerate(groups):
            if place and self._is_stopped():
                break
            images = list(reading)
            if place + 1 < len(groups):
                reading = pool.map(self._read, groups[place + 1])
            batch = self._edit(shard, rows, images, pool)
            if before is not None:
                yield self._settled(before, pool)
            before = batch
        if before is not None:
            yield self._settled(before, pool)

    def _edit(
        self, shard: Shard, rows: range, images: Sequence[NDArray[np.uint8] | None], pool: ThreadPoolExecutor
    ) -> _EditBatch:
        """Make the edits of some originals, all prompts and variants in one call; have them judged meanwhile."""
        readable: list[NDArray[np.uint8]] = []
        edits: list[_Edit] = []
        for original, image in zip(rows, images, strict=True):
            place = None if image is None else len(readable)
            readable += [] if image is None else [image]
            for prompt in shard.prompts:
                for variant in shard.variants:
                    seed = self._seed(original, prompt, variant, 0)
                    edits.append(_Edit(original=original, prompt=prompt, variant=variant, image=place, seed=seed))
        wanted = [edit for edit in edits if edit.image is not None and not self._is_denied(edit)]
        return _EditBatch(images=readable, edits=edits, making=self._make(readable, wanted, pool))

    def _settled(self, batch: _EditBatch, pool: ThreadPoolExecutor) -> _EditBatch:
        """The batch with its edits made; what quality rejects is tried again from other seeds."""
        making = batch.making
        for attempt in range(1, self._config.retry + 2):
            for edit, future in making:
                edit.made = future.result()
            again = [edit for edit, _ in making if edit.made is not None and edit.made.verdict != ACCEPTED]
            if not again or attempt > self._config.retry:
                break
            for edit in again:
                edit.seed = self._seed(edit.original, edit.prompt, edit.variant, attempt)
            making = self._make(batch.images, again, pool)
        return batch

    def _make(
        self, images: Sequence[NDArray[np.uint8]], edits: Sequence[_Edit], pool: ThreadPoolExecutor
    ) -> list[tuple[_Edit, Future[_Made]]]:
        if not edits:
            return []
        tasks = []
        for edit in edits:
            assert edit.image is not None
            tasks.append(EditTask(image=edit.image, prompt=self._config.prompts[edit.prompt], seed=edit.seed))
        pixels = self._editor.edit(images, tasks)
        return [
            (edit, pool.submit(self._finish, images[task.image], result))
            for edit, task, result in zip(edits, tasks, pixels, strict=True)
        ]

    def _finish(self, original: NDArray[np.uint8], edit: NDArray[Any]) -> _Made:
        """Judge an edit, and encode it at the size that is stored."""
        judged = quality.judge(original, edit, self._config.thresholds)
        if edit.dtype != np.uint8:
            edit = np.clip(np.nan_to_num(edit, nan=0, posinf=255, neginf=0), 0, 255).astype(np.uint8)
        height, width = edit.shape[:2]
        scale = self._config.scale
        if scale != 1:
            height, width = (max(1, round(side * scale)) for side in (height, width))
            edit = np.asarray(Image.fromarray(edit).resize((width, height), Image.Resampling.BICUBIC))
        jpeg = encode(edit, self._config.quality)
        verdict = judged.verdict or ACCEPTED
        return _Made(jpeg=jpeg, height=height, width=width, verdict=verdict, score=judged.score)

    def _add(self, writer: ShardWriter, edit: _Edit) -> str:
        place = (edit.original, edit.prompt, edit.variant)
        if edit.made is None:
            verdict = UNREADABLE if edit.image is None else DENIED
            writer.add(*place, seed=edit.seed, jpeg=None, verdict=verdict)
            return verdict
        made = edit.made
        writer.add(
            *place,
            seed=edit.seed,
            jpeg=made.jpeg,
            height=made.height,
            width=made.width,
            verdict=made.verdict,
            score=made.score,
        )
        return made.verdict

    def _is_denied(self, edit: _Edit) -> bool:
        return int(self._catalog.labels[edit.original]) in self._denied[edit.prompt]

    def _seed(self, original: int, prompt: int, variant: int, attempt: int) -> int:
        path = self._catalog.encoded_path(original)
        return edit_seed(self._config.seed, path, self._config.prompts[prompt], variant, attempt)

    def _read(self, original: int) -> NDArray[np.uint8] | None:
        """An original as the editor gets it, (height, width, 3) uint8; None if it cannot be read."""
        path = self._catalog.path(original)
        try:
            pixels = decode(self._root / path if self._packed is None else self._packed.encoded(original))
        except DecodeError as error:
            _log.warning("No edits are made of the original %r: %s", path, error)
            return None
        height, width = self._config.shape(*pixels.shape[:2])
        return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
