"""Scores of edits by CLIP, or by a function of the user's: a number for each accepted edit and its original.

The numbers go into a column of the store (`store.scores`), and `DiffuseMixDataset(min_score=...)` selects edits by it.
"""

import hashlib
import importlib
import math
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dali_diffusemix.base.cpus import cpus
from dali_diffusemix.base.workers import Result, Workers
from dali_diffusemix.errors import ConfigError, DecodeError
from dali_diffusemix.images.codec import decode
from dali_diffusemix.inspect.originals import FoundOriginals
from dali_diffusemix.store import VERDICTS, EditStore
from dali_diffusemix.store.layout import ACCEPTED
from dali_diffusemix.store.scores import ScoredBy, Scores

__all__ = ["ScoreFunction", "Scored", "Scorer", "load_scorer", "score"]

_Picture: TypeAlias = NDArray[np.uint8]
ScoreFunction: TypeAlias = Callable[
    [Sequence[_Picture], Sequence[_Picture], Sequence[str]], Sequence[float] | NDArray[np.floating[Any]]
]
"""From n originals, their n edits and the names of their n classes to n scores; higher is better.

Images are (height, width, 3) uint8 RGB; an original is resized to its edit's size, as it was for the editor. Pairs may
differ in size. A score is any finite number, or NaN for none.
"""

_TRIED: Final = 8  # originals, before any scoring


@dataclass(frozen=True)
class Scorer:
    """A function that scores edits, and what identifies it."""

    by: ScoredBy
    function: ScoreFunction

    @property
    def default_name(self) -> str:
        """The name of its column unless another is given."""
        kind, _, rest = self.by.scorer.partition(":")
        return re.sub(r"[^a-z0-9_-]", "-", (kind if kind == "clip" else rest).lower())


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The scores of a store's edits."""

    name: str
    by: ScoredBy
    values: NDArray[np.float32]  # (edits,) of all in use that have a score, ascending
    made: int  # edits that this run scored, or tried to
    unreadable: int  # accepted edits without a score, because they or their original cannot be read

    def keeping(self, share: float) -> float:
        """The largest threshold that keeps at least this share of the scored edits; NaN if there are none."""
        count = len(self.values)
        return float(self.values[count - max(1, math.ceil(share * count - 1e-9))]) if count else math.nan


def load_scorer(given: str) -> Scorer:
    """Load a scorer.

    Args:
        given: `clip:MODEL`, a hub id or a folder: the similarity of both images to CLIP. Or `module:function`, a
            `ScoreFunction`; the current folder is searched, too. Of a class, an object is made once, without arguments,
            and called. The function or object may have `revision`, a text that identifies its model; otherwise the
            module's file does.

    Raises:
        ConfigError: There is no such model or function.
        MissingDependencyError: A package that CLIP needs is not installed.
    """
    if given.startswith("clip:"):
        from dali_diffusemix.inspect.clip import ClipSimilarity

        similarity = ClipSimilarity(given.removeprefix("clip:"))
        return Scorer(ScoredBy(f"clip:{similarity.model}", similarity.revision), similarity)
    match = re.fullmatch(r"(\w+(?:\.\w+)*):(\w+)", given)
    if match is None:
        raise ConfigError(
            f"scorer must be clip:MODEL or module:function, found {given!r}; write "
            "clip:openai/clip-vit-large-patch14, or my_scorer:agreement for a function of my_scorer.py."
        )
    module = _imported(match[1], given)
    function: Any = getattr(module, match[2], None)
    if isinstance(function, type):
        function = function()
    if not callable(function):
        raise ConfigError(
            f"scorer: {given!r} must name a function of {match[1]} ({getattr(module, '__file__', 'built in')}), found "
            f"{'none' if function is None else type(function).__name__}; correct the name."
        )
    revision = getattr(function, "revision", None)
    if revision is None:
        file = getattr(module, "__file__", None)
        if file is None:
            raise ConfigError(f"scorer: {given!r} must have `revision`, a text, since its module has no file; set one.")
        revision = f"sha256:{hashlib.sha256(Path(file).read_bytes()).hexdigest()}"
    if not isinstance(revision, str) or not revision:
        raise ConfigError(f"scorer: the `revision` of {given!r} must be a text, found {revision!r}.")
    return Scorer(ScoredBy(given, revision), function)


def _imported(name: str, given: str) -> Any:
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
        importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # something that the user's module imports
        raise ConfigError(
            f"scorer: the module of {given!r} must be in the current folder ({here}) or installed, found none; correct "
            "the name, or run the command where the file is."
        ) from error


def score(
    store: str | os.PathLike[str],
    scorer: Scorer | str,
    *,
    name: str | None = None,
    root: str | os.PathLike[str] | None = None,
    replace: bool = False,
    batch_size: int = 64,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scored:
    """Score a store's accepted edits. Call again to resume an interrupted run, or to score edits made since.

    Shards whose scores are damaged, or in which an image could not be read, are scored again.

    Args:
        store: The edit store's folder.
        scorer: What `load_scorer` returned, or what it takes.
        name: The column's name: a to z, 0 to 9, _ and -. By default "clip" or the function's name.
        root: The originals, a folder or a packed store; by default the root of the last run that made edits.
        replace: Score all edits again if another scorer made the column, or even if this one did.
        batch_size: Most pairs given to the scorer at once.
        workers: Number of threads that read and decode; one per CPU by default.
        progress: Called with the number of edits scored, and of all.

    Raises:
        StoreError: There is no such store, another process writes these scores, or the folder cannot be written.
        ConfigError: The originals cannot be found, the column was made by another scorer, or the scorer is none, or
            does not return a finite number or NaN for each pair.
        MissingDependencyError: See `load_scorer`.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, found {batch_size}.")
    edits = EditStore.open(store)
    if edits.mirror is not None:
        raise ConfigError(f"store must be a folder, found {str(store)!r}; score it where it is made, then upload it.")
    originals = FoundOriginals(edits, root)
    _check_root(edits, originals)
    scorer = load_scorer(scorer) if isinstance(scorer, str) else scorer
    name = scorer.default_name if name is None else name
    values: list[NDArray[np.float32]] = []
    used = _used(edits)
    left: list[int] = []
    made = unreadable = total = to_make = 0
    with (
        Scores.adding(edits.path, name, scorer.by, replace=replace) as column,
        Workers(workers or cpus(), "dali-diffusemix-score") as pool,
    ):
        for shard in edits.shards:
            rows = edits.shard_rows(shard)
            done = None if replace else column.complete(shard, rows)
            accepted = int(_accepted(rows).sum())
            total += accepted
            if done is None:
                left.append(shard)
                to_make += accepted
            else:
                values.append(done[np.isfinite(done) & used(shard, rows)])
        before = total - to_make
        if progress is not None:
            progress(before, total)
        for shard in left:
            task = _ShardTask(edits, originals, shard, edits.shard_rows(shard))
            scores = np.full(len(task.rows), math.nan, np.float32)
            for batch in task.batches(pool, batch_size):
                scores[[pair.row for pair in batch]] = _call(scorer, batch)
                if progress is not None:
                    progress(before + made + task.done, total)
            column.write(shard, task.rows, scores, task.unreadable)
            values.append(scores[np.isfinite(scores) & used(shard, task.rows)])
            made, unreadable = made + task.done, unreadable + task.unreadable
            if progress is not None:
                progress(before + made, total)
    everything = np.sort(np.concatenate(values)) if values else np.zeros(0, np.float32)
    return Scored(name=name, by=scorer.by, values=everything, made=made, unreadable=unreadable)


def _check_root(edits: EditStore, originals: FoundOriginals) -> None:
    root = originals.root
    if not originals.found:
        what = "no note of it beside the store" if root is None else f"{str(root)!r}, which is no folder"
        raise ConfigError(f"root must be the folder of the originals, found {what}; give it as --root.")
    tried = np.unique(edits.index["original"][np.linspace(0, len(edits) - 1, min(_TRIED, len(edits))).astype(int)])
    if len(tried) and all(originals.pixels(int(original)) is None for original in tried):
        raise ConfigError(
            f"root must be the folder of the originals, found {str(root)!r}, in which none of {len(tried)} tried can "
            f"be read (the first is {edits.catalog.path(int(tried[0]))!r}); give the right one as --root."
        )


def _used(edits: EditStore) -> Callable[[int, NDArray[np.void]], NDArray[np.bool_]]:
    """Tells (n,) rows of a shard that are used: not replaced, not rejected by hand, wanted by the rules."""
    index = edits.index
    order = np.argsort(index["shard"], kind="stable")
    shards, starts = np.unique(index["shard"][order], return_index=True)
    offsets = dict(zip(shards.tolist(), np.split(index["offset"][order], starts[1:]), strict=False))
    return lambda shard, rows: _accepted(rows) & np.isin(rows["offset"], offsets.get(shard, ()))


def _accepted(rows: NDArray[np.void]) -> NDArray[np.bool_]:
    return np.asarray(rows["verdict"] == VERDICTS.index(ACCEPTED))


class _Pair(NamedTuple):
    row: int  # of the shard
    original: _Picture
    edit: _Picture
    label: str


class _ShardTask:
    """The pairs of one shard, read ahead."""

    def __init__(self, edits: EditStore, originals: FoundOriginals, shard: int, rows: NDArray[np.void]) -> None:
        self.rows = rows
        self.done = 0  # accepted edits that were read, or could not be
        self.unreadable = 0
        self._edits, self._originals, self._shard = edits, originals, shard

    def batches(self, pool: Workers, size: int) -> Iterator[list[_Pair]]:
        """Batches of at most `size` pairs."""
        pairs = self._pairs(pool, size)
        while batch := list(islice(pairs, size)):
            yield batch

    def _pairs(self, pool: Workers, ahead: int) -> Iterator[_Pair]:
        accepted = np.flatnonzero(_accepted(self.rows))
        waiting: deque[tuple[int, Result[list[_Pair]]]] = deque()
        # By original, so that each is decoded once.
        groups = np.split(accepted, np.flatnonzero(np.diff(self.rows["original"][accepted])) + 1)
        for group in [*groups, None]:
            if group is not None:
                waiting.append((len(group), pool.submit(partial(self._read, group))))
            while waiting and (group is None or sum(count for count, _ in waiting) > 2 * ahead):
                count, result = waiting.popleft()
                pairs = result.get()
                self.done += count
                self.unreadable += count - len(pairs)
                yield from pairs

    def _read(self, group: NDArray[np.int64]) -> list[_Pair]:
        """The pairs of one original, without those that cannot be read."""
        if not len(group):
            return []
        catalog, number = self._edits.catalog, int(self.rows["original"][group[0]])
        original = self._originals.pixels(number)
        if original is None:
            return []
        pairs, at_size = [], dict[tuple[int, int], _Picture]()
        for row in group.tolist():
            data = self._edits.encoded_row(self._shard, self.rows[row])
            try:
                edit = decode(data or b"")
            except DecodeError:
                continue
            height, width = edit.shape[:2]
            if (height, width) not in at_size:
                resized = Image.fromarray(original).resize((width, height), Image.Resampling.BICUBIC)
                at_size[height, width] = np.asarray(resized)
            label = catalog.classes[int(catalog.labels[number])]
            pairs.append(_Pair(row, at_size[height, width], edit, label))
        return pairs


def _call(scorer: Scorer, batch: Sequence[_Pair]) -> NDArray[np.float32]:
    _, originals, edits, labels = map(list, zip(*batch, strict=True))
    given: Any = scorer.function(originals, edits, labels)
    try:
        found = np.asarray(given, np.float32)
    except (TypeError, ValueError) as error:
        raise _wrong(scorer, len(batch), f"{type(given).__name__} ({error})") from error
    if found.shape != (len(batch),):
        raise _wrong(scorer, len(batch), f"an array of shape {found.shape}")
    if np.isinf(found).any():
        raise _wrong(scorer, len(batch), "an infinite one")
    return found


def _wrong(scorer: Scorer, count: int, found: str) -> ConfigError:
    return ConfigError(
        f"scorer: {scorer.by.scorer!r} must return {count} numbers for {count} pairs, each finite or NaN, found "
        f"{found}; correct it. Shards that were scored are kept."
    )
