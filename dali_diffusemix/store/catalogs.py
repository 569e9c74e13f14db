"""The originals of a store and those given: catalogs that are paired by path."""

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.catalog.table import Catalog, StaleCatalogWarning
from dali_diffusemix.errors import CatalogError, StoreError
from dali_diffusemix.store.layout import EDITS, Kind


def open_catalog(store: Path, folder: str = "catalog") -> Catalog:
    """A store's own catalog. Raises StoreError."""
    try:
        return Catalog.open(store / folder)
    except CatalogError as error:
        raise StoreError(
            f"{str(store)!r}: the store's own catalog cannot be used; bring back a copy of its folder {folder!r}, or "
            f"make a new store. {error}"
        ) from error


def same_rows(ours: Catalog, given: Catalog) -> bool:
    """True if two catalogs list the same originals in the same order."""
    names = ("path_offsets", "path_bytes", "labels")
    return ours.classes == given.classes and all(
        np.array_equal(getattr(ours, name), getattr(given, name)) for name in names
    )


def rows_of(ours: Catalog, given: Catalog) -> NDArray[np.int64]:
    """(given,) int64: our rows of the originals given; -1 for those that we lack."""
    row_of = {path: row for row, path in enumerate(ours.paths)}
    return np.fromiter((row_of.get(path, -1) for path in given.paths), np.int64, len(given))


def check_originals(kind: Kind, store: Path, ours: Catalog, given: Catalog) -> None:
    """Raise StoreError, with the differences, unless both list the same originals in the same classes."""
    if ours.fingerprint == given.fingerprint:
        return
    stored, found = set(ours.paths), set(given.paths)
    differences = [
        f"{len(paths)} {where} (for one {min(paths)!r})"
        for paths, where in ((stored - found, "only in the store"), (found - stored, "not in the store"))
        if paths
    ] or ["the same files in other classes"]
    if kind is EDITS:
        remedy = "Give those that it was built from (new ones may be added), or another store"
    else:
        remedy = "Pack into a new folder, or give exactly those that it was built from"
    raise StoreError(
        f"{str(store)!r}: the store was built from other originals: it has {len(stored)}, given are {len(found)}; "
        f"{', '.join(differences)}. {remedy}; if that folder has changed since, "
        f"Catalog.open({str(store / kind.listing)!r}) is the list that the store was built from."
    )


def grown_catalog(store: Path, ours: Catalog, given: Catalog) -> Catalog:
    """Our catalog, followed by the new originals among those given.

    Originals that are not given any more stay, with a StaleCatalogWarning.

    Raises:
        StoreError: Fewer than half of ours are given, as of another dataset, or some are in other classes.
    """
    rows = rows_of(given, ours)
    kept = np.flatnonzero(rows < 0)
    here = np.flatnonzero(rows >= 0)
    classes = [ours.classes[label] for label in ours.labels[here].tolist()]
    if 2 * len(here) < len(ours) or [given.classes[label] for label in given.labels[rows[here]].tolist()] != classes:
        check_originals(EDITS, store, ours, given)
    if len(kept):
        warnings.warn(
            f"{str(store)!r}: {len(kept)} of its {len(ours)} originals are not among those given (for one "
            f"{ours.path(int(kept[0]))!r}); their edits stay in the store. To train without them, give the dataset "
            "catalog=dali_diffusemix.catalog.index(root).",
            StaleCatalogWarning,
            stacklevel=2,
        )
    more = np.setdiff1d(np.arange(len(given)), rows)
    if not len(more):
        return ours
    names = given.classes if set(ours.classes) <= set(given.classes) else sorted({*ours.classes, *given.classes})
    label_of = {name: label for label, name in enumerate(names)}
    labels = np.concatenate(
        [
            np.array([label_of[name] for name in catalog.classes])[catalog_labels]
            for catalog, catalog_labels in ((ours, ours.labels), (given, given.labels[more]))
        ]
    )
    paths = [ours.encoded_path(row) for row in range(len(ours))] + [given.encoded_path(row) for row in more.tolist()]
    sizes = np.concatenate([ours.sizes, given.sizes[more]])
    return replace(Catalog.from_arrays(paths, labels, names, sizes), rejected=given.rejected)
