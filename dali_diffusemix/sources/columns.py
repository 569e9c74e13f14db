"""Columns: which one has the images, and which one the labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from dali_diffusemix.base.words import did_you_mean
from dali_diffusemix.errors import ConfigError

LabelChoice: TypeAlias = str | Literal[False] | None
"""The name of the labels, False for none, None to find them."""

LABEL_NAMES: Final = (
    *("label", "labels", "cls", "class", "fine_label", "fine_labels", "target", "targets"),
    *("class_id", "label_id", "category", "category_id", "y"),
)


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table."""

    name: str
    kind: Literal["image", "file", "binary", "integer", "text", "other"]  # file: a struct of bytes and path
    type: str  # as its library calls it
    classes: tuple[str, ...] | None = None  # their names, of an integer column whose values are indices into them


@dataclass(frozen=True)
class Columns:
    """The columns that are read."""

    image: Column
    label: Column | None  # None: no labels

    @property
    def names(self) -> list[str]:
        return [self.image.name] if self.label is None else [self.image.name, self.label.name]


def choose(source: str, columns: Sequence[Column], image: str | None, label: LabelChoice) -> Columns:
    """The column of images and that of labels, as named or found.

    Found: the one column of images by its features, else the one struct of bytes and path, else the one binary column;
    the one column with names of classes, else the one of whole numbers or text with a usual name. There are no labels
    where no other column has whole numbers or text.

    Raises ConfigError: a named column is missing or of another type, or none or several may be meant.
    """
    return Columns(_image(source, columns, image), _label(source, columns, label))


def _image(source: str, columns: Sequence[Column], name: str | None) -> Column:
    if name is not None:
        column = _named(source, columns, "image", name)
        if column.kind not in ("image", "file", "binary"):
            raise ConfigError(
                f"{source}: image must name a column of image files (Image, a struct of bytes and path, or binary), "
                f"found {name!r} of type {column.type}; columns are {_listed(columns)}."
            )
        return column
    for kind in ("image", "file", "binary"):
        found = [column for column in columns if column.kind == kind]
        if len(found) == 1:
            return found[0]
        if found:
            raise ConfigError(
                f"{source}: several columns may hold the images, {_listed(found)}; name one with image=, as "
                f"image={found[0].name!r}."
            )
    raise ConfigError(
        f"{source}: one column must hold image files (Image, a struct of bytes and path, or binary), found "
        f"{_listed(columns)}; write the images' files into one, or name it with image=."
    )


def _label(source: str, columns: Sequence[Column], name: LabelChoice) -> Column | None:
    if name is False:
        return None
    if name is not None:
        column = _named(source, columns, "label", name)
        if column.kind not in ("integer", "text"):
            raise ConfigError(
                f"{source}: label must name a column of whole numbers or text, found {name!r} of type {column.type}; "
                f"cast it, or use label=False. Columns are {_listed(columns)}."
            )
        return column
    usable = [column for column in columns if column.kind in ("integer", "text")]
    with_classes = [column for column in usable if column.classes is not None]
    found = with_classes or [column for column in usable if column.name.lower() in LABEL_NAMES]
    if len(found) == 1:
        return found[0]
    odd = [column for column in columns if column.name.lower() in LABEL_NAMES and column not in usable]
    if not usable and not odd:
        return None
    which = "several columns may be" if found else "none of the columns is by its name"
    raise ConfigError(
        f"{source}: {which} that of the labels, {_listed(found or usable + odd)}; name one with label=, as "
        f"label={(found or usable + odd)[0].name!r}, or use label=False for no labels."
    )


def _named(source: str, columns: Sequence[Column], option: str, name: str) -> Column:
    for column in columns:
        if column.name == name:
            return column
    raise ConfigError(
        f"{source}: {option} must be one of its columns, found {name!r}; they are "
        f"{_listed(columns)}{did_you_mean(name, [column.name for column in columns])}"
    )


def _listed(columns: Sequence[Column]) -> str:
    return ", ".join(f"{column.name!r} ({column.type})" for column in columns) or "none"
