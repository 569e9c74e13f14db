"""Selection: the edits of a store that are used, of those that are there."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.base.words import did_you_mean
from dali_diffusemix.catalog.table import Catalog
from dali_diffusemix.errors import ConfigError
from dali_diffusemix.store.decisions import EditName
from dali_diffusemix.store.index import edit_keys
from dali_diffusemix.store.layout import Rule

_SHOWN: Final = 10  # classes that an error names
_NUMBER: Final = (int, float, np.integer, np.floating)


def rejected_by_hand(
    names: Collection[EditName],
    rows: NDArray[np.void],
    shards: NDArray[np.int64],
    catalog: Catalog,
    prompts: Sequence[str],
) -> NDArray[np.bool_]:
    """(n,) True for the rows, (n,) SHARD_ROW or INDEX_ROW in these shards, (n,), that the names name."""
    if not names:
        return np.zeros(len(rows), np.bool_)
    paths = {name.path for name in names}
    row_of = {path: row for row, path in enumerate(catalog.paths) if path in paths}
    prompt_of = {prompt: place for place, prompt in enumerate(prompts)}
    known = [
        (row_of[name.path] << 32 | prompt_of[name.prompt] << 16 | name.variant, name.shard)
        for name in names
        if name.path in row_of and name.prompt in prompt_of and 0 <= name.variant < 2**15
    ]
    keys = edit_keys(rows)
    mask = np.isin(keys, np.array([key for key, _ in known], np.int64))
    found, places = set(known), np.flatnonzero(mask)
    mask[places] = [pair in found for pair in zip(keys[places].tolist(), shards[places].tolist(), strict=True)]
    return mask


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The edits to use of those that a store offers.

    Args:
        prompts: Only edits under these; None: under all.
        exclude: Prompts to leave out; or patterns of classes to the prompts to leave out for them.
        min_score: The least score, of quality; or the names of scores to the least of each.
    """

    prompts: Collection[str] | None = None
    exclude: Collection[str] | Mapping[str, Collection[str]] = ()
    min_score: float | Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        excluded = self.exclude if isinstance(self.exclude, Mapping) else {"*": self.exclude}
        for name, given in (("prompts", self.prompts), *(("exclude", one) for one in excluded.values())):
            if isinstance(given, str):
                raise ConfigError(f"{name} must be prompts, found the text {given!r}; write [{given!r}].")
            if not isinstance(given, Collection) and (name, given) != ("prompts", None):
                raise ConfigError(f"{name} must be prompts, found {given!r}; write a list, or leave it out.")
        for least in self.least.values():
            if isinstance(least, bool) or not isinstance(least, _NUMBER) or not np.isfinite(least):
                raise ConfigError(f"min_score must be numbers, found {least!r}.")

    @property
    def least(self) -> dict[str, float]:
        """Name of a score to the least; "quality" is that of the verdict."""
        if self.min_score is None:
            return {}
        return dict(self.min_score) if isinstance(self.min_score, Mapping) else {"quality": self.min_score}

    def table(self, store: Path, prompts: Sequence[str], classes: Sequence[str]) -> NDArray[np.bool_]:
        """(classes, prompts) True where edits may be used.

        Raises:
            ConfigError: The store has no such prompt, or no such class.
        """
        table = np.ones((len(classes), len(prompts)), np.bool_)
        if self.prompts is not None:
            table[:] = False
            table[:, _places("prompts", store, self.prompts, prompts)] = True
        excluded = self.exclude if isinstance(self.exclude, Mapping) else {"*": self.exclude}
        for pattern, names in excluded.items():
            places = np.array(_places("exclude", store, names, prompts), np.int64)
            applies = Rule(only=(pattern,)).applies(classes)
            if len(places) and not applies.any():
                raise ConfigError(
                    f"exclude must name classes of {str(store)!r}, or patterns of them, found {pattern!r}; these are "
                    f"{', '.join(map(repr, classes[:_SHOWN]))}{', ...' if len(classes) > _SHOWN else ''}."
                )
            table[np.ix_(applies, places)] = False
        return table


def _places(name: str, store: Path, given: Collection[str], prompts: Sequence[str]) -> list[int]:
    if unknown := [prompt for prompt in given if prompt not in prompts]:
        raise ConfigError(
            f"{name} must be prompts of {str(store)!r}, found {unknown[0]!r}; these are {list(prompts)}"
            f"{did_you_mean(unknown[0], prompts)}"
        )
    return [prompts.index(prompt) for prompt in given]
