"""Datasets of Hugging Face's library, whose images are read as files and not decoded."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from dali_diffusemix.catalog.table import Catalog
from dali_diffusemix.errors import ConfigError, DecodeError, MissingDependencyError
from dali_diffusemix.images.formats import measure
from dali_diffusemix.sources.columns import Column, Columns, LabelChoice, choose
from dali_diffusemix.sources.listed import Listed, ListedSource, Positions, file_content
from dali_diffusemix.sources.source import Content, Progress

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH: Final = 32  # rows in memory


def refuse_unless_a_split(given: object) -> None:
    """Raise ConfigError for several splits, and for a stream."""
    kind = _class_of(given)
    if kind in ("DatasetDict", "IterableDatasetDict") and isinstance(given, Mapping):
        splits = ", ".join(map(repr, given))
        first = next(iter(given), "train")
        raise ConfigError(
            f"the source must be one split, found a {kind} of {splits}; give one of them, as dataset[{first!r}]."
        )
    if kind == "IterableDataset":
        raise ConfigError(
            "the source must be a Dataset, whose rows can be read in any order, found an IterableDataset; load it with "
            "streaming=False, or materialise it with Dataset.from_generator."
        )


def is_dataset(given: object) -> bool:
    """True for a `datasets.Dataset`; nothing is imported to tell."""
    return _class_of(given) == "Dataset"


def _class_of(given: object) -> str | None:
    """The name of the class of `datasets` that an object is of, if any."""
    names = {
        "datasets.arrow_dataset": "Dataset",
        "datasets.iterable_dataset": "IterableDataset",
    }
    for one in type(given).__mro__:
        if one.__module__ == "datasets.dataset_dict" and one.__name__ in ("DatasetDict", "IterableDatasetDict"):
            return one.__name__
        if names.get(one.__module__) == one.__name__:
            return one.__name__
    return None


class HuggingFaceSource(ListedSource):
    """The rows of a `datasets.Dataset`. A row's path is its number, padded with zeros.

    Args:
        dataset: The dataset; its format and transform are ignored.
        image: The column of images; None: the one with images.
        label: The column of labels; None: the one with names of classes; False: none.

    Raises:
        ConfigError: The columns are ambiguous.
        MissingDependencyError: datasets cannot be imported.
    """

    def __init__(self, dataset: "Dataset", image: str | None = None, label: LabelChoice = None) -> None:
        self._count = len(dataset)
        columns = [_column(name, feature) for name, feature in dataset.features.items()]
        self._columns: Columns = choose(self.name, columns, image, label)
        plain = dataset.with_format(None).select_columns(self._columns.names)
        if self._columns.image.kind == "image":
            try:
                from datasets import Image
            except ImportError as error:
                raise MissingDependencyError(
                    f"Hugging Face datasets cannot be imported ({error}); run "
                    "`pip install 'dali-diffusemix[huggingface]'`."
                ) from error
            plain = plain.cast_column(self._columns.image.name, Image(decode=False))
        self._rows = plain
        self._positions = Positions()

    @property
    def name(self) -> str:
        return f"datasets.Dataset of {self._count} rows"

    def _list(self, progress: Progress | None) -> Catalog:
        label, digits = self._columns.label, len(str(max(self._count - 1, 0)))
        listed = Listed(labelled=label is not None, classes=None if label is None else label.classes)
        self._positions = Positions()
        for start in range(0, self._count, _BATCH):
            batch = self._rows[start : start + _BATCH]
            cells = batch[self._columns.image.name]
            labels = [None] * len(cells) if label is None else batch[label.name]
            for row, (cell, value) in enumerate(zip(cells, labels, strict=True), start):
                content = content_of(cell)
                size = f"It has no usable image: {content}" if isinstance(content, Exception) else measure(content)
                if listed.add(f"{row:0{digits}}", f"row {row}", size, value):
                    self._positions.append(row)
            if progress is not None:
                progress(start + len(cells), self._count)
        return listed.catalog(self.name)

    def read(self, rows: range) -> Iterator[Content]:
        self.catalog()
        positions = self._positions.of(rows)
        for start in range(0, len(positions), _BATCH):
            batch = self._rows[positions[start : start + _BATCH].tolist()]
            yield from map(content_of, batch[self._columns.image.name])


def content_of(cell: bytes | Mapping[str, Any] | None) -> bytes | DecodeError:
    """The file's bytes of an image as Hugging Face stores it: bytes, or a path to a local file."""
    if isinstance(cell, bytes):
        return cell
    content, path = (None, None) if cell is None else (cell.get("bytes"), cell.get("path"))
    if content is not None:
        return bytes(content)
    if not path:
        return DecodeError("neither its bytes nor a path are there; remove the row.")
    return file_content(str(path))


def _column(name: str, feature: Any) -> Column:
    kind = type(feature).__name__
    if isinstance(feature, dict) and "bytes" in feature:
        return Column(name=name, kind="file", type="a struct of bytes and path")
    dtype = str(getattr(feature, "dtype", ""))
    if kind == "Image":
        return Column(name=name, kind="image", type=kind)
    if kind == "ClassLabel":
        names = None if feature.names is None else tuple(feature.names)
        return Column(name=name, kind="integer", type=kind, classes=names)
    if kind == "Value" and dtype.startswith(("int", "uint")):
        return Column(name=name, kind="integer", type=dtype)
    if kind == "Value" and dtype in ("string", "large_string"):
        return Column(name=name, kind="text", type=dtype)
    if kind == "Value" and dtype in ("binary", "large_binary"):
        return Column(name=name, kind="binary", type=dtype)
    return Column(name=name, kind="other", type=dtype or kind)
