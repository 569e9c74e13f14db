"""Transformers' Trainer over the loader: epochs, checkpoints inside an epoch, accumulation, evaluation."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import SIZE, described, training_set
from torch.utils.data import DistributedSampler, RandomSampler

from dali_diffusemix import ConfigError, DiffuseMixDataset, DiffuseMixLoader, EvalCrop

pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")
pytest.importorskip("transformers", reason="Transformers is not installed")
pytest.importorskip("accelerate", reason="Accelerate is not installed")

from accelerate import skip_first_batches
from trained import BATCH, EPOCHS, Classifier, arguments, expected, record, train, trainer_of

from dali_diffusemix.integrations.accelerate import AcceleratedLoader
from dali_diffusemix.integrations.transformers import TrainerLoader

# Its advice, and its own use of what PyTorch deprecates.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SCRIPT = Path(__file__).with_name("trained.py")
STEPS = 5


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    out = tmp_path_factory.mktemp("uninterrupted")
    return out, train(data, out)


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_trainer_chooses_the_epoch(data: Path, uninterrupted: tuple[Path, Any]) -> None:
    assert record(uninterrupted[0]) == expected(data)
    assert len(expected(data)) == STEPS * EPOCHS


def test_resume_within_the_epoch_makes_nothing_twice(data: Path, tmp_path: Path, uninterrupted: Any) -> None:
    folder, weights = uninterrupted
    trainer = trainer_of(data, tmp_path, save=False)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-8"))
    assert record(tmp_path) == expected(data)[8:]
    assert equal(trainer.model.state_dict(), weights)
    assert trainer.train_dataset.stats().batches == 2
    assert trainer.state.epoch == EPOCHS


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resume_after_every_step(data: Path, tmp_path: Path, accumulation: int) -> None:
    """The same batches and the same weights: also at an epoch's end, and where gradients accumulate over it."""
    weights = train(data, tmp_path / "whole", accumulation=accumulation)
    steps = -(-STEPS // accumulation)
    for step in range(1, steps * EPOCHS):
        out = tmp_path / str(step)
        again = train(data, out, accumulation=accumulation, resume=tmp_path / "whole" / f"checkpoint-{step}")
        seen = step // steps * STEPS + step % steps * accumulation
        assert record(out) == expected(data)[seen:], step
        assert equal(again, weights), step


def test_evaluation_sees_every_image_once_and_disturbs_nothing(data: Path, tmp_path: Path) -> None:
    trainer = trainer_of(data, tmp_path, save=False, eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert record(tmp_path) == expected(data)
    whole = DiffuseMixLoader(DiffuseMixDataset(data / "photos", crop=EvalCrop(SIZE)), 33, device="cpu")
    ((images, labels),) = whole
    found = trainer.predict(whole)
    torch.testing.assert_close(torch.from_numpy(found.predictions), trainer.model(images)["logits"].detach())
    assert found.label_ids.tolist() == labels.tolist()
    assert trainer.evaluate(eval_dataset="valid")["eval_loss"] == pytest.approx(found.metrics["test_loss"])


def test_two_processes_take_up_what_they_began(data: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT, data]
    for out, *resume in ((tmp_path / "whole",), (tmp_path / "again", tmp_path / "whole" / "checkpoint-7")):
        done = subprocess.run([*torchrun, out, *resume], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        for rank in range(2):
            found = record(out, rank)
            assert found == record(tmp_path / "whole", rank)[7 if resume else 0 :]
            if not resume:  # the last batch of an epoch has the same size on both ranks
                for step, (batch, alone) in enumerate(zip(found, expected(data, rank, 2), strict=True)):
                    assert batch == alone if step % 6 < 5 else len(batch[0]) == 2
    whole, again = (json.loads((tmp_path / name / "weights.json").read_text()) for name in ("whole", "again"))
    assert whole == again


def test_skipping_leads_to_the_loaders_own_batches(data: Path, tmp_path: Path) -> None:
    """`skip_first_batches` makes a DataLoader from the attributes: of dictionaries, of the epoch that is asked for."""
    accelerator = trainer_of(data, tmp_path, save=False).accelerator
    loader = DiffuseMixLoader(training_set(data), BATCH, shuffle=True, device="cpu", dtype=torch.float16)
    epochs = [[described(images, labels) for images, labels in loader] for _ in range(3)]
    prepared = TrainerLoader(AcceleratedLoader(loader, accelerator), ("pixel_values", "labels"), lambda batches: 1)
    skipped = skip_first_batches(prepared, 3)
    found = [described(batch["pixel_values"], batch["labels"]) for batch in skipped]
    assert found == epochs[1][3:] and len(skipped) == 2
    assert loader.state_dict()["epoch"] == 2
    assert not accelerator.gradient_state.in_dataloader
    with pytest.raises(ConfigError, match=r"in order: batch 2 is next, found 4"):
        batches = prepared.dataset
        batches[1], batches[4]


def test_a_distributed_sampler_is_told_the_epoch(data: Path, tmp_path: Path) -> None:
    def sampler() -> Any:
        return DistributedSampler(range(33), num_replicas=1, rank=0, seed=1)  # type: ignore[arg-type]

    weights = train(data, tmp_path / "whole", sampler=sampler())
    orders = record(tmp_path / "whole")
    assert len({pixels for _, pixels in orders}) == STEPS * EPOCHS
    again = train(data, tmp_path / "again", sampler=sampler(), resume=tmp_path / "whole" / "checkpoint-7")
    assert record(tmp_path / "again") == orders[7:]
    assert equal(again, weights)


def test_what_cannot_be_resumed_is_refused(data: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"batch_size": 4}, r"batch_size of the loader must be the Trainer's, 7, found 4; give Training"),
        ({"sampler": RandomSampler(range(33))}, "sampler of the loader must have set_epoch, found RandomSampler"),
        ({"return_index": True}, "return_index of the loader must be False"),
    ]
    for options, message in cases:
        loader = DiffuseMixLoader(training_set(data), **{"batch_size": BATCH, "device": "cpu", **options})
        with pytest.raises(ConfigError, match=message):
            trainer_of(data, tmp_path, save=False, loader=loader).train()


def test_other_datasets_are_left_to_the_trainer(data: Path, tmp_path: Path) -> None:
    samples = [{"pixel_values": torch.zeros(3, SIZE, SIZE), "labels": 1} for _ in range(BATCH)]
    trainer = trainer_of(data, tmp_path, save=False, loader=samples)
    trainer.train()
    assert trainer.predict(samples).label_ids.tolist() == [1] * BATCH
    assert trainer.evaluate(samples)["eval_loss"] > 0
    assert isinstance(trainer.model, Classifier) and arguments(tmp_path, save=False).report_to == []
