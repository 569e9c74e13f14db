"""The published datasets in miniature: some small images in their very layouts, for recipes and adapters."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from material import encoded, photograph
from PIL import Image
from scipy.io import savemat

CLASSES = 3
TRAIN, TEST = 4, 2  # images of each class


def picture(seed: int, label: int, size: int = 48) -> Image.Image:
    """A dark photograph with a square whose colour tells the class."""
    pixels = photograph(seed, size, size) // 2
    pixels[size // 4 : -size // 4, size // 4 : -size // 4] = np.eye(3, dtype=np.uint8)[label % 3] * 240
    return Image.fromarray(pixels)


def save(file: Path, seed: int, label: int, size: int = 48) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(encoded(picture(seed, label, size), quality=92))


def folder(root: Path) -> Path:
    for split, count in (("train", TRAIN), ("val", TEST)):
        for label in range(CLASSES):
            for number in range(count):
                save(root / split / f"class{label}" / f"{number}.jpg", 1000 * label + 10 * number + len(split), label)
    return root


def single_folder(root: Path) -> Path:
    for label in range(CLASSES):
        for number in range(30):
            save(root / f"class{label}" / f"{number}.jpg", 100 * label + number, label)
    return root


def imagenet(root: Path) -> Path:
    for split, count in (("train", TRAIN), ("val", TEST)):
        for label in range(CLASSES):
            name = f"n0144{label:04d}"
            for number in range(count):
                file = f"{name}_{number}.JPEG" if split == "train" else f"ILSVRC2012_val_{label * 10 + number:08d}.JPEG"
                save(root / split / name / file, 1000 * label + number + 10 * (split == "val"), label)
    return root


def tiny_imagenet(root: Path) -> Path:
    names = [f"n0144{label:04d}" for label in (2, 0, 1)]  # the list is not sorted
    root.mkdir(parents=True)
    (root / "wnids.txt").write_text("".join(f"{name}\n" for name in names))
    lines = []
    for label, name in enumerate(names):
        for number in range(TRAIN):
            save(root / "train" / name / "images" / f"{name}_{number}.JPEG", 10 * label + number, label, 64)
        (root / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t62\t63\n")
        for number in range(TEST):
            file = f"val_{label * TEST + number}.JPEG"
            save(root / "val/images" / file, 100 + 10 * label + number, label, 64)
            lines.append(f"{file}\t{name}\t0\t32\t44\t62\n")
    (root / "val/val_annotations.txt").write_text("".join(lines))
    return root


class Python2Pickler(pickle._Pickler):  # type: ignore[misc, name-defined]
    """Writes text as Python 2 did, which wrote CIFAR's files."""

    dispatch = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]  # noqa: RUF012

    def save_text(self, value: str | bytes) -> None:
        content = value.encode("latin1") if isinstance(value, str) else value
        if len(content) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(content)]) + content)
        else:
            self.write(pickle.BINSTRING + len(content).to_bytes(4, "little") + content)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_text


def python2_pickle(file: Path, value: object) -> None:
    with file.open("wb") as stream:
        Python2Pickler(stream, protocol=2).dump(value)
    # NumPy's module had its old name then.
    file.write_bytes(file.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))


def cifar100(root: Path) -> Path:
    root.mkdir(parents=True)
    names = ["apple", "aquarium_fish", "baby"]
    for split, count in (("train", 3 * TRAIN), ("test", TEST)):
        labels = [label for label in range(CLASSES) for _ in range(count)]
        images = [np.asarray(picture(7 * place + len(split), label, 32)) for place, label in enumerate(labels)]
        python2_pickle(
            root / split,
            {
                "filenames": [f"{names[label]}_s_{place:06d}.png" for place, label in enumerate(labels)],
                "batch_label": f"{split}ing batch 1 of 1",
                "fine_labels": labels,
                "coarse_labels": [0] * len(labels),
                "data": np.stack([image.transpose(2, 0, 1).reshape(-1) for image in images]),
            },
        )
    python2_pickle(root / "meta", {"fine_label_names": names, "coarse_label_names": ["fruit"]})
    return root


def flowers(root: Path) -> Path:
    labels, splits = [], {"trnid": [], "valid": [], "tstid": []}
    for number in range(1, CLASSES * (2 * TRAIN + TEST) + 1):
        label = (number - 1) % CLASSES
        save(root / "jpg" / f"image_{number:05d}.jpg", number, label)
        labels.append(label + 1)
        turn = (number - 1) // CLASSES
        splits["trnid" if turn < TRAIN else "valid" if turn < 2 * TRAIN else "tstid"].append(number)
    savemat(root / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    savemat(root / "setid.mat", {name: np.array([ids], np.uint16) for name, ids in splits.items()})
    return root


def _annotations(rows: list[tuple[str, int]]) -> Any:
    fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"]
    table = np.zeros((1, len(rows)), dtype=[(name, object) for name in fields])
    for place, (name, label) in enumerate(rows):
        for field in fields[:4]:
            table[0, place][field] = np.array([[1]], np.uint8)
        table[0, place]["class"] = np.array([[label]], np.uint8)
        table[0, place]["fname"] = name
    return table


def cars(root: Path) -> Path:
    (root / "devkit").mkdir(parents=True)
    names = np.empty((1, CLASSES), object)
    names[0] = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Acura TL Sedan 2012"]
    savemat(root / "devkit/cars_meta.mat", {"class_names": names})
    for split, count, file in (
        ("train", TRAIN, "devkit/cars_train_annos.mat"),
        ("test", TEST, "cars_test_annos_withlabels.mat"),
    ):
        rows = []
        for number in range(1, CLASSES * count + 1):
            label = (number - 1) % CLASSES
            save(root / f"cars_{split}" / f"{number:05d}.jpg", number + 1000 * (split == "test"), label)
            rows.append((f"{number:05d}.jpg", label + 1))
        savemat(root / file, {"annotations": _annotations(rows)})
    return root


def aircraft(root: Path) -> Path:
    names = ["707-320", "Boeing 717", "DC-10"]
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    number = 1000000
    for split, count in (("train", TRAIN), ("val", TRAIN), ("test", TEST)):
        for label, name in enumerate(names):
            for _ in range(count):
                number += 7
                save(root / "data/images" / f"{number:07d}.jpg", number, label)
                lists[split].append(f"{number:07d} {name}\n")
    (root / "data/variants.txt").write_text("".join(f"{name}\n" for name in names))
    for split, lines in lists.items():
        (root / f"data/images_variant_{split}.txt").write_text("".join(lines))
    return root


def cub(root: Path) -> Path:
    names = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]
    files: dict[str, list[str]] = {"images": [], "image_class_labels": [], "train_test_split": []}
    number = 0
    for label, name in enumerate(names):
        for place in range(TRAIN + TEST):
            number += 1
            file = f"{name}/{name[4:]}_{place:04d}_{number}.jpg"
            save(root / "images" / file, number, label)
            files["images"].append(f"{number} {file}\n")
            files["image_class_labels"].append(f"{number} {label + 1}\n")
            files["train_test_split"].append(f"{number} {int(place < TRAIN)}\n")
    for name, lines in files.items():
        (root / f"{name}.txt").write_text("".join(lines))
    (root / "classes.txt").write_text("".join(f"{label + 1} {name}\n" for label, name in enumerate(names)))
    return root


BUILD: dict[str, Callable[[Path], Path]] = {
    "folder": folder,
    "imagenet": imagenet,
    "tiny-imagenet": tiny_imagenet,
    "cifar100": cifar100,
    "flowers": flowers,
    "cars": cars,
    "aircraft": aircraft,
    "cub": cub,
}
