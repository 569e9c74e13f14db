"""Generation: from a folder of originals, or a packed store of them, to an edit store.

    original --decode, upright--> RGB --to the editor's size--> editor, all prompts at once --> quality --JPEG--> shard

Each original is read once. A shard is made whole by one job; jobs know nothing of each other, so any engine may run
them, in any order, on any number of processes. While the editor works on some originals, the next are read, and the
edits of those before are judged and encoded.

The first Ctrl-C stops a run gently: what the editor is at is judged, the open shards are closed with what they hold,
and the next run goes on from there. A file in the store tells the workers, wherever they are.
"""

import hashlib
import json
import logging
import math
import os
import secrets
import signal
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dali_diffusemix import __version__, quality
from dali_diffusemix.catalog import Catalog, index
from dali_diffusemix.editors import PROMPTS, Editor, EditorConfig, EditTask
from dali_diffusemix.editors.diffusers import DiffusersConfig
from dali_diffusemix.editors.procedural import ProceduralConfig
from dali_diffusemix.engines import Engine
from dali_diffusemix.engines.local import LocalEngine, default_devices
from dali_diffusemix.errors import ConfigError, DecodeError
from dali_diffusemix.pixels import RESTARTS, decode, encode
from dali_diffusemix.remote import is_url
from dali_diffusemix.store import (
    DENIED,
    NOT_YET,
    VERDICTS,
    WHOLE,
    BegunShard,
    OriginalStore,
    Part,
    Shard,
    ShardWriter,
    StoreWriter,
)

__all__ = [
    "GenerateConfig",
    "Interrupted",
    "PromptFile",
    "Summary",
    "edit_seed",
    "generate",
    "list_originals",
    "runs_log",
]

_log = logging.getLogger(__name__)

_ACCEPTED, _UNREADABLE = VERDICTS[:2]
# Of a shard, unless it is said: what a model makes in some minutes, and what restyling makes in about one.
_ORIGINALS_BY_MODEL, _ORIGINALS = 64, 512


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Which edits to make, and how.

    Raises ConfigError where a field breaks its rule.
    """

    editor: str | EditorConfig = "procedural"  # or the model of a `DiffusersConfig`: a hub id or a folder
    prompts: tuple[str, ...] = PROMPTS  # without the template
    denied: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # prompt to patterns of classes it is not for
    size: int = 256  # pixels of a stored edit's side; of one that keeps its shape, the square root of its pixels
    edit_size: int | None = None  # the same of what the editor works on; None: what is stored
    resize: Literal["squash", "keep"] = "squash"  # to a square, as in the released code; or the aspect ratio is kept
    variants: int = 1  # edits of an original under one prompt, from different seeds
    seed: int = 0
    retry: int = 0  # more tries, each from another seed, for an edit that quality rejects
    thresholds: quality.Thresholds = field(default_factory=quality.Thresholds)
    quality: int = 90  # of the JPEG
    batch_size: int = 16  # edits that the editor makes at once
    originals_per_shard: int | None = None  # 64 where an edit takes long, as by a model; else 512

    _LIMITS: ClassVar[Mapping[str, tuple[int, int]]] = {
        "size": (1, 4096),
        "edit_size": (1, 4096),
        "variants": (1, 32768),
        "seed": (0, 2**32 - 1),
        "retry": (0, 100),
        "quality": (1, 100),
        "batch_size": (1, 2**20),
        "originals_per_shard": (1, 2**20),
    }

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))
        denied = {prompt: tuple(patterns) for prompt, patterns in self.denied.items() if patterns}
        object.__setattr__(self, "denied", denied)
        for name, (least, most) in self._LIMITS.items():
            value = getattr(self, name)
            if name in ("edit_size", "originals_per_shard") and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ConfigError(f"{name} must be a whole number from {least} to {most}, found {value!r}.")
        if not self.prompts or len(set(self.prompts)) != len(self.prompts):
            raise ConfigError(f"prompts must be one or more, all different, found {list(self.prompts)}.")
        if self.resize not in ("squash", "keep"):
            raise ConfigError(f"resize must be 'squash' or 'keep', found {self.resize!r}.")
        if unknown := sorted(set(denied) - set(self.prompts)):
            raise ConfigError(f"denied must name prompts of this run, found {unknown[0]!r}; these are {self.prompts}.")
        if isinstance(self.editor, str):
            editor = ProceduralConfig() if self.editor == "procedural" else DiffusersConfig(model=self.editor)
            object.__setattr__(self, "editor", editor)
        if self._side % self.editor_config.multiple:
            raise ConfigError(
                f"edit_size must be divisible by {self.editor_config.multiple} for this editor, found {self._side}; "
                "an edit can be stored at any other size."
            )

    @property
    def editor_config(self) -> EditorConfig:
        """The editor, however it was named."""
        assert not isinstance(self.editor, str)
        return self.editor

    @property
    def shard_length(self) -> int:
        """Originals in a shard."""
        if self.originals_per_shard is not None:
            return self.originals_per_shard
        return _ORIGINALS_BY_MODEL if self.editor_config.accelerated else _ORIGINALS

    @property
    def _side(self) -> int:
        return self.size if self.edit_size is None else self.edit_size

    @property
    def scale(self) -> float:
        """How much larger an edit is stored than it was made."""
        return self.size / self._side

    def settings(self) -> dict[str, str | int | float | bool | None]:
        """What an edit store records: all that decides an edit besides its original, prompt and variant."""
        return {
            **self.editor_config.settings(),
            "size": self.size,
            "edit_size": self._side,
            "resize": f"bicubic, aspect ratio {'squashed' if self.resize == 'squash' else 'kept'}",
            "quality": self.quality,
            "subsampling": "4:2:0",
            "restarts": RESTARTS,
            "seed": self.seed,
            "retry": self.retry,
            **{f"threshold {name}": value for name, value in self.thresholds.settings().items()},
        }

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of what the editor gets of an original of this size."""
        if self.resize == "squash":
            return self._side, self._side
        # As many pixels whatever the shape, so that no panorama is too large for the editor.
        step, ratio = self.editor_config.multiple, math.sqrt(height / width)
        return tuple(max(1, round(side / step)) * step for side in (self._side * ratio, self._side / ratio))  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class PromptFile:
    """Prompts from a TOML file:

    template = "A transformed version of image into {prompt}"   # may be left out
    prompts = ["autumn", "snowy", "sunset"]

    [deny]                               # class, or a pattern of classes, to prompts that would change its label
    "yellow *" = ["autumn", "sunset"]
    """

    prompts: tuple[str, ...]
    denied: Mapping[str, tuple[str, ...]]  # prompt to patterns of classes
    template: str | None

    @classmethod
    def read(cls, file: str | os.PathLike[str]) -> "PromptFile":
        """Read one. Raises ConfigError."""
        try:
            content = tomllib.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"prompts: {str(file)!r} must be a TOML file, found: {error}.") from error
        if unknown := sorted(set(content) - {"prompts", "template", "deny"}):
            raise ConfigError(f"prompts: {str(file)!r} may have prompts, template and [deny], found {unknown[0]!r}.")
        template, deny = content.get("template"), content.get("deny", {})
        if not (template is None or isinstance(template, str)) or not isinstance(deny, dict):
            raise ConfigError(f"prompts: {str(file)!r}: template must be a string and [deny] a table.")
        prompts = _strings(file, "prompts", content.get("prompts", list(PROMPTS)))
        denied: dict[str, tuple[str, ...]] = {}
        for pattern, names in deny.items():
            for prompt in _strings(file, f"deny {pattern!r}", names):
                if prompt not in prompts:
                    raise ConfigError(
                        f"prompts: {str(file)!r} denies {prompt!r} to {pattern!r}, but its prompts are {list(prompts)}."
                    )
                denied[prompt] = (*denied.get(prompt, ()), pattern)
        return cls(prompts=prompts, denied=denied, template=template)


def _strings(file: str | os.PathLike[str], name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
        raise ConfigError(f"prompts: {str(file)!r}: {name} must be a list of strings, found {value!r}.")
    return tuple(value)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run did, and what the store holds."""

    verdicts: Mapping[str, int]  # of all edits in the store
    by_prompt: Mapping[str, Mapping[str, int]]  # verdicts of each prompt that occur
    by_class: Mapping[str, Mapping[str, int]]
    made: int  # edits by this run, rejected ones included
    seconds: float
    missing: int = 0  # shards that other parts have still to make

    @property
    def images_per_second(self) -> float:
        """Edits that this run made in a second."""
        return self.made / self.seconds


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended `generate`. Its text says what is kept."""

    def __init__(self, kept: int, again: int) -> None:
        super().__init__(kept, again)
        self.kept = kept
        """Edits that this run made and that the next one need not make."""
        self.again = again
        """Edits that it made, or had begun, and that the next one makes again."""

    def __str__(self) -> str:
        return f"kept {self.kept} edits, to be made again {self.again}"


def generate(
    root: str | os.PathLike[str],
    store: str | os.PathLike[str],
    config: GenerateConfig | None = None,
    *,
    catalog: Catalog | None = None,
    engine: Engine | None = None,
    part: Part = WHOLE,
    progress: Callable[[int, int], None] | None = None,
    rejects: Callable[[Mapping[str, int]], None] | None = None,
) -> Summary:
    """Make the edits that a store lacks; begin the store if there is none.

    An unfinished run, however it ended, is gone on with by calling this again. More originals, prompts or variants add
    to a store. An original that cannot be read gets a verdict, and the run goes on.

    The first Ctrl-C (SIGINT, where nobody else handles it) lets the editor end what it is at and closes the open
    shards with what they hold; the second stops at once, and what open shards hold is lost.

    Args:
        root: The folder of originals, or a packed store.
        store: The edit store, a folder outside `root`.
        config: Which edits to make; all defaults unless given.
        catalog: The originals to use, with paths relative to `root`; unless given, `list_originals(root)`.
        engine: Where the work is done; unless given, on every GPU if the editor wants one and there are any, else in
            this process.
        part: Which of the shards to make, where several runs share them.
        progress: Called with the edits done, those of earlier runs included, and the edits there will be.
        rejects: Called with prompt to edits that were rejected in this run.

    Raises:
        ConfigError: The store lies inside the root, or the editor cannot be used or does not know a prompt.
        CatalogError: The originals cannot be listed.
        StoreError: The store is of other originals or settings, another run writes to this part of it, or the disk is
            full: then finished shards stay, and the same call goes on from there.
        Interrupted: Ctrl-C was pressed (a KeyboardInterrupt).
    """
    begin = time.perf_counter()
    for name, given in (("root", root), ("store", store)):
        if isinstance(given, str) and is_url(given):
            raise ConfigError(
                f"{name} must be a local folder, found {given!r}; work on a copy, and upload the store after."
            )
    root, store = Path(root).absolute(), Path(store).absolute()
    config = config or GenerateConfig()
    config.editor_config.check(config.prompts)
    settings = config.settings()
    if store.resolve().is_relative_to(root.resolve()):
        raise ConfigError(
            f"store must lie outside the root, where it would pass for a class; found {str(store)!r} in {str(root)!r}."
        )
    originals = list_originals(root) if catalog is None else catalog
    if engine is None:
        devices = default_devices(config.editor_config.accelerated)
        engine = LocalEngine(devices if devices[0] != "cpu" else devices[:1])
    with StoreWriter.open(store, originals, settings, part) as writer:
        writer.order(config.prompts, config.variants, config.shard_length, config.denied)
        shards, finished, begun = writer.shards(), writer.done(), writer.begun()
        missing = [shard for shard in shards if shard.number not in finished]
        # Edits of each shard: that were there before, that are made, and that are in a shard that is closed.
        there = {shard.number: (finished | begun).get(shard.number, Counter()).total() for shard in shards}
        reached, closed = dict(there), dict(there)
        total, before, made = sum(map(len, shards)), sum(there.values()), 0
        if progress is not None:
            progress(before, total)
        rejected: dict[int, Counter[str]] = {}
        with _Stopping(store, engine) as stopping:
            asked = replace(config, prompts=writer.prompts, denied=writer.denied)
            start = partial(_Worker, root, store, asked, stopping.file)
            reports = engine.run(start, missing)
            try:
                for report in reports:
                    reached[report.shard] = max(reached[report.shard], report.verdicts.total())
                    if report.closed:
                        closed[report.shard] = report.verdicts.total()
                        continue
                    made = sum(reached.values()) - before
                    rejected[report.shard] = report.rejected
                    if rejects is not None:
                        rejects(sum(rejected.values(), Counter[str]()))
                    if progress is not None:
                        progress(before + made, total)
            except KeyboardInterrupt as error:
                kept = max(0, sum(closed.values()) - before)
                raise Interrupted(kept, max(0, made - kept)) from error
            finally:
                if isinstance(reports, Generator):
                    reports.close()  # now, though the error's frames may hold it
                if made:
                    _note_run(store, root, config, engine, part, made, time.perf_counter() - begin)
        tally = writer.finish()
        done = writer.done()
        if stopping.asked:
            kept = max(0, sum(closed.values()) - before)
            raise Interrupted(kept, max(0, made - kept))
    return Summary(
        verdicts=_verdicts_of(tally.sum((0, 1)), every=True),
        by_prompt={prompt: _verdicts_of(tally[:, place].sum(0)) for place, prompt in enumerate(writer.prompts)},
        by_class={name: _verdicts_of(tally[place].sum(0)) for place, name in enumerate(writer.catalog.classes)},
        made=made,
        seconds=time.perf_counter() - begin,
        missing=writer.shard_count - len(done),
    )


class _Stopping:
    """What Ctrl-C does while edits are made: the first time a file appears that workers look for."""

    def __init__(self, store: Path, engine: Engine) -> None:
        self.file = store / f".stop.{secrets.token_hex(8)}.tmp"
        self.asked = False
        self._engine = engine
        self._ours = False

    def __enter__(self) -> Self:
        # Whoever has a handler of their own, or ignores the signal, goes on having it their way.
        self._ours = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if self._ours:
            signal.signal(signal.SIGINT, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        try:
            self.file.touch()
        except OSError as error:
            raise KeyboardInterrupt from error
        stop = getattr(self._engine, "stop", None)  # engines of users need not have it
        if stop is not None:
            stop()
        _log.warning("Stopping: what the editor is at is finished and kept. Ctrl-C again stops at once.")

    def __exit__(self, *_: object) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.file.unlink(missing_ok=True)


def _verdicts_of(counts: NDArray[np.int64], *, every: bool = False) -> dict[str, int]:
    """Verdict to count, of those that occur."""
    return {name: count for name, count in zip(VERDICTS, counts.tolist(), strict=True) if count or every}


def runs_log(store: str | os.PathLike[str]) -> Path:
    """The file beside a store that says who made it: a JSON object a line for each run that ended by itself.

    It lies outside, because the store is the same whoever made it.
    """
    store = Path(store).absolute()
    return store.with_name(f"{store.name}.runs.jsonl")


def _note_run(
    store: Path, root: Path, config: GenerateConfig, engine: Engine, part: Part, made: int, seconds: float
) -> None:
    line = {
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "root": str(root),
        "host": os.uname().nodename,
        "engine": type(engine).__name__,
        "devices": list(getattr(engine, "devices", ())),
        "part": str(part),
        "batch_size": config.batch_size,
        "edits": made,
        "seconds": round(seconds, 3),
        "version": __version__,
    }
    try:
        with runs_log(store).open("a", encoding="ascii") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        _log.warning("The run is not noted in %r: %s", str(runs_log(store)), error)


def list_originals(root: str | os.PathLike[str], *, progress: Callable[[int, int], None] | None = None) -> Catalog:
    """A packed store's own catalog, or `index(root)` of a folder.

    Raises:
        CatalogError: The folder's originals cannot be listed.
        StoreError: The root is an edit store, or a packed one that cannot be opened.
    """
    packed = OriginalStore.find(root)
    return index(root, progress=progress) if packed is None else packed.catalog


def edit_seed(seed: int, path: bytes, prompt: str, variant: int, attempt: int = 0) -> int:
    """An edit's seed, 0 ≤ seed < 2⁶⁴: a function of nothing but its arguments, so that adding files shifts nothing.

    The first 8 bytes, little-endian, of SHA-256 over the store's seed, the original's relative path, the prompt, the
    variant and, from the first retry on, the attempt, the numbers in decimal, joined by NUL.
    """
    parts = [str(seed).encode(), path, prompt.encode("utf-8", "surrogateescape"), str(variant).encode()]
    parts += [str(attempt).encode()] if attempt else []
    return int.from_bytes(hashlib.sha256(b"\0".join(parts)).digest()[:8], "little")


@dataclass(frozen=True, kw_only=True)
class _Progress:
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
class _Batch:
    """Some originals of a shard, with their edits; those are judged and encoded while the editor works on others."""

    images: Sequence[NDArray[np.uint8]]
    edits: Sequence[_Edit]  # in the order of the shard
    making: Sequence[tuple[_Edit, Future[_Made]]]


class _Worker:
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
        self._packed = None if packed is None else packed.in_order_of(self._catalog)
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

    def __call__(self, shard: Shard) -> Iterator[_Progress]:
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
                    if verdict in quality.VERDICTS:
                        rejected[self._config.prompts[edit.prompt]] += 1
                yield _Progress(shard=shard.number, verdicts=verdicts.copy(), rejected=rejected.copy())
            self._leave(writer, shard, verdicts.total())
        yield _Progress(shard=shard.number, verdicts=verdicts.copy(), rejected=rejected.copy(), closed=True)

    def _is_stopped(self) -> bool:
        return self._stop.exists()

    def _leave(self, writer: ShardWriter, shard: Shard, done: int) -> None:
        """Note what the next run has to make, after so many edits."""
        for original in shard.rows[done // (len(shard.prompts) * len(shard.variants)) :]:
            for prompt in shard.prompts:
                for variant in shard.variants:
                    seed = self._seed(original, prompt, variant, 0)
                    writer.add(original, prompt, variant, seed=seed, jpeg=None, verdict=NOT_YET)

    def _batches(self, shard: Shard, first: int, pool: ThreadPoolExecutor) -> Iterator[_Batch]:
        """The shard's originals, from one on, with their edits ready: the editor is a batch ahead of what is yielded.

        It ends early where the run is stopped, but not before the first.
        """
        # So many originals that the editor's batches are full, whatever the number of prompts.
        size = self._config.batch_size
        groups = [shard.rows[start : start + size] for start in range(first, len(shard.rows), size)]
        reading = pool.map(self._read, groups[0])
        before: _Batch | None = None
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
    ) -> _Batch:
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
        return _Batch(images=readable, edits=edits, making=self._make(readable, wanted, pool))

    def _settled(self, batch: _Batch, pool: ThreadPoolExecutor) -> _Batch:
        """The batch with its edits made; what quality rejects is tried again from other seeds."""
        making = batch.making
        for attempt in range(1, self._config.retry + 2):
            for edit, future in making:
                edit.made = future.result()
            again = [edit for edit, _ in making if edit.made is not None and edit.made.verdict != _ACCEPTED]
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
        verdict = judged.verdict or _ACCEPTED
        return _Made(jpeg=jpeg, height=height, width=width, verdict=verdict, score=judged.score)

    def _add(self, writer: ShardWriter, edit: _Edit) -> str:
        place = (edit.original, edit.prompt, edit.variant)
        if edit.made is None:
            verdict = _UNREADABLE if edit.image is None else DENIED
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
