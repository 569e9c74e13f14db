"""The originals of a store, as they are edited and shown: decoded, upright."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.catalog.table import Catalog
from dali_diffusemix.images.codec import decode
from dali_diffusemix.store import OriginalStore


class Originals:
    """The originals of a store: files under a root, or in a packed store.

    Args:
        root: The folder, or the packed store.
        catalog: Lists them.
    """

    def __init__(self, root: Path, catalog: Catalog) -> None:
        self._root, self._catalog = root, catalog
        packed = OriginalStore.find(root)
        self._packed = None if packed is None else packed.reindexed(catalog)

    def pixels(self, original: int) -> NDArray[np.uint8]:
        """An original, upright, (height, width, 3) uint8, by its row in the catalog. Raises DecodeError."""
        if self._packed is not None:
            return decode(self._packed.encoded(original))
        return decode(self._root / self._catalog.path(original))
