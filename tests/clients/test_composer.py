"""Composer's Trainer over the loader as it is: epochs, and a checkpoint inside an epoch."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import SIZE, described, training_set
from scripts import Measured, digest, version

from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, EvalCrop

# It and its own use of what others deprecate.
pytestmark = pytest.mark.filterwarnings("ignore")

EPOCHS, STEPS = 2, 5


def train(data: Path, out: Path, resume: Path | None = None) -> tuple[list[Any], str, int]:
    """The batches that the model was given, what stands for its weights, and the batches that the loader made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        composer = pytest.importorskip("composer", reason="Composer is not installed: make clients")
        from composer.models import ComposerClassifier
    seen: list[Any] = []
    made = [0]

    class Model(ComposerClassifier):  # type: ignore[misc]
        def forward(self, batch: Any) -> Any:
            if self.training:
                seen.append(described(*batch))
            return super().forward(batch)

    def counted(images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        made[0] += 1
        return images, labels

    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(3 * SIZE * SIZE, 3))
    model = Model(network, num_classes=3)
    trainer = composer.Trainer(
        model=model,
        optimizers=torch.optim.SGD(model.parameters(), 0.01, momentum=0.9),
        train_dataloader=DiffuseMixLoader(
            training_set(data), 7, shuffle=True, device="cpu", prefetch_factor=1, batch_transform=counted
        ),
        eval_dataloader=DiffuseMixLoader(DiffuseMixDataset(data / "photos", crop=EvalCrop(SIZE)), 8, device="cpu"),
        max_duration=f"{EPOCHS}ep",
        device="cpu",
        seed=5,
        save_folder=str(out),
        save_interval="1ba",
        save_filename="{batch}.pt",
        save_latest_filename=None,
        save_num_checkpoints_to_keep=-1,
        load_path=None if resume is None else str(resume),
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    return seen, digest(model.state_dict()), made[0]


def test_resume_after_every_step(data: Path, tmp_path: Path, measured: Measured) -> None:
    whole, weights, _ = train(data, tmp_path / "whole")
    alone = DiffuseMixLoader(training_set(data), 7, shuffle=True, device="cpu")
    assert whole == [described(*batch) for _ in range(EPOCHS) for batch in alone]
    made = {}
    for step in (3, 5, 7, 9):
        seen, again, made[step] = train(data, tmp_path / str(step), tmp_path / "whole" / f"{step}.pt")
        assert seen == whole[step:], step
        assert again == weights, step
    measured(composer=version("mosaicml"), weights=weights[:16], batches_made_after_resuming_at=made)
