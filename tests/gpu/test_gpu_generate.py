"""Edits made on a GPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from material import photograph

from dali_diffusemix.generate.editors import EditTask
from dali_diffusemix.generate.editors.diffusers import DiffusersConfig

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
TASKS = [EditTask(image=image, prompt="autumn", seed=image) for image in range(4)]


def edits(model: Path, device: str, dtype: str, **fields: Any) -> np.ndarray:
    config = DiffusersConfig(model=str(model), steps=3, dtype=dtype, **fields)
    images = [photograph(seed, 64, 64) for seed in range(4)]
    return np.stack(config.load(["autumn"], device=device, batch_size=4).edit(images, TASKS))


def test_a_gpus_edits_are_those_of_the_cpu(tiny_model: Path) -> None:
    """The noise is drawn on the CPU; what differs is rounding."""
    expected = edits(tiny_model, "cpu", "float32").astype(float)
    assert np.abs(edits(tiny_model, "cuda", "float32") - expected).mean() < 1
    assert np.abs(edits(tiny_model, "cuda", "float16") - expected).mean() < 4


def test_they_are_the_same_again(tiny_model: Path) -> None:
    np.testing.assert_array_equal(edits(tiny_model, "cuda", "float16"), edits(tiny_model, "cuda", "float16"))


def test_compiled_they_are_the_same_but_for_rounding(tiny_model: Path) -> None:
    plain, compiled = (edits(tiny_model, "cuda", "float32", compile=compile) for compile in (False, True))
    assert np.abs(plain.astype(float) - compiled).mean() < 2
