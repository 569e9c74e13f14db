"""The catalog lists what ImageFolder lists, sizes images as exif_transpose does, and survives what folders contain."""

import io
import json
import logging
import os
import pickle
import random
import struct
import subprocess
import sys
import tempfile
import textwrap
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from dali_diffusemix.catalog import (
    Catalog,
    Rejected,
    StaleCatalogWarning,
    default_location,
    index,
    list_images,
    table,
)
from dali_diffusemix.errors import CatalogError, ConfigError
from dali_diffusemix.images.formats import MAX_PIXELS

SHARED = Path(__file__).parents[2] / "shared"
ENDINGS = {"JPEG": "jpg", "PNG": "png", "BMP": "bmp", "TIFF": "tif", "PPM": "ppm", "WEBP": "webp"}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DALI_DIFFUSEMIX_CACHE", str(folder))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes, three images."""
    folder = tmp_path / "train"
    for name in ("ants/a.jpg", "ants/b.jpg", "bees/c.jpg"):
        put(folder / name)
    return folder


def encode(name: str = "JPEG", size: tuple[int, int] = (7, 5), **options: object) -> bytes:
    """An image file of that (width, height)."""
    stream = io.BytesIO()
    Image.new("RGB", size, (200, 30, 90)).save(stream, name, **options)
    return stream.getvalue()


def put(file: Path, data: bytes | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(encode() if data is None else data)
    return file


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, behind: bytes = b"") -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"")) + behind + png_chunk(b"IEND", b"")


def rows(catalog: Catalog) -> list[tuple[str, int, tuple[int, int]]]:
    sizes = [(height, width) for height, width in catalog.sizes.tolist()]
    return list(zip(catalog.paths, catalog.labels.tolist(), sizes, strict=True))


def reasons(catalog: Catalog) -> dict[str, str]:
    return {one.path: one.reason for one in catalog.rejected}


# What is listed, and in which order -----------------------------------------------------------------------------------


def as_image_folder(root: Path) -> list[tuple[str, int]]:
    """torchvision.datasets.folder.make_dataset, less the hidden files."""
    listed = []
    for label, name in enumerate(sorted(entry.name for entry in root.iterdir() if entry.is_dir())):
        for folder, _, files in sorted(os.walk(root / name, followlinks=True)):
            for file in sorted(files):
                listed.append((Path(folder, file).relative_to(root).as_posix(), label))
    return listed


names = st.text("ab-_. é\n'\"Z0\udcff\ue000", min_size=1, max_size=4).filter(lambda name: not name.startswith("."))


@settings(max_examples=60, deadline=None)
@given(st.sets(st.lists(names, min_size=2, max_size=4).map(tuple), min_size=1, max_size=12))
def test_the_order_is_that_of_image_folder(paths: set[tuple[str, ...]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for path in paths:
            try:
                put(Path(folder, *path), b"")
            except (FileExistsError, NotADirectoryError, IsADirectoryError):
                continue  # one name is a file here and a folder there
        listing = list_images(folder)
        assert list(zip(listing.paths, listing.labels, strict=True)) == as_image_folder(Path(folder))
        assert listing.rejected == []


def test_a_folder_is_listed_with_labels_and_sizes(root: Path) -> None:
    put(root / "bees" / "deep" / "er" / "d.png", encode("PNG", (3, 11)))
    catalog = index(root)
    assert catalog.classes == ("ants", "bees")
    assert catalog.class_to_idx == {"ants": 0, "bees": 1}
    assert rows(catalog) == [
        ("ants/a.jpg", 0, (5, 7)),
        ("ants/b.jpg", 0, (5, 7)),
        ("bees/c.jpg", 1, (5, 7)),
        ("bees/deep/er/d.png", 1, (11, 3)),
    ]
    assert (catalog.labels.dtype, catalog.sizes.dtype) == (np.int32, np.int32)
    assert (len(catalog), len(catalog.paths), catalog.rejected) == (4, 4, ())


def test_hidden_files_and_folders_are_passed_over(root: Path) -> None:
    before = rows(index(root, location=root.parent / "before"))
    put(root / ".ipynb_checkpoints" / "x.jpg")
    put(root / "ants" / ".DS_Store", b"x")
    put(root / "ants" / ".thumbnails" / "x.jpg")
    catalog = index(root)
    assert rows(catalog) == before
    assert catalog.rejected == ()


def test_names_of_any_bytes_are_kept(root: Path) -> None:
    files = [b"bees/caf\xe9.jpg", b"bees/two\nlines.jpg", b'bees/it\'s "so".jpg', b"\xff\xfe class/\xf0.jpg"]
    for file in files:
        put(Path(os.fsdecode(os.path.join(os.fsencode(root), file))))  # noqa: PTH118 (bytes)
    made = index(root)
    for catalog in (made, index(root), pickle.loads(pickle.dumps(made))):
        encoded = [catalog.encoded_path(row) for row in range(len(catalog))]
        assert set(files) <= set(encoded)
        assert [os.fsencode(path) for path in catalog.paths] == encoded
        assert os.fsdecode(b"\xff\xfe class") in catalog.classes
        for path, label in zip(catalog.paths, catalog.labels.tolist(), strict=True):
            assert (root / path).is_file()
            assert path.split("/")[0] == catalog.classes[label]
        assert len(catalog.fingerprint) == 64


def test_links_are_followed_but_not_in_circles(root: Path, tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "linked.jpg")
    (root / "ants" / "twice").symlink_to(tmp_path / "elsewhere")
    (root / "bees" / "twice").symlink_to(tmp_path / "elsewhere")
    (root / "cats").symlink_to(tmp_path / "elsewhere")
    (root / "ants" / "up").symlink_to(root)
    (root / "bees" / "self").symlink_to(root / "bees")
    (root / "bees" / "none.jpg").symlink_to(root / "nowhere.jpg")
    (root / "bees" / "ring.jpg").symlink_to(root / "bees" / "ring.jpg")
    catalog = index(root)
    assert {path for path in catalog.paths if "linked" in path} == {
        "ants/twice/linked.jpg",
        "bees/twice/linked.jpg",
        "cats/linked.jpg",
    }
    assert len(catalog) == 6
    rejected = reasons(catalog)
    assert rejected.keys() == {"ants/up", "bees/self", "bees/none.jpg", "bees/ring.jpg"}
    assert "leads back" in rejected["ants/up"]
    assert "leads back" in rejected["bees/self"]
    assert "link to nothing" in rejected["bees/none.jpg"]


@pytest.mark.parametrize("workers", [1, 3])
def test_progress_counts_files_from_the_calling_thread(root: Path, workers: int) -> None:
    for number in range(300):
        put(root / "ants" / f"{number}.jpg")
    seen: list[tuple[int, int]] = []
    index(root, workers=workers, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (303, 303)


# Headers --------------------------------------------------------------------------------------------------------------


def exif_of(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = value
    return exif


def xmp_of(value: int) -> bytes:
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><d tiff:Orientation="{value}"/></x:xmpmeta>'.encode()


def test_sizes_are_those_after_exif_transpose(tmp_path: Path) -> None:
    def png(before: bytes, behind: bytes) -> bytes:
        plain = encode("PNG", (5, 3))
        first, last = plain.index(b"IDAT") - 4, plain.index(b"IEND") - 4
        return plain[:first] + before + plain[first:last] + behind + plain[last:]

    root = tmp_path / "train"
    for value in range(10):  # 0 and 9 mean nothing
        exif = exif_of(value)
        xmp = b"XML:com.adobe.xmp\0\0\0\0\0" + xmp_of(value)
        raw = b"Raw profile type exif\0" + f"\nexif\n{len(exif.tobytes()):8}\n{exif.tobytes().hex()}\n".encode()
        kinds = {name: encode(name, (5, 3), exif=exif) for name in ("JPEG", "PNG", "WEBP", "TIFF")}
        kinds |= {name: encode(name, (5, 3)) for name in ("BMP", "PPM")}
        kinds |= {
            "TIFF-xmp": encode("TIFF", (5, 3), tiffinfo={700: xmp_of(value)}),
            "JPEG-xmp": encode("JPEG", (5, 3), xmp=xmp_of(value)),
            "PNG-behind": png(b"", png_chunk(b"eXIf", exif.tobytes()[6:])),
            "PNG-date-behind": png(
                b"", png_chunk(b"tEXt", b"date:modify\0now") + png_chunk(b"eXIf", exif.tobytes()[6:])
            ),
            "PNG-xmp": png(png_chunk(b"iTXt", xmp), b""),
            "PNG-xmp-behind": png(b"", png_chunk(b"iTXt", xmp)),
            "PNG-raw": png(png_chunk(b"tEXt", raw), b""),
            "PNG-raw-behind": png(b"", png_chunk(b"tEXt", raw)),
        }
        if 1 <= value <= 8:  # libtiff refuses to write others
            kinds["TIFF-lzw"] = encode("TIFF", (5, 3), exif=exif, compression="tiff_lzw")
        for kind, data in kinds.items():
            put(root / "x" / f"{kind}-{value}", data)
    catalog = index(root)
    assert len(catalog) == 10 * 14 + 8
    swapped = set()
    for path, _, size in rows(catalog):
        with Image.open(root / path) as image:
            # XMP and a PNG's text are not EXIF's place: DALI's decoders do not look there.
            elsewhere = path.removeprefix("x/").startswith(("JPEG-xmp", "PNG-xmp", "PNG-raw"))
            upright = image if elsewhere else ImageOps.exif_transpose(image)
        assert size == (upright.height, upright.width), path
        if size == (5, 3):
            swapped.add(path.removeprefix("x/"))
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "TIFF-lzw", "PNG-behind", "PNG-date-behind"):
        assert {name for name in swapped if name.rpartition("-")[0] == kind} == {f"{kind}-{n}" for n in (5, 6, 7, 8)}


def test_the_content_counts_and_not_the_ending(root: Path) -> None:
    for name, ending in ENDINGS.items():
        lie = "png" if ending != "png" else "jpg"
        put(root / "ants" / f"true-{name}.{ending}", encode(name, (9, 4)))
        put(root / "ants" / f"false-{name}.{lie}", encode(name, (9, 4)))
        put(root / "ants" / f"none-{name}", encode(name, (9, 4)))
    found = {path: size for path, _, size in rows(index(root)) if "-" in path}
    assert len(found) == 3 * len(ENDINGS)
    assert set(found.values()) == {(4, 9)}


@pytest.mark.parametrize("size", [(1, 1), (20_000, 10), (10, 20_000)])
def test_extreme_shapes_are_taken(root: Path, size: tuple[int, int]) -> None:
    for name, ending in ENDINGS.items():
        if name != "WEBP" or max(size) < 16384:  # WebP's own limit
            put(root / "bees" / f"extreme.{ending}", encode(name, size))
    assert {found for path, _, found in rows(index(root)) if "extreme" in path} == {(size[1], size[0])}


def test_sizes_above_the_limit_are_rejected_unread(root: Path) -> None:
    bmp = bytearray(encode("BMP"))
    bmp[18:26] = struct.pack("<ii", 40_000, 40_000)
    files = {
        "bomb.png": png_header(40_000, 40_000),
        "bomb.bmp": bytes(bmp),
        "bomb.ppm": b"P6 40000 40000 255\n",
        "warned.png": png_header(MAX_PIXELS + 1, 1),  # where Pillow only warns
        "behind.png": png_header(MAX_PIXELS + 1, 1, png_chunk(b"eXIf", b"")),  # for which the pixels would be loaded
        "most.png": png_header(MAX_PIXELS, 1),
    }
    for name, data in files.items():
        put(root / "ants" / name, data)
    catalog = index(root)
    assert ("ants/most.png", 0, (1, MAX_PIXELS)) in rows(catalog)
    rejected = reasons(catalog)
    assert rejected.keys() == {f"ants/{name}" for name in files if name != "most.png"}
    assert all(str(MAX_PIXELS) in reason for reason in rejected.values())


def test_every_other_file_is_rejected_with_a_reason(root: Path) -> None:
    files = {
        "ants/empty.jpg": (b"", "empty"),
        "ants/text.jpg": (b"Not found", "supported are JPEG, PNG, BMP, TIFF, PNM and WebP; convert it"),
        "ants/page.jpg": (b"<html></html>", "It is an HTML page"),
        "ants/moving.gif": (encode("GIF"), "unsupported: it is a GIF; supported are"),
        "ants/sound.webp": (b"RIFF\0\0\0\0WAVEfmt ", "unsupported"),
        "ants/short.jpg": (encode()[:60], "JPEG header cannot be read"),
        "ants/no-scan.jpg": (encode()[: encode().index(b"\xff\xda")], "cut short"),
        "ants/short.png": (encode("PNG")[:20], "PNG header cannot be read"),
        "ants/short.tif": (encode("TIFF")[:12], "TIFF header cannot be read"),
        "ants/short.bmp": (encode("BMP")[:16], "BMP header cannot be read"),
        "ants/short.ppm": (b"P6 10 ", "PPM header cannot be read"),
        "ants/short.webp": (encode("WEBP")[:40], "WEBP header cannot be read"),
        "ants/nothing.png": (png_header(0, 5), "PNG header cannot be read"),
        "labels.csv": (b"a,b", "lies in no class folder"),
    }
    for name, (data, _) in files.items():
        put(root / name, data)
    if hasattr(os, "mkfifo"):
        os.mkfifo(root / "bees" / "pipe.jpg")  # opening it would wait forever
        files["bees/pipe.jpg"] = (b"", "a pipe")
    catalog = index(root)
    assert len(catalog) == 3
    rejected = reasons(catalog)
    assert rejected.keys() == files.keys()
    for name, (_, words) in files.items():
        assert words in rejected[name], name
        assert rejected[name].endswith(".")
    assert [one.path for one in catalog.rejected] == sorted(files)


def test_what_may_not_be_read_is_rejected(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(root / "ants" / "locked.jpg")
    put(root / "ants" / "locked" / "x.jpg")
    scandir, open_ = os.scandir, Path.open

    def refuse(path: object) -> None:
        if "locked" in str(path):
            raise PermissionError(13, "Permission denied", str(path))

    def guarded_open(path: Path, *arguments: object, **options: object) -> object:
        refuse(path)
        return open_(path, *arguments, **options)

    # The tests may run as root, whom nothing is denied.
    monkeypatch.setattr(os, "scandir", lambda path: (refuse(path), scandir(path))[1])
    monkeypatch.setattr(Path, "open", guarded_open)
    catalog = index(root)
    assert len(catalog) == 3
    assert reasons(catalog).keys() == {"ants/locked", "ants/locked.jpg"}
    assert all("Permission denied" in reason for reason in reasons(catalog).values())


def test_exif_that_cannot_be_parsed_costs_no_image(root: Path) -> None:
    data = encode()
    broken = data[:2] + b"\xff\xe1" + struct.pack(">H", 2 + 6 + 10) + b"Exif\0\0" + b"x" * 10 + data[2:]
    put(root / "ants" / "odd.jpg", broken)
    exif = exif_of(6)
    exif[316] = "a computer of some long name"
    cut = exif.tobytes()[:-20]  # Pillow warns and gives the orientation nevertheless
    put(root / "ants" / "cut.jpg", encode(exif=cut))
    with pytest.warns(UserWarning), Image.open(root / "ants" / "cut.jpg") as image:
        assert ImageOps.exif_transpose(image).size == (5, 7)
    catalog = index(root)
    assert {("ants/odd.jpg", 0, (5, 7)), ("ants/cut.jpg", 0, (7, 5))} < set(rows(catalog))


SAMPLES = [encode(name, (9, 4)) for name in ENDINGS] + [
    encode(name, (9, 4), exif=exif_of(6)) for name in ("JPEG", "PNG", "WEBP", "TIFF")
]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.tuples(st.integers(0, 2**16), st.binary(max_size=4)), max_size=4))
def test_no_damage_raises_or_warns(cut: int, flips: list[tuple[int, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        put(Path(folder, "good"))
        for number, sample in enumerate(SAMPLES):
            data = bytearray(sample[: cut % (2 * len(sample)) + 1])
            for place, values in flips:
                place %= len(data)
                data[place : place + len(values)] = values
            put(Path(folder, str(number)), bytes(data))
        paths = ["good", *map(str, range(len(SAMPLES)))]
        catalog = Catalog.from_arrays(paths, [0] * len(paths), ["x"], root=folder, workers=2)
        assert len(catalog) + len(catalog.rejected) == len(paths)
        assert catalog.path(0) == "good"
        assert (catalog.sizes.prod(axis=1) <= MAX_PIXELS).all()


def test_the_warning_filters_are_left_as_they_were(root: Path) -> None:
    before = list(warnings.filters)
    index(root)
    assert list(warnings.filters) == before


# Real folders ---------------------------------------------------------------------------------------------------------


def real(name: str) -> Path:
    folder = SHARED / "data" / name
    if not folder.is_dir():
        pytest.skip(f"the real photographs are not here: {folder}")
    return folder


def test_ants_and_bees_as_people_have_them(caplog: pytest.LogCaptureFixture) -> None:
    folder = real("ants_bees/train")
    with caplog.at_level(logging.WARNING):
        catalog = index(folder)
    assert len(catalog) == 244
    assert [one.path for one in catalog.rejected] == ["ants/imageNotFound.gif"]
    assert "ants/imageNotFound.gif" in caplog.text
    listed = [row for row in as_image_folder(folder) if row[0] != "ants/imageNotFound.gif"]
    assert list(zip(catalog.paths, catalog.labels.tolist(), strict=True)) == listed
    for path, _, (height, width) in rows(catalog):
        with Image.open(folder / path) as image:
            assert ImageOps.exif_transpose(image).size == (width, height)


def test_imagenet_photographs() -> None:
    catalog = index(real("imagenet_sample"))
    assert (len(catalog), len(catalog.classes), catalog.rejected) == (256, 256, ())
    assert catalog.labels.tolist() == list(range(256))
    assert np.median(catalog.sizes, axis=0).tolist() == [375, 500]


# Folders that cannot be used ------------------------------------------------------------------------------------------


def test_folders_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="no such folder"):
        index(tmp_path / "missing")
    with pytest.raises(CatalogError, match="is a file"):
        index(put(tmp_path / "file.jpg"))
    put(tmp_path / "flat" / "a.jpg")
    with pytest.raises(CatalogError, match=r"no class folders; expected root/class/image\.jpg"):
        index(tmp_path / "flat")
    put(tmp_path / "bad" / "x" / "a.gif", encode("GIF"))
    with pytest.raises(CatalogError, match=r"no usable image of any class \('x'\).*'x/a\.gif': unsupported"):
        index(tmp_path / "bad")
    put(tmp_path / "hollow" / "x" / "a.jpg")
    (tmp_path / "hollow" / "y").mkdir()
    put(tmp_path / "hollow" / "z" / "a.jpg", b"")
    with pytest.raises(CatalogError, match=r"2 of 3 hold none: 'y', 'z'; remove them or add images.*'z/a\.jpg'"):
        index(tmp_path / "hollow")
    with pytest.raises(ConfigError, match="location must lie outside the root"):
        index(tmp_path / "hollow", location=tmp_path / "hollow" / "catalog")
    with pytest.raises(ConfigError, match="workers must be 1 or more, found 0"):
        index(tmp_path / "hollow", workers=0)


# Kept on disk ---------------------------------------------------------------------------------------------------------


def test_files_once_listed_keep_row_label_and_size(root: Path) -> None:
    before = rows(index(root))
    (root / "ants" / "a.jpg").unlink()
    put(root / "ants" / "b.jpg", encode("PNG", (50, 60)))
    put(root / "ants" / "0.jpg")
    with pytest.warns(StaleCatalogWarning, match="1 class folders, 'ants' first.*--refresh") as caught:
        catalog = index(root)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert rows(catalog) == before


def test_an_unchanged_folder_opens_in_silence_and_is_not_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = index(root)
    monkeypatch.setattr(table, "read_sizes", None)
    opened = index(root)
    assert rows(opened) == rows(made)
    assert (opened.rejected, opened.classes, opened.fingerprint) == (made.rejected, made.classes, made.fingerprint)


@pytest.mark.parametrize("change", ["added", "removed", "renamed"])
def test_changed_class_folders_are_noticed(root: Path, change: str) -> None:
    index(root)
    if change == "added":
        put(root / "wasps" / "w.jpg")
    elif change == "removed":
        (root / "bees" / "c.jpg").unlink()
        (root / "bees").rmdir()
    else:
        (root / "bees").rename(root / "wasps")
    with pytest.warns(StaleCatalogWarning):
        index(root)
    index(root, refresh=True)
    index(root)


def test_refresh_keeps_the_order_and_appends(root: Path) -> None:
    location = root.parent / "catalog"
    index(root, location=location)
    put(root / "aardvarks" / "z.jpg")
    put(root / "ants" / "0.jpg")
    put(root / "ants" / "b.jpg", encode("PNG", (50, 60)))
    (root / "ants" / "a.jpg").unlink()
    catalog = index(root, location=location, refresh=True)
    assert catalog.classes == ("aardvarks", "ants", "bees")
    assert rows(catalog) == [
        ("ants/b.jpg", 1, (60, 50)),
        ("bees/c.jpg", 2, (5, 7)),
        ("aardvarks/z.jpg", 0, (5, 7)),
        ("ants/0.jpg", 1, (5, 7)),
    ]
    assert rows(index(root, location=location)) == rows(catalog)
    assert len(list(location.iterdir())) == 5  # the JSON, four arrays, and none of before


def test_refresh_replaces_a_damaged_catalog(root: Path) -> None:
    made = index(root)
    file = default_location(root) / "catalog.json"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CatalogError, match=r"catalog\.json'.*--refresh"):
        index(root)
    assert rows(index(root, refresh=True)) == rows(made)


def test_the_location_is_that_of_the_resolved_root(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    where = default_location(root)
    assert where.parent == cache / "catalogs"
    link = tmp_path / "link"
    link.symlink_to(root)
    monkeypatch.chdir(root.parent)
    assert default_location("train") == default_location(link) == default_location(root / ".." / "train") == where
    monkeypatch.delenv("DALI_DIFFUSEMIX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_location(root) == tmp_path / "xdg" / "dali-diffusemix" / "catalogs" / where.name
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_location(root) == tmp_path / "home" / ".cache" / "dali-diffusemix" / "catalogs" / where.name


def test_a_cache_that_cannot_be_written_costs_no_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DALI_DIFFUSEMIX_CACHE", str(put(tmp_path / "file")))
    with caplog.at_level(logging.WARNING):
        catalog = index(root)
    assert "listed again next time" in caplog.text and "DALI_DIFFUSEMIX_CACHE sets the cache folder" in caplog.text
    assert rows(pickle.loads(pickle.dumps(catalog))) == rows(catalog)
    with pytest.raises(CatalogError, match="cannot be written"):  # a given location
        index(root, location=tmp_path / "file" / "catalog")


# Storage --------------------------------------------------------------------------------------------------------------


def some(count: int = 6, seed: int = 0) -> Catalog:
    draw = random.Random(seed)
    paths = [f"class {number % 3}/{draw.random()}.jpg" for number in range(count)]
    sizes = [[draw.randrange(1, 900), draw.randrange(1, 900)] for _ in range(count)]
    return Catalog.from_arrays(paths, [number % 3 for number in range(count)], ["a", "b", "c\udcff"], sizes)


def test_saved_and_opened_it_is_the_same(tmp_path: Path) -> None:
    made = some()
    made = Catalog(
        classes=made.classes,
        labels=made.labels,
        sizes=made.sizes,
        path_bytes=made.path_bytes,
        path_offsets=made.path_offsets,
        rejected=(Rejected("x/\udcff", "It is odd."),),
        folder_mtimes={"c\udcff": 2**62},
    )
    made.save(tmp_path)
    (tmp_path / "catalog.json").read_text("ascii")
    opened = Catalog.open(tmp_path)
    for field in ("classes", "rejected", "folder_mtimes", "fingerprint"):
        assert getattr(opened, field) == getattr(made, field)
    for array in ("labels", "sizes", "path_bytes", "path_offsets"):
        assert np.array_equal(getattr(opened, array), getattr(made, array))
        for catalog in (opened, made, pickle.loads(pickle.dumps(made))):
            assert not getattr(catalog, array).flags.writeable
            assert getattr(catalog, array).dtype == getattr(made, array).dtype
    opened.save(tmp_path)  # over itself
    assert rows(Catalog.open(tmp_path)) == rows(made)


def mapped(array: np.ndarray) -> bool:
    while array is not None and not isinstance(array, np.memmap):
        array = array.base
    return array is not None


def test_an_opened_catalog_is_pickled_as_its_location(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some(5000).save(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    catalog = Catalog.open("here")
    data = pickle.dumps(catalog)
    assert len(data) < 1000
    monkeypatch.chdir("/")
    again = pickle.loads(data)
    assert rows(again) == rows(catalog)
    assert all(mapped(one.labels) and mapped(one.path_bytes) for one in (catalog, again))
    some(5000, seed=1).save(tmp_path / "here")
    with pytest.raises(CatalogError, match="replaced while another process"):
        pickle.loads(data)
    assert len(list(catalog.paths)) == 5000  # what was mapped stays


KILLED = """
import os, sys
from pathlib import Path
from dali_diffusemix.catalog import Catalog

replace, left = Path.replace, int(sys.argv[2])

def counted(source, target):
    global left
    left -= 1
    if left < 0:
        os._exit(9)
    return replace(source, target)

Path.replace = counted
Catalog.from_arrays(["new/a.jpg", "new/b.jpg"], [0, 0], ["new"], [[1, 2], [3, 4]]).save(sys.argv[1])
"""


@pytest.mark.parametrize("files", [0, 2, 4])
def test_a_kill_leaves_the_old_catalog(tmp_path: Path, files: int) -> None:
    some().save(tmp_path)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), str(files)], check=False)
    assert done.returncode == 9
    assert rows(Catalog.open(tmp_path)) == rows(some())
    left = [file for file in tmp_path.iterdir() if file.suffix == ".tmp"]
    assert len(left) == 1
    foreign = [put(tmp_path / name, b"") for name in ("notes-0123456789abcdef.npy", ".notes.tmp", "labels.npy")]
    for file in tmp_path.iterdir():
        os.utime(file, (1, 1))
    some(seed=1).save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 5 + len(foreign)  # the dead process's files are gone, other people's not
    assert rows(Catalog.open(tmp_path)) == rows(some(seed=1))


def test_a_reader_that_is_overtaken_reads_the_new_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some().save(tmp_path)
    texts = [(tmp_path / "catalog.json").read_bytes()]
    some(seed=1).save(tmp_path)
    read = table._read_json
    monkeypatch.setattr(table, "_read_json", lambda folder: texts.pop() if texts else read(folder))
    assert rows(Catalog.open(tmp_path)) == rows(some(seed=1))


def test_catalogs_that_cannot_be_read_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match=r"no catalog.*dali-diffusemix index ROOT"):
        Catalog.open(tmp_path)
    some().save(tmp_path)
    file = tmp_path / "catalog.json"
    good = json.loads(file.read_bytes())

    def refused(match: str) -> None:
        with pytest.raises(CatalogError, match=match) as caught:
            Catalog.open(tmp_path)
        assert str(tmp_path) in str(caught.value)
        assert "--refresh" in str(caught.value)

    for change, match in [
        ({"magic": "other"}, "'magic' must be 'dali_diffusemix.catalog', found 'other'"),
        ({"version": 2}, "'version' must be 1, found 2"),
        ({"count": 7}, r"must be int32 of shape \(7,\), found int32 of shape \(6,\)"),
        ({"count": "many"}, "of the wrong kind"),
        ({"classes": None}, "of the wrong kind"),
        ({"rejected": [{"path": "x"}]}, "of the wrong kind"),
        (
            {"arrays": good["arrays"] | {"labels": "../labels-0123456789abcdef.npy"}},
            "must be named",
        ),
        ({"arrays": good["arrays"] | {"labels": "/etc/passwd"}}, "must be named"),
        ({"arrays": good["arrays"] | {"labels": good["arrays"]["path_offsets"]}}, "must be int32"),
    ]:
        file.write_text(json.dumps(good | change))
        refused(match)
    for text in ("", "[]", "{}", "\xff", json.dumps(good)[:-40]):
        file.write_text(text, "latin-1")
        refused(r"catalog\.json")
    file.write_text(json.dumps(good))
    Catalog.open(tmp_path)
    for name in good["arrays"].values():
        array = tmp_path / name
        data = array.read_bytes()
        for damaged in (data[:-1], data[:64], b""):
            array.write_bytes(damaged)
            refused(f"{name}.*missing or cut short")
        array.unlink()
        refused(f"{name}.*missing or cut short")
        array.write_bytes(data)
    Catalog.open(tmp_path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    some().save(tmp_path)
    name = json.loads((tmp_path / "catalog.json").read_bytes())["arrays"]["labels"]
    np.save(tmp_path / name, np.array([{"an": "object"}] * 6, dtype=object), allow_pickle=True)
    with pytest.raises(CatalogError, match=name):
        Catalog.open(tmp_path)
    (tmp_path / name).write_text("no array at all")
    with pytest.raises(CatalogError, match=rf"{name}.*it is no array") as caught:
        Catalog.open(tmp_path)
    assert "allow_pickle" not in str(caught.value)  # NumPy would advise it


# Values ---------------------------------------------------------------------------------------------------------------


def test_rows_are_reached_like_those_of_a_sequence() -> None:
    catalog = some()
    paths = list(catalog.paths)
    assert [catalog.path(row) for row in range(6)] == [catalog.paths[row] for row in range(6)] == paths
    assert (catalog.path(-1), catalog.paths[-6]) == (paths[5], paths[0])
    assert catalog.path(np.int64(3)) == paths[3]
    assert catalog.paths[1:5:2] == paths[1:5:2]
    assert paths[2] in catalog.paths
    for row in (6, -7):
        with pytest.raises(IndexError):
            catalog.path(row)
        with pytest.raises(IndexError):
            catalog.paths[row]
    joined = catalog.path_bytes.tobytes()
    starts = catalog.path_offsets
    assert [joined[starts[row] : starts[row + 1]] for row in range(6)] == [os.fsencode(path) for path in paths]


def test_it_cannot_be_changed() -> None:
    labels = np.zeros(2, np.int32)
    catalog = Catalog.from_arrays(["a", "b"], labels, ["x"], [[1, 1], [1, 1]])
    with pytest.raises(AttributeError):
        catalog.classes = ("y",)  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        catalog.labels[0] = 1
    labels[0] = 0  # the caller's own array stays writable


def test_a_list_of_files_is_read_below_its_root(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(root / "ants" / "e.gif", encode("GIF"))
    paths = ["bees/c.jpg", b"ants/e.gif", "ants/nowhere.jpg", "ants", "ants/a.jpg"]
    with caplog.at_level(logging.WARNING):
        catalog = Catalog.from_arrays(paths, [4, 3, 2, 1, 0], list("vwxyz"), root=root)
    assert rows(catalog) == [("bees/c.jpg", 4, (5, 7)), ("ants/a.jpg", 0, (5, 7))]
    assert reasons(catalog).keys() == {"ants/e.gif", "ants/nowhere.jpg", "ants"}
    assert "No such file" in reasons(catalog)["ants/nowhere.jpg"]
    assert "3 left out" in caplog.text
    with pytest.raises(CatalogError, match="no usable image"):
        Catalog.from_arrays(["ants/nowhere.jpg"], [0], ["x"], root=root)
    with pytest.raises(ConfigError, match="only where root is given"):
        Catalog.from_arrays(["a.jpg"], [0], ["x"])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"labels": [0, 2]}, r"labels must lie in 0\.\.1, indices into classes; found 2"),
        ({"labels": [0, -1]}, "labels must lie between 0 and 2147483647, found -1 to 0"),
        ({"labels": [0, 2**40]}, "labels must lie between"),
        ({"labels": [0.0, 1.0]}, "labels must be integers, found float64"),
        ({"labels": [0]}, r"labels must be of shape \(2,\)"),
        ({"sizes": [[1, 1]]}, r"sizes must be of shape \(2, 2\)"),
        ({"sizes": [[1, 1], [4, 0]]}, r"sizes must be 1 or more, found \(4, 0\) in row 1"),
        ({"classes": ["x", "x"]}, "classes must differ from one another, found 'x'"),
        ({"classes": ["x", "\ud800"]}, "classes must be text"),
        ({"classes": ["x", "\0"]}, "classes must not contain NUL"),
        ({"paths": [], "labels": [], "sizes": np.zeros((0, 2), int)}, "at least one image"),
        ({"paths": ["a", ""]}, "paths must be relative"),
        ({"paths": ["a", "/b"]}, r"paths\[1\] is '/b'"),
        ({"paths": ["a", "b/"]}, "paths must be relative"),
        ({"paths": ["a", "b//c"]}, "paths must be relative"),
        ({"paths": ["a", "./b"]}, "paths must be relative"),
        ({"paths": ["a", "b/../../c"]}, "paths must be relative"),
        ({"paths": ["a", b"b\0c"]}, "paths must be relative"),
    ],
)
def test_fields_that_do_not_agree_are_refused(change: dict[str, object], match: str) -> None:
    fields: dict[str, object] = {"paths": ["a", "b..c/d\n"], "labels": [0, 1], "classes": ["x", "y"]}
    fields["sizes"] = [[1, 2], [3, 4]]
    Catalog.from_arrays(**fields)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=match):
        Catalog.from_arrays(**(fields | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"path_offsets": np.array([0, 1])},
        {"path_offsets": np.array([0, 1, 3])},
        {"path_offsets": np.array([1, 1, 2])},
        {"path_offsets": np.array([0, 2, 2])},
        {"path_offsets": np.array([0, -1, 2])},
        {"path_offsets": np.zeros((0,), np.int64)},
        {"path_bytes": np.array([97, 0], np.uint8)},
        {"path_bytes": np.array([97, 300])},
    ],
)
def test_path_arrays_that_do_not_agree_are_refused(change: dict[str, np.ndarray]) -> None:
    fields = {"path_offsets": np.array([0, 1, 2]), "path_bytes": np.frombuffer(b"ab", np.uint8)}
    rest = {"classes": ("x",), "labels": np.zeros(2, int), "sizes": np.ones((2, 2), int)}
    assert list(Catalog(**fields, **rest).paths) == ["a", "b"]
    with pytest.raises(ConfigError):
        Catalog(**(fields | change), **rest)


# The fingerprint ------------------------------------------------------------------------------------------------------

listed = st.dictionaries(names, st.sampled_from(["ant", "bee", "cat", "d\udcff"]), min_size=1, max_size=8)


def catalog_of(pairs: list[tuple[str, str]], classes: list[str]) -> Catalog:
    paths, labels = [path for path, _ in pairs], [classes.index(name) for _, name in pairs]
    return Catalog.from_arrays(paths, labels, classes, np.ones((len(pairs), 2), int))


@settings(max_examples=60, deadline=None)
@given(listed, st.randoms(use_true_random=False))
def test_the_fingerprint_is_of_paths_and_class_names_alone(pairs: dict[str, str], draw: random.Random) -> None:
    classes = ["ant", "bee", "cat", "d\udcff"]
    ordered = list(pairs.items())
    base = catalog_of(ordered, classes).fingerprint
    shuffled = draw.sample(ordered, len(ordered))
    assert catalog_of(shuffled, draw.sample(classes, 4)).fingerprint == base
    path, name = shuffled[0]
    other = "bee" if name != "bee" else "cat"
    assert catalog_of([(path, other), *shuffled[1:]], classes).fingerprint != base
    assert catalog_of([(path + "x" * 9, name), *shuffled[1:]], classes).fingerprint != base
    assert catalog_of([*ordered, ("x" * 9, name)], classes).fingerprint != base


def test_the_fingerprint_ignores_content_time_and_place(root: Path, tmp_path: Path) -> None:
    before = index(root, location=tmp_path / "1").fingerprint
    put(root / "ants" / "a.jpg", encode("PNG", (70, 80)))
    os.utime(root / "ants" / "b.jpg", (1, 1))
    root.rename(tmp_path / "moved")
    assert index(tmp_path / "moved", location=tmp_path / "2").fingerprint == before


def test_the_fingerprint_never_changes() -> None:
    catalog = Catalog.from_arrays(["b/1.jpg", "a/2.jpg"], [1, 0], ["a", "b"], [[1, 1], [1, 1]])
    # printf 'a/2.jpg\0a\0b/1.jpg\0b' | sha256sum
    assert catalog.fingerprint == "c3b91e63cf29709401d6e1862cb567a6ca8c6a1b0638132164eddd0cf4798060"


# What files are that are left out -------------------------------------------------------------------------------------


def test_what_is_no_image_is_named(root: Path) -> None:
    """Each as what it is, with what to do; nothing of it is called damaged."""
    from PIL.PngImagePlugin import PngInfo

    baseline = encode()
    frame = baseline.index(b"\xff\xc0")

    def framed(kind: int, bits: int) -> bytes:
        return (
            baseline[: frame + 1]
            + bytes([kind])
            + baseline[frame + 2 : frame + 4]
            + bytes([bits])
            + baseline[frame + 5 :]
        )

    exif = b"\xff\xe1\xff\xff" + bytes(65533)  # the largest block before the frame
    text = PngInfo()
    text.add_text("workflow", "x" * 2_000_000, zip=True)
    comfy = io.BytesIO()
    Image.new("RGB", (8, 6)).save(comfy, "PNG", pnginfo=text)
    files = {
        "twelve.jpg": (framed(0xC1, 12), "unsupported: it is a JPEG of 12 bits, 8 are supported; convert it."),
        "far.jpg": (baseline[:2] + exif + framed(0xC1, 12)[2:], "unsupported: it is a JPEG of 12 bits"),
        "lossless.jpg": (framed(0xC3, 8), "unsupported: it is a lossless JPEG"),
        "lossless16.jpg": (framed(0xC3, 16), "unsupported: it is a lossless JPEG"),
        "far lossless.jpg": (baseline[:2] + exif + framed(0xC3, 8)[2:], "unsupported: it is a lossless JPEG"),
        "tree.jpg": (framed(0xC5, 8), "unsupported: it is a hierarchical JPEG"),
        "comfy.png": (comfy.getvalue(), "unsupported: the text stored in this PNG"),
        "lfs.jpg": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run `git lfs pull`"),
        "annex.jpg": (b"/annex/objects/SHA256E-s3--0.jpg\n", "run `git annex get`"),
        "page.jpg": (b"<!DOCTYPE html><html>404", "It is an HTML page"),
        "page2.jpg": (b"\xef\xbb\xbf\r\n <!-- x --> <HTML lang=de>", "It is an HTML page"),
        "answer.jpg": (b'<?xml version="1.0"?>\n<Error><Code>AccessDenied', "It is text (XML or JSON)"),
        "answer2.jpg": (b' {"error": 404}', "It is text (XML or JSON)"),
        "drawing.svg": (b'<?xml version="1.0"?><svg xmlns="x">', "unsupported: it is an SVG drawing"),
        "a.gif": (b"GIF89a" + bytes(20), "unsupported: it is a GIF"),
        "a.avif": (b"\0\0\0\x20ftypavif" + bytes(20), "unsupported: it is an AVIF image"),
        "a.heic": (b"\0\0\0\x20ftypheic" + bytes(20), "unsupported: it is a HEIF image"),
        "a.mp4": (b"\0\0\0\x20ftypisom" + bytes(20), "unsupported: it is a video"),
        "a.jp2": (b"\0\0\0\x0cjP  \r\n\x87\n", "unsupported: it is a JPEG 2000 image"),
        "a.zip": (b"PK\x03\x04" + bytes(20), "unsupported: it is an archive"),
        "a.pdf": (b"%PDF-1.7", "unsupported: it is a PDF"),
        "a.npy": (b"\x93NUMPY\x01\0", "unsupported: it is a NumPy array"),
    }
    for name, (data, _) in files.items():
        put(root / "ants" / name, data)
    found = reasons(index(root))
    for name, (_, words) in files.items():
        reason = found[f"ants/{name}"]
        assert words in reason and "damaged" not in reason and reason.endswith("."), (name, reason)


def test_odd_jpegs_that_can_be_read_are_taken(root: Path) -> None:
    """Fill bytes before markers, a long EXIF block, progressive: the search for the frame refuses none."""
    baseline = encode()
    put(root / "ants" / "fill.jpg", baseline[:2] + b"\xff\xff" + baseline[2:])
    put(root / "ants" / "far.jpg", baseline[:2] + b"\xff\xe1\xff\xff" + bytes(65533) + baseline[2:])
    put(root / "ants" / "comment.jpg", baseline[:2] + b"\xff\xfe\x00\x06\xff\xc3\xff\xc5" + baseline[2:])
    assert not reasons(index(root))


@pytest.mark.parametrize(
    "splits", [("train", "val"), ("Training", "Test_set"), ("train2017", "val2017"), ("train", "valid", "test")]
)
def test_splits_are_not_taken_for_classes(tmp_path: Path, splits: tuple[str, ...]) -> None:
    for split in splits:
        for name in ("ants", "bees"):
            put(tmp_path / "data" / split / name / "1.jpg", encode())
    for listed in (index, list_images):
        with pytest.raises(CatalogError, match=rf"look like splits of a dataset.*Which is meant\? .*data/{splits[0]}'"):
            listed(tmp_path / "data")  # type: ignore[operator]
    assert index(tmp_path / "data" / splits[0]).classes == ("ants", "bees")
    # Beside others too, and where the list was kept from before.
    put(tmp_path / "data" / "annotations" / "x" / "1.jpg", encode())
    with pytest.raises(CatalogError, match="Which is meant"):
        index(tmp_path / "data")


@pytest.mark.parametrize("beside", ["", "edits/shards/0.tar", "test/1.jpg", "annotations/ants/1.xml", "val/ants/1.jpg"])
def test_a_split_by_itself_is_no_class(tmp_path: Path, beside: str) -> None:
    """One with class folders in it, beside nothing, a store, unlabelled test images, text, or another split."""
    for name in ("ants", "bees"):
        put(tmp_path / "data" / "train" / name / "1.jpg", encode())
    if beside:
        put(tmp_path / "data" / beside, encode())
    with pytest.raises(CatalogError, match=r"found .*'train'.*\('ants', 'bees'\).*Which is meant") as raised:
        index(tmp_path / "data")
    assert raised.value.instead == {str(tmp_path / "data"): str(tmp_path / "data" / "train")}


@pytest.mark.parametrize(
    "names", [("train", "bus"), ("val", "test"), ("train", "plane", "valley"), ("training shoe", "test tube")]
)
def test_classes_that_are_called_so_are_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    """A train is a vehicle."""
    for name in names:
        put(tmp_path / name / "front" / "1.jpg", encode())
        put(tmp_path / name / "2.jpg", encode())
    assert index(tmp_path).classes == tuple(sorted(names))
    for name in ("train", "car", "plane"):  # each model in a folder
        put(tmp_path / "vehicles" / name / f"{name} model" / "1.jpg", encode())
    assert index(tmp_path / "vehicles").classes == ("car", "plane", "train")
    put(tmp_path / "flat" / "train" / "1.jpg", encode())
    put(tmp_path / "flat" / "test" / "1.jpg", encode())
    assert index(tmp_path / "flat").classes == ("test", "train")  # photographs and no classes in them: who knows
