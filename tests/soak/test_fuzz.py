"""Twenty thousand files of every kind, most of them damaged: no crash, nothing printed, equal or refused by both.

DALI_DIFFUSEMIX_FUZZ_SEED=N tries others. Files at fault are kept in the folder that pytest names.
"""

import os
from pathlib import Path
from typing import Final

import pytest
from conftest import Measured
from fuzzing import fuzz

pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")

COUNT: Final = 20_000


def test_twenty_thousand_files(tmp_path: Path, measured: Measured) -> None:
    seed = int(os.environ.get("DALI_DIFFUSEMIX_FUZZ_SEED", "1"))
    found = fuzz(seed, 0, COUNT, tmp_path)
    measured(seed=seed, **found.numbers())
    assert found.faults() == ""
    assert found.tried == COUNT and found.shown > COUNT / 5 and found.refused > COUNT / 5 and found.by_dali > COUNT / 10
