"""Files of every kind: the loader gives the pixels that DataLoader and Pillow give, or both refuse; nobody prints."""

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import odd
import pytest
import torch
from fuzzing import pixels_at
from material import encoded, photograph
from numpy.typing import NDArray
from odd import chunk, exif, png, with_segment
from PIL import Image, PngImagePlugin
from torch.utils.data import DataLoader

from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, EvalCrop, QuarantineWarning, TrainCrop
from dali_diffusemix.errors import DecodeError
from dali_diffusemix.images.codec import decode, encode
from dali_diffusemix.images.reading import read
from dali_diffusemix.loading.decoder import PieceDecoder
from dali_diffusemix.loading.pieces import Pieces
from dali_diffusemix.plan import Crop

pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")

Windows = NDArray[np.int32]


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kinds")
    for name, content in odd.every_kind().items():
        group, rest = name.split(", ", 1)
        file = root / group / f"{rest.replace('/', '-')}.{ {'jpeg': 'jpg', 'png': 'png'}.get(group, 'bmp') }"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
    return root


@pytest.mark.parametrize("visible_parts", [True, False])
@pytest.mark.parametrize("crop", [EvalCrop(40, resize=40), TrainCrop(40)], ids=["eval", "train"])
def test_the_loader_gives_what_dataloader_gives(
    every_kind: Path, crop: Crop, visible_parts: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    dataset = DiffuseMixDataset(every_kind, crop=crop, normalize=None, seed=1)
    assert len(dataset) > 300
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuarantineWarning)
        loader = DiffuseMixLoader(
            dataset, batch_size=64, num_workers=4, device="cpu", visible_parts=visible_parts, return_index=True
        )
        with loader:
            found = [torch.cat(part) for part in zip(*loader, strict=True)]
        expected = [torch.cat(part) for part in zip(*DataLoader(dataset, batch_size=64), strict=True)]
    for i, sample in enumerate(dataset.samples):
        assert torch.equal(found[0][i], expected[0][i]), sample
    assert torch.equal(found[1], expected[1])
    # Listing may refuse a file with a log message; decoding prints nothing.
    printed = capfd.readouterr()
    assert printed.err == "" and printed.out == ""


def decoded(tmp_path: Path, content: bytes, windows: Windows) -> tuple[list[NDArray[np.uint8]], bool]:
    """Windows of one file by the decoder that the loader has, and whether DALI was given them."""
    (tmp_path / "file").write_bytes(content)
    count, size = len(windows), np.array(decode(content).shape[:2], dtype=np.int32)
    locations = [os.fsencode(tmp_path / "file")] * count
    sizes = np.tile(size, (count, 1))
    decoder = PieceDecoder(count, threads=2)
    windows = np.stack([windows, np.zeros_like(windows)])
    decoder.submit(lambda: Pieces.of([*locations, *[None] * count], windows, np.stack([sizes, sizes])))
    pieces = decoder.fetch()
    assert not pieces.errors
    shown = pieces.table[0]
    found = [pixels_at(int(piece["data"]), (int(piece["height"]), int(piece["width"]), 3)).copy() for piece in shown]
    decoder.close()
    return found, bool(read(locations[:1], windows[0, :1], sizes[:1]).safe[0])


def check(tmp_path: Path, content: bytes, windows: Windows | None = None, *, by_dali: bool | None = None) -> None:
    whole = decode(content)
    windows = np.array([(0, 0, *whole.shape[:2])], dtype=np.int32) if windows is None else windows
    found, sound = decoded(tmp_path, content, windows)
    for pixels, (top, left, bottom, right) in zip(found, windows.tolist(), strict=True):
        np.testing.assert_array_equal(pixels, whole[top:bottom, left:right])
    assert by_dali is None or sound == by_dali


PICTURE = Image.fromarray(photograph(1, 41, 53))


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("kind", ["sequential", "progressive", "turned", "restart", "high"])
def test_narrow_windows(tmp_path: Path, kind: str, subsampling: int) -> None:
    """One to three columns or rows, at every place: DALI does not interpolate the chroma of a single column."""
    y, cb, cr = (np.asarray(plane) for plane in PICTURE.convert("YCbCr").split())
    content = {
        "sequential": encoded(PICTURE, subsampling=subsampling),
        "progressive": encoded(PICTURE, subsampling=subsampling, progressive=True),
        "turned": with_segment(encoded(PICTURE, subsampling=subsampling), 0xE1, exif([(0x112, 3, 1, 6)])),
        "restart": encoded(PICTURE, subsampling=subsampling, restart_marker_blocks=1),
        "high": odd.jpeg([y, cb, cr], [(1, 2), (1, 1), (1, 1)]),
    }[kind]
    height, width = decode(content).shape[:2]
    windows = [(0, x, height, x + n) for n in (1, 2, 3) for x in range(width - n + 1)]
    windows += [(y, 3, y + n, width - 2) for n in (1, 2, 3) for y in range(height - n + 1)]
    check(tmp_path, content, np.array(windows, dtype=np.int32))


def test_a_last_tile_of_a_few_columns(tmp_path: Path) -> None:
    """Cut alone, its chroma would be two samples wide, which decoders do not interpolate."""
    for width in range(65, 72):
        content = encode(photograph(0, 40, width), 90)
        windows = [(0, x, 40, width) for x in range(56, width)] + [(0, x, 40, x + 2) for x in range(50, width - 1)]
        check(tmp_path, content, np.array(windows, dtype=np.int32))


@pytest.mark.parametrize("sampling", [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_the_jpegs_made_here_are_pictures(sampling: tuple[int, int]) -> None:
    y, cb, cr = (np.asarray(plane) for plane in PICTURE.convert("YCbCr").split())
    for interleaved in (True, False):
        content = odd.jpeg([y, cb, cr], [sampling, (1, 1), (1, 1)], interleaved=interleaved)
        assert np.abs(decode(content).astype(int) - np.asarray(PICTURE)).mean() < 16


SOUND = """
jpeg: plain; grey; progressive; 444; 422; 420; 420 turned 6; 444 turned 3; restart blocks 420; restart rows 444; best
jpeg: worst; comment; profile; dpi; no JFIF; trailing data; XMP; MPF; Photoshop; Adobe 1; JFIF and Adobe 1; extended
jpeg: XMP behind the frame; comment behind the frame
jpeg: sampling (1, 2); EXIF none; component ids 0 1 2; size 1 x 1; grey Adobe 1; optimised; bytes before the end
png: 0 of 1; 0 of 8; 0 of 16; 2 of 8; 4 of 8; 6 of 8; 6 of 8, interlaced; before: gAMA; before: sRGB, gAMA, cHRM
png: before: pHYs; before: tEXt; before: iTXt; before: tIME; after: tEXt; many IDATs; before: iCCP with a bad tag
png: before: bad cHRM; before: sBIT; 3 of 1; 3 of 2; 3 of 4, interlaced; palette of few; palette, indices outside
png: palette with tRNS; grey with tRNS; bilevel with tRNS; before: PLTE; before: tRNS"""
UNSOUND = """
jpeg: cmyk; cmyk with black; cmyk without Adobe; YCCK; rgb; component ids RGB; Adobe 0; Adobe 2; JFIF 2; FF 00 segment
jpeg: fill bytes; bytes between segments; RST in the header; unknown marker; Ss = Se = 0; no end; two EXIFs; 12 bits
jpeg: arithmetic; lossless; no codes; no quantisation; not interleaved; restart interval, no markers; second frame
jpeg: EXIF value outside; EXIF value outside first; EXIF long; EXIF twice; EXIF resolution in place; EXIF 0; EXIF 9
jpeg: progressive, 5 scans; progressive, without scan 8; progressive, scan 1 twice; short Photoshop; short profile
jpeg: EXIF behind the frame; Adobe behind the frame; JFIF behind the frame; height unknown; markers, no restart interval
png: 2 of 16; 4 of 16; 6 of 16; palette missing; grey with PLTE; alpha with tRNS; before: short tRNS
png: before: acTL; before: fcTL; animated; animated, hidden default
png: before: iCCP badly compressed; before: zTXt; before: bad checksum; after: bad checksum; after: fcTL; trailing data
png: before: tEXt exif; before: eXIf; after: eXIf; before: critical; before: short gAMA; before: private; no end
png: before: large iCCP; before: iCCP of another method; before: empty iCCP"""


@pytest.mark.parametrize(("text", "expected"), [(SOUND, True), (UNSOUND, False)], ids=["sound", "unsound"])
def test_what_dali_is_given(tmp_path: Path, text: str, expected: bool) -> None:
    kinds = odd.every_kind()
    groups = [line.split(": ", 1) for line in text.split("\n")[1:]]
    names = [f"{group}, {name}" for group, rest in groups for name in rest.split("; ")]
    for i, name in enumerate(names):
        (tmp_path / str(i)).write_bytes(kinds[name])
    places = [os.fsencode(tmp_path / str(i)) for i in range(len(names))]
    sound = read(places, np.zeros((len(names), 4), dtype=np.int32)).safe
    assert [name for name, is_sound in zip(names, sound, strict=True) if is_sound != expected] == []


# --- kinds that went wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("first", [True, False])
def test_orientation_beside_a_broken_value(tmp_path: Path, turn: int, first: bool) -> None:
    """Pillow keeps the orientation that it read before the value that is not there."""
    entries = [(0x112, 3, 1, turn), (0x131, 2, 40, 5000)]
    content = with_segment(encoded(PICTURE), 0xE1, exif(entries if first else entries[::-1]))
    if first:
        assert decode(content).shape == ((41, 53, 3) if turn < 5 else (53, 41, 3))
    check(tmp_path, content)


def test_the_hidden_picture_of_an_animation(tmp_path: Path) -> None:
    red, green = (Image.new("RGB", (64, 48), colour) for colour in ("red", "green"))
    content = encoded(red, "PNG", save_all=True, default_image=True, append_images=[green, red], duration=100)
    assert decode(content)[0, 0].tolist() == [255, 0, 0]
    check(tmp_path, content, by_dali=False)


def test_colours_of_16_bits_and_real_black(tmp_path: Path) -> None:
    for colours in (2, 4, 6):
        check(tmp_path, png(colours, 16, size=(64, 64)), by_dali=False)
    cmy = 255 - np.asarray(PICTURE)
    black = cmy.min(axis=2)
    ink = np.dstack([cmy - black[..., None], black])
    check(tmp_path, encoded(Image.fromarray(ink, "CMYK"), quality=90), by_dali=False)


def test_grey_of_16_bits(tmp_path: Path) -> None:
    """Every value there is."""
    values = np.arange(65536, dtype=">u2").reshape(256, 256)
    head = struct.pack(">IIBBBBB", 256, 256, 16, 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    content = odd.MAGIC + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND")
    check(tmp_path, content, by_dali=True)


def test_of_a_png_dali_gets_the_pixels_alone(tmp_path: Path) -> None:
    """libpng prints about the rest."""
    kinds = odd.pngs()
    names = ["before: iCCP with a bad tag", "before: sRGB, gAMA, cHRM", "before: iTXt", "after: tEXt", "many IDATs"]
    names += ["palette with tRNS", "palette behind a text", "before: PLTE", "before: tRNS"]
    for i, name in enumerate(names):
        (tmp_path / str(i)).write_bytes(kinds[name])
    batch = read([os.fsencode(tmp_path / str(i)) for i in range(len(names))], np.zeros((len(names), 4), dtype=np.int32))
    assert batch.safe.all()
    for name, image in zip(names, batch.images, strict=True):
        assert image is not None
        parts = odd.chunks(image.tobytes())
        kept = (b"IHDR", b"IDAT", b"IEND", *((b"PLTE",) if "palette" in name else ()))
        assert parts == [part for part in odd.chunks(kinds[name]) if part[0] in kept]
        check(tmp_path, kinds[name], by_dali=True)


@pytest.mark.parametrize("level", [0, 1, 9])
@pytest.mark.parametrize("strategy", [zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE, zlib.Z_FIXED])
def test_how_long_a_profile_is_when_inflated(tmp_path: Path, level: int, strategy: int) -> None:
    """Pillow refuses one of more than a MiB."""
    draw = np.random.default_rng(level)
    contents = [b"", b"a", draw.bytes(3000), bytes(3000), draw.integers(0, 3, 9000, dtype=np.uint8).tobytes()]
    contents += [bytes(1 << 20), bytes((1 << 20) + 1), (draw.bytes(500) * 2200)[: 1 << 20], draw.bytes(500) * 2200]
    for i, content in enumerate(contents):
        deflate = zlib.compressobj(level, strategy=strategy)
        stream = deflate.compress(content) + deflate.flush()
        (tmp_path / str(i)).write_bytes(png(2, 8, before=chunk(b"iCCP", b"p\0\0" + stream)))
    places = [os.fsencode(tmp_path / str(i)) for i in range(len(contents))]
    sound = read(places, np.zeros((len(places), 4), dtype=np.int32)).safe
    assert sound.tolist() == [len(content) <= 1 << 20 for content in contents]


def test_cmyk_without_adobe(tmp_path: Path) -> None:
    content = odd.without(encoded(PICTURE.convert("CMYK")), 0xEE)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_array_equal(decode(content), expected)
    check(tmp_path, content, by_dali=False)


def test_a_chunk_damaged_behind_the_pixels_is_refused_by_both(tmp_path: Path) -> None:
    for part in (chunk(b"gAMA", bytes(3)), chunk(b"zTXt", b"a\0\7text"), chunk(b"fdAT", bytes(9))):
        content = png(2, 8, after=part)
        with pytest.raises(DecodeError):
            decode(content)
        (tmp_path / "file").write_bytes(content)
        assert not read([os.fsencode(tmp_path / "file")], np.zeros((1, 4), dtype=np.int32)).safe[0]


def test_a_jpeg_cut_short_is_refused_whatever_is_seen_of_it(tmp_path: Path) -> None:
    """Its first tiles are all there, but Pillow refuses the file."""
    content = encode(photograph(0, 200, 256), 90)
    (tmp_path / "file").write_bytes(content[:-100])
    batch = read([os.fsencode(tmp_path / "file")], np.array([(0, 0, 10, 10)], dtype=np.int32))
    assert not batch.safe[0]
    with pytest.raises(DecodeError):
        decode(content[:-100])


# What is printed for files of a kind, and whether a process survives them, another process must show.
SCRIPT = """
import sys
from pathlib import Path
from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, EvalCrop
for folder in sorted(Path(sys.argv[1]).iterdir()):
    print(folder.name, flush=True)
    dataset = DiffuseMixDataset(folder, crop=EvalCrop(32), seed=0)
    loader = DiffuseMixLoader(dataset, batch_size=64, shuffle=True, num_workers=4, device="cpu")
    for epoch in range(3):
        count = sum(len(images) for images, labels in loader)
        assert count == len(dataset) == 96, count
    assert not loader.quarantine, loader.quarantine
    loader.close()
"""


def damaged_codes(content: bytes, i: int) -> bytes:
    changed = bytearray(content)
    begin = content.rindex(b"\xff\xda") + 20
    for at in np.random.default_rng(i).integers(begin, len(content) - 2, 6).tolist():
        if changed[at] != 0xFF and changed[at - 1] != 0xFF:
            changed[at] ^= 0x15 if changed[at] ^ 0x15 != 0xFF else 0x14
    return bytes(changed)


@pytest.mark.slow
def test_it_lives_and_prints_nothing(tmp_path: Path) -> None:
    kinds = odd.every_kind()
    repeated = {
        name: [kinds[name]] * 96
        for name in (
            "jpeg, Ss = Se = 0",
            "jpeg, bytes between segments",
            "jpeg, bytes before the end",
            "png, before: iCCP with a bad tag",
            "png, before: zTXt badly compressed",
            "png, animated",
            "png, too many pixels",
            "other, TIFF tiff_lzw",
        )
    }
    pictures = [Image.fromarray(photograph(i, 40, 56)) for i in range(96)]
    plain = [encoded(picture) for picture in pictures]
    folders = {
        **repeated,
        "one in eight with FF 00": [kinds["jpeg, FF 00 segment"] if i % 8 == 0 else one for i, one in enumerate(plain)],
        "damaged": [damaged_codes(one, i) for i, one in enumerate(plain)],
        "damaged, progressive": [damaged_codes(encoded(p, progressive=True), i) for i, p in enumerate(pictures)],
        "damaged, restart": [damaged_codes(encoded(p, restart_marker_blocks=2), i) for i, p in enumerate(pictures)],
    }
    for name, contents in folders.items():
        folder = tmp_path / "kinds" / name.replace(":", "") / "a"
        folder.mkdir(parents=True)
        for i, content in enumerate(contents):
            (folder / f"{i:02}.{'png' if content[1:4] == b'PNG' else 'jpg'}").write_bytes(content)
    environment = {**os.environ, "DALI_DIFFUSEMIX_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "kinds")]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
    assert len(ended.stdout.splitlines()) == len(folders)


@pytest.mark.parametrize(
    "keyword", ["Title", "exif", "interlace", "bbox", "transparency", "gamma", "dpi", "icc_profile"]
)
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P"])
def test_texts_under_names_of_pillows(tmp_path: Path, keyword: str, mode: str) -> None:
    """Pillow keeps texts where it keeps what it knows of the picture: both ways show the same, or both refuse."""
    info = PngImagePlugin.PngInfo()
    info.add_text(keyword, "1")
    picture = Image.fromarray(photograph(3, 11, 13)).convert(mode)
    (tmp_path / "train" / "a").mkdir(parents=True)
    for name, texts in (("0.png", None), ("1.png", info)):
        (tmp_path / "train" / "a" / name).write_bytes(encoded(picture, "PNG", pnginfo=texts))
    dataset = DiffuseMixDataset(tmp_path / "train", crop=EvalCrop(8, resize=8), normalize=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = DiffuseMixLoader(dataset, 2, device="cpu")
        (images, _), (expected, _) = next(iter(loader)), next(iter(DataLoader(dataset, batch_size=2)))
    assert torch.equal(images, expected)
    assert set(loader.quarantine) == set(dataset.quarantine)
