"""Listing: from a folder of images to its catalog.

    index("data/train")     list a folder once and keep the result; later calls open it

A folder is read as `torchvision.datasets.ImageFolder` reads it, root/class/**/image, in the same order. Only headers
are read, and every visible file is either taken or reported with a reason (`Catalog.rejected`).
"""

import contextlib
import logging
import operator
import os
import re
import shlex
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dali_diffusemix.catalog.headers import Listing, Rejected, existing_root, first_reason, quoted
from dali_diffusemix.catalog.table import Catalog, StaleCatalogWarning, default_location, is_catalog, read_listing
from dali_diffusemix.errors import CatalogError, ConfigError

_log = logging.getLogger(__name__)

_MOST_LOOKED_FOR = 200_000  # originals
_MOST_FOLDERS = 100  # in which `holds_images` looks for images


def index(
    root: str | os.PathLike[str],
    *,
    location: str | os.PathLike[str] | None = None,
    refresh: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Catalog:
    """The catalog of root/class/**/image: opened if it exists, else made and saved.

    A listed file keeps its row, label and size even if it vanishes; if class folders have changed, a
    StaleCatalogWarning says so. `refresh` lists the folder again: known files come first in their order, new ones
    follow in ImageFolder's order, vanished ones are dropped, and all headers are read.

    `location` is the catalog's folder (by default `default_location`), outside `root`; if the default one cannot be
    written, a warning is logged and the catalog stays in memory. `workers` threads read headers; `progress` is called
    with the number of files done and of all files.

    Raises CatalogError: no such folder, no class folders, folders that are splits (train, val), a class without usable
    image, a damaged catalog, or a given location that cannot be written. ConfigError: a location inside the root.
    """
    folder = existing_root(root)
    where = default_location(folder) if location is None else Path(location)
    if where.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"location must lie outside the root, where it would pass for a class; found {str(where)!r} "
            f"inside {str(folder)!r}."
        )
    previous = None
    if is_catalog(where):
        if not refresh:
            catalog = Catalog.open(where)
            _check_no_splits(folder, catalog.classes, catalog.paths)
            _warn_if_stale(catalog, folder)
            return catalog
        try:
            previous = Catalog.open(where)
        except CatalogError as error:
            _log.warning("The previous catalog is replaced, and its row order lost: %s", error)
    catalog = _read_folder(folder, previous, workers, progress)
    try:
        catalog.save(where)
    except CatalogError as error:
        if location is not None:
            raise
        _log.warning("The folder will be listed again next time: %s", error)
        return catalog
    return Catalog.open(where)


def list_images(root: str | os.PathLike[str]) -> Listing:
    """The files below root/class, in ImageFolder's order, without opening them.

    Classes are the sorted subfolders of the root; in each, folders are sorted by path and their files by name. Links
    are followed, except in circles. Hidden files and folders (a leading dot) are skipped.

    Raises CatalogError if there is no such folder, or no folder in it, or its folders are splits with classes in them.
    """
    folder = existing_root(root)
    rejected: list[Rejected] = []
    try:
        entries, identity = _scan(folder)
    except OSError as error:
        raise CatalogError(f"{str(folder)!r}: the folder cannot be listed ({error.strerror}).") from error
    classes = []
    for entry in entries:
        if _is(entry.is_dir):
            classes.append(entry.name)
        else:
            rejected.append(
                Rejected(entry.name, "It lies in no class folder; move it to root/class/ if it is to be used.")
            )
    if not classes:
        raise CatalogError(
            f"{str(folder)!r}: there are no class folders; expected root/class/image.jpg, "
            f"found {len(entries)} other files; move the images of each class to a folder of its own."
        )
    folder_mtimes = _folder_mtimes(folder, classes)
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = _list_class(folder, name, identity, rejected)
        paths += found
        labels += [label] * len(found)
    _check_no_splits(folder, classes, paths)
    return Listing(classes=tuple(classes), paths=paths, labels=labels, rejected=rejected, folder_mtimes=folder_mtimes)


def _scan(folder: Path | str) -> tuple[list[os.DirEntry[str]], tuple[int, int]]:
    """The visible entries of a folder, by name, and its device and inode. Raises OSError."""
    with os.scandir(folder) as entries:
        visible = sorted(
            (entry for entry in entries if not entry.name.startswith(".")), key=operator.attrgetter("name")
        )
    status = Path(folder).stat()
    return visible, (status.st_dev, status.st_ino)


def _is(test: Callable[[], bool]) -> bool:
    """Like `DirEntry.is_dir` or `is_file`, but False on OSError: a link to itself or to a forbidden folder."""
    try:
        return test()
    except OSError:
        return False


def _list_class(root: Path, name: str, root_identity: tuple[int, int], rejected: list[Rejected]) -> list[str]:
    """The files of one class in the order of ImageFolder, which is that of `sorted(os.walk(...))`: folders by path."""
    found: list[tuple[str, list[str]]] = []
    pending = [(name, frozenset({root_identity}))]
    while pending:
        folder, above = pending.pop()
        try:
            entries, identity = _scan(f"{root}/{folder}")
        except OSError as error:
            rejected.append(Rejected(folder, f"The folder cannot be listed ({error.strerror}); permit reading it."))
            continue
        if identity in above:
            rejected.append(Rejected(folder, "The link leads back to a folder above it; remove it."))
            continue
        files = []
        for entry in entries:
            if _is(entry.is_dir):
                pending.append((f"{folder}/{entry.name}", above | {identity}))
            elif _is(entry.is_file):
                files.append(entry.name)
            else:
                reason = "It is no file: a link to nothing, a pipe, a socket or a device; remove it."
                rejected.append(Rejected(f"{folder}/{entry.name}", reason))
        found.append((folder, files))
    found.sort()
    return [f"{folder}/{file}" for folder, files in found for file in files]


_SPLIT = re.compile(
    r"(?P<train>train|training)|val|valid|validation|test|testing|dev|eval|evaluation|holdout|extra", re.IGNORECASE
)
_SPLIT_OF = re.compile(r"[-_ .]?(?:set|split|data|images|\d+)$", re.IGNORECASE)


_IMAGE_ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm", ".webp", ".gif"})


def _is_called_an_image(name: str) -> bool:
    """True if a file's name or path ends like an image's. By hand, since there may be a million of them."""
    return name[name.rfind(".") :].lower() in _IMAGE_ENDINGS


def _check_no_splits(root: Path, classes: Sequence[str], paths: Sequence[str]) -> None:
    """Raise CatalogError where class folders are splits of a dataset, each with the class folders in it.

    A folder is a split if it is called so and its images lie in folders of its own, none directly in it. It may be a
    class all the same (a train is a vehicle), unless all folders with images are called so, or two splits, one of which
    is for training, hold folders of the same name.
    """
    named = {name: match for name in classes if (match := _SPLIT.fullmatch(_SPLIT_OF.sub("", name)))}
    if not named:
        return
    inside: dict[str, set[str]] = {name: set() for name in named}
    with_images, flat = set(), set()
    for path in paths:
        name, _, rest = path.partition("/")
        if name in with_images and name not in named:
            continue
        if _is_called_an_image(path):
            with_images.add(name)
            if name in named:
                within, slash, _ = rest.partition("/")
                if slash:
                    inside[name].add(within)
                else:
                    flat.add(name)
    splits = [name for name in named if inside[name] and name not in flat]
    trains = [name for name in splits if named[name]["train"]]
    shared = any(inside[train] & inside[name] for train in trains for name in splits if name != train)
    if not splits or not (shared or with_images <= set(named)):
        return
    meant = (trains or splits)[0]
    found = sorted(with_images & set(named))
    error = CatalogError(
        f"{str(root)!r}: its folders must be classes, but they look like splits of a dataset: found {quoted(found)}, "
        f"and {meant!r} holds folders of its own ({quoted(sorted(inside[meant]))}). Which is meant? Give one of them, "
        f"as {str(root / meant)!r}. If they are classes, list them with Catalog.from_arrays."
    )
    error.instead = {str(root): str(root / meant)}
    raise error


def holds_images(folder: str | os.PathLike[str]) -> bool:
    """True if a folder has folders with image files in them, as class folders or splits are; by their names."""
    for depth, (_, folders, files) in enumerate(os.walk(folder)):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if depth and any(map(_is_called_an_image, files)):
            return True
        if depth == _MOST_FOLDERS:
            break
    return False


def _folder_mtimes(root: Path, classes: Iterable[str]) -> dict[str, int]:
    """Class folder to its mtime, nanoseconds; 0 if it cannot be read."""
    mtimes = {}
    for name in classes:
        try:
            mtimes[name] = (root / name).stat().st_mtime_ns
        except OSError:
            mtimes[name] = 0
    return mtimes


def _warn_if_stale(catalog: Catalog, root: Path) -> None:
    """Warn once (StaleCatalogWarning) if class folders came, went or changed; their files are not looked at."""
    before = catalog.folder_mtimes
    if not before:
        return
    try:
        entries, _ = _scan(root)
    except OSError:
        return  # the images may still be read by name
    now = _folder_mtimes(root, (entry.name for entry in entries if _is(entry.is_dir)))
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed:
        warnings.warn(
            f"{str(root)!r} has changed since it was indexed ({len(changed)} class folders, {changed[0]!r} first); its "
            f"{len(catalog)} images are those of then. `dali-diffusemix index {shlex.quote(str(root))} --refresh` "
            "lists it again.",
            StaleCatalogWarning,
            stacklevel=3,
        )


def warn_of_changes(catalog: Catalog, root: Path) -> None:
    """Warn (StaleCatalogWarning) if originals of an edit store's catalog are missing from their folder, or not all.

    Searches the class folders that changed since they were listed; nothing if they hold very many originals, as after a
    copy of a large dataset. Without mtimes the catalog is no list of the folder: then all is searched for missing ones.
    """
    before = catalog.folder_mtimes
    rows = np.arange(len(catalog))
    if before:
        now = _folder_mtimes(root, before)
        changed = [label for label, name in enumerate(catalog.classes) if now.get(name) != before.get(name)]
        rows = np.flatnonzero(np.isin(catalog.labels, changed))
    if len(rows) > _MOST_LOOKED_FOR:
        return
    there: dict[str, set[str]] = {}
    gone: list[str] = []
    paths = [catalog.path(row) for row in rows.tolist()]
    for path in paths:
        folder, _, name = path.rpartition("/")
        if folder not in there:
            try:
                there[folder] = set(os.listdir(root / folder))  # noqa: PTH208 - names alone, at speed
            except FileNotFoundError:
                there[folder] = set()
            except OSError:
                return  # the images may still be read by name
        if name not in there[folder]:
            gone.append(path)
    where = shlex.quote(str(root))
    if before and (new := _new_images(catalog, root, paths, there)):
        warnings.warn(
            f"{str(root)!r} holds images that are not among the {len(catalog)} originals of the edits: {len(new)}, "
            f"such as {new[0]!r}. They are no samples. To train on them, run "
            f"`dali-diffusemix index {where} --refresh`, then `dali-diffusemix generate` with the store, which makes "
            "the missing edits.",
            StaleCatalogWarning,
            stacklevel=3,
        )
    if gone:
        warnings.warn(
            f"{str(root)!r}: {len(gone)} of the {len(catalog)} originals that the edits are of are gone (for one "
            f"{gone[0]!r}); they stay samples, and others are shown in their place. To train without them, run "
            f"`dali-diffusemix index {where} --refresh` and give the dataset catalog=dali_diffusemix.catalog."
            "index(root).",
            StaleCatalogWarning,
            stacklevel=3,
        )


def _new_images(catalog: Catalog, root: Path, paths: Sequence[str], there: Mapping[str, set[str]]) -> list[str]:
    """Files with an image's ending that are neither originals nor rejected, in the folders that were looked into.

    Args:
        catalog: The originals.
        root: Their folder.
        paths: Those in the class folders that changed.
        there: The names in each of these folders.
    """
    known = {*paths} | {one.path for one in catalog.rejected}
    found = dict(there)
    with contextlib.suppress(OSError):
        for entry in _scan(root)[0]:
            if entry.name not in catalog.folder_mtimes and _is(entry.is_dir):
                found[entry.name] = set(os.listdir(entry))  # noqa: PTH208
    return sorted(
        path
        for folder, names in found.items()
        for name in names
        if _is_called_an_image(name) and (path := f"{folder}/{name}") not in known and not name.startswith(".")
    )


def _read_folder(
    root: Path, previous: Catalog | None, workers: int | None, progress: Callable[[int, int], None] | None
) -> Catalog:
    """List a folder and read its headers; files of `previous` come first, in its order."""
    listing = list_images(root)
    if previous is not None:
        rows = {path: row for row, path in enumerate(previous.paths)}
        paths, labels = listing.paths, listing.labels
        order = sorted(range(len(paths)), key=lambda i: rows.get(paths[i], len(rows)))
        listing = replace(listing, paths=[paths[i] for i in order], labels=[labels[i] for i in order])
    catalog = read_listing(root, listing, workers, progress)
    images = np.bincount(catalog.labels, minlength=len(catalog.classes))
    if not images.all():
        empty = [catalog.classes[label] for label in np.flatnonzero(images == 0)]
        raise CatalogError(
            f"{str(root)!r}: every class folder must hold at least one usable image, but {len(empty)} of "
            f"{len(images)} hold none: {quoted(empty)}; remove them or add images. "
            + first_reason([one for one in catalog.rejected if one.path.split("/")[0] in set(empty)])
        )
    return catalog
