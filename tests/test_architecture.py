"""The house: imports go down the levels only, each vendor has one room, and the package imports quickly."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dali_diffusemix

PACKAGE = Path(dali_diffusemix.__file__).parent

# DESIGN's table. A module may import modules of lower levels, and those of its own level that stand before it.
LEVELS: dict[int, tuple[str, ...]] = {
    0: ("errors",),
    1: (
        "philox",
        "native",
        "workers",
        "quality",
        "catalog",
        "layouts",
        "pixels",
        "reading",
        "remote",
        "gpu",
        "editors",
        "engines",
    ),
    2: ("plan", "store", "fractals"),
    3: ("mixing", "generate", "pack", "verify", "pipeline", "upload", "decoding"),
    4: ("quarantine", "dataset"),
    5: ("samplers", "loader", "fn", "preview", "report", "export", "bench"),
    6: ("integrations", "doctor", "demo", "cli"),
}
RANK = {name: (level, place) for level, names in LEVELS.items() for place, name in enumerate(names)}

# Where each vendor may be imported.
ROOMS = {
    "nvidia": {"pipeline"},
    "cupy": {"gpu"},
    "diffusers": {"editors"},
    "transformers": {"editors"},
    "huggingface_hub": {"editors"},
    "ray": {"engines"},
    "fsspec": {"remote"},
    "s3fs": set(),
    "accelerate": {"integrations"},
    "lightning": set(),
    "timm": set(),
    "torch": {
        "dataset",
        "samplers",
        "loader",
        "fn",
        "mixing",
        "gpu",
        "upload",
        "decoding",
        "preview",
        "bench",
        "integrations",
        "doctor",
        "cli",
        "demo",
        "editors",
        "engines",
    },
}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if name != "__init__":
            yield name, path


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            if node.module == "dali_diffusemix":
                yield from (f"dali_diffusemix.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize(("name", "path"), [pytest.param(n, p, id=str(p.relative_to(PACKAGE))) for n, p in modules()])
def test_imports_go_down_only(name: str, path: Path) -> None:
    assert name in RANK, f"{name} has no room in DESIGN's table"
    for target in imports(path):
        vendor, *rest = target.split(".")
        if vendor in ROOMS:
            assert name in ROOMS[vendor], f"{name} imports {vendor}, whose rooms are {sorted(ROOMS[vendor])}"
        if vendor == "dali_diffusemix" and rest and rest[0] != name:
            if rest[0] in ("__version__", "kernels"):
                continue
            assert RANK[rest[0]] < RANK[name], f"{name} {RANK[name]} imports {rest[0]} {RANK[rest[0]]}"


def test_the_public_names_are_sorted_and_exist() -> None:
    assert list(dali_diffusemix.__all__) == sorted(dali_diffusemix.__all__)
    for name in dali_diffusemix.__all__:
        assert getattr(dali_diffusemix, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = dali_diffusemix.nothing


def test_import_is_light() -> None:
    """Neither torch nor DALI, and under half a second (the best of three: the machine may be busy)."""
    script = (
        "import sys, time; start = time.perf_counter(); import dali_diffusemix; "
        "print(time.perf_counter() - start); print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        time_taken, loaded = done.stdout.splitlines()
        seconds.append(float(time_taken))
        assert not {"torch", "nvidia", "cupy", "PIL", "diffusers"} & set(loaded.split())
    assert min(seconds) < 0.5


def test_the_documents_show_this_house() -> None:
    """The table of levels and the picture in docs/architecture.md."""
    docs = PACKAGE.parent / "docs"
    if not docs.is_dir():
        pytest.skip("docs/ is not beside the package")
    text = (docs / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| (`.*?`) \|", text, re.MULTILINE)
    shown = {int(level): tuple(name.rstrip("/") for name in re.findall(r"`(.*?)`", names)) for level, names in rows}
    assert shown == LEVELS
    drawn = {
        name
        for node in ast.parse((docs / "figures.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("OFFLINE", "ONLINE")
        for _, _, names, _ in ast.literal_eval(node.value)
        for name in names
    }
    known = {name for names in LEVELS.values() for name in names}
    beside_the_flow = {"errors", "fn", "preview", "bench", "doctor", "integrations", "demo", "cli"}
    assert drawn == known - beside_the_flow
