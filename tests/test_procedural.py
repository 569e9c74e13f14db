"""Properties of the procedural editor: what it keeps, what it changes, and what an edit depends on."""

import itertools
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from skimage import data

from dali_diffusemix.errors import ConfigError, DataError
from dali_diffusemix.generate.editors import PROMPTS, Editor, EditTask
from dali_diffusemix.generate.editors.procedural import ProceduralConfig, ProceduralEditor

SHARED = Path(__file__).parents[2] / "shared"
Pixels = NDArray[np.uint8]
Plane = NDArray[np.float64]


def squared(picture: Image.Image, side: int = 128) -> Pixels:
    """The middle of a picture, (side, side, 3)."""
    width, height = picture.size
    edge = min(width, height)
    box = ((width - edge) / 2, (height - edge) / 2, (width + edge) / 2, (height + edge) / 2)
    return np.asarray(picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC, box))


PHOTOGRAPHS = [squared(Image.fromarray(load())) for load in (data.astronaut, data.chelsea, data.coffee, data.rocket)]


def edited(image: Pixels, prompt: str, seed: int = 0) -> Pixels:
    return ProceduralEditor().edit([image], [EditTask(image=0, prompt=prompt, seed=seed)])[0]


def difference(one: Pixels, other: Pixels) -> float:
    """Mean absolute difference, in grey levels."""
    return float(np.abs(one.astype(np.int16) - other).mean())


def brightness(image: Pixels) -> Plane:
    """What is seen at a glance: brightness on a grid of 32x32, without the rim, where a painting shows its paper."""
    grid = np.asarray(Image.fromarray(image).convert("L").resize((32, 32), Image.Resampling.BOX), np.float64)
    return grid[3:-3, 3:-3]


def edges(image: Pixels) -> Plane:
    """How the forms run: strength of the edges on that grid; a root, lest one strong edge drown the others."""
    down, across = np.gradient(brightness(image))
    return np.asarray(np.sqrt(np.hypot(down, across)))


def correlation(one: Plane, other: Plane) -> float:
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


def test_it_is_an_editor_and_says_that_it_is_no_diffusion_model() -> None:
    editor: Editor = ProceduralEditor()
    assert editor.edit([], []) == []
    recorded = ProceduralConfig().settings()
    assert recorded["editor"] == "procedural"
    assert "not diffusion" in str(recorded["model"])
    assert "not diffusion" in (ProceduralEditor.__doc__ or "")


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    prompt=st.sampled_from(PROMPTS),
    seed=st.integers(0, 2**64 - 1),
    fill=st.sampled_from(["noise", "black", "white"]),
)
def test_an_edit_has_its_images_shape_at_any_size(height: int, width: int, prompt: str, seed: int, fill: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    image = {"noise": noise, "black": np.zeros_like(noise), "white": np.full_like(noise, 255)}[fill]
    before = image.copy()
    edit = edited(image, prompt, seed)
    assert edit.shape == image.shape
    assert edit.dtype == np.uint8
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("shape", [(20000, 10), (10, 20000)])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_extreme_shapes_are_edited_too(prompt: str, shape: tuple[int, int]) -> None:
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    assert edited(image, prompt).shape == image.shape


def test_views_and_read_only_images_are_accepted() -> None:
    image = PHOTOGRAPHS[0][::-1, ::2].copy()
    view = PHOTOGRAPHS[0][::-1, ::2]
    view.flags.writeable = False
    for prompt in PROMPTS:
        np.testing.assert_array_equal(edited(view, prompt), edited(image, prompt))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_an_edit_depends_on_its_image_prompt_and_seed_alone(prompt: str) -> None:
    tasks = [EditTask(image=i, prompt=p, seed=s) for p in PROMPTS for i in (1, 0, 2) for s in (7, 2**64 - 1)]
    together = ProceduralEditor().edit(PHOTOGRAPHS[:3], tasks)
    for task, edit in zip(tasks, together, strict=True):
        if task.prompt == prompt:
            np.testing.assert_array_equal(edit, edited(PHOTOGRAPHS[task.image], prompt, task.seed))


def test_another_process_makes_the_same_edits() -> None:
    script = (
        "import sys, zlib, numpy as np\n"
        "from dali_diffusemix.generate.editors import PROMPTS, EditTask\n"
        "from dali_diffusemix.generate.editors.procedural import ProceduralEditor\n"
        "image = np.frombuffer(sys.stdin.buffer.read(), np.uint8).reshape(128, 128, 3)\n"
        "tasks = [EditTask(image=0, prompt=p, seed=5) for p in PROMPTS]\n"
        "sys.stdout.write(' '.join(str(zlib.crc32(e.tobytes())) for e in ProceduralEditor().edit([image], tasks)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=PHOTOGRAPHS[0].tobytes(), capture_output=True, check=True
    )
    here = [zlib.crc32(edited(PHOTOGRAPHS[0], prompt, 5).tobytes()) for prompt in PROMPTS]
    assert [int(word) for word in done.stdout.split()] == here


@pytest.mark.parametrize("prompt", PROMPTS)
def test_seeds_give_visible_variants(prompt: str) -> None:
    for photograph in PHOTOGRAPHS:
        variants = [edited(photograph, prompt, seed) for seed in (1, 2, 2**32 + 1, 2**63)]
        gaps = [difference(one, other) for one, other in itertools.combinations(variants, 2)]
        assert min(gaps) > 1
        assert np.mean(gaps) > 3.5


@pytest.mark.parametrize("prompt", PROMPTS)
def test_an_edit_is_far_from_its_photograph_and_not_flat(prompt: str) -> None:
    edits = [edited(photograph, prompt) for photograph in PHOTOGRAPHS]
    assert np.mean([difference(*pair) for pair in zip(edits, PHOTOGRAPHS, strict=True)]) > 20
    for edit, photograph in zip(edits, PHOTOGRAPHS, strict=True):
        assert difference(edit, photograph) > 12
        assert edit.std() > 15


def test_prompts_are_far_apart_on_every_photograph() -> None:
    editor = ProceduralEditor()
    for photograph in PHOTOGRAPHS:
        edits = editor.edit([photograph], [EditTask(image=0, prompt=prompt, seed=3) for prompt in PROMPTS])
        for (one, first), (other, second) in itertools.combinations(zip(PROMPTS, edits, strict=True), 2):
            assert difference(first, second) > 14, f"{one} and {other} look alike"


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_photograph_stays_recognisable(prompt: str) -> None:
    likeness = []
    for seed, photograph in itertools.product(range(4), PHOTOGRAPHS):
        edit = edited(photograph, prompt, seed)
        forms = correlation(edges(edit), edges(photograph))
        tones = correlation(brightness(edit), brightness(photograph))
        likeness.append(max(forms, tones))
    assert min(likeness) > 0.33
    assert np.mean(likeness) > 0.65


def imagenet(count: int) -> list[Pixels]:
    files = sorted((SHARED / "data/imagenet_sample").glob("*/*.JPEG"))
    if not files:
        pytest.skip(f"no photographs under {SHARED / 'data/imagenet_sample'}")
    chosen = files[:: max(1, len(files) // count)][:count]
    pictures = []
    for path in chosen:
        with Image.open(path) as picture:
            pictures.append(squared(picture))
    return pictures


def test_each_edit_of_many_photographs_is_closest_to_its_own() -> None:
    photographs = imagenet(24)
    outlines = np.stack([edges(photograph).ravel() for photograph in photographs])
    editor = ProceduralEditor()
    for prompt in PROMPTS:
        tasks = [EditTask(image=i, prompt=prompt, seed=i) for i in range(len(photographs))]
        edits = editor.edit(photographs, tasks)
        likeness = np.corrcoef(np.stack([edges(edit).ravel() for edit in edits]), outlines)[: len(edits), len(edits) :]
        own = float((likeness.argmax(1) == np.arange(len(edits))).mean())
        assert own >= 0.95, f"{prompt}: {own:.0%} of the edits are most like their own photograph"


def look(image: Pixels) -> Plane:
    """What tells styles apart: colours of the upper and lower half, their spread, fine texture."""
    values = image.astype(np.float64)
    halves = [values[half].mean((0, 1)) for half in (slice(None, 64), slice(64, None))]
    texture = np.log([np.abs(np.diff(values, axis=axis)).mean() + 1 for axis in (0, 1)])
    chroma = [values[..., 0] - values[..., 1], values[..., 2] - values[..., 1]]
    return np.concatenate([*halves, values.std((0, 1)), 40 * texture, [plane.std() for plane in chroma]])


@pytest.mark.slow
def test_a_simple_classifier_tells_the_prompts_apart_on_unseen_photographs() -> None:
    photographs = imagenet(24)
    editor = ProceduralEditor()
    looks = np.stack(
        [
            [look(edit) - look(photograph) for edit in editor.edit([photograph], tasks)]
            for i, photograph in enumerate(photographs)
            for tasks in [[EditTask(image=0, prompt=prompt, seed=i) for prompt in PROMPTS]]
        ]
    )  # (photographs, prompts, features)
    known, unseen = looks[::2], looks[1::2]
    scale = (known - known.mean(0)).std((0, 1))
    distance = (((unseen[:, :, None] - known.mean(0)) / scale) ** 2).sum(-1)
    assert float((distance.argmin(2) == np.arange(len(PROMPTS))).mean()) > 0.85


def test_an_unknown_prompt_is_refused_with_the_known_ones_and_the_remedy() -> None:
    with pytest.raises(ConfigError) as caught:
        ProceduralEditor(["autumn", "cubism"])
    message = str(caught.value)
    assert "'cubism'" in message
    assert "diffusers editor" in message
    assert all(repr(prompt) in message for prompt in PROMPTS)


def test_a_task_outside_the_editors_prompts_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'autumn'.*found 'snowy'.*prompts="):
        ProceduralEditor(["autumn"]).edit(PHOTOGRAPHS, [EditTask(image=0, prompt="snowy", seed=0)])


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4, 3))],
)
def test_an_image_that_is_not_rgb_bytes_is_refused_with_what_was_found(image: Pixels) -> None:
    with pytest.raises(DataError) as caught:
        edited(image, "autumn")
    assert f"{image.shape} {image.dtype}" in str(caught.value)
