"""pixels: every kind of file that users have, against arithmetic done independently here."""

import io
import os
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from material import encoded, photograph, write_photograph
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dali_diffusemix.errors import DecodeError
from dali_diffusemix.images.codec import _PillowHere, decode, decode_listed
from dali_diffusemix.images.formats import FORMATS
from dali_diffusemix.images.reading import read

SHARED = Path(__file__).parents[2] / "shared" / "data"
PICTURE = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)


def file_of(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_come_back_exactly(form: str) -> None:
    data = file_of(Image.fromarray(PICTURE), form, **({"lossless": True} if form == "WEBP" else {}))
    pixels = decode(data)
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous and not pixels.flags.writeable
    np.testing.assert_array_equal(pixels, PICTURE)


def test_every_kind_of_source_gives_the_same(tmp_path: Path) -> None:
    data = file_of(Image.fromarray(PICTURE), "PNG")
    path = tmp_path / os.fsdecode(b"na\xffme with 'quotes'.jpg")  # its ending lies, too
    path.write_bytes(data)
    with path.open("rb") as file:
        sources = [data, np.frombuffer(data, np.uint8), path, str(path), file, io.BytesIO(data)]
        for source in sources:
            np.testing.assert_array_equal(decode(source), PICTURE)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_grey_of_16_bits_is_scaled_not_clipped(form: str) -> None:
    grey = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.floor(grey / 257 + 0.5)
    pixels = decode(file_of(Image.fromarray(grey), form))
    for channel in range(3):
        np.testing.assert_array_equal(pixels[..., channel], expected)


def test_grey_of_16_bits_in_the_other_byte_order() -> None:
    grey = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    stream = io.BytesIO()
    Image.frombytes("I;16B", (16, 16), grey.astype(">u2").tobytes()).save(stream, "TIFF")
    np.testing.assert_array_equal(decode(stream.getvalue())[..., 1].ravel(), np.arange(256))


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.full((4, 4), 0.5, np.float32), "floating-point"),
        (np.full((4, 4), 70_000, np.int32), "from 70000"),
        (np.full((4, 4), -1, np.int32), "from -1"),
    ],
)
def test_values_without_a_range_are_refused(values: NDArray[np.generic], kind: str) -> None:
    with pytest.raises(DecodeError, match=kind):
        decode(file_of(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_modes_are_what_convert_makes_of_them(mode: str) -> None:
    image = Image.fromarray(PICTURE).convert(mode)
    form = "TIFF" if mode == "CMYK" else "PNG"
    np.testing.assert_array_equal(decode(file_of(image, form)), np.asarray(image.convert("RGB")))


def test_cmyk_jpeg() -> None:
    data = file_of(Image.fromarray(PICTURE).resize((32, 32)).convert("CMYK"), "JPEG")
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(decode(data), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("transparency", [3, bytes(range(0, 256, 16))])
def test_alpha_is_dropped_not_blended(transparency: int | bytes) -> None:
    palette = Image.fromarray(PICTURE).quantize(16)
    data = file_of(palette, "PNG", transparency=transparency)
    np.testing.assert_array_equal(decode(data), np.asarray(palette.convert("RGB")))
    clear = np.dstack([PICTURE, np.zeros((7, 5), np.uint8)])
    np.testing.assert_array_equal(decode(file_of(Image.fromarray(clear), "PNG")), PICTURE)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(
        Image.fromarray(PICTURE).resize((31, 17)), form, exif=exif, **({"lossless": True} if form == "WEBP" else {})
    )
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert expected.shape[:2] == ((31, 17) if orientation >= 5 else (17, 31))
    np.testing.assert_array_equal(decode(data), expected)


def test_nothing_of_pillows_own_warnings_leaks() -> None:
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x09broken"
    image = Image.fromarray(PICTURE).resize((32, 32))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        decode(file_of(image, "JPEG", exif=exif))
        decode(file_of(image.quantize(16), "PNG", transparency=bytes(16)))
    assert not seen


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_cut_short_files_are_errors_not_grey_areas(form: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    data = file_of(Image.fromarray(noise), form)
    for length in (0, 1, 10, len(data) // 3, len(data) // 2, len(data) * 9 // 10):
        path = tmp_path / f"cut-{length}.jpg"
        path.write_bytes(data[:length])
        with pytest.raises(DecodeError, match=f"cut-{length}.jpg"):
            decode(path)


def test_what_is_no_supported_image_is_refused(tmp_path: Path) -> None:
    gif = file_of(Image.fromarray(PICTURE), "GIF")
    assert "GIF" not in FORMATS
    with pytest.raises(DecodeError, match=r"^is no image of a supported format \(JPEG, PNG, BMP, TIFF, PNM and WebP\)"):
        decode(gif)
    with pytest.raises(DecodeError, match=r"nowhere\.jpg': cannot be read \(No such file or directory\); restore it"):
        decode(tmp_path / "nowhere.jpg")
    with pytest.raises(DecodeError, match="cannot be read"):
        decode(tmp_path)


def test_an_image_of_another_size_is_refused_with_the_remedy_given() -> None:
    data, size = file_of(Image.fromarray(PICTURE), "PNG"), np.array([7, 5], dtype=np.int32)
    np.testing.assert_array_equal(decode_listed(data, size), PICTURE)
    with pytest.raises(DecodeError, match=r"^must have the 5 x 7 pixels .* found 7 x 5; restore it"):
        decode_listed(data, size[::-1])
    for content, given in ((data, size[::-1]), (data[:-30], size), (b"nothing", size)):
        with pytest.raises(DecodeError, match=r"; do that\.$"):
            decode_listed(content, given, "do that")


@pytest.mark.parametrize(("height", "width"), [(9_500, 9_500), (20_000, 10_000)])
def test_an_image_above_the_pixel_limit_is_refused_before_it_is_allocated(height: int, width: int) -> None:
    header = b"\0\0\0\rIHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    data = file_of(Image.fromarray(PICTURE), "PNG")
    huge = data[:8] + header + zlib.crc32(header[4:]).to_bytes(4, "big") + data[33:]
    with pytest.raises(DecodeError, match="limit"):
        decode(huge)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (10, 20_000), (20_000, 10)])
def test_extreme_shapes(height: int, width: int) -> None:
    image = Image.new("RGB", (width, height), (10, 20, 30))
    pixels = decode(file_of(image, "PNG"))
    assert pixels.shape == (height, width, 3)
    assert (pixels == (10, 20, 30)).all()


def test_real_photographs_are_as_pillow_sees_them() -> None:
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there")
    for path in sorted(SHARED.glob("imagenet_sample/*/*"))[::16]:
        with Image.open(path) as image:
            np.testing.assert_array_equal(decode(path), np.asarray(ImageOps.exif_transpose(image).convert("RGB")))


def test_a_pipe_is_no_image_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(DecodeError, match=r"a\.jpg.*cannot be read \(it is not a file\); restore it"):
        decode(tmp_path / "a.jpg")
    with pytest.raises(DecodeError, match="cannot be read"):
        decode(tmp_path)


def test_a_file_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    write_photograph(file, 1, 20, 30)
    os.truncate(file, 1 << 40)  # a hole
    with pytest.raises(DecodeError, match="it has more than a GiB"):
        decode(file)
    found = read([os.fsencode(file)], np.zeros((1, 4), dtype=np.int32))
    assert "it has more than a GiB" in str(found.errors[0]) and found.memory.nbytes < 1 << 20


def test_threads_leave_the_filters_of_warnings_as_they_are() -> None:
    """What a training loop sets for a while is gone afterwards, whatever decodes meanwhile; and Pillow stays quiet."""
    palette = Image.fromarray(photograph(1, 40, 50)).quantize(16)
    content = encoded(palette, "PNG", transparency=bytes(range(16)))  # of which Pillow warns
    stop = threading.Event()
    wrong: list[BaseException] = []

    def work() -> None:
        try:
            while not stop.is_set():
                decode(content)
        except BaseException as error:
            wrong.append(error)

    def without_ours() -> list[object]:
        return [one for one in warnings.filters if not isinstance(one[3], _PillowHere)]

    threads = [threading.Thread(target=work) for _ in range(3)]
    before = without_ours()
    for thread in threads:
        thread.start()
    for _ in range(100):
        for action in ("error", "ignore"):
            with warnings.catch_warnings():
                warnings.simplefilter(action)  # type: ignore[arg-type]
                time.sleep(0.001)
    stop.set()
    for thread in threads:
        thread.join()
    assert without_ours() == before
    # A filter that was set between two looks may be in front for one warning; what it makes of the file is an error.
    assert all(isinstance(error, DecodeError) for error in wrong)
    with pytest.warns(UserWarning, match="it is still heard"):  # in this thread, and of others than Pillow
        warnings.warn("it is still heard", UserWarning, stacklevel=1)
