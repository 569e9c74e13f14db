"""Published datasets as they are unpacked: the images of a split, with their classes.

    root, catalog = read_layout("cub", "data/CUB_200_2011", "train")
    dataset = DiffuseMixDataset(root, catalog=catalog, crop=TrainCrop(224))

    layout          splits              what the folder holds
    folder          train val test      train/class/image, val/ and test/ alike; or class/image: train is all of it
    imagenet        train val           train/n01440764/*.JPEG, val/n01440764/*.JPEG
    tiny-imagenet   train val           wnids.txt, train/n01443537/images/, val/images/, val/val_annotations.txt
    cifar100        train test          train, test, meta: the Python version; its images are written to png/ once
    flowers         train val test      jpg/image_00001.jpg ..., imagelabels.mat, setid.mat
    cars            train test          cars_train/, cars_test/, devkit/ with cars_meta.mat, cars_train_annos.mat and,
                                        there or above, cars_test_annos_withlabels.mat
    aircraft        train val test      data/images/, data/variants.txt, data/images_variant_{train,val,test}.txt
    cub             train test          images/, images.txt, image_class_labels.txt, train_test_split.txt, classes.txt

Splits may be joined: "train+val". Files that lists name must exist, and lists must agree with each other. Reading a
pickle executes nothing.
"""

import io
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dali_diffusemix.base.files import new_folder, remove_temporary
from dali_diffusemix.base.words import did_you_mean
from dali_diffusemix.catalog.listing import index
from dali_diffusemix.catalog.table import Catalog, default_location
from dali_diffusemix.errors import CatalogError, ConfigError, MissingDependencyError


class Split(NamedTuple):
    """Images of a dataset."""

    root: Path
    catalog: Catalog  # paths below the root


@dataclass(frozen=True)
class _Listed:
    """The images that lists name, in order."""

    paths: list[str]  # relative to the root, POSIX
    labels: list[int]
    classes: list[str]


def read_layout(layout: str, root: str | os.PathLike[str], split: str = "train") -> Split:
    """The images of a split of a published dataset.

    Args:
        layout: One of `LAYOUTS`.
        root: The folder that the dataset was unpacked to.
        split: One of the layout's splits, or several joined by "+".

    Raises:
        ConfigError: There is no such layout or split.
        CatalogError: The folder has another layout, a list names a file that is missing, or lists disagree.
        MissingDependencyError: The layout's lists are .mat files, and SciPy is not installed.
    """
    if layout not in LAYOUTS:
        raise ConfigError(
            f"layout must be one of {', '.join(LAYOUTS)}, found {layout!r}{did_you_mean(layout, LAYOUTS)}"
        )
    folder = Path(root)
    if not folder.is_dir():
        raise CatalogError(f"{str(root)!r}: there is no such folder; give the one that the dataset was unpacked to.")
    known = LAYOUTS[layout]
    parts = split.split("+")
    for part in parts:
        if part not in known or parts.count(part) > 1:
            raise ConfigError(
                f"split of layout {layout!r} must be {', '.join(known)}, or several as a+b, found {split!r}"
                f"{did_you_mean(part, known)}"
            )
    if layout in ("folder", "imagenet"):
        return _folder(folder, layout, parts)
    lists = [_READERS[layout](folder, part) for part in parts]
    classes = lists[0].classes
    for one, part in zip(lists, parts, strict=True):
        if outside := [i for i, label in enumerate(one.labels) if not 0 <= label < len(classes)]:
            raise CatalogError(
                f"{str(folder)!r}: labels of {part} must lie in the {len(classes)} classes, found number "
                f"{one.labels[outside[0]]} (counted from 0) for {one.paths[outside[0]]!r}; the lists are damaged or of "
                "different versions."
            )
    paths = [path for one in lists for path in one.paths]
    labels = [label for one in lists for label in one.labels]
    return Split(folder, _catalog(folder, f"{layout}-{split}", paths, labels, classes))


def _catalog(root: Path, key: str, paths: list[str], labels: list[int], classes: list[str]) -> Catalog:
    """The catalog of listed files; their sizes are read once and saved, as `index` does for a folder."""
    if not paths:
        raise CatalogError(
            f"{str(root)!r}: the lists name no images for {key}; they are damaged or of another version."
        )
    location = default_location(root.resolve() / f".{key}")
    try:
        known = Catalog.open(location)
        same = np.array_equal(known.labels, labels) and known.classes == tuple(classes) and list(known.paths) == paths
        if same:
            return known
    except CatalogError:
        pass  # missing or damaged: it is made again
    missing = [path for path in paths if not (root / path).is_file()]
    if missing:
        raise CatalogError(
            f"{str(root)!r}: {len(missing)} of the {len(paths)} images that the lists name for {key} are missing, "
            f"{missing[0]!r} first; unpack all of the dataset's archives here."
        )
    catalog = Catalog.from_arrays(paths, labels, classes, root=root)
    try:
        catalog.save(location)
    except CatalogError:
        return catalog  # it is read again next time
    return Catalog.open(location)


# Folders --------------------------------------------------------------------------------------------------------------


def _folder(root: Path, layout: str, parts: Sequence[str]) -> Split:
    divided = (root / "train").is_dir() and any((root / name).is_dir() for name in ("val", "test"))
    if not divided:
        if layout == "imagenet" or parts != ["train"]:
            names = ", ".join(one.name for one in sorted(root.iterdir())[:5])
            raise CatalogError(
                f"{str(root)!r}: layout {layout!r} has {'/, '.join(['train', *parts])}/ in its folder, found {names}; "
                "give the folder above them" + ("" if layout == "imagenet" else ", or train on a share of it") + "."
            )
        return Split(root, index(root))
    for part in parts:
        if not (root / part).is_dir():
            raise CatalogError(f"{str(root)!r}: there is no {part}/ in it; this folder has no such split.")
    splits = {part: index(root / part) for part in dict.fromkeys(("train", *parts))}
    classes = splits["train"].classes
    for part, catalog in splits.items():
        if catalog.classes != classes:
            odd = sorted(set(classes) ^ set(catalog.classes))
            raise CatalogError(
                f"{str(root)!r}: the classes of {part}/ must be those of train/, found {len(catalog.classes)} and "
                f"{len(classes)}, {odd[0]!r} in one of them alone; a folder is missing or unexpected."
            )
    if len(parts) == 1:
        return Split(root / parts[0], splits[parts[0]])
    paths = [f"{part}/{path}" for part in parts for path in splits[part].paths]
    labels = [label for part in parts for label in splits[part].labels.tolist()]
    return Split(root, _catalog(root, f"{layout}-{'+'.join(parts)}", paths, labels, list(classes)))


# Lists ----------------------------------------------------------------------------------------------------------------


def _lines(root: Path, name: str, layout: str) -> list[str]:
    """The lines of a list that are not empty."""
    file = root / name
    try:
        return [
            line for line in file.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if line.strip()
        ]
    except FileNotFoundError as error:
        raise _not_the_layout(root, name, layout) from error
    except OSError as error:
        raise CatalogError(f"{str(file)!r}: cannot be read ({error.strerror}).") from error


def _not_the_layout(root: Path, name: str, layout: str) -> CatalogError:
    found = ", ".join(sorted(one.name for one in root.iterdir())[:6]) or "nothing"
    return CatalogError(f"{str(root)!r}: layout {layout!r} has {name} in its folder, found {found}; give that folder.")


def _fields(root: Path, name: str, layout: str, count: int, *, separator: str | None = None) -> Iterator[list[str]]:
    """The lines of a list, split into `count` fields; the last one may contain spaces."""
    for number, line in enumerate(_lines(root, name, layout), 1):
        fields = line.strip().split(separator, count - 1)
        if len(fields) != count:
            raise CatalogError(
                f"{str(root / name)!r}: every line must have {count} fields, line {number} is {line!r}; the file is "
                "damaged."
            )
        yield fields


def _number(text: str, file: Path) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise CatalogError(f"{str(file)!r}: must hold whole numbers, found {text!r}; the file is damaged.") from error


def _label(name: str, classes: Mapping[str, int], path: str, file: Path) -> int:
    if name not in classes:
        raise CatalogError(
            f"{str(file)!r}: the class of {path!r} must be one of the {len(classes)} listed, found {name!r}; the "
            "lists are damaged or of different versions."
        )
    return classes[name]


def _tiny_imagenet(root: Path, split: str) -> _Listed:
    classes = [line.strip() for line in _lines(root, "wnids.txt", "tiny-imagenet")]
    label_of = {name: label for label, name in enumerate(classes)}
    if split == "val":
        file = root / "val/val_annotations.txt"
        rows = list(_fields(root, "val/val_annotations.txt", "tiny-imagenet", 6))
        paths = [f"val/images/{row[0]}" for row in rows]
        labels = [_label(row[1], label_of, path, file) for row, path in zip(rows, paths, strict=True)]
        return _Listed(paths, labels, classes)
    paths, labels = [], []
    for label, name in enumerate(classes):
        folder = root / "train" / name / "images"
        if not folder.is_dir():
            raise CatalogError(f"{str(root)!r}: wnids.txt names {name!r}, but there is no {folder.relative_to(root)}/.")
        found = sorted(one.name for one in folder.iterdir() if not one.name.startswith("."))
        paths += [f"train/{name}/images/{one}" for one in found]
        labels += [label] * len(found)
    return _Listed(paths, labels, classes)


def _cub(root: Path, split: str) -> _Listed:
    classes = [name for _, name in _fields(root, "classes.txt", "cub", 2)]
    path_of = dict(_fields(root, "images.txt", "cub", 2))
    class_of = dict(_fields(root, "image_class_labels.txt", "cub", 2))
    in_train = dict(_fields(root, "train_test_split.txt", "cub", 2))
    for name, found in (("image_class_labels.txt", class_of), ("train_test_split.txt", in_train)):
        if odd := sorted(found.keys() ^ path_of.keys()):
            raise CatalogError(
                f"{str(root / name)!r}: must list the images of images.txt, but image {odd[0]} is in one of them alone "
                f"({len(found)} and {len(path_of)}); the files are damaged or of different versions."
            )
    wanted = [image for image in path_of if (in_train[image] == "1") == (split == "train")]
    labels = [_number(class_of[image], root / "image_class_labels.txt") - 1 for image in wanted]
    return _Listed([f"images/{path_of[image]}" for image in wanted], labels, classes)


def _aircraft(root: Path, split: str) -> _Listed:
    if not (root / "data").is_dir() and (root / "variants.txt").is_file():
        raise _not_the_layout(root, "data/variants.txt", "aircraft")
    classes = [line.strip() for line in _lines(root, "data/variants.txt", "aircraft")]
    label_of = {name: label for label, name in enumerate(classes)}
    name = f"data/images_variant_{split}.txt"
    rows = list(_fields(root, name, "aircraft", 2))
    labels = [_label(variant, label_of, image, root / name) for image, variant in rows]
    return _Listed([f"data/images/{image}.jpg" for image, _ in rows], labels, classes)


# MATLAB's lists -------------------------------------------------------------------------------------------------------


def _matlab(file: Path, variable: str, root: Path, layout: str) -> NDArray[Any]:
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise MissingDependencyError(
            f"layout {layout!r} reads .mat files with SciPy; run `pip install scipy`."
        ) from error
    if not file.is_file():
        raise _not_the_layout(root, str(file.relative_to(root)), layout)
    try:
        return np.asarray(loadmat(file, squeeze_me=False)[variable])
    except (MatReadError, ValueError, TypeError, KeyError, NotImplementedError, OSError) as error:
        raise CatalogError(
            f"{str(file)!r}: must be a MATLAB 5 file with {variable!r} ({type(error).__name__}: {error}); fetch it "
            "again."
        ) from error


def _flowers(root: Path, split: str) -> _Listed:
    numbers = _matlab(root / "imagelabels.mat", "labels", root, "flowers").ravel().astype(int)
    variable = {"train": "trnid", "val": "valid", "test": "tstid"}[split]
    images = _matlab(root / "setid.mat", variable, root, "flowers").ravel().astype(int)
    if outside := [image for image in images.tolist() if not 1 <= image <= len(numbers)]:
        raise CatalogError(
            f"{str(root / 'setid.mat')!r}: {variable} must name images 1 to {len(numbers)}, as many as imagelabels.mat "
            f"has labels, found {outside[0]}; the two files are of different versions."
        )
    classes = [f"{number:03d}" for number in range(1, max(numbers.max(initial=0), 1) + 1)]
    labels = (numbers[images - 1] - 1).tolist()
    return _Listed([f"jpg/image_{image:05d}.jpg" for image in images.tolist()], labels, classes)


def _cars(root: Path, split: str) -> _Listed:
    names = _matlab(root / "devkit/cars_meta.mat", "class_names", root, "cars").ravel()
    if split == "train":
        file = root / "devkit/cars_train_annos.mat"
    else:
        inside = root / "devkit/cars_test_annos_withlabels.mat"
        file = inside if inside.is_file() else root / "cars_test_annos_withlabels.mat"
    rows = _matlab(file, "annotations", root, "cars").ravel()
    for name in ("fname", "class"):
        if name not in (rows.dtype.names or ()):
            raise CatalogError(
                f"{str(file)!r}: annotations must have {name!r}, found {rows.dtype.names}; fetch it again."
            )
    paths = [f"cars_{split}/{row['fname'].item()}" for row in rows]
    return _Listed(paths, [int(row["class"].item()) - 1 for row in rows], [str(name.item()) for name in names])


# CIFAR's pickles ------------------------------------------------------------------------------------------------------

_SIDE: Final = 32


class _Array:
    """A NumPy array in a pickle: its fields, from which reading makes nothing."""

    state: tuple[Any, ...] = ()

    def __init__(self, *given: object) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def bytes(self, expected: tuple[int, ...]) -> NDArray[np.uint8]:
        """The array if it is uint8 of this shape. Raises ValueError, TypeError, AttributeError."""
        _, shape, dtype, fortran, content = self.state
        if tuple(shape) != expected or dtype.kind != "u1" or fortran:
            raise ValueError(f"data must be uint8 of shape {expected}, found {dtype.kind!r} of shape {shape}")
        content = content.encode("latin1") if isinstance(content, str) else content
        return np.frombuffer(content, np.uint8).reshape(expected)


class _Dtype:
    def __init__(self, kind: str = "", *given: object) -> None:
        self.kind = kind

    def __setstate__(self, state: object) -> None:
        pass


def _encode(text: str, encoding: str) -> bytes:
    """Bytes as Python 3 writes them in old pickles."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in {encoding!r}")
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Reads numbers, text, lists, dictionaries and uint8 arrays, and refuses everything else."""

    _KNOWN: Final[Mapping[tuple[str, str], Callable[..., Any]]] = {
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file does")
        return self._KNOWN[module, name]


def _unpickled(root: Path, name: str) -> dict[str, Any]:
    file = root / name
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise _not_the_layout(root, name, "cifar100") from error
    try:
        found = _Unpickler(io.BytesIO(content), encoding="latin1").load()
        return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in found.items()}
    except Exception as error:  # a damaged pickle may raise anything
        raise CatalogError(
            f"{str(file)!r}: must be a file of the Python version of CIFAR-100 ({error}); fetch it again."
        ) from error


def _cifar100(root: Path, split: str) -> _Listed:
    classes = [str(name) for name in _unpickled(root, "meta").get("fine_label_names", ())]
    found = _unpickled(root, split)
    try:
        labels = [int(label) for label in found["fine_labels"]]
        pixels = found["data"].bytes((len(labels), 3 * _SIDE * _SIDE)).reshape(-1, 3, _SIDE, _SIDE)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CatalogError(f"{str(root / split)!r}: is no split of CIFAR-100 ({error}); fetch it again.") from error
    names = [
        f"{classes[label] if 0 <= label < len(classes) else label}/{number:05d}.png"
        for number, label in enumerate(labels)
    ]
    if not (root / "png" / split).is_dir():
        _write_images(root, split, names, pixels.transpose(0, 2, 3, 1))
    return _Listed([f"png/{split}/{name}" for name in names], labels, classes)


def _write_images(root: Path, split: str, names: Sequence[str], images: NDArray[np.uint8]) -> None:
    """Write all images or none, so that an existing folder is whole."""
    try:
        (root / "png").mkdir(exist_ok=True)
        remove_temporary(root / "png", seconds=3600)
        with new_folder(root / "png" / split) as folder:
            for name, image in zip(names, images, strict=True):
                (folder / name).parent.mkdir(exist_ok=True)
                Image.fromarray(np.ascontiguousarray(image)).save(folder / name)
    except OSError as error:
        raise CatalogError(
            f"{str(root)!r}: the images cannot be written to png/ ({error}); they are needed as files: make the folder "
            "writable, or copy it."
        ) from error


LAYOUTS: Final[Mapping[str, tuple[str, ...]]] = {
    "folder": ("train", "val", "test"),
    "imagenet": ("train", "val"),
    "tiny-imagenet": ("train", "val"),
    "cifar100": ("train", "test"),
    "flowers": ("train", "val", "test"),
    "cars": ("train", "test"),
    "aircraft": ("train", "val", "test"),
    "cub": ("train", "test"),
}
"""Layout to its splits."""

_READERS: Final[Mapping[str, Callable[[Path, str], _Listed]]] = {
    "tiny-imagenet": _tiny_imagenet,
    "cifar100": _cifar100,
    "flowers": _flowers,
    "cars": _cars,
    "aircraft": _aircraft,
    "cub": _cub,
}
