"""Some hundred damaged files of every kind: no crash, nothing printed, Pillow's pixels or refused by both.

`make soak` tries 20,000.
"""

from pathlib import Path

import pytest
from fuzzing import fuzz
from odd import every_kind

pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")


def test_five_hundred_damaged_files(tmp_path: Path) -> None:
    found = fuzz(0, len(every_kind()), 500, tmp_path)
    assert found.faults() == ""
    assert found.tried == 500 and found.shown > 100 and found.refused > 100 and found.by_dali > 50
