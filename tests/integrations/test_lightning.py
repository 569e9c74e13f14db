"""Lightning's Trainer over the loader as it is: epochs, ranks, checkpoints inside an epoch, validation."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import SIZE, described, training_set
from torch.utils.data import DistributedSampler

from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, EvalCrop

pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")
pytest.importorskip("lightning", reason="Lightning is not installed: pip install 'dali-diffusemix[lightning]'")

from fit import BATCH, EPOCHS, expected, fit, record

# Lightning's advice about logging intervals and the like, and its own use of what PyTorch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore")

FIT = Path(__file__).with_name("fit.py")


# To be taken out once the loader does so.
@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[torch.Tensor]]:
    out = tmp_path_factory.mktemp("uninterrupted")
    return out, fit(data, out)


def test_the_trainer_chooses_the_epoch(data: Path, uninterrupted: tuple[Path, Any]) -> None:
    """The trainer takes an iterator before it says which epoch it is, and another one only to look whether it can."""
    assert record(uninterrupted[0]) == expected(data)


@pytest.mark.slow
def test_resume_after_every_step(data: Path, tmp_path: Path, uninterrupted: tuple[Path, list[torch.Tensor]]) -> None:
    """The same batches and the same weights, wherever training is taken up again: the ends of epochs too."""
    folder, weights = uninterrupted
    steps = len(expected(data))
    assert steps == EPOCHS * 5
    for step in range(1, steps):
        out = tmp_path / str(step)
        again = fit(data, out, resume=folder / f"step={step}.ckpt")
        assert record(out) == expected(data)[step:], step
        assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))


def test_validation_sees_every_image_once_and_disturbs_nothing(data: Path, uninterrupted: tuple[Path, Any]) -> None:
    folder, _ = uninterrupted
    loader = DiffuseMixLoader(
        DiffuseMixDataset(data / "photos", crop=EvalCrop(SIZE)), BATCH, device="cpu", return_index=True
    )
    whole = [described(images, index) for images, _, index in loader]
    assert [tuple(batch) for _, *batch in record(folder, "sanity")] == whole[:2]
    assert record(folder, "validation") == [(epoch, *batch) for epoch in range(EPOCHS) for batch in whole]


def test_validation_within_the_epoch_disturbs_nothing(data: Path, tmp_path: Path) -> None:
    fit(data, tmp_path, val_check_interval=2, num_sanity_val_steps=0)
    assert record(tmp_path) == expected(data)
    assert len(record(tmp_path, "validation")) == 5 * 2 * EPOCHS


@pytest.mark.slow
def test_two_processes_take_up_what_one_began(data: Path, tmp_path: Path, uninterrupted: tuple[Path, Any]) -> None:
    """The state counts for all ranks together: with the global batch the same, the number of ranks may change."""
    command = [sys.executable, FIT, data, tmp_path, "--devices", "2", "--resume", uninterrupted[0] / "step=7.ckpt"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert record(tmp_path, rank=rank) == expected(data, rank, 2)[7:]
    # 33 images in global batches of 8: of the last one rank 1 gets the first image again.
    seen = [i for rank in range(2) for _, indices, _ in record(tmp_path, "validation", rank) for i in indices]
    assert sorted(seen) == sorted([*range(33), 0])


def test_a_sampler_of_ones_own(data: Path, tmp_path: Path) -> None:
    """With the hook of docs/dropin.md, which tells the loader the epoch."""
    sampler = DistributedSampler(range(33), num_replicas=1, rank=0, seed=1)  # type: ignore[arg-type]
    loader = DiffuseMixLoader(training_set(data), BATCH, sampler=sampler, device="cpu", return_index=True)
    whole = []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        whole += [(epoch, *described(images, index)) for images, _, index in loader]
    fit(data, tmp_path / "whole", sampler=sampler)
    assert record(tmp_path / "whole") == whole
    for step in (3, 5, 7):
        fit(data, tmp_path / str(step), sampler=sampler, resume=tmp_path / "whole" / f"step={step}.ckpt")
        assert record(tmp_path / str(step)) == whole[step:]


def test_what_would_rebuild_the_loader_says_so(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs to subclass `torch\.utils\.data\.DataLoader`"):
        fit(data, tmp_path, overfit_batches=2)
