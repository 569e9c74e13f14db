"""quality: useless edits are told from good ones, and the two mistakes of the released filter are not made."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from material import photograph
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from dali_diffusemix.errors import ConfigError, DataError
from dali_diffusemix.generate.editors import PROMPTS, EditTask
from dali_diffusemix.generate.editors.procedural import ProceduralEditor
from dali_diffusemix.generate.quality import Thresholds, judge
from dali_diffusemix.store import REJECTIONS

Picture = NDArray[np.uint8]


@pytest.fixture(scope="module")
def photographs() -> list[Picture]:
    """Real photographs, 128 x 128."""
    data = pytest.importorskip("skimage.data")
    pictures = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in ("astronaut", "chelsea", "coffee")]
    return [np.asarray(picture.resize((128, 128), Image.Resampling.BICUBIC)) for picture in pictures]


def even(value: float, noise: float = 2, size: tuple[int, int] = (64, 48)) -> Picture:
    rng = np.random.default_rng(0)
    return np.clip(value + rng.uniform(-noise, noise, (*size, 3)), 0, 255).astype(np.uint8)


def jpeg(picture: Picture) -> Picture:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG", quality=75)
    return np.asarray(Image.open(stream))


# The released code keeps an edit where `np.mean(image) < threshold` or so: it passes black images and drops white ones.


def test_the_released_filters_first_mistake_a_black_edit_is_rejected(photographs: list[Picture]) -> None:
    for black in (np.zeros_like(photographs[0]), even(3, size=(128, 128))):
        assert judge(photographs[0], black).verdict == "black"


def test_the_released_filters_second_mistake_a_bright_edit_is_kept(photographs: list[Picture]) -> None:
    """Snow and sketches are mostly white; nothing but white is no edit."""
    for picture in photographs:
        bright = (255 - (255 - picture.astype(np.float32)) * 0.3).astype(np.uint8)
        assert bright.mean() > 200
        assert judge(picture, bright).verdict is None
        assert judge(picture, np.full_like(picture, 255)).verdict == "white"


def test_procedural_edits_are_accepted(photographs: list[Picture]) -> None:
    editor = ProceduralEditor()
    for picture in photographs:
        edits = editor.edit([picture], [EditTask(image=0, prompt=prompt, seed=7) for prompt in PROMPTS])
        for prompt, edit in zip(PROMPTS, edits, strict=True):
            found = judge(picture, edit)
            assert found.verdict is None, (prompt, found)
            assert found.threshold <= found.score <= 1


def shifted(picture: Picture) -> Picture:
    """What an autoencoder does: slightly blurred, slightly other values, nothing edited."""
    blurred = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.7)), np.float32)
    return np.clip(blurred * 1.01 + np.random.default_rng(1).normal(0, 2, picture.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("untouched", [np.copy, jpeg, shifted])
def test_an_edit_in_which_nothing_was_edited(
    photographs: list[Picture], untouched: Callable[[Picture], Picture]
) -> None:
    for picture in photographs:
        found = judge(picture, untouched(picture))
        assert found.verdict == "unchanged"
        assert found.score < found.threshold == Thresholds().like


def test_an_edit_of_something_else(photographs: list[Picture]) -> None:
    for place, picture in enumerate(photographs):
        noise = np.random.default_rng(place).integers(0, 256, picture.shape, np.uint8)
        assert judge(picture, noise).verdict == "structure_lost"
        assert judge(picture, 255 - picture).verdict is None  # a negative shows the same things
    fields = judge(photographs[0], photograph(5, 128, 128))
    assert fields.score < judge(photographs[0], shifted(photographs[0])[..., ::-1]).score


@pytest.mark.parametrize("value", [60, 128, 190])
def test_a_flat_edit(value: int) -> None:
    assert judge(photograph(0, 64, 48), even(value)).verdict == "flat"


@given(bad=st.sampled_from([np.nan, np.inf, -np.inf]), count=st.integers(1, 20))
def test_numbers_that_are_not_finite(bad: float, count: int) -> None:
    picture = photograph(1, 16, 20)
    edit = (255 - picture).astype(np.float32)
    edit.reshape(-1, 3)[:count, 1] = bad
    found = judge(picture, edit)
    assert found.verdict == "not a number" and found.score == pytest.approx(count / 320)
    assert judge(picture, edit, Thresholds(not_finite=0.5)).verdict != "not a number"


@given(height=st.integers(1, 70), width=st.integers(1, 70), seed=st.integers(0, 99))
@example(height=1, width=2, seed=1)  # correlates by a little more than 1
def test_images_of_every_size_get_one_verdict_that_repeats(height: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    original, edit = rng.integers(0, 256, (2, height, width, 3), np.uint8)
    found = judge(original, edit)
    assert found == judge(original.copy(), edit.copy())
    assert found.verdict is None or found.verdict in REJECTIONS
    assert 0 <= found.score <= 1


@given(share=st.floats(0.01, 0.99))
def test_a_threshold_is_where_it_says(share: float) -> None:
    original = photograph(2, 40, 50)
    edit = 255 - original // 2  # nowhere near black
    edit.reshape(-1, 3)[: round(share * 2000)] = 0
    exactly = round(share * 2000) / 2000
    assert judge(original, edit, Thresholds(black=exactly)).verdict == "black"
    assert judge(original, edit, Thresholds(black=min(1.0, exactly + 0.001))).verdict != "black"


@pytest.mark.parametrize("value", [-0.1, 1.1, True, "0.5", float("nan")])
def test_thresholds_are_checked(value: object) -> None:
    with pytest.raises(ConfigError, match="unlike must be a number from 0 to 1"):
        Thresholds(unlike=value)  # type: ignore[arg-type]


def test_other_shapes_are_refused() -> None:
    picture = photograph(3, 20, 20)
    for edit in (picture[:10], picture[..., 0], picture[:0]):
        with pytest.raises(DataError, match="of its original's size"):
            judge(picture, edit)
