"""Training scripts and frameworks that are not in the project's own environment; `make clients` runs these tests.

Each client runs in the environment .clients, with a torch of PyPI and torchvision, or is skipped with a reason. The
scripts of timm and torchvision are taken from where they are and changed at run time, as their users would:

    DALI_DIFFUSEMIX_TIMM    a clone of huggingface/pytorch-image-models, of which HEAD and the newest tag are used
    DALI_DIFFUSEMIX_VISION  the sources of torchvision, with references/classification

With DALI_DIFFUSEMIX_CLIENTS_RECORD=FILE the results, the versions and what `measured` was given are written there.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path += [str(HERE.parents[1] / "benchmarks"), str(HERE.parent / "integrations")]

import record  # noqa: E402
from scripts import CLIENTS, Measured, version  # noqa: E402

from dali_diffusemix.fractals import FractalBank  # noqa: E402

_results: dict[str, dict[str, Any]] = {}


@pytest.fixture(scope="session")
def data(photos: Path, edits: Path, bank: FractalBank, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/, edits/ and fractals.npy; train/ and val/ are photos/ too."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("photos", "train", "val"):
        (folder / name).symlink_to(photos)
    (folder / "edits").symlink_to(edits)
    assert bank.path is not None
    (folder / "fractals.npy").symlink_to(bank.path)
    return folder


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Measured:
    def note(**facts: Any) -> None:
        _results.setdefault(request.node.nodeid, {}).setdefault("measured", {}).update(facts)

    return note


class Recorder:
    """Notes the outcome of every test of the run, also of those in tests/integrations, and writes the record."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        result = _results.setdefault(report.nodeid, {})
        result["seconds"] = round(result.get("seconds", 0.0) + report.duration, 2)
        if report.when == "call" or report.outcome != "passed":
            result["outcome"] = report.outcome
        if report.failed:
            result["error"] = report.longreprtext.splitlines()[-1]
        elif report.skipped and isinstance(report.longrepr, tuple):
            result["error"] = report.longrepr[2]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        path = os.environ.get("DALI_DIFFUSEMIX_CLIENTS_RECORD")
        if not path or session.config.option.collectonly:
            return
        machine = record.machine()
        machine["versions"] = {name: version(name) for name in CLIENTS}
        content = {"machine": machine, "benchmark": "clients", "results": _results}
        Path(path).write_text(json.dumps(content, indent=1) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("DALI_DIFFUSEMIX_CLIENTS_RECORD"):
        config.pluginmanager.register(Recorder())
