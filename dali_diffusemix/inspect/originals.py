"""The originals of a store's edits, looked up for people and for scorers."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.errors import DecodeError, StoreError
from dali_diffusemix.generate.run import runs_log
from dali_diffusemix.images.codec import decode
from dali_diffusemix.store import EditStore, OriginalStore

__all__ = ["Originals", "last_root", "runs_of"]


class Originals:
    """The originals of a store, if they can be found."""

    def __init__(self, edits: EditStore, root: str | os.PathLike[str] | None) -> None:
        self._edits = edits
        self._root = None if root is None or not Path(root).is_dir() else Path(root)
        packed = None if self._root is None else OriginalStore.find(self._root)
        self._packed = None if packed is None else packed.reindexed(edits.catalog)

    @property
    def found(self) -> bool:
        """True if there is such a folder."""
        return self._root is not None

    def pixels(self, original: int) -> NDArray[np.uint8] | None:
        """(height, width, 3) pixels of a row of the catalog; None if it cannot be read. For several threads."""
        if self._root is None:
            return None
        try:
            if self._packed is not None:
                return decode(self._packed.encoded(original))
            return decode(self._root / self._edits.catalog.path(original))
        except (DecodeError, StoreError):
            return None  # its verdict says that


def runs_of(store: Path) -> list[dict[str, Any]]:
    """The runs that made a store; lines of their log that cannot be read are skipped."""
    runs = []
    try:
        lines = runs_log(store).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            run = json.loads(line)
        except ValueError:
            continue
        if isinstance(run, dict):
            runs.append(run)
    return runs


def last_root(runs: list[dict[str, Any]]) -> str | None:
    """The root of the last run that made edits, as its log has it."""
    roots = [run["root"] for run in runs if isinstance(run.get("root"), str)]
    return roots[-1] if roots else None
