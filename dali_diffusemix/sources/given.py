"""From what is given to the source that reads it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dali_diffusemix.base.words import did_you_mean
from dali_diffusemix.catalog.layouts import LAYOUTS
from dali_diffusemix.errors import CatalogError, ConfigError
from dali_diffusemix.sources.arrays import ArraySource, MapSource
from dali_diffusemix.sources.columns import LabelChoice
from dali_diffusemix.sources.files import PARQUETS, TARS, expand, in_folder, is_pattern
from dali_diffusemix.sources.folder import FolderSource
from dali_diffusemix.sources.huggingface import HuggingFaceSource, is_dataset, refuse_unless_a_split
from dali_diffusemix.sources.parquet import ParquetSource
from dali_diffusemix.sources.source import Source
from dali_diffusemix.sources.tars import WebDatasetSource

_FILES = {"webdataset": TARS, "parquet": PARQUETS}
_DEFAULT_SPLIT = "train"


def source_of(
    given: Any,
    *,
    kind: str | None = None,
    image: str | None = None,
    label: LabelChoice = None,
    split: str = _DEFAULT_SPLIT,
) -> Source:
    """The source of the originals that are given.

    Args:
        given: A folder of class folders, or of a published layout; WebDataset tars or Parquet files: one, a folder of
            them, a pattern (`train-{000..146}.tar`, `data/train-*.parquet`) or a list; a `datasets.Dataset`; arrays
            (images, labels), images (n, height, width, 3) or grey (n, height, width) uint8, labels (n,) or None; or a
            map-style dataset of (Pillow image or array, label).
        kind: "folder", "webdataset", "parquet" or a layout (`catalog.LAYOUTS`); None: told by type and by endings, else
            "folder".
        image: The column of images (Parquet, datasets), or the extensions of images (WebDataset), as "jpg;png"; None
            finds it.
        label: The column of labels, or their extension, as "cls" or "json:label"; None finds it. False, or a source in
            which nothing can be a label: all images are of one class, "unlabelled"; give a dataset of them targets=.
        split: Of a layout, or several joined by "+".

    Labels that are whole numbers keep them, with the source's names of classes or else "0", "1" and so on; text becomes
    the sorted classes. A row without a usable label is rejected, as one without a usable image is.

    Raises:
        ConfigError: Nothing reads what is given, an option does not apply to it, or (also from `catalog`) columns are
            ambiguous.
        CatalogError: A file or folder is missing.
        MissingDependencyError: The library that reads it is not installed.
    """
    kinds = tuple(dict.fromkeys(("folder", *_FILES, *LAYOUTS)))
    if kind is not None and kind not in kinds:
        raise ConfigError(f"kind must be one of {', '.join(kinds)}, found {kind!r}{did_you_mean(kind, kinds)}")
    if not _are_paths(given):
        return _of_object(given, kind, image, label, split)
    kind_of = kind or _kind(given)
    if split != _DEFAULT_SPLIT and (kind is None or kind in _FILES):
        raise ConfigError(f"split applies to layouts, found {split!r}; name the layout with kind=, or leave split out.")
    if kind_of in _FILES:
        files = expand(given, _FILES[kind_of])
        # A folder with another one inside is one of class folders.
        folders = [Path(given)] if isinstance(given, str | os.PathLike) and Path(given).is_dir() else []
        reader = WebDatasetSource if kind_of == "webdataset" else ParquetSource
        return reader(files, image, label, folders=folders)
    _refuse(f"a folder of kind {kind_of!r}", image=image, label=label)
    if not isinstance(given, str | os.PathLike):
        raise ConfigError(f"the source of kind {kind_of!r} must be one folder, found a list of {len(given)}.")
    folder = Path(given)
    return FolderSource.of_classes(folder) if kind is None else FolderSource.of_layout(kind_of, folder, split)


def _are_paths(given: Any) -> bool:
    if isinstance(given, str | os.PathLike):
        return True
    return isinstance(given, list | tuple) and bool(given) and all(isinstance(one, str | os.PathLike) for one in given)


def _kind(given: Any) -> str:
    """The kind of files, told by their names."""
    first = os.fspath(given if isinstance(given, str | os.PathLike) else given[0])
    if "://" in first:
        raise ConfigError(f"the source must be on a local file system, found {first!r}; copy it, and give the copy.")
    for kind, endings in _FILES.items():
        if first.lower().endswith(endings):
            return kind
    folder = Path(first)
    if not isinstance(given, str | os.PathLike) or is_pattern(first):
        raise ConfigError(
            f"kind must be given for files whose names end in none of {', '.join(TARS + PARQUETS)}, found {first!r}; "
            "write kind='webdataset' or kind='parquet'."
        )
    try:
        if folder.is_dir() and not any(one.is_dir() for one in folder.iterdir() if not one.name.startswith(".")):
            for kind, endings in _FILES.items():
                if in_folder(folder, endings):
                    return kind
    except OSError as error:
        raise CatalogError(f"{first!r}: the folder cannot be listed ({error.strerror}); permit reading it.") from error
    return "folder"


def _of_object(given: Any, kind: str | None, image: str | None, label: LabelChoice, split: str) -> Source:
    """The source of something in memory."""
    what = f"a {type(given).__name__}"
    if kind is not None:
        raise ConfigError(f"kind is of paths, found {kind!r} for {what}; leave it out.")
    if split != _DEFAULT_SPLIT:
        raise ConfigError(f"split applies to layouts, found {split!r} for {what}; give the split itself.")
    refuse_unless_a_split(given)
    if is_dataset(given):
        return HuggingFaceSource(given, image, label)
    _refuse(what, image=image, label=label or None)
    if isinstance(given, tuple | list):
        if len(given) != 2:
            raise ConfigError(
                f"arrays must be given as (images, labels), found {len(given)} parts; labels may be None."
            )
        return ArraySource(given[0], None if label is False else given[1])
    if isinstance(given, Mapping):
        raise ConfigError(
            f"the source must be one split, found a {type(given).__name__} of {', '.join(map(str, given))}."
        )
    if hasattr(given, "__len__") and hasattr(given, "__getitem__") and not hasattr(given, "dtype"):
        return MapSource(given, label)
    raise ConfigError(
        f"the source must be a path, paths, a datasets.Dataset, arrays (images, labels) or a map-style dataset (with "
        f"__len__ and __getitem__), found {what}."
    )


def _refuse(what: str, **options: object) -> None:
    """Raise ConfigError for options that do not apply."""
    for name, value in options.items():
        if value is not None:
            raise ConfigError(
                f"{name} names columns and extensions, which {what} has not, found {value!r}; leave it out."
            )
