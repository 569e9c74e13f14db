"""Folders: class folders, and published layouts as they are unpacked."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from dali_diffusemix.base.workers import Workers
from dali_diffusemix.catalog.layouts import Split, read_layout
from dali_diffusemix.catalog.listing import index
from dali_diffusemix.catalog.table import Catalog
from dali_diffusemix.sources.listed import check_rows, file_content
from dali_diffusemix.sources.source import Content, Progress

_AT_ONCE: Final = 8  # files that are read at the same time


class FolderSource:
    """Image files below a root.

    Args:
        root: The folder, for messages.
        find: Lists the images, with paths below the split's own root.
    """

    def __init__(self, root: Path, find: Callable[[Progress | None], Split]) -> None:
        self._root = root
        self._find = find
        self._split: Split | None = None

    @classmethod
    def of_classes(cls, root: Path) -> "FolderSource":
        """The images root/class/**/image, as `catalog.index` lists and remembers them."""
        return cls(root, lambda progress: Split(root, index(root, progress=progress)))

    @classmethod
    def of_catalog(cls, root: Path, catalog: Catalog) -> "FolderSource":
        """The images that a catalog lists."""
        return cls(root, lambda progress: Split(root, catalog))

    @classmethod
    def of_layout(cls, layout: str, root: Path, split: str) -> "FolderSource":
        """A split of a published dataset, as `catalog.read_layout` reads it, without progress."""
        return cls(root, lambda progress: read_layout(layout, root, split))

    pixels = False

    @property
    def folders(self) -> Sequence[Path]:
        return (self._root,)

    @property
    def name(self) -> str:
        return repr(str(self._root))

    def catalog(self, progress: Progress | None = None) -> Catalog:
        return self._found(progress).catalog

    def read(self, rows: range) -> Iterator[Content]:
        root, catalog = self._found()
        check_rows(rows, len(catalog))
        # Some are read ahead, at once: storage may be slow.
        with Workers(_AT_ONCE, "dali-diffusemix-source") as threads:
            for start in range(rows.start, rows.stop, 4 * _AT_ONCE):
                some = rows[start - rows.start : start - rows.start + 4 * _AT_ONCE]
                yield from threads.map(lambda row: file_content(root / catalog.path(row)), some)

    def _found(self, progress: Progress | None = None) -> Split:
        if self._split is None:
            self._split = self._find(progress)
        return self._split
