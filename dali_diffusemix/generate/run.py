"""A run: from a folder of originals, or a packed store of them, to an edit store.

Each original is read once. One job makes one whole shard; jobs are independent, so any engine may run them, in any
order, in any number of processes.

The first Ctrl-C stops a run gently: edits under way are finished, the open shards are closed with what they have, and
the next run resumes there. A file in the store tells the workers, on whatever machine.
"""

import json
import logging
import os
import secrets
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Final, Literal, Self

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix import __version__
from dali_diffusemix.base.words import did_you_mean
from dali_diffusemix.catalog.listing import index
from dali_diffusemix.catalog.table import Catalog
from dali_diffusemix.errors import ConfigError, DecodeError, StoreError
from dali_diffusemix.generate.config import GenerateConfig
from dali_diffusemix.generate.engines import Engine
from dali_diffusemix.generate.engines.local import LocalEngine, default_devices
from dali_diffusemix.generate.originals import Originals
from dali_diffusemix.generate.worker import ShardWorker
from dali_diffusemix.store import (
    DENIED,
    VERDICTS,
    WHOLE,
    EditStore,
    OriginalStore,
    Part,
    Redo,
    StoreWriter,
    UnfinishedStoreWarning,
)
from dali_diffusemix.store.layout import Header, Rule
from dali_diffusemix.store.writer import local_folders

_log = logging.getLogger(__name__)

Redoable = Literal["rejected", "unreadable"]
REDOABLE: Final[tuple[Redoable, ...]] = ("rejected", "unreadable")
"""Names of edits that can be made again."""
_SHOWN: Final = 10  # classes that a warning names


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The result of a run, and the content of the store."""

    verdicts: Mapping[str, int]  # of all edits in the store
    by_prompt: Mapping[str, Mapping[str, int]]  # of each prompt, the verdicts that occur
    by_class: Mapping[str, Mapping[str, int]]
    made: int  # edits by this run, rejected ones included, denied ones not
    used: int  # edits that are trained on: accepted, wanted for their class, and not rejected by people
    seconds: float
    missing: int = 0  # shards that are left to other parts

    @property
    def images_per_second(self) -> float:
        """Edits that this run made, per second."""
        return self.made / self.seconds


class Interrupted(KeyboardInterrupt):
    """Ctrl-C stopped `generate`. The text says what is kept."""

    def __init__(self, kept: int, again: int) -> None:
        super().__init__(kept, again)
        self.kept = kept
        """Edits that this run made and the next one keeps."""
        self.again = again
        """Edits that this run made or began, and the next one makes again."""

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
    redo: Collection[Redoable] = (),
    progress: Callable[[int, int], None] | None = None,
    rejects: Callable[[Mapping[str, int]], None] | None = None,
) -> Summary:
    """Make the edits that a store lacks; begin the store if there is none.

    Call again to resume an interrupted run. More originals, prompts or variants extend a store, and its `class_prompts`
    and `deny` may change: what they do not want any more stays in the store, and is not trained on. An original that
    cannot be read gets a verdict, and the run continues.

    The first Ctrl-C (SIGINT, unless it has another handler) finishes the edits under way and closes the open shards
    with what they have; the second stops at once, and the edits in open shards are lost.

    Args:
        root: The folder of originals, or a packed store.
        store: The edit store, a folder outside `root`.
        config: Which edits to make; by default `GenerateConfig()`.
        catalog: The originals to use, with paths relative to `root`; by default `list_originals(root)`.
        engine: Where the work is done; by default on every GPU if the editor uses GPUs and there are any, else in this
            process.
        part: The shards to make, if several runs share the work.
        redo: Edits to make again: "rejected", those that quality or people rejected, from new seeds; "unreadable",
            those of originals that could not be read and now can. The new edits replace the old ones. For part 1 alone,
            which orders for all parts.
        progress: Called with the number of edits done, also by earlier runs, and of all edits.
        rejects: Called with the number of rejected edits of this run for each prompt.

    Raises:
        ConfigError: The store lies inside the root, or the editor cannot be used or does not know a prompt.
        CatalogError: The originals cannot be listed.
        StoreError: The store is of other originals or settings, another run writes to this part of it, or the disk is
            full: then finished shards stay, and the same call resumes.
        Interrupted: Ctrl-C was pressed (a KeyboardInterrupt).
    """
    begin = time.perf_counter()
    root, store = local_folders(root, store)
    config = _checked(store, config or GenerateConfig())
    settings = config.settings()
    originals = list_originals(root) if catalog is None else catalog
    if engine is None:
        devices = default_devices(config.editor_config.accelerated)
        engine = LocalEngine(devices if devices[0] != "cpu" else devices[:1])
    with StoreWriter.open(store, originals, settings, part) as writer:
        _warn_of_classes(config, writer.catalog.classes)
        writer.order(config.wish(writer.catalog.classes, writer.class_names), redo=_redo_of(redo, root, part))
        shards, finished, begun = writer.shards(), writer.done(), writer.begun()
        missing = [shard for shard in shards if shard.number not in finished]
        # Edits per shard: made before this run, made so far, and safe in a closed shard.
        verdicts = {shard.number: (finished | begun).get(shard.number, Counter()) for shard in shards}
        there = {number: of_shard.total() for number, of_shard in verdicts.items()}
        reached, closed = dict(there), dict(there)
        denied = {number: of_shard[DENIED] for number, of_shard in verdicts.items()}
        denied_before = sum(denied.values())
        total, before, made = sum(map(len, shards)), sum(there.values()), 0
        if progress is not None:
            progress(before, total)
        rejected: dict[int, Counter[str]] = {}
        with _Stopping(store, engine) as stopping:
            start = partial(ShardWorker, root, store, config, stopping.file)
            reports = engine.run(start, missing)
            try:
                for report in reports:
                    reached[report.shard] = max(reached[report.shard], report.verdicts.total())
                    denied[report.shard] = max(denied[report.shard], report.verdicts[DENIED])
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
                    reports.close()  # here, since the error's frames may keep it alive
                if made:
                    _note_run(store, root, config, engine, part, made, time.perf_counter() - begin)
        tally = writer.finish()
        done = writer.done()
        if stopping.asked:
            kept = max(0, sum(closed.values()) - before)
            raise Interrupted(kept, max(0, made - kept))
    return Summary(
        verdicts=_verdicts_of(tally.sum((0, 1)), every=True),
        by_prompt={prompt: _verdicts_of(tally[:, i].sum(0)) for i, prompt in enumerate(writer.prompts)},
        by_class={name: _verdicts_of(tally[label].sum(0)) for label, name in enumerate(writer.catalog.classes)},
        made=made - sum(denied.values()) + denied_before,
        used=_used(store),
        seconds=time.perf_counter() - begin,
        missing=writer.shard_count - len(done),
    )


def _used(store: Path) -> int:
    """The number of edits that would be trained on now."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnfinishedStoreWarning)
        try:
            return len(EditStore.open(store))
        except StoreError:  # no shard is there: another part's are still to be made
            return 0


def _warn_of_classes(config: GenerateConfig, classes: Sequence[str]) -> None:
    """Warn of names of classes that are no classes: with a typo in `deny`, edits of other labels are trained on."""
    unknown = [
        f"{field}: {name!r}"
        for field, names in (("class_prompts", config.class_prompts), ("deny", config.deny or {}))
        for name in names
        if not Rule(only=(name,)).applies(classes).any()
    ]
    unknown += [f"class_names: {name!r}" for name in config.class_names if name not in classes]
    for one in unknown:
        _log.warning(
            "%s is no class of these originals; their classes are %s%s.",
            one,
            ", ".join(map(repr, classes[:_SHOWN])),
            ", ..." if len(classes) > _SHOWN else "",
        )


def _redo_of(names: Collection[Redoable], root: Path, part: Part) -> Redo | None:
    if names and part.number != 1:
        raise ConfigError(
            f"redo must be given to part 1 alone, which orders for all, found {', '.join(names)} for part {part}; "
            "leave it out, and start this part after part 1 has begun."
        )
    if unknown := set(names) - set(REDOABLE):
        raise ConfigError(f"redo must be of {', '.join(REDOABLE)}, found {sorted(unknown)[0]!r}.")
    if not names:
        return None
    originals: Originals | None = None

    def is_readable(catalog: Catalog, row: int) -> bool:
        nonlocal originals
        originals = originals or Originals(root, catalog)
        try:
            originals.pixels(row)
        except DecodeError:
            return False
        return True

    return Redo(rejected="rejected" in names, unreadable=is_readable if "unreadable" in names else None)


def _checked(store: Path, config: GenerateConfig) -> GenerateConfig:
    """The config, checked before any work, with the format of the store if there is one and the config leaves it open.

    Raises ConfigError, MissingDependencyError.
    """
    known = config.all_prompts
    with suppress(StoreError):  # which the writer will report
        if (header := Header.find(store)) is not None:
            known += header.prompts
            if config.format is None and config.quality is None:
                config = replace(config, format=EditStore.format_at(store))
    for pattern, prompts in (config.deny or {}).items():
        if unknown := [prompt for prompt in prompts if prompt not in known]:
            raise ConfigError(
                f"deny must name prompts of this run or of the store, found {unknown[0]!r} for {pattern!r}; these are "
                f"{list(dict.fromkeys(known))}{did_you_mean(unknown[0], known)}"
            )
    config.editor_config.check(config.all_prompts)
    return replace(config)  # checked again: a model's divisor of sides is known once the model is there


def edits_to_make(
    root: str | os.PathLike[str],
    store: str | os.PathLike[str],
    config: GenerateConfig,
    *,
    catalog: Catalog,
    part: Part = WHOLE,
    redo: Collection[Redoable] = (),
) -> int:
    """The number of edits that `generate` with these arguments would make. Nothing is written. Raises like it."""
    root, store = local_folders(root, store)
    config = _checked(store, config)
    header = Header.find(store)
    wish = config.wish(catalog.classes, {} if header is None else header.class_names)
    again = _redo_of(redo, root, part)
    return StoreWriter.outstanding(store, catalog, config.settings(), wish, redo=again, part=part)


class _Stopping:
    """Handles Ctrl-C while edits are made: the first one creates a file that workers look for."""

    def __init__(self, store: Path, engine: Engine) -> None:
        # Beside the shards, where only a run that has the whole store removes temporary files of others.
        self.file = store / "shards" / f".stop.{secrets.token_hex(4)}.tmp"
        self.asked = False
        self._engine = engine
        self._ours = False

    def __enter__(self) -> Self:
        # Another handler, or a process that ignores the signal, is left alone.
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
        stop = getattr(self._engine, "stop", None)  # users' engines need not have it
        if stop is not None:
            stop()
        _log.warning("Stopping: edits under way are finished and kept. Ctrl-C again stops at once.")

    def __exit__(self, *_: object) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.file.unlink(missing_ok=True)


def _verdicts_of(counts: NDArray[np.int64], *, every: bool = False) -> dict[str, int]:
    """Verdict to count, of those that occur."""
    return {name: count for name, count in zip(VERDICTS, counts.tolist(), strict=True) if count or every}


def runs_log(store: str | os.PathLike[str]) -> Path:
    """The log beside a store of the runs that made it, one JSON object per line.

    It lies outside, because a store does not depend on the machines that made it.
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
    """The catalog of a packed store, or `index(root)` of a folder.

    Raises:
        CatalogError: The folder's originals cannot be listed.
        StoreError: The root is an edit store, or a packed one that cannot be opened.
    """
    packed = OriginalStore.find(root)
    return index(root, progress=progress) if packed is None else packed.catalog
