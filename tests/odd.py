"""Image files of every kind, synthesised: JPEGs and PNGs that Pillow does not write, and what programs do to files."""

import struct
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from material import encoded, photograph
from numpy.typing import NDArray
from PIL import Image

Segment = tuple[int, bytes]
"""A JPEG's marker and what follows its length."""

# --- JPEG -----------------------------------------------------------------------------------------------------------

_ORDER = np.array(
    sorted(range(64), key=lambda k: (k // 8 + k % 8, k // 8 if (k // 8 + k % 8) % 2 else k % 8))
)  # zigzag
# How many codes of each length there are, and their symbols: T.81, K.3 for luma.
_DC = (bytes([0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]), bytes(range(12)))


# A code of 8 bits for each AC symbol that pictures of 8 bits need.
_AC = (bytes([0] * 7 + [176] + [0] * 8), bytes(run << 4 | size for run in range(16) for size in range(11)))


def _codes(table: tuple[bytes, bytes]) -> dict[int, tuple[int, int]]:
    """(code, length) by symbol."""
    codes, code, symbols = {}, 0, iter(table[1])
    for length, count in enumerate(table[0], 1):
        for _ in range(count):
            codes[next(symbols)] = (code, length)
            code += 1
        code <<= 1
    return codes


class _Bits:
    def __init__(self) -> None:
        self.bits: list[str] = []

    def put(self, value: int, length: int) -> None:
        if length:
            self.bits.append(f"{value:0{length}b}")

    def bytes(self) -> bytes:
        bits = "".join(self.bits)
        bits += "1" * (-len(bits) % 8)
        return bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)).replace(b"\xff", b"\xff\0")


def _magnitude(bits: _Bits, value: int) -> None:
    size = abs(value).bit_length()
    bits.put(value if value > 0 else value + (1 << size) - 1, size)


def jpeg(
    planes: Sequence[NDArray[np.uint8]],
    sampling: Sequence[tuple[int, int]],
    *,
    ids: Sequence[int] | None = None,
    before: Sequence[Segment] = (),
    interleaved: bool = True,
    sof: int = 0xC0,
) -> bytes:
    """A sequential JPEG of components of one size, each subsampled as its (wide, high) says."""
    height, width = planes[0].shape
    count = len(planes)
    wide, high = max(w for w, _ in sampling), max(h for _, h in sampling)
    ids = ids or range(1, count + 1)
    down, across = -(-height // (8 * high)), -(-width // (8 * wide))
    cosines = np.cos((2 * np.arange(8)[None] + 1) * np.arange(8)[:, None] * np.pi / 16) / 2
    cosines[0] /= np.sqrt(2)
    blocks = []
    for plane, (w, h) in zip(planes, sampling, strict=True):
        rows = np.minimum(np.arange(down * 8 * h) * high // h, height - 1)
        columns = np.minimum(np.arange(across * 8 * w) * wide // w, width - 1)
        tiles = plane[rows][:, columns].astype(float).reshape(down * h, 8, across * w, 8).swapaxes(1, 2) - 128
        spectrum = np.rint(cosines @ tiles @ cosines.T / 16).astype(int)
        blocks.append(spectrum.reshape(down * h, across * w, 64)[..., _ORDER])
    dc, ac = _codes(_DC), _codes(_AC)

    def scan(components: Sequence[int]) -> bytes:
        bits, before_ = _Bits(), dict.fromkeys(components, 0)
        for c, y, x in _places(components, sampling, down, across, (height, width), (high, wide)):
            block = blocks[c][y, x].tolist()
            difference = block[0] - before_[c]
            before_[c] = block[0]
            bits.put(*dc[abs(difference).bit_length()])
            _magnitude(bits, difference)
            run = 0
            last = max((k for k in range(1, 64) if block[k]), default=0)
            for k in range(1, last + 1):
                if not block[k]:
                    run += 1
                    continue
                for _ in range(run // 16):
                    bits.put(*ac[0xF0])
                bits.put(*ac[run % 16 << 4 | abs(block[k]).bit_length()])
                _magnitude(bits, block[k])
                run = 0
            if last < 63:
                bits.put(*ac[0])
        head = bytes([len(components)]) + b"".join(bytes([ids[c], 0]) for c in components) + b"\0\x3f\0"
        return write_segments([(0xDA, head)]) + bits.bytes()

    frame = struct.pack(">BHHB", 8, height, width, count)
    frame += b"".join(bytes([ids[c], sampling[c][0] << 4 | sampling[c][1], 0]) for c in range(count))
    head = [*before, (0xDB, b"\0" + bytes([16] * 64)), (sof, frame)]
    head += [(0xC4, b"\0" + b"".join(_DC)), (0xC4, b"\x10" + b"".join(_AC))]
    scans = [range(count)] if interleaved else [[c] for c in range(count)]
    return b"\xff\xd8" + write_segments(head) + b"".join(map(scan, scans)) + b"\xff\xd9"


def _places(
    components: Sequence[int],
    sampling: Sequence[tuple[int, int]],
    down: int,
    across: int,
    size: tuple[int, int],
    most: tuple[int, int],
) -> Iterator[tuple[int, int, int]]:
    """(component, row, column) of a scan's blocks in their order."""
    if len(components) == 1:  # only the blocks that the picture needs
        c = components[0]
        w, h = sampling[c]
        for y in range(-(-size[0] * h // (8 * most[0]))):
            for x in range(-(-size[1] * w // (8 * most[1]))):
                yield c, y, x
        return
    for row in range(down):
        for column in range(across):
            for c in components:
                w, h = sampling[c]
                for y in range(h):
                    for x in range(w):
                        yield c, row * h + y, column * w + x


def write_segments(segments: Sequence[Segment]) -> bytes:
    return b"".join(struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body for marker, body in segments)


def split_jpeg(content: bytes) -> tuple[list[Segment], bytes]:
    """A whole JPEG's segments up to the first scan's, and what follows them."""
    segments, at = [], 2
    while True:
        marker, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4], "big")
        segments.append((marker, content[at + 4 : at + 2 + length]))
        at += 2 + length
        if marker == 0xDA:
            return segments, content[at:]


def join_jpeg(segments: Sequence[Segment], rest: bytes) -> bytes:
    return b"\xff\xd8" + write_segments(segments) + rest


def with_segment(content: bytes, marker: int, body: bytes) -> bytes:
    """A JPEG with one more segment, before all others."""
    return content[:2] + write_segments([(marker, body)]) + content[2:]


def without(content: bytes, marker: int) -> bytes:
    segments, rest = split_jpeg(content)
    return join_jpeg([segment for segment in segments if segment[0] != marker], rest)


def exif(entries: Sequence[tuple[int, int, int, int]], *, little: bool = True) -> bytes:
    """An APP1 segment's content: entries of (tag, type, count, value or offset)."""
    order = "<" if little else ">"
    block = (b"II*\0" if little else b"MM\0*") + struct.pack(order + "IH", 8, len(entries))
    for tag, kind, count, value in entries:
        inline = struct.pack(order + "HH", value, 0) if kind == 3 else struct.pack(order + "I", value)
        block += struct.pack(order + "HHI", tag, kind, count) + inline
    return b"Exif\0\0" + block + struct.pack(order + "I", 0)


def scan_starts(content: bytes) -> list[int]:
    """Where a JPEG's scans' headers begin, in a file whose codes are sound."""
    return [at for at in range(len(content) - 1) if content[at : at + 2] == b"\xff\xda"]


# --- PNG ------------------------------------------------------------------------------------------------------------

MAGIC = b"\x89PNG\r\n\x1a\n"
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    colours: int,
    depth: int,
    *,
    size: tuple[int, int] = (21, 34),
    interlaced: bool = False,
    seed: int = 0,
    before: bytes = b"",
    after: bytes = b"",
    colours_used: int | None = None,
    pieces: int = 1,
) -> bytes:
    """A PNG of random smooth pixels of any kind, with chunks before and after its pixels."""
    height, width = size
    generator = np.random.default_rng(seed)
    channels = _CHANNELS[colours]
    most = (colours_used or 1 << depth) - 1
    noise = generator.integers(0, most + 1, (height, width, channels), dtype=np.int64)
    lines = []
    for top, left, rows, columns in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        part = noise[top::rows, left::columns]
        if not part.size:
            continue
        for row in part:
            if depth >= 8:
                lines.append(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes())
            else:
                bits = (row.reshape(-1, 1) >> np.arange(depth)[::-1]) & 1
                lines.append(b"\0" + np.packbits(bits.reshape(-1).astype(np.uint8)).tobytes())
    data = zlib.compress(b"".join(lines))
    step = -(-len(data) // pieces)
    head = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, interlaced)
    idat = b"".join(chunk(b"IDAT", data[i : i + step]) for i in range(0, len(data), step))
    return MAGIC + chunk(b"IHDR", head) + before + idat + after + chunk(b"IEND")


def chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    """A whole PNG's chunks."""
    found, at = [], 8
    while at < len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        found.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def join_png(parts: Sequence[tuple[bytes, bytes]]) -> bytes:
    return MAGIC + b"".join(chunk(*part) for part in parts)


PROFILE = bytearray(144)
"""An ICC profile whose tag begins at no multiple of four, which libpng prints about."""
PROFILE[:40] = struct.pack(">I4xI12s12xI", 144, 0x02100000, b"mntrRGB XYZ ", 0x61637370)
PROFILE[68:80] = struct.pack(">III", 0xF6D6, 0x10000, 0xD32D)
PROFILE[128:144] = struct.pack(">I4sII", 1, b"desc", 131, 12)

# --- all of them ----------------------------------------------------------------------------------------------------


def jpegs() -> dict[str, bytes]:
    """JPEGs, by what is special about them."""
    picture = Image.fromarray(photograph(1, 43, 61))
    plain = encoded(picture, quality=88)
    grey = encoded(picture.convert("L"), quality=88)
    progressive = encoded(picture, progressive=True, quality=88)
    cmyk = encoded(picture.convert("CMYK"))
    y, cb, cr = (np.asarray(plane) for plane in picture.convert("YCbCr").split())
    files = {
        "plain": plain,
        "grey": grey,
        "progressive": progressive,
        "progressive grey": encoded(picture.convert("L"), progressive=True),
    }
    for name, subsampling in (("444", 0), ("422", 1), ("420", 2)):
        files[name] = encoded(picture, subsampling=subsampling)
        files[f"progressive {name}"] = encoded(picture, subsampling=subsampling, progressive=True)
        files[f"restart blocks {name}"] = encoded(picture, subsampling=subsampling, restart_marker_blocks=2)
        files[f"restart rows {name}"] = encoded(picture, subsampling=subsampling, restart_marker_rows=1)
        for turn in range(1, 9):
            entries = [(0x112, 3, 1, turn)]
            files[f"{name} turned {turn}"] = with_segment(files[name], 0xE1, exif(entries, little=turn % 2 == 0))
    for height, width in ((1, 1), (1, 40), (40, 1), (2, 2), (3, 5), (8, 8), (16, 16), (17, 33), (9, 70)):
        small = picture.resize((width, height))
        files[f"size {height} x {width}"] = encoded(small, subsampling=2)
        files[f"size {height} x {width} progressive"] = encoded(small, subsampling=2, progressive=True)
        files[f"size {height} x {width} restart"] = encoded(small, subsampling=2, restart_marker_blocks=1)
    files |= {
        "optimised": encoded(picture, optimize=True),
        "best": encoded(picture, quality=100, subsampling=0),
        "worst": encoded(picture, quality=1),
        "cmyk": cmyk,
        "cmyk with black": encoded(Image.fromarray(np.dstack([255 - np.asarray(picture), 200 - y // 2]), "CMYK")),
        "cmyk without Adobe": without(cmyk, 0xEE),
        "rgb": encoded(picture, keep_rgb=True),
        "comment": encoded(picture, comment=b"a comment"),
        "profile": encoded(picture, icc_profile=b"not a profile" * 10),
        "dpi": encoded(picture, dpi=(300, 300)),
        "no JFIF": without(plain, 0xE0),
        "trailing data": plain + b"SEFT" * 20,
        "two pictures": plain + grey,
        "Ss = Se = 0": plain.replace(b"\0\x3f\0", b"\0\0\0"),
        "FF 00 segment": plain.replace(b"\xff\xdb", b"\xff\0\0\2\xff\xdb", 1),
        "fill bytes": plain.replace(b"\xff\xdb", b"\xff\xff\xff\xdb", 1),
        "bytes between segments": plain.replace(b"\xff\xdb", b"abc\xff\xdb", 1),
        "RST in the header": plain.replace(b"\xff\xdb", b"\xff\xd3\xff\xdb", 1),
        "unknown marker": plain.replace(b"\xff\xdb", b"\xff\x02\0\4ab\xff\xdb", 1),
        "bytes before the end": plain[:-2] + b"\x12\x34\x56\x78" + plain[-2:],
        "zeros before the end": plain[:-2] + bytes(40) + plain[-2:],
        "no end": plain[:-2],
        "JFIF 2": plain.replace(b"JFIF\0\1", b"JFIF\0\2"),
        "short JFIF": with_segment(without(plain, 0xE0), 0xE0, b"JFIF\0\1"),
        "component ids RGB": _ids(plain, b"RGB"),
        "component ids RGB, no JFIF": without(_ids(plain, b"RGB"), 0xE0),
        "component ids 0 1 2": _ids(plain, b"\0\1\2"),
        "component ids 0 1 2, no JFIF": without(_ids(plain, b"\0\1\2"), 0xE0),
        "component ids alike": _ids(plain, b"\1\1\1"),
        "two EXIFs": with_segment(with_segment(plain, 0xE1, exif([(0x112, 3, 1, 3)])), 0xE1, exif([(0x112, 3, 1, 6)])),
        "EXIF of nothing": with_segment(plain, 0xE1, b"Exif\0\0"),
        "EXIF too short": with_segment(plain, 0xE1, b"Exif\0"),
        "EXIF of noise": with_segment(plain, 0xE1, b"Exif\0\0" + bytes(range(200))),
        "XMP": with_segment(plain, 0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation='6'/>"),
        "XMP behind the frame": _behind_frame(plain, 0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>"),
        "comment behind the frame": _behind_frame(plain, 0xFE, b"a comment"),
        "profile behind the frame": _behind_frame(plain, 0xE2, b"ICC_PROFILE\0\1\1profile"),
        "EXIF behind the frame": _behind_frame(plain, 0xE1, exif([(0x112, 3, 1, 6)])),
        "Adobe behind the frame": _behind_frame(without(plain, 0xE0), 0xEE, b"Adobe\0\x64\0\0\0\0\0"),
        "JFIF behind the frame": _behind_frame(without(_ids(plain, b"RGB"), 0xE0), 0xE0, b"JFIF\0\1\1" + bytes(7)),
        "short Photoshop": with_segment(plain, 0xED, b"Photoshop 3.0\x008BIM\4\4"),
        "Photoshop": with_segment(plain, 0xED, b"Photoshop 3.0\x008BIM\4\4\0\0\0\0\0\4abcd8BIM\3\xed\0\0\0\0\0\4abcd"),
        "short profile": with_segment(plain, 0xE2, b"ICC_PROFILE\0\1"),
        "MPF": with_segment(plain, 0xE2, b"MPF\0II*\0\x08\0\0\0\1\0\1\xb0\4\0\1\0\0\0\2\0\0\0\0\0\0\0"),
        "MPF of noise": with_segment(plain, 0xE2, b"MPF\0" + bytes(range(60))),
        "12 bits": plain.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"),
        "arithmetic": plain.replace(b"\xff\xc0\0\x11", b"\xff\xc9\0\x11"),
        "lossless": plain.replace(b"\xff\xc0\0\x11", b"\xff\xc3\0\x11"),
        "called progressive": plain.replace(b"\xff\xc0\0\x11", b"\xff\xc2\0\x11"),
        "no codes": without(plain, 0xC4),
        "no quantisation": without(plain, 0xDB),
        "restart interval, no markers": plain.replace(b"\xff\xda", b"\xff\xdd\0\4\0\1\xff\xda", 1),
        "markers, no restart interval": without(files["restart blocks 420"], 0xDD),
        "second frame": plain.replace(b"\xff\xc4", plain[plain.index(b"\xff\xc0") :][:19] + b"\xff\xc4", 1),
        "height unknown": _with_height(plain, 0),
        "higher than its codes": _with_height(plain, 59),
    }  # fmt: skip
    for transform in range(4):
        adobe = b"Adobe\0\x64\0\0\0\0" + bytes([transform])
        files[f"Adobe {transform}"] = with_segment(without(plain, 0xE0), 0xEE, adobe)
        files[f"JFIF and Adobe {transform}"] = with_segment(plain, 0xEE, adobe)
        files[f"grey Adobe {transform}"] = with_segment(without(grey, 0xE0), 0xEE, adobe)
        files[f"cmyk Adobe {transform}"] = with_segment(without(cmyk, 0xEE), 0xEE, adobe)
    files["short Adobe"] = with_segment(plain, 0xEE, b"Adobe\0\x64")
    for name, entries in {
        "value outside": [(0x112, 3, 1, 6), (0x131, 2, 40, 5000)],
        "value outside first": [(0x131, 2, 40, 5000), (0x112, 3, 1, 6)],
        "long": [(0x112, 4, 1, 6)],
        "byte": [(0x112, 1, 1, 6)],
        "two values": [(0x112, 3, 2, 6)],
        "no value": [(0x112, 3, 0, 6)],
        "0": [(0x112, 3, 1, 0)],
        "9": [(0x112, 3, 1, 9)],
        "twice": [(0x112, 3, 1, 6), (0x112, 3, 1, 3)],
        "resolution in place": [(0x112, 3, 1, 6), (0x11A, 3, 1, 72), (0x11B, 4, 1, 72)],
        "resolution first": [(0x11A, 3, 1, 72), (0x112, 3, 1, 6)],
        "unknown type": [(0x9000, 77, 1, 0), (0x112, 3, 1, 6)],
        "none": [(0x128, 3, 1, 2)],
    }.items():
        files[f"EXIF {name}"] = with_segment(plain, 0xE1, exif(entries))
    for sampling in ((1, 2), (4, 1), (1, 4), (4, 2), (2, 4), (3, 1), (3, 3), (1, 3)):
        files[f"sampling {sampling}"] = jpeg([y, cb, cr], [sampling, (1, 1), (1, 1)])
    files |= {
        "sampling of all": jpeg([y, cb, cr], [(2, 1), (2, 1), (2, 1)]),
        "sampling of chroma": jpeg([y, cb, cr], [(1, 1), (2, 1), (1, 2)]),
        "sampling uneven": jpeg([y, cb, cr], [(2, 2), (2, 1), (1, 1)]),
        "not interleaved": jpeg([y, cb, cr], [(2, 2), (1, 1), (1, 1)], interleaved=False),
        "grey, sampling": jpeg([y], [(2, 2)]),
        "grey, uneven sampling": jpeg([y], [(2, 1)]),
        "two components": jpeg([y, cb], [(1, 1), (1, 1)]),
        "YCCK": jpeg([y, cb, cr, y], [(1, 1)] * 4, before=[(0xEE, b"Adobe\0\x64\0\0\0\0\2")]),
        "extended": jpeg([y, cb, cr], [(2, 1), (1, 1), (1, 1)], sof=0xC1),
    }
    scans = scan_starts(progressive)
    for first in range(1, len(scans)):
        files[f"progressive, {first} scans"] = progressive[: scans[first]] + b"\xff\xd9"
        parts = [progressive[a:b] for a, b in zip(scans, [*scans[1:], len(progressive)], strict=True)]
        files[f"progressive, scan {first} twice"] = (
            progressive[: scans[first]] + parts[first - 1] + progressive[scans[first] :]
        )
        files[f"progressive, without scan {first}"] = progressive[: scans[first - 1]] + progressive[scans[first] :]
    return files


def _behind_frame(content: bytes, marker: int, body: bytes) -> bytes:
    at = content.index(b"\xff\xc0") + 19
    return content[:at] + write_segments([(marker, body)]) + content[at:]


def _ids(content: bytes, ids: bytes) -> bytes:
    """A JPEG of three components with other names for them."""
    segments, rest = split_jpeg(content)
    renamed = []
    for marker, body in segments:
        if marker == 0xC0:
            body = body[:6] + b"".join(ids[c : c + 1] + body[7 + 3 * c : 9 + 3 * c] for c in range(3))
        elif marker == 0xDA:
            body = body[:1] + b"".join(ids[c : c + 1] + body[2 + 2 * c : 3 + 2 * c] for c in range(3)) + body[7:]
        renamed.append((marker, body))
    return join_jpeg(renamed, rest)


def _with_height(content: bytes, height: int) -> bytes:
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + struct.pack(">H", height) + content[at + 2 :]


def pngs() -> dict[str, bytes]:
    """PNGs, by what is special about them."""
    files: dict[str, bytes] = {}
    palette = chunk(b"PLTE", bytes(range(48)))
    for colours, depths in {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4), 4: (8, 16), 6: (8, 16)}.items():
        for depth in depths:
            before = palette[:0] if colours != 3 else chunk(b"PLTE", bytes((37 * i) % 256 for i in range(3 << depth)))
            files[f"{colours} of {depth}"] = png(colours, depth, before=before)
            files[f"{colours} of {depth}, interlaced"] = png(colours, depth, before=before, interlaced=True)

    def frame(width: int) -> bytes:
        return chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, width, 21, 0, 0, 1, 1, 0, 0))

    plain = png(2, 8)
    few = chunk(b"PLTE", bytes(range(90)))
    before = {
        "gAMA": chunk(b"gAMA", struct.pack(">I", 45455)),
        "other gAMA": chunk(b"gAMA", struct.pack(">I", 100000)),
        "gAMA of 0": chunk(b"gAMA", bytes(4)),
        "short gAMA": chunk(b"gAMA", bytes(3)),
        "sRGB": chunk(b"sRGB", b"\0"),
        "bad sRGB": chunk(b"sRGB", b"\x09"),
        "sRGB, other gAMA": chunk(b"sRGB", b"\0") + chunk(b"gAMA", struct.pack(">I", 100000)),
        "sRGB, gAMA, cHRM": chunk(b"sRGB", b"\0") + chunk(b"gAMA", struct.pack(">I", 45455))
        + chunk(b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)),
        "bad cHRM": chunk(b"cHRM", struct.pack(">8I", *range(8))),
        "short cHRM": chunk(b"cHRM", bytes(31)),
        "pHYs": chunk(b"pHYs", struct.pack(">IIB", 2835, 2835, 1)),
        "short pHYs": chunk(b"pHYs", bytes(8)),
        "pHYs twice": chunk(b"pHYs", struct.pack(">IIB", 2835, 2835, 1)) * 2,
        "tIME": chunk(b"tIME", struct.pack(">H5B", 2020, 2, 3, 4, 5, 6)),
        "bad tIME": chunk(b"tIME", bytes([0, 0, 77, 77, 77, 77, 77])),
        "bKGD": chunk(b"bKGD", bytes(6)),
        "short bKGD": chunk(b"bKGD", bytes(2)),
        "tEXt": chunk(b"tEXt", b"Title\0a title"),
        "tEXt of one word": chunk(b"tEXt", b"Title"),
        "tEXt without name": chunk(b"tEXt", b"\0title"),
        "tEXt, long name": chunk(b"tEXt", b"T" * 200 + b"\0title"),
        "tEXt exif": chunk(b"tEXt", b"exif\0" + exif([(0x112, 3, 1, 6)])),
        "iTXt": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta tiff:Orientation='6'/>"),
        "iTXt compressed": chunk(b"iTXt", b"Title\0\1\0\0\0" + zlib.compress(b"title")),
        "iTXt badly compressed": chunk(b"iTXt", b"Title\0\1\0\0\0" + b"title"),
        "iTXt of another method": chunk(b"iTXt", b"Title\0\1\7\0\0title"),
        "short iTXt": chunk(b"iTXt", b"Title\0\0"),
        "iTXt not of UTF-8": chunk(b"iTXt", b"Title\0\0\0\0\0\xff\xfe"),
        "zTXt": chunk(b"zTXt", b"Title\0\0" + zlib.compress(b"title")),
        "zTXt badly compressed": chunk(b"zTXt", b"Title\0\0title"),
        "zTXt of another method": chunk(b"zTXt", b"Title\0\7title"),
        "large zTXt": chunk(b"zTXt", b"Title\0\0" + zlib.compress(bytes(2 << 20))),
        "iCCP that is none": chunk(b"iCCP", b"p\0\0" + zlib.compress(b"not a profile")),
        "iCCP badly compressed": chunk(b"iCCP", b"p\0\0profile"),
        "iCCP with a bad tag": chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(bytes(PROFILE))),
        "iCCP of another method": chunk(b"iCCP", b"p\0\7profile"),
        "empty iCCP": chunk(b"iCCP"),
        "large iCCP": chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2 << 20))),
        "iCCP": chunk(b"iCCP", b"p\0\0" + zlib.compress(PROFILE[:128] + bytes(4))),
        "sBIT": chunk(b"sBIT", b"\5\6\5"),
        "sPLT": chunk(b"sPLT", b"p\0\x08" + bytes(12)),
        "bad sPLT": chunk(b"sPLT", b"p"),
        "hIST": chunk(b"hIST", bytes(4)),
        "oFFs": chunk(b"oFFs", bytes(9)),
        "sCAL": chunk(b"sCAL", b"\0011\0002"),
        "eXIf": chunk(b"eXIf", exif([(0x112, 3, 1, 6)])[6:]),
        "bad eXIf": chunk(b"eXIf", b"exif"),
        "private": chunk(b"prVt", b"private"),
        "unknown": chunk(b"unkn", b"unknown"),
        "critical": chunk(b"CRIT", b"critical"),
        "PLTE": palette,
        "PLTE of 7": chunk(b"PLTE", bytes(7)),
        "tRNS": chunk(b"tRNS", bytes(6)),
        "short tRNS": chunk(b"tRNS", bytes(2)),
        "acTL": chunk(b"acTL", struct.pack(">II", 2, 0)),
        "acTL of none": chunk(b"acTL", bytes(8)),
        "short acTL": chunk(b"acTL", bytes(4)),
        "fcTL": chunk(b"acTL", struct.pack(">II", 1, 0)) + frame(34),
        "fcTL outside": chunk(b"acTL", struct.pack(">II", 1, 0)) + frame(99),
        "bad checksum": chunk(b"tEXt", b"Title\0a title")[:-1] + b"\x77",
        "bad name": chunk(b"a\xffbc", b"abc"),
    }  # fmt: skip
    after = {
        "tEXt": before["tEXt"],
        "tIME": before["tIME"],
        "bad checksum": before["bad checksum"],
        "eXIf": before["eXIf"],
        "short gAMA": before["short gAMA"],
        "short pHYs": before["short pHYs"],
        "zTXt of another method": before["zTXt of another method"],
        "iCCP of another method": before["iCCP of another method"],
        "private": before["private"],
        "PLTE": palette,
        "IDAT": chunk(b"tIME", bytes(7)) + chunk(b"IDAT", b"more"),
        "fdAT": chunk(b"fdAT", bytes(9)),
        "fcTL": frame(34),
        "short fcTL": chunk(b"fcTL", bytes(9)),
        "cut chunk": chunk(b"tEXt", b"Title\0a title")[:-8],
        "large chunk": b"\x7f\xff\xff\xfftEXtabc",
    }
    files |= {f"before: {name}": png(2, 8, before=part) for name, part in before.items()}
    files |= {f"after: {name}": png(2, 8, after=part) for name, part in after.items()}
    size = (48, 56)
    stream = chunks(png(2, 8, size=size))
    raw = zlib.decompress(stream[1][1])
    line = len(raw) // 48
    filtered = b"".join(bytes([y % 5]) + raw[y * line + 1 : (y + 1) * line] for y in range(48))

    def of(data: bytes, *, idats: int = 1) -> bytes:
        step = -(-len(data) // idats)
        parts = [(b"IDAT", data[i : i + step]) for i in range(0, len(data), step)]
        return join_png([stream[0], *parts, stream[2]])

    files |= {
        "many IDATs": png(2, 8, pieces=30),
        "empty IDAT first": png(2, 8, before=chunk(b"IDAT")),
        "empty IDAT last": png(2, 8, after=chunk(b"IDAT")),
        "trailing data": plain + b"more",
        "two pictures": plain + plain,
        "no end": plain[:-12],
        "end with content": plain[:-12] + chunk(b"IEND", b"end"),
        "no pixels": join_png([stream[0], stream[2]]),
        "bad checksum of the pixels": plain[:-13] + bytes([plain[-13] ^ 1]) + plain[-12:],
        "bad checksum of the header": plain[:29] + bytes([plain[29] ^ 1]) + plain[30:],
        "bad checksum of the end": plain[:-1] + bytes([plain[-1] ^ 1]),
        "too few pixels": of(zlib.compress(raw[: len(raw) // 2])),
        "one byte too few": of(zlib.compress(raw[:-1])),
        "too many pixels": of(zlib.compress(raw + raw)),
        "data behind the pixels": of(zlib.compress(raw) + b"more"),
        "bad Adler sum": of(stream[1][1][:-1] + bytes([stream[1][1][-1] ^ 1])),
        "no Adler sum": of(stream[1][1][:-4]),
        "not deflated": of(b"\x78\x9c" + b"noise" * 30),
        "another header of zlib": of(b"\x78\x9d" + stream[1][1][2:]),
        "no compression": of(zlib.compress(raw, 0)),
        "unknown filter": of(zlib.compress(b"\x07" + raw[1:])),
        "small window": of(_small_window(raw)),
        "all filters": of(zlib.compress(filtered)),
        "palette of few": png(3, 8, before=few, colours_used=30),
        "palette, indices outside": png(3, 8, before=few),
        "palette behind a text": png(3, 8, before=before["tEXt"] + few + before["tIME"], colours_used=30),
        "palette too large": png(3, 2, before=few),
        "palette twice": png(3, 8, before=few + few),
        "palette behind tRNS": png(3, 8, before=chunk(b"tRNS", bytes(9)) + few, colours_used=30),
        "palette with long tRNS": png(3, 8, before=few + chunk(b"tRNS", bytes(31)), colours_used=30),
        "palette with one clear": png(3, 8, before=few + chunk(b"tRNS", b"\xff\xff\0\xff"), colours_used=30),
        "palette, all clear": png(3, 8, before=few + chunk(b"tRNS", bytes(30)), colours_used=30),
        "palette missing": png(3, 8),
        "palette with tRNS": png(3, 8, before=few + chunk(b"tRNS", bytes(range(30))), colours_used=30),
        "grey with tRNS": png(0, 8, before=chunk(b"tRNS", b"\0\x55")),
        "grey with PLTE": png(0, 8, before=palette),
        "bilevel with tRNS": png(0, 1, before=chunk(b"tRNS", b"\0\1")),
        "grey 16 with tRNS": png(0, 16, before=chunk(b"tRNS", b"\0\1")),
        "alpha with tRNS": png(6, 8, before=chunk(b"tRNS", bytes(6))),
        "1 x 1": png(2, 8, size=(1, 1)),
        "1 x 1, interlaced": png(6, 8, size=(1, 1), interlaced=True),
        "3 x 2, interlaced": png(0, 1, size=(3, 2), interlaced=True),
        "no width": MAGIC + chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 3, 8, 2, 0, 0, 0)) + plain[33:],
        "odd depth": MAGIC + chunk(b"IHDR", struct.pack(">IIBBBBB", 34, 21, 3, 2, 0, 0, 0)) + plain[33:],
        "odd colours": MAGIC + chunk(b"IHDR", struct.pack(">IIBBBBB", 34, 21, 8, 5, 0, 0, 0)) + plain[33:],
        "odd compression": MAGIC + chunk(b"IHDR", struct.pack(">IIBBBBB", 34, 21, 8, 2, 1, 0, 0)) + plain[33:],
        "odd filter": MAGIC + chunk(b"IHDR", struct.pack(">IIBBBBB", 34, 21, 8, 2, 0, 1, 0)) + plain[33:],
        "odd interlacing": MAGIC + chunk(b"IHDR", struct.pack(">IIBBBBB", 34, 21, 8, 2, 0, 0, 2)) + plain[33:],
        "long header": MAGIC + chunk(b"IHDR", struct.pack(">IIBBBBBB", 34, 21, 8, 2, 0, 0, 0, 0)) + plain[33:],
        "header twice": plain[:33] + plain[8:],
    }  # fmt: skip
    red, green = (Image.new("RGB", (34, 21), colour) for colour in ("red", "green"))
    for name, hidden in (("animated", False), ("animated, hidden default", True)):
        files[name] = encoded(
            red, "PNG", save_all=True, default_image=hidden, append_images=[green, red, green], duration=100
        )
    return files


def _small_window(data: bytes) -> bytes:
    """Deflated with a window of 512 bytes, and saying so."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, 9)
    return deflate.compress(data) + deflate.flush()


def others() -> dict[str, bytes]:
    """Files of the other formats, and of none."""
    picture = Image.fromarray(photograph(1, 43, 61))
    alpha = picture.convert("RGBA")
    files = {form: encoded(picture, form) for form in ("BMP", "TIFF", "PPM", "WEBP", "GIF", "ICO", "TGA")}
    files |= {f"TIFF {way}": encoded(picture, "TIFF", compression=way) for way in ("tiff_lzw", "jpeg", "packbits")}
    files |= {
        "PGM": encoded(picture.convert("L"), "PPM"),
        "PBM": encoded(picture.convert("1"), "PPM"),
        "BMP of palette": encoded(picture.quantize(16), "BMP"),
        "TIFF of 16 bits": encoded(Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30)), "TIFF"),
        "TIFF of floats": encoded(Image.fromarray(np.ones((9, 9), dtype=np.float32)), "TIFF"),
        "WEBP with alpha": encoded(alpha, "WEBP"),
        "WEBP lossless": encoded(picture, "WEBP", lossless=True),
        "WEBP animated": encoded(picture, "WEBP", save_all=True, append_images=[picture.rotate(90)]),
        "text": b"<!DOCTYPE html><html></html>",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "zeros": bytes(300),
    }
    return files


def every_kind() -> dict[str, bytes]:
    groups = {"jpeg": jpegs(), "png": pngs(), "other": others()}
    return {f"{group}, {name}": content for group, files in groups.items() for name, content in files.items()}
