"""Scores of edits: columns of numbers beside the shards, which never change.

    scores/NAME/column.json          the scorer
                edits-000000.npy     (n,) float32, one for each row of the shard's .npy; NaN: no score
                            .json    scorer, edits, hash; written last: without it the shard has no scores

A shard's scores hold for its edits, not for its files: `edits` is a digest of what identifies them (`digest`). So a
copy of the store in another format keeps them, and a shard that was made again with other edits has none.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.base.files import locked, remove_temporary, write
from dali_diffusemix.errors import ConfigError, StoreError
from dali_diffusemix.store.layout import (
    ACCEPTED,
    EDITS,
    VERDICTS,
    load,
    read_json,
    understood,
    write_json,
    write_table,
    writing,
)
from dali_diffusemix.store.shards import ShardRecord

__all__ = ["RESERVED", "ScoredBy", "Scores", "copy_scores", "digest", "score_problems"]

RESERVED: Final = ("quality", "structure")
"""Names that are not given to columns: they stand for the score of an edit's verdict."""

_COLUMN, _SHARD = "dali_diffusemix.scores", "dali_diffusemix.scores.shard"
_FOLDER: Final = "scores"
_IDENTITY: Final = ("original", "prompt", "variant", "seed", "verdict")
_SCORE: Final = np.dtype("<f4")


@dataclass(frozen=True)
class ScoredBy:
    """The maker of a column. Scores by different ones are not comparable."""

    scorer: str  # as `score --with` takes it
    revision: str  # of its model or its code

    def __str__(self) -> str:
        return f"{self.scorer} ({self.revision})"


def digest(rows: NDArray[np.void]) -> str:
    """A hash of what identifies the edits of a shard, (n,) SHARD_ROW: original, prompt, variant, seed and verdict."""
    whole = hashlib.sha256()
    for name in _IDENTITY:
        whole.update(np.ascontiguousarray(rows[name]).tobytes())
    return whole.hexdigest()


@dataclass(frozen=True)
class Scores:
    """A column of scores of a store's edits; it may lack shards."""

    store: Path
    name: str
    by: ScoredBy

    @classmethod
    def names(cls, store: Path) -> tuple[str, ...]:
        """The columns of a store, sorted."""
        return tuple(sorted(file.parent.name for file in (store / _FOLDER).glob("*/column.json")))

    @classmethod
    def find(cls, store: Path, name: str) -> "Scores | None":
        """A column; None if the store has no such column.

        Raises:
            ConfigError: The name is none that a column may have.
            StoreError: Its column.json is damaged.
        """
        check_name(name)
        file = store / _FOLDER / name / "column.json"
        remedy = _again(name, "--overwrite")
        try:
            stored = read_json(file, _COLUMN, remedy)
        except FileNotFoundError:
            return None
        with understood(file, remedy):
            return cls(store, name, _scored_by(stored["scorer"]))

    @classmethod
    def open(cls, store: Path, name: str) -> "Scores":
        """A column. Raises StoreError if the store has no such column; see `find`."""
        found = cls.find(store, name)
        if found is None:
            names = cls.names(store)
            there = f"it has {', '.join(map(repr, names))}" if names else "it has none"
            raise StoreError(f"{str(store)!r}: there are no scores {name!r}, {there}; {_again(name)}.")
        return found

    @classmethod
    @contextmanager
    def adding(cls, store: Path, name: str, by: ScoredBy, *, replace: bool = False) -> Iterator["Scores"]:
        """Begin a column or resume it; in the block no other process writes it.

        Args:
            store: The store's folder.
            name: Of the column.
            by: What makes the scores of this run.
            replace: Begin again if the column was made by something else, or is damaged.

        Raises:
            ConfigError: The name is none that a column may have, or the column was made by something else.
            StoreError: Another process writes this column, it is damaged, or the folder cannot be written.
        """
        check_name(name)
        column = cls(store, name, by)
        with writing(store):
            column.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            with writing(store):
                alone = stack.enter_context(locked(column.folder / ".lock", wait=False))
            if not alone:
                raise StoreError(
                    f"{str(column.folder)!r}: another `dali-diffusemix score` writes these scores; wait for its end, "
                    "or give another name with --name."
                )
            remove_temporary(column.folder)
            found = None if replace else cls.find(store, name)
            if found is not None and found.by != by:
                raise ConfigError(
                    f"name: the scores {name!r} of {str(store)!r} were made by {found.by}, found {by}; give another "
                    "name with --name, or make them again with --overwrite."
                )
            if found is None:
                with writing(store):
                    # Scores by anything else are void from now on, see `column`.
                    write_json(column.folder / "column.json", _COLUMN, {"scorer": vars(by)})
            try:
                yield column
            except BaseException:
                if found is None and not any(column.folder.glob(f"{EDITS.images}-*")):
                    (column.folder / "column.json").unlink(
                        missing_ok=True
                    )  # a scorer that failed at once leaves nothing
                raise

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.store / _FOLDER / self.name

    def column(self, shard: int, rows: NDArray[np.void]) -> NDArray[np.float32] | None:
        """The scores of a shard.

        Args:
            shard: Its number.
            rows: (n,) SHARD_ROW of its edits.

        Returns:
            (n,) float32, NaN where an edit has no score. None if the shard was not scored, or has had other edits then.

        Raises:
            StoreError: A file is damaged.
        """
        record = self._record(shard, rows)
        return None if record is None else self._values(shard, len(rows), record)

    def complete(self, shard: int, rows: NDArray[np.void]) -> NDArray[np.float32] | None:
        """`column`, but None if it is damaged, or images could not be read when it was made: score the shard again."""
        try:
            record = self._record(shard, rows)
            return None if record is None or record["unreadable"] else self._values(shard, len(rows), record)
        except StoreError:
            return None

    def write(self, shard: int, rows: NDArray[np.void], values: NDArray[np.float32], unreadable: int) -> None:
        """Write the scores of a shard, in a block of `adding`.

        Args:
            shard: Its number.
            rows: (n,) SHARD_ROW of its edits.
            values: (n,) scores; NaN: none.
            unreadable: Number of accepted edits without a score because an image could not be read.

        Raises:
            StoreError: The disk is full, or the folder cannot be written.
        """
        json = self._file(shard, "json")
        with writing(self.store):
            json.unlink(missing_ok=True)  # it does not describe the new .npy
            entry = write_table(self._file(shard, "npy"), values.astype(_SCORE))
            content = {"scorer": vars(self.by), "edits": digest(rows), "unreadable": unreadable, "npy": entry}
            write_json(json, _SHARD, content)

    def values(self, index: NDArray[np.void]) -> NDArray[np.float32]:
        """The scores of accepted edits.

        Args:
            index: (n,) INDEX_ROW of them, as `EditStore.index` has them.

        Returns:
            (n,) float32, in the order of `index`; NaN: no score.

        Raises:
            StoreError: A shard has no scores, or a file is damaged.
        """
        values = np.full(len(index), math.nan, np.float32)
        order = np.argsort(index["shard"], kind="stable")
        shards, starts = np.unique(index["shard"][order], return_index=True)
        missing = []
        for shard, of_shard in zip(shards.tolist(), np.split(order, starts[1:]), strict=True):
            record = ShardRecord.read(EDITS, self.store, shard)
            rows = record.rows()
            column = self.column(shard, rows)
            if column is None:
                missing.append(shard)
                continue
            accepted = np.flatnonzero(rows["verdict"] == VERDICTS.index(ACCEPTED))
            # Offsets in the tar, each that of one accepted edit; ascending, as edits are written.
            offsets, wanted = rows["offset"][accepted], index["offset"][of_shard]
            place = np.minimum(np.searchsorted(offsets, wanted), len(offsets) - 1) if len(offsets) else wanted
            if not len(offsets) or (offsets[place] != wanted).any():
                raise EDITS.damaged(record.file("npy"), "does not agree with the store's index")
            values[of_shard] = column[accepted[place]]
        if missing:
            some = ", ".join(map(str, missing[:3])) + (", ..." if len(missing) > 3 else "")
            raise StoreError(
                f"{str(self.store)!r}: {len(missing)} of {len(shards)} shards have no scores {self.name!r} (shards "
                f"{some}); {_again(self.name, by=self.by)}: it scores these alone."
            )
        return values

    def _file(self, shard: int, ending: str) -> Path:
        return self.folder / EDITS.file(shard, ending)

    def _record(self, shard: int, rows: NDArray[np.void]) -> dict[str, Any] | None:
        """The .json of a shard's scores: `unreadable` and `npy`. None unless it is of this column and these edits."""
        file, remedy = self._file(shard, "json"), _again(self.name, by=self.by)
        try:
            stored = read_json(file, _SHARD, remedy)
        except FileNotFoundError:
            return None
        with understood(file, remedy):
            npy, unreadable = stored["npy"], int(stored["unreadable"])
            entry = {"bytes": int(npy["bytes"]), "sha256": str(npy["sha256"])}
            if _scored_by(stored["scorer"]) != self.by or stored["edits"] != digest(rows):
                return None
            return {"unreadable": unreadable, "npy": entry}

    def _values(self, shard: int, count: int, record: Mapping[str, Any]) -> NDArray[np.float32]:
        file = self._file(shard, "npy")
        try:
            data = file.read_bytes()
        except OSError as error:
            raise self._damaged(file, f"cannot be read ({error.strerror})") from error
        if len(data) != record["npy"]["bytes"]:
            raise self._damaged(file, f"must have {record['npy']['bytes']} bytes, found {len(data)}")
        if hashlib.sha256(data).hexdigest() != record["npy"]["sha256"]:
            raise self._damaged(file, "has changed: its SHA-256 differs")
        return np.asarray(load(EDITS, file, _SCORE, count), np.float32)

    def _damaged(self, file: Path, what: str) -> StoreError:
        return StoreError(f"{str(file)!r}: {what}; {_again(self.name, by=self.by)} to replace it.")


def check_name(name: str) -> None:
    """Raise ConfigError unless a column may have this name."""
    if not re.fullmatch(r"[a-z0-9_-]{1,64}", name) or name in RESERVED:
        raise ConfigError(
            f"name must be 1 to 64 of a to z, 0 to 9, _ and -, and none of {', '.join(RESERVED)} (the verdict's own "
            f"score), found {name!r}; give another with --name."
        )


def score_problems(store: Path) -> Iterator[tuple[str, str]]:
    """The problems of a store's columns: a file, relative to the store, and what is wrong. Missing scores are none."""
    for name in sorted(one.parent.name for one in (store / _FOLDER).glob("*/column.json")):
        try:
            scores = Scores.find(store, name)
        except (StoreError, ConfigError) as error:
            yield f"{_FOLDER}/{name}/column.json", str(error)
            continue
        assert scores is not None
        for file in sorted(scores.folder.glob(f"{EDITS.images}-*.json")):
            number = re.fullmatch(r"\w+-(\d{6,9})", file.stem)
            if number is None:
                continue
            shard = int(number[1])
            try:
                rows = ShardRecord.read(EDITS, store, shard).rows()
            except StoreError:
                continue  # a problem of the shard
            shown = f"{_FOLDER}/{name}/{EDITS.file(shard, 'npy')}"
            try:
                if scores.column(shard, rows) is None:
                    yield shown, f"is of other edits than its shard's, or by another scorer; {_again(name)}"
            except StoreError as error:
                yield shown, str(error)


def copy_scores(source: Path, store: Path) -> None:
    """Copy the columns of a store to a copy of it, but for those that are there. Raises StoreError."""
    for column in sorted((source / _FOLDER).glob("*/column.json")):
        target = store / _FOLDER / column.parent.name
        with writing(store):
            target.mkdir(parents=True, exist_ok=True)
            # The .npy of a shard before its .json.
            for file in sorted(column.parent.glob("*.*"), key=lambda file: (file.suffix == ".json", file.name)):
                if file.suffix in (".npy", ".json") and not (target / file.name).exists():
                    write(target / file.name, file.read_bytes())


def _scored_by(stored: Mapping[str, Any]) -> ScoredBy:
    return ScoredBy(str(stored["scorer"]), str(stored["revision"]))


def _again(name: str, *options: str, by: ScoredBy | None = None) -> str:
    """The remedy: the command that makes scores."""
    scorer = "SCORER" if by is None else by.scorer
    return f"run `{' '.join(['dali-diffusemix score STORE --with', scorer, '--name', name, *options])}`"
