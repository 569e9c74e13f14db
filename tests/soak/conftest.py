"""The long tests: `make soak` runs them and keeps what they measured; `make test` does not.

With DALI_DIFFUSEMIX_SOAK_RECORD=FILE the results and every number given to `measured` are written there.
"""

from collections.abc import Callable
from typing import Any

import pytest
from recording import Recording

Measured = Callable[..., None]
"""(**numbers): what the running test measured."""

recording = Recording("soak", "DALI_DIFFUSEMIX_SOAK_RECORD")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(recording)


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Measured:
    def note(**numbers: Any) -> None:
        recording.note(request.node.nodeid, numbers)

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("soak")
    for name, result in recording.results.items():
        terminalreporter.line(f"{result.get('outcome', 'not run'):8} {result['seconds']:7.1f} s  {name}")
        for key, value in result.get("measured", {}).items():
            text = str(value)
            terminalreporter.line(f"{'':19}{key} = {text if len(text) <= 90 else text[:90] + '...'}")
