"""Pixels in memory: arrays, and map-style datasets of images with labels."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dali_diffusemix.catalog.table import Catalog
from dali_diffusemix.errors import ConfigError, DecodeError
from dali_diffusemix.images.codec import rgb
from dali_diffusemix.images.formats import MAX_PIXELS
from dali_diffusemix.sources.columns import LabelChoice
from dali_diffusemix.sources.listed import Listed, ListedSource, Positions
from dali_diffusemix.sources.source import Content, Progress

_PROGRESS: Final = 256  # rows from one report to the next


class ArraySource(ListedSource):
    """Images of one size in an array, which is not copied. A row's path is its number, padded with zeros.

    Args:
        images: (n, height, width, 3) uint8, or grey, (n, height, width) or (n, height, width, 1).
        labels: (n,) whole numbers or text; None: none.

    Raises ConfigError: the arrays have other shapes or types.
    """

    pixels = True

    def __init__(self, images: Any, labels: Any = None) -> None:
        self._images = _images(images)
        count = len(self._images)
        self._labels = None if labels is None else _labels(labels, count)
        self._positions = Positions()

    @property
    def name(self) -> str:
        return f"an array of {len(self._images)} images"

    def _list(self, progress: Progress | None) -> Catalog:
        count, labels = len(self._images), self._labels
        digits = len(str(max(count - 1, 0)))
        listed, self._positions = Listed(labelled=labels is not None), Positions()
        for row in range(count):
            label = None if labels is None else labels[row]
            if listed.add(f"{row:0{digits}}", f"row {row}", self._images.shape[1:3], label):
                self._positions.append(row)
        if progress is not None:
            progress(count, count)
        return listed.catalog(self.name)

    def read(self, rows: range) -> Iterator[Content]:
        self.catalog()
        for row in self._positions.of(rows).tolist():
            yield _colour(self._images[row])


class MapSource(ListedSource):
    """A map-style dataset: `len(dataset)` items, dataset[i] is (image, label), or an image alone.

    An image is a Pillow image or a uint8 array, (height, width, 3), (height, width) or (height, width, 1). Listing
    reads every item, since there are no headers. Classes have the names in the dataset's `classes`, if it has some. If
    its items are images alone, there are no labels. A row's path is its number, padded with zeros.

    Args:
        dataset: The dataset.
        label: False: labels are ignored.

    Raises ConfigError: its first item is no image of that kind.
    """

    pixels = True

    def __init__(self, dataset: Any, label: LabelChoice = None) -> None:
        self._dataset = dataset
        self._count = len(dataset)
        self._label = label
        self._positions = Positions()

    @property
    def name(self) -> str:
        return f"{type(self._dataset).__name__} of {self._count} items"

    def _list(self, progress: Progress | None) -> Catalog:
        digits = len(str(max(self._count - 1, 0)))
        first, label = self._first()
        if isinstance(why := _pixels(first), TypeError):
            raise ConfigError(f"{self.name}: the image of its first item {why}.")
        labelled = self._label is not False and label is not _ALONE
        listed = Listed(labelled=labelled, classes=_classes(self._dataset) if labelled else None)
        self._positions = Positions()
        for row in range(self._count):
            image, label = self._item(row)
            pixels = _pixels(image)
            size = f"Its image {pixels}" if isinstance(pixels, Exception) else (pixels.shape[0], pixels.shape[1])
            if listed.add(f"{row:0{digits}}", f"row {row}", size, _plain(label)):
                self._positions.append(row)
            if progress is not None and ((row + 1) % _PROGRESS == 0 or row + 1 == self._count):
                progress(row + 1, self._count)
        return listed.catalog(self.name)

    def _first(self) -> tuple[Any, Any]:
        """The first item that can be read."""
        for row in range(self._count):
            item = self._item(row)
            if not isinstance(item[0], DecodeError):
                return item
        return DecodeError("cannot be read; no item of the dataset can."), None

    def read(self, rows: range) -> Iterator[Content]:
        self.catalog()
        for row in self._positions.of(rows).tolist():
            image, _ = self._item(row)
            pixels = _pixels(image)
            if isinstance(pixels, Exception):
                yield DecodeError(f"row {row}: its image {pixels}")
            else:
                yield pixels

    def _item(self, row: int) -> tuple[Any, Any]:
        """The image, or why there is none, and the label, or `_ALONE`."""
        try:
            item = self._dataset[row]
        except Exception as error:  # a user's code, and one image must not end the listing of a million
            return DecodeError(f"cannot be read ({type(error).__name__}: {error}); repair or remove it."), None
        if isinstance(item, tuple | list):
            if len(item) != 2:
                return DecodeError(f"must be in an item (image, label), found one of {len(item)} parts."), None
            return item[0], item[1]
        return item, _ALONE


_ALONE: Final = object()
"""The label of an image without one."""


def _plain(label: Any) -> object:
    """A label as Python has it: NumPy's and torch's numbers become whole numbers."""
    if label is _ALONE:
        return None
    if not isinstance(label, int | str) and getattr(label, "shape", None) == () and hasattr(label, "item"):
        return label.item()
    return label


def _classes(dataset: Any) -> Sequence[str] | None:
    """The names of the classes, as torchvision's datasets have them."""
    names = getattr(dataset, "classes", None)
    if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
        return names
    return None


def _pixels(image: Any) -> NDArray[np.uint8] | DecodeError | TypeError:
    """The pixels of an image, (height, width, 3) uint8; a DecodeError if it has none, a TypeError if it is no image."""
    if isinstance(image, DecodeError):
        return image
    if isinstance(image, Image.Image):
        try:
            return rgb(image)
        except DecodeError as error:
            return error
    if not hasattr(image, "shape") or not hasattr(image, "dtype"):
        return TypeError(f"must be a Pillow image or a uint8 array, found {type(image).__name__}")
    why = _unusable(image.shape, image.dtype, "")
    if why is not None:
        return TypeError(why)
    if image.shape[0] * image.shape[1] > MAX_PIXELS:
        return DecodeError(f"has {image.shape[0]} x {image.shape[1]} pixels, more than {MAX_PIXELS}; make it smaller.")
    return _colour(np.asarray(image))


def _unusable(shape: Sequence[int], dtype: Any, first: str) -> str | None:
    """The reason why an array is no image, or no images where `first` is the first dimension's name."""
    shape = tuple(shape)
    sides = shape[1:] if first else shape
    if not str(dtype).endswith("uint8"):
        remedy = "write (255 * images).round().astype('uint8') if they lie in 0 to 1, else images.astype('uint8')"
        return f"must be uint8, found {dtype}; {remedy}"
    if len(sides) not in (2, 3) or (len(sides) == 3 and sides[2] not in (1, 3)) or not all(sides):
        wanted = f"({first}height, width, 3), or grey, ({first}height, width)"
        remedy = ""
        if len(sides) == 3 and sides[0] in (1, 3):
            remedy = "; write images.transpose(0, 2, 3, 1)" if first else "; write image.transpose(1, 2, 0)"
        elif len(sides) == 3 and sides[2] == 4:
            remedy = "; write [..., :3] to drop alpha"
        return f"must be of shape {wanted}, found {shape}{remedy}"
    return None


def _colour(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(height, width, 3) of colour, or of grey, which is repeated; contiguous."""
    if image.ndim == 2:
        image = image[..., None]
    return np.ascontiguousarray(image if image.shape[2] == 3 else np.repeat(image, 3, axis=2))


def _images(given: Any) -> NDArray[np.uint8]:
    if not hasattr(given, "shape") or not hasattr(given, "dtype"):
        raise ConfigError(f"images must be an array, found {type(given).__name__}; write (images, labels).")
    why = _unusable(given.shape, given.dtype, "n, ")
    if why is not None:
        raise ConfigError(f"images {why}.")
    images: NDArray[np.uint8] = np.asarray(given)
    if not len(images):
        raise ConfigError(f"images must have at least one, found shape {images.shape}.")
    if images.shape[1] * images.shape[2] > MAX_PIXELS:
        raise ConfigError(f"images must have at most {MAX_PIXELS} pixels, found shape {images.shape}.")
    return images


def _labels(given: Any, count: int) -> list[object]:
    labels = np.asarray(given)
    if labels.shape != (count,):
        raise ConfigError(f"labels must be of shape ({count},), one for each image, found {labels.shape}.")
    if labels.dtype.kind not in "iuUSO":
        raise ConfigError(f"labels must be whole numbers or text, found {labels.dtype}; write labels.astype(int).")
    if labels.dtype.kind == "S":
        raise ConfigError("labels must be whole numbers or text, found bytes; write labels.astype(str).")
    return list(labels.tolist())
