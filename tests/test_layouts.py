"""Published datasets: read as they are unpacked, and refused, with the reason, where they are not whole."""

import pickle
from pathlib import Path

import miniature
import numpy as np
import pytest
from PIL import Image

from dali_diffusemix.catalog import LAYOUTS, Catalog, read_layout
from dali_diffusemix.errors import CatalogError, ConfigError

TEST_SPLIT = {"folder": "val", "imagenet": "val", "tiny-imagenet": "val"}
PER_CLASS = {"cifar100": 3 * miniature.TRAIN}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DALI_DIFFUSEMIX_CACHE", str(tmp_path / "own"))
    return lambda layout: miniature.BUILD[layout](tmp_path / layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_train_and_test(layout: str, made):
    root = made(layout)
    train = read_layout(layout, root, "train")
    test = read_layout(layout, root, TEST_SPLIT.get(layout, "test"))
    assert np.bincount(train.catalog.labels).tolist() == [PER_CLASS.get(layout, miniature.TRAIN)] * miniature.CLASSES
    assert np.bincount(test.catalog.labels).tolist() == [miniature.TEST] * miniature.CLASSES
    assert train.catalog.classes == test.catalog.classes
    for split in (train, test):
        for path, label, size in zip(split.catalog.paths, split.catalog.labels, split.catalog.sizes, strict=True):
            with Image.open(split.root / path) as image:
                assert (image.height, image.width) == tuple(size)
                # The square's colour tells the class.
                bright = (np.asarray(image).astype(int) > 200).reshape(-1, 3).sum(axis=0)
            assert bright.argmax() == label, path
    ours = {str(train.root / path) for path in train.catalog.paths}
    assert not ours & {str(test.root / path) for path in test.catalog.paths}


@pytest.mark.parametrize("layout", ["flowers", "aircraft", "folder"])
def test_splits_are_joined(layout: str, made):
    root = made(layout)
    both = read_layout(layout, root, "train+val").catalog
    assert len(both) == len(read_layout(layout, root, "train").catalog) + len(read_layout(layout, root, "val").catalog)


def test_headers_are_read_once(made, monkeypatch: pytest.MonkeyPatch):
    root = made("cub")
    first = read_layout("cub", root).catalog
    monkeypatch.setattr(Catalog, "from_arrays", None)
    again = read_layout("cub", root).catalog
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.sizes, first.sizes)


def test_lists_that_have_changed_are_read_again(made):
    root = made("cub")
    before = len(read_layout("cub", root).catalog)
    split = root / "train_test_split.txt"
    split.write_text(split.read_text().replace("1 1\n", "1 0\n", 1))
    assert len(read_layout("cub", root).catalog) == before - 1


def test_cifar_is_written_once_and_equals_its_pickle(made):
    root = made("cifar100")
    read_layout("cifar100", root, "train")
    file = root / "png/train/apple/00000.png"
    assert np.array_equal(np.asarray(Image.open(file)), np.asarray(miniature.picture(5, 0, 32)))
    stamp = file.stat().st_mtime_ns
    read_layout("cifar100", root, "train")
    assert file.stat().st_mtime_ns == stamp


def test_a_pickle_executes_nothing(made, tmp_path: Path):
    root = made("cifar100")

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    (root / "train").write_bytes(pickle.dumps({"fine_labels": [0], "data": Evil()}, protocol=2))
    with pytest.raises(CatalogError, match="no CIFAR file does"):
        read_layout("cifar100", root)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "folder"])
def test_a_wrong_root_is_named_with_what_it_holds(layout: str, tmp_path: Path):
    (tmp_path / "holiday").mkdir()
    with pytest.raises(CatalogError, match=r"has .* in its folder, found holiday; give"):
        read_layout(layout, tmp_path)


@pytest.mark.parametrize(
    ("layout", "file"),
    [
        ("cub", "images/002.Laysan_Albatross/Laysan_Albatross_0001_8.jpg"),
        ("flowers", "jpg/image_00002.jpg"),
        ("cars", "cars_train/00003.jpg"),
        ("aircraft", "data/images/1000007.jpg"),
    ],
)
def test_a_list_that_names_a_missing_file(layout: str, file: str, made):
    root = made(layout)
    (root / file).unlink()
    with pytest.raises(CatalogError, match=r"1 of the \d+ images that the lists name .* missing"):
        read_layout(layout, root)


def test_lists_that_disagree(made):
    root = made("cub")
    (root / "image_class_labels.txt").write_text("1 1\n")
    with pytest.raises(CatalogError, match=r"must list the images of images.txt"):
        read_layout("cub", root)


def test_labels_out_of_range(made):
    root = made("cub")
    file = root / "image_class_labels.txt"
    file.write_text(file.read_text().replace("\n2 1\n", "\n2 9\n"))
    with pytest.raises(CatalogError, match="must lie in the 3 classes, found number 8"):
        read_layout("cub", root)


def test_an_unknown_class(made):
    root = made("tiny-imagenet")
    file = root / "val/val_annotations.txt"
    file.write_text(file.read_text().replace("n01440001", "n99999999", 1))
    with pytest.raises(CatalogError, match="must be one of the 3 listed, found 'n99999999'"):
        read_layout("tiny-imagenet", root, "val")


def test_class_counts_that_disagree(made):
    root = made("imagenet")
    (root / "val/n01449999").mkdir()
    miniature.save(root / "val/n01449999/a.JPEG", 1, 0)
    with pytest.raises(CatalogError, match="classes of val/ must be those of train/, found 4 and 3"):
        read_layout("imagenet", root, "val")


def test_matlab_lists_of_different_versions(made):
    root = made("flowers")
    miniature.savemat(root / "imagelabels.mat", {"labels": np.array([[1, 2]], np.uint8)})
    with pytest.raises(CatalogError, match="must name images 1 to 2"):
        read_layout("flowers", root)


def test_a_damaged_matlab_file(made):
    root = made("flowers")
    (root / "setid.mat").write_bytes(b"no matlab")
    with pytest.raises(CatalogError, match="must be a MATLAB 5 file"):
        read_layout("flowers", root)


def test_unknown_layouts_and_splits(tmp_path: Path):
    with pytest.raises(ConfigError, match="layout must be one of"):
        read_layout("cifar10", tmp_path)
    with pytest.raises(ConfigError, match="split of layout 'cub' must be train, test"):
        read_layout("cub", tmp_path, "val")
    with pytest.raises(CatalogError, match="no such folder"):
        read_layout("cub", tmp_path / "nowhere")


def test_a_folder_without_splits_is_all_for_training(tmp_path: Path):
    root = miniature.single_folder(tmp_path / "all")
    assert len(read_layout("folder", root).catalog) == 90
    with pytest.raises(CatalogError, match="or train on a share"):
        read_layout("folder", root, "val")
