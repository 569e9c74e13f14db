"""docs/troubleshooting/ quotes what is printed; docs/formats.md describes what is written, and its examples run."""

import ast
import errno
import gc
import io
import json
import mmap
import os
import re
import shlex
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import cache
from importlib import metadata
from multiprocessing import spawn
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from material import encoded, photograph, write_photograph, write_photographs

from dali_diffusemix import Catalog, EditStore, QuarantineWarning, cli
from dali_diffusemix.errors import CatalogError, DiffuseMixError, StoreError
from dali_diffusemix.generate import GenerateConfig, generate
from dali_diffusemix.generate.editors.diffusers import DiffusersConfig
from dali_diffusemix.generate.editors.diffusers.adapters import ADAPTERS
from dali_diffusemix.generate.quality import Thresholds
from dali_diffusemix.store import INDEX_ROW, ORIGINAL_INDEX_ROW, ORIGINAL_SHARD_ROW, SHARD_ROW, VERDICTS, OriginalStore
from dali_diffusemix.store.layout import ORDER_ROW

ROOT = Path(__file__).parents[1]
TROUBLE = sorted((ROOT / "docs" / "troubleshooting").glob("*.md"))
FORMATS, SOURCES = (ROOT / "docs" / f"{name}.md" for name in ("formats", "originals"))
CODE = (*sorted((ROOT / "dali_diffusemix").rglob("*.py")), *sorted((ROOT / "examples").glob("*.py")))

pytestmark = pytest.mark.skipif(not TROUBLE, reason="docs/ is not beside the package")


def blocks(page: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


# Troubleshooting ------------------------------------------------------------------------------------------------------


def messages() -> list[str]:
    """The messages that the pages quote: bold code."""
    return [message for page in TROUBLE for _, message in re.findall(r"\*\*(`+)(.+?)\1\*\*", page.read_text("utf-8"))]


def texts(tree: ast.AST) -> Iterator[str]:
    """Every string and f-string of a module, with NUL for what is put in."""
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield re.sub(r"%[rsd]", "\0", node.value)  # of a logger


@cache
def trees() -> tuple[ast.Module, ...]:
    return tuple(ast.parse(file.read_text(encoding="utf-8")) for file in CODE)


@cache
def printed() -> tuple[str, ...]:
    """All that the package and the examples may print."""
    return tuple(text for tree in trees() for text in texts(tree))


def pieces(message: str) -> list[str]:
    return [piece.strip() for piece in message.split("...") if piece.strip()]


def holds(text: str, message: str) -> bool:
    """Whether a text has all pieces of a message, in order."""
    place = 0
    for piece in pieces(message):
        place = text.find(piece, place)
        if place < 0:
            return False
        place += len(piece)
    return True


def any_holds(message: str) -> bool:
    """Whether this package or an example may print a message."""
    first = pieces(message)[0]
    return any(first in text and holds(text, message) for text in printed())


def in_binary(pattern: str) -> Callable[[str], bool]:
    """Whether files of DALI's wheels hold the text of a message."""

    def found(message: str) -> bool:
        folder = Path(str(metadata.distribution(dali()).locate_file("nvidia")))
        for file in folder.glob(pattern):
            with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                if all(content.find(piece.encode()) >= 0 for piece in pieces(message)):
                    return True
        return False

    return found


def in_source(file: Callable[[], str]) -> Callable[[str], bool]:
    def found(message: str) -> bool:
        tree = ast.parse(Path(file()).read_text(encoding="utf-8"))
        return any(holds(" ".join(text.split()), message) for text in texts(tree))

    return found


def dali() -> str:
    for name in ("nvidia-dali-cuda120", "nvidia-dali-cuda130"):
        try:
            return metadata.distribution(name).name
        except metadata.PackageNotFoundError:
            continue
    pytest.skip("DALI is not installed")


def external_source() -> str:
    return str(metadata.distribution(dali()).locate_file("nvidia/dali/external_source.py"))


def of_an_emptied_folder(message: str) -> bool:
    """What Python says of a package whose files were taken away, but not its folder."""
    name = "emptied_by_tests"
    namespace = type(sys)(name)
    sys.modules[name] = namespace
    try:
        exec(f"from {name} import fn")
    except ImportError as error:
        return str(error) == message.replace("nvidia.dali", name)
    finally:
        del sys.modules[name]
    return False


OTHERS: Mapping[str, Callable[[str], bool]] = {
    "Current pipeline object is no longer valid.": in_binary("dali/libdali.so"),
    "Critical error in pipeline:": in_binary("dali/libdali.so"),
    "Attempted to peek the data batch that doesn't exist. Add more elements to the DALI input operator.": in_binary(
        "dali/libdali.so"
    ),
    "nvImageCodec failure: '#...": in_binary("dali/libdali_operators.so"),
    "You are trying to create a GPU DALI pipeline while CUDA is not available. Please install CUDA or set ...": (
        in_binary("dali/libdali.so")
    ),
    "The pipeline requires a CUDA-capable GPU but the CUDA driver is not installed or its version is insufficient.": (
        in_binary("dali/libdali.so")
    ),
    "The pipeline requires a CUDA-capable GPU but none are available.": in_binary("dali/libdali.so"),
    "dlopen libcuda.so failed": in_binary("nvimgcodec/extensions/*"),
    "The external source callback returned an unexpected batch size.": in_source(external_source),
    "Index file not provided, it may take some time to infer it from the tar file": in_binary(
        "dali/libdali_operators.so"
    ),
    "Resource deadlock avoided": lambda message: os.strerror(errno.EDEADLK) == message,
    "cannot import name 'fn' from 'nvidia.dali' (unknown location)": of_an_emptied_folder,
    "An attempt has been made to start a new process before the current process has finished its": in_source(
        lambda: str(spawn.__file__)
    ),
}
"""Messages that are not ours, and where they are looked for."""


@pytest.mark.slow
def test_messages_are_printed_by_this_code() -> None:
    absent = [one for one in messages() if one not in OTHERS and not (pieces(one) and any_holds(one))]
    assert not absent, "no string of the package or the examples holds these"


def test_messages_of_others_are_theirs() -> None:
    assert not OTHERS.keys() - set(messages()), "the page does not quote these"
    assert not [message for message, found in OTHERS.items() if not found(message)]


def test_messages_are_told_apart() -> None:
    assert len(messages()) == len(set(messages())) > 25


def classes_below(*roots: str) -> set[str]:
    """Names of the classes of the package and the examples that are below some built-in or our own class."""
    found, known = set(roots), set[str]()
    while known != found:
        known = set(found)
        for node in (node for tree in trees() for node in ast.walk(tree)):
            if isinstance(node, ast.ClassDef) and {ast.unparse(base) for base in node.bases} & found:
                found.add(node.name)
    return found


@pytest.mark.slow
def test_every_error_and_warning_is_on_the_page() -> None:
    """A ratchet: whoever adds a class adds it here."""
    text = (ROOT / "docs" / "troubleshooting" / "index.md").read_text(encoding="utf-8")
    errors = classes_below(DiffuseMixError.__name__)
    categories = classes_below("Warning", "UserWarning") - {"Warning", "UserWarning"}
    assert {"StoreError", "MirrorError", "TrainingError"} <= errors and "QuarantineWarning" in categories
    for name in errors | categories:
        assert f"`{name}`" in text, f"docs/troubleshooting/index.md does not mention {name}"


def test_commands_on_the_pages_are_taken() -> None:
    seen = 0
    for line in "".join(text for page in TROUBLE for text in blocks(page, "sh")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["dali-diffusemix"]:
            cli.main.commands[words[1]].make_context(words[1], words[2:])
            seen += 1
    assert seen > 5


def test_python_on_the_pages_can_be_read() -> None:
    for page in TROUBLE:
        for text in blocks(page, "python"):
            compile(text, str(page), "exec")


@pytest.mark.parametrize("page", [*TROUBLE, FORMATS, SOURCES], ids=lambda page: page.stem)
def test_lines_are_short(page: Path) -> None:
    long = [line for line in page.read_text(encoding="utf-8").splitlines() if len(line) > 120 and line[0] != "|"]
    assert not long


# Originals ------------------------------------------------------------------------------------------------------------


def make_sources(folder: Path) -> None:
    """What the commands of the page read, in data/."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("scipy")
    from miniature import cifar100

    data = write_photographs(folder / "data" / "train", ("ants", "bees"), 2).parent
    cifar100(data / "cifar-100-python")
    images = np.stack([photograph(seed, 32, 32) for seed in range(6)])
    files = [encoded(image, "PNG") for image in images]
    np.savez(data / "train.npz", images=images, labels=np.arange(6) % 2)
    for part in range(2):
        with tarfile.open(data / f"train-{part:03d}.tar", "w") as tar:
            for row in range(3 * part, 3 * part + 3):
                label = json.dumps({"label": ["ant", "bee"][row % 2]}).encode()
                for ending, content in (("png", files[row]), ("cls", b"%d" % (row % 2)), ("json", label)):
                    member = tarfile.TarInfo(f"{row:06d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    cells = [{"bytes": content, "path": None} for content in (*files, b"damaged")]
    rows = {"image": cells, "fine_label": [*[0, 1] * 3, 0], "coarse_label": [0] * 7}
    parquet.write_table(pyarrow.table(rows), data / "train-0.parquet")
    features = {"image": datasets.Image(), **{f"{name}_label": datasets.ClassLabel(2) for name in ("fine", "coarse")}}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(data / "saved")


def test_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The page's commands and examples run, in order, and its names of images are right."""
    make_sources(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DALI_DIFFUSEMIX_CACHE", str(tmp_path / "own"))
    names: dict[str, Any] = {"__name__": "originals"}
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", SOURCES.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        if language == "python":
            exec(compile(text, str(SOURCES), "exec"), names)
        for line in text.splitlines() if language == "sh" else ():
            program, *words = shlex.split(line, comments=True)
            if program == "dali-diffusemix":
                result = CliRunner().invoke(cli.main, words)
                assert result.exit_code == 0, f"{line}: {result.output}"
            else:
                assert program == "pip"
    stores = {path.name: OriginalStore.open(path).catalog for path in Path("cache").iterdir()}
    assert {name: (catalog.path(3), list(catalog.classes)) for name, catalog in stores.items()} == {
        "originals": ("bees/1.jpg", ["ants", "bees"]),
        "cifar": ("png/train/apple/00003.png", ["apple", "aquarium_fish", "baby"]),
        "cifar-test": ("png/test/aquarium_fish/00003.png", ["apple", "aquarium_fish", "baby"]),
        "from-tars": ("000003.png", ["0", "1"]),
        "by-name": ("000003.png", ["ant", "bee"]),
        "from-parquet": ("train-0/3", ["0", "1"]),
        "from-dataset": ("3", ["0", "1"]),
        "from-arrays": ("3", ["0", "1"]),
        "from-dataset-in-memory": ("3", ["ant", "bee"]),
    }
    assert "train-0.parquet, row 6 unsupported" in capsys.readouterr().out


@pytest.mark.slow
def test_cifar_from_the_archive_to_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands and the loop of docs/training.md, with fewer images and a smaller batch."""
    pytest.importorskip("scipy")
    from miniature import cifar100

    cifar100(tmp_path / "data" / "cifar-100-python")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DALI_DIFFUSEMIX_CACHE", str(tmp_path / "own"))
    page = (ROOT / "docs" / "training.md").read_text("utf-8")
    section = page.split("\n## Small images: CIFAR-100\n")[1].split("\n## ")[0]
    (commands,) = re.findall(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    (loop,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    for line in commands.splitlines():
        _, *words = shlex.split(line.replace("--count 64", "--count 4"))
        result = CliRunner().invoke(cli.main, words)
        assert result.exit_code == 0, f"{line}: {result.output}"
    names: dict[str, Any] = {"__name__": "training"}
    exec(compile(loop.replace("batch_size=128", "batch_size=8"), "docs/training.md", "exec"), names)
    assert names["images"].shape == (8, 3, 32, 32) and names["train_set"].store.raw
    assert sum(len(labels) for _, labels in names["test_loader"]) == len(names["test_set"])
    for name in ("train_loader", "test_loader"):
        names[name].close()


# Formats --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folder in which the page's examples ran, one after another, and their names."""
    pytest.importorskip("nvidia.dali")
    pytest.importorskip("webdataset")
    folder = tmp_path_factory.mktemp("formats")
    names: dict[str, Any] = {"__name__": "formats"}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", QuarantineWarning)
        warnings.simplefilter("ignore", ResourceWarning)  # of webdataset, which leaves its last tar open
        patch.chdir(folder)
        for text in blocks(FORMATS, "python"):
            exec(compile(text, str(FORMATS), "exec"), names)
        names["loader"].close()
        gc.collect()
    yield folder, names


def table(first: str) -> list[list[str]]:
    """The cells of the table whose first column has this title."""
    lines = iter(FORMATS.read_text(encoding="utf-8").splitlines())
    for line in lines:
        if line.startswith(f"| {first} | "):
            break
    else:
        raise AssertionError(f"there is no table of {first!r}")
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip().strip("|").split("|")])
    return rows


def read(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "cache" / name).read_text(encoding="ascii"))
    return content


def kind(value: object) -> str:
    names = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
    return names[type(value)]


EDITS, ORIGINALS = "edits/shards/edits-000000", "originals/shards/originals-000000"


def test_fields_of_json(written: tuple[Path, dict[str, Any]]) -> None:
    folder, names = written
    store = read(folder, "edits/store.json")
    for title, content in {
        "field": store,
        "field of a segment": store["segments"][0],
        "field of `settings`": store["settings"],
        "field of a shard's json": read(folder, f"{EDITS}.json"),
        "field of index.json": read(folder, "edits/index.json"),
        "field of an order": read(folder, "chosen/store.json")["segments"][1],
        "field of column.json": read(folder, "edits/scores/brightness/column.json"),
        "field of a shard's scores' json": read(folder, "edits/scores/brightness/edits-000000.json"),
        "field of a decision": read(folder, "chosen.decisions.jsonl"),
        "field of a run": read(folder, "edits.runs.jsonl"),
        "field of a packed store.json": read(folder, "originals/store.json"),
        "field of a packed index.json": read(folder, "originals/index.json"),
        "field of catalog.json": read(folder, "edits/catalog/catalog.json"),
        "field of a state": names["state"],
        "field of an entry": asdict(names["entry"]),
    }.items():
        described = {name: of for name, of, _ in table(title)}
        assert described == {name: kind(value) for name, value in content.items()}, title
        assert list(described) == list(content), title
        for name, _, meaning in table(title):
            if name == "magic":
                assert meaning.strip("`") == content[name], title
            elif name == "version" and title != "field of a run":
                assert meaning == str(content[name]), title


def test_fields_of_tables(written: tuple[Path, dict[str, Any]]) -> None:
    for title, dtype, file in (
        ("field of a shard's row", SHARD_ROW, f"{EDITS}.npy"),
        ("field of an order's row", ORDER_ROW, "chosen/orders/000001.npy"),
        ("field of index.npy", INDEX_ROW, "edits/index.npy"),
        ("field of a packed shard's row", ORIGINAL_SHARD_ROW, f"{ORIGINALS}.npy"),
        ("field of a packed index.npy", ORIGINAL_INDEX_ROW, "originals/index.npy"),
    ):
        described = np.dtype([(name, of) for name, of, _ in table(title)])
        assert described == dtype == np.load(written[0] / "cache" / file).dtype, title


def test_the_verdicts() -> None:
    assert [(int(number), name) for number, name in table("verdict")] == list(enumerate(VERDICTS))


def test_the_arrays_of_a_catalog(written: tuple[Path, dict[str, Any]]) -> None:
    folder = written[0] / "cache" / "edits" / "catalog"
    content = read(written[0], "edits/catalog/catalog.json")
    rows = table("array")
    assert [name for name, *_ in rows] == list(content["arrays"])
    sizes = {"N": content["count"], "N + 1": content["count"] + 1, "2": 2}
    for name, of, shape, _ in rows:
        array = np.load(folder / content["arrays"][name])
        assert array.dtype == np.dtype(of)
        wanted = [sizes.get(part.strip()) for part in shape.strip("()").split(",") if part.strip()]
        assert wanted == [None] or list(array.shape) == wanted


def test_what_else_is_said_of_json(written: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    shard, packed = read(written[0], f"{EDITS}.json"), read(written[0], f"{ORIGINALS}.json")
    assert set(shard) - set(packed) == {"prompts", "variants"} and set(packed) <= set(shard)
    assert set(read(written[0], "originals/store.json")["settings"]) == {"max_side", "quality", "restarts"}
    text = FORMATS.read_text(encoding="utf-8")
    (sentence,) = re.findall(r"The diffusers editor adds (.*?)\.\n", text, re.DOTALL)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionInstructPix2PixPipeline"}')
    ours = {name for name, *_ in table("field of `settings`")}
    assert set(re.findall(r"`(\w+)`", sentence)) == set(DiffusersConfig(model=str(tmp_path)).settings()) - ours


def test_the_files_of_a_store(written: tuple[Path, dict[str, Any]]) -> None:
    """No file that the page does not name, and none missing."""
    edits, originals = (
        {str(file.relative_to(written[0] / "cache" / name)) for file in (written[0] / "cache" / name).rglob("*.*")}
        for name in ("edits", "originals")
    )
    shard = {f"shards/{{}}-000000.{ending}" for ending in ("tar", "idx", "npy", "json")}
    common = {"store.json", "index.json", "index.npy", ".lock"}
    lists = re.compile(r"(catalog|listed)/(catalog\.json|\w+-[0-9a-f]{16}\.npy)")
    assert {name for name in edits if not lists.fullmatch(name)} == (
        common
        | {"starts.npy"}
        | {name.format("edits") for name in shard}
        | {f"scores/brightness/{name}" for name in (".lock", "column.json", "edits-000000.json", "edits-000000.npy")}
    )
    assert {name for name in originals if not lists.fullmatch(name)} == (
        common | {name.format("originals") for name in shard}
    )


def test_members_have_no_owner_and_keys_are_escaped(tmp_path: Path) -> None:
    names = ["a b/ü.1.jpg", f"a b/{'long' * 60}.jpg"]
    for seed, name in enumerate(names):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        write_photograph(tmp_path / "data" / name, seed, 40, 40)
    config = GenerateConfig(prompts=("a sketch with crayon",), size=40, format="jpeg")
    generate(tmp_path / "data", tmp_path / "edits", config)
    with tarfile.open(tmp_path / "edits" / "shards" / "edits-000000.tar") as tar:
        members = tar.getmembers()
    found = {member.name for member in members}
    assert found == {
        "a%20b/%C3%BC%2E1%2Ejpg.a-sketch-with-crayon.0.jpg",
        f"a%20b/{'long' * 60}%2Ejpg.a-sketch-with-crayon.0.jpg",
    }
    assert {(member.mtime, member.mode, member.uid, member.gid, member.uname) for member in members} == {
        (0, 0o644, 0, 0, "")
    }
    assert (tmp_path / "edits" / "shards" / "edits-000000.tar").stat().st_size % 10240 == 0


def test_rejected_edits_lie_apart(tmp_path: Path) -> None:
    (tmp_path / "data" / "ants").mkdir(parents=True)
    write_photograph(tmp_path / "data" / "ants" / "1.jpg", 0, 40, 40)
    config = GenerateConfig(prompts=("autumn",), size=40, format="jpeg", thresholds=Thresholds(like=1.0))
    generate(tmp_path / "data", tmp_path / "edits", config)
    shard = json.loads((tmp_path / "edits" / "shards" / "edits-000000.json").read_text())
    assert set(shard["files"]) == {"tar", "idx", "npy", "rejected"}
    (row,) = np.load(tmp_path / "edits" / "shards" / "edits-000000.npy")
    assert VERDICTS[row["verdict"]] == "unchanged" and 2 <= row["verdict"] <= 7
    data = (tmp_path / "edits" / "rejected" / "edits-000000.tar").read_bytes()
    jpeg = data[row["offset"] : row["offset"] + row["length"]]
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        (member,) = tar.getmembers()
        content = tar.extractfile(member)
        assert content is not None and content.read() == jpeg
    assert member.name == "ants/1%2Ejpg.autumn.0.jpg"
    with tarfile.open(tmp_path / "edits" / "shards" / "edits-000000.tar") as tar:
        assert not tar.getmembers()


@pytest.mark.parametrize(
    ("file", "reader"),
    [
        ("edits/store.json", EditStore.open),
        ("edits/index.json", EditStore.open),
        ("edits/catalog/catalog.json", EditStore.open),
        ("originals/store.json", OriginalStore.open),
        ("originals/index.json", OriginalStore.open),
        ("originals/catalog/catalog.json", OriginalStore.open),
    ],
)
def test_versions(
    file: str, reader: Callable[[Path], Any], written: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written[0] / "cache" / file
    store, before = written[0] / "cache" / file.split("/")[0], path.read_text()
    content = json.loads(before)
    try:
        for change in ({"version": 0}, {"version": 3}, {"magic": "dali_diffusemix.other"}):
            path.write_text(json.dumps({**content, **change}, indent=1))
            with pytest.raises((StoreError, CatalogError), match=next(iter(change))):
                reader(store)
            if "catalog" in file:
                with pytest.raises(CatalogError, match=next(iter(change))):
                    Catalog.open(path.parent)
        path.write_text(json.dumps({**content, "of the future": 1}, indent=1))
        assert len(reader(store))
    finally:
        path.write_text(before)


def test_the_files_of_a_mirror(
    written: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fsspec")
    monkeypatch.setenv("DALI_DIFFUSEMIX_MIRROR", str(tmp_path))
    store = EditStore.open((written[0] / "cache" / "edits").as_uri())
    try:
        store.encoded(0)
        assert store.mirror is not None
        (folder,) = tmp_path.iterdir()
        assert store.mirror.folder == folder and re.fullmatch(r"[0-9a-f]{16}", folder.name)
        names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        assert {name for name in names if not name.startswith("catalog/")} == {
            *("store.json", "index.json", "index.npy", "starts.npy", ".lock"),
            *("shards/edits-000000.json", "shards/edits-000000.tar", "shards/.edits-000000.lock"),
        }
    finally:
        if store.mirror is not None:
            store.mirror.close()


# Editors --------------------------------------------------------------------------------------------------------------


def test_the_table_of_models() -> None:
    """Every class that is known, with its defaults."""
    text = (ROOT / "docs" / "editors.md").read_text(encoding="utf-8")
    section = text[text.index("## Diffusion models") :].split("\n## ")[0]
    assert set(re.findall(r"`(\w+Pipeline)`", section)) == set(ADAPTERS)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:2] == "| "]
    found = {row[0].split(" ¹")[0].split(" ²")[0].split(" ³")[0]: row[1:] for row in rows if len(row) == 5}
    families = {
        "InstructPix2Pix, SD and SDXL": ("StableDiffusionInstructPix2Pix", "StableDiffusionXLInstructPix2Pix"),
        "FLUX.2 klein, distilled; klein KV": ("Flux2KleinKV",),
        "FLUX.2 klein, base; FLUX.2 dev": ("Flux2Klein", "Flux2"),
        "FLUX.1 Kontext": ("FluxKontext",),
        "Qwen-Image-Edit": ("QwenImageEdit",),
        "Qwen-Image-Edit Plus": ("QwenImageEditPlus",),
        "DreamLite": ("DreamLite",),
        "DreamLite Mobile": ("DreamLiteMobile",),
        "Z-Image, image to image": ("ZImageImg2Img",),
        "Sana-Sprint, image to image": ("SanaSprintImg2Img",),
        "SD, image to image": ("StableDiffusionImg2Img",),
        "SDXL, image to image": ("StableDiffusionXLImg2Img",),
    }
    assert found.keys() - {"family", "---"} == families.keys()
    for family, names in families.items():
        steps, guidance, sides, takes = found[family]
        for name in names:
            adapter = ADAPTERS[f"{name}Pipeline"]
            defaults = adapter.defaults_of({})
            by_image = f", by the image {defaults.image_guidance}" if defaults.image_guidance else ""
            shown = "none" if defaults.guidance is None else f"{defaults.guidance}{by_image}"
            assert (steps, guidance, sides) == (str(defaults.steps), shown, str(adapter.multiple)), family
            words = {"negative_prompt": "negative prompt", "lora": "LoRA"}
            optional = {words.get(one, one) for one in adapter.takes({}) - {"guidance", "image_guidance"}}
            optional |= {"scheduler"} if adapter.schedulers else set()
            assert {one.strip().split(" 0")[0] for one in takes.split(",") if one.strip()} == optional, family
