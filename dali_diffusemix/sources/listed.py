"""A list in the making: rows are added with their sizes and labels or rejected with a reason, and become a catalog."""

import logging
import warnings
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.catalog.headers import Rejected, first_reason
from dali_diffusemix.catalog.table import Catalog
from dali_diffusemix.errors import CatalogError, DecodeError
from dali_diffusemix.images.codec import MOST_BYTES
from dali_diffusemix.sources.source import Progress

_log = logging.getLogger(__name__)

UNLABELLED: Final = "unlabelled"
"""The one class of a source without labels."""

_MOST_CLASSES: Final = 1_000_000


class ListedSource(ABC):
    """A source of this room: it is listed once, and yields files unless it says otherwise."""

    pixels = False
    folders: Sequence[Path] = ()
    _listed: Catalog | None = None

    @property
    @abstractmethod
    def name(self) -> str:
        """As in `Source`."""

    @abstractmethod
    def _list(self, progress: Progress | None) -> Catalog:
        """List everything."""

    def catalog(self, progress: Progress | None = None) -> Catalog:
        """As in `Source`."""
        if self._listed is None:
            with quiet_headers():
                self._listed = self._list(progress)
        return self._listed


class Listed:
    """The rows of a source that are usable, in order, and those that are not.

    Args:
        labelled: False: every row is of the class `UNLABELLED`, and labels are ignored.
        classes: Their names, if the source has them; a label is then an index into them, or a name.
    """

    def __init__(self, *, labelled: bool, classes: Sequence[str] | None = None) -> None:
        self.paths: list[str] = []
        self.rejected: list[Rejected] = []
        self._sizes, self._codes = array("i"), array("i")
        self._classes = None if classes is None else _distinct(classes)
        self._labelled = labelled
        self._texts: dict[str, int] | None = None  # text to code, if labels are text; None before the first label
        self._most = -1  # the largest number, if labels are numbers

    def add(self, path: str, where: str, size: tuple[int, int] | str, label: object = None) -> bool:
        """Add a row, or reject it; returns whether it was added.

        Args:
            path: Its path in the catalog.
            where: The file and row, for messages.
            size: Its upright height and width, or the reason why it cannot be used.
            label: A whole number or a text; None: it has none.
        """
        if isinstance(size, str):
            self.reject(where, size)
            return False
        found = self._code(label)
        if isinstance(found, str):
            self.reject(where, found)
            return False
        self.paths.append(path)
        self._sizes.extend(size)
        self._codes.append(found)
        return True

    def reject(self, where: str, reason: str) -> None:
        """Note something that cannot be used, by file and row."""
        self.rejected.append(Rejected(where, reason))

    def catalog(self, source: str) -> Catalog:
        """The catalog of the rows added. Raises CatalogError if there are none."""
        if not self.paths:
            raise CatalogError(f"{source}: there is no usable image in it. {first_reason(self.rejected)}")
        if self.rejected:
            _log.warning("%s: %s", source, first_reason(self.rejected))
        if len(set(self.paths)) < len(self.paths):
            twice = Counter(self.paths).most_common(1)[0][0]
            raise CatalogError(f"{source}: paths must differ, found {twice!r} twice; rename files of the source.")
        labels = np.frombuffer(self._codes, np.int32)
        if not self._labelled:
            classes = [UNLABELLED]
        elif self._classes is not None:
            classes = list(self._classes)
        elif self._texts:
            classes = sorted(self._texts)
            ranks = {name: rank for rank, name in enumerate(classes)}
            labels = np.array([ranks[name] for name in self._texts], np.int32)[labels]
        else:
            classes = [str(number) for number in range(self._most + 1)]
        sizes = np.frombuffer(self._sizes, np.int32).reshape(-1, 2)
        return replace(Catalog.from_arrays(self.paths, labels, classes, sizes), rejected=tuple(self.rejected))

    def _code(self, label: object) -> int | str:
        """The code of a label; or the reason why it is none."""
        if not self._labelled:
            return 0
        if label is None or label == "":
            return "Its label is missing; add one, or list the source with label=False."
        if isinstance(label, np.integer):
            label = int(label)
        if isinstance(label, bool) or not isinstance(label, int | str):
            return f"Its label must be a whole number or text, found {_short(label)}; write it as one of them."
        if self._classes is not None:
            return self._class(label)
        if isinstance(label, int):
            if self._texts is not None:
                return f"Its label must be text, as those before it are, found {label}; write all labels alike."
            if label < 0:
                return _negative(label)
            if label >= _MOST_CLASSES:
                return (
                    f"Its label must be a whole number below {_MOST_CLASSES}, found {label}; if these are the numbers "
                    "of images, name the column of labels with label=."
                )
            self._most = max(self._most, label)
            return label
        if self._most >= 0:
            return f"Its label must be a whole number, as those before it are, found {_short(label)}; write all alike."
        if "\0" in label or not label.isprintable():
            return f"Its label must be printable text, found {_short(label)}; it is damaged or no label."
        self._texts = {} if self._texts is None else self._texts
        if len(self._texts) >= _MOST_CLASSES and label not in self._texts:
            return f"Its label is one more than {_MOST_CLASSES} classes; name the column of labels with label=."
        return self._texts.setdefault(label, len(self._texts))

    def _class(self, label: int | str) -> int | str:
        """The code of a label among classes with names."""
        assert self._classes is not None
        if isinstance(label, str):
            known = f"one of the {len(self._classes)} classes"
            return self._classes.get(label, f"Its label must be {known}, found {_short(label)}; correct it.")
        if label < 0:
            return _negative(label)
        if label >= len(self._classes):
            known = f"in the {len(self._classes)} classes, 0 to {len(self._classes) - 1}"
            return f"Its label must lie {known}, found {label}; correct it."
        return label


def _distinct(classes: Sequence[str]) -> dict[str, int]:
    """Name to code; a name that comes again has its code behind it, as 'crane (517)'."""
    codes: dict[str, int] = {}
    for code, name in enumerate(classes):
        codes[f"{name} ({code})" if name in codes else name] = code
    return codes


def _negative(label: int) -> str:
    return (
        f"Its label must be 0 or more, found {label}, which test sets have in place of labels; use a split with "
        "labels, or list it with label=False."
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Positions:
    """Positions of rows in their source, (N,) int64, in the order of the catalog."""

    def __init__(self) -> None:
        self._numbers = array("q")

    def append(self, position: int) -> None:
        self._numbers.append(position)

    def of(self, rows: range) -> NDArray[np.int64]:
        """The positions of these rows, (n,) int64. Raises IndexError, and ValueError if the range goes down."""
        check_rows(rows, len(self._numbers))
        return np.array(self._numbers[rows.start : rows.stop : rows.step] if rows else (), np.int64)


def check_rows(rows: range, count: int) -> None:
    """Raise IndexError unless a catalog of `count` rows has them all, ValueError if the range goes down."""
    if rows.step < 1:
        raise ValueError(f"rows must go up, found {rows}")
    if rows and not 0 <= rows[0] <= rows[-1] < count:
        raise IndexError(f"rows must lie between 0 and {count - 1}, found {rows}")


@contextmanager
def quiet_headers() -> Iterator[None]:
    """Silence Pillow's warnings while headers are read: they are harmless to the size, or a reason to reject."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def file_content(path: str | Path) -> bytes | DecodeError:
    """The bytes of a file; or a DecodeError if it cannot be read, is none or has more than a GiB."""
    path = Path(path)
    try:
        if not path.is_file():  # opening a pipe would wait for a writer
            return DecodeError(f"{str(path)!r}: is missing, or no file; restore it, or list the source again.")
        if path.stat().st_size > MOST_BYTES:
            return DecodeError(f"{str(path)!r}: has more than a GiB; make it smaller, or remove it.")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # a name with NUL
        return DecodeError(f"{str(path)!r}: cannot be read ({error}); permit reading it, or list the source again.")
