"""The index of a store: one table of all accepted images, derived from the shards."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.catalog.table import Catalog
from dali_diffusemix.store.layout import (
    ACCEPTED,
    EDITS,
    FILES,
    INDEX,
    INDEX_ROW,
    NOT_YET,
    VERDICTS,
    WHOLE,
    Header,
    Kind,
    Sizes,
    load,
    read_json,
    understood,
    write_json,
)
from dali_diffusemix.store.shards import ShardRecord


@dataclass(frozen=True, kw_only=True)
class IndexRecord:
    """The content of index.json: the shards that an edit store's index.npy and starts.npy were derived from."""

    edits: int
    originals: int
    sizes: Sizes
    not_yet: int = 0  # edits that these shards lack, since their run was stopped

    @classmethod
    def read(cls, store: Path) -> "IndexRecord":
        """Read it. Raises FileNotFoundError, StoreError."""
        file, remedy = store / "index.json", f"remove it and run `{EDITS.command}` again"
        stored = read_json(file, INDEX, remedy)
        with understood(file, remedy):
            return cls(
                edits=int(stored["edits"]),
                originals=int(stored["originals"]),
                sizes=sizes_of(stored["shards"]),
                not_yet=int(stored.get("not_yet", 0)),
            )

    def write(self, store: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
        """Write it, with the entries of the two tables."""
        shards = [[number, *sizes] for number, sizes in self.sizes.items()]
        content = {"edits": self.edits, "originals": self.originals, "files": files, "shards": shards}
        content |= {"not_yet": self.not_yet} if self.not_yet else {}
        write_json(store / "index.json", INDEX, content)


def sizes_of(shards: Sequence[Sequence[Any]]) -> Sizes:
    """The sizes in index.json: lists of a shard's number and the bytes of each of FILES. Raises ValueError."""
    sizes = {int(number): tuple(map(int, sizes)) for number, *sizes in shards}
    for number, of_shard in sizes.items():
        if not 0 <= number < 2**31 or len(of_shard) != len(FILES) or min(of_shard) < 0:
            raise ValueError(f"shard {number} has sizes {of_shard}")
    return sizes


@dataclass(frozen=True, kw_only=True)
class EditIndex:
    """The accepted edits of some shards, sorted by original, prompt and variant."""

    rows: NDArray[np.void]  # (edits,) INDEX_ROW
    starts: NDArray[np.int64]  # (originals + 1,) the edits of original i are starts[i] to starts[i + 1]
    sizes: Sizes
    not_yet: int = 0  # edits that these shards lack

    @property
    def shards(self) -> tuple[int, ...]:
        """Numbers of the shards."""
        return tuple(self.sizes)

    @classmethod
    def open(cls, store: Path, originals: int, shards: Sequence[int]) -> "EditIndex | None":
        """Map the store's own index; None unless it is of these shards. Raises StoreError."""
        try:
            record = IndexRecord.read(store)
        except FileNotFoundError:
            return None
        if list(record.sizes) != list(shards) or record.originals != originals:
            return None
        rows = load(EDITS, store / "index.npy", INDEX_ROW, record.edits, mapped=True)
        starts = load(EDITS, store / "starts.npy", np.dtype("<i8"), originals + 1, mapped=True)
        if starts[0] != 0 or starts[-1] != record.edits or (starts[1:] < starts[:-1]).any():
            found = f"{starts[0]} to {starts[-1]}" if (starts[1:] >= starts[:-1]).all() else "some that go down"
            raise EDITS.damaged(store / "starts.npy", f"must run up from 0 to {record.edits}, found {found}")
        return cls(rows=rows, starts=starts, sizes=record.sizes, not_yet=record.not_yet)

    @classmethod
    def derive(cls, records: Mapping[int, ShardRecord], header: Header, originals: int) -> "EditIndex":
        """Derive the index of these shards in memory. Raises StoreError."""
        rows = gather(EDITS, records, originals, Replaced(records, header))
        key = edit_keys(rows)
        if (key[1:] < key[:-1]).any():  # shards of one segment come sorted already
            rows = rows[np.argsort(key, kind="stable")]
        starts = np.searchsorted(rows["original"], np.arange(originals + 1)).astype(np.int64)
        for table in (rows, starts):
            table.flags.writeable = False
        return cls(
            rows=rows,
            starts=starts,
            sizes={number: record.indexed_sizes for number, record in records.items()},
            not_yet=sum(record.verdicts[NOT_YET] for record in records.values()),
        )


class Replaced:
    """The edits of a store's shards that later shards made again.

    Args:
        records: The finished shards.
        header: The store's.

    Raises:
        StoreError: A shard that made edits again cannot be read.
    """

    def __init__(self, records: Mapping[int, ShardRecord], header: Header) -> None:
        keys, numbers = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for order in header.orders:
            for number in order.numbers(WHOLE):
                if number in records:
                    rows = records[number].rows()
                    made = rows[rows["verdict"] != VERDICTS.index(NOT_YET)]
                    keys.append(edit_keys(made))
                    numbers.append(np.full(len(made), number, np.int64))
        # The last shard that has an edit is the one that counts.
        self._keys, first = np.unique(np.concatenate(keys)[::-1], return_index=True)
        self._last = np.concatenate(numbers)[::-1][first]

    def mask(self, number: int, rows: NDArray[np.void]) -> NDArray[np.bool_]:
        """(n,) True for the rows of a shard, (n,) SHARD_ROW or INDEX_ROW, that a later shard replaces."""
        if not len(self._keys):
            return np.zeros(len(rows), np.bool_)
        keys = edit_keys(rows)
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.asarray((self._keys[place] == keys) & (self._last[place] > number))


def edit_keys(rows: NDArray[np.void]) -> NDArray[np.int64]:
    """(n,) int64: one number for each original, prompt and variant, in their order."""
    return np.asarray(
        (rows["original"].astype(np.int64) << 32) | (rows["prompt"].astype(np.int64) << 16) | rows["variant"], np.int64
    )


def gather(
    kind: Kind, records: Mapping[int, ShardRecord], originals: int, replaced: Replaced | None = None
) -> NDArray[np.void]:
    """(accepted,) rows of the index, shard after shard, without replaced ones. Raises StoreError."""
    index = np.empty(sum(record.verdicts[ACCEPTED] for record in records.values()), kind.index_row)
    filled = 0
    for record in records.values():
        rows = record.accepted(originals)
        if replaced is not None:
            rows = rows[~replaced.mask(record.number, rows)]
        index[filled : filled + len(rows)] = rows
        filled += len(rows)
    return index[:filled]


def tally(records: Mapping[int, ShardRecord], header: Header, catalog: Catalog) -> NDArray[np.int64]:
    """(classes, prompts, verdicts) the number of edits in these shards. Raises StoreError."""
    shape = (len(catalog.classes), len(header.prompts), len(VERDICTS))
    counts = np.zeros(math.prod(shape), np.int64)
    replaced = Replaced(records, header)
    for record in records.values():
        rows = record.checked_rows(len(catalog), len(header.prompts))
        rows = rows[~replaced.mask(record.number, rows)]
        cells = (catalog.labels[rows["original"]], rows["prompt"], rows["verdict"])
        counts += np.bincount(np.ravel_multi_index(cells, shape), minlength=len(counts))
    return counts.reshape(shape)
