"""Reading: what is cut out of a JPEG has the pixels of the whole; what cannot be read is named; memory is enough."""

import ctypes
import errno
import math
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from material import encoded, photograph, shared
from numpy.typing import NDArray
from PIL import Image

from dali_diffusemix.base import native
from dali_diffusemix.errors import DecodeError
from dali_diffusemix.images import reading
from dali_diffusemix.images.codec import decode, encode
from dali_diffusemix.images.reading import IN_STORE, Encoded, Extent, OpenFile, read
from dali_diffusemix.loading.decoder import PieceDecoder
from dali_diffusemix.loading.pieces import Pieces

NO_WINDOW = np.zeros((1, 4), dtype=np.int32)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reading") / "file"


def cut(file: Path, content: bytes, window: tuple[int, int, int, int]) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """What is read of a file for a window, and the window in it."""
    file.write_bytes(content)
    batch = read([os.fsencode(file)], np.array([window], dtype=np.int32))
    assert not batch.errors and batch.images[0] is not None
    return batch.images[0], batch.windows[0]


@st.composite
def pictures_and_windows(draw: st.DrawFn) -> tuple[Image.Image, tuple[int, int, int, int]]:
    height, width = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    bottom, right = draw(st.integers(top + 1, height)), draw(st.integers(left + 1, width))
    picture = Image.fromarray(photograph(draw(st.integers(0, 99)), height, width))
    return picture, (top, left, bottom, right)


@pytest.mark.slow
@settings(deadline=None, max_examples=400)
@given(
    case=pictures_and_windows(),
    subsampling=st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
    grey=st.booleans(),
    markers=st.one_of(
        st.fixed_dictionaries({"restart_marker_blocks": st.integers(1, 12)}),
        st.fixed_dictionaries({"restart_marker_rows": st.integers(1, 3)}),
        st.just({}),
    ),
    optimize=st.booleans(),
)
def test_a_window_has_the_pixels_of_the_whole(
    file: Path,
    case: tuple[Image.Image, tuple[int, int, int, int]],
    subsampling: str,
    grey: bool,
    markers: dict[str, int],
    optimize: bool,
) -> None:
    picture, window = case
    picture = picture.convert("L") if grey else picture
    content = encoded(picture, quality=85, subsampling=subsampling, optimize=optimize, **markers)
    image, inside = cut(file, content, window)
    assert len(image) <= len(content)
    top, left, bottom, right = inside
    whole = decode(content)[window[0] : window[2], window[1] : window[3]]
    np.testing.assert_array_equal(decode(image)[top:bottom, left:right], whole)


def test_dali_sees_the_same_and_less_of_it_is_read(tmp_path: Path) -> None:
    """Every window of a grid over a real photograph, through the decoder that training uses."""
    photo = Image.open(next(shared("imagenet_sample").glob("*/*"))).convert("RGB").resize((401, 299))
    content = encode(photo, 90)
    pixels = decode(content)
    (tmp_path / "photo.jpg").write_bytes(content)
    edges = [(a, b) for a in range(0, 280, 33) for b in range(a + 7, 299, 90)]
    windows = np.array([(a, c + 11, b, c + 60) for a, b in edges for c in (0, 150, 330)], dtype=np.int32)
    count = len(windows)
    size = np.tile(np.array([[299, 401]], dtype=np.int32), (count, 1))
    place = os.fsencode(tmp_path / "photo.jpg")
    decoder = PieceDecoder(count, threads=2)
    both = np.stack([windows, np.zeros_like(windows)])
    decoder.submit(lambda: Pieces.of([place] * count + [None] * count, both, np.stack([size, size])))
    pieces = decoder.fetch()
    assert not pieces.errors and not pieces.table["data"][1].any()
    for found, (top, left, bottom, right) in zip(pieces.table[0], windows.tolist(), strict=True):
        shape = (int(found["height"]), int(found["width"]), 3)
        memory = (ctypes.c_uint8 * math.prod(shape)).from_address(int(found["data"]))
        piece = np.ctypeslib.as_array(memory).reshape(shape)
        np.testing.assert_array_equal(piece, pixels[top:bottom, left:right])
    decoder.close()
    read_bytes = [len(image) for image in read([place] * count, windows).images if image is not None]
    assert len(read_bytes) == count and np.mean(read_bytes) < len(content) / 2


def test_edits_and_packed_originals_can_be_cut(file: Path) -> None:
    for width in (16, 100, 256, 400, 23 * 16):
        content = encode(photograph(0, 200, width), 90)
        image, window = cut(file, content, (0, 0, 10, 10))
        height_left, width_left = decode(image).shape[:2]
        assert height_left == 16 and width_left <= 64 and window.tolist() == [0, 0, 10, 10]
        assert len(content) < 1.2 * len(encoded(photograph(0, 200, width), quality=90, subsampling="4:2:0"))


@pytest.mark.parametrize("kind", ["none", "progressive", "uneven", "png", "exif", "outside"])
def test_what_cannot_be_cut_is_left_as_it_is(file: Path, kind: str) -> None:
    picture, window = photograph(1, 90, 16 * 7), (40, 40, 50, 50)
    exif = Image.Exif()
    exif[0x0112] = 6
    content = {
        "none": encoded(picture),
        "progressive": encoded(picture, progressive=True, restart_marker_blocks=1),
        "uneven": encoded(picture, subsampling="4:2:0", restart_marker_blocks=3),
        "png": encoded(picture, "PNG"),
        "exif": encoded(picture, restart_marker_blocks=1, exif=exif),
        "outside": encoded(picture, restart_marker_blocks=1),
    }[kind]
    image, inside = cut(file, content, (40, 40, 500, 50) if kind == "outside" else window)
    assert image.tobytes() == content and (kind == "outside" or inside.tolist() == list(window))


def test_damaged_files_never_make_it_crash(file: Path) -> None:
    """A few thousand files with flipped, missing and added bytes: what is read is a prefix or a cut, never longer."""
    generator = np.random.default_rng(0)
    content = np.frombuffer(encode(photograph(2, 130, 170), 80), dtype=np.uint8)
    header = content.tobytes().index(b"\xff\xda") + 14
    places, kept = [], []
    for i in range(3000):
        damaged = content.copy()
        where = generator.integers(0, header if i % 2 else len(damaged), generator.integers(1, 6))
        damaged[where] = generator.choice([0, 0xFF, 0xD0, 0xD9, 1, 16], len(where))
        kept.append(damaged[: generator.integers(2, len(damaged))] if i % 3 == 0 else damaged)
        places.append((sum(map(len, kept[:-1])), len(kept[-1])))
    file.write_bytes(np.concatenate(kept).tobytes())
    opened = OpenFile(file)
    corners = generator.integers(0, 120, (3000, 2))
    windows = np.concatenate([corners, corners + 10], axis=1).astype(np.int32)
    batch = read([Extent(opened, *place) for place in places], windows)
    assert not batch.errors
    assert all(image is not None and len(image) <= len(k) for image, k in zip(batch.images, kept, strict=True))
    assert sum(image is not None and len(image) < len(k) for image, k in zip(batch.images, kept, strict=True)) > 300


# Reading ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["library", "python"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "python":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("the library was not built")
    return str(request.param)


@pytest.mark.usefixtures("either")
def test_files_and_parts_of_files(tmp_path: Path) -> None:
    contents = {name: os.urandom(size) for name, size in (("a", 1), (b"b\xff", 70_000), ("c c", 4096))}
    names = []
    for name, content in contents.items():
        path = os.path.join(os.fsencode(tmp_path), os.fsencode(name))  # noqa: PTH118 - a name in bytes
        names.append(path)
        with open(path, "wb") as stream:  # noqa: PTH123
            stream.write(content)
    opened = OpenFile(names[1].decode(errors="surrogateescape"))
    places = [names[0], None, Extent(opened, 300, 1000), names[1], names[2], Extent(opened, 69_999, 1), None]
    windows = np.zeros((len(places), 4), dtype=np.int32)
    a, b, c = contents.values()
    expected = [a, None, b[300:1300], b, c, b[-1:], None]
    batch = read(places, windows)
    again = read(places, windows, memory=batch.memory)
    for found in (batch, again):
        assert not found.errors
        assert [None if image is None else image.tobytes() for image in found.images] == expected
    assert again.memory is batch.memory
    assert read([None], NO_WINDOW).images == [None]


@pytest.mark.usefixtures("either")
def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "short").write_bytes(b"0123456789")
    (tmp_path / "good").write_bytes(b"good")
    opened = OpenFile(tmp_path / "short")
    gone = DecodeError("the shard has gone")
    names = ["missing", "empty", "folder", "good"]
    places = [*(os.fsencode(tmp_path / name) for name in names), Extent(opened, 5, 6), Extent(opened, 50, 6), gone]
    batch = read(places, np.zeros((len(places), 4), dtype=np.int32))
    assert [None if image is None else image.tobytes() for image in batch.images] == [None] * 3 + [b"good"] + [None] * 3
    reasons = [
        os.strerror(errno.ENOENT),
        "it is empty",
        os.strerror(errno.EISDIR),
        "",
        "it ends early",
        "it ends early",
    ]
    for row, reason in enumerate(reasons):
        assert (row in batch.errors) == bool(reason)
        if reason:
            assert f"cannot be read ({reason})" in str(batch.errors[row]) and str(tmp_path) in str(batch.errors[row])
    assert "short at byte 50" in str(batch.errors[5]) and batch.errors[6] is gone
    for row, remedy in ((0, "restore it, or run `index --refresh`"), (5, IN_STORE)):
        assert str(batch.errors[row]).endswith(f"{remedy}.")


@pytest.mark.parametrize("form", ["JPEG", "progressive", "PNG"])
def test_an_image_of_another_size_is_another_image(tmp_path: Path, form: str) -> None:
    options = {"progressive": True} if form == "progressive" else {}
    content = encoded(photograph(0, 30, 40), "JPEG" if form == "progressive" else form, **options)
    (tmp_path / "file").write_bytes(content)
    place = os.fsencode(tmp_path / "file")
    sizes = np.array([[30, 40], [40, 30], [0, 0], [30, 41], [60, 80]], dtype=np.int32)
    batch = read([place] * 5, np.zeros((5, 4), dtype=np.int32), sizes)
    assert sorted(batch.errors) == [1, 3, 4] and "its size differs from the catalog" in str(batch.errors[3])


@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_sizes_are_those_of_the_upright_image(tmp_path: Path, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    (tmp_path / "file").write_bytes(encoded(photograph(0, 30, 40), exif=exif))
    sizes = np.array([[30, 40], [40, 30]], dtype=np.int32)
    batch = read([os.fsencode(tmp_path / "file")] * 2, np.zeros((2, 4), dtype=np.int32), sizes)
    assert list(batch.errors) == [1 if turn < 5 else 0] and batch.safe.sum() == 1


def test_what_is_sound(tmp_path: Path) -> None:
    """What DALI is given: JPEGs and PNGs about which decoders cannot disagree. tests/test_kinds.py has every kind."""
    picture = Image.fromarray(photograph(0, 60, 80))
    plain, exif = encoded(picture), Image.Exif()
    exif[0x0112] = 6
    scan = plain.index(b"\xff\xda") + 14
    stray = bytearray(plain)
    stray[scan + 300 : scan + 302] = b"\xff\xc4"
    odd = encoded(picture, exif=exif).replace(
        b"II*\0" if b"II*\0" in encoded(picture, exif=exif) else b"MM\0*", b"XX\0*"
    )
    sound = [plain, encoded(picture, progressive=True), encoded(picture.convert("L")), encoded(picture, exif=exif)]
    sound += [encoded(picture, "PNG"), encoded(picture.quantize(8), "PNG"), encoded(picture.convert("1"), "PNG")]
    sound += [encoded(picture, restart_marker_blocks=2)]
    unsound = [
        bytes(stray),
        odd,
        plain[: len(plain) // 2],
        plain[:200],
        b"\xff\xd8\xff" + bytes(500),
        b"GIF89a" + bytes(500),
        b"text",
    ]
    unsound += [encoded(picture.convert("CMYK"))]
    unsound += [encoded(picture, form) for form in ("BMP", "TIFF", "WEBP", "PPM")]
    unsound += [encoded(picture, "PNG")[:20], encoded(picture, "PNG")[:-30], encoded(picture, "PNG", exif=exif)]
    for i, content in enumerate(sound + unsound):
        (tmp_path / str(i)).write_bytes(content)
    names = [os.fsencode(tmp_path / str(i)) for i in range(len(sound) + len(unsound))]
    batch = read(names, np.zeros((len(names), 4), dtype=np.int32))
    assert not batch.errors
    assert batch.safe.tolist() == [True] * len(sound) + [False] * len(unsound)


def test_a_pipe_does_not_stop_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    batch = read([os.fsencode(tmp_path / "pipe")], NO_WINDOW)
    assert "it is not a file" in str(batch.errors[0])


def test_slow_storage_is_read_by_several_threads_and_gives_the_same(tmp_path: Path) -> None:
    """Files that are not in the page cache have to be waited for."""
    contents = [os.urandom(50_000 + i) for i in range(64)]
    names = [tmp_path / str(i) for i in range(64)]
    for name, content in zip(names, contents, strict=True):
        name.write_bytes(content)
    os.sync()
    for name in names:
        opened = OpenFile(name)
        os.posix_fadvise(opened.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    batch = read([os.fsencode(name) for name in names], np.zeros((64, 4), dtype=np.int32))
    assert [image.tobytes() for image in batch.images if image is not None] == contents


def test_files_are_closed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    places = [os.fsencode(tmp_path / "file")] * 50 + [Extent(OpenFile(tmp_path / "file"), 0, 1)]
    batch: Encoded | None = read(places, np.zeros((51, 4), dtype=np.int32))
    del places, batch
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    with pytest.raises(FileNotFoundError):
        OpenFile(tmp_path / "none")


def test_it_runs_off_the_gil(tmp_path: Path) -> None:
    """Two reads at once give what each gives alone."""
    names = []
    for i in range(100):
        (tmp_path / str(i)).write_bytes(bytes([i]) * (1000 + i))
        names.append(os.fsencode(tmp_path / str(i)))
    windows = np.zeros((100, 4), dtype=np.int32)
    found: dict[int, list[bytes]] = {}

    def work(place: int) -> None:
        order = names if place else names[::-1]
        found[place] = [image.tobytes() for image in read(order, windows).images if image is not None]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1][::-1] and found[1] == [bytes([i]) * (1000 + i) for i in range(100)]
    assert reading._THREADS > 1
