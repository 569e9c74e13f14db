"""Every code block of the README and the guides: Python is run, commands are run or at least taken."""

import functools
import gc
import importlib.util
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from material import write_photographs
from PIL import Image

from dali_diffusemix import EditStore, cli
from dali_diffusemix.store import OriginalStore

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    *(f"docs/{name}.md" for name in ("getting-started", "concepts", "migration", "how-to", "choosing")),
)
# Their Python, if any, is not run here.
OTHERS = tuple(
    f"docs/{name}.md" for name in ["commands", "editors", "generation", "imagenet", "preview", "results", "training"]
)
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# What a block may need and this package does not, by what shows it; without it the rest of the page is run.
NOT_OURS = {
    "tqdm": "import tqdm",
    "webdataset": "import webdataset",
    "datasets": "from datasets import",
    "pyarrow": ".parquet",
}
# The order of commands and Python on the page is the order to run them in; elsewhere commands come first, because what
# makes the stores stands below the loop in the README.
IN_ORDER = ("docs/how-to.md",)
# Run elsewhere: demo and bench have tests of their own; the others want weights, or another folder than there is here.
ONLY_TAKEN = re.compile(r"\b(demo|bench|review|score|timbrooks\S*|examples\.\S*|own_editor\S*)\b")

Block = tuple[str, str]


def blocks(page: str) -> list[Block]:
    """(language, text) of the page's fenced blocks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.count("\n```") % 2 == 0, f"{page}: a block is not closed"
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def lines(shell: str) -> Iterator[list[str]]:
    """The words of each command."""
    for line in shell.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: photographs in class folders, and nothing else."""
    for split, count, seed in (("train", 8, 0), ("val", 3, 100)):
        write_photographs(tmp_path / "data" / split, ("ants", "bees"), count, seed=seed)
    monkeypatch.setenv("DALI_DIFFUSEMIX_CACHE", str(tmp_path / "own"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@functools.cache
def usage_of(script: str) -> str:
    """What --help prints, run in this process: most of what scripts import has been imported here."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), redirect_stdout(io.StringIO()) as shown:
        warnings.simplefilter("ignore")  # of other packages, when they are imported
        patch.setattr(sys, "argv", [script, "--help"])
        patch.syspath_prepend(str((ROOT / script).parent))
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:  # torch's @record catches it
            assert not end.code
    assert shown.getvalue().startswith("usage: ")
    for name in set(sys.modules) - before:
        # Scripts' neighbours; not what is installed, perhaps in an environment below ROOT.
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and Path(file).parent == (ROOT / script).parent:
            del sys.modules[name]
    return shown.getvalue()


def run_command(words: list[str]) -> None:
    """Run a line of a page, or see that it would be taken."""
    program, *arguments = words
    if program == "dali-diffusemix" and ONLY_TAKEN.search(" ".join(words)):
        command = cli.main.commands[arguments[0]]
        command.make_context(arguments[0], arguments[1:])
    elif program == "dali-diffusemix":
        if arguments[0] == "fractals":
            arguments += ["--count", "4", "--size", "64"]  # fewer, for time; the last one counts
        result = CliRunner().invoke(cli.main, arguments, prog_name="dali-diffusemix")
        assert result.exit_code == 0, f"{shlex.join(words)}: {result.output}"
    elif program == "make":
        subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True)
    elif program == "pip":
        assert arguments[0] == "install"
        for argument in arguments:
            if argument.startswith(".["):
                assert set(argument[2:-1].split(",")) <= set(EXTRAS), argument
            elif argument.endswith(".txt"):
                assert (ROOT / argument).is_file()
    elif program == "torchrun" and Path(arguments[-1]).is_file():
        run = [sys.executable, "-m", "torch.distributed.run", *arguments]
        done = subprocess.run(run, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        Path(arguments[-1]).with_suffix(".txt").write_text(done.stdout)
    elif program in ("python", "torchrun"):
        script = next(one for one in arguments if one.endswith(".py"))
        options = arguments[arguments.index(script) + 1 :]
        usage = usage_of(script)
        for option in options:
            assert not option.startswith("--") or option in usage, f"{script} has no {option}"
            assert not option.endswith(".toml") or (ROOT / option).is_file() or Path(option).is_file()
    elif program == "cp":
        shutil.copy(ROOT / arguments[0], arguments[1])
    elif program == "hf":
        pass
    else:
        known = program == "eval" or (program.startswith("benchmarks/gpu/") and (ROOT / program).is_file())
        assert known, f"nobody looks at {program!r}"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_all_blocks_run_in_order(page: str, project: Path) -> None:
    if page not in ("README.md", "docs/getting-started.md"):
        run_command(shlex.split("dali-diffusemix fractals cache/fractals.npy --count 4 --size 64"))
        run_command(shlex.split("dali-diffusemix generate data/train cache/edits --prompts autumn,snowy --size 64"))
    if page == "docs/how-to.md":
        write_sources()
    found = blocks(page) if page in IN_ORDER else sorted(blocks(page), key=lambda block: block[0] == "python")
    assert found
    commands = "".join(text for language, text in found if language == "sh")
    names: dict[str, Any] = {"__name__": page}
    left_out: set[str] = set()
    for language, text in found:
        lacking = {name for name, sign in NOT_OURS.items() if sign in text and importlib.util.find_spec(name) is None}
        left_out |= lacking
        if lacking:
            continue
        script = re.match(r"# (\w+\.py)\n", text)
        if script is not None and f" {script[1]}\n" in commands:
            Path(script[1]).write_text(text, encoding="utf-8")  # a command of the page runs it
        elif language == "python":
            with warnings.catch_warnings():
                if "import webdataset" in text:  # it leaves its last tar open
                    warnings.simplefilter("ignore", ResourceWarning)
                exec(compile(text, page, "exec"), names)
                gc.collect()
        elif language in ("sh", "bash"):
            for words in lines(text):
                run_command(words)
        else:
            assert language in ("bibtex", "text", "toml", "json"), f"{page}: nobody looks at {language!r}"
    if page == "docs/how-to.md":
        check_recipes(names, dict(found)["text"])
    if left_out:
        pytest.skip(f"all of {page} ran but the blocks that need {', '.join(sorted(left_out))}, not installed here")


def write_sources() -> None:
    """The photographs of data/train in the files that the recipes read, as far as what writes these is installed."""
    photographs = sorted(Path("data/train").glob("*/*.jpg"))
    rows = [(path.read_bytes(), ("ants", "bees").index(path.parent.name)) for path in photographs]
    for part in range(2):
        with tarfile.open(f"data/train-{part:03d}.tar", "w") as tar:
            for number, (content, label) in list(enumerate(rows))[part::2]:
                for ending, data in (("jpg", content), ("cls", b"%d" % label)):
                    member = tarfile.TarInfo(f"{number:06d}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    if importlib.util.find_spec("datasets") is not None:
        import datasets

        features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ants", "bees"])}
        cells = {
            "image": [{"bytes": content, "path": None} for content, _ in rows],
            "label": [label for _, label in rows],
        }
        made = datasets.Dataset.from_dict(cells, features=datasets.Features(features))
        made.save_to_disk("data/saved")
        made.to_parquet("data/train-0.parquet")


def check_recipes(names: dict[str, Any], printed: str) -> None:
    """What the recipes left behind is what the page says."""
    dataset, several, sampler = names["dataset"], names["several"], names["sampler"]
    assert f"{dataset!r}\n{names['loader']!r}\n" == printed.replace("/home/me", str(Path.cwd()))
    counts = {name: len(OriginalStore.open(f"cache/from-{name}")) for name in ("parquet", "datasets", "tars")}
    assert counts == dict.fromkeys(counts, 16) and len(EditStore.open("cache/parquet-edits")) == 32
    assert names["edits"] == ["autumn.0.ppm", "snowy.0.ppm"] and names["from_datasets"].classes == ["ants", "bees"]
    assert torch.allclose(torch.from_numpy(names["soft"].targets).sum(1), torch.ones(16))
    chosen = names["chosen"].store
    assert chosen.count_by_prompt()["snowy"] <= 8 < chosen.count_by_prompt()["autumn"]
    assert Path("train.txt").read_text() == "".join(f"epoch {epoch}: 2 steps on 2 ranks\n" for epoch in (0, 1))
    assert (len(names["training"]), len(names["validation"])) == (12, 4)
    training, validation = ({path for path, _ in names[part].samples} for part in ("training", "validation"))
    assert len(training) == 12 and len(validation) == 4 and not training & validation
    assert names["validation"].dataset.mix is None and names["training"].dataset.mix is not None
    assert sampler.weights.tolist() == [1.0] * 16  # both classes are of one size
    assert several.targets.shape == (16, 3) and names["loader"].stats().images == 8  # two batches, then saved
    assert names["resumed"].stats().images == len(dataset) - 8
    with Image.open("now.png") as picture:
        assert min(picture.size) > 600
    _, labels = next(iter(names["mixing"]))
    assert labels.shape == (4, 2) and torch.allclose(labels.sum(1), torch.ones(4))


@pytest.mark.parametrize("page", OTHERS)
def test_commands_of_other_pages_are_taken(page: str, project: Path) -> None:
    seen = 0
    for language, text in blocks(page):
        if language in ("sh", "bash"):
            for words in lines(text):
                if words[0] == "dali-diffusemix":
                    cli.main.commands[words[1]].make_context(words[1], words[2:])
                else:
                    run_command(words)
                seen += 1
    assert seen


def test_the_readme_names_what_is_there() -> None:
    for page in ("README.md", *(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))):
        text = (ROOT / page).read_text(encoding="utf-8")
        targets = [target for target in re.findall(r"\]\(([^)]+)\)", text) if not target.startswith("http")]
        for target in targets:
            file = ((ROOT / page).parent / target.split("#")[0]) if target.split("#")[0] else ROOT / page
            assert file.exists(), f"{page}: {target}"
        for path in re.findall(r"`((?:examples|benchmarks|tests|kernels|docs)/[\w./-]+)`", text):
            assert (ROOT / path).exists(), f"{page}: {path}"
