"""Verification of a store, shard by shard: every byte is hashed, every image decoded, every table compared.

Nothing is changed. `discard` removes the .json of damaged shards, so that the command that made them makes them again.
"""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from dali_diffusemix.base.cpus import cpus
from dali_diffusemix.base.workers import Workers
from dali_diffusemix.errors import DecodeError, StoreError
from dali_diffusemix.images.codec import decode
from dali_diffusemix.store import (
    NOT_YET,
    VERDICTS,
    DamagedShard,
    ShardRecord,
    UnfinishedStoreWarning,
    index_is_current,
    order_problems,
    shard_records,
)
from dali_diffusemix.store.scores import score_problems

__all__ = ["Problem", "Verification", "verify"]

_CHUNK = 2**22  # bytes hashed at once
_MOST = 20  # problems listed per shard


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A problem with a file of a store."""

    shard: int | None  # None: a file of the whole store
    file: str  # relative to the store
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The result of `verify`."""

    shards: int  # that were checked
    missing: int  # shards that are not finished, including those that a run left incomplete
    images: int  # that could be decoded
    bytes: int
    problems: tuple[Problem, ...]

    @property
    def damaged(self) -> tuple[int, ...]:
        """Shards with a problem."""
        return tuple(sorted({problem.shard for problem in self.problems if problem.shard is not None}))


def verify(
    path: str | os.PathLike[str],
    *,
    decoding: bool = True,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Check every byte of an edit store, or of a packed one.

    Args:
        path: Its folder.
        decoding: Decode images too, and compare their sizes.
        workers: Number of threads; one per CPU by default.
        progress: Called with the number of shards done, and of all shards.

    Raises:
        StoreError: There is no store at all.
    """
    path = Path(path).absolute()
    shards, count = shard_records(path)
    problems: list[Problem] = []
    images = 0
    with Workers(workers or cpus(), "dali-diffusemix-verify") as pool:
        for done, found in enumerate(pool.map(partial(_check, decoding), shards), 1):
            problems += found.problems
            images += found.images
            if progress is not None:
                progress(done, len(shards))
    problems += _check_whole(path)
    others = (*order_problems(path), *score_problems(path))
    problems += (Problem(shard=None, file=file, what=what) for file, what in others)
    records = [shard for shard in shards if isinstance(shard, ShardRecord)]
    return Verification(
        shards=len(shards),
        missing=count - len(shards) + sum(bool(record.verdicts[NOT_YET]) for record in records),
        images=images,
        bytes=sum(sum(record.sizes.values()) for record in records),
        problems=tuple(problems),
    )


def discard(path: str | os.PathLike[str], found: Verification) -> None:
    """Mark damaged shards as not finished. Raises StoreError if that is not permitted."""
    path = Path(path).absolute()
    shards, _ = shard_records(path)
    for shard in shards:
        if shard.number in found.damaged:
            try:
                shard.json.unlink(missing_ok=True)
            except OSError as error:
                raise StoreError(f"{str(shard.json)!r}: cannot be removed ({error.strerror}).") from error


@dataclass(frozen=True)
class _Found:
    problems: list[Problem]
    images: int


def _check(decoding: bool, shard: ShardRecord | DamagedShard) -> _Found:
    if isinstance(shard, DamagedShard):
        return _Found([Problem(shard=shard.number, file=f"shards/{shard.json.name}", what=shard.error)], 0)
    problems = list(_check_files(shard))
    if problems:
        return _Found(problems, 0)
    images = 0
    try:
        rows = shard.rows()
    except StoreError as error:
        return _Found([_problem(shard, "npy", str(error))], 0)
    for ending, wanted in (("tar", rows[rows["verdict"] == 0]), ("rejected", rows[rows["verdict"] != 0])):
        wanted = wanted[wanted["length"] > 0]
        if not len(wanted):
            continue
        with shard.file(ending).open("rb") as tar:
            for row in wanted:
                data = os.pread(tar.fileno(), int(row["length"]), int(row["offset"]))
                if decoding and (what := _undecodable(data, (int(row["height"]), int(row["width"])))):
                    problems.append(_problem(shard, ending, f"the image of original {row['original']}: {what}"))
                else:
                    images += 1
                if len(problems) >= _MOST:
                    return _Found(problems, images)
    if len(rows) and rows["verdict"].max() >= len(VERDICTS):
        problems.append(_problem(shard, "npy", f"has verdict {rows['verdict'].max()}, of {len(VERDICTS)}"))
        return _Found(problems, images)
    verdicts = {VERDICTS[code]: int((rows["verdict"] == code).sum()) for code in np.unique(rows["verdict"]).tolist()}
    if verdicts != {name: count for name, count in shard.verdicts.items() if count}:
        problems.append(_problem(shard, "npy", f"has verdicts {verdicts}, its .json says {dict(shard.verdicts)}"))
    return _Found(problems, images)


def _undecodable(data: bytes, size: tuple[int, int]) -> str | None:
    try:
        found = decode(data).shape[:2]
    except DecodeError as error:
        return str(error)
    return None if found == size else f"must have {size[0]} x {size[1]} pixels, found {found[0]} x {found[1]}"


def _check_files(shard: ShardRecord) -> Iterator[Problem]:
    for ending in shard.sizes:
        try:
            size, digest = _hashed(shard.file(ending))
        except OSError as error:
            yield _problem(shard, ending, f"cannot be read ({error.strerror})")
            continue
        if size != shard.sizes[ending]:
            yield _problem(shard, ending, f"must have {shard.sizes[ending]} bytes, found {size}")
        elif digest != shard.hashes[ending]:
            yield _problem(shard, ending, "has changed: its SHA-256 differs")


def _hashed(file: Path) -> tuple[int, str]:
    whole, size = hashlib.sha256(), 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            whole.update(chunk)
            size += len(chunk)
    return size, whole.hexdigest()


def _problem(shard: ShardRecord, ending: str, what: str) -> Problem:
    return Problem(shard=shard.number, file=str(shard.file(ending).relative_to(shard.store)), what=what)


def _check_whole(path: Path) -> Iterator[Problem]:
    """Problems that a reader would meet when it opens the store, and an index that does not match the shards."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnfinishedStoreWarning)
            current = index_is_current(path)
    except StoreError as error:
        yield Problem(shard=None, file="store.json", what=str(error))
        return
    if not current:
        yield Problem(
            shard=None, file="index.npy", what="does not match the shards; run the command that made the store again"
        )
