"""Records of long tests: outcomes and what they measured, as benchmarks/results has them."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import record


class Recording:
    """A pytest plugin that notes every test's outcome and seconds, and writes a record at the end.

    Args:
        benchmark: The record's name.
        variable: The environment variable with the record's file; without it none is written.
        versions: Those of the record, in place of the usual packages'.
    """

    def __init__(self, benchmark: str, variable: str, versions: Mapping[str, str] | None = None) -> None:
        self.results: dict[str, dict[str, Any]] = {}
        self._benchmark, self._variable, self._versions = benchmark, variable, versions

    def note(self, test: str, facts: Mapping[str, Any]) -> None:
        """Add to what a test measured."""
        self.results.setdefault(test, {}).setdefault("measured", {}).update(facts)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        result = self.results.setdefault(report.nodeid, {})
        result["seconds"] = round(result.get("seconds", 0.0) + report.duration, 2)
        if report.when == "call" or report.outcome != "passed":
            result["outcome"] = report.outcome
        if report.failed:
            result["error"] = report.longreprtext.splitlines()[-1]
        elif report.skipped and isinstance(report.longrepr, tuple):
            result["error"] = report.longrepr[2]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if (path := os.environ.get(self._variable)) and not session.config.option.collectonly:
            machine = record.machine()
            if self._versions is not None:
                machine["versions"] = dict(self._versions)
            content = {"machine": machine, "benchmark": self._benchmark, "results": self.results}
            Path(path).write_text(json.dumps(content, indent=1) + "\n")
