"""The long tests: `make soak` runs them and keeps what they measured; `make test` does not.

With DALI_DIFFUSEMIX_SOAK_RECORD=FILE the results and every number given to `measured` are written there.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.append(str(HERE.parents[1] / "benchmarks"))

import record  # noqa: E402

Measured = Callable[..., None]
"""(**numbers): what the running test measured."""

_results: dict[str, dict[str, Any]] = {}


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Measured:
    def note(**numbers: Any) -> None:
        _results.setdefault(request.node.nodeid, {}).setdefault("measured", {}).update(numbers)

    return note


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    result = _results.setdefault(report.nodeid, {})
    result["seconds"] = round(result.get("seconds", 0.0) + report.duration, 2)
    if report.when == "call" or report.outcome != "passed":
        result["outcome"] = report.outcome
    if report.failed:
        result["error"] = report.longreprtext.splitlines()[-1]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("soak")
    for name, result in _results.items():
        terminalreporter.line(f"{result.get('outcome', 'not run'):8} {result['seconds']:7.1f} s  {name}")
        for key, value in result.get("measured", {}).items():
            text = str(value)
            terminalreporter.line(f"{'':19}{key} = {text if len(text) <= 90 else text[:90] + '...'}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (path := os.environ.get("DALI_DIFFUSEMIX_SOAK_RECORD")) and not session.config.option.collectonly:
        content = {"machine": record.machine(), "benchmark": "soak", "results": _results}
        Path(path).write_text(json.dumps(content, indent=1) + "\n")
