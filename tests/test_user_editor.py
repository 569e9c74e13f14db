"""generate.editors.user and .choice: a class of the user's, from its name and options to the edits in a store."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warm
from material import write_photograph
from test_cli import PROGRAM, run, run_json
from test_generate import RUN, content

from dali_diffusemix.errors import ConfigError, MissingDependencyError, StoreError
from dali_diffusemix.generate import GenerateConfig, generate
from dali_diffusemix.generate.editors import Editor, EditorConfig, EditTask
from dali_diffusemix.generate.editors.choice import choose_editor
from dali_diffusemix.generate.editors.diffusers import DiffusersConfig
from dali_diffusemix.generate.editors.procedural import ProceduralConfig
from dali_diffusemix.generate.editors.user import UserConfig
from dali_diffusemix.generate.engines.local import LocalEngine
from dali_diffusemix.generate.engines.ray import RayEngine
from dali_diffusemix.images.codec import decode
from dali_diffusemix.store import EditStore

EXAMPLES = Path(__file__).parents[1] / "examples"

NEGATIVE = """
class Negative:
    def edit(self, images, tasks):
        return [255 - images[task.image] for task in tasks]
"""

SHIFTED = """
import os, sys

class Shifted:
    prompts = ("left", "right")
    multiple = 4

    def __init__(self, *, pixels=3, unlike=None, _hidden=object()):
        if pixels > 99:
            raise ValueError("too far")
        self.pixels = pixels

    def edit(self, images, tasks):
        sign = {"left": -1, "right": 1}
        return [
            255 - (images[one.image] * 0.5 + 20 + one.seed % 80 + sign[one.prompt] * self.pixels % 20).astype("uint8")
            for one in tasks
        ]
"""

SIZES: dict[str, Any] = {"size": 24, "format": "raw", "originals_per_shard": 2, "batch_size": 2}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with `negative.py` and `shifted.py`; what is imported from it is forgotten afterwards."""
    monkeypatch.setenv("DALI_DIFFUSEMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "negative.py").write_text(NEGATIVE)
    (tmp_path / "shifted.py").write_text(SHIFTED)
    before = list(sys.path)
    yield tmp_path
    sys.path[:] = before
    forget(tmp_path)


def forget(folder: Path) -> None:
    """What a new process does not know."""
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for row in range(10):
        write_photograph(tmp_path / "train" / "ants" / f"{row}.jpg", 100 + row, 40, 50, quality=95)
    return tmp_path / "train"


def edits_of(store: Path) -> dict[tuple[int, str], np.ndarray]:
    found = EditStore.open(store)
    originals = found.originals_of(np.arange(len(found)))
    return {(int(originals[edit]), found.prompt_of(edit)): decode(found.encoded(edit)) for edit in range(len(found))}


# Choice ---------------------------------------------------------------------------------------------------------------


def test_a_name_chooses_an_editor(folder: Path) -> None:
    assert choose_editor("procedural", {"template": "{prompt}"}) == ProceduralConfig()
    assert choose_editor("a/b", {"steps": 20}) == DiffusersConfig(model="a/b", steps=20)
    chosen = choose_editor("shifted:Shifted", {"editor_options": {"pixels": 5}})
    assert chosen == UserConfig(name="shifted:Shifted", options={"pixels": 5})
    assert GenerateConfig(editor="shifted:Shifted", prompts=("left",)).editor == UserConfig(name="shifted:Shifted")
    (folder / "odd:name").mkdir()
    assert choose_editor("odd:name") == DiffusersConfig(model="odd:name")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("procedural", {"editor_options": {}}, "editor_options must be left out for the procedural editor"),
        ("a/b", {"editor_options": {}}, "editor_options must be left out for the model 'a/b'"),
        ("negative:Negative", {"steps": 3}, "steps must be left out for the editor 'negative:Negative', found 3"),
        ("negative:Negative", {"template": "x"}, "template must be left out for the editor 'negative:Negative'"),
    ],
)
def test_an_option_that_an_editor_does_not_take_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}.*; .*, or remove it.$"):
        choose_editor(name, options)


def test_the_command_and_its_file(root: Path, folder: Path) -> None:
    made = run_json("generate", root, folder / "edits", "--editor", "negative:Negative", "--prompts", "negative")
    assert made["by_prompt"] == {"negative": {"accepted": 10}}
    (folder / "edits.toml").write_text(
        'editor = "shifted:Shifted"\nprompts = ["left", "right"]\nsize = 24\nseed = 2\n'
        '[editor_options]\npixels = 7\n[deny]\nants = ["left"]\n'
    )
    made = run_json("generate", root, folder / "shifted", "--config", folder / "edits.toml")
    assert made["by_prompt"] == {"left": {"denied": 10}, "right": {"accepted": 10}}
    assert EditStore.open(folder / "shifted").settings["option pixels"] == 7
    (folder / "edits.toml").write_text('editor = "shifted:Shifted"\neditor_options = 3\n')
    refused = run("generate", root, folder / "none", "--config", folder / "edits.toml", code=1)
    assert "editor_options must be a table, found 3; write them under [editor_options]" in refused.stderr
    assert not (folder / "none").exists()


@pytest.mark.slow
def test_the_installed_program_finds_a_module_in_the_current_directory(root: Path, folder: Path) -> None:
    """Its own directory is the program's, not this one; its workers are other processes."""
    options = folder / "options.toml"
    options.write_text('prompts = ["negative"]\nworkers = 2\noriginals_per_shard = 2\nsize = 24\n')
    program = [sys.executable, "-P", *PROGRAM[1:]]  # -P: without this directory on the path
    command = [*program, "generate", root, folder / "edits", "--editor", "negative:Negative", "--config", options]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    assert len(EditStore.open(folder / "edits")) == 10


def test_the_short_example(root: Path, folder: Path) -> None:
    (folder / "own_editor.py").write_bytes((EXAMPLES / "own_editor.py").read_bytes())
    (folder / "edits.toml").write_text(
        'editor = "own_editor:Tinted"\nprompts = ["red", "blue"]\nvariants = 2\nsize = 24\n'
        "[editor_options]\nstrength = 0.9\n"
    )
    made = run_json("generate", root, folder / "edits", "--config", folder / "edits.toml")
    assert made["verdicts"]["accepted"] == 40
    store = EditStore.open(folder / "edits")
    assert store.settings["option strength"] == 0.9
    # Edits of one image and prompt, from two seeds.
    red, redder, blue, _ = (decode(store.encoded(edit)).astype(int) for edit in range(4))
    assert (red != redder).any()
    assert red[..., 0].mean() > red[..., 2].mean() and blue[..., 0].mean() < blue[..., 2].mean()


# The config -----------------------------------------------------------------------------------------------------------


def test_settings_have_all_that_decides_an_edit(folder: Path) -> None:
    settings = dict(UserConfig(name="shifted:Shifted", options={"unlike": ["a", 1]}).settings())
    assert re.fullmatch("sha256:[0-9a-f]{16}", str(settings.pop("version")))
    assert settings == {"editor": "shifted:Shifted", "option pixels": 3, "option unlike": '["a", 1]'}
    # A default is one of them, whether it is written or not.
    config = UserConfig(name="shifted:Shifted")
    assert config.settings() == UserConfig(name="shifted:Shifted", options={"pixels": 3}).settings()
    assert config.settings()["option unlike"] is None
    json.dumps(GenerateConfig(editor=config, prompts=("left",)).settings(), allow_nan=False)


def test_the_version_is_that_of_the_file_or_what_the_class_states(folder: Path) -> None:
    def version(text: str) -> str:
        (folder / "versions.py").write_text(text)
        forget(folder)
        return UserConfig(name="versions:Negative").version

    assert version(NEGATIVE) != version(NEGATIVE + "# other\n")
    stated = NEGATIVE.replace("    def", "    version = 3\n    def")
    assert version(stated) == version(stated + "# other\n") == "3"
    assert version(NEGATIVE.replace("    def", "    version = 'b'\n    def")) == "b"
    with pytest.raises(ConfigError, match=r"version must be a string or a whole number, found 1\.5"):
        version(NEGATIVE.replace("    def", "    version = 1.5\n    def"))


def test_a_changed_file_does_not_pass_for_the_code_that_was_imported(folder: Path) -> None:
    before = UserConfig(name="negative:Negative").version
    (folder / "negative.py").write_text(NEGATIVE + "# changed\n")
    assert UserConfig(name="negative:Negative").version == before
    forget(folder)
    assert UserConfig(name="negative:Negative").version != before


def test_a_config_can_be_pickled_and_found_from_another_directory(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "mine" / "deep").mkdir(parents=True)
    (folder / "mine" / "deep" / "negative.py").write_text(NEGATIVE)
    (folder / "packed").mkdir()
    (folder / "packed" / "__init__.py").write_text(NEGATIVE)
    for name in ("negative:Negative", "mine.deep.negative:Negative", "packed:Negative"):
        sent = pickle.dumps(UserConfig(name=name))
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(sys, "path", [one for one in sys.path if one != str(folder)])
            elsewhere.chdir(tmp_path_factory.mktemp("elsewhere"))
            forget(folder)
            config = pickle.loads(sent)  # our own object, a moment old
            assert "negative" not in sys.modules  # it is not imported yet
            editor = config.load(("a",), device="cpu", batch_size=1)
            image = np.zeros((2, 3, 3), np.uint8)
            (edit,) = editor.edit([image], [EditTask(image=0, prompt="a", seed=1)])
            assert (edit == 255).all()


def test_a_constructor_that_takes_a_device_is_told_it(folder: Path) -> None:
    (folder / "devices.py").write_text(
        "class OnGpu:\n    def __init__(self, device, *, other=1):\n        self.device = device\n"
        "    def edit(self, images, tasks):\n        return []\n"
    )
    config: EditorConfig = UserConfig(name="devices:OnGpu")
    assert config.accelerated and not UserConfig(name="negative:Negative").accelerated
    assert GenerateConfig(editor=config).shard_length == 64
    loaded: Any = config.load((), device="cuda:1", batch_size=1)
    assert loaded._editor.device == "cuda:1"
    assert "option device" not in config.settings()
    with pytest.raises(ConfigError, match=r"editor_options: device must be left out, found 'cpu'; use --device"):
        UserConfig(name="devices:OnGpu", options={"device": "cpu"})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nowhere:Negative", {}, r"the module of 'nowhere:Negative' must be importable.*No module named 'nowhere'"),
        ("negative:Nothing", {}, r"'negative:Nothing' must be a class with a method edit.*no such name.*negative\.py"),
        ("negative.py:Negative", {}, r"must be 'module:Class'.*found 'negative\.py:Negative'; .*styles\.negative:Neg"),
        ("a/negative:Negative", {}, "must be 'module:Class'"),
        ("negative:", {}, "must be 'module:Class'"),
        ("pathlib:Path", {}, "'pathlib:Path' must be a class with a method edit"),
        ("json:dumps", {}, "'json:dumps' must be a class with a method edit"),
        ("broken:Negative", {}, r"must be importable, found ZeroDivisionError: .*broken\.py, line 2\)"),
        ("wrong:Negative", {}, "must be importable, found SyntaxError"),
        ("shifted:Shifted", {"pixel": 3}, "takes pixels=3, unlike=None, .*unexpected keyword argument 'pixel'"),
        ("negative:Negative", {"pixel": 3}, "takes none; found: .*'pixel'"),
        ("shifted:Shifted", {"pixels": {1, 2}}, "pixels must be a string, number or boolean, or .*found {1, 2}"),
        ("shifted:Shifted", {"pixels": float("nan")}, "pixels must be .*found nan"),
        ("odd_editors:Prompts", {}, "prompts must be a tuple of strings, found 'autumn'"),
        ("odd_editors:Multiple", {}, "multiple must be a whole number from 1, found 0"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, name: str, options: dict[str, Any], message: str) -> None:
    (folder / "broken.py").write_text("import os\n1 / 0\n")
    (folder / "wrong.py").write_text("def\n")
    (folder / "odd_editors.py").write_text(
        "class Prompts:\n    edit, prompts = print, 'autumn'\nclass Multiple:\n    edit, multiple = print, 0\n"
    )
    with pytest.raises(ConfigError, match=message) as caught:
        UserConfig(name=name, options=options)
    if "importable" in message:
        assert caught.value.__cause__ is not None


def test_errors_of_this_package_stay_as_they_are(folder: Path) -> None:
    (folder / "needs.py").write_text(
        "from dali_diffusemix.errors import MissingDependencyError\nraise MissingDependencyError('needs that.')\n"
    )
    with pytest.raises(MissingDependencyError, match=r"^needs that\.$"):
        UserConfig(name="needs:Anything")


# A run ----------------------------------------------------------------------------------------------------------------


def test_what_is_known_before_is_refused_before_any_work(root: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"'autumn' is not a prompt that 'shifted:Shifted' knows.*'left', 'right'"):
        generate(root, folder / "edits", GenerateConfig(editor="shifted:Shifted", prompts=("autumn",), **SIZES))
    with pytest.raises(ConfigError, match="edit_size must be divisible by 4"):
        GenerateConfig(editor="shifted:Shifted", prompts=("left",), size=26)
    assert not (folder / "edits").exists()


def test_two_processes_make_what_one_makes(root: Path, folder: Path) -> None:
    editor = UserConfig(name="shifted:Shifted", options={"pixels": 9})
    config = GenerateConfig(editor=editor, prompts=("left", "right"), variants=2, **SIZES)
    assert generate(root, folder / "one", config).made == 40
    assert generate(root, folder / "two", config, engine=LocalEngine(("cpu", "cpu"))).made == 40
    assert content(folder / "one") == content(folder / "two")
    left, right = (edits_of(folder / "one")[0, prompt] for prompt in ("left", "right"))
    assert (left != right).any()


@pytest.mark.slow
def test_ray_makes_what_one_process_makes(root: Path, folder: Path) -> None:
    pytest.importorskip("ray")
    config = GenerateConfig(editor="shifted:Shifted", prompts=("left", "right"), **SIZES)
    generate(root, folder / "one", config)
    generate(root, folder / "ray", config, engine=RayEngine(workers=2, num_gpus=0))
    assert content(folder / "one") == content(folder / "ray")


@pytest.mark.slow
def test_killed_and_resumed_it_ends_with_the_same_store(root: Path, folder: Path) -> None:
    config = {"editor": "shifted:Shifted", "prompts": ["left", "right"], **SIZES, "originals_per_shard": 3}
    slow = SHIFTED.replace("sign = ", "import time; time.sleep(0.1); sign = ")
    (folder / "shifted.py").write_text(slow)
    for done in (8, 14):  # within the second shard of six edits, and the third
        with warm.Script("-c", RUN, root, folder / "killed", json.dumps(config), 0) as script:
            while int(script.stdout.readline()) < done:
                pass
            script.kill()
        assert script.returncode == -signal.SIGKILL
    killed = set(folder.glob("killed/shards/*.json"))
    assert 0 < len(killed) < 4
    assert 0 < generate(root, folder / "killed", GenerateConfig(**config)).made < 20
    generate(root, folder / "whole", GenerateConfig(**config))
    assert content(folder / "killed") == content(folder / "whole")


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({}, "version: 'sha256:.*' in the store, 'sha256:.*' asked for"),
        ({"options": {"pixels": 4}}, "option pixels: 3 in the store, 4 asked for"),
    ],
)
def test_another_version_or_option_is_refused(root: Path, folder: Path, other: dict[str, Any], difference: str) -> None:
    config = GenerateConfig(editor="shifted:Shifted", prompts=("left",), **SIZES)
    generate(root, folder / "edits", config)
    assert generate(root, folder / "edits", config).made == 0
    if not other:
        (folder / "shifted.py").write_text(SHIFTED.replace("255 -", "254 -"))
        forget(folder)
    changed = UserConfig(name="shifted:Shifted", **other)
    with pytest.raises(StoreError, match=difference):
        generate(root, folder / "edits", GenerateConfig(editor=changed, prompts=("left",), **SIZES))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_file_that_changes_during_a_run_stops_it(root: Path, folder: Path, processes: int) -> None:
    """A process that starts later, here or on another node, would make the edits of another version."""
    config = GenerateConfig(editor="negative:Negative", prompts=("negative",), **SIZES)
    (folder / "negative.py").write_text(NEGATIVE.replace("255", "250"))
    if processes == 1:
        forget(folder)
    with pytest.raises(ConfigError, match="'negative:Negative' must be the same wherever it works, found version sha"):
        generate(root, folder / "edits", config, engine=LocalEngine(("cpu",) * processes))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_constructor_that_raises_is_named(root: Path, folder: Path, processes: int) -> None:
    editor = UserConfig(name="shifted:Shifted", options={"pixels": 100})
    config = GenerateConfig(editor=editor, prompts=("left",), **SIZES)
    message = r"'shifted:Shifted' must be made .*'pixels': 100.*ValueError: too far \(.*shifted\.py, line 10\)"
    with pytest.raises(ConfigError, match=message) as caught:
        generate(root, folder / "edits", config, engine=LocalEngine(("cpu",) * processes))
    if processes == 1:
        assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("None", "edit must return a sequence of edits, found NoneType"),
        ("[images[0]]", "one edit per task, found 1 for 2 tasks"),
        ("[image.tolist() for image in images]", "NumPy arrays, found builtins.list"),
        ("[Image.fromarray(image) for image in images]", r"NumPy arrays, found PIL\.Image\.Image"),
        ("[image / 255 for image in images]", r"uint8 RGB .*here \(24, 24, 3\), found \(24, 24, 3\) float64 under 'a'"),
        ("[image[:-1] for image in images]", r"here \(24, 24, 3\), found \(23, 24, 3\) uint8"),
        ("[image[..., 0] for image in images]", r"found \(24, 24\) uint8"),
    ],
)
def test_what_an_editor_returns_is_checked(root: Path, folder: Path, returned: str, message: str) -> None:
    (folder / "returns.py").write_text(
        f"from PIL import Image\nclass Wrong:\n    def edit(self, images, tasks):\n        return {returned}\n"
    )
    config = GenerateConfig(editor="returns:Wrong", prompts=("a",), **SIZES)
    with pytest.raises(ConfigError, match=f"'returns:Wrong': .*{message}.*; correct the class"):
        generate(root, folder / "edits", config)


def test_an_error_within_an_edit_keeps_its_traceback(root: Path, folder: Path) -> None:
    (folder / "raises.py").write_text("class Wrong:\n    def edit(self, images, tasks):\n        return 1 / 0\n")
    config = GenerateConfig(editor="raises:Wrong", prompts=("a",), **SIZES)
    with pytest.raises(ZeroDivisionError):
        generate(root, folder / "edits", config)
    with pytest.raises(ZeroDivisionError) as caught:
        generate(root, folder / "edits", config, engine=LocalEngine(("cpu", "cpu")))
    assert any("raises.py" in note and "line 3" in note for note in caught.value.__notes__)


def test_numbers_that_are_not_finite_are_a_verdict_and_images_cannot_be_written(root: Path, folder: Path) -> None:
    (folder / "infinite.py").write_text(
        "import numpy as np\nclass NotFinite:\n    def edit(self, images, tasks):\n"
        "        assert not any(image.flags.writeable for image in images)\n"
        "        return (np.full(images[task.image].shape, np.nan, np.float32) for task in tasks)\n"
    )
    config = GenerateConfig(editor="infinite:NotFinite", prompts=("a",), **SIZES)
    assert generate(root, folder / "edits", config).verdicts["not a number"] == 10


def test_the_type_of_a_users_editor_is_that_of_any(folder: Path) -> None:
    editor: Editor = UserConfig(name="negative:Negative").load(("a",), device="cpu", batch_size=1)
    assert editor.edit([], []) == []
    assert os.fspath(folder) in sys.path


def test_the_documents_show_the_short_example() -> None:
    page = EXAMPLES.parent / "docs" / "editors.md"
    if not page.is_file():
        pytest.skip("docs/ is not beside the package")
    code = (EXAMPLES / "own_editor.py").read_text(encoding="utf-8").split("\n\n", 1)[1]
    assert code in page.read_text(encoding="utf-8")
