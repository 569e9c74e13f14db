"""Sources: every way to give originals yields the same pixels and labels as the folder that they were taken from."""

import gzip
import io
import json
import os
import pickle
import sys
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import odd
import pytest
import webdataset
from material import encoded, photograph
from numpy.typing import NDArray
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from dali_diffusemix.catalog import Catalog, index
from dali_diffusemix.errors import CatalogError, ConfigError, DecodeError, MissingDependencyError
from dali_diffusemix.images.codec import decode, rgb
from dali_diffusemix.images.formats import measure
from dali_diffusemix.sources import Content, Source, source_of

CLASSES = ("ants", "bees", "cats")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 small images of many kinds in 3 classes."""
    root = tmp_path_factory.mktemp("odd")
    picture = Image.fromarray(photograph(1, 20, 31))
    turned = Image.Exif()
    turned[0x112] = 6
    pngs, jpegs = odd.pngs(), odd.jpegs()
    palette = encoded(picture.quantize(9), "PNG", transparency=3)
    files = {
        "plain.jpg": encoded(picture),
        "progressive.jpg": encoded(picture, progressive=True),
        "turned.jpg": encoded(picture, exif=turned),
        "grey.jpg": encoded(picture.convert("L")),
        "cmyk.jpg": encoded(picture.convert("CMYK")),
        "plain.png": encoded(picture, "PNG"),
        "alpha.png": encoded(picture.convert("RGBA"), "PNG"),
        "grey and alpha.png": encoded(picture.convert("LA"), "PNG"),
        "palette.png": palette,
        "bilevel.png": encoded(picture.convert("1"), "PNG"),
        "turned.png": encoded(picture, "PNG", exif=turned),
        "turned at the end.png": pngs["after: eXIf"],
        "interlaced.png": pngs["2 of 8, interlaced"],
        "16 bits.png": pngs["0 of 16"],
        "4 bits.png": pngs["3 of 4"],
        "plain.bmp": encoded(picture, "BMP"),
        "plain.tif": encoded(picture, "TIFF"),
        "turned.tiff": encoded(picture, "TIFF", exif=turned),
        "plain.ppm": encoded(picture, "PPM"),
        "plain.webp": encoded(picture, "WEBP"),
        "one pixel.png": pngs["1 x 1"],
        "odd.jpg": next(iter(jpegs.values())),
    }
    for number, (name, content) in enumerate(files.items()):
        path = root / CLASSES[number % 3] / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return root


Rows = list[tuple[bytes, int]]
"""The file and label of every image of a folder."""


@pytest.fixture(scope="module")
def rows(folder: Path) -> Rows:
    catalog = index(folder)
    return [
        ((folder / path).read_bytes(), int(label)) for path, label in zip(catalog.paths, catalog.labels, strict=True)
    ]


def pixels(content: Content) -> NDArray[np.uint8]:
    if isinstance(content, DecodeError):
        raise content
    return decode(content) if isinstance(content, bytes) else content


def check(source: Source, rows: Rows, classes: Sequence[str] = CLASSES, *, again: Source | None = None) -> Catalog:
    """The source has these rows: pixels, labels and sizes, from any row on; `again` lists the same."""
    steps: list[tuple[int, int]] = []
    catalog = source.catalog(lambda done, total: steps.append((done, total)))
    assert source.catalog() is catalog
    assert catalog.classes == tuple(classes)
    assert catalog.labels.tolist() == [label for _, label in rows]
    assert len(set(catalog.paths)) == len(rows)
    everything = list(source.read(range(len(catalog))))
    for content, (file, _), size in zip(everything, rows, catalog.sizes.tolist(), strict=True):
        found = pixels(content)
        assert found.dtype == np.uint8 and list(found.shape) == [*size, 3]
        np.testing.assert_array_equal(found, decode(file))
    count = len(rows)
    for part in (
        range(count // 2, count),
        range(3, min(7, count)),
        range(count - 1, count),
        range(2, 2),
        range(1, count, 5),
    ):
        for one, other in zip(source.read(part), [everything[row] for row in part], strict=True):
            np.testing.assert_array_equal(pixels(one), pixels(other))
    for outside in (range(count - 1, count + 1), range(-1, 2)):
        with pytest.raises(IndexError, match="rows must lie between 0 and"):
            list(source.read(outside))
    assert not steps or (steps == sorted(steps) and steps[-1][0] == steps[-1][1])
    assert isinstance(source.name, str) and source.name
    if again is not None:
        assert again.catalog().fingerprint == catalog.fingerprint
        assert list(again.catalog().paths) == list(catalog.paths)
    return catalog


def rejected(source: Source) -> dict[str, str]:
    return {one.path: one.reason for one in source.catalog().rejected}


# Folders and layouts --------------------------------------------------------------------------------------------------


def test_a_folder(folder: Path, rows: Rows) -> None:
    catalog = check(source_of(folder), rows, again=source_of(str(folder)))
    assert list(source_of(folder).read(range(len(rows)))) == [file for file, _ in rows]
    assert list(catalog.paths) == list(index(folder).paths)


def test_a_layout(folder: Path, rows: Rows, tmp_path: Path) -> None:
    (tmp_path / "train").symlink_to(folder)
    (tmp_path / "val").symlink_to(folder)
    check(source_of(tmp_path, kind="folder"), rows)
    both = source_of(tmp_path, kind="folder", split="train+val")
    check(both, rows * 2)
    with pytest.raises(CatalogError, match="look like splits"):
        source_of(tmp_path).catalog()
    with pytest.raises(ConfigError, match="split applies to layouts, found 'val'; name the layout with kind="):
        source_of(tmp_path, split="val")


def test_cifar_100(tmp_path: Path) -> None:
    images = np.stack([photograph(seed, 32, 32) for seed in range(12)])
    labels = [row % 3 for row in range(12)]
    (tmp_path / "meta").write_bytes(pickle.dumps({"fine_label_names": list(CLASSES)}))
    split = {"fine_labels": labels, "data": images.transpose(0, 3, 1, 2).reshape(12, -1)}
    (tmp_path / "test").write_bytes(pickle.dumps(split))
    rows = [(encoded(image, "PNG"), label) for image, label in zip(images, labels, strict=True)]
    check(source_of(tmp_path, kind="cifar100", split="test"), rows)


def test_a_file_that_vanishes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("0.png", "1.png", "2.png"):
        (tmp_path / "a" / name).write_bytes(encoded(photograph(1, 5, 6), "PNG"))
    source = source_of(tmp_path)
    source.catalog()
    (tmp_path / "a/1.png").unlink()
    first, second, third = source.read(range(3))
    assert isinstance(first, bytes) and isinstance(third, bytes)
    assert isinstance(second, DecodeError) and "1.png': is missing" in str(second)


# WebDataset -----------------------------------------------------------------------------------------------------------


def extension(content: bytes) -> str:
    with Image.open(io.BytesIO(content)) as image:
        return {"JPEG": "jpg", "TIFF": "tif"}.get(str(image.format), str(image.format).lower())


def write_tar(path: Path, rows: Rows, start: int = 0, label: Callable[[int], dict[str, Any]] | None = None) -> Path:
    label = label or (lambda value: {"cls": value})
    with webdataset.TarWriter(str(path)) as writer:
        for number, (file, value) in enumerate(rows, start):
            writer.write({"__key__": f"{number:06}", extension(file): file, **label(value)})
    return path


def test_tars(rows: Rows, tmp_path: Path) -> None:
    with webdataset.ShardWriter(f"{tmp_path}/shard-%03d.tar", maxcount=9, verbose=0) as writer:
        for number, (file, label) in enumerate(rows):
            writer.write({"__key__": f"part/{number:06}", extension(file): file, "cls": label, "json": {"name": label}})
    names = sorted(str(path) for path in tmp_path.iterdir())
    assert len(names) == 3
    given: list[Any] = [tmp_path, f"{tmp_path}/shard-{{000..002}}.tar", f"{tmp_path}/shard-*.tar", names]
    paths = [f"part/{number:06}.{extension(file)}" for number, (file, _) in enumerate(rows)]
    for one in given:
        assert list(check(source_of(one), rows, "012", again=source_of(given[0])).paths) == paths
    for one in ("json:name", "CLS"):
        check(source_of(tmp_path, label=one), rows, "012")
    plain = [(file, 0) for file, _ in rows]
    check(source_of(tmp_path, label=False), plain, ["unlabelled"])
    keys, labels = [], []
    for name in names:
        with open(name, "rb") as stream:  # noqa: PTH123 - webdataset itself leaves it open
            for sample in group_by_keys(tar_file_expander([{"url": name, "stream": stream}])):
                keys.append(sample["__key__"])
                labels.append(int(sample["cls"]))
    assert labels == source_of(tmp_path).catalog().labels.tolist()
    assert keys == [path.rsplit(".", 1)[0] for path in paths]


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz"])
def test_compressed_tars(rows: Rows, tmp_path: Path, ending: str) -> None:
    plain = write_tar(tmp_path / "plain.tar", rows)
    path = tmp_path / f"a.tar.{ending}"
    with tarfile.open(plain) as source, tarfile.open(path, f"w:{ending}") as target:  # type: ignore[call-overload]
        for member in source:
            target.addfile(member, source.extractfile(member))
    check(source_of(path), rows, "012", again=source_of(plain))


def test_keys_that_repeat_between_tars(rows: Rows, tmp_path: Path) -> None:
    paths = [write_tar(tmp_path / f"{name}.tar", rows[begin:end]) for name, begin, end in (("x", 0, 9), ("y", 9, 22))]
    catalog = check(source_of(paths), rows, "012", again=source_of(tmp_path))
    assert catalog.path(0).startswith("x/000000.") and catalog.path(9).startswith("y/000000.")


def test_labels_of_text(rows: Rows, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", rows, label=lambda value: {"txt": CLASSES[value], "json": {"n": str(value)}})
    check(source_of(path, label="txt"), rows)
    check(source_of(path, label="json:n"), rows, "012")
    with pytest.raises(ConfigError, match=r"no member 'cls' has labels .* found 'json', 'txt'; name one with label="):
        source_of(path).catalog()
    with pytest.raises(ConfigError, match="label must be an extension of the first samples, found 'klass'"):
        source_of(path, label="klass").catalog()


def add(tar: tarfile.TarFile, name: str, content: bytes, **fields: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content))


def test_damage_in_tars(rows: Rows, tmp_path: Path) -> None:
    good = encoded(photograph(1, 9, 8), "PNG")
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "__meta__", b"x")
        add(tar, "./d/0.png", good)
        add(tar, "./d/0.cls", b"1\n")
        add(tar, "1.png", good)  # no label
        add(tar, "2.cls", b"0")  # no image
        add(tar, "3.png", good[:20])
        add(tar, "3.cls", b"0")
        add(tar, "4.png", b"GIF89a")
        add(tar, "4.cls", b"0")
        add(tar, "5.png", good)
        add(tar, "5.cls", b"cat")
        add(tar, "6.png", good)
        add(tar, "6.cls", b"-1")
        add(tar, "README", b"read me")
        add(tar, "7.png", b"", type=tarfile.SYMTYPE, linkname="0.png")
        add(tar, "8.png", good)
        add(tar, "8.cls", b"2")
        add(tar, "d/0.png", good)  # again
        add(tar, "d/0.cls", b"1")
        add(tar, "9.png", good)
        add(tar, "9.jpg", encoded(photograph(1, 9, 8)))
        add(tar, "9.cls", b"0")
        add(tar, "../up.png", good)
        add(tar, "../up.cls", b"0")
        add(tar, "10.png", good)
        add(tar, "10.PNG", good)
        add(tar, "10.cls", b"0")
        add(tar, "11.png", good)
        add(tar, "11.cls", b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"image must be named. a.tar, 9: It has several images \(jpg, png\)"):
        source_of(path).catalog()
    source = source_of(path, image="png;jpg")
    catalog = source.catalog()
    assert list(catalog.paths) == ["d/0.png", "8.png", "9.png"] and catalog.labels.tolist() == [1, 2, 0]
    assert catalog.classes == ("0", "1", "2")
    assert list(source.read(range(3))) == [good] * 3
    found = rejected(source)
    for where, reason in {
        "a.tar, 1.png": "Its label is missing",
        "a.tar, 2": "It has no image, with the extension png or jpg; found 'cls'",
        "a.tar, 3.png": "Its PNG header",
        "a.tar, 4.png": "unsupported: it is a GIF",
        "a.tar, 5": "Its label must be a whole number, as most of the first are, found 'cat'",
        "a.tar, 6.png": "Its label must be 0 or more, found -1",
        "a.tar, README": "It belongs to no sample",
        "a.tar, 7.png": "It is a link",
        "a.tar, d/0": "Its key was in this tar before",
        "a.tar, ../up": "Its key must be a path without '..'",
        "a.tar, 10": "It has two members 'png'",
        "a.tar, 11": "Its label '11.cls' must be text",
    }.items():
        assert found.pop(where).startswith(reason), where
    assert not found


@pytest.mark.parametrize("compressed", [False, True])
def test_a_tar_that_is_cut_short(rows: Rows, tmp_path: Path, compressed: bool) -> None:
    whole = write_tar(tmp_path / "whole.tar", rows).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        members = tar.getmembers()
    half, label = members[20], members[21]
    assert half.name.startswith("000010.") and half.size > 0 and label.name.startswith("000010.")
    image = next(one for one in (half, label) if not one.name.endswith("cls"))
    path = tmp_path / ("a.tar.gz" if compressed else "a.tar")
    for end in (image.offset_data + image.size - 1, image.offset + 100, image.offset):
        path.write_bytes(gzip.compress(whole[:end]) if compressed else whole[:end])
        source = source_of(path)
        assert source.catalog().labels.tolist() == [label for _, label in rows[:10]], end
        assert "cut short" in rejected(source)[path.name]
        assert [pixels(one).shape for one in source.read(range(9, 10))] == [decode(rows[9][0]).shape]
    path.write_bytes(gzip.compress(whole)[:-900] if compressed else whole[: image.offset] + b"noise" * 2000)
    assert any("cut short" in reason for reason in rejected(source_of(path)).values())
    path.write_bytes(b"no tar" * 1000)
    with pytest.raises(CatalogError, match=r"there is no sample in it. 1 left out, the first 'a.tar(.gz)?'"):
        source_of(path).catalog()


def test_a_tar_that_changes(rows: Rows, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", rows)
    source = source_of(path)
    source.catalog()
    os.utime(path, (1, 1))
    assert all("has changed since it was listed" in str(one) for one in source.read(range(3)))
    path.unlink()
    (one,) = source.read(range(5, 6))
    assert isinstance(one, DecodeError) and "cannot be read (No such file" in str(one)


def peak(work: Callable[[], object]) -> int:
    """The most bytes that Python held at once during the work."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_tars_need_little_memory(tmp_path: Path, ending: str) -> None:
    image = encoded(np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8), "PNG")  # 480 KB
    with webdataset.TarWriter(str(tmp_path / f"a.{ending}")) as writer:
        for number in range(60):
            writer.write({"__key__": f"{number}", "png": image, "cls": 0})
    source = source_of(tmp_path / f"a.{ending}")
    assert peak(source.catalog) < (3 << 20)
    assert peak(lambda: sum(len(one) for one in source.read(range(60)) if isinstance(one, bytes))) < (3 << 20)


def test_listing_a_tar_reads_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = encoded(np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8), quality=95)
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(20):
            writer.write({"__key__": f"{number}", "jpg": image, "cls": 0})
    read = 0
    pread = os.pread

    def counting(descriptor: int, length: int, offset: int) -> bytes:
        nonlocal read
        read += length
        return pread(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", counting)
    assert len(source_of(tmp_path / "a.tar").catalog()) == 20
    assert 0 < read <= 20 * 2 * 16384 < 20 * len(image) // 4


# Parquet --------------------------------------------------------------------------------------------------------------


def huggingface(rows: Rows) -> Any:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    columns = {
        "image": [{"bytes": file, "path": None} for file, _ in rows],
        "label": [label for _, label in rows],
    }
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture(autouse=True)
def _no_bars(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_parquet_by_datasets(rows: Rows, tmp_path: Path) -> None:
    dataset = huggingface(rows)
    for number, (begin, end) in enumerate(((0, 7), (7, 22))):
        part = dataset.select(range(begin, end))
        part.to_parquet(tmp_path / f"train-{number:05}-of-00002.parquet", batch_size=4)
    given = (tmp_path, f"{tmp_path}/train-*.parquet", sorted(tmp_path.iterdir()))
    for one in given:
        catalog = check(source_of(one), rows, again=source_of(tmp_path))
    assert catalog.path(0) == "train-00000-of-00002/0" and catalog.path(7) == "train-00001-of-00002/00"
    assert list(source_of(tmp_path).read(range(22))) == [file for file, _ in rows]
    dataset.to_parquet(tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(CatalogError, match=r"must be of one split, found test, train.*as '.*/\*train\*.parquet'"):
        source_of(tmp_path)


def write_parquet(path: Path, rows: Rows, *, row_group: int = 5, page: int = 1024, **columns: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = columns or {"label": [CLASSES[label] for _, label in rows]}
    table = pyarrow.table({"picture": pyarrow.array([file for file, _ in rows], pyarrow.binary()), **columns})
    parquet.write_table(table, path, row_group_size=row_group, write_batch_size=page)
    return path


def test_parquet_by_hand(rows: Rows, tmp_path: Path) -> None:
    for number, (begin, end) in enumerate(((0, 12), (12, 22))):
        write_parquet(tmp_path / f"part{number}.parquet", rows[begin:end])
    check(source_of(tmp_path), rows, again=source_of(tmp_path, image="picture", label="label", kind="parquet"))
    check(source_of(tmp_path, label=False), [(file, 0) for file, _ in rows], ["unlabelled"])
    numbers = [label for _, label in rows]
    path = write_parquet(tmp_path / "numbers.parquet", rows, number=numbers, other=numbers, caption=["x"] * 22)
    check(source_of(path, label="number"), rows, "012")
    with pytest.raises(
        ConfigError, match=r"none of the columns is by its name .*'number' \(int64\), 'other' \(int64\)"
    ):
        source_of(path).catalog()
    path = write_parquet(tmp_path / "several.parquet", rows, label=numbers, target=numbers, more=[b"x"] * 22)
    with pytest.raises(ConfigError, match=r"several columns may hold the images, 'picture' .*'more' .*image='picture'"):
        source_of(path).catalog()
    with pytest.raises(ConfigError, match=r"several columns may be .*'label' .*'target' .*label='label'"):
        source_of(path, image="picture").catalog()
    with pytest.raises(ConfigError, match=r"image must be one of its columns, found 'photo'; they are 'picture'"):
        source_of(path, image="photo").catalog()
    with pytest.raises(ConfigError, match=r"image must name a column of image files .* found 'label' of type int64"):
        source_of(path, image="label").catalog()
    with pytest.raises(
        ConfigError, match=r"label must name a column of whole numbers or text, found 'more' of type bin"
    ):
        source_of(path, image="picture", label="more").catalog()


def test_a_dictionary_column_and_one_row_group(rows: Rows, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    labels = pyarrow.array([CLASSES[label] for _, label in rows]).dictionary_encode()
    check(source_of(write_parquet(tmp_path / "a.parquet", rows, row_group=100, label=labels)), rows)


def test_rows_of_parquet_that_cannot_be_used(rows: Rows, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    good = encoded(photograph(1, 9, 8), "PNG")
    (tmp_path / "there.png").write_bytes(good)
    images = [
        {"bytes": good, "path": "0.png"},
        None,
        {"bytes": None, "path": None},
        {"bytes": None, "path": "missing.png"},
        {"bytes": None, "path": "there.png"},
        {"bytes": good[:30], "path": None},
        {"bytes": b"GIF89a", "path": None},
        {"bytes": good, "path": None},
        {"bytes": good, "path": None},
        {"bytes": good, "path": None},
        {"bytes": b"", "path": None},
    ]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    labels = [1, 1, 1, 1, 0, 1, 1, None, -1, 10**7, 0]
    table = pyarrow.table({"image": pyarrow.array(images, kind), "label": labels})
    parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-40])
    source = source_of(tmp_path)
    assert list(source.catalog().paths) == ["a/00", "a/04"]
    assert source.catalog().labels.tolist() == [1, 0]
    assert list(source.read(range(2))) == [good] * 2
    found = rejected(source)
    for where, reason in {
        "a.parquet, row 1": "It has no usable image: neither its bytes nor a path",
        "a.parquet, row 2": "It has no usable image: neither its bytes nor a path",
        "a.parquet, row 3": f"It has no usable image: '{tmp_path}/missing.png': is missing",
        "a.parquet, row 5": "Its PNG header",
        "a.parquet, row 6": "unsupported: it is a GIF",
        "a.parquet, row 7": "Its label is missing; add one, or list the source with label=False",
        "a.parquet, row 8": "Its label must be 0 or more, found -1",
        "a.parquet, row 9": "Its label must be a whole number below 1000000",
        "a.parquet, row 10": "It is empty",
        "b.parquet": "It is no Parquet file, damaged or cut short",
    }.items():
        assert found.pop(where).startswith(reason), where
    assert not found
    (tmp_path / "there.png").unlink()
    _, missing = source.read(range(2))
    assert isinstance(missing, DecodeError) and "is missing" in str(missing)


def overwrite(path: Path, start: int, end: int) -> None:
    """Damage bytes of a file, which then seems unchanged."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xff" * (end - start))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def row_group(path: Path, number: int) -> int:
    """The offset of a row group."""
    parquet = pytest.importorskip("pyarrow.parquet")
    column = parquet.ParquetFile(path).metadata.row_group(number).column(0)
    return int(column.dictionary_page_offset or column.data_page_offset)


def test_damaged_pages_of_parquet(rows: Rows, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", rows)
    source = source_of(path)
    source.catalog()
    start = row_group(path, 1)
    overwrite(path, start, start + 64)
    contents = list(source.read(range(22)))
    assert [row for row, one in enumerate(contents) if isinstance(one, DecodeError)] == [*range(5, 10)]
    assert "a.parquet', row 5: They cannot be read (" in str(contents[5])
    again = source_of(path)
    assert [int(one.split("/")[1]) for one in again.catalog().paths] == [*range(5), *range(10, 22)]
    ((where, reason),) = rejected(again).items()
    assert where == "a.parquet, rows 5 to 9" and reason.startswith("They cannot be read (")
    for begin in (3, 8):
        files = [file for row, (file, _) in enumerate(rows) if not 5 <= row < 10]
        assert list(again.read(range(begin, 17))) == files[begin:]


def test_reading_begins_where_it_is_told(rows: Rows, tmp_path: Path) -> None:
    """Everything before is damaged, and not noticed."""
    files = [write_parquet(tmp_path / f"{number}.parquet", rows) for number in range(2)]
    source = source_of(tmp_path)
    source.catalog()
    overwrite(files[0], 0, files[0].stat().st_size)
    overwrite(files[1], 0, row_group(files[1], 2))
    assert list(source.read(range(22 + 12, 44))) == [file for file, _ in rows[12:]]
    tars = [write_tar(tmp_path / f"{number}.tar", rows) for number in range(2)]
    source = source_of(tars)
    source.catalog()
    overwrite(tars[0], 0, tars[0].stat().st_size)
    overwrite(tars[1], 0, tars[1].read_bytes().index(rows[12][0]))
    assert list(source.read(range(22 + 12, 44))) == [file for file, _ in rows[12:]]


def test_files_of_other_columns(rows: Rows, tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", rows)
    write_parquet(tmp_path / "b.parquet", rows, other=[1] * 22)
    with pytest.raises(CatalogError, match=r"b.parquet': must have the column 'label' \(string\).*as 'a.parquet' has"):
        source_of(tmp_path).catalog()


@pytest.mark.slow
def test_parquet_needs_little_memory(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    image = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    rows = [(encoded(image ^ np.uint8(number), "PNG"), 0) for number in range(240)]  # 65 MB in one row group
    path = write_parquet(tmp_path / "a.parquet", rows, row_group=1000, page=4)
    count, size = len(rows), len(rows[0][0])
    del rows
    source = source_of(path)
    pool = pyarrow.default_memory_pool()
    most = 0

    def watch(contents: Iterator[Content]) -> None:
        nonlocal most
        for one in contents:
            assert isinstance(one, bytes)
            most = max(most, pool.bytes_allocated())

    def listing(done: int, total: int) -> None:
        nonlocal most
        most = max(most, pool.bytes_allocated())

    before = pool.bytes_allocated()
    assert peak(lambda: source.catalog(listing)) < 80 * size
    assert peak(lambda: watch(source.read(range(count)))) < 80 * size
    assert most - before < 120 * size < count * size


# Hugging Face's datasets ----------------------------------------------------------------------------------------------


def test_a_dataset(rows: Rows) -> None:
    dataset = huggingface(rows)
    catalog = check(source_of(dataset), rows, again=source_of(dataset))
    assert list(catalog.paths) == [f"{row:02}" for row in range(22)]
    assert list(source_of(dataset).read(range(22))) == [file for file, _ in rows]
    order = np.random.default_rng(0).permutation(22).tolist()
    check(source_of(dataset.select(order)), [rows[row] for row in order])
    changed = dataset.with_transform(lambda batch: {"nothing": [0] * len(batch["label"])})
    check(source_of(changed), rows)
    check(source_of(dataset, label=False), [(file, 0) for file, _ in rows], ["unlabelled"])
    check(source_of(dataset.remove_columns("label")), [(file, 0) for file, _ in rows], ["unlabelled"])


def test_what_datasets_may_be_given(rows: Rows) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = huggingface(rows)
    with pytest.raises(
        ConfigError, match=r"found a DatasetDict of 'train', 'test'; give one of them, as dataset\['train"
    ):
        source_of(datasets.DatasetDict({"train": dataset, "test": dataset}))
    with pytest.raises(ConfigError, match="found an IterableDataset; load it with streaming=False"):
        source_of(dataset.to_iterable_dataset())
    coarse = dataset.add_column("coarse", [0] * 22).cast_column("coarse", datasets.ClassLabel(names=["all"]))
    with pytest.raises(ConfigError, match=r"several columns may be .*'label' \(ClassLabel\), 'coarse' \(ClassLabel\)"):
        source_of(coarse)
    check(source_of(coarse, label="label"), rows)
    texts = datasets.Dataset.from_dict({"file": [file for file, _ in rows], "class": [CLASSES[one] for _, one in rows]})
    check(source_of(texts), rows)


def test_rows_of_a_dataset_that_cannot_be_used(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    good = encoded(photograph(1, 9, 8), "PNG")
    (tmp_path / "there.png").write_bytes(good)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    images = [
        {"bytes": good, "path": None},
        None,
        str(tmp_path / "there.png"),
        str(tmp_path / "missing.png"),
        {"bytes": good[:40], "path": None},
        {"bytes": good, "path": None},
        {"bytes": good, "path": None},
    ]
    columns = {"image": images, "label": [1, 1, 0, 0, 0, -1, None]}
    source = source_of(datasets.Dataset.from_dict(columns, features=features))
    assert list(source.catalog().paths) == ["0", "2"] and source.catalog().labels.tolist() == [1, 0]
    assert list(source.read(range(2))) == [good] * 2
    found = rejected(source)
    for where, reason in {
        "row 1": "It has no usable image: neither its bytes nor a path",
        "row 3": f"It has no usable image: '{tmp_path}/missing.png': is missing",
        "row 4": "Its PNG header",
        "row 5": "Its label must be 0 or more, found -1, which test sets have",
        "row 6": "Its label is missing",
    }.items():
        assert found.pop(where).startswith(reason), where
    assert not found
    with pytest.raises(CatalogError, match=r"there is no usable image in it. 1 left out, the first 'row 0': Its label"):
        source_of(source._rows.select([5])).catalog()  # type: ignore[attr-defined]


# Arrays and map-style datasets ----------------------------------------------------------------------------------------


class Pictures:
    """A map-style dataset of these images, as torch's are."""

    def __init__(
        self, images: Sequence[Any], labels: Sequence[Any] | None, classes: Sequence[str] | None = None
    ) -> None:
        self.images, self.labels = images, labels
        if classes is not None:
            self.classes = classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Any:
        image = self.images[row]
        if isinstance(image, Exception):
            raise image
        return image if self.labels is None else (image, self.labels[row])


def test_a_dataset_of_pillow_images(rows: Rows) -> None:
    import torch

    files = [file for file, _ in rows]
    labels = [label for _, label in rows]

    class Opening(Pictures):
        def __getitem__(self, row: int) -> Any:
            return Image.open(io.BytesIO(files[row])), labels[row]

    check(
        source_of(Opening(files, labels, list(CLASSES))), rows, again=source_of(Opening(files, labels, list(CLASSES)))
    )
    check(source_of(Opening(files, labels)), rows, "012")
    loaded = [Image.open(io.BytesIO(file)) for file in files]
    kept = [(image.mode, image.size, dict(image.info)) for image in loaded]
    check(source_of(Pictures(loaded, [CLASSES[label] for label in labels])), rows)
    assert [one.mode for one in loaded] == [mode for mode, _, _ in kept]
    assert ["transparency" in one.info for one in loaded] == ["transparency" in info for _, _, info in kept]
    check(source_of(Pictures(loaded, None)), [(file, 0) for file in files], ["unlabelled"])
    check(source_of(Pictures(loaded, labels), label=False), [(file, 0) for file in files], ["unlabelled"])
    arrays = Pictures([decode(file) for file in files], [torch.tensor(label) for label in labels])
    check(source_of(arrays), rows, "012")
    check(source_of(torch.utils.data.Subset(arrays, range(14, 20))), rows[14:20], "012")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16"])
def test_pillow_images_become_what_their_files_do(mode: str) -> None:
    picture = Image.fromarray(photograph(2, 7, 9))
    image = (
        Image.fromarray(np.arange(0, 63000, 1000, np.uint16).reshape(7, 9)).convert(mode) if mode[0] == "I" else None
    )
    image = image or (picture.convert("P").convert("PA") if mode == "PA" else picture.convert(mode))
    found = rgb(image)
    assert found.shape == (7, 9, 3) and not found.flags.writeable
    form = {"CMYK": "TIFF", "YCbCr": "TIFF", "I": "TIFF"}.get(mode, "PNG")
    if mode not in ("PA", "HSV"):
        np.testing.assert_array_equal(found, decode(encoded(image, form)))
    else:
        np.testing.assert_array_equal(found, np.asarray(image.convert("RGB")))
    with pytest.raises(DecodeError, match="has floating-point values"):
        rgb(picture.convert("F"))


def test_items_that_cannot_be_used() -> None:
    good = photograph(1, 9, 8)
    cut = Image.open(io.BytesIO(encoded(good, "PNG")[:-60]))
    images = [good, OSError("gone"), good[..., 0], cut, good / 255.0, good, good, good, good[..., :2]]
    labels = [0, 0, 1, 0, 0, None, -1, 1.5, 0]
    source = source_of(Pictures(images, labels))
    assert list(source.catalog().paths) == ["0", "2"] and source.catalog().classes == ("0", "1")
    first, second = source.read(range(2))
    np.testing.assert_array_equal(pixels(first), good)
    np.testing.assert_array_equal(pixels(second), np.repeat(good[..., :1], 3, axis=2))
    found = rejected(source)
    for where, reason in {
        "row 1": "Its image cannot be read (OSError: gone)",
        "row 3": "Its image cannot be decoded",
        "row 4": "Its image must be uint8, found float64; write (255 * images).round().astype('uint8')",
        "row 5": "Its label is missing",
        "row 6": "Its label must be 0 or more, found -1",
        "row 7": "Its label must be a whole number or text, found 1.5",
        "row 8": "Its image must be of shape (height, width, 3), or grey, (height, width), found (9, 8, 2)",
    }.items():
        assert found.pop(where).startswith(reason), where
    assert not found
    images[0] = OSError("gone since")
    failed, _ = source.read(range(2))
    assert isinstance(failed, DecodeError) and str(failed).startswith("row 0: its image cannot be read (OSError")
    with pytest.raises(
        ConfigError, match=r"the image of its first item must be of shape .*write image.transpose\(1, 2"
    ):
        source_of(Pictures([good.transpose(2, 0, 1)], [0])).catalog()
    with pytest.raises(
        ConfigError, match=r"the image of its first item must be a Pillow image or a uint8 array, found st"
    ):
        source_of(Pictures(["a.jpg"], [0])).catalog()


def test_arrays() -> None:
    import torch

    images = np.stack([photograph(seed, 9, 8) for seed in range(20)])
    labels = np.arange(20) % 3
    rows = [(encoded(image, "PNG"), int(label)) for image, label in zip(images, labels, strict=True)]
    catalog = check(source_of((images, labels)), rows, "012", again=source_of((images, labels.tolist())))
    assert catalog.path(3) == "03"
    check(source_of((torch.from_numpy(images), torch.from_numpy(labels))), rows, "012")
    check(source_of((images, [CLASSES[label] for label in labels])), rows)
    check(source_of([images, None]), [(file, 0) for file, _ in rows], ["unlabelled"])
    grey = [(encoded(image[..., 0], "PNG"), label) for image, (_, label) in zip(images, rows, strict=True)]
    check(source_of((images[..., 0], labels)), grey, "012")
    check(source_of((images[..., :1], labels)), grey, "012")
    source = source_of((images, np.where(labels == 0, -1, labels)))
    assert len(source.catalog()) == 13 and "row 0" in rejected(source)
    np.testing.assert_array_equal(pixels(next(source.read(range(0, 1)))), images[1])


@pytest.mark.parametrize(
    ("images", "labels", "match"),
    [
        (
            np.zeros((2, 3, 8, 8), np.uint8),
            [0, 1],
            r"images must be of shape \(n, height, width, 3\).*transpose\(0, 2, 3",
        ),
        (np.zeros((2, 8, 8, 4), np.uint8), [0, 1], r"write \[..., :3\] to drop alpha"),
        (np.zeros((2, 8, 8, 3)), [0, 1], r"images must be uint8, found float64; write \(255 \* images\)"),
        (np.zeros((2, 8), np.uint8), [0, 1], r"images must be of shape .* found \(2, 8\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), [], "images must have at least one"),
        (np.zeros((2, 8, 8, 3), np.uint8), [0], r"labels must be of shape \(2,\), one for each image, found \(1,\)"),
        (np.zeros((2, 8, 8, 3), np.uint8), [0.5, 1], "labels must be whole numbers or text, found float64"),
        (3, [0], "images must be an array, found int"),
    ],
)
def test_arrays_that_are_refused(images: Any, labels: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        source_of((images, labels))


# What is given --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "options", "error", "match"),
    [
        ("a.tar", {"kind": "tar"}, ConfigError, "kind must be one of folder, webdataset, parquet, .*'tar'"),
        ("missing.tar", {}, CatalogError, r"'missing.tar': cannot be read \(No such file"),
        ("missing-*.tar", {}, CatalogError, "no file matches 'missing-.*.tar'"),
        ("s3://bucket/a.tar", {}, ConfigError, "must be on a local file system"),
        ("missing", {"image": "jpg"}, ConfigError, "image names columns and extensions, which a folder of"),
        (["a", "b"], {}, ConfigError, "kind must be given for files whose names end in none of .tar"),
        (["a", "b"], {"kind": "folder"}, ConfigError, "must be one folder, found a list of 2"),
        ([], {"kind": "parquet"}, ConfigError, "kind is of paths"),
        (3, {}, ConfigError, "the source must be a path, paths, .* found a int"),
        (np.zeros((2, 2, 2, 3), np.uint8), {}, ConfigError, "the source must be a path, paths"),
        ({"train": 1, "test": 2}, {}, ConfigError, "must be one split, found a dict of train, test"),
        ((1, 2, 3), {}, ConfigError, r"arrays must be given as \(images, labels\), found 3 parts"),
        (Pictures([], []), {"image": "x"}, ConfigError, "image names columns .* which a Pictures has not"),
        (Pictures([], []), {"split": "val"}, ConfigError, "split applies to layouts"),
    ],
)  # fmt: skip
def test_what_is_refused(given: Any, options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        source_of(given, **options)


def test_files_and_their_names(rows: Rows, tmp_path: Path) -> None:
    (tmp_path / "x/y").mkdir(parents=True)
    paths = [write_tar(tmp_path / name, rows[:3]) for name in ("x/0.tar", "x/y/0.tar")]
    source = source_of(paths)
    assert [path.rsplit("/", 1)[0] for path in source.catalog().paths] == ["x/0"[2:]] * 3 + ["y/0"] * 3
    check(source_of(f"{tmp_path}/{{x,x/y}}/0.tar"), rows[:3] * 2, "0", again=source)
    with pytest.raises(ConfigError, match=r"must be given once, found .*0.tar' twice"):
        source_of([paths[0], paths[0]])
    with pytest.raises(CatalogError, match=r"there is no file with .parquet or .parq in this folder"):
        source_of(tmp_path, kind="parquet")


def test_measuring_bytes(rows: Rows) -> None:
    for file, _ in rows:
        assert measure(file) == decode(file).shape[:2] == measure(io.BytesIO(file))
    assert measure(b"") == "It is empty (0 bytes); copy it again or remove it."


def test_json_labels_that_are_odd(tmp_path: Path) -> None:
    good = encoded(photograph(1, 9, 8), "PNG")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, label in enumerate([{"l": 1}, {"l": None}, {}, [1], {"l": True}, {"l": 2.5}, {"l": "0"}]):
            add(tar, f"{number}.json", json.dumps(label).encode())
            add(tar, f"{number}.png", good)
        add(tar, "7.json", b"{")
        add(tar, "7.png", good)
    source = source_of(tmp_path / "a.tar", label="json:l")
    assert list(source.catalog().paths) == ["0.png", "6.png"] and source.catalog().labels.tolist() == [1, 0]
    assert len(rejected(source)) == 6


@pytest.mark.slow
@pytest.mark.parametrize(("library", "extra"), [("pyarrow", "parquet"), ("datasets", "huggingface")])
def test_a_library_that_is_missing(rows: Rows, tmp_path: Path, library: str, extra: str) -> None:
    (tmp_path / "a.parquet").touch()
    given = huggingface(rows) if library == "datasets" else tmp_path / "a.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, library, None)
        with pytest.raises(MissingDependencyError, match=rf"run `pip install 'dali-diffusemix\[{extra}\]'`"):
            source_of(given)
