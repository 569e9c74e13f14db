"""Parquet: files with a column of images and, as a rule, one of labels."""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from dali_diffusemix.catalog.table import Catalog
from dali_diffusemix.errors import CatalogError, DecodeError, MissingDependencyError
from dali_diffusemix.images.formats import measure
from dali_diffusemix.sources.columns import Column, Columns, LabelChoice, choose
from dali_diffusemix.sources.files import File, name_of
from dali_diffusemix.sources.listed import Listed, ListedSource, Positions, file_content
from dali_diffusemix.sources.source import Content, Progress

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

Batch: TypeAlias = "pyarrow.RecordBatch"

_BATCH: Final = 32  # rows in memory
_BUFFER: Final = 1 << 20  # bytes of each column, read at once


class ParquetSource(ListedSource):
    """The rows of Parquet files, in order. A row's path is FILE/ROW: the file's name, and the row padded with zeros.

    A path in a struct of bytes and path counts only where there are no bytes; it is relative to the file's folder.

    Args:
        files: The files, which must have the same columns.
        image: The column of images; None: the one with images.
        label: The column of labels; None: the one with names of classes, or with a usual name; False: none.
        folders: See `Source.folders`.

    Raises MissingDependencyError: pyarrow cannot be imported.
    """

    def __init__(
        self, files: list[File], image: str | None = None, label: LabelChoice = None, folders: Sequence[Path] = ()
    ) -> None:
        self.folders = tuple(folders)
        _pyarrow()
        self._files = files
        self._image, self._label = image, label
        self._columns: Columns | None = None
        self._starts: list[int] = []  # the number of the first row of each file, counted over all
        self._positions = Positions()

    @property
    def name(self) -> str:
        return name_of(self._files)

    def _list(self, progress: Progress | None) -> Catalog:
        counts, damaged = self._open_all()
        columns = self._columns
        if columns is None:
            raise CatalogError(f"{self.name}: none of its files can be read. {damaged[self._files[0]]}")
        label = columns.label
        listed = Listed(labelled=label is not None, classes=None if label is None else label.classes)
        self._positions, self._starts, start, total = Positions(), [], 0, sum(counts)
        for file, count in zip(self._files, counts, strict=True):
            self._starts.append(start)
            if file in damaged:
                listed.reject(file.shown, damaged[file])
            else:
                self._list_file(file, count, start, total, columns, listed, progress)
            start += count
        return listed.catalog(self.name)

    def _open_all(self) -> tuple[list[int], dict[File, str]]:
        """The number of rows of each file, and the reasons for those that cannot be read; chooses the columns."""
        counts: list[int] = []
        damaged: dict[File, str] = {}
        first: dict[str, Column] = {}
        for file in self._files:
            try:
                with closing(_open(file)) as opened:
                    found = _columns(opened.schema_arrow)
                    counts.append(opened.metadata.num_rows)
            except _damage() as error:
                damaged[file] = f"It is no Parquet file, damaged or cut short ({_line(error)}); fetch it again."
                counts.append(0)
                continue
            if self._columns is None:
                self._columns = choose(self.name, found, self._image, self._label)
                first = {name: column for column in found if (name := column.name) in self._columns.names}
            here = {column.name: column for column in found if column.name in first}
            for name, column in first.items():
                if name not in here or (here[name].kind, here[name].classes) != (column.kind, column.classes):
                    same = f"{name!r} ({column.type}), and with the same classes if it has any"
                    other = f"{here[name].type}" if name in here else f"none among {[one.name for one in found]}"
                    raise CatalogError(
                        f"{str(file.path)!r}: must have the column {same}, as {self._files[0].shown!r} has, found "
                        f"{other}; list files of different columns apart."
                    )
        return counts, damaged

    def _list_file(
        self,
        file: File,
        count: int,
        start: int,
        total: int,
        columns: Columns,
        listed: Listed,
        progress: Progress | None,
    ) -> None:
        digits = len(str(max(count - 1, 0)))
        with closing(_open(file)) as opened:
            for found in _batches(opened, columns.names, range(count)):
                if isinstance(found[1], str):
                    listed.reject(f"{file.shown}, rows {found[0].start} to {found[0].stop - 1}", found[1])
                else:
                    rows, batch = found[0], found[1]
                    for row, content, value in zip(rows, *_cells(batch, columns, file), strict=True):
                        if isinstance(content, DecodeError):
                            size: tuple[int, int] | str = f"It has no usable image: {content}"
                        else:
                            size = measure(content)
                        if listed.add(f"{file.name}/{row:0{digits}}", f"{file.shown}, row {row}", size, value):
                            self._positions.append(start + row)
                if progress is not None:
                    progress(start + found[0].stop, total)

    def read(self, rows: range) -> Iterator[Content]:
        self.catalog()
        assert self._columns is not None
        columns = Columns(self._columns.image, None)
        positions = self._positions.of(rows)
        bounds = [*np.searchsorted(positions, self._starts).tolist(), len(positions)]
        for number, file in enumerate(self._files):
            taken = positions[bounds[number] : bounds[number + 1]] - self._starts[number]
            if len(taken):
                yield from _read(file, columns, taken.tolist())


def _read(file: File, columns: Columns, taken: list[int]) -> Iterator[Content]:
    """The content of some rows of a file, which go up."""
    why = file.changed()
    if why is None:
        try:
            opened = _open(file)
        except _damage() as error:
            why = f"{str(file.path)!r}: cannot be read ({_line(error)}); fetch it again."
    if why is not None:
        for _ in taken:
            yield DecodeError(why)
        return
    wanted = set(taken)
    with closing(opened):
        for rows, batch in _batches(opened, columns.names, range(taken[0], taken[-1] + 1)):
            if isinstance(batch, str):
                yield from (DecodeError(f"{str(file.path)!r}, row {row}: {batch}") for row in rows if row in wanted)
            elif wanted.issuperset(rows):
                yield from _cells(batch, columns, file)[0]
            else:
                for row in rows:
                    if row in wanted:
                        yield _cells(batch.slice(row - rows.start, 1), columns, file)[0][0]


def _batches(
    file: "pyarrow.parquet.ParquetFile", names: list[str], wanted: range
) -> Iterator[tuple[range, Batch] | tuple[range, str]]:
    """The rows of a range in batches, or why those of a row group cannot be read. Other row groups are not read."""
    start = 0
    for group in range(file.metadata.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        at, end = start, min(start + count, wanted.stop)
        first = max(start, wanted.start)
        start += count
        if first >= end:
            continue
        try:
            for batch in file.iter_batches(_BATCH, row_groups=[group], columns=names, use_threads=False):
                begin, stop = max(at, first), min(at + batch.num_rows, end)
                if begin < stop:
                    yield range(begin, stop), batch.slice(begin - at, stop - begin)
                    first = stop
                at += batch.num_rows
                if at >= end:
                    break
        except _damage() as error:
            yield range(first, end), f"They cannot be read ({_line(error)}); the file is damaged, fetch it again."
            continue
        if at < end:
            yield range(first, end), "They are missing; the file is damaged, fetch it again."


def _cells(batch: Batch, columns: Columns, file: File) -> tuple[list[bytes | DecodeError], list[object]]:
    """Of each row the image file's content, and the label or None."""
    images = batch.column(columns.image.name).to_pylist()
    labels = [None] * len(images) if columns.label is None else batch.column(columns.label.name).to_pylist()
    return [_content(cell, file) for cell in images], labels


def _content(cell: bytes | dict[str, Any] | None, file: File) -> bytes | DecodeError:
    if isinstance(cell, bytes):
        return cell
    content, path = (None, None) if cell is None else (cell.get("bytes"), cell.get("path"))
    if content is not None:
        return bytes(content)
    if not path:
        return DecodeError("neither its bytes nor a path are there; remove the row.")
    return file_content(file.path.parent / str(path))


def _columns(schema: "pyarrow.Schema") -> list[Column]:
    features = _features(schema)
    return [_column(field.name, field.type, features.get(field.name)) for field in schema]


def _column(name: str, dtype: Any, feature: object) -> Column:
    types = _pyarrow().types
    known = feature if isinstance(feature, dict) else {}
    binary = any(
        getattr(types, test)(dtype)
        for test in ("is_binary", "is_large_binary", "is_binary_view", "is_fixed_size_binary")
        if hasattr(types, test)
    )
    text = dtype.value_type if types.is_dictionary(dtype) else dtype
    if types.is_struct(dtype) and dtype.get_field_index("bytes") >= 0:
        kind = known.get("_type") == "Image"
        return Column(name=name, kind="image" if kind else "file", type=str(dtype))
    if binary:
        return Column(name=name, kind="image" if known.get("_type") == "Image" else "binary", type=str(dtype))
    if types.is_integer(dtype):
        names = known.get("names") if known.get("_type") == "ClassLabel" else None
        return Column(
            name=name, kind="integer", type=str(dtype), classes=tuple(map(str, names)) if names is not None else None
        )
    if any(
        getattr(types, test)(text)
        for test in ("is_string", "is_large_string", "is_string_view")
        if hasattr(types, test)
    ):
        return Column(name=name, kind="text", type=str(dtype))
    return Column(name=name, kind="other", type=str(dtype))


def _features(schema: "pyarrow.Schema") -> dict[str, object]:
    """The features that Hugging Face writes into the schema's metadata, by column; {} if there are none."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _open(file: File) -> "pyarrow.parquet.ParquetFile":
    """Without `pre_buffer` pages are read as they are needed; with it, whole row groups."""
    return _pyarrow().parquet.ParquetFile(file.path, pre_buffer=False, buffer_size=_BUFFER)


def _damage() -> tuple[type[Exception], ...]:
    return (_pyarrow().ArrowException, OSError, ValueError)


def _line(error: Exception) -> str:
    return str(error).split("\n")[0].rstrip(".") or type(error).__name__


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            f"Parquet files are read with pyarrow, which cannot be imported ({error}); run "
            "`pip install 'dali-diffusemix[parquet]'`."
        ) from error
    return pyarrow
