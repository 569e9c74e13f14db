"""Orders: the edits that a store lacks, of those that a run wishes, and those to make again."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.catalog.table import Catalog
from dali_diffusemix.errors import StoreError
from dali_diffusemix.store.decisions import Decisions
from dali_diffusemix.store.index import Replaced, edit_keys
from dali_diffusemix.store.layout import (
    ACCEPTED,
    DENIED,
    EDITS,
    NOT_YET,
    ORDER_ROW,
    REJECTIONS,
    UNREADABLE,
    VERDICTS,
    WHOLE,
    Header,
    Rule,
)
from dali_diffusemix.store.selection import rejected_by_hand
from dali_diffusemix.store.shards import finished_shards

_log = logging.getLogger(__name__)
_ROUNDS: Final = np.iinfo(ORDER_ROW["round"]).max


@dataclass(frozen=True, kw_only=True)
class Wish:
    """The edits that a run wishes a store to have."""

    prompts: Mapping[str, tuple[str, ...] | None]  # to patterns of the classes that have it; None: all
    variants: int
    originals_per_shard: int  # of the shards that are added
    deny: Mapping[str, tuple[str, ...]] | None = None  # prompt to patterns of classes; None: as the store has it
    class_names: Mapping[str, str] = field(default_factory=dict)  # class to its words in an instruction

    def applied_to(self, header: Header, store: Path) -> Header:
        """The header with the wish's prompts, rules and class names, before anything is ordered.

        Raises:
            StoreError: A class has other words in the store.
        """
        for name, words in self.class_names.items():
            if (stored := header.class_names.get(name, words)) != words:
                raise StoreError(
                    f"{str(store)!r}: class_names: {name!r} is {stored!r} in the store, {words!r} asked for; keep the "
                    "store's own, or give another folder."
                )
        header = header.with_prompts(tuple(self.prompts))
        rules = {}
        for prompt in header.prompts:
            rule = header.rules.get(prompt, Rule())
            ours = prompt in self.prompts
            only = self.prompts[prompt] if ours else rule.only
            deny = rule.deny if self.deny is None else self.deny.get(prompt, () if ours else rule.deny)
            if (now := Rule(only, deny)) != Rule():
                rules[prompt] = now
        return replace(header, rules=rules, class_names={**header.class_names, **self.class_names})


@dataclass(frozen=True, kw_only=True)
class Redo:
    """Edits to make again."""

    rejected: bool = False  # by quality or by people; from new seeds
    # Those of originals that can be read now, by catalog and row; from the seeds that they would have had.
    unreadable: Callable[[Catalog, int], bool] | None = None


def ordered(
    header: Header, wish: Wish, redo: Redo | None, store: Path, catalog: Catalog
) -> tuple[Header, NDArray[np.void]]:
    """The header with all that a run wishes ordered, and the edits of its new order, (n,) ORDER_ROW; often none.

    Prompts that all classes had at first are ordered in boxes, where other edits get the verdict "denied"; prompts that
    only some classes had, edit by edit.

    Args:
        header: The store's.
        wish: The edits.
        redo: Edits to make again, unless some that were ordered one by one are not made yet.
        store: The store's folder.
        catalog: The store's.

    Raises:
        StoreError: Class names differ from the store's, an order's file or a shard's table cannot be used.
    """
    boxed_before = {header.prompts[prompt] for box in header.boxes for prompt in box.prompts}
    listed_before = set(header.prompts) - boxed_before
    header = wish.applied_to(header, store)
    listed = [
        prompt
        for prompt, only in wish.prompts.items()
        if prompt in listed_before or (only is not None and prompt not in boxed_before)
    ]
    boxed = [prompt for prompt in wish.prompts if prompt not in listed]
    header = header.with_boxes(boxed, wish.variants, len(catalog), wish.originals_per_shard)
    finder = _Finder(store, catalog, header)
    again = np.empty(0, ORDER_ROW) if redo is None else finder.again(redo)
    table = np.concatenate([finder.of_prompts(listed, wish.variants), finder.denied_before(), again])
    table = table[np.argsort(edit_keys(table), kind="stable")]
    if len(table):
        header = header.with_order(table, wish.originals_per_shard)
    return header, table


class _Finder:
    """Finds the edits to order one by one, of a header with all prompts, rules and boxes."""

    def __init__(self, store: Path, catalog: Catalog, header: Header) -> None:
        self._store, self._catalog, self._header = store, catalog, header
        self._wanted = header.wanted(catalog.classes)
        self._ordered = np.concatenate([np.empty(0, ORDER_ROW), *(order.table(store) for order in header.orders)])
        self._records = finished_shards(EDITS, store, header.shard_count)

    def of_prompts(self, prompts: Iterable[str], variants: int) -> NDArray[np.void]:
        """(n,) ORDER_ROW: the wanted edits under these prompts that were never ordered."""
        found = [np.empty(0, ORDER_ROW)]
        for prompt in map(self._header.prompts.index, prompts):
            rows = np.flatnonzero(self._wanted[self._catalog.labels, prompt])
            table = np.zeros(len(rows) * variants, ORDER_ROW)
            table["original"] = np.repeat(rows, variants)
            table["prompt"] = prompt
            table["variant"] = np.tile(np.arange(variants), len(rows))
            found.append(table)
        table = np.concatenate(found)
        return np.asarray(table[~np.isin(edit_keys(table), edit_keys(self._ordered))])

    def denied_before(self) -> NDArray[np.void]:
        """(n,) ORDER_ROW: edits that were denied and are wanted now."""
        found = self._current((DENIED,))
        found = found[self._wanted[self._catalog.labels[found["original"]], found["prompt"]]]
        return np.asarray(found[~np.isin(edit_keys(found), self._pending())])

    def again(self, redo: Redo) -> NDArray[np.void]:
        """(n,) ORDER_ROW: wanted edits to make again; none if some that were ordered one by one are not made yet."""
        if len(self._pending()):
            _log.warning(
                "Edits of an earlier order are not all made yet: this run makes them. Run it again to redo more."
            )
            return np.empty(0, ORDER_ROW)
        tables = [np.empty(0, ORDER_ROW)]
        if redo.rejected:
            rejected = self._current(REJECTIONS, by_hand=True)
            if rejected["round"].max(initial=0) >= _ROUNDS:
                raise StoreError(f"{str(self._store)!r}: an edit can be made again {_ROUNDS} times at most.")
            rejected["round"] += 1
            tables.append(rejected)
        if redo.unreadable is not None:
            unreadable = self._current((UNREADABLE,))
            originals = [
                row for row in np.unique(unreadable["original"]).tolist() if redo.unreadable(self._catalog, row)
            ]
            tables.append(unreadable[np.isin(unreadable["original"], originals)])
        table = np.concatenate(tables)
        return np.asarray(table[self._wanted[self._catalog.labels[table["original"]], table["prompt"]]])

    def _pending(self) -> NDArray[np.int64]:
        """Keys of the edits that were ordered one by one and are not made yet."""
        unfinished = {
            number
            for order in self._header.orders
            for number in order.numbers(WHOLE)
            if number not in self._records or self._records[number].verdicts[NOT_YET]
        }
        if not unfinished:
            return np.empty(0, np.int64)
        edits = [
            edit
            for order in self._header.orders
            for shard in order.shards(self._store)
            if shard.number in unfinished
            for edit in shard.listed or ()
        ]
        return edit_keys(np.array(edits, ORDER_ROW))

    def _current(self, verdicts: Sequence[str], *, by_hand: bool = False) -> NDArray[np.void]:
        """(n,) ORDER_ROW, with their last round: the edits of these verdicts, and those that people rejected."""
        replaced = Replaced(self._records, self._header)
        codes = [VERDICTS.index(verdict) for verdict in verdicts]
        names = Decisions.of(self._store).rejected() if by_hand else set()
        shards = {name.shard for name in names}
        found = [np.empty(0, ORDER_ROW)]
        for number, record in self._records.items():
            if not any(record.verdicts[verdict] for verdict in verdicts) and number not in shards:
                continue
            rows = record.checked_rows(len(self._catalog), len(self._header.prompts))
            chosen = np.isin(rows["verdict"], codes)
            if number in shards:
                of_shard = np.full(len(rows), number)
                by_people = rejected_by_hand(names, rows, of_shard, self._catalog, self._header.prompts)
                chosen |= by_people & (rows["verdict"] == VERDICTS.index(ACCEPTED))
            rows = rows[chosen & ~replaced.mask(number, rows)]
            table = np.zeros(len(rows), ORDER_ROW)
            for column in ("original", "prompt", "variant"):
                table[column] = rows[column]
            found.append(table)
        table = np.concatenate(found)
        if len(table) and len(self._ordered):
            # Orders come in the order of their rounds: the last one counts.
            rounds = dict(zip(edit_keys(self._ordered).tolist(), self._ordered["round"].tolist(), strict=True))
            table["round"] = [rounds.get(key, 0) for key in edit_keys(table).tolist()]
        return table
