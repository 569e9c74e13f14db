"""Fractal flames are functions of (seed, index, size); banks are whole or refused."""

import contextlib
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from dali_diffusemix.base import native
from dali_diffusemix.errors import ConfigError, StoreError
from dali_diffusemix.fractals import FractalBank, bank_from_folder, render, render_bank
from dali_diffusemix.fractals import bank as bank_room
from dali_diffusemix.fractals import flame as flame_room

PHOTOS = Path(__file__).parents[2] / "shared" / "data"

needs_library = pytest.mark.skipif(native.library() is None, reason="the C++ library was not built")


def play(
    flame: flame_room._Flame, *, threads: int = 1, numpy: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.uint32]]:
    """Return where the points are after 12 steps, and the 62 x 62 histogram of steps 4 to 11."""
    points = flame_room._start(flame)
    frame = np.array([-1, -1, 30, 30], np.float32)
    histogram = np.zeros((64, 64, 4), np.uint32)
    with np.errstate(all="ignore"):
        for first, steps, target in ((0, 4, None), (4, 8, histogram)):
            if numpy:
                flame_room._play_numpy(flame, points, first, steps, frame, target)
            else:
                flame_room._play(flame, points, first, steps, frame, target, threads)
    return points, histogram


# ---------------------------------------------------------------- flames


@needs_library
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), index=st.integers(0, 2**32 - 1), threads=st.integers(1, 20))
def test_the_library_plays_as_numpy_does_bit_for_bit_on_any_number_of_threads(
    seed: int, index: int, threads: int
) -> None:
    flame = flame_room._draw_flame(seed, index, 0)
    points, histogram = play(flame, threads=threads)
    expected_points, expected_histogram = play(flame, numpy=True)
    np.testing.assert_array_equal(points, expected_points)
    np.testing.assert_array_equal(histogram, expected_histogram)


@needs_library
@pytest.mark.parametrize("variation", range(len(flame_room._VARIATIONS)), ids=flame_room._VARIATIONS)
def test_every_variation_is_the_same_in_both(variation: int) -> None:
    flame = flame_room._draw_flame(1, variation, 0)
    maps = flame.maps.copy()
    maps[:, flame_room._WEIGHTS :] = 0
    maps[:, flame_room._WEIGHTS + variation] = 1
    flame = dataclasses.replace(flame, maps=maps)
    points, histogram = play(flame)
    expected_points, expected_histogram = play(flame, numpy=True)
    np.testing.assert_array_equal(points, expected_points)
    np.testing.assert_array_equal(histogram, expected_histogram)


def test_every_sample_is_counted_once() -> None:
    _, histogram = play(flame_room._draw_flame(0, 0, 0))
    assert histogram[..., 0].sum() == 8 * flame_room._POINTS
    assert (histogram[..., 1:] <= 255 * histogram[..., :1].astype(np.int64)).all()


@pytest.mark.parametrize("name", flame_room._VARIATIONS)
def test_variations_stay_finite_on_ordinary_points(name: str) -> None:
    x, y = np.random.default_rng(0).normal(0, 2, (2, 1000)).astype(np.float32)
    for values in flame_room._variation(name, x, y, np.arange(1000, dtype=np.uint32)):
        assert values.dtype == np.float32
        assert np.isfinite(values).all()


def test_the_polynomials_are_the_functions() -> None:
    t = np.linspace(-40, 40, 100_001, dtype=np.float32)
    np.testing.assert_allclose(flame_room._sin_turns(t), np.sin(2 * np.pi * t.astype(float)), atol=1e-5)
    x, y = np.random.default_rng(0).normal(0, 1, (2, 10_000)).astype(np.float32)
    expected = np.arctan2(x.astype(float), y) / (2 * np.pi)
    np.testing.assert_allclose(flame_room._angle_turns(x, y), expected, atol=1e-5)


def test_a_fractal_depends_on_seed_index_and_size_only() -> None:
    first = render(3, size=48, seed=7, threads=1)
    assert first.shape == (48, 48, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, render(3, size=48, seed=7, threads=3))
    np.testing.assert_array_equal(first, render(3, size=48, seed=7))
    for other in (render(4, size=48, seed=7), render(3, size=48, seed=8)):
        assert np.abs(first.astype(int) - other).mean() > 10


def test_numpy_alone_renders_the_same_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = render(1, size=32)
    monkeypatch.setattr(native, "library", lambda: None)
    np.testing.assert_array_equal(render(1, size=32), expected)


def test_a_fractal_is_the_same_motif_at_every_size() -> None:
    small, large = render(5, size=64), render(5, size=128)
    halved = large.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(halved - small).mean() < 10


def test_fractals_fill_their_frame_and_differ() -> None:
    pictures = np.stack([render(index, size=64, seed=11) for index in range(12)]).astype(float)
    luma = pictures @ [0.299, 0.587, 0.114]
    assert ((luma.mean(axis=(1, 2)) > 45) & (luma.mean(axis=(1, 2)) < 170)).all()
    assert (luma.std(axis=(1, 2)) > 15).all()
    assert (pictures.max(axis=-1) < 16).mean(axis=(1, 2)).max() < 0.25  # nearly black pixels
    distance = np.abs(pictures[:, None] - pictures).mean(axis=(2, 3, 4))
    assert distance[~np.eye(12, dtype=bool)].min() > 15


def picture_and_cover() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return a preview that breaks no rule."""
    rng = np.random.default_rng(0)
    return rng.uniform(0, 1, (64, 64, 3)).astype(np.float32), np.full((64, 64), 0.5, np.float32)


def test_dull_previews_are_refused_by_name() -> None:
    picture, cover = picture_and_cover()
    assert flame_room._flaw(picture, cover) is None
    half = cover.copy()
    half[:32] = 0
    smooth = np.broadcast_to(np.linspace(0, 1, 64, dtype=np.float32)[:, None, None], (64, 64, 3))
    grey = np.broadcast_to(picture[..., :1], picture.shape)
    stripes = np.where(np.arange(64)[:, None, None] // 2 % 2, picture * 0 + 0.9, 0.1).astype(np.float32)
    for dull, covered, flaw in (
        (picture, half, "empty"),
        (picture * 0.1, cover, "too dark"),
        (1 - picture * 0.1, cover, "too dark or too bright"),
        (smooth, cover, "flat"),
        (stripes, cover, "poor"),
        (grey, cover, "monochrome"),
    ):
        found = flame_room._flaw(dull, covered)
        assert found is not None
        assert found.startswith(flaw)


def test_a_refused_attempt_is_drawn_again_with_another_number(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[int] = []
    draw, judge = flame_room._draw_flame, flame_room._flaw

    def recorded(seed: int, index: int, attempt: int) -> flame_room._Flame:
        attempts.append(attempt)
        return draw(seed, index, attempt)

    monkeypatch.setattr(flame_room, "_draw_flame", recorded)
    monkeypatch.setattr(
        flame_room, "_flaw", lambda picture, cover: "refused" if len(attempts) < 3 else judge(picture, cover)
    )
    render(0, size=16)
    assert attempts == list(range(len(attempts)))
    assert len(attempts) >= 3


@pytest.mark.parametrize("spread", [(0, 0), (1, 0), (0, 1), (1e3, 1e3), (np.nan, 1)])
def test_collapsed_and_scattered_points_have_no_frame(spread: tuple[float, float]) -> None:
    points = np.random.default_rng(0).uniform(-1, 1, (4, 3, 1024)).astype(np.float32)
    points[:, :2] *= np.array(spread, np.float32)[:, None]
    assert flame_room._frame(points) is None


@pytest.mark.parametrize(
    ("argument", "value"),
    [("index", -1), ("index", 2**32), ("size", 15), ("size", 1025), ("seed", -1), ("seed", 2**32), ("threads", 0)],
)
def test_render_refuses_what_is_out_of_range(argument: str, value: int) -> None:
    arguments = {"index": 0, argument: value}
    with pytest.raises(ConfigError, match=rf"{argument} must lie in .*, found {value}"):
        render(**arguments)


# ---------------------------------------------------------------- banks


def test_a_bank_holds_its_fractals_in_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "fractals.npy"
    seen: list[tuple[int, int]] = []
    bank = render_bank(path, count=3, size=16, seed=5, threads=2, progress=lambda *done: seen.append(done))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert len(bank) == 3
    assert bank.shape == (3, 16, 16, 3)
    assert bank.path == path
    assert not bank.images.flags.writeable
    np.testing.assert_array_equal(bank.images, [render(index, size=16, seed=5) for index in range(3)])
    assert [f.name for f in path.parent.iterdir()] == ["fractals.npy"]
    np.testing.assert_array_equal(np.load(path, allow_pickle=False), bank.images)


def test_an_existing_bank_is_kept_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "fractals.npy"
    path.write_bytes(b"precious")
    with pytest.raises(StoreError, match="must not exist"):
        render_bank(path, count=1, size=16)
    assert path.read_bytes() == b"precious"
    assert len(render_bank(path, count=1, size=16, overwrite=True)) == 1


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_interrupted_bank_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    def stop(done: int, total: int) -> None:
        raise failure

    with pytest.raises(failure):
        render_bank(tmp_path / "fractals.npy", count=20, size=16, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with (
        pytest.raises(StoreError, match="No space left"),
        bank_room._writing(Path("bank")),
        Path("/dev/full").open("wb") as file,
    ):
        file.write(b"x")
        file.flush()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file/fractals\.npy: must be writable"):
        render_bank(tmp_path / "file" / "fractals.npy", count=1, size=16)


@pytest.mark.parametrize(("argument", "value"), [("count", 0), ("size", 8), ("seed", -1), ("threads", 0)])
def test_a_bank_refuses_what_is_out_of_range(tmp_path: Path, argument: str, value: int) -> None:
    arguments: dict[str, Any] = {argument: value}
    with pytest.raises(ConfigError, match=argument):
        render_bank(tmp_path / "fractals.npy", **arguments)
    assert list(tmp_path.iterdir()) == []


GOOD = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)


@pytest.mark.parametrize("from_file", [True, False])
def test_a_bank_is_the_same_after_pickling(tmp_path: Path, from_file: bool) -> None:
    np.save(tmp_path / "bank.npy", GOOD)
    bank = FractalBank.open(tmp_path / "bank.npy") if from_file else FractalBank(GOOD)
    pickled = pickle.dumps(bank)
    again = pickle.loads(pickled)
    assert again.path == bank.path
    np.testing.assert_array_equal(again.images, GOOD)
    assert (GOOD.tobytes() in pickled) != from_file
    assert GOOD.flags.writeable


BAD = {
    "three axes": GOOD[0],
    "grey": GOOD[..., :1],
    "float": GOOD.astype(np.float32),
    "signed": GOOD.astype(np.int8),
    "empty": GOOD[:0],
    "Fortran order": np.asfortranarray(GOOD),
    "objects": GOOD.astype(object),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_a_bank_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bank.npy"
    np.save(path, BAD[name])
    with pytest.raises(StoreError, match=r"bank\.npy: must .* found.*`dali-diffusemix fractals"):
        FractalBank.open(path)
    with pytest.raises(ConfigError, match=r"images must be .* found"):
        FractalBank(BAD[name])


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    for name, content in (("missing", None), ("text", b"not an array"), ("nothing", b"")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(StoreError, match=rf"{name}: must be a readable \.npy file") as caught:
            FractalBank.open(tmp_path / name)
        # The command that is advised must be one that works.
        assert str(caught.value).endswith(" --overwrite`.") == (content is not None)
    np.savez(tmp_path / "archive.npz", GOOD)
    for name in ("archive.npz", "."):
        with pytest.raises(StoreError):
            FractalBank.open(tmp_path / name)


def test_a_damaged_file_is_refused_or_still_a_bank(tmp_path: Path) -> None:
    path = tmp_path / "bank.npy"
    np.save(path, GOOD)
    whole = path.read_bytes()

    @settings(deadline=None, max_examples=200)
    @given(place=st.integers(0, 127), value=st.integers(0, 255), length=st.integers(0, len(whole)))
    def check(place: int, value: int, length: int) -> None:
        path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
        with contextlib.suppress(StoreError):
            assert FractalBank.open(path).images.dtype == np.uint8
        if length < len(whole):
            path.write_bytes(whole[:length])
            with pytest.raises(StoreError):
                FractalBank.open(path)

    check()


# ---------------------------------------------------------------- folders


def test_a_folder_becomes_a_bank_without_its_broken_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = 200  # the central square
    Image.fromarray(wide).save(folder / "b.png")
    Image.new("RGBA", (30, 30), (10, 20, 30, 128)).save(folder / "deep" / "c.png")
    Image.new("L", (20, 50), 77).save(folder / "a.png")
    (folder / "broken.png").write_bytes((folder / "b.png").read_bytes()[:60])
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden").write_text("not looked at")

    seen: list[tuple[int, int]] = []
    bank, unreadable = bank_from_folder(
        tmp_path / "bank.npy", folder, size=16, progress=lambda *done: seen.append(done)
    )
    assert seen[-1] == (5, 5)
    assert [path.name for path, _ in unreadable] == ["broken.png", "notes.txt"]
    assert all(reason for _, reason in unreadable)
    assert "broken.png" in caplog.text
    assert bank.shape == (3, 16, 16, 3)
    assert bank.images[:, 8, 8].tolist() == [[77] * 3, [200] * 3, [10, 20, 30]]
    assert bank.images[1].min() > 150  # but for LANCZOS at the edges


@pytest.mark.parametrize("content", [None, b"broken"])
def test_a_folder_without_images_is_refused(tmp_path: Path, content: bytes | None) -> None:
    folder = tmp_path / "images"
    if content is not None:
        folder.mkdir()
        (folder / "a.jpg").write_bytes(content)
    with pytest.raises(StoreError, match="at least one image"):
        bank_from_folder(tmp_path / "bank.npy", folder)
    assert not (tmp_path / "bank.npy").exists()


@pytest.mark.skipif(not PHOTOS.exists(), reason=f"{PHOTOS} holds no photographs")
def test_photographs_become_a_bank(tmp_path: Path) -> None:
    folder = PHOTOS / "ants_bees" / "val"
    bank, unreadable = bank_from_folder(tmp_path / "bank.npy", folder, size=32)
    assert len(bank) + len(unreadable) == sum(f.is_file() for f in folder.rglob("*") if f.name[0] != ".")
    assert len(bank) > 100
