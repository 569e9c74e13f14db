"""cli.generate_options: the file of `generate --config`: every option by its name, the command line before it."""

import json
import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from material import write_photograph
from test_cli import make_images, run, run_json

from dali_diffusemix.cli.generate import _config_of, _engine_of
from dali_diffusemix.cli.generate_options import GenerateOptions, read_options, template
from dali_diffusemix.errors import ConfigError
from dali_diffusemix.generate import GenerateConfig
from dali_diffusemix.generate.editors.choice import choose_editor, editor_of_store
from dali_diffusemix.generate.editors.diffusers import SCHEDULERS, DiffusersConfig
from dali_diffusemix.generate.editors.diffusers.adapters import InstructPix2PixAdapter
from dali_diffusemix.generate.editors.diffusers.loading import QUANTIZATIONS
from dali_diffusemix.generate.editors.procedural import ProceduralConfig
from dali_diffusemix.generate.editors.server import ServerConfig
from dali_diffusemix.generate.engines.local import LocalEngine
from dali_diffusemix.generate.engines.ray import RayEngine
from dali_diffusemix.store import EditStore

NAMES = [field.name for field in fields(GenerateOptions)]


def file(folder: Path, text: str) -> Path:
    (folder / "edits.toml").write_text(text, encoding="utf-8")
    return folder / "edits.toml"


def options(folder: Path, text: str) -> GenerateOptions:
    return GenerateOptions(**read_options(file(folder, text)))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DALI_DIFFUSEMIX_CACHE", str(tmp_path / "cache"))
    return make_images(tmp_path / "root", classes=2, images=2)


# The template ---------------------------------------------------------------------------------------------------------


def uncommented() -> str:
    return re.sub(r"^#(?! )", "", template(), flags=re.MULTILINE)


def test_the_template_names_every_option_and_sets_none(tmp_path: Path) -> None:
    assert run("generate", "--print-config").stdout == template()
    assert read_options(file(tmp_path, template())) == {}
    content = read_options(file(tmp_path, uncommented()))
    assert list(content) == NAMES
    assert max(map(len, template().splitlines())) <= 120
    for name in NAMES:
        before = re.split(rf"\n#(?:{name} = |\[{name}\])", template())[0].splitlines()[-1]
        assert re.fullmatch(r"# .*\.", before), name


def test_its_defaults_are_those_of_the_code() -> None:
    """Wherever the template does not say another default, its value is the default."""
    content = tomllib.loads(uncommented())
    ours: dict[str, Any] = {}
    for config in (ServerConfig, GenerateConfig, DiffusersConfig):
        ours |= {field.name: field.default for field in fields(config)}
    compared = {
        field.name
        for field in fields(GenerateOptions)
        if field.metadata["default"] in (content[field.name], json.dumps(content[field.name]))
    }
    assert compared >= {"size", "resize", "variants", "seed", "retry", "batch_size", "compile"}
    for name in compared - {"engine", "split"}:
        assert content[name] == ours[name], name
    scheduler = next(field for field in fields(GenerateOptions) if field.name == "scheduler").metadata["text"]
    assert all(name in scheduler for name in SCHEDULERS)
    quantize = next(field for field in fields(GenerateOptions) if field.name == "quantize").metadata["text"]
    assert all(name in quantize for name in QUANTIZATIONS)
    for name, value in {**vars(InstructPix2PixAdapter.defaults), "template": "this", "scheduler": "the first"}.items():
        default = next((field.metadata["default"] for field in fields(GenerateOptions) if field.name == name), None)
        assert value is None or (default is not None and default.endswith(f"InstructPix2Pix {value}")), name


# What a file may hold -------------------------------------------------------------------------------------------------


def test_a_file_sets_any_option_and_the_command_line_wins(root: Path, tmp_path: Path) -> None:
    config = file(
        tmp_path,
        'prompts = ["autumn", "snowy"]\nsize = 32\nvariants = 2\nquality = 70\ndevice = "cpu"\n'
        '[deny]\n"class 0" = ["autumn"]\n',
    )
    made = run_json("generate", root, tmp_path / "edits", "--config", config, "--variants", 1)
    assert made["by_prompt"] == {"autumn": {"denied": 2, "accepted": 2}, "snowy": {"accepted": 4}}
    store = EditStore.open(tmp_path / "edits")
    assert store.settings["size"] == 32 and store.settings["quality"] == 70
    # Denials of prompts that are not asked for wait until they are.
    again = run_json("generate", root, tmp_path / "one", "--config", config, "--prompts", "snowy")
    assert again["by_prompt"] == {"snowy": {"accepted": 8}}


def test_a_file_of_prompts_alone_is_one(root: Path, tmp_path: Path) -> None:
    config = file(tmp_path, 'template = "make it {prompt}"\nprompts = ["autumn"]\n[deny]\n"*" = ["autumn"]\n')
    made = run_json("generate", root, tmp_path / "edits", "--config", config)
    assert made["by_prompt"] == {"autumn": {"denied": 4}}


def test_options_of_the_model_and_of_the_engine(tmp_path: Path) -> None:
    given = options(
        tmp_path,
        'editor = "a/b"\ntemplate = "{prompt}"\nsteps = 20\nscheduler = "dpm-solver++"\nguidance = 3\n'
        'compile = true\nedit_size = 256\nsize = 32\nengine = "ray"\naddress = "here:1"\nworkers = 3\nnum_gpus = 0.5\n',
    )
    config = _config_of(given, {}, tmp_path / "store")
    assert config.editor == DiffusersConfig(
        model="a/b", template="{prompt}", steps=20, scheduler="dpm-solver++", guidance=3, compile=True
    )
    assert (config.size, config.edit_size) == (32, 256)
    engine = _engine_of(given, True)
    assert isinstance(engine, RayEngine)
    assert (engine.address, engine.workers, engine.num_gpus) == ("here:1", 3, 0.5)
    local = _engine_of(options(tmp_path, 'device = "cuda:1"\nworkers = 2'), True)
    assert isinstance(local, LocalEngine) and local.devices == ("cuda:1", "cuda:1")


def test_options_of_models_on_the_command_line(root: Path, tmp_path: Path) -> None:
    fields = {"negative_prompt": "blurry", "strength": "0.5", "lora": "a/b:c.safetensors@0.5", "quantize": "bnb-4bit"}
    for name, value in fields.items():
        done = run("generate", root, tmp_path / "edits", f"--{name.replace('_', '-')}", value, code=1)
        assert f"{name} must be left out for the procedural editor, found" in done.stderr
    given = options(tmp_path, 'editor = "a/b"\ncache = 0.1\nlora = "c/d"\nstrength = 0.5\nquantize = "torchao-int8"\n')
    expected = DiffusersConfig(model="a/b", cache=0.1, lora="c/d", strength=0.5, quantize="torchao-int8")
    assert _config_of(given, {}, tmp_path / "store").editor == expected


def test_a_layout_stands_in_the_file_too(root: Path, tmp_path: Path) -> None:
    config = file(tmp_path, 'layout = "cub"\nsplit = "test"')
    assert "cub" in run("generate", root, tmp_path / "edits", "--config", config, code=1).stderr
    assert "must be one of" in run("generate", root, tmp_path / "edits", "--layout", "cups", code=1).stderr
    alone = run("generate", root, tmp_path / "edits", "--config", file(tmp_path, 'split = "test"'), code=1)
    assert "split must be left out without a layout, found 'test'" in alone.stderr


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour = 3", "config must have known keys, found 'colour' in .*; these are editor, prompts, size, .*, deny"),
        ("promts = ['autumn']", "config must have known keys, found 'promts' in .*; did you mean 'prompts'"),
        ("edit-size = 3", "found 'edit-size' in .*; did you mean 'edit_size'"),
        ("format = 'jpg'", "format must be one of jpeg, png, raw, found 'jpg'; did you mean 'jpeg'"),
        ("prompts = ['autum']", "'autum' is not a prompt .* 'autumn', .*; did you mean 'autumn'"),
        ("layout = 'cubs'", "layout must be one of .*, found 'cubs'; did you mean 'cub'"),
        ("editor = 'procedual'", "found 'procedual', which is no folder; did you mean 'procedural'"),
        ("size = '256'", "size must be a whole number, found '256' in '.*edits.toml'; correct it there"),
        ("size = 256.0", r"size must be a whole number, found 256\.0"),
        ("seed = true", "seed must be a whole number, found True"),
        ("guidance = '4'", "guidance must be a number, found '4'"),
        ("compile = 1", "compile must be true or false, found 1"),
        ("editor = 1", "editor must be a string, found 1"),
        ("part = 3", "part must be a string, found 3"),
        ("size = ", "config must be a TOML file, found '.*edits.toml'.*--print-config"),
        ("prompts = 'autumn,snowy'", "prompts must be a list of strings, found 'autumn,snowy'"),
        ("prompts = ['autumn']\n[deny]\nx = ['snowy']", "deny must name prompts of .*, found 'snowy' for 'x'"),
        ("deny = 3", r"\[deny\] must be a table"),
        ("steps = 20", "steps must be left out for the procedural editor, found 20; name a model as editor"),
        ("engine = 'slurm'", "engine must be 'local' or 'ray', found 'slurm'"),
        ("workers = 0", "workers must be 1 or more, found 0"),
        ("engine = 'ray'\ndevice = 'cuda'", "device must be left out with engine 'ray', found 'cuda'"),
        ("address = 'here:1'", "address must be left out with engine 'local', found 'here:1'"),
        ("num_gpus = 1", "num_gpus must be left out with engine 'local', found 1"),
        ("quality = 101", "quality must be a whole number from 1 to 100, found 101"),
        ("editor = 'a/b'\nscheduler = 'magic'", "scheduler must be one of"),
    ],
)
def test_what_is_wrong_is_named(root: Path, tmp_path: Path, text: str, message: str) -> None:
    result = run("generate", root, tmp_path / "edits", "--config", file(tmp_path, text), code=1)
    assert re.search(message, result.stderr), result.stderr
    assert result.stderr.startswith("Error: ") and result.stderr.endswith((".\n", "?\n")) and result.stdout == ""
    assert not (tmp_path / "edits").exists()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config must be a TOML file, found '.*none\.toml'"):
        read_options(tmp_path / "none.toml")


def test_the_command_line_says_what_only_the_file_has() -> None:
    for name, option in (("steps", "--steps"), ("edit_size", "--edit-size")):
        result = run("generate", "a", "b", option, 3, code=2)
        assert f"{option} is an option of the file only; write it there as {name}, and give --config" in result.stderr
    assert re.search("No such option.*--more", run("generate", "--more", code=2).stderr)
    assert "give the file as --config" in run("generate", "a", "b", "--prompts", "prompts.toml", code=2).stderr


def test_files_in_the_documents_are_read(tmp_path: Path) -> None:
    docs = Path(__file__).parents[1] / "docs"
    for page in ("generation", "imagenet"):
        blocks = re.findall(r"^```toml\n(.*?)^```$", (docs / f"{page}.md").read_text(), re.MULTILINE | re.DOTALL)
        assert blocks
        for text in blocks:
            content = read_options(file(tmp_path, text))
            _config_of(GenerateOptions(**content), {"prompts": content["prompts"]}, tmp_path / "store")


# A store that exists --------------------------------------------------------------------------------------------------


def test_what_is_not_given_is_the_stores(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = file(
        tmp_path,
        'prompts = ["autumn", "snowy"]\nsize = 48\nedit_size = 64\nvariants = 2\nseed = 7\nformat = "png"\n'
        'resize = "keep"\n[class_prompts]\n"class 0" = ["mosaic"]\n[deny]\n"class 1" = ["autumn"]\n',
    )
    store = tmp_path / "edits"
    run("generate", root, store, "--device", "cpu", "--config", config)
    before = {one.name: one.read_bytes() for one in store.rglob("*") if one.is_file()}
    assert "all were there already" in run("generate", root, store, "--device", "cpu").stdout
    assert {one.name: one.read_bytes() for one in store.rglob("*") if one.is_file()} == before
    assert GenerateConfig.from_store(store) == GenerateConfig(
        prompts=("autumn", "snowy"),
        class_prompts={"class 0": ("mosaic",)},
        size=48,
        edit_size=64,
        variants=2,
        seed=7,
        format="png",
        resize="keep",
    )
    # One more photograph and one more prompt, with all else as it was.
    write_photograph(root / "class 0" / "new.jpg", 50, 40, 50)
    run("index", root, "--refresh")
    made = run_json("generate", root, store, "--device", "cpu", "--retry", 1)
    assert made["made"] == 2 * 3 and EditStore.open(store).settings["retry"] == 1
    assert run_json("generate", root, store, "--device", "cpu", "--prompts", "rainbow")["made"] == 2 * 5
    assert run_json("generate", root, store, "--device", "cpu", "--prompts", "mosaic", "--variants", 1)["made"] == 2
    # Nothing that decides an edit changes silently.
    assert (
        "size: 48 in the store, 64 asked for"
        in run("generate", root, store, "--device", "cpu", "--size", 64, code=1).stderr
    )
    refused = run("generate", root, store, "--device", "cpu", "--format", "jpeg", code=1).stderr
    assert "format: 'png' in the store" in refused
    refused = run("generate", root, store, "--device", "cpu", "--editor", "test_options_file:Framed", code=1).stderr
    assert "editor: 'procedural' in the store, 'test_options_file:Framed' asked for" in refused


def test_classes_in_a_file_without_the_stores_prompts(root: Path, tmp_path: Path) -> None:
    """Rules may name prompts of the store that the file does not."""
    store = tmp_path / "edits"
    made = run_json("generate", root, store, "--device", "cpu", "--size", 32, "--prompts", "autumn,snowy,mosaic")[
        "made"
    ]
    assert made == 3 * 4

    def used(text: str) -> set[tuple[str, str]]:
        assert run_json("generate", root, store, "--device", "cpu", "--config", file(tmp_path, text))["made"] == 0
        edits = EditStore.open(store)
        classes = edits.catalog.labels[edits.index["original"]]
        return {
            (edits.prompts[prompt], f"class {label}")
            for prompt, label in zip(edits.index["prompt"], classes, strict=True)
        }

    every = {(prompt, name) for prompt in ("autumn", "snowy", "mosaic") for name in ("class 0", "class 1")}
    without = every - {("snowy", "class 0"), ("snowy", "class 1")}
    assert used('prompts = ["autumn"]\n[deny]\n"*" = ["snowy"]\n') == without
    # A prompt of all classes becomes one of some.
    assert used('[class_prompts]\n"class 1" = ["mosaic"]\n') == without - {("mosaic", "class 0")}
    text = 'prompts = ["mosaic"]\n[class_prompts]\n"class 1" = ["mosaic"]\n'
    refused = run("generate", root, store, "--config", file(tmp_path, text), code=1).stderr
    assert "class_prompts: 'class 1' must have prompts of its own, found 'mosaic'" in refused


def test_the_editor_of_a_store() -> None:
    """What a store knows of each kind."""
    assert editor_of_store(ProceduralConfig().settings()) == ProceduralConfig()
    server = ServerConfig(url="http://here/v1", model="m", steps=4, fields={"true_cfg_scale": 4.0}, multiple=8)
    with pytest.raises(ConfigError, match=r"editor must be given again: .* by a server, 'm'"):
        editor_of_store(server.settings())
    again = editor_of_store(server.settings(), "http://there/v1", {"requests": 2})
    assert again.settings() == server.settings() and isinstance(again, ServerConfig)
    assert (again.url, again.requests) == ("http://there/v1", 2)
    assert editor_of_store(server.settings(), "procedural") == ProceduralConfig()
    hub = {"editor": "diffusers", "model": "a/b", "revision": "c0ffee", "steps": 7, "guidance": 4.0}
    assert editor_of_store(hub) == DiffusersConfig(model="a/b", revision="c0ffee", steps=7, guidance=4.0)
    assert editor_of_store(hub, options={"steps": 8}) == DiffusersConfig(
        model="a/b", revision="c0ffee", steps=8, guidance=4.0
    )
    folder = {**hub, "model": "b", "revision": "sha256:1"}
    with pytest.raises(ConfigError, match="a model in a folder, or with a LoRA, 'b'"):
        editor_of_store(folder)
    assert editor_of_store(folder, "models/b") == DiffusersConfig(model="models/b", steps=7, guidance=4.0)


class Framed:
    """An editor of one's own, with options of all kinds."""

    version = 1

    def __init__(self, width: int = 2, colour: list[int] | None = None, name: str = "frame") -> None:
        self.width, self.colour = width, colour

    def edit(self, images: Any, tasks: Any) -> list[Any]:
        return [images[task.image] for task in tasks]


def test_the_editor_of_a_store_is_ones_own() -> None:
    name = "test_options_file:Framed"
    config = choose_editor(name, {"editor_options": {"width": 3, "colour": [1, 2, 3]}})
    with pytest.raises(ConfigError, match=f"by an editor of your own, '{name}'"):
        editor_of_store(config.settings())  # a store does not choose what is imported
    assert editor_of_store(config.settings(), name).settings() == config.settings()
    changed = editor_of_store(config.settings(), name, options={"editor_options": {"width": 4}}).settings()
    assert changed == {**config.settings(), "option width": 4}


def test_a_dry_run_tells_and_writes_nothing(root: Path, tmp_path: Path) -> None:
    options = ("generate", root, tmp_path / "edits", "--size", 48, "--prompts", "autumn,snowy", "--device", "cpu")
    found = run_json(*options, "--dry-run")
    assert found["edits"] == 8 and found["tried"] == 8 and found["seconds"] > 0 and found["bytes"] > 0
    assert not (tmp_path / "edits").exists()
    shown = run(*options, "--dry-run").stdout
    assert re.fullmatch(
        r"8 edits would be made\nabout [\d.]+ kB and \d+ seconds on 1 worker, from 8 edits made for the estimate\n",
        shown,
    )
    run(*options)
    assert run(*options, "--dry-run").stdout == "0 edits would be made\n"
    assert "must be rejected, unreadable" in run(*options, "--redo", "all", code=2).stderr
