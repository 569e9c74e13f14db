"""The public API: what it is (public_api.txt), and that docs and examples use nothing else.

    python tests/test_api.py     writes public_api.txt anew

A change of it belongs in CHANGELOG.md. The names are read from the source, so that the text depends on no version of
anything, and nothing has to be installed.
"""

import ast
import difflib
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from torch.utils.data import DataLoader

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dali_diffusemix"
SNAPSHOT = Path(__file__).with_name("public_api.txt")

# What docs/ and examples/ name beside `dali_diffusemix.__all__`. None: all of a module that has no underscore.
SUBMODULES: dict[str, tuple[str, ...] | None] = {
    "base.memory": ("free_memory",),
    "base.words": ("did_you_mean",),
    "bench": ("BenchResult", "Measurement", "Trial", "bench", "machine"),
    "catalog": ("LAYOUTS", "Split", "index", "read_layout"),
    "errors": None,
    "fn": None,
    "fractals": ("bank_from_folder", "render_bank"),
    "generate": ("GenerateConfig", "PromptFile", "Summary", "generate"),
    "generate.editors": None,
    "generate.editors.server": ("ServerConfig",),
    "generate.editors.user": ("UserConfig",),
    "generate.estimate": ("Estimate", "estimate"),
    "generate.engines": None,
    "generate.engines.local": ("LocalEngine", "default_devices"),
    "generate.quality": ("Thresholds",),
    "images.codec": ("decode",),
    "inspect.export": ("Exported", "export"),
    "inspect.scoring": ("ScoreFunction", "Scored", "Scorer", "load_scorer", "score"),
    "inspect.verify": ("Problem", "Verification", "discard", "verify"),
    "integrations.accelerate": None,
    "integrations.timm": None,
    "integrations.transformers": ("TrainerMixin",),
    "mix": ("IMAGENET", "IMAGENET_MEAN", "IMAGENET_STD"),
    "plan": ("PLAN_VERSION", "EpochOrder"),
    "plan.augment": ("OPERATION", "OPERATIONS", "Augmentation", "described"),
    "sources": ("Source", "source_of"),
    "store": ("Decisions", "EditName", "OriginalStore", "Selection"),
    "store.pack": ("PackConfig", "PackSummary", "pack"),
}
# Of methods with two underscores those that a user's code calls.
_CALLED = {"__init__", "__len__", "__iter__", "__next__", "__getitem__", "__getitems__", "__call__"}


def source(module: str) -> ast.Module:
    file = PACKAGE.joinpath(*module.split(".")) if module else PACKAGE
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def statements(module: str) -> Iterator[tuple[str, ast.stmt]]:
    """What a module defines, by name, in order."""
    for node in source(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Assign):
            yield from ((target.id, node) for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node


def find(module: str, name: str) -> ast.stmt:
    """What defines a name, followed through the package's own imports."""
    for found, node in statements(module):
        if found == name:
            return node
    for one in source(module).body:
        if isinstance(one, ast.ImportFrom) and name in (alias.name for alias in one.names):
            return find((one.module or "").removeprefix("dali_diffusemix."), name)
    raise LookupError(f"dali_diffusemix.{module} has no {name}")


def top_names() -> dict[str, str]:
    """Name to module of `dali_diffusemix.__all__`."""
    defined = dict(statements(""))
    values = {}
    for name in ("__all__", "_HOME"):
        node = defined[name]
        assert isinstance(node, ast.Assign)
        values[name] = ast.literal_eval(node.value)
    return {name: values["_HOME"].get(name, "errors") for name in values["__all__"]}


def signature(function: ast.FunctionDef) -> str:
    returns = "" if function.returns is None else f" -> {ast.unparse(function.returns)}"
    return f"{function.name}({ast.unparse(function.args)}){returns}"


def members(cls: ast.ClassDef) -> Iterator[str]:
    for node in cls.body:
        if isinstance(node, ast.AnnAssign | ast.Assign):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if not ast.unparse(target).startswith("_"):
                yield ast.unparse(node)
        elif isinstance(node, ast.FunctionDef) and (node.name in _CALLED or not node.name.startswith("_")):
            marks = [ast.unparse(one) for one in node.decorator_list]
            if "overload" in marks:
                continue
            yield "".join(f"@{mark} " for mark in marks) + signature(node)
            if node.name == "__init__":
                yield from attributes(
                    node, {ast.unparse(one.target) for one in cls.body if isinstance(one, ast.AnnAssign)}
                )


def attributes(init: ast.FunctionDef, seen: set[str]) -> Iterator[str]:
    """`self.name = ...` of names that were not seen, once each."""
    for node in ast.walk(init):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                kind = f": {ast.unparse(node.annotation)}" if isinstance(node, ast.AnnAssign) else ""
                if not target.attr.startswith("_") and target.attr not in seen:
                    seen.add(target.attr)
                    yield f"self.{target.attr}{kind}"


def describe(full: str, node: ast.stmt) -> Iterator[str]:
    name = full.rpartition(".")[2]
    if isinstance(node, ast.FunctionDef):
        yield full.removesuffix(name) + signature(node)
    elif isinstance(node, ast.ClassDef):
        marks = "".join(f"@{ast.unparse(one)} " for one in node.decorator_list)
        bases = ", ".join(map(ast.unparse, node.bases))
        yield f"{marks}class {full}({bases})"
        yield from (f"    {member}" for member in members(node))
    else:
        yield full.removesuffix(name) + ast.unparse(node)


def public() -> dict[str, list[str]]:
    """Every public name, with the lines that describe it."""
    found = {}
    for name, module in top_names().items():
        full = f"dali_diffusemix.{name}"
        found[full] = list(describe(full, find(module, name)))
    for module, names in SUBMODULES.items():
        everything = [name for name, _ in statements(module) if not name.startswith("_")]
        for name in everything if names is None else names:
            full = f"dali_diffusemix.{module}.{name}"
            if f"dali_diffusemix.{name}" in found and module == top_names().get(name):
                continue  # the same, by its longer name
            found[full] = list(describe(full, find(module, name)))
    return found


def text() -> str:
    return "".join(f"{line}\n" for lines in public().values() for line in lines)


def test_the_public_api_is_the_one_recorded() -> None:
    before, now = SNAPSHOT.read_text(encoding="utf-8"), text()
    difference = "\n".join(difflib.unified_diff(before.splitlines(), now.splitlines(), "recorded", "found", "", "", 1))
    assert before == now, (
        f"the public API has changed:\n{difference}\nIf it should, write it down with `python tests/test_api.py`, and "
        "in CHANGELOG.md."
    )


def test_docs_and_examples_use_nothing_else() -> None:
    names = public()
    # preview is left out: what it offers is a command.
    allowed = {*names, *(f"dali_diffusemix.{module}" for module in SUBMODULES), "dali_diffusemix.inspect.preview"}
    allowed |= {f"dali_diffusemix.{module}.{name}" for name, module in top_names().items()}
    files = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.py")]
    for file in files:
        content = file.read_text(encoding="utf-8")
        used = set(re.findall(r"^::: (dali_diffusemix[\w.]*)", content, re.MULTILINE))
        pattern = r"^\s*from (dali_diffusemix[\w.]*) import (?:\(([^)]*)\)|([^\n(]*))"
        for module, several, one in re.findall(pattern, content, re.MULTILINE):
            imported = re.sub(r"#[^\n]*", "", several or one).split(",")
            used |= {f"{module}.{name.split()[0]}" for name in imported if name.split()}
        unknown = {
            name for name in used if name not in allowed and name.removeprefix("dali_diffusemix.") not in SUBMODULES
        }
        assert not unknown, f"{file}: {sorted(unknown)}: add them to SUBMODULES, or use what is public"


def test_versions_agree() -> None:
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert f'__version__ = "{version[1]}"' in (PACKAGE / "__init__.py").read_text()
    assert f"\nversion: {version[1]}\n" in (ROOT / "CITATION.cff").read_text()


if __name__ == "__main__":
    SNAPSHOT.write_text(text(), encoding="utf-8")


def parameters(full: str) -> Iterator[tuple[str, list[str], str]]:
    """The thing under a public name and its public methods, if they are called: name, parameters, docstring."""
    module, _, name = full.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    if inspect.isclass(found) and not getattr(found, "_is_protocol", False):
        methods = [one for one in vars(found) if not one.startswith("_") and callable(getattr(found, one))]
        for one in ["__init__", *methods]:
            if one != "__init__" or "__init__" in vars(found):
                names = list(inspect.signature(getattr(found, one)).parameters)
                yield f"{full}.{one}", [name for name in names if name != "self"], found.__doc__ or ""
    elif inspect.isfunction(found):
        yield full, list(inspect.signature(found).parameters), found.__doc__ or ""


def test_nothing_takes_more_than_ten_parameters_without_a_reason() -> None:
    """Those do not count that DataLoader has, or ImageFolder. The reason stands in the docstring: "More than ten"."""
    theirs = {
        "DiffuseMixLoader": set(inspect.signature(DataLoader.__init__).parameters),
        "DiffuseMixDataset": {"root", "transform", "target_transform"},
    }
    named = [name for name in public() if not name.endswith((".Job", ".Report", ".DataNode", ".Column"))]
    checked = 0
    for full in named:
        if isinstance(getattr(importlib.import_module(full.rpartition(".")[0]), full.rpartition(".")[2]), str | tuple):
            continue
        for called, names, documentation in parameters(full):
            own = [name for name in names if name not in theirs.get(full.rpartition(".")[2], ())]
            checked += 1
            assert len(own) <= 10 or "More than ten" in documentation, f"{called} takes {len(own)}: {own}"
    assert checked > 60
