"""Tests that need a GPU. Without one they skip, with the reason; with DALI_DIFFUSEMIX_NEED_GPU=1 that is an error."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest


def missing() -> str | None:
    try:
        from dali_diffusemix.base import gpu

        gpu.check_available()
    except ImportError as error:
        return str(error)
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    ours = [item for item in items if here in item.path.parents]
    reason = missing() if ours else None
    if reason is not None and os.environ.get("DALI_DIFFUSEMIX_NEED_GPU") == "1":
        raise pytest.UsageError(reason)
    if reason is not None:
        for item in ours:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """One test at a time has the GPU, of all processes of a run."""
    with Path(__file__).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a process that the test left may have the file open, too
