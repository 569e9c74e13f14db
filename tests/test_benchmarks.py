"""benchmarks/: every record agrees with results/schema.json, and every script starts."""

import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from material import encoded, photograph, write_photographs

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
SCHEMA = json.loads((BENCHMARKS / "results" / "schema.json").read_text())
MODULES = ("record.py", "torch_loop.py")  # of the scripts
RECORDS = sorted(file for file in (BENCHMARKS / "results").glob("*.json") if file.name != "schema.json")


def faults(record: Any) -> list[str]:
    """What is wrong with a record."""
    return [f"{error.json_path}: {error.message[:200]}" for error in Draft202012Validator(SCHEMA).iter_errors(record)]


def rows(found: Any) -> Iterator[dict[str, Any]]:
    """The measurements with rounds in a record."""
    if isinstance(found, dict):
        if {"images_per_second", "rounds"} <= set(found):
            yield found
        for value in found.values():
            yield from rows(value)


# Committed records ----------------------------------------------------------------------------------------------------


def test_every_committed_record_agrees_with_the_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert len(RECORDS) >= 34
    found = {file.name: faults(json.loads(file.read_text())) for file in RECORDS}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


def test_committed_records_are_of_a_commit_and_their_figures_of_their_rounds() -> None:
    for file in RECORDS:
        record = json.loads(file.read_text())
        machine = record.get("machine", {})
        assert machine.get("changed") in (None, False) and machine.get("commit") != "unknown", file.name
        for row in rows(record.get("results")):
            rates = row["rounds"]
            assert row["images_per_second"] == pytest.approx(statistics.median(rates), rel=0.01), file.name
            assert row.get("lowest", min(rates)) == min(rates), file.name
            assert row.get("highest", max(rates)) == max(rates), file.name


def spoiled(change: Callable[[dict[str, Any]], object], name: str = "2026-11-23-2cores-loader.json") -> list[str]:
    record = copy.deepcopy(json.loads((BENCHMARKS / "results" / name).read_text()))
    change(record)
    return faults(record)


def test_the_schema_refuses_what_is_wrong() -> None:
    row = "$.results.diffusemix"
    assert spoiled(lambda record: None) == []
    assert f"{row}:" in spoiled(lambda record: record["results"]["diffusemix"].pop("rounds"))[0]
    assert f"{row}:" in spoiled(lambda record: record["results"]["diffusemix"].update(speed=3))[0]
    assert f"{row}.lowest:" in spoiled(lambda record: record["results"]["diffusemix"].update(lowest="slow"))[0]
    assert f"{row}.rounds:" in spoiled(lambda record: record["results"]["diffusemix"].update(rounds=[]))[0]
    assert "$.machine" in spoiled(lambda record: record["machine"].pop("date"))[0]
    assert "$.benchmark" in spoiled(lambda record: record.update(benchmark="bench_unknown"))[0]
    assert spoiled(lambda record: record.pop("benchmark"))
    assert spoiled(lambda record: record["left_out"].update(spdl=""))
    overhead = "2026-11-26-h100-overhead.json"
    assert spoiled(lambda record: record["results"]["224"]["plain_dali"]["A_O"].update(interval=[1]), overhead)


# New records ----------------------------------------------------------------------------------------------------------

RECORDED = """
import sys
from pathlib import Path
import record

found = record.interleaved({"diffusemix": lambda: sum(range(1000)) and 5}, rounds=2)
settings = {"images": 5, "batch_size": 5, "threads": 1, "device": "cpu", "max_side": None, "seconds": None}
content = {"benchmark": "bench_loader", "settings": settings, "results": found, "left_out": {"spdl": "not installed"}}
record.write(Path(sys.argv[1]), content, quiet=True)
"""

SCRIPTS = """
import contextlib, io, json, runpy, sys
from pathlib import Path
for script, *arguments in json.loads(sys.argv[1]):
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).parent)
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            assert not end.code, (script, end.code)
    assert "--help" not in arguments or shown.getvalue().startswith("usage: "), script
"""


def run(code: str, *arguments: object) -> None:
    command = [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(BENCHMARKS)!r})\n{code}"]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def run_scripts(commands: list[tuple[object, ...]]) -> None:
    """Run scripts one after another in one process, as if by their names."""
    run(SCRIPTS, json.dumps([[str(BENCHMARKS / str(script)), *map(str, rest)] for script, *rest in commands]))


@pytest.mark.slow
def test_what_record_writes_agrees_with_the_schema(tmp_path: Path) -> None:
    run(RECORDED, tmp_path / "new.json")
    record = json.loads((tmp_path / "new.json").read_text())
    assert faults(record) == []
    assert record["results"]["diffusemix"]["peak_memory_mib"] > 0


@pytest.mark.slow
def test_what_scripts_write_agrees_with_the_schema(tmp_path: Path) -> None:
    """Of the scripts that take seconds."""
    for number in range(4):
        file = tmp_path / "train" / f"c{number % 2}" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(photograph(number, 60, 80)))
    root = tmp_path / "train"
    more = write_photographs(tmp_path / "more", ("c0", "c1"), 20)
    commands: dict[str, tuple[object, ...]] = {
        "bench_screening": (root / "c0" / "0.jpg", "--files", 2, "--rounds", 1),
        "bench_kernel": ("--device", "cpu", "--batch-size", 2, "--repeat", 1, "--sets", 1, "--threads", 1),
        "bench_augment": ("operations", "--batch-size", 2, "--rounds", 1, "--plans", 1),
        "calibrate_quality": (root, "--images", 2, "--size", 32),
        "calibrate_score": (more, "--epochs", 1, "--batch-size", 4),
        "bench_sizes": (root, "--max-sides", 40, "--edit-sizes", 32),
        "bench_editors": (
            *(root, "--editor", "procedural", "--prompts", "autumn", "--size", 24, "--edit-sizes", 24),
            *("--originals", 4, "--rounds", 1, "--processes", 1),
        ),
        "bench_small": (
            *("32", root, "--images", 8, "--distinct", 4, "--batch-size", 2, "--rounds", 1, "--seconds", 0.01),
            *("--only", "diffusemix,torch_select_threads"),
        ),
    }
    run_scripts([(f"{name}.py", *given, "--out", tmp_path / f"{name}.json") for name, given in commands.items()])
    for name in commands:
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert record["benchmark"] == name
        assert faults(record) == [], name
    assert record["benchmark"] == "bench_small" and record["left_out"] == {}


# Scripts --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_script_starts() -> None:
    pytest.importorskip("kornia")
    scripts = [file.relative_to(BENCHMARKS) for file in sorted(BENCHMARKS.rglob("*.py")) if file.name not in MODULES]
    assert len(scripts) >= 17
    run_scripts([(script, "--help") for script in scripts])


@pytest.mark.parametrize("script", sorted(file.name for file in BENCHMARKS.glob("*.sh")))
def test_shell_scripts_are_bash(script: str) -> None:
    subprocess.run(["bash", "-n", str(BENCHMARKS / script)], check=True)
