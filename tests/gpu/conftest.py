"""Tests that need a GPU. Without one they skip, with the reason; with DALI_DIFFUSEMIX_NEED_GPU=1 that is an error."""

import os
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
