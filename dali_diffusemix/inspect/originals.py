"""The originals of a store's edits, looked up for people and for scorers."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.errors import ConfigError, DecodeError, StoreError
from dali_diffusemix.generate.originals import Originals
from dali_diffusemix.generate.run import runs_log
from dali_diffusemix.store import EditStore

__all__ = ["FoundOriginals", "runs_of"]


class FoundOriginals:
    """The originals of a store, if their folder can be found.

    Args:
        edits: The store.
        root: Their folder, or a packed store; by default the root of the last run that made edits.

    Raises:
        ConfigError: `root` was given and is not a folder.
    """

    def __init__(self, edits: EditStore, root: str | os.PathLike[str] | None) -> None:
        if root is not None and not Path(root).is_dir():
            raise ConfigError(f"root must be the folder of the originals, found {str(root)!r}, which is not a folder.")
        if root is None:
            roots = [run["root"] for run in runs_of(edits.path) if isinstance(run.get("root"), str)]
            root = roots[-1] if roots else None
        self.root = None if root is None else Path(root)
        """The folder that was looked for; None: no run has noted one."""
        self.found = self.root is not None and self.root.is_dir()
        """True if there is such a folder."""
        self._originals = Originals(self.root, edits.catalog) if self.root is not None and self.found else None

    def pixels(self, original: int) -> NDArray[np.uint8] | None:
        """(height, width, 3) pixels of a row of the catalog; None if it cannot be read. For several threads."""
        try:
            return None if self._originals is None else self._originals.pixels(original)
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
        except (ValueError, RecursionError):
            continue
        if isinstance(run, dict):
            runs.append(run)
    return runs
