"""cli, demo: every command as a user runs it; results on stdout, all else on stderr, errors without a traceback."""

import contextlib
import importlib.util
import json
import logging
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from material import write_photograph, write_photographs
from PIL import Image

import dali_diffusemix
from dali_diffusemix import cli, demo
from dali_diffusemix.catalog import default_location
from dali_diffusemix.cli import display
from dali_diffusemix.errors import CatalogError, ConfigError, MissingDependencyError
from dali_diffusemix.generate.editors import PROMPTS
from dali_diffusemix.loading.dataset import DiffuseMixDataset
from dali_diffusemix.plan.crops import TrainCrop
from dali_diffusemix.store import EditStore

SHARED = Path(__file__).parents[2] / "shared"
COMMANDS = (
    "index",
    "fractals",
    "generate",
    "verify",
    "report",
    "review",
    "score",
    "export",
    "pack",
    "preview",
    "bench",
    "doctor",
    "demo",
    "completion",
)
PROGRAM = [sys.executable, "-c", "from dali_diffusemix.cli import main; main(prog_name='dali-diffusemix')"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catalogs of tests stay among them."""
    monkeypatch.setenv("DALI_DIFFUSEMIX_CACHE", str(tmp_path_factory.mktemp("cache")))


def make_images(root: Path, classes: int = 3, images: int = 4) -> Path:
    return write_photographs(root, [f"class {label}" for label in range(classes)], images)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_images(tmp_path / "root")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """root/, edits/ and fractals.npy, for tests that only read them."""
    folder = tmp_path_factory.mktemp("made")
    make_images(folder / "root")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DALI_DIFFUSEMIX_CACHE", str(folder / "cache"))
        run("generate", folder / "root", folder / "edits", "--prompts", "autumn,snowy", "--size", 48)
        run("fractals", folder / "fractals.npy", "--count", 2, "--size", 32)
    return folder


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments], prog_name="dali-diffusemix")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def run_json(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.stderr == ""
    content = json.loads(result.stdout)
    assert isinstance(content, dict)
    return content


def process(*arguments: str | Path, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, env={**os.environ, **environment}, timeout=60)


# Help -----------------------------------------------------------------------------------------------------------------


def help_lines(*command: str) -> list[str]:
    """What a terminal of 80 columns and 24 rows shows. Click fills two columns less, but not under its own runner."""
    shown = CliRunner().invoke(cli.main, [*command, "--help"], prog_name="dali-diffusemix", terminal_width=78)
    lines = shown.stdout.splitlines()
    rows = {("generate",): 45, (): 25}.get(command, 24)  # it has the most options, and all commands are listed
    assert len(lines) <= rows and max(map(len, lines)) <= 80
    return lines


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_and_has_an_example(command: str) -> None:
    lines = help_lines(command)
    example = lines[lines.index("  Example:") + 1].split()
    assert example[:2] == ["dali-diffusemix", command]
    # The example is one that the command takes.
    cli.main.commands[command].make_context(command, example[2:])


def test_the_main_help_fits_a_screen_and_cuts_nothing_off() -> None:
    lines = help_lines()
    assert not [line for line in lines[1:] if line.endswith("...")]


def options_of(command: click.Command) -> list[click.Option]:
    return [param for param in command.params if isinstance(param, click.Option)]


def test_help_texts_are_sentences() -> None:
    """They begin with a capital letter, a name or a number, and end with a full stop and the default, if any."""
    texts = {name: command.short_help or "" for name, command in cli.main.commands.items()}
    for name, command in cli.main.commands.items():
        texts[f"{name} --help"] = (command.help or "").split("\n\n")[0].replace("\n", " ").strip()
        texts |= {f"{name} {option.opts[-1]}": option.help or "" for option in options_of(command)}
    wrong = {name: text for name, text in texts.items() if not re.fullmatch(r"[A-Z].*\.(  \[default: .+\])?", text)}
    assert not wrong


def test_a_name_means_one_thing_in_all_commands() -> None:
    """What the options of several commands are called, and that other names for the same are gone."""
    named: dict[str, set[str]] = {}
    for command in cli.main.commands.values():
        for option in options_of(command):
            named.setdefault(option.opts[-1], set()).add(str(option.metavar))
    shown = {name: metavars for name, metavars in named.items() if len(metavars) > 1}
    assert shown == {"--out": {"DIR", "FILE"}}  # a folder of `report`, `export` and `demo`, a picture of `preview`
    gone = {"--threads", "--crop-size", "--rows", "--most", "--images", "--epoch", "--parts", "--from", "--replace"}
    assert not gone & set(named)
    arguments = {
        param.make_metavar(click.Context(command)).strip("[]")
        for command in cli.main.commands.values()
        for param in command.params
        if isinstance(param, click.Argument)
    }
    assert arguments == {"ROOT", "STORE", "SOURCE", "FILE", "SHELL"}


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from dali_diffusemix.cli import main; main(['--help'], standalone_mode=False); "
        "sys.exit(str([name for name in ('torch', 'nvidia', 'numpy', 'PIL') if name in sys.modules]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.strip() == "[]"
    assert all(f"\n  {command} " in result.stdout for command in COMMANDS)
    seconds = []
    for _ in range(3):
        begin = os.times()
        process("--help")
        end = os.times()  # of the processor: what else runs on the machine does not count
        seconds.append(end.children_user + end.children_system - begin.children_user - begin.children_system)
    assert min(seconds) < 0.5


def test_version() -> None:
    first, second, *packages = run("--version").stdout.splitlines()
    assert first == f"dali-diffusemix, version {dali_diffusemix.__version__}"
    assert second == f"Python {platform.python_version()}"
    assert f"numpy {np.__version__}" in packages


# Commands, end to end -------------------------------------------------------------------------------------------------


def test_from_a_folder_to_a_sheet(root: Path, tmp_path: Path) -> None:
    (root / "class 0" / "moving.gif").write_bytes(b"GIF89a....")
    listed = run("index", root)
    assert "12 images in 3 classes\n       4  class 0\n" in listed.stdout
    assert "1 left out\n  class 0/moving.gif: unsupported" in listed.stdout
    assert f"kept in {default_location(root)}" in listed.stdout
    assert listed.stderr == ""

    edits, bank, sheet = tmp_path / "edits", tmp_path / "deep" / "fractals.npy", tmp_path / "new" / "sheet.png"
    generated = run("generate", root, edits, "--prompts", "autumn, snowy", "--size", "48", "--variants", "2")
    assert "48 edits of 12 images\nrestyled by the procedural editor: not diffusion\n48 made now" in generated.stdout
    assert "1 files left out; `dali-diffusemix index` lists them" in generated.stdout
    again = run("generate", root, edits, "--prompts", "autumn,snowy", "--size", "48", "--variants", "2")
    assert "all were there already" in again.stdout
    assert run("fractals", bank, "--count", 2, "--size", 32).stdout == f"2 fractals of 32 x 32 pixels in {bank}\n"

    arguments = ("preview", root, "--edits", edits, "--fractals", bank, "--out", sheet, "--size", 64)
    drawn = run(*arguments, "--limit", 3)
    with Image.open(sheet) as image:
        assert drawn.stdout == f"3 samples in {sheet}, {image.width} x {image.height} pixels\n"
        assert image.format == "PNG"
    before = sheet.read_bytes()
    run(*arguments, "--limit", 3)
    assert sheet.read_bytes() == before
    for other in (("--seed", 1), ("--epochs", 1), ("--preset", "release"), ("--indices", "1,2")):
        run(*arguments, "--limit", 3, *other)
        assert sheet.read_bytes() != before
    assert sorted(path.name for path in sheet.parent.iterdir()) == ["sheet.png"]


def test_json_is_one_object_and_nothing_else(root: Path, tmp_path: Path) -> None:
    (root / "class 0" / "moving.gif").write_bytes(b"GIF89a....")
    listed = run_json("index", root)
    assert listed["images"] == 12 and listed["classes"] == {"class 0": 4, "class 1": 4, "class 2": 4}
    assert [one["path"] for one in listed["rejected"]] == ["class 0/moving.gif"]
    generated = run_json("generate", root, tmp_path / "edits", "--prompts", "autumn", "--size", 48)
    assert generated["verdicts"]["accepted"] == generated["made"] == 12
    assert generated["images_per_second"] == pytest.approx(12 / generated["seconds"])
    assert run_json("fractals", tmp_path / "f.npy", "--count", 2, "--size", 32)["shape"] == [2, 32, 32, 3]
    arguments = ("--edits", tmp_path / "edits", "--fractals", tmp_path / "f.npy", "--out", tmp_path / "sheet.png")
    drawn = run_json("preview", root, *arguments, "--indices", "7,3", "--size", 64)
    assert drawn["indices"] == [7, 3]
    with Image.open(tmp_path / "sheet.png") as image:
        assert (drawn["width"], drawn["height"]) == image.size


@pytest.mark.slow
def test_preview_draws_epochs_presets_parts_and_animations(made: Path, tmp_path: Path) -> None:
    stores = ("--edits", made / "edits", "--fractals", made / "fractals.npy")
    given = ("preview", made / "root", *stores, "--size", 64)

    def drawn(name: str, *options: object) -> dict[str, Any]:
        file = tmp_path / name
        result = run_json(*given, "--out", file, *options)
        with Image.open(file) as image:
            assert (result["width"], result["height"]) == image.size
            assert result["frames"] == getattr(image, "n_frames", 1)
        content = file.read_bytes()
        run(*given, "--out", file, *options)
        assert file.read_bytes() == content
        return result

    plain = drawn("contact.png", "--indices", "3,1")
    assert {name: plain[name] for name in ("indices", "epochs", "presets")} == {
        "indices": [3, 1],
        "epochs": [0],
        "presets": ["paper"],
    }
    assert drawn("epochs.jpg", "--epochs", "0-2,7", "--limit", 2)["epochs"] == [0, 1, 2, 7]
    parts = drawn("parts.png", "--decoded", "--indices", "0,1,2,3,4,5,6,7")["decoded"]
    assert len(parts) == 8
    for one in parts:
        assert 0 < one["both"] <= 1 and 0 <= one["original"] <= 1
        assert one["both"] == one["original"] if one["edit"] is None else 0 <= one["edit"] <= 1
    presets = drawn("presets.png", "--preset", "paper,release", "--indices", "5,2")
    assert presets["indices"] == presets["samples"]["paper"] == [5, 2]
    store = EditStore.open(made / "edits")
    for index, original in zip(presets["samples"]["release"], [5, 2], strict=True):
        assert index == original or store.index["original"][index - 12] == original
    for name in ("one.webp", "one.gif"):
        animated = drawn(name, "--epochs", "0-3", "--indices", "5")
        assert (animated["frames"], animated["epochs"], animated["indices"]) == (4, [0, 1, 2, 3], [5])
    assert len(drawn("one.WEBP", "--epochs", "4,2", "--preset", "release")["indices"]) == 1
    shown = run(*given, "--out", tmp_path / "one.webp", "--epochs", "0-3", "--indices", 5).stdout
    assert shown == f"sample 5 in 4 epochs in {tmp_path / 'one.webp'}, 256 x 310 pixels\n"


def test_index_refreshes_when_told_to(root: Path) -> None:
    assert run_json("index", root)["images"] == 12
    (root / "class 1" / "4.jpg").write_bytes((root / "class 1" / "3.jpg").read_bytes())
    stale = run("index", root)
    assert stale.stdout.startswith("12 images")
    assert stale.stderr.startswith("Warning: ") and "--refresh" in stale.stderr
    assert run_json("index", root, "--refresh", "--workers", 1)["images"] == 13


def test_many_classes_are_not_all_printed(tmp_path: Path) -> None:
    lines = run("index", make_images(tmp_path / "root", classes=25, images=1)).stdout.splitlines()
    assert lines[0] == "25 images in 25 classes"
    assert lines[21] == "     ...  and 5 more"


def test_fractals_from_a_folder(root: Path, tmp_path: Path) -> None:
    (root / "notes.txt").write_text("none")
    result = run("fractals", tmp_path / "bank.npy", "--from-folder", root, "--size", 32)
    assert "12 fractals of 32 x 32 pixels" in result.stdout
    assert f"1 files left out\n  {root / 'notes.txt'}: " in result.stdout
    assert run("fractals", tmp_path / "bank.npy", code=1).stderr.startswith("Error: ")
    run("fractals", tmp_path / "bank.npy", "--from-folder", root, "--size", 16, "--overwrite")
    assert np.load(tmp_path / "bank.npy").shape == (12, 16, 16, 3)
    wrong = run("fractals", tmp_path / "bank.npy", "--from-folder", root, "--seed", 1, code=2)
    assert "--seed is for rendering" in wrong.stderr


def test_generate_reports_originals_that_cannot_be_read(root: Path, tmp_path: Path) -> None:
    file = root / "class 2" / "1.jpg"
    file.write_bytes(file.read_bytes()[:1000])
    result = run("generate", root, tmp_path / "edits", "--prompts", "autumn,snowy", "--size", 48)
    assert "22 edits of 12 images\n2 not used: unreadable original\n" in result.stdout
    assert "class 2/1.jpg" in result.stderr and result.stderr.startswith("Warning: ")


@pytest.mark.skipif(not (SHARED / "data" / "ants_bees").is_dir(), reason="the shared ants_bees photographs are missing")
def test_the_gif_among_the_ants_is_reported() -> None:
    listed = run_json("index", SHARED / "data" / "ants_bees" / "train")
    assert listed["images"] == 244
    assert [Path(one["path"]).suffix for one in listed["rejected"]] == [".gif"]
    assert "unsupported" in listed["rejected"][0]["reason"]


# What goes wrong ------------------------------------------------------------------------------------------------------


def test_errors_are_one_message_with_a_remedy(made: Path, tmp_path: Path) -> None:
    root, edits, bank = made / "root", made / "edits", made / "fractals.npy"
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.png").mkdir()
    np.save(tmp_path / "flat.npy", np.zeros((4, 4)))
    drawing = ("--edits", edits, "--fractals", bank)
    cases: list[tuple[tuple[object, ...], str]] = [
        (("index", tmp_path / "none"), "expected one with root/class/image.jpg"),
        (("index", tmp_path / "empty"), "move the images of each class to a folder of its own"),
        (("index", root, "--refresh", "--workers", 0), "workers must be"),
        (("fractals", bank), "name another file"),
        (("fractals", tmp_path / "f.npy", "--size", 7), "size must lie in 16 to 1024, found 7"),
        (("fractals", tmp_path / "file" / "f.npy"), "name another file"),
        (("generate", root, tmp_path / "e", "--prompts", "autumn,fog"), "these are 'autumn'"),
        (("generate", root, tmp_path / "e", "--editor", "magic"), "model must be a folder or a hub id"),
        (("generate", root, tmp_path / "e", "--editor", tmp_path), "must be a saved pipeline with a model_index.json"),
        (("generate", root, tmp_path / "e", "--part", "3/2"), "part must be i/n"),
        (("generate", root, tmp_path / "e", "--retry", 101), "retry must be a whole number from 0 to 100"),
        (("generate", root, edits, "--size", 64), "give another folder"),
        (("generate", root, root / "edits"), "store must lie outside the root"),
        (("generate", root, tmp_path / "file" / "e"), "cannot be written"),
        (("preview", root, "--edits", tmp_path, "--fractals", bank), "make one with `dali-diffusemix generate"),
        (("preview", root, "--edits", edits, "--fractals", tmp_path / "flat.npy"), "dali-diffusemix fractals"),
        (("preview", tmp_path / "empty", *drawing), "give the folder that they were generated from"),
        (("preview", root, *drawing, "--indices", "1,99"), "index must lie in [0, 12)"),
        (("preview", root, *drawing, "--out", tmp_path / "file" / "sheet.png"), "name another"),
        (("preview", root, *drawing, "--out", tmp_path / "folder.png"), "name another"),
        (("preview", root, *drawing, "--decoded", "--indices", "12"), "index must lie in [0, 12)"),
        (("preview", root, *drawing, "--epochs", "5000000000"), "epoch must be at least 0 and below 2**32"),
        (
            ("preview", root, *drawing, "--out", tmp_path / "x.gif", "--epochs", "0-1", "--indices", "12"),
            "index must lie in [0, 12)",
        ),
        (
            ("preview", root, *drawing, "--preset", "release,paper", "--indices", "1,30"),
            "show the same originals.\nWith several presets, --indices names originals",
        ),
        (("demo", "--out", root), "name another with --out"),
        (("demo", "--out", tmp_path / "file" / "demo"), "name another with --out"),
    ]
    for arguments, remedy in cases:
        result = run(*arguments, code=1)
        assert result.stderr.startswith("Error: "), arguments
        assert remedy in result.stderr, arguments
        assert "Traceback" not in result.output
        assert result.stdout == "", arguments
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_folder_of_splits_is_refused_with_the_command_to_type(made: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for split in ("train", "val"):
        shutil.copytree(made / "root", data / split)
    for before, after in (
        (("index",), ()),
        (("-q", "generate"), (str(tmp_path / "edits"), "--prompts", "autumn")),
        (("pack",), (str(tmp_path / "packed"),)),
        (("bench",), ("--limit", "8")),
        (("demo",), ("--out", str(tmp_path / "demo"))),
    ):
        result = run(*before, data, *after, code=1)
        assert "look like splits of a dataset: found 'train', 'val', and 'train' holds folders" in result.stderr
        command = shlex.join(["dali-diffusemix", *before, str(data / "train"), *after])
        assert result.stderr.splitlines()[-1] == f"Try: {command}"
    with pytest.raises(CatalogError, match="look like splits of a dataset"):
        DiffuseMixDataset(data, crop=TrainCrop(32))
    with contextlib.chdir(tmp_path):
        assert run("index", "data", code=1).stderr.splitlines()[-1] == "Try: dali-diffusemix index data/train"
        assert run("index", "data/train").stdout.startswith("12 images in 3 classes")


def test_swapped_arguments_are_named(made: Path, tmp_path: Path) -> None:
    run("pack", made / "root", tmp_path / "packed")
    with contextlib.chdir(made):
        for command in ("generate", "export", "pack"):
            result = run(command, "edits", "root", code=1)
            assert result.stderr == (
                "Error: 'edits' is an edit store, 'root' is a folder of images: are the two arguments swapped?\n"
                f"Try: dali-diffusemix {command} root edits\n"
            )
    assert "packed' is a packed store, '" in run("generate", tmp_path / "packed", made / "root", code=1).stderr
    for command in (("verify",), ("report",), ("score", "--with", "clip:x")):
        refused = run(*command, made / "root", code=1).stderr
        assert "root' is a folder of images, not an edit store; give the one that was made of it" in refused
    assert "root must be a folder of images, found an edit store" in run("index", made / "edits", code=1).stderr
    # Not swapped: a packed store may be the root, and a store may be packed.
    run("generate", tmp_path / "packed", tmp_path / "edits", "--prompts", "autumn", "--size", 32)
    run("pack", made / "edits", tmp_path / "raw")


def test_what_is_misspelt_is_asked_back(root: Path, tmp_path: Path) -> None:
    for arguments, meant in (
        (("indx", root), "'index'"),
        (("index", root, "--refesh"), "'--refresh'"),
    ):
        assert f"Did you mean {meant}" in run(*arguments, code=2).stderr
    for option, value, meant in (
        ("--prompts", "autumn,snwy", "snowy"),
        ("--format", "jpg", "jpeg"),
        ("--editor", "Procedural", "procedural"),
        ("--layout", "flower", "flowers"),
    ):
        assert f"did you mean {meant!r}?" in run("generate", root, tmp_path / "e", option, value, code=1).stderr
    assert "did you mean 'cifar100'?" in run("pack", root, tmp_path / "p", "--layout", "cifar-100", code=1).stderr
    nothing = run("generate", root, tmp_path / "e", "--prompts", "fog", code=1).stderr
    assert "did you mean" not in nothing and "these are 'autumn'" in nothing


@pytest.mark.parametrize("before", [True, False])
def test_quiet_shows_the_result_and_errors(root: Path, before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "_LINE_SECONDS", 0.0)
    run("index", root)
    (root / "class 1" / "4.jpg").write_bytes((root / "class 1" / "3.jpg").read_bytes())
    loud = run("index", root)
    assert "Warning: " in loud.stderr
    quiet = run("-q", "index", root) if before else run("index", root, "--quiet")
    assert (quiet.stdout, quiet.stderr) == (loud.stdout, "")
    assert "Reading headers: " in run("index", root, "--refresh").stderr
    again = run("-q", "index", root, "--refresh") if before else run("index", root, "--refresh", "-q")
    assert again.stderr == "" and again.stdout.startswith("13 images")
    arguments = ("-q", "index", root / "none") if before else ("index", root / "none", "-q")
    assert run(*arguments, code=1).stderr.startswith("Error: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("unknown",),
        ("index",),
        ("fractals", "f.npy", "--count", "many"),
        ("generate", "a", "b", "--prompts", "autumn,,snowy"),
        ("preview", "a", "--edits", "e", "--fractals", "f", "--indices", "1,x"),
        ("preview", "a", "--edits", "e", "--fractals", "f", "--preset", "mine"),
        ("preview", "a", "--edits", "e"),
    ],
)
def test_a_wrong_command_line_is_code_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments, code=2)
    assert "Usage: dali-diffusemix" in result.stderr and result.stdout == ""


@pytest.mark.parametrize(
    ("options", "found", "remedy"),
    [
        ("--epochs 0-x", "'0-x' must be epochs", "write 0-5 or 0,3,7"),
        ("--epochs 5-3", "'5-3' must be epochs", "write 0-5 or 0,3,7"),
        ("--epochs 0-1000000000", "must be at most 100 epochs", "draw fewer at once"),
        ("--limit 0", "'0' must be a whole number, from 1 to 64", "--limit"),
        ("--limit 65", "'65' must be a whole number, from 1 to 64", "--limit"),
        ("--epochs 1,2 --decoded", "--epochs and --decoded draw different sheets", "leave one of them out"),
        ("--decoded --preset paper,release", "--decoded and --preset with several names", "leave one of them out"),
        ("--preset paper,paper", "'paper,paper' must be one of paper, release", "or both as paper,release"),
        ("--out sheet.tiff", "'sheet.tiff' must end in .png or .jpg", "for an animation in .webp or .gif"),
        ("--out sheet", "found 'no ending'", "must end in .png or .jpg"),
        ("--out x.webp", ".webp is an animation over epochs", "name them, as in --epochs 0-11"),
        ("--out x.gif --epochs 1,2 --indices 1,2", "of one sample, found --indices 1,2", "name one, as in --indices 5"),
        ("--out x.gif --epochs 1,2 --limit 2", "of one sample, found --limit 2", "name one, as in --indices 5"),
    ],
)
def test_a_wrong_picture_is_refused_before_anything_is_read(options: str, found: str, remedy: str) -> None:
    result = run("preview", "a", "--edits", "e", "--fractals", "f", *options.split(), code=2)
    assert found in result.stderr and remedy in result.stderr and result.stdout == ""


def test_notes_are_shown_and_unexpected_errors_keep_their_traceback(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ConfigError("seed must be small, found 7; take another")
    error.add_note("sample 3 of epoch 1: a/b.jpg")

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("dali_diffusemix.catalog.listing.index", fail)
    assert run("index", root, code=1).stderr == f"Error: {error}\nsample 3 of epoch 1: a/b.jpg\n"
    monkeypatch.setattr("dali_diffusemix.catalog.table.default_location", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("index", root)


@pytest.mark.slow
def test_names_that_are_no_text_are_printed_safely(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9 '\"\n\x1b[31m")
    root = tmp_path / os.fsdecode(b"r\xff")
    (root / name).mkdir(parents=True)
    write_photograph(tmp_path / "image.jpg", 0, 30, 40)
    (tmp_path / "image.jpg").rename(root / name / os.fsdecode(b"\xfe.jpg"))
    (root / name / os.fsdecode(b"\xfd\n.gif")).write_bytes(b"GIF89a....")
    for environment in (
        {},
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ):
        result = process("index", root, "--refresh", **environment)
        assert (result.returncode, result.stderr) == (0, b""), result
        assert b"       1  caf\\xe9 '\"\\n\\x1b[31m\n" in result.stdout
        assert b"  caf\\xe9 '\"\\n\\x1b[31m/\\xfd\\n.gif: unsupported" in result.stdout
        assert all(32 <= byte < 127 or byte == 10 for byte in result.stdout)
    listed = json.loads(process("index", root, "--json").stdout)
    assert [one["path"] for one in listed["rejected"]] == [name + os.fsdecode(b"/\xfd\n.gif")]
    edits, bank = tmp_path / os.fsdecode(b"edits\xff"), tmp_path / "f.npy"
    run("fractals", bank, "--count", 1, "--size", 16)
    assert process("generate", root, edits, "--prompts", "autumn", "--size", "32").returncode == 0
    sheet = tmp_path / os.fsdecode(b"\xfa.png")
    drawn = process("preview", root, "--edits", edits, "--fractals", bank, "--out", sheet, "--size", "32")
    assert (drawn.returncode, drawn.stderr) == (0, b"") and b"/\\xfa.png, " in drawn.stdout
    failed = process("index", root / os.fsdecode(b"none\xfb"))
    assert failed.returncode == 1 and failed.stderr.startswith(b"Error: ") and b"Traceback" not in failed.stderr


def test_a_folder_that_may_not_be_written_is_named() -> None:
    # Root may write anywhere, so it becomes nobody, once what is needed is imported.
    code = (
        "import os, dali_diffusemix.fractals; from dali_diffusemix.cli import main; "
        "os.geteuid() or os.seteuid(65534); main(prog_name='dali-diffusemix')"
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        bank = str(Path(folder) / "f.npy")
        command = [sys.executable, "-c", code, "fractals", bank, "--count", "1", "--size", "16"]
        result = subprocess.run(command, capture_output=True, text=True)
        Path(folder).chmod(0o755)
    assert result.returncode == 1
    assert result.stderr.startswith(f"Error: fractal bank {bank}: ") and "Permission denied" in result.stderr
    assert "name another file" in result.stderr and "Traceback" not in result.stderr


def test_an_interrupt_is_code_130_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    command = [*PROGRAM, "fractals", str(tmp_path / "f.npy"), "--count", "5000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        for _ in range(200):
            if any(tmp_path.iterdir()):
                break
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        stdout, stderr = running.communicate(timeout=30)
    assert (running.returncode, stdout) == (130, "")
    assert stderr == "Interrupted: nothing is kept of it.\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [("index", "{root}"), ("index", "{root}", "--json"), ("--version",)])
def test_output_to_a_full_disk_is_one_line(root: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    command = [*PROGRAM, *(argument.format(root=root) for argument in arguments)]
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert result.stderr == (
        "Error: standard output must take what is printed, found: No space left on device; make room, or name another "
        "file\n"
    )
    # A file keeps what could not be written, which the interpreter then tries again.
    limit = (resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    code = f"import resource; resource.setrlimit(*{limit}); {PROGRAM[2]}"
    run("index", root)
    with (tmp_path / "output").open("wb") as file:
        command[:3] = [sys.executable, "-c", code]
        result = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1 and "File too large" in result.stderr and result.stderr.count("\n") == 1


def test_a_closed_pipe_is_no_error_to_speak_of(root: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run([*PROGRAM, "index", str(root)], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


# What is shown --------------------------------------------------------------------------------------------------------


def test_long_work_in_a_log_file_has_a_line_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "_LINE_SECONDS", 0.0)
    lines = run("fractals", tmp_path / "f.npy", "--count", 3, "--size", 16).stderr.splitlines()
    assert len(lines) == 3
    assert lines == [f"Rendering fractals: {done} of 3" for done in (1, 2, 3)]  # a rate of so little means nothing
    monkeypatch.setattr(display, "_RATE_SECONDS", 0.0)
    lines = run("fractals", tmp_path / "g.npy", "--count", 3, "--size", 16).stderr.splitlines()
    assert re.fullmatch(r"Rendering fractals: 2 of 3, [\d,.]+ fractals/s, 0 seconds left", lines[1])


def test_rates_have_three_digits_and_are_of_work_that_took_a_second() -> None:
    assert display.readable_rate(55685, 0.9, "shards") == display.readable_rate(0, 9, "shards") == ""
    for count, seconds, shown in (
        (556855, 10, "55,700 edits/s"),
        (12345, 10, "1,230 edits/s"),
        (2839, 10, "284 edits/s"),
        (91.84, 10, "9.18 edits/s"),
        (1, 2, "0.5 edits/s"),
        (1, 600, "0.1 edits/min"),
    ):
        assert display.readable_rate(count, seconds, "edits") == shown
    assert display.readable_rate(123_456_789, 10, "bytes") == "12.3 MB/s"


def test_warnings_and_log_records_are_lines(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def note(*_: object, **__: object) -> None:
        logging.getLogger("dali_diffusemix.catalog").warning("disk %s is slow", "a")
        warnings.warn_explicit("old \udcff", UserWarning, "catalog.py", 1, "dali_diffusemix.catalog")
        raise ConfigError("enough")

    monkeypatch.setattr("dali_diffusemix.catalog.listing.index", note)
    before = warnings.showwarning, list(logging.getLogger("dali_diffusemix").handlers)
    result = run("index", root, code=1)
    assert result.stderr == "Warning: disk a is slow\nWarning: old \\xff\nError: enough\n"
    assert before == (warnings.showwarning, list(logging.getLogger("dali_diffusemix").handlers))


@pytest.mark.parametrize("is_terminal", [True, False])
def test_facts_fit_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_terminal: bool
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    monkeypatch.setenv("COLUMNS", "60")
    with click.Context(cli.main):
        display.Display(as_json=False).fact("Equality", "sixteen samples " * 8)
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("Equality     sixteen samples") and len(others) == 2 * is_terminal
    assert all(line.startswith(" " * 13 + "s") and len(line) <= 60 for line in others)


# The demonstration ----------------------------------------------------------------------------------------------------


@pytest.fixture
def short_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, with little of everything."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    for name, value in {"_CUTS": 2, "_FRACTALS": 2, "_SIZE": 64, "_MEASURED_SECONDS": 0.1}.items():
        monkeypatch.setattr(demo, name, value)


@pytest.mark.slow
@pytest.mark.usefixtures("short_demo")
def test_the_demo_goes_the_whole_way_again_and_again(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    out = tmp_path / "demo"
    shown = run("demo", "--out", out)
    assert "Photographs  16 in 8 classes" in shown.stdout
    assert "not diffusion" in shown.stdout
    assert "16 samples are identical by DALI and by Pillow under torch's DataLoader" in shown.stdout
    assert "images (16, 3, 224, 224) float32, labels (16,) int64, on the CPU" in shown.stdout
    assert "images/s" in shown.stdout and f"Sheet        {out / 'sheet.png'}" in shown.stdout
    assert shown.stderr == ""
    sheet, photographs = (out / "sheet.png").read_bytes(), sorted((out / "photographs").rglob("*.jpg"))
    for photograph in photographs:
        with Image.open(photograph) as image:
            assert 250 <= min(image.size) <= max(image.size) <= 500
    # Anew: the same; kept: nothing is made twice.
    times = [photograph.stat().st_mtime_ns for photograph in photographs]
    result = run_json("demo", "--out", out, "--keep")
    assert [photograph.stat().st_mtime_ns for photograph in photographs] == times
    assert result["largest_difference"] <= 2 and result["compared"] == 16 and result["edits"] == 16 * len(PROMPTS)
    assert (result["identical"] == 16) == (result["largest_difference"] == 0)
    (out / "sheet.png").unlink()
    run("demo", "--out", out)
    assert [photograph.stat().st_mtime_ns for photograph in photographs] != times
    assert (out / "sheet.png").read_bytes() == sheet


@pytest.mark.usefixtures("short_demo")
def test_the_demo_takes_some_of_a_users_folder(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_MOST_ORIGINALS", 6)
    before = sorted(root.rglob("*"))
    shown = run("demo", root, "--out", tmp_path / "demo")
    assert "Photographs  12 in 3 classes; the demo uses 6" in shown.stdout
    store = EditStore.open(tmp_path / "demo" / "edits")
    assert np.bincount(store.catalog.labels).tolist() == [2, 2, 2]
    assert sorted(root.rglob("*")) == before
    other = run("demo", make_images(tmp_path / "other"), "--out", tmp_path / "demo", "--keep", code=1)
    assert "omit --keep" in other.stderr


def test_the_demo_names_the_packages_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else found(name))
    result = run("demo", "--out", tmp_path / "demo", code=1)
    assert "pip install scikit-image scikit-learn" in result.stderr
    assert not (tmp_path / "demo").exists()
    with pytest.raises(MissingDependencyError):
        demo._find_photographs()


def test_the_demo_touches_no_other_files(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text('{"magic": "something else"}')
    (tmp_path / "edits").mkdir()
    assert "found other files" in run("demo", "--out", tmp_path, code=1).stderr
    assert (tmp_path / "edits").is_dir()


def test_commands_are_the_ones_of_the_design() -> None:
    assert cli.main.list_commands(click.Context(cli.main)) == list(COMMANDS)
