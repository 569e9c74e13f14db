"""Tiling: restart markers into a JPEG without loss, so that what is seen can be cut out of it."""

import io
import subprocess
from pathlib import Path
from shutil import which

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from material import encoded, photograph, shared
from PIL import Image

from dali_diffusemix.base import native
from dali_diffusemix.images.codec import decode, tile
from dali_diffusemix.images.reading import Extent, OpenFile, read

pytestmark = pytest.mark.skipif(native.library() is None, reason="the library was not built")


def tables(content: bytes) -> list[list[int]]:
    with Image.open(io.BytesIO(content)) as image:
        return [list(table) for table in image.quantization.values()]  # type: ignore[attr-defined]


@settings(deadline=None, max_examples=300)
@given(
    height=st.integers(1, 140),
    width=st.integers(1, 300),
    seed=st.integers(0, 99),
    subsampling=st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
    grey=st.booleans(),
    quality=st.integers(1, 100),
    optimize=st.booleans(),
    markers=st.sampled_from(
        [{}, {"restart_marker_blocks": 1}, {"restart_marker_blocks": 3}, {"restart_marker_rows": 1}]
    ),
)
def test_no_pixel_changes(
    height: int,
    width: int,
    seed: int,
    subsampling: str,
    grey: bool,
    quality: int,
    optimize: bool,
    markers: dict[str, int],
) -> None:
    picture = Image.fromarray(photograph(seed, height, width)).convert("L" if grey else "RGB")
    content = encoded(picture, quality=quality, subsampling=subsampling, optimize=optimize, **markers)
    tiled = tile(content)
    assert tiled is not None
    np.testing.assert_array_equal(decode(tiled), decode(content))
    assert tables(tiled) == tables(content)
    assert tile(tiled) == tiled  # nothing is left to do


def test_a_real_photograph_is_tiled_and_cut(tmp_path: Path) -> None:
    """As most of ImageNet is: colours not subsampled, so an MCU is 8 pixels, and tiles are 8 pixels high."""
    done = 0
    for file in sorted(shared("imagenet_sample").glob("*/*"))[:40]:
        content = file.read_bytes()
        tiled = tile(content)
        assert tiled is not None and len(tiled) < 1.15 * len(content)
        pixels = decode(content)
        np.testing.assert_array_equal(decode(tiled), pixels)
        height, width = pixels.shape[:2]
        (tmp_path / "tiled").write_bytes(tiled)
        window = np.array([[height // 3, width // 3, height // 3 + 40, width // 3 + 50]], dtype=np.int32)
        batch = read([Extent(OpenFile(tmp_path / "tiled"), 0, len(tiled))], window)
        (image,), ((top, left, bottom, right),) = batch.images, batch.windows.tolist()
        assert image is not None
        np.testing.assert_array_equal(
            decode(image)[top:bottom, left:right], pixels[window[0, 0] : window[0, 2], window[0, 1] : window[0, 3]]
        )
        done += len(image) < len(tiled) / 2
    assert done > 30


@pytest.mark.skipif(which("jpegtran") is None, reason="jpegtran, of libjpeg-turbo-progs, is not here")
def test_the_entropy_coded_data_is_jpegtrans(tmp_path: Path) -> None:
    for seed, width in ((0, 256), (1, 400), (2, 97)):
        content = encoded(photograph(seed, 120, width), quality=90, subsampling="4:2:0")
        (tmp_path / "in.jpg").write_bytes(content)
        units = -(-width // 16)
        blocks = max(n for n in range(1, 5) if units % n == 0)
        done = subprocess.run(
            ["jpegtran", "-restart", f"{blocks}B", "-copy", "none", str(tmp_path / "in.jpg")],
            capture_output=True,
            check=True,
        )
        tiled = tile(content)
        assert tiled is not None
        scan = b"\xff\xda"
        assert tiled[tiled.rindex(scan) :] == done.stdout[done.stdout.rindex(scan) :]


@pytest.mark.parametrize("kind", ["progressive", "png", "turned", "cmyk", "nothing", "cut"])
def test_what_cannot_be_tiled(kind: str) -> None:
    picture = Image.fromarray(photograph(1, 90, 120))
    exif = Image.Exif()
    exif[0x0112] = 6
    content = {
        "progressive": lambda: encoded(picture, progressive=True),
        "png": lambda: encoded(picture, "PNG"),
        "turned": lambda: encoded(picture, exif=exif),
        "cmyk": lambda: encoded(picture.convert("CMYK")),
        "nothing": lambda: b"",
        "cut": lambda: encoded(picture)[:2000],
    }[kind]()
    assert tile(content) is None


def test_damaged_files_never_make_it_crash() -> None:
    generator = np.random.default_rng(0)
    contents = [
        np.frombuffer(encoded(photograph(i, 90, 130), subsampling=s, optimize=o), dtype=np.uint8)
        for i, (s, o) in enumerate((s, o) for s in ("4:4:4", "4:2:0") for o in (False, True))
    ]
    tiled = 0
    for i in range(4000):
        damaged = contents[i % 4].copy()
        header = damaged.tobytes().index(b"\xff\xda") + 14
        where = generator.integers(0, header if i % 8 < 4 else len(damaged), generator.integers(1, 5))
        damaged[where] = generator.integers(0, 256, len(where))
        if i % 3 == 0:
            damaged = damaged[: generator.integers(2, len(damaged))]
        tiled += native.tile_jpeg(damaged.tobytes(), 64) is not None
    assert tiled < 4000
