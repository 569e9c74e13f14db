"""Some hundred damaged files of every kind: no crash, nothing printed, Pillow's pixels or refused by both.

`make soak` tries 20,000.
"""

from pathlib import Path
from typing import Any

import fuzzing
import pytest
from fuzzing import fuzz
from odd import every_kind

pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")


@pytest.mark.slow
def test_five_hundred_damaged_files(tmp_path: Path) -> None:
    found = fuzz(0, len(every_kind()), 500, tmp_path)
    assert found.faults() == ""
    assert found.tried == 500 and found.shown > 100 and found.refused > 100 and found.by_dali > 50


def test_what_ends_a_process_is_found_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a process that dies of files 1003 and, in the next batch, 1051."""

    def run(
        seed: int, first: int, count: int, folder: Path, limit: float, only: list[int] | None = None
    ) -> tuple[list[dict[str, Any]], list[str], str]:
        lines: list[dict[str, Any]] = []
        for begin in range(first, first + count, fuzzing.BATCH):
            rows = range(begin, min(begin + fuzzing.BATCH, first + count))
            lines.append({"begin": begin})
            if {1003, 1051}.intersection(rows if only is None else only):
                return lines, [], "exit code -11"
            lines += [{"file": i, "name": "", "verdict": "shown", "dali": True} for i in rows]
        return lines, [], ""

    monkeypatch.setattr(fuzzing, "_run", run)
    found = fuzz(0, 1000, 200, tmp_path)
    assert set(found.crashes) == {1003, 1051} and found.shown == 198 and found.tried == 200
    assert "crashes 1003" in found.faults() and "exit code -11" in found.faults()
    assert sorted(path.name for path in tmp_path.glob("crash*")) == ["crash 1003", "crash 1051"]
