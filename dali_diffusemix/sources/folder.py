"""Folders: class folders, and published layouts as they are unpacked."""

from collections.abc import Callable, Iterator
from pathlib import Path

from dali_diffusemix.catalog.layouts import Split, read_layout
from dali_diffusemix.catalog.listing import index
from dali_diffusemix.catalog.table import Catalog
from dali_diffusemix.sources.listed import check_rows, file_content
from dali_diffusemix.sources.source import Content, Progress


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
    def of_layout(cls, layout: str, root: Path, split: str) -> "FolderSource":
        """A split of a published dataset, as `catalog.read_layout` reads it, without progress."""
        return cls(root, lambda progress: read_layout(layout, root, split))

    @property
    def name(self) -> str:
        return repr(str(self._root))

    def catalog(self, progress: Progress | None = None) -> Catalog:
        return self._found(progress).catalog

    def read(self, rows: range) -> Iterator[Content]:
        root, catalog = self._found()
        check_rows(rows, len(catalog))
        for row in rows:
            yield file_content(root / catalog.path(row))

    def _found(self, progress: Progress | None = None) -> Split:
        if self._split is None:
            self._split = self._find(progress)
        return self._split
