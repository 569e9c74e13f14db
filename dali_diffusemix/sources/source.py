"""The protocol that every source follows."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.catalog.table import Catalog
from dali_diffusemix.errors import DecodeError

Content: TypeAlias = bytes | NDArray[np.uint8] | DecodeError
"""An image: its file's bytes as they are, its upright (height, width, 3) uint8 pixels, or why it cannot be read."""

Progress: TypeAlias = Callable[[int, int], None]
"""Called with what is done and with all that there is to do: rows, and for tars their bytes."""


@runtime_checkable
class Source(Protocol):
    """Originals from somewhere: listed once, then read in the order of the list."""

    @property
    def name(self) -> str:
        """A short description, for messages."""

    @property
    def pixels(self) -> bool:
        """True if `read` yields pixels; else files."""

    @property
    def folders(self) -> Sequence[Path]:
        """Folders in which no other may be made: it would be listed as part of the source."""

    def catalog(self, progress: Progress | None = None) -> Catalog:
        """Every usable image: a path that identifies it, its label, its upright size. A second call lists nothing.

        `rejected` has every unusable one, by file and row, with the reason. The paths are relative, unique, and the
        same whenever the same originals are listed; only those of folders name files.

        Raises CatalogError: the source cannot be read, or no image is usable. ConfigError: columns are ambiguous.
        """

    def read(self, rows: range) -> Iterator[Content]:
        """The content of these rows of the catalog, in order; lists the source first if it was not listed.

        Beginning anywhere is cheap: nothing before the first row is read, except in a compressed tar, and in the row
        group of a Parquet file. An image that can no longer be read is a DecodeError, which is yielded, not raised.

        Raises IndexError: there are no such rows. ValueError: the range goes down.
        """
