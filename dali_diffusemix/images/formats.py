"""Formats that are read, and what the header of a file tells: format, size, orientation, or why it cannot be used."""

import io
import re
import struct
from pathlib import Path
from typing import BinaryIO

from PIL import ExifTags, Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "PPM", "WEBP")
"""Pillow's names of the formats that are read; PPM is all of PNM."""
SUPPORTED = "JPEG, PNG, BMP, TIFF, PNM and WebP"
"""The same for messages."""
MAX_PIXELS = 89_478_485
"""Images of more pixels are rejected. It is Pillow's own limit, above which it warns of a decompression bomb."""
# Beyond all metadata of 98 % of photographs (ImageNet), and little enough to fetch over a network.
_HEADER_BYTES = 16384
_START_BYTES = 4096  # enough to tell a format


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; from 5 on the sides are swapped.

    Only EXIF in APP1, eXIf and a TIFF's tags counts, as for DALI's decoders. `exif_transpose` also looks into XMP and
    into a PNG's text. EXIF that cannot be parsed counts as none: the pixels are good. When Pillow loads the pixels, it
    applies the orientation of a TIFF, and finds the EXIF behind the pixels of a PNG.
    """
    try:
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            exif = image.getexif()
        else:
            exif = Image.Exif()
            exif.load(image.info.get("exif", b""))
        value = exif.get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return int(value) if value in range(1, 9) else 1


class _Unusable(Exception):
    """The reason why a file cannot be used, as a sentence."""


def read_size(path: str) -> tuple[int, int] | str:
    """Height and width after the EXIF orientation, from the header alone; or the reason why the file is unusable."""
    try:
        with Path(path).open("rb", buffering=_HEADER_BYTES) as file:
            return _measure(file)
    except _Unusable as error:
        return str(error)
    except OSError as error:
        return f"It cannot be read ({error.strerror or error}); it must be a file that you may read."


def measure(content: bytes | BinaryIO) -> tuple[int, int] | str:
    """`read_size` of a file's content, or of an open file that stands at its start.

    Raises OSError of the open file itself.
    """
    try:
        return _measure(io.BytesIO(content) if isinstance(content, bytes) else content)
    except _Unusable as error:
        return str(error)


def _measure(file: BinaryIO) -> tuple[int, int]:
    """`read_size` of an open file. Raises _Unusable, and OSError of the file itself."""
    start = file.read(_START_BYTES)
    if not start:
        raise _Unusable("It is empty (0 bytes); copy it again or remove it.")
    name = format_of(start)
    if name is None:
        raise _Unusable(_no_image(start))
    if name == "JPEG" and (why := _unsupported_frame(start, file)):
        raise _Unusable(why)
    try:
        with Image.open(file, formats=[name]) as image:
            if name != "WEBP" and not image.tile:
                raise _Unusable(f"Its {name} header ends before the pixels; the file is cut short.")
            width, height = image.size
            if isinstance(image, TiffImagePlugin.TiffImageFile):
                # Before the pixels are loaded, `size` has the orientation in some versions of Pillow and not in others.
                width, height = image.tag_v2[ExifTags.Base.ImageWidth], image.tag_v2[ExifTags.Base.ImageLength]
            if height * width > MAX_PIXELS:
                limit = f"more than the limit of {MAX_PIXELS}"
                raise _Unusable(f"It has {height} x {width} pixels, {limit}; make it smaller.")
            if name == "PNG" and "exif" not in image.info and _exif_follows(file, image.tile[0][2] - 8):
                image.load()
            return (width, height) if orientation(image) >= 5 else (height, width)
    except _Unusable:
        raise
    except Image.DecompressionBombError as error:
        raise _Unusable(f"It has more pixels than the limit of {MAX_PIXELS} ({error}); make it smaller.") from error
    except UnidentifiedImageError as error:
        raise _Unusable(f"Its {name} header cannot be read; the file is damaged or cut short.") from error
    except ValueError as error:
        # Pillow's protection against text that is a decompression bomb; the picture may be good.
        if name == "PNG" and "MAX_TEXT" in str(error):
            raise _Unusable(
                "unsupported: the text stored in this PNG (a workflow or a prompt, for instance) is larger than "
                f"Pillow's limit of {PngImagePlugin.MAX_TEXT_CHUNK} bytes; save it without the text."
            ) from error
        raise _Unusable(_damaged_header(name, error)) from error
    except Exception as error:  # Pillow raises many kinds, and none may end the listing of a million files
        raise _Unusable(_damaged_header(name, error)) from error


def _damaged_header(name: str, error: Exception) -> str:
    return f"Its {name} header cannot be read ({type(error).__name__}: {error}); the file is damaged."


def format_of(start: bytes) -> str | None:
    """Pillow's name for the format of a file that begins like this; the name's ending does not matter."""
    if start.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if start.startswith(b"BM"):
        return "BMP"
    if start.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if start[:1] == b"P" and start[1:2] in b"123456" and start[2:3] in b" \t\n\v\f\r#":
        return "PPM"
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        return "WEBP"
    return None


# Beginnings of files that are found among images, and what they are.
_OTHERS = (
    (rb"GIF8", "a GIF"),
    (rb"....ftyp(?:avif|avis)", "an AVIF image"),
    (rb"....ftyp(?:hei|hev|mif|msf)", "a HEIF image"),
    (rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ", "a video"),
    (rb"\0\0\0\x0cJXL |\xff\x0a", "a JPEG XL image"),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (rb"8BPS", "a Photoshop file"),
    (rb"\0\0\x01\0", "an icon"),
    (rb"%PDF", "a PDF"),
    (rb"PK\x03\x04|\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!", "an archive"),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*(?:<!DOCTYPE svg[^>]*>\s*)?<svg\b", "an SVG drawing"),
)
_KINDS = tuple((re.compile(pattern, re.DOTALL | re.IGNORECASE), what) for pattern, what in _OTHERS)
_PAGE = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body)\b", re.DOTALL | re.IGNORECASE
)
_ANSWER = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml|<Error\b|\{)", re.IGNORECASE)


def _no_image(start: bytes) -> str:
    """The reason why a file that begins like this cannot be read."""
    if start.startswith(b"version https://git-lfs.github.com/"):
        return "It is a Git LFS pointer, not the image itself; run `git lfs pull` in its repository."
    if b"/annex/objects/" in start:
        return "It is a git-annex pointer, not the image itself; run `git annex get` in its repository."
    if _PAGE.match(start):
        return "It is an HTML page, as a failed download leaves one; download the image itself again."
    for pattern, what in _KINDS:
        if pattern.match(start):
            return f"unsupported: it is {what}; supported are {SUPPORTED}; convert it."
    if _ANSWER.match(start):
        return "It is text (XML or JSON), as a failed download leaves it; download the image itself again."
    return f"unsupported: it begins with {start[:12]!r}; supported are {SUPPORTED}; convert it."


# JPEG frames that the decoders do not read.
_RARE_FRAMES = {
    0xC3: "lossless",
    0xC5: "hierarchical",
    0xC6: "hierarchical",
    0xC7: "lossless",
    0xCB: "lossless",
    0xCD: "hierarchical",
    0xCE: "hierarchical",
    0xCF: "lossless",
}
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def _unsupported_frame(start: bytes, file: BinaryIO) -> str | None:
    """The reason why no decoder here reads a JPEG that begins like this; None if there is none."""
    frame = _frame(start, file)
    if frame is None:
        return None
    kind, bits = frame
    if kind in _RARE_FRAMES:
        return f"unsupported: it is a {_RARE_FRAMES[kind]} JPEG; save it as an ordinary one, or as PNG."
    if bits != 8:
        return f"unsupported: it is a JPEG of {bits} bits, 8 are supported; convert it."
    return None


def _frame(start: bytes, file: BinaryIO) -> tuple[int, int] | None:
    """A JPEG's frame marker, without its FF, and the bits per value; None if it has none."""
    window, base, offset = start, 0, 2  # bytes of the file, their offset, and that of the marker
    while True:
        at = offset - base
        if at + 5 > len(window):
            file.seek(offset)
            window, base, at = file.read(64), offset, 0
            if len(window) < 5:
                return None
        if window[at] != 0xFF:
            return None
        kind = window[at + 1]
        if kind in _FRAMES:
            return kind, window[at + 4]
        if kind == 0xFF:  # a fill byte
            offset += 1
        elif kind == 0x01 or 0xD0 <= kind <= 0xD7:  # without a segment
            offset += 2
        else:
            size = window[at + 2] << 8 | window[at + 3]
            if kind == 0xDA or size < 2:
                return None
            offset += 2 + size


def _exif_follows(file: BinaryIO, pixels: int) -> bool:
    """True if a PNG has EXIF behind the offset of its first pixels, where exiftool puts it and `load` finds it."""
    back = file.tell()
    file.seek(pixels)
    found = False
    while not found and len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        here = file.tell()
        found = kind == b"eXIf"
        file.seek(here + length + 4)  # 4: the checksum
    file.seek(back)
    return found
