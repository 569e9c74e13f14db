"""The workflows of GitHub fit the Makefile and the package, and a tag publishes the version that it names."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")

pytestmark = pytest.mark.skipif(not (ROOT / ".github").is_dir(), reason="the source distribution has no workflows")
yaml = pytest.importorskip("yaml")


def workflow(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))
    content["on"] = content.pop(True)  # YAML 1.1 reads "on" so
    return content


def steps(job: dict[str, Any]) -> list[dict[str, Any]]:
    return job.get("steps", [])


@pytest.mark.parametrize("name", [file.name for file in WORKFLOWS])
def test_a_workflow_is_bounded(name: str) -> None:
    """Rights to read unless a job says what else it needs, an end, pinned actions, and targets that there are."""
    content = workflow(name)
    assert content["permissions"] == {"contents": "read"} and content["concurrency"]["group"]
    targets = set(re.findall(r"^([a-z]+):(?!=)", MAKEFILE, re.MULTILINE))
    for title, job in content["jobs"].items():
        if "uses" in job:
            assert (ROOT / job["uses"]).is_file() and "workflow_call" in workflow(Path(job["uses"]).name)["on"]
            continue
        assert 0 < job["timeout-minutes"] <= 60 and "latest" not in job["runs-on"], title
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            if "uses" in step:
                assert re.fullmatch(r"actions/[\w-]+@v\d+|pypa/gh-action-pypi-publish@release/v1", step["uses"])
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
            named = set(re.findall(r"\bmake ([\w-]+)", step.get("run", "")))
            assert named <= targets, (title, named)


def test_what_the_script_runs_the_workflows_run() -> None:
    """.ci/run is CI on one machine."""
    run = re.findall(r"^make (\w+)$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    jobs = workflow("ci.yml")["jobs"].values()
    assert {f"make {target}" for target in run} <= {step.get("run") for job in jobs for step in steps(job)}
    assert len(run) >= 4


def test_every_declared_python_is_tested() -> None:
    prefix = "Programming Language :: Python :: 3."
    declared = [f"3.{c.removeprefix(prefix)}" for c in PROJECT["project"]["classifiers"] if c.startswith(prefix)]
    assert PROJECT["project"]["requires-python"] == f">={declared[0]}"
    assert workflow("ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"] == declared
    built = " ".join(f"cp{version.replace('.', '')}-manylinux_*" for version in declared)
    assert PROJECT["tool"]["cibuildwheel"]["build"] == built
    first, last = (version.split(".")[1] for version in (declared[0], declared[-1]))
    assert f"(3, {first}) <= v <= (3, {last})" in MAKEFILE
    for file in ("README.md", "Makefile"):
        assert f"Python {declared[0]} to {declared[-1]}" in (ROOT / file).read_text(encoding="utf-8")


def test_a_release_is_tested_before_it_is_published() -> None:
    content = workflow("release.yml")
    assert content["on"] == {"push": {"tags": ["v*"]}}
    jobs = content["jobs"]
    before = {name for name, job in jobs.items() if "uses" in job}
    assert before == {"ci", "wheels"} and set(jobs["pypi"]["needs"]) == before
    assert all(jobs[name]["needs"] == "notes" for name in before) and jobs["github"]["needs"] == "pypi"
    # Nothing but the two that publish may write, and neither runs code of the repository.
    for name, job in jobs.items():
        assert ("permissions" in job) == (name in ("pypi", "github"))
        if "permissions" in job:
            assert not any("checkout" in step.get("uses", "") for step in steps(job))
    assert jobs["pypi"]["permissions"] == {"id-token": "write"}  # no password, no token that is kept


CHANGES = """# Changelog

## Unreleased

## 1.2.3 - 2026-12-01

### Added
- A thing.

## 1.2.2 - 2026-11-01
- Another.
"""


def notes(
    folder: Path, tag: str, *, version: str = "1.2.3", changes: str = CHANGES
) -> "subprocess.CompletedProcess[str]":
    (folder / ".ci").mkdir()
    (folder / ".ci" / "release.py").write_bytes((ROOT / ".ci" / "release.py").read_bytes())
    (folder / "pyproject.toml").write_text(f'[project]\nversion = "{version}"\n', encoding="utf-8")
    (folder / "CHANGELOG.md").write_text(changes, encoding="utf-8")
    return subprocess.run((sys.executable, folder / ".ci" / "release.py", tag), capture_output=True, text=True)


def test_the_notes_are_the_versions_section(tmp_path: Path) -> None:
    made = notes(tmp_path, "v1.2.3")
    assert (made.returncode, made.stdout, made.stderr) == (0, "### Added\n- A thing.\n", "")


@pytest.mark.parametrize(
    ("tag", "change", "said"),
    [
        ("v1.2.4", {}, "the tag must be v1.2.3, as pyproject.toml has it, found v1.2.4"),
        ("1.2.3", {}, "the tag must be v1.2.3"),
        (
            "v1.2.4",
            {"version": "1.2.4"},
            'CHANGELOG.md must have a section "## 1.2.4 - YYYY-MM-DD" with text, found none',
        ),
        ("v1.2", {"version": "1.2"}, "found none"),
        ("v1.2.3", {"changes": CHANGES.replace(" - 2026-12-01", "")}, "found none"),
        ("v1.2.3", {"changes": CHANGES.replace("### Added\n- A thing.\n", "")}, "found none"),
    ],
)
def test_a_tag_that_does_not_fit_is_refused(tmp_path: Path, tag: str, change: dict[str, str], said: str) -> None:
    made = notes(tmp_path, tag, **change)
    assert made.returncode == 1 and made.stdout == "" and said in made.stderr
