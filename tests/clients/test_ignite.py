"""PyTorch-Ignite's Engine over the loader as it is: epochs, and a checkpoint inside an epoch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from samples import SIZE, described, training_set
from scripts import Measured, digest, version

from dali_diffusemix import DiffuseMixLoader

ignite = pytest.importorskip("ignite", reason="PyTorch-Ignite is not installed: make clients")

from ignite.engine import Engine, Events  # noqa: E402
from ignite.handlers import Checkpoint, DiskSaver  # noqa: E402

EPOCHS, STEPS = 2, 5


class Run:
    """A training whose parts are saved after every step."""

    def __init__(self, data: Path) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Linear(3 * SIZE * SIZE, 3)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9)
        self.loader = DiffuseMixLoader(training_set(data), 7, shuffle=True, num_workers=1, device="cpu")
        self.seen: list[tuple[int, Any]] = []
        self.engine = Engine(self.step)
        self.parts = {"model": self.model, "optimizer": self.optimizer, "engine": self.engine, "loader": self.loader}

    def step(self, engine: Engine, batch: Any) -> None:
        images, labels = batch
        self.seen.append((engine.state.epoch, described(images, labels)))
        self.optimizer.zero_grad()
        torch.nn.functional.cross_entropy(self.model(images.flatten(1)), labels).backward()
        self.optimizer.step()

    def go(self) -> None:
        self.engine.run(self.loader, max_epochs=EPOCHS)


def test_resume_after_every_step(data: Path, tmp_path: Path, measured: Measured) -> None:
    whole = Run(data)
    saver = Checkpoint(whole.parts, DiskSaver(str(tmp_path), create_dir=True), n_saved=None)
    whole.engine.add_event_handler(Events.ITERATION_COMPLETED, saver)
    whole.go()
    alone = DiffuseMixLoader(training_set(data), 7, shuffle=True, device="cpu")
    assert whole.seen == [
        (epoch, described(images, labels)) for epoch in range(1, EPOCHS + 1) for images, labels in alone
    ]
    assert len(whole.seen) == EPOCHS * STEPS
    for step in range(1, EPOCHS * STEPS):
        again = Run(data)
        state = torch.load(tmp_path / f"checkpoint_{step}.pt", weights_only=True)
        Checkpoint.load_objects(to_load=again.parts, checkpoint=state)
        again.go()
        assert again.seen == whole.seen[step:], step
        assert digest(again.model.state_dict()) == digest(whole.model.state_dict())
    measured(ignite=version("pytorch-ignite"), weights=digest(whole.model.state_dict())[:16])
