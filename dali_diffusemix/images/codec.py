"""The codec: decodes any supported file into RGB pixels with Pillow, and encodes those that stores hold.

Every conversion is explicit: Pillow's own would clip 16-bit greys to white and keep an alpha channel.
"""

import errno
import functools
import io
import logging
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from dali_diffusemix.base import native
from dali_diffusemix.errors import DecodeError
from dali_diffusemix.images.formats import FORMATS, MAX_PIXELS, SUPPORTED, orientation

# Without a handler Python would print Pillow's errors about odd files, in every epoch.
logging.getLogger("PIL").addHandler(logging.NullHandler())

ImageSource: TypeAlias = bytes | NDArray[np.uint8] | str | os.PathLike[str] | BinaryIO
"""A file's content (as bytes or a (n,) array of them), its path, or the open file."""

RESTARTS: Final = "tiles of at most 64 pixels"
"""The restart markers that `encode` sets, for the settings that a store records."""

MOST_BYTES: Final = 1 << 30
"""The largest file that is read; a larger one is hardly an image, and takes memory."""

_UNIT, _TILE = 16, 64  # pixels: a JPEG's unit with subsampled colours; the widest tile

# EXIF orientation to the transposition that makes the image upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def encode(image: NDArray[np.uint8] | Image.Image, quality: int) -> bytes:
    """Return a JPEG of an RGB image, (height, width, 3) uint8, from which `reading.read` can cut a part.

    Colours are subsampled (4:2:0). Restart markers separate tiles, 16 pixels high and at most 64 wide: the widest that
    divide the image evenly. Smaller tiles would be cut closer, but each costs some bytes.
    """
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    units = -(-image.width // _UNIT)
    tile = max(width for width in range(1, _TILE // _UNIT + 1) if units % width == 0)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality, subsampling="4:2:0", restart_marker_blocks=tile)
    return stream.getvalue()


Stored: TypeAlias = Literal["jpeg", "png", "raw"]
STORED: Final[tuple[Stored, ...]] = ("jpeg", "png", "raw")
"""Formats of the images in stores; "raw" is plain pixels behind the header of a binary PPM file."""
ENDINGS: Final = {"jpeg": "jpg", "png": "png", "raw": "ppm"}
"""The ending of the files of each."""


def encode_as(format: str, image: NDArray[np.uint8] | Image.Image, quality: int | None = None) -> bytes:
    """Return the file of an RGB image, (height, width, 3) uint8, in one of `STORED`; `quality` is the JPEG's."""
    if format == "jpeg":
        assert quality is not None
        return encode(image, quality)
    if format == "raw":
        pixels = np.ascontiguousarray(image)
        return raw_header(*pixels.shape[:2]) + pixels.tobytes()
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, "PNG")
    return stream.getvalue()


def raw_header(height: int, width: int) -> bytes:
    """The bytes before the pixels of a raw image: the header of a binary PPM file, in one of its possible forms."""
    return b"P6\n%d %d\n255\n" % (width, height)


RAW_HEADER: Final = (len(raw_header(1, 1)), len(raw_header(10**5 - 1, 10**5 - 1)))
"""The shortest and the longest one, bytes."""


def raw_pixels(content: NDArray[np.uint8], size: NDArray[np.int32]) -> NDArray[np.uint8]:
    """The pixels of a raw image, (height, width, 3) uint8: a view. Its header is not looked at.

    Args:
        content: (bytes,) its file.
        size: (2,) its height and width.

    Raises:
        DecodeError: The file is no raw image of that size.
    """
    height, width = size.tolist()
    header = len(content) - 3 * height * width
    if not RAW_HEADER[0] <= header <= RAW_HEADER[1]:
        raise DecodeError(
            f"a raw image of {height} x {width} pixels must have them behind a header, found {header} bytes."
        )
    return content[header:].reshape(height, width, 3)


def tile(content: bytes) -> bytes | None:
    """Divide a JPEG into such tiles without loss: its coefficients do not change.

    Metadata is dropped, except for the kind of colours.

    Returns:
        The new file; None if that cannot be done: not a JPEG, progressive, damaged, turned by EXIF, or the library was
        not built.
    """
    try:
        with _quiet_pillow(), Image.open(io.BytesIO(content)) as image:
            if image.format != "JPEG" or orientation(image) != 1:
                return None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return native.tile_jpeg(content, _TILE)


def decode(source: ImageSource) -> NDArray[np.uint8]:
    """Return the upright RGB pixels of an image: (height, width, 3) uint8, contiguous, read-only.

    The EXIF orientation is applied. Grey of 16 bits becomes floor(value / 257 + ½); colour of 16 bits keeps its high
    byte. Alpha and transparent palette entries are dropped, as by `Image.convert("RGB")`; Pillow converts CMYK, without
    a profile. Only the first frame or page is read. `bytes` are content, never a path.

    Raises:
        DecodeError: The file cannot be read, is none of `FORMATS`, is damaged or cut short, has more than
            `MAX_PIXELS` pixels, or has values without a defined range (floating point, 32-bit integers above 65535).
    """
    return _decoded(source, None)


def decode_listed(source: ImageSource, size: NDArray[np.int32], remedy: str | None = None) -> NDArray[np.uint8]:
    """Decode an image whose (height, width) must be those in the catalog.

    Args:
        source: The image.
        size: (2,) its upright pixels.
        remedy: The remedy in error messages; to repair the file unless given.

    Raises:
        DecodeError: As `decode`; or it has another size.
    """
    pixels = _decoded(source, remedy)
    if pixels.shape[:2] != tuple(size):
        raise DecodeError(
            f"{_prefix(source)}must have the {size[0]} x {size[1]} pixels that it was listed with, found "
            f"{pixels.shape[0]} x {pixels.shape[1]}; "
            f"{remedy or 'restore it, or run `index --refresh`'}."
        )
    return pixels


def rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Return the upright RGB pixels of a Pillow image, (height, width, 3) uint8, as `decode` would those of its file.

    The image keeps its mode, size and metadata; its pixels are loaded if they were not.

    Raises:
        DecodeError: Its file is damaged or cut short, it has more than `MAX_PIXELS` pixels, or values without a defined
            range (floating point, 32-bit integers above 65535).
    """
    try:
        with _quiet_pillow():
            # `_upright` takes the transparency out of what it is given.
            return _upright(image.copy() if "transparency" in image.info else image)
    except DecodeError:
        raise
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise DecodeError(
            f"cannot be decoded ({type(error).__name__}: {error}); copy it again or remove it."
        ) from error


def _decoded(source: ImageSource, remedy: str | None) -> NDArray[np.uint8]:
    try:
        with _quiet_pillow():
            if isinstance(source, str | os.PathLike):
                # Opening a pipe would wait for a writer.
                with open(source, "rb", opener=_open_at_once) as file:
                    return _pixels(file)
            if isinstance(source, np.ndarray):
                return _pixels(io.BytesIO(source.tobytes()))
            return _pixels(io.BytesIO(source) if isinstance(source, bytes) else source)
    except DecodeError as error:
        raise DecodeError(f"{_prefix(source)}{error}") from error.__cause__
    except UnidentifiedImageError as error:
        raise DecodeError(
            f"{_prefix(source)}is no image of a supported format ({SUPPORTED}), or its header is damaged; "
            f"{remedy or 'convert it, copy it again or remove it'}."
        ) from error
    except Image.DecompressionBombError as error:
        raise DecodeError(f"{_prefix(source)}{error}; make it smaller.") from error
    except Exception as error:  # Pillow raises many kinds for damaged files
        if isinstance(error, OSError) and error.errno is not None:  # the system's: Pillow's own have no number
            raise DecodeError(
                f"{_prefix(source)}cannot be read ({error.strerror}); "
                f"{remedy or 'restore it, permit reading it, or run `index --refresh`'}."
            ) from error
        raise DecodeError(
            f"{_prefix(source)}cannot be decoded ({type(error).__name__}: {error}); "
            f"{remedy or 'copy it again or remove it'}."
        ) from error


def _open_at_once(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_size > MOST_BYTES:
        os.close(descriptor)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        what = "it has more than a GiB" if stat.S_ISREG(found.st_mode) else "it is not a file"
        raise DecodeError(f"cannot be read ({what}); restore it, or run `index --refresh`.")
    return descriptor


def _pixels(file: BinaryIO) -> NDArray[np.uint8]:
    with Image.open(file, formats=FORMATS) as image:
        return _upright(image)


def _upright(image: Image.Image) -> NDArray[np.uint8]:
    width, height = image.size
    if height * width > MAX_PIXELS:
        raise DecodeError(f"has {height} x {width} pixels, more than the limit of {MAX_PIXELS}; make it smaller.")
    if image.format == "TIFF":
        _quiet_libraries()
    # Loaded first: that turns a TIFF upright, and finds the EXIF behind the pixels of a PNG.
    image.load()
    turn = _UPRIGHT.get(orientation(image))
    upright = image if turn is None else image.transpose(turn)
    if upright.mode == "I" or upright.mode.startswith("I;16"):
        return _eight_bits(np.asarray(upright))
    if upright.mode == "F":
        raise DecodeError("has floating-point values, whose range is not defined; convert it to 8 or 16 bits.")
    # Pillow warns that a palette's alpha is lost, which is intended.
    upright.info.pop("transparency", None)
    pixels: NDArray[np.uint8] = np.asarray(upright if upright.mode == "RGB" else upright.convert("RGB"))
    pixels.flags.writeable = False
    return pixels


_quiet_libraries = functools.cache(native.quiet)


def _eight_bits(grey: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Grey of 16 bits, (height, width), as (height, width, 3) uint8."""
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > 65535:
        raise DecodeError(
            f"has grey values from {low} to {high}, outside the 0 to 65535 of 16 bits; convert it to 8 or 16 bits."
        )
    # floor(value / 257 + ½), in integers.
    narrow = ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)
    pixels = np.repeat(narrow[..., None], 3, axis=2)
    pixels.flags.writeable = False
    return pixels


def _prefix(source: ImageSource) -> str:
    """The beginning of an error message: the file's name. Only the caller knows the name of bytes in memory."""
    if isinstance(source, bytes | np.ndarray):
        return ""
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else getattr(source, "name", source)
    return f"{name!r}: "


# Warnings of Pillow's ------------------------------------------------------------------------------------------------

_quiet = threading.local()  # depth: how many times this thread is in `_quiet_pillow`


class _PillowHere:
    """A filter's pattern of modules that matches Pillow's in threads that are to be quiet."""

    def match(self, module: str) -> bool:
        return getattr(_quiet, "depth", 0) > 0 and module.startswith("PIL.")


_FILTER: Final = ("ignore", None, Warning, _PillowHere(), 0)


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings (odd EXIF, many pixels): they are either harmless or a DecodeError here.

    Filters are process-wide, and restoring them in one thread would undo changes of another. So one filter stays
    installed and matches only in threads that are in here; if somebody resets the filters, it is inserted again.
    """
    filters: list[Any] = warnings.filters  # type: ignore[assignment]
    if filters[:1] != [_FILTER]:
        with suppress(ValueError):
            filters.remove(_FILTER)
        filters.insert(0, _FILTER)
    _quiet.depth = getattr(_quiet, "depth", 0) + 1
    try:
        yield
    finally:
        _quiet.depth -= 1
